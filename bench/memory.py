"""Hits in memory: copies beside plain memmove, leases, matches, bytes an entry: `python -m bench.memory [--json]`.

`copy_ratio` is the time of plain memmove over that of `BlockingCache.get_into`, for the same 32 entries of 1 MiB and
the same targets, without verifying; `copy_verified_ratio` with every part hashed after its copy. What the latter could
be at most in Python is `copy_verified_floor_ratio`: the same copies and hashes over addresses, views and digests made
ready before the clock starts, without a look-up, a pin or a check. Each round draws 32 of 512 entries and 32 of 128
targets and runs all sides on them, in turn: 64 MiB a side, so that none finds much in the processor's cache. The `cpu`
ratios take processor time instead: look at those while others use the machine. Lease times are wall clock of lease and
release together, the worst of pages of one file, blocks of one chain, and lone objects. The rest comes from
bench.memory_index, which measures the index alone.
"""

from __future__ import annotations

import asyncio
import ctypes
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
from xxhash import xxh3_64_intdigest

import tiercache
from bench import memory_index
from bench.common import Figure, Json, arguments, emit, interleaved, median_ratio, report, say, timed
from tiercache.buffers import STEP_BYTES, Buffer, digest_rows, part_digests
from tiercache.lease import Gap, Landed, PageRun
from tiercache.model import Name, Outcome, all_parts
from tiercache.sync import BlockingCache

ENTRY_BYTES = 1 << 20
ENTRIES = 512
TARGETS = 128
BATCH = 32
LEASED = 64
PART_BYTES = 64 << 10
BARS = {"copy_ratio": 0.90, "copy_verified_ratio": 0.80, "lease_us": 3.0, "single_hit_us": 8.0} | memory_index.BARS


class Filled:
    """A cache with entries of every form, all in memory."""

    def __init__(self, cache: BlockingCache) -> None:
        self.cache = cache
        rng = random.Random(1)
        data = [rng.randbytes(ENTRY_BYTES) for _ in range(32)]
        self.names = [Name(rng.randbytes(32)) for _ in range(ENTRIES)]
        for at in range(0, ENTRIES, BATCH):
            outcomes = cache.put(self.names[at : at + BATCH], [data[i % 32] for i in range(at, at + BATCH)])
            assert set(outcomes) == {Outcome.HIT}, outcomes
        self.digests = [rng.randbytes(16) for _ in range(LEASED)]
        outcomes = cache.put_chain(self.digests, [data[0][: 64 << 10]] * LEASED)
        assert set(outcomes) == {Outcome.HIT}, outcomes
        self.small = [Name(rng.randbytes(16)) for _ in range(LEASED)]
        outcomes = cache.put(self.small, [data[0][: 64 << 10]] * LEASED)
        assert set(outcomes) == {Outcome.HIT}, outcomes
        self.run = PageRun(rng.randbytes(32), 256 * ENTRY_BYTES, ENTRY_BYTES, PART_BYTES)
        self.parts = all_parts(ENTRY_BYTES, PART_BYTES)
        asyncio.run_coroutine_threadsafe(self._pages(), cache.loop).result()

    async def _pages(self) -> None:
        async def load(gaps: Sequence[Gap], landed: Landed) -> None:
            for gap in gaps:
                gap.target.array()[:] = gap.ordinal & 0xFF
            landed(range(len(gaps)))

        count = self.run.size // ENTRY_BYTES
        lease = await self.cache.core.read_pages(self.run, range(count), [self.parts] * count, load)
        assert set(lease.outcomes) == {Outcome.HIT}, lease.outcomes
        lease.release()


