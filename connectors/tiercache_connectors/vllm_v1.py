"""TierCacheConnector: vLLM's prefix cache beyond its own memory, shared by engines of any shape, across restarts.

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "TierCacheConnector", "kv_role": "kv_both",
        "kv_connector_module_path": "tiercache_connectors.vllm_v1", "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"directory": "/var/cache/tiercache"}}'

For vLLM 0.28 to 0.32 (KVConnectorBase_V1 with three arguments). One class plays two roles, in different processes as a
rule: the scheduler's half asks what is stored (vllm_scheduler), the worker's half moves it (vllm_worker); what the two
have told each other is a table (vllm_table). Where the model or its memory is not understood nothing is reused, and one
line of the log says why.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)

from tiercache.errors import TierCacheError
from tiercache_connectors.vllm_layout import Groups, Unusable, read_groups
from tiercache_connectors.vllm_metrics import TierCacheProm, TierCacheStats
from tiercache_connectors.vllm_options import LoadMode, Options
from tiercache_connectors.vllm_scheduler import Event, Scheduler
from tiercache_connectors.vllm_worker import Worker, open_worker

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from tiercache.sync import BlockingCache
    from tiercache_connectors.vllm_table import Step

log = logging.getLogger("vllm.tiercache")
"""Under vLLM's own logger, so that its level and format hold."""

MEDIUM = "CPU"
"""vLLM's word for host memory, where what was stored lies first."""


@dataclass
class Orders(KVConnectorMetadata):  # type: ignore[misc]
    """From the scheduler to the workers, once a step."""

    step: Step | None = None


