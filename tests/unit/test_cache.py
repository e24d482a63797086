"""The cache over a real memory tier: what callers see of put, get, lease, match, pages, delete, expiry and caps."""

from __future__ import annotations

import asyncio
import gc
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tiercache import keys
from tiercache.buffers import Buffer
from tiercache.cache import Cache
from tiercache.cpu.tier import MemoryTier
from tiercache.errors import CapacityError, ClosedError, ConfigError, OriginError
from tiercache.index import Index
from tiercache.lease import PageRun
from tiercache.metrics import Metrics
from tiercache.model import Name, Outcome
from tiercache.policy import POLICIES
from tiercache.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from tiercache.lease import Gap, Landed

MIB = 1 << 20
PAGE = MIB


class HandClock:
    """Time that moves when told to."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def monotonic(self) -> float:
        """Seconds."""
        return self.now

    def wall(self) -> float:
        """Seconds since the epoch."""
        return self.now


def small_cache(memory_bytes: int = 16 * MIB) -> tuple[Cache, HandClock]:
    """A cache of memory alone."""
    clock = HandClock()
    settings = Settings(directory="unused", memory_bytes=memory_bytes, ssd_bytes=0, slots_max=4096, queue_bytes=MIB)
    index = Index(settings.slots_max, [POLICIES["lru"]()])
    memory = MemoryTier(memory_bytes, segment_bytes=memory_bytes)
    return Cache(index, memory, settings=settings, clock=clock, metrics=Metrics()), clock


def run(scene: Callable[[Cache, HandClock], Awaitable[None]], memory_bytes: int = 16 * MIB) -> None:
    """Plays a scene on a fresh cache, then checks that nothing was leaked."""

    async def play() -> None:
        cache, clock = small_cache(memory_bytes)
        await cache.start()
        await scene(cache, clock)
        gc.collect()
        cache.tiers.drain()
        cache.tiers.index.validate()
        assert cache.tiers.index.pins == 0
        await cache.close()

    asyncio.run(play())


def name(label: str) -> Name:
    """A lone object's name."""
    return Name(keys.object_key("test", label))


def content(seed: int, size: int) -> bytes:
    """Bytes that depend on seed and place."""
    return np.random.default_rng(seed).bytes(size)


def target(size: int) -> Buffer:
    """Somewhere to copy to."""
    return Buffer.of(bytearray(size), writable=True)


def test_what_was_put_is_got_and_stays_what_it_was() -> None:
    async def scene(cache: Cache, _: HandClock) -> None:
        sizes = [0, 1, 65_535, 65_536, 65_537, 3 * MIB, 5 * MIB + 1]
        values = [content(i, size) for i, size in enumerate(sizes)]
        names = [name(str(size)) for size in sizes]
        assert await cache.put(names, values) == [Outcome.HIT] * len(sizes)
        assert await cache.put(names[:1], [b"other"]) == [Outcome.HIT]
        targets = [target(size) for size in sizes]
        assert await cache.get_into(names, targets) == [Outcome.HIT] * len(sizes)
        assert [bytes(t) for t in targets] == values
        with await cache.lease([*names, name("absent"), names[3]]) as lease:
            assert lease.outcomes == [Outcome.HIT] * len(sizes) + [Outcome.MISS, Outcome.HIT]
            assert [bytes(lease.view(i)) for i in range(len(sizes))] == values
            assert bytes(lease.view(len(sizes) + 1)) == values[3]

    run(scene)


def test_a_full_cache_evicts_the_oldest_and_never_what_is_leased() -> None:
    async def scene(cache: Cache, _: HandClock) -> None:
        names = [name(str(i)) for i in range(40)]
        await cache.put(names[:1], [content(0, MIB)])
        lease = await cache.lease(names[:1])
        for i in range(1, 40):
            assert await cache.put([names[i]], [content(i, MIB)]) == [Outcome.HIT]
            status = cache.tiers.memory.status()
            assert status.used_bytes <= status.capacity_bytes
        there = [outcome is Outcome.HIT for outcome in (await held(cache, names)).outcomes]
        assert there[0]
        assert there[39]
        assert not there[1]
        assert bytes(lease.view(0)) == content(0, MIB)
        lease.release()

    async def held(cache: Cache, names: Sequence[Name]) -> object:
        lease = await cache.lease(names)
        lease.release()
        return lease

    run(scene)


