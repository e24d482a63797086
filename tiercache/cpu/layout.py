"""The format of an arena segment: header, directory of table chunks, rows of the extent table.

A segment is one memory file of at most 1 GiB, in pages of 4096 bytes:

- page 0: the header (HEAD, little-endian), and from byte 256 the directory: the first page (u32) of every table chunk;
- table chunks of `chunk_bytes`, anywhere in the segment, each an array of ROW. Row r is in chunk r // rows a chunk;
- everything else: extents, each a whole number of pages, and free space.

A row describes one extent. Digests of parts 0..15 are in the row; further ones in rows of state MORE, chained by
`next`. `state` is written last when a row is made and first when it goes, `generation` grows when the extent is freed,
a chunk is zeroed before the directory shows it: so a process that maps the file after the owner's death finds each
extent whole or not at all. The byte order is little-endian everywhere.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tiercache.errors import ProtocolError
from tiercache.model import ALIGN_BYTES, Form, Kind, Name, Payload, all_parts, part_count

if TYPE_CHECKING:
    import mmap
    from collections.abc import Iterator

MAGIC = b"TCARENA\n"
VERSION = 1

FREE, PENDING, PRESENT, MORE = range(4)
"""States of a row. PENDING: reserved, no part present yet. PRESENT: `parts` are there. MORE: digests of another row."""

ROW_BYTES = 256
ROW_DIGESTS = 16
"""Part digests that one row holds."""

ROW = np.dtype(
    [
        ("key", "u1", (32,)),
        ("parent", "u1", (32,)),
        ("size", "<u8"),
        ("parts", "<u8"),
        ("offset_pages", "<u4"),
        ("length_pages", "<u4"),
        ("generation", "<u4"),
        ("ordinal", "<i4"),
        ("part_bytes", "<u4"),
        ("next", "<u4"),
        ("client", "<u4"),
        ("expiry_s", "<u4"),
        ("tick", "<u4"),
        ("cost_s", "<f4"),
        ("scope", "<u2"),
        ("width", "u1"),
        ("parent_width", "u1"),
        ("kind", "u1"),
        ("form", "u1"),
        ("reserved", "u1"),
        ("state", "u1"),
        ("digests", "<u8", (ROW_DIGESTS,)),
    ]
)
ROW_FIELDS = struct.Struct("<32s32sQQIIIiIIIIIfHBBBBBB")
"""The row without its digests, as one write; the fields of ROW in order."""

SHAPE = struct.Struct("<QQIIIiI")
"""What a copy must know, from SHAPE_AT on: size, parts, offset_pages, length_pages, generation, ordinal, part_bytes."""

SHAPE_AT, PARTS_AT, GENERATION_AT, NEXT_AT, WIDTH_AT, STATE_AT, DIGESTS_AT = 64, 72, 88, 100, 122, 127, 128
END = 0xFFFFFFFF
"""`next` of the last row of a chain."""

HEAD = struct.Struct("<8sIIQIIII16s")
"""magic, version, row_bytes, segment_bytes, chunk_bytes, chunks, page_bytes, ordinal of the segment, arena id."""

CHUNKS_AT = struct.calcsize("<8sIIQI")
DIRECTORY_AT = 256
DIRECTORY_MAX = (ALIGN_BYTES - DIRECTORY_AT) // 4

assert ROW.itemsize == ROW_BYTES and ROW_FIELDS.size == DIGESTS_AT and ROW.fields is not None
assert ROW.fields["state"][1] == STATE_AT and ROW.fields["size"][1] == SHAPE_AT and ROW.fields["next"][1] == NEXT_AT


class Found(NamedTuple):
    """One valid extent of a segment's table."""

    row: int
    generation: int
    offset: int
    length: int
    client: int
    payload: Payload


def chunk_bytes_for(segment_bytes: int) -> int:
    """Size of a table chunk such that the directory can hold a row for every page of the segment; a power of two."""
    chunk = ALIGN_BYTES
    while chunk * DIRECTORY_MAX < segment_bytes // ALIGN_BYTES * ROW_BYTES:
        chunk *= 2
    return chunk


