"""Answers: what comes back on a connection, taken piece by piece, by the loop or by a thread, whoever's turn it is."""

from __future__ import annotations

from collections import deque
from itertools import chain
from typing import TYPE_CHECKING

from tiercache.errors import ProtocolError
from tiercache.model import Outcome
from tiercache.net.tcp import frames, stream

if TYPE_CHECKING:
    import asyncio
    import socket
    import threading
    from collections.abc import Sequence

    from tiercache.net.tcp.stream import Span

_OUTCOMES = {Outcome.HIT: Outcome.HIT, Outcome.MISS & 0xFF: Outcome.MISS}


class Batch:
    """Moves that were asked for together, and what became of them. `spans`: each move's memory, for a read only."""

    __slots__ = ("abandoned", "answer", "count", "keep", "lengths", "number", "outcomes", "sending", "spans")

    def __init__(self, lengths: Sequence[int], spans: Sequence[Sequence[Span]], keep: object,
                 answer: asyncio.Future[list[Outcome]]) -> None:  # fmt: skip
        """`keep`: what keeps the memory alive. `answer`: done with the outcomes, on the loop."""
        self.count = len(lengths)
        self.lengths, self.spans, self.keep, self.answer = lengths, spans, keep, answer
        self.number = 0
        self.outcomes: list[Outcome] = []
        self.sending = False
        """Some of its payload has left, the rest has not."""
        self.abandoned: asyncio.Future[None] | None = None
        """Set once nobody waits any more; done when no thread touches the batch's memory."""


class Answers:
    """The receiving half of a connection. One thread at a time calls `take`; `lock` guards what others look at."""

    def __init__(self, sock: socket.socket, welcome: bytes, lock: threading.Lock) -> None:
        """`welcome`: what the door says first, once it knows us."""
        self.waiting: deque[Batch] = deque()
        """In the order of their requests; the first is being answered."""
        self.touching: Batch | None = None
        """Whose memory a call of the system writes to right now."""
        self.begun = False
        """The head of a group has come, and its bytes have not been waited for yet."""
        self._sock, self._lock, self._welcome = sock, lock, welcome
        self._head = memoryview(bytearray(max(len(welcome), frames.HEAD.size)))
        self._have = 0
        self._batch: Batch | None = None
        self._group = self._left = 0
        self._outcome = Outcome.HIT
        self._window: list[memoryview] = []
        self._spans: list[Span] = []

    def take(self, flags: int) -> tuple[Batch | None, int]:
        """Takes what one call of the system brings: the batch that became whole with it, or whose memory was left after
        it had been given up; and how many bytes came. Raises BlockingIOError where nothing is there and the flags say
        not to wait, OSError at the end, ProtocolError for any answer but the one that must come."""
        if self._batch is None:
            return self._take_head(flags)
        batch = self._batch
        with self._lock:
            wanted = batch.abandoned is None
            if wanted:
                self.touching = batch
        count = 0
        try:
            if self._left:
                count = self._take_bytes(flags, wanted)
        finally:
            with self._lock:
                self.touching = None
        self._left -= count
        if self._left:
            return (batch if batch.abandoned else None), count
        return self._end_group(batch), count

    def _take_head(self, flags: int) -> tuple[Batch | None, int]:
        size = len(self._welcome) or frames.HEAD.size
        count = self._sock.recv_into(self._head[self._have : size], 0, flags)
        if not count:
            raise stream.Ended("the peer closed the connection")
        self._have += count
        if self._have < size:
            return None, count
        self._have = 0
        if self._welcome:
            if not frames.same(bytes(self._head[:size]), self._welcome):
                raise ProtocolError("the peer does not know this transport")
            self._welcome = b""
            return None, count
        batch = self._begin_group(*frames.HEAD.unpack_from(self._head))
        return (self._end_group(batch) if not self._left else None), count

    def _begin_group(self, op: int, said: int, zero: int, number: int, count: int, size: int) -> Batch:
        with self._lock:
            batch = self.waiting[0] if self.waiting else None
        if op != frames.Op.ANSWER or zero or batch is None or batch.number != number or said not in _OUTCOMES:
            raise ProtocolError(f"an answer to nothing that was asked: {op:#x}, {said}, {number}")
        first = len(batch.outcomes)
        last = first + count
        outcome = _OUTCOMES[said]
        due = sum(batch.lengths[first:last]) if batch.spans and outcome == Outcome.HIT else 0
        if not first < last <= batch.count or size != due:
            raise ProtocolError(f"{count} moves of {size} bytes from {first} on answered, of {batch.count}")
        self._batch, self._group, self._left, self._outcome = batch, count, size, outcome
        self.begun = size > 0
        self._spans = stream.joined(chain.from_iterable(batch.spans[first:last])) if size else []
        return batch

    def _take_bytes(self, flags: int, wanted: bool) -> int:
        if not wanted:
            self._window, self._spans = [], []
            scratch = bytearray(min(self._left, stream.SCRATCH_BYTES))
            count = self._sock.recv_into(scratch, 0, flags)
        else:
            if not self._window:
                self._window = stream.views(self._spans[: stream.PIECES_MAX])
                del self._spans[: stream.PIECES_MAX]
            if len(self._window) == 1:
                count = self._sock.recv_into(self._window[0], 0, flags)
            else:
                count = self._sock.recvmsg_into(self._window, 0, flags)[0]
            stream.skip(self._window, count)
        if not count:
            raise stream.Ended("the peer closed the connection")
        return count

    def _end_group(self, batch: Batch) -> Batch | None:
        self._batch, self.begun = None, False
        batch.outcomes += [self._outcome] * self._group
        if len(batch.outcomes) < batch.count:
            return batch if batch.abandoned else None
        with self._lock:
            self.waiting.popleft()
        return batch
