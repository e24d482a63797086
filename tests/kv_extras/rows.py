"""Rows of the table: float8, packed blocks, encoder outputs and LoRA namespaces, each through a cache and back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

import tiercache
from tests.kv_matrix.engine import Rank, layout_of, ranks_of
from tests.kv_matrix.matrix import Engine, Shape
from tests.kv_matrix.matrix import Row as Tally
from tiercache.buffers import Buffer
from tiercache.kv import float8
from tiercache.kv.chain import tokens_keys
from tiercache.kv.moving import gather, scatter
from tiercache.kv.represent import Form, Fp8, Packed, Represented, has_zstd
from tiercache.kv.shard import Shard
from tiercache.kv.tensors import Tensor, Tensors, tensor_key
from tiercache.model import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tiercache.kv.layout import Layout
    from tiercache.sync import BlockingCache

OPTIONS = {"memory_bytes": "64MiB", "ssd_bytes": "256MiB", "segment_bytes": "16MiB", "share": False}
TOKENS = 16 * 12


@dataclass(slots=True)
class Row:
    """What came of one extra."""

    name: str
    entries: int = 0
    puts: int = 0
    hits: int = 0
    strangers: int = 0
    """Hits by whoever has another revision, adapter, dtype or representation: there must be none."""
    wrong_bytes: int = 0
    """Bytes that differ from what this representation promises: all of the original's, or for float8 its own."""
    stored: float = 1.0
    """Bytes stored over bytes of the original."""
    relative_rms: float = 0.0
    max_abs: float = 0.0
    poison_found: bool = False
    """A byte flipped in memory was found, and never given."""

    @property
    def good(self) -> bool:
        """Whether it is as it should be."""
        return not (self.strangers or self.wrong_bytes) and self.poison_found and self.hits >= self.entries > 0


def values(layout: Layout, seed: int) -> np.ndarray:
    """[layer, head, token, bytes] of floating-point K and V, normal, each layer and head at its own size."""
    draw = np.random.default_rng(seed)
    shape = (layout.layers, layout.heads, TOKENS, layout.k_dim + layout.v_dim)
    sizes = 2.0 ** draw.integers(-5, 4, (layout.layers, layout.heads, 1, 1))
    raw = float8.from_float32((draw.standard_normal(shape) * sizes).astype(np.float32), layout.dtype)
    return raw.view(np.uint8)


