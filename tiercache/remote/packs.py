"""Packs: how many blocks lie in one object, and how some of them are read back.

A pack is written once, whole: a head, then records (a header with key, shape and digests, then all bytes of the entry),
then a table with one row a record, then a tail that says where the table is. So a pack explains itself; the table's
rows are what index snapshots repeat (snapshots.py). A row is a hint, the record's header is the truth: it is read with
the bytes and judged first. Checksums are seeded with the name of the object, so that no record of another pack, and no
older one, passes for a record of this one; they are no defence against somebody who can write to the bucket.

Everything here is pure, but for copying bytes.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import xxhash

from tiercache.buffers import Buffer, copy, copy_verified, runs, verify_parts
from tiercache.errors import CorruptionError
from tiercache.model import KEY_BYTES_MAX, PARTS_MAX, Form, Kind, Name, Outcome, Payload, all_parts, part_count

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    Rows = npt.NDArray[np.void]

VERSION = 1
MAGIC = b"TCP\xa7"
_HEAD = struct.Struct("<4sHHQ")
HEAD_BYTES = 32
_FRONT = struct.Struct("<4sHHQ")  # magic, version, parts, checksum of all that follows in the header
_FACTS = struct.Struct("<IIBBBBHfI32s32s")
_TAIL = struct.Struct("<4sHHIQQ16s")  # magic, version, -, rows, where the table is, bytes of the pack, xxh3-128
TAIL_BYTES = _TAIL.size
ROW = np.dtype(
    [
        ("key", "V32"),
        ("parent", "V32"),
        ("offset", "<u8"),
        ("size", "<u4"),
        ("part_bytes", "<u4"),
        ("cost_s", "<f4"),
        ("expiry_s", "<u4"),
        ("scope", "<u2"),
        ("width", "u1"),
        ("parent_width", "u1"),
        ("kind", "u1"),
        ("form", "u1"),
    ]
)
"""One record as tables and snapshots list it; `offset` is where its header starts in the pack."""
ROWS_MAX = 1 << 20
"""Rows of one table or snapshot; more is damage."""
GAP_BYTES = 64 << 10
"""Bytes between two wanted stretches that are fetched too, to save a request."""
REQUEST_BYTES = 8 << 20
"""Stretches are merged into requests of at most this; what is longer in one piece is asked for as it is."""


class Want(NamedTuple):
    """Parts of one record of a pack to be read."""

    payload: Payload
    """As its row has it; `parts` are those wanted."""
    offset: int


class Span(NamedTuple):
    """A stretch [start, stop) of a pack to be fetched in one request."""

    start: int
    stop: int


def seed_of(key: str) -> int:
    """What the checksums of an object are seeded with."""
    return int(xxhash.xxh3_64_intdigest(key.encode()))


def header_bytes(size: int, part_bytes: int) -> int:
    """Length of the header before an entry."""
    return _FRONT.size + _FACTS.size + 8 * part_count(size, part_bytes)


def record_bytes(size: int, part_bytes: int) -> int:
    """Bytes of a pack that one entry takes, its row in the table included."""
    return header_bytes(size, part_bytes) + size + ROW.itemsize


def pack_bytes(payloads: Sequence[Payload]) -> int:
    """Size of a pack of these, in bytes."""
    return HEAD_BYTES + sum(record_bytes(one.size, one.part_bytes) for one in payloads) + TAIL_BYTES


def encode(key: str, payloads: Sequence[Payload], sources: Sequence[Buffer]) -> tuple[bytearray, Rows]:
    """A pack with the name `key` of whole entries, and its rows. What has not its digests any more is left out: then
    there are fewer rows. The GIL is released while bytes move."""
    pack = bytearray(pack_bytes(payloads))
    target = Buffer.of(pack, writable=True)
    seed, at = seed_of(key), HEAD_BYTES
    _HEAD.pack_into(pack, 0, MAGIC, VERSION, 0, seed)
    rows = np.zeros(len(payloads), ROW)
    count = 0
    for payload, source in zip(payloads, sources, strict=True):
        header = _header(payload, seed)
        parts = all_parts(payload.size, payload.part_bytes)
        body = target.slice(at + len(header), payload.size)
        if not copy_verified(source, body, payload.part_bytes, parts, payload.digests):
            continue
        pack[at : at + len(header)] = header
        rows[count] = _row(payload, at)
        count, at = count + 1, at + len(header) + payload.size
    rows = rows[:count]
    table = rows.tobytes()
    pack[at : at + len(table)] = table
    end = at + len(table) + TAIL_BYTES
    facts = (MAGIC, VERSION, 0, count, at, end)
    digest = xxhash.xxh3_128_digest(table + _TAIL.pack(*facts, bytes(16)), seed)
    _TAIL.pack_into(pack, end - TAIL_BYTES, *facts, digest)
    return pack if end == len(pack) else pack[:end], rows


def _header(payload: Payload, seed: int) -> bytes:
    name, parent = payload.name.key, payload.parent
    facts = _FACTS.pack(
        payload.size,
        payload.part_bytes,
        payload.kind,
        payload.form,
        len(name),
        len(parent),
        payload.scope,
        payload.cost_s,
        payload.expiry_s,
        name,
        parent,
    )
    rest = facts + payload.digests
    count = part_count(payload.size, payload.part_bytes)
    return _FRONT.pack(MAGIC, VERSION, count, xxhash.xxh3_64_intdigest(rest, seed)) + rest


def _row(payload: Payload, offset: int) -> tuple[object, ...]:
    name, parent = payload.name.key, payload.parent
    return (
        name.ljust(KEY_BYTES_MAX, b"\0"), parent.ljust(KEY_BYTES_MAX, b"\0"), offset, payload.size,
        payload.part_bytes, payload.cost_s, payload.expiry_s, payload.scope, len(name), len(parent),
        payload.kind, payload.form,
    )  # fmt: skip


def key_of(row: np.void) -> bytes:
    """The key of a row."""
    return bytes(row["key"])[: int(row["width"])]


def keys_of(rows: Rows) -> list[bytes]:
    """The keys of rows."""
    table, widths = np.ascontiguousarray(rows["key"]).tobytes(), rows["width"].tolist()
    return [table[i * KEY_BYTES_MAX : i * KEY_BYTES_MAX + width] for i, width in enumerate(widths)]


def payload_of(row: np.void, parts: int | None = None) -> Payload:
    """What a row says of its record, with all parts or those given, and without digests."""
    size, part_bytes = int(row["size"]), int(row["part_bytes"])
    return Payload(
        name=Name(key_of(row)),
        size=size,
        part_bytes=part_bytes,
        parts=all_parts(size, part_bytes) if parts is None else parts,
        digests=b"",
        kind=Kind(int(row["kind"])),
        parent=bytes(row["parent"])[: int(row["parent_width"])],
        scope=int(row["scope"]),
        cost_s=float(row["cost_s"]),
        expiry_s=int(row["expiry_s"]),
        form=Form(int(row["form"])),
    )


def table_span(key: str, tail: bytes | memoryview, size: int) -> Span:
    """Where the table of a pack of `size` bytes lies, tail included. CorruptionError where its last TAIL_BYTES are no
    tail."""
    magic, version, _, count, at, end, _ = _TAIL.unpack(bytes(tail))
    if magic != MAGIC or version != VERSION or end != size or count > ROWS_MAX:
        raise CorruptionError(f"{key} is no pack of version {VERSION}")
    if at + count * ROW.itemsize + TAIL_BYTES != size or at < HEAD_BYTES:
        raise CorruptionError(f"{key} is a pack of another length")
    return Span(at, size)


def decode_table(key: str, table: bytes | memoryview) -> Rows:
    """The rows of a table, of which `table` is all bytes and the tail. CorruptionError where a checksum differs or a
    row cannot be."""
    data = bytes(table)
    magic, version, zero, count, at, end, digest = _TAIL.unpack(data[-TAIL_BYTES:])
    facts = _TAIL.pack(magic, version, zero, count, at, end, bytes(16))
    if xxhash.xxh3_128_digest(data[:-TAIL_BYTES] + facts, seed_of(key)) != digest:
        raise CorruptionError(f"the table of {key} is damaged")
    return check_rows(np.frombuffer(data, ROW, count), key, at)


def check_rows(rows: Rows, key: str, end: int) -> Rows:
    """The rows, if each of them can be one of a pack whose records end at `end`; else CorruptionError. Checksums hold
    what was written: this holds what other versions, and other programs, may write."""
    steps, sizes = rows["part_bytes"].astype(np.int64), rows["size"].astype(np.int64)
    good = (steps > 0) & np.isin(rows["width"], (16, 32)) & np.isin(rows["parent_width"], (0, 16, 32))
    good &= np.isin(rows["kind"], list(Kind)) & np.isin(rows["form"], list(Form)) & np.isfinite(rows["cost_s"])
    good &= sizes <= steps * PARTS_MAX
    offsets = rows["offset"].astype(np.int64)
    good &= (offsets >= HEAD_BYTES) & (offsets + sizes < end)
    if not good.all():
        raise CorruptionError(f"{key} lists records that cannot be")
    return rows


# -- reading -----------------------------------------------------------------------------------------------------------


def spans_of(want: Want) -> list[Span]:
    """Stretches of a pack that hold a record's header and its wanted parts, in order; adjacent ones are one."""
    one = want.payload
    body = want.offset + header_bytes(one.size, one.part_bytes)
    found = [Span(want.offset, body)]
    for first, last in runs(one.parts):
        start, stop = body + first * one.part_bytes, body + min(one.size, last * one.part_bytes)
        if start == found[-1].stop:
            found[-1] = Span(found[-1].start, stop)
        else:
            found.append(Span(start, stop))
    return found


