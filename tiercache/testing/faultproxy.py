"""A proxy in front of any HTTP/1.1 server that is slow, unreliable or lying in exactly the way one asks for.

In process: `with FaultProxy(server.url, Faults(delay_s=0.03, connection_bytes_s=100e6)) as proxy: proxy.url`. As a
program: `python -m tiercache.testing.faultproxy UPSTREAM_URL --port 9001`, then `GET /__fp?delay_s=0.03&p_reset=0.05`
sets what the query names and answers all settings and counters. Requests pass unchanged, Host included, so signatures
hold. Loopback only.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import socket
import struct
import sys
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self
from urllib.parse import urlsplit

from tiercache.clock import SystemClock, system_random
from tiercache.testing.httpwire import (
    BadRequest,
    Head,
    LoopThread,
    Request,
    body_of,
    parse_request,
    read_head,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

    from tiercache.clock import Clock

    Hook = Callable[[int, str], None]

LOG_ROWS_MAX = 100_000
PIECE_BYTES = 256 << 10
PACED_PIECE_BYTES = 32 << 10
UNKNOWN_BYTES = 1 << 62
OVERSLEPT_S_MAX = 0.005
"""Timers wake up late; up to this much of it is made good with the next bytes."""
SLEEP_S_MIN = 0.002
"""Being ahead of the bandwidth by less than this is not worth a timer; what is owed is not forgotten."""
FAULTS = {
    "throttle": "503 SlowDown, with Retry-After when `retry_after_s` is set",
    "error": "500 InternalError",
    "reset": "the connection is reset before an answer",
    "truncate": "half of the body, then the end of the connection",
    "stall": "half of the body, then silence for `stall_s`, then a reset",
    "mute": "no answer for `stall_s`, then a reset",
    "short_length": "half of the body, with a Content-Length that agrees",
    "long_length": "bytes that nobody asked for after the body, with a Content-Length that agrees",
    "wrong_range": "a Content-Range one byte further on",
    "wrong_etag": "another ETag than the object's",
    "ignore_range": "the whole object instead of the range (a server that checks signatures refuses it)",
    "corrupt": "one byte of the body changed (nothing but a digest can tell)",
}


@dataclass(slots=True)
class Faults:
    """What goes wrong: probabilities by name of fault, and `schedule` for the n-th request (first: 1) after a clear.

    `only` limits delays and faults to one method, `only_path` to targets that contain it; other requests pass and
    `schedule` does not count them. Bandwidths are bytes a second of answer bodies, 0 for unlimited.
    """

    delay_s: float = 0.0
    jitter_s: float = 0.0
    connection_bytes_s: float = 0.0
    total_bytes_s: float = 0.0
    retry_after_s: float = 0.0
    stall_s: float = 30.0
    only: str = ""
    only_path: str = ""
    probability: dict[str, float] = field(default_factory=dict)
    schedule: dict[int, str] = field(default_factory=dict)

    def set(self, name: str, value: str) -> None:
        """Sets one of them from text: a field, p_FAULT, or schedule=3:reset,5:stall. Raises ValueError when unknown."""
        if name == "schedule":
            pairs = (item.partition(":") for item in value.split(",") if item)
            self.schedule = {int(number): known(fault) for number, _, fault in pairs}
        elif name.startswith("p_"):
            self.probability[known(name[2:])] = float(value)
        elif name in ("only", "only_path"):
            setattr(self, name, value)
        elif name in {f.name for f in dataclasses.fields(self)} - {"probability"}:
            setattr(self, name, float(value))
        else:
            raise ValueError(f"no such setting: {name}")


@dataclass(slots=True)
class Passed:
    """One request as the log keeps it, from its start on; `sent` counts body bytes on their way to the client."""

    number: int
    wall_s: float
    method: str
    target: str
    range: str
    fault: str
    connection: int
    status: int = 0
    sent: int = 0


@dataclass(slots=True)
class ProxyStats:
    """Counters since the start or the last clear."""

    requests: int = 0
    bytes_sent: int = 0
    connections: int = 0
    by_method: Counter[str] = field(default_factory=Counter)
    by_fault: Counter[str] = field(default_factory=Counter)
    log: deque[Passed] = field(default_factory=lambda: deque(maxlen=LOG_ROWS_MAX))


def known(fault: str) -> str:
    """The name of a fault, or ValueError with all names."""
    if fault not in FAULTS:
        raise ValueError(f"no such fault: {fault} (there are {', '.join(FAULTS)})")
    return fault


class Pace:
    """A bandwidth: says how long to wait after so many bytes."""

    def __init__(self) -> None:
        self._free_at_s = -OVERSLEPT_S_MAX

    def owe(self, length: int, bytes_s: float, now_s: float) -> float:
        """Seconds to wait so that no more than `bytes_s` pass; unused time is not saved up."""
        if bytes_s <= 0:
            return 0.0
        self._free_at_s = max(self._free_at_s, now_s - OVERSLEPT_S_MAX) + length / bytes_s
        return self._free_at_s - now_s


class FaultProxy:
    """The proxy in a thread of its own; a context manager. `faults`, `on_request` and `on_body` may change at any time.

    `on_request(number, target)` is called before a request goes upstream, `on_body(number, target)` when half of the
    answer's body has left: there a test changes the object under a reader.
    """

    def __init__(
        self,
        upstream: str,
        faults: Faults | None = None,
        *,
        port: int = 0,
        clock: Clock | None = None,
        random: Random | None = None,
    ) -> None:
        parts = urlsplit(upstream)
        if parts.scheme != "http" or parts.hostname is None:
            raise ValueError(f"the upstream must be http://host:port, not {upstream}")
        self._upstream = (parts.hostname, parts.port or 80)
        self.faults = faults or Faults()
        self.stats = ProxyStats()
        self.port = port
        self.on_request: Hook | None = None
        self.on_body: Hook | None = None
        self._clock = clock or SystemClock()
        self._random = random or system_random()
        self._total = Pace()
        self._counted = 0
        self._thread = LoopThread(self.serve, "tiercache-faultproxy")

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
        """Stops. Idempotent."""
        self._thread.stop()

    def clear(self) -> None:
        """Counters and the schedule's count back to zero; settings stay."""
        self.stats = ProxyStats()
        self._counted = 0

    async def serve(self, stop: asyncio.Event, started: Callable[[], None]) -> None:
        """Serves on the running loop until `stop` is set."""
        tasks: set[asyncio.Task[None]] = set()

        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.get_running_loop().create_task(_Connection(self, reader, writer).run())
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        server = await asyncio.start_server(connected, "127.0.0.1", self.port, limit=PIECE_BYTES, backlog=1024)
        self.port = server.sockets[0].getsockname()[1]
        started()
        await stop.wait()
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def decide(self, method: str, target: str) -> tuple[float, str]:
        """(seconds of delay, fault or nothing) of the request that has just come."""
        faults = self.faults
        if (faults.only and method != faults.only) or faults.only_path not in target:
            return 0.0, ""
        self._counted += 1
        fault = faults.schedule.get(self._counted, "")
        for name, probability in faults.probability.items():
            if not fault and self._random.random() < probability:
                fault = name
        return max(0.0, faults.delay_s + faults.jitter_s * self._random.uniform(-1, 1)), fault

    async def pace(self, own: Pace, length: int) -> None:
        """Waits as both bandwidths demand after `length` bytes."""
        now_s = self._clock.monotonic()
        wait_s = own.owe(length, self.faults.connection_bytes_s, now_s)
        wait_s = max(wait_s, self._total.owe(length, self.faults.total_bytes_s, now_s))
        if wait_s > SLEEP_S_MIN:
            await asyncio.sleep(wait_s)

    def record(self, request: Request, fault: str, connection: int) -> Passed:
        """Counts a request; its row."""
        stats = self.stats
        stats.requests += 1
        stats.by_method[request.method] += 1
        if fault:
            stats.by_fault[fault] += 1
        wanted = request.header("range") or ""
        row = (self._clock.wall(), request.method, request.target, wanted, fault, connection)
        stats.log.append(Passed(stats.requests, *row))
        return stats.log[-1]

    def control(self, request: Request) -> bytes:
        """Sets what the query names; answers settings and counters, or the log, as JSON."""
        for name, value in request.query.items():
            if name == "clear":
                self.clear()
            elif name != "log":
                self.faults.set(name, value)
        if "log" in request.query:
            return json.dumps([{n: getattr(row, n) for n in Passed.__slots__} for row in self.stats.log]).encode()
        stats = self.stats
        counters = {"requests": stats.requests, "bytes_sent": stats.bytes_sent, "connections": stats.connections}
        by = {"by_method": dict(stats.by_method), "by_fault": dict(stats.by_fault)}
        return json.dumps({"faults": dataclasses.asdict(self.faults), "stats": counters | by}).encode()


