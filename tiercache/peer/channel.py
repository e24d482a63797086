"""Channel: the control connection between two caches: who is there, that he lives, questions and answers.

Both ends prove that they know the secret of the pool (HMAC-SHA256 over both ends' nonces and hellos); the secret itself
never travels, and strangers are told nothing. The frames after that are neither encrypted nor signed: whoever can
change what travels between two peers can speak for them. Whoever is silent for the deadline is gone: every question
then ends with UnavailableError.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import logging
import os
import stat
from typing import TYPE_CHECKING, Any

from tiercache.errors import ConfigError, ProtocolError, TierCacheError, UnavailableError
from tiercache.peer.frames import BODY_BYTES_MAX, HEADER, VERSION, Frame, Op, pack, unpack_header

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine
    from random import Random

log = logging.getLogger(__name__)

MAGIC = "tiercache peer"
NONCE_BYTES = 32
HELLO_BYTES_MAX = 64 << 10
NAME_CHARS_MAX = 200
FAULT_CHARS_MAX = 500
UNSENT_BYTES_MAX = 2 * BODY_BYTES_MAX
"""Bytes that wait to be sent; who takes nothing for so long is gone."""
ABOUT_BYTES_MAX = 1 << 20
QUESTIONS_MAX = 1024
"""Questions of the other end that are worked on at a time."""
PULSES = 4
"""Pulses within a deadline."""


class Channel:
    """One peer, from when it has proven who it is until it is gone. On one loop."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, hello: dict[str, Any], deadline_s: float
    ) -> None:
        """`hello` is what the other end said of itself."""
        self.hello, self._reader, self._writer, self._deadline_s = hello, reader, writer, deadline_s
        self._asked: dict[int, asyncio.Future[Frame]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._next = 0
        self._why = ""
        self._late: Callable[[Frame], None] = _ignored
        self.closed = asyncio.Event()

    async def ask(self, op: Op, body: bytes, deadline_s: float = 0.0) -> Frame:
        """The answer to a question. Raises UnavailableError where none comes in time, or the peer says that it
        failed."""
        loop = asyncio.get_running_loop()
        self._next += 1
        number = self._next
        answer: asyncio.Future[Frame] = loop.create_future()
        frame: Frame | None = None
        self._asked[number] = answer
        try:
            self.tell(op, body, number)
            async with asyncio.timeout(deadline_s or self._deadline_s):
                frame = await answer
        except TimeoutError:
            raise UnavailableError(f"{self.name} did not answer in time") from None
        finally:
            del self._asked[number]
            if frame is None and answer.done() and not answer.cancelled() and answer.exception() is None:
                self._late(answer.result())  # it came when nobody waited for it any more
        if frame.op == Op.FAULT:
            raise UnavailableError(f"{self.name} could not answer: {_text(frame.body)}")
        return frame

    def tell(self, op: Op, body: bytes = b"", number: int = 0) -> None:
        """Sends a frame, without waiting. Raises UnavailableError where the channel is closed, or takes nothing."""
        if self.closed.is_set():
            raise UnavailableError(f"{self.name} is gone: {self._why}")
        self._writer.write(pack(op, number, body))
        if self._writer.transport.get_write_buffer_size() > UNSENT_BYTES_MAX:
            self.close("it takes nothing any more")
            raise UnavailableError(f"{self.name} takes nothing any more")

    @property
    def name(self) -> str:
        """Who it is, for messages."""
        return _printable(str(self.hello.get("name"))[:NAME_CHARS_MAX])

    async def flush(self) -> None:
        """Returns when most of what was told has left. Raises UnavailableError where the channel is closed."""
        try:
            await self._writer.drain()
        except OSError as fault:
            raise UnavailableError(f"{self.name} is gone: {fault}") from None

    async def run(
        self,
        heard: Callable[[Frame], None],
        late: Callable[[Frame], None],
        answer: Callable[[Frame], Awaitable[tuple[Op, bytes]]],
        pulse: Callable[[], bytes],
    ) -> None:
        """Serves the channel until it ends: `heard` takes what is told, `late` answers that nobody waits for any more,
        `answer` questions, each in a task of its own; `pulse` is said now and then."""
        self._late = late
        beating = asyncio.get_running_loop().create_task(self._beat(pulse))
        try:
            while True:
                frame = await read_frame(self._reader, self._deadline_s)
                waiting = self._asked.get(frame.number)
                if frame.op in _QUESTIONS:
                    self._start(self._answer(frame, answer))
                elif frame.op not in _ANSWERS:
                    heard(frame)
                elif waiting is not None and not waiting.done():
                    waiting.set_result(frame)
                else:
                    late(frame)
        except (ProtocolError, UnavailableError) as fault:
            self.close(str(fault))
        except asyncio.IncompleteReadError:
            self.close("it closed the connection")
        except OSError as fault:
            self.close(str(fault))
        finally:
            beating.cancel()
            self.close("this end stopped")
            for task in list(self._tasks):
                task.cancel()
            if self._tasks:
                await asyncio.wait(list(self._tasks))
            with contextlib.suppress(OSError):
                await self._writer.wait_closed()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        if len(self._tasks) >= QUESTIONS_MAX:
            work.close()
            raise ProtocolError(f"more than {QUESTIONS_MAX} questions at a time")
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, frame: Frame, answer: Callable[[Frame], Awaitable[tuple[Op, bytes]]]) -> None:
        try:
            op, body = await answer(frame)
        except ProtocolError as fault:
            self.close(str(fault))
            return
        except (TierCacheError, OSError, LookupError) as fault:
            op, body = Op.FAULT, str(fault)[:FAULT_CHARS_MAX].encode(errors="replace")
        with contextlib.suppress(UnavailableError):
            self.tell(op, body, frame.number)

    async def _beat(self, pulse: Callable[[], bytes]) -> None:
        with contextlib.suppress(UnavailableError):
            while True:
                self.tell(Op.PULSE, pulse())
                await asyncio.sleep(self._deadline_s / PULSES)

    def close(self, why: str) -> None:
        """Ends it; `run` returns soon. Idempotent."""
        if self.closed.is_set():
            return
        self._why = why
        self.closed.set()
        log.debug("channel to %s closed: %s", self.name, why)
        for waiting in self._asked.values():
            if not waiting.done():
                waiting.set_exception(UnavailableError(f"{self.name} is gone: {why}"))
        self._writer.transport.abort()


