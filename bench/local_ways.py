"""Ways in which a peer of bench.local hands entries over, and a side that takes the fastest of them.

Each way is started and filled, and a short trial times them in turns: for each size and batch the fastest is kept, so
that a peer is never measured at what it is slow at. stderr says what the trial measured. Servers end with the side.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np

from bench.local_sides import SIZES, TOTAL_BYTES, Side

TARGET_BYTES = 2 * TOTAL_BYTES
START_SECONDS = 60.0
TRIAL_BYTES = 32 << 20
TRIAL_TURNS = 3
BATCHES = (1, 32)
LONGEST = max(BATCHES)
FAULTS = (ImportError, OSError, RuntimeError, ValueError, TypeError, AttributeError)
"""A way that ends with one of these while it is made does not work here, or not with the version installed."""


def say(text: str) -> None:
    """A line to stderr: stdout belongs to the answers."""
    print(text, file=sys.stderr, flush=True)


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def die_with_parent() -> None:
    """Between fork and exec: the kernel kills the child when the side is gone, however it went."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


class Servers:
    """Processes of one way to share, ended together."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.children: list[subprocess.Popen[bytes]] = []
        atexit.register(self.close)

    def start(self, *command: str, **environment: str) -> None:
        """Starts one more."""
        with self.log.open("ab") as log:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | environment,
                preexec_fn=die_with_parent,
            )
        self.children.append(child)

    def wait_port(self, port: int) -> None:
        """Until the last one listens."""
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self.children[-1].poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            time.sleep(0.05)
        raise RuntimeError(f"{self.children[-1].args!r} does not listen: {self.last_words()}")

    def last_words(self) -> str:
        """The end of the log."""
        return self.log.read_text(errors="replace")[-400:]

    def pause(self) -> None:
        """Takes their hands off the processors."""
        for child in self.children:
            child.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Lets them go on."""
        for child in self.children:
            child.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """Kills all."""
        for child in reversed(self.children):
            child.kill()
        for child in self.children:
            child.wait()
        self.children.clear()


class Way(ABC):
    """One way in which a peer hands entries to this process: filled when made."""

    name: str
    servers: Servers

    @abstractmethod
    def order(self, size: int, batch: int, rounds: int) -> dict[str, float]:
        """Performs one order; bytes are compared after the clock stopped."""

    def close(self) -> None:
        """Ends it."""
        self.servers.close()


class Peer(Side):
    """The fastest of the ways that work here, for each size and batch."""

    ways: tuple[Callable[[Path], Way], ...]

    def __init__(self, directory: str) -> None:
        self.found: list[Way] = []
        faults: list[str] = []
        for make in self.ways:
            try:
                self.found.append(make(Path(directory)))
            except FAULTS as fault:
                faults.append(f"{make.__name__}: {type(fault).__name__}: {fault}")
                say(f"{type(self).__name__}: left out {faults[-1]}")
        if not self.found:
            raise RuntimeError("; ".join(faults))
        rows = [(size, batch) for size in SIZES for batch in BATCHES]
        self.fastest = {row: self._fastest(*row) for row in rows}
        for way in self.found:
            if way not in self.fastest.values():
                way.close()
        self.found = [way for way in self.found if way in self.fastest.values()]

    def _fastest(self, size: int, batch: int) -> Way:
        taken: dict[Way, list[float]] = {way: [] for way in self.found}
        for turn in range(TRIAL_TURNS + 1):
            for way, values in taken.items():
                got = self._alone(way, size, batch, max(2, TRIAL_BYTES // size // batch))
                if turn:  # the first one warms up
                    values.append(got["seconds"] / got["bytes"] * (1 << 20))
        fastest = min(taken, key=lambda way: median(taken[way]))
        each = ", ".join(f"{way.name} {median(values) * 1e6:.0f}" for way, values in taken.items())
        say(f"{type(self).__name__} {size >> 10} KiB x {batch}: {fastest.name} (us a MiB: {each})")
        return fastest

    def _alone(self, way: Way, size: int, batch: int, rounds: int) -> dict[str, float]:
        """One order while the servers of the other ways stand still."""
        others = [other for other in self.found if other is not way]
        for other in others:
            other.servers.pause()
        try:
            return way.order(size, batch, rounds)
        finally:
            for other in others:
                other.servers.resume()

    def read(self, names: list[str], targets: list[np.ndarray], *, verify: bool) -> None:
        raise NotImplementedError("a peer performs whole orders")

    def order(self, size: int, batch: int, rounds: int, verify: bool) -> dict[str, float]:
        return self._alone(self.fastest[size, batch], size, batch, rounds)

    def close(self) -> None:
        """Ends all servers."""
        for way in self.found:
            way.close()
