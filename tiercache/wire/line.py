"""Line: a client's asynchronous connection to its owner; many questions at once, and what the owner says unasked."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple

from tiercache.errors import ProtocolError
from tiercache.wire.frames import Op, unpack_fault
from tiercache.wire.sockets import Lost, close_all
from tiercache.wire.stream import OUT_BYTES_HIGH, Stream

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

    from tiercache.wire.frames import Frame

OPEN_MAX = 8_192
"""Questions that may be open at once; more wait."""

_ANSWER, _FAULT = int(Op.ANSWER), int(Op.FAULT)


class _Question(NamedTuple):
    """One that was asked; a done future means that nobody waits any more, and `late` is for an answer that comes."""

    future: asyncio.Future[memoryview]
    late: Callable[[memoryview], None] | None


class Line:
    """All methods are for its loop. `on_push(frame)` gets what is no answer (FILL carries the number of its READ,
    FORGET one of the owner's); `on_lost(why)` is called once, later on the loop, when the connection has ended, also
    after `close`; by then every open question was given Lost.

    Pushes are dealt with as they come, while an asker runs in a later turn of the loop: a push that came after an
    answer may be dealt with before the asker sees that answer."""

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
        self._waiting: list[asyncio.Future[None]] = []
        self._fds_turn = asyncio.Lock()
        self._fds_tasks: set[asyncio.Task[tuple[memoryview, list[int]]]] = set()
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
        self,
        op: int,
        body: bytes = b"",
        *,
        number: int = 0,
        late: Callable[[memoryview], None] | None = None,
        bring: Sequence[int] = (),
    ) -> memoryview:
        """The body of the answer. Raises the owner's fault, or Lost when the connection ends.

        A caller that is cancelled leaves its question open; an answer that still comes (no fault) goes to `late`, which
        gives back what was granted. `number` is one from `number()`; descriptors in `bring` go beside the question."""
        while not self.closed and (len(self._open) >= OPEN_MAX or self._stream.out_bytes > OUT_BYTES_HIGH):
            await self._place()
        if self.closed:
            raise Lost(self._why or "the connection to the owner ended")
        number = number or self.number()
        future: asyncio.Future[memoryview] = self._loop.create_future()
        self._stream.send(op, number, body, bring)
        self._open[number] = _Question(future, late)
        try:
            return await future
        except asyncio.CancelledError:
            # The answer may have come in the same turn of the loop as the cancellation.
            if future.done() and not future.cancelled() and future.exception() is None and late is not None:
                late(future.result())
            raise

    async def ask_fds(self, op: int, body: bytes = b"") -> tuple[memoryview, list[int]]:
        """As `ask`, with the descriptors beside the answer, which are the caller's to close."""
        # In a task of its own: a caller that is cancelled must not leave descriptors to the next one.
        task = self._loop.create_task(self._ask_fds_alone(op, body))
        self._fds_tasks.add(task)
        task.add_done_callback(self._fds_tasks.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(_close_fds)
            raise

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

    async def _ask_fds_alone(self, op: int, body: bytes) -> tuple[memoryview, list[int]]:
        async with self._fds_turn:
            self._stream.fds_wanted = True
            try:
                answer = await self.ask(op, body)
                fds, self._stream.fds = self._stream.fds, []
            finally:
                self._stream.fds_wanted = False
                close_all(self._stream.fds)
                self._stream.fds = []
        return answer, fds

    async def _place(self) -> None:
        if self._stream.out_bytes > OUT_BYTES_HIGH:
            await self._stream.room()
            return
        waiter: asyncio.Future[None] = self._loop.create_future()
        self._waiting.append(waiter)
        await waiter

    def _take(self, frame: Frame) -> None:
        kind = frame.op
        if kind not in (_ANSWER, _FAULT):
            self._on_push(frame)
            return
        question = self._open.pop(frame.number, None)
        if question is None:
            raise ProtocolError(f"an answer to question {frame.number}, which is not open")
        future, late = question
        if self._waiting:
            self._wake()
        if kind == _FAULT:
            if not future.done():
                future.set_exception(unpack_fault(frame.body))
        elif not future.done():
            future.set_result(frame.body)
        elif late is not None:
            late(frame.body)

    def _wake(self) -> None:
        waiters, self._waiting = self._waiting, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _gone(self, why: str) -> None:
        self._why = f"the connection to the owner ended: {why}"
        questions, self._open = self._open, {}
        for future, _ in questions.values():
            if not future.done():
                future.set_exception(Lost(self._why))
        self._wake()
        self._on_lost(self._why)


def _close_fds(task: asyncio.Task[tuple[memoryview, list[int]]]) -> None:
    if not task.cancelled() and task.exception() is None:
        close_all(task.result()[1])
