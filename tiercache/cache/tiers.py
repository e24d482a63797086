"""Tiers: the local tiers behind one index, with what every part of the cache does to them: pin, free, make room.

Everything here may be called from any thread; nothing here waits.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from tiercache.errors import ConfigError
from tiercache.model import ALIGN_BYTES, Form, Kind, Outcome, Payload, TierId
from tiercache.tier import Addressable, Health, Tier

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from tiercache.buffers import Buffer
    from tiercache.clock import Clock
    from tiercache.index import Freed, Index, Match, Reservation
    from tiercache.lease import End
    from tiercache.metrics import Metrics
    from tiercache.model import Name
    from tiercache.settings import Settings
    from tiercache.tier import TierStatus

VICTIMS_BATCH = 64
NOTES_MANY = 256
SLOT_ROUNDS_MAX = 4
"""Batches of victims in a row that free no slot, before the search for slots is given up."""
ROOM_ROUNDS_MAX = 64
"""Rounds of eviction for one reservation: enough to clear any fragment, few enough to answer FULL soon."""


class MemoryTier(Tier, Addressable, Protocol):
    """Memory is a tier whose extents can be filled and read in place."""


@runtime_checkable
class Retiring(Protocol):
    """What memory adds that other processes read without asking."""

    def retire(self, locations: Sequence[int]) -> None:
        """Marks extents whose entries were deleted, though somebody still holds them: nobody new may read them."""
        ...


@runtime_checkable
class Describing(Protocol):
    """What memory adds that outlives its process: whoever comes after reads there what lies where."""

    def describe(self, locations: Sequence[int], payloads: Sequence[Payload]) -> None:
        """Writes down all that is known of extents before they are filled, but for parts and digests."""
        ...


class Segment(Protocol):
    """One memory file of shared memory."""

    @property
    def ordinal(self) -> int:
        """Which one it is."""
        ...

    @property
    def fd(self) -> int | None:
        """Its descriptor."""
        ...

    @property
    def span(self) -> Buffer:
        """All of it, mapped."""
        ...


@runtime_checkable
class Mapped(Protocol):
    """What memory adds that other processes can map."""

    @property
    def segments(self) -> Sequence[Segment]:
        """Its files so far; more may come."""
        ...


def whole(sizes: npt.NDArray[np.uint32], part_bytes: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint64]:
    """Map with every part set, for each entry (see model.all_parts)."""
    counts = np.maximum(-(-sizes.astype(np.int64) // np.maximum(part_bytes, 1)), 1)
    return np.uint64(0xFFFFFFFFFFFFFFFF) >> (64 - counts).astype(np.uint64)


def check_room(item: int, entry_bytes: int, target_bytes: int) -> None:
    """Refuses a target that an entry does not fit into."""
    if target_bytes < entry_bytes:
        raise ConfigError(f"target {item} has {target_bytes} bytes, the entry {entry_bytes}: pass a larger buffer")


class Tiers:
    """The index and the local tiers, together."""

    def __init__(
        self,
        index: Index,
        memory: MemoryTier,
        ssd: Tier | None,
        *,
        settings: Settings,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self.index, self.memory, self.ssd = index, memory, ssd
        self.settings, self.clock, self.metrics = settings, clock, metrics
        self.recovering = False
        """Whether the SSD may hold entries that the index has not been told of: until then nothing there is garbage."""
        self.recovered_rows = 0
        """What the SSD has told so far of what it remembers."""
        self.expiries = False
        """Whether any entry ever had an expiry: until then no look-up checks for it."""
        self.shared = False
        """Whether other processes look into the memory, and one of them may come after this one."""
        self.far: Callable[[], TierStatus] | None = None
        """Asks how object storage stands, where there is some."""
        self.nudge: Callable[[], None] = lambda: None
        """Wakes the background work; safe anywhere."""
        self._dropped: deque[Match | Reservation | list[int]] = deque()

    # -- pins and space ------------------------------------------------------------------------------------------------

    def end_of(self, pin: Match | Reservation) -> End:
        """The end of a lease on `pin`: at once, or noted for the next `drain` when no lock may be taken."""

        def end(safely: bool) -> None:
            if safely:
                self.release(pin)
            else:
                self._note(pin)

        return end

    def end_of_few(self, slots: list[int]) -> End:
        """The end of a lease on slots from `hit_few`."""

        def end(safely: bool) -> None:
            if not safely:
                self._note(slots)
            elif (freed := self.index.release_few(slots)) is not None:
                self.free(freed)

        return end

    @property
    def noted(self) -> bool:
        """Whether leases ended of which only a note was made."""
        return bool(self._dropped)

    def _note(self, pin: Match | Reservation | list[int]) -> None:
        """Inside a garbage collection, perhaps: takes no lock, and wakes the loop when many notes wait."""
        self._dropped.append(pin)
        if len(self._dropped) % NOTES_MANY == 0:
            self.nudge()

    def release(self, *pins: Match | Reservation) -> None:
        """Gives pins back, and the space of what was deleted under them."""
        self.free(self.index.release(*pins))

    def drain(self) -> None:
        """Gives back the pins of leases that ended inside a garbage collection."""
        while self._dropped:
            try:
                pin = self._dropped.popleft()
            except IndexError:
                return
            if isinstance(pin, list):
                self.free(self.index.release_few(pin))
            else:
                self.release(pin)

    def free(self, freed: Freed | None) -> None:
        """Frees locations, tier by tier. Whoever reads without asking is told of those that must wait."""
        if freed is None:
            return
        self._retire(freed.held)
        if len(freed[TierId.MEMORY]):
            self.memory.free(freed[TierId.MEMORY])
        if len(freed) > TierId.SSD and len(freed[TierId.SSD]) and self.ssd is not None:
            self.ssd.free(freed[TierId.SSD])

    def lose(self, slots: npt.NDArray[np.int64], tier: TierId) -> None:
        """Forgets the copies of `slots` in a tier whatever else holds them back: they are damaged or vanished."""
        gone = self.index.unplace(slots, tier, forced=True)
        if tier is TierId.MEMORY:
            self._retire(gone.held)
        store = self.memory if tier is TierId.MEMORY else self.ssd
        if store is not None:
            store.free([location for location in gone.locations.tolist() if location >= 0])

    def delete(self, names: Sequence[Name]) -> list[bool]:
        """Forgets these names in every tier; answers which were there."""
        freed, there = self.index.remove_names(names)
        self.free(freed)
        return there

    def _retire(self, locations: Sequence[int]) -> None:
        """These are on their way out, though somebody holds them. Those that have gone by now are ignored."""
        memory: object = self.memory
        if locations and isinstance(memory, Retiring):
            memory.retire(locations)

    def place(self, slots: npt.NDArray[np.int64], tier: TierId, locations: list[int], parts: list[int]) -> None:
        """Copies exist in a tier now; those that came too late (the slot is gone, or has one) are freed."""
        store = self.memory if tier is TierId.MEMORY else self.ssd
        unwanted = self.index.place(slots, tier, locations, np.array(parts, np.uint64))
        if unwanted and store is not None:
            store.free(unwanted)

    @property
    def ssd_readable(self) -> bool:
        """Whether reads from the SSD are worth trying."""
        return self.ssd is not None and self.ssd.status().health is not Health.OFF

    @property
    def ssd_writable(self) -> bool:
        """Whether the SSD takes new entries."""
        return self.ssd is not None and self.ssd.status().health is Health.HEALTHY

    def purge(self, names: Sequence[Name]) -> None:
        """Forgets those of `names` whose time is over, so that they can be put anew."""
        if not self.expiries:
            return
        now_s = int(self.clock.wall())
        freed, gone = self.index.remove_names(names, expired_by_s=now_s)
        self.metrics.add("tiercache_expirations_total", sum(gone))
        self.free(freed)

    def expired(self, expiries_s: npt.NDArray[np.uint32]) -> npt.NDArray[np.bool_]:
        """Which of these moments have passed."""
        if not self.expiries:
            return np.zeros(len(expiries_s), bool)
        over: npt.NDArray[np.bool_] = (expiries_s != 0) & (expiries_s <= self.clock.wall())
        return over

    # -- room ----------------------------------------------------------------------------------------------------------

    def reserve(
        self, names: Sequence[Name], sizes: Sequence[int], part_bytes: Sequence[int], *, sparse: bool = False
    ) -> list[int]:
        """Extents in memory; evicts on the caller's path only when there is no room otherwise. FULL where none came."""
        locations = self.memory.reserve(names, sizes, part_bytes, sparse=sparse)
        for _ in range(ROOM_ROUNDS_MAX):
            short = [i for i, location in enumerate(locations) if location == Outcome.FULL]
            if not short:
                break
            self.drain()
            if not self.evict(sum(max(1, sizes[i]) for i in short)):  # also an empty entry takes an extent
                break
            again = self.memory.reserve(
                [names[i] for i in short], [sizes[i] for i in short], [part_bytes[i] for i in short], sparse=sparse
            )
            for i, location in zip(short, again, strict=True):
                locations[i] = location
        return locations

    def payloads(self, slots: npt.NDArray[np.int64]) -> list[Payload]:
        """All that is known of entries in memory, digests included. The caller has pinned them."""
        index = self.index
        facts = index.facts(slots)
        rows = zip(
            index.names(slots), self.memory.payloads(facts.memory_location.tolist()), index.parents(slots),
            facts.kind.tolist(), facts.scope.tolist(), facts.cost_s.tolist(), facts.expiry_s.tolist(),
            index.forms(slots).tolist(), strict=True,
        )  # fmt: skip
        return [
            Payload(
                name, one.size, one.part_bytes, one.parts, one.digests, Kind(kind), parent,
                scope, cost_s, expiry_s, 0, Form(form),
            )
            for name, one, parent, kind, scope, cost_s, expiry_s, form in rows
        ]  # fmt: skip

    def describe(self, slots: npt.NDArray[np.int64], locations: list[int]) -> None:
        """Writes beside fresh extents of shared memory what the index knows of the slots that they are for."""
        memory: object = self.memory
        if not self.shared or not locations or not isinstance(memory, Describing):
            return
        index = self.index
        facts = index.facts(slots)
        rows = zip(
            index.names(slots), facts.size.tolist(), facts.part_bytes.tolist(), facts.kind.tolist(),
            index.parents(slots), facts.scope.tolist(), facts.cost_s.tolist(), facts.expiry_s.tolist(),
            index.forms(slots).tolist(), strict=True,
        )  # fmt: skip
        memory.describe(
            locations,
            [
                Payload(name, size, step, 0, b"", Kind(kind), parent, scope, cost_s, expiry_s, 0, Form(form))
                for name, size, step, kind, parent, scope, cost_s, expiry_s, form in rows
            ],
        )

    def evict(self, wanted_bytes: int) -> int:
        """Drops the oldest entries from memory until about `wanted_bytes` are free; answers the bytes freed."""
        freed = refused = 0
        count = 1
        while freed < wanted_bytes and refused < ROOM_ROUNDS_MAX:
            # Victims that were named must go or be kept, so ask for few at first: one page wanted is one page evicted.
            victims = self.index.victims(TierId.MEMORY, count)
            if not len(victims):
                break
            got = self.forget(victims)
            freed += got
            refused = 0 if got else refused + 1
            count = min(2 * count, VICTIMS_BATCH)
        return freed

    def forget(self, slots: npt.NDArray[np.int64]) -> int:
        """Takes the memory copies of `slots` away, as far as they may go; answers the bytes freed."""
        facts = self.index.facts(slots)
        # What extents take, not what is in them: small entries would seem to free nothing, and far too many would go.
        room = -(-np.maximum(facts.size, 1).astype(np.int64) // ALIGN_BYTES) * ALIGN_BYTES
        sizes = dict(zip(facts.memory_location.tolist(), room.tolist(), strict=True))
        gone = self.index.unplace(slots, TierId.MEMORY)
        locations = [location for location in gone.locations.tolist() if location >= 0]
        self.memory.free(locations)
        freed: int = sum(sizes.get(location, 0) for location in locations)
        self.metrics.add_all(
            [
                ("tiercache_evictions_total", len(locations), "memory", ""),
                ("tiercache_evicted_bytes_total", freed, "memory", ""),
            ]
        )
        return freed

    def make_slots(self, count: int) -> None:
        """Forgets the oldest entries in every tier until `count` slots of the index are free, as far as they may go.

        Used slots are bounded like bytes: small entries fill the table long before they fill an SSD.
        """
        index = self.index
        most = max(0, index.slots_max - count)
        # First what is on the SSD: its order of use hears of hits in memory too. Then what never got there.
        for tier in (TierId.SSD, TierId.MEMORY) if self.ssd is not None else (TierId.MEMORY,):
            refused = 0
            while (over := index.used - most) > 0 and refused < SLOT_ROUNDS_MAX:
                victims = index.victims(tier, min(over, VICTIMS_BATCH))
                if not len(victims):
                    break
                self.forget(victims)
                if tier is TierId.SSD and self.ssd is not None:
                    gone = index.unplace(victims, tier)
                    self.ssd.free([location for location in gone.locations.tolist() if location >= 0])
                    self.metrics.add("tiercache_evictions_total", len(gone.locations), tier="ssd")
                refused = 0 if index.used < most + over else refused + 1
