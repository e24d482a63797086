"""A network in one process and on one loop: connections, and a transport, between hosts that are but names.

Everything takes a moment drawn from a seed, in order on each connection. Hosts can be cut off from each other (what was
sent waits, as TCP's does; who dials hangs), and can be killed. On a simulated loop this makes a whole pool of caches
deterministic; on a real one it is quick.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
import zlib
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from tiercache.buffers import Buffer, copy
from tiercache.errors import ConfigError, ProtocolError, UnavailableError
from tiercache.model import Outcome
from tiercache.transport import NOTE_BYTES_MAX, Memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from random import Random

    from tiercache.transport import Move

HANGS_S = 3600.0
_HERE: ContextVar[str] = ContextVar("host")
_DESCRIPTOR = struct.Struct("<4s16sIQ?")
_ADDRESS = struct.Struct("<4s16sI")


class Network:
    """See the module."""

    def __init__(self, rng: Random, delay_s: float = 0.002) -> None:
        """Everything takes up to `delay_s`."""
        self.rng, self._delay_s = rng, delay_s
        self._doors: dict[tuple[str, int], Callable[[], asyncio.BaseProtocol]] = {}
        self._ends: set[_End] = set()
        self._cuts: set[frozenset[str]] = set()
        self._transports: dict[bytes, LoopTransport] = {}
        self._ports = 40_000

    def install(self, loop: asyncio.AbstractEventLoop) -> None:
        """`asyncio.open_connection` and `start_server` on this loop are those of this network from now on."""
        loop.create_connection = self._connect  # type: ignore[method-assign, assignment]
        loop.create_server = self._listen  # type: ignore[method-assign, assignment]

    @contextlib.contextmanager
    def at(self, host: str) -> Iterator[None]:
        """What is started inside runs on this host."""
        token = _HERE.set(host)
        try:
            yield
        finally:
            _HERE.reset(token)

    def delay(self) -> float:
        """How long the next thing takes."""
        return self.rng.uniform(0, self._delay_s)

    # -- upheavals -----------------------------------------------------------------------------------------------------

    def is_cut(self, one: str, other: str) -> bool:
        """Whether nothing gets from one of them to the other."""
        return frozenset((one, other)) in self._cuts

    def cut(self, one: str, other: str) -> None:
        """Nothing gets from one host to the other, either way."""
        self._cuts.add(frozenset((one, other)))

    def heal(self) -> None:
        """All hosts reach each other again, and what waited goes on its way."""
        self._cuts.clear()
        for end in sorted(self._ends, key=lambda end: end.number):
            end.go_on()

    def kill(self, host: str) -> None:
        """As SIGKILL: the system of this host closes its connections and doors, and forgets its memory."""
        for place in [place for place in self._doors if place[0] == host]:
            del self._doors[place]
        for end in sorted(self._ends, key=lambda end: end.number):
            if end.here == host:
                end.abort()
        for transport in [one for one in self._transports.values() if one.host == host]:
            transport.die()

    # -- connections ---------------------------------------------------------------------------------------------------

    async def _connect(
        self, factory: Callable[[], asyncio.BaseProtocol], host: str, port: int, **_: Any
    ) -> tuple[asyncio.BaseTransport, asyncio.BaseProtocol]:
        here = _HERE.get()
        await asyncio.sleep(self.delay())
        if self.is_cut(here, host):
            await asyncio.sleep(HANGS_S)
        made = self._doors.get((host, port))
        if made is None:
            raise ConnectionRefusedError(f"nobody listens at {host} port {port}")
        mine, theirs = _End(self, here, host, factory()), _End(self, host, here, made())
        mine.other, theirs.other = theirs, mine
        theirs.begin()
        mine.begin()
        return mine, mine.protocol

    async def _listen(
        self, factory: Callable[[], asyncio.BaseProtocol], host: str, port: int = 0, **_: Any
    ) -> _Listening:
        if not port:
            self._ports += 1
            port = self._ports
        if (host, port) in self._doors:
            raise OSError(f"{host} port {port} is taken")
        self._doors[host, port] = factory
        return _Listening(self, host, port)

    def close_door(self, place: tuple[str, int]) -> None:
        """Nobody listens there any more."""
        self._doors.pop(place, None)

    # -- what ends and transports need ---------------------------------------------------------------------------------

    def add(self, end: _End) -> int:
        """One end of a connection more, by number."""
        self._ends.add(end)
        self._ports += 1
        return self._ports

    def drop(self, end: _End) -> None:
        """An end is no more."""
        self._ends.discard(end)

    def open_transport(self, host: str, notified: Callable[[bytes], None]) -> LoopTransport:
        """A transport at this host."""
        self._ports += 1
        made = LoopTransport(self, host, self._ports, notified)
        self._transports[made.address] = made
        return made

    def transport(self, address: bytes) -> LoopTransport | None:
        """The living transport with this address."""
        found = self._transports.get(address)
        return None if found is None or found.dead else found


class _Listening:
    """As asyncio.Server, as far as it goes."""

    def __init__(self, network: Network, host: str, port: int) -> None:
        self._network, self._place = network, (host, port)
        self.sockets = [self]

    def getsockname(self) -> tuple[str, int]:
        return self._place

    def close(self) -> None:
        self._network.close_door(self._place)


class _End(asyncio.Transport):
    """One end of a connection."""

    other: _End

    def __init__(self, network: Network, here: str, there: str, protocol: asyncio.BaseProtocol) -> None:
        super().__init__({"sockname": (here, 1), "peername": (there, 1)})
        self.here, self.there, self.protocol = here, there, protocol
        self._network, self._loop = network, asyncio.get_running_loop()
        self.number = network.add(self)
        self._line: list[bytes | None] = []
        """On its way to the other end; None: the end of it."""
        self._moving = self._paused = self._closed = False
        self._held: list[bytes] = []

    def begin(self) -> None:
        self.protocol.connection_made(self)

    def write(self, data: Any) -> None:
        if not self._closed:
            self._send(bytes(data))

    def _send(self, data: bytes | None) -> None:
        self._line.append(data)
        if not self._moving:
            self._moving = True
            self._loop.call_later(self._network.delay(), self._arrive)

    def _arrive(self) -> None:
        self._moving = False
        if self._network.is_cut(self.here, self.there) or not self._line:
            return
        line, self._line = self._line, []
        for data in line:
            if data is None:
                self._network.drop(self)
                self.other.lost(ConnectionResetError("the other end is gone"))
            else:
                self.other.take(data)

    def go_on(self) -> None:
        """What waited goes on its way."""
        if self._line and not self._moving:
            self._moving = True
            self._loop.call_later(self._network.delay(), self._arrive)

    def take(self, data: bytes) -> None:
        if self._closed:
            return
        if self._paused:
            self._held.append(data)
        else:
            self.protocol.data_received(data)  # type: ignore[attr-defined]

    def lost(self, why: Exception | None) -> None:
        if not self._closed:
            self._closed = True
            self._network.drop(self)
            self._loop.call_soon(self.protocol.connection_lost, why)

    def abort(self) -> None:
        if not self._closed:
            self._closed = True
            self._line.clear()
            self._send(None)
            self._loop.call_soon(self.protocol.connection_lost, None)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._send(None)
            self._loop.call_soon(self.protocol.connection_lost, None)

    def is_closing(self) -> bool:
        return self._closed

    def get_write_buffer_size(self) -> int:
        return sum(len(data) for data in self._line if data)

    def pause_reading(self) -> None:
        self._paused = True

    def resume_reading(self) -> None:
        self._paused = False
        held, self._held = self._held, []
        for data in held:
            self.take(data)

    def is_reading(self) -> bool:
        return not self._paused


class LoopTransport:
    """The Transport port between hosts of a Network."""

    name = "loop"

    def __init__(self, network: Network, host: str, number: int, notified: Callable[[bytes], None]) -> None:
        self.network, self.host, self.notified = network, host, notified
        self.ticket = network.rng.randbytes(16)
        self.address = _sealed(_ADDRESS.pack(b"loop", self.ticket, number))
        self.regions: dict[int, tuple[Buffer, bool]] = {}
        self.links: list[LoopLink] = []
        self.dead = False
        self._next = 0

    def expose(self, memory: Buffer, *, writable: bool = False, kind: Memory = Memory.HOST, file: int = -1) -> bytes:
        if kind is not Memory.HOST:
            raise ConfigError("only memory of the host can be exposed here")
        self._next += 1
        self.regions[self._next] = memory, writable
        return _sealed(_DESCRIPTOR.pack(b"regn", self.ticket, self._next, memory.length, writable))

    def withdraw(self, descriptor: bytes) -> None:
        self.regions.pop(_DESCRIPTOR.unpack(_opened(descriptor, _DESCRIPTOR))[2], None)

    async def connect(self, address: bytes, deadline_s: float) -> LoopLink:
        _opened(address, _ADDRESS)
        there = self.network.transport(address)
        if there is None or self.dead:
            raise UnavailableError("nobody is there")
        link = LoopLink(self, there)
        self.links.append(link)
        try:
            await link.travel(deadline_s)
        except UnavailableError:
            await link.close()
            raise
        return link

    def knows(self, other: LoopTransport) -> bool:
        """Whether it connected to the other one."""
        return any(link.there is other and not link.dead for link in self.links)

    def die(self) -> None:
        """All links end at once, and nothing is exposed any more."""
        self.dead = True
        self.regions.clear()
        for link in self.links:
            link.die()

    async def close(self) -> None:
        self.die()


class LoopLink:
    """One transport as another one reaches it."""

    pushes = False

    def __init__(self, here: LoopTransport, there: LoopTransport) -> None:
        self.here, self.there, self.dead = here, there, False
        self._regions: list[tuple[int, int, bool]] = []
        self._travelling: set[asyncio.Future[None]] = set()

    @property
    def negotiated(self) -> str:
        return "loop"

    def attach(self, descriptor: bytes) -> int:
        self._check()
        magic, ticket, number, length, writable = _DESCRIPTOR.unpack(_opened(descriptor, _DESCRIPTOR))
        if magic != b"regn" or ticket != self.there.ticket:
            raise ProtocolError("no descriptor of this peer")
        self._regions.append((number, length, writable))
        return len(self._regions) - 1

    async def read(self, moves: Sequence[Move], deadline_s: float) -> list[Outcome]:
        return await self._move(moves, deadline_s, write=False)

    async def write(self, moves: Sequence[Move], deadline_s: float) -> list[Outcome]:
        return await self._move(moves, deadline_s, write=True)

    async def _move(self, moves: Sequence[Move], deadline_s: float, *, write: bool) -> list[Outcome]:
        await self.travel(deadline_s)
        outcomes = []
        for move in moves:
            number, length, writable = self._regions[move.region]
            found = self.there.regions.get(number)
            if found is None or move.offset < 0 or move.offset + move.length > length or (write and not writable):
                outcomes.append(Outcome.MISS)
                continue
            at = move.offset
            for piece in move.pieces:
                far = found[0].slice(at, piece.length)
                copy(piece, far) if write else copy(far, piece)
                at += piece.length
            outcomes.append(Outcome.HIT)
        await self.travel(deadline_s)
        return outcomes

    async def notify(self, note: bytes, deadline_s: float) -> None:
        assert len(note) <= NOTE_BYTES_MAX, len(note)
        await self.travel(deadline_s)
        self.there.notified(note)

    async def travel(self, deadline_s: float) -> None:
        """Takes as long as a message does. Raises UnavailableError where it does not get there; the link is dead."""
        self._check()
        loop, network = asyncio.get_running_loop(), self.here.network
        arrived: asyncio.Future[None] = loop.create_future()
        cut = network.is_cut(self.here.host, self.there.host)
        timer = loop.call_later(deadline_s if cut else min(network.delay(), deadline_s), _done, arrived)
        self._travelling.add(arrived)
        try:
            await arrived
        finally:
            timer.cancel()
            self._travelling.discard(arrived)
        if cut or self.there.dead:
            self.die()
        self._check()

    def _check(self) -> None:
        if self.dead or self.there.dead:
            raise UnavailableError("the link is dead")

    def die(self) -> None:
        """Whatever is on its way does not get there."""
        self.dead = True
        for each in self._travelling:
            _done(each)

    async def close(self) -> None:
        self.die()
        if self in self.here.links:
            self.here.links.remove(self)


def _done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _sealed(body: bytes) -> bytes:
    return body + zlib.crc32(body).to_bytes(4, "little")


def _opened(data: bytes, shape: struct.Struct) -> bytes:
    if len(data) != shape.size + 4 or _sealed(data[:-4]) != data:
        raise ProtocolError("no bytes of this transport, or damaged ones")
    return data[:-4]
