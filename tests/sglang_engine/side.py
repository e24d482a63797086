"""One SGLang engine in a process of its own: `python -m tests.sglang_engine.side MODEL DIRECTORY|- PAGES [DOOR]`.

Answers one prompt, greedily, and says as JSON the tokens and how many of the prompt's came from storage. With PAGES, it
ends only once so many are stored. DOOR: a class of faulty.py in place of the backend.
"""

from __future__ import annotations

import json
import sys
import time

PROMPT = [3 + (i * 7919 + i * i * 31) % 500 for i in range(300)]
NEW = 16
SETTINGS = {"memory_bytes": 96 << 20, "ssd_bytes": 256 << 20, "share": True}
PAGE = 16
WAIT_S = 60


def hierarchical(directory: str, door: str) -> dict:
    extra = {
        "backend_name": "tiercache",
        "module_path": "tests.sglang_engine.faulty" if door else "tiercache_connectors.sglang_hicache",
        "class_name": door or "TierCacheHiCache",
        "interface_v1": 1,
        "hicache_storage_pass_prefix_keys": True,
        "directory": directory,
        "settings": SETTINGS,
    }
    return {
        "enable_hierarchical_cache": True,
        "hicache_ratio": 2,
        "hicache_io_backend": "direct",
        "hicache_mem_layout": "layer_first",
        "hicache_write_policy": "write_through",
        "hicache_storage_backend": "dynamic",
        "hicache_storage_prefetch_policy": "wait_complete",
        "hicache_storage_backend_extra_config": json.dumps(extra),
    }


def stored(directory: str, blocks: int) -> None:
    """Waits until so many blocks are in the cache: SGLang writes to storage beside its answers."""
    import tiercache

    with tiercache.open(directory, **SETTINGS) as cache:
        end = time.monotonic() + WAIT_S
        while cache.stats()["tiercache_entries"] < blocks:
            if time.monotonic() > end:
                raise SystemExit(f"{cache.stats()['tiercache_entries']} blocks after {WAIT_S} s, not {blocks}")
            time.sleep(0.2)


def corrupt(directory: str) -> float:
    """Parts whose bytes were found not to be what their digests say."""
    import tiercache

    with tiercache.open(directory, **SETTINGS) as cache:
        return sum(value for name, value in cache.stats().items() if "corrupt" in name)


def main() -> None:
    import sglang

    model, directory, blocks, door = sys.argv[1], sys.argv[2], int(sys.argv[3]), "".join(sys.argv[4:])
    more = {} if directory == "-" else hierarchical(directory, door)
    engine = sglang.Engine(
        model_path=model,
        device="cpu",
        dtype="float32",
        attention_backend="torch_native",
        sampling_backend="pytorch",
        grammar_backend="none",
        disable_overlap_schedule=True,
        page_size=PAGE,
        max_total_tokens=4096,
        enable_cache_report=True,
        log_level="warning",
        skip_tokenizer_init=True,
        **more,
    )
    try:
        asked = {"temperature": 0, "max_new_tokens": NEW, "ignore_eos": True}
        answer = engine.generate(input_ids=PROMPT, sampling_params=asked)
        if blocks:
            stored(directory, blocks)
        details = answer["meta_info"].get("cached_tokens_details") or {}
        told = {"tokens": answer["output_ids"][-NEW:], "storage": details.get("storage", 0), "corrupt": 0}
        if directory != "-":
            told["corrupt"] = corrupt(directory)
        print(json.dumps(told), flush=True)
    finally:
        engine.shutdown()


if __name__ == "__main__":
    main()
