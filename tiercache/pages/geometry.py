"""Geometry of page runs, as pure functions: spans of bytes to pages and part maps, and back.

Pages have equal length but for the last one. A part is the unit of presence: part i of page p covers bytes
[p * page_bytes + i * part_bytes, ... + part_bytes) of the file, cut at the end of the page and of the file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tiercache.buffers import runs
from tiercache.model import ALIGN_BYTES, PARTS_MAX

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Range = tuple[int, int]
"""Bytes [start, stop) of a file."""


PART_BYTES_MIN = 16 << 10
"""Finer parts would fetch little less, and their digests cost more than the copy."""


def part_bytes_of(page_bytes: int) -> int:
    """The finest part worth having that one 64-bit map allows: 16 KiB for pages of up to 1 MiB.

    Column chunks end anywhere, and what a read fetches beyond them grows with the part: with 64 KiB parts one narrow
    column of TPC-H costs 1.75 to 4.7 times its bytes, with 16 KiB parts 1.2 to 1.8 (all 22 queries: 1.00 to 1.04).
    """
    return max(PART_BYTES_MIN, -(-page_bytes // (PARTS_MAX * ALIGN_BYTES)) * ALIGN_BYTES)


def cover(start: int, stop: int, page_bytes: int, part_bytes: int) -> tuple[list[int], list[int]]:
    """Ordinals and part maps of the pages that [start, stop) touches, ascending; empty for an empty range."""
    if start >= stop:
        return [], []
    first, last = start // page_bytes, (stop - 1) // page_bytes
    low = (start - first * page_bytes) // part_bytes
    high = (stop - 1 - last * page_bytes) // part_bytes + 1
    if first == last:
        return [first], [(1 << high) - (1 << low)]
    full = (1 << -(-page_bytes // part_bytes)) - 1
    maps = [full] * (last - first + 1)
    maps[0] = full & -(1 << low)
    maps[-1] = (1 << high) - 1
    return list(range(first, last + 1)), maps


def inside(start: int, stop: int, size: int, page_bytes: int, part_bytes: int) -> tuple[list[int], list[int]]:
    """As `cover`, but only parts that lie in [start, stop) whole (the file's last part may be short)."""
    maps: dict[int, int] = {}
    for ordinal, parts in zip(*cover(start, stop, page_bytes, part_bytes), strict=True):
        begin = ordinal * page_bytes
        length = min(page_bytes, size - begin)
        for first, last in runs(parts):
            while first < last and begin + first * part_bytes < start:
                first += 1
            while first < last and begin + min(length, last * part_bytes) > stop:
                last -= 1
            if first < last:
                maps[ordinal] = maps.get(ordinal, 0) | ((1 << last) - (1 << first))
    return list(maps), list(maps.values())


def cover_all(ranges: Iterable[Range], page_bytes: int, part_bytes: int) -> tuple[list[int], list[int]]:
    """As `cover`, for the union of many ranges in any order."""
    maps: dict[int, int] = {}
    for start, stop in ranges:
        for ordinal, parts in zip(*cover(start, stop, page_bytes, part_bytes), strict=True):
            maps[ordinal] = maps.get(ordinal, 0) | parts
    ordinals = sorted(maps)
    return ordinals, [maps[ordinal] for ordinal in ordinals]


def stretches(ordinal: int, parts: int, page_length: int, page_bytes: int, part_bytes: int) -> Iterator[Range]:
    """Byte ranges of the file that the parts of one page cover, ascending; neighbours are one range."""
    begin = ordinal * page_bytes
    for first, last in runs(parts):
        yield begin + first * part_bytes, begin + min(page_length, last * part_bytes)


def joined(ranges: Iterable[Range]) -> list[Range]:
    """The same bytes as few ascending ranges as possible."""
    out: list[Range] = []
    for start, stop in sorted(ranges):
        if start >= stop:
            continue
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(stop, out[-1][1]))
        else:
            out.append((start, stop))
    return out
