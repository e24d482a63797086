"""Reclaim and closing on a disk that is not well: nothing durable is thrown away, nobody waits for ever or shares."""

from __future__ import annotations

import asyncio
import errno
import random
from typing import TYPE_CHECKING

import pytest

from tiercache.errors import LockedError, UnavailableError
from tiercache.model import Outcome
from tiercache.ssd.tier import SsdTier
from tiercache.testing.simdisk import SimDisk
from tiercache.testing.simloop import SimClock, SimLoop, simulate
from tiercache.testing.tiers import Item, fetch, item, store
from tiercache.tier import Health

if TYPE_CHECKING:
    from collections.abc import Callable

HOME = "/home/cache"


def open_on(disk: SimDisk, loop: SimLoop | None = None, deadline_s: float = 2.0) -> SsdTier:
    """A small tier on a simulated disk."""
    clock = SimClock(loop) if loop is not None else None
    return SsdTier(HOME, 12 << 20, segment_bytes=1 << 20, io=disk, clock=clock, deadline_s=deadline_s)


async def filled(tier: SsdTier) -> tuple[dict[int, Item], list[int]]:
    """Two segments and more, durable: what is where, and what lives in the victim."""
    held: dict[int, Item] = {}
    for seed in range(30):
        (at,) = await store(tier, [one := item(seed, 90_000, 8192)])
        held[at] = one
    await tier.flush()
    victim = tier.victim()
    assert len(victim) > 4
    return held, victim


async def hits(tier: SsdTier, held: dict[int, Item]) -> set[int]:
    """Where a read brings what was written; nothing may be wrong."""
    found = await fetch(tier, [one.want(at) for at, one in held.items()])
    good = {
        at
        for (at, one), (end, data) in zip(held.items(), found, strict=True)
        if end is Outcome.HIT and data == one.data
    }
    assert all(end is Outcome.MISS for at, (end, _) in zip(held, found, strict=True) if at not in good)
    return good


async def heal(tier: SsdTier, disk: SimDisk) -> None:
    """The disk is well again, and the tier knows."""
    disk.heal()
    for _ in range(40):
        if tier.status().health is Health.HEALTHY:
            return
        await tier.read([], [])
        await asyncio.sleep(5)
    raise AssertionError(tier.status())


def before(disk: SimDisk, tier: SsdTier) -> None:
    """The disk was sick when reclaim began."""
    tier._disk.pulse.write_failed(OSError(errno.EIO, "sick"))


def writes(disk: SimDisk, tier: SsdTier) -> None:
    """No new copy can be written."""
    disk.fail("write", errno.EIO)


def syncs(disk: SimDisk, tier: SsdTier) -> None:
    """The new copies cannot be synced."""
    disk.fail("sync", errno.EIO)


def saves(disk: SimDisk, tier: SsdTier) -> None:
    """Their rows cannot be saved."""
    disk.fail("rows.write", errno.EIO)


def reads(disk: SimDisk, tier: SsdTier) -> None:
    """Nothing can be read: that is no reason to throw everything away."""
    disk.fail("read", errno.EIO)


@pytest.mark.parametrize("ail", [before, writes, syncs, saves, reads])
def test_a_sick_disk_keeps_what_it_has(ail: Callable[[SimDisk, SsdTier], None]) -> None:
    """What should be kept stays where it was and stays durable; what should go is gone; later reclaim works again."""

    async def check(loop: SimLoop) -> None:
        disk = SimDisk(random.Random(1))
        tier = open_on(disk, loop)
        held, victim = await filled(tier)
        keep, drop = victim[1:], victim[:1]
        ail(disk, tier)
        assert dict(await tier.reclaim(keep, drop)) == {at: at for at in keep}
        del held[drop[0]]
        await heal(tier, disk)
        assert await hits(tier, held) == set(held)
        if ail is syncs:  # the tier cannot tell the copies of reclaim from what was acknowledged
            with pytest.raises(UnavailableError):
                await tier.flush()
        assert not set(tier.lost()) & set(held)
        await tier.flush()
        disk.kill()
        disk.power_cut()
        tier = open_on(disk, loop)
        assert {int(at) for facts in tier.scan() for at in facts.locations} == set(held)
        moved = dict(await tier.reclaim(keep, []))
        assert set(moved) == set(keep) and not set(moved.values()) & set(keep)
        assert await hits(tier, {moved.get(at, at): one for at, one in held.items()}) == {
            moved.get(at, at) for at in held
        }
        await tier.close()

    simulate(check, 1)


