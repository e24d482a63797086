"""The extent table: what a second mapping of a segment finds, whole or damaged, alive or left by a killed process."""

from __future__ import annotations

import asyncio
import mmap
import os
import random
import struct
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tiercache.buffers import Buffer, verify_parts
from tiercache.cpu import layout
from tiercache.cpu.tier import MemoryTier
from tiercache.errors import ProtocolError
from tiercache.model import PART_BYTES, Name
from tiercache.testing.tiers import MIB, SHAPES, Item, item, store

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="memory files are Linux's")


@pytest.fixture
def tier() -> Iterator[MemoryTier]:
    tier = MemoryTier(24 * MIB)
    yield tier
    asyncio.run(tier.close())


def mapped(tier: MemoryTier, segment: int = 0) -> mmap.mmap:
    """The segment, mapped a second time."""
    descriptor = tier.arena.segments[segment].fd
    assert descriptor is not None
    return mmap.mmap(descriptor, 0)


def test_formats_are_packed_alike() -> None:
    """NumPy's rows and the structs that write and read them agree in every field."""
    values = (b"k" * 32, b"p" * 32, *range(3, 12), 0.5, *range(13, 18))
    state = struct.pack("<BBIQ", 18, 19, 20, 21)
    row = np.frombuffer(layout.ROW_FIELDS.pack(*values) + state + bytes(128), layout.ROW)[0]
    assert layout.ROW.names is not None
    found = [row[name].tobytes() if i < 2 else row[name].item() for i, name in enumerate(layout.ROW.names[:-1])]
    assert found == [*values, 18, 19, 20, 21]
    assert layout.SHAPE.unpack_from(row.tobytes(), layout.SHAPE_AT) == tuple(
        int(row[name])
        for name in ("size", "offset_pages", "length_pages", "generation", "ordinal", "part_bytes", "state", "parts")
    )
    identity = [row[name].item() for name in ("expiry_s", "width", "form", "retired", "state")]
    assert layout.IDENTITY.unpack_from(row.tobytes()) == (row["key"].tobytes(), *identity)
    for name in ("size", "generation", "next", "width", "retired", "state", "check", "parts"):
        at = layout.SHAPE_AT if name == "size" else getattr(layout, f"{name.upper()}_AT")
        assert layout.ROW.fields is not None and layout.ROW.fields[name][1] == at
    assert layout.ROW.fields["digests"][1] == layout.DIGESTS_AT
    assert all(layout.ROW.fields[name][1] % 8 == 0 for name in ("generation", "parts")), "in one piece"


def test_a_second_mapping_finds_every_present_extent(tier: MemoryTier) -> None:
    items = [item(seed, size, part_bytes) for seed, (size, part_bytes) in enumerate(SHAPES)]
    items.append(item(99, MIB, parts=0b1000_0000_0010_0000))
    locations = asyncio.run(store(tier, items))
    tier.reserve([Name(bytes(16), 5)], [100], [4096])  # pending: not for anybody else
    tier.free(locations[2:4])
    kept = {locations[i]: one for i, one in enumerate(items) if i not in (2, 3)}
    memory = mapped(tier)
    found = list(layout.read_table(memory))
    assert [f.payload for f in found] == [one.payload for one in sorted(kept.values(), key=lambda o: o.payload.tick)]
    assert {0 << 52 | f.row << 32 | f.generation for f in found} == set(kept)
    assert all(f.state == layout.PRESENT and not f.retired for f in found)
    assert len(list(layout.read_table(memory, pending=True))) == len(found) + 1
    for one in found:
        span = Buffer.of(memory).slice(one.offset, one.payload.size)
        assert verify_parts(span, one.payload.part_bytes, one.payload.parts, one.payload.digests)


def test_foreign_memory_is_no_segment(tier: MemoryTier) -> None:
    asyncio.run(store(tier, [item(1)]))
    good = bytearray(bytes(mapped(tier))[: 4 * MIB])
    for at, value in ((0, b"NOT"), (8, b"\2"), (12, b"\0\0"), (16, b"\1"), (24, b"\7"), (28, b"\xff\xff\xff\0")):
        bad = bytearray(good)
        bad[at : at + len(value)] = value
        with pytest.raises(ProtocolError):
            list(layout.read_table(memoryview(bad)))
    for short in (b"", bytes(100), bytes(4096)):
        with pytest.raises(ProtocolError):
            list(layout.read_table(memoryview(short)))