def test_everything_leased_is_full_not_wrong() -> None:
    async def scene(cache: Cache, _: HandClock) -> None:
        leases = []
        outcome = Outcome.HIT
        i = 0
        while outcome is Outcome.HIT:
            outcome = (await cache.put([name(str(i))], [content(i, MIB)]))[0]
            if outcome is Outcome.HIT:
                leases.append(await cache.lease([name(str(i))]))
            i += 1
        assert outcome is Outcome.FULL
        assert len(leases) >= 12
        for at, lease in enumerate(leases):
            assert bytes(lease.view(0)) == content(at, MIB)
            lease.release()
        assert await cache.put([name("after")], [content(1, MIB)]) == [Outcome.HIT]

    run(scene)


def test_a_chain_is_matched_as_far_as_it_is_whole() -> None:
    async def scene(cache: Cache, _: HandClock) -> None:
        digests = keys.chain(keys.namespace("model"), [bytes([i]) * 4 for i in range(20)])
        values = [content(i, 100_000) for i in range(20)]
        assert await cache.put_chain(digests[:8], values[:8]) == [Outcome.HIT] * 8
        assert await cache.put_chain(digests[8:12], values[8:12], parent=digests[7]) == [Outcome.HIT] * 4
        other = keys.chain(digests[3], [b"fork"], digests[3])
        assert await cache.put_chain(other, [b"x" * 50], parent=digests[3]) == [Outcome.HIT]
        with await cache.match(digests) as lease:
            assert len(lease) == 12
            assert [bytes(lease.view(i)) for i in range(12)] == values[:12]
        with await cache.match([*digests[:4], *other, digests[5]]) as lease:
            assert len(lease) == 5
        with cache.match_resident(digests) as lease:
            assert len(lease) == 12
        assert await cache.put_chain([b"z" * 16], [b"1"], parent=b"no such parent!!") == [Outcome.FULL]

    run(scene)


def test_deleted_is_gone_at_once_and_leased_bytes_stay() -> None:
    async def scene(cache: Cache, _: HandClock) -> None:
        await cache.put([name("a")], [content(1, MIB)])
        lease = await cache.lease([name("a")])
        assert await cache.delete([name("a"), name("b")]) == [Outcome.HIT, Outcome.GONE]
        assert await cache.get_into([name("a")], [target(MIB)]) == [Outcome.MISS]
        await cache.put([name("a")], [content(2, MIB)])
        for i in range(30):
            await cache.put([name(f"fill{i}")], [content(i, MIB)])
        assert bytes(lease.view(0)) == content(1, MIB)
        lease.release()

    run(scene)


def test_expired_entries_are_misses_and_can_be_put_anew() -> None:
    async def scene(cache: Cache, clock: HandClock) -> None:
        await cache.put([name("a")], [b"old"], ttl_s=10)
        assert await cache.get_into([name("a")], [target(3)]) == [Outcome.HIT]
        clock.now += 12
        assert await cache.get_into([name("a")], [target(3)]) == [Outcome.MISS]
        await cache.put([name("a")], [b"new"])
        got = target(3)
        assert await cache.get_into([name("a")], [got]) == [Outcome.HIT]
        assert bytes(got) == b"new"

    run(scene)


class Source:
    """A file that counts what is asked of it, and can fail or wait."""

    def __init__(self, size: int) -> None:
        self.data = content(7, size)
        self.asked: list[tuple[int, int]] = []
        self.gate: asyncio.Event | None = None
        self.fault: Exception | None = None

    async def load(self, gaps: Sequence[Gap], landed: Landed) -> None:
        """Fills gaps from the data."""
        self.asked += [(gap.ordinal, gap.parts) for gap in gaps]
        if self.gate is not None:
            await self.gate.wait()
        if self.fault is not None:
            raise self.fault
        for gap in gaps:
            page = self.data[gap.ordinal * PAGE : (gap.ordinal + 1) * PAGE]
            view = gap.target.view()
            for part in range(64):
                if gap.parts >> part & 1:
                    view[part * 65536 : (part + 1) * 65536] = page[part * 65536 : (part + 1) * 65536]
        landed(range(len(gaps)))


def test_only_missing_parts_are_loaded_and_once() -> None:
    async def scene(cache: Cache, _: HandClock) -> None:
        source = Source(3 * PAGE + 5)
        file = PageRun(keys.page_key("i", "p", "v", PAGE, 65536), len(source.data), PAGE, 65536)
        (await cache.read_pages(file, [0, 3], [0b11, 1], source.load)).release()
        assert sorted(source.asked) == [(0, 0b11), (3, 1)]
        assert cache.lease_resident(file.key, [0], [0b111]) is None
        with await cache.read_pages(file, [0], [0b111], source.load) as lease:
            assert source.asked[2:] == [(0, 0b100)]
            assert bytes(lease.view(0))[: 3 * 65536] == source.data[: 3 * 65536]
        resident = cache.lease_resident(file.key, [0, 3], [0b101, 1])
        assert resident is not None
        assert bytes(resident.view(1)) == source.data[3 * PAGE :]
        resident.release()

    run(scene)


