"""Commit: what makes answers durable, in this order: records, fdatasync of their segments, rows, sync of the rows.

Deletions are rows (tombstones) before they are space: a segment is used again only after its rows are gone durably.
Everything here blocks and runs in one thread at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from tiercache.ssd import rows as codec
from tiercache.ssd.records import location_of
from tiercache.ssd.recover import keys_of, state_value
from tiercache.ssd.scan import read_segment_rows
from tiercache.ssd.segments import LIVE, Life, Segment, Space

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tiercache.model import Payload
    from tiercache.ssd.fileio import FileIO
    from tiercache.ssd.meta import Rows

STONE_ROWS_MAX = 32


@dataclass(slots=True)
class Due:
    """What one segment has that is not saved."""

    segment: Segment
    facts: list[tuple[Payload, int]]
    stones: list[int]


@dataclass(slots=True)
class Batch:
    """One commit: what was due when it was taken, and the count of changes it covers."""

    changes: int
    due: list[Due]
    states: list[Segment]
    orders: dict[bytes, bytes]
    dead: list[Segment]
    """Segments in which nothing lives any more: they are emptied by the way."""
    failed: list[Due] = field(default_factory=list)
    """Segments whose sync failed: their records may or may not be on the medium."""


def take(space: Space, orders: dict[bytes, bytes]) -> Batch:
    """Takes what is due out of the space; `put_back` undoes it."""
    with space.lock:
        dead = space.claim_dead()
        due: list[Due] = []
        for segment in space.segments.values():
            if segment.unsaved or segment.stones:
                due.append(Due(segment, segment.unsaved, segment.stones))
                segment.unsaved, segment.stones = [], []
        states, taken = list(space.states), dict(orders)
        space.states.clear()
        orders.clear()
        return Batch(space.changes, due, states, taken, dead)


def put_back(space: Space, batch: Batch, orders: dict[bytes, bytes]) -> None:
    """The rows could not be written: they stay due."""
    with space.lock:
        space.release(batch.dead, emptied=False)
        for due in batch.due:
            due.segment.unsaved[:0] = due.facts
            due.segment.stones[:0] = due.stones
        space.states.update(dict.fromkeys(batch.states))
        for key, value in batch.orders.items():
            orders.setdefault(key, value)


def give_up(space: Space, batch: Batch) -> list[int]:
    """Buries what was acknowledged in segments whose sync failed, and answers its locations; tombstones stay due.

    What was written there after the batch was taken goes too: the system tells of a failed sync once, and the next
    one succeeds whether or not those bytes reached the medium.
    """
    with space.lock:
        lost: list[int] = []
        for due in batch.failed:
            segment = due.segment
            base = location_of(segment.number, segment.generation, 0)
            locations = [base | block for _, block in (*due.facts, *segment.unsaved)]
            lost += [location for location in locations if space.look(location) is not None]
            segment.stones[:0] = due.stones
        batch.due = [due for due in batch.due if due not in batch.failed]
        space.bury(lost)
        return lost


def sync_segment(io: FileIO, batch: Batch, due: Due) -> None:
    """First step, of each segment in `batch.due` that has facts, in any order or at once: its records to the medium."""
    try:
        io.fdatasync(due.segment.descriptor)
    except OSError:
        batch.failed.append(due)


def save(space: Space, batch: Batch, rows: Rows) -> None:
    """Second step: makes the rows of a batch durable, but for segments that failed the first. Raises RowsError."""
    batch.due = [due for due in batch.due if due not in batch.failed]
    puts, deletes = _without(rows, batch.dead)
    for due in batch.due:
        puts += _rows_of(space, due)
    with space.lock:
        puts += [state_value(segment, segment.life) for segment in batch.states]
    puts += batch.orders.items()
    if puts:
        rows.write(puts, deletes)
    rows.sync()
    space.release(batch.dead, emptied=True)
    batch.dead = []


def _without(rows: Rows, segments: Sequence[Segment]) -> tuple[list[tuple[bytes, bytes]], list[bytes]]:
    """Puts and deletes that make segments free."""
    puts = [state_value(segment, Life.FREE) for segment in segments]
    return puts, [key for segment in segments for key in keys_of(rows, codec.rows_prefix(segment.number))]


def _rows_of(space: Space, due: Due) -> list[tuple[bytes, bytes]]:
    segment = due.segment
    with space.lock:
        live = [pair for pair in due.facts if segment.flags[segment.find(pair[1])] == LIVE]
        fact_row, stone_row = segment.fact_rows, segment.stone_rows
        segment.fact_rows += bool(live)
        segment.stone_rows += bool(due.stones)
        if due.stones and segment.stone_rows > STONE_ROWS_MAX:
            segment.merged = False
    puts: list[tuple[bytes, bytes]] = []
    if live:
        live.sort(key=lambda pair: pair[1])
        key = codec.row_key(segment.number, segment.generation, b"r", fact_row)
        table = codec.table_of([payload for payload, _ in live], [block for _, block in live])
        puts.append((key, codec.pack_table(key, table)))
    if due.stones:
        key = codec.row_key(segment.number, segment.generation, b"t", stone_row)
        puts.append((key, codec.seal(key, np.array(due.stones, "<u4").tobytes())))
    return puts


def merge_sealed(space: Space, rows: Rows) -> int:
    """Rewrites the many rows of each sealed segment as one, not yet durably; answers of how many. Raises RowsError."""
    with space.lock:
        ripe = [s for s in space.segments.values() if _is_ripe(s)]
    for segment in ripe:
        found = read_segment_rows(rows, segment)
        if not found.whole:
            segment.merged = True  # what could be read must not replace what may be there
            continue
        with space.lock:
            at = np.searchsorted(segment.blocks[: segment.count], found.table.columns["blocks"])
            table = found.table.take(segment.flags[at] == LIVE)
            key = codec.row_key(segment.number, segment.generation, b"r", segment.fact_rows)
            stone_key = codec.row_key(segment.number, segment.generation, b"t", segment.stone_rows)
            segment.fact_rows += 1
            segment.stone_rows += 1
            segment.merged = True
        puts = [(key, codec.pack_table(key, table))] if len(table) else []
        if len(found.dead):
            puts.append((stone_key, codec.seal(stone_key, np.unique(found.dead).astype("<u4").tobytes())))
        rows.write(puts, [key for key in found.keys if codec.split_row_key(key)[0] != b"o"])
    return len(ripe)


def _is_ripe(segment: Segment) -> bool:
    idle = not (segment.pending or segment.unsaved or segment.stones)
    return segment.life is Life.SEALED and segment.loaded and idle and not segment.merged


def empty(space: Space, rows: Rows, segment: Segment) -> None:
    """Removes the rows of a segment in which nothing is wanted any more, durably; then its file may be used again.

    Raises RowsError, and the segment stays what it was.
    """
    rows.write(*_without(rows, [segment]))
    rows.sync()
    space.emptied(segment)


def empty_dead(space: Space, rows: Rows) -> None:
    """The same for all in which nothing lives any more, at once."""
    dead = space.claim_dead()
    try:
        if dead:
            rows.write(*_without(rows, dead))
            rows.sync()
    except BaseException:
        space.release(dead, emptied=False)
        raise
    space.release(dead, emptied=True)
