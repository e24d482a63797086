"""Filling: brings the parts that a reader wants into memory, from the SSD, else through the reader's own load.

Runs on the cache's loop. Equal loads are merged (flight.py); every load runs in a task of the cache with pins of its
own, so that a reader who gives up neither stops nor endangers the others who wait for the same bytes.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tiercache.buffers import part_digests
from tiercache.errors import AbandonedLoad, TierCacheError, UnavailableError
from tiercache.flight import Flights
from tiercache.lease import Gap
from tiercache.model import Outcome, State, TierId
from tiercache.placement import plan_read
from tiercache.tier import Want

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from tiercache.cache.tasks import Tasks
    from tiercache.cache.tiers import Tiers
    from tiercache.lease import Load
    from tiercache.model import Name

ATTEMPTS_MAX = 4
"""Looks at one batch before giving up: memory, SSD, origin, and once more for parts that another reader lost."""
SSD_PATIENCE = 1.5
"""A tier ends a read within its deadline; one that takes this many times as long is not waited for."""


class Share(NamedTuple):
    """Parts of one slot that this call loads itself, and where they land."""

    slot: int
    parts: int
    location: int
    future: asyncio.Future[None]


class Filling:
    """Loads under way and the extents that they fill."""

    def __init__(self, tiers: Tiers, tasks: Tasks, landed: Callable[[npt.NDArray[np.int64]], None]) -> None:
        """`landed` hears of slots that got new parts from elsewhere than the SSD."""
        self._tiers, self._tasks, self._landed = tiers, tasks, landed
        self.flights = Flights()
        self._ssd_loads: set[asyncio.Future[None]] = set()
        self._extents: dict[int, int] = {}  # slot -> extent in memory of which no part is present yet
        self._forsaken: dict[int, list[asyncio.Future[None]]] = {}  # extent that nobody may use -> what may write to it

    async def ensure(
        self, slots: npt.NDArray[np.int64], wanted: npt.NDArray[np.uint64], load: Load | None = None
    ) -> list[Outcome]:
        """Sees to it that these parts of these (pinned, unique) slots are in memory: HIT where they are.

        Without `load`, parts that no tier has are a MISS. Raises what `load` raises, also where another reader's load
        of the same parts failed.
        """
        outcomes = [Outcome.MISS if load is None else Outcome.BUSY] * len(slots)
        distrusted: set[int] = set()  # slots whose SSD copy failed this call
        self._count(slots, wanted, "object" if load is None else "page")
        for _ in range(ATTEMPTS_MAX):
            waits = self._start(slots, wanted, load, outcomes, distrusted)
            if not waits or not await self._all(waits):
                break
        return outcomes

    async def _all(self, futures: Sequence[asyncio.Future[None]]) -> bool:
        """Waits for all of them, then raises the first fault: no load is left behind unobserved. A reader that is
        cancelled here cancels nothing. False where the SSD hangs: its load goes on holding its extents, for a
        thread may still write into them, but nobody waits for it any longer."""
        pending = set(futures)
        from_ssd = pending & self._ssd_loads
        if from_ssd:
            _, pending = await asyncio.wait(pending, timeout=SSD_PATIENCE * self._tiers.settings.ssd_deadline_s)
            if pending & from_ssd:
                self._tiers.metrics.add("tiercache_deadline_misses_total", len(pending & from_ssd), tier="ssd")
            pending -= from_ssd
        if pending:
            await asyncio.wait(pending)
        for future in futures:
            if future.done():
                future.result()
        return all(future.done() for future in futures)

    def _count(self, slots: npt.NDArray[np.int64], wanted: npt.NDArray[np.uint64], kind: str) -> None:
        """One entry is one hit of the lowest tier that it needs, or a miss."""
        facts = self._tiers.index.facts(slots)
        plan = plan_read(wanted, facts.memory_parts, facts.ssd_parts)
        missed, from_ssd = plan.origin != 0, (plan.ssd != 0) & (plan.origin == 0)
        misses, ssd = int(missed.sum()), int(from_ssd.sum())
        self._tiers.metrics.add_all(
            [
                ("tiercache_hits_total", len(slots) - misses - ssd, "memory", kind),
                ("tiercache_hits_total", ssd, "ssd", kind),
                ("tiercache_misses_total", misses, "", kind),
            ]
        )

    def _start(
        self,
        slots: npt.NDArray[np.int64],
        wanted: npt.NDArray[np.uint64],
        load: Load | None,
        outcomes: list[Outcome],
        distrusted: set[int],
    ) -> list[asyncio.Future[None]]:
        """Judges every slot, starts the loads that nobody else runs, and answers what to wait for. Never waits itself:
        between the look and the announcement of a load no other task may come in."""
        index = self._tiers.index
        facts = index.facts(slots)
        readable = facts.ssd_parts if self._tiers.ssd_readable else np.zeros_like(facts.ssd_parts)
        if distrusted:
            readable = np.where(np.isin(slots, list(distrusted)), np.uint64(0), readable)
        plan = plan_read(wanted, facts.memory_parts, readable)
        lacking = np.flatnonzero(plan.ssd | plan.origin)
        for i in np.flatnonzero((plan.ssd | plan.origin) == 0).tolist():
            outcomes[i] = Outcome.HIT
        if not len(lacking):
            return []
        if load is None:
            # What another task is loading may still come; what nobody loads and no tier has is a miss.
            lacking = np.array(
                [i for i in lacking.tolist() if not self.flights.join(int(slots[i]), int(plan.origin[i])).mine],
                np.int64,
            )
        places = self._places(slots, facts.memory_location, lacking, outcomes)
        waits: list[asyncio.Future[None]] = []
        merged = 0
        from_ssd: list[tuple[int, Share]] = []
        from_origin: list[tuple[int, Share]] = []
        for i, location in places:
            slot = int(slots[i])
            join = self.flights.join(slot, int(plan.ssd[i] | plan.origin[i]))
            waits += join.others
            merged += len(join.others)
            for parts, shares in ((int(plan.ssd[i]), from_ssd), (int(plan.origin[i]), from_origin)):
                if mine := parts & join.mine:
                    shares.append((int(i), Share(slot, mine, location, self.flights.begin(slot, mine))))
        self._tiers.metrics.add("tiercache_merged_loads_total", merged)
        try:
            if from_ssd:
                self._begin_ssd(from_ssd, facts.ssd_location, distrusted)
            if from_origin and load is not None:
                self._begin_origin(from_origin, load)
        except BaseException as fault:  # announced, and not begun: nobody may wait for it
            self._finish([share for _, share in from_ssd + from_origin], fault)
            raise
        return waits + [share.future for _, share in from_ssd + from_origin]

    def _places(
        self,
        slots: npt.NDArray[np.int64],
        locations: npt.NDArray[np.int64],
        lacking: npt.NDArray[np.int64],
        outcomes: list[Outcome],
    ) -> list[tuple[int, int]]:
        """(item, extent in memory) for the items that lack parts; items without room become FULL and are left out."""
        places: list[tuple[int, int]] = []
        homeless: list[int] = []
        for i in lacking.tolist():
            location = int(locations[i])
            if location < 0:
                location = self._extents.get(int(slots[i]), -1)
            if location in self._forsaken:  # of an entry that was deleted meanwhile: it gets no other
                outcomes[i] = Outcome.FULL
            elif location < 0:
                homeless.append(i)
            else:
                places.append((i, location))
        if homeless:
            names, sizes, part_bytes = self.shapes(slots[homeless])
            fresh = self._tiers.reserve(names, sizes, part_bytes)
            housed = [at for at, location in enumerate(fresh) if location >= 0]
            self._tiers.describe(slots[homeless][housed], [fresh[at] for at in housed])
            for i, location in zip(homeless, fresh, strict=True):
                if location < 0:
                    outcomes[i] = Outcome.FULL
                else:
                    self._extents[int(slots[i])] = location
                    places.append((i, location))
        return places

    def shapes(self, slots: npt.NDArray[np.int64]) -> tuple[list[Name], list[int], list[int]]:
        """Names, sizes and part sizes of slots, as tiers ask for them."""
        facts = self._tiers.index.facts(slots)
        return self._tiers.index.names(slots), facts.size.tolist(), facts.part_bytes.tolist()

    # -- the two kinds of load -----------------------------------------------------------------------------------------

    def _begin_ssd(
        self, items: list[tuple[int, Share]], ssd_locations: npt.NDArray[np.int64], distrusted: set[int]
    ) -> None:
        shares = [share for _, share in items]
        slots = np.array([share.slot for share in shares], np.int64)
        names, sizes, part_bytes = self.shapes(slots)
        wants = [
            Want(int(ssd_locations[i]), name, size, step, share.parts)
            for (i, share), name, size, step in zip(items, names, sizes, part_bytes, strict=True)
        ]
        for share in shares:
            self._ssd_loads.add(share.future)
            share.future.add_done_callback(self._ssd_loads.discard)
        pin = self._tiers.index.hold(slots)
        self._tasks.start(self._from_ssd(shares, wants, distrusted, self._tiers.end_of(pin)), "read from SSD")

    async def _from_ssd(
        self, shares: list[Share], wants: list[Want], distrusted: set[int], end: Callable[[bool], None]
    ) -> None:
        ssd, memory, metrics = self._tiers.ssd, self._tiers.memory, self._tiers.metrics
        assert ssd is not None
        distrusted.update(share.slot for share in shares)  # until the answer says otherwise, also if none comes
        began_s = self._tiers.clock.monotonic()
        try:
            outcomes = await ssd.read(wants, memory.buffers([share.location for share in shares]))
            metrics.observe("tiercache_read_seconds", self._tiers.clock.monotonic() - began_s, tier="ssd")
            read_bytes = sum(
                share.parts.bit_count() * want.part_bytes for share, want in zip(shares, wants, strict=True)
            )
            metrics.add("tiercache_read_bytes_total", read_bytes, tier="ssd")
            for share, want, outcome in zip(shares, wants, outcomes, strict=True):
                if outcome is Outcome.HIT:
                    self._land(share, want.part_bytes)
                    distrusted.discard(share.slot)
                    continue
                if outcome is Outcome.CORRUPT or outcome is Outcome.MISS:
                    self._lose_ssd(share.slot, want.location)
                if outcome is Outcome.CORRUPT:
                    metrics.add("tiercache_corruptions_total", 1, tier="ssd")
        except OSError:  # a fault of the tier is a miss of these parts: the next look goes to the origin
            metrics.add("tiercache_tier_errors_total", 1, tier="ssd", operation="read")
        finally:
            self._finish(shares, None)
            end(True)

    def _lose_ssd(self, slot: int, location: int) -> None:
        """Forgets a copy that failed, unless the slot has got a newer one meanwhile."""
        slots = np.array([slot], np.int64)
        if int(self._tiers.index.facts(slots).ssd_location[0]) == location:
            self._tiers.lose(slots, TierId.SSD)

    def _begin_origin(self, items: list[tuple[int, Share]], load: Load) -> None:
        shares = [share for _, share in items]
        slots = np.array([share.slot for share in shares], np.int64)
        names, _, part_bytes = self.shapes(slots)
        targets = self._tiers.memory.buffers([share.location for share in shares])
        gaps = [
            Gap(name.ordinal, share.parts, target, share.location)
            for name, share, target in zip(names, shares, targets, strict=True)
        ]
        pin = self._tiers.index.hold(slots)
        self._tasks.start(
            self._from_origin(shares, gaps, part_bytes, load, self._tiers.end_of(pin)), "read from origin"
        )

    async def _from_origin(
        self,
        shares: list[Share],
        gaps: list[Gap],
        part_bytes: list[int],
        load: Load,
        end: Callable[[bool], None],
    ) -> None:
        fault: BaseException | None = UnavailableError("the load ended without filling every part it was asked for")

        def landed(indexes: Sequence[int], digests: Sequence[bytes] | None = None, /) -> None:
            for at, i in enumerate(indexes):
                self._land(shares[i], part_bytes[i], digests[at] if digests is not None else None)
            self._landed(np.array([shares[i].slot for i in indexes], np.int64))
            for i in indexes:
                self.flights.end(shares[i].slot, shares[i].future)

        try:
            await load(gaps, landed)
        except AbandonedLoad as gone:
            fault = None  # of nobody who waits: they look again, and one of them loads
            if gone.writing is not None and not gone.writing.done():
                await self._forsake([share for share in shares if not share.future.done()], gone.writing)
        except (TierCacheError, OSError) as error:
            fault = error
        except asyncio.CancelledError:
            fault = UnavailableError("the cache was closed while this was being loaded: open it again")
            raise
        finally:
            self._finish(shares, fault)
            end(True)

    async def _forsake(self, shares: list[Share], writing: asyncio.Future[None]) -> None:
        """A loader gave up, and may write all the same: whoever waits goes on with other extents at once, while these
        are kept until nothing writes to them any more."""
        own: list[int] = []
        for share in shares:
            # Other loads into the same extent go on; what they bring there is lost, and loaded again.
            slots = np.array([share.slot], np.int64)
            if self._extents.get(share.slot) == share.location:
                del self._extents[share.slot]
                own.append(share.location)
            elif int(self._tiers.index.facts(slots).memory_location[0]) == share.location:
                self._tiers.lose(slots, TierId.MEMORY)  # freed when nobody, and so no load, holds the slot
            writers = self._forsaken.setdefault(share.location, [])
            writers += [one for one in self.flights.loads(share.slot) if one is not share.future]
            writers.append(writing)
            self.flights.end(share.slot, share.future)
        try:
            locations = {share.location for share in shares}
            while busy := [one for at in locations for one in self._forsaken.get(at, ()) if not one.done()]:
                await asyncio.wait(busy)
        finally:
            for location in locations:
                self._forsaken.pop(location, None)
            self._tiers.memory.free(own)

    def _land(self, share: Share, part_bytes: int, digests: bytes | None = None) -> None:
        """Parts have arrived: digest them, declare them present in the extent, then in the index."""
        memory, index = self._tiers.memory, self._tiers.index
        buffer = memory.buffers([share.location])[0]
        if digests is None:
            digests = part_digests(buffer, part_bytes, share.parts)
        memory.commit([share.location], [share.parts], [digests])
        slots = np.array([share.slot], np.int64)
        if self._extents.get(share.slot) == share.location:
            # Refused where the slot has got a copy from elsewhere. Then the extent stays ours, and is given back when
            # the last load into it has ended: another one may still be writing there.
            if not index.place(slots, TierId.MEMORY, [share.location], np.array([share.parts], np.uint64)):
                del self._extents[share.slot]
        elif int(index.facts(slots).memory_location[0]) == share.location:
            index.add_parts(slots, TierId.MEMORY, np.array([share.parts], np.uint64))

    def _finish(self, shares: list[Share], fault: BaseException | None) -> None:
        """Ends the loads that have not landed, and gives back extents of which nothing came."""
        for share in shares:
            if not share.future.done():
                self.flights.end(share.slot, share.future, fault)
            if share.slot in self._extents and not self.flights.under_way(share.slot):
                location = self._extents.pop(share.slot)
                self._tiers.memory.free([location])
                slots = np.array([share.slot], np.int64)
                if int(self._tiers.index.facts(slots).state[0]) == State.PENDING:
                    self._tiers.index.abandon(slots)
