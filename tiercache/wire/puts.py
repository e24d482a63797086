"""Puts into the owner's memory: extents are reserved there, filled here, and become visible when the owner agrees."""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, NamedTuple

from tiercache.buffers import copy, part_digests
from tiercache.errors import CapacityError, ConfigError, ProtocolError
from tiercache.model import Form, Name, Outcome, all_parts, part_bytes_for
from tiercache.wire import frames
from tiercache.wire.frames import Landed, Op, ReserveAsk
from tiercache.wire.sockets import Lost

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence
    from typing import Any

    from tiercache.buffers import Buffer
    from tiercache.model import Terms
    from tiercache.wire.bond import Bond
    from tiercache.wire.link import Link
    from tiercache.wire.memo import Home

SCOPE_MAX = 65_535
STEP_BYTES = 32 << 20
"""A longer batch goes in several tickets: each is visible as soon as it is filled, and holds no more than this."""
STEP_NAMES = 4096
SIZE_MAX = (1 << 32) - 1

INLINE_BYTES_MAX = 4 << 20
"""A put of more than this copies in a worker thread, so that the loop is never held for longer than some 0.5 ms."""
LAST, DURABLE = 1, 2
"""Flags of COMMIT."""


class Put(NamedTuple):
    """One batch, as its caller gave it. `form` LONE, or BLOCK: one chain after `parent`."""

    names: Sequence[Name]
    values: Sequence[Buffer]
    terms: Terms
    form: Form = Form.LONE
    parent: bytes = b""
    durable: bool = False


def check(put: Put) -> None:
    """Refuses what an owner would refuse, in the same words, and what no message can say."""
    if len(put.names) != len(put.values):
        raise ConfigError(f"{len(put.names)} names and {len(put.values)} values: give one value for each name")
    if any(name.ordinal for name in put.names):
        raise ConfigError("only lone entries and blocks of chains are put: names with an ordinal are pages of files")
    if put.form is Form.BLOCK and len({len(name.key) for name in put.names}) > 1:
        raise ConfigError("the digests of a chain are of one width: 16 or 32 bytes")
    if not 0 <= put.terms.scope <= SCOPE_MAX:
        raise ConfigError(f"scope must be a whole number from 0 to {SCOPE_MAX}, not {put.terms.scope!r}")
    if not (math.isfinite(put.terms.cost_s) and put.terms.cost_s >= 0):
        raise ConfigError(f"cost_s must be a number of seconds, not {put.terms.cost_s!r}")
    most = max((value.length for value in put.values), default=0)
    if most > SIZE_MAX:
        raise CapacityError(f"an entry of {most} bytes can never fit in one piece; split the value")


def tickets(put: Put, step_bytes: int = STEP_BYTES) -> list[Put]:
    """The batch in pieces of one ticket each, in order; a chain goes on where the piece before ended."""
    pieces: list[Put] = []
    start, held, parent = 0, 0, put.parent
    for i, value in enumerate(put.values):
        if i > start and (held + value.length > step_bytes or i - start >= STEP_NAMES):
            pieces.append(put._replace(names=put.names[start:i], values=put.values[start:i], parent=parent))
            if put.form is Form.BLOCK:
                parent = put.names[i - 1].key
            start, held = i, 0
        held += value.length
    pieces.append(put._replace(names=put.names[start:], values=put.values[start:], parent=parent))
    return pieces


def reserve(put: Put, number: int) -> bytes:
    """Body of the RESERVE that a ticket begins with."""
    kind, scope, cost_s, expiry_s = put.terms.kind, put.terms.scope, put.terms.cost_s, put.terms.expiry_s
    sizes = [value.length for value in put.values]
    return frames.pack_reserve(
        ReserveAsk(number, kind, put.form, scope, cost_s, expiry_s, put.parent, list(put.names), sizes)
    )


