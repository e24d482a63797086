"""python -m tests.kv_extras: float8, packed blocks, encoder outputs and LoRA namespaces, a row each."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from tests.kv_extras.rows import all_rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kv_extras", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one line of JSON a row")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = all_rows(Path(folder))
    if asked.json:
        for row in rows:
            print(json.dumps(asdict(row) | {"good": row.good}))
        return 0 if all(row.good for row in rows) else 1
    print(f"{'':18} {'puts':>5} {'hits':>5} {'strangers':>9} {'wrong':>6} {'stored':>7} {'rms error':>9} {'poison':>8}")
    for row in rows:
        error = f"{row.relative_rms:.2%}" if row.relative_rms else "none"
        found = "found" if row.poison_found else "MISSED"
        print(
            f"{row.name:18} {row.puts:5} {row.hits:5} {row.strangers:9} {row.wrong_bytes:6} {row.stored:6.2f}x"
            f" {error:>9} {found:>8}"
        )
    return 0 if all(row.good for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
