"""Processes that fork, execute other programs, and leave for the background, before and after they open a directory."""

from __future__ import annotations

import multiprocessing
import os
import signal
from typing import Any

import pytest

import tiercache
from tests.shared.conftest import PATIENCE_S, Shared, eventually
from tiercache.model import Outcome

pytestmark = [pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="Linux only"), pytest.mark.slow]
MIB = 1 << 20


@pytest.mark.parametrize("how", ["exec_in_fork", "exec_in_fork_of_fork"])
def test_no_descriptor_reaches_a_program_that_a_forked_child_executes(shared: Shared, worker: Any, how: str) -> None:
    one = worker()
    assert one.put("a", "x", MIB) == "HIT" and one.lease("a") == "HIT"
    assert any("memfd:tiercache" in each for each in one.fds())
    left = [each for each in getattr(one, how)() if not each.startswith(("pipe:", "/dev/"))]
    assert left == []


def test_a_forked_child_opens_anew_and_outlives_its_parent(shared: Shared, worker: Any) -> None:
    """The child has a session of its own; what the parent held ends with the parent, though the child still has the
    parent's memory mapped."""
    one, two = worker(), worker()
    assert two.put("a", "x", 3 * MIB) == "HIT" and one.lease("a") == "HIT"
    child, answer = one.fork("open_and_get", shared.directory, "a", shared.settings)
    try:
        assert answer == ["SharedCache", "x", 3 * MIB, True]
        assert {row["pid"] for row in two.clients()["clients"]} == {one.pid, two.pid, child}
        one.kill()
        eventually(lambda: {row["pid"] for row in two.clients()["clients"]} == {two.pid, child})
        eventually(lambda: two.validate()["pins"] == 0)  # what is being written to the SSD is pinned, too
        for i in range(10):
            assert two.put(str(i), "n", 8 * MIB) == "HIT"
    finally:
        os.kill(child, signal.SIGKILL)
    eventually(lambda: [row["pid"] for row in two.clients()["clients"]] == [two.pid])


def test_a_forked_child_that_opens_nothing_keeps_nothing_alive(shared: Shared, worker: Any) -> None:
    """It has none of the parent's connections: the parent's end is seen, and the owner goes."""
    one = worker()
    assert one.put("a", "x", MIB) == "HIT" and one.lease("a") == "HIT"
    child, answer = one.fork("look", 0)
    try:
        assert answer == ["x", MIB, True] or "ClosedError" in answer
        one.kill()
        shared.wait_until_gone()
        assert shared.owner == 0
    finally:
        os.kill(child, signal.SIGKILL)


def test_daemons(shared: Shared, worker: Any) -> None:
    """One that leaves for the background before it opens, one that does so afterwards: that one opens anew."""
    before, after = worker(None), worker()
    assert after.put("a", "x", MIB) == "HIT" and after.lease("a") == "HIT"
    daemons = [before.daemonise(), after.daemonise()]
    try:
        assert "ClosedError" in fault_of(after, "get", "a")
        for each in (before, after):
            each.open(shared.directory, **shared.settings)
            assert each.kind() == "SharedCache" and each.get("a") == ["x", MIB, True]
        eventually(lambda: sorted(row["pid"] for row in before.clients()["clients"]) == sorted(daemons))
        eventually(lambda: before.validate()["pins"] == 0)
        assert before.put("b", "y", MIB) == "HIT" and after.get("b") == ["y", MIB, True]
        shared.kill_owner()
        assert before.get("a") == after.get("a") == ["x", MIB, True]
    finally:
        for pid in daemons:
            os.kill(pid, signal.SIGKILL)


def fault_of(one: Any, what: str, *arguments: Any) -> str:
    try:
        return str(getattr(one, what)(*arguments))
    except RuntimeError as fault:
        return str(fault)


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_children_of_children(shared: Shared, method: str) -> None:
    """A child, opened and all, has children by the same means; everybody finds what everybody put."""
    context = multiprocessing.get_context(method)
    with tiercache.open(shared.directory, **shared.settings) as cache:
        assert cache.put(["level 3"], [b"3" * MIB]) == [Outcome.HIT]
        child = context.Process(target=descend, args=(shared.directory, shared.settings, method, 2))
        child.start()
        child.join(PATIENCE_S)
        assert child.exitcode == 0
        assert cache.get([f"level {level}" for level in range(4)]) == [b"%d" % level * MIB for level in range(4)]


def descend(directory: str, settings: dict[str, Any], method: str, level: int) -> None:
    with tiercache.open(directory, **settings) as cache:
        assert type(cache.core).__name__ == "SharedCache"
        assert cache.get([f"level {level + 1}"]) == [b"%d" % (level + 1) * MIB]
        assert cache.put([f"level {level}"], [b"%d" % level * MIB]) == [Outcome.HIT]
        if level:
            child = multiprocessing.get_context(method).Process(
                target=descend, args=(directory, settings, method, level - 1)
            )
            child.start()
            child.join(PATIENCE_S)
            assert child.exitcode == 0
