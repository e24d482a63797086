"""Jobs: what one thread does in one go, reading or writing records; planned here, run in the tier's threads.

Reads never go straight into the caller's memory. A thread reads into a private buffer of its own, judges the bytes
there, and copies what is right. So a read that outlives its deadline has no hold on the target: the batch takes the
target away (`abandon`), and when the disk answers at last, the bytes stay in the thread's buffer. Copying costs little,
since the bytes were just hashed and are in the cache.

Writes take the same way back: a thread lays records out in its buffer and writes from there. The copy costs less than
it saves, because that buffer lies in huge pages and a memory arena does not (it is shared memory, of which most kernels
make none): the system then pins and describes one page to the disk where it had to gather 256 of 4 KiB. Measured on a
virtual disk: 5.2 GB/s beside 3.5 with entries of 1 MiB, 4.2 beside 3.6 of 256 KiB. A write that outlives its deadline
may still read the caller's addresses, into room that is dead already and is not used again before the thread came back.
The job holds the sources' owners until then, so that their memory is not unmapped.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import struct
import threading
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import xxhash

from tiercache.buffers import Buffer
from tiercache.model import Outcome, Payload
from tiercache.ssd.records import BLOCK_BYTES, check_header, pack_header, pieces_of, read_header, runs_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tiercache.ssd.fileio import FileIO
    from tiercache.ssd.segments import Place, Segment
    from tiercache.tier import Want

SCRATCH_BYTES = 4 << 20
"""Private memory of a thread, that every read and write goes through."""
READ_BYTES = 1 << 20
"""Neighbouring records are read in one call up to about this much."""
WRITE_BYTES = (1 << 20) + (64 << 10)
"""And written so: calls of a page and its header each keep the threads evenly busy, and measured best."""
GAP_BYTES = 64 << 10
"""Parts with less than this between them are read in one call, the gap included."""
HUGE_BYTES = 2 << 20
SMALL_BYTES = 32 << 10
"""A copy below this is over before the GIL could be given away and had back."""

_ZEROS = memoryview(bytes(BLOCK_BYTES))
_digest = xxhash.xxh3_64_intdigest
_move = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
    ctypes.cast(ctypes.memmove, ctypes.c_void_p).value or 0
)
_move_small = ctypes.PYFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
    ctypes.cast(ctypes.memmove, ctypes.c_void_p).value or 0
)


Pieces = tuple[tuple[int, int, int, int], ...]
"""As records.pieces_of gives them."""


class Memory:
    """An aligned span of private memory."""

    def __init__(self, length: int) -> None:
        # Private: of memory that could be shared most kernels make no huge pages (shmem_enabled is `never`).
        memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if length >= HUGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # fewer pages to pin for each call, where the kernel has huge ones
                memory.madvise(mmap.MADV_HUGEPAGE)
        self.buffer = Buffer.of(memory, writable=True)
        self.view = self.buffer.view()
        self.address = self.buffer.address


class Scratch(threading.local):
    """Private memory of the running thread, kept from job to job."""

    def __init__(self) -> None:
        self.memory = Memory(SCRATCH_BYTES)

    def room(self, length: int) -> Memory:
        """At least `length` bytes: the thread's own, or more for this once."""
        return self.memory if length <= SCRATCH_BYTES else Memory(length)


@lru_cache(maxsize=1 << 14)
def spans_of(wanted: int, parts: int, part_bytes: int, size: int) -> tuple[tuple[int, int, Pieces], ...]:
    """The reads (start, stop, pieces) that bring the header and the wanted parts of a record, relative to its start, on
    block boundaries."""
    spans: list[tuple[int, int, Pieces]] = []
    start, stop = 0, BLOCK_BYTES
    pieces: list[tuple[int, int, int, int]] = []
    for piece in pieces_of(wanted, parts, part_bytes, size):
        low = BLOCK_BYTES + piece[3]
        aligned, high = low // BLOCK_BYTES * BLOCK_BYTES, -(-(low + piece[2]) // BLOCK_BYTES) * BLOCK_BYTES
        if aligned - stop > GAP_BYTES or high - start > SCRATCH_BYTES:
            spans.append((start, stop, tuple(pieces)))
            start, pieces = aligned, []
        stop = max(stop, high)
        pieces.append(piece)
    spans.append((start, stop, tuple(pieces)))
    return tuple(spans)


