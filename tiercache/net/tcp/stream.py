"""Stream: bytes between a blocking socket and spans of memory, without a copy in Python."""

from __future__ import annotations

import ctypes
import socket
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

Span = tuple[int, int]
"""Address and length of memory that the caller keeps alive."""

PIECES_MAX = 512
"""Spans in one call of the system; it takes up to 1,024."""
SCRATCH_BYTES = 256 << 10

_TIME = struct.Struct("ll")

# All of the address space: a slice of it is a view that keeps nothing alive, in a quarter of the time of Buffer.view.
_MEMORY = memoryview((ctypes.c_uint8 * (1 << 62)).from_address(0)).cast("B")


class Ended(ConnectionError):
    """The other end closed the connection."""


def joined(spans: Iterable[Span]) -> list[Span]:
    """The same memory in as few spans: neighbours become one, empty ones go."""
    answer: list[Span] = []
    start = end = 0
    for address, length in spans:
        if address == end:
            end += length
        elif length:
            if start != end:
                answer.append((start, end - start))
            start, end = address, address + length
    if start != end:
        answer.append((start, end - start))
    return answer


def views(spans: Iterable[Span]) -> list[memoryview]:
    """Views of these spans."""
    return [_MEMORY[address : address + length] for address, length in spans]


def skip(window: list[memoryview], count: int) -> None:
    """Drops the first `count` bytes."""
    whole = 0
    for view in window:
        if count < len(view):
            break
        count -= len(view)
        whole += 1
    del window[:whole]
    if count:
        window[0] = window[0][count:]


def wait_in_kernel(sock: socket.socket, seconds: float, option: int = socket.SO_RCVTIMEO) -> None:
    """The longest that the next calls of the system wait on this blocking socket, receiving or sending; 0: for ever."""
    whole = int(seconds)
    sock.setsockopt(socket.SOL_SOCKET, option, _TIME.pack(whole, int((seconds - whole) * 1e6)))


def take(sock: socket.socket, length: int) -> bytes:
    """Exactly so many bytes; for what is small. Raises Ended, also where some came."""
    data = sock.recv(length, socket.MSG_WAITALL)
    while len(data) < length:
        more = sock.recv(length - len(data), socket.MSG_WAITALL)
        if not more:
            raise Ended("the other end closed the connection")
        data += more
    return data


def fill(sock: socket.socket, spans: Iterable[Span]) -> None:
    """Brings the next bytes of the connection into these spans, in order. Raises Ended where they end before."""
    todo = joined(spans)
    for at in range(0, len(todo), PIECES_MAX):
        window = views(todo[at : at + PIECES_MAX])
        while window:
            if len(window) == 1:
                count = sock.recv_into(window[0], 0, socket.MSG_WAITALL)
            else:
                count = sock.recvmsg_into(window, 0, socket.MSG_WAITALL)[0]
            if not count:
                raise Ended("the other end closed the connection")
            skip(window, count)


def pour(sock: socket.socket, window: list[memoryview], spans: Iterable[Span]) -> None:
    """Sends these views, and the bytes of these spans behind them."""
    todo = joined(spans)
    at = 0
    while window or at < len(todo):
        if len(window) < PIECES_MAX // 2:
            window += views(todo[at : at + PIECES_MAX])
            at += PIECES_MAX
        skip(window, sock.sendmsg(window) if len(window) > 1 else sock.send(window[0]))


def drain(sock: socket.socket, length: int) -> None:
    """Drops the next bytes of the connection."""
    scratch = bytearray(min(length, SCRATCH_BYTES))
    while length:
        count = sock.recv_into(scratch, min(length, SCRATCH_BYTES), socket.MSG_WAITALL)
        if not count:
            raise Ended("the other end closed the connection")
        length -= count
