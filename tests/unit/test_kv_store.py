"""KvStore over a cache in this process: saves, loads, slices, sequences, order of layers, fences and ends."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from concurrent import futures
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiercache
from tests.kv_matrix.engine import ORDERS, SHAPES, Rank, layout_of, ranks_of, truth_of
from tiercache.errors import ClosedError, ConfigError, UnavailableError
from tiercache.kv.layout import Layout, Rule, Span
from tiercache.kv.sequence import Sequence
from tiercache.kv.shard import Shard
from tiercache.model import Outcome
from tiercache.sync import wait

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tiercache.kv.loading import Loading
    from tiercache.kv.store import KvStore
    from tiercache.kv.workers import Steps
    from tiercache.sync import BlockingCache

SIZES = {"memory_bytes": "64MiB", "ssd_bytes": "256MiB", "segment_bytes": "8MiB", "disk_free_floor_bytes": 0}
PATIENCE_S = 30.0
HIT = Outcome.HIT


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[BlockingCache]:
    with tiercache.open(tmp_path, **SIZES) as made:
        yield made
        check_nothing_leaked(made)


def check_nothing_leaked(cache: BlockingCache) -> None:
    """No pins, and an index that is in order: here, or at the owner."""
    with suppress(UnavailableError):  # an SSD that takes nothing
        cache.flush()
    gc.collect()
    state, pause = {}, threading.Event()
    for _ in range(500):  # an owner hears of released leases a moment later
        state = wait(cache.core.call("validate", {}), cache.loop)
        if not state["pins"]:
            break
        pause.wait(0.01)
    assert state["pins"] == 0
    assert not state["broken"]


def saved(
    cache: BlockingCache, layout: Layout, tokens: int, seed: int = 0, **terms: bool
) -> tuple[list[bytes], np.ndarray]:
    """A sequence that one rank has saved: its keys and its truth."""
    rank, truth = Rank(layout, Shard.whole(layout), 32, -(-tokens // 32) + 3), truth_of(layout, tokens, seed)
    table = rank.table(tokens)
    rank.write(truth, table)
    with cache.kv(layout) as store:
        keys = store.keys(np.arange(tokens) + 100_000 * seed)
        saving = store.save(keys, rank.planes, table, **terms)
        assert saving.wait(PATIENCE_S) == [HIT] * len(keys)
        assert saving.pages_free(0)
        assert saving.moved_bytes == len(keys) * layout.block_bytes
    return keys, truth


def check_load(store: KvStore, keys: list[bytes], truth: np.ndarray, order: str = ORDERS[1]) -> Loading:
    """Loads all of it into fresh memory, and compares."""
    layout, tokens = store.layout, truth.shape[2]
    rank = Rank(layout, store.holder, 16, -(-tokens // 16) + 1, order)
    table = rank.table(tokens, seed=3)
    loading = store.load(keys, rank.planes, table)
    assert loading.wait(PATIENCE_S) == [HIT] * len(keys)
    assert rank.wrong(truth, table, range(len(keys) * layout.block_tokens)) == 0
    return loading


class Gate:
    """Holds a store's thread, so that a test decides when what is queued behind it begins."""

    def __init__(self, store: KvStore) -> None:
        self._began, self._open = threading.Event(), threading.Event()
        work = store.workers.make(self._steps(), lambda: None, urgent=True, deadline_s=PATIENCE_S)
        store.workers.start(work)
        assert self._began.wait(PATIENCE_S)

    def _steps(self) -> Steps:
        self._began.set()
        assert self._open.wait(PATIENCE_S)
        yield None

    def open(self) -> None:
        """Lets it go on."""
        self._open.set()


