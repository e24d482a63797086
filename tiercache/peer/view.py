"""View: what each peer is believed to have, as far as it said so: hints, which cost a miss where they are wrong."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from tiercache.model import Name

MARKS_MAX = 1 << 19
"""Entries of one peer that are remembered: about 50 MB of memory."""
_ALL = (1 << 64) - 1
_STEP = 0x9E3779B97F4A7C15
"""Spreads ordinals (2^64 over the golden ratio, as in Knuth, The Art of Computer Programming 3, 6.4)."""


def mark(key: bytes, ordinal: int = 0) -> int:
    """What stands for a name in announcements: keys end in digests (and may begin with those of their namespace)."""
    return int.from_bytes(key[-8:], "little") ^ (ordinal * _STEP & _ALL)


HIDDEN_MAX = 1 << 16
"""Deleted entries that are remembered."""


class View:
    """Marks and who has them, a bit a peer. Written on the loop; any thread may look."""

    def __init__(self) -> None:
        self._who: dict[int, int] = {}
        self._order: dict[int, deque[int]] = {}
        """What each peer is believed to have, the oldest first; some of it was dropped since."""
        self._hidden: dict[int, None] = {}

    def add(self, peer: int, marks: Iterable[int]) -> None:
        """This peer (a number from 0 on) has these; where that is more than may be remembered of it, the oldest are
        forgotten, for it has most likely lost these first."""
        bit, who, order = 1 << peer, self._who, self._order.setdefault(peer, deque())
        for one in marks:
            known = who.get(one, 0)
            if not known & bit and one not in self._hidden:
                who[one] = known | bit
                order.append(one)
                if len(order) > MARKS_MAX:
                    self._drop(peer, order.popleft())

    def hide(self, names: Iterable[Name]) -> None:
        """These were deleted here: whoever has them is not asked, until they are stored here anew."""
        for key, ordinal in names:
            one = mark(key, ordinal)
            self._who.pop(one, None)
            self._hidden[one] = None
            if len(self._hidden) > HIDDEN_MAX:
                del self._hidden[next(iter(self._hidden))]

    def show(self, marks: Iterable[int]) -> None:
        """These are stored here."""
        for one in marks if self._hidden else ():
            self._hidden.pop(one, None)

    def drop(self, peer: int, names: Iterable[Name]) -> None:
        """It does not have these after all."""
        for name in names:
            self._drop(peer, mark(name.key, name.ordinal))

    def _drop(self, peer: int, one: int) -> None:
        if left := self._who.get(one, 0) & ~(1 << peer):
            self._who[one] = left
        else:
            self._who.pop(one, None)

    def forget(self, peer: int) -> Iterator[None]:
        """It is gone, with all that it had; a step at a time, for there may be many."""
        for at, one in enumerate(self._order.pop(peer, ())):
            self._drop(peer, one)
            if not at % 4096:
                yield

    def who(self, names: Sequence[Name]) -> list[int]:
        """Who has each of these, a bit a peer."""
        get = self._who.get
        return [get(mark(key, ordinal), 0) for key, ordinal in names]

    def prefix(self, keys: Sequence[bytes]) -> int:
        """How many of these blocks, from the first on, somebody has."""
        who = self._who
        if not who:
            return 0
        for at, key in enumerate(keys):
            if int.from_bytes(key[-8:], "little") not in who:
                return at
        return len(keys)

    def __len__(self) -> int:
        return len(self._who)
