"""Fused: what moving.py does, by the native kernel, for layouts whose rows are multiples of 64 bytes: they are read
once, hashed, and written past the caches. A program is worked out once for a set of parts.

A unit is K or V of one layer and head; the units of a part follow each other where it is stored, so its digest grows
while its rows move, in the one order that both have.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from tiercache import native
from tiercache.kv.lanes import LANES
from tiercache.kv.tiles import boxes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    from tiercache.kv.planes import Planes
    from tiercache.kv.runs import Runs

    I64 = npt.NDArray[np.int64]
    U64 = npt.NDArray[np.uint64]


class Program:
    """What the kernel needs to know of a set of parts, for all blocks."""

    def __init__(self, planes: Planes, parts: list[tuple[int, ...]], units: list[tuple[int, ...]], slots: int) -> None:
        self._parts = np.array(parts, np.int64).reshape(-1, 5)
        self._units = np.array([*units, *units[-1:]], np.int64).reshape(-1, 6)  # the kernel looks one ahead
        self.slots = slots
        """Digests of a block: one for each part of the layout, then one a piece."""
        self.bytes = int(self._parts[:, 3].sum())
        """Of a block, also those that are only hashed."""
        self._fixed = (len(parts), planes.layout.rows, len(planes.steps), slots, _at(self._parts), _at(self._units))

    def run(
        self, mode: int, runs: Runs, stored: I64 | None, digests: U64 | None, good: npt.NDArray[np.uint8] | None = None
    ) -> None:
        """See tiercache_blocks in kernel.c: all arrays have an item, or a row, for each block; positions are bytes."""
        assert native.KERNEL is not None
        head = np.array([mode, digests is not None, *self._fixed], np.int64)
        arrays = (stored, runs.starts, runs.rows, digests, good)
        native.KERNEL.blocks(_at(head), len(runs.starts) - 1, *map(_at, arrays))


def _at(array: npt.NDArray[np.generic] | None) -> int | None:
    return None if array is None else array.ctypes.data


def program(planes: Planes, parts: int, pieces: Sequence[tuple[int, int]], *, touched: bool) -> Program | None:
    """The program for these parts and pieces, as for tiles.plan; None where the kernel cannot do it."""
    if native.KERNEL is None:
        return None
    key = ("fused", parts, tuple(pieces), touched)
    if key not in planes.plans:
        planes.remember(key, _made(planes, parts, pieces, touched=touched))
    found: Program | None = planes.plans[key]
    return found


def _made(planes: Planes, parts: int, pieces: Sequence[tuple[int, int]], *, touched: bool) -> Program | None:
    layout = planes.layout
    rows = [(kv, layout.rows, dim * layout.itemsize) for kv, dim in enumerate((layout.k_dim, layout.v_dim)) if dim]
    if any(row % native.ROW_BYTES or row > native.ROW_BYTES_MAX for _, _, row in rows):
        return None
    spans: list[tuple[int, ...]] = []
    units: list[tuple[int, ...]] = []
    for box in boxes(planes, parts, pieces, touched=touched):
        ((slot, start, stop),) = box.hashed
        if stop - start < native.DIGEST_BYTES_MIN:
            return None
        # Of parts, all layers and heads, also those that these planes do not hold: their bytes count in the digest.
        layers, heads = layout.part_range(slot) if slot < layout.parts else (box.layers, box.heads)
        spans.append((len(units), len(layers) * len(heads) * len(rows), start, stop - start, slot))
        for layer in layers:
            for head in heads:
                for kv, _, row in rows:
                    held = layer in planes.shard.layers and head in planes.shard.heads
                    place = _place(planes, layer, head, kv) if held else (0, row, 0, 0)
                    if place is None:
                        return None
                    units.append((*place[:2], row, *place[2:], layout.itemsize))
    return Program(planes, spans, units, layout.parts + len(pieces))


def _place(planes: Planes, layer: int, head: int, kv: int) -> tuple[int, int, int, int] | None:
    """Address of row 0 at position 0, bytes from row to row, kind, Grid.apart; None if a row is in several grids."""
    for which, grid in enumerate(planes.grids):
        if grid.kv == kv and layer in grid.layers and head in grid.heads:
            if len(grid.dims) != (planes.layout.v_dim if kv else planes.layout.k_dim):
                return None
            address = grid.address + (layer - grid.layers.start) * grid.layer_step
            address += (head - grid.heads.start) * grid.head_stride
            return address, grid.token_stride, planes.kinds[which], grid.apart
    return None


def programs(
    planes: Planes, maps: Sequence[int], pieces: Sequence[tuple[int, int]], *, touched: bool
) -> list[Program] | None:
    """A program for each block, given its parts; None where the kernel cannot do it."""
    known = {each: program(planes, each, pieces, touched=touched) for each in set(maps)}
    found = [one for each in maps if (one := known[each]) is not None]
    return found if len(found) == len(maps) else None


def gather(
    planes: Planes, each: Sequence[Program], runs: Runs, addresses: Sequence[int] | None, *, hashed: bool
) -> U64 | None:
    """Copies blocks out of engine memory, or only hashes them where there are no addresses; the digests, a row a
    block."""
    stored = None if addresses is None else np.array(addresses, np.int64)
    found = np.zeros((len(each), max((one.slots for one in each), default=0)), np.uint64) if hashed else None
    _run(native.GATHER if addresses is not None else native.DIGEST, each, runs.in_bytes(planes), stored, found)
    return found


def scatter(
    planes: Planes, each: Sequence[Program], runs: Runs, addresses: Sequence[int], digests: Sequence[bytes] | None
) -> list[bool]:
    """Copies blocks into engine memory; of each whether it had the digests, where there are any."""
    good = np.ones(len(each), np.uint8)
    wanted = None if digests is None else np.frombuffer(b"".join(digests), np.uint64).reshape(len(each), -1)
    _run(native.SCATTER, each, runs.in_bytes(planes), np.array(addresses, np.int64), wanted, good)
    answers: list[bool] = good.astype(np.bool_).tolist()
    return answers


def _run(
    mode: int,
    each: Sequence[Program],
    runs: Runs,
    stored: I64 | None,
    digests: U64 | None,
    good: npt.NDArray[np.uint8] | None = None,
) -> None:
    def some(first: int, last: int) -> list[None]:
        for one, begin, end in _alike(each, first, last):
            arrays = (None if array is None else array[begin:end] for array in (stored, digests, good))
            one.run(mode, runs.of(begin, end), *arrays)  # type: ignore[arg-type]
        return []

    LANES.spread(len(each), sum(one.bytes for one in each), some)


def _alike(each: Sequence[Program], first: int, last: int) -> Iterator[tuple[Program, int, int]]:
    """Blocks [first, last) by neighbours that have one program."""
    for one, group in groupby(range(first, last), lambda block: each[block]):
        blocks = [*group]
        yield one, blocks[0], blocks[-1] + 1
