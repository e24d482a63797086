"""Lane: one connection that this end made, over which it asks.

Small requests and answers are the loop's own work, since a thread takes longer to wake than they take to come; large
ones are a thread's, which sleeps in the kernel while nothing moves.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import socket
import threading
from typing import TYPE_CHECKING

from tiercache.errors import ProtocolError, UnavailableError
from tiercache.net.tcp import frames, stream
from tiercache.net.tcp.answers import Answers, Batch
from tiercache.net.tcp.stream import wait_in_kernel

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tiercache.model import Outcome
    from tiercache.net.tcp.stream import Span

log = logging.getLogger(__name__)

GRACE_S = 0.25
"""How long a batch that was given up may hold its pieces before the connection is cut."""
HERE_BYTES = 1 << 20
"""Up to here the loop itself sends and receives what is under way."""
TURN_BYTES = 1 << 20
"""What the loop takes before others have their turn on it."""

WAIT_S = 0.001
"""How long the loop itself waits for the bytes behind a head, once: they are on their way, and to sleep and wake up
again takes longer than they do."""

Parcel = tuple[Batch | None, list[memoryview], "Sequence[Span]", asyncio.Future[None] | None]


class Lane:
    """A connection that was made and proved. On the loop that made it, except where it says so."""

    def __init__(self, sock: socket.socket, welcome: bytes) -> None:
        """`welcome`: what the door says first, once it knows us."""
        self.fault: str | None = None
        """Why nothing moves any more."""
        self.ended = asyncio.Event()
        """Nothing touches memory any more."""
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._answers = Answers(sock, welcome, self._lock)
        self._number = self._due = 0
        self._threads = 0
        self._turn: threading.Semaphore | None = None
        """Raised when it is the thread's turn to receive; there is no such thread before it is needed."""
        self._theirs = False
        """Whether a thread receives, not the loop."""
        self._parcels: queue.SimpleQueue[Parcel | None] | None = None
        self._unsent = 0
        wait_in_kernel(sock, WAIT_S)
        self._loop.add_reader(sock, self._readable)

    # -- asking ------------------------------------------------------------------------------------------------------

    async def ask(self, op: frames.Op, rows: Sequence[tuple[int, int, int]], batch: Batch, deadline_s: float,
                  payload: Sequence[Span] = ()) -> list[Outcome]:  # fmt: skip
        """Sends one request, and answers what became of its moves: (region, offset, length) each. `payload` goes along
        with a write. Raises UnavailableError where the connection is dead, or after the deadline, which kills it."""
        self._check()
        self._number = self._number + 1 & 0xFFFFFFFF
        batch.number = self._number
        total = sum(batch.lengths)
        due = total if batch.spans else 0
        self._due += due
        with self._lock:
            self._answers.waiting.append(batch)
        head = frames.HEAD.pack(op, 0, 0, batch.number, batch.count, total)
        self._post(batch, head + b"".join([frames.MOVE.pack(*row) for row in rows]), payload)
        self._pass_on()
        timer = self._loop.call_later(deadline_s, self.kill, f"no answer within {deadline_s:g} s")
        try:
            return await batch.answer
        except asyncio.CancelledError:
            await self._abandon(batch)
            raise
        finally:
            timer.cancel()
            self._due -= due

    async def note(self, note: bytes, deadline_s: float) -> None:
        """Sends a note behind all requests. Raises as `ask`."""
        self._check()
        sent: asyncio.Future[None] = self._loop.create_future()
        self._post(None, frames.HEAD.pack(frames.Op.NOTE, 0, 0, 0, 0, len(note)) + note, (), sent)
        timer = self._loop.call_later(deadline_s, self.kill, f"a note not taken within {deadline_s:g} s")
        try:
            await sent
        finally:
            timer.cancel()

    def kill(self, why: str) -> None:
        """Cuts the connection; what is under way fails as soon as nothing touches its memory. From any thread."""
        with self._lock:
            if self.fault is not None:
                return
            self.fault = why
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the other end was first
        self._tell(self._wind_up, 0)

    def _check(self) -> None:
        if self.fault is not None:
            raise UnavailableError(f"the connection to the peer is dead: {self.fault}")

    def _post(self, batch: Batch | None, head: bytes, payload: Sequence[Span],
              sent: asyncio.Future[None] | None = None) -> None:  # fmt: skip
        """Sends a frame here and now where that takes no time, else hands it to the thread."""
        spans = stream.joined(payload)
        window = [memoryview(head)]
        if not self._unsent and len(spans) < stream.PIECES_MAX and sum([span[1] for span in spans]) <= HERE_BYTES:
            window += stream.views(spans)
            spans = []
            try:
                stream.skip(window, self._sock.sendmsg(window, (), socket.MSG_DONTWAIT))
            except BlockingIOError:
                pass
            except OSError as error:
                self.kill(str(error))
            if not window:
                if sent:
                    sent.set_result(None)
                return
            if batch is not None:
                batch.sending = True  # the peer waits for the rest, whether or not anybody here still does
        self._unsent += 1
        if self._parcels is None:
            self._parcels = queue.SimpleQueue()
            self._start(self._send, "tiercache-tcp-requests")
        self._parcels.put((batch, window, spans, sent))

    def _start(self, run: Callable[[], None], name: str) -> None:
        try:
            threading.Thread(target=run, name=name, daemon=True).start()
            self._threads += 1
        except RuntimeError as error:  # the system has no more
            self.kill(str(error))

    async def _abandon(self, batch: Batch) -> None:
        """Returns when nothing touches the batch's memory, or will; the connection lives on where that is soon."""
        with self._lock:
            batch.abandoned = self._loop.create_future()
            touched = batch.sending or batch is self._answers.touching
        if touched:
            await _calmly(batch.abandoned, GRACE_S)
            if not batch.abandoned.done():
                self.kill("a batch was given up in the middle")
                await _calmly(self.ended.wait())

    # -- receiving on the loop -----------------------------------------------------------------------------------------

    def _readable(self) -> None:
        taken = 0
        try:
            while taken < TURN_BYTES and not self._theirs and self.fault is None:
                patient, self._answers.begun = self._answers.begun, False
                batch, count = self._answers.take(socket.MSG_WAITALL if patient else socket.MSG_DONTWAIT)
                taken += count
                if batch is not None:
                    self._came(batch)
                    if not self._answers.waiting:
                        break
        except BlockingIOError:
            pass
        except (OSError, ProtocolError) as error:
            self._blame(error)

    def _pass_on(self) -> None:
        """Has a thread receive where much is under way."""
        if self._theirs or self._due <= HERE_BYTES or self.fault is not None:
            return
        self._theirs = True
        self._loop.remove_reader(self._sock)
        wait_in_kernel(self._sock, 0)
        if self._turn is None:
            self._turn = threading.Semaphore(0)
            self._start(self._receive, "tiercache-tcp-answers")
        self._turn.release()

    def _take_back(self) -> None:
        """The thread has received all that was waited for."""
        if self.fault is None:
            self._theirs = False
            self._pass_on()
            if not self._theirs:
                wait_in_kernel(self._sock, WAIT_S)
                self._loop.add_reader(self._sock, self._readable)

    def _came(self, batch: Batch) -> None:
        """A batch is whole, or was left by whoever received into it after it had been given up."""
        if batch.abandoned is not None:
            if not batch.sending and not batch.abandoned.done():
                batch.abandoned.set_result(None)
        elif not batch.answer.done():
            batch.answer.set_result(batch.outcomes)

    # -- receiving in a thread -----------------------------------------------------------------------------------------

    def _receive(self) -> None:
        assert self._turn is not None
        try:
            while self._turn.acquire() and self.fault is None:
                self._receive_all()
                self._tell(self._take_back)
        except (OSError, ProtocolError) as error:
            self._blame(error)
        finally:
            self._tell(self._wind_up, 1)

    def _receive_all(self) -> None:
        """Receives until nothing is waited for."""
        while True:
            batch, _ = self._answers.take(socket.MSG_WAITALL)
            if batch is not None:
                self._tell(self._came, batch)
                with self._lock:
                    if not self._answers.waiting:
                        return

    # -- sending in a thread -------------------------------------------------------------------------------------------

    def _send(self) -> None:
        assert self._parcels is not None
        try:
            while (parcel := self._parcels.get()) is not None and self.fault is None:
                self._send_one(*parcel)
        except OSError as error:
            self._blame(error)
        finally:
            self._tell(self._wind_up, 1)

    def _send_one(self, batch: Batch | None, window: list[memoryview], payload: Sequence[Span],
                  sent: asyncio.Future[None] | None) -> None:  # fmt: skip
        if batch is not None:
            with self._lock:
                if batch.abandoned is not None and not batch.sending:  # nothing of it has left
                    self._answers.waiting.remove(batch)
                    window, payload = [], ()
                batch.sending = True
        stream.pour(self._sock, window, payload)
        self._tell(self._was_sent, batch, sent)

    def _was_sent(self, batch: Batch | None, sent: asyncio.Future[None] | None) -> None:
        self._unsent -= 1
        if sent is not None and not sent.done():
            sent.set_result(None)
        if batch is not None:
            with self._lock:
                batch.sending = False
                left = batch.abandoned if batch is not self._answers.touching else None
            if left is not None and not left.done():
                left.set_result(None)

    # -- the end -------------------------------------------------------------------------------------------------------

    def _blame(self, error: Exception) -> None:
        if isinstance(error, ProtocolError) and self.fault is None:
            log.debug("a tcp peer is cut off: %s", error)
        self.kill(str(error))

    def _tell(self, call: Callable[..., None], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(call, *arguments)
        except RuntimeError:
            pass  # the loop is closed: nobody waits any more

    def _wind_up(self, threads: int) -> None:
        """After the connection was cut, and after each thread's end: when all is quiet, what was under way fails."""
        self._threads -= threads
        if not self._theirs:
            self._loop.remove_reader(self._sock)
        if threads == 0:
            if self._turn is not None:
                self._turn.release()
            if self._parcels is not None:
                self._parcels.put(None)
        if self._threads or self.ended.is_set():
            return
        self._sock.close()
        fault = f"the connection to the peer died: {self.fault}"
        for batch in self._answers.waiting:
            if not batch.answer.done():
                batch.answer.set_exception(UnavailableError(fault))
        self._answers.waiting.clear()
        while self._parcels is not None and not self._parcels.empty():
            parcel = self._parcels.get()
            if parcel is not None and parcel[3] is not None and not parcel[3].done():
                parcel[3].set_exception(UnavailableError(fault))
        self.ended.set()


async def _calmly(what: object, timeout_s: float | None = None) -> None:
    """Waits for something also while this is cancelled again and again: memory is at stake, and the wait is short."""
    waiting = asyncio.ensure_future(what)  # type: ignore[call-overload]  # a future or a coroutine
    while not waiting.done():
        try:
            if not (await asyncio.wait([waiting], timeout=timeout_s))[0]:
                return
        except asyncio.CancelledError:
            continue
