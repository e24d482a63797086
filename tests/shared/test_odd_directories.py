"""Directories that cannot be shared as they are, or change while they are in use: whoever opens one gets a cache, and
one clear line where it is not the shared one."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.shared.conftest import PATIENCE_S, Shared, eventually, wait_for
from tiercache.owner import state
from tiercache.wire.frames import VERSION

pytestmark = [pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="Linux only"), pytest.mark.slow]
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs the rights to become another user")
MIB = 1 << 20
NOBODY = 65534
OTHER = VERSION + 1


def works_alone(one: Any) -> str:
    """Whether a process has a cache of its own; the one line that it said."""
    assert one.kind() == "Cache"
    assert one.put("own", "x", 100_000) == "HIT" and one.get("own") == ["x", 100_000, True]
    said = [line for line in one.warnings() if "cannot be shared" in line]
    assert len(said) == 1 and "\n" not in said[0], one.warnings()
    return said[0]


def work_together(shared: Shared, *workers: Any) -> None:
    for i, each in enumerate(workers):
        assert each.kind() == "SharedCache" and each.warnings() == []
        assert each.put(f"of {i}", "abc"[i], 100_000) == "HIT"
    for each in workers:
        assert [each.get(f"of {i}") for i in range(len(workers))] == [
            ["abc"[i], 100_000, True] for i in range(len(workers))
        ]


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts small file systems in memory; skips where this user may not."""
    made: list[Path] = []

    def mount(options: str) -> Path:
        place = tmp_path / f"mount {len(made)}"
        place.mkdir(mode=0o700)
        command = ["mount", "-t", "tmpfs", "-o", f"{options},mode=700", "tmpfs", str(place)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
        made.append(place)
        return place

    yield mount
    for place in made:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: Path) -> None:
    """Uses up a file system to the last page."""
    fd = os.open(place / "ballast", os.O_WRONLY | os.O_CREAT)
    try:
        with pytest.raises(OSError, match="No space"):
            for _ in range(1 << 20):
                os.write(fd, bytes(1 << 16))
        with pytest.raises(OSError, match="No space"):
            for _ in range(1 << 20):
                os.write(fd, bytes(1))
    finally:
        os.close(fd)


# -- places that nothing can be written to


def test_a_read_only_file_system(shared: Shared, worker: Any, mounted: Any) -> None:
    shared.directory = str(mounted("size=2m,ro"))
    line = works_alone(worker())
    assert shared.directory in line and "ead-only" in line


@root_only
def test_a_directory_without_the_right_to_write(shared: Shared, worker: Any, open_path: Path) -> None:
    os.chown(open_path, NOBODY, NOBODY)
    open_path.chmod(0o500)
    shared.directory = str(open_path)
    one = worker(None)
    one.become(NOBODY)
    one.open(shared.directory, **shared.settings)
    assert "ermission denied" in works_alone(one)


def test_a_full_disk(shared: Shared, worker: Any, mounted: Any) -> None:
    """Full from the start: sockets and locks are empty files and may go through, or not; the cache works."""
    place = mounted("size=1m")
    (place / "cache").mkdir(mode=0o700)
    fill(place)
    shared.directory = str(place / "cache")
    one, two = worker(), worker()
    assert one.put("a", "x", 5 * MIB) == "HIT" and one.get("a") == ["x", 5 * MIB, True]
    assert two.get("a") == ["x", 5 * MIB, True] if two.kind() == "SharedCache" else two.get("a") == ["MISS"]
    for each in (one, two):
        said = [line for line in each.warnings() if not line.startswith("ssd_bytes is")]  # more than the disk has
        assert len(said) == 1 or (each.kind() == "Cache" and len(said) == 2), said
        print(each.kind(), each.warnings())
    with pytest.raises(RuntimeError, match="durable=True needs an SSD"):
        one.put("b", "y", 1000, durable=True)


def test_a_disk_that_runs_full(shared: Shared, worker: Any, mounted: Any) -> None:
    """While it is in use: what is in memory goes on, durable puts are refused, new clients come and go."""
    place = mounted("size=64m")
    shared.directory = str(place / "cache")
    shared.settings["ssd_bytes"] = 48 * MIB
    one = worker()
    assert one.put("a", "x", MIB, durable=True) == "HIT"
    fill(place)
    outcomes = {one.put(f"durable {i}", "y", 4 * MIB, durable=True) for i in range(8)}
    assert "FULL" in outcomes, outcomes
    two = worker()
    assert two.kind() == "SharedCache" and two.put("b", "z", MIB) == "HIT"
    assert one.get("b") == ["z", MIB, True] and one.get("a") == two.get("a") == ["x", MIB, True]
    two.kill()
    assert one.put("c", "w", MIB) == "HIT" and one.validate()["broken"] == ""
    os.unlink(place / "ballast")


