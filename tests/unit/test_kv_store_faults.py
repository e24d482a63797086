"""KvStore on a bad day: bytes that differ or rot, no room, an SSD that fails, threads that end."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import numpy as np
import pytest

import tiercache
from tests.kv_matrix.engine import Rank, layout_of, ranks_of, truth_of
from tests.unit.test_kv_store import HIT, PATIENCE_S, SIZES, Gate, check_load, check_nothing_leaked, saved
from tiercache.cache import Cache
from tiercache.clock import SystemClock
from tiercache.cpu.tier import MemoryTier
from tiercache.index import Index
from tiercache.kv import comparing
from tiercache.kv.shard import Shard
from tiercache.kv.workers import GivenUp, Steps, Workers
from tiercache.metrics import Metrics
from tiercache.model import Outcome
from tiercache.policy import POLICIES
from tiercache.settings import Settings
from tiercache.ssd.tier import SsdTier
from tiercache.sync import BlockingCache, io_loop, wait
from tiercache.testing.faults import Fault, Script, faulty

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from tiercache.kv.layout import Layout
    from tiercache.kv.saving import Saving
    from tiercache.kv.store import KvStore

MIB = 1 << 20


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[BlockingCache]:
    with tiercache.open(tmp_path, **SIZES) as made:
        yield made
        check_nothing_leaked(made)


def faulty_cache(
    directory: Path, script: Script, memory_bytes: int = 64 * MIB, *, stall_s: float = 0.2, deadline_s: float = 2.0
) -> BlockingCache:
    """A cache whose SSD meets the faults of a script."""
    options = Settings(
        directory=str(directory),
        memory_bytes=memory_bytes,
        ssd_bytes=256 * MIB,
        segment_bytes=8 * MIB,
        ssd_deadline_s=deadline_s,
    )
    ssd = SsdTier(options.directory, options.ssd_bytes, segment_bytes=options.segment_bytes, disk_free_floor_bytes=0)
    index = Index(options.slots_max, [POLICIES["lru"](), POLICIES["lru"]()])
    memory = MemoryTier(memory_bytes, segment_bytes=memory_bytes)
    core = Cache(
        index, memory, faulty(ssd, script, stall_s=stall_s), settings=options, clock=SystemClock(), metrics=Metrics()
    )
    wait(core.start(), io_loop())
    return BlockingCache(core, io_loop())


# -- bytes that rot ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verify", [True, False])
def test_poison_before_the_digest_is_served_and_poison_after_it_is_not(cache: BlockingCache, verify: bool) -> None:
    layout, tokens = layout_of("MFA"), 64
    rank, truth = Rank(layout, Shard.whole(layout), 16, 5), truth_of(layout, tokens)
    table = rank.table(tokens)
    rank.write(truth, table)
    rank.flip(table, 20, layer=7)
    with cache.kv(layout, verify=verify) as store:
        keys = store.keys(range(tokens))
        assert store.save(keys, rank.planes, table).wait(PATIENCE_S) == [HIT] * 4
        changed = truth.copy()
        changed[7, 0, 20, 0] ^= 1
        check_load(store, keys, changed)  # that is what the engine had
        part = layout.part_span(layout.part_of(30, 0))[0]
        with wait(cache.core.lease_blocks(keys, layout.all_parts), cache.loop) as lease:
            lease.buffer(2).array()[part + 5] ^= 1
        rank.memory[...] = 0
        cache.core.metrics.snapshot()
        outcomes = store.load(keys, rank.planes, table).wait(PATIENCE_S)
        if not verify:  # the one who asked for that gets it
            assert outcomes == [HIT] * 4
            assert rank.wrong(changed, table, range(tokens)) == 1
            return
        # From the SSD, if it got there before the rot; else nowhere.
        assert outcomes in ([HIT] * 4, [HIT, HIT, Outcome.MISS, Outcome.MISS], [HIT, HIT, Outcome.MISS, HIT])
        for block, outcome in enumerate(outcomes):
            if outcome is HIT:
                assert rank.wrong(changed, table, range(16 * block, 16 * block + 16)) == 0
        assert cache.core.metrics.total("tiercache_corruptions_total") >= 1


def test_rot_in_memory_is_answered_from_the_ssd(cache: BlockingCache) -> None:
    layout = layout_of("MFA")
    keys, truth = saved(cache, layout, 64, durable=True)
    with wait(cache.core.lease_blocks(keys, layout.all_parts), cache.loop) as lease:
        for block in range(4):
            lease.buffer(block).array()[block * layout.part_bytes] ^= 1
    with cache.kv(layout) as store:
        check_load(store, keys, truth)
    assert cache.core.metrics.total("tiercache_corruptions_total") == 4


def test_rot_without_another_copy_is_a_miss_and_can_be_saved_again(tmp_path: Path) -> None:
    layout = layout_of("GQA")
    with tiercache.open(tmp_path, memory_bytes="64MiB", ssd_bytes=0) as cache:
        keys, truth = saved(cache, layout, 64)
        with wait(cache.core.lease_blocks(keys, layout.all_parts), cache.loop) as lease:
            lease.buffer(1).array()[-1] ^= 1
        rank = Rank(layout, Shard.whole(layout), 16, 4)
        table = rank.table(64)
        with cache.kv(layout) as store:
            loading = store.load(keys, rank.planes, table)
            outcomes = loading.wait(PATIENCE_S)
            assert outcomes[:2] == [HIT, Outcome.MISS]
            assert not loading.wait_layer(layout.layers - 1, 0)
            assert store.match(keys).length == 1
            rank.write(truth, table)
            assert store.save(keys, rank.planes, table).wait(PATIENCE_S) == [HIT] * 4
            check_load(store, keys, truth)
        assert cache.core.metrics.total("tiercache_corruptions_total") == 1
        check_nothing_leaked(cache)


# -- replicas that differ ----------------------------------------------------------------------------------------------


def save_all(
    cache: BlockingCache, layout: Layout, ranks: Sequence[Rank], tokens: int
) -> tuple[list[KvStore], list[Saving]]:
    """All ranks save at once."""
    stores = [cache.kv(layout, rank.shard) for rank in ranks]
    keys = stores[0].keys(range(tokens))
    savings = [store.save(keys, rank.planes, rank.table(tokens)) for rank, store in zip(ranks, stores, strict=True)]
    for saving in savings:
        assert saving.wait(PATIENCE_S) == [HIT] * len(keys)
        assert saving.pages_free(0)
    return stores, savings


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "tp", "pp", "layer"), [("MFA", 4, 1, 11), ("MFA", 8, 1, 60), ("GQA", 8, 1, 3), ("MQA", 2, 2, 1)]
)
def test_a_flipped_byte_in_one_rank_is_found_and_both_readings_are_right(
    tmp_path: Path, kind: str, tp: int, pp: int, layer: int, caplog: pytest.LogCaptureFixture
) -> None:
    layout, tokens = layout_of(kind), 64
    for odd in range(tp):
        with tiercache.open(tmp_path / str(odd), memory_bytes="64MiB", ssd_bytes=0) as cache:
            ranks, truth = ranks_of(layout, tp, pp, 16, 6), truth_of(layout, tokens)
            for rank in ranks:
                rank.write(truth, rank.table(tokens))
            ranks[odd].flip(ranks[odd].table(tokens), 37, layer, at=9)
            kept = [rank.memory.copy() for rank in ranks]
            stores, savings = save_all(cache, layout, ranks, tokens)
            found = [i for i, saving in enumerate(savings) if saving.differs]
            holders = [i for i, rank in enumerate(ranks) if rank.shard.heads == ranks[odd].shard.heads]
            assert found
            assert set(found) <= set(holders)
            # Whoever wrote the part first is the one that the others differ from.
            assert found == [odd] or odd not in found
            assert all(list(savings[i].differs) == [2] for i in found)
            assert cache.core.metrics.value("tiercache_kv_divergent_parts_total") == len(found)
            assert "both are kept" in caplog.text
            keys = stores[0].keys(range(tokens))
            for rank, store, mine in zip(ranks, stores, kept, strict=True):
                table = rank.table(tokens)
                rank.memory[...] = 0
                assert store.load(keys, rank.planes, table).wait(PATIENCE_S) == [HIT] * 4
                for page in table.page_ids.tolist():
                    at = [slice(None)] * rank.memory.ndim
                    at[rank.order.index("p")] = page
                    assert np.array_equal(rank.memory[tuple(at)], mine[tuple(at)])
            for store in stores:
                store.close()
            # Another process of that rank finds its own version, and an engine of one rank the one stored first.
            rank = ranks[found[0]]
            rank.memory[...] = 0
            with cache.kv(layout, rank.shard) as store:
                assert store.load(keys, rank.planes, rank.table(tokens)).wait(PATIENCE_S) == [HIT] * 4
                assert rank.wrong(truth, rank.table(tokens), range(tokens)) == (found == [odd])
            whole = Rank(layout, Shard.whole(layout), 16, 4)
            with cache.kv(layout) as store:
                assert store.load(keys, whole.planes, whole.table(tokens)).wait(PATIENCE_S) == [HIT] * 4
                assert whole.wrong(truth, whole.table(tokens), range(tokens)) == (found != [odd])
            check_nothing_leaked(cache)


def test_a_difference_that_came_too_late_to_be_seen_is_a_miss_for_that_rank(
    cache: BlockingCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pages were gone when the other one wrote: it computes that block again rather than read another version."""
    monkeypatch.setattr("tiercache.kv.variants.PATIENCE_S", 0.0)
    layout, tokens = layout_of("MFA"), 64
    ranks, truth = ranks_of(layout, 2, 1, 16, 6), truth_of(layout, tokens)
    stores = []
    for rank in ranks:
        store = cache.kv(layout, rank.shard)
        store.variants.patience_s = 0.0
        table = rank.table(tokens)
        rank.write(truth, table)
        if rank is ranks[1]:
            other = next(part for part in range(layout.parts) if rank.shard.share(layout)[0] >> part & 1)
            rank.flip(table, 20, layout.part_range(other)[0].start)
        keys = store.keys(range(tokens))
        assert store.save(keys, rank.planes, table).wait(PATIENCE_S) == [HIT] * 4
        stores.append(store)
    outcomes = [
        store.load(keys, rank.planes, rank.table(tokens)).wait(PATIENCE_S)
        for rank, store in zip(ranks, stores, strict=True)
    ]
    assert outcomes == [[HIT, Outcome.MISS, HIT, HIT], [HIT] * 4]
    assert cache.core.metrics.value("tiercache_kv_divergent_parts_total") == 1
    for store in stores:
        store.close()


