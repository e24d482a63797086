"""Engines' memory for tests: KV as plain arrays indexed without our planes, in any order of axes and any page size."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from hypothesis import strategies as st

from tiercache import native
from tiercache.buffers import Buffer
from tiercache.kv.layout import Attention, Layout
from tiercache.kv.planes import Plane, Planes, paged
from tiercache.kv.runs import Table
from tiercache.kv.shard import Shard

TYPES = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
ORDERS = (
    "lphtC",
    "lpthC",
    "plhtC",
    "plthC",
    "phltC",
    "lpkhtd",
    "lkpthd",
    "lphktd",
    "klpthd",
    "thplC",
    "lphkdt",
    "dlhktp",
    "apart",
    "halves",
)


KERNELS = (0, 64, 256) if native.KERNEL is not None else (0,)
"""How bytes are moved: by NumPy (0), or by the kernel with instructions so wide, as far as this processor has them."""


@contextmanager
def moved_by(bits: int) -> Iterator[None]:
    """Moves bytes that way inside."""
    kernel = native.KERNEL
    if not bits or kernel is None:
        native.KERNEL = None
    else:
        kernel.choose(bits)
    try:
        yield
    finally:
        native.KERNEL = kernel
        if kernel is not None:
            kernel.choose(0)


@st.composite
def layouts(draw: st.DrawFn, *, wide: bool = False) -> Layout:
    """Any small layout; latent ones have no V. `wide`: rows of half of them are such as the kernel moves."""
    latent, wide = draw(st.booleans()), wide and draw(st.booleans())
    heads = 1 if latent else draw(st.sampled_from([1, 2, 3] if wide else [1, 2, 3, 4, 8, 70]))
    dims = st.sampled_from([64, 128]) if wide else st.integers(1, 12)
    return Layout(
        model="m",
        heads=heads,
        layers=draw(st.integers(1, 4 if wide else 9)),
        k_dim=draw(dims) * (1 if wide else draw(st.sampled_from([1, 64]))),
        v_dim=0 if latent else draw(dims),
        dtype=draw(st.sampled_from(["uint8", "bfloat16", "float32"])),
        attention=Attention.MLA if latent else Attention.GQA,
        block_tokens=draw(st.sampled_from([1, 2, 5, 16])),
    )


def values(layout: Layout, tokens: int, seed: int) -> list[np.ndarray]:
    """Random K and V of a sequence: [layer, head, token, dim], V only where there is one."""
    rng = np.random.default_rng(seed)
    kind = TYPES[layout.itemsize]
    shape = layout.layers, layout.heads, tokens
    dims = [layout.k_dim, layout.v_dim] if layout.v_dim else [layout.k_dim]
    return [rng.integers(0, np.iinfo(kind).max, (*shape, dim), kind) for dim in dims]


def stored(layout: Layout, sequence: list[np.ndarray], block: int) -> bytes:
    """The block as its definition has it, one row at a time."""
    out = b""
    k, g, rows = layout.layers_per_part, layout.heads_per_part, layout.rows
    for first in range(0, layout.layers, k):
        for head_group in range(0, layout.heads, g):
            for layer in range(first, min(first + k, layout.layers)):
                for head in range(head_group, head_group + g):
                    for array in sequence:
                        out += array[layer, head, block * rows : (block + 1) * rows].tobytes()
    return out


class Engine:
    """Pages of one shard in some order of axes; `put` and `get` index them as an engine would, row by row."""

    def __init__(
        self, layout: Layout, shard: Shard, *, order: str, pages: int, page_tokens: int, seed: int = 0
    ) -> None:
        self.layout, self.shard, self.page_tokens, self.order = layout, shard, page_tokens, order
        kind = TYPES[layout.itemsize]
        rng = np.random.default_rng(seed)
        same = layout.v_dim in (0, layout.k_dim)
        if not layout.v_dim and order not in ("apart", "halves"):
            order = order.replace("k", "").replace("C", "d")
        elif "k" in order and not same:
            order = "apart"
        sizes = {"l": len(shard.layers), "h": len(shard.heads), "p": pages, "t": page_tokens, "k": 2}
        sizes |= {"C": layout.k_dim + layout.v_dim, "d": layout.k_dim}
        dims = [layout.k_dim, layout.v_dim] if layout.v_dim else [layout.k_dim]
        self.arrays: list[np.ndarray] = []
        planes: list[Plane] = []
        where = {"layers": shard.layers, "heads": shard.heads}
        self.views: dict[tuple[int, int], np.ndarray] = {}  # (layer, kv) -> [page, slot, head, dim]
        if order in ("apart", "halves"):  # a tensor a layer, or two of them for the two halves of the dims
            for layer in shard.layers:
                for kv, dim in enumerate(dims):
                    cuts = [0, dim // 2, dim] if order == "halves" and dim > 1 else [0, dim]
                    whole = []
                    for start, stop in itertools.pairwise(cuts):
                        array = rng.integers(0, 256, (pages, page_tokens, len(shard.heads), stop - start)).astype(kind)
                        one = {"layers": range(layer, layer + 1), "heads": shard.heads, "kv": kv}
                        planes += paged(array, "pthd", **one, dims=range(start, stop))
                        whole.append(array)
                    self.arrays += whole
                    self.views[layer, kv] = whole
        else:
            array = rng.integers(0, 256, [sizes[axis] for axis in order]).astype(kind)
            self.arrays = [array]
            planes = paged(array, order, **where, **({"k_dim": layout.k_dim} if "C" in order else {}))
            for i, layer in enumerate(shard.layers):
                for kv, dim in enumerate(dims):
                    index: list[object] = [slice(None)] * len(order)
                    index[order.index("l")] = i
                    rest = order.replace("l", "")
                    if "k" in order:
                        index[order.index("k")] = kv
                        rest = rest.replace("k", "")
                    if "C" in order:
                        index[-1] = slice(kv * layout.k_dim, kv * layout.k_dim + dim)
                    view = array[tuple(index)]
                    last = "C" if "C" in rest else "d"
                    self.views[layer, kv] = [view.transpose([rest.index(axis) for axis in "pth" + last])]
        self.planes = Planes(layout, shard, planes)

    def put(self, sequence: list[np.ndarray], table: Table) -> None:
        """Writes the table's rows of a sequence."""
        for row in table.tokens:
            if row < sequence[0].shape[2]:
                self._row(row, table, sequence, write=True)

    def get(self, tokens: range, table: Table) -> list[np.ndarray]:
        """Reads rows; what this shard does not hold is zero."""
        layout = self.layout
        found = values(layout, tokens.stop, 0)
        for array in found:
            array[:] = 0
        for row in tokens:
            self._row(row, table, found, write=False)
        return [array[:, :, tokens.start :] for array in found]

    def _row(self, row: int, table: Table, sequence: list[np.ndarray], *, write: bool) -> None:
        page, slot = divmod(row - table.first_token, self.page_tokens)
        page = int(table.page_ids[page])
        for (layer, kv), views in self.views.items():
            at = 0
            for view in views:
                dim = view.shape[-1]
                for h, head in enumerate(self.shard.heads):
                    ours = sequence[kv][layer, head, row, at : at + dim]
                    if write:
                        view[page, slot, h] = ours
                    else:
                        ours[:] = view[page, slot, h]
                at += dim


def table_for(tokens: int, page_tokens: int, pages: int, seed: int, first: int = 0, *, runs: bool = False) -> Table:
    """A table with random pages, or with pages in a row."""
    count = -(-(tokens - first) // page_tokens)
    rng = np.random.default_rng(seed)
    ids = np.arange(count) + rng.integers(0, pages - count + 1) if runs else rng.permutation(pages)[:count]
    return Table(ids.astype(np.int64), page_tokens, first)


def empty_blocks(layout: Layout, count: int, *, fill: int = 0, skew: int = 0) -> tuple[list[np.ndarray], list[Buffer]]:
    """Memory of `count` stored blocks, `skew` bytes off any alignment."""
    arrays = [np.full(layout.block_bytes + skew, fill, np.uint8) for _ in range(count)]
    return arrays, [Buffer.of(array[skew:].data, writable=True) for array in arrays]