class _Connection:
    """One client connection with its own upstream connection."""

    def __init__(self, proxy: FaultProxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._proxy = proxy
        self._reader = reader
        self._writer = writer
        self._up: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._pace = Pace()
        self._row = Passed(0, 0.0, "", "", "", "", 0)
        proxy.stats.connections += 1
        self._number = proxy.stats.connections

    async def run(self) -> None:
        """Exchanges until either side ends."""
        try:
            while (head := await read_head(self._reader)) is not None:
                request = parse_request(head, body_of(self._reader, head))
                exchange = self._control if request.path == "/__fp" else self._exchange
                if not await exchange(request):
                    break
        except (ConnectionError, BadRequest, asyncio.IncompleteReadError, TimeoutError):
            pass
        finally:
            self._writer.close()
            if self._up is not None:
                self._up[1].close()

    async def _control(self, request: Request) -> bool:
        try:
            status, body = "200 OK", self._proxy.control(request)
        except ValueError as error:
            status, body = "400 Bad Request", json.dumps({"error": str(error)}).encode()
        head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        self._writer.write(head.encode() + body)
        await self._writer.drain()
        return True

    async def _exchange(self, request: Request) -> bool:
        proxy = self._proxy
        delay_s, fault = proxy.decide(request.method, request.target)
        row = self._row = proxy.record(request, fault, self._number)
        if proxy.on_request is not None:
            await asyncio.get_running_loop().run_in_executor(None, proxy.on_request, row.number, row.target)
        if delay_s:
            await asyncio.sleep(delay_s)
        if fault in ("reset", "mute"):
            return await self._break(fault)
        if fault in ("throttle", "error"):
            return await self._refuse(request, 503 if fault == "throttle" else 500)
        answer = await self._forward(request, strip_range=fault == "ignore_range")
        row.status = int(answer.line.split(" ")[1])
        keep = await self._relay(answer, bodiless=request.method == "HEAD" or row.status in (204, 304))
        return keep and answer.headers.get("connection", "").lower() != "close"

    async def _break(self, fault: str) -> bool:
        if fault in ("mute", "stall"):
            await asyncio.sleep(self._proxy.faults.stall_s)
        # No lingering: the peer sees a reset and not an end.
        linger = struct.pack("ii", 1, 0)
        self._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self._writer.transport.abort()
        return False

    async def _refuse(self, request: Request, status: int) -> bool:
        self._row.status = status
        async for _ in request.body:
            pass
        code = "SlowDown" if status == 503 else "InternalError"
        body = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>injected</Message></Error>'
        lines = [f"HTTP/1.1 {status} {code}", "Content-Type: application/xml", f"Content-Length: {len(body)}"]
        if status == 503 and self._proxy.faults.retry_after_s:
            lines.append(f"Retry-After: {self._proxy.faults.retry_after_s:g}")
        head = "\r\n".join(lines) + "\r\n\r\n"
        self._writer.write((head + ("" if request.method == "HEAD" else body)).encode())
        await self._writer.drain()
        return True

    async def _forward(self, request: Request, *, strip_range: bool) -> Head:
        """Sends the request upstream; the head of its answer."""
        if self._up is None or self._up[1].is_closing():
            host, port = self._proxy._upstream
            self._up = await asyncio.open_connection(host, port, limit=PIECE_BYTES)
        reader, writer = self._up
        writer.write(without(request.head, "range") if strip_range else request.head.raw)
        await writer.drain()
        if (request.header("expect") or "").lower() == "100-continue":
            interim = await read_head(reader)
            if interim is None or " 100" not in interim.line:
                raise BadRequest("the upstream refused the body")
            self._writer.write(interim.raw)
        if request.head.is_chunked:
            await self._chunks(self._reader, writer, paced=False)
        else:
            async for piece in request.body:
                writer.write(piece)
                await writer.drain()
        answer = await read_head(reader)
        if answer is None:
            raise ConnectionResetError("the upstream ended the connection")
        return answer

    async def _relay(self, answer: Head, *, bodiless: bool) -> bool:
        """Passes an answer on with its fault; False when the connection must end."""
        assert self._up is not None
        reader, fault = self._up[0], self._row.fault
        length = 0 if bodiless else answer.content_length
        raw, body_end, extra = distort(answer, fault if length or fault == "wrong_etag" else "")
        self._writer.write(raw)
        if length is None and answer.is_chunked:
            await self._chunks(reader, self._writer, paced=True)
            return True
        if length is None:
            await self._pieces(reader, UNKNOWN_BYTES)
            return False
        stop = body_end if body_end is not None else length
        await self._pieces(reader, stop)
        if length and fault in ("truncate", "stall"):
            return await self._break(fault) if fault == "stall" else False
        self._writer.write(extra)
        await self._writer.drain()
        # Of a short answer the rest is still to come from upstream: that connection is spent.
        if stop < length:
            self._up[1].close()
            self._up = None
        return True

    async def _pieces(self, reader: asyncio.StreamReader, stop: int) -> None:
        """Passes `stop` bytes of a body on, or what there is."""
        proxy, row = self._proxy, self._row
        paced = proxy.faults.connection_bytes_s or proxy.faults.total_bytes_s
        step = PACED_PIECE_BYTES if paced else PIECE_BYTES
        half = stop // 2 if proxy.on_body is not None else -1
        while row.sent < stop:
            end = half if row.sent < half else stop
            piece = await reader.read(min(step, end - row.sent))
            if not piece:
                break
            if row.fault == "corrupt" and not row.sent:
                piece = bytes([piece[0] ^ 1]) + piece[1:]
            row.sent += len(piece)
            proxy.stats.bytes_sent += len(piece)
            self._writer.write(piece)
            await self._writer.drain()
            if paced:
                await proxy.pace(self._pace, len(piece))
            if row.sent == half and proxy.on_body is not None:
                await asyncio.get_running_loop().run_in_executor(None, proxy.on_body, row.number, row.target)

    async def _chunks(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, *, paced: bool) -> None:
        """Passes a chunked body on, frames and trailers included."""
        while True:
            line = await source.readline()
            target.write(line)
            length = int(line.split(b";")[0], 16)
            if not length:
                break
            chunk = await source.readexactly(length + 2)
            if paced:
                self._row.sent += length
                self._proxy.stats.bytes_sent += length
                await self._proxy.pace(self._pace, length)
            target.write(chunk)
            await target.drain()
        while True:
            line = await source.readline()
            target.write(line)
            if not line.strip():
                break
        await target.drain()


def distort(answer: Head, fault: str) -> tuple[bytes, int | None, bytes]:
    """(head to send, where the body must stop or None, bytes to add after it) of an answer with its fault."""
    length = answer.content_length or 0
    if fault in ("truncate", "stall"):
        return answer.raw, length // 2, b""
    if fault == "short_length":
        return replaced(answer, "content-length", str(length // 2)), length // 2, b""
    if fault == "long_length":
        return replaced(answer, "content-length", str(length + 1000)), None, b"?" * 1000
    if fault == "wrong_etag":
        return replaced(answer, "etag", '"another"'), None, b""
    if fault == "wrong_range" and "content-range" in answer.headers:
        span, _, size = answer.headers["content-range"].removeprefix("bytes ").partition("/")
        first, _, last = span.partition("-")
        return replaced(answer, "content-range", f"bytes {int(first) + 1}-{int(last) + 1}/{size}"), None, b""
    return answer.raw, None, b""


def replaced(head: Head, name: str, value: str) -> bytes:
    """The head as bytes with another value of one header."""
    return without(head, name)[:-2] + f"{name}: {value}\r\n\r\n".encode()


def without(head: Head, name: str) -> bytes:
    """The head as bytes with all headers of this name left out."""
    lines = head.raw[:-4].split(b"\r\n")
    kept = [line for line in lines if not line.lower().startswith(name.encode() + b":")]
    return b"\r\n".join(kept) + b"\r\n\r\n"


def main(arguments: list[str] | None = None) -> None:
    """Runs the proxy in the foreground; its first line of output is the endpoint."""
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m tiercache.testing.faultproxy", description=about)
    parser.add_argument("upstream", help="http://host:port")
    parser.add_argument("--port", type=int, default=0, help="0: any free port")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="as in GET /__fp?NAME=VALUE")
    options = parser.parse_args(arguments)
    faults = Faults()
    for item in options.set:
        name, _, value = item.partition("=")
        faults.set(name, value)
    proxy = FaultProxy(options.upstream, faults, port=options.port)

    def say() -> None:
        sys.stdout.write(proxy.url + "\n")
        sys.stdout.flush()

    try:
        asyncio.run(proxy.serve(asyncio.Event(), say))
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
