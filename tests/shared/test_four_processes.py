"""Two readers of files, the command line and a writer of blocks on one directory: one copy, the origin asked once.

Whoever of them is killed, the owner included, the others go on.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.connectors.conftest import s3_options
from tests.shared.conftest import PATIENCE_S, Shared
from tiercache.testing.s3server import S3Server
from tiercache_connectors.fsspec_fs import TierCacheFileSystem

pytest.importorskip("typer")
pytest.importorskip("rich")

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="Linux only"),
    pytest.mark.slow,
]
MIB = 1 << 20
FILES = {"a.bin": 5 * MIB + 123, "b.bin": 300_000, "c.bin": 3 * MIB}
ALONE = {"memory_bytes": 64 * MIB, "ssd_bytes": 0, "share": False, "mtime_settle_s": 0}
TAIL_BYTES = 272 << 10
DIGESTS = [bytes([i + 65]).hex() * 16 for i in range(5)]


@dataclass
class Lake:
    server: S3Server
    values: dict[str, bytes]
    alone: dict[str, int] = field(default_factory=dict)
    """Bytes that a reader fetches who is alone: the tail of a file comes first, and ends in the middle of a part."""

    def digest(self, name: str, start: int | None = None, end: int | None = None) -> str:
        return hashlib.sha256(self.values[name][start:end]).hexdigest()

    @property
    def all(self) -> int:
        """Bytes that one reader fetches for all files, with what listing them takes."""
        listings = sum(row.sent for row in self.server.stats.log if row.operation.startswith("List"))
        return sum(self.alone.values()) + listings

    @property
    def fetched(self) -> int:
        return self.server.stats.bytes_sent


@pytest.fixture
def lake(tmp_path: Path, shared: Shared) -> Iterator[Lake]:
    folder = tmp_path / "s3" / "bucket"
    folder.mkdir(parents=True)
    values = {name: random.Random(name).randbytes(size) for name, size in FILES.items()}
    for name, value in values.items():
        (folder / name).write_bytes(value)
    for name in ("AWS_PROFILE", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        shared.environment.pop(name, None)
    shared.environment["AWS_EC2_METADATA_DISABLED"] = "true"
    shared.environment |= {f"TIERCACHE_{name.upper()}": str(value) for name, value in shared.settings.items()}
    shared.environment["TIERCACHE_DIRECTORY"] = shared.directory
    with S3Server(folder.parent) as server:
        found = Lake(server, values)
        alone = TierCacheFileSystem("s3", s3_options(server.url), directory=str(tmp_path / "alone"), **ALONE)
        for name in FILES:
            server.stats.clear()
            assert alone.cat_file(f"bucket/{name}") == values[name]
            found.alone[name] = server.stats.bytes_sent
        alone.close()
        server.stats.clear()
        yield found


class Command:
    """`tiercache` in a process of its own, on the shared directory."""

    def __init__(self, shared: Shared, url: str) -> None:
        self._environment = shared.environment
        self._url = url

    def __call__(self, *words: str, code: int = 0) -> Any:
        command = [sys.executable, "-m", "tiercache.cli", *words]
        done = subprocess.run(
            command, capture_output=True, text=True, env=self._environment, timeout=PATIENCE_S, check=False
        )
        assert done.returncode == code, done.stderr
        return json.loads(done.stdout) if "--json" in words else done.stdout + done.stderr

    def files(self, *words: str) -> Any:
        """A command with options for the object store."""
        options = {"key": "reader", "secret": "of-tests", "endpoint_url": self._url}
        given = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        return self(*words, *given, "--json")


@pytest.fixture
def command(shared: Shared, lake: Lake) -> Command:
    return Command(shared, lake.server.url)


@pytest.fixture
def reader(shared: Shared, worker: Any, lake: Lake) -> Any:
    """Makes processes that read files of the bucket."""

    def make() -> Any:
        one = worker(None)
        one.mount("s3", s3_options(lake.server.url), directory=shared.directory, **shared.settings)
        return one

    return make


def test_four_processes_one_copy(shared: Shared, worker: Any, reader: Any, lake: Lake, command: Command) -> None:
    one, two, writer = reader(), reader(), worker()
    for name in FILES:
        both = [each.begin("digest", f"bucket/{name}") for each in (one, two)]  # at once
        assert [each.end() for each in both] == [lake.digest(name)] * 2
    assert writer.put_chain(DIGESTS, 100_000) == ["HIT"] * 5
    assert lake.fetched == lake.all, lake.server.stats.facts()
    warmed = command.files("warm", "s3://bucket")
    assert warmed["kept_bytes"] == sum(FILES.values()) and warmed["fetched_bytes"] == 0
    for name in FILES:
        for each in (one, two):
            assert each.digest(f"bucket/{name}", 1000, 200_000) == lake.digest(name, 1000, 200_000)
    assert lake.fetched == lake.all, lake.server.stats.facts()
    assert worker().match(DIGESTS) == [digest[:2] for digest in DIGESTS]

    stat = command("stat", "--json")
    assert stat["owner"]["pid"] == shared.owner
    assert {one.pid, two.pid, writer.pid} <= {each["pid"] for each in stat["owner"]["clients"]}
    assert stat["forms"]["block"]["entries"] == 5 and stat["forms"]["page"]["keys"] == len(FILES)
    assert stat["memory_bytes"] == sum(FILES.values()) + 5 * 100_000 <= stat["memory"]["used_bytes"]
    assert f"process {one.pid}" in command("stat")


def test_whoever_is_killed_the_rest_go_on(
    shared: Shared, worker: Any, reader: Any, lake: Lake, command: Command
) -> None:
    one, two, writer = reader(), reader(), worker()
    assert one.digest("bucket/a.bin") == lake.digest("a.bin")
    assert writer.put_chain(DIGESTS, 100_000) == ["HIT"] * 5
    reading = two.begin("digest", "bucket/c.bin")
    one.kill()
    assert reading.end() == lake.digest("c.bin")
    owner = shared.kill_owner()
    both = [two.begin("digest", f"bucket/{name}") for name in FILES]
    assert both[-1].end() == lake.digest("c.bin")
    assert writer.match(DIGESTS) == [digest[:2] for digest in DIGESTS]
    assert shared.owner not in (0, owner)
    fetched = lake.fetched
    # What was read before the owner died is there after it; but facts are remembered by the owner alone, and a look
    # at a file that nobody knows brings its tail.
    assert fetched <= lake.all + len(FILES) * TAIL_BYTES
    writer.kill()
    assert worker().match(DIGESTS) == [digest[:2] for digest in DIGESTS]
    for name in FILES:
        assert two.digest(f"bucket/{name}") == lake.digest(name)
    assert lake.fetched == fetched
    assert [row["share"] for row in command.files("ls", "s3://bucket")["rows"]] == [1.0] * 3


def test_a_loader_that_is_killed_is_no_fault_of_others(shared: Shared, worker: Any, reader: Any, lake: Lake) -> None:
    one, two = reader(), reader()
    one.ls("bucket"), two.ls("bucket")
    for _ in range(3):
        loading, waiting = one.begin("digest", "bucket/a.bin"), two.begin("digest", "bucket/a.bin")
        loading.kill()
        assert waiting.end() == lake.digest("a.bin")
        one = reader()
    assert one.digest("bucket/a.bin") == lake.digest("a.bin")


def test_the_command_line_asks_the_owner(shared: Shared, reader: Any, lake: Lake, command: Command) -> None:
    one = reader()
    for name in FILES:
        one.digest(f"bucket/{name}")
    rows = command("ls", "--json")["rows"]
    assert sum(row["memory_bytes"] for row in rows) == sum(FILES.values()) and len(rows) == 3
    gone = command.files("evict", "s3://bucket/b.bin")
    assert gone["evicted_bytes"] == FILES["b.bin"] and gone["evicted_entries"] == 1
    shares = {row["file"].rsplit("/")[-1]: row["share"] for row in command.files("ls", "s3://bucket")["rows"]}
    assert shares == {"a.bin": 1.0, "b.bin": 0.0, "c.bin": 1.0}
    before = lake.fetched
    assert one.digest("bucket/b.bin") == lake.digest("b.bin") and lake.fetched == before + FILES["b.bin"]
    refused = command("fsck", code=3)
    assert f"is open in its owner, process {shared.owner}" in refused and str(one.pid) in refused
    assert refused.count("\n") == 1
    assert "used by 1 other process" in command("doctor")
    assert command("evict", "--all", "--json")["held_bytes"] == 0
    assert command("ls", "--json")["rows"] == []
    one.close()
    shared.wait_until_gone()
    assert command("stat", "--json")["held_bytes"] == 0 and shared.owner == 0
    assert command("fsck", "--json")["clean"]