def test_a_replica_that_never_comes_costs_a_moment_once(cache: BlockingCache) -> None:
    layout, tokens = layout_of("MFA"), 32
    rank, truth = ranks_of(layout, 8, 1, 16, 6)[3], truth_of(layout, tokens)
    table = rank.table(tokens)
    rank.write(truth, table)
    with cache.kv(layout, rank.shard) as store:
        store.variants.patience_s = 0.0
        keys = store.keys(range(tokens))
        saving = store.save(keys, rank.planes, table)
        assert saving.wait(PATIENCE_S) == [HIT] * 2
        assert store.variants.patience_s == comparing.PEER_LATE_S
        assert store.match(keys).length == 0
        assert store.load(keys, rank.planes, table).wait(PATIENCE_S) == [Outcome.MISS] * 2


# -- no room, no SSD ---------------------------------------------------------------------------------------------------


def test_a_full_memory_takes_what_fits(tmp_path: Path) -> None:
    layout, tokens = layout_of("MFA"), 16 * 60  # 30 MB
    with tiercache.open(tmp_path, memory_bytes="16MiB", ssd_bytes=0) as cache:
        rank, truth = Rank(layout, Shard.whole(layout), 16, 60), truth_of(layout, tokens)
        table = rank.table(tokens)
        rank.write(truth, table)
        with cache.kv(layout) as store:
            keys = store.keys(range(tokens))
            saving = store.save(keys, rank.planes, table)
            outcomes = saving.wait(PATIENCE_S)
            stored = outcomes.count(HIT)
            assert 0 < stored < 60
            assert outcomes == [HIT] * stored + [Outcome.FULL] * (60 - stored)
            assert saving.pages_free(0)
            assert cache.core.metrics.value("tiercache_kv_failed_blocks_total", operation="save") == 60 - stored
            found = store.match(keys).length
            assert found
            check_load(store, keys[:found], truth)
        check_nothing_leaked(cache)


