"""Served: what a door needs of the cache behind it, and how much of it one client may have."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol, Self

from tiercache.core import BlockTicket, Core

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from tiercache.lease import Lease
    from tiercache.model import Name, Outcome, Terms
    from tiercache.settings import Settings


class Ticket(Protocol):
    """Entries that are being put: item i belongs to name i.

    `outcomes[i]` is HIT where the entry is to be filled (`locations[i]` >= 0) or is there already (-1), else why not.
    """

    @property
    def outcomes(self) -> list[Outcome]:
        """How each item went so far."""
        ...

    @property
    def locations(self) -> list[int]:
        """Extents to be filled, or -1."""
        ...

    def commit(self, landed: Iterable[tuple[int, int, bytes]]) -> list[Outcome]:
        """Takes (item, parts, digests) that somebody wrote, if the bytes have those digests. Answers, for every item of
        the ticket, HIT if it is visible now, MISS while it lacks parts, CORRUPT where the digests differed. Any thread,
        one at a time."""
        ...

    async def save(self, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """Waits for the SSD: of these outcomes, the HITs that are not durable become FULL."""
        ...

    def end(self) -> None:
        """Gives up what is not whole: from now on nobody writes to the extents of this ticket. Idempotent."""
        ...


class JointTicket(BlockTicket, Protocol):
    """A ticket whose blocks somebody else fills."""

    @property
    def locations(self) -> list[int]:
        """Extents in which there is something to be filled, or -1."""
        ...

    @property
    def size(self) -> int:
        """Bytes of each block."""
        ...

    @property
    def part_bytes(self) -> int:
        """Bytes of each part."""
        ...

    def absorb(self, more: Self) -> None:
        """Takes over a ticket for the blocks that follow, before anything is done with either."""
        ...

    def ending(self) -> Iterator[None]:
        """As `end`, a few blocks at a time. From the first one on it has ended; see that all is done."""
        ...


class Holding(Protocol):
    """Leases, and what is known of them by where they lie."""

    def lease_memory(self, names: Sequence[Name], parts: Sequence[int] | None = None) -> Lease:
        """A lease on what is in memory now, with these parts (a map an entry; all of them without). Any thread."""
        ...

    async def lease_local(
        self, names: Sequence[Name], parts: Sequence[int] | None = None, *, together: bool = False
    ) -> Lease | None:
        """A lease on what the local tiers have, brought to memory. With `together` it is None, and nothing is read or
        held, unless all of it is local."""
        ...

    def hold(self, locations: Sequence[int]) -> Lease | None:
        """A lease on entries by where they lie in memory; None unless each of them still lies there."""
        ...

    def touch(self, locations: Sequence[int]) -> None:
        """These were read without asking. Locations that have been freed since are ignored."""
        ...

    def recheck(self, names: Sequence[Name]) -> None:
        """Hashes the copies of these in memory, and loses those that are damaged. Any thread."""
        ...


class Putting(Protocol):
    """Entries that clients fill."""

    async def recall(self, names: Sequence[Name]) -> None:
        """While the cache recovers: brings what the SSD has of these names into the index."""
        ...

    def reserve_puts(
        self, names: Sequence[Name], sizes: Sequence[int], terms: Terms, *, chain: bool = False, parent: bytes = b""
    ) -> Ticket:
        """Extents for lone entries, or for blocks of one chain after `parent`. The ticket must be ended, when nobody
        writes to its extents any more."""
        ...

    def join(
        self,
        digests: Sequence[bytes],
        size: int,
        part_bytes: int,
        claim: int,
        pieces: Sequence[tuple[int, int]],
        terms: Terms,
        *,
        parent: bytes,
    ) -> JointTicket:
        """As Core.join_blocks. Any thread."""
        ...

    def probe(self, digests: bytes, parts: int, width: int) -> bytes:
        """As Core.probe_chain, of digests that are joined."""
        ...


class Serving(Holding, Putting, Protocol):
    """What an owner asks of a cache beside Core (cache.serving)."""

    @property
    def entry_bytes_max(self) -> int:
        """The largest entry that can ever be put."""
        ...

    @property
    def segments(self) -> list[tuple[int, int]]:
        """(ordinal, descriptor) of the memory so far; the descriptors stay the cache's."""
        ...


class Served(Core, Protocol):
    """The cache behind a door."""

    @property
    def serving(self) -> Serving:
        """What is asked on behalf of other processes."""
        ...


class Limits(NamedTuple):
    """How much one client may have. What goes beyond is BUSY; nothing is ever taken away from a living client."""

    pinned_bytes: int
    """Of all its leases, loads and puts together, in whole blocks of ALIGN_BYTES; an entry that it holds twice counts
    twice. A batch that alone is over
    this never gets through: ask in smaller batches."""
    leases: int = 16_384
    tickets: int = 1_024
    tasks: int = 256
    """Questions of one kind that are dealt with at a time; more wait."""
    waiting: int = 16_384
    waiting_bytes: int = 64 << 20
    """Questions that wait, in number and in bytes; a client beyond these is cut off."""
    fill_s: float = 65.0
    """A load in which nothing lands for so long is given to somebody else."""
    silent_s: float = 10.0
    """So is one whose loader says nothing for so long, not even that it still loads (see loading.ALIVE_S)."""
    question_s: float = 270.0
    """No question takes longer, except for those that wait for the disk."""

    @classmethod
    def of(cls, settings: Settings) -> Limits:
        """Those that follow from settings. A request of the origin ends within its deadline, so something must land."""
        fill_s = settings.origin_deadline_s + 5.0
        return cls(int(settings.client_share * settings.memory_bytes), fill_s=fill_s, question_s=4 * fill_s + 10.0)
