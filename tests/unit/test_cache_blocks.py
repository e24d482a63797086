"""Blocks that several writers fill together, in one process: claims, commits, pieces, ends, the SSD."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

import tiercache
from tiercache.buffers import Buffer, copy_parts, part_digests
from tiercache.cache import blocks
from tiercache.errors import CapacityError, ClosedError, ConfigError
from tiercache.keys import chain, namespace
from tiercache.lease import PageRun
from tiercache.model import Kind, Name, Outcome, Terms, TierId
from tiercache.sync import wait
from tiercache.testing.simloop import SimLoop
from tiercache.testing.world import World

MIB = 1 << 20
PART = 4096
PARTS = 8
SIZE = PART * PARTS - 100
ALL = (1 << PARTS) - 1
HIT, MISS, BUSY, FULL, CORRUPT = Outcome.HIT, Outcome.MISS, Outcome.BUSY, Outcome.FULL, Outcome.CORRUPT


def digests(count: int, label: str = "a") -> list[bytes]:
    return chain(namespace("blocks", label), [f"{label}{i}".encode() for i in range(count)])


def value(digest: bytes) -> bytes:
    return np.random.default_rng(list(digest)).bytes(SIZE)


@pytest.fixture(params=[0, 64 * MIB], ids=["memory", "ssd"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    with tiercache.open(
        tmp_path, memory_bytes=8 * MIB, ssd_bytes=request.param, disk_free_floor_bytes=0, share=False
    ) as one:
        yield warm(one)
        at_rest(one)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Any]:
    with tiercache.open(
        tmp_path, memory_bytes=8 * MIB, ssd_bytes=64 * MIB, disk_free_floor_bytes=0, share=False
    ) as one:
        yield warm(one)
        at_rest(one)


def warm(cache: Any) -> Any:
    """The memory's own tables are there now, and count no more as a block's."""
    cache.core.store([Name(b"w" * 16)], [Buffer.of(b"")])
    wait(cache.core.delete([Name(b"w" * 16)]), cache.loop)
    return cache


def at_rest(cache: Any) -> None:
    """Nothing is broken or held, once what waits is on the SSD."""
    cache.flush()
    state = wait(cache.core.call("validate", {}), cache.loop)
    assert not state["broken"]
    assert state["pins"] == 0


def used(cache: Any) -> int:
    """Bytes of memory."""
    stats = cache.core.stats()
    return int(next(value for name, value in stats.items() if "tier_used_bytes" in name and "memory" in name))


def join(cache: Any, names: list[bytes], claim: int = ALL, pieces: Any = (), **more: Any) -> Any:
    return cache.core.join_blocks(names, SIZE, PART, claim, pieces, **more)


def refused(cache: Any, names: list[bytes], claim: int = ALL, pieces: Any = (), **more: Any) -> list[Outcome]:
    """How a join of which nothing comes went."""
    ticket = join(cache, names, claim, pieces, **more)
    assert not any(ticket.claims)
    ticket.end()
    return list(ticket.outcomes)


def poke(ticket: Any, item: int, start: int, data: bytes) -> None:
    """Writes some bytes."""
    with ticket.writing():
        copy_parts(Buffer.of(data), ticket.buffers(item).slice(start, len(data)), len(data), 1)


def flip(ticket: Any, item: int, at: int) -> None:
    """Damages a byte."""
    poke(ticket, item, at, bytes([ticket.buffers(item).view()[at] ^ 1]))


def write(ticket: Any, item: int, digest: bytes, parts: int | None = None) -> tuple[int, int, bytes]:
    """Writes claimed parts; the row to commit."""
    parts = ticket.claims[item] if parts is None else parts
    source = Buffer.of(value(digest))
    with ticket.writing():
        copy_parts(source, ticket.buffers(item), PART, parts)
    return item, parts, part_digests(source, PART, parts)


def fill(cache: Any, names: list[bytes], claim: int = ALL, **more: Any) -> None:
    ticket = join(cache, names, claim, **more)
    rows = [write(ticket, i, name) for i, name in enumerate(names) if ticket.claims[i]]
    assert ticket.commit(rows) == [HIT] * len(rows)
    ticket.end()


def check(lease: Any, names: list[bytes], parts: int = ALL) -> None:
    for i, name in enumerate(names):
        truth = value(name)
        for part in range(PARTS):
            if parts >> part & 1:
                start, stop = part * PART, min(SIZE, (part + 1) * PART)
                out = bytearray(stop - start)
                assert lease.copy_into(i, start, stop, Buffer.of(out, writable=True)) is HIT
                assert bytes(out) == truth[start:stop]


def drop_from_memory(cache: Any, names: list[bytes]) -> None:
    """Takes memory copies away, as pressure would."""
    tiers = cache.core.tiers
    match = tiers.index.chains.match(names)
    slots = match.slots[::-1].copy()
    tiers.release(match)
    assert tiers.forget(slots)


def test_a_block_that_is_filled_whole_is_a_block_like_any_other(cache: Any) -> None:
    names = digests(5)
    ticket = join(cache, names)
    assert ticket.outcomes == [HIT] * 5
    assert ticket.claims == [ALL] * 5
    assert ticket.present == [0] * 5
    assert cache.core.probe_chain(names, ALL) == b""
    rows = [write(ticket, i, name) for i, name in enumerate(names)]
    assert ticket.commit(rows[:3]) == [HIT] * 3
    assert cache.core.probe_chain(names, ALL) == b"\1\1\1"
    assert ticket.commit(rows[3:]) == [HIT] * 2
    ticket.end()
    with cache.core.match_resident(names) as lease:
        assert len(lease) == 5
        assert bytes(lease.view(4)) == value(names[4])
    with cache.core.lease_blocks_resident(names[2:4], ALL) as lease:
        check(lease, names[2:4])
        assert lease.digests(0) == part_digests(Buffer.of(value(names[2])), PART)


def test_two_writers_fill_one_block_and_neither_waits(cache: Any) -> None:
    names = digests(3)
    left, right = join(cache, names, 0x0F), join(cache, names, 0xFF)
    assert left.claims == [0x0F] * 3
    assert right.claims == [0xF0] * 3
    assert right.outcomes == [HIT] * 3
    assert left.buffers(1).address == right.buffers(1).address
    assert right.commit([write(right, 0, names[0])]) == [HIT]
    assert cache.core.probe_chain(names, 0xF0) == b"\1"
    assert cache.core.probe_chain(names, ALL) == b""
    with cache.core.lease_blocks_resident(names[:1], 0xF0) as lease:
        check(lease, names[:1], 0xF0)
    assert cache.core.lease_blocks_resident(names[:1], ALL) is None
    assert len(cache.core.match_resident(names)) == 0
    assert cache.core.lease_names_resident([Name(names[0])]) is None
    assert left.commit([write(left, i, name) for i, name in enumerate(names)]) == [HIT] * 3
    left.end()
    assert right.commit([write(right, i, names[i]) for i in (1, 2)]) == [HIT] * 2
    right.end()
    with cache.core.match_resident(names) as lease:
        assert [bytes(lease.view(i)) for i in range(3)] == [value(name) for name in names]


def test_what_is_claimed_is_busy_and_what_is_there_needs_nothing(cache: Any) -> None:
    names = digests(2)
    first = join(cache, names, 0x0F)
    second = join(cache, names, 0x0F)
    assert second.outcomes == [BUSY] * 2
    assert second.claims == [0, 0]
    with pytest.raises(ConfigError):
        second.buffers(0)
    assert second.commit([(0, 1, bytes(8))]) == [MISS]
    second.end()
    rows = [write(first, i, name) for i, name in enumerate(names)]
    assert first.commit(rows) == [HIT] * 2
    assert first.commit(rows) == [MISS] * 2
    first.end()
    third = join(cache, names, 0x0F)
    assert third.outcomes == [HIT] * 2
    assert third.claims == [0, 0]
    assert third.present == [0x0F] * 2
    third.end()
    third.end()
    with pytest.raises(ClosedError):
        third.commit([])


def test_abandoned_parts_are_claimed_anew_and_an_empty_block_vanishes(cache: Any) -> None:
    names, before = digests(4), used(cache)
    first = join(cache, names, 0x0F)
    first.commit([write(first, 0, names[0], 0x03)])
    held = join(cache, names, 0xF0)
    first.end()
    again = join(cache, names, ALL)
    assert again.claims == [0x0C, 0x0F, 0x0F, 0x0F]
    assert again.present == [0x03, 0, 0, 0]
    again.end()
    held.end()
    assert cache.core.probe_chain(names, 0x03) == b"\1"
    assert used(cache) == before + 8 * PART
    assert cache.core.stats()["tiercache_entries"] == 1
    wait(cache.core.delete([Name(name) for name in names]), cache.loop)
    assert used(cache) == before


def test_other_bytes_than_were_meant_are_shown_to_nobody(cache: Any) -> None:
    names = digests(1)
    ticket = join(cache, names, 0x03)
    row = write(ticket, 0, names[0])
    flip(ticket, 0, 5)
    assert ticket.commit([row]) == [CORRUPT]
    assert ticket.claims == [0]
    again = join(cache, names, 0x03)
    assert again.claims == [0x03]
    assert again.commit([(0, 0x03, b"short")]) == [CORRUPT]
    assert refused(cache, names, 0) == [HIT]
    ticket.end()
    again.end()
    assert cache.core.probe_chain(names, 0x01) == b""
    assert cache.core.stats()["tiercache_entries"] == 0


def test_a_part_made_of_pieces_is_shown_when_it_is_covered(cache: Any) -> None:
    names, cut = digests(2), 1000
    before = used(cache)
    lower = join(cache, names, 0x01, [(PART, PART + cut)])
    upper = join(cache, names, 0x04, [(PART + cut, 2 * PART)])
    assert lower.pieces == [[(PART, PART + cut)]] * 2
    assert refused(cache, names, 0x02) == [BUSY] * 2
    assert refused(cache, names, 0, [(PART + 10, PART + 20)]) == [BUSY] * 2
    for item, name in enumerate(names):
        truth = value(name)
        for ticket, start, stop in ((upper, PART + cut, 2 * PART), (lower, PART, PART + cut)):
            poke(ticket, item, start, truth[start:stop])
            digest = xxhash.xxh3_64_intdigest(truth[start:stop])
            assert not cache.core.probe_chain(names, 0x02)[item : item + 1]
            assert ticket.commit([], [(item, start, stop, digest)]) == [HIT]
            assert ticket.commit([], [(item, start, stop, digest)]) == [MISS]
            if ticket is upper and not item:
                # A stage that is done does not wait for the next: what it brought stays.
                upper.end()
                upper = join(cache, names[1:], 0x04, [(PART + cut, 2 * PART)], parent=names[0])
                upper.end()
                upper = join(cache, names, 0x04, [(PART + cut, 2 * PART)])
                assert upper.pieces == [[], [(PART + cut, 2 * PART)]]
    lower.end()
    upper.end()
    assert cache.core.probe_chain(names, 0x02) == b"\1\1"
    with cache.core.lease_blocks_resident(names, 0x02) as lease:
        check(lease, names, 0x02)
    wait(cache.core.delete([Name(name) for name in names]), cache.loop)
    assert used(cache) == before


def test_pieces_that_wait_may_be_damaged_and_are_then_nobodys(cache: Any) -> None:
    names = digests(1)
    truth = value(names[0])
    ticket = join(cache, names, 0, [(0, 100), (100, PART)])
    poke(ticket, 0, 0, truth[:PART])
    assert ticket.commit([], [(0, 0, 100, 5)]) == [CORRUPT]
    ticket.end()
    ticket = join(cache, names, 0, [(0, 100), (100, PART)])
    poke(ticket, 0, 0, truth[:PART])
    assert ticket.commit([], [(0, 0, 100, xxhash.xxh3_64_intdigest(truth[:100]))]) == [HIT]
    flip(ticket, 0, 3)
    assert ticket.commit([], [(0, 100, PART, xxhash.xxh3_64_intdigest(truth[100:PART]))]) == [CORRUPT]
    ticket.end()
    assert cache.core.probe_chain(names, 1) == b""
    whole = join(cache, names, 1)
    assert whole.claims == [1]
    whole.end()
    assert cache.core.stats()["tiercache_entries"] == 0


def test_bad_shapes_are_refused(cache: Any) -> None:
    names = digests(2)
    core = cache.core
    for size, part, claim, pieces in (
        (0, PART, 1, ()),
        (SIZE, 0, 1, ()),
        (65 * PART, PART, 1, ()),
        (SIZE, PART, 1 << PARTS, ()),
        (SIZE, PART, -1, ()),
        (SIZE, PART, 0, [(0, PART + 1)]),
        (SIZE, PART, 0, [(5, 5)]),
        (SIZE, PART, 0, [(-5, 5)]),
        (SIZE, PART, 0, [(0, 50), (40, 60)]),
        (SIZE, PART, 0, [(SIZE - 5, SIZE + 5)]),
        (SIZE, PART, 1, [(0, 50)]),
    ):
        with pytest.raises(ConfigError):
            core.join_blocks(names, size, part, claim, pieces)
    with pytest.raises(CapacityError):
        core.join_blocks(names, 64 * MIB, MIB, 1)
    with pytest.raises(ConfigError):
        core.join_blocks([names[0], names[1] * 2], SIZE, PART, 1)
    ticket = join(cache, names, 1)
    for landed, pieces in (([(7, 1, bytes(8))], ()), ([(-1, 1, bytes(8))], ()), ((), [(9, 0, 5, 0)])):
        with pytest.raises(ConfigError):
            ticket.commit(landed, pieces)
    with pytest.raises(ConfigError):
        ticket.compare([(2, 1, bytes(8))])
    ticket.end()


def test_blocks_of_other_shapes_and_puts_under_way_are_left_alone(cache: Any) -> None:
    names = digests(3)
    cache.core.store_chain(names[:1], [Buffer.of(b"x" * SIZE)])
    cache.core.store([Name(names[2])], [Buffer.of(b"lone")])
    ticket = join(cache, names, 1)
    assert ticket.outcomes == [BUSY, HIT, FULL]
    assert ticket.claims == [0, 1, 0]
    assert cache.core.store_chain(names[1:2], [Buffer.of(b"x" * SIZE)], parent=names[0]) == [BUSY]
    ticket.commit([write(ticket, 1, names[1])])
    ticket.end()
    assert cache.core.store_chain(names[1:2], [Buffer.of(b"x" * SIZE)], parent=names[0]) == [BUSY]
    assert refused(cache, digests(1, "b"), parent=digests(1, "c")[0]) == [FULL]
    put = cache.core.serving.reserve_puts([Name(digests(1, "d")[0])], [SIZE], Terms(Kind.KV), chain=True)
    assert refused(cache, digests(1, "d")) == [BUSY]
    put.end()


def test_a_ticket_keeps_its_blocks_from_eviction_and_a_full_cache_says_so(cache: Any) -> None:
    names = digests(400)
    ticket = join(cache, names, 1)
    assert ticket.outcomes[0] is HIT
    assert ticket.outcomes[-1] is FULL
    first = ticket.outcomes.index(FULL)
    assert set(ticket.outcomes[first:]) == {FULL}
    assert ticket.commit([write(ticket, i, names[i]) for i in range(first)]) == [HIT] * first
    assert refused(cache, digests(3, "b"), 1) == [FULL] * 3
    assert cache.core.probe_chain(names, 1) == b"\1" * first
    ticket.end()
    cache.flush()
    other = join(cache, digests(3, "b"), 1)
    assert other.outcomes == [HIT] * 3
    other.end()
    found = cache.core.probe_chain(names, 1)
    assert found.count(b"\1") < first
    assert b"\2\1" not in found


def test_what_is_on_the_ssd_is_joined_there(disk: Any) -> None:
    names = digests(4)
    fill(disk, names, 0x0F)
    disk.flush()
    drop_from_memory(disk, names)
    assert disk.core.probe_chain(names, 0x0F) == b"\2" * 4
    assert disk.core.probe_chain(names, 0x1F) == b""
    assert disk.core.lease_blocks_resident(names, 0x01) is None
    ticket = join(disk, names, ALL)
    assert ticket.present == [0x0F] * 4
    assert ticket.claims == [0xF0] * 4
    with wait(disk.core.lease_blocks(names[:2], 0x03), disk.loop) as lease:  # into the same extents
        assert lease.outcomes == [HIT] * 2
        check(lease, names[:2], 0x03)
        assert lease.buffer(0).address == ticket.buffers(0).address
    rows = [write(ticket, i, name) for i, name in enumerate(names)]
    assert ticket.commit(rows) == [HIT] * 4
    assert wait(ticket.saved(), disk.loop) == [HIT] * 4
    ticket.end()
    drop_from_memory(disk, names)
    with wait(disk.core.lease_blocks(names, ALL), disk.loop) as lease:
        check(lease, names)
    with wait(disk.core.match(names), disk.loop) as lease:
        assert len(lease) == 4


def test_a_join_that_brings_nothing_leaves_the_ssd_copy(disk: Any) -> None:
    names = digests(3)
    fill(disk, names, 0x0F)
    disk.flush()
    drop_from_memory(disk, names)
    before = used(disk)
    ticket = join(disk, names, 0xF0)
    assert used(disk) > before
    ticket.end()
    assert used(disk) == before
    ticket = join(disk, names, 0x0F)
    assert ticket.outcomes == [HIT] * 3
    assert used(disk) == before
    ticket.end()
    with wait(disk.core.lease_blocks(names, 0x0F), disk.loop) as lease:
        check(lease, names, 0x0F)


def test_what_is_durable_comes_back_after_a_restart(tmp_path: Path) -> None:
    names = digests(3)
    settings = {"memory_bytes": 8 * MIB, "ssd_bytes": 64 * MIB, "disk_free_floor_bytes": 0, "share": False}
    with tiercache.open(tmp_path, **settings) as cache:
        ticket = join(cache, names, 0x11)
        ticket.commit([write(ticket, i, name) for i, name in enumerate(names)])
        assert wait(ticket.saved(), cache.loop) == [HIT] * 3
        ticket.end()
    with tiercache.open(tmp_path, **settings) as cache:
        with wait(cache.core.lease_blocks(names, 0x11), cache.loop) as lease:
            check(lease, names, 0x11)
        with wait(cache.core.lease_blocks(names, 0x13), cache.loop) as lease:
            assert lease.outcomes == [MISS] * 3


def test_leases_of_blocks_tell_item_by_item(cache: Any) -> None:
    names = digests(6)
    fill(cache, names[:4], 0x03)
    fill(cache, names[:2], 0x0C)
    with wait(cache.core.lease_blocks([*names, names[0]], 0x0F), cache.loop) as lease:
        assert lease.outcomes == [HIT, HIT, MISS, MISS, MISS, MISS, HIT]
    with wait(cache.core.lease_blocks(names[1:3], (1 << 64) - 1), cache.loop) as lease:
        assert lease.outcomes == [MISS, MISS]
    assert wait(cache.core.lease_blocks([], 1), cache.loop).outcomes == []
    assert cache.core.lease_blocks_resident(names[:5], 1) is None
    with cache.core.lease_blocks_resident([names[3], names[1]], 3) as lease:
        check(lease, [names[3], names[1]], 3)


def test_a_replica_compares_what_it_holds(cache: Any) -> None:
    names = digests(3)
    fill(cache, names[:2], 0x0F)
    other = join(cache, names, 0)
    assert other.outcomes == [HIT] * 3
    assert other.present == [0] * 3
    mine = bytearray(part_digests(Buffer.of(value(names[0])), PART))
    mine[8 * 2] ^= 1
    mine[8 * 6] ^= 1
    same = part_digests(Buffer.of(value(names[1])), PART)
    assert other.compare([(0, ALL, bytes(mine)), (1, ALL, same), (2, ALL, same), (0, 3, b"")]) == [4, 0, 0, 3]
    other.end()


def test_commits_are_taken_in_order_while_the_writer_goes_on(cache: Any) -> None:
    names = digests(20)
    ticket = join(cache, names)
    futures = [ticket.commit_soon([write(ticket, i, name)]) for i, name in enumerate(names)]
    ticket.end()
    assert [future.result() for future in futures] == [[HIT]] * 20
    assert cache.core.probe_chain(names, ALL) == b"\1" * 20


def test_the_end_of_a_chain_is_evicted_first_also_after_touches(cache: Any) -> None:
    names = digests(100)
    fill(cache, names)
    cache.core.touch_chain(names[:50])
    cache.core.touch_chain([])
    for label in "bcd":
        cache.flush()  # what is being written to the SSD stays in memory meanwhile
        fill(cache, digests(100, label))
    found = cache.core.probe_chain(names, ALL)
    memory = found.count(b"\1")
    assert memory < 100
    assert found[:memory] == b"\1" * memory


def test_probes_count_parts_that_there_are(cache: Any) -> None:
    names = digests(4)
    fill(cache, names)
    assert cache.core.probe_chain(names, (1 << 64) - 1) == b"\1" * 4
    assert cache.core.probe_chain([], 1) == b""
    assert cache.core.probe_chain(digests(2, "b"), 1) == b""
    assert cache.core.probe_chain([*names, *digests(2, "b")], 1) == b"\1" * 4
    cache.core.store_chain(digests(7)[4:6], [Buffer.of(b"x" * 70_000), Buffer.of(b"y")], parent=names[-1])
    assert cache.core.probe_chain(digests(7), (1 << 64) - 1) == b"\1" * 6


def test_expired_blocks_are_neither_probed_nor_leased(cache: Any) -> None:
    names = digests(2)
    fill(cache, names, terms=Terms(Kind.KV, expiry_s=1))
    assert cache.core.probe_chain(names, ALL) == b""
    assert cache.core.lease_blocks_resident(names, ALL) is None
    with wait(cache.core.lease_blocks(names, ALL), cache.loop) as lease:
        assert lease.outcomes == [MISS, MISS]
    ticket = join(cache, names)
    assert ticket.claims == [ALL] * 2
    ticket.end()


def test_a_deleted_block_is_joined_anew_beside_its_old_writers(cache: Any) -> None:
    names, before = digests(1), used(cache)
    old = join(cache, names, 0x01)
    old.commit([write(old, 0, names[0])])
    later = join(cache, names, 0x02)
    wait(cache.core.delete([Name(names[0])]), cache.loop)
    new = join(cache, names, 0x03)
    assert new.claims == [0x03]
    assert new.buffers(0).address != later.buffers(0).address
    later.commit([write(later, 0, names[0])])
    assert new.commit([write(new, 0, names[0])]) == [HIT]
    for ticket in (old, later, new):
        ticket.end()
    assert cache.core.probe_chain(names, 0x03) == b"\1"
    wait(cache.core.delete([Name(names[0])]), cache.loop)
    assert used(cache) == before


def test_a_block_that_lost_its_extent_while_it_was_filled_is_filled_again(cache: Any) -> None:
    names, before = digests(2), used(cache)
    ticket = join(cache, names, 0x03)
    ticket.commit([write(ticket, i, names[i], 0x01) for i in range(2)])
    cache.core.quarantine([Name(names[1])])
    again = join(cache, names, 0x03)
    assert again.claims == [0, 0x03]
    assert ticket.commit([write(ticket, i, names[i], 0x02) for i in range(2)]) == [HIT, MISS]
    assert again.commit([write(again, 1, names[1])]) == [HIT]
    ticket.end()
    again.end()
    with cache.core.lease_blocks_resident(names, 0x03) as lease:
        check(lease, names, 0x03)
    wait(cache.core.delete([Name(name) for name in names]), cache.loop)
    assert used(cache) == before


def test_pieces_of_another_division_are_forgotten_once_their_writers_are_gone(cache: Any) -> None:
    """An engine that comes again with another number of stages."""
    core, name = cache.core, digests(1)[0]

    def piece(ticket: Any, start: int, stop: int) -> list[Outcome]:
        data = value(name)[start:stop]
        poke(ticket, 0, start, data)
        return list(ticket.commit([], [(0, start, stop, xxhash.xxh3_64_intdigest(data))]))

    old = join(cache, [name], 0, [(0, 100)])
    assert piece(old, 0, 100) == [HIT]
    assert refused(cache, [name], 0, [(50, 200)]) == [BUSY]  # its writer lives
    old.end()
    new = join(cache, [name], 0, [(50, 200), (200, PART)])
    assert new.pieces == [[(50, 200), (200, PART)]]
    assert piece(new, 50, 200) == [HIT]
    assert piece(new, 200, PART) == [HIT]
    assert core.probe_chain([name], 1) == b""
    rest = join(cache, [name], 0, [(0, 50)])
    assert piece(rest, 0, 50) == [HIT]
    with core.lease_blocks_resident([name], 1) as lease:
        check(lease, [name], 1)
    rest.end()
    new.end()


def test_a_ticket_of_a_closed_cache_commits_nothing(tmp_path: Path) -> None:
    with tiercache.open(tmp_path, memory_bytes=8 * MIB, ssd_bytes=0, share=False) as cache:
        ticket = join(cache, digests(2), 1)
    with pytest.raises(ClosedError):
        ticket.commit_soon([(0, 1, bytes(8))])


def test_what_is_found_damaged_as_it_is_leased_is_no_hit(disk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the load and the lease another thread may quarantine the copy, and somebody begin a new one."""
    core, names = disk.core, digests(2)
    fill(disk, names)
    disk.flush()
    drop_from_memory(disk, names)
    ensure = core._filling.ensure
    tickets = []

    async def raced(*given: Any) -> list[Outcome]:
        outcomes: list[Outcome] = await ensure(*given)
        core.quarantine([Name(name) for name in names])
        core.tiers.lose(np.array(slots_of(core, names[1:]), np.int64), TierId.SSD)
        tickets.append(join(disk, names[1:], 1))
        return outcomes

    monkeypatch.setattr(core._filling, "ensure", raced)
    lease = wait(core.lease_blocks(names, ALL), disk.loop)
    assert lease.outcomes == [MISS] * 2
    lease.release()
    tickets[0].end()


