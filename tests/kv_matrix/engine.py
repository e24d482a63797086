"""An engine's memory, simulated: paged KV tensors in the orders that engines use, filled and read through NumPy alone.

Nothing here knows tiercache's planes or moves: what a rank holds is written and read by indexing, element by element of
the truth, so that what comes back through a cache can be compared with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tiercache.kv.layout import Attention, Layout
from tiercache.kv.planes import Planes, paged
from tiercache.kv.runs import Table
from tiercache.kv.shard import Shard

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    Truth = npt.NDArray[np.uint8]

ORDERS = ("lphtC", "lpthC", "plhtC")
"""LBHNC, LBNHC, BLHNC: layer, page ("block"), head, slot ("N"), content."""

SHAPES = {
    "MHA": {"heads": 8, "layers": 8, "k_dim": 32, "v_dim": 32, "dtype": "bfloat16", "attention": Attention.MHA},
    "GQA": {"heads": 2, "layers": 12, "k_dim": 64, "v_dim": 64, "dtype": "bfloat16", "attention": Attention.GQA},
    "MQA": {"heads": 1, "layers": 7, "k_dim": 64, "v_dim": 64, "dtype": "float16", "attention": Attention.MQA},
    "MFA": {"heads": 1, "layers": 61, "k_dim": 256, "v_dim": 256, "dtype": "float8_e4m3fn", "attention": Attention.MFA},
    "MLA": {"heads": 1, "layers": 27, "k_dim": 576, "v_dim": 0, "dtype": "bfloat16", "attention": Attention.MLA},
}
"""Every kind of attention, small; MFA is Step-3's own shape."""


def layout_of(kind: str, **changes: object) -> Layout:
    """The layout of one of SHAPES."""
    return Layout(**{"model": f"simulated {kind}", **SHAPES[kind], **changes})  # type: ignore[arg-type]


def truth_of(layout: Layout, tokens: int, seed: int = 0) -> Truth:
    """Bytes of a sequence: [layer, head, token, K's and then V's bytes], no two of them likely alike."""
    shape = (layout.layers, layout.heads, tokens, (layout.k_dim + layout.v_dim) * layout.itemsize)
    return np.frombuffer(np.random.default_rng(seed).bytes(int(np.prod(shape))), np.uint8).reshape(shape)


@dataclass(eq=False)
class Rank:
    """One worker's KV memory: `memory` in `order`, of `pages` pages of `page_tokens` slots."""

    layout: Layout
    shard: Shard
    page_tokens: int
    pages: int
    order: str = "lphtC"

    def __post_init__(self) -> None:
        layout, shard = self.layout, self.shard
        sizes = {
            "l": len(shard.layers),
            "h": len(shard.heads),
            "p": self.pages,
            "t": self.page_tokens,
            "C": layout.k_dim + layout.v_dim,
        }
        item = np.dtype(f"u{layout.itemsize}")
        self.memory = np.zeros([sizes[letter] for letter in self.order], item)
        self.bytes = self.memory.view(np.uint8)
        order, tensor = self.order, self.memory
        if not layout.v_dim:
            order = order.replace("C", "d")
        planes = paged(
            tensor, order, layers=shard.layers, heads=shard.heads, k_dim=layout.k_dim if layout.v_dim else None
        )
        self.planes = Planes(layout, shard, planes)

    def table(self, tokens: int, seed: int = 0) -> Table:
        """Pages for a sequence, all over the place."""
        count = -(-tokens // self.page_tokens)
        ids = np.random.default_rng(seed).permutation(self.pages)[:count].astype(np.int64)
        return Table(ids, self.page_tokens)

    def write(self, truth: Truth, table: Table, tokens: range | None = None) -> None:
        """What this rank would have computed of the sequence."""
        tokens = tokens if tokens is not None else range(truth.shape[2])
        pages, slots = self._places(table, tokens)
        self._view()[:, :, pages, slots] = self._of(truth)[:, :, tokens.start : tokens.stop]

    def read(self, table: Table, tokens: range) -> Truth:
        """[layer, head, token, byte] of what this rank holds."""
        pages, slots = self._places(table, tokens)
        found: Truth = self._view()[:, :, pages, slots]
        return found

    def wrong(self, truth: Truth, table: Table, tokens: range) -> int:
        """Bytes that are not the truth's."""
        return int((self.read(table, tokens) != self._of(truth)[:, :, tokens.start : tokens.stop]).sum())

    def flip(self, table: Table, token: int, layer: int, at: int = 0) -> None:
        """One bit of one byte changes, of a layer that this rank holds."""
        page, slot = divmod(token, self.page_tokens)
        self._view()[layer - self.shard.layers.start, 0, int(table.page_ids[page]), slot, at] ^= 1

    def _places(self, table: Table, tokens: range) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Page and slot of each token."""
        numbers = np.arange(tokens.start, tokens.stop)
        return table.page_ids[numbers // self.page_tokens], numbers % self.page_tokens

    def _of(self, truth: Truth) -> Truth:
        shard = self.shard
        return truth[shard.layers.start : shard.layers.stop, shard.heads.start : shard.heads.stop]

    def _view(self) -> Truth:
        """The memory as [layer, head, page, slot, byte]."""
        return self.bytes.transpose([self.order.index(letter) for letter in "lhptC"])


def ranks_of(layout: Layout, tp: int, pp: int, page_tokens: int, pages: int, order: str = "lphtC") -> Sequence[Rank]:
    """All workers of an engine."""
    return [
        Rank(layout, Shard.of(layout, tp_rank, tp, pp_rank, pp), page_tokens, pages, order)
        for pp_rank in range(pp)
        for tp_rank in range(tp)
    ]
