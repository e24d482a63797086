"""What look-ups in the index cost, and what an entry costs in memory: `python -m bench.memory_index [--json]`.

Times are of Index alone with LRU in both tiers, hot, wall clock, medians; bench.memory adds Cache and Lease on top.
Bytes an entry count every column, table and policy array up to the highest row that was ever written (LRU in the memory
tier, 2Q with as many ghosts as entries in the SSD tier, a copy of everything in both). `resident_*` is the kernel's
view of the same: growth of the process, which also counts whole pages of 4 KiB and allocator slack.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from statistics import median

import numpy as np
import xxhash

from bench import data
from bench.common import Figure, Json, arguments, emit, report, say, timed
from tiercache.index import Index, Match
from tiercache.model import Facts, Form, Name, TierId
from tiercache.policy.lru import LRU
from tiercache.testing.policies import TwoQueues

ENTRIES = 1_000_000
BLOCKS = 8192
RUNS = 512
PART = 1 << 16
ROUNDS = 60
BARS = {"match_ms": 0.3, "match_fragmented_ms": 1.0, "match_pages_ms": 0.3, "bytes_per_entry": 160}


def _digests(rng: random.Random, count: int) -> list[bytes]:
    raw = rng.randbytes(16 * count)
    return [raw[i : i + 16] for i in range(0, 16 * count, 16)]


class _Filler:
    """An index, and locations for what is put into it."""

    def __init__(self, slots_max: int, ghosts_max: int = 0) -> None:
        self.policies = [LRU(), TwoQueues(ghosts_max) if ghosts_max else LRU()]
        self.index = Index(slots_max, self.policies)
        self._locations = 0

    def place(self, slots: np.ndarray) -> None:
        """A copy of everything in both tiers."""
        for tier in TierId:
            where = np.arange(self._locations, self._locations + len(slots))
            self.index.place(slots, tier, where, 1)
        self._locations += len(slots)

    def chain(self, digests: Sequence[bytes], parent: bytes | None = None) -> None:
        """Puts blocks."""
        reservation = self.index.reserve_chain(digests, 1 << 20, PART, parent=parent)
        self.place(reservation.slots[reservation.fresh])
        self.index.release(reservation)

    def pages(self, key: bytes, ordinals: np.ndarray) -> None:
        """Puts pages."""
        reservation = self.index.reserve_pages(key, ordinals, 1 << 20, PART)
        self.place(reservation.slots[reservation.fresh])
        self.index.release(reservation)

    def bytes_per_entry(self) -> float:
        """Index and policies."""
        policies = sum(policy.memory_bytes() for policy in self.policies)
        return (self.index.memory_bytes() + policies) / self.index.used


def _times(index: Index, look_up: Callable[[], Match], rounds: int) -> list[float]:
    """Milliseconds of each look-up; the release is not in them."""
    out = []
    for _ in range(rounds):
        start = time.perf_counter()
        match = look_up()
        out.append((time.perf_counter() - start) * 1e3)
        assert len(match.slots) == BLOCKS
        assert (match.slots > 0).all()
        index.release(match)
    return out


def match_times(entries: int = ENTRIES, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """8,192 blocks or pages, matched and pinned in an index of `entries`: milliseconds of every round."""
    rng = random.Random(1)
    filler = _Filler(entries)
    index = filler.index
    whole, cut, single = (_digests(rng, BLOCKS) for _ in range(3))
    scattered = np.array(rng.sample(range(4 * BLOCKS), BLOCKS), np.int32)
    inner = entries - 4 * BLOCKS - 2 * BLOCKS - RUNS
    while index.used < inner // 2:
        filler.chain(_digests(rng, min(500, inner // 4)))
    filler.chain(whole)
    step = BLOCKS // RUNS
    for i in range(0, BLOCKS, step):  # other chains branch off at each cut, and lie between the pieces
        filler.chain(cut[i : i + step], cut[i - 1] if i else None)
        filler.chain(_digests(rng, 1), cut[i - 1] if i else None)
    for i in range(BLOCKS):  # no two blocks in neighbouring slots
        filler.chain(single[i : i + 1], single[i - 1] if i else None)
        filler.chain(_digests(rng, 1))
    files = [rng.randbytes(32) for _ in range(2)]
    filler.pages(files[0], np.arange(BLOCKS, dtype=np.int32))
    filler.pages(files[1], scattered)
    while index.used < entries - 500:
        filler.chain(_digests(rng, 500))
    ordinals = np.arange(BLOCKS, dtype=np.int32)
    joined = b"".join(whole)
    return {
        "match_ms": _times(index, lambda: index.match_chain(whole), rounds),
        "match_joined_ms": _times(index, lambda: index.match_chain(joined), rounds),
        "match_fragmented_ms": _times(index, lambda: index.match_chain(cut), rounds),
        "match_scattered_ms": _times(index, lambda: index.match_chain(single), rounds),
        "match_pages_ms": _times(index, lambda: index.match_pages(files[0], ordinals), rounds),
        "match_pages_scattered_ms": _times(index, lambda: index.match_pages(files[1], np.sort(scattered)), rounds),
    }


def call_times(rounds: int = 7) -> dict[str, list[float]]:
    """Microseconds of small calls, an entry: look-up and release of one page, of batches of 64, appends, evictions."""
    rng = random.Random(2)
    filler = _Filler(200_000)
    index = filler.index
    key, chain = rng.randbytes(32), _digests(rng, 50_000)
    filler.pages(key, np.arange(50_000, dtype=np.int32))
    filler.chain(chain)
    ordinals = np.arange(64, dtype=np.int32)
    names = [Name(key, i) for i in range(64)]
    last = chain[-1]

    def append(i: int) -> None:
        nonlocal last
        new = rng.randbytes(16)
        filler.chain([new], last)
        last = new

    def evict(_: int) -> None:
        index.unplace(index.victims(TierId.MEMORY, 64), TierId.MEMORY)

    calls: dict[str, tuple[Callable[[int], object], int, int]] = {
        "hit_us": (lambda i: index.release_slot(index.hit(key, i)), 2000, 1),
        "hit_pages_64_us": (lambda i: index.release(index.hit_pages(key, ordinals)[0]), 300, 64),
        "match_64_us": (lambda i: index.release(index.match(names)), 200, 64),
        "append_us": (append, 300, 1),
        "evict_64_us": (evict, 60, 64),
    }
    out: dict[str, list[float]] = {}
    for name, (call, count, entries) in calls.items():
        out[name] = [
            timed(lambda call=call, count=count: [call(i) for i in range(count)]) * 1e6 / count / entries
            for _ in range(rounds)
        ]
    return out


# -- memory ------------------------------------------------------------------------------------------------------------


def _resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * 4096


def replay(requests: Iterable[Sequence[int]], slots_max: int) -> _Filler:
    """Request by request, as an engine would: match, then put the rest below the last block matched."""
    filler = _Filler(slots_max, slots_max)
    index = filler.index
    known: dict[int, bytes] = {}
    for ids in requests:
        digests = [known.get(i) or known.setdefault(i, xxhash.xxh3_128_digest(i.to_bytes(8, "little"))) for i in ids]
        match = index.match_chain(digests)
        rest = digests[len(match.slots) :][:slots_max]
        while len(rest) > index.slots_max - index.used:
            wanted = max(64, len(rest) - (index.slots_max - index.used))
            if not _make_room(index, wanted):
                break
        if rest:
            parent = digests[len(match.slots) - 1] if len(match.slots) else None
            reservation = index.reserve_chain(rest, 1 << 20, PART, parent=parent)
            filler.place(reservation.slots[reservation.fresh])
            index.release(reservation)
        index.release(match)
    return filler


def _make_room(index: Index, count: int) -> bool:
    """Evicts about `count` entries from both tiers; False when everything is in use."""
    gone = 0
    for tier in (TierId.MEMORY, TierId.SSD):
        gone = len(index.unplace(index.victims(tier, count), tier).slots)
    return gone > 0


def files(count: int = 1_000_000) -> tuple[float, float]:
    """Files of 1 to 4 pages, all of them present."""
    rng = np.random.default_rng(3)
    pages = rng.integers(1, 5, count)
    total = int(pages.sum())
    gc.collect()
    before = _resident_bytes()
    filler = _Filler(total, total)
    at = done = 0
    while at < count:
        some = pages[at : at + 100_000]
        rows = int(some.sum())
        keys = np.repeat(rng.integers(0, 256, (len(some), 32), np.uint8), some, axis=0)
        starts = np.repeat(np.cumsum(some) - some, some)
        _load(filler, _facts(Form.PAGE, keys, np.arange(rows) - starts, done))
        at, done = at + len(some), done + rows
    return _with_ghosts(filler, rng, before)


def _with_ghosts(filler: _Filler, rng: np.random.Generator, before: int) -> tuple[float, float]:
    """As many ghosts as entries; then bytes an entry by our account, and by the kernel's."""
    used = filler.index.used
    for at in range(0, used, 100_000):
        filler.policies[1].ghosts.push(rng.integers(1, 1 << 63, min(100_000, used - at)).astype(np.uint64))
    gc.collect()
    return filler.bytes_per_entry(), (_resident_bytes() - before) / used


