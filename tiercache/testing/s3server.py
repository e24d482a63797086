"""A small S3 server over a directory: fast, honest about what it counts, for tests, demos and benchmarks on loopback.

In process: `with S3Server(root) as server: server.url, server.stats.requests`. As a program:
`python -m tiercache.testing.s3server ROOT --port 9000`. It listens on loopback only and checks no signatures; access
keys in `refused` get 403 for everything.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import socket
import sys
from collections import Counter, deque
from dataclasses import dataclass, field
from email.utils import formatdate, parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Self

from tiercache.clock import SystemClock
from tiercache.testing.httpwire import (
    HEAD_BYTES_MAX,
    BadRequest,
    LoopThread,
    Request,
    aws_chunked,
    body_of,
    parse_request,
    read_head,
)
from tiercache.testing.s3api import Answer, Refusal, S3Api
from tiercache.testing.s3files import Files, Found

if TYPE_CHECKING:
    from collections.abc import Callable

    from tiercache.clock import Clock

LOG_ROWS_MAX = 100_000
SMALL_BYTES = 64 << 10
"""Bodies up to here are read and sent with their head; larger ones go by sendfile."""
SEND_BUFFER_BYTES = 1 << 20
CREDENTIAL = re.compile(r"Credential=([^/,\s]+)/")
REASONS = {
    200: "OK",
    204: "No Content",
    206: "Partial Content",
    304: "Not Modified",
    400: "Bad Request",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    409: "Conflict",
    412: "Precondition Failed",
    416: "Range Not Satisfiable",
    501: "Not Implemented",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One request as the log keeps it; `sent` is the length of the body of the answer."""

    wall_s: float
    method: str
    target: str
    range: str
    status: int
    sent: int
    operation: str
    headers: dict[str, str]


@dataclass(slots=True)
class Stats:
    """Counters since the start or the last `clear`; `log` keeps the newest rows. Control requests do not count."""

    requests: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    connections: int = 0
    by_method: Counter[str] = field(default_factory=Counter)
    by_operation: Counter[str] = field(default_factory=Counter)
    by_status: Counter[int] = field(default_factory=Counter)
    log: deque[Row] = field(default_factory=lambda: deque(maxlen=LOG_ROWS_MAX))

    def clear(self) -> None:
        """Back to zero."""
        self.requests = self.bytes_sent = self.bytes_received = self.connections = 0
        for counter in (self.by_method, self.by_operation, self.by_status):
            counter.clear()
        self.log.clear()

    def facts(self) -> dict[str, object]:
        """Everything but the log, ready for JSON."""
        return {
            "requests": self.requests,
            "bytes_sent": self.bytes_sent,
            "bytes_received": self.bytes_received,
            "connections": self.connections,
            "by_method": dict(self.by_method),
            "by_operation": dict(self.by_operation),
            "by_status": {str(k): v for k, v in self.by_status.items()},
        }


def parse_range(text: str | None, size: int) -> tuple[int, int] | None:
    """(start, stop) that a Range header asks for; None for the whole object (no header, or one that is not understood).

    Raises Refusal 416 when nothing of the object lies in it.
    """
    if text is None or not text.startswith("bytes=") or "," in text:
        return None
    first, dash, last = text[6:].strip().partition("-")
    if not dash or not (first + last).isdigit() or (first and last and int(last) < int(first)):
        return None
    if not first:
        start, stop = max(0, size - int(last)), size
    else:
        start, stop = int(first), min(size, int(last) + 1) if last else size
    if start >= size or start >= stop:
        whole = {"Content-Range": f"bytes */{size}"}
        raise Refusal(416, "InvalidRange", "The requested range is not satisfiable", headers=whole)
    return start, stop


def check_conditions(request: Request, found: Found) -> bool:
    """False when the answer is 304; raises Refusal 412 when a condition of the request does not hold."""
    match, unmodified = request.header("if-match"), request.header("if-unmodified-since")
    none, since = request.header("if-none-match"), request.header("if-modified-since")
    if match is not None:
        if not _names(match, found.etag):
            raise Refusal.condition_failed("If-Match")
    elif unmodified is not None and int(found.mtime_s) > parsedate_to_datetime(unmodified).timestamp():
        raise Refusal.condition_failed("If-Unmodified-Since")
    if none is not None:
        return not _names(none, found.etag)
    return since is None or int(found.mtime_s) > parsedate_to_datetime(since).timestamp()


def _names(header: str, etag: str) -> bool:
    return header.strip() == "*" or etag.strip('"') in (
        t.strip().removeprefix("W/").strip('"') for t in header.split(",")
    )


def signer(request: Request) -> str:
    """The access key id that a request was signed with, or empty."""
    found = CREDENTIAL.search(request.header("authorization") or "")
    return found[1] if found else request.query.get("X-Amz-Credential", "").partition("/")[0]


