"""Slots and payload rows: the packed columns behind every entry, and the one place where a state changes.

All columns are allocated at full size as zero pages, so that they never grow and never move; a column that a workload
does not write (parents of pages, words of keys of pages) costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tiercache.index.table import RowStack
from tiercache.model import State, TierId

if TYPE_CHECKING:
    import numpy.typing as npt

    I64 = npt.NDArray[np.int64]
    Scalars = npt.ArrayLike

TRANSITIONS: dict[State, frozenset[State]] = {
    State.ABSENT: frozenset({State.PENDING}),
    State.PENDING: frozenset({State.RESIDENT, State.EVICTING}),
    State.RESIDENT: frozenset({State.MOVING, State.EVICTING}),
    State.MOVING: frozenset({State.RESIDENT, State.EVICTING}),
    State.EVICTING: frozenset({State.ABSENT, State.PENDING}),
}
"""What may follow what. EVICTING to PENDING: a hole (its bytes are lost, but it is in use) is filled anew."""

_ALLOWED = np.array([[new in TRANSITIONS[old] for old in State] for new in State])
_ALLOWED_ONE = _ALLOWED.tolist()

PAGE_BIT, WIDE_BIT, DEAD_BIT = 1, 4, 128
"""Bits of the `form` column: of model.Form only PAGE is odd; key of 32 bytes; name no longer in the index."""

TIERS = 2


@dataclass(frozen=True, slots=True)
class SlotFacts:
    """Facts of some slots, gathered: element i of every array is slot i's. A location of -1: no copy in that tier."""

    state: npt.NDArray[np.uint8]
    size: npt.NDArray[np.uint32]
    part_bytes: npt.NDArray[np.uint32]
    cost_s: npt.NDArray[np.float32]
    expiry_s: npt.NDArray[np.uint32]
    scope: npt.NDArray[np.uint16]
    kind: npt.NDArray[np.uint8]
    memory_location: npt.NDArray[np.int64]
    memory_parts: npt.NDArray[np.uint64]
    ssd_location: npt.NDArray[np.int64]
    ssd_parts: npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Shape:
    """What a reservation says of its entries: each an array, one element a name, or a scalar for all."""

    sizes: Scalars
    part_bytes: Scalars
    kind: Scalars = 0
    scope: Scalars = 0
    cost_s: Scalars = 0.0
    expiry_s: Scalars = 0

    @property
    def uniform(self) -> bool:
        """Whether all but the sizes are plain numbers, the same for all names."""
        rest = (self.part_bytes, self.kind, self.scope, self.cost_s, self.expiry_s)
        return all(isinstance(one, int | float) for one in rest)

    def pick(self, at: I64 | slice) -> Shape:
        """The same for some of the names only."""

        def some(column: Scalars) -> Scalars:
            array = np.asarray(column)
            return array[at] if array.ndim else column

        return Shape(
            some(self.sizes), some(self.part_bytes), some(self.kind),
            some(self.scope), some(self.cost_s), some(self.expiry_s),
        )  # fmt: skip


