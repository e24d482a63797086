"""Patience: an origin around another one that retries, limits what is under way, and ends every call in time."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from tiercache.errors import ClosedError, OriginError, UnavailableError
from tiercache.metrics import Metrics
from tiercache.origin import Span
from tiercache.remote.split import read_growing

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from random import Random

    from tiercache.buffers import Buffer
    from tiercache.model import Outcome
    from tiercache.origin import Origin, Stat

T = TypeVar("T")

STALL_S_MIN = 2.0
CLOSED = "the origin was closed"
DELETES_PER_CALL = 1000
MOVED_BYTES_MIN = 64 << 10
"""An attempt that broke after fewer bytes counts like one that brought nothing: no server feeds us drop by drop."""
ASK_BYTES_MIN, ASK_BYTES_MAX = 1 << 20, 1 << 62
LATE_SHARE = 0.5
"""An answer that took this share of an attempt's time came late: smaller ones are better."""
SPENT_SHARE = 0.999
"""Of the deadline: timers may be early by a rounding."""


class ThrottledError(UnavailableError):
    """The origin asked for less: every call to it waits `retry_after_s`; when it gave none, this one pauses longer."""

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DoubtfulError(OriginError):
    """An answer that contradicts the request or itself. Tried again like a fault; told as OriginError when it stays."""


class LateError(UnavailableError):
    """Nothing came for too long."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long and how often an origin is asked. Pauses are drawn from [0, limit) and the limit doubles: full jitter.

    Source: M. Brooker, Exponential Backoff and Jitter, AWS Architecture Blog, 2015.
    """

    deadline_s: float = 60.0
    """Every call, its retries included, ends when nothing has come for so long; most answers come as a whole, and then
    that is since its begin. Waiting for a permit while other calls get on is no silence."""
    attempts: int = 5
    """So many times in a row, if nothing comes of them."""
    concurrency: int = 16
    """Requests under way at once, over all calls."""
    pause_s: float = 0.05
    """Limit of the first pause after a fault."""
    throttle_pause_s: float = 0.5
    """Limit of the first pause after a throttling answer that names no time."""
    pause_s_max: float = 10.0
    attempt_share: float = 0.4
    """Share of the deadline after which an attempt that brings nothing is given up and the next begins; the last may
    use what is left."""

    stall_share: float = 0.1
    """As `attempt_share`, for silence after bytes have come, and at least STALL_S_MIN: that is hardly ever an origin
    that thinks, and all that another attempt costs is a request."""

    @property
    def stall_s(self) -> float:
        """Longest silence in one attempt that has brought something and is not the last."""
        return min(self.attempt_s, max(STALL_S_MIN, self.deadline_s * self.stall_share))

    @property
    def attempt_s(self) -> float:
        """Longest silence in one attempt that is not the last."""
        return self.deadline_s * self.attempt_share if self.attempts > 1 else self.deadline_s


