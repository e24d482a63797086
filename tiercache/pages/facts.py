"""Facts about files and directories of one origin: asked once, believed briefly, forgotten at every write."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

from tiercache.model import Outcome
from tiercache.origin import Stat
from tiercache.pages.versions import Pin, Remembered, version_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
    from typing import Any

    from tiercache.clock import Clock
    from tiercache.metrics import Metrics
    from tiercache.origin import Origin

FACTS_MAX = 1 << 16
LISTINGS_MAX = 1 << 12


class Patience(Protocol):
    """What this module reads of the settings."""

    @property
    def stat_ttl_s(self) -> float: ...
    @property
    def negative_ttl_s(self) -> float: ...
    @property
    def mtime_settle_s(self) -> float: ...


def ancestors(path: str) -> list[str]:
    """Every directory above a path, the root (empty) included: what appears or vanishes with it."""
    return [path[:i] for i, letter in enumerate(path) if letter == "/"] + [""]


class FileFacts:
    """Stats and listings of one origin. `known` and `forget` work in any thread, the coroutines on the cache's loop.

    However many readers ask for one path at once, the origin is asked once.
    """

    def __init__(self, origin: Origin, *, patience: Patience, clock: Clock, metrics: Metrics) -> None:
        self._origin, self._patience, self._clock, self._metrics = origin, patience, clock, metrics
        self._stats: Remembered[Pin | Outcome] = Remembered(clock, FACTS_MAX)
        self._listings: Remembered[list[Pin] | Outcome] = Remembered(clock, LISTINGS_MAX)
        self._asking: dict[tuple[str, str], asyncio.Task[Any]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    # -- any thread ----------------------------------------------------------------------------------------------------

    def known(self, path: str) -> Pin | Outcome | None:
        """A Pin or GONE if that is remembered, else None."""
        return self._stats.get(path)

    def met(self, path: str) -> bool:
        """Whether this file was looked at before, however long ago, and not forgotten."""
        return isinstance(self._stats.last(path), Pin)

    def known_listing(self, path: str) -> list[Pin] | Outcome | None:
        """Children or GONE if that is remembered, else None."""
        return self._listings.get(path)

    def forget(self, paths: Iterable[str], *, below: bool = False) -> None:
        """Drops what is known of paths (and of everything below them) and of the directories that contain them."""
        for path in paths:
            names = [path, path.rstrip("/"), *ancestors(path)]
            if below:
                self._stats.forget_below(path)
                self._listings.forget_below(path)
            self._stats.forget(names)
            self._listings.forget(names)
        # Answers to questions that were asked before are no longer for those who ask from now on.
        self._asking.clear()

    def pin(self, stat: Stat) -> Pin:
        """The version that was just seen."""
        return Pin(stat, version_of(stat, self._clock.wall(), self._patience.mtime_settle_s))

    # -- on the loop ---------------------------------------------------------------------------------------------------

    async def stat(self, paths: Sequence[str]) -> list[Pin | Outcome]:
        """A Pin (also for directories that the origin knows as such) or GONE for each path."""
        answers = {path: found for path in paths if (found := self._stats.get(path)) is not None}
        self._count(len(answers), 0)
        asked: dict[str, asyncio.Task[dict[str, Pin | Outcome]]] = {}
        for path in paths:
            if path not in answers and (task := self._asking.get(("stat", path))) is not None:
                asked[path] = task
        fresh = [path for path in dict.fromkeys(paths) if path not in answers and path not in asked]
        if fresh:
            self._count(0, len(fresh))
            task = self._ask([("stat", path) for path in fresh], self._stat_now(fresh))
            asked.update(dict.fromkeys(fresh, task))
        for path, task in asked.items():
            answers[path] = (await asyncio.shield(task))[path]
        return [answers[path] for path in paths]

    async def stat_by(self, path: str, look: Callable[[], Awaitable[Pin | Outcome]]) -> Pin | Outcome:
        """As `stat` for one path, where `look` gets the facts by a request that brings more than facts."""
        known = self._stats.get(path)
        if known is not None:
            self._count(1, 0)
            return known

        async def now() -> dict[str, Pin | Outcome]:
            epoch = self._stats.epoch
            answers = {path: await look()}
            self._remember(answers, epoch)
            return answers

        task = self._asking.get(("stat", path))
        if task is None:
            self._count(0, 1)
            task = self._ask([("stat", path)], now())
        answers: dict[str, Pin | Outcome] = await asyncio.shield(task)
        return answers[path]

    async def _stat_now(self, paths: Sequence[str]) -> dict[str, Pin | Outcome]:
        epoch = self._stats.epoch
        stats = await self._origin.stat(paths)
        answers: dict[str, Pin | Outcome] = {}
        for path, stat in zip(paths, stats, strict=True):
            answers[path] = self.pin(stat) if isinstance(stat, Stat) else stat
        self._remember(answers, epoch)
        return answers

    def _remember(self, answers: dict[str, Pin | Outcome], epoch: int) -> None:
        there = [(path, found) for path, found in answers.items() if isinstance(found, Pin)]
        gone = [(path, found) for path, found in answers.items() if found is Outcome.GONE]
        self._stats.put_many(there, self._patience.stat_ttl_s, epoch)
        self._stats.put_many(gone, self._patience.negative_ttl_s, epoch)

    async def children(self, path: str, *, refresh: bool = False) -> list[Pin] | Outcome:
        """Direct children of a directory, or GONE; `refresh` asks the origin also when an answer is remembered."""
        known = None if refresh else self._listings.get(path)
        if known is not None:
            self._count(1, 0)
            return known
        task = None if refresh else self._asking.get(("list", path))
        if task is None:
            self._count(0, 1)
            task = self._ask([("list", path)], self._list_now(path))
        found: list[Pin] | Outcome = await asyncio.shield(task)
        return found

    async def _list_now(self, path: str) -> list[Pin] | Outcome:
        epochs = self._stats.epoch, self._listings.epoch
        found = await self._origin.list(path)
        if isinstance(found, Outcome):
            self._listings.put(path, found, self._patience.negative_ttl_s, epochs[1])
            return found
        children = [self.pin(stat) for stat in found]
        self._listings.put(path, children, self._patience.stat_ttl_s, epochs[1])
        # A listing that says neither version nor time knows less than a stat would.
        telling = [pin for pin in children if pin.stat.version or pin.stat.mtime_s is not None or pin.stat.is_directory]
        self._stats.put_many([(pin.stat.path, pin) for pin in telling], self._patience.stat_ttl_s, epochs[0])
        return children

    # -- questions under way -------------------------------------------------------------------------------------------

    def _ask(self, asks: Sequence[tuple[str, str]], question: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Runs a question in a task of its own, so that one impatient reader does not end it for the others."""
        task = asyncio.get_running_loop().create_task(question)
        self._tasks.add(task)
        for ask in asks:
            self._asking[ask] = task

        def end(done: asyncio.Task[Any]) -> None:
            self._tasks.discard(done)
            for ask in asks:
                if self._asking.get(ask) is done:
                    self._asking.pop(ask, None)
            if not done.cancelled():
                done.exception()  # whoever waits gets it; nobody waiting is no fault

        task.add_done_callback(end)
        return task

    def _count(self, hits: int, misses: int) -> None:
        if hits:
            self._metrics.add("tiercache_stat_hits_total", hits)
        if misses:
            self._metrics.add("tiercache_stat_misses_total", misses)

    async def close(self) -> None:
        """Ends questions under way."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
