"""Facts found at opening, read lazily from the rows: all of them in one scan, or those of some names before that ends.

A table of columns for each segment, newest segment first; nothing is done row by row. The accounting of a segment (what
lives in it) is rebuilt from the same table when it is first read.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tiercache.model import Form
from tiercache.ssd import rows as codec
from tiercache.ssd.meta import RowsError
from tiercache.ssd.records import location_of
from tiercache.ssd.segments import LIVE, Life, Segment

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    from tiercache.model import Facts, Name
    from tiercache.ssd.meta import Rows
    from tiercache.ssd.recover import Directory


@dataclass(slots=True)
class SegmentRows:
    """What the rows say of one segment: facts, blocks of the dead, and how many rows of each there are.

    `damaged` counts values that are not what was written; `complete` is False if the store failed to give all rows.
    """

    table: codec.Table
    dead: npt.NDArray[np.uint32]
    keys: list[bytes]
    fact_rows: int
    stone_rows: int
    damaged: int
    complete: bool

    @property
    def whole(self) -> bool:
        """Whether this is all that was ever said of the segment."""
        return self.complete and not self.damaged


def read_segment_rows(rows: Rows, segment: Segment) -> SegmentRows:
    """Reads all rows of a segment's present life. Never raises: damage is counted in the answer."""
    tables: list[codec.Table] = []
    dead: list[npt.NDArray[np.uint32]] = []
    keys: list[bytes] = []
    order: npt.NDArray[np.uint32] | None = None
    facts = stones = damaged = 0
    complete = True
    try:
        for key, value in rows.scan(codec.rows_prefix(segment.number, segment.generation)):
            keys.append(key)
            letter, number = codec.split_row_key(key)
            if letter == b"r":
                facts = max(facts, number + 1)
                table = codec.unpack_table(key, value)
                damaged += table is None
                tables += [] if table is None else [table]
                continue
            stones = max(stones, number + 1) if letter == b"t" else stones
            body = codec.unseal(key, value)
            if body is None:
                damaged += 1
            elif letter == b"t":
                dead.append(np.frombuffer(body, "<u4"))
            elif letter == b"o":
                order = np.frombuffer(body, "<u4").reshape(2, -1)
    except RowsError:
        complete = False
    table = codec.join(tables)
    if order is not None and len(table):
        _apply_order(table, order)
    return SegmentRows(table, np.concatenate([np.zeros(0, np.uint32), *dead]), keys, facts, stones, damaged, complete)


def _apply_order(table: codec.Table, order: npt.NDArray[np.uint32]) -> None:
    blocks = table.columns["blocks"]
    at = np.searchsorted(order[0], blocks)
    hit = at < order.shape[1]
    hit[hit] = order[0][at[hit]] == blocks[hit]
    ticks = table.columns["ticks"].copy()
    ticks[hit] = order[1][at[hit]]
    table.columns["ticks"] = ticks


class Recovery:
    """Facts found at opening, read lazily. Thread-safe and blocking; meant for threads of the caller's choice."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._tables: dict[Segment, codec.Table] = {}
        segments = [s for s in directory.space.segments.values() if s.life is not Life.FREE]
        self._segments = sorted(segments, key=lambda segment: -segment.generation)
        self._generations = {segment: segment.generation for segment in segments}
        for segment in segments:
            if segment.life is Life.OPEN:
                self._resume(segment)

    def _resume(self, segment: Segment) -> None:
        """A segment goes on being filled only if everything that was said of it is known: else it could lie where new
        records would go."""
        space = self._directory.space
        damage = self._directory.counters["rows_damaged"]
        if self._table(segment) is None or self._directory.counters["rows_damaged"] != damage:
            space.seal(segment)

    def scan(self) -> Iterator[Facts]:
        """Facts of what lives, a segment at a time, most recently written first. A second scan reads anew."""
        space = self._directory.space
        for segment in self._segments:
            table = self._table(segment)
            if table is None:
                continue
            with space.lock:
                if segment.generation != self._generations[segment]:
                    continue
                at = np.searchsorted(segment.blocks[: segment.count], table.columns["blocks"])
                live = np.flatnonzero(segment.flags[at] == LIVE)[::-1]
            if len(live):
                table = table.take(live)
                yield table.facts(self._locations(segment, table))
        with self._lock:
            self._tables.clear()
            for segment in self._segments:
                self._give_up(segment)

    def _give_up(self, segment: Segment) -> None:
        """A segment whose rows cannot be read even now costs hits: its space is used again, but last of all."""
        with self._directory.space.lock:
            if not segment.loaded and segment.generation == self._generations[segment]:
                self._directory.counters["segments_lost"] += 1
                segment.loaded, segment.known = True, False

    def find(self, names: Sequence[Name]) -> Facts:
        """Facts of those of `names` that are there, the newest record of each, while a scan may still be under way."""
        wanted = {(name.key, name.ordinal) for name in names}
        blocks = {name.key: (name.key, name.ordinal) for name in names}
        firsts = np.array([int.from_bytes(key[:8].ljust(8, b"\0"), "little") for key, _ in wanted], np.uint64)
        tables: list[codec.Table] = []
        locations: list[npt.NDArray[np.int64]] = []
        for segment in self._segments:
            if not wanted:
                break
            table = self._table(segment)
            if table is None or not table.keys.shape[1]:
                continue
            heads = np.ascontiguousarray(table.keys).view("<u8")[:, 0]
            rows: list[int] = []
            for row in np.flatnonzero(np.isin(heads, firsts))[::-1].tolist():
                key = bytes(table.keys[row, : int(table.columns["widths"][row])])
                name = key, int(table.columns["ordinals"][row])
                if table.columns["forms"][row] == Form.BLOCK:  # its ordinal is its depth, which is no part of a name
                    name = blocks.get(key, name)
                if name in wanted and self._lives(segment, int(table.columns["blocks"][row])):
                    wanted.discard(name)
                    rows.append(row)
            if rows:
                tables.append(table.take(np.array(rows)))
                locations.append(self._locations(segment, tables[-1]))
        return codec.concatenate(tables).facts(np.concatenate([np.zeros(0, np.int64), *locations]))

    def _lives(self, segment: Segment, block: int) -> bool:
        location = location_of(segment.number, self._generations[segment], block)
        return self._directory.space.look(location) is not None

    def _locations(self, segment: Segment, table: codec.Table) -> npt.NDArray[np.int64]:
        base = location_of(segment.number, self._generations[segment], 0)
        return base + table.columns["blocks"].astype(np.int64)

    def _table(self, segment: Segment) -> codec.Table | None:
        """Facts of a segment as they were read; rebuilds its accounting if that is due. None if it began a new life."""
        with self._lock:
            table = self._tables.get(segment)
            if table is not None:
                return table
            if segment.generation != self._generations[segment]:
                return None
            found = read_segment_rows(self._directory.rows, segment)
            self._directory.counters["rows_damaged"] += found.damaged + (not found.complete)
            if not found.complete:
                return None
            with self._directory.space.lock:
                if segment.life is Life.FREE or segment.generation != self._generations[segment]:
                    return None
                if not segment.loaded:
                    segment.load(found.table, found.dead)
                    segment.fact_rows, segment.stone_rows = found.fact_rows, found.stone_rows
                    segment.merged = found.fact_rows < 2 and found.stone_rows < 2
            self._tables[segment] = found.table
            return found.table
