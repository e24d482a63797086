"""Sockets: how an owner is found on its directory, who is at the other end, and descriptors beside bytes. No frames.

The socket lies in the cache directory. A path that is too long for `sun_path` is reached through a descriptor of the
directory and /proc/self/fd. Rights are those of the directory, and both ends check the other's credentials, which the
kernel tells; see `admits`.
"""

from __future__ import annotations

import array
import errno
import os
import select
import socket
import stat
import struct
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from tiercache.errors import UnavailableError

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable, Sequence

SOCKET_NAME = "owner.sock"
NEW_NAME = "owner.sock.new"
BACKLOG = 1024
CONNECT_S = 10.0
"""How long a connection may wait for a place in the owner's backlog."""
FDS_MAX = 253
"""Descriptors in one message; the kernel's SCM_MAX_FD."""

_PATH_BYTES_MAX = 107
_SO_PEERGROUPS = 59
_SO_PEERPIDFD = 77
_UCRED = struct.Struct("iII")
_OPTION_BYTES_MAX = 1024
_SCM = struct.Struct("i")


class NoOwner(UnavailableError):
    """Nobody serves this directory now."""


class Foreign(UnavailableError):
    """The directory, or who serves it, belongs to somebody whom this process must not trust or may not reach."""


class CannotShare(UnavailableError):
    """This host or this directory does not allow sharing; the message says what is in the way."""


class Lost(UnavailableError):
    """The connection to the owner ended, or the owner did not answer in time."""


class Peer(NamedTuple):
    """Who is at the other end, as the kernel says. `pid` is 0 for a process of another PID namespace."""

    pid: int
    uid: int
    gid: int
    groups: tuple[int, ...]


# -- the directory -----------------------------------------------------------------------------------------------------


def check_directory(directory: str, *, group: bool = False, make: bool = False) -> os.stat_result:
    """The directory's facts. Raises Foreign where it is another user's (without `group`), CannotShare where others may
    write into it (so could put a socket of theirs there), NoOwner where there is none; `make` makes it, 0700 or 0750.
    """
    if make:
        try:
            os.makedirs(directory, mode=0o750 if group else 0o700, exist_ok=True)
        except OSError as error:
            raise CannotShare(f"{directory} cannot be made: {error.strerror}") from error
    try:
        facts = os.stat(directory)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            raise NoOwner(f"there is no directory {directory}") from error
        raise Foreign(f"{directory} cannot be looked into: {error.strerror}") from error
    if not stat.S_ISDIR(facts.st_mode):
        raise CannotShare(f"{directory} is no directory")
    if not group and facts.st_uid != os.geteuid():
        raise Foreign(
            f"{directory} belongs to user {facts.st_uid}, this process runs as {os.geteuid()}: "
            "use a directory of its own, or share it with a group (share_group)"
        )
    if facts.st_mode & (stat.S_IWOTH if group else stat.S_IWOTH | stat.S_IWGRP):
        raise CannotShare(f"others may write into {directory} (mode {facts.st_mode & 0o7777:o}): chmod go-w it")
    return facts


def admits(other: Peer, facts: os.stat_result, *, group: bool = False) -> bool:
    """Whether the other end of a connection in a directory with these facts is let in, whichever end it is: this user
    and root always; with `group`, the directory's owner and whoever belongs to the directory's group."""
    if other.uid in (os.geteuid(), 0):
        return True
    return group and (other.uid == facts.st_uid or facts.st_gid == other.gid or facts.st_gid in other.groups)


def listen(directory: str, *, group: bool = False) -> socket.socket:
    """A listening socket under DIR/owner.sock, in place of whatever is there; the caller holds DIR/spawn.lock.

    It is bound under another name and renamed, so that nobody ever meets one that does not listen yet."""
    facts = check_directory(directory, group=group, make=True)
    listener = _unix_socket()
    folder = _open_folder(directory)
    try:
        try:
            os.unlink(NEW_NAME, dir_fd=folder)
        except FileNotFoundError:
            pass
        listener.bind(_address(directory, NEW_NAME, folder))
        if group:
            os.chown(NEW_NAME, -1, facts.st_gid, dir_fd=folder)
        os.chmod(NEW_NAME, 0o660 if group else 0o600, dir_fd=folder)
        listener.listen(BACKLOG)
        os.rename(NEW_NAME, SOCKET_NAME, src_dir_fd=folder, dst_dir_fd=folder)
    except OSError as error:
        listener.close()
        raise CannotShare(f"no socket can be made in {directory}: {_words(error)}") from error
    finally:
        os.close(folder)
    return listener


