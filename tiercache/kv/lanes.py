"""Lanes: one copy of many blocks as several at a time, since one core does not move what memory could.

Threads of the process, shared by all stores, made at first use. A call returns when every lane has ended, whatever
became of them: then nothing touches the memory of an engine any more.
"""

from __future__ import annotations

import os
import threading
from concurrent import futures
from itertools import pairwise
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

LANES_MAX = 4
"""More of them wait for memory and for each other's Python."""
LANE_BYTES = 2 << 20
"""A lane is worth its start (some 50 µs) from so many bytes on."""


class Lanes:
    """The threads, of the process that uses them."""

    def __init__(self, count: int) -> None:
        """At most `count` lanes for a call, the caller's own thread being one."""
        self.count = count
        self._lock = threading.Lock()
        self._threads: futures.ThreadPoolExecutor | None = None
        self._process = 0

    def spread(self, blocks: int, total_bytes: int, work: Callable[[int, int], list[T]]) -> list[T]:
        """`work(first, stop)` over blocks [0, blocks), in as many lanes as these bytes are worth; its answers in order.

        The first fault is raised, when all have ended.
        """
        lanes = max(1, min(self.count, blocks, total_bytes // LANE_BYTES))
        spans = list(pairwise(blocks * lane // lanes for lane in range(lanes + 1)))
        begun: list[futures.Future[list[T]] | None] = []
        try:
            begun += (self._begin(work, *span) for span in spans[1:])
            answers = work(*spans[0])
            for span, future in zip(spans[1:], begun):
                answers += future.result() if future is not None else work(*span)
            return answers
        finally:
            futures.wait([future for future in begun if future is not None])

    def _begin(self, work: Callable[[int, int], list[T]], first: int, stop: int) -> futures.Future[list[T]] | None:
        with self._lock:
            if self._threads is None or self._process != os.getpid():  # threads do not live on in a forked process
                self._threads = futures.ThreadPoolExecutor(self.count - 1, "tiercache-lane")
                self._process = os.getpid()
            try:
                return self._threads.submit(work, first, stop)
            except RuntimeError:  # the interpreter is ending, and starts no work any more
                return None


LANES = Lanes(min(LANES_MAX, len(os.sched_getaffinity(0))))
