"""What other representations of KV blocks free, cost and lose: `python -m bench.represent [--json] [--kv FILE]`.

Blocks come from a decoder with random weights (RMS norms, rotary positions, grouped queries, causal attention, gated
MLPs), run in NumPy over text of the standard library as bytes. **Random weights are not a trained model's**: K and V of
trained ones have large channels and repeated structure that these lack, so the figures say what the distribution of
floating-point numbers gives away, no more. `--kv` takes the real thing: an .npz with `k` and `v`, raw elements
`[layer, head, token, dim]` as unsigned integers, and `dtype`.

Capacity is what counts: blocks are put into a cache with a small SSD tier until it is more than full, and how many it
then has, opened anew, is compared with how many exact ones it has.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt

import tiercache
from bench.common import (
    CACHE_DIR,
    Figure,
    Json,
    arguments,
    emit,
    interleaved,
    median_ratio,
    report,
    say,
    timed,
    versions,
)
from tiercache.errors import ConfigError
from tiercache.kv import float8
from tiercache.kv.chain import tokens_keys
from tiercache.kv.layout import Layout
from tiercache.kv.represent import METHODS, Form, Fp8, Packed, Represented, has_zstd
from tiercache.model import Kind, Outcome

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
LAYERS, HEADS, GROUP, DIM, WIDTH = 8, 4, 4, 128, 1024
"""Of the random decoder: KV heads, queries a KV head, and a small hidden size."""
TOKENS = 512
ROUNDS = 5
SSD_BYTES, SEGMENT_BYTES = 128 << 20, 8 << 20


def text_tokens(count: int) -> npt.NDArray[np.int64]:
    """Bytes of a module of the standard library."""
    return np.frombuffer(Path(os.__file__).read_bytes()[:count], np.uint8).astype(np.int64)


def _norm(x: F32) -> F32:
    out: F32 = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    return out


def _rotated(x: F32) -> F32:
    """Rotary positions in halves, base 500,000; x is [head, token, dim]."""
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[1])[:, None] * 500_000.0 ** (-np.arange(half) / half)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    one, other = x[..., :half], x[..., half:]
    out: F32 = np.concatenate([one * cos - other * sin, other * cos + one * sin], axis=-1)
    return out


def random_kv(count: int, seed: int = 0) -> tuple[F32, F32]:
    """K and V [layer, head, token, dim] of a decoder with random weights."""
    draw = np.random.default_rng(seed)

    def weights(inputs: int, outputs: int) -> F32:
        made: F32 = (draw.standard_normal((inputs, outputs)) / np.sqrt(inputs)).astype(np.float32)
        return made

    x = weights(1, 256 * WIDTH).reshape(256, WIDTH)[text_tokens(count)]
    mask = np.triu(np.full((count, count), -np.inf, np.float32), 1)
    keys, values = [], []
    for _ in range(LAYERS):
        y = _norm(x) * draw.lognormal(0, 0.5, WIDTH).astype(np.float32)
        k = _rotated((y @ weights(WIDTH, HEADS * DIM)).reshape(count, HEADS, DIM).transpose(1, 0, 2))
        v = (y @ weights(WIDTH, HEADS * DIM)).reshape(count, HEADS, DIM).transpose(1, 0, 2)
        q = (y @ weights(WIDTH, GROUP * HEADS * DIM)).reshape(count, GROUP * HEADS, DIM).transpose(1, 0, 2)
        scores = _rotated(q) @ np.repeat(k, GROUP, 0).transpose(0, 2, 1) / np.sqrt(DIM) + mask
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = (scores / scores.sum(axis=-1, keepdims=True)) @ np.repeat(v, GROUP, 0)
        x = x + mixed.transpose(1, 0, 2).reshape(count, -1) @ weights(GROUP * HEADS * DIM, WIDTH)
        y = _norm(x)
        gate = y @ weights(WIDTH, 2 * WIDTH)
        x = x + (gate / (1 + np.exp(-gate)) * (y @ weights(WIDTH, 2 * WIDTH))) @ weights(2 * WIDTH, WIDTH)
        keys.append(k)
        values.append(v)
    return np.stack(keys).astype(np.float32), np.stack(values).astype(np.float32)


def blocks_of(k: npt.NDArray[np.generic], v: npt.NDArray[np.generic], layout: Layout) -> list[U8]:
    """Blocks in stored order of raw K and V [layer, head, token, dim]."""
    step, made = layout.block_tokens, []
    for first in range(0, k.shape[2] - step + 1, step):
        block = np.empty(layout.block_bytes, np.uint8)
        for layer in range(layout.layers):
            for head in range(layout.heads):
                for kv, source in enumerate((k, v)):
                    offset, count = layout.span(layer, head, kv)
                    rows = np.ascontiguousarray(source[layer, head, first : first + step])
                    block[offset : offset + count] = rows.view(np.uint8).ravel()
        made.append(block)
    return made


def forms(layout: Layout) -> dict[str, Form]:
    """What is measured, by name."""
    found: dict[str, Form] = {}
    if layout.dtype in float8.SOURCES:
        found["fp8"] = Fp8(layout)
    for method in METHODS:
        if method != "zstd" or has_zstd():
            found[f"packed_{method}"] = Packed(layout, method)
    return found


def kept_blocks(layout: Layout, blocks: list[U8], form: Form | None) -> int:
    """How many blocks an SSD tier of SSD_BYTES has in the end, exact or in a form, when more come than it holds."""
    CACHE_DIR.mkdir(exist_ok=True)
    size = min(len(form.encode(block)) for block in blocks) if form else layout.block_bytes
    count = int(1.3 * SSD_BYTES / size) + 8
    options = {"memory_bytes": 16 << 20, "ssd_bytes": SSD_BYTES, "segment_bytes": SEGMENT_BYTES, "share": False}
    with tempfile.TemporaryDirectory(dir=CACHE_DIR) as folder:
        # Each block is a chain of its own, so that any of them may leave.
        keys = [tokens_keys(layout, np.full(layout.block_tokens, i))[0] for i in range(count)]
        with tiercache.open(folder, **options) as cache:
            store = Represented(cache.core, cache.loop, form) if form else None
            for i, key in enumerate(keys):
                block = blocks[i % len(blocks)]
                if store:
                    outcomes = store.put([key], [block], durable=True)
                else:
                    work = cache.core.put_chain([key], [block], kind=Kind.KV, durable=True)
                    outcomes = asyncio.run_coroutine_threadsafe(work, cache.loop).result()
                if outcomes != [Outcome.HIT]:
                    raise RuntimeError(f"block {i} was not stored: {outcomes}")
        with tiercache.open(folder, **options) as cache:
            kept = 0
            for key in Represented(cache.core, cache.loop, form).keys(keys) if form else keys:
                with cache.match([key]) as lease:
                    kept += len(lease)
            return kept


def copy_all(sources: list[U8], targets: list[U8]) -> None:
    """Plain copies, beside which decoding is measured."""
    for source, target in zip(sources, targets, strict=True):
        np.copyto(target, source)


def speeds(blocks: list[U8], form: Form, rounds: int) -> dict[str, list[float]]:
    """Seconds of copying, encoding and decoding all blocks, interleaved."""
    values = [np.frombuffer(form.encode(block), np.uint8) for block in blocks]
    outs = [np.empty_like(block) for block in blocks]
    sides = {
        "copy": lambda: timed(lambda: copy_all(blocks, outs)),
        "encode": lambda: timed(lambda: [form.encode(block) for block in blocks]),
        "decode": lambda: timed(lambda: [form.decode(value, out) for value, out in zip(values, outs, strict=True)]),
    }
    return interleaved(sides, rounds)


def measure(layout: Layout, blocks: list[U8], rounds: int) -> list[Figure]:
    """Figures of one layout: capacity freed, speed and loss of every form."""
    total = sum(block.nbytes for block in blocks)
    exact_kept = kept_blocks(layout, blocks, None)
    made = []
    for name, form in forms(layout).items():
        stored = sum(len(form.encode(block)) for block in blocks)
        kept = kept_blocks(layout, blocks, form)
        taken = speeds(blocks, form, rounds)
        raw: dict[str, Json] = {
            "exact_bytes": total, "stored_bytes": stored, "exact_kept": exact_kept, "kept": kept,
            "encode_mb_s": total / median(taken["encode"]) / 1e6, "decode_mb_s": total / median(taken["decode"]) / 1e6,
            "decode_over_copy": median_ratio(taken["decode"], taken["copy"]),
            **{f"seconds_{side}": series for side, series in taken.items()},
        }  # fmt: skip
        if isinstance(form, Fp8):
            losses = [form.loss(block, form.encode(block)) for block in blocks]
            whole = losses[0]
            for loss in losses[1:]:
                whole += loss
            raw |= {"max_abs_error": whole.max_abs, "relative_rms_error": whole.relative_rms}
        note = (
            f"stored/exact {stored / total:.3f}, MB/s: encode {raw['encode_mb_s']:.0f}, decode {raw['decode_mb_s']:.0f}"
        )
        figure = Figure(
            f"{layout.dtype}_{name}_capacity", kept / exact_kept, 1.05, at_most=False, unit="x", raw=raw, note=note
        )
        say(f"{figure.name} {figure.value:.3f} {note}")
        made.append(figure)
    return made


def main() -> None:
    """Prints the report."""
    parser = arguments("What other representations of KV blocks free, cost and lose.")
    parser.add_argument("--kv", type=Path, help="K and V of a real model; see the module")
    options = parser.parse_args()
    rounds = 2 if options.quick else ROUNDS
    figures: list[Figure] = []
    source = "a decoder with random weights: not a trained model's K and V"
    if options.kv:
        with np.load(options.kv) as file:
            raw = {str(file["dtype"]): (file["k"], file["v"])}
        source = "given by --kv"
    else:
        k, v = random_kv(64 if options.quick else TOKENS)
        raw = {dtype: (float8.from_float32(k, dtype), float8.from_float32(v, dtype)) for dtype in float8.SOURCES}
    for dtype, (k_raw, v_raw) in raw.items():
        layers, heads, _, dim = k_raw.shape
        if k_raw.dtype != float8.SOURCES.get(dtype) or k_raw.shape[:3] != v_raw.shape[:3]:
            raise ConfigError(
                f"K is {k_raw.dtype} {k_raw.shape}, V {v_raw.shape}: [layer, head, token, dim] of {dtype}"
            )
        layout = Layout("bench", heads=heads, layers=layers, k_dim=dim, v_dim=v_raw.shape[3], dtype=dtype)
        blocks = blocks_of(k_raw, v_raw, layout)
        figures += measure(layout, blocks, rounds)
        if dtype == "bfloat16":
            figures += measure(*fp8_blocks(layout, blocks), rounds)
    extra: dict[str, Json] = {"source": source, "versions": versions("numpy", "zstandard")}
    emit(report("represent", figures, extra=extra), as_json=options.json)


def fp8_blocks(layout: Layout, blocks: list[U8]) -> tuple[Layout, list[U8]]:
    """The same blocks as an engine that keeps its KV in float8 would hold them: codes alone, its scales elsewhere."""
    codes = [np.frombuffer(Fp8(layout).encode(block), np.uint8)[-(block.nbytes // 2) :].copy() for block in blocks]
    return replace(layout, dtype="float8_e4m3fn"), codes


if __name__ == "__main__":
    main()
