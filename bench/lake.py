"""The filesystem against its origin and against local files: TPC-H in DuckDB, 30 ms from an object store.

Every figure names its origin in its note, and carries both sides' raw seconds, requests and bytes, and each side's
command. Sides are run in turn, round by round; a ratio is the median over rounds. A side runs in a process of its own
where a restart matters (suite, SSD), in one process where the page cache and the clock must be shared (local, cold).
DuckDB keeps its defaults; each query has a fresh DuckDB, so that its own memory of remote files helps no side.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from bench import lake_peers
from bench.common import CACHE_DIR, ROOT, Figure, Json, arguments, drop_page_cache, emit, median_ratio, report, say
from bench.common import versions as installed
from tiercache.errors import UnavailableError
from tiercache.testing.demo import origins, run, tpch, workload
from tiercache.testing.demo.worker import Counters, Phase

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tiercache.testing.demo.report import Pass

QUICK = ("Q1", "Q6", "Q14")
MEMORY_BYTES = 2 << 30
"""Holds the whole suite, so that the warm side is warm."""


class Quiet:
    """A watcher that says nothing."""

    def note(self, text: str) -> None:
        say(text)

    def started(self, title: str, count: int) -> None:
        del title, count

    def query(self, title: str, event: object) -> None:
        del title, event


@dataclass(frozen=True)
class Setting:
    """What all measurements share."""

    store: origins.Store
    tables: Path
    work: Path
    prefix: str
    queries: list[tpch.Query]
    rounds: int
    share: bool

    @property
    def direct(self) -> workload.Lake:
        return workload.direct("s3", self.prefix, self.store.s3_options())

    @property
    def local(self) -> workload.Lake:
        return workload.Lake(str(self.tables))

    def cached(self, directory: Path) -> workload.Lake:
        options = {
            "target_protocol": "s3",
            "target_options": self.store.s3_options(),
            "directory": str(directory),
            "memory_bytes": MEMORY_BYTES,
            "share": self.share,
            "linger_s": 0.3,
        }
        return workload.Lake(f"tiercache://{self.prefix}", "tiercache", options)

    def perform(self, lake: workload.Lake, passes: list[str], python: str = sys.executable) -> list[Pass]:
        phase = Phase(lake, self.queries, passes, str(self.work / "results"), self.store.counters)
        return run.perform(phase, self.work, Quiet(), python)

    def empty(self, name: str) -> Path:
        return origins.scratch(self.work / name)


@dataclass
class Measured:
    """One query once: seconds, requests, bytes and the digest of its result."""

    seconds: float
    requests: int
    received_bytes: int
    digest: str


def once(query: tpch.Query, lake: workload.Lake, fs: object, counters: Counters) -> Measured:
    """Runs a query between two readings of the server's counters."""
    before = counters.read()
    ran = workload.run(query, lake, fs)
    after = counters.read()
    return Measured(ran.seconds, after[0] - before[0], after[1] - before[1], tpch.digest(ran.lines))


@contextlib.contextmanager
def opened(lake: workload.Lake) -> Iterator[object]:
    """The lake's filesystem, closed afterwards."""
    fs = workload.open_filesystem(lake)
    try:
        yield fs
    finally:
        if hasattr(fs, "close"):
            fs.close()


def exactly(lake: workload.Lake) -> workload.Lake:
    """The lake read in exactly the chunks that a query needs. By itself DuckDB 2 merges neighbouring chunks by what it
    measured of their latency, so that one query asks for other ranges from run to run, and for up to three times the
    bytes: requests and bytes of two sides could not be compared."""
    return replace(lake, setup=(*lake.setup, "set parquet_prefetch_column_gap = 0"))


def cold_queries(setting: Setting) -> list[Figure]:
    """Each query from an empty cache beside s3fs: worst query's requests and bytes, median of times over all.

    Both sides are opened anew for each query and list the folder once before the clock, as somebody would who looks
    for the files: so both start with one connection and the files' sizes, and neither with any of their bytes.
    """
    counters = Counters(setting.store.counters, None)
    raw: dict[str, dict[str, Json]] = {}
    gets, sizes, times = [], [], []
    for number, query in enumerate([setting.queries[0], *setting.queries]):
        theirs, ours = [], []
        for turn in range(setting.rounds):
            cached = exactly(replace(setting.cached(setting.empty("cold")), primed=True))
            sides = [(theirs, exactly(setting.direct)), (ours, cached)]
            for taken, lake in sides if turn % 2 else sides[::-1]:
                with opened(lake) as fs:
                    taken.append(once(query, lake, fs, counters))
        if not number:
            continue  # imports and first connections of both sides
        if len({one.digest for one in theirs + ours}) != 1:
            raise SystemExit(f"{query.name}: results differ")
        gets.append(median(o.requests / max(1, t.requests) for o, t in zip(ours, theirs)))
        sizes.append(median(o.received_bytes / max(1, t.received_bytes) for o, t in zip(ours, theirs)))
        times.append(median_ratio([o.seconds for o in ours], [t.seconds for t in theirs]))
        raw[query.name] = {
            "tiercache": [[o.seconds, o.requests, o.received_bytes] for o in ours],
            "direct": [[t.seconds, t.requests, t.received_bytes] for t in theirs],
        }
        say(f"cold {query.name}: requests {gets[-1]:.2f}, bytes {sizes[-1]:.2f}, time {times[-1]:.2f} of direct")
    shape = "rows of [seconds, requests, bytes]; origin: " + setting.store.said
    all_of = {name: {q.name: v for q, v in zip(setting.queries, vs)} for name, vs in
              {"requests": gets, "bytes": sizes, "time": times}.items()}  # fmt: skip
    return [
        Figure("gets_cold_over_direct", max(gets), 1.0, raw=raw, note=f"worst query; {shape}"),
        Figure("bytes_cold_over_direct", max(sizes), 1.25, raw={"ratios": all_of["bytes"]}, note="worst; as above"),
        Figure("cold_over_direct", median(times), 1.0, raw={"ratios": all_of["time"]},
               note=f"median of {len(times)} queries, worst {max(times):.2f}; as above"),
    ]  # fmt: skip