# -- saves and loads ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SHAPES)
def test_what_one_engine_saved_another_loads(cache: BlockingCache, kind: str) -> None:
    layout = layout_of(kind)
    keys, truth = saved(cache, layout, 16 * 5 + 7)
    assert len(keys) == 5
    with cache.kv(layout) as store:
        found = store.match([*keys, b"x" * 16])
        assert (found.length, found.tiers, found.in_memory) == (5, b"\1" * 5, 5)
        loading = check_load(store, keys, truth)
        assert loading.moved_bytes == 5 * layout.block_bytes
        assert cache.core.metrics.value("tiercache_kv_loaded_blocks_total") == 5
        assert cache.core.metrics.value("tiercache_kv_missed_blocks_total") == 1


def test_a_range_of_blocks_is_saved_and_loaded(cache: BlockingCache) -> None:
    layout = layout_of("GQA")
    rank, truth = Rank(layout, Shard.whole(layout), 16, 12), truth_of(layout, 160)
    table = rank.table(160)
    rank.write(truth, table)
    with cache.kv(layout) as store:
        keys = store.keys(range(160))
        assert store.save(keys, rank.planes, table, start=3, stop=5).wait(PATIENCE_S) == [Outcome.FULL] * 2
        assert store.save(keys, rank.planes, table, stop=4).wait(PATIENCE_S) == [HIT] * 4
        assert store.save(keys, rank.planes, table, start=2, stop=7).wait(PATIENCE_S) == [HIT] * 5
        assert store.match(keys).length == 7
        rank.memory[...] = 0
        assert store.load(keys, rank.planes, table, start=2, stop=9).wait(PATIENCE_S) == [HIT] * 5 + [Outcome.MISS] * 2
        assert rank.wrong(truth, table, range(32, 112)) == 0
        assert not rank.read(table, range(32)).any()
        assert not rank.read(table, range(112, 160)).any()


def test_a_second_save_copies_nothing(cache: BlockingCache) -> None:
    layout = layout_of("MLA")
    keys, truth = saved(cache, layout, 64)
    rank = Rank(layout, Shard.whole(layout), 64, 1)
    table = rank.table(64)
    rank.write(truth, table)
    with cache.kv(layout) as store:
        again = store.save(keys, rank.planes, table)
        assert again.wait(PATIENCE_S) == [HIT] * 4
        assert again.moved_bytes == 0


@pytest.mark.parametrize(
    ("kind", "tp", "pp"), [("MFA", 8, 1), ("MFA", 4, 2), ("GQA", 8, 2), ("MLA", 8, 1), ("MHA", 2, 2)]
)
def test_ranks_store_every_byte_once(cache: BlockingCache, kind: str, tp: int, pp: int) -> None:
    layout, tokens = layout_of(kind), 50
    truth, ranks = truth_of(layout, tokens), ranks_of(layout, tp, pp, 32, 4)
    stores = [cache.kv(layout, rank.shard) for rank in ranks]
    keys = stores[0].keys(range(tokens))
    savings = []
    for rank, store in zip(ranks, stores, strict=True):
        table = rank.table(tokens)
        rank.write(truth, table)
        savings.append(store.save(keys, rank.planes, table))
    assert [saving.wait(PATIENCE_S) for saving in savings] == [[HIT] * 3] * len(ranks)
    assert sum(saving.moved_bytes for saving in savings) == 3 * layout.block_bytes
    assert not any(saving.differs for saving in savings)
    with cache.kv(layout) as store:
        check_load(store, keys, truth)
    for store in stores:
        store.close()


def test_a_block_that_lacks_a_rank_is_there_for_those_that_do_not_need_it(cache: BlockingCache) -> None:
    layout, tokens = layout_of("MHA"), 32
    truth, ranks = truth_of(layout, tokens), ranks_of(layout, 2, 1, 16, 4)
    with cache.kv(layout, ranks[0].shard) as store:
        table = ranks[0].table(tokens)
        ranks[0].write(truth, table)
        keys = store.keys(range(tokens))
        assert store.save(keys, ranks[0].planes, table).wait(PATIENCE_S) == [HIT] * 2
        assert store.match(keys, ranks[0].shard).length == 2
        assert store.match(keys, ranks[1].shard).length == 0
        assert store.match(keys).length == 0
        check_load(store, keys, truth)


