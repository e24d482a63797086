"""Exact least-recently-used order in 4 bytes a slot.

Every call is one moment, one tick; within a moment the deeper block is the older one (leaf first). Victims: one
vectorised pass picks every slot older than some tick, sorts those, and queues them. Whatever that tick is, the queue is
the true order: a slot used since then has another tick and is skipped, a new slot is newer than all. So the tick may
come from a sample, and exactness costs one pass for some percent of the slots.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from tiercache.policy import Columns, Names, Slots

ABSENT, NAMED, FIRST = 0, 1, 2
"""Tick of what is not in the tier; of what was named as a victim and awaits its fate; the first real one."""
BIRTH = 1 << 31
"""Where this life's ticks start: those of earlier lives, from `order`, lie below."""
SHARE = 0.02
"""Of the slots, candidates a pass."""
SAMPLE = 4096


class LRU:
    """Least recently used first."""

    wants_names = False

    def __init__(self, *, ticks_max: int = (1 << 32) - 1) -> None:
        self._ticks_max = ticks_max
        self._birth = self._now = min(BIRTH, ticks_max // 2)
        self.count = 0
        """Slots in the tier."""
        self._top = self._next = 0
        self._queue: Slots = np.empty(0, np.int64)
        self._queue_ticks: npt.NDArray[np.uint32] = np.empty(0, np.uint32)

    def attach(self, columns: Columns) -> None:
        """See Policy."""
        self._depth = columns.depth
        self.tick = np.zeros(columns.capacity, np.uint32)
        self._ticks = self.tick.data

    def _moment(self) -> int:
        """The next tick."""
        if self._now >= self._ticks_max:
            self._rank()
        self._now += 1
        return self._now

    def _rank(self) -> None:
        """Ticks ran out (after four billion moments): the order stays, the numbers start again."""
        ticks = self.tick[: self._top]
        there = ticks >= FIRST
        _, ranks = np.unique(ticks[there], return_inverse=True)
        ticks[there] = ranks + FIRST
        self._now = self._birth = int(ticks.max(initial=FIRST))
        self._queue = np.empty(0, np.int64)
        self._next = 0

    def insert(self, slots: Slots, names: Names | None = None, order: npt.NDArray[np.uint32] | None = None) -> None:
        """See Policy."""
        if not len(slots):
            return
        self._top = max(self._top, int(slots.max()) + 1)
        self.count += len(slots)
        if order is None:
            self.tick[slots] = self._moment()
            return
        newest = int(order.max()) + FIRST
        if newest > self._birth:
            self._make_room(newest)
        self.tick[slots] = np.minimum(order.astype(np.int64) + FIRST, self._birth)
        self._next = len(self._queue)  # older ones than the queue knows may have come

    def _make_room(self, newest: int) -> None:
        """Ticks of an earlier life reach into this one's: shifts what was used in this one above them."""
        shift = min(newest - self._birth, self._ticks_max - self._now)
        if shift > 0:
            ticks = self.tick[: self._top]
            ticks[ticks > self._birth] += np.uint32(shift)
            self._birth += shift
            self._now += shift

    def touch(self, slots: Slots | int) -> None:
        """See Policy."""
        now = self._moment()
        if isinstance(slots, int):
            if self._ticks[slots]:
                self._ticks[slots] = now
            return
        ticks = self.tick
        there = ticks.take(slots)
        if there.all():
            ticks[slots] = now
        else:
            ticks[slots[there > 0]] = now

    def keep(self, slots: Slots) -> None:
        """See Policy: in use, so newest."""
        self.touch(slots)

    def remove(self, slots: Slots, names: Names | None = None) -> None:
        """See Policy."""
        self.tick[slots] = ABSENT
        self.count -= len(slots)

    def victims(self, count: int) -> Slots:
        """See Policy."""
        for again in (True, True, False):
            while self._next < len(self._queue):
                low, high = self._next, self._next + count
                self._next = high
                slots: Slots = self._queue[low:high]
                slots = slots[self.tick[slots] == self._queue_ticks[low:high]]
                if len(slots):
                    self.tick[slots] = NAMED
                    return slots
            if again:
                self._scan(count)
        return np.empty(0, np.int64)

    def _scan(self, count: int) -> None:
        """Fills the queue."""
        ticks = self.tick[: self._top]
        some = ticks if self._top <= 16 * SAMPLE else ticks[:: self._top // SAMPLE]
        some = np.sort(some[some >= FIRST])
        share = max(SHARE, 4 * count / max(1, self.count))
        limit = some[min(len(some) - 1, int(len(some) * share))] if len(some) else np.uint32(self._ticks_max)
        slots = np.flatnonzero((ticks >= FIRST) & (ticks <= limit))
        if not len(slots) and self.count:
            slots = np.flatnonzero(ticks >= FIRST)
        found = ticks[slots]
        order = np.lexsort((-self._depth[slots], found))
        self._queue, self._queue_ticks, self._next = slots[order], found[order], 0

    def memory_bytes(self) -> int:
        """Bytes in use, the queue of candidates included."""
        return self._top * 4 + self._queue.nbytes + self._queue_ticks.nbytes

    def order(self, slots: Slots) -> npt.NDArray[np.uint32]:
        """See Policy."""
        ticks: npt.NDArray[np.uint32] = self.tick[slots]
        return np.where(ticks >= FIRST, ticks - np.uint32(FIRST), np.uint32(0)).astype(np.uint32)
