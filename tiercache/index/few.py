"""The index for a handful of slots, in plain Python: what a read of a page or two does, without one array.

Arrays cost more than a loop below a dozen slots, and far more while threads compete: `take`, sorting and searching in
NumPy give the interpreter lock away at every call, and with two threads running it takes a switch to have it back.
Entries and Index call these under the index's lock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tiercache.index.pins import Pin, Reservation
from tiercache.index.slots import DEAD_BIT
from tiercache.model import Form, State, TierId

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from tiercache.index.entries import Entries
    from tiercache.index.slots import Shape, Slots
    from tiercache.model import Name

    Found = tuple[list[int], list[int]]

FEW = 16
"""Up to so many slots these are faster than arrays."""

ABSENT, PENDING, EVICTING, RESIDENT = (int(s) for s in (State.ABSENT, State.PENDING, State.EVICTING, State.RESIDENT))


class Look(NamedTuple):
    """One slot as of one moment; a location of -1: no copy in that tier."""

    size: int
    part_bytes: int
    expiry_s: int
    memory_location: int
    memory_parts: int
    ssd_location: int
    ssd_parts: int


def look(columns: Slots, slots: Sequence[int]) -> list[Look]:
    """How slots stand now; of -1: nowhere, zeros."""
    sizes, steps, expiries, rows = columns.sizes, columns.steps, columns.expiries, columns.payloads
    (memory, ssd), (memory_parts, ssd_parts) = columns.locations, columns.part_maps
    found = []
    for slot in slots:
        slot = max(slot, 0)
        row = rows[slot]
        found.append(
            Look(sizes[slot], steps[row], expiries[slot], memory[row], memory_parts[row], ssd[row], ssd_parts[row])
        )
    return found


def hit_few(entries: Entries, key: bytes, ordinals: Sequence[int], parts: Sequence[int]) -> Found | None:
    """See Index.hit_few."""
    columns, names = entries.slots, entries.names
    rows: list[int] = []
    locations: list[int] = []
    run = names.runs.find(key)
    if not run:
        return None
    for ordinal, wanted in zip(ordinals, parts, strict=True):
        row = names.find_page(run, ordinal)
        payload = columns.payloads[row]
        if columns.states[row] < RESIDENT or columns.part_maps[0][payload] & wanted != wanted:
            return None
        rows.append(row)
        locations.append(columns.locations[0][payload])
    for row in rows:
        columns.pins[row] += 1
        entries.touch(row)
    return rows, locations


def hit_local(entries: Entries, key: bytes, ordinals: Sequence[int], parts: Sequence[int]) -> list[int] | None:
    """See Index.hit_local."""
    columns, names = entries.slots, entries.names
    (memory_parts, ssd_parts), rows = columns.part_maps, columns.payloads
    slots: list[int] = []
    run = names.runs.find(key)
    if not run:
        return None
    for ordinal, wanted in zip(ordinals, parts, strict=True):
        slot = names.find_page(run, ordinal)
        if columns.states[slot] < RESIDENT or wanted & ~(memory_parts[rows[slot]] | ssd_parts[rows[slot]]):
            return None
        slots.append(slot)
    for slot in slots:
        columns.pins[slot] += 1
        entries.touch(slot)
    return slots


def hit_whole(entries: Entries, names: Sequence[Name]) -> Found:
    """See Index.hit_whole."""
    columns, find, touch = entries.slots, entries.names.find, entries.touch
    states, payloads, sizes, steps = columns.states, columns.payloads, columns.sizes, columns.steps
    places, parts, pins = columns.locations[0], columns.part_maps[0], columns.pins
    rows: list[int] = []
    locations: list[int] = []
    # One by one and without arrays: after a batch of copies nothing of this is in the processor's cache, and then
    # a handful of NumPy's calls cost as much as a batch of 32 does here.
    for key, ordinal in names:
        row = find(key, ordinal)
        payload = payloads[row]
        if states[row] >= RESIDENT:
            wanted = (1 << (-(-sizes[row] // steps[payload]) or 1)) - 1
            if parts[payload] & wanted == wanted:
                rows.append(row)
                locations.append(places[payload])
                continue
        locations.append(-1)
    for row in rows:
        pins[row] += 1
        touch(row)
    return rows, locations


def reserve_pages(entries: Entries, key: bytes, ordinals: npt.NDArray[np.int64], shape: Shape) -> Reservation | None:
    """See Index.reserve_pages; None, and nothing done, where that takes more: slots on their way out, or too few."""
    columns, names = entries.slots, entries.names
    if len(ordinals) > min(FEW, columns.rows.room) or columns.evicting or not shape.uniform:
        return None
    run = names.runs.find(key)
    fresh = np.zeros(len(ordinals), bool)
    held: list[int] = []
    for i, (ordinal, size) in enumerate(zip(ordinals.tolist(), np.broadcast_to(shape.sizes, ordinals.shape).tolist())):
        slot = names.find_page(run, ordinal) if run else 0
        if slot:
            entries.touch(slot)
        else:
            run = run or names.runs.add(key)
            slot = columns.take_one(Form.PAGE, size, shape)
            names.link_page(slot, run, ordinal)
            fresh[i] = True
        columns.pins[slot] += 1
        held.append(slot)
    return Reservation(np.array(held, np.int64), fresh, Pin(held, reserved=True) if held else None)


def place(
    entries: Entries, slots: Sequence[int], tier: TierId, locations: Sequence[int], parts: Sequence[int]
) -> list[int] | None:
    """See Index.place; None, and nothing done, where one of the slots is on its way out or named twice."""
    columns, bit = entries.slots, 1 << tier
    states, forms, wheres, rows = columns.states, columns.forms, columns.wheres, columns.payloads
    if len(set(slots)) < len(slots):
        return None
    if any(states[slot] in (ABSENT, EVICTING) or forms[slot] & DEAD_BIT for slot in slots):
        return None
    unwanted: list[int] = []
    live: list[int] = []
    for slot, location, present in zip(slots, locations, parts, strict=True):
        if wheres[slot] & bit:
            unwanted.append(location)
            continue
        columns.locations[tier][rows[slot]] = location
        columns.part_maps[tier][rows[slot]] = present
        wheres[slot] |= bit
        if tier == TierId.MEMORY and forms[slot] & 3 == Form.BLOCK and (parent := columns.parents[slot]):
            columns.memory_kid_counts[parent] += 1
        if states[slot] == PENDING:
            columns.change_one(slot, State.RESIDENT)
        live.append(slot)
    if live:
        entries.inserted(np.array(live, np.int64), tier)
    return unwanted


def add_parts(
    columns: Slots, slots: Sequence[int], tier: TierId, parts: Sequence[int], locations: Sequence[int] | None
) -> None:
    """See Index.add_parts."""
    for i, slot in enumerate(slots):
        row = columns.payloads[slot]
        if locations is None or columns.locations[tier][row] == locations[i]:
            columns.part_maps[tier][row] |= parts[i]
