"""kill -9 of a process that writes to an SSD tier: nothing durable is lost, nothing is wrong, caps hold, it reopens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = int(os.environ.get("SSD_KILLS", "20"))
WRITER = Path(__file__).with_name("ssd_writer.py")


@pytest.mark.slow
def test_killed_while_writing(tmp_path: Path) -> None:
    """At random moments, a quarter of them while it opens and recovers."""
    done = subprocess.run(
        [sys.executable, str(WRITER), str(tmp_path / "cache"), str(KILLS), "7"],
        check=False,
        capture_output=True,
        text=True,
        timeout=100 + 5 * KILLS,
    )
    assert done.returncode == 0, done.stderr
    totals = json.loads(done.stdout)
    assert totals["kills"] == KILLS
    assert totals["checked"] > KILLS, "the writer wrote next to nothing"
    assert (totals["lost"], totals["wrong"], totals["over"]) == (0, 0, 0), totals
