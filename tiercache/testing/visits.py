"""A house with a door, and visitors: a real cache with a real door on this loop, and clients that speak raw frames.

Visitors fill and read the house's memory directly, as processes do that have it mapped. When everybody has gone the
house is looked over: no pin, no load, no extent may be left.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from tiercache.assemble import build
from tiercache.buffers import Buffer, copy, part_digests
from tiercache.clock import SystemClock
from tiercache.cpu import layout
from tiercache.cpu.tier import MemoryTier
from tiercache.metrics import Metrics
from tiercache.model import Form, Kind, Name, Outcome, TierId, all_parts, part_bytes_for
from tiercache.settings import Settings
from tiercache.wire import frames, sockets
from tiercache.wire.door import Door
from tiercache.wire.frames import Gap, Grants, Landed, Op, Patience, ReadAsk, ReserveAsk
from tiercache.wire.hello import LINE, Hello, pack_hello
from tiercache.wire.line import Line
from tiercache.wire.session import LAST

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from tiercache.lease import PageRun
    from tiercache.wire.frames import Frame
    from tiercache.wire.served import Limits

MIB = 1 << 20


def nobody_watches(*_: object) -> None:
    """The end of a process' last connection is its end: a test's visitors are all one process."""


class House:
    """A cache and its door; `async with` it."""

    def __init__(
        self,
        directory: Path,
        *,
        memory_bytes: int = 32 * MIB,
        ssd_bytes: int = 0,
        limits: Limits | None = None,
        watch: Callable[..., Any] = nobody_watches,
    ) -> None:
        self.directory = str(directory)
        settings = Settings(
            directory=self.directory,
            memory_bytes=memory_bytes,
            ssd_bytes=ssd_bytes,
            slots_max=4096,
            segment_bytes=4 * MIB,
            queue_bytes=MIB,
            disk_free_floor_bytes=0,
        )
        self.metrics = Metrics()
        arena = os.urandom(16)
        self.cache = build(settings, SystemClock(), self.metrics, arena_id=arena)
        self.tickets = itertools.count(1)
        self.left: list[int] = []
        self.redeclared: list[int] = []
        self.door = Door(
            self.cache,
            settings=settings,
            arena=arena,
            metrics=self.metrics,
            clock=SystemClock(),
            limits=limits,
            watch=watch,
            on_left=lambda pid, *_: self.left.append(pid),
            on_redeclared=lambda pid, *_: self.redeclared.append(pid),
        )

    async def __aenter__(self) -> House:
        self.cache.begin()
        self.door.serve(sockets.listen(self.directory))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.door.close()
        loads = [task for task in self.cache._tasks._tasks if task.get_name().startswith("read from")]
        if loads:
            await asyncio.wait(loads, timeout=10)
        self.look_over()
        await self.cache.close()

    def look_over(self) -> None:
        """Nobody holds or does anything: whatever is still taken was leaked."""
        index, filling = self.cache.tiers.index, self.cache._filling
        index.validate()
        moving = int((index.state == 4).sum())
        assert index.pins == moving, f"{index.pins} pins are left"
        assert not len(filling.flights), "loads are under way"
        assert not filling._extents, "extents are held for loads"
        assert not filling._forsaken, "extents wait for writers"
        known = set(index.locations(index.residents(TierId.MEMORY), TierId.MEMORY).tolist())
        assert self.extents() == len(known), f"{self.extents()} extents, of which the index knows {len(known)}"

    def extents(self) -> int:
        """Extents in memory, as its tables say."""
        memory = self.cache.tiers.memory
        assert isinstance(memory, MemoryTier)
        tables = [layout.read_rows(one.memory)["state"] for one in memory.arena.segments]
        return sum(int(((states == layout.PENDING) | (states == layout.PRESENT)).sum()) for states in tables)

    def buffer(self, location: int) -> Buffer:
        """An extent in place."""
        return self.cache.tiers.memory.buffers([location])[0]

    async def visitor(self, token: str | None = None, *, role: str = LINE, again: bool = False) -> Visitor:
        """Somebody who comes in and says HELLO."""
        visitor = Visitor(self, token or os.urandom(16).hex())
        visitor.welcome = frames.unpack_json(
            await visitor.ask(Op.HELLO, pack_hello(Hello(visitor.token, role, 0, again)))
        )
        return visitor


class Visitor:
    """One connection."""

    welcome: dict[str, Any]

    def __init__(self, house: House, token: str) -> None:
        self.house, self.token = house, token
        self.fills: asyncio.Queue[tuple[int, int, list[Gap]]] = asyncio.Queue()
        self.forgets: list[list[str]] = []
        self.lost = asyncio.Event()
        self._leases = 0
        loop = asyncio.get_running_loop()
        self.line = Line(sockets.connect(house.directory), loop, self._pushed, lambda _: self.lost.set())

    def _pushed(self, frame: Frame) -> None:
        if frame.op == Op.FILL:
            self.fills.put_nowait((frame.number, *frames.unpack_gaps(frame.body)))
        else:
            self.forgets.append(frames.unpack_json(frame.body))
            self.line.tell(Op.TOLD, number=frame.number)

    async def ask(self, op: int, body: bytes = b"", *, number: int = 0) -> memoryview:
        """A question; an answer that does not come is a failure of the test."""
        async with asyncio.timeout(10):
            return await self.line.ask(op, body, number=number)

    async def ping(self) -> None:
        """Returns when everything said before has been dealt with."""
        await self.ask(Op.QUARANTINE)

    async def leave(self) -> None:
        """Closes the connection, and waits until the door has seen it."""
        posts = sum(len(one.posts) for one in self.house.door._sessions.values())
        self.line.close()
        for _ in range(10_000):
            if sum(len(one.posts) for one in self.house.door._sessions.values()) < posts:
                return
            await asyncio.sleep(0)
        raise AssertionError("the door did not see the end of a connection")

    # -- leases

    def number(self) -> int:
        """A fresh number for a lease."""
        self._leases += 1
        return self._leases

    async def lease(self, names: Sequence[Name], patience: Patience = Patience.MEMORY, number: int = 0) -> Grants:
        """LEASE."""
        body = frames.pack_lease(number or self.number(), patience, names)
        return frames.unpack_grants(await self.ask(Op.LEASE, body))

    async def match(self, names: Sequence[Name], patience: Patience = Patience.MEMORY) -> Grants:
        """MATCH."""
        body = frames.pack_lease(self.number(), patience, names)
        return frames.unpack_grants(await self.ask(Op.MATCH, body))

    async def pages(
        self, key: bytes, ordinals: Sequence[int], parts: Sequence[int], patience: Patience = Patience.MEMORY
    ) -> Grants:
        """LEASE_PAGES."""
        body = frames.pack_pages(self.number(), patience, key, ordinals, parts)
        return frames.unpack_grants(await self.ask(Op.LEASE_PAGES, body))

    def release(self, *numbers: int) -> None:
        """RELEASE."""
        self.line.tell(Op.RELEASE, frames.pack_u64(numbers))

    # -- loads

    async def read(self, run: PageRun, ordinals: Sequence[int], parts: Sequence[int], number: int = 0) -> Grants:
        """READ; whoever is asked to load finds that in `fills`."""
        terms = (run.key, run.size, run.page_bytes, run.part_bytes, run.scope, run.cost_s, run.expiry_s)
        body = frames.pack_read(ReadAsk(number or self.number(), terms, list(ordinals), list(parts)))
        return frames.unpack_grants(await self.ask(Op.READ, body))

    async def gaps(self) -> tuple[int, int, list[Gap]]:
        """The next (question, fill, gaps) that this visitor is asked to load."""
        async with asyncio.timeout(10):
            return await self.fills.get()

    def fill(self, run: PageRun, number: int, fill: int, gaps: Sequence[Gap], *, lie: bool = False) -> None:
        """Writes what belongs into gaps, and says so, page by page."""
        for item, gap in enumerate(gaps):
            target = self.house.buffer(gap.location)
            digests = write_page(run, gap, target)
            if lie:
                digests = bytes(byte ^ 1 for byte in digests)
            said = Landed(item, gap.parts, digests[: 8 * gap.parts.bit_length()])
            self.line.tell(Op.FILLED, frames.pack_landed(fill, 0, [said]), number=number)

    def unfill(self, number: int, fill: int) -> None:
        """Says that it writes no more."""
        self.line.tell(Op.UNFILLED, frames.pack_u64([fill]), number=number)

    # -- puts

    async def reserve(
        self, names: Sequence[Name], sizes: Sequence[int], *, form: Form = Form.LONE, parent: bytes = b""
    ) -> tuple[int, Grants]:
        """RESERVE: the ticket, and what it says of each."""
        ask = ReserveAsk(next(self.house.tickets), Kind.TENSOR, form, 0, 0.0, 0, parent, list(names), list(sizes))
        answer = await self.ask(Op.RESERVE, frames.pack_reserve(ask))
        return frames.unpack_u64(answer[:8])[0], frames.unpack_grants(answer[8:])

    def write(self, item: int, location: int, value: bytes, parts: int | None = None) -> Landed:
        """Writes parts of a value (all without) to its extent, and answers what to say of it."""
        target, step = self.house.buffer(location), part_bytes_for(len(value))
        copy(Buffer.of(value), target)
        chosen = all_parts(len(value), step) if parts is None else parts
        return Landed(item, chosen, part_digests(target, step, chosen)[: 8 * chosen.bit_length()])

    async def commit(self, ticket: int, landed: Sequence[Landed], flags: int = LAST) -> list[Outcome]:
        """COMMIT."""
        return frames.unpack_outcomes(await self.ask(Op.COMMIT, frames.pack_landed(ticket, flags, landed)))

    async def put(self, names: Sequence[Name], values: Sequence[bytes], flags: int = LAST) -> list[Outcome]:
        """RESERVE, writing, COMMIT."""
        ticket, grants = await self.reserve(names, [len(value) for value in values])
        landed = [self.write(i, at, values[i]) for i, at in enumerate(grants.locations) if at >= 0]
        return await self.commit(ticket, landed, flags)


def page_bytes(run: PageRun, ordinal: int) -> bytes:
    """What page `ordinal` of a file holds: a function of key and place."""
    seed = int.from_bytes(run.key[:8], "little") + ordinal
    return np.random.default_rng(seed).bytes(run.page_size(ordinal))


def write_page(run: PageRun, gap: Gap, target: Buffer) -> bytes:
    """Writes the parts of a gap, nothing else, and answers their digests."""
    value = Buffer.of(page_bytes(run, gap.ordinal))
    for part in range(gap.parts.bit_length()):
        if gap.parts >> part & 1:
            start = part * run.part_bytes
            length = min(run.part_bytes, value.length - start)
            copy(value.slice(start, length), target.slice(start, length))
    return part_digests(target, run.part_bytes, gap.parts)
