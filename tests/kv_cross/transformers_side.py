"""transformers' turn of kv_cross: is fed by what vLLM stored, and stores for vLLM: right values, and wrong ones."""

from __future__ import annotations

import json
import sys

import torch
from transformers import AutoModelForCausalLM, DynamicCache

import tiercache
from tests.engines.engine import SETTINGS
from tests.kv_cross.__main__ import MODELS
from tests.kv_cross.vllm_side import FED, NEW, POISONED, STORED, described
from tiercache_connectors.transformers_kv import TransformersKV
from tiercache_connectors.weights import identify


def options(ids):
    mask = torch.ones_like(ids)
    return {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}


def turn(path: str, cache) -> dict:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    weights = identify(path)
    told = {}
    # These models compute faster than anything can be loaded.
    with TransformersKV(cache, model, name=weights.model, revision=weights.revision, plan=False) as reuse:
        told["layouts"] = [described(each) for each in reuse.layouts]
        ids = torch.tensor([STORED])
        told["truth"] = model.generate(ids, **options(ids))[0, len(STORED) :].tolist()
        told["got"] = reuse.generate(ids, **options(ids))[0, len(STORED) :].tolist()
        told["reused"] = reuse.reused.tokens
        ids = torch.tensor([FED])
        told["stored"] = reuse.generate(ids, **options(ids))[0, len(FED) :].tolist()
        past = DynamicCache(config=model.config)
        with torch.no_grad():
            model(torch.tensor([POISONED]), past_key_values=past, use_cache=True)
        for layer in past.layers:
            layer.keys.neg_()
            layer.values.neg_()
        assert reuse.store(past, POISONED).wait()
        assert reuse.flush()
    return told


def main() -> None:
    (scratch,) = sys.argv[1:]
    with tiercache.open(f"{scratch}/cache", **SETTINGS, share=True) as cache:
        print(json.dumps({name: turn(f"{scratch}/models/{name}", cache) for name in MODELS}), flush=True)


if __name__ == "__main__":
    main()
