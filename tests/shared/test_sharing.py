"""Processes that open one directory: they see each other's bytes, and go on when any of them, or the owner, dies."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest

import tiercache
from tests.shared.conftest import PATIENCE_S, Shared, wait_for
from tiercache.model import Outcome
from tiercache.owner import state

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="Linux only"),
    pytest.mark.slow,
]
MIB = 1 << 20


def test_what_one_process_puts_another_gets(shared: Shared, worker: Any) -> None:
    one, two = worker(), worker()
    assert one.kind() == two.kind() == "SharedCache"
    assert one.put("a", "x", 3 * MIB) == "HIT"
    assert two.get("a") == ["x", 3 * MIB, True]
    assert two.get("b") == ["MISS"]
    assert two.lease("a") == "HIT" and two.look(0) == ["x", 3 * MIB, True]
    said = one.clients()
    assert said["pid"] == shared.owner
    facts = {each["pid"]: each for each in said["clients"]}
    assert set(facts) == {one.pid, two.pid}
    assert facts[two.pid]["leases"] == 1 and facts[two.pid]["pinned_bytes"] >= 3 * MIB
    assert one.warnings() == two.warnings() == []


def test_the_owner_goes_after_its_last_client_and_leaves_what_is_on_the_ssd(shared: Shared, worker: Any) -> None:
    one = worker()
    one.put("a", "x", 100_000)
    owner = os.pidfd_open(shared.owner)
    one.close()
    wait_for(owner)
    os.close(owner)
    left = set(os.listdir(shared.directory))
    assert not left & {"owner.sock", "owner.sock.new", state.FILE}, left
    assert worker().get("a") == ["x", 100_000, True]


def test_a_client_that_comes_in_time_keeps_the_owner(shared: Shared, worker: Any) -> None:
    shared.settings["linger_s"] = 5.0
    one = worker()
    one.put("a", "x", 1000)
    before = shared.owner
    one.close()
    two = worker()
    assert two.get("a") == ["x", 1000, True] and shared.owner == before
    assert before
    os.kill(before, signal.SIGTERM)  # so that the test need not wait for it


def test_a_dead_owner_is_replaced_and_nothing_is_lost(shared: Shared, worker: Any) -> None:
    one, two = worker(), worker()
    one.put("a", "x", 3 * MIB)
    one.put("b", "y", 1000, durable=True)
    assert two.lease("a") == "HIT"
    before = shared.kill_owner()
    assert two.look(0) == ["x", 3 * MIB, True]
    assert one.get("b") == ["y", 1000, True]
    assert two.get("a") == ["x", 3 * MIB, True]
    assert shared.owner not in (0, before)
    assert one.put("c", "z", 1000) == "HIT" and two.get("c") == ["z", 1000, True]
    assert two.look(0) == ["x", 3 * MIB, True]
    two.let_go()


@pytest.mark.parametrize("forget", ["delete", "evict"])
def test_what_was_forgotten_comes_back_to_nobody_while_it_is_held(shared: Shared, worker: Any, forget: str) -> None:
    """Not by a glance of a process that knew where it lies, and not when the owner dies."""
    holder, knower, writer = worker(), worker(), worker()
    holder.put("a", "o", 50_000)
    assert holder.lease("a") == "HIT"
    assert knower.get_into("a", 50_000) == knower.get_into("a", 50_000) == ["o", 50_000, True]
    writer.delete("a") if forget == "delete" else writer.evict_all()
    assert writer.put("a", "n", 50_000, durable=True) == "HIT"
    assert knower.get_into("a", 50_000) == ["n", 50_000, True]
    shared.kill_owner()
    assert writer.get("a") == ["n", 50_000, True]
    assert worker().get("a") == ["n", 50_000, True]
    assert holder.look(0) == ["o", 50_000, True]
    holder.let_go()


def test_nothing_is_read_to_find_out_what_to_fetch_ahead(shared: Shared, worker: Any, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(4 * MIB))
    reader = worker()
    reader.mount("file", {}, directory=shared.directory, **shared.settings)
    digest = reader.digest(str(path))
    assert reader.ahead(str(path), 4 * MIB)[0] is True
    assert reader.flush() is True
    reader.stop()
    shared.wait_until_gone()
    reader = worker(None)
    reader.mount("file", {}, directory=shared.directory, **shared.settings)
    assert reader.ahead(str(path), 4 * MIB) == [False, 0], "all of it is on the SSD, and stays there"
    assert reader.digest(str(path)) == digest
    assert reader.ahead(str(path), 4 * MIB)[0] is True


def test_a_client_that_is_killed_leaves_nothing_behind(shared: Shared, worker: Any) -> None:
    one, two = worker(), worker()
    one.put("a", "x", 8 * MIB)
    assert two.lease("a") == "HIT"
    two.kill()
    for i in range(16):  # needs the room that the dead one's lease held
        assert one.put(str(i), "n", 8 * MIB) == "HIT"
    assert [each["pid"] for each in one.clients()["clients"]] == [one.pid]


def test_an_owner_that_is_told_to_go_leaves_its_clients_to_the_next(shared: Shared, worker: Any) -> None:
    one = worker()
    one.put("a", "x", 3 * MIB)
    assert one.lease("a") == "HIT"
    before = shared.owner
    pidfd = os.pidfd_open(before)
    os.kill(before, signal.SIGTERM)
    wait_for(pidfd)
    os.close(pidfd)
    assert one.get("a") == ["x", 3 * MIB, True] and one.look(0) == ["x", 3 * MIB, True]
    assert shared.owner not in (0, before)


def test_chains_are_shared(shared: Shared, worker: Any) -> None:
    one, two = worker(), worker()
    digests = [bytes([i + 65]).hex() * 16 for i in range(5)]
    assert one.put_chain(digests, 10_000) == ["HIT"] * 5
    assert two.match([*digests, "00" * 16]) == [digest[:2] for digest in digests]


def test_share_false_is_alone_and_says_who_has_the_directory(shared: Shared, worker: Any) -> None:
    one = worker()
    one.put("a", "x", 1000, durable=True)
    two = worker(share=False)
    assert two.kind() == "Cache" and two.get("a") == ["MISS"]
    assert len(two.warnings()) == 1 and "in use by another process" in two.warnings()[0]


def test_a_directory_that_others_may_write_to_is_not_shared(shared: Shared, worker: Any) -> None:
    os.mkdir(shared.directory)
    os.chmod(shared.directory, 0o777)
    one = worker()
    assert one.kind() == "Cache" and one.put("a", "x", 1000, durable=True) == "HIT"
    assert len(one.warnings()) == 1 and "cannot be shared" in one.warnings()[0]


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_children_share(shared: Shared, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    context = multiprocessing.get_context(method)
    with tiercache.open(shared.directory, **shared.settings) as cache:
        cache.put(["parent"], [b"p" * 100_000])
        with cache.lease(["parent"]) as lease:
            got = context.Queue()
            child = context.Process(target=_child, args=(shared.directory, shared.settings, got))
            child.start()
            assert got.get(timeout=PATIENCE_S) == [b"p" * 100_000, Outcome.HIT]
            child.join(PATIENCE_S)
            assert child.exitcode == 0
            assert bytes(lease.view(0)) == b"p" * 100_000
        assert cache.get(["child"]) == [b"c" * 1000]
        assert type(cache.core).__name__ == "SharedCache"


def _child(directory: str, settings: dict[str, Any], got: Any) -> None:
    with tiercache.open(directory, **settings) as cache:
        got.put([*cache.get(["parent"]), *cache.put(["child"], [b"c" * 1000])])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_refuses_what_the_parent_opened(shared: Shared) -> None:
    with tiercache.open(shared.directory, **shared.settings) as cache:
        cache.put(["a"], [b"1"])
        pid = os.fork()
        if not pid:
            code = 1
            try:
                cache.get(["a"])
            except tiercache.errors.ClosedError:
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0
        assert cache.get(["a"]) == [b"1"]


def test_opening_a_second_time_is_quick(shared: Shared, worker: Any) -> None:
    worker()
    took = []
    for _ in range(5):
        two = worker(None)
        assert two.imports() == []
        took.append(two.open(shared.directory, **shared.settings))
    print("open_ms", sorted(took))
    assert sorted(took)[2] < 500  # the figure is a benchmark's; this is only no disaster


def test_a_second_owner_goes_at_once(shared: Shared, worker: Any) -> None:
    import subprocess
    import sys

    worker()
    command = [sys.executable, "-m", "tiercache.owner", shared.directory]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 3 and "has an owner already" in done.stderr
    assert Path(shared.directory, "owner.sock").is_socket()


def test_settings_of_the_directory_are_the_first_ones_and_of_reading_ones_own(shared: Shared, worker: Any) -> None:
    with tiercache.open(shared.directory, **shared.settings) as one:
        other = shared.settings | {"memory_bytes": 32 * MIB, "verify_copies": False}
        two = worker(memory_bytes=32 * MIB, verify_copies=False)
        assert two.warnings() == [f"{shared.directory} is already open with other settings (memory_bytes); those stay"]
        assert one.core.settings.memory_bytes == shared.settings["memory_bytes"] != other["memory_bytes"]


def test_a_directory_that_somebody_has_alone_is_shared_in_memory(shared: Shared, worker: Any) -> None:
    alone = worker(share=False)
    alone.put("a", "x", 1000, durable=True)
    one, two = worker(), worker()
    assert one.kind() == two.kind() == "SharedCache"
    assert "has no SSD tier" in one.warnings()[0] and len(one.warnings()) == 1
    assert one.put("b", "y", 1000) == "HIT" and two.get("b") == ["y", 1000, True] and two.get("a") == ["MISS"]
    assert "in use by another process" in shared.log()


def test_an_owner_that_hangs_is_gone_around(shared: Shared, worker: Any) -> None:
    shared.settings["owner_deadline_s"] = 3.0
    one = worker()
    one.put("a", "x", 1000)
    owner = shared.owner
    assert one.kind() == "SharedCache" and owner
    os.kill(owner, signal.SIGSTOP)
    try:
        assert one.get("a") in (["MISS"], ["x", 1000, True])
        assert one.get("b") == ["MISS"]
        two = worker()
        assert two.kind() == "Cache" and "cannot be shared" in two.warnings()[0]
    finally:
        os.kill(owner, signal.SIGCONT)
    assert worker().put("c", "z", 1000) == "HIT"
    assert one.await_get("c") == ["z", 1000, True]


def test_a_directory_is_shared_with_its_group_by_choice(shared: Shared, worker: Any) -> None:
    shared.settings["share_group"] = True
    os.mkdir(shared.directory)
    os.chmod(shared.directory, 0o770)
    one = worker()
    assert one.kind() == "SharedCache" and one.put("a", "x", 1000) == "HIT"
    assert os.stat(os.path.join(shared.directory, "owner.sock")).st_mode & 0o777 == 0o660


def test_a_directory_that_cannot_be_written_to(shared: Shared, worker: Any) -> None:
    """Root may write anywhere, so a file stands where the directory should be."""
    Path(shared.directory).write_text("no directory")
    one = worker()
    assert one.kind() == "Cache" and one.put("a", "x", 1000) == "HIT" and one.get("a") == ["x", 1000, True]
    assert "cannot be shared" in one.warnings()[0]
    os.unlink(shared.directory)
