"""TierCacheHiCache: tiercache as the storage behind SGLang's hierarchical cache (the "dynamic" backend of HiCache).

    --enable-hierarchical-cache --hicache-storage-backend dynamic --hicache-storage-backend-extra-config '{
        "backend_name": "tiercache", "module_path": "tiercache_connectors.sglang_hicache",
        "class_name": "TierCacheHiCache", "interface_v1": 1, "hicache_storage_pass_prefix_keys": true,
        "directory": "/nvme/tiercache"}'

With `interface_v1` pages are copied straight between SGLang's host pool and the cache's memory, in the canonical form
where the pool is understood (sglang_pools): engines of any parallelism and page layout share them. Without it SGLang
hands over flat copies of pages, which ranks of the same set-up find again. SGLang's own hashes of pages (they cover
tokens, LoRA and salt) become keys inside a namespace of weights, dtype and layout, which they do not cover. Nothing is
reused of a model with a "longrope": SGLang turns its keys by the longest request of a batch (sglang_rope). Which model
it is, SGLang's runtime says: `model_name` of the storage's configuration may be whatever name the model is served by.

Further settings in the extra configuration: `model` and `revision` (what the weights are, instead of a digest of them),
`salt` (a tenant's), `settings` (of the cache, see tiercache.settings).
"""

from __future__ import annotations

import logging
import sys
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, PoolHitPolicy, PoolName, PoolTransferResult

import tiercache
from tiercache.clock import system_random
from tiercache.errors import TierCacheError
from tiercache.kv.planes import paged
from tiercache_connectors.sglang_pages import Pages
from tiercache_connectors.sglang_pools import Canonical, canonical, opaque
from tiercache_connectors.sglang_rope import unsteady
from tiercache_connectors.weights import Weights, configuration_file, identify

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from collections.abc import Set as AbstractSet

    import numpy.typing as npt

    from tiercache.kv.planes import Plane
    from tiercache_connectors.sglang_pages import Prefix

    Rows = npt.NDArray[np.uint8]

logger = logging.getLogger(__name__)


