"""A real Ceph object gateway on loopback, for as long as a `with` block: S3 semantics from a store that others run.

One monitor, one OSD in memory, one manager and one gateway, all in a private directory on free ports, as children of
this process. Needs Debian's radosgw, ceph-mon, ceph-osd, ceph-mgr and ceph-common; `missing()` says what is not there.
As a program: `python -m tiercache.testing.ceph` prints the endpoint and serves until it is interrupted.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Self

from tiercache.clock import SystemClock
from tiercache.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable

    from tiercache.clock import Clock

PROGRAMS = ("ceph-mon", "ceph-osd", "ceph-mgr", "radosgw", "radosgw-admin", "ceph", "monmaptool", "ceph-authtool")
PACKAGES = "radosgw ceph-mon ceph-osd ceph-mgr ceph-common"
ACCESS_KEY = "tiercache"
SECRET_KEY = "tiercache-secret"
MEMORY_BYTES = 3 << 30
START_TIMEOUT_S = 180.0
COMMAND_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 2.0
"""Everything they hold is thrown away: a daemon that takes longer is killed."""
POLL_S = 0.25
USERS = {
    "mon.": ["mon", "allow *"],
    "client.admin": ["mon", "allow *", "osd", "allow *", "mgr", "allow *"],
    "osd.0": ["mon", "allow profile osd", "mgr", "allow profile osd", "osd", "allow *"],
    "mgr.x": ["mon", "allow profile mgr", "osd", "allow *"],
    "client.rgw.a": ["mon", "allow rw", "osd", "allow rwx", "mgr", "allow rw"],
}
CONFIG = """[global]
fsid={fsid}
mon_host=[v2:127.0.0.1:{mon_port},v1:127.0.0.1:{old_port}]
mon_initial_members=a
auth_cluster_required=cephx
auth_service_required=cephx
auth_client_required=cephx
keyring={home}/keyring
osd_pool_default_size=1
osd_pool_default_min_size=1
osd_pool_default_pg_num=8
osd_pool_default_pg_autoscale_mode=off
osd_crush_chooseleaf_type=0
mon_allow_pool_size_one=true
mon_max_pg_per_osd=1000
mon_data_avail_crit=1
mon_data_avail_warn=1
osd_objectstore=memstore
memstore_device_bytes={memory_bytes}
public_network=127.0.0.0/8
ms_bind_ipv6=false
run_dir={home}/run
log_file={home}/$name.log
admin_socket={home}/run/$name.asok
pid_file={home}/run/$name.pid
crash_dir={home}/crash
mon_data={home}/mon
osd_data={home}/osd
mgr_data={home}/mgr
[mgr]
mgr_initial_modules=
[client.rgw.a]
rgw_frontends=beast endpoint=127.0.0.1:{port}
rgw_data={home}/rgw
rgw_enable_usage_log=false
"""


def missing() -> str:
    """What to install before a Ceph can start here; empty when nothing."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"no {', '.join(absent)} (Debian: apt-get install {PACKAGES})" if absent else ""