def test_damaged_rows_are_left_out() -> None:
    """Any bytes in the table: no exception, no extent outside the segment, none over another, none of odd shape."""
    tier = MemoryTier(MIB)
    asyncio.run(store(tier, [item(seed, 20_000 + seed, 4096) for seed in range(12)]))
    memory = mapped(tier)
    whole = bytes(memory)
    at = tier.arena.segments[0].row_at(0)
    asyncio.run(tier.close())
    rng = random.Random(4)
    for _ in range(300):
        bad = bytearray(whole)
        for _ in range(rng.randrange(1, 30)):
            bad[at + rng.randrange(16 * layout.ROW_BYTES)] = rng.choice((0, 1, 2, 3, 255, rng.randrange(256)))
        end = 4096
        for found in layout.read_table(memoryview(bad)):
            assert end <= found.offset and found.offset + found.length <= MIB and found.payload.size <= found.length
            assert len(found.payload.name.key) in (16, 32) and found.payload.parts
            end = found.offset + found.length


@pytest.mark.slow
def test_at_every_line_the_table_shows_only_whole_extents(tier: MemoryTier) -> None:
    """As if the process were killed before each line of the tier, arena and segment that a churn executes."""
    items = [item(seed, 9_000 + seed, 512 if seed % 3 else 4096, None if seed % 2 else 0b11) for seed in range(12)]
    expected = {one.payload.name: one.payload for one in items}
    asyncio.run(store(tier, [item(99, 1)]))
    memory = mapped(tier)
    files = {layout.__file__.replace("layout", name) for name in ("tier", "arena", "segment")}
    lines: set[tuple[str, int]] = set()
    wrong: list[object] = []

    def step(frame: FrameType, event: str, _: object) -> object:
        if frame.f_code.co_filename not in files:
            return None
        sys.settrace(None)
        lines.add((frame.f_code.co_name, frame.f_lineno))
        for one in layout.read_table(memory):
            span = Buffer.of(memory).slice(one.offset, one.payload.size)
            payload = expected.get(one.payload.name)
            partly = payload is not None and one.payload == payload
            good = verify_parts(span, one.payload.part_bytes, one.payload.parts, one.payload.digests)
            if payload is not None and not (partly and good):
                wrong.append((frame.f_code.co_name, frame.f_lineno, partly, good))
        sys.settrace(step)  # type: ignore[arg-type]
        return step

    async def churn() -> None:
        rng, held = random.Random(1), list[int]()
        for _ in range(14):
            held += await store(tier, rng.sample(items, 2))
            rng.shuffle(held)
            while len(held) > 5:
                tier.free([held.pop()])

    before = sys.gettrace()
    sys.settrace(step)  # type: ignore[arg-type]
    try:
        asyncio.run(churn())
    finally:
        sys.settrace(before)
    assert wrong == []
    assert len({name for name, _ in lines} & {"make_row", "drop_row", "add_parts", "_write"}) == 4, lines


CHURN = """
import asyncio, random, sys
from tiercache.cpu.tier import MemoryTier
from tiercache.testing.tiers import item, store

async def main():
    tier = MemoryTier(8 << 20)
    items = [
        item(seed, 150_000 + seed * 7, 4096 if seed % 3 else 65_536, None if seed % 2 else 0b11) for seed in range(40)
    ]
    held = []
    rng = random.Random(int(sys.argv[1]))
    turn = 0
    while True:
        held += [at for at in await store(tier, rng.sample(items, 3)) if at >= 0]
        if turn == 0:
            print(tier.arena.segments[0].fd, flush=True)
        if turn > 20:
            print(turn, flush=True)
        rng.shuffle(held)
        while len(held) > 15:
            tier.free([held.pop()])
        turn += 1

asyncio.run(main())
"""


@pytest.mark.slow
def test_a_killed_owner_leaves_only_whole_extents() -> None:
    """Processes are killed while they write and free; what their tables show has the bytes that its digests name."""
    expected: dict[Name, Item] = {}
    for seed in range(40):
        made = item(seed, 150_000 + seed * 7, 4096 if seed % 3 else 65_536, None if seed % 2 else 0b11)
        expected[made.payload.name] = made
    for kill in range(4):
        with subprocess.Popen([sys.executable, "-c", CHURN, str(kill)], stdout=subprocess.PIPE, text=True) as owner:
            assert owner.stdout is not None
            descriptor = int(owner.stdout.readline())
            with open(f"/proc/{owner.pid}/fd/{descriptor}", "r+b") as file:
                memory = mmap.mmap(file.fileno(), 0)
            for _ in range(1 + kill * 37):
                owner.stdout.readline()
            owner.kill()
        found = list(layout.read_table(memory))
        assert found
        for one in found:
            assert one.payload == expected[one.payload.name].payload
            span = Buffer.of(memory).slice(one.offset, one.payload.size)
            assert verify_parts(span, one.payload.part_bytes, one.payload.parts, one.payload.digests)
        assert all(one.payload.part_bytes in (4096, PART_BYTES) for one in found)