def test_durable_saves_outlive_the_cache(tmp_path: Path) -> None:
    layout = layout_of("MFA")
    with tiercache.open(tmp_path, **SIZES) as cache:
        keys, truth = saved(cache, layout, 160, durable=True)
        cache.core.tiers.index.validate()
    with tiercache.open(tmp_path, **SIZES) as cache, cache.kv(layout) as store:
        assert store.match(keys).tiers == b"\2" * 10
        check_load(store, keys, truth)
        assert store.match(keys).tiers == b"\1" * 10


@pytest.mark.slow
def test_a_sequence_larger_than_memory_goes_to_the_ssd_and_comes_back(tmp_path: Path) -> None:
    layout = layout_of("MFA")
    with tiercache.open(tmp_path, **SIZES | {"memory_bytes": "16MiB"}) as cache:
        keys, truth = saved(cache, layout, 16 * 60, durable=True)  # 30 MB
        with cache.kv(layout) as store:
            assert store.match(keys).length == 60
            check_load(store, keys, truth)
            check_load(store, keys, truth, ORDERS[2])


@pytest.mark.slow
def test_eviction_under_load_gives_misses_and_never_wrong_bytes(tmp_path: Path) -> None:
    layout = layout_of("MFA")
    with tiercache.open(tmp_path, **SIZES | {"memory_bytes": "16MiB", "ssd_bytes": 0}) as cache:
        rank, tokens = Rank(layout, Shard.whole(layout), 64, 10), 16 * 12
        with cache.kv(layout) as store:
            hits = 0
            for seed in range(8):  # twelve blocks each, thirty-two fit
                truth, table = truth_of(layout, tokens, seed), rank.table(tokens, seed)
                rank.write(truth, table)
                keys = store.keys(np.arange(tokens) + 1000 * seed)
                assert store.save(keys, rank.planes, table).wait(PATIENCE_S).count(HIT) > 0
                for back in range(max(0, seed - 3), seed + 1):
                    old = store.keys(np.arange(tokens) + 1000 * back)
                    rank.memory[...] = 0
                    outcomes = store.load(old, rank.planes, table).wait(PATIENCE_S)
                    for block, outcome in enumerate(outcomes):
                        if outcome is HIT:
                            span = range(16 * block, 16 * block + 16)
                            assert rank.wrong(truth_of(layout, tokens, back), table, span) == 0
                            hits += 1
            assert hits > 8 * 12
        check_nothing_leaked(cache)


def test_a_match_counts_as_use(tmp_path: Path) -> None:
    """Of what was matched longest ago the end goes first; what was matched since, stays."""
    layout = layout_of("MFA")
    # Evicted is what the third save takes the place of, and nothing behind its back: the looks below are uses, too.
    sizes = {"memory_bytes": "16MiB", "ssd_bytes": 0, "high_mark": 1}
    with tiercache.open(tmp_path, **sizes) as cache, cache.kv(layout) as store:
        first, second = (saved(cache, layout, 16 * 12, seed)[0] for seed in (1, 2))
        assert store.match(second).length == store.match(first).length == 12
        assert store.match(second[:6]).length == 6
        saved(cache, layout, 16 * 12, 3)
        assert 6 <= store.match(second).length < 12
        assert store.match(first).length == 12
        check_nothing_leaked(cache)


# -- slices ------------------------------------------------------------------------------------------------------------


def sliced(truth: np.ndarray, layout: Layout, layers: range, heads: range, tokens: range) -> list[np.ndarray]:
    """[layer, head, token, byte] of K, and of V where there is one."""
    part = truth[layers.start : layers.stop, heads.start : heads.stop, tokens.start : tokens.stop]
    split = layout.k_dim * layout.itemsize
    return [part[..., :split], part[..., split:]][: 2 if layout.v_dim else 1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["GQA", "MLA"])
