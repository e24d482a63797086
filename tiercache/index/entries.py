"""The life of entries: presence in tiers, pins, who may leave, and what is given back when.

A slot is *in use* while it is pinned or has children. One that loses its name or its last copy while in use waits in
state EVICTING until neither holds; its bytes stay where they are, for a reader may be looking at them. A pin on a
block's slot holds all blocks above it, because each of them has a child.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tiercache.index.names import NameTable
from tiercache.index.pins import Freed, Pin, Unplaced
from tiercache.index.slots import DEAD_BIT, PAGE_BIT, TIERS, Slots
from tiercache.model import Form, State, TierId

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy.typing as npt

    from tiercache.policy import Policy

    I64 = npt.NDArray[np.int64]
    U64 = npt.NDArray[np.uint64]

PENDING, EVICTING, RESIDENT = int(State.PENDING), int(State.EVICTING), int(State.RESIDENT)
REFUSALS_MAX = 65_536
"""Victims a policy may name in vain in one call, before the answer is that all is in use."""
LOOK_MAX = 4096
"""Victims looked at in one go, where those named before were in use."""


class Entries:
    """Everything that happens to entries. Not thread-safe: Index holds its lock around every call."""

    def __init__(self, slots_max: int, policies: Sequence[Policy]) -> None:
        self.slots = Slots(slots_max)
        self.names = NameTable(self.slots)
        self.policies = list(policies)
        for policy in self.policies:
            policy.attach(self.slots)
        self.holding = False
        """Whether any slot was ever held back by its children: until then touches need not clear marks."""
        self._ready: list[list[int]] = [[] for _ in range(TIERS)]
        """Held slots whose children have gone: next in line."""
        self._freed: list[list[int]] = [[] for _ in range(TIERS)]
        self.limbo: dict[int, list[tuple[int, int]]] = {}
        """Copies given up while their slot was in use: (tier, location), freed when it is not. One in memory counts as
        its parent's child there all the while: the pin that keeps it keeps the copies above it, too."""

    # -- use ----------------------------------------------------------------------------------------------------------
    def touch(self, slots: I64 | int) -> None:
        """Used just now."""
        for policy in self.policies:
            policy.touch(slots)
        if self.holding:
            self.slots.held[slots] = 0

    def unpin(self, pin: Pin) -> bool:
        """Undoes a pin; False if it was undone before."""
        held, pin.held = pin.held, None
        if held is None:
            return False
        slots = self.slots
        if isinstance(held, int):
            slots.pins[held] -= 1
            if slots.evicting or self.limbo:
                self.settle(held)
            return True
        if isinstance(held, list):
            self._unpin_few(held, pin.reserved)
            return True
        slots.pin[held] -= 1
        if pin.reserved:
            unfilled = held[(slots.state.take(held) == PENDING) & (slots.pin.take(held) == 0)]
            if len(unfilled):  # its filler has gone without a word
                self.abandon(unfilled)
        if slots.evicting or self.limbo:
            for slot in held[slots.pin.take(held) == 0][::-1].tolist():
                self.settle(slot)
        return True

    def _unpin_few(self, held: list[int], reserved: bool) -> None:
        slots = self.slots
        for slot in held:
            slots.pins[slot] -= 1
        if reserved:
            unfilled = [slot for slot in held if slots.states[slot] == PENDING and not slots.pins[slot]]
            if unfilled:
                self.abandon(np.array(unfilled, np.int64))
        if slots.evicting or self.limbo:
            for slot in reversed(held):
                self.settle(slot)

    def let_go(self, slots: Sequence[int]) -> Freed | None:
        """Undoes pins of single slots."""
        columns = self.slots
        for slot in slots:
            columns.pins[slot] -= 1
        if columns.evicting or self.limbo:
            for slot in slots:
                self.settle(slot)
        return self.drain() if self._freed[0] or self._freed[1] else None

    def drain(self) -> Freed | None:
        """What may be freed since the last call."""
        if not self._freed[0] and not self._freed[1]:
            return None
        freed = Freed(self._freed[0], self._freed[1])
        self._freed = [[] for _ in range(TIERS)]
        return freed

    # -- presence -----------------------------------------------------------------------------------------------------
    def place(
        self, slots: I64, tier: TierId, locations: I64, parts: U64, order: npt.NDArray[np.uint32] | None = None
    ) -> list[int]:
        """See Index.place; with `order`, they were found in the tier and are as old as that says."""
        columns, bit = self.slots, 1 << tier
        where = columns.where.take(slots)
        state = columns.state.take(slots)
        nameless = (columns.form.take(slots) & DEAD_BIT) != 0
        idle = (state == EVICTING) & ~nameless & (columns.pin.take(slots) == 0)
        surplus = np.flatnonzero(((where & bit) != 0) | (state == State.ABSENT) | idle)
        unwanted: list[int] = []
        if len(surplus):
            unwanted = locations[surplus].tolist()
            fine = np.ones(len(slots), bool)
            fine[surplus] = False
            slots, locations, parts = slots[fine], locations[fine], parts[fine]
            state, nameless = state[fine], nameless[fine]
        holes = slots[(state == EVICTING) & ~nameless]
        if len(holes):  # lost their last copy while somebody who holds them brought the next one
            columns.change(holes, State.PENDING)
        rows = columns.payload.take(slots)
        columns.location[tier][rows] = locations
        columns.parts[tier][rows] = parts
        columns.where[slots] |= bit
        if tier == TierId.MEMORY:
            self._count_memory_kids(slots)
        state = columns.state.take(slots)
        pending = slots[state == PENDING]
        if len(pending):
            columns.change(pending, State.RESIDENT)
        live = slots[state != EVICTING]
        if len(live):
            policy = self.policies[tier]
            policy.insert(live, self.names.short_names(live) if policy.wants_names else None, order)
        self._queue_all_held(slots)
        return unwanted

    def inserted(self, slots: I64, tier: TierId) -> None:
        """These got a copy in a tier just now, as `few.place` has noted in the columns."""
        policy = self.policies[tier]
        policy.insert(slots, self.names.short_names(slots) if policy.wants_names else None, None)
        self._queue_all_held(slots)

    def _queue_all_held(self, slots: I64) -> None:
        if self.holding:
            for slot in slots[self.slots.held.take(slots) != 0].tolist():
                self._queue_held(slot)

    def _count_memory_kids(self, slots: I64) -> None:
        """These have a copy in memory now: their parents hear of it."""
        columns = self.slots
        blocks = slots[(columns.form.take(slots) & 3) == Form.BLOCK]
        if len(blocks):
            parents = columns.parent.take(blocks)
            np.add.at(columns.memory_kids, parents[parents > 0], 1)

    def unplace(self, slots: Iterable[int], tier: TierId, *, forced: bool) -> Unplaced:
        """See Index.unplace."""
        columns, bit = self.slots, 1 << tier
        going: list[int] = []
        kept: list[int] = []
        for slot in slots:
            where = columns.wheres[slot]
            if not where & bit or columns.forms[slot] & DEAD_BIT or columns.states[slot] == EVICTING:
                continue
            if not forced:
                if columns.states[slot] != RESIDENT or columns.pins[slot] or self.guarded(slot, tier):
                    kept.append(slot)
                    continue
                if where == bit:
                    self._orphan(slot)
                if tier == TierId.MEMORY:
                    self._leave_memory(slot)
            columns.wheres[slot] = where & ~bit
            going.append(slot)
        gone = np.array(going, np.int64)
        policy = self.policies[tier]
        if going:
            policy.remove(gone, self.names.short_names(gone) if policy.wants_names else None)
            columns.held[gone] &= ~bit & 0xFF
        if kept:
            policy.keep(np.array(kept, np.int64))
            columns.held[kept] &= ~bit & 0xFF
        if forced:
            locations, held = self._lose(going, tier)
            return Unplaced(gone, locations, held)
        return Unplaced(gone, self._leave(gone, tier))

    def guarded(self, slot: int, tier: TierId) -> bool:
        """Whether children keep this copy: any child if it is the last, else one in memory if it is in memory."""
        columns = self.slots
        if columns.forms[slot] & 3 != Form.BLOCK:
            return False
        if tier == TierId.MEMORY and columns.memory_kid_counts[slot]:
            return True
        return columns.wheres[slot] == 1 << tier and columns.kid_counts[slot] > 0

    def _orphan(self, slot: int) -> None:
        """A block will go for good: its parent has a child less."""
        columns = self.slots
        if columns.forms[slot] & 3 == Form.BLOCK and (parent := columns.parents[slot]):
            columns.kid_counts[parent] -= 1
            columns.parents[slot] = 0
            if columns.wheres[slot] & 1:
                columns.memory_kid_counts[parent] -= 1
            self._relieve(parent)

    def _leave_memory(self, slot: int) -> None:
        """A block's copy in memory goes: its parent may follow."""
        columns = self.slots
        if columns.forms[slot] & 3 == Form.BLOCK and (parent := columns.parents[slot]):
            columns.memory_kid_counts[parent] -= 1
            self._relieve(parent)

    def _relieve(self, parent: int) -> None:
        """A parent has a child less: if only that held it back, it is next in line; if it waited to go, it goes."""
        if self._freed_from_child(parent):
            self.settle(parent)

    def _freed_from_child(self, parent: int) -> bool:
        """A parent has a child less: puts it in line where only that held it back, and says whether it waits to go."""
        columns = self.slots
        if columns.helds[parent]:
            self._queue_held(parent)
        return columns.states[parent] == EVICTING or parent in self.limbo

    def _queue_held(self, slot: int) -> None:
        """Puts a held slot next in line where nothing holds it any more."""
        held = self.slots.helds[slot]
        for tier in TierId:
            if held & 1 << tier and not self.guarded(slot, tier):
                self._ready[tier].append(slot)

    def _leave(self, gone: I64, tier: TierId) -> I64:
        """Takes the locations of copies that left in order, and buries slots that have none left."""
        columns = self.slots
        rows = columns.payload.take(gone)
        locations = columns.location[tier].take(rows)
        shared = columns.refs.take(rows) > 1
        if shared.any():
            locations[shared] = -1
        columns.location[tier][rows[~shared]] = -1
        columns.parts[tier][rows[~shared]] = 0
        empty = gone[columns.where.take(gone) == 0]
        for slot in empty.tolist():
            self.names.unlink(slot)
        if len(empty):
            columns.change(empty, State.EVICTING)
            self._bury(empty)
        return locations

    def _lose(self, going: list[int], tier: TierId) -> tuple[I64, list[int]]:
        """Copies are bad or their tier is off: they go at once for look-ups, their space when nobody can be looking
        (those locations are the second answer)."""
        columns = self.slots
        locations = np.full(len(going), -1, np.int64)
        held: list[int] = []
        for i, slot in enumerate(going):
            row = columns.payloads[slot]
            location = int(columns.location[tier][row])
            columns.location[tier][row] = -1
            columns.parts[tier][row] = 0
            if columns.pins[slot] or columns.kid_counts[slot]:
                self.limbo.setdefault(slot, []).append((tier, location))
                held.append(location)
            else:
                locations[i] = location
                if tier == TierId.MEMORY:
                    self._leave_memory(slot)
            if not columns.wheres[slot] and columns.states[slot] >= RESIDENT:
                columns.change_one(slot, State.EVICTING)
                self.settle(slot)
        return locations, held

    # -- leaving for good ---------------------------------------------------------------------------------------------
    def remove(self, slots: Iterable[int]) -> Freed:
        """See Index.remove."""
        held = self.kill(slots)
        freed = self.drain()
        return Freed(freed.memory if freed else [], freed.ssd if freed else [], held)

    def kill(self, slots: Iterable[int]) -> list[int]:
        """Names vanish; what is not in use is buried at once, the rest when it no longer is: answers where that lies
        in memory."""
        columns = self.slots
        doomed = [s for s in dict.fromkeys(slots) if columns.states[s] and not columns.forms[s] & DEAD_BIT]
        array = np.array(doomed, np.int64)
        for tier, policy in enumerate(self.policies):
            inside = array[(columns.where.take(array) & (1 << tier)) != 0]
            if len(inside):
                policy.remove(inside, self.names.short_names(inside) if policy.wants_names else None)
        for slot in doomed:
            self.names.unlink(slot)
            columns.helds[slot] = 0
            if columns.states[slot] != EVICTING:
                columns.change_one(slot, State.EVICTING)
        for slot in reversed(doomed):
            if columns.states[slot] == EVICTING:
                self.settle(slot)
        rows, memory = columns.payloads, columns.locations[0]
        # Another name of the same bytes, if there is one, keeps them readable.
        return [
            memory[rows[slot]]
            for slot in doomed
            if columns.states[slot] == EVICTING and columns.wheres[slot] & 1 and columns.refs[rows[slot]] == 1
        ]

    def abandon(self, slots: I64) -> None:
        """See Index.abandon: PENDING slots go; those with children stay as holes."""
        columns = self.slots
        for slot in slots.tolist()[::-1]:
            if columns.states[slot] != PENDING:
                continue
            columns.change_one(slot, State.EVICTING)
            if not columns.kid_counts[slot] and not columns.forms[slot] & DEAD_BIT:
                self.names.unlink(slot)
            self.settle(slot)

    def settle(self, slot: int) -> None:
        """If a slot is not in use any more, gives up what waited for that; and so upwards in its chain, which may be
        thousands of blocks long."""
        while slot:
            slot = self._settle_one(slot)

    def _settle_one(self, slot: int) -> int:
        """As `settle`, for this slot alone; answers its parent if that waits to go now, else 0."""
        columns = self.slots
        if columns.pins[slot] or columns.kid_counts[slot]:
            return 0
        for tier, location in self.limbo.pop(slot, ()):
            self._freed[tier].append(location)
            if tier == TierId.MEMORY:
                self._leave_memory(slot)
        if columns.states[slot] != EVICTING:
            return 0
        if not columns.forms[slot] & DEAD_BIT:
            self.names.unlink(slot)
        parent = columns.parents[slot] if columns.forms[slot] & 3 == Form.BLOCK else 0
        self._detach(slot, parent)
        self._bury(np.array([slot], np.int64))
        return parent if parent and self._freed_from_child(parent) else 0

    def _detach(self, slot: int, parent: int) -> None:
        """Takes a block from its parent's counts."""
        columns = self.slots
        if parent:
            columns.parents[slot] = 0
            columns.kid_counts[parent] -= 1
            if columns.wheres[slot] & 1:
                columns.memory_kid_counts[parent] -= 1

    def _bury(self, slots: I64) -> None:
        """Recycles slots in state EVICTING that nothing refers to, and payload rows with what those still hold."""
        columns = self.slots
        rows = columns.payload.take(slots).astype(np.int64)
        np.subtract.at(columns.refs, rows, 1)
        rows = rows[columns.refs.take(rows) == 0]
        for tier in range(TIERS):
            locations = columns.location[tier].take(rows)
            self._freed[tier] += locations[locations >= 0].tolist()
        columns.payload_rows.give(rows)
        for slot in slots[(columns.form.take(slots) & PAGE_BIT) != 0].tolist():
            self.names.forget(slot)
        columns.change(slots, State.ABSENT)
        columns.where[slots] = 0
        columns.held[slots] = 0
        columns.payload[slots] = 0
        columns.rows.give(slots)

    # -- victims ------------------------------------------------------------------------------------------------------
    def line_up(self, slot: int, tier: TierId) -> None:
        """The next call of `victims` names this held slot first."""
        self._ready[tier].append(slot)

    def victims(self, tier: TierId, count: int) -> I64:
        """See Index.victims."""
        chosen = _Choice(self, tier, count)
        ready, self._ready[tier] = self._ready[tier], []
        for i, slot in enumerate(ready):
            if len(chosen.slots) >= count:
                self._ready[tier] += ready[i:]
                break
            if self.slots.helds[slot] & 1 << tier:
                chosen.add(slot)
        columns, policy = self.slots, self.policies[tier]
        refused: list[I64] = [np.empty(0, np.int64)]
        asked, more = 0, 0
        while (lacking := count - len(chosen.slots)) > 0 and asked < REFUSALS_MAX:
            named = policy.victims(max(lacking, more))
            if not len(named):
                break
            asked += len(named)
            fit = (columns.state.take(named) == RESIDENT) & (columns.pin.take(named) == 0)
            refused.append(named[~fit])
            for slot in named[fit].tolist():
                chosen.add(slot)
            # Where all is in use, few may be asked for, but many must be looked at, and that quickly.
            more = min(2 * len(named), LOOK_MAX) if len(chosen.slots) == count - lacking else 0
        kept = np.concatenate([*refused, np.array(chosen.refused, np.int64)])
        if len(kept):
            policy.keep(kept)
        return np.array(chosen.slots, np.int64)


