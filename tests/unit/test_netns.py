"""Hosts on one machine: who reaches whom, how fast, what a cut does, and that nothing outlives its maker."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time

import pytest

from tiercache.errors import UnavailableError
from tiercache.testing.netns import hosts, why_not

needs_hosts = pytest.mark.skipif(bool(why_not()), reason=why_not() or "it works here")
DEADLINE_S = 20.0

SINK = """
import socket, sys
server = socket.create_server((sys.argv[1], 9000))
print("listening", flush=True)
while True:
    peer, _ = server.accept()
    while peer.recv(1 << 20):
        pass
    peer.close()
"""

CLIENT = """
import socket, sys, time
try:
    peer = socket.create_connection((sys.argv[1], 9000), timeout=float(sys.argv[2]))
except OSError as fault:
    sys.exit(type(fault).__name__)
peer.settimeout(20)
start = time.monotonic()
peer.sendall(bytes(int(sys.argv[3])))
peer.shutdown(socket.SHUT_WR)
peer.recv(1)
print(time.monotonic() - start)
"""

HOSTS = """
import subprocess, sys
from tiercache.testing.netns import hosts
with hosts(2) as (one, two):
    program = one.start("sh", "-c", "echo; exec sleep 1000", stdout=subprocess.PIPE)
    program.stdout.readline()
    print(*[each._network.pid for each in (one, two)], one._switch.pid, program.pid, flush=True)
    sys.stdin.read()
"""


def sink(host) -> subprocess.Popen:
    program = host.start(sys.executable, "-c", SINK, host.address, stdout=subprocess.PIPE, text=True)
    with program.stdout as lines:
        assert lines.readline() == "listening\n"
    return program


def client(host, address: str, patience_s: float = DEADLINE_S, size: int = 1) -> subprocess.CompletedProcess:
    line = host.command(sys.executable, "-c", CLIENT, address, str(patience_s), str(size))
    return subprocess.run(line, check=False, capture_output=True, text=True, timeout=2 * DEADLINE_S)


@needs_hosts
@pytest.mark.slow
def test_hosts_reach_each_other_and_nobody_else() -> None:
    with hosts(3) as (one, two, three):
        sink(one)
        assert [client(host, one.address).returncode for host in (one, two, three)] == [0, 0, 0]
        assert client(two, three.address).stderr == "ConnectionRefusedError\n"
        assert client(two, "192.0.2.1").stderr == "OSError\n"  # no route
        seen = subprocess.run(two.command("ls", "/sys/class/net"), check=True, capture_output=True, text=True)
        assert seen.stdout.split() == ["eth0", "lo"]


@needs_hosts
@pytest.mark.slow
def test_a_cut_host_is_alone_until_it_is_restored() -> None:
    with hosts() as (one, two):
        sink(one)
        assert client(two, one.address).returncode == 0
        one.cut()
        assert client(two, one.address, 0.1).stderr == "TimeoutError\n"
        assert client(one, one.address).returncode == 0
        one.restore()
        assert client(two, one.address).returncode == 0


@needs_hosts
@pytest.mark.slow
@pytest.mark.skipif(bool(why_not(rate=True)), reason=why_not(rate=True) or "it works here")
def test_a_link_has_its_rate() -> None:
    size, rate = 10_000_000, 50e6
    with hosts(rate_bytes_s=rate) as (one, two):
        sink(one)
        took = float(client(two, one.address, size=size).stdout)
    assert took > 0.9 * size / rate
    assert took < 10 * size / rate  # a machine may be busy, a link that loses all it is given is another thing


@needs_hosts
@pytest.mark.skipif(bool(why_not(delay=True)), reason=why_not(delay=True) or "it works here")
def test_a_link_has_its_delay() -> None:
    with hosts(delay_s=0.05) as (one, two):
        sink(one)
        assert float(client(two, one.address).stdout) > 0.1


@needs_hosts
def test_an_exception_takes_the_programs_along() -> None:
    with pytest.raises(ZeroDivisionError), hosts() as (one, _two):
        program = one.start("sleep", "1000")
        _ = 1 / 0
    assert program.returncode == -9


@needs_hosts
@pytest.mark.slow
def test_a_killed_maker_leaves_nothing_behind() -> None:
    maker = [sys.executable, "-c", HOSTS]
    with subprocess.Popen(maker, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        watched = [os.pidfd_open(int(pid)) for pid in process.stdout.readline().split()]
        process.kill()
    end = time.monotonic() + DEADLINE_S
    for each in watched:  # readable once the process has ended
        assert select.select([each], [], [], max(0.0, end - time.monotonic()))[0]
        os.close(each)


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UnavailableError, match=r"not installed: .*nsenter|on Linux only"), hosts():
        pass
    with pytest.raises(UnavailableError, match="300 hosts"), hosts(300):
        pass
