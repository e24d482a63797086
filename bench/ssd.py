"""SSD tier against fio: `python -m bench.ssd [--json]`.

- `read_ratio_*`, `write_ratio_*`: bytes a second of 1 MiB and 256 KiB entries through SsdTier (headers, digests and
  full keys verified on every read; records and rows synced at the end of every write run) over fio's (psync, direct=1,
  synced at the end) with the thread count of 1, 2, 4, 8 that did best in the median. All sides take turns in every
  round; the ratio is the median of the rounds' ratios. Both sides overwrite files that exist, fio reads the tier's own
  files and writes to those of them that are free, and both have memory for eight entries to write from and read into.
- `read_cold_ratio_*`, `write_cold_ratio_*`: the same, our side with memory that no cache of the host holds.
- `read_huge_ratio_*`, `write_huge_ratio_*`: beside a bare loop of preads or pwrites in eight threads with memory in
  huge pages, like the tier's own: fio's lies in pages of 4 KiB, and that is most of the distance to it.
- `read_ratio`, `write_ratio`: the smaller of the two sizes.
- `restart_s`: a fresh process opens a directory of a million entries and loads the index; from the start of the process
  to the last entry loaded, the rows' files put out of the page cache before.
- `first_hit_s`: the process that has those entries open is killed with kill -9, a new one starts, opens, looks up one
  name, reads the entry and verifies it; from the start of the process.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from bench.common import CACHE_DIR, Figure, Json, arguments, drop_page_cache, emit, median_ratio, report, say, versions
from tiercache.buffers import Buffer, part_digests
from tiercache.model import PART_BYTES, Name, Outcome, Payload, all_parts
from tiercache.ssd.records import split_location
from tiercache.ssd.tier import SsdTier
from tiercache.tier import Want

MIB = 1 << 20
JOBS = (1, 2, 4, 8)
POOL_ENTRIES = 8
"""Entries are written from, and read into, memory for so many, over and over: fio's eight threads have a block each."""
COLD_BYTES = 128 * MIB
"""The memory of the `cold` rows: more than any cache of the host holds."""
BATCH_BYTES = 32 * MIB
IN_FLIGHT = 2


@dataclass
class Fio:
    """fio on the tier's own segment files, so that both sides meet the same places of the disk and of its caches."""

    size_bytes: int
    commands: list[str] = field(default_factory=list)

    def run(self, kind: str, block_bytes: int, jobs: int, files: list[Path]) -> float:
        """Seconds of one run over the files by `jobs` threads, each with files of its own, as fio measured them."""
        command = [
            "fio", "--output-format=json", "--group_reporting", f"--rw={kind}", f"--bs={block_bytes}", "--direct=1",
            "--ioengine=psync", "--thread", "--randrepeat=0", "--fallocate=none", "--overwrite=1",
            f"--size={self.size_bytes // jobs}",
        ]  # fmt: skip
        if kind == "write":
            command.append("--end_fsync=1")
        each = len(files) // jobs
        for job in range(jobs):
            mine = ":".join(str(path) for path in files[job * each : (job + 1) * each])
            command += [f"--name=job{job}", f"--filename={mine}"]
        if len(self.commands) < 8:
            self.commands.append(" ".join(command))
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        side = json.loads(done.stdout)["jobs"][0]["write" if kind == "write" else "read"]
        assert side["io_bytes"] == self.size_bytes, side["io_bytes"]
        return float(side["io_bytes"] / side["bw_bytes"])


