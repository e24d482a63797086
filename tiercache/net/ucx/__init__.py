"""UCX: one-sided moves over whatever two machines share, RDMA before TCP, through a libucp that is there.

finding.py says which libucp, options.py how it is set up, binding.py calls it, worker.py is the one thread that does,
words.py is what the ends tell each other, link.py and transport.py are the port.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from tiercache.errors import UnavailableError
from tiercache.net import Usable
from tiercache.net.ucx import binding, finding, options
from tiercache.net.ucx.transport import UcxTransport
from tiercache.settings import ucx_library

if TYPE_CHECKING:
    from collections.abc import Callable


def usable() -> Usable:
    """See net."""
    choice = finding.find(ucx_library())
    if choice.taken is None:
        return Usable(False, "; ".join(str(found) for found, _ in choice.others) or "no libucp")
    return Usable(True, str(choice.taken), bool(choice.taken.rdma and finding.rdma_devices()))


def open_transport(host: str, notified: Callable[[bytes], None]) -> UcxTransport:
    """See net."""
    choice = finding.find(ucx_library())
    if choice.taken is None:
        raise UnavailableError(f"UCX: {usable().why}")
    library = load(choice.taken.path)
    return UcxTransport(library, options.options(library.version, options.interface_of(host)), notified)


@cache
def load(path: str) -> binding.Library:
    """The libucp at this path. A library stays in the process."""
    return binding.load(path)
