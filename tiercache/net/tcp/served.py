"""Served: one connection that a peer made, and the thread that answers on it."""

from __future__ import annotations

import asyncio
import logging
import select
import socket
import threading
from typing import TYPE_CHECKING

from tiercache.errors import ProtocolError
from tiercache.model import Outcome
from tiercache.net.tcp import frames, stream
from tiercache.transport import MOVE_BYTES_MAX, MOVES_MAX, NOTE_BYTES_MAX

if TYPE_CHECKING:
    from collections.abc import Callable

    from tiercache.net.tcp.regions import Group, Regions

log = logging.getLogger(__name__)

GROUP_BYTES_MAX = 16 << 20
"""Bytes that are answered under one head, so that memory can be withdrawn between two; a longer move stands alone."""
HANDSHAKE_S = 10.0
"""How long a dialler may take to say who it is."""
STRANGER_S = 30.0
"""How long a dialler that this end has not connected to is waited for."""
STALLED_S = 30.0
"""How long a peer may take nothing of an answer, or send nothing of a request that it began."""
NOTES_MAX = 16
"""Notes of one peer that wait for the loop; further ones wait in the connection."""

_HIT, _MISS = Outcome.HIT & 0xFF, Outcome.MISS & 0xFF


class Served:
    """A peer's connection. Its thread begins with the handshake; it sleeps in the kernel while nothing is asked."""

    def __init__(self, sock: socket.socket, regions: Regions, admit: Callable[[Served, bytes], bytes | None],
                 ticket: bytes, nonce: bytes) -> None:  # fmt: skip
        """`admit`: blocks until the dialler of this name is one to serve, then its ticket; None where it is not."""
        self.over = False
        """It was cut, or has ended by itself."""
        self.ended = asyncio.Event()
        """Its thread is gone: it touches no memory."""
        self.notified: Callable[[bytes], None] = _nobody
        self._sock, self._regions, self._admit = sock, regions, admit
        self._ticket, self._nonce = ticket, nonce
        self._loop = asyncio.get_running_loop()
        self._room = threading.Semaphore(NOTES_MAX)
        self._deaf = False

    def start(self, gone: Callable[[Served], None]) -> None:
        """Starts its thread; `gone` is called on the loop when that has ended."""
        threading.Thread(target=self._serve, args=(gone,), name="tiercache-tcp-served", daemon=True).start()

    def cut(self, why: str) -> None:
        """Ends the connection; its thread follows at once. From any thread."""
        if not self.over:
            log.debug("a connection of a tcp peer is cut: %s", why)
        self.over = self._deaf = True
        self._room.release()
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it is closed already

    # -- in its thread -------------------------------------------------------------------------------------------------

    def _serve(self, gone: Callable[[Served], None]) -> None:
        try:
            self._be_patient(HANDSHAKE_S)
            if self._shake_hands():
                self._be_patient(STALLED_S)
                self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while not self.over:
                    self._answer_one()
        except ProtocolError as error:
            log.debug("a tcp peer is cut off: %s", error)
        except OSError:
            pass  # it went away, or was cut
        finally:
            self.over = True
            try:
                self._loop.call_soon_threadsafe(self._end, gone)
            except RuntimeError:
                self._sock.close()  # the loop is closed

    def _end(self, gone: Callable[[Served], None]) -> None:
        self._sock.close()
        self.ended.set()
        gone(self)

    def _be_patient(self, seconds: float) -> None:
        stream.wait_in_kernel(self._sock, seconds)
        stream.wait_in_kernel(self._sock, seconds, socket.SO_SNDTIMEO)

    def _shake_hands(self) -> bool:
        hello = stream.take(self._sock, frames.HELLO.size)
        name = frames.parse_hello(hello)
        self._sock.sendall(frames.CHALLENGE.pack(self._nonce, frames.door_proof(self._ticket, hello, self._nonce)))
        proof = stream.take(self._sock, frames.PROOF_BYTES)
        ticket = self._admit(self, name)
        if ticket is None:
            raise ProtocolError("a dialler that nobody here connected to")
        if not frames.same(proof, frames.dial_proof(self._ticket, ticket, hello, self._nonce)):
            raise ProtocolError("a dialler that does not know the tickets")
        self._sock.sendall(frames.welcome_proof(self._ticket, ticket, hello, self._nonce))
        return True

    def _answer_one(self) -> None:
        op, said, zero, number, count, size = frames.HEAD.unpack(self._next_head())
        if said or zero:
            raise ProtocolError("a request with an outcome")
        if op == frames.Op.NOTE:
            if count or size > NOTE_BYTES_MAX:
                raise ProtocolError(f"a note of {count} moves, {size} bytes")
            self._tell(stream.take(self._sock, size) if size else b"")
            return
        if op not in (frames.Op.READ, frames.Op.WRITE) or not 0 < count <= MOVES_MAX:
            raise ProtocolError(f"a request {op:#x} of {count} moves")
        rows = list(frames.MOVE.iter_unpack(stream.take(self._sock, count * frames.MOVE.size)))
        if sum([length for _, _, length in rows]) != size or max([length for _, _, length in rows]) > MOVE_BYTES_MAX:
            raise ProtocolError(f"{count} moves that are not {size} bytes, or longer than {MOVE_BYTES_MAX}")
        at = 0
        while at < count:
            writing = op == frames.Op.WRITE
            group = self._regions.enter(self, rows[at : at + MOVES_AT_ONCE], writing=writing, bytes_max=GROUP_BYTES_MAX)
            try:
                self._do(group, writing, number, sum([row[2] for row in rows[at : at + group.moves]]))
            finally:
                self._regions.leave(self, group)
            at += group.moves

    def _do(self, group: Group, writing: bool, number: int, size: int) -> None:
        """Moves a group's bytes, and says so: before them in a read, behind them in a write."""
        possible = bool(group.spans)
        if writing:
            if possible:
                stream.fill(self._sock, group.spans)
            else:
                stream.drain(self._sock, size)
        said = _HIT if possible else _MISS
        head = frames.HEAD.pack(frames.Op.ANSWER, said, 0, number, group.moves, 0 if writing else group.total)
        stream.pour(self._sock, [memoryview(head)], () if writing else group.spans)

    def _next_head(self) -> bytes:
        """The next frame's head; waits for its begin without a deadline, and without waking up."""
        try:
            first = self._sock.recv(frames.HEAD.size)
        except BlockingIOError:
            poll = select.poll()
            poll.register(self._sock, select.POLLIN)
            poll.poll()
            first = self._sock.recv(frames.HEAD.size)
        if not first:
            raise stream.Ended("the peer closed the connection")
        rest = frames.HEAD.size - len(first)
        return first + stream.take(self._sock, rest) if rest else first

    def _tell(self, note: bytes) -> None:
        self._room.acquire()
        if not self._deaf:
            self._loop.call_soon_threadsafe(self._hear, note)

    def _hear(self, note: bytes) -> None:
        self._room.release()
        if not self._deaf:  # what came before the peer closed is heard
            self.notified(note)


MOVES_AT_ONCE = 1024
"""Moves that are looked at together."""


def _nobody(note: bytes) -> None:
    """Hears nothing."""
