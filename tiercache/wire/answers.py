"""Answers: what an owner does with each message of a client. Hot questions are answered in the reader's callback, those
that may wait in tasks of the session."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

from tiercache.errors import ConfigError, ProtocolError, TierCacheError
from tiercache.lease import PageRun, extent_bytes
from tiercache.model import Form, Kind, Name, Outcome, Terms, all_parts
from tiercache.threads import in_thread
from tiercache.wire import frames
from tiercache.wire.frames import Op, Patience
from tiercache.wire.joining import Joining
from tiercache.wire.post import ONE_WAY
from tiercache.wire.session import DURABLE, LAST
from tiercache.wire.sockets import FDS_MAX
from tiercache.wire.telling import Telling

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from typing import Any

    from tiercache.lease import Lease
    from tiercache.wire.frames import Frame, ReserveAsk
    from tiercache.wire.notes import Notes
    from tiercache.wire.post import Post
    from tiercache.wire.served import Served
    from tiercache.wire.session import Session

    Answered = Callable[[Session, Post, int, memoryview], bytes | None]

TOUCHES_MAX = 4096
"""Of one message; the rest are hits that nobody counts."""
NOTE_S_MAX = 86_400.0


class Answers:
    """Takes messages apart and answers them. `take` raises nothing but ProtocolError, for which the connection is to be
    closed."""

    def __init__(
        self,
        cache: Served,
        notes: Notes,
        *,
        clients: Callable[[], list[dict[str, Any]]],
        others: Callable[[Session], Sequence[Post]],
        hold: Callable[[Sequence[int]], Lease | None],
        told_s: float,
    ) -> None:
        """`others` are the lines of all clients but this one; `hold` takes leases from before this owner's time; a
        client that is told to forget is waited for `told_s` long."""
        self._telling = Telling(told_s)
        self._core, self._serving = cache, cache.serving
        self._notes, self._clients, self._others, self._hold = notes, clients, others, hold
        # A handler answers, or answers None: then it has begun a task, or there is nothing to answer.
        self._table: dict[int, Answered] = {
            Op.SEGMENTS: self._segments,
            Op.LEASE: self._lease,
            Op.LEASE_PAGES: self._lease_pages,
            Op.MATCH: self._match,
            Op.READ: self._read,
            Op.RELEASE: self._release,
            Op.TOUCH: self._touch,
            Op.FILLED: self._filled,
            Op.UNFILLED: self._unfilled,
            Op.RESERVE: self._reserve,
            Op.COMMIT: self._commit,
            Op.ABANDON: self._abandon,
            Op.DELETE: self._delete,
            Op.QUARANTINE: self._quarantine,
            Op.FLUSH: self._flush,
            Op.STATS: self._stats,
            Op.CLAIM: self._claim,
            Op.SETTLE: self._settle,
            Op.KNOWN: self._known,
            Op.FORGET: self._forget,
            Op.TOLD: self._told,
            Op.CALL: self._call,
            Op.REDECLARE: self._redeclare,
            **Joining(cache).table,
        }

    def take(self, session: Session, post: Post, frame: Frame) -> None:
        """Deals with one message."""
        op, number, body = frame
        handler = self._table.get(op)
        if handler is None:
            raise ProtocolError(f"there is no operation {op}")
        try:
            answer = handler(session, post, number, body)
            if answer is not None:
                post.answer(number, answer)
        except ProtocolError:
            raise
        except Exception as fault:  # noqa: BLE001  # the boundary to other processes: they get a fault, we a report
            if not isinstance(fault, TierCacheError | OSError | LookupError):
                session.report(fault)
            if op not in ONE_WAY:
                post.fault(number, fault)

    # -- leases --------------------------------------------------------------------------------------------------------

    def _lease(self, session: Session, post: Post, number: int, body: memoryview) -> bytes | None:
        lease_number, patience, names = frames.unpack_lease(body)
        session.ask_lease(lease_number)
        try:
            lease = self._core.lease_names_resident(names)
        except BaseException:
            session.unask_lease(lease_number)
            raise
        return self._leased(session, post, number, (lease_number, patience, names, None), lease, len(body))

    def _lease_pages(self, session: Session, post: Post, number: int, body: memoryview) -> bytes | None:
        lease_number, patience, key, ordinals, parts = frames.unpack_pages(body)
        if 0 in parts or (len(ordinals) > 1 and len(set(ordinals)) < len(ordinals)):
            raise ProtocolError("a page without parts, or one page twice")
        session.ask_lease(lease_number)
        try:
            lease = self._core.lease_resident(key, ordinals, parts)
        except BaseException:
            session.unask_lease(lease_number)
            raise
        names: list[Name] = [] if lease is not None else [Name(key, ordinal) for ordinal in ordinals]
        return self._leased(session, post, number, (lease_number, patience, names, parts), lease, len(body))

    def _leased(
        self,
        session: Session,
        post: Post,
        number: int,
        ask: tuple[int, Patience, list[Name], list[int] | None],
        lease: Lease | None,
        size: int,
    ) -> bytes | None:
        """Grants what is all in memory; else goes as far as the client's patience."""
        lease_number, patience, names, parts = ask
        if lease is None and patience is Patience.MEMORY:
            lease = self._serving.lease_memory(names, parts)
        if lease is not None:
            return session.grant(lease_number, lease, len(lease))

        async def look() -> Lease | None:
            return await self._serving.lease_local(names, parts, together=patience is Patience.LOCAL)

        session.work("lease", post, number, lambda: self._granted(session, lease_number, look, len(names)), size)
        return None

    async def _granted(
        self, session: Session, lease_number: int, look: Callable[[], Awaitable[Lease | None]], count: int
    ) -> bytes:
        try:
            async with asyncio.timeout(session.limits.question_s):
                lease = await look()
            return session.grant(lease_number, lease, count)
        finally:
            session.unask_lease(lease_number)

    def _match(self, session: Session, post: Post, number: int, body: memoryview) -> bytes | None:
        lease_number, patience, names = frames.unpack_lease(body)
        digests = [name.key for name in names]
        _check_chain(names)
        session.ask_lease(lease_number)
        try:
            lease = self._core.match_resident(digests)
        except BaseException:
            session.unask_lease(lease_number)
            raise
        if len(lease) == len(names) or patience is Patience.MEMORY:
            return session.grant(lease_number, lease, len(lease))
        lease.release()

        async def look() -> Lease:
            return await self._core.match(digests)

        session.work("lease", post, number, lambda: self._granted(session, lease_number, look, 0), len(body))
        return None

    def _read(self, session: Session, post: Post, number: int, body: memoryview) -> None:
        ask = frames.unpack_read(body)
        key, size, page_bytes, part_bytes, scope, cost_s, expiry_s = ask.run
        run = PageRun(key, size, page_bytes, part_bytes, scope, cost_s, expiry_s)
        for ordinal, parts in zip(ask.ordinals, ask.parts, strict=True):
            if not parts or parts & ~all_parts(run.page_size(ordinal), part_bytes):
                raise ProtocolError(f"page {ordinal} has no parts {parts:#x}")
        if post is not session.line:
            raise ConfigError("READ is for the line: a channel is not told what to load")
        session.ask_lease(ask.lease)
        session.work("read", post, number, lambda: self._reading(session, post, number, run, ask), len(body))

    async def _reading(self, session: Session, post: Post, number: int, run: PageRun, ask: frames.ReadAsk) -> bytes:
        count = len(ask.ordinals)
        size = sum(extent_bytes(run.page_size(ordinal)) for ordinal in ask.ordinals)
        if size > session.room_bytes:
            session.unask_lease(ask.lease)
            return frames.pack_grants([Outcome.BUSY] * count, [-1] * count)
        session.pinned_bytes += size
        try:
            async with asyncio.timeout(session.limits.question_s):
                lease = await session.read(
                    post, number, run, lambda load: self._core.read_pages(run, ask.ordinals, ask.parts, load)
                )
        except TimeoutError:
            lease = None
        except BaseException:
            session.unask_lease(ask.lease)
            raise
        finally:
            session.pinned_bytes -= size
        return session.grant(ask.lease, lease, count, Outcome.BUSY)

    def _release(self, session: Session, post: Post, number: int, body: memoryview) -> None:
        session.release(frames.unpack_u64(body))

    def _touch(self, session: Session, post: Post, number: int, body: memoryview) -> None:
        self._serving.touch(frames.unpack_i64(body)[:TOUCHES_MAX])

    def _redeclare(self, session: Session, post: Post, number: int, body: memoryview) -> bytes:
        session.naming = True
        return bytes(
            [session.redeclare(lease, locations, self._hold) for lease, locations in frames.unpack_holds(body)]
        )

    # -- loads ---------------------------------------------------------------------------------------------------------

    def _filled(self, session: Session, post: Post, number: int, body: memoryview) -> None:
        fill, _, landed = frames.unpack_landed(body)
        session.loads.say(fill, landed)

    def _unfilled(self, session: Session, post: Post, number: int, body: memoryview) -> None:
        for fill in frames.unpack_u64(body):
            session.loads.written(fill)

    # -- puts ----------------------------------------------------------------------------------------------------------

    def _reserve(self, session: Session, post: Post, number: int, body: memoryview) -> bytes | None:
        ask = frames.unpack_reserve(body)
        chain = ask.form == Form.BLOCK
        if chain:
            _check_chain(ask.names)
        if ask.form not in (Form.LONE, Form.BLOCK) or any(name.ordinal for name in ask.names):
            raise ProtocolError("only lone entries and blocks of chains are put")
        if ask.kind not in Kind.__members__.values():
            raise ProtocolError(f"there is no kind {ask.kind}")
        session.ask_put(ask.ticket)
        if self._core.recovered:
            return self._reserved(session, ask)

        async def after() -> bytes:
            parents = [Name(ask.parent)] if ask.parent else []
            try:
                await self._serving.recall([*ask.names, *parents])
            except BaseException:
                session.unask_put(ask.ticket)
                raise
            return self._reserved(session, ask)

        session.work("put", post, number, after, len(body))
        return None

    def _reserved(self, session: Session, ask: ReserveAsk) -> bytes:
        """Reserves as much of the batch, from its start, as this client may pin; the rest is BUSY."""
        try:
            return self._reserve_now(session, ask)
        finally:
            session.unask_put(ask.ticket)

    def _reserve_now(self, session: Session, ask: ReserveAsk) -> bytes:
        room, fits = session.room_bytes, 0
        largest = self._serving.entry_bytes_max
        for size in ask.sizes if session.may_put and not session.ended else ():
            room -= extent_bytes(size) if size <= largest else 0  # what can never fit is refused below, with the reason
            if room < 0:
                break
            fits += 1
        count = len(ask.names)
        if count and not fits:
            return frames.pack_u64([0]) + frames.pack_grants([Outcome.BUSY] * count, [-1] * count)
        terms = Terms(Kind(ask.kind), ask.scope, ask.cost_s, ask.expiry_s)
        ticket = self._serving.reserve_puts(
            ask.names[:fits], ask.sizes[:fits], terms, chain=ask.form == Form.BLOCK, parent=ask.parent
        )
        pinned = sum(extent_bytes(size) for size, at in zip(ask.sizes, ticket.locations, strict=False) if at >= 0)
        outcomes = ticket.outcomes + [Outcome.BUSY] * (count - fits)
        locations = ticket.locations + [-1] * (count - fits)
        session.begin_put(ask.ticket, ticket, pinned)
        return frames.pack_u64([ask.ticket]) + frames.pack_grants(outcomes, locations)

    def _commit(self, session: Session, post: Post, number: int, body: memoryview) -> bytes | None:
        put, flags, landed = frames.unpack_landed(body)
        if flags & ~(LAST | DURABLE):
            raise ProtocolError(f"no such flags of a commit: {flags}")
        if not put:  # of this ticket everything was BUSY
            return b""
        if flags & DURABLE and not self._core.durable:
            raise ConfigError("durable=True needs an SSD: set ssd_bytes")
        outcomes = session.commit_small(put, landed, flags)
        if outcomes is not None:
            return frames.pack_outcomes(outcomes)

        async def later() -> bytes:
            return frames.pack_outcomes(await session.commit(put, landed, flags))

        session.work("disk" if flags & DURABLE else "put", post, number, later, len(body))
        return None

    def _abandon(self, session: Session, post: Post, number: int, body: memoryview) -> None:
        session.abandon(frames.unpack_u64(body))

    # -- the rest ------------------------------------------------------------------------------------------------------

    def _segments(self, session: Session, post: Post, number: int, body: memoryview) -> None:
        if len(body) != 4:
            raise ProtocolError("SEGMENTS without the first one wanted")
        first = int.from_bytes(body, "little")
        wanted = [one for one in self._serving.segments if one[0] >= first][:FDS_MAX]
        ordinals = b"".join([ordinal.to_bytes(4, "little") for ordinal, _ in wanted])
        post.answer_fds(number, ordinals, [fd for _, fd in wanted])

    def _delete(self, session: Session, post: Post, number: int, body: memoryview) -> None:
        names = frames.unpack_names(body)

        async def later() -> bytes:
            async with asyncio.timeout(session.limits.question_s):
                return frames.pack_outcomes(await self._core.delete(names))

        session.work("put", post, number, later, len(body))

    def _quarantine(self, session: Session, post: Post, number: int, body: memoryview) -> bytes | None:
        names = frames.unpack_names(body)
        if not names:
            return b""  # whoever asks this only wants to know whether somebody is there

        async def later() -> bytes:
            await in_thread(self._serving.recheck, names)
            return b""

        session.work("put", post, number, later, len(body))
        return None

    def _flush(self, session: Session, post: Post, number: int, body: memoryview) -> None:
        async def later() -> bytes:
            return bytes([await self._core.flush()])

        session.work("disk", post, number, later, 0)

    def _stats(self, session: Session, post: Post, number: int, body: memoryview) -> bytes:
        return frames.pack_json(self._core.stats())

    def _call(self, session: Session, post: Post, number: int, body: memoryview) -> bytes | None:
        question = frames.unpack_json(body)
        if not (isinstance(question, list) and len(question) == 2 and isinstance(question[1], dict)):
            raise ProtocolError("a call without a name and arguments")
        method, arguments = str(question[0]), question[1]
        if method == "ping":
            return frames.pack_json({})
        if method == "clients":
            return frames.pack_json(self._clients())
        if method == "owner":
            return frames.pack_json({"pid": os.getpid(), "clients": self._clients()})

        async def later() -> bytes:
            async with asyncio.timeout(session.limits.question_s):
                return frames.pack_json(await self._core.call(method, arguments))

        session.work("call", post, number, later, len(body))
        return None

    def _claim(self, session: Session, post: Post, number: int, body: memoryview) -> None:
        name = bytes(body)

        async def later() -> bytes:
            try:
                async with asyncio.timeout(session.limits.question_s):
                    value = await self._notes.claim(name, session)
            except ProtocolError as fault:
                raise ConfigError(str(fault)) from None
            return b"\1" if value is None else b"\0" + value

        session.work("claim", post, number, later, len(body))

    def _known(self, session: Session, post: Post, number: int, body: memoryview) -> bytes:
        value = self._notes.known(bytes(body))
        return b"\1" if value is None else b"\0" + value

    def _settle(self, session: Session, post: Post, number: int, body: memoryview) -> None:
        name, value, ttl_s = frames.unpack_settle(body)
        self._notes.settle(name, session, value, min(ttl_s, NOTE_S_MAX))

    def _forget(self, session: Session, post: Post, number: int, body: memoryview) -> bytes | None:
        said = frames.unpack_json(body)
        try:
            prefixes = [bytes.fromhex(prefix) for prefix in said]
        except (TypeError, ValueError):
            raise ProtocolError("prefixes of notes are a list of hexadecimal texts") from None
        self._notes.forget(prefixes)
        waited = self._telling.begin(self._others(session), bytes(body))
        if waited is None:
            return b""

        async def later() -> bytes:
            await waited
            return b""

        session.work("forget", post, number, later, len(body))
        return None

    def _told(self, session: Session, post: Post, number: int, body: memoryview) -> None:
        self._telling.told(post, number)

    def gone(self, post: Post) -> None:
        """A connection has ended."""
        self._telling.gone(post)


def _check_chain(names: Sequence[Name]) -> None:
    """Refuses what can be no chain."""
    if len({len(name.key) for name in names}) > 1 or any(name.ordinal for name in names):
        raise ProtocolError("the digests of a chain are of one width")
