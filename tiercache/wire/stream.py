"""A stream of frames on an event loop: what a Line (client) and a Post (owner) have in common.

One socket, non-blocking, read by add_reader straight into frames, without transports between; what the kernel does not
take at once is buffered and written later.
"""

from __future__ import annotations

import os
import socket
import weakref
from collections import deque
from typing import TYPE_CHECKING

from tiercache.errors import ProtocolError
from tiercache.wire.frames import BODY_BYTES_MAX, HEADER, Splitter
from tiercache.wire.sockets import FDS_MAX, close_all, recv_fds, send_fds

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Sequence

    from tiercache.wire.frames import Frame

RECV_BYTES = 128 << 10
OUT_BYTES_HIGH = 1 << 20
"""More than this unsent: those who can wait, wait."""
OUT_BYTES_MAX = 64 << 20
"""More than this unsent: the other end does not read, and is cut."""

# One for each loop, used only between a receive and the copy of what came: a fresh piece of this size for each receive
# costs ten times the receive.
_BUFFERS: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, bytearray] = weakref.WeakKeyDictionary()


class Stream:
    """See the module. `on_frame` is called on the loop for each frame, `on_end(why)` once, later on the loop, however
    it ended, also by `close`. A ProtocolError raised by `on_frame` ends the stream; any other fault does too, and goes
    on to the loop's handler.

    With `hold_back` it does not read while too much is unsent: who does not take answers asks no more questions. Only
    one end may do so, or both could wait for each other for ever."""

    def __init__(
        self,
        sock: socket.socket,
        loop: asyncio.AbstractEventLoop,
        on_frame: Callable[[Frame], None],
        on_end: Callable[[str], None],
        *,
        fds_wanted: bool = False,
        hold_back: bool = False,
    ) -> None:
        sock.setblocking(False)
        self._sock, self._loop = sock, loop
        self._on_frame, self._on_end = on_frame, on_end
        self._splitter = Splitter()
        self._out: deque[tuple[memoryview, list[int]]] = deque()
        self._buffer = _BUFFERS.setdefault(loop, bytearray(RECV_BYTES))
        self._view = memoryview(self._buffer)
        self._recv_into, self._send = sock.recv_into, sock.send
        self._hold_back = hold_back
        self._reading = self._paused = False
        self._drained: list[asyncio.Future[None]] = []
        self.closed = False
        self.out_bytes = 0
        self.fds_wanted = fds_wanted
        """Whether descriptors are taken in; what else comes is closed by the kernel."""
        self.fds: list[int] = []
        """Descriptors that came and that nobody took yet, in order."""
        _alive.add(self)
        self._read(True)

    # -- in

    def pause(self, paused: bool) -> None:
        """Stops reading (the other end is held up by the kernel), or goes on."""
        self._paused = paused
        self._read(self._may_read())

    def _may_read(self) -> bool:
        return not self._paused and not (self._hold_back and self.out_bytes > OUT_BYTES_HIGH)

    def _read(self, wanted: bool) -> None:
        if wanted != self._reading and not self.closed:
            self._reading = wanted
            if wanted:
                self._loop.add_reader(self._sock, self._readable)
            else:
                self._loop.remove_reader(self._sock)

    def _readable(self) -> None:
        try:
            data = self._recv_with_fds() if self.fds_wanted else bytes(self._view[: self._recv_into(self._buffer)])
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._end(_words(error))
            return
        if not data:
            self._end("the other end has closed the connection")
            return
        whole = False
        try:
            for frame in self._splitter.feed(data):
                self._on_frame(frame)
                if self.closed:
                    break
            whole = True
        except ProtocolError as error:
            self._end(str(error))
        finally:
            if not whole:
                self._end("a message could not be dealt with")

    def _recv_with_fds(self) -> bytes:
        data, fds = recv_fds(self._sock, RECV_BYTES, FDS_MAX)
        self.fds += fds
        if len(self.fds) > FDS_MAX:
            raise OSError("more descriptors than were asked for")
        return data

    # -- out

    def send(self, op: int, number: int, body: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Sends one frame, or keeps what the kernel does not take now. Nothing happens on a closed stream."""
        if len(body) > BODY_BYTES_MAX:
            raise ProtocolError(f"a message of {len(body)} bytes is over {BODY_BYTES_MAX}: ask in smaller batches")
        if self.closed:
            return
        data = HEADER.pack(len(body), op, 0, number) + body
        sent = 0
        try:
            if not self._out:
                try:
                    sent = send_fds(self._sock, data, fds) if fds else self._send(data, socket.MSG_NOSIGNAL)
                except (BlockingIOError, InterruptedError):
                    pass
            if sent < len(data):
                self._keep(memoryview(data)[sent:], [] if sent else _copies(fds))
        except OSError as error:
            self._end(_words(error))

    def _keep(self, rest: memoryview, fds: list[int]) -> None:
        if not self._out:
            self._loop.add_writer(self._sock, self._writable)
        self._out.append((rest, fds))
        self.out_bytes += len(rest)
        if self.out_bytes > OUT_BYTES_MAX:
            self._end(f"the other end does not read: {self.out_bytes} bytes wait for it")
        elif self.out_bytes > OUT_BYTES_HIGH:
            self._read(self._may_read())

    def _writable(self) -> None:
        try:
            while self._out:
                data, fds = self._out[0]
                sent = send_fds(self._sock, data, fds) if fds else self._send(data, socket.MSG_NOSIGNAL)
                close_all(fds)
                self.out_bytes -= sent
                if sent < len(data):
                    self._out[0] = (data[sent:], [])
                    break
                self._out.popleft()
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            self._end(_words(error))
            return
        if not self._out:
            self._loop.remove_writer(self._sock)
        if self.out_bytes <= OUT_BYTES_HIGH // 2:
            self._read(self._may_read())
            self._wake()

    async def room(self) -> None:
        """Returns when little enough is unsent, or the stream has ended."""
        while self.out_bytes > OUT_BYTES_HIGH and not self.closed:
            waiter = self._loop.create_future()
            self._drained.append(waiter)
            await waiter

    def _wake(self) -> None:
        waiters, self._drained = self._drained, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    # -- end

    def close(self, why: str = "closed here") -> None:
        """Ends it; what is unsent is dropped. Idempotent. On the loop."""
        self._end(why)

    def forget(self) -> None:
        """Gives the socket up in a forked child, without a word to the other end, which is the parent's."""
        self.closed = True
        self._sock.close()

    def _end(self, why: str) -> None:
        if self.closed:
            return
        self._read(False)
        self.closed = True
        if self._out:
            self._loop.remove_writer(self._sock)
        for _, fds in self._out:
            close_all(fds)
        close_all(self.fds)
        self.fds = []
        self._out.clear()
        self._sock.close()
        self._wake()
        self._loop.call_soon(self._on_end, why)


# In a forked child every stream is the parent's: one byte from there would end in the middle of the parent's messages.
_alive: weakref.WeakSet[Stream] = weakref.WeakSet()


def _forget_in_child() -> None:
    for each in list(_alive):
        each.forget()


os.register_at_fork(after_in_child=_forget_in_child)


def _copies(fds: Sequence[int]) -> list[int]:
    """For those that must wait, since the caller may close its own."""
    copies: list[int] = []
    try:
        for each in fds:
            copies.append(os.dup(each))  # noqa: PERF401 - what was copied before a failure must be known
    except OSError:
        close_all(copies)
        raise
    return copies


def _words(error: OSError) -> str:
    return f"the connection broke: {error.strerror or str(error)}"
