"""Arena: extents in segments of shareable memory, under one hard cap."""

from __future__ import annotations

import os
import threading
import weakref
from typing import TYPE_CHECKING, NamedTuple

from tiercache.buffers import Buffer
from tiercache.cpu import layout
from tiercache.cpu.freespace import FreeSpace
from tiercache.cpu.segment import Segment
from tiercache.errors import ClosedError, ConfigError
from tiercache.model import ALIGN_BYTES, PARTS_MAX, Outcome, Payload, part_count

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tiercache.cpu.prefault import Prefault

SEGMENT_BYTES = 1 << 30
SEGMENTS_MAX = 2047
AHEAD_BYTES = 64 << 20
"""How far past the highest extent used so far memory is populated in the background."""

_SEGMENT_SHIFT, _ROW_SHIFT = 52, 32
_ROW_MASK, _GENERATION_MASK = (1 << 20) - 1, (1 << 32) - 1
_LIVE = (layout.PENDING, layout.PRESENT)


class Place(NamedTuple):
    """An extent found by its location: its segment, where its row lies there, and what the row says of its shape."""

    segment: Segment
    at: int
    size: int
    parts: int
    offset_pages: int
    generation: int
    ordinal: int
    part_bytes: int

    @property
    def span(self) -> Buffer:
        """The extent's bytes, in place."""
        whole = self.segment.span
        return Buffer(whole.address + self.offset_pages * ALIGN_BYTES, self.size, whole.owner)

    @property
    def digests(self) -> bytes:
        """Digests of all parts, undefined where one is absent."""
        return self.segment.digests(self.at, part_count(self.size, self.part_bytes))

    @property
    def stale(self) -> bool:
        """Whether the extent was freed since it was found: then what was read of it in between is worthless."""
        at, memory = self.at, self.segment.memory
        found = memory[at + layout.GENERATION_AT : at + layout.GENERATION_AT + 4]
        return int.from_bytes(found, "little") != self.generation


