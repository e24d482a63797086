"""Placement: victims go exactly one way, and what is kept is what was used last."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tiercache.placement import bytes_over, plan_pressure, plan_reclaim


def test_pressure_demotes_only_what_the_ssd_lacks_and_can_take() -> None:
    slots = np.array([5, 6, 7])
    memory, ssd = np.array([3, 1, 0], np.uint64), np.array([1, 3, 0], np.uint64)
    plan = plan_pressure(slots, memory, ssd, can_demote=True)
    assert (plan.drop.tolist(), plan.demote.tolist()) == ([6, 7], [5])
    assert plan_pressure(slots, memory, ssd, can_demote=False).drop.tolist() == [5, 6, 7]


@given(
    st.lists(st.tuples(st.integers(0, 100), st.integers(1, 50)), max_size=30), st.integers(0, 100), st.integers(0, 500)
)
def test_reclaim_keeps_the_latest_within_its_bytes(rows: list[tuple[int, int]], threshold: int, most: int) -> None:
    order, sizes = (np.array([row[i] for row in rows], np.uint32) for i in range(2))
    keep = plan_reclaim(order, sizes, threshold, most)
    assert sizes[keep].sum() <= most
    assert (order[keep] > threshold).all()
    better = [int(o) for o, kept in zip(order, keep, strict=True) if not kept and o > threshold]
    if keep.any() and better and max(better) > int(order[keep].min()):
        raise AssertionError("a later used payload was dropped for an earlier one")


def test_marks() -> None:
    assert bytes_over(95, 100, 0.95, 0.9) == 0
    assert bytes_over(96, 100, 0.95, 0.9) == 6
