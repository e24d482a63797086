"""Decides which ranged requests fill which gaps: a pure planner, the reader executes what it returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tiercache.pages.geometry import stretches

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tiercache.lease import PageRun

WASTE_SHARE = 4
"""A hole is fetched too only if it is at most 1/4 of what the request is for: bytes from the origin stay under 1.25 of
those wanted, however generous `merge_gap_bytes` is."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may be."""

    request_bytes_max: int
    """Longer stretches are split into requests of about equal length, which run in parallel."""
    merge_gap_bytes: int
    """Holes up to this length are fetched and thrown away, to save a request."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes [start, stop) of the file that belong to one gap."""

    gap: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Request:
    """One ranged request over [start, stop) of the file; bytes between its pieces are holes that nobody wants."""

    start: int
    stop: int
    pieces: tuple[Piece, ...]


def plan_requests(run: PageRun, gaps: Sequence[tuple[int, int]], limits: Limits) -> list[Request]:
    """Requests for `gaps` (page ordinal and map of missing parts, any order), ascending.

    Adjacent gaps, also of neighbouring pages, become one request; small holes are swallowed; long requests are split.
    """
    pieces: list[Piece] = []
    for index, (ordinal, parts) in enumerate(gaps):
        reach = stretches(ordinal, parts, run.page_size(ordinal), run.page_bytes, run.part_bytes)
        pieces.extend(Piece(index, start, stop) for start, stop in reach)
    pieces.sort(key=lambda piece: piece.start)
    requests: list[Request] = []
    for group in _groups(pieces, limits):
        requests.extend(_split(group, run.part_bytes, limits.request_bytes_max))
    return requests


def _groups(pieces: Sequence[Piece], limits: Limits) -> list[list[Piece]]:
    """Pieces that go together: adjacent ones always, ones behind a hole when the hole is cheap enough.

    A hole is weighed against the wanted bytes of the stretches on both sides of it, and holes of one request add up.
    """
    stretches_: list[list[Piece]] = []
    for piece in pieces:
        if stretches_ and stretches_[-1][-1].stop == piece.start:
            stretches_[-1].append(piece)
        else:
            stretches_.append([piece])
    groups: list[list[Piece]] = []
    wanted = wasted = 0
    for stretch in stretches_:
        length = stretch[-1].stop - stretch[0].start
        if groups:
            hole = stretch[0].start - groups[-1][-1].stop
            total = stretch[-1].stop - groups[-1][0].start
            cheap = hole <= limits.merge_gap_bytes and (wasted + hole) * WASTE_SHARE <= wanted + length
            if cheap and total <= limits.request_bytes_max:
                groups[-1].extend(stretch)
                wanted, wasted = wanted + length, wasted + hole
                continue
        groups.append(list(stretch))
        wanted, wasted = length, 0
    return groups


def _split(group: Sequence[Piece], part_bytes: int, length_max: int) -> list[Request]:
    """One group as requests of at most `length_max` (at least a part), of about equal length, cut between parts."""
    start, stop = group[0].start, group[-1].stop
    count = -(-(stop - start) // max(length_max, part_bytes))
    if count <= 1:
        return [Request(start, stop, tuple(group))]
    step = -(-(stop - start) // count)
    requests: list[Request] = []
    low = start
    while low < stop:
        high = min(stop, max(low + part_bytes, (low + step) // part_bytes * part_bytes))
        if stop - high < part_bytes and stop - low <= max(length_max, part_bytes):
            high = stop  # no crumbs at the end
        share = [
            Piece(piece.gap, max(low, piece.start), min(high, piece.stop))
            for piece in group
            if piece.start < high and piece.stop > low
        ]
        if share:
            requests.append(Request(share[0].start, share[-1].stop, tuple(share)))
        low = high
    return requests


def plan_around(start: int, stop: int, length_max: int) -> list[tuple[int, int]]:
    """Ranges of about equal length, at most `length_max`, that make up [start, stop): reads that no page keeps."""
    count = -(-(stop - start) // length_max)
    if count <= 0:
        return []
    step = -(-(stop - start) // count)
    return [(low, min(stop, low + step)) for low in range(start, stop, step)]
