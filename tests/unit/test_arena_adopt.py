"""Adoption: an arena goes on where a dead owner of its memory left off, with all that is right and nothing else."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import mmap
import os
import random
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.descriptors import Descriptors
from tiercache.buffers import Buffer, part_digests, verify_parts
from tiercache.cpu import layout
from tiercache.cpu.tier import MemoryTier
from tiercache.cpu.view import ArenaView
from tiercache.errors import ConfigError, ProtocolError
from tiercache.index import Index
from tiercache.model import PART_BYTES, Form, Name, Outcome, Payload, TierId, all_parts
from tiercache.policy.lru import LRU
from tiercache.testing.tiers import MIB, SHAPES, Item, item, store

if TYPE_CHECKING:
    from types import FrameType

    from tiercache.cpu.adopt import Adopted

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="memory files are Linux's")

ID = b"of test adoption"


def new(capacity_bytes: int = 24 * MIB, segment_bytes: int = 1 << 30) -> MemoryTier:
    return MemoryTier(capacity_bytes, segment_bytes=segment_bytes, arena_id=ID)


def files(tier: MemoryTier) -> list[tuple[int, int]]:
    return [(segment.ordinal, segment.fd) for segment in tier.segments if segment.fd is not None]


def heir(tier: MemoryTier, capacity_bytes: int | None = None) -> tuple[MemoryTier, Adopted]:
    """A new tier with the memory of an old one, whose owner does nothing more."""
    fresh = new(tier.arena.capacity_bytes if capacity_bytes is None else capacity_bytes)
    adopted = fresh.adopt(files(tier))
    asyncio.run(tier.close())
    return fresh, adopted


def named(adopted: Adopted) -> dict[int, tuple[Name, int]]:
    """location -> name and parts, of all facts."""
    return {
        location: (Name(key.tobytes()[:width], ordinal), parts)
        for facts in adopted.facts()
        for location, key, width, ordinal, parts in zip(
            facts.locations.tolist(), facts.keys, facts.widths.tolist(), facts.ordinals.tolist(), facts.parts.tolist(),
            strict=True,
        )
    }  # fmt: skip


def reads(tier: MemoryTier, location: int, one: Item) -> bool:
    """Whether the item is there, as it was put."""
    (payload,) = tier.payloads([location])
    span = tier.buffers([location])[0]
    return payload == one.payload and verify_parts(span, payload.part_bytes, payload.parts, one.payload.digests)


def tables_bytes(tier: MemoryTier) -> int:
    return sum(4096 * pages for segment in tier.segments for _, pages in segment.table_pages)


def test_every_state_of_a_row_is_adopted() -> None:
    tier = new(24 * MIB, 6 * MIB)
    items = [item(seed, size, step) for seed, (size, step) in enumerate(SHAPES)]
    items += [item(50, MIB, 20_480, parts=1 << 40 | 1), item(51, 64 * 512, 512)]
    at = dict(zip(asyncio.run(store(tier, items)), items, strict=True))
    gone, *retired = list(at)[3:6]
    tier.free([gone])
    tier.retire(retired)
    shapes = ((100, 4096), (64 * 512, 512))
    pending = [tier.reserve([Name(bytes(16), 5)], [size], [step])[0] for size, step in shapes]
    before = tier.status().used_bytes
    fresh, adopted = heir(tier)
    assert fresh.status().used_bytes == before
    assert set(adopted.pending) == set(pending) and not adopted.lost
    found = named(adopted)
    assert {where: (one.payload.name, one.payload.parts) for where, one in at.items() if where in found} == found
    assert set(found) == set(at) - {gone, *retired}
    assert all(reads(fresh, where, at[where]) for where in (*found, *retired))
    assert len(fresh.buffers(pending)[1]) == 64 * 512, "whoever fills it still finds its place"
    assert adopted.orphans() == retired and adopted.orphans() == []
    fresh.free(retired[:1])
    fresh.free([next(iter(found))])
    assert fresh.status().used_bytes == before and reads(fresh, retired[0], at[retired[0]]), "nothing is reused yet"
    adopted.settle()
    adopted.settle()
    alive = {*found, retired[1]} - {next(iter(found))}
    assert all(fresh.arena.find(where) is None for where in (*pending, retired[0], next(iter(found))))
    assert all(reads(fresh, where, at[where]) for where in alive)
    fresh.free(list(alive))
    assert fresh.status().used_bytes == tables_bytes(fresh)
    asyncio.run(fresh.close())


def test_facts_tell_the_index_all_it_knew() -> None:
    """Files, lone entries, chains and expiries come back; what lies deeper waits for its parent."""
    tier = new()
    data = random.Random(1).randbytes(10_000)

    def put(payload: Payload) -> int:
        (location,) = tier.reserve([Name(payload.name.key)], [payload.size], [payload.part_bytes])
        with pytest.raises(ConfigError, match="not reserved for this"):
            tier.describe([location], [Payload(Name(b"other key, no"), payload.size, payload.part_bytes, 0, b"")])
        tier.describe([location], [payload])
        tier.buffers([location])[0].array()[:] = memoryview(data)
        tier.commit([location], [payload.parts], [payload.digests])
        with pytest.raises(ConfigError, match="before the first commit"):
            tier.describe([location], [payload])
        return location

    def payload(name: Name, form: Form, tick: int, parent: bytes = b"") -> Payload:
        digests = part_digests(Buffer.of(data), 4096)
        return Payload(name, 10_000, 4096, 7, digests, parent=parent, form=form, tick=tick, scope=3, expiry_s=99)

    chain = [bytes([i]) * 16 for i in range(1, 5)]
    made = [payload(Name(chain[i], i), Form.BLOCK, 10 - i, chain[i - 1] if i else b"") for i in (3, 1, 0, 2)]
    made += [payload(Name(b"f" * 32, page), Form.PAGE, 50 + page) for page in (9, 4)]
    made += [payload(Name(b"l" * 16), Form.LONE, 70)]
    at = {put(one): one for one in made}
    fresh, adopted = heir(tier)
    batches = list(adopted.facts(batch_bytes=20_000))
    assert [len(facts.sizes) for facts in batches] == [2, 2, 2, 1]
    order = [at[where] for facts in batches for where in facts.locations.tolist()]
    assert [one.form for one in order] == [Form.LONE, Form.PAGE, Form.PAGE] + 4 * [Form.BLOCK]
    assert [one.tick for one in order[:3]] == [70, 59, 54], "the last first"
    assert [one.name.ordinal for one in order[3:]] == [0, 1, 2, 3], "parents first, in whatever batch"
    ticks = [tick for facts in batches for tick in facts.ticks.tolist()]
    assert sorted(order, key=lambda one: one.tick) == [one for _, one in sorted(zip(ticks, order, strict=True))]
    index = Index(100, [LRU(), LRU()])
    for facts in adopted.facts(batch_bytes=20_000):
        loaded = index.load(facts, TierId.MEMORY)
        index.validate()
        assert loaded.taken == len(facts.sizes) and not len(loaded.surplus) and not len(loaded.waiting)
    for where, one in at.items():
        match = index.match([one.name])
        found = index.facts(match.slots)
        assert (found.memory_location[0], found.memory_parts[0], found.expiry_s[0]) == (where, 7, 99)
        assert index.parents(match.slots) == [one.parent]
        index.release(match)
    chained = index.match_chain(chain)
    assert len(chained.slots) == 4
    index.release(chained)
    asyncio.run(fresh.close())


Operation = tuple[str, int, int]
operations = st.lists(
    st.tuples(
        st.sampled_from(("store", "store", "store", "reserve", "commit", "free", "free", "retire")),
        st.integers(0, 1000),
        st.sampled_from((0, 1, 5000, 40_000, 64 * 512, 300_000)),
    ),
    max_size=40,
)


def run(tier: MemoryTier, steps: list[Operation]) -> tuple[dict[int, Item], set[int], set[int]]:
    """What is there after it: items by location, and which of them are pending or retired."""
    at: dict[int, Item] = {}
    pending: set[int] = set()
    retired: set[int] = set()
    for number, (what, dice, size) in enumerate(steps):
        one = item(number, size, 512 if size == 64 * 512 else PART_BYTES if dice % 2 else 8192)
        if what == "store":
            (location,) = asyncio.run(store(tier, [one]))
            if location >= 0:
                at[location] = one
        elif what == "reserve":
            (location,) = tier.reserve([one.payload.name], [size], [one.payload.part_bytes])
            if location >= 0:
                at[location] = one
                pending.add(location)
        elif what == "commit" and pending:
            location = sorted(pending)[dice % len(pending)]
            pending.discard(location)
            held = at[location]
            tier.buffers([location])[0].array()[:] = np.frombuffer(held.data, np.uint8)
            tier.commit([location], [held.payload.parts & (dice | 1)], [held.payload.digests])
        elif at and what in ("free", "retire"):
            location = sorted(at)[dice % len(at)]
            getattr(tier, what)([location])
            if what == "free":
                del at[location]
                pending.discard(location)
                retired.discard(location)
            else:
                retired.add(location)
    return at, pending, retired - pending


def fills_up_apart(tier: MemoryTier, held: list[int]) -> None:
    """What is left can be used up, and no two extents or tables share a page."""
    rng = random.Random(1)
    held = list(held)
    for size in (200_000, 30_000, 1):
        while (location := tier.reserve([Name(rng.randbytes(16))], [size], [4096])[0]) >= 0:
            held.append(location)
    spans = []
    for segment in tier.segments:
        spans += [(segment.span.address + first * 4096, pages * 4096) for first, pages in segment.table_pages]
    spans += [(span.address, max(1, -(-len(span) // 4096)) * 4096) for span in tier.buffers(held)]
    spans.sort()
    assert all(one[0] + one[1] <= other[0] for one, other in pairwise(spans))
    assert tier.status().used_bytes == sum(length for _, length in spans) <= tier.arena.capacity_bytes
    tier.free(held)
    assert tier.status().used_bytes == tables_bytes(tier)


@given(operations, st.sampled_from((MIB, 3 * MIB)))
def test_whatever_was_done_before_everything_is_as_it_was(steps: list[Operation], capacity: int) -> None:
    tier = new(capacity, MIB)
    at, pending, retired = run(tier, steps)
    if not tier.segments:
        return
    before = tier.status().used_bytes
    said = {where: tier.payloads([where])[0] for where in at}
    fresh, adopted = heir(tier)
    assert fresh.status().used_bytes == before
    found = named(adopted)
    assert set(found) == set(at) - pending - retired and adopted.damaged == 0
    assert set(adopted.pending) == pending and set(adopted.orphans()) == retired
    for where in at:
        assert fresh.payloads([where])[0] == said[where]
        if where in found:
            parts = said[where].parts
            span = fresh.buffers([where])[0]
            assert verify_parts(span, said[where].part_bytes, parts, at[where].payload.digests)
    adopted.settle()
    fills_up_apart(fresh, [where for where in at if where not in pending])
    asyncio.run(fresh.close())


def test_wrong_bytes_are_found_and_go() -> None:
    tier = new()
    items = [item(seed, 300_000) for seed in range(4)]
    locations = asyncio.run(store(tier, items))
    tier.buffers([locations[2]])[0].array()[299_999] ^= 1
    fresh, adopted = heir(tier)
    assert set(named(adopted)) == {locations[i] for i in (0, 1, 3)}
    assert adopted.damaged == 1
    assert set(named(adopted)) == {locations[i] for i in (0, 1, 3)} and adopted.damaged == 1
    view = ArenaView(ID)
    for ordinal, fd in files(fresh):
        view.attach(ordinal, os.dup(fd))
    assert view.glance(locations[2], items[2].payload.name) is None
    view.close()
    assert fresh.arena.find(locations[2]), "a client may have it in view"
    adopted.settle()
    assert fresh.arena.find(locations[2]) is None
    asyncio.run(fresh.close())


@pytest.mark.slow
def test_whatever_the_tables_say_nothing_wrong_is_adopted() -> None:
    """Any bytes in header, directory and rows: entries get lost, but none changes its name, size or bytes, and all
    space is somebody's or free."""
    rng = random.Random(6)
    seen = {"adopted": 0, "refused": 0, "missing": 0}
    for round_ in range(120):
        tier = new(MIB)
        items = [item(seed, 9_000 + seed * 512, 512 if seed % 2 else 4096) for seed in range(24)]
        at = dict(zip(asyncio.run(store(tier, items)), items, strict=True))
        fd = files(tier)[0][1]
        memory = mmap.mmap(fd, 0)
        tables = [first * 4096 for first, _ in tier.segments[0].table_pages]
        for _ in range(rng.choice((1, 3, 30, 300))):
            where = rng.choice(tables if round_ % 3 == 0 else tables[1:]) + rng.randrange(4096)
            memory[where] = rng.choice((0, 1, 2, 3, 255, rng.randrange(256)))
        try:
            fresh, adopted = heir(tier)
        except ProtocolError:
            seen["refused"] += 1
            continue
        found = {where: fresh.payloads([where])[0] for where in named(adopted)}
        for location, payload in found.items():
            one = at[location]
            assert (payload.name, payload.size, payload.part_bytes) == (
                one.payload.name, one.payload.size, one.payload.part_bytes,
            )  # fmt: skip
            assert (payload.parent, payload.form, payload.expiry_s) == (
                one.payload.parent, one.payload.form, one.payload.expiry_s,
            )  # fmt: skip
            span = fresh.buffers([location])[0]
            assert payload.parts and verify_parts(span, payload.part_bytes, payload.parts, one.payload.digests)
        seen["adopted"] += len(found)
        seen["missing"] += len(at) - len(found)
        adopted.settle()
        fills_up_apart(fresh, list(found))
        asyncio.run(fresh.close())
    assert min(seen.values()) > 0, seen


