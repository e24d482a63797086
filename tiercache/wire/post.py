"""Post: the owner's end of one connection."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tiercache.errors import ProtocolError
from tiercache.wire.frames import Frame, Op, pack_fault
from tiercache.wire.sockets import peer
from tiercache.wire.stream import Stream

if TYPE_CHECKING:
    import asyncio
    import socket
    from collections.abc import Callable, Sequence

QUESTIONS_MAX = 16_384
"""Open questions of one connection; a Line of ours stays under half of it by itself, so more is no client of ours."""

ONE_WAY = frozenset({Op.RELEASE, Op.TOUCH, Op.FILLED, Op.UNFILLED, Op.ABANDON, Op.SETTLE, Op.TOLD, Op.TOUCH_CHAIN})


class Post:
    """Hands every whole frame to `on_frame(post, frame)` on the loop, and says once how it ended: `on_gone(post, why)`,
    later on the loop, also after `close`. All methods are for the loop; on a closed post they do nothing.

    Every question (any frame but the one-way ones) gets exactly one `answer`, `answer_fds` or `fault`. Descriptors are
    taken in (`fds`, closed at the end unless `take_fds` took them) until `take_fds`."""

    def __init__(
        self,
        sock: socket.socket,
        loop: asyncio.AbstractEventLoop,
        on_frame: Callable[[Post, Frame], None],
        on_gone: Callable[[Post, str], None],
    ) -> None:
        self.sock = sock
        self.peer = peer(sock)
        self.questions = 0
        self._on_frame, self._on_gone = on_frame, on_gone
        self._stream = Stream(sock, loop, self._take, self._gone, fds_wanted=True, hold_back=True)
        self._send = self._stream.send

    @property
    def closed(self) -> bool:
        """Whether nothing comes or goes any more."""
        return self._stream.closed

    def answer(self, number: int, body: bytes = b"") -> None:
        """Answers a question."""
        self.questions -= 1
        self._send(_ANSWER, number, body)

    def answer_fds(self, number: int, body: bytes, fds: Sequence[int]) -> None:
        """Answers with descriptors beside the bytes (at most FDS_MAX); the caller keeps its own."""
        self.questions -= 1
        self._send(_ANSWER, number, body, fds)

    def fault(self, number: int, error: BaseException) -> None:
        """Answers a question by a fault."""
        self.questions -= 1
        self._send(Op.FAULT, number, pack_fault(error))

    def push(self, op: int, number: int, body: bytes) -> None:
        """Says something unasked: FILL with the number of its READ, FORGET with one of its own."""
        self._send(op, number, body)

    def take_fds(self) -> list[int]:
        """The descriptors that came until now, which are the caller's to close; no more are taken in after it."""
        fds, self._stream.fds = self._stream.fds, []
        self._stream.fds_wanted = False
        return fds

    def pause(self, paused: bool) -> None:
        """Stops reading from this peer, or goes on. FILLED is not read either: never wait for it while paused."""
        self._stream.pause(paused)

    def close(self, why: str = "closed by the owner") -> None:
        """Ends the connection; what is unsent is dropped. Idempotent."""
        self._stream.close(why)

    def _take(self, frame: Frame) -> None:
        if frame.op not in ONE_WAY:
            self.questions += 1
            if self.questions > QUESTIONS_MAX:
                raise ProtocolError(f"more than {QUESTIONS_MAX} questions at once")
        self._on_frame(self, frame)

    def _gone(self, why: str) -> None:
        self._on_gone(self, why)


_ANSWER = int(Op.ANSWER)