class Job:
    """One unit of work of a thread. `fault` is set when the system refused; `ended` when the thread came back."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self.lock = threading.Lock()
        self.fault: OSError | None = None
        self.started = False
        self.ended = False
        self.abandoned = False

    def run(self, io: FileIO, scratch: Scratch, seed: int) -> None:
        """Does the work, unless it was abandoned before; never raises OSError."""
        with self.lock:
            self.started = not self.abandoned
        if not self.started:
            return
        try:
            self.work(io, scratch, seed)
        except OSError as fault:
            self.fault = fault
        finally:
            with self.lock:
                self.ended = True
                if self.abandoned:  # in the meantime, by the loop's thread
                    self.release()

    def abandon(self) -> bool:
        """Nobody waits any more. After this returns the job touches no target. Answers whether it had ended in time."""
        with self.lock:
            done = self.ended
            if not done and not self.abandoned:
                self.abandoned = True
                if not self.started:
                    self.release()
            return done

    def work(self, io: FileIO, scratch: Scratch, seed: int) -> None:
        """The work itself, in a thread."""
        raise AssertionError("a job says what it does")

    def release(self) -> None:
        """Called once, with the lock held, when an abandoned job can do no more harm."""


@dataclass(slots=True, eq=False)
class ReadItem:
    """One want inside a read job and how it went so far; `parts` are those that the record has."""

    index: int
    want: Want
    target: Buffer
    block: int
    parts: int
    outcome: Outcome = Outcome.BUSY
    rows: bytes = b""
    """The digests of the record's header, as they lie there; `digests` are the same as numbers."""
    digests: tuple[int, ...] = ()


@dataclass(slots=True)
class Read:
    """One call of preadv: file offset, length, and for each record touched its item, its start relative to the offset
    (negative in the later reads of a large record), whether its header comes with it, and the pieces that come."""

    offset: int
    length: int
    items: list[tuple[ReadItem, int, bool, Pieces]] = field(default_factory=list)


class ReadJob(Job):
    """Reads records of one segment, judges them and hands over what is right."""

    def __init__(self, segment: Segment, reads: list[Read]) -> None:
        super().__init__(segment)
        self.reads = reads
        self.generation = segment.generation

    def work(self, io: FileIO, scratch: Scratch, seed: int) -> None:
        """Read by read, into private memory first."""
        for read in self.reads:
            memory = scratch.room(read.length)
            got = io.preadv(self.segment.descriptor, [memory.view[: read.length]], read.offset)
            with self.lock:
                if self.abandoned:
                    return
                for item, base, opening, pieces in read.items:
                    if opening:
                        self._judge_header(item, memory.view[base : min(got, base + BLOCK_BYTES)], seed)
                    if item.outcome is Outcome.BUSY:
                        self._judge(item, base + BLOCK_BYTES, pieces, memory, got)
        with self.lock:
            for read in self.reads:
                for item, *_ in read.items:
                    if item.outcome is Outcome.BUSY and not self.abandoned:
                        item.outcome = Outcome.HIT

    def items(self) -> list[ReadItem]:
        """Every record that this job reads, once."""
        return [item for read in self.reads for item, _, opening, _ in read.items if opening]

    def _judge(self, item: ReadItem, base: int, pieces: Pieces, memory: Memory, got: int) -> None:
        """Hashes every piece where it lies, and copies them only if all are right; neighbours in one go."""
        view, digests = memory.view, item.digests
        source, target = memory.address + base, item.target.address
        runs: list[list[int]] = []
        for part, low, length, at in pieces:
            start = base + at
            if start + length > got or _digest(view[start : start + length]) != digests[part]:
                item.outcome = Outcome.CORRUPT
                return
            if runs and runs[-1][0] + runs[-1][2] == low and runs[-1][1] + runs[-1][2] == at:
                runs[-1][2] += length
            else:
                runs.append([low, at, length])
        for low, at, length in runs:
            (_move if length >= SMALL_BYTES else _move_small)(target + low, source + at, length)

    def _judge_header(self, item: ReadItem, block: memoryview, seed: int) -> None:
        place = (self.segment.number, self.generation, item.block)
        facts = check_header(block, seed, place, item.parts) if len(block) == BLOCK_BYTES else None
        if facts is None:
            item.outcome = Outcome.CORRUPT
            return
        key, ordinal, size, part_bytes, digests = facts
        want = item.want
        if (key, ordinal) != want.name or size != want.size or part_bytes != want.part_bytes:
            item.outcome = Outcome.MISS  # the record is right and the question is not
        else:
            item.rows = digests
            item.digests = struct.unpack(f"<{len(digests) >> 3}Q", digests)


