"""What the vLLM connector counts, in vLLM's own log line and on its /metrics page (as `vllm:tiercache_*_total`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

COUNTERS = {
    "queried_tokens": "Prompt tokens that the cache was asked for.",
    "matched_tokens": "Tokens that were loaded, or should have been.",
    "unanswered_queries": "Requests for which the cache could not be asked.",
    "failed_requests": "Requests of which something was computed because a load had failed.",
    "loaded_blocks": "Blocks loaded into the engine's memory.",
    "loaded_bytes": "Bytes copied into the engine's memory.",
    "load_seconds": "Seconds from the beginning to the end of loads, summed.",
    "failed_blocks": "Blocks that were to be loaded and were not.",
    "saved_blocks": "Blocks stored.",
    "saved_bytes": "Bytes copied out of the engine's memory.",
    "refused_blocks": "Blocks that the cache had no room or time for.",
    "abandoned_saves": "Saves given up because they held pages for too long.",
    "divergent_parts": "Parts in which ranks that should be equal differed.",
}


@dataclass
class TierCacheStats(KVConnectorStats):  # type: ignore[misc]
    """Amounts by name, since the last look."""

    def reset(self) -> None:
        self.data: dict[str, float] = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for name, amount in other.data.items():
            self.data[name] = self.data.get(name, 0) + amount
        return self

    def reduce(self) -> dict[str, int | float]:
        return {name: round(amount, 3) for name, amount in self.data.items()}

    def is_empty(self) -> bool:
        return not self.data


class TierCacheProm(KVConnectorPromMetrics):  # type: ignore[misc]
    """One counter a name, and an engine."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._counters = {}
        for name, meaning in COUNTERS.items():
            counter = self._counter_cls(
                name=f"vllm:tiercache_{name}", documentation=meaning, labelnames=self._labelnames
            )
            by_engine = self.per_engine_labelvalues.items()
            self._counters[name] = {engine: counter.labels(*values) for engine, values in by_engine}

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, amount in transfer_stats_data.items():
            if name in self._counters:
                self._counters[name][engine_idx].inc(amount)
