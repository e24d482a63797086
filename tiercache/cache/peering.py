"""Peering: what a cache does with the caches of other machines: looks there before object storage and origins, lends
what they ask for, takes what they offer, and offers what would be lost here.

What a peer lends stays pinned there until it is told that the bytes have come, and what is lent here likewise: see
peer/. Nothing is believed before its digests were compared with what arrived.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tiercache.cache.bringing import BATCH_SHARE, EVERY, Bringing, with_parts
from tiercache.cache.tiers import Mapped, whole
from tiercache.errors import TierCacheError
from tiercache.lease import Lease, extent_bytes
from tiercache.model import ALIGN_BYTES, Form, Kind, Name, Outcome, Payload, State, TierId

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence, Set

    import numpy.typing as npt

    from tiercache.cache.blocks import Blocks
    from tiercache.cache.bringing import Found
    from tiercache.cache.far import Near
    from tiercache.cache.storing import Storing
    from tiercache.cache.tasks import Tasks
    from tiercache.cache.tiers import Segment, Tiers
    from tiercache.index import Match
    from tiercache.lease import Gap, Landed, Load, PageRun

log = logging.getLogger(__name__)

ROOM_S, ROOM_WAIT_S, TRIES_MAX = 60.0, 0.02, 4
"""What was published to this cache waits so long for room, which is looked at so often; what did not come is tried so
often."""
ANCESTORS_MAX = 1024
"""Blocks that are offered along with one that is spilled."""
NAMES_AT_ONCE = 1024
"""Names that are looked up in the index in one go."""

ROUNDS_MAX = 64
"""Questions for one batch, as long as they bring something."""
TURNS = 2
"""So many in a row may bring nothing: who turned out not to have it, or is gone, is not asked again."""


class Loan(NamedTuple):
    """What a peer asked for, pinned: item i belongs to name i; None where it is not there, with why."""

    lease: Lease
    payloads: list[Payload | None]
    later: Set[int] = frozenset()
    """Which of these are there, and had no room."""


class Peering:
    """See the module. `probe` and `mark` may be called in any thread, all else on the cache's loop."""

    def __init__(
        self,
        tiers: Tiers,
        blocks: Blocks,
        storing: Storing,
        near: Near,
        *,
        lease: Callable[[Match, list[int], None, str], Awaitable[Lease]],
        relieve: Callable[[int], Awaitable[bool]],
        recovered: Callable[[], Awaitable[None]],
    ) -> None:
        """`lease` brings parts of what was matched to memory; `relieve` makes room without losing anything; `recovered`
        returns when everything that the SSD remembers is in the index."""
        self._tiers, self._near, self._lease, self._relieve = tiers, near, lease, relieve
        self.recovered = recovered
        self._bringing = Bringing(tiers, blocks, storing, "peer")

    def begin(self, tasks: Tasks) -> None:
        """Looks for peers, and lets them in."""
        self._near.begin(self, lambda work, name: tasks.start(work, name))

    async def close(self) -> None:
        """Peers are told, and what they had of this cache is theirs no more."""
        await self._near.close()

    # -- what peers have -----------------------------------------------------------------------------------------------

    def probe(self, digests: Sequence[bytes]) -> int:
        """How many of these blocks, from the first on, some peer is believed to have."""
        return self._near.prefix(digests)

    def sees(self, keys: Sequence[bytes]) -> list[bool]:
        """Which of these lone entries, or blocks, some peer is believed to have."""
        return self._near.sees([Name(one) for one in keys])

    def awaited(self, slots: Sequence[int]) -> int:
        """How many of these slots' pages some peer is believed to have."""
        return sum(self._near.sees(self._tiers.index.names(np.array(slots, np.int64))))

    async def bring(self, digests: Sequence[bytes], parts: int) -> None:
        """Puts what peers have of these blocks, or lone entries, into memory, as far as that can be done in time. Never
        raises."""
        left, idle = list(digests), 0
        for _ in range(ROUNDS_MAX):  # a peer pins only so much at a time
            if idle == TURNS or not any(self._near.sees([Name(one) for one in left])):
                return
            await self._bringing.bring(
                left, parts, lambda some: self._near.ask([Name(one) for one in some], [parts] * len(some))
            )
            lacking = [one for one, here in zip(left, self._bringing.local(left, parts), strict=True) if not here]
            if not lacking:
                return
            idle = idle + 1 if len(lacking) == len(left) else 0
            left = lacking

    def around(self, run: PageRun, load: Load) -> Load:
        """A load that takes from peers what they have of a file's pages, and leaves the rest to `load`."""

        async def first(gaps: Sequence[Gap], landed: Landed) -> None:
            seen = self._near.sees([Name(run.key, gap.ordinal) for gap in gaps])
            rest = list(range(len(gaps)))
            if any(seen):
                there = [i for i, one in enumerate(seen) if one]
                came = await self._pages(run, [gaps[i] for i in there])
                self._tiers.metrics.add("tiercache_misses_total", len(there) - len(came), kind="page")
                rest = [i for i in rest if i not in {there[at] for at in came}]
                if came:
                    landed([there[at] for at in came], list(came.values()))
            if rest:
                await load([gaps[i] for i in rest], _Shifted(landed, rest))

        return first

    async def _pages(self, run: PageRun, gaps: Sequence[Gap]) -> dict[int, bytes]:
        """Fills gaps from peers: which of them, with the digests of what lies there now."""
        came: dict[int, bytes] = {}
        began_s = self._tiers.clock.monotonic()
        places = {gap.ordinal: i for i, gap in enumerate(gaps)}
        try:
            found = await self._near.ask([Name(run.key, gap.ordinal) for gap in gaps], [gap.parts for gap in gaps])
            try:
                wanted: list[tuple[int, Payload]] = []
                for one in found.payloads:
                    i = places[one.name.ordinal]
                    same = (one.size, one.part_bytes) == (run.page_size(one.name.ordinal), run.part_bytes)
                    if same and not gaps[i].parts & ~one.parts:
                        wanted.append((i, with_parts(one, gaps[i].parts)))
                answers = await found.read([one for _, one in wanted], [gaps[i].target for i, _ in wanted])
            finally:
                found.end()
        except (TierCacheError, OSError) as error:
            writing = getattr(error, "writing", None)
            if writing is not None and not writing.done():
                raise  # something may still be written to the gaps: nobody else may fill them now
            log.debug("pages were not loaded from peers: %s", error)
            self._tiers.metrics.add("tiercache_tier_errors_total", 1, tier="peer", operation="load")
            return came
        for (i, _), (outcome, digests) in zip(wanted, answers, strict=True):
            if outcome is Outcome.HIT:
                came[i] = digests
        self._tiers.metrics.observe("tiercache_read_seconds", self._tiers.clock.monotonic() - began_s, tier="peer")
        self._tiers.metrics.add("tiercache_hits_total", len(came), tier="peer", kind="page")
        return came

    def hide(self, names: Sequence[Name]) -> None:
        """These were deleted: what peers have of them is not looked at any more."""
        self._near.hide(names)

    # -- what peers may have -------------------------------------------------------------------------------------------

    def mark(self, slots: npt.NDArray[np.int64]) -> None:
        """These slots have got parts: what is of use to peers is announced to them."""
        if len(slots) and self._near.anybody:
            self._near.stored(self._useful(slots))

    def _useful(self, slots: npt.NDArray[np.int64]) -> list[Name]:
        """Names of what of these slots is readable: pages with any parts, all else as a whole."""
        index = self._tiers.index
        facts = index.facts(slots)
        there = facts.memory_parts | facts.ssd_parts
        fit = (facts.state >= State.RESIDENT) & (there != 0)
        fit &= (facts.kind == Kind.PAGE) | (there == whole(facts.size, facts.part_bytes))
        some = slots[fit]
        forms = index.forms(some).tolist()
        return [
            Name(name.key) if form == Form.BLOCK else name for name, form in zip(index.names(some), forms, strict=True)
        ]

    def contents(self, after: int) -> tuple[list[Name], int]:
        """Names of what the slots from `after` on hold, as far as one step goes, and where the next one begins; 0 at
        the end."""
        index = self._tiers.index
        some, over = np.empty(0, np.int64), -1
        for tier in (TierId.MEMORY, TierId.SSD):
            residents = index.residents(tier)
            over = max(over, *residents[-1:].tolist(), -1)
            at = int(np.searchsorted(residents, after))
            some = np.union1d(some, residents[at : at + NAMES_AT_ONCE])  # of all of them it would take long
        some = some[:NAMES_AT_ONCE]
        pin = index.hold(some.tolist(), readable=True)
        try:
            names = self._useful(pin.slots)
        finally:
            self._tiers.release(pin)
        return names, int(some[-1]) + 1 if len(some) and some[-1] < over else 0

    async def lend(self, names: Sequence[Name], parts: Sequence[int], reserve: Callable[[int], int]) -> Loan:
        """Pins what the local tiers have of these, in memory, as far as these parts (a map each) go, and the bytes that
        `reserve` has of those that are wanted. An entry that has some of its parts is lent with those."""
        tiers = self._tiers
        match = tiers.index.match(names)
        facts = tiers.index.facts(match.slots)
        there = facts.memory_parts | (facts.ssd_parts if tiers.ssd_readable else np.uint64(0))
        wanted = np.array([one & EVERY for one in parts], np.uint64) & there
        wanted[tiers.expired(facts.expiry_s)] = 0
        room = -(-np.maximum(facts.size, 1).astype(np.int64) // ALIGN_BYTES) * ALIGN_BYTES
        upto = np.cumsum(np.where(wanted != 0, room, 0))
        beyond = (wanted != 0) & (upto > (reserve(int(upto[-1])) if len(upto) else 0))
        wanted[beyond] = 0
        lease = await self._lease(match, wanted.tolist(), None, "")
        payloads: list[Payload | None] = [None] * len(names)
        hits = [i for i, one in enumerate(lease.outcomes) if one is Outcome.HIT and wanted[i]]
        try:
            described = self.payloads(match.slots[hits])
            for i, one in zip(hits, described, strict=True):
                payloads[i] = with_parts(one, int(wanted[i]))
        except BaseException:
            lease.release()
            raise
        later = {i for i, one in enumerate(lease.outcomes) if one in (Outcome.FULL, Outcome.BUSY)}
        return Loan(lease, payloads, later.union(np.flatnonzero(beyond).tolist()))

    def payloads(self, slots: npt.NDArray[np.int64]) -> list[Payload]:
        """All that is known of entries in memory, digests included, by the names that find them (a block's says nothing
        of its depth). The caller has pinned them."""
        found = self._tiers.payloads(slots)
        return [replace(one, name=Name(one.name.key)) if one.form is Form.BLOCK else one for one in found]

    @property
    def memories(self) -> Sequence[Segment]:
        """Memory files so far; more may come."""
        memory: object = self._tiers.memory
        return memory.segments if isinstance(memory, Mapped) else ()

    async def take(self, found: Found, *, evict: bool) -> int:
        """Brings what a peer offers: how many of its entries are here now. With `evict` room is made, without losing
        what is here alone, and waited for; else only what is free is used."""
        wanted = [one for one in found.payloads if one.form is not Form.PAGE]
        share, some = self._tiers.settings.memory_bytes // BATCH_SHARE, list[Payload]()
        for one in [*wanted, None]:
            if some and (one is None or sum(each.size for each in some) + one.size > share):
                if not await (self._take_all(found, some) if evict else self._take(found, some)):
                    break
                some = []
            if one is not None:
                some.append(one)
        return len(wanted) - len(self._lacking(wanted))

    async def _take_all(self, found: Found, some: Sequence[Payload]) -> bool:
        """Makes room for these and brings them: whether all are here now."""
        until_s = self._tiers.clock.monotonic() + ROOM_S
        tries = 0
        while lacking := self._lacking(some):
            need = sum(extent_bytes(one.size) for one in lacking)
            if need <= self.room_bytes or await self._relieve(need):
                tries += 1
                if await self._take(found, lacking):
                    return True
            if tries >= TRIES_MAX or not self._tiers.ssd_writable or self._tiers.clock.monotonic() > until_s:
                return False
            await asyncio.sleep(ROOM_WAIT_S)  # others have what there is, and are about to give it back
        return True

    async def _take(self, found: Found, some: Sequence[Payload]) -> bool:
        """Brings what is not here of these, if there is room: whether all are here now."""
        lacking = self._lacking(some)
        if sum(extent_bytes(one.size) for one in lacking) > self.room_bytes:
            return False
        await self._bringing.take(found, some=lacking)
        return not self._lacking(lacking)

    def _lacking(self, some: Sequence[Payload]) -> list[Payload]:
        here = self._bringing.local([one.name.key for one in some], EVERY)
        return [one for one, there in zip(some, here, strict=True) if not there]

    @property
    def room_bytes(self) -> int:
        """Bytes of memory below its high mark: what can be taken without evicting anything."""
        status = self._tiers.memory.status()
        return max(0, int(status.capacity_bytes * self._tiers.settings.high_mark) - status.used_bytes)

    async def spill(self, slots: npt.NDArray[np.int64]) -> None:
        """These are about to be evicted, and nobody else here has them: peers with free memory may have them."""
        spare_bytes = self._near.spare_bytes
        alone = slots[self._alone(slots)] if spare_bytes else slots[:0]
        offered = self._with_ancestors(alone.tolist(), spare_bytes) if len(alone) else []
        if not offered:
            return
        pin = self._tiers.index.hold(offered, readable=True)
        # Nobody held them until now: others may have evicted some, and use their slots for something else.
        whole_now = set(pin.slots[self._alone(pin.slots)].tolist())
        ordered = np.array([slot for slot in offered if slot in whole_now], np.int64)
        try:
            payloads = self.payloads(ordered)
            locations = self._tiers.index.facts(ordered).memory_location.tolist()
        except BaseException:
            self._tiers.release(pin)
            raise
        lease = Lease([Outcome.HIT] * len(payloads), locations, self._tiers.memory, self._tiers.end_of(pin))
        try:
            spilled = await self._near.spill(Loan(lease, list(payloads)))
        finally:
            lease.release()
        self._tiers.metrics.add("tiercache_spills_total", spilled)

    def _alone(self, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which of these are in memory as a whole, and nowhere else here."""
        facts = self._tiers.index.facts(slots)
        alone: npt.NDArray[np.bool_] = (facts.memory_location >= 0) & (facts.kind != Kind.PAGE)
        alone &= (facts.memory_parts & ~facts.ssd_parts) != 0
        alone &= facts.memory_parts == whole(facts.size, facts.part_bytes)
        return alone

    def _with_ancestors(self, slots: Sequence[int], bytes_max: int) -> list[int]:
        """These, and the blocks before them that no peer is believed to have: a block can be taken after the one before
        it only, and leaves memory before that. Without those for which that is more than `bytes_max`."""
        index, found = self._tiers.index, dict[int, None]()
        for slot in slots:
            (size,) = index.facts(np.array([slot])).size.tolist()
            blocks_max = min(ANCESTORS_MAX, bytes_max // extent_bytes(size))
            path = [slot]
            while len(path) <= blocks_max:
                (above,) = index.parents(path[-1:])
                if not above or self._near.sees([Name(above)])[0]:
                    break
                match = index.match([Name(above)])
                before, there = int(match.slots[0]), index.facts(match.slots)
                self._tiers.release(match)
                if (
                    before < 0
                    or before in found
                    or not (there.memory_parts == whole(there.size, there.part_bytes)).all()
                ):
                    break
                path.append(before)
            else:
                continue
            found |= dict.fromkeys(reversed(path))
        return list(found)


class _Shifted:
    """Hears of gaps of a shorter list."""

    def __init__(self, landed: Landed, places: Sequence[int]) -> None:
        self._landed, self._places = landed, places

    def __call__(self, indexes: Sequence[int], digests: Sequence[bytes] | None = None, /) -> None:
        self._landed([self._places[i] for i in indexes], digests)
