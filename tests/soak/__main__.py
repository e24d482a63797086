"""An owner and six clients doing everything for minutes: `python -m tests.soak --minutes 10 [--json]`.

Once a second it looks at memory of each process' own, descriptors and threads of the owner and of every client, and at
the owner's pins and bytes in use. Ends with one line for each of these (the least-squares slope an hour, the largest
after the warm-up) and `flat` or `not flat`, and with status 0 only if all are flat, nobody saw a wrong byte or a fault,
and the owner, left alone, has its descriptors and no pin. A slope counts if over the run it comes to more than what the
quantity allows, and the later third of the run lies above the first by as much: noise does neither.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiercache
from tests.soak.client import OPTIONS
from tiercache.sync import wait
from tiercache.testing.model import made_bytes

MIB = 1 << 20
ROOT = Path(__file__).resolve().parents[2]
CLIENTS = 6
VISIT_S = 4.0
ALLOWED = {"anon_bytes": 6 * MIB, "descriptors": 4, "threads": 4, "pins": 24, "arena_bytes": 8 * MIB}
"""What a quantity may grow by over a run, and what share of itself."""
SHARE = 0.06


@dataclass
class Row:
    """One quantity of one process over time."""

    allowed: float
    at_s: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def facts(self, warm_s: float) -> dict[str, Any]:
        """Slope and maximum after the warm-up, and whether it is flat."""
        points = [(t, v) for t, v in zip(self.at_s, self.values, strict=True) if t >= warm_s]
        if len(points) < 10:
            return {"flat": True, "samples": len(points)}
        times, values = [t for t, _ in points], [v for _, v in points]
        slope = statistics.linear_regression(times, values).slope
        third = len(values) // 3
        rise = statistics.median(values[-third:]) - statistics.median(values[:third])
        allowed = max(self.allowed, SHARE * statistics.median(values))
        grown = slope * (times[-1] - times[0])
        return {
            "flat": not (grown > allowed and rise > allowed),
            "slope_an_hour": round(slope * 3600, 1),
            "late_slope_an_hour": round(statistics.linear_regression(times[-third:], values[-third:]).slope * 3600, 1),
            "grown": round(grown, 1),
            "first_third": round(statistics.median(values[:third]), 1),
            "last_third": round(statistics.median(values[-third:]), 1),
            "max": max(values),
            "samples": len(points),
        }


def look(pid: int) -> dict[str, float]:
    """Memory of a process' own (not what it has mapped of the cache's), descriptors, threads."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return {
        "anon_bytes": int(status["RssAnon"].split()[0]) * 1024,
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(status["Threads"]),
    }


@dataclass
class Run:
    """What is known so far."""

    rows: dict[str, Row] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    wrong: int = 0
    visits: int = 0

    def note(self, who: str, at_s: float, found: dict[str, float]) -> None:
        """One sample."""
        for what, value in found.items():
            row = self.rows.setdefault(f"{who} {what}", Row(ALLOWED[what]))
            row.at_s.append(at_s)
            row.values.append(value)

    def hear(self, clients: list[subprocess.Popen[bytes]], wait_s: float) -> None:
        """Takes in what clients say for a while."""
        until = time.monotonic() + wait_s
        pipes = {client.stdout: client for client in clients if client.stdout is not None and not client.stdout.closed}
        while pipes and (left_s := until - time.monotonic()) > 0:
            for pipe in select.select(list(pipes), [], [], left_s)[0]:
                line = pipe.readline().decode(errors="replace").rstrip()
                if not line:
                    del pipes[pipe]
                    pipe.close()
                elif line.startswith("sums "):
                    for name, count in json.loads(line[5:]).items():
                        self.counts[name] = self.counts.get(name, 0) + count
                else:
                    self.wrong += line.startswith("wrong")
                    self.faults.append(line)


def start(*arguments: object) -> subprocess.Popen[bytes]:
    """One process that uses the cache."""
    command = [sys.executable, "-m", "tests.soak.client", *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)


def owner_of(cache: tiercache.sync.BlockingCache) -> dict[str, Any]:
    """What the owner says of itself and its clients."""
    facts: dict[str, Any] = wait(cache.core.call("owner", {}), cache.loop)
    return facts


def sample(run: Run, cache: tiercache.sync.BlockingCache, owner: int, clients: list[Any], at_s: float) -> None:
    """Looks at everybody once."""
    stats = cache.stats()
    used = sum(value for name, value in stats.items() if name.startswith('tiercache_tier_used_bytes{tier="memory'))
    run.note("owner", at_s, look(owner) | {"pins": stats["tiercache_leases"], "arena_bytes": used})
    for number, client in enumerate(clients):
        if client.poll() is not None:
            run.faults.append(f"client {number} ended with status {client.returncode}")
            continue
        run.note(f"client {number}", at_s, look(client.pid))
    run.note("watcher", at_s, look(os.getpid()))


