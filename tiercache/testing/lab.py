"""Actors on a simulated cache: each does random things and compares every byte with the only right one."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from tiercache.buffers import Buffer
from tiercache.errors import ChangedError, OriginError, TierCacheError, UnavailableError
from tiercache.keys import object_key
from tiercache.model import Name, Outcome
from tiercache.testing.faults import Fault
from tiercache.testing.model import ModelError, made_bytes
from tiercache.testing.simloop import derive
from tiercache.testing.world import ORIGIN_DEADLINE_S, PAGE_BYTES, PART_BYTES, SSD_DEADLINE_S, Chains

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Coroutine, Sequence

    from tiercache.cache import Cache
    from tiercache.lease import Lease
    from tiercache.testing.world import World

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
        self.chains = [Chains(world.loop.seed), Chains(world.loop.seed, width=32)]
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
            things += [self.put_chain, self.put_chain, self.match, self.match, self.delete_block]
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

    # -- chains ----------------------------------------------------------------------------------------------------

    async def put_chain(self, rng: random.Random) -> None:
        """Stores the beginning of a chain, or continues one below a block that may be gone by now."""
        chains = rng.choice(self.chains)
        digests = rng.choice(chains.digests)
        start = rng.choice([0, 0, rng.randrange(len(digests))])
        some = digests[start : start + rng.randrange(1, len(digests) + 1)]
        parent = digests[start - 1] if start else b""
        await self.cache.put_chain(some, [chains.value(digest) for digest in some], parent=parent)

    async def match(self, rng: random.Random) -> None:
        """Matches a chain, through all tiers or in memory alone, and holds it for a while."""
        chains = rng.choice(self.chains)
        digests = rng.choice(chains.digests)[: rng.randrange(1, 11)]
        lease = self.cache.match_resident(digests) if rng.random() < 0.3 else await self.cache.match(digests)
        with lease:
            chains.check(lease, digests)
            self.hits += len(lease)
            await asyncio.sleep(rng.uniform(0, 0.05))
            chains.check(lease, digests)

    async def delete_block(self, rng: random.Random) -> None:
        """Deletes a block of a chain: no match may reach it from then on, unless it was put again."""
        digest = rng.choice(rng.choice(rng.choice(self.chains).digests))
        await self.cache.delete([Name(digest)])

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
