"""The part of bench.kv that goes through the SSD: cold blocks into engine memory and durable saves, beside fio."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import median

from bench.common import Figure, Json, median_ratio, say
from bench.kv_shapes import SHAPES
from bench.local import Process

MIB = 1 << 20
THREADS = 8
"""Of the cache's SSD tier, and of fio."""
KEPT = 4
"""Sequences that are stored; memory has room for less than two, so that the oldest is on the SSD alone."""
SHAPES_HERE = ("step3", "llama_8b", "qwen3_32b")
ORDER = "LBNHC"
KINDS = {
    "read": "SSD to engine memory, verified, block after block",
    "layerwise": "the same, first layers of all blocks first: they are usable long before the last",
    "write": "engine memory to SSD, synced",
}

Opens = Callable[[Path, Mapping[str, Json]], AbstractContextManager[Process]]


def fio(kind: str, block_bytes: int, total: int, files: list[Path], *, fresh: bool = False) -> float:
    """Seconds of one run over the files by THREADS threads, each with one request at a time, past the page cache."""
    command = [
        "fio", "--output-format=json", "--group_reporting", f"--rw={kind}", f"--bs={block_bytes}", "--direct=1",
        "--ioengine=psync", "--thread", "--fallocate=none", "--overwrite=1", "--randrepeat=0",
        f"--size={total // THREADS // block_bytes * block_bytes}",
    ]  # fmt: skip
    if kind == "write":
        command.append("--end_fsync=1")
    if fresh:
        command[command.index("--overwrite=1")] = "--overwrite=0"
    each = max(1, len(files) // THREADS)
    for job in range(THREADS):
        mine = files[job * each : (job + 1) * each]
        command += [f"--name=job{job}", f"--filename={':'.join(map(str, mine))}"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)["jobs"][0]["write" if kind == "write" else "read"]
    # For these bytes; those of a last block that does not fill a thread's share are counted in.
    return float(total / found["bw_bytes"])


def ssd_figures(
    work: Path, rounds: int, *, quick: bool, client: Opens
) -> tuple[list[Figure], dict[str, dict[str, list[float]]]]:
    """The figures, and seconds of ours by shape and kind."""
    if shutil.which("fio") is None:
        note = "fio is not installed (Debian: apt-get install fio)"
        return [Figure("kv_ssd_ratio", None, 0.85, at_most=False, note=note)], {}
    size = (64 if quick else 512) * MIB
    taken: dict[str, dict[str, list[float]]] = {}
    for shape in SHAPES_HERE:
        home = work / f"ssd-{shape}"
        taken[shape] = one_shape(home, shape, size, rounds, client)
        shutil.rmtree(home, ignore_errors=True)
    figures = []
    for kind, what in KINDS.items():
        fios = "fio_write" if kind == "write" else "fio_read"
        ratios = {shape: median_ratio(row[fios], row[kind]) for shape, row in taken.items()}
        worst = min(ratios, key=ratios.__getitem__)
        speeds = ", ".join(
            f"{shape} {ratios[shape]:.2f} ({row['bytes'][0] / median(row[kind]) / 1e9:.2f} of "
            f"{row['bytes'][0] / median(row[fios]) / 1e9:.2f} GB/s)"
            for shape, row in taken.items()
        )
        raw: dict[str, Json] = {
            shape: {"bytes": row["bytes"][0], "seconds": row[kind], "seconds_fio": row[fios]}
            for shape, row in taken.items()
        }
        note = f"{what}; {THREADS} at a time; {speeds}"
        figures.append(_figure(f"kv_ssd_{kind}_ratio", ratios[worst], note, raw))
    value = min(figure.value for figure in figures if figure.value is not None and "layerwise" not in figure.name)
    return [_figure("kv_ssd_ratio", value, "the worse of read and write", {}), *figures], taken


def _figure(name: str, value: float, note: str, raw: dict[str, Json]) -> Figure:
    return Figure(name, value, None if "layerwise" in name else 0.85, at_most=False, unit="ratio", raw=raw, note=note)


def one_shape(home: Path, shape: str, size: int, rounds: int, client: Opens) -> dict[str, list[float]]:
    """Seconds of each side in each round: a durable save and a cold load, and fio's write and read of as much."""
    options: dict[str, Json] = {
        "memory_bytes": 3 * size // 2, "ssd_bytes": KEPT * size * 2, "ssd_threads": THREADS, "linger_s": 1.0,
        "queue_bytes": min(128 * MIB, size), "disk_free_floor_bytes": 1 << 30,
    }  # fmt: skip
    taken: dict[str, list[float]] = {
        "bytes": [],
        "read": [],
        "layerwise": [],
        "write": [],
        "fio_read": [],
        "fio_write": [],
    }
    block = SHAPES[shape].block_bytes
    with client(home, options) as ours:
        total = ours.ask(do="setup", shape=shape, order=ORDER, total_bytes=size)["bytes"]
        taken["bytes"].append(total)
        beside = [home / f"fio{job}" for job in range(THREADS)]
        fio("write", block, total, beside, fresh=True)
        for _ in range(2 * KEPT):  # every segment is written once before anything counts
            ours.ask(do="store", durable=True, keep=KEPT)
        for turn in range(rounds + 1):
            sides = {
                "write": lambda: float(ours.ask(do="store", durable=True, keep=KEPT)["seconds"]),
                "fio_write": lambda: fio("write", block, total, beside),
                "read": lambda: cold_load(ours, layerwise=False),
                "layerwise": lambda: cold_load(ours, layerwise=True),
                "fio_read": lambda: fio("randread", block, total, segments(home)),
            }
            names = list(sides)[::-1] if turn % 2 else list(sides)
            for name in names:
                seconds = sides[name]()
                if turn:
                    taken[name].append(seconds)
        say(
            f"{shape} (GB/s): "
            + ", ".join(f"{n} {total / median(v) / 1e9:.2f}" for n, v in taken.items() if n != "bytes")
        )
    return taken


def cold_load(ours: Process, *, layerwise: bool) -> float:
    """Loads a sequence of which nothing is in memory."""
    for which in range(KEPT):
        found = ours.ask(do="tiers", which=which)
        if found["tiers"][1] == found["blocks"]:
            seconds = float(ours.ask(do="load", verify=True, which=which, layerwise=layerwise)["seconds"])
            ours.ask(do="compare")
            return seconds
    raise SystemExit("no sequence is on the SSD alone")


def segments(home: Path) -> list[Path]:
    """The SSD tier's own files, a multiple of the threads, in random order."""
    files = [path for path in (home / "segments").glob("*.seg") if path.stat().st_blocks * 512 >= path.stat().st_size]
    random.shuffle(files)
    return files[: len(files) // THREADS * THREADS]
