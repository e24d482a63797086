"""The store of rows and its simulated twin keep one contract; the real one also over kill -9."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tiercache.ssd.meta import RowsError, open_rocks
from tiercache.testing.simdisk import SimDisk

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tiercache.ssd.meta import Rows


@pytest.fixture(params=["rocks", "simulated"])
def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Rows]:
    """Opens the same store each time."""
    disk = SimDisk(random.Random(1))
    if request.param == "rocks":
        return lambda: open_rocks(str(tmp_path / "rows"), 4 << 20)
    return lambda: disk.open_rows("/rows", 4 << 20)


def test_rows_are_an_ordered_map(reopen: Callable[[], Rows]) -> None:
    """Puts, deletes, reads by key and by prefix, in order, big values too."""
    rows = reopen()
    assert rows.get(b"a1") is None and list(rows.scan(b"")) == []
    rows.write([(b"b1", b"x"), (b"a2", b""), (b"a1", b"big" * 100_000), (b"a\xff", b"y")])
    assert rows.get(b"a2") == b"" and rows.get(b"a1") == b"big" * 100_000
    assert [key for key, _ in rows.scan(b"a")] == [b"a1", b"a2", b"a\xff"]
    rows.write([(b"a2", b"new")], [b"a1", b"never"])
    assert list(rows.scan(b"a")) == [(b"a2", b"new"), (b"a\xff", b"y")]
    rows.close()


def test_deletes_come_before_puts_of_a_batch(reopen: Callable[[], Rows]) -> None:
    """One key in both is there afterwards."""
    rows = reopen()
    rows.write([(b"k", b"1")])
    rows.write([(b"k", b"2")], [b"k"])
    assert rows.get(b"k") == b"2"
    rows.close()


def test_what_was_written_is_there_again(reopen: Callable[[], Rows]) -> None:
    """After closing and opening; positions only grow."""
    rows = reopen()
    positions = [rows.position()]
    for turn in range(20):
        rows.write([(b"%d" % turn, b"v" * turn)], [b"%d" % (turn - 5)])
        positions.append(rows.position())
    rows.sync()
    kept = list(rows.scan(b""))
    rows.close()
    rows = reopen()
    assert list(rows.scan(b"")) == kept
    positions.append(rows.position())
    assert positions == sorted(positions) and positions[0] < positions[-1]
    rows.close()


def test_a_closed_store_says_so(reopen: Callable[[], Rows]) -> None:
    """RowsError, whatever is asked."""
    rows = reopen()
    rows.close()
    for call in (lambda: rows.write([(b"a", b"b")]), rows.sync, lambda: rows.get(b"a"), lambda: list(rows.scan(b""))):
        with pytest.raises(RowsError):
            call()


def test_a_power_cut_keeps_a_prefix_that_holds_what_was_synced() -> None:
    """The simulated store's own promise: batches are lost whole, and only from the end."""
    for seed in range(50):
        disk = SimDisk(random.Random(seed))
        rows = disk.open_rows("/rows", 0)
        for turn in range(10):
            rows.write([(b"%d" % turn, b""), (b"also %d" % turn, b"")])
            if turn == 5:
                rows.sync()
        disk.power_cut()
        there = {key for key, _ in disk.open_rows("/rows", 0).scan(b"")}
        count = len(there) // 2
        assert count >= 6
        assert there == {b"%d" % i for i in range(count)} | {b"also %d" % i for i in range(count)}


WRITER = """
import sys
from tiercache.ssd.meta import open_rocks
rows = open_rocks(sys.argv[1], 4 << 20)
for turn in range(1_000_000):
    rows.write([(b"%09d" % turn, b"v"), (b"also%09d" % turn, b"w" * 1000)])
    rows.sync()
    print(turn, flush=True)
"""


@pytest.mark.slow
def test_synced_batches_survive_a_kill_whole(tmp_path: Path) -> None:
    """The real store in a process that is killed: every acknowledged batch is there, and no half of one."""
    child = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "rows")], stdout=subprocess.PIPE)
    assert child.stdout is not None
    last = -1
    for line in child.stdout:
        last = int(line)
        if last == 200:
            os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    rows = open_rocks(str(tmp_path / "rows"), 4 << 20)
    turns = [int(key) for key, _ in rows.scan(b"0")]
    also = [int(key[4:]) for key, _ in rows.scan(b"also")]
    assert turns == also == list(range(len(turns))) and len(turns) > last
    rows.close()