class Bare:
    """What fio does, from memory in huge pages: no headers, no digests, no names."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.memory = []
        for _ in range(JOBS[-1]):
            memory = mmap.mmap(-1, 2 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory.madvise(mmap.MADV_HUGEPAGE)
            memory[:] = random.Random(1).randbytes(2 * MIB)
            self.memory.append(memoryview(memory))

    def run(self, kind: str, block_bytes: int, files: list[Path]) -> float:
        """Seconds of one run over the files, synced at the end."""
        descriptors = [os.open(path, os.O_RDWR | os.O_DIRECT) for path in files]
        each = self.size_bytes // len(files) // block_bytes
        blocks = [(fd, number * block_bytes) for number in reversed(range(each)) for fd in descriptors]
        if kind == "randread":
            random.Random(each).shuffle(blocks)

        def work(view: memoryview) -> None:
            part = [view[:block_bytes]]
            call = os.pwritev if kind == "write" else os.preadv
            while blocks:
                try:
                    descriptor, offset = blocks.pop()
                except IndexError:
                    return
                assert call(descriptor, part, offset) == block_bytes

        start = time.perf_counter()
        with ThreadPoolExecutor(len(self.memory)) as threads:
            list(threads.map(work, self.memory))
            if kind == "write":
                list(threads.map(os.fdatasync, descriptors))
        seconds = time.perf_counter() - start
        for descriptor in descriptors:
            os.close(descriptor)
        return seconds


class Ours:
    """The tier with one size of entries."""

    def __init__(self, home: Path, size_bytes: int, entry_bytes: int, threads: int, pool_bytes: int) -> None:
        self.home = home
        self.count = size_bytes // entry_bytes
        self.entry_bytes = entry_bytes
        # Room for what is written, for fio's files beside it, and for a third of slack.
        self.tier = SsdTier(str(home), size_bytes * 4, segment_bytes=size_bytes // 8, threads=threads)
        self.source = Buffer.of(mmap.mmap(-1, pool_bytes), writable=True)
        self.target = Buffer.of(mmap.mmap(-1, pool_bytes), writable=True)
        self.source.array()[:] = bytearray(random.Random(entry_bytes).randbytes(pool_bytes))
        self.target.array()[:] = 1
        self.per_pool = pool_bytes // entry_bytes
        digests = [part_digests(self._piece(self.source, i), PART_BYTES) for i in range(self.per_pool)]
        parts = all_parts(entry_bytes, PART_BYTES)
        self.payloads = [
            Payload(Name(i.to_bytes(16, "big"), i), entry_bytes, PART_BYTES, parts, digests[i % self.per_pool])
            for i in range(self.count)
        ]
        self.places: list[int] = []
        self.rng = random.Random(1)

    def _piece(self, pool: Buffer, number: int) -> Buffer:
        return pool.slice(number % self.per_pool * self.entry_bytes, self.entry_bytes)

    async def _spread(self, batches: list[list[int]], work: Callable[[list[int]], Awaitable[None]]) -> float:
        start = time.perf_counter()

        async def lane() -> None:
            while batches:
                await work(batches.pop())

        await asyncio.gather(*(lane() for _ in range(IN_FLIGHT)))
        return time.perf_counter() - start

    def _batches(self, order: list[int]) -> list[list[int]]:
        step = max(1, BATCH_BYTES // self.entry_bytes)
        return [order[i : i + step] for i in range(0, len(order), step)]

    def files(self, *, live: bool) -> list[Path]:
        """Eight of the segment files that hold entries, or of those that hold none."""
        taken = {split_location(at)[0] for at in self.places}
        every = sorted((self.home / "segments").glob("*.seg"))
        chosen = [path for path in every if (int(path.stem, 16) in taken) is live]
        return chosen[:8]

    async def warm_up(self) -> None:
        """Makes segments, and writes each once, before anything counts."""
        old: list[int] = []
        for _ in range(3):
            await self.write()
            old += self.places
        self.places = old
        await self.give_up()

    async def give_up(self) -> None:
        """Ends the round before: nothing lives any more."""
        self.tier.free(self.places)
        self.places = []
        await self.tier.flush()

    async def write(self) -> float:
        """Seconds to write every entry and to make all durable."""
        self.places = [0] * self.count

        async def work(batch: list[int]) -> None:
            answers = await self.tier.write(
                [self.payloads[i] for i in batch], [self._piece(self.source, i) for i in batch]
            )
            assert min(answers) >= 0, answers
            for i, at in zip(batch, answers, strict=True):
                self.places[i] = at

        seconds = await self._spread(self._batches(list(range(self.count)))[::-1], work)
        start = time.perf_counter()
        await self.tier.flush()
        return seconds + time.perf_counter() - start

    async def read(self) -> float:
        """Seconds to read every entry in random order, verified."""

        async def work(batch: list[int]) -> None:
            wants = [
                Want(self.places[i], p.name, p.size, PART_BYTES, p.parts) for i in batch for p in [self.payloads[i]]
            ]
            outcomes = await self.tier.read(wants, [self._piece(self.target, i) for i in batch])
            assert set(outcomes) == {Outcome.HIT}, outcomes

        order = self.rng.sample(range(self.count), self.count)
        return await self._spread(self._batches(order), work)


async def measure_ratios(home: Path, options: argparse.Namespace, commands: list[str]) -> list[Figure]:
    """Rounds of all sides, for both sizes of entries."""
    figures: list[Figure] = []
    size_bytes = options.mib * MIB
    worst: dict[str, list[Figure]] = {"read": [], "write": []}
    fio, bare = Fio(size_bytes), Bare(size_bytes)
    for entry_bytes in (MIB, MIB // 4):
        ours = Ours(home / "tier", size_bytes, entry_bytes, options.threads, POOL_ENTRIES * entry_bytes)
        cold = Ours(home / "cold", size_bytes, entry_bytes, options.threads, COLD_BYTES)
        for side in (ours, cold):
            await side.warm_up()
        taken: dict[str, list[float]] = {}
        for turn in range(options.rounds + 1):
            sides = await one_round(ours, cold, fio, bare, entry_bytes, random.Random(turn))
            if turn:
                for name, seconds in sides:
                    taken.setdefault(name, []).append(seconds)
                say(f"{entry_bytes >> 10} KiB: " + " ".join(f"{n} {size_bytes / s / 1e9:.2f}" for n, s in sides))
        for side, name in ((ours, "tier"), (cold, "cold")):
            await side.tier.close()
            shutil.rmtree(home / name)
        for kind in worst:
            figure = ratio_figure(kind, entry_bytes, size_bytes, taken, "tier")
            worst[kind].append(figure)
            figures += [figure, ratio_figure(kind, entry_bytes, size_bytes, taken, "cold")]
            figures.append(bare_figure(kind, entry_bytes, taken))
    for kind, pair in worst.items():
        value = min(f.value for f in pair if f.value is not None)
        figures.append(Figure(f"{kind}_ratio", value, 0.90, at_most=False, note="the smaller of 1 MiB and 256 KiB"))
    commands += fio.commands
    return figures


async def one_round(
    ours: Ours, cold: Ours, fio: Fio, bare: Bare, entry_bytes: int, rng: random.Random
) -> list[tuple[str, float]]:
    """All sides write, in any order, and then all read; fio and the bare loop write to files in which nothing lives."""
    sides: list[tuple[str, float]] = []
    for side in (ours, cold):
        await side.give_up()
    tiers = {"tier": ours, "cold": cold}
    peers = {f"fio{jobs}": jobs for jobs in JOBS}
    everyone = [*tiers, *peers, "bare"]
    for who in rng.sample(everyone, len(everyone)):
        if who in tiers:
            sides.append((f"write/{who}", await tiers[who].write()))
        elif who == "bare":
            sides.append((f"write/{who}", bare.run("write", entry_bytes, ours.files(live=False))))
        else:
            sides.append((f"write/{who}", fio.run("write", entry_bytes, peers[who], ours.files(live=False))))
    for who in rng.sample(everyone, len(everyone)):
        if who in tiers:
            sides.append((f"read/{who}", await tiers[who].read()))
        elif who == "bare":
            sides.append((f"read/{who}", bare.run("randread", entry_bytes, ours.files(live=True))))
        else:
            sides.append((f"read/{who}", fio.run("randread", entry_bytes, peers[who], ours.files(live=True))))
    return sides


def ratio_figure(kind: str, entry_bytes: int, size_bytes: int, taken: dict[str, list[float]], side: str) -> Figure:
    """Our speed over that of fio's best thread count."""
    best = min(JOBS, key=lambda jobs: median(taken[f"{kind}/fio{jobs}"]))
    mine = taken[f"{kind}/{side}"]
    raw: dict[str, Json] = {"bytes": size_bytes, "seconds_tier": mine}
    raw.update({f"seconds_fio_{jobs}_threads": taken[f"{kind}/fio{jobs}"] for jobs in JOBS})
    raw["gb_per_s"] = {name: size_bytes / median(values) / 1e9 for name, values in taken.items() if kind in name}
    size = "1m" if entry_bytes == MIB else "256k"
    value = median_ratio(taken[f"{kind}/fio{best}"], mine)
    if side == "cold":
        note = f"ours with {COLD_BYTES >> 20} MiB of memory, which no cache holds; fio with a block for each thread"
        return Figure(f"{kind}_cold_ratio_{size}", value, None, at_most=False, raw=raw, note=note)
    return Figure(f"{kind}_ratio_{size}", value, 0.90, at_most=False, raw=raw, note=f"fio's best: {best} threads")


