"""fsck: reads every byte of a directory and says what is right, what is damaged, and what no row knows.

Only whoever has the directory's lock may look. Without `repair` no segment and no row is changed. With it, rows whose
records are bad are dropped, and records without a row are revived if everything about them is right: their header,
their place, and every digest. Deleted records stay deleted as far as the rows still know of the deletion.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tiercache.errors import LockedError, UnavailableError
from tiercache.ssd import rows as codec
from tiercache.ssd.fileio import FileIO, check_user
from tiercache.ssd.meta import RowsError
from tiercache.ssd.records import BLOCK_BYTES, MAGIC, Header, read_header
from tiercache.ssd.recover import (
    Caps,
    check_witness,
    format_text,
    open_rows_or_anew,
    parse_format,
    read_states,
    segment_files,
    segment_path,
    state_value,
    write_witness,
)
from tiercache.ssd.scan import read_segment_rows
from tiercache.ssd.segments import Life, Segment
from tiercache.ssd.transfer import Memory, stored_payload

if TYPE_CHECKING:
    from tiercache.ssd.meta import Rows

WINDOW_BYTES = 4 << 20


@dataclass(slots=True)
class FsckReport:
    """What was found, and what was done about it. Counts, and bytes of records that are right and have a row."""

    directory: str
    segments: int = 0
    records: int = 0
    live_bytes: int = 0
    corrupt: int = 0
    """Rows whose record is damaged or is another one."""
    orphans: int = 0
    """Right records that no row knows and no row calls deleted."""
    revived: int = 0
    dropped: int = 0
    rows_damaged: int = 0
    rows_lost: bool = False
    format_damaged: bool = False
    witness_damaged: bool = False
    segments_truncated: int = 0
    segments_missing: int = 0
    segments_unknown: int = 0
    """Segment files without a state row."""

    @property
    def clean(self) -> bool:
        """Whether nothing is damaged. Orphans are no damage: a crash leaves some that were never promised."""
        damage = self.corrupt + self.rows_damaged + self.segments_truncated + self.segments_missing
        return not (damage or self.rows_lost or self.format_damaged or self.witness_damaged)


def fsck(directory: str, *, repair: bool = False, group: bool = False, io: FileIO | None = None) -> FsckReport:
    """Checks a directory. Raises LockedError while a process uses it, ProtocolError for another format version, and
    UnavailableError if there is no cache, the disk refuses, or it is another user's and not of a `group`."""
    check_user(directory, group=group)
    io = io or FileIO()
    path = os.path.abspath(directory)
    if not io.names(os.path.join(path, "segments")) and io.read_small(os.path.join(path, "FORMAT")) is None:
        raise UnavailableError(f"there is no SSD cache in {path}")
    lock = io.lock(os.path.join(path, "LOCK"))
    if lock is None:
        raise LockedError(f"{path} is in use by another process")
    try:
        return _check(io, path, repair)
    except LockedError:
        raise
    except OSError as fault:
        raise UnavailableError(f"fsck of {path} cannot go on: {fault}") from fault
    finally:
        io.close(lock)


def _check(io: FileIO, path: str, repair: bool) -> FsckReport:
    report = FsckReport(path)
    counters: Counter[str] = Counter()
    geometry = parse_format(io.read_small(os.path.join(path, "FORMAT")), path)
    rows = _open(io, path, repair, report, counters)
    try:
        if rows is not None:
            check_witness(io, path, rows, counters)
        if geometry is None:
            report.format_damaged = True
            value = None if rows is None else rows.get(codec.FORMAT_KEY)
            body = None if value is None else codec.unseal(codec.FORMAT_KEY, value)
            geometry = None if body is None else parse_format(bytes(body), path)
            if geometry is None:
                return report  # without the seed no record can be judged; the next opening starts over
            if repair:
                io.replace_small(os.path.join(path, "FORMAT"), format_text(*geometry))
        states = {} if rows is None else read_states(rows, counters)
        files = segment_files(io, path)
        report.segments_missing = sum(n not in files and s[0] is not Life.FREE for n, s in states.items())
        generation = max((state[2] for state in states.values()), default=0)
        for number, size in sorted(files.items()):
            report.segments += 1
            report.segments_truncated += size < geometry[0]
            segment = Segment(number)
            if number in states:
                segment.life, segment.stream, segment.generation = states[number]
            else:
                segment.known = False
                report.segments_unknown += 1
            segment.descriptor = io.open(segment_path(path, number))
            try:
                Walk(io, rows, segment, geometry[1], report, min(size, geometry[0])).run(repair, generation)
            finally:
                io.close(segment.descriptor)
        if rows is not None and repair:
            rows.sync()
            write_witness(io, path, rows)
    except RowsError:
        report.rows_damaged += 1
    finally:
        report.rows_damaged += counters["rows_damaged"]
        report.witness_damaged = bool(counters["witness_damaged"])
        if rows is not None:
            rows.close()
    return report