class Slots:
    """Columns of slots (1 to slots_max) and of payload rows; to policies, policy.Columns."""

    def __init__(self, slots_max: int) -> None:
        rows = slots_max + 1
        self.slots_max = slots_max
        self.capacity = rows
        self.rows = RowStack(slots_max)
        self.state = np.zeros(rows, np.uint8)
        self.form = np.zeros(rows, np.uint8)
        self.pin = np.zeros(rows, np.uint16)
        self.where = np.zeros(rows, np.uint8)
        """Bit per tier that has a copy."""
        self.held = np.zeros(rows, np.uint8)
        """Bit per tier: named as a victim, kept only by its children."""
        self.depth = np.zeros(rows, np.int32)
        self.payload = np.zeros(rows, np.int32)
        self.run = np.zeros(rows, np.int32)
        """Pages: row of the page run."""
        self.ident = np.zeros((rows, 2), np.uint64)
        """Lone objects and blocks: the first 16 bytes of the key."""
        self.tail = np.zeros((rows, 2), np.uint64)
        """The other 16, of wide keys."""
        self.parent = np.zeros(rows, np.int32)
        self.kids = np.zeros(rows, np.int32)
        """Blocks: slots whose parent this is."""
        self.memory_kids = np.zeros(rows, np.int32)
        """Those of them with a copy in memory."""
        self.size = np.zeros(rows, np.uint32)
        self.cost_s = np.zeros(rows, np.float32)
        self.expiry_s = np.zeros(rows, np.uint32)
        self.scope = np.zeros(rows, np.uint16)
        self.kind = np.zeros(rows, np.uint8)
        self.form[0] = 255  # so that slot 0 equals no key
        # Payload rows: as many as slots, for now each has one slot.
        self.payload_rows = RowStack(slots_max)
        self.refs = np.zeros(rows, np.int32)
        self.part_bytes = np.zeros(rows, np.uint32)
        self.location = [np.zeros(rows, np.int64) for _ in range(TIERS)]
        self.parts = [np.zeros(rows, np.uint64) for _ in range(TIERS)]
        for column in self.location:  # payload row 0, that of slots not in use, lies nowhere
            column[0] = -1
        self.locations = [column.data for column in self.location]
        self.part_maps = [column.data for column in self.parts]
        self.sizes, self.steps, self.expiries = self.size.data, self.part_bytes.data, self.expiry_s.data
        self.states, self.forms, self.pins = self.state.data, self.form.data, self.pin.data
        self.wheres, self.helds = self.where.data, self.held.data
        self.depths, self.payloads, self.runs = self.depth.data, self.payload.data, self.run.data
        self.parents, self.kid_counts = self.parent.data, self.kids.data
        self.memory_kid_counts = self.memory_kids.data
        self.words, self.tails = self.ident.reshape(-1).data, self.tail.reshape(-1).data
        self.ident_bytes, self.tail_bytes = self.words.cast("B"), self.tails.cast("B")
        self.evicting = 0
        """Slots in state EVICTING: while there are none, a release need not look."""
        self.page_top = self.key_top = self.wide_top = self.block_top = 0
        """Slots below were pages (so wrote `run`), had keys, wide keys, were blocks (so wrote parent and children)."""

    def change(self, slots: I64, new: State) -> None:
        """Every change of state of many slots."""
        old = self.state.take(slots)
        assert _ALLOWED[new].take(old).all(), f"not allowed: {set(old.tolist())} to {new}"
        if new is State.EVICTING:
            self.evicting += len(slots)
        else:
            self.evicting -= int((old == State.EVICTING).sum())
        self.state[slots] = new

    def change_one(self, slot: int, new: State) -> None:
        """Every change of state of one slot."""
        old = self.states[slot]
        assert _ALLOWED_ONE[new][old], f"not allowed: {old} to {new}"
        self.evicting += (new == State.EVICTING) - (old == State.EVICTING)
        self.states[slot] = new

    def take(self, count: int, form: int, shape: Shape) -> I64:
        """New slots (PENDING), each with a payload row of its own; names are the caller's to link."""
        slots = self.rows.take(count)
        payloads = self.payload_rows.take(count)
        self.change(slots, State.PENDING)
        self.form[slots] = form
        self.where[slots] = 0
        self.held[slots] = 0
        self.payload[slots] = payloads
        self.refs[payloads] = 1
        self.reshape(slots, shape)
        for tier in range(TIERS):
            self.location[tier][payloads] = -1
            self.parts[tier][payloads] = 0
        return slots

    def take_one(self, form: int, size: int, shape: Shape) -> int:
        """As `take`, for one slot of `size` bytes; of `shape` the scalars count."""
        slot, row = self.rows.take_one(), self.payload_rows.take_one()
        self.change_one(slot, State.PENDING)
        self.forms[slot] = form
        self.wheres[slot] = self.helds[slot] = 0
        self.payloads[slot] = row
        self.sizes[slot] = size
        self.cost_s[slot], self.scope[slot], self.kind[slot] = shape.cost_s, shape.scope, shape.kind
        self.expiry_s[slot], self.part_bytes[row] = shape.expiry_s, shape.part_bytes
        self.refs[row] = 1
        for tier in range(TIERS):
            self.locations[tier][row] = -1
            self.part_maps[tier][row] = 0
        return slot

    def reshape(self, slots: I64, shape: Shape) -> None:
        """Writes what a reservation says of slots."""
        self.size[slots] = shape.sizes
        self.cost_s[slots] = shape.cost_s
        self.expiry_s[slots] = shape.expiry_s
        self.scope[slots] = shape.scope
        self.kind[slots] = shape.kind
        self.part_bytes[self.payload.take(slots)] = shape.part_bytes

    def facts(self, slots: I64) -> SlotFacts:
        """Gathers; of -1: those of slot 0, which is ABSENT and lies nowhere."""
        slots = np.maximum(slots, 0)
        rows = self.payload.take(slots).astype(np.int64)
        return SlotFacts(
            state=self.state.take(slots),
            size=self.size.take(slots),
            part_bytes=self.part_bytes.take(rows),
            cost_s=self.cost_s.take(slots),
            expiry_s=self.expiry_s.take(slots),
            scope=self.scope.take(slots),
            kind=self.kind.take(slots),
            memory_location=self.location[0].take(rows),
            memory_parts=self.parts[0].take(rows),
            ssd_location=self.location[1].take(rows),
            ssd_parts=self.parts[1].take(rows),
        )

    def unsaved(self) -> I64:
        """See Index.unsaved."""
        top = self.rows.top
        rows = self.payload[:top]
        lacking = self.parts[TierId.MEMORY].take(rows) & ~self.parts[TierId.SSD].take(rows)
        here = (self.where[:top] & (1 << TierId.MEMORY)) != 0
        return np.flatnonzero(here & (lacking != 0) & (self.state[:top] >= State.RESIDENT))

    def sample(self, tier: int, count: int, rng: np.random.Generator) -> I64:
        """See Index.sample."""
        some = rng.integers(1, max(2, self.rows.top), count)
        return np.unique(some[(self.where.take(some) & (1 << tier)) != 0])

    def at(self, tier: int, locations: I64) -> I64:
        """See Index.slots_at."""
        order = np.argsort(locations)
        ordered = np.asarray(locations, np.int64)[order]
        out = np.full(len(ordered), -1, np.int64)
        step = 1 << 16
        for low in range(1, self.rows.top if len(ordered) else 1, step):
            high = min(low + step, self.rows.top)
            here = self.location[tier].take(self.payload[low:high])
            at = np.searchsorted(ordered, here)
            np.minimum(at, len(ordered) - 1, out=at)
            hit = np.flatnonzero((ordered[at] == here) & (self.where[low:high] & (1 << tier) != 0))
            out[order[at[hit]]] = hit + low
        return out

    def memory_bytes(self) -> int:
        """Bytes of all columns up to the highest slot that wrote them."""
        top, rows = self.rows.top, self.payload_rows.top
        total = 29 * top + 40 * rows  # state to payload, size to kind; refs, part_bytes, two locations and part maps
        total += 4 * self.page_top + 16 * self.key_top + 16 * self.wide_top + 12 * self.block_top
        return total + self.rows.memory_bytes() + self.payload_rows.memory_bytes()
