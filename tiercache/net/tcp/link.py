"""TcpLink: a peer, the connections made to it, and those that it made."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

from tiercache.errors import ProtocolError, UnavailableError
from tiercache.model import Outcome
from tiercache.net.tcp import frames
from tiercache.net.tcp.answers import Batch
from tiercache.net.tcp.lane import Lane
from tiercache.transport import DESCRIPTOR_BYTES_MAX, MOVE_BYTES_MAX, MOVES_MAX, NOTE_BYTES_MAX

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tiercache.net.tcp.served import Served
    from tiercache.net.tcp.stream import Span
    from tiercache.transport import Move


class TcpLink:
    """One peer as this transport reaches it."""

    pushes = False

    def __init__(self, there: frames.Address, drop: Callable[[TcpLink], list[Served]]) -> None:
        """`drop`: forgets the link, and cuts and answers what it serves."""
        self.there, self.name = there, frames.name_of(there.ticket)
        self.served: set[Served] = set()
        """The connection that the peer made, once it has; the transport's lock guards it."""
        self._drop = drop
        self._lane: Lane | None = None
        self._closed = False
        self._regions: list[frames.Exposed] = []

    @property
    def negotiated(self) -> str:
        return "tcp"

    @property
    def admits(self) -> bool:
        """Whether the peer may make its connection for it. Where that is made already, another one is of a link to
        come, and waits: of this one it would end with it."""
        dead = self._closed or (self._lane is not None and self._lane.fault is not None)
        return not dead and not self.served

    async def dial(self, host: str, ticket: bytes, nonce: bytes) -> None:
        """Makes the connection, from this address of ours. Raises OSError, or UnavailableError where somebody else than
        the peer answers."""
        there = self.there
        sock = socket.socket(socket.AF_INET6 if ":" in there.host else socket.AF_INET, socket.SOCK_STREAM)
        try:
            loop = asyncio.get_running_loop()
            sock.setblocking(False)
            sock.bind((host, 0))
            await loop.sock_connect(sock, (there.host, there.port))
            hello = frames.pack_hello(frames.name_of(ticket), nonce)
            await loop.sock_sendall(sock, hello)
            challenge = await _exactly(loop, sock, frames.CHALLENGE.size)
            theirs, proof = frames.CHALLENGE.unpack(challenge)
            if not frames.same(proof, frames.door_proof(there.ticket, hello, theirs)):
                raise UnavailableError(f"somebody else than the peer listens at {there.host} port {there.port}")
            await loop.sock_sendall(sock, frames.dial_proof(there.ticket, ticket, hello, theirs))
            sock.setblocking(True)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        except BaseException:
            sock.close()
            raise
        if self._closed:
            sock.close()
            raise UnavailableError("the link was closed meanwhile")
        self._lane = Lane(sock, frames.welcome_proof(there.ticket, ticket, hello, theirs))

    def attach(self, descriptor: bytes) -> int:
        self._living()
        if len(descriptor) > DESCRIPTOR_BYTES_MAX:
            raise ProtocolError(f"a descriptor of {len(descriptor)} bytes")
        self._regions.append(frames.parse_region(self.there.ticket, descriptor))
        return len(self._regions) - 1

    async def read(self, moves: Sequence[Move], deadline_s: float) -> list[Outcome]:
        return await self._move(frames.Op.READ, moves, deadline_s)

    async def write(self, moves: Sequence[Move], deadline_s: float) -> list[Outcome]:
        return await self._move(frames.Op.WRITE, moves, deadline_s)

    async def notify(self, note: bytes, deadline_s: float) -> None:
        assert len(note) <= NOTE_BYTES_MAX, len(note)
        await self._living().note(note, deadline_s)

    async def close(self) -> None:
        self._closed = True
        served = self._drop(self)
        if self._lane is not None:
            self._lane.kill("the link was closed")
            await self._lane.ended.wait()
        for each in served:
            await each.ended.wait()

    def _living(self) -> Lane:
        if self._lane is None or self._closed:
            raise UnavailableError("the link was closed")
        if self._lane.fault is not None:
            raise UnavailableError(f"the link is dead: {self._lane.fault}")
        return self._lane

    async def _move(self, op: frames.Op, moves: Sequence[Move], deadline_s: float) -> list[Outcome]:
        """Asks for what the other end exposed, as far as its descriptors say; the rest is a miss."""
        lane = self._living()
        assert len(moves) <= MOVES_MAX, len(moves)
        outcomes = [Outcome.MISS] * len(moves)
        asked: list[int] = []
        rows: list[tuple[int, int, int]] = []
        spans: list[list[Span]] = []
        for at, move in enumerate(moves):
            region, size, writable = self._regions[move.region]
            pieces = [(piece.address, piece.length) for piece in move.pieces]
            length = sum([piece[1] for piece in pieces])
            assert length <= MOVE_BYTES_MAX, length
            if 0 <= move.offset and move.offset + length <= size and (writable or op == frames.Op.READ):
                asked.append(at)
                rows.append((region, move.offset, length))
                spans.append(pieces)
        if not asked:
            return outcomes
        lengths = [row[2] for row in rows]
        answer: asyncio.Future[list[Outcome]] = asyncio.get_running_loop().create_future()
        if op == frames.Op.READ:
            found = await lane.ask(op, rows, Batch(lengths, spans, moves, answer), deadline_s)
        else:
            payload = [piece for pieces in spans for piece in pieces]
            found = await lane.ask(op, rows, Batch(lengths, (), moves, answer), deadline_s, payload)
        for at, outcome in zip(asked, found, strict=True):
            outcomes[at] = outcome
        return outcomes


async def _exactly(loop: asyncio.AbstractEventLoop, sock: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        more = await loop.sock_recv(sock, length - len(data))
        if not more:
            raise ConnectionError("the other end closed the connection")
        data += more
    return data
