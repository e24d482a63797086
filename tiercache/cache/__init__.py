"""Cache: the one orchestrator of the local tiers, and the public face of the embedded library.

Reads: what is in memory is answered in the caller's thread by the `*_resident` calls, without the loop; the coroutines
add the SSD and, for pages, the caller's own load. Writes land in memory (visible) and go to the SSD in the background;
`durable=True` and `flush()` wait for the disk. Planning is in placement.py, loading in filling.py, the SSD queue in
demotion.py, pins and room in tiers.py.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import numpy as np

from tiercache.buffers import Buffer
from tiercache.cache.blocks import Blocks
from tiercache.cache.bringing import EVERY
from tiercache.cache.chained import Chained
from tiercache.cache.demotion import Demotion
from tiercache.cache.filling import Filling
from tiercache.cache.here import Here
from tiercache.cache.pressure import Pressure
from tiercache.cache.recovery import Recovery
from tiercache.cache.serving import Serving
from tiercache.cache.storing import Storing
from tiercache.cache.survey import Survey
from tiercache.cache.tasks import Tasks
from tiercache.cache.tiers import Tiers, check_room, whole
from tiercache.errors import ConfigError, UnavailableError
from tiercache.lease import Lease, look_again
from tiercache.model import Kind, Name, Outcome, Terms, TierId

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    import numpy.typing as npt

    from tiercache.cache.tiers import MemoryTier
    from tiercache.clock import Clock
    from tiercache.core import Notes
    from tiercache.index import Index, Match, Reservation, SlotFacts
    from tiercache.lease import Load, PageRun
    from tiercache.metrics import Metrics
    from tiercache.settings import Settings
    from tiercache.tier import Tier

log = logging.getLogger(__name__)

EXPIRY_S_MAX = (1 << 32) - 1
"""The last moment that an entry can expire at, in the year 2106."""
CLOSE_PATIENCE_S = 10.0
FEW = 8
"""Pages up to which a look-up one by one is faster than arrays (bench/memory.py)."""
MANY = 64
"""Names up to which the same holds for entries by name."""
INLINE_BYTES_MAX = 4 << 20
"""A put of more than this copies in a worker thread, so that the loop is never held for longer than some 0.5 ms."""


class Cache(Chained):
    """See the module. Made by assemble.py; `start()` before anything else, `close()` at the end, both on the loop."""

    notes: Notes | None = None
    """There is nobody to share facts of origins with."""

    def __init__(
        self,
        index: Index,
        memory: MemoryTier,
        ssd: Tier | None = None,
        *,
        settings: Settings,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self.tiers = Tiers(index, memory, ssd, settings=settings, clock=clock, metrics=metrics)
        self.settings, self.metrics, self._tasks = settings, metrics, Tasks(metrics)
        self._demotion = Demotion(self.tiers)
        self._pressure = Pressure(self.tiers, self._demotion)
        self._filling = Filling(self.tiers, self._tasks, self._dirtied)
        self._demotion.filling = self._filling
        self._here = Here(self.tiers, self._filling.flights, self._nudge)
        self.tiers.nudge = self._nudge
        self._recovery = Recovery(self.tiers)
        self._storing = Storing(self.tiers, self._recovery, self._dirtied, self._demotion.saved)
        self.blocks = Blocks(
            self.tiers,
            self._recovery,
            self._storing,
            self._filling.flights,
            stored=self._dirtied,
            flush=self._demotion.flush,
            lease=self._lease,
        )
        self._filling.taken = self.blocks.taken
        self._survey = Survey(self.tiers, self._recovery)
        self.serving = Serving(self.tiers, self._recovery, self._storing, blocks=self.blocks, lease=self._lease)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._forever: list[asyncio.Task[None]] = []
        self._nudged = False

    async def start(self) -> None:
        """As `begin`, for callers elsewhere."""
        self.begin()

    def begin(self) -> None:
        """Starts the background work (recovery, SSD writer, eviction) on the loop that is the cache's from now on."""
        self._loop = asyncio.get_running_loop()
        if self.tiers.ssd is not None:
            self._recovery.begin(self._tasks)
            self._forever.append(self._tasks.start(self._demotion.run(), "write to SSD"))
        self._forever.append(self._tasks.start(self._pressure.run(), "evict from memory"))
        for each in self._outside:
            each.begin(self._tasks)

    # -- any thread, memory only ---------------------------------------------------------------------------------------

    def lease_resident(self, key: bytes, ordinals: Sequence[int], parts: Sequence[int]) -> Lease | None:
        """A lease on pages of one file version, or None unless every wanted part (a map a page) is in memory now."""
        tiers = self._open()
        if len(ordinals) <= FEW and not tiers.expiries:
            few = tiers.index.hit_few(key, ordinals, parts)
            if few is None:
                return None
            slots, places = few
            tiers.metrics.add("tiercache_hits_total", len(slots), tier="memory", kind="page")
            return Lease([Outcome.HIT] * len(slots), places, tiers.memory, tiers.end_of_few(slots))
        wanted = np.asarray(parts, np.uint64)
        match, locations, present = tiers.index.hit_pages(key, np.asarray(ordinals, np.int32))
        if ((present & wanted) != wanted).any() or (
            tiers.expiries and tiers.expired(tiers.index.facts(match.slots).expiry_s).any()
        ):
            tiers.release(match)
            return None
        tiers.metrics.add("tiercache_hits_total", len(locations), tier="memory", kind="page")
        return Lease([Outcome.HIT] * len(locations), locations, tiers.memory, tiers.end_of(match))

    def lease_local(self, key: bytes, ordinals: Sequence[int], parts: Sequence[int]) -> Lease | None:
        """As `lease_resident`, for a thread that may wait for the SSD; None: `read_pages` knows what to do."""
        self._open()
        return self._here.lease(key, ordinals, parts)

    def lease_names_resident(self, names: Sequence[Name]) -> Lease | None:
        """A lease on whole entries, or None unless every one of them is in memory now."""
        tiers = self._open()
        if not tiers.expiries and len(names) <= MANY:
            slots, places = tiers.index.hit_whole(names)
            if len(slots) < len(names):
                tiers.end_of_few(slots)(True)
                return None
            return Lease([Outcome.HIT] * len(names), places, tiers.memory, tiers.end_of_few(slots))
        match = tiers.index.match(names)
        facts = tiers.index.facts(match.slots)
        if not ((match.slots >= 0) & self._whole(facts)).all():
            tiers.release(match)
            return None
        return Lease([Outcome.HIT] * len(names), facts.memory_location, tiers.memory, tiers.end_of(match))

    def match_resident(self, digests: Sequence[bytes]) -> Lease:
        """A lease on the longest prefix of a chain that is in memory as a whole; empty when nothing is."""
        tiers = self._open()
        match = tiers.index.match_chain(digests, width=len(digests[0])) if len(digests) else tiers.index.match([])
        facts = tiers.index.facts(match.slots)
        there = self._whole(facts)
        length = len(there) if there.all() else int(there.argmin())
        locations = facts.memory_location[:length]
        return Lease([Outcome.HIT] * length, locations, tiers.memory, tiers.end_of(match))

    def get_into_resident(
        self, names: Sequence[Name], targets: Sequence[Buffer], *, verify: bool = True
    ) -> list[Outcome]:
        """Copies whole entries from memory to the start of each target: HIT, MISS where it is not in memory as a whole,
        CORRUPT where a digest differed (the copy is then gone from memory). The GIL is released while bytes move."""
        tiers = self._open()
        if not tiers.expiries and len(names) <= MANY:
            slots, places = tiers.index.hit_whole(names)
            try:
                return self._copy_out(names, places, targets, verify)
            finally:
                tiers.end_of_few(slots)(True)
        match = tiers.index.match(names)
        try:
            facts = tiers.index.facts(match.slots)
            places = np.where((match.slots >= 0) & self._whole(facts), facts.memory_location, -1).tolist()
            return self._copy_out(names, places, targets, verify)
        finally:
            tiers.release(match)

    def _whole(self, facts: SlotFacts) -> npt.NDArray[np.bool_]:
        """Which entries are in memory with all of their parts, and in time."""
        present: npt.NDArray[np.bool_] = facts.memory_parts == whole(facts.size, facts.part_bytes)
        return present & ~self.tiers.expired(facts.expiry_s)

    def _copy_out(
        self, names: Sequence[Name], places: list[int], targets: Sequence[Buffer], verify: bool
    ) -> list[Outcome]:
        """Copies from pinned places in memory (-1: none) to targets; what is damaged is forgotten."""
        tiers = self.tiers
        outcomes = [Outcome.MISS] * len(places)
        chosen = [i for i, place in enumerate(places) if place >= 0]
        copied = tiers.memory.copy_out([places[i] for i in chosen], [targets[i] for i in chosen], verify=verify)
        for i, outcome in zip(chosen, copied, strict=True):
            outcomes[i] = outcome
            if outcome is Outcome.CORRUPT:
                self.quarantine([names[i]])
        tiers.metrics.add("tiercache_hits_total", outcomes.count(Outcome.HIT), tier="memory", kind="object")
        return outcomes

    def quarantine(self, names: Sequence[Name]) -> None:
        """The memory copies of these were found damaged: they are counted and never looked at again; the next reader
        gets the entry from the SSD, or misses."""
        tiers = self.tiers
        match = tiers.index.match(names)
        tiers.lose(np.unique(match.slots[match.slots >= 0]), TierId.MEMORY)
        tiers.release(match)
        tiers.metrics.add("tiercache_corruptions_total", len(names), tier="memory")

    def store(self, names: Sequence[Name], values: Sequence[Buffer], terms: Terms | None = None) -> list[Outcome]:
        """Puts whole lone entries into memory from any thread (visible, not durable): HIT where the entry is there now,
        BUSY where another thread is storing it, FULL where there was no room."""
        self._open()
        return self._storing.put(names, values, terms or Terms())

    def store_chain(
        self, digests: Sequence[bytes], values: Sequence[Buffer], terms: Terms | None = None, *, parent: bytes = b""
    ) -> list[Outcome]:
        """As `store`, for blocks of one chain in order; `parent` is the digest of the stored block they continue."""
        self._open()
        return self._storing.put_chain(digests, values, terms or Terms(Kind.KV), parent)

    # -- on the loop ---------------------------------------------------------------------------------------------------

    async def put(
        self,
        names: Sequence[Name],
        values: Sequence[object],
        *,
        kind: Kind = Kind.TENSOR,
        scope: int = 0,
        cost_s: float = 0.0,
        ttl_s: float | None = None,
        durable: bool = False,
    ) -> list[Outcome]:
        """Stores whole entries. HIT is visible; with `durable=True` it also survives kill -9 and power loss, and what
        could not be made durable is FULL."""
        self._check_durable(durable)
        sources = [value if isinstance(value, Buffer) else Buffer.of(value) for value in values]  # type: ignore[arg-type]
        terms = Terms(kind, scope, cost_s, self.expiry(ttl_s))
        await self._recovery.find(names)
        return await self._stored(lambda: self.store(names, sources, terms), sources, names if durable else ())

    async def put_chain(
        self,
        digests: Sequence[bytes],
        values: Sequence[object],
        *,
        parent: bytes = b"",
        kind: Kind = Kind.KV,
        scope: int = 0,
        cost_s: float = 0.0,
        ttl_s: float | None = None,
        durable: bool = False,
    ) -> list[Outcome]:
        """As `put`, for blocks of one chain in order; `parent` is the digest of the stored block that they continue."""
        self._check_durable(durable)
        sources = [value if isinstance(value, Buffer) else Buffer.of(value) for value in values]  # type: ignore[arg-type]
        terms = Terms(kind, scope, cost_s, self.expiry(ttl_s))
        names = [Name(digest) for digest in digests]
        await self._recovery.find([*names, Name(parent)] if parent else names)
        return await self._stored(
            lambda: self.store_chain(digests, sources, terms, parent=parent), sources, names if durable else ()
        )

    async def _stored(
        self, store: Callable[[], list[Outcome]], sources: Sequence[Buffer], durable: Sequence[Name]
    ) -> list[Outcome]:
        if sum(source.length for source in sources) <= INLINE_BYTES_MAX:
            outcomes = store()
        else:
            # Shielded: a caller that gives up must not free values that the thread still copies.
            outcomes = await asyncio.shield(asyncio.get_running_loop().run_in_executor(None, store))
        if not durable:
            return outcomes
        match = self.tiers.index.match(durable)  # held from before the flush: nothing takes their place meanwhile
        try:
            return await self._demotion.saved(match.slots, outcomes)
        finally:
            self.tiers.release(match)

    async def lease(self, names: Sequence[Name]) -> Lease:
        """A lease on whole entries, brought to memory from the SSD where needed; look at its `outcomes`."""
        tiers = self._open()
        await self._recovery.find(names)
        await self.blocks.bring([name.key for name in names], EVERY)
        match = tiers.index.match(names)
        facts = tiers.index.facts(match.slots)
        return await self._lease(match, whole(facts.size, facts.part_bytes).tolist(), None, "object")

    async def match(self, digests: Sequence[bytes]) -> Lease:
        """A lease on the longest prefix of a chain that the local tiers have, in memory; `len(lease)` blocks."""
        tiers = self._open()
        await self._recovery.find([Name(digest) for digest in digests])
        await self.blocks.bring(digests, EVERY)
        match = tiers.index.match_chain(digests, width=len(digests[0])) if len(digests) else tiers.index.match([])
        facts = tiers.index.facts(match.slots)
        lease = await self._lease(match, whole(facts.size, facts.part_bytes).tolist(), None, "object")
        lease.cut()
        return lease

    async def get_into(self, names: Sequence[Name], targets: Sequence[Buffer], *, verify: bool = True) -> list[Outcome]:
        """Copies whole entries to the start of each target, from memory or the SSD: HIT, or why not."""
        outcomes = self.get_into_resident(names, targets, verify=verify)
        rest = [i for i, outcome in enumerate(outcomes) if outcome is not Outcome.HIT]
        damaged: set[int] = set()
        while rest:
            with await self.lease([names[i] for i in rest]) as lease:
                for at, i in enumerate(rest):
                    outcomes[i] = lease.outcomes[at]
                    if outcomes[i] is Outcome.HIT:
                        size = lease.buffer(at).length
                        check_room(i, size, targets[i].length)
                        outcomes[i] = lease.copy_into(at, 0, size, targets[i].slice(0, size), verify=verify)
            rest = look_again(names, outcomes, rest, damaged, self.quarantine)
        return outcomes

    async def read_pages(self, run: PageRun, ordinals: Sequence[int], parts: Sequence[int], load: Load) -> Lease:
        """A lease on pages of one file version with these parts (a map a page) in memory; `load` brings the rest.

        Raises what `load` raises. Items that memory has no room for are FULL: read those around the cache.
        """
        tiers = self._open()
        tiers.drain()
        await self._recovery.find([Name(run.key, ordinal) for ordinal in ordinals])
        tiers.expiries |= bool(run.expiry_s)
        tiers.purge([Name(run.key, ordinal) for ordinal in ordinals])
        tiers.make_slots(len(ordinals))
        reservation = tiers.index.reserve_pages(
            run.key,
            np.asarray(ordinals, np.int32),
            np.array([run.page_size(ordinal) for ordinal in ordinals], np.uint32),
            run.part_bytes,
            kind=Kind.PAGE,
            scope=run.scope,
            cost_s=run.cost_s,
            expiry_s=run.expiry_s,
        )
        if self.peering is not None:
            load = self.peering.around(run, load)
        return await self._lease(reservation, parts, load, "page")

    async def _lease(self, pin: Match | Reservation, wanted: Sequence[int], load: Load | None, kind: str) -> Lease:
        tiers, slots = self.tiers, pin.slots.tolist()
        outcomes, hit = [Outcome.MISS if load is None else Outcome.FULL] * len(slots), Outcome.HIT
        try:
            need, late = dict[int, int](), self._late(pin.slots)  # a name may stand twice; a slot is filled once
            for i, slot in enumerate(slots):
                if slot >= 0 and i not in late:
                    need[slot] = need.get(slot, 0) | wanted[i]
            filled = dict(zip(need, await self._filling.ensure([*need], [*need.values()], load, kind), strict=True))
            looks = tiers.index.look(slots)
            locations = [look.memory_location for look in looks]
            for i, (slot, look) in enumerate(zip(slots, looks)):  # what was found damaged since it came is no HIT
                if slot >= 0 and i not in late and (filled[slot] is not hit or not wanted[i] & ~look.memory_parts):
                    outcomes[i] = filled[slot]
        except BaseException:
            tiers.release(pin)  # also gives up what was reserved here and not filled
            raise
        self._nudge()
        return Lease(outcomes, locations, tiers.memory, tiers.end_of(pin))

    def _late(self, slots: npt.NDArray[np.int64]) -> set[int]:
        """Places in a batch of entries whose time is over."""
        if not self.tiers.expiries:
            return set()
        return set(np.flatnonzero(self.tiers.expired(self.tiers.index.facts(slots).expiry_s)).tolist())

    async def delete(self, names: Sequence[Name]) -> list[Outcome]:
        """Forgets entries in every tier: HIT for each that was there. Bytes under a lease stay until it ends."""
        tiers = self._open()
        await self._recovery.find(names)
        there = tiers.delete(names)
        self._recovery.bury(names)
        self._demotion.bury()
        for each in self._outside:
            each.hide(names)
        return [Outcome.HIT if found else Outcome.GONE for found in there]

    async def call(self, question: str, arguments: Mapping[str, Any]) -> Any:
        """Rare questions, for the command line; see survey.py and Core.call."""
        self._open()
        return await self._survey.answer(question, arguments)

    async def flush(self) -> bool:
        """Returns when what was visible before the call is durable; False without an SSD tier. Raises UnavailableError
        if some of it could not be: the SSD is full, read-only, or lost it."""
        self._open()
        left = await self._demotion.flush()
        if left:
            status = self.tiers.ssd.status() if self.tiers.ssd is not None else None
            why = f": {status.reason}" if status is not None and status.reason else ""
            raise UnavailableError(f"{left} entries are not durable, the SSD tier did not take them{why}")
        return self.durable

    async def close(self) -> None:
        """Writes what is queued, ends every task, closes the tiers. Idempotent."""
        if self._closed:
            return
        self._closed = True
        for task in self._forever:
            task.cancel()
        self._recovery.stop()
        for each in self._outside:
            await each.close()
        self.blocks.close()
        await self._tasks.close(CLOSE_PATIENCE_S)
        self.tiers.drain()
        ssd = self.tiers.ssd
        try:
            await self._demotion.flush(last=True)
        except OSError as error:
            log.warning("closing without the last entries on the SSD: %s", error)
        try:
            if ssd is not None:
                await ssd.close()
        finally:
            await self.tiers.memory.close()

    def disown(self) -> None:
        """Makes this object refuse every call: it came into a forked child, and the cache belongs to the parent."""
        self._closed = True

    def stats(self) -> dict[str, int | float]:
        """A flat table of what the cache holds and did: every metric by its full name (see metrics.METRICS)."""
        metrics, tiers = self.metrics, self.tiers
        for tier in (tiers.memory, tiers.ssd, self.remote.store if self.remote is not None else None):
            if tier is not None:
                status = tier.status()
                metrics.set("tiercache_tier_health", int(status.health), tier=status.name)
                metrics.set("tiercache_tier_used_bytes", status.used_bytes, tier=status.name)
                metrics.set("tiercache_tier_capacity_bytes", status.capacity_bytes, tier=status.name)
                metrics.set("tiercache_tier_used_files", status.used_files, tier=status.name)
                metrics.set("tiercache_tier_capacity_files", status.capacity_files, tier=status.name)
        metrics.set("tiercache_leases", tiers.index.pins)
        metrics.set("tiercache_queue_bytes", self._demotion.queue_bytes)
        metrics.set("tiercache_loads_in_flight", len(self._filling.flights))
        metrics.set("tiercache_entries", tiers.index.used)
        metrics.set("tiercache_index_bytes", tiers.index.memory_bytes())
        return metrics.snapshot()

    # -- inside --------------------------------------------------------------------------------------------------------

    @property
    def clock(self) -> Clock:
        """The clock that expiries and deadlines are measured by."""
        return self.tiers.clock

    @property
    def durable(self) -> bool:
        """Whether there is an SSD tier, so that anything can be durable at all."""
        return self.tiers.ssd is not None

    @property
    def recovered(self) -> bool:
        """Whether everything that the SSD remembers is in the index; until then puts ask the SSD first."""
        return self._recovery.done

    def expiry(self, ttl_s: float | None) -> int:
        """Expiry of an entry put now, in whole seconds since the epoch; 0 for never."""
        if ttl_s is None:
            return 0
        if ttl_s <= 0:
            raise ConfigError(f"ttl_s must be positive, not {ttl_s}: leave it out for an entry that does not expire")
        return min(int(self.tiers.clock.wall() + ttl_s) + 1, EXPIRY_S_MAX)

    def _check_durable(self, durable: bool) -> None:
        if durable and self.tiers.ssd is None:
            raise ConfigError("durable=True needs an SSD: set ssd_bytes, or open the directory when nobody holds it")

    def _dirtied(self, slots: npt.NDArray[np.int64]) -> None:
        """New bytes in memory: they wait for the SSD, and may have pushed memory over its mark."""
        self._demotion.mark(slots)
        for each in self._outside:
            each.mark(slots)
        self._nudge()

    def _nudge(self) -> None:
        """Wakes the background tasks, from any thread."""
        loop = self._loop
        if loop is None or self._nudged or self._closed:
            return
        self._nudged = True
        loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._nudged = False
        self._demotion.wake()
        self._pressure.wake()
