"""FreeSpace: which pages of a numbered space are free; best fit, coalescing, a few microseconds a call."""

from __future__ import annotations

from bisect import bisect_left, insort


class FreeSpace:
    """Free extents of a space of pages, found by best fit and merged with their neighbours when they come back.

    Best fit, lowest address first (Knuth, The Art of Computer Programming 1, 2.5): the shortest free extent that is
    long enough, kept in one sorted list of addresses for each length. Not thread-safe: the arena's lock guards it.
    Spaces of two segments never merge, because the first page of a segment is never free.
    """

    __slots__ = ("_at", "_before", "_lengths", "_starts", "free_pages")

    def __init__(self) -> None:
        self._at: dict[int, int] = {}  # first page -> pages
        self._before: dict[int, int] = {}  # one past the last page -> first page
        self._lengths: list[int] = []  # that occur, ascending
        self._starts: dict[int, list[int]] = {}  # pages -> first pages, ascending
        self.free_pages = 0

    def add(self, start: int, pages: int) -> None:
        """Makes pages [start, start + pages) free; they must not be free now."""
        assert pages > 0, pages
        self.free_pages += pages
        after = self._at.get(start + pages)
        if after is not None:
            self._cut(start + pages, after)
            pages += after
        left = self._before.get(start)
        if left is not None:
            length = self._at[left]
            self._cut(left, length)
            start, pages = left, pages + length
        self._put(start, pages)

    def take(self, pages: int) -> int:
        """First of `pages` adjacent pages, no longer free; -1 when no free extent is that long."""
        fit = bisect_left(self._lengths, pages)
        if fit == len(self._lengths):
            return -1
        length = self._lengths[fit]
        start = self._starts[length][0]
        self._cut(start, length)
        if length > pages:
            self._put(start + pages, length - pages)
        self.free_pages -= pages
        return start

    def take_top(self, start: int, stop: int, pages: int) -> int:
        """Like `take`, from the end of the highest free extent inside [start, stop): for what never goes back."""
        best = max((at for at, length in self._at.items() if start <= at < stop and length >= pages), default=-1)
        if best < 0:
            return -1
        length = self._at[best]
        self._cut(best, length)
        if length > pages:
            self._put(best, length - pages)
        self.free_pages -= pages
        return best + length - pages

    def extents(self) -> list[tuple[int, int]]:
        """All free extents, (first page, pages), by address."""
        return sorted(self._at.items())

    @property
    def longest(self) -> int:
        """Pages of the longest free extent."""
        return self._lengths[-1] if self._lengths else 0

    def _put(self, start: int, pages: int) -> None:
        self._at[start] = pages
        self._before[start + pages] = start
        starts = self._starts.get(pages)
        if starts is None:
            self._starts[pages] = [start]
            insort(self._lengths, pages)
        else:
            insort(starts, start)

    def _cut(self, start: int, pages: int) -> None:
        del self._at[start]
        del self._before[start + pages]
        starts = self._starts[pages]
        if len(starts) == 1:
            del self._starts[pages]
            del self._lengths[bisect_left(self._lengths, pages)]
        else:
            del starts[bisect_left(starts, start)]
