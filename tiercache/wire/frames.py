"""Frames: the messages between the processes of one host and the owner of a directory; pure encoding, no sockets.

A frame is a header (HEADER, little-endian: length of the body, operation, number) and a body. Numbers belong to whoever
asks: an answer carries the number of its question, answers may overtake each other, one-way messages carry 0. Hot
bodies are packed arrays; rare ones are JSON. A body is believed only after it was taken apart here: whatever does not
fit raises ProtocolError, and the connection that sent it is closed.
Both ends speak VERSION, or shake hands and part: nothing here is ever reinterpreted between versions.
"""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

from tiercache import errors
from tiercache.errors import ProtocolError, TierCacheError, UnavailableError
from tiercache.model import KEY_BYTES_MAX, Name, Outcome
from tiercache.wire.ops import Op as Op
from tiercache.wire.ops import Patience as Patience

if TYPE_CHECKING:
    from collections.abc import Sequence

VERSION = 2
MAGIC = b"TCLOCAL\n"

BODY_BYTES_MAX = 16 << 20
"""No message is longer: half a million names, or a listing."""
HEADER = struct.Struct("<IHHQ")
"""length of the body, operation, reserved (0), number."""


class Frame(NamedTuple):
    """One message, its body still packed."""

    op: int
    number: int
    body: memoryview


class Grants(NamedTuple):
    """Outcome and place of each item; places are negative where there is none."""

    outcomes: list[Outcome]
    locations: list[int]


def pack(op: int, number: int, body: bytes = b"") -> bytes:
    """One frame. Raises ProtocolError where the body is longer than any frame may be."""
    if len(body) > BODY_BYTES_MAX:
        raise ProtocolError(f"a message of {len(body)} bytes is over {BODY_BYTES_MAX}: ask in smaller batches")
    return HEADER.pack(len(body), op, 0, number) + body


class Splitter:
    """Cuts a stream into frames; holds at most one incomplete frame."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._have = 0
        self._need = 0

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that are complete now. Raises ProtocolError on an impossible header."""
        if self._pieces:
            # Joined once, when the frame is whole: a long one comes in many pieces.
            self._pieces.append(data)
            self._have += len(data)
            if self._have < self._need:
                return []
            data = b"".join(self._pieces)
            self._pieces = []
        frames, at, size = [], 0, len(data)
        view = memoryview(data)
        need = HEADER.size
        while size - at >= HEADER.size:
            length, op, reserved, number = HEADER.unpack_from(data, at)
            if length > BODY_BYTES_MAX or reserved:
                raise ProtocolError(f"not a message: {length} bytes, operation {op}")
            need = HEADER.size + length
            if size - at < need:
                break
            frames.append(Frame(op, number, view[at + HEADER.size : at + need]))
            at += need
            need = HEADER.size
        if at < size:
            self._pieces, self._have, self._need = [data[at:]], size - at, need
        return frames


# -- pieces of bodies --------------------------------------------------------------------------------------------------

_NAME = struct.Struct("<32siB3x")
_KEY = struct.Struct("<32sB7x")
_LEASE = struct.Struct("<QB7x")
_RUN = struct.Struct("<32sQIIHBxIf")
"""key, size, page_bytes, part_bytes, scope, width, expiry_s, cost_s"""
_TERMS = struct.Struct("<QBBHfIB3x32s")
"""ticket, kind, form, scope, cost_s, expiry_s, width of parent, parent"""
_TICKET = struct.Struct("<QB7x")
_SETTLE = struct.Struct("<dI4x")
_WIDTHS = (16, 32)


def pack_names(names: Sequence[Name]) -> bytes:
    """40 bytes a name."""
    return b"".join([_NAME.pack(key, ordinal, len(key)) for key, ordinal in names])


def unpack_names(body: memoryview) -> list[Name]:
    """Undoes pack_names."""
    if len(body) % _NAME.size:
        raise ProtocolError(f"{len(body)} bytes are no list of names")
    names = []
    for key, ordinal, width in _NAME.iter_unpack(body):
        if width not in _WIDTHS or ordinal < 0:
            raise ProtocolError(f"a name with a key of {width} bytes and ordinal {ordinal}")
        names.append(Name(key[:width], ordinal))
    return names