def free_port() -> int:
    """A port of loopback that nobody has right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Ceph:
    """One small cluster with one S3 user; a context manager. Everything it wrote is gone afterwards.

    Raises UnavailableError, with the end of the log in question, when it does not serve within `timeout_s`.
    """

    access_key = ACCESS_KEY
    secret_key = SECRET_KEY

    def __init__(
        self,
        *,
        memory_bytes: int = MEMORY_BYTES,
        timeout_s: float = START_TIMEOUT_S,
        say: Callable[[str], None] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.port = 0
        self._memory_bytes = memory_bytes
        self._timeout_s = timeout_s
        self._say = say or (lambda text: None)
        self._clock = clock or SystemClock()
        self._home = Path()
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._until_s = 0.0
        self._pause = threading.Event()

    @property
    def url(self) -> str:
        """Endpoint, without a slash at the end."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def options(self) -> dict[str, str]:
        """s3fs-style options for its user."""
        return {"key": ACCESS_KEY, "secret": SECRET_KEY, "endpoint_url": self.url}

    @property
    def version(self) -> str:
        """What Ceph calls itself, such as "16.2.15"."""
        words = self._command("ceph", "--version").split()
        return words[2] if len(words) > 2 else "unknown"

    def __enter__(self) -> Self:
        lacking = missing()
        if lacking:
            raise UnavailableError(f"Ceph cannot start: {lacking}")
        self._until_s = self._clock.monotonic() + self._timeout_s
        self._home = Path(tempfile.mkdtemp(prefix="tiercache-ceph-"))
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops every daemon, the gateway first, and removes the directory. Idempotent."""
        for process in reversed(self._daemons):
            process.terminate()
        for process in reversed(self._daemons):
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._daemons.clear()
        if self._home != Path():
            shutil.rmtree(self._home, ignore_errors=True)

    def _start(self) -> None:
        for name in ("mon", "osd", "mgr", "rgw", "run", "crash"):
            (self._home / name).mkdir()
        fsid, mon_port, old_port, self.port = str(uuid.uuid4()), free_port(), free_port(), free_port()
        facts = {"mon_port": mon_port, "old_port": old_port, "port": self.port, "memory_bytes": self._memory_bytes}
        (self._home / "ceph.conf").write_text(CONFIG.format(fsid=fsid, home=self._home, **facts))
        self._say("monitor")
        self._make_keys()
        place = f"[v2:127.0.0.1:{mon_port},v1:127.0.0.1:{old_port}]"
        monmap = str(self._home / "monmap")
        self._command("monmaptool", "--create", "--clobber", "--fsid", fsid, "--addv", "a", place, monmap)
        self._command("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", str(self._home / "keyring"))
        self._daemon("ceph-mon", "-i", "a")
        self._command("ceph", "--connect-timeout", "30", "mon", "stat")
        self._command("ceph", "auth", "import", "-i", str(self._home / "keyring"))
        self._say("storage")
        self._daemon("ceph-mgr", "-i", "x")
        osd = str(uuid.uuid4())
        self._command("ceph", "osd", "new", osd, "0")
        self._command("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        self._command("ceph", "osd", "crush", "add", "osd.0", "1.0", "host=here", "root=default")
        self._daemon("ceph-osd", "-i", "0")
        self._wait("the OSD to be up", self._osd_is_up)
        self._say("user")
        user = ["--uid=tiercache", "--display-name=tiercache", f"--access-key={ACCESS_KEY}", f"--secret={SECRET_KEY}"]
        self._command("radosgw-admin", "-n", "client.rgw.a", "user", "create", *user)
        self._say("gateway")
        self._daemon("radosgw", "-n", "client.rgw.a")
        self._wait("the gateway to answer", self._answers)

    def _make_keys(self) -> None:
        keyring = str(self._home / "keyring")
        for i, (name, rights) in enumerate(USERS.items()):
            caps: list[str] = []
            for service, right in zip(rights[::2], rights[1::2]):
                caps += ["--cap", service, right]
            self._command("ceph-authtool", *(["-C"] if not i else []), keyring, "--gen-key", "-n", name, *caps)

    def _command(self, name: str, *arguments: str) -> str:
        """Runs one of Ceph's tools to its end and answers what it printed."""
        left_s = self._until_s - self._clock.monotonic() if self._until_s else COMMAND_TIMEOUT_S
        command = [
            name,
            *(["-c", str(self._home / "ceph.conf")] if name not in ("monmaptool", "ceph-authtool") else []),
        ]
        try:
            done = subprocess.run(
                [*command, *arguments], capture_output=True, text=True, timeout=max(1.0, left_s), env=environment()
            )
        except subprocess.TimeoutExpired as error:
            raise UnavailableError(f"Ceph did not start in time: {name} {' '.join(arguments[:3])}") from error
        if done.returncode:
            raise UnavailableError(f"{name} {' '.join(arguments[:3])}: {done.stderr.strip()[-500:]}")
        return done.stdout

    def _daemon(self, name: str, *arguments: str) -> None:
        with (self._home / f"{name}.out").open("wb") as output:
            command = [name, "-f", "-c", str(self._home / "ceph.conf"), *arguments]
            self._daemons.append(subprocess.Popen(command, stdout=output, stderr=output, env=environment()))

    def _wait(self, what: str, ready: Callable[[], bool]) -> None:
        while not ready():
            dead = [each for each in self._daemons if each.poll() is not None]
            if dead or self._clock.monotonic() > self._until_s:
                raise UnavailableError(f"Ceph did not start, waited for {what}: {self._last_words()}")
            self._pause.wait(POLL_S)

    def _last_words(self) -> str:
        texts = [path.read_text(errors="replace")[-300:].strip() for path in sorted(self._home.glob("*.out"))]
        return " | ".join(text for text in texts if text) or "no output"

    def _osd_is_up(self) -> bool:
        facts = json.loads(self._command("ceph", "osd", "stat", "--format", "json"))
        return int(facts.get("num_up_osds", 0)) == 1

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


def environment() -> dict[str, str]:
    """The environment without what would lead Ceph's tools to another Python or another cluster."""
    hidden = ("CEPH_", "PYTHON", "VIRTUAL_ENV")
    return {name: value for name, value in os.environ.items() if not name.startswith(hidden)}


def main() -> None:
    """Serves until interrupted; the first line of output is the endpoint, the second the keys."""

    def say(text: str) -> None:
        sys.stderr.write(f"starting {text}\n")

    with contextlib.suppress(KeyboardInterrupt), Ceph(say=say) as ceph:
        sys.stdout.write(f"{ceph.url}\n{ACCESS_KEY} {SECRET_KEY}\n")
        sys.stdout.flush()
        threading.Event().wait()


if __name__ == "__main__":
    main()
