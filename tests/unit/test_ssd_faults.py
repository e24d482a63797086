"""A full disk, read and write errors, a disk that hangs, a directory that vanishes: the tier degrades, and returns."""

from __future__ import annotations

import asyncio
import errno
import random
from typing import TYPE_CHECKING

import pytest

from tiercache.buffers import Buffer
from tiercache.errors import ClosedError, LockedError, UnavailableError
from tiercache.model import Outcome
from tiercache.ssd.tier import SsdTier
from tiercache.testing.simdisk import SimDisk
from tiercache.testing.simloop import SimClock, SimLoop, simulate
from tiercache.testing.tiers import Item, fetch, item, store
from tiercache.tier import Health

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from tiercache.ssd.transfer import Job

HOME = "/home/cache"
CAPACITY_BYTES = 12 << 20


def run(main: Coroutine[object, object, None]) -> None:
    """In a loop with real threads."""
    asyncio.run(main)


def open_on(disk: SimDisk, loop: SimLoop | None = None, deadline_s: float = 2.0) -> SsdTier:
    """A small tier on a simulated disk."""
    clock = SimClock(loop) if loop is not None else None
    return SsdTier(HOME, CAPACITY_BYTES, segment_bytes=1 << 20, io=disk, clock=clock, deadline_s=deadline_s)


def small(seed: int) -> Item:
    """An entry of a few blocks."""
    return item(seed, 5000 + seed * 700 % 60_000, 8192)


async def come_back(late: list[Job]) -> None:
    """Lets the threads end what they were at when the deadline passed."""
    while not all(job.ended for job in late):
        await asyncio.sleep(0)


async def wait_until_well(tier: SsdTier) -> None:
    """Lets virtual time pass until a probe succeeded."""
    for _ in range(40):
        if tier.status().health is Health.HEALTHY:
            return
        await tier.read([], [])
        await asyncio.sleep(5)
    raise AssertionError(tier.status())


async def outlive(loop: SimLoop, disk: SimDisk, operation: str, code: int, after: int, times: int) -> bool:
    """A life in which the n-th call of an operation fails; answers whether it came so far."""
    tier = open_on(disk, loop)
    held: dict[int, Item] = {}
    durable: dict[int, Item] = {}
    begun = disk.operations.get(operation, 0)
    disk.fail(operation, code, after=after, times=times)
    for turn in range(24):
        batch = [small(turn * 4 + i) for i in range(4)]
        answers = await store(tier, batch)
        assert all(at >= 0 or at in (Outcome.BUSY, Outcome.FULL) for at in answers)
        held.update((at, one) for at, one in zip(answers, batch, strict=True) if at >= 0)
        if turn % 4 == 3:
            before = dict(held)
            try:
                await tier.flush()
                durable.update(before)
            except UnavailableError:
                assert tier.status().health is not Health.HEALTHY and tier.status().reason
                found = await fetch(tier, [one.want(at) for at, one in held.items()])
                held = {at: one for (at, one), hit in zip(held.items(), found, strict=True) if hit[0] == Outcome.HIT}
        elif turn % 8 == 6 and held:
            gone = next(iter(held))
            tier.free([gone])
            del held[gone]
            durable.pop(gone, None)
        await look(tier, held)
    reached = disk.operations.get(operation, 0) - begun > after
    disk.heal()
    await asyncio.sleep(20)  # another segment is tried for some time after the disk was full
    await wait_until_well(tier)
    assert all(at >= 0 for at in await store(tier, [small(1000)])), "it does not write again"
    await tier.flush()
    await tier.close()
    tier = open_on(disk, loop)
    found: dict[bytes, int] = {}
    for facts in tier.scan():
        for row in range(len(facts.keys)):
            found.setdefault(facts.keys[row, : int(facts.widths[row])].tobytes(), int(facts.locations[row]))
    for at, one in durable.items():
        assert found.get(one.payload.name.key) == at, "acknowledged as durable, and gone"
    await look(tier, {found[one.payload.name.key]: one for one in held.values() if one.payload.name.key in found})
    await tier.close()
    return reached


