"""Blocks that several writers fill together: claims on parts, commits, and what of a chain is where.

Rules. A part is written by one living ticket at a time, whole or in pieces, and never once it is present: its bytes do
not change any more. A block can be read from its first landed part on, through look-ups that say which parts they want.
A ticket pins the slots of its blocks, and with them their extents, until it ends; then what it had claimed and not
committed may be claimed anew, and a block of which nothing landed vanishes. Pieces that landed wait for the rest of
their part beyond the end of their ticket, as long as the block keeps its extent.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

import numpy as np

from tiercache.cache.joint import BlockTicket, Fill
from tiercache.cache.tiers import whole
from tiercache.errors import ClosedError, ConfigError
from tiercache.index import Reservation
from tiercache.lease import Lease, check_blocks
from tiercache.model import ALIGN_BYTES, Form, Name, Outcome, State, TierId
from tiercache.threads import submit

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence
    from concurrent.futures import Future
    from typing import Any

    import numpy.typing as npt

    from tiercache.cache.recovery import Recovery
    from tiercache.cache.storing import Storing
    from tiercache.cache.tiers import Tiers
    from tiercache.flight import Flights
    from tiercache.index import Match
    from tiercache.model import Terms

    Pieces = Sequence[tuple[int, int]]

ALL = (1 << 64) - 1
STEP_BLOCKS = 32
"""Blocks that are joined, shown or given back in one go: no lock is held for longer than some 0.5 ms."""
WAITING_MAX = 1 << 16
"""Blocks with pieces of parts that no living ticket fills which are remembered."""


class Beyond(Protocol):
    """What has blocks that no local tier has."""

    def probe(self, digests: Sequence[bytes]) -> bytes:
        """One byte for each of these blocks, from the first on, as far as it has them with all of their parts: 3 for
        the remote tier, 4 for a peer; any thread, without waiting."""
        ...

    async def bring(self, digests: Sequence[bytes], parts: int) -> None:
        """Puts what it has of them into the cache, as far as that can be done in time. Never raises. On the loop."""
        ...


class Blocks:
    """See the module. Any thread, except for the coroutines: those run on the cache's loop.

    One lock guards all fills, and is held while extents are found, so that of two writers who come at once the second
    joins what the first began. Claims are given under the lock of loads, too: nothing is loaded into a claimed part.
    """

    def __init__(
        self,
        tiers: Tiers,
        recovery: Recovery,
        storing: Storing,
        flights: Flights,
        *,
        stored: Callable[[npt.NDArray[np.int64]], None],
        flush: Callable[[], Awaitable[object]],
        lease: Callable[[Match, list[int], None, str], Awaitable[Lease]],
    ) -> None:
        """`stored` hears of slots of which the SSD may lack parts; `flush` returns when all in memory is durable;
        `lease` brings parts of what was matched to memory."""
        self.tiers, self.stored, self.flush, self.matched = tiers, stored, flush, lease
        self._recovery, self._storing, self._flights = recovery, storing, flights
        self.lock = threading.Lock()
        self._fills: dict[int, Fill] = {}  # slot -> what is being filled there
        self._waiting: dict[int, None] = {}  # slots among them with pieces, and without a living ticket
        self._frozen: frozenset[int] = frozenset()
        self._worker: ThreadPoolExecutor | None = None
        self._closed = False
        self.beyond: Beyond | None = None
        """Where blocks may be that no local tier has."""

    # -- look-ups ------------------------------------------------------------------------------------------------------

    def probe(self, digests: Sequence[bytes] | bytes, parts: int, width: int = 0, *, touch: bool = False) -> bytes:
        """See Core.probe_chain. Digests as a list, or joined, of this `width`."""
        tiers = self.tiers
        now_s = tiers.clock.wall() if tiers.expiries else 0
        ssd = tiers.ssd_readable
        found = tiers.index.chains.probe(digests, parts, ssd=ssd, now_s=now_s, width=width, touch=touch)
        if self.beyond is None:
            return found
        if isinstance(digests, bytes):
            digests = [digests[at : at + width] for at in range(len(found) * width, len(digests), width)]
        else:
            digests = digests[len(found) :]
        return found + self.beyond.probe(digests) if digests else found

    def resident(self, digests: Sequence[bytes], parts: int) -> Lease | None:
        """See Core.lease_blocks_resident."""
        tiers = self.tiers
        found = tiers.index.chains.match_resident(digests, parts, tiers.clock.wall() if tiers.expiries else 0)
        if found is None:
            return None
        match, places = found
        tiers.metrics.add("tiercache_hits_total", len(places), tier="memory", kind="block")
        sizes = tiers.index.sizes(match.slots).astype(np.int64)  # of thousands, and an owner asks
        held = int((-(-np.maximum(sizes, 1) // ALIGN_BYTES) * ALIGN_BYTES).sum())
        return Lease([Outcome.HIT] * len(places), places.tolist(), tiers.memory, tiers.end_of(match), held)

    async def lease(self, digests: Sequence[bytes], parts: int) -> Lease:
        """See Core.lease_blocks."""
        lease = self.resident(digests, parts)
        if lease is not None:
            return lease
        await self._recovery.find([Name(digest) for digest in digests])
        if self.beyond is not None:
            known = len(self.tiers.index.chains.probe(digests, parts, ssd=self.tiers.ssd_readable))
            if known < len(digests):
                await self.bring(digests[known:], parts)
        match = self.tiers.index.chains.match(digests)
        facts = self.tiers.index.facts(match.slots)
        wanted = whole(facts.size, facts.part_bytes) & np.uint64(parts & (1 << 64) - 1)
        return await self.matched(match, wanted.tolist(), None, "block")

    async def bring(self, digests: Sequence[bytes], parts: int) -> None:
        """Blocks, or lone entries, that only others have come here, as far as that can be done in time."""
        if self.beyond is not None:
            await self.beyond.bring(digests, parts)

    def taken(self, slot: int, location: int) -> int:
        """Parts of this slot, in this extent, that nobody but a ticket may write. Takes no lock."""
        if location in self._frozen and self.tiers.index.forms(np.array([slot]))[0] == Form.BLOCK:
            return ALL  # nor a ticket, so far
        fill = self._fills.get(slot)
        return fill.taken if fill is not None and fill.location == location else 0

    # -- joining -------------------------------------------------------------------------------------------------------

    def join(
        self,
        digests: Sequence[bytes],
        size: int,
        part_bytes: int,
        claim: int,
        pieces: Pieces,
        terms: Terms,
        *,
        parent: bytes,
    ) -> BlockTicket:
        """See Core.join_blocks."""
        check_blocks(size, part_bytes, claim, pieces)
        if len({len(one) for one in (*digests, *((parent,) if parent else ()))}) > 1:
            raise ConfigError("the digests of a chain are of one width: 16 or 32 bytes")
        if len(set(digests)) < len(digests):
            raise ConfigError("these digests are no chain: one stands there twice")
        ticket = BlockTicket(self, Reservation(_NONE, np.zeros(0, bool), None), size, part_bytes)
        try:
            step = max(1, STEP_BLOCKS // max(1, len(pieces)))
            for at in range(0, len(digests), step):
                some = digests[at : at + step]
                ticket.absorb(self._join_some(some, (size, part_bytes), (claim, pieces), terms, parent))
                parent = some[-1]
        except BaseException:
            ticket.end()
            raise
        return ticket

    def _join_some(
        self, digests: Sequence[bytes], shape: tuple[int, int], ask: tuple[int, Pieces], terms: Terms, parent: bytes
    ) -> BlockTicket:
        """A ticket for a few blocks below `parent`."""
        index, names, (size, part_bytes) = self.tiers.index, [Name(digest) for digest in digests], shape
        if not any(ask):  # to compare alone: nothing is begun
            match = index.chains.match(digests)
            return BlockTicket(self, Reservation(match.slots, np.zeros(len(names), bool), match.pin), size, part_bytes)
        self._storing.prepare(names, [size], terms)
        with self.lock:
            reservation = index.reserve_chain(
                digests,
                size,
                part_bytes,
                width=len(digests[0]),
                parent=parent or None,
                kind=terms.kind,
                scope=terms.scope,
                cost_s=terms.cost_s,
                expiry_s=terms.expiry_s,
            )
            ticket = BlockTicket(self, reservation, size, part_bytes)
            found: list[Fill | None] = [None] * len(names)
            try:
                self._find_extents(ticket, reservation, names, found, ask)
                with self._flights.lock:
                    here = index.facts(ticket.slots).memory_parts.tolist()  # a load may just have landed
                    for item, fill in enumerate(found):
                        if fill is not None:
                            ticket.present[item] |= here[item]
                            self._grant(ticket, item, fill, ask)
            except BaseException:
                unused = [fill for fill in found if fill is not None and not fill.tickets]
                self._end(ticket, reservation, range(len(names)), unused)
                raise
        return ticket

    def _find_extents(
        self,
        ticket: BlockTicket,
        reservation: Reservation,
        names: Sequence[Name],
        found: list[Fill | None],
        ask: tuple[int, Pieces],
    ) -> None:
        """Finds the fill of every block that lacks something; else its outcome. The lock is held."""
        tiers, fresh = self.tiers, reservation.fresh
        facts = tiers.index.facts(ticket.slots)
        ssd = facts.ssd_parts if tiers.ssd_readable else np.zeros_like(facts.ssd_parts)
        ticket.present = (facts.memory_parts | ssd).tolist()
        rows = zip(
            ticket.slots.tolist(), facts.state.tolist(), facts.size.tolist(), facts.part_bytes.tolist(),
            facts.memory_location.tolist(), strict=True,
        )  # fmt: skip
        wanting: list[int] = []
        for item, (slot, state, size, part_bytes, location) in enumerate(rows):
            fill = self._fills.get(slot)
            if fill is not None and fill.placed and fill.location != location:
                del self._fills[slot]  # the block lost the extent that was being filled
                self._waiting.pop(slot, None)
                fill = None
            if slot <= 0:
                ticket.outcomes[item] = Outcome.FULL
            elif (size, part_bytes) != (ticket.size, ticket.part_bytes) or (
                fill is None and not fresh[item] and state < State.RESIDENT
            ):
                ticket.outcomes[item], ticket.present[item] = Outcome.BUSY, 0
            elif not _lacks(ticket.present[item], part_bytes, *ask):
                continue
            elif fill is not None or (not fresh[item] and location >= 0):
                found[item] = fill or Fill(slot, location, placed=True)
            else:
                wanting.append(item)
        if wanting:
            self._take_extents(ticket, fresh, names, found, wanting)

    def _take_extents(
        self,
        ticket: BlockTicket,
        fresh: npt.NDArray[np.bool_],
        names: Sequence[Name],
        found: list[Fill | None],
        items: list[int],
    ) -> None:
        """New extents, for blocks that have none in memory."""
        tiers, count = self.tiers, len(items)
        some = [names[item] for item in items]
        places = tiers.reserve(some, [ticket.size] * count, [ticket.part_bytes] * count)
        housed = [(item, place) for item, place in zip(items, places, strict=True) if place >= 0]
        tiers.describe(ticket.slots[[item for item, _ in housed]], [place for _, place in housed])
        for item, place in housed:
            slot = int(ticket.slots[item])
            if not fresh[item] and tiers.index.place_few([slot], TierId.MEMORY, [place], [0]):
                # On the SSD, and somebody brought parts from there just now: into the same extent with the rest.
                tiers.memory.free([place])
                place = tiers.index.memory_locations([slot])[0]
            found[item] = Fill(slot, place, placed=not fresh[item])
        late = [item for item, place in zip(items, places, strict=True) if place < 0]
        for item in late:
            ticket.outcomes[item] = Outcome.FULL
        unfilled = [int(ticket.slots[item]) for item in late if fresh[item]]
        if unfilled:
            tiers.index.abandon(np.array(unfilled, np.int64))

    def _grant(self, ticket: BlockTicket, item: int, fill: Fill, ask: tuple[int, Pieces]) -> None:
        """Claims what can be claimed of a block that lacks something. Both locks are held."""
        there, (claim, pieces) = ticket.present[item], ask
        if fill.location in self._frozen:  # somebody of before may still be writing what is not there
            ticket.outcomes[item] = Outcome.BUSY
            return
        loading = self._flights.loading(fill.slot)
        granted, refused = fill.claim(claim & ~there & ~loading)
        refused |= bool(claim & loading & ~there)
        some: list[tuple[int, int]] = []
        for start, stop in pieces:
            part = start // ticket.part_bytes
            if there >> part & 1:
                continue
            got = False if loading >> part & 1 else fill.claim_piece(part, start, stop)
            if got:
                some.append((start, stop))
            refused |= got is False
        if not granted and not some and (fill.placed or fill.tickets):
            ticket.outcomes[item] = Outcome.BUSY if refused else Outcome.HIT
            return
        ticket.claims[item], ticket.pieces[item], ticket.fills[item] = granted, some, fill
        self._fills[fill.slot] = fill
        self._waiting.pop(fill.slot, None)
        fill.tickets += 1

    # -- landing -------------------------------------------------------------------------------------------------------

    def land(self, rows: Sequence[tuple[Fill, int, bytes]]) -> list[bool]:
        """Parts lie in their extents with these digests: shows them. False where the block has lost its extent."""
        shown: list[bool] = []
        for at in range(0, len(rows), STEP_BLOCKS):
            shown += self._land_some(rows[at : at + STEP_BLOCKS])
        return shown

    def _land_some(self, rows: Sequence[tuple[Fill, int, bytes]]) -> list[bool]:
        memory, index = self.tiers.memory, self.tiers.index
        with self.lock:
            locations = [fill.location for fill, _, _ in rows]
            memory.commit(locations, [parts for _, parts, _ in rows], [digests for _, _, digests in rows])
            first: dict[int, tuple[Fill, int]] = {}
            rest: list[tuple[Fill, int]] = []
            for fill, parts, _ in rows:
                if fill.placed or fill.slot in first:
                    rest.append((fill, parts))
                else:
                    first[fill.slot] = fill, parts
            if first:
                places = [fill.location for fill, _ in first.values()]
                lost = index.place_few(list(first), TierId.MEMORY, places, [parts for _, parts in first.values()])
                for fill, _ in first.values():
                    fill.placed = fill.location not in lost
            if rest:
                index.add_parts(
                    [fill.slot for fill, _ in rest],
                    TierId.MEMORY,
                    [parts for _, parts in rest],
                    [fill.location for fill, _ in rest],
                )
            homes = index.memory_locations([fill.slot for fill, _, _ in rows])
        return [home == location for home, location in zip(homes, locations, strict=True)]

    def note_stored(self, fills: Iterable[Fill], *, ended: bool = False) -> None:
        """Lets the SSD have what is whole, or (`ended`) what nobody fills any more: so it is mostly written once."""
        slots = sorted({fill.slot for fill in fills if fill.placed})
        if not slots:
            return
        rows = np.array(slots, np.int64)
        facts = self.tiers.index.facts(rows)
        ready = (facts.memory_parts != 0) if ended else facts.memory_parts == whole(facts.size, facts.part_bytes)
        if ready.any():
            self.stored(rows[ready])

    # -- ending --------------------------------------------------------------------------------------------------------

    def end(self, ticket: BlockTicket, reservation: Reservation, items: range) -> None:
        """Gives up what a ticket claims of these items, which are those of one reservation; see the module."""
        with self.lock:
            left = self._end(ticket, reservation, items)
        self.note_stored(left, ended=True)
        outcomes = ticket.outcomes[items.start : items.stop]
        self.tiers.metrics.add_all(
            [
                ("tiercache_puts_total", outcomes.count(Outcome.HIT), "", "block"),
                ("tiercache_full_total", outcomes.count(Outcome.FULL), "memory", ""),
            ]
        )

    def _end(
        self, ticket: BlockTicket, reservation: Reservation, items: range, unused: Sequence[Fill] = ()
    ) -> list[Fill]:
        """Answers fills that nobody is at any more, and of which something landed; `unused` never came to be. The lock
        is held."""
        tiers, index = self.tiers, self.tiers.index
        left: list[Fill] = []
        gone = list(unused)
        for item in items:
            fill = ticket.fills[item]
            if fill is None:
                continue
            fill.give_up(ticket.claims[item], ticket.pieces[item], ticket.part_bytes)
            ticket.claims[item], ticket.pieces[item], ticket.fills[item] = 0, [], None
            fill.tickets -= 1
            if not fill.tickets:
                (left if self._left(fill) else gone).append(fill)
        if homeless := [fill for fill in gone if not fill.placed]:
            tiers.memory.free([fill.location for fill in homeless])
            index.abandon(np.array(sorted(fill.slot for fill in homeless), np.int64))
        tiers.release(reservation)
        placed = [fill.slot for fill in reversed(gone) if fill.placed]  # children before their parents
        if placed:  # nothing came into these extents
            empty = [slot for slot, look in zip(placed, index.look(placed), strict=True) if not look.memory_parts]
            if empty:
                freed = index.unplace(empty, TierId.MEMORY).locations.tolist()
                tiers.memory.free([location for location in freed if location >= 0])
        return left

    def _left(self, fill: Fill) -> bool:
        """What becomes of a fill without a ticket: False where nothing of it is worth its extent."""
        index, slot = self.tiers.index, fill.slot
        if fill.landed and not fill.placed:  # its pieces wait, in a block without parts so far
            fill.placed = not index.place_few([slot], TierId.MEMORY, [fill.location], [0])
        current = self._fills.get(slot) is fill
        if fill.landed and fill.placed and current:
            self._waiting[slot] = None
            while len(self._waiting) > WAITING_MAX:
                oldest = next(iter(self._waiting))
                del self._waiting[oldest], self._fills[oldest]
            return True
        if current:
            del self._fills[slot]
            self._waiting.pop(slot, None)
        return fill.placed and bool(index.look([slot])[0].memory_parts)

    # -- the rest ------------------------------------------------------------------------------------------------------

    def freeze(self, locations: Iterable[int]) -> None:
        """Until `thaw` nothing is written into these extents: a process that lives may still do so on behalf of an
        owner that died."""
        with self.lock:
            self._frozen |= frozenset(locations)

    def thaw(self) -> None:
        """Nobody of before writes any more."""
        with self.lock:
            self._frozen = frozenset()

    def soon(self, work: Callable[[], Any]) -> Future[Any]:
        """Runs work in a thread of its own, in order."""
        with self.lock:
            if self._closed:
                raise ClosedError("this cache was closed: open it again with tiercache.open(...)")
            if self._worker is None:
                self._worker = ThreadPoolExecutor(1, "tiercache-commit")
            worker = self._worker
        return submit(worker, work)

    def close(self) -> None:
        """Ends that thread, after what was given to it."""
        with self.lock:
            self._closed = True
        if self._worker is not None:
            self._worker.shutdown()


_NONE = np.empty(0, np.int64)


def _lacks(there: int, part_bytes: int, claim: int, pieces: Pieces) -> bool:
    """Whether any of this is not there."""
    return bool(claim & ~there) or any(not there >> start // part_bytes & 1 for start, _ in pieces)
