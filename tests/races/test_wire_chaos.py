"""Many clients that load, fail, lie, go to sleep while they write, delete and die: no wrong byte, nothing leaked."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from pathlib import Path

import pytest

from tiercache.errors import TierCacheError
from tiercache.lease import PageRun
from tiercache.model import Name, Outcome
from tiercache.testing.visits import MIB, House, Visitor, page_bytes
from tiercache.wire import frames
from tiercache.wire.frames import Gap, Op
from tiercache.wire.served import Limits

PART = 16 << 10
RUNS = [PageRun(bytes([i]) * 32, 12 * 64 * 1024 - 777, 64 << 10, PART) for i in range(3)]
BY_KEY = {run.key: run for run in RUNS}
PAGES = 12
FILL_S = 0.03


class Life:
    """One client's life."""

    def __init__(self, house: House, visitor: Visitor, rng: random.Random, counts: Counter[str]) -> None:
        self.house, self.visitor, self.rng, self.counts = house, visitor, rng, counts
        self.sleepers: set[asyncio.Task[None]] = set()

    async def load(self) -> None:
        """Does what it is asked to, or not."""
        while True:
            number, fill, gaps = await self.visitor.fills.get()
            run = BY_KEY[self.house.cache.tiers.memory.payloads([gaps[0].location])[0].name.key]
            mood = self.rng.random()
            await asyncio.sleep(self.rng.random() * 0.004)
            if mood < 0.07:
                self.counts["slept"] += 1
                self.sleepers.add(asyncio.ensure_future(self.sleep(number, fill, gaps)))
                continue
            if mood < 0.17:
                self.counts["lied"] += 1
                self.visitor.fill(run, number, fill, gaps, lie=True)
            elif mood < 0.24:
                self.visitor.fill(run, number, fill, gaps[:1])
            elif mood > 0.34:
                self.counts["filled"] += 1
                self.visitor.fill(run, number, fill, gaps)
            self.visitor.unfill(number, fill)

    async def sleep(self, number: int, fill: int, gaps: list[Gap]) -> None:
        """Says nothing for longer than anybody waits, and scribbles all the while."""
        for _ in range(6):
            await asyncio.sleep(FILL_S * 0.6)
            for gap in gaps:
                for part in range(4):
                    if gap.parts >> part & 1:
                        view = self.house.buffer(gap.location).view()[part * PART :][:100]
                        view[:] = self.rng.randbytes(len(view))
        self.visitor.unfill(number, fill)

    async def use(self) -> None:
        """Reads pages and looks at every byte that it was promised."""
        rng, visitor = self.rng, self.visitor
        run, pages = rng.choice(RUNS), rng.sample(range(PAGES), rng.randrange(1, 5))
        wanted = [rng.randrange(1, 1 << -(-run.page_size(page) // PART)) for page in pages]
        try:
            if rng.random() < 0.7:
                grants = await visitor.read(run, pages, wanted)
            else:
                grants = await visitor.pages(run.key, pages, wanted)
        except TierCacheError:
            self.counts["fault"] += 1
            return
        number = visitor._leases
        await asyncio.sleep(rng.random() * 0.002)
        for page, parts, outcome, at in zip(pages, wanted, *grants, strict=True):
            self.counts[outcome.name] += 1
            if outcome is Outcome.HIT:
                have, right = bytes(self.house.buffer(at)), page_bytes(run, page)
                for part in range(4):
                    if parts >> part & 1:
                        span = slice(part * PART, (part + 1) * PART)
                        assert have[span] == right[span], f"page {page} of {run.key[0]}, part {part}"
        visitor.release(number)
        if rng.random() < 0.1:
            await visitor.ask(Op.DELETE, frames.pack_names([Name(run.key, page) for page in pages]))

    async def live(self) -> None:
        """Comes, uses the cache for a while, and goes, or dies."""
        loading = asyncio.ensure_future(self.load())
        try:
            for _ in range(self.rng.randrange(3, 25)):
                await self.use()
        finally:
            loading.cancel()
            await asyncio.wait([loading])
            for sleeper in self.sleepers:
                if self.rng.random() < 0.5:
                    sleeper.cancel()  # the dead do not write
            if self.sleepers:
                await asyncio.wait(self.sleepers)
            self.visitor.line.close()


async def play(directory: Path, seed: int, ssd_bytes: int) -> Counter[str]:
    counts: Counter[str] = Counter()
    limits = Limits(2 * MIB, fill_s=FILL_S)
    async with House(directory, memory_bytes=3 * MIB, ssd_bytes=ssd_bytes, limits=limits) as house:

        async def lives(number: int) -> None:
            rng = random.Random(seed * 1000 + number)
            for _ in range(6):
                await Life(house, await house.visitor(), rng, counts).live()

        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            for number in range(8):
                group.create_task(lives(number))
        house.cache.tiers.index.validate()
        assert house.metrics.total("tiercache_internal_errors_total") == 0
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("ssd_bytes", [0, 64 * MIB], ids=["memory", "ssd"])
@pytest.mark.parametrize("seed", range(2))
def test_chaos(tmp_path: Path, seed: int, ssd_bytes: int) -> None:
    counts = asyncio.run(play(tmp_path, seed, ssd_bytes))
    assert counts["HIT"] > 200 and min(counts["slept"], counts["lied"], counts["fault"]) > 0, counts


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(10, 110))
def test_chaos_for_long(tmp_path: Path, seed: int) -> None:
    asyncio.run(play(tmp_path, seed, 64 * MIB * (seed % 2)))