def test_pieces_that_wait_are_forgotten_with_their_extents(cache: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "WAITING_MAX", 2)
    core, names = cache.core, digests(6)
    for round_ in range(2):
        for name in names:
            ticket = join(cache, [name], 0, [(0, 100)])
            data = value(name)[:100]
            poke(ticket, 0, 0, data)
            assert ticket.commit([], [(0, 0, 100, xxhash.xxh3_64_intdigest(data))]) == [HIT]
            ticket.end()
            if not round_:
                core.quarantine([Name(name)])  # the extent goes, and what is remembered of it
                assert join_and_end(cache, name) == [HIT]
    assert len(core.blocks._waiting) <= 2
    assert set(core.blocks._waiting) == set(core.blocks._fills)


def join_and_end(cache: Any, name: bytes) -> list[Outcome]:
    ticket = join(cache, [name], 1)
    ticket.end()
    return list(ticket.outcomes)


def test_nothing_is_loaded_into_a_frozen_extent(disk: Any) -> None:
    """Somebody of before may still be writing there."""
    core, names = disk.core, digests(3)
    fill(disk, names, 0x0F)
    disk.flush()
    drop_from_memory(disk, names)
    fill(disk, names, 0x30)
    places = [core.tiers.index.look([slot])[0].memory_location for slot in slots_of(core, names)]
    core.blocks.freeze(places)
    lease = wait(core.lease_blocks(names, 0x3F), disk.loop)
    assert lease.outcomes == [MISS] * 3
    lease.release()
    core.blocks.thaw()
    with wait(core.lease_blocks(names, 0x3F), disk.loop) as lease:
        check(lease, names, 0x3F)


