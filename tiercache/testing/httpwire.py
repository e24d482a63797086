"""The HTTP/1.1 that our test servers speak: heads, bodies (plain, chunked, aws-chunked), and a loop in a thread."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, unquote

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

HEAD_BYTES_MAX = 64 << 10
CHUNK_BYTES = 256 << 10
START_TIMEOUT_S = 10.0


class BadRequest(Exception):
    """The peer broke HTTP: the connection cannot go on."""


@dataclass(slots=True)
class Head:
    """First line and headers of a request or an answer; names lower case, the last of equal names wins."""

    line: str
    headers: dict[str, str]
    raw: bytes

    @property
    def content_length(self) -> int | None:
        """The declared length of the body, None when it has none."""
        text = self.headers.get("content-length")
        return int(text) if text is not None and text.isdigit() else None

    @property
    def is_chunked(self) -> bool:
        """True for Transfer-Encoding: chunked."""
        return self.headers.get("transfer-encoding", "").lower() == "chunked"


@dataclass(slots=True)
class Request:
    """One parsed request; `path` is decoded, `target` is as it came."""

    method: str
    target: str
    path: str
    query: dict[str, str]
    head: Head
    body: AsyncIterator[bytes] = field(repr=False)

    def header(self, name: str) -> str | None:
        """Value of a header (name in lower case)."""
        return self.head.headers.get(name)


async def read_head(reader: asyncio.StreamReader) -> Head | None:
    """The next head from a connection; None at its end. Raises BadRequest for what is no head."""
    try:
        raw = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if error.partial.strip():
            raise BadRequest("the connection ended inside a head") from error
        return None
    except asyncio.LimitOverrunError as error:
        raise BadRequest("head too large") from error
    line, *rest = raw[:-4].decode("latin-1").split("\r\n")
    headers = {}
    for text in rest:
        name, colon, value = text.partition(":")
        if not colon:
            raise BadRequest(f"no header: {text[:80]!r}")
        headers[name.strip().lower()] = value.strip()
    return Head(line, headers, raw)


def parse_request(head: Head, body: AsyncIterator[bytes]) -> Request:
    """Request from its head and its (lazy) body."""
    parts = head.line.split(" ")
    if len(parts) != 3 or not parts[2].startswith("HTTP/1."):
        raise BadRequest(f"no request line: {head.line[:80]!r}")
    method, target, _ = parts
    path, _, query = target.partition("?")
    if path.startswith("http://"):
        path = "/" + path[7:].partition("/")[2]
    return Request(method, target, unquote(path), dict(parse_qsl(query, keep_blank_values=True)), head, body)


async def read_exactly(reader: asyncio.StreamReader, length: int) -> AsyncIterator[bytes]:
    """`length` bytes in pieces; raises IncompleteReadError when the peer stops early."""
    left = length
    while left:
        piece = await reader.read(min(left, CHUNK_BYTES))
        if not piece:
            raise asyncio.IncompleteReadError(b"", left)
        left -= len(piece)
        yield piece


async def read_chunked(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The payload of a chunked body, trailers read and dropped."""
    while True:
        length = int((await reader.readline()).split(b";")[0], 16)
        if not length:
            break
        async for piece in read_exactly(reader, length):
            yield piece
        await reader.readexactly(2)
    while (await reader.readline()).strip():
        pass


async def body_of(reader: asyncio.StreamReader, head: Head) -> AsyncIterator[bytes]:
    """The body that a request head announces, in pieces."""
    pieces = read_chunked(reader) if head.is_chunked else read_exactly(reader, head.content_length or 0)
    async for piece in pieces:
        yield piece


async def aws_chunked(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Payload inside an aws-chunked body (signatures and trailers are dropped, not checked)."""
    pending = bytearray()
    left = 0
    async for piece in pieces:
        pending += piece
        while True:
            if left > 2:
                take = min(left - 2, len(pending))
                if take:
                    yield bytes(pending[:take])
                    del pending[:take]
                    left -= take
            if 0 < left <= 2:
                take = min(left, len(pending))
                del pending[:take]
                left -= take
            if left:
                break
            end = pending.find(b"\r\n")
            if end < 0:
                break
            length = int(bytes(pending[:end]).split(b";")[0], 16)
            del pending[: end + 2]
            if not length:
                async for _ in pieces:
                    pass
                return
            left = length + 2


class LoopThread:
    """An asyncio loop in a thread of its own, serving until it is stopped.

    `serve` is called in that loop with an event and must return when the event is set.
    """

    def __init__(self, serve: Callable[[asyncio.Event, Callable[[], None]], Awaitable[None]], name: str) -> None:
        self._serve = serve
        self._started = threading.Event()
        self._fault: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Starts and waits until it serves; raises what the start raised."""
        self._thread.start()
        if not self._started.wait(START_TIMEOUT_S):
            raise TimeoutError("the test server did not start in time")
        if self._fault is not None:
            raise self._fault

    def call(self, action: Callable[[], None]) -> None:
        """Runs `action` in the loop, soon."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(action)

    def stop(self) -> None:
        """Stops and waits for the thread. Idempotent."""
        if self._stop is not None and self._thread.is_alive():
            self.call(self._stop.set)
            self._thread.join(START_TIMEOUT_S)

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:
            self._fault = error
            self._started.set()
            if self._loop is not None and self._stop is not None:
                return
            raise

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        await self._serve(self._stop, self._started.set)
