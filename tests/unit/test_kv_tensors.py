"""Encoder outputs: one encoding serves every consumer, and anything that changes the output is another entry."""

from __future__ import annotations

import asyncio
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import pytest

import tiercache
from tiercache import keys
from tiercache.errors import ConfigError
from tiercache.kv.tensors import DTYPES, HEADER_BYTES, Tensor, Tensors, decode_header, encode, tensor_key
from tiercache.model import Kind, Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tiercache.sync import BlockingCache

OPTIONS = {"memory_bytes": "32MiB", "ssd_bytes": "128MiB", "segment_bytes": "16MiB"}
RESIZE = {"size": [448, 448], "mean": [0.48, 0.46, 0.41], "tiles": 13}
KEY = tensor_key(b"picture", "InternViT-6B", "rev-1", RESIZE)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[BlockingCache]:
    with tiercache.open(tmp_path, **OPTIONS) as opened:
        yield opened


def picture(seed: int = 0, shape: tuple[int, ...] = (13, 256, 128)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << 16, shape, np.uint16)


def test_five_consumers_cost_one_put_and_four_hits(cache: BlockingCache) -> None:
    tensors, encoded = Tensors(cache.core, cache.loop), 0
    for _ in range(5):
        (found,) = tensors.get([KEY])
        if not isinstance(found, Tensor):
            assert found is Outcome.MISS
            encoded += 1
            found = Tensor(picture(), "bfloat16")
            assert tensors.put([KEY], [found.array], [found.dtype], cost_s=0.3) == [Outcome.HIT]
        assert found.dtype == "bfloat16"
        assert found.array.dtype == np.uint16
        assert np.array_equal(found.array, picture())
    assert encoded == 1


def test_whatever_changes_the_output_is_another_entry(cache: BlockingCache) -> None:
    tensors = Tensors(cache.core, cache.loop)
    others = [
        tensor_key(b"picture", "InternViT-6B", "rev-2", RESIZE),
        tensor_key(b"picture", "InternViT-300M", "rev-1", RESIZE),
        tensor_key(b"another", "InternViT-6B", "rev-1", RESIZE),
        tensor_key(b"picture", "InternViT-6B", "rev-1", RESIZE | {"tiles": 12}),
        tensor_key(b"picture", "InternViT-6B", "rev-1", {}),
    ]
    assert all(one != other for one, other in combinations([KEY, *others], 2))
    tensors.put([KEY], [picture()], ["bfloat16"])
    assert tensors.get(others) == [Outcome.MISS] * len(others)


def test_the_order_of_preprocessing_is_none_of_the_key() -> None:
    assert tensor_key(b"picture", "InternViT-6B", "rev-1", dict(reversed(RESIZE.items()))) == KEY
    assert tensor_key("picture", "InternViT-6B", "rev-1", RESIZE) == KEY


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_and_shape_come_back(cache: BlockingCache, dtype: str) -> None:
    shapes = [(), (0,), (7,), (3, 0, 2), (2, 3, 5), (1, 2, 3, 1, 2, 2)]
    arrays = [np.random.default_rng(1).integers(0, 2, shape).astype(DTYPES[dtype]) for shape in shapes]
    tensors = Tensors(cache.core, cache.loop)
    wanted = [tensor_key(b"x", dtype, str(shape), {}) for shape in shapes]
    assert tensors.put(wanted, arrays, [dtype] * len(shapes)) == [Outcome.HIT] * len(shapes)
    for found, array in zip(tensors.get(wanted), arrays, strict=True):
        assert isinstance(found, Tensor)
        assert (found.dtype, found.array.shape, found.array.dtype.str) == (dtype, array.shape, DTYPES[dtype])
        assert np.array_equal(found.array, array)


def test_arrays_need_not_be_contiguous(cache: BlockingCache) -> None:
    array = picture().transpose(2, 0, 1)[::2]
    tensors = Tensors(cache.core, cache.loop)
    tensors.put([KEY], [array], ["bfloat16"])
    (found,) = tensors.get([KEY])
    assert isinstance(found, Tensor)
    assert np.array_equal(found.array, array)


