"""Chained: what a shared cache answers about blocks and their parts, beside whole entries."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from tiercache.errors import ClosedError, UnavailableError
from tiercache.model import Kind, Outcome, Terms
from tiercache.wire import blocks, joint
from tiercache.wire.frames import Op, Patience
from tiercache.wire.joint import JoinAsk
from tiercache.wire.leasing import misses

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tiercache.lease import Lease
    from tiercache.wire.leasing import Leasing
    from tiercache.wire.link import Link
    from tiercache.wire.memo import Home

log = logging.getLogger(__name__)

ALL = (1 << 64) - 1


class SharedChains:
    """See the module. Part of SharedCache."""

    _link: Link
    _leasing: Leasing
    _closed = ""

    def _open(self) -> tuple[Link, Home | None]:
        if self._closed:
            raise ClosedError(self._closed)
        return self._link, self._link.home

    def probe_chain(self, digests: Sequence[bytes], parts: int, *, touch: bool = False) -> bytes:
        """What of a chain has these parts, and in which tier; see Core.probe_chain. Nothing while there is no owner."""
        link, _ = self._open()
        if not len(digests):
            return b""
        try:
            found = bytes(link.ask(Op.PROBE, joint.pack_chain(parts & ALL, digests)).body)
        except UnavailableError as fault:
            log.debug("the cache's owner does not answer: %s", fault)
            return b""
        if touch:
            self.touch_chain(digests[: len(found)])
        return found

    def touch_chain(self, digests: Sequence[bytes]) -> None:
        """The stored prefix of this chain was used."""
        link, _ = self._open()
        bond = link.revive.now
        if len(digests) and bond is not None:
            link.tell_on(bond, Op.TOUCH_CHAIN, joint.pack_chain(0, digests))

    def lease_blocks_resident(self, digests: Sequence[bytes], parts: int) -> Lease | None:
        """A lease on blocks that are all in memory with these parts, else None."""
        self._open()
        if not len(digests):
            return None
        lease = self._leasing.ask(
            Op.LEASE_BLOCKS,
            lambda number: joint.pack_lease_blocks(number, Patience.MEMORY, parts & ALL, digests),
            digests,
        )
        if lease is not None and lease.outcomes[0] is not Outcome.HIT:  # all or nothing
            lease.release()
            return None
        return lease

    async def lease_blocks(self, digests: Sequence[bytes], parts: int) -> Lease:
        """A lease on blocks with these parts, brought to memory where needed; look at its `outcomes`. A batch that is
        over this process's share is BUSY."""
        _, home = self._open()
        if not len(digests):
            return misses(0, Outcome.MISS, home)
        lease = await self._leasing.request(
            Op.LEASE_BLOCKS,
            lambda number: joint.pack_lease_blocks(number, Patience.BEST, parts & ALL, digests),
            digests,
        )
        return lease if lease is not None else misses(len(digests), Outcome.MISS, home)

    def join_blocks(
        self,
        digests: Sequence[bytes],
        size: int,
        part_bytes: int,
        claim: int,
        pieces: Sequence[tuple[int, int]] = (),
        terms: Terms | None = None,
        *,
        parent: bytes = b"",
    ) -> blocks.SharedBlockTicket:
        """Begins to fill blocks together with others; see Core.join_blocks. Raises UnavailableError where there is no
        owner."""
        link, _ = self._open()
        ask = JoinAsk(0, 0, 0, 0.0, 0, size, part_bytes, claim, list(pieces), parent, list(digests))
        return blocks.join(link, blocks.checked(ask, terms or Terms(Kind.KV)))
