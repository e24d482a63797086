"""Bringing: entries that another place has, an object store or a peer, come into memory.

Loads fill extents as any writer does (blocks.py, storing.py): claimed, verified, then shown. Equal loads are merged:
who comes second waits for the first, and loads what that did not get.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Protocol

import numpy as np

from tiercache.cache.tiers import whole
from tiercache.errors import AbandonedLoad, TierCacheError
from tiercache.model import PARTS_MAX, Form, Name, Outcome, Payload, Terms, all_parts, part_bytes_for
from tiercache.threads import in_thread

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from tiercache.buffers import Buffer
    from tiercache.cache.blocks import Blocks
    from tiercache.cache.far import Ticket
    from tiercache.cache.storing import Storing
    from tiercache.cache.tiers import Tiers

log = logging.getLogger(__name__)

BATCH_SHARE = 8
"""Of memory, what one load may claim at a time."""
BRING_SHARE = 2
"""Of memory, what one call may bring."""
EVERY = (1 << PARTS_MAX) - 1
"""The map of all parts that an entry may have."""


class Found(Protocol):
    """What another place has of what it was asked for, and holds until the end of this."""

    @property
    def payloads(self) -> list[Payload]:
        """Shapes and terms of the entries, in the order of the question, without those that are not there. `parts`:
        which of them are there."""
        ...

    async def read(self, wanted: Sequence[Payload], targets: Sequence[Buffer]) -> list[tuple[Outcome, bytes]]:
        """Brings parts (`parts` of each) to their places in the extents `targets` of whole entries: HIT and the digests
        of the entry, CORRUPT or MISS. Ends within a deadline; after that nothing is written to a target. Digests have
        been compared with what arrived."""
        ...

    def end(self) -> None:
        """Nobody reads any more. Idempotent."""
        ...


class Bringing:
    """See the module. On the cache's loop."""

    def __init__(self, tiers: Tiers, blocks: Blocks, storing: Storing, place: str) -> None:
        """`place` is the tier that metrics name."""
        self._tiers, self._blocks, self._storing, self._place = tiers, blocks, storing, place
        self._batch_bytes = tiers.settings.memory_bytes // BATCH_SHARE
        self._bring_bytes = tiers.settings.memory_bytes // BRING_SHARE
        self._coming: dict[bytes, asyncio.Future[None]] = {}

    async def bring(self, digests: Sequence[bytes], parts: int, ask: Callable[[list[bytes]], Awaitable[Found]]) -> None:
        """Puts what is found of these blocks of a chain, or lone entries, into the cache with these parts, as far as
        that can be done in time. `ask` says what there is of those that the local tiers lack. Never raises."""
        if not parts or self._all_local(digests, parts):
            return
        try:
            for _ in range(2):  # what others are loading is waited for, and what they did not get is loaded
                coming = [self._coming[one] for one in digests if one in self._coming]
                if not coming:
                    break
                await asyncio.wait(coming)
            lacking = [one for one, here in zip(digests, self.local(digests, parts), strict=True) if not here]
            if lacking:
                await self._bring(lacking, parts, ask)
        except (TierCacheError, OSError) as error:
            self._tiers.metrics.add("tiercache_tier_errors_total", 1, tier=self._place, operation="load")
            log.debug("what the %s tier has was not loaded: %s", self._place, error)

    async def _bring(self, lacking: list[bytes], parts: int, ask: Callable[[list[bytes]], Awaitable[Found]]) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        mine = [one for one in dict.fromkeys(lacking) if one not in self._coming]
        self._coming |= dict.fromkeys(mine, future)
        try:
            found = await ask(lacking)
            try:
                await self.take(found, parts)
            finally:
                found.end()
        finally:
            for one in mine:
                del self._coming[one]
            future.set_result(None)

    async def take(self, found: Found, parts: int = EVERY, some: Sequence[Payload] | None = None) -> None:
        """Loads what was found, or some of it, in order, until something of it does not come."""
        room = self._bring_bytes
        for run in _runs(found.payloads if some is None else some, self._batch_bytes):
            room -= sum(one.size for one in run)
            if room < 0 or not await self._load(run, parts, found):
                break

    def _all_local(self, digests: Sequence[bytes], parts: int) -> bool:
        tiers = self._tiers
        if len({len(one) for one in digests}) == 1:  # perhaps a chain, of which this is the faster way to know
            there = tiers.index.chains.probe(digests, parts, ssd=tiers.ssd_readable)
            if len(there) == len(digests):
                return True
        return all(self.local(digests, parts))

    def local(self, digests: Sequence[bytes], parts: int) -> list[bool]:
        """Which of these the local tiers have with these parts."""
        tiers = self._tiers
        match = tiers.index.match([Name(one) for one in digests])
        try:
            facts = tiers.index.facts(match.slots)
        finally:
            tiers.release(match)
        wanted = whole(facts.size, facts.part_bytes) & np.uint64(parts & (1 << 64) - 1)
        there = facts.memory_parts | (facts.ssd_parts if tiers.ssd_readable else np.uint64(0))
        found: list[bool] = ((match.slots >= 0) & ((there & wanted) == wanted)).tolist()
        return found

    async def _load(self, run: Sequence[Payload], parts: int, found: Found) -> bool:
        """Blocks of one chain and shape in order, or lone entries, as a whole. False where there is no use in going
        on."""
        first = run[0]
        terms = Terms(first.kind, first.scope, max(one.cost_s for one in run), first.expiry_s)
        wanted = parts & all_parts(first.size, first.part_bytes)
        if first.form is Form.BLOCK:
            digests = [one.name.key for one in run]
            joined = self._blocks.join(digests, first.size, first.part_bytes, wanted, (), terms, parent=first.parent)
            claims = {i: claim & run[i].parts for i, claim in enumerate(joined.claims) if claim & run[i].parts}
            return await self._fill(joined, run, claims, joined.buffers, found)
        fit = [one for one in run if one.part_bytes == part_bytes_for(one.size) and one.parts == _whole(one)]
        lone = self._storing.reserve([Name(one.name.key) for one in fit], [one.size for one in fit], terms)
        claims = {i: _whole(one) for i, one in enumerate(fit) if lone.locations[i] >= 0}
        return await self._fill(lone, fit, claims, lambda i: self._tiers.memory.buffers([lone.locations[i]])[0], found)

    async def _fill(
        self,
        ticket: Ticket,
        run: Sequence[Payload],
        claims: dict[int, int],
        buffer: Callable[[int], Buffer],
        found: Found,
    ) -> bool:
        """Reads what was claimed into its extents, and shows what is right."""
        tiers = self._tiers
        began_s = tiers.clock.monotonic()
        end = ticket.end
        try:
            asked = [with_parts(run[i], claim) for i, claim in claims.items()]
            answers = await found.read(asked, [buffer(i) for i in claims]) if asked else []
            landed = [
                (i, claim, digests)
                for (i, claim), (outcome, digests) in zip(claims.items(), answers, strict=True)
                if outcome is Outcome.HIT
            ]
            if landed:  # which hashes once more, for what arrived now lies in memory that others may write to
                await in_thread(ticket.commit, landed)
        except AbandonedLoad as gone:
            if gone.writing is not None and not gone.writing.done():  # its extents are nobody's until that is over
                gone.writing.add_done_callback(lambda _: ticket.end())
                end = _nothing
            raise
        finally:
            end()
        tiers.metrics.observe("tiercache_read_seconds", tiers.clock.monotonic() - began_s, tier=self._place)
        tiers.metrics.add("tiercache_hits_total", len(landed), tier=self._place, kind="block")
        return len(landed) == len(claims)


