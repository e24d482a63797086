"""Runs: where the rows of a sequence's blocks lie in an engine's pages, from its page table."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tiercache.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from tiercache.kv.planes import Planes

    I64 = npt.NDArray[np.int64]

Position = tuple[list[int], int, int]
"""Where rows [first, first + count) of a block lie in the engine: a position for each of Planes.steps, first, count."""


@dataclass(frozen=True, eq=False)
class Table:
    """Where a sequence's rows lie: row r, from `first_token` on, is slot (r - first_token) % page_tokens of page
    `page_ids[(r - first_token) // page_tokens]`. Any page size serves any block size."""

    page_ids: npt.NDArray[np.int64]
    page_tokens: int
    first_token: int = 0

    def __post_init__(self) -> None:
        ids = np.ascontiguousarray(self.page_ids, np.int64)
        if ids.ndim != 1 or self.page_tokens < 1:
            raise ConfigError(f"a table of {ids.ndim} axes, {self.page_tokens} tokens a page: pass one row of ids")
        object.__setattr__(self, "page_ids", ids)

    @property
    def tokens(self) -> range:
        """The rows that have a place."""
        return range(self.first_token, self.first_token + len(self.page_ids) * self.page_tokens)


class Runs(NamedTuple):
    """Where the rows of some blocks lie: block b has the runs `rows[starts[b] : starts[b + 1]]`, each (first row of the
    block, rows, position of the first one for each of Planes.steps)."""

    starts: I64
    rows: I64

    def in_bytes(self, planes: Planes) -> Runs:
        """With positions in bytes instead of units."""
        return Runs(self.starts, self.rows * np.array([1, 1, *(step.unit for step in planes.steps)], np.int64))

    def of(self, begin: int, end: int) -> Runs:
        """Those of blocks [begin, end)."""
        return Runs(self.starts[begin : end + 1], self.rows)

    def listed(self) -> list[list[Position]]:
        """The same, as loops in Python want it."""
        rows, starts = self.rows.tolist(), self.starts.tolist()
        return [[(row[2:], row[0], row[1]) for row in rows[a:b]] for a, b in pairwise(starts)]


def runs_of(planes: Planes, table: Table, blocks: Sequence[int], tokens: range | None) -> Runs:
    """Where the rows of each block lie: one run of slots where a page, or a run of pages, holds all of them."""
    rows, size = planes.layout.rows, planes.page_tokens
    if table.page_tokens != size:
        raise ConfigError(f"a table of {table.page_tokens} tokens a page, where the planes have {size}")
    starts = np.asarray(blocks, np.int64) * rows - table.first_token
    if not len(starts):
        return Runs(np.zeros(1, np.int64), np.zeros((0, 2 + len(planes.steps)), np.int64))
    first, last = int(starts.min()), int(starts.max()) + rows
    whole = tokens is None
    if tokens is not None:
        if tokens.step != 1:
            raise ConfigError(f"tokens {tokens}: a range with step 1")
        lowest, highest = tokens.start - table.first_token, tokens.stop - table.first_token
        whole = lowest <= first and last <= highest
        first, last = max(first, lowest), min(last, highest)
    if first < last and (first < 0 or last > len(table.page_ids) * size):
        raise ConfigError(f"blocks {min(blocks)} to {max(blocks)} leave the table's tokens {table.tokens}")
    slots = starts % size
    if whole and int(slots.max()) + rows <= size:
        pages = table.page_ids[starts // size]
        _check_pages(planes, int(pages.min()), int(pages.max()))
        return Runs(np.arange(len(starts) + 1), _rows(planes, pages, slots, np.zeros_like(pages), rows))
    if whole and not planes.linear and rows % size == 0 and not slots.any():
        each = np.arange(rows // size)
        pages = table.page_ids[(starts // size)[:, None] + each].reshape(-1)
        _check_pages(planes, int(pages.min()), int(pages.max()))
        firsts = np.tile(each * size, len(starts))
        return Runs(np.arange(len(starts) + 1) * len(each), _rows(planes, pages, np.zeros_like(pages), firsts, size))
    found = [_scattered(planes, table.page_ids, start, (first, last)) for start in starts.tolist()]
    page, slot, firsts, counts = np.array([run for runs in found for run in runs], np.int64).reshape(-1, 4).T
    return Runs(np.cumsum([0, *map(len, found)]), _rows(planes, page, slot, firsts, counts))


def _rows(planes: Planes, pages: I64, slots: I64, firsts: I64, counts: I64 | int) -> I64:
    positions = [pages * step.page + slots * step.slot for step in planes.steps]
    return np.stack([firsts, np.broadcast_to(counts, firsts.shape), *positions], axis=1)


def _check_pages(planes: Planes, least: int, most: int) -> None:
    if least < 0 or most >= planes.pages:
        raise ConfigError(f"page ids {least} to {most}, where the planes have {planes.pages} pages")


def _scattered(planes: Planes, ids: I64, start: int, limits: tuple[int, int]) -> list[tuple[int, int, int, int]]:
    """Runs of slots of one block whose rows lie in several pages, or are wanted in part: page, slot, first row of the
    block, rows."""
    size, rows = planes.page_tokens, planes.layout.rows
    row, stop = max(start, limits[0]), min(start + rows, limits[1])
    runs: list[tuple[int, int, int, int]] = []
    while row < stop:
        page, slot = int(ids[row // size]), row % size
        count = min(size - slot, stop - row)
        _check_pages(planes, page, page)
        if runs and planes.linear:
            before = runs[-1]
            if before[0] * size + before[1] + before[3] == page * size:
                runs[-1] = (*before[:3], before[3] + count)
                row += count
                continue
        runs.append((page, slot, row - start, count))
        row += count
    return runs
