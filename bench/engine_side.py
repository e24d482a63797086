"""An engine at work for bench.engine, in `.venv-engines`: vLLM on the CPU, orders and answers by lines.

`.venv-engines/bin/python -m bench.engine_side MODEL JSON`: the object says which connector (`tiercache`, `lmcache`),
its options, and whether engine and workers are processes of their own (`several`). In one process the connector can be
taken out between two requests, so that the engine runs as if it had been started without.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

LENGTHS = (1024, 2048, 4096, 8192)
SUFFIX = 32
"""Tokens after a shared prefix, new in every request."""
VOCABULARY = 512
BATCHED_TOKENS = 2048


def make_model(directory: Path, layers: int, hidden: int) -> None:
    """A Llama with random weights, in the proportions of Llama 3: four heads share one of K and V, and the layers
    between are four times as wide."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if (directory / "config.json").exists():
        return
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=4 * hidden,
        num_hidden_layers=layers, num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64 // 4,
        head_dim=64, max_position_embeddings=16384, bos_token_id=0, eos_token_id=1, pad_token_id=2,
        initializer_range=0.05,
    )  # fmt: skip
    part = directory.with_suffix(".part")
    LlamaForCausalLM(config).to(torch.bfloat16).eval().save_pretrained(part)
    part.rename(directory)


def prefix(length: int, number: int) -> list[int]:
    """Token ids of a shared prefix: the same in every process."""
    rng = random.Random(f"{length} {number}")
    return [rng.randrange(3, VOCABULARY) for _ in range(length)]


class Engine:
    """One engine."""

    def __init__(self, model: str, several: bool, connector: str, extra: dict[str, Any]) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(several))
        from vllm import LLM
        from vllm.config import KVTransferConfig

        names: dict[str, Any] = {"kv_connector": "LMCacheMPConnector"}
        if connector == "tiercache":
            names = {
                "kv_connector": "TierCacheConnector",
                "kv_connector_module_path": "tiercache_connectors.vllm_v1",
                "kv_load_failure_policy": "recompute",
            }
        more: dict[str, Any] = {"disable_hybrid_kv_cache_manager": True} if connector == "lmcache" else {}
        self.llm = LLM(
            model=model, dtype="bfloat16", max_model_len=LENGTHS[-1] + 256, max_num_seqs=4, enforce_eager=True,
            kv_cache_memory_bytes=512 << 20, block_size=32, seed=0, skip_tokenizer_init=True,
            enable_prefix_caching=False, max_num_batched_tokens=BATCHED_TOKENS, disable_log_stats=False,
            kv_transfer_config=KVTransferConfig(kv_role="kv_both", kv_connector_extra_config=extra, **names), **more,
        )  # fmt: skip
        self.several = several
        self.rng = random.Random(time.monotonic_ns())
        self._taken: tuple[Any, Any] | None = None

    def ask(
        self, length: int, number: int | None = None, count: int = 1, use: bool = True, settle_s: float = 0.3
    ) -> dict[str, Any]:
        """One request, greedy: a shared prefix (`number`) and something new, or all of it new. `use`: with the
        connector. Its seconds are those to `count` tokens; CPU seconds count until nothing is done any more."""
        tokens = [self.rng.randrange(3, VOCABULARY) for _ in range(length if number is None else SUFFIX)]
        if number is not None:
            tokens = prefix(length, number) + tokens
        self._plug(use)
        cpu, hits, start = time.process_time(), self.hits(), time.perf_counter()
        self._generate(tokens, count)
        seconds = time.perf_counter() - start
        time.sleep(settle_s)  # saves go on in threads of this process; CPU seconds of waiting are none
        return {"seconds": seconds, "cpu_s": time.process_time() - cpu, "hits": self.hits() - hits}

    def _generate(self, tokens: list[int], count: int) -> None:
        from vllm import SamplingParams

        asked = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        self.llm.generate([{"prompt_token_ids": tokens}], asked, use_tqdm=False)

    def settle(self) -> dict[str, Any]:
        """Steps of the engine with which it hears that saves are over."""
        self._plug(True)
        for _ in range(3):
            self._generate([3, 4, 5], 2)
            time.sleep(0.2)
        return {}

    def hits(self) -> float:
        """Tokens that came from outside of the engine."""
        return float(sum(one.value for one in self.llm.get_metrics() if one.name == "vllm:external_prefix_cache_hits"))

    def _plug(self, use: bool) -> None:
        """Takes the connector out of the idle engine, or puts it back: out of the scheduler, and out of the place in
        which the worker looks for it."""
        if self.several or use == (self._taken is None):
            return
        from vllm.distributed.kv_transfer import kv_transfer_state

        scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler
        if use:
            assert self._taken is not None
            scheduler.connector, kv_transfer_state._KV_CONNECTOR_AGENT = self._taken
            self._taken = None
        else:
            self._taken = scheduler.connector, kv_transfer_state._KV_CONNECTOR_AGENT
            scheduler.connector = kv_transfer_state._KV_CONNECTOR_AGENT = None

    def close(self) -> None:
        """Its end."""
        self._plug(True)
        self.llm.llm_engine.engine_core.shutdown()


def main(model: str, options: str) -> None:
    """Makes the engine and serves; a fault is an answer, and says why."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for name, value in (("HF_HUB_OFFLINE", "1"), ("VLLM_NO_USAGE_STATS", "1"), ("VLLM_LOGGING_LEVEL", "ERROR")):
        os.environ.setdefault(name, value)
    told = json.loads(options)
    sys.path += told.pop("paths", [])  # last, so that they replace nothing
    make_model(Path(model), told.pop("layers"), told.pop("hidden"))
    try:
        engine = Engine(model, **told)
    except Exception as fault:  # noqa: BLE001 (vLLM's start fails in many ways)
        print(json.dumps({"left_out": f"{type(fault).__name__}: {fault}"[:500]}), file=answers)
        os._exit(1)
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        order = json.loads(line)
        if "quit" in order:
            break
        print(json.dumps(getattr(engine, order.pop("do"))(**order)), file=answers)
    engine.close()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
