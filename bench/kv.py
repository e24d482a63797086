"""KV blocks between engine memory and a cache that another process owns: `python -m bench.kv [--json]`.

- `kv_copy_ratio`, `kv_copy_verified_ratio`, `kv_store_ratio`: seconds of one memmove of the same bytes over those of a
  load (without and with hashing what was copied) and of a save (always hashed, here and once more by the owner), from
  strided engine memory with random pages; the worst of all shapes and orders (bench.kv_shapes). All sides take turns.
- `kv_ssd_ratio`: blocks that are on the SSD only, into engine memory, and durable saves, beside fio with as many bytes,
  the same block size and queue depth (the cache's `ssd_threads`), on the same disk; the worse of both.
- `chain_ms`, `match_ms`: keys of 128k tokens in blocks of 16, and how many of those 8,192 blocks are stored. The bar of
  `match_ms` is for a cache in this process; `match_client_ms` is the same question from a client.
- `stored_over_logical`: bytes that the cache holds after eight ranks have saved the same MFA heads, over the bytes of
  one; `rank_digest_s_per_gib` and `rank_cpu_ratio` are what their digests cost.
- `over_lmcache_store`, `over_lmcache_retrieve`: LMCache's time over ours, above 1 where we are faster; the worst of
  `lmcache server` in both modes of shared memory in every order that it takes, and with its adapters for files (ours
  from memory beside theirs from the page cache, ours from the SSD beside theirs from the disk).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from bench.common import CACHE_DIR, Figure, Json, arguments, emit, median_ratio, report, say
from bench.common import versions as installed
from bench.kv_shapes import BYTES, CASES, SHAPES
from bench.kv_ssd import ssd_figures
from bench.local import PEERS_PYTHON, Process, side

MEMORY: dict[str, Json] = {"memory_bytes": 1 << 30, "ssd_bytes": 0, "linger_s": 1.0}
WAYS = ("lmcache_driven", "engine_driven", "fs", "fs_native")
FILE_WAYS = ("fs", "fs_native")
OURS: dict[str, dict[str, Any]] = {
    "memmove": {"do": "memmove"},
    "store": {"do": "store"},
    "load": {"do": "load", "verify": False},
    "verified": {"do": "load", "verify": True},
}
REPEATS = 3
"""Of ours in each round, in turn: the median counts, for these take milliseconds."""
TOKENS = 128 * 1024
RANKS = 8
STEP3_TOKEN_BYTES = 31_232
"""61 layers x (256 + 256) elements of one byte."""


@contextmanager
def client(directory: Path, options: Mapping[str, Json], name: str = "client") -> Iterator[Process]:
    """A process that shares the directory; the first one starts the owner."""
    process = side(name, str(directory), json.dumps(options), module="bench.kv_sides")
    try:
        yield process
    finally:
        process.close()


# ------------------------------------------------------------------------------------------------- copies and peers


def peers(stack: ExitStack, work: Path, left_out: dict[str, str]) -> dict[str, Process]:
    """Every way of LMCache that starts here."""
    found: dict[str, Process] = {}
    for way in WAYS:
        if not PEERS_PYTHON.exists():
            left_out[way] = "LMCache is not installed (make peers)"
            continue
        try:
            found[way] = side(way, str(work), python=str(PEERS_PYTHON), module="bench.kv_lmcache")
            stack.callback(found[way].close)
        except RuntimeError as fault:
            left_out[way] = str(fault)
    for way, why in left_out.items():
        say(f"left out: {way}: {why}")
    return found


class Case:
    """One shape and order: ours, and the peers that take it, measured by turns. Seconds by name of side."""

    def __init__(self, shape: str, order: str, size: int, ours: Process, others: Mapping[str, Process]) -> None:
        self.name = f"{shape}_{order}"
        self.others: dict[str, Process] = {}
        self.left_out: dict[str, str] = {}
        self.taken: dict[str, list[float]] = {}
        self._ours = ours
        about = {"do": "setup", "shape": shape, "order": order, "total_bytes": size}
        self.bytes = ours.ask(**about)["bytes"]
        for way, process in others.items():
            self._try(way, process, **about)
            if way not in self.left_out:
                self.others[way] = process

    def _try(self, way: str, process: Process, **order: object) -> dict[str, Any]:
        """An answer of a peer; one that cannot do it is left out from now on, and says why."""
        answer = process.ask(**order)
        if "fault" in answer:
            self.left_out[way] = answer["fault"]
            self.others.pop(way, None)
        return answer

    def run(self, rounds: int) -> None:
        """The rounds, one more to warm up."""
        for turn in range(rounds + 1):
            names = ["ours", *self.others]
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                for what, seconds in self._ours_once() if name == "ours" else self._other_once(name):
                    if turn:
                        self.taken.setdefault(what, []).append(seconds)
        speeds = ", ".join(f"{what} {self.bytes / median(taken) / 1e9:.1f}" for what, taken in self.taken.items())
        say(f"{self.name} (GB/s): {speeds}")

    def _ours_once(self) -> Iterator[tuple[str, float]]:
        taken: dict[str, list[float]] = {}
        for _ in range(REPEATS):
            for what, order in OURS.items():
                taken.setdefault(what, []).append(self._ours.ask(**order)["seconds"])
                if order["do"] == "load":
                    self._ours.ask(do="compare")
        yield from ((what, median(seconds)) for what, seconds in taken.items())

    def _other_once(self, way: str) -> Iterator[tuple[str, float]]:
        orders: list[tuple[str, dict[str, Any]]] = [("store", {"do": "store"}), ("load", {"do": "load"})]
        if way in FILE_WAYS:
            orders.append(("cold", {"do": "load", "cold": True}))
        for what, order in orders:
            if way in self.others:
                answer = self._try(way, self.others[way], **order)
                for name, suffix in (("seconds", ""), ("written", "_written"), ("durable", "_durable")):
                    if name in answer:
                        yield f"{way}_{what}{suffix}", answer[name]
        if way in self.others:
            self._try(way, self.others[way], do="compare")


def copy_figures(cases: list[Case]) -> list[Figure]:
    """memmove's seconds over ours, the worst case of each."""
    rows = (
        ("kv_copy_ratio", "load", 0.70, "load, not hashed"),
        ("kv_copy_verified_ratio", "verified", 0.60, "load, hashed"),
        ("kv_store_ratio", "store", 0.60, "save, hashed by both"),
    )
    figures = []
    for name, what, bar, note in rows:
        ratios = {case.name: median_ratio(case.taken["memmove"], case.taken[what]) for case in cases}
        worst = min(ratios, key=ratios.__getitem__)
        raw: dict[str, Json] = {
            case.name: {"bytes": case.bytes, "seconds_memmove": case.taken["memmove"], "seconds": case.taken[what]}
            for case in cases
        }
        each = ", ".join(f"{where} {ratio:.2f}" for where, ratio in ratios.items())
        note = f"{note}; worst is {worst}; {each}"
        figures.append(Figure(name, ratios[worst], bar, at_most=False, unit="ratio", raw=raw, note=note))
    return figures


