"""Blocks that several processes fill together in a real owner's memory: claims, deaths of writers and of owners."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

import tiercache
from tests.shared.conftest import Shared, eventually
from tests.unit import test_cache_blocks as alone
from tests.unit.test_cache_blocks import (
    ALL,
    BUSY,
    HIT,
    MIB,
    PART,
    at_rest,
    check,
    digests,
    fill,
    join,
    used,
    value,
    warm,
    write,
)  # fmt: skip
from tiercache.errors import UnavailableError
from tiercache.model import Name
from tiercache.sync import wait

pytestmark = [pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="Linux only"), pytest.mark.slow]

# The scenes of a cache alone, with another process as the owner.
for _scene in (
    "a_block_that_is_filled_whole_is_a_block_like_any_other",
    "two_writers_fill_one_block_and_neither_waits",
    "what_is_claimed_is_busy_and_what_is_there_needs_nothing",
    "abandoned_parts_are_claimed_anew_and_an_empty_block_vanishes",
    "other_bytes_than_were_meant_are_shown_to_nobody",
    "a_part_made_of_pieces_is_shown_when_it_is_covered",
    "pieces_that_wait_may_be_damaged_and_are_then_nobodys",
    "bad_shapes_are_refused",
    "leases_of_blocks_tell_item_by_item",
    "a_replica_compares_what_it_holds",
    "commits_are_taken_in_order_while_the_writer_goes_on",
    "probes_count_parts_that_there_are",
    "expired_blocks_are_neither_probed_nor_leased",
    "a_deleted_block_is_joined_anew_beside_its_old_writers",
    "many_threads_fill_the_same_blocks_at_once",
    "the_end_of_a_chain_is_evicted_first_also_after_touches",
):
    globals()[f"test_{_scene}"] = getattr(alone, f"test_{_scene}")


@pytest.fixture
def shared(shared: Shared) -> Shared:
    shared.settings |= {"memory_bytes": 8 * MIB, "ssd_bytes": 0, "client_share": 1.0, "owner_deadline_s": 5.0}
    return shared


def opened(shared: Shared, **settings: Any) -> Any:
    return tiercache.open(shared.directory, **shared.settings | settings)


@pytest.fixture(params=[0, 64 * MIB], ids=["memory", "ssd"])
def cache(request: pytest.FixtureRequest, shared: Shared) -> Iterator[Any]:
    with opened(shared, ssd_bytes=request.param) as one:
        assert type(one.core).__name__ == "SharedCache"
        yield warm(one)
        eventually(lambda: wait(one.core.call("validate", {}), one.loop)["pins"] == 0)
        at_rest(one)


def test_two_processes_fill_one_block(shared: Shared, worker: Any) -> None:
    names = digests(6)
    left, right = worker(), worker()
    assert left.join("a", 6, 0x0F) == [["HIT"] * 6, [0x0F] * 6, [0] * 6]
    assert right.join("a", 6, 0xFF) == [["HIT"] * 6, [0xF0] * 6, [0] * 6]
    assert right.land() == ["HIT"] * 6
    with opened(shared) as cache:
        assert cache.core.probe_chain(names, 0xF0) == b"\1" * 6
        assert cache.core.probe_chain(names, ALL) == b""
        assert left.land() == ["HIT"] * 6
        assert cache.core.probe_chain(names, ALL) == b"\1" * 6
        with cache.core.match_resident(names) as lease:
            assert [bytes(lease.view(i)) for i in range(6)] == [value(name) for name in names]
        assert left.end_join() is None
        assert right.end_join() is None
        eventually(lambda: wait(cache.core.call("validate", {}), cache.loop)["pins"] == 0)


def test_parts_of_a_writer_that_is_killed_are_claimed_anew(shared: Shared, worker: Any) -> None:
    names = digests(4)
    with opened(shared) as cache:
        before = used(warm(cache))
        for late in (False, True):
            dead = worker()
            assert dead.join("a", 4, 0x3F)[1] == [0x3F] * 4
            assert dead.land(2) == ["HIT"] * 2  # the other two are written, and not committed
            mine = join(cache, names, 0xFF) if late else None
            if mine is not None:
                assert mine.claims == [0xC0] * 4
                assert mine.commit([write(mine, i, name) for i, name in enumerate(names)]) == [HIT] * 4
            dead.kill()
            eventually(lambda: len(wait(cache.core.call("owner", {}), cache.loop)["clients"]) == 1)
            again = join(cache, names, 0xFF)
            there = 0xC0 if late else 0
            assert again.present == [0x3F | there] * 2 + [there] * 2
            assert again.claims == [0xC0 & ~there] * 2 + [0xFF & ~there] * 2
            again.commit([write(again, i, name) for i, name in enumerate(names) if again.claims[i]])
            again.end()
            if mine is not None:
                mine.end()
            with cache.core.lease_blocks_resident(names, ALL) as lease:
                check(lease, names)
            wait(cache.core.delete([Name(name) for name in names]), cache.loop)
            eventually(lambda: wait(cache.core.call("validate", {}), cache.loop)["pins"] == 0)
            at_rest(cache)
            assert used(cache) == before
    assert shared.log().count("Traceback") == 0


def test_a_block_of_which_nothing_landed_vanishes_with_its_writer(shared: Shared, worker: Any) -> None:
    with opened(shared) as cache:
        join(cache, digests(23), 1).end()
        before = used(warm(cache))
        dead = worker()
        assert dead.join("a", 20, ALL)[0] == ["HIT"] * 20
        assert dead.pieces("b", 3, [[0, 100]]) == [[[0, 100]]] * 3
        dead.kill()
        eventually(lambda: used(cache) == before)
        at_rest(cache)
        assert cache.core.stats()["tiercache_entries"] == 0


@pytest.mark.parametrize("ssd_bytes", [0, 64 * MIB], ids=["memory", "ssd"])
def test_a_new_owner_has_what_was_committed_and_nothing_else(shared: Shared, worker: Any, ssd_bytes: int) -> None:
    shared.settings["ssd_bytes"] = ssd_bytes
    names = digests(6)
    one, two = worker(), worker()
    assert one.join("a", 6, 0x0F)[1] == [0x0F] * 6
    assert two.join("a", 6, 0xF0)[1] == [0xF0] * 6
    assert one.land(4) == ["HIT"] * 4
    assert two.land(2, 0x30) == ["HIT"] * 2
    shared.kill_owner()
    with opened(shared) as cache:
        assert cache.core.probe_chain(names, 0x3F) == b"\1" * 2
        assert cache.core.probe_chain(names, 0x0F) == b"\1" * 4
        assert cache.core.probe_chain(names, 0x40) == b""
        assert one.land_fails() == "UnavailableError"
        assert two.land_fails() == "UnavailableError"
        eventually(lambda: "back or gone" in shared.log())
        with cache.core.lease_blocks_resident(names[:4], 0x0F) as lease:
            check(lease, names[:4], 0x0F)
        fill(cache, names)
        with cache.core.lease_blocks_resident(names, ALL) as lease:
            check(lease, names)
        one.end_join()
        two.end_join()
        eventually(lambda: wait(cache.core.call("validate", {}), cache.loop)["pins"] == 0)
        at_rest(cache)


def test_until_everybody_is_back_what_is_missing_is_written_by_nobody(shared: Shared, worker: Any) -> None:
    """A writer that hangs may still write for the dead owner: its extents wait for it, or for its death."""
    names = digests(2)
    hung = worker()
    assert hung.join("a", 2, 0x0F)[1] == [0x0F] * 2
    assert hung.land(2, 0x01) == ["HIT"] * 2
    hung.stop_running()
    shared.kill_owner()
    with opened(shared) as cache:
        assert cache.core.probe_chain(names, 0x01) == b"\1" * 2
        ticket = join(cache, names, 0x0F)
        assert ticket.outcomes == [BUSY] * 2
        ticket.end()
        ticket = join(cache, names, 0x01)
        assert ticket.outcomes == [HIT] * 2
        ticket.end()
        other = join(cache, digests(2, "b"), 0x0F)
        assert other.outcomes == [HIT] * 2
        other.end()
        hung.kill()
        eventually(lambda: "back or gone" in shared.log())
        fill(cache, names, 0x0F)
        assert cache.core.probe_chain(names, 0x0F) == b"\1" * 2


def test_a_ticket_ends_with_its_owner_and_is_taken_anew(shared: Shared) -> None:
    names = digests(3)
    with opened(shared) as cache:
        ticket = join(cache, names, 0x0F)
        rows = [write(ticket, i, name) for i, name in enumerate(names)]
        assert ticket.commit(rows[:1]) == [HIT]
        shared.kill_owner()
        with pytest.raises(UnavailableError):
            ticket.commit(rows[1:])
        with pytest.raises(UnavailableError):
            ticket.commit_soon(rows[1:]).result()
        with pytest.raises(UnavailableError), ticket.writing():
            raise AssertionError
        ticket.end()
        eventually(lambda: cache.core.probe_chain(names, 0x0F) == b"\1")
        eventually(lambda: "back or gone" in shared.log())
        fill(cache, names, 0x0F)
        with cache.core.lease_blocks_resident(names, 0x0F) as lease:
            check(lease, names, 0x0F)


def test_what_is_saved_outlives_the_owner_and_its_memory(shared: Shared) -> None:
    names = digests(3)
    with opened(shared, ssd_bytes=64 * MIB) as cache:
        ticket = join(cache, names, 0x11)
        ticket.commit([write(ticket, i, name) for i, name in enumerate(names)])
        assert wait(ticket.saved(), cache.loop) == [HIT] * 3
        ticket.end()
    shared.wait_until_gone()
    with opened(shared, ssd_bytes=64 * MIB) as cache:
        with wait(cache.core.lease_blocks(names, 0x11), cache.loop) as lease:
            check(lease, names, 0x11)
        assert cache.core.probe_chain(names, 0x11) == b"\1" * 3
        ticket = join(cache, names, 0xFF)
        assert ticket.present == [0x11] * 3
        ticket.end()


def test_a_client_holds_no_more_than_its_share(shared: Shared) -> None:
    with opened(shared, client_share=0.25) as cache:
        names = digests(100)
        ticket = join(cache, names, 1)
        most = 2 * MIB // (8 * PART)
        assert ticket.outcomes == [HIT] * most + [BUSY] * (100 - most)
        assert ticket.claims == [1] * most + [0] * (100 - most)
        assert join(cache, digests(1, "b"), 1).outcomes == [BUSY]
        rows = [write(ticket, i, names[i]) for i in range(most)]
        assert ticket.commit_soon(rows).result() == [HIT] * most
        assert ticket.compare([(most + 1, 1, bytes(8))]) == [0]
        ticket.end()
        fill(cache, names[most : most + 1], 1, parent=names[most - 1])
        assert wait(cache.core.lease_blocks(names[: most + 1], 1), cache.loop).outcomes == [BUSY] * (most + 1)