class Copies:
    """The sides of the copy figures: each copies the round's entries into the round's targets."""

    def __init__(self, filled: Filled) -> None:
        self.cache, self.names = filled.cache, filled.names
        memory = np.ones(TARGETS * ENTRY_BYTES, np.uint8)  # one array, as a reader's pool is
        self.targets = [memory[at : at + ENTRY_BYTES] for at in range(0, len(memory), ENTRY_BYTES)]
        self._into = [Buffer.of(target.data, writable=True) for target in self.targets]
        with self.cache.lease(self.names) as lease:  # everything fits, so nothing moves afterwards
            self._from = [lease.buffer(i) for i in range(ENTRIES)]
        self._parts = [[t.data[at : at + PART_BYTES] for at in range(0, ENTRY_BYTES, PART_BYTES)] for t in self.targets]
        self._digests = [digest_rows(len(self._parts[0])).unpack(part_digests(b, PART_BYTES)) for b in self._from]
        self._rng = random.Random(2)
        self._turn = 0
        self.cpu_s: dict[str, list[float]] = {name: [] for name in self.sides()}
        self._entries = self._places = [0]

    def side(self, name: str, action: Callable[[], object]) -> Callable[[], float]:
        """Seconds of the action; the first side of each round draws the batch. Its processor time goes to `cpu_s`."""

        def run() -> float:
            self._draw()
            before = time.thread_time()
            wall_s = timed(action)
            self.cpu_s[name].append(time.thread_time() - before)
            return wall_s

        return run

    def _draw(self) -> None:
        if self._turn % len(self.sides()) == 0:
            self._entries = self._rng.sample(range(ENTRIES), BATCH)
            self._places = self._rng.sample(range(TARGETS), BATCH)
        self._turn += 1

    def sides(self) -> dict[str, Callable[[], object]]:
        """By name."""
        return {
            "memmove": self._memmove,
            "get_into": lambda: self._get(False),
            "get_into_verified": lambda: self._get(True),
            "floor": self._floor,
        }

    def _memmove(self) -> None:
        memmove = ctypes.memmove
        for i, j in zip(self._entries, self._places, strict=True):
            memmove(self._into[j].address, self._from[i].address, ENTRY_BYTES)

    def _floor(self) -> None:
        memmove, digest = ctypes.memmove, xxh3_64_intdigest
        for i, j in zip(self._entries, self._places, strict=True):
            origin, goal = self._from[i].address, self._into[j].address
            parts, digests = self._parts[j], self._digests[i]
            for at in range(0, ENTRY_BYTES, STEP_BYTES):
                memmove(goal + at, origin + at, STEP_BYTES)
                for part in range(at // PART_BYTES, (at + STEP_BYTES) // PART_BYTES):
                    assert digest(parts[part]) == digests[part]

    def _get(self, verify: bool) -> None:
        outcomes = self.cache.get_into(
            [self.names[i] for i in self._entries], [self.targets[j] for j in self._places], verify=verify
        )
        assert outcomes == [Outcome.HIT] * BATCH, outcomes


def copy_times(filled: Filled, rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of each side in each round, for BATCH entries: by the clock, and of this thread's processor time."""
    copies = Copies(filled)
    sides = {name: copies.side(name, action) for name, action in copies.sides().items()}
    wall_s = interleaved(sides, rounds, warmups=3)
    return wall_s, {name: values[3:] for name, values in copies.cpu_s.items()}


def lease_times(filled: Filled, rounds: int) -> dict[str, list[float]]:
    """Microseconds an entry of every kind of lease and release, one value a round."""
    cache, core, key, parts = filled.cache, filled.cache.core, filled.run.key, filled.parts
    rng = random.Random(3)
    batches = [sorted(rng.sample(range(256), LEASED)) for _ in range(50)]
    named = [[filled.names[i] for i in rng.sample(range(ENTRIES), LEASED)] for _ in range(50)]
    whole = [parts] * LEASED
    singles = rng.sample(range(256), 200)
    target = np.ones(ENTRY_BYTES, np.uint8)

    def page_batches() -> None:
        for ordinals in batches:
            lease = core.lease_resident(key, ordinals, whole)
            assert lease is not None
            lease.release()

    def chains() -> None:
        for _ in range(50):
            lease = core.match_resident(filled.digests)
            assert len(lease) == LEASED
            lease.release()

    def objects() -> None:
        for names in named:
            cache.lease(names).release()

    def single() -> None:
        for ordinal in singles:
            lease = core.lease_resident(key, [ordinal], [parts])
            assert lease is not None
            lease.release()

    def single_viewed() -> None:
        for ordinal in singles:
            lease = core.lease_resident(key, [ordinal], [parts])
            assert lease is not None
            lease.array(0)
            lease.release()

    def single_copied() -> None:
        for name in filled.small:
            assert cache.get_into([name], [target], verify=True) == [Outcome.HIT]

    sides: Mapping[str, tuple[Callable[[], None], int]] = {
        "lease_pages_us": (page_batches, 50 * LEASED),
        "lease_chain_us": (chains, 50 * LEASED),
        "lease_objects_us": (objects, 50 * LEASED),
        "single_hit_us": (single, 200),
        "single_hit_viewed_us": (single_viewed, 200),
        "single_get_64k_verified_us": (single_copied, LEASED),
    }

    def each(call: Callable[[], None], count: int) -> Callable[[], float]:
        return lambda: timed(call) * 1e6 / count

    return interleaved({name: each(call, count) for name, (call, count) in sides.items()}, rounds)


def copy_figure(name: str, side: str, seconds: Mapping[str, list[float]]) -> Figure:
    """A side's speed as a share of plain memmove's. Processor time is the one to trust while others use the machine."""
    plain, ours = seconds["memmove"], seconds[side]
    clock = "processor time, " if "cpu" in name else ""
    return Figure(
        name,
        median_ratio(plain, ours),
        BARS.get(name),
        at_most=False,
        unit="memmove seconds / our seconds",
        raw={"memmove_s": plain, f"{side}_s": ours, "bytes": BATCH * ENTRY_BYTES},
        note=f"{clock}{BATCH * ENTRY_BYTES / median(ours) / 1e9:.1f} GB/s beside "
        f"{BATCH * ENTRY_BYTES / median(plain) / 1e9:.1f}",
    )


def measure_hits(rounds: int) -> list[Figure]:
    """The figures of copies and leases."""
    memory_bytes = (ENTRIES + 256 + 64) * ENTRY_BYTES
    with (
        tempfile.TemporaryDirectory() as home,
        tiercache.open(home, memory_bytes=memory_bytes, ssd_bytes=0, share=False) as cache,
    ):
        say(f"filling {memory_bytes >> 20} MiB")
        filled = Filled(cache)
        say("copies")
        wall_s, cpu_s = copy_times(filled, rounds)
        say("leases")
        leases = lease_times(filled, max(3, rounds // 4))
    figures = [
        copy_figure(name, side, seconds)
        for seconds, suffix in ((wall_s, "ratio"), (cpu_s, "cpu_ratio"))
        for name, side in (
            (f"copy_{suffix}", "get_into"),
            (f"copy_verified_{suffix}", "get_into_verified"),
            (f"copy_verified_floor_{suffix}", "floor"),
        )
    ]
    medians = {name: median(values) for name, values in leases.items()}
    worst = max((name for name in medians if name.startswith("lease_")), key=medians.__getitem__)
    figures.append(
        Figure(
            "lease_us",
            medians[worst],
            BARS["lease_us"],
            unit="us an entry",
            raw={name: values for name, values in leases.items() if name.startswith("lease_")},
            note=f"worst of three, {worst}; batches of {LEASED}",
        )
    )
    figures += [
        Figure(name, medians[name], BARS.get(name), unit="us", raw={"rounds": values})
        for name, values in leases.items()
        if name.startswith("single_")
    ]
    return figures


def measure_index(quick: bool) -> list[Figure]:
    """The figures of the index alone."""
    found: dict[str, Any] = memory_index.measure(quick=quick)
    raw = found.pop("raw")
    units = {"ms": "ms for 8,192 entries", "us": "us an entry"}
    return [
        Figure(
            name,
            value,
            BARS.get(name),
            unit=units.get(name.rpartition("_")[2], "bytes"),
            raw={"values": raw.get(name)},
        )
        for name, value in found.items()
    ]


def main() -> None:
    """Prints the report."""
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--part", choices=["all", "hits", "index"], default="all", help="what to measure")
    options = parser.parse_args()
    start = time.perf_counter()
    figures: list[Figure] = []
    if options.part != "index":
        figures += measure_hits(6 if options.quick else 60)
    if options.part != "hits":
        figures += measure_index(options.quick)
    extra: dict[str, Json] = {"seconds": time.perf_counter() - start}
    emit(report("memory", figures, extra=extra), as_json=options.json)


if __name__ == "__main__":
    main()
