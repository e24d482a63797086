"""Buffers: spans, copies, digests, and exports that tell when they end."""

from __future__ import annotations

import gc
import mmap
import random
import struct
import sys
import threading
from collections import deque
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import xxhash

from tests.unit.kv_engine import KERNELS, moved_by
from tiercache.buffers import (
    Buffer,
    Source,
    copy,
    copy_many,
    copy_many_verified,
    copy_parts,
    copy_range_verified,
    copy_verified,
    entry_digest,
    exported,
    new_bytes,
    part_digests,
    runs,
    verify_parts,
)
from tiercache.errors import ConfigError
from tiercache.model import all_parts, part_count

SIZES = (0, 1, 4095, 4096, 4097, 8192, 65_535, 65_536, 65_537, 300_000, 1 << 20)


@pytest.mark.parametrize("make", [bytes, bytearray, lambda b: memoryview(b)[3:], lambda b: np.frombuffer(b, np.uint8)])
def test_of_spans_any_contiguous_memory(make: object) -> None:
    memory = make(b"0123456789")  # type: ignore[operator]
    buffer = Buffer.of(memory)
    assert bytes(buffer) == bytes(memory) and len(buffer) == len(memory)
    assert bytes(buffer.slice(2, 3)) == bytes(memory)[2:5]
    assert bytes(buffer.view()) == bytes(memory)


def test_of_refuses_what_it_cannot_span() -> None:
    with pytest.raises(ConfigError, match="contiguous"):
        Buffer.of(memoryview(b"012345")[::2])
    with pytest.raises(ConfigError, match="read-only"):
        Buffer.of(b"012345", writable=True)
    assert bytes(Buffer.of(b"")) == b"" and Buffer.of(b"").array().size == 0


def test_of_wide_items_counts_bytes() -> None:
    wide = np.arange(6, dtype=np.int64).reshape(2, 3)
    assert bytes(Buffer.of(wide.data)) == wide.tobytes()
    wide.flags.writeable = False
    assert bytes(Buffer.of(wide.data)) == wide.tobytes()


def test_a_buffer_keeps_its_memory() -> None:
    memory = mmap.mmap(-1, 4096)
    buffer = Buffer.of(memory)
    with pytest.raises(BufferError):
        memory.close()
    del buffer
    memory.close()
    growing = bytearray(16)
    buffer = Buffer.of(growing)
    with pytest.raises(BufferError):
        growing.extend(b"x")
    view = buffer.slice(1, 3).view()
    del buffer, growing
    assert bytes(view) == bytes(3)


@pytest.mark.skipif(not __debug__, reason="asserts are off")
def test_slices_stay_inside() -> None:
    with pytest.raises(AssertionError):
        Buffer.of(b"0123").slice(2, 3)


@pytest.fixture(params=KERNELS, autouse=True)
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    """With the native kernel and without."""
    with moved_by(request.param):
        yield


def source_of(data: bytes | bytearray, part_bytes: int = 4096, digests: bytes = b"") -> Source:
    """`data` as the arena describes an entry to be copied."""
    span = Buffer.of(data)
    return span.address, span.length, part_bytes, digests, span


@pytest.mark.parametrize("size", SIZES)
def test_copies_and_new_bytes(size: int) -> None:
    data = random.Random(size).randbytes(size)
    value, room = new_bytes(size)
    copy(Buffer.of(data), room)
    assert value == data and type(value) is bytes and hash(value) == hash(data)
    target = bytearray(size + 2)
    copy_many([source_of(data)], [Buffer.of(target).slice(1, size + 1)])
    assert target == b"\0" + data + b"\0"


@pytest.mark.skipif(not __debug__, reason="asserts are off")
def test_a_copy_never_leaves_its_target() -> None:
    with pytest.raises(AssertionError):
        copy(Buffer.of(bytes(5)), Buffer.of(bytearray(4)))
    with pytest.raises(ConfigError):
        copy_verified(Buffer.of(bytes(5)), Buffer.of(bytearray(4)), 4096, 1, bytes(8))
    for call in (copy_parts, lambda s, t, p, m: copy_verified(s, t, p, m, bytes(80))):
        with pytest.raises(ConfigError, match="parts"):
            call(Buffer.of(bytes(5)), Buffer.of(bytearray(5)), 4096, 2)
    with pytest.raises(ConfigError, match="parts"):
        verify_parts(Buffer.of(bytes(5)), 4096, 2, bytes(80))