def _totals(one: Pass) -> list[Json]:
    return [one.total_s, one.requests, one.received_bytes]


def suite(setting: Setting) -> list[Figure]:
    """All queries in sequence, from an empty cache, in new processes: the worst of requests, bytes and time."""
    ours, theirs = [], []
    for turn in range(setting.rounds):
        theirs += setting.perform(setting.direct, [f"direct{turn}"])
        ours += setting.perform(setting.cached(setting.empty("suite")), [f"cold{turn}"])
        if ours[-1].digests != theirs[-1].digests:
            raise SystemExit("the suite's results differ")
        say(f"suite: {ours[-1].total_s:.2f} s, direct {theirs[-1].total_s:.2f} s")
    parts = {
        "time": median_ratio([o.total_s for o in ours], [t.total_s for t in theirs]),
        "requests": median(o.requests / t.requests for o, t in zip(ours, theirs)),
        "bytes": median(o.received_bytes / t.received_bytes for o, t in zip(ours, theirs)),
    }
    raw: dict[str, Json] = {
        "tiercache": [_totals(o) for o in ours],
        "direct": [_totals(t) for t in theirs],
        "cpu_seconds": {"tiercache": [o.cpu_s for o in ours], "direct": [t.cpu_s for t in theirs]},
        "ratios": parts,
    }
    worst = max(parts, key=lambda name: parts[name])
    note = f"worst of the three is {worst}; rows of [seconds, requests, bytes]; origin: {setting.store.said}"
    return [Figure("suite_over_direct", parts[worst], 0.5, raw=raw, note=note)]


def warm(setting: Setting) -> list[Figure]:
    """The suite from memory beside DuckDB on local files, query by query in turn, in one process."""
    counters = Counters(setting.store.counters, None)
    lake = setting.cached(setting.empty("warm"))
    totals: dict[str, list[float]] = {"tiercache": [], "local": []}
    processor: dict[str, list[float]] = {"tiercache": [], "local": []}
    queries: dict[str, dict[str, list[float]]] = {q.name: {"tiercache": [], "local": []} for q in setting.queries}
    requests = 0
    with opened(lake) as fs:
        for turn in range(-1, setting.rounds * 3):
            sums = {"tiercache": 0.0, "local": 0.0}
            used = {"tiercache": 0.0, "local": 0.0}
            before = counters.read()[0]
            for at, query in enumerate(setting.queries):
                sides = [("tiercache", lake, fs), ("local", setting.local, None)]
                for name, where, opened_fs in sides if (turn + at) % 2 else sides[::-1]:
                    start = time.process_time()
                    seconds = workload.run(query, where, opened_fs).seconds
                    used[name] += time.process_time() - start
                    sums[name] += seconds
                    if turn >= 0:
                        queries[query.name][name].append(seconds)
            if turn >= 0:
                requests += counters.read()[0] - before
                for name in sums:
                    totals[name].append(sums[name])
                    processor[name].append(used[name])
    value = median_ratio(totals["tiercache"], totals["local"])
    cpu = median_ratio(processor["tiercache"], processor["local"])
    note = f"local files in the page cache; processor time {cpu:.2f}; origin asked {requests} times; origin: "
    raw: dict[str, Json] = {**totals, "cpu_seconds": processor, "cpu_ratio": cpu, "queries": queries}
    return [Figure("warm_over_local", value, 1.10, raw=raw, note=note + setting.store.said)]


