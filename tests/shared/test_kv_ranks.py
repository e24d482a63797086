"""Ranks of one engine in processes of their own over one owner: what they write is stored once and read anywhere,
whoever of them, or the owner, is killed in the middle."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import tiercache
from tests.kv_matrix.engine import layout_of
from tests.kv_matrix.matrix import Shape, run
from tests.shared.conftest import Shared, Worker, eventually
from tests.unit import test_kv_store as alone
from tests.unit import test_kv_store_faults as faults
from tests.unit.test_kv_store import check_nothing_leaked
from tiercache.sync import wait

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MIB = 1 << 20
KV_RANK = Path(__file__).with_name("kv_rank.py")
TOKENS = 16 * 24

pytestmark = [pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="Linux only"), pytest.mark.slow]

# The scenes of a cache alone, with another process as the owner.
for _module, _scenes in (
    (
        alone,
        (
            "what_one_engine_saved_another_loads",
            "a_range_of_blocks_is_saved_and_loaded",
            "a_second_save_copies_nothing",
            "ranks_store_every_byte_once",
            "a_block_that_lacks_a_rank_is_there_for_those_that_do_not_need_it",
            "a_strided_slice_and_one_of_two_arrays",
            "a_turn_moves_what_was_appended_and_nothing_else",
            "what_was_lost_is_saved_again",
            "groups_that_are_not_full_attention_may_begin_anywhere",
            "a_cancelled_load_writes_nothing",
            "a_cancelled_save_frees_its_pages_and_its_ticket",
            "a_save_stopped_in_the_middle_leaves_no_claims",
            "a_store_that_is_closed_ends_everything",
            "several_threads_save_and_load_at_once",
        ),
    ),
    (
        faults,
        (
            "a_difference_that_came_too_late_to_be_seen_is_a_miss_for_that_rank",
            "a_replica_that_never_comes_costs_a_moment_once",
            "loads_go_before_saves",
        ),
    ),
):
    for _scene in _scenes:
        globals()[f"test_{_scene}"] = getattr(_module, f"test_{_scene}")


@pytest.fixture
def shared(shared: Shared) -> Shared:
    shared.settings |= {"client_share": 1.0, "owner_deadline_s": 5.0}
    return shared


@pytest.fixture
def cache(shared: Shared) -> Iterator[Any]:
    with tiercache.open(shared.directory, **shared.settings) as one:
        assert type(one.core).__name__ == "SharedCache"
        yield one
        check_nothing_leaked(one)


class RankProcess(Worker):
    """A process that runs kv_rank.py."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(KV_RANK)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )
        self.pid = self._process.pid
        self._pending = 1


@pytest.fixture
def rank(shared: Shared) -> Iterator[Callable[..., Any]]:
    """Makes ranks: `rank(kind, tp, tp_rank)`."""
    made: list[RankProcess] = []
    environment = shared.environment | {"PYTHONPATH": os.pathsep.join(sys.path)}

    def make(kind: str, tp: int, tp_rank: int, tokens: int = TOKENS, **stage: int) -> RankProcess:
        one = RankProcess(environment)
        made.append(one)
        assert one.open(shared.directory, **shared.settings) == "SharedCache"
        one.hold(kind, tp, tp_rank, tokens, **stage)
        return one

    yield make
    for one in made:
        one.stop()


def at_rest(one: Any) -> None:
    """Nothing is pinned at the owner, and its index is in order."""
    eventually(lambda: one.validate()["pins"] == 0)
    assert one.validate()["broken"] == ""


def all_save(ranks: list[Any], seed: int) -> list[dict[str, Any]]:
    """All at once."""
    for one in ranks:
        one.compute(seed)
    return [one.end() for one in [each.begin("save", seed) for each in ranks]]


@pytest.mark.parametrize(("kind", "tp", "pp"), [("MFA", 4, 1), ("GQA", 2, 2)])
def test_ranks_of_one_engine_store_once_and_others_read(shared: Shared, rank: Any, kind: str, tp: int, pp: int) -> None:
    layout, blocks = layout_of(kind), TOKENS // 16
    ranks = [rank(kind, tp, r, pp=pp, pp_rank=stage) for stage in range(pp) for r in range(tp)]
    for seed in range(2):
        saved = all_save(ranks, seed)
        assert [(one["hits"], one["differs"], one["free"]) for one in saved] == [(blocks, {}, True)] * len(ranks)
        assert sum(one["moved"] for one in saved) == blocks * layout.block_bytes
        assert {one.match(seed) for one in ranks} == {blocks}
    reader = rank(kind, 1, 0)
    for seed in range(2):
        for one in (reader, *ranks):
            assert one.load(seed) == {"hits": blocks, "wrong": 0, "done": True}
    at_rest(reader)


