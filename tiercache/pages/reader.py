"""PageReader: spans of file versions, from pages in the cache where they are, from the origin where they are not.

What is in memory is copied in the caller's thread (`read_resident`). For the rest the cache is asked for pages; gaps
that no tier can fill come back to `_load`, become as few ranged requests as possible and land in place. Whatever the
cache cannot keep (no room, no version, damaged bytes) is read from the origin straight into the caller's memory.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from tiercache.buffers import Buffer, copy, new_bytes
from tiercache.core import Seeing
from tiercache.errors import ChangedError, TierCacheError
from tiercache.keys import page_key
from tiercache.lease import PageRun
from tiercache.model import Name, Outcome
from tiercache.origin import Span, Stat
from tiercache.pages import geometry
from tiercache.pages.facts import FileFacts
from tiercache.pages.plan import Limits, Request, plan_around, plan_requests
from tiercache.pages.readahead import ReadAhead

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator, Iterable, Sequence
    from typing import Any

    from tiercache.clock import Clock
    from tiercache.core import Notes
    from tiercache.lease import Gap, Landed, Lease, Load
    from tiercache.metrics import Metrics
    from tiercache.origin import Origin
    from tiercache.pages.geometry import Range
    from tiercache.pages.versions import Layout, Pin
    from tiercache.settings import Settings

T = TypeVar("T")

BATCH_BYTES_MAX = 64 << 20
"""Pages pinned at once by one read; longer reads go in steps, so that they fit any memory tier."""
PREFETCHES_MAX = 16
"""Read-aheads under way at once in one reader; more are not started."""
PACE_BYTES_MIN, PACE_S, PACE_FIRST, PACE_WEIGHT = 1 << 20, 4.0, 1e9, 0.5
"""No request is longer than what comes in so many seconds at the pace of the last ones, but may be this long always."""
BATCH_BYTES_MIN, BATCH_REQUESTS = 8 << 20, 8
"""One read of many pages asks for this much at once, or for so many requests, if that is more."""
COST_WEIGHT = 0.1
"""Weight of the newest request in the moving average that prices a page."""


class PageCache(Protocol):
    """What the reader asks of the cache."""

    def lease_resident(self, key: bytes, ordinals: Sequence[int], parts: Sequence[int]) -> Lease | None:
        """A lease on these parts of these pages if all are in memory now; any thread."""
        ...

    def lease_local(self, key: bytes, ordinals: Sequence[int], parts: Sequence[int]) -> Lease | None:
        """A lease on these parts of these pages if local tiers have them all; for a thread, which waits for a disk."""
        ...

    async def read_pages(self, run: PageRun, ordinals: Sequence[int], parts: Sequence[int], load: Load) -> Lease:
        """A lease on these parts of these pages; `load` brings what no tier has. Items may be FULL."""
        ...

    async def delete(self, names: Sequence[Name]) -> list[Outcome]:
        """Forgets entries."""
        ...


@dataclass(frozen=True, slots=True)
class Share:
    """Bytes [start, stop) of a file that the cache could not give, and where they go."""

    start: int
    stop: int
    target: Buffer


class PageReader:
    """Reads files of one origin through one cache. `*_resident`, `known` and `forget` work in any thread, coroutines on
    the cache's loop; `read_blocking` brings its own way of waiting for that loop."""

    def __init__(
        self,
        cache: PageCache,
        origin: Origin,
        *,
        settings: Settings,
        clock: Clock,
        metrics: Metrics,
        part_bytes: int = 0,
        notes: Notes | None = None,
    ) -> None:
        """`part_bytes` 0 is the finest that pages of `settings.page_bytes` allow."""
        self.origin, self.settings = origin, settings
        self.facts = FileFacts(origin, patience=settings, clock=clock, metrics=metrics, notes=notes)
        self._cache, self._clock, self._metrics = cache, clock, metrics
        self._part_bytes = part_bytes or geometry.part_bytes_of(settings.page_bytes)
        self._layout: Layout = (origin.identity, settings.page_bytes, self._part_bytes)
        self._batch_bytes_max = min(BATCH_BYTES_MAX, settings.memory_bytes // 4)
        self._pace = PACE_FIRST
        self._verify = settings.verify_copies
        self._cost_s = 0.0
        self._prefetches: set[asyncio.Task[None]] = set()

    # -- facts ---------------------------------------------------------------------------------------------------------

    async def open(self, path: str) -> Pin | Outcome:
        """The version of a file to read now, or GONE. The first look at an unknown file brings its last bytes too: a
        footer, or all of a small file, in the one request that brings the facts. Later looks ask for facts alone."""
        if not self.settings.tail_bytes or self.facts.met(path):
            return (await self.facts.stat([path]))[0]
        return await self.facts.stat_by(path, lambda: self._first_look(path))

    async def _first_look(self, path: str) -> Pin | Outcome:
        return await self.facts.look(path, lambda: self._look_at_tail(path), lambda: self._look(path))

    async def _look(self, path: str) -> Pin | Outcome:
        looked_s = self._clock.wall()
        answer = (await self.origin.stat([path]))[0]
        return self.facts.pin(answer, looked_s) if isinstance(answer, Stat) else answer

    async def _look_at_tail(self, path: str) -> Pin | Outcome:
        # One part more than asked for: only whole parts can be kept, and readers ask for round numbers of bytes.
        looked_s = self._clock.wall()
        answer = await self.origin.read_tail(path, self.settings.tail_bytes + self._part_bytes)
        if isinstance(answer, Outcome):
            return answer
        stat, data = answer
        pin = self.facts.pin(stat, looked_s)
        try:
            await self._keep(pin, data)
        except TierCacheError:
            pass  # the facts are good all the same; the bytes are asked for again
        return pin

    async def _keep(self, pin: Pin, data: bytes) -> None:
        """Puts the last bytes of a file into its pages, as far as they fill parts."""
        run = self.run_of(pin)
        size = pin.stat.size
        if run is None or not data:
            return
        start = size - len(data)
        ordinals, parts = geometry.inside(start, size, size, run.page_bytes, run.part_bytes)
        source = Buffer.of(data)

        async def load(gaps: Sequence[Gap], landed: Landed) -> None:
            for gap in gaps:
                begin = gap.ordinal * run.page_bytes
                length = run.page_size(gap.ordinal)
                for low, high in geometry.stretches(gap.ordinal, gap.parts, length, run.page_bytes, run.part_bytes):
                    copy(source.slice(low - start, high - low), gap.target.slice(low - begin, high - low))
            landed(range(len(gaps)))

        if ordinals:
            (await self._cache.read_pages(run, ordinals, parts, load)).release()

    # -- reading -------------------------------------------------------------------------------------------------------

    def read_resident(self, pin: Pin, start: int, stop: int) -> bytes | None:
        """Bytes [start, stop), within the file, if all can be had without the loop: from memory and, in a thread of a
        process that shares its cache, from the owner and its SSD. Any thread."""
        run = self.run_of(pin)
        if run is None:
            return None
        ordinals, parts = geometry.cover(start, stop, run.page_bytes, run.part_bytes)
        lease = self._cache.lease_resident(run.key, ordinals, parts)
        if lease is None:
            return None
        value, target = new_bytes(stop - start)
        try:
            return None if self._copy_out(run, lease, enumerate(ordinals), (start, stop), target)[0] else value
        finally:
            lease.release()

    def read_resident_into(self, pin: Pin, start: int, stop: int, target: Buffer) -> bool:
        """As `read_resident`, into memory of the caller (undefined after False)."""
        run = self.run_of(pin)
        if run is None:
            return False
        ordinals, parts = geometry.cover(start, stop, run.page_bytes, run.part_bytes)
        lease = self._cache.lease_resident(run.key, ordinals, parts)
        if lease is None:
            return False
        try:
            return not self._copy_out(run, lease, enumerate(ordinals), (start, stop), target)[0]
        finally:
            lease.release()

    def is_resident(self, pin: Pin, start: int, stop: int) -> bool:
        """Whether all of [start, stop) is in memory now, as far as this process knows without asking; any thread."""
        run = self.run_of(pin)
        if run is None:
            return False
        ordinals, parts = geometry.cover(start, stop, run.page_bytes, run.part_bytes)
        if isinstance(self._cache, Seeing):
            return self._cache.sees(run.key, ordinals, parts)
        lease = self._cache.lease_resident(run.key, ordinals, parts)
        if lease is not None:
            lease.release()
        return lease is not None

    async def read(self, pin: Pin, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of this version, cut at its end. Faults: ChangedError, UnavailableError, OriginError."""
        start, stop = clip(start, stop, pin.stat.size)
        if start >= stop:
            return b""
        value = self.read_resident(pin, start, stop)
        if value is not None:
            return value
        value, target = new_bytes(stop - start)
        await self.read_into(pin, [(start, stop)], [target])
        return value

    async def read_into(self, pin: Pin, spans: Sequence[Range], targets: Sequence[Buffer]) -> None:
        """Fills target i with span i, all in as few requests as possible. Spans lie within the file."""
        steps = self._steps(pin, spans, targets)
        answer: object = None
        try:
            while True:
                answer = await steps.send(answer)
        except StopIteration:
            return
        finally:
            steps.close()

    def read_blocking(self, pin: Pin, start: int, stop: int, wait: Callable[[Coroutine[Any, Any, Any]], Any]) -> bytes:
        """As `read`, for a thread; `wait` runs a coroutine on the cache's loop. Bytes are copied in this thread."""
        start, stop = clip(start, stop, pin.stat.size)
        if start >= stop:
            return b""
        value = self.read_resident(pin, start, stop)
        if value is None:
            value, target = new_bytes(stop - start)
            self.read_into_blocking(pin, [(start, stop)], [target], wait)
        return value

    def read_into_blocking(
        self,
        pin: Pin,
        spans: Sequence[Range],
        targets: Sequence[Buffer],
        wait: Callable[[Coroutine[Any, Any, Any]], Any],
    ) -> None:
        """As `read_into`, for a thread; see `read_blocking`."""
        steps = self._steps(pin, spans, targets, blocking=True)
        answer: object = None
        try:
            while True:
                answer = wait(steps.send(answer))
        except StopIteration:
            return
        finally:
            steps.close()

    def _steps(
        self, pin: Pin, spans: Sequence[Range], targets: Sequence[Buffer], *, blocking: bool = False
    ) -> Generator[Coroutine[Any, Any, Any], Any, None]:
        """One read as coroutines for the loop, one after the other; the copies between them run where this runs, and
        if that is a thread that may block, so do reads of the SSD."""
        run = self.run_of(pin)
        if run is None:
            shares = [Share(start, stop, target) for (start, stop), target in zip(spans, targets, strict=True)]
            yield self._around(pin, [share for share in shares if share.start < share.stop])
            return
        ordinals, parts = geometry.cover_all(spans, run.page_bytes, run.part_bytes)
        first = 0
        while first < len(ordinals):
            batch = slice(first, first + self._batch_pages)
            first = batch.stop
            local = self._cache.lease_local(run.key, ordinals[batch], parts[batch]) if blocking else None
            lease: Lease = (
                local
                if local is not None
                else (yield self._cache.read_pages(run, ordinals[batch], parts[batch], self._load(pin, run)))
            )
            with lease:
                left, bad = self._deliver(run, lease, ordinals[batch], spans, targets)
            if bad:
                yield self._drop(run, bad)
            if left:
                yield self._around(pin, left)

    def _deliver(
        self, run: PageRun, lease: Lease, ordinals: Sequence[int], spans: Sequence[Range], targets: Sequence[Buffer]
    ) -> tuple[list[Share], list[int]]:
        """Copies what this batch of pages has of the spans; answers what it did not give, and damaged pages."""
        places = {ordinal: place for place, ordinal in enumerate(ordinals)}
        low, high = ordinals[0] * run.page_bytes, (ordinals[-1] + 1) * run.page_bytes
        left: list[Share] = []
        bad: list[int] = []
        for (span_start, span_stop), target in zip(spans, targets, strict=True):
            start, stop = max(span_start, low), min(span_stop, high)
            if start < stop:
                touched = range(start // run.page_bytes, (stop - 1) // run.page_bytes + 1)
                rest, damaged = self._copy_out(
                    run,
                    lease,
                    ((places[ordinal], ordinal) for ordinal in touched),
                    (start, stop),
                    target.slice(start - span_start, stop - start),
                )
                left += rest
                bad += damaged
        return left, bad

    def _copy_out(
        self, run: PageRun, lease: Lease, pages: Iterable[tuple[int, int]], span: Range, target: Buffer
    ) -> tuple[list[Share], list[int]]:
        """Copies a span out of `pages`, (item of the lease, ordinal) each; answers as `_deliver`."""
        start, stop = span
        page_bytes, verify = run.page_bytes, self._verify
        left: list[Share] = []
        bad: list[int] = []
        for item, ordinal in pages:
            begin = ordinal * page_bytes
            low, high = max(start - begin, 0), min(stop - begin, page_bytes)
            place = target.slice(begin + low - start, high - low)
            if lease.outcomes[item] is Outcome.HIT:
                if lease.copy_into(item, low, high, place, verify=verify) is Outcome.HIT:
                    continue
                bad.append(ordinal)
            left.append(Share(begin + low, begin + high, place))
        return left, bad

    async def _drop(self, run: PageRun, ordinals: Sequence[int]) -> None:
        """Damaged pages are forgotten, so that the next reader gets them anew."""
        self._metrics.add("tiercache_corruptions_total", len(set(ordinals)), tier="memory")
        await self._cache.delete([Name(run.key, ordinal) for ordinal in dict.fromkeys(ordinals)])

    # -- read-ahead ----------------------------------------------------------------------------------------------------

    def watch(self) -> ReadAhead:
        """A new handle's read-ahead."""
        return ReadAhead(self.settings.readahead_bytes)

    def prefetch(self, pin: Pin, start: int, stop: int) -> None:
        """Begins to fetch [start, stop) in the background, unless much of that is going on; on the loop."""
        run = self.run_of(pin)
        if run is None or len(self._prefetches) >= PREFETCHES_MAX:
            return
        task = asyncio.get_running_loop().create_task(self._prefetch(pin, run, start, stop))
        self._prefetches.add(task)
        task.add_done_callback(self._prefetches.discard)

    async def _prefetch(self, pin: Pin, run: PageRun, start: int, stop: int) -> None:
        self._metrics.add("tiercache_readahead_bytes_total", stop - start)
        ordinals, parts = geometry.cover(start, stop, run.page_bytes, run.part_bytes)
        try:
            async with asyncio.timeout(self.settings.origin_deadline_s):
                lease = await self._cache.read_pages(run, ordinals, parts, self._load(pin, run))
                lease.release()
        except (TierCacheError, OSError):
            pass  # whoever reads these bytes meets the same fault, and is told

    async def close(self) -> None:
        """Ends background work; the cache and the origin are not the reader's to close."""
        tasks = list(self._prefetches)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await self.facts.close()

    # -- the origin ----------------------------------------------------------------------------------------------------

    def run_of(self, pin: Pin) -> PageRun | None:
        """The pages of a version; None when it has no version, so that nothing of it may be kept."""
        if not pin.version:
            return None
        kept = pin.run
        if kept is not None and kept[0] == self._layout:
            return kept[1]
        identity, page_bytes, part_bytes = self._layout
        key = page_key(identity, pin.stat.path, pin.version, page_bytes, part_bytes)
        run = PageRun(key, pin.stat.size, page_bytes, part_bytes, cost_s=self._cost_s)
        pin.run = self._layout, run
        return run

    def _load(self, pin: Pin, run: PageRun) -> Load:
        """What the cache calls to have gaps filled."""

        async def load(gaps: Sequence[Gap], landed: Landed) -> None:
            requests = plan_requests(run, [(gap.ordinal, gap.parts) for gap in gaps], self._limits)
            waiting = [0] * len(gaps)
            for request in requests:
                for piece in request.pieces:
                    waiting[piece.gap] += 1

            async def fetch(request: Request) -> None:
                left = list(reversed(request.pieces))

                def reached(stop: int) -> None:
                    done: list[int] = []
                    while left and left[-1].stop <= stop:
                        gap = left.pop().gap
                        waiting[gap] -= 1
                        if not waiting[gap]:
                            done.append(gap)
                    if done:
                        landed(done)

                span, targets = (request.start, request.stop), self._targets(run, request, gaps)
                await self._fetch(pin, span, targets, reached)

            await together([fetch(request) for request in requests])

        return load

    @property
    def _limits(self) -> Limits:
        """A request is no longer than what comes in some seconds: others wait for it, and may want its last byte."""
        longest = min(self.settings.request_bytes_max, max(PACE_BYTES_MIN, int(self._pace * PACE_S)))
        return Limits(longest, self.settings.merge_gap_bytes)

    @property
    def _batch_pages(self) -> int:
        """How many pages are asked for at once: fewer where even requests of the shortest length take long."""
        size = min(self._batch_bytes_max, max(BATCH_BYTES_MIN, BATCH_REQUESTS * self._limits.request_bytes_max))
        return max(1, size // self.settings.page_bytes)

    def _targets(self, run: PageRun, request: Request, gaps: Sequence[Gap]) -> list[Buffer]:
        """Where the bytes of a request go, in order; holes go to memory that nobody looks at."""
        targets: list[Buffer] = []
        at = request.start
        for piece in request.pieces:
            if piece.start > at:
                targets.append(new_bytes(piece.start - at)[1])
            gap = gaps[piece.gap]
            targets.append(gap.target.slice(piece.start - gap.ordinal * run.page_bytes, piece.stop - piece.start))
            at = piece.stop
        return targets

    async def _around(self, pin: Pin, shares: Sequence[Share]) -> None:
        """Reads straight into the caller's memory; neighbouring shares in one request."""
        jobs: list[tuple[Range, list[Buffer]]] = []
        longest = self._limits.request_bytes_max
        for share in sorted(shares, key=lambda each: each.start):
            if jobs and jobs[-1][0][1] == share.start and share.stop - jobs[-1][0][0] <= longest:
                (start, _), targets = jobs[-1]
                jobs[-1] = ((start, share.stop), [*targets, share.target])
                continue
            for low, high in plan_around(share.start, share.stop, longest):
                jobs.append(((low, high), [share.target.slice(low - share.start, high - low)]))
        await together([self._fetch(pin, span, targets) for span, targets in jobs])

    async def _fetch(
        self, pin: Pin, span: Range, targets: Sequence[Buffer], reached: Callable[[int], None] = lambda _: None
    ) -> None:
        """One request to the origin, which tells how far it has come where the origin can. A changed object is told
        clearly, and its facts are forgotten."""
        began_s, at = self._clock.monotonic(), span[0]

        def came(length: int) -> None:
            nonlocal at
            at += length
            reached(at)

        growing = getattr(self.origin, "read_growing", None)
        try:
            if growing is not None:
                await growing(pin.stat, Span(span[0], span[1] - span[0]), targets, came)
            else:
                await self.origin.read(pin.stat, Span(span[0], span[1] - span[0]), targets)
                reached(span[1])
        except ChangedError as fault:
            self.facts.forget([pin.stat.path])
            self._metrics.add("tiercache_changed_objects_total")
            version = pin.version or "without a name"
            message = f"{pin.stat.path} changed at its origin while version {version} of it was read: open it again"
            raise ChangedError(message) from fault
        took_s = self._clock.monotonic() - began_s
        self._cost_s += COST_WEIGHT * (took_s - self._cost_s)
        if span[1] - span[0] >= PACE_BYTES_MIN and took_s > 0:  # shorter ones tell of latency
            pace = (span[1] - span[0]) / took_s
            self._pace = min(pace, self._pace + PACE_WEIGHT * (pace - self._pace))  # down at once, up slowly


def clip(start: int, stop: int, size: int) -> Range:
    """The part of [start, stop) that a file of `size` bytes has."""
    return max(0, min(start, size)), max(0, min(stop, size))


async def together(coroutines: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Runs all of them; the first fault ends the others and is raised when they have ended and none writes any more."""
    if len(coroutines) == 1:
        await coroutines[0]
        return
    try:
        async with asyncio.TaskGroup() as group:
            for coroutine in coroutines:
                group.create_task(coroutine)
    except BaseExceptionGroup as faults:
        raise faults.exceptions[0] from None
