"""Geometry and request planning, against brute force over single bytes."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiercache.lease import PageRun
from tiercache.model import all_parts
from tiercache.pages import geometry
from tiercache.pages.plan import WASTE_SHARE, Limits, plan_around, plan_requests

PAGE, PART = 64, 8


def bytes_of(ordinals, maps, size):
    found = set()
    for ordinal, parts in zip(ordinals, maps, strict=True):
        page_length = min(PAGE, size - ordinal * PAGE)
        for low, high in geometry.stretches(ordinal, parts, page_length, PAGE, PART):
            found |= set(range(low, high))
    return found


@given(st.integers(0, 400), st.integers(0, 400))
def test_cover_is_every_part_that_is_touched(start, length):
    ordinals, maps = geometry.cover(start, start + length, PAGE, PART)
    wanted = {byte // PART for byte in range(start, start + length)}
    assert {byte // PART for byte in bytes_of(ordinals, maps, 1 << 20)} == wanted
    assert ordinals == sorted(set(ordinals))


@given(st.integers(1, 400), st.data())
def test_inside_is_every_part_that_is_whole(size, data):
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    got = bytes_of(*geometry.inside(start, stop, size, PAGE, PART), size)
    whole = [
        set(range(low, min(size, low + PART)))
        for low in range(0, size, PART)
        if low >= start and min(size, low + PART) <= stop and low < stop
    ]
    assert got == set().union(*whole)


def test_sizes_that_are_exact_multiples_of_a_page():
    assert geometry.cover(0, PAGE, PAGE, PART) == ([0], [0xFF])
    assert geometry.cover(PAGE, 2 * PAGE, PAGE, PART) == ([1], [0xFF])
    assert geometry.cover(PAGE - 1, PAGE + 1, PAGE, PART) == ([0, 1], [0x80, 0x01])
    assert geometry.inside(PAGE, 2 * PAGE, 2 * PAGE, PAGE, PART) == ([1], [0xFF])


def test_many_spans_are_one_cover():
    ordinals, maps = geometry.cover_all([(130, 140), (0, 9), (4, 12)], PAGE, PART)
    assert (ordinals, maps) == ([0, 2], [0b11, 0b11])


@pytest.mark.parametrize(
    ("page_bytes", "part_bytes"),
    [(1 << 20, 16 << 10), (64 << 10, 16 << 10), (4 << 20, 64 << 10), (1344 << 10, 24 << 10)],
)
def test_the_finest_part_fits_the_map(page_bytes, part_bytes):
    assert geometry.part_bytes_of(page_bytes) == part_bytes
    assert all_parts(page_bytes, part_bytes).bit_length() <= 64


def run_of(size):
    return PageRun(b"k" * 32, size, PAGE, PART)


@given(
    size=st.integers(1, 1000),
    maps=st.dictionaries(st.integers(0, 15), st.integers(1, 255), max_size=8),
    length_max=st.integers(1, 300),
    gap_max=st.integers(0, 200),
)
def test_requests_cover_every_gap_once_and_waste_little(size, maps, length_max, gap_max):
    run = run_of(size)
    gaps = []
    for ordinal, parts in maps.items():
        if ordinal * PAGE < size and parts & all_parts(run.page_size(ordinal), PART):
            gaps.append((ordinal, parts & all_parts(run.page_size(ordinal), PART)))
    requests = plan_requests(run, gaps, Limits(length_max, gap_max))
    wanted = bytes_of([gap[0] for gap in gaps], [gap[1] for gap in gaps], size)
    seen = []
    for request in requests:
        assert request.start == request.pieces[0].start
        assert request.stop == request.pieces[-1].stop <= size
        assert request.stop - request.start <= max(length_max, PART)
        for piece in request.pieces:
            assert gaps[piece.gap][0] == piece.start // PAGE == (piece.stop - 1) // PAGE
            seen += range(piece.start, piece.stop)
    assert sorted(seen) == sorted(wanted)
    asked = sum(request.stop - request.start for request in requests)
    assert (asked - len(wanted)) * WASTE_SHARE <= len(wanted)
    assert all(one.stop <= two.start for one, two in itertools.pairwise(requests))


def test_adjacent_gaps_of_neighbouring_pages_are_one_request():
    requests = plan_requests(run_of(1000), [(1, 0xFF), (0, 0xF0), (2, 0x01)], Limits(1000, 0))
    assert [(request.start, request.stop) for request in requests] == [(32, 136)]
    assert [piece.gap for piece in requests[0].pieces] == [1, 0, 2]


def test_a_cheap_hole_is_swallowed_and_a_dear_one_is_not():
    cheap = plan_requests(run_of(1000), [(0, 0x7F), (1, 0xFF)], Limits(1000, 100))
    assert [(request.start, request.stop) for request in cheap] == [(0, 128)]
    dear = plan_requests(run_of(1000), [(0, 0b1), (0, 0b100)], Limits(1000, 100))
    assert len(dear) == 2
    far = plan_requests(run_of(1000), [(0, 0x7F), (1, 0xFF)], Limits(1000, 4))
    assert len(far) == 2


def test_long_requests_are_split_evenly_between_parts():
    requests = plan_requests(run_of(6400), [(ordinal, 0xFF) for ordinal in range(100)], Limits(2000, 0))
    assert [request.stop - request.start for request in requests] == [1600, 1600, 1600, 1600]
    assert all(request.start % PART == 0 for request in requests)


def test_reads_around_the_cache_are_split_the_same_way():
    assert plan_around(10, 20, 100) == [(10, 20)]
    assert plan_around(0, 250, 100) == [(0, 84), (84, 168), (168, 250)]
    assert plan_around(5, 5, 100) == []
