"""Opening a directory: whose it is, which format it has, which segments there are, within which caps.

Opening walks no payload and reads no facts (see scan.py for those). What is damaged is counted and left out: rows are
hints, and losing them costs hits only.
"""

from __future__ import annotations

import os
import struct
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import xxhash

from tiercache.errors import ConfigError, LockedError, ProtocolError
from tiercache.ssd import rows as codec
from tiercache.ssd.meta import RowsError
from tiercache.ssd.records import (
    BLOCK_BYTES,
    FORMAT_VERSION,
    SEGMENT_BYTES_MAX,
    SEGMENTS_MAX,
    read_header,
)
from tiercache.ssd.segments import RECLAIMS, WRITES, Life, Segment, Space
from tiercache.ssd.transfer import Memory

if TYPE_CHECKING:
    from tiercache.ssd.fileio import FileIO
    from tiercache.ssd.meta import Rows

ROWS_FILES = 40
"""Files that the store of rows may have; it has 10 to 25."""
OTHER_FILES = 6
OTHER_BYTES = OTHER_FILES * BLOCK_BYTES
"""The lock, the format file, the witness, the next version of each, the probe."""
SEGMENTS_LEAST = 4
"""One that is written, one that reclaim writes, one kept empty for reclaim, and one that can be given up."""
ROOMY_BYTES = 8 << 20
"""Segments are at least so large where that leaves four of them: large entries should fit."""
SEGMENTS_MANY = 512
"""More segments than this bring nothing, and cost descriptors: larger ones are made instead."""
_TITLE = "tiercache ssd directory"
_STATE = struct.Struct("<BBI")


