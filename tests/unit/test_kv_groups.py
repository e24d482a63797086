"""Model.usable against its definition, taken word by word; and groups of one model over a real cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiercache
from tests.kv_matrix.engine import Rank, layout_of, truth_of
from tiercache.errors import ConfigError
from tiercache.kv.groups import Model, Usable
from tiercache.kv.layout import FULL, STATE, Rule, Span
from tiercache.kv.shard import Shard
from tiercache.model import Outcome

if TYPE_CHECKING:
    from pathlib import Path

RULES = st.one_of(st.just(FULL), st.just(STATE), st.integers(1, 100).map(lambda window: Rule(Span.SLIDING, window)))


def fits(rule: Rule, present: bytes, n: int, block_tokens: int) -> bool:
    """Whether a group has all that a prefix of n blocks needs: which tokens the next token looks back at."""
    if rule.span is Span.FULL:
        wanted = range(n)
    elif rule.span is Span.STATE:
        wanted = range(max(0, n - 1), n)
    else:
        first_token = max(0, n * block_tokens - (rule.window - 1))
        wanted = range(n) if not n else range(first_token // block_tokens, n) if rule.window > 1 else range(0)
    return all(i < len(present) and present[i] for i in wanted)


@given(
    st.lists(
        st.tuples(RULES, st.binary(max_size=12).map(lambda raw: bytes(b % 4 for b in raw))), min_size=1, max_size=4
    )
)
def test_the_longest_prefix_that_every_group_can_use(groups: list[tuple[Rule, bytes]]) -> None:
    model = Model([layout_of("MQA", rule=rule) for rule, _ in groups])
    present = [there for _, there in groups]
    longest = max(len(there) for there in present)
    found = model.usable(present)
    good = [n for n in range(longest + 1) if all(fits(rule, there, n, 16) for rule, there in groups)]
    assert found.length == max(good)
    for (rule, there), blocks, tiers in zip(groups, found.ranges, found.tiers, strict=True):
        assert tiers == there[blocks.start : blocks.stop]
        assert all(tiers)
        assert blocks.stop == found.length
        if rule.span is Span.FULL:
            assert blocks.start == 0
    for most in range(longest + 1):
        assert model.usable(present, most).length == max(n for n in good if n <= most)


def test_examples() -> None:
    full, sliding, state = (layout_of("MQA", rule=rule) for rule in (FULL, Rule(Span.SLIDING, 33), STATE))
    here = b"\1"
    assert Model([full]).usable([here * 5 + b"\0" + here]).length == 5
    # The last two blocks before the end are in a window of 33 tokens.
    assert Model([full, sliding]).usable([here * 9, b"\0\0" + here * 5]) == Usable(
        7, (range(7), range(5, 7)), (here * 7, here * 2)
    )
    assert Model([full, sliding]).usable([here * 9, b"\0" * 9]).length == 0
    assert Model([full, state]).usable([here * 9, b"\0\0\1\0\2\0"]) == Usable(
        5, (range(5), range(4, 5)), (here * 5, b"\2")
    )
    assert Model([full, state]).usable([here * 9, b"\0\0\1\0\2\0"], 4).length == 3
    assert Model([state]).usable([b""]).length == 0


def test_groups_of_one_model_have_one_block_size() -> None:
    with pytest.raises(ConfigError, match="same block_tokens"):
        Model([layout_of("MQA"), layout_of("MQA", block_tokens=32)])
    with pytest.raises(ConfigError, match="1 answers for 2 groups"):
        Model([layout_of("MQA"), layout_of("GQA")]).usable([b""])


def test_a_hybrid_model_over_a_cache(tmp_path: Path) -> None:
    """Full attention, a sliding window and states, saved as an engine would: states only where a turn ended."""
    full, sliding, state = (
        layout_of("MQA", group=rule.span.value, rule=rule) for rule in (FULL, Rule(Span.SLIDING, 20), STATE)
    )
    layouts = (full, sliding, state)
    model = Model(layouts)
    with tiercache.open(tmp_path, memory_bytes="16MiB", ssd_bytes=0) as cache:
        stores = [cache.kv(layout) for layout in layouts]
        keys = [store.keys(range(160)) for store in stores]
        for store, layout, some in zip(stores, layouts, keys, strict=True):
            tokens = 160 if layout.rows > 1 else 10
            rank = Rank(layout, Shard.whole(layout), 16 if layout.rows > 1 else 1, 10)
            table = rank.table(tokens)
            rank.write(truth_of(layout, tokens), table)
            for span in [range(10)] if layout is not state else [range(2, 3), range(6, 7)]:
                outcomes = store.save(some, rank.planes, table, start=span.start, stop=span.stop).wait(30)
                assert outcomes == [Outcome.HIT] * len(span)
        assert model.match(stores, keys).ranges == (range(7), range(5, 7), range(6, 7))
        assert model.match(stores, keys, 6).length == 3
        cache.delete([keys[0][5]])
        assert model.match(stores, keys).length == 3
        for store in stores:
            store.close()