async def look(tier: SsdTier, held: dict[int, Item]) -> None:
    """Reads; a miss is allowed, wrong bytes and corruption are not."""
    places = list(held)
    for at, (outcome, data) in zip(places, await fetch(tier, [held[at].want(at) for at in places]), strict=True):
        assert outcome in (Outcome.HIT, Outcome.MISS, Outcome.BUSY), outcome
        assert outcome != Outcome.HIT or data == held[at].data


@pytest.mark.slow
@pytest.mark.parametrize(
    ("operation", "code", "times"),
    [
        ("write", errno.ENOSPC, 1),
        ("write", errno.ENOSPC, 1 << 30),
        ("write", errno.EIO, 2),
        ("allocate", errno.ENOSPC, 2),
        ("sync", errno.EIO, 1),
        ("rows.write", errno.ENOSPC, 1),
        ("rows.sync", errno.EIO, 3),
        ("read", errno.EIO, 5),
        ("open", errno.EROFS, 2),
    ],
)
def test_a_fault_at_every_call(operation: str, code: int, times: int) -> None:
    """Of each operation the first call fails, in another run the second, and so on until a run has no such call."""
    for after in range(200):
        seed = f"{operation}/{after}"
        disk = SimDisk(random.Random(seed))
        step = 1 if after < 12 else 7
        if after % step == 0 and not simulate(
            lambda loop, disk=disk, after=after: outlive(loop, disk, operation, code, after, times), seed
        ):
            break


def test_a_full_disk_keeps_what_it_has() -> None:
    """No room for another segment: FULL, the reason is told, everything stays readable, and new room is used."""

    async def check(loop: SimLoop) -> None:
        disk = SimDisk(random.Random(1), size_bytes=(3 << 20) + 100_000)
        tier = open_on(disk, loop)
        held: dict[int, Item] = {}
        for seed in range(200):
            (at,) = await store(tier, [one := small(seed)])
            if at == Outcome.FULL:
                break
            held[at] = one
        assert at == Outcome.FULL
        assert "disk is full" in tier.status().reason and tier.status().health is Health.HEALTHY
        await look(tier, held)
        disk.size_bytes = 1 << 40
        await asyncio.sleep(20)
        assert (await store(tier, [small(1)]))[0] >= 0
        await tier.close()

    simulate(check, 1)


def test_the_free_floor_is_kept() -> None:
    """No segment is created that would leave less than the floor free on the disk."""

    async def check(loop: SimLoop) -> None:
        disk = SimDisk(random.Random(1), size_bytes=8 << 20)
        tier = SsdTier(
            HOME, CAPACITY_BYTES, segment_bytes=1 << 20, io=disk, clock=SimClock(loop), disk_free_floor_bytes=5 << 20
        )
        answers = [(await store(tier, [small(seed)]))[0] for seed in range(120)]
        assert Outcome.FULL in answers and max(answers) > 0
        assert disk.free_bytes(HOME) >= 5 << 20
        await tier.close()

    simulate(check, 1)


def test_a_hanging_read_is_busy_and_never_writes_to_its_target() -> None:
    """The deadline answers; when the disk answers at last, the target stays what its owner made of it."""

    async def check() -> None:
        disk = SimDisk(random.Random(1))
        tier = open_on(disk, deadline_s=0.4)
        one = small(3)
        (at,) = await store(tier, [one])
        gate = disk.hold("read")
        target = bytearray(len(one.data))
        outcomes = await tier.read([one.want(at)], [Buffer.of(target, writable=True)])
        assert outcomes == [Outcome.BUSY]
        assert tier.status().health is Health.OFF and "did not answer" in tier.status().reason
        target[:] = b"\x77" * len(target)
        assert await fetch(tier, [one.want(at)]) == [(Outcome.MISS, b"\xa5" * len(target))], "off: at once, no waiting"
        assert await store(tier, [one]) == [Outcome.BUSY]
        with pytest.raises(UnavailableError):
            await tier.flush()
        late = list(tier._disk._late)
        assert late
        gate.set()
        disk.heal()
        await come_back(late)
        assert set(target) == {0x77}
        await tier.close()

    run(check())


