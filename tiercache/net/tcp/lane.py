"""Lane: one connection that this end made, over which it asks. Requests leave from the loop or from a thread, answers
come in a thread, straight into memory. Both threads sleep in the kernel while nothing moves."""

from __future__ import annotations

import asyncio
import logging
import queue
import socket
import threading
from collections import deque
from itertools import chain
from typing import TYPE_CHECKING

from tiercache.errors import ProtocolError, UnavailableError
from tiercache.model import Outcome
from tiercache.net.tcp import frames, stream

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tiercache.net.tcp.stream import Span

log = logging.getLogger(__name__)

GRACE_S = 0.25
"""How long a batch that was given up may hold its pieces before the connection is cut."""
SEND_HERE_BYTES = 64 << 10
"""Up to here the loop itself sends, where the connection takes it at once."""

_OUTCOMES = {Outcome.HIT: Outcome.HIT, Outcome.MISS & 0xFF: Outcome.MISS}


class Batch:
    """Moves that were asked for together, and what became of them. `spans`: each move's memory, for a read only."""

    __slots__ = ("abandoned", "answer", "count", "keep", "lengths", "number", "outcomes", "spans")

    def __init__(self, lengths: Sequence[int], spans: Sequence[Sequence[Span]], keep: object) -> None:
        self.count = len(lengths)
        self.lengths, self.spans, self.keep = lengths, spans, keep
        self.number = 0
        self.outcomes: list[Outcome] = []
        self.answer: asyncio.Future[list[Outcome]] = asyncio.get_running_loop().create_future()
        self.abandoned: asyncio.Future[None] | None = None
        """Set once nobody waits any more; done when no thread touches the batch's memory."""


Parcel = tuple[Batch | None, bytes, "Sequence[Span]", asyncio.Future[None] | None]


