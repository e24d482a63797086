"""Stretch: some blocks of one sequence, their keys, and the engine memory they lie in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tiercache.errors import ConfigError
from tiercache.kv.layout import Span

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from tiercache.kv.layout import Layout
    from tiercache.kv.moving import Table
    from tiercache.kv.planes import Planes


@dataclass(frozen=True, slots=True, eq=False)
class Stretch:
    """Blocks `span` of a sequence whose keys from its first block on are `keys`."""

    layout: Layout
    keys: Sequence[bytes]
    span: range
    planes: Planes
    table: Table

    @classmethod
    def of(
        cls, layout: Layout, keys: Sequence[bytes], planes: Planes, table: Table, *, start: int, stop: int | None
    ) -> Stretch:
        """Checks its arguments: ConfigError."""
        stop = len(keys) if stop is None else stop
        if not 0 <= start <= stop <= len(keys):
            raise ConfigError(
                f"blocks [{start}, {stop}) are not in a sequence of {len(keys)} keys: "
                "pass the keys from the sequence's first block on"
            )
        if planes.layout != layout:
            raise ConfigError("these planes are of another layout than the store: build both from the same one")
        return cls(layout, keys, range(start, stop), planes, table)

    def parent(self, block: int) -> bytes:
        """Key of the block that this one hangs under; states hang nowhere, since only the newest is kept."""
        return self.keys[block - 1] if block and self.layout.rule.span is not Span.STATE else b""

    def of_blocks(self, blocks: Iterable[int]) -> list[bytes]:
        """Keys of these blocks."""
        return [self.keys[block] for block in blocks]


def lead(blocks: Sequence[int], most: int) -> range:
    """The run of consecutive numbers that `blocks` (ascending) begins with, at most so many."""
    first, length = blocks[0], 1
    while length < min(most, len(blocks)) and blocks[length] == first + length:
        length += 1
    return range(first, first + length)


def grouped(maps: Sequence[tuple[int, int]], most: int) -> Iterator[tuple[int, list[int]]]:
    """(map, numbers) of what has the same map, at most so many at a time, in the order of first appearance. `maps` are
    (number, map)."""
    groups: dict[int, list[int]] = {}
    for number, parts in maps:
        groups.setdefault(parts, []).append(number)
    for parts, numbers in groups.items():
        for at in range(0, len(numbers), most):
            yield parts, numbers[at : at + most]
