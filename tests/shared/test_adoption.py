"""A new owner takes over what a dead one left in memory."""

from __future__ import annotations

import asyncio
import gc
import json
import mmap
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tiercache import assemble
from tiercache.buffers import Buffer, new_bytes
from tiercache.cache import Cache
from tiercache.clock import SystemClock
from tiercache.errors import UnavailableError
from tiercache.keys import object_key
from tiercache.metrics import Metrics
from tiercache.model import Name, Outcome
from tiercache.owner import state
from tiercache.owner.adoption import Adoption
from tiercache.owner.state import Client, Process, State
from tiercache.settings import Settings
from tiercache.ssd.tier import SsdTier

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="Linux only")
MIB = 1 << 20
ARENA = bytes(range(16))

OWNER = """
import asyncio, json, sys
from tiercache import assemble
from tiercache.buffers import Buffer
from tiercache.clock import SystemClock
from tiercache.keys import object_key
from tiercache.metrics import Metrics
from tiercache.model import Name
from tiercache.settings import Settings

async def main():
    plan = json.loads(sys.stdin.readline())
    cache = assemble.build(Settings(**plan["settings"]), SystemClock(), Metrics(), bytes.fromhex(plan["arena"]))
    cache.begin()
    homes = {}
    for text, letter, size, durable in plan["puts"]:
        name = Name(object_key("", text))
        if letter:
            await cache.put([name], [Buffer.of(letter.encode() * size)], durable=durable)
        else:
            await cache.delete([name])
        with await cache.lease([name]) as lease:
            homes[text] = lease.locations[0]
    print(json.dumps(homes), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)

asyncio.run(main())
"""


def value(text: str) -> bytes:
    return random.Random(text).randbytes(100_000)


