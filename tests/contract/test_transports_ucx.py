"""UCX keeps the contract of the transports' port, over all that it can negotiate between processes of one machine."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, ClassVar

from tiercache.net import ucx
from tiercache.net.ucx import finding, options
from tiercache.net.ucx.transport import UcxTransport
from tiercache.testing.transports import Ear, PeerProcess, TransportProcessTests, TransportTests
from tiercache.testing.transports.deaths import meet

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from tiercache.transport import Link, Transport

CANNOT = {"withdrawn": "what was withdrawn may still be read over UCX: nobody looks at the other end"}


class TestUcx(TransportTests):
    """As it ships: cma on one machine, where the library has it."""

    name = "ucx"
    cannot: ClassVar[dict[str, str]] = CANNOT


class TestUcxProcesses(TransportProcessTests):
    """The other end is killed."""

    name = "ucx"
    cannot: ClassVar[dict[str, str]] = CANNOT | {"stopped": "cma reads the memory of a process that stands still"}


def over_tcp(notified: Callable[[bytes], None]) -> UcxTransport:
    """A transport that has no other way than TCP."""
    taken = finding.find().taken
    assert taken is not None
    library = ucx.load(taken.path)
    chosen = options.options(library.version, options.interface_of("127.0.0.1")) | {"TLS": "tcp"}
    return UcxTransport(library, chosen, notified)


class TestUcxOverTcp(TransportTests):
    """As between machines without RDMA."""

    name = "ucx"
    cannot: ClassVar[dict[str, str]] = CANNOT

    def open_one(self, notified: Callable[[bytes], None]) -> UcxTransport:
        """See TransportTests."""
        return over_tcp(notified)


class TestUcxOverTcpProcesses(TransportProcessTests):
    """The other end is killed, and hangs."""

    name = "ucx"
    cannot: ClassVar[dict[str, str]] = CANNOT

    @asynccontextmanager
    async def met(self) -> AsyncIterator[tuple[Transport, Link, PeerProcess]]:
        """See TransportProcessTests."""
        here = over_tcp(Ear())
        peer = await PeerProcess.start(self.name, self.host)
        try:
            link = await meet(here, peer)
            assert link.negotiated == "tcp"
            yield here, link, peer
        finally:
            await peer.kill()
            await here.close()
