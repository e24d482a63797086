"""Recovery: fills the index from what the SSD remembers, in the background, while the cache already serves.

Until it is done, a name that is not in the index yet is looked up in the rows that the SSD tier has read so far, so
that the first hit after a restart need not wait for the last row.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from tiercache.model import TierId

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tiercache.cache.tasks import Tasks
    from tiercache.cache.tiers import Tiers
    from tiercache.model import Facts, Name


@runtime_checkable
class Findable(Protocol):
    """What a tier adds whose facts can be asked for by name before `scan` has ended."""

    def find(self, names: Sequence[Name]) -> Facts:
        """Facts of those names the tier has; for blocks, of their ancestors too, parents first. Blocking, brief."""
        ...


class Recovery:
    """Loads facts into the index, batch after batch. `done` is true from the start where there is nothing to load."""

    def __init__(self, tiers: Tiers) -> None:
        self._tiers = tiers
        self._stopped = False
        self.done = True
        self.entries = 0

    def begin(self, tasks: Tasks) -> None:
        """Starts loading as a background task."""
        self.done = False
        tasks.start(self._run(), "recover from SSD")

    def stop(self) -> None:
        """Ends loading after the batch at hand."""
        self._stopped = True

    async def _run(self) -> None:
        ssd = self._tiers.ssd
        assert ssd is not None
        loop = asyncio.get_running_loop()
        batches: Iterator[Facts] = ssd.scan()
        try:
            while not self._stopped:
                facts = await loop.run_in_executor(None, next, batches, None)
                if facts is None:
                    break
                await loop.run_in_executor(None, self._load, facts)
        finally:
            self.done = True

    def _load(self, facts: Facts) -> None:
        tiers = self._tiers
        if tiers.ssd is None:
            return
        if facts.expiries_s.any():
            tiers.expiries = True
        refused = tiers.index.load(facts, TierId.SSD)
        self.entries += len(facts.sizes) - len(refused)
        if len(refused):
            tiers.ssd.free([int(location) for location in refused])

    async def find(self, names: Sequence[Name]) -> None:
        """While recovery runs: sees to it that these names are in the index if the SSD has them."""
        if self.done or not isinstance(self._tiers.ssd, Findable):
            return
        lacking = [name for name, there in zip(names, self._tiers.index.contains(names), strict=True) if not there]
        if lacking:
            facts = await asyncio.get_running_loop().run_in_executor(None, self._tiers.ssd.find, lacking)
            self._load(facts)
