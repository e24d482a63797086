"""Trees of files: found level by level, many listings at a time, and copied to local files that appear when whole."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path

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


async def write_whole(goal: Path, copy_to: Callable[[Any], Coroutine[Any, Any, None]]) -> None:
    """Lets `copy_to` write a local file, which appears only when it is complete; a directory there stays as it is."""
    part = goal.with_name(f"{goal.name}.{os.getpid()}.part")

    def begin() -> Any:
        if goal.is_dir():
            return None
        goal.parent.mkdir(parents=True, exist_ok=True)
        return part.open("wb")

    file = await asyncio.to_thread(begin)
    if file is None:
        return
    try:
        with file:
            await copy_to(file)
        part.replace(goal)
    finally:
        part.unlink(missing_ok=True)
