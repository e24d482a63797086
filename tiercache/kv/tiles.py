"""Tiles: what one strided copy moves between engine memory and stored blocks, worked out once for a set of parts.

A tile is a box of layers and heads that lies in a block with constant strides: neighbouring parts, or a piece of one.
It is no larger than what the processor's second-level cache holds beside its source, so that hashing it right after
the copy costs no second trip to memory. Arrays here are views of the address space: they keep nothing alive.
"""

from __future__ import annotations

import ctypes
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tiercache.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import numpy.typing as npt

    from tiercache.kv.layout import Layout
    from tiercache.kv.planes import Grid, Planes

TILE_BYTES = 256 << 10
"""Bytes of a tile that is hashed, where a part is not larger: measured best of 64 to 512 KiB."""

WIDE_BYTES = 512 << 10
"""Bytes of a tile that is not: fewer copies, by 3 % faster."""

HELD_ITEMS = 500
"""NumPy keeps the GIL while it copies so many items or fewer."""

_FIRST = 16  # NumPy takes a buffer at address 0 for none
_MEMORY = memoryview((ctypes.c_uint8 * (1 << 48)).from_address(_FIRST)).cast("B")
_ADDRESSES = 1 << 47


class Anywhere:
    """Stands for an array whose first axis is addresses, where one with that many rows cannot be made."""

    __slots__ = ("dtype", "offset", "shape", "shift", "strides")

    def __init__(
        self, shape: tuple[int, ...], dtype: np.dtype[Any], offset: int, strides: tuple[int, ...], shift: int
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.offset = offset - _FIRST
        self.strides = strides
        self.shift = shift

    def __getitem__(self, place: int) -> npt.NDArray[Any]:
        start = (place + 1 << self.shift) + self.offset
        return np.ndarray(self.shape, self.dtype, _MEMORY, start, self.strides)

    def __setitem__(self, place: int, values: npt.NDArray[Any]) -> None:
        self[place][...] = values


class Strip(NamedTuple):
    """One copy of a tile: `stored[place]` and `engine[position]` are the two sides, axes [layer, head, row], and [dim]
    where the engine's dims lie apart."""

    stored: npt.NDArray[Any] | Anywhere
    engine: npt.NDArray[Any]
    steps: int
    """Which of the plan's `steps` positions are counted in."""


class Box(NamedTuple):
    """Layers and heads with constant strides in a block, and the parts or pieces to be hashed when they are there."""

    layers: range
    heads: range
    start: int
    """First byte in the block."""
    hashed: list[tuple[int, int, int]]
    """(number of the part, or of the piece counted from the layout's parts on; start, stop in the block)."""


class Tile:
    """A box, and the copies that move it: all rows at once, or some of them."""

    __slots__ = ("_plan", "box", "strips", "whole")

    def __init__(self, plan: Plan, box: Box) -> None:
        self._plan = plan
        self.box = box
        self.strips: dict[tuple[int, int], list[Strip]] = {}
        self.whole = self.rows(0, plan.planes.layout.rows)

    def rows(self, first: int, count: int) -> list[Strip]:
        """The copies of rows [first, first + count) of the block."""
        found = self.strips.get((first, count))
        if found is None:
            found = self.strips[first, count] = list(self._plan.strips(self.box, first, count))
        return found


class Plan:
    """All tiles of a set of parts and pieces.

    A stored block at `address`, a multiple of 2**shift, has the place `(address >> shift) - 1`. `scratch`: every tile
    is at that address itself instead of at its own offset in the block.
    """

    def __init__(self, planes: Planes, boxes: Sequence[Box], *, shift: int, scratch: bool) -> None:
        self.planes = planes
        self.shift = shift
        self.scratch = scratch
        self.tiles = [Tile(self, box) for box in boxes]

    def strips(self, box: Box, first: int, count: int) -> Iterator[Strip]:
        """One strip a grid that the box meets."""
        for which, grid in enumerate(self.planes.grids):
            layers, heads = common(box.layers, grid.layers), common(box.heads, grid.heads)
            if layers and heads:
                stored = self._stored(box, grid, (layers.start, heads.start), (len(layers), len(heads), first, count))
                yield Strip(stored, self._engine(which, grid, layers, heads, count), self.planes.kinds[which])

    def _stored(
        self, box: Box, grid: Grid, corner: tuple[int, int], shape: tuple[int, int, int, int]
    ) -> npt.NDArray[Any] | Anywhere:
        layout, (layers, heads, first, count) = self.planes.layout, shape
        row = (layout.v_dim if grid.kv else layout.k_dim) * layout.itemsize
        start = layout.span(*corner, grid.kv)[0] + first * row + grid.dims.start * layout.itemsize
        start -= box.start if self.scratch else 0
        dtype, dims = _void(grid, layout), ((len(grid.dims),) if grid.apart else ())
        axes = (layers, heads, count, *dims)
        strides = (*strides_in(layout), row, *[layout.itemsize for _ in dims])
        places = (_ADDRESSES >> self.shift) - 1
        if self.shift == 0 or places * prod(axes) * dtype.itemsize >= 1 << 62:
            return Anywhere(axes, dtype, start, strides, self.shift)
        unit = 1 << self.shift
        shape_of_all, offset = (places, *axes), unit + start - _FIRST
        return np.ndarray(shape_of_all, dtype, _MEMORY, offset, (unit, *strides))

    def _engine(self, which: int, grid: Grid, layers: range, heads: range, count: int) -> npt.NDArray[Any]:
        planes = self.planes
        unit, page_step, slot_step = planes.steps[planes.kinds[which]]
        positions = (planes.pages - 1) * page_step + (planes.page_tokens - 1) * slot_step + 1
        address = grid.address + (layers.start - grid.layers.start) * grid.layer_step
        address += (heads.start - grid.heads.start) * grid.head_stride
        strides: tuple[int, ...] = (unit, grid.layer_step, grid.head_stride, grid.token_stride)
        shape: tuple[int, ...] = (positions, len(layers), len(heads), count)
        if grid.apart:
            strides, shape = (*strides, grid.apart), (*shape, len(grid.dims))
        return np.ndarray(shape, _void(grid, planes.layout), _MEMORY, address - _FIRST, strides)


def _void(grid: Grid, layout: Layout) -> np.dtype[Any]:
    """The elements of a row that lie together never part: as one void they are copied by one memmove."""
    return np.dtype(f"V{layout.itemsize if grid.apart else len(grid.dims) * layout.itemsize}")


def strides_in(layout: Layout) -> tuple[int, int]:
    """Bytes from layer to layer and from head to head of a box in a stored block."""
    g, unit = layout.heads_per_part, layout.unit_bytes
    return g * unit, (unit if g > 1 else layout.part_bytes)


def common(one: range, other: range) -> range:
    """What two ranges have in common."""
    return range(max(one.start, other.start), min(one.stop, other.stop))


# --------------------------------------------------------------------------------------------------------- plans


def plan(
    planes: Planes,
    parts: int,
    pieces: Sequence[tuple[int, int]] = (),
    *,
    shift: int,
    hashed: bool = True,
    scratch: bool = False,
    touched: bool = False,
) -> Plan:
    """The plan for these parts and pieces; `touched`: of parts that the planes hold only some of, those. `hashed`: its
    tiles will be.

    Raises ConfigError for what the planes do not hold.
    """
    key = (parts, tuple(pieces), shift, hashed, scratch, touched)
    found: Plan | None = planes.plans.get(key)
    if found is None:
        merged = _merged(
            planes.layout, _boxes_of_parts(planes, parts, touched=touched), TILE_BYTES if hashed else WIDE_BYTES
        )
        chosen = [*_lengthened(planes.layout, merged), *_boxes_of_pieces(planes, pieces)]
        found = Plan(planes, chosen, shift=shift, scratch=scratch)
        planes.remember(key, found)
    return found


def boxes(planes: Planes, parts: int, pieces: Sequence[tuple[int, int]], *, touched: bool) -> Iterator[Box]:
    """A box for each of these parts and pieces, `touched` as for `plan`. Raises ConfigError for what the planes do not
    hold."""
    yield from _boxes_of_parts(planes, parts, touched=touched)
    yield from _boxes_of_pieces(planes, pieces)


def _boxes_of_parts(planes: Planes, parts: int, *, touched: bool) -> Iterator[Box]:
    layout, shard = planes.layout, planes.shard
    allowed = shard.needed(layout) if touched else shard.held(layout)[0]
    if parts & ~allowed or parts < 0:
        held = "touch" if touched else "hold as a whole"
        raise ConfigError(f"parts {parts:#x}, where these planes {held} {allowed:#x}: see Shard.share and Shard.needed")
    for part in range(layout.parts):
        if parts >> part & 1:
            layers, heads = layout.part_range(part)
            span = layout.part_span(part)
            yield Box(common(layers, shard.layers), common(heads, shard.heads), span[0], [(part, *span)])


def _merged(layout: Layout, boxes: Iterable[Box], most: int) -> Iterator[Box]:
    """Neighbouring parts as one box, up to so many bytes."""
    one_group = layout.heads == layout.heads_per_part
    last: Box | None = None
    for box in boxes:
        if last is not None and box.hashed[-1][2] - last.start <= most:
            if one_group and box.layers.start == last.layers.stop:
                last = last._replace(layers=range(last.layers.start, box.layers.stop), hashed=last.hashed + box.hashed)
                continue
            beside = box.layers == last.layers and box.heads.start == last.heads.stop
            if not one_group and layout.heads_per_part == 1 and beside:
                last = last._replace(heads=range(last.heads.start, box.heads.stop), hashed=last.hashed + box.hashed)
                continue
        if last is not None:
            yield last
        last = box
    if last is not None:
        yield last


def _lengthened(layout: Layout, boxes: Iterable[Box]) -> Iterator[Box]:
    """What is left of a block after full tiles takes some parts of the tile before it, and copies and hashes those
    again, until it has so many items that NumPy lets other threads run meanwhile."""
    last: Box | None = None
    for box in boxes:
        grown = box
        if last is not None and layout.heads == layout.heads_per_part and box.layers.start == last.layers.stop:
            for part in reversed(last.hashed):
                if len(grown.layers) * len(grown.heads) * layout.rows > HELD_ITEMS:
                    break
                layers, _ = layout.part_range(part[0])
                start = max(layers.start, last.layers.start)
                grown = Box(range(start, box.layers.stop), box.heads, part[1], [part, *grown.hashed])
        yield grown
        last = box


def _boxes_of_pieces(planes: Planes, pieces: Sequence[tuple[int, int]]) -> Iterator[Box]:
    return (_box_of_piece(planes, number, *piece) for number, piece in enumerate(pieces))


def _box_of_piece(planes: Planes, number: int, start: int, stop: int) -> Box:
    """The layers and heads of a byte range inside one part, as Layout.parts_of has made it."""
    layout, shard, unit = planes.layout, planes.shard, planes.layout.unit_bytes
    part = start // layout.part_bytes
    if 0 <= start < stop <= layout.block_bytes and stop <= layout.part_span(part)[1]:
        layers, heads = layout.part_range(part)
        (first, over), (last, over_last) = (divmod(at - part * layout.part_bytes, unit) for at in (start, stop))
        (layer, head), (layer_stop, head_stop) = divmod(first, len(heads)), divmod(last, len(heads))
        box = None
        if not (over or over_last or head or head_stop):
            box = range(layers[layer], layers.start + layer_stop), heads
        elif not (over or over_last) and (layer == layer_stop or (layer + 1, 0) == (layer_stop, head_stop)):
            box = range(layers[layer], layers[layer] + 1), range(heads[head], heads[head] + last - first)
        if box is not None and common(box[0], shard.layers) == box[0] and common(box[1], shard.heads) == box[1]:
            return Box(*box, start, [(layout.parts + number, start, stop)])
    raise ConfigError(f"bytes [{start}, {stop}) are no piece that these planes hold: see Layout.parts_of")