class _Choice:
    """Victims of one call, leaf before parent: a block may be named when all its children were named before it."""

    __slots__ = ("_entries", "_fewer", "_fewer_in_memory", "_limit", "_tier", "refused", "slots")

    def __init__(self, entries: Entries, tier: TierId, limit: int) -> None:
        self._entries, self._tier, self._limit = entries, tier, limit
        self._fewer: dict[int, int] = {}
        self._fewer_in_memory: dict[int, int] = {}
        """Children of a slot that would be gone, or gone from memory, if all named so far go."""
        self.slots: list[int] = []
        self.refused: list[int] = []

    def add(self, slot: int) -> None:
        """Takes a slot that the policy named, or refuses it, or holds it until its children go."""
        entries, columns, bit = self._entries, self._entries.slots, 1 << self._tier
        while True:
            columns.helds[slot] &= ~bit
            if columns.states[slot] != RESIDENT or columns.pins[slot] or not columns.wheres[slot] & bit:
                self.refused.append(slot)
                return
            guarded = self._guarded(slot)
            if guarded or len(self.slots) >= self._limit:
                columns.helds[slot] |= bit
                entries.holding = True
                if not guarded:
                    entries.line_up(slot, self._tier)
                return
            self.slots.append(slot)
            parent = columns.parents[slot] if columns.forms[slot] & 3 == Form.BLOCK else 0
            if not parent:
                return
            if columns.wheres[slot] == bit:
                self._fewer[parent] = self._fewer.get(parent, 0) + 1
            if self._tier == TierId.MEMORY:
                self._fewer_in_memory[parent] = self._fewer_in_memory.get(parent, 0) + 1
            if not columns.helds[parent] & bit or len(self.slots) >= self._limit:
                return
            slot = parent

    def _guarded(self, slot: int) -> bool:
        """Entries.guarded, as it will be when those named so far have gone."""
        columns = self._entries.slots
        if columns.forms[slot] & 3 != Form.BLOCK:
            return False
        if self._tier == TierId.MEMORY and columns.memory_kid_counts[slot] > self._fewer_in_memory.get(slot, 0):
            return True
        return columns.wheres[slot] == 1 << self._tier and columns.kid_counts[slot] > self._fewer.get(slot, 0)