def _open(io: FileIO, path: str, repair: bool, report: FsckReport, counters: Counter[str]) -> Rows | None:
    caps = Caps(1 << 40, 1 << 20)
    if repair:
        rows = open_rows_or_anew(io, path, caps, counters)
        report.rows_lost = bool(counters["rows_lost"])
        return rows
    try:
        return io.open_rows(os.path.join(path, "rows"), caps.rows_bytes)
    except RowsError:
        report.rows_lost = True
        return None


class Walk:
    """One segment, block by block."""

    def __init__(
        self, io: FileIO, rows: Rows | None, segment: Segment, seed: int, report: FsckReport, size_bytes: int
    ) -> None:
        self._io = io
        self._rows = rows
        self._segment = segment
        self._seed = seed
        self._report = report
        self._blocks = size_bytes // BLOCK_BYTES

    def run(self, repair: bool, generation: int) -> None:
        """Checks rows against records, then looks between them for records without a row."""
        segment, report = self._segment, self._report
        if not segment.known:
            first = self._header(0)
            if first is None or (self._rows is None and not repair):
                return
            segment.generation = first.generation
        elif segment.life is Life.FREE:
            return
        found = None if self._rows is None else read_segment_rows(self._rows, segment)
        good: list[Header] = []
        bad: list[int] = []
        taken = np.zeros(self._blocks + 1, np.bool_)
        if found is not None:
            report.rows_damaged += found.damaged
            live = found.table.take(~np.isin(found.table.columns["blocks"], found.dead))
            for row, block in enumerate(live.columns["blocks"].tolist()):
                header = self._header(block)
                if header is not None and self._matches(header, live, row) and self._right(header):
                    good.append(header)
                    taken[block : block + header.blocks] = True
                else:
                    bad.append(block)
            report.records += len(good)
            report.live_bytes += sum(header.blocks for header in good) * BLOCK_BYTES
            report.corrupt += len(bad)
            taken[np.minimum(found.dead, self._blocks)] = True
        orphans = self._orphans(taken)
        report.orphans += len(orphans)
        if repair and self._rows is not None:
            self._repair(self._rows, good, bad, orphans)

    def _matches(self, header: Header, table: codec.Table, row: int) -> bool:
        payload, columns = header.payload, table.columns
        name = table.keys[row, : int(columns["widths"][row])].tobytes()
        return (payload.name.key, payload.name.ordinal, payload.size, payload.parts) == (
            name,
            int(columns["ordinals"][row]),
            int(columns["sizes"][row]),
            int(columns["parts"][row]),
        )

    def _header(self, block: int) -> Header | None:
        memory = Memory(BLOCK_BYTES)
        if block >= self._blocks or self._io.preadv(self._segment.descriptor, [memory.view], block * BLOCK_BYTES) < 1:
            return None
        header = read_header(memory.view, self._seed)
        segment = self._segment
        if header is None or (header.segment, header.block) != (segment.number, block):
            return None
        return header if header.generation == segment.generation or not segment.generation else None

    def _right(self, header: Header) -> bool:
        length = header.blocks * BLOCK_BYTES
        memory = Memory(length)
        got = self._io.preadv(self._segment.descriptor, [memory.view], header.block * BLOCK_BYTES)
        return got == length and stored_payload(memory.view, header.payload)

    def _orphans(self, taken: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> list[Header]:
        """Right records outside the blocks that are taken, ascending, none inside another."""
        found: list[Header] = []
        memory = Memory(WINDOW_BYTES)
        step = WINDOW_BYTES // BLOCK_BYTES
        end = 0
        for first in range(0, self._blocks, step):
            got = self._io.preadv(self._segment.descriptor, [memory.view], first * BLOCK_BYTES) // BLOCK_BYTES
            heads = memory.buffer.array().reshape(-1, BLOCK_BYTES)[:got, : len(MAGIC)]
            marked = (heads == np.frombuffer(MAGIC, np.uint8)).all(axis=1)
            for block in (np.flatnonzero(marked) + first).tolist():
                header = None if block < end or taken[block] else self._header(block)
                if header is not None and self._right(header):
                    found.append(header)
                    end = block + header.blocks
        return found

    def _repair(self, rows: Rows, good: list[Header], bad: list[int], orphans: list[Header]) -> None:
        segment, report = self._segment, self._report
        if not bad and not orphans:
            return
        found = read_segment_rows(rows, segment)
        keep = sorted(good + orphans, key=lambda header: header.block)
        key = codec.row_key(segment.number, segment.generation, b"r", found.fact_rows)
        stone_key = codec.row_key(segment.number, segment.generation, b"t", found.stone_rows)
        table = codec.table_of([header.payload for header in keep], [header.block for header in keep])
        stones = np.union1d(found.dead, np.array(bad, np.uint32)).astype("<u4")
        if not segment.known:
            segment.life = Life.SEALED
        puts = [(key, codec.pack_table(key, table)), state_value(segment, segment.life)]
        if len(stones):
            puts.append((stone_key, codec.seal(stone_key, stones.tobytes())))
        rows.write(puts, [key for key in found.keys if codec.split_row_key(key)[0] != b"o"])
        report.revived += len(orphans)
        report.dropped += len(bad)
