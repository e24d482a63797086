"""Which client should carry the bytes of S3 and HTTP: obstore, s3fs, or fsspec behind threads, through our Origin port.

Every side reads the same spans of one object into the same buffers from the counting S3 server in a process of its own,
16 at a time, in turn within each round. `python -m bench.origin --json`.
"""

from __future__ import annotations

import asyncio
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import fsspec

from bench import common
from tiercache.buffers import Buffer
from tiercache.origin import Span, Stat
from tiercache.remote.opening import open_origin
from tiercache.remote.retry import Patience

OBJECT_BYTES = 64 << 20
CONCURRENCY = 16
SIZES = {"1mib": 1 << 20, "64kib": 64 << 10}
PATIENCE = Patience(deadline_s=60, attempts=2, concurrency=CONCURRENCY)


def serve(root: Path) -> tuple[subprocess.Popen[str], str]:
    """The S3 server in a process of its own, and its endpoint."""
    command = [sys.executable, "-m", "tiercache.testing.s3server", str(root)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


class Side:
    """One client: reads `count` spans of `length` bytes at once and answers the seconds that it took."""

    def __init__(self, runner: asyncio.Runner, origin: Any, path: str) -> None:
        self._runner = runner
        self.origin = origin
        self.cpu_s: list[float] = []
        (self._stat,) = runner.run(origin.stat([path]))
        assert isinstance(self._stat, Stat), path

    def read(self, length: int, targets: list[Buffer]) -> float:
        """One round."""

        async def all_of_them() -> None:
            spans = [Span(i * length % OBJECT_BYTES, length) for i in range(len(targets))]
            await asyncio.gather(*(self.origin.read(self._stat, span, [to]) for span, to in zip(spans, targets)))

        before = resource.getrusage(resource.RUSAGE_SELF)
        begin_s = time.perf_counter()
        self._runner.run(all_of_them())
        seconds = time.perf_counter() - begin_s
        after = resource.getrusage(resource.RUSAGE_SELF)
        self.cpu_s.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        return seconds


def sides_of(runner: asyncio.Runner, url: str) -> dict[str, Side]:
    """Every client that could be used."""
    options = {"key": "k", "secret": "s", "endpoint_url": url}
    given = fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False, **options)
    opened = {
        "obstore_s3": (open_origin("s3", options, patience=PATIENCE), "lake/data"),
        "s3fs": (open_origin("s3", options, through="fsspec", patience=PATIENCE), "lake/data"),
        "s3fs_given": (open_origin("s3", options, filesystem=given, patience=PATIENCE), "lake/data"),
        "obstore_http": (open_origin("http", {}, patience=PATIENCE), f"{url}/lake/data"),
        "fsspec_http": (open_origin("http", {}, through="fsspec", patience=PATIENCE), f"{url}/lake/data"),
    }
    return {name: Side(runner, origin, path) for name, (origin, path) in opened.items()}


def measure(sides: dict[str, Side], size_name: str, rounds: int, megabytes: int) -> list[common.Figure]:
    """Requests a second of each side at one size, and ratios of seconds to obstore's."""
    length = SIZES[size_name]
    count = max(CONCURRENCY, min((megabytes << 20) // length, 512))
    targets = [Buffer.of(bytearray(b"\1" * length), writable=True) for _ in range(count)]
    for side in sides.values():
        side.cpu_s.clear()
    calls = {name: (lambda side=side: side.read(length, targets)) for name, side in sides.items()}
    taken = common.interleaved(calls, rounds)
    figures = []
    for name, seconds in taken.items():
        cpu_us = median(sides[name].cpu_s[1:]) / count * 1e6
        raw = {"seconds": seconds, "requests": count, "bytes": count * length, "cpu_us_per_request": cpu_us}
        figures.append(
            common.Figure(f"{name}_{size_name}", count / median(seconds), at_most=False, unit="req/s", raw=raw)
        )
    for scheme, ours, theirs in (("s3", "obstore_s3", "s3fs"), ("http", "obstore_http", "fsspec_http")):
        ratio = common.median_ratio(taken[ours], taken[theirs])
        note = "seconds of obstore over seconds of fsspec's own client; the smaller one carries the bytes"
        figures.append(common.Figure(f"{scheme}_over_fsspec_{size_name}", ratio, bar=1.0, unit="ratio", note=note))
    return figures


def main() -> None:
    parser = common.arguments((__doc__ or "").splitlines()[0])
    options = parser.parse_args()
    rounds, megabytes = (2, 32) if options.quick else (7, 256)
    # s3fs closes its connections when it is collected, which may be after the loop that made them.
    warnings.simplefilter("ignore", ResourceWarning)
    figures = []
    with tempfile.TemporaryDirectory() as home, asyncio.Runner() as runner:
        (Path(home) / "lake").mkdir()
        (Path(home) / "lake" / "data").write_bytes(bytes(range(256)) * (OBJECT_BYTES // 256))
        process, url = serve(Path(home))
        try:
            sides = sides_of(runner, url)
            for name in SIZES:
                common.say(f"{name} spans, {CONCURRENCY} at a time")
                figures += measure(sides, name, rounds, megabytes)
            for side in sides.values():
                runner.run(side.origin.close())
        finally:
            process.terminate()
            process.wait()
    extra = {"versions": common.versions("obstore", "s3fs", "fsspec", "aiohttp"), "concurrency": CONCURRENCY}
    common.emit(common.report("origin", figures, extra=extra), as_json=options.json)


if __name__ == "__main__":
    main()
