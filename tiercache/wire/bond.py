"""Bond: the connections of this process to one owner, from the first HELLO until either is gone."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

from tiercache.errors import ProtocolError, UnavailableError
from tiercache.wire import frames
from tiercache.wire.frames import Op
from tiercache.wire.loading import Loads
from tiercache.wire.sockets import Lost

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tiercache.wire.channel import Channels
    from tiercache.wire.frames import Frame
    from tiercache.wire.line import Line
    from tiercache.wire.memo import Home


class Greeting(NamedTuple):
    """What an owner says of itself when it is greeted."""

    owner: str
    """Tells one owner's life from the next one's."""
    arena: str
    settings: dict[str, Any]
    durable: bool


class Holds:
    """Leases that this process has, by number: what an owner that follows another is told. Any thread, no lock: each
    step is one operation on a dictionary."""

    def __init__(self) -> None:
        self._leases: dict[int, tuple[Home, Sequence[int]]] = {}

    def __len__(self) -> int:
        return len(self._leases)

    def add(self, number: int, home: Home, locations: Sequence[int]) -> None:
        """A lease begins."""
        self._leases[number] = home, locations

    def drop(self, number: int) -> Home | None:
        """A lease ends: the memory that it was on."""
        home, _ = self._leases.pop(number, (None, ()))
        return home

    def of(self, home: Home) -> Iterator[tuple[int, list[int]]]:
        """Leases on one owner's memory, with the extents that they hold."""
        for number, (where, locations) in list(self._leases.items()):
            if where is home:
                yield number, [location for location in locations if location >= 0]


class Bond:
    """See the module. `ended` once and for ever: whoever asks then gets Lost, and nobody writes into the owner's memory
    any more when `quiet` has returned."""

    def __init__(self, greeting: Greeting, home: Home, channels: Channels, wait_s: float) -> None:
        self.greeting, self.home, self.channels = greeting, home, channels
        self.line: Line | None = None
        self.loads: Loads | None = None
        self.ended = ""
        """Why it ended; empty while it stands."""
        self.silent = ""
        """Why nothing is asked for now: the owner left a question unanswered, and is being asked whether it lives."""
        self._wait_s = wait_s
        self._writers = 0
        self._turn = threading.Condition()
        self._attaching = threading.Lock()
        self.laying = asyncio.Lock()
        self._on_forget: Callable[[memoryview], None] = lambda _: None

    # -- memory --------------------------------------------------------------------------------------------------------

    def hold(self, holds: Holds, number: int, locations: Sequence[int]) -> None:
        """Notes a lease, or raises Lost: then the owner that gave it is gone, and nobody knows of it."""
        with self._turn:
            if self.ended:
                raise Lost(self.ended)
            holds.add(number, self.home, locations)

    def __enter__(self) -> Bond:
        """Begins to write into reserved extents. Raises Lost when the owner is gone: they are another's soon."""
        with self._turn:
            if self.ended:
                raise Lost(self.ended)
            self._writers += 1
        return self

    def __exit__(self, *_: object) -> None:
        with self._turn:
            self._writers -= 1
            self._turn.notify_all()

    def attach(self, locations: Sequence[int]) -> None:
        """Maps the segments of these locations; any thread but the loop's."""
        if not self.home.lacks(locations):
            return
        with self._attaching:
            view = self.home.view
            while self.home.lacks(locations):
                first = view.known
                body, fds = self.channels.ask_fds(Op.SEGMENTS, _u32(first), wait_s=self._wait_s)
                ordinals = [int.from_bytes(body[at : at + 4], "little") for at in range(0, len(body), 4)]
                for ordinal, fd in zip(ordinals, fds, strict=True):
                    view.attach(ordinal, fd)
                if view.known <= first:
                    raise ProtocolError("the owner gave a location in a segment that it does not have")

    async def attach_here(self, locations: Sequence[int]) -> None:
        """As `attach`, on the loop."""
        if self.home.lacks(locations):
            await asyncio.get_running_loop().run_in_executor(None, self.attach, locations)

    # -- the loop ------------------------------------------------------------------------------------------------------

    def lay(self, line: Line, on_forget: Callable[[memoryview], None]) -> None:
        """The asynchronous connection stands; on the loop."""
        self.line, self._on_forget = line, on_forget
        self.loads = Loads(self.home, self.attach_here)

    def pushed(self, frame: Frame) -> None:
        """What the owner says unasked."""
        if frame.op == Op.FILL and self.line is not None and self.loads is not None and not self.ended:
            self.loads.begin(self.line, frame.number, frame.body)
        elif frame.op == Op.FORGET:
            self._on_forget(frame.body)
            if self.line is not None and not self.ended:
                self.line.tell(Op.TOLD, number=frame.number)
        elif frame.op != Op.FILL:
            raise ProtocolError(f"a message {frame.op} that nobody asked for")

    # -- the end -------------------------------------------------------------------------------------------------------

    def end(self, why: str) -> bool:
        """Ends it; any thread. Whoever waits for an answer gets Lost. False where it had ended before."""
        with self._turn:
            if self.ended:
                return False
            self.ended = why or "the connection to the owner ended"
            self._turn.notify_all()
        self.channels.close()
        return True

    async def end_here(self) -> None:
        """The part of the end that belongs to the loop: returns when no load writes any more."""
        if self.line is not None:
            self.line.close(self.ended)
        if self.loads is not None:
            await self.loads.stop()

    def quiet(self, wait_s: float) -> None:
        """Returns when no thread writes into reserved extents any more; raises UnavailableError when that lasts."""
        with self._turn:
            if not self._turn.wait_for(lambda: not self._writers, wait_s):
                raise UnavailableError(f"{self._writers} threads still write into the memory of an owner that is gone")

    def forget(self) -> None:
        """In a forked child: everything is the parent's."""
        self.ended = "opened before the fork"
        self._turn = threading.Condition()
        self.channels.forget()
        if self.line is not None:
            self.line.forget()


def _u32(value: int) -> bytes:
    return value.to_bytes(4, "little")


def unpack_greeting(body: memoryview) -> Greeting:
    """An owner's answer to HELLO. Raises ProtocolError where it is none."""
    said = frames.unpack_json(body)
    try:
        return Greeting(str(said["owner"]), str(said["arena"]), dict(said["settings"]), bool(said["durable"]))
    except (KeyError, TypeError, ValueError):
        raise ProtocolError("the owner's greeting is not one of this version") from None
