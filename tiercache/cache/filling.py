"""Filling: brings the parts that a reader wants into memory, from the SSD, else through the reader's own load.

Runs on the cache's loop. Equal loads are merged (flight.py); every load runs in a task of the cache with pins of its
own, so that a reader who gives up neither stops nor endangers the others who wait for the same bytes.

Most reads are of a page or two, so this works on plain numbers, slot by slot: see index/few.py for why.
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
from tiercache.tier import Want

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import numpy.typing as npt

    from tiercache.cache.tasks import Tasks
    from tiercache.cache.tiers import Tiers
    from tiercache.index import Look
    from tiercache.lease import Load
    from tiercache.model import Name

ATTEMPTS_MAX = 4
"""Looks at one batch before giving up: memory, SSD, origin, and once more for parts that another reader lost."""
SSD_PATIENCE = 1.5
"""A tier ends a read within its deadline; one that takes this many times as long is not waited for."""
MANY = 64
"""Batches longer than this are looked at with arrays first, to set apart what memory has."""


class Lack(NamedTuple):
    """One item of a batch that is not in memory with all parts wanted."""

    item: int
    slot: int
    look: Look
    ssd: int
    """Parts to come from the SSD, and from the origin."""
    origin: int


class Share(NamedTuple):
    """Parts of one slot that this call loads itself, and where they land."""

    slot: int
    name: Name
    look: Look
    parts: int
    location: int
    future: asyncio.Future[None]


class Filling:
    """Loads under way and the extents that they fill."""

    def __init__(self, tiers: Tiers, tasks: Tasks, landed: Callable[[npt.NDArray[np.int64]], None]) -> None:
        """`landed` hears of slots that got new parts from elsewhere than the SSD."""
        self._tiers, self._tasks, self._landed = tiers, tasks, landed
        self.flights = Flights()
        self.taken: Callable[[int, int], int] = lambda slot, location: 0
        """Parts of a slot, in its extent, that others write (blocks.py): nothing is loaded there."""
        self.awaited: Callable[[Sequence[int]], int] = lambda slots: 0
        """How many of these slots' entries `load` looks for with peers, and counts itself."""
        self._ssd_loads: set[asyncio.Future[None]] = set()
        self._extents: dict[int, int] = {}  # slot -> extent in memory of which no part is present yet
        self._forsaken: dict[int, list[asyncio.Future[None]]] = {}  # extent that nobody may use -> what may write to it

    async def ensure(
        self, slots: Sequence[int], wanted: Sequence[int], load: Load | None = None, kind: str = ""
    ) -> list[Outcome]:
        """Sees to it that these parts of these (pinned, unique) slots are in memory: HIT where they are.

        Without `load`, parts that no tier has are a MISS. Raises what `load` raises, also where another reader's load
        of the same parts failed. Hits and misses count as those of `kind`, where that is said.
        """
        outcomes = [Outcome.MISS if load is None else Outcome.BUSY] * len(slots)
        distrusted: set[int] = set()  # slots whose SSD copy failed this call
        for attempt in range(ATTEMPTS_MAX):
            lacks = self._lacks(slots, wanted, outcomes)
            if kind and not attempt:
                self._count(len(slots), lacks, kind, load)
            with self.flights.lock:
                waits = self._start(lacks, load, outcomes, distrusted) if lacks else []
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

    def _lacks(self, slots: Sequence[int], wanted: Sequence[int], outcomes: list[Outcome]) -> list[Lack]:
        """What of a batch is not in memory; the rest becomes a HIT."""
        index = self._tiers.index
        items: Iterable[int] = range(len(slots))
        if len(slots) > MANY:
            parts = index.facts(np.array(slots, np.int64)).memory_parts
            missing = np.array(wanted, np.uint64) & ~parts
            for i in np.flatnonzero(missing == 0).tolist():
                outcomes[i] = Outcome.HIT
            items = np.flatnonzero(missing).tolist()
        lacks: list[Lack] = []
        for i, look in zip(items, index.look([slots[i] for i in items])):
            if missing_parts := wanted[i] & ~look.memory_parts:
                lacks.append(Lack(i, slots[i], look, missing_parts & look.ssd_parts, missing_parts & ~look.ssd_parts))
            else:
                outcomes[i] = Outcome.HIT
        return lacks

    def _count(self, count: int, lacks: list[Lack], kind: str, load: Load | None) -> None:
        """One entry is one hit of the lowest tier that it needs, or a miss."""
        beyond = [lack.slot for lack in lacks if lack.origin]
        misses = len(beyond)
        self._tiers.metrics.add_all(
            [
                ("tiercache_hits_total", count - len(lacks), "memory", kind),
                ("tiercache_hits_total", len(lacks) - misses, "ssd", kind),
                ("tiercache_misses_total", misses - (self.awaited(beyond) if load and beyond else 0), "", kind),
            ]
        )

    def _start(
        self, lacks: list[Lack], load: Load | None, outcomes: list[Outcome], distrusted: set[int]
    ) -> list[asyncio.Future[None]]:
        """Starts the loads that nobody else runs, and answers what to wait for. Never waits itself: between the look
        and the announcement of a load no other task may come in."""
        claims = [self.flights.claimed(lack.slot) for lack in lacks]
        waits = [waiter for waiter in claims if waiter is not None]  # threads are at it: look again when they are done
        lacks = [lack for lack, waiter in zip(lacks, claims, strict=True) if waiter is None]
        readable = self._tiers.ssd_readable
        if not readable or distrusted:
            lacks = [
                lack
                if readable and lack.slot not in distrusted
                else lack._replace(ssd=0, origin=lack.ssd | lack.origin)
                for lack in lacks
            ]
        lacks = [self._untaken(lack) for lack in lacks]
        if load is None:
            # What another task is loading may still come; what nobody loads and no tier has is a miss.
            lacks = [lack for lack in lacks if not (lack.origin and self.flights.join(lack.slot, lack.origin).mine)]
        if not lacks:
            return waits
        names = self._tiers.index.names([lack.slot for lack in lacks])
        from_ssd: list[Share] = []
        from_origin: list[Share] = []
        merged = 0
        for lack, name, location in zip(lacks, names, self._places(lacks, names), strict=True):
            if location < 0:
                outcomes[lack.item] = Outcome.FULL
                continue
            join = self.flights.join(lack.slot, lack.ssd | lack.origin)
            waits += join.others
            merged += len(join.others)
            for parts, shares in ((lack.ssd, from_ssd), (lack.origin, from_origin)):
                if mine := parts & join.mine:
                    future = self.flights.begin(lack.slot, mine)
                    shares.append(Share(lack.slot, name, lack.look, mine, location, future))
        if merged:
            self._tiers.metrics.add("tiercache_merged_loads_total", merged)
        try:
            if from_ssd:
                self._begin_ssd(from_ssd, distrusted)
            if from_origin and load is not None:
                self._begin_origin(from_origin, load)
        except BaseException as fault:  # announced, and not begun: nobody may wait for it
            self._finish(from_ssd + from_origin, fault)
            raise
        return waits + [share.future for share in from_ssd + from_origin]

    def _untaken(self, lack: Lack) -> Lack:
        """A lack without those parts on the SSD that somebody else is writing."""
        taken = lack.ssd & self.taken(lack.slot, lack.look.memory_location)
        return lack._replace(ssd=lack.ssd & ~taken, origin=lack.origin | taken) if taken else lack

    def _places(self, lacks: list[Lack], names: Sequence[Name]) -> list[int]:
        """The extent in memory of each; FULL for those that find no room."""
        places = [
            lack.look.memory_location if lack.look.memory_location >= 0 else self._extents.get(lack.slot, -1)
            for lack in lacks
        ]
        homeless = [i for i, location in enumerate(places) if location < 0]
        for i, location in enumerate(places):
            if location in self._forsaken:  # of an entry that was deleted meanwhile: it gets no other
                places[i] = Outcome.FULL
        if homeless:
            looks = [lacks[i].look for i in homeless]
            sizes, part_bytes = [look.size for look in looks], [look.part_bytes for look in looks]
            found = self._tiers.reserve([names[i] for i in homeless], sizes, part_bytes, sparse=True)
            housed = [(lacks[i].slot, location) for i, location in zip(homeless, found, strict=True) if location >= 0]
            self._tiers.describe(np.array([slot for slot, _ in housed], np.int64), [place for _, place in housed])
            for i, location in zip(homeless, found, strict=True):
                places[i] = location
                if location >= 0:
                    self._extents[lacks[i].slot] = location
        return places

    # -- the two kinds of load -----------------------------------------------------------------------------------------

    def _begin_ssd(self, shares: list[Share], distrusted: set[int]) -> None:
        wants = [
            Want(share.look.ssd_location, share.name, share.look.size, share.look.part_bytes, share.parts)
            for share in shares
        ]
        for share in shares:
            self._ssd_loads.add(share.future)
            share.future.add_done_callback(self._ssd_loads.discard)
        pin = self._tiers.index.hold([share.slot for share in shares])
        self._tasks.start(self._from_ssd(shares, wants, distrusted, self._tiers.end_of(pin)), "read from SSD")

    async def _from_ssd(
        self, shares: list[Share], wants: list[Want], distrusted: set[int], end: Callable[[bool], None]
    ) -> None:
        ssd, memory, metrics = self._tiers.ssd, self._tiers.memory, self._tiers.metrics
        assert ssd is not None
        distrusted.update(share.slot for share in shares)  # until the answer says otherwise, also if none comes
        began_s = self._tiers.clock.monotonic()
        try:
            digests: list[bytes] = []
            outcomes = await ssd.read(wants, memory.buffers([share.location for share in shares]), digests)
            metrics.observe("tiercache_read_seconds", self._tiers.clock.monotonic() - began_s, tier="ssd")
            read_bytes = sum(share.parts.bit_count() * share.look.part_bytes for share in shares)
            metrics.add("tiercache_read_bytes_total", read_bytes, tier="ssd")
            good = [share for share, outcome in zip(shares, outcomes, strict=True) if outcome is Outcome.HIT]
            self._land(good, [rows for rows, outcome in zip(digests, outcomes, strict=True) if outcome is Outcome.HIT])
            distrusted.difference_update(share.slot for share in good)
            for share, want, outcome in zip(shares, wants, outcomes, strict=True):
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
        if self._tiers.index.look([slot])[0].ssd_location == location:
            self._tiers.lose(np.array([slot], np.int64), TierId.SSD)

    def _begin_origin(self, shares: list[Share], load: Load) -> None:
        targets = self._tiers.memory.buffers([share.location for share in shares])
        gaps = [
            Gap(share.name.ordinal, share.parts, target, share.location)
            for share, target in zip(shares, targets, strict=True)
        ]
        pin = self._tiers.index.hold([share.slot for share in shares])
        self._tasks.start(self._from_origin(shares, gaps, load, self._tiers.end_of(pin)), "read from origin")

    async def _from_origin(self, shares: list[Share], gaps: list[Gap], load: Load, end: Callable[[bool], None]) -> None:
        fault: BaseException | None = UnavailableError("the load ended without filling every part it was asked for")

        def landed(indexes: Sequence[int], digests: Sequence[bytes] | None = None, /) -> None:
            here = [shares[i] for i in indexes]
            if digests is None:
                digests = [part_digests(gaps[i].target, shares[i].look.part_bytes, shares[i].parts) for i in indexes]
            self._land(here, digests)
            self._landed(np.array([share.slot for share in here], np.int64))
            for share in here:
                self.flights.end(share.slot, share.future)

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
            if self._extents.get(share.slot) == share.location:
                del self._extents[share.slot]
                own.append(share.location)
            elif self._tiers.index.look([share.slot])[0].memory_location == share.location:
                # Freed when nobody, and so no load, holds the slot.
                self._tiers.lose(np.array([share.slot], np.int64), TierId.MEMORY)
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

    def _land(self, shares: Sequence[Share], digests: Sequence[bytes]) -> None:
        """Parts have arrived that have these digests: declares them present in the extents, then in the index."""
        memory, index = self._tiers.memory, self._tiers.index
        locations, parts = [share.location for share in shares], [share.parts for share in shares]
        memory.commit(locations, parts, digests)
        first = [share for share in shares if self._extents.get(share.slot) == share.location]
        if first:
            # Refused where the slot has got a copy from elsewhere. Then the extent stays ours, and is given back when
            # the last load into it has ended: another one may still be writing there.
            unwanted = index.place_few(
                [share.slot for share in first],
                TierId.MEMORY,
                [share.location for share in first],
                [share.parts for share in first],
            )
            for share in first:
                if share.location not in unwanted:
                    del self._extents[share.slot]
        if len(first) < len(shares):
            placed = {share.slot for share in first}
            more = [share for share in shares if share.slot not in placed]
            index.add_parts(
                [share.slot for share in more],
                TierId.MEMORY,
                [share.parts for share in more],
                [share.location for share in more],
            )

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
