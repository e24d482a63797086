"""The demo from start to end: an object store, four passes over it in three processes, and what they found."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tiercache.errors import ConfigError, UnavailableError
from tiercache.owner import state
from tiercache.testing.demo import origins, tpch, workload
from tiercache.testing.demo.report import DIRECT, Pass, Report
from tiercache.testing.demo.worker import Phase
from tiercache.wire.sockets import readable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

TITLES = {
    DIRECT: "direct",
    "cold": "cold (cache empty)",
    "ssd": "warm from SSD",
    "memory": "warm from memory",
}
OWNER_ENDS_S = 60.0
"""An owner that was told to go writes what memory has to the SSD first."""
FILES_MAX = 8
"""Files of a user's bucket that the demo reads, unless told otherwise."""


class Watcher(Protocol):
    """Whoever shows progress. The caller guarantees started, then one `query` for each query, for each pass."""

    def note(self, text: str) -> None:
        """Something worth a line."""
        ...

    def started(self, title: str, count: int) -> None:
        """A pass begins."""
        ...

    def query(self, title: str, event: Mapping[str, Any]) -> None:
        """One query ended."""
        ...


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run. Tables stay under `work` for the next run, the rest in a folder there that goes at the end unless
    `keep` is set or results differ. Without `url`: TPC-H in an object store of our own."""

    work: Path
    s3: str = "own"
    url: str = ""
    endpoint: str = ""
    scale: float = 1.0
    delay_ms: float = 30.0
    mbps: float = 100.0
    files_max: int = FILES_MAX
    settings: tuple[tuple[str, object], ...] = ()
    keep: bool = False


def run(plan: Plan, watcher: Watcher) -> Report:
    """Runs the demo. Faults: UnavailableError when a program or package is missing or a phase failed, ConfigError."""
    if not tpch.have_duckdb():
        raise UnavailableError("DuckDB, which runs the demo's queries, is not installed: pip install tiercache[demo]")
    plan.work.mkdir(parents=True, exist_ok=True)
    here = Path(tempfile.mkdtemp(prefix="demo-", dir=plan.work))
    keep = True
    try:
        report = _run_in(plan, here, watcher)
        keep = plan.keep or not report.good
    except UnavailableError as error:
        keep = plan.keep or (here / "worker.log").exists()
        raise UnavailableError(f"{error} (more in {here / 'worker.log'})" if keep else str(error)) from error
    except (ConfigError, KeyboardInterrupt):
        keep = plan.keep
        raise
    finally:
        if not keep:
            shutil.rmtree(here, ignore_errors=True)
    if keep:
        report.notes.append(f"kept in {here}")
    return report


def _run_in(plan: Plan, here: Path, watcher: Watcher) -> Report:
    """Runs all passes with everything in `here`."""
    with _source(plan, here, watcher) as source:
        report = Report(source.said, source.data, [query.name for query in source.queries], here / "results")
        settings = {"directory": str(here / "cache"), **dict(plan.settings)}
        cached = workload.Lake(
            f"tiercache://{source.direct.prefix.partition('://')[2]}",
            "tiercache",
            {"target_protocol": source.direct.protocol, "target_options": source.options, **settings},
        )
        for lake, passes in ((source.direct, [DIRECT]), (cached, ["cold"]), (cached, ["ssd", "memory"])):
            phase = Phase(lake, source.queries, passes, str(report.results), source.counters)
            report.passes += perform(phase, here, watcher)
        report.notes += source.notes
    return report


@dataclass(frozen=True, slots=True)
class Source:
    """Where the demo's tables are: reached directly by `direct`, and by the cache with `options`."""

    said: str
    data: str
    queries: list[tpch.Query]
    direct: workload.Lake
    options: dict[str, Any]
    counters: str | None
    notes: tuple[str, ...] = ()


