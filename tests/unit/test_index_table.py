"""The packed hash table and the free list under the index."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tiercache.index.runs import PageRuns, fold, folds
from tiercache.index.table import RowStack, RowTable


@pytest.mark.skipif(not __debug__, reason="asserts are off")
def test_rows_are_consecutive_until_they_are_recycled():
    rows = RowStack(10)
    assert rows.take(4).tolist() == [1, 2, 3, 4]
    rows.give(np.array([4, 3, 2]))
    assert rows.take(5).tolist() == [2, 3, 4, 5, 6]
    assert (rows.used, rows.room, rows.top) == (6, 4, 7)
    assert rows.take(0).tolist() == []
    with pytest.raises(AssertionError):
        rows.take(5)


@pytest.mark.parametrize("crowded", [False, True])
def test_table_against_a_dictionary(crowded):
    """Also when everything falls into few buckets."""
    rng = random.Random(3)
    table, keys = RowTable(500), np.zeros(501, np.uint64)
    keys[0] = 2**64 - 1
    twin: dict[int, int] = {}
    free = list(range(1, 501))

    def buckets(some):
        found = table.buckets(np.array(some, np.uint64))
        return found % 3 if crowded else found

    def find(some):
        asked = np.array(some, np.uint64)
        return table.find(buckets(some), lambda rows, at: keys[rows] == asked[at]).tolist()

    for _ in range(300):
        new = [k for k in rng.sample(range(2000), 5) if k not in twin][: len(free)]
        rows = [free.pop(rng.randrange(len(free))) for _ in new]
        keys[rows] = new
        if rng.random() < 0.5:
            table.add_many(np.array(rows, np.int64), buckets(new))
        else:
            for row, bucket in zip(rows, buckets(new).tolist()):
                table.add(row, bucket)
        twin |= dict(zip(new, rows))
        for key in rng.sample(sorted(twin), min(len(twin), rng.randrange(9))):
            row = twin.pop(key)
            table.discard(row, int(buckets([key])[0]))
            free.append(row)
            keys[row] = 2**64 - 2
        some = rng.sample(range(2000), 50)
        assert find(some) == [twin.get(key, 0) for key in some]


@pytest.mark.skipif(not __debug__, reason="asserts are off")
def test_discarding_a_stranger_is_caught():
    table = RowTable(10)
    table.add(1, 2)
    with pytest.raises(AssertionError):
        table.discard(3, 2)


def test_scalar_and_vector_hash_agree():
    rng = np.random.default_rng(1)
    table = RowTable(1000)
    for columns in (2, 4):
        words = rng.integers(0, 1 << 64, (50, columns), np.uint64)
        wanted = [table.bucket(fold(tuple(row))) for row in words.tolist()]
        assert table.buckets(folds(words)).tolist() == wanted


@pytest.mark.parametrize("width", [16, 32])
def test_page_runs(width):
    runs = PageRuns(20)
    keys = [bytes([i]) * width for i in range(1, 8)]
    rows = [runs.add(key) for key in keys]
    assert [runs.find(key) for key in keys] == rows
    assert [runs.key_of(row) for row in rows] == keys
    words = np.frombuffer(b"".join([*keys, bytes(width)]), np.uint64).reshape(-1, width // 8)
    assert runs.find_many(words, width).tolist() == [*rows, 0]
    other = keys[0].ljust(32, b"\0") if width == 16 else keys[0][:16]
    assert runs.find(other) == 0
    runs.drop(rows[3])
    assert runs.find(keys[3]) == 0
    assert runs.find(keys[4]) == rows[4]
    assert runs.add_many(words[3:4], width).tolist() == [rows[3]]
    assert runs.find(keys[3]) == rows[3]
