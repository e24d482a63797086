"""SimDisk: a disk in memory that forgets and tears what was not synced, and fails on demand; the twin of FileIO.

What the system would show at once (the page cache) and what is on the medium are two things here. `kill` is the death
of the process: all that was written is still there. `power_cut` is worse: of every write since the last sync of its
file each sector of 512 bytes made it to the medium or did not, files whose directory was not synced may be gone, and of
the rows' log only a prefix is left, which holds at least what was synced. All is drawn from the generator given.
"""

from __future__ import annotations

import errno
import threading
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tiercache.ssd.fileio import FileIO
from tiercache.ssd.meta import RowsError

if TYPE_CHECKING:
    import mmap
    import random
    from collections.abc import Callable, Iterator, Sequence

    from tiercache.ssd.meta import Rows

SECTOR_BYTES = 512


@dataclass(slots=True, eq=False)
class SimFile:
    """One file: what readers see, and what was written since the last sync as (offset, old bytes, new bytes)."""

    seen: bytearray = field(default_factory=bytearray)
    unsynced: list[tuple[int, bytes, bytes]] = field(default_factory=list)
    linked: bool = False
    """Whether the directory that names it was synced since."""


@dataclass(slots=True, eq=False)
class SimLog:
    """The rows of one directory: batches in order, of which the first `synced` are on the medium."""

    batches: list[tuple[list[tuple[bytes, bytes]], list[bytes]]] = field(default_factory=list)
    synced: int = 0