def test_many_cold_readers_cause_one_load_and_one_who_leaves_harms_nobody() -> None:
    async def scene(cache: Cache, _: HandClock) -> None:
        source = Source(PAGE)
        source.gate = asyncio.Event()
        file = PageRun(b"k" * 32, PAGE, PAGE, 65536)
        everything = (1 << 16) - 1

        async def read() -> bytes:
            with await cache.read_pages(file, [0], [everything], source.load) as lease:
                return bytes(lease.view(0))

        readers = [asyncio.ensure_future(read()) for _ in range(200)]
        await asyncio.sleep(0)
        readers[0].cancel()
        await asyncio.sleep(0)
        source.gate.set()
        answers = await asyncio.gather(*readers, return_exceptions=True)
        assert isinstance(answers[0], asyncio.CancelledError)
        assert set(answers[1:]) == {source.data}
        assert source.asked == [(0, everything)]

    run(scene)


def test_a_failed_load_is_everybodys_fault_and_leaves_nothing() -> None:
    async def scene(cache: Cache, _: HandClock) -> None:
        source = Source(2 * PAGE)
        await cache.put([name("first")], [b"x"])
        await cache.delete([name("first")])
        empty_bytes = cache.tiers.memory.status().used_bytes  # the table of the first segment
        source.fault = OriginError("broken")
        file = PageRun(b"k" * 32, 2 * PAGE, PAGE, 65536)
        reads = [cache.read_pages(file, [0, 1], [3, 3], source.load) for _ in range(3)]
        faults = await asyncio.gather(*reads, return_exceptions=True)
        assert [type(fault) for fault in faults] == [OriginError] * 3
        assert len(source.asked) == 2
        assert cache.tiers.memory.status().used_bytes == empty_bytes
        source.fault = None
        with await cache.read_pages(file, [0, 1], [3, 3], source.load) as lease:
            assert lease.outcomes == [Outcome.HIT] * 2

    run(scene)


def test_pages_without_room_are_full_and_leave_no_slot() -> None:
    async def scene(cache: Cache, _: HandClock) -> None:
        source = Source(40 * PAGE)
        file = PageRun(b"k" * 32, 40 * PAGE, PAGE, 65536)
        with await cache.read_pages(file, range(40), [1] * 40, source.load) as lease:
            assert Outcome.FULL in lease.outcomes
            fits = lease.outcomes.count(Outcome.HIT)
        assert 12 <= fits < 40
        assert cache.tiers.index.used == fits

    run(scene)


def test_a_full_index_forgets_its_oldest_entries() -> None:
    async def scene(cache: Cache, _: HandClock) -> None:
        most = cache.settings.slots_max
        for start in range(0, 2 * most, 512):
            names = [name(str(i)) for i in range(start, start + 512)]
            assert await cache.put(names, [b"x"] * 512) == [Outcome.HIT] * 512
            assert cache.tiers.index.used <= most
        assert (await cache.get_into([name("0")], [target(1)])) == [Outcome.MISS]
        source = Source(4 * PAGE)
        file = PageRun(b"k" * 32, 4 * PAGE, PAGE, 65536)
        with await cache.read_pages(file, range(4), [1] * 4, source.load) as lease:
            assert lease.outcomes == [Outcome.HIT] * 4

    run(scene, memory_bytes=64 * MIB)


def test_misuse_is_told_with_the_way_out() -> None:
    async def scene(cache: Cache, _: HandClock) -> None:
        with pytest.raises(CapacityError, match="memory_bytes"):
            await cache.put([name("big")], [bytes(20 * MIB)])
        with pytest.raises(ConfigError, match="ssd_bytes"):
            await cache.put([name("a")], [b"x"], durable=True)
        with pytest.raises(ConfigError, match="ttl_s"):
            await cache.put([name("a")], [b"x"], ttl_s=0)
        await cache.put([name("a")], [b"xyz"])
        with pytest.raises(ConfigError, match="larger buffer"):
            await cache.get_into([name("a")], [target(2)])

    run(scene)


def test_a_closed_cache_says_so() -> None:
    async def play() -> None:
        cache, _ = small_cache()
        await cache.start()
        await cache.close()
        await cache.close()
        with pytest.raises(ClosedError, match=r"tiercache\.open"):
            await cache.lease([name("a")])

    asyncio.run(play())
