"""Shards: whatever the parallelism, the shares of all ranks are the block, once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.kv_engine import layouts
from tiercache.errors import ConfigError
from tiercache.kv.layout import Layout
from tiercache.kv.shard import Shard

MFA = Layout("step3", heads=1, layers=61, k_dim=256, v_dim=256, dtype="float8_e4m3fn")
GQA = Layout("llama", heads=8, layers=32, k_dim=128, v_dim=128, dtype="bfloat16")


def covered(layout: Layout, spans: list[tuple[int, list[tuple[int, int]]]]) -> np.ndarray:
    """How many of these hold each byte."""
    seen = np.zeros(layout.block_bytes, np.uint8)
    for parts, pieces in spans:
        for part in range(layout.parts):
            if parts >> part & 1:
                seen[slice(*layout.part_span(part))] += 1
        for start, stop in pieces:
            seen[start:stop] += 1
    return seen


@given(layouts(), st.integers(1, 16), st.integers(1, 4))
def test_shares_of_all_ranks_are_the_block_once(layout: Layout, tp: int, pp: int) -> None:
    if layout.heads % tp and tp % layout.heads:
        with pytest.raises(ConfigError, match="one number must divide the other"):
            Shard.of(layout, 0, tp)
        return
    shards = [Shard.of(layout, rank, tp, stage, pp) for stage in range(pp) for rank in range(tp)]
    assert (covered(layout, [shard.share(layout) for shard in shards]) == 1).all()
    replicas = max(1, tp // layout.heads)
    assert (covered(layout, [shard.held(layout) for shard in shards]) == replicas).all()
    for shard in shards:
        assert shard.replicas == replicas
        held = covered(layout, [shard.held(layout)])
        assert (covered(layout, [shard.share(layout)]) <= held).all()
        for part in range(layout.parts):
            assert bool(shard.needed(layout) >> part & 1) == bool(held[slice(*layout.part_span(part))].any())


def test_replicas_of_one_head_divide_its_parts() -> None:
    shards = [Shard.of(MFA, rank, 8) for rank in range(8)]
    assert [shard.heads for shard in shards] == [range(1)] * 8
    assert [shard.share(MFA) for shard in shards] == [(1 << rank, []) for rank in range(8)]
    assert {shard.held(MFA)[0] for shard in shards} == {0xFF}
    idle = [Shard.of(MFA, rank, 16).share(MFA)[0] for rank in range(8, 16)]
    assert idle == [0] * 8


def test_heads_go_to_ranks_as_engines_do() -> None:
    assert [Shard.of(GQA, rank, 4).heads for rank in range(4)] == [range(i, i + 2) for i in (0, 2, 4, 6)]
    assert [Shard.of(GQA, rank, 16).heads.start for rank in range(16)] == [rank // 2 for rank in range(16)]
    assert [Shard.of(GQA, rank, 16).replica for rank in range(16)] == [0, 1] * 8


def test_layers_go_to_stages_as_engines_do() -> None:
    assert [len(Shard.of(MFA, 0, 1, stage, 2).layers) for stage in range(2)] == [31, 30]
    assert [len(Shard.of(MFA, 0, 1, stage, 4).layers) for stage in range(4)] == [15, 15, 16, 15]
    assert Shard.of(MFA, 0, 1, 1, 2, layers=range(40, 61)).layers == range(40, 61)
    assert Shard.whole(GQA) == Shard.of(GQA, 0, 1)


def test_ranks_that_do_not_exist_are_refused() -> None:
    for arguments in ((8, 8), (-1, 8), (0, 8, 2, 2)):
        with pytest.raises(ConfigError, match="count both from 0"):
            Shard.of(GQA, *arguments)
    with pytest.raises(ConfigError, match="replica 2 of 2"):
        Shard(range(1), range(1), 2, 2)
    with pytest.raises(ConfigError, match=r"inside 0\.\.32"):
        Shard.of(GQA, 0, 1, layers=range(30, 40)).share(GQA)
