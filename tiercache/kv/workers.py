"""Workers: the threads that copy between engine memory and the cache, a step of a job at a time.

A job is a generator. It yields None to give way, a future to go on when that is done, or seconds to go on after. So one
thread serves many jobs: loads before saves, and a job whose bytes are being hashed by the owner, or read from an SSD,
keeps nobody waiting. Whatever happens to it, its generator ends, at its deadline at the latest.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import os
import threading
from collections.abc import Generator
from concurrent import futures
from typing import TYPE_CHECKING, Any, TypeVar

from tiercache.errors import ClosedError, TierCacheError
from tiercache.threads import submit

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from tiercache.clock import Clock
    from tiercache.metrics import Metrics

    Awaited = futures.Future[Any] | float | None

log = logging.getLogger(__name__)

T = TypeVar("T")

Steps = Generator["Awaited", None, None]

IDLE_S = 10.0
"""A thread without work ends after this; the next job starts another."""


class GivenUp(Exception):
    """The job ends now, for somebody changed their mind: no fault, and no job may hold it up."""


class Late(GivenUp):
    """As GivenUp, for its time is over."""


class Fence:
    """What stands around every copy from or to engine memory: `with fence:` raises GivenUp once it is shut.

    When `shut` returns, no copy is under way any more, and none will be.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._shut = False

    def __enter__(self) -> None:
        self._lock.acquire()
        if self._shut:
            self._lock.release()
            raise GivenUp

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def shut(self) -> None:
        """Waits for a copy under way, which is a step of a job and so over in milliseconds."""
        self._shut = True
        with self._lock:
            pass


class Work:
    """One job under way: `ended` is set when its generator has, also when that was never started, and `finish` was
    called."""

    __slots__ = ("_number", "_rank", "ended", "ends", "fence", "finish", "given_up", "steps", "waits")

    def __init__(self, steps: Steps, finish: Callable[[], None], rank: int, number: int, ends: float) -> None:
        self.steps, self.finish, self.ends, self.fence = steps, finish, ends, Fence()
        self._rank, self._number = rank, number
        self.ended = threading.Event()
        self.given_up = False
        self.waits: futures.Future[Any] | float | None = None  # a future, or the moment to go on at

    def __lt__(self, other: Work) -> bool:
        return (self._rank, self._number) < (other._rank, other._number)