@dataclass(slots=True)
class _Effort:
    """What one call has got so far, over all its attempts."""

    moved_s: float
    """When it got something last, or began."""
    bytes: int = 0
    attempts: int = 0


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
        self._moved_s = float("-inf")
        self._closed = False
        self._under_way: set[asyncio.Timeout] = set()
        self._ask_bytes = ASK_BYTES_MAX

    async def stat(self, paths: Sequence[str]) -> list[Stat | Outcome]:
        """See Origin. Each path is an attempt of its own: one that fails does not repeat the others."""

        async def one(path: str) -> Stat | Outcome:
            return (await self._spend("stat", lambda _: self._origin.stat([path])))[0]

        return await _all([one(path) for path in paths])

    async def read(self, stat: Stat, span: Span, targets: Sequence[Buffer]) -> None:
        """See Origin."""
        await self.read_growing(stat, span, targets, lambda _: None)

    async def read_growing(
        self, stat: Stat, span: Span, targets: Sequence[Buffer], came: Callable[[int], None]
    ) -> None:
        """See GrowingOrigin. What has come is kept: another attempt asks for the rest alone. Where only whole answers
        come, and one took too long, smaller ones are asked for, until they come quickly."""
        got = 0

        async def rest(moved: Callable[[int], None]) -> None:
            def more(length: int) -> None:
                nonlocal got
                got += length
                moved(length)
                came(length)

            while got < span.length:
                part = Span(span.start + got, min(self._ask_bytes, span.length - got))
                before, began_s = got, asyncio.get_running_loop().time()
                try:
                    await read_growing(self._origin, stat, part, _rest(targets, got, part.length), more)
                except (UnavailableError, asyncio.CancelledError):
                    if got == before and part.length > ASK_BYTES_MIN and late(began_s):
                        self._ask_bytes = max(ASK_BYTES_MIN, part.length // 4)
                    raise
                if part.length == self._ask_bytes and not late(began_s):
                    self._ask_bytes *= 2

        def late(began_s: float) -> bool:
            return asyncio.get_running_loop().time() - began_s > self._patience.attempt_s * LATE_SHARE

        if span.length:
            await self._spend("read", rest)

    async def read_tail(self, path: str, length: int) -> tuple[Stat, bytes] | Outcome:
        """See Origin."""
        return await self._spend("tail", lambda _: self._origin.read_tail(path, length))

    async def write(self, path: str, data: bytes | memoryview) -> Stat:
        """See Origin. Repeating it is safe: the object is replaced as a whole."""
        return await self._spend("write", lambda _: self._origin.write(path, data))

    async def delete(self, paths: Sequence[str]) -> list[Outcome]:
        """See Origin. After a lost answer an object that this call did delete may be told as GONE."""
        outcomes: list[Outcome] = []
        for start in range(0, len(paths), DELETES_PER_CALL):
            some = paths[start : start + DELETES_PER_CALL]
            outcomes += await self._spend("delete", lambda _, some=some: self._origin.delete(some))  # type: ignore[misc]
        return outcomes

    async def close(self) -> None:
        """See Origin. Calls under way end at once: the end of a process waits for none of them."""
        self._closed = True
        for timer in self._under_way:
            if not timer.expired():
                timer.reschedule(asyncio.get_running_loop().time())
        await self._origin.close()

    async def list(self, path: str) -> list[Stat] | Outcome:
        """See Origin."""
        return await self._spend("list", lambda _: self._origin.list(path))

    async def _spend(self, operation: str, call: Callable[[Callable[[int], None]], Awaitable[T]]) -> T:
        """Runs `call` until it answers, or this origin is closed."""
        if self._closed:
            raise ClosedError(CLOSED)
        self._under_way.add(timer := asyncio.timeout(None))
        try:
            async with timer:
                return await self._persist(operation, call)
        except TimeoutError as error:
            raise ClosedError(CLOSED) from error
        finally:
            self._under_way.discard(timer)

    async def _persist(self, operation: str, call: Callable[[Callable[[int], None]], Awaitable[T]]) -> T:
        """Runs `call` until it answers; raises its last fault when attempts or time are spent. It tells its first
        argument of bytes that have come for good."""
        loop, patience = asyncio.get_running_loop(), self._patience
        begin_s = loop.time()
        effort = _Effort(begin_s)
        fault: UnavailableError | DoubtfulError | None = None
        attempt = 0
        try:
            while attempt < patience.attempts:
                pause_s = self._pause_s(attempt, fault, loop.time())
                if loop.time() + pause_s >= effort.moved_s + patience.deadline_s:
                    break
                if pause_s:
                    await asyncio.sleep(pause_s)
                if effort.attempts:
                    self._metrics.add("tiercache_origin_retries_total", operation=operation)
                before = effort.bytes
                try:
                    return await self._attempt(call, effort, last=attempt + 1 == patience.attempts)
                except (UnavailableError, DoubtfulError) as error:
                    self._metrics.add("tiercache_origin_errors_total", operation=operation)
                    if not isinstance(error, LateError) or fault is None:
                        fault = error
                    attempt = 1 if effort.bytes - before >= MOVED_BYTES_MIN else attempt + 1
        finally:
            self._metrics.observe("tiercache_origin_seconds", loop.time() - begin_s, operation=operation)
        silent_s = loop.time() - effort.moved_s
        if silent_s >= patience.deadline_s * SPENT_SHARE:
            after = f" after the first {effort.bytes:,} bytes" if effort.bytes else ""
            message = f"no answer to {operation} within {patience.deadline_s:g} s{after}"
            raise UnavailableError(f"{message}: {fault}" if fault else message) from fault
        raise fault or UnavailableError(
            f"the origin asked to wait longer than the deadline of {patience.deadline_s:g} s"
        )

    async def _attempt(
        self, call: Callable[[Callable[[int], None]], Awaitable[T]], effort: _Effort, *, last: bool
    ) -> T:
        """One attempt; silence is a fault like others."""
        loop, patience = asyncio.get_running_loop(), self._patience
        await self._permit(effort)
        silence_s = patience.deadline_s if last else patience.attempt_s
        timer = asyncio.timeout_at(min(effort.moved_s + patience.deadline_s, loop.time() + silence_s))

        def moved(length: int) -> None:
            effort.moved_s = self._moved_s = loop.time()
            effort.bytes += length
            if not timer.expired():
                timer.reschedule(effort.moved_s + (patience.deadline_s if last else patience.stall_s))

        effort.attempts += 1
        try:
            async with timer:
                answer = await call(moved)
                self._moved_s = loop.time()
                return answer
        except TimeoutError as error:
            raise LateError("the origin did not answer in time") from error
        finally:
            self._permits.release()

    async def _permit(self, effort: _Effort) -> None:
        """One of the permits, in order of asking; LateError when nothing has come of any call for a deadline. A wait
        for calls that get on counts as progress: it would be nobody's fault."""
        if not self._permits.locked():
            await self._permits.acquire()
            return
        loop = asyncio.get_running_loop()
        waiting = loop.create_task(self._permits.acquire())
        try:
            while not waiting.done():
                left_s = max(effort.moved_s, self._moved_s) + self._patience.deadline_s - loop.time()
                if left_s <= 0:
                    raise LateError("nothing comes of the requests that are under way, and no more are allowed")
                await asyncio.wait([waiting], timeout=left_s)
        except BaseException:
            if not waiting.cancel() and not waiting.cancelled():
                self._permits.release()
            raise
        effort.moved_s = max(effort.moved_s, self._moved_s)

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


def _rest(targets: Sequence[Buffer], start: int, length: int) -> list[Buffer]:
    """What of `targets`, one after another, bytes [start, start + length) go to."""
    found: list[Buffer] = []
    for target in targets:
        low, high = max(0, start), min(target.length, start + length)
        if low < high:
            found.append(target.slice(low, high - low))
        start -= target.length
    return found


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
