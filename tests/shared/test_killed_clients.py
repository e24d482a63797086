"""Clients that are killed in the middle of anything: the owner goes on, and what they had comes back."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
from typing import Any

import pytest

from tests.shared.conftest import PATIENCE_S, Shared, Worker, eventually
from tiercache.keys import object_key
from tiercache.model import Form, Kind, Name
from tiercache.wire import frames, sockets
from tiercache.wire.channel import Channel
from tiercache.wire.frames import Op
from tiercache.wire.hello import CHANNEL, LINE, Hello, pack_hello

pytestmark = [pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="Linux only"), pytest.mark.slow]
MIB = 1 << 20
KEY = "61" * 32


@pytest.fixture
def shared(shared: Shared) -> Shared:
    shared.settings |= {"ssd_bytes": 0, "client_share": 1.0}
    return shared


def test_killed_while_filling(shared: Shared, worker: Any) -> None:
    """The one that loads a page dies half-way: one of those that wait loads it, and all get its bytes."""
    one = worker()
    base = base_of(shared, one)
    for _ in range(3):
        loader, waiting = worker(), [worker(), worker()]
        loader.begin("page", KEY, fills=False)
        assert loader.hear() == "filling"
        for each in waiting:
            each.begin("page", KEY)
        eventually(lambda waiting=waiting: questions(one, *waiting) == 2)
        loader.kill()
        assert [each.end() for each in waiting] == ["HIT", "HIT"]
        for each in waiting:
            each.kill()
        assert evict(one) and settled(shared, one) == base


def test_killed_while_waiting(shared: Shared, worker: Any) -> None:
    """Those behind another's load die; the loader's death then leaves nobody to take over but a new one."""
    one = worker()
    base = base_of(shared, one)
    loader = worker()
    loader.begin("page", KEY, fills=False)
    assert loader.hear() == "filling"
    waiting = [worker(), worker(), worker()]
    for each in waiting:
        each.begin("page", KEY)
    eventually(lambda: questions(one, *waiting) == 3)
    for each in waiting[:2]:
        each.kill()
    eventually(lambda: {row["pid"] for row in one.clients()["clients"]} == {one.pid, loader.pid, waiting[2].pid})
    loader.kill()
    assert waiting[2].end() == "HIT" and one.page(KEY) == "HIT"
    waiting[2].kill()
    assert evict(one) and settled(shared, one) == base


def test_killed_with_a_claim_and_while_waiting_for_one(shared: Shared, worker: Any) -> None:
    one, holder, first, second = worker(), worker(), worker(), worker()
    assert holder.claim("fact") == "mine"
    for each in (first, second):
        each.begin("claim", "fact")
    eventually(lambda: questions(one, first, second) == 2)
    first.kill()
    holder.kill()
    assert second.end() == "mine"
    second.settle("fact", "known")
    assert one.claim("fact") == "known"


def test_killed_while_leasing(shared: Shared, worker: Any) -> None:
    """With views of all that memory holds: all of it comes back, for others to fill."""
    one, two = worker(), worker()
    base = base_of(shared, one, two)
    for i in range(7):
        assert one.put(str(i), "x", 8 * MIB) == "HIT" and two.lease(str(i)) == "HIT"
    assert one.validate()["pins"] == 7 and one.put("more", "y", 8 * MIB) != "HIT"
    two.kill()
    eventually(lambda: one.validate()["pins"] == 0)  # the owner has heard of it
    for i in range(16):
        assert one.put(f"more {i}", "y", 8 * MIB) == "HIT"
    assert evict(one) and settled(shared, one)[1:] == base[1:]


def test_killed_at_any_moment(shared: Shared, worker: Any) -> None:
    """Two put, lease, get and delete all the time, and are killed twenty times, while one more works on."""
    rng, one = random.Random(1), worker()
    assert one.put("mine", "m", MIB) == "HIT"
    pause = threading.Event()
    for _ in range(10):
        pair = [worker() for _ in range(2)]
        for seed, each in enumerate(pair):
            each.begin("churn", seed)
        assert [each.hear() for each in pair] == ["churning"] * 2
        for each in pair:
            pause.wait(rng.uniform(0, 0.05))  # the moment is what is random here
            assert each.kill() == ""
            assert one.put("other", "o", 100_000) == "HIT" and one.get("other") == ["o", 100_000, True]
        settled(shared, one)
    assert evict(one) and one.validate() | {"entries": 0} == {"broken": "", "pins": 0, "entries": 0}
    assert one.stats("tiercache_internal_errors") in ({}, {"tiercache_internal_errors_total": 0})


def test_killed_between_reserving_and_committing(shared: Shared, worker: Any) -> None:
    one = worker()
    base = base_of(shared, one)
    names = [Name(object_key("test", str(i))) for i in range(6)]
    ask = frames.ReserveAsk(1, Kind.TENSOR, Form.LONE, 0, 0.0, 0, b"", names, [8 * MIB] * 6)
    raw(shared, "reserve", frames.pack_reserve(ask)).kill()
    for i in range(16):
        assert one.put(str(i), "n", 8 * MIB) == "HIT"
    assert evict(one) and settled(shared, one)[1:] == base[1:]


@pytest.mark.parametrize("what", ["segments", "brings", "half"])
def test_killed_while_descriptors_are_handed_over(shared: Shared, worker: Any, what: str) -> None:
    """Those that the owner sent and nobody took, and those that somebody sent along with (half) a greeting."""
    one = worker()
    assert one.put("a", "x", MIB) == "HIT"
    base = settled(shared, one)
    for _ in range(5):
        raw(shared, what).kill()
    assert settled(shared, one) == base and one.get("a") == ["x", MIB, True]


RAW = """
import os, sys
from tests.shared.test_killed_clients import speak
speak(sys.argv[1], sys.argv[2], bytes.fromhex(sys.argv[3]))
print("said", flush=True)
sys.stdin.read()
"""


def speak(directory: str, what: str, body: bytes) -> None:
    """In a process that is killed then: says something, and takes no answer."""
    token = os.urandom(16).hex()
    sock = sockets.connect(directory)
    kept.append(sock)
    hello = frames.pack(Op.HELLO, 1, pack_hello(Hello(token, LINE if what == "brings" else CHANNEL)))
    files = [os.memfd_create(f"tiercache-{token}-{i}") for i in range(20)]
    if what in ("brings", "half"):
        sockets.send_fds(sock, hello if what == "brings" else hello[:30], files)
        if what == "brings":
            sock.recv(1)
        return
    channel = Channel(sock)
    channel.ask(Op.HELLO, pack_hello(Hello(token, CHANNEL)))
    if what == "reserve":
        channel.ask(Op.RESERVE, body)
        return
    for number in range(100):
        sock.sendall(frames.pack(Op.SEGMENTS, number, bytes(4)))
    sock.recv(1, socket.MSG_PEEK)


kept: list[socket.socket] = []


class raw:
    """A process that says something raw, and then only lives."""

    def __init__(self, shared: Shared, what: str, body: bytes = b"") -> None:
        command = [sys.executable, "-c", RAW, shared.directory, what, body.hex()]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None and self._process.stdout.readline() == b"said\n"

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.communicate(timeout=PATIENCE_S)


def questions(one: Worker, *of: Worker) -> int:
    """How many of these wait for an answer."""
    pids = {each.pid for each in of}
    return sum(row["questions"] > 0 for row in one.clients()["clients"] if row["pid"] in pids)


def evict(one: Worker) -> bool:
    """Empties the cache."""
    return one.evict_all() >= 0


def base_of(shared: Shared, one: Worker, *others: Worker) -> tuple[int, float]:
    """As `settled`, of an owner that has made what it keeps: memory files with their tables, threads."""
    assert one.page("62" * 32) == "HIT" and one.put("first", "x", 8 * MIB) == "HIT" and evict(one)
    return settled(shared, one, *others)


def settled(shared: Shared, one: Worker, *others: Worker) -> tuple[int, float]:
    """(the owner's descriptors, bytes in use) once it knows of no client but these, and holds nothing for anybody."""
    pids = sorted(each.pid for each in (one, *others))

    def quiet() -> bool:
        rows = one.clients()["clients"]
        idle = all(not (row["leases"] or row["fills"] or row["tickets"]) for row in rows)
        return idle and sorted(row["pid"] for row in rows) == pids and one.validate()["pins"] == 0

    eventually(quiet)
    assert one.validate()["broken"] == ""
    assert sum(one.stats("tiercache_loads_in_flight").values()) == 0
    return shared.descriptors(), sum(one.stats("tiercache_tier_used_bytes").values())
