"""The arena: one cap, stale locations, tables in place, threads, forks."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import select
import sys
import threading
import warnings
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

from tiercache.buffers import Buffer, part_digests
from tiercache.cpu import arena as arena_module
from tiercache.cpu import freespace
from tiercache.cpu import segment as segment_module
from tiercache.cpu.arena import Arena
from tiercache.cpu.prefault import Prefault
from tiercache.cpu.tier import MemoryTier
from tiercache.errors import ClosedError, ConfigError
from tiercache.model import PART_BYTES, Name, Outcome, Payload, all_parts, part_count
from tiercache.tier import Want

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

MIB = 1 << 20


def shape(size: int, part_bytes: int = PART_BYTES, ordinal: int = 0) -> Payload:
    return Payload(Name(bytes(16), ordinal), size, part_bytes, 0, b"")


def file_bytes(arena: Arena) -> int:
    """What the segments' memory files add up to, asked from the system."""
    return sum(os.fstat(segment.fd).st_size for segment in arena.segments if segment.fd is not None)


@pytest.mark.parametrize("capacity", [0, 1, 4096, 8192, 12_288, 16_384, 100_000, MIB, 3 * MIB + 5, 10 * MIB])
@pytest.mark.parametrize("segment", [12_288, MIB, 1 << 30])
def test_never_over_its_cap_also_while_growing(capacity: int, segment: int) -> None:
    arena = Arena(capacity, segment_bytes=segment)
    rng = random.Random(capacity)
    held: list[int] = []
    for _ in range(400):
        (location,) = arena.reserve([shape(rng.choice((0, 1, 4096, 5000, 70_000, MIB)))])
        if location >= 0:
            held.append(location)
        elif held:
            arena.release([held.pop(rng.randrange(len(held)))])
        assert arena.used_bytes <= file_bytes(arena) <= capacity
    arena.close()


def test_largest_entry_fits_and_no_larger() -> None:
    for capacity in (12_288, MIB, 5 * MIB + 1, 9 * MIB):
        arena = Arena(capacity, segment_bytes=4 * MIB)
        most = arena.entry_bytes_max
        assert most > 0
        assert arena.reserve([shape(most + 1, MIB)]) == [Outcome.FULL]
        assert arena.used_bytes == 0, "a segment was made in vain"
        assert arena.reserve([shape(most, MIB)])[0] >= 0
        arena.close()
    assert Arena(8192).entry_bytes_max == 0


def test_nothing_leaks_over_many_reserves() -> None:
    """10^5 random reserves and frees: in the end only headers and tables are in use, and the tables stopped growing."""
    arena = Arena(8 * MIB, segment_bytes=2 * MIB)
    rng = random.Random(5)
    held: list[int] = []
    table_bytes = 0
    for step in range(50_000):
        count = rng.choice((4096, 30_000, 300_000))
        (location,) = arena.reserve([shape(count, rng.choice((4096, 8192)) if count < 250_000 else 4864)])
        if location >= 0:
            held.append(location)
        if location < 0 or len(held) > 40:
            arena.release([held.pop(rng.randrange(len(held))) for _ in range(min(4, len(held)))])
        if step == 25_000:
            table_bytes = sum(len(s._chunks) for s in arena.segments)
    arena.release(held)
    assert sum(len(s._chunks) for s in arena.segments) == table_bytes
    assert arena.used_bytes == sum(4096 + len(s._chunks) * s.chunk_pages * 4096 for s in arena.segments)
    arena.close()


@pytest.mark.parametrize("size", [499_712, 562_176, 1_124_352, MIB])
def test_little_of_the_cap_is_not_payload(size: int) -> None:
    """Headers, tables and rounding together, at real block sizes: at most 5 % of 256 MiB."""
    arena = Arena(256 * MIB)
    count = 0
    while arena.reserve([shape(size)])[0] >= 0:
        count += 1
    assert count * size >= 0.95 * 256 * MIB, count * size / (256 * MIB)
    arena.close()


def test_small_extents_fill_a_segment_whose_table_grows() -> None:
    """One page each: rows for all of them come out of the segment, and 15 of 16 bytes stay for extents."""
    arena = Arena(4 * MIB)
    count = 0
    while arena.reserve([shape(4096)])[0] >= 0:
        count += 1
    assert count >= 4 * MIB // 4096 * 15 // 16 - 2
    arena.close()


def test_a_freed_row_is_recognised_however_often_it_was_used() -> None:
    arena = Arena(MIB)
    old: list[int] = []
    for _ in range(50):
        (location,) = arena.reserve([shape(5000)])
        assert location not in old
        assert all(arena.find(stale) is None for stale in old)
        arena.release(old)
        assert arena.find(location) is not None
        arena.release([location])
        old.append(location)
    with pytest.raises(LookupError, match="freed"):
        arena.need(old[0])
    arena.close()
    with pytest.raises(ClosedError):
        arena.need(old[0])
    assert arena.reserve([shape(1)]) == [Outcome.FULL]


