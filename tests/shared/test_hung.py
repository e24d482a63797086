"""Clients and owners that are stopped (SIGSTOP) in the middle of anything: they hold no more than their quota, the
others go on, and whoever is let go on again finds everything as it was."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.shared.conftest import PATIENCE_S, Shared, eventually

pytestmark = [pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="Linux only"), pytest.mark.slow]
MIB = 1 << 20
KEY = "61" * 32


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A process that does nothing meanwhile."""
    os.kill(pid, signal.SIGSTOP)
    try:
        eventually(lambda: Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] == "T")
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_hung_client_holds_no_more_than_its_quota(shared: Shared, worker: Any) -> None:
    """Memory is 64 MiB, a client may pin a quarter of it."""
    shared.settings |= {"ssd_bytes": 0, "client_share": 0.25}
    one, hung = worker(), worker()
    outcomes = []
    for i in range(4):
        assert one.put(f"held {i}", "h", 6 * MIB) == "HIT"
        outcomes.append(hung.lease(f"held {i}"))
    assert outcomes == ["HIT", "HIT", "BUSY", "BUSY"]
    with stopped(hung.pid):
        row = next(row for row in one.clients()["clients"] if row["pid"] == hung.pid)
        assert 12 * MIB <= row["pinned_bytes"] <= 16 * MIB
        for turn in range(3):
            for i in range(5):  # all that the quota leaves, again and again
                assert one.put(f"{turn} {i}", "abc"[turn], 8 * MIB) == "HIT"
                assert one.get(f"{turn} {i}") == ["abc"[turn], 8 * MIB, True]
        two = worker()
        assert two.put("two", "t", 8 * MIB) == "HIT"
    for at in range(2):
        assert hung.look(at) == ["h", 6 * MIB, True]
    hung.let_go()
    eventually(lambda: one.validate()["pins"] == 0)
    assert one.validate()["broken"] == ""


def test_a_hung_loader_is_not_waited_for(shared: Shared, worker: Any) -> None:
    """What it may still write to stays its own until it says that it has done."""
    shared.settings |= {"ssd_bytes": 0, "origin_deadline_s": 0.5}
    one, two, hung = worker(), worker(), worker()
    hung.begin("page", KEY, fills=False)
    assert hung.hear() == "filling"
    with stopped(hung.pid):
        both = [each.begin("page", KEY) for each in (one, two)]
        began = time.monotonic()
        assert {each.end() for each in both} <= {"HIT", "BUSY"}
        assert time.monotonic() - began < PATIENCE_S / 2
        assert one.page(KEY) == "HIT"
        row = next(row for row in one.clients()["clients"] if row["pid"] == hung.pid)
        assert row["pinned_bytes"] >= MIB  # counted, for as long as it may write
    assert two.page(KEY) == "HIT"
    hung.kill()
    eventually(lambda: one.validate()["pins"] == 0 and len(one.clients()["clients"]) == 2)
    assert one.page(KEY) == "HIT" and one.validate()["broken"] == ""


def test_readers_of_files_go_around_whoever_hangs(shared: Shared, worker: Any, tmp_path: Path) -> None:
    """Stopped wherever it is in looking up and reading a file, with claims, loads and leases of its own."""
    shared.settings |= {"origin_deadline_s": 1.0}
    rng, folder, pause = random.Random(7), tmp_path / "files", threading.Event()
    folder.mkdir()
    one, hung = worker(None), worker(None)
    for each in (one, hung):
        each.mount("file", {}, directory=shared.directory, **shared.settings)
    slowest = 0.0
    for number in range(8):
        path = folder / f"file {number}"
        path.write_bytes(rng.randbytes(3 * MIB))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        hung.begin("digest", str(path))
        pause.wait(rng.uniform(0, 0.02))  # the moment is what is random here
        with stopped(hung.pid):
            began = time.monotonic()
            assert one.digest(str(path)) == digest
            slowest = max(slowest, time.monotonic() - began)
        with contextlib.suppress(RuntimeError):  # its own deadlines may have passed meanwhile
            assert hung.end() == digest
        assert hung.digest(str(path)) == digest
    print({"slowest_s": round(slowest, 2)})
    assert slowest < PATIENCE_S
    one.kill()


def test_an_owner_that_dies_beside_a_hung_client(shared: Shared, worker: Any) -> None:
    """The next owner cannot know what the hung one looks at, so it gives none of the old memory away until that one
    has said so, or is dead; the others have what is there, and go around the cache for the rest."""
    shared.settings |= {"ssd_bytes": 0}
    one, hung = worker(), worker()
    for i in range(6):
        assert one.put(f"old {i}", "o", 8 * MIB) == "HIT"
    assert hung.lease("old 0") == "HIT"
    with stopped(hung.pid):
        shared.kill_owner()
        for i in range(6):
            assert one.get(f"old {i}") == ["o", 8 * MIB, True]
        assert {one.put(f"new {i}", "n", 8 * MIB) for i in range(4)} <= {"HIT", "BUSY", "FULL"}
        assert one.validate()["broken"] == ""
    assert hung.get("old 1") == ["o", 8 * MIB, True] and hung.look(0) == ["o", 8 * MIB, True]
    eventually(lambda: one.put("newest", "n", 8 * MIB) == "HIT")
    for i in range(12):
        assert one.put(f"newer {i}", "n", 8 * MIB) == "HIT"
    assert hung.look(0) == ["o", 8 * MIB, True]


def test_a_hung_owner_is_gone_around_and_found_again(shared: Shared, worker: Any, tmp_path: Path) -> None:
    """Within its deadline and a little more for everything: reads of files bring the right bytes all the while."""
    shared.settings |= {"owner_deadline_s": 3.0, "origin_deadline_s": 3.0}
    path = tmp_path / "file"
    path.write_bytes(random.Random(1).randbytes(3 * MIB))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    one, two = worker(None), worker()
    one.mount("file", {}, directory=shared.directory, **shared.settings)
    assert one.digest(str(path)) == digest and two.kind() == "SharedCache"
    assert two.put("a", "x", MIB) == "HIT" and two.lease("a") == "HIT"
    owner = shared.owner
    refused: list[str] = []
    with stopped(owner):
        for _ in range(3):
            began = time.monotonic()
            assert one.digest(str(path), 1, 2 * MIB)
            assert two.get("never") == ["MISS"] and two.get("a") in (["MISS"], ["x", MIB, True])
            refused.append(outcome_of(two))
            took = time.monotonic() - began
            print({"took_s": round(took, 2)})
            assert took < 10 * shared.settings["owner_deadline_s"]
        assert two.look(0) == ["x", MIB, True]
    print(owner, refused, shared.log())
    # Nobody may believe that others can get it.
    assert all(each in ("BUSY", "FULL") or each.startswith(("Lost", "UnavailableError")) for each in refused), refused
    assert two.await_get("a") == ["x", MIB, True] and one.digest(str(path)) == digest
    eventually(lambda: two.put("c", "z", MIB) == "HIT")
    assert shared.owner == owner and two.look(0) == ["x", MIB, True]
    one.stop()


def outcome_of(one: Any) -> str:
    """What comes of a put, which is refused in words while no owner can be had."""
    try:
        return str(one.put("b", "y", MIB))
    except RuntimeError as fault:
        return str(fault)
