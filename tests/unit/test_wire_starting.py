"""Starting an owner: one at a time, for many who want it, and clear words where it cannot be."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tiercache.errors import UnavailableError
from tiercache.wire import sockets, starting
from tiercache.wire.channel import Channel
from tiercache.wire.sockets import CannotShare, Foreign, Lost

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

STAND_IN = """
import asyncio, json, os, sys

import tiercache
from tiercache.wire import sockets, starting
from tiercache.wire.post import Post

directory, _, listening, _, settings = sys.argv[1:]
listener = sockets.inherited(int(listening))
settings = starting.read_settings(int(settings))
if settings.get("fail"):
    raise RuntimeError("cannot do it")
facts = {
    "pid": os.getpid(), "parent": os.getppid(), "sid": os.getsid(0), "cwd": os.getcwd(), "argv": sys.argv,
    "settings": settings, "file": tiercache.__file__, "modules": sorted(sys.modules),
    "fds": sorted(os.readlink(f"/proc/self/fd/{each}") for each in os.listdir("/proc/self/fd") if int(each) > 2
                  and os.path.exists(f"/proc/self/fd/{each}")), "umask": os.umask(0),
}
print("a line of the owner", file=sys.stderr)


async def main():
    loop = asyncio.get_running_loop()
    done = loop.create_future()

    def take(post, frame):
        if frame.op == 98:
            os._exit(0)
        post.answer(frame.number, json.dumps(facts).encode())

    def accept():
        Post(listener.accept()[0], loop, take, lambda post, why: None)

    listener.setblocking(False)
    loop.add_reader(listener, accept)
    await done