def from_ssd(setting: Setting) -> list[Figure]:
    """The suite after a restart, from SSD, beside local files out of the page cache; a new process each.

    The folder is listed before the clock, as for s3fs: what is compared is the SSD with local files, not the origin's
    30 ms for each table's facts. Without that listing it is `unlisted_ratio`.
    """
    directory = setting.empty("ssd")
    setting.perform(setting.cached(directory), ["fill"])
    tables = sorted(setting.tables.glob("*.parquet"))
    cached = setting.cached(directory)
    sides = {"local": setting.local, "tiercache": replace(cached, primed=True), "unlisted": cached}
    ran: dict[str, list[Pass]] = {name: [] for name in sides}
    for turn in range(setting.rounds):
        for name, lake in sides.items():
            drop_page_cache(tables if name == "local" else [path for path in directory.rglob("*") if path.is_file()])
            ran[name] += setting.perform(lake, [f"{name}{turn}"])
        say("from SSD: " + ", ".join(f"{name} {one[-1].total_s:.2f} s" for name, one in ran.items()))
    if any(one.digests != ran["local"][0].digests for ones in ran.values() for one in ones):
        raise SystemExit("results from SSD differ")
    local = [one.total_s for one in ran["local"]]
    raw: dict[str, Json] = {
        **{name: [_totals(one) for one in ones] for name, ones in ran.items()},
        "cpu_seconds": {name: [one.cpu_s for one in ones] for name, ones in ran.items()},
        "unlisted_ratio": median_ratio([one.total_s for one in ran["unlisted"]], local),
        "queries": {name: [one.seconds for one in ones] for name, ones in ran.items()},
    }
    value = median_ratio([one.total_s for one in ran["tiercache"]], local)
    note = "page cache dropped before each pass, both sides; rows of [seconds, requests, bytes]; origin: "
    return [Figure("ssd_over_local", value, 1.25, raw=raw, note=note + setting.store.said)]


def setting_from(
    store: origins.Store, tables: Path, work: Path, prefix: str, *, quick: bool, rounds: int, share: bool
) -> Setting:
    """The setting of this run; --quick keeps three queries and one round."""
    queries = tpch.queries(1.0)
    if quick:
        queries = [query for query in queries if query.name in QUICK]
    return Setting(store, tables, work, prefix, queries, 1 if quick else rounds, share)


GROUPS = {"cold": cold_queries, "suite": suite, "warm": warm, "ssd": from_ssd, "peers": lake_peers.peers}


def main() -> None:
    """Runs the groups asked for and prints the report."""
    parser = arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--s3", default="auto", choices=("auto", "own", "ceph"), help="auto: Ceph where it runs")
    parser.add_argument("--delay-ms", type=float, default=30.0, help="first byte of every answer")
    parser.add_argument("--mbps", type=float, default=100.0, help="of each connection; 0: unlimited")
    parser.add_argument("--scale", type=float, default=1.0, help="TPC-H scale factor")
    parser.add_argument("--rounds", type=int, default=3, help="of each side")
    parser.add_argument("--alone", action="store_true", help="share=False: the cache lives in the reader's process")
    parser.add_argument("--only", nargs="*", choices=tuple(GROUPS), default=tuple(GROUPS), help="groups to run")
    args = parser.parse_args()
    scale = 0.1 if args.quick else args.scale
    tables = tpch.make_tables(scale, CACHE_DIR, say)
    figures: list[Figure] = []
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=CACHE_DIR, prefix="lake-")))
        store = _store(stack, args.s3, work / "bucket", args.delay_ms, args.mbps)
        prefix = f"tpch-sf{scale:g}"
        origins.fill(store, tables, prefix)
        where = f"{origins.BUCKET}/{prefix}"
        setting = setting_from(store, tables, work, where, quick=args.quick, rounds=args.rounds, share=not args.alone)
        say(f"origin: {store.said}; data: TPC-H scale factor {scale:g}")
        for name in args.only:
            figures += GROUPS[name](setting)
    if args.quick:  # three queries once on a tenth of the data show that all works; they measure nothing
        figures = [replace(figure, bar=None, note=f"--quick, no measurement; {figure.note}") for figure in figures]
    extra: dict[str, Json] = {
        "origin": store.said,
        "data": f"TPC-H scale factor {scale:g}, tpchgen-cli defaults",
        "versions": installed("duckdb", "s3fs", "fsspec", "pyarrow", "polars", "obstore"),
        "direct": workload.BEST_S3FS,
        "share": not args.alone,
        "root": str(ROOT.name),
    }
    emit(report("lake", figures, extra=extra), as_json=args.json)


def _store(stack: contextlib.ExitStack, kind: str, root: Path, delay_ms: float, mbps: float) -> origins.Store:
    """The origin asked for; `auto` is Ceph where it runs, else our own server."""
    for one in ("ceph", "own") if kind == "auto" else (kind,):
        try:
            return stack.enter_context(origins.store(one, root, delay_ms=delay_ms, mbps=mbps))
        except UnavailableError as error:
            if one == kind or one == "own":
                raise
            say(f"no Ceph ({error}): our own server instead")
    raise AssertionError


if __name__ == "__main__":
    main()