def test_any_slice_over_any_tiers_reads_into_one_array(tmp_path: Path, kind: str) -> None:
    layout = layout_of(kind)
    with tiercache.open(tmp_path, **SIZES) as cache:
        keys, truth = saved(cache, layout, 16 * 9, durable=True)
    with tiercache.open(tmp_path, **SIZES) as cache, cache.kv(layout) as store:
        assert store.load(keys, *memory_of(layout, 64), stop=4).wait(PATIENCE_S) == [HIT] * 4
        assert set(store.match(keys).tiers) == {1, 2}

        @settings(max_examples=40)
        @given(st.data())
        def slices(data: st.DataObject) -> None:
            layers, heads, tokens = (
                range(*sorted(data.draw(st.tuples(st.integers(0, most), st.integers(0, most)))))
                for most in (layout.layers, layout.heads, 16 * 9)
            )
            item, kinds = f"u{layout.itemsize}", 2 if layout.v_dim else 1
            out = np.zeros((len(layers), kinds, len(heads), len(tokens), layout.k_dim), item)
            assert store.read(keys, layers, heads, tokens, out) is HIT
            for kv, wanted in enumerate(sliced(truth, layout, layers, heads, tokens)):
                assert np.array_equal(np.ascontiguousarray(out[:, kv]).view(np.uint8), wanted)

        slices()
        check_nothing_leaked(cache)


