"""Every transport keeps the contract of its port."""

from __future__ import annotations

from typing import ClassVar

from tiercache.testing.transports import TransportProcessTests, TransportTests


class TestTcp(TransportTests):
    """Plain sockets."""

    name = "tcp"


class TestTcpProcesses(TransportProcessTests):
    """The other end is killed, and hangs."""

    name = "tcp"


class TestShm(TransportTests):
    """Shared memory files."""

    name = "shm"
    cannot: ClassVar[dict[str, str]] = {
        "withdrawn": "who mapped a region finds what lies there until it hears that it was withdrawn",
    }


class TestShmProcesses(TransportProcessTests):
    """The other end is killed, and hangs."""

    name = "shm"
