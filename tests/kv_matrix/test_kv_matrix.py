"""A corner of the matrix in every run of the suite; `python -m tests.kv_matrix` does all of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import tiercache
from tests.kv_matrix.engine import SHAPES
from tests.kv_matrix.matrix import Shape, run

if TYPE_CHECKING:
    from pathlib import Path

CORNERS = [Shape(1, 1, 16), Shape(8, 2, 32), Shape(4, 1, 128), Shape(2, 2, 16)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", SHAPES)
def test_written_at_one_parallelism_and_read_at_any_other(tmp_path: Path, kind: str) -> None:
    with tiercache.open(tmp_path, memory_bytes="64MiB", ssd_bytes=0) as cache:
        row = run(cache, kind, 144, CORNERS)
        assert (row.faults, row.mismatch, row.differs) == ([], 0, 0)
        assert (row.writes, row.reads, row.blocks) == (4, 16, 16 * 9)
        assert row.stored_bytes == row.moved_bytes == row.logical_bytes
        assert cache.core.tiers.index.pins == 0


@pytest.mark.slow
def test_head_groups_and_parts_that_stages_cut(tmp_path: Path) -> None:
    """More than 64 heads, so that parts hold several of them; layers that no stage divides; blocks of other sizes."""
    with tiercache.open(tmp_path, memory_bytes="64MiB", ssd_bytes=0) as cache:
        for changes in (
            {"heads": 128, "layers": 3, "k_dim": 8, "v_dim": 8},
            {"heads": 8, "layers": 13, "k_dim": 64, "v_dim": 32},
            {"heads": 4, "layers": 5, "k_dim": 24, "v_dim": 24, "block_tokens": 48},
        ):
            row = run(cache, "MHA", 144, CORNERS, **changes)
            assert (row.faults, row.mismatch, row.differs) == ([], 0, 0)
            assert row.stored_bytes == row.moved_bytes == row.logical_bytes
