"""Reading: parts of blocks out of packs, several requests at once, verified, within a deadline."""

from __future__ import annotations

import asyncio
import threading
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from tiercache.errors import TierCacheError
from tiercache.model import Outcome, Payload
from tiercache.remote import packs
from tiercache.remote.asking import READ
from tiercache.remote.packs import Want

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tiercache.buffers import Buffer
    from tiercache.metrics import Metrics
    from tiercache.remote.asking import Asking
    from tiercache.remote.catalog import Catalog, Pack
    from tiercache.remote.packs import Span

REQUESTS = 8
"""Requests for bytes that are under way at once."""
DEADLINE_BYTES = 64 << 20
"""A call may take one deadline, and one more for each of these that it asks for."""

REQUEST_SHARE = 0.8
"""A request may take this share of the deadline: it fails, and is known to have failed, before the call is over."""

Answer = tuple[Outcome, bytes]


class Item(NamedTuple):
    """One entry of a call: where it is in the question, what is wanted, and where it goes."""

    at: int
    want: Want
    target: Buffer


class Gate:
    """Whether targets may still be written to: no thread begins to after `end`, which waits for those that have begun.
    No lock is held while bytes move."""

    def __init__(self) -> None:
        self._lock, self._over, self._under_way = threading.Lock(), False, 0
        self._loop, self._quiet = asyncio.get_running_loop(), asyncio.Event()

    def land(self, key: str, item: Item, pieces: Sequence[tuple[int, memoryview]]) -> Answer:
        """See packs.land."""
        with self._lock:
            if self._over:
                return Outcome.MISS, b""
            self._under_way += 1
        try:
            return packs.land(key, item.want, pieces, item.target)
        finally:
            self._leave()

    def _leave(self) -> None:
        with self._lock:
            self._under_way -= 1
            if self._over and not self._under_way:
                self._loop.call_soon_threadsafe(self._quiet.set)

    async def end(self) -> None:
        """From now on nothing is written. Waits for copies under way, of bytes that are here, also when cancelled."""
        with self._lock:
            self._over = True
            if not self._under_way:
                return
        cancelled = False
        while not self._quiet.is_set():
            try:
                await self._quiet.wait()
            except asyncio.CancelledError:
                cancelled = True
        if cancelled:
            raise asyncio.CancelledError


class Reading:
    """Reads of one bucket; on the loop."""

    def __init__(self, asking: Asking, catalog: Catalog, *, metrics: Metrics) -> None:
        self._asking, self._catalog, self._metrics = asking, catalog, metrics
        self._permits = asyncio.Semaphore(REQUESTS)

    async def read(self, wanted: Sequence[Payload], targets: Sequence[Buffer]) -> list[Answer]:
        """See RemoteBlocks.read."""
        answers: list[Answer] = [(Outcome.MISS, b"")] * len(wanted)
        groups: dict[str, tuple[Pack, list[Item]]] = {}
        size = 0
        for i, (payload, target) in enumerate(zip(wanted, targets, strict=True)):
            place = self._catalog.place(payload.name.key)
            if place is not None and target.length == payload.size:
                pack, offset = place
                groups.setdefault(pack.key, (pack, []))[1].append(Item(i, Want(payload, offset), target))
                size += payload.size
        gate = Gate()
        deadline_s = self._asking.deadline_s * (1 + size / DEADLINE_BYTES)
        try:
            async with asyncio.timeout(deadline_s), asyncio.TaskGroup() as group:
                for pack, items in groups.values():
                    group.create_task(self._read_pack(pack, items, answers, gate))
        except TimeoutError:
            late = sum(1 for outcome, _ in answers if outcome is Outcome.MISS)
            self._metrics.add("tiercache_deadline_misses_total", late, tier="remote")
        finally:
            await gate.end()
        good = sum(wanted[i].parts.bit_count() * wanted[i].part_bytes for i, (one, _) in enumerate(answers) if not one)
        self._metrics.add("tiercache_read_bytes_total", good, tier="remote")
        return answers

    async def _read_pack(self, pack: Pack, items: Sequence[Item], answers: list[Answer], gate: Gate) -> None:
        """Whatever can be had of one pack; what cannot stays a miss."""
        self._catalog.touch(pack)
        spans = packs.plan([item.want for item in items])
        found = await asyncio.gather(*[self._fetch(pack, span) for span in spans])
        pieces = [(span.start, data) for span, data in zip(spans, found, strict=True) if data is not None]
        if not pieces:
            return
        for item in items:
            try:
                answer = await self._asking.work(partial(gate.land, pack.key, item, pieces))
            except TierCacheError:  # it was closed
                return
            answers[item.at] = answer
            if answer[0] is Outcome.CORRUPT:
                self._catalog.forget(item.want.payload.name.key, pack)

    async def _fetch(self, pack: Pack, span: Span) -> memoryview | None:
        async with self._permits:
            if pack.key not in self._catalog.packs:
                return None
            try:
                data = await self._asking.ask(
                    READ,
                    lambda bucket: bucket.get(pack.key, span.start, span.stop - span.start),
                    within_s=self._asking.deadline_s * REQUEST_SHARE,
                )
            except (TierCacheError, OSError):
                return None
        if data is None:
            self._catalog.drop(pack.key)  # it was evicted by its writer
        return data
