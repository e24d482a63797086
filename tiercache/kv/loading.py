"""Loading: blocks on their way from the cache into engine memory; and prefetching, which stops in the cache's memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tiercache.model import Outcome


class Loading:
    """One load under way. `outcomes[i]` belongs to block `start + i`, and is final once `done`.

    HIT: all that this rank holds of the block is in engine memory, verified. Anything else: what lies in its pages is
    undefined, and the engine computes it (MISS; BUSY: no time; FULL: no room to bring it to memory; damage is a MISS,
    counted). Outcomes of different blocks are independent: a hit after a miss stands.
    """

    outcomes: list[Outcome]
    moved_bytes: int
    """Bytes copied into engine memory so far."""

    @property
    def done(self) -> bool:
        """Whether all is decided; never waits."""
        ...

    def wait_layer(self, layer: int, timeout_s: float) -> bool:
        """Whether `layer` (counted within the layout) of every block is in engine memory now, waiting at most
        `timeout_s` for it. False: some block failed (now or at an earlier layer), or time is over; `wait` tells."""
        ...

    def wait(self, timeout_s: float) -> list[Outcome]:
        """The outcomes, at the latest after `timeout_s`: a load that is not over then is cancelled, and what has not
        landed as a whole is BUSY. When it returns nothing writes to engine memory any more."""
        ...

    def cancel(self) -> None:
        """Gives up what has not landed (MISS). When it returns nothing writes to engine memory any more."""
        ...


class Prefetch:
    """Blocks on their way to memory; see KvStore.prefetch."""

    @property
    def done(self) -> bool:
        """Whether it is over; never waits."""
        ...

    def wait(self, timeout_s: float) -> int:
        """Leading blocks that had come to memory when it ended, waiting at most `timeout_s` for that."""
        ...

    def cancel(self) -> None:
        """Gives up the rest. Never waits."""
        ...
