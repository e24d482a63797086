"""Lanes: the same answers in any number of them; nothing is still copying when a call ends, whatever ended it."""

from __future__ import annotations

import os
import threading

import pytest

from tiercache.kv.lanes import LANE_BYTES, Lanes

MUCH = 64 * LANE_BYTES


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("blocks", [0, 1, 2, 5, 64])
def test_answers_come_in_order(count: int, blocks: int) -> None:
    assert Lanes(count).spread(blocks, MUCH, lambda first, stop: list(range(first, stop))) == list(range(blocks))


def test_little_is_done_by_the_caller_alone() -> None:
    here = threading.get_ident()
    spread = Lanes(4).spread
    assert set(spread(8, LANE_BYTES, lambda first, stop: [threading.get_ident()])) == {here}
    assert len(set(spread(8, 4 * LANE_BYTES, lambda first, stop: [threading.get_ident()]))) > 1


@pytest.mark.parametrize("fails_first", [True, False])
def test_a_fault_is_raised_when_all_have_ended(fails_first: bool) -> None:
    ended, go = [], threading.Event()

    def work(first: int, stop: int) -> list[int]:
        if (first == 0) == fails_first:
            go.set()
            raise ValueError("that one")
        assert go.wait(10)
        ended.append(first)
        return []

    with pytest.raises(ValueError, match="that one"):
        Lanes(2).spread(2, MUCH, work)
    assert len(ended) == 1


def test_a_forked_process_has_lanes_of_its_own() -> None:
    lanes = Lanes(2)
    assert lanes.spread(2, MUCH, lambda first, stop: [first]) == [0, 1]
    child = os.fork()
    if not child:
        os._exit(0 if lanes.spread(2, MUCH, lambda first, stop: [first]) == [0, 1] else 1)
    assert os.waitpid(child, 0)[1] == 0
