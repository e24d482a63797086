"""Adoption: a new owner takes over the memory of one that died.

The memory outlives the process, because its clients have it mapped. All of it is hashed before the door opens (some
GB a second), and what is right is in the index then. Until every living client of the dead owner has said what it
holds, or has died, or has let the memory go, nothing of it is evicted and no space of it is given away.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import fields
from typing import TYPE_CHECKING, cast

import numpy as np

from tiercache.cache.tiers import whole
from tiercache.errors import ConfigError, ProtocolError, TierCacheError, UnavailableError
from tiercache.lease import Lease
from tiercache.model import Form, Name, Outcome, TierId
from tiercache.owner.state import maps_memory, memory_files
from tiercache.settings import Settings
from tiercache.wire.sockets import Watch, close_all, pidfd_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tiercache.cache import Cache
    from tiercache.cpu.tier import MemoryTier
    from tiercache.index import Match
    from tiercache.model import Facts
    from tiercache.owner.state import Client, Process, State

log = logging.getLogger("tiercache.owner")

PATIENCE = 3.0
"""After so many times `owner_deadline_s` it is said who is waited for; a disk that is silent for so many times
`ssd_deadline_s` is not waited for."""
LOOK_S = 1.0
"""Clients that are waited for are looked at so often: they may have let the memory go without a word."""


class Adoption:
    """What a dead owner left, from when it was found until nobody but this owner knows of it any more."""

    def __init__(self, left: State, files: dict[int, int], settings: Settings) -> None:
        self.arena, self.settings = left.arena, settings
        self.awaited = set(left.clients)
        """Clients of the dead owner that have not come back yet, and whose processes live and have the memory. One
        process may have several, and each holds what it holds: when one has come back the others have not."""
        self._strike_off()
        self._files = files
        self._pins: list[Match] = []
        self._doubted: list[Match] = []
        """Entries whose copies on SSD may be of the past: they stay in memory until they have been written anew."""
        self._saving: asyncio.Task[None] | None = None
        self._orphans: dict[int, int] = {}
        """Extents that nothing in the index points to, each with how many leases hold it: their bytes have to stay for
        whoever had a lease on them when the owner died."""
        self._settled = False
        self._watches: dict[Process, Watch] = {}
        self._look: asyncio.TimerHandle | None = None
        self._looks = 0
        self._on_settled: Callable[[], None] = lambda: None
        self._cache: Cache

    @classmethod
    def of(cls, left: State, settings: Settings) -> Adoption | None:
        """What can be taken over, or None when there is nothing, or nothing that may be touched."""
        if left.strangers:
            log.warning("the dead owner had %d clients in other PID namespaces: its memory is theirs", left.strangers)
            return None
        known = {each.name for each in fields(Settings)} - {"sources"}
        try:
            kept = {name: value for name, value in left.settings.items() if name in known}
            theirs = Settings(**{**kept, "directory": settings.directory})
        except (ConfigError, TypeError) as error:
            log.warning("the dead owner's memory cannot be used by this version: %s", error)
            return None
        files = memory_files(left.arena, [each for each in left.processes if each.alive])
        return cls(left, files, theirs) if files else None

    async def take(self, cache: Cache) -> bool:
        """Brings what is right into the index of a cache that nobody else uses yet; False when that cannot be done."""
        self._cache = cache
        memory = cast("MemoryTier", cache.tiers.memory)
        loop = asyncio.get_running_loop()
        try:
            self._adopted = memory.adopt(sorted(self._files.items()))
        except ProtocolError as error:
            log.warning("the dead owner's memory cannot be used: %s", error)
            return False
        finally:
            close_all(self._files.values())
        await self._all_known(cache)
        batches = self._adopted.facts()
        taken = 0
        while (facts := await loop.run_in_executor(None, next, batches, None)) is not None:
            taken += self._load(facts)
        self._orphans.update(dict.fromkeys(self._adopted.orphans(), 0))
        log.info("took over %d entries of the owner that died; %d clients are to come back", taken, len(self.awaited))
        return True

    async def _all_known(self, cache: Cache) -> None:
        """Waits until all that the SSD remembers is in the index: only then can be told what of it is of the past.
        Raises UnavailableError where the disk is silent: nobody could be served without it."""
        known = asyncio.ensure_future(cache.call("status", {}))
        patience_s = PATIENCE * self.settings.ssd_deadline_s
        loop = asyncio.get_running_loop()
        before, since_s = -1, loop.time()
        try:
            while not (await asyncio.wait([known], timeout=min(LOOK_S, patience_s)))[0]:
                told = cache.tiers.recovered_rows
                if told != before:
                    before, since_s = told, loop.time()
                elif loop.time() - since_s > patience_s:
                    raise UnavailableError(f"the SSD has not told what it remembers for {patience_s:g} s")
            known.result()
        finally:
            known.cancel()

    def _load(self, facts: Facts) -> int:
        """Rows whose bytes are right come into the index, pinned. What finds no place there stays as an orphan."""
        tiers = self._cache.tiers
        tiers.expiries |= bool(facts.expiries_s.any())
        loaded = tiers.index.load(facts, TierId.MEMORY)
        slots = tiers.index.slots_at(TierId.MEMORY, facts.locations)
        inside = slots[slots >= 0]
        known = tiers.index.facts(inside)
        doubted = inside[(known.ssd_location >= 0) & (known.ssd_parts == 0)]
        if len(doubted):
            self._doubted.append(tiers.index.hold(doubted.tolist()))
        if len(inside):
            self._pins.append(tiers.index.hold(inside.tolist()))
            # Their writers may live, and not know yet: until they are back, nobody else writes what is missing.
            partial = known.memory_parts != whole(known.size, known.part_bytes)
            self._cache.blocks.freeze(known.memory_location[partial].tolist())
        self._orphans.update(dict.fromkeys(facts.locations[slots < 0].tolist(), 0))
        odd = (slots < 0) & np.isin(facts.locations, loaded.surplus) & (facts.forms != Form.PAGE)
        if odd.any():
            self._drop_past([facts.keys[row, : int(facts.widths[row])].tobytes() for row in np.flatnonzero(odd)])
        return len(inside)

    def _drop_past(self, keys: list[bytes]) -> None:
        """Entries that memory has in another size than the SSD: they were deleted and put again, which the SSD has not
        heard of. What is in memory under such a name too (twice, then) is left as it is."""
        tiers = self._cache.tiers
        names = [Name(key) for key in dict.fromkeys(keys)]
        match = tiers.index.match(names)
        elsewhere = (match.slots >= 0) & (tiers.index.facts(match.slots).memory_location < 0)
        tiers.release(match)
        past = [name for name, gone in zip(names, elsewhere.tolist(), strict=True) if gone]
        tiers.free(tiers.index.remove_names(past)[0])

    # -- clients that come back ----------------------------------------------------------------------------------------

    def hold(self, locations: Sequence[int]) -> Lease | None:
        """A lease on what a client held before; None where some of it is not there as it was."""
        known = self._cache.serving.hold(locations)
        if known is not None:
            return known
        tiers = self._cache.tiers
        where = np.array(locations, np.int64)
        slots = tiers.index.slots_at(TierId.MEMORY, where)
        alone: list[int] = where[slots < 0].tolist()
        if any(location not in self._orphans for location in alone):
            return None
        for location in alone:
            self._orphans[location] += 1
        pin = tiers.index.hold(slots[slots >= 0].tolist())

        def end(safely: bool) -> None:
            tiers.end_of(pin)(safely)
            for location in alone:
                self._orphans[location] -= 1
            if safely and self._settled:
                self._free_orphans()

        return Lease([Outcome.HIT] * len(locations), list(locations), tiers.memory, end)

    def begin(self, on_settled: Callable[[], None]) -> None:
        """Waits for the living clients of the dead owner; `on_settled` is called when there are none, now perhaps."""
        self._on_settled = on_settled
        loop = asyncio.get_running_loop()
        for each in sorted({client.process for client in self.awaited}):
            pidfd = pidfd_of(each.pid)
            if pidfd is not None:
                self._watches[each] = Watch(pidfd, loop, lambda gone=each: self._died(gone))  # type: ignore[misc]
        self._look_around()

    def heard(self, pid: int, token: str, tokens: frozenset[str] | None = None) -> None:
        """This client has said what it holds. `tokens`: of all clients in its process; another one has left, which the
        dead owner did not come to note."""
        ours = [each for each in self.awaited if each.process.pid == pid]
        self._gone([each for each in ours if each.token == token or (tokens is not None and each.token not in tokens)])

    def _died(self, process: Process) -> None:
        self._gone([each for each in self.awaited if each.process == process])

    def _gone(self, some: Sequence[Client]) -> None:
        self.awaited.difference_update(some)
        left = {client.process for client in self.awaited}
        for process in [process for process in self._watches if process not in left]:
            self._watches.pop(process).close()
        if not self.awaited:
            self._settle()

    def _strike_off(self) -> None:
        """Nobody waits for who has died, or has let the memory go without coming back."""
        there = {each: maps_memory(self.arena, each) for each in {client.process for client in self.awaited}}
        self.awaited = {client for client in self.awaited if there[client.process]}

    def _look_around(self) -> None:
        self._strike_off()
        if not self.awaited:
            self._settle()
            return
        self._looks += 1
        if self._looks == max(1, round(PATIENCE * self.settings.owner_deadline_s / LOOK_S)):
            who = ", ".join(sorted({str(client.process.pid) for client in self.awaited}))
            log.warning("process %s lives, but does not come back: what was taken over makes no room until then", who)
        self._look = asyncio.get_running_loop().call_later(LOOK_S, self._look_around)

    def _settle(self) -> None:
        """Everybody who holds something has said so: the rest may go."""
        if self._settled:
            return
        self._settled = True
        self.close()
        self._adopted.settle()
        self._cache.blocks.thaw()
        self._cache.tiers.release(*self._pins)
        self._pins.clear()
        self._free_orphans()
        if self._doubted:
            self._saving = asyncio.get_running_loop().create_task(self._save())
        log.info("all clients of the dead owner are back or gone")
        self._on_settled()

    async def saved(self) -> None:
        """Returns when nothing waits to be written anew."""
        if self._saving is not None:
            await self._saving

    async def _save(self) -> None:
        """Writes to the SSD what it may have in an older state."""
        try:
            await self._cache.flush()
        except TierCacheError as error:
            log.warning("not everything that was taken over is on the SSD: %s", error)
        self._cache.tiers.release(*self._doubted)
        self._doubted.clear()

    def _free_orphans(self) -> None:
        free = [location for location, holds in self._orphans.items() if holds <= 0]
        self._cache.tiers.memory.free(free)
        for location in free:
            del self._orphans[location]

    def close(self) -> None:
        """Watches nobody any more."""
        if self._look is not None:
            self._look.cancel()
        for watch in self._watches.values():
            watch.close()
        self._watches.clear()
