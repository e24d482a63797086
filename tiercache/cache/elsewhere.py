"""Elsewhere: where blocks and lone entries may be that no local tier has: first with peers, then in object storage."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tiercache.cache.peering import Peering
    from tiercache.cache.remote import Remote

REMOTE, PEER = b"\3", b"\4"
"""As in Core.probe_chain."""


class Elsewhere:
    """See the module."""

    def __init__(self) -> None:
        self.peers: Peering | None = None
        self.remote: Remote | None = None

    def probe(self, digests: Sequence[bytes]) -> bytes:
        """One byte for each of these blocks, from the first on, as far as they are known to be somewhere with all of
        their parts. Any thread, without waiting; what it says may be wrong by now."""
        found, at = b"", 0
        while at < len(digests):
            more = b""
            if self.peers is not None:
                more = PEER * self.peers.probe(digests[at:])
            if self.remote is not None and at + len(more) < len(digests):
                more += REMOTE * self.remote.probe(digests[at + len(more) :])
            if not more:
                break
            found += more
            at = len(found)
        return found

    def sees(self, keys: Sequence[bytes]) -> list[int]:
        """For each of these lone entries, or blocks, whoever is known to have it: 3 or 4 as above, or 0."""
        found = [0] * len(keys)
        if self.remote is not None:
            found = [0 if one is None else REMOTE[0] for one in self.remote.store.find(keys)]
        if self.peers is not None:
            found = [PEER[0] if seen else one for one, seen in zip(found, self.peers.sees(keys), strict=True)]
        return found

    async def bring(self, digests: Sequence[bytes], parts: int) -> None:
        """Puts what it has of them into the cache, as far as that can be done in time. Never raises. On the loop."""
        if self.peers is not None:
            await self.peers.bring(digests, parts)
        if self.remote is not None:
            await self.remote.bring(digests, parts)
