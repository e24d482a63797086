"""Segment: one memory file of the arena, mapped, with its extent table."""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
from typing import TYPE_CHECKING

import numpy as np

from tiercache.buffers import Buffer, runs
from tiercache.cpu import layout
from tiercache.errors import ProtocolError
from tiercache.model import ALIGN_BYTES, Form, Kind, Name, Payload, part_count

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tiercache.buffers import Source

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_FIELDS, _SHAPE = layout.ROW_FIELDS, layout.SHAPE

_KINDS, _FORMS = tuple(Kind), tuple(Form)  # a tenth of the time that calling the enumerations takes
_ROWS_MAX = 1 << 20  # what a location has room for


def _memory_file(name: str, size_bytes: int) -> int | None:
    """A descriptor of a memory file that nobody can resize; None where the system has none."""
    if not hasattr(os, "memfd_create"):
        return None
    import fcntl

    try:
        descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError:
        return None  # an old kernel or a sandbox: anonymous memory serves, it can only not be shared later
    try:
        os.ftruncate(descriptor, size_bytes)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _checked_file(descriptor: int) -> int:
    """The size of a memory file that nobody can shrink under whoever maps it: a look past its end would be a SIGBUS."""
    import fcntl

    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError as error:
        raise ProtocolError(f"a segment of an arena is a memory file, and this is none ({error.strerror})") from error
    if not seals & fcntl.F_SEAL_SHRINK:
        raise ProtocolError("the memory file of the segment is not sealed: it could shrink while it is read")
    return os.fstat(descriptor).st_size


def _mapping(descriptor: int, size_bytes: int) -> mmap.mmap:
    memory = mmap.mmap(descriptor, size_bytes)
    # Small pages where the kernel has no others; and no core dump of any process shows what is cached.
    for wish in ("MADV_HUGEPAGE", "MADV_DONTDUMP"):
        if hasattr(mmap, wish):
            with contextlib.suppress(OSError):  # only a wish
                memory.madvise(getattr(mmap, wish))
    return memory