def lone(count: int = 1_000_000) -> tuple[float, float]:
    """Lone objects with keys of 32 bytes."""
    rng = np.random.default_rng(4)
    before = _resident_bytes()
    filler = _Filler(count, count)
    for at in range(0, count, 100_000):
        rows = min(100_000, count - at)
        keys = rng.integers(0, 256, (rows, 32), np.uint8)
        _load(filler, _facts(Form.LONE, keys, np.zeros(rows), at))
    return _with_ghosts(filler, rng, before)


def _facts(form: Form, keys: np.ndarray, ordinals: np.ndarray, start: int) -> Facts:
    """Rows of one form, at locations from `start` on."""
    count = len(keys)
    return Facts(
        forms=np.full(count, form, np.uint8),
        keys=np.ascontiguousarray(keys),
        widths=np.full(count, 32, np.uint8),
        parents=np.zeros((count, 32), np.uint8),
        parent_widths=np.zeros(count, np.uint8),
        ordinals=ordinals.astype(np.int32),
        kinds=np.zeros(count, np.uint8),
        scopes=np.zeros(count, np.uint16),
        sizes=np.full(count, 1 << 20, np.uint32),
        part_bytes=np.full(count, PART, np.uint32),
        parts=np.ones(count, np.uint64),
        locations=np.arange(start, start + count),
        costs_s=np.zeros(count, np.float32),
        expiries_s=np.zeros(count, np.uint32),
        ticks=np.arange(start, start + count, dtype=np.uint32),
    )


