"""Keys of blocks: a chain of digests over token ids, or an engine's own block hashes inside our namespace."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt

    from tiercache.kv.layout import Layout

    Tokens = Sequence[int] | npt.NDArray[np.integer]


def tokens_keys(
    layout: Layout, tokens: Tokens, *, parent: bytes = b"", extra: Sequence[bytes] | None = None
) -> list[bytes]:
    """Keys of the whole blocks of `tokens`: 16 bytes each (xxh3-128), or 32 (SHA-256) with `collision_resistant`.

    `parent` is the key of the block before the first. `extra` is what else decides a block's bytes (hashes of images in
    it, a prompt's adapter), one a block. Token ids are 0 to 2**32 - 1; raises ConfigError.
    """
    raise NotImplementedError("soon")


def engine_keys(layout: Layout, hashes: Sequence[bytes]) -> list[bytes]:
    """Keys from an engine's own hashes of blocks of `layout.block_tokens` tokens, which cover the tokens before them but
    neither model nor dtype. As wide as those of `tokens_keys`, ordered as a chain, and never equal to them."""
    raise NotImplementedError("soon")
