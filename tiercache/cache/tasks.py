"""Tasks: the group that owns every background task of a cache, so that closing waits for all of them."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from tiercache.metrics import Metrics

log = logging.getLogger(__name__)


class Tasks:
    """Owned tasks on one loop. A fault in one is logged and counted, never lost, and harms no other."""

    def __init__(self, metrics: Metrics) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._metrics = metrics

    def __len__(self) -> int:
        return len(self._tasks)

    def start(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Runs `work` as a task of this group."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (fault := task.exception()) is not None:
            self._metrics.add("tiercache_internal_errors_total")
            log.error("background task %s of the cache failed; the cache goes on", task.get_name(), exc_info=fault)

    async def close(self, patience_s: float) -> None:
        """Waits for what still runs, cancels what outlasts `patience_s`."""
        running = [task for task in self._tasks if task is not asyncio.current_task()]
        if not running:
            return
        _, late = await asyncio.wait(running, timeout=patience_s)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late, timeout=patience_s)