def soak(minutes: float, seed: str, *, quiet: bool) -> dict[str, Any]:
    """Runs it and answers the sums."""
    run, rng, begun = Run(), random.Random(seed), time.monotonic()
    top = Path(tempfile.mkdtemp(prefix="tiercache-soak-"))
    directory, files = top / "cache", top / "files"
    files.mkdir()
    for number in range(6):
        path = files / f"file {number}"
        path.write_bytes(made_bytes(("file", number), 2_000_000 + number))
        os.utime(path, (1_700_000_000, 1_700_000_000))
    clients: list[subprocess.Popen[bytes]] = []
    visitor: subprocess.Popen[bytes] | None = None
    cache = tiercache.open(directory, share=True, **OPTIONS)
    try:
        owner = int(owner_of(cache)["pid"])
        clients = [start(directory, files, number, seed) for number in range(CLIENTS)]
        length_s, visit_s, said_s = minutes * 60, VISIT_S, 0.0
        while (at_s := time.monotonic() - begun) < length_s:
            run.hear(clients, 1.0)
            sample(run, cache, owner, clients, at_s)
            if at_s >= visit_s:
                if visitor is not None:
                    end_visit(run, visitor)
                visitor = start(directory, files, 100 + run.visits % 8, seed, "--visit", rng.choice(["stay", "leave"]))
                run.visits, visit_s = run.visits + 1, at_s + VISIT_S
            if not quiet and at_s - said_s >= 60:
                said_s = at_s
                print(f"{at_s:.0f} s: {look(owner)} wrong {run.wrong} faults {len(run.faults)}", flush=True)
        if visitor is not None:
            end_visit(run, visitor)
        left = leave(run, clients, cache, owner)
        log = (directory / "owner.log").read_text()
        run.faults += [f"the owner: {line}" for line in log.splitlines() if " ERROR " in line][:5]
        if run.faults and not quiet:
            print(log[-20_000:])
    finally:
        for client in clients:
            client.kill()
            client.wait()
        cache.close()
        shutil.rmtree(top, ignore_errors=True)
    warm_s = min(0.3 * length_s, 120.0)
    rows = {name: row.facts(warm_s) for name, row in sorted(run.rows.items())}
    return {
        "minutes": minutes,
        "warm_up_s": warm_s,
        "visits": run.visits,
        **run.counts,
        **left,
        "rows": rows,
        "faults": run.faults[:20],
        "fault_count": len(run.faults),
        "wrong": run.wrong,
        "not_flat": [name for name, row in rows.items() if not row["flat"]],
    }


def end_visit(run: Run, visitor: subprocess.Popen[bytes]) -> None:
    """A visitor that is still there is killed, whatever it is doing; what one said counts."""
    visitor.kill()
    said, _ = visitor.communicate()
    for line in said.decode(errors="replace").splitlines():
        if line.startswith(("wrong", "fault")):
            run.wrong += line.startswith("wrong")
            run.faults.append(f"visitor: {line}")


def leave(run: Run, clients: list[subprocess.Popen[bytes]], cache: Any, owner: int) -> dict[str, Any]:
    """Lets the clients go; what the owner still has when only this process is there."""
    for client in clients:
        assert client.stdin is not None
        client.stdin.close()
    run.hear(clients, 60.0)
    for number, client in enumerate(clients):
        try:
            if client.wait(30):
                run.faults.append(f"client {number} ended with status {client.returncode}")
        except subprocess.TimeoutExpired:
            run.faults.append(f"client {number} does not end")
    until = time.monotonic() + 10
    while len(owner_of(cache)["clients"]) > 1 and time.monotonic() < until:
        run.hear([], 0.1)
        select.select([], [], [], 0.1)
    cache.flush()
    said, right = owner_of(cache), wait(cache.core.call("validate", {}), cache.loop)
    mine = [row for row in said["clients"] if row["pid"] == os.getpid()]
    if said["pid"] != owner or len(said["clients"]) != 1 or not mine or mine[0]["leases"]:
        run.faults.append(f"the owner is left with {said}")
    if right["broken"] or right["pins"]:
        run.faults.append(f"the index is left with {right}")
    return {"left_descriptors": look(owner)["descriptors"], "left_pins": right["pins"]}


def main() -> int:
    """Parses arguments, runs, reports; 1 when anything was not as promised."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", default="1")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    sums = soak(arguments.minutes, arguments.seed, quiet=arguments.json)
    if arguments.json:
        print(json.dumps(sums))
    else:
        for name, value in sums.items():
            if name not in ("rows", "faults", "not_flat"):
                print(f"{name} {value}")
        for name, row in sums["rows"].items():
            word = "flat" if row["flat"] else "not flat"
            print(f"{word}: {name}: " + " ".join(f"{key} {value}" for key, value in row.items() if key != "flat"))
        for fault in sums["faults"]:
            print(f"fault: {fault}")
        print(f"wrong {sums['wrong']} faults {sums['fault_count']} not flat {len(sums['not_flat'])}")
    return 1 if sums["wrong"] or sums["fault_count"] or sums["not_flat"] else 0


if __name__ == "__main__":
    sys.exit(main())
