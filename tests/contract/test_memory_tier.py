"""The memory tier keeps the contracts of Tier and Addressable."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tiercache.cpu.tier import MemoryTier
from tiercache.testing.tiers import MIB, AddressableTests

if TYPE_CHECKING:
    from pathlib import Path


class TestMemoryTier(AddressableTests):
    """One segment of a memory file."""

    async def open_tier(self, home: Path, capacity_bytes: int) -> MemoryTier:
        """Nothing is kept in the folder."""
        return MemoryTier(capacity_bytes)


class TestMemoryTierInSegments(AddressableTests):
    """Small segments, so that batches span them."""

    capacity_bytes = 24 * MIB

    async def open_tier(self, home: Path, capacity_bytes: int) -> MemoryTier:
        """Segments hold one of the largest entries each."""
        return MemoryTier(capacity_bytes, segment_bytes=6 * MIB)


class TestAnonymousMemoryTier(AddressableTests):
    """Where the system has no memory files."""

    async def open_tier(self, home: Path, capacity_bytes: int) -> MemoryTier:
        """Private to the process."""
        return MemoryTier(capacity_bytes, shareable=False)
