"""Slow links: what comes slowly is no fault. Real servers behind a proxy with little bandwidth, at a small scale."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tiercache.buffers import Buffer
from tiercache.errors import ClosedError, UnavailableError
from tiercache.metrics import Metrics
from tiercache.origin import Span, Stat
from tiercache.remote.opening import open_origin
from tiercache.remote.retry import Patience, RetryingOrigin
from tiercache.testing.faultproxy import FaultProxy, Faults
from tiercache.testing.model import made_bytes
from tiercache.testing.origins import MemoryOrigin
from tiercache.testing.s3server import S3Server
from tiercache.testing.simloop import simulate
from tiercache_connectors.fsspec_fs import TierCacheFileSystem

MIB = 1 << 20


@contextmanager
def slow_store(root: Path, data: bytes, **faults: float):
    """A bucket with one object behind a proxy; (proxy, options)."""
    (root / "bucket").mkdir()
    (root / "bucket" / "x").write_bytes(data)
    with S3Server(root) as server, FaultProxy(server.url, random=random.Random(7)) as proxy:
        proxy.faults = Faults(only="GET", **faults)
        options = {"key": "reader", "secret": "of-tests", "endpoint_url": proxy.url}
        yield proxy, options | {"client_kwargs": {"region_name": "us-east-1"}}


def opened(options, tmp_path: Path, **settings) -> TierCacheFileSystem:
    settings = {"memory_bytes": 64 * MIB, "ssd_bytes": 0, "share": False, "readahead_bytes": 0} | settings
    return TierCacheFileSystem(
        target_protocol="s3",
        target_options=options,
        directory=str(tmp_path / "cache"),
        skip_instance_cache=True,
        **settings,
    )


def test_a_slow_link_is_no_fault(tmp_path: Path) -> None:
    """Three readers share a link on which each file takes longer than the deadline: every byte is sent once."""
    data = made_bytes("slow", 3 * MIB)
    with slow_store(tmp_path, data, total_bytes_s=2 * MIB) as (proxy, options):
        for name in ("y", "z"):
            (tmp_path / "bucket" / name).write_bytes(data)
        fs = opened(options, tmp_path, origin_deadline_s=1.0)
        try:
            with ThreadPoolExecutor(3) as pool:
                found = list(pool.map(lambda name: fs.open(f"bucket/{name}").read(), "xyz"))
            assert found == [data] * 3
            assert proxy.stats.bytes_sent < 1.2 * 3 * len(data)
        finally:
            fs.close()


def test_what_has_come_is_kept(tmp_path: Path) -> None:
    """Every connection breaks half way: the next request asks for the rest alone."""
    data = made_bytes("broken", 4 * MIB)
    with slow_store(tmp_path, data) as (proxy, options):
        proxy.faults.schedule = {1: "truncate", 2: "truncate"}
        origin = open_origin("s3", options, patience=Patience(deadline_s=10.0, pause_s=0.01))
        target, steps = bytearray(len(data)), []

        async def read() -> None:
            stat = (await origin.stat(["bucket/x"]))[0]
            assert isinstance(stat, Stat)
            buffer = Buffer.of(target, writable=True)
            halves = [buffer.slice(0, 3 * MIB), buffer.slice(3 * MIB, MIB)]
            await origin.read_growing(stat, Span(0, len(data)), halves, steps.append)
            await origin.close()

        asyncio.run(read())
        assert target == data
        assert sum(steps) == len(data)
        assert len(steps) > 3
        asked = [row.range for row in proxy.stats.log if row.method == "GET"]
        starts = [int(one.partition("=")[2].partition("-")[0]) for one in asked]
        assert len(starts) == 3
        assert 0 == starts[0] < starts[1] < starts[2]


def test_pages_are_there_before_the_request_has_ended(tmp_path: Path) -> None:
    """A reader of the first bytes does not wait for the rest of what another one asked for, who went away."""
    data = made_bytes("early", 8 * MIB)
    with slow_store(tmp_path, data, connection_bytes_s=2 * MIB) as (_, options), ThreadPoolExecutor(1) as pool:
        fs = opened(options, tmp_path)
        try:
            fs.info("bucket/x")
            whole = pool.submit(fs.cat_file, "bucket/x")
            begun = time.monotonic()
            assert fs.cat_file("bucket/x", 0, 10) == data[:10]
            assert time.monotonic() - begun < 2.5
            assert not whole.done()
            assert whole.result() == data
        finally:
            fs.close()


def test_silence_ends_at_the_deadline_and_says_how_far_it_came(tmp_path: Path) -> None:
    data = made_bytes("silent", 4 * MIB)
    with slow_store(tmp_path, data, stall_s=30.0) as (proxy, options):
        proxy.faults.schedule = dict.fromkeys(range(1, 20), "stall")
        patience = Patience(deadline_s=1.5, attempts=2)

        async def read() -> None:
            origin = open_origin("s3", options, patience=patience)
            stat = (await origin.stat(["bucket/x"]))[0]
            assert isinstance(stat, Stat)
            try:
                target = Buffer.of(bytearray(len(data)), writable=True)
                await origin.read(stat, Span(0, len(data)), [target])
            finally:
                await origin.close()

        begun = time.monotonic()
        with pytest.raises(UnavailableError):
            asyncio.run(read())
        assert time.monotonic() - begun < 15.0


def test_an_origin_that_gives_whole_answers_is_asked_for_less() -> None:
    """64 MiB at 1 MB/s, and nothing is seen of an answer before its end: only short ones come in time."""
    inner, metrics = MemoryOrigin(delay_s=0.0), Metrics()
    inner.put("x", bytes(64 * MIB))
    lengths: list[int] = []

    class Slow:
        identity = "slow"

        async def read(self, stat, span, targets) -> None:
            lengths.append(span.length)
            await asyncio.sleep(span.length / 1e6)
            await inner.read(stat, span, targets)

    async def main(loop):
        origin = RetryingOrigin(Slow(), Patience(), random.Random(1), metrics)  # type: ignore[arg-type]
        target = Buffer.of(bytearray(64 * MIB), writable=True)
        await origin.read(Stat("x", 64 * MIB, "v1", 1e9 + 1), Span(0, 64 * MIB), [target])
        return loop.time()

    assert simulate(main, 1) < 64 * MIB / 1e6 + 60
    assert lengths[0] == 64 * MIB
    assert max(lengths[3:]) <= 16 * MIB


def test_silence_after_bytes_have_come_is_given_up_early() -> None:
    """The first answer stops half way: the rest is asked for long before the time of an attempt is over."""
    inner = MemoryOrigin(delay_s=0.0)
    inner.put("x", bytes(8 * MIB))
    spans: list[Span] = []

    class Stalls:
        identity = "stalls"

        async def read_growing(self, stat, span, targets, came) -> None:
            spans.append(span)
            if len(spans) == 1:
                came(4 * MIB)
                await asyncio.sleep(1e4)
            await inner.read(stat, span, targets)
            came(span.length)

    async def main(loop):
        origin = RetryingOrigin(Stalls(), Patience(), random.Random(1))  # type: ignore[arg-type]
        target = Buffer.of(bytearray(8 * MIB), writable=True)
        await origin.read(Stat("x", 8 * MIB, "v1", 1e9 + 1), Span(0, 8 * MIB), [target])
        return loop.time()

    assert simulate(main, 1) < 7.0
    assert spans[1:] == [Span(4 * MIB, 4 * MIB)]


def test_closing_ends_what_is_under_way() -> None:
    inner = MemoryOrigin(delay_s=1e4)
    inner.put("x", b"x")

    async def main(loop):
        origin = RetryingOrigin(inner, Patience(concurrency=1), random.Random(1))
        calls = [asyncio.ensure_future(origin.stat(["x"])) for _ in range(3)]
        await asyncio.sleep(1.0)
        await origin.close()
        ended = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(one) for one in ended] == [ClosedError] * 3
        with pytest.raises(ClosedError):
            await origin.stat(["x"])
        return loop.time()

    assert simulate(main, 1) < 2.0


def test_waiting_for_others_that_get_on_is_no_silence() -> None:
    """Twenty answers of half a deadline each, one at a time: the last waits for ten deadlines, and comes."""
    inner = MemoryOrigin(delay_s=5.0)
    inner.put("x", b"x")

    async def main(loop):
        origin = RetryingOrigin(inner, Patience(deadline_s=10.0, concurrency=1, attempts=1), random.Random(1))
        await asyncio.gather(*(origin.stat(["x"]) for _ in range(20)))
        return loop.time()

    assert simulate(main, 1) > 99.0


SCRIPT = """
import sys, threading, time
from tiercache_connectors.fsspec_fs import TierCacheFileSystem
how, url, directory = sys.argv[1:]
options = {"key": "reader", "secret": "of-tests", "endpoint_url": url, "client_kwargs": {"region_name": "us-east-1"}}
fs = TierCacheFileSystem(target_protocol="s3", target_options=options, directory=directory, memory_bytes=64 << 20,
                         ssd_bytes=0, share=how.endswith("shared"), linger_s=0)
fs.info("bucket/x")
if how.startswith("daemon"):
    threading.Thread(target=lambda: fs.cat_file("bucket/x"), daemon=True).start()
    time.sleep(0.5)
else:
    import os, signal
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    try:
        fs.cat_file("bucket/x")
    except KeyboardInterrupt:
        pass
print(time.time(), flush=True)
"""


@pytest.mark.parametrize("how", ["daemon", "daemon shared", "interrupt", "interrupt shared"])
def test_a_process_ends_in_the_middle_of_a_read(tmp_path: Path, how: str) -> None:
    """The server is silent after half of the body; nobody waits for it at the end, and nothing is printed."""
    data = made_bytes("end", 4 * MIB)
    with slow_store(tmp_path, data, stall_s=30.0) as (proxy, options):
        proxy.faults.schedule = dict.fromkeys(range(1, 20), "stall")
        command = [sys.executable, "-c", SCRIPT, how, options["endpoint_url"], str(tmp_path / "cache")]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        took_s = time.time() - float(ran.stdout)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert took_s < 4.0, f"{took_s:.1f} s"