def lmcache_figures(cases: list[Case]) -> list[Figure]:
    """LMCache's seconds over ours: each way, the worst case; and the worst of all ways."""
    figures = []
    for name, mine, suffix in (("over_lmcache_store", "store", "store"), ("over_lmcache_retrieve", "verified", "load")):
        by_way: dict[str, dict[str, float]] = {}
        raw: dict[str, dict[str, Json]] = {}
        for way in WAYS:
            for case in cases:
                theirs = case.taken.get(f"{way}_{suffix}")
                if theirs and len(theirs) == len(case.taken[mine]):
                    by_way.setdefault(way, {})[case.name] = median_ratio(theirs, case.taken[mine])
                    raw.setdefault(way, {})[case.name] = {"seconds_lmcache": theirs, "seconds_ours": case.taken[mine]}
        worst = [min(ratios.values()) for ratios in by_way.values()]
        note = "seconds of LMCache over ours, higher is better for us: " + "; ".join(
            f"{way}: " + ", ".join(f"{where} {ratio:.1f}" for where, ratio in ratios.items())
            for way, ratios in by_way.items()
        )
        value = min(worst) if worst else None
        figures.append(Figure(name, value, 1.0, at_most=False, unit="ratio", raw=raw, note=note))
    return figures


def disk_figures(cases: list[Case], ssd: Mapping[str, Mapping[str, list[float]]]) -> list[Figure]:
    """The files of LMCache's adapters, put out of the page cache or synced, beside our SSD: seconds a byte, medians."""
    figures = []
    rows = (("over_lmcache_disk_store", "store_durable", "write"), ("over_lmcache_disk_retrieve", "cold", "read"))
    for name, suffix, mine in rows:
        ratios: dict[str, float] = {}
        for case in cases:
            shape = case.name.rpartition("_")[0]
            if shape not in ssd:
                continue
            ours = median(ssd[shape][mine]) / ssd[shape]["bytes"][0]
            for way in FILE_WAYS:
                if theirs := case.taken.get(f"{way}_{suffix}"):
                    ratios[f"{way} {case.name}"] = median(theirs) / case.bytes / ours
        note = "seconds of LMCache over ours, not interleaved; " + ", ".join(f"{w} {r:.1f}" for w, r in ratios.items())
        value = min(ratios.values()) if ratios else None
        figures.append(Figure(name, value, 1.0, at_most=False, unit="ratio", note=note))
    return figures


