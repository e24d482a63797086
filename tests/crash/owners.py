"""kill -9 of the owner of a directory under the load of four clients: `python -m tests.crash --owners 200`.

Ends with `wrong 0 lost 0 stuck 0`: no client saw a wrong byte in a copy or in a view held across the death, everything
acknowledged as durable is there at the end (through the clients, and once more for a process alone), every thread of
every client went on within PATIENCE_S of each kill, no call raised but puts that were refused, and neither the memory
files of the arena nor the directory passed their caps.
"""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import tiercache
from tests.crash.ledger import value_of
from tests.crash.owner_client import OPTIONS, name_of, size_of
from tiercache.model import Outcome
from tiercache.testing.model import made_bytes

CLIENTS = 4
PATIENCE_S = 15.0
ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Seen:
    """What the parent heard of one client."""

    process: subprocess.Popen[bytes]
    rest: bytes = b""
    beats: list[int] = field(default_factory=list)
    sums: str = ""


@dataclass
class Sums:
    """Over the whole run."""

    wrong: int = 0
    lost: int = 0
    stuck: int = 0
    over_cap: int = 0
    durable: set[int] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)
    arena_bytes: int = 0
    ssd_bytes: int = 0
    back_s: list[float] = field(default_factory=list)


def hear(clients: list[Seen], sums: Sums, wait_s: float) -> None:
    """Takes in what clients say for a while."""
    pipes = {client.process.stdout: client for client in clients if client.process.stdout is not None}
    ready, _, _ = select.select(list(pipes), [], [], wait_s)
    for pipe in ready:
        client = pipes[pipe]
        data = os.read(pipe.fileno(), 1 << 16)
        *lines, client.rest = (client.rest + data).split(b"\n")
        for line in lines:
            verb, _, text = line.decode(errors="replace").partition(" ")
            if verb == "a":
                sums.durable.add(int(text))
            elif verb == "b":
                client.beats = [int(count) for count in text.split()]
            elif verb == "s":
                client.sums = text
            else:
                sums.wrong += verb == "w"
                sums.lost += verb == "l"
                sums.faults.append(f"{verb} {text}")


def owner_pid(directory: Path) -> int | None:
    """Who owns the directory now, as the owner says."""
    try:
        return int(json.loads((directory / "owner.state").read_text())["owner"][0])
    except (OSError, ValueError, KeyError):
        return None


def measure(directory: Path, pids: list[int], sums: Sums) -> None:
    """Memory files of the arena, each once however many map it, and the directory, against their caps."""
    files: dict[tuple[int, int], int] = {}
    for pid in pids:
        try:
            entries = list(os.scandir(f"/proc/{pid}/fd"))
        except OSError:
            continue
        for entry in entries:
            try:
                if "/memfd:tiercache-" in os.readlink(entry.path):
                    facts = os.stat(entry.path)
                    files[facts.st_dev, facts.st_ino] = facts.st_blocks * 512
            except OSError:
                continue
    arena = sum(files.values())
    ssd = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            try:
                ssd += os.lstat(os.path.join(parent, name)).st_blocks * 512
            except OSError:
                continue
    sums.arena_bytes, sums.ssd_bytes = max(sums.arena_bytes, arena), max(sums.ssd_bytes, ssd)
    sums.over_cap += arena > OPTIONS["memory_bytes"] or ssd > OPTIONS["ssd_bytes"]


def start(directory: Path, files: Path, number: int, seed: str) -> Seen:
    """One client process."""
    command = [sys.executable, "-m", "tests.crash.owner_client", str(directory), str(files), str(number), seed]
    return Seen(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT))


def went_on(clients: list[Seen], before: list[list[int]]) -> bool:
    """Whether every thread of every client has done something twice since."""
    return all(
        client.beats and len(client.beats) == len(was) and all(now > then + 1 for now, then in zip(client.beats, was))
        for client, was in zip(clients, before)
    )


def one_kill(directory: Path, clients: list[Seen], sums: Sums, rng: random.Random) -> bool:
    """Kills the owner after a while, and waits until everybody goes on; False where nobody owns the directory."""
    until = time.monotonic() + rng.uniform(0.0, 0.5)
    while (left_s := until - time.monotonic()) > 0:
        hear(clients, sums, left_s)
    pid = owner_pid(directory)
    if pid is None:
        return False
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    killed = time.monotonic()
    while clients and time.monotonic() - killed < 0.02:
        hear(clients, sums, 0.02)  # what was said before the kill
    before = [list(client.beats) for client in clients]
    while not went_on(clients, before):
        hear(clients, sums, 0.2)
        if time.monotonic() - killed > PATIENCE_S:
            sums.stuck += 1
            states = [(client.beats, was, client.process.poll()) for client, was in zip(clients, before)]
            sums.faults.append(f"stuck {PATIENCE_S} s after a kill: {states}")
            return True
    sums.back_s.append(time.monotonic() - killed)
    measure(directory, [client.process.pid for client in clients] + [owner_pid(directory) or 0], sums)
    return True


