"""Two hosts that share nothing but a bucket: what the first one wrote, the second one loads after a kill -9."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.shared.conftest import Shared
from tiercache.settings import MIB
from tiercache.testing.s3server import S3Server

HOST = Path(__file__).with_name("host.py")
CAP_BYTES = 64 * MIB


class Watch:
    """Adds up what lies in a directory, over and over, in a thread: the most that it ever saw counts."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._over = threading.Event()
        self.bytes_max = 0
        self.looks = 0
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._over.is_set():
            self.look()
            self._over.wait(0.001)

    def look(self) -> int:
        """Bytes that lie there now. A file that appears while others are counted may be counted beside one that has
        just gone, so this is never too little."""
        total = 0
        for parent, _, names in os.walk(self._home):
            for name in names:
                try:
                    total += os.stat(os.path.join(parent, name)).st_size
                except FileNotFoundError:
                    continue
        self.looks += 1
        self.bytes_max = max(self.bytes_max, total)
        return total

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


@dataclass
class Hosts:
    """A bucket and the hosts that come and go."""

    home: Path
    url: str
    cap_bytes: int = CAP_BYTES
    share: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    count: int = 0

    def settings(self) -> dict[str, Any]:
        """Those of a new host."""
        self.count += 1
        return {
            "directory": str(self.home / f"host{self.count}"),
            "memory_bytes": 96 * MIB,
            "queue_bytes": 96 * MIB,
            "ssd_bytes": 0,
            "disk_free_floor_bytes": 0,
            "share": self.share,
            "linger_s": 0.1,
            "remote_url": self.url,
            "remote_options": json.dumps(self.options) if self.options else "",
            "remote_bytes": self.cap_bytes,
            "remote_rate_bytes_s": 0,
            "remote_deadline_s": 10,
        }

    def write_and_kill(self, chains: tuple[int, ...], count: int, *, after: int) -> dict[str, Any]:
        """Starts a host for each chain that writes its blocks, all at once, and kills them, and their owners, when each
        has so many up, or no more to do; what they said last, added up."""
        places = [self.settings() for _ in chains]
        children = [self._start("write", one, which, count) for one, which in zip(places, chains, strict=True)]
        total = {"put": 0, "uploaded": 0}
        for child in children:
            assert child.stdout is not None
            last: dict[str, Any] = {}
            for line in child.stdout:
                last |= json.loads(line)
                if last["uploaded"] >= after or "done" in last:
                    break
            total = {name: total[name] + last[name] for name in total}
        for child, settings in zip(children, places, strict=True):
            child.kill()
            owner = Shared(Path(settings["directory"])).owner if self.share else 0
            if owner:
                os.kill(owner, signal.SIGKILL)
            child.communicate()
        return total

    def read(self, which: int, count: int) -> dict[str, Any]:
        """What another host gets of these blocks."""
        child = self._start("read", self.settings(), which, count)
        said, _ = child.communicate(timeout=60)
        assert child.returncode == 0
        found: dict[str, Any] = json.loads(said.splitlines()[-1])
        return found

    def _start(self, role: str, settings: dict[str, Any], which: int, count: int) -> subprocess.Popen[str]:
        environment = os.environ | {"TIERCACHE_CONFIG": "", "TIERCACHE_SHARE": str(self.share).lower()}
        arguments = [sys.executable, str(HOST), role, json.dumps(settings), str(which), str(count)]
        return subprocess.Popen(arguments, stdout=subprocess.PIPE, env=environment, text=True)


def run(home: Path, *, share: bool = False, rounds: int = 4) -> list[dict[str, Any]]:
    """The whole show over S3: rows of what happened, each with the most bytes that lay in its bucket."""
    rows: list[dict[str, Any]] = []
    (home / "s3").mkdir(parents=True)
    with S3Server(home / "s3") as server:
        options = {"endpoint_url": server.url, "anon": True}

        def once(hosts: Hosts, what: str, chains: tuple[int, ...], count: int, after: int) -> None:
            with Watch(home / "s3" / hosts.url.removeprefix("s3://")) as watch:
                facts = hosts.write_and_kill(chains, count, after=after)
                found = [hosts.read(which, count) for which in chains]
            rows.append(
                {"what": what, **facts, "bytes_max": watch.bytes_max, "cap_bytes": hosts.cap_bytes}
                | {name: sum(one[name] for one in found) for name in found[0]}
            )

        def bucket(name: str, cap_bytes: int) -> Hosts:
            (home / "s3" / name).mkdir()
            return Hosts(home / name, f"s3://{name}", cap_bytes, share, options)

        once(bucket("small", CAP_BYTES // 2), "twice the cap", (0,), 240, 240)
        once(bucket("shared", CAP_BYTES), "two at once", (100, 101), 240, 240)
        crowded = bucket("crowded", 4 * CAP_BYTES)
        once(crowded, "within the cap", (1,), 120, 120)
        for number in range(rounds):
            once(crowded, "killed in mid-upload", (2 + number,), 200, 10 + 17 * number)
    return rows
