"""Files of the filesystem: one that reads through the cache without buffering again, one that writes to the target."""

from __future__ import annotations

import io
import threading
from typing import TYPE_CHECKING, Any

from tiercache.buffers import Buffer
from tiercache.pages.versions import Pin
from tiercache_connectors.fsspec_facts import described

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tiercache.origin import Stat
    from tiercache_connectors.fsspec_fs import TierCacheFileSystem

LINES_BYTES = 256 << 10
"""How much is read at once to look for line ends."""


class CachedFile(io.RawIOBase):
    """A file opened for reading: every read is a range of one pinned version, answered in the caller's thread when it
    is in memory.

    Threads may share a handle. A thread that ever sought has a position of its own from then on: it starts where it
    sought and moves with its own reads alone, whatever others do in between (DuckDB reads so). Threads that never
    sought share one position: no two of them get the same bytes, and together they get all of them (so thread pools
    read files). The shared position is where the newest seek or read of any thread ended, so that a thread may seek or
    read a header and hand the rest to another; to get the handle back, it seeks again. With `one_position` there is
    only the shared one, as in a plain file: for a buffer around the handle that is itself handed from thread to thread.
    """

    mode = "rb"

    def __init__(
        self,
        fs: TierCacheFileSystem,
        path: str,
        pin: Pin,
        block_size: int | None = None,
        *,
        one_position: bool = False,
    ) -> None:
        super().__init__()
        self.fs, self.path, self.pin = fs, path, pin
        self.name = self.full_name = path
        self.size: int = pin.stat.size
        self.blocksize = block_size or fs.blocksize
        self._mount = fs.mount
        self._ahead = self._mount.reader.watch()
        self._position = 0
        self._one_position = one_position
        self._mine = threading.local()
        """`at`: the position of a thread that has its own."""
        self._lock = threading.Lock()
        """For positions; never held while bytes are awaited."""

    # -- position ------------------------------------------------------------------------------------------------------

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Moves this thread's position, and the shared one."""
        self._check_open()
        if whence == io.SEEK_CUR:
            offset += self.tell()
        elif whence == io.SEEK_END:
            offset += self.size
        elif whence != io.SEEK_SET:
            raise ValueError(f"whence is 0, 1 or 2, not {whence}")
        if offset < 0:
            raise ValueError("Seek before start of file")
        with self._lock:
            if not self._one_position:
                self._mine.at = offset
            self._position = offset
        return offset

    def tell(self) -> int:
        """Where the next read of this thread starts."""
        self._check_open()
        return self._at()

    def _at(self) -> int:
        mine: int | None = getattr(self._mine, "at", None)
        return self._position if mine is None else mine

    def _claim(self, length: int) -> tuple[int, int]:
        """The range that a read of `length` (negative: to the end) is about; moves the position behind it."""
        self._check_open()
        with self._lock:
            start = self._at()
            stop = self.size if length < 0 else min(self.size, start + length)
            self._move(max(start, stop))
        return start, stop

    def _move(self, to: int) -> None:
        """Sets this thread's position, if it has one, and the shared one; under the lock."""
        if getattr(self._mine, "at", None) is not None:
            self._mine.at = to
        self._position = to

    def _advance(self, start: int, stop: int) -> bool:
        """Moves from `start` to `stop`; false if another thread has moved the position away from `start` meanwhile."""
        with self._lock:
            if self._at() != start:
                return False
            self._move(stop)
            return True

    # -- reading -------------------------------------------------------------------------------------------------------

    def read(self, size: int | None = -1, /) -> bytes:
        """Up to `size` bytes; fewer only at the end of the file."""
        start, stop = self._claim(-1 if size is None else size)
        return self._range(start, stop) if start < stop else b""

    def _range(self, start: int, stop: int) -> bytes:
        mount = self._mount if self._mount.alive else self._remount()
        value = mount.reader.read_resident(self.pin, start, stop)
        if value is None:
            value = mount.reader.read_blocking(self.pin, start, stop, mount.wait)
        self._look_ahead(start, stop)
        return value

    def readinto(self, buffer: Any, /) -> int:
        """Fills a writable buffer; answers how many bytes it got."""
        target = Buffer.of(buffer, writable=True)
        start, stop = self._claim(target.length)
        if start >= stop:
            return 0
        target = target.slice(0, stop - start)
        mount = self._mount if self._mount.alive else self._remount()
        if not mount.reader.read_resident_into(self.pin, start, stop, target):
            mount.reader.read_into_blocking(self.pin, [(start, stop)], [target], mount.wait)
        self._look_ahead(start, stop)
        return stop - start

    readinto1 = readinto
    read1 = read

    def readall(self) -> bytes:
        """The rest of the file."""
        return self.read(-1)

    def _look_ahead(self, start: int, stop: int) -> None:
        span = self._ahead.observe(start, stop, self.size)
        if span is not None and not self._mount.reader.is_resident(self.pin, *span):
            self._mount.loop.call_soon_threadsafe(self._mount.reader.prefetch, self.pin, *span)

    def readline(self, size: int | None = -1, /) -> bytes:
        """One line, with its end; at most `size` bytes of it."""
        return self._until(b"\n", self.size if size is None or size < 0 else size, 1 << 13)

    def readuntil(self, char: bytes = b"\n", blocks: int | None = None) -> bytes:
        """Bytes up to and including `char`, or to the end."""
        return self._until(char, self.size, blocks or LINES_BYTES)

    def _until(self, end: bytes, limit: int, step: int) -> bytes:
        while True:
            self._check_open()
            start = self._at()
            found = self._search(start, end, limit, step)
            if self._advance(start, start + len(found)):
                return found

    def _search(self, start: int, end: bytes, limit: int, step: int) -> bytes:
        """Bytes from `start` up to and including `end`, at most `limit`, or to the end of the file."""
        found = b""
        while len(found) < limit:
            at = start + len(found)
            piece = self._range(at, min(at + step, start + limit, self.size)) if at < self.size else b""
            searched = max(0, len(found) + 1 - len(end))
            found += piece
            cut = found.find(end, searched)
            if cut >= 0:
                return found[: cut + len(end)]
            if not piece:
                break
            step = min(2 * step, LINES_BYTES)
        return found

    def __iter__(self) -> Iterator[bytes]:
        """Lines; the position is right after each of them, and where somebody moves it, lines go on from there."""
        block, at = b"", -1
        while True:
            self._check_open()
            if at != self._at():
                block, at = b"", self._at()
            end = block.find(b"\n") + 1
            if not end:
                ahead = at + len(block)
                more = self._range(ahead, min(ahead + LINES_BYTES, self.size)) if ahead < self.size else b""
                block += more
                if more:
                    continue
                end = len(block)
            if not end:
                return
            if not self._advance(at, at + end):
                continue
            line, block = block[:end], block[end:]
            at += end
            yield line

    def __next__(self) -> bytes:
        line = self.readline()
        if not line:
            raise StopIteration
        return line

    # -- facts ---------------------------------------------------------------------------------------------------------

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    @property
    def details(self) -> dict[str, Any]:
        """The same as `info`."""
        return self.info()

    def info(self) -> dict[str, Any]:
        """Facts of the version that is read."""
        return described(self.pin)

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("I/O operation on closed file.")

    def _remount(self) -> Any:
        """After a fork, or when the filesystem was closed: the same version through a new mount."""
        self._mount = self.fs.mount
        return self._mount

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self.fs, self.pin.stat, self.pin.version, self.blocksize, self.tell())

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.path}>"