# ------------------------------------------------------------------------------------------------- ranks, chain, match


def rank_figures(directory: Path, size: int, rounds: int) -> list[Figure]:
    """Eight processes with the same MFA heads save the same sequences."""
    with ExitStack() as stack:
        crowd = [stack.enter_context(client(directory, MEMORY, "rank")) for _ in range(RANKS)]
        about = {"do": "setup", "shape": "step3", "order": "LBNHC", "total_bytes": size}
        for replica, process in enumerate(crowd):
            made = process.ask(**about, replica=replica, replicas=RANKS)
        tokens = made["blocks"] * SHAPES["step3"].block_tokens
        logical = tokens * STEP3_TOKEN_BYTES
        used = 'tiercache_tier_used_bytes{tier="memory"}'
        stored, together, digests = [], [], []
        for turn in range(rounds + 1):
            before = crowd[0].ask(do="stats")["stats"][used]
            answers = all_at_once(crowd, do="save", seed=turn)
            stored.append((crowd[0].ask(do="stats")["stats"][used] - before) / logical)
            if any(answer["differs"] for answer in answers):
                raise SystemExit("ranks with the same bytes differ")
            together.append(answers)
            digests.append([answer["cpu_s"] for answer in all_at_once(crowd, do="digest")])
            crowd[0].ask(do="forget", seed=turn)
        alone = []
        crowd[0].ask(**about)
        for turn in range(rounds + 1):
            alone.append(crowd[0].ask(do="save", seed=turn))
            crowd[0].ask(do="forget", seed=turn)
    together, alone, digests, stored = together[1:], alone[1:], digests[1:], stored[1:]
    cpu = [sum(answer["cpu_s"] for answer in answers) for answers in together]
    wall = [max(answer["seconds"] for answer in answers) for answers in together]
    moved = sum(answer["moved_bytes"] for answer in together[0])
    each = [sum(seconds) / RANKS / logical * (1 << 30) for seconds in digests]
    return [
        Figure("stored_over_logical", max(stored), 1.00, unit="ratio", raw={"ratios": stored, "logical_bytes": logical},
               note=f"{RANKS} ranks, {tokens} tokens of {STEP3_TOKEN_BYTES} B; copied out of engines: "
               f"{moved / logical:.3f}"),
        Figure("rank_digest_s_per_gib", median(each), unit="s",
               raw={"seconds": digests, "bytes": logical}, note="CPU seconds of digesting 1 GiB that a rank holds"),
        Figure("rank_cpu_ratio", median(cpu) / median(one["cpu_s"] for one in alone), unit="ratio",
               raw={"cpu_s_of_all": cpu, "cpu_s_alone": [one["cpu_s"] for one in alone]},
               note=f"CPU seconds of {RANKS} ranks together over those of one that writes all alone"),
        Figure("rank_wall_ratio", median(wall) / median(one["seconds"] for one in alone), unit="ratio",
               raw={"seconds_of_all": wall, "seconds_alone": [one["seconds"] for one in alone]},
               note="until the last rank is done, over one that writes all alone; all share this machine's cores"),
    ]  # fmt: skip


