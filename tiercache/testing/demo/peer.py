"""Other fsspec filesystems made usable by DuckDB 2, so that a comparison with them is one of right answers.

Two things are in the way. fsspec's caches do not know their own protocol in most of their methods. And DuckDB 2 shares
one file object between threads that seek and read in two steps, so that files with one position give it wrong bytes.
"""

from __future__ import annotations

import threading
from typing import Any, ClassVar

from fsspec import AbstractFileSystem

MARK = "peer://"


class Peer(AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """Any filesystem under the protocol `peer`; only what a reader of Parquet calls.

    With `stateless`, files are read by the inner filesystem's `cat_file` in exact ranges, at a position of each
    thread's own: for s3fs one GET a read, as with `cache_type="none"`, and safe to share.
    """

    protocol: ClassVar[str] = "peer"
    cachable = False

    def __init__(self, inner: Any, *, stateless: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.inner = inner
        self._stateless = stateless

    def info(self, path: str, **kwargs: Any) -> Any:
        return self.inner.info(path.removeprefix(MARK), **kwargs)

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        return self.inner.ls(path.removeprefix(MARK), detail=detail, **kwargs)

    def find(self, path: str, **kwargs: Any) -> Any:
        return self.inner.find(path.removeprefix(MARK), **kwargs)

    def glob(self, path: str, maxdepth: int | None = None, **kwargs: Any) -> Any:
        return self.inner.glob(path.removeprefix(MARK), maxdepth=maxdepth, **kwargs)

    def modified(self, path: str) -> Any:
        return self.inner.modified(path.removeprefix(MARK))

    def open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        if not self._stateless:
            return self.inner.open(path.removeprefix(MARK), mode, **kwargs)
        return RangeFile(self.inner, path.removeprefix(MARK))


class RangeFile:
    """A file for reading whose position belongs to the thread that seeks."""

    def __init__(self, fs: Any, path: str) -> None:
        self._fs, self._path = fs, path
        self._size = int(fs.info(path)["size"])
        self._at = threading.local()
        self.closed = False

    def seek(self, offset: int, whence: int = 0) -> int:
        """Moves this thread's position; whence as in io."""
        base = (0, self.tell(), self._size)[whence]
        self._at.position = base + offset
        return base + offset

    def tell(self) -> int:
        """This thread's position."""
        return int(getattr(self._at, "position", 0))

    def read(self, length: int = -1) -> bytes:
        """The next bytes, at most `length`."""
        start = self.tell()
        stop = self._size if length < 0 else min(self._size, start + length)
        if start >= stop:
            return b""
        data: bytes = self._fs.cat_file(self._path, start=start, end=stop)
        self._at.position = start + len(data)
        return data

    def seekable(self) -> bool:
        """Yes."""
        return True

    def readable(self) -> bool:
        """Yes."""
        return True

    def close(self) -> None:
        """Nothing is held."""
        self.closed = True