def test_runs_are_the_set_bits() -> None:
    rng = random.Random(1)
    for _ in range(500):
        parts = rng.getrandbits(64) & (rng.getrandbits(64) | -rng.randrange(2))
        found = list(runs(parts))
        assert [i for first, last in found for i in range(first, last)] == [i for i in range(64) if parts >> i & 1]
        assert all(a[1] < b[0] for a, b in pairwise(found))
    assert list(runs((1 << 64) - 1)) == [(0, 64)] and list(runs(0)) == []


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("part_bytes", [4096, 20_480, 65_536])
def test_digests_are_those_of_the_parts(size: int, part_bytes: int) -> None:
    data = random.Random(size).randbytes(size)
    if part_count(size, part_bytes) > 64:
        return
    digests = part_digests(Buffer.of(data), part_bytes)
    pieces = [data[at : at + part_bytes] for at in range(0, max(1, size), part_bytes)]
    assert digests == b"".join(struct.pack("<Q", xxhash.xxh3_64_intdigest(piece)) for piece in pieces)
    assert len(entry_digest(digests)) == 16
    everything = all_parts(size, part_bytes)
    assert verify_parts(Buffer.of(data), part_bytes, everything, digests)
    target = bytearray(b"\x77" * size)
    assert copy_verified(Buffer.of(data), Buffer.of(target), part_bytes, everything, digests) and target == data
    if not size:
        return
    for at in {0, size - 1, size // 2}:
        bad = bytearray(data)
        bad[at] ^= 4
        part = 1 << at // part_bytes
        for parts in (everything, part):
            assert not verify_parts(Buffer.of(bad), part_bytes, parts, digests)
            assert not copy_verified(Buffer.of(bad), Buffer.of(bytearray(size)), part_bytes, parts, digests)
        assert verify_parts(Buffer.of(bad), part_bytes, everything & ~part, digests)
        assert copy_verified(Buffer.of(bad), Buffer.of(bytearray(size)), part_bytes, everything & ~part, digests)


def test_many_are_copied_and_each_is_verified() -> None:
    """Entries of all sizes in one call; a damaged one is named and its neighbours are right."""
    rng = random.Random(5)
    datas = [rng.randbytes(size) for size in SIZES]
    steps = [rng.choice((20_480, 65_536)) for _ in SIZES]
    digests = [part_digests(Buffer.of(data), step) for data, step in zip(datas, steps, strict=True)]
    for damaged in (None, 0, 5, 10):
        sources = [bytearray(data) for data in datas]
        if damaged is not None:
            sources[damaged][-1:] = b"" if not sources[damaged] else bytes([sources[damaged][-1] ^ 1])
        targets = [bytearray(b"\x77" * (len(data) + 2)) for data in datas]
        good = copy_many_verified(
            [source_of(*facts) for facts in zip(sources, steps, digests, strict=True)],
            [Buffer.of(one).slice(1, len(one) - 1) for one in targets],
        )
        assert good == [i != damaged or not data for i, data in enumerate(datas)]
        assert targets == [b"\x77" + bytes(one) + b"\x77" for one in sources]


@pytest.mark.parametrize("part_bytes", [100, 4096, 65_536])
def test_a_range_is_copied_alone_and_every_part_that_it_touches_is_verified(part_bytes: int) -> None:
    rng = random.Random(part_bytes)
    size = 40 * part_bytes + 300
    data = rng.randbytes(size)
    digests = part_digests(Buffer.of(data), part_bytes)
    edges = [0, 1, part_bytes - 1, part_bytes, part_bytes + 1, 3 * part_bytes, size - 301, size - 300, size - 1, size]
    for _ in range(200):
        start, stop = sorted(rng.choices(edges, k=2) if rng.random() < 0.5 else rng.choices(range(size + 1), k=2))
        target = bytearray(b"\x33" * (stop - start + 2))
        into = Buffer.of(target).slice(1, stop - start + 1)
        assert copy_range_verified(Buffer.of(data), into, range(start, stop), part_bytes, digests)
        assert target == b"\x33" + data[start:stop] + b"\x33"
        bad = bytearray(data)
        at = rng.randrange(size)
        bad[at] ^= 1
        first, last = start // part_bytes * part_bytes, -(-stop // part_bytes) * part_bytes
        same = copy_range_verified(Buffer.of(bad), into, range(start, stop), part_bytes, digests)
        assert same == (start == stop or not first <= at < last)


def test_partial_copies_leave_the_rest_alone() -> None:
    rng = random.Random(3)
    size, part_bytes = 1_000_003, 16_384
    data = rng.randbytes(size)
    digests = part_digests(Buffer.of(data), part_bytes)
    for _ in range(50):
        parts = rng.getrandbits(64) & all_parts(size, part_bytes)
        expected = bytearray(b"\x33" * size)
        for part in range(62):
            if parts >> part & 1:
                expected[part * part_bytes : (part + 1) * part_bytes] = data[
                    part * part_bytes : (part + 1) * part_bytes
                ]
        for verified in (True, False):
            target = bytearray(b"\x33" * size)
            if verified:
                assert copy_verified(Buffer.of(data), Buffer.of(target), part_bytes, parts, digests)
            else:
                copy_parts(Buffer.of(data), Buffer.of(target), part_bytes, parts)
            assert target == expected


def test_an_export_ends_with_its_last_view() -> None:
    """NumPy makes every view of a view a view of the first array, so nothing outlives what that array hangs on."""
    gone: deque[int] = deque()
    memory = bytearray(b"0123456789")
    array = exported(Buffer.of(memory), lambda: gone.append(1))
    tail = array[2:]
    wide = tail.view(np.uint16)[1:].reshape(1, -1)
    view = wide.T.data
    del array, tail
    assert not gone
    del wide
    assert not gone
    again = np.asarray(view)
    del view
    assert not gone and again.tobytes() == b"456789"
    del again
    assert list(gone) == [1]
    gc.collect()
    assert list(gone) == [1]


def test_an_export_ends_in_whatever_holds_it_last() -> None:
    import pickle

    gone: deque[str] = deque()
    memory = bytearray(64)

    def export(name: str) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        return exported(Buffer.of(memory), lambda: gone.append(name))

    held: list[object] = [
        pickle.PickleBuffer(export("pickle").data),
        np.from_dlpack(exported(Buffer.of(memory), lambda: gone.append("dlpack"), writable=True)),
        export("memoryview").data[1:].cast("B").toreadonly(),
        iter(export("iterator")),
        Buffer.of(export("buffer").data).slice(1, 2),
        Buffer.of(export("view").data).slice(1, 2).view(),
        np.frombuffer(export("frombuffer"), np.uint32),
        export("empty")[:0],
    ]
    assert not gone
    while held:
        held.pop()
    assert list(gone) == ["empty", "frombuffer", "view", "buffer", "iterator", "memoryview", "dlpack", "pickle"]


def test_an_export_in_a_cycle_ends_with_the_cycle() -> None:
    gone: deque[int] = deque()
    cycle: list[object] = [exported(Buffer.of(bytearray(8)), lambda: gone.append(1))]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert list(gone) == [1]


def test_an_export_ends_in_the_thread_that_lets_go() -> None:
    gone: deque[str] = deque()
    held = [exported(Buffer.of(bytearray(8)), lambda: gone.append(threading.current_thread().name))]
    thread = threading.Thread(target=held.clear, name="last")
    thread.start()
    thread.join()
    assert list(gone) == ["last"]


def test_exports_are_read_only_for_good() -> None:
    array = exported(Buffer.of(bytearray(8)), lambda: None)
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        array.flags.writeable = True
    assert array.data.readonly
    memory = bytearray(8)
    exported(Buffer.of(memory), lambda: None, writable=True)[0] = 7
    assert memory[0] == 7


def test_empty_exports_end_too() -> None:
    gone: deque[int] = deque()
    array = exported(Buffer(0, 0, None), lambda: gone.append(1))
    assert array.size == 0 and not gone
    del array
    assert list(gone) == [1]


def test_the_owner_lives_as_long_as_the_export() -> None:
    memory = mmap.mmap(-1, 4096)
    memory[:4] = b"here"
    array = exported(Buffer.of(memory), lambda: None)[:4]
    with pytest.raises(BufferError):
        memory.close()
    assert array.tobytes() == b"here"
    del array
    memory.close()


def test_large_copies_release_the_interpreter() -> None:
    """Another thread runs during a copy, while nothing else makes this one give the interpreter away."""
    source, target = Buffer.of(bytearray(32 << 20)), Buffer.of(bytearray(32 << 20))
    go, ran = threading.Event(), list[int]()

    def run() -> None:
        go.wait()
        ran.append(1)

    thread = threading.Thread(target=run)
    thread.start()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)
    try:
        go.set()
        for _ in range(100):
            copy(source, target)
            if ran:
                break
        assert ran
    finally:
        sys.setswitchinterval(interval)
        thread.join()
