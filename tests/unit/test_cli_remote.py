"""`tiercache stat` of directories with a remote tier: by their owner, or by a look at the bucket that ends."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

import tiercache
from tests.unit.test_cli import Command, command  # noqa: F401  # a fixture
from tiercache.cli import remote
from tiercache.settings import load
from tiercache.testing.s3server import S3Server

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20


def stored(directory: Path) -> int:
    """Bytes of all packs of a bucket that is a directory."""
    return sum(file.stat().st_size for file in (directory / "packs").rglob("*") if file.is_file())


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TIERCACHE_REMOTE_URL", f"file://{tmp_path}/bucket")
    monkeypatch.setenv("TIERCACHE_REMOTE_BYTES", "256MiB")
    return tmp_path / "bucket"


@pytest.fixture
def filled(command: Command, bucket: Path) -> Path:  # noqa: F811
    """A directory that was open, and is not now."""
    with tiercache.open(share=False) as cache:
        cache.put([f"layer/{i}" for i in range(4)], [np.full(MIB, i, np.uint8) for i in range(4)])
        cache.flush()
    return bucket


@pytest.mark.slow
def test_a_closed_directory_says_what_its_bucket_holds_and_its_caps(command: Command, filled: Path) -> None:  # noqa: F811
    facts = command.json("stat")
    assert facts["remote"] == {
        "health": "healthy",
        "reason": "",
        "used_bytes": stored(filled),
        "capacity_bytes": 256 * MIB,
        "used_files": len([file for file in (filled / "packs").rglob("*") if file.is_file()]),
    }
    assert facts["memory"] == {"used_bytes": 0, "capacity_bytes": 32 * MIB}
    out = command("stat")[1]
    assert f"remote     file://{filled}: " in out
    assert " of 256.0 MiB in " in out
    assert "its cap is 32.0 MiB" in out


@pytest.mark.slow
def test_an_owner_says_it_of_its_own(command: Command, filled: Path) -> None:  # noqa: F811
    with tiercache.open(share=True) as cache:
        cache.put(["layer/9"], [np.full(MIB, 9, np.uint8)])
        facts = command.json("stat")
        assert facts["owner"]["pid"]
        assert facts["remote"]["capacity_bytes"] == 256 * MIB
        out = command("stat")[1]
        assert f"remote     file://{filled}: " in out
        assert "no process has the directory open" not in out


@pytest.mark.slow
def test_without_a_remote_tier_nothing_is_said_of_it(
    command: Command,  # noqa: F811
    filled: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TIERCACHE_REMOTE_URL")
    assert command.json("stat")["remote"] is None
    assert not [line for line in command("stat")[1].splitlines() if line.startswith("remote")]


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that takes connections and never answers."""
    import socket

    listening = socket.create_server(("127.0.0.1", 0))
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    listening.close()


def to_s3(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    options = {"endpoint_url": endpoint, "anon": True}
    monkeypatch.setenv("TIERCACHE_REMOTE_URL", "s3://bucket/kv")
    monkeypatch.setenv("TIERCACHE_REMOTE_OPTIONS", json.dumps(options))


def test_a_bucket_that_hangs_is_said_in_one_line_within_the_deadline(
    silent: str,
    command: Command,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("obstore")
    to_s3(monkeypatch, silent)
    began_s = time.monotonic()
    facts = remote.look(load(), within_s=0.3)
    assert time.monotonic() - began_s < 5
    assert facts is not None
    assert (facts["health"], facts["used_bytes"]) == ("off", None)
    assert facts["reason"]
    told = remote.line(facts, "s3://bucket/kv")
    assert told.startswith("s3://bucket/kv: cannot be reached (")
    assert "\n" not in told


def test_a_bucket_whose_opening_hangs_is_said_in_one_line_within_the_deadline(
    command: Command,  # noqa: F811
    bucket: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Credentials from a service that is silent, say. Whoever opens cannot be interrupted."""
    opening, ended = threading.Event(), threading.Event()

    def hang(*_: object, **__: object) -> None:
        opening.set()
        ended.wait(10)

    monkeypatch.setattr("tiercache.remote.bucket.open_bucket", hang)
    began_s = time.monotonic()
    try:
        facts = remote.look(load(), within_s=0.3)
        assert time.monotonic() - began_s < 5
    finally:
        ended.set()
    assert opening.is_set()
    assert facts is not None
    assert (facts["health"], facts["used_bytes"], facts["reason"]) == ("off", None, "no answer within 0.3 s")


@pytest.mark.parametrize(
    ("url", "options", "reason"),
    [
        ("s3://bucket/kv", {"endpoint_url": "http://127.0.0.1:1", "anon": True}, ""),
        ("s3://bucket/kv", {"anon": True, "secret": "x"}, "must not have secret"),
        ("ftp://host/x", {}, "must be s3://bucket/prefix"),
    ],
)
def test_a_bucket_that_cannot_be_asked_is_said_in_one_line(
    command: Command,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    url: str,
    options: dict[str, object],
    reason: str,
) -> None:
    pytest.importorskip("obstore")
    monkeypatch.setenv("TIERCACHE_REMOTE_URL", url)
    monkeypatch.setenv("TIERCACHE_REMOTE_OPTIONS", json.dumps(options))
    facts = remote.look(load(), within_s=2.0)
    assert facts is not None
    assert facts["used_bytes"] is None
    assert reason in facts["reason"]
    assert "\n" not in facts["reason"]


@pytest.mark.slow
def test_stat_of_a_directory_whose_bucket_is_gone_is_no_error(
    command: Command,  # noqa: F811
    filled: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("obstore")
    to_s3(monkeypatch, "http://127.0.0.1:1")
    code, out, err = command("stat")
    assert (code, err) == (0, "")
    (told,) = [line for line in out.splitlines() if line.startswith("remote")]
    assert "cannot be reached" in told
    assert "its cap is 256.0 MiB" in told
    assert "holds" in out


@pytest.mark.slow
def test_a_bucket_over_s3_is_listed(
    command: Command,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("obstore")
    (tmp_path / "s3" / "bucket" / "kv" / "packs" / "writer").mkdir(parents=True)
    for name, size in (("1", 1000), ("2", 500)):
        (tmp_path / "s3" / "bucket" / "kv" / "packs" / "writer" / name).write_bytes(bytes(size))
    with S3Server(tmp_path / "s3") as server:
        to_s3(monkeypatch, server.url)
        facts = remote.look(load())
    assert facts is not None
    assert (facts["health"], facts["reason"], facts["used_bytes"], facts["used_files"]) == ("healthy", "", 1500, 2)


@pytest.mark.parametrize(
    ("health", "told"),
    [("healthy", "packs"), ("off", "packs, and does not answer now"), ("read_only", "packs, and takes nothing now")],
)
def test_how_well_a_bucket_is(health: str, told: str) -> None:
    facts = {"health": health, "reason": "", "used_bytes": MIB, "capacity_bytes": 4 * MIB, "used_files": 3}
    assert remote.line(facts, "file:///b") == f"file:///b: 1.0 MiB of 4.0 MiB in 3 {told}"
