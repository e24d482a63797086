"""The port of where objects are read from when no tier has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tiercache.buffers import Buffer
    from tiercache.model import Outcome


@dataclass(frozen=True, slots=True)
class Stat:
    """What an origin says of one object. `version` is an ETag or version id, quotes stripped, or empty."""

    path: str
    size: int
    version: str = ""
    mtime_s: float | None = None
    """Seconds since the epoch, UTC."""
    is_directory: bool = False


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes [start, start + length) of one object."""

    start: int
    length: int


class Origin(Protocol):
    """Where objects are re-read from. Paths are the origin's own, without protocol.

    Faults: UnavailableError (transient, retries inside the deadline are spent), OriginError (refused, malformed,
    lying), ChangedError (the pinned version is gone). Absence is a value: GONE. Every call ends
    when nothing has come for the origin's deadline.
    """

    identity: str
    """Endpoint and reader's rights in one string without secrets: objects of two identities never share a key."""

    async def stat(self, paths: Sequence[str]) -> list[Stat | Outcome]:
        """A Stat or GONE for each path."""
        ...

    async def read(self, stat: Stat, span: Span, targets: Sequence[Buffer]) -> None:
        """Fills `targets`, one after another, with the span (their lengths add up to span.length) of exactly this
        version of the object, in one ranged request (If-Match where the origin knows versions). Raises if the span
        could not be filled completely with bytes of that version; targets are then undefined. No target is written
        to after this call has ended, also when it was cancelled.
        """
        ...

    async def read_tail(self, path: str, length: int) -> tuple[Stat, bytes] | Outcome:
        """Facts and the last `length` bytes (all, when shorter), in one request where the protocol can; or GONE."""
        ...

    async def write(self, path: str, data: bytes | memoryview) -> Stat:
        """Creates or replaces an object; answers its new facts (a Stat with no version when it had to guess)."""
        ...

    async def delete(self, paths: Sequence[str]) -> list[Outcome]:
        """HIT for each deleted object, GONE where there was none."""
        ...

    async def close(self) -> None:
        """Ends connections. Idempotent."""
        ...

    async def list(self, path: str) -> list[Stat] | Outcome:
        """Direct children of a directory (objects and directories, full paths), or GONE."""
        ...


class GrowingOrigin(Origin, Protocol):
    """An Origin that tells how far a read has come, so that what has arrived need not wait for the rest."""

    async def read_growing(
        self, stat: Stat, span: Span, targets: Sequence[Buffer], came: Callable[[int], None]
    ) -> None:
        """As `read`. `came(n)`, on the loop: the next n bytes of the span are in the targets, for good: they are bytes
        of this version, and nobody writes there again, also if the read fails after that. Not called after the end."""
        ...
