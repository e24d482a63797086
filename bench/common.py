"""What every benchmark shares: arguments, machine facts, interleaved timing, medians of ratios, one JSON object.

A ratio is never taken between two runs made at different times: the sides are run in turn, round by round, the
ratio is taken within each round, and the median of those ratios is reported beside every raw second.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from statistics import median

Json = None | bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"]
"""What a report may hold."""

ROOT = Path(__file__).resolve().parent.parent
"""The checkout: benches run from here."""

CACHE_DIR = ROOT / ".cache"
"""Where benches keep what they made or fetched; ignored by git."""


def arguments(description: str) -> argparse.ArgumentParser:
    """Parser with the flags that every benchmark takes: --json and --quick."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else on stdout")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, smaller sizes: a smoke test, no figure")
    return parser


def say(text: str) -> None:
    """Progress for whoever waits, on stderr, so that stdout stays one JSON object."""
    print(text, file=sys.stderr, flush=True)


def command() -> str:
    """The command line that made this report, ready to paste."""
    name = Path(sys.argv[0])
    start = f"python -m bench.{name.stem}" if name.parent.name == "bench" else f"python {sys.argv[0]}"
    return shlex.join([*shlex.split(start), *sys.argv[1:]])


def _first_line(path: str, prefix: str) -> str:
    try:
        with open(path, encoding="utf-8") as lines:
            for line in lines:
                if line.startswith(prefix):
                    return line.partition(":")[2].strip() or line.strip()
    except OSError:
        pass
    return ""


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], check=False, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def commit() -> str:
    """Short id of the checkout's commit, with `+` when files differ from it; empty outside a checkout."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        dirty = _git("status", "--porcelain", "-uno")
    except OSError:
        return ""
    return head + ("+" if dirty else "")


def versions(*packages: str) -> dict[str, Json]:
    """Installed versions of the named distributions; one that is missing says so."""
    found: dict[str, Json] = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def filesystem_of(path: Path) -> str:
    """Type of the filesystem that holds `path`, as the kernel calls it."""
    at = path.resolve()
    best, kind = "", "unknown"
    with open("/proc/self/mounts", encoding="utf-8") as mounts:
        for line in mounts:
            _, where, name, *_ = line.split()
            if at.is_relative_to(where) and len(where) >= len(best):
                best, kind = where, name
    return kind


def machine() -> dict[str, Json]:
    """Facts of the machine that a reader needs to weigh the figures; nothing that names it."""
    memory_kib = int((_first_line("/proc/meminfo", "MemTotal") or "0 kB").split()[0])
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "cpu": _first_line("/proc/cpuinfo", "model name"),
        "memory_gib": round(memory_kib / (1 << 20), 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "filesystem": filesystem_of(ROOT),
        "load_1m": os.getloadavg()[0],
    }


def timed(action: Callable[[], object]) -> float:
    """Seconds that one call of `action` took."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def interleaved(sides: Mapping[str, Callable[[], float]], rounds: int, *, warmups: int = 1) -> dict[str, list[float]]:
    """Measurements of each side, one a round, the order turned by one each round.

    Each side is a callable that does its work once and returns its own measure (seconds, say: see `timed`).
    The first `warmups` rounds are run and thrown away.
    """
    names = list(sides)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warmups + rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            value = sides[name]()
            if turn >= warmups:
                taken[name].append(value)
    return taken


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median over rounds of `above[i] / below[i]`; both come from the same `interleaved` run."""
    if len(above) != len(below) or not above:
        raise ValueError(f"ratios need equal, non-empty series, got {len(above)} and {len(below)}")
    return median(a / b for a, b in zip(above, below, strict=True))


def drop_page_cache(paths: Sequence[Path]) -> None:
    """Put the named files out of the kernel's page cache (they are synced first; needs no rights)."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


@dataclass(frozen=True, slots=True)
class Figure:
    """One reported number with its bar and the raw measures behind it.

    `bar` is None where there is none; `at_most` says on which side of the bar the good values lie. `raw` holds both
    sides' series (seconds, bytes, requests), `note` one line on how to read it.
    """

    name: str
    value: float | None
    bar: float | None = None
    at_most: bool = True
    unit: str = ""
    raw: Mapping[str, Json] = field(default_factory=dict)
    note: str = ""

    @property
    def meets(self) -> bool | None:
        """Whether the value is on the good side of its bar; None without a bar or a value."""
        if self.bar is None or self.value is None:
            return None
        return self.value <= self.bar if self.at_most else self.value >= self.bar


def report(bench: str, figures: Sequence[Figure], *, extra: Mapping[str, Json] | None = None) -> dict[str, Json]:
    """One JSON object: `figures` by name (value, bar, meets, raw), and where and how they were made."""
    rows: dict[str, Json] = {}
    for figure in figures:
        rows[figure.name] = {
            "value": figure.value,
            "unit": figure.unit,
            "bar": figure.bar,
            "better": "lower" if figure.at_most else "higher",
            "meets": figure.meets,
            "raw": figure.raw,
            "note": figure.note,
        }
    return {
        "bench": bench,
        "command": command(),
        "commit": commit(),
        "machine": machine(),
        **(extra or {}),
        "figures": rows,
    }


def emit(made: Mapping[str, Json], *, as_json: bool) -> None:
    """Print a report: the one JSON object, or one line a figure for people."""
    if as_json:
        print(json.dumps(made, indent=1))
        return
    print(f"{made['bench']}  commit {made['commit']}  {made['command']}")
    figures = made["figures"]
    assert isinstance(figures, Mapping)
    for name, row in figures.items():
        assert isinstance(row, Mapping)
        value = row["value"]
        shown = f"{value:.4g}" if isinstance(value, int | float) else "not measured"
        sign = "<=" if row["better"] == "lower" else ">="
        bar = "" if row["bar"] is None else f"  bar {sign} {row['bar']}  {'met' if row['meets'] else 'MISSED'}"
        print(f"  {name:28} {shown:>12} {row['unit']}{bar}  {row['note']}".rstrip())
