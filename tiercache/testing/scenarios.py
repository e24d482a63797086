"""Scenarios: what many tasks do at once to a whole simulated cache, one schedule a seed.

`python -m tiercache.testing.scenarios mixed --seeds 1000 [--first 0]` runs them; a failure prints its seed and the
command that runs it again.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from typing import TYPE_CHECKING

from tiercache.buffers import Buffer
from tiercache.errors import UnavailableError
from tiercache.keys import object_key
from tiercache.metrics import Metrics
from tiercache.model import Name, Outcome
from tiercache.pages.reader import PageReader
from tiercache.testing.faults import Fault
from tiercache.testing.lab import CALL_S_MAX, FILE_BYTES, ORIGIN_FAULTS, RATES, Lab
from tiercache.testing.model import ModelError, made_bytes
from tiercache.testing.simloop import SimLoop, derive, simulate
from tiercache.testing.world import (
    KIB,
    MIB,
    ORIGIN_DEADLINE_S,
    PAGE_BYTES,
    PART_BYTES,
    SSD_DEADLINE_S,
    Chains,
    World,
)

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Coroutine, Sequence


async def mixed(loop: SimLoop) -> None:
    """Everything at once: readers, writers, evictions, cancellations, faults; and power cuts where there is a disk."""
    rng = derive(loop.seed, "mixed")
    world = World(
        loop,
        memory_bytes=rng.choice([128, 256, 1024]) * KIB,
        ssd_bytes=rng.choice([0, 9 * MIB, 12 * MIB]),
        slots_max=rng.choice([40, 1024]),
        rates=RATES if rng.random() < 0.7 else None,
    )
    await world.open()
    lab = Lab(world, rng)
    for _ in range(rng.randrange(1, 3)):
        if rng.random() < 0.7:
            world.faults_on()
        await lab.run(actors=5, steps=12)
        world.faults_off()
        if world.disk is not None and rng.random() < 0.5:
            await world.power_cut()
            await world.open()
            lab.after_power_cut()
        else:
            # Loads that met a fault may still be under way, and whoever joins one hears of its fault.
            await asyncio.sleep(2 * ORIGIN_DEADLINE_S)
    await lab.finish()


async def cold_readers(loop: SimLoop) -> None:
    """Many cold readers of one file, some of whom give up: every part is asked of the origin exactly once."""
    rng = derive(loop.seed, "cold")
    world = World(loop, memory_bytes=MIB, ssd_bytes=rng.choice([0, 9 * MIB]))
    cache = await world.open()
    stat = world.publish("file", 0, FILE_BYTES)
    run = world.page_run(stat)

    async def reader(number: int) -> None:
        mine = derive(loop.seed, "reader", number)
        ordinals = sorted(mine.sample(range(6), mine.randrange(1, 4)))
        maps = [mine.randrange(1, 16) & world.whole_page(run, ordinal) or 1 for ordinal in ordinals]
        await asyncio.sleep(mine.choice([0, 0, 0.001]))
        with await cache.read_pages(run, ordinals, maps, world.loader(stat, run)) as lease:
            for i, ordinal in enumerate(ordinals):
                world.check_page(lease, i, ("file", 0), run, ordinal, maps[i])

    tasks = [loop.create_task(reader(number)) for number in range(40)]
    for task in rng.sample(tasks, 8):
        loop.call_later(rng.uniform(0, 0.002), task.cancel)
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError):
            raise result
    check_asked_once(world)
    await asyncio.sleep(1)
    await world.check_quiet()
    await world.close()


async def rotten(loop: SimLoop) -> None:
    """Everything on the SSD has rotted: readers of parts of the same pages get right bytes, for one request a part."""
    rng = derive(loop.seed, "rotten")
    world = World(loop, memory_bytes=MIB)
    cache = await world.open()
    stat = world.publish("file", 0, FILE_BYTES)
    run = world.page_run(stat)
    everything = [world.whole_page(run, ordinal) for ordinal in range(6)]
    (await cache.read_pages(run, list(range(6)), everything, world.loader(stat, run))).release()
    await cache.flush()
    cache.tiers.evict(MIB)
    assert world.disk is not None
    for path, file in world.disk.files.items():
        if path.endswith(".seg") and rng.random() < 0.9:
            file.seen[:] = bytes(byte ^ 4 for byte in file.seen)
    world.origin.reads.clear()

    async def reader(number: int) -> None:
        mine = derive(loop.seed, "reader", number)
        ordinals = sorted(mine.sample(range(6), mine.randrange(1, 4)))
        maps = [mine.randrange(1, 16) & world.whole_page(run, ordinal) or 1 for ordinal in ordinals]
        await asyncio.sleep(mine.choice([0, 0, 0.01]))
        with await cache.read_pages(run, ordinals, maps, world.loader(stat, run)) as lease:
            for i, ordinal in enumerate(ordinals):
                if lease.outcomes[i] is not Outcome.HIT:
                    raise ModelError(f"page {ordinal} is {lease.outcomes[i].name}")
                world.check_page(lease, i, ("file", 0), run, ordinal, maps[i])
            await asyncio.sleep(mine.uniform(0, 0.1))
            for i, ordinal in enumerate(ordinals):
                world.check_page(lease, i, ("file", 0), run, ordinal, maps[i])

    async with asyncio.TaskGroup() as group:
        for number in range(12):
            group.create_task(reader(number))
    check_asked_once(world)
    await asyncio.sleep(5)
    await world.check_quiet()
    await world.close()


def check_asked_once(world: World) -> None:
    """Raises ModelError if any part of the one file was asked of the origin twice."""
    asked: set[int] = set()
    for _, span in world.origin.reads:
        parts = set(range(span.start // PART_BYTES, -(-(span.start + span.length) // PART_BYTES)))
        if parts & asked:
            raise ModelError(f"parts {sorted(parts & asked)} were asked of the origin twice")
        asked |= parts


class Library:
    """Readers of files through the page reader, and writers of new versions of them."""

    def __init__(self, world: World) -> None:
        assert world.cache is not None
        self.world, self.changing = world, True
        rng = derive(world.loop.seed, "library")
        self.reader = PageReader(
            world.cache, world.origin, settings=world.settings, clock=world.clock, metrics=Metrics()
        )
        self.sizes = [rng.choice([0, 700, 65_536, 300_000]) for _ in range(3)]
        self.versions = [0, 0, 0]
        self.labels: dict[str, object] = {}
        for file in range(3):
            self.publish(file)

    def publish(self, file: int) -> None:
        """The next version of a file, of the same size."""
        self.versions[file] += 1
        stat = self.world.publish(f"file{file}", self.versions[file], self.sizes[file])
        self.labels[stat.version] = (stat.path, self.versions[file])

    async def act(self, number: int) -> None:
        """One reader, who now and then writes."""
        rng = derive(self.world.loop.seed, "files", number, self.changing)
        for _ in range(12):
            file = rng.randrange(3)
            begun = self.world.loop.time()
            try:
                await self.read(rng, file)
            except ORIGIN_FAULTS:
                if not self.world.dice["origin"].on and not self.changing:
                    raise
            if self.world.loop.time() - begun > CALL_S_MAX:
                raise ModelError(f"a read took {self.world.loop.time() - begun:.1f} virtual seconds")
            if self.changing and rng.random() < 0.1:
                self.publish(file)

    async def read(self, rng: random.Random, file: int) -> None:
        """Opens a file, reads a range of the version that it was opened as, and looks ahead."""
        pin = await self.reader.open(f"file{file}")
        if isinstance(pin, Outcome):
            raise UnavailableError("injected: not there")
        await asyncio.sleep(rng.uniform(0, 0.05))
        size = self.sizes[file]
        start = rng.randrange(size + 1)
        stop = rng.choice([start + 100, start + 100_000, size])
        answer = await self.reader.read(pin, start, stop)
        if answer != made_bytes(self.labels[pin.stat.version], size)[start:stop]:
            raise ModelError(f"file{file}: wrong bytes of version {pin.stat.version} from {start} to {stop}")
        self.reader.prefetch(pin, start, size)


async def files(loop: SimLoop) -> None:
    """The page reader over an origin that fails and changes objects: bytes of one version or a clear fault, in time."""
    rng = derive(loop.seed, "files")
    rates = {"origin": RATES["origin"], "ssd": RATES["ssd"]}
    world = World(loop, memory_bytes=MIB, ssd_bytes=rng.choice([0, 9 * MIB]), rates=rates)
    await world.open()
    library = Library(world)
    for library.changing, failing in ((True, True), (True, False), (False, False)):
        if failing:
            world.faults_on("origin", "ssd")
        async with asyncio.TaskGroup() as group:
            for number in range(5):
                group.create_task(library.act(number))
        world.faults_off()
        # Facts are believed for a while: what changed before must be forgotten, and old loads must have ended.
        await asyncio.sleep(10 * ORIGIN_DEADLINE_S)
    await library.reader.close()
    await world.check_quiet()
    await world.close()


class Promises:
    """Writers of values and chains, and what they were told is durable."""

    def __init__(self, world: World, *, roomy: bool) -> None:
        self.world, self.roomy, self.count = world, roomy, 0
        self.kept: dict[Name, bytes] = {}
        self.visible: dict[Name, bytes] = {}
        self.chains: list[Chains] = []

    async def write(self, number: int) -> None:
        """Writes until it is cancelled."""
        rng = derive(self.world.loop.seed, "writer", number, self.count)
        while True:
            self.count += 1
            await (self.put_chain(rng) if rng.random() < 0.15 else self.put(rng))
            if self.roomy and rng.random() < 0.15:
                seen = dict(self.visible)
                assert self.world.cache is not None
                await self.world.cache.flush()
                self.kept.update(seen)
            await asyncio.sleep(rng.uniform(0, 0.1))

    async def put(self, rng: random.Random) -> None:
        """Some values, durable or not."""
        names = [Name(object_key("sim", f"{self.count}/{i}")) for i in range(rng.randrange(1, 4))]
        values = [made_bytes(name.key, rng.choice([10, 5000, 20_000])) for name in names]
        safe = rng.random() < 0.4
        assert self.world.cache is not None
        outcomes = await self.world.cache.put(names, values, durable=safe)
        done = {n: v for n, v, outcome in zip(names, values, outcomes) if outcome is Outcome.HIT}
        (self.kept if safe else self.visible).update(done)

    async def put_chain(self, rng: random.Random) -> None:
        """A chain of its own, stored in two pieces, durable."""
        chains = Chains(f"promise{self.count}", chains=1, blocks=5, width=rng.choice([16, 32]))
        digests = chains.digests[0]
        assert self.world.cache is not None
        for some, parent in ((digests[:3], b""), (digests[3:], digests[2])):
            values = [chains.value(digest) for digest in some]
            outcomes = await self.world.cache.put_chain(some, values, parent=parent, durable=True)
            if outcomes != [Outcome.HIT] * len(some):
                return
        self.chains.append(chains)

    async def check(self) -> None:
        """Raises ModelError unless every promise is kept."""
        cache = self.world.cache
        assert cache is not None
        for name, value in self.kept.items():
            target = bytearray(len(value))
            outcome = (await cache.get_into([name], [Buffer.of(target, writable=True)]))[0]
            if outcome is not Outcome.HIT or target != value:
                raise ModelError(f"a durable value of {len(value)} bytes is {outcome.name} after a power cut")
        for chains in self.chains:
            with await cache.match(chains.digests[0]) as lease:
                chains.check(lease, chains.digests[0])
                if len(lease) != 5:
                    raise ModelError(f"of a durable chain of 5 blocks {len(lease)} are there after a power cut")
        self.visible.clear()


async def durable(loop: SimLoop) -> None:
    """What was acknowledged as durable is there after a power cut at any moment, and after several."""
    rng = derive(loop.seed, "durable")
    # Where memory holds all that is written, a flush must save all that is visible; where not, only what is durable.
    roomy = rng.random() < 0.5
    world = World(loop, memory_bytes=(8192 if roomy else 256) * KIB, ssd_bytes=16 * MIB)
    await world.open()
    promises = Promises(world, roomy=roomy)
    for _ in range(rng.randrange(1, 4)):
        writers = [loop.create_task(promises.write(number)) for number in range(3)]
        await asyncio.wait(writers, timeout=rng.uniform(0, 1.5))
        for writer in writers:
            if writer.done():
                writer.result()
        await world.power_cut()
        await world.open()
        await promises.check()
    await asyncio.sleep(5)
    await world.check_quiet()
    await world.close()


class Crowd:
    """Writers of values that nobody deletes in time, who also read, delete and let bits rot."""

    SIZES = (3000, 30_000, 60_000)

    def __init__(self, world: World, *, rots: bool) -> None:
        self.world, self.rots, self.count = world, rots, 0

    async def act(self, number: int) -> None:
        """One writer."""
        rng = derive(self.world.loop.seed, "crowd", number, self.count)
        for _ in range(25):
            self.count += 1
            assert self.world.cache is not None
            value = made_bytes(self.count, rng.choice(self.SIZES))
            try:
                await self.world.cache.put([self.name_of(self.count)], [value], durable=rng.random() < 0.1)
            except UnavailableError:
                if not self.world.dice["disk"].on:
                    raise
            for wanted in rng.sample(range(self.count), min(self.count, 4)):
                await self.look(wanted)
            if rng.random() < 0.2:
                await self.world.cache.delete([self.name_of(rng.randrange(self.count))])
            for _ in range(rng.randrange(20) if self.rots else 0):
                self.world.rot(rng)
            self.world.check()
            await asyncio.sleep(rng.uniform(0, 0.1))

    async def look(self, wanted: int) -> None:
        """Reads one value, which has one of a few sizes."""
        assert self.world.cache is not None
        target = bytearray(max(self.SIZES))
        name = self.name_of(wanted)
        outcome = (await self.world.cache.get_into([name], [Buffer.of(target, writable=True)]))[0]
        if outcome is Outcome.HIT and not any(target[:size] == made_bytes(wanted, size) for size in self.SIZES):
            raise ModelError(f"value {wanted} has wrong bytes")

    @staticmethod
    def name_of(number: int) -> Name:
        """Name of the value with this number."""
        return Name(object_key("crowd", str(number)))


async def crowded(loop: SimLoop) -> None:
    """An SSD that is full all the time, and may rot: reclaim under readers, deletes, faults and power cuts."""
    rng = derive(loop.seed, "crowded")
    disk = {Fault.ERROR: 0.01, Fault.NO_SPACE: 0.01}
    rates = {"ssd": {Fault.VANISH: 0.05, Fault.ERROR: 0.02, Fault.DELAY: 0.1}, "disk": disk}
    world = World(loop, memory_bytes=256 * KIB, ssd_bytes=9 * MIB, rates=rates if rng.random() < 0.5 else None)
    await world.open()
    crowd = Crowd(world, rots=rng.random() < 0.3)
    for _ in range(rng.randrange(1, 4)):
        world.faults_on()
        actors = [loop.create_task(crowd.act(number)) for number in range(4)]
        done, late = await asyncio.wait(actors, timeout=rng.choice([1.0, 3.0, 1000.0]))
        for actor in done:
            actor.result()
        world.faults_off()
        if late or rng.random() < 0.5:
            await world.power_cut()
            await world.open()
    await asyncio.sleep(120)
    await world.check_quiet()
    await world.close()


async def recycled(loop: SimLoop) -> None:
    """Values come and go on an SSD that they fill many times over; the few that stay are durable through power cuts."""
    rng = derive(loop.seed, "recycled")
    world = World(loop, memory_bytes=256 * KIB, ssd_bytes=10 * MIB)
    cache = await world.open()
    kept: dict[Name, bytes] = {}
    for turn in range(rng.randrange(60, 160)):
        values = {Crowd.name_of(turn * 10 + i): made_bytes((turn, i), rng.choice([20_000, 60_000])) for i in range(3)}
        outcomes = await cache.put(list(values), list(values.values()), durable=True)
        done = [name for name, outcome in zip(values, outcomes) if outcome is Outcome.HIT]
        if len(kept) < 12 and done and rng.random() < 0.3:
            kept[done[0]] = values[done[0]]
        await cache.delete([name for name in values if name not in kept])
        if rng.random() < 0.08:
            writing = loop.create_task(cache.put([Crowd.name_of(-turn)], [made_bytes(turn, 60_000)], durable=True))
            await asyncio.wait([writing], timeout=rng.uniform(0, 0.1))
            await world.power_cut()
            cache = await world.open()
        if rng.random() < 0.1:
            for name, value in kept.items():
                target = bytearray(len(value))
                outcome = (await cache.get_into([name], [Buffer.of(target, writable=True)]))[0]
                if outcome is not Outcome.HIT or target != value:
                    raise ModelError(f"turn {turn}: a durable value is {outcome.name} though there is room for all")
        world.check()
    await asyncio.sleep(5)
    await world.check_quiet()
    await world.close()


async def deadlines(loop: SimLoop) -> None:
    """A hanging SSD costs a reader its deadline at most once, a hanging origin ends in a fault at its own."""
    rng = derive(loop.seed, "deadlines")
    world = World(loop, memory_bytes=96 * KIB, rates={"ssd": {Fault.STALL: 1.0}, "origin": {Fault.STALL: 1.0}})
    cache = await world.open()
    stat = world.publish("file", 0, FILE_BYTES)
    run = world.page_run(stat)

    async def read(ordinal: int) -> float:
        begun = loop.time()
        with await cache.read_pages(run, [ordinal], [1], world.loader(stat, run)) as lease:
            if lease.outcomes[0] is Outcome.HIT:
                world.check_page(lease, 0, ("file", 0), run, ordinal, 1)
        return loop.time() - begun

    for ordinal in range(6):
        await read(ordinal)
    await cache.flush()
    world.faults_on("ssd")
    for ordinal in rng.sample(range(6), 6):
        took = await read(ordinal)
        if took > 2 * SSD_DEADLINE_S + 1:
            raise ModelError(f"a hanging SSD cost a reader {took:.2f} s")
    world.faults_off("ssd")
    world.faults_on("origin")
    begun = loop.time()
    other = world.publish("other", 0, PAGE_BYTES)
    fresh = world.page_run(other)
    try:
        (await cache.read_pages(fresh, [0], [1], world.loader(other, fresh))).release()
    except UnavailableError:
        pass
    else:
        raise ModelError("a read of a hanging origin answered")
    if loop.time() - begun > ORIGIN_DEADLINE_S + 1:
        raise ModelError(f"a hanging origin cost a reader {loop.time() - begun:.1f} s")
    world.faults_off()
    with await cache.read_pages(fresh, [0], [1], world.loader(other, fresh)) as lease:
        world.check_page(lease, 0, ("other", 0), fresh, 0, 1)
    await asyncio.sleep(60)
    await world.check_quiet()
    await world.close()


SCENARIOS: dict[str, Callable[[SimLoop], Coroutine[object, object, None]]] = {
    scenario.__name__: scenario
    for scenario in (mixed, cold_readers, rotten, files, durable, crowded, recycled, deadlines)
}


def sweep(name: str, seeds: Sequence[int]) -> None:
    """Runs one scenario for each seed; a failure carries the command that runs it again as a note."""
    for seed in seeds:
        try:
            simulate(SCENARIOS[name], seed)
        except BaseException as error:
            hashes = os.environ.get("PYTHONHASHSEED", "random")
            error.add_note(
                f"again: PYTHONHASHSEED={hashes} python -m tiercache.testing.scenarios {name} --first {seed}"
            )
            raise


def main() -> int:
    """Runs seeds from the command line."""
    parser = argparse.ArgumentParser(prog="python -m tiercache.testing.scenarios")
    parser.add_argument("name", choices=SCENARIOS)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    sweep(arguments.name, range(arguments.first, arguments.first + arguments.seeds))
    print(f"{arguments.name}: {arguments.seeds} schedules from seed {arguments.first}, all right")
    return 0


if __name__ == "__main__":
    sys.exit(main())
