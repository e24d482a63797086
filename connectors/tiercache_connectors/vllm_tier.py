"""TierCacheTier: a secondary tier of vLLM's own tiering framework, behind its CPU tier.

    "secondary_tiers": [{"type": "TierCacheTier", "module_path": "tiercache_connectors.vllm_tier",
                         "directory": "/var/cache/tiercache"}]

It runs in the scheduler's process and sees chunks of the primary tier as opaque bytes. Checked against vLLM 0.32's base
class and with real memory; *not exercised* inside an engine, for vLLM's primary tier needs a GPU.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from vllm.v1.kv_offload.base import LookupResult, Medium, RequestOffloadingContext
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager

from tiercache.errors import TierCacheError
from tiercache.kv.planes import Planes, paged
from tiercache.kv.runs import Table
from tiercache.kv.shard import Shard
from tiercache.model import Outcome
from tiercache_connectors.vllm_offload import HOST_OPTIONS
from tiercache_connectors.vllm_options import Options
from tiercache_connectors.vllm_pages import engine_tag, identify_engine, keys_of, page_layout

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from tiercache.kv.loading import Loading
    from tiercache.kv.saving import Saving

log = logging.getLogger("vllm.tiercache")

Move = tuple[Any, "Saving | Loading"]


class TierCacheTier(SecondaryTierManager):  # type: ignore[misc]
    """See the module."""

    medium: ClassVar[Any] = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: Any = None,
        **tier_config: Any,
    ) -> None:
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        extra = {name: value for name, value in tier_config.items() if name not in HOST_OPTIONS}
        self._options = options = Options.of(extra)
        identity = identify_engine(options)
        self._is_off = bool(identity.reason)
        if self._is_off:
            log.warning("tiercache: nothing is reused: %s", identity.reason)
        self._cache = options.open()
        chunks = np.asarray(primary_kv_view).view(np.uint8).reshape(len(primary_kv_view), -1)
        shape = {**identity.facts, **_shape(offloading_spec.config)}
        layout = page_layout(identity.weights, chunks.shape[1], engine_tag(shape))
        self._store = self._cache.kv(layout, threads=options.threads, verify=options.verify)
        self._planes = Planes(
            layout,
            Shard.whole(layout),
            paged(chunks, "pd", layers=range(1), heads=range(1), dims=range(chunks.shape[1])),
        )
        self._clock = self._cache.core.clock
        self._jobs: dict[int, tuple[float, bool, list[Move]]] = {}

    def lookup(self, key: Any, req_context: Any) -> LookupResult:
        if self._is_off:
            return LookupResult.MISS
        try:
            found = self._store.match(keys_of(self._store, [key])).length
        except TierCacheError:
            return LookupResult.MISS
        return LookupResult.HIT if found else LookupResult.MISS

    def submit_store(self, job_metadata: Any) -> None:
        self._submit(job_metadata, stored=True)

    def submit_load(self, job_metadata: Any) -> None:
        self._submit(job_metadata, stored=False)

    def _submit(self, job: Any, *, stored: bool) -> None:
        names = [] if self._is_off else list(job.keys)
        moves: list[Move] = []
        for name, key, chunk in zip(names, keys_of(self._store, names), job.chunk_ids):
            table = Table(np.array([int(chunk)], dtype=np.int64), 1)
            if stored:
                moves.append((name, self._store.save([key], self._planes, table, durable=self._options.durable)))
            else:
                deadline_s = self._options.load_deadline_s
                moves.append((name, self._store.load([key], self._planes, table, deadline_s=deadline_s)))
        self._jobs[job.job_id] = (self._clock.monotonic(), stored, moves)

    def get_finished_jobs(self) -> Iterable[JobResult]:
        done = [job for job, (_, _, moves) in self._jobs.items() if all(each.done for _, each in moves)]
        return [self._result(job) for job in done]

    def _result(self, job: int) -> JobResult:
        began_s, stored, moves = self._jobs.pop(job)
        good = [name for name, each in moves if all(one is Outcome.HIT for one in each.outcomes)]
        return JobResult(
            job_id=job,
            success=len(good) == len(moves) and not self._is_off,
            successful_keys=None if stored or len(good) == len(moves) else good,
            transfer_time=self._clock.monotonic() - began_s,
            transfer_bytes=sum(each.moved_bytes for _, each in moves),
        )

    def has_pending_work(self) -> bool:
        return bool(self._jobs)

    def touch(self, keys: Collection[Any], req_context: Any) -> None:
        for key in keys_of(self._store, list(keys)):
            self._cache.core.touch_chain([key])

    def on_new_request(self, req_context: Any) -> RequestOffloadingContext:
        return RequestOffloadingContext()

    def drain_jobs(self) -> None:
        for _, _, moves in self._jobs.values():
            for _, each in moves:
                each.wait(max(self._options.fence_s, self._options.load_deadline_s))

    def shutdown(self) -> None:
        self.drain_jobs()
        self._store.close()
        self._cache.close()


def _shape(config: Any) -> dict[str, object]:
    """What decides the bytes of a chunk beside the weights."""
    parallel = config.parallel
    free = parallel.is_parallelism_agnostic or config.replicated_layout
    return {
        "layers": [group.layer_names for group in config.groups],
        "tokens": [group.tokens_per_block for group in config.groups],
        "dtype": config.model.dtype,
        "order": config.kv_cache_layout,
        "chunk": config.cache.blocks_per_chunk,
        "hash": config.cache.tokens_per_hash,
        "canonical": config.canonical_layout,
        "ranks": 1
        if free
        else (parallel.tp_size, parallel.pp_size, parallel.pcp_size, parallel.dcp_size, parallel.rank),
    }
