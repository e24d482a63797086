"""FileIO: the seam between the SSD tier and the operating system. A simulated disk stands in its place in tests.

Everything here blocks and may raise OSError; the tier calls it from its own threads. Offsets and lengths of segment
traffic are multiples of ALIGN_BYTES, and so are the addresses, so that O_DIRECT can be used.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
from typing import TYPE_CHECKING

from tiercache.clock import system_random
from tiercache.errors import UnavailableError
from tiercache.ssd.meta import open_rocks, repair_rocks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tiercache.ssd.meta import Rows

REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)
"""What a file system answers that cannot do O_DIRECT."""


_locks: set[int] = set()
"""Descriptors that hold the lock of a directory."""


def _leave_locks() -> None:
    """A forked child inherits descriptors, and with them would keep a directory locked that its parent has closed."""
    for descriptor in _locks:
        os.close(descriptor)
    _locks.clear()


os.register_at_fork(after_in_child=_leave_locks)


def check_user(directory: str, *, group: bool) -> None:
    """Raises UnavailableError where the directory is another user's and not shared with a group: files of ours would
    lock its user out, also when we are root. That is no guard against those who mean harm: a directory of ours into
    which others may write is used (with a umask of 002, or as an empty volume of a container, it often is one)."""
    try:
        facts = os.stat(directory)
    except OSError:
        return  # not there yet, or whoever uses it hears why
    owner, user = facts.st_uid, os.geteuid()
    if owner == user or group:
        return
    told = f"{directory} belongs to user {owner}, this process runs as {user}: use a directory of its own"
    if facts.st_mode & stat.S_IWGRP and facts.st_gid in (os.getegid(), *os.getgroups()):
        # A volume of Kubernetes with fsGroup, say.
        place = os.path.join(directory, "cache")
        told += f" (group {facts.st_gid} lets it make one here: directory={place})"
    raise UnavailableError(f"{told}, or share it with a group (share_group)")


class FileIO:
    """The real file system. `direct=False` keeps to buffered I/O, which is the fallback where O_DIRECT is refused."""

    def __init__(self, *, direct: bool = True) -> None:
        self.direct = direct

    def open(self, path: str, *, create: bool = False) -> int:
        """A descriptor for reading and writing a segment file, O_DIRECT where `direct` still holds."""
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0)
        if self.direct:
            try:
                return os.open(path, flags | os.O_DIRECT, 0o600)
            except OSError as fault:
                if fault.errno not in REFUSALS:
                    raise
                self.direct = False
        return os.open(path, flags, 0o600)

    def probe_direct(self, directory: str) -> None:
        """Writes and reads one aligned block in `directory`, and falls back to buffered I/O if O_DIRECT is refused."""
        if not self.direct:
            return
        path = os.path.join(directory, "probe")
        block = mmap.mmap(-1, mmap.PAGESIZE)
        try:
            descriptor = self.open(path, create=True)
            try:
                self.pwritev(descriptor, [block], 0)
                self.preadv(descriptor, [block], 0)
            except OSError as fault:
                if fault.errno not in REFUSALS:
                    raise
                self.direct = False
            finally:
                os.close(descriptor)
        finally:
            self.unlink(path)
            block.close()

    def preadv(self, descriptor: int, buffers: Sequence[memoryview | mmap.mmap], offset: int) -> int:
        """One scattered read; answers the bytes read, which are fewer at the end of a truncated file."""
        return os.preadv(descriptor, buffers, offset)

    def pwritev(self, descriptor: int, buffers: Sequence[memoryview | mmap.mmap], offset: int) -> int:
        """One gathered write; answers the bytes written."""
        return os.pwritev(descriptor, buffers, offset)

    def fdatasync(self, descriptor: int) -> None:
        """Returns when what was written to the file is on the medium."""
        os.fdatasync(descriptor)

    def allocate(self, descriptor: int, size_bytes: int) -> None:
        """Gives the file its full size and reserves its blocks; ENOSPC if the disk cannot."""
        os.posix_fallocate(descriptor, 0, size_bytes)

    def size_of(self, path: str) -> int:
        """Length of a file."""
        return os.stat(path).st_size

    def close(self, descriptor: int) -> None:
        """Gives a descriptor back."""
        if descriptor in _locks:
            _locks.discard(descriptor)
            # A child forked meanwhile has the same open file, and may not have come to closing it.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)

    def unlink(self, path: str) -> None:
        """Removes a file, or does nothing if it is not there."""
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass

    def make_directory(self, path: str) -> None:
        """Makes a directory and those above it, readable by its owner only."""
        os.makedirs(path, mode=0o700, exist_ok=True)

    def remove_tree(self, path: str) -> None:
        """Removes a directory and what is in it."""
        import shutil  # brings the compression modules, and is needed for damage only

        shutil.rmtree(path, ignore_errors=True)

    def names(self, directory: str) -> list[str]:
        """Names of the files in a directory, sorted; empty if it is not there."""
        try:
            return sorted(os.listdir(directory))
        except FileNotFoundError:
            return []

    def sync_directory(self, path: str) -> None:
        """Makes creations and renames in a directory durable."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def read_small(self, path: str) -> bytes | None:
        """The content of a small file, or None if it is not there."""
        try:
            with open(path, "rb") as file:
                return file.read(1 << 16)
        except FileNotFoundError:
            return None

    def replace_small(self, path: str, content: bytes) -> None:
        """Puts a small file in place, durably and in one step: readers see the old content or the new one."""
        scratch = path + ".new"
        with open(scratch, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
        self.sync_directory(os.path.dirname(path))

    def free_bytes(self, directory: str) -> int:
        """Bytes of the file system that an ordinary user can still take."""
        status = os.statvfs(directory)
        return status.f_bavail * status.f_frsize

    def identity(self, directory: str) -> tuple[int, int] | None:
        """What tells this directory from another at the same path; None if it is gone."""
        try:
            status = os.stat(directory)
        except OSError:
            return None
        return status.st_dev, status.st_ino

    def lock(self, path: str) -> int | None:
        """Takes the lock of a directory for the life of the descriptor; None if another process has it."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:
            os.close(descriptor)
            raise
        _locks.add(descriptor)
        return descriptor

    def token(self) -> int:
        """A random number of 63 bits."""
        return system_random().getrandbits(63)

    def usage(self, directory: str) -> tuple[int, int]:
        """(bytes, files) of what lies directly in a directory, allocated blocks counted as they are."""
        size = files = 0
        try:
            with os.scandir(directory) as entries:
                for entry in entries:
                    try:
                        size += entry.stat().st_size
                    except FileNotFoundError:
                        continue
                    files += 1
        except FileNotFoundError:
            pass
        return size, files

    def open_rows(self, directory: str, budget_bytes: int) -> Rows:
        """Opens the store of facts rows. Raises RowsError if it is damaged."""
        return open_rocks(directory, budget_bytes)

    def repair_rows(self, directory: str, budget_bytes: int) -> None:
        """Saves what can be saved of a damaged store of rows. Raises RowsError."""
        repair_rocks(directory, budget_bytes)