@dataclass(frozen=True, slots=True)
class Caps:
    """Hard limits of a directory: bytes and files of everything in it, and what to leave free on the disk."""

    capacity_bytes: int
    files_max: int
    segment_bytes: int = 0
    """A wish, 0 for a good size; made smaller until four fit, or larger where there would be too many."""
    disk_free_floor_bytes: int = 0

    @property
    def rows_bytes(self) -> int:
        """What of the capacity belongs to the rows."""
        return min(max(self.capacity_bytes // 32, 4 << 20), 1 << 30)

    def segments_max(self, segment_bytes: int) -> int:
        """How many segments fit under both caps."""
        room = self.capacity_bytes - self.rows_bytes - OTHER_BYTES
        return max(0, min(room // segment_bytes, self.files_max - ROWS_FILES - OTHER_FILES, SEGMENTS_MAX))

    def choose_segment_bytes(self) -> int:
        """Size of the segments of a new directory. Raises ConfigError if the caps leave no room for three of 1 MiB."""
        wish = self.segment_bytes or 256 << 20
        size = 1 << 20
        while size < wish and self.segments_max(2 * size) >= (4 if self.segment_bytes or size < ROOMY_BYTES else 64):
            size *= 2
        while self.capacity_bytes // size > SEGMENTS_MANY and 2 * size <= SEGMENT_BYTES_MAX:
            size *= 2
        if self.segments_max(size) < SEGMENTS_LEAST:
            least_bytes = (4 << 20) + OTHER_BYTES + SEGMENTS_LEAST * size
            least_files = ROWS_FILES + OTHER_FILES + SEGMENTS_LEAST
            raise ConfigError(f"an SSD tier needs at least {least_bytes} bytes and {least_files} files")
        return size


@dataclass(slots=True)
class Directory:
    """An open directory: everything the tier works with."""

    path: str
    lock: int
    identity: tuple[int, int] | None
    seed: int
    rows: Rows
    space: Space
    counters: Counter[str]

    @property
    def rows_path(self) -> str:
        """Where the store of rows is."""
        return os.path.join(self.path, "rows")


def segment_path(directory: str, number: int) -> str:
    """File of a segment."""
    return os.path.join(directory, "segments", f"{number:08x}.seg")


def format_text(segment_bytes: int, seed: int) -> bytes:
    """Content of the format file."""
    text = f"{_TITLE}\nversion {FORMAT_VERSION}\nsegment_bytes {segment_bytes}\nseed {seed}\n".encode()
    return text + f"check {xxhash.xxh3_64_hexdigest(text)}\n".encode()


def parse_format(content: bytes | None, directory: str) -> tuple[int, int] | None:
    """(segment_bytes, seed), or None if damaged or not there. Raises ProtocolError if it is of another version."""
    text, mark, check = (content or b"").rpartition(b"check ")
    if not mark or check.strip() != xxhash.xxh3_64_hexdigest(text).encode():
        return None
    lines = text.decode("utf-8", "replace").splitlines()
    fields = dict(line.split(" ", 1) for line in lines[1:] if " " in line)
    version = fields.get("version", "?")
    if lines[:1] != [_TITLE] or version != str(FORMAT_VERSION):
        raise ProtocolError(
            f"{directory} has format version {version}, and this tiercache reads and writes version {FORMAT_VERSION}: "
            "use the version that wrote it, or remove the directory, which is only a cache"
        )
    return int(fields["segment_bytes"]), int(fields["seed"])


def write_witness(io: FileIO, path: str, rows: Rows) -> None:
    """Notes how far the rows have come, durably: call it after a sync. RocksDB cannot tell a log or a manifest that was
    cut at the border of two batches from a whole one; the next opening can."""
    text = f"position {rows.position()}\n".encode()
    io.replace_small(os.path.join(path, "WITNESS"), text + f"check {xxhash.xxh3_64_hexdigest(text)}\n".encode())


def check_witness(io: FileIO, path: str, rows: Rows, counters: Counter[str]) -> None:
    """Counts it as damage if the rows have come less far than the witness says, or if that cannot be read."""
    content = io.read_small(os.path.join(path, "WITNESS"))
    text, _, check = (content or b"").rpartition(b"check ")
    if content is not None and check.strip() != xxhash.xxh3_64_hexdigest(text).encode():
        counters["witness_damaged"] += 1
    elif content is not None and rows.position() < int(text.split()[1]):
        counters["rows_damaged"] += 1


def state_value(segment: Segment, life: Life) -> tuple[bytes, bytes]:
    """Key and value of a segment's state row."""
    key = codec.segment_key(segment.number)
    return key, codec.seal(key, _STATE.pack(life, segment.stream, segment.generation))


def open_directory(io: FileIO, path: str, caps: Caps) -> Directory:
    """Takes the lock and brings the directory into a state to work with.

    Raises LockedError if another process has it, ProtocolError if it has another format, ConfigError if the caps are
    too small, OSError if the file system refuses. What can be refused by a look is refused before anything is written.
    """
    if parse_format(io.read_small(os.path.join(path, "FORMAT")), path) is None:
        caps.choose_segment_bytes()
    io.make_directory(path)
    lock = io.lock(os.path.join(path, "LOCK"))
    if lock is None:
        raise LockedError(f"{path} is in use by another process")
    try:
        return _open_locked(io, path, caps, lock)
    except BaseException:
        io.close(lock)
        raise


def _open_locked(io: FileIO, path: str, caps: Caps, lock: int) -> Directory:
    io.make_directory(os.path.join(path, "segments"))
    io.probe_direct(path)
    counters: Counter[str] = Counter()
    format_path = os.path.join(path, "FORMAT")
    content = io.read_small(format_path)
    geometry = parse_format(content, path)
    rows = open_rows_or_anew(io, path, caps, counters)
    try:
        check_witness(io, path, rows, counters)
        copied = _read_copy(rows, path, counters)
        if geometry is None:
            counters["format_damaged"] += content is not None or copied is not None
            geometry = copied
        if geometry is not None and caps.segments_max(geometry[0]) < SEGMENTS_LEAST:
            least_bytes = SEGMENTS_LEAST * geometry[0] + caps.rows_bytes + OTHER_BYTES
            raise ConfigError(
                f"{path} was made for a larger cap: it has segments of {geometry[0]} bytes and needs ssd_bytes of "
                f"{least_bytes} and {ROWS_FILES + OTHER_FILES + SEGMENTS_LEAST} files or more; "
                "raise the caps, or remove the directory"
            )
        if geometry is None:
            rows = _start_over(io, path, caps, rows)
            geometry = caps.choose_segment_bytes(), io.token()
        text = format_text(*geometry)
        if content != text:
            io.replace_small(format_path, text)
        if copied != geometry:
            rows.write([(codec.FORMAT_KEY, codec.seal(codec.FORMAT_KEY, text))])
        space = Space(geometry[0], caps.segments_max(geometry[0]))
        directory = Directory(path, lock, io.identity(path), geometry[1], rows, space, counters)
        _adopt(io, directory)
        return directory
    except BaseException:
        _close_quietly(rows)
        raise


def open_rows_or_anew(io: FileIO, path: str, caps: Caps, counters: Counter[str]) -> Rows:
    """The rows; repaired if they are damaged, and empty if that fails."""
    rows_path = os.path.join(path, "rows")
    try:
        rows = io.open_rows(rows_path, caps.rows_bytes)
        try:
            for _ in rows.scan(codec.SEGMENT_PREFIX):
                pass
            return rows
        except RowsError:
            _close_quietly(rows)
            raise
    except RowsError:
        counters["rows_damaged"] += 1
    try:
        io.repair_rows(rows_path, caps.rows_bytes)
        return io.open_rows(rows_path, caps.rows_bytes)
    except RowsError:
        counters["rows_lost"] += 1
    io.remove_tree(rows_path)
    return io.open_rows(rows_path, caps.rows_bytes)


def _close_quietly(rows: Rows) -> None:
    try:
        rows.close()
    except RowsError:
        return


def _read_copy(rows: Rows, path: str, counters: Counter[str]) -> tuple[int, int] | None:
    try:
        value = rows.get(codec.FORMAT_KEY)
    except RowsError:
        counters["rows_damaged"] += 1
        return None
    body = None if value is None else codec.unseal(codec.FORMAT_KEY, value)
    return None if body is None else parse_format(bytes(body), path)


def _start_over(io: FileIO, path: str, caps: Caps, rows: Rows) -> Rows:
    """Nothing in the directory can be vouched for without its seed, or fits under the caps: begins anew."""
    _close_quietly(rows)
    io.remove_tree(os.path.join(path, "rows"))
    segments = os.path.join(path, "segments")
    for name in io.names(segments):
        io.unlink(os.path.join(segments, name))
    io.unlink(os.path.join(path, "WITNESS"))
    return io.open_rows(os.path.join(path, "rows"), caps.rows_bytes)


def _adopt(io: FileIO, directory: Directory) -> None:
    """Fills the space with the segments that state rows and files agree on, within the caps."""
    space, rows, counters = directory.space, directory.rows, directory.counters
    states = read_states(rows, counters)
    gone: list[int] = []
    files = segment_files(io, directory.path)
    for number, size in sorted(files.items()):
        state = states.pop(number, None)
        if size > space.segment_bytes or (size < space.segment_bytes and state is None):
            io.unlink(segment_path(directory.path, number))
            gone.append(number)
            continue
        segment = Segment(number, known=state is not None)
        if state is not None:
            segment.life, segment.stream, segment.generation = state
            segment.loaded = segment.life is Life.FREE
        segment.descriptor = io.open(segment_path(directory.path, number))
        if size < space.segment_bytes:
            counters["segments_truncated"] += 1
            io.allocate(segment.descriptor, space.segment_bytes)
        space.segments[number] = segment
    counters["segments_missing"] += sum(state[0] is not Life.FREE for state in states.values())
    gone += list(states)
    gone += _shrink(io, directory)
    if gone:
        dead = [key for number in gone for key in keys_of(rows, codec.rows_prefix(number))]
        rows.write([], dead + [codec.segment_key(number) for number in gone])
    known = [segment.generation for segment in space.segments.values()]
    known += [_first_generation(io, directory, s) for s in space.segments.values() if not s.known]
    space.generation = max(known, default=0)
    _resume(directory)


def read_states(rows: Rows, counters: Counter[str]) -> dict[int, tuple[Life, int, int]]:
    """(life, stream, generation) of each segment that has a state row; damaged rows are counted and left out."""
    states: dict[int, tuple[Life, int, int]] = {}
    try:
        for key, value in rows.scan(codec.SEGMENT_PREFIX):
            body = codec.unseal(key, value)
            if body is None or len(body) != _STATE.size or len(key) != 5:
                counters["rows_damaged"] += 1
                continue
            life, stream, generation = _STATE.unpack(body)
            states[int.from_bytes(key[1:], "big")] = Life(life), stream, generation
    except RowsError:
        counters["rows_damaged"] += 1
    return states


def keys_of(rows: Rows, prefix: bytes) -> list[bytes]:
    """Keys that start so, as far as they can be read."""
    keys: list[bytes] = []
    try:
        keys += (key for key, _ in rows.scan(prefix))
    except RowsError:
        return keys
    return keys


def segment_files(io: FileIO, path: str) -> dict[int, int]:
    """Length of each segment file there is."""
    folder = os.path.join(path, "segments")
    files: dict[int, int] = {}
    for name in io.names(folder):
        stem, dot, _ = name.partition(".seg")
        if dot and len(stem) == 8 and all(letter in "0123456789abcdef" for letter in stem):
            files[int(stem, 16)] = io.size_of(os.path.join(folder, name))
    return files


def _shrink(io: FileIO, directory: Directory) -> list[int]:
    """Removes segments until the caps hold: empty ones first, then the oldest."""
    space = directory.space
    order = sorted(space.segments.values(), key=lambda s: (s.life is not Life.FREE, s.generation))
    surplus = order[: max(0, len(order) - space.segments_max)]
    for segment in surplus:
        io.close(segment.descriptor)
        io.unlink(segment_path(directory.path, segment.number))
        del space.segments[segment.number]
    return [segment.number for segment in surplus]


def _first_generation(io: FileIO, directory: Directory, segment: Segment) -> int:
    """Generation of a segment whose state row is lost, from its first record; 0 if that is no record."""
    memory = Memory(BLOCK_BYTES)
    io.preadv(segment.descriptor, [memory.view], 0)
    header = read_header(memory.view, directory.seed)
    return header.generation if header is not None else 0


def _resume(directory: Directory) -> None:
    """Goes on filling the segments that were open; of several for one stream the newest."""
    space = directory.space
    for segment in sorted(space.segments.values(), key=lambda s: s.generation):
        if segment.life is not Life.OPEN:
            continue
        stream = segment.stream if segment.stream in (WRITES, RECLAIMS) else WRITES
        older = space.open[stream]
        if older is not None:
            older.life = Life.SEALED
            space.states[older] = None
        space.open[stream] = segment