class Ticket:
    """What the owner reserved for one piece of a batch."""

    __slots__ = ("_grants", "_put", "number", "outcomes")

    def __init__(self, put: Put, answer: memoryview) -> None:
        """Raises ProtocolError where the answer is none."""
        self.number = frames.unpack_u64(answer[:8])[0]
        self._put = put
        self._grants = frames.unpack_grants(answer[8:])
        if len(self._grants.outcomes) != len(put.names):
            raise ProtocolError(f"{len(self._grants.outcomes)} answers to {len(put.names)} names")
        self.outcomes = list(self._grants.outcomes)

    @property
    def locations(self) -> list[int]:
        """Extents to fill."""
        grants = self._grants
        return [at for outcome, at in zip(*grants, strict=True) if outcome is Outcome.HIT and at >= 0]

    def fill(self, home: Home) -> bytes:
        """Copies the values into their extents and hashes what lies there: body of the COMMIT that shows them."""
        put, landed = self._put, []
        for i, (outcome, location) in enumerate(zip(*self._grants, strict=True)):
            if outcome is not Outcome.HIT or location < 0:
                continue
            value = put.values[i]
            target = home.view.buffers([location])[0]
            if target.length != value.length:
                raise ProtocolError(f"an extent of {target.length} bytes for an entry of {value.length}")
            copy(value, target)
            step = part_bytes_for(value.length)
            landed.append(Landed(i, all_parts(value.length, step), part_digests(target, step)))
        flags = LAST | (DURABLE if put.durable else 0)
        return frames.pack_landed(self.number, flags, landed)

    def settle(self, home: Home, answer: memoryview) -> list[Outcome]:
        """Takes the owner's last word on every item."""
        outcomes = frames.unpack_outcomes(answer)
        if len(outcomes) > len(self.outcomes):
            raise ProtocolError(f"{len(outcomes)} answers to {len(self.outcomes)} names")
        outcomes += self.outcomes[len(outcomes) :]  # what this process may not hold was BUSY from the beginning
        self.outcomes = outcomes
        home.memo.learn(
            (name, location)
            for name, outcome, location in zip(self._put.names, outcomes, self._grants.locations, strict=True)
            if outcome is Outcome.HIT
        )
        return outcomes


class Puts:
    """Puts of one client, from threads and tasks. What an owner's death cut off is done once more."""

    def __init__(
        self, link: Link, start: Callable[[Coroutine[Any, Any, Any]], asyncio.Task[Any]], quota_bytes: int
    ) -> None:
        """`start` begins a task that ends before the client does; `quota_bytes` is what this process may hold."""
        self._link, self._start = link, start
        self._step_bytes = max(1, min(STEP_BYTES, quota_bytes // 4))

    def store(self, put: Put) -> list[Outcome]:
        """Puts a batch from a thread."""
        check(put)
        outcomes: list[Outcome] = []
        for piece in tickets(put, self._step_bytes):
            outcomes += self._store_piece(piece)
        return outcomes

    def _store_piece(self, put: Put) -> list[Outcome]:
        try:
            return self._store_once(put)
        except Lost:
            return self._store_once(put)

    def _store_once(self, put: Put) -> list[Outcome]:
        link = self._link
        number = link.number()
        try:
            answer = link.ask(Op.RESERVE, reserve(put, number), again=False)
            bond, ticket = answer.bond, Ticket(put, answer.body)
            if not ticket.locations and not put.durable:
                link.abandon(number)
                return self._seen(bond, ticket.outcomes)
            bond.attach(ticket.locations)
            with bond:
                body = ticket.fill(bond.home)
            return self._seen(bond, ticket.settle(bond.home, link.ask_on(bond, Op.COMMIT, body)))
        except BaseException:  # the owner may have reserved what this process never heard of
            link.abandon(number)
            raise

    def _seen(self, bond: Bond, outcomes: list[Outcome]) -> list[Outcome]:
        if Outcome.HIT in outcomes:
            self._link.visible(bond)
        return outcomes

    async def put(self, put: Put) -> list[Outcome]:
        """Puts a batch from a task."""
        check(put)
        outcomes: list[Outcome] = []
        for piece in tickets(put, self._step_bytes):
            # Shielded: a caller that gives up must not free values, or extents, that a thread still copies.
            outcomes += await asyncio.shield(self._start(self._put_piece(piece)))
        return outcomes

    async def _put_piece(self, put: Put) -> list[Outcome]:
        try:
            return await self._put_once(put)
        except Lost:
            return await self._put_once(put)

    async def _put_once(self, put: Put) -> list[Outcome]:
        link = self._link
        number = link.number()
        try:
            answer = await link.request(
                Op.RESERVE, reserve(put, number), again=False, late=lambda _: link.abandon(number)
            )
            bond, ticket = answer.bond, Ticket(put, answer.body)
            if not ticket.locations and not put.durable:
                link.abandon(number)
                return self._seen(bond, ticket.outcomes)
            await bond.attach_here(ticket.locations)
            body = await self._filled(bond, ticket, sum(value.length for value in put.values))
            outcomes = ticket.settle(bond.home, await link.request_on(bond, Op.COMMIT, body))
            return outcomes if put.durable else self._seen(bond, outcomes)
        except BaseException:
            link.abandon(number)
            raise

    async def _filled(self, bond: Bond, ticket: Ticket, size: int) -> bytes:
        def fill() -> bytes:
            with bond:
                return ticket.fill(bond.home)

        if size <= INLINE_BYTES_MAX:
            return fill()
        return await asyncio.get_running_loop().run_in_executor(None, fill)
