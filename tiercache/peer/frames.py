"""Frames: the messages between the caches of two machines; pure encoding, no sockets.

A frame is a header (HEADER, little-endian: length of the body, operation, number) and a body. Numbers belong to
whoever asks; an answer carries the number of its question, and what asks for nothing carries 0. A body is believed only
after it was taken apart here: whatever does not fit raises ProtocolError, and the channel that it came by is closed.
Both ends speak VERSION, or shake hands and part.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

from tiercache.errors import ProtocolError
from tiercache.model import PARTS_MAX, Form, Kind, Name, Outcome, Payload, all_parts, part_count

if TYPE_CHECKING:
    from collections.abc import Sequence

VERSION = 1
BODY_BYTES_MAX = 16 << 20
ITEMS_MAX = 4096
"""Entries of one question or offer."""
OFFSET_MAX = 1 << 62
COST_S_MAX = 1e38
"""What a float of 32 bits has room for, and more than anything costs."""
MARKS_MAX = 1 << 13
"""Marks of one announcement: no loop is held up for longer than some 2 ms by it."""
HEADER = struct.Struct("<IHHQ")
"""length of the body, operation, reserved (0), number."""


class Op(IntEnum):
    """What a frame is for."""

    HELLO = 1
    PROVE = 2
    READY = 3
    PULSE = 4
    """I live; with how much is free. One way."""
    STORED = 5
    """I have these. One way."""
    WANT = 6
    """What do you have of these? Pins it."""
    HELD = 7
    PUSH = 8
    """Write parts of what is pinned to a place of mine."""
    PUSHED = 9
    DONE = 10
    """A pin is over: the bytes have come, or will not. One way."""
    OFFER = 11
    """I pinned these for you."""
    TAKEN = 12
    FAULT = 13
    """The answer to a question that failed: text."""
    ABOUT = 15
    """What only peers are told of me, once they have proven that they are; before READY."""
    MEMORY = 14
    """What you need to reach memory of mine; before the first entry that lies there. One way."""


class Frame(NamedTuple):
    """One message, its body still packed."""

    op: int
    number: int
    body: bytes


def pack(op: Op, number: int, body: bytes = b"") -> bytes:
    """One frame."""
    if len(body) > BODY_BYTES_MAX:
        raise ProtocolError(f"a message of {len(body)} bytes is over {BODY_BYTES_MAX}: ask in smaller batches")
    return HEADER.pack(len(body), op, 0, number) + body


def unpack_header(head: bytes) -> tuple[int, int, int]:
    """Length, operation and number. Raises ProtocolError on an impossible one."""
    length, op, reserved, number = HEADER.unpack(head)
    if length > BODY_BYTES_MAX or reserved:
        raise ProtocolError(f"not a message: {length} bytes, operation {op}")
    return length, op, number


class Place(NamedTuple):
    """Where an entry lies in memory that its holder exposes."""

    region: int
    """The holder's number of that memory; negative: nowhere."""
    offset: int = 0


class Item(NamedTuple):
    """One entry of a HELD or an OFFER."""

    payload: Payload | None
    """None: it is not there, or (LATER) there is no room for it now."""
    place: Place = Place(-1)


NOT_THERE, LATER = Item(None), Item(None, Place(-2))


class Held(NamedTuple):
    """What is pinned under a number."""

    pin: int
    items: list[Item]
    urgent: bool = False
    """Of an OFFER: somebody there is about to want it, so room is made."""


class Pushing(NamedTuple):
    """One piece of a stream: bytes [start, stop) of item `item` of a pin."""

    item: int
    start: int
    stop: int


_WANT = struct.Struct("<32sQiB3x")
"""key, parts, ordinal, width of the key"""
_ITEM = struct.Struct("<32s32sQQIIIfIiHBBBBH")
"""key, parent, parts, offset, size, part_bytes, expiry_s, cost_s, region + 1, ordinal, scope, form, kind, widths of key
and parent, digests"""
_PIN = struct.Struct("<QIB3x")
_REGION = struct.Struct("<I")
_PUSH = struct.Struct("<QIIQ")
"""pin, pieces, region, offset"""
_PIECE = struct.Struct("<III")
_WIDTHS = (16, 32)


class _Reader:
    """Takes a body apart, and never reads beyond it."""

    def __init__(self, body: bytes) -> None:
        self._body, self._at = body, 0

    def take(self, shape: struct.Struct) -> tuple[int, ...]:
        if self._at + shape.size > len(self._body):
            raise ProtocolError("a message ends too early")
        found = shape.unpack_from(self._body, self._at)
        self._at += shape.size
        return found

    def bytes(self, count: int) -> bytes:
        if self._at + count > len(self._body):
            raise ProtocolError("a message ends too early")
        self._at += count
        return self._body[self._at - count : self._at]

    def end(self) -> None:
        if self._at != len(self._body):
            raise ProtocolError(f"{len(self._body) - self._at} bytes too many in a message")


def pack_want(names: Sequence[Name], parts: Sequence[int], priority: int) -> bytes:
    """A WANT: a map of parts for each name."""
    rows = [_WANT.pack(key, wanted, ordinal, len(key)) for (key, ordinal), wanted in zip(names, parts, strict=True)]
    return bytes([priority]) + b"".join(rows)


