"""Memo: where entries lie in the shared memory, as far as this process was told; and what it read there unasked."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Protocol

from tiercache.lease import Extents

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tiercache.buffers import Buffer, Source
    from tiercache.model import Name, Outcome

NAMES_MAX = 1 << 17
"""Names that one process remembers: some 25 MiB when it is full."""
TOUCHES_MAX = 256
"""Reads that the owner was not told of yet; it is told when there are so many, or with the next question."""
SEGMENT_SHIFT = 52
"""A location's segment is what stands above this bit."""


class Spot(Protocol):
    """An extent found in a view: its bytes, its shape, and whether it is still the same one."""

    @property
    def size(self) -> int:
        """Bytes of the entry."""
        ...

    @property
    def parts(self) -> int:
        """Map of the parts that are there."""
        ...

    @property
    def part_bytes(self) -> int:
        """Bytes of a part."""
        ...

    def source(self, hashed: bool) -> Source:
        """What a copy of the whole entry needs."""
        ...

    @property
    def stale(self) -> bool:
        """Whether the extent was freed since it was found: then what was read of it meanwhile is worthless."""
        ...


class View(Extents, Protocol):
    """The owner's memory as this process maps it (cpu.view.ArenaView)."""

    @property
    def known(self) -> int:
        """Segments that were attached so far: ordinals below this."""
        ...

    def attach(self, ordinal: int, fd: int) -> None:
        """Maps a segment; the descriptor is the view's from now on. Raises ProtocolError where it is none."""
        ...

    @property
    def segments(self) -> list[tuple[int, int]]:
        """(ordinal, descriptor) of what is attached."""
        ...

    def glance(self, location: int, name: Name, now_s: float = 0) -> Spot | None:
        """The extent at a location, where it is that name's, in time and not deleted; else None."""
        ...

    def copy_places(
        self,
        places: Sequence[Spot | None],
        targets: Sequence[Buffer],
        spans: Sequence[range] | None = None,
        *,
        verify: bool = True,
    ) -> list[Outcome]:
        """As `copy_out`, of what was found before."""
        ...

    def copy_out(
        self,
        locations: Sequence[int],
        targets: Sequence[Buffer],
        spans: Sequence[range] | None = None,
        *,
        verify: bool = True,
    ) -> list[Outcome]:
        """See tier.Addressable; MISS where the extent was freed meanwhile."""
        ...

    def close(self) -> None:
        """Gives the memory back as soon as no Buffer shows it."""
        ...

    def forget(self) -> None:
        """As `close`, in a forked child."""
        ...


class Memo:
    """Name -> location, bounded, for any thread and without a lock: every step is one operation on a dictionary.

    New names go into the young half; when that is full it becomes the old half, and what the old one held is forgotten.
    A name that is found in the old half moves to the young one. What is remembered may be wrong at any time: whoever
    uses a location looks whether the name is still there.
    """

    __slots__ = ("_half", "_old", "_young")

    def __init__(self, names_max: int = NAMES_MAX) -> None:
        self._half = max(1, names_max // 2)
        self._young: dict[tuple[bytes, int], int] = {}
        self._old: dict[tuple[bytes, int], int] = {}

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def get(self, name: tuple[bytes, int]) -> int:
        """Where the name was last seen; -1 where it was not."""
        location = self._young.get(name, -1)
        if location < 0 and self._old:
            location = self._old.get(name, -1)
            if location >= 0:
                self.learn([(name, location)])
        return location

    def learn(self, found: Iterable[tuple[tuple[bytes, int], int]]) -> None:
        """Names and their locations, as the owner says; negative locations are none."""
        young = self._young
        for name, location in found:
            if location >= 0:
                young[name] = location
        if len(young) > self._half:
            # Two threads here at once forget more than they need to, which is allowed.
            self._old, self._young = young, {}

    def forget(self, name: tuple[bytes, int]) -> None:
        """What was remembered of a name was wrong."""
        self._young.pop(name, None)
        self._old.pop(name, None)

    def clear(self) -> None:
        """Forgets everything."""
        self._young, self._old = {}, {}


class Home:
    """One owner's memory, and what is remembered of it. It outlives the owner: leases on it and their views stay."""

    __slots__ = ("arena", "memo", "touched", "view")

    def __init__(self, arena: str, view: View) -> None:
        self.arena = arena
        self.view = view
        self.memo = Memo()
        self.touched: deque[int] = deque(maxlen=1 << 16)

    def lacks(self, locations: Sequence[int]) -> bool:
        """Whether a location is in a segment that is not attached."""
        return bool(locations) and max(locations) >> SEGMENT_SHIFT >= self.view.known

    def take_touched(self) -> list[int]:
        """What the owner is to be told of, at most TOUCHES_MAX."""
        touched = self.touched
        taken: list[int] = []
        try:
            while len(taken) < TOUCHES_MAX:
                taken.append(touched.popleft())
        except IndexError:
            pass  # that was the last one
        return taken