@dataclass
class Told(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """From the workers to the scheduler, once a step. Ranks are numbered over tensor and pipeline parallelism."""

    proven: int = 0
    stored: dict[int, dict[str, int]] = field(default_factory=dict)
    loads: dict[str, float] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        assert isinstance(other, Told)
        loads = {name: max(self.loads.get(name, 0), other.loads.get(name, 0)) for name in self.loads | other.loads}
        return Told(min(self.proven, other.proven), {**self.stored, **other.stored}, loads)


@dataclass
class Proven(KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """From each worker to the scheduler, once: why it cannot reuse anything, or nothing."""

    reason: str = ""


class TierCacheConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """See the module; every method is documented in vLLM's base class."""

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any = None) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._options = Options.of(vllm_config.kv_transfer_config.kv_connector_extra_config or {})
        self._groups: Groups | None = None
        self._cache: BlockingCache | None = None
        self._scheduler: Scheduler | None = None
        self._worker: Worker | None = None
        self._reason = ""
        self._ready = False
        try:
            self._groups = read_groups(vllm_config, kv_cache_config, self._options)
            self._cache = self._options.open()
            if role is KVConnectorRole.SCHEDULER:
                self._scheduler = self._open_scheduler(self._groups, self._cache)
        except (Unusable, TierCacheError, OSError) as error:
            self._off(str(error))
        if role is KVConnectorRole.SCHEDULER:
            self._warn(vllm_config)

    def _open_scheduler(self, groups: Groups, cache: BlockingCache) -> Scheduler:
        stores = [cache.kv(layout) for layout in groups.layouts]
        told = getattr(self._kv_cache_config, "hash_block_size", None)
        hash_tokens = told or getattr(self._vllm_config.cache_config, "hash_block_size", None)
        return Scheduler(groups, stores, self._options, hash_tokens or groups.groups[0].page_tokens)

    def _warn(self, config: Any) -> None:
        policy = getattr(config.kv_transfer_config, "kv_load_failure_policy", "recompute")
        if policy != "recompute":
            log.warning(
                'kv_load_failure_policy is "%s": a block that cannot be loaded ends its request with an error. Set it '
                'to "recompute", so that the block is computed instead',
                policy,
            )

    def _off(self, reason: str) -> None:
        """Reuse ends here, with one line."""
        self._ready, self._reason = False, reason
        log.warning("tiercache: nothing is reused: %s", reason)
        for half in (self._scheduler, self._worker):
            if half is not None:
                half.close()
        self._scheduler = self._worker = None
        if self._cache is not None:
            self._cache.close()
            self._cache = None

    # -- worker

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        if self._groups is None or self._cache is None or not kv_caches:
            return
        try:
            self._worker = open_worker(self._groups, self._options, self._vllm_config, kv_caches, self._cache)
            self._ready = True
        except Unusable as error:
            self._off(str(error))

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        return Proven("" if self._worker is not None else self._reason or "no KV memory was registered")

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        if self._worker is not None and kv_connector_metadata.step is not None:
            self._worker.take(kv_connector_metadata.step)

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        super().bind_connector_metadata(connector_metadata)
        self.handle_preemptions(connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if self._worker is not None:
            self._worker.load()

    def wait_for_layer_load(self, layer_name: str) -> None:
        if self._worker is not None:
            self._worker.wait_layer(layer_name)

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Blocks are saved as a whole when the forward pass is over."""

    def wait_for_save(self) -> None:
        if self._worker is not None:
            self._worker.save()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        if self._worker is None:
            return None, None
        sent, received, _ = self._worker.finished()
        return sent or None, received or None

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults

        sent, received, failed = self._worker.finished() if self._worker is not None else (set(), set(), set())
        several = self._groups is not None and self._groups.engine_groups > 1
        return KVConnectorTransferResults(sent, received, failed if several else set())

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.bad_pages() if self._worker is not None else set()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        if self._worker is None:
            return None
        report = self._worker.report()
        return Told(report.proven, {self._rank(): report.stored} if report.stored else {}, report.loads)

    def _rank(self) -> int:
        return int(getattr(self._vllm_config.parallel_config, "rank", 0))

    # -- scheduler

    def set_xfer_handshake_metadata_pp_aware(self, metadata: Mapping[tuple[int, int], Any]) -> None:
        reasons = sorted({each.reason for each in metadata.values() if each.reason})
        if reasons and self._scheduler is not None:
            self._off(reasons[0])
        self._ready = self._scheduler is not None and bool(metadata)

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        if self._scheduler is not None:
            self._scheduler.bind(gpu_block_pool)

    def on_new_request(self, request: Any) -> None:
        if self._ready and self._scheduler is not None:
            self._scheduler.begin(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        if self._scheduler is None:
            return 0, False
        return self._scheduler.match(request, num_computed_tokens)

    def get_external_cache_hit_sources(self, request: Any, num_external_tokens: int) -> dict[Any, int]:
        from vllm.v1.metrics.cache_hit_source import CacheHitSource as Source

        memory, ssd = (0, 0) if self._scheduler is None else self._scheduler.sources(request, num_external_tokens)
        counts = {Source.HOST: memory, Source.DISK: ssd}
        counts[Source.EXTERNAL_UNSPECIFIED] = num_external_tokens - memory - ssd
        return {source: count for source, count in counts.items() if count}

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if self._scheduler is not None:
            self._scheduler.allocated(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        return Orders(self._scheduler.step(scheduler_output) if self._scheduler is not None else None)

    def update_connector_output(self, connector_output: Any) -> None:
        if self._scheduler is None:
            return
        told = connector_output.kv_connector_worker_meta
        proven = told.proven if isinstance(told, Told) else 0
        failed = getattr(connector_output, "failed_recving", None) or ()
        received = connector_output.finished_recving or ()
        loads = told.loads if isinstance(told, Told) else {}
        self._scheduler.heard(connector_output.invalid_block_ids, failed, received, proven, loads)
        if isinstance(told, Told):
            ranks = self._vllm_config.parallel_config.world_size
            for rank, stored in told.stored.items():
                for name, count in stored.items():
                    self._scheduler.stored(name, rank, ranks, count)
        for name in connector_output.finished_sending or ():
            self._scheduler.sent(name)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        if self._scheduler is None:
            return False, None
        return self._scheduler.finished(request, block_ids), None

    def take_events(self) -> Iterable[Any]:
        if self._scheduler is None:
            return ()
        events = self._scheduler.events()
        wanted = self._vllm_config.kv_events_config
        if not events or wanted is None or not wanted.enable_kv_cache_events:
            return ()
        return [self._event(each) for each in events]

    def _event(self, event: Event) -> Any:
        from vllm.distributed.kv_events import BlockRemoved, BlockStored
        from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

        hashes = [maybe_convert_block_hash(each) for each in event.hashes]
        if not event.stored:
            return BlockRemoved(block_hashes=hashes, medium=MEDIUM)
        return BlockStored(
            block_hashes=hashes,
            parent_block_hash=None if event.parent is None else maybe_convert_block_hash(event.parent),
            token_ids=event.tokens,
            block_size=len(event.tokens) // len(hashes),
            lora_id=None,
            medium=MEDIUM,
            lora_name=event.lora,
        )

    def reset_cache(self) -> bool | None:
        if self._scheduler is not None:
            self._scheduler.reset()
        return True

    # -- both

    def get_kv_connector_stats(self) -> Any:
        half = self._worker or self._scheduler
        if half is None or not half.counts:
            return None
        counts, half.counts = half.counts, {}
        return TierCacheStats(data=counts)

    def shutdown(self) -> None:
        for half in (self._scheduler, self._worker):
            if half is not None:
                half.close()
        self._scheduler = self._worker = None
        if self._cache is not None:
            self._cache.close()
            self._cache = None

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        return extra_config.get("load", LoadMode.AUTO) in (LoadMode.AUTO, LoadMode.LAYERWISE)

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Any:
        return TierCacheStats(data=dict(data or {}))

    @classmethod
    def build_prom_metrics(cls, *args: Any) -> Any:
        return TierCacheProm(*args)
