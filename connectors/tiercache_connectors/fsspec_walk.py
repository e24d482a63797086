"""Finding files below a directory: level by level, many listings at a time, so that deep trees cost few round trips."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

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
