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
from tiercache.errors import ChangedError, OriginError, TierCacheError, UnavailableError
from tiercache.keys import object_key
from tiercache.model import Name, Outcome
from tiercache.testing.faults import Fault
from tiercache.testing.model import ModelError, made_bytes
from tiercache.testing.simloop import SimLoop, derive, simulate
from tiercache.testing.world import KIB, MIB, ORIGIN_DEADLINE_S, PAGE_BYTES, PART_BYTES, SSD_DEADLINE_S, World

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Coroutine, Sequence

    from tiercache.cache import Cache
    from tiercache.lease import Lease

FILES = 3
FILE_BYTES = 6 * PAGE_BYTES - 1234
NAMES = 20
RATES = {
    "memory": {Fault.FULL: 0.02},
    "ssd": {
        Fault.ERROR: 0.03,
        Fault.LATE_ERROR: 0.02,
        Fault.NO_SPACE: 0.02,
        Fault.DELAY: 0.1,
        Fault.STALL: 0.02,
        Fault.FULL: 0.03,
        Fault.BUSY: 0.03,
        Fault.VANISH: 0.03,
        Fault.SHORT: 0.03,
        Fault.CORRUPT: 0.03,
    },
    "disk": {Fault.ERROR: 0.02, Fault.NO_SPACE: 0.02},
    "origin": {
        Fault.ERROR: 0.05,
        Fault.LATE_ERROR: 0.02,
        Fault.DELAY: 0.2,
        Fault.STALL: 0.01,
        Fault.SHORT: 0.04,
        Fault.CORRUPT: 0.03,
        Fault.CHANGED: 0.02,
    },
}
ORIGIN_FAULTS = (UnavailableError, OriginError, ChangedError)
CALL_S_MAX = 4 * (ORIGIN_DEADLINE_S + SSD_DEADLINE_S)
"""Longest virtual time of one read: each of its few attempts ends within the deadlines of what it asks."""


