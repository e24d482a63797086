"""Borrowing: brings what peers have pinned for this cache to where it belongs, and checks every part of it.

Two ways. *Direct*: every run of parts is read from the peer's memory straight into its extent. *Stream*: the peer
writes many runs one after the other into a landing slot here, and they are scattered from there, hashed on their way
(RecvScatter of P/D-Serve, arXiv 2408.08147, section 3.5): one message for many pieces, for links that write faster than
they read, and for small pieces. What `pick_way` takes was measured: bench/transport_stream.py.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, NamedTuple

from tiercache.buffers import Buffer, copy_verified, many_digests, runs, same_digests
from tiercache.errors import AbandonedLoad, UnavailableError
from tiercache.model import Outcome
from tiercache.peer.frames import Op, Pushing, outcome, pack_push, unpack_number
from tiercache.peer.gate import Priority, patience_s
from tiercache.threads import in_thread
from tiercache.transport import MOVE_BYTES_MAX, Move

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence

    from tiercache.model import Name, Payload
    from tiercache.peer.frames import Held, Item
    from tiercache.peer.gate import Gate
    from tiercache.peer.meeting import Peer

OFFERED_S = 600.0
"""So long what was offered waits for its turn: as long as whoever published it."""
STREAM_BYTES_MAX = 256 << 10
"""Runs up to this go as a stream also where reading is the faster way."""


RUNS_MAX = 1 << 15
"""Runs of one stream, or of one read."""


class Run(NamedTuple):
    """Parts of one entry that lie one after the other: where they go, and bytes [start, stop) of the entry."""

    at: int
    """Place in the batch."""
    item: int
    """Place among what is pinned."""
    first: int
    last: int
    start: int
    stop: int


def runs_of(wanted: Sequence[Payload], items: Sequence[int]) -> list[Run]:
    """What is wanted as runs of parts, in order."""
    found = []
    for at, (one, item) in enumerate(zip(wanted, items, strict=True)):
        for first, last in runs(one.parts):
            found.append(Run(at, item, first, last, first * one.part_bytes, min(one.size, last * one.part_bytes)))
    return found


def cut(found: Sequence[Run], wanted: Sequence[Payload], bytes_max: int) -> Iterator[list[Run]]:
    """Streams of at most so many bytes and RUNS_MAX runs each, cut between parts; a part that is larger than that is
    left out."""
    stream: list[Run] = []
    room = bytes_max
    for run in found:
        step = wanted[run.at].part_bytes
        while run.start < run.stop:
            fit = min(room, run.stop - run.start)
            parts = run.last - run.first if fit == run.stop - run.start else fit // step
            if not parts or len(stream) >= RUNS_MAX:
                if not stream:
                    break
                yield stream
                stream, room = [], bytes_max
                continue
            stop = min(run.stop, run.start + parts * step)
            stream.append(run._replace(last=run.first + parts, stop=stop))
            room -= stop - run.start
            run = run._replace(first=run.first + parts, start=stop)
    if stream:
        yield stream


class _Batch(NamedTuple):
    """What one read is about: entry i has target i."""

    wanted: Sequence[Payload]
    targets: Sequence[Buffer]
    digests: Sequence[bytes]
    outcomes: list[Outcome]
    """HIT as long as all of it that has come is what it should be."""
    faults: list[UnavailableError]
    """Why some of it did not come."""

    def miss(self, runs: Sequence[Run]) -> None:
        """These did not come."""
        for run in runs:
            self.outcomes[run.at] = min(self.outcomes[run.at], Outcome.MISS)


class Borrowed:
    """What one peer has pinned for this cache. On the loop."""

    def __init__(self, peer: Peer, held: Held, gate: Gate, priority: Priority, deadline_s: float) -> None:
        self._peer, self._gate, self._priority, self._deadline_s = peer, gate, priority, deadline_s
        self._pin = held.pin
        self._items: dict[Name, tuple[int, Item]] = {
            item.payload.name: (i, item) for i, item in enumerate(held.items) if item.payload is not None
        }
        self._over = False
        self.lacking: list[Name] = []
        """What was asked for and is not there at all."""

    @property
    def payloads(self) -> list[Payload]:
        """What is there."""
        return [item.payload for _, item in self._items.values() if item.payload is not None]

    async def read(self, wanted: Sequence[Payload], targets: Sequence[Buffer]) -> list[tuple[Outcome, bytes]]:
        """See bringing.Found. `wanted` are entries of `payloads`, with the parts that are wanted of each."""
        if self._over:
            raise UnavailableError("what the peer had pinned was given back")
        meant = [self._items[one.name][1].payload for one in wanted]
        digests = [one.digests if one is not None else b"" for one in meant]
        found = runs_of(wanted, [self._items[one.name][0] for one in wanted])
        batch = _Batch(wanted, targets, digests, [Outcome.HIT] * len(wanted), [])
        longest, most = max((run.stop - run.start for run in found), default=0), self._peer.landing.slot_bytes
        bring = self._stream if self._peer.link.pushes or longest <= STREAM_BYTES_MAX else self._read
        small = [run for run in found if wanted[run.at].part_bytes <= most]
        large = [run for run in found if wanted[run.at].part_bytes > most]  # no slot takes a part of these
        batch.miss([run for run in large if wanted[run.at].part_bytes > MOVE_BYTES_MAX])
        try:
            async with asyncio.TaskGroup() as group:  # so that some are hashed while others come
                for some in cut(small, wanted, most):
                    group.create_task(self._try(bring, batch, some))
                for some in cut(large, wanted, min(MOVE_BYTES_MAX, max([one.part_bytes for one in wanted], default=1))):
                    group.create_task(self._try(self._read, batch, some))
        except ExceptionGroup as faults:
            raise _one_of(faults) from None
        if batch.faults and Outcome.HIT not in batch.outcomes:
            raise batch.faults[0]
        size = sum(run.stop - run.start for run in found if batch.outcomes[run.at] is Outcome.HIT)
        damaged = [one.name for one, came in zip(wanted, batch.outcomes, strict=True) if came is Outcome.CORRUPT]
        self._peer.count(size, damaged)
        return list(zip(batch.outcomes, digests, strict=True))

    async def _try(self, bring: Callable[[_Batch, list[Run]], Awaitable[None]], batch: _Batch, runs: list[Run]) -> None:
        """What has come before a peer was lost is not lost with it."""
        try:
            await bring(batch, runs)
        except AbandonedLoad:
            raise
        except UnavailableError as fault:
            batch.miss(runs)
            batch.faults.append(fault)

    async def _stream(self, batch: _Batch, runs: list[Run]) -> None:
        """Has the peer write these one after the other into a slot, and scatters them from there."""
        peer, size = self._peer, sum(run.stop - run.start for run in runs)
        async with self._admitted(size, peer.landing.slot_bytes):
            slot = peer.landing.take()
            try:
                pieces = [Pushing(run.item, run.start, run.stop) for run in runs]
                body = pack_push(self._pin, 0, slot * peer.landing.slot_bytes, pieces)
                answer = await peer.channel.ask(Op.PUSH, body, self._deadline(size))
                if outcome(-unpack_number(answer.body)) is Outcome.HIT:
                    await in_thread(self._scatter, batch, slot, runs)
                else:
                    batch.miss(runs)
            finally:
                peer.landing.give(slot)

    def _scatter(self, batch: _Batch, slot: int, runs: list[Run]) -> None:
        """Copies runs from the slot to their places, and compares the digests of what was copied."""
        landed = self._peer.landing.buffer(slot)
        at = landed.address
        for run in runs:
            one = batch.wanted[run.at]
            parts = (1 << run.last) - (1 << run.first)
            # As if the whole entry lay there: only these parts of it are touched.
            source = Buffer(at - run.start, one.size, landed.owner)
            if not copy_verified(source, batch.targets[run.at], one.part_bytes, parts, batch.digests[run.at]):
                batch.outcomes[run.at] = Outcome.CORRUPT
            at += run.stop - run.start

    async def _read(self, batch: _Batch, runs: list[Run]) -> None:
        """Reads these from the peer's memory to their places, and compares the digests of what lies there then."""
        size = sum(run.stop - run.start for run in runs)
        moves = []
        for run in runs:
            place = self._items[batch.wanted[run.at].name][1].place
            target = batch.targets[run.at].slice(run.start, run.stop - run.start)
            moves.append(Move(self._peer.region(place.region), place.offset + run.start, [target]))
        async with self._admitted(size):
            outcomes = await self._peer.read(moves, self._deadline(size))
        batch.miss([run for run, one in zip(runs, outcomes, strict=True) if one is not Outcome.HIT])
        there = [run for run, one in zip(runs, outcomes, strict=True) if one is Outcome.HIT]
        masks = [(1 << run.last) - (1 << run.first) for run in there]
        rows = [
            (batch.targets[run.at], batch.wanted[run.at].part_bytes, mask)
            for run, mask in zip(there, masks, strict=True)
        ]
        for run, mask, row in zip(there, masks, await in_thread(many_digests, rows), strict=True):
            if not same_digests(row, batch.digests[run.at], mask):
                batch.outcomes[run.at] = Outcome.CORRUPT

    @asynccontextmanager
    async def _admitted(self, size: int, takes: int = 0) -> AsyncIterator[None]:
        """Through the gate: whoever reads waits there for what is ahead at a slow link's rate, and then goes without,
        for no rate or crowd may make the cache slower than none. What was offered has the time that its offerer has."""
        reads = self._priority is Priority.READ
        wait_s = self._deadline_s + patience_s(self._gate.ahead_bytes) if reads else OFFERED_S
        async with AsyncExitStack() as held:
            try:
                async with asyncio.timeout(wait_s):
                    await held.enter_async_context(self._gate.admit(size, self._priority, takes))
            except TimeoutError:
                raise UnavailableError(f"what comes from peers was full for {wait_s:.1f} s") from None
            yield

    def _deadline(self, size: int) -> float:
        """For one of several that share a link: all of them may be as far when the last byte of the first comes."""
        return self._deadline_s + patience_s(max(size, self._gate.used_bytes))

    def end(self) -> None:
        """The peer need not hold it any longer. Idempotent."""
        if not self._over:
            self._over = True
            self._peer.forgive(self._pin)


def _one_of(faults: ExceptionGroup) -> Exception:
    """The fault that stands for all of these: nobody else may have the targets as long as any of them is written to."""
    writing = [one.writing for one in faults.exceptions if isinstance(one, AbandonedLoad) and one.writing is not None]
    if not writing:
        return faults.exceptions[0]
    if len(writing) == 1:
        return AbandonedLoad(str(faults.exceptions[0]), writing[0])
    over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    left = set(writing)

    def ended(one: asyncio.Future[None]) -> None:
        left.discard(one)
        if not left and not over.done():
            over.set_result(None)

    for one in writing:
        one.add_done_callback(ended)
    return AbandonedLoad(str(faults.exceptions[0]), over)
