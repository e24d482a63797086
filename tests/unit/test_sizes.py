"""Sizes beyond the machine are told in one line each when a cache is opened, and nothing else is."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from tiercache.assemble import open_cache, too_large
from tiercache.settings import load, read_machine

TIB = 1 << 40


def test_sizes_beyond_the_machine(tmp_path: Path) -> None:
    machine = replace(read_machine(), memory_total=1 << 30)
    where = str(tmp_path / "not" / "there")
    usual = load(directory=where, memory_bytes="1GiB", ssd_bytes="1GiB")
    assert too_large(usual, machine) == []
    large = load(directory=where, memory_bytes=TIB, ssd_bytes=1 << 62)
    memory, disk = too_large(large, machine)
    assert memory.startswith("memory_bytes is 1.0 TiB, and this machine")
    assert "has 1.0 GiB in all" in memory
    assert disk.startswith("ssd_bytes is ")
    assert too_large(large, replace(machine, memory_total=0)) == [disk]  # unknown


def test_opening_tells_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.WARNING, "tiercache"),
        open_cache(tmp_path / "cache", memory_bytes="64MiB", ssd_bytes=1 << 62, share=False),
    ):
        said = [record.getMessage() for record in caplog.records]
    assert [line.startswith("ssd_bytes is ") for line in said] == [True]