def memory_of(layout: Layout, tokens: int) -> tuple:
    """Planes and a table of an engine of one rank."""
    rank = Rank(layout, Shard.whole(layout), 16, tokens // 16)
    return rank.planes, rank.table(tokens)


def test_a_strided_slice_and_one_of_two_arrays(cache: BlockingCache) -> None:
    layout = layout_of("GQA")
    keys, truth = saved(cache, layout, 64)
    layers, heads, tokens = range(3, 9), range(1, 2), range(5, 40)
    wanted = sliced(truth, layout, layers, heads, tokens)
    with cache.kv(layout) as store:
        wide = np.zeros((35, 6, 2, 1, 80), np.uint16)  # token first, and room behind each row
        assert store.read(keys, layers, heads, tokens, wide.transpose(1, 2, 3, 0, 4)[..., :64]) is HIT
        for kv in range(2):
            found = np.ascontiguousarray(wide[:, :, kv, :, :64].transpose(1, 2, 0, 3)).view(np.uint8)
            assert np.array_equal(found, wanted[kv])
        assert not wide[..., 64:].any()
        arrays = [np.zeros((6, 1, 35, 64), np.uint16) for _ in range(2)]
        assert store.read(keys, layers, heads, tokens, arrays) is HIT
        assert all(np.array_equal(a.view(np.uint8), b) for a, b in zip(arrays, wanted, strict=True))
        assert store.read([*keys, b"x" * 16], layers, heads, range(60, 70), np.zeros((6, 2, 1, 10, 64), np.uint16)) is (
            Outcome.MISS
        )
        with pytest.raises(ConfigError, match="not in a sequence of 4 blocks"):
            store.read(keys, layers, heads, range(60, 70), arrays)
        with pytest.raises(ConfigError, match="room for 35 tokens, not 10"):
            store.read(keys, layers, heads, range(10), arrays)
        with pytest.raises(ConfigError, match=r"\[K, V\]"):
            store.read(keys, layers, heads, tokens, arrays[:1])


# -- sequences ---------------------------------------------------------------------------------------------------------


def test_a_turn_moves_what_was_appended_and_nothing_else(cache: BlockingCache) -> None:
    layout = layout_of("MQA")
    rank, truth = Rank(layout, Shard.whole(layout), 32, 20), truth_of(layout, 600)
    table = rank.table(600)
    with cache.kv(layout) as store:
        sequence, length = Sequence(store, rank.planes), 0
        for appended in (5, 11, 1, 100, 0, 31, 333):
            blocks, length = length // 16, length + appended
            rank.write(truth, table, range(length - appended, length))
            saving = sequence.advance(store.keys(range(length)), table)
            if length // 16 == blocks:
                assert saving is None
                continue
            assert saving is not None
            assert saving.wait(PATIENCE_S) == [HIT] * (length // 16 - blocks)
            assert saving.moved_bytes == (length // 16 - blocks) * layout.block_bytes
            assert sequence.fence(0)
        assert sequence.saved == length // 16
        keys = store.keys(range(length))
        check_load(store, keys, truth[:, :, : len(keys) * 16])


def test_what_was_lost_is_saved_again(cache: BlockingCache) -> None:
    layout = layout_of("MQA")
    rank, truth = Rank(layout, Shard.whole(layout), 16, 20), truth_of(layout, 160)
    table = rank.table(160)
    rank.write(truth, table)
    with cache.kv(layout) as store:
        sequence, keys = Sequence(store, rank.planes), store.keys(range(160))
        first = sequence.advance(keys[:6], table)
        assert first is not None
        assert first.wait(PATIENCE_S) == [HIT] * 6
        cache.delete(keys[4:6])
        again = sequence.advance(keys[:8], table)
        assert again is not None
        assert again.wait(PATIENCE_S) == [HIT] * 4
        assert again.moved_bytes == 4 * layout.block_bytes
        gate = Gate(store)
        last = sequence.advance(keys, table)
        assert last is not None
        assert not sequence.fence(0)
        sequence.cancel()
        assert sequence.fence(0)
        gate.open()
        assert last.wait(PATIENCE_S) == [Outcome.MISS] * 2
        once_more = sequence.advance(keys, table)
        assert once_more is not None
        assert once_more.wait(PATIENCE_S) == [HIT] * 2
        check_load(store, keys, truth)


def test_groups_that_are_not_full_attention_may_begin_anywhere(cache: BlockingCache) -> None:
    state = layout_of("MQA", rule=Rule(Span.STATE))
    rank = Rank(state, Shard.whole(state), 1, 8)
    rank.memory[...] = np.arange(rank.memory.size, dtype=np.uint16).reshape(rank.memory.shape)
    kept = rank.memory.copy()
    with cache.kv(state) as store:
        keys = store.keys(range(128))
        table = rank.table(8)
        assert store.save(keys, rank.planes, table, start=6, stop=7).wait(PATIENCE_S) == [HIT]
        assert store.save(keys, rank.planes, table, start=2, stop=4).wait(PATIENCE_S) == [HIT] * 2
        assert [store.match([key]).length for key in keys] == [0, 0, 1, 1, 0, 0, 1, 0]
        rank.memory[...] = 0
        assert store.load(keys, rank.planes, table, start=6, stop=7).wait(PATIENCE_S) == [HIT]
        page = int(table.page_ids[6])
        assert np.array_equal(rank.memory[:, page], kept[:, page])
        assert not rank.memory[:, int(table.page_ids[3])].any()


# -- order, fences and ends --------------------------------------------------------------------------------------------


def test_layers_land_in_order_and_are_usable_before_the_last(tmp_path: Path) -> None:
    """The load's steps are taken by hand: after each, the layers said to be there are there."""
    layout, tokens = layout_of("MFA"), 16 * 6
    with tiercache.open(tmp_path, **SIZES) as cache:
        keys, truth = saved(cache, layout, tokens, durable=True)
    with tiercache.open(tmp_path, **SIZES) as cache, cache.kv(layout) as store:
        for tier in (2, 1):  # from the SSD, then from memory
            assert set(store.match(keys).tiers) == {tier}
            rank = Rank(layout, Shard.whole(layout), 16, 8)
            table = rank.table(tokens)
            gate = Gate(store)
            loading = store.load(keys, rank.planes, table)
            early = set()
            for awaited in loading._work.steps:
                landed = sum(loading.wait_layer(layer, 0) for layer in range(layout.layers))
                early.add(landed)
                assert np.array_equal(rank.read(table, range(tokens))[:landed], truth[:landed])
                assert not loading.done
                if isinstance(awaited, futures.Future):
                    futures.wait([awaited], PATIENCE_S)
            assert len(early) >= 3
            gate.open()
            assert loading.wait(PATIENCE_S) == [HIT] * 6
            assert loading.wait_layer(layout.layers - 1, 0)


def test_a_cancelled_load_writes_nothing(cache: BlockingCache) -> None:
    layout = layout_of("GQA")
    keys, _ = saved(cache, layout, 64)
    with cache.kv(layout) as store:
        rank = Rank(layout, Shard.whole(layout), 16, 4)
        table = rank.table(64)
        gate = Gate(store)
        cancelled, timed_out = (store.load(keys, rank.planes, table) for _ in range(2))
        stop = threading.Thread(target=lambda: (cancelled.cancel(), timed_out.wait(0)))
        stop.start()
        gate.open()
        stop.join(PATIENCE_S)
        assert cancelled.wait(PATIENCE_S).count(HIT) in (0, 4)  # who came first is not in our hands
        before = rank.memory.copy()
        assert timed_out.done
        assert np.array_equal(before, rank.memory)


def test_a_cancelled_save_frees_its_pages_and_its_ticket(cache: BlockingCache) -> None:
    layout = layout_of("GQA")
    rank = Rank(layout, Shard.whole(layout), 16, 4)
    table = rank.table(64)
    with cache.kv(layout) as store:
        keys = store.keys(range(64))
        gate = Gate(store)
        saving = store.save(keys, rank.planes, table)
        assert not saving.pages_free(0)
        assert saving.wait(0) == [Outcome.BUSY] * 4
        saving.cancel()
        assert saving.pages_free(0)
        gate.open()
        assert saving.wait(PATIENCE_S) == [Outcome.MISS] * 4
        assert store.match(keys).length == 0
        assert store.save(keys, rank.planes, table).wait(PATIENCE_S) == [HIT] * 4


def test_a_cancelled_save_asks_for_nothing_more(cache: BlockingCache) -> None:
    layout = layout_of("GQA")
    rank, hung = Rank(layout, Shard.whole(layout), 16, 4), threading.Event()
    with cache.kv(layout) as store:
        keys = store.keys(range(64))
        before = store.workers.ask(hung.wait, PATIENCE_S)
        saving = store.save(keys, rank.planes, rank.table(64))
        saving.cancel()
        assert saving.wait(PATIENCE_S) == [Outcome.MISS] * 4
        hung.set()
        assert before.result(PATIENCE_S)
        assert saving._asked is None or saving._asked[1].cancelled()
    check_nothing_leaked(cache)


AT_EXIT = """
import atexit, sys
import tiercache
from tests.kv_matrix.engine import Rank, layout_of
from tiercache.kv.shard import Shard

layout = layout_of("GQA")
rank = Rank(layout, Shard.whole(layout), 16, 4)
cache = tiercache.open(sys.argv[1], memory_bytes=1 << 24, ssd_bytes=0, share=False)
store = cache.kv(layout)

def last() -> None:
    outcomes = store.save(store.keys(range(64)), rank.planes, rank.table(64), inline=True).outcomes
    print(*[each.name for each in outcomes], flush=True)

atexit.register(last)
"""


def test_a_save_while_the_interpreter_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-c", AT_EXIT, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert done.stdout.split() == ["HIT"] * 4, done.stderr


def test_a_save_stopped_in_the_middle_leaves_no_claims(cache: BlockingCache) -> None:
    layout = layout_of("MFA")
    rank, truth = Rank(layout, Shard.whole(layout), 16, 70), truth_of(layout, 16 * 64)
    table = rank.table(16 * 64)
    rank.write(truth, table)
    with cache.kv(layout) as store:
        keys = store.keys(range(16 * 64))
        gate = Gate(store)
        saving = store.save(keys, rank.planes, table)
        next(saving._work.steps)  # joined, and a first turn gathered
        saving.cancel()
        gate.open()
        outcomes = saving.wait(PATIENCE_S)
        assert Outcome.MISS in outcomes
        again = store.save(keys, rank.planes, table)
        assert again.wait(PATIENCE_S) == [HIT] * 64
        check_load(store, keys, truth)


def test_a_store_that_is_closed_ends_everything(cache: BlockingCache) -> None:
    layout = layout_of("GQA")
    keys, _ = saved(cache, layout, 64)
    store = cache.kv(layout)
    rank = Rank(layout, Shard.whole(layout), 16, 4)
    table = rank.table(64)
    gate = Gate(store)
    loading, saving = store.load(keys, rank.planes, table), store.save(keys, rank.planes, table)
    closing = threading.Thread(target=store.close)
    closing.start()
    gate.open()
    closing.join(PATIENCE_S)
    assert loading.done
    assert saving.done
    assert saving.pages_free(0)
    store.close()
    with pytest.raises(ClosedError, match="make a new one"):
        store.save(keys, rank.planes, table)
    with pytest.raises(ClosedError, match="make a new one"):
        store.load(keys, rank.planes, table, inline=True)


def test_prefetch_brings_blocks_to_memory(tmp_path: Path) -> None:
    layout = layout_of("MFA")
    with tiercache.open(tmp_path, **SIZES) as cache:
        keys, _ = saved(cache, layout, 160, durable=True)
    with tiercache.open(tmp_path, **SIZES) as cache, cache.kv(layout) as store:
        prefetch = store.prefetch([*keys, b"y" * 16], PATIENCE_S)
        assert prefetch.wait(PATIENCE_S) == 10
        assert prefetch.done
        assert store.match(keys).tiers == b"\1" * 10
        gone = store.prefetch(keys, PATIENCE_S)
        gone.cancel()
        gone.wait(PATIENCE_S)
        assert gone.done


def test_misuse_is_told_with_the_way_out(cache: BlockingCache, tmp_path: Path) -> None:
    layout = layout_of("GQA")
    keys, _ = saved(cache, layout, 64)
    planes, table = memory_of(layout, 64)
    with cache.kv(layout) as store:
        with pytest.raises(ConfigError, match=r"blocks \[2, 9\) are not in a sequence of 4 keys"):
            store.load(keys, planes, table, start=2, stop=9)
        with pytest.raises(ConfigError, match="another layout"):
            store.save(keys, *memory_of(layout_of("MHA"), 64))
    with cache.kv(layout, Shard.of(layout, 0, 2)) as store, pytest.raises(ConfigError, match="the store was made for"):
        store.save(keys, planes, table)
    with (
        tiercache.open(tmp_path / "other", memory_bytes="16MiB", ssd_bytes=0) as other,
        other.kv(layout) as store,
        pytest.raises(ConfigError, match="ssd_bytes"),
    ):
        store.save(keys, planes, table, durable=True)


def test_several_threads_save_and_load_at_once(cache: BlockingCache) -> None:
    """Two engines of one rank each with the same prefix, and two threads of copies each."""
    layout, tokens = layout_of("MLA"), 16 * 12
    truth = truth_of(layout, tokens)
    stores = [cache.kv(layout, threads=2) for _ in range(2)]
    keys = stores[0].keys(range(tokens))
    ranks = [Rank(layout, Shard.whole(layout), 16, 14, order) for order in ORDERS[:2]]
    savings = []
    for store, rank in zip(stores, ranks, strict=True):
        table = rank.table(tokens)
        rank.write(truth, table)
        savings += [store.save(keys, rank.planes, table), store.save(keys, rank.planes, table, stop=7)]
    outcomes = [saving.wait(PATIENCE_S) for saving in savings]
    assert all(one in (HIT, Outcome.BUSY) for some in outcomes for one in some)
    assert sum(saving.moved_bytes for saving in savings) == 12 * layout.block_bytes
    for store in stores:
        check_load(store, keys, truth)
        store.close()
