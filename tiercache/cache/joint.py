"""One block that several tickets fill, and one such ticket; see blocks.py for the rules."""

from __future__ import annotations

from concurrent.futures import wait
from contextlib import nullcontext
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np

from tiercache.buffers import many_digests, part_digests, same_digests
from tiercache.errors import ClosedError, ConfigError
from tiercache.model import Outcome

if TYPE_CHECKING:
    import threading
    from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
    from concurrent.futures import Future
    from contextlib import AbstractContextManager
    from typing import Any

    import numpy.typing as npt

    from tiercache.buffers import Buffer
    from tiercache.cache.tiers import Tiers
    from tiercache.index import Reservation

    Rows = Sequence[tuple[int, int, bytes]]
    Ranges = Sequence[tuple[int, int, int, int]]


class Fill:
    """A block in memory of which parts are being written. All of it under the lock of Blocks."""

    __slots__ = ("claimed", "landed", "location", "open", "placed", "slot", "tickets")

    def __init__(self, slot: int, location: int, *, placed: bool) -> None:
        self.slot, self.location = slot, location
        self.placed = placed
        """Whether the index has the extent; else it is this fill's, to free."""
        self.claimed = 0
        """Parts that a ticket writes, whole."""
        self.open: dict[int, list[tuple[int, int]]] = {}
        """Part -> pieces of it that tickets write."""
        self.landed: dict[int, list[tuple[int, int, int]]] = {}
        """Part -> pieces of it that lie there, with their xxh3-64."""
        self.tickets = 0

    @property
    def taken(self) -> int:
        """Parts of which something is being written, or lies there and may not be written over."""
        taken = self.claimed
        for part in (*self.open, *self.landed):
            taken |= 1 << part
        return taken

    def claim(self, parts: int) -> tuple[int, bool]:
        """Claims whole parts: which of them, and whether some were somebody else's. Pieces that wait there are
        forgotten, for they will be written over."""
        busy = self.claimed
        for part in self.open:
            busy |= 1 << part
        granted = parts & ~busy
        self.claimed |= granted
        for part in [part for part in self.landed if granted >> part & 1]:
            del self.landed[part]
        return granted, bool(parts & busy)

    def claim_piece(self, part: int, start: int, stop: int) -> bool | None:
        """Claims a piece: None where it lies there already, False where somebody else has some of it. Other pieces that
        lie there are forgotten for it where no ticket lives: a writer who divides the part otherwise (an engine of
        another shape) would wait for their rest for ever."""
        done = self.landed.get(part, [])
        if any(a <= start and stop <= b for a, b, _ in done):
            return None
        if self.claimed >> part & 1 or any(a < stop and start < b for a, b in self.open.get(part, ())):
            return False
        clash = [one for one in done if one[0] < stop and start < one[1]]
        if clash and self.tickets:
            return False
        if clash:
            self.landed[part] = [one for one in done if one not in clash]
            if not self.landed[part]:
                del self.landed[part]
        self.open.setdefault(part, []).append((start, stop))
        return True

    def close_piece(self, part: int, start: int, stop: int) -> None:
        """Nobody writes this piece any more."""
        self.open[part].remove((start, stop))
        if not self.open[part]:
            del self.open[part]

    def give_up(self, parts: int, pieces: Iterable[tuple[int, int]], part_bytes: int) -> None:
        """Nobody writes these parts and pieces any more."""
        self.claimed &= ~parts
        for start, stop in pieces:
            self.close_piece(start // part_bytes, start, stop)

    def cover(self, part: int, start: int, stop: int, digest: int, part_bytes: int) -> list[tuple[int, int, int]]:
        """A claimed piece lies there. Answers all pieces of a part of so many bytes when they cover it: the part is
        claimed then, whole, for whoever completes it."""
        self.close_piece(part, start, stop)
        pieces = self.landed.setdefault(part, [])
        pieces.append((start, stop, digest))
        if sum(b - a for a, b, _ in pieces) < part_bytes:
            return []
        self.claimed |= 1 << part
        return self.landed.pop(part)


class Lands(Protocol):
    """What a ticket needs of Blocks."""

    tiers: Tiers
    lock: threading.Lock
    flush: Callable[[], Awaitable[object]]

    def land(self, rows: Sequence[tuple[Fill, int, bytes]]) -> list[bool]:
        """See Blocks."""
        ...

    def note_stored(self, fills: Iterable[Fill], *, ended: bool = False) -> None:
        """See Blocks."""
        ...

    def end(self, ticket: BlockTicket, reservation: Reservation, items: range) -> None:
        """See Blocks."""
        ...

    def soon(self, work: Callable[[], Any]) -> Future[Any]:
        """See Blocks."""
        ...


class BlockTicket:
    """Implements core.BlockTicket over the memory of this process; `locations` are for an owner's clients."""

    def __init__(self, blocks: Lands, reservation: Reservation, size: int, part_bytes: int) -> None:
        """Owns the reservation; `end` gives it back."""
        self._blocks, self.size, self.part_bytes = blocks, size, part_bytes
        self._steps = [(reservation, range(len(reservation.slots)))]
        self.slots: npt.NDArray[np.int64] = reservation.slots
        count = len(self.slots)
        self.outcomes = [Outcome.HIT] * count
        self.claims = [0] * count
        self.pieces: list[list[tuple[int, int]]] = [[] for _ in range(count)]
        self.present = [0] * count
        self.fills: list[Fill | None] = [None] * count
        self._committed = [0] * count
        self._pending: list[Future[list[Outcome]]] = []
        self._ended = False

    def absorb(self, more: Self) -> None:
        """Takes over a ticket for the blocks that follow, before anything is done with either."""
        count = len(self.slots)
        self._steps += [(held, range(count + some.start, count + some.stop)) for held, some in more._steps]
        more._steps, more._ended = [], True
        self.slots = np.concatenate((self.slots, more.slots))
        self.outcomes += more.outcomes
        self.claims += more.claims
        self.pieces += more.pieces
        self.present += more.present
        self.fills += more.fills
        self._committed += more._committed

    @property
    def locations(self) -> list[int]:
        """Extents to be filled, or -1."""
        rows = zip(self.fills, self.claims, self.pieces, strict=True)
        return [fill.location if fill is not None and (claims or some) else -1 for fill, claims, some in rows]

    def writing(self) -> AbstractContextManager[None]:
        """See core.BlockTicket: nobody else can come to own this memory."""
        return nullcontext()

    def buffers(self, item: int) -> Buffer:
        """See core.BlockTicket."""
        return self._blocks.tiers.memory.buffers([self._fill(item).location])[0]

    def _fill(self, item: int) -> Fill:
        if self._ended:
            raise ClosedError("this ticket has ended: join the blocks again")
        if not 0 <= item < len(self.fills):
            raise ConfigError(f"this ticket has {len(self.fills)} items, not one with number {item}")
        fill = self.fills[item]
        if fill is None:
            raise ConfigError(f"item {item} has nothing to be written: look at `claims` and `pieces` first")
        return fill

    def commit(self, landed: Rows, pieces: Ranges = ()) -> list[Outcome]:
        """See core.BlockTicket."""
        if self._ended:
            raise ClosedError("this ticket has ended: join the blocks again")
        outcomes = [Outcome.MISS] * (len(landed) + len(pieces))
        rows: list[tuple[Fill, int, bytes]] = []
        whose: list[tuple[int, int]] = []
        mine = [(at, fill) for at, one in enumerate(landed) if (fill := self._claimed(*one[:2])) is not None]
        asked = [(self.buffers(landed[at][0]), self.part_bytes, landed[at][1]) for at, _ in mine]
        for (at, fill), found in zip(mine, many_digests(asked), strict=True):
            item, parts, digests = landed[at]
            if self._claimed(item, parts) is None:  # it was named twice, and spoilt the first time
                continue
            if same_digests(found, digests, parts):
                rows.append((fill, parts, found))
                whose.append((at, item))
            else:
                self._spoil(item, fill, parts)
                outcomes[at] = Outcome.CORRUPT
        for at, (item, start, stop, digest) in enumerate(pieces, len(landed)):
            outcomes[at], row = self._land_piece(item, start, stop, digest)
            if row is not None:
                rows.append(row)
                whose.append((at, item))
        if rows:
            self._show(rows, whose, outcomes)
        return outcomes

    def _show(self, rows: list[tuple[Fill, int, bytes]], whose: list[tuple[int, int]], outcomes: list[Outcome]) -> None:
        shown = self._blocks.land(rows)
        with self._blocks.lock:  # for a microsecond a row
            for (fill, parts, _), (at, item), there in zip(rows, whose, shown, strict=True):
                fill.claimed &= ~parts
                self.claims[item] &= ~parts
                outcomes[at] = Outcome.HIT if there else Outcome.MISS
                if there:
                    self._committed[item] |= parts
        self._blocks.note_stored(fill for fill, _, _ in rows)

    def _claimed(self, item: int, parts: int) -> Fill | None:
        """The fill of an item of which this ticket has claimed all these parts."""
        if not 0 <= item < len(self.fills):
            raise ConfigError(f"this ticket has {len(self.fills)} items, not one with number {item}")
        return self.fills[item] if parts and not parts & ~self.claims[item] else None

    def _spoil(self, item: int, fill: Fill, parts: int) -> None:
        """What lies there is not what its writer meant to write: nobody shall have it."""
        with self._blocks.lock:
            fill.claimed &= ~parts
            self.claims[item] &= ~parts
        self._blocks.tiers.metrics.add("tiercache_corruptions_total", 1, tier="memory")

    def _land_piece(
        self, item: int, start: int, stop: int, digest: int
    ) -> tuple[Outcome, tuple[Fill, int, bytes] | None]:
        """Takes a piece; with the part that is covered by it, to be shown."""
        if not 0 <= item < len(self.fills):
            raise ConfigError(f"this ticket has {len(self.fills)} items, not one with number {item}")
        fill = self.fills[item]
        if fill is None or (start, stop) not in self.pieces[item]:
            return Outcome.MISS, None
        part, extent = start // self.part_bytes, self.buffers(item)
        same = _hash(extent, start, stop) == digest
        length = min(self.size, (part + 1) * self.part_bytes) - part * self.part_bytes
        with self._blocks.lock:
            self.pieces[item].remove((start, stop))
            if same:
                together = fill.cover(part, start, stop, digest, length)
            else:
                fill.close_piece(part, start, stop)
        if not same:
            self._blocks.tiers.metrics.add("tiercache_corruptions_total", 1, tier="memory")
            return Outcome.CORRUPT, None
        if not together:
            return Outcome.HIT, None
        rows = part_digests(extent, self.part_bytes, 1 << part)
        if all(_hash(extent, a, b) == wanted for a, b, wanted in together):
            return Outcome.HIT, (fill, 1 << part, rows)
        with self._blocks.lock:  # damaged while they waited: all of the part is to be written again
            fill.claimed &= ~(1 << part)
        self._blocks.tiers.metrics.add("tiercache_corruptions_total", 1, tier="memory")
        return Outcome.CORRUPT, None

    def commit_soon(self, landed: Rows, pieces: Ranges = ()) -> Future[list[Outcome]]:
        """See core.BlockTicket."""
        if self._ended:
            raise ClosedError("this ticket has ended: join the blocks again")
        self._pending = [one for one in self._pending if not one.done()]
        future: Future[list[Outcome]] = self._blocks.soon(lambda: self.commit(landed, pieces))
        self._pending.append(future)
        return future

    def compare(self, rows: Rows) -> list[int]:
        """See core.BlockTicket."""
        if self._ended:
            raise ClosedError("this ticket has ended: join the blocks again")
        tiers = self._blocks.tiers
        for item, _, _ in rows:
            if not 0 <= item < len(self.fills):
                raise ConfigError(f"this ticket has {len(self.fills)} items, not one with number {item}")
        looks = tiers.index.look([int(self.slots[item]) for item, _, _ in rows])
        there = [at for at, look in enumerate(looks) if look.memory_location >= 0 and look.memory_parts]
        stored = tiers.memory.digests([looks[at].memory_location for at in there])
        differs = [0] * len(rows)
        for at, digests in zip(there, stored, strict=True):
            _, parts, mine = rows[at]
            parts &= looks[at].memory_parts
            if parts and not same_digests(digests, mine, parts):
                differs[at] = differing(digests, mine, parts)
        return differs

    async def saved(self) -> list[Outcome]:
        """See core.BlockTicket."""
        tiers = self._blocks.tiers
        if tiers.ssd is None:
            raise ConfigError("saved() needs an SSD: set ssd_bytes, or open the directory when nobody holds it")
        await self._blocks.flush()
        parts = tiers.index.facts(self.slots).ssd_parts.tolist()
        return [
            Outcome.FULL if mine & ~safe else Outcome.HIT for mine, safe in zip(self._committed, parts, strict=True)
        ]

    def end(self) -> None:
        """See core.BlockTicket."""
        for _ in self.ending():
            pass

    def ending(self) -> Iterator[None]:
        """Ends it, a few blocks at a time, the last ones of the chain first. From the first one on it has ended; see
        that all is done."""
        if self._pending and not self._ended:
            wait(self._pending)
        self._ended = True
        while self._steps:
            reservation, items = self._steps.pop()
            self._blocks.end(self, reservation, items)
            yield


def _hash(extent: Buffer, start: int, stop: int) -> int:
    return int.from_bytes(part_digests(extent.slice(start, stop - start), stop - start), "little")


def differing(stored: bytes, meant: bytes, parts: int) -> int:
    """Which of these parts have other digests; those that `meant` does not reach do."""
    rows = [slice(8 * i, 8 * i + 8) for i in range(parts.bit_length())]
    return sum(1 << i for i, row in enumerate(rows) if parts >> i & 1 and stored[row] != meant[row])
