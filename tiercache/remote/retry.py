"""Patience: an origin around another one that retries, limits what is under way, and ends every call in time."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from tiercache.errors import OriginError, UnavailableError
from tiercache.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from random import Random

    from tiercache.buffers import Buffer
    from tiercache.model import Outcome
    from tiercache.origin import Origin, Span, Stat

T = TypeVar("T")

DELETES_PER_CALL = 1000


class ThrottledError(UnavailableError):
    """The origin asked for less: every call to it waits `retry_after_s`; when it gave none, this one pauses longer."""

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DoubtfulError(OriginError):
    """An answer that contradicts the request or itself. Tried again like a fault; told as OriginError when it stays."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long and how often an origin is asked. Pauses are drawn from [0, limit) and the limit doubles: full jitter.

    Source: M. Brooker, Exponential Backoff and Jitter, AWS Architecture Blog, 2015.
    """

    deadline_s: float = 60.0
    """Every call, its retries included, ends by then."""
    attempts: int = 5
    concurrency: int = 16
    """Requests under way at once, over all calls."""
    pause_s: float = 0.05
    """Limit of the first pause after a fault."""
    throttle_pause_s: float = 0.5
    """Limit of the first pause after a throttling answer that names no time."""
    pause_s_max: float = 10.0
    attempt_share: float = 0.4
    """Share of the deadline after which one attempt is given up and the next begins; the last may use what is left."""

    @property
    def attempt_s(self) -> float:
        """Longest time of one attempt that is not the last."""
        return self.deadline_s * self.attempt_share if self.attempts > 1 else self.deadline_s


class RetryingOrigin:
    """An Origin that asks another one until it answers, within a Patience. Absence, changes and refusals pass at once.

    Time is the running loop's. The inner origin need not keep deadlines, but must end when it is cancelled.
    """

    def __init__(self, origin: Origin, patience: Patience, random: Random, metrics: Metrics | None = None) -> None:
        self.identity = origin.identity
        self._origin = origin
        self._patience = patience
        self._random = random
        self._metrics = metrics if metrics is not None else Metrics()
        self._permits = asyncio.Semaphore(patience.concurrency)
        self._calm_at_s = 0.0

    async def stat(self, paths: Sequence[str]) -> list[Stat | Outcome]:
        """See Origin. Each path is an attempt of its own: one that fails does not repeat the others."""

        async def one(path: str) -> Stat | Outcome:
            return (await self._spend("stat", lambda: self._origin.stat([path])))[0]

        return await _all([one(path) for path in paths])

    async def read(self, stat: Stat, span: Span, targets: Sequence[Buffer]) -> None:
        """See Origin."""
        await self._spend("read", lambda: self._origin.read(stat, span, targets))

    async def read_tail(self, path: str, length: int) -> tuple[Stat, bytes] | Outcome:
        """See Origin."""
        return await self._spend("tail", lambda: self._origin.read_tail(path, length))

    async def write(self, path: str, data: bytes | memoryview) -> Stat:
        """See Origin. Repeating it is safe: the object is replaced as a whole."""
        return await self._spend("write", lambda: self._origin.write(path, data))

    async def delete(self, paths: Sequence[str]) -> list[Outcome]:
        """See Origin. After a lost answer an object that this call did delete may be told as GONE."""
        outcomes: list[Outcome] = []
        for start in range(0, len(paths), DELETES_PER_CALL):
            some = paths[start : start + DELETES_PER_CALL]
            outcomes += await self._spend("delete", lambda some=some: self._origin.delete(some))  # type: ignore[misc]
        return outcomes

    async def close(self) -> None:
        """See Origin."""
        await self._origin.close()

    async def list(self, path: str) -> list[Stat] | Outcome:
        """See Origin."""
        return await self._spend("list", lambda: self._origin.list(path))

    async def _spend(self, operation: str, call: Callable[[], Awaitable[T]]) -> T:
        """Runs `call` until it answers; raises its last fault when attempts or time are spent."""
        loop, patience = asyncio.get_running_loop(), self._patience
        begin_s = loop.time()
        until_s = begin_s + patience.deadline_s
        fault: UnavailableError | DoubtfulError | None = None
        try:
            async with asyncio.timeout_at(until_s):
                for attempt in range(patience.attempts):
                    pause_s = self._pause_s(attempt, fault, loop.time())
                    if loop.time() + pause_s >= until_s:
                        break
                    if pause_s:
                        await asyncio.sleep(pause_s)
                    if attempt:
                        self._metrics.add("tiercache_origin_retries_total", operation=operation)
                    try:
                        async with self._permits:
                            share_s = patience.attempt_s if attempt + 1 < patience.attempts else patience.deadline_s
                            return await _bounded(call, min(until_s, loop.time() + share_s))
                    except (UnavailableError, DoubtfulError) as error:
                        self._metrics.add("tiercache_origin_errors_total", operation=operation)
                        fault = error
        except TimeoutError as error:
            message = f"no answer to {operation} within {patience.deadline_s:g} s"
            raise UnavailableError(f"{message}: {fault}" if fault else message) from (fault or error)
        finally:
            self._metrics.observe("tiercache_origin_seconds", loop.time() - begin_s, operation=operation)
        raise fault or UnavailableError(
            f"the origin asked to wait longer than the deadline of {patience.deadline_s:g} s"
        )

    def _pause_s(self, attempt: int, fault: Exception | None, now_s: float) -> float:
        """Seconds to wait before an attempt: this call's own backoff, and the calm that a throttling origin wants."""
        patience, pause_s = self._patience, 0.0
        if fault is not None:
            throttled = isinstance(fault, ThrottledError)
            first_s = patience.throttle_pause_s if throttled else patience.pause_s
            limit_s = min(patience.pause_s_max, first_s * 2.0 ** (attempt - 1))
            pause_s = self._random.uniform(0.0, limit_s)
            if isinstance(fault, ThrottledError) and fault.retry_after_s:
                # Jitter on top: all who were told the same second would come back together.
                self._calm_at_s = max(self._calm_at_s, now_s + fault.retry_after_s)
        return max(0.0, self._calm_at_s - now_s) + pause_s


async def _bounded(call: Callable[[], Awaitable[T]], until_s: float) -> T:
    """One attempt, ended at `until_s`; being late is a fault like others."""
    try:
        async with asyncio.timeout_at(until_s):
            return await call()
    except TimeoutError as error:
        raise UnavailableError("the origin did not answer in time") from error


async def _all(calls: list[Awaitable[T]]) -> list[T]:
    """All results in order; the first fault ends the others before it is raised."""
    if len(calls) == 1:
        return [await calls[0]]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_coroutine(call)) for call in calls]
    except BaseExceptionGroup as faults:
        raise faults.exceptions[0] from faults
    return [task.result() for task in tasks]


async def _coroutine(call: Awaitable[T]) -> T:
    return await call
