"""Asking: every request to a bucket goes through here, with a deadline, in threads of its own, and not at all for a
while after one has failed.

A bucket that hangs, refuses or is gone costs its readers one deadline, once: from then on every reader is answered at
once, with UnavailableError, until work that nobody waits for has found it well again. One line in the log says when
that begins, and one when it ends.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, TypeVar

from tiercache.errors import OriginError, UnavailableError
from tiercache.remote.landing import Threads

if TYPE_CHECKING:
    from collections.abc import Callable

    from tiercache.clock import Clock
    from tiercache.metrics import Metrics
    from tiercache.remote.bucket import Bucket

log = logging.getLogger(__name__)

T = TypeVar("T")

READ = "read"
"""The operation that readers wait for."""
CHANGES = ("write", "delete", "ledger")
"""Operations that may need rights which a reader has not."""
THREADS = 8
"""Twice as many in all, so that what was given up does not stand in the way of what comes next."""
PAUSE_S, PAUSE_S_MAX = 1.0, 60.0
"""A bucket that failed is left alone for so long: twice as long after each further failure."""


class Asking:
    """Requests to one bucket; on the loop. See the module."""

    def __init__(self, bucket: Bucket, *, clock: Clock, metrics: Metrics, deadline_s: float) -> None:
        """`deadline_s` bounds a request that a reader waits for; others say how long they may take."""
        self.bucket, self.deadline_s = bucket, deadline_s
        self._clock, self._metrics = clock, metrics
        self._threads = Threads(THREADS)
        self._failures = 0
        self._calm_at_s = 0.0

    @property
    def well(self) -> bool:
        """Whether the last request went well: only then do readers ask."""
        return not self._failures

    @property
    def ready(self) -> bool:
        """Whether a question would be put at all, by those who can wait."""
        return not self._failures or self._clock.monotonic() >= self._calm_at_s

    async def ask(self, operation: str, call: Callable[[Bucket], T], *, within_s: float | None = None) -> T:
        """The answer of one request. UnavailableError where none came in time, it failed, or the bucket is left alone;
        OriginError where it was refused, and so has not happened."""
        if not (self.well if operation == READ else self.ready):
            raise UnavailableError(f"{self.bucket.place} failed just now, and is left alone for a while")
        began_s = self._clock.monotonic()
        try:
            async with asyncio.timeout(self.deadline_s if within_s is None else within_s):
                answer = await self._threads.run(lambda: call(self.bucket))
        except TimeoutError as error:
            fault = UnavailableError(f"{self.bucket.place} did not answer to {operation} in time")
            self._failed(operation, fault, began_s)
            raise fault from error
        except OriginError as error:
            if operation not in CHANGES:  # who may only read can read
                self._failed(operation, error, began_s)
            raise
        except OSError as error:  # UnavailableError is of these
            self._failed(operation, error, began_s)
            if isinstance(error, UnavailableError):
                raise
            raise UnavailableError(f"{self.bucket.place}: {error}") from error
        if self._failures:
            self._failures = 0
            log.warning("%s answers again", self.bucket.place)
        return answer

    async def work(self, call: Callable[[], T]) -> T:
        """Work of a thread that asks nobody; when the waiting is cancelled it goes on by itself."""
        return await self._threads.run(call)

    def _failed(self, operation: str, error: Exception, began_s: float) -> None:
        self._metrics.add("tiercache_tier_errors_total", 1, tier="remote", operation=operation)
        if self._failures and began_s < self._calm_at_s:
            return  # of requests that were under way together, one counts
        now_s = self._clock.monotonic()
        self._failures += 1
        pause_s = min(PAUSE_S_MAX, PAUSE_S * 2.0 ** (self._failures - 1))
        self._calm_at_s = now_s + pause_s
        if self._failures == 1:
            log.warning(
                "%s failed (%s): the cache goes on without it, and tries again by itself", self.bucket.place, error
            )

    def close(self) -> None:
        """Asks nothing any more; threads that wait end by themselves."""
        self._threads.close()
