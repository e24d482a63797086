"""Pulse: how well the disk does, from what happened on it. A state with a clock, no I/O of its own.

HEALTHY falls to READ_ONLY when writes fail, and to OFF when reads fail three times in a row, when nothing came back
within a deadline, or when the directory vanished. It comes back when a probe succeeds; probes are due at growing
intervals, and whoever asks `probe_due` first makes it.
"""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING

from tiercache.tier import Health

if TYPE_CHECKING:
    from tiercache.clock import Clock

PROBE_FIRST_S = 1.0
PROBE_LAST_S = 60.0
READ_FAULTS_MAX = 3

_WORDS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EIO: "the disk reports errors",
    errno.ENOENT: "the directory vanished",
    errno.ESTALE: "the file system went away",
    errno.ENODEV: "the device went away",
}


class Pulse:
    """Health of one directory. Thread-safe."""

    def __init__(self, clock: Clock) -> None:
        self.health = Health.HEALTHY
        self.reason = ""
        self._clock = clock
        self._lock = threading.Lock()
        self._read_faults = 0
        self._pause_s = PROBE_FIRST_S
        self._next_probe_s = 0.0

    def read_ok(self) -> None:
        """A read came back with bytes, right or wrong."""
        self._read_faults = 0

    def read_failed(self, fault: OSError) -> None:
        """The system refused a read; a single bad sector does not switch the tier off."""
        with self._lock:
            self._read_faults += 1
            if self._read_faults >= READ_FAULTS_MAX:
                self._fall(Health.OFF, words(fault))

    def write_failed(self, fault: OSError) -> None:
        """The system refused a write or a sync."""
        with self._lock:
            self._fall(Health.READ_ONLY, words(fault))

    def hung(self, deadline_s: float) -> None:
        """Nothing came back from the disk for a whole deadline."""
        with self._lock:
            self._fall(Health.OFF, f"the disk did not answer within {deadline_s:g} s")

    def vanished(self) -> None:
        """The directory is not where it was."""
        with self._lock:
            self._fall(Health.OFF, "the directory vanished")

    def probe_due(self) -> bool:
        """Whether to try now if the disk is well again; true for one caller, and then not for a while."""
        with self._lock:
            now = self._clock.monotonic()
            if self.health is Health.HEALTHY or now < self._next_probe_s:
                return False
            self._pause_s = min(PROBE_LAST_S, 2 * self._pause_s)
            self._next_probe_s = now + self._pause_s
            return True

    def recovered(self) -> None:
        """A probe wrote, synced and read back."""
        with self._lock:
            self.health, self.reason = Health.HEALTHY, ""
            self._read_faults, self._pause_s = 0, PROBE_FIRST_S

    def _fall(self, health: Health, reason: str) -> None:
        if self.health is Health.HEALTHY:
            self._pause_s = PROBE_FIRST_S
            self._next_probe_s = self._clock.monotonic() + self._pause_s
        if health < self.health or not self.reason:
            self.health, self.reason = min(health, self.health), reason


def words(fault: OSError) -> str:
    """A fault in words for an operator."""
    known = _WORDS.get(fault.errno or 0)
    return f"{known} ({fault})" if known else str(fault)
