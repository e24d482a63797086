"""Far and Near: what a cache needs of object storage and of its peers, and of the tickets by which it brings what lies
there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence
    from typing import Any

    from tiercache.buffers import Buffer
    from tiercache.cache.bringing import Found
    from tiercache.cache.peering import Loan, Peering
    from tiercache.model import Name, Outcome, Payload
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


class Met(Protocol):
    """What whoever runs a cache asks of its peers."""

    def facts(self) -> list[dict[str, str | int]]:
        """See Peers."""
        ...

    async def publish(self, names: Sequence[Name], to: str) -> int:
        """See Peers."""
        ...

    def hide(self, names: Sequence[Name]) -> None:
        """See Peers."""
        ...

    @property
    def anybody(self) -> bool:
        """See Peers."""
        ...

    @property
    def spare_bytes(self) -> int:
        """See Peers."""
        ...


class Near(Met, Protocol):
    """The caches of other machines; peer/peers.py has it. On the cache's loop, but for `prefix`, `sees` and `stored`,
    which any thread may call, and which never wait."""

    def begin(self, host: Peering, start: Callable[[Coroutine[Any, Any, None], str], object]) -> None:
        """See Peers."""
        ...

    def prefix(self, keys: Sequence[bytes]) -> int:
        """See Peers."""
        ...

    def sees(self, names: Sequence[Name]) -> list[bool]:
        """See Peers."""
        ...

    def stored(self, names: Sequence[Name]) -> None:
        """See Peers."""
        ...

    async def ask(self, names: Sequence[Name], parts: Sequence[int]) -> Found:
        """See Peers."""
        ...

    async def spill(self, loan: Loan) -> int:
        """See Peers."""
        ...

    async def close(self) -> None:
        """See Peers."""
        ...


class Ticket(Protocol):
    """What loads need of the tickets of blocks and of lone entries."""

    def commit(self, landed: list[tuple[int, int, bytes]]) -> list[Outcome]:
        """Takes (item, parts, digests)."""
        ...

    def end(self) -> None:
        """Gives up what was not committed."""
        ...
