"""What processes of a directory know of an origin: found out once for all, and never from before a write."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from typing import Any

import pytest

from tests.connectors.conftest import s3_options
from tiercache.testing.s3server import S3Server

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="processes share by memory files"),
]

PROGRAM = """
    import hashlib, json, os, sys
    from tiercache_connectors.fsspec_fs import TierCacheFileSystem

    fs = TierCacheFileSystem(**json.loads(sys.argv[1]))
    if "later" not in sys.argv:
        fs.mount
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        what, *arguments = json.loads(line)
        try:
            if what == "cat":
                answer = hashlib.sha256(fs.cat_file(*arguments)).hexdigest()
            elif what == "footer":
                with fs.open(arguments[0]) as file:
                    file.seek(-8, 2)
                    answer = file.read().hex()
            elif what == "pipe":
                answer = fs.pipe_file(arguments[0], arguments[1].encode())
            elif what == "write":
                with fs.open(arguments[0], "wb") as file:
                    file.write(arguments[1].encode())
                answer = None
            elif what == "text":
                answer = fs.cat_file(*arguments).decode()
            elif what == "info":
                answer = fs.info(*arguments)["size"]
            elif what == "ls":
                answer = fs.ls(*arguments, detail=False)
            elif what == "anew":
                fs.invalidate_cache(*arguments)
                answer = fs.info(*arguments)["size"]
            elif what == "anew in a child":
                ours, its = os.pipe()
                if not os.fork():
                    fs.invalidate_cache(*arguments)
                    os.write(its, str(fs.info(*arguments)["size"]).encode())
                    os._exit(0)
                os.wait()
                answer = int(os.read(ours, 100))
            else:
                answer = getattr(fs, what)(*arguments)
        except FileNotFoundError:
            answer = "absent"
        print(json.dumps(answer), flush=True)
    fs.close()
"""


class Process:
    """A process with a filesystem."""

    def __init__(self, directory: str, server: S3Server, *words: str, **settings: Any) -> None:
        arguments = {
            "target_protocol": "s3",
            "target_options": s3_options(server.url),
            "directory": directory,
            "memory_bytes": 64 << 20,
            "ssd_bytes": 0,
            "linger_s": 0.2,
            "share": True,
            **settings,
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PROGRAM), json.dumps(arguments), *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"TIERCACHE_SHARE": "true"},
        )

    def begin(self, *what: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()

    def end(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def __call__(self, *what: Any) -> Any:
        self.begin(*what)
        return self.end()

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        assert self.process.wait(60) == 0
        self.process.stdout.close()


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "root" / "lake" / "d"
    folder.mkdir(parents=True)
    for i in range(8):
        (folder / f"{i}.parquet").write_bytes(bytes([i]) * 300_000 + b"footer%d." % i)
    with S3Server(tmp_path / "root") as server:
        yield server


@pytest.fixture
def processes(server, tmp_path):
    made = [Process(str(tmp_path / "cache"), server) for _ in range(4)]
    for each in made:
        assert each.end() == "ready"
    yield made
    for each in made:
        each.close()


def together(processes, *what):
    for each in processes:
        each.begin(*what)
    return [each.end() for each in processes]


def test_many_openers_ask_as_one(processes, server):
    for i in range(8):
        server.stats.clear()
        assert together(processes, "footer", f"lake/d/{i}.parquet") == [(b"footer%d." % i).hex()] * 4
        # The one who looked first brought the footer with the facts; it is in memory for the others.
        assert server.stats.by_operation == {"GetObject": 1}
    server.stats.clear()
    assert together(processes, "info", "lake/d/nothing") == ["absent"] * 4
    assert server.stats.requests <= 3
    server.stats.clear()
    listed = together(processes, "ls", "lake/d")
    assert listed == [[f"lake/d/{i}.parquet" for i in range(8)]] * 4
    assert server.stats.by_operation == {"ListObjectsV2": 1}
    server.stats.clear()
    assert together(processes, "info", "lake/d/3.parquet") == [300_008] * 4
    assert server.stats.requests == 0


@pytest.mark.parametrize("first", ["doubting", "believing"])
def test_who_believes_nothing_itself_waits_until_others_have_forgotten(server, tmp_path, first):
    """Whose settings the owner has makes no difference either."""
    ttls = {"doubting": 0.0, "believing": 60.0}
    made = {}
    for each in sorted(ttls, key=lambda name: name != first):
        ttl_s = ttls[each]
        made[each] = Process(str(tmp_path / "cache"), server, stat_ttl_s=ttl_s, negative_ttl_s=ttl_s, tail_bytes=0)
        assert made[each].end() == "ready"
    try:
        for writer in made.values():
            for turn in range(100):
                assert writer("pipe", "lake/d/new", "x" * turn) is None
                assert made["believing"]("info", "lake/d/new") == turn
    finally:
        for each in made.values():
            each.close()


def test_what_is_invalidated_is_asked_anew_whoever_knows_it(server, tmp_path):
    """Also before the first use, in a forked child, and after a close; and from then on everybody knows better."""
    file = tmp_path / "root" / "lake" / "d" / "changing"
    file.write_bytes(b"x" * 10)
    settings = {"stat_ttl_s": 3600.0, "tail_bytes": 0, "mtime_settle_s": 0.0}
    one, two = (Process(str(tmp_path / "cache"), server, "later", **settings) for _ in range(2))
    assert one.end() == two.end() == "ready"
    try:
        size = one("info", "lake/d/changing")
        for doer, other, what in [
            (two, one, "anew"),  # its first use
            (one, two, "anew"),
            (one, two, "anew in a child"),
            (one, two, "anew in a child"),
            (one, two, "closed"),
        ]:
            if what == "closed":
                doer("close")
            size += 1
            file.write_bytes(b"x" * size)
            assert other("info", "lake/d/changing") == size - 1
            assert doer("anew" if what == "closed" else what, "lake/d/changing") == size
            assert other("info", "lake/d/changing") == one("info", "lake/d/changing") == size
    finally:
        one.close()
        two.close()


def test_a_write_is_seen_by_every_process_when_it_returns(processes):
    for turn in range(40):
        writer = processes[turn % 4]
        verb, text = ("pipe", "write")[turn % 2], f"turn {turn} " * (turn + 1)
        assert writer(verb, "lake/d/new", text) is None
        assert together(processes, "text", "lake/d/new") == [text] * 4
        assert together(processes, "ls", "lake/d")[0][-1] == "lake/d/new"
        assert processes[(turn + 1) % 4]("rm", "lake/d/new") is None
        assert together(processes, "info", "lake/d/new") == ["absent"] * 4
        assert all("lake/d/new" not in names for names in together(processes, "ls", "lake/d"))
