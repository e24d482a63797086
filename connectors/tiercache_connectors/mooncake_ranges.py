"""Plans of copies into several places: which bytes of a value go where, or that what was asked for cannot be done."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from tiercache.buffers import Buffer, copy

if TYPE_CHECKING:
    from collections.abc import Sequence

    Numbers = Sequence[Sequence[int]]
    Span = tuple[int, int]


class Range(NamedTuple):
    """Bytes of a value, and where they go."""

    start: int
    address: int
    length: int


def paired(all_addresses: Numbers, all_sizes: Numbers, count: int) -> list[list[Span]] | None:
    """(address, size) of each piece of each of `count` values; None where they do not fit each other."""
    if not len(all_addresses) == len(all_sizes) == count:
        return None
    rows = list(zip(all_addresses, all_sizes, strict=True))
    if any(len(some) != len(sizes) for some, sizes in rows):
        return None
    return [list(zip(some, sizes, strict=True)) for some, sizes in rows]


def whole(spans: Sequence[Span], size: int) -> list[Range] | None:
    """A whole value into these places, one after the other; None where they are longer or shorter than it."""
    ranges, start = [], 0
    for address, length in spans:
        ranges.append(Range(start, address, length))
        start += length
    return ranges if start == size else None


def chosen(spans: Sequence[Span], starts: Sequence[int], size: int) -> list[Range] | None:
    """Bytes from `starts` of a value into these places; None where it has not all of them."""
    if len(starts) != len(spans):
        return None
    ranges = [Range(start, *span) for start, span in zip(starts, spans, strict=True)]
    return ranges if all(0 <= one.start <= size - one.length for one in ranges) else None


class Row:
    """Ranges of several values into one buffer; each stands for itself."""

    def __init__(self, address: int, room: int, places: Numbers, starts: Numbers, sizes: Numbers, refused: int) -> None:
        """The buffer has `room` bytes from `address` on, 0 where it is none; `refused` is said of what is wrong."""
        self._address, self._room = address, room
        self._places, self._starts, self._sizes = places, starts, sizes
        self._fits = len(places) == len(starts) == len(sizes) and room > 0
        counts = [max(len(some), len(sizes[i]) if i < len(sizes) else 0) for i, some in enumerate(places)]
        self.answers = [[refused] * count for count in counts]

    def fits(self, keys: int) -> bool:
        """Whether there is something to be read of so many values."""
        return self._fits and len(self._places) == keys

    def plan(self, item: int, size: int) -> list[Range] | None:
        """What can be read of a value; `answers` says so then."""
        asked = self._starts[item], self._places[item], self._sizes[item]
        if len({len(some) for some in asked}) > 1:
            return None
        ranges = []
        for at, one in enumerate(zip(*asked, strict=True)):
            start, place, length = one
            if min(one) >= 0 and place + length <= self._room and start + length <= size:
                self.answers[item][at] = length
                ranges.append(Range(start, self._address + place, length))
        return ranges


def scatter(source: Buffer, plan: Sequence[Range]) -> None:
    """Copies ranges of a value that lies there to their places."""
    for start, address, length in plan:
        if length:
            copy(source.slice(start, length), Buffer(address, length, None))
