"""The SSD tier keeps the contracts of Tier and Reclaiming, with O_DIRECT and buffered; and falls back by itself."""

from __future__ import annotations

import asyncio
import errno
import os
import random
from typing import TYPE_CHECKING

from tiercache.model import Outcome
from tiercache.ssd.fileio import FileIO
from tiercache.ssd.records import BLOCK_BYTES, split_location
from tiercache.ssd.recover import segment_path
from tiercache.ssd.tier import SsdTier
from tiercache.testing.simdisk import SimDisk
from tiercache.testing.tiers import MIB, ReclaimingTests, fetch, item, store

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tiercache.tier import Tier


class SsdTests(ReclaimingTests):
    """A directory of its own for every test; segments hold one of the largest entries each."""

    capacity_bytes = 64 * MIB
    survives = True

    def file_io(self) -> FileIO:
        """How the tier reaches the disk."""
        return FileIO()

    async def open_tier(self, home: Path, capacity_bytes: int) -> SsdTier:
        """In one folder each time."""
        self.home = str(home / "ssd")
        return SsdTier(self.home, capacity_bytes, segment_bytes=8 * MIB, io=self.file_io())

    async def make_room(self, tier: Tier) -> None:
        """Until a third of the capacity can be written: a first reclaim only moves what lives to the spare segment."""
        assert isinstance(tier, SsdTier)
        for _ in range(16):
            if tier.room_bytes() > self.capacity_bytes // 3:
                return
            await tier.reclaim(tier.victim(), [])
            self.check_caps(tier)

    async def damage(self, tier: Tier, location: int, offset: int) -> None:
        """Through the file, as a bad sector would; everything is present, so bytes lie straight behind the header."""
        assert isinstance(tier, SsdTier)
        number, _, block = split_location(location)
        with open(segment_path(self.home, number), "r+b", buffering=0) as file:
            file.seek((block + 1) * BLOCK_BYTES + offset)
            (byte,) = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))
            os.fsync(file.fileno())


class TestSsdTierDirect(SsdTests):
    """With O_DIRECT where the file system of the temporary folder has it."""


class TestSsdTierBuffered(SsdTests):
    """Through the page cache."""

    def file_io(self) -> FileIO:
        """Told so."""
        return FileIO(direct=False)


class TestSsdTierSimulated(SsdTests):
    """On the simulated disk: the twin behaves as the real one where nothing fails."""

    def setup_method(self) -> None:
        """A new disk for each test."""
        self.disk = SimDisk(random.Random(1))

    def file_io(self) -> FileIO:
        """The same disk at each opening of one test."""
        return self.disk

    async def damage(self, tier: Tier, location: int, offset: int) -> None:
        """In memory."""
        number, _, block = split_location(location)
        self.disk.flip(segment_path(self.home, number), (block + 1) * BLOCK_BYTES + offset)


class RefusingIO(FileIO):
    """A file system that opens files with O_DIRECT and then refuses to write to them."""

    def pwritev(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        """EINVAL, as some network and overlay file systems say."""
        if self.direct:
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        return super().pwritev(descriptor, buffers, offset)


def test_falls_back_where_direct_is_refused(tmp_path: Path) -> None:
    """By itself, at opening; and then keeps its word."""

    async def check() -> None:
        refusing = RefusingIO()
        tier = SsdTier(str(tmp_path), 16 * MIB, io=refusing)
        assert not refusing.direct
        one = item(1)
        (location,) = await store(tier, [one])
        assert await fetch(tier, [one.want(location)]) == [(Outcome.HIT, one.data)]
        await tier.close()

    asyncio.run(check())


def test_no_old_bytes_behind_a_record(tmp_path: Path) -> None:
    """Threads lay records out in memory that they use again: header and last block are filled up with zeros."""

    async def check() -> None:
        tier = SsdTier(str(tmp_path), 16 * MIB, threads=1)
        one, two = item(1, 3 * BLOCK_BYTES), item(2, BLOCK_BYTES + 5)
        await store(tier, [one])
        (location,) = await store(tier, [two])
        number, _, block = split_location(location)
        await tier.close()
        with open(segment_path(str(tmp_path), number), "rb") as file:
            file.seek(block * BLOCK_BYTES)
            record = file.read(3 * BLOCK_BYTES)
        assert record[BLOCK_BYTES : 2 * BLOCK_BYTES + 5] == two.data
        assert set(record[2 * BLOCK_BYTES + 5 :]) == {0}
        assert set(record[BLOCK_BYTES // 2 : BLOCK_BYTES]) == {0}

    asyncio.run(check())
