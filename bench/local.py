"""A second process reads what the owner of a directory holds: `python -m bench.local [--json]`.

Every side is a process of its own (bench.local_sides, bench.local_peers) with the same entries and targets of its own;
all take turns in one run, in an order that turns too. `local_copy_ratio` is the time of plain memmove over ours, the
worst size and batch; each size and batch is reported beside it. `over_*` is the peer's time over ours, the worst.
Peers that are not installed are named and left out: `make peers` installs them.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from bench.common import ROOT, Figure, arguments, emit, median_ratio, report, say
from bench.common import versions as installed
from bench.local_sides import SIZES, TOTAL_BYTES

BATCHES = (1, 32)
MOVED_BYTES = 192 << 20
"""An order moves about so much."""
OPTIONS = {"memory_bytes": 1 << 30, "ssd_bytes": 0, "linger_s": 2.0}
ROUND_TRIPS = 4000
PEERS = ("mooncake", "lmcache", "redis")
PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"


class Process:
    """A side at work."""

    def __init__(self, *command: str) -> None:
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        self._answer()

    def ask(self, **order: object) -> dict[str, Any]:
        """One order, one answer."""
        assert self.child.stdin is not None
        self.child.stdin.write(json.dumps(order) + "\n")
        self.child.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.child.stdout is not None
        line = self.child.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.child.args} ended with status {self.child.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "left_out" in answer:
            self.child.wait()
            raise RuntimeError(answer["left_out"])
        return answer

    def close(self) -> None:
        """Ends it."""
        if self.child.poll() is None:
            try:
                self.child.communicate('{"quit": true}\n', timeout=20)
            except (OSError, subprocess.TimeoutExpired):
                self.child.kill()
                self.child.wait()


def side(name: str, *more: str, python: str = sys.executable, module: str = "bench.local_sides") -> Process:
    """A side in a fresh process."""
    return Process(python, "-m", module, name, *more)


def ours(directory: Path) -> Process:
    """A client of the directory."""
    return side("tiercache", str(directory), json.dumps(OPTIONS))


def peers(stack: ExitStack, work: Path, left_out: dict[str, str]) -> dict[str, Process]:
    """The peers that can run here, filled."""
    found: dict[str, Process] = {}
    shared = Path(tempfile.mkdtemp(prefix="tiercache-bench-", dir="/dev/shm"))
    stack.callback(shutil.rmtree, shared, ignore_errors=True)
    found["files"] = side("files", str(shared))
    if shutil.which("redis-server") is None or not PEERS_PYTHON.exists():
        left_out["redis"] = "redis-server or its Python client is not installed (make peers)"
    else:
        path = work / "redis.sock"
        server = subprocess.Popen(
            ["redis-server", "--port", "0", "--unixsocket", str(path), "--save", "", "--appendonly", "no"],
            stdout=subprocess.PIPE,
            text=True,
        )
        stack.callback(server.wait)
        stack.callback(server.kill)
        assert server.stdout is not None
        for line in server.stdout:
            if "eady to accept connections" in line:
                break
        found["redis"] = side("redis", str(path), python=str(PEERS_PYTHON))
    for name in ("mooncake", "lmcache"):
        if not PEERS_PYTHON.exists():
            left_out[name] = "not installed (make peers)"
            continue
        try:
            found[name] = side(name, str(work), python=str(PEERS_PYTHON), module="bench.local_peers")
        except RuntimeError as fault:
            left_out[name] = str(fault)
    for name, process in found.items():
        stack.callback(process.close)
        say(f"filling {name}")
        process.ask(fill=True)
    return found


def copies(sides: dict[str, Process], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds a MiB of every side, by "size x batch" and side."""
    taken: dict[str, dict[str, list[float]]] = {}
    orders = [(name, False) for name in sides] + [("tiercache", True)]
    for size in SIZES:
        for batch in BATCHES:
            row = taken[f"{size >> 10}k_{batch}"] = {}
            repeat = max(2, MOVED_BYTES // size // batch)
            for turn in range(rounds + 1):
                shift = turn % len(orders)
                for name, verify in orders[shift:] + orders[:shift]:
                    some = repeat if name in ("tiercache", "memory", "files") else max(1, repeat // 8)
                    got = sides[name].ask(size=size, batch=batch, rounds=some, verify=verify)
                    if turn:  # the first one warms up
                        label = "verified" if verify else name
                        row.setdefault(label, []).append(got["seconds"] / got["bytes"] * (1 << 20))
            say(f"{size >> 10:5} KiB x {batch:2}: " + ", ".join(f"{n} {median(v) * 1e6:.1f}" for n, v in row.items()))
    return taken


def ratio_figures(taken: dict[str, dict[str, list[float]]]) -> list[Figure]:
    """Ratios over memmove and over the peers, each size and batch, and the worst of each."""
    figures: list[Figure] = []
    bars = {"local_copy_ratio": 0.90, "local_copy_verified_ratio": 0.80}
    sides = {"local_copy_ratio": ("memory", "tiercache"), "local_copy_verified_ratio": ("memory", "verified")}
    sides |= {f"over_{name}": (name, "tiercache") for name in (*PEERS, "files")}
    for name, (above, below) in sides.items():
        ratios = {where: median_ratio(row[above], row[below]) for where, row in taken.items() if above in row}
        if not ratios:
            continue
        bar = bars.get(name, None if name == "over_files" else 1.0)
        worst = min(ratios, key=ratios.__getitem__)
        raw = {where: {"s_per_mib_above": row[above], "s_per_mib_below": row[below]} for where, row in taken.items()}
        each = ", ".join(f"{where} {ratio:.2f}" for where, ratio in ratios.items())
        figures.append(
            Figure(name, ratios[worst], bar, at_most=False, unit="ratio", raw=raw, note=f"worst is {worst}; {each}")
        )
    return figures


def trip_figures(process: Process, limit: Process) -> list[Figure]:
    """Round trips of one lease and its release, and of one byte."""
    alone = process.ask(what="rtt", argument=ROUND_TRIPS)["values"]
    byte = limit.ask(what="socket_rtt", argument=ROUND_TRIPS)["values"]
    busy = process.ask(what="rtt_busy", argument=ROUND_TRIPS)["values"]
    python = process.ask(what="rtt_python", argument=ROUND_TRIPS // 8)["values"]
    return [
        Figure("local_rtt_us", median(alone) * 1e6, 40.0, unit="µs", raw={"seconds": alone[:200]}),
        Figure("socket_rtt_us", median(byte) * 1e6, unit="µs", raw={"seconds": byte[:200]},
               note="one byte to another process and back, both asleep until it comes, wherever the kernel runs them"),
        Figure("rtt_over_socket", median(alone) / median(byte), unit="ratio",
               note="local_rtt_us over socket_rtt_us; below 1 where looking saves the wake-ups"),
        Figure("local_rtt_p99_us", quantiles(busy, n=100)[-1] * 1e6, 1000.0, unit="µs", raw={"seconds": busy[:200]},
               note="beside a thread of the client that releases the GIL"),
        Figure("local_rtt_python_p99_us", quantiles(python, n=100)[-1] * 1e6, unit="µs", raw={"seconds": python[:200]},
               note="beside a thread of the client in pure Python"),
    ]  # fmt: skip


def verify_figure(process: Process) -> Figure:
    """Lease in place and hash everything, over the hash alone; the worst size."""
    raw = {f"{size >> 10}k": process.ask(what="lease_verify", argument=size) for size in SIZES}
    ratios = {where: median_ratio(one["alone"], one["ours"]) for where, one in raw.items()}
    each = ", ".join(f"{where} {ratio:.2f}" for where, ratio in ratios.items())
    return Figure(
        "lease_verify_ratio",
        min(ratios.values()),
        0.9,
        at_most=False,
        unit="ratio",
        raw=raw,
        note=f"32 a lease; {each}",
    )


def crowd_figure(directory: Path, rounds: int) -> Figure:
    """Bytes a second of 16 clients together over those of two: 1 MiB, batches of 32."""
    rates: dict[int, list[float]] = {2: [], 16: []}
    with ExitStack() as stack:
        crowd = []
        for _ in range(16):
            crowd.append(ours(directory))
            stack.callback(crowd[-1].close)
        for turn in range(rounds + 1):
            for count in (2, 16):
                clients = crowd[:count]
                total = max(1, 512 // count // 8)
                for client in clients:
                    assert client.child.stdin is not None
                    client.child.stdin.write(
                        json.dumps({"size": 1 << 20, "batch": 32, "rounds": total, "verify": False}) + "\n"
                    )
                for client in clients:
                    assert client.child.stdin is not None
                    client.child.stdin.flush()
                answers = [client._answer() for client in clients]
                if turn:
                    rates[count].append(sum(a["bytes"] for a in answers) / max(a["seconds"] for a in answers))
    ratio = median_ratio(rates[16], rates[2])
    return Figure(
        "clients16_over_2", ratio, 0.9, at_most=False, unit="ratio", raw={str(n): v for n, v in rates.items()},
        note="bytes a second until the slowest is done",
    )  # fmt: skip


def main() -> None:
    parser = arguments(str(__doc__).splitlines()[0])
    options = parser.parse_args()
    rounds = 1 if options.quick else 7
    left_out: dict[str, str] = {}
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tiercache-bench-")))
        directory = work / "cache"
        first = ours(directory)  # the writer: starts the owner
        stack.callback(first.close)
        first.ask(fill=True)
        second = ours(directory)
        stack.callback(second.close)
        sides = {"memory": side("memory"), "tiercache": second}
        stack.callback(sides["memory"].close)
        sides |= peers(stack, work, left_out)
        for name, why in left_out.items():
            say(f"left out: {name}: {why}")
        opened = []
        for _ in range(1 if options.quick else 5):
            another = ours(directory)
            opened.append(another.ask(what="open_ms", argument=0)["value"])
            another.close()
        figures = ratio_figures(copies(sides, rounds))
        figures += trip_figures(second, sides["memory"])
        figures.append(verify_figure(second))
        figures.append(Figure("open_ms", median(opened), 50.0, unit="ms", raw={"ms": opened}, note="after imports"))
        figures.append(crowd_figure(directory, max(1, rounds - 2)))
    extra = {
        "left_out": left_out,
        "total_bytes_a_size": TOTAL_BYTES,
        "versions": {**installed("numpy", "xxhash")},
    }
    emit(report("local", figures, extra=extra), as_json=options.json)


if __name__ == "__main__":
    main()
