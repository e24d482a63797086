"""Everything real at once: threads, the I/O loop, the SSD tier with its pools, eviction in both tiers."""

from __future__ import annotations

import gc
import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import tiercache
from tiercache.buffers import Buffer
from tiercache.keys import object_key, page_key
from tiercache.lease import PageRun
from tiercache.model import Name, Outcome, State, part_count
from tiercache.sync import wait
from tiercache.testing.model import made_bytes

MIB, PATIENCE_S = 1 << 20, 60
PAGE, PART = 256 << 10, 64 << 10
RUN = PageRun(page_key("threads://", "file", "1", PAGE, PART), 40 * PAGE - 999, PAGE, PART)
LABELS = 300


def value(label: int) -> bytes:
    return made_bytes(label, [100, 9000, 70_000, 300_000][label % 4])


def page(ordinal: int) -> bytes:
    return made_bytes(("page", ordinal), RUN.page_size(ordinal))


async def load(gaps, landed) -> None:
    for i, gap in enumerate(gaps):
        truth, target = page(gap.ordinal), gap.target.view()
        for part in range(part_count(len(truth), PART)):
            if gap.parts >> part & 1:
                target[part * PART : (part + 1) * PART] = truth[part * PART : (part + 1) * PART]
        landed([i])


class Crowd:
    """Threads that do all kinds of calls on one cache and compare every byte."""

    def __init__(self, cache: tiercache.BlockingCache) -> None:
        self.cache = cache
        self.stop = threading.Event()
        self.wrong: list[str] = []
        self.hits = self.local = 0

    def run(self, seed: int) -> None:
        rng = random.Random(seed)
        calls = [self.put, self.get, self.get, self.lease, self.pages, self.pages, self.delete, self.flush]
        while not self.stop.is_set():
            rng.choices(calls, [4, 4, 4, 4, 4, 4, 2, 1])[0](rng)

    def some(self, rng: random.Random) -> list[int]:
        return rng.sample(range(LABELS), rng.randrange(1, 5))

    def put(self, rng: random.Random) -> None:
        labels = self.some(rng)
        self.cache.put([name(n) for n in labels], [value(n) for n in labels], durable=rng.random() < 0.1)

    def get(self, rng: random.Random) -> None:
        labels = self.some(rng)
        targets = [bytearray(300_000) for _ in labels]
        outcomes = self.cache.get_into([name(n) for n in labels], targets)
        for label, outcome, target in zip(labels, outcomes, targets):
            self.judge(label, outcome, target[: len(value(label))])

    def lease(self, rng: random.Random) -> None:
        labels = self.some(rng)
        with self.cache.lease([name(n) for n in labels]) as lease:
            views = {n: lease.view(i) for i, n in enumerate(labels) if lease.outcomes[i] is Outcome.HIT}
        for label, view in views.items():
            self.judge(label, Outcome.HIT, view)

    def judge(self, label: int, outcome: Outcome, data: bytes | bytearray | memoryview) -> None:
        self.hits += outcome is Outcome.HIT
        if outcome is Outcome.HIT and data != value(label):
            self.wrong.append(f"value {label}")

    def pages(self, rng: random.Random) -> None:
        ordinals = sorted(rng.sample(range(40), rng.randrange(1, 4)))
        maps = [rng.randrange(1, 1 << part_count(RUN.page_size(o), PART)) for o in ordinals]
        lease = self.cache.core.lease_resident(RUN.key, ordinals, maps)
        if lease is None and rng.random() < 0.8:
            lease = self.cache.core.lease_local(RUN.key, ordinals, maps)
            self.local += lease is not None
        if lease is None:
            lease = wait(self.cache.core.read_pages(RUN, ordinals, maps, load), self.cache.loop)
        with lease:
            for i, (ordinal, parts) in enumerate(zip(ordinals, maps)):
                if lease.outcomes[i] is Outcome.HIT:
                    self.hits += 1
                    truth, view = page(ordinal), lease.view(i)
                    for part in range(4):
                        low, high = part * PART, (part + 1) * PART
                        if parts >> part & 1 and view[low:high] != truth[low:high]:
                            self.wrong.append(f"page {ordinal} part {part}")

    def delete(self, rng: random.Random) -> None:
        labels = self.some(rng)
        self.cache.delete([name(n) for n in labels])
        if rng.random() < 0.3:
            self.cache.delete([Name(RUN.key, rng.randrange(40))])

    def flush(self, rng: random.Random) -> None:
        self.cache.flush()


def name(label: int) -> Name:
    return Name(object_key("threads", str(label)))


@pytest.mark.slow
def test_threads_on_a_small_cache_with_an_ssd_read_no_wrong_byte(tmp_path: Path) -> None:
    interval = sys.getswitchinterval()
    options = {"memory_bytes": 6 * MIB, "ssd_bytes": 32 * MIB, "segment_bytes": 2 * MIB, "page_bytes": PAGE}
    with tiercache.open(tmp_path, **options, queue_bytes=2 * MIB, disk_free_floor_bytes=0, slots_max=1024) as cache:
        crowd = Crowd(cache)
        sys.setswitchinterval(1e-5)
        try:
            with ThreadPoolExecutor(6) as pool:
                futures = [pool.submit(crowd.run, seed) for seed in range(6)]
                crowd.stop.wait(2.0)
                crowd.stop.set()
                for future in futures:
                    future.result(PATIENCE_S)
        finally:
            crowd.stop.set()
            sys.setswitchinterval(interval)
        assert not crowd.wrong, crowd.wrong[:5]
        assert crowd.hits > 50 and crowd.local
        cache.flush()
        gc.collect()
        core = cache.core
        core.tiers.drain()
        core.tiers.index.validate()
        for status in (core.tiers.memory.status(), core.tiers.ssd.status()):
            assert status.used_bytes <= status.capacity_bytes
        states = np.asarray(core.tiers.index.state)
        assert not np.isin(states, [State.PENDING, State.EVICTING]).any()
        target = bytearray(100)
        assert cache.put(["last"], [b"v" * 100]) == [Outcome.HIT]
        assert cache.get_into(["last"], [Buffer.of(target, writable=True)]) == [Outcome.HIT]
    with tiercache.open(tmp_path, **options, queue_bytes=2 * MIB, disk_free_floor_bytes=0, slots_max=1024) as cache:
        crowd = Crowd(cache)
        rng = random.Random(1)
        for _ in range(100):
            crowd.get(rng)
            crowd.pages(rng)
        assert not crowd.wrong, crowd.wrong[:5]
