"""KV blocks that outlive a host: written by ranks of one engine, loaded elsewhere by an engine of another shape."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest

import tiercache
from tests.kv_matrix.engine import Rank, layout_of, ranks_of, truth_of
from tiercache.kv.shard import Shard
from tiercache.model import Outcome

if TYPE_CHECKING:
    from pathlib import Path

    from tiercache.sync import BlockingCache

PATIENCE_S = 30.0
TOKENS = 256


def opened(home: Path, host: str) -> BlockingCache:
    return tiercache.open(
        home / host, memory_bytes="64MiB", ssd_bytes=0, disk_free_floor_bytes=0,
        remote_url=f"file://{home}/shared", remote_bytes="64MiB", remote_deadline_s=PATIENCE_S,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["GQA", "MFA", "MLA"])
def test_another_host_loads_in_another_shape(tmp_path: Path, kind: str) -> None:
    layout = layout_of(kind)
    truth = truth_of(layout, TOKENS)
    with opened(tmp_path, "one") as cache:
        for rank in ranks_of(layout, 2, 1, 32, TOKENS // 32 + 3):
            table = rank.table(TOKENS)
            rank.write(truth, table)
            with cache.kv(layout, rank.shard) as store:
                keys = store.keys(np.arange(TOKENS))
                assert store.save(keys, rank.planes, table).wait(PATIENCE_S) == [Outcome.HIT] * len(keys)
    with opened(tmp_path, "two") as cache:
        rank = Rank(layout, Shard.whole(layout), 64, TOKENS // 64 + 3)
        table = rank.table(TOKENS, 1)
        with cache.kv(layout) as store:
            pause = threading.Event()
            for _ in range(int(PATIENCE_S / 0.01)):
                matched = store.match(keys)
                if matched.length:
                    break
                pause.wait(0.01)  # until the bucket has been listed
            assert matched.tiers == b"\3" * len(keys)
            assert store.load(keys, rank.planes, table).wait(PATIENCE_S) == [Outcome.HIT] * len(keys)
            assert store.match(keys).tiers == b"\1" * len(keys)
        assert rank.wrong(truth, table, range(TOKENS)) == 0
