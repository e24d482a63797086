"""Sequence: one growing sequence in engine memory, of which every save moves only what is new.

After FastSwitch (arXiv 2411.18424, section 3.3, reuse of KV over turns): what the host has already is not moved again.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from tiercache.errors import UnavailableError
from tiercache.model import Outcome

if TYPE_CHECKING:
    from collections.abc import Sequence as Many

    from tiercache.kv.planes import Planes
    from tiercache.kv.runs import Table
    from tiercache.kv.saving import Saving
    from tiercache.kv.store import KvStore


class Sequence:
    """See the module. One thread at a time.

    `saved` is the high-water mark: the sequence's first `saved` blocks are stored or on their way, and not moved again.
    """

    def __init__(self, store: KvStore, planes: Planes, *, saved: int = 0) -> None:
        """`saved`: blocks known to be stored already, those that were just loaded for instance."""
        self.store, self.planes, self.saved = store, planes, saved
        self._savings: list[tuple[int, Saving]] = []  # with the first block of each

    def advance(self, keys: Many[bytes], table: Table, *, cost_s: float = 0.0) -> Saving | None:
        """Saves the blocks that are new since the last call; None where there is none. `keys` are those of the whole
        blocks of the sequence so far; a last block that is not full is not saved, and has no key.

        What an earlier save could not store, or the cache has evicted since, counts as new again."""
        self._look_back()
        if self.saved >= len(keys):
            return None
        if self.saved and not self._savings:
            # Nothing is under way, so what was saved can be found, or has been evicted: from the end of the chain.
            with suppress(UnavailableError):
                self.saved = min(self.saved, len(self.store.core.probe_chain(keys[: self.saved], self._parts)))
        start, self.saved = self.saved, len(keys)
        saving = self.store.save(keys, self.planes, table, start=start, cost_s=cost_s)
        self._savings.append((start, saving))
        return saving

    @property
    def _parts(self) -> int:
        """What tells that a block of ours is there: whole parts that this rank writes, else any that it reads."""
        layout, holder = self.store.layout, self.store.holder
        return holder.share(layout)[0] or holder.needed(layout)

    def _look_back(self) -> None:
        """Lowers the mark to the first block that an ended save could not store."""
        for start, saving in list(self._savings):
            if not saving.done:
                continue
            self._savings.remove((start, saving))
            for i, outcome in enumerate(saving.outcomes):
                if outcome is not Outcome.HIT:
                    self.saved = min(self.saved, start + i)
                    break

    def fence(self, timeout_s: float) -> bool:
        """Whether nothing reads the sequence's pages any more, waiting at most `timeout_s`: only then may the engine
        free or overwrite them (preemption, end of the request)."""
        clock = self.store.core.clock
        until = clock.monotonic() + timeout_s
        return all(saving.pages_free(max(0.0, until - clock.monotonic())) for _, saving in self._savings)

    def cancel(self) -> None:
        """Gives up saves under way. When it returns nothing reads the sequence's pages any more."""
        for _, saving in self._savings:
            saving.cancel()
