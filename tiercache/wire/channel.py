"""Channels: blocking questions to an owner, from any thread, outside every event loop."""

from __future__ import annotations

import os
import socket
import threading
import weakref
from typing import TYPE_CHECKING

from tiercache.clock import SystemClock
from tiercache.errors import ProtocolError, UnavailableError
from tiercache.wire.eager import Eager
from tiercache.wire.frames import BODY_BYTES_MAX, HEADER, Op, pack, unpack_fault
from tiercache.wire.sockets import FDS_MAX, Lost, close_all, recv_fds, send_fds, set_timeout

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tiercache.clock import Clock

ANSWER_S = 30.0
"""How long an answer may take unless the asker says otherwise."""
CHANNELS_MAX = 32
RECV_BYTES = 64 << 10

_ANSWER, _FAULT = int(Op.ANSWER), int(Op.FAULT)
_CLOCK = SystemClock()


class Channel:
    """One connection, one question at a time, one thread at a time. Closed by everything but an answer and the owner's
    own fault: a deadline that passed, a signal that raised, nonsense from the other end; because the answer that may
    still come would be taken for that of the next question.

    Deadlines are the kernel's (SO_RCVTIMEO), so a question costs one send and one receive; and some looks in between,
    where answers come faster than this thread could fall asleep and wake up."""

    def __init__(self, sock: socket.socket, wait_s: float = ANSWER_S, *, clock: Clock = _CLOCK) -> None:
        sock.setblocking(True)
        set_timeout(sock, socket.SO_SNDTIMEO, wait_s)
        set_timeout(sock, socket.SO_RCVTIMEO, wait_s)
        self._sock, self._clock = sock, clock
        self._usual_s = self._set_s = wait_s
        self._number = 0
        self._buffer = bytearray(RECV_BYTES)
        self._view = memoryview(self._buffer)
        self._send, self._recv_into = sock.sendall, sock.recv_into
        self._eager = Eager(clock)
        self._ending = threading.Lock()
        self.closed = False
        self.interrupted = False
        """Whether `interrupt` was called: whatever was answered, it is good for nothing more."""
        _alive.add(self)

    def ask(self, op: int, body: bytes = b"", *, wait_s: float | None = None, alone: bool = False) -> memoryview:
        """The body of the answer (its own memory). Raises the owner's fault, or Lost. `alone`: no other thread asks, so
        this one may look for its answer."""
        self._number = number = self._number + 1
        question = pack(op, number, body)
        try:
            if wait_s != self._set_s:
                self._set(wait_s)
            self._send(question, socket.MSG_NOSIGNAL)
            got = self._wait(alone)
            kind, answer = self._answer(bytes(self._view[:got]), number)
        except OSError as error:
            self.close()
            raise self._lost(error) from error
        except BaseException:
            self.close()
            raise
        # From here on the channel is good for the next question, also where this answer is a fault.
        if kind == _FAULT:
            raise unpack_fault(answer)
        return answer

    def ask_fds(
        self,
        op: int,
        body: bytes = b"",
        *,
        fds_max: int = FDS_MAX,
        bring: Sequence[int] = (),
        wait_s: float | None = None,
    ) -> tuple[memoryview, list[int]]:
        """As `ask`, with the descriptors beside the answer (at most fds_max), which are the caller's to close; `bring`
        goes beside the question. Raises UnavailableError where not all of them could be taken in."""
        self._number = number = self._number + 1
        question = pack(op, number, body)
        fds: list[int] = []
        try:
            if wait_s != self._set_s:
                self._set(wait_s)
            sent = send_fds(self._sock, question, bring)
            self._send(memoryview(question)[sent:], socket.MSG_NOSIGNAL)
            data, fds = recv_fds(self._sock, RECV_BYTES, fds_max)
            kind, answer = self._answer(data, number)
            if kind == _FAULT:
                close_all(fds)
        except UnavailableError:
            self.close()
            raise
        except OSError as error:
            close_all(fds)
            self.close()
            raise self._lost(error) from error
        except BaseException:
            close_all(fds)
            self.close()
            raise
        if kind == _FAULT:
            raise unpack_fault(answer)
        return answer, fds

    def tell(self, op: int, body: bytes = b"") -> None:
        """Sends a one-way message. Raises Lost."""
        message = pack(op, 0, body)
        try:
            self._send(message, socket.MSG_NOSIGNAL)
        except OSError as error:
            self.close()
            raise self._lost(error) from error
        except BaseException:
            self.close()
            raise

    def interrupt(self) -> None:
        """Ends the connection under whoever waits on it in another thread: Lost is raised there."""
        with self._ending:
            self.interrupted = True
            if not self.closed:
                try:
                    self._sock.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass  # it has ended already

    def close(self) -> None:
        """Idempotent."""
        with self._ending:
            self.closed = True
            self._sock.close()

    def forget(self) -> None:
        """Gives it up in a forked child, where its lock may be held for ever by a thread that is not there."""
        self.closed = True
        self._sock.close()

    def _wait(self, alone: bool) -> int:
        """Waits for the answer to begin: so many bytes of it are in the buffer, none where the connection has ended."""
        if alone:
            found = self._eager.look(self._glance)
            if found is not None:
                return found
        now = self._clock.monotonic
        began_s = now()
        got = self._recv_into(self._buffer)
        self._eager.slept(now() - began_s)
        return got

    def _glance(self) -> int | None:
        try:
            return self._recv_into(self._buffer, 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None

    def _set(self, wait_s: float | None) -> None:
        wanted_s = self._usual_s if wait_s is None else wait_s
        if wanted_s != self._set_s:
            set_timeout(self._sock, socket.SO_RCVTIMEO, wanted_s)
            self._set_s = wanted_s

    def _answer(self, data: bytes, number: int) -> tuple[int, memoryview]:
        """The answer that begins with this; what is missing is waited for."""
        if len(data) < HEADER.size:
            data = self._more(data, HEADER.size)
        length, kind, reserved, answered = HEADER.unpack_from(data)
        if answered != number or length > BODY_BYTES_MAX or reserved or kind not in (_ANSWER, _FAULT):
            raise ProtocolError(f"question {number} is answered by a message {kind} of {length} bytes for {answered}")
        size = HEADER.size + length
        if len(data) < size:
            data = self._more(data, size)
        if len(data) > size:
            raise ProtocolError(f"{len(data) - size} bytes more than the answer")
        return kind, memoryview(data)[HEADER.size :]

    def _more(self, data: bytes, size: int) -> bytes:
        """Data made `size` long. Each receive has the whole time; together they have it too."""
        whole = bytearray(size)
        whole[: len(data)] = data
        at, view, until_s = len(data), memoryview(whole), self._clock.monotonic() + self._set_s
        while at < size:
            if not data:
                raise ConnectionResetError("the owner has closed the connection")
            if self._clock.monotonic() > until_s:
                raise BlockingIOError
            got = self._recv_into(view[at:])
            if not got:
                raise ConnectionResetError("the owner has closed the connection in the middle of an answer")
            at += got
        return bytes(whole)

    def _lost(self, error: OSError) -> Lost:
        if isinstance(error, BlockingIOError):
            return Lost(f"the owner did not answer within {self._set_s:g} s")
        return Lost(f"the connection to the owner ended: {error.strerror or str(error) or 'closed'}")


# In a forked child every channel is the parent's: a question from there would take the parent's answers.
_alive: weakref.WeakSet[Channel] = weakref.WeakSet()


def _forget_in_child() -> None:
    for each in list(_alive):
        each.forget()


os.register_at_fork(after_in_child=_forget_in_child)


class Channels:
    """At most `limit` channels made by `make` (which connects and says HELLO); the one used last is used first. A
    question waits up to `wait_s` for a free one, then raises UnavailableError; what `make` raises goes to the asker.

    For any thread. A free channel is taken and given back without a lock; the lock is for making, waiting and ending,
    and may be taken again by its holder, because a finalizer may tell something at any point."""

    def __init__(self, make: Callable[[], Channel], limit: int = CHANNELS_MAX, wait_s: float = ANSWER_S) -> None:
        self._make, self._limit, self._wait_s = make, limit, wait_s
        self._idle: list[Channel] = []
        # Weak, so that one that a signal took from its user between two lines does not count for ever.
        self._all: weakref.WeakSet[Channel] = weakref.WeakSet()
        self._turn = threading.Condition(threading.RLock())
        self._making = self._waiting = 0
        self._ended = False

    def ask(self, op: int, body: bytes = b"", *, wait_s: float | None = None) -> memoryview:
        """As Channel.ask, on any free channel."""
        channel = self._take()
        try:
            # Who looks keeps the interpreter most of the time, and other threads want it when their answers come.
            return channel.ask(op, body, wait_s=wait_s, alone=len(self._idle) + 1 >= len(self._all))
        finally:
            self._give(channel)

    def ask_fds(
        self,
        op: int,
        body: bytes = b"",
        *,
        fds_max: int = FDS_MAX,
        bring: Sequence[int] = (),
        wait_s: float | None = None,
    ) -> tuple[memoryview, list[int]]:
        """As Channel.ask_fds, on any free channel."""
        channel = self._take()
        try:
            return channel.ask_fds(op, body, fds_max=fds_max, bring=bring, wait_s=wait_s)
        finally:
            self._give(channel)

    def tell(self, op: int, body: bytes = b"") -> None:
        """As Channel.tell, on any free channel. Nothing is said about its order with what goes over another one."""
        channel = self._take()
        try:
            channel.tell(op, body)
        finally:
            self._give(channel)

    def lost(self) -> None:
        """Ends all channels, idle and busy ones (their askers raise Lost); the next question makes a new one."""
        with self._turn:
            channels = list(self._all)
        for channel in channels:
            channel.interrupt()
        # What was idle is dropped here; what is busy drops itself.
        while self._idle:
            try:
                self._drop(self._idle.pop())
            except IndexError:
                break

    def close(self) -> None:
        """As `lost`, and every later question raises Lost."""
        with self._turn:
            self._ended = True
            self._turn.notify_all()
        self.lost()

    def forget(self) -> None:
        """Gives all up in a forked child, without a word to the owner: the connections are the parent's."""
        self._ended = True
        self._turn = threading.Condition(threading.RLock())
        for channel in list(self._all):
            channel.forget()
        self._idle.clear()

    def _take(self) -> Channel:
        try:
            channel = self._idle.pop()
        except IndexError:
            channel = self._make_or_wait()
        while channel.interrupted:  # given back after `lost` had passed over it
            self._drop(channel)
            channel = self._make_or_wait()
        return channel

    def _give(self, channel: Channel) -> None:
        if channel.closed or channel.interrupted or self._ended:
            self._drop(channel)
            return
        self._idle.append(channel)
        # After the append: whoever waits has counted itself before it looked for an idle one.
        if self._waiting:
            with self._turn:
                self._turn.notify()

    def _drop(self, channel: Channel) -> None:
        channel.close()
        with self._turn:
            self._all.discard(channel)
            self._turn.notify()

    def _make_or_wait(self) -> Channel:
        with self._turn:
            self._waiting += 1
            try:
                found = self._turn.wait_for(self._place, self._wait_s)
            finally:
                self._waiting -= 1
            if found is None:
                raise UnavailableError(f"all {self._limit} connections to the owner are busy for {self._wait_s:g} s")
            if isinstance(found, Channel):
                return found
            self._making += 1
        try:
            channel = self._make()
        except BaseException:
            with self._turn:
                self._making -= 1
                self._turn.notify()
            raise
        with self._turn:
            self._making -= 1
            self._all.add(channel)
        return channel

    def _place(self) -> Channel | bool | None:
        """A free channel, True for leave to make one, or None."""
        if self._ended:
            raise Lost("the connections to the owner were closed")
        try:
            return self._idle.pop()
        except IndexError:
            return True if len(self._all) + self._making < self._limit else None