class Register:
    """What readers of one lone name may see: values of the generations from `low` to `high`.

    Writers of a name take turns. A generation goes up only after a delete has ended, so that entries stay immutable.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self.name = Name(object_key("sim", label))
        self.lock = asyncio.Lock()
        self.low = 0
        self.low_durable = 0
        self.high = -1

    def value(self, generation: int) -> bytes:
        """The one right value of a generation; sizes differ."""
        size = derive(self.label, generation).choice([0, 1, 700, PART_BYTES, 9000, 40_000])
        return made_bytes((self.label, generation), size)

    def check(self, low: int, answer: bytes) -> None:
        """Raises ModelError unless the answer is of a generation from `low` (when the read began) to now."""
        if not any(answer == self.value(generation) for generation in range(low, self.high + 1)):
            raise ModelError(f"{self.label}: {len(answer)} bytes are of no generation from {low} to {self.high}")


class Lab:
    """Actors on one world."""

    def __init__(self, world: World, rng: random.Random) -> None:
        self.world, self.rng = world, rng
        self.registers = [Register(f"name{i}") for i in range(NAMES)]
        self.versions = [0] * FILES
        self.stats = [[world.publish(f"file{i}", 0, FILE_BYTES)] for i in range(FILES)]
        self.hits = self.misses = self.refused = 0

    @property
    def cache(self) -> Cache:
        """The open cache."""
        assert self.world.cache is not None
        return self.world.cache

    async def run(self, actors: int, steps: int) -> None:
        """Lets actors do random things at once; each thing may be cancelled at a random moment."""

        async def act(number: int) -> None:
            rng = derive(self.world.loop.seed, "actor", number, self.rng.random())
            things = [self.read, self.read, self.read_resident, self.get, self.get, self.get_resident, self.put]
            things += [self.put, self.delete, self.publish, self.flush, self.lease]
            for _ in range(steps):
                await asyncio.sleep(rng.uniform(0, 0.05))
                await self.maybe_cancelled(rng, rng.choice(things))
                self.world.check()

        async with asyncio.TaskGroup() as group:
            for number in range(actors):
                group.create_task(act(number))

    async def maybe_cancelled(
        self, rng: random.Random, thing: Callable[[random.Random], Coroutine[object, object, None]]
    ) -> None:
        """Does one thing; sometimes gives up on it on the way."""
        task = asyncio.get_running_loop().create_task(thing(rng))
        if rng.random() < 0.15:
            await asyncio.wait([task], timeout=rng.uniform(0, 0.02))
            task.cancel()
        begun = self.world.loop.time()
        try:
            await task
        except asyncio.CancelledError:
            self.refused += 1
        took = self.world.loop.time() - begun
        if took > CALL_S_MAX:
            raise ModelError(f"{thing.__name__} took {took:.1f} virtual seconds")

    # -- pages -----------------------------------------------------------------------------------------------------

    def question(self, rng: random.Random) -> tuple[int, int, list[int], list[int]]:
        """File, version, page ordinals and part maps of a random read."""
        file = rng.randrange(FILES)
        version = len(self.stats[file]) - 1 if rng.random() < 0.9 else rng.randrange(len(self.stats[file]))
        ordinals = sorted(rng.sample(range(6), rng.randrange(1, 4)))
        maps = [rng.choice([0b1111, rng.randrange(1, 16)]) for _ in ordinals]
        run = self.world.page_run(self.stats[file][version])
        return file, version, ordinals, [m & self.world.whole_page(run, o) or 1 for m, o in zip(maps, ordinals)]

    async def read(self, rng: random.Random) -> None:
        """Reads pages through everything, holds them for a while, and checks them before and after."""
        file, version, ordinals, maps = self.question(rng)
        stat = self.stats[file][version]
        run = self.world.page_run(stat)
        try:
            lease = await self.cache.read_pages(run, ordinals, maps, self.world.loader(stat, run))
        except ORIGIN_FAULTS:
            if not self.world.dice["origin"].on and version == len(self.stats[file]) - 1:
                raise
            self.refused += 1
            return
        try:
            await self.hold(rng, lease, (stat.path, version), run, ordinals, maps)
        finally:
            lease.release()

    async def hold(
        self,
        rng: random.Random,
        lease: Lease,
        label: object,
        run: object,
        ordinals: Sequence[int],
        maps: Sequence[int],
    ) -> None:
        """Checks a lease now, and views of it after others had time to evict, delete and overwrite."""
        hits = [i for i, outcome in enumerate(lease.outcomes) if outcome is Outcome.HIT]
        self.hits += len(hits)
        self.misses += len(ordinals) - len(hits)
        for _ in range(2):
            for i in hits:
                self.world.check_page(lease, i, label, run, ordinals[i], maps[i])  # type: ignore[arg-type]
            await asyncio.sleep(rng.uniform(0, 0.05))
        views = [lease.view(i) for i in hits]
        copies = [bytes(view) for view in views] if maps == [15] * len(maps) else []
        lease.release()
        await asyncio.sleep(rng.uniform(0, 0.05))
        for view, copy in zip(views, copies):
            if bytes(view) != copy:
                raise ModelError(f"{label!r}: bytes of a living view changed after the release of its lease")

    async def read_resident(self, rng: random.Random) -> None:
        """The fast path of pages."""
        file, version, ordinals, maps = self.question(rng)
        stat = self.stats[file][version]
        run = self.world.page_run(stat)
        lease = self.cache.lease_resident(run.key, ordinals, maps)
        if lease is not None:
            with lease:
                await self.hold(rng, lease, (stat.path, version), run, ordinals, maps)

    async def publish(self, rng: random.Random) -> None:
        """A new version of a file; now and then the old one is deleted from the cache."""
        if rng.random() < 0.3:
            file = rng.randrange(FILES)
            old = self.world.page_run(self.stats[file][-1])
            self.stats[file].append(self.world.publish(f"file{file}", len(self.stats[file]), FILE_BYTES))
            await self.cache.delete([Name(old.key, ordinal) for ordinal in range(6)])

    # -- lone values -----------------------------------------------------------------------------------------------

    async def put(self, rng: random.Random) -> None:
        """Puts one name again, or after a delete with its next value."""
        register = rng.choice(self.registers)
        async with register.lock:
            if register.high < register.low or rng.random() < 0.3:
                await self.cache.delete([register.name])
                register.low = register.high = register.high + 1
            value = register.value(register.high)
            durable = rng.random() < 0.2 and self.world.ssd is not None
            try:
                await self.cache.put([register.name], [value], durable=durable)
            except UnavailableError:
                if not self.world.dice["ssd"].on:
                    raise

    async def get(self, rng: random.Random) -> None:
        """Copies some names out."""
        chosen = rng.sample(self.registers, rng.randrange(1, 4))
        lows = [register.low for register in chosen]
        targets = [bytearray(40_000) for _ in chosen]
        outcomes = await self.cache.get_into(
            [register.name for register in chosen], [Buffer.of(target, writable=True) for target in targets]
        )
        self.judge(chosen, lows, outcomes, targets)

    async def get_resident(self, rng: random.Random) -> None:
        """Copies some names out on the fast path."""
        chosen = rng.sample(self.registers, rng.randrange(1, 4))
        targets = [bytearray(40_000) for _ in chosen]
        outcomes = self.cache.get_into_resident(
            [register.name for register in chosen], [Buffer.of(target, writable=True) for target in targets]
        )
        self.judge(chosen, [register.low for register in chosen], outcomes, targets)

    def judge(
        self, chosen: Sequence[Register], lows: Sequence[int], outcomes: Sequence[Outcome], targets: Sequence[bytearray]
    ) -> None:
        """Compares copies with what the names may have; a copy is as long as its value."""
        for register, low, outcome, target in zip(chosen, lows, outcomes, targets):
            if outcome is Outcome.HIT:
                self.hits += 1
                values = [register.value(generation) for generation in range(low, register.high + 1)]
                if not any(target[: len(value)] == value for value in values):
                    raise ModelError(f"{register.label}: not of a generation from {low} to {register.high}")
            else:
                self.misses += 1

    async def lease(self, rng: random.Random) -> None:
        """Leases some names, one of them twice, and looks again later."""
        chosen = rng.sample(self.registers, rng.randrange(1, 4))
        chosen += chosen[:1] if rng.random() < 0.2 else []
        lows = [register.low for register in chosen]
        with await self.cache.lease([register.name for register in chosen]) as lease:
            for i, register in enumerate(chosen):
                if lease.outcomes[i] is Outcome.HIT:
                    self.hits += 1
                    answer = bytes(lease.view(i))
                    register.check(lows[i], answer)
                    await asyncio.sleep(rng.uniform(0, 0.05))
                    if bytes(lease.view(i)) != answer:
                        raise ModelError(f"{register.label}: leased bytes changed")

    async def delete(self, rng: random.Random) -> None:
        """Deletes one name and sees it gone."""
        register = rng.choice(self.registers)
        async with register.lock:
            await self.cache.delete([register.name])
            register.low = register.high + 1
            target = Buffer.of(bytearray(40_000), writable=True)
            if (await self.cache.get_into([register.name], [target]))[0] is Outcome.HIT:
                raise ModelError(f"{register.label} was deleted and is there")

    async def flush(self, rng: random.Random) -> None:
        """Makes everything durable."""
        lows = [register.low for register in self.registers]
        try:
            await self.cache.flush()
        except TierCacheError:
            if not self.world.dice["ssd"].on:
                raise
            return
        for register, low in zip(self.registers, lows):
            register.low_durable = low

    def after_power_cut(self) -> None:
        """Deletes that were not flushed may be undone by a power cut."""
        for register in self.registers:
            register.low = min(register.low, register.low_durable)
            register.lock = asyncio.Lock()

    async def finish(self) -> None:
        """With all faults gone a put must hit, and nothing may be left half-done; then closes."""
        self.world.faults_off()
        await asyncio.sleep(120)
        await self.world.check_quiet()
        register = Register("last")
        if await self.cache.put([register.name], [b"v" * 100]) != [Outcome.HIT]:
            raise ModelError("a put that fits was refused though nothing is wrong")
        target = bytearray(100)
        outcome = await self.cache.get_into([register.name], [Buffer.of(target, writable=True)])
        if outcome != [Outcome.HIT] or target != b"v" * 100:
            raise ModelError("what was just put is not there though nothing is wrong")
        await self.world.check_quiet()
        await self.world.close()


async def mixed(loop: SimLoop) -> None:
    """Everything at once: readers, writers, evictions, cancellations, faults; and power cuts where there is a disk."""
    rng = derive(loop.seed, "mixed")
    world = World(
        loop,
        memory_bytes=rng.choice([128, 256, 1024]) * KIB,
        ssd_bytes=rng.choice([0, 8 * MIB, 12 * MIB]),
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
    world = World(loop, memory_bytes=MIB, ssd_bytes=rng.choice([0, 8 * MIB]))
    cache = await world.open()
    stat = world.publish("file", 0, FILE_BYTES)
    run = world.page_run(stat)
    asked: set[int] = set()

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
    for _, span in world.origin.reads:
        parts = set(range(span.start // PART_BYTES, -(-(span.start + span.length) // PART_BYTES)))
        if parts & asked:
            raise ModelError(f"parts {sorted(parts & asked)} were asked of the origin twice")
        asked |= parts
    await asyncio.sleep(1)
    await world.check_quiet()
    await world.close()


async def durable(loop: SimLoop) -> None:
    """What was acknowledged as durable is there after a power cut at any moment, and after several."""
    rng = derive(loop.seed, "durable")
    # Where memory holds all that is written, a flush must save all that is visible; where not, only what is durable.
    roomy = rng.random() < 0.5
    world = World(loop, memory_bytes=(8192 if roomy else 256) * KIB, ssd_bytes=16 * MIB)
    await world.open()
    kept: dict[Name, bytes] = {}
    visible: dict[Name, bytes] = {}
    count = 0

    async def write(number: int) -> None:
        nonlocal count
        mine = derive(loop.seed, "writer", number, count)
        while True:
            count += 1
            names = [Name(object_key("sim", f"{count}/{i}")) for i in range(mine.randrange(1, 4))]
            values = [made_bytes(name.key, mine.choice([10, 5000, 20_000])) for name in names]
            safe = mine.random() < 0.4
            assert world.cache is not None
            outcomes = await world.cache.put(names, values, durable=safe)
            done = {n: v for n, v, outcome in zip(names, values, outcomes) if outcome is Outcome.HIT}
            (kept if safe else visible).update(done)
            if roomy and mine.random() < 0.15:
                seen = dict(visible)
                await world.cache.flush()
                kept.update(seen)
            await asyncio.sleep(mine.uniform(0, 0.1))

    for _ in range(rng.randrange(1, 4)):
        writers = [loop.create_task(write(number)) for number in range(3)]
        await asyncio.wait(writers, timeout=rng.uniform(0, 1.5))
        for writer in writers:
            if writer.done():
                writer.result()
        await world.power_cut()
        cache = await world.open()
        for name, value in kept.items():
            target = bytearray(len(value))
            outcome = (await cache.get_into([name], [Buffer.of(target, writable=True)]))[0]
            if outcome is not Outcome.HIT or target != value:
                raise ModelError(f"a durable value of {len(value)} bytes is {outcome.name} after a power cut")
        visible.clear()
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
    scenario.__name__: scenario for scenario in (mixed, cold_readers, durable, deadlines)
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