def bare_figure(kind: str, entry_bytes: int, taken: dict[str, list[float]]) -> Figure:
    """Our speed over that of the bare loop."""
    size = "1m" if entry_bytes == MIB else "256k"
    bare, mine = taken[f"{kind}/bare"], taken[f"{kind}/tier"]
    note = "beside a bare loop from huge pages"
    raw: dict[str, Json] = {"seconds_bare": bare, "seconds_tier": mine}
    return Figure(f"{kind}_huge_ratio_{size}", median_ratio(bare, mine), None, at_most=False, raw=raw, note=note)


# -- a million entries ------------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """That of the children: they keep compiled modules, as an installed package does."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def child(*words: object) -> tuple[float, dict[str, float]]:
    """Runs one of the processes to its end: seconds from its start to the `end` it told, and all that it told, as
    seconds after its start where they are times."""
    start = time.monotonic()
    command = [sys.executable, "-m", "bench.ssd_child", *map(str, words)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment())
    told = json.loads(done.stdout)
    for name in ("imported", "opened", "end"):
        told[name] -= start
    return told["end"], told


def run_and_kill(*words: object) -> None:
    """Starts one of the processes, and ends it with kill -9 when it is ready."""
    command = [sys.executable, "-m", "bench.ssd_child", *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment()) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        os.kill(process.pid, signal.SIGKILL)


