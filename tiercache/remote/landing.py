"""Landing: where bytes that a thread received are copied to the targets of a read; and the threads of an origin."""

from __future__ import annotations

import asyncio
import atexit
import os
import queue
import threading
import weakref
from concurrent.futures import Executor, Future
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from tiercache.buffers import Buffer, copy
from tiercache.errors import ClosedError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tiercache.origin import Stat

T = TypeVar("T")

END_PATIENCE_S = 0.5
"""So long the end of the process waits for threads that are at work; most are through much sooner."""


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

    def __init__(self, targets: Sequence[Buffer], came: Callable[[int], None] | None = None) -> None:
        """`came` hears of every stretch that has landed, on the loop that runs now, until `end`."""
        self._targets = [target for target in targets if target.length]
        self._lock = threading.Lock()
        self._over = False
        self._at, self._within = 0, 0  # the target that is next, and how much of it is filled
        self._came = came
        self._loop = asyncio.get_running_loop() if came is not None else None

    def fill(self, received: object) -> bool:
        """Copies `received` to where the targets are not filled yet, with the GIL released; it must not be longer than
        that. False when the read is over, or the process ends: nobody wants more."""
        source = Buffer.of(received)  # type: ignore[arg-type]  # anything with the buffer protocol
        with self._lock:
            if self._over or _ending.is_set():
                return False
            start = 0
            while start < source.length:
                target = self._targets[self._at]
                length = min(source.length - start, target.length - self._within)
                copy(source.slice(start, length), target.slice(self._within, length))
                start, self._within = start + length, self._within + length
                if self._within == target.length:
                    self._at, self._within = self._at + 1, 0
        if self._loop is not None:
            try:
                self._loop.call_soon_threadsafe(self._tell, source.length)
            except RuntimeError:  # the loop was closed: nobody waits
                return False
        return True

    def end(self) -> None:
        """From now on nothing is written. Waits for a copy that is under way: under a millisecond for a megabyte."""
        with self._lock:
            self._over = True

    def _tell(self, length: int) -> None:
        if not self._over and self._came is not None:
            self._came(length)


_ending = threading.Event()
_rested = threading.Condition()
"""Told of by every thread that ends its work while the process ends."""
_pools: weakref.WeakSet[_Daemons] = weakref.WeakSet()


class _Daemons(Executor):
    """A pool of threads that the end of the process does not wait for, unlike those of concurrent.futures: a server
    that is silent would hold it up for as long as one waits for an answer."""

    def __init__(self, count: int, name: str) -> None:
        self._count, self._name = count, name
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._idle = threading.Semaphore(0)
        self._threads = 0
        self._over = False
        self.busy = 0
        """Threads at work. A hint: only the end of the process looks at it."""
        _pools.add(self)

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """See Executor."""
        future: Future[T] = Future()
        with self._lock:
            if self._over:
                raise RuntimeError("this pool takes no more work")
            self._jobs.put((future, partial(fn, *args, **kwargs)))
            if self._threads < self._count and not self._idle.acquire(blocking=False):
                self._threads += 1
                threading.Thread(target=self._work, name=f"{self._name}-{self._threads}", daemon=True).start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Takes no more work, and never waits: what nobody has begun is cancelled."""
        with self._lock:
            self._over = True
            while not self._jobs.empty():
                job = self._jobs.get()
                if job is not None:
                    job[0].cancel()
            for _ in range(self._threads):
                self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, work = job
            if future.set_running_or_notify_cancel():
                with self._lock:
                    self.busy += 1
                try:
                    result = work()
                except BaseException as fault:  # noqa: BLE001  # whoever waits for it gets it
                    future.set_exception(fault)
                else:
                    future.set_result(result)
                    del result
                with self._lock:
                    self.busy -= 1
                if _ending.is_set():
                    with _rested:
                        _rested.notify_all()
            del job, future, work  # or an idle thread would keep the last answer alive
            self._idle.release()


def _end() -> None:
    """The process ends: threads that receive stop at the next bytes that come, and have a moment for that. A thread
    that comes back from a library later than that is in the way of nothing."""
    _ending.set()
    with _rested:
        _rested.wait_for(lambda: not any(pool.busy for pool in _pools), END_PATIENCE_S)


def _after_fork() -> None:
    _pools.clear()  # their threads stayed with the parent


atexit.register(_end)
os.register_at_fork(after_in_child=_after_fork)


class Threads:
    """The threads of one origin. Calls that were given up may hold one until they end by themselves."""

    def __init__(self, count: int) -> None:
        # Twice: so that given up calls do not stand in the way of new ones at once.
        self._pool = _Daemons(2 * count, "tiercache-origin")
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
        self._pool.shutdown()
        return True
