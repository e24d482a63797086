"""Buffer: a span of host memory that can be sliced, viewed, copied and hashed without Python touching its bytes."""

from __future__ import annotations

import ctypes
import struct
from functools import lru_cache
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from tiercache import native
from tiercache.errors import ConfigError
from tiercache.model import PARTS_MAX, part_count
from tiercache.native import DIGEST_BYTES_MIN

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from typing_extensions import Buffer as SupportsBuffer

    Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]

STEP_BYTES = 256 << 10
"""Without the native kernel a verified copy moves about this much at a time and hashes it while it is still in the
second-level cache: measured best of 64 KiB to 1 MiB, by 2 % before its neighbours."""

_SMALL_BYTES = 16 << 10  # a copy below this is over before another thread could use the GIL

# One array type serves every length: ctypes would make a new class for each, which costs more than the copy.
_Span = ctypes.c_uint8 * (1 << 46)
# All of the address space: a slice of it is a view of a span in a quarter of the time that Buffer.view takes. It keeps
# nothing alive, so it serves only whoever holds the span's owner meanwhile.
_MEMORY = memoryview((ctypes.c_uint8 * (1 << 62)).from_address(0)).cast("B")
_NOWHERE = ctypes.c_uint8()  # what empty arrays point at
_first_byte = ctypes.c_char.from_buffer

_MEMMOVE = ctypes.cast(ctypes.memmove, ctypes.c_void_p).value or 0
_move = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(_MEMMOVE)
_move_small = ctypes.PYFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(_MEMMOVE)
_bytes_of_length = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_char_p, ctypes.c_ssize_t)(
    ("PyBytes_FromStringAndSize", ctypes.pythonapi)
)
_bytes_address = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object)(("PyBytes_AsString", ctypes.pythonapi))
_digest = xxhash.xxh3_64_intdigest


class Buffer:
    """A contiguous span of host memory: address, length, and the object that keeps it alive.

    Slicing and viewing copy nothing. Whatever `array()` and `view()` give keeps the owner alive for as long as it, or
    anything made from it, lives.
    """

    __slots__ = ("address", "length", "owner")

    def __init__(self, address: int, length: int, owner: object) -> None:
        self.address = address
        self.length = length
        self.owner = owner

    @classmethod
    def of(cls, memory: SupportsBuffer, *, writable: bool = False) -> Buffer:
        """The span of any contiguous object with the buffer protocol (bytes, bytearray, mmap, NumPy array).

        Raises ConfigError if it is not contiguous, or read-only where `writable` is asked for.
        """
        if writable and isinstance(memory, np.ndarray):
            try:
                first = _first_byte(memory)
            except (TypeError, ValueError):
                pass  # it is read-only, empty or not contiguous: seen below
            else:
                return cls(ctypes.addressof(first), memory.nbytes, first)
        view = memoryview(memory)
        if not view.c_contiguous:
            raise ConfigError("the buffer is not contiguous: pass a contiguous array or copy it first")
        if not view.nbytes:
            return cls(0, 0, view)
        if not view.readonly:
            first = _first_byte(view)
            return cls(ctypes.addressof(first), view.nbytes, first)
        if writable:
            raise ConfigError("the buffer is read-only: pass a bytearray or a writable array")
        if type(memory) is bytes:
            return cls(_bytes_address(memory), view.nbytes, memory)
        array = np.frombuffer(view, np.uint8)
        return cls(array.ctypes.data, view.nbytes, array)

    def __len__(self) -> int:
        return self.length

    def slice(self, start: int, length: int) -> Buffer:
        """Bytes [start, start + length) of this span."""
        assert 0 <= start and 0 <= length and start + length <= self.length, (start, length, self.length)
        return Buffer(self.address + start, length, self.owner)

    def array(self) -> Bytes:
        """A writable uint8 array over the span; it and whatever is made from it keep the owner alive."""
        if not self.length:
            return np.empty(0, np.uint8)
        span = _Span.from_address(self.address)
        span.owner = self.owner  # type: ignore[attr-defined]  # ctypes arrays take attributes; this keeps the memory
        return _array(span, self.length)

    def view(self) -> memoryview:
        """A writable memoryview over the span."""
        return self.array().data

    def __bytes__(self) -> bytes:
        return ctypes.string_at(self.address, self.length)


