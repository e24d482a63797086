"""Sequence: one growing sequence in engine memory, of which every save moves only what is new.

After FastSwitch (arXiv 2411.18424, section 3.3, reuse of KV over turns): what the host has already is not moved again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence as Many

    from tiercache.kv.moving import Table
    from tiercache.kv.planes import Planes
    from tiercache.kv.saving import Saving
    from tiercache.kv.store import KvStore


class Sequence:
    """See the module. One thread at a time.

    `saved` is the high-water mark: the sequence's first `saved` blocks are stored or on their way, and not moved again.
    """

    def __init__(self, store: KvStore, planes: Planes, *, saved: int = 0) -> None:
        """`saved`: blocks known to be stored already, those that were just loaded for instance."""
        self.store, self.planes, self.saved = store, planes, saved

    def advance(self, keys: Many[bytes], table: Table, *, cost_s: float = 0.0) -> Saving | None:
        """Saves the blocks that are new since the last call; None where there is none. `keys` are those of the whole
        blocks of the sequence so far; a last block that is not full is not saved, and has no key.

        What an earlier save could not store, or the cache has evicted since, counts as new again."""
        ...

    def fence(self, timeout_s: float) -> bool:
        """Whether nothing reads the sequence's pages any more, waiting at most `timeout_s`: only then may the engine
        free or overwrite them (preemption, end of the request)."""
        ...

    def cancel(self) -> None:
        """Gives up saves under way. When it returns nothing reads the sequence's pages any more."""
        ...
