"""Line: a client's asynchronous connection to its owner; many questions at once, and what the owner says unasked."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple

from tiercache.errors import ProtocolError
from tiercache.wire.frames import Op, unpack_fault
from tiercache.wire.sockets import Lost
from tiercache.wire.stream import Stream

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

    from tiercache.wire.frames import Frame

OPEN_MAX = 8_192
"""Questions that may be open at once; more wait."""


class _Question(NamedTuple):
    """One that waits for its answer; `late` is for an answer that nobody waits for any more."""

    future: asyncio.Future[memoryview]
    late: Callable[[memoryview], None] | None


class Line:
    """All methods are for its loop, and `tell` too. `on_push(frame)` gets what is no answer (FILL carries the number of
    its READ, FORGET 0); `on_lost(why)` is called once, later on the loop, when the connection has ended, also after
    `close`; by then every open question has raised Lost."""

    def __init__(
        self,
        sock: socket.socket,
        loop: asyncio.AbstractEventLoop,
        on_push: Callable[[Frame], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self._loop = loop
        self._on_push, self._on_lost = on_push, on_lost
        self._open: dict[int, _Question] = {}
        self._last = 0
        self._places = asyncio.Semaphore(OPEN_MAX)
        self._fds_turn = asyncio.Lock()
        self._why = ""
        self._stream = Stream(sock, loop, self._take, self._gone)

    @property
    def closed(self) -> bool:
        """Whether nothing comes or goes any more."""
        return self._stream.closed

    def number(self) -> int:
        """A fresh number, for a question whose pushes may come before its answer."""
        self._last += 1
        return self._last

    async def ask(
        self, op: int, body: bytes = b"", *, number: int = 0, late: Callable[[memoryview], None] | None = None
    ) -> memoryview:
        """The body of the answer. Raises the owner's fault, or Lost when the connection ends.

        A caller that is cancelled leaves its question open; an answer that still comes (no fault) goes to `late`, which
        gives back what was granted. `number` is one from `number()`."""
        raise Lost(op)

    async def ask_fds(self, op: int, body: bytes = b"", bring: Sequence[int] = ()) -> tuple[memoryview, list[int]]:
        """As `ask`, with the descriptors beside the answer, which are the caller's to close; `bring` goes beside the
        question."""
        raise Lost(op)

    def tell(self, op: int, body: bytes = b"", *, number: int = 0) -> None:
        """Sends a one-way message; on a lost line nothing. Whoever tells much awaits `room` between."""
        self._stream.send(op, number, body)

    async def room(self) -> None:
        """Returns when little enough is unsent, or the line is lost."""
        await self._stream.room()

    def close(self, why: str = "closed here") -> None:
        """Ends the connection. Idempotent."""
        self._stream.close(why)

    def forget(self) -> None:
        """Gives the line up in a forked child."""
        self._stream.forget()

    def _take(self, frame: Frame) -> None:
        raise ProtocolError(f"{frame.op}")

    def _gone(self, why: str) -> None:
        self._on_lost(why)


_ANSWER, _FAULT = int(Op.ANSWER), int(Op.FAULT)
_ = unpack_fault