def plan_reads(found: Sequence[tuple[Segment, ReadItem]]) -> list[ReadJob]:
    """Jobs for records, neighbours in one read. Items with outcome other than BUSY must not be among them."""
    jobs: list[ReadJob] = []
    last: Read | None = None
    where: Segment | None = None
    for segment, item in sorted(found, key=lambda pair: (pair[0].number, pair[1].block)):
        want = item.want
        spans = spans_of(want.parts, item.parts, want.part_bytes, want.size)
        start = item.block * BLOCK_BYTES
        length = spans[0][1]
        if last is not None and where is segment and len(spans) == 1:
            skip = start - last.offset - last.length
            if skip <= GAP_BYTES and start + length - last.offset <= READ_BYTES:
                base = start - last.offset
                last.length = max(last.length, base + length)
                last.items.append((item, base, True, spans[0][2]))
                continue
        reads = [
            Read(start + low, high - low, [(item, -low, number == 0, pieces)])
            for number, (low, high, pieces) in enumerate(spans)
        ]
        jobs.append(ReadJob(segment, reads))
        last, where = (reads[0] if len(reads) == 1 else None), segment
    return jobs


@dataclass(slots=True, eq=False)
class WriteItem:
    """One payload on its way to its place."""

    index: int
    payload: Payload
    source: Buffer
    place: Place


class WriteJob(Job):
    """Writes adjacent records of one segment together."""

    def __init__(self, segment: Segment, on_release: Callable[[Segment], None]) -> None:
        super().__init__(segment)
        self.items: list[WriteItem] = []
        self.blocks = 0
        self.end = 0
        self._on_release = on_release

    def add(self, item: WriteItem) -> bool:
        """Takes a record in, if it can go in the same call."""
        segment, _, block, length = item.place
        if self.items and (
            segment is not self.segment or block != self.end or (self.blocks + length) * BLOCK_BYTES > WRITE_BYTES
        ):
            return False
        self.items.append(item)
        self.blocks += length
        self.end = block + length
        return True

    def work(self, io: FileIO, scratch: Scratch, seed: int) -> None:
        """Lays the records out in private memory, and writes them from there: in one call, but for the largest."""
        out = _Out(io, self.segment.descriptor, scratch.memory, self.items[0].place.block * BLOCK_BYTES)
        for item in self.items:
            payload, source = item.payload, item.source
            header = pack_header(payload, (self.segment.number, self.segment.generation, item.place.block), seed)
            out.put(Buffer.of(header))
            for start, stop, _ in runs_of(payload.parts, payload.part_bytes, payload.size):
                out.put(source.slice(start, stop - start))
        out.flush()

    def release(self) -> None:
        """The segment may be used again."""
        self._on_release(self.segment)