class Segment:
    """Mapped memory with a header, table chunks and extents (see layout). Not thread-safe: the arena's lock guards it.

    `fd` is the memory file, or None for anonymous memory.
    """

    __slots__ = (
        "_chunk_shift", "_chunks", "_foreign", "_free_rows", "fd", "memory", "ordinal", "populate_mark", "size", "span",
    )  # fmt: skip

    def __init__(self, ordinal: int, fd: int | None, memory: mmap.mmap, *, foreign: bool = False) -> None:
        """`foreign`: another process owns the table, and may add chunks to it."""
        self.ordinal, self.fd, self.memory, self.size = ordinal, fd, memory, len(memory)
        self.span = Buffer.of(memory, writable=True)
        self.populate_mark = 0
        """The arena asks for more populated memory when an extent ends past this page."""
        self._chunk_shift = (layout.chunk_bytes_for(self.size) // layout.ROW_BYTES).bit_length() - 1
        self._chunks: list[int] = []
        self._free_rows: list[int] = []
        self._foreign = foreign

    @classmethod
    def create(cls, ordinal: int, size_bytes: int, arena_id: bytes, *, shareable: bool = True) -> Segment:
        """A new one, all free. Raises OSError when the system has no such memory."""
        fd = _memory_file(f"tiercache-{arena_id.hex()}-{ordinal}", size_bytes) if shareable else None
        segment = cls(ordinal, fd, _mapping(-1 if fd is None else fd, size_bytes))
        layout.HEAD.pack_into(
            segment.memory, 0, layout.MAGIC, layout.VERSION, layout.ROW_BYTES, size_bytes,
            layout.chunk_bytes_for(size_bytes), 0, ALIGN_BYTES, ordinal, arena_id,
        )  # fmt: skip
        return segment

    @classmethod
    def attach(cls, ordinal: int, fd: int, arena_id: bytes) -> Segment:
        """The one that another process made, and may go on changing. The descriptor is taken over, also on failure.

        Raises ProtocolError where it is not that segment of that arena, OSError where it cannot be mapped.
        """
        try:
            size = _checked_file(fd)
            if size < ALIGN_BYTES:
                raise ProtocolError(f"an arena segment of {size} bytes is too short for its header")
            memory = _mapping(fd, size)
            try:
                head = layout.read_head(memory)
                if (head.ordinal, head.arena_id) != (ordinal, arena_id):
                    raise ProtocolError(
                        f"segment {head.ordinal} of arena {head.arena_id.hex()} came for {ordinal} of {arena_id.hex()}"
                    )
            except BaseException:
                memory.close()
                raise
        except BaseException:
            os.close(fd)
            raise
        segment = cls(ordinal, fd, memory, foreign=True)
        segment._chunks = head.chunks
        return segment

    @property
    def file(self) -> tuple[int, int] | None:
        """What tells its memory file from all others; None where it has none, or was closed."""
        if self.fd is None:
            return None
        facts = os.fstat(self.fd)
        return facts.st_dev, facts.st_ino

    @property
    def chunk_pages(self) -> int:
        """Pages of one table chunk."""
        return (layout.ROW_BYTES << self._chunk_shift) // ALIGN_BYTES

    @property
    def rows_left(self) -> int:
        """Rows that can be taken before the table needs another chunk."""
        return len(self._free_rows)

    def add_chunk(self, page: int) -> bool:
        """Grows the table into `chunk_pages` pages from `page` on; False when directory or row numbers are full."""
        count = len(self._chunks)
        first_row = count << self._chunk_shift
        rows = 1 << self._chunk_shift
        if count == layout.DIRECTORY_MAX or first_row + rows > _ROWS_MAX:
            return False
        at = page * ALIGN_BYTES
        self.memory[at : at + rows * layout.ROW_BYTES] = bytes(rows * layout.ROW_BYTES)
        _U32.pack_into(self.memory, layout.DIRECTORY_AT + 4 * count, page)
        _U32.pack_into(self.memory, layout.CHUNKS_AT, count + 1)
        self._chunks.append(at)
        self._free_rows.extend(range(first_row + rows - 1, first_row - 1, -1))
        return True

    def own(self, held: Iterable[int]) -> None:
        """The owner of the table is this process from now on. Every row that is not among `held` is free.

        A free row's generation grows: the dead owner may have been about to do that, and some process may still know
        the location."""
        busy = np.zeros(len(self._chunks) << self._chunk_shift, bool)
        busy[list(held)] = True
        rows = 1 << self._chunk_shift
        for number, at in enumerate(self._chunks):
            table = np.frombuffer(self.memory, layout.ROW, rows, at)
            free = np.flatnonzero(~busy[number * rows : (number + 1) * rows])
            table["state"][free] = layout.FREE
            old = table["generation"][free]
            table["generation"][free] = np.where(old == 0, 0, np.maximum(old + np.uint32(1), 1))
        self._free_rows = np.flatnonzero(~busy)[::-1].tolist()
        self._foreign = False

    @property
    def table_pages(self) -> list[tuple[int, int]]:
        """(first page, pages) of the header and of each table chunk."""
        return [(0, 1)] + [(at // ALIGN_BYTES, self.chunk_pages) for at in self._chunks]

    def row_at(self, row: int) -> int:
        """Where a row lies in the memory; -1 when the table has no such row."""
        chunk = row >> self._chunk_shift
        if chunk >= len(self._chunks) and not (self._foreign and self._learn(chunk)):
            return -1
        return self._chunks[chunk] + (row & (1 << self._chunk_shift) - 1) * layout.ROW_BYTES

    def _learn(self, chunk: int) -> bool:
        """Whether the owner has added this chunk to the table since the directory was last read."""
        if chunk >= layout.DIRECTORY_MAX:
            return False
        try:
            chunks = layout.read_head(self.memory).chunks
        except ProtocolError:
            return False  # damaged since it was attached: what is known by now still stands
        if len(chunks) > len(self._chunks):
            self._chunks = chunks  # in one piece: other threads may do the same at the same time
        return chunk < len(chunks)

    def make_row(self, page: int, pages: int, payload: Payload) -> tuple[int, int]:
        """Row and generation of a new PENDING extent of the payload's name and shape; none of its parts is present."""
        memory = self.memory
        following = layout.END
        for _ in range(layout.rows_for(part_count(payload.size, payload.part_bytes)) - 1):
            row = self._free_rows.pop()
            at = self.row_at(row)
            _U32.pack_into(memory, at + layout.NEXT_AT, following)
            memory[at + layout.STATE_AT] = layout.MORE
            following = row
        row = self._free_rows.pop()
        at = self.row_at(row)
        generation = _U32.unpack_from(memory, at + layout.GENERATION_AT)[0] or 1
        self._say(at, payload, page, pages, generation, following)
        memory[at + layout.RETIRED_AT] = 0
        _U64.pack_into(memory, at + layout.PARTS_AT, 0)
        memory[at + layout.STATE_AT] = layout.PENDING
        return row, generation

    def describe(self, at: int, payload: Payload) -> None:
        """Says more of the PENDING extent whose row lies at `at`: all that the payload says beside its shape."""
        _, page, pages, generation, _, _, _, _ = layout.SHAPE.unpack_from(self.memory, at + layout.SHAPE_AT)
        self._say(at, payload, page, pages, generation, _U32.unpack_from(self.memory, at + layout.NEXT_AT)[0])

    def _say(self, at: int, payload: Payload, page: int, pages: int, generation: int, following: int) -> None:
        key, parent = payload.name.key, payload.parent
        fields = _FIELDS.pack(
            key, parent, payload.size, page, pages, generation, payload.name.ordinal, payload.part_bytes, following,
            payload.expiry_s, payload.tick, payload.cost_s, payload.scope, len(key), len(parent), payload.kind,
            payload.form,
        )  # fmt: skip
        self.memory[at : at + layout.RETIRED_AT] = fields
        _U32.pack_into(self.memory, at + layout.CHECK_AT, layout.check_of(fields))

    def drop_row(self, row: int) -> tuple[int, int]:
        """Frees an extent's rows; answers its first page and its pages, which are the caller's to give back."""
        memory = self.memory
        at = self.row_at(row)
        size, page, pages, _, _, part_bytes, _, _ = layout.SHAPE.unpack_from(memory, at + layout.SHAPE_AT)
        for _ in range(layout.rows_for(part_count(size, part_bytes))):
            following = _U32.unpack_from(memory, at + layout.NEXT_AT)[0]
            memory[at + layout.STATE_AT] = layout.FREE
            generation = _U32.unpack_from(memory, at + layout.GENERATION_AT)[0]
            _U32.pack_into(memory, at + layout.GENERATION_AT, generation + 1 & 0xFFFFFFFF or 1)
            self._free_rows.append(row)
            row, at = following, self.row_at(following)
            if at < 0:
                break
        return page, pages

    def add_parts(self, at: int, parts: int, digests: bytes) -> None:
        """Makes parts of the extent whose row lies at `at` present. Digests first, then the map, then the state."""
        memory = self.memory
        present = _U64.unpack_from(memory, at + layout.PARTS_AT)[0]
        places = self._digest_places(at, parts.bit_length())
        for first, last in runs(parts & ~present):
            while first < last:
                stop = min(last, (first // layout.ROW_DIGESTS + 1) * layout.ROW_DIGESTS)
                to = places[first // layout.ROW_DIGESTS] + first % layout.ROW_DIGESTS * 8
                memory[to : to + (stop - first) * 8] = digests[first * 8 : stop * 8]
                first = stop
        layout.fence()
        _U64.pack_into(memory, at + layout.PARTS_AT, present | parts)
        memory[at + layout.STATE_AT] = layout.PRESENT

    def digests(self, at: int, count: int) -> bytes:
        """Digests of the first `count` parts of the extent whose row lies at `at`; undefined where a part is absent."""
        memory = self.memory
        if count <= layout.ROW_DIGESTS:
            return memory[at + layout.DIGESTS_AT : at + layout.DIGESTS_AT + count * 8]
        row_digests = layout.ROW_DIGESTS * 8
        found = b"".join([memory[to : to + row_digests] for to in self._digest_places(at, count)])
        return found[: count * 8].ljust(count * 8, b"\0")

    def source(self, row: int, generation: int, hashed: bool) -> Source | None:
        """What a copy of the whole extent in this row needs, its digests only if `hashed`; None where there is none of
        this generation now."""
        at = self.row_at(row)
        if at < 0:
            return None
        memory = self.memory
        size, page, _, now, _, part_bytes, state, _ = _SHAPE.unpack_from(memory, at + layout.SHAPE_AT)
        if now != generation or state not in layout.LIVE:
            return None
        wanted = self.digests(at, part_count(size, part_bytes)) if hashed else b""
        return self.span.address + page * ALIGN_BYTES, size, part_bytes, wanted, memory

    def payload(self, at: int) -> Payload:
        """What the table says of the extent whose row lies at `at`."""
        (key, parent, size, _, _, _, ordinal, part_bytes, _, expiry_s, tick, cost_s, scope, width, parent_width, kind,
         form) = _FIELDS.unpack_from(self.memory, at)  # fmt: skip
        parts = _U64.unpack_from(self.memory, at + layout.PARTS_AT)[0]
        count = part_count(size, part_bytes)
        digests = layout.masked_digests(self.digests(at, count), parts, count)
        return Payload(
            Name(key[:width], ordinal), size, part_bytes, parts, digests, _KINDS[kind], parent[:parent_width], scope,
            cost_s, expiry_s, tick, _FORMS[form],
        )  # fmt: skip

    def _digest_places(self, at: int, count: int) -> Sequence[int]:
        """Where the digests of the chain of rows that begins at `at` lie, as far as `count` parts need them; fewer when
        the chain leads nowhere, because it is damaged, or is being taken apart in another process."""
        places = [at + layout.DIGESTS_AT]
        for _ in range(layout.rows_for(count) - 1):
            at = self.row_at(_U32.unpack_from(self.memory, at + layout.NEXT_AT)[0])
            if at < 0:
                break
            places.append(at + layout.DIGESTS_AT)
        return places

    def close(self) -> None:
        """Closes the memory file. The memory itself goes when the last Buffer over it is gone."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None
