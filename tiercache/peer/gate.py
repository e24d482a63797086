"""Gate: how much may be on its way from peers at a time, how fast, and who comes first."""

from __future__ import annotations

import asyncio
import heapq
from contextlib import asynccontextmanager
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tiercache.clock import Clock

BURST_S = 0.05
"""What a rate leaves unused is kept for so long."""
SLOWEST_BYTES_S = 20e6
"""Deadlines grow with what is under way at this rate."""


def patience_s(size: int) -> float:
    """What so many bytes take where a link is slow."""
    return size / SLOWEST_BYTES_S


class Priority(IntEnum):
    """Who comes first: what somebody waits for, before what was published for here, before what others spill."""

    READ = 0
    PUBLISHED = 1
    SPILLED = 2


class Gate:
    """A budget of bytes under way, and a token bucket (Turner, 1986: the leaky bucket as a meter). On one loop."""

    def __init__(self, room_bytes: int, rate_bytes_s: float, clock: Clock) -> None:
        """`rate_bytes_s` 0 is no limit."""
        self.room_bytes, self._rate, self._clock = room_bytes, rate_bytes_s, clock
        self._used = 0
        self._waiting: list[tuple[int, int, int, asyncio.Future[None]]] = []
        self._order = self._queued = 0
        self._free_at_s = 0.0

    @property
    def used_bytes(self) -> int:
        """Bytes under way."""
        return self._used

    @property
    def ahead_bytes(self) -> int:
        """Bytes under way, or waiting for that."""
        return self._used + self._queued

    @asynccontextmanager
    async def admit(self, moves: int, priority: Priority, takes: int = 0) -> AsyncIterator[None]:
        """Waits for room (`takes`, where that is more than what moves), in the order of priorities and then of coming,
        and for the rate. What is larger than all of the room has all of it."""
        size = min(max(moves, takes), self.room_bytes)
        if self._waiting or self._used + size > self.room_bytes:
            self._order += 1
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            heapq.heappush(self._waiting, (priority, self._order, size, turn))
            self._queued += size
            self._admit_next()  # who comes first may fit where the one before does not
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._leave(size)
                self._admit_next()
                raise
        else:
            self._used += size
        try:
            await self._pace(moves)
            yield
        finally:
            self._leave(size)

    def _leave(self, size: int) -> None:
        self._used -= size
        self._admit_next()

    def _admit_next(self) -> None:
        while self._waiting:
            _, _, size, turn = self._waiting[0]
            if not turn.done():
                if self._used + size > self.room_bytes:
                    return
                self._used += size
                turn.set_result(None)
            heapq.heappop(self._waiting)
            self._queued -= size

    async def _pace(self, size: int) -> None:
        """Returns when the rate has earned these bytes: so it holds for what is read in one go, too."""
        if not self._rate:
            return
        now_s = self._clock.monotonic()
        self._free_at_s = max(self._free_at_s, now_s - BURST_S) + size / self._rate
        if self._free_at_s > now_s:
            await asyncio.sleep(self._free_at_s - now_s)
