"""Loading: blocks on their way from the cache into engine memory; and prefetching, which stops in the cache's memory.

What is in memory as a whole is leased once and copied by layer groups, a few and then more at a time. For the rest each
lease asks for some layer groups only, first layers first and more of them each time, so that an SSD brings the parts of
layer 0 of all blocks before those of the last layer of any.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from concurrent import futures
from typing import TYPE_CHECKING

from tiercache.buffers import Buffer
from tiercache.errors import TierCacheError
from tiercache.kv import moving
from tiercache.model import Name, Outcome

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator, Sequence
    from concurrent.futures import Future

    from tiercache.core import Core
    from tiercache.kv.store import KvStore
    from tiercache.kv.stretch import Stretch
    from tiercache.kv.workers import Awaited, Steps
    from tiercache.lease import Lease

    Group = tuple[range, int]

LOAD_S_MAX = 60.0
SCATTER_BYTES = 32 << 20
"""A turn of copying: some milliseconds, so that a cancellation waits no longer than that."""
LEASE_BYTES = 64 << 20
"""Parts that one lease brings from the SSD; the next one is under way while they are copied."""
GROWTH = 4
"""So many times more layer groups each lease asks for, or each copy moves, than the one before: little of the first
layers, which are waited for, much of the rest, which an SSD serves a third faster and two cores copy at once."""
END_S_MAX = 5.0
"""A cancelled load needs no longer to give back what it holds."""


class Loading:
    """One load under way. `outcomes[i]` belongs to block `start + i`, and is final once `done`.

    HIT: all that this rank holds of the block is in engine memory, verified. Anything else: what lies in its pages is
    undefined, and the engine computes it (MISS; BUSY: no time; FULL: no room to bring it to memory; damage is a MISS,
    counted). Outcomes of different blocks are independent: a hit after a miss stands.
    """

    def __init__(
        self, store: KvStore, stretch: Stretch, *, layerwise: bool, deadline_s: float | None, rows: range | None = None
    ) -> None:
        """See KvStore.load. `rows` of the sequence limits what is written. `begin` starts it."""
        self.outcomes = [Outcome.BUSY] * len(stretch.span)
        self.moved_bytes = 0
        """Bytes copied into engine memory so far."""
        self._store, self._stretch, self._layerwise, self._rows = store, stretch, layerwise, rows
        self._shard = stretch.planes.shard
        self._needed = self._shard.needed(stretch.layout)
        self._undecided = set(stretch.span)
        self._damaged: set[int] = set()
        self._changed = threading.Condition()
        self._landed = self._shard.layers.start  # layers before this one are in engine memory, or some block failed
        self._failed = False
        self._leases: list[Lease] = []
        self._began = store.core.clock.monotonic()
        limit = LOAD_S_MAX if deadline_s is None else deadline_s
        self._work = store.workers.make(self._steps(), self._settle, urgent=True, deadline_s=limit)

    def begin(self, *, inline: bool = False) -> Loading:
        """Starts it, or does it here and now."""
        (self._store.workers.run if inline else self._store.workers.start)(self._work)
        return self

    @property
    def done(self) -> bool:
        """Whether all is decided; never waits."""
        return self._work.ended.is_set()

    def wait_layer(self, layer: int, timeout_s: float) -> bool:
        """Whether `layer` (counted within the layout) of every block is in engine memory now, waiting at most
        `timeout_s` for it. False: some block failed (now or at an earlier layer), or time is over; `wait` tells."""
        with self._changed:
            self._changed.wait_for(lambda: self._failed or self._landed > layer, timeout_s)
            return self._landed > layer and not self._failed

    def wait(self, timeout_s: float) -> list[Outcome]:
        """The outcomes, at the latest after `timeout_s`: a load that is not over then is cancelled, and what has not
        landed as a whole is a MISS. When it returns nothing writes to engine memory any more."""
        if not self._work.ended.wait(timeout_s):
            self.cancel()
        return list(self.outcomes)

    def cancel(self) -> None:
        """Gives up what has not landed (MISS). When it returns nothing writes to engine memory any more."""
        self._store.workers.cancel(self._work)
        self._work.ended.wait(END_S_MAX)

    # -- in the store's threads ----------------------------------------------------------------------------------------

    def _steps(self) -> Steps:
        stretch = self._stretch
        own = yield from self._variants()
        blocks = [block for block in stretch.span if block not in own]
        groups = self._groups()
        keys = stretch.of_blocks(blocks)
        lease = self._store.core.lease_blocks_resident(keys, self._needed) if keys else None
        if lease is not None:
            self._leases.append(lease)
            yield from self._resident(lease, blocks, groups)
        elif keys:
            yield from self._brought(blocks, groups)
        for block in list(self._undecided):
            self._decide(block, Outcome.HIT)
        self._land(self._shard.layers.stop)

    def _groups(self) -> list[Group]:
        """What this rank holds of each layer group: its layers, and the parts they are in."""
        layout, mine = self._stretch.layout, self._shard
        groups = []
        for layers in layout.layer_groups():
            held = range(max(layers.start, mine.layers.start), min(layers.stop, mine.layers.stop))
            if len(held):
                groups.append((held, layout.parts_touched(held, mine.heads)))
        return groups

    def _resident(self, lease: Lease, blocks: Sequence[int], groups: Sequence[Group]) -> Steps:
        """Everything is in memory: one lease, first layers first."""
        sources = dict(zip(blocks, lease.extents(range(len(blocks))), strict=True))
        for group in self._bundles(groups):
            again = yield from self._scatter(self._living(blocks), sources, group)
            if again:
                yield from self._fetch(again, group)
            self._land(group[0].stop)

    def _brought(self, blocks: Sequence[int], groups: Sequence[Group]) -> Steps:
        """Some of it has to be brought to memory, first layers first."""
        for group in self._bundles(groups):
            yield from self._fetch(self._living(blocks), group)
            self._land(group[0].stop)

    def _bundles(self, groups: Sequence[Group]) -> Iterator[Group]:
        """1, 4, 16, ... layer groups as one, so that the first layers come soon and the rest in large copies."""
        at, count = 0, 1 if self._layerwise else len(groups)
        while at < len(groups):
            yield _joined(groups[at : at + count])
            at, count = at + count, GROWTH * count

    def _fetch(self, blocks: Sequence[int], group: Group) -> Steps:
        """Leases this group of blocks and copies it, some blocks at a time, the next lease under way meanwhile."""
        parts = group[1]
        most = max(1, LEASE_BYTES // (parts.bit_count() * self._stretch.layout.part_bytes))
        queue = deque(list(blocks[at : at + most]) for at in range(0, len(blocks), most))
        asked: deque[tuple[list[int], Future[Lease]]] = deque()
        while queue or asked:
            while queue and len(asked) < 2:
                asked.append((queue[0], self._ask(queue.popleft(), parts)))
            some, future = asked.popleft()
            yield future
            try:
                lease = future.result(0)
            except TierCacheError:
                self._fail(some, Outcome.BUSY)
                continue
            self._leases.append(lease)
            outcomes = dict(zip(some, lease.outcomes, strict=True))
            again = yield from self._copied(lease, some, group)
            self._leases.remove(lease)
            lease.release()
            queue.extendleft(self._refused(outcomes))
            if again:
                queue.append(again)

    def _copied(self, lease: Lease, some: list[int], group: Group) -> Generator[Awaited, None, list[int]]:
        """Copies a group of what is a hit in a lease; answers what was damaged for the first time."""
        hits = [i for i, outcome in enumerate(lease.outcomes) if outcome is Outcome.HIT]
        sources = dict(zip([some[i] for i in hits], lease.extents(hits), strict=True))
        return (yield from self._scatter(self._living(sources), sources, group))

    def _refused(self, outcomes: dict[int, Outcome]) -> list[list[int]]:
        """Of a leased batch: what there was no room or no pin for, in halves, as long as that helps. The rest of what
        is no hit has failed."""
        refused = [block for block, outcome in outcomes.items() if outcome in (Outcome.BUSY, Outcome.FULL)]
        self._fail([one for one in outcomes if outcomes[one] is not Outcome.HIT and one not in refused], Outcome.MISS)
        if len(refused) == len(outcomes) == 1:
            self._fail(refused, outcomes[refused[0]])
            return []
        half = len(refused) // 2
        return [one for one in (refused[half:], refused[:half]) if one]

    def _scatter(
        self, blocks: Sequence[int], sources: dict[int, tuple[Buffer, bytes]], group: Group
    ) -> Generator[Awaited, None, list[int]]:
        """Copies a group of blocks into engine memory, in turns. Answers those that were damaged for the first time:
        they may be had from somewhere else. What is damaged twice has failed."""
        stretch, again, (layers, parts) = self._stretch, [], group
        each = len(layers) * len(self._shard.heads) * stretch.layout.unit_bytes
        most = max(1, SCATTER_BYTES // each)
        for at in range(0, len(blocks), most):
            some = self._same(blocks[at : at + most], sources, parts)
            spans, rows = [sources[block][0] for block in some], [sources[block][1] for block in some]
            with self._work.fence:
                good = self._moved(some, spans, rows, parts)
            self.moved_bytes += each * sum(good)
            bad = [block for block, fine in zip(some, good, strict=True) if not fine]
            if bad:
                self._store.core.quarantine([Name(key) for key in stretch.of_blocks(bad)])
                self._fail([block for block in bad if block in self._damaged], Outcome.MISS)
                again += [block for block in bad if block not in self._damaged]
                self._damaged.update(bad)
            yield None
        return again

    def _moved(self, blocks: Sequence[int], spans: Sequence[Buffer], rows: Sequence[bytes], parts: int) -> list[bool]:
        planes, table = self._stretch.planes, self._stretch.table
        if self._store.verify:
            return moving.scatter_verified(planes, table, blocks, spans, rows, parts=parts, tokens=self._rows)
        moving.scatter(planes, table, blocks, spans, parts=parts, tokens=self._rows)
        return [True] * len(blocks)

    def _same(self, blocks: Sequence[int], sources: dict[int, tuple[Buffer, bytes]], parts: int) -> list[int]:
        """Without those blocks of which this rank had other bytes than what is stored, and could not tell before: its
        own are gone, and it computes them again."""
        variants, kept = self._store.variants, []
        if not variants.due:
            return list(blocks)
        for block in blocks:
            differs = variants.differs(self._stretch.keys[block], parts, sources[block][1])
            if differs:
                variants.report(differs.bit_count())
                self._fail([block], Outcome.MISS)
            else:
                kept.append(block)
        return kept

    def _variants(self) -> Generator[Awaited, None, set[int]]:
        """Loads the blocks of which this rank has a version of its own; answers them, also those that failed."""
        stretch, variants = self._stretch, self._store.variants
        if self._shard != self._store.holder or not len(stretch.span):
            return set()
        marker = variants.look()
        if marker is not None:
            yield marker
        if not variants.known(marker.result(0) if marker is not None else None):
            return set()
        future = variants.lease(stretch.of_blocks(stretch.span))
        yield future
        own: set[int] = set()
        with future.result(0) as lease:
            for i, block in enumerate(stretch.span):
                if lease.outcomes[i] is Outcome.HIT:
                    own.add(block)
                    if not (yield from self._variant(lease, i, block)):
                        self._fail([block], Outcome.MISS)  # what others read is not what this rank computed
        return own

    def _variant(self, own: Lease, index: int, block: int) -> Generator[Awaited, None, bool]:
        """One block, composed of this rank's variant and, for the rest, of what everybody reads."""
        layout = self._stretch.layout
        whole = Buffer.of(bytearray(layout.block_bytes), writable=True)
        future = self._ask([block], self._needed)
        yield future
        with future.result(0) as shared:
            if shared.outcomes[0] is not Outcome.HIT:
                return False
            for part in range(layout.parts):
                start, stop = layout.part_span(part)
                target = whole.slice(start, stop - start)
                if self._needed >> part & 1 and shared.copy_into(0, start, stop, target) is not Outcome.HIT:
                    return False
        if self._store.variants.unpack(own, index, whole) is None:
            return False
        with self._work.fence:
            moving.scatter(
                self._stretch.planes, self._stretch.table, [block], [whole], parts=self._needed, tokens=self._rows
            )
        self.moved_bytes += len(self._shard.layers) * len(self._shard.heads) * layout.unit_bytes
        return True

    # -- what has become of it -----------------------------------------------------------------------------------------

    def _ask(self, blocks: Sequence[int], parts: int) -> Future[Lease]:
        work = self._store.core.lease_blocks(self._stretch.of_blocks(blocks), parts)
        return asyncio.run_coroutine_threadsafe(work, self._store.loop)

    def _living(self, blocks: Iterable[int]) -> list[int]:
        """Without those that have failed."""
        return [block for block in blocks if block in self._undecided]

    def _decide(self, block: int, outcome: Outcome) -> None:
        self.outcomes[block - self._stretch.span.start] = outcome
        self._undecided.discard(block)

    def _fail(self, blocks: Sequence[int], outcome: Outcome) -> None:
        """These will not be complete; whoever waits for a layer hears of it now."""
        for block in blocks:
            self._decide(block, outcome)
        if blocks:
            with self._changed:
                self._failed = True
                self._changed.notify_all()

    def _land(self, stop: int) -> None:
        """Layers before `stop` are there."""
        with self._changed:
            self._landed = stop
            self._changed.notify_all()

    def _settle(self) -> None:
        """The end, however it came about: nobody writes to engine memory, nothing of the cache is held."""
        self._fail(list(self._undecided), Outcome.MISS)
        for lease in self._leases:
            lease.release()
        self._leases.clear()
        metrics, loaded = self._store.core.metrics, self.outcomes.count(Outcome.HIT)
        metrics.add_all(
            [
                ("tiercache_kv_loaded_blocks_total", loaded, "", ""),
                ("tiercache_kv_loaded_bytes_total", self.moved_bytes, "", ""),
            ]
        )
        if loaded < len(self.outcomes):
            metrics.add("tiercache_kv_failed_blocks_total", len(self.outcomes) - loaded, operation="load")
        metrics.observe("tiercache_kv_seconds", self._store.core.clock.monotonic() - self._began, operation="load")


