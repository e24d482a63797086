"""The way to the SSD: what is there in an older state stays until the newer one is durable."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import tiercache
from tiercache.lease import PageRun
from tiercache.sync import wait

MIB = 1 << 20
KEY = b"k" * 32


def test_a_replaced_record_goes_after_the_new_one_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = PageRun(KEY, MIB, MIB, 16 << 10)
    done: list[Any] = []
    with tiercache.open(tmp_path, memory_bytes=32 * MIB, ssd_bytes=64 * MIB, disk_free_floor_bytes=0) as cache:
        ssd = cache.core.tiers.ssd  # type: ignore[attr-defined]
        write, flush, free = ssd.write, ssd.flush, ssd.free

        async def seen_write(*given: Any) -> list[int]:
            locations: list[int] = await write(*given)
            done.append(("written", locations))
            return locations

        async def seen_flush() -> None:
            await flush()
            done.append(("flushed",))

        def seen_free(locations: Sequence[int]) -> None:
            free(locations)
            if len(locations):
                done.append(("freed", list(locations)))

        for name, seen in {"write": seen_write, "flush": seen_flush, "free": seen_free}.items():
            monkeypatch.setattr(ssd, name, seen)

        async def load(gaps: Any, landed: Any) -> None:
            landed(range(len(gaps)))

        async def read(parts: int) -> None:
            (await cache.core.read_pages(run, [0], [parts], load)).release()

        for parts in (1, 2):
            wait(read(parts), cache.loop)
            cache.flush()
    written = [one[1][0] for one in done if one[0] == "written"]
    assert len(written) == 2
    freed = done.index(("freed", [written[0]]))
    assert ("flushed",) in done[done.index(("written", [written[1]])) : freed]


def test_a_deletion_is_durable_soon_though_nobody_flushes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many of them together: one commit for all."""
    with tiercache.open(tmp_path, memory_bytes=32 * MIB, ssd_bytes=64 * MIB, disk_free_floor_bytes=0) as cache:
        names = [f"{i}" for i in range(20)]
        cache.put(names, [b"x" * 1000] * 20, durable=True)
        ssd = cache.core.tiers.ssd  # type: ignore[attr-defined]
        flush, flushes, flushed = ssd.flush, [], threading.Event()

        async def seen_flush() -> None:
            await flush()
            flushes.append(True)
            flushed.set()

        monkeypatch.setattr(ssd, "flush", seen_flush)
        for name in names:
            cache.delete([name])
        assert flushed.wait(30)
        assert len(flushes) < 5
