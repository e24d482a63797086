"""Contract suites for tiers: what every tier owes its callers, as pytest classes to subclass.

```python
class TestMyTier(TierTests):                      # or AddressableTests, and ReclaimingTests beside
    async def open_tier(self, home, capacity_bytes):
        return await MyTier.open(home, capacity_bytes)

    async def damage(self, tier, location, offset):
        ...                                       # flip a bit of the stored payload behind the tier's back
```

Every test opens a tier of its own in a fresh folder, inside one `asyncio.run`. The bytes are checked against what was
put in, never through the tier's own idea of them.
"""

from __future__ import annotations

from tiercache.testing.tiers.addressable import AddressableTests
from tiercache.testing.tiers.items import MIB, SHAPES, Item, fetch, flip, item, store
from tiercache.testing.tiers.plain import TierTests
from tiercache.testing.tiers.reclaiming import ReclaimingTests

__all__ = [
    "MIB",
    "SHAPES",
    "AddressableTests",
    "Item",
    "ReclaimingTests",
    "TierTests",
    "fetch",
    "flip",
    "item",
    "store",
]
