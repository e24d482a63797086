"""Saving: blocks on their way out of engine memory into the cache.

One join a batch of blocks, the next one asked for while this one is gathered, in turns, straight into the blocks'
extents (the one copy there is); each turn is committed while the next one is gathered. What has no room or no time is
tried again a few times, then it is reported: the cache is the engine's guest.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tiercache.errors import ConfigError, UnavailableError
from tiercache.kv import moving
from tiercache.kv.comparing import Comparing
from tiercache.kv.layout import Span
from tiercache.kv.stretch import lead
from tiercache.model import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future

    from tiercache.core import BlockTicket
    from tiercache.kv.store import KvStore
    from tiercache.kv.stretch import Stretch
    from tiercache.kv.workers import Steps
    from tiercache.model import Terms

SAVE_S_MAX = 120.0
"""What is not stored by then is given up."""
GATHER_BYTES = 32 << 20
"""A turn of copying: some milliseconds, so that a cancellation or a load waits no longer than that."""
FIRST_BYTES = 8 << 20
"""Blocks of the first join, which nothing is gathered beside."""
JOIN_BYTES = 32 << 20
"""Blocks of one join; three may be open at a time."""
JOIN_BLOCKS = 1024
COMMITS_MAX = 2
"""Turns whose digests the owner may be checking while the next one is gathered."""
RETRIES = {Outcome.BUSY: 4, Outcome.FULL: 3}
"""Rounds without any progress before a block is given up, each after twice the wait of the one before."""
RETRY_S = 0.005


@dataclass(slots=True, eq=False)
class Batch:
    """One join: its blocks, and what is under way."""

    span: range
    ticket: BlockTicket
    claims: list[int]
    """Parts that were this ticket's to write, an item: those of the ticket go as they land."""
    taken: list[int] = field(default_factory=list)
    """Blocks that this ticket serves: written by it, or there already."""
    commits: deque[tuple[Future[list[Outcome]], list[int]]] = field(default_factory=deque)
    """Each with the block of every row."""
    bad: dict[int, Outcome] = field(default_factory=dict)


