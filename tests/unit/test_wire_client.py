"""What callers see of a cache, whether it is theirs alone or its owner is another process: the same scenes on both."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tiercache import assemble, keys
from tiercache.buffers import Buffer
from tiercache.clock import SystemClock
from tiercache.core import Core
from tiercache.cpu.view import ArenaView
from tiercache.errors import CapacityError, ClosedError, ConfigError, OriginError
from tiercache.lease import Gap, Landed, PageRun
from tiercache.metrics import Metrics
from tiercache.model import Kind, Name, Outcome, Terms, all_parts
from tiercache.settings import Settings
from tiercache.sync import BlockingCache
from tiercache.wire import sockets, starting
from tiercache.wire.client import SharedCache
from tiercache.wire.revive import Ways

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="Linux only")
MIB = 1 << 20
PAGE = MIB
WHOLE = all_parts(PAGE, 65536)

Scene = Callable[[Core], Awaitable[None]]


class Kinds:
    """Runs scenes on one kind of cache."""

    def __init__(self, kind: str, directory: Path) -> None:
        self.kind, self.directory = kind, str(directory)

    def settings(self, **given: Any) -> Settings:
        sizes: dict[str, Any] = {"memory_bytes": 16 * MIB, "ssd_bytes": 0, "queue_bytes": MIB, "slots_max": 4096}
        sizes |= {"linger_s": 0.3, "client_share": 1.0, "disk_free_floor_bytes": 0}
        return Settings(directory=self.directory, **sizes | given)

    def open(self, settings: Settings) -> Core:
        if self.kind == "alone":
            return assemble.build(settings, SystemClock(), Metrics())
        ways = Ways(
            lambda start: (starting.find_or_start(self.directory, assemble.plain(settings)) if start
                           else sockets.connect(self.directory)),
            ArenaView, os.urandom(16).hex(), os.getpid(), 10.0,
        )  # fmt: skip
        return SharedCache.open(ways, settings=settings, clock=SystemClock(), metrics=Metrics())

    def play(self, scene: Scene, **given: Any) -> None:
        """A scene on a fresh cache; afterwards nothing is left pinned."""

        async def act() -> None:
            settings = self.settings(**given)
            core = await asyncio.to_thread(self.open, settings)
            core.begin()
            try:
                await scene(core)
                gc.collect()
                # Any call gives back what was dropped; what runs over another connection may overtake it.
                for _ in range(3):
                    await core.lease([])
                    await core.call("status", {})
                    stats = await asyncio.to_thread(core.stats)
                assert stats["tiercache_leases"] == 0
            finally:
                await core.close()

        asyncio.run(act())


@pytest.fixture(params=["alone", "shared"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Kinds:
    """Both kinds of cache."""
    return Kinds(request.param, tmp_path / "cache")


def name(label: str) -> Name:
    return Name(keys.object_key("test", label))


def content(seed: int, size: int) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def target(size: int) -> Buffer:
    return Buffer.of(bytearray(size), writable=True)


def test_what_was_put_is_got_and_stays_what_it_was(cache: Kinds) -> None:
    async def scene(core: Core) -> None:
        sizes = [0, 1, 65_535, 65_536, 65_537, 3 * MIB, 5 * MIB + 1]
        values = [content(i, size) for i, size in enumerate(sizes)]
        names = [name(str(size)) for size in sizes]
        assert await core.put(names, values) == [Outcome.HIT] * len(sizes)
        assert await core.put(names[:1], [b"other"]) == [Outcome.HIT]
        for verify in (True, False):
            targets = [target(size) for size in sizes]
            assert await core.get_into(names, targets, verify=verify) == [Outcome.HIT] * len(sizes)
            assert [bytes(t) for t in targets] == values
        with await core.lease([*names, name("absent"), names[3]]) as lease:
            assert lease.outcomes == [Outcome.HIT] * len(sizes) + [Outcome.MISS, Outcome.HIT]
            assert [bytes(lease.view(i)) for i in range(len(sizes))] == values
            assert bytes(lease.view(len(sizes) + 1)) == values[3]

    cache.play(scene)


def test_threads_put_get_and_lease(cache: Kinds) -> None:
    async def scene(core: Core) -> None:
        names = [name(str(i)) for i in range(6)]
        values = [content(i, 300_000 + i) for i in range(6)]

        def act() -> None:
            terms = Terms(Kind.TENSOR, 3, 0.5)
            assert core.store(names[:5], [Buffer.of(v) for v in values[:5]], terms) == [Outcome.HIT] * 5
            assert core.store(names[:1], [Buffer.of(b"other")]) == [Outcome.HIT]
            targets = [target(400_000) for _ in names]
            assert core.get_into_resident(names, targets) == [Outcome.HIT] * 5 + [Outcome.MISS]
            assert [bytes(t)[: len(v)] for t, v in zip(targets[:5], values, strict=False)] == values[:5]
            assert core.lease_names_resident(names) is None
            lease = core.lease_names_resident(names[:5])
            assert lease is not None
            view = lease.view(2)
            lease.release()
            assert bytes(view) == values[2]
            with pytest.raises(ClosedError, match="released"):
                lease.view(1)

        await asyncio.to_thread(act)

    cache.play(scene)


def test_a_full_cache_evicts_the_oldest_and_never_what_is_leased(cache: Kinds) -> None:
    async def scene(core: Core) -> None:
        names = [name(str(i)) for i in range(40)]
        await core.put(names[:1], [content(0, MIB)])
        lease = await core.lease(names[:1])
        for i in range(1, 40):
            assert await core.put([names[i]], [content(i, MIB)]) == [Outcome.HIT]
        with await core.lease(names) as held:
            there = [outcome is Outcome.HIT for outcome in held.outcomes]
        assert there[0]
        assert there[39]
        assert not there[1]
        assert bytes(lease.view(0)) == content(0, MIB)
        lease.release()

    cache.play(scene)


def test_a_view_keeps_its_bytes_beyond_the_lease_and_nothing_longer(cache: Kinds) -> None:
    async def scene(core: Core) -> None:
        await core.put([name("a")], [content(1, MIB)])
        lease = await core.lease([name("a")])
        view = lease.view(0)
        lease.release()
        del lease
        for i in range(30):
            await core.put([name(f"fill{i}")], [content(i, MIB)])
        assert bytes(view) == content(1, MIB)

    cache.play(scene)


def test_a_chain_is_matched_as_far_as_it_is_whole(cache: Kinds) -> None:
    async def scene(core: Core) -> None:
        digests = keys.chain(keys.namespace("model"), [bytes([i]) * 4 for i in range(20)])
        values = [content(i, 100_000) for i in range(20)]
        assert await core.put_chain(digests[:8], values[:8]) == [Outcome.HIT] * 8
        assert await core.put_chain(digests[8:12], values[8:12], parent=digests[7]) == [Outcome.HIT] * 4
        other = keys.chain(digests[3], [b"fork"], digests[3])
        assert await core.put_chain(other, [b"x" * 50], parent=digests[3]) == [Outcome.HIT]
        with await core.match(digests) as lease:
            assert len(lease) == 12
            assert [bytes(lease.view(i)) for i in range(12)] == values[:12]
        with await core.match([*digests[:4], *other, digests[5]]) as lease:
            assert len(lease) == 5
        with core.match_resident(digests) as lease:
            assert len(lease) == 12
        with await core.match([]) as lease:
            assert len(lease) == 0
        assert await core.put_chain([b"z" * 16], [b"1"], parent=b"no such parent!!") == [Outcome.FULL]

        def in_thread() -> None:
            more = keys.chain(digests[11], [b"more"], digests[11])
            assert core.store_chain(more, [Buffer.of(b"y")], parent=digests[11]) == [Outcome.HIT]
            with core.match_resident([*digests[:12], *more]) as lease:
                assert len(lease) == 13

        await asyncio.to_thread(in_thread)

    cache.play(scene)


def test_deleted_is_gone_at_once_and_leased_bytes_stay(cache: Kinds) -> None:
    async def scene(core: Core) -> None:
        await core.put([name("a")], [content(1, MIB)])
        lease = await core.lease([name("a")])
        assert await core.delete([name("a"), name("b")]) == [Outcome.HIT, Outcome.GONE]
        assert await core.get_into([name("a")], [target(MIB)]) == [Outcome.MISS]
        await core.put([name("a")], [content(2, MIB)])
        for i in range(30):
            await core.put([name(f"fill{i}")], [content(i, MIB)])
        assert bytes(lease.view(0)) == content(1, MIB)
        lease.release()

    cache.play(scene)


class Source:
    """A file that counts what is asked of it, and can fail or wait."""

    def __init__(self, size: int) -> None:
        self.data = content(7, size)
        self.asked: list[tuple[int, int]] = []
        self.begun = asyncio.Event()
        self.gate: asyncio.Event | None = None
        self.fault: Exception | None = None

    async def load(self, gaps: Sequence[Gap], landed: Landed) -> None:
        self.asked += [(gap.ordinal, gap.parts) for gap in gaps]
        self.begun.set()
        if self.gate is not None:
            await self.gate.wait()
        if self.fault is not None:
            raise self.fault
        for i, gap in enumerate(gaps):
            page = self.data[gap.ordinal * PAGE : (gap.ordinal + 1) * PAGE]
            view = gap.target.view()
            assert len(view) == len(page)
            for part in range(64):
                if gap.parts >> part & 1:
                    view[part * 65536 : (part + 1) * 65536] = page[part * 65536 : (part + 1) * 65536]
            landed([i])


def test_only_missing_parts_are_loaded_and_once(cache: Kinds) -> None:
    async def scene(core: Core) -> None:
        source = Source(3 * PAGE + 5)
        file = PageRun(keys.page_key("i", "p", "v", PAGE, 65536), len(source.data), PAGE, 65536)
        (await core.read_pages(file, [0, 3], [0b11, 1], source.load)).release()
        assert sorted(source.asked) == [(0, 0b11), (3, 1)]
        assert core.lease_resident(file.key, [0], [0b111]) is None
        assert await asyncio.to_thread(core.lease_resident, file.key, [0], [0b111]) is None
        with await core.read_pages(file, [0], [0b111], source.load) as lease:
            assert source.asked[2:] == [(0, 0b100)]
            assert bytes(lease.view(0))[: 3 * 65536] == source.data[: 3 * 65536]
        resident = core.lease_resident(file.key, [0, 3], [0b101, 1])
        assert resident is not None
        for start, stop in ((0, 65536), (5, 7)):
            got = target(stop - start)
            assert resident.copy_into(0, start, stop, got) is Outcome.HIT
            assert bytes(got) == source.data[start:stop]
        got = target(5)
        assert resident.copy_into(1, 0, 5, got, verify=False) is Outcome.HIT
        assert bytes(got) == source.data[3 * PAGE :]
        resident.release()

    cache.play(scene)


def test_many_cold_readers_cause_one_load_and_one_who_leaves_harms_nobody(cache: Kinds) -> None:
    async def scene(core: Core) -> None:
        source = Source(PAGE)
        source.gate = asyncio.Event()
        file = PageRun(b"k" * 32, PAGE, PAGE, 65536)

        async def read() -> bytes:
            with await core.read_pages(file, [0], [WHOLE], source.load) as lease:
                return bytes(lease.view(0))

        readers = [asyncio.ensure_future(read()) for _ in range(40)]
        await source.begun.wait()
        readers[0].cancel()
        await asyncio.wait([readers[0]])
        source.gate.set()
        answers = await asyncio.gather(*readers, return_exceptions=True)
        assert isinstance(answers[0], asyncio.CancelledError)
        assert set(answers[1:]) == {source.data}
        assert source.asked == [(0, WHOLE)]

    cache.play(scene, memory_bytes=64 * MIB)


@pytest.mark.parametrize("fault", [OriginError("broken"), FileNotFoundError(2, "no such file")])
def test_a_failed_load_is_told_as_it_was_and_leaves_nothing(cache: Kinds, fault: Exception) -> None:
    async def scene(core: Core) -> None:
        source = Source(2 * PAGE)
        source.fault = fault
        file = PageRun(b"k" * 32, 2 * PAGE, PAGE, 65536)
        reads = [core.read_pages(file, [0, 1], [3, 3], source.load) for _ in range(3)]
        faults = await asyncio.gather(*reads, return_exceptions=True)
        assert faults == [fault] * 3
        source.fault = None
        with await core.read_pages(file, [0, 1], [3, 3], source.load) as lease:
            assert lease.outcomes == [Outcome.HIT] * 2

    cache.play(scene)


def test_pages_without_room_are_full(cache: Kinds) -> None:
    async def scene(core: Core) -> None:
        source = Source(15 * PAGE)
        file = PageRun(b"k" * 32, 15 * PAGE, PAGE, 65536)
        (await core.put([name("a")], [content(1, 5 * MIB)]))
        blocker = await core.lease([name("a")])
        with await core.read_pages(file, range(11), [1] * 11, source.load) as lease:
            assert Outcome.FULL in lease.outcomes or Outcome.BUSY in lease.outcomes
        blocker.release()

    cache.play(scene)


def test_misuse_is_told_with_the_way_out(cache: Kinds) -> None:
    async def scene(core: Core) -> None:
        with pytest.raises(CapacityError, match="memory_bytes"):
            await core.put([name("big")], [bytes(20 * MIB)])
        with pytest.raises(ConfigError, match="ssd_bytes"):
            await core.put([name("a")], [b"x"], durable=True)
        with pytest.raises(ConfigError, match="ttl_s"):
            await core.put([name("a")], [b"x"], ttl_s=0)
        with pytest.raises(ConfigError, match="scope"):
            await core.put([name("a")], [b"x"], scope=1 << 16)
        with pytest.raises(ConfigError, match="cost_s"):
            await core.put([name("a")], [b"x"], cost_s=-1.0)
        await core.put([name("a")], [b"xyz"])
        for _ in range(2):
            with pytest.raises(ConfigError, match="larger buffer"):
                await core.get_into([name("a")], [target(2)])
        assert not core.durable
        await core.flush()

    cache.play(scene)


def test_empty_batches_are_answered(cache: Kinds) -> None:
    async def scene(core: Core) -> None:
        assert await core.put([], []) == []
        assert await core.put_chain([], []) == []
        assert await core.get_into([], []) == []
        assert await core.delete([]) == []
        assert (await core.lease([])).outcomes == []
        assert await asyncio.to_thread(core.get_into_resident, [], []) == []
        assert await asyncio.to_thread(core.store, [], []) == []
        lease = await asyncio.to_thread(core.lease_names_resident, [])
        assert lease is None or lease.outcomes == []

    cache.play(scene)


def test_what_expires_is_a_miss_also_for_who_remembers_where_it_lay(cache: Kinds) -> None:
    async def scene(core: Core) -> None:
        await core.put([name("a"), name("b")], [b"old", b"kept"], ttl_s=0.01)
        await core.put([name("c")], [b"for ever"])
        over = core.expiry(0.01)
        until = SystemClock()
        while until.wall() < over:
            await asyncio.sleep(0.05)
        targets = [target(10) for _ in range(3)]
        got = await core.get_into([name("a"), name("b"), name("c")], targets)
        assert got == [Outcome.MISS, Outcome.MISS, Outcome.HIT]
        await core.put([name("a")], [b"new"])
        assert await core.get_into([name("a")], targets[:1]) == [Outcome.HIT]
        assert bytes(targets[0])[:3] == b"new"

    cache.play(scene)


def test_durable_puts_and_flush(cache: Kinds) -> None:
    async def scene(core: Core) -> None:
        names = [name(str(i)) for i in range(20)]
        values = [content(i, 700_000) for i in range(20)]
        assert await core.put(names, values, durable=True) == [Outcome.HIT] * 20
        await core.put([name("later")], [b"x"])
        await core.flush()
        targets = [target(700_000) for _ in names]
        assert await core.get_into(names, targets) == [Outcome.HIT] * 20
        assert [bytes(t) for t in targets] == values
        stats = await asyncio.to_thread(core.stats)
        assert stats['tiercache_tier_used_bytes{tier="ssd"}'] > 20 * 700_000

    cache.play(scene, ssd_bytes=64 * MIB, segment_bytes=4 * MIB)


def test_a_closed_cache_says_so(cache: Kinds) -> None:
    async def act() -> None:
        core = await asyncio.to_thread(cache.open, cache.settings())
        core.begin()
        await core.put([name("a")], [b"x"])
        await core.close()
        await core.close()
        for call in (core.lease, core.match, core.delete):
            with pytest.raises(ClosedError, match=r"tiercache\.open"):
                await call([])  # type: ignore[operator]
        with pytest.raises(ClosedError, match=r"tiercache\.open"):
            core.store([name("a")], [Buffer.of(b"x")])

    asyncio.run(act())


def test_a_batch_beyond_what_one_process_may_hold_is_read_all_the_same(cache: Kinds) -> None:
    async def scene(core: Core) -> None:
        names = [name(str(i)) for i in range(10)]
        values = [content(i, MIB - i) for i in range(10)]
        for one, value in zip(names, values, strict=True):
            assert await core.put([one], [value]) == [Outcome.HIT]
        for reads in ("resident", "loop", "blocking"):
            if isinstance(core, SharedCache):
                core._link.home.memo.clear()  # type: ignore[union-attr]
            targets = [target(MIB) for _ in names]
            if reads == "resident":
                got = await asyncio.to_thread(core.get_into_resident, names, targets)
            elif reads == "loop":
                got = await core.get_into(names, targets)
            else:
                blocking = BlockingCache(core, asyncio.get_running_loop())
                assert await asyncio.to_thread(blocking.get, names) == values
                continue
            assert got == [Outcome.HIT] * 10
            assert [bytes(each)[: len(value)] for each, value in zip(targets, values, strict=True)] == values

    cache.play(scene, client_share=0.25)
