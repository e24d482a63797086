"""Opening, closing and forking at once: a directory is never lost to ourselves."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import threading
from pathlib import Path

import pytest

import tiercache
from tiercache import assemble
from tiercache.buffers import Buffer
from tiercache.cache import Cache
from tiercache.clock import Clock
from tiercache.metrics import Metrics
from tiercache.model import Name, Outcome
from tiercache.settings import Settings
from tiercache.sync import io_loop, runs_here, wait
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


@pytest.mark.parametrize("same", [True, False], ids=["one directory", "two directories"])
def test_the_loop_opens_while_a_thread_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same: bool) -> None:
    """Neither waits for the other with anything in hand that the other needs."""
    data = os.urandom(1000)
    file = tmp_path / "file"
    file.write_bytes(data)
    os.utime(file, (1, 1))
    in_build, go_on = threading.Event(), threading.Event()
    real = assemble.build

    def build(settings: Settings, clock: Clock, metrics: Metrics) -> Cache:
        in_build.set()
        assert go_on.wait(PATIENCE_S)
        return real(settings, clock, metrics)

    monkeypatch.setattr(assemble, "build", build)
    names = ["a", "a" if same else "b"]
    one, two = (
        TierCacheFileSystem(
            "file", directory=str(tmp_path / name), memory_bytes=32 * MIB, ssd_bytes=0, skip_instance_cache=True
        )
        for name in names
    )
    opener = threading.Thread(target=lambda: one.mount, daemon=True)
    opener.start()
    assert in_build.wait(PATIENCE_S)
    on_loop = threading.Event()

    async def read() -> bytes:
        on_loop.set()
        return bytes(await two._cat_file(str(file)))

    future = asyncio.run_coroutine_threadsafe(read(), io_loop())
    assert on_loop.wait(PATIENCE_S)
    go_on.set()
    try:
        assert future.result(PATIENCE_S) == data
        opener.join(PATIENCE_S)
        assert not opener.is_alive()
        assert one.cat_file(str(file)) == data
        assert (one.mount is two.mount) is same
    finally:
        one.close()
        two.close()


def test_a_thread_that_needs_the_loop_to_open_a_target_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some filesystems ask their server when they are made; the loop may want the same target meanwhile."""
    file = tmp_path / "file"
    file.write_bytes(b"data")
    os.utime(file, (1, 1))
    fs = TierCacheFileSystem("file", directory=str(tmp_path / "cache"), memory_bytes=32 * MIB, ssd_bytes=0)
    in_open, on_loop = threading.Event(), threading.Event()
    real = assemble.open_origin

    def open_origin(*args: object, **kwargs: object) -> object:
        if not runs_here(io_loop()):
            in_open.set()
            assert on_loop.wait(PATIENCE_S)
            wait(asyncio.sleep(0), io_loop())
        return real(*args, **kwargs)

    monkeypatch.setattr(assemble, "open_origin", open_origin)
    opener = threading.Thread(target=lambda: fs.cat_file(str(file)), daemon=True)
    opener.start()
    assert in_open.wait(PATIENCE_S)

    async def read() -> bytes:
        on_loop.set()
        return bytes(await fs._cat_file(str(file)))

    try:
        assert asyncio.run_coroutine_threadsafe(read(), io_loop()).result(PATIENCE_S) == b"data"
        opener.join(PATIENCE_S)
        assert not opener.is_alive()
        assert fs.cat_file(str(file)) == b"data"
    finally:
        fs.close()
    assert os.path.realpath(tmp_path / "cache") not in assemble._open


@pytest.mark.parametrize("foreign", [True, False], ids=["a loop of ones own", "the process's loop"])
def test_no_loop_stands_still_while_a_filesystem_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, foreign: bool
) -> None:
    """At the first use and after a close; however many want it at once, one thread opens it."""
    file = tmp_path / "file"
    file.write_bytes(b"data")
    os.utime(file, (1, 1))
    in_build, go_on, built = threading.Event(), threading.Event(), []
    real = assemble.build

    def build(settings: Settings, clock: Clock, metrics: Metrics) -> Cache:
        built.append(threading.current_thread().name)
        in_build.set()
        assert go_on.wait(PATIENCE_S), "the loop stands still"
        return real(settings, clock, metrics)

    monkeypatch.setattr(assemble, "build", build)
    fs = TierCacheFileSystem(
        "file", directory=str(tmp_path / "cache"), memory_bytes=32 * MIB, ssd_bytes=0, asynchronous=foreign
    )

    async def read() -> None:
        fs.invalidate_cache()
        tasks = [asyncio.create_task(fs._cat_file(str(file))) for _ in range(50)]
        impatient = asyncio.create_task(fs._info(str(file)))
        assert await asyncio.to_thread(in_build.wait, PATIENCE_S)
        impatient.cancel()
        await asyncio.wait([impatient])
        go_on.set()
        assert await asyncio.gather(*tasks) == [b"data"] * 50

    for turn in range(2):
        in_build.clear(), go_on.clear()
        if foreign:
            asyncio.run(read())
        else:
            asyncio.run_coroutine_threadsafe(read(), io_loop()).result(2 * PATIENCE_S)
        assert built == ["tiercache open"] * (turn + 1)
        fs.close()


def test_a_fault_while_a_loop_waits_for_an_opening_reaches_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"data")
    os.utime(file, (1, 1))
    real = assemble.build

    def broken(settings: Settings, clock: Clock, metrics: Metrics) -> Cache:
        raise MemoryError

    monkeypatch.setattr(assemble, "build", broken)
    fs = TierCacheFileSystem(
        "file", directory=str(tmp_path / "cache"), memory_bytes=32 * MIB, ssd_bytes=0, asynchronous=True
    )

    async def read() -> bytes:
        return bytes(await fs._cat_file(str(file)))

    with pytest.raises(MemoryError):
        asyncio.run(read())
    monkeypatch.setattr(assemble, "build", real)
    assert asyncio.run(read()) == b"data"
    fs.close()


def test_a_fault_while_opening_reaches_the_opener_and_the_next_tries_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = assemble.build

    def broken(settings: Settings, clock: Clock, metrics: Metrics) -> Cache:
        raise MemoryError

    monkeypatch.setattr(assemble, "build", broken)
    with pytest.raises(MemoryError):
        tiercache.open(tmp_path, **OPTIONS)
    monkeypatch.setattr(assemble, "build", real)
    with tiercache.open(tmp_path, **OPTIONS) as cache:
        assert cache.put(["a"], [b"1"]) == [Outcome.HIT]


def test_a_cache_may_be_opened_and_given_back_on_the_loop(tmp_path: Path) -> None:
    async def use() -> bytes:
        cache = tiercache.open(tmp_path, **OPTIONS)
        assert await cache.core.put([Name(bytes(16))], [Buffer.of(b"kept")]) == [Outcome.HIT]
        cache.close()
        return b"done"

    assert asyncio.run_coroutine_threadsafe(use(), io_loop()).result(PATIENCE_S) == b"done"
    with tiercache.open(tmp_path, **OPTIONS) as cache:
        assert cache.core.tiers.ssd is not None
        assert cache.get([bytes(16)]) == [b"kept"]
