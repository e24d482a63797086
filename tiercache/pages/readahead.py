"""Read-ahead of one open handle: notices a sequential reader and says what to fetch before it asks. No I/O here."""

from __future__ import annotations

import threading

READS_MIN = 3
"""Reads in a row before anything is fetched ahead: neighbouring column chunks come in twos and threes by chance."""


class ReadAhead:
    """Watches the reads of one handle. Thread-safe; handles shared by threads that jump about never look sequential.

    The window doubles by being at most what was read in a row so far: a reader that stops has cost at most as much
    again as it read.
    """

    __slots__ = ("_ahead", "_lock", "_reads", "_run_bytes", "_stop", "window_bytes_max")

    def __init__(self, window_bytes_max: int) -> None:
        self.window_bytes_max = window_bytes_max
        self._stop = -1
        self._ahead = 0
        self._reads = 0
        self._run_bytes = 0
        self._lock = threading.Lock()

    def observe(self, start: int, stop: int, size: int) -> tuple[int, int] | None:
        """Tells of a read of [start, stop); answers the range of a file of `size` to fetch ahead now, if any."""
        with self._lock:
            if start != self._stop:
                self._reads, self._run_bytes, self._ahead = 0, 0, stop
            self._stop = stop
            self._reads += 1
            self._run_bytes += stop - start
            if self._reads < READS_MIN or not self.window_bytes_max:
                return None
            window = min(self.window_bytes_max, self._run_bytes)
            goal = min(size, stop + window)
            low = max(self._ahead, stop)
            # Half a window at a time: one request for many small reads, and the next one starts while it is read.
            if goal - low < min(window // 2 + 1, size - low) or goal <= low:
                return None
            self._ahead = goal
            return low, goal
