"""vLLM engines for tests: started and ended one after another in one process, which costs 2 s each instead of 12."""

from __future__ import annotations

import gc
import os
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

MIB = 1 << 20
STEPS_MAX = 100
SETTINGS = {
    "memory_bytes": 96 * MIB,
    "ssd_bytes": 512 * MIB,
    "segment_bytes": 16 * MIB,
    "disk_free_floor_bytes": MIB,
    "ssd_deadline_s": 30,
}
"""Of the caches that tests open: small ones, patient with a disk that others are busy with."""


def prompt(length: int, seed: int = 0) -> list[int]:
    """Token ids that repeat nowhere soon."""
    return [3 + (i * 7919 + i * i * 31 + seed * 101) % 500 for i in range(length)]


class Engine:
    """One engine with a model, with or without a connector. Use it as a context manager."""

    def __init__(self, model: str, extra: dict[str, Any] | None = None, *, door: str = "v1", **options: Any) -> None:
        """`extra`: the connector's options, None for an engine without one. `door`: see CONNECTORS."""
        from vllm import LLM
        from vllm.config import KVTransferConfig

        arguments: dict[str, Any] = {
            "model": model,
            "dtype": "float32",
            "max_model_len": 1024,
            "max_num_seqs": 4,
            "enforce_eager": True,
            "kv_cache_memory_bytes": 64 * MIB,
            "block_size": 32,
            "seed": 0,
            "disable_log_stats": False,
        }
        if model.endswith("mla"):
            # On CPU the kernel of the rotary embedding is wrong for MLA (vLLM 0.32), and pages are 16 tokens.
            arguments |= {"block_size": 16, "compilation_config": {"custom_ops": ["none"]}}
        arguments |= options
        if extra is not None:
            name, module, more = CONNECTORS[door]
            arguments["kv_transfer_config"] = KVTransferConfig(
                kv_connector=name,
                kv_connector_module_path=module,
                kv_role="kv_both",
                kv_load_failure_policy="recompute",
                # These models compute faster than anything can be loaded: plans have a scenario of their own.
                kv_connector_extra_config={**more, **SETTINGS, "plan": False, **extra},
            )
        self.llm = LLM(**arguments)

    def tokens(self, prompts: list[list[int]], count: int = 16, **options: Any) -> list[list[int]]:
        """Greedy tokens after each prompt, all at once."""
        return [list(each.outputs[0].token_ids) for each in self.outputs(prompts, count, **options)]

    def outputs(self, prompts: list[list[int]], count: int = 16, salt: str = "", **options: Any) -> list[Any]:
        from vllm import SamplingParams

        asked = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, **options)
        salted = {"cache_salt": salt} if salt else {}
        return self.llm.generate([{"prompt_token_ids": each, **salted} for each in prompts], asked, use_tqdm=False)

    def metric(self, name: str) -> float:
        """Sum of a metric over its labels, 0 where it never counted."""
        return sum(each.value for each in self.llm.get_metrics() if each.name == name)

    @property
    def hits(self) -> int:
        """Tokens that came from outside of the engine."""
        return int(self.metric("vllm:external_prefix_cache_hits"))

    def settle(self) -> None:
        """Lets the engine take steps until saves of finished requests are over: a request that shares nothing."""
        self.tokens([[499] * 3], 2)

    def settle_saved(self, blocks: int) -> None:
        """As `settle`, until the workers have told of so many saved blocks together: each is told in a later step."""
        for _ in range(STEPS_MAX):
            self.settle()
            if self.metric("vllm:tiercache_saved_blocks") >= blocks:
                return

    def close(self) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory
        from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()
        ensure_kv_transfer_shutdown()
        cleanup_dist_env_and_memory()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


CONNECTORS: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "v1": ("TierCacheConnector", "tiercache_connectors.vllm_v1", {}),
    "faulty": ("FaultyConnector", "tests.engines.faulty", {}),
    "offload": (
        "OffloadingConnector",
        None,
        {"spec_name": "TierCacheOffloadingSpec", "spec_module_path": "tiercache_connectors.vllm_offload"},
    ),
    "faulty offload": (
        "OffloadingConnector",
        None,
        {"spec_name": "FaultyOffloadingSpec", "spec_module_path": "tests.engines.faulty"},
    ),
}
