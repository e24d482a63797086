"""The format of an arena segment: header, directory of table chunks, rows of the extent table.

A segment is one memory file of at most 1 GiB, in pages of 4096 bytes:

- page 0: the header (HEAD, little-endian), and from byte 256 the directory: the first page (u32) of every table chunk;
- table chunks of `chunk_bytes`, anywhere in the segment, each an array of ROW. Row r is in chunk r // rows a chunk;
- everything else: extents, each a whole number of pages, and free space.

A row describes one extent. Digests of parts 0..15 are in the row; further ones in rows of state MORE, chained by
`next`. `state` is written last when a row is made and first when it goes, `generation` grows when the extent is freed,
a chunk is zeroed before the directory shows it: so a process that maps the file after the owner's death finds each
extent whole or not at all. The byte order is little-endian everywhere.

Other processes read tables and extents while the owner changes them, without asking. What they may rely on:

- A location is told to others after its row was made, over a socket, which orders the row before the word of it.
- `generation` is one aligned word, written in one piece. It grows before the extent's pages and rows go back to be used
  again, and the owner's lock is given and taken in between, which orders the two for every other processor. So whoever
  copies, then calls `fence`, and then still finds the generation of his location has copied bytes, parts and digests of
  that extent alone. Nothing else in a row needs to be read in one piece.
- What a row says from its key to its form has a checksum, `check`: a stray write into a table hides an extent, it does
  not give its bytes another name.
- Within one generation only `parts`, the digests that are not covered by `parts` yet, `state` and `retired` change.
  Bytes come before their digests, digests before their bit in `parts`, with `fence` in between.
"""

from __future__ import annotations

import platform
import struct
import threading
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import xxhash

from tiercache.errors import ProtocolError
from tiercache.model import ALIGN_BYTES, PARTS_MAX, Form, Kind, Name, Payload, all_parts, part_count

if TYPE_CHECKING:
    import mmap
    from collections.abc import Iterator

MAGIC = b"TCARENA\n"
VERSION = 1

FREE, PENDING, PRESENT, MORE = range(4)
"""States of a row. PENDING: reserved, no part present yet. PRESENT: `parts` are there. MORE: digests of another row."""
LIVE = (PENDING, PRESENT)

ROW_BYTES = 256
ROW_DIGESTS = 16
"""Part digests that one row holds."""

ROW = np.dtype(
    [
        ("key", "u1", (32,)),
        ("parent", "u1", (32,)),
        ("size", "<u8"),
        ("offset_pages", "<u4"),
        ("length_pages", "<u4"),
        ("generation", "<u4"),
        ("ordinal", "<i4"),
        ("part_bytes", "<u4"),
        ("next", "<u4"),
        ("expiry_s", "<u4"),
        ("tick", "<u4"),
        ("cost_s", "<f4"),
        ("scope", "<u2"),
        ("width", "u1"),
        ("parent_width", "u1"),
        ("kind", "u1"),
        ("form", "u1"),
        ("retired", "u1"),
        ("state", "u1"),
        ("check", "<u4"),
        ("parts", "<u8"),
        ("digests", "<u8", (ROW_DIGESTS,)),
    ]
)
ROW_FIELDS = struct.Struct("<32s32sQIIIiIIIIfHBBBB")
"""What is said of an extent when its row is made, and covered by `check`: the fields of ROW in order, up to `form`."""

SHAPE = struct.Struct("<QIIIiI23xB4xQ")
"""What a copy must know, from SHAPE_AT on: size, offset_pages, length_pages, generation, ordinal, part_bytes, state,
parts."""

IDENTITY = struct.Struct("<32s64xI10xB2xBBB")
"""Whose a row is, and whether it may be read now: key, expiry_s, width, form, retired, state."""

SHAPE_AT, GENERATION_AT, NEXT_AT, WIDTH_AT = 64, 80, 92, 110
RETIRED_AT, STATE_AT, CHECK_AT, PARTS_AT, DIGESTS_AT = 114, 115, 116, 120, 128
END = 0xFFFFFFFF
"""`next` of the last row of a chain."""

HEAD = struct.Struct("<8sIIQIIII16s")
"""magic, version, row_bytes, segment_bytes, chunk_bytes, chunks, page_bytes, ordinal of the segment, arena id."""

