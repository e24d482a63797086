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
from tiercache.wire import frames, hello
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
        self._token = ways.token
        self._numbers = itertools.count(1)
        self._ended: deque[int] = deque()  # leases that ended where nothing could be said, or nobody was there
        self._abandoned: dict[int, None] = {}  # tickets, likewise
        self._unsaved: dict[str, None] = {}  # memory in which something of this process may not be on the disk
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
        began_s = _CLOCK.monotonic()
        while True:
            bond = self.revive.bond()
            # What a search for an owner took is not there for its answer; else it is the time that channels have set.
            left_s, took_s = self.deadline_s, _CLOCK.monotonic() - began_s
            if took_s > left_s / 10:
                left_s = max(left_s - took_s, left_s / 4)
            try:
                return Answer(bond, self._ask(bond, op, body, min(wait_s or left_s, left_s)))
            except Lost as cut:
                if not bond.ended:
                    self._check_cut(bond, str(cut), left_s)
                if not again:
                    raise
                again = False

    def _ask(self, bond: Bond, op: int, body: bytes, wait_s: float) -> memoryview:
        """Raises UnavailableError, no Lost, where no answer came in time: asking again would take as long again."""
        if bond.silent and not bond.ended:
            raise UnavailableError(f"the cache's owner is silent: {bond.silent}")
        began_s = _CLOCK.monotonic()
        try:
            return bond.channels.ask(op, body, wait_s=wait_s)
        except Lost as cut:
            if bond.ended or _CLOCK.monotonic() - began_s < SLOW * wait_s:
                raise
            self.revive.doubt(bond, str(cut))
            raise UnavailableError(f"the cache's owner gave no answer: {cut}") from cut

    def _check_cut(self, bond: Bond, why: str, wait_s: float) -> None:
        """A connection was cut: where the owner is gone, the next one is looked for."""
        try:
            self._ask(bond, Op.QUARANTINE, b"", wait_s)
        except (TierCacheError, OSError):
            if bond.silent:
                raise
            self.revive.lost(bond, why)

    def ask_on(self, bond: Bond, op: int, body: bytes) -> memoryview:
        """A question that only makes sense to the owner that is asked."""
        try:
            return self._ask(bond, op, body, self.deadline_s)
        except Lost as cut:
            if not bond.ended:
                self._check_cut(bond, str(cut), self.deadline_s)
            raise

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
            if bond.silent:
                raise Lost(f"the cache's owner is silent: {bond.silent}")
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
                done, _ = await asyncio.wait([asked], timeout=self.deadline_s / 2)
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
            async with asyncio.timeout(self.deadline_s / 2):
                await bond.line.ask(Op.QUARANTINE)
        except TimeoutError:
            why = f"the owner has not answered anything for {self.deadline_s:g} s"
            self.revive.lost(bond, why, silent=True)
            raise Lost(why) from None

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
            if bond is None or bond.silent:
                raise Lost("no owner")
            self._tell(bond, Op.RELEASE, frames.pack_u64(numbers))
        except (TierCacheError, OSError):
            self._ended.extend(numbers)

    def _tell(self, bond: Bond, op: int, body: bytes) -> None:
        """One-way; on the loop by the line, which never waits."""
        if bond.silent:  # to say something may take a new connection
            raise Lost(bond.silent)
        if bond.line is not None and self.revive.here:
            bond.line.tell(op, body)
        else:
            bond.channels.tell(op, body)

    def say_noted(self, *, touches_min: int = 1) -> None:
        """Tells the owner what was only noted so far: leases that were dropped, and what was read without asking."""
        home, bond = self.home, self.revive.now
        if bond is None or home is None or bond.silent:
            return
        if self._ended:
            self._say_ended()
        if self._abandoned:
            self._say_abandoned(bond)
        # What is there now: others may add to it faster than anybody can tell.
        left = len(home.touched) if home is bond.home else 0
        while left >= touches_min:
            touched = home.take_touched()
            if not touched:
                return
            left -= len(touched)
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

    # -- puts ----------------------------------------------------------------------------------------------------------

    def abandon(self, number: int) -> None:
        """A put has ended without its commit, or was never begun: the owner is told, now or later. Never raises."""
        self._abandoned[number] = None
        bond = self.revive.now
        if bond is not None:
            self._say_abandoned(bond)

    def _say_abandoned(self, bond: Bond) -> None:
        for number in list(self._abandoned):
            try:
                self._tell(bond, Op.ABANDON, frames.pack_u64([number]))
            except (TierCacheError, OSError):
                return  # the tick tries again
            self._abandoned.pop(number, None)

    def visible(self, bond: Bond) -> None:
        """Something that this process put can be seen; it may not be on the disk yet."""
        if bond.greeting.durable:
            self._unsaved[bond.home.arena] = None

    async def flush(self) -> bool:
        """See Core.flush. What was put may have gone with an owner whose memory no other one took over."""
        unsaved = list(self._unsaved)
        for arena in unsaved:
            self._unsaved.pop(arena, None)  # before the question: what becomes visible meanwhile is noted anew
        try:
            bond, body = await self.request(Op.FLUSH, again=False)
        except BaseException:
            self._unsaved.update(dict.fromkeys(unsaved))
            raise
        if any(arena != bond.home.arena for arena in unsaved):
            raise UnavailableError("the cache's owner died before what this process had put was durable: put it again")
        return bool(len(body)) and body[0] == 1

    # -- memory --------------------------------------------------------------------------------------------------------

    def _met(self, bond: Bond) -> None:
        """A new bond. The memory of the owner before stays as long as leases look at it."""
        if not self.left:
            hello.lives(self._token)
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
        hello.left(self._token)

    def tick(self) -> Coroutine[Any, Any, None] | None:
        """Says what is only noted, now and then; what is to be done to leave."""
        self.say_noted()
        home = self.home
        if not self.left and home is not None and home.view.known:
            self.revive.tick()
        return self._leave_now() if self.leaving and not self.holds and not self._ended else None

    def forget(self, why: str) -> None:
        """In a forked child."""
        self.revive.forget(why)
        if self.home is not None:
            self.home.view.forget()
            self.home = None
