"""Tcp: the transport over plain sockets. It needs nothing installed, and reaches wherever a connection does.

Each end dials the other: what one asks for and its answers travel on connections that it made itself. Whoever dials
proves that it knows both ends' tickets, so only peers that were `connect`ed to from here are served. What moves is
neither encrypted nor signed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tiercache.net import Usable
from tiercache.net.tcp.transport import TcpTransport

if TYPE_CHECKING:
    from collections.abc import Callable


def usable() -> Usable:
    """It works wherever there are sockets."""
    return Usable(True, "plain sockets")


def open_transport(host: str, notified: Callable[[bytes], None]) -> TcpTransport:
    """A transport that listens at an address of this machine, on the running loop. Raises ConfigError where that is
    none."""
    return TcpTransport(host, notified)
