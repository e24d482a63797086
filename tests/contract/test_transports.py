"""Every transport keeps the contract of its port."""

from __future__ import annotations

from tiercache.testing.transports import TransportProcessTests, TransportTests


class TestTcp(TransportTests):
    """Plain sockets."""

    name = "tcp"


class TestTcpProcesses(TransportProcessTests):
    """The other end is killed, and hangs."""

    name = "tcp"
