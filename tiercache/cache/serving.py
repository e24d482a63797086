"""Serving: what the owner of a shared directory asks of a cache beside Core, on behalf of other processes.

They have the memory mapped and speak of locations: what they fill, what they have read, what they held before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tiercache.buffers import verify_parts
from tiercache.cache.bringing import EVERY
from tiercache.cache.tiers import Mapped, whole
from tiercache.lease import Lease
from tiercache.model import Form, Name, Outcome, TierId

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    import numpy.typing as npt

    from tiercache.cache.blocks import Blocks
    from tiercache.cache.recovery import Recovery
    from tiercache.cache.storing import Storing, Ticket
    from tiercache.cache.tiers import Tiers
    from tiercache.index import Match, SlotFacts
    from tiercache.model import Terms

    U64 = npt.NDArray[np.uint64]

LOCATIONS_MAX = 1 << 16
"""Locations whose slots are remembered."""


class Serving:
    """See the module. Any thread, except for the coroutines: those run on the cache's loop."""

    def __init__(
        self,
        tiers: Tiers,
        recovery: Recovery,
        storing: Storing,
        *,
        blocks: Blocks,
        lease: Callable[[Match, list[int], None, str], Awaitable[Lease]],
    ) -> None:
        """`lease` brings parts of what was matched to memory, as far as a local tier has them, and counts that as hits
        and misses of some kind, or of none."""
        self._tiers, self._recovery, self._storing, self._lease = tiers, recovery, storing, lease
        self._blocks = blocks
        self.join = blocks.join
        self.probe = blocks.probe
        self._slots: dict[int, int] = {}  # location in memory -> slot, as far as they were asked for

    @property
    def entry_bytes_max(self) -> int:
        """The largest entry that can ever be put."""
        return self._tiers.memory.entry_bytes_max

    @property
    def segments(self) -> list[tuple[int, int]]:
        """(ordinal, descriptor) of the memory so far; the descriptors stay the cache's."""
        memory: object = self._tiers.memory
        files = memory.segments if isinstance(memory, Mapped) else ()
        return [(one.ordinal, one.fd) for one in files if one.fd is not None]

    # -- leases --------------------------------------------------------------------------------------------------------

    def lease_memory(self, names: Sequence[Name], parts: Sequence[int] | None = None) -> Lease:
        """A lease on what is in memory now, with these parts (a map an entry; all of them without)."""
        tiers = self._tiers
        match = tiers.index.match(names)
        facts = tiers.index.facts(match.slots)
        there = self._has(match, facts, facts.memory_parts, _wanted(facts, parts))
        outcomes = [Outcome.HIT if one else Outcome.MISS for one in there.tolist()]
        kind = "object" if parts is None else "page"
        tiers.metrics.add("tiercache_hits_total", outcomes.count(Outcome.HIT), tier="memory", kind=kind)
        return Lease(outcomes, facts.memory_location.tolist(), tiers.memory, tiers.end_of(match))

    async def lease_local(
        self, names: Sequence[Name], parts: Sequence[int] | None = None, *, together: bool = False
    ) -> Lease | None:
        """A lease on what the local tiers have, brought to memory. With `together` it is None, and nothing is read or
        held, unless all of it is local."""
        tiers = self._tiers
        await self._recovery.find(names)
        if parts is None and not together:
            await self._blocks.bring([name.key for name in names], EVERY)
        match = tiers.index.match(names)
        facts = tiers.index.facts(match.slots)
        wanted = _wanted(facts, parts)
        if together:
            local = facts.memory_parts | (facts.ssd_parts if tiers.ssd_readable else np.uint64(0))
            if not self._has(match, facts, local, wanted).all():
                tiers.release(match)
                return None
        kind = "object" if parts is None else "page"
        if not together:
            return await self._lease(match, wanted.tolist(), None, kind)
        lease = await self._lease(match, wanted.tolist(), None, "")
        if lease.outcomes.count(Outcome.HIT) < len(lease):
            lease.release()
            return None  # whoever asks for the rest counts all of it
        in_memory = int(self._has(match, facts, facts.memory_parts, wanted).sum())
        tiers.metrics.add_all(
            [
                ("tiercache_hits_total", in_memory, "memory", kind),
                ("tiercache_hits_total", len(lease) - in_memory, "ssd", kind),
            ]
        )
        return lease

    def _has(self, match: Match, facts: SlotFacts, present: U64, wanted: U64) -> npt.NDArray[np.bool_]:
        found: npt.NDArray[np.bool_] = (match.slots >= 0) & ((present & wanted) == wanted)
        return found & ~self._tiers.expired(facts.expiry_s)

    def hold(self, locations: Sequence[int]) -> Lease | None:
        """A lease on entries by where they lie in memory; None unless each of them still lies there."""
        tiers = self._tiers
        names = self._names(locations)
        if len(names) < len(locations):
            return None
        match = tiers.index.match(names)
        homes = tiers.index.facts(match.slots).memory_location.tolist()
        if homes != list(locations) or (len(names) and match.pin is None):
            tiers.release(match)
            return None
        return Lease([Outcome.HIT] * len(names), homes, tiers.memory, tiers.end_of(match))

    def touch(self, locations: Sequence[int]) -> None:
        """These were read without asking (on the loop): hits of memory, and the order of use. Locations that have
        been freed since are ignored."""
        slots = self._slots
        if any(location not in slots for location in locations):
            self._learn(locations)
        known = [location for location in locations if location in slots]
        if known:
            rows = np.array([slots[location] for location in known], np.int64)
            self._tiers.index.touch_at(rows, np.array(known, np.int64))
        self._tiers.metrics.add("tiercache_hits_total", len(locations), tier="memory", kind="glance")

    def _learn(self, locations: Sequence[int]) -> None:
        """Finds out whose these locations are. A location is one entry's for ever: its generation sees to that."""
        if len(self._slots) > LOCATIONS_MAX:
            self._slots.clear()
        index = self._tiers.index
        match = index.match(self._names([location for location in locations if location not in self._slots]))
        homes = index.facts(match.slots).memory_location.tolist()
        self._slots.update({at: slot for at, slot in zip(homes, match.slots.tolist(), strict=True) if at >= 0})
        self._tiers.release(match)

    def recheck(self, names: Sequence[Name]) -> None:
        """Somebody found the copies of these in memory damaged: they are hashed, and lost where that is so."""
        tiers = self._tiers
        match = tiers.index.match(names)
        try:
            homes = tiers.index.facts(match.slots).memory_location
            there = np.flatnonzero(homes >= 0)
            places = homes[there].tolist()
            bad = [
                int(match.slots[i])
                for i, one, span in zip(
                    there.tolist(), tiers.memory.payloads(places), tiers.memory.buffers(places), strict=True
                )
                if not verify_parts(span, one.part_bytes, one.parts, one.digests)
            ]
            tiers.lose(np.unique(np.array(bad, np.int64)), TierId.MEMORY)
        finally:
            tiers.release(match)
        tiers.metrics.add("tiercache_corruptions_total", len(bad), tier="memory")

    def _names(self, locations: Sequence[int]) -> list[Name]:
        """Names of what lies there; stale locations are left out."""
        names: list[Name] = []
        for location in locations:
            try:
                payload = self._tiers.memory.payloads([location])[0]
            except LookupError:
                continue
            # A block is found by its digest alone; what stands beside it is its depth.
            names.append(Name(payload.name.key) if payload.form is Form.BLOCK else payload.name)
        return names

    # -- puts ----------------------------------------------------------------------------------------------------------

    async def recall(self, names: Sequence[Name]) -> None:
        """While the cache recovers: brings what the SSD has of these names into the index, before they are put."""
        await self._recovery.find(names)

    def reserve_puts(
        self, names: Sequence[Name], sizes: Sequence[int], terms: Terms, *, chain: bool = False, parent: bytes = b""
    ) -> Ticket:
        """Extents for entries that somebody else fills: lone ones, or the blocks of one chain after `parent`.

        The ticket must be ended, when nobody writes to its extents any more."""
        if chain:
            return self._storing.reserve_chain(names, sizes, terms, parent)
        return self._storing.reserve(names, sizes, terms)


def _wanted(facts: SlotFacts, parts: Sequence[int] | None) -> U64:
    return whole(facts.size, facts.part_bytes) if parts is None else np.asarray(parts, np.uint64)
