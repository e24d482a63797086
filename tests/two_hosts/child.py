"""One host's cache: does what it is told, a line of JSON at a time, and answers in another.

`python child.py`; every method of Told can be called as [name, arguments, keywords].
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import sys
import threading
import time
from concurrent.futures import Future
from typing import Any

import numpy as np

import tiercache
from tiercache.errors import TierCacheError
from tiercache.keys import chain, namespace
from tiercache.model import Name, Outcome
from tiercache.sync import BlockingCache, wait

BATCH, CALM_BATCH = 16, 4
"""Blocks that are put at a time."""
PATIENCE_S = 30.0
PAUSE_S, CALM_PAUSE_S = 0.05, 0.002


def keys_of(label: str, count: int) -> list[bytes]:
    """The blocks of one chain, or lone entries."""
    return chain(namespace("two hosts", label), [number.to_bytes(4, "little") for number in range(count)])


def value_of(key: bytes, size: int) -> bytes:
    """The only right bytes of an entry; sizes differ a little, but not within a chain."""
    return np.random.default_rng(int.from_bytes(key[:8], "little")).bytes(size)


class Skewed:
    """A clock that is wrong by so much, and counts from another moment."""

    def __init__(self, skew_s: float) -> None:
        self._skew_s = skew_s

    def monotonic(self) -> float:
        return time.monotonic() + abs(self._skew_s)

    def wall(self) -> float:
        return time.time() + self._skew_s


class Samples:
    """Looks at a cache of this process over and over, in a thread: the most that it ever saw."""

    def __init__(self, cache: BlockingCache) -> None:
        self._core: Any = cache.core
        self._near = self._core.peering._near
        self._over = threading.Event()
        self.looks = 0
        self.most = {"memory": 0, "gate": 0, "quota": 0}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.is_set():
            self._look()
            self._over.wait(0.001)

    def _look(self) -> None:
        near, most = self._near, self.most
        seen = {
            "memory": self._core.tiers.memory.status().used_bytes,
            "gate": near.gate.used_bytes,
            "quota": near.quota.used_bytes,
        }
        self.looks += 1
        for name, value in seen.items():
            most[name] = max(most[name], value)

    def end(self) -> dict[str, int]:
        """The most of each, beside what is allowed."""
        self._over.set()
        self._thread.join()
        self._look()
        caps = {
            "memory_cap": self._core.tiers.memory.status().capacity_bytes,
            "gate_cap": self._near.gate.room_bytes,
            "quota_cap": self._near.quota.room_bytes,
        }
        return {**self.most, **caps, "looks": self.looks}


class Told:
    """What a host can be told."""

    cache: BlockingCache
    samples: Samples

    def open(self, settings: dict[str, Any], skew_s: float = 0.0) -> str:
        """Opens the cache, with clocks that are wrong by so much: who answers for it."""
        if skew_s:
            from tiercache.assemble import build
            from tiercache.metrics import Metrics
            from tiercache.settings import load
            from tiercache.sync import io_loop

            core, loop = build(load(**settings), Skewed(skew_s), Metrics()), io_loop()
            wait(core.start(), loop)
            self.cache = BlockingCache(core, loop, lambda: wait(core.close(), loop))
        else:
            self.cache = tiercache.open(**settings)
        return type(self.cache.core).__name__

    def close(self) -> None:
        self.cache.close()

    def flush(self) -> bool:
        return self.cache.flush()

    def call(self, question: str, **arguments: Any) -> Any:
        """A question to the cache; see Core.call."""
        return wait(self.cache.core.call(question, arguments), self.cache.loop)

    def stats(self, *names: str) -> dict[str, float]:
        """Metrics that begin with these names."""
        return {name: value for name, value in self.cache.stats().items() if name.startswith(names)}

    # -- writing -------------------------------------------------------------------------------------------------------

    def put_chain(self, label: str, count: int, size: int, calm: bool = False) -> list[str]:
        """Puts a chain: what came of it. `calm`: as an engine would, with time between the blocks to make room."""
        keys, outcomes = keys_of(label, count), set[str]()
        step = CALM_BATCH if calm else BATCH
        for start in range(0, count, step):
            some = keys[start : start + step]
            values = [value_of(key, size) for key in some]
            parent = keys[start - 1] if start else b""
            outcomes |= {one.name for one in self.cache.put_chain(some, values, parent=parent)}
            assert not calm or self._until(self._calm, pause_s=CALM_PAUSE_S)
        return sorted(outcomes)

    def _calm(self) -> bool:
        """Whether memory is below its mark: what is above leaves in the background."""
        memory = self.call("status")["memory"]
        return bool(memory["used_bytes"] <= memory["capacity_bytes"] * self.cache.core.settings.high_mark)

    def put_lone(self, label: str, count: int, size: int, calm: bool = False, ttl_s: float | None = None) -> list[str]:
        """Puts lone entries."""
        keys, outcomes = keys_of(label, count), set[str]()
        step = CALM_BATCH if calm else BATCH
        for start in range(0, count, step):
            some = keys[start : start + step]
            values = [value_of(key, size) for key in some]
            outcomes |= {one.name for one in self.cache.put([Name(key) for key in some], values, ttl_s=ttl_s)}
            assert not calm or self._until(self._calm, pause_s=CALM_PAUSE_S)
        return sorted(outcomes)

    # -- reading -------------------------------------------------------------------------------------------------------

    def match(self, label: str, count: int, size: int) -> dict[str, Any]:
        """Reads a chain, once: how much of it is there, right and wrong."""
        began_s = time.monotonic()
        with self.cache.match(keys_of(label, count)) as lease:
            seconds = time.monotonic() - began_s
            return {"seconds": seconds, **self._compared(lease, keys_of(label, count), size)}

    @staticmethod
    def _compared(lease: Any, keys: list[bytes], size: int) -> dict[str, int]:
        right = wrong = 0
        for i, outcome in enumerate(lease.outcomes):
            if outcome is Outcome.HIT:
                fine = bytes(lease.view(i)) == value_of(keys[i], size)
                right, wrong = right + fine, wrong + (not fine)
        return {"right": right, "wrong": wrong}

    def get(self, label: str, count: int, size: int) -> dict[str, Any]:
        """Reads lone entries, once."""
        keys, began_s = keys_of(label, count), time.monotonic()
        values = self.cache.get([Name(key) for key in keys])
        seconds = time.monotonic() - began_s
        there = [(value, key) for value, key in zip(values, keys, strict=True) if isinstance(value, bytes)]
        right = sum(value == value_of(key, size) for value, key in there)
        return {"seconds": seconds, "right": right, "wrong": len(there) - right}

    def until_all(self, what: str, label: str, count: int, size: int, patience_s: float = PATIENCE_S) -> dict[str, Any]:
        """Reads (`match` or `get`) until everything is there: what the last look found, and the wrong of all."""
        found: dict[str, Any] = {}
        wrong = looks = 0

        def look() -> bool:
            nonlocal found, wrong, looks
            found = getattr(self, what)(label, count, size)
            wrong, looks = wrong + found["wrong"], looks + 1
            return bool(found["right"] == count)

        began_s = time.monotonic()
        self._until(look, patience_s)
        return found | {"wrong": wrong, "looks": looks, "waited_s": time.monotonic() - began_s}

    def known(self, label: str, count: int, patience_s: float = PATIENCE_S) -> bool:
        """Waits until all of a chain is believed to be somewhere."""
        keys = keys_of(label, count)
        return self._until(lambda: len(self.cache.core.probe_chain(keys, 1)) == count, patience_s)

    @staticmethod
    def _until(done: Any, patience_s: float = PATIENCE_S, pause_s: float = PAUSE_S) -> bool:
        until_s, pause = time.monotonic() + patience_s, threading.Event()
        while not done():
            if time.monotonic() > until_s:
                return False
            pause.wait(pause_s)
        return True

    def met(self, count: int, patience_s: float = PATIENCE_S) -> list[dict[str, Any]]:
        """Waits until so many peers are connected: who is."""
        self._until(lambda: len(self.call("peers")) == count, patience_s)
        rows: list[dict[str, Any]] = self.call("peers")
        return rows

    def unpinned(self, patience_s: float = PATIENCE_S) -> dict[str, float]:
        """Waits until nobody has anything pinned here: how long that took."""
        began_s = time.monotonic()

        def free() -> bool:
            leases = self.stats("tiercache_leases")["tiercache_leases"]
            return not leases and not any(row["pinned_bytes"] for row in self.call("peers"))

        return {"free": self._until(free, patience_s), "seconds": time.monotonic() - began_s}

    # -- files ---------------------------------------------------------------------------------------------------------

    def mount(self, url: str, settings: dict[str, Any]) -> None:
        """An object store through the cache."""
        from tiercache_connectors.fsspec_fs import TierCacheFileSystem

        options = {
            "key": "reader", "secret": "of-tests", "endpoint_url": url, "client_kwargs": {"region_name": "us-east-1"},
        }  # fmt: skip
        self.files = TierCacheFileSystem(target_protocol="s3", target_options=options, **settings)

    def cat(self, path: str) -> str:
        """The digest of a whole file."""
        return hashlib.sha256(self.files.cat_file(path)).hexdigest()

    def column(self, path: str, name: str) -> int:
        """The sum of a column of a Parquet file."""
        import pyarrow.compute
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(path, columns=[name], filesystem=self.files)
        return int(pyarrow.compute.sum(table[name]).as_py())

    def origin_stats(self) -> dict[str, float]:
        """What this process's files asked of their origin."""
        found = self.files.mount.cache.metrics.snapshot()
        return {name: value for name, value in found.items() if name.startswith("tiercache_origin")}

    def unmount(self) -> None:
        self.files.close()

    # -- many at once --------------------------------------------------------------------------------------------------

    def put_requests(self, label: str, requests: int, blocks: int, size: int, calm: bool = False) -> int:
        """Stores so many chains: how many are whole."""
        return sum(self.put_chain(f"{label} {number}", blocks, size, calm) == ["HIT"] for number in range(requests))

    def publish(self, label: str, requests: int, blocks: int, to: str, whole: bool = False) -> dict[str, Any]:
        """Publishes so many chains to a peer, all at once (`whole`: in one call): how many blocks it says that it
        has."""
        sets = [keys_of(f"{label} {number}", blocks) for number in range(requests)]
        if whole:
            sets = [[key for one in sets for key in one]]

        async def one(keys: list[bytes]) -> int:
            try:
                said = await self.cache.core.call("publish", {"keys": [key.hex() for key in keys], "to": to})
            except TierCacheError as fault:
                faults.append(str(fault))
                return 0
            return int(said["taken"])

        async def every() -> list[int]:
            return await asyncio.gather(*[one(keys) for keys in sets])

        faults: list[str] = []
        began_s = time.monotonic()
        taken = wait(every(), self.cache.loop)
        return {"taken": sum(taken), "seconds": time.monotonic() - began_s, "faults": sorted(set(faults))[:3]}

    def publish_soon(self, *arguments: Any, **keywords: Any) -> None:
        """Begins to publish; `published` has the answer."""
        self.publishing: Future[Any] = Future()

        def work() -> None:
            try:
                self.publishing.set_result(self.publish(*arguments, **keywords))
            except BaseException as fault:
                self.publishing.set_exception(fault)

        threading.Thread(target=work, daemon=True).start()

    def published(self) -> dict[str, Any]:
        answer: dict[str, Any] = self.publishing.result(PATIENCE_S)
        return answer

    def pull(self, label: str, requests: int, blocks: int, size: int, patience_s: float = 60.0) -> dict[str, Any]:
        """So many readers at once, each of one chain, each as often as it takes until it has it as a whole: readers
        that got all, wrong blocks, and looks beyond the first of each."""
        wrong = again = 0

        async def one(number: int) -> bool:
            nonlocal wrong, again
            keys = keys_of(f"{label} {number}", blocks)
            until_s = time.monotonic() + patience_s
            while True:
                lease = await self.cache.core.match(keys)
                try:
                    found = self._compared(lease, keys, size)
                finally:
                    lease.release()
                wrong += found["wrong"]
                if found["right"] == blocks or time.monotonic() > until_s:
                    return found["right"] == blocks
                again += 1
                await asyncio.sleep(PAUSE_S)

        async def every() -> list[bool]:
            return await asyncio.gather(*[one(number) for number in range(requests)])

        began_s = time.monotonic()
        right = wait(every(), self.cache.loop)
        return {"right": sum(right), "wrong": wrong, "again": again, "seconds": time.monotonic() - began_s}

    def count(self, what: str, label: str, requests: int, blocks: int, size: int) -> dict[str, int]:
        """Reads so many chains one after the other, once: how many are there as a whole."""
        right = wrong = 0
        for number in range(requests):
            found = getattr(self, what)(f"{label} {number}", blocks, size)
            right, wrong = right + (found["right"] == blocks), wrong + found["wrong"]
        return {"right": right, "wrong": wrong}

    def count_lone(self, label: str, count: int, size: int) -> dict[str, int]:
        """Reads lone entries one after the other, once."""
        right = wrong = 0
        for key in keys_of(label, count):
            (value,) = self.cache.get([Name(key)])
            if isinstance(value, bytes):
                fine = value == value_of(key, size)
                right, wrong = right + fine, wrong + (not fine)
        return {"right": right, "wrong": wrong}

    def holds(self, least: int, patience_s: float = PATIENCE_S) -> int:
        """Waits until so many bytes are pinned for peers: how many are."""
        held = 0

        def look() -> bool:
            nonlocal held
            held = sum(row["pinned_bytes"] for row in self.call("peers"))
            return held >= least

        self._until(look, patience_s, CALM_PAUSE_S)
        return held

    def sample(self) -> None:
        """Begins to look at how full everything is."""
        self.samples = Samples(self.cache)

    def sampled(self) -> dict[str, int]:
        """The most that was seen since."""
        return self.samples.end()


def main() -> None:
    told = Told()
    if "-v" in sys.argv:
        logging.basicConfig(level=logging.DEBUG)
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
