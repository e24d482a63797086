"""Post: frames and descriptors over a Unix socket that keeps their bounds, on the loop."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
from collections import deque
from enum import IntEnum
from typing import TYPE_CHECKING

from tiercache.errors import ProtocolError, UnavailableError
from tiercache.transport import NOTE_BYTES_MAX

if TYPE_CHECKING:
    from collections.abc import Callable

    Hear = Callable[["Post", bytes, list[int]], None]

log = logging.getLogger(__name__)

HELLO = struct.Struct("<4sB3x16s16s")
"""Magic, version, the ticket of whom is dialled, the dialler's."""
BACKLOG_MAX = 4096
"""Frames that wait for a peer that does not take them; at more it is cut off."""
FRAMES_AT_ONCE = 64
"""Frames that are heard before others have their turn on the loop."""

_HEAD = struct.Struct("<B7xQ")
_FRAME_BYTES_MAX = _HEAD.size + NOTE_BYTES_MAX
_UCRED = struct.Struct("iII")


class Op(IntEnum):
    """What a frame is."""

    WANT = 0x57
    """The dialler wants the memory of a region."""
    NOTE = 0x4E
    HERE = 0x48
    """A region's memory file."""
    GONE = 0x47
    """There is no such region any more."""


class Post:
    """One connection. `hear` is called with each frame and its descriptors, which it owns; where it raises
    ProtocolError the connection is cut, with a line in the log."""

    def __init__(self, sock: socket.socket, hear: Hear, gone: Callable[[Post], None]) -> None:
        """`gone` is called once, whoever ended it."""
        self.hear, self._gone = hear, gone
        self._sock: socket.socket | None = sock
        self._loop = asyncio.get_running_loop()
        self._paused = False
        self._backlog: deque[tuple[bytes, list[int], asyncio.Future[None] | None]] = deque()
        sock.setblocking(False)
        self._loop.add_reader(sock, self._readable)

    @staticmethod
    def parse(frame: bytes) -> tuple[int, int, bytes]:
        """Op, region and the rest of a frame. Raises ProtocolError for what is none."""
        if len(frame) < _HEAD.size:
            raise ProtocolError(f"a frame of {len(frame)} bytes")
        op, number = _HEAD.unpack_from(frame)
        return op, number, frame[_HEAD.size :]

    def tell(self, op: Op, number: int, file: int = -1) -> None:
        """Sends a frame, with a descriptor; also later, where the peer is slow."""
        self.send(_HEAD.pack(op, number), [os.dup(file)] if file >= 0 else [])

    async def note(self, note: bytes) -> None:
        """Sends a note; returns when the connection has taken it."""
        sent: asyncio.Future[None] = self._loop.create_future()
        self.send(_HEAD.pack(Op.NOTE, 0) + note, [], sent)
        await sent

    def send(self, frame: bytes, files: list[int], sent: asyncio.Future[None] | None = None) -> None:
        """Sends bytes and descriptors, which this owns, in the order of the calls."""
        if self._sock is None or len(self._backlog) >= BACKLOG_MAX:
            _drop(files, sent)
            self.close("a peer that takes nothing")
            return
        self._backlog.append((frame, files, sent))
        if len(self._backlog) == 1 and not self._flush() and self._sock is not None:
            self._loop.add_writer(self._sock, self._writable)

    def _flush(self) -> bool:
        while self._backlog and self._sock is not None:
            frame, files, sent = self._backlog[0]
            try:
                socket.send_fds(self._sock, [frame], files)
            except BlockingIOError:
                return False
            except OSError as error:
                self.close(str(error))
                return True
            self._backlog.popleft()
            for file in files:
                os.close(file)
            if sent is not None and not sent.done():
                sent.set_result(None)
        return True

    def _writable(self) -> None:
        if self._flush() and self._sock is not None:
            self._loop.remove_writer(self._sock)

    def _readable(self) -> None:
        for _ in range(FRAMES_AT_ONCE):
            if self._sock is None or self._paused:
                return
            files: list[int] = []
            try:
                frame, files, flags, _ = socket.recv_fds(self._sock, _FRAME_BYTES_MAX, 4)
                if not frame:
                    self.close("the peer closed the connection")
                    return
                if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                    raise ProtocolError("a frame that is too long")
                self.hear(self, frame, files)
            except BlockingIOError:
                return
            except (OSError, ProtocolError) as error:
                _drop(files, None)
                self.close(str(error))
                return

    def pause(self) -> None:
        """Hears nothing until `resume`."""
        self._paused = True
        if self._sock is not None:
            self._loop.remove_reader(self._sock)

    def resume(self) -> None:
        """Hears again."""
        self._paused = False
        if self._sock is not None:
            self._loop.add_reader(self._sock, self._readable)

    def close(self, why: str) -> None:
        """Ends the connection. Idempotent."""
        if self._sock is None:
            return
        log.debug("a connection of a shm peer ends: %s", why)
        sock, self._sock = self._sock, None
        self._loop.remove_reader(sock)
        self._loop.remove_writer(sock)
        sock.close()
        while self._backlog:
            _drop(*self._backlog.popleft()[1:])
        self._gone(self)


def _drop(files: list[int], sent: asyncio.Future[None] | None) -> None:
    for file in files:
        os.close(file)
    if sent is not None and not sent.done():
        sent.set_exception(UnavailableError("the connection to the peer ended"))


def same_user(sock: socket.socket) -> bool:
    """Whether the process at the other end, as the kernel tells, belongs to the same user."""
    _, user, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return bool(user == os.geteuid())