def pack_lease(lease: int, patience: int, names: Sequence[Name]) -> bytes:
    """Body of LEASE and MATCH."""
    return _LEASE.pack(lease, patience) + pack_names(names)


def unpack_lease(body: memoryview) -> tuple[int, Patience, list[Name]]:
    """Undoes pack_lease."""
    lease, patience = _head(_LEASE, body)
    return lease, _patience(patience), unpack_names(body[_LEASE.size :])


def pack_pages(lease: int, patience: int, key: bytes, ordinals: Sequence[int], parts: Sequence[int]) -> bytes:
    """Body of LEASE_PAGES."""
    return (
        _LEASE.pack(lease, patience) + _KEY.pack(key, len(key))
        + struct.pack(f"<{len(ordinals)}Q{len(ordinals)}i", *parts, *ordinals)
    )  # fmt: skip


def unpack_pages(body: memoryview) -> tuple[int, Patience, bytes, list[int], list[int]]:
    """(lease, patience, key, ordinals, parts)."""
    lease, patience = _head(_LEASE, body)
    key, width = _head(_KEY, body[_LEASE.size :])
    ordinals, parts = _maps(body[_LEASE.size + _KEY.size :])
    return lease, _patience(patience), _key(key, width), ordinals, parts


class ReadAsk(NamedTuple):
    """What READ asks for; `run` is (key, size, page_bytes, part_bytes, scope, cost_s, expiry_s), as lease.PageRun."""

    lease: int
    run: tuple[bytes, int, int, int, int, float, int]
    ordinals: list[int]
    parts: list[int]


def pack_read(ask: ReadAsk) -> bytes:
    """Body of READ."""
    key, size, page_bytes, part_bytes, scope, cost_s, expiry_s = ask.run
    count = len(ask.ordinals)
    return (
        _LEASE.pack(ask.lease, 0)
        + _RUN.pack(key, size, page_bytes, part_bytes, scope, len(key), expiry_s, cost_s)
        + struct.pack(f"<{count}Q{count}i", *ask.parts, *ask.ordinals)
    )