def _whole(one: Payload) -> int:
    return all_parts(one.size, one.part_bytes)


def _nothing() -> None:
    """Somebody else ends the ticket."""


def with_parts(one: Payload, parts: int) -> Payload:
    """An entry of which these parts are wanted."""
    return Payload(
        one.name, one.size, one.part_bytes, parts, one.digests, one.kind, one.parent,
        one.scope, one.cost_s, one.expiry_s, one.tick, one.form,
    )  # fmt: skip


def _after(one: Payload) -> tuple[bytes, int, int]:
    """What the block after this one says of itself, where it can go on with it."""
    return one.name.key, one.size, one.part_bytes


def _runs(found: Sequence[Payload], bytes_max: int) -> Iterator[list[Payload]]:
    """Blocks that follow each other in one chain, of one shape and with the same terms, or lone entries with the same
    terms, up to so many bytes together."""
    run: list[Payload] = []
    for one in found:
        last = run[-1] if run else None
        if (
            last is None
            or (one.form, one.kind, one.scope, one.expiry_s) != (last.form, last.kind, last.scope, last.expiry_s)
            or (one.form is Form.BLOCK and (one.parent, one.size, one.part_bytes) != _after(last))
            or sum(each.size for each in run) + one.size > bytes_max
        ):
            if run:
                yield run
            run = []
        run.append(one)
    if run:
        yield run
