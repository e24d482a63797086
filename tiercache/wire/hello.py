"""Hello: the first message on every connection, and what the owner answers."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, NamedTuple

from tiercache.errors import ProtocolError
from tiercache.wire.frames import MAGIC, VERSION, pack_json, unpack_json

if TYPE_CHECKING:
    from typing import Any

LINE, CHANNEL = "line", "channel"
"""Roles: the connection that may READ, and is told of loads and of what to forget; those that only ask."""
_TOKEN = re.compile("[0-9a-f]{32}")

_living: set[str] = set()
"""Tokens of the clients in this process that may look at an owner's memory."""
os.register_at_fork(after_in_child=_living.clear)


def lives(token: str) -> None:
    """This client may look at an owner's memory from now on."""
    _living.add(token)


def left(token: str) -> None:
    """It looks at none any more, nor writes there."""
    _living.discard(token)


class Hello(NamedTuple):
    """Who connects. `token` (32 hexadecimal digits) tells processes apart: all connections of one have the same.

    `again`: this process had connections before, to this owner or to the one before it, and by now writes nothing any
    more that it began then.

    `clients`: tokens of all clients in this process, so that an owner need not wait for others that it had; None where
    it does not say. `pack_hello` knows them.
    """

    token: str
    role: str
    pid: int = 0
    again: bool = False
    clients: frozenset[str] | None = None


def pack_hello(hello: Hello) -> bytes:
    """Body of HELLO."""
    said = {**hello._asdict(), "clients": sorted(_living | {hello.token})}
    return pack_json({"magic": MAGIC.decode().strip(), "version": VERSION, **said})


def unpack_hello(body: memoryview) -> Hello:
    """Undoes pack_hello. Raises ProtocolError; where versions differ the message names both."""
    said = unpack_json(body)
    if not isinstance(said, dict) or said.get("magic") != MAGIC.decode().strip():
        raise ProtocolError("this is no greeting of tiercache")
    if said.get("version") != VERSION:
        raise ProtocolError(
            f"the owner of this directory speaks version {VERSION} of the protocol, this process "
            f"version {str(said.get('version'))[:20]}: use one release of tiercache for both, or share=False"
        )
    token, role, pid = said.get("token"), said.get("role"), said.get("pid", 0)
    if not isinstance(token, str) or not _TOKEN.fullmatch(token) or role not in (LINE, CHANNEL):
        raise ProtocolError("a greeting without a token, or of no role")
    # Whoever brings the memory that a dead owner left has been here before.
    again = bool(said.get("again") or said.get("brings") is not None)
    clients = said.get("clients")
    named = frozenset(str(each) for each in clients) if isinstance(clients, list) else None
    return Hello(token, role, pid if isinstance(pid, int) else 0, again, named)


def pack_welcome(facts: dict[str, Any]) -> bytes:
    """The owner's answer: what it is, and with which settings."""
    return pack_json({"version": VERSION, **facts})
