"""ArenaView: the arena of another process, mapped; locations are resolved and copied from here without asking it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from tiercache.cpu import layout
from tiercache.cpu.places import SEGMENT_MAX, Place, Places
from tiercache.cpu.segment import Segment
from tiercache.cpu.tier import copy_places
from tiercache.errors import ClosedError, ProtocolError
from tiercache.model import ALIGN_BYTES, PARTS_MAX, Form, Outcome

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tiercache.buffers import Buffer
    from tiercache.model import Name


class ArenaView(Places):
    """Somebody else's arena, mapped read and write: implements lease.Extents.

    The owner frees and reuses extents meanwhile, so each copy is compared with the generation once more after it was
    made. What the tables say is checked before memory is touched: a row that reaches out of its segment is no extent.
    """

    def __init__(self, arena_id: bytes) -> None:
        super().__init__()
        self._id = arena_id

    @property
    def known(self) -> int:
        """Segments that were attached so far; the next one to ask the owner for."""
        return len(self._segments)

    @property
    def segments(self) -> list[tuple[int, int]]:
        """Ordinals and descriptors of what is attached, for an owner that comes after this one. The descriptors stay
        the view's."""
        return [(one.ordinal, one.fd) for one in self._segments if one is not None and one.fd is not None]

    def attach(self, ordinal: int, fd: int) -> None:
        """Maps a segment. The descriptor is the view's from now on, also when this fails; one too many is closed.

        Raises ProtocolError where it is not that segment of this arena, or not the memory that is mapped under this
        number already: then this view is of no more use. Raises OSError where it cannot be mapped.
        """
        if not 0 <= ordinal <= SEGMENT_MAX:
            os.close(fd)
            raise ProtocolError(f"an arena has no segment {ordinal}")
        segment = Segment.attach(ordinal, fd, self._id)
        with self._lock:
            closed, known = self._closed, self._segments[ordinal] if ordinal < len(self._segments) else None
            if not closed and known is None:
                segments = self._segments + [None] * (ordinal + 1 - len(self._segments))
                segments[ordinal] = segment
                self._segments = segments  # in one piece: other threads look while this grows
                return
            same = known is not None and known.file == segment.file
        segment.close()
        if closed:
            raise ClosedError("the memory arena is closed")
        if not same:
            raise ProtocolError(f"segment {ordinal} of the arena is not the memory that it was")

    def find(self, location: int) -> Place | None:
        """The extent at a location; None when it was freed, never was, or is not what an extent can be."""
        place = super().find(location)
        if place is None:
            return None
        segment, at, size, _, offset_pages, _, _, part_bytes = place
        if not layout.intact(segment.memory, at):
            return None
        if offset_pages * ALIGN_BYTES + size > segment.size or size > part_bytes * PARTS_MAX or not part_bytes:
            return None
        return place

    def glance(self, location: int, name: Name, now_s: float = 0) -> Place | None:
        """The extent at a location if it is that of `name`, present in whole or part, not retired, and not over at
        `now_s` (wall clock); see `parts` of the answer. It may go at any moment: copy, then ask whether it is stale."""
        place = self.find(location)
        if place is None:
            return None
        key, ordinal = name
        found, expiry_s, width, form, retired, state = layout.IDENTITY.unpack_from(place.segment.memory, place.at)
        if found[:width] != key or state != layout.PRESENT or retired or (expiry_s and expiry_s <= now_s):
            return None
        return place if place.ordinal == ordinal or form == Form.BLOCK else None  # a block's is only its depth

    def copy_out(
        self,
        locations: Sequence[int],
        targets: Sequence[Buffer],
        spans: Sequence[range] | None = None,
        *,
        verify: bool = True,
    ) -> list[Outcome]:
        """Copies whole extents, or span i of each, to the start of target i: HIT; CORRUPT where a digest differs; MISS
        where the extent was freed, before or while it was copied, or ends before the span does. After another answer
        than HIT the target is undefined. Raises ConfigError where a target is too small."""
        return self.copy_places([self.find(location) for location in locations], targets, spans, verify=verify)

    def copy_places(
        self,
        places: Sequence[Place | None],
        targets: Sequence[Buffer],
        spans: Sequence[range] | None = None,
        *,
        verify: bool = True,
    ) -> list[Outcome]:
        """`copy_out` of what was found before, by `find` or `glance`; None is a MISS."""
        outcomes = [Outcome.MISS] * len(places)
        there: list[int] = []
        found: list[Place] = []
        for i, place in enumerate(places):
            if place is not None and (spans is None or (0 <= spans[i].start and spans[i].stop <= place.size)):
                there.append(i)
                found.append(place)
        some = None if spans is None else [spans[i] for i in there]
        copied = copy_places(found, [targets[i] for i in there], some, verify=verify)
        for i, place, outcome in zip(there, found, copied, strict=True):
            if not place.stale:
                outcomes[i] = outcome
        return outcomes
