"""MemoryOrigin: objects in a dictionary behind the Origin port, with counters and a hook in every call."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING

from tiercache.buffers import Buffer, copy
from tiercache.errors import ChangedError, ClosedError, OriginError
from tiercache.model import Outcome
from tiercache.origin import Span, Stat

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    Hook = Callable[[str, str], Awaitable[None] | None]


class MemoryOrigin:
    """An origin in memory, on any loop, the simulated one too. Every put makes a version, the one before is gone.

    `delay_s` passes before each answer. `on_call(operation, path)` runs in the middle of each call, after the request
    is counted and before the object is looked at: it may wait, raise what a real origin would, or change objects.
    """

    identity = "memory+test"

    def __init__(self, *, delay_s: float = 0.0, on_call: Hook | None = None) -> None:
        self.objects: dict[str, tuple[Stat, bytes]] = {}
        self.delay_s = delay_s
        self.on_call = on_call
        self.calls: Counter[str] = Counter()
        self.reads: list[tuple[str, Span]] = []
        self.bytes_sent = 0
        self.under_way = 0
        self.under_way_max = 0
        self._puts = 0
        self._closed = False

    def put(self, path: str, data: bytes) -> Stat:
        """Creates or replaces an object, outside of the port."""
        self._puts += 1
        stat = Stat(path, len(data), f"v{self._puts}", 1e9 + self._puts)
        self.objects[path] = (stat, bytes(data))
        return stat

    def remove(self, path: str) -> None:
        """Removes an object, outside of the port."""
        del self.objects[path]

    async def stat(self, paths: Sequence[str]) -> list[Stat | Outcome]:
        """See Origin."""
        found = []
        for path in paths:
            await self._call("stat", path)
            stat = self.objects[path][0] if path in self.objects else Outcome.GONE
            if stat is Outcome.GONE and self._children(path):
                stat = Stat(path, 0, is_directory=True)
            found.append(stat)
        return found

    async def read(self, stat: Stat, span: Span, targets: Sequence[Buffer]) -> None:
        """See Origin."""
        self.reads.append((stat.path, span))
        await self._call("read", stat.path)
        now, data = self.objects.get(stat.path, (None, b""))
        if now is None or (now.version, now.size) != (stat.version, stat.size):
            raise ChangedError(f"{stat.path}: version {stat.version} is gone")
        if span.start + span.length > len(data) or sum(map(len, targets)) != span.length:
            raise OriginError(f"{stat.path}: {span} is not in the object, or not as long as the targets")
        source = Buffer.of(data)
        start = span.start
        for target in targets:
            copy(source.slice(start, target.length), target)
            start += target.length
        self.bytes_sent += span.length

    async def read_tail(self, path: str, length: int) -> tuple[Stat, bytes] | Outcome:
        """See Origin."""
        await self._call("tail", path)
        if path not in self.objects:
            return Outcome.GONE
        stat, data = self.objects[path]
        tail = data[max(0, len(data) - length) :]
        self.bytes_sent += len(tail)
        return stat, tail

    async def write(self, path: str, data: bytes | memoryview) -> Stat:
        """See Origin."""
        await self._call("write", path)
        return self.put(path, bytes(data))

    async def delete(self, paths: Sequence[str]) -> list[Outcome]:
        """See Origin."""
        outcomes = []
        for path in paths:
            await self._call("delete", path)
            outcomes.append(Outcome.HIT if self.objects.pop(path, None) else Outcome.GONE)
        return outcomes

    async def close(self) -> None:
        """See Origin."""
        self._closed = True

    async def _call(self, operation: str, path: str) -> None:
        if self._closed:
            raise ClosedError("the origin was closed")
        self.calls[operation] += 1
        self.under_way += 1
        self.under_way_max = max(self.under_way_max, self.under_way)
        try:
            await asyncio.sleep(self.delay_s)
            waiting = self.on_call(operation, path) if self.on_call is not None else None
            if waiting is not None:
                await waiting
        finally:
            self.under_way -= 1

    def _children(self, path: str) -> dict[str, Stat]:
        prefix = path.rstrip("/") + "/" if path.strip("/") else ""
        found: dict[str, Stat] = {}
        for name, (stat, _) in self.objects.items():
            if name.startswith(prefix):
                child, deeper, _rest = name[len(prefix) :].partition("/")
                found[prefix + child] = Stat(prefix + child, 0, is_directory=True) if deeper else stat
        return found

    async def list(self, path: str) -> list[Stat] | Outcome:
        """See Origin."""
        await self._call("list", path)
        found = self._children(path)
        return [found[name] for name in sorted(found)] if found else Outcome.GONE