def test_impossible_shapes_are_refused_by_name() -> None:
    arena = Arena(MIB)
    for payload in (shape(-1), shape(10, 0), shape(65, 1), Payload(Name(b"short"), 1, 4096, 0, b"")):
        with pytest.raises(ConfigError):
            arena.reserve([payload])
    (location,) = arena.reserve([shape(5000, 4096)])
    for parts, digests in ((0b100, bytes(24)), (0b11, bytes(8))):
        with pytest.raises(ConfigError, match="parts"):
            arena.commit(location, parts, digests)
    for capacity, segment in ((-1, MIB), (MIB, 4096)):
        with pytest.raises(ConfigError, match="impossible"):
            Arena(capacity, segment_bytes=segment)
    arena.close()


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="memory files are Linux's")
def test_segments_are_sealed_against_resizing() -> None:
    arena = Arena(MIB)
    arena.reserve([shape(1)])
    descriptor = arena.segments[0].fd
    assert descriptor is not None
    for size in (0, 2 * MIB):
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, size)
    arena.close()
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        os.fstat(descriptor)


def test_without_memory_files_everything_else_works() -> None:
    arena = Arena(MIB, shareable=False)
    (location,) = arena.reserve([shape(5000)])
    assert arena.segments[0].fd is None
    assert len(arena.need(location).span) == 5000
    arena.close()


def test_no_memory_for_a_segment_is_full_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, size_bytes: int) -> int:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    tier = MemoryTier(MIB)
    with monkeypatch.context() as patch:
        patch.setattr(segment_module, "_memory_file", refuse)
        assert tier.reserve([Name(bytes(16))], [1], [4096]) == [Outcome.FULL]
        assert "Cannot allocate memory" in tier.status().reason
    assert tier.reserve([Name(bytes(16))], [1], [4096])[0] >= 0
    assert tier.status().reason == ""
    asyncio.run(tier.close())


def test_memory_is_populated_ahead_of_its_use() -> None:
    asked: list[tuple[int, int]] = []
    done = threading.Event()

    def populate(address: int, length: int) -> None:
        asked.append((address, length))
        done.set()

    prefault = Prefault(populate)
    arena = Arena(512 * MIB, prefault=prefault)
    arena.release(arena.reserve([shape(MIB)], sparse=True))
    assert prefault._thread is None, "of what may never be filled nothing is made ready"
    locations = arena.reserve([shape(MIB)] * 200)
    assert done.wait(10)
    prefault.stop()
    first = arena.need(locations[0]).span
    assert asked and asked[0][0] == first.address + MIB, "it begins behind the first extent"
    last = arena.segments[0].span.address + 512 * MIB
    assert all(first.address < address and address + length <= last for address, length in asked)
    arena.close()


def read(tier: MemoryTier, location: int, payload: Payload, verify: bool) -> tuple[Outcome, bytes]:
    target = bytearray(payload.size)
    want = Want(location, payload.name, payload.size, payload.part_bytes, payload.parts)
    return tier.read_now([want], [Buffer.of(target)], verify=verify)[0], bytes(target)


@pytest.mark.slow
@pytest.mark.parametrize("verify", [True, False])
def test_a_copy_that_loses_its_extent_is_a_miss(verify: bool) -> None:
    """Readers without any pin race with an owner that frees and refills: a hit has the bytes of its name, always."""
    tier = MemoryTier(2 * MIB)
    datas = {n: bytes([n]) * 90_000 for n in range(24)}
    made = {
        n: Payload(Name(bytes(16), n), 90_000, PART_BYTES, 3, part_digests(Buffer.of(data), PART_BYTES))
        for n, data in datas.items()
    }
    at: dict[int, int] = {}
    stop = threading.Event()
    seen: list[Outcome] = []
    wrong: list[tuple[int, Outcome]] = []

    def reader(seed: int) -> None:
        rng = random.Random(seed)
        while not stop.is_set():
            number = rng.randrange(24)
            location = at.get(number)
            if location is not None:
                outcome, data = read(tier, location, made[number], verify)
                seen.append(outcome)
                if outcome == Outcome.CORRUPT or (outcome == Outcome.HIT and data != datas[number]):
                    wrong.append((number, outcome))

    async def churn() -> None:
        rng = random.Random(99)
        for _ in range(4_000):
            number = rng.randrange(24)
            if number in at:
                tier.free([at[number]])  # readers may still use the location: that is the race
                if rng.random() < 0.5:
                    del at[number]
                    continue
            (location,) = await tier.write([made[number]], [Buffer.of(datas[number])])
            if location >= 0:
                at[number] = location
            else:
                at.pop(number, None)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=reader, args=(seed,)) for seed in range(3)]
    try:
        for thread in threads:
            thread.start()
        asyncio.run(churn())
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    assert wrong == []
    assert Outcome.HIT in seen and Outcome.MISS in seen
    asyncio.run(tier.close())


