"""An arena seen from another process: what is found and copied there while its owner goes on, whole or damaged."""

from __future__ import annotations

import asyncio
import itertools
import mmap
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.unit.descriptors import Descriptors
from tiercache.buffers import Buffer, part_digests
from tiercache.cpu import layout
from tiercache.cpu import view as view_module
from tiercache.cpu.segment import Segment
from tiercache.cpu.tier import MemoryTier, copy_places
from tiercache.cpu.view import ArenaView
from tiercache.errors import ClosedError, ConfigError, ProtocolError
from tiercache.lease import Lease
from tiercache.model import PART_BYTES, Form, Name, Outcome, Payload, all_parts
from tiercache.testing.tiers import MIB, SHAPES, Item, item, store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

    from tiercache.lease import Extents

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="memory files are Linux's")

ID = b"of the view test"

OWNER = """
import asyncio, sys
from tiercache.cpu.tier import MemoryTier
from tiercache.testing.tiers import item, store

tier = MemoryTier(int(sys.argv[1]), segment_bytes=int(sys.argv[2]), arena_id=b"of the view test")
for line in sys.stdin:
    what, *numbers = line.split()
    numbers = [int(number) for number in numbers]
    if what == "store":  # seed size part_bytes
        answer = asyncio.run(store(tier, [item(*numbers)]))
    elif what == "reserve":
        one = item(*numbers).payload
        answer = tier.reserve([one.name], [one.size], [one.part_bytes])
    elif what == "commit":  # location seed size part_bytes
        one = item(*numbers[1:]).payload
        tier.commit(numbers[:1], [one.parts], [one.digests])
        answer = []
    elif what == "fds":
        answer = [segment.fd for segment in tier.arena.segments]
    else:
        answer = getattr(tier, what)(numbers) or []
    print(*answer, flush=True)
"""