class Lane:
    """A connection that was made and proved. On the loop that made it, except where it says so."""

    def __init__(self, sock: socket.socket, welcome: bytes) -> None:
        """`welcome`: what the door says first, once it knows us."""
        self.fault: str | None = None
        """Why nothing moves any more."""
        self.ended = asyncio.Event()
        """No thread touches memory any more."""
        self._sock, self._welcome = sock, welcome
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._waiting: deque[Batch] = deque()  # in the order of their requests
        self._receiving: Batch | None = None
        self._sending: Batch | None = None
        self._number = 0
        self._parcels: queue.SimpleQueue[Parcel | None] = queue.SimpleQueue()
        self._unsent = 0
        self._sender: threading.Thread | None = None
        self._threads = 1
        threading.Thread(target=self._receive, name="tiercache-tcp-answers", daemon=True).start()

    # -- asking ------------------------------------------------------------------------------------------------------

    async def ask(self, op: frames.Op, rows: Sequence[tuple[int, int, int]], batch: Batch, deadline_s: float,
                  payload: Sequence[Span] = ()) -> list[Outcome]:  # fmt: skip
        """Sends one request, and answers what became of its moves: (region, offset, length) each. `payload` goes along
        with a write. Raises UnavailableError where the connection is dead, or after the deadline, which kills it."""
        self._check()
        self._number = self._number + 1 & 0xFFFFFFFF
        batch.number = self._number
        head = frames.HEAD.pack(op, 0, 0, batch.number, batch.count, sum(batch.lengths))
        with self._lock:
            self._waiting.append(batch)
        self._post(batch, head + b"".join([frames.MOVE.pack(*row) for row in rows]), payload)
        timer = self._loop.call_later(deadline_s, self.kill, f"no answer within {deadline_s:g} s")
        try:
            return await batch.answer
        except asyncio.CancelledError:
            await self._abandon(batch)
            raise
        finally:
            timer.cancel()

    async def note(self, note: bytes, deadline_s: float) -> None:
        """Sends a note behind all requests. Raises as `ask`."""
        self._check()
        sent: asyncio.Future[None] = self._loop.create_future()
        head = frames.HEAD.pack(frames.Op.NOTE, 0, 0, 0, 0, len(note))
        self._post(None, head + note, (), sent)
        timer = self._loop.call_later(deadline_s, self.kill, f"a note not taken within {deadline_s:g} s")
        try:
            await sent
        finally:
            timer.cancel()

    def kill(self, why: str) -> None:
        """Cuts the connection; what is under way fails as soon as no thread touches its memory. From any thread."""
        with self._lock:
            if self.fault is not None:
                return
            self.fault = why
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the other end was first
        self._parcels.put(None)

    def _check(self) -> None:
        if self.fault is not None:
            raise UnavailableError(f"the connection to the peer is dead: {self.fault}")

    def _post(self, batch: Batch | None, head: bytes, payload: Sequence[Span],
              sent: asyncio.Future[None] | None = None) -> None:  # fmt: skip
        """Sends a frame here and now where that takes no time, else hands it to the thread."""
        total = len(head) + (sum(batch.lengths) if batch and payload else 0)
        if not self._unsent and total <= SEND_HERE_BYTES and len(payload) < stream.PIECES_MAX:
            try:
                count = self._sock.sendmsg([head, *stream.views(payload)], (), socket.MSG_DONTWAIT)
            except BlockingIOError:
                count = 0
            except OSError as error:
                self.kill(str(error))
                count = 0
            if count == total:
                if sent:
                    sent.set_result(None)
                return
            if count:  # the rest would be hard to name span by span; the frame is small, so it is copied
                whole = b"".join([head, *stream.views(payload)])
                head, payload, batch = whole[count:], (), None
        self._unsent += 1
        self._parcels.put((batch, head, payload, sent))
        if self._sender is None:
            self._threads += 1
            self._sender = threading.Thread(target=self._send, name="tiercache-tcp-requests", daemon=True)
            self._sender.start()

    async def _abandon(self, batch: Batch) -> None:
        """Returns when no thread touches the batch's memory, or will; the connection lives on where that is soon."""
        with self._lock:
            batch.abandoned = self._loop.create_future()
            touched = batch in (self._receiving, self._sending)
        if touched:
            await _calmly(batch.abandoned, GRACE_S)
            if not batch.abandoned.done():
                self.kill("a batch was given up in the middle")
                await _calmly(self.ended.wait())

    # -- in the thread that sends --------------------------------------------------------------------------------------

    def _send(self) -> None:
        why = "sending failed"
        try:
            while (parcel := self._parcels.get()) is not None and self.fault is None:
                self._send_one(*parcel)
        except OSError as error:
            why = str(error)
        finally:
            self.kill(why)
            self._tell(self._thread_ended)

    def _send_one(self, batch: Batch | None, head: bytes, payload: Sequence[Span],
                  sent: asyncio.Future[None] | None) -> None:  # fmt: skip
        if batch is not None:
            with self._lock:
                if batch.abandoned is not None:  # nothing of it has left
                    self._waiting.remove(batch)
                    batch = None
                    head, payload = b"", ()
                self._sending = batch
        try:
            stream.pour(self._sock, head, payload)
        finally:
            self._leave(batch)
        self._tell(self._was_sent, sent)

    def _was_sent(self, sent: asyncio.Future[None] | None) -> None:
        self._unsent -= 1
        if sent is not None and not sent.done():
            sent.set_result(None)

    # -- in the thread that receives -----------------------------------------------------------------------------------

    def _receive(self) -> None:
        why = "receiving failed"
        try:
            if not frames.same(stream.take(self._sock, len(self._welcome)), self._welcome):
                raise ProtocolError("the peer does not know this transport")
            while True:
                self._take_answer()
        except (OSError, ProtocolError) as error:
            why = str(error)
            if isinstance(error, ProtocolError):
                log.debug("a tcp peer is cut off: %s", error)
        finally:
            self.kill(why)
            self._tell(self._thread_ended)

    def _take_answer(self) -> None:
        """Takes one frame, and the bytes that it announces. Raises ProtocolError for any but the one that must come."""
        op, said, zero, number, count, size = frames.HEAD.unpack(stream.take(self._sock, frames.HEAD.size))
        with self._lock:
            batch = self._waiting[0] if self._waiting else None
            if op != frames.Op.ANSWER or zero or batch is None or batch.number != number or said not in _OUTCOMES:
                raise ProtocolError(f"an answer to nothing that was asked: {op:#x}, {said}, {number}")
            first = len(batch.outcomes)
            last = first + count
            outcome = _OUTCOMES[said]
            due = sum(batch.lengths[first:last]) if batch.spans and outcome == Outcome.HIT else 0
            if not first < last <= batch.count or size != due:
                raise ProtocolError(f"{count} moves of {size} bytes from {first} on answered, of {batch.count}")
            wanted = batch.abandoned is None
            self._receiving = batch if wanted else None
        try:
            if wanted and size:
                stream.fill(self._sock, chain.from_iterable(batch.spans[first:last]))
            elif size:
                stream.drain(self._sock, size)
        finally:
            with self._lock:
                self._receiving = None
            self._leave(batch)
        batch.outcomes += [outcome] * count
        if last == batch.count:
            with self._lock:
                self._waiting.popleft()
            self._tell(self._answered, batch)

    # -- both ----------------------------------------------------------------------------------------------------------

    def _leave(self, batch: Batch | None) -> None:
        """The calling thread touches the batch's memory no more."""
        if batch is None:
            return
        with self._lock:
            if self._sending is batch and threading.current_thread() is self._sender:
                self._sending = None
            left = batch.abandoned if batch not in (self._sending, self._receiving) else None
        if left is not None:
            self._tell(_finish, left)

    def _tell(self, call: Callable[..., None], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(call, *arguments)
        except RuntimeError:
            pass  # the loop is closed: nobody waits any more

    def _answered(self, batch: Batch) -> None:
        if not batch.answer.done():
            batch.answer.set_result(batch.outcomes)

    def _thread_ended(self) -> None:
        self._threads -= 1
        if self._threads:
            return
        self._sock.close()
        fault = f"the connection to the peer died: {self.fault}"
        for batch in self._waiting:
            if not batch.answer.done():
                batch.answer.set_exception(UnavailableError(fault))
        self._waiting.clear()
        while not self._parcels.empty():
            parcel = self._parcels.get()
            if parcel is not None and parcel[3] is not None and not parcel[3].done():
                parcel[3].set_exception(UnavailableError(fault))
        self.ended.set()


def _finish(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def _calmly(what: object, timeout_s: float | None = None) -> None:
    """Waits for something also while this is cancelled again and again: memory is at stake, and the wait is short."""
    waiting = asyncio.ensure_future(what)  # type: ignore[call-overload]  # a future or a coroutine
    while not waiting.done():
        try:
            if not (await asyncio.wait([waiting], timeout=timeout_s))[0]:
                return
        except asyncio.CancelledError:
            continue