def _load(filler: _Filler, facts: Facts) -> None:
    """Puts rows into both tiers."""
    index = filler.index
    before = index.unsaved()
    taken = index.load(facts, TierId.MEMORY).taken
    assert taken == len(facts.forms), taken
    slots = np.setdiff1d(index.unsaved(), before)
    assert not index.place(slots, TierId.SSD, index.locations(slots, TierId.MEMORY), index.parts(slots, TierId.MEMORY))


def memory_per_entry(count: int = 1_000_000) -> dict[str, float]:
    """Bytes an entry of every case; a trace that is not there is left out."""
    out: dict[str, float] = {}
    traces = {
        "mooncake_conversation": data.mooncake_conversation,
        "agentic_coding_dev": data.agentic_coding_dev,
    }
    for name, read in traces.items():
        try:
            requests = [request.blocks for request in read()]
        except data.MissingData as missing:
            say(str(missing))
            continue
        unique = len({block for blocks in requests for block in blocks})
        say(f"{name}: {unique} unique blocks")
        out[name] = replay(requests, unique // 2).bytes_per_entry()
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as fresh:  # nothing freed to hide in
        for name, make in {"files_1_to_4_pages": files, "lone_objects": lone}.items():
            out[name], out[f"resident_{name}"] = fresh.submit(make, count).result()
    return out


def measure(*, quick: bool = False) -> dict[str, Json]:
    """Everything: the medians by the names that bench.memory reports, and the raw measures under `raw`."""
    times = match_times(100_000 if quick else ENTRIES, 5 if quick else ROUNDS)
    calls = call_times(3 if quick else 7)
    memory = memory_per_entry(20_000 if quick else 1_000_000)
    bars = [value for name, value in memory.items() if name != "lone_objects" and not name.startswith("resident")]
    return {
        **{name: median(values) for name, values in (times | calls).items()},
        "bytes_per_entry": max(bars),
        "bytes_per_lone_object": memory["lone_objects"],
        "raw": {**times, **calls, "bytes_per_entry": memory},
    }


def main() -> None:
    """Prints the report."""
    options = arguments(__doc__.splitlines()[0]).parse_args()
    found = measure(quick=options.quick)
    raw = found.pop("raw")
    figures = [
        Figure(
            name,
            value,
            BARS.get(name),
            unit=name.rpartition("_")[2] if name.endswith(("ms", "us")) else "bytes",
            raw={"values": raw.get(name)},
        )
        for name, value in found.items()
    ]
    emit(report("memory_index", figures), as_json=options.json)


if __name__ == "__main__":
    main()
