"""Frames: what travels on a connection of the tcp transport, what says where and who, and proofs of it. No sockets."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import struct
import zlib
from enum import IntEnum
from typing import NamedTuple

from tiercache.errors import ProtocolError
from tiercache.transport import ADDRESS_BYTES_MAX

VERSION = 1
TICKET_BYTES = NONCE_BYTES = NAME_BYTES = 16
PROOF_BYTES = 32

HEAD = struct.Struct("<BBHIIQ")
"""Of every frame: op, outcome, zero, number of the batch, moves, bytes. The bytes of a READ are those it asks for; all
others follow, behind the moves."""
MOVE = struct.Struct("<QQQ")
"""Region, offset, length."""
HELLO = struct.Struct(f"<4sB3x{NAME_BYTES}s{NONCE_BYTES}s")
"""The dialler begins: its name, a nonce."""
CHALLENGE = struct.Struct(f"<{NONCE_BYTES}s{PROOF_BYTES}s")
"""The door's nonce, and its proof. The dialler's proof follows, and the welcome of a door that knows the dialler."""

_HELLO_MAGIC, _ADDRESS_MAGIC, _REGION_MAGIC = b"tcHI", b"tcTP", b"tcRG"
_ADDRESS = struct.Struct(f"<4sBBH{TICKET_BYTES}s")
_REGION = struct.Struct("<4sBB8sQQ")
_CHECK = struct.Struct("<I")
_MAC_BYTES = 16


class Op(IntEnum):
    """What a frame is."""

    READ = 0x52
    WRITE = 0x57
    NOTE = 0x4E
    ANSWER = 0x41


class Address(NamedTuple):
    """Where a transport listens, and what whoever dials must know."""

    host: str
    port: int
    ticket: bytes


class Exposed(NamedTuple):
    """What a descriptor says of a region at the other end."""

    region: int
    length: int
    writable: bool


def pack_address(address: Address) -> bytes:
    """The bytes of an address."""
    host = address.host.encode()
    body = _ADDRESS.pack(_ADDRESS_MAGIC, VERSION, len(host), address.port, address.ticket) + host
    return body + _CHECK.pack(zlib.crc32(body))


def parse_address(data: bytes) -> Address:
    """What these bytes say. Raises ProtocolError where they are no whole address of this version."""
    end = len(data) - _CHECK.size
    if not _ADDRESS.size < end <= ADDRESS_BYTES_MAX:
        raise ProtocolError(f"{len(data)} bytes are no address of a tcp transport")
    magic, version, width, port, ticket = _ADDRESS.unpack_from(data)
    if magic != _ADDRESS_MAGIC or _CHECK.unpack_from(data, end)[0] != zlib.crc32(data[:end]):
        raise ProtocolError("no address of a tcp transport, or a damaged one")
    if version != VERSION:
        raise ProtocolError(f"the peer's tcp transport speaks version {version}, this one {VERSION}")
    host = data[_ADDRESS.size : end]
    try:
        if width != len(host) or not port:
            raise ValueError
        return Address(str(ipaddress.ip_address(host.decode("ascii"))), port, ticket)
    except ValueError as error:
        raise ProtocolError(f"{host!r} port {port} is no place to dial") from error


def name_of(ticket: bytes) -> bytes:
    """What a transport is called where its ticket must not be seen."""
    return hashlib.sha256(b"tiercache tcp name" + ticket).digest()[:NAME_BYTES]


def pack_region(ticket: bytes, exposed: Exposed) -> bytes:
    """The descriptor of a region of the transport with this ticket."""
    region, length, writable = exposed
    body = _REGION.pack(_REGION_MAGIC, VERSION, writable, name_of(ticket)[:8], region, length)
    return body + hmac.digest(ticket, body, "sha256")[:_MAC_BYTES]


def parse_region(ticket: bytes, descriptor: bytes) -> Exposed:
    """What the transport with this ticket exposed. Raises ProtocolError where it did not make this descriptor."""
    if len(descriptor) != _REGION.size + _MAC_BYTES:
        raise ProtocolError(f"{len(descriptor)} bytes are no descriptor of a tcp transport")
    body, mac = descriptor[: _REGION.size], descriptor[_REGION.size :]
    if not hmac.compare_digest(hmac.digest(ticket, body, "sha256")[:_MAC_BYTES], mac):
        raise ProtocolError("no descriptor of this peer's tcp transport, or a damaged one")
    _, _, writable, _, region, length = _REGION.unpack(body)
    return Exposed(region, length, bool(writable))


def pack_hello(name: bytes, nonce: bytes) -> bytes:
    """How the transport of this name begins a connection."""
    return HELLO.pack(_HELLO_MAGIC, VERSION, name, nonce)


def parse_hello(hello: bytes) -> bytes:
    """Who dials. Raises ProtocolError for what is no hello."""
    magic, version, name, _ = HELLO.unpack(hello)
    if magic != _HELLO_MAGIC:
        raise ProtocolError("a connection that does not begin as one of a tcp transport does")
    if version != VERSION:
        raise ProtocolError(f"a dialler speaks version {version}, this door {VERSION}")
    answer: bytes = name
    return answer


def door_proof(ticket: bytes, hello: bytes, nonce: bytes) -> bytes:
    """What only the door with this ticket, or who knows it, can say to this hello."""
    return hmac.digest(ticket, b"door" + hello + nonce, "sha256")


def dial_proof(door: bytes, dialler: bytes, hello: bytes, nonce: bytes) -> bytes:
    """What only who knows both tickets can say to this challenge."""
    return hmac.digest(door + dialler, b"dial" + hello + nonce, "sha256")


def welcome_proof(door: bytes, dialler: bytes, hello: bytes, nonce: bytes) -> bytes:
    """What the door says once it knows the dialler."""
    return hmac.digest(door + dialler, b"welcome" + hello + nonce, "sha256")


def same(one: bytes, other: bytes) -> bool:
    """Whether two proofs are equal, in a time that does not tell where they differ."""
    return hmac.compare_digest(one, other)
