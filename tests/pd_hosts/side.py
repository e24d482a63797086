"""One engine on a host of its own: does what it is told in lines of JSON on its standard input, one answer a line.

`python -m tests.pd_hosts.side`, in the environment of the engines. Engines are opened and closed one after another in
one process, each with its own cache, whose owner is a process of its own on the same host.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from typing import IO, TYPE_CHECKING, Any

from tests.engines.engine import STEPS_MAX, Engine
from tests.engines.scenarios import set_faults

if TYPE_CHECKING:
    from tiercache.kv.store import KvStore

PAUSE_S = 0.01
CALL_S = 20.0


class Side:
    """The engine that is open, and what can be asked of it: each public method is a word of the parent's."""

    def __init__(self) -> None:
        self._engine: Engine

    def open(self, model: str, extra: dict[str, Any] | None, *, poison: bool = False, **options: Any) -> int:
        """Starts an engine, with a cache where `extra` says how, which stores wrong values with `poison`. The process
        that owns the cache, or 0."""
        if poison:
            set_faults({"poison": 1})
        self._engine = Engine(model, extra, door="faulty" if poison else "v1", **options)
        return self.owner() if extra is not None else 0

    def owner(self) -> int:
        """The process that owns the cache."""
        return int(self._call("owner", {})["pid"])

    def layout(self) -> dict[str, int]:
        """The shape of its blocks."""
        layout = self._store.layout
        return {"block_bytes": layout.block_bytes, "block_tokens": layout.block_tokens}

    def tokens(self, prompt: list[int], count: int) -> dict[str, Any]:
        """Greedy tokens after a prompt, and seconds to the first one."""
        (found,) = self._engine.outputs([prompt], count)
        return {"tokens": list(found.outputs[0].token_ids), "first_s": found.metrics.first_token_latency}

    def stored(self, prompt: list[int]) -> bytes:
        """Waits until the cache of this host has all whole blocks of a prompt. Where they are, by block."""
        keys = self._store.keys(prompt)
        for _ in range(STEPS_MAX):
            if len(found := self._store.match(keys).tiers) == len(keys):
                return found
            self._engine.settle()  # saves go on beside the engine's steps, and end with them
        raise RuntimeError("the prompt was not stored")

    def found(self, prompt: list[int], patience_s: float) -> bytes:
        """Waits until all whole blocks of a prompt are known to be somewhere, however long announcements take. Where
        they are, by block."""
        keys = self._store.keys(prompt)
        until_s = time.monotonic() + patience_s
        while len(found := self._store.match(keys).tiers) < len(keys) and time.monotonic() < until_s:
            time.sleep(PAUSE_S)
        return found

    def peers(self) -> list[dict[str, Any]]:
        """Peers that are connected to this host's cache."""
        found: list[dict[str, Any]] = self._call("peers", {})
        return found

    def counts(self) -> dict[str, float]:
        """What the engine has loaded, and what its cache has counted."""
        names = ("matched_tokens", "loaded_blocks", "failed_blocks", "failed_requests")
        told = {name: self._engine.metric(f"vllm:tiercache_{name}") for name in names}
        stats = self._cache.stats()
        return told | {"hits": self._engine.hits} | {name: stats[name] for name in stats if "peer" in name}

    def close(self) -> None:
        """Ends the engine, and its part in the cache."""
        self._engine.close()

    @property
    def _connector(self) -> Any:
        return self._engine.llm.llm_engine.engine_core.engine_core.scheduler.get_kv_connector()

    @property
    def _cache(self) -> Any:
        return self._connector._cache

    @property
    def _store(self) -> KvStore:
        (store,) = self._connector._scheduler._stores
        return store

    def _call(self, question: str, arguments: dict[str, Any]) -> Any:
        asked = asyncio.run_coroutine_threadsafe(self._cache.core.call(question, arguments), self._cache.loop)
        return asked.result(CALL_S)


def serve(answers: IO[str]) -> None:
    """Answers until the input ends; what fails ends the process, with its reason on standard error."""
    side = Side()
    for line in sys.stdin:
        word, arguments = json.loads(line)
        answer = getattr(side, word)(**arguments)
        answers.write(json.dumps(list(answer) if isinstance(answer, bytes) else answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    # Engines print: what they say goes to standard error.
    with os.fdopen(os.dup(1), "w") as answers_:
        os.dup2(2, 1)
        serve(answers_)
    os._exit(0)  # engines leave threads behind that take seconds to end