def _array(memory: Any, length: int) -> Bytes:
    return np.frombuffer(memory, np.uint8, length)


def copy(source: Buffer, target: Buffer) -> None:
    """Copies all of `source` to the start of `target`; the GIL is released while more than a few pages move."""
    length = source.length
    assert length <= target.length, (length, target.length)
    (_move_small if length < _SMALL_BYTES else _move)(target.address, source.address, length)


Span = tuple[int, int, int, int]
"""What is copied, or only hashed: address, address of the copy or 0, length, size of its parts."""
Source = tuple[int, int, int, bytes, object]
"""A whole entry to be copied: address, size, size of its parts, their digests, and what keeps the memory alive."""


def copy_many(sources: Sequence[Source], targets: Sequence[Buffer]) -> None:
    """Copies each of `sources` to the start of its target; digests are not looked at."""
    for (origin, size, _, _, _), target in zip(sources, targets, strict=True):
        assert size <= target.length, (size, target.length)
        (_move_small if size < _SMALL_BYTES else _move)(target.address, origin, size)


def new_bytes(length: int) -> tuple[bytes, Buffer]:
    """A bytes object with undefined content and the span to fill it through, before anybody else sees or hashes it.

    So an answer is built with one copy, where `bytes(view)` of a filled array would take two.
    """
    value = _bytes_of_length(None, length)
    return value, Buffer(_bytes_address(value), length, value)


def runs(parts: int) -> Iterator[tuple[int, int]]:
    """Runs of set bits of a part map: (first, one past the last), ascending."""
    first = 0
    while parts:
        skip = (parts & -parts).bit_length() - 1
        parts >>= skip
        length = (~parts & (parts + 1)).bit_length() - 1
        parts >>= length
        yield first + skip, first + skip + length
        first += skip + length


def part_digests(payload: Buffer, part_bytes: int, parts: int | None = None) -> bytes:
    """xxh3-64 of the parts of `payload` in the map `parts` (all without one), 8 little-endian bytes each, zero for the
    others (the Payload.digests layout)."""
    length = payload.length
    if parts is None or parts.bit_count() == part_count(length, part_bytes):
        return _moved(payload.address, 0, length, part_bytes)
    rows = bytearray(8 * part_count(length, part_bytes))
    for first, last in runs(parts):
        at = first * part_bytes
        rows[8 * first : 8 * last] = _moved(payload.address + at, 0, min(length, last * part_bytes) - at, part_bytes)
    return bytes(rows)


def same_digests(found: bytes, meant: bytes, parts: int) -> bool:
    """Whether two digests in the Payload layout agree on these parts; the one that was meant may end after them."""
    if len(meant) < 8 * parts.bit_length():
        return False
    if parts == (1 << parts.bit_length()) - 1:
        return found[: 8 * parts.bit_length()] == meant[: 8 * parts.bit_length()]
    return all(
        found[8 * i : 8 * i + 8] == meant[8 * i : 8 * i + 8] for i in range(parts.bit_length()) if parts >> i & 1
    )


def verify_parts(payload: Buffer, part_bytes: int, parts: int, digests: bytes) -> bool:
    """Whether each part of `payload` in the map `parts` has its digest; `digests` is in the Payload layout."""
    return _same(payload, 0, part_bytes, parts, digests)


def _check_parts(length: int, room: int, part_bytes: int, parts: int) -> None:
    """Refuses a map that reaches past the entry, or a target too small, before memmove would."""
    if length > room or parts >> part_count(length, part_bytes):
        raise ConfigError(f"parts {parts:#x} of {part_bytes} bytes do not fit an entry of {length} in {room} bytes")


@lru_cache(maxsize=PARTS_MAX + 1)
def digest_rows(count: int) -> struct.Struct:
    """So many digests in the Payload layout, as ints."""
    return struct.Struct(f"<{count}Q")


