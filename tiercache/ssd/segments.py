"""Space: which segment files there are, what lives in each, and who may take room next. Accounting only, no I/O.

Room is given out at the tail of an open segment; there is one open for writes and one for what reclaim rewrites.
Every segment file counts in full, from before it is created until after it is removed, so that the caps hold at every
instant. One segment is always left for reclaim, so that a full tier can still make room.

Lives of a segment: FREE -> OPEN -> SEALED -> FREE; each life has a generation of its own, the next number of the
directory, which is also its age.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tiercache.ssd.records import BLOCK_BYTES, GENERATION_MASK, location_of, split_location

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy.typing as npt

    from tiercache.model import Payload
    from tiercache.ssd.rows import Table

DEAD, LIVE, PENDING = 0, 1, 2
WRITES, RECLAIMS = 0, 1
"""The two streams; each fills a segment of its own."""


class Life(IntEnum):
    """What a segment is used for at present."""

    FREE = 0
    OPEN = 1
    SEALED = 2


class Place(NamedTuple):
    """Room for one record."""

    segment: Segment
    row: int
    block: int
    length: int


class Found(NamedTuple):
    """A live record: where it is, how many blocks it takes, and which parts it has."""

    segment: Segment
    block: int
    length: int
    parts: int


@dataclass(slots=True, eq=False)
class Segment:
    """One segment file and the records in it, ascending by block; the arrays have room for more than `count`."""

    number: int
    generation: int = 0
    life: Life = Life.FREE
    stream: int = WRITES
    descriptor: int = -1
    known: bool = True
    """False where rows may be lost that speak of this file: used last, so that fsck can still revive what it holds."""
    loaded: bool = True
    """False while recovery has not read the rows of this segment."""
    tail: int = 0
    count: int = 0
    live_count: int = 0
    live_blocks: int = 0
    pending: int = 0
    writers: int = 0
    """Jobs that may still write to this life of the file; it is not reused before they end."""
    blocks: npt.NDArray[np.uint32] = field(default_factory=lambda: np.zeros(64, np.uint32))
    lengths: npt.NDArray[np.uint32] = field(default_factory=lambda: np.zeros(64, np.uint32))
    parts: npt.NDArray[np.uint64] = field(default_factory=lambda: np.zeros(64, np.uint64))
    flags: npt.NDArray[np.uint8] = field(default_factory=lambda: np.zeros(64, np.uint8))
    unsaved: list[tuple[Payload, int]] = field(default_factory=list)
    """Records that are on the medium or on their way, and have no row yet."""
    stones: list[int] = field(default_factory=list)
    """Blocks of records that died and whose tombstone is not written yet."""
    fact_rows: int = 0
    stone_rows: int = 0
    merged: bool = False

    def find(self, block: int) -> int:
        """Index of the record that starts at `block`, or -1."""
        # Not NumPy's search: that gives the interpreter lock away, which costs more than these few steps.
        index = bisect_left(self.blocks.data, block, 0, self.count)
        return index if index < self.count and self.blocks[index] == block else -1

    def append(self, length: int, parts: int) -> Place:
        """Takes room at the tail."""
        index, block = self.count, self.tail
        if index == len(self.blocks):
            self.blocks, self.lengths, self.parts, self.flags = (
                np.concatenate([column, np.zeros(max(64, len(column)), column.dtype)])
                for column in (self.blocks, self.lengths, self.parts, self.flags)
            )
        self.blocks[index], self.lengths[index], self.parts[index] = block, length, parts
        self.flags[index] = PENDING
        self.count += 1
        self.pending += 1
        self.tail += length
        return Place(self, index, block, length)

    def clear(self) -> None:
        """Forgets every record: the next life begins."""
        self.tail = self.count = self.live_count = self.live_blocks = self.fact_rows = self.stone_rows = 0
        self.unsaved, self.stones, self.merged = [], [], False
        self.blocks, self.lengths = np.zeros(64, np.uint32), np.zeros(64, np.uint32)
        self.parts, self.flags = np.zeros(64, np.uint64), np.zeros(64, np.uint8)

    def load(self, table: Table, dead: npt.NDArray[np.uint32]) -> npt.NDArray[np.bool_]:
        """Takes over what recovery read; answers which rows of the table live."""
        blocks = table.columns["blocks"].astype(np.uint32)
        live = ~np.isin(blocks, dead)
        self.blocks, self.lengths = blocks, table.columns["lengths"].astype(np.uint32)
        self.parts, self.flags = table.columns["parts"].astype(np.uint64), live.astype(np.uint8)
        self.count = len(blocks)
        self.live_count = int(live.sum())
        self.live_blocks = int(self.lengths[live].sum())
        if self.count:
            self.tail = max(self.tail, int(self.blocks[-1]) + int(self.lengths[-1]))
        if len(dead):  # a tombstone must not fall on a record that is yet to come
            self.tail = max(self.tail, int(dead.max()) + 1)
        self.loaded = True
        return live

    def live_locations(self) -> list[int]:
        """Locations of the records that live here."""
        base = location_of(self.number, self.generation, 0)
        return [base | int(block) for block in self.blocks[: self.count][self.flags[: self.count] == LIVE]]


class Space:
    """All segments of a directory. Thread-safe; the lock is held for microseconds and never across I/O."""

    def __init__(self, segment_bytes: int, segments_max: int) -> None:
        self.segment_bytes = segment_bytes
        self.segment_blocks = segment_bytes // BLOCK_BYTES
        self.segments_max = segments_max
        self.segments: dict[int, Segment] = {}
        self.open: list[Segment | None] = [None, None]
        self.generation = 0
        """The last generation given out."""
        self.taken: set[int] = set()
        """Segments that next_segment gave out and that did not begin yet."""
        self.emptying = 0
        """Segments that claim_dead gave out and that are not back yet."""
        self.growing = True
        """Whether segments may be created at present."""
        self.states: dict[Segment, None] = {}
        """Segments whose state row is not written yet."""
        self.lock = threading.RLock()
        self.changes = 0
        """Counts what a commit would have to save."""

    # -- room

    def reserve(self, stream: int, lengths: Sequence[int], parts: Sequence[int]) -> list[Place]:
        """Room in the open segment of a stream for the first of these records, as many as it takes."""
        places: list[Place] = []
        with self.lock:
            segment = self.open[stream]
            if segment is None:
                return places
            for length, present in zip(lengths, parts, strict=True):
                if segment.tail + length > self.segment_blocks:
                    break
                places.append(segment.append(length, present))
        return places

    def settle(self, places: Sequence[Place], payloads: Sequence[Payload | None]) -> list[int]:
        """Ends reservations: written (then it lives, and its row is due), or failed (None). Answers locations."""
        locations: list[int] = []
        with self.lock:
            self.changes += len(places)
            for (segment, row, block, length), payload in zip(places, payloads, strict=True):
                assert segment.flags[row] == PENDING, (segment.number, block)
                segment.pending -= 1
                if payload is None:
                    segment.flags[row] = DEAD
                    segment.stones.append(block)
                    locations.append(-1)
                    continue
                segment.flags[row] = LIVE
                segment.live_count += 1
                segment.live_blocks += length
                segment.unsaved.append((payload, block))
                locations.append(location_of(segment.number, segment.generation, block))
        return locations

    def available(self) -> int:
        """Segments that could be opened without reclaiming anything."""
        with self.lock:
            ready = sum(segment.life is Life.FREE or self._is_dead(segment) for segment in self.segments.values())
            return ready + self.emptying + self._creatable()

    def _creatable(self) -> int:
        return max(0, self.segments_max - len(self.segments) - len(self.taken)) if self.growing else 0

    @staticmethod
    def _is_dead(segment: Segment) -> bool:
        idle = not (segment.live_count or segment.pending or segment.writers)
        return idle and segment.loaded and segment.life is Life.SEALED

    def next_segment(self, stream: int) -> Segment | None:
        """Takes the segment that a stream should fill next, or None if the rest is for reclaim.

        In this order: a free file; one whose file does not exist yet (descriptor -1: the caller creates it); one of
        unknown content (if its life is SEALED the caller empties it first). Those in which nothing lives any more come
        back by claim_dead and emptied.
        """
        with self.lock:
            if self.available() < (2 if stream == WRITES else 1):
                return None
            free = [s for s in self.segments.values() if s.life is Life.FREE and not s.writers]
            known = min((s for s in free if s.known), key=lambda s: s.number, default=None)
            if known is not None:
                return self._claim(known)
            if self._creatable():
                number = next(n for n in range(self.segments_max) if n not in self.segments and n not in self.taken)
                return self._claim(Segment(number))
            last = [s for s in self.segments.values() if self._is_dead(s) and not s.known] or free
            return self._claim(min(last, key=lambda s: s.generation)) if last else None

    def has_free(self) -> bool:
        """Whether there is a free file whose content is known."""
        with self.lock:
            return any(s.life is Life.FREE and s.known and not s.writers for s in self.segments.values())

    def claim_dead(self) -> list[Segment]:
        """Takes all segments in which nothing lives any more, to be emptied and then given back by `release`."""
        with self.lock:
            dead = [s for s in self.segments.values() if self._is_dead(s) and s.known]
            for segment in dead:
                self._claim(segment)
                self.states.pop(segment, None)
            self.emptying += len(dead)
            return dead

    def release(self, dead: Sequence[Segment], *, emptied: bool) -> None:
        """Gives back what claim_dead took; `emptied`: the rows are gone durably, and the files may be used again."""
        with self.lock:
            self.emptying -= len(dead)
            for segment in dead:
                self.unclaim(segment, exists=True)
                if emptied:
                    self.emptied(segment)
                else:
                    self.states[segment] = None

    def _claim(self, segment: Segment) -> Segment:
        self.segments.pop(segment.number, None)
        self.taken.add(segment.number)
        return segment

    def unclaim(self, segment: Segment, *, exists: bool) -> None:
        """Gives a taken segment back, after a fault."""
        with self.lock:
            self.taken.discard(segment.number)
            if exists:
                self.segments[segment.number] = segment

    def begin(self, stream: int, segment: Segment) -> None:
        """A taken segment, its file there and its old rows gone, becomes the open one of a stream."""
        with self.lock:
            self.taken.discard(segment.number)
            self.segments[segment.number] = segment
            old = self.open[stream]
            if old is not None:
                old.life = Life.SEALED
                self.states[old] = None
            segment.clear()
            self.generation += 1
            segment.generation, segment.life, segment.stream = self.generation, Life.OPEN, stream
            segment.pending, segment.known, segment.loaded = 0, True, True
            self.open[stream] = segment
            self.states[segment] = None
            self.changes += 1

    def seal(self, segment: Segment) -> None:
        """An open segment is filled no further."""
        with self.lock:
            segment.life = Life.SEALED
            self.states[segment] = None
            self.open = [None if other is segment else other for other in self.open]

    def emptied(self, segment: Segment) -> None:
        """Nothing of this segment is wanted any more and its rows are gone durably: its file may be used again."""
        with self.lock:
            segment.clear()
            segment.life = Life.FREE

    # -- records

    def look(self, location: int) -> Found | None:
        """The live record at a location, or None if it is unknown, dead or of an earlier life."""
        if location < 0:
            return None
        number, generation, block = split_location(location)
        with self.lock:
            segment = self.segments.get(number)
            if segment is None or segment.generation & GENERATION_MASK != generation or segment.life is Life.FREE:
                return None
            index = segment.find(block)
            if index < 0 or segment.flags[index] != LIVE:
                return None
            return Found(segment, block, int(segment.lengths[index]), int(segment.parts[index]))

    def bury(self, locations: Iterable[int]) -> int:
        """Declares records dead; unknown and stale locations are ignored. Answers how many died."""
        died = 0
        with self.lock:
            for location in locations:
                found = self.look(location)
                if found is None:
                    continue
                segment = found.segment
                index = segment.find(found.block)
                segment.flags[index] = DEAD
                segment.live_count -= 1
                segment.live_blocks -= int(segment.lengths[index])
                segment.stones.append(found.block)
                self.changes += 1
                died += 1
        return died

    def victim(self) -> Segment | None:
        """The sealed segment that is best emptied next; None while there is none, or while recovery goes on.

        Benefit over cost as in the log-structured file system of Rosenblum and Ousterhout (1992): room won times age,
        over the reading of a segment and the rewriting of what lives. Where everything lives, the oldest goes.
        """
        with self.lock:
            best: tuple[float, Segment] | None = None
            for segment in self.segments.values():
                if not segment.loaded:
                    return None
                if segment.life is not Life.SEALED or segment.pending or segment.writers or not segment.live_count:
                    continue
                live = segment.live_blocks / self.segment_blocks
                score = (1.1 - live) * (self.generation - segment.generation + 1) / (1 + live)
                if best is None or score > best[0]:
                    best = score, segment
            return best[1] if best else None

    def live_bytes(self) -> int:
        """Bytes of the records that live, headers included."""
        with self.lock:
            return BLOCK_BYTES * sum(segment.live_blocks for segment in self.segments.values())

    def file_count(self) -> int:
        """Segment files that exist or are being created."""
        with self.lock:
            return len(self.segments) + len(self.taken)

    def used_count(self) -> int:
        """Segments that hold something, or are about to."""
        with self.lock:
            return sum(s.life is not Life.FREE for s in self.segments.values()) + len(self.taken)

    def writers(self, segments: Sequence[Segment], step: int) -> None:
        """Counts jobs that may write to segments, up before they are handed over, down when they ended."""
        with self.lock:
            for segment in segments:
                segment.writers += step