def all_at_once(crowd: list[Process], **order: object) -> list[dict[str, Any]]:
    """The same order to all, before any answer is read."""
    for process in crowd:
        assert process.child.stdin is not None
        process.child.stdin.write(json.dumps(order) + "\n")
        process.child.stdin.flush()
    return [process._answer() for process in crowd]


def chain_figures(directory: Path, rounds: int) -> list[Figure]:
    """Keys and matches of 128k tokens, in this process and from a client."""
    import tiercache
    from bench.kv_sides import match_seconds

    with tiercache.open(directory / "here", share=False, **MEMORY) as cache:
        here = match_seconds(cache, TOKENS, rounds)
    with client(directory / "shared", MEMORY) as process:
        there = process.ask(do="match", tokens=TOKENS, rounds=rounds)
    about = f"{here['blocks']} blocks"
    return [
        Figure("chain_ms", median(here["chain"]) * 1e3, 4.0, unit="ms", raw={"seconds": here["chain"]}, note=about),
        Figure("match_ms", median(here["match"]) * 1e3, 0.3, unit="ms", raw={"seconds": here["match"]},
               note=f"{about}, all stored, in the process of the cache; the touch goes on after it has returned"),
        Figure("match_client_ms", median(there["match"]) * 1e3, unit="ms", raw={"seconds": there["match"]},
               note=f"{about}, from a process that is not the owner"),
    ]  # fmt: skip


def main() -> None:
    """Measures and prints."""
    parser = arguments(str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count")
    parser.add_argument("--mib", type=int, default=BYTES >> 20, help="bytes of one sequence")
    parser.add_argument("--only", choices=["copies", "ssd", "ranks", "chain"], help="one part of it")
    parser.add_argument("--no-peers", action="store_true", help="without LMCache")
    parser.add_argument("--directory", type=Path, default=CACHE_DIR, help="where the SSD is")
    options = parser.parse_args()
    if options.quick:
        options.rounds = 1
    options.directory.mkdir(parents=True, exist_ok=True)
    left_out: dict[str, str] = {}
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(dir=options.directory, prefix="bench-kv-") as name:
        figures = measure(Path(name), options, left_out)
    extra: dict[str, Json] = {
        "left_out": left_out,
        "shapes": {name: f"{s.layers} layers, {s.heads} heads x {s.dim}, {s.dtype}" for name, s in SHAPES.items()},
        "versions": installed("numpy", "xxhash"),
    }
    emit(report("kv", figures, extra=extra), as_json=options.json)


def measure(work: Path, options: argparse.Namespace, left_out: dict[str, str]) -> list[Figure]:
    """All parts, or the one that was asked for."""
    figures: list[Figure] = []
    wanted = {options.only} if options.only else {"copies", "ssd", "ranks", "chain"}
    cases: list[Case] = []
    if "copies" in wanted:
        with ExitStack() as stack:
            others = {} if options.no_peers else peers(stack, work, left_out)
            ours = stack.enter_context(client(work / "memory", MEMORY))
            for shape, order in CASES:
                fits = {way: peer for way, peer in others.items() if order == "LBNHC" or way not in FILE_WAYS}
                if order == "LBHKNC":
                    fits = {}  # LMCache knows no engine memory in which K of all slots comes before V
                case = Case(shape, order, options.mib << 20, ours, fits)
                case.run(options.rounds)
                left_out.update({f"{way}, {case.name}": why for way, why in case.left_out.items()})
                cases.append(case)
        figures += copy_figures(cases)
        if not options.no_peers:
            figures += lmcache_figures(cases)
    if "ssd" in wanted:
        made, taken = ssd_figures(work, options.rounds, quick=options.quick, client=client)
        figures += made
        if cases and not options.no_peers:
            figures += disk_figures(cases, taken)
    if "ranks" in wanted:
        figures += rank_figures(work / "ranks", (8 if options.quick else 32) << 20, options.rounds)
    if "chain" in wanted:
        figures += chain_figures(work / "chain", 5 if options.quick else 50)
    return figures


if __name__ == "__main__":
    main()
