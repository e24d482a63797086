"""Recovery: fills the index from what the SSD remembers, in the background, while the cache already serves.

Until it is done, a name that is not in the index yet is looked up in the rows that the SSD tier has read so far, so
that the first hit after a restart need not wait for the last row.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import fields
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from tiercache.model import Facts, Name, TierId

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    import numpy.typing as npt

    from tiercache.cache.tasks import Tasks
    from tiercache.cache.tiers import Tiers


log = logging.getLogger(__name__)

ANCESTORS_MAX = 64
"""Blocks above one that is asked for by itself, in the middle of its chain, that are looked up before the last row."""


@runtime_checkable
class Findable(Protocol):
    """What a tier adds whose facts can be asked for by name before `scan` has ended."""

    async def find(self, names: Sequence[Name]) -> Facts:
        """Facts of those names the tier has."""
        ...


class Recovery:
    """Loads facts into the index, batch after batch. `done` is true from the start where there is nothing to load."""

    def __init__(self, tiers: Tiers) -> None:
        self._tiers = tiers
        self._stopped = False
        self._buried: set[Name] = set()  # deleted while recovery runs: a later batch must not bring them back
        self._waiting: list[Facts] = []
        self.done = True
        self.entries = 0
        self._task: asyncio.Task[None] | None = None

    def begin(self, tasks: Tasks) -> None:
        """Starts loading as a background task."""
        self.done = False
        self._tiers.recovering = True
        self._task = tasks.start(self._run(), "recover from SSD")

    async def wait(self) -> None:
        """Returns when everything is in the index, or never will be."""
        if self._task is not None:
            await asyncio.wait([self._task])

    def stop(self) -> None:
        """Ends loading after the batch at hand."""
        self._stopped = True

    def bury(self, names: Sequence[Name]) -> None:
        """These were deleted: what the scan still says of them is old."""
        if not self.done:
            self._buried.update(names)

    def revive(self, names: Sequence[Name]) -> None:
        """These are being put again."""
        if self._buried:
            self._buried.difference_update(names)

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
                self._tiers.recovered_rows += len(facts.sizes)
                await loop.run_in_executor(None, self._load, facts)
            if not self._stopped:
                await loop.run_in_executor(None, self._load_waiting)
                self._tiers.recovering = False
        finally:
            self.done = True
            self._buried.clear()

    def _load(self, facts: Facts) -> None:
        """Takes one batch into the index. Blocks whose parents have not come yet wait for later batches."""
        tiers = self._tiers
        if tiers.ssd is None or not len(facts.sizes):
            return
        if facts.expiries_s.any():
            tiers.expiries = True
        loaded = tiers.index.load(facts, TierId.SSD)
        self.entries += loaded.taken
        if len(loaded.waiting):
            self._waiting.append(_rows(facts, loaded.waiting))
        self._free(loaded.surplus)
        if self._buried:
            names = list(self._buried)
            match = tiers.index.match(names)
            tiers.free(tiers.index.remove(match.slots[match.slots >= 0]))
            tiers.release(match)

    def _free(self, surplus: npt.NDArray[np.int64]) -> None:
        """Gives back what nothing points to: a row that was loaded twice is no surplus."""
        if len(surplus) and self._tiers.ssd is not None:
            unused = self._tiers.index.slots_at(TierId.SSD, surplus) < 0
            self._tiers.ssd.free(surplus[unused].tolist())

    def _load_waiting(self) -> None:
        """All batches are in: blocks that still have no parent can never be matched, and go."""
        before = -1
        while self._waiting and len(self._waiting) != before:
            waiting, self._waiting = self._waiting, []
            before = len(waiting)
            for facts in waiting:
                self._load(facts)
        for facts in self._waiting:
            self._free(facts.locations)
        self._waiting = []

    async def find(self, names: Sequence[Name]) -> None:
        """While recovery runs: sees to it that these names are in the index if the SSD has them."""
        ssd: object = self._tiers.ssd
        if self.done or not isinstance(ssd, Findable):
            return
        lacking = [name for name, there in zip(names, self._tiers.index.contains(names), strict=True) if not there]
        if not lacking:
            return
        try:
            async with asyncio.timeout(self._tiers.settings.ssd_deadline_s):
                found = [await ssd.find(lacking)]
                asked = set(lacking)
                # A block is taken into the index below its parent only; whoever asks for a chain has asked for that.
                for _ in range(ANCESTORS_MAX):
                    above = [one for one in map(Name, dict.fromkeys(_parents(found[-1]))) if one not in asked]
                    there = self._tiers.index.contains(above)
                    above = [name for name, known in zip(above, there, strict=True) if not known]
                    if not above:
                        break
                    asked.update(above)
                    found.append(await ssd.find(above))
        except OSError as error:  # a timeout too: what the disk cannot tell in time is a miss
            log.warning("the SSD tier could not be asked for %d names while it recovers (%r)", len(lacking), error)
            return
        for facts in reversed(found):
            self._load(facts)


def _rows(facts: Facts, rows: npt.NDArray[np.int64]) -> Facts:
    """Some rows of facts."""
    return Facts(**{column.name: getattr(facts, column.name)[rows] for column in fields(facts)})


def _parents(facts: Facts) -> Iterator[bytes]:
    """Digests of the blocks before these, where they have any."""
    for row, width in enumerate(facts.parent_widths.tolist()):
        if width:
            yield facts.parents[row, :width].tobytes()
