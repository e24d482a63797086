"""Lease: a scoped pin on extents in memory, with views of them that copy nothing; and the values of the page path.

A lease ends when it was released (or dropped) *and* the last array or memoryview made from it is gone. Until then the
bytes neither move nor vanish. Views were verified when their parts were committed, not when they are looked at; copies
made by `copy_into` are verified.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, MutableSequence, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from tiercache.buffers import exported
from tiercache.errors import CapacityError, ClosedError, ConfigError
from tiercache.model import ALIGN_BYTES, PARTS_MAX, Outcome, all_parts, part_count

if TYPE_CHECKING:
    from tiercache.buffers import Buffer
    from tiercache.model import Name


@dataclass(frozen=True, slots=True)
class PageRun:
    """One file version as the cache sees it: pages of `page_bytes`, the last one shorter."""

    key: bytes
    size: int
    page_bytes: int
    part_bytes: int
    scope: int = 0
    cost_s: float = 0.0
    expiry_s: int = 0

    def page_size(self, ordinal: int) -> int:
        """Bytes of one page."""
        return min(self.page_bytes, self.size - ordinal * self.page_bytes)


@dataclass(frozen=True, slots=True)
class Gap:
    """Missing parts (a map) of one page; `target` spans the whole page, only the missing parts may be written."""

    ordinal: int
    parts: int
    target: Buffer
    location: int = -1
    """Where the target lies, for whoever has the memory mapped in another process."""


class Landed(Protocol):
    """Hears of gaps that are filled."""

    def __call__(self, indexes: Sequence[int], digests: Sequence[bytes] | None = None, /) -> None:
        """These gaps are filled. `digests`, one for each of them in the Payload layout, are of those bytes: whoever
        gives them has hashed the targets, else they are hashed here."""
        ...


Load = Callable[[Sequence[Gap], Landed], Awaitable[None]]
"""Fills gaps, calls landed([indexes of gaps]) as each request completes, raises where it cannot. It must not write to a
target after it has ended, unless it raises AbandonedLoad with a future for that."""


class Extents(Protocol):
    """What a lease needs of the memory tier."""

    def buffers(self, locations: Sequence[int]) -> list[Buffer]:
        """See tier.Addressable."""
        ...

    def copy_out(
        self, locations: Sequence[int], targets: Sequence[Buffer], spans: Sequence[range], *, verify: bool
    ) -> list[Outcome]:
        """See tier.Addressable."""
        ...

    def digests(self, locations: Sequence[int]) -> list[bytes]:
        """Digests of extents in the Payload layout, undefined for parts that are absent."""
        ...


Locations = Sequence[int] | npt.NDArray[np.int64]
End = Callable[[bool], None]
"""Gives the pins of a lease back. False: this may be inside a garbage collection, so take no lock, only make a note."""


def extent_bytes(size: int) -> int:
    """Bytes of memory that an entry of `size` bytes takes."""
    return size + (-size % ALIGN_BYTES) or ALIGN_BYTES


class Pieces:
    """What is left of a batch, piece by piece: one that is more than this process may hold at once comes again in
    halves, as long as that helps. Iterate over it, and tell `refused` what came of each."""

    def __init__(self, items: Sequence[int]) -> None:
        self._left = [list(items)] if items else []
        self._helps = True

    def __iter__(self) -> Iterator[list[int]]:
        while self._left:
            yield self._left.pop()

    def refused(self, piece: list[int], outcomes: Sequence[object]) -> bool:
        """Whether the whole piece was BUSY (`outcomes` of the batch), and so comes again in halves."""
        if not self._helps or any(outcomes[i] is not Outcome.BUSY for i in piece):
            return False
        self._helps = len(piece) > 1  # where even one item is too much, more questions bring nothing
        if self._helps:
            half = len(piece) // 2
            self._left += [piece[half:], piece[:half]]
        return self._helps


def look_again(
    names: Sequence[Name],
    found: MutableSequence[Any],
    rest: Sequence[int],
    damaged: set[int],
    quarantine: Callable[[Sequence[Name]], None],
) -> list[int]:
    """Which of the items `rest` of a batch are worth another look, now that the lease on them has ended.

    What memory had no room for, as long as some of the batch found room; and what was damaged, once (`damaged`: before
    now). Damage is quarantined here, and what is damaged twice becomes a miss, which is always allowed.
    """
    bad = [i for i in rest if found[i] is Outcome.CORRUPT]
    if bad:
        quarantine([names[i] for i in bad])
    for i in bad:
        if i in damaged:
            found[i] = Outcome.MISS
    damaged.update(bad)
    again = [i for i in rest if found[i] in (Outcome.FULL, Outcome.CORRUPT)]
    return again if bad or len(again) < len(rest) else []


def check_blocks(size: int, part_bytes: int, claim: int, pieces: Sequence[tuple[int, int]]) -> None:
    """Raises ConfigError for what is no block of parts, or none of its parts and pieces."""
    if size <= 0 or part_bytes <= 0 or part_count(size, part_bytes) > PARTS_MAX:
        raise ConfigError(f"a block of {size} bytes in parts of {part_bytes}: it must have 1 to {PARTS_MAX} parts")
    if size >= 1 << 32:
        raise CapacityError(f"a block of {size} bytes can never fit in one piece: use fewer tokens a block")
    if claim < 0 or claim & ~all_parts(size, part_bytes):
        raise ConfigError(f"the block has {part_count(size, part_bytes)} parts, not {claim:#x}")
    reach = 0
    for start, stop in sorted(pieces):
        if not reach <= start < stop <= size or start // part_bytes != (stop - 1) // part_bytes:
            raise ConfigError(
                f"bytes {start} to {stop} are no piece of one part of {part_bytes} bytes, or overlap another"
            )
        if claim >> start // part_bytes & 1:
            raise ConfigError(f"part {start // part_bytes} is claimed whole, and in pieces")
        reach = stop


class Lease:
    """Pinned entries of one call: item i belongs to item i of the question.

    `outcomes[i]` is HIT where `array(i)`, `view(i)` and `copy_into(i, ...)` work. Use it as a context manager, or call
    `release()`; a forgotten lease ends when it is collected. Views keep their bytes beyond the release.
    """

    __slots__ = ("__weakref__", "_end", "_extents", "_held", "_holders", "_locations", "outcomes")

    def __init__(
        self, outcomes: list[Outcome], locations: Locations, extents: Extents, end: End, held_bytes: int = -1
    ) -> None:
        """`locations[i]` is read only where `outcomes[i]` is HIT. `end` is called exactly once. `held_bytes`, where
        they are known, are those of all items."""
        self._held = held_bytes
        self.outcomes = outcomes
        self._locations: Locations | None = locations
        self._extents = extents
        self._end = end
        # A stack with one token for the lease (True) under one for each exported array (False). Popping is atomic, and
        # whoever pops the bottom token is the last: no lock, so that it may happen inside a garbage collection.
        self._holders = [True]

    def __len__(self) -> int:
        return len(self.outcomes)

    @property
    def locations(self) -> list[int]:
        """Where the items lie in memory, for whoever has it mapped too; -1 for what is no HIT."""
        if self._locations is None:
            raise ClosedError("this lease was released: take a new one")
        hit = Outcome.HIT
        return [int(at) if one is hit else -1 for at, one in zip(self._locations, self.outcomes)]

    @property
    def held_bytes(self) -> int:
        """Bytes of memory that it keeps in place, whole blocks of ALIGN_BYTES; 0 once it was released."""
        if self._locations is None:
            return 0
        if self._held >= 0:
            return self._held
        held = self._extents.buffers([at for at in self.locations if at >= 0])
        return sum([extent_bytes(one.length) for one in held])

    def buffer(self, index: int) -> Buffer:
        """The extent of item `index` in place: valid only until the release, unlike views."""
        return self._extents.buffers([self._location(index)])[0]

    def digests(self, index: int) -> bytes:
        """Digests of item `index`, one for each part as far as that is there (Payload layout): for whoever moves the
        bytes himself, out of `buffer`, and verifies what arrived."""
        return self._extents.digests([self._location(index)])[0]

    def extents(self, indexes: Iterable[int]) -> list[tuple[Buffer, bytes]]:
        """`buffer` and `digests` of several items, in a fraction of the time."""
        locations = [self._location(index) for index in indexes]
        return list(zip(self._extents.buffers(locations), self._extents.digests(locations), strict=True))

    def array(self, index: int) -> npt.NDArray[np.uint8]:
        """A read-only uint8 array over item `index`; its bytes stay for as long as it or a view of it lives."""
        holders, end = self._holders, self._end
        holders.append(False)  # before the look: a release in another thread then is not the last to leave
        try:
            buffer = self.buffer(index)
        except BaseException:
            _leave(holders, end, False)
            raise
        return exported(buffer, lambda: _leave(holders, end, False))

    def view(self, index: int) -> memoryview:
        """A read-only memoryview over item `index`; as `array`."""
        return self.array(index).data

    def copy_into(self, index: int, start: int, stop: int, target: Buffer, *, verify: bool = True) -> Outcome:
        """Copies bytes [start, stop) of item `index` to the start of `target`: HIT, or CORRUPT when a digest differs.

        Verifying hashes every part that the range touches, whole.
        """
        location = self._location(index)
        return self._extents.copy_out([location], [target], [range(start, stop)], verify=verify)[0]

    def cut(self) -> None:
        """Shortens the lease to the items before the first that is no HIT: a chain is usable as far as it is whole."""
        for index, outcome in enumerate(self.outcomes):
            if outcome is not Outcome.HIT:
                del self.outcomes[index:]
                return

    def release(self) -> None:
        """Ends the lease; bytes with living views stay until those are gone. Calling it again does nothing."""
        if self._locations is not None:
            self._locations = None
            _leave(self._holders, self._end, True)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __del__(self) -> None:
        if getattr(self, "_locations", None) is not None:
            self._locations = None
            _leave(self._holders, self._end, False)

    def _location(self, index: int) -> int:
        if self._locations is None:
            raise ClosedError("this lease was released: take a new one, or make views before the release")
        if self.outcomes[index] is not Outcome.HIT:
            raise KeyError(f"item {index} of this lease is a {self.outcomes[index].name}: look at `outcomes` first")
        return int(self._locations[index])


def _leave(holders: list[bool], end: End, safely: bool) -> None:
    """One holder fewer; the last one gives the pins back."""
    if holders.pop():
        end(safely)