def test_an_ssd_that_fails_reads_gives_misses(tmp_path: Path) -> None:
    layout, script = layout_of("MFA"), Script({})
    with tiercache.open(tmp_path, **SIZES) as cache:
        keys, truth = saved(cache, layout, 16 * 8, durable=True)
    with faulty_cache(tmp_path, script) as cache, cache.kv(layout) as store:
        rank = Rank(layout, Shard.whole(layout), 16, 8)
        table = rank.table(16 * 8)
        assert store.match(keys).length == 8
        for fault in (Fault.ERROR, Fault.CORRUPT, Fault.VANISH, Fault.BUSY):
            script.add("read", *[fault] * 4)
            rank.memory[...] = 0
            outcomes = store.load(keys, rank.planes, table).wait(PATIENCE_S)
            for block, outcome in enumerate(outcomes):
                if outcome is HIT:
                    assert rank.wrong(truth, table, range(16 * block, 16 * block + 16)) == 0
        check_nothing_leaked(cache)


def test_an_ssd_that_takes_nothing_does_not_stop_a_save(tmp_path: Path) -> None:
    layout, script = layout_of("GQA"), Script({"write": [Fault.ERROR] * 100})
    with faulty_cache(tmp_path, script) as cache, cache.kv(layout) as store:
        rank, truth = Rank(layout, Shard.whole(layout), 16, 4), truth_of(layout, 64)
        table = rank.table(64)
        rank.write(truth, table)
        keys = store.keys(range(64))
        assert store.save(keys, rank.planes, table).wait(PATIENCE_S) == [HIT] * 4
        outcomes = store.save(keys, rank.planes, table, durable=True).wait(PATIENCE_S)
        assert all(outcome in (HIT, Outcome.FULL, Outcome.MISS, Outcome.BUSY) for outcome in outcomes)
        check_load(store, keys, truth)
        check_nothing_leaked(cache)