class Dead:
    """An owner that held some things, and was killed; this process has its memory mapped, as a client would."""

    def __init__(self, settings: Settings, puts: list[tuple[str, str, int, bool]]) -> None:
        plan = {"settings": assemble.plain(settings), "arena": ARENA.hex(), "puts": puts}
        with subprocess.Popen([sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
            assert child.stdin is not None and child.stdout is not None
            child.stdin.write(json.dumps(plan).encode() + b"\n")
            child.stdin.flush()
            self.homes: dict[str, int] = json.loads(child.stdout.readline())
            owner = state.process(child.pid)
            assert owner is not None
            self.files = state.memory_files(ARENA, [owner])
            child.kill()
        self.memory = {n: mmap.mmap(fd, 0) for n, fd in self.files.items()}
        self.state = State(ARENA, owner, (Client(state.me(), "one"),), 0, assemble.plain(settings))

    def let_go(self) -> None:
        """This process is no client any more."""
        for fd in self.files.values():
            os.close(fd)
        for memory in self.memory.values():
            memory.close()
        self.files, self.memory = {}, {}


@pytest.fixture(params=[0, 64 * MIB], ids=["memory", "ssd"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    sizes = {"queue_bytes": 4 * MIB, "segment_bytes": 4 * MIB, "disk_free_floor_bytes": 0}
    return Settings(str(tmp_path), 32 * MIB, request.param, share=False, **sizes)


def adopt(settings: Settings, dead: Dead, use: Any) -> None:
    """Runs `use(cache, adoption)` in a cache that took over."""

    async def main() -> None:
        adoption = Adoption.of(dead.state, settings)
        assert adoption is not None
        cache = assemble.build(adoption.settings, SystemClock(), Metrics(), ARENA)
        cache.begin()
        assert await adoption.take(cache)
        try:
            await use(cache, adoption)
        finally:
            adoption.close()
            await cache.close()

    asyncio.run(main())


def got(cache: Cache, text: str, size: int) -> bytes | Outcome:
    data, target = new_bytes(size)
    outcome = cache.get_into_resident([Name(object_key("", text))], [target])[0]
    return data if outcome is Outcome.HIT else outcome


@pytest.fixture(autouse=True)
def no_memory_stays_open() -> Iterator[None]:
    yield
    gc.collect()  # a mapping has a descriptor of its own, and a view in a dead frame keeps it
    left = state.memory_files(ARENA, [state.me()])
    assert not left, left


def test_what_lies_in_memory_is_there_again(settings: Settings) -> None:
    puts = [("a", "a", 1000, False), ("b", "b", 3 * MIB, False), ("gone", "x", 10, False), ("gone", "", 0, False)]
    dead = Dead(settings, puts)

    async def use(cache: Cache, adoption: Adoption) -> None:
        assert got(cache, "a", 1000) == b"a" * 1000
        assert got(cache, "b", 3 * MIB) == b"b" * 3 * MIB
        assert got(cache, "gone", 10) is Outcome.MISS
        assert cache.tiers.memory.status().used_bytes <= settings.memory_bytes
        cache.tiers.index.validate()
        await cache.flush()

    adopt(replace(settings, memory_bytes=64 * MIB), dead, use)  # the caps are those that the memory was cut for
    dead.let_go()
    if settings.ssd_bytes:
        cache = assemble.build(settings, SystemClock(), Metrics())

        async def read() -> bytes:
            cache.begin()
            try:
                with await cache.lease([Name(object_key("", "b"))]) as lease:
                    return bytes(lease.view(0))
            finally:
                await cache.close()

        assert asyncio.run(read()) == b"b" * 3 * MIB


def test_nothing_goes_before_everybody_is_back(settings: Settings) -> None:
    dead = Dead(settings, [("a", "a", 8 * MIB, False), ("b", "b", 8 * MIB, False)])
    settled: list[bool] = []

    async def use(cache: Cache, adoption: Adoption) -> None:
        assert adoption.awaited == {Client(state.me(), "one")}
        adoption.begin(lambda: settled.append(True))
        lease = adoption.hold([dead.homes["a"]])
        assert lease is not None and adoption.hold([dead.homes["b"] + 1]) is None
        names = [Name(object_key("", f"new{i}")) for i in range(8)]
        values = [Buffer.of(bytes([i]) * 4 * MIB) for i in range(8)]
        assert Outcome.FULL in cache.store(names, values)
        assert got(cache, "a", 8 * MIB) == b"a" * 8 * MIB and got(cache, "b", 8 * MIB) == b"b" * 8 * MIB
        assert not settled
        adoption.heard(os.getpid(), "one")
        assert settled == [True]
        for name, one in zip(names, values, strict=True):
            cache.store([name], [one])
        assert got(cache, "b", 8 * MIB) is Outcome.MISS
        assert bytes(lease.view(0)) == b"a" * 8 * MIB
        lease.release()
        cache.tiers.index.validate()

    adopt(settings, dead, use)
    dead.let_go()


def test_a_process_is_waited_for_until_each_client_in_it_has_come_back(settings: Settings) -> None:
    dead = Dead(settings, [("a", "a", 8 * MIB, False)])
    dead.state = replace(dead.state, clients=tuple(Client(state.me(), token) for token in ("one", "two")))
    settled: list[bool] = []

    async def use(cache: Cache, adoption: Adoption) -> None:
        adoption.begin(lambda: settled.append(True))
        adoption.heard(os.getpid(), "one")
        adoption.heard(os.getpid() + 1, "two")
        adoption.heard(os.getpid(), "three")
        assert adoption.awaited == {Client(state.me(), "two")} and not settled
        cache.store([Name(object_key("", f"new{i}")) for i in range(8)], [Buffer.of(bytes(4 * MIB))] * 8)
        assert got(cache, "a", 8 * MIB) == b"a" * 8 * MIB
        lease = adoption.hold([dead.homes["a"]])  # what "two" has
        assert lease is not None
        adoption.heard(os.getpid(), "two")
        assert settled == [True]
        lease.release()

    adopt(settings, dead, use)
    dead.let_go()


def test_a_client_that_left_just_before_the_owner_died_is_not_waited_for(settings: Settings) -> None:
    dead = Dead(settings, [("a", "a", 1000, False)])
    dead.state = replace(dead.state, clients=tuple(Client(state.me(), token) for token in ("one", "two", "left")))
    settled: list[bool] = []

    async def use(cache: Cache, adoption: Adoption) -> None:
        adoption.begin(lambda: settled.append(True))
        adoption.heard(os.getpid() + 1, "one", frozenset({"one"}))
        adoption.heard(os.getpid(), "new", None)
        assert len(adoption.awaited) == 3
        adoption.heard(os.getpid(), "one", frozenset({"one", "two", "new"}))
        assert {client.token for client in adoption.awaited} == {"two"} and not settled
        adoption.heard(os.getpid(), "two", frozenset({"one", "two"}))
        assert settled == [True]

    adopt(settings, dead, use)
    dead.let_go()


def test_who_does_not_come_back_is_named_once(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tiercache.owner.adoption.LOOK_S", 0.01)
    dead = Dead(replace(settings, owner_deadline_s=0.1), [("a", "a", 1000, False)])

    async def use(cache: Cache, adoption: Adoption) -> None:
        adoption.begin(lambda: None)
        async with asyncio.timeout(30):
            while adoption._looks < 60:
                await asyncio.sleep(0.01)
        assert adoption.awaited and got(cache, "a", 1000) == b"a" * 1000

    adopt(settings, dead, use)
    dead.let_go()
    said = [record.getMessage() for record in caplog.records if "does not come back" in record.getMessage()]
    assert len(said) == 1 and str(os.getpid()) in said[0]


def test_a_disk_that_is_silent_is_not_waited_for(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    if not settings.ssd_bytes:
        pytest.skip("for a cache with an SSD")
    dead = Dead(replace(settings, ssd_deadline_s=0.1), [("a", "a", 1000, True)])
    over = threading.Event()

    def silent(_: SsdTier) -> Iterator[Any]:
        over.wait(30)
        yield from ()

    monkeypatch.setattr(SsdTier, "scan", silent)

    async def main() -> None:
        adoption = Adoption.of(dead.state, settings)
        assert adoption is not None
        cache = assemble.build(adoption.settings, SystemClock(), Metrics(), ARENA)
        cache.begin()
        try:
            with pytest.raises(UnavailableError, match="has not told what it remembers"):
                await adoption.take(cache)
        finally:
            over.set()
            await cache.close()

    asyncio.run(main())
    dead.let_go()


def test_a_client_that_lets_the_memory_go_is_not_waited_for(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiercache.owner.adoption.LOOK_S", 0.01)
    dead = Dead(settings, [("a", "a", 1000, False)])

    async def use(cache: Cache, adoption: Adoption) -> None:
        settled = asyncio.Event()
        adoption.awaited.add(Client(Process(1 << 30, 1), "two"))
        adoption.begin(settled.set)
        assert adoption.awaited == {Client(state.me(), "one")}
        # This process maps the memory a second time now, as its owner; the file's name tells them apart no more.
        monkeypatch.setattr("tiercache.owner.adoption.maps_memory", lambda *_: False)
        await asyncio.wait_for(settled.wait(), 30)

    adopt(settings, dead, use)
    dead.let_go()


def test_damage_is_found(settings: Settings) -> None:
    dead = Dead(settings, [("a", "a", 100_000, False), ("b", "b", 100_000, False)])
    memory = dead.memory[0]
    at = memory.find(b"a" * 4096)
    memory[at] = ord("!")

    async def use(cache: Cache, adoption: Adoption) -> None:
        assert got(cache, "a", 100_000) is Outcome.MISS
        assert got(cache, "b", 100_000) == b"b" * 100_000
        lease = adoption.hold([dead.homes["a"]])  # whoever looks at it may do so, and its space is not reused
        assert lease is not None
        adoption.begin(lambda: None)
        adoption.heard(os.getpid(), "one")
        names = [Name(object_key("", f"new{i}")) for i in range(40)]
        cache.store(names, [Buffer.of(b"n" * MIB) for _ in names])
        assert memory[at : at + 4096] == b"!" + b"a" * 4095
        used = cache.tiers.memory.status().used_bytes
        lease.release()
        assert cache.tiers.memory.status().used_bytes < used

    adopt(settings, dead, use)
    dead.let_go()


def test_memory_knows_better_than_the_ssd(settings: Settings) -> None:
    """A name was deleted and put again with other bytes; the disk has not heard of it yet."""
    if not settings.ssd_bytes:
        pytest.skip("for a cache with an SSD")
    past = [("same", "1", 50_000, True), ("other", "1", 50_000, True), ("kept", "k", 50_000, True)]
    now = [("same", "", 0, False), ("same", "2", 50_000, False), ("other", "", 0, False), ("other", "2", 60_000, False)]
    dead = Dead(settings, past + now)

    async def use(cache: Cache, adoption: Adoption) -> None:
        assert got(cache, "same", 50_000) == b"2" * 50_000
        assert got(cache, "kept", 50_000) == b"k" * 50_000
        assert got(cache, "other", 60_000) in (b"2" * 60_000, Outcome.MISS)
        adoption.begin(lambda: None)
        adoption.heard(os.getpid(), "one")
        cache.tiers.index.validate()
        await cache.flush()

    adopt(settings, dead, use)
    dead.let_go()
    cache = assemble.build(settings, SystemClock(), Metrics())

    async def read() -> list[bytes | Outcome]:
        cache.begin()
        try:
            names = [Name(object_key("", text)) for text in ("same", "kept", "other")]
            with await cache.lease(names) as lease:
                return [
                    bytes(lease.view(i)[:1]) if lease.outcomes[i] is Outcome.HIT else lease.outcomes[i]
                    for i in (0, 1, 2)
                ]
        finally:
            await cache.close()

    same, kept, other = asyncio.run(read())
    assert (same, kept) == (b"2", b"k") and other in (b"2", Outcome.MISS)


def test_what_the_disk_may_have_in_an_older_state_stays_until_it_is_written_anew(settings: Settings) -> None:
    if not settings.ssd_bytes:
        pytest.skip("for a cache with an SSD")
    settings = replace(settings, ssd_bytes=256 * MIB)  # room for all: the queue may or may not drop what is new below
    dead = Dead(settings, [(str(i), chr(97 + i), 2 * MIB, True) for i in range(8)])

    async def use(cache: Cache, adoption: Adoption) -> None:
        adoption.begin(lambda: None)
        adoption.heard(os.getpid(), "one")
        for i in range(40):  # pushes everything else out of memory
            cache.store([Name(object_key("", f"new{i}"))], [Buffer.of(b"n" * MIB)])
        await adoption.saved()
        for i in range(40):
            cache.store([Name(object_key("", f"newer{i}"))], [Buffer.of(b"n" * MIB)])
        for i in range(8):
            with await cache.lease([Name(object_key("", str(i)))]) as lease:
                assert lease.outcomes == [Outcome.HIT]
                assert bytes(lease.view(0)) == chr(97 + i).encode() * 2 * MIB
        cache.tiers.index.validate()

    adopt(settings, dead, use)
    dead.let_go()


def test_what_cannot_be_taken_over_is_left_alone(settings: Settings) -> None:
    dead = Dead(settings, [("a", "a", 1000, False)])
    assert Adoption.of(replace(dead.state, strangers=1), settings) is None
    assert Adoption.of(replace(dead.state, arena=bytes(16)), settings) is None
    assert Adoption.of(replace(dead.state, settings={"memory_bytes": -1}), settings) is None
    assert Adoption.of(replace(dead.state, clients=()), settings) is None
    dead.let_go()
    assert Adoption.of(dead.state, settings) is None
