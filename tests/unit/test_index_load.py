"""Bulk insert at recovery, against inserting row by row into a dictionary."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest

from tiercache.index import Index
from tiercache.index.load import CHUNK
from tiercache.model import Facts, Form, Name, State, TierId
from tiercache.policy.lru import LRU
from tiercache.testing.policies import TwoQueues

SSD, MEMORY = TierId.SSD, TierId.MEMORY


def facts_of(rows):
    """rows: (form, key, ordinal, parent, tick). Locations count from 100."""
    count = len(rows)
    pad = lambda keys: np.frombuffer(b"".join(k.ljust(32, b"\0") for k in keys), np.uint8).reshape(count, 32)  # noqa: E731
    return Facts(
        forms=np.array([r[0] for r in rows], np.uint8),
        keys=pad([r[1] for r in rows]),
        widths=np.array([len(r[1]) for r in rows], np.uint8),
        parents=pad([r[3] for r in rows]),
        parent_widths=np.array([len(r[3]) for r in rows], np.uint8),
        ordinals=np.array([r[2] for r in rows], np.int32),
        kinds=np.full(count, 1, np.uint8),
        scopes=np.full(count, 7, np.uint16),
        sizes=np.arange(1, count + 1, dtype=np.uint32),
        part_bytes=np.full(count, 65536, np.uint32),
        parts=np.full(count, 3, np.uint64),
        locations=np.arange(100, 100 + count),
        costs_s=np.full(count, 0.5, np.float32),
        expiries_s=np.full(count, 9, np.uint32),
        ticks=np.array([r[4] for r in rows], np.uint32),
    )


def some(facts, rows):
    return Facts(**{f.name: getattr(facts, f.name)[rows] for f in dataclasses.fields(Facts)})


def rows_of(rng, count):
    """Files of one to four pages, lone objects, chains that branch, both widths, some rows twice; in random order."""
    rows = []
    chains = [(b"", -1)]
    while len(rows) < count:
        key = rng.randbytes(rng.choice((16, 32)))
        pick = rng.random()
        if pick < 0.4:
            rows += [(Form.PAGE, key, i, b"", rng.randrange(1000)) for i in rng.sample(range(50), rng.randint(1, 4))]
        elif pick < 0.6:
            rows.append((Form.LONE, key, 0, b"", rng.randrange(1000)))
        else:
            parent, depth = rng.choice(chains)
            key = rng.randbytes(len(parent) or 16 * rng.randint(1, 2))
            chains.append((key, depth + 1))
            rows.append((Form.BLOCK, key, depth + 1, parent, rng.randrange(1000)))
        if rng.random() < 0.1:
            rows.append(rng.choice(rows))
    rng.shuffle(rows)
    return rows[:count]


@pytest.mark.parametrize("policy", [LRU, lambda: TwoQueues(50)])
@pytest.mark.parametrize("seed", range(6))
def test_against_a_dictionary(seed, policy):
    rng = random.Random(seed)
    rows = rows_of(rng, 600)
    facts = facts_of(rows)
    index = Index(1000, [policy(), policy()])
    wanted, surplus = {}, []
    for i, row in enumerate(rows):
        if (row[1], row[2]) in wanted:
            surplus.append(100 + i)
        else:
            wanted[row[1], row[2]] = i
    linked = {b""}
    blocks = sorted((i for i in wanted.values() if rows[i][0] == Form.BLOCK), key=lambda i: rows[i][2])
    for i in blocks:
        if rows[i][3] in linked:
            linked.add(rows[i][1])
    loaded = index.load(facts, SSD)
    index.validate()
    assert set(loaded.surplus.tolist()) <= set(surplus)
    gone = [i for i in blocks if rows[i][1] not in linked]
    assert {rows[i][1] for i in loaded.waiting.tolist()} == {rows[i][1] for i in gone}
    assert loaded.taken == len(wanted) - len(gone) == index.used
    for (key, ordinal), i in wanted.items():
        match = index.match([Name(key, ordinal)])
        assert (match.slots[0] > 0) == (i not in gone)
        if i not in gone:
            found = index.facts(match.slots)
            assert found.ssd_location[0] == 100 + i
            assert found.size[0] == i + 1
            assert (found.scope[0], found.kind[0], found.expiry_s[0], found.ssd_parts[0]) == (7, 1, 9, 3)
            assert found.state[0] == State.RESIDENT
            assert found.memory_location[0] == -1
            assert index.names(match.slots) == [Name(key, ordinal)]
        index.release(match)


def test_the_same_again_changes_nothing():
    rng = random.Random(9)
    facts = facts_of(rows_of(rng, 300))
    index = Index(1000, [LRU(), LRU()])
    used = index.load(facts, SSD).taken
    again = index.load(facts, SSD)
    index.validate()
    assert (again.taken, index.used) == (0, used)
    match = index.slots_at(SSD, again.surplus)
    assert (match < 0).all(), "what is in the index is no surplus"


def test_children_before_parents_come_in_a_later_call():
    digests = [bytes([i]) * 16 for i in range(1, 7)]
    rows = [(Form.BLOCK, d, i, digests[i - 1] if i else b"", 5) for i, d in enumerate(digests)][::-1]
    facts = facts_of(rows)
    index = Index(100, [LRU(), LRU()])
    first = index.load(some(facts, np.arange(3)), SSD)
    assert (first.taken, first.waiting.tolist()) == (0, [2, 1, 0])
    assert index.load(some(facts, np.arange(3, 6)), SSD).taken == 3
    assert index.load(some(facts, first.waiting), SSD).taken == 3
    index.validate()
    assert len(index.match_chain(digests).slots) == 6


def test_a_wrong_depth_is_left_out():
    rows = [(Form.BLOCK, b"a" * 16, 0, b"", 1), (Form.BLOCK, b"b" * 16, 5, b"a" * 16, 1)]
    loaded = Index(10, [LRU(), LRU()]).load(facts_of(rows), SSD)
    assert loaded.waiting.tolist() == [1]


def test_a_full_table_takes_the_newest():
    rows = [(Form.PAGE, bytes([i]) * 16, 0, b"", 1) for i in range(1, 30)]
    index = Index(10, [LRU(), LRU()])
    loaded = index.load(facts_of(rows), SSD)
    index.validate()
    assert loaded.taken == 10
    assert loaded.surplus.tolist() == list(range(110, 129))
    assert index.contains([Name(r[1], 0) for r in rows]).tolist() == [True] * 10 + [False] * 19


def test_what_came_meanwhile_joins():
    """An entry that was put while recovery ran gets its copy on SSD, if it is the same; another shape is surplus."""
    rows = [(Form.PAGE, b"k" * 16, 0, b"", 1), (Form.PAGE, b"k" * 16, 1, b"", 1)]
    index = Index(10, [LRU(), LRU()])
    made = index.reserve_pages(b"k" * 16, np.array([0, 1], np.int32), [1, 99], 65536)
    index.place(made.slots, MEMORY, [0, 1], 1)
    index.release(made)
    loaded = index.load(facts_of(rows), SSD)
    assert (loaded.taken, loaded.surplus.tolist()) == (1, [101])
    assert index.facts(made.slots).ssd_location.tolist() == [100, -1]
    index.validate()


def test_the_order_of_last_use_comes_back():
    rng = random.Random(4)
    ticks = rng.sample(range(5000), 200)
    rows = [(Form.LONE, rng.randbytes(16), 0, b"", tick) for tick in ticks]
    index = Index(300, [LRU(), LRU()])
    young = index.reserve([Name(b"y" * 16)], 1, 65536)
    index.place(young.slots, SSD, [1], 1)
    index.release(young)
    index.load(some(facts_of(rows), np.arange(100)), SSD)
    index.load(some(facts_of(rows), np.arange(100, 200)), SSD)
    names = []
    while len(victims := index.victims(SSD, 16)):
        names += [name.key for name in index.names(victims)]
        index.unplace(victims, SSD)
    assert names == [*(row[1] for row in sorted(rows, key=lambda row: row[4])), b"y" * 16]


@pytest.mark.slow
def test_many_chunks():
    """More rows than one lock hold takes, with files that cross the border."""
    rng = np.random.default_rng(2)
    files = rng.integers(1, 5, CHUNK)
    keys = [rng.bytes(32) for _ in files]
    rows = [(Form.PAGE, key, i, b"", 1) for key, count in zip(keys, files.tolist()) for i in range(count)]
    index = Index(len(rows), [LRU(), LRU()])
    assert index.load(facts_of(rows), SSD).taken == len(rows)
    assert index._names.runs.rows.used == len(keys)
    assert index._names.runs.count[index._names.runs.find(keys[3])] == files[3]
