"""Agent: NIXL's own agent, as far as it is used here. Every call may be made from any thread, and leaves the
interpreter to others meanwhile."""

from __future__ import annotations

import importlib
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from tiercache.errors import UnavailableError
from tiercache.net.ucx.binding import HOOKS, QUIET, Environment
from tiercache.transport import Memory

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

BACKEND = "UCX"
WAKE_US = 100_000
"""The thread of a serving agent sleeps until something comes, and looks after so long all the same."""
_SILENT = {"NIXL_LOG_LEVEL": "FATAL"} | {f"UCX_{name}": value for name, value in (QUIET | HOOKS).items()}

Row = tuple[int, int, int]
"""Where memory lies: address, length, and the number that it was registered under."""


def there(package: str) -> bool:
    """Whether this package is installed; it is not imported for that."""
    return find_spec(package) is not None


@cache
def load(package: str) -> Any:
    """NIXL's bindings, with the UCX inside loaded. Raises UnavailableError where they do not work here."""
    try:
        with Environment(_SILENT):
            bindings = importlib.import_module(f"{package}._bindings")
            asking = bindings.nixlAgent("asking", bindings.nixlAgentConfig())
            asking.getPluginParams(BACKEND)
    except Exception as error:
        raise UnavailableError(f"{package} is installed and does not work: {type(error).__name__} {error}") from error
    return bindings


def options(devices: Sequence[str], interface: str) -> dict[str, str]:
    """How the UCX backend is set up: peers come over these RDMA devices, or to this network interface.

    Emulated moves are off. NIXL's reads over TCP are such, and a process that was asked, stood still, and goes on when
    the asker is gone is ended by them. Connecting never blocks (CONN_NB)."""
    config = ["PROTO_EMULATION_ENABLE=n", "TCP_CONN_NB=y"]
    if not devices:
        return {"engine_config": ",".join([*config, f"NET_DEVICES={interface}"])}
    return {"engine_config": ",".join(config), "device_list": ", ".join(devices)}


class Agent:
    """An agent. It ends with the last reference to it: then nothing reads or writes for it any more."""

    def __init__(self, bindings: Any, name: str, options: Mapping[str, str], *, serves: bool) -> None:
        """`serves`: peers reach it, so a thread of NIXL works for them. One that only asks is at work when it is
        asked how a transfer goes."""
        self._bindings = bindings
        config = bindings.nixlAgentConfig()
        config.useProgThread, config.useListenThread, config.pthrDelay = serves, False, WAKE_US
        config.syncMode = bindings.NIXL_THREAD_SYNC_STRICT
        self._kinds = {Memory.HOST: bindings.DRAM_SEG, Memory.CUDA: bindings.VRAM_SEG}
        try:
            self._agent = bindings.nixlAgent(name, config)
            self._backend = self._agent.createBackend(BACKEND, dict(options))
        except Exception as error:
            raise _unavailable("making an agent", error) from error

    def register(self, rows: Sequence[Row], kind: Memory) -> Any:
        """Registers memory; the answer is for `deregister` and `describe`."""
        listed = self._bindings.nixlRegDList(self._kinds[kind], [(*row, b"") for row in rows])
        self._call("registering memory", self._agent.registerMem, listed, [self._backend])
        return listed

    def deregister(self, listed: Any) -> None:
        """Ends what `register` began."""
        self._call("deregistering memory", self._agent.deregisterMem, listed, [self._backend])

    def describe(self, listed: Any) -> bytes:
        """What `listed` is to agents that loaded `address`."""
        found: bytes = self._call("describing memory", self._agent.getLocalPartialMD, listed, False, [self._backend])
        return found

    @property
    def address(self) -> bytes:
        """How peers reach this agent, and what is registered by now."""
        found: bytes = self._call("telling its address", self._agent.getLocalMD)
        return found

    def load(self, metadata: bytes) -> str:
        """Takes the address of another agent, or what it described; that agent's name."""
        name: bytes = self._call("taking what a peer told", self._agent.loadRemoteMD, metadata)
        return name.decode()

    def begin(self, put: bool, ours: tuple[Memory, Sequence[Row]], theirs: tuple[Memory, Sequence[Row]],
              peer: str, note: bytes = b"") -> int:  # fmt: skip
        """Begins to move row by row; `note` arrives behind that. The number of the transfer."""
        bindings, agent = self._bindings, self._agent
        op = bindings.NIXL_WRITE if put else bindings.NIXL_READ
        lists = [
            bindings.nixlXferDList(self._kinds[kind], np.array(rows, np.uint64).reshape(-1, 3))
            for kind, rows in (ours, theirs)
        ]
        number: int = self._call("beginning", agent.createXferReq, op, *lists, peer, note, [self._backend])
        try:
            self._call("beginning", agent.postXferReq, number, note)
        except UnavailableError:
            self.release(number)
            raise
        return number

    def over(self, number: int) -> bool:
        """Whether a transfer is over. Raises UnavailableError where it failed."""
        status = self._call("moving", self._agent.getXferStatus, number)
        return bool(status != self._bindings.NIXL_IN_PROG)

    def release(self, number: int) -> None:
        """Forgets a transfer. One that is under way goes on."""
        self._call("ending", self._agent.releaseXferReq, number)

    def notes(self) -> dict[str, list[bytes]]:
        """What has arrived since the last time, by the name of who sent it."""
        found: dict[str, list[bytes]] = self._call("asking for notes", self._agent.getNotifs, {}, [self._backend])
        return found

    def _call(self, what: str, call: Any, *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except Exception as error:
            raise _unavailable(what, error) from error


def _unavailable(what: str, error: Exception) -> UnavailableError:
    """NIXL has an exception for each of its statuses; here they are all alike."""
    return UnavailableError(f"NIXL: {what} failed: {type(error).__name__} {error}")
