"""What an owner asks of its cache for others: puts that others fill, loads that are given up, leases by location."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tiercache.assemble import build
from tiercache.buffers import Buffer, copy, part_digests
from tiercache.cache import Cache
from tiercache.clock import SystemClock
from tiercache.cpu.view import ArenaView
from tiercache.errors import AbandonedLoad, ConfigError, OriginError
from tiercache.keys import object_key
from tiercache.lease import PageRun
from tiercache.metrics import Metrics
from tiercache.model import Name, Outcome, Terms, all_parts, part_bytes_for
from tiercache.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from tiercache.cache.storing import Ticket
    from tiercache.lease import Gap, Landed

MIB = 1 << 20
HIT, MISS, BUSY, FULL, CORRUPT = Outcome.HIT, Outcome.MISS, Outcome.BUSY, Outcome.FULL, Outcome.CORRUPT
ARENA = b"0123456789abcdef"
RUN = PageRun(b"k" * 32, 4 * MIB, MIB, 64 << 10)


def name(label: str) -> Name:
    return Name(object_key("test", label))


def play(directory: Path, scene: Callable[[Cache], Awaitable[None]], ssd_bytes: int = 0) -> None:
    """Plays a scene on a fresh cache, then checks that nothing was leaked."""

    async def run() -> None:
        settings = Settings(
            directory=str(directory), memory_bytes=32 * MIB, ssd_bytes=ssd_bytes, segment_bytes=4 * MIB,
            slots_max=4096, queue_bytes=MIB, disk_free_floor_bytes=0,
        )  # fmt: skip
        cache = build(settings, SystemClock(), Metrics(), arena_id=ARENA)
        cache.begin()
        await scene(cache)
        gc.collect()
        cache.tiers.drain()
        loads = [task for task in cache._tasks._tasks if task.get_name().startswith("read from")]
        if loads:
            await asyncio.wait(loads)
        cache.tiers.index.validate()
        await cache.flush()
        assert cache.tiers.index.pins == 0
        await cache.close()

    asyncio.run(run())


def landed(cache: Cache, ticket: Ticket, item: int, value: bytes, parts: int | None = None) -> tuple[int, int, bytes]:
    """Writes a value where a ticket wants it; what to say of it."""
    target, step = cache.tiers.memory.buffers([ticket.locations[item]])[0], part_bytes_for(len(value))
    copy(Buffer.of(value), target)
    chosen = all_parts(len(value), step) if parts is None else parts
    return item, chosen, part_digests(target, step, chosen)[: 8 * chosen.bit_length()]


def test_threads_fill_tickets_beside_each_other(tmp_path: Path) -> None:
    async def scene(cache: Cache) -> None:
        values = {f"{i}": os.urandom(1000 * i) for i in range(40)}
        outcomes: list[Outcome] = []

        def put(labels: list[str]) -> None:
            for label in labels:
                ticket = cache.serving.reserve_puts([name(label)], [len(values[label])], Terms())
                try:
                    said = [landed(cache, ticket, 0, values[label])] if ticket.locations[0] >= 0 else []
                    outcomes.extend(ticket.commit(said))
                finally:
                    ticket.end()
                    ticket.end()

        threads = [threading.Thread(target=put, args=[list(values)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            await asyncio.to_thread(thread.join)
        assert set(outcomes) <= {HIT, BUSY} and outcomes.count(HIT) >= 40
        for label, value in values.items():
            with await cache.lease([name(label)]) as lease:
                assert bytes(lease.view(0)) == value

    play(tmp_path, scene)


def test_a_ticket_says_what_became_of_each_item(tmp_path: Path) -> None:
    async def scene(cache: Cache) -> None:
        serving = cache.serving
        assert cache.store([name("there")], [Buffer.of(b"x")]) == [HIT]
        names = [name("there"), name("a"), name("b"), name("a")]
        ticket = serving.reserve_puts(names, [1, 200_000, 10, 200_000], Terms())
        assert ticket.outcomes == [HIT, HIT, HIT, BUSY]
        assert [at >= 0 for at in ticket.locations] == [False, True, True, False]
        value = os.urandom(200_000)
        assert ticket.commit([landed(cache, ticket, 1, value, 0b1010)]) == [HIT, MISS, MISS, BUSY]
        assert serving.lease_memory(names).outcomes == [HIT, MISS, MISS, MISS]
        assert ticket.commit([landed(cache, ticket, 1, value, 0b0101)]) == [HIT, HIT, MISS, BUSY]
        assert ticket.commit([(2, 1, bytes(8))]) == [HIT, HIT, CORRUPT, BUSY]
        with pytest.raises(ConfigError):
            ticket.commit([(2, 2, bytes(16))])
        with pytest.raises(ConfigError):
            ticket.commit([(-1, 1, bytes(8))])
        ticket.end()
        with await cache.lease([name("a")]) as lease:
            assert bytes(lease.view(0)) == value
        ticket = serving.reserve_puts([name("b")], [10], Terms())
        assert ticket.outcomes == [HIT]
        ticket.end()
        assert ticket.outcomes == [MISS]
        assert not serving.reserve_puts([], [], Terms(), chain=True).outcomes

    play(tmp_path, scene)


def test_what_is_saved_is_on_the_ssd(tmp_path: Path) -> None:
    async def scene(cache: Cache) -> None:
        ticket = cache.serving.reserve_puts([name("a"), name("b")], [100, 100], Terms())
        outcomes = ticket.commit([landed(cache, ticket, 0, b"a" * 100)])
        assert await ticket.save(outcomes) == [HIT, MISS]
        ticket.end()
        cache.tiers.forget(cache.tiers.index.residents(0))
        lease = await cache.serving.lease_local([name("a"), name("b")], together=True)
        assert lease is None
        lease = await cache.serving.lease_local([name("a"), name("b")])
        assert lease is not None and lease.outcomes == [HIT, MISS] and lease.held_bytes == 4096
        assert lease.locations[0] >= 0 and lease.locations[1] == -1
        lease.release()
        assert lease.held_bytes == 0

    play(tmp_path, scene, ssd_bytes=64 * MIB)


def test_pages_count_once_as_what_they_are(tmp_path: Path) -> None:
    """Also where they were to come together, did not, and are asked for again."""

    async def load(gaps: Sequence[Gap], landed: Landed) -> None:
        landed(range(len(gaps)))  # whatever the memory held

    async def scene(cache: Cache) -> None:
        counts: dict[str, int | float] = {}

        def since() -> dict[str, int | float]:
            before = dict(counts)
            counts.update(cache.metrics.snapshot())
            changed = {name: value - before.get(name, 0) for name, value in counts.items()}
            return {
                name: value for name, value in changed.items() if value and ("_hits_" in name or "_misses_" in name)
            }

        pages = [Name(RUN.key, ordinal) for ordinal in range(2)]
        (await cache.read_pages(RUN, [0, 1], [1, 1], load)).release()
        assert since() == {'tiercache_misses_total{kind="page"}': 2}
        await cache.flush()
        cache.tiers.forget(cache.tiers.index.residents(0)[:1])
        lease = await cache.serving.lease_local(pages, [1, 1], together=True)
        assert lease is not None and lease.outcomes == [HIT, HIT]
        lease.release()
        assert since() == {
            'tiercache_hits_total{tier="memory",kind="page"}': 1,
            'tiercache_hits_total{tier="ssd",kind="page"}': 1,
        }
        cache.tiers.forget(cache.tiers.index.residents(0))
        big = [name(f"big{i}") for i in range(32)]
        assert set(cache.store(big, [Buffer.of(bytes(MIB - 8192))] * 32)) == {HIT}
        with await cache.lease(big) as held:
            assert held.outcomes == [HIT] * 32
            since()
            assert await cache.serving.lease_local(pages, [1, 1], together=True) is None, "there is no room"
            assert since() == {}
            with await cache.read_pages(RUN, [0, 1], [1, 1], load) as lease:
                assert lease.outcomes == [FULL, FULL]
            assert since() == {'tiercache_hits_total{tier="ssd",kind="page"}': 2}

    play(tmp_path, scene, ssd_bytes=64 * MIB)


def test_leases_by_location(tmp_path: Path) -> None:
    async def scene(cache: Cache) -> None:
        serving = cache.serving
        digests = [os.urandom(16) for _ in range(3)]
        assert cache.store_chain(digests, [Buffer.of(b"block")] * 3) == [HIT] * 3
        assert cache.store([name("a"), name("b")], [Buffer.of(b"a"), Buffer.of(b"b")]) == [HIT] * 2
        names = [name("a"), name("b"), *map(Name, digests)]
        locations = serving.lease_memory(names).locations
        held = serving.hold(locations)
        assert held is not None and held.locations == locations
        assert serving.hold([*locations, locations[0] + 1]) is None
        held.release()
        await cache.delete([name("a")])
        assert serving.hold(locations) is None
        again = serving.hold(locations[1:])
        assert again is not None
        again.release()
        serving.touch([*locations, -1, 1 << 62])
        assert serving.hold([]) is not None

    play(tmp_path, scene)


@pytest.mark.parametrize("how", ["delete", "evict", "quarantine", "recheck"])
def test_who_reads_without_asking_sees_nothing_that_was_given_up(tmp_path: Path, how: str) -> None:
    async def scene(cache: Cache) -> None:
        assert cache.store([name("a"), name("b")], [Buffer.of(b"a"), Buffer.of(b"b")]) == [HIT] * 2
        view = ArenaView(ARENA)
        for ordinal, fd in cache.serving.segments:
            view.attach(ordinal, os.dup(fd))
        lease = await cache.lease([name("a"), name("b")])
        first, second = lease.locations
        assert view.glance(first, name("a"), 0) is not None
        if how == "delete":
            await cache.delete([name("a")])
        elif how == "evict":
            await cache.call("evict", {"keys": [name("a").key.hex()]})
        elif how == "quarantine":
            cache.quarantine([name("a")])
        else:
            lease.buffer(0).array()[0] ^= 1
            cache.serving.recheck([name("a"), name("b")])
        assert view.glance(first, name("a"), 0) is None, "also while somebody holds it"
        assert view.glance(second, name("b"), 0) is not None
        assert bytes(lease.view(0)) == (b"a" if how != "recheck" else b"`")
        lease.release()
        view.close()

    play(tmp_path, scene)


# -- loads that are given up


class Loader:
    """A load in steps."""

    def __init__(self, fault: BaseException | None = None) -> None:
        self.fault = fault
        self.begun, self.go = asyncio.Event(), asyncio.Event()
        self.gaps: list[Gap] = []
        self.calls = 0

    async def __call__(self, gaps: Sequence[Gap], landed: Landed) -> None:
        """Fills with its own letter, or raises."""
        self.calls += 1
        self.gaps = list(gaps)
        self.begun.set()
        await self.go.wait()
        if self.fault is not None:
            raise self.fault
        for gap in gaps:
            gap.target.array()[:] = ord("x")
        landed(range(len(gaps)), [part_digests(gap.target, RUN.part_bytes, gap.parts) for gap in gaps])


@pytest.mark.parametrize("fault", [AbandonedLoad("gone"), OriginError("no rights")])
def test_a_load_that_was_abandoned_is_no_fault_of_those_who_wait(tmp_path: Path, fault: Exception) -> None:
    async def scene(cache: Cache) -> None:
        one, two = Loader(fault), Loader()
        two.go.set()
        first = asyncio.ensure_future(cache.read_pages(RUN, [0], [0b11], one))
        await one.begun.wait()
        assert one.gaps[0].location >= 0
        second = asyncio.ensure_future(cache.read_pages(RUN, [0], [0b01], two))
        await asyncio.sleep(0)
        first.cancel()
        one.go.set()
        with pytest.raises(asyncio.CancelledError):
            await first
        if isinstance(fault, OriginError):
            with pytest.raises(OriginError):
                await second
            return
        with await second as lease:
            assert lease.outcomes == [HIT] and bytes(lease.view(0)[:3]) == b"xxx"
        assert two.calls == 1

    play(tmp_path, scene)


@pytest.mark.parametrize("there", [False, True], ids=["empty page", "page with parts"])
def test_extents_that_may_still_be_written_to_are_nobodys(tmp_path: Path, there: bool) -> None:
    """Two loads that gave up and one that goes on, all into one page."""

    async def scene(cache: Cache) -> None:
        loop = asyncio.get_running_loop()
        if there:
            ready = Loader()
            ready.go.set()
            (await cache.read_pages(RUN, [0], [1 << 15], ready)).release()
        writing = [loop.create_future(), loop.create_future()]
        loaders = [Loader(AbandonedLoad("sleeps", writing[0])), Loader(AbandonedLoad("too", writing[1])), Loader()]
        reads = []
        for at, loader in enumerate(loaders):
            reads.append(asyncio.ensure_future(cache.read_pages(RUN, [0], [1 << at], loader)))
            await loader.begun.wait()
        old = {loader.gaps[0].location for loader in loaders}
        assert len(old) == 1
        for at in (0, 1):
            reads[at].cancel()
            loaders[at].go.set()
            with pytest.raises(asyncio.CancelledError):
                await reads[at]
            for _ in range(5):
                await asyncio.sleep(0)
        fresh = Loader()
        fresh.go.set()
        lease = await cache.read_pages(RUN, [0], [0b11], fresh)
        (new,) = lease.locations
        assert new not in old and fresh.gaps[0].parts == 0b11
        loaders[2].go.set()  # what it brings to the old extent is lost: it loads again
        with await reads[2] as other:
            assert other.outcomes == [HIT] and other.locations == [new]
        assert loaders[2].calls == 2
        extent = cache.tiers.memory.buffers(list(old))[0]
        writing[1].set_result(None)
        await asyncio.sleep(0)
        extent.array()[:] = 0  # the sleeper writes
        assert bytes(lease.view(0)[:3]) == b"xxx"
        lease.release()
        writing[0].set_result(None)
        for _ in range(5):
            await asyncio.sleep(0)
        gc.collect()
        cache.tiers.drain()
        with pytest.raises(LookupError):
            cache.tiers.memory.buffers(list(old))
        assert not cache._filling._forsaken and not cache._filling._extents

    play(tmp_path, scene)