def _joined(groups: Sequence[Group]) -> Group:
    """All of them as one."""
    parts = 0
    for _, each in groups:
        parts |= each
    return range(groups[0][0].start, groups[-1][0].stop), parts


class Prefetch:
    """Blocks on their way to memory; see KvStore.prefetch."""

    def __init__(
        self, core: Core, loop: asyncio.AbstractEventLoop, keys: Sequence[bytes], parts: int, batch: int
    ) -> None:
        """`batch`: blocks of one lease. `begin` starts it."""
        self._core, self._loop, self._keys, self._parts, self._batch = core, loop, list(keys), parts, batch
        self._landed = 0
        self._future: Future[None] | None = None

    def begin(self, deadline_s: float) -> Prefetch:
        """Starts it; it gives up after `deadline_s`."""
        self._future = asyncio.run_coroutine_threadsafe(self._bring(deadline_s), self._loop)
        return self

    @property
    def done(self) -> bool:
        """Whether it is over; never waits."""
        return self._future is None or self._future.done()

    def wait(self, timeout_s: float) -> int:
        """Leading blocks that had come to memory when it ended, waiting at most `timeout_s` for that."""
        if self._future is not None:
            futures.wait([self._future], timeout_s)
        return self._landed

    def cancel(self) -> None:
        """Gives up the rest. Never waits."""
        if self._future is not None:
            self._future.cancel()

    async def _bring(self, deadline_s: float) -> None:
        try:
            async with asyncio.timeout(deadline_s):
                for at in range(0, len(self._keys), self._batch):
                    with await self._core.lease_blocks(self._keys[at : at + self._batch], self._parts) as lease:
                        hits = [outcome is Outcome.HIT for outcome in lease.outcomes]
                    self._landed += len(hits) if all(hits) else hits.index(False)
                    if not all(hits):
                        return
        except (TimeoutError, TierCacheError):
            pass  # it was a hint
