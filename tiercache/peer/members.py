"""Members: which other caches there are. A port, and the one that has a list."""

from __future__ import annotations

from ipaddress import ip_address
from typing import TYPE_CHECKING, NamedTuple, Protocol

from tiercache.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PEERS_MAX = 64


class Member(NamedTuple):
    """Where a peer listens."""

    host: str
    port: int

    @property
    def loopback(self) -> bool:
        """Whether only this machine can be there."""
        try:
            return self.host == "localhost" or ip_address(self.host).is_loopback
        except ValueError:
            return False

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Membership(Protocol):
    """Who belongs to the pool."""

    def members(self) -> Sequence[Member]:
        """All of them as of now; this cache itself may be among them."""
        ...

    def watch(self, changed: Callable[[], None]) -> None:
        """`changed` is called on the loop whenever `members` has another answer."""
        ...


class Listed:
    """Peers that were listed once and for all."""

    def __init__(self, members: Sequence[Member]) -> None:
        self._members = tuple(members)

    def members(self) -> Sequence[Member]:
        """The list."""
        return self._members

    def watch(self, changed: Callable[[], None]) -> None:
        """It never changes."""


def parse_members(text: str) -> list[Member]:
    """Peers as the setting has them: host:port with commas between; [::1]:7000 for an address of IPv6."""
    found = [parse_member(one.strip(), "peers") for one in text.split(",") if one.strip()]
    if len(found) > PEERS_MAX:
        raise ConfigError(f"peers names {len(found)} caches, at most {PEERS_MAX} are possible")
    for one in found:
        if not one.port:
            raise ConfigError(f"peers must name the port that {one.host} listens at, which is never 0")
    return found


def parse_member(text: str, setting: str) -> Member:
    """One host:port."""
    host, _, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    named = bool(host) and (":" in host) == bracketed and not any(one in host for one in "[]/ ")
    if not named or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ConfigError(f"{setting} must name host:port, such as 10.0.0.1:7650 or [fd00::1]:7650, not {text!r}")
    return Member(host, int(port))
