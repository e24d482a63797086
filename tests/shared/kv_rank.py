"""A process that is one rank of an engine over a shared directory, told what to do line by line; see test_kv_ranks."""

from __future__ import annotations

import json
import sys
import threading
from concurrent import futures
from typing import Any

import numpy as np

import tiercache
from tests.kv_matrix.engine import Rank, layout_of, truth_of
from tiercache.kv.loading import Loading
from tiercache.kv.saving import Saving
from tiercache.kv.shard import Shard
from tiercache.kv.stretch import Stretch
from tiercache.model import Kind, Outcome, Terms
from tiercache.sync import wait

PATIENCE_S = 30.0


class Told:
    """What it may be told; every answer is JSON."""

    def open(self, directory: str, **settings: Any) -> str:
        self.cache = tiercache.open(directory, **settings)
        return type(self.cache.core).__name__

    def hold(self, kind: str, tp: int, tp_rank: int, tokens: int, pp: int = 1, pp_rank: int = 0) -> int:
        """Becomes a rank; how many blocks a sequence has."""
        self.layout, self.tokens = layout_of(kind), tokens
        self.rank = Rank(self.layout, Shard.of(self.layout, tp_rank, tp, pp_rank, pp), 32, -(-tokens // 32) + 2)
        self.store = self.cache.kv(self.layout, self.rank.shard)
        self.table = self.rank.table(tokens, seed=tp_rank)
        return tokens // self.layout.block_tokens

    def keys(self, seed: int) -> list[bytes]:
        return self.store.keys(np.arange(self.tokens) + 1_000_000 * seed)

    def compute(self, seed: int) -> None:
        """The sequence's KV comes to be in this rank's memory."""
        self.rank.write(truth_of(self.layout, self.tokens, seed), self.table)

    def flip(self, token: int, layer: int) -> None:
        self.rank.flip(self.table, token, layer)

    def save(self, seed: int, durable: bool = False) -> dict[str, Any]:
        saving = self.store.save(self.keys(seed), self.rank.planes, self.table, durable=durable)
        outcomes = saving.wait(PATIENCE_S)
        return {
            "hits": outcomes.count(Outcome.HIT),
            "outcomes": sorted({outcome.name for outcome in outcomes}),
            "moved": saving.moved_bytes,
            "differs": saving.differs,
            "free": saving.pages_free(0),
        }

    def save_some(self, seed: int, steps: int) -> None:
        """A save that does so many of its steps, and no more: it says so, and waits to be killed."""
        self._hang(Saving(self.store, self._stretch(seed), Terms(Kind.KV), durable=False), steps)

    def load_some(self, seed: int, steps: int) -> None:
        """A load that does so many of its steps, and no more."""
        self._hang(Loading(self.store, self._stretch(seed), layerwise=True, deadline_s=None), steps)

    def _stretch(self, seed: int) -> Stretch:
        return Stretch.of(self.layout, self.keys(seed), self.rank.planes, self.table, start=0, stop=None)

    def _hang(self, job: Saving | Loading, steps: int) -> None:
        for _ in range(steps):
            awaited = next(job._work.steps)
            if isinstance(awaited, futures.Future):
                futures.wait([awaited], PATIENCE_S)
        print(json.dumps(job.moved_bytes), flush=True)
        threading.Event().wait()

    def load(self, seed: int, layerwise: bool = True) -> dict[str, Any]:
        self.rank.memory[...] = 0
        loading = self.store.load(self.keys(seed), self.rank.planes, self.table, layerwise=layerwise)
        outcomes = loading.wait(PATIENCE_S)
        return {"hits": outcomes.count(Outcome.HIT), "wrong": self._wrong(seed, outcomes), "done": loading.done}

    def _wrong(self, seed: int, outcomes: list[Outcome]) -> int:
        truth, size = truth_of(self.layout, self.tokens, seed), self.layout.block_tokens
        return sum(
            self.rank.wrong(truth, self.table, range(size * block, size * block + size))
            for block, outcome in enumerate(outcomes)
            if outcome is Outcome.HIT
        )

    def churn(self, seed: int, sequences: int) -> None:
        """Saves and loads sequences at random until it is killed; says what was wrong."""
        rng = np.random.default_rng(seed)
        print(json.dumps("churning"), flush=True)
        while True:
            one = int(rng.integers(sequences))
            if rng.random() < 0.5:
                self.compute(one)
                self.save(one)
            elif wrong := self.load(one)["wrong"]:
                print(json.dumps(f"{wrong} wrong bytes of {one}"), flush=True)

    def match(self, seed: int) -> int:
        return self.store.match(self.keys(seed)).length

    def count(self, name: str) -> float:
        return self.cache.core.metrics.total(name)

    def validate(self) -> Any:
        return wait(self.cache.core.call("validate", {}), self.cache.loop)

    def stats(self, *names: str) -> dict[str, float]:
        return {name: value for name, value in self.cache.stats().items() if name.startswith(names)}

    def flush(self) -> bool:
        return self.cache.flush()


def main() -> None:
    told = Told()
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        what, arguments, keywords = json.loads(line)
        try:
            answer = getattr(told, what)(*arguments, **keywords)
        except BaseException as fault:
            answer = {"fault": f"{type(fault).__name__}: {fault}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