def test_a_load_from_an_ssd_that_hangs_ends_at_its_deadline(tmp_path: Path) -> None:
    layout, script = layout_of("GQA"), Script({})
    with tiercache.open(tmp_path, **SIZES) as cache:
        keys, _ = saved(cache, layout, 64, durable=True)
    with faulty_cache(tmp_path, script) as cache, cache.kv(layout) as store:
        rank = Rank(layout, Shard.whole(layout), 16, 4)
        table = rank.table(64)
        assert store.match(keys).length == 4
        script.add("read", *[Fault.STALL] * 2)
        loading = store.load(keys, rank.planes, table, deadline_s=0.05)
        assert not loading.wait_layer(0, PATIENCE_S)
        assert loading.wait(PATIENCE_S) == [Outcome.MISS] * 4
        assert not rank.memory.any()


# -- the threads -------------------------------------------------------------------------------------------------------


def test_a_fault_of_ours_in_a_step_ends_the_job_and_not_the_thread() -> None:
    metrics = Metrics()
    workers, seen = Workers(1, SystemClock(), metrics), []

    def bad() -> Steps:
        yield None
        raise ZeroDivisionError

    def slow() -> Steps:
        try:
            yield 3600.0
        except GivenUp:
            seen.append("late")
            raise

    def never() -> Steps:
        try:
            yield asyncio.run_coroutine_threadsafe(asyncio.sleep(3600), io_loop())
        finally:
            seen.append("ended")

    works = [
        workers.make(steps, lambda: seen.append("finished"), urgent=False, deadline_s=deadline_s)
        for steps, deadline_s in ((bad(), PATIENCE_S), (slow(), 0.01), (never(), PATIENCE_S))
    ]
    for work in works:
        workers.start(work)
    assert works[0].ended.wait(PATIENCE_S)
    assert works[1].ended.wait(PATIENCE_S)
    assert metrics.value("tiercache_internal_errors_total") == 1
    workers.cancel(works[2])
    assert works[2].ended.wait(PATIENCE_S)
    assert sorted(seen) == ["ended", "finished", "finished", "finished", "late"]
    workers.close(PATIENCE_S)


def test_loads_go_before_saves(cache: BlockingCache) -> None:
    order: list[str] = []

    def steps(name: str) -> Steps:
        for _ in range(3):
            order.append(name)
            yield None

    with cache.kv(layout_of("MQA")) as store:
        gate = Gate(store)
        works = [
            store.workers.make(steps(name), lambda: None, urgent=urgent, deadline_s=PATIENCE_S)
            for name, urgent in (("save", False), ("next save", False), ("load", True))
        ]
        for work in works:
            store.workers.start(work)
        gate.open()
        for work in works:
            assert work.ended.wait(PATIENCE_S)
    assert order == ["load"] * 3 + ["save"] * 3 + ["next save"] * 3
