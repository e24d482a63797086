"""Arguments of saves and loads: what does not fit is refused in the caller's thread, with the way out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import tiercache
from tests.kv_matrix.engine import Rank, layout_of
from tiercache.errors import ConfigError
from tiercache.kv.layout import Rule, Span
from tiercache.kv.planes import Planes, paged
from tiercache.kv.runs import Table
from tiercache.kv.shard import Shard
from tiercache.model import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tiercache.sync import BlockingCache

PATIENCE_S = 30.0
HIT = Outcome.HIT
PAGES = 6


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[BlockingCache]:
    with tiercache.open(tmp_path, memory_bytes="64MiB", ssd_bytes=0, share=False) as made:
        yield made


def table_of(ids: list[int], tokens: int = 16, first: int = 0) -> Table:
    return Table(np.array(ids, np.int64), tokens, first)


BAD: list[tuple[str, Table, dict[str, int], str]] = [
    ("no page for the last block", table_of([0, 1, 2]), {}, r"rows \[0, 64\).*places for \[0, 48\).*pass a page"),
    ("no page for the first block", table_of([0, 1, 2], first=16), {}, r"places for \[16, 64\).*other `start`"),
    ("no pages at all", table_of([]), {}, r"places for \[0, 0\)"),
    ("a page beyond the planes", table_of([0, 1, 2, PAGES]), {}, "page ids 0 to 6, and the planes have pages 0 to 5"),
    ("a page below the planes", table_of([0, 1, -1, 3]), {}, "page ids -1 to 3"),
    ("pages of another size", table_of([0, 1], 32), {}, "32 tokens a page, where the planes have 16"),
    ("fewer keys than blocks", table_of([0, 1, 2, 3, 4]), {"stop": 5}, r"\[0, 5\) are not in a sequence of 4 keys"),
    ("blocks that run backwards", table_of([0, 1, 2, 3]), {"start": 3, "stop": 2}, r"\[3, 2\)"),
]


@pytest.mark.parametrize("operation", ["save", "load"])
@pytest.mark.parametrize(("table", "span", "message"), [each[1:] for each in BAD], ids=[each[0] for each in BAD])
def test_what_does_not_fit_is_refused_at_the_call(
    cache: BlockingCache, operation: str, table: Table, span: dict[str, int], message: str
) -> None:
    layout = layout_of("GQA")
    planes = Rank(layout, Shard.whole(layout), 16, PAGES).planes
    with cache.kv(layout) as store:
        keys = store.keys(range(64))
        with pytest.raises(ConfigError, match=message):
            getattr(store, operation)(keys, planes, table, **span)
        assert not cache.core.metrics.total("tiercache_internal_errors_total")
        assert store.match(keys).length == 0


@pytest.mark.parametrize("operation", ["save", "load"])
@pytest.mark.parametrize("wrong", [b"short", b"x" * 32, "a text of 16 ch.", None])
def test_keys_of_another_kind_are_refused_at_the_call(cache: BlockingCache, operation: str, wrong: Any) -> None:
    layout = layout_of("GQA")
    planes = Rank(layout, Shard.whole(layout), 16, PAGES).planes
    with cache.kv(layout) as store:
        keys = [*store.keys(range(32)), wrong]
        with pytest.raises(ConfigError, match=r"which is 16 bytes: pass what `KvStore.keys` gave"):
            getattr(store, operation)(keys, planes, table_of([0, 1, 2]))
        with pytest.raises(ConfigError, match="no key of a block"):  # what the first block hangs under
            getattr(store, operation)([wrong, *keys[:2]], planes, table_of([0, 1, 2]), start=1)
        # Only what is asked for has to be right.
        assert store.save(keys, planes, table_of([0, 1]), stop=2).wait(PATIENCE_S) == [HIT] * 2
        assert getattr(store, operation)(keys, planes, table_of([0, 1]), stop=2).wait(PATIENCE_S) == [HIT] * 2


def test_keys_that_resist_collisions_are_longer(cache: BlockingCache) -> None:
    layout = layout_of("GQA", collision_resistant=True)
    planes = Rank(layout, Shard.whole(layout), 16, PAGES).planes
    with cache.kv(layout) as store:
        keys = store.keys(range(32))
        assert store.save(keys, planes, table_of([3, 1])).wait(PATIENCE_S) == [HIT] * 2
        with pytest.raises(ConfigError, match="32 bytes"):
            store.save([b"x" * 16], planes, table_of([3]))


def test_only_pages_of_the_blocks_asked_for_have_to_be_right(cache: BlockingCache) -> None:
    """Engines put anything into their tables where a sliding window has let pages go."""
    layout = layout_of("GQA")
    planes = Rank(layout, Shard.whole(layout), 16, PAGES).planes
    with cache.kv(layout) as store:
        keys = store.keys(range(96))
        assert store.save(keys[:2], planes, table_of([0, 1, 99])).wait(PATIENCE_S) == [HIT] * 2
        odd = table_of([-1, 99, 2, 3, -7])
        assert store.save(keys, planes, odd, start=2, stop=4).wait(PATIENCE_S) == [HIT] * 2
        assert store.load(keys, planes, odd, start=2, stop=4).wait(PATIENCE_S) == [HIT] * 2
        late = table_of([4, 5], first=32)
        assert store.load(keys, planes, late, start=2, stop=4).wait(PATIENCE_S) == [HIT] * 2
        assert store.load(keys, planes, table_of([]), start=2, stop=2).wait(PATIENCE_S) == []
        with pytest.raises(ConfigError, match="page ids 3 to 99"):
            store.load(keys, planes, table_of([0, 1, 99, 3]), start=2, stop=4)


def test_pages_larger_than_blocks_are_counted_in_rows(cache: BlockingCache) -> None:
    layout = layout_of("GQA")
    planes = Rank(layout, Shard.whole(layout), 64, 2).planes
    with cache.kv(layout) as store:
        keys = store.keys(range(96))
        assert store.save(keys, planes, table_of([1, 0], 64)).wait(PATIENCE_S) == [HIT] * 6
        assert store.save(keys[:4], planes, table_of([1], 64)).wait(PATIENCE_S) == [HIT] * 4
        with pytest.raises(ConfigError, match=r"rows \[0, 80\).*places for \[0, 64\)"):
            store.save(keys[:5], planes, table_of([1], 64))


def test_states_are_one_row_a_block(cache: BlockingCache) -> None:
    state = layout_of("MQA", rule=Rule(Span.STATE))
    planes = Rank(state, Shard.whole(state), 1, PAGES).planes
    with cache.kv(state) as store:
        keys = store.keys(range(128))
        assert store.save(keys, planes, table_of([0, 1, 2], 1), start=1, stop=3).wait(PATIENCE_S) == [HIT] * 2
        with pytest.raises(ConfigError, match=r"rows \[1, 4\)"):
            store.save(keys, planes, table_of([0, 1, 2], 1), start=1, stop=4)


def test_nothing_is_loaded_into_memory_that_is_read_only(cache: BlockingCache) -> None:
    layout = layout_of("GQA")
    memory = Rank(layout, Shard.whole(layout), 16, PAGES).memory
    memory.setflags(write=False)
    planes = Planes(layout, Shard.whole(layout), paged(memory, "lphtC", layers=range(12), heads=range(2), k_dim=64))
    with cache.kv(layout) as store:
        keys = store.keys(range(32))
        assert store.save(keys, planes, table_of([0, 1])).wait(PATIENCE_S) == [HIT] * 2
        with pytest.raises(ConfigError, match="read-only: pass the engine's own tensors"):
            store.load(keys, planes, table_of([0, 1]))
