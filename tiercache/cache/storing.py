"""Storing: puts whole entries into memory, from any thread and without the loop.

A put is a ticket: extents are reserved, filled (here, or by another process that has them mapped), and given up where
they were not filled. An entry is visible when all of its parts are there.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from tiercache.buffers import copy, part_digests, same_digests
from tiercache.cache.tiers import whole
from tiercache.errors import CapacityError, ConfigError
from tiercache.model import Name, Outcome, State, TierId, all_parts, part_bytes_for

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    import numpy.typing as npt

    from tiercache.buffers import Buffer
    from tiercache.cache.recovery import Recovery
    from tiercache.cache.tiers import Tiers
    from tiercache.index import Reservation
    from tiercache.model import Terms

    Slots = npt.NDArray[np.int64]
    Stored = Callable[[Slots], None]
    Save = Callable[[Slots, Sequence[Outcome]], Awaitable[list[Outcome]]]

SCOPE_MAX = 65_535


class Ticket:
    """Entries that are being put: item i belongs to name i. One thread at a time.

    `outcomes[i]` is HIT where the entry is to be filled (`locations[i]` >= 0) or is there already (-1), else why not:
    BUSY where somebody else is storing it, FULL where there was no room.
    """

    def __init__(self, tiers: Tiers, stored: Stored, save: Save, reservation: Reservation) -> None:
        """Owns the reservation; `end` gives it back."""
        self._tiers, self._stored, self._save, self._reservation = tiers, stored, save, reservation
        self.slots: Slots = reservation.slots
        self.outcomes = [Outcome.HIT] * len(self.slots)
        self.locations = [-1] * len(self.slots)
        self._lacking: dict[int, int] = {}  # item -> parts that have not landed
        self._shapes: dict[int, tuple[int, int]] = {}  # item -> size and part size
        self._unplaced: set[int] = set(self.slots[reservation.fresh].tolist())
        self._ended = False

    def place(self, names: Sequence[Name], sizes: Sequence[int], steps: Sequence[int]) -> None:
        """Finds extents for what the reservation made PENDING. The caller ends the ticket if this raises."""
        fresh = np.flatnonzero(self._reservation.fresh).tolist()
        facts = self._tiers.index.facts(self.slots)
        # Blocks that are filled part by part (blocks.py) are readable, and yet not there as a whole.
        there = (facts.memory_parts | facts.ssd_parts) == whole(facts.size, facts.part_bytes)
        there &= facts.state >= State.RESIDENT
        for i in range(len(self.slots)):
            if self.slots[i] < 0:
                self.outcomes[i] = Outcome.FULL
            elif not self._reservation.fresh[i] and not there[i]:
                self.outcomes[i] = Outcome.BUSY
        shapes = [(int(sizes[i]), int(steps[i])) for i in fresh]
        places = self._tiers.reserve([names[i] for i in fresh], [one[0] for one in shapes], [one[1] for one in shapes])
        for i, location, shape in zip(fresh, places, shapes, strict=True):
            if location < 0:
                self.outcomes[i] = Outcome.FULL
                continue
            self.locations[i] = location
            self._shapes[i] = shape
            self._lacking[i] = all_parts(*shape)
        housed = list(self._shapes)
        self._tiers.describe(self.slots[housed], [self.locations[i] for i in housed])

    def fill(self, values: Sequence[Buffer]) -> list[Outcome]:
        """Copies values to where they are to be, digests and shows them."""
        buffers = self._tiers.memory.buffers
        for i, parts in list(self._lacking.items()):
            target = buffers([self.locations[i]])[0]
            copy(values[i], target)
            self._land(i, parts, part_digests(target, self._shapes[i][1], parts))
        hits = [i for i, outcome in enumerate(self.outcomes) if outcome is Outcome.HIT]
        self._stored(np.unique(self.slots[hits]))
        return self.outcomes

    def commit(self, landed: Iterable[tuple[int, int, bytes]]) -> list[Outcome]:
        """Takes (item, parts, digests) that somebody else has written: `digests` are what it means to have written, in
        the Payload layout as far as the last of these parts. They are compared with the bytes: what differs is CORRUPT
        for good. Answers, for every item, HIT if it is visible now, MISS while it lacks parts.
        """
        before = len(self._lacking)
        for item, parts, digests in landed:
            if not 0 <= item < len(self.outcomes):
                raise ConfigError(f"this put has {len(self.outcomes)} items, not one with number {item}")
            if item in self._shapes and parts & ~all_parts(*self._shapes[item]):
                raise ConfigError(f"parts {parts:#x} are not those of item {item}")
            if parts := parts & self._lacking.get(item, 0):
                found = part_digests(
                    self._tiers.memory.buffers([self.locations[item]])[0], self._shapes[item][1], parts
                )
                if same_digests(found, digests, parts):
                    self._land(item, parts, found)
                else:
                    self._spoil(item)
        if len(self._lacking) < before:
            done = [i for i in self._shapes if i not in self._lacking and self.outcomes[i] is Outcome.HIT]
            self._stored(self.slots[done])
        return [Outcome.MISS if i in self._lacking else outcome for i, outcome in enumerate(self.outcomes)]

    async def save(self, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """Waits for the SSD, before the end: of these outcomes, the HITs that are not durable become FULL."""
        return await self._save(self.slots, outcomes)

    def end(self) -> None:
        """Gives up what is not whole: from now on nobody writes to the extents of this ticket. Idempotent."""
        if self._ended:
            return
        self._ended = True
        tiers = self._tiers
        unused = [at for i, at in enumerate(self.locations) if at >= 0 and int(self.slots[i]) in self._unplaced]
        tiers.memory.free(unused)
        if self._unplaced:
            tiers.index.abandon(np.array(sorted(self._unplaced), np.int64))
        tiers.release(self._reservation)
        for i in self._lacking:
            self.outcomes[i] = Outcome.MISS
        tiers.metrics.add_all(
            [
                ("tiercache_puts_total", self.outcomes.count(Outcome.HIT), "", "object"),
                ("tiercache_full_total", self.outcomes.count(Outcome.FULL), "memory", ""),
            ]
        )

    def _land(self, item: int, parts: int, digests: bytes) -> None:
        """Parts are in their extent; the last ones make the entry visible."""
        location, tiers = self.locations[item], self._tiers
        tiers.memory.commit([location], [parts], [digests])
        self._lacking[item] &= ~parts
        if self._lacking[item]:
            return
        del self._lacking[item]
        slots = self.slots[item : item + 1]
        self._unplaced.discard(int(slots[0]))  # from here on the index has the extent, or has given it back
        tiers.place(slots, TierId.MEMORY, [location], [all_parts(*self._shapes[item])])

    def _spoil(self, item: int) -> None:
        """What lies there is not what its writer meant to write: nobody shall have it."""
        self.outcomes[item] = Outcome.CORRUPT
        del self._lacking[item]
        self._tiers.metrics.add("tiercache_corruptions_total", 1, tier="memory")


class Storing:
    """Reserve, copy, digest, commit; what is there already, or on its way, is left alone."""

    def __init__(self, tiers: Tiers, recovery: Recovery, stored: Stored, save: Save) -> None:
        """`stored` hears of slots that are visible now and that the SSD may lack; `save` waits until it has them."""
        self._tiers, self._recovery, self._stored, self._save = tiers, recovery, stored, save

    def put(self, names: Sequence[Name], values: Sequence[Buffer], terms: Terms) -> list[Outcome]:
        """Lone entries; see Cache.store."""
        return self._fill(self.reserve(names, [value.length for value in values], terms), values)

    def put_chain(
        self, digests: Sequence[bytes], values: Sequence[Buffer], terms: Terms, parent: bytes
    ) -> list[Outcome]:
        """Blocks of one chain; see Cache.store_chain."""
        sizes = [value.length for value in values]
        return self._fill(self.reserve_chain([Name(one) for one in digests], sizes, terms, parent), values)

    def _fill(self, ticket: Ticket, values: Sequence[Buffer]) -> list[Outcome]:
        """Whatever happens, nothing stays PENDING."""
        try:
            return ticket.fill(values)
        finally:
            ticket.end()

    def reserve(self, names: Sequence[Name], sizes: Sequence[int], terms: Terms) -> Ticket:
        """Extents for lone entries; any thread."""
        steps = self.prepare(names, sizes, terms)
        reservation = self._tiers.index.reserve(
            names,
            np.array(sizes, np.uint32),
            np.array(steps, np.uint32),
            kind=terms.kind,
            scope=terms.scope,
            cost_s=terms.cost_s,
            expiry_s=terms.expiry_s,
        )
        return self._ticket(reservation, names, sizes, steps)

    def reserve_chain(self, names: Sequence[Name], sizes: Sequence[int], terms: Terms, parent: bytes) -> Ticket:
        """Extents for blocks of one chain, in order; any thread."""
        if not names:
            return self.reserve(names, sizes, terms)
        steps = self.prepare(names, sizes, terms)
        reservation = self._tiers.index.reserve_chain(
            [name.key for name in names],
            np.array(sizes, np.uint32),
            np.array(steps, np.uint32),
            width=len(names[0].key),
            parent=parent or None,
            kind=terms.kind,
            scope=terms.scope,
            cost_s=terms.cost_s,
            expiry_s=terms.expiry_s,
        )
        return self._ticket(reservation, names, sizes, steps)

    def _ticket(
        self, reservation: Reservation, names: Sequence[Name], sizes: Sequence[int], steps: Sequence[int]
    ) -> Ticket:
        ticket = Ticket(self._tiers, self._stored, self._save, reservation)
        try:
            ticket.place(names, sizes, steps)
        except BaseException:
            ticket.end()
            raise
        return ticket

    def prepare(self, names: Sequence[Name], sizes: Sequence[int], terms: Terms) -> list[int]:
        """Part sizes; expired entries of these names make way. Raises where such entries can never be put."""
        most = self._tiers.memory.entry_bytes_max
        if sizes and max(sizes) > most:
            raise CapacityError(
                f"an entry of {max(sizes)} bytes can never fit: memory takes at most {most} in one piece; "
                "split the value, or raise memory_bytes"
            )
        if not 0 <= terms.scope <= SCOPE_MAX:
            raise ConfigError(f"scope must be a whole number from 0 to {SCOPE_MAX}, not {terms.scope!r}")
        if not (math.isfinite(terms.cost_s) and terms.cost_s >= 0):
            raise ConfigError(f"cost_s must be a number of seconds, not {terms.cost_s!r}")
        self._tiers.expiries |= bool(terms.expiry_s)
        self._tiers.purge(names)
        self._tiers.make_slots(len(names))
        self._recovery.revive(names)
        return [part_bytes_for(size) for size in sizes]
