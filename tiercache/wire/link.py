"""Link: questions to whoever owns the directory now, from threads and from the loop; and what it is told on the side.

A question that an owner's death cut off is asked once more of the next one, where asking twice does no harm. A question
that merely takes too long is given up, and the owner is asked whether it lives.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from tiercache.clock import SystemClock
from tiercache.errors import TierCacheError, UnavailableError
from tiercache.lease import Lease
from tiercache.model import Outcome
from tiercache.wire import frames
from tiercache.wire.bond import Holds
from tiercache.wire.frames import Op
from tiercache.wire.memo import TOUCHES_MAX
from tiercache.wire.revive import Revive
from tiercache.wire.sockets import Lost

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence
    from typing import Any

    from tiercache.wire.bond import Bond
    from tiercache.wire.loading import Reading
    from tiercache.wire.memo import Home
    from tiercache.wire.revive import Ways

TICK_S = 1.0
"""What is only told on the side waits no longer than this for company."""
SLOW = 0.9
"""A question that took this much of its time was slow; one that failed sooner was cut off."""

_CLOCK = SystemClock()


class Answer(NamedTuple):
    """An answer, and the bond that it came by: its locations are in that bond's memory."""

    bond: Bond
    body: memoryview


class Link:
    """See the module."""

    def __init__(self, ways: Ways) -> None:
        self.holds = Holds()
        self.revive = Revive(ways, self.holds, self._met)
        self.deadline_s = ways.deadline_s
        self._numbers = itertools.count(1)
        self._ended: deque[int] = deque()  # leases that ended where nothing could be said, or nobody was there
        self._homes: list[Home] = []  # of owners before this one, as long as leases look at them
        self.home: Home | None = None
        """The memory to glance at, also while no owner is there."""
        self.leaving = self.left = False

    def begin(
        self, loop: asyncio.AbstractEventLoop, on_forget: Callable[[memoryview], None], on_lost: Callable[[], None]
    ) -> None:
        """This loop is the client's from now on. `on_forget` hears of what other processes forgot, `on_lost` of every
        owner that went; both on the loop."""
        self.revive.begin(loop, on_forget, on_lost)

    # -- threads -------------------------------------------------------------------------------------------------------

    def ask(self, op: int, body: bytes = b"", *, wait_s: float | None = None, again: bool = True) -> Answer:
        """A question from any thread. Raises the owner's fault, Lost where no owner could be had (or, without `again`,
        where it went away), UnavailableError where it took too long."""
        self.say_noted()
        while True:
            bond = self.revive.bond()
            began_s = _CLOCK.monotonic()
            try:
                return Answer(bond, bond.channels.ask(op, body, wait_s=wait_s))
            except Lost as cut:
                slow = _CLOCK.monotonic() - began_s > SLOW * (wait_s or self.deadline_s)
                if self._lives(bond, str(cut)) and slow:
                    raise UnavailableError(f"the cache's owner lives, but gave no answer: {cut}") from cut
                if not again:
                    raise
                again = False

    def _lives(self, bond: Bond, why: str) -> bool:
        """Asks the owner whether it is there; where it is not, the next one is looked for."""
        if bond.ended:
            return False
        try:
            bond.channels.ask(Op.QUARANTINE, wait_s=self.deadline_s)
        except (TierCacheError, OSError):
            self.revive.lost(bond, why)
            return False
        return True

    def ask_on(self, bond: Bond, op: int, body: bytes) -> memoryview:
        """A question that only makes sense to the owner that is asked."""
        return bond.channels.ask(op, body)

    def tell_on(self, bond: Bond, op: int, body: bytes) -> None:
        """A one-way message that only makes sense to the owner that is told; never raises."""
        try:
            self._tell(bond, op, body)
        except (TierCacheError, OSError):
            pass  # it is gone, and what it was told of too

    # -- the loop ------------------------------------------------------------------------------------------------------

    async def request(
        self,
        op: int,
        body: bytes = b"",
        *,
        again: bool = True,
        reading: Reading | None = None,
        late: Callable[[memoryview], None] | None = None,
    ) -> Answer:
        """As `ask`, on the loop, for as long as the owner lives. `reading` is what READ loads with, `late` hears of an
        answer that comes after the caller was cancelled."""
        self.say_noted()
        while True:
            bond = await self.revive.bond_here()
            try:
                return Answer(bond, await self._asked(bond, op, body, reading, late))
            except Lost as cut:
                self.revive.lost(bond, str(cut))
                if not again:
                    raise
                again = False

    async def request_on(self, bond: Bond, op: int, body: bytes) -> memoryview:
        """As `ask_on`, on the loop."""
        return await self._asked(bond, op, body, None, None)

    async def _asked(
        self,
        bond: Bond,
        op: int,
        body: bytes,
        reading: Reading | None,
        late: Callable[[memoryview], None] | None,
    ) -> memoryview:
        line, loads = bond.line, bond.loads
        if line is None or loads is None:
            raise Lost("the connection to the owner is not laid")
        number = line.number()
        if reading is not None:
            loads.expect(number, reading)

        def over(body: memoryview) -> None:
            loads.done(number)
            if late is not None:
                late(body)

        asked = asyncio.ensure_future(line.ask(op, body, number=number, late=over))
        try:
            while True:
                done, _ = await asyncio.wait([asked], timeout=self.deadline_s)
                if done:
                    loads.done(number)
                    return asked.result()
                await self._check(bond)
        except BaseException:
            asked.cancel()
            raise

    async def _check(self, bond: Bond) -> None:
        """An answer takes long: does the owner still answer anything? Raises Lost where it does not."""
        assert bond.line is not None
        try:
            async with asyncio.timeout(self.deadline_s):
                await bond.line.ask(Op.QUARANTINE)
        except TimeoutError:
            raise Lost(f"the owner has not answered anything for {self.deadline_s:g} s") from None

    # -- leases --------------------------------------------------------------------------------------------------------

    def number(self) -> int:
        """A number for a new lease of this process."""
        return next(self._numbers)

    def lease(self, number: int, bond: Bond, outcomes: list[Outcome], locations: Sequence[int]) -> Lease:
        """The lease that an owner granted. Raises Lost where that owner is gone before this process could note it."""
        if Outcome.HIT not in outcomes:  # then nothing is held
            return Lease(outcomes, locations, bond.home.view, lambda _: None)
        bond.hold(self.holds, number, locations)

        def end(safely: bool) -> None:
            if safely:
                self.release(number)
            else:
                self._ended.append(number)

        return Lease(outcomes, locations, bond.home.view, end)

    def release(self, number: int) -> None:
        """A lease has ended, or was granted to nobody: the owner is told, now or later. Never raises."""
        home = self.holds.drop(number)
        if home is not None and home is not self.home:
            self._leave_homes()
            return
        self._tell_released([number])

    def _tell_released(self, numbers: list[int]) -> None:
        bond = self.revive.now
        try:
            if bond is None:
                raise Lost("no owner")
            self._tell(bond, Op.RELEASE, frames.pack_u64(numbers))
        except (TierCacheError, OSError):
            self._ended.extend(numbers)

    def _tell(self, bond: Bond, op: int, body: bytes) -> None:
        """One-way; on the loop by the line, which never waits."""
        if bond.line is not None and self.revive.here:
            bond.line.tell(op, body)
        else:
            bond.channels.tell(op, body)

    def say_noted(self, *, touches_min: int = 1) -> None:
        """Tells the owner what was only noted so far: leases that were dropped, and what was read without asking."""
        home, bond = self.home, self.revive.now
        if bond is None or home is None:
            return
        if self._ended:
            self._say_ended()
        while len(home.touched) >= touches_min and home is bond.home:
            touched = home.take_touched()
            if not touched:
                return
            try:
                self._tell(bond, Op.TOUCH, frames.pack_i64(touched))
            except (TierCacheError, OSError):
                return  # hits that nobody counts

    def say_touched(self) -> None:
        """As `say_noted`, where enough came together to be worth a message."""
        home = self.home
        if home is not None and len(home.touched) >= TOUCHES_MAX:
            self.say_noted(touches_min=TOUCHES_MAX)

    def _say_ended(self) -> None:
        numbers: list[int] = []
        try:
            while len(numbers) < 4096:
                numbers.append(self._ended.popleft())
        except IndexError:
            pass  # that was the last one
        here = []
        for number in numbers:
            home = self.holds.drop(number)
            if home is None or home is self.home:
                here.append(number)
        if self._homes:
            self._leave_homes()
        if here:
            self._tell_released(here)

    # -- memory --------------------------------------------------------------------------------------------------------

    def _met(self, bond: Bond) -> None:
        """A new bond. The memory of the owner before stays as long as leases look at it."""
        home = self.home
        if home is not bond.home:
            self.home = bond.home
            if home is not None:
                self._homes.append(home)
                self._leave_homes()

    def _leave_homes(self) -> None:
        for home in list(self._homes):
            if next(self.holds.of(home), None) is None:
                try:
                    self._homes.remove(home)
                except ValueError:
                    continue  # another thread was faster
                home.view.close()

    async def leave(self) -> None:
        """Nothing more is asked. The owner is left when the last lease has ended, for until then its views are looked
        at, and what they show must stay."""
        self.leaving = True
        await self._leave_now()

    async def _leave_now(self) -> None:
        if self.left or self.holds or self._ended:
            return
        self.left = True
        bond = self.revive.close("this cache was closed: open it again with tiercache.open(...)")
        if bond is not None:
            bond.end("this cache was closed")
            await bond.end_here()
        for home in (self.home, *self._homes):
            if home is not None:
                home.view.close()

    def tick(self) -> Coroutine[Any, Any, None] | None:
        """Says what is only noted, now and then; what is to be done to leave."""
        self.say_noted()
        return self._leave_now() if self.leaving and not self.holds and not self._ended else None

    def forget(self, why: str) -> None:
        """In a forked child."""
        self.revive.forget(why)
        if self.home is not None:
            self.home.view.forget()
            self.home = None