class Owner:
    """A process with an arena that does what it is told."""

    def __init__(self, capacity_bytes: int = 8 * MIB, segment_bytes: int = 1 << 30) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWNER, str(capacity_bytes), str(segment_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def do(self, what: str, *numbers: int) -> list[int]:
        """One command; its answer."""
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None and stdout is not None
        stdin.write(" ".join([what, *map(str, numbers)]) + "\n")
        stdin.flush()
        return [int(number) for number in stdout.readline().split()]

    def store(self, seed: int, size: int, part_bytes: int = PART_BYTES) -> int:
        """Where an item went."""
        (location,) = self.do("store", seed, size, part_bytes)
        return location

    def give(self, view: ArenaView) -> None:
        """What the view lacks, as if it came over a socket."""
        for ordinal, number in list(enumerate(self.do("fds")))[view.known :]:
            view.attach(ordinal, os.open(f"/proc/{self.process.pid}/fd/{number}", os.O_RDWR | os.O_CLOEXEC))

    def __enter__(self) -> Owner:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def owner() -> Iterator[Owner]:
    with Owner() as process:
        yield process


@pytest.fixture
def view() -> Iterator[ArenaView]:
    view = ArenaView(ID)
    yield view
    view.close()


def shown(tier: MemoryTier) -> ArenaView:
    """A view of an arena in this process: two mappings of each segment."""
    view = ArenaView(ID)
    for segment in tier.arena.segments:
        assert segment.fd is not None
        view.attach(segment.ordinal, os.dup(segment.fd))
    return view


def copied(view: ArenaView, location: int, one: Item, verify: bool = True) -> tuple[Outcome, bytes]:
    target = bytearray(len(one.data))
    return view.copy_out([location], [Buffer.of(target)], verify=verify)[0], bytes(target)


@pytest.mark.slow
def test_another_process_reads_every_shape_in_place_and_in_copies(owner: Owner, view: ArenaView) -> None:
    items = [item(seed, size, step) for seed, (size, step) in enumerate(SHAPES)]
    locations = [owner.store(seed, size, step) for seed, (size, step) in enumerate(SHAPES) if size < 2 * MIB]
    owner.give(view)
    for one, location in zip(items, locations, strict=False):
        assert bytes(view.buffers([location])[0]) == one.data
        for verify in (True, False):
            assert copied(view, location, one, verify) == (Outcome.HIT, one.data)
        rng = random.Random(1)
        for _ in range(4):
            start, stop = sorted(rng.choices(range(len(one.data) + 1), k=2))
            target = bytearray(stop - start)
            assert view.copy_out([location], [Buffer.of(target)], [range(start, stop)]) == [Outcome.HIT]
            assert target == one.data[start:stop]
        place = view.glance(location, one.payload.name)
        assert place is not None and not place.stale
        assert (place.size, place.parts, place.part_bytes) == (
            len(one.data), one.payload.parts, one.payload.part_bytes,
        )  # fmt: skip
        assert view.copy_out([location], [Buffer.of(bytearray(9 * MIB))], [range(len(one.data) + 1)]) == [Outcome.MISS]


@pytest.mark.slow
def test_tables_and_segments_that_come_later_are_found(view: ArenaView) -> None:
    """The table of a small segment grows sixteen rows at a time; rows of digests may lie in a chunk not seen yet."""
    with Owner(3 * MIB, MIB) as owner:
        first = owner.store(0, 5000)
        owner.give(view)
        assert view.known == 1
        for seed in range(1, 50):
            size, step = (5000 + seed, 4096) if seed % 3 else (5000 + seed, 80)
            location = owner.store(seed, size, step)
            assert copied(view, location, item(seed, size, step))[0] is Outcome.HIT, seed
        assert view.find(7 << 52 | location) is None and view.find(location | 1 << 51) is None
        large = owner.store(99, MIB // 2 + 1), owner.store(98, MIB // 2 + 1)
        assert view.find(large[1]) is None, "its segment is not mapped yet"
        owner.give(view)
        assert view.known > 1 and len(view.segments) == view.known
        assert copied(view, large[1], item(98, MIB // 2 + 1))[0] is Outcome.HIT
        assert copied(view, first, item(0, 5000))[0] is Outcome.HIT


@pytest.mark.slow
def test_another_process_fills_what_the_owner_commits(owner: Owner, view: ArenaView) -> None:
    one = item(5, 300_000)
    (location,) = owner.do("reserve", 5, 300_000, PART_BYTES)
    owner.give(view)
    assert view.glance(location, one.payload.name) is None, "nothing of it is present"
    (target,) = view.buffers([location])
    target.array()[:] = memoryview(one.data)
    assert part_digests(target, PART_BYTES) == one.payload.digests
    owner.do("commit", location, 5, 300_000, PART_BYTES)
    assert copied(view, location, one) == (Outcome.HIT, one.data)
    assert view.find(location) is not None


@pytest.mark.slow
@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("when", ["found", "copied"])
def test_an_extent_reused_while_it_is_copied_is_a_miss(
    owner: Owner, view: ArenaView, monkeypatch: pytest.MonkeyPatch, verify: bool, when: str
) -> None:
    """The owner frees it and puts something else into the same pages and row, right before the copy or right after."""
    old, new = item(1, 200_000), item(2, 200_000)
    location = owner.store(1, 200_000)
    owner.give(view)
    reused: list[int] = []

    def interrupt() -> None:
        owner.do("free", location)
        reused.append(owner.store(2, 200_000))

    def hooked(*args: Any, **options: Any) -> list[Outcome]:
        if when == "found":
            interrupt()
        outcomes = copy_places(*args, **options)
        if when == "copied":
            interrupt()
        return outcomes

    with monkeypatch.context() as patch:
        patch.setattr(view_module, "copy_places", hooked)
        outcome, data = copied(view, location, old, verify)
    assert outcome is Outcome.MISS
    if not verify:
        assert data == (new.data if when == "found" else old.data), "the pages were used again: that was the race"
    assert reused[0] >> 32 == location >> 32, "and so was the row"
    assert view.find(location) is None and view.glance(location, old.payload.name) is None
    assert copied(view, reused[0], new) == (Outcome.HIT, new.data)


@pytest.mark.slow
def test_freed_while_a_chain_of_digests_is_read(owner: Owner, view: ArenaView, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of digests become rows of others: a miss, never damage."""
    old = item(1, 64 * 512, 512)
    location = owner.store(1, 64 * 512, 512)
    owner.give(view)
    real = Segment._digest_places

    def hooked(self: Segment, *args: int) -> Sequence[int]:
        monkeypatch.undo()
        owner.do("free", location)
        for seed in (2, 3, 4, 5):
            owner.store(seed, 1000)
        return real(self, *args)

    monkeypatch.setattr(Segment, "_digest_places", hooked)
    assert copied(view, location, old)[0] is Outcome.MISS


@pytest.fixture
def pair() -> Iterator[tuple[MemoryTier, ArenaView]]:
    """An arena and a view of it, in one process."""
    tier = MemoryTier(MIB, arena_id=ID)
    tier.reserve([Name(bytes(16))], [0], [4096])
    view = shown(tier)
    yield tier, view
    view.close()
    asyncio.run(tier.close())


def test_a_glance_asks_for_name_time_and_leave(pair: tuple[MemoryTier, ArenaView]) -> None:
    tier, view = pair

    def put(name: Name, form: Form, expiry_s: int = 0) -> int:
        digests = part_digests(Buffer.of(b"x"), 4096)
        payload = Payload(name, 1, 4096, 1, digests, form=form, expiry_s=expiry_s)
        (location,) = asyncio.run(tier.write([payload], [Buffer.of(b"x")]))
        return location

    page, wide = put(Name(b"k" * 16, 3), Form.PAGE), put(Name(b"k" * 32), Form.LONE, 1000)
    block = put(Name(b"b" * 16, 7), Form.BLOCK)
    assert view.glance(page, Name(b"k" * 16, 3), 5e9)
    for name in (Name(b"k" * 16, 2), Name(b"k" * 15 + b"l", 3), Name(b"k" * 16 + bytes(16), 3), Name(b"k" * 32, 3)):
        assert view.glance(page, name) is None
    assert view.glance(wide, Name(b"k" * 16)) is None, "the first half of a key is not the key"
    assert view.glance(wide, Name(b"k" * 32), 999.5) and not view.glance(wide, Name(b"k" * 32), 1000)
    assert view.glance(block, Name(b"b" * 16)), "a block is named by its digest, wherever its chain has it"
    for wrong in (page ^ 1, page + (1 << 32), -1, 1 << 62, page | 1 << 52):
        assert view.glance(wrong, Name(b"k" * 16, 3)) is None
    tier.retire([page, page + 1, -5, 1 << 62])
    assert view.glance(page, Name(b"k" * 16, 3)) is None
    assert view.find(page), "who holds it may go on looking"
    tier.free([page])
    tier.retire([page])
    again = put(Name(b"k" * 16, 3), Form.PAGE)
    assert again >> 32 == page >> 32 and view.glance(again, Name(b"k" * 16, 3)), "a new row starts anew"


def test_damage_is_seen_and_a_small_target_refused(pair: tuple[MemoryTier, ArenaView]) -> None:
    tier, view = pair
    one = item(1, 200_000)
    (location,) = asyncio.run(store(tier, [one]))
    with pytest.raises(ConfigError, match="larger"):
        view.copy_out([location], [Buffer.of(bytearray(100))])
    gone = location + 1
    targets = [Buffer.of(bytearray(200_000)) for _ in range(3)]
    assert view.copy_out([gone, location, gone], targets) == [Outcome.MISS, Outcome.HIT, Outcome.MISS]
    tier.buffers([location])[0].array()[150_000] ^= 1
    spans = [range(100_000, 200_000), range(100), range(100)]
    assert view.copy_out([location, location, gone], targets, spans) == [Outcome.CORRUPT, Outcome.HIT, Outcome.MISS]
    assert view.copy_out([location], targets[:1], verify=False) == [Outcome.HIT]
    with pytest.raises(LookupError):
        view.buffers([gone])


def test_only_the_segment_asked_for_is_mapped(pair: tuple[MemoryTier, ArenaView]) -> None:
    tier, _ = pair
    source = tier.arena.segments[0].fd
    assert source is not None
    whole = os.pread(source, MIB, 0)

    def file(content: bytes, seals: int = 0xF) -> int:
        import fcntl

        descriptor = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.write(descriptor, content)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals & ~fcntl.F_SEAL_WRITE)
        return descriptor

    def changed(at: int, value: bytes) -> bytes:
        return whole[:at] + value + whole[at + len(value) :]

    bad: list[tuple[int, Callable[[], int]]] = [
        (1, lambda: os.dup(source)),  # another ordinal
        (-1, lambda: os.dup(source)),
        (2048, lambda: os.dup(source)),
        (0, lambda: os.open(__file__, os.O_RDONLY)),
        (0, lambda: file(whole, seals=0x4)),  # it may shrink
        (0, lambda: file(b"")),
        (0, lambda: file(whole[:4096])),
        (0, lambda: file(changed(0, b"NOT"))),
        (0, lambda: file(changed(8, b"\x63"))),
        (0, lambda: file(changed(24, b"\0\x20"))),
        (0, lambda: file(changed(28, b"\xff\xff"))),
        (0, lambda: file(changed(40, b"another arena of"))),
        (0, lambda: file(changed(256, b"\xff\xff\xff\xff"))),
    ]
    other = ArenaView(ID)
    with Descriptors() as held:
        for ordinal, made in bad:
            with pytest.raises(ProtocolError):
                other.attach(ordinal, made())
            assert other.known == 0 and not held.changed, "the descriptor was taken over, and closed"
        other.attach(0, os.dup(source))
        other.attach(0, os.dup(source))  # once is enough
        with pytest.raises(ProtocolError, match="not the memory that it was"):
            other.attach(0, file(whole))
        assert other.known == 1 and len(other.segments) == 1
        assert len(held.changed) <= 2, "one, and one that the mapping itself has"
        other.close()
        other.close()
        assert not held.changed
        with pytest.raises(ClosedError):
            other.attach(0, os.dup(source))
        with pytest.raises(ClosedError):
            other.buffers([0])


def test_segments_may_be_missing_in_between(pair: tuple[MemoryTier, ArenaView]) -> None:
    tier = MemoryTier(3 * MIB, segment_bytes=MIB, arena_id=ID)
    items = [item(seed, MIB // 2 + 1) for seed in range(3)]
    locations = asyncio.run(store(tier, items))
    view = ArenaView(ID)
    descriptor = tier.arena.segments[2].fd
    assert descriptor is not None
    view.attach(2, os.dup(descriptor))
    assert view.known == 3 and [ordinal for ordinal, _ in view.segments] == [2]
    assert [copied(view, at, one)[0] for at, one in zip(locations, items, strict=True)] == [
        Outcome.MISS, Outcome.MISS, Outcome.HIT,
    ]  # fmt: skip
    view.close()
    asyncio.run(tier.close())


@pytest.mark.slow
def test_whatever_the_tables_say_nothing_outside_the_segment_is_touched() -> None:
    """Any bytes in header, directory and rows: no exception, and a verified copy is of bytes that were stored."""
    tier = MemoryTier(MIB, arena_id=ID)
    items = [item(seed, 9_000 + seed * 512, 512 if seed % 2 else 4096) for seed in range(24)]
    locations = asyncio.run(store(tier, items))
    fd = tier.arena.segments[0].fd
    assert fd is not None
    memory = mmap.mmap(fd, 0)
    whole = bytes(memory)
    tables = [0, *(segment for segment in tier.arena.segments[0]._chunks)]
    views = [shown(tier), ArenaView(ID)]
    rng = random.Random(8)
    target = Buffer.of(bytearray(MIB))
    seen = set[object]()
    for _ in range(400):
        for _ in range(rng.randrange(1, 40)):
            memory[rng.choice(tables) + rng.randrange(4096)] = rng.choice((0, 1, 2, 255, rng.randrange(256)))
        try:
            views[1].attach(0, os.dup(fd))
        except ProtocolError:
            seen.add("refused")
        for view in views:
            for one, location in zip(items, locations, strict=True):
                place = view.glance(location, one.payload.name)
                outcome = view.copy_places([place], [target])[0]
                seen.add(outcome)
                if place is not None and outcome is Outcome.HIT:
                    assert bytes(target.slice(0, place.size)) == one.data[: place.size]
                view.copy_out([location], [target], [range(rng.randrange(9_000))], verify=False)
        views[1].close()
        views[1] = ArenaView(ID)
        if rng.random() < 0.2:
            memory[:] = whole
    assert seen == {"refused", Outcome.HIT, Outcome.MISS, Outcome.CORRUPT}
    views[0].close()
    asyncio.run(tier.close())


def test_a_forked_child_has_no_view(pair: tuple[MemoryTier, ArenaView]) -> None:
    tier, view = pair
    (location,) = asyncio.run(store(tier, [item(1, 5000)]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        good = view.closed and view.find(location) is None and view.known == 0 and view.segments == []
        os._exit(0 if good else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert view.find(location) is not None


def test_memory_files_are_named_for_their_arena(pair: tuple[MemoryTier, ArenaView]) -> None:
    tier, view = pair
    for _, fd in [*view.segments, (0, tier.arena.segments[0].fd)]:
        assert os.readlink(f"/proc/self/fd/{fd}") == f"/memfd:tiercache-{ID.hex()}-0 (deleted)"


def test_views_keep_their_memory_beyond_the_close(pair: tuple[MemoryTier, ArenaView]) -> None:
    tier, view = pair
    one = item(1, 5000)
    (location,) = asyncio.run(store(tier, [one]))
    extents: Extents = view
    lease = Lease([Outcome.HIT], [location], extents, lambda safely: None)
    target = bytearray(100)
    assert lease.copy_into(0, 4000, 4100, Buffer.of(target)) is Outcome.HIT and target == one.data[4000:4100]
    array = lease.array(0)
    lease.release()
    view.close()
    assert array.tobytes() == one.data
    assert view.copy_out([location], [Buffer.of(bytearray(5000))]) == [Outcome.MISS]
    assert all_parts(5000, PART_BYTES) == 1


def test_fences_elsewhere_than_on_x86(monkeypatch: pytest.MonkeyPatch, pair: tuple[MemoryTier, ArenaView]) -> None:
    tier, view = pair
    monkeypatch.setattr(layout, "_STRONG", False)
    one = item(1, 5000)
    (location,) = asyncio.run(store(tier, [one]))
    assert copied(view, location, one) == (Outcome.HIT, one.data)


def test_no_core_dump_shows_what_is_cached() -> None:
    tier = MemoryTier(4 * MIB, arena_id=(own := os.urandom(16)))
    asyncio.run(store(tier, [item(1, 1000, PART_BYTES)]))
    (segment,) = tier.arena.segments
    assert segment.fd is not None
    view = ArenaView(own)
    view.attach(0, os.dup(segment.fd))
    maps = Path("/proc/self/smaps").read_text().split("VmFlags:")
    flags = [
        after.splitlines()[0].split()
        for before, after in itertools.pairwise(maps)
        if f"tiercache-{own.hex()}" in before
    ]
    assert len(flags) >= 2
    assert all("dd" in each for each in flags)
    view.close()
