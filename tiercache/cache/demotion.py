"""Demotion: copies what is new in memory to the SSD, in the background and in batches, and reclaims SSD segments.

The queue is bounded and is the first thing to be dropped under pressure: what is lost with it is a later hit, never an
acknowledgement (`flush` waits for the queue and then for the disk).
"""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import TYPE_CHECKING

import numpy as np

from tiercache.cache.tiers import whole
from tiercache.model import Form, Kind, Outcome, Payload, TierId
from tiercache.placement import plan_reclaim
from tiercache.tier import Losing, Reclaiming, Remembering

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from tiercache.buffers import Buffer
    from tiercache.cache.filling import Filling
    from tiercache.cache.tiers import Tiers
    from tiercache.index import SlotFacts

log = logging.getLogger(__name__)

BATCH_BYTES = 16 << 20
BATCH_SHARE = 8
DELAY_S = 0.05
"""Pages that are still being filled get their other parts before they are written, so that they are written once."""
BURY_S = 0.5
"""Deletions are made durable together, so long after the first of them: until then a crash may undo them."""
ORDER_PAUSE_S = 120.0
"""The order of use is handed to the SSD tier at closing, and with a flush after this long."""
RECLAIM_ROUNDS_MAX = 8
SAMPLE = 1024
KEEP_SHARE = 0.5
"""At most this share of a reclaimed segment is written again."""
ROOM_ATTEMPTS = 4
"""Rounds of making room and writing for what found the SSD full."""


