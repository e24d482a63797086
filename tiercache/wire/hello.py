"""Hello: the first message on every connection, and what the owner answers."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from tiercache.errors import ProtocolError
from tiercache.wire.frames import MAGIC, VERSION, pack_json, unpack_json

if TYPE_CHECKING:
    from typing import Any

LINE, CHANNEL = "line", "channel"
"""Roles: the connection that may READ, and is told of loads and of what to forget; those that only ask."""
_TOKEN = re.compile("[0-9a-f]{32}")


class Hello(NamedTuple):
    """Who connects. `token` (32 hexadecimal digits) tells processes apart: all connections of one have the same.

    `again`: this process had connections before, to this owner or to the one before it, and by now writes nothing any
    more that it began then.
    """

    token: str
    role: str
    pid: int = 0
    again: bool = False


def pack_hello(hello: Hello) -> bytes:
    """Body of HELLO."""
    return pack_json({"magic": MAGIC.decode().strip(), "version": VERSION, **hello._asdict()})


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
    return Hello(token, role, pid if isinstance(pid, int) else 0, again)


def pack_welcome(facts: dict[str, Any]) -> bytes:
    """The owner's answer: what it is, and with which settings."""
    return pack_json({"version": VERSION, **facts})
