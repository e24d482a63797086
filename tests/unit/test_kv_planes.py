"""Planes: what tensors say of themselves, and what is refused before a byte is moved."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.unit.kv_engine import ORDERS, Engine
from tiercache.errors import ConfigError
from tiercache.kv.layout import Layout
from tiercache.kv.planes import Plane, Planes, paged
from tiercache.kv.shard import Shard

LAYOUT = Layout("m", heads=2, layers=3, k_dim=8, v_dim=8, dtype="bfloat16")
WHOLE = Shard.whole(LAYOUT)
MEMORY = np.zeros((3, 10, 16, 2, 16), np.uint16)
WHERE = {"layers": range(3), "heads": range(2)}


class Torch:
    """A tensor as torch describes its own: strides in elements, a storage that may be larger."""

    def __init__(self, array: np.ndarray, device: str = "cpu") -> None:
        self.shape = array.shape
        self._array = array
        self.device = type("Device", (), {"type": device, "__str__": lambda self: device})()

    def data_ptr(self) -> int:
        return self._array.ctypes.data

    def element_size(self) -> int:
        return self._array.itemsize

    def stride(self) -> tuple[int, ...]:
        return tuple(stride // self._array.itemsize for stride in self._array.strides)

    def untyped_storage(self) -> Torch:
        return self

    def nbytes(self) -> int:
        return self._array.nbytes


def test_every_element_is_where_the_tensor_has_it() -> None:
    for plane in paged(MEMORY, "lpthC", **WHERE):
        for page, slot, head, dim in ((0, 0, 0, 0), (9, 15, 1, 7), (4, 3, 0, 2)):
            element = MEMORY[plane.layer, page, slot, head, plane.kv * 8 + dim :]
            address = plane.address + page * plane.page_stride + slot * plane.token_stride + head * plane.head_stride
            assert address + dim * plane.itemsize == element.ctypes.data


def test_torch_and_numpy_say_the_same() -> None:
    ours, theirs = paged(MEMORY, "lpthC", **WHERE), paged(Torch(MEMORY), "lpthC", **WHERE)
    assert [replace(plane, owner=None) for plane in ours] == [replace(plane, owner=None) for plane in theirs]
    with pytest.raises(ConfigError, match="only memory of the host"):
        paged(Torch(MEMORY, "cuda:0"), "lpthC", **WHERE)


def test_layers_a_constant_step_apart_are_one_grid() -> None:
    assert len(Planes(LAYOUT, WHOLE, paged(MEMORY, "lpthC", **WHERE)).grids) == 2
    alone = paged(np.zeros_like(MEMORY[0]), "pthC", layers=range(2, 3), heads=range(2))
    both = paged(MEMORY[:2], "lpthC", layers=range(2), heads=range(2))
    assert [grid.layers for grid in Planes(LAYOUT, WHOLE, both + alone).grids] == [range(2), range(2, 3)] * 2


def test_layers_in_several_pieces_of_memory_are_a_grid_each() -> None:
    """However far apart they lie: a view of two would span what belongs to others."""
    planes = [p for i in range(3) for p in paged(MEMORY[i], "pthC", layers=range(i, i + 1), heads=range(2))]
    assert [grid.layers for grid in Planes(LAYOUT, WHOLE, planes).grids] == [range(i, i + 1) for i in range(3)] * 2


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shard", [WHOLE, Shard.of(LAYOUT, 1, 2), Shard.of(LAYOUT, 0, 1, 1, 2)])
def test_every_order_covers_its_shard(order: str, shard: Shard) -> None:
    assert Engine(LAYOUT, shard, order=order, pages=3, page_tokens=4).planes.page_tokens == 4


def test_pages_of_one_slot_follow_each_other() -> None:
    planes = Planes(LAYOUT, WHOLE, paged(MEMORY.reshape(3, 160, 2, 16), "lphC", **WHERE))
    assert planes.linear
    assert planes.page_tokens == 1
    assert not Planes(LAYOUT, WHOLE, paged(np.zeros((3, 10, 2, 16, 16), np.uint16), "lphtC", **WHERE)).linear


def refuse(planes: list[Plane], message: str, shard: Shard = WHOLE) -> None:
    with pytest.raises(ConfigError, match=message):
        Planes(LAYOUT, shard, planes)


def test_planes_that_do_not_cover_the_shard_once_are_refused() -> None:
    planes = paged(MEMORY, "lpthC", **WHERE)
    refuse([], "no planes")
    refuse(planes[:-1], "layer 2, V: planes hold 0 of 16 dims")
    refuse([*planes, planes[0]], "layer 0, K: two planes hold the same")
    refuse([*planes[:-1], replace(planes[-1], dims=range(1, 8))], "planes hold 14 of 16")
    refuse([*planes[:-1], replace(planes[-1], heads=range(1, 3))], "this shard holds")
    refuse(planes, "this shard holds layers", Shard.of(LAYOUT, 0, 1, 0, 2))
    refuse([replace(planes[0], kv=2), *planes[1:]], "dims")
    refuse([replace(planes[0], dims=range(9)), *planes[1:]], "dims range")
    refuse([replace(planes[0], itemsize=1), *planes[1:]], "elements of 1 bytes")
    refuse([replace(planes[0], pages=9), *planes[1:]], "planes of different")
    refuse([replace(planes[0], pages=0), *planes[1:]], "0 pages")


def test_planes_never_leave_their_memory() -> None:
    planes = paged(MEMORY, "lpthC", **WHERE)
    end = planes[-1].memory[1]
    for change in ({"pages": 11}, {"address": end - 8}, {"address": planes[0].memory[0] - 2}, {"page_stride": 1 << 20}):
        refuse([*planes[:-1], replace(planes[-1], **change)], "leave")


def test_planes_whose_elements_overlap_are_refused() -> None:
    expanded = np.broadcast_to(np.zeros((3, 10, 1, 2, 16), np.uint16), MEMORY.shape)
    refuse(paged(expanded, "lpthC", **WHERE), "elements overlap")
    planes = paged(MEMORY, "lpthC", **WHERE)
    refuse([replace(planes[0], head_stride=8), *planes[1:]], "elements overlap")


@pytest.mark.parametrize(
    ("axes", "change", "message"),
    [
        ("lpth", {}, "one of d and C"),
        ("lpthCd", {}, "one of d and C"),
        ("lppthC", {}, "at most once"),
        ("lxthC", {}, "at most once"),
        ("pthC", {}, "one letter an axis"),
        ("lpthC", {"layers": range(2)}, "3 layers and 2 heads, not 2 and 2"),
        ("lpthC", {"heads": range(1)}, "not 3 and 1"),
        ("lpthC", {"kv": 1}, "without an axis"),
        ("lptkd", {"heads": range(1), "kv": 1}, "without an axis"),
        ("klthd", {"layers": range(10)}, "axis k has 3"),
        ("lpthd", {"dims": range(5)}, "16 dims, not 5"),
        ("lpCth", {"heads": range(16)}, "64 bytes from dim to dim: K and V must be given one by one"),
    ],
)
def test_axes_that_do_not_fit_are_refused(axes: str, change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        paged(MEMORY, axes, **(WHERE | change))


def test_odd_tensors_are_refused() -> None:
    with pytest.raises(ConfigError, match="str is no tensor"):
        paged("k", "d", **WHERE)
    with pytest.raises(ConfigError, match="none may be empty"):
        paged(MEMORY[:, :0], "lpthC", **WHERE)
    with pytest.raises(ConfigError, match="none may be empty or negative"):
        paged(MEMORY[:, ::-1], "lpthC", **WHERE)


def test_dims_may_lie_apart() -> None:
    """As in a page that is stored transposed: [dim][slot]."""
    turned = paged(np.zeros((5, 2, 8, 16), np.uint16), "phdt", layers=range(1), heads=range(2))[0]
    assert (turned.apart, turned.token_stride, turned.dims) == (32, 2, range(8))
    assert paged(MEMORY, "lpthd", **WHERE)[0].apart == 0
    assert paged(MEMORY[..., ::2], "lpthd", **WHERE)[0].apart == 2 * MEMORY.itemsize
    with pytest.raises(ConfigError, match="elements overlap"):
        overlapping = np.lib.stride_tricks.as_strided(np.zeros(64, np.uint16), (5, 8, 4), (2, 8, 2))
        Planes(LAYOUT, Shard.whole(LAYOUT), paged(overlapping, "pdt", layers=range(1), heads=range(1)))
