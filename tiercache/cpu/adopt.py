"""Adoption: an arena goes on with the memory files that a dead owner of it left, and with what is right in them.

The tables say what is where (see layout). Rows that fail their check, contradict themselves or lie about somebody
else's place are left out. A segment that is missing or unusable takes its extents with it; its number is not used again
and counts as full, since clients may still have the old one mapped. All segments must be of one size: those of another
are left out too.

Nothing that was found is reused before `Adopted.settle`: living clients of the dead owner may look at it, or write
there, until they are told otherwise. What a dead owner was about to delete (retired), what was never filled (pending),
and what has not the bytes that its digests say, is shown to nobody.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tiercache.buffers import verify_parts
from tiercache.cpu import layout
from tiercache.cpu.places import ROW_MASK, ROW_SHIFT, SEGMENT_MAX, SEGMENT_SHIFT
from tiercache.cpu.segment import Segment
from tiercache.errors import ConfigError, ProtocolError
from tiercache.model import ALIGN_BYTES, KEY_BYTES_MAX, Facts, Form

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    from tiercache.cpu.arena import Arena
    from tiercache.model import Payload

log = logging.getLogger(__name__)

BATCH_BYTES = 256 << 20
BATCH_ROWS = 8192
"""Verified before the next batch of facts is given out."""


class _Table(NamedTuple):
    """What the table of one segment says: locations, and pages that nobody has."""

    segment: Segment
    present: list[tuple[int, int, int]]
    """Location, tick, and the depth of a block in its chain, from 1 (0: no block)."""
    retired: list[int]
    pending: list[int]
    free: list[tuple[int, int]]
    held: list[int]


class Adopted:
    """What was found in an arena that was taken over. Any thread; `facts` blocks for as long as hashing takes."""

    def __init__(self, arena: Arena, tables: Sequence[_Table], lost: Sequence[int]) -> None:
        self._arena = arena
        rows = np.array([one for table in tables for one in table.present], np.int64).reshape(-1, 3)
        self._present = rows[np.lexsort((-rows[:, 1], rows[:, 2])), 0].tolist()
        ranks = np.empty(len(rows), np.int64)
        ranks[np.argsort(rows[:, 1], kind="stable")] = np.arange(1, len(rows) + 1)
        self._ranks = dict(zip(rows[:, 0].tolist(), ranks.tolist(), strict=True))
        self.pending = tuple(location for table in tables for location in table.pending)
        """Extents that were reserved, and of which nothing is present."""
        self._retired = [location for table in tables for location in table.retired]
        self._wrong: dict[int, None] = {}
        self._handed_over: set[int] = set()
        self.lost = tuple(lost)
        """Ordinals of segments that could not be used."""

    @property
    def damaged(self) -> int:
        """Entries whose bytes were not what their digests say, so far."""
        return len(self._wrong)

    def facts(self, batch_bytes: int = BATCH_BYTES) -> Iterator[Facts]:
        """Everything present that has the right bytes, with its location. What came last comes first, as far as the
        table knows, but blocks after all else, and parents before their children. `ticks` have the order in which
        things came. Blocking: call it from a thread. Each batch was hashed right before it is given out."""
        batch: list[tuple[int, Payload]] = []
        size = 0
        for location in self._present:
            payload = self._verified(location)
            if payload is None:
                continue
            batch.append((location, replace(payload, tick=self._ranks[location])))
            size += payload.size
            if size >= batch_bytes or len(batch) >= BATCH_ROWS:
                yield _facts(batch)
                batch, size = [], 0
        if batch:
            yield _facts(batch)

    def orphans(self) -> list[int]:
        """What is not in the facts, and yet may be looked at by a client that had a lease on it: deleted while it was
        looked at, or damaged. Ask after `facts`. From now on these are the caller's, to free when nobody holds them."""
        fresh = [one for one in (*self._retired, *self._wrong) if one not in self._handed_over]
        self._handed_over.update(fresh)
        return fresh

    def settle(self) -> None:
        """Nobody holds anything of the dead owner's but what the caller knows of: what is pending, retired or damaged
        goes, and so does what was freed meanwhile. Idempotent."""
        self._arena.release([*self.pending, *self.orphans()])
        self._arena.let_go()
        self.pending = ()

    def _verified(self, location: int) -> Payload | None:
        """What lies there, if it is right."""
        place = self._arena.find(location)
        if place is None:
            return None  # freed meanwhile
        payload = place.segment.payload(place.at)
        if verify_parts(place.span, payload.part_bytes, payload.parts, payload.digests):
            return payload
        self._wrong[location] = None
        self._arena.retire([location])
        return None


