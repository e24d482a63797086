"""The self-proof: planes that tell the truth pass, every way of mistaking a layout is found."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.kv_engine import ORDERS, Engine, table_for, values
from tiercache.errors import ConfigError
from tiercache.kv.layout import Layout
from tiercache.kv.planes import Planes, paged
from tiercache.kv.proof import prove
from tiercache.kv.runs import Table
from tiercache.kv.shard import Shard

LAYOUT = Layout("m", heads=4, layers=3, k_dim=8, v_dim=8, dtype="bfloat16")
TABLE = Table(np.array([5, 1, 2]), 32)


class Paged:
    """An engine that keeps [layer, page, slot, head, K then V], and reads and writes it that way."""

    def __init__(self, shard: Shard, table: Table = TABLE) -> None:
        self.shard, self.table = shard, table
        self.memory = np.full((len(shard.layers), 8, 32, len(shard.heads), 16), 7, np.uint16)

    def _rows(self, layer: int, kv: int) -> tuple[object, ...]:
        rows = np.arange(len(self.table.tokens))
        pages, slots = self.table.page_ids[rows // 32], rows % 32
        return layer - self.shard.layers.start, pages, slots, slice(None), slice(kv * 8, kv * 8 + 8)

    def write(self, layer: int, kv: int, stamp: np.ndarray) -> None:
        self.memory[self._rows(layer, kv)] = stamp.view(np.uint16)

    def read(self, layer: int, kv: int) -> np.ndarray:
        return np.ascontiguousarray(self.memory[self._rows(layer, kv)]).view(np.uint8)

    def planes(self, axes: str = "lpthC", **changes) -> Planes:
        kwargs = {"layers": self.shard.layers, "heads": self.shard.heads} | changes
        return Planes(LAYOUT, self.shard, paged(self.memory, axes, **kwargs))


@pytest.mark.parametrize("shard", [Shard.whole(LAYOUT), Shard.of(LAYOUT, 1, 2, 1, 2), Shard.of(LAYOUT, 5, 8)])
def test_the_truth_is_proven_and_what_was_stamped_is_zero(shard: Shard) -> None:
    engine = Paged(shard)
    assert prove(engine.planes(), TABLE, engine.write, engine.read)
    assert not engine.memory[:, [5, 1, 2]].any()
    assert (engine.memory[:, [0, 3, 4, 6, 7]] == 7).all()


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_of_axes_can_be_proven(order: str) -> None:
    shard = Shard.of(LAYOUT, 0, 2)
    engine = Engine(LAYOUT, shard, order=order, pages=8, page_tokens=32)
    table = table_for(64, 32, 8, 1)

    def write(layer: int, kv: int, stamp: np.ndarray) -> None:
        sequence = values(LAYOUT, 64, 1)
        found = engine.get(range(64), table)
        for whole, part in zip(sequence, found):
            whole[:] = part
        sequence[kv][layer, shard.heads.start : shard.heads.stop] = stamp.view(np.uint16).transpose(1, 0, 2)
        engine.put(sequence, table)

    def read(layer: int, kv: int) -> np.ndarray:
        found = engine.get(range(64), table)[kv][layer, shard.heads.start : shard.heads.stop]
        return np.ascontiguousarray(found.transpose(1, 0, 2)).view(np.uint8)

    assert prove(engine.planes, table, write, read)


def mistakes() -> dict[str, Planes]:
    """Engines beside planes that mistake them for something else of the same size."""
    shard = Shard.whole(LAYOUT)
    found: dict[str, tuple[Paged, Planes]] = {}
    for name in ("K and V swapped", "heads and slots", "layers", "head by head", "halves of heads"):
        engine = Paged(shard)
        memory, where = engine.memory, {"layers": shard.layers, "heads": shard.heads}
        if name == "K and V swapped":
            planes = [
                p for kv in (0, 1) for p in paged(memory[..., 8 * (1 - kv) : 16 - 8 * kv], "lpthd", kv=kv, **where)
            ]
        elif name == "heads and slots":
            planes = paged(memory.reshape(3, 8, 4, 32, 16), "lphtC", **where)
        elif name == "layers":
            planes = paged(memory[[0, 2, 1]].copy(), "lpthC", **where)
        elif name == "head by head":
            planes = paged(memory.reshape(3, 8, 32, 2, 4, 8), "lptkhd", **where)
        else:
            planes = paged(memory[:, :, :, [1, 0, 2, 3]].copy(), "lpthC", **where)
        found[name] = engine, Planes(LAYOUT, shard, planes)
    return found


@pytest.mark.parametrize("name", list(mistakes()))
def test_a_mistaken_layout_is_unproven(name: str) -> None:
    engine, planes = mistakes()[name]
    proof = prove(planes, TABLE, engine.write, engine.read)
    assert not proof
    assert proof.reason.startswith("written by the engine, not found through the planes: layer")
    assert "\n" not in proof.reason


def test_an_engine_that_reads_otherwise_than_it_writes_is_unproven() -> None:
    engine = Paged(Shard.whole(LAYOUT))
    proof = prove(engine.planes(), TABLE, engine.write, lambda layer, kv: engine.read(layer, 1 - kv))
    assert not proof
    assert "not seen by the engine: layer 0, K" in proof.reason


def test_what_an_engine_raises_is_the_reason() -> None:
    engine = Paged(Shard.whole(LAYOUT))

    def broken(layer: int, kv: int, stamp: np.ndarray) -> None:
        raise RuntimeError("no such kernel")

    assert prove(engine.planes(), TABLE, broken).reason == "RuntimeError: no such kernel"


def test_a_proof_needs_whole_blocks() -> None:
    engine = Paged(Shard.whole(LAYOUT))
    with pytest.raises(ConfigError, match="whole blocks of 16 rows"):
        prove(engine.planes(), Table(np.array([1]), 32, 8), engine.write)
