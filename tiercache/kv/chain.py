"""Keys of blocks: a chain of digests over token ids, or an engine's own block hashes inside our namespace."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

import numpy as np

from tiercache import keys
from tiercache.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from tiercache.kv.layout import Layout

    Tokens = Sequence[int] | npt.NDArray[np.integer]


TOKEN_BYTES = 4


def tokens_keys(
    layout: Layout, tokens: Tokens, *, parent: bytes = b"", extra: Sequence[bytes] | None = None
) -> list[bytes]:
    """Keys of the whole blocks of `tokens`: 16 bytes each (xxh3-128), or 32 (SHA-256) with `collision_resistant`.

    `parent` is the key of the block before the first. `extra` is what else decides a block's bytes (hashes of images in
    it, say), one a block, b"" where nothing does. Token ids are 0 to 2**32 - 1. Raises ConfigError.
    """
    data = _as_bytes(tokens)
    step = layout.block_tokens * TOKEN_BYTES
    stops = range(step, len(data) + 1, step)
    chunks = [data[stop - step : stop] for stop in stops]
    if extra is not None:
        if len(extra) != len(chunks):
            raise ConfigError(f"extra has {len(extra)} items for {len(chunks)} blocks: one for each whole block")
        # What follows the tokens is never empty and never as long as nothing: no extra reads as a block without one.
        chunks = [
            chunk + len(more).to_bytes(8, "little") + more if more else chunk for chunk, more in zip(chunks, extra)
        ]
    width = key_bytes(layout)
    if parent and len(parent) != width:
        raise ConfigError(f"the parent has {len(parent)} bytes, keys of this layout have {width}: use one kind of key")
    return keys.chain(layout.namespace, chunks, parent, collision_resistant=layout.collision_resistant)


def engine_keys(layout: Layout, hashes: Sequence[bytes]) -> list[bytes]:
    """Keys from an engine's own hashes of blocks of `layout.block_tokens` tokens, which cover the tokens before them
    but neither model nor dtype. As wide as those of `tokens_keys`, ordered as a chain, and never equal to them."""
    world = keys.namespace("kv engine", layout.namespace)
    return [
        key for each in hashes for key in keys.chain(world, (each,), collision_resistant=layout.collision_resistant)
    ]


def key_bytes(layout: Layout) -> int:
    """How long the keys of a layout's blocks are."""
    return 32 if layout.collision_resistant else 16


def _as_bytes(tokens: Tokens) -> bytes:
    """Tokens as little-endian unsigned 32-bit integers."""
    if not isinstance(tokens, np.ndarray):
        try:
            tokens = np.frombuffer(array("q", tokens), np.int64) if len(tokens) else np.empty(0, np.int64)
        except (TypeError, OverflowError) as error:
            raise ConfigError(f"tokens are not integers from 0 to 2**32 - 1: {error}") from None
    if tokens.dtype.kind not in "iu" or tokens.ndim != 1:
        raise ConfigError(f"tokens are one row of integers, not {tokens.ndim} axes of {tokens.dtype}")
    if tokens.dtype != np.uint32 and tokens.size and not (int(tokens.min()) >= 0 and int(tokens.max()) < 1 << 32):
        raise ConfigError("token ids are 0 to 2**32 - 1: put hashes of images and the like into `extra`")
    return tokens.astype("<u4", copy=False).tobytes()
