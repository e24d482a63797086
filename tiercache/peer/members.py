"""Members: which other caches there are. A port, and the one that has a list."""

from __future__ import annotations

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
        return self.host in ("localhost", "::1") or self.host.startswith("127.")

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
    return found


def parse_member(text: str, setting: str) -> Member:
    """One host:port."""
    host, _, port = text.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"{setting} must name host:port, such as 10.0.0.1:7650, not {text!r}")
    return Member(host, int(port))
