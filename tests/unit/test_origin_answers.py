"""What the object origin makes of answers that a careless or lying HTTP server gives, byte by byte."""

from __future__ import annotations

import asyncio
import socket
import threading
from contextlib import contextmanager

import pytest

from tiercache.buffers import Buffer
from tiercache.errors import ChangedError, OriginError, UnavailableError
from tiercache.model import Outcome
from tiercache.origin import Span, Stat
from tiercache.remote.opening import open_origin
from tiercache.remote.retry import Patience

BODY = b"0123456789"
MODIFIED = "Last-Modified: Fri, 20 Nov 2026 13:00:00 GMT"
MODIFIED_S = 1795179600.0
RANGE = "Content-Range: bytes 0-9/20"
LENGTH = "Content-Length: 10"
TAG = 'ETag: "abc"'
PATIENCE = Patience(deadline_s=5.0, attempts=2, pause_s=0.001, throttle_pause_s=0.001)


def answer(status: int, *headers: str, body: bytes = BODY) -> bytes:
    lines = [f"HTTP/1.1 {status} Some Reason", *headers, "Connection: close"]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


@contextmanager
def server(*answers: bytes):
    """Gives these answers, the last one again and again; the requests that came."""
    listener = socket.create_server(("127.0.0.1", 0))
    seen: list[bytes] = []
    left = list(answers)

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(5)
                head = b""
                while b"\r\n\r\n" not in head:
                    head += connection.recv(65536)
                seen.append(head)
                connection.sendall(left.pop(0) if len(left) > 1 else left[0])

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/x", seen
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(5)


def read(url: str, version: str = "abc", size: int = 20) -> bytes:
    async def run() -> bytes:
        origin = open_origin("http", patience=PATIENCE)
        target = bytearray(b"\xa5" * 10)
        try:
            stat = Stat(url, size, version, MODIFIED_S)
            await origin.read(stat, Span(0, 10), [Buffer.of(target, writable=True)])
        except BaseException:
            assert target == b"\xa5" * 10, "something was written before it was checked"
            raise
        finally:
            await origin.close()
        return bytes(target)

    return asyncio.run(run())


GOOD = answer(206, TAG, RANGE, LENGTH)


@pytest.mark.parametrize(
    ("version", "good"),
    [
        ("abc", GOOD),
        ("abc", answer(206, TAG, MODIFIED, RANGE, LENGTH)),
        ("abc", answer(206, MODIFIED, RANGE, LENGTH)),
        ("", answer(206, MODIFIED, RANGE, LENGTH)),
        ('W/"abc', answer(206, 'ETag: W/"abc"', MODIFIED, RANGE, LENGTH)),
    ],
    ids=["tag", "tag and time", "time in place of the tag", "time", "weak tag"],
)
def test_good_answers(version, good):
    with server(good) as (url, seen):
        assert read(url, version) == BODY
    asked = seen[0].lower()
    assert b"range: bytes=0-9" in asked
    assert (b'if-match: "abc"' in asked) == (version == "abc")


@pytest.mark.parametrize(
    "bad",
    [
        answer(206, 'ETag: "other"', RANGE, LENGTH),
        answer(206, TAG, "Content-Range: bytes 0-9/21", LENGTH),
        answer(206, RANGE, LENGTH),
        answer(206, "Last-Modified: Fri, 20 Nov 2026 13:00:01 GMT", RANGE, LENGTH),
        answer(412, "Content-Length: 0", body=b""),
        answer(404, "Content-Length: 0", body=b""),
    ],
    ids=["other tag", "other size", "no version", "other time", "412", "404"],
)
def test_another_version(bad):
    with server(bad) as (url, seen), pytest.raises(ChangedError):
        read(url)
    assert len(seen) == 1


LIES = {
    "whole object": answer(200, TAG, "Content-Length: 20", body=BODY * 2),
    "other range": answer(206, TAG, "Content-Range: bytes 5-14/20", LENGTH),
    "shorter range": answer(206, TAG, "Content-Range: bytes 0-4/20", "Content-Length: 5", body=BODY[:5]),
    "short body": answer(206, TAG, RANGE, "Content-Length: 5", body=BODY[:5]),
    "long body": answer(206, TAG, RANGE, "Content-Length: 20", body=BODY * 2),
    "cut body": answer(206, TAG, RANGE, LENGTH, body=BODY[:5]),
    "no range": answer(206, TAG, LENGTH),
    "no length": answer(206, TAG, RANGE),
    "416": answer(416, "Content-Length: 0", body=b""),
    "500": answer(500, "Content-Length: 0", body=b""),
    "408": answer(408, "Content-Length: 0", body=b""),
    "429": answer(429, "Content-Length: 0", body=b""),
    "nothing": b"",
    "no http": b"SSH-2.0-OpenSSH\r\n\r\n",
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_tried_again_and_then_told(lie):
    with server(LIES[lie], GOOD) as (url, seen):
        assert read(url) == BODY
        assert len(seen) == 2
    with server(LIES[lie]) as (url, seen), pytest.raises((OriginError, UnavailableError)):
        read(url)
    assert len(seen) == PATIENCE.attempts


@pytest.mark.parametrize("status", [400, 401, 403, 451])
def test_refusals_are_told_at_once(status):
    with server(answer(status, "Content-Length: 0", body=b"")) as (url, seen), pytest.raises(OriginError):
        read(url)
    assert len(seen) == 1


def test_a_server_without_suffix_ranges():
    """Asked for the last bytes it gives the first ones, or an error: facts, then a closed range."""
    head = answer(200, TAG, "Content-Length: 20", body=b"")
    tail = answer(206, TAG, "Content-Range: bytes 15-19/20", "Content-Length: 5", body=b"56789")
    for first in (
        answer(206, TAG, "Content-Range: bytes 0-5/20", "Content-Length: 6", body=BODY[:6]),
        answer(416, "Content-Length: 0", body=b""),
        answer(200, TAG, "Content-Length: 20", body=BODY * 2),
    ):
        with server(first, head, tail) as (url, seen):

            async def run(url=url):
                origin = open_origin("http", patience=PATIENCE)
                try:
                    return await origin.read_tail(url, 5)
                finally:
                    await origin.close()

            assert asyncio.run(run()) == (Stat(url, 20, "abc"), b"56789")
        assert b"range: bytes=15-19" in seen[2].lower()
        assert b'if-match: "abc"' in seen[2].lower()


def test_a_head_that_is_not_allowed_is_asked_in_another_way():
    with server(answer(405, "Content-Length: 0", body=b""), answer(404, "Content-Length: 0", body=b"")) as (url, seen):

        async def run():
            origin = open_origin("http", patience=PATIENCE)
            try:
                return await origin.stat([url])
            finally:
                await origin.close()

        assert asyncio.run(run()) == [Outcome.GONE]
    assert len(seen) >= 2