def _reopened(fs: TierCacheFileSystem, stat: Stat, version: str, block_size: int, position: int) -> CachedFile:
    """A handle in another process: the same version, the same position."""
    handle = CachedFile(fs, stat.path, Pin(stat, version), block_size)
    handle._position = position
    return handle


class AsyncCachedFile:
    """A file to be read with `await`, for one task at a time: one pinned version, no buffer."""

    def __init__(self, fs: TierCacheFileSystem, pin: Pin) -> None:
        self.fs, self.pin = fs, pin
        self.path, self.size = pin.stat.path, pin.stat.size
        self.loc = 0
        self.closed = False

    async def read(self, length: int = -1) -> bytes:
        """Up to `length` bytes; fewer only at the end of the file."""
        if self.closed:
            raise ValueError("I/O operation on closed file.")
        start = self.loc
        stop = self.size if length < 0 else min(self.size, start + length)
        data = await self.fs._read_pin(self.pin, start, stop) if start < stop else b""
        self.loc = max(start, stop)
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves the position."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.loc, io.SEEK_END: self.size}[whence]
        if base + offset < 0:
            raise ValueError("Seek before start of file")
        self.loc = base + offset
        return self.loc

    def tell(self) -> int:
        """Where the next read starts."""
        return self.loc

    async def close(self) -> None:
        """Ends the handle."""
        self.closed = True

    async def __aenter__(self) -> AsyncCachedFile:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class WrittenFile(io.RawIOBase):
    """A file opened for writing: the target's own, and what was known of the path is forgotten as it is written."""

    def __init__(self, file: Any, path: str, mode: str, forget: Callable[[], None]) -> None:
        super().__init__()
        self._file, self.path, self.mode, self._forget = file, path, mode, forget
        self.name = self.full_name = path
        self._done = False
        forget()

    def write(self, data: Any, /) -> int:
        """Hands bytes to the target's file."""
        written = self._file.write(data)
        return len(data) if written is None else int(written)

    def read(self, size: int | None = -1, /) -> bytes:
        """Bytes of a file opened for both."""
        return self._file.read(-1 if size is None else size)  # type: ignore[no-any-return]

    def readinto(self, buffer: Any, /) -> int:
        """As `read`, into a buffer."""
        return self._file.readinto(buffer)  # type: ignore[no-any-return]

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return self._file.seek(offset, whence)  # type: ignore[no-any-return]

    def tell(self) -> int:
        return self._file.tell()  # type: ignore[no-any-return]

    def truncate(self, size: int | None = None, /) -> int:
        return self._file.truncate(size)  # type: ignore[no-any-return]

    def flush(self) -> None:
        if not self._done:
            self._file.flush()

    def close(self) -> None:
        """Completes the file at the target (or leaves that to the transaction)."""
        if self._done:
            return
        self._done = True  # closing flushes once more, and by then the target's file is closed
        try:
            self._file.close()
        finally:
            super().close()
            self._forget()

    def commit(self) -> None:
        """Puts a file of a transaction in place."""
        self._file.commit()
        self._forget()

    def discard(self) -> None:
        """Throws a file of a transaction away."""
        self._file.discard()
        self._forget()

    def readable(self) -> bool:
        return "+" in self.mode

    def seekable(self) -> bool:
        return bool(self._file.seekable())

    def writable(self) -> bool:
        return True