def plan(wants: Sequence[Want], gap_bytes: int = GAP_BYTES, request_bytes: int = REQUEST_BYTES) -> list[Span]:
    """Requests that bring all stretches of `wants` of one pack: near ones together, none cut in two."""
    found: list[Span] = []
    for start, stop in sorted(span for want in wants for span in spans_of(want)):
        if (
            found
            and start <= found[-1].stop + gap_bytes
            and max(stop, found[-1].stop) - found[-1].start <= request_bytes
        ):
            found[-1] = Span(found[-1].start, max(stop, found[-1].stop))
        else:
            found.append(Span(start, stop))
    return found


def land(key: str, want: Want, pieces: Sequence[tuple[int, memoryview]], target: Buffer) -> tuple[Outcome, bytes]:
    """Judges a record's header, copies its wanted parts to their places in `target` (the extent of the whole entry)
    and hashes them there: HIT and the record's digests; CORRUPT where anything differs; MISS where a stretch did not
    come. `pieces` are (start in the pack, bytes), in order. After anything but a HIT those parts are undefined."""
    one = want.payload
    length = header_bytes(one.size, one.part_bytes)
    body = want.offset + length
    header = _cut(pieces, Span(want.offset, body))
    if header is None:
        return Outcome.MISS, b""
    digests = _digests(bytes(header), one, seed_of(key))
    if digests is None:
        return Outcome.CORRUPT, b""
    for first, last in runs(one.parts):
        start, stop = first * one.part_bytes, min(one.size, last * one.part_bytes)
        found = _cut(pieces, Span(body + start, body + stop))
        if found is None:
            return Outcome.MISS, b""
        copy(Buffer.of(found), target.slice(start, stop - start))
    good = verify_parts(target, one.part_bytes, one.parts, digests)
    return (Outcome.HIT, digests) if good else (Outcome.CORRUPT, b"")