def test_an_owner_that_dies_while_the_disk_is_full(shared: Shared, worker: Any, mounted: Any) -> None:
    """The next one does not go on without what is on the disk: it comes when the disk has room, with all of it."""
    place = mounted("size=64m")
    shared.directory = str(place / "cache")
    shared.settings |= {"ssd_bytes": 48 * MIB, "owner_deadline_s": 0.5}
    one = worker()
    assert one.put("a", "x", MIB, durable=True) == "HIT" and one.put("memory", "m", MIB) == "HIT"
    fill(place)
    shared.kill_owner()
    one.get("a")  # a hit or a miss: it looks for the next owner
    eventually(lambda: "trying again" in shared.log())
    os.unlink(place / "ballast")

    def stored() -> bool:
        try:
            return bool(one.put("b", "y", 1000, durable=True) == "HIT")
        except RuntimeError:
            return False

    eventually(stored)
    assert one.get("a") == ["x", MIB, True] and one.get("memory") == ["m", MIB, True]
    assert one.validate()["broken"] == ""


# -- other users and other releases


@pytest.fixture
def open_path() -> Iterator[Path]:
    """A directory that other users can reach (pytest's own are closed to them)."""
    with tempfile.TemporaryDirectory(dir="/tmp") as path:
        Path(path).chmod(0o755)
        yield Path(path)


@root_only
def test_another_users_owner(shared: Shared, worker: Any, open_path: Path) -> None:
    shared.directory = str(open_path / "cache")
    one, other = worker(), worker(None)
    assert one.put("secret", "x", MIB) == "HIT"
    other.become(NOBODY)
    other.open(shared.directory, **shared.settings)
    line = works_alone(other)
    assert "belongs to user 0" in line and f"runs as {NOBODY}" in line
    assert other.get("secret") == ["MISS"]
    os.chmod(shared.directory, 0o755)
    os.chmod(os.path.join(shared.directory, "owner.sock"), 0o666)
    third = worker(None)  # rights that were opened by mistake do not let anybody in either
    third.become(NOBODY)
    third.open(shared.directory, **shared.settings)
    assert third.kind() == "Cache" and third.get("secret") == ["MISS"]
    assert [row["pid"] for row in one.clients()["clients"]] == [one.pid]


def test_a_newer_release_meets_the_owner_of_this_one(shared: Shared, worker: Any) -> None:
    one, newer = worker(), worker(None)
    newer.speak(OTHER)
    newer.open(shared.directory, **shared.settings)
    line = works_alone(newer)
    assert f"speaks version {VERSION} " in line and f"version {OTHER}" in line and "one release" in line
    assert one.put("a", "x", 1000) == "HIT" and worker().get("a") == ["x", 1000, True]


