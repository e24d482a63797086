"""Saving: blocks on their way out of engine memory into the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tiercache.model import Outcome


class Saving:
    """One save under way. Forgetting about it is allowed: it ends by itself, and gives back what it holds.

    `outcomes[i]` belongs to block `start + i`, and is final once `done`: HIT (this rank's share is stored), MISS (given
    up, or the block before it is not stored), BUSY (the cache had no time, or other puts too much under way), FULL (no
    room), CORRUPT (pages changed while they were copied).
    """

    outcomes: list[Outcome]
    moved_bytes: int
    """Bytes copied out of engine memory so far."""
    differs: dict[int, int]
    """Block -> map of the parts in which this rank's bytes differ from what another rank of the same heads stored."""

    @property
    def done(self) -> bool:
        """Whether all is decided; never waits."""
        ...

    def wait(self, timeout_s: float) -> list[Outcome]:
        """The outcomes, at the latest after `timeout_s`: what is not decided by then reads BUSY, and goes on."""
        ...

    def pages_free(self, timeout_s: float) -> bool:
        """Whether the engine may have its pages back, waiting at most `timeout_s` for it. Also after a fault or a
        cancellation True means that nothing reads them any more."""
        ...

    def cancel(self) -> None:
        """Gives up what is not stored. When it returns nothing reads the engine's pages any more."""
        ...
