"""Small translations between tiercache's facts and fsspec's: descriptions, slices, errors, loops."""

from __future__ import annotations

import asyncio
import errno
import functools
import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from tiercache.errors import ChangedError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from tiercache.pages.versions import Pin
    from tiercache_connectors.fsspec_opening import Opening

T = TypeVar("T")

FOOTED = (".parquet", ".parq", ".pq", ".orc", ".feather", ".arrow")
"""Names of files that are read from their end: asking for their facts is worth asking for their last bytes too."""
IGNORED = ("use_listings_cache", "listings_expiry_time", "max_paths", "skip_instance_cache")
"""Options that fsspec's machinery hands to every filesystem."""
PLAIN = ("s3", "s3a")
"""Protocols whose paths need no help of their filesystem's class, so that reading does not import it."""


class Mounted(Protocol):
    """A filesystem with a mount."""

    @property
    def opening(self) -> Opening:
        """How it comes to its mount."""
        ...


def there(method: Callable[..., Coroutine[Any, Any, T]]) -> Callable[..., Coroutine[Any, Any, T]]:
    """Makes a coroutine method run on the cache's loop, whichever loop it is awaited on, and with an open mount."""

    @functools.wraps(method)
    async def sent(self: Mounted, *args: Any, **kwargs: Any) -> T:
        loop = (self.opening.found or await self.opening.soon()).loop
        if asyncio.get_running_loop() is loop:
            return await method(self, *args, **kwargs)
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(method(self, *args, **kwargs), loop))

    return sent


async def newest(pin: Callable[[], Awaitable[Pin]], read: Callable[[Pin], Awaitable[T]]) -> T:
    """What `read` makes of the version that is there now; once more if that changed meanwhile: no handle pins it."""
    try:
        return await read(await pin())
    except ChangedError:
        return await read(await pin())


def described(pin: Pin) -> dict[str, Any]:
    """A file or directory as fsspec describes it."""
    stat = pin.stat
    if stat.is_directory:
        info = directory(stat.path)
    else:
        info = {"name": stat.path, "size": stat.size, "type": "file"}
        if stat.version:
            info["ETag"] = stat.version
    if stat.mtime_s is not None:
        info["mtime"] = stat.mtime_s
        info["LastModified"] = datetime.fromtimestamp(stat.mtime_s, UTC)
    return info


def directory(path: str) -> dict[str, Any]:
    """A directory of which nothing else is known."""
    return {"name": path, "size": 0, "type": "directory"}


def absent(path: str) -> FileNotFoundError:
    """The error for a path that is not there."""
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)


def present(path: str) -> FileExistsError:
    """The error for a path that should not be there."""
    return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)


def no_file(path: str) -> IsADirectoryError:
    """The error for a directory that was to be read."""
    return IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)


def bounds(start: int | None, end: int | None, size: int) -> tuple[int, int]:
    """Where a slice of a file begins and ends, as Python slices count; within the file, and in this order."""
    low = 0 if start is None else start if start >= 0 else size + start
    high = size if end is None else end if end >= 0 else size + end
    low = max(0, min(low, size))
    return low, max(low, min(high, size))
