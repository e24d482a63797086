"""Serving: what the owner of a shared directory asks of a cache beside Core, on behalf of other processes.

They have the memory mapped and speak of locations: what they fill, what they have read, what they held before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tiercache.lease import Lease
from tiercache.model import Outcome

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt

    from tiercache.cache.demotion import Demotion
    from tiercache.cache.recovery import Recovery
    from tiercache.cache.storing import Storing, Ticket
    from tiercache.cache.tiers import Tiers
    from tiercache.model import Name, Terms


class Serving:
    """See the module. Any thread, except for the coroutines: those run on the cache's loop."""

    def __init__(self, tiers: Tiers, recovery: Recovery, storing: Storing, demotion: Demotion) -> None:
        self._tiers, self._recovery, self._storing, self._demotion = tiers, recovery, storing, demotion

    @property
    def entry_bytes_max(self) -> int:
        """The largest entry that can ever be put."""
        return self._tiers.memory.entry_bytes_max

    async def recall(self, names: Sequence[Name]) -> None:
        """While the cache recovers: brings what the SSD has of these names into the index, before they are put."""
        await self._recovery.find(names)

    async def recalled(self) -> None:
        """Returns when all that the SSD remembers is in the index."""
        await self._recovery.wait()

    def adopted(self, slots: npt.NDArray[np.int64]) -> None:
        """These are in memory since before this cache was made, and the SSD may lack them."""
        self._demotion.mark(slots)

    def reserve_puts(
        self, names: Sequence[Name], sizes: Sequence[int], terms: Terms, *, chain: bool = False, parent: bytes = b""
    ) -> Ticket:
        """Extents for entries that somebody else fills: lone ones, or the blocks of one chain after `parent`.

        The ticket must be ended, when nobody writes to its extents any more."""
        if chain:
            return self._storing.reserve_chain(names, sizes, terms, parent)
        return self._storing.reserve(names, sizes, terms)

    async def save_puts(self, ticket: Ticket, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """Waits for the SSD: of these outcomes of a ticket's commit, the HITs that are not durable become FULL."""
        return await self._demotion.saved(ticket.slots, outcomes)

    def touch(self, locations: Sequence[int]) -> None:
        """These were read without asking: hits of memory, for the books and for the order of use. Locations that have
        been freed since are ignored."""
        self._tiers.release(self._tiers.index.match(self._names(locations)))
        self._tiers.metrics.add("tiercache_hits_total", len(locations), tier="memory", kind="glance")

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

    def _names(self, locations: Sequence[int]) -> list[Name]:
        """Names of what lies there; stale locations are left out."""
        names: list[Name] = []
        for location in locations:
            try:
                names.append(self._tiers.memory.payloads([location])[0].name)
            except LookupError:
                continue
        return names
