"""Landing: where bytes that a thread received are copied to the targets of a read; and the threads of an origin."""

from __future__ import annotations

import asyncio
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from tiercache.buffers import Buffer, copy
from tiercache.errors import ClosedError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tiercache.origin import Stat

T = TypeVar("T")


def differ(pinned: Stat, found: Stat) -> bool:
    """Whether two looks at one object saw different bytes, as far as they tell. Weak ETags (W/) cannot say that bytes
    are the same: there size and time must agree too."""
    told = bool(pinned.version and found.version)
    if pinned.size != found.size or (told and pinned.version != found.version):
        return True
    sure = told and not pinned.version.startswith("W/")
    return not sure and pinned.mtime_s != found.mtime_s


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


class Threads:
    """The threads of one origin. Calls that were given up may hold one until they end by themselves."""

    def __init__(self, count: int) -> None:
        # Twice: so that given up calls do not stand in the way of new ones at once.
        self._pool = ThreadPoolExecutor(2 * count, thread_name_prefix="tiercache-origin")
        self._process = os.getpid()
        self._closed = False

    def check(self) -> None:
        """Raises unless calls can be made here and now."""
        if self._closed:
            raise ClosedError("the origin was closed")
        if self._process != os.getpid():
            # Threads and connections stayed with the parent: waiting for them would never end.
            raise UnavailableError("the origin was opened before this process was forked: open it again")

    async def run(self, work: Callable[[], T]) -> T:
        """The result of `work`; when the waiting is cancelled, its thread is left to itself."""
        self.check()
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def close(self) -> bool:
        """Takes no more work; False when it was closed before. Does not wait."""
        if self._closed:
            return False
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        return True