CHUNKS_AT = struct.calcsize("<8sIIQI")
DIRECTORY_AT = 256
DIRECTORY_MAX = (ALIGN_BYTES - DIRECTORY_AT) // 4

assert ROW.itemsize == ROW_BYTES and ROW_FIELDS.size == RETIRED_AT and SHAPE_AT + SHAPE.size == DIGESTS_AT
assert IDENTITY.size == CHECK_AT


class Head(NamedTuple):
    """The header of a segment, checked."""

    segment_bytes: int
    chunk_bytes: int
    chunks: list[int]
    """Where each table chunk begins, in bytes."""
    ordinal: int
    arena_id: bytes


class Found(NamedTuple):
    """One valid extent of a segment's table. Digests of a PENDING one are undefined."""

    row: int
    generation: int
    offset: int
    length: int
    state: int
    retired: bool
    payload: Payload
    chain: tuple[int, ...]
    """The rows that hold its further digests."""


_STRONG = platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")
_digest = xxhash.xxh3_64_intdigest
_U32 = struct.Struct("<I")
_KINDS, _FORMS = tuple(Kind), tuple(Form)
_CHECKED = struct.Struct("<114s2xI")
_gates = threading.Lock(), threading.Lock()


def fence() -> None:
    """What this thread read or wrote before comes, for other processes, before what it reads or writes after.

    x86 keeps loads in order among loads and stores among stores, which is all that is needed here. Elsewhere nothing
    passes a release followed by an acquire; Python has both in its locks.
    """
    if not _STRONG:
        with _gates[0]:
            pass
        with _gates[1]:
            pass


def check_of(fields: bytes) -> int:
    """The checksum of a row's fields up to `form`."""
    return _digest(fields) & 0xFFFFFFFF


def intact(memory: mmap.mmap, at: int) -> bool:
    """Whether the row at `at` says what was said when it was made."""
    fields, check = _CHECKED.unpack_from(memory, at)
    same: bool = _digest(fields) & 0xFFFFFFFF == check
    return same


def chunk_bytes_for(segment_bytes: int) -> int:
    """Size of a table chunk such that the directory can hold a row for every page of the segment; a power of two."""
    chunk = ALIGN_BYTES
    while chunk * DIRECTORY_MAX < segment_bytes // ALIGN_BYTES * ROW_BYTES:
        chunk *= 2
    return chunk


