"""Packed hash table and free list over row numbers: what finds a row by its key without an object a row.

Chained hashing (Knuth, TAOCP 3, 6.4): `head` has one int32 a bucket, `next` one a row. Chosen over open addressing
because a removal is one unlink (no tombstones, no rehash, so no pause), and because a vectorised look-up needs as many
rounds as the longest chain of the batch (5 or so at load 1) and not as the longest probe (20 and more at load 0.5).
Row 0 is never a row: 0 means none everywhere, so that columns may start as zero pages that cost address space only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    I64 = npt.NDArray[np.int64]
    U64 = npt.NDArray[np.uint64]
    Mask = npt.NDArray[np.bool_]

MIX = 0x9E3779B97F4A7C15
"""2**64 / golden ratio, odd: Fibonacci hashing. Keys need not be uniform (tests count upwards); digests are."""
WORD = (1 << 64) - 1
_MIX = np.uint64(MIX)


class RowStack:
    """Numbers of free rows, 1 to `rows_max`: the last freed go first, then those never used, in order."""

    def __init__(self, rows_max: int) -> None:
        self.rows_max = rows_max
        self.top = 1
        """Rows below were used at least once."""
        self._free = np.empty(rows_max, np.int32)
        self._free_count = 0
        self._free_high = 0

    @property
    def used(self) -> int:
        """Rows in use."""
        return self.top - 1 - self._free_count

    @property
    def room(self) -> int:
        """Rows that can still be taken."""
        return self.rows_max - self.used

    def take(self, count: int) -> I64:
        """`count` free rows (the caller asked `room`); consecutive where they were never used or freed together."""
        assert count <= self.room, "more rows than there are"
        old = min(count, self._free_count)
        self._free_count -= old
        rows = np.empty(count, np.int64)
        rows[:old] = self._free[self._free_count : self._free_count + old]
        rows[old:] = np.arange(self.top, self.top + count - old)
        self.top += count - old
        return rows

    def take_one(self) -> int:
        """One free row (the caller asked `room`)."""
        if self._free_count:
            self._free_count -= 1
            return int(self._free[self._free_count])
        self.top += 1
        return self.top - 1

    def give(self, rows: I64) -> None:
        """Takes rows back. Given leaf first, they are handed out again in the order of the chain."""
        count = self._free_count
        self._free[count : count + len(rows)] = rows[::-1]
        self._free_count = count + len(rows)
        self._free_high = max(self._free_high, self._free_count)

    def free_rows(self) -> I64:
        """The freed rows, for checks."""
        return self._free[: self._free_count].astype(np.int64)

    def memory_bytes(self) -> int:
        """Bytes ever written."""
        return self._free_high * 4


class RowTable:
    """Hash table of rows. It knows hashes only; whoever asks compares the full keys."""

    def __init__(self, rows_max: int) -> None:
        bits = max(4, (rows_max - 1).bit_length())
        self.shift = 64 - bits
        self._shift = np.uint64(self.shift)
        self.head = np.zeros(1 << bits, np.int32)
        self.next = np.zeros(rows_max + 1, np.int32)
        self.heads, self.nexts = self.head.data, self.next.data
        """The same memory: reading one element is twice as fast as through NumPy, and gives an int."""

    def bucket(self, fold: int) -> int:
        """Bucket of one folded key (any int; the low 64 bits count)."""
        return (fold * MIX & WORD) >> self.shift

    def buckets(self, folds: U64) -> I64:
        """Buckets of many; `folds` is overwritten."""
        folds *= _MIX
        folds >>= self._shift
        return folds.view(np.int64)

    def add(self, row: int, bucket: int) -> None:
        """Links one row."""
        self.nexts[row] = self.heads[bucket]
        self.heads[bucket] = row

    def add_many(self, rows: I64, buckets: I64) -> None:
        """Links rows. A bucket takes one of them a round: who is at the head after the scatter has won."""
        head, nxt = self.head, self.next
        while len(rows):
            before = head.take(buckets)
            head[buckets] = rows
            won = head.take(buckets) == rows
            if won.all():
                nxt[rows] = before
                return
            nxt[rows[won]] = before[won]
            lost = ~won
            rows, buckets = rows[lost], buckets[lost]

    def discard(self, row: int, bucket: int) -> None:
        """Unlinks one row, which must be linked there."""
        nexts = self.nexts
        at = self.heads[bucket]
        if at == row:
            self.heads[bucket] = nexts[row]
        else:
            while (after := nexts[at]) != row:
                assert after, "row is not in its bucket"
                at = after
            nexts[at] = nexts[row]
        nexts[row] = 0

    def find(self, buckets: I64, equal: Callable[[I64, I64 | slice], Mask]) -> I64:
        """The row of each key, 0 = none. `equal(rows, at)`: which rows hold the keys numbered `at`; never row 0."""
        rows = self.head.take(buckets).astype(np.int64)
        same = equal(rows, slice(None))
        if same.all():
            return rows
        at = np.flatnonzero(~same)
        now = rows[at]
        rows[at] = 0
        while True:
            after = self.next.take(now)
            alive = np.flatnonzero(after)
            if not len(alive):
                return rows
            at, now = at[alive], after[alive].astype(np.int64)
            same = equal(now, at)
            rows[at[same]] = now[same]
            left = ~same
            at, now = at[left], now[left]
            if not len(at):
                return rows

    def memory_bytes(self, top: int) -> int:
        """Bytes in use while rows below `top` were used. The heads are touched at random, so all of them count."""
        return self.head.nbytes + top * 4
