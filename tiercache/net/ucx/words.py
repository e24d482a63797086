"""Words: what one end tells the other, packed: addresses, descriptors, and the headers of messages.

UCX walks what it is given without looking whether it is whole; so it is wrapped here, and looked at first.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import xxhash

from tiercache.errors import ProtocolError
from tiercache.transport import ADDRESS_BYTES_MAX, DESCRIPTOR_BYTES_MAX

TOKEN_BYTES = 16
HELLO, WELCOME, NOTE, QUESTION, ANSWER = 1, 2, 3, 4, 5

_ADDRESS = struct.Struct(f"<4sBBB{TOKEN_BYTES}sH")
_DESCRIPTOR = struct.Struct(f"<4sBBB{TOKEN_BYTES}sQQQBH")
_MESSAGE = struct.Struct(f"<B{TOKEN_BYTES}sI{TOKEN_BYTES}s")
_DIGEST = struct.Struct("<Q")
_ADDRESS_MAGIC, _DESCRIPTOR_MAGIC = b"tcua", b"tcud"
_VERSION = 1
MESSAGE_BYTES = _MESSAGE.size


class Address(NamedTuple):
    """Where a transport is reached."""

    release: tuple[int, int]
    """Of its UCX: no other one is sure to understand it."""
    token: bytes
    """What its process is known by: whoever took over its port later has another one."""
    worker: bytes


class Descriptor(NamedTuple):
    """Memory that a transport exposes."""

    release: tuple[int, int]
    token: bytes
    serial: int
    base: int
    length: int
    writable: bool
    key: bytes


def pack_address(address: Address) -> bytes:
    """The bytes of an address."""
    head = _ADDRESS.pack(_ADDRESS_MAGIC, _VERSION, *address.release, address.token, len(address.worker))
    return _sealed(head + address.worker)


def unpack_address(data: bytes) -> Address:
    """The address in these bytes. Raises ProtocolError where there is none."""
    body = _opened(data, _ADDRESS.size, ADDRESS_BYTES_MAX, "address")
    magic, version, major, minor, token, length = _ADDRESS.unpack_from(body)
    worker = body[_ADDRESS.size :]
    if magic != _ADDRESS_MAGIC or version != _VERSION:
        raise ProtocolError(f"no UCX address of version {_VERSION}: {body[:5]!r}")
    if length != len(worker) or not length:
        raise ProtocolError(f"a UCX address of {length} bytes in {len(worker)}")
    return Address((major, minor), token, worker)


def pack_descriptor(descriptor: Descriptor) -> bytes:
    """The bytes of a descriptor."""
    _, token, serial, base, length, writable, key = descriptor
    head = (_DESCRIPTOR_MAGIC, _VERSION, *descriptor.release, token, serial, base, length, writable, len(key))
    return _sealed(_DESCRIPTOR.pack(*head) + key)


def unpack_descriptor(data: bytes) -> Descriptor:
    """The descriptor in these bytes. Raises ProtocolError where there is none."""
    body = _opened(data, _DESCRIPTOR.size, DESCRIPTOR_BYTES_MAX, "descriptor")
    magic, version, major, minor, token, serial, base, length, writable, size = _DESCRIPTOR.unpack_from(body)
    key = body[_DESCRIPTOR.size :]
    if magic != _DESCRIPTOR_MAGIC or version != _VERSION:
        raise ProtocolError(f"no UCX descriptor of version {_VERSION}: {body[:5]!r}")
    if size != len(key) or base + length > 1 << 63 or writable > 1:
        raise ProtocolError("a UCX descriptor that contradicts itself")
    if length and not whole_key(key):
        raise ProtocolError("a UCX descriptor whose key is cut off")
    return Descriptor((major, minor), token, serial, base, length, bool(writable), key)


def whole_key(key: bytes) -> bool:
    """Whether a packed ucp_rkey ends where it says: a map of memory domains, a memory type, and so many keys, each
    behind its length; what newer versions put behind them is theirs."""
    if len(key) < 9:
        return False
    at = 9
    for _ in range(int.from_bytes(key[:8], "little").bit_count()):
        if at >= len(key):
            return False
        at += 1 + key[at]
    return at <= len(key)


def pack_message(kind: int, token: bytes, number: int, sender: bytes) -> bytes:
    """The header of a message: what it is, the token of who is meant, the number of a connection, who sends it."""
    return _MESSAGE.pack(kind, token, number, sender)


def unpack_message(header: bytes) -> tuple[int, bytes, int, bytes]:
    """What `pack_message` was given."""
    kind, token, number, sender = _MESSAGE.unpack(header)
    return kind, token, number, sender


def _sealed(body: bytes) -> bytes:
    return body + _DIGEST.pack(xxhash.xxh3_64_intdigest(body))


def _opened(data: bytes, least: int, most: int, what: str) -> bytes:
    if not least + _DIGEST.size <= len(data) <= most:
        raise ProtocolError(f"no UCX {what}: {len(data)} bytes")
    body = data[: -_DIGEST.size]
    if _DIGEST.pack(xxhash.xxh3_64_intdigest(body)) != data[-_DIGEST.size :]:
        raise ProtocolError(f"a damaged UCX {what}")
    return body