def measure_restarts(home: Path, options: argparse.Namespace) -> list[Figure]:
    """Restart and first hit, by turns."""
    entries = options.entries
    directory = home / "million"
    say(f"writing {entries} entries")
    run_and_kill("fill", directory, entries)
    rng = random.Random(3)
    hits: list[dict[str, float]] = []
    restarts: list[dict[str, float]] = []
    for turn in range(options.restarts):
        if turn:
            run_and_kill("hold", directory, entries)
        for taken, words in ((hits, ("first_hit", rng.randrange(entries))), (restarts, ("restart",))):
            drop_page_cache([path for path in (directory / "rows").iterdir() if path.is_file()])
            name, *number = words
            _, told = child(name, directory, entries, *number)
            taken.append(told)
        assert restarts[-1]["entries"] == entries, restarts
        say(f"first hit {hits[-1]['end']:.3f} s, restart {restarts[-1]['end']:.3f} s")
    rows_bytes = sum(path.stat().st_size for path in (directory / "rows").iterdir())
    facts: dict[str, Json] = {"entries": entries, "rows_bytes": rows_bytes}
    shutil.rmtree(directory)
    return [
        Figure(
            "restart_s",
            median(told["end"] for told in restarts),
            1.5,
            unit="s",
            raw={**facts, "runs": restarts},
            note="process start, imports, opening, and the index loaded",
        ),
        Figure(
            "first_hit_s",
            median(told["end"] for told in hits),
            0.5,
            unit="s",
            raw={**facts, "runs": hits},
            note="after kill -9, process start and imports included",
        ),
    ]


def main() -> None:
    """Measures and prints."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of the ratios that count")
    parser.add_argument("--mib", type=int, default=512, help="bytes of one run")
    parser.add_argument("--threads", type=int, default=8, help="threads of the tier")
    parser.add_argument("--entries", type=int, default=1_000_000, help="entries of the restart")
    parser.add_argument("--restarts", type=int, default=5, help="restarts")
    parser.add_argument("--directory", type=Path, default=CACHE_DIR, help="where the SSD is")
    parser.add_argument("--only", choices=["ratios", "restarts"], help="one half of it")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.mib, options.entries, options.restarts = 1, 64, 20_000, 1
    options.directory.mkdir(parents=True, exist_ok=True)
    figures: list[Figure] = []
    commands: list[str] = []
    with tempfile.TemporaryDirectory(dir=options.directory, prefix="bench-ssd-") as name:
        if options.only != "restarts":
            if shutil.which("fio"):
                figures += asyncio.run(measure_ratios(Path(name), options, commands))
            else:
                note = "fio is not installed (Debian: apt-get install fio)"
                figures += [Figure(f"{kind}_ratio", None, 0.90, at_most=False, note=note) for kind in ("read", "write")]
        if options.only != "ratios":
            figures += measure_restarts(Path(name), options)
    extra: dict[str, Json] = {"versions": versions("rocksdict", "xxhash", "numpy"), "peer_commands": commands}
    emit(report("ssd", figures, extra=extra), as_json=options.json)


if __name__ == "__main__":
    main()
