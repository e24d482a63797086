"""Single flight: however many tasks want a part of an entry at once, one of them loads it and the others wait.

Lives on one event loop; threads come in through the loop, or claim slots as a whole, which nobody loads, for a while.
Keys are slots, shares are maps of parts, so that two readers of different parts of one page do not wait for each other.
"""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence


class Join(NamedTuple):
    """Who does what for one slot: `mine` nobody loads yet, `others` are the loads under way that cover the rest."""

    mine: int
    others: list[asyncio.Future[None]]


class Claim:
    """Slots that a thread loads outside the loop."""

    __slots__ = ("slots", "waiter")

    def __init__(self, slots: Sequence[int]) -> None:
        self.slots = slots
        self.waiter: asyncio.Future[None] | None = None
        """Made when somebody on the loop comes to wait for it."""


class Flights:
    """Loads under way, by slot."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        """Between claims and loads: whoever begins loads on the loop holds it from `claimed` to `begin`."""
        self._claims: dict[int, Claim] = {}
        self._under_way: dict[int, list[tuple[int, asyncio.Future[None]]]] = {}
        self.merged = 0
        """Parts that somebody wanted while another was loading them."""

    def __len__(self) -> int:
        return sum(map(len, self._under_way.values()))

    def under_way(self, slot: int) -> bool:
        """Whether anything of `slot` is being loaded."""
        return slot in self._under_way

    def loads(self, slot: int) -> list[asyncio.Future[None]]:
        """Every load of `slot` under way."""
        return [future for _, future in self._under_way.get(slot, ())]

    def loading(self, slot: int) -> int:
        """Parts of `slot` that are being loaded; any thread, with the lock held."""
        parts = 0
        for share, _ in tuple(self._under_way.get(slot, ())):
            parts |= share
        return parts

    def claim(self, slots: Sequence[int]) -> Claim | None:
        """Keeps the loop from loading anything of these slots until `unclaim`; None where somebody loads already. Any
        thread."""
        claim = Claim(slots)
        with self.lock:
            if any(slot in self._under_way or slot in self._claims for slot in slots):
                return None
            self._claims.update(dict.fromkeys(slots, claim))
        return claim

    def unclaim(self, claim: Claim) -> None:
        """Ends a claim, and wakes who waits for it. Any thread."""
        with self.lock:
            for slot in claim.slots:
                self._claims.pop(slot, None)
            waiter = claim.waiter
        if waiter is not None and not waiter.get_loop().is_closed():
            waiter.get_loop().call_soon_threadsafe(_wake, waiter)

    def claimed(self, slot: int) -> asyncio.Future[None] | None:
        """What to wait for where a thread has claimed this slot; on the loop, with the lock held."""
        claim = self._claims.get(slot)
        if claim is None:
            return None
        if claim.waiter is None:
            claim.waiter = asyncio.get_running_loop().create_future()
        return claim.waiter

    def join(self, slot: int, parts: int) -> Join:
        """Splits `parts` of `slot` into what the caller must load and loads to wait for."""
        mine, others = parts, []
        for share, future in self._under_way.get(slot, ()):
            if share & parts:
                mine &= ~share
                others.append(future)
        self.merged += (parts & ~mine).bit_count()
        return Join(mine, others)

    def begin(self, slot: int, parts: int) -> asyncio.Future[None]:
        """Announces that the caller loads these parts; whoever joins from now on waits for the future."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # A failed load that nobody waited for is reported by its loader; asyncio need not warn as well.
        future.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._under_way.setdefault(slot, []).append((parts, future))
        return future

    def end(self, slot: int, future: asyncio.Future[None], fault: BaseException | None = None) -> None:
        """Ends a load: waiters look again (the parts are there, or they load themselves), or get the fault."""
        if future.done():
            return
        loads = self._under_way[slot]
        loads[:] = [load for load in loads if load[1] is not future]
        if not loads:
            del self._under_way[slot]
        if fault is None:
            future.set_result(None)
        else:
            future.set_exception(fault)


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