def test_this_release_meets_the_owner_of_a_newer_one(shared: Shared, worker: Any) -> None:
    newer = worker(None)
    newer.speak(OTHER)
    code = (
        "import sys; from tiercache.wire import hello; hello.VERSION = int(sys.argv.pop(1))\n"
        "from tiercache.owner.life import main; sys.exit(main(sys.argv[1:]))"
    )
    environment = shared.environment | {"TIERCACHE_LINGER_S": "30", "TIERCACHE_SSD_BYTES": "0"}
    owner = subprocess.Popen(
        [sys.executable, "-c", code, str(OTHER), shared.directory],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert owner.stderr is not None
        assert any("serving" in line for line in owner.stderr)
        line = works_alone(worker())
        assert f"speaks version {OTHER} " in line and f"version {VERSION}" in line
        newer.open(shared.directory, **shared.settings)
        assert newer.kind() == "SharedCache" and newer.put("a", "x", 1000) == "HIT"
    finally:
        owner.terminate()
        owner.communicate(timeout=PATIENCE_S)
        newer.kill()


def test_a_client_whose_next_owner_is_of_another_release_goes_on_alone(shared: Shared, worker: Any) -> None:
    """The one who is there first after a death may be the other release."""
    one = worker()
    assert one.put("a", "x", 1000) == "HIT"
    one.speak(OTHER)  # from now on it does not fit any owner that this release starts
    shared.kill_owner()
    assert one.get("a") in (["MISS"], ["x", 1000, True])
    eventually(lambda: any(f"version {VERSION}" in line and f"{OTHER}" in line for line in one.warnings()))
    assert one.get("b") == ["MISS"]
    assert worker().put("c", "z", 1000) == "HIT"


# -- names of a directory, and what lies in it


@pytest.mark.parametrize("what", ["dead socket", "file", "link", "folder"])
def test_something_lies_where_the_socket_should(shared: Shared, worker: Any, what: str) -> None:
    os.mkdir(shared.directory, 0o700)
    path = os.path.join(shared.directory, "owner.sock")
    if what == "dead socket":
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(path)
    elif what == "file":
        Path(path).write_text("nothing")
    elif what == "link":
        os.symlink("/nowhere", path)
    else:
        os.mkdir(path)
    one = worker()
    if what == "folder":
        assert shared.directory in works_alone(one)
    else:
        work_together(shared, one, worker())


def test_a_dead_owner_and_nobody_to_see_it(shared: Shared, worker: Any) -> None:
    """Owner and clients are killed: socket, state and locks lie there, and hinder nobody."""
    one = worker()
    assert one.put("a", "x", 1000, durable=True) == "HIT"
    one.kill()
    if shared.owner:
        shared.kill_owner()
    two = worker()
    assert two.get("a") == ["x", 1000, True]
    assert two.warnings() == []


def test_a_path_that_is_longer_than_a_socket_address(shared: Shared, worker: Any) -> None:
    shared.directory = os.path.join(shared.directory, *["a long name of a folder"] * 8)
    assert len(shared.directory) > 108
    one, two = worker(), worker()
    work_together(shared, one, two)
    shared.kill_owner()
    assert two.get("of 0") == ["a", 100_000, True] and one.put("after", "c", 1000) == "HIT"


def test_links_to_a_directory_are_that_directory(shared: Shared, worker: Any, tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir(mode=0o700)
    link.symlink_to(real)
    one, two = worker(None), worker(None)
    one.open(str(link), **shared.settings)
    two.open(str(real), **shared.settings)
    shared.directory = str(real)
    work_together(shared, one, two)
    link.unlink()
    link.symlink_to(tmp_path)
    shared.kill_owner()  # the next one is of the directory that was opened
    assert one.get("of 1") == ["b", 100_000, True] and two.get("of 0") == ["a", 100_000, True]


# -- a directory that goes


def test_a_directory_that_is_removed(shared: Shared, worker: Any) -> None:
    """Its clients go on as they are; whoever opens the name anew has a new owner."""
    one = worker()
    assert one.put("a", "x", MIB) == "HIT" and one.lease("a") == "HIT"
    before = os.pidfd_open(shared.owner)
    shutil.rmtree(shared.directory)
    assert one.get("a") == ["x", MIB, True]
    two = worker()
    assert two.kind() == "SharedCache" and two.get("a") == ["MISS"] and two.put("a", "y", MIB) == "HIT"
    assert one.get("a") == ["x", MIB, True] and one.look(0) == ["x", MIB, True]
    one.let_go()
    one.close()
    wait_for(before)  # and it has taken nothing of the new one's along
    os.close(before)
    assert two.get("a") == ["y", MIB, True] and worker().get("a") == ["y", MIB, True]


@pytest.mark.parametrize("durable", [0, 128 * MIB], ids=["memory", "ssd"])
def test_a_directory_that_is_replaced(shared: Shared, worker: Any, durable: int) -> None:
    """The old owner must not write its state into the new one's directory, nor take the new one's away: when the new
    owner dies then, the next one adopts the right memory."""
    shared.settings["ssd_bytes"] = durable
    one, leaving = worker(), worker()
    assert one.put("a", "x", MIB) == "HIT"
    old = state.read(shared.directory)
    assert old is not None
    os.rename(shared.directory, shared.directory + ".old")
    two = worker()
    assert two.put("a", "y", MIB) == "HIT" and one.get("a") == ["x", MIB, True]
    new = state.read(shared.directory)
    assert new is not None and new.arena != old.arena
    leaving.kill()  # the old owner would write down who is left
    eventually(lambda: [row["pid"] for row in one.clients()["clients"]] == [one.pid])
    owner = os.pidfd_open(old.owner.pid)
    one.close()
    wait_for(owner)
    os.close(owner)
    now = state.read(shared.directory)
    assert now is not None and now.arena == new.arena and os.path.exists(os.path.join(shared.directory, "owner.sock"))
    shared.kill_owner()
    assert two.get("a") == ["y", MIB, True]


def test_an_owner_that_is_killed_after_its_directory_went(shared: Shared, worker: Any) -> None:
    """Nothing can be adopted; its client makes the directory anew, or goes on alone, and reads nothing wrong."""
    one = worker()
    assert one.put("a", "x", MIB) == "HIT"
    owner = shared.owner
    shutil.rmtree(shared.directory)
    pidfd = os.pidfd_open(owner)
    os.kill(owner, signal.SIGKILL)
    wait_for(pidfd)
    os.close(pidfd)
    assert one.get("a") in (["x", MIB, True], ["MISS"])
    two = worker()
    assert two.put("b", "y", MIB) == "HIT"
    eventually(lambda: one.get("b") == ["y", MIB, True])