def rows_for(parts: int) -> int:
    """Rows that an extent of so many parts takes."""
    return -(-parts // ROW_DIGESTS)


def read_rows(memory: mmap.mmap | memoryview) -> np.ndarray[tuple[int], np.dtype[np.void]]:
    """A copy of all rows of a segment's table, free ones too.

    Raises ProtocolError where the header is not that of a segment this version understands.
    """
    span = memoryview(memory)
    if span.nbytes < ALIGN_BYTES:
        raise ProtocolError(f"an arena segment of {span.nbytes} bytes is too short for its header")
    magic, version, row_bytes, segment_bytes, chunk_bytes, chunks, page_bytes, _, _ = HEAD.unpack_from(span)
    if magic != MAGIC:
        raise ProtocolError("this memory is not an arena segment of tiercache")
    if version != VERSION or row_bytes != ROW_BYTES or page_bytes != ALIGN_BYTES:
        raise ProtocolError(f"the arena segment has format {version}, this tiercache reads format {VERSION}")
    if segment_bytes != span.nbytes or chunks > DIRECTORY_MAX or chunk_bytes % ALIGN_BYTES or not chunk_bytes:
        raise ProtocolError(f"the header of the arena segment is damaged: {segment_bytes=} {chunk_bytes=} {chunks=}")
    firsts = struct.unpack_from(f"<{chunks}I", span, DIRECTORY_AT)
    if any(not 0 < first <= (segment_bytes - chunk_bytes) // ALIGN_BYTES for first in firsts):
        raise ProtocolError("the directory of the arena segment is damaged")
    rows = [np.frombuffer(span, ROW, chunk_bytes // ROW_BYTES, first * ALIGN_BYTES) for first in firsts]
    return np.concatenate(rows) if rows else np.empty(0, ROW)


def read_table(memory: mmap.mmap | memoryview) -> Iterator[Found]:
    """Valid extents of a segment, by address. A row that contradicts itself, or another's place, is left out.

    Presence is all it vouches for: whoever adopts the extents hashes their bytes before anybody else reads them.
    """
    rows = read_rows(memory)
    pages = memoryview(memory).nbytes // ALIGN_BYTES
    candidates = np.flatnonzero(rows["state"] == PRESENT)
    free_from = 1
    for row in candidates[np.argsort(rows["offset_pages"][candidates], kind="stable")].tolist():
        fields = rows[row]
        offset, length = int(fields["offset_pages"]), int(fields["length_pages"])
        payload = _payload(rows, row)
        if payload is None or offset < free_from or offset + length > pages or payload.size > length * ALIGN_BYTES:
            continue
        free_from = offset + length
        yield Found(
            row, int(fields["generation"]), offset * ALIGN_BYTES, length * ALIGN_BYTES, int(fields["client"]), payload
        )


def _payload(rows: np.ndarray[tuple[int], np.dtype[np.void]], row: int) -> Payload | None:
    """The payload that a chain of rows describes; None where it contradicts itself."""
    fields = rows[row]
    size, part_bytes, parts = int(fields["size"]), int(fields["part_bytes"]), int(fields["parts"])
    width, parent_width, kind = int(fields["width"]), int(fields["parent_width"]), int(fields["kind"])
    if width not in (16, 32) or parent_width not in (0, 16, 32):
        return None
    if kind not in Kind.__members__.values() or int(fields["form"]) not in Form.__members__.values():
        return None
    if not part_bytes or part_count(size, part_bytes) > 64 or not parts or parts & ~all_parts(size, part_bytes):
        return None
    count = part_count(size, part_bytes)
    digests = fields["digests"].tobytes()
    at = row
    for _ in range(rows_for(count) - 1):
        at = int(rows[at]["next"])
        if at >= len(rows) or int(rows[at]["state"]) != MORE:
            return None
        digests += rows[at]["digests"].tobytes()
    return Payload(
        Name(fields["key"].tobytes()[:width], int(fields["ordinal"])),
        size,
        part_bytes,
        parts,
        masked_digests(digests, parts, count),
        Kind(kind),
        fields["parent"].tobytes()[:parent_width],
        int(fields["scope"]),
        float(fields["cost_s"]),
        int(fields["expiry_s"]),
        int(fields["tick"]),
        Form(int(fields["form"])),
    )


def masked_digests(digests: bytes, parts: int, count: int) -> bytes:
    """Digests of `count` parts in the Payload layout, with zeros where the part is not in the map."""
    if parts == (1 << count) - 1:
        return digests[: count * 8]
    zero = bytes(8)
    return b"".join([digests[i * 8 : i * 8 + 8] if parts >> i & 1 else zero for i in range(count)])
