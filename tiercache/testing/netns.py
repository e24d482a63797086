"""Hosts on one machine: network namespaces that are joined by a switch, with a rate and a delay for their links.

    with hosts(2, rate_bytes_s=125e6) as (one, two):
        server = one.start(sys.executable, "-m", "server", one.address)
        two.cut()  # as if somebody had pulled its cable; nobody is told

Programs of a host see its network alone: loopback, and `eth0` with the host's address. Namespaces have no names, and
live as long as a process that holds them, which ends with this one, however that ends: nothing is left to clean up.
Needs Linux, root, and the programs of iproute2 and util-linux: `why_not` says what is missing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from tiercache.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator

HOSTS_MAX = 250
PROGRAMS = ("ip", "tc", "unshare", "nsenter", "setpriv", "mount")
COMMAND_S_MAX = 20.0
QUEUE_S = 0.05
"""A full link keeps so much of its rate waiting; what comes on top is dropped, as a switch would."""
QUEUE_BYTES_MIN = 1 << 20
BURST_S = 0.002
BURST_BYTES_MIN = 128 << 10
"""What may leave at once after a silence: more than the 64 KiB that the kernel hands on in one piece, or the rate of a
link would depend on how it is filled."""

# /sys shows the network of whoever mounted it, and UCX looks there for interfaces. `cat` ends with its input.
_HOLD = "mount -t sysfs sysfs /sys && ip link set lo up && echo up && exec cat"


class _Namespace:
    """A network of its own, and the process that holds it."""

    def __init__(self) -> None:
        self._holder = subprocess.Popen(
            ["unshare", "--net", "--mount", "sh", "-c", _HOLD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._holder.stdout is not None and self._holder.stderr is not None
        if self._holder.stdout.readline() != "up\n":
            why = self._holder.stderr.read().strip()
            self.close()
            raise UnavailableError(f"no network namespace: {why}")

    @property
    def pid(self) -> int:
        """Of the process that holds it."""
        return self._holder.pid

    def command(self, *arguments: str) -> list[str]:
        """The command line that runs this one inside."""
        return ["nsenter", f"--target={self.pid}", "--net", "--mount", "--wd=.", *arguments]

    def run(self, line: str) -> None:
        """Runs a short program inside."""
        done = subprocess.run(
            self.command(*line.split()), check=False, capture_output=True, text=True, timeout=COMMAND_S_MAX
        )
        if done.returncode:
            raise UnavailableError(f"{line}: {done.stderr.strip() or done.returncode}")

    def close(self) -> None:
        """Lets go of it: it is gone once its last program is."""
        self._holder.kill()
        self._holder.communicate()


class Host:
    """A host: an address, and programs that have only its network."""

    def __init__(self, network: _Namespace, switch: _Namespace, number: int) -> None:
        self.address = f"10.77.0.{number}"
        self._network, self._switch, self._port = network, switch, f"port{number}"
        self._programs: list[subprocess.Popen[Any]] = []

    def command(self, *arguments: str) -> list[str]:
        """The command line that runs this one on the host, for whoever starts it in a way of their own; the program is
        killed with the thread that started it."""
        return self._network.command("setpriv", "--pdeathsig", "KILL", "--", *arguments)

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[Any]:
        """Starts a program on the host, with options of `subprocess.Popen`; it is killed with the host, or this
        thread."""
        self._programs.append(subprocess.Popen(self.command(*arguments), **options))
        return self._programs[-1]

    def cut(self) -> None:
        """Takes the host off the network: what it sends and what it is sent vanishes. Nobody is told."""
        self._switch.run(f"ip link set {self._port} nomaster")

    def restore(self) -> None:
        """Ends what `cut` began."""
        self._switch.run(f"ip link set {self._port} master switch")

    def plug(self, rate_bytes_s: float, delay_s: float) -> None:
        """Joins the host to the switch."""
        self._switch.run(f"ip link add {self._port} type veth peer name eth0 netns {self._network.pid}")
        self._switch.run(f"ip link set {self._port} master switch up")
        self._network.run(f"ip address add {self.address}/24 dev eth0")
        self._network.run("ip link set eth0 up")
        if rate_bytes_s:
            burst = max(BURST_BYTES_MIN, int(rate_bytes_s * BURST_S))
            queue = max(QUEUE_BYTES_MIN, int(rate_bytes_s * QUEUE_S))
            shape = f"tbf rate {int(rate_bytes_s * 8)}bit burst {burst} limit {queue}"
            self._network.run(f"tc qdisc add dev eth0 root {shape}")
        if delay_s:
            self._switch.run(f"tc qdisc add dev {self._port} root netem limit 100000 delay {int(delay_s * 1e6)}us")

    def close(self) -> None:
        """Kills its programs."""
        for program in self._programs:
            program.kill()
        for program in self._programs:
            program.wait()


@contextmanager
def hosts(count: int = 2, *, rate_bytes_s: float = 0.0, delay_s: float = 0.0) -> Iterator[list[Host]]:
    """So many hosts on one switch, until the end of the `with`. A host sends at most `rate_bytes_s` (0: what the
    machine can), and what it is sent takes `delay_s` on the way. Raises UnavailableError where that cannot be had."""
    if not 1 <= count <= HOSTS_MAX:
        raise UnavailableError(f"{count} hosts: 1 to {HOSTS_MAX} are possible")
    if lacking := _lacking():
        raise UnavailableError(lacking)
    with ExitStack() as stack:
        switch = _Namespace()
        stack.callback(switch.close)
        switch.run("ip link add switch type bridge")
        switch.run("ip link set switch up")
        found: list[Host] = []
        for number in range(1, count + 1):
            network = _Namespace()
            stack.callback(network.close)
            found.append(Host(network, switch, number))
            stack.callback(found[-1].close)
            found[-1].plug(rate_bytes_s, delay_s)
        yield found


def _lacking() -> str:
    """What is missing, as far as one sees without trying."""
    if sys.platform != "linux":
        return "network namespaces are there on Linux only"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: iproute2, util-linux)"
    return "" if os.geteuid() == 0 else "network namespaces need root"


@cache
def why_not(*, rate: bool = False, delay: bool = False) -> str:
    """Why `hosts` cannot work here, with a rate or a delay where that is asked for; "" where it can. It is tried once
    in a process."""
    try:
        with hosts(1, rate_bytes_s=1e6 * rate, delay_s=0.001 * delay):
            return ""
    except (UnavailableError, OSError, subprocess.TimeoutExpired) as fault:
        return str(fault)
