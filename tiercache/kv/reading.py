"""Reading: any slice of a stored sequence (layers x heads x tokens), over blocks in different tiers, as one array.

An array is an engine's memory of one page, so a read is a load into it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tiercache.errors import ConfigError
from tiercache.kv.loading import Loading
from tiercache.kv.planes import Planes, paged
from tiercache.kv.runs import Table
from tiercache.kv.shard import Shard
from tiercache.kv.stretch import Stretch
from tiercache.model import Outcome

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from tiercache.kv.planes import Plane
    from tiercache.kv.store import KvStore

    Array = npt.NDArray[np.generic]
    Out = Array | Sequence[Array | None]


@dataclass(frozen=True, slots=True)
class Slice:
    """What to read: layers and heads within the layout, tokens (rows, where a block is one row) within the sequence."""

    layers: range
    heads: range
    tokens: range


def read_slice(store: KvStore, keys: Sequence[bytes], wanted: Slice, out: Out, timeout_s: float) -> Outcome:
    """See KvStore.read."""
    layout, tokens = store.layout, wanted.tokens
    if tokens.step != 1 or tokens.start < 0 or tokens.stop > len(keys) * layout.rows:
        raise ConfigError(f"tokens {tokens} are not in a sequence of {len(keys)} blocks of {layout.rows}")
    if not len(tokens) or not len(wanted.layers) or not len(wanted.heads):
        return Outcome.HIT
    planes = Planes(layout, Shard(wanted.layers, wanted.heads), _planes(store, wanted, out))
    if planes.page_tokens != len(tokens):
        raise ConfigError(f"`out` has room for {planes.page_tokens} tokens, not {len(tokens)}")
    if not planes.writable:
        raise ConfigError("`out` is read-only: pass a writable array")
    start, stop = tokens.start // layout.rows, -(-tokens.stop // layout.rows)
    table = Table(np.zeros(1, np.int64), len(tokens), tokens.start)
    stretch = Stretch.of(layout, keys, planes, table, start=start, stop=stop, rows=tokens)
    loading = Loading(store, stretch, layerwise=False, deadline_s=timeout_s, rows=tokens)
    outcomes = loading.begin(inline=True).outcomes
    return next((outcome for outcome in outcomes if outcome is not Outcome.HIT), Outcome.HIT)


def _planes(store: KvStore, wanted: Slice, out: Out) -> list[Plane]:
    """Where K and V of the slice lie in `out`."""
    layout = store.layout
    if isinstance(out, np.ndarray):
        return _both(store, wanted, out)
    arrays = [each for each in out if each is not None]
    if len(arrays) != (2 if layout.v_dim else 1):
        raise ConfigError(f"`out` has {len(arrays)} arrays: pass [K, V], or [K] where the layout has no V")
    planes = []
    for kv, array in enumerate(arrays):
        planes += paged(array, "lhtd", layers=wanted.layers, heads=wanted.heads, kv=kv)
    return planes


def _both(store: KvStore, wanted: Slice, out: Array) -> list[Plane]:
    layout = store.layout
    kinds = 2 if layout.v_dim else 1
    if out.ndim != 5 or out.shape[1] != kinds:
        raise ConfigError(f"`out` has shape {out.shape}: pass out[layer, kv ({kinds}), head, token, dim]")
    if kinds == 2 and layout.k_dim != layout.v_dim:
        raise ConfigError(f"K has {layout.k_dim} dims and V {layout.v_dim}: pass a list of two arrays [K, V]")
    planes = []
    for kv in range(kinds):
        planes += paged(out[:, kv], "lhtd", layers=wanted.layers, heads=wanted.heads, kv=kv)
    return planes