def copy_verified(source: Buffer, target: Buffer, part_bytes: int, parts: int, digests: bytes) -> bool:
    """Copies the parts in the map to their own places in `target`, and says whether what arrived has its digests.

    Both spans cover the whole entry; absent parts of the target are left alone. After False the parts asked for are
    undefined.
    """
    if source.length > target.length:
        _check_parts(source.length, target.length, part_bytes, parts)
    return _same(source, target.address, part_bytes, parts, digests)


def _same(source: Buffer, goal: int, part_bytes: int, parts: int, digests: bytes) -> bool:
    """Copies these parts to their places from `goal` on (0: copies nothing) and compares their digests."""
    length, count = source.length, part_count(source.length, part_bytes)
    if parts >> count:
        _check_parts(length, length, part_bytes, parts)
    for first, last in ((0, count),) if parts == (1 << count) - 1 else runs(parts):
        at = first * part_bytes
        size = min(length, last * part_bytes) - at
        found = _moved(source.address + at, goal and goal + at, size, part_bytes)
        if found != digests[8 * first : 8 * last]:
            return False
    return True


def copy_many_verified(sources: Sequence[Source], targets: Sequence[Buffer]) -> list[bool]:
    """Copies whole entries to the start of their targets, and says of each whether what arrived has its digests.

    The caller looks everything up before the first byte moves: a copy of 1 MiB drives the interpreter out of the
    processor's cache, and what runs between two copies then takes several times as long.
    """
    spans: list[Span] = []
    for (origin, size, part_bytes, _, _), target in zip(sources, targets, strict=True):
        assert size <= target.length, (size, target.length)
        spans.append((origin, target.address, size, part_bytes))
    return [found == source[3] for found, source in zip(_moved_many(spans), sources)]


def many_digests(payloads: Sequence[tuple[Buffer, int, int]]) -> list[bytes]:
    """As `part_digests` of each (payload, part_bytes, parts), with one look at all of them."""
    spans, rows = list[Span](), list[tuple[int, int, int]]()
    for which, (payload, part_bytes, parts) in enumerate(payloads):
        for first, last in runs(parts):
            start = first * part_bytes
            spans.append((payload.address + start, 0, min(payload.length, last * part_bytes) - start, part_bytes))
            rows.append((which, first, last))
    answers = [bytearray(8 * part_count(payload.length, part_bytes)) for payload, part_bytes, _ in payloads]
    for (which, first, last), found in zip(rows, _moved_many(spans), strict=True):
        answers[which][8 * first : 8 * last] = found
    return [bytes(each) for each in answers]


def _moved(origin: int, goal: int, length: int, part_bytes: int) -> bytes:
    return _moved_many([(origin, goal, length, part_bytes)])[0]