def test_a_hanging_write_is_busy_and_its_segment_waits() -> None:
    """The room of a write that may still happen is not given to others until the thread came back."""

    async def check() -> None:
        disk = SimDisk(random.Random(1))
        tier = open_on(disk, deadline_s=0.4)
        await store(tier, [small(1)])
        segment = tier._space.open[0]
        assert segment is not None
        gate = disk.hold("write")
        assert await store(tier, [small(2)]) == [Outcome.BUSY]
        assert segment.writers == 1
        late = list(tier._disk._late)
        assert late
        gate.set()
        disk.heal()
        await come_back(late)
        assert segment.writers == 0
        await tier.close()

    run(check())


def test_a_cancelled_read_lets_go_of_its_target() -> None:
    """As with a deadline: the caller may reuse the memory at once."""

    async def check() -> None:
        disk = SimDisk(random.Random(1))
        tier = open_on(disk)
        one = small(3)
        (at,) = await store(tier, [one])
        gate = disk.hold("read")
        target = bytearray(len(one.data))
        task = asyncio.ensure_future(tier.read([one.want(at)], [Buffer.of(target, writable=True)]))
        while not disk.operations.get("read"):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        late = list(tier._disk._late)
        assert late
        gate.set()
        disk.heal()
        await come_back(late)
        assert set(target) == {0}
        await tier.close()

    run(check())


def test_a_read_in_the_callers_thread_ends_with_its_deadline() -> None:
    """It is as good as any other, and after its deadline nothing of the caller's is written."""

    async def check() -> None:
        disk = SimDisk(random.Random(1))
        tier = open_on(disk, deadline_s=0.2)
        one = small(3)
        (at,) = await store(tier, [one])
        digests: list[bytes] = []
        target, again = bytearray(len(one.data)), bytearray(len(one.data))
        outcomes = await asyncio.to_thread(tier.read_here, [one.want(at)], [Buffer.of(target, writable=True)], digests)
        assert (outcomes, bytes(target), digests) == ([Outcome.HIT], one.data, [one.payload.digests])
        gate = disk.hold("read")
        outcomes = await asyncio.to_thread(tier.read_here, [one.want(at)], [Buffer.of(again, writable=True)], digests)
        assert outcomes != [Outcome.HIT] and tier.status().health is Health.OFF
        late = list(tier._disk._here)
        assert late, "closing must know of it"
        gate.set()
        disk.heal()
        await come_back(late)
        assert set(again) == {0}
        await tier.close()
        assert tier.read_here([one.want(at)], [Buffer.of(again, writable=True)], digests) == [Outcome.MISS]

    run(check())


def test_a_directory_that_vanishes_and_returns() -> None:
    """Durable is never acknowledged for files that nobody will find; the tier goes off and comes back."""

    async def check(loop: SimLoop) -> None:
        disk = SimDisk(random.Random(1))
        tier = open_on(disk, loop)
        one = small(1)
        (at,) = await store(tier, [one])
        disk.present = False
        with pytest.raises(UnavailableError):
            await tier.flush()
        assert tier.status().health is Health.OFF and "vanished" in tier.status().reason
        assert (await fetch(tier, [one.want(at)]))[0][0] == Outcome.MISS
        await asyncio.sleep(30)
        await tier.read([], [])
        await asyncio.sleep(1)
        assert tier.status().health is Health.OFF, "it came back before the directory did"
        disk.present = True
        await asyncio.sleep(200)
        await wait_until_well(tier)
        await tier.flush()
        assert await fetch(tier, [one.want(at)]) == [(Outcome.HIT, one.data)]
        await tier.close()

    simulate(check, 1)


def test_one_owner_at_a_time() -> None:
    """A second opening is told so in one line; after closing it works."""

    async def check(loop: SimLoop) -> None:
        disk = SimDisk(random.Random(1))
        tier = open_on(disk, loop)
        with pytest.raises(LockedError, match="in use by another process"):
            open_on(disk, loop)
        await tier.close()
        with pytest.raises(ClosedError):
            await tier.read([], [])
        await open_on(disk, loop).close()

    simulate(check, 1)
