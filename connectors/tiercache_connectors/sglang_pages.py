"""Pages of one layout in the cache under SGLang's own hashes: saved, loaded and counted in batches.

SGLang says with each batch which pages come before it (`hicache_storage_pass_prefix_keys`): pages are blocks of chains
then, found in one look, evicted from their ends. Without it pages are alone: nothing tells where a batch belongs, and
any page may be the first that is asked for. The two never mix, for a chain has no holes. Questions about the start of a
sequence come without predecessors in either case, so both are asked then.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from tiercache.kv.planes import Plane, Planes
from tiercache.kv.runs import Table
from tiercache.kv.shard import Shard
from tiercache.model import Outcome

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt

    from tiercache.kv.layout import Layout
    from tiercache.kv.store import KvStore
    from tiercache.sync import BlockingCache

    Prefix = Sequence[str] | None
    """Hashes of the pages before a batch; None where SGLang does not say."""

WAIT_S = 30.0
"""Longest wait for a batch of pages; SGLang computes what has not come by then."""


class Pages:
    """See the module. Any thread."""

    def __init__(self, cache: BlockingCache, layout: Layout, shard: Shard | None = None) -> None:
        self._shard = Shard.whole(layout) if shard is None else shard
        self._chained = cache.kv(layout, self._shard)
        self._alone = cache.kv(replace(layout, group="alone"), self._shard)

    def close(self) -> None:
        """Ends copies under way."""
        self._chained.close()
        self._alone.close()

    def stored(self, keys: Sequence[str], prefix: Prefix) -> int:
        """How many of these pages from the first on are in any tier, as far as this rank needs them."""
        before = prefix or ()
        chain = self._chained.engine_keys(_hashes([*before, *keys]))
        chained = max(0, self._chained.match(chain, self._shard).length - len(before))
        if prefix is not None or chained == len(keys):
            return chained
        single = self._alone.engine_keys(_hashes(keys))
        missing = (i for i, key in enumerate(single) if not self._alone.match([key], self._shard).length)
        return max(chained, next(missing, len(single)))

    def load(
        self, keys: Sequence[str], prefix: Prefix, planes: Sequence[Plane], page_ids: npt.NDArray[np.int64]
    ) -> list[bool]:
        """Copies pages into the places `page_ids` of the planes; whether each landed."""
        landed = self._load(self._chained, keys, planes, page_ids)
        left = [i for i, there in enumerate(landed) if not there]
        if left and prefix is None:
            more = self._load(self._alone, [keys[i] for i in left], planes, page_ids[left])
            for i, there in zip(left, more):
                landed[i] = there
        return landed

    def _load(
        self, store: KvStore, keys: Sequence[str], planes: Sequence[Plane], page_ids: npt.NDArray[np.int64]
    ) -> list[bool]:
        where = Planes(store.layout, self._shard, planes)
        chain = store.engine_keys(_hashes(keys))
        loading = store.load(chain, where, Table(page_ids, where.page_tokens), layerwise=False, deadline_s=WAIT_S)
        return [outcome is Outcome.HIT for outcome in loading.wait(WAIT_S)]

    def save(
        self, keys: Sequence[str], prefix: Prefix, planes: Sequence[Plane], page_ids: npt.NDArray[np.int64]
    ) -> list[bool]:
        """Copies pages out of the planes; whether each is stored. Nothing reads the planes when this returns."""
        store = self._alone if prefix is None else self._chained
        where = Planes(store.layout, self._shard, planes)
        size = where.page_tokens
        if prefix is not None:
            chain = store.engine_keys(_hashes([*prefix, *keys]))
            # The table begins with this batch: what is before it is stored, and not looked at.
            table = Table(page_ids, size, len(prefix) * store.layout.rows)
            savings = [store.save(chain, where, table, start=len(prefix))]
        else:
            chain = store.engine_keys(_hashes(keys))
            tables = [Table(page_ids[i : i + 1], size) for i in range(len(chain))]
            savings = [store.save([key], where, table) for key, table in zip(chain, tables)]
        outcomes = [outcome for saving in savings for outcome in saving.wait(WAIT_S)]
        for saving in savings:
            if not saving.pages_free(WAIT_S):
                saving.cancel()
        return [outcome is Outcome.HIT for outcome in outcomes]


def _hashes(keys: Sequence[str]) -> list[bytes]:
    """SGLang's hashes of pages as bytes: 64 hex digits, or whatever a later version sends."""
    try:
        return [bytes.fromhex(key) for key in keys]
    except ValueError:
        return [key.encode() for key in keys]
