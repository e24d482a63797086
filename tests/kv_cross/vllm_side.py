"""vLLM's turns of kv_cross: `first` stores a prompt and says what it would answer to others, `last` is asked those."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from tests.engines.engine import Engine, prompt
from tests.kv_cross.__main__ import MODELS

STORED, FED, POISONED = prompt(300, 0), prompt(310, 1), prompt(320, 2)
"""Prompts: stored by vLLM, stored by transformers, stored by transformers with wrong values."""
NEW = 16
STEPS_MAX = 200


def first(model: str, extra: dict) -> dict:
    with Engine(model) as plain:
        truth, poisoned = plain.tokens([FED, POISONED], NEW)
    with Engine(model, extra) as engine:
        (stored,) = engine.tokens([STORED], NEW)
        connector = engine.llm.llm_engine.engine_core.engine_core.scheduler.connector
        layouts = [described(each) for each in connector._groups.layouts]
        # Saves go on beside the engine, and end with it.
        for store in connector._scheduler._stores:
            keys = store.keys(STORED)
            steps = iter(range(STEPS_MAX))
            while store.match(keys).length < len(keys):
                assert next(steps, None) is not None, "vLLM did not store the prompt"
                engine.settle()
    return {"truth": truth, "poisoned": poisoned, "stored": stored, "layouts": layouts}


def described(layout) -> dict:
    return {name: str(value) for name, value in asdict(layout).items()}


def last(model: str, extra: dict) -> dict:
    with Engine(model, extra) as engine:
        (got,) = engine.tokens([FED], NEW)
        hits = engine.hits
        (poisoned,) = engine.tokens([POISONED], NEW)
        return {"got": got, "hits": hits, "poisoned": poisoned, "poisoned_hits": engine.hits - hits}


def main() -> None:
    scratch, turn = sys.argv[1:]
    extra = {"directory": f"{scratch}/cache", "share": True}
    told = {name: {"first": first, "last": last}[turn](f"{scratch}/models/{name}", extra) for name in MODELS}
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
