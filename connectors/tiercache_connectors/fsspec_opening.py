"""Opening: how a filesystem object comes to its mount, from a thread or from any loop.

Opening starts processes, reads files and waits for both. A thread does that itself; a coroutine waits for a thread that
does, so that no loop stands still. That thread is none of a pool's: what it waits for may need those.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from tiercache_connectors.fsspec_mounts import mount

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tiercache_connectors.fsspec_mounts import Mount, Target


class Opening:
    """The mount of one filesystem object. Any thread; no locks, for the object may come into a forked child."""

    def __init__(self, target: Target, settings: Mapping[str, Any]) -> None:
        self.target, self.settings = target, settings
        self._mount: Mount | None = None
        self._under_way: tuple[int, Future[Mount]] | None = None
        self._stale: deque[str] = deque()
        """Paths to be forgotten before anything is asked through a mount."""

    @property
    def found(self) -> Mount | None:
        """The mount, where it is open in this process."""
        found = self._mount
        return found if found is not None and found.alive else None

    def now(self) -> Mount:
        """The mount, opened here where need be."""
        found = self.found
        if found is None:
            found = mount(self.target, self.settings)
            self._tell(found)
            self._mount = found
            self._tell(found)  # what came meanwhile
        return found

    async def soon(self) -> Mount:
        """The mount, opened in a thread where need be; on any loop."""
        found = self.found
        return found if found is not None else await asyncio.shield(asyncio.wrap_future(self._begin()))

    def forget(self, path: str) -> None:
        """What any process of the directory knows of a path and below it is no longer so: when this returns, or, where
        it is called on a loop, before anything else is asked through this object."""
        self._stale.append(path)
        if not _on_a_loop():
            self._tell(self.now())
        elif (found := self.found) is not None:
            self._tell(found)
        else:
            self._begin()

    def close(self) -> None:
        """Gives the cache back; the next use opens it again."""
        if self._mount is not None:
            self._mount.close()

    def _begin(self) -> Future[Mount]:
        """Has a thread open the mount, if none is about to."""
        under_way, pid = self._under_way, os.getpid()
        if under_way is not None and under_way[0] == pid:  # a parent's thread opens nothing here
            return under_way[1]
        future: Future[Mount] = Future()
        future.set_running_or_notify_cancel()
        self._under_way = pid, future

        def opening() -> None:
            try:
                found = self.now()
            except BaseException as fault:  # noqa: BLE001  # whoever waits gets it
                self._under_way = None
                future.set_exception(fault)
            else:
                self._under_way = None
                future.set_result(found)

        threading.Thread(target=opening, name="tiercache open", daemon=True).start()
        return future

    def _tell(self, found: Mount) -> None:
        stale: list[str] = []
        while self._stale:
            try:
                stale.append(self._stale.popleft())
            except IndexError:
                break
        if stale and _on_a_loop():
            found.reader.facts.forget(stale, below=True)  # without waiting until others have; questions wait for that
        elif stale:
            found.forget(stale)


def _on_a_loop() -> bool:
    """Whether this thread runs a loop, which must not stand still."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
