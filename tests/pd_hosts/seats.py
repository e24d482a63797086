"""Engines in processes of their own on hosts of their own: started, told what to do, killed."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tiercache.testing.netns import Host

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-engines" / "bin" / "python"
BOOT = "/proc/sys/kernel/random/boot_id"
LOG_LINES = 12


class FailedError(Exception):
    """A row cannot go on; the text says why."""


class Seat:
    """One process for engines; see side.py."""

    def __init__(self, name: str, host: Host, log: Path, environment: Mapping[str, str]) -> None:
        self.name, self.host, self._log = name, host, log
        with log.open("w") as told:
            self._process = host.start(
                str(PYTHON), "-m", "tests.pd_hosts.side", cwd=ROOT, env={**os.environ, **environment},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=told, text=True,
            )  # fmt: skip
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.owner = 0
        """The process that owns its cache, as far as that is known."""
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def tell(self, word: str, **arguments: Any) -> None:
        """Has it do something; `answer` is what came of it."""
        with suppress(BrokenPipeError):  # `answer` says so
            self._process.stdin.write(json.dumps([word, arguments]) + "\n")
            self._process.stdin.flush()

    def answer(self, deadline_s: float) -> Any:
        """What it answers to the oldest question."""
        try:
            line = self._lines.get(timeout=deadline_s)
        except queue.Empty:
            raise FailedError(f"engine {self.name} did not answer within {deadline_s:g} s") from None
        if not line:
            tail = self._log.read_text(errors="replace").splitlines()[-LOG_LINES:]
            raise FailedError("\n".join([f"engine {self.name} has ended:", *tail]))
        return json.loads(line)

    def ask(self, word: str, deadline_s: float, **arguments: Any) -> Any:
        """Tells it, and waits for the answer."""
        self.tell(word, **arguments)
        return self.answer(deadline_s)

    def opened(self, deadline_s: float) -> None:
        """Waits for the answer to "open"."""
        self.owner = self.answer(deadline_s)

    @property
    def idle(self) -> bool:
        """Whether no answer has come yet."""
        return self._lines.empty()

    def kill(self) -> None:
        """As if its host had lost all its programs: the engine and the owner of its cache get SIGKILL."""
        self._process.kill()
        if self.owner:
            with suppress(ProcessLookupError):
                os.kill(self.owner, signal.SIGKILL)
            self.owner = 0
        self._process.wait()


def set_apart(host: Host, identity: Path) -> None:
    """From now on programs of the host believe that their machine is another one: `identity` holds the name of its
    boot."""
    subprocess.run(host.command("mount", "--bind", str(identity), BOOT), check=True)


def slow_down(host: Host, rate_bytes_s: float) -> None:
    """What the host sends has this rate from now on; 0: no limit."""
    line = ["tc", "qdisc", "replace", "dev", "eth0", "root"]
    if rate_bytes_s:
        line += ["tbf", "rate", f"{int(rate_bytes_s * 8)}bit", "burst", "128kb", "limit", "1mb"]
    else:
        line += ["pfifo"]
    subprocess.run(host.command(*line), check=True)


def received_bytes(host: Host) -> int:
    """What the host's network has brought it so far."""
    at = "/sys/class/net/eth0/statistics/rx_bytes"
    return int(subprocess.run(host.command("cat", at), check=True, capture_output=True, text=True).stdout)
