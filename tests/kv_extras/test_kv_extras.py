"""Every row of `python -m tests.kv_extras` in every run of the suite."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.kv_extras.rows import encoder, loras, represented
from tiercache.kv.represent import Fp8, Packed

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["MHA", "GQA", "MQA", "MLA"])
def test_float8(tmp_path: Path, kind: str) -> None:
    row = represented(tmp_path, kind, Fp8)
    assert row.good, row
    assert row.stored < 0.53
    assert 0 < row.relative_rms < 0.04


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["MHA", "GQA", "MQA", "MLA"])
def test_packed(tmp_path: Path, kind: str) -> None:
    row = represented(tmp_path, kind, Packed)
    assert row.good, row
    assert row.stored < 0.95
    assert row.relative_rms == 0


@pytest.mark.slow
def test_encoder_outputs(tmp_path: Path) -> None:
    row = encoder(tmp_path)
    assert row.good, row
    assert (row.puts, row.hits) == (1, 4)


@pytest.mark.slow
def test_loras(tmp_path: Path) -> None:
    row = loras(tmp_path)
    assert row.good, row
    assert row.puts == row.hits == row.entries == 36
