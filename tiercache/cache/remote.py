"""Remote: what a cache does with blocks in object storage: uploads what is new, loads what no local tier has.

Uploads wait in a bounded queue, which is dropped first: what is evicted from memory, or pushed out of the queue, before
its turn is not uploaded. Only whole entries of kinds that are worth it go: KV blocks and tensors, never pages, which
have an origin. Loads fill extents as any writer of blocks does (see blocks.py): claimed, verified, then shown.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tiercache.cache.bringing import BATCH_SHARE, Bringing
from tiercache.cache.tiers import whole
from tiercache.errors import TierCacheError
from tiercache.model import Kind, Name, Outcome, Payload, State
from tiercache.tier import Health

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence
    from typing import Any

    import numpy.typing as npt

    from tiercache.cache.blocks import Blocks
    from tiercache.cache.far import Far
    from tiercache.cache.storing import Storing
    from tiercache.cache.tasks import Tasks
    from tiercache.cache.tiers import Tiers

log = logging.getLogger(__name__)

LINGER_S = 2.0
"""What is new waits so long for more, so that packs are full; and is not held up longer by what keeps coming."""
FINISH_S, CLOSE_S = 10.0, 5.0
"""Closing waits so long for uploads, and so long for what the bucket is told at the end."""
KINDS = (Kind.KV, Kind.TENSOR)


class Queued(NamedTuple):
    """One entry that waits for its upload."""

    slot: int
    location: int
    size: int
    again: bool = False
    """Whether it went back into the queue with those before it, which the bucket lacked: it does so once."""


class Remote:
    """See the module. `mark`, `probe` and `hide` may be called in any thread, all else on the cache's loop."""

    def __init__(self, tiers: Tiers, blocks: Blocks, storing: Storing, store: Far) -> None:
        self.store = store
        self._tiers = tiers
        self._queue: dict[int, Queued] = {}
        self._bytes = 0
        self._lock = threading.Lock()  # for the two above
        self._batch_bytes = min(store.pack_bytes, tiers.settings.memory_bytes // BATCH_SHARE)
        self._wake = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._closing = asyncio.Event()
        self._bringing = Bringing(tiers, blocks, storing, "remote")

    def begin(self, tasks: Tasks) -> None:
        """Starts uploading, and keeping up with the bucket."""
        self._loop = asyncio.get_running_loop()
        work: list[tuple[Coroutine[Any, Any, None], str]] = [
            (self.store.run(), "keep up with the bucket"), (self._upload(), "upload")
        ]  # fmt: skip
        self._tasks = [tasks.start(coroutine, name) for coroutine, name in work]

    async def close(self) -> None:
        """Uploads what waits, as far as that is done in time, and leaves the bucket in order."""
        self._closing.set()
        self._wake.set()
        for work, patience_s in ((self._finish, FINISH_S), (self.store.close, CLOSE_S)):
            try:
                async with asyncio.timeout(patience_s):
                    await work()
            except TimeoutError:
                log.warning("closing without waiting for the remote tier any longer")

    async def _finish(self) -> None:
        """What is on its way, and then what waits, goes up; nothing of that is interrupted before its time."""
        try:
            if self._tasks:
                keeping, uploading = self._tasks
                keeping.cancel()
                await asyncio.wait([keeping, uploading])
            await self._drain()
        finally:
            for task in self._tasks:
                task.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks)

    # -- uploads -------------------------------------------------------------------------------------------------------

    @property
    def queue_bytes(self) -> int:
        """Bytes that wait for their upload."""
        return self._bytes

    def mark(self, slots: npt.NDArray[np.int64]) -> None:
        """These slots have got parts: those that are whole now are uploaded, unless the bucket has them."""
        tiers = self._tiers
        if not len(slots):
            return
        facts = tiers.index.facts(slots)
        ready = np.isin(facts.kind, KINDS) & (facts.memory_location >= 0) & (facts.state >= State.RESIDENT)
        ready &= facts.memory_parts == whole(facts.size, facts.part_bytes)
        rows = np.flatnonzero(ready).tolist()
        if not rows:
            return
        known = self.store.find([name.key for name in tiers.index.names(slots[rows])])
        dropped = 0
        with self._lock:
            for row, there in zip(rows, known, strict=True):
                slot = int(slots[row])
                if there is None and slot not in self._queue:
                    self._queue[slot] = Queued(slot, int(facts.memory_location[row]), int(facts.size[row]))
                    self._bytes += int(facts.size[row])
            while self._bytes > tiers.settings.queue_bytes and len(self._queue) > 1:
                self._pop()
                dropped += 1
            waiting = bool(self._queue)
        if dropped:
            tiers.metrics.add("tiercache_uploads_dropped_total", dropped)
        if waiting and self._loop is not None:
            try:
                self._loop.call_soon_threadsafe(self._wake.set)
            except RuntimeError:
                return  # the loop was closed: nothing is uploaded any more

    def _pop(self) -> Queued:
        """What waits longest; the lock is held."""
        one = self._queue.pop(next(iter(self._queue)))
        self._bytes -= one.size
        return one

    def _take(self) -> list[Queued]:
        batch: list[Queued] = []
        total = 0
        with self._lock:
            while self._queue and total < self._batch_bytes:
                batch.append(self._pop())
                total += batch[-1].size
        return batch

    async def _upload(self) -> None:
        """Uploads for as long as the cache is open."""
        while not self._closing.is_set():
            await self._wake.wait()
            if self._bytes < self._batch_bytes:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LINGER_S):
                        await self._closing.wait()
            self._wake.clear()
            await self._drain()

    async def _drain(self) -> None:
        """Uploads all that waits now."""
        for _ in range(len(self._queue)):
            batch = self._take()
            if not batch:
                return
            try:
                await self._send(batch)
            except (TierCacheError, OSError) as error:
                self._tiers.metrics.add("tiercache_uploads_dropped_total", len(batch))
                log.warning("%d entries were not uploaded (%s)", len(batch), error)

    async def _send(self, batch: Sequence[Queued]) -> None:
        """One pack of what of a batch is still where it was."""
        count = len(batch)
        tiers = self._tiers
        pin = tiers.index.hold([one.slot for one in batch], readable=True)
        end = tiers.end_of(pin)
        over = False

        def copied() -> None:
            nonlocal over
            if not over:
                over = True
                end(True)

        try:
            held = set(pin.slots.tolist())
            batch = [one for one in batch if one.slot in held]
            slots = np.array([one.slot for one in batch], np.int64)
            facts = tiers.index.facts(slots)
            same = facts.memory_location == np.array([one.location for one in batch], np.int64)
            same &= facts.memory_parts == whole(facts.size, facts.part_bytes)
            payloads = tiers.payloads(slots[same])
            some = self._admitted(payloads, [one for one, there in zip(batch, same.tolist(), strict=True) if there])
            sources = tiers.memory.buffers(facts.memory_location[same][some].tolist()) if some else []
            outcomes = await self.store.write([payloads[i] for i in some], sources, copied) if some else []
        finally:
            copied()
        good, kept = outcomes.count(Outcome.HIT), sum(1 for one in batch if one.slot in self._queue)
        tiers.metrics.add_all(
            [
                ("tiercache_uploads_total", good, "", ""),
                ("tiercache_uploads_dropped_total", max(0, count - good - kept), "", ""),
            ]
        )

    def _admitted(self, payloads: Sequence[Payload], batch: Sequence[Queued]) -> list[int]:
        """Which of these are worth uploading, parents first: a block is of use only with those before it. Where the one
        before it waits for its own upload, it waits as well; where that was dropped, but is here, both wait."""
        there = self.store.find([one.parent for one in payloads])
        slots = self._slots_of([one.parent for one in payloads if one.parent])
        admitted: list[int] = []
        keys, left = set[bytes](), set[bytes]()
        well = self.store.status().health is Health.HEALTHY
        for i in _parents_first(payloads):
            parent = payloads[i].parent
            if not parent or there[i] is not None or parent in keys:
                admitted.append(i)
                keys.add(payloads[i].name.key)
                continue
            with self._lock:
                queued = slots[parent] in self._queue
            if queued:
                self._put_back([batch[i]])
            elif above := [] if not well or batch[i].again or parent in left else self._above(slots[parent]):
                self._put_back([one._replace(again=True) for one in (*above, batch[i])])
                self._wake.set()
            else:
                left.add(payloads[i].name.key)
        return admitted

    def _put_back(self, some: Sequence[Queued]) -> None:
        with self._lock:
            for one in some:
                if one.slot not in self._queue:
                    self._queue[one.slot] = one
                    self._bytes += one.size

    def _above(self, slot: int) -> list[Queued]:
        """A block and those before it that the bucket lacks, first ones first; empty where one of them is not whole in
        memory, or they would fill more than half of the queue."""
        index, found = self._tiers.index, list[Queued]()
        room = self._tiers.settings.queue_bytes // 2 - self._bytes
        while slot >= 0:
            pin = index.hold([slot], readable=True)
            try:
                if not len(pin.slots):
                    return []
                facts = index.facts(pin.slots)
                if (facts.memory_location < 0)[0] or facts.memory_parts[0] != whole(facts.size, facts.part_bytes)[0]:
                    return []
                found.append(Queued(slot, int(facts.memory_location[0]), int(facts.size[0])))
                parent = index.parents(pin.slots)[0]
            finally:
                self._tiers.release(pin)
            room -= found[-1].size
            if room < 0:
                return []
            if not parent or self.store.find([parent])[0] is not None:
                return found[::-1]
            slot = self._slots_of([parent])[parent]
            if slot in self._queue or any(one.slot == slot for one in found):
                return found[::-1]
        return []

    def _slots_of(self, keys: Sequence[bytes]) -> dict[bytes, int]:
        match = self._tiers.index.match([Name(one) for one in keys])
        self._tiers.release(match)
        return dict(zip(keys, match.slots.tolist(), strict=True))

    # -- loads ---------------------------------------------------------------------------------------------------------

    def probe(self, digests: Sequence[bytes]) -> int:
        """How many of these blocks, from the first on, are in the bucket, with all of their parts; any thread."""
        count = self.store.prefix(digests)
        if count < len(digests) and self._loop is not None:
            try:
                self._loop.call_soon_threadsafe(self.store.missed)
            except RuntimeError:
                return 0
        return count

    def hide(self, names: Sequence[Name]) -> None:
        """These were deleted: what the bucket has of them is not looked at any more."""
        self.store.hide([name.key for name in names])

    async def bring(self, digests: Sequence[bytes], parts: int) -> None:
        """Puts what the bucket has of these blocks, or lone entries, into memory, as far as that can be done in time.
        Never raises."""
        await self._bringing.bring(digests, parts, self._found)

    async def _found(self, digests: Sequence[bytes]) -> InBucket:
        await self.store.known()
        found = self.store.find(digests)
        if None in found:
            self.store.missed()
        return InBucket([one for one in found if one is not None], self.store)


class InBucket:
    """What a bucket has of what was asked for; see bringing.Found."""

    def __init__(self, payloads: list[Payload], store: Far) -> None:
        self.payloads, self.read = payloads, store.read

    def end(self) -> None:
        """Nothing was held there."""


def _parents_first(payloads: Sequence[Payload]) -> list[int]:
    """Places of these in an order in which each comes after the one before it in its chain."""
    places = {one.name.key: i for i, one in enumerate(payloads)}
    done: set[int] = set()
    order: list[int] = []
    for i in range(len(payloads)):
        path: list[int] = []
        at: int | None = i
        while at is not None and at not in done:
            done.add(at)
            path.append(at)
            at = places.get(payloads[at].parent)
        order += reversed(path)
    return order
