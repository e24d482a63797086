"""Pressure: keeps memory under its high mark in the background, so that no reader has to evict."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from tiercache.model import TierId
from tiercache.placement import bytes_over, plan_pressure

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import numpy as np
    import numpy.typing as npt

    from tiercache.cache.demotion import Demotion
    from tiercache.cache.tiers import Tiers

VICTIMS_MAX = 8
"""Victims named at a time: what waits for its demotion cannot be evicted by a reader in need, so let it be few."""


class Pressure:
    """Background eviction from memory; on the cache's loop."""

    def __init__(self, tiers: Tiers, demotion: Demotion) -> None:
        self._tiers, self._demotion = tiers, demotion
        self._wake = asyncio.Event()
        self.spill: Callable[[npt.NDArray[np.int64]], Awaitable[None]] | None = None
        """Where what no lower tier here takes may go before it is evicted."""

    def wake(self) -> None:
        """Memory may have gone over its mark."""
        self._wake.set()

    async def run(self) -> None:
        """Relieves memory for as long as the cache is open."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            self._tiers.drain()
            await self.relieve()

    async def relieve(self) -> None:
        """Evicts from above the high mark to the low mark; what the SSD lacks is copied there first."""
        settings = self._tiers.settings
        slots_max = self._tiers.index.slots_max
        if self._tiers.index.used > slots_max * settings.high_mark:
            self._tiers.make_slots(slots_max - int(slots_max * settings.low_mark))
        status = self._tiers.memory.status()
        await self._evict(bytes_over(status.used_bytes, status.capacity_bytes, settings.high_mark, settings.low_mark))

    async def make_room(self, wanted_bytes: int) -> bool:
        """Evicts until so much is free below the high mark, as far as nothing is lost by that: whether it is."""
        if not self._tiers.ssd_writable:
            return False
        status = self._tiers.memory.status()
        mark = int(status.capacity_bytes * self._tiers.settings.high_mark)
        if wanted_bytes > mark:  # all would be evicted for nothing
            return False
        await self._evict(status.used_bytes + wanted_bytes - mark)
        return self._tiers.memory.status().used_bytes + wanted_bytes <= mark

    async def _evict(self, over: int) -> None:
        """Evicts about so many bytes; what the SSD lacks is copied there first, or spilled where there is no SSD."""
        tiers, count = self._tiers, 1
        while over > 0:
            victims = tiers.index.victims(TierId.MEMORY, count)
            if not len(victims):
                return
            facts = tiers.index.facts(victims)
            plan = plan_pressure(victims, facts.memory_parts, facts.ssd_parts, can_demote=tiers.ssd_writable)
            if len(plan.demote):
                try:
                    await self._demotion.write(plan.demote)
                except OSError as error:
                    self._demotion.fault(error)
            elif self.spill is not None and not tiers.ssd_writable:
                await self.spill(victims)
            freed = tiers.forget(victims)
            if not freed:
                return
            over -= freed
            count = max(1, min(VICTIMS_MAX, over * len(victims) // freed))
