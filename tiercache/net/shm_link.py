"""ShmLink: a peer on this machine, what it exposes as it is mapped here, and copies from and to that."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import hmac
import mmap
import os
import socket
import struct
import threading
from typing import TYPE_CHECKING, NamedTuple

from tiercache.buffers import Buffer, copy
from tiercache.errors import ProtocolError, UnavailableError
from tiercache.model import Outcome
from tiercache.net.shm_post import Op, Post, same_user
from tiercache.transport import MOVES_MAX, NOTE_BYTES_MAX

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Executor

    from tiercache.transport import Move

HERE_BYTES = 1 << 20
"""Up to here the loop itself copies: a thread would take longer to start."""
STEP_BYTES = 8 << 20
"""Between two steps of a copy it may be stopped."""
REGIONS_MAX = 4096
"""Regions of one peer that are known here."""

_MAGIC = b"tcSR"
_REGION = struct.Struct("<4sBBxx8sQQ")
_MAC_BYTES = 16


class Region(NamedTuple):
    """What a descriptor says."""

    region: int
    length: int
    writable: bool


def pack_region(ticket: bytes, region: Region) -> bytes:
    """The descriptor of a region of the transport with this ticket."""
    number, length, writable = region
    body = _REGION.pack(_MAGIC, 1, writable, hashlib.sha256(ticket).digest()[:8], number, length)
    return body + hmac.digest(ticket, body, "sha256")[:_MAC_BYTES]


def parse_region(ticket: bytes, descriptor: bytes) -> Region:
    """What the transport with this ticket exposed. Raises ProtocolError where it did not make this descriptor."""
    if len(descriptor) != _REGION.size + _MAC_BYTES:
        raise ProtocolError(f"{len(descriptor)} bytes are no descriptor of a shm transport")
    body, mac = descriptor[: _REGION.size], descriptor[_REGION.size :]
    if not hmac.compare_digest(hmac.digest(ticket, body, "sha256")[:_MAC_BYTES], mac):
        raise ProtocolError("no descriptor of this peer's shm transport, or a damaged one")
    _, _, writable, _, number, length = _REGION.unpack(body)
    return Region(number, length, bool(writable))


Mapped = Buffer | None
"""A region as it lies in this process; None where the peer no longer exposes it."""


class ShmLink:
    """One peer as this transport reaches it."""

    negotiated = "shm"
    pushes = False

    def __init__(self, ticket: bytes, drop: Callable[[ShmLink, bytes], None], copiers: Executor) -> None:
        """`drop`: forgets the link, and ends what it serves. `copiers`: threads for nothing but copies, so that none
        waits behind something else."""
        self.fault: str | None = None
        """Why nothing moves any more."""
        self.served: set[Post] = set()
        """The connection that the peer made."""
        self._ticket, self._drop, self._copiers = ticket, drop, copiers
        self._loop = asyncio.get_running_loop()
        self._post: Post | None = None
        self._known: list[Region] = []
        self._mapped: dict[int, Mapped] = {}
        self._wanted: dict[int, asyncio.Future[None]] = {}
        self._lengths: dict[int, Region] = {}
        self._copies: dict[asyncio.Future[bool], threading.Event] = {}

    async def dial(self, path: str, hello: bytes) -> None:
        """Connects to the socket of the peer. Raises OSError, UnavailableError where another user listens there."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            sock.setblocking(False)
            await self._loop.sock_connect(sock, path)
            if not same_user(sock):
                raise UnavailableError("a process of another user listens there")
            if self.fault is not None:
                raise UnavailableError(f"the link is dead: {self.fault}")
        except BaseException:
            sock.close()
            raise
        self._post = Post(sock, self._hear, lambda post: self._die("the peer closed the connection"))
        self._post.send(hello, [])

    def attach(self, descriptor: bytes) -> int:
        self._living()
        region = parse_region(self._ticket, descriptor)
        if len(self._known) >= REGIONS_MAX:
            raise ProtocolError(f"a peer exposes more than {REGIONS_MAX} regions")
        self._lengths[region.region] = region
        self._known.append(region)
        return len(self._known) - 1

    async def read(self, moves: Sequence[Move], deadline_s: float) -> list[Outcome]:
        return await self._move(moves, deadline_s, writing=False)

    async def write(self, moves: Sequence[Move], deadline_s: float) -> list[Outcome]:
        return await self._move(moves, deadline_s, writing=True)

    async def notify(self, note: bytes, deadline_s: float) -> None:
        assert len(note) <= NOTE_BYTES_MAX, len(note)
        post = self._living()
        try:
            async with asyncio.timeout(deadline_s):
                if self._copies:
                    await asyncio.wait(list(self._copies))  # it comes behind what they write
                await post.note(note)
        except TimeoutError:
            self._die(f"a note was not taken within {deadline_s:g} s")
            raise UnavailableError(f"the link is dead: {self.fault}") from None

    async def close(self) -> None:
        self._die("the link was closed")
        self._drop(self, self._ticket)
        while self._copies:
            await asyncio.wait(list(self._copies))
        self._mapped.clear()

    # -- the connection ------------------------------------------------------------------------------------------------

    def _living(self) -> Post:
        if self._post is None or self.fault is not None:
            raise UnavailableError(f"the link is dead: {self.fault}")
        return self._post

    def _die(self, why: str) -> None:
        if self.fault is not None:
            return
        self.fault = why
        if self._post is not None:
            self._post.close(why)
        for stop in self._copies.values():
            stop.set()
        for wanted in self._wanted.values():
            if not wanted.done():
                wanted.set_result(None)

    def _hear(self, post: Post, frame: bytes, files: list[int]) -> None:
        """What the peer says to this end: here is a region, or it is gone."""
        op, number, rest = Post.parse(frame)
        if op == Op.GONE and number not in self._lengths:
            return  # it is told of all, also of what was never attached here
        if rest or number not in self._lengths or len(files) != (op == Op.HERE):
            raise ProtocolError(f"an answer {op:#x} to nothing that was asked")
        if op == Op.HERE:
            if number not in self._wanted or number in self._mapped:
                raise ProtocolError("a region that nobody asked for")
            self._mapped[number] = _map(files[0], self._lengths[number])
            os.close(files.pop())
        elif op == Op.GONE:
            self._mapped[number] = None
        else:
            raise ProtocolError(f"an answer {op:#x}")
        wanted = self._wanted.pop(number, None)
        if wanted is not None and not wanted.done():
            wanted.set_result(None)

    async def _map_all(self, numbers: set[int], deadline_s: float) -> None:
        """Asks the peer for the regions that are not mapped yet."""
        post = self._living()
        for number in numbers - self._wanted.keys():
            self._wanted[number] = self._loop.create_future()
            post.tell(Op.WANT, number)
        waiting = [self._wanted[number] for number in numbers if number in self._wanted]
        if waiting and self.fault is None:
            _, missing = await asyncio.wait(waiting, timeout=deadline_s)
            if missing:
                self._die(f"no answer within {deadline_s:g} s")

    # -- copies --------------------------------------------------------------------------------------------------------

    async def _move(self, moves: Sequence[Move], deadline_s: float, *, writing: bool) -> list[Outcome]:
        self._living()
        assert len(moves) <= MOVES_MAX, len(moves)
        until = self._loop.time() + deadline_s
        known = [self._known[move.region] for move in moves]
        unmapped = {region.region for region in known if region.region not in self._mapped}
        if unmapped:
            await self._map_all(unmapped, deadline_s)
            self._living()
        outcomes: list[Outcome] = []
        todo: list[tuple[Buffer, Buffer]] = []
        total = 0
        for move, region in zip(moves, known, strict=True):
            memory, at = self._mapped[region.region], move.offset
            length = move.length
            if memory is None or at < 0 or at + length > region.length or (writing and not region.writable):
                outcomes.append(Outcome.MISS)
                continue
            outcomes.append(Outcome.HIT)
            total += length
            for piece in move.pieces:
                there = memory.slice(at, piece.length)
                todo.append((piece, there) if writing else (there, piece))
                at += piece.length
        if total <= HERE_BYTES:
            for source, target in todo:
                copy(source, target)
        elif not await self._copy(todo, max(0.0, until - self._loop.time())):
            self._die(f"not done within {deadline_s:g} s")
            raise UnavailableError(f"the link is dead: {self.fault}")
        return outcomes

    async def _copy(self, todo: list[tuple[Buffer, Buffer]], seconds: float) -> bool:
        """Copies in a thread; False where it was stopped before it was done. Ends when nothing is touched any more."""
        stop = threading.Event()
        copying = self._loop.run_in_executor(self._copiers, _copy_all, todo, stop)
        self._copies[copying] = stop
        timer = self._loop.call_later(seconds, stop.set)
        cancelled = False
        try:
            while not copying.done():
                try:
                    await asyncio.wait([copying])
                except asyncio.CancelledError:
                    cancelled = True
                    stop.set()
        finally:
            timer.cancel()
            del self._copies[copying]
        if cancelled:
            raise asyncio.CancelledError
        return copying.result()


