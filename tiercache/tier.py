"""The port of every place that keeps bytes, and the extent port that addressable memory adds to it.

A tier knows locations (opaque non-negative int64, with their generation inside), caps and health. It knows nothing of
policy, of other tiers, or of who reads. All calls take batches; item i of the answer belongs to item i of the question.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    import numpy.typing as npt

    from tiercache.buffers import Buffer
    from tiercache.model import Facts, Name, Outcome, Payload


class Health(IntEnum):
    """What a tier can do at present. It degrades on faults and comes back by itself when probes succeed."""

    OFF = 0
    READ_ONLY = 1
    HEALTHY = 2


@dataclass(frozen=True, slots=True)
class TierStatus:
    """One reading of a tier. Used is at most capacity, in bytes and files, at every instant."""

    name: str
    health: Health
    capacity_bytes: int
    used_bytes: int
    capacity_files: int
    used_files: int
    reason: str = ""
    """Why the tier is not healthy, in words for an operator."""


@dataclass(frozen=True, slots=True)
class Want:
    """One read: the parts (a map) of the payload at `location`, which must be that of `name` with this shape."""

    location: int
    name: Name
    size: int
    part_bytes: int
    parts: int


class Tier(Protocol):
    """A place that keeps bytes."""

    name: str

    async def write(self, payloads: Sequence[Payload], sources: Sequence[Buffer]) -> list[int]:
        """Stores payloads; answers a location for each, or a negative Outcome (FULL, BUSY).

        Source i spans the whole entry (`size` bytes, absent parts undefined). The caller guarantees that sources stay
        unchanged until this returns; the implementation must reserve space before it writes, never exceed its caps,
        and never leave a half-written payload that `read` or `scan` would give. Not durable until `flush`.
        """
        ...

    async def read(
        self, wants: Sequence[Want], targets: Sequence[Buffer], digests: list[bytes] | None = None
    ) -> list[Outcome]:
        """Fills the wanted parts at their own offsets in target i (which spans the entry) and answers HIT, MISS,
        BUSY or CORRUPT. HIT promises that key and part digests were verified after the bytes arrived. A target's
        absent parts are left alone; after another answer the wanted parts of the target are undefined.

        A list given as `digests` gets one item for each want: after HIT what its parts were verified against, in the
        Payload layout, where the rows of wanted parts count; else b"". Whoever keeps the bytes keeps these with them,
        so that damage on the way is still seen, and does not hash again.
        """
        ...

    def free(self, locations: Sequence[int]) -> None:
        """Gives space back. Unknown or stale locations are ignored: generations tell them apart. Must not block."""
        ...

    def scan(self) -> Iterator[Facts]:
        """What was found at opening, in batches, most recently written first. Blocking: call it from a thread."""
        ...

    async def flush(self) -> None:
        """Returns when every write answered before the call is durable: it survives kill -9 and power loss."""
        ...

    async def close(self) -> None:
        """Flushes, if it can, and gives back every resource. Idempotent."""
        ...

    def status(self) -> TierStatus:
        """Usage and health now."""
        ...


@runtime_checkable
class Addressable(Protocol):
    """What a tier adds when its bytes can be read and filled in place: the extent allocator port."""

    @property
    def entry_bytes_max(self) -> int:
        """The largest entry that can ever be reserved."""
        ...

    def reserve(
        self, names: Sequence[Name], sizes: Sequence[int], part_bytes: Sequence[int], *, sparse: bool = False
    ) -> list[int]:
        """Locations of new extents (state PENDING, no part present), or FULL; thread-safe, never blocks for long.
        `sparse`: only some of their parts may ever come, so making all of their memory ready would be wasted."""
        ...

    def buffers(self, locations: Sequence[int]) -> list[Buffer]:
        """The extents in place, `size` bytes each, aligned to ALIGN_BYTES; memory up to the next boundary is theirs."""
        ...

    def commit(self, locations: Sequence[int], parts: Sequence[int], digests: Sequence[bytes]) -> None:
        """Declares more parts of extents present. `digests[i]` is in the Payload layout; only rows of `parts[i]` are
        taken. The caller guarantees that those bytes will not change again."""
        ...

    def digests(self, locations: Sequence[int]) -> list[bytes]:
        """Digests of extents in the Payload layout, undefined for absent parts."""
        ...

    def payloads(self, locations: Sequence[int]) -> list[Payload]:
        """Names, shapes, parts and digests of extents, as the extent table has them."""
        ...

    def copy_out(
        self,
        locations: Sequence[int],
        targets: Sequence[Buffer],
        spans: Sequence[range] | None = None,
        *,
        verify: bool = True,
    ) -> list[Outcome]:
        """Copies whole extents, or span i of each, to the start of target i, in the calling thread: HIT, or CORRUPT
        where a part that was touched has not its digest. The caller holds the extents and knows their parts present."""
        ...


@runtime_checkable
class Reclaiming(Protocol):
    """What a log-structured tier adds: space comes back a segment at a time, and entries worth it are written again."""

    @property
    def segment_bytes(self) -> int:
        """Size of a segment: the most that one reclaim can bring."""
        ...

    def victim(self) -> list[int]:
        """Locations of the payloads that live in the segment best reclaimed next; empty when there is none."""
        ...

    async def reclaim(self, keep: Sequence[int], drop: Sequence[int]) -> list[tuple[int, int]]:
        """Rewrites the payloads at `keep`, gives up those at `drop` and frees their segment.

        Answers (old, new) pairs of what was kept. A pair (old, old) says that the payload stays where it was, since
        the medium is not well enough to move it: the segment is then not free. A payload that is absent from the
        answer could not be read, or had no room, and is gone. Old locations stay readable until the answer. Facts rows
        move with their payloads, durably enough that a crash at any moment leaves every payload readable at one of the
        two places, or forgotten, never wrong.
        """
        ...


@runtime_checkable
class Answering(Protocol):
    """What a tier adds that a thread can read from without going through the event loop."""

    def read_here(self, wants: Sequence[Want], targets: Sequence[Buffer], digests: list[bytes]) -> list[Outcome]:
        """As Tier.read, for a thread, which waits, at most for the tier's deadline. It judges nothing: unless all are
        a HIT, nothing was counted or given up, no target is complete, and `read` is the one to ask."""
        ...


@runtime_checkable
class Remembering(Protocol):
    """What a tier adds that keeps the order of last use for its next opening (Facts.ticks)."""

    def note_order(self, locations: npt.NDArray[np.int64], ticks: npt.NDArray[np.uint32]) -> None:
        """Takes the order of everything that lives; durable with the next flush. Must not block."""
        ...


@runtime_checkable
class Losing(Protocol):
    """What a tier adds that may lose what it had already taken: a sync that failed takes unsynced records with it."""

    def lost(self) -> list[int]:
        """Locations given up by the tier itself since the last call; any thread."""
        ...
