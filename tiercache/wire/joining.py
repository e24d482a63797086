"""Joining: what an owner does with messages about blocks that several clients fill, and about parts of chains."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from tiercache.errors import ConfigError, ProtocolError
from tiercache.lease import extent_bytes
from tiercache.model import Kind, Name, Outcome, Terms
from tiercache.threads import in_thread
from tiercache.wire import frames, joint
from tiercache.wire.fills import INLINE_BYTES_MAX
from tiercache.wire.frames import Op, Patience
from tiercache.wire.joint import JoinAsk, Joined, LandAsk
from tiercache.wire.session import DURABLE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tiercache.wire.frames import Landed
    from tiercache.wire.post import Post
    from tiercache.wire.served import JointTicket, Served
    from tiercache.wire.session import Session

    Answered = Callable[[Session, Post, int, memoryview], bytes | None]

STEP_BLOCKS = 32
"""More blocks than these, or rows, are dealt with bit by bit, so that others are answered in between."""


class Joining:
    """See the module. `table` is a part of that of Answers; on the owner's loop."""

    def __init__(self, cache: Served) -> None:
        self._core, self._serving = cache, cache.serving
        self.table: dict[int, Answered] = {
            Op.JOIN: self._join,
            Op.LAND: self._land,
            Op.COMPARE: self._compare,
            Op.PROBE: self._probe,
            Op.LEASE_BLOCKS: self._lease_blocks,
            Op.TOUCH_CHAIN: self._touch_chain,
        }

    # -- joining -------------------------------------------------------------------------------------------------------

    def _join(self, session: Session, post: Post, number: int, body: memoryview) -> bytes | None:
        ask = joint.unpack_join(body)
        if ask.kind not in Kind.__members__.values():
            raise ProtocolError(f"there is no kind {ask.kind}")
        session.ask_put(ask.ticket)
        if self._core.recovered and len(ask.digests) <= _step(ask) and not session.endings:
            try:
                return self._joined(session, ask, self._begin(session, ask))
            finally:
                session.unask_put(ask.ticket)
        session.work("put", post, number, lambda: self._join_later(session, ask), len(body))
        return None

    async def _join_later(self, session: Session, ask: JoinAsk) -> bytes:
        ticket: JointTicket | None = None
        held = 0
        try:
            await session.all_ended()  # what it has given up just now makes room
            if not self._core.recovered:
                names = [Name(digest) for digest in ask.digests]
                await self._serving.recall([*names, Name(ask.parent)] if ask.parent else names)
            step, left = _step(ask), ask
            while left.digests:
                some = left._replace(digests=left.digests[:step])
                more = self._begin(session, some)
                if more is None:
                    break
                pinned, known = _extents(more), len(more.outcomes)
                held, session.pinned_bytes = held + pinned, session.pinned_bytes + pinned
                if ticket is None:
                    ticket = more
                else:
                    ticket.absorb(more)
                if known < len(some.digests):
                    break
                left = left._replace(digests=left.digests[step:], parent=some.digests[-1])
                await asyncio.sleep(0)
            return self._joined(session, ask, ticket)
        except BaseException:  # the client has gone meanwhile
            if ticket is not None:
                ticket.end()
            raise
        finally:
            session.pinned_bytes -= held
            session.unask_put(ask.ticket)

    def _begin(self, session: Session, ask: JoinAsk) -> JointTicket | None:
        """A ticket for as much of the batch, from its start, as this client may pin; None for nothing."""
        fits = len(ask.digests)
        if (ask.claim or ask.pieces) and ask.size <= self._serving.entry_bytes_max:  # else refused, with the reason
            fits = min(fits, max(0, session.room_bytes) // extent_bytes(ask.size))
        if session.ended or not session.may_put or not fits:
            return None
        terms = Terms(Kind(ask.kind), ask.scope, ask.cost_s, ask.expiry_s)
        return self._serving.join(
            ask.digests[:fits], ask.size, ask.part_bytes, ask.claim, ask.pieces, terms, parent=ask.parent
        )

    def _joined(self, session: Session, ask: JoinAsk, ticket: JointTicket | None) -> bytes:
        count = len(ask.digests)
        if ticket is None:
            zeros, nothing = [0] * count, Joined(0, [Outcome.BUSY] * count, [-1] * count, [], [], [[]] * count, 0)
            return joint.pack_joined(nothing._replace(claims=zeros, present=zeros))
        rest, locations = count - len(ticket.outcomes), ticket.locations
        answer = Joined(
            ask.ticket,
            ticket.outcomes + [Outcome.BUSY] * rest,
            locations + [-1] * rest,
            ticket.claims + [0] * rest,
            ticket.present + [0] * rest,
            ticket.pieces + [[]] * rest,
            count - rest,
        )
        packed = joint.pack_joined(answer)
        session.begin_put(ask.ticket, ticket, _extents(ticket), joint=True)
        return packed

    # -- landing -------------------------------------------------------------------------------------------------------

    def _land(self, session: Session, post: Post, number: int, body: memoryview) -> bytes | None:
        ask = joint.unpack_land(body)
        ticket = session.joint(ask.ticket)
        items = len(ticket.outcomes)
        if ask.flags & ~DURABLE or (ask.flags and (ask.landed or ask.pieces)):
            raise ProtocolError(f"no such flags of a LAND: {ask.flags}")
        _check_rows(ask.landed, items)
        for item, start, stop, _ in ask.pieces:
            if item >= items or not start < stop <= ticket.size:
                raise ProtocolError(f"bytes {start} to {stop} are no piece of block {item} of {items}")
        if ask.flags & DURABLE:
            if not self._core.durable:
                raise ConfigError("saved() needs an SSD: set ssd_bytes")
            session.work("disk", post, number, lambda: self._saved(session, ask.ticket), 0)
            return None
        size = sum(one.parts.bit_count() for one in ask.landed) * ticket.part_bytes
        size += sum(stop - start for _, start, stop, _ in ask.pieces)
        rows = len(ask.landed) + len(ask.pieces)
        if size <= INLINE_BYTES_MAX and rows <= STEP_BLOCKS and session.is_free(ask.ticket):
            return frames.pack_outcomes(ticket.commit(ask.landed, ask.pieces))
        session.work("put", post, number, lambda: self._land_later(session, ask), len(body))
        return None

    async def _land_later(self, session: Session, ask: LandAsk) -> bytes:
        async with session.turn(ask.ticket):
            ticket = session.joint(ask.ticket)
            return frames.pack_outcomes(await in_thread(ticket.commit, ask.landed, ask.pieces))

    async def _saved(self, session: Session, number: int) -> bytes:
        async with session.turn(number):
            return frames.pack_outcomes(await session.joint(number).saved())

    def _compare(self, session: Session, post: Post, number: int, body: memoryview) -> bytes | None:
        ticket_number, flags, rows = frames.unpack_landed(body)
        ticket = session.joint(ticket_number)
        if flags:
            raise ProtocolError(f"no such flags of a COMPARE: {flags}")
        _check_rows(rows, len(ticket.outcomes))
        if len(rows) <= STEP_BLOCKS:
            return joint.pack_maps(ticket.compare(rows))
        session.work("put", post, number, lambda: self._compare_later(session, ticket_number, rows), len(body))
        return None

    async def _compare_later(self, session: Session, number: int, rows: Sequence[Landed]) -> bytes:
        async with session.turn(number):
            ticket, maps = session.joint(number), list[int]()
            for at in range(0, len(rows), STEP_BLOCKS):
                maps += ticket.compare(rows[at : at + STEP_BLOCKS])
                await asyncio.sleep(0)
            return joint.pack_maps(maps)

    # -- look-ups ------------------------------------------------------------------------------------------------------

    def _probe(self, session: Session, post: Post, number: int, body: memoryview) -> bytes:
        return self._serving.probe(*joint.unpack_probe(body))

    def _touch_chain(self, session: Session, post: Post, number: int, body: memoryview) -> None:
        _, digests = joint.unpack_chain(body)
        self._core.touch_chain(digests)

    def _lease_blocks(self, session: Session, post: Post, number: int, body: memoryview) -> bytes | None:
        lease_number, patience, parts, digests = joint.unpack_lease_blocks(body)
        session.ask_lease(lease_number)
        try:
            lease = self._core.lease_blocks_resident(digests, parts)
        except BaseException:
            session.unask_lease(lease_number)
            raise
        if lease is not None or patience is Patience.MEMORY:
            return session.grant(lease_number, lease, len(digests))

        async def later() -> bytes:
            try:
                async with asyncio.timeout(session.limits.question_s):
                    found = await self._core.lease_blocks(digests, parts)
                return session.grant(lease_number, found, len(digests))
            finally:
                session.unask_lease(lease_number)

        session.work("lease", post, number, later, len(body))
        return None


def _step(ask: JoinAsk) -> int:
    """Blocks to join in one go."""
    return max(1, STEP_BLOCKS // max(1, len(ask.pieces)))


def _extents(ticket: JointTicket) -> int:
    """Bytes of memory in which there is something for the client to write."""
    return sum(at >= 0 for at in ticket.locations) * extent_bytes(ticket.size)


def _check_rows(rows: Sequence[Landed], items: int) -> None:
    if any(one.item >= items or not one.parts for one in rows):
        raise ProtocolError(f"rows of items that are not among {items}, or without parts")