def unpack_want(body: bytes) -> tuple[list[Name], list[int], int]:
    """Undoes pack_want."""
    if len(body) % _WANT.size != 1 or len(body) > 1 + ITEMS_MAX * _WANT.size:
        raise ProtocolError(f"{len(body)} bytes are no question for entries")
    names, maps = [], []
    for key, parts, ordinal, width in _WANT.iter_unpack(body[1:]):
        if width not in _WIDTHS or ordinal < 0:
            raise ProtocolError(f"a name with a key of {width} bytes and ordinal {ordinal}")
        names.append(Name(key[:width], ordinal))
        maps.append(parts)
    return names, maps, body[0]


def pack_held(held: Held) -> bytes:
    """A HELD or an OFFER."""
    rows = [_PIN.pack(held.pin, len(held.items), held.urgent)]
    for one, place in held.items:
        if one is None:
            rows.append(_NO_ROOM if place == LATER.place else _NOTHING)
            continue
        digests = one.digests[: 8 * one.parts.bit_length()]
        rows.append(
            _ITEM.pack(
                one.name.key, one.parent, one.parts, place.offset, one.size, one.part_bytes, one.expiry_s,
                min(one.cost_s, COST_S_MAX),
                place.region + 1, one.name.ordinal, one.scope, one.form, one.kind, len(one.name.key), len(one.parent),
                len(digests) // 8,
            )
        )  # fmt: skip
        rows.append(digests)
    return b"".join(rows)


_NOTHING = bytes(_ITEM.size)
_NO_ROOM = _ITEM.pack(b"", b"", 1, 0, 0, 0, 0, 0.0, 0, 0, 0, 0, 0, 0, 0, 0)


def unpack_held(body: bytes) -> Held:
    """Undoes pack_held."""
    reader = _Reader(body)
    pin, count, urgent = reader.take(_PIN)
    if count > ITEMS_MAX:
        raise ProtocolError(f"{count} entries in one answer")
    items = [_item(reader) for _ in range(count)]
    reader.end()
    return Held(pin, items, bool(urgent))


def pack_memory(region: int, descriptor: bytes) -> bytes:
    """A MEMORY."""
    return _REGION.pack(region) + descriptor


def unpack_memory(body: bytes) -> tuple[int, bytes]:
    """Undoes pack_memory: the number of the region, and its descriptor."""
    reader = _Reader(body)
    (region,) = reader.take(_REGION)
    return region, body[_REGION.size :]


def _item(reader: _Reader) -> Item:
    row = reader.take(_ITEM)
    key, parent, parts, offset, size, step, expiry_s, cost_s, region, ordinal, scope, form, kind, width, above, rows = (
        row
    )
    if not width:
        return LATER if parts else NOT_THERE
    if width not in _WIDTHS or above not in (0, *_WIDTHS) or ordinal < 0 or region < 0 or offset > OFFSET_MAX:
        raise ProtocolError("an entry with an impossible name or place")
    if not size or not step or part_count(size, step) > PARTS_MAX or not 0 < parts <= all_parts(size, step):
        raise ProtocolError(f"an entry of {size} bytes in parts of {step}, of which {parts:#x}")
    if rows != parts.bit_length() or not 0 <= cost_s < float("inf"):
        raise ProtocolError(f"an entry with {rows} digests and a cost of {cost_s} s")
    try:
        kinds = Kind(kind), Form(form)
    except ValueError as error:
        raise ProtocolError(str(error)) from None
    name = Name(bytes(key)[:width], ordinal)
    payload = Payload(
        name, size, step, parts, reader.bytes(8 * rows), kinds[0], bytes(parent)[:above],
        scope, float(cost_s), expiry_s, 0, kinds[1],
    )  # fmt: skip
    return Item(payload, Place(region - 1, offset))


def pack_push(pin: int, region: int, offset: int, pieces: Sequence[Pushing]) -> bytes:
    """A PUSH: the pieces go one after the other to `offset` of the asker's region."""
    return _PUSH.pack(pin, len(pieces), region, offset) + b"".join([_PIECE.pack(*one) for one in pieces])


def unpack_push(body: bytes) -> tuple[int, int, int, list[Pushing]]:
    """Undoes pack_push: pin, region, offset and pieces."""
    reader = _Reader(body)
    pin, count, region, offset = reader.take(_PUSH)
    if count > ITEMS_MAX * PARTS_MAX or offset > OFFSET_MAX:
        raise ProtocolError(f"{count} pieces in one stream, to {offset}")
    pieces = [Pushing(*reader.take(_PIECE)) for _ in range(count)]
    reader.end()
    if any(one.start >= one.stop for one in pieces):
        raise ProtocolError("a piece without bytes")
    return pin, region, offset, pieces


_NUMBERS = struct.Struct("<Q")


def pack_number(value: int) -> bytes:
    """One number."""
    return _NUMBERS.pack(value)


def unpack_number(body: bytes) -> int:
    """Undoes pack_number."""
    if len(body) != _NUMBERS.size:
        raise ProtocolError(f"{len(body)} bytes are no number")
    found: int = _NUMBERS.unpack(body)[0]
    return found


def pack_marks(marks: Sequence[int]) -> bytes:
    """Marks of what is stored: 8 bytes of a digest for each name."""
    return struct.pack(f"<{len(marks)}Q", *marks)


def unpack_marks(body: bytes) -> tuple[int, ...]:
    """Undoes pack_marks."""
    if len(body) % 8 or len(body) > 8 * MARKS_MAX:
        raise ProtocolError(f"{len(body)} bytes are no marks")
    return struct.unpack(f"<{len(body) // 8}Q", body)


def outcome(value: int) -> Outcome:
    """A value from the other end."""
    try:
        return Outcome(value)
    except ValueError as error:
        raise ProtocolError(str(error)) from None