class S3Server:
    """The server in a thread of its own. A context manager; `url` and `port` are set while it runs."""

    def __init__(self, root: str | os.PathLike[str], *, port: int = 0, clock: Clock | None = None) -> None:
        self.stats = Stats()
        self.port = port
        self.refused: set[str] = set()
        """Access key ids whose requests are refused; "" stands for requests without a signature."""
        self._clock = clock or SystemClock()
        self._api = S3Api(Files(Path(root)), self._clock)
        self._thread = LoopThread(self.serve, "tiercache-s3server")

    @property
    def url(self) -> str:
        """Endpoint, without a slash at the end."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops serving. Idempotent."""
        self._thread.stop()

    async def serve(self, stop: asyncio.Event, started: Callable[[], None]) -> None:
        """Serves on the running loop until `stop` is set."""
        tasks: set[asyncio.Task[None]] = set()

        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.get_running_loop().create_task(self._connection(reader, writer))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        server = await asyncio.start_server(connected, "127.0.0.1", self.port, limit=HEAD_BYTES_MAX, backlog=1024)
        self.port = server.sockets[0].getsockname()[1]
        started()
        await stop.wait()
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.stats.connections += 1
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        try:
            while (head := await read_head(reader)) is not None:
                if not await self._exchange(reader, writer, parse_request(head, body_of(reader, head))):
                    break
        except (ConnectionError, BadRequest, asyncio.IncompleteReadError, TimeoutError):
            pass
        finally:
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: Request) -> bool:
        """Answers one request; False when the connection must close after it."""
        if (request.header("expect") or "").lower() == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        wire_body = request.body
        if "aws-chunked" in (request.header("content-encoding") or "") or (
            request.header("x-amz-content-sha256") or ""
        ).startswith("STREAMING-"):
            request.body = aws_chunked(wire_body)
        control = request.path.startswith("/__")
        try:
            answer = self._control(request) if control else await self._answer(request)
        except Refusal as refusal:
            answer = refusal.answer(request.path)
        async for _ in wire_body:
            pass
        length = answer.stop - answer.start if answer.file is not None else len(answer.body)
        sent = 0 if request.method == "HEAD" or answer.status in (204, 304) else length
        if not control:
            self._count(request, answer, sent)
        await self._send(writer, answer, length, sent)
        return (request.header("connection") or "").lower() != "close"

    async def _answer(self, request: Request) -> Answer:
        if signer(request) in self.refused:
            raise Refusal(403, "AccessDenied", "Access Denied")
        answer = await self._api.answer(request)
        found = answer.found
        if found is None:
            return answer
        answer.headers |= {
            "ETag": found.etag,
            "Last-Modified": formatdate(found.mtime_s, usegmt=True),
            "Accept-Ranges": "bytes",
            "Content-Type": found.content_type,
        } | {f"x-amz-meta-{k}": v for k, v in found.metadata.items()}
        if not check_conditions(request, found):
            answer.status = 304
            return answer
        held = request.header("if-range") in (None, found.etag)
        span = parse_range(request.header("range") if held else None, found.size)
        answer.start, answer.stop = span or (0, found.size)
        answer.file = found.file
        if span is not None:
            answer.status = 206
            answer.headers["Content-Range"] = f"bytes {answer.start}-{answer.stop - 1}/{found.size}"
        return answer

    def _count(self, request: Request, answer: Answer, sent: int) -> None:
        stats = self.stats
        stats.requests += 1
        stats.bytes_sent += sent
        stats.bytes_received += answer.received
        stats.by_method[request.method] += 1
        stats.by_operation[answer.operation] += 1
        stats.by_status[answer.status] += 1
        headers = {
            k: v for k, v in request.head.headers.items() if k.startswith(("if-", "x-amz-copy", "user-agent", "host"))
        }
        wanted = request.header("range") or ""
        row = (
            self._clock.wall(),
            request.method,
            request.target,
            wanted,
            answer.status,
            sent,
            answer.operation,
            headers,
        )
        stats.log.append(Row(*row))

    async def _send(self, writer: asyncio.StreamWriter, answer: Answer, length: int, sent: int) -> None:
        lines = [f"HTTP/1.1 {answer.status} {REASONS.get(answer.status, 'Status')}"]
        lines += [f"{name}: {value}" for name, value in answer.headers.items()]
        if answer.status not in (204, 304):
            lines.append(f"Content-Length: {length}")
        lines.append("x-amz-request-id: TIERCACHE\r\nServer: tiercache\r\n\r\n")
        head = "\r\n".join(lines).encode()
        if not sent or answer.file is None:
            writer.write(head + (answer.body if sent else b""))
            await writer.drain()
            return
        with answer.file.open("rb", buffering=0) as file:
            if sent <= SMALL_BYTES:
                body = os.pread(file.fileno(), sent, answer.start)
                writer.write(head + body)
                await writer.drain()
                done = len(body)
            else:
                writer.write(head)
                done = await asyncio.get_running_loop().sendfile(writer.transport, file, answer.start, sent)
        if done != sent:
            # The file shrank under us: only a broken connection tells the reader that these are not all bytes.
            writer.transport.abort()
            raise ConnectionAbortedError

    def _control(self, request: Request) -> Answer:
        if request.path == "/__stats":
            facts: object = self.stats.facts()
        elif request.path == "/__log":
            facts = [{name: getattr(row, name) for name in Row.__slots__} for row in self.stats.log]
        else:
            raise Refusal(404, "NoSuchControl", "there are /__stats and /__log, both with ?clear=1")
        if request.query.get("clear"):
            self.stats.clear()
        return Answer(body=json.dumps(facts).encode(), headers={"Content-Type": "application/json"})


def main(arguments: list[str] | None = None) -> None:
    """Runs the server in the foreground; its first line of output is the endpoint."""
    parser = argparse.ArgumentParser(
        prog="python -m tiercache.testing.s3server", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("root", help="directory with one folder a bucket")
    parser.add_argument("--port", type=int, default=0, help="0: any free port")
    options = parser.parse_args(arguments)
    Path(options.root).mkdir(parents=True, exist_ok=True)
    server = S3Server(options.root, port=options.port)

    def say() -> None:
        sys.stdout.write(server.url + "\n")
        sys.stdout.flush()

    try:
        asyncio.run(server.serve(asyncio.Event(), say))
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
