"""Ends: caches on hosts, which are network namespaces, or addresses of loopback; and what can happen to them."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from tiercache.owner import state
from tiercache.settings import MIB
from tiercache.testing import netns

CHILD = Path(__file__).with_name("child.py")
ANSWER_S = 120.0
DEADLINE_S = 1.0
"""peer_deadline_s of all caches here."""
SLACK_S = 2.0
"""A busy machine may take so much longer."""
TOKEN = "the secret of two hosts"


class Host(Protocol):
    """Where programs run; see tiercache.testing.netns."""

    address: str

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[Any]: ...


class Near:
    """Loopback as a host."""

    address = "127.0.0.1"

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[Any]:
        return subprocess.Popen(arguments, **options)


class Died(Exception):
    """The process that was asked is no more."""


class End:
    """A cache on a host, and the process that uses it: every method of child.Told can be called here.

    With `share` the cache lives in an owner that its user starts; else in the user itself.
    """

    def __init__(self, host: Host, home: Path, *, share: bool, transport: str, **settings: Any) -> None:
        self.host, self.share = host, share
        self.port = free_port(host.address)
        self.directory = home / self.name
        self.directory.mkdir(parents=True)
        token = home / "token"
        if not token.exists():
            token.write_text(TOKEN)
        self.settings: dict[str, Any] = {
            "directory": str(self.directory), "share": share, "memory_bytes": 192 * MIB, "ssd_bytes": 0,
            "disk_free_floor_bytes": 0, "linger_s": 0.2, "page_bytes": MIB, "mtime_settle_s": 0,
            "peer_listen": self.name, "peer_token_file": str(token), "peer_transport": transport,
            "peer_deadline_s": DEADLINE_S, **settings,
        }  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None
        self._heard = b""
        self._stopped = 0

    @property
    def name(self) -> str:
        """Where its peers find it."""
        return f"{self.host.address}:{self.port}"

    def open(self, *peers: End, **how: Any) -> End:
        """Starts it; `peers` are those that it calls."""
        if peers:
            self.settings["peers"] = ",".join(one.name for one in peers)
        environment = os.environ | {"TIERCACHE_CONFIG": ""}
        with (self.directory / "child.log").open("ab") as log:
            self._process = self.host.start(
                sys.executable, str(CHILD), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment
            )
        self._heard = b""
        assert self.end() == "ready"
        self.begin("open", self.settings, **how)
        assert self.end() == ("SharedCache" if self.share else "Cache"), self.log()[-500:]
        return self

    def __getattr__(self, what: str) -> Any:
        if what.startswith("__"):
            raise AttributeError(what)

        def tell(*arguments: Any, **keywords: Any) -> Any:
            self.begin(what, *arguments, **keywords)
            return self.end()

        return tell

    def begin(self, what: str, *arguments: Any, **keywords: Any) -> None:
        """Tells it to do something, without waiting; `end` has the answer."""
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps([what, arguments, keywords]).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Died(self._post_mortem()) from None

    def end(self, patience_s: float = ANSWER_S) -> Any:
        """The answer."""
        assert self._process is not None and self._process.stdout is not None
        until_s = time.monotonic() + patience_s
        while b"\n" not in self._heard:
            left_s = until_s - time.monotonic()
            if left_s <= 0 or not select.select([self._process.stdout], [], [], left_s)[0]:
                raise TimeoutError(f"{self.name} did not answer within {patience_s:g} s")
            piece = os.read(self._process.stdout.fileno(), 1 << 16)
            if not piece:
                raise Died(self._post_mortem())
            self._heard += piece
        line, self._heard = self._heard.split(b"\n", 1)
        answer = json.loads(line)
        if isinstance(answer, dict) and "fault" in answer:
            raise RuntimeError(f"{self.name}: {answer['fault']}")
        return answer

    def _post_mortem(self) -> str:
        assert self._process is not None
        return f"{self.name} ended with {self._process.wait(5)}: {self.log()[-500:]}"

    def log(self) -> str:
        """What its processes said."""
        return "".join(
            (self.directory / name).read_text(errors="replace")
            for name in ("owner.log", "child.log")
            if (self.directory / name).exists()
        )

    # -- what happens to it --------------------------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        """The process that speaks with peers; 0 for none."""
        if not self.share:
            return self._process.pid if self._process is not None and self._process.poll() is None else 0
        left = state.read(str(self.directory))
        return left.owner.pid if left is not None and left.owner.alive else 0

    def kill(self) -> None:
        """As a crash would, the process that speaks with peers."""
        pid = self.pid
        assert pid, f"{self.name} is dead already"
        pidfd = os.pidfd_open(pid)
        os.kill(pid, signal.SIGKILL)
        select.select([pidfd], [], [], SLACK_S)
        os.close(pidfd)
        if not self.share:
            assert self._process is not None
            self._process.communicate()

    def stop(self) -> None:
        """Halts the process that speaks with peers."""
        self._stopped = self.pid
        os.kill(self._stopped, signal.SIGSTOP)

    def go_on(self) -> None:
        """Ends what `stop` began."""
        if self._stopped:
            os.kill(self._stopped, signal.SIGCONT)
            self._stopped = 0

    def close(self) -> None:
        """Nothing of it is left afterwards."""
        self.go_on()
        pid = self.pid
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        if self.share and (pid := self.pid or pid):
            pidfd = _opened(pid)
            if pidfd >= 0:
                os.kill(pid, signal.SIGKILL)
                select.select([pidfd], [], [], SLACK_S)
                os.close(pidfd)


def _opened(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return -1


def free_port(address: str) -> int:
    """A port to listen at. Other hosts' are all free."""
    if not address.startswith("127."):
        return 7650
    with socket.socket() as one:
        one.bind((address, 0))
        port: int = one.getsockname()[1]
        return port


@contextmanager
def ends(*made: End) -> Iterator[tuple[End, ...]]:
    """Closes them at the end."""
    with ExitStack() as stack:
        for one in made:
            stack.callback(one.close)
        yield made


@contextmanager
def origin(host: Host, root: Path) -> Iterator[str]:
    """An object store as this host sees it, over a directory that all hosts see: its URL."""
    arguments = (sys.executable, "-m", "tiercache.testing.s3server", str(root), "--port", "9000")
    process = host.start(*arguments, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().decode().strip()
    finally:
        process.kill()
        process.communicate()


BOOT_ID = "/proc/sys/kernel/random/boot_id"


@contextmanager
def machines(count: int, home: Path, *, rate_bytes_s: float = 0.0) -> Iterator[list[netns.Host]]:
    """Hosts that do not look like one machine: UCX, and this library, would go around the network by its memory. What
    tells machines from each other is their boot id, and each host sees one of its own."""
    with netns.hosts(count, rate_bytes_s=rate_bytes_s) as hosts:
        for number, host in enumerate(hosts):
            own = home / f"boot id {number} {count}"
            own.write_text(f"{uuid.uuid4()}\n")
            assert not host.start("mount", "--bind", str(own), BOOT_ID).wait(ANSWER_S)
        yield hosts
