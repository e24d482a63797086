"""Every policy through the one suite."""

from __future__ import annotations

import numpy as np

from tiercache.policy import POLICIES
from tiercache.policy.lru import LRU
from tiercache.testing.policies import PlainColumns, PlainLRU, PolicyContract, TwoQueues


class TestLRU(PolicyContract):
    def make(self):
        return POLICIES["lru"]()

    def twin(self):
        return PlainLRU()


class TestLRUNearOverflow(PolicyContract):
    """Ticks run out every thirty moments."""

    def make(self):
        return LRU(ticks_max=260)

    def twin(self):
        return PlainLRU()


class TestPlainLRU(PolicyContract):
    """The twin passes its own suite."""

    def make(self):
        return PlainLRU()

    def twin(self):
        return PlainLRU()


class TestTwoQueues(PolicyContract):
    def make(self):
        return TwoQueues(100)


def test_ghosts_change_the_order():
    """What comes back while its name is remembered outlives what comes for the first time."""
    policy = TwoQueues(100)
    policy.attach(PlainColumns(50))
    slots = np.arange(10)
    policy.insert(slots, slots.astype(np.uint64) + 1)
    gone = policy.victims(3)
    policy.remove(gone, gone.astype(np.uint64) + 1)
    assert policy.ghosts.count == 3
    policy.insert(np.array([20]), np.array([gone[0] + 1], np.uint64))
    assert policy.ghosts.count == 2
    named = [policy.victims(1).tolist()[0] for _ in range(8)]
    assert named[-1] == 20


def test_ghosts_are_bounded():
    policy = TwoQueues(5)
    policy.attach(PlainColumns(50))
    for low in range(0, 40, 10):
        slots = np.arange(low, low + 10)
        policy.insert(slots, slots.astype(np.uint64) + 1)
        policy.remove(slots, slots.astype(np.uint64) + 1)
    assert policy.ghosts.count == 5


def test_leaf_first_within_a_moment():
    columns = PlainColumns(50)
    columns.depth[:10] = np.arange(10)
    policy = LRU()
    policy.attach(columns)
    policy.insert(np.arange(10))
    policy.touch(np.arange(4))
    assert policy.victims(10).tolist() == [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]


def test_one_pass_serves_many_batches():
    """The queue is refilled for some percent of the slots, not for each batch, and stays exact."""
    policy = LRU()
    policy.attach(PlainColumns(100_000))
    for low in range(0, 100_000, 100):
        policy.insert(np.arange(low, low + 100))
    policy.touch(np.arange(0, 50_000))
    first = np.concatenate([policy.victims(64) for _ in range(8)])
    assert sorted((first // 100).tolist()) == sorted(np.repeat(np.arange(500, 506), 100)[:512].tolist())
