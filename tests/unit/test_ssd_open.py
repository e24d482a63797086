"""Opening an SSD directory: caps that shrank, lazy rows, look-ups before the scan is through, order of use, fsck."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field

import numpy as np
import pytest

from tiercache.errors import ConfigError, LockedError, UnavailableError
from tiercache.model import Name, Outcome
from tiercache.ssd.fsck import fsck
from tiercache.ssd.recover import OTHER_FILES, ROWS_FILES, Caps
from tiercache.ssd.tier import SsdTier
from tiercache.testing.simdisk import SimDisk
from tiercache.testing.tiers import Item, fetch, item, store

HOME = "/home/cache"
MIB = 1 << 20


@dataclass
class Bench:
    """A simulated disk and what lies on it."""

    disk: SimDisk = field(default_factory=lambda: SimDisk(random.Random(1)))
    places: dict[Name, int] = field(default_factory=dict)
    items: dict[Name, Item] = field(default_factory=dict)

    def open(self, capacity_bytes: int = 16 * MIB, files_max: int = 1000) -> SsdTier:
        """Segments of a mebibyte."""
        return SsdTier(HOME, capacity_bytes, files_max=files_max, segment_bytes=MIB, io=self.disk)

    async def put(self, tier: SsdTier, count: int, first: int = 0) -> None:
        """Entries of about 60 KiB, numbered from `first`."""
        for start in range(first, first + count, 8):
            batch = [item(seed, 60_000 + seed) for seed in range(start, min(start + 8, first + count))]
            answers = await store(tier, batch)
            assert min(answers) >= 0, answers
            self.places.update((i.payload.name, at) for i, at in zip(batch, answers, strict=True))
            self.items.update((i.payload.name, i) for i in batch)
        await tier.flush()


def rows_of(tier: SsdTier) -> list[tuple[Name, int, int]]:
    """Name, location and tick of all that a scan gives, in its order."""
    return [
        (Name(f.keys[i].tobytes()[: int(f.widths[i])], int(f.ordinals[i])), int(f.locations[i]), int(f.ticks[i]))
        for f in tier.scan()
        for i in range(len(f.keys))
    ]


async def check_all(tier: SsdTier, found: dict[Name, int], bench: Bench) -> None:
    """Everything found is a hit with its own bytes."""
    items = [bench.items[name] for name in found]
    got = await fetch(tier, [i.want(at) for i, at in zip(items, found.values(), strict=True)])
    assert got == [(Outcome.HIT, i.data) for i in items]


def test_scan_gives_the_newest_first() -> None:
    """Over all segments, and with the locations that were given."""

    async def check() -> None:
        bench = Bench()
        tier = bench.open()
        await bench.put(tier, 100)
        await tier.close()
        tier = bench.open()
        rows = rows_of(tier)
        assert [tick for _, _, tick in rows] == list(range(99, -1, -1))
        assert {name: at for name, at, _ in rows} == bench.places
        assert len(rows_of(tier)) == 100, "a second scan reads anew"
        await tier.close()

    asyncio.run(check())


def test_names_are_found_before_and_while_scanning() -> None:
    """The newest record of each, without waiting for the scan; freed ones are not found; writes go on beside."""

    async def check() -> None:
        bench = Bench()
        tier = bench.open()
        await bench.put(tier, 60)
        old = dict(bench.places)
        await bench.put(tier, 3)  # the first three again: newer records
        await tier.close()
        tier = bench.open()
        names = [item(seed, 60_000 + seed).payload.name for seed in (1, 30, 59)]
        facts = await tier.find([*names, Name(b"x" * 16), names[0]])
        assert sorted(facts.locations.tolist()) == sorted(bench.places[name] for name in names)
        assert bench.places[names[0]] != old[names[0]]
        scan = tier.scan()
        next(scan)
        await check_all(tier, {name: bench.places[name] for name in names}, bench)
        tier.free([bench.places[names[1]]])
        assert (await tier.find([names[1]])).locations.tolist() == []
        await bench.put(tier, 20, first=1000)
        assert len([row for facts in scan for row in facts.locations]) > 20
        again = (await tier.find(names)).locations.tolist()
        assert sorted(again) == sorted(bench.places[name] for name in (names[0], names[2]))
        await tier.close()

    asyncio.run(check())


def test_order_of_use_survives() -> None:
    """Ticks noted before closing replace those of writing; unknown and stale locations do not matter."""

    async def check() -> None:
        bench = Bench()
        tier = bench.open()
        await bench.put(tier, 50)
        places = np.array([*bench.places.values(), 1 << 60, 12345], np.int64)
        tier.note_order(places, np.arange(len(places), dtype=np.uint32) * 7 + 1000)
        await tier.close()
        tier = bench.open()
        ticks = {at: tick for _, at, tick in rows_of(tier)}
        assert [ticks[at] for at in bench.places.values()] == [1000 + 7 * i for i in range(50)]
        await tier.close()

    asyncio.run(check())


def test_smaller_caps_hold_from_the_opening_on() -> None:
    """Fewer bytes or files than there are: the oldest segments go before anything else happens."""

    async def check() -> None:
        for capacity_bytes, files_max in ((9 * MIB, 1000), (16 * MIB, ROWS_FILES + OTHER_FILES + 4)):
            bench = Bench()
            tier = bench.open()
            await bench.put(tier, 150)
            await tier.close()
            tier = bench.open(capacity_bytes, files_max)
            status = tier.status()
            assert status.used_bytes <= capacity_bytes and status.used_files <= files_max
            segments = [name for name in bench.disk.files if name.endswith(".seg")]
            assert len(segments) == 4
            rows = rows_of(tier)
            assert [tick for _, _, tick in rows] == list(range(149, 149 - len(rows), -1)) and len(rows) > 30
            await check_all(tier, {name: at for name, at, _ in rows}, bench)
            await tier.close()

    asyncio.run(check())


def test_caps_too_small_for_anything() -> None:
    """Are an error that says what would be enough."""
    with pytest.raises(ConfigError, match="at least"):
        SsdTier(HOME, 5 * MIB, io=SimDisk(random.Random(1)))
    with pytest.raises(ConfigError, match="files"):
        SsdTier(HOME, 50 * MIB, files_max=20, io=SimDisk(random.Random(1)))


def test_segment_sizes() -> None:
    """Good ones by default: many enough to reclaim in small steps, few enough to keep open, large enough for pages."""
    sizes = {
        gib: Caps(int(gib * 1024) * MIB, 10_000).choose_segment_bytes() for gib in (0.0625, 1, 8, 100, 1000, 10_000)
    }
    assert sizes[0.0625] == 8 * MIB and sizes[1] == 8 * MIB and sizes[8] == 64 * MIB
    assert sizes[100] == 256 * MIB and sizes[1000] == 2048 * MIB
    assert all(gib * 1024 * MIB / size <= 4096 for gib, size in sizes.items())
    assert Caps(1 << 30, 10_000, 128 * MIB).choose_segment_bytes() == 128 * MIB
    assert Caps(64 * MIB, 10_000, 128 * MIB).choose_segment_bytes() == 8 * MIB


def test_fsck_finds_nothing_wrong_in_a_good_directory() -> None:
    """And counts what is there."""

    async def check() -> None:
        bench = Bench()
        tier = bench.open()
        await bench.put(tier, 40)
        with pytest.raises(LockedError):
            fsck(HOME, io=bench.disk)
        tier.free(list(bench.places.values())[:5])
        await tier.close()
        report = fsck(HOME, io=bench.disk)
        assert report.clean and (report.records, report.orphans, report.corrupt) == (35, 0, 0), report

    asyncio.run(check())
    with pytest.raises(UnavailableError, match="no SSD cache"):
        fsck("/nowhere", io=SimDisk(random.Random(1)))


def test_fsck_revives_what_the_rows_lost() -> None:
    """After the rows are gone: nothing is found, repair finds it all, but for what was deleted and is known to be."""

    async def check() -> None:
        bench = Bench()
        tier = bench.open()
        await bench.put(tier, 40)
        await tier.close()
        bench.disk.logs.clear()
        tier = bench.open()
        assert rows_of(tier) == []
        await tier.close()
        assert fsck(HOME, io=bench.disk).orphans == 40
        report = fsck(HOME, repair=True, io=bench.disk)
        assert (report.orphans, report.revived) == (40, 40)
        tier = bench.open()
        found = {name: at for name, at, _ in rows_of(tier)}
        assert found == bench.places
        await check_all(tier, found, bench)
        tier.free(list(found.values())[:10])
        await bench.put(tier, 10, first=500)
        await tier.close()
        report = fsck(HOME, repair=True, io=bench.disk)
        assert (report.records, report.revived, report.clean) == (40, 0, True), report

    asyncio.run(check())


def test_fsck_drops_rows_of_bad_records() -> None:
    """Damage is reported, with repair the rows go, and a second look is clean."""

    async def check() -> None:
        bench = Bench()
        tier = bench.open()
        await bench.put(tier, 40)
        await tier.close()
        for path in [path for path in bench.disk.files if path.endswith(".seg")][:2]:
            bench.disk.flip(path, 5000)
        report = fsck(HOME, io=bench.disk)
        assert (report.corrupt, report.dropped, report.clean) == (2, 0, False)
        report = fsck(HOME, repair=True, io=bench.disk)
        assert (report.corrupt, report.dropped) == (2, 2)
        report = fsck(HOME, io=bench.disk)
        assert report.clean and report.records == 38, report
        tier = bench.open()
        found = {name: at for name, at, _ in rows_of(tier)}
        assert len(found) == 38
        await check_all(tier, found, bench)
        await tier.close()

    asyncio.run(check())
