"""Blocks in the owner's memory that this process fills together with others; what came of a JOIN, and its end.

The bytes are written here, straight into the owner's memory; the owner hashes what lies there when it is told that
something landed. `commit_soon` goes over the asynchronous line, so that the next blocks are written meanwhile.
"""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING

from tiercache.errors import CapacityError, ClosedError, ConfigError, ProtocolError
from tiercache.lease import check_blocks
from tiercache.model import Outcome
from tiercache.wire import frames, joint
from tiercache.wire.frames import Landed, Op
from tiercache.wire.joint import DIGESTS_MAX, PIECES_ALL_MAX, PIECES_MAX, JoinAsk, LandAsk
from tiercache.wire.puts import DURABLE, SCOPE_MAX, STEP_BYTES
from tiercache.wire.sockets import Lost

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from tiercache.buffers import Buffer
    from tiercache.model import Terms
    from tiercache.wire.bond import Bond
    from tiercache.wire.link import Link

    Rows = Sequence[tuple[int, int, bytes]]
    Ranges = Sequence[tuple[int, int, int, int]]
    Chosen = tuple[list[int], list[Landed], list[tuple[int, int, int, int]]]


def join(link: Link, ask: JoinAsk) -> SharedBlockTicket:
    """Joins from any thread; the ticket's number is chosen here. Once more where the owner's death cut it off."""
    try:
        return _join_once(link, ask)
    except Lost:
        return _join_once(link, ask)


def _join_once(link: Link, ask: JoinAsk) -> SharedBlockTicket:
    number = link.number()
    try:
        answer = link.ask(Op.JOIN, joint.pack_join(ask._replace(ticket=number)), again=False)
        joined = joint.unpack_joined(answer.body, len(ask.digests))
        answer.bond.attach([at for at in joined.locations if at >= 0])
        return SharedBlockTicket(link, answer.bond, ask, joined, number)
    except BaseException:  # the owner may have reserved what this process never heard of
        link.abandon(number)
        raise


def checked(ask: JoinAsk, terms: Terms) -> JoinAsk:
    """The question, with these terms. Refuses what an owner would refuse, in the same words, and what no message can
    say."""
    check_blocks(ask.size, ask.part_bytes, ask.claim, ask.pieces)
    widths = {len(one) for one in (*ask.digests, *((ask.parent,) if ask.parent else ()))}
    if len(widths) > 1 or not widths <= {16, 32}:
        raise ConfigError("the digests of a chain are of one width: 16 or 32 bytes")
    if len(set(ask.digests)) < len(ask.digests):
        raise ConfigError("these digests are no chain: one stands there twice")
    if len(ask.digests) > DIGESTS_MAX or len(ask.pieces) > PIECES_MAX:
        raise CapacityError(f"at most {DIGESTS_MAX} blocks and {PIECES_MAX} pieces of each are joined at a time")
    if len(ask.digests) * len(ask.pieces) > PIECES_ALL_MAX:
        raise CapacityError(f"at most {PIECES_ALL_MAX} pieces of all blocks together are claimed at a time")
    if not 0 <= terms.scope <= SCOPE_MAX:
        raise ConfigError(f"scope must be a whole number from 0 to {SCOPE_MAX}, not {terms.scope!r}")
    if not 0 <= terms.cost_s < float("inf"):
        raise ConfigError(f"cost_s must be a number of seconds, not {terms.cost_s!r}")
    return ask._replace(kind=terms.kind, scope=terms.scope, cost_s=terms.cost_s, expiry_s=terms.expiry_s)


