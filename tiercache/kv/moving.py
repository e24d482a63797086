"""Moves KV between the memory of an engine (planes) and stored blocks: batched strided copies with the GIL released.

The native kernel does it where it can (fused.py). Else NumPy copies a tile and xxhash hashes it right after, while it
is in the second-level cache: the same bytes and digests at half the speed.

Block b of a sequence is its rows [b * layout.rows, (b + 1) * layout.rows): tokens, or one row a block for states and
opaque pages.
`parts` is a map for all blocks, or one map a block; None: all that the planes hold as whole parts (gather), or touch
(scatter). All are for any thread; ConfigError where tables, spans or buffers do not fit.
"""

from __future__ import annotations

import ctypes
import threading
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import xxhash

from tiercache.buffers import Buffer, digest_rows
from tiercache.errors import ConfigError
from tiercache.kv import fused
from tiercache.kv.lanes import LANES
from tiercache.kv.runs import runs_of
from tiercache.kv.tiles import WIDE_BYTES, plan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tiercache.kv.planes import Planes
    from tiercache.kv.runs import Runs, Table
    from tiercache.kv.tiles import Tile

    Parts = int | Sequence[int] | None
    Pieces = Sequence[tuple[int, int]]


# The address space; see tiercache/buffers.py for why not a view of each span.
_SPACE = memoryview((ctypes.c_uint8 * (1 << 62)).from_address(0)).cast("B")
_digest = xxhash.xxh3_64_intdigest
_threads = threading.local()
_SCRATCH = 0
"""Stands for an address in a thread's scratch, which is aligned as blocks are."""


class Digests(NamedTuple):
    """xxh3-64 of what a block's parts and pieces hold."""

    row: bytes
    """As model.Payload.digests: 8 bytes a part of the layout, zero where it was not asked for."""
    pieces: tuple[int, ...]
    """One for each of the pieces asked for, in their order."""


def gather(
    planes: Planes,
    table: Table,
    blocks: Sequence[int],
    targets: Sequence[Buffer],
    *,
    parts: Parts = None,
    pieces: Pieces = (),
) -> None:
    """Copies parts and pieces (byte ranges that the planes hold) of these blocks out of the engine's memory to their
    places in `targets`, which span whole blocks. The rest of the targets is left alone."""
    _gather(planes, table, blocks, targets, parts=parts, pieces=pieces, hashed=False)


def gather_digested(
    planes: Planes,
    table: Table,
    blocks: Sequence[int],
    targets: Sequence[Buffer],
    *,
    parts: Parts = None,
    pieces: Pieces = (),
) -> list[Digests]:
    """As `gather`, and the digests of what was written, one a block."""
    return _gather(planes, table, blocks, targets, parts=parts, pieces=pieces, hashed=True)


def digests_of(
    planes: Planes, table: Table, blocks: Sequence[int], *, parts: Parts = None, pieces: Pieces = ()
) -> list[Digests]:
    """What `gather_digested` would answer, without storing anything: what replicas compare."""
    return _gather(planes, table, blocks, None, parts=parts, pieces=pieces, hashed=True)


def scatter(
    planes: Planes,
    table: Table,
    blocks: Sequence[int],
    sources: Sequence[Buffer],
    *,
    parts: Parts = None,
    tokens: range | None = None,
) -> None:
    """Copies what the planes hold of these parts of stored blocks into the engine's memory. `sources` span whole
    blocks; `tokens` (rows of the sequence) limits what is written, so that a load may begin or end inside a block."""
    _scatter(planes, table, blocks, sources, None, parts=parts, tokens=tokens)


def scatter_verified(
    planes: Planes,
    table: Table,
    blocks: Sequence[int],
    sources: Sequence[Buffer],
    digests: Sequence[bytes],
    *,
    parts: Parts = None,
    tokens: range | None = None,
) -> list[bool]:
    """As `scatter`, and says of each block whether every part had its digest (`digests`: rows as in Payload). After
    False the engine's memory for that block is undefined.

    A part is hashed where it is stored, right after it was copied: bytes that are replaced meanwhile, by a writer that
    never brings the old ones back, are seen by the hash if they were seen by the copy.
    """
    return _scatter(planes, table, blocks, sources, digests, parts=parts, tokens=tokens)


# --------------------------------------------------------------------------------------------------------- loops


def _gather(
    planes: Planes,
    table: Table,
    blocks: Sequence[int],
    targets: Sequence[Buffer] | None,
    *,
    parts: Parts,
    pieces: Pieces,
    hashed: bool,
) -> list[Digests]:
    """Copies to `targets`, or to a scratch of each thread where they are None; answers digests where `hashed`."""
    layout = planes.layout
    runs = runs_of(planes, table, blocks, None)
    addresses = [_SCRATCH] * len(blocks) if targets is None else _addresses(planes, blocks, targets)
    maps = _maps(planes, len(blocks), parts, touched=False)
    if (programs := fused.programs(planes, maps, pieces, touched=False)) is not None:
        rows = fused.gather(planes, programs, runs, None if targets is None else addresses, hashed=hashed)
        cut = layout.parts
        return [Digests(row[:cut].tobytes(), tuple(row[cut:].tolist())) for row in (() if rows is None else rows)]
    positions = runs.listed()
    plans = _plans(planes, addresses, maps, pieces, hashed=hashed, scratch=targets is None)
    count, memory, digest = layout.parts, _SPACE, _digest
    pack = digest_rows(count).pack

    def some(begin: int, end: int) -> list[Digests]:
        digests: list[Digests] = []
        scratch = _scratch(planes) if targets is None else None
        for positioned, address, (tiles, shift) in zip(positions[begin:end], addresses[begin:end], plans[begin:end]):
            at = address if scratch is None else scratch.address
            place = (at >> shift) - 1
            values = [0] * (count + len(pieces))
            for tile in tiles:
                for where, first, rows in positioned:
                    for stored, engine, which in tile.whole if rows == layout.rows else tile.rows(first, rows):
                        stored[place] = engine[where[which]]
                if hashed:
                    # A tile in the scratch begins at its address, any other at its own offset in the block.
                    base = at if scratch is None else at - tile.box.start
                    for part, start, stop in tile.box.hashed:
                        values[part] = digest(memory[base + start : base + stop])
            if hashed:
                digests.append(Digests(pack(*values[:count]), tuple(values[count:])))
        return digests

    return LANES.spread(len(blocks), _bytes(planes, plans), some)


