"""Trees of files: found level by level, many listings at a time, and copied to local files that appear when whole."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Protocol

from tiercache.clock import system_random
from tiercache.errors import ChangedError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path

    from tiercache.pages.reader import PageReader
    from tiercache.pages.versions import Pin

GET_BYTES = 32 << 20
"""How much of a file is under way at once when it is copied to a local one."""
LISTINGS_MAX = 256
"""Directories listed at once; the origin bounds its requests further."""


class Listing(Protocol):
    """What finding needs of a filesystem."""

    @property
    def _ls(self) -> Callable[[str], Coroutine[Any, Any, list[dict[str, Any]]]]: ...


async def find(fs: Listing, path: str, maxdepth: int | None, prefix: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Files and directories below `path` (not itself), by name. `prefix` is what names right in `path` begin with.

    A directory that vanishes meanwhile has no files; any other fault is raised.
    """
    files: dict[str, Any] = {}
    directories: dict[str, Any] = {}
    level = [path]
    depth = 0
    while level and (maxdepth is None or depth < maxdepth):
        deeper: list[str] = []
        for first in range(0, len(level), LISTINGS_MAX):
            listings = await asyncio.gather(*[_children(fs, each) for each in level[first : first + LISTINGS_MAX]])
            for info in (info for listing in listings for info in listing):
                name: str = info["name"].rstrip("/")
                if depth == 0 and prefix and not name.rsplit("/", 1)[-1].startswith(prefix):
                    continue
                if info["type"] != "directory":
                    files[info["name"]] = info
                elif name != path.rstrip("/"):
                    directories[name] = info
                    deeper.append(name)
        level = deeper
        depth += 1
    return files, directories


async def _children(fs: Listing, path: str) -> list[dict[str, Any]]:
    try:
        return await fs._ls(path)
    except FileNotFoundError:
        return []


class Copied:
    """A local file, or anything else that is written to, as a copy of one version of a cached one."""

    def __init__(self, reader: PageReader, file: Any, callback: Any) -> None:
        self._reader, self._file, self._callback = reader, file, callback
        self._begun = False
        self._start: int | None = file.tell() if hasattr(file, "seekable") and file.seekable() else None

    async def anew(self, pin: Pin) -> None:
        """Writes this version whole. What another version left is cut off first; where that cannot be, ChangedError."""
        if self._begun:
            if self._start is None:
                raise ChangedError(f"{pin.stat.path} changed while it was copied, and the copy cannot be begun again")
            self._file.seek(self._start)
            self._file.truncate()
            self._callback.absolute_update(0)
        size = pin.stat.size
        self._callback.set_size(size)
        for start in range(0, size, GET_BYTES):
            data = await self._reader.read(pin, start, min(start + GET_BYTES, size))
            self._begun = True
            await asyncio.to_thread(self._file.write, data)
            self._callback.relative_update(len(data))


async def write_whole(goal: Path, copy_to: Callable[[Any], Coroutine[Any, Any, None]]) -> None:
    """Lets `copy_to` write a local file, which appears only when it is complete; a directory there stays as it is.

    Each call writes a file of its own beside the goal, so that two for one goal leave what one of them wrote.
    """

    part = goal.with_name(f"{goal.name[:100]}.{system_random().getrandbits(64):016x}.part")

    def begin() -> Any:
        if goal.is_dir():
            return None
        goal.parent.mkdir(parents=True, exist_ok=True)
        return part.open("xb")

    file = await asyncio.to_thread(begin)
    if file is None:
        return
    try:
        with file:
            await copy_to(file)
        part.replace(goal)
    finally:
        part.unlink(missing_ok=True)
