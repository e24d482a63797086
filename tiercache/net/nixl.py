"""NIXL: not a transport of this version. What its wheel brings is used all the same: a UCX with verbs, mlx5 and EFA,
which the ucx transport takes where this machine has RDMA."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from tiercache.errors import UnavailableError
from tiercache.net import Usable

if TYPE_CHECKING:
    from collections.abc import Callable

    from tiercache.transport import Transport

PACKAGES = ("nixl_cu13", "nixl_cu12")


def usable() -> Usable:
    """See net."""
    there = [name for name in PACKAGES if find_spec(name) is not None]
    if there:
        return Usable(False, f"{there[0]} is installed; of it this version uses the UCX inside only")
    return Usable(False, f"neither {PACKAGES[0]} nor {PACKAGES[1]} is installed")


def open_transport(host: str, notified: Callable[[bytes], None]) -> Transport:
    """See net."""
    del host, notified
    raise UnavailableError(f"NIXL: {usable().why}")