class _Out:
    """Bytes on their way to a stretch of a segment file, block by block, through a thread's private memory."""

    def __init__(self, io: FileIO, descriptor: int, memory: Memory, offset: int) -> None:
        self._io, self._descriptor, self._memory, self._offset = io, descriptor, memory, offset
        self._used = 0

    def put(self, source: Buffer) -> None:
        """Bytes for the next blocks, with zeros behind them to the end of the last: no old ones reach the disk."""
        memory, address, length = self._memory, source.address, source.length
        while length:
            if self._used == SCRATCH_BYTES:
                self.flush()
            used, size = self._used, min(length, SCRATCH_BYTES - self._used)
            (_move if size >= SMALL_BYTES else _move_small)(memory.address + used, address, size)
            end = used + -(-size // BLOCK_BYTES) * BLOCK_BYTES
            if used + size < end:
                memory.view[used + size : end] = _ZEROS[: end - used - size]
            self._used = end
            address, length = address + size, length - size

    def flush(self) -> None:
        """Writes what waits."""
        used, self._used = self._used, 0
        written = self._io.pwritev(self._descriptor, [self._memory.view[:used]], self._offset)
        if written != used:
            raise OSError(errno.ENOSPC, f"only {written} bytes of {used} were written")
        self._offset += used


def _fill(block: memoryview, content: bytes | memoryview) -> None:
    length = len(content)
    block[:length] = content
    block[length:] = _ZEROS[length:]


def plan_writes(items: Sequence[WriteItem], on_release: Callable[[Segment], None]) -> list[WriteJob]:
    """Jobs for records that have their places, neighbours in one write."""
    jobs: list[WriteJob] = []
    for item in items:
        if not jobs or not jobs[-1].add(item):
            jobs.append(WriteJob(item.place.segment, on_release))
            jobs[-1].add(item)
    return jobs


@dataclass(slots=True, eq=False)
class MoveItem:
    """One record that reclaim rewrites; `payload` is set once it was read and found right."""

    location: int
    source: Segment
    generation: int
    block: int
    place: Place
    payload: Payload | None = None


class MoveJob(Job):
    """Reads records, judges them whole, and writes them again, headers made new, in one write."""

    def __init__(self, segment: Segment, on_release: Callable[[Segment], None], moves: list[MoveItem]) -> None:
        super().__init__(segment)
        self.moves = moves
        self.read_faults: list[OSError] = []
        """What the system said where it refused to read: such records cannot be kept, and the others can."""
        self._on_release = on_release

    def release(self) -> None:
        """The new segment may be used again."""
        self._on_release(self.segment)

    def work(self, io: FileIO, scratch: Scratch, seed: int) -> None:
        """Reads one by one, and one write of all."""
        first = self.moves[0].place.block
        total = (self.moves[-1].place.block + self.moves[-1].place.length - first) * BLOCK_BYTES
        memory = scratch.room(total)
        good: list[tuple[MoveItem, Payload]] = []
        for move in self.moves:
            start = (move.place.block - first) * BLOCK_BYTES
            view = memory.view[start : start + move.place.length * BLOCK_BYTES]
            try:
                payload = self._read(io, move, view, seed)
            except OSError as fault:
                self.read_faults.append(fault)
                payload = None
            if payload is None:
                _fill(view[:BLOCK_BYTES], b"")
                continue
            place = (self.segment.number, self.segment.generation, move.place.block)
            _fill(view[:BLOCK_BYTES], pack_header(payload, place, seed))
            good.append((move, payload))
        with self.lock:
            if self.abandoned:
                return
        if io.pwritev(self.segment.descriptor, [memory.view[:total]], first * BLOCK_BYTES) != total:
            raise OSError(errno.ENOSPC, "the disk took less than was given")
        for move, payload in good:
            move.payload = payload

    @staticmethod
    def _read(io: FileIO, move: MoveItem, view: memoryview, seed: int) -> Payload | None:
        """The record in `view`, or None if it is not right in every part."""
        got = io.preadv(move.source.descriptor, [view], move.block * BLOCK_BYTES)
        header = read_header(view[:BLOCK_BYTES], seed) if got == len(view) else None
        there = (move.source.number, move.generation, move.block)
        if header is None or (header.segment, header.generation, header.block) != there:
            return None
        right = header.blocks == move.place.length and stored_payload(view, header.payload)
        return header.payload if right else None


def plan_moves(moves: Sequence[MoveItem], on_release: Callable[[Segment], None]) -> list[MoveJob]:
    """Jobs for records that have their new places, neighbours together."""
    jobs: list[MoveJob] = []
    for move in moves:
        last = jobs[-1].moves[-1].place if jobs else None
        joins = last is not None and last.segment is move.place.segment and last.block + last.length == move.place.block
        first = jobs[-1].moves[0].place.block if jobs else 0
        if joins and (move.place.block + move.place.length - first) * BLOCK_BYTES <= READ_BYTES:
            jobs[-1].moves.append(move)
        else:
            jobs.append(MoveJob(move.place.segment, on_release, [move]))
    return jobs


def stored_payload(view: memoryview, payload: Payload) -> bool:
    """Whether every present part of a record lying in `view` (header block first) has its digest."""
    digests = struct.unpack(f"<{len(payload.digests) >> 3}Q", payload.digests)
    for part, _, length, at in pieces_of(payload.parts, payload.parts, payload.part_bytes, payload.size):
        start = BLOCK_BYTES + at
        if start + length > len(view) or _digest(view[start : start + length]) != digests[part]:
            return False
    return True
