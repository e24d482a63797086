"""The index: look-ups that pin, reservations, and presence of entries in the local tiers, behind one lock.

Every public method takes the lock once, for microseconds. Slots that a caller holds pinned keep their columns, so it
may read those without the lock.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tiercache.index import few
from tiercache.index.chains import Chains
from tiercache.index.check import check
from tiercache.index.entries import Entries
from tiercache.index.load import Loaded, load_chunks
from tiercache.index.names import Query
from tiercache.index.pins import PINS_MAX, Freed, Match, Pin, Reservation, Unplaced
from tiercache.index.reserve import reserve_blocks, reserve_keys, reserve_pages
from tiercache.index.slots import Shape, SlotFacts
from tiercache.model import Name, State, TierId

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tiercache.model import Facts
    from tiercache.policy import Policy

    I64 = npt.NDArray[np.int64]
    Mask = npt.NDArray[np.bool_]
    Scalars = npt.ArrayLike

RESIDENT = int(State.RESIDENT)


class Index:
    """Which entries there are, where their copies lie, who uses them. `policies` are indexed by TierId."""

    def __init__(self, slots_max: int, policies: Sequence[Policy]) -> None:
        self.lock = threading.Lock()
        self.slots_max = slots_max
        self._entries = entries = Entries(slots_max, policies)
        self._slots, self._names = entries.slots, entries.names
        self._pins = 0
        self.chains = Chains(entries, self.lock, self._hold, lambda: self._pins < PINS_MAX)
        self.state, self.pin = self._slots.state, self._slots.pin
        self.depth, self.payload = self._slots.depth, self._slots.payload

    # -- look-up ------------------------------------------------------------------------------------------------------
    def match_chain(self, digests: Sequence[bytes] | bytes, width: int = 16) -> Match:
        """The longest readable prefix of a chain; digests as a list, or joined.

        A prefix that is all in memory is held there by one pin, of its last block, for a copy in memory stays while a
        child has one. Where some blocks are on SSD only, that does not follow, and every block is pinned."""
        query = Query(digests, width)
        slots = self._slots
        with self.lock:
            rows = self._names.walk(query)
            readable = slots.state.take(rows) >= RESIDENT
            if not readable.all():
                rows = rows[: int(readable.argmin())]
            if not len(rows) or self._pins >= PINS_MAX:
                return Match(np.empty(0, np.int64), None)
            if (slots.where.take(rows) & 1).all():
                leaf = int(rows[-1])
                slots.pins[leaf] += 1
                pin = Pin(leaf)
            else:
                slots.pin[rows] += 1
                pin = Pin(rows)
            self._pins += 1
            self._entries.touch(rows)
        return Match(rows, pin)

    def match_pages(self, key: bytes, ordinals: npt.NDArray[np.int32]) -> Match:
        """Pages of one file version; ordinals are unique."""
        wanted = ordinals.astype(np.int64)
        with self.lock:
            return self._match_pages(key, wanted)

    def hit_pages(
        self, key: bytes, ordinals: npt.NDArray[np.int32]
    ) -> tuple[Match, npt.NDArray[np.int64], npt.NDArray[np.uint64]]:
        """match_pages, and where in memory the pages lie (-1: nowhere) with which parts, as of the same moment."""
        wanted = ordinals.astype(np.int64)
        slots = self._slots
        with self.lock:
            match = self._match_pages(key, wanted)
            rows = slots.payload.take(match.slots, mode="clip")  # -1 becomes row 0, which lies nowhere
            return match, slots.location[0].take(rows), slots.parts[0].take(rows)

    def _match_pages(self, key: bytes, ordinals: I64) -> Match:
        """match_pages under the lock."""
        slots = self._slots
        run = self._names.runs.find(key)
        if not run or not len(ordinals) or self._pins >= PINS_MAX:
            return Match(np.full(len(ordinals), -1, np.int64), None)
        rows = self._names.guess_pages(run, ordinals)
        readable = slots.state.take(rows) >= RESIDENT
        if readable.all():
            return Match(rows, self._hold(rows))
        rows[~readable] = -1
        found = rows[readable]
        return Match(rows, self._hold(found) if len(found) else None)

    def _hold(self, rows: I64) -> Pin:
        """Pins distinct slots, and counts them as used."""
        self._slots.pin[rows] += 1
        self._pins += 1
        self._entries.touch(rows)
        return Pin(rows)

    def match(self, names: Sequence[Name]) -> Match:
        """Lone objects, single blocks, and pages of many files, in any order, also twice."""
        find, states = self._names.find, self._slots.states
        rows: list[int] = []
        with self.lock:
            for key, ordinal in names:
                row = find(key, ordinal)
                rows.append(row if states[row] >= RESIDENT else -1)
            distinct = dict.fromkeys(rows)
            distinct.pop(-1, None)
            pin = None
            if distinct and self._pins < PINS_MAX:
                pin = self._hold(np.array(list(distinct), np.int64))
        return Match(np.array(rows, np.int64) if pin else np.full(len(rows), -1, np.int64), pin)

    def hit(self, key: bytes, ordinal: int = 0) -> int:
        """The one-entry path: a pinned slot or -1, without any object. Undo with `release_slot`."""
        with self.lock:
            row = self._names.find(key, ordinal)
            if self._slots.states[row] < RESIDENT or self._pins >= PINS_MAX:
                return -1
            self._slots.pins[row] += 1
            self._pins += 1
            self._entries.touch(row)
            return row

    def hold(self, slots: Sequence[int], *, readable: bool = False) -> Match:
        """Pins again what the caller already holds, for work that outlives the caller's own pin; with `readable`, what
        is so now of slots that nobody holds. Either way they are not used by that."""
        rows = sorted(set(slots))
        with self.lock:
            rows = [row for row in rows if self._slots.states[row] >= RESIDENT] if readable else rows
            for row in rows:
                self._slots.pins[row] += 1
            self._pins += 1
        return Match(np.array(rows, np.int64), Pin(rows, reserved=True))

    def touch_at(self, slots: I64, locations: I64) -> None:
        """Used just now: those of these slots whose copy in memory still lies there."""
        with self.lock:
            self._entries.touch(slots[self._slots.location[0].take(self._slots.payload.take(slots)) == locations])

    def hit_few(self, key: bytes, ordinals: Sequence[int], parts: Sequence[int]) -> tuple[list[int], list[int]] | None:
        """hit_pages for a handful of pages, without arrays: slots, pinned one by one, and their places in memory; None
        unless all of these parts are there. Undo with `release_few`."""
        with self.lock:
            room = self._pins + len(ordinals) <= PINS_MAX
            found = few.hit_few(self._entries, key, ordinals, parts) if room else None
            self._pins += len(ordinals) if found is not None else 0
            return found

    def hit_local(self, key: bytes, ordinals: Sequence[int], parts: Sequence[int]) -> list[int] | None:
        """As `hit_few`, where memory and SSD have these parts together; slots alone."""
        with self.lock:
            room = self._pins + len(ordinals) <= PINS_MAX
            slots = few.hit_local(self._entries, key, ordinals, parts) if room else None
            self._pins += len(slots or ())
            return slots

    def hit_whole(self, names: Sequence[Name]) -> tuple[list[int], list[int]]:
        """Of a few names: slots of those in memory whole, pinned one by one, and for each name its place there or -1.
        Undo with `release_few`."""
        with self.lock:
            room = self._pins + len(names) <= PINS_MAX
            found = few.hit_whole(self._entries, names) if room else ([], [-1] * len(names))
            self._pins += len(found[0])
            return found

    def release_few(self, slots: Sequence[int]) -> Freed | None:
        """Undoes one `hit_few`."""
        with self.lock:
            self._pins -= len(slots)
            return self._entries.let_go(slots)

    def contains(self, names: Sequence[Name]) -> npt.NDArray[np.bool_]:
        """Which names are readable. Pins and touches nothing."""
        find, states = self._names.find, self._slots.states
        with self.lock:
            return np.array([states[find(key, ordinal)] >= RESIDENT for key, ordinal in names], bool)

    def pages_of(self, key: bytes) -> I64:
        """All slots of a file version, in whatever state."""
        with self.lock:
            return self._names.pages_of(key)

    def release(self, *holds: Match | Reservation) -> Freed | None:
        """Unpins. A second release is harmless. Fresh slots that were neither placed nor abandoned are abandoned when
        their last pin goes. Answers locations that were waiting for this: the caller frees them."""
        with self.lock:
            for hold in holds:
                if hold.pin is not None and self._entries.unpin(hold.pin):
                    self._pins -= 1
            return self._entries.drain()

    def release_slot(self, slot: int) -> Freed | None:
        """Undoes one `hit`."""
        return self.release_few((slot,))

    # -- facts --------------------------------------------------------------------------------------------------------
    def facts(self, slots: I64) -> SlotFacts:
        """Facts of slots, pinned for a stable answer; of -1: ABSENT, nowhere, zeros."""
        with self.lock:
            return self._slots.facts(slots)

    def look(self, slots: Sequence[int]) -> list[few.Look]:
        """What a read must know of slots, one by one."""
        with self.lock:
            return few.look(self._slots, slots)

    def memory_locations(self, slots: Sequence[int]) -> list[int]:
        """Where slots lie in memory; -1: nowhere."""
        rows, memory = self._slots.payloads, self._slots.locations[0]
        with self.lock:
            return [memory[rows[slot]] if slot > 0 else -1 for slot in slots]

    def names(self, slots: Sequence[int] | I64) -> list[Name]:
        """Names of slots."""
        with self.lock:
            return [self._names.name(int(slot)) for slot in slots]

    def parents(self, slots: Sequence[int] | I64) -> list[bytes]:
        """Digest of the block before each; empty for what has none."""
        above = self._slots.parents
        with self.lock:
            return [self._names.name(above[slot]).key if above[slot] else b"" for slot in slots]

    def forms(self, slots: I64) -> npt.NDArray[np.uint8]:
        """model.Form of each slot."""
        return self._slots.form.take(slots) & np.uint8(3)

    # -- reservation --------------------------------------------------------------------------------------------------
    def reserve_chain(
        self,
        digests: Sequence[bytes] | bytes,
        sizes: Scalars,
        part_bytes: Scalars,
        *,
        width: int = 16,
        parent: bytes | None = None,
        kind: Scalars = 1,
        scope: Scalars = 0,
        cost_s: Scalars = 0.0,
        expiry_s: Scalars = 0,
    ) -> Reservation:
        """Slots for blocks of a chain, from its start or below the block `parent`, which must be in the index.

        Appending does not walk the chain. Blocks that hang elsewhere (below a removed block) are removed on the way.
        """
        query, shape = Query(digests, width), Shape(sizes, part_bytes, kind, scope, cost_s, expiry_s)
        with self.lock:
            above = self._names.find_key(parent) if parent else 0
            if (parent and not above) or self._pins >= PINS_MAX:
                return _full(query.count)
            return self._reserved(*reserve_blocks(self._entries, query, above, shape))

    def reserve_pages(
        self,
        key: bytes,
        ordinals: npt.NDArray[np.int32],
        sizes: Scalars,
        part_bytes: Scalars,
        *,
        kind: Scalars = 0,
        scope: Scalars = 0,
        cost_s: Scalars = 0.0,
        expiry_s: Scalars = 0,
    ) -> Reservation:
        """Slots for pages of one file version; ordinals are unique."""
        shape, wanted = Shape(sizes, part_bytes, kind, scope, cost_s, expiry_s), ordinals.astype(np.int64)
        with self.lock:
            if self._pins >= PINS_MAX:
                return _full(len(wanted))
            if made := few.reserve_pages(self._entries, key, wanted, shape):
                self._pins += made.pin is not None
                return made
            return self._reserved(*reserve_pages(self._entries, key, wanted, shape))

    def reserve(
        self,
        names: Sequence[Name],
        sizes: Scalars,
        part_bytes: Scalars,
        *,
        kind: Scalars = 2,
        scope: Scalars = 0,
        cost_s: Scalars = 0.0,
        expiry_s: Scalars = 0,
    ) -> Reservation:
        """Slots for lone objects, also twice the same (then only the first is fresh)."""
        shape = Shape(sizes, part_bytes, kind, scope, cost_s, expiry_s)
        with self.lock:
            if self._pins >= PINS_MAX:
                return _full(len(names))
            return self._reserved(*reserve_keys(self._entries, [name.key for name in names], shape))

    def _reserved(self, out: I64, fresh: Mask) -> Reservation:
        """Pins what was reserved, once each, and touches what was there before."""
        if not len(held := out[out > 0]):
            return Reservation(out, fresh, None)
        old = held[~fresh[out > 0]]
        if len(set(held.tolist())) < len(held):
            held = np.unique(held)
        self._slots.pin[held] += 1
        self._pins += 1
        if len(old):
            self._entries.touch(old)
        return Reservation(out, fresh, Pin(held, reserved=True))

    # -- presence -----------------------------------------------------------------------------------------------------
    def place(self, slots: I64, tier: TierId, locations: npt.ArrayLike, parts: npt.ArrayLike) -> list[int]:
        """Copies with these parts exist in a tier now; PENDING slots become readable. Answers locations that were not
        wanted (the slot is gone, or has a copy there already): the caller frees them."""
        slots = np.asarray(slots, np.int64)
        where = np.array(np.broadcast_to(np.asarray(locations, np.int64), slots.shape))
        which = np.array(np.broadcast_to(np.asarray(parts, np.uint64), slots.shape))
        if len(slots) <= few.FEW:
            return self.place_few(slots.tolist(), tier, where.tolist(), which.tolist())
        with self.lock:
            return self._entries.place(slots, tier, where, which)

    def place_few(
        self, slots: Sequence[int], tier: TierId, locations: Sequence[int], parts: Sequence[int]
    ) -> list[int]:
        """As `place`, without arrays."""
        with self.lock:
            unwanted = few.place(self._entries, slots, tier, locations, parts)
            if unwanted is not None:
                return unwanted
            where, which = np.array(locations, np.int64), np.array(parts, np.uint64)
            return self._entries.place(np.array(slots, np.int64), tier, where, which)

    def add_parts(
        self, slots: Sequence[int], tier: TierId, parts: Sequence[int], locations: Sequence[int] | None = None
    ) -> None:
        """More parts of copies are present; with `locations`, of those copies that still are there."""
        with self.lock:
            few.add_parts(self._slots, slots, tier, parts, locations)

    def begin_move(self, slots: I64) -> npt.NDArray[np.bool_]:
        """RESIDENT to MOVING, and pinned: the mask of those for which that was so. They stay readable."""
        columns = self._slots
        with self.lock:
            fit: Mask = columns.state.take(slots) == RESIDENT
            if self._pins >= PINS_MAX:
                fit[:] = False
            moving = slots[fit]
            columns.change(moving, State.MOVING)
            columns.pin[moving] += 1
            self._pins += len(moving)
            return fit

    def end_move(self, slots: I64) -> Freed | None:
        """Undoes begin_move for those that it took. Answers what may be freed, if they were removed meanwhile."""
        columns = self._slots
        with self.lock:
            still = slots[columns.state.take(slots) == State.MOVING]
            columns.change(still, State.RESIDENT)
            self._pins -= len(slots)
            self._entries.unpin(Pin(np.asarray(slots, np.int64)))
            return self._entries.drain()

    def unplace(self, slots: I64 | Sequence[int], tier: TierId, *, forced: bool = False) -> Unplaced:
        """Copies leave a tier, in the order given (leaf first). Refused, and left to the policy as in use: pinned or
        MOVING slots, and copies that children still need. A slot without a copy is gone.

        `forced` (corrupt bytes, a tier that went off): look-ups miss the copy at once, whatever order says; its
        location is answered as -1 while the slot is in use, and comes out of a later `release`.
        """
        with self.lock:
            order = slots.tolist() if isinstance(slots, np.ndarray) else list(slots)
            return self._entries.unplace(order, tier, forced=forced)

    def keep(self, slots: I64, tier: TierId) -> None:
        """Victims that the caller could not do without: the policy may name them again later."""
        bit = 1 << tier
        with self.lock:
            inside = slots[(self._slots.where.take(slots) & bit != 0) & (self._slots.state.take(slots) >= RESIDENT)]
            if len(inside):
                self._entries.policies[tier].keep(inside)

    def remove(self, slots: I64 | Sequence[int]) -> Freed:
        """Deletes: names vanish at once. Answers locations that nobody looks at; the others come with a `release`."""
        with self.lock:
            return self._entries.remove(int(slot) for slot in slots)

    def remove_names(self, names: Sequence[Name], *, expired_by_s: int | None = None) -> tuple[Freed, list[bool]]:
        """remove() by name, in one step and without pins; with `expired_by_s` only what expires by then.
        Answers what may be freed now, and which names went."""
        find, slots = self._names.find, self._slots
        with self.lock:
            rows = [find(key, ordinal) for key, ordinal in names]
            going = [
                slots.states[row] >= RESIDENT and (expired_by_s is None or 0 < int(slots.expiry_s[row]) <= expired_by_s)
                for row in rows
            ]
            return self._entries.remove(row for row, goes in zip(rows, going, strict=True) if goes), going

    def abandon(self, slots: I64) -> None:
        """Fillers give up: PENDING slots go (when their last pin does)."""
        with self.lock:
            self._entries.abandon(np.asarray(slots, np.int64))

    def victims(self, tier: TierId, count: int) -> I64:
        """At most `count` slots that may leave a tier now, in order: the caller must `unplace` or `keep` each."""
        with self.lock:
            return self._entries.victims(tier, count)

    def order(self, slots: I64, tier: TierId) -> npt.NDArray[np.uint32]:
        """The tier's order of last use of slots, to be stored beside them (Payload.tick)."""
        with self.lock:
            return self._entries.policies[tier].order(slots)

    def relocate(self, slots: I64, tier: TierId, old: I64, new: I64) -> npt.NDArray[np.bool_]:
        """Copies moved inside their tier: the mask of slots that still were at the old location and are at the new."""
        column = self._slots.location[tier]
        with self.lock:
            rows, there = self._slots.payload.take(slots), self._slots.where.take(slots) & (1 << tier) != 0
            same: Mask = (column.take(rows) == old) & there
            column[rows[same]] = new[same]
            return same

    def slots_at(self, tier: TierId, locations: I64) -> I64:
        """Which slots have their copy at these locations, -1 = none. Scans, without the lock: a slot that changes
        meanwhile may be missed, so whoever acts on the answer names the location again (relocate does)."""
        return self._slots.at(tier, locations)

    # -- recovery and accounts ----------------------------------------------------------------------------------------
    @property
    def policies(self) -> list[Policy]:
        """The policies, by TierId."""
        return self._entries.policies

    def unsaved(self) -> I64:
        """Readable slots with parts in memory that the SSD lacks, oldest slot number first."""
        # No lock: what was placed before this call is seen, and begin_move judges the rest.
        return self._slots.unsaved()

    def sizes(self, slots: I64) -> npt.NDArray[np.uint32]:
        """Sizes of slots as of about now, without the lock."""
        return self._slots.size.take(slots)

    def locations(self, slots: I64, tier: TierId) -> I64:
        """Locations of slots in a tier, likewise."""
        return self._slots.location[tier].take(self._slots.payload.take(slots))

    def parts(self, slots: I64, tier: TierId) -> npt.NDArray[np.uint64]:
        """Part maps of slots in a tier, likewise."""
        return self._slots.parts[tier].take(self._slots.payload.take(slots))

    def residents(self, tier: TierId) -> I64:
        """All slots with a copy in a tier, as of about now; without the lock."""
        return np.flatnonzero((self._slots.where[: self._slots.rows.top] & (1 << tier)) != 0)

    def sample(self, tier: TierId, count: int, rng: np.random.Generator) -> I64:
        """At most `count` slots with a copy in a tier, drawn at random; fewer in a sparse index."""
        return self._slots.sample(tier, count, rng)

    def load(self, facts: Facts, tier: TierId) -> Loaded:
        """Bulk insert of what a tier found, newest first: of duplicates the first stays. See Loaded."""
        return load_chunks(self._entries, self.lock, facts, tier)

    def validate(self) -> None:
        """Checks every invariant; AssertionError names the broken one."""
        with self.lock:
            check(self._entries)

    @property
    def used(self) -> int:
        """Slots in use."""
        return self._slots.rows.used

    @property
    def pins(self) -> int:
        """Pins outstanding: each match, reservation, hit, and moving slot is one."""
        return self._pins

    def memory_bytes(self) -> int:
        """Bytes of columns and tables that were really used; policies apart."""
        top = self._slots.rows.top
        return self._slots.memory_bytes() + self._names.table.memory_bytes(top) + self._names.runs.memory_bytes()


def _full(count: int) -> Reservation:
    """Nothing could be reserved."""
    return Reservation(np.full(count, -1, np.int64), np.zeros(count, bool), None)
