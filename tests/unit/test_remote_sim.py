"""Several writers to one bucket in a simulation: whoever dies, whatever fails, the cap holds and no byte is wrong."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from tiercache.metrics import Metrics
from tiercache.model import Outcome
from tiercache.remote.blocks import RemoteBlocks
from tiercache.remote.budget import RESERVED_BYTES
from tiercache.testing.buckets import FaultyBucket, MemoryBucket, put_blocks, read_blocks
from tiercache.testing.simloop import SimClock, derive, simulate

if TYPE_CHECKING:
    import random

    from tiercache.testing.simloop import SimLoop

KIB = 1 << 10
CAP_BYTES = 512 * KIB
PACK_BYTES = 32 * KIB
PATIENCE_S = 600.0
"""Longer than a lease and its grace together."""


class Host:
    """One cache's remote tier, which may be killed at any instant."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.rng = derive(world.loop.seed, "host", number)
        self.bucket = FaultyBucket(world.bucket, self.rng, world.clock)
        self.remote = RemoteBlocks(
            self.bucket,
            CAP_BYTES + RESERVED_BYTES,
            clock=world.clock,
            metrics=Metrics(),
            random=self.rng,
            pack_bytes=PACK_BYTES,
        )
        self.tasks = [world.loop.create_task(self.remote.run()), world.loop.create_task(self.live())]

    async def live(self) -> None:
        """Writes, reads and rests."""
        rng = self.rng
        while True:
            await asyncio.sleep(rng.uniform(0, 20))
            if rng.random() < 0.6:
                await put_blocks(self.remote, sorted(rng.sample(range(200), rng.randint(1, 5))))
            else:
                outcomes = await read_blocks(self.remote, rng.sample(range(200), 30))
                assert Outcome.CORRUPT not in outcomes

    def kill(self) -> None:
        """As SIGKILL: nothing of it goes on, but for requests that were sent."""
        for task in self.tasks:
            task.cancel()


class World:
    """A bucket and its users."""

    def __init__(self, loop: SimLoop) -> None:
        self.loop, self.clock = loop, SimClock(loop)
        self.bucket = MemoryBucket(CAP_BYTES + RESERVED_BYTES)
        self.hosts: list[Host] = []
        self.doors: list[FaultyBucket] = []
        self.born = 0

    def start(self) -> Host:
        """One host more."""
        self.born += 1
        host = Host(self, self.born)
        self.hosts.append(host)
        self.doors.append(host.bucket)
        return host

    def check(self) -> None:
        """Bytes of packs and snapshots are within the cap; the ledger has room of its own."""
        ledger = sum(len(data) for key, data in self.bucket.objects.items() if key.startswith(("budget/", "FORMAT")))
        assert self.bucket.used_bytes - ledger <= CAP_BYTES
        assert ledger <= RESERVED_BYTES


def rates(door: FaultyBucket, rng: random.Random) -> None:
    door.fail, door.fail_after, door.late = (rng.choice([0.0, 0.05, 0.2]) for _ in range(3))
    door.refuse = rng.choice([0.0, 0.0, 0.05])


async def upheaval(loop: SimLoop) -> MemoryBucket:
    world, rng = World(loop), derive(loop.seed, "upheaval")
    for _ in range(3):
        world.start()
    for _ in range(60):
        await asyncio.sleep(rng.uniform(1, 60))
        for door in world.doors:
            door.settle()
        world.check()
        host = rng.choice(world.hosts)
        choice = rng.random()
        if choice < 0.15:
            host.kill()
            world.hosts.remove(host)
            world.start()
        elif choice < 0.25:
            world.hosts.remove(host)
            for task in host.tasks:
                task.cancel()
            await host.remote.close()
            world.start()
        elif choice < 0.35:
            host.bucket.down = not host.bucket.down
        else:
            rates(host.bucket, rng)
    for host in world.hosts:
        host.kill()
    world.check()
    for door in world.doors:
        door.down, door.fail, door.fail_after, door.late, door.refuse = False, 0.0, 0.0, 0.0, 0.0
    # Whatever was left behind, somebody new gets room after a while, and what it writes others read.
    last = world.start()
    last.tasks[1].cancel()
    await asyncio.sleep(PATIENCE_S)
    outcomes = [Outcome.FULL]
    for _ in range(20):
        outcomes = await put_blocks(last.remote, [301, 302])
        if outcomes == [Outcome.HIT] * 2:
            break
        await asyncio.sleep(PATIENCE_S / 4)
    assert outcomes == [Outcome.HIT] * 2
    world.check()
    last.kill()
    other = world.start()
    other.tasks[1].cancel()
    await other.remote.known()
    assert await read_blocks(other.remote, [301, 302]) == [Outcome.HIT] * 2
    other.kill()
    return world.bucket


@pytest.mark.parametrize("seed", range(12))
def test_the_cap_holds_and_no_byte_is_wrong(seed: int) -> None:
    simulate(upheaval, seed=seed)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(12, 300))
def test_the_cap_holds_and_no_byte_is_wrong_for_many_seeds(seed: int) -> None:
    simulate(upheaval, seed=seed)
