"""Joint: bodies of messages about blocks that several writers fill, and about parts of chains; pure encoding.

As in frames.py, a body is believed only after it was taken apart here, and what does not fit raises ProtocolError.
"""

from __future__ import annotations

import struct
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tiercache.errors import CapacityError, ConfigError, ProtocolError
from tiercache.lease import check_blocks
from tiercache.model import Outcome
from tiercache.wire.frames import Landed, Patience, pack_landed, unpack_landed

if TYPE_CHECKING:
    from collections.abc import Sequence

    Range = tuple[int, int]

DIGESTS_MAX = 1 << 16
"""Blocks of one message."""
PIECES_MAX = 256
"""Pieces of one block that one JOIN claims."""
PIECES_ALL_MAX = 1 << 18
"""And of all its blocks."""

_JOIN = struct.Struct("<QBBHfIIIQIB3x32s")
"""ticket, kind, width of digests, scope, cost_s, expiry_s, size, part_bytes, claim, pieces, width of parent, parent"""
_RANGE = struct.Struct("<II")
_JOINED = struct.Struct("<QII")
"""ticket, items, those of them that the ticket has"""
_GRANTED = struct.Struct("<III")
"""item, start, stop"""
_LAND = struct.Struct("<IIIIQ")
"""item, start, stop, 0, xxh3-64"""
_COUNT = struct.Struct("<I4x")
_CHAIN = struct.Struct("<QB7x")
"""parts, width"""
_LEASE = struct.Struct("<QB7x")
_WIDTHS = (16, 32)


class JoinAsk(NamedTuple):
    """What JOIN asks for; see core.Core.join_blocks."""

    ticket: int
    kind: int
    scope: int
    cost_s: float
    expiry_s: int
    size: int
    part_bytes: int
    claim: int
    pieces: list[Range]
    parent: bytes
    digests: list[bytes]


def pack_join(ask: JoinAsk) -> bytes:
    """Body of JOIN."""
    width = len(ask.digests[0]) if ask.digests else 16
    return (
        _JOIN.pack(
            ask.ticket, ask.kind, width, ask.scope, ask.cost_s, ask.expiry_s, ask.size, ask.part_bytes, ask.claim,
            len(ask.pieces), len(ask.parent), ask.parent,
        )
        + b"".join([_RANGE.pack(*one) for one in ask.pieces])
        + b"".join(ask.digests)
    )  # fmt: skip


def unpack_join(body: memoryview) -> JoinAsk:
    """Undoes pack_join, and checks that there are such blocks, parts and pieces."""
    if len(body) < _JOIN.size:
        raise ProtocolError(f"{len(body)} bytes are no JOIN")
    ticket, kind, width, scope, cost_s, expiry_s, size, part_bytes, claim, count, above, parent = _JOIN.unpack_from(
        body
    )
    at = _JOIN.size + _RANGE.size * count
    if count > PIECES_MAX or at > len(body) or above not in (0, width) or not cost_s >= 0:
        raise ProtocolError(f"a JOIN with {count} pieces and a parent of {above} bytes")
    pieces = list(_RANGE.iter_unpack(body[_JOIN.size : at]))
    digests = _digests(body[at:], width)
    try:
        check_blocks(size, part_bytes, claim, pieces)
    except (ConfigError, CapacityError) as fault:
        raise ProtocolError(str(fault)) from None
    if len(set(digests)) < len(digests) or count * len(digests) > PIECES_ALL_MAX:
        raise ProtocolError(f"a chain with one block twice, or with {count * len(digests)} pieces")
    return JoinAsk(ticket, kind, scope, cost_s, expiry_s, size, part_bytes, claim, pieces, parent[:above], digests)


class Joined(NamedTuple):
    """What a JOIN brought, item by item: see core.BlockTicket; `locations` are extents to be filled, or -1. The ticket
    has the first `known` items, the rest is over the asker's share."""

    ticket: int
    outcomes: list[Outcome]
    locations: list[int]
    claims: list[int]
    present: list[int]
    pieces: list[list[Range]]
    known: int


def pack_joined(joined: Joined) -> bytes:
    """Answer to JOIN."""
    count = len(joined.outcomes)
    rows = [_GRANTED.pack(item, *one) for item, some in enumerate(joined.pieces) if some for one in some]
    columns = ((joined.locations, "<i8"), (joined.claims, "<u8"), (joined.present, "<u8"), (joined.outcomes, "<i1"))
    packed = b"".join([np.array(column, kind).tobytes() for column, kind in columns])
    return _JOINED.pack(joined.ticket, count, joined.known) + packed + b"".join(rows)


