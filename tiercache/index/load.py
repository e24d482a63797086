"""Bulk insert of what a tier found when it was opened: vectorised, in chunks, so that look-ups go on meanwhile."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from tiercache.index.runs import folds
from tiercache.index.slots import WIDE_BIT, Shape
from tiercache.model import Form, State, TierId

if TYPE_CHECKING:
    from threading import Lock

    from tiercache.index.entries import Entries
    from tiercache.model import Facts

    I64 = npt.NDArray[np.int64]
    U64 = npt.NDArray[np.uint64]

CHUNK = 8192
"""Rows a lock hold: about 3 ms."""


class Loaded(NamedTuple):
    """What became of the rows of one load.

    `taken` rows are in the index now. `surplus`: locations of duplicates, of what has another copy in this tier
    already, and of what found no slot: the caller frees them. `waiting`: numbers of block rows whose parent is not in
    the index, by depth: load them again when more was loaded; in the end the caller frees their locations.
    """

    taken: int
    surplus: npt.NDArray[np.int64]
    waiting: npt.NDArray[np.int64]


def load_chunks(entries: Entries, lock: Lock, facts: Facts, tier: TierId) -> Loaded:
    """See Index.load."""
    loader = _Loader(entries, facts, tier)
    rows = np.arange(len(facts.forms))
    blocks = facts.forms == Form.BLOCK
    for low in range(0, len(rows), CHUNK):
        some = rows[low : low + CHUNK]
        with lock:
            loader.take(some[~blocks[some]])
    # Blocks need their parents first: by depth, and then whoever's parent came is in.
    order = np.flatnonzero(blocks)
    order = order[np.argsort(facts.ordinals[order], kind="stable")]
    waiting: list[I64] = []
    for low in range(0, len(order), CHUNK):
        with lock:
            waiting.append(loader.take_blocks(order[low : low + CHUNK]))
    left = np.concatenate(waiting) if waiting else np.empty(0, np.int64)
    surplus = np.concatenate(loader.surplus) if loader.surplus else np.empty(0, np.int64)
    return Loaded(loader.count, surplus, left)


class _Loader:
    """One load under way."""

    def __init__(self, entries: Entries, facts: Facts, tier: TierId) -> None:
        self.entries, self.facts, self.tier = entries, facts, tier
        self.count = 0
        self.surplus: list[I64] = []
        self.keys: U64 = np.ascontiguousarray(facts.keys).view(np.uint64)
        self.parents: U64 = np.ascontiguousarray(facts.parents).view(np.uint64)

    def take(self, rows: I64) -> None:
        """Pages and lone objects."""
        facts = self.facts
        rows = self._not_dying(rows)
        for form in (Form.LONE, Form.PAGE):
            for width in (16, 32):
                some = rows[(facts.forms[rows] == form) & (facts.widths[rows] == width)]
                if len(some):
                    self._take_pages(some, width) if form == Form.PAGE else self._take_keys(some, width)

    def _not_dying(self, rows: I64) -> I64:
        """Rows of copies that were given up, while somebody still looks at them, are not taken back: their space goes
        with the last look."""
        columns, limbo = self.entries.slots, self.entries.limbo
        if not columns.evicting and not limbo:
            return rows
        dying = columns.payload[np.flatnonzero(columns.state[: columns.rows.top] == State.EVICTING)]
        given_up = [location for copies in limbo.values() for tier, location in copies if tier == self.tier]
        locations = np.concatenate((columns.location[self.tier].take(dying), np.array(given_up, np.int64)))
        return rows[~np.isin(self.facts.locations[rows], locations)]

    def _take_keys(self, rows: I64, width: int) -> None:
        """Lone objects with keys of one width."""
        words = self.keys[rows, : width // 8]
        known = self.entries.names.find_keys(words)
        new = self._new(rows, known, folds(words))
        if len(new):
            slots = self._slots(rows[new], Form.LONE, width)
            self.entries.slots.depth[slots] = 0
            self.entries.names.link_keys(slots, words[new])
            self._settle(slots, rows[new])

    def _take_pages(self, rows: I64, width: int) -> None:
        """Pages of files with keys of one width: their runs first, then as keys."""
        names = self.entries.names
        words = np.ascontiguousarray(self.keys[rows, : width // 8])
        change = np.ones(len(rows), bool)  # rows of one file mostly lie together
        change[1:] = (words[1:] != words[:-1]).any(axis=1)
        heads, group = words[change], np.cumsum(change) - 1
        runs = names.runs.find_many(heads, width)
        absent = np.flatnonzero(runs == 0)
        runs[absent] = self._new_runs(heads[absent], width)
        pages, ordinals = runs[group], self.facts.ordinals[rows].astype(np.int64)
        known = names.find_pages(pages, ordinals)
        known[pages == 0] = -1
        new = self._new(rows, known, (pages << 32 | ordinals).view(np.uint64))
        if len(new):
            slots = self._slots(rows[new], Form.PAGE, width)
            names.link_pages(slots, pages[new], ordinals[new])
            self._settle(slots, rows[new])
        for run in set(runs[absent].tolist()) if len(new) < len(rows) else ():
            if run and not names.runs.counts[run]:  # no slot was left for its pages
                names.runs.drop(run)

    def _new_runs(self, words: U64, width: int) -> I64:
        """A run for each key, of which some are equal; 0 for those that come when there are no slots left anyway."""
        _, first, which = np.unique(folds(words), return_index=True, return_inverse=True)
        same = (words == words[first][which]).all(axis=1)  # two keys with one fold: the later is left out
        oldest = np.sort(first)[: self.entries.slots.rows.room]
        runs = np.zeros(len(words), np.int64)
        runs[oldest] = self.entries.names.runs.add_many(words[oldest], width)
        runs[same] = runs[first[which[same]]]
        return runs

    def take_blocks(self, rows: I64) -> I64:
        """Blocks, in ascending depth. Answers those whose parent is missing."""
        rows = self._not_dying(rows)
        if not len(rows):
            return rows
        waiting: list[I64] = []
        depths = self.facts.ordinals[rows]
        cuts = np.flatnonzero(np.diff(depths)) + 1
        for level in np.split(rows, cuts):
            for width in (16, 32):
                some = level[self.facts.widths[level] == width]
                if len(some):
                    waiting.append(self._take_level(some, width))
        return np.concatenate(waiting)

    def _take_level(self, rows: I64, width: int) -> I64:
        """Blocks of one depth and width."""
        columns, names, facts = self.entries.slots, self.entries.names, self.facts
        parents = np.zeros(len(rows), np.int64)
        below = facts.parent_widths[rows] == width
        if below.any():
            parents[below] = names.find_keys(self.parents[rows[below], : width // 8])
        depth = np.where(parents > 0, columns.depth.take(parents) + 1, 0)
        fine = ((parents > 0) == (facts.parent_widths[rows] > 0)) & (depth == facts.ordinals[rows])
        waiting: I64 = rows[~fine]
        rows, parents = rows[fine], parents[fine]
        if not len(rows):
            return waiting
        words = self.keys[rows, : width // 8]
        known = names.find_keys(words)
        new = self._new(rows, known, folds(words))
        if len(new):
            slots = self._slots(rows[new], Form.BLOCK, width)
            names.link_keys(slots, words[new])
            columns.depth[slots] = facts.ordinals[rows[new]]
            columns.parent[slots] = parents[new]
            columns.kids[slots] = 0
            columns.memory_kids[slots] = 0
            columns.block_top = max(columns.block_top, int(slots.max()) + 1)
            np.add.at(columns.kids, parents[new][parents[new] > 0], 1)
            self._settle(slots, rows[new])
        return waiting

    def _new(self, rows: I64, known: I64, identity: U64) -> I64:
        """Which of the rows get a new slot: not known yet, the first of their identity, while there are slots. What is
        known, readable and without a copy in this tier gets this one; all else is surplus."""
        columns = self.entries.slots
        wanted = known == 0
        first = np.zeros(len(rows), bool)
        first[np.unique(identity, return_index=True)[1]] = True
        wanted &= first
        new: I64 = np.flatnonzero(wanted)[: columns.rows.room]
        taken = np.zeros(len(rows), bool)
        taken[new] = True
        here = columns.location[self.tier].take(columns.payload.take(known))
        taken |= (known > 0) & (here == self.facts.locations[rows])  # the same row once more
        old = np.flatnonzero((known > 0) & first & ~taken)
        if len(old):
            slots = known[old]
            facts = self.facts
            same = (columns.state.take(slots) >= State.RESIDENT) & (columns.size.take(slots) == facts.sizes[rows[old]])
            # Only the key of a page names its bytes for good; another entry of this name may have been put meanwhile.
            # What memory has is the newer one: then the copy on SSD is read no more, and stays until it is replaced.
            pages = facts.forms[rows[old]] == Form.PAGE
            if self.tier == TierId.SSD:
                same &= pages
            same &= (columns.where.take(slots) & (1 << self.tier)) == 0
            same &= columns.part_bytes.take(columns.payload.take(slots)) == facts.part_bytes[rows[old]]
            joined = old[same]
            if len(joined):
                taken[joined] = True
                at = rows[joined]
                if self.tier == TierId.MEMORY:
                    doubtful = columns.payload.take(known[old[same & ~pages]])
                    columns.parts[TierId.SSD][doubtful] = 0
                self.entries.place(known[joined], self.tier, facts.locations[at], facts.parts[at], facts.ticks[at])
                self.count += len(joined)
        self.surplus.append(self.facts.locations[rows[~taken]])
        return new

    def _slots(self, rows: I64, form: int, width: int) -> I64:
        """New slots for rows."""
        facts = self.facts
        shape = Shape(
            facts.sizes[rows], facts.part_bytes[rows], facts.kinds[rows],
            facts.scopes[rows], facts.costs_s[rows], facts.expiries_s[rows],
        )  # fmt: skip
        return self.entries.slots.take(len(rows), form | (WIDE_BIT if width == 32 and form != Form.PAGE else 0), shape)

    def _settle(self, slots: I64, rows: I64) -> None:
        """New slots become readable."""
        facts, self.count = self.facts, self.count + len(slots)
        order = facts.ticks[rows]
        self.entries.place(slots, self.tier, facts.locations[rows], facts.parts[rows], order)