def poison(cache: BlockingCache, key: bytes) -> None:
    """Flips a bit of an entry's bytes in memory, after its digest was taken."""
    with cache.match([key]) as lease:
        lease.buffer(0).array()[lease.buffer(0).length // 2] ^= 16


def blocks_of(rank: Rank, count: int) -> list[np.ndarray]:
    """Stored blocks out of an engine's memory."""
    blocks = [np.empty(rank.layout.block_bytes, np.uint8) for _ in range(count)]
    targets = [Buffer.of(block.data, writable=True) for block in blocks]
    gather(rank.planes, rank.table(TOKENS), range(count), targets)
    return blocks


def represented(folder: Path, kind: str, make: Callable[[Layout], Form]) -> Row:
    """Out of one engine, into the SSD, and into another engine with other pages in another order."""
    layout = layout_of(kind)
    form = make(layout)
    row = Row(f"{kind} {type(form).__name__.lower()} {getattr(form, 'method', '')}".strip())
    whole = Shard.of(layout, 0, 1)
    source, target = Rank(layout, whole, 16, 20), Rank(layout, whole, 64, 6, "plhtC")
    truth = values(layout, 1)
    source.write(truth, source.table(TOKENS))
    keys = tokens_keys(layout, np.arange(TOKENS))
    blocks = blocks_of(source, len(keys))
    with tiercache.open(folder, **OPTIONS) as cache:
        store = Represented(cache.core, cache.loop, form)
        row.puts = store.put(keys, blocks).count(Outcome.HIT)
        row.entries, row.stored = len(keys), store.stored_bytes / store.original_bytes
        row.relative_rms, row.max_abs = store.loss.relative_rms, store.loss.max_abs
        near: list[Form] = [Fp8(layout), Packed(layout, "zlib"), make(replace(layout, lora="another"))]
        others = [each for each in near if each.layout != form.layout]
        row.strangers = sum(Represented(cache.core, cache.loop, each).match(keys) for each in others)
        row.strangers += len(cache.core.probe_chain(keys, 1))
        cache.flush()
    with tiercache.open(folder, **OPTIONS) as cache:
        store = Represented(cache.core, cache.loop, form)
        got = [np.zeros_like(block) for block in blocks]
        row.hits = store.get_into(keys, got).count(Outcome.HIT)
        scatter(target.planes, target.table(TOKENS), range(len(keys)), [Buffer.of(block.data) for block in got])
        promised = truth
        if isinstance(form, Fp8):
            for block in blocks:
                form.decode(np.frombuffer(form.encode(block), np.uint8), block)
            scatter(source.planes, source.table(TOKENS), range(len(keys)), [Buffer.of(one.data) for one in blocks])
            promised = source.read(source.table(TOKENS), range(TOKENS))
        row.wrong_bytes = target.wrong(promised, target.table(TOKENS), range(TOKENS))
        poison(cache, store.keys(keys)[0])
        row.poison_found = store.get_into(keys[:1], got[:1]) == [Outcome.CORRUPT]
    return row


def encoder(folder: Path) -> Row:
    """Five consumers of one image, and three of something else that is nearly the same."""
    image = np.random.default_rng(3).integers(0, 1 << 16, (13, 256, 64), np.uint16)
    facts = {"size": 448, "tiles": 13}
    key = tensor_key(b"an image", "InternViT", "1", facts)
    row = Row("encoder output", entries=1)
    with tiercache.open(folder, **OPTIONS) as cache:
        tensors = Tensors(cache.core, cache.loop)
        for _ in range(5):
            (found,) = tensors.get([key])
            if isinstance(found, Tensor):
                row.hits += 1
                row.wrong_bytes += int((found.array != image).sum()) + (found.dtype != "bfloat16")
            else:
                row.puts += tensors.put([key], [image], ["bfloat16"]).count(Outcome.HIT)
        others = [
            tensor_key(b"an image", "InternViT", "2", facts),
            tensor_key(b"an image", "InternViT", "1", facts | {"size": 336}),
            tensor_key(b"another", "InternViT", "1", facts),
        ]
        row.strangers = sum(isinstance(each, Tensor) for each in tensors.get(others))
        with cache.lease([key]) as lease:
            lease.buffer(0).array()[1000] ^= 1
        (found,) = tensors.get([key])
        row.poison_found = not isinstance(found, Tensor) or np.array_equal(found.array, image)
    return row


def loras(folder: Path) -> Row:
    """The same tokens under a model and two adapters of it, written at TP 2 and read at TP 1."""
    row = Row("LoRA namespaces")
    layouts = [layout_of("GQA", lora=name) for name in ("", "sql", "poems")]
    truths = [values(layout, seed) for seed, layout in enumerate(layouts)]
    with tiercache.open(folder, **OPTIONS) as cache:
        for layout, truth in zip(layouts, truths, strict=True):
            row.strangers += cache.kv(layout).match(tokens_keys(layout, np.arange(TOKENS))).length
            writer, tally = Engine.of(cache, layout, Shape(2, 1, 32), TOKENS), Tally("GQA")
            keys = writer.stores[0].keys(np.arange(TOKENS))
            writer.save(keys, truth, tally)
            writer.close()
            row.entries += len(keys)
            row.puts += len(keys) - len(tally.faults)
        for layout, truth in zip(layouts, truths, strict=True):
            reader, tally = Engine.of(cache, layout, Shape(1, 1, 16), TOKENS), Tally("GQA")
            keys = reader.stores[0].keys(np.arange(TOKENS))
            reader.load(keys, truth, tally)
            row.hits += tally.blocks - len(tally.faults)
            row.wrong_bytes += tally.mismatch
            poison(cache, keys[0])
            (rank,) = ranks_of(layout, 1, 1, 16, 20)
            outcomes = reader.stores[0].load(keys, rank.planes, rank.table(TOKENS), inline=True).wait(60)
            row.poison_found = outcomes[0] is not Outcome.HIT or not rank.wrong(truth, rank.table(TOKENS), range(16))
            reader.close()
    return row


def all_rows(folder: Path) -> list[Row]:
    """The table."""
    methods = ["zlib", *(["zstd"] if has_zstd() else [])]
    rows = []
    for kind in ("MHA", "GQA", "MQA", "MLA"):
        rows.append(represented(folder / f"{kind} fp8", kind, Fp8))
        for method in methods:
            rows.append(represented(folder / f"{kind} {method}", kind, partial(Packed, method=method)))
    return [*rows, encoder(folder / "encoder"), loras(folder / "lora")]