def adopt(arena: Arena, files: Sequence[tuple[int, int]]) -> Adopted:
    """Has an unused arena go on with memory files, (ordinal, descriptor) each; the descriptors stay the caller's.

    Raises ProtocolError when none of them can be used: the arena is then as it was, but clients of the dead owner may
    still have its segments mapped, so its id should not be used for others. Raises ConfigError when the arena was used.
    """
    if arena.closed or arena.segments:
        raise ConfigError("only an arena that was not used yet can take over another one")
    tables: dict[int, _Table] = {}
    lost: set[int] = set()
    for ordinal, descriptor in files:
        if 0 <= ordinal <= SEGMENT_MAX and ordinal not in tables and ordinal not in lost:
            try:
                segment = Segment.attach(ordinal, os.dup(descriptor), arena.id)
                tables[ordinal] = _read(segment)
            except (ProtocolError, OSError) as error:
                log.warning("segment %d of the memory cannot be taken over: %s", ordinal, error)
                lost.add(ordinal)
    if not tables:
        raise ProtocolError(f"none of {len(files)} memory files is a segment of arena {arena.id.hex()}")
    size = Counter(table.segment.size for table in tables.values()).most_common(1)[0][0]
    for ordinal in [ordinal for ordinal, table in tables.items() if table.segment.size != size]:
        log.warning("segment %d of the memory has another size than the rest", ordinal)
        tables.pop(ordinal).segment.close()
        lost.add(ordinal)
    count = max(*tables, *lost) + 1 if lost else max(tables) + 1
    lost.update(ordinal for ordinal in range(count) if ordinal not in tables)
    segments = [tables[ordinal].segment if ordinal in tables else None for ordinal in range(count)]
    for table in tables.values():
        table.segment.own(table.held)
    layout.fence()
    free = [extent for table in tables.values() for extent in table.free]
    kept = [one for table in tables.values() for one in (*table.retired, *table.pending)]
    kept += [one[0] for table in tables.values() for one in table.present]
    arena.take_over(segments, free, kept)
    return Adopted(arena, [tables[ordinal] for ordinal in sorted(tables)], sorted(lost))


def _read(segment: Segment) -> _Table:
    """Sorts out the table of a segment. Changes nothing."""
    table = _Table(segment, [], [], [], [], [])
    pages = segment.size // ALIGN_BYTES
    used = segment.table_pages
    try:
        for found in layout.read_table(segment.memory, pending=True):
            if found.row > ROW_MASK:
                continue  # no location could say it
            location = segment.ordinal << SEGMENT_SHIFT | found.row << ROW_SHIFT | found.generation
            if found.state == layout.PENDING:
                table.pending.append(location)
            elif found.retired:
                table.retired.append(location)
            else:
                payload = found.payload
                depth = payload.name.ordinal + 1 if payload.form is Form.BLOCK else 0
                table.present.append((location, payload.tick, depth))
            table.held.extend((found.row, *found.chain))
            used.append((found.offset // ALIGN_BYTES, found.length // ALIGN_BYTES))
    except ProtocolError:
        segment.close()
        raise
    used.sort()
    base, last = segment.ordinal * pages, 0
    for first, count in (*used, (pages, 0)):
        if first > last:
            table.free.append((base + last, first - last))
        last = first + count
    segment.populate_mark = used[-1][0] + used[-1][1]
    return table


def _facts(batch: Sequence[tuple[int, Payload]]) -> Facts:
    """Columns of what lies where."""
    payloads = [payload for _, payload in batch]
    return Facts(
        forms=np.array([p.form for p in payloads], np.uint8),
        keys=_matrix([p.name.key for p in payloads]),
        widths=np.array([len(p.name.key) for p in payloads], np.uint8),
        parents=_matrix([p.parent for p in payloads]),
        parent_widths=np.array([len(p.parent) for p in payloads], np.uint8),
        ordinals=np.array([p.name.ordinal for p in payloads], np.int32),
        kinds=np.array([p.kind for p in payloads], np.uint8),
        scopes=np.array([p.scope for p in payloads], np.uint16),
        sizes=np.array([p.size for p in payloads], np.uint32),
        part_bytes=np.array([p.part_bytes for p in payloads], np.uint32),
        parts=np.array([p.parts for p in payloads], np.uint64),
        locations=np.array([location for location, _ in batch], np.int64),
        costs_s=np.array([p.cost_s for p in payloads], np.float32),
        expiries_s=np.array([p.expiry_s for p in payloads], np.uint32),
        ticks=np.array([p.tick for p in payloads], np.uint32),
    )


def _matrix(keys: Sequence[bytes]) -> npt.NDArray[np.uint8]:
    joined = b"".join([key.ljust(KEY_BYTES_MAX, b"\0") for key in keys])
    return np.frombuffer(joined, np.uint8).reshape(len(keys), KEY_BYTES_MAX)
