"""What the tier gives up by itself: a sync that failed is told by flush and named by lost, and nothing else goes."""

from __future__ import annotations

import asyncio
import errno
import random
from typing import TYPE_CHECKING

import pytest

from tiercache.errors import UnavailableError
from tiercache.model import Outcome
from tiercache.ssd.tier import SsdTier
from tiercache.testing.simdisk import SimDisk
from tiercache.testing.simloop import SimClock, SimLoop, simulate
from tiercache.testing.tiers import Item, fetch, item, store
from tiercache.tier import Health

if TYPE_CHECKING:
    from collections.abc import Sequence

HOME = "/home/cache"


def open_on(disk: SimDisk, loop: SimLoop) -> SsdTier:
    """A small tier on a simulated disk."""
    return SsdTier(HOME, 12 << 20, segment_bytes=1 << 20, io=disk, clock=SimClock(loop), deadline_s=2.0)


def small(seed: int) -> Item:
    """An entry of a few blocks."""
    return item(seed, 5000 + seed * 700 % 60_000, 8192)


async def heal(tier: SsdTier, disk: SimDisk) -> None:
    """The disk is well again, and the tier knows."""
    disk.heal()
    for _ in range(40):
        if tier.status().health is Health.HEALTHY:
            return
        await tier.read([], [])
        await asyncio.sleep(5)
    raise AssertionError(tier.status())


async def outcomes(tier: SsdTier, places: Sequence[int], items: Sequence[Item]) -> list[Outcome]:
    """How reads of these end; a hit is right in every byte."""
    found = await fetch(tier, [one.want(at) for at, one in zip(places, items, strict=True)])
    assert all(data == one.data for (end, data), one in zip(found, items, strict=True) if end is Outcome.HIT)
    return [end for end, _ in found]


async def found_anew(tier: SsdTier, disk: SimDisk, loop: SimLoop) -> set[int]:
    """Locations after the machine died and came back."""
    disk.stop_after(0)
    await tier.close()
    disk.heal()
    disk.power_cut()
    tier = open_on(disk, loop)
    places = {int(at) for facts in tier.scan() for at in facts.locations}
    await tier.close()
    return places


def test_a_sync_that_fails_in_the_background_is_told_by_the_next_flush() -> None:
    """Once; lost names what went; what was durable before stays."""

    async def check(loop: SimLoop) -> None:
        disk = SimDisk(random.Random(1))
        tier = open_on(disk, loop)
        safe, items = await store(tier, [small(1)]), [small(2), small(3)]
        await tier.flush()
        places = await store(tier, items)
        disk.fail("sync", errno.EIO, times=1)
        await tier._commit_quietly()
        await heal(tier, disk)
        with pytest.raises(UnavailableError):
            await tier.flush()
        assert sorted(tier.lost()) == sorted(places)
        assert tier.lost() == []
        await tier.flush()
        assert await outcomes(tier, [*safe, *places], [small(1), *items]) == [Outcome.HIT, Outcome.MISS, Outcome.MISS]
        again = await store(tier, items)
        await tier.flush()
        assert await found_anew(tier, disk, loop) == {*safe, *again}

    simulate(check, 1)


def test_flushes_that_run_together_all_tell() -> None:
    """The second finds nothing to do, since the first one's commit took all: it must not answer that all is durable."""

    async def check(loop: SimLoop) -> None:
        disk = SimDisk(random.Random(1))
        tier = open_on(disk, loop)
        await store(tier, [small(1)])
        disk.fail("sync", errno.EIO, times=1)
        ends = await asyncio.gather(*(tier.flush() for _ in range(3)), return_exceptions=True)
        assert [type(end) for end in ends] == [UnavailableError] * 3
        assert len(tier.lost()) == 1
        await heal(tier, disk)
        await tier.close()

    simulate(check, 1)


def test_a_sync_and_then_the_rows_fail() -> None:
    """What was not synced is lost although the same commit also failed at its rows."""

    async def check(loop: SimLoop) -> None:
        disk = SimDisk(random.Random(1))
        tier = open_on(disk, loop)
        places = await store(tier, [small(1)])
        disk.fail("sync", errno.EIO, times=1)
        disk.fail("rows.sync", errno.EIO, times=1)
        with pytest.raises(UnavailableError):
            await tier.flush()
        assert tier.lost() == places
        await heal(tier, disk)
        more = await store(tier, [small(2)])
        await tier.flush()
        assert tier.lost() == []
        assert await found_anew(tier, disk, loop) == set(more)

    simulate(check, 1)


def test_tombstones_outlive_a_failed_sync() -> None:
    """What was freed in a segment whose sync failed does not come back."""

    async def check(loop: SimLoop) -> None:
        disk = SimDisk(random.Random(1))
        tier = open_on(disk, loop)
        first, second = await store(tier, [small(1), small(2)])
        await tier.flush()
        await store(tier, [small(3)])
        tier.free([first])
        disk.fail("sync", errno.EIO, times=1)
        with pytest.raises(UnavailableError):
            await tier.flush()
        await heal(tier, disk)
        await tier.flush()
        assert await found_anew(tier, disk, loop) == {second}

    simulate(check, 1)


def test_what_is_written_while_a_sync_fails_is_lost_too() -> None:
    """The system tells of a failed sync once: the next one proves nothing about bytes that were there before it."""

    async def check(loop: SimLoop) -> None:
        disk = SimDisk(random.Random(1))
        tier = open_on(disk, loop)
        places = await store(tier, [small(1)])
        disk.fail("sync", errno.EIO, times=1)
        flush = asyncio.ensure_future(tier.flush())
        await asyncio.sleep(0)
        places += await store(tier, [small(2)])
        with pytest.raises(UnavailableError):
            await flush
        lost = tier.lost()
        assert set(lost) <= set(places) and places[0] in lost
        ends = await outcomes(tier, places, [small(1), small(2)])
        assert [end is Outcome.MISS for end in ends] == [at in lost for at in places]
        await heal(tier, disk)
        await tier.close()

    for seed in range(8):
        simulate(check, seed)


def test_rows_that_fail_lose_nothing() -> None:
    """They are written again by the next flush."""

    async def check(loop: SimLoop) -> None:
        disk = SimDisk(random.Random(1))
        tier = open_on(disk, loop)
        places = await store(tier, [small(1)])
        disk.fail("rows.sync", errno.EIO, times=1)
        await tier._commit_quietly()
        assert tier.counters["commit_faults"] == 1
        await heal(tier, disk)
        await tier.flush()
        assert tier.lost() == []
        assert await found_anew(tier, disk, loop) == set(places)

    simulate(check, 1)