class SharedBlockTicket:
    """Implements core.BlockTicket over an owner's memory."""

    def __init__(self, link: Link, bond: Bond, ask: JoinAsk, joined: joint.Joined, number: int) -> None:
        """Use `join`."""
        self._link, self._bond, self._number = link, bond, number
        self._size, self._part_bytes, self._locations = ask.size, ask.part_bytes, joined.locations
        self.outcomes, self.claims = joined.outcomes, joined.claims
        self.pieces, self.present = joined.pieces, joined.present
        self._known = joined.known
        self._ended = False
        self._open: set[Future[list[Outcome]]] = set()
        self._lock = threading.Lock()

    def writing(self) -> AbstractContextManager[object]:
        """See core.BlockTicket."""
        return self._bond

    def buffers(self, item: int) -> Buffer:
        """See core.BlockTicket."""
        self._check()
        if not 0 <= item < len(self._locations):
            raise ConfigError(f"this ticket has {len(self._locations)} items, not one with number {item}")
        location = self._locations[item]
        if location < 0:
            raise ConfigError(f"item {item} has nothing to be written: look at `claims` and `pieces` first")
        target = self._bond.home.view.buffers([location])[0]
        if target.length != self._size:
            raise ProtocolError(f"an extent of {target.length} bytes for a block of {self._size}")
        return target

    def commit(self, landed: Rows, pieces: Ranges = ()) -> list[Outcome]:
        """See core.BlockTicket."""
        self._check()
        outcomes = [Outcome.MISS] * (len(landed) + len(pieces))
        for chosen in self._messages(landed, pieces):
            self._take(chosen, outcomes, self._link.ask_on(self._bond, Op.LAND, self._packed(chosen)))
        return self._seen(outcomes)

    def commit_soon(self, landed: Rows, pieces: Ranges = ()) -> Future[list[Outcome]]:
        """See core.BlockTicket."""
        self._check()
        loop = self._link.revive.loop
        if loop is None:
            done: Future[list[Outcome]] = Future()
            done.set_result(self.commit(landed, pieces))
            return done
        future = asyncio.run_coroutine_threadsafe(self._land(landed, pieces), loop)
        with self._lock:
            self._open.add(future)
        future.add_done_callback(self._over)
        return future

    def _over(self, future: Future[list[Outcome]]) -> None:
        with self._lock:
            self._open.discard(future)
            last = self._ended and not self._open
        if last:
            self._abandon()

    async def _land(self, landed: Rows, pieces: Ranges) -> list[Outcome]:
        link, bond = self._link, self._bond
        if await link.revive.bond_here() is not bond:
            raise Lost("the cache's owner has gone, and the ticket with it: join the blocks again")
        outcomes = [Outcome.MISS] * (len(landed) + len(pieces))
        for chosen in self._messages(landed, pieces):
            self._take(chosen, outcomes, await link.request_on(bond, Op.LAND, self._packed(chosen)))
        return self._seen(outcomes)

    def compare(self, rows: Rows) -> list[int]:
        """See core.BlockTicket."""
        self._check()
        for item, _, _ in rows:
            self._check_item(item)
        differs = [0] * len(rows)
        asked = [at for at, (item, parts, _) in enumerate(rows) if parts and item < self._known]
        if asked:
            body = frames.pack_landed(self._number, 0, [_row(*rows[at]) for at in asked])
            maps = joint.unpack_maps(self._link.ask_on(self._bond, Op.COMPARE, body), len(asked))
            for at, one in zip(asked, maps, strict=True):
                differs[at] = one
        return differs

    async def saved(self) -> list[Outcome]:
        """See core.BlockTicket."""
        self._check()
        if not self._bond.greeting.durable:
            raise ConfigError("saved() needs an SSD: set ssd_bytes, or open the directory when nobody holds it")
        if not self._known:
            return [Outcome.HIT] * len(self.outcomes)
        body = joint.pack_land(LandAsk(self._number, DURABLE, [], []))
        bond = await self._link.revive.bond_here()
        if bond is not self._bond:
            raise Lost("the cache's owner has gone, and the ticket with it: join the blocks again")
        outcomes = frames.unpack_outcomes(await self._link.request_on(bond, Op.LAND, body))
        return outcomes + [Outcome.HIT] * (len(self.outcomes) - len(outcomes))  # the rest was BUSY from the beginning

    def end(self) -> None:
        """See core.BlockTicket. On the loop it does not wait for commits under way, but comes after them."""
        with self._lock:
            if self._ended:
                return
            self._ended = True
            last, waits = not self._open, list(self._open)
        if last:
            self._abandon()
        elif not self._link.revive.here:
            wait(waits)

    def _abandon(self) -> None:
        if self._known:
            self._link.abandon(self._number)

    # -- rows ----------------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        if self._ended:
            raise ClosedError("this ticket has ended: join the blocks again")

    def _check_item(self, item: int) -> None:
        if not 0 <= item < len(self.outcomes):
            raise ConfigError(f"this ticket has {len(self.outcomes)} items, not one with number {item}")

    def _messages(self, landed: Rows, pieces: Ranges) -> list[Chosen]:
        """What is really this ticket's to commit, in messages that keep the owner busy for some milliseconds: places
        among the outcomes, rows, pieces."""
        for item in (*(one[0] for one in landed), *(one[0] for one in pieces)):
            self._check_item(item)
        messages: list[Chosen] = []
        size = STEP_BYTES
        for at, (item, parts, digests) in enumerate(landed):
            if not parts or parts & ~self.claims[item]:
                continue
            if size >= STEP_BYTES:
                messages.append(([], [], []))
                size = 0
            messages[-1][0].append(at)
            messages[-1][1].append(_row(item, parts, digests))
            size += parts.bit_count() * self._part_bytes
        mine = [(at, one) for at, one in enumerate(pieces, len(landed)) if (one[1], one[2]) in self.pieces[one[0]]]
        if mine:
            messages.append(([at for at, _ in mine], [], [one for _, one in mine]))
        return messages

    def _packed(self, chosen: Chosen) -> bytes:
        return joint.pack_land(LandAsk(self._number, 0, chosen[1], chosen[2]))

    def _take(self, chosen: Chosen, outcomes: list[Outcome], answer: memoryview) -> None:
        """Takes the owner's word on what was sent."""
        said = frames.unpack_outcomes(answer)
        places, landed, pieces = chosen
        if len(said) != len(places):
            raise ProtocolError(f"{len(said)} answers to {len(places)} rows")
        for at, outcome in zip(places, said, strict=True):
            outcomes[at] = outcome
        for item, parts, _ in landed:
            self.claims[item] &= ~parts
        for item, start, stop, _ in pieces:
            if (start, stop) in self.pieces[item]:
                self.pieces[item].remove((start, stop))

    def _seen(self, outcomes: list[Outcome]) -> list[Outcome]:
        if Outcome.HIT in outcomes:
            self._link.visible(self._bond)
        return outcomes


def _row(item: int, parts: int, digests: bytes) -> Landed:
    """With digests as far as the highest part, as messages have them; those that are missing are nobody's."""
    length = 8 * parts.bit_length()
    return Landed(item, parts, digests[:length].ljust(length, b"\0"))