class Saving:
    """One save under way. Forgetting about it is allowed: it ends by itself, and gives back what it holds.

    `outcomes[i]` belongs to block `start + i`, and is final once `done`: HIT (this rank's share is stored), MISS (given
    up), BUSY (somebody else is writing it, or the cache had no time), FULL (no room, or the block before it is not
    stored; not durable, where that was asked for), CORRUPT (bytes changed between copy and commit).
    """

    def __init__(self, store: KvStore, stretch: Stretch, terms: Terms, *, durable: bool) -> None:
        """See KvStore.save. `begin` starts it."""
        if durable and not store.core.durable:
            raise ConfigError("durable=True needs an SSD tier: set ssd_bytes, or save without it")
        self.outcomes = [Outcome.BUSY] * len(stretch.span)
        self.moved_bytes = 0
        """Bytes copied out of engine memory so far."""
        self.differs: dict[int, int] = {}
        """Block -> map of the parts in which this rank's bytes differ from what another rank of these heads stored."""
        self._store, self._stretch, self._terms, self._durable = store, stretch, terms, durable
        self._share = store.holder.share(stretch.layout)
        self._comparing = Comparing(store, stretch, self.differs) if store.holder.replicas > 1 else None
        self._asked: tuple[range, Future[BlockTicket]] | None = None
        self._open: deque[Batch] = deque()
        self._unacknowledged: deque[tuple[Future[list[Outcome]], Batch]] = deque()
        self._left: dict[int, Outcome] = {}  # blocks that nothing came of in this round
        self._undecided = set(stretch.span)
        self._pages = threading.Event()
        self._began = store.core.clock.monotonic()
        self._work = store.workers.make(self._steps(), self._settle, urgent=False, deadline_s=SAVE_S_MAX)

    def begin(self, *, inline: bool = False) -> Saving:
        """Starts it, or does it here and now."""
        (self._store.workers.run if inline else self._store.workers.start)(self._work)
        return self

    @property
    def done(self) -> bool:
        """Whether all is decided; never waits."""
        return self._work.ended.is_set()

    def wait(self, timeout_s: float) -> list[Outcome]:
        """The outcomes, at the latest after `timeout_s`: what is not decided by then reads BUSY, and goes on."""
        self._work.ended.wait(timeout_s)
        return list(self.outcomes)

    def pages_free(self, timeout_s: float) -> bool:
        """Whether the engine may have its pages back, waiting at most `timeout_s` for it. Also after a fault or a
        cancellation True means that nothing reads them any more."""
        return self._pages.wait(timeout_s)

    def cancel(self) -> None:
        """Gives up what is not stored. When it returns nothing reads the engine's pages any more."""
        self._store.workers.cancel(self._work)
        self._pages.set()

    # -- in the store's threads ----------------------------------------------------------------------------------------

    def _steps(self) -> Steps:
        todo, rounds, wait_s = list(self._stretch.span), 0, RETRY_S
        while todo:
            before, self._left = len(todo), {}
            yield from self._round(todo)
            rounds, wait_s = (rounds + 1, 2 * wait_s) if len(self._left) == before else (0, RETRY_S)
            todo = []
            for block, outcome in sorted(self._left.items()):
                if rounds <= RETRIES[outcome]:
                    todo.append(block)
                else:
                    self._decide(block, outcome)
            if todo:
                yield from self._acknowledged()  # what is durable makes room
                yield wait_s
        self._pages.set()
        yield from self._acknowledged()

    def _round(self, todo: list[int]) -> Steps:
        """Every block once; what came to nothing is in `_left` then."""
        spans = deque(self._spans(todo))
        self._ask(spans.popleft())
        while self._asked is not None:
            span, future = self._asked
            yield future
            self._asked = None
            batch = self._begin(span, future)
            if spans:
                self._ask(spans.popleft())
            if batch is not None:
                yield from self._store_batch(batch)
            if len(self._open) > 1:
                yield from self._finish(self._open.popleft())
            if self._left.get(span[-1]) is Outcome.FULL and self._stretch.layout.rule.span is not Span.STATE:
                for each in spans:  # below it nothing has a place
                    self._left.update(dict.fromkeys(each, Outcome.FULL))
                spans.clear()
        while self._open:
            yield from self._finish(self._open.popleft())

    def _spans(self, todo: list[int]) -> Iterator[range]:
        """The blocks of each join."""
        layout, at, size = self._stretch.layout, 0, FIRST_BYTES
        while at < len(todo):
            most = max(1, min(JOIN_BLOCKS, size // layout.block_bytes))
            if layout.rule.span is Span.STATE:
                most = 1  # each on its own: see Stretch.parent
            span = lead(todo[at : at + most], most)
            yield span
            at, size = at + len(span), JOIN_BYTES

    def _ask(self, span: range) -> None:
        """Asks for a join."""
        layout, (parts, pieces) = self._stretch.layout, self._share
        keys, parent = self._stretch.of_blocks(span), self._stretch.parent(span.start)

        def join() -> BlockTicket:
            return self._store.core.join_blocks(
                keys, layout.block_bytes, layout.part_bytes, parts, pieces, self._terms, parent=parent
            )

        self._asked = span, self._store.workers.ask(join)

    def _begin(self, span: range, joined: Future[BlockTicket]) -> Batch | None:
        """A batch that was joined; None where the owner has gone."""
        try:
            ticket = joined.result(0)
        except UnavailableError:
            self._left.update(dict.fromkeys(span, Outcome.BUSY))
            return None
        batch = Batch(span, ticket, list(ticket.claims))
        self._open.append(batch)
        for block, outcome in zip(span, ticket.outcomes, strict=True):
            if outcome is Outcome.HIT:
                batch.taken.append(block)
            else:
                self._left[block] = outcome if outcome in RETRIES else Outcome.BUSY
        return batch

    def _store_batch(self, batch: Batch) -> Steps:
        """Gathers what is this rank's to write of a batch."""
        try:
            yield from self._gathered(batch)
            if self._comparing is not None:  # while the owner hashes what was gathered
                yield from self._comparing.digest(batch, self._work)
        except UnavailableError:
            self._lose(batch)

    def _gathered(self, batch: Batch) -> Steps:
        """Copies granted parts and pieces to their places, in turns."""
        span, ticket = batch.span, batch.ticket
        turns: dict[tuple[int, tuple[tuple[int, int], ...]], list[int]] = {}
        for block in batch.taken:
            item = block - span.start
            if ticket.claims[item] or ticket.pieces[item]:
                turns.setdefault((ticket.claims[item], tuple(ticket.pieces[item])), []).append(block)
        for (parts, pieces), blocks in turns.items():
            each = self._bytes_of(parts, pieces)
            most = max(1, GATHER_BYTES // each)
            for at in range(0, len(blocks), most):
                some = blocks[at : at + most]
                with ticket.writing(), self._work.fence:  # waiting for an owner holds nobody up
                    rows = moving.gather_digested(
                        self._stretch.planes,
                        self._stretch.table,
                        some,
                        [ticket.buffers(block - span.start) for block in some],
                        parts=parts,
                        pieces=pieces,
                    )
                self.moved_bytes += each * len(some)
                self._commit(batch, some, parts, pieces, rows)
                yield None
                while len(batch.commits) > COMMITS_MAX:
                    yield from self._landed(batch)

    def _commit(
        self,
        batch: Batch,
        blocks: list[int],
        parts: int,
        pieces: tuple[tuple[int, int], ...],
        rows: list[moving.Digests],
    ) -> None:
        first = batch.span.start
        landed = [(block - first, parts, row.row) for block, row in zip(blocks, rows, strict=True) if parts]
        extra = [
            (block - first, start, stop, digest)
            for block, row in zip(blocks, rows, strict=True)
            for (start, stop), digest in zip(pieces, row.pieces, strict=True)
        ]
        whose = [first + one[0] for one in landed] + [first + one[0] for one in extra]
        batch.commits.append((batch.ticket.commit_soon(landed, extra), whose))

    def _landed(self, batch: Batch) -> Steps:
        """Waits for the oldest commit of a batch."""
        future, whose = batch.commits.popleft()
        yield future
        for block, outcome in zip(whose, future.result(0), strict=True):
            if outcome is not Outcome.HIT and batch.bad.get(block) is not Outcome.CORRUPT:
                batch.bad[block] = outcome

    def _finish(self, batch: Batch) -> Steps:
        """Waits for what was committed, compares with the other replicas, and gives the ticket back."""
        try:
            while batch.commits:
                yield from self._landed(batch)
            if self._comparing is not None:
                yield from self._comparing.compare(batch, self._work)
            if self._durable:
                future = asyncio.run_coroutine_threadsafe(batch.ticket.saved(), self._store.loop)
                self._unacknowledged.append((future, batch))
                self._retry(batch)
                return
        except UnavailableError:
            self._lose(batch)
        self._retry(batch)
        for block in batch.taken:
            if block not in self._left:
                self._decide(block, batch.bad.get(block, Outcome.HIT))
        batch.ticket.end()

    def _acknowledged(self) -> Steps:
        """Durable saves: waits for the SSD."""
        while self._unacknowledged:
            future, batch = self._unacknowledged.popleft()
            try:
                yield future
                found = future.result(0)
            except UnavailableError:
                found = [Outcome.FULL] * len(batch.span)
            finally:
                future.cancel()
                batch.ticket.end()
            for block in batch.taken:
                if block not in self._left:
                    self._decide(block, batch.bad.get(block, found[block - batch.span.start]))

    def _retry(self, batch: Batch) -> None:
        """Claims that went away (another owner has the memory now) are asked for anew."""
        for block in batch.taken:
            if batch.bad.get(block) not in (None, Outcome.CORRUPT):
                self._left[block] = Outcome.BUSY

    def _lose(self, batch: Batch) -> None:
        """The owner has gone: what it has not confirmed is joined anew."""
        batch.commits.clear()
        batch.ticket.end()
        self._left.update(dict.fromkeys(batch.taken, Outcome.BUSY))
        batch.taken.clear()

    def _decide(self, block: int, outcome: Outcome) -> None:
        self.outcomes[block - self._stretch.span.start] = outcome
        self._undecided.discard(block)

    def _bytes_of(self, parts: int, pieces: tuple[tuple[int, int], ...]) -> int:
        layout = self._stretch.layout
        spans = [layout.part_span(part) for part in range(layout.parts) if parts >> part & 1]
        return max(1, sum(stop - start for start, stop in [*spans, *pieces]))

    def _settle(self) -> None:
        """The end, however it came about: nobody reads engine memory, nothing of the cache is held."""
        self._pages.set()
        for block in list(self._undecided):
            self._decide(block, Outcome.MISS)
        for batch in [*self._open, *(one for _, one in self._unacknowledged)]:
            batch.ticket.end()
        if self._asked is not None and not self._asked[1].cancel():
            self._asked[1].add_done_callback(_give_back)
        self._open.clear()
        self._unacknowledged.clear()
        metrics, stored = self._store.core.metrics, self.outcomes.count(Outcome.HIT)
        metrics.add_all(
            [
                ("tiercache_kv_saved_blocks_total", stored, "", ""),
                ("tiercache_kv_saved_bytes_total", self.moved_bytes, "", ""),
            ]
        )
        if stored < len(self.outcomes):
            metrics.add("tiercache_kv_failed_blocks_total", len(self.outcomes) - stored, operation="save")
        metrics.observe("tiercache_kv_seconds", self._store.core.clock.monotonic() - self._began, operation="save")


def _give_back(joined: Future[BlockTicket]) -> None:
    """Nobody waits for this join any more."""
    if not joined.cancelled() and joined.exception() is None:
        joined.result().end()
