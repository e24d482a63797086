"""Facts about files and directories of one origin: asked once, believed briefly, forgotten at every write.

With notes, all this holds for every process of the directory together: see sharing.py.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import wait
from typing import TYPE_CHECKING, Protocol

from tiercache.model import Outcome
from tiercache.origin import Stat
from tiercache.pages.sharing import LISTING, STAT, Found, Sharing
from tiercache.pages.versions import Pin, Remembered, version_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Sequence
    from concurrent.futures import Future
    from typing import Any

    from tiercache.clock import Clock
    from tiercache.core import Notes
    from tiercache.metrics import Metrics
    from tiercache.origin import Origin
    from tiercache.pages.sharing import Answer

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
    @property
    def origin_deadline_s(self) -> float: ...
    @property
    def owner_deadline_s(self) -> float: ...


def ancestors(path: str) -> list[str]:
    """Every directory above a path, the root (empty) included: what appears or vanishes with it."""
    return [path[:i] for i, letter in enumerate(path) if letter == "/"] + [""]


def _telling(pin: Pin) -> bool:
    """Whether a listing's row is as good as a stat: one that says neither version nor time knows less."""
    return bool(pin.stat.version) or pin.stat.mtime_s is not None or pin.stat.is_directory


class FileFacts:
    """Stats and listings of one origin. `known` and `forget` work in any thread, the coroutines on the cache's loop.

    However many readers ask for one path at once, the origin is asked once.
    """

    def __init__(
        self, origin: Origin, *, patience: Patience, clock: Clock, metrics: Metrics, notes: Notes | None = None
    ) -> None:
        self._origin, self._patience, self._clock, self._metrics = origin, patience, clock, metrics
        self._stats: Remembered[Pin | Outcome] = Remembered(clock, FACTS_MAX)
        self._listings: Remembered[list[Pin] | Outcome] = Remembered(clock, LISTINGS_MAX)
        self._asking: dict[tuple[str, str], asyncio.Task[Any]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._notes = notes
        self._sharing: Sharing | None = None
        if notes is not None:
            self._sharing = Sharing(notes, origin.identity, clock, wait_s=patience.origin_deadline_s)
            notes.watch(self._forgotten)

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

    def forget(self, paths: Iterable[str], *, below: bool = False) -> Future[None] | None:
        """Drops what is known of paths (and of everything below them) and of the directories that contain them.

        In this process at once; the answer, if any, is done when every other process of the directory was told.
        """
        given = list(paths)
        names = {name for path in given for name in (path, path.rstrip("/"), *ancestors(path))}
        if self._sharing is not None:
            return self._sharing.forget(names, given if below else ())  # which calls `_forgotten`
        self._drop(names, given if below else ())
        return None

    async def forget_shared(self, paths: Iterable[str], *, below: bool = False) -> None:
        """As `forget`, and returns when no process of the directory believes any more what was known; one that does
        not react for `owner_deadline_s` is not waited for, however long it believes."""
        told = self.forget(paths, below=below)
        if told is not None:
            await asyncio.wait([asyncio.wrap_future(told)], timeout=self._patience.owner_deadline_s)

    def forget_blocking(self, paths: Iterable[str], *, below: bool = False) -> None:
        """As `forget_shared`, for any thread but the loop's."""
        told = self.forget(paths, below=below)
        if told is not None:
            wait([told], timeout=self._patience.owner_deadline_s)

    def _drop(self, paths: Collection[str], directories: Collection[str]) -> None:
        """Exactly these paths, and these directories with what lies below them."""
        for path in directories:
            self._stats.forget_below(path)
            self._listings.forget_below(path)
        self._stats.forget(paths)
        self._listings.forget(paths)
        # Answers to questions that were asked before are no longer for those who ask from now on.
        self._asking.clear()

    def _forgotten(self, prefixes: Sequence[bytes]) -> None:
        """Some process, this one perhaps, forgot these notes; any thread."""
        assert self._sharing is not None
        paths, directories = self._sharing.forgotten(prefixes)
        if paths or directories:
            self._drop(paths, directories)

    def pin(self, stat: Stat, looked_s: float | None = None) -> Pin:
        """The version that was seen by a look that began at wall time `looked_s`, or ended now."""
        looked_s = self._clock.wall() if looked_s is None else looked_s
        return Pin(stat, version_of(stat, looked_s, self._patience.mtime_settle_s))

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
            asked.update(self._begin(fresh))
        for path, task in asked.items():
            answers[path] = (await asyncio.shield(task))[path]
        return [answers[path] for path in paths]

    async def stat_by(self, path: str, look: Callable[[], Awaitable[Pin | Outcome]]) -> Pin | Outcome:
        """As `stat` for one path, where `look` gets the facts by a request that brings more than facts."""
        known = self._stats.get(path)
        if known is not None:
            self._count(1, 0)
            return known

        async def ask() -> Answer:
            found = await look()
            return found.stat if isinstance(found, Pin) else found

        task = self._asking.get(("stat", path))
        if task is None:
            self._count(0, 1)
            task = self._ask([("stat", path)], self._stat_one(path, ask))
        answers: dict[str, Pin | Outcome] = await asyncio.shield(task)
        return answers[path]

    async def look(
        self, path: str, tail: Callable[[], Awaitable[Pin | Outcome]], plain: Callable[[], Awaitable[Pin | Outcome]]
    ) -> Pin | Outcome:
        """A look at the origin that brings a file's last bytes, or a `plain` one where another process has brought
        them."""
        return await (tail() if self._sharing is None else self._sharing.tail(path, tail, plain))

    def _begin(self, paths: Sequence[str]) -> dict[str, asyncio.Task[dict[str, Pin | Outcome]]]:
        """Asks for paths that nobody asks for yet; by path, who will know."""
        if self._sharing is None:
            return dict.fromkeys(paths, self._ask([("stat", path) for path in paths], self._stat_now(paths)))

        def ask(path: str) -> Callable[[], Awaitable[Answer]]:
            async def one() -> Answer:
                return (await self._origin.stat([path]))[0]

            return one

        # One at a time: two processes that wait for each other's paths before they find out their own wait forever.
        return {path: self._ask([("stat", path)], self._stat_one(path, ask(path))) for path in paths}

    async def _stat_one(self, path: str, ask: Callable[[], Awaitable[Answer]]) -> dict[str, Pin | Outcome]:
        listed = await self._find_listed(path)
        if listed is not None:
            return {path: listed}
        found = await self._find(STAT, path, ask, lambda: self._stats.epoch)
        answer = found.answer
        assert not isinstance(answer, list)
        known = self.pin(answer, found.looked_s) if isinstance(answer, Stat) else answer
        self._stats.put(path, known, found.left_s, found.epoch)
        return {path: known}

    async def _find_listed(self, path: str) -> Pin | None:
        """A file's facts from the listing of its directory, where another process has that: as if it were ours."""
        parent = path.rpartition("/")[0]
        if self._sharing is None or self._patience.stat_ttl_s <= 0.0 or self._listings.get(parent) is not None:
            return None
        stats_epoch = self._stats.epoch
        found = await self._sharing.listed(parent, self._ttl_s, lambda: self._listings.epoch)
        if found is None or not isinstance(found.answer, list):
            return None
        pins = self._remember_listing(parent, found, stats_epoch)
        return next((pin for pin in pins if pin.stat.path == path and _telling(pin)), None)

    async def _stat_now(self, paths: Sequence[str]) -> dict[str, Pin | Outcome]:
        epoch, looked_s = self._stats.epoch, self._clock.wall()
        stats = await self._origin.stat(paths)
        answers: dict[str, Pin | Outcome] = {}
        for path, stat in zip(paths, stats, strict=True):
            answers[path] = self.pin(stat, looked_s) if isinstance(stat, Stat) else stat
        there = [(path, found) for path, found in answers.items() if isinstance(found, Pin)]
        gone = [(path, found) for path, found in answers.items() if found is Outcome.GONE]
        self._stats.put_many(there, self._patience.stat_ttl_s, epoch)
        self._stats.put_many(gone, self._patience.negative_ttl_s, epoch)
        return answers

    async def children(self, path: str, *, refresh: bool = False) -> list[Pin] | Outcome:
        """Direct children of a directory, or GONE; `refresh` asks the origin also when an answer is remembered."""
        known = None if refresh else self._listings.get(path)
        if known is not None:
            self._count(1, 0)
            return known
        task = None if refresh else self._asking.get(("list", path))
        if task is None:
            self._count(0, 1)
            task = self._ask([("list", path)], self._list_now(path, anew=refresh))
        found: list[Pin] | Outcome = await asyncio.shield(task)
        return found

    async def _list_now(self, path: str, *, anew: bool) -> list[Pin] | Outcome:
        stats_epoch = self._stats.epoch

        async def ask() -> Answer:
            nonlocal stats_epoch
            stats_epoch = self._stats.epoch
            return await self._origin.list(path)

        found = await self._find(LISTING, path, ask, lambda: self._listings.epoch, anew=anew)
        answer = found.answer
        if isinstance(answer, Outcome):
            self._listings.put(path, answer, found.left_s, found.epoch)
            return answer
        return self._remember_listing(path, found, stats_epoch)

    def _remember_listing(self, path: str, found: Found, stats_epoch: int) -> list[Pin]:
        assert isinstance(found.answer, list)
        children = [self.pin(stat, found.looked_s) for stat in found.answer]
        self._listings.put(path, children, found.left_s, found.epoch)
        self._stats.put_many([(pin.stat.path, pin) for pin in children if _telling(pin)], found.left_s, stats_epoch)
        return children

    async def _find(
        self,
        kind: bytes,
        path: str,
        ask: Callable[[], Awaitable[Answer]],
        epoch: Callable[[], int],
        *,
        anew: bool = False,
    ) -> Found:
        """What another process found out, unless it must be `anew`, or what the origin says."""
        if self._sharing is not None and not anew and self._patience.stat_ttl_s > 0.0:
            return await self._sharing.find(kind, path, ask, self._ttl_s, epoch)
        since, looked_s = epoch(), self._clock.wall()
        answer = await ask()
        return Found(answer, looked_s, self._ttl_s(answer), since)

    def _ttl_s(self, answer: Answer) -> float:
        """How long to believe an answer."""
        if isinstance(answer, Outcome):
            return self._patience.negative_ttl_s if answer is Outcome.GONE else 0.0
        return self._patience.stat_ttl_s

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
        if self._notes is not None:
            self._notes.unwatch(self._forgotten)
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
