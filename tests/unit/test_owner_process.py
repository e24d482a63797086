"""What an owner leaves behind of whoever started it, and how long its log may get."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tiercache.owner import life
from tiercache.wire import starting

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux only")

CONFINED = """
import json, logging, os, resource
processors = sorted(os.sched_getaffinity(0))
os.sched_setaffinity(0, processors[:1])
os.nice(7)
for limit in (resource.RLIMIT_CPU, resource.RLIMIT_NOFILE):
    resource.setrlimit(limit, (500, resource.getrlimit(limit)[1]))
from tiercache.owner.process import stand_alone
logging.basicConfig()
stand_alone()
print(json.dumps({"all": processors, "now": sorted(os.sched_getaffinity(0)), "nice": os.nice(0),
    "cpu": resource.getrlimit(resource.RLIMIT_CPU), "files": resource.getrlimit(resource.RLIMIT_NOFILE)}))
"""

TALKER = """
import logging, os, sys
from tiercache.owner.process import Log
from tiercache.wire import starting
os.dup2(starting._open_log(sys.argv[1]), 2)
logging.basicConfig(level=logging.INFO, handlers=[said := Log()])
said.directory = sys.argv[1]
for number in range(30_000):
    logging.warning("a disk that fails, told again and again, in a line that is about a hundred bytes long: %d", number)
"""


def test_what_its_starter_was_confined_to_is_lifted() -> None:
    done = subprocess.run([sys.executable, "-c", CONFINED], capture_output=True, text=True, check=True)
    now = json.loads(done.stdout)
    assert set(now["now"]) >= set(now["all"])
    assert now["nice"] == 0 or "nice 7" in done.stderr
    assert now["cpu"][0] == now["cpu"][1] and now["files"][0] == now["files"][1] > 500
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    assert ("CPU seconds" in done.stderr) == (now["cpu"][0] != resource.RLIM_INFINITY) or hard != now["cpu"][1]


def test_a_log_stays_short_however_much_is_said(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", TALKER, str(tmp_path)], check=True)
    text = (tmp_path / starting.LOG_NAME).read_text()
    assert len(text) < 1.5 * starting.LOG_BYTES_MAX
    assert text.endswith("long: 29999\n") and text.count("\n") > 1000


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / life.LOCK_NAME).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic"):
        life._lock(str(tmp_path), 0.0)
    assert not (tmp_path / "elsewhere").exists()