class Workers:
    """See the module."""

    def __init__(self, threads: int, clock: Clock, metrics: Metrics) -> None:
        self._most, self._clock, self._metrics = max(1, threads), clock, metrics
        self._changed = threading.Condition()
        self._ready: list[Work] = []  # a heap
        self._waiting: set[Work] = set()
        self._alive: set[Work] = set()
        self._threads = 0
        self._idle = 0
        self._numbers = itertools.count()
        self._closed = False
        self._process = os.getpid()
        self._asks: futures.ThreadPoolExecutor | None = None

    def make(self, steps: Steps, finish: Callable[[], None], *, urgent: bool, deadline_s: float) -> Work:
        """A job that has not started: its generator runs to its end once it was given to `start` or `run`, and then
        `finish` is called, once, in the same thread."""
        return Work(steps, finish, not urgent, next(self._numbers), self._clock.monotonic() + deadline_s)

    def start(self, work: Work) -> None:
        """Lets the threads do it. Raises ClosedError after `close`."""
        with self._changed:
            self._check()
            self._alive.add(work)
            heapq.heappush(self._ready, work)
            if not self._idle and self._threads < self._most:
                self._threads += 1
                threading.Thread(target=self._serve, name="tiercache-kv", daemon=True).start()
            self._changed.notify_all()

    def run(self, work: Work) -> None:
        """Does it in this thread, from beginning to end."""
        with self._changed:
            self._check()
            self._alive.add(work)
        while self._step(work):
            left = max(0.0, work.ends - self._clock.monotonic())
            if isinstance(work.waits, futures.Future):
                futures.wait([work.waits], left)
            elif work.waits is not None:
                work.ended.wait(min(left, max(0.0, work.waits - self._clock.monotonic())))

    def _check(self) -> None:
        if self._closed:
            raise ClosedError("this KvStore was closed: make a new one with cache.kv(layout, shard)")
        if os.getpid() != self._process:
            raise ClosedError("this KvStore came into a forked process, where its threads are not: open the cache anew")

    def ask(self, question: Callable[..., T], *about: object) -> futures.Future[T]:
        """Asks the cache something in a thread of its own, in order, so that a job can copy meanwhile."""
        with self._changed:
            self._check()
            if self._asks is None:
                self._asks = futures.ThreadPoolExecutor(1, "tiercache-kv-ask")
            asks = self._asks
        return submit(asks, question, *about)

    def cancel(self, work: Work) -> None:
        """No engine memory is touched by it when this returns; its generator gets GivenUp soon after."""
        work.given_up = True
        work.fence.shut()
        self._wake(work)

    def close(self, timeout_s: float) -> None:
        """Cancels every job and waits for their ends, at most `timeout_s`. Idempotent."""
        with self._changed:
            self._closed = True
            alive = list(self._alive)
            self._changed.notify_all()
        for work in alive:
            self.cancel(work)
        ends = self._clock.monotonic() + timeout_s
        for work in alive:
            work.ended.wait(max(0.0, ends - self._clock.monotonic()))
        if self._asks is not None:
            self._asks.shutdown(wait=False, cancel_futures=True)

    # -- the threads ---------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        while (work := self._next()) is not None:
            if self._step(work):
                self._park(work)

    def _next(self) -> Work | None:
        """The best job that can go on; None when this thread shall end."""
        with self._changed:
            quiet_since = self._clock.monotonic()
            while True:
                now = self._clock.monotonic()
                soonest = self._due(now)
                if self._ready:
                    return heapq.heappop(self._ready)
                if not self._alive and (self._closed or now - quiet_since >= IDLE_S):
                    self._threads -= 1
                    return None
                self._idle += 1
                self._changed.wait(max(0.0, min(soonest - now, IDLE_S)))
                self._idle -= 1

    def _due(self, now: float) -> float:
        """Moves jobs whose time has come to the ready ones; when the next one's time comes. Under the lock."""
        soonest = now + IDLE_S
        for work in list(self._waiting):
            until = work.ends if not isinstance(work.waits, float) else min(work.ends, work.waits)
            if until <= now:
                self._waiting.discard(work)
                heapq.heappush(self._ready, work)
            else:
                soonest = min(soonest, until)
        return soonest

    def _park(self, work: Work) -> None:
        """Puts a job that has more steps where it waits for the next."""
        with self._changed:
            if work.waits is None or work.given_up:
                heapq.heappush(self._ready, work)
                return
            self._waiting.add(work)
        if isinstance(work.waits, futures.Future):
            work.waits.add_done_callback(lambda _: self._wake(work))

    def _wake(self, work: Work) -> None:
        with self._changed:
            if work in self._waiting:
                self._waiting.discard(work)
                heapq.heappush(self._ready, work)
                self._changed.notify_all()

    def _step(self, work: Work) -> bool:
        """One step; whether there are more."""
        try:
            if self._goes_on(work):
                return True
            work.finish()
        except Exception:  # whoever waits must not wait for ever
            self._metrics.add("tiercache_internal_errors_total")
            log.exception("the end of a copy of KV blocks failed")
        with self._changed:
            self._alive.discard(work)
            if self._closed:
                self._changed.notify_all()
        work.ended.set()
        return False

    def _goes_on(self, work: Work) -> bool:
        """Whether the generator has stopped at a yield once more."""
        try:
            if work.given_up:
                self._throw(work, GivenUp())
            elif self._clock.monotonic() >= work.ends:
                self._throw(work, Late())
            else:
                waits = next(work.steps)
                work.waits = self._clock.monotonic() + waits if isinstance(waits, float | int) else waits
                return True
        except Late:
            log.warning("a copy of KV blocks was given up, for its time was over")
        except (StopIteration, GivenUp):
            pass
        except TierCacheError as fault:
            log.warning("a copy of KV blocks was given up: %s", fault)
        except Exception:  # whoever waits must not wait for ever
            self._metrics.add("tiercache_internal_errors_total")
            log.exception("a copy of KV blocks ended with a fault of ours")
        return False

    @staticmethod
    def _throw(work: Work, fault: Exception) -> None:
        """Ends a generator, whatever it still wants to do."""
        try:
            work.steps.throw(fault)
        finally:
            work.steps.close()