def inherited(descriptor: int) -> socket.socket:
    """The listening socket that whoever started this process handed over; from here on its credentials are ours."""
    listener = socket.socket(fileno=descriptor)
    listener.set_inheritable(False)
    listener.listen(BACKLOG)
    return listener


def connect(directory: str, *, group: bool = False, wait_s: float = CONNECT_S) -> socket.socket:
    """A blocking connection to the owner of the directory.

    Raises NoOwner where nobody serves it, Foreign where somebody does whom this process must not trust or may not
    reach, UnavailableError where the owner is so busy that it does not even accept."""
    facts = check_directory(directory, group=group)
    sock = _unix_socket()
    folder = _open_folder(directory)
    try:
        set_timeout(sock, socket.SO_SNDTIMEO, wait_s)
        sock.connect(_address(directory, SOCKET_NAME, folder))
        other = peer(sock)
    except OSError as error:
        sock.close()
        if error.errno in (errno.ENOENT, errno.ECONNREFUSED):
            raise NoOwner(f"nobody serves {directory}") from error
        if error.errno in (errno.EACCES, errno.EPERM):
            raise Foreign(f"the socket in {directory} is not for this user: {error.strerror}") from error
        if error.errno == errno.EAGAIN:
            raise UnavailableError(f"the owner of {directory} accepts no connections for {wait_s:g} s") from error
        raise CannotShare(f"the socket in {directory} cannot be reached: {_words(error)}") from error
    finally:
        os.close(folder)
    if not admits(other, facts, group=group):
        sock.close()
        raise Foreign(
            f"{directory} is served by user {other.uid}, whom this process (user {os.geteuid()}) cannot trust"
        )
    return sock


def _unix_socket() -> socket.socket:
    family = getattr(socket, "AF_UNIX", None)
    if family is None:
        raise CannotShare("this system has no Unix sockets")
    try:
        return socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise CannotShare(f"no Unix socket can be made: {_words(error)}") from error


def _open_folder(directory: str) -> int:
    try:
        return os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise CannotShare(f"{directory} cannot be opened: {_words(error)}") from error


def _address(directory: str, name: str, folder: int) -> bytes:
    path = os.fsencode(os.path.join(directory, name))
    if len(path) <= _PATH_BYTES_MAX:
        return path
    short = f"/proc/self/fd/{folder}"
    if not os.path.isdir(short):
        raise CannotShare(
            f"{directory} is too long for a socket, and there is no /proc to go through: use a shorter path"
        )
    return f"{short}/{name}".encode()


def _words(error: OSError) -> str:
    known = {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the quota of the disk is used up",
        errno.EROFS: "the file system is read-only",
        errno.EACCES: "no right to write there",
        errno.EPERM: "this file system or system allows no sockets",
        errno.EOPNOTSUPP: "this file system knows no sockets",
        errno.EMFILE: "too many open files (ulimit -n)",
    }
    return known.get(error.errno or 0) or error.strerror or str(error)


# -- one connection ----------------------------------------------------------------------------------------------------


def set_timeout(sock: socket.socket, option: int, wait_s: float) -> None:
    """SO_RCVTIMEO or SO_SNDTIMEO: the kernel's own deadline, which costs no poll() before each call."""
    whole = max(int(wait_s * 1e6), 1)
    sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", whole // 1_000_000, whole % 1_000_000))


