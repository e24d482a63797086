"""Stretch: some blocks of one sequence, their keys, and the engine memory they lie in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tiercache.errors import ConfigError
from tiercache.kv.chain import key_bytes
from tiercache.kv.layout import Span

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from tiercache.kv.layout import Layout
    from tiercache.kv.planes import Planes
    from tiercache.kv.runs import Table


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
        cls,
        layout: Layout,
        keys: Sequence[bytes],
        planes: Planes,
        table: Table,
        *,
        start: int,
        stop: int | None,
        rows: range | None = None,
    ) -> Stretch:
        """Checks its arguments, for threads that copy have nobody to tell: ConfigError. Only `rows` of the sequence
        need a place (a slice); without them those of all blocks do."""
        stop = len(keys) if stop is None else stop
        if not 0 <= start <= stop <= len(keys):
            raise ConfigError(
                f"blocks [{start}, {stop}) are not in a sequence of {len(keys)} keys: "
                "pass the keys from the sequence's first block on"
            )
        if planes.layout != layout:
            raise ConfigError("these planes are of another layout than the store: build both from the same one")
        _check_keys(layout, keys[max(0, start - 1) : stop])  # the block before the first is what it hangs under
        first, last = start * layout.rows, stop * layout.rows
        if rows is not None:
            first, last = max(first, rows.start), min(last, rows.stop)
        _check_places(planes, table, range(first, last))
        return cls(layout, keys, range(start, stop), planes, table)

    def parent(self, block: int) -> bytes:
        """Key of the block that this one hangs under; states hang nowhere, since only the newest is kept."""
        return self.keys[block - 1] if block and self.layout.rule.span is not Span.STATE else b""

    def of_blocks(self, blocks: Iterable[int]) -> list[bytes]:
        """Keys of these blocks."""
        return [self.keys[block] for block in blocks]


def _check_keys(layout: Layout, keys: Sequence[bytes]) -> None:
    width = key_bytes(layout)
    if set(map(type, keys)) - {bytes} or set(map(len, keys)) - {width}:
        wrong = next(key for key in keys if type(key) is not bytes or len(key) != width)
        raise ConfigError(f"{wrong!r} is no key of a block, which is {width} bytes: pass what `KvStore.keys` gave")


def _check_places(planes: Planes, table: Table, rows: range) -> None:
    """Every one of these rows has a page, and the planes have that page."""
    size = planes.page_tokens
    if table.page_tokens != size:
        raise ConfigError(
            f"a table of {table.page_tokens} tokens a page, where the planes have {size}: make them agree"
        )
    if not rows:
        return
    placed = table.tokens
    if rows.start < placed.start or rows.stop > placed.stop:
        raise ConfigError(
            f"rows [{rows.start}, {rows.stop}) are wanted, and the table has places for [{placed.start}, "
            f"{placed.stop}): pass a page for each of them, or other `start` and `stop`"
        )
    pages = table.page_ids[(rows.start - placed.start) // size : (rows.stop - 1 - placed.start) // size + 1]
    least, most = int(pages.min()), int(pages.max())
    if least < 0 or most >= planes.pages:
        raise ConfigError(
            f"the table has page ids {least} to {most}, and the planes have pages 0 to {planes.pages - 1}: pass ids of "
            "these planes"
        )


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