class TierCacheHiCache(HiCacheStorage):  # type: ignore[misc]
    """See the module. SGLang asks from its prefetch and backup threads; what fails is a miss, said once in the log."""

    def __init__(self, storage_config: Any, kwargs: Any = None) -> None:
        """As SGLang's factory calls it. Raises ConfigError where the weights cannot be identified: say `model` then."""
        extra = dict(storage_config.extra_config or {})
        self._config, self._salt = storage_config, str(extra.get("salt", ""))
        self._canonical_wanted = bool(extra.get("interface_v1", 0))
        args = _server_args()
        path, loaded = _model_path(), getattr(args, "revision", None) or ""
        self._refusal = unsteady(path, loaded, args)
        file = configuration_file(path, loaded)
        self._home = str(file.parent) if file else ""
        self._weights = self._identity(extra, path, extra.get("revision", "") or loaded, _changes(args))
        self._cache = tiercache.open(extra.get("directory"), **extra.get("settings", {}))
        self._pools: dict[str, Any] = {}
        self._canonical: dict[str, tuple[Pages, list[Plane]]] = {}
        self._flat: dict[tuple[str, int], Pages] = {}
        self._said: dict[str, None] = {}
        self._lock = threading.Lock()
        if self._refusal:
            self._say(f"nothing is reused: {self._refusal}")

    def _identity(self, extra: dict[str, Any], path: str, revision: str, changes: str) -> Weights:
        if self._refusal:
            return Weights("")  # which nobody asks for
        told = Weights(extra["model"], extra.get("revision", "")) if extra.get("model") else identify(path, revision)
        return told._replace(revision=f"{told.revision}+{changes}") if changes else told

    def close(self) -> None:
        """Ends copies under way and leaves the cache. SGLang calls it when the backend is detached."""
        self._forget()
        self._cache.close()

    def _forget(self) -> None:
        with self._lock:
            pages = [*self._flat.values(), *(each for each, _ in self._canonical.values())]
            self._flat, self._canonical = {}, {}
        for each in pages:
            each.close()

    # -- pools ---------------------------------------------------------------------------------------------------------

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """The pool of keys and values, which `batch_get_v1` and `batch_set_v1` are about."""
        super().register_mem_pool_host(mem_pool_host)
        self._register(PoolName.KV.value, mem_pool_host)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """A pool of a hybrid model, which `batch_get_v2` and `batch_set_v2` call by name."""
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        self._register(str(host_pool_name), host_pool)

    def _register(self, name: str, pool: Any) -> None:
        if self._pools.get(name) is pool:
            return
        self._pools[name] = pool
        if self._refusal or name != PoolName.KV.value or not self._canonical_wanted:
            return
        try:
            found = canonical(pool, self._config, self._weights, self._salt, self._home)
            if isinstance(found, Canonical):
                self._canonical[name] = (Pages(self._cache, found.layout, found.shard), list(found.planes))
                return
            reason = found
        except TierCacheError as fault:
            reason = str(fault)
        self._say(f"pages of the pool {name} are stored as they are, for engines of this very set-up: {reason}")

    # -- the copying interface -----------------------------------------------------------------------------------------

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Any:
        """One page into the flat tensor `target_location`, which is returned; None where it is not stored."""
        return self.batch_get([key], [target_location])[0]

    def batch_get(self, keys: list[str], target_locations: Any = None, target_sizes: Any = None) -> list[Any]:
        """Pages into flat tensors of one size; None for each that is not stored."""
        targets = list(target_locations or [])
        if not keys or len(targets) != len(keys) or any(each is None for each in targets):
            return [None] * len(keys)
        rows = np.empty((len(keys), _nbytes(targets[0])), np.uint8)
        found = self._load_rows(PoolName.KV.value, keys, rows)
        for i, hit in enumerate(found):
            if hit:
                _bytes_of(targets[i]).copy_(torch.from_numpy(rows[i]))
        return [target if hit else None for target, hit in zip(targets, found)]

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        """Stores one page, a flat tensor."""
        return self.batch_set([key], [value])

    def batch_set(
        self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        """Stores pages, flat tensors of one size. Whether all of them are stored now."""
        values = list(values or [])
        if len(values) != len(keys) or any(each is None for each in values):
            return False
        if not keys:
            return True
        rows = np.stack([_bytes_of(each).numpy() for each in values])
        return all(self._save_rows(PoolName.KV.value, keys, rows))

    def exists(self, key: str) -> bool:
        """Whether a page is stored in any tier."""
        return self.batch_exists([key]) == 1

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        """How many pages from the first on are stored."""
        return self._stored(PoolName.KV.value, keys, _prefix(extra_info))

    # -- without copies of SGLang's own --------------------------------------------------------------------------------

    def batch_get_v1(self, keys: list[str], host_indices: Any, extra_info: Any = None) -> list[bool]:
        """Pages into the host pool, at the slots `host_indices` (`page_size` of them a page); whether each arrived."""
        return self._get_pages(PoolName.KV.value, keys, host_indices, _prefix(extra_info))

    def batch_set_v1(self, keys: list[str], host_indices: Any, extra_info: Any = None) -> list[bool]:
        """Stores pages from the host pool; whether each is stored now."""
        return self._set_pages(PoolName.KV.value, keys, host_indices, _prefix(extra_info))

    def batch_get_v2(self, transfers: list[Any], extra_info: Any = None) -> dict[str, list[bool]]:
        """As `batch_get_v1`, of several pools."""
        prefix = _prefix(extra_info)
        return {x.name: self._get_pages(str(x.name), x.keys or [], x.host_indices, prefix) for x in transfers}

    def batch_set_v2(self, transfers: list[Any], extra_info: Any = None) -> dict[str, list[bool]]:
        """As `batch_set_v1`, of several pools."""
        prefix = _prefix(extra_info)
        return {x.name: self._set_pages(str(x.name), x.keys or [], x.host_indices, prefix) for x in transfers}

    def batch_exists_v2(self, keys: list[str], pool_transfers: Any = None, extra_info: Any = None) -> Any:
        """The longest prefix that every pool can restore by its policy, and all prefixes that can be."""
        pages = self._stored(PoolName.KV.value, keys, _prefix(extra_info))
        hits: dict[str, int] = {PoolName.KV.value: pages} if pages else {}
        restorable = list(range(1, pages + 1))
        for transfer in pool_transfers or []:
            if not restorable:
                break
            able, verdict = self._restorable(transfer, keys, pages)
            if verdict:
                hits[transfer.name] = verdict
            restorable = [each for each in restorable if each in able]
        return PoolTransferResult(restorable[-1] if restorable else 0, hits, restorable)

    def _restorable(self, transfer: Any, keys: list[str], pages: int) -> tuple[AbstractSet[int], int]:
        """Prefixes (in pages) that a pool of a hybrid model allows, and what to report of it."""
        name, anything = str(transfer.name), range(1, pages + 1)
        if transfer.hit_policy == PoolHitPolicy.ALL_PAGES:
            stored = self._stored(name, keys[:pages])
            return set(range(1, stored + 1)), stored
        if transfer.hit_policy == PoolHitPolicy.TRAILING_PAGES:
            there = [self._stored(name, [key]) == 1 for key in keys[:pages]]
            window = max(1, len(transfer.keys or ()))
            able = {n for n in anything if all(there[max(0, n - window) : n])}
            return able, max(able, default=0)
        # Another form of pages that are there anyway (BLOCK_GROUPS): it gates nothing, and we report none.
        return set(anything), 0

    def clear(self) -> None:
        """Nothing that was stored before is found by this process again. The entries age; others may still use them."""
        self._salt = f"{self._salt}/cleared-{system_random().getrandbits(128):x}"
        self._forget()
        pools, self._pools = self._pools, {}
        for name, pool in pools.items():
            self._register(name, pool)

    # -- pages ---------------------------------------------------------------------------------------------------------

    def _get_pages(self, name: str, keys: Sequence[str], host_indices: Any, prefix: Prefix) -> list[bool]:
        pool = self._pool(name, keys, host_indices)
        if pool is None:
            return [False] * len(keys)
        size = pool.page_size or 1
        if name in self._canonical:
            pages, planes = self._canonical[name]
            ids = _page_ids(host_indices, size)
            return self._tried(len(keys), lambda: pages.load(keys, prefix, planes, ids))
        pattern = pool.get_dummy_flat_data_page()
        rows = np.empty((len(keys), _nbytes(pattern)), np.uint8)
        found = self._load_rows(name, keys, rows)
        for i, hit in enumerate(found):
            if hit:
                pool.set_from_flat_data_page(int(host_indices[i * size]), torch.from_numpy(rows[i]).view(pattern.dtype))
        return found

    def _set_pages(self, name: str, keys: Sequence[str], host_indices: Any, prefix: Prefix) -> list[bool]:
        pool = self._pool(name, keys, host_indices)
        if pool is None:
            return [False] * len(keys)
        size = pool.page_size or 1
        if name in self._canonical:
            pages, planes = self._canonical[name]
            ids = _page_ids(host_indices, size)
            return self._tried(len(keys), lambda: pages.save(keys, prefix, planes, ids))
        flat = [_bytes_of(pool.get_data_page(int(host_indices[i * size]), flat=True)) for i in range(len(keys))]
        return self._save_rows(name, keys, np.stack([each.numpy() for each in flat]))

    def _pool(self, name: str, keys: Sequence[str], host_indices: Any) -> Any:
        """The pool, where it is known and each key has its slots; else None."""
        pool = self._pools.get(name)
        if pool is None or host_indices is None or host_indices.numel() != len(keys) * (pool.page_size or 1):
            self._say(f"pages of the pool {name} came with the wrong number of slots, or before the pool")
            return None
        return pool if keys else None

    def _stored(self, name: str, keys: Sequence[str], prefix: Prefix = None) -> int:
        """How many of these pages from the first on are stored. Flat pages are stored alone."""
        if not keys or self._refusal or (name not in self._canonical and name not in self._pools):
            return 0
        try:
            if name in self._canonical:
                return self._canonical[name][0].stored(keys, prefix)
            return self._flat_pages(name, _nbytes(self._pools[name].get_dummy_flat_data_page())).stored(keys, None)
        except TierCacheError as fault:
            self._say(str(fault))
            return 0

    def _flat_pages(self, name: str, nbytes: int) -> Pages:
        """Pages of a pool that are kept as they are."""
        with self._lock:
            if (name, nbytes) not in self._flat:
                layout = opaque(name, nbytes, self._pools.get(name), self._config, self._weights, self._salt)
                self._flat[name, nbytes] = Pages(self._cache, layout)
            return self._flat[name, nbytes]

    def _load_rows(self, name: str, keys: Sequence[str], rows: Rows) -> list[bool]:
        return self._tried(
            len(keys),
            lambda: self._flat_pages(name, rows.shape[1]).load(keys, None, _row_planes(rows), np.arange(len(rows))),
        )

    def _save_rows(self, name: str, keys: Sequence[str], rows: Rows) -> list[bool]:
        return self._tried(
            len(keys),
            lambda: self._flat_pages(name, rows.shape[1]).save(keys, None, _row_planes(rows), np.arange(len(rows))),
        )

    def _tried(self, count: int, work: Callable[[], list[bool]]) -> list[bool]:
        if self._refusal:
            return [False] * count
        try:
            return work()
        except TierCacheError as fault:
            self._say(str(fault))
            return [False] * count

    def _say(self, line: str) -> None:
        """One line of its kind, ever."""
        if line not in self._said:
            self._said[line] = None
            logger.warning("tiercache: %s", line)


def _server_args() -> Any:
    """What this SGLang was told when it was started; None outside of an engine."""
    runtime = sys.modules.get("sglang.srt.runtime_context")
    try:
        return runtime.get_server_args() if runtime is not None else None
    except (AttributeError, RuntimeError, ValueError):  # a version without, or not told yet
        return None


def _model_path() -> str:
    """The name or directory that this SGLang loads its model from; empty where nobody says. What it made of its
    arguments comes first: a name may have become a directory (of another hub than Hugging Face's, say)."""
    runtime = sys.modules.get("sglang.srt.runtime_context")
    for told in ("get_model", "get_server_args"):
        try:
            path = getattr(runtime, told)().model_path
        except (AttributeError, RuntimeError, ValueError):
            continue
        return str(path or "")
    return ""


def _changes(args: Any) -> str:
    """What it was told to make of the weights; empty where that is nothing."""
    overrides = getattr(args, "json_model_override_args", None) or "{}"
    load_format = getattr(args, "load_format", "")
    changes = [
        "" if overrides == "{}" else xxhash.xxh3_128_hexdigest(overrides.encode()),
        getattr(args, "quantization", None) or "",
        load_format if load_format == "dummy" else "",
    ]
    return "+".join(each for each in changes if each)


def _prefix(extra_info: Any) -> Prefix:
    """Hashes of the pages before a batch, where SGLang says them."""
    prefix: Prefix = getattr(extra_info, "prefix_keys", None)
    return prefix


def _nbytes(tensor: Any) -> int:
    return int(tensor.numel() * tensor.element_size())


def _bytes_of(tensor: Any) -> Any:
    """A tensor's bytes as a flat tensor of them; the same memory where that is contiguous."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def _page_ids(host_indices: Any, page_size: int) -> npt.NDArray[np.int64]:
    """Pages of the pool from slots: the first slot of each page tells."""
    slots: npt.NDArray[np.int64] = host_indices[::page_size].to("cpu", torch.int64).numpy()
    return slots // page_size


def _row_planes(rows: Rows) -> list[Plane]:
    return paged(rows, "pd", layers=range(1), heads=range(1), kv=0)
