"""Revive: how this process comes to an owner, the first time and each time that an owner has gone.

One thread at a time does it, whoever noticed; all others wait for what it brings, or go around the cache. What this
process wrote into the old owner's memory has ended before the next one hears of it, and the next one hears of every
lease before it is asked anything else.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, NamedTuple

from tiercache.clock import SystemClock
from tiercache.errors import ClosedError, ProtocolError, TierCacheError
from tiercache.wire import frames
from tiercache.wire.bond import Bond, unpack_greeting
from tiercache.wire.channel import Channel, Channels
from tiercache.wire.frames import Op
from tiercache.wire.hello import CHANNEL, LINE, Hello, pack_hello
from tiercache.wire.line import Line
from tiercache.wire.memo import Home
from tiercache.wire.sockets import CannotShare, Foreign, Lost, NoOwner

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Coroutine, Iterable, Iterator
    from typing import Any

    from tiercache.wire.bond import Greeting, Holds
    from tiercache.wire.memo import View

log = logging.getLogger(__name__)

PAUSE_S, PAUSE_S_MAX = 0.01, 0.5
"""Between attempts to reach an owner, growing from the first to the second."""
AWAY_S, AWAY_S_MAX = 1.0, 30.0
"""After an owner could not be had, nobody looks for one again before so long; then somebody does, and nobody waits.
Who asks nothing looks for one too, after pauses that grow from the first to the second."""
HOLDS_MAX = 1 << 16
"""Leases, and about as many locations, in one message."""

_CLOCK = SystemClock()


class Ways(NamedTuple):
    """What it takes to reach an owner."""

    connect: Callable[[bool], socket.socket]
    """A connection to the owner; True: one is started where there is none, False: NoOwner is raised then."""
    view_of: Callable[[bytes], View]
    """An empty view of the arena with this id."""
    token: str
    pid: int
    deadline_s: float
    """An owner that is silent for so long is gone around."""


class Revive:
    """The bond that stands now, and the making of the next one."""

    def __init__(self, ways: Ways, holds: Holds, on_bond: Callable[[Bond], None]) -> None:
        """`on_bond` hears of each new one before anybody else gets it."""
        self._ways, self._holds, self._on_bond = ways, holds, on_bond
        self._lock = threading.Lock()
        self._bond: Bond | None = None
        self._coming: Future[Bond] | None = None
        self._until_s = 0.0
        self._failed = ""
        self._missed = 0
        """Searches that found nobody since there was an owner."""
        self._stop = threading.Event()
        self._why = ""
        self.loop: asyncio.AbstractEventLoop | None = None
        self._on_forget: Callable[[memoryview], None] = lambda _: None
        self._on_lost: Callable[[], None] = lambda: None

    def begin(
        self, loop: asyncio.AbstractEventLoop, on_forget: Callable[[memoryview], None], on_lost: Callable[[], None]
    ) -> None:
        """See Link.begin."""
        self._on_forget, self._on_lost = on_forget, on_lost
        self.loop = loop

    # -- what callers get ----------------------------------------------------------------------------------------------

    @property
    def now(self) -> Bond | None:
        """The bond that stands, without waiting for one."""
        bond = self._bond
        return bond if bond is not None and not bond.ended else None

    def bond(self) -> Bond:
        """The bond that stands, or the next one: any thread. Raises Lost where none can be had, and on the loop where
        it would have to be waited for."""
        bond = self._bond
        if bond is not None and not bond.ended:
            return bond
        coming = self._begin()
        if self.here:
            raise Lost("the cache's owner is being replaced: try again, or go on without the cache")
        try:
            return coming.result(self._ways.deadline_s)
        except TimeoutError:
            raise Lost("the cache's owner could not be reached in time: go on without the cache") from None

    async def bond_here(self) -> Bond:
        """As `bond`, on the loop, with its line laid."""
        bond = self._bond
        if bond is not None and not bond.ended and bond.line is not None:
            return bond
        try:
            async with asyncio.timeout(self._ways.deadline_s):
                if bond is None or bond.ended:
                    bond = await asyncio.shield(asyncio.wrap_future(self._begin()))
                if bond.line is None:
                    await self._lay(bond)
        except TimeoutError:
            raise Lost("the cache's owner could not be reached in time: go on without the cache") from None
        return bond

    @property
    def here(self) -> bool:
        """Whether this is the loop's thread, which must not wait for anything."""
        return self.loop is not None and asyncio._get_running_loop() is self.loop

    # -- the end of one ------------------------------------------------------------------------------------------------

    def lost(self, bond: Bond, why: str, *, silent: bool = False) -> None:
        """The owner is gone, or (`silent`) does not answer: then nobody waits for what is found. Any thread. The next
        one is looked for from now on."""
        if silent:
            with self._lock:
                if self._bond is bond and not bond.ended:
                    self._failed = f"{why}: going on without the cache"
        if bond.end(why):
            log.info("the cache's owner is gone (%s): looking for the next one", why)
            self._look()

    def _look(self) -> None:
        try:
            self._begin()
        except TierCacheError:
            pass  # closed meanwhile, or it was looked for just now

    def tick(self) -> None:
        """Looks for an owner though nobody asks for one: the next one gives no memory away that this process may look
        at, until it has heard from this process. Now and then, on the loop."""
        bond = self._bond
        if bond is None or not bond.ended or self._coming is not None:
            return
        pause_s = min(AWAY_S * 2.0 ** min(self._missed - 1, 10), AWAY_S_MAX)
        if not self._missed or _CLOCK.monotonic() > self._until_s - AWAY_S + pause_s:
            self._look()

    def doubt(self, bond: Bond, why: str) -> None:
        """An answer took too long: the owner is asked nothing more until it has said that it lives; if it does not say
        so in time, it is gone. Any thread."""
        with self._lock:
            if bond.ended or bond.silent:
                return
            bond.silent = why
        try:
            threading.Thread(target=self._ping, args=(bond, why), name="tiercache ping", daemon=True).start()
        except RuntimeError:
            self.lost(bond, why, silent=True)

    def _ping(self, bond: Bond, why: str) -> None:
        try:
            bond.channels.ask(Op.QUARANTINE, wait_s=self._ways.deadline_s)
        except (TierCacheError, OSError):
            self.lost(bond, why, silent=True)
        finally:
            bond.silent = ""

    def close(self, why: str) -> Bond | None:
        """No bond from now on; the one that stood is the caller's to end."""
        self._stop.set()
        with self._lock:
            self._why = why
            bond, self._bond = self._bond, None
            coming = self._coming
        if coming is not None and not self.here:
            try:
                coming.exception(self._ways.deadline_s)
            except TimeoutError:
                pass  # it finds out by itself
        return bond

    def forget(self, why: str) -> None:
        """In a forked child."""
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._stop.set()
        self._why, self._coming = why, None
        bond, self._bond = self._bond, None
        if bond is not None:
            bond.forget()

    # -- the making of the next ----------------------------------------------------------------------------------------

    def _begin(self) -> Future[Bond]:
        """The search that is under way, or a new one. Raises Lost at once where the last one found nobody."""
        with self._lock:
            if self._why:
                raise ClosedError(self._why)
            if self._bond is not None and not self._bond.ended:
                done: Future[Bond] = Future()
                done.set_result(self._bond)
                return done
            if self._coming is None:
                if self._failed and _CLOCK.monotonic() < self._until_s:
                    raise Lost(self._failed)
                coming = self._coming = Future()
                self._start(coming)
                if not self._failed:
                    return coming
            if self._failed:
                raise Lost(self._failed)
            return self._coming

    def _start(self, coming: Future[Bond]) -> None:
        """Starts a search; the lock is held. Raises Lost where the system has no thread for it."""
        search = threading.Thread(target=self._search, args=(coming,), name="tiercache revive", daemon=True)
        try:
            search.start()
        except BaseException as fault:
            if search.is_alive():  # a signal raised after it had begun
                raise
            self._coming = None
            if not isinstance(fault, Exception):
                raise
            raise Lost(f"nobody could look for the cache's owner ({fault}): going on without it") from fault

    def open(self) -> Bond:
        """The first bond, in the caller's thread. Raises what is in the way."""
        bond = self._until(self._ways.deadline_s, lambda: self._make(None))
        self._bond = bond
        return bond

    def _search(self, coming: Future[Bond]) -> None:
        """One search for the next owner, in a thread of its own."""
        try:
            bond = self._until(self._ways.deadline_s, self._follow)
        except BaseException as fault:
            with self._lock:
                self._failed = f"no owner of the cache could be had ({fault}): going on without it"
                self._until_s = _CLOCK.monotonic() + AWAY_S
                self._coming = None
                self._missed += 1
            if not self._stop.is_set():  # said once, however often it is tried
                log.log(logging.WARNING if self._missed == 1 else logging.DEBUG, "%s", self._failed)
            coming.set_exception(Lost(self._failed))
            if not isinstance(fault, TierCacheError | OSError):
                raise
            return
        with self._lock:
            closed = bool(self._why)
            if not closed:
                self._bond, self._failed = bond, ""
            missed, self._missed = self._missed, 0
            self._coming = None
        if closed:
            bond.end(self._why)
            coming.set_exception(ClosedError(self._why))
            return
        log.log(logging.WARNING if missed else logging.INFO, "the cache has an owner again")
        coming.set_result(bond)

    def _until(self, deadline_s: float, attempt: Callable[[], Bond]) -> Bond:
        """Attempts until one succeeds; raises the last fault at the deadline, and at once what time does not mend."""
        until_s = _CLOCK.monotonic() + deadline_s
        pause_s = PAUSE_S
        while True:
            try:
                return attempt()
            except (Foreign, CannotShare, ProtocolError, ClosedError):
                raise
            except (TierCacheError, OSError):
                if _CLOCK.monotonic() + pause_s > until_s or self._stop.is_set():
                    raise
            self._stop.wait(pause_s)
            pause_s = min(2 * pause_s, PAUSE_S_MAX)

    def _follow(self) -> Bond:
        """The bond with the owner that follows the one before, which knows every lease."""
        old = self._bond
        if old is None:
            return self._make(None)
        self._on_loop(self._end_here, old)
        old.quiet(self._ways.deadline_s)
        return self._make(old.home)

    async def _end_here(self, old: Bond) -> None:
        await old.end_here()
        self._on_lost()

    def _make(self, home: Home | None) -> Bond:
        ways = self._ways
        channel = Channel(ways.connect(True), ways.deadline_s)
        try:
            greeting = unpack_greeting(channel.ask(Op.HELLO, self._hello(CHANNEL, again=home is not None)))
        except BaseException:
            channel.close()
            raise
        if home is None or home.arena != greeting.arena:
            home = Home(greeting.arena, ways.view_of(bytes.fromhex(greeting.arena)))
        channels = Channels(_first(channel, lambda: self._again(greeting)), wait_s=ways.deadline_s)
        bond = Bond(greeting, home, channels, ways.deadline_s)
        try:
            self._on_loop(self._lay, bond)
            self._redeclare(bond)
            self._on_bond(bond)
        except BaseException:
            bond.end("it could not be told what this process holds")
            if bond.line is not None:
                self._on_loop(Bond.end_here, bond)
            raise
        return bond

    def _hello(self, role: str, *, again: bool = False) -> bytes:
        return pack_hello(Hello(self._ways.token, role, self._ways.pid, again))

    def _again(self, greeting: Greeting) -> Channel:
        """One more channel to the same owner. Raises Lost where it is another one by now."""
        try:
            channel = Channel(self._ways.connect(False), self._ways.deadline_s)
        except NoOwner as gone:
            raise Lost(str(gone)) from gone
        try:
            now = unpack_greeting(channel.ask(Op.HELLO, self._hello(CHANNEL)))
            if now.owner != greeting.owner:
                raise Lost("the owner was replaced")
        except BaseException:
            channel.close()
            raise
        return channel

    async def _lay(self, bond: Bond) -> None:
        """Lays the asynchronous connection of a bond; on the loop, once."""
        async with bond.laying:
            if bond.line is not None:
                return
            loop = asyncio.get_running_loop()
            sock = await loop.run_in_executor(None, self._ways.connect, False)
            line = Line(sock, loop, bond.pushed, lambda why: self.lost(bond, why))
            try:
                async with asyncio.timeout(self._ways.deadline_s):
                    said = unpack_greeting(await line.ask(Op.HELLO, self._hello(LINE)))
                if said.owner != bond.greeting.owner:
                    raise Lost("the owner was replaced")
            except BaseException:
                line.close()
                raise
            bond.lay(line, self._on_forget)

    def _redeclare(self, bond: Bond) -> None:
        """Says which leases this process has; also when it has none, for the owner waits to hear it. Any other message
        says that this was all."""
        unkept = 0
        for some in _batches(self._holds.of(bond.home)):
            held = bond.channels.ask(Op.REDECLARE, frames.pack_holds(some))
            if len(held) != len(some):
                raise ProtocolError(f"{len(held)} answers to {len(some)} leases")
            unkept += held.tolist().count(0)
        bond.channels.ask(Op.QUARANTINE)
        if unkept:
            log.warning("%d leases on the cache's memory could not be kept: their views may change", unkept)

    def _on_loop(self, work: Callable[[Bond], Coroutine[Any, Any, None]], bond: Bond) -> None:
        """Does a part of it on the loop, where there is one."""
        loop = self.loop
        if loop is None:
            return
        if loop.is_closed():
            raise ClosedError("the event loop of this cache was closed: open it again with tiercache.open(...)")
        asyncio.run_coroutine_threadsafe(work(bond), loop).result(self._ways.deadline_s)


def _batches(holds: Iterable[tuple[int, list[int]]]) -> Iterator[list[tuple[int, list[int]]]]:
    """Leases in batches of one message each; one at least, which may be empty."""
    batch: list[tuple[int, list[int]]] = []
    size = 0
    for number, locations in holds:
        batch.append((number, locations))
        size += 1 + len(locations)
        if size >= HOLDS_MAX:
            yield batch
            batch, size = [], 0
    yield batch


def _first(channel: Channel, make: Callable[[], Channel]) -> Callable[[], Channel]:
    """Makes channels, the first of which is there already."""
    ready = [channel]

    def either() -> Channel:
        try:
            return ready.pop()
        except IndexError:
            return make()

    return either