def _moved_many(spans: Sequence[Span]) -> list[bytes]:
    """Copies spans, and answers the digests of each one's parts: of what was written, not of what lies at the origin
    then. The caller holds all owners."""
    kernel = native.KERNEL
    if kernel is None or not all(_fits(length, part_bytes) for _, _, length, part_bytes in spans):
        some = kernel is not None and len(spans) > 1
        return [_moved(*span) if some and _fits(*span[2:]) else _moved_by_steps(*span) for span in spans]
    counts = [-(-length // part_bytes) for _, _, length, part_bytes in spans]
    found = (ctypes.c_uint64 * sum(counts))()
    size = sum(span[2] for span in spans)
    facts = (ctypes.c_int64 * (4 * len(spans)))(*chain.from_iterable(spans))
    (kernel.spans if size >= _SMALL_BYTES else kernel.spans_small)(facts, len(spans), found)
    row = bytes(found)
    if len(spans) == 1:
        return [row]
    ends = [8 * end for end in accumulate(counts)]
    return [row[end - 8 * count : end] for end, count in zip(ends, counts, strict=True)]


def _fits(length: int, part_bytes: int) -> bool:
    """Whether the kernel hashes parts of such lengths."""
    return part_bytes >= DIGEST_BYTES_MIN and (length % part_bytes or part_bytes) >= DIGEST_BYTES_MIN and length > 0


def _moved_by_steps(origin: int, goal: int, length: int, part_bytes: int) -> bytes:
    """The same of one span without the kernel: a step is hashed right after it was copied, out of the processor's
    cache."""
    values: list[int] = []
    at = goal or origin
    stride = max(1, STEP_BYTES // part_bytes) * part_bytes
    for start in range(0, length or 1, stride):
        size = min(stride, length - start)
        if goal:
            (_move if size >= _SMALL_BYTES else _move_small)(goal + start, origin + start, size)
        end = at + start + size
        parts = range(at + start, end, part_bytes) if size else (at,)
        values += [_digest(_MEMORY[part : min(part + part_bytes, end)]) for part in parts]
    return digest_rows(len(values)).pack(*values)


def copy_range_verified(source: Buffer, target: Buffer, span: range, part_bytes: int, digests: bytes) -> bool:
    """Copies bytes `span` of the entry `source` to the start of `target`, and says whether every part it touches has
    its digest. A part of which only some is wanted is hashed whole, right before its share is copied out of the
    processor's cache. After False the target is undefined."""
    if not span:
        return True
    start, stop, length = span.start, span.stop, source.length
    assert 0 <= start and stop <= length and stop - start <= target.length, (span, length, target.length)
    shift = target.address - source.address - start
    for first, last in _thirds(start, stop, length, part_bytes):
        begin, end = first * part_bytes, min(length, last * part_bytes)
        inside = start <= begin and end <= stop
        at = source.address + begin
        if _moved(at, at + shift if inside else 0, end - begin, part_bytes) != digests[8 * first : 8 * last]:
            return False
        if not inside:
            begin, end = max(begin, start), min(end, stop)
            move = _move if end - begin >= _SMALL_BYTES else _move_small
            move(source.address + begin + shift, source.address + begin, end - begin)
    return True


def _thirds(start: int, stop: int, length: int, part_bytes: int) -> Iterator[tuple[int, int]]:
    """The parts that bytes [start, stop) touch: the first where some of it is left out, those within, the last one."""
    first, last = start // part_bytes, -(-stop // part_bytes)
    low = first + (start % part_bytes > 0)
    high = max(low, last - (stop < min(length, last * part_bytes)))
    return ((a, b) for a, b in ((first, low), (low, high), (high, last)) if a < b)


def copy_parts(source: Buffer, target: Buffer, part_bytes: int, parts: int) -> None:
    """Copies the parts in the map to their own places in `target`; both spans cover the whole entry."""
    length = source.length
    _check_parts(length, target.length, part_bytes, parts)
    for first, last in runs(parts):
        start, stop = first * part_bytes, min(length, last * part_bytes)
        (_move if stop - start >= _SMALL_BYTES else _move_small)(
            target.address + start, source.address + start, stop - start
        )


def entry_digest(digests: bytes) -> bytes:
    """Digest of a whole entry: the xxh3-128 of its part digests, 16 bytes."""
    return xxhash.xxh3_128_digest(digests)


class _Tether:
    """What the memory of an exported view hangs on: tells that the last view is gone, and lets the owner go."""

    __slots__ = ("on_last_gone", "owner")

    def __init__(self, owner: object, on_last_gone: Callable[[], object]) -> None:
        self.owner = owner
        self.on_last_gone = on_last_gone

    def __del__(self) -> None:
        self.on_last_gone()


def exported(buffer: Buffer, on_last_gone: Callable[[], object], *, writable: bool = False) -> Bytes:
    """A uint8 array over the span that tells when the last view of it is gone.

    `on_last_gone` is called once, when the array and everything made from it (slices, casts, memoryviews, pickle
    buffers, torch or Arrow arrays over it) are gone: in any thread, at any bytecode, also while a lock is held. So it
    must do no more than append to a deque. A read-only array cannot be made writable again.
    """
    span = _Span.from_address(buffer.address if buffer.length else ctypes.addressof(_NOWHERE))
    span.owner = _Tether(buffer.owner, on_last_gone)  # type: ignore[attr-defined]
    memory = span if writable else memoryview(span).toreadonly()
    if not buffer.length:
        return _array(memory, 1)[:0]  # an array of its own would forget whose it is
    return _array(memory, buffer.length)
