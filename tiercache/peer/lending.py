"""Lending: what one peer has of this cache: pinned until it says that the bytes have come, or is gone.

A pin is given once, by a number; what is pinned for all peers together has a limit, beyond which whoever asks waits,
and then gets less. Bytes are read by the other end itself, or pushed to where it says.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Protocol

from tiercache.errors import AbandonedLoad, ProtocolError, UnavailableError
from tiercache.model import Outcome
from tiercache.peer.exposing import Map
from tiercache.peer.frames import LATER, NOT_THERE, Held, Item
from tiercache.peer.gate import patience_s
from tiercache.transport import Move

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence, Set

    from tiercache.buffers import Buffer
    from tiercache.lease import Lease
    from tiercache.model import Name, Payload
    from tiercache.peer.exposing import Exposed, Memory
    from tiercache.peer.frames import Pushing
    from tiercache.transport import Link

log = logging.getLogger(__name__)

PINS_MAX = 1024
"""Pins of one peer."""
SHARES = 2
"""One peer may pin so many-th of what all may: others still get something when it says nothing any more."""
PUSH_BYTES_MAX = 256 << 20
"""Bytes of one stream."""


class Loan(Protocol):
    """Entries that are pinned; see cache/peering.py."""

    @property
    def lease(self) -> Lease:
        """Their pin."""
        ...

    @property
    def payloads(self) -> Sequence[Payload | None]:
        """What each of them is; None where it is not there."""
        ...

    @property
    def later(self) -> Set[int]:
        """Which of these are there, and had no room."""
        ...


class Lender(Protocol):
    """The cache that lends."""

    async def lend(self, names: Sequence[Name], parts: Sequence[int], reserve: Callable[[int], int]) -> Loan:
        """See Peering."""
        ...

    @property
    def memories(self) -> Sequence[Memory]:
        """Memory files so far; more may come."""
        ...


class Quota:
    """What may be pinned for all peers together. On the loop."""

    def __init__(self, room_bytes: int, above: Quota | None = None) -> None:
        """What one peer has of it is part of the quota `above`."""
        self.room_bytes, self.used_bytes, self._above = room_bytes, 0, above
        self._freed = asyncio.Event()

    def take(self, size: int) -> None:
        """So much is pinned."""
        self.used_bytes += size
        if self._above is not None:
            self._above.take(size)

    def free(self, size: int) -> None:
        """So much is pinned no more."""
        self.used_bytes -= size
        self._freed.set()
        self._freed = asyncio.Event()
        if self._above is not None:
            self._above.free(size)

    @property
    def free_bytes(self) -> int:
        """What may be pinned beyond what is."""
        free = max(0, self.room_bytes - self.used_bytes)
        return free if self._above is None else min(free, self._above.free_bytes)

    async def wait(self, deadline_s: float) -> None:
        """Returns when something is pinned no more, by whomever, or after the deadline."""
        if self._above is not None:
            await self._above.wait(deadline_s)
            return
        try:
            async with asyncio.timeout(deadline_s):
                await self._freed.wait()
        except TimeoutError:
            return


class Share:
    """What one loan has of the quota."""

    def __init__(self, quota: Quota) -> None:
        self._quota, self.size = quota, 0

    def take(self, size: int) -> int:
        """So many more bytes, as far as there is room: how many."""
        size = min(size, self._quota.free_bytes)
        self._quota.take(size)
        self.size += size
        return size

    def give(self) -> None:
        """All of it is free again. Idempotent."""
        size, self.size = self.size, 0
        self._quota.free(size)


class _Pin:
    """One loan that a peer has."""

    def __init__(self, loan: Loan, items: list[Item], sources: list[Buffer | None], share: Share) -> None:
        self.loan, self.items, self.sources, self.share = loan, items, sources, share
        self.pushing = 0
        self.over = False


class Lending:
    """See the module; of one peer. On the cache's loop."""

    def __init__(self, lender: Lender, quota: Quota, exposed: Exposed, introduce: Callable[[int, bytes], None]) -> None:
        """`introduce` tells the peer of memory: its number, and what it needs to reach it."""
        self._lender, self._exposed, self._introduce = lender, exposed, introduce
        self._quota = Quota(quota.room_bytes // SHARES, quota)
        self._pins: dict[int, _Pin] = {}
        self._next = self._pushing_bytes = 0
        self._told: set[int] = set()
        self._ended = False

    async def lend(self, names: Sequence[Name], parts: Sequence[int], deadline_s: float) -> Held:
        """Pins what is here of these, as far as the quota goes."""
        if not self._quota.free_bytes:
            await self._quota.wait(deadline_s)
        share = Share(self._quota)
        try:
            loan = await self._lender.lend(names, parts, share.take)
        except BaseException:
            share.give()
            raise
        return await self.pin(loan, share)

    async def pin(self, loan: Loan, share: Share) -> Held:
        """Makes a loan the peer's: its from now on, until `done`. Also where this raises, it is given back."""
        try:
            memories = Map.of(self._lender.memories)
            items: list[Item] = []
            sources: list[Buffer | None] = []
            for i, payload in enumerate(loan.payloads):
                item, source = LATER if i in loan.later else NOT_THERE, None
                if payload is not None:
                    source = loan.lease.buffer(i)
                    there = memories.place(source)
                    if there is not None:
                        memory, place = there
                        await self._tell(memory)
                        item = Item(payload, place)
                items.append(item)
                sources.append(source)
            if self._ended or len(self._pins) >= PINS_MAX:
                raise UnavailableError("this peer has too much pinned, or is gone")
        except BaseException:
            loan.lease.release()
            share.give()
            raise
        self._next += 1
        self._pins[self._next] = _Pin(loan, items, sources, share)
        return Held(self._next, items)

    async def _tell(self, memory: Memory) -> None:
        """Tells the peer of memory, once. By a message of its own, which no answer that fails or is late takes along,
        and which is there before whatever speaks of it."""
        if memory.ordinal not in self._told:
            descriptor = await self._exposed.descriptor(memory)
            if memory.ordinal not in self._told:
                self._introduce(memory.ordinal, descriptor)
                self._told.add(memory.ordinal)

    async def push(
        self, pin: int, link: Link, region: int, offset: int, pieces: Sequence[Pushing], deadline_s: float
    ) -> Outcome:
        """Writes pieces of what is pinned one after the other to the peer's memory, as one stream."""
        held = self._pins.get(pin)
        if held is None:
            return Outcome.GONE
        sources = [self._piece(held, one) for one in pieces]
        size = sum(one.length for one in sources)
        if size > PUSH_BYTES_MAX:
            raise ProtocolError(f"a stream of more than {PUSH_BYTES_MAX} bytes")
        held.pushing += 1
        self._pushing_bytes += size
        over = self._pushed(held)
        try:
            deadline_s += patience_s(self._pushing_bytes)  # they share the link
            return (await link.write([Move(region, offset, sources)], deadline_s))[0]
        except AbandonedLoad as gone:
            if gone.writing is not None and not gone.writing.done():  # it may still be read from
                gone.writing.add_done_callback(over)
                over = _nothing
            raise
        finally:
            self._pushing_bytes -= size
            over()

    def _pushed(self, held: _Pin) -> Callable[..., None]:
        def over(_: object = None) -> None:
            held.pushing -= 1
            self._free(held)

        return over

    def _piece(self, held: _Pin, piece: Pushing) -> Buffer:
        if piece.item >= len(held.items) or (source := held.sources[piece.item]) is None:
            raise ProtocolError(f"item {piece.item} is not pinned")
        payload = held.items[piece.item].payload
        if payload is None or piece.stop > payload.size:
            raise ProtocolError(f"bytes {piece.start} to {piece.stop} are not those of item {piece.item}")
        return source.slice(piece.start, piece.stop - piece.start)

    def done(self, pin: int) -> None:
        """The peer wants it no more. Unknown numbers are ignored."""
        held = self._pins.pop(pin, None)
        if held is not None:
            held.over = True
            self._free(held)

    def _free(self, held: _Pin) -> None:
        if held.over and not held.pushing:
            held.loan.lease.release()
            held.share.give()

    def end(self) -> None:
        """The peer is gone, and its links are closed: what it had is free."""
        self._ended = True
        for pin in list(self._pins):
            self.done(pin)

    @property
    def pinned_bytes(self) -> int:
        """Bytes pinned for this peer."""
        return sum(one.share.size for one in self._pins.values())


def _nothing() -> None:
    """Somebody else ends it."""