class Arena:
    """Extents of whole pages, best fit, with a table of them in the same memory that outlives the process' own state.

    A location is segment (11 bits), row (20) and generation (32) of an extent. Segments come one by one as they are
    needed, all of one size, and together never exceed `capacity_bytes`, headers and tables included. Any thread may
    call; one lock is held for a few microseconds an extent, never across a copy. A forked child finds its copy of the
    arena closed, because the memory stays the parent's.
    """

    def __init__(
        self,
        capacity_bytes: int,
        *,
        segment_bytes: int = SEGMENT_BYTES,
        client: int = 0,
        arena_id: bytes = bytes(16),
        shareable: bool = True,
        prefault: Prefault | None = None,
    ) -> None:
        if capacity_bytes < 0 or segment_bytes < 3 * ALIGN_BYTES:
            raise ConfigError(f"an arena of {capacity_bytes} bytes in segments of {segment_bytes} bytes is impossible")
        count = min(SEGMENTS_MAX, -(-capacity_bytes // segment_bytes))
        self._segment_pages = capacity_bytes // count // ALIGN_BYTES if count else 0
        self._chunk_pages = layout.chunk_bytes_for(self._segment_pages * ALIGN_BYTES) // ALIGN_BYTES
        self._segments_max = count if self._segment_pages > 1 + self._chunk_pages else 0
        self.capacity_bytes = capacity_bytes
        self.reason = ""
        self._id = arena_id
        self._client = client
        self._shareable = shareable
        self._prefault = prefault
        self._lock = threading.Lock()
        self._space = FreeSpace()
        self._segments: list[Segment] = []
        self._closed = False
        _arenas.add(self)

    @property
    def closed(self) -> bool:
        """Whether the arena was closed, or belongs to the process that this one was forked from."""
        return self._closed

    @property
    def entry_bytes_max(self) -> int:
        """Largest extent that can ever fit."""
        return max(0, self._segment_pages - 1 - self._chunk_pages) * ALIGN_BYTES if self._segments_max else 0

    @property
    def used_bytes(self) -> int:
        """Bytes of extents, headers and tables."""
        return (len(self._segments) * self._segment_pages - self._space.free_pages) * ALIGN_BYTES

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The segments so far, for whoever shares or registers their memory."""
        return tuple(self._segments)

    def reserve(self, payloads: Sequence[Payload]) -> list[int]:
        """Locations of new extents for the names and shapes of `payloads`, no part present; or FULL."""
        for payload in payloads:
            _check_shape(payload)
        return [self._reserve(payload) for payload in payloads]

    def release(self, locations: Sequence[int]) -> None:
        """Frees extents; what is not the location of one now is ignored."""
        for location in locations:
            with self._lock:
                place = self.find(location)
                if place is not None:
                    row = location >> _ROW_SHIFT & _ROW_MASK
                    page, pages = place.segment.drop_row(row)
                    self._space.add(place.segment.ordinal * self._segment_pages + page, pages)

    def commit(self, location: int, parts: int, digests: bytes) -> None:
        """Makes parts of an extent present; those that are present already keep their digests."""
        with self._lock:
            place = self.need(location)
            count = part_count(place.size, place.part_bytes)
            if parts >> count or len(digests) < parts.bit_length() * 8:
                raise ConfigError(f"parts {parts:#x} with {len(digests)} bytes of digests do not fit {count} parts")
            if parts:
                place.segment.add_parts(place.at, parts, digests)

    def find(self, location: int) -> Place | None:
        """The extent at a location; None when it was freed, or never was."""
        ordinal, segments = location >> _SEGMENT_SHIFT, self._segments  # one reading: another thread may close
        if not 0 <= ordinal < len(segments):
            return None
        segment = segments[ordinal]
        at = segment.row_at(location >> _ROW_SHIFT & _ROW_MASK)
        if at < 0:
            return None
        memory = segment.memory
        size, parts, offset_pages, _, generation, number, part_bytes = layout.SHAPE.unpack_from(
            memory, at + layout.SHAPE_AT
        )
        if generation != location & _GENERATION_MASK or memory[at + layout.STATE_AT] not in _LIVE:
            return None
        return Place(segment, at, size, parts, offset_pages, generation, number, part_bytes)

    def need(self, location: int) -> Place:
        """The extent at a location that the caller holds; raises LookupError or ClosedError when it is not there."""
        place = self.find(location)
        if place is None:
            if self._closed:
                raise ClosedError("the memory arena is closed")
            raise LookupError(f"no extent at {location:#x}: it was freed")
        return place

    def close(self) -> None:
        """Gives the memory back as soon as no Buffer shows it. Idempotent."""
        with self._lock:
            self._closed = True
            segments, self._segments, self._space = self._segments, [], FreeSpace()
        if self._prefault is not None:
            self._prefault.stop()
        for segment in segments:
            segment.close()

    def _reserve(self, payload: Payload) -> int:
        pages = max(1, -(-payload.size // ALIGN_BYTES))
        rows = layout.rows_for(part_count(payload.size, payload.part_bytes))
        with self._lock:
            start = self._space.take(pages)
            if start < 0:
                if not self._grow(pages):
                    return Outcome.FULL
                start = self._space.take(pages)
            ordinal, page = divmod(start, self._segment_pages)
            segment = self._segments[ordinal]
            if segment.rows_left < rows and not self._grow_table(segment):
                self._space.add(start, pages)
                return Outcome.FULL
            row, generation = segment.make_row(page, pages, self._client, payload)
            wish = self._ahead(segment, page + pages) if page + pages > segment.populate_mark else None
        if wish is not None and self._prefault is not None:
            self._prefault.ask(wish)
        return ordinal << _SEGMENT_SHIFT | row << _ROW_SHIFT | generation

    def _grow(self, pages: int) -> bool:
        """Adds a segment, if one may come and would have room for an extent of so many pages."""
        ordinal = len(self._segments)
        if self._closed or ordinal >= self._segments_max or pages > self._segment_pages - 1 - self._chunk_pages:
            return False
        try:
            segment = Segment(ordinal, self._segment_pages * ALIGN_BYTES, self._id, shareable=self._shareable)
        except OSError as error:
            self.reason = f"no memory for segment {ordinal}: {error.strerror}"
            return False
        self.reason = ""
        self._space.add(ordinal * self._segment_pages + 1, self._segment_pages - 1)
        self._segments.append(segment)
        return True

    def _grow_table(self, segment: Segment) -> bool:
        base = segment.ordinal * self._segment_pages
        start = self._space.take_top(base, base + self._segment_pages, self._chunk_pages)
        if start < 0:
            return False
        if segment.add_chunk(start - base):
            return True
        self._space.add(start, self._chunk_pages)
        return False

    def _ahead(self, segment: Segment, used_pages: int) -> Buffer | None:
        """The AHEAD_BYTES past the pages in use, to populate; the mark moves half that far, to be there in time."""
        if self._prefault is None:
            segment.populate_mark = self._segment_pages
            return None
        ahead = AHEAD_BYTES // ALIGN_BYTES
        last = min(self._segment_pages, used_pages + ahead)
        segment.populate_mark = last if last == self._segment_pages else last - ahead // 2
        return segment.span.slice(used_pages * ALIGN_BYTES, (last - used_pages) * ALIGN_BYTES)

    def _forget(self) -> None:
        """In a forked child: the memory is the parent's, and so are its locks and threads."""
        self._lock = threading.Lock()
        self._prefault = None
        self.close()


def _check_shape(payload: Payload) -> None:
    if payload.size < 0 or payload.part_bytes <= 0 or part_count(payload.size, payload.part_bytes) > PARTS_MAX:
        raise ConfigError(f"{payload.size} bytes in parts of {payload.part_bytes} are more than {PARTS_MAX} parts")
    if len(payload.name.key) not in (16, 32):
        raise ConfigError(f"a key has 16 or 32 bytes, not {len(payload.name.key)}")


_arenas: weakref.WeakSet[Arena] = weakref.WeakSet()


def _forget_in_child() -> None:
    for arena in list(_arenas):
        arena._forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
