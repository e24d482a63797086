"""Places: how a location becomes an extent, in the process that owns an arena and in those that only map it."""

from __future__ import annotations

import os
import threading
import weakref
from typing import TYPE_CHECKING, NamedTuple

from tiercache.buffers import Buffer
from tiercache.cpu import layout
from tiercache.errors import ClosedError
from tiercache.model import ALIGN_BYTES, part_count

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tiercache.buffers import Source
    from tiercache.cpu.segment import Segment

SEGMENT_SHIFT, ROW_SHIFT = 52, 32
SEGMENT_MAX, ROW_MASK, GENERATION_MASK = (1 << 11) - 1, (1 << 20) - 1, (1 << 32) - 1


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

    def source(self, hashed: bool) -> Source:
        """What a copy of the whole extent needs, its digests only if `hashed`."""
        segment = self.segment
        wanted = self.digests if hashed else b""
        return (
            segment.span.address + self.offset_pages * ALIGN_BYTES,
            self.size,
            self.part_bytes,
            wanted,
            segment.memory,
        )

    @property
    def stale(self) -> bool:
        """Whether the extent was freed since it was found: then what was read of it in between is worthless."""
        layout.fence()
        at, memory = self.at, self.segment.memory
        found = memory[at + layout.GENERATION_AT : at + layout.GENERATION_AT + 4]
        return int.from_bytes(found, "little") != self.generation or memory[at + layout.STATE_AT] not in layout.LIVE


class Places:
    """Mapped segments by their ordinals, and the extents in them by location.

    A location is segment (11 bits), row (20) and generation (32) of an extent. Any thread may call. A forked child
    finds its copy closed, because the memory stays the parent's, or that of whoever the parent has it from.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._segments: list[Segment | None] = []  # None: lost for good, nothing is found there
        self._closed = False
        _all.add(self)

    @property
    def closed(self) -> bool:
        """Whether this was closed, or belongs to the process that this one was forked from."""
        return self._closed

    def find(self, location: int) -> Place | None:
        """The extent at a location; None when it was freed, or never was."""
        ordinal, segments = location >> SEGMENT_SHIFT, self._segments  # one reading: another thread may close
        if not 0 <= ordinal < len(segments):
            return None
        segment = segments[ordinal]
        if segment is None:
            return None
        at = segment.row_at(location >> ROW_SHIFT & ROW_MASK)
        if at < 0:
            return None
        memory = segment.memory
        size, offset_pages, _, generation, number, part_bytes, state, parts = layout.SHAPE.unpack_from(
            memory, at + layout.SHAPE_AT
        )
        if generation != location & GENERATION_MASK or state not in layout.LIVE:
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

    def sources(self, locations: Sequence[int], *, hashed: bool) -> list[Source]:
        """What copies of whole extents need, with digests or without; raises as `need`."""
        segments = self._segments  # one reading: another thread may close
        sources = []
        for location in locations:
            ordinal = location >> SEGMENT_SHIFT
            row, generation = location >> ROW_SHIFT & ROW_MASK, location & GENERATION_MASK
            segment = segments[ordinal] if 0 <= ordinal < len(segments) else None
            source = segment.source(row, generation, hashed) if segment is not None else None
            if source is None:
                self.need(location)
                raise LookupError(f"no extent at {location:#x}: the arena is closing")
            sources.append(source)
        return sources

    def buffers(self, locations: Sequence[int]) -> list[Buffer]:
        """The extents in place. Raises LookupError where one was freed: the caller holds what it asks for."""
        return [self.need(location).span for location in locations]

    def digests(self, locations: Sequence[int]) -> list[bytes]:
        """Digests of extents, undefined where a part is absent. Raises LookupError as `buffers`."""
        return [self.need(location).digests for location in locations]

    def close(self) -> None:
        """Gives the memory back as soon as no Buffer shows it. Idempotent."""
        with self._lock:
            self._closed = True
            segments, self._segments = self._segments, []
        for segment in segments:
            if segment is not None:
                segment.close()

    def forget(self) -> None:
        """In a forked child, by itself: the memory is the parent's, and so are its locks and threads."""
        self._lock = threading.Lock()
        self.close()


_all: weakref.WeakSet[Places] = weakref.WeakSet()


def _forget_in_child() -> None:
    for places in list(_all):
        places.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
