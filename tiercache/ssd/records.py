"""Record: one payload on the SSD, a header block and then the parts that are present, packed; and where it may lie.

A record starts on a block (4096 bytes). Its first block is the header; then comes every maximal run of adjacent present
parts, each run starting on a block, so that a whole entry is one straight span. The header carries everything that is
needed to judge the bytes without any other file. Its checksum is seeded with a number of the directory and covers the
record's own place and generation, so that neither an older record, nor a copy, nor user bytes that look like a header
pass for a record; it is no defence against somebody who can read the directory.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import xxhash

from tiercache.model import ALIGN_BYTES, KEY_BYTES_MAX, PARTS_MAX, Form, Kind, Name, Payload, part_count

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

FORMAT_VERSION = 1
BLOCK_BYTES = ALIGN_BYTES
MAGIC = b"TCR\xa7"
_FRONT = struct.Struct("<4sHHQ")
_FACTS = struct.Struct("<IIIHBBBBBx32s32siIIQfII")
HEADER_BYTES_MAX = _FRONT.size + _FACTS.size + 8 * PARTS_MAX
assert HEADER_BYTES_MAX <= BLOCK_BYTES

_BLOCK_BITS = 20
_GENERATION_BITS = 23
SEGMENTS_MAX = 1 << 20
SEGMENT_BYTES_MAX = BLOCK_BYTES << _BLOCK_BITS
GENERATION_MASK = (1 << _GENERATION_BITS) - 1


def location_of(segment: int, generation: int, block: int) -> int:
    """The tier's own location: 20 bits of segment, 23 of generation, 20 of block, from the top; never negative."""
    return segment << (_BLOCK_BITS + _GENERATION_BITS) | (generation & GENERATION_MASK) << _BLOCK_BITS | block


def split_location(location: int) -> tuple[int, int, int]:
    """(segment, generation modulo 2^23, block) of a location."""
    return (
        location >> (_BLOCK_BITS + _GENERATION_BITS),
        location >> _BLOCK_BITS & GENERATION_MASK,
        location & ((1 << _BLOCK_BITS) - 1),
    )