@pytest.mark.slow
def test_threads_reserve_and_release_without_losing_a_page() -> None:
    """Extents that threads hold at once never overlap, and afterwards every page is back.

    The threads give the interpreter away at random lines of the arena and of the free space, which a switch interval
    alone does not bring about often enough.
    """
    arena = Arena(4 * MIB, segment_bytes=MIB)
    wrong: list[object] = []
    barrier = threading.Barrier(4, timeout=10)

    def work(seed: int) -> None:
        rng = random.Random(seed)
        held: list[int] = []
        for turn in range(120):
            if turn % 30 == 29:
                barrier.wait()  # all hold what they hold: compare
                mine = [(arena.need(at).span.address, at) for at in held]
                spans.extend((address, len(arena.need(at).span)) for address, at in mine)
                if barrier.wait() == 0:
                    ordered = sorted(spans)
                    wrong.extend(pair for pair in pairwise(ordered) if pair[0][0] + pair[0][1] > pair[1][0])
                    spans.clear()
                barrier.wait()
            held += [at for at in arena.reserve([shape(rng.randrange(1, 60_000), 4096)]) if at >= 0]
            rng.shuffle(held)
            while len(held) > 12:
                arena.release([held.pop()])
        arena.release(held)

    spans: list[tuple[int, int]] = []
    files = {freespace.__file__, arena_module.__file__, segment_module.__file__}
    dice = random.Random(1)

    def step(frame: FrameType, event: str, _: object) -> object:
        if frame.f_code.co_filename not in files:
            return None
        if dice.random() < 0.1:
            select.select([], [], [], 1e-5)  # long enough for another thread to take over
        return step

    threading.settrace(step)  # type: ignore[arg-type]
    try:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        threading.settrace(None)
    assert wrong == []
    assert arena.used_bytes == sum(4096 + len(s._chunks) * s.chunk_pages * 4096 for s in arena.segments)
    arena.close()


@pytest.mark.slow
def test_threads_commit_parts_of_one_extent() -> None:
    """Each thread commits its own parts; none is lost, and every digest is that of its part."""
    tier = MemoryTier(8 * MIB)
    data = random.Random(1).randbytes(64 * 4096)
    rows = part_digests(Buffer.of(data), 4096)
    for turn in range(30):
        (location,) = tier.reserve([Name(bytes(16), turn)], [len(data)], [4096])
        tier.buffers([location])[0].array()[:] = memoryview(data)
        barrier = threading.Barrier(4)

        def work(parts: Sequence[int], location: int = location, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            for part in parts:
                tier.commit([location], [1 << part], [rows])

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        threads = [threading.Thread(target=work, args=(range(i, 64, 4),)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
        (payload,) = tier.payloads([location])
        assert payload.parts == all_parts(len(data), 4096) and payload.digests == rows
        assert read(tier, location, payload, True) == (Outcome.HIT, data)
        tier.free([location])
    asyncio.run(tier.close())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_finds_the_arena_closed() -> None:
    """The memory is shared with the parent, the book-keeping is not: a child that used both would destroy entries."""
    tier = MemoryTier(64 * MIB)
    (location,) = asyncio.run(tier.write([shape(0)], [Buffer.of(b"")]))
    name = Name(bytes(16))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of forking beside threads
        child = os.fork()
    if child == 0:
        good = tier.arena.closed and tier.reserve([name], [1], [4096]) == [Outcome.FULL]
        good = good and tier.read_now([Want(location, name, 0, PART_BYTES, 1)], [Buffer.of(b"")]) == [Outcome.MISS]
        os._exit(0 if good else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not tier.arena.closed and tier.reserve([name], [1], [4096])[0] >= 0
    assert part_count(0, 4096) == 1
    asyncio.run(tier.close())


def test_a_cancelled_write_leaves_nothing() -> None:
    async def check() -> None:
        tier = MemoryTier(32 * MIB)
        data = bytes(5 * MIB)
        source = Buffer.of(data)
        payload = Payload(Name(bytes(16)), len(data), 1 << 17, 1, part_digests(source, 1 << 17))
        await tier.write([payload], [source])
        before = tier.status().used_bytes
        task = asyncio.create_task(tier.write([payload] * 4, [source] * 4))
        await asyncio.sleep(0)
        assert tier.status().used_bytes > before
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert tier.status().used_bytes == before
        await tier.close()

    asyncio.run(check())
