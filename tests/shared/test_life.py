"""How an owner begins and how it ends."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import resource
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import tiercache
from tests.shared.conftest import Shared, eventually
from tiercache import assemble
from tiercache.errors import TierCacheError
from tiercache.model import Outcome
from tiercache.owner.life import LOCK_NAME
from tiercache.settings import load
from tiercache.wire import sockets, starting
from tiercache.wire.channel import Channel
from tiercache.wire.frames import Op
from tiercache.wire.hello import CHANNEL, Hello, pack_hello
from tiercache.wire.sockets import Lost

pytestmark = [pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="Linux only"), pytest.mark.slow]
MIB = 1 << 20
OPTIONS = {
    "memory_bytes": 64 << 20,
    "ssd_bytes": 64 << 20,
    "segment_bytes": 8 << 20,
    "disk_free_floor_bytes": 1 << 20,
    "linger_s": 0.2,
}


def test_an_owner_whose_directory_was_removed_goes_too(tmp_path: Path) -> None:
    place = tmp_path / "cache"
    cache = tiercache.open(place, share=True, **OPTIONS)
    cache.put(["name"], [b"value"])
    owner = os.pidfd_open(json.loads((place / "owner.state").read_text())["owner"][0])
    shutil.rmtree(place)
    assert cache.get(["name"]) == [b"value"]
    cache.close()
    assert sockets.readable(owner, 30), "the owner is still there"
    os.close(owner)


@pytest.fixture
def many_files() -> Iterator[None]:
    """New descriptors of this process have numbers over 1100."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2048:
        pytest.skip("there may not be so many open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    with contextlib.ExitStack() as stack:
        while (fd := os.open("/dev/null", os.O_RDONLY)) < 1100:
            stack.callback(os.close, fd)
        stack.callback(os.close, fd)
        yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_an_owner_ends_also_where_its_starter_had_many_files_open(shared: Shared, many_files: None) -> None:
    with tiercache.open(shared.directory, **shared.settings) as cache:
        assert type(cache.core).__name__ == "SharedCache"
        owner = os.pidfd_open(shared.owner)
    assert sockets.readable(owner, 30), "the owner is still there"
    os.close(owner)


def test_what_memory_has_is_on_the_disk_before_the_socket_goes(shared: Shared) -> None:
    """So whoever comes during the last flush is let in by the owner that flushes, and the end after it is quick."""
    with tiercache.open(shared.directory, **shared.settings) as cache:
        names = [str(i) for i in range(40)]
        assert cache.put(names, [bytes([i]) * MIB for i in range(40)]) == [Outcome.HIT] * 40
        owner = shared.owner
        watched = os.pidfd_open(owner)
    socket, pause = Path(shared.directory, sockets.SOCKET_NAME), threading.Event()
    while socket.exists():
        pause.wait(0.001)
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(watched, signal.SIGKILL)
    assert sockets.readable(watched, 30)
    os.close(watched)
    shared.wait_until_gone()
    with tiercache.open(shared.directory, **shared.settings) as cache:
        assert [cache.get([each]) for each in names] == [[bytes([i]) * MIB] for i in range(40)]


def test_an_owner_waits_for_the_one_before_it_longer_than_clients_wait_for_owners(shared: Shared) -> None:
    os.mkdir(shared.directory, 0o700)
    before = os.open(os.path.join(shared.directory, LOCK_NAME), os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(before, fcntl.LOCK_EX)
    settings = load(directory=shared.directory, **shared.settings | {"owner_deadline_s": 0.1, "linger_s": 0.5})
    hello = pack_hello(Hello("a" * 32, CHANNEL, os.getpid()))
    first = Channel(starting.find_or_start(shared.directory, assemble.plain(settings)), 1.0)
    with pytest.raises(Lost):
        first.ask(Op.HELLO, hello)
    first.close()
    eventually(lambda: "waiting for it to go" in shared.log())
    os.close(before)
    second = Channel(sockets.connect(shared.directory), 30.0)
    assert second.ask(Op.HELLO, hello)
    second.close()
    assert "Traceback" not in shared.log()


def test_a_view_of_a_closed_cache_keeps_its_bytes_when_the_owner_dies(shared: Shared) -> None:
    """The process has opened the directory again by then: it is two clients, and this is what the one that comes back
    first may do to the other, which comes back last."""
    shared.settings |= {"ssd_bytes": 0}
    first = tiercache.open(shared.directory, **shared.settings)
    assert first.put(["kept"], [b"A" * MIB]) == [Outcome.HIT]
    lease = first.lease(["kept"])
    view = lease.view(0)
    first.delete(["kept"])
    lease.release()
    first.close()
    gate, revive = threading.Event(), first.core._link.revive  # type: ignore[attr-defined]
    ways = revive._ways
    revive._ways = ways._replace(connect=lambda begin: (gate.wait(30), ways.connect(begin))[1])
    with tiercache.open(shared.directory, **shared.settings) as second:

        def put(name: str) -> Outcome | None:
            with contextlib.suppress(TierCacheError):
                return second.put([name], [b"B" * MIB])[0]
            return None

        shared.kill_owner()
        eventually(lambda: put("new") in (Outcome.HIT, Outcome.FULL) and "took over" in shared.log())
        assert {put(f"early {i}") for i in range(100)} <= {Outcome.HIT, Outcome.FULL}
        assert bytes(view) == b"A" * MIB
        gate.set()
        eventually(lambda: "back or gone" in shared.log())
        assert {put(f"late {i}") for i in range(100)} == {Outcome.HIT}
        assert bytes(view) == b"A" * MIB
    del view, lease
