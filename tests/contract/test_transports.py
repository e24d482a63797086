"""Every transport keeps the contract of its port."""

from __future__ import annotations

from tiercache.testing.transports import TransportTests


class TestTcp(TransportTests):
    """Plain sockets."""

    name = "tcp"
