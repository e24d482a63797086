"""Starting an owner, when nobody serves a directory yet.

Whoever finds no owner takes DIR/spawn.lock, looks again, binds the socket and hands it, listening, to a new process. So
a connection stands from the first moment and waits in the backlog; nobody asks again and again whether the owner is
there by now. Who does not get the lock meets the socket of the one who did.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import tiercache
from tiercache.clock import SystemClock
from tiercache.errors import UnavailableError
from tiercache.wire.sockets import CannotShare, NoOwner, check_directory, connect, listen

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator, Mapping

    from tiercache.clock import Clock

log = logging.getLogger(__name__)

LOCK_NAME = "spawn.lock"
LOG_NAME = "owner.log"
LOG_BYTES_MAX = 1 << 20
_LOOK_AGAIN_S = 0.005
_CLOCK = SystemClock()

# Listening sockets between their making and the start of the owner. A child forked just then would hold one for ever:
# after that owner's death, connections would stand that nobody answers.
_listening: set[socket.socket] = set()


def _leave_listening() -> None:
    for each in list(_listening):
        each.close()
    _listening.clear()


os.register_at_fork(after_in_child=_leave_listening)


def find_or_start(
    directory: str,
    settings: Mapping[str, object],
    *,
    group: bool = False,
    deadline_s: float = 20.0,
    module: str = "tiercache.owner",
    clock: Clock = _CLOCK,
) -> socket.socket:
    """A blocking connection to the owner of the directory, which is started where there is none: `module` is run as
    `__main__` with the arguments `DIR --listen FD --settings FD` (see sockets.inherited and read_settings).

    The connection stands before the owner has started: the first question is answered when the owner is ready, or the
    connection ends, when the owner could not start (see last_words). Raises CannotShare where none can be started,
    Foreign, or UnavailableError when the deadline passed."""
    directory = os.path.abspath(directory)
    check_directory(directory, group=group, make=True)
    until_s = clock.monotonic() + deadline_s
    pause = threading.Event()
    while True:
        left_s = until_s - clock.monotonic()
        if left_s <= 0:
            raise UnavailableError(f"no owner of {directory} was found or started within {deadline_s:g} s")
        try:
            return connect(directory, group=group, wait_s=left_s)
        except NoOwner:
            pass
        with spawn_lock(directory, group=group) as held:
            if held:
                return _connect_or_start(directory, settings, group=group, left_s=left_s, module=module)
        # Its holder binds the socket within milliseconds, or dies and leaves the lock.
        pause.wait(min(_LOOK_AGAIN_S, left_s))


@contextmanager
def spawn_lock(directory: str, *, group: bool = False) -> Iterator[bool]:
    """Whether DIR/spawn.lock is held inside: it is for whoever makes the socket (sockets.listen). Does not wait."""
    try:
        mode = 0o660 if group else 0o600
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        lock = os.open(os.path.join(directory, LOCK_NAME), flags, mode)
    except OSError as error:
        raise CannotShare(f"no owner can be started in {directory}: {LOCK_NAME}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            raise CannotShare(f"{directory} is on a file system without locks: {error.strerror}") from error
        try:
            yield True
        finally:
            # By name: a child forked meanwhile has the same descriptor, and would keep the lock.
            fcntl.flock(lock, fcntl.LOCK_UN)
    finally:
        os.close(lock)


def _connect_or_start(
    directory: str, settings: Mapping[str, object], *, group: bool, left_s: float, module: str
) -> socket.socket:
    """With the lock held."""
    try:
        return connect(directory, group=group, wait_s=left_s)
    except NoOwner:
        pass
    command = _command()
    listener = listen(directory, group=group)
    _listening.add(listener)
    try:
        _spawn(command, directory, listener, settings, group=group, left_s=left_s, module=module)
    finally:
        _listening.discard(listener)
        listener.close()
    log.info("started an owner for %s", directory)
    try:
        return connect(directory, group=group, wait_s=left_s)
    except NoOwner:
        raise CannotShare(f"the owner of {directory} ended as it started: {last_words(directory)}") from None


def _spawn(
    command: list[str],
    directory: str,
    listener: socket.socket,
    settings: Mapping[str, object],
    *,
    group: bool,
    left_s: float,
    module: str,
) -> None:
    plan = _plan(settings, module)
    try:
        trim_log(directory)
        errors = _open_log(directory)
        try:
            arguments = [directory, "--listen", str(listener.fileno()), "--settings", str(plan)]
            launched = subprocess.Popen(
                [*command, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                cwd="/",
                umask=0o027 if group else 0o077,
                start_new_session=True,
                pass_fds=(listener.fileno(), plan),
            )
        finally:
            os.close(errors)
    except OSError as error:
        raise CannotShare(f"no owner can be started for {directory}: {error}") from error
    finally:
        os.close(plan)
    try:
        code = launched.wait(left_s)
    except BaseException as error:
        launched.kill()
        launched.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            raise CannotShare(f"{command[0]} did not start an owner for {directory} within {left_s:g} s") from None
        raise
    if code:
        raise CannotShare(f"the owner of {directory} could not start (status {code}): {last_words(directory)}")


def _command() -> list[str]:
    """How this interpreter runs launch.py. Raises CannotShare where there is no such interpreter to run."""
    python = sys.executable or ""
    named = os.path.basename(python).startswith(("python", "pypy"))
    if getattr(sys, "frozen", False) or not named or not os.access(python, os.X_OK):
        raise CannotShare(
            f"this program is not run by a Python that could run an owner too (sys.executable: {python!r})"
        )
    script = os.path.join(_root(), "wire", "launch.py")
    if not os.path.isfile(script):
        raise CannotShare(f"tiercache does not lie in files that an owner could be started from ({script})")
    return [python, "-E", "-P", *(["-B"] if sys.dont_write_bytecode else []), script]


def _root() -> str:
    return os.path.dirname(os.path.abspath(tiercache.__file__))


def _plan(settings: Mapping[str, object], module: str) -> int:
    """A descriptor of a file in memory that says what to run; settings are in no argument, which others could read."""
    paths = [path for path in sys.path if os.path.isabs(path)]
    text = json.dumps({"root": _root(), "module": module, "paths": paths, "settings": dict(settings)})
    try:
        descriptor = os.memfd_create("tiercache-settings", os.MFD_CLOEXEC)
    except (AttributeError, OSError) as error:
        raise CannotShare(f"this system has no files in memory: {error}") from error
    with open(os.dup(descriptor), "wb") as file:
        file.write(text.encode())
    return descriptor


def read_settings(descriptor: int) -> dict[str, object]:
    """In the owner: the settings that came with it; closes the descriptor."""
    with open(descriptor, "rb") as file:
        file.seek(0)
        return cast("dict[str, object]", json.load(file)["settings"])


def _open_log(directory: str) -> int:
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(os.path.join(directory, LOG_NAME), flags, 0o600)


def last_words(directory: str) -> str:
    """The last line of the owner's log: what to tell when an owner did not start, or ended."""
    try:
        with open(os.path.join(directory, LOG_NAME), "rb") as file:
            file.seek(max(os.fstat(file.fileno()).st_size - 4096, 0))
            lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    return lines[-1].strip() if lines else f"nothing in {os.path.join(directory, LOG_NAME)}"


def trim_log(directory: str) -> None:
    """Cuts the owner's log to its later half where it is over LOG_BYTES_MAX; while an owner lives, only that owner
    may."""
    try:
        log_file = os.open(os.path.join(directory, LOG_NAME), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return
    with open(log_file, "r+b") as file:
        size = os.fstat(file.fileno()).st_size
        if size > LOG_BYTES_MAX:
            file.seek(size - LOG_BYTES_MAX // 2)
            file.readline()
            later = file.read(LOG_BYTES_MAX)
            file.seek(0)
            file.write(later)
            file.truncate()