class SimRows:
    """Rows over a log: a batch is there at once, and durable after `sync`. The twin of meta.RocksRows."""

    def __init__(self, disk: SimDisk, log: SimLog) -> None:
        self._disk = disk
        self._log = log
        self._map: dict[bytes, bytes] = {}
        self._closed = False
        self._lock = threading.Lock()
        for puts, deletes in log.batches:
            self._apply(puts, deletes)

    def _apply(self, puts: Sequence[tuple[bytes, bytes]], deletes: Sequence[bytes]) -> None:
        for key in deletes:
            self._map.pop(key, None)
        self._map.update(puts)

    def _check(self, operation: str) -> None:
        if self._closed:
            raise RowsError("the rows were closed")
        try:
            self._disk.note(operation)
        except OSError as fault:
            raise RowsError(f"{operation}: {fault}") from fault

    def write(self, puts: Sequence[tuple[bytes, bytes]], deletes: Sequence[bytes] = ()) -> None:
        """One batch at the end of the log."""
        self._check("rows.write")
        with self._lock:
            self._log.batches.append((list(puts), list(deletes)))
            self._apply(puts, deletes)

    def sync(self) -> None:
        """Everything before this is on the medium."""
        count = len(self._log.batches)
        self._check("rows.sync")
        self._log.synced = max(self._log.synced, count)

    def get(self, key: bytes) -> bytes | None:
        """From the map."""
        self._check("rows.read")
        return self._map.get(key)

    def scan(self, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        """In the order of keys, as of now."""
        self._check("rows.read")
        with self._lock:
            keys = sorted(self._map)
            found = [(key, self._map[key]) for key in keys[bisect_left(keys, prefix) :] if key.startswith(prefix)]
        yield from found

    def position(self) -> int:
        """Batches so far."""
        return len(self._log.batches)

    def close(self) -> None:
        """As RocksDB does, without a sync."""
        self._closed = True


class SimDisk(FileIO):
    """One file system. Give the same disk to one tier after the other: it is what survives them.

    `fail(operation, code, after=n, times=m)` makes the m calls of an operation that follow the next n fail; `hold`
    makes calls of an operation wait until the event it answers is set. `operations` counts calls by name: open, read,
    write, sync, allocate, rows.write, rows.sync, rows.read.
    """

    def __init__(self, rng: random.Random, *, size_bytes: int = 1 << 40) -> None:
        super().__init__(direct=True)
        self.rng = rng
        self.size_bytes = size_bytes
        self.files: dict[str, SimFile] = {}
        self.logs: dict[str, SimLog] = {}
        self.operations: dict[str, int] = {}
        self.peak_bytes = 0
        """Most that all files together ever took."""
        self.present = True
        """False: the directory is not there any more, though open files still work."""
        self.on_note: Callable[[str], None] | None = None
        """Called with the name of every operation before it happens; may raise OSError."""
        self._open: dict[int, SimFile] = {}
        self._locks: dict[int, str] = {}
        self._next = 1000
        self._failures: dict[str, list[tuple[int, int, int]]] = {}
        self._gates: dict[str, threading.Event] = {}
        self._stop_at = 1 << 60
        self._lock = threading.RLock()

    # -- faults

    def fail(self, operation: str, code: int, *, after: int = 0, times: int = 1 << 60) -> None:
        """Lets `after` more calls succeed, then fails `times` calls."""
        start = self.operations.get(operation, 0) + after
        self._failures.setdefault(operation, []).append((start, start + times, code))

    def stop_after(self, count: int) -> None:
        """Lets so many more operations of any kind happen, and then fails all: the moment at which the power goes."""
        self._stop_at = sum(self.operations.values()) + count

    def heal(self) -> None:
        """No failures any more, and nothing waits."""
        self._failures.clear()
        self._stop_at = 1 << 60
        for gate in self._gates.values():
            gate.set()
        self._gates.clear()

    def hold(self, operation: str) -> threading.Event:
        """Calls of this operation hang until the event is set; only for real threads."""
        return self._gates.setdefault(operation, threading.Event())

    def note(self, operation: str) -> None:
        """Counts an operation and lets it fail or hang if that was asked for."""
        with self._lock:
            number = self.operations.get(operation, 0)
            stopped = sum(self.operations.values()) >= self._stop_at
            self.operations[operation] = number + 1
        gate = self._gates.get(operation)
        if gate is not None:
            gate.wait()
        if self.on_note is not None:
            self.on_note(operation)
        if stopped:
            raise OSError(errno.EIO, "the power is gone")
        for start, stop, code in self._failures.get(operation, ()):
            if start <= number < stop:
                raise OSError(code, f"simulated fault of {operation} {number}")

    def kill(self) -> None:
        """The process died: its locks and descriptors are gone, what it wrote is not."""
        self._open.clear()
        self._locks.clear()

    def power_cut(self) -> None:
        """The machine died: what was not synced is there, not there, or torn."""
        self.kill()
        rng = self.rng
        for path, file in list(self.files.items()):
            if not file.linked and rng.random() < 0.5:
                del self.files[path]
                continue
            file.linked = True
            fate = rng.choice((0.0, 0.5, 0.9, 1.0))  # how much of this file made it
            for offset, old, new in reversed(file.unsynced):
                for at in range(0, len(new), SECTOR_BYTES):
                    if rng.random() >= fate:
                        stop = min(at + SECTOR_BYTES, len(old))
                        file.seen[offset + at : offset + stop] = old[at:stop]
            file.unsynced.clear()
        for log in self.logs.values():
            kept = rng.randint(log.synced, len(log.batches))
            del log.batches[kept:]
            log.synced = kept

    def flip(self, path: str, offset: int, bit: int = 0) -> None:
        """Bit rot."""
        self.files[path].seen[offset] ^= 1 << bit

    # -- the file system

    def _file(self, descriptor: int) -> SimFile:
        try:
            return self._open[descriptor]
        except KeyError:
            raise OSError(errno.EBADF, "no such descriptor") from None

    def _descriptor(self, file: SimFile) -> int:
        self._next += 1
        self._open[self._next] = file
        return self._next

    def _weigh(self, more: int) -> None:
        used = sum(len(file.seen) for file in self.files.values()) + more
        if used > self.size_bytes:
            raise OSError(errno.ENOSPC, "the simulated disk is full")
        self.peak_bytes = max(self.peak_bytes, used)

    def open(self, path: str, *, create: bool = False) -> int:
        """As the twin's."""
        self.note("open")
        with self._lock:
            if path not in self.files:
                if not create or not self.present:
                    raise FileNotFoundError(errno.ENOENT, "no such file", path)
                self.files[path] = SimFile()
            return self._descriptor(self.files[path])

    def probe_direct(self, directory: str) -> None:
        """There is nothing to fall back from."""

    def preadv(self, descriptor: int, buffers: Sequence[memoryview | mmap.mmap], offset: int) -> int:
        """As the twin's."""
        self.note("read")
        seen, done = self._file(descriptor).seen, 0
        for buffer in buffers:
            view = memoryview(buffer)
            piece = seen[offset + done : offset + done + len(view)]
            view[: len(piece)] = piece
            done += len(piece)
            if len(piece) < len(view):
                break
        return done

    def pwritev(self, descriptor: int, buffers: Sequence[memoryview | mmap.mmap], offset: int) -> int:
        """As the twin's; a write that fails with ENOSPC has put down its first half."""
        new = b"".join([bytes(memoryview(buffer)) for buffer in buffers])
        file = self._file(descriptor)
        try:
            self.note("write")
        except OSError:
            if sum(self.operations.values()) > self._stop_at + 1:
                raise  # the power was gone before; only the call that it met in the middle leaves a half
            self._put(file, offset, new[: len(new) // 2 // SECTOR_BYTES * SECTOR_BYTES])
            raise
        self._put(file, offset, new)
        return len(new)

    def _put(self, file: SimFile, offset: int, new: bytes) -> None:
        with self._lock:
            end = offset + len(new)
            if end > len(file.seen):
                self._weigh(end - len(file.seen))
                file.seen += bytes(end - len(file.seen))
            file.unsynced.append((offset, bytes(file.seen[offset:end]), new))
            file.seen[offset:end] = new

    def fdatasync(self, descriptor: int) -> None:
        """As the twin's."""
        file = self._file(descriptor)
        count = len(file.unsynced)
        self.note("sync")
        with self._lock:
            del file.unsynced[:count]

    def allocate(self, descriptor: int, size_bytes: int) -> None:
        """As the twin's; the file's length is taken to be durable with its name."""
        self.note("allocate")
        file = self._file(descriptor)
        with self._lock:
            more = max(0, size_bytes - len(file.seen))
            self._weigh(more)
            file.seen += bytes(more)

    def size_of(self, path: str) -> int:
        """As the twin's."""
        return len(self.files[path].seen)

    def close(self, descriptor: int) -> None:
        """As the twin's."""
        self._open.pop(descriptor, None)
        self._locks.pop(descriptor, None)

    def unlink(self, path: str) -> None:
        """As the twin's."""
        self.files.pop(path, None)

    def make_directory(self, path: str) -> None:
        """Directories are just prefixes here."""
        if not self.present:
            raise FileNotFoundError(errno.ENOENT, "no such directory", path)

    def remove_tree(self, path: str) -> None:
        """As the twin's."""
        for name in [name for name in self.files if name.startswith(path + "/")]:
            del self.files[name]
        self.logs.pop(path, None)

    def names(self, directory: str) -> list[str]:
        """As the twin's."""
        start = directory + "/"
        return sorted(
            path[len(start) :] for path in self.files if path.startswith(start) and "/" not in path[len(start) :]
        )

    def sync_directory(self, path: str) -> None:
        """As the twin's."""
        for name in self.names(path):
            self.files[f"{path}/{name}"].linked = True

    def read_small(self, path: str) -> bytes | None:
        """As the twin's."""
        file = self.files.get(path)
        return None if file is None else bytes(file.seen)

    def replace_small(self, path: str, content: bytes) -> None:
        """As the twin's."""
        self.note("write")
        self.files[path] = SimFile(bytearray(content), linked=True)

    def free_bytes(self, directory: str) -> int:
        """As the twin's."""
        return self.size_bytes - sum(len(file.seen) for file in self.files.values())

    def identity(self, directory: str) -> tuple[int, int] | None:
        """As the twin's."""
        return (1, 1) if self.present else None

    def lock(self, path: str) -> int | None:
        """As the twin's."""
        if path in self._locks.values():
            return None
        descriptor = self._descriptor(SimFile())
        self._locks[descriptor] = path
        return descriptor

    def token(self) -> int:
        """From the generator."""
        return self.rng.getrandbits(63)

    def usage(self, directory: str) -> tuple[int, int]:
        """Of the rows: the bytes of what they hold now, in one file."""
        log = self.logs.get(directory)
        return (0, 0) if log is None else (sum(len(k) + len(v) for puts, _ in log.batches for k, v in puts[:1]), 1)

    def open_rows(self, directory: str, budget_bytes: int) -> Rows:
        """As the twin's."""
        return SimRows(self, self.logs.setdefault(directory, SimLog()))

    def repair_rows(self, directory: str, budget_bytes: int) -> None:
        """Nothing is ever damaged inside."""
