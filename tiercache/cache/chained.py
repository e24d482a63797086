"""Chained: what a cache answers about blocks and their parts, beside whole entries; the work is done in blocks.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tiercache.cache.elsewhere import Elsewhere
from tiercache.cache.peering import Peering
from tiercache.cache.remote import Remote
from tiercache.errors import ClosedError
from tiercache.model import Kind, Terms

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tiercache.cache.blocks import Blocks
    from tiercache.cache.far import Far, Near
    from tiercache.cache.filling import Filling
    from tiercache.cache.joint import BlockTicket
    from tiercache.cache.pressure import Pressure
    from tiercache.cache.recovery import Recovery
    from tiercache.cache.storing import Storing
    from tiercache.cache.survey import Survey
    from tiercache.cache.tiers import Tiers
    from tiercache.lease import Lease


class Chained:
    """See the module. Part of Cache."""

    tiers: Tiers
    blocks: Blocks
    remote: Remote | None = None
    """Object storage, if there is any."""
    peering: Peering | None = None
    """Caches of other machines, if there are any."""
    _filling: Filling
    _storing: Storing
    _pressure: Pressure
    _recovery: Recovery
    _survey: Survey
    _closed = False

    def reach(self, store: Far) -> None:
        """From now on blocks go to object storage too, and come from there; before `begin`."""
        self.tiers.far = store.status
        self.remote = self._elsewhere().remote = Remote(self.tiers, self.blocks, self._storing, store)

    def meet(self, near: Near) -> None:
        """From now on entries come from peers too, and peers may have those of this cache; before `begin`."""
        self.peering = self._elsewhere().peers = Peering(
            self.tiers,
            self.blocks,
            self._storing,
            near,
            lease=self.blocks.matched,
            relieve=self._pressure.make_room,
            recovered=self._recovery.wait,
        )
        self._filling.awaited = self.peering.awaited
        self._pressure.spill = self.peering.spill
        self._survey.met = near

    @property
    def _outside(self) -> list[Peering | Remote]:
        return [one for one in (self.peering, self.remote) if one is not None]

    def _elsewhere(self) -> Elsewhere:
        if self.blocks.beyond is None:
            self.blocks.beyond = self._survey.elsewhere = Elsewhere()
        assert isinstance(self.blocks.beyond, Elsewhere)
        return self.blocks.beyond

    def _open(self) -> Tiers:
        if self._closed:
            raise ClosedError("this cache was closed: open it again with tiercache.open(...)")
        if self.tiers.noted:
            self.tiers.drain()
        return self.tiers

    def probe_chain(self, digests: Sequence[bytes], parts: int, *, touch: bool = False) -> bytes:
        """What of a chain has these parts, and in which tier; see Core.probe_chain."""
        self._open()
        return self.blocks.probe(digests, parts, touch=touch)

    def touch_chain(self, digests: Sequence[bytes]) -> None:
        """The stored prefix of this chain was used."""
        self._open().index.chains.touch(digests)

    def lease_blocks_resident(self, digests: Sequence[bytes], parts: int) -> Lease | None:
        """A lease on blocks that are all in memory with these parts, else None."""
        self._open()
        return self.blocks.resident(digests, parts)

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
    ) -> BlockTicket:
        """Begins to fill blocks together with others; see Core.join_blocks."""
        self._open()
        return self.blocks.join(digests, size, part_bytes, claim, pieces, terms or Terms(Kind.KV), parent=parent)

    async def lease_blocks(self, digests: Sequence[bytes], parts: int) -> Lease:
        """A lease on blocks with these parts, brought to memory where needed; look at its `outcomes`."""
        self._open()
        return await self.blocks.lease(digests, parts)
