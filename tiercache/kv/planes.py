"""Planes: where the elements of a shard lie in an engine's own memory, by address and strides, never by assumption."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations
from math import gcd
from typing import TYPE_CHECKING, Any, NamedTuple

from tiercache.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tiercache.kv.layout import Layout
    from tiercache.kv.shard import Shard

_PLANS_MAX = 256


@dataclass(frozen=True, slots=True)
class Plane:
    """K or V of one layer, some heads, some dims: element (page p, slot t, head h, dim d) lies at
    `address + p * page_stride + t * token_stride + (h - heads.start) * head_stride + (d - dims.start) * dim_stride`."""

    layer: int
    kv: int
    """0: K, 1: V."""
    dims: range
    heads: range
    address: int
    page_stride: int
    token_stride: int
    head_stride: int
    pages: int
    page_tokens: int
    itemsize: int
    memory: tuple[int, int]
    """Addresses [start, stop) that belong to the owner."""
    owner: object
    """Keeps the memory alive."""
    writable: bool = True
    apart: int = 0
    """Bytes from dim to dim where other elements lie between them, as where a page is stored transposed; 0: none do."""

    @property
    def dim_stride(self) -> int:
        """Bytes from dim to dim."""
        return self.apart or self.itemsize

    @property
    def unit_bytes(self) -> int:
        """Bytes of what lies together: all dims of a row, or one of them."""
        return self.itemsize if self.apart else len(self.dims) * self.itemsize

    @property
    def axes(self) -> list[tuple[int, int]]:
        """(stride, count) of pages, slots, heads, and dims that lie apart, those of length one left out."""
        counts = (self.pages, self.page_tokens, len(self.heads), len(self.dims) if self.apart else 1)
        strides = (self.page_stride, self.token_stride, self.head_stride, self.apart)
        return [(stride, count) for stride, count in zip(strides, counts) if count > 1]

    @property
    def reach(self) -> int:
        """Bytes from the first element to the end of the last."""
        return sum(stride * (count - 1) for stride, count in self.axes) + self.unit_bytes


class Grid(NamedTuple):
    """Planes with a constant step from layer to layer, as one strided array. K and V stay apart: a copy whose innermost
    axis is the two of them takes twice the time of two copies along the tokens."""

    layers: range
    heads: range
    kv: int
    dims: range
    address: int
    layer_step: int
    head_stride: int
    token_stride: int
    page_stride: int
    apart: int = 0
    """As Plane.apart."""


class Step(NamedTuple):
    """How far rows are apart: a unit in bytes, and units from page to page and from slot to slot."""

    unit: int
    page: int
    slot: int


class Planes:
    """Planes that cover a shard of a layout exactly once, within their memory. Raises ConfigError where they do not.

    `pages` and `page_tokens` are the same for all of them (one page table); `grids` are the planes as few arrays.
    """

    def __init__(self, layout: Layout, shard: Shard, planes: Sequence[Plane]) -> None:
        self.layout = layout
        self.shard = shard
        self.planes = tuple(planes)
        if not self.planes:
            raise ConfigError("no planes: pass those of every layer, see paged()")
        for plane in self.planes:
            _check_plane(plane, layout, shard)
        shapes = {(plane.pages, plane.page_tokens) for plane in self.planes}
        if len(shapes) > 1:
            raise ConfigError(f"planes of different (pages, tokens a page) {sorted(shapes)}: make one Planes for each")
        ((self.pages, self.page_tokens),) = shapes
        if layout.one_row and self.page_tokens != 1:
            raise ConfigError(f"pages of {self.page_tokens} slots, but a block is one row: axes 'pd', a slot a page")
        _check_coverage(self.planes, layout, shard)
        self.writable = all(plane.writable for plane in self.planes)
        self.grids = tuple(_grids(self.planes))
        strides = [(grid.page_stride, grid.token_stride) for grid in self.grids]
        ways = sorted(set(strides))
        self.kinds = tuple(ways.index(each) for each in strides)
        """Which of `steps` belongs to each grid."""
        self.steps = tuple(_step(*each) for each in ways)
        """Row (page, slot) is at position page * page step + slot * slot step, in units of so many bytes."""
        self.linear = all(grid.page_stride == self.page_tokens * grid.token_stride for grid in self.grids)
        """Whether the slots of page p + 1 follow those of page p, so that both can be copied at once."""
        self.plans: dict[object, Any] = {}
        """What tiles.py and fused.py have worked out for these planes."""

    def remember(self, key: object, plan: object) -> None:
        """Keeps a plan; a save or a load uses a few."""
        if len(self.plans) >= _PLANS_MAX:
            self.plans.clear()
        self.plans[key] = plan


def _check_plane(plane: Plane, layout: Layout, shard: Shard) -> None:
    what = f"plane of layer {plane.layer}, {'KV'[plane.kv & 1]}"
    dim = layout.v_dim if plane.kv else layout.k_dim
    if plane.kv not in (0, 1) or not _inside(plane.dims, range(dim)):
        raise ConfigError(f"{what}: dims {plane.dims} of {dim}")
    if plane.layer not in shard.layers or not _inside(plane.heads, shard.heads):
        raise ConfigError(f"{what}: heads {plane.heads}; this shard holds layers {shard.layers}, heads {shard.heads}")
    if plane.itemsize != layout.itemsize:
        raise ConfigError(f"{what}: elements of {plane.itemsize} bytes, where {layout.dtype} has {layout.itemsize}")
    if min(plane.pages, plane.page_tokens) < 1:
        raise ConfigError(f"{what}: {plane.pages} pages of {plane.page_tokens} tokens")
    start, stop = plane.memory
    inner = plane.unit_bytes
    for stride, count in sorted(plane.axes):
        if stride < inner:
            raise ConfigError(f"{what}: elements overlap (stride {stride} where {inner} bytes lie): was it expanded?")
        inner = max(inner, stride * (count - 1) + inner)
    if not (start <= plane.address and plane.address + plane.reach <= stop):
        raise ConfigError(f"{what}: {plane.reach} bytes from {plane.address:#x} leave [{start:#x}, {stop:#x})")


def _check_coverage(planes: Sequence[Plane], layout: Layout, shard: Shard) -> None:
    """Every (layer, head, K or V, dim) of the shard lies in one plane and no other."""
    boxes: dict[tuple[int, int], list[Plane]] = {}
    for plane in planes:
        boxes.setdefault((plane.layer, plane.kv), []).append(plane)
    for layer in shard.layers:
        for kv, dim in enumerate((layout.k_dim, layout.v_dim) if layout.v_dim else (layout.k_dim,)):
            found = boxes.get((layer, kv), [])
            held = sum(len(plane.heads) * len(plane.dims) for plane in found)
            if held < len(shard.heads) * dim:
                raise ConfigError(f"layer {layer}, {'KV'[kv]}: planes hold {held} of {len(shard.heads) * dim} dims")
            if any(_meet(a.heads, b.heads) and _meet(a.dims, b.dims) for a, b in combinations(found, 2)):
                raise ConfigError(f"layer {layer}, {'KV'[kv]}: two planes hold the same heads and dims")


def _grids(planes: Sequence[Plane]) -> list[Grid]:
    """As few strided arrays as there can be, in the order of their first planes."""
    alike: dict[tuple[object, ...], list[Plane]] = {}
    for plane in planes:
        strides = (plane.page_stride, plane.token_stride, plane.head_stride, plane.apart)
        alike.setdefault((plane.kv, plane.dims, plane.heads, strides), []).append(plane)
    grids: list[Grid] = []
    for group in alike.values():
        group.sort(key=lambda plane: plane.layer)
        for run in _runs(group):
            first = run[0]
            step = run[1].address - first.address if len(run) > 1 else 0
            # Strides of axes of length one say nothing, and may be anything. Pages of one slot follow each other.
            page_stride = first.page_stride if first.pages > 1 else 0
            token_stride = first.token_stride if first.page_tokens > 1 else page_stride
            strides = (first.head_stride, token_stride, page_stride, first.apart)
            layers = range(first.layer, first.layer + len(run))
            grids.append(Grid(layers, first.heads, first.kv, first.dims, first.address, step, *strides))
    return grids


def _runs(planes: list[Plane]) -> list[list[Plane]]:
    """Consecutive layers a constant number of bytes apart, in one piece of memory: a view of several would span what
    lies between them, too; where NumPy cannot rule out that a copy overlaps it, it makes a temporary one, which may
    come to lie in there, and so on without end."""
    runs: list[list[Plane]] = []
    for plane in planes:
        run = runs[-1] if runs else []
        follows = bool(run) and plane.layer == run[-1].layer + 1 and plane.memory == run[-1].memory
        if follows and (len(run) == 1 or plane.address - run[-1].address == run[1].address - run[0].address):
            run.append(plane)
        else:
            runs.append([plane])
    return runs


def _step(page_stride: int, token_stride: int) -> Step:
    unit = gcd(page_stride, token_stride) or 1
    return Step(unit, page_stride // unit, token_stride // unit)


def _inside(inner: range, outer: range) -> bool:
    return inner.step == 1 and len(inner) > 0 and outer.start <= inner.start and inner.stop <= outer.stop


def _meet(one: range, other: range) -> bool:
    return one.start < other.stop and other.start < one.stop


# ------------------------------------------------------------------------------------------------ from tensors


class _Memory(NamedTuple):
    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """Bytes."""
    itemsize: int
    bounds: tuple[int, int]
    writable: bool


def paged(
    tensor: object,
    axes: str,
    *,
    layers: range,
    heads: range,
    kv: int | None = None,
    dims: range | None = None,
    k_dim: int | None = None,
) -> list[Plane]:
    """Planes of one tensor (torch on the CPU, NumPy, or anything with `__array_interface__`), named by its axes.

    One letter an axis, in the tensor's own order (strides are the tensor's, so any permutation or view will do):
    `p` page, `t` slot of a page, `h` head, `d` dim of K or V, `l` layer, `k` K then V (length 2), `C` in place of `d`:
    K's dims and then V's (`k_dim` of K, half of them when left out), next to each other. Axes left out have length one.
    vLLM on CUDA "phtC", older ones "kpthd" and "pkthd", MLA "ptd", its CPU_ATTN "phdt" for K, which lies transposed,
    and "phtd" for V; one layer of a transformers cache (one batch row is one page) "phtd".

    `layers` and `heads` are those of the layout that lie in the tensor; `kv` and `dims` say what it holds where no axis
    does (K; all dims from 0). Rule STATE and opaque pages: one slot a page, "pd". Raises ConfigError.
    """
    memory = _memory(tensor)
    shape, stride = _axes(memory, axes)
    last = "C" if "C" in axes else "d"
    apart = stride[last] if shape[last] > 1 and stride[last] != memory.itemsize else 0
    if apart and last == "C":
        raise ConfigError(f"axis C with {apart} bytes from dim to dim: K and V must be given one by one then")
    if (shape["l"], shape["h"]) != (len(layers), len(heads)):
        raise ConfigError(f"axes of {shape['l']} layers and {shape['h']} heads, not {len(layers)} and {len(heads)}")
    if shape["k"] not in (1, 2) or ("k" in axes and (shape["k"] == 1 or last == "C")):
        raise ConfigError(f"axis k has {shape['k']} items: it is K and V, and then dims are 'd'")
    if ("k" in axes or last == "C") and (kv is not None or dims is not None):
        raise ConfigError("kv and dims are for tensors without an axis 'k' or 'C', which say both")
    whole = Plane(
        layer=layers.start,
        kv=kv or 0,
        dims=dims or range(shape[last]),
        heads=heads,
        address=memory.address,
        page_stride=stride["p"],
        token_stride=stride["t"],
        head_stride=stride["h"],
        pages=shape["p"],
        page_tokens=shape["t"],
        itemsize=memory.itemsize,
        memory=memory.bounds,
        owner=tensor,
        writable=memory.writable,
        apart=apart,
    )
    if len(whole.dims) != shape[last]:
        raise ConfigError(f"the tensor has {shape[last]} dims, not {len(whole.dims)}")
    kinds = [whole]
    if last == "C":
        split = shape["C"] // 2 if k_dim is None else k_dim
        v_start = whole.address + split * memory.itemsize
        value = replace(whole, kv=1, dims=range(shape["C"] - split), address=v_start)
        kinds = [replace(whole, dims=range(split)), value]
    elif "k" in axes:
        kinds.append(replace(whole, kv=1, address=whole.address + stride["k"]))
    return [
        replace(each, layer=layer, address=each.address + stride["l"] * i)
        for i, layer in enumerate(layers)
        for each in kinds
    ]


def _axes(memory: _Memory, axes: str) -> tuple[dict[str, int], dict[str, int]]:
    """Length and stride of every axis by its letter; those left out have length one."""
    if len(set(axes)) != len(axes) or not set(axes) <= set("pthdlkC") or ("d" in axes) == ("C" in axes):
        raise ConfigError(f"axes {axes!r}: each of p, t, h, l, k at most once, and one of d and C")
    if len(axes) != len(memory.shape):
        raise ConfigError(f"axes {axes!r} for a tensor of shape {memory.shape}: one letter an axis")
    if min(memory.shape) < 1 or any(s < 0 for s, n in zip(memory.strides, memory.shape) if n > 1):
        raise ConfigError(f"shape {memory.shape}, strides {memory.strides}: none may be empty or negative")
    shape, stride = dict.fromkeys("pthdlkC", 1), dict.fromkeys("pthdlkC", 0)
    shape.update(zip(axes, memory.shape))
    stride.update(zip(axes, memory.strides))
    return shape, stride


def _memory(tensor: Any) -> _Memory:
    """Address and strides of a tensor, and the memory that it may reach."""
    if hasattr(tensor, "data_ptr") and hasattr(tensor, "untyped_storage"):
        if tensor.device.type != "cpu":
            raise ConfigError(f"the tensor is on {tensor.device}: only memory of the host can be copied here")
        itemsize, storage = tensor.element_size(), tensor.untyped_storage()
        bounds = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        strides = tuple(stride * itemsize for stride in tensor.stride())
        return _Memory(tensor.data_ptr(), tuple(tensor.shape), strides, itemsize, bounds, writable=True)
    facts = getattr(tensor, "__array_interface__", None)
    if not facts:
        raise ConfigError(f"{type(tensor).__name__} is no tensor: pass one of torch or NumPy")
    shape, itemsize = tuple(facts["shape"]), int(facts["typestr"][2:])
    strides = facts.get("strides") or _dense(shape, itemsize)
    address, read_only = facts["data"]
    reach = sum((count - 1) * stride for count, stride in zip(shape, strides) if stride > 0) + itemsize
    return _Memory(address, shape, strides, itemsize, (address, address + reach), writable=not read_only)


def _dense(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    strides = []
    for count in reversed(shape):
        strides.append(itemsize)
        itemsize *= count
    return tuple(reversed(strides))
