"""Moves KV between the memory of an engine (planes) and stored blocks: batched strided copies with the GIL released.

Verified variants hash a tile while it is in the second-level cache. Block b of a sequence is its rows
[b * layout.rows, (b + 1) * layout.rows): tokens, or one row a block for states and opaque pages.
`parts` is a map for all blocks, or one map a block; None: all that the planes hold as whole parts (gather), or touch
(scatter). All are for any thread; ConfigError where tables, spans or buffers do not fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt

    from tiercache.buffers import Buffer
    from tiercache.kv.planes import Planes

    Parts = int | Sequence[int] | None
    Pieces = Sequence[tuple[int, int]]


@dataclass(frozen=True, eq=False)
class Table:
    """Where a sequence's rows lie: row r, from `first_token` on, is slot (r - first_token) % page_tokens of page
    `page_ids[(r - first_token) // page_tokens]`. Any page size serves any block size."""

    page_ids: npt.NDArray[np.int64]
    page_tokens: int
    first_token: int = 0


class Digests(NamedTuple):
    """xxh3-64 of what a block's parts and pieces hold."""

    row: bytes
    """As model.Payload.digests: 8 bytes a part of the layout, zero where it was not asked for."""
    pieces: tuple[int, ...]
    """One for each of the pieces asked for, in their order."""


def gather(
    planes: Planes,
    table: Table,
    blocks: Sequence[int],
    targets: Sequence[Buffer],
    *,
    parts: Parts = None,
    pieces: Pieces = (),
) -> None:
    """Copies parts and pieces (byte ranges that the planes hold) of these blocks out of the engine's memory to their
    places in `targets`, which span whole blocks. The rest of the targets is left alone."""
    raise NotImplementedError("soon")


def gather_digested(
    planes: Planes,
    table: Table,
    blocks: Sequence[int],
    targets: Sequence[Buffer],
    *,
    parts: Parts = None,
    pieces: Pieces = (),
) -> list[Digests]:
    """As `gather`, and the digests of what was written, one a block."""
    raise NotImplementedError("soon")


def digests_of(
    planes: Planes, table: Table, blocks: Sequence[int], *, parts: Parts = None, pieces: Pieces = ()
) -> list[Digests]:
    """What `gather_digested` would answer, without storing anything: what replicas compare."""
    raise NotImplementedError("soon")


def scatter(
    planes: Planes,
    table: Table,
    blocks: Sequence[int],
    sources: Sequence[Buffer],
    *,
    parts: Parts = None,
    tokens: range | None = None,
) -> None:
    """Copies what the planes hold of these parts of stored blocks into the engine's memory. `sources` span whole blocks;
    `tokens` (rows of the sequence) limits what is written, so that a load may begin or end inside a block."""
    raise NotImplementedError("soon")


def scatter_verified(
    planes: Planes,
    table: Table,
    blocks: Sequence[int],
    sources: Sequence[Buffer],
    digests: Sequence[bytes],
    *,
    parts: Parts = None,
    tokens: range | None = None,
) -> list[bool]:
    """As `scatter`, and says of each block whether every part had its digest (`digests`: rows as in Payload). What is
    hashed is what is written. After False the engine's memory for that block is undefined."""
    raise NotImplementedError("soon")