def split_locations(
    locations: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The same for many at once."""
    return (
        locations >> (_BLOCK_BITS + _GENERATION_BITS),
        locations >> _BLOCK_BITS & GENERATION_MASK,
        locations & ((1 << _BLOCK_BITS) - 1),
    )


def blocks_of(size_bytes: int) -> int:
    """Blocks that so many bytes take."""
    return -(-size_bytes // BLOCK_BYTES)


@lru_cache(maxsize=1 << 14)
def runs_of(parts: int, part_bytes: int, size: int) -> tuple[tuple[int, int, int], ...]:
    """Maximal runs of adjacent present parts: (start, stop) in the entry, and the run's start behind the header."""
    runs: list[tuple[int, int, int]] = []
    at = 0
    part = 0
    while parts >> part:
        if not parts >> part & 1:
            part += 1
            continue
        first = part
        while parts >> part & 1:
            part += 1
        start, stop = first * part_bytes, min(size, part * part_bytes)
        runs.append((start, stop, at))
        at += blocks_of(stop - start) * BLOCK_BYTES
    return tuple(runs)


@lru_cache(maxsize=1 << 14)
def record_blocks(parts: int, part_bytes: int, size: int) -> int:
    """Blocks of a record, header included."""
    return 1 + sum(blocks_of(stop - start) for start, stop, _ in runs_of(parts, part_bytes, size))


@lru_cache(maxsize=1 << 14)
def pieces_of(wanted: int, parts: int, part_bytes: int, size: int) -> tuple[tuple[int, int, int, int], ...]:
    """Wanted parts one by one: (part, start in the entry, length, start behind the header); wanted is within parts."""
    pieces: list[tuple[int, int, int, int]] = []
    for start, stop, at in runs_of(parts, part_bytes, size):
        for part in range(start // part_bytes, max(start // part_bytes + 1, -(-stop // part_bytes))):
            if wanted >> part & 1:
                low = part * part_bytes
                pieces.append((part, low, min(stop, low + part_bytes) - low, at + low - start))
    return tuple(pieces)


def fits(payload: Payload) -> bool:
    """Whether a record can describe this payload at all."""
    count = part_count(payload.size, payload.part_bytes) if payload.part_bytes > 0 else 0
    return (
        0 < count <= PARTS_MAX
        and 0 < len(payload.name.key) <= KEY_BYTES_MAX
        and len(payload.parent) <= KEY_BYTES_MAX
        and len(payload.digests) == 8 * count
        and 0 <= payload.size < 1 << 32
        and 0 < payload.parts < 1 << count
    )


@dataclass(frozen=True, slots=True)
class Header:
    """What the header block of a record says, its checksum already verified."""

    segment: int
    generation: int
    block: int
    payload: Payload

    @property
    def blocks(self) -> int:
        """Length of the record in blocks."""
        return record_blocks(self.payload.parts, self.payload.part_bytes, self.payload.size)


def pack_header(payload: Payload, place: tuple[int, int, int], seed: int) -> bytes:
    """Header of a payload at (segment, generation, block); shorter than a block."""
    segment, generation, block = place
    body = _FACTS.pack(
        segment,
        generation,
        block,
        payload.scope,
        payload.form,
        payload.kind,
        len(payload.name.key),
        len(payload.parent),
        part_count(payload.size, payload.part_bytes),
        payload.name.key,
        payload.parent,
        payload.name.ordinal,
        payload.size,
        payload.part_bytes,
        payload.parts,
        payload.cost_s,
        min(payload.expiry_s, 0xFFFFFFFF),
        payload.tick & 0xFFFFFFFF,
    )
    body += payload.digests
    return _FRONT.pack(MAGIC, FORMAT_VERSION, len(body), xxhash.xxh3_64_intdigest(body, seed)) + body


def read_header(block: memoryview, seed: int) -> Header | None:
    """The header in a block, or None if there is none, or one that is damaged or of another directory."""
    magic, version, length, checksum = _FRONT.unpack_from(block)
    if magic != MAGIC or version != FORMAT_VERSION or not _FACTS.size <= length <= HEADER_BYTES_MAX - _FRONT.size:
        return None
    body = block[_FRONT.size : _FRONT.size + length]
    if xxhash.xxh3_64_intdigest(body, seed) != checksum:
        return None
    (
        segment,
        generation,
        at,
        scope,
        form,
        kind,
        width,
        parent_width,
        count,
        key,
        parent,
        ordinal,
        size,
        part_bytes,
        parts,
        cost_s,
        expiry_s,
        tick,
    ) = _FACTS.unpack_from(body)
    digests = bytes(body[_FACTS.size :])
    if len(digests) != 8 * count or form not in _FORMS or kind not in _KINDS:
        return None
    payload = Payload(
        Name(key[:width], ordinal),
        size,
        part_bytes,
        parts,
        digests,
        _KINDS[kind],
        parent[:parent_width],
        scope,
        cost_s,
        expiry_s,
        tick,
        _FORMS[form],
    )
    return Header(segment, generation, at, payload)


def check_header(
    block: memoryview, seed: int, place: tuple[int, int, int], parts: int
) -> tuple[bytes, int, int, int, bytes] | None:
    """What a read needs of the header of the record at `place` (segment, generation, block) with these parts: key,
    ordinal, size, part_bytes, digests. None if it is not that header. As read_header, in a third of its time."""
    magic, version, length, checksum = _FRONT.unpack_from(block)
    if magic != MAGIC or version != FORMAT_VERSION or not _FACTS.size <= length <= HEADER_BYTES_MAX - _FRONT.size:
        return None
    body = bytes(block[_FRONT.size : _FRONT.size + length])
    if xxhash.xxh3_64_intdigest(body, seed) != checksum:
        return None
    facts = _FACTS.unpack_from(body)
    if facts[:3] != place or facts[14] != parts or length != _FACTS.size + 8 * facts[8]:
        return None
    return facts[9][: facts[6]], facts[11], facts[12], facts[13], body[_FACTS.size :]


_FORMS = {int(form): form for form in Form}
_KINDS = {int(kind): kind for kind in Kind}
