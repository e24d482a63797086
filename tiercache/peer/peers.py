"""Peers: all other caches as one: who has what, asked for it, offered to them. What a cache stores is announced to all
peers, in batches: look-ups then ask nobody."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from tiercache.errors import ProtocolError, TierCacheError, UnavailableError
from tiercache.lease import extent_bytes
from tiercache.model import Name, Outcome
from tiercache.peer.exposing import Landing
from tiercache.peer.frames import ITEMS_MAX, MARKS_MAX, Op, pack_marks
from tiercache.peer.gate import Gate, Priority
from tiercache.peer.lending import Quota, Share
from tiercache.peer.view import View, mark

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Sequence

    from tiercache.buffers import Buffer
    from tiercache.clock import Clock
    from tiercache.metrics import Metrics
    from tiercache.model import Payload
    from tiercache.peer.borrowing import Borrowed
    from tiercache.peer.exposing import Exposed, Memory
    from tiercache.peer.lending import Loan
    from tiercache.peer.meeting import Peer
    from tiercache.peer.pool import Pool

    Start = Callable[[Coroutine[Any, Any, None], str], object]

log = logging.getLogger(__name__)

LINGER_S = 0.01
"""What is stored is announced so much later, together with what else is."""
SLOTS, SLOT_BYTES, SLOT_BYTES_MIN = 8, 8 << 20, 1 << 20
"""Of the landing memory: what one stream fills."""
ASKS_MAX = 16
"""Questions for entries that are open at a time; each pins something somewhere."""
TAKES_MAX = 2
"""Offers that are taken at a time."""
PUBLISH_S = 600.0
"""A peer may take so long to make room for what was published to it."""
UNANNOUNCED_MAX = 1 << 20
_EVERY = (1 << 64) - 1


class Limits(NamedTuple):
    """What peers may take of this cache, and it of them."""

    landing_bytes: int
    """On their way here, at most."""
    lend_bytes: int
    """Pinned here for peers, at most."""
    rate_bytes_s: float = 0.0
    """Taken from peers on average; 0: as it comes."""
    deadline_s: float = 5.0
    """Who is silent for so long is gone."""
    spill: bool = True
    """Whether what would be lost is offered, and taken where there is room."""


class Host(Protocol):
    """The cache; see cache/peering.py."""

    @property
    def memories(self) -> Sequence[Memory]:
        """See Peering."""
        ...

    @property
    def room_bytes(self) -> int:
        """See Peering."""
        ...

    async def lend(self, names: Sequence[Name], parts: Sequence[int], reserve: Callable[[int], int]) -> Loan:
        """See Peering."""
        ...

    async def take(self, found: Borrowed, *, evict: bool) -> int:
        """See Peering."""
        ...

    def recovered(self) -> Awaitable[None]:
        """See Peering."""
        ...

    def contents(self, after: int) -> tuple[list[Name], int]:
        """See Peering."""
        ...


class Peers:
    """See the module. On the cache's loop, except where a method says otherwise."""

    def __init__(self, pool: Pool, limits: Limits, *, clock: Clock, metrics: Metrics) -> None:
        """`pool` says who is there."""
        self._pool, self._metrics = pool, metrics
        self.deadline_s, self._spills = limits.deadline_s, limits.spill
        slot_bytes = min(SLOT_BYTES, max(SLOT_BYTES_MIN, limits.landing_bytes // SLOTS))
        self.landing = Landing(limits.landing_bytes, slot_bytes)
        self.gate = Gate(limits.landing_bytes, limits.rate_bytes_s, clock)
        self.quota = Quota(limits.lend_bytes)
        self.lender: Host
        self._view = View()
        self._asks, self._takes = asyncio.Semaphore(ASKS_MAX), asyncio.Semaphore(TAKES_MAX)
        self._lending = asyncio.Lock()
        self._fresh: deque[int] = deque(maxlen=UNANNOUNCED_MAX)
        self._announcing = False
        self._loop: asyncio.AbstractEventLoop | None = None

    # -- Near: what the cache calls ------------------------------------------------------------------------------------

    def begin(self, host: Host, start: Start) -> None:
        """Lets peers in, and looks for them."""
        self.lender, self._loop = host, asyncio.get_running_loop()
        start(self._pool.serve(self, self._know), "peers")

    def prefix(self, keys: Sequence[bytes]) -> int:
        """How many of these blocks, from the first on, some peer is believed to have. Any thread."""
        return self._view.prefix(keys)

    def sees(self, names: Sequence[Name]) -> list[bool]:
        """Which of these some peer is believed to have. Any thread."""
        return [bool(one) for one in self._view.who(names)]

    def stored(self, names: Sequence[Name]) -> None:
        """These can be had here now. Any thread."""
        marks = [mark(key, ordinal) for key, ordinal in names]
        self._view.show(marks)
        self._fresh.extend(marks)
        if not self._announcing and self._loop is not None and self._fresh:
            self._announcing = True
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody is told anything any more
                self._loop.call_soon_threadsafe(self._announce_soon)

    def hide(self, names: Sequence[Name]) -> None:
        """These were deleted here: what peers have of them is not looked at, until they are stored here anew."""
        self._view.hide(names)

    async def ask(self, names: Sequence[Name], parts: Sequence[int], priority: Priority = Priority.READ) -> Pinned:
        """What peers have of these (a map of parts for each), pinned there until the end of the answer. What nobody
        seems to have is not asked for; who cannot be asked has nothing."""
        pinned = Pinned(self._asks)
        await self._asks.acquire()
        try:
            async with asyncio.TaskGroup() as group:
                for peer, places in self._whom(names).items():
                    some = [names[i] for i in places]
                    group.create_task(self._want(pinned, peer, some, [parts[i] for i in places], priority))
            pinned.order(names)
        except BaseException:
            pinned.end()
            raise
        return pinned

    def _whom(self, names: Sequence[Name]) -> dict[Peer, list[int]]:
        """Which peers to ask for which of these: as few as may be."""
        who = self._view.who(names)
        counts = {number: sum(one >> number & 1 for one in who) for number in self._pool.peers}
        best = sorted(self._pool.peers, key=lambda number: -counts[number])
        asked: dict[Peer, list[int]] = {}
        for i, one in enumerate(who):
            number = next((number for number in best if one >> number & 1), -1)
            if number >= 0:
                places = asked.setdefault(self._pool.peers[number], [])
                if len(places) < ITEMS_MAX:
                    places.append(i)
        return asked

    async def _want(
        self, pinned: Pinned, peer: Peer, names: Sequence[Name], parts: Sequence[int], priority: Priority
    ) -> None:
        """Adds what one peer pins for this: also where the others take so long that nobody waits for it any more."""
        try:
            found = await peer.want(names, parts, priority)
        except UnavailableError as fault:
            log.debug("%s could not be asked: %s", peer.name, fault)
        except ProtocolError as fault:
            peer.channel.close(str(fault))
        else:
            pinned.add(found)
            self._view.drop(peer.number, found.lacking)

    @property
    def anybody(self) -> bool:
        """Whether any peer is connected. Any thread; who comes later is told of everything."""
        return bool(self._pool.peers)

    @property
    def spare_bytes(self) -> int:
        """What the peer with the most free memory would take of what is about to be lost here."""
        return max([peer.free_bytes for peer in self._pool.peers.values()], default=0) if self._spills else 0

    async def spill(self, loan: Loan) -> int:
        """Offers what is about to be lost here to the peer with the most free memory, of those that have the blocks
        before it: how many it took."""
        offered = [one for one in loan.payloads if one is not None]
        size = sum(extent_bytes(one.size) for one in offered)
        there = self._view.who([one.name for one in offered])
        before = self._view.who([Name(one.parent) for one in offered if one.parent])

        def takes(peer: Peer) -> int:
            """Bytes that it does not have yet."""
            lacks = [one for one, who in zip(offered, there, strict=True) if not who >> peer.number & 1]
            return sum(extent_bytes(one.size) for one in lacks)

        fit = [peer for peer in self._pool.peers.values() if peer.free_bytes >= takes(peer)]
        if not fit:
            return 0
        creditor = max(fit, key=lambda peer: (sum(who >> peer.number & 1 for who in before), peer.free_bytes))
        creditor.free_bytes -= takes(creditor)  # until its next pulse says better
        share = Share(self.quota)
        if share.take(size) < size:
            share.give()
            return 0
        try:
            return await creditor.offer(loan, share, self.deadline_s, urgent=False)
        except (TierCacheError, OSError) as fault:
            log.debug("nothing was spilled to %s: %s", creditor.name, fault)
            return 0

    async def publish(self, names: Sequence[Name], to: str) -> int:
        """Pins these entries until the peer `to` (its id, or name) has taken them, as it finds room: how many it has.
        Raises UnavailableError where there is no such peer, or it does not take them in time."""
        peer = next((one for one in self._pool.peers.values() if to in (one.id, one.name)), None)
        if peer is None:
            raise UnavailableError(f"no peer {to!r} is connected: {', '.join(self.names) or 'none is'}")
        taken, left = 0, list(names)
        while left:
            loan, share, seen = await self._lend_first(left[:ITEMS_MAX])
            taken += await peer.offer(loan, share, PUBLISH_S, urgent=True)
            left = left[seen:]
        return taken

    async def _lend_first(self, names: Sequence[Name]) -> tuple[Loan, Share, int]:
        """Pins the first of these, as many as there is room for, as soon as there is room for one; and of how many that
        is the answer. What is larger than all of the room is left out."""
        async with self._lending:  # or all who wait would wake each other up with what they give back
            while True:
                share = Share(self.quota)
                try:
                    loan = await self.lender.lend(names, [_EVERY] * len(names), share.take)
                except BaseException:
                    share.give()
                    raise
                lent = max((i + 1 for i, one in enumerate(loan.payloads) if one is not None), default=0)
                if lent or not loan.later or self.quota.used_bytes <= share.size:
                    return loan, share, lent or min(loan.later, default=len(names) - 1) + 1
                loan.lease.release()
                share.give()
                await self.quota.wait(PUBLISH_S)

    @property
    def names(self) -> list[str]:
        """Names of the peers that are connected."""
        return [peer.name for peer in self._pool.peers.values()]

    def facts(self) -> list[dict[str, str | int]]:
        """One row a peer, for `tiercache stat`."""
        return [
            {
                "name": peer.name, "id": peer.id, "transport": peer.transport, "negotiated": peer.link.negotiated,
                "free_bytes": peer.free_bytes, "received_bytes": peer.received_bytes,
                "pinned_bytes": peer.lending.pinned_bytes,
            }
            for peer in self._pool.peers.values()
        ]  # fmt: skip

    async def close(self) -> None:
        """Leaves all peers. Idempotent."""
        await self._pool.close()
        self.landing.close()

    # -- House: what each peer needs -----------------------------------------------------------------------------------

    @property
    def room_bytes(self) -> int:
        """What this cache takes without evicting anything."""
        return self.lender.room_bytes if self._spills else 0

    def exposed(self, name: str, peer: Peer) -> Exposed:
        """See House."""
        return self._pool.exposed(name, peer)

    def failed(self, peer: Peer) -> None:
        """See House."""
        self._pool.failed(peer)

    def candidates(self, hello: dict[str, Any]) -> list[str]:
        """See House."""
        return self._pool.candidates(hello)

    def heard(self, peer: Peer, marks: Sequence[int]) -> None:
        """See House."""
        if self._pool.peers.get(peer.number) is peer:
            self._view.add(peer.number, marks)

    async def offered(self, found: Borrowed, priority: Priority) -> int:
        """See House."""
        try:
            if priority is Priority.SPILLED and not self._spills:
                return 0
            async with self._takes:
                return await self.lender.take(found, evict=priority is Priority.PUBLISHED)
        finally:
            found.end()

    def count(self, peer: Peer, size: int, damaged: Sequence[Name]) -> None:
        """See House."""
        self._metrics.add("tiercache_read_bytes_total", size, tier="peer")
        if damaged:
            log.warning("%d entries from %s were damaged on their way", len(damaged), peer.name)
            self._metrics.add("tiercache_corruptions_total", len(damaged), tier="peer")
            self._view.drop(peer.number, damaged)  # nor asked for again

    async def _know(self, peer: Peer) -> None:
        """A peer, from when it is connected until it is gone."""
        telling = asyncio.get_running_loop().create_task(self._tell_all(peer))
        try:
            await peer.live()
        finally:
            telling.cancel()
            for _ in self._view.forget(peer.number):
                await asyncio.sleep(0)

    # -- announcements -------------------------------------------------------------------------------------------------

    def _announce_soon(self) -> None:
        assert self._loop is not None
        self._loop.call_later(LINGER_S, self._announce)

    def _announce(self) -> None:
        self._announcing = False
        marks: list[int] = []
        while self._fresh:
            marks.append(self._fresh.popleft())
        for at in range(0, len(marks), MARKS_MAX):
            body = pack_marks(marks[at : at + MARKS_MAX])
            for peer in list(self._pool.peers.values()):
                with contextlib.suppress(UnavailableError):
                    peer.channel.tell(Op.STORED, body)

    async def _tell_all(self, peer: Peer) -> None:
        """Announces everything that is here to a new peer, a step at a time."""
        after = 0
        await self.lender.recovered()
        with contextlib.suppress(UnavailableError):
            while True:
                names, after = self.lender.contents(after)
                peer.channel.tell(Op.STORED, pack_marks([mark(key, ordinal) for key, ordinal in names]))
                if not after:
                    return
                await peer.channel.flush()  # or a slow peer would be taken for one that takes nothing
                await asyncio.sleep(0)


class Pinned:
    """What several peers have pinned for one question; see bringing.Found."""

    def __init__(self, asks: asyncio.Semaphore) -> None:
        self._asks: asyncio.Semaphore | None = asks
        self._from: dict[Name, Borrowed] = {}
        self._all: list[Borrowed] = []
        self.payloads: list[Payload] = []

    def add(self, found: Borrowed) -> None:
        """One peer's share."""
        self._all.append(found)
        for one in found.payloads:
            if self._from.setdefault(one.name, found) is found:
                self.payloads.append(one)

    def order(self, names: Sequence[Name]) -> None:
        """Puts what was found into the order of the question."""
        places = {name: i for i, name in enumerate(names)}
        self.payloads.sort(key=lambda one: places[one.name])

    async def read(self, wanted: Sequence[Payload], targets: Sequence[Buffer]) -> list[tuple[Outcome, bytes]]:
        """See bringing.Found."""
        answers: list[tuple[Outcome, bytes]] = [(Outcome.MISS, b"")] * len(wanted)
        shares: dict[int, list[int]] = {}
        for i, one in enumerate(wanted):
            shares.setdefault(self._all.index(self._from[one.name]), []).append(i)
        for which, places in shares.items():
            some = await self._all[which].read([wanted[i] for i in places], [targets[i] for i in places])
            for i, answer in zip(places, some, strict=True):
                answers[i] = answer
        return answers

    def end(self) -> None:
        """Nobody reads any more. Idempotent."""
        for found in self._all:
            found.end()
        if self._asks is not None:
            self._asks.release()
            self._asks = None
