"""Opening, closing and forking at once: a directory is never lost to ourselves."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import threading
from pathlib import Path

import pytest

import tiercache
from tiercache.model import Outcome
from tiercache.sync import io_loop
from tiercache_connectors.fsspec_fs import TierCacheFileSystem

MIB = 1 << 20
OPTIONS = {"memory_bytes": 32 * MIB, "ssd_bytes": 64 * MIB, "disk_free_floor_bytes": 0}
PATIENCE_S = 60


@pytest.mark.slow
def test_opening_waits_for_a_close_in_another_thread(tmp_path: Path) -> None:
    for turn in range(5):
        cache = tiercache.open(tmp_path, **OPTIONS)
        assert cache.core.tiers.ssd is not None
        cache.put([f"value{turn}"], [bytes([turn]) * MIB])
        closing = threading.Thread(target=cache.close)
        closing.start()
        with tiercache.open(tmp_path, **OPTIONS) as again:
            assert again.core.tiers.ssd is not None
            assert again.get([f"value{turn}"]) == [bytes([turn]) * MIB]
        closing.join(PATIENCE_S)


@pytest.mark.slow
def test_many_threads_open_and_close_one_directory(tmp_path: Path) -> None:
    problems: list[object] = []

    def use(number: int) -> None:
        try:
            for turn in range(4):
                with tiercache.open(tmp_path, **OPTIONS) as cache:
                    if cache.core.tiers.ssd is None:
                        problems.append("no SSD")
                    cache.put([f"{number}/{turn}"], [b"x" * 1000])
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert not problems


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_living_fork_does_not_keep_the_directory(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    with tiercache.open(tmp_path, **OPTIONS) as cache:
        cache.put(["a"], [b"kept"], durable=True)
        stop = context.Event()
        worker = context.Process(target=stop.wait, args=(PATIENCE_S,), daemon=True)
        worker.start()
    try:
        with tiercache.open(tmp_path, **OPTIONS) as cache:
            assert cache.core.tiers.ssd is not None
            assert cache.get(["a"]) == [b"kept"]
    finally:
        stop.set()
        worker.join(PATIENCE_S)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_that_ends_writes_nothing_into_the_parents_directory(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    with tiercache.open(tmp_path, **OPTIONS) as cache:
        for turn in range(5):
            cache.put([f"before{turn}"], [os.urandom(1000)], durable=True)
            worker = context.Process(target=int)
            worker.start()
            worker.join(PATIENCE_S)
            assert worker.exitcode == 0
            assert cache.put([f"after{turn}"], [b"x" * 1000], durable=True) == [Outcome.HIT]
    with tiercache.open(tmp_path, **OPTIONS) as cache:
        assert cache.get([f"after{turn}" for turn in range(5)]) == [b"x" * 1000] * 5


def test_a_filesystem_may_be_used_first_on_the_io_loop(tmp_path: Path) -> None:
    data = os.urandom(100_000)
    file = tmp_path / "file"
    file.write_bytes(data)
    os.utime(file, (1, 1))
    fs = TierCacheFileSystem("file", directory=str(tmp_path / "cache"), memory_bytes=32 * MIB, ssd_bytes=0)
    try:
        future = asyncio.run_coroutine_threadsafe(fs._cat_file(str(file)), io_loop())
        assert future.result(PATIENCE_S) == data
    finally:
        fs.close()