def end(clients: list[Seen], sums: Sums) -> None:
    """Lets clients check everything and leave."""
    for client in clients:
        assert client.process.stdin is not None
        client.process.stdin.close()
    until = time.monotonic() + 120
    while any(client.process.poll() is None for client in clients) and time.monotonic() < until:
        hear(clients, sums, 0.2)
    for client in clients:
        if client.process.poll() is None:
            sums.stuck += 1
            client.process.kill()
        while client.process.stdout is not None and select.select([client.process.stdout], [], [], 0)[0]:
            size = len(client.rest)
            hear([client], sums, 0)
            if len(client.rest) == size:
                break
        status = client.process.wait()
        if status or not client.sums:
            sums.faults.append(f"a client ended with status {status}: {client.sums or 'no sums'}")


def check_alone(directory: Path, sums: Sums) -> None:
    """A process alone, without an owner, must find everything durable."""
    numbers = sorted(sums.durable)
    with tiercache.open(str(directory), **{**OPTIONS, "share": False}) as cache:
        if not cache.core.durable:
            sums.faults.append("the directory was still locked at the end")
            return
        for number in numbers:
            target = bytearray(size_of(number))
            outcome = cache.get_into([name_of(number)], [target])[0]
            if outcome is not Outcome.HIT:
                sums.lost += 1
                sums.faults.append(f"value {number} is {outcome.name} for a process alone")
            elif target != value_of(number, size_of(number)):
                sums.wrong += 1


def wait_for_owner_to_leave(directory: Path, sums: Sums) -> None:
    """The owner goes some seconds after its last client."""
    pid = owner_pid(directory)
    if pid is None:
        return
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    ready, _, _ = select.select([descriptor], [], [], 60)
    os.close(descriptor)
    if not ready:
        sums.faults.append("the owner did not leave after its last client")


def owners(kills: int, seed: str, *, quiet: bool) -> dict[str, object]:
    """Kills `kills` owners and answers the sums."""
    rng, sums, begun = random.Random(seed), Sums(), time.monotonic()
    top = Path(tempfile.mkdtemp(prefix="tiercache-owners-"))
    directory, files = top / "cache", top / "files"
    files.mkdir()
    for number in range(6):
        path = files / f"file {number}"
        path.write_bytes(made_bytes(("file", number), 2_000_000 + number))
        os.utime(path, (1_700_000_000, 1_700_000_000))
    clients = [start(directory, files, number, f"{seed}/{number}") for number in range(CLIENTS)]
    done = 0
    try:
        while not went_on(clients, [[0] * 4] * CLIENTS) and time.monotonic() - begun < 4 * PATIENCE_S:
            hear(clients, sums, 0.2)
        idle = 0
        while done < kills and sums.stuck < 3 and idle < 100:
            killed = one_kill(directory, clients, sums, rng)
            done, idle = done + killed, 0 if killed else idle + 1
            if not quiet and killed and done % 20 == 0:
                print(f"{done} owners killed, wrong {sums.wrong} lost {sums.lost} stuck {sums.stuck}", flush=True)
        end(clients, sums)
        if 4 * sum(map(size_of, sums.durable)) > OPTIONS["ssd_bytes"]:  # about half of what was written is durable
            sums.faults.append("so much was written that what is missing may have been evicted")
        wait_for_owner_to_leave(directory, sums)
        check_alone(directory, sums)
    finally:
        for client in clients:
            client.process.kill()
        shutil.rmtree(top, ignore_errors=True)
    counts: Counter[str] = Counter()
    for client in clients:
        for word in client.sums.split():
            name, _, count = word.partition("=")
            counts[name] += int(count)
    back = sorted(sums.back_s)
    return {
        "kills": done,
        "wanted": kills,
        "durable": len(sums.durable),
        **counts,
        "back_median_s": round(back[len(back) // 2], 3) if back else None,
        "back_worst_s": round(back[-1], 3) if back else None,
        "arena_bytes": sums.arena_bytes,
        "ssd_bytes": sums.ssd_bytes,
        "seconds": round(time.monotonic() - begun, 1),
        "seed": seed,
        "over_cap": sums.over_cap,
        "faults": sums.faults[:20],
        "fault_count": len(sums.faults),
        "wrong": sums.wrong,
        "lost": sums.lost,
        "stuck": sums.stuck,
    }