def _copy_all(todo: list[tuple[Buffer, Buffer]], stop: threading.Event) -> bool:
    """In a thread."""
    since = 0
    for source, target in todo:
        for start in range(0, source.length, STEP_BYTES):
            if since >= STEP_BYTES or not start:
                if stop.is_set():
                    return False
                since = 0
            size = min(STEP_BYTES, source.length - start)
            copy(source.slice(start, size), target.slice(start, size))
            since += size
    return True


def _map(file: int, region: Region) -> Buffer:
    """A peer's memory file in this process. Raises ProtocolError where looking at it could end in a SIGBUS."""
    try:
        seals = fcntl.fcntl(file, fcntl.F_GET_SEALS)
        if not seals & fcntl.F_SEAL_SHRINK or os.fstat(file).st_size != region.length:
            raise ProtocolError("a peer's memory file is not sealed, or has another size than it said")
        access = mmap.PROT_READ | (mmap.PROT_WRITE if region.writable else 0)
        memory = mmap.mmap(file, region.length, mmap.MAP_SHARED, access)
    except OSError as error:
        raise ProtocolError(f"what a peer shares is no memory file: {error}") from error
    with contextlib.suppress(OSError, AttributeError):
        memory.madvise(mmap.MADV_DONTDUMP)
    return Buffer.of(memory, writable=region.writable)