def slots_of(core: Any, names: list[bytes]) -> list[int]:
    match = core.tiers.index.chains.match(names)
    core.tiers.release(match)
    return [int(slot) for slot in match.slots]


def test_frozen_extents_are_written_by_nobody(cache: Any) -> None:
    names = digests(1)
    fill(cache, names, 0x01)
    with cache.core.lease_blocks_resident(names, 1) as lease:
        cache.core.blocks.freeze(lease.locations)
    ticket = join(cache, names, 0x03)
    assert ticket.outcomes == [BUSY]
    ticket.end()
    ticket = join(cache, names, 0x01)
    assert ticket.outcomes == [HIT]
    ticket.end()
    cache.core.blocks.thaw()
    fill(cache, names, 0x03)
    assert cache.core.probe_chain(names, 0x03) == b"\1"


def test_many_threads_fill_the_same_blocks_at_once(cache: Any) -> None:
    names, threads = digests(40), 4
    start = threading.Barrier(threads)
    faults: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            start.wait()
            claim = 0b11 << 2 * rank
            for low in range(0, len(names), 8):
                some = names[low : low + 8]
                ticket = join(cache, some, claim, parent=names[low - 1] if low else b"")
                while FULL in ticket.outcomes:  # the parents' rank has not come so far
                    ticket.end()
                    ticket = join(cache, some, claim, parent=names[low - 1] if low else b"")
                assert ticket.claims == [claim] * len(some)
                rows = [write(ticket, i, name) for i, name in enumerate(some)]
                assert ticket.commit(rows) == [HIT] * len(some)
                ticket.end()
        except BaseException as fault:
            faults.append(fault)

    workers = [threading.Thread(target=work, args=(rank,)) for rank in range(threads)]
    for one in workers:
        one.start()
    for one in workers:
        one.join()
    assert not faults
    with cache.core.match_resident(names) as lease:
        assert len(lease) == 40
        check(lease, names)


