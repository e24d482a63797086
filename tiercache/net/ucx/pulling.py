"""Pulling: reads where puts are the only safe move. UCX answers a get over TCP in software, and where the asker dies
meanwhile, it ends the process that answers.

So the asker asks in a message, the other end puts into a landing of the asker's, and says when it is done; then the
bytes are copied to where they were wanted. Nobody but the asker's own thread ever writes to its pieces; and the other
end looks up what it is asked for.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from tiercache.net.ucx.binding import CANCELED, ERRORS

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator, Sequence

    from tiercache.buffers import Buffer
    from tiercache.net.ucx.binding import Library
    from tiercache.net.ucx.moving import Endpoint

SLOT_BYTES = 1 << 20
"""Bytes of one question at most."""
SLOTS = 8
"""Questions under way on one link."""
SPANS_MAX = 512
"""Spans of one question."""

_HEAD = struct.Struct("<HBH")
_SPAN = struct.Struct("<IQI")


class Span(NamedTuple):
    """Bytes [offset, offset + length) of what the other end exposed under this serial number."""

    serial: int
    offset: int
    length: int


class Question(NamedTuple):
    """What is asked for at once: spans that lie one behind the other in a slot."""

    spans: list[Span]
    moves: list[int]
    """Which move each is of."""
    targets: list[list[tuple[int, int]]]
    """Where each goes: addresses and lengths, in order."""


class Landing:
    """Memory that one peer puts into, in slots. Late bytes of a peer that hung are lost here."""

    def __init__(self, expose: Callable[[int, int], tuple[int, bytes]]) -> None:
        """`expose`: registers memory; its handle and descriptor."""
        self.memory = mmap.mmap(-1, SLOTS * SLOT_BYTES)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.handle, self.descriptor = expose(self.address, SLOTS * SLOT_BYTES)
        self.free = deque(range(SLOTS))

    def leave(self) -> bool:
        """Gives the memory back; whether nothing can be written here any more."""
        self.memory.madvise(mmap.MADV_DONTNEED)
        return len(self.free) == SLOTS


class Pull:
    """The questions of one read."""

    def __init__(
        self,
        endpoint: Endpoint,
        questions: Sequence[Question],
        future: asyncio.Future[set[int]],
        send: Callable[[Endpoint, bytes], int | None],
        keep: object,
    ) -> None:
        """`send`: sends a question. See Batch."""
        self.endpoint, self.future, self.keep = endpoint, future, keep
        self.told: Callable[[set[int] | int], None] | None = None
        self._questions, self._send, self._next = questions, send, 0
        self._asked: dict[int, Question] = {}
        self._missed: set[int] = set()
        self._fault = 0
        self.cut = False

    def step(self, library: Library) -> set[int] | int | None:
        """Asks what has room. See Batch."""
        del library
        endpoint = self.endpoint
        if self._fault or endpoint.status:
            return self._fault or endpoint.status  # whatever comes now stays in the landing
        if self.cut:
            return CANCELED  # the same; its slots are free again when their answers have come
        landing = endpoint.landing
        assert landing is not None
        while self._next < len(self._questions) and landing.free:
            question = self._questions[self._next]
            slot = landing.free.popleft()
            self._next += 1
            self._asked[slot] = question
            endpoint.pulls[slot] = self
            request = self._send(endpoint, packed(landing.descriptor, slot, question.spans))
            if request is not None and request >= ERRORS:
                self._fault = request - (1 << 64)
                return self._fault
        return self._missed if not self._asked and self._next == len(self._questions) else None

    def answered(self, slot: int, outcomes: bytes) -> None:
        """What was asked for with this slot has landed, but for spans whose outcome is not 0."""
        question, landing = self._asked.pop(slot), self.endpoint.landing
        assert landing is not None
        at = landing.address + slot * SLOT_BYTES
        for number, span in enumerate(question.spans):
            if len(outcomes) != len(question.spans) or outcomes[number]:
                self._missed.add(question.moves[number])
            elif not self.cut:
                source = at
                for address, length in question.targets[number]:
                    ctypes.memmove(address, source, length)
                    source += length
            at += span.length
        landing.free.append(slot)


def questions(wanted: Sequence[tuple[int, int, int, Sequence[Buffer]]]) -> list[Question]:
    """What to ask for (number of a move, serial, offset, pieces), cut to the size of slots."""
    found = [Question([], [], [])]
    room = SLOT_BYTES
    for move, serial, offset, pieces in wanted:
        for targets in _cut(pieces):
            length = sum([size for _, size in targets])
            if length > room or len(found[-1].spans) == SPANS_MAX:
                found.append(Question([], [], []))
                room = SLOT_BYTES
            found[-1].spans.append(Span(serial, offset, length))
            found[-1].moves.append(move)
            found[-1].targets.append(targets)
            offset += length
            room -= length
    return found if found[0].spans else []


def _cut(pieces: Sequence[Buffer]) -> Iterator[list[tuple[int, int]]]:
    """Addresses and lengths of the pieces, in runs of up to a slot."""
    run, room = list[tuple[int, int]](), SLOT_BYTES
    for piece in pieces:
        start = 0
        while start < piece.length:
            size = min(room, piece.length - start)
            run.append((piece.address + start, size))
            start, room = start + size, room - size
            if not room:
                yield run
                run, room = [], SLOT_BYTES
    if run:
        yield run


def packed(descriptor: bytes, slot: int, spans: Sequence[Span]) -> bytes:
    """The body of a question."""
    head = _HEAD.pack(len(descriptor), slot, len(spans))
    return head + descriptor + b"".join([_SPAN.pack(*span) for span in spans])


def unpacked(body: bytes) -> tuple[bytes, int, list[Span]] | None:
    """Descriptor, slot and spans of a question, or None where it is none."""
    if len(body) < _HEAD.size:
        return None
    size, slot, count = _HEAD.unpack_from(body)
    start = _HEAD.size + size
    if len(body) != start + count * _SPAN.size or not 0 < count <= SPANS_MAX or slot >= SLOTS:
        return None
    spans = [Span(*each) for each in _SPAN.iter_unpack(body[start:])]
    if sum([span.length for span in spans]) > SLOT_BYTES:
        return None
    return body[_HEAD.size : start], slot, spans
