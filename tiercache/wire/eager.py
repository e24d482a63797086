"""Eager waiting: to look for a short while for what is about to come, before one sleeps until it comes.

A sleep and its wake-up on an idle processor cost tens of microseconds, more than most answers take. So both ends of a
connection look first, but only where that has paid of late: not where things come seldom, and not where somebody else
wants the processor or the interpreter.
"""

from __future__ import annotations

import asyncio
import selectors
from typing import TYPE_CHECKING, TypeVar

from tiercache.clock import SystemClock

if TYPE_CHECKING:
    from collections.abc import Callable

    from tiercache.clock import Clock

T = TypeVar("T")

LOOK_S = 50e-6
"""Nobody looks longer than this."""
SOON_S = 100e-6
"""What came within this, the wake-up from a sleep included, may come while one looks the next time."""
RESTS_MAX = 1024
VAIN, HELD_UP = 4, 16

_CLOCK = SystemClock()


class Eager:
    """One that waits again and again, and learns whether to look first. For one thread at a time.

    It looks after something came soon. Having looked in vain, it rests until so many more have come soon to its sleep:
    VAIN times as many each time, HELD_UP times where it lost the processor or the interpreter meanwhile, half as many
    after each find. So looking in vain stays a small share of all waiting."""

    __slots__ = ("_now", "_rest", "_rests", "_soon")

    def __init__(self, clock: Clock = _CLOCK) -> None:
        self._now = clock.monotonic
        self._soon = False
        self._rest = 0
        self._rests = 1

    def look(self, glance: Callable[[], T | None]) -> T | None:
        """What a glance found; None where nothing came, or looking does not pay: then sleep, and say `slept`."""
        if not self._soon:
            return None
        now = self._now
        began_s = now()
        while True:
            found = glance()
            took_s = now() - began_s
            if took_s > LOOK_S:
                self._soon = False
                more = VAIN if took_s <= SOON_S else HELD_UP
                self._rests = self._rest = min(more * self._rests, RESTS_MAX)
                return found
            if found is not None:
                self._rests = (self._rests + 1) >> 1
                return found

    def slept(self, took_s: float) -> None:
        """Something came to a sleep of this length."""
        if took_s <= SOON_S:
            self._rest -= 1
            self._soon = self._rest <= 0


class EagerSelector(selectors.DefaultSelector):
    """A loop's selector that looks before it sleeps. A timer is late by LOOK_S for it, at most."""

    def __init__(self, clock: Clock = _CLOCK) -> None:
        super().__init__()
        self._now = clock.monotonic
        self._eager = Eager(clock)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """As the base."""
        if timeout is not None and timeout <= SOON_S:
            return super().select(timeout)
        found = self._eager.look(self._glance)
        if found is None:
            began_s = self._now()
            found = super().select(timeout)
            if found:
                self._eager.slept(self._now() - began_s)
        return found

    def _glance(self) -> list[tuple[selectors.SelectorKey, int]] | None:
        return super().select(0) or None


def eager_loop() -> asyncio.AbstractEventLoop:
    """A loop for an owner."""
    return asyncio.SelectorEventLoop(EagerSelector())
