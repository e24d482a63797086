"""What bench.kv moves: shapes of real models, and the orders in which engines keep them; for every side alike.

Orders are named as vLLM names them: L layer, B page, H head, N slot of a page, C the dims of K and then V, so that one
piece of memory in a row is K, or V, of one token and head: 256 bytes. With K in the name, K of all slots comes before V
(CPU_ATTN): pieces are as long as a block's tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

BYTES = 128 << 20
"""About so much is moved at a time: more than the processor's caches hold."""
PAGE_TOKENS = 16


@dataclass(frozen=True)
class Shape:
    """A model's KV: `itemsize` bytes an element, blocks of `block_tokens`."""

    name: str
    layers: int
    heads: int
    dim: int
    dtype: str
    itemsize: int
    block_tokens: int = PAGE_TOKENS

    @property
    def token_bytes(self) -> int:
        """K and V of a token."""
        return 2 * self.layers * self.heads * self.dim * self.itemsize

    @property
    def block_bytes(self) -> int:
        """K and V of a block."""
        return self.token_bytes * self.block_tokens

    def blocks(self, total_bytes: int = BYTES) -> int:
        """Blocks in about so many bytes, a multiple of 16: LMCache's chunks are 256 tokens."""
        return max(16, total_bytes // self.block_bytes // 16 * 16)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("step3", 61, 1, 256, "float8_e4m3fn", 1),
        Shape("llama_8b", 32, 8, 128, "bfloat16", 2),
        Shape("qwen3_32b", 64, 8, 128, "bfloat16", 2),
        Shape("llama_8b_128", 32, 8, 128, "bfloat16", 2, 128),
    )
}
"""Step-3 (MFA), Llama-3 8B, Qwen3 32B; and Llama in blocks and pages of 128 tokens, for pieces of 32 KiB."""

ORDERS = {"LBHNC": "lphtC", "LBNHC": "lpthC", "BLHNC": "plhtC", "LBHKNC": "lphktd"}
"""Axes of each order as kv.planes.paged names them."""

CASES = [(shape, order) for shape in ("step3", "llama_8b", "qwen3_32b") for order in ("LBHNC", "LBNHC", "BLHNC")] + [
    ("llama_8b", "LBHKNC"),
    ("llama_8b_128", "LBHKNC"),
]
"""Every shape in every order of vLLM's GPU builds; then pieces of 4 KiB and of 32 KiB."""


def array_shape(shape: Shape, order: str, pages: int) -> tuple[int, ...]:
    """Lengths of the axes of the engine's memory, the last one in bytes."""
    wide = shape.dim * shape.itemsize
    lengths = {"l": shape.layers, "p": pages, "h": shape.heads, "t": shape.block_tokens, "k": 2, "d": wide}
    lengths["C"] = 2 * wide
    return tuple(lengths[axis] for axis in ORDERS[order])
