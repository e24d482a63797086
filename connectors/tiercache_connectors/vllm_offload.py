"""TierCacheOffloadingSpec: vLLM's OffloadingConnector with tiercache as the place where pages go.

    --kv-transfer-config '{"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config":
        {"spec_name": "TierCacheOffloadingSpec", "spec_module_path": "tiercache_connectors.vllm_offload",
         "directory": "/var/cache/tiercache"}}'

vLLM keeps the books (what to store, when, which blocks may be reused), tiercache keeps the bytes as they are. Pages are
found by engines of the same version, model and shape only; for reuse across those, and for adapters, see vllm_v1. For
vLLM 0.32.
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.v1.kv_offload.base import (
    LoadStoreSpec,
    LookupResult,
    OffloadingManager,
    OffloadingSpec,
    OffloadingWorker,
    PrepareStoreOutput,
    RequestOffloadingContext,
    TransferResult,
)

from tiercache.errors import TierCacheError
from tiercache.kv.planes import Planes, paged
from tiercache.kv.runs import Table
from tiercache.model import Outcome
from tiercache_connectors.vllm_options import Options
from tiercache_connectors.vllm_pages import Promises, engine_tag, identify_engine, keys_of, page_layout, rank_shard

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from tiercache.kv.layout import Layout
    from tiercache.kv.loading import Loading
    from tiercache.kv.saving import Saving
    from tiercache.kv.store import KvStore
    from tiercache.sync import BlockingCache

log = logging.getLogger("vllm.tiercache")

HOST_OPTIONS = (
    "blocks_per_chunk",
    "block_size",
    "offload_prompt_only",
    "self_describing_kv_events",
    "canonical_layout",
)
"""What vLLM itself reads from the same table."""


class Pages(LoadStoreSpec):  # type: ignore[misc]
    """Keys of pages, from the scheduler's process to the workers'."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        self.keys = list(keys)


class TierCacheOffloadingSpec(OffloadingSpec):  # type: ignore[misc]
    """See the module."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        extra = {name: value for name, value in config.extra_config.items() if name not in HOST_OPTIONS}
        self._options = Options.of(extra)
        self._identity = identify_engine(self._options)
        self._cache = self._options.open()
        self._books: Books | None = None
        self._worker: Mover | None = None
        if sys.flags.hash_randomization and not _steady_hashes():
            log.warning("this vLLM hashes blocks with a random seed unless PYTHONHASHSEED is set: set it to reuse any")

    def layout(self) -> Layout:
        """Of one group's page as all workers together hold it. The same in every process of the engine."""
        config, parallel = self.config, self.config.parallel
        shape = {
            **self._identity.facts,
            "layers": [group.layer_names for group in config.groups],
            "tokens": [group.tokens_per_block for group in config.groups],
            "dtype": config.model.dtype,
            "order": config.kv_cache_layout,
            "pipeline": parallel.pp_size,
            "hash": config.cache.tokens_per_hash,
        }
        ranks = 1 if config.replicated_layout else parallel.world_size
        return page_layout(self._identity.weights, config.worker_kv_bytes_per_block, engine_tag(shape), ranks)

    def _refusal(self) -> str:
        if len(self.config.groups) != 1:
            return "models with several KV cache groups are for the connector vllm_v1"
        if self.blocks_per_chunk != 1:
            return "blocks_per_chunk > 1 is not supported: pages are found one by one"
        return self._identity.reason

    def get_manager(self) -> OffloadingManager:
        if self._books is None:
            reason = self._refusal()
            if reason:
                log.warning("tiercache: nothing is reused: %s", reason)
            store = None if reason else self._cache.kv(self.layout())
            self._books = Books(self._cache, store)
        return self._books

    def get_worker(self, kv_caches: Any) -> OffloadingWorker:
        if self._worker is None:
            layout, parallel = self.layout(), self.config.parallel
            shard = rank_shard(parallel.rank, parallel.world_size, replicated=self.config.replicated_layout)
            store = self._cache.kv(layout, shard, threads=self._options.threads, verify=self._options.verify)
            self._worker = Mover(store, _planes(layout, shard, kv_caches), self._options)
        return self._worker


def _steady_hashes() -> bool:
    """Whether this vLLM seeds its hashes with a fixed text (0.30 and newer)."""
    import vllm

    return tuple(int(part) for part in vllm.__version__.split(".")[:2] if part.isdigit()) >= (0, 30)


def _planes(layout: Layout, shard: Any, kv_caches: Any) -> Planes:
    """A page is the bytes of all its tensors, one behind the other. ConfigError where that is not a whole page."""
    planes, at = [], 0
    for ref in kv_caches.group_data_refs[0]:
        tensor = kv_caches.tensors[ref.tensor_idx].tensor
        flat = tensor.reshape(tensor.shape[0], -1) if tensor.is_contiguous() else tensor
        dims = range(at, at + ref.page_size_bytes)
        planes += paged(flat[:, : len(dims)], "pd", layers=range(1), heads=shard.heads, dims=dims)
        at = dims.stop
    return Planes(layout, shard, planes)


