"""Victims: which pack of a bucket is given up next, so that what is left is worth most. Pure.

A block is of use only with all blocks before it, and a pack is deleted whole. So a row is worth keeping as long as
anything that builds on it: its rank is the highest of the packs that its descendants lie in (least recently used, leaf
first), or the lowest of all where the chain before it is broken. A pack is as good as its rows are on average, by
bytes. Of packs that are equally good, the one goes on which the fewest bytes elsewhere build.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from tiercache.remote.packs import Rows

    I64 = npt.NDArray[np.int64]

ROUND = 1e-9
"""Averages that differ by less, in proportion, are equal."""


class Candidate(NamedTuple):
    """One pack: its rows, its place in the order of use and worth, and whether it is this writer's to give up."""

    rows: Rows
    rank: tuple[float, int]
    own: bool


def choose(candidates: Sequence[Candidate]) -> int:
    """Which one to give up; -1 where none of them is one's own. O(rows x log(longest chain))."""
    own = [i for i, one in enumerate(candidates) if one.own]
    if not own:
        return -1
    order = sorted(range(len(candidates)), key=lambda i: candidates[i].rank)
    place = np.empty(len(candidates), np.int64)
    place[order] = np.arange(1, len(candidates) + 1)
    rows = np.concatenate([one.rows for one in candidates])
    pack = np.repeat(np.arange(len(candidates)), [len(one.rows) for one in candidates])
    if not len(rows):
        return min(own, key=lambda i: place[i])
    above, broken = _parents(rows)
    sizes = rows["size"].astype(np.int64)
    ranks, below = _gather(above, place[pack], sizes)
    ranks[broken] = 0
    count = len(candidates)
    total = np.bincount(pack, sizes, count)
    good = np.bincount(pack, sizes * ranks.astype(np.float64), count) / np.maximum(total, 1)
    outside = (above >= 0) & ~broken
    outside &= pack[above] != pack  # of rows without a parent this looks at the last one, and was False before
    lost = np.bincount(pack[above[outside]], below[outside].astype(np.float64), count)
    best = min(own, key=lambda i: good[i])
    equal = [i for i in own if good[i] <= good[best] * (1 + ROUND)]
    return min(equal, key=lambda i: (lost[i], -place[i]))


def _parents(rows: Rows) -> tuple[I64, npt.NDArray[np.bool_]]:
    """The row of each row's parent, -1 where it has none or none is there; and whether its chain is broken. Keys are
    compared by their first 16 bytes: they are digests."""
    keys, parents = _halves(rows["key"]), _halves(rows["parent"])
    by_key = np.lexsort((keys[:, 1], keys[:, 0]))
    table = keys[by_key, 0]
    at = np.searchsorted(table, parents[:, 0])
    found = by_key[np.minimum(at, len(rows) - 1)]
    same = (keys[found] == parents).all(axis=1)
    has = rows["parent_width"] > 0
    above = np.where(has & same, found, -1).astype(np.int64)
    above[above == np.arange(len(rows))] = -1
    broken = has & (above < 0)
    jump = above.copy()
    for _ in range(len(rows).bit_length()):  # pointer doubling; a cycle, which only damage could make, ends it too
        live = jump >= 0
        if not live.any():
            break
        broken[live] |= broken[jump[live]]
        jump[live] = jump[jump[live]]
    return above, broken


def _halves(column: npt.NDArray[np.void]) -> npt.NDArray[np.uint64]:
    """The first 16 bytes of each, as two numbers."""
    return np.ascontiguousarray(column).view(np.uint64).reshape(-1, 4)[:, :2]


def _gather(above: I64, ranks: I64, sizes: I64) -> tuple[I64, I64]:
    """For each row: the highest rank, and the sum of sizes, of it and all that builds on it."""
    best, total = ranks.copy(), sizes.copy()
    depth, jump = (above >= 0).astype(np.int64), above.copy()
    for _ in range(len(above).bit_length()):
        live = jump >= 0
        if not live.any():
            break
        depth[live] += depth[jump[live]]
        jump[live] = jump[jump[live]]
    order = np.argsort(depth, kind="stable")
    edges = np.searchsorted(depth[order], np.arange(int(depth.max()) + 2))
    for level in range(int(depth.max()), 0, -1):
        here = order[edges[level] : edges[level + 1]]
        here = here[above[here] >= 0]
        np.maximum.at(best, above[here], best[here])
        np.add.at(total, above[here], total[here])
    return best, total
