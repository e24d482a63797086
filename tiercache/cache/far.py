"""Far: what a cache needs of object storage, and of the tickets by which it brings what lies there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tiercache.buffers import Buffer
    from tiercache.model import Outcome, Payload
    from tiercache.tier import TierStatus


class Store(Protocol):
    """The port of object storage; remote/blocks.py has it."""

    pack_bytes: int

    def find(self, keys: Sequence[bytes]) -> list[Payload | None]:
        """See RemoteBlocks."""
        ...

    def prefix(self, keys: Sequence[bytes]) -> int:
        """See RemoteBlocks."""
        ...

    def missed(self) -> None:
        """See RemoteBlocks."""
        ...

    async def read(self, wanted: Sequence[Payload], targets: Sequence[Buffer]) -> list[tuple[Outcome, bytes]]:
        """See RemoteBlocks."""
        ...

    async def write(
        self, payloads: Sequence[Payload], sources: Sequence[Buffer], copied: Callable[[], None]
    ) -> list[Outcome]:
        """See RemoteBlocks."""
        ...

    async def run(self) -> None:
        """See RemoteBlocks."""
        ...

    async def close(self) -> None:
        """See RemoteBlocks."""
        ...


class Far(Store, Protocol):
    """What else it can say, and be told."""

    async def known(self) -> None:
        """See RemoteBlocks."""
        ...

    def hide(self, keys: Sequence[bytes]) -> None:
        """See RemoteBlocks."""
        ...

    def status(self) -> TierStatus:
        """See RemoteBlocks."""
        ...


class Ticket(Protocol):
    """What loads need of the tickets of blocks and of lone entries."""

    def commit(self, landed: list[tuple[int, int, bytes]]) -> list[Outcome]:
        """Takes (item, parts, digests)."""
        ...

    def end(self) -> None:
        """Gives up what was not committed."""
        ...