class Books(OffloadingManager):  # type: ignore[misc]
    """The scheduler's side: what is stored, and what is promised to vLLM."""

    def __init__(self, cache: BlockingCache, store: KvStore | None) -> None:
        """Without a store nothing is found and nothing is taken."""
        self._store = store
        self._promises = Promises(cache, store) if store is not None else None
        self._cache = cache
        self._storing: set[bytes] = set()

    def lookup(self, key: Any, req_context: Any) -> LookupResult:
        if self._store is None or self._promises is None:
            return LookupResult.MISS
        if bytes(key) in self._storing:
            return LookupResult.HIT_PENDING
        found = self._promises.ask(keys_of(self._store, [key])[0], req_context.req_id)
        return LookupResult.RETRY if found is None else LookupResult.HIT if found else LookupResult.MISS

    def prepare_load(self, keys: Collection[Any], req_context: Any) -> LoadStoreSpec:
        assert self._store is not None and self._promises is not None
        ours = keys_of(self._store, list(keys))
        self._promises.begin(ours)
        return Pages(ours)

    def complete_load(self, keys: Collection[Any], req_context: Any) -> None:
        if self._store is not None and self._promises is not None:
            self._promises.end(keys_of(self._store, list(keys)))

    def prepare_store(self, keys: Collection[Any], req_context: Any) -> PrepareStoreOutput | None:
        if self._store is None:
            return None
        try:
            new = [key for key in keys if bytes(key) not in self._storing and not self._is_stored(key)]
        except TierCacheError:
            return None
        self._storing.update(bytes(key) for key in new)
        return PrepareStoreOutput(keys_to_store=new, store_spec=Pages(keys_of(self._store, new)), evicted_keys=[])

    def _is_stored(self, key: Any) -> bool:
        assert self._store is not None
        return bool(self._store.match(keys_of(self._store, [key])).length)

    def complete_store(self, keys: Collection[Any], req_context: Any, success: bool = True) -> None:
        self._storing.difference_update(bytes(key) for key in keys)

    def touch(self, keys: Collection[Any], req_context: Any) -> None:
        if self._store is not None:
            for key in keys_of(self._store, list(keys)):  # each is a chain of its own
                self._cache.core.touch_chain([key])

    def on_new_request(self, req_context: Any) -> RequestOffloadingContext:
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: Any) -> None:
        if self._promises is not None:
            self._promises.forget(req_context.req_id)

    def has_pending_work(self) -> bool:
        return False

    def shutdown(self) -> None:
        if self._promises is not None:
            self._promises.close()
        if self._store is not None:
            self._store.close()
            self._store = self._promises = None
        self._cache.close()


class Mover(OffloadingWorker):  # type: ignore[misc]
    """The worker's side: one KvStore operation a page, many at once."""

    def __init__(self, store: KvStore, planes: Planes, options: Options) -> None:
        self._store, self._planes, self._options = store, planes, options
        self._clock = store.core.clock
        self._jobs: dict[int, tuple[float, bool, list[Saving | Loading]]] = {}

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        saves: list[Saving | Loading] = []
        for key, page in zip(dst_spec.keys, src_spec.block_ids):
            saves.append(self._store.save([key], self._planes, self._table(page), durable=self._options.durable))
        self._jobs[job_id] = (self._clock.monotonic(), True, saves)
        return True

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any, expedited: bool = False) -> bool:
        loads: list[Saving | Loading] = []
        for key, page in zip(src_spec.keys, dst_spec.block_ids):
            deadline_s = self._options.load_deadline_s
            loads.append(self._store.load([key], self._planes, self._table(page), deadline_s=deadline_s))
        self._jobs[job_id] = (self._clock.monotonic(), False, loads)
        return True

    def _table(self, page: Any) -> Table:
        return Table(np.array([int(page)], dtype=np.int64), 1)

    def get_finished(self) -> list[TransferResult]:
        done = [job for job, (_, _, moves) in self._jobs.items() if all(each.done for each in moves)]
        return [self._result(job) for job in done]

    def _result(self, job: int) -> TransferResult:
        """A store that did not come about is no fault: it is a miss later. A load that did not is one."""
        began_s, stored, moves = self._jobs.pop(job)
        good = stored or all(outcome is Outcome.HIT for each in moves for outcome in each.outcomes)
        size = sum(each.moved_bytes for each in moves)
        if not good:
            log.error("a page that was promised could not be loaded: vLLM has no way to go on without it")
        return TransferResult(job, good, transfer_size=size, transfer_time=self._clock.monotonic() - began_s)

    def wait(self, job_ids: set[int]) -> None:
        for job in job_ids & self._jobs.keys():
            for each in self._jobs[job][2]:
                each.wait(self._options.fence_s)

    def shutdown(self) -> None:
        self.wait(set(self._jobs))
        self._store.close()
