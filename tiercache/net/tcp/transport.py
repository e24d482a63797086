"""TcpTransport: the door where peers dial in, and links to them."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import socket
import threading
from typing import TYPE_CHECKING

from tiercache.clock import system_random
from tiercache.errors import ConfigError, UnavailableError
from tiercache.net.tcp import frames
from tiercache.net.tcp.link import TcpLink
from tiercache.net.tcp.regions import Regions
from tiercache.net.tcp.served import STRANGER_S, Served
from tiercache.transport import LINKS_MAX, Memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from tiercache.buffers import Buffer

log = logging.getLogger(__name__)

STRANGERS_MAX = LINKS_MAX
"""Connections that have not proved yet who they are; another one takes the place of the oldest."""
BACKLOG = 2 * LINKS_MAX
ACCEPT_AGAIN_S = 0.5
"""After which the door opens again where the system had no descriptor or thread left."""


class TcpTransport:
    """One process's end of all tcp links: a listening socket, what it exposes, and whom it serves."""

    name = "tcp"

    def __init__(self, host: str, notified: Callable[[bytes], None]) -> None:
        """Listens at this address of this machine, at a port that the system picks. Raises ConfigError where it cannot.
        On the loop that it works for."""
        self._loop = asyncio.get_running_loop()
        self._notified = notified
        self._host = _host_address(host)
        self._listener = _listen(self._host)
        # Not of the generator that nonces come from: those are seen by strangers, who could tell the rest from them.
        self._ticket = system_random().randbytes(frames.TICKET_BYTES)
        self._nonce_key, self._nonces = system_random().randbytes(32), 0
        self._address = frames.Address(self._host, self._listener.getsockname()[1], self._ticket)
        self._name = frames.name_of(self._ticket)
        self._regions = Regions()
        self._peers_changed = threading.Condition()
        self._links: dict[bytes, list[TcpLink]] = {}
        self._served: dict[Served, None] = {}
        self._strangers: dict[Served, None] = {}
        self._closed = False
        self._loop.add_reader(self._listener, self._accept)

    @property
    def address(self) -> bytes:
        return frames.pack_address(self._address)

    def expose(self, memory: Buffer, *, writable: bool = False, kind: Memory = Memory.HOST, file: int = -1) -> bytes:
        if kind != Memory.HOST:
            raise ConfigError(f"plain sockets reach host memory only, not {kind.name}")
        if self._closed:
            raise ConfigError("the transport is closed")
        region = self._regions.add(memory, writable=writable)
        return frames.pack_region(self._ticket, frames.Exposed(region, memory.length, writable))

    def withdraw(self, descriptor: bytes) -> None:
        self._regions.remove(frames.parse_region(self._ticket, descriptor).region)

    async def connect(self, address: bytes, deadline_s: float) -> TcpLink:
        there = frames.parse_address(address)
        if self._closed:
            raise UnavailableError("the transport is closed")
        if sum([len(links) for links in self._links.values()]) >= LINKS_MAX:
            raise UnavailableError(f"{LINKS_MAX} links are open, which is the most")
        link = TcpLink(there, self._drop)
        with self._peers_changed:
            self._links.setdefault(link.name, []).append(link)
            self._peers_changed.notify_all()
        try:
            async with asyncio.timeout(deadline_s):
                await link.dial(self._host, self._ticket, self._nonce())
        except BaseException as error:
            await link.close()
            if isinstance(error, TimeoutError):
                raise UnavailableError(f"no answer from {there.host} port {there.port} in {deadline_s:g} s") from None
            if isinstance(error, OSError):
                raise UnavailableError(f"{there.host} port {there.port} cannot be reached: {error}") from error
            raise
        return link

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._listener)
            self._listener.close()
        for link in [link for links in self._links.values() for link in links]:
            await link.close()
        served = list(self._served)
        for each in served:
            each.cut("the transport closes")
        with self._peers_changed:
            self._peers_changed.notify_all()
        for each in served:
            await each.ended.wait()
        self._regions.clear()

    # -- the door ------------------------------------------------------------------------------------------------------

    def _nonce(self) -> bytes:
        self._nonces += 1
        return hmac.digest(self._nonce_key, self._nonces.to_bytes(8, "little"), "sha256")[: frames.NONCE_BYTES]

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:  # out of descriptors, say: the listener would be readable for ever
            self._rest(error)
            return
        sock.setblocking(True)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if len(self._strangers) >= STRANGERS_MAX:
            oldest = next(iter(self._strangers))
            self._cut_stranger(oldest)
        served = Served(sock, self._regions, self._admit, self._ticket, self._nonce())
        self._served[served] = self._strangers[served] = None
        try:
            served.start(self._gone)
        except RuntimeError as error:  # out of threads
            del self._served[served], self._strangers[served]
            sock.close()
            self._rest(error)

    def _rest(self, error: Exception) -> None:
        """Lets nobody in for a while."""
        log.debug("a tcp peer cannot be let in: %s", error)
        self._loop.remove_reader(self._listener)
        self._loop.call_later(ACCEPT_AGAIN_S, self._listen_again)

    def _listen_again(self) -> None:
        if not self._closed:
            self._loop.add_reader(self._listener, self._accept)

    def _cut_stranger(self, stranger: Served) -> None:
        with self._peers_changed:
            self._strangers.pop(stranger, None)
            stranger.cut("too many connections that prove nothing")
            self._peers_changed.notify_all()

    def _gone(self, served: Served) -> None:
        self._served.pop(served, None)
        with self._peers_changed:
            self._strangers.pop(served, None)
            for links in self._links.values():
                for link in links:
                    link.served.discard(served)
            self._peers_changed.notify_all()

    def _admit(self, served: Served, name: bytes) -> bytes | None:
        """In the thread of a connection that says it comes from this peer: waits until this end connected to that."""
        with self._peers_changed:
            self._peers_changed.wait_for(lambda: served.over or self._living(name), STRANGER_S)
            link = self._living(name)
            if served.over or link is None:
                return None
            # It is the link's from here on, so that its close ends it also in the middle of the proof.
            link.served.add(served)
            served.notified = self._notified
            self._strangers.pop(served, None)
            return link.there.ticket

    def _living(self, name: bytes) -> TcpLink | None:
        """The newest link to the peer of this name that can serve one more connection."""
        for link in reversed(self._links.get(name, [])):
            if link.admits:
                return link
        return None

    def _drop(self, link: TcpLink) -> list[Served]:
        """Forgets a link that closes, and cuts the connections of its peer, which are the answer."""
        with self._peers_changed:
            links = self._links.get(link.name, [])
            if link in links:
                links.remove(link)
            if not links:
                self._links.pop(link.name, None)
            served = list(link.served)
            for each in served:
                each.cut("the link was closed")
            self._peers_changed.notify_all()
        return served


def _host_address(host: str) -> str:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0]
        address = ipaddress.ip_address(str(found))
    except (OSError, ValueError, IndexError) as error:
        raise ConfigError(f"{host!r} is no address of an interface: {error}") from error
    if address.is_unspecified:
        raise ConfigError(f"{host!r} stands for every interface: name the address that peers reach this machine at")
    return str(address)


def _listen(host: str) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.bind((host, 0))
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"nobody can listen at {host}, is it an address of this machine? ({error.strerror})"
        ) from error
    return sock