def test_a_row_that_was_being_freed_is_another_one_afterwards() -> None:
    """The owner died after it said FREE, before the generation grew. Who still knows the location does not meet the
    next entry there."""
    tier = new()
    one = item(1, 64 * 512, 512)
    locations = asyncio.run(store(tier, [one, item(2, 5000)]))
    segment = tier.segments[0]
    segment.memory[segment.row_at(locations[0] >> 32 & 0xFFFFF) + layout.STATE_AT] = layout.FREE
    fresh, adopted = heir(tier)
    assert list(named(adopted)) == locations[1:]
    adopted.settle()
    for seed in range(3, 9):
        (location,) = asyncio.run(store(fresh, [item(seed, 5000)]))
        assert location not in locations
    assert fresh.arena.find(locations[0]) is None
    asyncio.run(fresh.close())


def test_a_missing_segment_takes_only_its_own_along() -> None:
    tier = new(4 * MIB, MIB)
    items = [item(seed, MIB // 2 + 1) for seed in range(3)]
    locations = asyncio.run(store(tier, items))
    fresh = new(4 * MIB)
    left = files(tier)
    adopted = fresh.adopt([left[2], left[0], left[0]])
    assert adopted.lost == (1,)
    assert set(named(adopted)) == {locations[0], locations[2]}
    assert fresh.arena.find(locations[1]) is None
    adopted.settle()
    more = asyncio.run(store(fresh, [item(9, MIB // 2 + 1), item(10, MIB // 2 + 1)]))
    assert more[0] >> 52 == 3 and more[1] == Outcome.FULL, "its number is not used again, and counts under the cap"
    assert [segment.ordinal for segment in fresh.segments] == [0, 2, 3]
    assert fresh.status().used_bytes <= 4 * MIB
    asyncio.run(tier.close())
    asyncio.run(fresh.close())


def test_caps_of_another_size() -> None:
    """More room: it grows, by segments of the size that there are. Less: it holds what there is and does not grow."""
    for capacity, most in ((8 * MIB, 8), (2 * MIB, 3), (MIB // 2, 3)):
        tier = new(3 * MIB, MIB)
        locations = asyncio.run(store(tier, [item(seed, MIB // 2 + 1) for seed in range(3)]))
        fresh, adopted = heir(tier, capacity)
        assert set(named(adopted)) == set(locations)
        assert MIB - 3 * 4096 < fresh.entry_bytes_max < MIB
        adopted.settle()
        fresh.free(locations[:1])
        seeds = iter(range(10, 99))
        while asyncio.run(store(fresh, [item(next(seeds), MIB // 2 + 1)]))[0] >= 0:
            assert len(fresh.segments) <= most
        assert len(fresh.segments) == most
        asyncio.run(fresh.close())


def test_only_the_memory_of_this_arena_is_taken() -> None:
    tier, other = new(MIB), MemoryTier(MIB, arena_id=bytes(16))
    odd = new(2 * MIB, MIB)
    for one in (tier, other, odd):
        asyncio.run(store(one, [item(1, 600_000), item(2, 600_000)]))
    (mine,), ((_, foreign),) = files(tier), files(other)
    plain = os.open(__file__, os.O_RDONLY)
    gc.collect()
    with Descriptors():
        for bad in (
            [],
            [(0, foreign)],
            [(0, plain)],
            [(1, mine[1])],
            [(-1, mine[1])],
            [(5000, mine[1])],
            [(0, 10_000)],
        ):
            fresh = new(MIB)
            with pytest.raises(ProtocolError, match="none of"):
                fresh.adopt(bad)
            assert asyncio.run(store(fresh, [item(3, 1000)]))[0] >= 0, "it serves, with memory of its own"
            with pytest.raises(ConfigError, match="not used yet"):
                fresh.adopt([mine])
            asyncio.run(fresh.close())
            del fresh
        gc.collect()  # a mapping goes with its last buffer, and tracebacks hold some
    os.close(plain)
    for one in (tier, other, odd):
        asyncio.run(one.close())


@pytest.mark.slow
def test_after_a_death_at_any_line_everything_is_whole_and_every_page_somebodys() -> None:
    """As if the owner were killed before each line of the tier, arena and segment that a churn executes."""
    items = [item(seed, 9_000 + seed, 512 if seed % 3 else 4096, None if seed % 2 else 0b11) for seed in range(12)]
    expected = {one.payload.name: one for one in items}
    tier = new(MIB)
    asyncio.run(store(tier, items[:1]))
    source = files(tier)[0][1]
    modules = {layout.__file__.replace("layout", name) for name in ("tier", "arena", "segment")}
    deaths: Counter[tuple[str, int]] = Counter()
    wrong: list[object] = []

    def die(where: tuple[str, int]) -> None:
        """Somebody goes on with a copy of the memory as it is now."""
        descriptor = os.memfd_create("copy", os.MFD_ALLOW_SEALING)
        os.sendfile(descriptor, source, 0, MIB)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        fresh = new(MIB)
        adopted = fresh.adopt([(0, descriptor)])
        os.close(descriptor)
        found = named(adopted)
        if adopted.damaged or not all(reads(fresh, at, expected[name]) for at, (name, _) in found.items()):
            wrong.append(where)
        adopted.settle()
        fills_up_apart(fresh, list(found))
        asyncio.run(fresh.close())

    def step(frame: FrameType, event: str, _: object) -> object:
        if frame.f_code.co_filename not in modules:
            return None
        sys.settrace(None)
        where = frame.f_code.co_name, frame.f_lineno
        deaths[where] += 1
        if deaths[where] in (1, 5, 25):
            die(where)
        sys.settrace(step)  # type: ignore[arg-type]
        return step

    def churn() -> None:
        rng, held = random.Random(1), list[int]()
        for _ in range(12):
            for one in rng.sample(items, 3):
                (location,) = tier.reserve([one.payload.name], [one.payload.size], [one.payload.part_bytes])
                tier.describe([location], [one.payload])
                tier.buffers([location])[0].array()[:] = memoryview(one.data)
                tier.commit([location], [one.payload.parts], [one.payload.digests])
                held.append(location)
            rng.shuffle(held)
            while len(held) > 14:
                tier.free([held.pop()])

    before = sys.gettrace()
    sys.settrace(step)  # type: ignore[arg-type]
    try:
        churn()
    finally:
        sys.settrace(before)
    assert wrong == []
    assert {"make_row", "describe", "drop_row", "add_parts", "add_chunk"} <= {name for name, _ in deaths}
    asyncio.run(tier.close())


CHURN = """
import asyncio, random, sys
from tiercache.cpu.tier import MemoryTier
from tiercache.testing.tiers import item, store

async def main():
    tier = MemoryTier(8 << 20, segment_bytes=4 << 20, arena_id=b"of test adoption")
    items = [
        item(seed, 150_000 + seed * 7, 4096 if seed % 3 else 65_536, None if seed % 2 else 0b11) for seed in range(40)
    ]
    held = []
    rng = random.Random(int(sys.argv[1]))
    while len(tier.segments) < 2:
        held += [at for at in await store(tier, rng.sample(items, 3)) if at >= 0]
    print(*[segment.fd for segment in tier.segments], flush=True)
    while True:
        rng.shuffle(held)
        while len(held) > 15:
            tier.free([held.pop()])
        held += [at for at in await store(tier, rng.sample(items, 3)) if at >= 0]
        print(flush=True)

asyncio.run(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("kill", range(4))
def test_the_next_process_goes_on_where_one_was_killed(kill: int) -> None:
    expected: dict[Name, Item] = {}
    for seed in range(40):
        made = item(seed, 150_000 + seed * 7, 4096 if seed % 3 else 65_536, None if seed % 2 else 0b11)
        expected[made.payload.name] = made
    with subprocess.Popen([sys.executable, "-c", CHURN, str(kill)], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        left = [
            (ordinal, os.open(f"/proc/{owner.pid}/fd/{number}", os.O_RDWR))
            for ordinal, number in enumerate(owner.stdout.readline().split())
        ]
        for _ in range(1 + kill * 37):
            owner.stdout.readline()
        owner.kill()
    fresh = new(8 * MIB)
    adopted = fresh.adopt(left)
    for _, fd in left:
        os.close(fd)
    found = named(adopted)
    assert found and adopted.damaged == 0 and not adopted.lost
    for location, (name, parts) in found.items():
        assert parts == expected[name].payload.parts and reads(fresh, location, expected[name])
    adopted.settle()
    fills_up_apart(fresh, list(found))
    asyncio.run(fresh.close())


def test_readers_of_the_dead_owner_read_on() -> None:
    """A client that has the memory mapped finds old places and new ones, and nothing where something was freed."""
    tier = new(4 * MIB, MIB)
    view = ArenaView(ID)
    items = [item(seed, 200_000) for seed in range(6)]
    locations = asyncio.run(store(tier, items))
    for ordinal, fd in files(tier):
        view.attach(ordinal, os.dup(fd))
    fresh = new(4 * MIB)
    adopted = fresh.adopt(view.segments)
    asyncio.run(tier.close())
    named(adopted)
    adopted.settle()
    fresh.free(locations[:1])
    more = item(9, 200_000)
    (added,) = asyncio.run(store(fresh, [more]))
    target = bytearray(200_000)
    assert view.copy_out([locations[0]], [Buffer.of(target)]) == [Outcome.MISS]
    for location, one in [*zip(locations[1:], items[1:], strict=True), (added, more)]:
        assert view.glance(location, one.payload.name)
        assert view.copy_out([location], [Buffer.of(target)]) == [Outcome.HIT] and target == one.data
    assert all_parts(200_000, PART_BYTES) == 15
    view.close()
    asyncio.run(fresh.close())
