"""Writing: packs and snapshots into a bucket, never over this writer's share; and what is given up for room.

Bytes are counted from before their PUT until after their deletion. What failed so that nobody knows whether it happened
is deleted, and counts until a grace period later a listing does not have it. Small packs are written anew as one.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from tiercache.errors import OriginError, UnavailableError
from tiercache.model import Outcome
from tiercache.remote import packs, snapshots
from tiercache.remote.bucket import PART_MARK
from tiercache.remote.catalog import INDEX, LIST_S, PACKS, writer_of
from tiercache.remote.snapshots import Listed
from tiercache.remote.victims import Candidate, choose

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from tiercache.buffers import Buffer
    from tiercache.clock import Clock
    from tiercache.metrics import Metrics
    from tiercache.model import Payload
    from tiercache.remote.asking import Asking
    from tiercache.remote.bucket import Bucket
    from tiercache.remote.budget import Budget
    from tiercache.remote.catalog import Catalog, Pack

log = logging.getLogger(__name__)

FORMAT_KEY, FORMAT = "FORMAT", b"tiercache blocks 1\n"
SNAPSHOT_PACKS, SNAPSHOT_SHARE = 8, 1 / 8
"""A snapshot is written after so many new packs, or after this share of those that it lists, whichever is more."""
SWEEP_S = 600.0
"""Objects of writers whom the ledger does not know are looked for so often, and deleted when they are found again."""
OVERDUE_S = 60.0
"""A pack that is over so long is not deleted by its writer any more."""
COMPACT_PACKS = 8
"""So many small packs are worth being written anew as one."""
REFUSED_S = 60.0
"""A bucket that refused a change is not asked for another one for so long."""
ROOM_ROUNDS_MAX = 32
"""Changes of the share, and packs given up, for one pack that needs room."""


class Writing:
    """The writer of one cache; on the loop. One thing at a time: whoever writes has the lock."""

    def __init__(
        self,
        asking: Asking,
        catalog: Catalog,
        budget: Budget,
        *,
        clock: Clock,
        metrics: Metrics,
        pack_bytes: int,
        lifetime_s: float,
        rate_bytes_s: float,
    ) -> None:
        self._asking, self._catalog, self._budget = asking, catalog, budget
        self._clock, self._metrics = clock, metrics
        self._pack_bytes, self._lifetime_s, self._rate_bytes_s = pack_bytes, lifetime_s, rate_bytes_s
        self._lock = asyncio.Lock()
        self._number = 0
        self._checked = False
        self._refused_at_s = 0.0  # when a change was refused last; 0: none since the last that went well
        self.refused = False
        """Whether this bucket cannot be written to at all."""
        self._doubts: dict[str, float] = {}
        """Objects that may be in the bucket, or come there yet, and since when: they count, and are deleted."""
        self._index: set[str] = set()  # own snapshots, and those of who was taken over
        self._strange: set[str] = set()  # writers whom the ledger did not know when it was looked at last
        self._swept_at_s = clock.monotonic()
        self._untold = 0  # packs that came or went since the last snapshot
        self._free_at_s = clock.monotonic()
        self._closed = False

    async def write(
        self, payloads: Sequence[Payload], sources: Sequence[Buffer], copied: Callable[[], None]
    ) -> list[Outcome]:
        """See RemoteBlocks.write."""
        known = self._catalog.find([one.name.key for one in payloads])
        new = [i for i, one in enumerate(known) if one is None]
        outcomes = [Outcome.HIT] * len(payloads)
        if new:
            await self._pace(sum(payloads[i].size for i in new))
            async with self._lock:
                some = [self._terms(payloads[i]) for i in new]
                answers = await self._write(some, [sources[i] for i in new], copied)
            for i, outcome in zip(new, answers, strict=True):
                outcomes[i] = outcome
        return outcomes

    def _terms(self, payload: Payload) -> Payload:
        """With the end that the lifetime sets, where that is sooner."""
        if not self._lifetime_s:
            return payload
        end_s = int(self._clock.wall() + self._lifetime_s) + 1
        return replace(payload, expiry_s=min(payload.expiry_s or end_s, end_s))

    async def _pace(self, size: int) -> None:
        """Waits until the rate allows to send so much more."""
        if self._rate_bytes_s:
            wait_s = self._free_at_s - self._clock.monotonic()
            self._charge(size)
            if wait_s > 0:
                await asyncio.sleep(wait_s)

    def _charge(self, size: int) -> None:
        """So much is sent: what comes next waits for it."""
        if self._rate_bytes_s:
            self._free_at_s = max(self._clock.monotonic(), self._free_at_s) + size / self._rate_bytes_s

    async def _write(
        self, payloads: Sequence[Payload], sources: Sequence[Buffer], copied: Callable[[], None]
    ) -> list[Outcome]:
        """One pack; the lock is held."""
        try:
            if (
                self._closed
                or self.denied
                or not await self._usable()
                or not await self._room(packs.pack_bytes(payloads), {one.parent for one in payloads})
            ):
                return [Outcome.FULL] * len(payloads)
            key, began = self._name(PACKS), self._catalog.deletions
            pack, rows = await self._asking.work(lambda: packs.encode(key, payloads, sources))
            copied()
            if not len(rows):
                return [Outcome.CORRUPT] * len(payloads)
            made = await self._put(key, pack)
        except OriginError as error:
            if not self._refused_at_s:
                log.warning("nothing is written for now: %s", error)
            self._refused_at_s = self._clock.monotonic() or 1.0
            return [Outcome.BUSY] * len(payloads)
        except UnavailableError as error:
            log.debug("a pack was not written: %s", error)
            return [Outcome.BUSY] * len(payloads)
        if not made:
            return [Outcome.FULL] * len(payloads)
        self._refused_at_s = 0.0
        self._catalog.show([one.name.key for one in payloads], began)
        self._catalog.add(Listed(key, len(pack), rows))
        self._catalog.used_bytes += len(pack)
        self._untold += 1
        self._metrics.add("tiercache_written_bytes_total", int(rows["size"].sum(dtype="i8")), tier="remote")
        kept = set(packs.keys_of(rows))
        return [Outcome.HIT if one.name.key in kept else Outcome.CORRUPT for one in payloads]

    def _name(self, folder: str) -> str:
        self._number += 1
        return f"{folder}{self._budget.writer}/{self._number:010d}"

    async def _put(self, key: str, data: bytes | bytearray) -> bool:
        """Creates an object within the share, if that is still what it was; the budget counts it from here on."""
        budget, size = self._budget, len(data)
        if writer_of(key) != budget.writer or not budget.take(key, size):
            return False
        try:
            made = await self._asking.ask(
                "write", lambda bucket: bucket.put(key, data, create=True), within_s=budget.put_s
            )
        except OriginError:
            budget.give(key)
            raise
        except BaseException:
            self._doubts[key] = self._clock.monotonic()
            raise
        if not made:  # a proxy, or a client, sent it twice, and this is the second answer: it may well be there
            self._doubts[key] = self._clock.monotonic()
            log.warning("%s has %s already: it is deleted", self._asking.bucket.place, key)
        return made

    @property
    def denied(self) -> bool:
        """Whether the bucket refused a change a short while ago."""
        return bool(self._refused_at_s) and self._clock.monotonic() - self._refused_at_s < REFUSED_S

    async def _usable(self) -> bool:
        """Whether the bucket keeps what all of this is built on: of two who create one name, one succeeds."""
        if not self._checked:
            await self._asking.ask("write", _create_format)
            twice = await self._asking.ask("write", _create_format)
            found = await self._asking.ask("write", lambda bucket: bucket.get(FORMAT_KEY))
            self._checked = True
            self.refused = twice or found is None or bytes(found) != FORMAT
            if self.refused:
                why = "it lets two writers create one name" if twice else "what lies there is of another version"
                log.warning("nothing is written to %s: %s", self._asking.bucket.place, why)
        return not self.refused

    # -- room ----------------------------------------------------------------------------------------------------------

    async def _room(self, size: int, parents: Collection[bytes] = ()) -> bool:
        """Whether the share has room for so much more, after it has grown, and packs were given up, as far as they may
        be; not those with any of `parents`, on which builds what comes."""
        budget = self._budget
        if budget.held and not budget.share_bytes:
            await budget.renew()
            if budget.allotted_bytes and not budget.share_bytes:
                return False
        for _ in range(ROOM_ROUNDS_MAX):
            if budget.used_bytes + size <= budget.share_bytes:
                return True
            grown = await budget.grow(size)
            await budget.adopt(())
            await self._settle_heritage()
            if grown or budget.used_bytes + size <= budget.share_bytes:
                continue
            if not await self._evict(parents):
                return False
        return False

    async def _settle_heritage(self) -> None:
        """Finds out what those had who were taken over; what they left half written is deleted."""
        heirs = self._budget.unlisted
        if not heirs:
            return
        found: dict[str, int] = {}
        for writer in heirs:
            for folder in (PACKS, INDEX):
                found |= await self._left_by(writer, folder)
        self._budget.listed(found.items())
        self._index |= {key for key in found if key.startswith(INDEX)}
        log.info("took over %d bytes of writers that are gone", sum(found.values()))
        await self._catalog.refresh()

    async def _left_by(self, writer: str, folder: str) -> dict[str, int]:
        """What lies in a folder of a writer that is gone, by size, without what is torn: that is deleted first."""
        found = await self._list(f"{folder}{writer}/")
        await self._remove([key for key, _ in found if PART_MARK in key])
        return {key: size for key, size in found if PART_MARK not in key}

    async def _list(self, prefix: str) -> Sequence[tuple[str, int]]:
        return await self._asking.ask("list", lambda bucket: bucket.list(prefix), within_s=LIST_S)

    async def _remove(self, keys: Sequence[str]) -> None:
        if keys:
            await self._asking.ask("delete", lambda bucket: bucket.delete(keys), within_s=LIST_S)

    @property
    def _mine(self) -> set[str]:
        """Writers whose objects this one counts, and may delete."""
        return {self._budget.writer, *self._budget.adopted}

    def _own(self) -> list[Pack]:
        """Packs that are this writer's to give up."""
        mine = self._mine
        return [pack for pack in list(self._catalog.packs.values()) if pack.writer in mine]

    async def _evict(self, parents: Collection[bytes] = ()) -> bool:
        """Gives up the pack that is worth least; False where there is none, where it has any of `parents`, or where it
        cannot be deleted now."""
        if self._budget.unlisted:
            return False
        for key in self._catalog.bad:  # nobody can read them
            if writer_of(key) in self._mine:
                await self._remove([key])
                del self._catalog.bad[key]
                self._budget.give(key)
                return True
        mine, now_s = self._mine, self._clock.wall()
        every = list(self._catalog.packs.values())
        victim = next((pack for pack in every if pack.writer in mine and 0 < pack.until_s <= now_s), None)
        if victim is None:
            candidates = [Candidate(one.rows, (one.priority, one.tick), one.writer in mine) for one in every]
            chosen = await self._asking.work(lambda: choose(candidates))
            if chosen < 0 or not set(packs.keys_of(every[chosen].rows)).isdisjoint(parents):
                return False
            victim = every[chosen]
            self._catalog.inflation = max(self._catalog.inflation, victim.priority)
            self._metrics.add("tiercache_evictions_total", len(victim.rows), tier="remote")
            self._metrics.add("tiercache_evicted_bytes_total", victim.size, tier="remote")
        await self._delete(victim)
        return True

    async def _delete(self, pack: Pack) -> None:
        """Deletes a pack; readers do not find it from before that on."""
        self._catalog.drop(pack.key)
        try:
            await self._remove([pack.key])
        except BaseException:
            self._doubts.setdefault(pack.key, 0.0)
            raise
        self._catalog.used_bytes -= pack.size
        self._budget.give(pack.key)
        self._untold += 1

    # -- housekeeping --------------------------------------------------------------------------------------------------

    async def tend(self) -> None:
        """Renews the lease, and does what has become due: what others want is given back, what is over is deleted."""
        budget = self._budget
        if not budget.held:
            return
        await budget.renew()
        async with self._lock:
            if self._closed:
                return
            await self._budget.adopt(self._overdue())
            await self._settle_heritage()
            await self._settle_doubts()
            for key in (
                self._catalog.gone - self._doubts.keys()
            ):  # somebody else deleted them: a rule of the bucket, say
                budget.give(key)
            self._catalog.gone.clear()
            now_s = self._clock.wall()
            for pack in self._own():
                if 0 < pack.until_s <= now_s:
                    self._metrics.add("tiercache_expirations_total", len(pack.rows))
                    await self._delete(pack)
            target = budget.allotted_bytes - budget.excess_bytes
            while budget.excess_bytes and budget.used_bytes > target and await self._evict():
                pass
            await self._compact()
            if self._untold >= max(SNAPSHOT_PACKS, int(len(self._own()) * SNAPSHOT_SHARE)):
                await self._snapshot()
            if self._clock.monotonic() - self._swept_at_s > SWEEP_S:
                self._swept_at_s = self._clock.monotonic()
                await self._sweep()
        if budget.excess_bytes:
            await budget.renew()

    def _overdue(self) -> set[str]:
        """Writers, other than this one, of packs that are over: if they are gone, nobody deletes them."""
        mine, now_s = self._mine, self._clock.wall()
        packs_now = list(self._catalog.packs.values())
        return {one.writer for one in packs_now if 0 < one.until_s <= now_s - OVERDUE_S and one.writer not in mine}

    async def _compact(self) -> None:
        """Writes small packs, as come of little traffic, anew as one, without what nobody finds there any more. Never
        at the price of another pack."""
        small = sorted([one for one in self._own() if one.size < self._pack_bytes // 2], key=lambda one: one.tick)
        group: list[Pack] = []
        for pack in small:
            if sum(one.size for one in group) + pack.size > self._pack_bytes:
                break
            group.append(pack)
        size = sum(pack.size for pack in group)
        if len(group) < COMPACT_PACKS or self.denied or self._budget.excess_bytes:
            return
        if self._budget.used_bytes + size > self._budget.share_bytes and not await self._budget.grow(size):
            return
        records: list[tuple[Payload, Buffer]] = []
        for pack in group:
            data = await self._asking.ask("compact", partial(_whole, key=pack.key), within_s=self._budget.put_s)
            if data is None:
                self._catalog.drop(pack.key)
                if pack.key not in self._doubts:
                    self._budget.give(pack.key)
                return
            rows = self._catalog.living(pack)
            records += await self._asking.work(partial(packs.unpack, pack.key, data, rows))
        self._charge(size)
        key = self._name(PACKS)
        payloads, sources = [one for one, _ in records], [source for _, source in records]
        made, rows = await self._asking.work(partial(packs.encode, key, payloads, sources))
        if len(made) > size or (len(rows) and not await self._put(key, made)):
            return
        if len(rows):
            self._catalog.add(Listed(key, len(made), rows))
            self._catalog.used_bytes += len(made)
            new = self._catalog.packs.get(key)
            if new is not None:  # it is as old, and as good, as what it was made of
                new.priority, new.tick = max(pack.priority for pack in group), max(pack.tick for pack in group)
        for pack in group:
            await self._delete(pack)

    async def _sweep(self) -> None:
        """Deletes what belongs to nobody: no holding counts it, or this writer's does not though it is in a folder of
        its own (a PUT came late, after its writer was taken over). A writer is in the ledger before its first object is
        in the bucket, and as long as the last one is. What is counted and is not there is not counted any longer."""
        found = [*await self._list(PACKS), *await self._list(INDEX)]
        there = {key.partition(PART_MARK)[0] for key, _ in found}
        for key in self._budget.counted - there - self._doubts.keys():
            self._budget.give(key)
            self._catalog.drop(key)
        known = await self._budget.writers()  # after the listing: who came meanwhile is in it
        strange = {key for key, _ in found if key.count("/") == 2 and writer_of(key) not in known}
        again = [key for key in strange if writer_of(key) in self._strange]
        mine, counted = self._mine - set(self._budget.unlisted), self._budget.counted
        again += [key for key, _ in found if writer_of(key) in mine and key.partition(PART_MARK)[0] not in counted]
        self._strange = {writer_of(key) for key in strange}
        for key in again:
            self._catalog.drop(key)
        if again:
            log.warning("%d objects in %s belong to nobody, and are deleted", len(again), self._asking.bucket.place)
            await self._remove(again)

    async def _settle_doubts(self) -> None:
        """Deletes what may have been written though nobody said so; it counts until it surely is not there."""
        if not self._doubts:
            return
        await self._remove(list(self._doubts))
        old = [key for key, since_s in self._doubts.items() if self._clock.monotonic() - since_s > self._budget.grace_s]
        for folder in sorted({key.rpartition("/")[0] + "/" for key in old}):
            there = {key.partition(PART_MARK)[0] for key, _ in await self._list(folder)}
            for key in [key for key in old if key.startswith(folder) and key not in there]:
                del self._doubts[key]
                self._budget.give(key)

    async def _snapshot(self) -> None:
        """Writes down what is in this writer's packs; older snapshots of it, and of the dead, go."""
        own = sorted(self._own(), key=lambda pack: pack.key)
        size = snapshots.size_of(len(own), sum(len(pack.rows) for pack in own))
        if not await self._room(size):
            return
        key, listed = self._name(INDEX), [Listed(pack.key, pack.size, pack.rows) for pack in self._own()]
        data = await self._asking.work(lambda: snapshots.encode(key, listed))
        if not await self._put(key, data):
            return
        self._untold = 0
        old, self._index = self._index, {key}
        try:
            await self._remove(list(old))
        except BaseException:
            self._doubts |= dict.fromkeys(old, 0.0)
            raise
        for one in old:
            self._budget.give(one)
        await self._forget_the_empty()

    async def _forget_the_empty(self) -> None:
        """Who was taken over, and has nothing in the bucket any more, need not be remembered."""
        left, done = {pack.writer for pack in self._own()}, list[str]()
        for writer in self._budget.adopted:
            if writer in left or await self._list(f"{PACKS}{writer}/") or await self._list(f"{INDEX}{writer}/"):
                continue
            done.append(writer)
        if done:
            await self._budget.renew(done=done)

    async def close(self) -> None:
        """The last snapshot; then the holding is left to others. Idempotent."""
        async with self._lock:
            if self._closed:
                return
            self._closed = True
            if not self._budget.held:
                return
            if self._untold:
                await self._snapshot()
            if not self._doubts and not self._budget.unlisted:  # else nobody may take it over before its lease is over
                await self._budget.close()


def _whole(bucket: Bucket, key: str) -> memoryview | None:
    return bucket.get(key)


def _create_format(bucket: Bucket) -> bool:
    return bucket.put(FORMAT_KEY, FORMAT, create=True)
