"""`python -m tests.remote_hosts`: hosts with nothing in common but a bucket; the writers are killed, others read."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.remote_hosts.show import run

bad, mismatch = False, 0
print(
    f"{'blocks of 256 KiB':38}{'put':>5}{'uploaded':>10}{'loaded by the 2nd':>19}{'wrong':>7}{'most bytes of cap':>28}"
)
for share in (False, True):
    with tempfile.TemporaryDirectory() as home:
        rows = run(Path(home), share=share)
    for row in rows:
        what = f"{row['what']}, {'owner killed too' if share else 'embedded'}"
        most = f"{row['bytes_max']:,} of {row['cap_bytes']:,}"
        print(f"{what:38}{row['put']:>5}{row['uploaded']:>10}{row['right']:>19}{row['wrong']:>7}{most:>28}")
        mismatch += row["wrong"]
        bad |= row["wrong"] > 0 or row["bytes_max"] > row["cap_bytes"]
        bad |= row["right"] < (row["put"] if row["what"] == "within the cap" else 1)
print("mismatch", mismatch)
sys.exit(bad)
