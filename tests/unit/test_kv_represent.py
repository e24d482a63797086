"""Other representations of blocks: what they lose, what they free, and that they never meet exact blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiercache
from tiercache.errors import ConfigError
from tiercache.kv import float8, represent
from tiercache.kv.chain import tokens_keys
from tiercache.kv.layout import Attention, Layout
from tiercache.kv.represent import Form, Fp8, Packed, Represented, sizes
from tiercache.model import Kind, Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tiercache.sync import BlockingCache

OPTIONS = {"memory_bytes": "32MiB", "ssd_bytes": "128MiB", "segment_bytes": "16MiB"}
GQA = Layout("llama", heads=4, layers=6, k_dim=64, v_dim=64, dtype="bfloat16")
MLA = Layout("deepseek", heads=1, layers=3, k_dim=72, v_dim=0, dtype="float16", attention=Attention.MLA)
UNEVEN = Layout("odd", heads=2, layers=3, k_dim=24, v_dim=16, dtype="float32")
LAYOUTS = [GQA, MLA, UNEVEN, replace(GQA, dtype="float16"), replace(GQA, dtype="float32")]
FLOATS = [pytest.param(layout, id=f"{layout.model}-{layout.dtype}") for layout in LAYOUTS]
TOKENS = list(range(100, 100 + 16 * 8))


def kv_block(layout: Layout, seed: int = 0) -> np.ndarray:
    """A block like a model's: normal values, each layer and head with a size of its own, some channels far larger."""
    draw = np.random.default_rng(seed)
    values = np.empty(layout.block_bytes // layout.itemsize, np.float32)
    for layer in range(layout.layers):
        for head in range(layout.heads):
            for kv, dims in enumerate((layout.k_dim, layout.v_dim)):
                offset, count = (each // layout.itemsize for each in layout.span(layer, head, kv))
                rows = draw.standard_normal((count // max(1, dims), dims)) * 2.0 ** draw.integers(-6, 4)
                rows[:, : dims // 16] *= 20
                values[offset : offset + count] = rows.ravel()
    return float8.from_float32(values, layout.dtype).view(np.uint8)


def values_of(block: np.ndarray, layout: Layout) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return float8.as_float32(block.view(float8.SOURCES[layout.dtype]), layout.dtype).astype(np.float64)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[BlockingCache]:
    with tiercache.open(tmp_path, **OPTIONS) as opened:
        yield opened


# -- float8 ------------------------------------------------------------------------------------------------------------


def nearest(value: float) -> set[int]:
    """Codes that rounding to nearest even may give, by looking at all of them."""
    codes = np.arange(0x7F)
    apart = np.abs(float8.e4m3_values()[: len(codes)].astype(np.float64) - abs(value))
    best = codes[apart == apart.min()]
    if len(best) == 2:
        best = best[best % 2 == 0]
    return {int(best[0]) | (0x80 if np.signbit(value) else 0)}


@given(st.floats(-500, 500, width=32) | st.floats(-0.125, 0.125, width=32))
def test_rounding_is_to_the_nearest_even(value: float) -> None:
    assert int(float8.to_e4m3(np.array([value], np.float32))[0]) in nearest(value)


def test_every_middle_between_two_codes_goes_to_the_even_one() -> None:
    values = float8.e4m3_values()[:0x7F]
    middles = ((values[:-1] + values[1:]) / 2).astype(np.float32)
    assert [int(code) for code in float8.to_e4m3(middles)] == [i + (i & 1) for i in range(len(middles))]


def test_every_code_comes_back_from_its_value() -> None:
    codes = np.array([code for code in range(256) if code & 0x7F != float8.NAN], np.uint8)
    assert np.array_equal(float8.to_e4m3(float8.e4m3_values()[codes]), codes)


def test_what_is_too_large_saturates_and_nan_stays() -> None:
    strange = np.array([449, 1e30, np.inf, -np.inf, np.nan, 0.0, -0.0], np.float32)
    assert [int(code) for code in float8.to_e4m3(strange)] == [0x7E, 0x7E, 0x7E, 0xFE, 0x7F, 0, 0x80]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("power", [-20, -3, 0, 5])
def test_tables_say_what_the_conversion_says(dtype: str, power: int) -> None:
    raw = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    with np.errstate(all="ignore"):
        values = float8.as_float32(raw, dtype).astype(np.float64)
        scaled = (values / 2.0**power).astype(np.float32)
    assert np.array_equal(float8.encode_table(dtype, power), float8.to_e4m3(scaled))
    real = ~np.isnan(values)
    assert np.array_equal(float8.from_float32(values.astype(np.float32), dtype)[real], raw[real])


@pytest.mark.parametrize("layout", FLOATS)
def test_fp8_errs_by_a_sixteenth_at_most_and_says_by_how_much(layout: Layout) -> None:
    form, block = Fp8(layout), kv_block(layout)
    value = form.encode(block)
    out = np.zeros_like(block)
    assert form.decode(np.frombuffer(value, np.uint8), out)
    before, after = values_of(block, layout), values_of(out, layout)
    loss = form.loss(block, value)
    assert loss.max_abs == np.abs(before - after).max()
    assert loss.relative_rms == pytest.approx(np.sqrt(((before - after) ** 2).mean() / (before**2).mean()))
    assert 0 < loss.relative_rms < 0.04
    # Half a place of three bits of mantissa, or half of the smallest step of that layer, head, and K or V.
    for layer in range(layout.layers):
        for head in range(layout.heads):
            for kv in range(2 if layout.v_dim else 1):
                offset, count = (each // layout.itemsize for each in layout.span(layer, head, kv))
                one, other = before[offset : offset + count], after[offset : offset + count]
                step = np.abs(one).max() / 224 * 2**-10
                assert (np.abs(one - other) <= np.maximum(np.abs(one) / 16, step)).all()


def test_fp8_is_half_of_16_bits_and_a_quarter_of_32() -> None:
    for layout, times in ((GQA, 2), (MLA, 2), (UNEVEN, 4)):
        original, stored = sizes(Fp8(layout).encode(kv_block(layout)))
        assert original == layout.block_bytes
        scales = 2 * layout.layers * layout.heads * 2
        assert stored <= original / times + scales + 64


def test_fp8_of_strange_values() -> None:
    """Zeros, infinities, NaN, the smallest of all: what can be kept is, and nothing else suffers."""
    for dtype, infinity in (("bfloat16", 0x7F80), ("float16", 0x7C00), ("float32", 0x7F800000)):
        layout = replace(GQA, dtype=dtype)
        block = kv_block(layout)
        raw = block.view(float8.SOURCES[dtype])
        unit = layout.rows * layout.k_dim
        raw[:unit] = 0
        raw[unit] = infinity
        raw[unit + 1] = infinity | 1
        raw[2 * unit] = 1  # the smallest of all
        form, out = Fp8(layout), np.empty_like(block)
        assert form.decode(np.frombuffer(form.encode(block), np.uint8), out)
        before, after = values_of(block, layout), values_of(out, layout)
        assert not after[:unit].any()
        finite = np.isfinite(before[unit : 2 * unit])
        most = np.abs(before[unit : 2 * unit][finite]).max()
        assert most <= after[unit] <= 2 * most
        assert np.isnan(after[unit + 1])
        assert np.isfinite(after[unit + 2 :]).all()


# -- lossless ----------------------------------------------------------------------------------------------------------

METHODS = ["zlib", *(["zstd"] if represent.has_zstd() else [])]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", [*FLOATS, replace(GQA, dtype="float8_e4m3fn"), replace(GQA, dtype="uint8")])
def test_packed_blocks_come_back_bit_for_bit(layout: Layout, method: str) -> None:
    form = Packed(layout, method)
    draw = np.random.default_rng(0)
    noise = draw.integers(0, 256, layout.block_bytes, np.uint8)
    like_kv = kv_block(layout) if layout.dtype in float8.SOURCES else noise // 16
    for block in (noise, like_kv, np.zeros_like(noise)):
        value = form.encode(block)
        out = np.ones_like(block)
        assert form.decode(np.frombuffer(value, np.uint8), out)
        assert np.array_equal(out, block)
        assert sizes(value) == (layout.block_bytes, len(value))
        assert len(value) <= layout.block_bytes + 128


@pytest.mark.parametrize("method", METHODS)
def test_packing_frees_a_quarter_of_16_bit_values(method: str) -> None:
    """Of values as normal as those of random weights; real ones differ by model, layer and channel."""
    original, stored = sizes(Packed(GQA, method).encode(kv_block(GQA)))
    assert stored < 0.8 * original


def test_noise_is_kept_as_it_is() -> None:
    noise = np.random.default_rng(0).integers(0, 256, GQA.block_bytes, np.uint8)
    value = np.frombuffer(Packed(GQA, "zlib").encode(noise), np.uint8)
    assert (
        value[-GQA.block_bytes // 2 :].tobytes()
        == noise.view("<u2").__lshift__(1).__or__(noise.view("<u2") >> 15).view(np.uint8).reshape(-1, 2)[:, 1].tobytes()
    )


FORMS: list[Callable[[Layout], Form]] = [Fp8, *(lambda layout, m=m: Packed(layout, m) for m in METHODS)]


@pytest.mark.parametrize("make", FORMS)
@given(data=st.data())
def test_a_damaged_value_is_never_taken(make: Callable[[Layout], Form], data: st.DataObject) -> None:
    """Any flipped bit, any cut and any other block's header: False, or the right bytes; never a crash."""
    layout = replace(MLA, layers=1, layer_ids=())
    form, block = make(layout), kv_block(layout)
    value = np.frombuffer(form.encode(block), np.uint8).copy()
    whole, out = np.empty_like(block), np.empty_like(block)
    assert form.decode(value, whole)
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(value) - 1) | st.integers(0, 60))
        value[at] ^= data.draw(st.integers(1, 255))
    else:
        value = value[: data.draw(st.integers(0, len(value) - 1))]
    assert not form.decode(value, out) or np.array_equal(out, whole)


# -- in a cache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", FORMS)
def test_blocks_go_through_a_cache_and_a_new_opening(tmp_path: Path, make: Callable[[Layout], Form]) -> None:
    keys = tokens_keys(GQA, TOKENS)
    blocks = [kv_block(GQA, i) for i in range(len(keys))]
    form = make(GQA)
    with tiercache.open(tmp_path, **OPTIONS) as cache:
        store = Represented(cache.core, cache.loop, form)
        assert store.put(keys[:5], blocks[:5], cost_s=0.1) == [Outcome.HIT] * 5
        assert store.put(keys[5:], blocks[5:], parent=keys[4]) == [Outcome.HIT] * 3
        assert store.match(keys) == 8
        assert store.original_bytes == 8 * GQA.block_bytes
        assert store.stored_bytes < 0.85 * store.original_bytes
        assert (store.loss.relative_rms > 0) == isinstance(form, Fp8)
        cache.flush()
    with tiercache.open(tmp_path, **OPTIONS) as cache:
        targets = [np.zeros(GQA.block_bytes, np.uint8) for _ in range(9)]
        store = Represented(cache.core, cache.loop, form)
        more = tokens_keys(GQA, [*TOKENS, *range(16)])
        assert store.get_into(more, targets) == [Outcome.HIT] * 8 + [Outcome.MISS]
        for block, target in zip(blocks, targets):
            again = np.zeros_like(block)
            assert form.decode(np.frombuffer(form.encode(block), np.uint8), again)
            assert np.array_equal(target, again)
            assert np.array_equal(target, block) or isinstance(form, Fp8)


@pytest.mark.slow
def test_they_go_through_the_owner_of_a_shared_directory(tmp_path: Path) -> None:
    keys = tokens_keys(GQA, TOKENS)
    blocks = [kv_block(GQA, i) for i in range(len(keys))]
    with tiercache.open(tmp_path, **OPTIONS | {"share": True}) as cache:
        for form in (Fp8(GQA), Packed(GQA)):
            store = Represented(cache.core, cache.loop, form)
            assert store.put(keys, blocks, durable=True) == [Outcome.HIT] * 8
            assert store.match(keys) == 8
            targets = [np.zeros(GQA.block_bytes, np.uint8) for _ in keys]
            assert store.get_into(keys, targets) == [Outcome.HIT] * 8
        assert all(np.array_equal(block, target) for block, target in zip(blocks, targets))


def test_damage_in_memory_is_found_and_the_ssd_has_the_rest(cache: BlockingCache) -> None:
    keys, block = tokens_keys(GQA, TOKENS)[:1], kv_block(GQA)
    store = Represented(cache.core, cache.loop, Packed(GQA, "zlib"))
    store.put(keys, [block])
    cache.flush()
    with cache.match(store.keys(keys)) as lease:
        lease.buffer(0).array()[2000] ^= 1
    out = np.zeros_like(block)
    assert store.get_into(keys, [out]) == [Outcome.CORRUPT]
    assert store.get_into(keys, [out]) == [Outcome.HIT]
    assert np.array_equal(out, block)


def test_representations_loras_and_exact_blocks_never_meet(cache: BlockingCache) -> None:
    """The same tokens, eight times: what one stores, nobody else finds."""
    worlds = {
        "exact": GQA, "fp8": Fp8(GQA).layout, "packed": Packed(GQA, "zlib").layout, "lora": replace(GQA, lora="sql"),
        "other lora": replace(GQA, lora="poem"), "lora, fp8": Fp8(replace(GQA, lora="sql")).layout,
        "salt": replace(GQA, salt="tenant"), "fp8 of fp16": Fp8(replace(GQA, dtype="float16")).layout,
    }  # fmt: skip
    assert len({layout.namespace for layout in worlds.values()}) == len(worlds)
    keys = {name: tokens_keys(layout, TOKENS) for name, layout in worlds.items()}
    for name in worlds:
        for other in worlds:
            if other != name:
                with cache.match(keys[other]) as lease:
                    stored_before = len(lease)
                assert stored_before in (0, 8)
        assert cache.put_chain(keys[name], [name.encode()] * 8, kind=Kind.KV) == [Outcome.HIT] * 8
        with cache.match(keys[name]) as lease:
            assert {bytes(lease.view(i)) for i in range(8)} == {name.encode()}
    assert Represented(cache.core, cache.loop, Fp8(GQA)).match(keys["exact"]) == 0


def test_misuse_is_told_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match="not of uint8"):
        Fp8(replace(GQA, dtype="uint8"))
    with pytest.raises(ConfigError, match="opaque"):
        Fp8(replace(GQA, order="opaque", tag="vllm"))
    with pytest.raises(ConfigError, match="zlib or zstd"):
        Packed(GQA, "brotli")
    with pytest.raises(ConfigError, match="contiguous uint8"):
        Packed(GQA).encode(np.zeros(10, np.uint8))
    with pytest.raises(ConfigError, match="no encoded block"):
        sizes(b"something else entirely" * 10)
