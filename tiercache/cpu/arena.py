"""Arena: extents in segments of shareable memory, under one hard cap."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tiercache.cpu import layout
from tiercache.cpu.freespace import FreeSpace
from tiercache.cpu.places import ROW_MASK, ROW_SHIFT, SEGMENT_SHIFT, Places
from tiercache.cpu.segment import Segment
from tiercache.errors import ConfigError
from tiercache.model import ALIGN_BYTES, PARTS_MAX, Outcome, Payload, part_count

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tiercache.buffers import Buffer
    from tiercache.cpu.prefault import Prefault

SEGMENT_BYTES = 1 << 30
SEGMENTS_MAX = 2047
AHEAD_BYTES = 64 << 20
"""How far past the highest extent used so far memory is populated in the background."""


class Arena(Places):
    """Extents of whole pages, best fit, with a table of them in the same memory that outlives the process' own state.

    Segments come one by one as they are needed, all of one size, and together never exceed `capacity_bytes`, headers
    and tables included. Any thread may call; one lock is held for a few microseconds an extent, never across a copy.
    """

    def __init__(
        self,
        capacity_bytes: int,
        *,
        segment_bytes: int = SEGMENT_BYTES,
        arena_id: bytes = bytes(16),
        shareable: bool = True,
        prefault: Prefault | None = None,
    ) -> None:
        super().__init__()
        if capacity_bytes < 0 or segment_bytes < 3 * ALIGN_BYTES:
            raise ConfigError(f"an arena of {capacity_bytes} bytes in segments of {segment_bytes} bytes is impossible")
        count = min(SEGMENTS_MAX, -(-capacity_bytes // segment_bytes))
        self._segment_pages = capacity_bytes // count // ALIGN_BYTES if count else 0
        self._chunk_pages = layout.chunk_bytes_for(self._segment_pages * ALIGN_BYTES) // ALIGN_BYTES
        self._segments_max = count if self._segment_pages > 1 + self._chunk_pages else 0
        self.capacity_bytes = capacity_bytes
        self.reason = ""
        self.id = arena_id
        """What its memory files are named for."""
        self._shareable = shareable
        self._prefault = prefault
        self._space = FreeSpace()
        self._kept: dict[int, bool] = {}  # adopted, and not to go yet -> whether it was released meanwhile

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
        return tuple([segment for segment in self._segments if segment is not None])

    def reserve(self, payloads: Sequence[Payload], sparse: bool = False) -> list[int]:
        """Locations of new extents for the names and shapes of `payloads`, no part present; or FULL. Memory is made
        ready ahead of its use, but not by `sparse` reservations."""
        for payload in payloads:
            _check_shape(payload)
        return [self._reserve(payload, sparse) for payload in payloads]

    def release(self, locations: Sequence[int]) -> None:
        """Frees extents; what is not the location of one now is ignored."""
        for location in locations:
            with self._lock:
                place = self.find(location)
                if place is None:
                    continue
                if location in self._kept:
                    self._kept[location] = True
                    place.segment.memory[place.at + layout.RETIRED_AT] = 1
                    continue
                page, pages = place.segment.drop_row(location >> ROW_SHIFT & ROW_MASK)
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

    def describe(self, location: int, payload: Payload) -> None:
        """Writes down all that is known of an extent that is being filled, for whoever finds it after this process:
        without it, no more than name and shape. Raises LookupError where it was freed, ConfigError where it is another
        entry's, or present already."""
        with self._lock:
            place = self.need(location)
            memory, at, key = place.segment.memory, place.at, payload.name.key
            same = memory[at : at + len(key)] == key and memory[at + layout.WIDTH_AT] == len(key)
            if not same or (place.size, place.part_bytes) != (payload.size, payload.part_bytes):
                raise ConfigError(f"the extent at {location:#x} was not reserved for this name and shape")
            if memory[at + layout.STATE_AT] != layout.PENDING:
                raise ConfigError(f"the extent at {location:#x} is present: describe it before the first commit")
            place.segment.describe(at, payload)

    def take_over(self, segments: Sequence[Segment | None], free: Sequence[tuple[int, int]], kept: list[int]) -> None:
        """Goes on with the segments of another arena of the same id (see adopt): `free` are their free pages, (first
        page, pages) in the whole arena; `kept` are locations that stay until `let_go`, released or not.

        The segments keep their size, which is that of new ones too. Where they are more than `capacity_bytes` allows,
        the arena holds what is there and does not grow."""
        whole = next(segment for segment in segments if segment is not None)
        with self._lock:
            assert not self._segments, "only an arena that was not used yet can take over another one"
            self._segment_pages, self._chunk_pages = whole.size // ALIGN_BYTES, whole.chunk_pages
            self._segments_max = max(len(segments), min(SEGMENTS_MAX, self.capacity_bytes // whole.size))
            for start, pages in free:
                self._space.add(start, pages)
            self._kept = dict.fromkeys(kept, False)
            self._segments = list(segments)

    def let_go(self) -> None:
        """Nothing is kept any more: what was released meanwhile goes now."""
        with self._lock:
            kept, self._kept = self._kept, {}
        self.release([location for location, released in kept.items() if released])

    def retire(self, locations: Sequence[int]) -> None:
        """Says in the table that extents are on their way out, so that who looks there without asking stops now. What
        is not the location of one now is ignored."""
        for location in locations:
            with self._lock:
                place = self.find(location)
                if place is not None:
                    place.segment.memory[place.at + layout.RETIRED_AT] = 1

    def close(self) -> None:
        """Gives the memory back as soon as no Buffer shows it. Idempotent."""
        with self._lock:
            self._closed, self._space = True, FreeSpace()
        super().close()
        if self._prefault is not None:
            self._prefault.stop()

    def forget(self) -> None:
        """See Places; the thread that populates stays behind with the parent."""
        self._prefault = None
        super().forget()

    def _reserve(self, payload: Payload, sparse: bool) -> int:
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
            assert segment is not None, "a lost segment has no free space"
            if segment.rows_left < rows and not self._grow_table(segment):
                self._space.add(start, pages)
                return Outcome.FULL
            row, generation = segment.make_row(page, pages, payload)
            ahead = not sparse and page + pages > segment.populate_mark
            wish = self._ahead(segment, page + pages) if ahead else None
        if wish is not None and self._prefault is not None:
            self._prefault.ask(wish)
        return ordinal << SEGMENT_SHIFT | row << ROW_SHIFT | generation

    def _grow(self, pages: int) -> bool:
        """Adds a segment, if one may come and would have room for an extent of so many pages."""
        ordinal = len(self._segments)
        if self._closed or ordinal >= self._segments_max or pages > self._segment_pages - 1 - self._chunk_pages:
            return False
        try:
            segment = Segment.create(ordinal, self._segment_pages * ALIGN_BYTES, self.id, shareable=self._shareable)
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


def _check_shape(payload: Payload) -> None:
    if payload.size < 0 or payload.part_bytes <= 0 or part_count(payload.size, payload.part_bytes) > PARTS_MAX:
        raise ConfigError(f"{payload.size} bytes in parts of {payload.part_bytes} are more than {PARTS_MAX} parts")
    if len(payload.name.key) not in (16, 32):
        raise ConfigError(f"a key has 16 or 32 bytes, not {len(payload.name.key)}")
