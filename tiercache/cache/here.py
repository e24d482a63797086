"""Here: what the SSD has is brought to memory while the reader's own thread waits, without a turn of the I/O loop.

Each turn of the loop costs a blocking reader two switches of threads and several of the interpreter lock, which is more
than the disk takes for a page. So a read of a few pages that memory and SSD have together goes straight to the threads
of the SSD tier and back. Everything unusual (parts that no tier has, somebody else loading the same page, no room, a
fault, damage) is left untouched to `Filling`, which judges, counts and repairs.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from tiercache.index import FEW
from tiercache.lease import Lease
from tiercache.model import Outcome, TierId
from tiercache.tier import Answering, Want

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tiercache.cache.tiers import Tiers
    from tiercache.flight import Flights
    from tiercache.index import Look


class Here:
    """Reads of the SSD in the reader's thread. Any thread, but never one that runs a loop."""

    def __init__(self, tiers: Tiers, flights: Flights, nudge: Callable[[], None]) -> None:
        self._tiers, self._flights, self._nudge = tiers, flights, nudge
        ssd: object = tiers.ssd
        self._ssd = ssd if isinstance(ssd, Answering) else None

    def lease(self, key: bytes, ordinals: Sequence[int], parts: Sequence[int]) -> Lease | None:
        """A lease on pages of one file version with these parts, or None: then ask the loop."""
        tiers = self._tiers
        if self._ssd is None or len(ordinals) > FEW or tiers.expiries or not tiers.ssd_readable or _on_a_loop():
            return None
        slots = tiers.index.hit_local(key, ordinals, parts)
        if slots is None:
            return None
        end = tiers.end_of_few(slots)
        try:
            locations = self._ready(self._ssd, slots, parts)
        except BaseException:
            end(True)
            raise
        if locations is None:
            end(True)
            return None
        return Lease([Outcome.HIT] * len(slots), locations, tiers.memory, end)

    def _ready(self, ssd: Answering, slots: list[int], parts: Sequence[int]) -> list[int] | None:
        """Where in memory the pages lie, all parts there; None where that could not be."""
        index = self._tiers.index
        claim = self._flights.claim(slots)
        if claim is None:
            return None
        try:
            looks = index.look(slots)  # anew: another load of these may have ended just before the claim
            lacks = [i for i, look in enumerate(looks) if parts[i] & ~look.memory_parts]
            if lacks:
                picked = [slots[i] for i in lacks], [looks[i] for i in lacks]
                if not self._fill(ssd, *picked, [parts[i] & ~looks[i].memory_parts for i in lacks]):
                    return None
                looks = index.look(slots)
        finally:
            self._flights.unclaim(claim)
        if any(wanted & ~look.memory_parts for wanted, look in zip(parts, looks, strict=True)):
            return None
        self._tiers.metrics.add_all(
            [
                ("tiercache_hits_total", len(slots) - len(lacks), "memory", "page"),
                ("tiercache_hits_total", len(lacks), "ssd", "page"),
            ]
        )
        return [look.memory_location for look in looks]

    def _fill(self, ssd: Answering, slots: list[int], looks: list[Look], parts: list[int]) -> bool:
        """Reads parts of claimed slots from the SSD; false, and nothing changed, where not all of them came."""
        tiers, memory = self._tiers, self._tiers.memory
        names = tiers.index.names(slots)
        wants = [
            Want(look.ssd_location, name, look.size, look.part_bytes, missing)
            for look, name, missing in zip(looks, names, parts, strict=True)
        ]
        fresh = [i for i, look in enumerate(looks) if look.memory_location < 0]
        found = tiers.reserve(
            [names[i] for i in fresh],
            [looks[i].size for i in fresh],
            [looks[i].part_bytes for i in fresh],
            sparse=True,
        )
        mine = dict(zip(fresh, found, strict=True))
        try:
            if any(location < 0 for location in found):
                return False
            places = [mine.get(i, look.memory_location) for i, look in enumerate(looks)]
            digests: list[bytes] = []
            began_s = tiers.clock.monotonic()
            outcomes = ssd.read_here(wants, memory.buffers(places), digests)
            if any(outcome is not Outcome.HIT for outcome in outcomes):
                return False
            tiers.metrics.observe("tiercache_read_seconds", tiers.clock.monotonic() - began_s, tier="ssd")
            read_bytes = sum(want.parts.bit_count() * want.part_bytes for want in wants)
            tiers.metrics.add("tiercache_read_bytes_total", read_bytes, tier="ssd")
            memory.commit(places, parts, digests)
            return self._place(slots, places, parts, mine)
        finally:
            memory.free([location for location in mine.values() if location >= 0])

    def _place(self, slots: list[int], places: list[int], parts: list[int], mine: dict[int, int]) -> bool:
        """Makes readable what has come; takes out of `mine` the extents that are the index's from now on."""
        index = self._tiers.index
        fresh = list(mine)
        rest = [i for i in range(len(slots)) if i not in mine]
        unwanted = index.place_few(
            [slots[i] for i in fresh], TierId.MEMORY, [places[i] for i in fresh], [parts[i] for i in fresh]
        )
        for i in fresh:
            if places[i] not in unwanted:
                del mine[i]
        index.add_parts([slots[i] for i in rest], TierId.MEMORY, [parts[i] for i in rest], [places[i] for i in rest])
        tiers, settings = self._tiers, self._tiers.settings
        status = tiers.memory.status()
        if status.used_bytes > status.capacity_bytes * settings.high_mark:
            self._nudge()
        return not unwanted


def _on_a_loop() -> bool:
    """Whether this thread runs a loop, which must not stand still for a disk."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
