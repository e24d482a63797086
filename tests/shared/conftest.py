"""What tests of shared directories share: directories whose owners are gone in the end, and processes that use them."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tiercache.owner import state
from tiercache.owner.life import LOCK_NAME
from tiercache.settings import MIB

PATIENCE_S = 30.0
WORKER = Path(__file__).with_name("worker.py")
SIZES = {
    "memory_bytes": 64 * MIB,
    "ssd_bytes": 128 * MIB,
    "disk_free_floor_bytes": 0,
    "mtime_settle_s": 0,
    "share": True,
}


class Shared:
    """A shared directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = str(directory)
        self.settings: dict[str, Any] = {"linger_s": 0.2, **SIZES}
        self.environment = os.environ | {"TIERCACHE_SHARE": "true"}

    @property
    def owner(self) -> int:
        """The living owner's process, as it wrote itself down; 0 for none."""
        left = state.read(self.directory)
        return left.owner.pid if left is not None and left.owner.alive else 0

    def kill_owner(self) -> int:
        """Kills it as a crash would; answers who it was."""
        pid = self.owner
        assert pid, "there is no owner to kill"
        pidfd = os.pidfd_open(pid)
        try:
            os.kill(pid, signal.SIGKILL)
            wait_for(pidfd)
        finally:
            os.close(pidfd)
        return pid

    def wait_until_gone(self) -> None:
        """Returns when no owner has the directory."""
        try:
            fd = os.open(os.path.join(self.directory, LOCK_NAME), os.O_RDWR)
        except FileNotFoundError:
            return
        got = threading.Event()

        def wait() -> None:
            fcntl.flock(fd, fcntl.LOCK_EX)
            got.set()

        threading.Thread(target=wait, daemon=True).start()
        if not got.wait(PATIENCE_S):
            raise TimeoutError(f"the owner of {self.directory} does not go")
        os.close(fd)

    def descriptors(self) -> int:
        """How many the owner has open."""
        return len(os.listdir(f"/proc/{self.owner}/fd"))

    def log(self) -> str:
        """What the owners said."""
        return (Path(self.directory) / "owner.log").read_text()


def eventually(done: Callable[[], object], patience_s: float = PATIENCE_S) -> None:
    """Returns when something has come true that another process does."""
    until, pause = time.monotonic() + patience_s, threading.Event()
    while not done():
        assert time.monotonic() < until, "it did not come true"
        pause.wait(0.02)


def wait_for(pidfd: int) -> None:
    """Returns when a process is dead."""
    import select

    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    assert poll.poll(PATIENCE_S * 1000)


class Worker:
    """A process of its own; every method of worker.Told can be called here."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )
        self.pid = self._process.pid
        self._pending = 1

    def __getattr__(self, what: str) -> Any:
        return lambda *arguments, **keywords: self.begin(what, *arguments, **keywords).end()

    def begin(self, what: str, *arguments: Any, **keywords: Any) -> Worker:
        """Tells it to do something, without waiting."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([what, arguments, keywords]) + "\n")
        self._process.stdin.flush()
        self._pending += 1
        return self

    def hear(self) -> Any:
        """One line that it says while it does what it was told."""
        assert self._process.stdout is not None
        while self._pending > 1:
            self._process.stdout.readline()
            self._pending -= 1
        return json.loads(self._process.stdout.readline())

    def end(self) -> Any:
        """What came of the last thing it was told."""
        assert self._process.stdout is not None
        line = ""
        while self._pending:
            line = self._process.stdout.readline()
            self._pending -= 1
        if not line:
            raise EOFError("the worker is dead")
        answer = json.loads(line)
        if isinstance(answer, dict) and "fault" in answer:
            raise RuntimeError(answer["fault"])
        return answer

    def kill(self) -> str:
        """Kills it; answers what it said that nobody has heard."""
        self._process.kill()
        self._process.wait()
        stdout = self._process.stdout
        return stdout.read() if stdout is not None and not stdout.closed else ""

    def stop_running(self) -> None:
        """It hangs from now on; only `kill` ends it."""
        self._process.send_signal(signal.SIGSTOP)

    def stop(self) -> None:
        """Ends it."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Shared]:
    place = Shared(tmp_path / "cache")
    yield place
    try:
        place.wait_until_gone()
    finally:
        if place.owner:
            print(place.log())
            os.kill(place.owner, signal.SIGKILL)


@pytest.fixture
def worker(shared: Shared) -> Iterator[Any]:
    """Makes processes; `worker()` has opened the directory, `worker(None)` has not."""
    made: list[Worker] = []

    def make(what: str | None = "open", **settings: Any) -> Worker:
        one = Worker(shared.environment)
        made.append(one)
        if what is not None:
            one.open(shared.directory, **shared.settings | settings)
        return one

    yield make
    for one in made:
        one.stop()
