"""What arrives on the sockets of the tcp transport is checked: strangers at the door, lying peers on either side."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest

from tiercache.buffers import Buffer
from tiercache.errors import UnavailableError
from tiercache.model import Outcome
from tiercache.net.tcp import frames, open_transport
from tiercache.net.tcp.frames import HEAD, MOVE, Op
from tiercache.net.tcp.transport import STRANGERS_MAX, TcpTransport
from tiercache.testing.transports import Guarded, Pair, pattern
from tiercache.transport import MOVES_MAX, NOTE_BYTES_MAX, Move

HIT, MISS = Outcome.HIT, Outcome.MISS
FRAMES = 100_000
DEADLINE_S = 30.0


def transport(notified=lambda note: None) -> TcpTransport:
    return open_transport("127.0.0.1", notified)


class Stranger:
    """A peer whose transport is whatever a test makes of it: tickets and sockets, on the test's loop."""

    def __init__(self) -> None:
        self.ticket = os.urandom(16)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.setblocking(False)
        self.address = frames.pack_address(frames.Address("127.0.0.1", self.listener.getsockname()[1], self.ticket))

    async def dial(self, door: bytes) -> socket.socket:
        """A proved connection to this transport, which has to have connected here."""
        there = frames.parse_address(door)
        loop = asyncio.get_running_loop()
        sock = socket.socket()
        sock.setblocking(False)
        await loop.sock_connect(sock, (there.host, there.port))
        hello = frames.pack_hello(frames.name_of(self.ticket), os.urandom(16))
        await loop.sock_sendall(sock, hello)
        nonce, proof = frames.CHALLENGE.unpack(await exactly(sock, frames.CHALLENGE.size))
        assert proof == frames.door_proof(there.ticket, hello, nonce)
        await loop.sock_sendall(sock, frames.dial_proof(there.ticket, self.ticket, hello, nonce))
        welcome = await exactly(sock, frames.PROOF_BYTES)
        assert welcome == frames.welcome_proof(there.ticket, self.ticket, hello, nonce)
        return sock

    async def let_in(self, dialler: bytes) -> socket.socket:
        """The connection that this transport makes here."""
        loop = asyncio.get_running_loop()
        sock, _ = await loop.sock_accept(self.listener)
        hello = await exactly(sock, frames.HELLO.size)
        nonce = os.urandom(16)
        await loop.sock_sendall(sock, frames.CHALLENGE.pack(nonce, frames.door_proof(self.ticket, hello, nonce)))
        theirs = frames.parse_address(dialler).ticket
        assert await exactly(sock, frames.PROOF_BYTES) == frames.dial_proof(self.ticket, theirs, hello, nonce)
        await loop.sock_sendall(sock, frames.welcome_proof(self.ticket, theirs, hello, nonce))
        return sock


