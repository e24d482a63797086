"""The bound of bench.policy: a fast greedy form, checked against a slow one and against every possible choice."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.common import Json
from bench.policy import belady, compare, figures, prefix_belady

Tree = list[list[int]]


@st.composite
def chains(draw: st.DrawFn) -> Tree:
    """Requests that share prefixes: paths in a small random tree, each from its root."""
    parents = [draw(st.integers(-1, i - 1)) for i in range(draw(st.integers(1, 12)))]
    requests = []
    for _ in range(draw(st.integers(1, 10))):
        path, node = [], draw(st.integers(0, len(parents) - 1))
        while node >= 0:
            path.append(node)
            node = parents[node]
        requests.append(path[::-1])
    return requests


@given(chains(), st.integers(1, 12))
def test_what_it_keeps_are_whole_prefixes(requests: Tree, capacity: int) -> None:
    assert belady(requests, capacity) == pytest.approx(prefix_belady(requests, capacity))


def best(requests: Tree, capacity: int) -> float:
    """The most usable blocks that any choice of what to keep after each request can bring: all of them are tried."""
    states = {frozenset[int](): 0}
    for blocks in requests:
        after: dict[frozenset[int], int] = {}
        for kept, found in states.items():
            usable = next((i for i, block in enumerate(blocks) if block not in kept), len(blocks))
            there = sorted(kept | set(blocks))
            for chosen in combinations(there, min(capacity, len(there))):
                state = frozenset(chosen)
                after[state] = max(after.get(state, 0), found + usable)
        states = after
    return max(states.values()) / sum(map(len, requests))


@given(chains().filter(lambda requests: len({b for each in requests for b in each}) <= 7), st.integers(1, 4))
def test_nothing_can_find_more(requests: Tree, capacity: int) -> None:
    assert belady(requests, capacity) == pytest.approx(best(requests, capacity))


def test_a_cache_that_holds_everything_misses_each_block_once() -> None:
    requests = [[1, 2, 3], [1, 2, 4], [1, 2, 3]]
    assert belady(requests, 10) == pytest.approx(1 - 4 / 9)
    assert belady(requests, 2) == pytest.approx(4 / 9)


@pytest.mark.slow
@given(chains())
def test_no_real_cache_finds_more_than_the_bound(requests: Tree) -> None:
    for row in compare(requests, (10, 30, 60, 100)):
        ours, in_order, bound, most = (float(str(row[n])) for n in ("leaf_first", "in_order", "belady", "infinite"))
        assert max(ours, in_order) <= bound + 1e-12
        assert bound <= most + 1e-12


def test_a_report_has_a_figure_for_each_row() -> None:
    rows: list[dict[str, Json]] = [
        {"trace": "tiny"} | row for row in compare([[1, 2, 3], [1, 2, 4], [1, 2, 3]] * 3, (50, 100))
    ]
    made = {figure.name: figure for figure in figures(rows)}
    assert set(made) == {"over_in_order_least", "over_in_order_most", "tiny_50", "tiny_100"}
    assert made["over_in_order_least"].meets
