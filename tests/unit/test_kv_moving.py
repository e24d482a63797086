"""Moving KV: what any shard in any plane order gathers, any other scatters; against plain indexing."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.kv_engine import KERNELS, ORDERS, Engine, empty_blocks, layouts, moved_by, stored, table_for, values
from tiercache.buffers import part_digests
from tiercache.errors import ConfigError
from tiercache.kv.layout import STATE, Layout
from tiercache.kv.moving import digests_of, gather, gather_digested, scatter, scatter_verified
from tiercache.kv.planes import Planes, paged
from tiercache.kv.runs import Table
from tiercache.kv.shard import Shard

SHAPES = [(1, 1), (2, 1), (4, 2), (8, 1), (16, 3), (1, 2)]


@pytest.fixture(params=KERNELS, ids=lambda bits: f"{bits} bits" if bits else "NumPy", scope="module", autouse=True)
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    with moved_by(request.param):
        yield


def ranks(layout: Layout, tp: int, pp: int) -> list[Shard]:
    heads = layout.heads
    while heads % tp and tp % heads:
        tp -= 1
    shards = [Shard.of(layout, t, tp, p, pp) for p in range(pp) for t in range(tp)]
    return [shard for shard in shards if shard.layers]  # more stages than layers leave some with none


@settings(max_examples=60, deadline=None)
@given(
    layout=layouts(wide=True),
    writers=st.sampled_from(SHAPES),
    readers=st.sampled_from(SHAPES),
    orders=st.tuples(st.sampled_from(ORDERS), st.sampled_from(ORDERS)),
    sizes=st.tuples(st.sampled_from([1, 3, 16, 32]), st.sampled_from([1, 2, 16, 128])),
    runs=st.booleans(),
    skew=st.sampled_from([0, 0, 3]),
    seed=st.integers(0, 1000),
)
def test_any_shape_writes_and_any_other_reads(layout, writers, readers, orders, sizes, runs, skew, seed) -> None:
    blocks = 3
    tokens = blocks * layout.rows
    sequence = values(layout, tokens, seed)
    _, buffers = empty_blocks(layout, blocks, fill=0xEE, skew=skew)
    for number, shard in enumerate(ranks(layout, *writers)):
        pages = tokens // sizes[0] + 4
        engine = Engine(layout, shard, order=orders[0], pages=pages, page_tokens=sizes[0], seed=seed + number)
        table = table_for(tokens, sizes[0], pages, seed + number, runs=runs)
        engine.put(sequence, table)
        parts, pieces = shard.share(layout)
        found = gather_digested(engine.planes, table, range(blocks), buffers, parts=parts, pieces=pieces)
        for block, digests in enumerate(found):
            data = buffers[block]
            assert digests.row == part_digests(data, layout.part_bytes, parts)
            for (start, stop), digest in zip(pieces, digests.pieces):
                assert digest == xxhash.xxh3_64_intdigest(data.view()[start:stop])
        held = shard.held(layout)
        assert digests_of(engine.planes, table, range(blocks), parts=parts, pieces=pieces) == found
        whole = digests_of(engine.planes, table, range(blocks), parts=held[0], pieces=held[1])
        expected = [xxhash.xxh3_64_intdigest(stored(layout, sequence, 0)[start:stop]) for start, stop in held[1]]
        assert list(whole[0].pieces) == expected
    for block in range(blocks):
        assert bytes(buffers[block]) == stored(layout, sequence, block)
    rows = [part_digests(buffer, layout.part_bytes) for buffer in buffers]
    for number, shard in enumerate(ranks(layout, *readers)):
        pages = tokens // sizes[1] + 4
        engine = Engine(layout, shard, order=orders[1], pages=pages, page_tokens=sizes[1], seed=seed + 7 * number)
        table = table_for(tokens, sizes[1], pages, seed + number, runs=not runs)
        assert scatter_verified(engine.planes, table, range(blocks), buffers, rows) == [True] * blocks
        for array, whole in zip(engine.get(range(tokens), table), sequence):
            part = (slice(shard.layers.start, shard.layers.stop), slice(shard.heads.start, shard.heads.stop))
            assert np.array_equal(array[part], whole[part])


@settings(max_examples=40, deadline=None)
@given(
    layout=layouts(wide=True),
    order=st.sampled_from(ORDERS),
    size=st.sampled_from([1, 3, 16]),
    first=st.integers(0, 20),
    cut=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    seed=st.integers(0, 1000),
)
def test_a_range_of_tokens_is_all_that_is_written(layout, order, size, first, cut, seed) -> None:
    blocks = range(first // layout.rows + 1, first // layout.rows + 4)
    start, stop = blocks.start * layout.rows, blocks.stop * layout.rows
    tokens = range(min(start + min(cut), stop), min(start + max(cut), stop))
    sequence = values(layout, stop, seed)
    arrays, buffers = empty_blocks(layout, len(blocks))
    for array, block in zip(arrays, blocks):
        array[:] = np.frombuffer(stored(layout, sequence, block), np.uint8)
    shard = Shard.whole(layout)
    pages = stop // size + 5
    engine = Engine(layout, shard, order=order, pages=pages, page_tokens=size, seed=seed)
    table = table_for(stop, size, pages, seed, first)
    before = engine.get(range(start, stop), table)
    untouched = [array.copy() for array in engine.arrays]
    scatter(engine.planes, table, blocks, buffers, tokens=tokens)
    after = engine.get(range(start, stop), table)
    low, high = tokens.start - start, tokens.stop - start
    for old, new, whole in zip(before, after, sequence):
        assert np.array_equal(new[:, :, low:high], whole[:, :, tokens.start : tokens.stop])
        assert np.array_equal(new[:, :, :low], old[:, :, :low])
        assert np.array_equal(new[:, :, high:], old[:, :, high:])
    changed = sum(int((new != old).sum()) for new, old in zip(engine.arrays, untouched))
    written = sum(int((new != old).sum()) for new, old in zip(after, before))
    assert changed == written  # nothing outside the table's rows


def small(**kwargs) -> Layout:
    return Layout(**{"model": "m", "heads": 2, "layers": 4, "k_dim": 8, "v_dim": 8, "dtype": "bfloat16"} | kwargs)


def engine_with(layout: Layout, shard: Shard | None = None, size: int = 16, blocks: int = 4, order: str = "lpthC"):
    engine = Engine(layout, shard or Shard.whole(layout), order=order, pages=64, page_tokens=size)
    table = table_for(blocks * layout.rows, size, 64, 1)
    sequence = values(layout, blocks * layout.rows, 5)
    engine.put(sequence, table)
    return engine, table, sequence


@pytest.mark.parametrize("dtype", ["uint8", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize(("rows", "size"), [(16, 16), (32, 16), (16, 128), (5, 16), (12, 3)])
@pytest.mark.parametrize("order", ["lphkdt", "phlkdt"])
def test_pages_that_are_kept_transposed(dtype: str, rows: int, size: int, order: str) -> None:
    layout = small(k_dim=64, v_dim=64, dtype=dtype, block_tokens=rows)
    engine, table, sequence = engine_with(layout, size=size, order=order)
    _, buffers = empty_blocks(layout, 4)
    found = gather_digested(engine.planes, table, range(4), buffers)
    assert [bytes(each) for each in buffers] == [stored(layout, sequence, block) for block in range(4)]
    assert [each.row for each in found] == [part_digests(each, layout.part_bytes) for each in buffers]
    other = Engine(layout, Shard.whole(layout), order=order, pages=64, page_tokens=size, seed=9)
    rows_of = [each.row for each in found]
    assert scatter_verified(other.planes, table, range(4), buffers, rows_of) == [True] * 4
    for array, whole in zip(other.get(range(4 * rows), table), sequence):
        assert np.array_equal(array, whole)


def test_a_wrong_byte_is_found_in_its_block_alone() -> None:
    layout = small(layers=3, heads=3)
    engine, table, _ = engine_with(layout)
    arrays, buffers = empty_blocks(layout, 4)
    rows = [each.row for each in gather_digested(engine.planes, table, range(4), buffers)]
    for at in (0, layout.part_bytes, layout.block_bytes - 1):
        arrays[2][at] ^= 1
        assert scatter_verified(engine.planes, table, range(4), buffers, rows) == [True, True, False, True]
        arrays[2][at] ^= 1
    part = layout.part_of(0, 1)
    arrays[2][0] ^= 1  # in part 0, which nobody asks for here
    assert scatter_verified(engine.planes, table, range(4), buffers, rows, parts=1 << part) == [True] * 4


def test_each_block_may_have_its_own_parts() -> None:
    layout = small()
    engine, table, sequence = engine_with(layout)
    arrays, buffers = empty_blocks(layout, 4)
    maps = [0b01, 0b10, 0b11, 0]
    found = gather_digested(engine.planes, table, range(4), buffers, parts=maps)
    for block, parts in enumerate(maps):
        whole = np.frombuffer(stored(layout, sequence, block), np.uint8)
        for part in range(layout.parts):
            start, stop = layout.part_span(part)
            assert np.array_equal(arrays[block][start:stop], whole[start:stop] * (parts >> part & 1))
        assert found[block].row == part_digests(buffers[block], layout.part_bytes, parts)
    other = Engine(layout, Shard.whole(layout), order="lpthC", pages=64, page_tokens=16)
    scatter(other.planes, table, range(4), buffers, parts=maps)
    read = other.get(range(4 * 16), table)
    assert np.array_equal(read[0][:, 0, :16], sequence[0][:, 0, :16])
    assert not np.array_equal(read[0][:, 1, :16], sequence[0][:, 1, :16])


def test_blocks_may_come_in_any_order() -> None:
    layout = small()
    engine, table, sequence = engine_with(layout)
    _, buffers = empty_blocks(layout, 3)
    gather(engine.planes, table, [3, 0, 2], buffers)
    assert [bytes(each) for each in buffers] == [stored(layout, sequence, block) for block in (3, 0, 2)]
    gather(engine.planes, table, [], [])
    assert gather_digested(engine.planes, table, [], []) == []


def test_tiles_of_large_blocks_are_the_same_bytes() -> None:
    layout = small(heads=8, layers=32, k_dim=128, v_dim=128)
    engine, table, sequence = engine_with(layout, blocks=2)
    _, buffers = empty_blocks(layout, 2)
    gather(engine.planes, table, range(2), buffers)
    assert [bytes(each) for each in buffers] == [stored(layout, sequence, block) for block in range(2)]
    one = Engine(layout, Shard.of(layout, 5, 8, 1, 2), order="lphtC", pages=8, page_tokens=32)
    table = table_for(32, 32, 8, 3)
    scatter(one.planes, table, range(2), buffers)
    read = one.get(range(32), table)
    assert np.array_equal(read[1][16:, 5], sequence[1][16:, 5])


@pytest.mark.parametrize("kwargs", [{"rule": STATE}, {"order": "opaque", "tag": "engine 1"}], ids=["state", "opaque"])
def test_states_and_opaque_pages_are_one_row_a_block(kwargs) -> None:
    layout = small(heads=1, k_dim=300, v_dim=0, dtype="uint8", **kwargs)
    memory = np.random.default_rng(0).integers(0, 256, (4, 9, 300), np.uint8)
    planes = Planes(layout, Shard.whole(layout), paged(memory, "lpd", layers=range(4), heads=range(1)))
    _, buffers = empty_blocks(layout, 2)
    table = Table(np.array([7, 2]), 1)
    gather(planes, table, [0, 1], buffers)
    assert bytes(buffers[0]) == memory[:, 7].tobytes()
    scatter(planes, Table(np.array([0, 1]), 1), [0, 1], buffers)
    assert np.array_equal(memory[:, 1], memory[:, 2])
    with pytest.raises(ConfigError, match="one row"):
        Planes(
            layout,
            Shard.whole(layout),
            paged(memory[:, :8].reshape(4, 4, 2, 300), "lptd", layers=range(4), heads=range(1)),
        )


def test_bad_input_says_what_to_do() -> None:
    layout = small()
    engine, table, _ = engine_with(layout)
    planes = engine.planes
    _, buffers = empty_blocks(layout, 4)
    with pytest.raises(ConfigError, match="leave the table's tokens"):
        gather(planes, table, [4], buffers[:1])
    with pytest.raises(ConfigError, match="leave the table's tokens"):
        gather(planes, Table(table.page_ids, 16, 8), [0], buffers[:1])
    with pytest.raises(ConfigError, match="pass one for each"):
        gather(planes, table, [0, 1], buffers[:1])
    with pytest.raises(ConfigError, match="stored blocks of this layout have"):
        gather(planes, table, [0], [buffers[0].slice(0, 64)])
    with pytest.raises(ConfigError, match="page ids 0 to 64"):
        gather(planes, Table(np.array([0, 64]), 16), [0, 1], buffers[:2])
    with pytest.raises(ConfigError, match="page ids -1"):
        scatter(planes, Table(np.array([-1]), 16), [0], buffers[:1], tokens=range(4))
    with pytest.raises(ConfigError, match="a page, where the planes have 16"):
        gather(planes, Table(np.array([0]), 32), [0], buffers[:1])
    with pytest.raises(ConfigError, match="hold as a whole"):
        gather(planes, table, [0], buffers[:1], parts=1 << layout.parts)
    with pytest.raises(ConfigError, match="part maps"):
        gather(planes, table, [0, 1], buffers[:2], parts=[1])
    for piece in [(1, 5), (0, layout.block_bytes), (0, 0), (-64, 64), (layout.block_bytes, layout.block_bytes + 9)]:
        with pytest.raises(ConfigError, match="no piece"):
            gather(planes, table, [0], buffers[:1], parts=0, pieces=[piece])
    half = Engine(layout, Shard.of(layout, 0, 2), order="lpthC", pages=64, page_tokens=16)
    with pytest.raises(ConfigError, match="hold as a whole"):
        gather(half.planes, table, [0], buffers[:1], parts=layout.all_parts)
    with pytest.raises(ConfigError, match="rows of digests"):
        scatter_verified(planes, table, [0], buffers[:1], [])
    with pytest.raises(ConfigError, match="row of ids"):
        Table(np.zeros((2, 2), np.int64), 16)
    frozen = np.zeros((4, 64, 16, 2, 16), np.uint16)
    frozen.flags.writeable = False
    fixed = Planes(layout, Shard.whole(layout), paged(frozen, "lpthC", layers=range(4), heads=range(2)))
    gather(fixed, table, [0], buffers[:1])
    with pytest.raises(ConfigError, match="read-only"):
        scatter(fixed, table, [0], buffers[:1])


def test_threads_digest_side_by_side() -> None:
    layout = small(heads=4, layers=8, k_dim=128, v_dim=128)
    engine, table, _ = engine_with(layout)
    expected = digests_of(engine.planes, table, range(4))
    found: list[object] = []

    def work() -> None:
        for _ in range(20):
            found.append(digests_of(engine.planes, table, range(4)))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert found == [expected] * 80


def test_plans_are_remembered_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = small(heads=8)
    engine, table, _ = engine_with(layout)
    _, buffers = empty_blocks(layout, 1)
    for parts in range(1, 256):
        gather(engine.planes, table, [0], buffers, parts=parts)
        digests_of(engine.planes, table, [0], parts=parts)
        assert 0 < len(engine.planes.plans) <= 256
