"""Landing: where bytes that a thread received are copied to the targets of a read, unless that read has ended."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, TypeVar

from tiercache.buffers import Buffer, copy

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Executor

T = TypeVar("T")


class Landing:
    """The targets of one read, shared by the coroutine that waits and the thread that receives.

    A thread cannot be cancelled, and a hung mount or a silent server can hold it for long after the read was given up.
    So bytes are received into memory of their own and moved here under a lock; after `end` nothing is written any more.
    """

    def __init__(self, targets: Sequence[Buffer]) -> None:
        self._targets = targets
        self._lock = threading.Lock()
        self._over = False

    def fill(self, received: object) -> bool:
        """Copies `received`, as long as all targets together, with the GIL released; False when the read is over."""
        source = Buffer.of(received)  # type: ignore[arg-type]  # anything with the buffer protocol
        with self._lock:
            if self._over:
                return False
            start = 0
            for target in self._targets:
                copy(source.slice(start, target.length), target)
                start += target.length
            return True

    def end(self) -> None:
        """From now on nothing is written. Waits for a copy that is under way: under a millisecond for a megabyte."""
        with self._lock:
            self._over = True


async def in_thread(executor: Executor, work: Callable[[], T]) -> T:
    """The result of `work` in a thread of `executor`; when the waiting is cancelled, the thread is left to itself."""
    return await asyncio.get_running_loop().run_in_executor(executor, work)