@pytest.mark.slow
def test_they_live_on_the_ssd_after_a_new_opening(tmp_path: Path) -> None:
    wanted = [tensor_key(bytes([i]) * 8, "e", "r", {}) for i in range(8)]
    with tiercache.open(tmp_path, **OPTIONS) as cache:
        tensors = Tensors(cache.core, cache.loop)
        assert tensors.put(wanted, [picture(i) for i in range(8)], ["bfloat16"] * 8) == [Outcome.HIT] * 8
        assert cache.flush()
    with tiercache.open(tmp_path, **OPTIONS) as cache:
        found = Tensors(cache.core, cache.loop).get([*wanted, KEY])
        assert found[-1] is Outcome.MISS
        for i, each in enumerate(found[:-1]):
            assert isinstance(each, Tensor)
            assert np.array_equal(each.array, picture(i))


@pytest.mark.slow
def test_two_processes_share_them(tmp_path: Path) -> None:
    """Through the owner of a shared directory."""
    with tiercache.open(tmp_path, share=True, **OPTIONS) as cache:
        tensors = Tensors(cache.core, cache.loop)
        assert tensors.put([KEY], [picture()], ["bfloat16"]) == [Outcome.HIT]
        (found,) = tensors.get([KEY])
        assert isinstance(found, Tensor)
        assert np.array_equal(found.array, picture())


def test_another_value_under_such_a_key_is_no_tensor(cache: BlockingCache) -> None:
    cache.put([KEY], [b"short"], kind=Kind.TENSOR)
    other = keys.object_key("things", "long")
    cache.put([other], [b"x" * 1000])
    assert [Tensors(cache.core, cache.loop).get([key])[0] for key in (KEY, other)] == [Outcome.MISS] * 2


def test_a_flipped_bit_is_found_and_what_the_ssd_has_is_given(cache: BlockingCache) -> None:
    tensors = Tensors(cache.core, cache.loop)
    tensors.put([KEY], [picture()], ["bfloat16"])
    cache.flush()
    for place in (3, HEADER_BYTES + 400_000):
        with cache.lease([KEY]) as lease:
            lease.buffer(0).array()[place] ^= 4
        (found,) = tensors.get([KEY])
        assert isinstance(found, Tensor)
        assert np.array_equal(found.array, picture())
    corrupt = [value for name, value in cache.stats().items() if "corrupt" in name]
    assert sum(corrupt) >= 2


def test_a_call_on_the_io_loop_is_refused_rather_than_waiting_for_itself(cache: BlockingCache) -> None:
    async def ask() -> None:
        Tensors(cache.core, cache.loop).get([KEY])

    with pytest.raises(ConfigError, match="another thread"):
        asyncio.run_coroutine_threadsafe(ask(), cache.loop).result(60)


def test_no_time_is_told_as_busy(cache: BlockingCache) -> None:
    assert Tensors(cache.core, cache.loop).get([KEY], timeout_s=-1)[0] in (Outcome.BUSY, Outcome.MISS)


def test_headers_are_checked() -> None:
    value = encode(picture(), "bfloat16")
    assert decode_header(value[:HEADER_BYTES], len(value)) == ("bfloat16", (13, 256, 128))
    assert decode_header(value[:HEADER_BYTES], len(value) - 1) is None
    assert decode_header(b"????" + value[4:HEADER_BYTES], len(value)) is None
    assert decode_header(value[:10], len(value)) is None


def test_misuse_is_told_with_the_way_out(cache: BlockingCache) -> None:
    tensors = Tensors(cache.core, cache.loop)
    with pytest.raises(ConfigError, match="revision"):
        tensor_key(b"x", "e", "", {})
    with pytest.raises(ConfigError, match="content_hash"):
        tensor_key(b"", "e", "r", {})
    for strange in ({"size": np.float32(1)}, {"mean": float("nan")}):
        with pytest.raises(ConfigError, match="JSON"):
            tensor_key(b"x", "e", "r", strange)
    with pytest.raises(ConfigError, match="complex64"):
        tensors.put([KEY], [np.zeros(3, np.complex64)])
    with pytest.raises(ConfigError, match="bfloat16"):
        tensors.put([KEY], [np.zeros(3, np.float32)], ["bfloat16"])
    with pytest.raises(ConfigError, match="axes"):
        tensors.put([KEY], [np.zeros((1,) * 7, np.float32)])
    with pytest.raises(ConfigError, match="little-endian"):
        tensors.put([KEY], [np.zeros(3, ">f4")])
    with pytest.raises(ConfigError, match="1 keys and 0 arrays"):
        tensors.put([KEY], [])
