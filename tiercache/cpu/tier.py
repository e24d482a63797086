"""MemoryTier: entries in host memory, where every load lands and where readers see the bytes in place."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from tiercache.buffers import copy, copy_many, copy_many_verified, copy_parts, copy_range_verified, copy_verified
from tiercache.cpu import layout
from tiercache.cpu.adopt import adopt
from tiercache.cpu.arena import SEGMENT_BYTES, Arena
from tiercache.cpu.prefault import Prefault
from tiercache.errors import ConfigError
from tiercache.model import Outcome, Payload
from tiercache.tier import Health, TierStatus

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tiercache.buffers import Buffer
    from tiercache.cpu.adopt import Adopted
    from tiercache.cpu.places import Place
    from tiercache.cpu.segment import Segment
    from tiercache.model import Facts, Name
    from tiercache.tier import Want

_TURN_BYTES = 8 << 20  # the loop gets a turn after each so many copied bytes: less than a millisecond
_PREFAULT_FROM_BYTES = 64 << 20  # smaller arenas are touched in no time


class MemoryTier:
    """The memory tier: implements Tier and Addressable over an Arena.

    The plain methods may be called by any thread. Nothing survives the process: `scan` finds nothing, and `flush`
    has nothing to wait for.
    """

    name = "memory"

    def __init__(
        self,
        capacity_bytes: int,
        *,
        segment_bytes: int = SEGMENT_BYTES,
        arena_id: bytes = bytes(16),
        shareable: bool = True,
    ) -> None:
        prefault = Prefault() if capacity_bytes >= _PREFAULT_FROM_BYTES else None
        self.arena = Arena(
            capacity_bytes,
            segment_bytes=segment_bytes,
            arena_id=arena_id,
            shareable=shareable,
            prefault=prefault,
        )

    @property
    def entry_bytes_max(self) -> int:
        """The largest entry that can ever be reserved."""
        return self.arena.entry_bytes_max

    def reserve(
        self, names: Sequence[Name], sizes: Sequence[int], part_bytes: Sequence[int], *, sparse: bool = False
    ) -> list[int]:
        """Locations of new extents, no part of which is present, or FULL. Raises ConfigError on impossible shapes."""
        shapes = zip(names, sizes, part_bytes, strict=True)
        return self.arena.reserve([Payload(name, size, part, 0, b"") for name, size, part in shapes], sparse)

    def buffers(self, locations: Sequence[int]) -> list[Buffer]:
        """The extents in place. Raises LookupError where one was freed: the caller holds what it asks for."""
        return self.arena.buffers(locations)

    def commit(self, locations: Sequence[int], parts: Sequence[int], digests: Sequence[bytes]) -> None:
        """Declares more parts of extents present. Raises LookupError where one was freed, ConfigError on odd maps."""
        for location, present, rows in zip(locations, parts, digests, strict=True):
            self.arena.commit(location, present, rows)

    def payloads(self, locations: Sequence[int]) -> list[Payload]:
        """Names, shapes, parts and digests of extents. Raises LookupError where one was freed."""
        places = [self.arena.need(location) for location in locations]
        return [place.segment.payload(place.at) for place in places]

    def digests(self, locations: Sequence[int]) -> list[bytes]:
        """Digests of extents in the Payload layout, undefined for absent parts; raises as `buffers`."""
        return self.arena.digests(locations)

    def read_now(self, wants: Sequence[Want], targets: Sequence[Buffer], *, verify: bool = True) -> list[Outcome]:
        """`read` in the calling thread, without a loop; any thread. The GIL is released while bytes move.

        `verify=False` leaves the digests out, and nothing else: key, shape and generation are checked after the copy.
        """
        return [self._read(want, target, verify) for want, target in zip(wants, targets, strict=True)]

    def copy_out(
        self,
        locations: Sequence[int],
        targets: Sequence[Buffer],
        spans: Sequence[range] | None = None,
        *,
        verify: bool = True,
    ) -> list[Outcome]:
        """Copies extents that the caller holds, whole or a span of each, to the start of each target (see Addressable).

        Raises LookupError where one was freed, ConfigError where a target is too small.
        """
        if spans is not None:
            return copy_places([self.arena.need(location) for location in locations], targets, spans, verify=verify)
        sources = self.arena.sources(locations, hashed=verify)
        for source, target in zip(sources, targets, strict=True):
            if target.length < source[1]:
                raise ConfigError(f"a target has {target.length} bytes, its entry {source[1]}: pass a larger buffer")
        if not verify:
            copy_many(sources, targets)
            return [Outcome.HIT] * len(sources)
        good = copy_many_verified(sources, targets)
        return [Outcome.HIT if one else Outcome.CORRUPT for one in good]

    async def write(self, payloads: Sequence[Payload], sources: Sequence[Buffer]) -> list[int]:
        """Copies the present parts of each source into a new extent and commits them."""
        locations: list[int] = []
        copied = 0
        try:
            for payload, source in zip(payloads, sources, strict=True):
                locations.append(self._write(payload, source))
                copied += payload.size
                if copied >= _TURN_BYTES:
                    copied = 0
                    await asyncio.sleep(0)
        except BaseException:
            self.free(locations)
            raise
        return locations

    async def read(
        self, wants: Sequence[Want], targets: Sequence[Buffer], digests: list[bytes] | None = None
    ) -> list[Outcome]:
        """Copies and verifies; the caller's loop gets a turn every few MiB."""
        outcomes: list[Outcome] = []
        copied = 0
        for want, target in zip(wants, targets, strict=True):
            rows: list[bytes] = []
            outcomes.append(self._read(want, target, True, rows))
            if digests is not None:
                digests.append(rows[0] if outcomes[-1] is Outcome.HIT else b"")
            copied += want.size
            if copied >= _TURN_BYTES:
                copied = 0
                await asyncio.sleep(0)
        return outcomes

    def free(self, locations: Sequence[int]) -> None:
        """Gives extents back; stale and unknown locations are ignored."""
        self.arena.release(locations)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The memory so far, for processes that map it too; see Arena."""
        return self.arena.segments

    def adopt(self, files: Sequence[tuple[int, int]]) -> Adopted:
        """Takes over what an owner of the same arena left in memory files, (ordinal, descriptor) each; see adopt."""
        return adopt(self.arena, files)

    def describe(self, locations: Sequence[int], payloads: Sequence[Payload]) -> None:
        """Writes down all that is known of extents before they are filled, for an owner that may come after this one;
        their parts and digests are left out. Raises LookupError where one was freed."""
        for location, payload in zip(locations, payloads, strict=True):
            self.arena.describe(location, payload)

    def retire(self, locations: Sequence[int]) -> None:
        """Says in the table that these are on their way out: no other process finds them there by itself any more.
        Stale and unknown locations are ignored."""
        self.arena.retire(locations)

    def scan(self) -> Iterator[Facts]:
        """Nothing: memory starts empty."""
        return iter(())

    async def flush(self) -> None:
        """Nothing to wait for: memory is never durable, and says so by what it finds at opening."""

    async def close(self) -> None:
        """Gives the memory back as soon as the last Buffer over it is gone. Idempotent."""
        self.arena.close()

    def status(self) -> TierStatus:
        """Usage and health now."""
        arena = self.arena
        health = Health.OFF if arena.closed else Health.HEALTHY
        return TierStatus(self.name, health, arena.capacity_bytes, arena.used_bytes, 0, 0, arena.reason)

    def _write(self, payload: Payload, source: Buffer) -> int:
        location = self.arena.reserve([payload])[0]
        if location >= 0:
            try:
                copy_parts(source, self.arena.need(location).span, payload.part_bytes, payload.parts)
                self.arena.commit(location, payload.parts, payload.digests)
            except BaseException:
                self.arena.release([location])
                raise
        return location

    def _read(self, want: Want, target: Buffer, verify: bool, rows: list[bytes] | None = None) -> Outcome:
        place = self.arena.find(want.location)
        if place is None:
            return Outcome.MISS
        segment, at, size, part_bytes = place.segment, place.at, place.size, place.part_bytes
        key, ordinal = want.name
        memory = segment.memory
        if memory[at : at + len(key)] != key or memory[at + layout.WIDTH_AT] != len(key) or place.ordinal != ordinal:
            return Outcome.MISS
        if size != want.size or part_bytes != want.part_bytes or want.parts & ~place.parts:
            return Outcome.MISS
        if not verify:
            copy_parts(place.span, target, part_bytes, want.parts)
            return Outcome.MISS if place.stale else Outcome.HIT
        digests = place.digests
        good = copy_verified(place.span, target, part_bytes, want.parts, digests)
        if rows is not None:
            rows.append(digests)
        if place.stale:
            return Outcome.MISS
        return Outcome.HIT if good else Outcome.CORRUPT


def copy_places(
    places: Sequence[Place], targets: Sequence[Buffer], spans: Sequence[range] | None, *, verify: bool
) -> list[Outcome]:
    """Copies extents, whole or a span of each, to the start of each target: HIT, or CORRUPT where a digest differs."""
    if spans is not None:
        return [_copy_span(*one, verify) for one in zip(places, targets, spans, strict=True)]
    for place, target in zip(places, targets, strict=True):
        if target.length < place.size:
            raise ConfigError(f"a target has {target.length} bytes, its entry {place.size}: pass a larger buffer")
    sources = [place.source(verify) for place in places]
    if not verify:
        copy_many(sources, targets)
        return [Outcome.HIT] * len(places)
    good = copy_many_verified(sources, targets)
    return [Outcome.HIT if one else Outcome.CORRUPT for one in good]


def _copy_span(place: Place, target: Buffer, span: range, verify: bool) -> Outcome:
    if target.length < len(span):
        raise ConfigError(f"a target has {target.length} bytes, its span {len(span)}: pass a larger buffer")
    if not verify:
        copy(place.span.slice(span.start, len(span)), target)
        return Outcome.HIT
    same = copy_range_verified(place.span, target, span, place.part_bytes, place.digests)
    return Outcome.HIT if same else Outcome.CORRUPT