def _scatter(
    planes: Planes,
    table: Table,
    blocks: Sequence[int],
    sources: Sequence[Buffer],
    digests: Sequence[bytes] | None,
    *,
    parts: Parts,
    tokens: range | None,
) -> list[bool]:
    """Copies from `sources`; with `digests`, says of every block whether what was copied has them."""
    layout = planes.layout
    if not planes.writable:
        raise ConfigError("these planes are read-only: pass the engine's own tensors")
    runs = runs_of(planes, table, blocks, tokens)
    addresses = _addresses(planes, blocks, sources)
    if digests is not None:
        _check_digests(digests, len(blocks), layout.parts)
    maps = _maps(planes, len(blocks), parts, touched=True)
    if (programs := fused.programs(planes, maps, (), touched=True)) is not None:
        return fused.scatter(planes, programs, runs, addresses, digests)
    plans = _plans(planes, addresses, maps, (), hashed=digests is not None, touched=True)
    return _scatter_loops(planes, plans, runs, addresses, digests)


def _scatter_loops(
    planes: Planes,
    plans: Sequence[tuple[list[Tile], int]],
    runs: Runs,
    addresses: Sequence[int],
    digests: Sequence[bytes] | None,
) -> list[bool]:
    layout, positions = planes.layout, runs.listed()
    unpack = digest_rows(layout.parts).unpack
    wanted = [unpack(row) for row in digests] if digests is not None else [()] * len(addresses)
    memory, digest = _SPACE, _digest

    def some(begin: int, end: int) -> list[bool]:
        good = []
        todo = zip(positions[begin:end], addresses[begin:end], plans[begin:end], wanted[begin:end])
        for positioned, address, (tiles, shift), values in todo:
            place = (address >> shift) - 1
            right = True
            for tile in tiles:
                for where, first, rows in positioned:
                    for stored, engine, which in tile.whole if rows == layout.rows else tile.rows(first, rows):
                        engine[where[which]] = stored[place]
                if values:
                    for part, start, stop in tile.box.hashed:
                        if digest(memory[address + start : address + stop]) != values[part]:
                            right = False
                if not right:
                    break
            good.append(right)
        return good

    return LANES.spread(len(addresses), _bytes(planes, plans), some)


def _check_digests(digests: Sequence[bytes], blocks: int, parts: int) -> None:
    if len(digests) != blocks or any(len(row) != 8 * parts for row in digests):
        raise ConfigError(f"{len(digests)} rows of digests for {blocks} blocks of {parts} parts: 8 bytes a part")


def _bytes(planes: Planes, plans: Sequence[tuple[list[Tile], int]]) -> int:
    """About as many as these copies move."""
    units = sum(len(tile.box.layers) * len(tile.box.heads) for tiles, _ in plans[:1] for tile in tiles)
    return len(plans) * units * planes.layout.unit_bytes


def _scratch(planes: Planes) -> Buffer:
    """Memory of this thread for one tile, kept for the next call."""
    size = max(WIDE_BYTES, planes.layout.part_bytes)
    found: Buffer | None = getattr(_threads, "scratch", None)
    if found is None or found.length < size:
        found = Buffer.of(np.empty(size, np.uint8).data, writable=True)
        _threads.scratch = found
    return found


def _addresses(planes: Planes, blocks: Sequence[int], buffers: Sequence[Buffer]) -> list[int]:
    size = planes.layout.block_bytes
    if len(buffers) != len(blocks):
        raise ConfigError(f"{len(buffers)} buffers for {len(blocks)} blocks: pass one for each")
    if short := [buffer.length for buffer in buffers if buffer.length < size]:
        raise ConfigError(f"a buffer of {short[0]} bytes: stored blocks of this layout have {size}")
    return [buffer.address for buffer in buffers]


def _plans(
    planes: Planes, addresses: Sequence[int], maps: Sequence[int], pieces: Pieces, **how: bool
) -> list[tuple[list[Tile], int]]:
    """Tiles of each block, and the shift of its address; `how` as for tiles.plan."""
    # Blocks that do not lie on a multiple of 16, as no allocator places them, take a slower way.
    shift = 0 if any(address & 15 for address in addresses) else 4
    plans = {each: plan(planes, each, pieces, shift=shift, **how) for each in set(maps)}
    return [(plans[each].tiles, shift) for each in maps]


def _maps(planes: Planes, blocks: int, parts: Parts, *, touched: bool) -> Sequence[int]:
    """Parts of each block."""
    if parts is None:
        parts = planes.shard.needed(planes.layout) if touched else planes.shard.held(planes.layout)[0]
    if isinstance(parts, int):
        return [parts] * blocks
    if len(parts) != blocks:
        raise ConfigError(f"{len(parts)} part maps for {blocks} blocks: pass one for each, or one for all")
    return parts
