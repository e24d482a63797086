"""NIXL: one-sided moves over RDMA, or between processes of one machine, through the UCX that NIXL brings.

agent.py calls NIXL, worker.py is the one thread that moves, words.py is what the ends tell each other, link.py and
transport.py are the port. Each link has an agent of its own: a transfer cannot be stopped, but an agent can be ended,
and after that nothing more is written.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from tiercache.errors import ConfigError, UnavailableError
from tiercache.net import Usable
from tiercache.net.nixl import agent
from tiercache.net.nixl.transport import NixlTransport
from tiercache.net.ucx.finding import rdma_devices
from tiercache.net.ucx.options import interface_of

if TYPE_CHECKING:
    from collections.abc import Callable

PACKAGES = ("nixl_cu13", "nixl_cu12")


def usable() -> Usable:
    """See net."""
    package = _package()
    if not package:
        return Usable(False, f"neither {' nor '.join(PACKAGES)} is installed")
    try:
        agent.load(package)
    except UnavailableError as error:
        return Usable(False, str(error))
    devices = rdma_devices()
    reach = f"RDMA: {', '.join(devices)}" if devices else "no RDMA here: between processes of one machine only"
    return Usable(True, f"NIXL {_release(package)} with its UCX backend ({reach})", bool(devices))


def open_transport(host: str, notified: Callable[[bytes], None]) -> NixlTransport:
    """See net."""
    package = _package()
    if not package:
        raise UnavailableError(f"NIXL: {usable().why}")
    devices = rdma_devices()
    try:
        options = agent.options(devices, "" if devices else interface_of(host))
    except OSError as error:
        raise ConfigError(f"no network interface of this machine has the address {host}: {error}") from error
    return NixlTransport(agent.load(package), _release(package), options, notified)


def _package() -> str:
    return next(filter(agent.there, PACKAGES), "")


def _release(package: str) -> str:
    """Version of the wheel; it may lie there without its metadata, for that demands PyTorch."""
    try:
        return version(package.replace("_", "-"))
    except PackageNotFoundError:
        return "of an unknown version"
