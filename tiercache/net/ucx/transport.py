"""UcxTransport: one process's end of all links over UCX."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from tiercache.clock import system_random
from tiercache.errors import ConfigError, ProtocolError, UnavailableError
from tiercache.net.ucx import words
from tiercache.net.ucx.link import UcxLink
from tiercache.net.ucx.serving import Exposed
from tiercache.net.ucx.worker import Worker
from tiercache.transport import LINKS_MAX, Memory

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tiercache.buffers import Buffer
    from tiercache.net.ucx.binding import Library


class UcxTransport:
    """Memory is registered with UCX once, when it is exposed; peers then move bytes without asking. Over TCP the thread
    of the worker does their work."""

    name = "ucx"

    def __init__(self, library: Library, options: Mapping[str, str], notified: Callable[[bytes], None]) -> None:
        self._release = library.version[:2]
        self._token = system_random().randbytes(words.TOKEN_BYTES)
        self._worker = Worker(library, options, asyncio.get_running_loop(), notified, self._token)
        self._address = words.pack_address(words.Address(self._release, self._token, self._worker.address))
        self._exposed: dict[bytes, int] = {}
        self._withdrawn: list[Buffer] = []
        self._links: set[UcxLink] = set()
        self._connecting = self._serial = 0
        self._closed = self._linked = False

    @property
    def address(self) -> bytes:
        """See the port."""
        return self._address

    def expose(self, memory: Buffer, *, writable: bool = False, kind: Memory = Memory.HOST, file: int = -1) -> bytes:
        """See the port."""
        del file
        if self._closed:
            raise UnavailableError("UCX: the transport is closed")
        handle, key = 0, b""
        if memory.length:
            try:
                handle, key = self._worker.map_memory(memory.address, memory.length, int(kind))
            except UnavailableError as error:
                raise ConfigError(f"UCX cannot expose {memory.length} bytes of {kind.name} memory: {error}") from error
        self._serial += 1
        facts = (self._release, self._token, self._serial, memory.address, memory.length, writable, key)
        descriptor = words.pack_descriptor(words.Descriptor(*facts))
        self._exposed[descriptor] = self._serial
        self._worker.exposed[self._serial] = Exposed(memory, kind, handle)
        return descriptor

    def withdraw(self, descriptor: bytes) -> None:
        """See the port. The memory's owner is held until the transport closes, once there was a link: over TCP a peer
        still has this process write there, also behind the end of the link, for UCX does not look where."""
        serial = self._exposed.pop(descriptor, 0)
        if not serial or self._closed:
            return
        found = self._worker.exposed.pop(serial)
        if found.handle:
            self._worker.unmap(found.handle)
        if self._linked:
            self._withdrawn.append(found.memory)

    def registered(self, address: int, length: int) -> tuple[int, Memory]:
        """The registration that holds all of this local memory, or 0; and what kind of memory it is."""
        for found in list(self._worker.exposed.values()):  # another thread may be exposing meanwhile
            if found.memory.address <= address and address + length <= found.memory.address + found.memory.length:
                return found.handle, found.kind
        return 0, Memory.HOST

    async def connect(self, address: bytes, deadline_s: float) -> UcxLink:
        """See the port."""
        peer = words.unpack_address(address)
        if peer.release != self._release:
            ours, theirs = (".".join(map(str, each)) for each in (self._release, peer.release))
            raise ProtocolError(f"UCX {ours} here and {theirs} there: they are not sure to understand each other")
        if self._closed:
            raise UnavailableError("UCX: the transport is closed")
        if len(self._links) + self._connecting >= LINKS_MAX:
            raise UnavailableError(f"UCX: {LINKS_MAX} links are open")
        self._connecting += 1
        endpoint = self._worker.connect(peer.worker, peer.token)
        try:
            names = await asyncio.wait_for(asyncio.shield(endpoint.opened), deadline_s)
        except BaseException as error:
            self._worker.end(endpoint)
            if isinstance(error, asyncio.TimeoutError):
                raise UnavailableError(f"UCX: nobody answered within {deadline_s} s") from error
            raise
        finally:
            self._connecting -= 1
        if self._closed:
            raise UnavailableError("UCX: the transport is closed")
        link = UcxLink(self, self._worker, endpoint, peer, names)
        self._links.add(link)
        self._linked = True
        return link

    def left(self, link: UcxLink) -> None:
        """A link has ended."""
        self._links.discard(link)

    async def close(self) -> None:
        """See the port."""
        self._closed = True
        await asyncio.gather(*[link.close() for link in self._links])
        await self._worker.stop()
        self._exposed.clear()
        self._worker.exposed.clear()
        self._withdrawn.clear()
