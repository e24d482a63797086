"""Net: the transports between machines, behind the port of transport.py. One module or folder a transport, one line in
TRANSPORTS."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, NamedTuple

from tiercache.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable

    from tiercache.transport import Transport

TRANSPORTS = {
    "shm": "tiercache.net.shm",
    "nixl": "tiercache.net.nixl",
    "ucx": "tiercache.net.ucx",
    "tcp": "tiercache.net.tcp",
}
"""Names, the most wanted first, and the modules that have them: each has `usable` and `open_transport`, as here."""


class Usable(NamedTuple):
    """Whether a transport can work on this machine, and in words why, or with what."""

    usable: bool
    why: str
    rdma: bool = False
    """Whether it would take an RDMA device of this machine."""


def usable(name: str) -> Usable:
    """Whether the transport of this name works here. Never raises; may take a moment."""
    answer: Usable = importlib.import_module(TRANSPORTS[name]).usable()
    return answer


def choose(wanted: str) -> list[str]:
    """Transports to offer to peers, the most wanted first: the one that was asked for by name, else ("auto") all that
    work here, NIXL and UCX only with RDMA: over TCP plain sockets check more of what a peer says, and are no slower as
    a whole (ARCHITECTURE, "Where this differs"). Raises UnavailableError where the wanted one does not work."""
    if wanted != "auto":
        answer = usable(wanted)
        if not answer.usable:
            raise UnavailableError(f"peer_transport {wanted} does not work here: {answer.why}")
        return [wanted]
    from tiercache.net.ucx.finding import rdma_devices

    some = [name for name in TRANSPORTS if name not in ("nixl", "ucx") or rdma_devices()]  # nothing is loaded in vain
    return [name for name in some if usable(name).usable]


def open_transport(name: str, host: str, notified: Callable[[bytes], None]) -> Transport:
    """A transport that peers reach at the interface with the address `host`; `notified` hears their notes, on the
    running loop. Raises ConfigError or UnavailableError where it cannot work here."""
    made: Transport = importlib.import_module(TRANSPORTS[name]).open_transport(host, notified)
    return made
