"""Blocks in object storage: the lowest tier, which outlives hosts and is shared by caches that know of nothing else.

Below one prefix of a bucket lie packs/WRITER/N (many blocks each, see packs.py), index/WRITER/N (what is in a writer's
packs, see snapshots.py), budget/N (who may have how much, see budget.py) and FORMAT. Every cache that has the bucket
open reads all packs, and deletes only its own, and those it has taken over from the dead.

What is there is known from memory: `find` asks nobody. That knowledge is renewed by listing the bucket now and then,
sooner where something was missed; snapshots are read first, and the tables of packs that are in none. A pack that
was deleted meanwhile is a miss when it is read, and so is everything else that goes wrong: every call ends within a
deadline.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from tiercache.errors import TierCacheError
from tiercache.remote.asking import Asking
from tiercache.remote.budget import GRACE_S, LEASE_S, PUT_S, Budget
from tiercache.remote.catalog import Catalog
from tiercache.remote.reading import Reading
from tiercache.remote.writing import Writing
from tiercache.tier import Health, TierStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from random import Random

    from tiercache.buffers import Buffer
    from tiercache.clock import Clock
    from tiercache.metrics import Metrics
    from tiercache.model import Outcome, Payload
    from tiercache.remote.bucket import Bucket

log = logging.getLogger(__name__)

PACK_BYTES = 32 << 20
"""Size that packs are filled to."""
PACKS_MIN = 16
"""Of a small cap, so many packs fill it."""
REFRESH_S = 60.0
"""The bucket is listed so often, when nobody misses anything."""
MISSED_S = 5.0
"""And so soon after the last time, where something was missed."""
PAGE_OBJECTS = 1000
"""One request lists so many objects: a bucket with more is listed less often, and the requests stay as many."""


class RemoteBlocks:
    """See the module. `find` may be called in any thread, all else on the loop that `run` runs on."""

    def __init__(
        self,
        bucket: Bucket,
        limit_bytes: int,
        *,
        clock: Clock,
        metrics: Metrics,
        random: Random,
        deadline_s: float = 5.0,
        lifetime_s: float = 0.0,
        rate_bytes_s: float = 0.0,
        pack_bytes: int = PACK_BYTES,
        lease_s: float = LEASE_S,
        grace_s: float = GRACE_S,
        put_s: float = PUT_S,
    ) -> None:
        """`limit_bytes` caps all that all writers have in the bucket together; they should agree on it. Blocks live for
        `lifetime_s` at most (0: until they are evicted); uploads take `rate_bytes_s` on average (0: as it comes)."""
        self.pack_bytes, self._deadline_s, self._clock = pack_bytes, deadline_s, clock
        self._asking = Asking(bucket, clock=clock, metrics=metrics, deadline_s=deadline_s)
        self._catalog = Catalog(self._asking, clock=clock, metrics=metrics)
        self._reading = Reading(self._asking, self._catalog, metrics=metrics)
        self._budget = Budget(
            self._asking, limit_bytes, clock=clock, random=random, step_bytes=2 * pack_bytes,
            lease_s=lease_s, grace_s=grace_s, put_s=put_s,
        )  # fmt: skip
        self._writing = Writing(
            self._asking, self._catalog, self._budget,
            clock=clock, metrics=metrics, pack_bytes=pack_bytes, lifetime_s=lifetime_s, rate_bytes_s=rate_bytes_s,
        )  # fmt: skip
        self._limit_bytes = limit_bytes
        self._tick_s = min(REFRESH_S, lease_s / 6)
        self._listed = asyncio.Event()
        self._wake = asyncio.Event()
        self._listed_at_s = clock.monotonic() - REFRESH_S

    def find(self, keys: Sequence[bytes]) -> list[Payload | None]:
        """What is known of these entries: shapes and terms without digests, None for what is not there."""
        return self._catalog.find(keys)

    def hide(self, keys: Sequence[bytes]) -> None:
        """Whatever the bucket has of these is not looked at any more, until they are written anew."""
        self._catalog.hide(keys)

    def missed(self) -> None:
        """Somebody asked for what is not there: another writer may have brought it since."""
        if self._clock.monotonic() - self._listed_at_s >= MISSED_S * self._pages:
            self._wake.set()

    @property
    def _pages(self) -> int:
        return 1 + self._catalog.count // PAGE_OBJECTS

    async def known(self) -> None:
        """Returns when the bucket has been listed once, or a deadline after that could have been."""
        if not self._listed.is_set():
            try:
                async with asyncio.timeout(self._deadline_s):
                    await self._listed.wait()
            except TimeoutError:
                self._listed.set()  # it is waited for once

    def prefix(self, keys: Sequence[bytes]) -> int:
        """How many of these entries, from the first on, are there; any thread."""
        return self._catalog.prefix(keys)

    async def read(self, wanted: Sequence[Payload], targets: Sequence[Buffer]) -> list[tuple[Outcome, bytes]]:
        """Brings parts (`parts` of what `find` answered) to their places in the extents `targets` of whole entries:
        HIT and the digests of the entry, CORRUPT or MISS. Ends within a deadline that grows with what is asked for;
        after that nothing is written to a target. Digests have been compared with what arrived."""
        return await self._reading.read(wanted, targets)

    async def write(
        self, payloads: Sequence[Payload], sources: Sequence[Buffer], copied: Callable[[], None] = lambda: None
    ) -> list[Outcome]:
        """Uploads whole entries, with their digests, as one pack: HIT where it is there (now, or before), FULL where
        there was no room in this writer's share, BUSY where the bucket did not take it, CORRUPT where a source has not
        its digests. The caller holds the sources until it hears that they are `copied`, or this ends."""
        return await self._writing.write(payloads, sources, copied)

    async def run(self) -> None:
        """Keeps the catalog fresh, the lease alive and the bucket tidy, for as long as it is not cancelled."""
        while True:
            await self._tend()
            self._wake.clear()
            try:
                async with asyncio.timeout(self._tick_s if self._asking.well else MISSED_S):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def _tend(self) -> None:
        now_s = self._clock.monotonic()
        every_s = (MISSED_S if self._wake.is_set() else REFRESH_S) * self._pages
        due = now_s - self._listed_at_s >= (every_s if self._asking.well else MISSED_S)
        try:
            if due:
                self._listed_at_s = now_s
                await self._catalog.refresh()
        except (TierCacheError, OSError) as error:
            log.debug("the bucket could not be listed: %s", error)
        if self._catalog.listed:
            self._listed.set()
        try:
            await self._writing.tend()
        except (TierCacheError, OSError) as error:
            log.debug("the bucket could not be tidied: %s", error)

    async def close(self) -> None:
        """Leaves a snapshot and the holding to others, if the bucket lets it. Idempotent."""
        try:
            await self._writing.close()
        except (TierCacheError, OSError) as error:
            log.debug("the bucket was left as it is: %s", error)
        self._asking.close()

    def status(self) -> TierStatus:
        """Usage as far as this cache knows: all packs it has seen."""
        health = Health.HEALTHY if self._asking.well else Health.OFF
        if health is Health.HEALTHY and (self._writing.refused or self._writing.denied):
            health = Health.READ_ONLY
        used, files = self._catalog.used_bytes, len(self._catalog.packs)
        return TierStatus("remote", health, self._limit_bytes, used, 1 << 31, files)