def unpack_joined(body: memoryview, count: int) -> Joined:
    """Undoes pack_joined, for so many blocks."""
    if len(body) < _JOINED.size + 25 * count or (len(body) - _JOINED.size - 25 * count) % _GRANTED.size:
        raise ProtocolError(f"{len(body)} bytes do not answer a JOIN of {count} blocks")
    ticket, said, known = _JOINED.unpack_from(body)
    if said != count or known > count:
        raise ProtocolError(f"{said} answers to {count} blocks")
    values = iter(struct.unpack_from(f"<{count}q{count}Q{count}Q{count}b", body, _JOINED.size))
    locations, claims, present = (list(islice(values, count)) for _ in range(3))
    try:
        outcomes = [Outcome(one) for one in values]
    except ValueError:
        raise ProtocolError("no such outcome") from None
    pieces: list[list[Range]] = [[] for _ in range(count)]
    for item, start, stop in _GRANTED.iter_unpack(body[_JOINED.size + 25 * count :]):
        if item >= count:
            raise ProtocolError(f"a piece of block {item} of {count}")
        pieces[item].append((start, stop))
    return Joined(ticket, outcomes, locations, claims, present, pieces, known)


class LandAsk(NamedTuple):
    """What LAND says; `pieces` are (item, start, stop, xxh3-64)."""

    ticket: int
    flags: int
    landed: list[Landed]
    pieces: list[tuple[int, int, int, int]]


def pack_land(ask: LandAsk) -> bytes:
    """Body of LAND."""
    rows = [_LAND.pack(item, start, stop, 0, digest) for item, start, stop, digest in ask.pieces]
    return _COUNT.pack(len(rows)) + b"".join(rows) + pack_landed(ask.ticket, ask.flags, ask.landed)


def unpack_land(body: memoryview) -> LandAsk:
    """Undoes pack_land."""
    count = _COUNT.unpack_from(body)[0] if len(body) >= _COUNT.size else 0
    at = _COUNT.size + _LAND.size * count
    if at > len(body):
        raise ProtocolError(f"{len(body)} bytes are no LAND of {count} pieces")
    pieces = [(item, start, stop, digest) for item, start, stop, _, digest in _LAND.iter_unpack(body[_COUNT.size : at])]
    ticket, flags, landed = unpack_landed(body[at:])
    return LandAsk(ticket, flags, landed, pieces)


def pack_chain(parts: int, digests: Sequence[bytes]) -> bytes:
    """Body of PROBE and TOUCH_CHAIN."""
    return _CHAIN.pack(parts, len(digests[0])) + b"".join(digests)


def unpack_chain(body: memoryview) -> tuple[int, list[bytes]]:
    """(parts, digests)."""
    joined, parts, width = unpack_probe(body)
    return parts, [joined[at : at + width] for at in range(0, len(joined), width)]


def unpack_probe(body: memoryview) -> tuple[bytes, int, int]:
    """(joined digests, parts, width)."""
    if len(body) < _CHAIN.size:
        raise ProtocolError(f"{len(body)} bytes are no chain")
    parts, width = _CHAIN.unpack_from(body)
    return _joined_digests(body[_CHAIN.size :], width), parts, width


def pack_lease_blocks(lease: int, patience: int, parts: int, digests: Sequence[bytes]) -> bytes:
    """Body of LEASE_BLOCKS."""
    return _LEASE.pack(lease, patience) + pack_chain(parts, digests)


def unpack_lease_blocks(body: memoryview) -> tuple[int, Patience, int, list[bytes]]:
    """(lease, patience, parts, digests)."""
    if len(body) < _LEASE.size:
        raise ProtocolError(f"{len(body)} bytes ask for no lease")
    lease, patience = _LEASE.unpack_from(body)
    if patience not in Patience.__members__.values():
        raise ProtocolError(f"no such patience: {patience}")
    return lease, Patience(patience), *unpack_chain(body[_LEASE.size :])


def pack_maps(maps: Sequence[int]) -> bytes:
    """Answer to COMPARE."""
    return np.array(maps, "<u8").tobytes()


def unpack_maps(body: memoryview, count: int) -> list[int]:
    """Undoes pack_maps, of so many rows."""
    if len(body) != 8 * count:
        raise ProtocolError(f"{len(body)} bytes are no maps of {count} rows")
    maps: list[int] = np.frombuffer(body, "<u8").tolist()
    return maps


def _joined_digests(raw: memoryview, width: int) -> bytes:
    if width not in _WIDTHS or len(raw) % width or len(raw) > DIGESTS_MAX * width:
        raise ProtocolError(f"{len(raw)} bytes are no digests of {width} bytes each, of at most {DIGESTS_MAX} blocks")
    return bytes(raw)


def _digests(raw: memoryview, width: int) -> list[bytes]:
    whole = _joined_digests(raw, width)
    return [whole[at : at + width] for at in range(0, len(whole), width)]
