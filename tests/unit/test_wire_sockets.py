"""Sockets of a shared directory: who finds whom, who is let in, what comes beside the bytes, and who has died."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import socket
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.unit.descriptors import Descriptors
from tiercache.wire import sockets
from tiercache.wire.sockets import CannotShare, Foreign, NoOwner, Peer

if TYPE_CHECKING:
    from collections.abc import Iterator

NOBODY = 65534
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs the rights to become another user")


def child_as(uid: int, gid: int, groups: list[int], code: str, *args: str) -> str:
    """What a process of another user prints."""
    setup = (
        "import os, sys\nfrom tiercache.wire import sockets\n"
        f"os.setgroups({groups}); os.setgid({gid}); os.setuid({uid})\n"
    )
    command = [sys.executable, "-c", setup + code, *args]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


ASK = """
try:
    print("in", sockets.connect(sys.argv[1], group=len(sys.argv) > 2).fileno() >= 0)
except OSError as error:
    print(type(error).__name__, error)
"""


@pytest.fixture
def open_path() -> Iterator[Path]:
    """A directory that other users can reach (pytest's own are closed to them)."""
    with tempfile.TemporaryDirectory(dir="/tmp") as path:
        Path(path).chmod(0o755)
        yield Path(path)


def test_nobody_serves_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NoOwner):
        sockets.connect(str(tmp_path / "none"))
    with pytest.raises(NoOwner):
        sockets.connect(str(tmp_path))


def test_listen_and_connect(tmp_path: Path) -> None:
    directory = str(tmp_path / "cache")
    with sockets.listen(directory) as listener, sockets.connect(directory) as here, listener.accept()[0] as there:
        here.sendall(b"to you")
        assert there.recv(16) == b"to you"
        assert sockets.peer(there) == sockets.peer(here)._replace(pid=os.getpid())
        assert sockets.peer(there).uid == os.geteuid()
        assert stat.S_IMODE(os.stat(directory).st_mode) == 0o700
        assert stat.S_IMODE(os.stat(f"{directory}/owner.sock").st_mode) == 0o600
        assert os.listdir(directory) == ["owner.sock"]


def test_a_socket_that_nobody_serves_any_more_is_refused_and_replaced(tmp_path: Path) -> None:
    sockets.listen(str(tmp_path)).close()
    with pytest.raises(NoOwner):
        sockets.connect(str(tmp_path))
    with sockets.listen(str(tmp_path)), sockets.connect(str(tmp_path)):
        pass


def test_what_a_killed_one_left_half_made_is_no_hindrance(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as half:
        half.bind(str(tmp_path / "owner.sock.new"))
    with sockets.listen(str(tmp_path)), sockets.connect(str(tmp_path)):
        pass


def test_paths_longer_than_an_address(tmp_path: Path) -> None:
    directory = str(tmp_path / ("a" * 120) / ("ü" * 60))
    with sockets.listen(directory) as listener, sockets.connect(directory) as here, listener.accept()[0] as there:
        here.sendall(b"x")
        assert there.recv(1) == b"x"


def test_long_path_without_proc_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "isdir", lambda path: False)
    with pytest.raises(CannotShare, match="shorter path"):
        sockets.listen(str(tmp_path / ("a" * 120)))


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in ("file", "file/under"):
        with pytest.raises(CannotShare):
            sockets.listen(str(tmp_path / path))


def test_a_directory_that_others_write_into_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(CannotShare, match="others may write"):
        sockets.listen(str(tmp_path))
    tmp_path.chmod(0o770)
    with pytest.raises(CannotShare, match="others may write"):
        sockets.listen(str(tmp_path))
    with sockets.listen(str(tmp_path), group=True):
        pass


@pytest.mark.parametrize(
    ("number", "words"), [(errno.ENOSPC, "disk is full"), (errno.EROFS, "read-only"), (errno.EOPNOTSUPP, "no sockets")]
)
def test_what_is_in_the_way_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str) -> None:
    class Refusing(socket.socket):
        def bind(self, address: object) -> None:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(socket, "socket", Refusing)
    with pytest.raises(CannotShare, match=words):
        sockets.listen(str(tmp_path))


def test_no_unix_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(socket, "AF_UNIX")
    with pytest.raises(CannotShare, match="no Unix sockets"):
        sockets.listen(str(tmp_path))


@root_only
def test_another_users_directory_is_foreign(open_path: Path) -> None:
    theirs = open_path / "theirs"
    theirs.mkdir(mode=0o700)
    os.chown(theirs, NOBODY, NOBODY)
    with pytest.raises(Foreign, match=f"belongs to user {NOBODY}"):
        sockets.listen(str(theirs))
    ours = open_path / "ours"
    with sockets.listen(str(ours)):
        assert child_as(NOBODY, NOBODY, [], ASK, str(ours)).startswith("Foreign")


@root_only
def test_a_group_shares_a_directory(open_path: Path) -> None:
    shared = open_path / "shared"
    shared.mkdir(mode=0o750)
    os.chown(shared, -1, 4321)
    with sockets.listen(str(shared), group=True) as listener:
        assert child_as(NOBODY, NOBODY, [4321], ASK, str(shared), "group") == "in True"
        assert child_as(NOBODY, 4321, [], ASK, str(shared), "group") == "in True"
        assert child_as(NOBODY, NOBODY, [], ASK, str(shared), "group").startswith("Foreign")
        assert stat.S_IMODE(os.stat(shared).st_mode) == 0o750
        facts = os.stat(shared)
        seen = [listener.accept()[0] for _ in range(2)]
        peers = [sockets.peer(each) for each in seen]
        assert all(sockets.admits(each, facts, group=True) for each in peers)
        assert not any(sockets.admits(each, facts) for each in peers)
        assert [each.groups for each in peers] == [(4321,), ()]
        for each in seen:
            each.close()


