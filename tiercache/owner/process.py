"""Process: what an owner leaves behind of whoever started it, so that it serves all its clients alike, and its log."""

from __future__ import annotations

import ctypes
import logging
import os
import resource
import signal
import sys

from tiercache.wire import starting

log = logging.getLogger("tiercache.owner")

TRIM_BYTES = starting.LOG_BYTES_MAX // 4
"""The log is looked at, and cut where it is too long, each time that so much was written to it."""
_PR_SET_NAME = 15
_LIMITS = {
    "open files": resource.RLIMIT_NOFILE,
    "CPU seconds": resource.RLIMIT_CPU,
    "bytes of a file": resource.RLIMIT_FSIZE,
    "bytes of address space": resource.RLIMIT_AS,
    "bytes of data": resource.RLIMIT_DATA,
}


class Log(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to stderr, which is DIR/owner.log where a client started the owner; bounded, whoever comes or goes."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(logging.Formatter("%(asctime)s %(process)d %(levelname)s %(message)s"))
        self.directory = ""
        """Whose log may be cut: set when no other owner writes to it."""
        self._written = 0

    def format(self, record: logging.LogRecord) -> str:
        """As the base; counts."""
        text = super().format(record)
        self._written += len(text)
        return text

    def emit(self, record: logging.LogRecord) -> None:
        """As the base; cuts the file now and then."""
        super().emit(record)
        if self._written >= TRIM_BYTES and self.directory:
            self._written = 0
            try:
                starting.trim_log(self.directory)
            except OSError:
                self.handleError(record)


def stand_alone() -> None:
    """Whatever ends the terminal, or the process that started it, does not end the owner; and what that process had
    been confined to (processors, limits, priority) is lifted as far as this user may."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGPIPE, signal.SIGXCPU):
        signal.signal(number, signal.SIG_IGN)
    for what, limit in _LIMITS.items():
        _lift(what, limit)
    try:
        # The kernel keeps to those that the cgroup allows.
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    except (AttributeError, OSError) as error:
        log.warning("the processors stay those of the process that started this one (%s)", error)
    try:
        if os.getpriority(os.PRIO_PROCESS, 0) > 0:
            os.setpriority(os.PRIO_PROCESS, 0, 0)
    except OSError:
        log.warning("started by a process of low priority (nice %d): so is this owner", os.nice(0))
    os.umask(0o077)
    os.chdir("/")
    try:
        ctypes.CDLL(None).prctl(_PR_SET_NAME, b"tiercache-owner", 0, 0, 0)
    except (AttributeError, OSError):
        pass  # only a name for `ps` and `top`


def _lift(what: str, limit: int) -> None:
    soft, hard = resource.getrlimit(limit)
    # No limit where this user may, what it may otherwise. Of open files no more than there may be anyway: the kernel
    # has a limit of its own.
    wanted = [(hard, hard)] if limit == resource.RLIMIT_NOFILE else [(resource.RLIM_INFINITY,) * 2, (hard, hard)]
    for pair in wanted:
        if (soft, hard) == pair:
            return
        try:
            resource.setrlimit(limit, pair)
        except (ValueError, OSError):
            continue
        break
    soft, hard = resource.getrlimit(limit)
    if soft != resource.RLIM_INFINITY and limit != resource.RLIMIT_NOFILE:
        log.warning("this owner is limited to %d %s, as the process that started it", soft, what)
    elif soft != hard:
        log.warning("this owner is limited to %d %s", soft, what)
