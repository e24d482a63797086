"""Twenty kills in every run of the suite; `make nightly` does a thousand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_twenty_kills_lose_nothing_durable_and_read_no_wrong_byte() -> None:
    command = [sys.executable, "-m", "tests.crash", "--kills", "20", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.stdout, done.stderr
    sums = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0, (sums, done.stderr[-2000:])
    assert (sums["wrong"], sums["lost"], sums["over_cap"], sums["fault_count"]) == (0, 0, 0, 0)
    assert sums["kills"] == 20
    assert sums["opened"] > 5
    assert sums["checked"] > 0
