"""Reservation: new slots for names that have none, and for blocks of a chain in their place.

Each function answers slots (one for each name, -1 where there was no room) and the mask of those that it made PENDING.
Pinning them is the caller's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tiercache.index.names import Query
from tiercache.index.runs import folds
from tiercache.index.slots import WIDE_BIT, Shape
from tiercache.model import Form, State

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from tiercache.index.entries import Entries

    I64 = npt.NDArray[np.int64]
    Mask = npt.NDArray[np.bool_]


def reserve_blocks(entries: Entries, query: Query, above: int, shape: Shape) -> tuple[I64, Mask]:
    """Blocks of a chain below slot `above` (0: from its start); none from where a lone entry has a block's name: it has
    no place in a chain, and is not to be lost."""
    slots, names = entries.slots, entries.names
    out = np.full(query.count, -1, np.int64)
    found = names.walk(query, above)
    alone = slots.form.take(found) & 3 != Form.BLOCK
    if alone.any() or (above and slots.forms[above] & 3 != Form.BLOCK):
        found = found[: int(alone.argmax()) if not above or alone.any() else 0]
        out[: len(found)] = found
        return out, _refill(entries, out, shape)
    known = len(found)
    out[:known] = found
    fresh = _refill(entries, out, shape)
    last = int(found[-1]) if known else above
    slots.pins[last] += 1  # the clearing must not take the place where we hang (row 0: harmless)
    count = min(_clear_way(entries, query, known, found, above), slots.rows.room)
    if count:
        form = Form.BLOCK | (WIDE_BIT if query.width == 32 else 0)
        new = slots.take(count, form, shape.pick(slice(known, known + count)))
        names.link_blocks(new, query.words[known : known + count], last)
        out[known : known + count] = new
        fresh[known : known + count] = True
    slots.pins[last] -= 1
    return out, fresh


def _clear_way(entries: Entries, query: Query, known: int, found: I64, above: int) -> int:
    """Removes blocks that hang in another place from where this chain wants them. Answers how many blocks of the rest
    may be new: all, unless the digests repeat, which no chain does, or a lone entry has one of the names."""
    words = query.words[known:]
    if not len(words):
        return 0
    rows = entries.names.find_keys(words)
    strangers = rows[rows > 0]
    if len(strangers):
        mine = np.isin(strangers, found) | (strangers == above)
        mine |= entries.slots.form.take(strangers) & 3 != Form.BLOCK
        if mine.any():
            first = int(np.flatnonzero(rows > 0)[int(mine.argmax())])
            words, rows = words[:first], rows[:first]
            strangers = rows[rows > 0]
        entries.kill(strangers.tolist())
    if len(words) > 1 and len(np.unique(folds(words))) < len(words):
        seen: set[bytes] = set()
        for i, row in enumerate(words):
            if (raw := row.tobytes()) in seen:
                return i
            seen.add(raw)
    return len(words)


def _refill(entries: Entries, out: I64, shape: Shape) -> Mask:
    """Makes holes among the slots found PENDING again; the mask of them."""
    slots = entries.slots
    fresh = np.zeros(len(out), bool)
    if slots.evicting:
        fresh = (slots.state.take(out, mode="clip") == State.EVICTING) & (out > 0)
        if fresh.any():
            at = np.flatnonzero(fresh)
            slots.change(np.unique(out[at]), State.PENDING)
            slots.reshape(out[at], shape.pick(at))
    return fresh


def reserve_pages(entries: Entries, key: bytes, ordinals: I64, shape: Shape) -> tuple[I64, Mask]:
    """Pages of one file version, unique."""
    slots, names = entries.slots, entries.names
    run = names.runs.find(key)
    out = names.guess_pages(run, ordinals) if run and len(ordinals) else np.zeros(len(ordinals), np.int64)
    fresh = _refill(entries, out, shape)
    absent = np.flatnonzero(out == 0)
    new_at = absent[: slots.rows.room]
    out[absent] = -1
    if len(new_at):
        run = run or names.runs.add(key)
        new = slots.take(len(new_at), Form.PAGE, shape.pick(new_at))
        names.link_pages(new, run, ordinals[new_at])
        out[new_at] = new
        fresh[new_at] = True
    return out, fresh


def reserve_keys(entries: Entries, keys: Sequence[bytes], shape: Shape) -> tuple[I64, Mask]:
    """Lone objects. Of the same key twice, the first is the fresh one."""
    slots, names = entries.slots, entries.names
    firsts: dict[bytes, int] = {}
    for i, key in enumerate(keys):
        firsts.setdefault(key, i)
    out = np.array([names.find_key(key) for key in keys], np.int64)
    fresh = _refill(entries, out, shape)
    for width in (16, 32):
        at = np.array([i for key, i in firsts.items() if len(key) == width and not out[i]][: slots.rows.room], np.int64)
        if len(at):
            new = slots.take(len(at), Form.LONE | (WIDE_BIT if width == 32 else 0), shape.pick(at))
            slots.depth[new] = 0
            names.link_keys(new, Query([keys[i] for i in at], width).words)
            out[at] = new
            fresh[at] = True
    for i in np.flatnonzero(out == 0).tolist():  # named twice, or no room
        out[i] = out[firsts[keys[i]]] or -1
    if len(firsts) < len(keys):
        first = np.zeros(len(keys), bool)
        first[list(firsts.values())] = True
        fresh &= first
    return out, fresh