class Demotion:
    """The write queue of the SSD tier. `mark` may be called from any thread, all else runs on the cache's loop."""

    def __init__(self, tiers: Tiers) -> None:
        self._tiers = tiers
        self._dirty: dict[int, int] = {}  # slot -> bytes, in the order of marking
        self._bytes = 0
        self._queue_lock = threading.Lock()  # for the two above; held for a dictionary operation or two
        # What is being written cannot be evicted: a batch is a small share of memory, so that readers find room.
        self._batch_bytes = min(BATCH_BYTES, tiers.settings.memory_bytes // BATCH_SHARE)
        self._rng = np.random.default_rng(0)  # a sample for a median: any seed is as good as another
        self._ordered_at_s = tiers.clock.monotonic()
        self._wake = asyncio.Event()
        self._writing = asyncio.Lock()
        self._refused = 0
        """Entries that the SSD did not take since the last flush began."""
        self._untold = 0
        """Entries that it took and lost again, of which no flush has told."""
        self._superseded: list[int] = []
        """Records that newer ones replace, not durable yet: until they are, a crash must find the old ones."""
        self._burying = self._buried = False
        """Whether deletions wait for others, and whether they have waited long enough."""
        self.filling: Filling | None = None

    @property
    def queue_bytes(self) -> int:
        """Bytes that wait to be written."""
        return self._bytes

    def mark(self, slots: npt.NDArray[np.int64]) -> None:
        """These slots have parts in memory that the SSD may lack."""
        if self._tiers.ssd is None or not len(slots):
            return
        sizes = self._tiers.index.facts(slots).size.tolist()
        dropped = 0
        with self._queue_lock:
            for slot, size in zip(slots.tolist(), sizes, strict=True):
                if slot not in self._dirty:
                    self._dirty[slot] = size
                    self._bytes += size
            while self._bytes > self._tiers.settings.queue_bytes and len(self._dirty) > 1:
                self._pop_oldest()
                dropped += 1
        if dropped:
            self._tiers.metrics.add("tiercache_demotions_dropped_total", dropped)

    def _pop_oldest(self) -> tuple[int, int]:
        """The slot that waits longest, and its bytes; the queue lock is held."""
        slot = next(iter(self._dirty))
        size = self._dirty.pop(slot)
        self._bytes -= size
        return slot, size

    def wake(self) -> None:
        """Lets the writer look at the queue; on the loop."""
        self._wake.set()

    def bury(self) -> None:
        """Something was deleted; on the loop."""
        if self._tiers.ssd is not None and not self._burying:
            self._burying = True
            asyncio.get_running_loop().call_later(BURY_S, self._bury)

    def _bury(self) -> None:
        self._burying, self._buried = False, True
        self.wake()

    async def run(self) -> None:
        """Writes for as long as the cache is open."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            await asyncio.sleep(DELAY_S)
            try:
                await self.drain()
                if self._superseded or self._buried:
                    self._buried = False
                    async with self._writing:
                        await self._sync_untold()
            except OSError as error:  # the tier has degraded itself and comes back by itself; so do we
                self.fault(error)

    def fault(self, error: OSError) -> None:
        """A write that failed is a later miss: it is counted and said, and the queue goes on."""
        self._tiers.metrics.add("tiercache_tier_errors_total", 1, tier="ssd", operation="write")
        log.warning("the SSD tier did not take a batch (%s); those entries stay in memory only", error)

    async def drain(self) -> None:
        """Writes everything that is queued now."""
        for _ in range(len(self._dirty)):
            batch = self._take()
            if not batch:
                return
            await self.write(np.array(batch, np.int64))

    def _take(self) -> list[int]:
        batch: list[int] = []
        total = 0
        with self._queue_lock:
            while self._dirty and total < self._batch_bytes:
                slot, size = self._pop_oldest()
                total += size
                batch.append(slot)
        return batch

    async def flush(self, *, last: bool = False) -> int:
        """Returns when what memory had before the call is durable; answers how many entries the SSD did not take.

        One lock is held from the first write to the end of the flush of the disk: whatever the index says is on the SSD
        when this returns was there before the disk was flushed. `last`: nothing comes after it.
        """
        ssd, index = self._tiers.ssd, self._tiers.index
        if ssd is None:
            return 0
        with self._queue_lock:
            self._dirty.clear()
            self._bytes = 0
        async with self._writing:
            unsaved = index.unsaved()
            # With their generations, and the parts of now: a slot may get another entry, and a page more parts.
            homes, parts = index.locations(unsaved, TierId.MEMORY), index.parts(unsaved, TierId.MEMORY)
            sizes = np.cumsum(index.sizes(unsaved), dtype=np.int64)
            start = self._refused = 0
            while start < len(unsaved):
                reach = int(sizes[start]) + self._batch_bytes
                stop = max(start + 1, int(np.searchsorted(sizes, reach)))
                await self._write(unsaved[start:stop])
                start = stop
            now = self._tiers.clock.monotonic()
            if last or now - self._ordered_at_s > ORDER_PAUSE_S:
                self._ordered_at_s = now
                self._note_order()
            try:
                await self._sync()
            finally:
                self._forget_lost()
            left = (parts & ~index.parts(unsaved, TierId.SSD)) != 0
            still = int((left & (index.locations(unsaved, TierId.MEMORY) == homes)).sum())
            untold, self._untold = self._untold, 0
            # What was refused or lost may have been evicted since: then it is gone, not saved.
            return max(still, self._refused, untold)

    async def saved(self, slots: npt.NDArray[np.int64], outcomes: Sequence[Outcome]) -> list[Outcome]:
        """Flushes, and answers FULL for those HITs among these slots (which the caller holds) that are not durable."""
        await self.flush()
        facts = self._tiers.index.facts(slots)
        kept = (slots >= 0) & (facts.ssd_parts == whole(facts.size, facts.part_bytes))
        return [
            Outcome.FULL if outcome is Outcome.HIT and not safe else outcome
            for outcome, safe in zip(outcomes, kept.tolist(), strict=True)
        ]

    async def _sync(self) -> None:
        """Makes what was written durable; then what it replaces may go."""
        ssd, superseded = self._tiers.ssd, self._superseded
        assert ssd is not None
        self._superseded = []
        try:
            await ssd.flush()
        except BaseException:
            self._superseded[:0] = superseded
            raise
        ssd.free(superseded)

    async def _sync_untold(self) -> None:
        """As `_sync`, where nobody waits for it: what is lost by it is the next flush's to tell."""
        try:
            await self._sync()
        finally:
            self._untold += self._forget_lost()

    def _forget_lost(self) -> int:
        """Records that the tier took and then lost, by a failed sync: they are neither read nor counted as saved.
        Answers how many."""
        ssd: object = self._tiers.ssd
        if not isinstance(ssd, Losing) or not (lost := ssd.lost()):
            return 0
        slots = self._tiers.index.slots_at(TierId.SSD, np.array(lost, np.int64))
        self._tiers.lose(slots[slots >= 0], TierId.SSD)
        return len(lost)

    def _note_order(self) -> None:
        """Tells a tier that remembers it in which order its entries were used."""
        ssd: object = self._tiers.ssd
        if isinstance(ssd, Remembering):
            index = self._tiers.index
            slots = index.residents(TierId.SSD)
            ssd.note_order(index.locations(slots, TierId.SSD), index.policies[TierId.SSD].order(slots))

    async def write(self, slots: npt.NDArray[np.int64]) -> None:
        """Copies the memory parts of these slots to the SSD, where they differ, if the SSD takes anything now."""
        async with self._writing:
            await self._write(slots)

    async def _write(self, slots: npt.NDArray[np.int64]) -> None:
        tiers = self._tiers
        if not tiers.ssd_writable:
            return
        moving = slots[tiers.index.begin_move(slots)]
        if not len(moving):
            return
        try:
            await self._merge(moving)
            await self._copy(moving)
        finally:
            tiers.free(tiers.index.end_move(moving))

    async def _merge(self, slots: npt.NDArray[np.int64]) -> None:
        """A record replaces the one before it: parts that only the old record has come to memory first."""
        facts = self._tiers.index.facts(slots)
        partial = (facts.ssd_parts & ~facts.memory_parts != 0) & (facts.memory_parts & ~facts.ssd_parts != 0)
        if partial.any() and self.filling is not None:
            await self.filling.ensure(slots[partial].tolist(), facts.ssd_parts[partial].tolist())

    async def _copy(self, slots: npt.NDArray[np.int64]) -> None:
        tiers, ssd = self._tiers, self._tiers.ssd
        assert ssd is not None
        facts = tiers.index.facts(slots)
        new = (facts.memory_location >= 0) & ((facts.memory_parts & ~facts.ssd_parts) != 0)
        new &= (facts.ssd_parts & ~facts.memory_parts) == 0  # else the old record could not be read, and stays
        slots = slots[new]
        if not len(slots):
            return
        facts = tiers.index.facts(slots)
        payloads = self._payloads(slots, facts)
        sources = tiers.memory.buffers(facts.memory_location.tolist())
        left = await self._put(slots, payloads, sources)
        for _ in range(ROOM_ATTEMPTS):
            some = left.tolist()
            if not some or not tiers.ssd_writable or not await self.make_room(sum(payloads[i].size for i in some)):
                break
            left = left[await self._put(slots[left], [payloads[i] for i in some], [sources[i] for i in some])]
        self._refused += len(left)
        tiers.metrics.add("tiercache_demotions_dropped_total", len(left))

    async def _put(
        self, slots: npt.NDArray[np.int64], payloads: list[Payload], sources: list[Buffer]
    ) -> npt.NDArray[np.int64]:
        """Writes records and points their slots to them at once: what no slot points to is garbage to a reclaim.
        Answers which found no room."""
        ssd, metrics = self._tiers.ssd, self._tiers.metrics
        assert ssd is not None
        locations = await ssd.write(payloads, sources)
        written = [i for i, location in enumerate(locations) if location >= 0]
        metrics.add("tiercache_demotions_total", len(written))
        metrics.add("tiercache_written_bytes_total", sum(payloads[i].size for i in written), tier="ssd")
        if written:
            parts = [payloads[i].parts for i in written]
            self._settle_written(slots[written], [locations[i] for i in written], parts)
        return np.array([i for i, location in enumerate(locations) if location < 0], np.int64)

    def _settle_written(self, slots: npt.NDArray[np.int64], locations: list[int], parts: list[int]) -> None:
        """New records: the first copy of a slot, or one that replaces an older record with fewer parts."""
        tiers = self._tiers
        assert tiers.ssd is not None
        old = tiers.index.facts(slots).ssd_location
        first = old < 0
        if first.any():
            at = np.flatnonzero(first).tolist()
            tiers.place(slots[first], TierId.SSD, [locations[i] for i in at], [parts[i] for i in at])
        if not first.all():
            again = np.flatnonzero(~first)
            new = np.array(locations, np.int64)[again]
            moved = tiers.index.relocate(slots[again], TierId.SSD, old[again], new)
            tiers.index.add_parts(
                slots[again][moved].tolist(), TierId.SSD, np.array(parts, np.uint64)[again][moved].tolist()
            )
            tiers.ssd.free(new[~moved].tolist())
            self._superseded += old[again][moved].tolist()

    def _payloads(self, slots: npt.NDArray[np.int64], facts: SlotFacts) -> list[Payload]:
        index = self._tiers.index
        stored = self._tiers.memory.payloads(facts.memory_location.tolist())
        order, forms = index.policies[TierId.MEMORY].order(slots), index.forms(slots)
        return [
            Payload(
                name=name,
                size=payload.size,
                part_bytes=payload.part_bytes,
                parts=payload.parts,
                digests=payload.digests,
                kind=Kind(int(facts.kind[i])),
                parent=parent,
                form=Form(int(forms[i])),
                scope=int(facts.scope[i]),
                cost_s=float(facts.cost_s[i]),
                expiry_s=int(facts.expiry_s[i]),
                tick=int(order[i]),
            )
            for i, (name, payload, parent) in enumerate(
                zip(index.names(slots), stored, index.parents(slots), strict=True)
            )
        ]

    # -- room on the SSD -----------------------------------------------------------------------------------------------

    async def make_room(self, wanted_bytes: int) -> bool:
        """Reclaims segments until about `wanted_bytes` came free; False when nothing could be reclaimed."""
        ssd: object = self._tiers.ssd
        if not isinstance(ssd, Reclaiming):
            return False
        freed = 0
        for _ in range(RECLAIM_ROUNDS_MAX):
            if freed >= wanted_bytes:
                break
            gained = await self._reclaim(ssd)
            if gained is None:
                break
            freed += gained
        return freed > 0

    async def _reclaim(self, ssd: Reclaiming) -> int | None:
        index = self._tiers.index
        if self._superseded:
            await self._sync()
        locations = [] if self._tiers.recovering else ssd.victim()
        if not locations:
            return None
        slots = index.slots_at(TierId.SSD, np.array(locations, np.int64))
        known = slots >= 0
        dead = [location for location, alive in zip(locations, known, strict=True) if not alive]
        slots = slots[known]
        facts = index.facts(slots)
        order = index.policies[TierId.SSD].order(slots)
        keep = self._worth_keeping(order, facts.size, ssd.segment_bytes)
        gone = index.unplace(slots[~keep], TierId.SSD)
        dropped = set(gone.locations.tolist())
        kept = [location for location in facts.ssd_location.tolist() if location not in dropped]
        moved = dict(await ssd.reclaim(kept, dead + sorted(dropped)))
        self._settle(slots, moved, kept)
        if any(old == new for old, new in moved.items()):
            return None  # the disk is not well: what stays where it was keeps its segment
        rewritten = int(facts.size[np.isin(facts.ssd_location, list(moved))].sum(dtype=np.int64))
        gained = max(1, ssd.segment_bytes - rewritten)
        self._tiers.metrics.add_all(
            [
                ("tiercache_evictions_total", len(dropped), "ssd", ""),
                ("tiercache_reclaimed_bytes_total", gained, "ssd", ""),
                ("tiercache_reinserted_bytes_total", rewritten, "ssd", ""),
            ]
        )
        return gained

    def _worth_keeping(
        self, order: npt.NDArray[np.uint32], sizes: npt.NDArray[np.uint32], segment_bytes: int
    ) -> npt.NDArray[np.bool_]:
        """A segment that is mostly dead is emptied for its dead space alone. The tier names the one best given up:
        if even that is mostly alive, the tier is full, and what was used least recently goes."""
        live_bytes = int(sizes.sum(dtype=np.int64))
        if live_bytes <= segment_bytes * KEEP_SHARE:
            return np.ones(len(order), bool)
        return plan_reclaim(order, sizes, self._threshold(), int(live_bytes * KEEP_SHARE))

    def _settle(self, slots: npt.NDArray[np.int64], moved: dict[int, int], kept: list[int]) -> None:
        """Points slots to where their payloads went, and forgets the copies that did not arrive."""
        index = self._tiers.index
        ssd = self._tiers.ssd
        assert ssd is not None
        old = np.array([location for location in kept if location in moved], np.int64)
        by_location = dict(zip(index.facts(slots).ssd_location.tolist(), slots.tolist(), strict=True))
        there = [location for location in old.tolist() if location in by_location]
        rows = np.array([by_location[location] for location in there], np.int64)
        new = np.array([moved[location] for location in there], np.int64)
        taken = index.relocate(rows, TierId.SSD, np.array(there, np.int64), new)
        ssd.free(new[~taken].tolist() + [moved[at] for at in old.tolist() if at not in by_location])
        if lost := [by_location[at] for at in kept if at not in moved and at in by_location]:
            self._tiers.lose(np.array(lost, np.int64), TierId.SSD)

    def _threshold(self) -> int:
        """Order of use of the median of what is on the SSD, from a sample: used since then is worth rewriting."""
        index = self._tiers.index
        sample = index.sample(TierId.SSD, SAMPLE, self._rng)
        return int(np.median(index.policies[TierId.SSD].order(sample))) if len(sample) else 0