asyncio.run(main())
"""


@pytest.fixture
def standing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A directory for which a stand-in is started; ended afterwards."""
    code = tmp_path / "code"
    code.mkdir()
    (code / "stand_in_owner.py").write_text(STAND_IN)
    # What an owner must not import, though the starter would.
    for name in ("json", "random", "sitecustomize", "usercustomize"):
        (code / f"{name}.py").write_text("raise SystemExit('user code in the owner')\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(code)])
    monkeypatch.setenv("PYTHONPATH", str(code))
    directory = tmp_path / "cache"
    yield str(directory)
    with contextlib.suppress(OSError), sockets.connect(str(directory)) as sock, contextlib.suppress(Lost):
        Channel(sock).ask(98)


def start(directory: str, **settings: object) -> Channel:
    return Channel(starting.find_or_start(directory, settings, module="stand_in_owner", deadline_s=60))


def facts_of(channel: Channel) -> dict:
    return json.loads(bytes(channel.ask(99)))


def end(channel: Channel) -> None:
    """Ends the owner, and waits until it is gone."""
    with pytest.raises(Lost):
        channel.ask(98)


def children() -> set[int]:
    """Processes whose parent this one is, dead ones that nobody has waited for among them."""
    found = set()
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat", encoding="ascii", errors="replace") as file:
            if int(file.read().rpartition(")")[2].split()[1]) == os.getpid():
                found.add(int(name))
    return found


def test_an_owner_is_started_once_and_found_again(standing: str) -> None:
    before = children()
    first, second = start(standing, share=True), start(standing)
    facts = facts_of(first)
    assert facts == facts_of(second)
    assert facts["settings"] == {"share": True}
    assert facts["argv"][1:2] == [standing]
    assert facts["cwd"] == "/"
    assert facts["umask"] == 0o077
    assert facts["parent"] != os.getpid()
    assert facts["sid"] != os.getsid(0)
    assert facts["file"] == os.path.abspath(starting.tiercache.__file__)
    # The listening socket, its loop's own and nothing of the starter's.
    assert not [each for each in facts["fds"] if each.startswith("/") and "memfd" not in each], facts["fds"]
    assert starting.last_words(standing) == "a line of the owner"
    assert children() == before, "no child is left, living or dead"
    for each in (first, second):
        each.close()


def test_the_owners_credentials_are_its_own(standing: str) -> None:
    channel = start(standing)
    pid = facts_of(channel)["pid"]
    with sockets.connect(standing) as sock:
        assert sockets.peer(sock).pid == pid
    channel.close()


def test_many_start_one(standing: str) -> None:
    code = (
        "import sys; sys.path.append(sys.argv[2])\n"
        "from tiercache.wire import starting\nfrom tiercache.wire.channel import Channel\nimport json\n"
        "sock = starting.find_or_start(sys.argv[1], {}, module='stand_in_owner', deadline_s=60)\n"
        "print(json.loads(bytes(Channel(sock).ask(99)))['pid'])\n"
    )
    command = [sys.executable, "-E", "-c", code, standing, sys.path[-1]]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        channels = list(pool.map(lambda _: start(standing), range(8)))
    here = [facts_of(each)["pid"] for each in channels]
    for each in channels:
        each.close()
    there = [int(child.communicate(timeout=60)[0]) for child in children]
    assert len({*here, *there}) == 1


def test_a_dead_owner_is_followed_by_another(standing: str) -> None:
    first = start(standing)
    before = facts_of(first)["pid"]
    end(first)
    second = start(standing)
    assert facts_of(second)["pid"] != before
    second.close()


def test_an_owner_that_cannot_start_ends_its_connections_and_its_words_are_kept(standing: str) -> None:
    with pytest.raises((Lost, CannotShare)):
        start(standing, fail=True).ask(99)
    assert starting.last_words(standing) == "RuntimeError: cannot do it"
    start(standing).close()


def test_who_dies_with_the_lock_stops_nobody(standing: str) -> None:
    os.mkdir(standing, 0o700)
    code = (
        "import os, sys\nfrom tiercache.wire import starting\n"
        "with starting.spawn_lock(sys.argv[1]) as held: os._exit(held)"
    )
    assert subprocess.run([sys.executable, "-E", "-c", code, standing], check=False, timeout=60).returncode == 1
    start(standing).close()


def test_the_lock_is_waited_for_until_the_deadline(standing: str) -> None:
    os.mkdir(standing, 0o700)
    with starting.spawn_lock(standing) as held:
        assert held
        with starting.spawn_lock(standing) as again:
            assert not again
        with pytest.raises(UnavailableError, match=r"within 0.05 s"):
            starting.find_or_start(standing, {}, deadline_s=0.05)
        asked = threading.Thread(target=lambda: start(standing).close())
        asked.start()
    asked.join(60)
    assert not asked.is_alive()


def test_a_child_forked_meanwhile_keeps_neither_lock_nor_socket(tmp_path: Path) -> None:
    directory = str(tmp_path)
    reads, writes = os.pipe()
    with starting.spawn_lock(directory):
        listener = sockets.listen(directory)
        starting._listening.add(listener)
        child = os.fork()
        if not child:
            os.close(writes)
            os.read(reads, 1)
            os._exit(0)
        starting._listening.discard(listener)
        listener.close()
    with starting.spawn_lock(directory) as held:
        assert held
    # The child's hook has run by the time that it can read; until then it may hold the socket for an instant.
    until = time.monotonic() + 30
    while time.monotonic() < until:
        try:
            sockets.connect(directory).close()
        except sockets.NoOwner:
            break
    else:
        pytest.fail("the child still listens")
    os.close(writes)
    os.close(reads)
    os.waitpid(child, 0)


@pytest.mark.parametrize("executable", ["", None, "/usr/sbin/uwsgi", "/nowhere/python3"])
def test_programs_that_are_no_python(standing: str, monkeypatch: pytest.MonkeyPatch, executable: str | None) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    with pytest.raises(CannotShare, match="not run by a Python"):
        start(standing)


def test_a_frozen_program(standing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(CannotShare, match="not run by a Python"):
        start(standing)


def test_a_package_in_an_archive(standing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starting.tiercache, "__file__", "/nowhere/app.zip/tiercache/__init__.py")
    with pytest.raises(CannotShare, match="does not lie in files"):
        start(standing)


def test_an_interpreter_that_does_not_run(standing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python3"
    python.write_text("#!/bin/sh\necho broken installation >&2\nexit 3\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(CannotShare, match=r"status 3.*broken installation"):
        start(standing)
    python.write_text("no program")
    with pytest.raises(CannotShare, match="no owner can be started"):
        start(standing)
    python.write_text("#!/bin/sh\nexec sleep 60\n")
    with pytest.raises(CannotShare, match="within"):
        starting.find_or_start(standing, {}, deadline_s=0.2)


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CannotShare):
        starting.find_or_start(str(tmp_path / "file"), {})


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"keep")
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    for name in (starting.LOCK_NAME, starting.LOG_NAME):
        (cache / name).symlink_to(victim)
        with pytest.raises(CannotShare):
            starting.find_or_start(str(cache), {})
        (cache / name).unlink()
    assert victim.read_bytes() == b"keep"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs the rights to give a directory away")
def test_another_users_directory(tmp_path: Path) -> None:
    os.chown(tmp_path, 65534, 65534)
    with pytest.raises(Foreign):
        starting.find_or_start(str(tmp_path), {})


def test_the_log_stays_short(tmp_path: Path) -> None:
    log = tmp_path / starting.LOG_NAME
    assert "nothing in" in starting.last_words(str(tmp_path))
    starting.trim_log(str(tmp_path))
    lines = [f"line {i} {'x' * 100}\n" for i in range(15_000)]
    log.write_text("".join(lines))
    starting.trim_log(str(tmp_path))
    kept = log.read_text()
    assert len(kept) <= starting.LOG_BYTES_MAX // 2
    assert "".join(lines).endswith(kept)
    assert kept.startswith("line ")
    starting.trim_log(str(tmp_path))
    assert log.read_text() == kept


def test_a_starter_of_many_processes(standing: str) -> None:
    """From a forked worker, as data loaders have them."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()

    def work() -> None:
        there.send(facts_of(start(standing))["pid"])

    worker = context.Process(target=work)
    worker.start()
    channel = start(standing)
    assert here.recv() == facts_of(channel)["pid"]
    worker.join()
    channel.close()


def test_settings_are_read_from_where_they_stand() -> None:
    plan = starting._plan({"a": 1, "ü": ["x" * 100_000]}, "nothing")
    assert starting.read_settings(plan) == {"a": 1, "ü": ["x" * 100_000]}
    with pytest.raises(OSError):
        os.fstat(plan)


def test_inherited_sockets_are_not_passed_on(tmp_path: Path) -> None:
    made = sockets.listen(str(tmp_path))
    made.set_inheritable(True)
    with sockets.inherited(made.detach()) as listener:
        assert not listener.get_inheritable()
        assert listener.family == socket.AF_UNIX
