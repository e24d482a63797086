"""Transports between two processes and between two hosts: `python -m bench.transport [--json]`.

Every way of moving bytes is a pair of processes with memory of their own (bench.transport_sides): tiercache's
transports, blocking sockets, process_vm_readv and process_vm_writev (`cma`, all that UCX's cma calls), Mooncake's
transfer engine, ucx_perftest, and memmove in one process as the limit. All take turns in one run, in turning order.
A ratio over one of them is its seconds over ours for the same moves; `link_ratio` is that over sockets between two
network namespaces with a rate (tiercache.testing.netns). What cannot run here stands under `not_exercised` with its
reason. `make peers` installs Mooncake.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from bench.common import ROOT, Figure, arguments, emit, median_ratio, report, say
from bench.common import versions as installed
from bench.transport_perftest import CHANNELS, Perftest, program
from bench.transport_sides import MEMORY_BYTES
from tiercache.testing.netns import hosts, why_not

LOOPBACK = "127.0.0.1"
SIZES = (64 << 10, 1 << 20, 16 << 20)
WINDOWS = (1, 8)
WAYS = ("put", "get")
MOVED_BYTES = {64 << 10: 8 << 20, 1 << 20: 32 << 20, 16 << 20: 64 << 20}
"""An order moves about so much, or one batch: short ones, and many rounds, so that a busy moment meets all sides."""
IDLE_S = 2.0
RATES_BYTES_S = {"1 Gbit/s": 125e6, "5 Gbit/s": 625e6}
TRANSPORTS = {
    "tcp": ("tcp", False),
    "ucx": ("ucx", True),
    "ucx local": ("ucx", False),
    "nixl": ("nixl", True),
    "nixl local": ("nixl", False),
    "shm": ("shm", False),
    "ucx cuda": ("ucx+cuda", True),
    "ucx cuda local": ("ucx+cuda", False),
}
"""Name of the side: name of the transport, and whether its ends are put apart: a process that does not see the other
one's (a PID namespace of its own) cannot copy out of its memory, as on another host. `cuda`: memory of a GPU at both
ends, by cuda_copy and tcp, or by cuda_ipc."""
APART = ["unshare", *([] if os.geteuid() == 0 else ["--user"]), "--pid", "--fork", "--kill-child", "--"]
CASES = [(way, size, window) for way in WAYS for size in SIZES for window in WINDOWS]
Case = tuple[str, int, int]
Taken = dict[Case, dict[str, list[float]]]
"""Seconds a byte, by case and side."""


class LeftOut(Exception):
    """A side cannot run here; the message says why."""


class Process:
    """One end of a side."""

    def __init__(self, *command: str) -> None:
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    def send(self, **order: object) -> None:
        """An order, answered by and by."""
        assert self.child.stdin is not None
        self.child.stdin.write(json.dumps(order) + "\n")
        self.child.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """The answer to the oldest order that has none yet."""
        assert self.child.stdout is not None
        line = self.child.stdout.readline()
        if not line:
            raise LeftOut(f"a process ended with status {self.child.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "left_out" in answer:
            raise LeftOut(answer["left_out"])
        return answer

    def close(self) -> None:
        """Ends it."""
        try:
            self.child.communicate('{"op": "quit"}\n' if self.child.poll() is None else None, timeout=20)
        except (OSError, ValueError, subprocess.TimeoutExpired):
            self.child.kill()
            self.child.wait()


class Side(Protocol):
    """Somebody who moves bytes."""

    negotiated: str

    def joins(self, case: Case, turn: int) -> bool:
        """Whether it takes part."""

    def move(self, case: Case, *, moved_bytes: int, verify: bool = False) -> float:
        """Moves about so many bytes; seconds a byte."""


class Pair:
    """The two ends of a side, connected and checked."""

    def __init__(self, stack: ExitStack, near: list[str], far: list[str]) -> None:
        self.ends = []
        for line in (near, far):
            self.ends.append(Process(*line))
            stack.callback(self.ends[-1].close)
        self.near, self.far = self.ends
        for end in self.ends:
            end.answer()
        hellos = [each["hello"] for each in self.both(op="hello")]
        for end, hello in zip(self.ends, reversed(hellos)):
            end.send(op="meet", peer=hello)
        met, _ = [end.answer() for end in self.ends]
        self.negotiated = met["negotiated"]
        self.near.send(op="check")
        self.near.answer()

    def joins(self, case: Case, turn: int) -> bool:
        """Always."""
        return True

    def both(self, **order: object) -> list[dict[str, Any]]:
        """The same order to both ends at once."""
        for end in self.ends:
            end.send(**order)
        return [end.answer() for end in self.ends]

    def move(self, case: Case, *, moved_bytes: int, verify: bool = False) -> float:
        """Moves about so many bytes; seconds a byte."""
        way, size, window = case
        batches = max(1, moved_bytes // size // window)
        self.near.send(op="order", way=way, size=size, window=window, batches=batches, verify=verify)
        answer = self.near.answer()
        self.negotiated = answer.get("negotiated") or self.negotiated
        return answer["seconds"] / answer["bytes"]


def own_pair(stack: ExitStack, name: str, apart: bool, two: tuple = ()) -> Pair:
    """A pair of bench.transport_sides, on two hosts or on this one."""
    lines = []
    for which, end in enumerate(("near", "far")):
        address = two[which].address if two else LOOPBACK
        line = [sys.executable, "-m", "bench.transport_sides", name, end, address]
        if apart and end == "far":
            line = [*APART, *line]
        lines.append(two[which].command(*line) if two else line)
    return Pair(stack, *lines)


def sides(stack: ExitStack, peers: Path, left_out: dict[str, str], names: list[str], *, quick: bool) -> dict[str, Side]:
    """Everybody who can run here."""
    found: dict[str, Side] = {}
    for name in ("raw", "memory", "cma", *names):
        with left_aside(left_out, name), ExitStack() as own:
            found[name] = own_pair(own, *TRANSPORTS.get(name, (name, False)))
            stack.push(own.pop_all())
    if peers.exists():
        lines = [[str(peers), "-m", "bench.transport_mooncake", end, LOOPBACK] for end in ("near", "far")]
        with left_aside(left_out, "mooncake"), ExitStack() as own:
            found["mooncake"] = Pair(own, *lines)
            stack.push(own.pop_all())
    else:
        left_out["mooncake"] = "not installed (make peers)"
    if quick:
        left_out["perftest"] = "takes too long for --quick"
    elif path := program():
        found |= {name: Perftest(path, channels) for name, channels in CHANNELS.items()}
    else:
        left_out["perftest"] = "the libucx wheel is not installed"
    return found


@contextmanager
def left_aside(left_out: dict[str, str], name: str) -> Iterator[None]:
    """Notes why somebody cannot take part."""
    try:
        yield
    except (LeftOut, OSError) as why:
        left_out[name] = str(why)


def turns(
    found: dict[str, Side],
    left_out: dict[str, str],
    cases: list[Case],
    rounds: int,
    *,
    verify: bool,
    moved: Mapping[int, int] = MOVED_BYTES,
) -> Taken:
    """Every case of every side, interleaved. Whoever fails takes no part any more."""
    taken: Taken = {}
    for case in cases:
        row = taken[case] = {}
        orders = [(name, False) for name in found]
        if case[0] == "get" and verify:
            orders += [(name, True) for name in found if name in TRANSPORTS and "cuda" not in name]
        for turn in range(rounds + 1):
            shift = turn % len(orders)
            for name, verified in orders[shift:] + orders[:shift]:
                if name in left_out or not found[name].joins(case, turn):
                    continue
                with left_aside(left_out, name):
                    seconds = found[name].move(case, verify=verified, moved_bytes=moved[case[1]])
                    if turn:  # the first one warms up
                        row.setdefault(f"{name} verified" if verified else name, []).append(seconds)
        say(f"{label(case):16} " + ", ".join(f"{name} {1e-9 / median(row[name]):.2f}" for name in row))
    return taken


def ratio(above: list[float], below: list[float]) -> float:
    """Of the rounds that both took part in."""
    rounds = min(len(above), len(below))
    return median_ratio(above[:rounds], below[:rounds])


def label(case: Case) -> str:
    """A case in a word."""
    way, size, window = case
    return f"{way} {size >> 10}k x{window}" if size < 1 << 20 else f"{way} {size >> 20}M x{window}"


def rows_of(taken: Taken, found: Mapping[str, Side], limits: tuple[str, ...]) -> list[dict[str, Any]]:
    """A row a side and case, with the ratios over the limits."""
    rows: list[dict[str, Any]] = []
    for case, row in taken.items():
        for name, seconds in row.items():
            if name.endswith(" verified"):
                continue
            made: dict[str, Any] = {
                "side": name,
                "transport": found[name].negotiated,
                "case": label(case),
                "way": case[0],
                "size_bytes": case[1],
                "outstanding": case[2],
                "gb_s": 1e-9 / median(seconds),
                "s_per_gib": [round(each * (1 << 30), 4) for each in seconds],
            }
            for limit in limits:
                if limit in row and limit != name:
                    made[f"over_{limit}"] = ratio(row[limit], seconds)
            if f"{name} verified" in row:
                made["verified_ratio"] = ratio(seconds, row[f"{name} verified"])
            rows.append(made)
    return rows


def worst(
    name: str, taken: Taken, above: str, below: tuple[str, ...], cases: list[Case], *, bar: float | None, why: str = ""
) -> Figure:
    """The smallest ratio of the seconds of `above` over those of one of `below`; `rows` has them."""
    ratios = {}
    for case in cases:
        row = taken.get(case, {})
        for side in below:
            if above in row and side in row:
                where = f"{side} {label(case)}"
                ratios[where] = ratio(row[above], row[side])
    if not ratios:
        return Figure(name, None, at_most=False, unit="ratio", note=f"not exercised: {why}")
    at = min(ratios, key=ratios.__getitem__)
    each = ", ".join(f"{where} {value:.2f}" for where, value in ratios.items())
    return Figure(name, ratios[at], bar, at_most=False, unit="ratio", note=f"worst is {at}; {each}")


def some(ways: tuple[str, ...], sizes: tuple[int, ...], windows: tuple[int, ...] = WINDOWS) -> list[Case]:
    """Cases."""
    return [(way, size, window) for way in ways for size in sizes for window in windows]


def idle(sides: Mapping[str, Side], seconds: float) -> Figure:
    """The processor time that connected ends take while nothing moves."""
    found = {name: pair for name, pair in sides.items() if isinstance(pair, Pair)}
    begun = {name: [each["seconds"] for each in pair.both(op="cpu")] for name, pair in found.items()}
    start = time.perf_counter()
    time.sleep(seconds)
    used = {}
    for name, pair in found.items():
        took = time.perf_counter() - start
        ended = [each["seconds"] for each in pair.both(op="cpu")]
        used[name] = [100 * (after - before) / took for before, after in zip(begun[name], ended, strict=True)]
    ours = {name: max(both) for name, both in used.items() if name in TRANSPORTS}
    worst_end = max(ours.values(), default=None)
    note = ", ".join(f"{name} {percent:.2f}" for name, percent in ours.items())
    return Figure("idle_cpu_percent", worst_end, 3.0, unit="%", raw=used, note=f"of a processor, the worse end; {note}")


def link(left_out: dict[str, str], rates: Mapping[str, float], rounds: int, names: list[str]) -> tuple[list, Figure]:
    """Between two hosts with a rate: what crosses beside what blocking sockets bring across."""
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    if why := why_not(rate=True):
        left_out["link"] = why
        return rows, Figure("link_ratio", None, at_most=False, unit="ratio", note=f"not exercised: {why}")
    for name, rate in rates.items():
        with ExitStack() as stack:
            two = tuple(stack.enter_context(hosts(2, rate_bytes_s=rate)))
            found: dict[str, Side] = {"raw": own_pair(stack, "raw", False, two)}
            for side in names:
                with left_aside(left_out, f"{side} at {name}"), ExitStack() as own:
                    found[side] = own_pair(own, *TRANSPORTS[side], two)
                    stack.push(own.pop_all())
            cases = some(WAYS, (16 << 20,), (8,))
            taken = turns(found, left_out, cases, rounds, verify=False, moved={16 << 20: MEMORY_BYTES})
            for row in rows_of(taken, found, ("raw",)):
                rows.append({**row, "link": name, "of_rate": row["gb_s"] * 1e9 / rate})
                if "over_raw" in row:
                    ratios[f"{row['side']} {row['way']} at {name}"] = row["over_raw"]
    note = ", ".join(f"{where} {value:.3f}" for where, value in ratios.items())
    value = min(ratios.values(), default=None)
    return rows, Figure("link_ratio", value, value and 0.97, at_most=False, unit="ratio", note=note)


def figures_of(taken: Taken, found: Mapping[str, Side]) -> list[Figure]:
    """The named ones."""
    large = (1 << 20, 16 << 20)
    local = next(
        (name for name in ("ucx local", "nixl local") if name in found and found[name].negotiated != "tcp"), ""
    )
    copies = some(("get",), (1 << 20,))
    no_path = "no path within a host that survives a killed peer"
    figures = [
        worst("ucx_over_raw_tcp", taken, "raw", ("ucx",), some(("put",), large), bar=1.0, why="no UCX"),
        worst("tcp_ratio", taken, "raw", ("tcp",), some(WAYS, large), bar=0.85),
        worst("ucx_copy_ratio", taken, "memory", (local,), copies, bar=0.80, why=no_path),
        worst("ucx_over_cma", taken, "cma", (local,), copies, bar=None, why=no_path),
        worst("shm_copy_ratio", taken, "memory", ("shm",), copies, bar=None),
        worst("over_mooncake_te", taken, "mooncake", ("tcp", "ucx"), CASES, bar=1.0, why="see not_exercised"),
        worst("ucx_over_perftest", taken, "perftest tcp", ("ucx",), CASES, bar=None, why="see not_exercised"),
    ]
    if local:
        figures[2] = replace(figures[2], note=f"{found[local].negotiated}; {figures[2].note}")
    return figures


def main() -> None:
    parser = arguments(str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--only", nargs="*", default=list(TRANSPORTS), help="transports of tiercache that take part")
    parser.add_argument("--peers", type=Path, default=ROOT / ".venv-peers" / "bin" / "python", help="Mooncake's Python")
    options = parser.parse_args()
    rounds = 1 if options.quick else options.rounds
    left_out: dict[str, str] = {}
    if not any(Path("/sys/class/infiniband").glob("*")):
        left_out["rc, dc, ud, efa"] = "no RDMA device on this machine"
    with ExitStack() as stack:
        found = sides(stack, options.peers, left_out, options.only, quick=options.quick)
        for name, why in left_out.items():
            say(f"not exercised: {name}: {why}")
        moved = dict.fromkeys(SIZES, 8 << 20) if options.quick else MOVED_BYTES
        taken = turns(found, left_out, CASES, rounds, verify=True, moved=moved)
        connected = {name: side for name, side in found.items() if name not in left_out}
        figures = [
            *figures_of(taken, found),
            idle(connected, IDLE_S / 2 if options.quick else IDLE_S),
        ]
        rows = rows_of(taken, found, ("raw", "memory", "cma", "mooncake", "perftest tcp"))
    rates = {"5 Gbit/s": 625e6} if options.quick else RATES_BYTES_S
    names = [name for name in ("tcp", "ucx", "nixl") if name in found and name not in left_out]
    links, crossed = link(left_out, rates, 1 if options.quick else 3, names)
    extra = {"rows": rows, "links": links, "not_exercised": left_out, "versions": installed("libucx-cu13", "numpy")}
    emit(report("transport", [*figures, crossed], extra=extra), as_json=options.json)


if __name__ == "__main__":
    main()
