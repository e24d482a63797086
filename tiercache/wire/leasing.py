"""Leasing: questions whose answers are leases, from threads and from tasks.

Every attempt has a lease number of its own, which is released if anything goes wrong: an owner may have granted what
this process never heard of.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, cast

from tiercache.errors import ProtocolError, UnavailableError
from tiercache.lease import Lease
from tiercache.wire import frames
from tiercache.wire.frames import Op
from tiercache.wire.sockets import Lost

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tiercache.model import Name, Outcome
    from tiercache.wire.link import Answer, Link
    from tiercache.wire.loading import Reading
    from tiercache.wire.memo import Home

    Body = Callable[[int], bytes]
    Names = Sequence[Name] | Sequence[bytes]
    """Digests, where blocks are asked for that need not be whole."""

log = logging.getLogger(__name__)


class Leasing:
    """See the module. `body(number)` makes the question; one that its owner's death cut off is asked once more."""

    def __init__(self, link: Link) -> None:
        """A thread waits for an answer as long as the owner may be silent; a task for as long as the owner lives."""
        self._link = link

    def ask(self, op: int, body: Body, names: Names) -> Lease | None:
        """A lease that a thread asks for; None where no owner answers."""
        try:
            try:
                return self._ask(op, body, names)
            except Lost:
                return self._ask(op, body, names)
        except UnavailableError as fault:
            log.debug("the cache's owner does not answer: %s", fault)
            return None

    async def request(self, op: int, body: Body, names: Names, reading: Reading | None = None) -> Lease | None:
        """A lease that a task asks for; None where no owner can be had."""
        try:
            try:
                return await self._request(op, body, names, reading)
            except Lost:
                return await self._request(op, body, names, reading)
        except Lost as fault:
            log.debug("no owner of the cache answers: %s", fault)
            return None

    def _ask(self, op: int, body: Body, names: Names) -> Lease:
        link = self._link
        number = link.number()
        try:
            answer = link.ask(op, body(number), again=False)
            outcomes, locations = _granted(answer, op, names)
            answer.bond.attach(locations)
            return link.lease(number, answer.bond, outcomes, locations)
        except BaseException:
            link.release(number)
            raise

    async def _request(self, op: int, body: Body, names: Names, reading: Reading | None) -> Lease:
        link = self._link
        number = link.number()
        try:
            answer = await link.request(
                op, body(number), again=False, reading=reading, late=lambda _: link.release(number)
            )
            outcomes, locations = _granted(answer, op, names)
            await answer.bond.attach_here(locations)
            return link.lease(number, answer.bond, outcomes, locations)
        except BaseException:
            link.release(number)
            raise


def _granted(answer: Answer, op: int, names: Names) -> tuple[list[Outcome], list[int]]:
    """What was granted; the memo learns where it lies."""
    outcomes, locations = frames.unpack_grants(answer.body)
    if len(outcomes) > len(names) or (len(outcomes) < len(names) and op != Op.MATCH):
        raise ProtocolError(f"{len(outcomes)} grants for {len(names)} names")
    if op != Op.LEASE_BLOCKS:
        answer.bond.home.memo.learn(zip(cast("Sequence[Name]", names), locations, strict=False))
    return outcomes, locations


def misses(count: int, outcome: Outcome, home: Home | None) -> Lease:
    """A lease on nothing."""
    view = home.view if home is not None else None
    return Lease([outcome] * count, [-1] * count, view, lambda _: None)  # type: ignore[arg-type]  # never looked at
