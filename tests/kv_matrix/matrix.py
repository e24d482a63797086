"""The matrix: each shape of engine writes sequences of its own, each shape reads all of them back, byte for byte."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.kv_matrix.engine import ORDERS, Rank, layout_of, ranks_of, truth_of
from tiercache.model import Outcome

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from tiercache.kv.layout import Layout
    from tiercache.kv.store import KvStore
    from tiercache.sync import BlockingCache

PATIENCE_S = 60.0
SPARE_TOKENS = 5
"""Beyond the last whole block: never stored."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Of an engine: ranks and tokens of its pages."""

    tp: int
    pp: int
    page_tokens: int

    def __str__(self) -> str:
        return f"TP{self.tp} PP{self.pp} block {self.page_tokens}"


def shapes(
    tps: Sequence[int] = (1, 2, 4, 8), pps: Sequence[int] = (1, 2), pages: Sequence[int] = (16, 32, 128)
) -> list[Shape]:
    """All combinations."""
    return [Shape(tp, pp, page_tokens) for tp in tps for pp in pps for page_tokens in pages]


@dataclass(slots=True)
class Row:
    """What came of one kind of attention."""

    kind: str
    writes: int = 0
    reads: int = 0
    blocks: int = 0
    mismatch: int = 0
    """Bytes that differ, and blocks that were no hit."""
    differs: int = 0
    logical_bytes: int = 0
    moved_bytes: int = 0
    """Copied out of engines."""
    stored_bytes: int = 0
    """Of entries that the cache holds."""
    faults: list[str] = field(default_factory=list)


@dataclass(eq=False)
class Engine:
    """All ranks of one shape, with a store each."""

    shape: Shape
    ranks: Sequence[Rank]
    stores: Sequence[KvStore]

    @classmethod
    def of(cls, cache: BlockingCache, layout: Layout, shape: Shape, tokens: int) -> Engine:
        """Engines of different shapes have their memory in different orders, too."""
        pages = -(-tokens // shape.page_tokens) + 2
        order = ORDERS[(shape.tp.bit_length() + shape.pp + shape.page_tokens) % len(ORDERS)]
        ranks = ranks_of(layout, shape.tp, shape.pp, shape.page_tokens, pages, order)
        return cls(shape, ranks, [cache.kv(layout, rank.shard) for rank in ranks])

    def save(self, keys: list[bytes], truth: npt.NDArray[np.uint8], row: Row) -> None:
        """All ranks at once, as engines do."""
        tokens = truth.shape[2]
        savings = []
        for rank, store in zip(self.ranks, self.stores, strict=True):
            table = rank.table(tokens, seed=1)
            rank.write(truth, table)
            savings.append(store.save(keys, rank.planes, table))
        for saving in savings:
            if any(outcome is not Outcome.HIT for outcome in saving.wait(PATIENCE_S)):
                row.faults.append(f"{self.shape}: save {saving.outcomes}")
            if not saving.pages_free(PATIENCE_S):
                row.faults.append(f"{self.shape}: pages not free")
            row.moved_bytes += saving.moved_bytes
            row.differs += len(saving.differs)
        row.writes += 1
        row.logical_bytes += len(keys) * self.stores[0].layout.block_bytes

    def load(self, keys: list[bytes], truth: npt.NDArray[np.uint8], row: Row) -> None:
        """Rank after rank."""
        tokens = truth.shape[2]
        whole = range(len(keys) * self.stores[0].layout.block_tokens)
        if self.stores[0].match(keys).length != len(keys):
            row.faults.append(f"{self.shape}: {len(keys)} blocks are not all there")
        for rank, store in zip(self.ranks, self.stores, strict=True):
            table = rank.table(tokens, seed=2)
            rank.memory[...] = 0
            outcomes = store.load(keys, rank.planes, table, inline=True).wait(PATIENCE_S)
            missing = sum(outcome is not Outcome.HIT for outcome in outcomes)
            wrong = rank.wrong(truth, table, whole)
            row.mismatch += missing + wrong
            if missing or wrong:
                row.faults.append(f"{self.shape}: rank {rank.shard}: {missing} blocks missing, {wrong} bytes wrong")
            spare = rank.read(table, range(whole.stop, tokens))
            if spare.any():
                row.faults.append(f"{self.shape}: rank {rank.shard}: tokens beyond the last block were written")
                row.mismatch += int(np.count_nonzero(spare))
        row.reads += 1
        row.blocks += len(keys)

    def close(self) -> None:
        """Ends the threads."""
        for store in self.stores:
            store.close()


def run(
    cache: BlockingCache,
    kind: str,
    tokens: int,
    wanted: Sequence[Shape],
    readers: Sequence[Shape] | None = None,
    **changes: Any,
) -> Row:
    """Every shape writes a sequence of so many tokens and a few more, and every reader reads each of them."""
    layout, row = layout_of(kind, **changes), Row(kind)
    tokens += SPARE_TOKENS
    readers = wanted if readers is None else readers
    engines = {shape: Engine.of(cache, layout, shape, tokens) for shape in dict.fromkeys([*wanted, *readers])}
    try:
        for number, shape in enumerate(wanted):
            before = held(cache)
            truth = truth_of(layout, tokens, seed=number)
            keys = engines[shape].stores[0].keys(np.arange(tokens) + 1000 * number)
            engines[shape].save(keys, truth, row)
            row.stored_bytes += (held(cache) - before) * layout.block_bytes
            for reader in readers:
                engines[reader].load(keys, truth, row)
            cache.delete(keys)
    finally:
        for engine in engines.values():
            engine.close()
    return row


def held(cache: BlockingCache) -> int:
    """Entries that the cache has."""
    return int(cache.stats()["tiercache_entries"])
