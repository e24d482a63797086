"""What an owner writes down, and what it can tell of other processes."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tiercache.owner import state
from tiercache.owner.state import Client, Process, State

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="Linux only")
ARENA = bytes(range(16))


def test_a_state_is_read_as_it_was_written(tmp_path: Path) -> None:
    wrote = State(
        ARENA, state.me(), (Client(Process(7, 70), "a"), Client(Process(7, 70), "b")), 2, {"memory_bytes": 1 << 30}
    )
    wrote.write(str(tmp_path))
    assert state.read(str(tmp_path)) == wrote
    file = tmp_path / state.FILE
    assert file.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == [state.FILE]
    state.remove(str(tmp_path))
    assert not os.listdir(tmp_path) and state.read(str(tmp_path)) is None
    state.remove(str(tmp_path))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 1}', '{"format": 2}', '{"format": 2, "clients": [1], "owner": [1, 2]}', "null"]
)
def test_what_cannot_be_understood_is_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / state.FILE).write_text(text)
    assert state.read(str(tmp_path)) is None


def test_a_state_that_cannot_be_written_takes_the_old_one_along(tmp_path: Path) -> None:
    one = State(ARENA, state.me())
    one.write(str(tmp_path))
    (tmp_path / f"{state.FILE}.new").mkdir()  # stands for a disk that takes nothing
    with pytest.raises(OSError, match="irectory"):
        one.write(str(tmp_path))
    assert state.read(str(tmp_path)) is None


def test_a_link_that_somebody_put_there_is_not_written_through(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("mine")
    (tmp_path / f"{state.FILE}.new").symlink_to(other)
    one = State(ARENA, state.me())
    one.write(str(tmp_path))
    assert other.read_text() == "mine" and state.read(str(tmp_path)) == one
    (tmp_path / state.FILE).rename(other)
    (tmp_path / state.FILE).symlink_to(other)
    assert state.read(str(tmp_path)) is None


def test_a_pipe_is_no_state_and_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / state.FILE)
    assert state.read(str(tmp_path)) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="needs the rights to give files away")
def test_what_another_user_wrote_is_not_believed_unless_the_directory_is_his(tmp_path: Path) -> None:
    one = State(ARENA, state.me())
    one.write(str(tmp_path))
    os.chown(tmp_path / state.FILE, 65534, -1)
    assert state.read(str(tmp_path)) is None
    os.chown(tmp_path, 65534, -1)
    assert state.read(str(tmp_path)) == one


def test_processes_are_told_apart_by_when_they_began() -> None:
    mine = state.me()
    assert mine.pid == os.getpid() and mine.alive and mine == state.process(os.getpid())
    assert not Process(mine.pid, mine.started + 1).alive
    assert not Process(0, 0).alive and state.process(-1) is None and state.process(1 << 30) is None


def test_a_zombie_is_dead() -> None:
    with subprocess.Popen([sys.executable, "-c", "pass"], stdin=subprocess.PIPE) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert state.process(child.pid) is None
        assert state.ended(child.pid)
    assert state.ended(child.pid) and not state.ended(os.getpid())
    assert not state.ended(0)  # of another PID namespace: who knows


def test_memory_files_of_another_process_are_found_by_arena() -> None:
    other = bytes(16)
    source = f"""
import os, sys
kept = [os.memfd_create(name) for name in ("tiercache-{ARENA.hex()}-0", "tiercache-{ARENA.hex()}-2",
        "tiercache-{other.hex()}-1", "tiercache-{ARENA.hex()}-", "x")]
again = os.dup(kept[0])
os.pwrite(kept[1], b"two", 0)
print(flush=True)
sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdin is not None
        child.stdout.readline()
        there = state.process(child.pid)
        assert there is not None
        found = state.memory_files(ARENA, [Process(1 << 30, 1), there])
        child.stdin.close()
    assert sorted(found) == [0, 2]
    assert os.pread(found[2], 3, 0) == b"two"  # the memory outlives whoever made it
    for fd in found.values():
        os.close(fd)
    assert not there.alive


def test_memory_counts_for_as_long_as_it_is_mapped() -> None:
    mine = state.me()
    fd = os.memfd_create(f"tiercache-{ARENA.hex()}-0")
    os.ftruncate(fd, 4096)
    assert not state.maps_memory(ARENA, mine)
    memory = mmap.mmap(fd, 4096)
    os.close(fd)
    assert state.maps_memory(ARENA, mine) and not state.maps_memory(b"\xff" * 16, mine)
    assert not state.maps_memory(ARENA, Process(mine.pid, mine.started + 1))
    memory.close()
    assert not state.maps_memory(ARENA, mine)


def test_the_file_is_plain_json(tmp_path: Path) -> None:
    State(ARENA, Process(1, 2), (Client(Process(3, 4), "t"),)).write(str(tmp_path))
    facts = json.loads((tmp_path / state.FILE).read_text())
    assert facts.pop("arena") == ARENA.hex()
    assert facts == {"format": 2, "owner": [1, 2], "clients": [[[3, 4], "t"]], "strangers": 0, "settings": {}}
