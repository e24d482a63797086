"""The demo's object store: an S3 server behind a proxy that delays and throttles, each in a process of its own.

Processes of their own, because a server that shares the interpreter with the reader would charge its work to it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tiercache.errors import ConfigError, UnavailableError
from tiercache.wire.sockets import readable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

BUCKET = "lake"
START_S_MAX = 60.0
STOP_S_MAX = 5.0


@dataclass(frozen=True, slots=True)
class Store:
    """A running S3 endpoint: what to read through, what to fill through (no delay), and where it counts.

    `said` describes it for tables and reports.
    """

    said: str
    url: str
    fill_url: str
    counters: str | None
    key: str = "demo"
    secret: str = "demo-secret"  # a loopback server's, made up
    options: dict[str, Any] = field(default_factory=dict)

    def s3_options(self, url: str | None = None) -> dict[str, Any]:
        """Arguments of fsspec's s3 filesystem for this endpoint."""
        return {
            "key": self.key,
            "secret": self.secret,
            "endpoint_url": url or self.url,
            "client_kwargs": {"region_name": "us-east-1"},
            **self.options,
        }


@contextmanager
def program(arguments: Sequence[str]) -> Iterator[str]:
    """Runs `python ARGUMENTS` and yields its first line of output (its URL); ends it with the block.

    UnavailableError when it ends, or says nothing for a minute, before that line.
    """
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield _first_line(process, arguments)
    finally:
        process.terminate()
        try:
            process.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def _first_line(process: subprocess.Popen[str], arguments: Sequence[str]) -> str:
    assert process.stdout is not None and process.stderr is not None
    deadline = time.monotonic() + START_S_MAX
    while time.monotonic() < deadline:
        if readable(process.stdout, 0.2):
            line = process.stdout.readline().strip()
            if line:
                return line
            process.wait()
            last = (process.stderr.read().strip().splitlines() or ["no message"])[-1]
            raise UnavailableError(f"python {' '.join(arguments)} ended with status {process.returncode}: {last}")
    raise UnavailableError(f"python {' '.join(arguments)} did not start within {START_S_MAX:.0f} s")


@contextmanager
def store(kind: str, root: Path, *, delay_ms: float, mbps: float) -> Iterator[Store]:
    """A running object store of this kind (own, ceph or moto) with its data under `root`, behind the proxy."""
    starts: dict[str, Callable[[ExitStack, Path], Store]] = {"own": _own, "ceph": _ceph, "moto": _moto}
    if kind not in starts:
        raise ConfigError(f"--s3 {kind}: there are {', '.join(starts)}")
    with ExitStack() as stack:
        behind = starts[kind](stack, root)
        if not delay_ms and not mbps and behind.counters:
            yield behind
            return
        proxy = ["-m", "tiercache.testing.faultproxy", behind.fill_url, "--set", f"delay_s={delay_ms / 1e3:g}"]
        if mbps:
            proxy += ["--set", f"connection_bytes_s={mbps * 1e6:g}"]
        front = stack.enter_context(program(proxy))
        said = f"{behind.said}, first byte after {delay_ms:g} ms"
        said += f", {mbps:g} MB/s a connection" if mbps else ""
        counters = behind.counters or f"{front}/__fp"
        yield Store(said, front, behind.fill_url, counters, behind.key, behind.secret, behind.options)


def _own(stack: ExitStack, root: Path) -> Store:
    url = stack.enter_context(program(["-m", "tiercache.testing.s3server", str(root)]))
    return Store("own S3 server", url, url, f"{url}/__stats")


def _moto(stack: ExitStack, root: Path) -> Store:
    del root
    code = (
        "import time\nfrom moto.server import ThreadedMotoServer\n"
        "server = ThreadedMotoServer(ip_address='127.0.0.1', port=0, verbose=False)\nserver.start()\n"
        "print('http://%s:%d' % server.get_host_and_port(), flush=True)\n"
        "while True: time.sleep(60)\n"
    )
    url = stack.enter_context(program(["-c", code]))
    return Store("moto (semantics only: its times say nothing)", url, url, None)


def _ceph(stack: ExitStack, root: Path) -> Store:
    del root
    from tiercache.testing import ceph

    running = stack.enter_context(ceph.Ceph())
    return Store(
        f"Ceph RGW {running.version}", running.url, running.url, None, key=ceph.ACCESS_KEY, secret=ceph.SECRET_KEY
    )


def fill(where: Store, folder: Path, prefix: str) -> list[str]:
    """Uploads every Parquet file of a folder to BUCKET/prefix, past the proxy; the paths as BUCKET/prefix/NAME.

    A file that is there with the same size stays.
    """
    import fsspec

    fs = fsspec.filesystem("s3", skip_instance_cache=True, **where.s3_options(where.fill_url))
    if not fs.exists(BUCKET):
        fs.call_s3("create_bucket", Bucket=BUCKET)
    there = {entry["name"]: entry["size"] for entry in fs.find(f"{BUCKET}/{prefix}", detail=True).values()}
    made = []
    for path in sorted(folder.glob("*.parquet")):
        name = f"{BUCKET}/{prefix}/{path.name}"
        if there.get(name) != path.stat().st_size:
            fs.put_file(str(path), name)
        made.append(name)
    return made


def scratch(folder: Path) -> Path:
    """An empty folder in place of whatever was there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