def test_one_bad_sector_does_not_stop_reclaim() -> None:
    """The record that the system refuses to read is gone; the others move, and the tier stays well."""

    async def check(loop: SimLoop) -> None:
        disk = SimDisk(random.Random(1))
        tier = open_on(disk, loop)
        _, victim = await filled(tier)
        disk.fail("read", errno.EIO, times=1)
        moved = dict(await tier.reclaim(victim, []))
        assert len(moved) == len(victim) - 1 and not set(moved.values()) & set(victim)
        assert tier.status().health is Health.HEALTHY and tier.counters["read_faults"] == 1
        await tier.close()

    simulate(check, 1)


def test_reclaim_does_not_believe_a_commit_that_lost_its_copies() -> None:
    """A flush of somebody else takes the new copies and fails; reclaim's own finds nothing to do."""

    async def check(loop: SimLoop) -> None:
        disk = SimDisk(random.Random(1))
        tier = open_on(disk, loop)
        held, victim = await filled(tier)
        move = tier._move

        async def move_and_commit(keep: list[int], moved: dict[int, int], gone: set[int]) -> None:
            await move(keep, moved, gone)
            disk.fail("sync", errno.EIO, times=1)
            await tier._commit_quietly()
            await heal(tier, disk)

        tier._move = move_and_commit  # type: ignore[method-assign, assignment]
        assert dict(await tier.reclaim(victim, [])) == {at: at for at in victim}
        assert await hits(tier, held) == set(held)
        await tier.close()

    simulate(check, 1)


def test_rows_that_hang_do_not_hold_reclaim() -> None:
    """The segment stays as it is, the tier is off, and a flush says so at once; later the segment is given back."""

    async def check() -> None:
        disk = SimDisk(random.Random(1))
        tier = open_on(disk, deadline_s=0.2)
        _, victim = await filled(tier)
        gate = disk.hold("rows.read")
        async with asyncio.timeout(20):
            assert await tier.reclaim([], victim) == []
            assert tier.status().health is Health.OFF and "did not answer" in tier.status().reason
            with pytest.raises(UnavailableError):
                await tier.flush()
        disk.heal()
        gate.set()
        async with asyncio.timeout(20):
            async with tier._disk._commit_lock:
                pass
        await tier.close()

    asyncio.run(check())


def test_a_directory_stays_locked_while_a_late_writer_may_write() -> None:
    """The next owner would give the room to somebody else; the last late writer unlocks."""

    async def check() -> None:
        disk = SimDisk(random.Random(1))
        tier = open_on(disk, deadline_s=0.2)
        gate = disk.hold("write")
        assert await store(tier, [item(1, 50_000, 8192)]) == [Outcome.BUSY]
        await tier.close()
        with pytest.raises(LockedError):
            open_on(disk)
        gate.set()
        disk.heal()
        assert tier._disk.closing is not None
        tier._disk.closing.join()
        await open_on(disk).close()

    asyncio.run(check())


def test_a_late_reader_does_not_keep_the_lock() -> None:
    """It harms nobody."""

    async def check() -> None:
        disk = SimDisk(random.Random(1))
        tier = open_on(disk, deadline_s=0.2)
        one = item(1, 50_000, 8192)
        places = await store(tier, [one])
        gate = disk.hold("read")
        assert [end for end, _ in await fetch(tier, [one.want(places[0])])] == [Outcome.BUSY]
        await tier.close()
        lock = disk.lock(f"{HOME}/LOCK")
        assert lock is not None
        disk.close(lock)
        gate.set()
        disk.heal()

    asyncio.run(check())
