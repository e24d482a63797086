"""NixlTransport: one process's end of all links over NIXL."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiercache.buffers import Buffer
from tiercache.clock import system_random
from tiercache.errors import ConfigError, ProtocolError, UnavailableError
from tiercache.net.nixl import words
from tiercache.net.nixl.agent import Agent
from tiercache.net.nixl.link import NixlLink
from tiercache.net.nixl.worker import Channel, Exposed, Worker
from tiercache.threads import in_thread
from tiercache.transport import LINKS_MAX, Memory

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_BOOT = Path("/proc/sys/kernel/random/boot_id")


class NixlTransport:
    """Peers reach one agent, which knows what is exposed; each link of ours has another one, which only asks."""

    name = "nixl"

    def __init__(
        self, bindings: Any, release: str, options: Mapping[str, str], notified: Callable[[bytes], None]
    ) -> None:
        """`release`: the version of NIXL."""
        self._bindings, self._options, self._notified = bindings, options, notified
        self._release, self._machine = words.digest(release), words.digest(_BOOT.read_text())
        self.token = system_random().randbytes(words.TOKEN_BYTES)
        self._beacon = Buffer.of(bytearray(self.token), writable=True)
        self._served: Agent | None = Agent(bindings, self.token.hex(), options, serves=True)
        self._address = words.pack_address(self._reached(self._served))
        self._worker = Worker(self._served, asyncio.get_running_loop(), self._heard)
        self._exposed: dict[bytes, tuple[int, Any]] = {}
        self._links: set[NixlLink] = set()
        self._known: Counter[bytes] = Counter()
        """Tokens of peers whose notes are heard."""
        self._connecting = self._serial = 0

    @property
    def address(self) -> bytes:
        """See the port."""
        return self._address

    def expose(self, memory: Buffer, *, writable: bool = False, kind: Memory = Memory.HOST, file: int = -1) -> bytes:
        """See the port."""
        del file
        served = self._open()
        self._serial += 1
        listed = None
        said = words.Descriptor(self.token, self._serial, memory.address, memory.length, writable, kind, b"")
        if memory.length:
            try:
                listed = served.register([(memory.address, memory.length, self._serial)], kind)
                said = said._replace(key=words.key_of(served.describe(listed), said))
            except UnavailableError as error:
                raise ConfigError(f"NIXL cannot expose {memory.length} bytes of {kind.name} memory: {error}") from error
        descriptor = words.pack_descriptor(said)
        self._exposed[descriptor] = self._serial, listed
        self._worker.exposed = self._worker.exposed | {self._serial: Exposed(memory, kind)}
        return descriptor

    def withdraw(self, descriptor: bytes) -> None:
        """See the port."""
        serial, listed = self._exposed.pop(descriptor, (0, None))
        if not serial or self._served is None:
            return
        self._worker.exposed = {each: found for each, found in self._worker.exposed.items() if each != serial}
        if listed is not None:
            self._served.deregister(listed)
        self._worker.submit(lambda: None)  # it lets go of it, too

    def registered(self, address: int, length: int) -> tuple[int, Exposed] | None:
        """What is exposed and holds all of this local memory, with its number."""
        for serial, found in self._worker.exposed.items():
            memory = found.memory
            if memory.address <= address and address + length <= memory.address + memory.length:
                return serial, found
        return None

    async def connect(self, address: bytes, deadline_s: float) -> NixlLink:
        """See the port."""
        peer = words.unpack_address(address)
        if peer.release != self._release:
            raise ProtocolError("NIXL is of another version there: they are not sure to understand each other")
        self._open()
        if len(self._links) + self._connecting >= LINKS_MAX:
            raise UnavailableError(f"NIXL: {LINKS_MAX} links are open")
        loop = asyncio.get_running_loop()
        until = loop.time() + deadline_s
        self._connecting += 1
        self._known[peer.token] += 1
        try:
            channel = Channel(*await in_thread(self._asking, peer), loop)
        except BaseException:
            self._forget(peer.token)
            raise
        finally:
            self._connecting -= 1
        link = NixlLink(self, self._worker, channel, peer, "cma" if peer.machine == self._machine else "rdma")
        self._links.add(link)
        try:
            self._open()
            self._worker.open(channel)
            await link.meet(until - loop.time())
        except BaseException:
            await link.close()
            raise
        return link

    def left(self, link: NixlLink, token: bytes) -> None:
        """A link has ended."""
        if link in self._links:
            self._links.discard(link)
            self._forget(token)

    async def close(self) -> None:
        """See the port."""
        if self._served is None:
            return
        self._served = None
        for link in list(self._links):
            with contextlib.suppress(UnavailableError):
                await link.close()
        self._worker.stop()
        self._exposed.clear()
        self._worker.exposed = {}

    def _reached(self, served: Agent) -> words.Address:
        """The address of the agent that peers reach. Its token is exposed before anything else."""
        base = self._beacon.address
        listed = served.register([(base, words.TOKEN_BYTES, 0)], Memory.HOST)
        token = words.Descriptor(self.token, 0, base, words.TOKEN_BYTES, False, Memory.HOST, b"")
        key = words.key_of(served.describe(listed), token)
        address = words.Address(self._release, self.token, self._machine, base, b"", key)
        return address._replace(worker=words.worker_of(served.address, address))

    def _open(self) -> Agent:
        if self._served is None:
            raise UnavailableError("NIXL: the transport is closed")
        return self._served

    def _forget(self, token: bytes) -> None:
        self._known[token] -= 1
        if not self._known[token]:
            del self._known[token]

    def _heard(self, note: bytes) -> None:
        if note[: words.TOKEN_BYTES] in self._known:
            self._notified(note[words.TOKEN_BYTES :])

    def _asking(self, peer: words.Address) -> tuple[Agent, str]:
        """A new agent that knows the peer's, and the name of that."""
        name = system_random().randbytes(words.TOKEN_BYTES).hex()
        agent = Agent(self._bindings, name, self._options, serves=False)
        there = agent.load(words.reached(peer))
        if there != peer.token.hex():
            raise ProtocolError("a NIXL address that names two agents")
        return agent, there
