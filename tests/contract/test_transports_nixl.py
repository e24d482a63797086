"""NIXL keeps the contract of the transports' port, as far as it goes without RDMA: between processes of one machine."""

from __future__ import annotations

from typing import ClassVar

from tiercache.testing.transports import TransportProcessTests, TransportTests

CANNOT = {
    "withdrawn": "what was withdrawn may still be read over NIXL: nobody looks at the other end",
    "stopped": "cma reads the memory of a process that stands still",
}


class TestNixl(TransportTests):
    """Two transports of one process."""

    name = "nixl"
    cannot: ClassVar[dict[str, str]] = CANNOT


class TestNixlProcesses(TransportProcessTests):
    """The other end is killed."""

    name = "nixl"
    cannot: ClassVar[dict[str, str]] = CANNOT
