"""What a cache says of everything that it holds, and giving space back by key and by age."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiercache
from tiercache.cache.survey import held_bytes
from tiercache.errors import ConfigError
from tiercache.keys import object_key
from tiercache.lease import PageRun
from tiercache.model import Name, Outcome, TierId, all_parts
from tiercache.sync import BlockingCache, wait

MIB = 1 << 20
OPTIONS = {"memory_bytes": 32 * MIB, "disk_free_floor_bytes": 0}
KEY = b"k" * 32
PART = 16 << 10


@pytest.fixture(params=[0, 64 * MIB], ids=["memory", "ssd"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    with tiercache.open(tmp_path, ssd_bytes=request.param, **OPTIONS) as opened:
        yield opened


def call(cache: BlockingCache, question: str, **arguments: Any) -> Any:
    answer = wait(cache.core.call(question, arguments), cache.loop)
    assert json.loads(json.dumps(answer)) == answer
    return answer


def fill(cache: BlockingCache) -> None:
    """Two lone objects, and two pages of a file, the second one in part."""
    assert cache.put(["a", "b"], [b"x" * 1000, b"y" * 3 * MIB]) == [Outcome.HIT] * 2
    run = PageRun(KEY, MIB + 100_000, MIB, PART)

    async def load(gaps: Any, landed: Any) -> None:
        landed(range(len(gaps)))  # whatever the memory held

    async def read() -> None:
        (await cache.core.read_pages(run, [0, 1], [0b11, 0b1000000], load)).release()

    wait(read(), cache.loop)
    cache.flush()


def test_contents_by_key_in_pieces(cache: BlockingCache, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(cache)
    durable = cache.core.durable
    whole = {row[0]: row[1:] for row in call(cache, "contents")["rows"]}
    for name, form, kind, entries, size in [
        (object_key("", "a"), "lone", "tensor", 1, 1000),
        (object_key("", "b"), "lone", "tensor", 1, 3 * MIB),
        (KEY, "page", "page", 2, 2 * PART + 100_000 - 6 * PART),
    ]:
        assert whole.pop(name.hex()) == [form, kind, entries, size, size if durable else 0]
    assert not whole
    monkeypatch.setattr("tiercache.cache.survey.SLOTS_AT_ONCE", 1)
    after, entries = 0, 0
    for turn in range(4):
        piece = call(cache, "contents", after=after)
        entries += sum(row[3] for row in piece["rows"])
        after = piece["after"]
        assert bool(after) == (turn < 3)
    assert entries == 4


def test_held_and_evict_by_key(cache: BlockingCache) -> None:
    fill(cache)
    size = 2 * PART + 100_000 - 6 * PART
    assert call(cache, "held", keys=[KEY.hex(), "00" * 16]) == [[size, size if cache.core.durable else 0], [0, 0]]
    gone = call(cache, "evict", keys=[KEY.hex(), object_key("", "a").hex(), "00" * 16])
    assert gone == {"evicted_bytes": size + 1000, "evicted_entries": 3, "held_bytes": 3 * MIB}
    assert call(cache, "held", keys=[KEY.hex()]) == [[0, 0]]
    assert cache.get(["a"]) == [Outcome.MISS]


def test_evict_by_age(cache: BlockingCache) -> None:
    names = [str(i) for i in range(10)]
    cache.put(names, [bytes([i]) * MIB for i in range(10)])
    cache.flush()
    for name in ("0", "1", "2"):
        cache.get([name])
    assert call(cache, "evict", down_to=3 * MIB + 1) == {
        "evicted_bytes": 7 * MIB,
        "evicted_entries": 7,
        "held_bytes": 3 * MIB,
    }
    assert [value != Outcome.MISS for value in cache.get(names)] == [True] * 3 + [False] * 7
    assert call(cache, "evict", down_to=0)["held_bytes"] == 0
    assert call(cache, "contents") == {"after": 0, "rows": []}
    status = call(cache, "status")
    assert status["memory"]["capacity_bytes"] == 32 * MIB and status["memory"]["health"] == "healthy"
    assert ("ssd" in status) == cache.core.durable


@pytest.mark.parametrize(
    ("question", "arguments"),
    [("bogus", {}), ("evict", {}), ("evict", {"keys": 7}), ("held", {"keys": ["xyz"]}), ("contents", {"after": "x"})],
)
def test_odd_questions_are_refused(tmp_path: Path, question: str, arguments: dict[str, Any]) -> None:
    with (
        tiercache.open(tmp_path, ssd_bytes=0, **OPTIONS) as cache,
        pytest.raises(ConfigError, match=question),
    ):
        call(cache, question, **arguments)


def test_what_comes_while_much_is_evicted_stays(tmp_path: Path) -> None:
    """Also where it could take the place of something that is to go, and went before its turn."""
    old, new = ([Name(object_key(space, str(i))) for i in range(2000)] for space in ("old", "new"))
    with tiercache.open(tmp_path, ssd_bytes=64 * MIB, **OPTIONS) as cache:
        core = cache.core
        index = core.tiers.index

        async def mixed(by_key: bool) -> None:
            await core.put(old, [b"v" * 100] * len(old), durable=True)
            doomed = index.names(np.sort(index.residents(TierId.SSD)))  # in the order in which they go
            how = {"keys": [name.key.hex() for name in doomed]} if by_key else {"down_to": 0}
            evicting = asyncio.create_task(core.call("evict", how))
            while index.contains(doomed[:1]).any():
                await asyncio.sleep(0)
            assert await core.delete(doomed[-1:]) == [Outcome.HIT]
            putting = asyncio.create_task(core.put(new, [b"n" * 100] * len(new), durable=True))
            assert (await evicting)["evicted_entries"] == len(old)
            assert await putting == [Outcome.HIT] * len(new)
            assert index.contains(new).all() and not index.contains(old).any()
            await core.delete(new)

        for by_key in (False, True):
            wait(mixed(by_key), cache.loop)
            assert call(cache, "validate") == {"broken": "", "pins": 0, "entries": 0}


def test_evicted_stays_evicted(tmp_path: Path) -> None:
    with tiercache.open(tmp_path, ssd_bytes=64 * MIB, **OPTIONS) as cache:
        cache.put(["a", "b"], [b"1" * 1000, b"2" * 1000], durable=True)
        call(cache, "evict", keys=[object_key("", "a").hex()])
    with tiercache.open(tmp_path, ssd_bytes=64 * MIB, **OPTIONS) as cache:
        assert call(cache, "held", keys=[]) == []
        assert cache.get(["a", "b"]) == [Outcome.MISS, b"2" * 1000]


def test_held_bytes() -> None:
    sizes, steps, maps = [], [], []
    for size, step in [(0, 64), (1, 64), (64, 64), (65, 64), (4096, 64), (4000, 64)]:
        for parts in (0, 1, all_parts(size, step), all_parts(size, step) & ~1):
            sizes.append(size), steps.append(step), maps.append(parts)
    want = [
        sum(min(step, size - i * step) for i in range(64) if parts >> i & 1 and size > i * step)
        for size, step, parts in zip(sizes, steps, maps)
    ]
    got = held_bytes(np.array(sizes, np.uint32), np.array(steps, np.uint32), np.array(maps, np.uint64))
    assert got.tolist() == want


def test_the_index_is_checked(cache: BlockingCache) -> None:
    fill(cache)
    assert cache.flush() or not cache.core.durable
    with cache.lease(["a"]):
        assert call(cache, "validate") == {"broken": "", "pins": 1, "entries": 4}
    slots = cache.core.tiers.index._slots
    slots.evicting += 1
    assert "EVICTING" in call(cache, "validate")["broken"]
    slots.evicting -= 1
    assert call(cache, "validate") == {"broken": "", "pins": 0, "entries": 4}