def unpack_read(body: memoryview) -> ReadAsk:
    """Undoes pack_read, and checks that the pages are pages of that file."""
    lease, _ = _head(_LEASE, body)
    key, size, page_bytes, part_bytes, scope, width, expiry_s, cost_s = _head(_RUN, body[_LEASE.size :])
    ordinals, parts = _maps(body[_LEASE.size + _RUN.size :])
    if not page_bytes or not part_bytes or -(-page_bytes // part_bytes) > 64 or not cost_s >= 0:
        raise ProtocolError(f"pages of {page_bytes} bytes in parts of {part_bytes} are impossible")
    if any(ordinal * page_bytes >= max(size, 1) for ordinal in ordinals) or len(set(ordinals)) < len(ordinals):
        raise ProtocolError(f"pages {ordinals[:8]} are not those of a file of {size} bytes")
    run = (_key(key, width), size, page_bytes, part_bytes, scope, cost_s, expiry_s)
    return ReadAsk(lease, run, ordinals, parts)


def pack_grants(outcomes: Sequence[int], locations: Sequence[int]) -> bytes:
    """Answer to leases and reservations."""
    return struct.pack(f"<{len(locations)}q{len(outcomes)}b", *locations, *outcomes)


def unpack_grants(body: memoryview) -> Grants:
    """Undoes pack_grants."""
    count, rest = divmod(len(body), 9)
    if rest:
        raise ProtocolError(f"{len(body)} bytes are no grants")
    fields = struct.unpack(f"<{count}q{count}b", body)
    return Grants(_outcomes(fields[count:]), list(fields[:count]))


def pack_outcomes(outcomes: Sequence[int]) -> bytes:
    """One byte each."""
    return struct.pack(f"<{len(outcomes)}b", *outcomes)


def unpack_outcomes(body: memoryview) -> list[Outcome]:
    """Undoes pack_outcomes."""
    return _outcomes(struct.unpack(f"<{len(body)}b", body))


def pack_u64(values: Sequence[int]) -> bytes:
    """Leases, tickets."""
    return struct.pack(f"<{len(values)}Q", *values)


def unpack_u64(body: memoryview) -> list[int]:
    """Undoes pack_u64."""
    if len(body) % 8:
        raise ProtocolError(f"{len(body)} bytes are no list of numbers")
    return list(struct.unpack(f"<{len(body) // 8}Q", body))


def pack_i64(values: Sequence[int]) -> bytes:
    """Locations."""
    return struct.pack(f"<{len(values)}q", *values)


def unpack_i64(body: memoryview) -> list[int]:
    """Undoes pack_i64."""
    if len(body) % 8:
        raise ProtocolError(f"{len(body)} bytes are no list of locations")
    return list(struct.unpack(f"<{len(body) // 8}q", body))


class Gap(NamedTuple):
    """One page that the asker of a READ is to load: which parts, and the extent that they go to."""

    ordinal: int
    parts: int
    location: int


_GAP = struct.Struct("<QqI4x")


def pack_gaps(fill: int, gaps: Sequence[Gap]) -> bytes:
    """Body of FILL."""
    return _TICKET.pack(fill, 0) + b"".join([_GAP.pack(gap.parts, gap.location, gap.ordinal) for gap in gaps])


def unpack_gaps(body: memoryview) -> tuple[int, list[Gap]]:
    """(fill, gaps)."""
    fill, _ = _head(_TICKET, body)
    rest = body[_TICKET.size :]
    if len(rest) % _GAP.size:
        raise ProtocolError(f"{len(rest)} bytes are no gaps")
    return fill, [Gap(ordinal, parts, location) for parts, location, ordinal in _GAP.iter_unpack(rest)]


class Landed(NamedTuple):
    """Parts of one item (of a fill or of a ticket) that lie in their extent; `digests` are in the Payload layout, as
    far as the highest part here."""

    item: int
    parts: int
    digests: bytes


_LANDED = struct.Struct("<QII")


def pack_landed(number: int, flags: int, landed: Sequence[Landed]) -> bytes:
    """Body of FILLED (number: fill) and COMMIT (number: ticket)."""
    pieces = [_TICKET.pack(number, flags)]
    for item, parts, digests in landed:
        pieces.append(_LANDED.pack(parts, item, len(digests)))
        pieces.append(digests)
    return b"".join(pieces)


def unpack_landed(body: memoryview) -> tuple[int, int, list[Landed]]:
    """(fill or ticket, flags, what landed)."""
    number, flags = _head(_TICKET, body)
    landed, at = [], _TICKET.size
    while at < len(body):
        parts, item, length = _head(_LANDED, body[at:])
        at += _LANDED.size
        if length != 8 * parts.bit_length() or at + length > len(body):
            raise ProtocolError(f"{length} bytes of digests for the parts {parts:#x}")
        landed.append(Landed(item, parts, bytes(body[at : at + length])))
        at += length
    return number, flags, landed


class ReserveAsk(NamedTuple):
    """What RESERVE asks for. `form` is model.Form: LONE entries, or the BLOCKs of one chain after `parent`."""

    ticket: int
    kind: int
    form: int
    scope: int
    cost_s: float
    expiry_s: int
    parent: bytes
    names: list[Name]
    sizes: list[int]


def pack_reserve(ask: ReserveAsk) -> bytes:
    """Body of RESERVE."""
    terms = _TERMS.pack(*ask[:6], len(ask.parent), ask.parent)
    return terms + struct.pack(f"<{len(ask.sizes)}Q", *ask.sizes) + pack_names(ask.names)


def unpack_reserve(body: memoryview) -> ReserveAsk:
    """Undoes pack_reserve."""
    ticket, kind, form, scope, cost_s, expiry_s, width, parent = _head(_TERMS, body)
    rest = body[_TERMS.size :]
    count, odd = divmod(len(rest), 8 + _NAME.size)
    if odd or width not in (0, *_WIDTHS):
        raise ProtocolError(f"{len(body)} bytes are no reservation")
    sizes = list(struct.unpack(f"<{count}Q", rest[: 8 * count]))
    names = unpack_names(rest[8 * count :])
    return ReserveAsk(ticket, kind, form, scope, cost_s, expiry_s, parent[:width], names, sizes)


def pack_settle(name: bytes, value: bytes, ttl_s: float) -> bytes:
    """Body of SETTLE."""
    return _SETTLE.pack(ttl_s, len(name)) + name + value


def unpack_settle(body: memoryview) -> tuple[bytes, bytes, float]:
    """(name, value, seconds to believe it)."""
    ttl_s, length = _head(_SETTLE, body)
    at = _SETTLE.size + length
    if at > len(body) or not ttl_s >= 0:
        raise ProtocolError("a note that ends before its name does, or of no time")
    return bytes(body[_SETTLE.size : at]), bytes(body[at:]), ttl_s


def pack_holds(holds: Sequence[tuple[int, Sequence[int]]]) -> bytes:
    """Body of REDECLARE: (lease, locations) pairs."""
    return b"".join([struct.pack(f"<QQ{len(at)}q", lease, len(at), *at) for lease, at in holds])


def unpack_holds(body: memoryview) -> list[tuple[int, list[int]]]:
    """Undoes pack_holds."""
    values, holds, at = unpack_i64(body), [], 0
    while at < len(values):
        if at + 1 >= len(values) or not 0 <= values[at + 1] <= len(values) - at - 2:
            raise ProtocolError("a lease with more locations than the message")
        stop = at + 2 + values[at + 1]
        holds.append((values[at] & (1 << 64) - 1, values[at + 2 : stop]))
        at = stop
    return holds


def pack_json(value: object) -> bytes:
    """Rare bodies."""
    return json.dumps(value, separators=(",", ":")).encode()


def unpack_json(body: memoryview) -> Any:
    """Undoes pack_json."""
    try:
        return json.loads(bytes(body))
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"not JSON: {error}") from None