def test_one_flipped_byte_in_one_process_is_found(shared: Shared, rank: Any) -> None:
    blocks = TOKENS // 16
    ranks = [rank("MFA", 4, r) for r in range(4)]
    for one in ranks:
        one.compute(0)
    ranks[2].flip(100, 3)  # layer 3 is in part 0, which replica 0 writes
    saved = [one.end() for one in [each.begin("save", 0) for each in ranks]]
    assert [one["hits"] for one in saved] == [blocks] * 4
    assert [one["differs"] for one in saved] == [{}, {}, {str(100 // 16): 1}, {}]
    assert [one.load(0)["wrong"] for one in ranks] == [0, 0, 1, 0]
    assert [one.count("tiercache_kv_divergent_parts_total") for one in ranks] == [0, 0, 1, 0]
    ranks[2].kill()
    again = rank("MFA", 4, 2)
    assert again.load(0) == {"hits": blocks, "wrong": 1, "done": True}
    assert rank("MFA", 1, 0).load(0) == {"hits": blocks, "wrong": 0, "done": True}
    at_rest(again)


@pytest.mark.parametrize("steps", [2, 3])
def test_a_rank_killed_in_the_middle_of_a_save(shared: Shared, rank: Any, steps: int) -> None:
    """What it had claimed can be claimed anew, and until then nobody sees a whole block."""
    blocks = TOKENS // 16
    ranks = [rank("MHA", 2, r) for r in range(2)]
    for one in ranks:
        one.compute(0)
    ranks[1].begin("save_some", 0, steps)
    assert ranks[1].hear() > 0
    assert ranks[0].save(0)["hits"] == blocks
    ranks[1].kill()
    eventually(lambda: ranks[0].validate()["pins"] == 0)
    assert rank("MHA", 1, 0).match(0) in (0, blocks)  # its commit came before its death, or did not
    assert ranks[0].load(0)["wrong"] == 0
    again = rank("MHA", 2, 1)
    again.compute(0)
    assert again.save(0)["hits"] == blocks
    assert rank("MHA", 1, 0).load(0) == {"hits": blocks, "wrong": 0, "done": True}
    at_rest(again)


def test_a_rank_killed_in_the_middle_of_a_load(shared: Shared, rank: Any) -> None:
    blocks = TOKENS // 16
    one, two = rank("MFA", 1, 0), rank("MFA", 1, 0)
    one.compute(0)
    assert one.save(0)["hits"] == blocks
    at_rest(one)
    two.begin("load_some", 0, 3)
    assert two.hear() > 0
    assert one.validate()["pins"] > 0
    two.kill()
    at_rest(one)
    assert one.load(0)["wrong"] == 0


def test_the_owner_is_killed_again_and_again(shared: Shared, rank: Any) -> None:
    """Saves and loads end, with whatever outcome; the next ones find the next owner, and no byte is ever wrong."""
    blocks, ranks = TOKENS // 16, [rank("GQA", 2, r) for r in range(2)]
    pause = threading.Event()
    for seed in range(4):
        for one in ranks:
            one.compute(seed)
        under_way = [one.begin("save", seed) for one in ranks]
        pause.wait(0.01 * seed)  # the moment is what is random here
        shared.kill_owner()
        for one in under_way:
            assert one.end()["free"]
        for one in ranks:
            assert one.load(seed)["wrong"] == 0
        for one in ranks:
            one.compute(seed)

        def all_saved(seed: int = seed) -> bool:
            return [one["hits"] for one in all_save(ranks, seed)] == [blocks] * 2

        eventually(all_saved)
        assert [one.load(seed) for one in ranks] == [{"hits": blocks, "wrong": 0, "done": True}] * 2
    at_rest(ranks[0])


def test_ranks_killed_at_any_moment_under_pressure(shared: Shared, rank: Any) -> None:
    """More sequences than memory holds, saved and loaded at random by three processes that are killed one by one."""
    shared.settings |= {"memory_bytes": 32 * MIB}
    rng, pause = random.Random(3), threading.Event()
    watcher = rank("MFA", 1, 0)
    for round_ in range(3):
        churning = [rank("MFA", 2, r) for r in range(2)] + [rank("MFA", 1, 0)]
        for seed, one in enumerate(churning):
            one.begin("churn", 10 * round_ + seed, 8)
            assert one.hear() == "churning"
        for one in churning:
            pause.wait(rng.uniform(0.2, 0.6))
            assert one.kill() == ""  # it has said nothing of wrong bytes
    at_rest(watcher)
    for seed in range(8):
        assert watcher.load(seed)["wrong"] == 0
    assert watcher.stats("tiercache_internal_errors") in ({}, {"tiercache_internal_errors_total": 0})


def test_the_matrix_by_way_of_an_owner(cache: Any) -> None:
    row = run(cache, "MFA", 144, [Shape(1, 1, 32), Shape(8, 2, 16), Shape(4, 1, 128)])
    assert (row.faults, row.mismatch, row.differs) == ([], 0, 0)
    assert row.stored_bytes == row.moved_bytes == row.logical_bytes


def test_rot_in_the_shared_memory_is_seen_by_whoever_loads(cache: Any) -> None:
    """All blocks are on the SSD, and rot in memory: every load is right, and every damage is counted."""
    layout = layout_of("MFA")
    keys, truth = alone.saved(cache, layout, 16 * 8, durable=True)
    with wait(cache.core.lease_blocks(keys, layout.all_parts), cache.loop) as lease:
        for block in range(8):
            lease.buffer(block).array()[block * layout.part_bytes] ^= 1
    with cache.kv(layout) as store:
        alone.check_load(store, keys, truth)
    assert cache.stats()['tiercache_corruptions_total{tier="memory"}'] >= 8
