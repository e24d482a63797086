"""Our side of bench.kv, a process that owns nothing: `python -m bench.kv_sides NAME ...`; orders and answers by lines.

An order is {"do": method, ...}; see the methods. `Client` is one engine of one rank, `Rank` one of several that hold
the same MFA heads.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import tiercache
from bench.kv_shapes import ORDERS, SHAPES, Shape, array_shape
from tiercache.kv import moving
from tiercache.kv.layout import Attention, Layout
from tiercache.kv.planes import Planes, paged
from tiercache.kv.runs import Table
from tiercache.kv.shard import Shard
from tiercache.model import Outcome

WAIT_S = 60.0


def layout_of(shape: Shape, model: str) -> Layout:
    """What is stored of a shape."""
    return Layout(
        model=model,
        heads=shape.heads,
        layers=shape.layers,
        k_dim=shape.dim,
        v_dim=shape.dim,
        dtype=shape.dtype,
        attention=Attention.MFA if shape.heads == 1 else Attention.GQA,
        block_tokens=shape.block_tokens,
    )


def _rows(total: int, seed: int) -> np.ndarray:
    """Bytes that repeat only after a few MiB, and not in step with any block."""
    few = np.random.default_rng(seed).integers(0, 256, (3 << 20) + 17, np.uint8)
    return np.resize(few, total)


def aligned(shape: tuple[int, ...]) -> np.ndarray:
    """Memory that begins where PyTorch's does: at a multiple of 64, which NumPy's does not."""
    room = np.empty(math.prod(shape) + 63, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + math.prod(shape)].reshape(shape)


class Client:
    """A process with engine memory of its own: pages twice as many as a sequence takes, its pages chosen at random."""

    def __init__(self, directory: str, options: str) -> None:
        self.cache = tiercache.open(directory, share=True, **json.loads(options))
        self.rng = np.random.default_rng(int(time.monotonic() * 1e6))
        self.stores: dict[bool, Any] = {}
        self.sequences: list[list[bytes]] = []

    def setup(self, shape: str, order: str, total_bytes: int, replica: int = 0, replicas: int = 1) -> dict[str, Any]:
        """Engine memory of this shape and order; what was there before goes."""
        self._leave()
        self.shape = SHAPES[shape]
        layout = layout_of(self.shape, f"{shape}-{order}")
        shard = Shard(range(layout.layers), range(layout.heads), replica, replicas)
        self.blocks = self.shape.blocks(total_bytes)
        memory = aligned(array_shape(self.shape, order, 2 * self.blocks))
        memory.reshape(-1)[:] = _rows(memory.size, len(order))
        self.memory = memory
        typed = memory.view(f"u{self.shape.itemsize}")
        planes = paged(typed, ORDERS[order], layers=shard.layers, heads=shard.heads)
        self.planes = Planes(layout, shard, planes)
        ids = np.random.default_rng(1).permutation(2 * self.blocks)
        self.order, self.ids = order, ids
        self.source = Table(ids[: self.blocks], self.shape.block_tokens)
        self.target = Table(ids[self.blocks :], self.shape.block_tokens)
        self.stores = {verify: self.cache.kv(layout, shard, verify=verify) for verify in (False, True)}
        self.total = self.blocks * self.shape.block_bytes
        self.spare: tuple[np.ndarray, np.ndarray] | None = None
        return {"bytes": self.total, "blocks": self.blocks, "block_bytes": self.shape.block_bytes}

    def _leave(self) -> None:
        for store in self.stores.values():
            store.close()
        self.stores = {}
        for keys in self.sequences:
            self.cache.delete(keys)
        self.sequences = []

    def memmove(self) -> dict[str, Any]:
        """The same bytes from one place to another, as one copy without the GIL: the limit."""
        if self.spare is None:
            self.spare = (np.ones(self.total, np.uint8), np.ones(self.total, np.uint8))
        start = time.perf_counter()
        np.copyto(self.spare[0], self.spare[1])
        return {"seconds": time.perf_counter() - start}

    def keys(self) -> list[bytes]:
        """Of a sequence that nobody has stored."""
        return list(self.stores[True].keys(self.rng.integers(0, 1 << 31, self.blocks * self.shape.block_tokens)))

    def store(self, durable: bool = False, keep: int = 1) -> dict[str, Any]:
        """Saves a new sequence, and (outside the time) forgets the one before the last `keep`."""
        while len(self.sequences) >= keep:
            self.cache.delete(self.sequences.pop(0))
        keys = self.keys()
        start, cpu = time.perf_counter(), time.process_time()
        saving = self.stores[True].save(keys, self.planes, self.source, durable=durable)
        outcomes = saving.wait(WAIT_S)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        _all_hit("save", outcomes)
        self.sequences.append(keys)
        return {"seconds": seconds, "cpu_s": cpu}

    def load(self, verify: bool, which: int = -1, layerwise: bool = True) -> dict[str, Any]:
        """Loads a stored sequence into other pages."""
        keys = self.sequences[which]
        start, cpu = time.perf_counter(), time.process_time()
        outcomes = self.stores[verify].load(keys, self.planes, self.target, layerwise=layerwise).wait(WAIT_S)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        _all_hit("load", outcomes)
        return {"seconds": seconds, "cpu_s": cpu}

    def tiers(self, which: int = -1) -> dict[str, Any]:
        """How many blocks of a sequence are in memory, on the SSD, remote; touches and loads nothing."""
        keys = self.sequences[which]
        tiers = self.cache.core.probe_chain(keys, self.planes.layout.all_parts)
        return {"tiers": [tiers.count(code) for code in (1, 2, 3)], "blocks": len(keys)}

    def compare(self) -> dict[str, Any]:
        """Whether the target pages hold what the source pages do, bit for bit; wipes them then."""
        axis = ORDERS[self.order].index("p")
        source = self.memory.take(self.source.page_ids, axis)
        if not np.array_equal(source, self.memory.take(self.target.page_ids, axis)):
            raise SystemExit(f"wrong bytes: {self.shape.name} {self.order}")
        np.moveaxis(self.memory, axis, 0)[self.target.page_ids] = 0
        return {}

    def flush(self) -> dict[str, Any]:
        """Everything that is stored is on the SSD."""
        return {"durable": self.cache.flush()}

    def stats(self) -> dict[str, Any]:
        """What the cache holds and did."""
        return {"stats": dict(self.cache.stats())}

    def match(self, tokens: int, rounds: int) -> dict[str, Any]:
        """Seconds of asking how much of a sequence of so many tokens is stored; tiny blocks, all of them."""
        return match_seconds(self.cache, tokens, rounds)

    def close(self) -> None:
        """Its end."""
        self._leave()
        self.cache.close()


def _all_hit(what: str, outcomes: list[Outcome]) -> None:
    if set(outcomes) != {Outcome.HIT}:
        raise SystemExit(f"{what}: { {str(one): outcomes.count(one) for one in set(outcomes)} }")


def match_seconds(cache: tiercache.BlockingCache, tokens: int, rounds: int) -> dict[str, Any]:
    """Seconds of `KvStore.match` over all of a stored sequence of so many tokens, and of making its keys."""
    layout = Layout(model="tiny", heads=1, layers=1, k_dim=8, v_dim=8, dtype="uint8", attention=Attention.MFA)
    ids = np.random.default_rng(5).integers(0, 128_000, tokens)
    pages = np.ones((tokens // layout.block_tokens, 16, 16), np.uint8)
    shard = Shard.whole(layout)
    planes = Planes(layout, shard, paged(pages, "ptC", layers=shard.layers, heads=shard.heads))
    chain, match = [], []
    with cache.kv(layout) as store:
        for _ in range(rounds):
            start = time.perf_counter()
            keys = store.keys(ids)
            chain.append(time.perf_counter() - start)
        _all_hit("save", store.save(keys, planes, Table(np.arange(len(keys)), 16)).wait(WAIT_S))
        for _ in range(rounds):
            time.sleep(0.01)  # until the touch of the one before is over
            start = time.perf_counter()
            found = store.match(keys)
            match.append(time.perf_counter() - start)
            if found.length != len(keys):
                raise SystemExit(f"match: {found.length} of {len(keys)} blocks")
        cache.delete(keys)
    return {"chain": chain, "match": match, "blocks": len(keys)}


class Rank(Client):
    """One tensor-parallel rank that holds the same heads as the others: all save the same sequence."""

    def save(self, seed: int) -> dict[str, Any]:
        """Saves the sequence that this seed makes: its share, and its digests of the rest."""
        tokens = np.random.default_rng(seed).integers(0, 1 << 31, self.blocks * self.shape.block_tokens)
        keys = self.stores[True].keys(tokens)
        before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        saving = self.stores[True].save(keys, self.planes, self.source)
        outcomes = saving.wait(WAIT_S)
        seconds = time.perf_counter() - start
        after = resource.getrusage(resource.RUSAGE_SELF)
        _all_hit("save", outcomes)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return {"seconds": seconds, "cpu_s": cpu, "moved_bytes": saving.moved_bytes, "differs": len(saving.differs)}

    def forget(self, seed: int) -> dict[str, Any]:
        """Deletes it again."""
        tokens = np.random.default_rng(seed).integers(0, 1 << 31, self.blocks * self.shape.block_tokens)
        self.cache.delete(self.stores[True].keys(tokens))
        return {}

    def digest(self) -> dict[str, Any]:
        """CPU seconds of digesting everything held, without storing any of it."""
        start = time.thread_time()
        moving.digests_of(self.planes, self.source, range(self.blocks))
        return {"cpu_s": time.thread_time() - start}


SIDES = {"client": Client, "rank": Rank}


def serve(side: Any) -> None:
    """Takes orders from stdin until told to quit."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print goes elsewhere
    print(json.dumps({"ready": True}), file=out)
    for line in sys.stdin:
        order = json.loads(line)
        if "quit" in order:
            break
        answer = getattr(side, order.pop("do"))(**order)
        print(json.dumps(answer), file=out)
    side.close()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    serve(SIDES[sys.argv[1]](*sys.argv[2:]))