async def exactly(sock: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        more = await asyncio.get_running_loop().sock_recv(sock, length - len(data))
        if not more:
            raise ConnectionError("closed")
        data += more
    return data


async def is_cut(sock: socket.socket) -> bool:
    """Whether the other end closes this connection."""
    try:
        async with asyncio.timeout(DEADLINE_S):
            while await asyncio.get_running_loop().sock_recv(sock, 1 << 20):
                pass
    except ConnectionError:
        pass
    sock.close()
    return True


@asynccontextmanager
async def met() -> AsyncIterator[tuple[TcpTransport, Stranger, object, socket.socket]]:
    """A real transport, linked to a stranger who knows the tickets: the link, and its connection's other end."""
    here, stranger = transport(), Stranger()
    link, sock = await asyncio.gather(here.connect(stranger.address, DEADLINE_S), stranger.let_in(here.address))
    try:
        yield here, stranger, link, sock
    finally:
        sock.close()
        stranger.listener.close()
        await here.close()


def sockets() -> int:
    """Sockets that this process has open."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            found += os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
        except FileNotFoundError:
            pass  # the one that listed them
    return found


@asynccontextmanager
async def nothing_leaks() -> AsyncIterator[None]:
    threads, descriptors = threading.active_count(), sockets()
    yield
    async with asyncio.timeout(DEADLINE_S):
        while threading.active_count() > threads:
            await asyncio.sleep(0)
    assert sockets() <= descriptors


def request(op: int, rows: list[tuple[int, int, int]], payload: bytes = b"", number: int = 1) -> bytes:
    size = sum(row[2] for row in rows)
    return HEAD.pack(op, 0, 0, number, len(rows), size) + b"".join(MOVE.pack(*row) for row in rows) + payload


WRONG = {
    "an unknown op": HEAD.pack(0, 0, 0, 1, 1, 8) + MOVE.pack(1, 0, 8),
    "an answer": HEAD.pack(Op.ANSWER, 0, 0, 1, 1, 8),
    "an outcome": HEAD.pack(Op.READ, 255, 0, 1, 1, 8) + MOVE.pack(1, 0, 8),
    "no moves": HEAD.pack(Op.READ, 0, 0, 1, 0, 0),
    "too many moves": HEAD.pack(Op.READ, 0, 0, 1, MOVES_MAX + 1, 0),
    "most moves of all": HEAD.pack(Op.WRITE, 0, 0, 1, (1 << 32) - 1, (1 << 64) - 1),
    "another sum": HEAD.pack(Op.READ, 0, 0, 1, 1, 9) + MOVE.pack(1, 0, 8),
    "a sum that wraps": HEAD.pack(Op.READ, 0, 0, 1, 2, 14) + MOVE.pack(1, 0, (1 << 64) - 1) + MOVE.pack(1, 0, 15),
    "too long a move": HEAD.pack(Op.READ, 0, 0, 1, 1, 1 << 40) + MOVE.pack(1, 0, 1 << 40),
    "too long a note": HEAD.pack(Op.NOTE, 0, 0, 0, 0, NOTE_BYTES_MAX + 1),
    "a note of moves": HEAD.pack(Op.NOTE, 0, 0, 0, 1, 1),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_request_ends_its_connection_only(what: str) -> None:
    async def check() -> None:
        async with nothing_leaks(), met() as (here, stranger, _, _):
            memory = np.full(4096, 7, np.uint8)
            here.expose(Buffer.of(memory.data, writable=True), writable=True)
            sock = await stranger.dial(here.address)
            await asyncio.get_running_loop().sock_sendall(sock, WRONG[what])
            assert await is_cut(sock)
            assert (memory == 7).all()
            good = await stranger.dial(here.address)
            await asyncio.get_running_loop().sock_sendall(good, request(Op.READ, [(1, 0, 5)]))
            answer = await exactly(good, HEAD.size + 5)
            assert answer == HEAD.pack(Op.ANSWER, 0, 0, 1, 1, 5) + bytes([7] * 5)
            good.close()

    asyncio.run(check())


LIES = {
    "an unknown op": lambda n: HEAD.pack(9, 0, 0, n, 1, 100),
    "a request": lambda n: HEAD.pack(Op.READ, 0, 0, n, 1, 100),
    "another batch": lambda n: HEAD.pack(Op.ANSWER, 0, 0, n + 1, 1, 100),
    "more moves": lambda n: HEAD.pack(Op.ANSWER, 0, 0, n, 2, 100),
    "no moves": lambda n: HEAD.pack(Op.ANSWER, 0, 0, n, 0, 0),
    "more bytes": lambda n: HEAD.pack(Op.ANSWER, 0, 0, n, 1, 101),
    "all bytes": lambda n: HEAD.pack(Op.ANSWER, 0, 0, n, 1, (1 << 64) - 1),
    "fewer bytes": lambda n: HEAD.pack(Op.ANSWER, 0, 0, n, 1, 99),
    "bytes of a miss": lambda n: HEAD.pack(Op.ANSWER, 255, 0, n, 1, 100),
    "an unknown outcome": lambda n: HEAD.pack(Op.ANSWER, 3, 0, n, 1, 100),
}


@pytest.mark.parametrize("what", LIES)
def test_a_wrong_answer_ends_its_link_only(what: str) -> None:
    async def check() -> None:
        async with nothing_leaks(), Pair(transport) as good, met() as (_, stranger, link, sock):
            region = link.attach(frames.pack_region(stranger.ticket, frames.Exposed(1, 4096, True)))
            target = Guarded([100])
            reading = asyncio.ensure_future(link.read([Move(region, 0, target.pieces)], DEADLINE_S))
            asked = await exactly(sock, HEAD.size + MOVE.size)
            number = HEAD.unpack_from(asked)[3]
            await asyncio.get_running_loop().sock_sendall(sock, LIES[what](number) + bytes(300))
            with pytest.raises(UnavailableError):
                await reading
            assert target.untouched()
            with pytest.raises(UnavailableError):
                await link.read([Move(region, 0, target.pieces)], DEADLINE_S)
            region = good.expose(4096, 3)[1]
            assert await good.link.read([Move(region, 0, target.pieces)], DEADLINE_S) == [HIT]

    asyncio.run(check())


def test_strangers_do_not_get_in_and_do_not_keep_others_out() -> None:
    """Many connections that say nothing; hellos of nobody; wrong proofs. A good peer is let in meanwhile."""

    async def check() -> None:
        async with nothing_leaks():
            here = transport()
            there = frames.parse_address(here.address)
            silent = [socket.create_connection((there.host, there.port)) for _ in range(STRANGERS_MAX + 20)]
            for sock in silent:
                sock.setblocking(False)
            async with Pair(transport) as pair:
                link, _ = await asyncio.gather(
                    here.connect(pair.there.address, DEADLINE_S), pair.there.connect(here.address, DEADLINE_S)
                )
                await link.notify(b"in", DEADLINE_S)
                assert await pair.ear_there.wait(1) == [b"in"]
            loop = asyncio.get_running_loop()
            for wrong in (
                b"GET / HTTP/1.1\r\n" + bytes(200),
                bytes(40),
                frames.pack_hello(bytes(16), bytes(16))[:4] + b"\2" * 40,
            ):
                sock = socket.create_connection((there.host, there.port))
                sock.setblocking(False)
                await loop.sock_sendall(sock, wrong)
                assert await is_cut(sock)
            stranger = Stranger()
            linking = asyncio.ensure_future(here.connect(stranger.address, DEADLINE_S))
            first = await stranger.let_in(here.address)
            await linking
            sock = socket.create_connection((there.host, there.port))
            sock.setblocking(False)
            await loop.sock_sendall(sock, frames.pack_hello(frames.name_of(stranger.ticket), bytes(16)))
            await exactly(sock, frames.CHALLENGE.size)
            await loop.sock_sendall(sock, bytes(frames.PROOF_BYTES))
            assert await is_cut(sock)
            await here.close()
            for sock in (*silent, first, stranger.listener):
                sock.close()

    asyncio.run(check())


def mutated(rng: random.Random, good: bytes) -> bytes:
    """Mostly the frame as it is, so that what follows is looked at too; else some bytes changed, cut off, anything."""
    kind = rng.random()
    if kind < 0.9:
        return good
    if kind < 0.92:
        return rng.randbytes(rng.randrange(1, 80))
    if kind < 0.94:
        return good[: rng.randrange(1, len(good))]
    frame = bytearray(good)
    for _ in range(rng.choice((1, 1, 2, 6))):
        at = rng.randrange(min(len(frame), 44))
        frame[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    return bytes(frame)


async def _works(pair: Pair, region: int, over: asyncio.Event) -> int:
    """Reads and checks until the others are through."""
    rounds = 0
    while not over.is_set():
        target = Guarded([5000, 100])
        moves = [Move(region, rounds % 1000, target.pieces[:1]), Move(region, 9, target.pieces[1:])]
        assert await pair.link.read(moves, DEADLINE_S) == [HIT, HIT]
        assert (target.content()[:5000] == pattern(3, rounds % 1000, 5000)).all()
        assert target.whole()
        rounds += 1
        await asyncio.sleep(0)
    return rounds


@pytest.mark.slow
def test_a_hundred_thousand_frames_at_the_door() -> None:
    """Good, changed and random requests of a peer that was let in: guard bytes hold, a good link works all the time."""

    async def check() -> None:
        async with nothing_leaks(), Pair(transport) as pair:
            _, region, _ = pair.expose(1 << 20, 3)
            guarded = np.full(3 * 4096, 0xA5, np.uint8)
            whole = Buffer.of(guarded.data, writable=True)
            pair.there.expose(whole.slice(4096, 4096), writable=True)
            over = asyncio.Event()
            working = asyncio.ensure_future(_works(pair, region, over))
            stranger, rng, sent = Stranger(), random.Random(5), 0
            linking = asyncio.ensure_future(pair.there.connect(stranger.address, DEADLINE_S))
            first = await stranger.let_in(pair.there.address)
            await linking
            loop = asyncio.get_running_loop()
            while sent < FRAMES // 2:
                sock = await stranger.dial(pair.there.address)
                reader = asyncio.ensure_future(is_cut(sock))
                batch = [_some_request(rng) for _ in range(rng.randrange(1, 200))]
                sent += len(batch)
                try:
                    await loop.sock_sendall(sock, b"".join(batch))
                    sock.shutdown(socket.SHUT_WR)
                except OSError:
                    pass  # it was cut in the middle
                assert await reader
            over.set()
            assert await working > 10
            assert (guarded[:4096] == 0xA5).all()
            assert (guarded[8192:] == 0xA5).all()
            assert len(pair.there._regions) == 2
            first.close()
            stranger.listener.close()

    asyncio.run(check())


def _some_request(rng: random.Random) -> bytes:
    rows = [
        (rng.choice((1, 2, 2, 3)), rng.choice((0, 7, 4000, 4096)), rng.randrange(100))
        for _ in range(rng.choice((1, 1, 3)))
    ]
    kind = rng.randrange(3)
    if kind == 0:
        return mutated(rng, request(Op.READ, rows))
    if kind == 1:
        return mutated(rng, request(Op.WRITE, rows, rng.randbytes(sum(row[2] for row in rows))))
    note = rng.randbytes(rng.randrange(50))
    return mutated(rng, HEAD.pack(Op.NOTE, 0, 0, 0, 0, len(note)) + note)


@pytest.mark.slow
def test_a_hundred_thousand_answers_of_a_liar() -> None:
    """As many good, changed and random answers to what a link asks: not a byte outside of the pieces."""

    async def check() -> None:
        async with nothing_leaks(), Pair(transport) as pair:
            _, good, _ = pair.expose(1 << 20, 3)
            over = asyncio.Event()
            working = asyncio.ensure_future(_works(pair, good, over))
            here, stranger, rng, sent = transport(), Stranger(), random.Random(6), 0
            loop = asyncio.get_running_loop()
            while sent < FRAMES // 2:
                linking = asyncio.ensure_future(here.connect(stranger.address, DEADLINE_S))
                sock = await stranger.let_in(here.address)
                link = await linking
                region = link.attach(frames.pack_region(stranger.ticket, frames.Exposed(1, 4096, True)))
                lengths = [rng.randrange(100) for _ in range(rng.randrange(1, 100))]
                target = Guarded(lengths)
                moves = [Move(region, 0, [piece]) for piece in target.pieces]
                reading = asyncio.ensure_future(link.read(moves, DEADLINE_S))
                number = HEAD.unpack_from(await exactly(sock, HEAD.size + MOVE.size * len(moves)))[3]
                answers = [HEAD.pack(Op.ANSWER, 0, 0, number, 1, length) + bytes(length) for length in lengths]
                spoilt = rng.randrange(len(answers) + 1)
                answers[spoilt:] = [mutated(rng, each) for each in answers[spoilt:]]
                answers += [mutated(rng, HEAD.pack(Op.ANSWER, 0, 0, number, 1, 9) + bytes(9)) for _ in range(40)]
                sent += len(answers)
                try:
                    await loop.sock_sendall(sock, b"".join(answers))
                except OSError:
                    pass  # it was cut in the middle
                sock.close()
                (ended,) = await asyncio.gather(reading, return_exceptions=True)
                assert isinstance(ended, UnavailableError) or set(ended) <= {HIT, MISS}, ended
                assert target.whole()
                await link.close()
            over.set()
            assert await working > 10
            await here.close()
            stranger.listener.close()

    asyncio.run(check())


@pytest.mark.slow
def test_a_frame_that_never_ends_holds_nothing_else_up() -> None:
    """Half a request stands in a connection; withdrawing is quick, another peer is served."""

    async def check() -> None:
        async with met() as (here, stranger, _, _):
            second = Stranger()
            _, asked = await asyncio.gather(here.connect(second.address, DEADLINE_S), second.let_in(here.address))
            memory = bytearray(1 << 20)
            descriptor = here.expose(Buffer.of(memory, writable=True), writable=True)
            sock = await stranger.dial(here.address)
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(sock, request(Op.WRITE, [(1, 0, 1 << 20)]) + bytes(1000))
            other = await second.dial(here.address)
            await loop.sock_sendall(other, request(Op.READ, [(1, 1 << 19, 5)]))
            assert await exactly(other, HEAD.size + 5)
            began = loop.time()
            here.withdraw(descriptor)  # the half write is cut off, after a second
            assert loop.time() - began < 5
            memory[:] = bytes([9]) * len(memory)
            assert await is_cut(sock)
            assert memory.count(9) == len(memory)
            for each in (other, asked, second.listener):
                each.close()

    asyncio.run(check())
