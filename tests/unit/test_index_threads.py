"""Threads on one index, switching as often as the interpreter can."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from tiercache.index import Index
from tiercache.model import Name, TierId
from tiercache.policy.lru import LRU

MEMORY = TierId.MEMORY
KEYS = [bytes([i]) * 32 for i in range(1, 5)]
CHAIN = [bytes([i]) * 16 for i in range(100, 130)]


@pytest.fixture
def often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


class Worker:
    """Puts, looks up, evicts and deletes at random; keeps account of locations that it was given to free."""

    def __init__(self, index, seed, locations):
        self.index, self.rng, self.locations = index, random.Random(seed), locations
        self.placed, self.freed, self.fault = [], [], None

    def free(self, freed):
        self.freed += [] if freed is None else freed.memory

    def fill(self, made):
        fresh = made.slots[made.fresh & (made.slots > 0)]
        if len(fresh):
            where = [next(self.locations) for _ in fresh]
            self.placed += where
            self.freed += self.index.place(fresh, MEMORY, where, 1)
        self.free(self.index.release(made))

    def step(self):
        rng, index = self.rng, self.index
        ordinals = np.array(rng.sample(range(12), 4), np.int32)
        pick = rng.randrange(7)
        if pick == 0:
            self.fill(index.reserve_pages(rng.choice(KEYS), ordinals, 10, 64))
        elif pick == 1:
            self.fill(index.reserve_chain(CHAIN[: rng.randrange(1, 30)], 10, 64))
        elif pick == 2:
            match, locations, _ = index.hit_pages(rng.choice(KEYS), ordinals)
            found = match.slots[match.slots > 0]
            assert (index.facts(found).memory_location == locations[match.slots > 0]).all(), "moved under a pin"
            self.free(index.release(match))
        elif pick == 3:
            match = index.match_chain(CHAIN[: rng.randrange(1, 30)])
            before = index.facts(match.slots).memory_location
            assert (before >= 0).all()
            assert (index.facts(match.slots).memory_location == before).all(), "moved under a pin"
            self.free(index.release(match))
        elif pick == 4:
            victims = index.victims(MEMORY, 5)
            self.freed += [x for x in index.unplace(victims, MEMORY).locations.tolist() if x >= 0]
        elif pick == 5:
            match = index.match([Name(rng.choice(KEYS), rng.randrange(12)), Name(rng.choice(CHAIN))])
            if rng.random() < 0.2:
                self.free(index.remove(match.slots[match.slots > 0]))
            self.free(index.release(match))
        else:
            slot = index.hit(rng.choice(KEYS), rng.randrange(12))
            if slot > 0:
                self.free(index.release_slot(slot))

    def run(self):
        try:
            for _ in range(400):
                self.step()
        except BaseException as fault:
            self.fault = fault


class Locations:
    """Numbers for all threads."""

    def __init__(self):
        self._lock, self._n = threading.Lock(), 0

    def __next__(self):
        with self._lock:
            self._n += 1
            return self._n


@pytest.mark.slow
@pytest.mark.usefixtures("often")
def test_threads():
    index, locations = Index(40, [LRU(), LRU()]), Locations()
    workers = [Worker(index, seed, locations) for seed in range(4)]
    threads = [threading.Thread(target=worker.run) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for worker in workers:
        if worker.fault:
            raise worker.fault
    index.validate()
    assert index.pins == 0
    workers[0].free(index.remove(np.flatnonzero(index.state)))
    assert index.used == 0
    placed = sorted(x for worker in workers for x in worker.placed)
    assert sorted(x for worker in workers for x in worker.freed) == placed, "each location came back once"
