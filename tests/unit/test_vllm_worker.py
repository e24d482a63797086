"""The worker's half of the vLLM connector over a real cache and memory laid out as vLLM's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiercache
from tiercache.kv.groups import Model
from tiercache.kv.layout import Layout
from tiercache.kv.planes import Planes, paged
from tiercache.kv.runs import Table
from tiercache.kv.shard import Shard
from tiercache.model import Outcome
from tiercache_connectors.vllm_layout import Group, Groups, pages_as_planes
from tiercache_connectors.vllm_options import Options
from tiercache_connectors.vllm_table import Move, Order, Step
from tiercache_connectors.vllm_worker import Lane, Worker

MIB = 1 << 20
LAYERS, BLOCKS = 64, 24
LAYOUT = Layout("m", heads=2, layers=LAYERS, k_dim=128, v_dim=128, dtype="float32")
NAMES = tuple(f"model.layers.{i}.attn" for i in range(LAYERS))
GROUPS = Groups((Group(LAYOUT, 0, 16, NAMES),), Model([LAYOUT]), 1)


@pytest.fixture
def cache(tmp_path: Path) -> Any:
    settings = {"memory_bytes": 200 * MIB, "ssd_bytes": 0, "share": False, "disk_free_floor_bytes": MIB}
    with tiercache.open(tmp_path / "cache", **settings) as one:
        yield one


def planes(memory: Any) -> Planes:
    return Planes(LAYOUT, Shard.whole(LAYOUT), paged(memory, "lpthC", layers=range(LAYERS), heads=range(2)))


def test_where_a_block_fails_the_others_lie_there_before_a_layer_is_computed(cache: Any) -> None:
    """Another request of the step may share only those: nobody would compute it again."""
    there = np.random.default_rng(1).random((LAYERS, BLOCKS + 1, 16, 2, 256), np.float32)
    keys = cache.kv(LAYOUT).keys(np.arange(16 * BLOCKS))
    saving = cache.kv(LAYOUT).save(keys[:-1], planes(there), Table(np.arange(1, BLOCKS + 1), 16))
    assert set(saving.wait(30)) == {Outcome.HIT}
    here = np.zeros_like(there)
    lanes = [planes(here)]
    store = cache.kv(LAYOUT)
    expanded = pages_as_planes(lanes[0], GROUPS.groups[0])
    lane = Lane(GROUPS.groups[0], store, lanes[0], expanded, {name: i for i, name in enumerate(NAMES)})
    worker = Worker(GROUPS, [store], [lane], Options.of({"load": "layerwise"}))
    move = Move(0, 0, BLOCKS, 0, tuple(range(1, BLOCKS + 1)))
    worker.take(Step(1, keys=[("a", 0, 0, tuple(keys))], loads=[Order("a", (move,))]))
    worker.load()
    for layer, name in enumerate(NAMES):
        worker.wait_layer(name)
        assert np.array_equal(here[layer, 1:BLOCKS], there[layer, 1:BLOCKS]), f"layer {layer} was not there in time"
    worker.save()
    assert worker.bad_pages() == {BLOCKS}
    worker.close()


def test_an_engine_that_only_waits_lets_the_load_go_on(cache: Any) -> None:
    """Its loop has no pause of its own: round after round it would keep the interpreter from the threads that copy."""
    there = np.random.default_rng(2).random((LAYERS, BLOCKS + 1, 16, 2, 256), np.float32)
    keys = cache.kv(LAYOUT).keys(np.arange(16 * BLOCKS))
    saving = cache.kv(LAYOUT).save(keys, planes(there), Table(np.arange(1, BLOCKS + 1), 16))
    assert set(saving.wait(30)) == {Outcome.HIT}
    here = np.zeros_like(there)
    store, mine = cache.kv(LAYOUT), planes(here)
    expanded = pages_as_planes(mine, GROUPS.groups[0])
    lane = Lane(GROUPS.groups[0], store, mine, expanded, {name: i for i, name in enumerate(NAMES)})
    worker = Worker(GROUPS, [store], [lane], Options.of({"load": "async"}))
    move = Move(0, 0, BLOCKS, 0, tuple(range(1, BLOCKS + 1)))
    rounds, received = 0, set[str]()
    step = Step(1, keys=[("a", 0, 0, tuple(keys))], loads=[Order("a", (move,), later=True)], idle=True)
    while not received and rounds < 10_000:
        rounds += 1
        worker.take(step)
        worker.load()
        worker.save()  # vLLM calls it in steps without a forward pass, too
        received = worker.finished()[1]
        step = Step(rounds + 1, idle=True)
    assert received == {"a"} and not worker.bad_pages()
    assert np.array_equal(here[:, 1:], there[:, 1:])
    assert rounds < 2_000  # some; without a pause they are tens of thousands
    worker.close()