def rows_for(parts: int) -> int:
    """Rows that an extent of so many parts takes."""
    return -(-parts // ROW_DIGESTS)


def read_head(memory: mmap.mmap | memoryview) -> Head:
    """Header and directory. Raises ProtocolError where they are not of a segment that this version understands."""
    length = len(memory)
    if length < ALIGN_BYTES:
        raise ProtocolError(f"an arena segment of {length} bytes is too short for its header")
    (magic, version, row_bytes, segment_bytes, chunk_bytes, chunks, page_bytes, ordinal,
     arena_id) = HEAD.unpack_from(memory)  # fmt: skip
    if magic != MAGIC:
        raise ProtocolError("this memory is not an arena segment of tiercache")
    if version != VERSION or row_bytes != ROW_BYTES or page_bytes != ALIGN_BYTES:
        raise ProtocolError(f"the arena segment has format {version}, this tiercache reads format {VERSION}")
    if segment_bytes != length or chunk_bytes != chunk_bytes_for(segment_bytes) or chunks > DIRECTORY_MAX:
        raise ProtocolError(f"the header of the arena segment is damaged: {segment_bytes=} {chunk_bytes=} {chunks=}")
    firsts = struct.unpack_from(f"<{chunks}I", memory, DIRECTORY_AT)
    if any(not 0 < first <= (segment_bytes - chunk_bytes) // ALIGN_BYTES for first in firsts):
        raise ProtocolError("the directory of the arena segment is damaged")
    return Head(segment_bytes, chunk_bytes, [first * ALIGN_BYTES for first in firsts], ordinal, arena_id)


def read_rows(memory: mmap.mmap | memoryview) -> np.ndarray[tuple[int], np.dtype[np.void]]:
    """A copy of all rows of a segment's table, free ones too. Raises ProtocolError as `read_head`."""
    head = read_head(memory)
    rows = [np.frombuffer(memory, ROW, head.chunk_bytes // ROW_BYTES, at) for at in head.chunks]
    return np.concatenate(rows) if rows else np.empty(0, ROW)


def read_table(memory: mmap.mmap | memoryview, *, pending: bool = False) -> Iterator[Found]:
    """Valid extents of a segment, by address; PENDING ones only if asked for. A row is left out that fails its check,
    contradicts itself, or lies about a place that is another's, or the table's.

    Presence is all it vouches for: whoever adopts the extents hashes their bytes before anybody else reads them.
    """
    head = read_head(memory)
    rows = read_rows(memory)
    taken = sorted([(0, 1)] + [(at // ALIGN_BYTES, head.chunk_bytes // ALIGN_BYTES) for at in head.chunks])
    if any(one[0] + one[1] > other[0] for one, other in pairwise(taken)):
        raise ProtocolError("the directory of the arena segment is damaged: chunks of the table overlap")
    pages = head.segment_bytes // ALIGN_BYTES
    taken.append((pages, 0))
    candidates = np.flatnonzero((rows["state"] == PRESENT) | (rows["state"] == PENDING) & pending)
    raw = rows.tobytes()
    used: set[int] = set()
    free_from = table = 0
    for row in candidates[np.argsort(rows["offset_pages"][candidates], kind="stable")].tolist():
        found = _found(raw, row)
        if found is None or not used.isdisjoint(found.chain):
            continue
        first, last = found.offset // ALIGN_BYTES, (found.offset + found.length) // ALIGN_BYTES
        while table + 1 < len(taken) and sum(taken[table]) <= first:
            table += 1
        if first < free_from or last > taken[table][0]:
            continue
        free_from = last
        used.update(found.chain)
        yield found


def _found(rows: bytes, row: int) -> Found | None:
    """The extent that a chain of rows describes; None where it contradicts itself."""
    at = row * ROW_BYTES
    fields, check = _CHECKED.unpack_from(rows, at)
    if check_of(fields) != check:
        return None
    (key, parent, size, page, pages, generation, ordinal, part_bytes, following, expiry_s, tick, cost_s, scope, width,
     parent_width, kind, form) = ROW_FIELDS.unpack(fields)  # fmt: skip
    _, _, _, _, _, _, state, parts = SHAPE.unpack_from(rows, at + SHAPE_AT)
    if width not in (16, 32) or parent_width not in (0, 16, 32) or kind >= len(_KINDS) or form >= len(_FORMS):
        return None
    if not part_bytes or part_count(size, part_bytes) > PARTS_MAX or not 0 < pages * ALIGN_BYTES >= size:
        return None
    if (state == PRESENT and not parts) or parts & ~all_parts(size, part_bytes):
        return None
    count = part_count(size, part_bytes)
    digests = rows[at + DIGESTS_AT : at + ROW_BYTES]
    chain: list[int] = []
    for _ in range(rows_for(count) - 1):
        start = following * ROW_BYTES
        if start >= len(rows) or rows[start + STATE_AT] != MORE or following in chain:
            return None
        chain.append(following)
        digests += rows[start + DIGESTS_AT : start + ROW_BYTES]
        (following,) = _U32.unpack_from(rows, start + NEXT_AT)
    payload = Payload(
        Name(key[:width], ordinal), size, part_bytes, parts, masked_digests(digests, parts, count), _KINDS[kind],
        parent[:parent_width], scope, cost_s, expiry_s, tick, _FORMS[form],
    )  # fmt: skip
    retired = bool(rows[at + RETIRED_AT])
    return Found(row, generation, page * ALIGN_BYTES, pages * ALIGN_BYTES, state, retired, payload, tuple(chain))


def masked_digests(digests: bytes, parts: int, count: int) -> bytes:
    """Digests of `count` parts in the Payload layout, with zeros where the part is not in the map."""
    if parts == (1 << count) - 1:
        return digests[: count * 8]
    zero = bytes(8)
    return b"".join([digests[i * 8 : i * 8 + 8] if parts >> i & 1 else zero for i in range(count)])
