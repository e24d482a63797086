"""Words: what one end tells the other, packed: addresses, descriptors, notes.

NIXL takes what it is given for what it should be; so that is wrapped here, and looked at first.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import xxhash

from tiercache.errors import ProtocolError
from tiercache.transport import ADDRESS_BYTES_MAX, DESCRIPTOR_BYTES_MAX, Memory

TOKEN_BYTES = 16
_VERSION = 1
_ADDRESS_MAGIC, _DESCRIPTOR_MAGIC = b"tcna", b"tcnd"
_ADDRESS = struct.Struct(f"<4sBQ{TOKEN_BYTES}sQQH")
_DESCRIPTOR = struct.Struct(f"<4sB{TOKEN_BYTES}sIQQBBH")
_DIGEST = struct.Struct("<Q")


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
    agent: bytes


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
    release, token, machine, beacon, agent = address
    return _sealed(_ADDRESS.pack(_ADDRESS_MAGIC, _VERSION, release, token, machine, beacon, len(agent)) + agent)


def unpack_address(data: bytes) -> Address:
    """The address in these bytes. Raises ProtocolError where there is none."""
    body = _opened(data, _ADDRESS.size, ADDRESS_BYTES_MAX, "address")
    magic, version, release, token, machine, beacon, length = _ADDRESS.unpack_from(body)
    agent = body[_ADDRESS.size :]
    if magic != _ADDRESS_MAGIC or version != _VERSION:
        raise ProtocolError(f"no NIXL address of version {_VERSION}: {body[:5]!r}")
    if length != len(agent) or not length or beacon >= 1 << 63:
        raise ProtocolError("a NIXL address that contradicts itself")
    return Address(release, token, machine, beacon, agent)


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
    if size != len(key) or base + length > 1 << 63 or writable > 1 or kind > max(Memory) or bool(length) != bool(key):
        raise ProtocolError("a NIXL descriptor that contradicts itself")
    return Descriptor(token, serial, base, length, bool(writable), Memory(kind), key)


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
