"""kill -9 of a process that writes to an SSD tier: nothing durable is lost, nothing is wrong, caps hold, it reopens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

WRITER = Path(__file__).with_name("ssd_writer.py")


@pytest.mark.slow
@pytest.mark.parametrize(
    "kills", [20, pytest.param(1000, marks=[pytest.mark.nightly, pytest.mark.timeout(3600)])], ids="kills_{}".format
)
def test_killed_while_writing(tmp_path: Path, kills: int) -> None:
    """At random moments, a quarter of them while it opens and recovers."""
    done = subprocess.run(
        [sys.executable, str(WRITER), str(tmp_path / "cache"), str(kills), "7"],
        check=False,
        capture_output=True,
        text=True,
        timeout=100 + 5 * kills,
    )
    assert done.returncode == 0, done.stderr
    totals = json.loads(done.stdout)
    assert totals["kills"] == kills
    assert totals["checked"] > kills, "the writer wrote next to nothing"
    assert (totals["lost"], totals["wrong"], totals["over"]) == (0, 0, 0), totals