def unpack(key: str, data: memoryview, rows: Rows) -> list[tuple[Payload, Buffer]]:
    """The records of a whole pack that these rows speak of, with their digests; those whose header is damaged are left
    out, and the others' bytes are not compared yet."""
    found: list[tuple[Payload, Buffer]] = []
    for row in rows:
        one, offset = payload_of(row), int(row["offset"])
        body = offset + header_bytes(one.size, one.part_bytes)
        digests = _digests(bytes(data[offset:body]), one, seed_of(key))
        if digests is not None and body + one.size <= len(data):
            found.append((replace(one, digests=digests), Buffer.of(data[body : body + one.size])))
    return found


def _digests(header: bytes, row: Payload, seed: int) -> bytes | None:
    """The digests in a header, if it is that of the record that the row speaks of."""
    magic, version, count, checksum = _FRONT.unpack_from(header)
    if magic != MAGIC or version != VERSION or count != part_count(row.size, row.part_bytes):
        return None
    if xxhash.xxh3_64_intdigest(header[_FRONT.size :], seed) != checksum:
        return None
    size, part_bytes, _, form, width, parent_width, _, _, _, name, parent = _FACTS.unpack_from(header, _FRONT.size)
    same = (size, part_bytes, form) == (row.size, row.part_bytes, row.form)
    if not same or name[:width] != row.name.key or parent[:parent_width] != row.parent:
        return None
    return header[_FRONT.size + _FACTS.size :]


def _cut(pieces: Sequence[tuple[int, memoryview]], span: Span) -> memoryview | None:
    """A stretch out of what was fetched; a request holds it whole (see `plan`)."""
    for start, data in pieces:
        if start <= span.start and span.stop <= start + len(data):
            return data[span.start - start : span.stop - start]
    return None