@contextmanager
def _source(plan: Plan, here: Path, watcher: Watcher) -> Iterator[Source]:
    if plan.url:
        yield _users_own(plan)
        return
    folder = tpch.make_tables(plan.scale, plan.work, watcher.note)
    prefix = f"tpch-sf{plan.scale:g}"
    with origins.store(plan.s3, here / "bucket", delay_ms=plan.delay_ms, mbps=plan.mbps) as store:
        start = time.perf_counter()
        origins.fill(store, folder, prefix)
        watcher.note(f"origin: {store.said}, at {store.url}; filled in {time.perf_counter() - start:.1f} s")
        options = store.s3_options()
        direct = workload.direct("s3", f"{origins.BUCKET}/{prefix}", options)
        data = f"TPC-H scale factor {plan.scale:g}"
        notes = (f"direct is {workload.BEST_S3FS}; each query runs in a fresh DuckDB, with its defaults",)
        yield Source(store.said, data, tpch.queries(plan.scale), direct, options, store.counters, notes)


def _users_own(plan: Plan) -> Source:
    """A user's own Parquet, at any fsspec URL: TPC-H when the eight tables are there, else every file read whole."""
    protocol, mark, rest = plan.url.partition("://")
    if not mark or not rest:
        raise ConfigError(f"--url {plan.url}: give a folder as PROTOCOL://PATH, such as s3://bucket/tables")
    options: dict[str, Any] = {"endpoint_url": plan.endpoint} if plan.endpoint else {}
    direct = workload.direct(protocol, rest.rstrip("/"), options)
    try:
        fs = workload.open_filesystem(direct)
        names = {path.rpartition("/")[2] for path in fs.ls(direct.prefix, detail=False)}  # type: ignore[union-attr]
    except Exception as error:  # every fsspec filesystem has faults of its own: here they all mean the same
        raise UnavailableError(f"--url {plan.url}: {error}") from error
    if names.issuperset(f"{table}.parquet" for table in tpch.TABLES):
        queries, data = tpch.queries(plan.scale), "TPC-H tables"
    else:
        queries = workload.file_queries(direct, fs, plan.files_max)
        data = f"{len(queries)} Parquet files, each read whole"
    notes = ("requests and bytes are as each client counted them",)
    return Source(plan.url, data, queries, direct, options, None, notes)


def perform(phase: Phase, work: Path, watcher: Watcher, python: str = sys.executable) -> list[Pass]:
    """Runs one phase in a new process and reads what it says; UnavailableError with its last line when it failed."""
    path = work / "phase.json"
    phase.write(path)
    passes = {name: Pass(name, TITLES.get(name, name)) for name in phase.passes}
    log = work / "worker.log"
    words = [python, "-m", "tiercache.testing.demo.worker", str(path)]
    with log.open("w") as errors, subprocess.Popen(words, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
        assert process.stdout is not None
        try:
            _follow(process.stdout, passes, len(phase.queries), watcher)
        except BaseException:
            process.kill()
            raise
    path.unlink()
    end_owner(str(phase.lake.options.get("directory", "")))
    if process.returncode:
        last = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no message"])[-1]
        raise UnavailableError(f"the pass {'/'.join(phase.passes)} failed with status {process.returncode}: {last}")
    return list(passes.values())


def end_owner(directory: str) -> None:
    """Has the owner of a directory go, if there is one: what comes next finds what is on the SSD, and no memory."""
    left = state.read(directory) if directory else None
    if left is None or not left.owner.alive:
        return
    try:
        waiter = os.pidfd_open(left.owner.pid)
    except ProcessLookupError:
        return
    try:
        os.kill(left.owner.pid, signal.SIGTERM)
        if not readable(waiter, OWNER_ENDS_S):
            raise UnavailableError(f"the owner of {directory} did not end within {OWNER_ENDS_S:g} s")
    finally:
        os.close(waiter)


def _follow(lines: Sequence[str] | Any, passes: Mapping[str, Pass], count: int, watcher: Watcher) -> None:
    begun: set[str] = set()
    for line in lines:
        event = json.loads(line)
        one = passes[event["phase"]]
        if one.name not in begun:
            begun.add(one.name)
            watcher.started(one.title, count)
        if event["event"] == "query":
            one.add(event)
            watcher.query(one.title, event)
        else:
            one.tiers = event["tiers"]