def peer(sock: socket.socket) -> Peer:
    """Who connected, or who listens; on the connecting side these are the credentials at listen()."""
    pid, uid, gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    try:
        packed = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _OPTION_BYTES_MAX)
    except OSError:  # an old kernel, or more groups than this: the main group must do
        packed = b""
    return Peer(pid, uid, gid, struct.unpack(f"{len(packed) // 4}I", packed))


def send_fds(sock: socket.socket, data: bytes | memoryview, descriptors: Sequence[int]) -> int:
    """Sends bytes with descriptors beside the first of them; returns how many bytes went (the descriptors went with
    any). They are copies: the caller may close its own."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    return sock.sendmsg([data], rights, socket.MSG_NOSIGNAL)


def recv_fds(sock: socket.socket, size: int, fds_max: int) -> tuple[bytes, list[int]]:
    """Receives bytes and the descriptors beside them, closed on exec.

    Raises UnavailableError where some were cut off (more than `fds_max`, or this process has too many open files);
    those that did come are closed then."""
    room = socket.CMSG_LEN(fds_max * _SCM.size)
    data, ancillary, flags, _ = sock.recvmsg(size, room, socket.MSG_CMSG_CLOEXEC)
    descriptors: list[int] = []
    for level, kind, packed in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            whole = len(packed) - len(packed) % _SCM.size
            descriptors += [each for (each,) in _SCM.iter_unpack(packed[:whole])]
    if flags & socket.MSG_CTRUNC or len(descriptors) > fds_max:
        close_all(descriptors)
        raise UnavailableError(
            f"not all descriptors of a message arrived ({len(descriptors)} did, {fds_max} expected at most): "
            "this process may have too many open files (ulimit -n)"
        )
    return data, descriptors


def close_all(descriptors: Iterable[int]) -> None:
    """Closes every one, whatever the others do."""
    for each in descriptors:
        try:
            os.close(each)
        except OSError:
            pass


# -- death -------------------------------------------------------------------------------------------------------------


def open_pidfd(sock: socket.socket) -> int | None:
    """A descriptor of the process at the other end, which becomes readable when that process ends; None where the
    system cannot say.

    SO_PEERPIDFD (Linux 6.5) knows the very process. Before it there is only the number, which may be another process's
    by now: so it counts only if the connection still stands after the descriptor was opened, because a process that
    ended has closed its end."""
    try:
        return sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError:
        pass
    pid = peer(sock).pid
    descriptor = pidfd_of(pid) if pid > 0 else None
    if descriptor is not None and ended(sock):
        os.close(descriptor)
        return None
    return descriptor


def pidfd_of(pid: int) -> int | None:
    """A descriptor of a process by number; None where it has ended or the system has no such descriptors."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None


def ended(sock: socket.socket) -> bool:
    """Whether the other end has closed the connection, without taking anything from it."""
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    return bool(poll.poll(0))


def readable(file: int | socket.socket | IO[Any], wait_s: float = 0.0) -> bool:
    """Whether there is something to read, someone to accept, or an end, within `wait_s`; of any descriptor, while
    select() knows none over 1023."""
    poll = select.poll()
    poll.register(file, select.POLLIN)
    return bool(poll.poll(wait_s * 1000))


class Watch:
    """Calls `on_death` once, on the loop, when the process of a pidfd ends; owns the descriptor until then or until
    `close`."""

    def __init__(self, pidfd: int, loop: asyncio.AbstractEventLoop, on_death: Callable[[], None]) -> None:
        self._pidfd, self._loop, self._on_death = pidfd, loop, on_death
        loop.add_reader(pidfd, self._died)

    def close(self) -> None:
        """Watches no longer. Idempotent."""
        if self._pidfd >= 0:
            pidfd, self._pidfd = self._pidfd, -1
            self._loop.remove_reader(pidfd)
            os.close(pidfd)

    def _died(self) -> None:
        self.close()
        self._on_death()


def watch(sock: socket.socket, loop: asyncio.AbstractEventLoop, on_death: Callable[[], None]) -> Watch | None:
    """Watches the process at the other end of a connection; None where the system cannot, and only the end of the
    connection tells."""
    pidfd = open_pidfd(sock)
    return None if pidfd is None else Watch(pidfd, loop, on_death)
