"""Every invariant of the index, checked the slow way."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from tiercache.index.slots import DEAD_BIT, PAGE_BIT, TIERS
from tiercache.model import Form, State

if TYPE_CHECKING:
    from tiercache.index.entries import Entries
    from tiercache.index.slots import Slots


def check(entries: Entries) -> None:
    """Raises AssertionError with the first broken invariant."""
    slots = entries.slots
    live = np.flatnonzero(slots.state[: slots.rows.top] != State.ABSENT).tolist()
    _expect(len(live) == slots.rows.used, "every slot is in use or on the free list")
    free = slots.rows.free_rows().tolist()
    _expect(len(set(free)) == len(free), "no slot is free twice")
    _expect(not set(free) & set(live), "no free slot is in use")
    _expect(not slots.state[0] and not slots.pin[0] and not slots.where[0], "row 0 is nobody")
    _expect(slots.evicting == int((slots.state == State.EVICTING).sum()), "EVICTING slots are counted")
    _check_names(entries, live)
    _check_chains(entries, live)
    _check_payloads(slots, live)
    for slot in live:
        _check_slot(entries, slot)


def _expect(fine: bool, what: str) -> None:
    """States one invariant; not `assert`, for validate() also works under -O."""
    if not fine:
        raise AssertionError(what)


def _check_names(entries: Entries, live: list[int]) -> None:
    """The hash tables hold exactly the linked slots, and runs count their pages."""
    slots, names = entries.slots, entries.names
    linked = []
    for row in names.table.head[names.table.head > 0].tolist():
        while row:
            linked.append(row)
            row = names.table.nexts[row]
    wanted = [slot for slot in live if not slots.forms[slot] & DEAD_BIT]
    _expect(sorted(linked) == sorted(wanted), "the table holds exactly the slots that have a name")
    pages: Counter[int] = Counter()
    for slot in live:
        form = slots.forms[slot]
        if form & PAGE_BIT:
            pages[slots.runs[slot]] += 1
        if not form & DEAD_BIT:
            name = names.name(slot)
            found = names.find_page(names.runs.find(name.key), name.ordinal) if form & 1 else names.find_key(name.key)
            _expect(found == slot, f"slot {slot} is found by its name {name}")
    runs = {run: names.runs.counts[run] for run in np.flatnonzero(names.runs.width).tolist()}
    _expect(dict(pages) == runs, "every run counts its pages, and no run is empty")
    _expect(len(runs) == names.runs.rows.used, "every row of a run is in use or free")


def _check_chains(entries: Entries, live: list[int]) -> None:
    """Counts of children, and depths."""
    slots = entries.slots
    kids: Counter[int] = Counter()
    memory_kids: Counter[int] = Counter()
    for slot in live:
        if slots.forms[slot] & 3 != Form.BLOCK:
            _expect(not slots.parents[slot] and not slots.kid_counts[slot], "only blocks have parents and children")
            continue
        if parent := slots.parents[slot]:
            kids[parent] += 1
            memory_kids[parent] += slots.wheres[slot] & 1
            memory_kids[parent] += sum(tier == 0 for tier, _ in entries.limbo.get(slot, ()))
            _expect(bool(slots.states[parent]), "a parent outlives its children")
            _expect(slots.depths[slot] == slots.depths[parent] + 1, "a block is one deeper than its parent")
        else:
            _expect(slots.depths[slot] == 0, "a block without a parent starts a chain")
    for slot in live:
        if slots.forms[slot] & 3 == Form.BLOCK:
            _expect(slots.kid_counts[slot] == kids[slot], "children are counted")
            _expect(slots.memory_kid_counts[slot] == memory_kids[slot], "children in memory are counted")


def _check_payloads(slots: Slots, live: list[int]) -> None:
    """Reference counts, and no location twice in a tier."""
    refs = Counter(slots.payloads[slot] for slot in live)
    _expect(all(slots.refs[row] == count for row, count in refs.items()), "payload rows count their slots")
    _expect(slots.payload_rows.used == len(refs), "every payload row is in use or free")
    for tier in range(TIERS):
        where = [int(slots.location[tier][row]) for row in refs if slots.location[tier][row] >= 0]
        _expect(len(where) == len(set(where)), "no two payloads at one location")


def _check_slot(entries: Entries, slot: int) -> None:
    """State, copies and names of one slot fit together."""
    slots = entries.slots
    state, where, dead = slots.states[slot], slots.wheres[slot], bool(slots.forms[slot] & DEAD_BIT)
    in_use = bool(slots.pins[slot] or slots.kid_counts[slot])
    row = slots.payloads[slot]
    for tier in range(TIERS):
        has = int(slots.location[tier][row]) >= 0
        _expect(has == bool(where & 1 << tier) or slots.refs[row] > 1, "a copy has a location, and no copy has none")
    _expect(not dead or state == State.EVICTING, "a slot without a name is on its way out")
    _expect(state < State.RESIDENT or where > 0, "what is readable has a copy")
    _expect(state != State.PENDING or not where, "what is PENDING has no copy")
    _expect(state != State.EVICTING or in_use, "what waits in EVICTING is in use")
    _expect(state != State.EVICTING or dead or not where, "a hole has no copy")
    _expect(state != State.MOVING or slots.pins[slot] > 0, "what moves is pinned")
    _expect(slot not in entries.limbo or in_use, "copies in limbo belong to slots in use")