def _text(body: bytes) -> str:
    """What the other end says, for messages."""
    return _printable(body[:FAULT_CHARS_MAX].decode(errors="replace"))


def _printable(text: str) -> str:
    """Nothing that changes what a log or a terminal shows."""
    return "".join([one if one.isprintable() else "?" for one in text])


def _ignored(_: Frame) -> None:
    """Nobody serves the channel yet."""


_QUESTIONS = frozenset({Op.WANT, Op.PUSH, Op.OFFER})
_ANSWERS = frozenset({Op.HELD, Op.PUSHED, Op.TAKEN, Op.FAULT})


async def read_frame(reader: asyncio.StreamReader, deadline_s: float, bytes_max: int = BODY_BYTES_MAX) -> Frame:
    """The next frame. Raises ProtocolError on what is none, UnavailableError where none comes in time."""
    try:
        async with asyncio.timeout(deadline_s):
            length, op, number = unpack_header(await reader.readexactly(HEADER.size))
            if length > bytes_max:
                raise ProtocolError(f"a message of {length} bytes, at most {bytes_max} are allowed here")
            return Frame(op, number, await reader.readexactly(length))
    except TimeoutError:
        raise UnavailableError(f"it was silent for {deadline_s:g} s") from None


async def shake(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    *,
    dialled: bool,
    about: dict[str, Any],
    secret: bytes,
    random: Random,
    deadline_s: float,
    tell: Callable[[], dict[str, Any]],
) -> Channel:
    """Both ends say who they are and prove that they know the secret; the channel. `tell` is what is said of this end
    to whoever has proven it. Raises ProtocolError where the other end is no peer of this pool, UnavailableError where
    it says nothing, all in time."""
    mine = {"magic": MAGIC, "version": VERSION, "nonce": random.randbytes(NONCE_BYTES).hex(), **about}
    ours = json.dumps(mine).encode()
    writer.write(pack(Op.HELLO, 0, ours))
    frame = await read_frame(reader, deadline_s, HELLO_BYTES_MAX)
    theirs = _hello(frame)
    first, second = (ours, frame.body) if dialled else (frame.body, ours)
    proofs = [
        hmac.new(secret, role + hashlib.sha256(first).digest() + hashlib.sha256(second).digest(), "sha256").digest()
        for role in (b"dialled", b"called")
    ]
    writer.write(pack(Op.PROVE, 0, proofs[0 if dialled else 1]))
    proof = await read_frame(reader, deadline_s, HELLO_BYTES_MAX)
    if proof.op != Op.PROVE or not hmac.compare_digest(proof.body, proofs[1 if dialled else 0]):
        raise ProtocolError("it does not know the secret of this pool: give both the same peer_token_file")
    writer.write(pack(Op.ABOUT, 0, json.dumps(tell()).encode()))
    about_it = said(await read_frame(reader, deadline_s, ABOUT_BYTES_MAX), Op.ABOUT)
    return Channel(reader, writer, {**about_it, **theirs}, deadline_s)


def said(frame: Frame, op: Op) -> dict[str, Any]:
    """What a frame of this kind says. Raises ProtocolError where it is none, or says nothing that can be read."""
    try:
        found = json.loads(frame.body) if frame.op == op else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ProtocolError(f"operation {frame.op} where {op.name} must come, or one that cannot be read")
    return found


def _hello(frame: Frame) -> dict[str, Any]:
    found = said(frame, Op.HELLO)
    if found.get("magic") != MAGIC:
        raise ProtocolError("whoever is there is no peer of a tiercache")
    if found.get("version") != VERSION:
        version = str(found.get("version"))[:NAME_CHARS_MAX]
        raise ProtocolError(f"it speaks version {version!r}, this end {VERSION}: use one release for all")
    if not isinstance(found.get("nonce"), str) or not isinstance(found.get("id"), str) or len(found["id"]) > 64:
        raise ProtocolError("its hello lacks who it is")
    return found


def read_secret(path: str) -> bytes:
    """The secret of the pool; without a file all peers on loopback know it. Raises ConfigError for what is none."""
    if not path:
        return b"loopback"
    try:
        with open(path, "rb") as file:
            secret = file.read(4096).strip()
            open_to_all = os.fstat(file.fileno()).st_mode & (stat.S_IROTH | stat.S_IWOTH)
    except OSError as error:
        raise ConfigError(
            f"peer_token_file cannot be read ({error}): give all peers a file with the same text"
        ) from None
    if len(secret) < 16:
        raise ConfigError("peer_token_file must hold 16 bytes or more: `openssl rand -hex 32` makes some")
    if open_to_all:
        log.warning("everybody on this machine can read or change peer_token_file, and be a peer: chmod 600 %s", path)
    return secret