def pack_fault(fault: BaseException) -> bytes:
    """Body of FAULT: one of our own classes by name, anything else as unavailable."""
    known = isinstance(fault, TierCacheError)
    return pack_json([type(fault).__name__ if known else "UnavailableError", str(fault)[:4096] or repr(fault)[:4096]])


def unpack_fault(body: memoryview) -> TierCacheError:
    """The fault to raise on this side."""
    value = unpack_json(body)
    if not isinstance(value, list) or len(value) != 2:
        raise ProtocolError("a fault without class and message")
    kind = getattr(errors, str(value[0]), None)
    if not (isinstance(kind, type) and issubclass(kind, TierCacheError)):
        kind = UnavailableError
    return kind(str(value[1]))


def _head(head: struct.Struct, body: memoryview) -> tuple[Any, ...]:
    if len(body) < head.size:
        raise ProtocolError(f"a body of {len(body)} bytes where at least {head.size} belong")
    return head.unpack_from(body)


def _key(key: bytes, width: int) -> bytes:
    if width not in _WIDTHS or width > KEY_BYTES_MAX:
        raise ProtocolError(f"a key of {width} bytes")
    return key[:width]


def _patience(value: int) -> Patience:
    try:
        return Patience(value)
    except ValueError:
        raise ProtocolError(f"no such patience: {value}") from None


def _maps(body: memoryview) -> tuple[list[int], list[int]]:
    """Ordinals and maps of parts."""
    count, rest = divmod(len(body), 12)
    if rest or not count:
        raise ProtocolError(f"{len(body)} bytes are no pages")
    parts = list(struct.unpack_from(f"<{count}Q", body))
    ordinals = list(struct.unpack_from(f"<{count}i", body, 8 * count))
    if min(ordinals) < 0:
        raise ProtocolError("a page before the first")
    return ordinals, parts


_OUTCOMES = {int(outcome): outcome for outcome in Outcome}


def _outcomes(values: Sequence[int]) -> list[Outcome]:
    try:
        return [_OUTCOMES[value] for value in values]
    except KeyError:
        raise ProtocolError("no such outcome") from None