def test_who_is_let_in(tmp_path: Path) -> None:
    facts = os.stat(tmp_path)
    stranger = Peer(1, NOBODY, NOBODY, ())
    member = stranger._replace(groups=(7, facts.st_gid))
    assert sockets.admits(Peer(1, os.geteuid(), NOBODY, ()), facts)
    assert not sockets.admits(stranger, facts)
    assert not sockets.admits(stranger, facts, group=True)
    assert not sockets.admits(member, facts)
    assert sockets.admits(member, facts, group=True)


@root_only
def test_a_socket_of_a_stranger_is_not_trusted(open_path: Path) -> None:
    """Who could once write into the directory may have left a socket of his there."""
    code = (
        f"import os, socket, sys; os.setgroups([]); os.setuid({NOBODY}); s = socket.socket(socket.AF_UNIX)\n"
        "s.bind(sys.argv[1] + '/owner.sock'); s.listen(); print('up', flush=True); sys.stdin.read()"
    )
    open_path.chmod(0o777)
    command = [sys.executable, "-c", code, str(open_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as stranger:
        assert stranger.stdout is not None
        assert stranger.stdout.readline() == "up\n"
        open_path.chmod(0o700)
        with pytest.raises(Foreign, match=f"served by user {NOBODY}"):
            sockets.connect(str(open_path))
        stranger.communicate("")


# -- descriptors


def test_descriptors_travel_and_are_closed_on_exec() -> None:
    here, there = socket.socketpair()
    with Descriptors():
        made = [os.memfd_create(f"m{i}") for i in range(5)]
        assert sockets.send_fds(here, b"five", made) == 4
        sockets.close_all(made)
        data, got = sockets.recv_fds(there, 100, 5)
        assert data == b"five"
        assert [os.readlink(f"/proc/self/fd/{each}").split()[0] for each in got] == [f"/memfd:m{i}" for i in range(5)]
        assert not any(os.get_inheritable(each) for each in got)
        sockets.close_all(got)
    here.close()
    there.close()


@pytest.mark.parametrize("fds_max", [0, 1, 2])
def test_too_many_descriptors_are_refused_and_none_stays_open(fds_max: int) -> None:
    here, there = socket.socketpair()
    with Descriptors():
        sockets.send_fds(here, b"three", [0, 1, 2])
        with pytest.raises(OSError, match="not all descriptors"):
            sockets.recv_fds(there, 100, fds_max)
    here.close()
    there.close()


def test_a_full_table_of_descriptors_is_an_error_and_leaks_nothing() -> None:
    here, there = socket.socketpair()
    sockets.send_fds(here, b"three", [0, 1, 2])
    with Descriptors():
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        highest = max(int(each) for each in os.listdir("/proc/self/fd"))
        filling = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 8, hard))
        try:
            while True:
                filling.append(os.dup(0))
        except OSError:
            os.close(filling.pop())
        finally:
            try:
                with pytest.raises(OSError, match="ulimit"):
                    sockets.recv_fds(there, 100, 3)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        sockets.close_all(filling)
    here.close()
    there.close()


# -- death


@pytest.mark.parametrize("known", [True, False])
def test_a_death_is_noticed_though_the_connection_stands(
    known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forked child of the dead one still holds the connection; with SO_PEERPIDFD and without."""
    if not known:
        monkeypatch.setattr(sockets, "_SO_PEERPIDFD", 9999)

    async def scene() -> None:
        loop = asyncio.get_running_loop()
        code = (
            "import os, sys\nfrom tiercache.wire import sockets\ns = sockets.connect(sys.argv[1])\n"
            "if os.fork() == 0:\n    s.recv(1)\n    os._exit(0)\n"
            "sys.stdin.read()"
        )
        with sockets.listen(str(tmp_path)) as listener:
            child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE)
            there, _ = await loop.run_in_executor(None, listener.accept)
            died = loop.create_future()
            watch = sockets.watch(there, loop, lambda: died.set_result(True))
            if watch is None:
                pytest.skip("no pidfds here")
            assert not sockets.ended(there)
            assert child.stdin is not None
            child.stdin.close()
            assert await asyncio.wait_for(died, 30)
            assert not sockets.ended(there)
            watch.close()
            child.wait()
            there.close()

    asyncio.run(scene())


def test_a_number_that_may_be_somebody_elses_is_not_watched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sockets, "_SO_PEERPIDFD", 9999)
    with sockets.listen(str(tmp_path)) as listener:
        here = sockets.connect(str(tmp_path))
        there = listener.accept()[0]
        here.close()
        with Descriptors():
            assert sockets.ended(there)
            assert sockets.open_pidfd(there) is None
        there.close()


def test_systems_without_pidfds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sockets, "_SO_PEERPIDFD", 9999)
    monkeypatch.delattr(os, "pidfd_open")
    with sockets.listen(str(tmp_path)) as listener, sockets.connect(str(tmp_path)), listener.accept()[0] as there:
        assert sockets.open_pidfd(there) is None