def test_pages_and_blocks_do_not_meet(cache: Any) -> None:
    async def load(gaps: Any, landed: Any) -> None:
        landed(range(len(gaps)))

    name = digests(1)[0]
    run = PageRun(name, SIZE, SIZE, PART)
    wait(cache.core.read_pages(run, [0], [1], load), cache.loop).release()
    fill(cache, [name], 1)
    assert cache.core.probe_chain([name], 1) == b"\1"


def test_a_block_in_the_middle_is_found_while_rows_are_still_read() -> None:
    """Its parents come along, for a block is nothing without them."""
    loop = SimLoop(1)
    world = World(loop, memory_bytes=MIB, ssd_bytes=32 * MIB)
    names = digests(30)

    async def act() -> None:
        cache = await world.open()
        ticket = cache.join_blocks(names, SIZE, PART, 1)
        ticket.commit([write(ticket, i, name) for i, name in enumerate(names)])
        assert await ticket.saved() == [HIT] * 30
        ticket.end()
        await world.close()
        cache = await world.open()
        with await cache.lease_blocks(names[20:22], 1) as lease:
            assert not cache.recovered
            assert lease.outcomes == [HIT] * 2
            check(lease, names[20:22], 1)
        await world.close()

    loop.run_until_complete(act())
    loop.close()
