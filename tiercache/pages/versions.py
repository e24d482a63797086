"""Identity of file versions, and what is remembered of an origin's facts for a short time.

A version is what the origin names (ETag or version id) with the size, else size and modification time, provided that
this time lies at least `settle_s` before the look: within its resolution a file can change and keep its time. A weak
ETag (W/"...") promises the same meaning, not the same bytes: it is none. A file without a version is read around the
cache.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tiercache.clock import Clock
    from tiercache.lease import PageRun
    from tiercache.origin import Stat

T = TypeVar("T")

Layout = tuple[str, int, int]
"""What pages a reader makes: the origin's identity, page_bytes, part_bytes."""


def version_of(stat: Stat, looked_s: float, settle_s: float) -> str:
    """Version of a file as it was seen at wall time `looked_s`; empty when it has none that can be trusted."""
    if stat.version and not stat.version.startswith("W/"):
        return f"v{stat.size}:{stat.version}"
    if stat.mtime_s is not None and looked_s - stat.mtime_s >= settle_s:
        return f"m{stat.size}:{stat.mtime_s!r}"
    return ""


class Pin:
    """One version of one file, as a handle reads it for its whole life; handles that saw the same facts share it."""

    __slots__ = ("run", "stat", "version")

    def __init__(self, stat: Stat, version: str) -> None:
        """`version` is empty when this file has none that can be trusted."""
        self.stat = stat
        self.version = version
        self.run: tuple[Layout, PageRun] | None = None
        """Its pages as one reader makes them, told together: a handle may outlive its reader, and the next one may make
        other pages. See PageReader.run_of."""


class Remembered(Generic[T]):
    """Values by path that are believed for a short time; bounded, thread-safe, forgotten at once when told.

    A look that began before something was forgotten must not bring old facts back: take `epoch` before asking the
    origin and hand it to `put`.
    """

    def __init__(self, clock: Clock, entries_max: int) -> None:
        self._clock = clock
        self._entries_max = entries_max
        self._values: dict[str, tuple[T, float]] = {}
        self._lock = threading.Lock()
        self.epoch = 0

    def __len__(self) -> int:
        return len(self._values)

    def get(self, path: str) -> T | None:
        """The value, if it is known and still believed."""
        found = self._values.get(path)
        if found is None or found[1] <= self._clock.monotonic():
            return None
        return found[0]

    def last(self, path: str) -> T | None:
        """The value that was put last and not forgotten since, still believed or not."""
        found = self._values.get(path)
        return None if found is None else found[0]

    def put(self, path: str, value: T, ttl_s: float, epoch: int) -> None:
        """Remembers a value for `ttl_s`, unless anything was forgotten since `epoch` was read."""
        self.put_many([(path, value)], ttl_s, epoch)

    def put_many(self, items: Iterable[tuple[str, T]], ttl_s: float, epoch: int) -> None:
        """As `put`, for many paths."""
        expiry_s = self._clock.monotonic() + ttl_s
        with self._lock:
            if epoch != self.epoch or ttl_s <= 0:
                return
            for path, value in items:
                self._values.pop(path, None)  # to the end: the oldest go first
                self._values[path] = (value, expiry_s)
            while len(self._values) > self._entries_max:
                del self._values[next(iter(self._values))]

    def forget(self, paths: Iterable[str]) -> None:
        """Drops exactly these paths."""
        with self._lock:
            self.epoch += 1
            for path in paths:
                self._values.pop(path, None)

    def forget_below(self, path: str) -> None:
        """Drops this path and everything below it; everything at all when it is empty."""
        below = path.rstrip("/") + "/"
        with self._lock:
            self.epoch += 1
            if below == "/":
                self._values.clear()
                return
            for known in [key for key in self._values if key == path or key.startswith(below)]:
                del self._values[known]
