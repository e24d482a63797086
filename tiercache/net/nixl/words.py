"""Words: what one end tells the other, packed: addresses, descriptors, notes.

NIXL takes what it is given for what it should be, and ends the process where it is not. So only what is opaque travels
(where UCX is reached, and its keys), and what NIXL is given is built here.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import xxhash

from tiercache.errors import ProtocolError, UnavailableError
from tiercache.net.ucx.words import whole_key
from tiercache.transport import ADDRESS_BYTES_MAX, DESCRIPTOR_BYTES_MAX, Memory

TOKEN_BYTES = 16
_VERSION = 1
_ADDRESS_MAGIC, _DESCRIPTOR_MAGIC = b"tcna", b"tcnd"
_ADDRESS = struct.Struct(f"<4sBQ{TOKEN_BYTES}sQQHH")
_DESCRIPTOR = struct.Struct(f"<4sB{TOKEN_BYTES}sIQQBBH")
_DIGEST = struct.Struct("<Q")
_ROW = struct.Struct("<QQQ")
_WALKED_BYTES = 4096
"""Zeros behind what UCX walks without knowing its length."""


class Address(NamedTuple):
    """Where a transport is reached."""

    release: int
    """Digest of its NIXL's version: no other one is sure to understand it."""
    token: bytes
    """What it is known by. It lies in its memory, so who reads it there has reached the right one."""
    machine: int
    """Digest of what its machine is known by, since it was started."""
    beacon: int
    """Where the token lies."""
    worker: bytes
    key: bytes
    """Of the memory that the token lies in."""


class Descriptor(NamedTuple):
    """Memory that a transport exposes."""

    token: bytes
    serial: int
    base: int
    length: int
    writable: bool
    kind: Memory
    key: bytes


def pack_address(address: Address) -> bytes:
    """The bytes of an address."""
    *facts, worker, key = address
    return _sealed(_ADDRESS.pack(_ADDRESS_MAGIC, _VERSION, *facts, len(worker), len(key)) + worker + key)


def unpack_address(data: bytes) -> Address:
    """The address in these bytes. Raises ProtocolError where there is none."""
    body = _opened(data, _ADDRESS.size, ADDRESS_BYTES_MAX, "address")
    magic, version, release, token, machine, beacon, length, size = _ADDRESS.unpack_from(body)
    worker, key = body[_ADDRESS.size : _ADDRESS.size + length], body[_ADDRESS.size + length :]
    if magic != _ADDRESS_MAGIC or version != _VERSION:
        raise ProtocolError(f"no NIXL address of version {_VERSION}: {body[:5]!r}")
    if len(worker) != length or not length or len(key) != size or not whole_key(key) or beacon >= 1 << 63:
        raise ProtocolError("a NIXL address that contradicts itself")
    return Address(release, token, machine, beacon, worker, key)


def pack_descriptor(descriptor: Descriptor) -> bytes:
    """The bytes of a descriptor."""
    *facts, key = descriptor
    return _sealed(_DESCRIPTOR.pack(_DESCRIPTOR_MAGIC, _VERSION, *facts, len(key)) + key)


def unpack_descriptor(data: bytes) -> Descriptor:
    """The descriptor in these bytes. Raises ProtocolError where there is none."""
    body = _opened(data, _DESCRIPTOR.size, DESCRIPTOR_BYTES_MAX, "descriptor")
    magic, version, token, serial, base, length, writable, kind, size = _DESCRIPTOR.unpack_from(body)
    key = body[_DESCRIPTOR.size :]
    if magic != _DESCRIPTOR_MAGIC or version != _VERSION:
        raise ProtocolError(f"no NIXL descriptor of version {_VERSION}: {body[:5]!r}")
    if size != len(key) or base + length > 1 << 63 or writable > 1 or kind > max(Memory):
        raise ProtocolError("a NIXL descriptor that contradicts itself")
    if length and not whole_key(key):
        raise ProtocolError("a NIXL descriptor whose key is cut off")
    return Descriptor(token, serial, base, length, bool(writable), Memory(kind), key)


def described(descriptor: Descriptor) -> bytes:
    """What NIXL calls the metadata of this memory."""
    return _metadata(descriptor, b"")


def reached(address: Address) -> bytes:
    """What NIXL calls the metadata of the agent with this address."""
    return _metadata(_beacon(address), address.worker + bytes(_WALKED_BYTES))


def key_of(described: bytes, descriptor: Descriptor) -> bytes:
    """The key in what NIXL said of memory. Raises UnavailableError where it says that in a way that is not known."""
    row = _ROW.pack(descriptor.base, descriptor.length, descriptor.serial)
    key = described[described.rfind(row) + len(row) : -1]
    if described != _metadata(descriptor._replace(key=key), b""):
        raise UnavailableError("NIXL: this version describes memory in a way that is not known here")
    return key


def worker_of(reached: bytes, address: Address) -> bytes:
    """Where UCX is reached, in what NIXL said of an agent; otherwise as `key_of`."""
    head = _metadata(_beacon(address), b"\0").partition(_field(b"c", b"\0"))[0] + b"c"
    length = int.from_bytes(reached[len(head) : len(head) + 8], "little")
    worker = reached[len(head) + 8 : len(head) + 8 + length]
    if reached != _metadata(_beacon(address), worker):
        raise UnavailableError("NIXL: this version describes agents in a way that is not known here")
    return worker


def _beacon(address: Address) -> Descriptor:
    return Descriptor(address.token, 0, address.beacon, TOKEN_BYTES, False, Memory.HOST, address.key)


def _metadata(memory: Descriptor, worker: bytes) -> bytes:
    """One piece of memory of one agent, and how that is reached, as NIXL writes it down."""
    row = _ROW.pack(memory.base, memory.length, memory.serial)
    reached = _field(b"t", b"UCX") + _field(b"c", worker) if worker else b""
    fields = (
        _field(b"Agent", memory.token.hex().encode()),
        _field(b"Conns", _number(bool(worker))),
        reached,
        _field(b"", b"MemSection"),
        _field(b"nixlSecElms", _number(1)),
        _field(b"bknd", b"UCX"),
        _field(b"nixlDList", b"nixlSDList"),
        _field(b"t", _number(memory.kind, 4)),
        _field(b"n", _number(1)),
        _field(b"", row + memory.key),
    )
    return b"nixlSerDes|" + b"".join(fields)


def _field(tag: bytes, value: bytes) -> bytes:
    return tag + _number(len(value)) + value + b"|"


def _number(value: int, size_bytes: int = 8) -> bytes:
    return int(value).to_bytes(size_bytes, "little")


def digest(text: str) -> int:
    """What stands for a text here."""
    return xxhash.xxh3_64_intdigest(text.encode())


def _sealed(body: bytes) -> bytes:
    return body + _DIGEST.pack(xxhash.xxh3_64_intdigest(body))


def _opened(data: bytes, least: int, most: int, what: str) -> bytes:
    if not least + _DIGEST.size <= len(data) <= most:
        raise ProtocolError(f"no NIXL {what}: {len(data)} bytes")
    body = data[: -_DIGEST.size]
    if _DIGEST.pack(xxhash.xxh3_64_intdigest(body)) != data[-_DIGEST.size :]:
        raise ProtocolError(f"a damaged NIXL {what}")
    return body
