"""Jobs of several processes on one shared directory: what each asks of the origin, beside what one reader asks.

A bucket of a counting S3 server holds TPC-H tables. A DataLoader of PyTorch reads them through the cache with four
processes (forked, and spawned; row groups, and blocks of bytes), by a filesystem and by open files that the parent has
used before; dask groups them with four worker processes. Every job has a cache directory of its own, so it starts cold;
beside it stands the same work done by one process. Results are compared with what the files on disk say, and requests
by the server's log.

Facts of files are believed for STAT_TTL_S here: a job that takes longer than that asks for them again, once for all of
its processes, as one reader would that takes as long.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.common import CACHE_DIR, ROOT, arguments, commit, machine, say, versions

PROCESSES = 4
STAT_TTL_S = 600.0
DELAY_MS = 20.0
"""What the origin takes to answer, so that readers meet at it."""
JOB_S_MAX = 500.0
PREFIX = "tpch"
TORCH = ROOT / ".venv-torch" / "bin" / "python"
NO_TORCH = "no environment with PyTorch: make torch"
PROXIES = ("AWS_CA_BUNDLE", "AWS_PROFILE", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")


@dataclass(frozen=True, slots=True)
class Job:
    """One job: what it is called, what bench.jobs_child calls it, what its items are, who does the same alone."""

    title: str
    name: str
    kind: str = ""
    alone: str = ""
    torch: bool = False

    @property
    def single(self) -> bool:
        """Whether this is the one reader that others are compared with."""
        return not self.alone


JOBS = (
    Job("one reader, row groups", "alone", "row groups"),
    Job("DataLoader, fork, row groups", "fork", "row groups", "one reader, row groups", torch=True),
    Job("DataLoader, spawn, row groups", "spawn", "row groups", "one reader, row groups", torch=True),
    Job("one reader, blocks of bytes", "alone", "bytes"),
    Job("DataLoader, fork, blocks", "fork", "bytes", "one reader, blocks of bytes", torch=True),
    Job("DataLoader, spawn, blocks", "spawn", "bytes", "one reader, blocks of bytes", torch=True),
    Job("one process of dask", "dask-alone"),
    Job("dask, worker processes", "dask", alone="one process of dask"),
)


@dataclass(frozen=True, slots=True)
class Row:
    """What came of a job. `asked` holds [operation, object, start, stop] for every request; stop 0 is no range."""

    job: Job
    processes: int
    seconds: float
    results: dict[str, Any]
    asked: list[tuple[str, str, int, int]]
    sent: int

    @property
    def requests(self) -> int:
        return len(self.asked)

    @property
    def spans(self) -> dict[str, list[tuple[int, int]]]:
        """Bytes of each object that were fetched, as stretches that do not touch."""
        found: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for _, target, start, stop in sorted(self.asked, key=lambda each: each[1:]):
            if not stop:
                continue
            stretches = found[target]
            if stretches and start <= stretches[-1][1]:
                stretches[-1] = (stretches[-1][0], max(stop, stretches[-1][1]))
            else:
                stretches.append((start, stop))
        return found

    def facts(self) -> dict[str, Any]:
        """Ready for JSON."""
        counts: dict[str, int] = defaultdict(int)
        for operation, *_ in self.asked:
            counts[operation] += 1
        return {
            "job": self.job.title,
            "processes": self.processes,
            "seconds": round(self.seconds, 1),
            "requests": self.requests,
            "bytes": self.sent,
            "operations": dict(counts),
            "beside": self.job.alone,
        }


class Bench:
    """A bucket with tables, and jobs over it. Everything it makes lies in `scratch`."""

    def __init__(self, store: Any, tables: Path, scratch: Path) -> None:
        self._store, self._tables, self._scratch = store, tables, scratch
        size = sum(path.stat().st_size for path in tables.glob("*.parquet"))
        self._memory_bytes = (64 << 20) + 2 * size
        self._truths: dict[tuple[str, str], dict[str, Any]] = {}

    def run(self, job: Job) -> Row:
        """Runs a job in a new directory."""
        with tempfile.TemporaryDirectory(dir=self._scratch, ignore_cleanup_errors=True) as directory:
            options = {
                "target_protocol": "s3",
                "target_options": self._store.s3_options(),
                "directory": directory,
                "memory_bytes": self._memory_bytes,
                "ssd_bytes": 0,
                "share": True,
                "linger_s": 0.5,
                "stat_ttl_s": STAT_TTL_S,
            }
            self._log()
            began_s = time.monotonic()
            results, processes = self._child(job, "tiercache", options, f"lake/{PREFIX}")
            seconds = time.monotonic() - began_s
            wait_for_owner(directory)
            log = self._log()
        asked = [asked_of(row) for row in log]
        return Row(job, processes, seconds, results, asked, sum(row["sent"] for row in log))

    def truth(self, job: Job) -> dict[str, Any]:
        """The results of a job as the files on disk have them."""
        name = "dask-alone" if job.name.startswith("dask") else "alone"
        key = (name, job.kind)
        if key not in self._truths:
            self._truths[key] = self._child(Job(name, name, job.kind), "file", {}, str(self._tables))[0]
        return self._truths[key]

    def _child(self, job: Job, protocol: str, options: dict[str, Any], folder: str) -> tuple[dict[str, Any], int]:
        terms = {"protocol": protocol, "options": options, "folder": folder, "kind": job.kind}
        terms |= {"processes": PROCESSES, "scratch": str(self._scratch)}
        python = str(TORCH) if job.torch else sys.executable
        done = subprocess.run(
            [python, "-m", "bench.jobs_child", job.name],
            input=json.dumps(terms),
            capture_output=True,
            text=True,
            timeout=JOB_S_MAX,
            check=False,
            env=environment(),
        )
        if done.returncode:
            raise RuntimeError(f"{job.title} ended with status {done.returncode}:\n{done.stderr[-4000:]}")
        answer = json.loads(done.stdout.splitlines()[-1])
        return answer["results"], len(answer["processes"])

    def _log(self) -> list[dict[str, Any]]:
        """Requests since the last call."""
        url = self._store.counters.removesuffix("__stats") + "__log?clear=1"
        with urllib.request.urlopen(url, timeout=30) as answer:
            return json.load(answer)


def environment() -> dict[str, str]:
    """Of a job: it imports what this process imports, and nothing else decides how it reads."""
    import tiercache
    import tiercache_connectors

    packages = (tiercache, tiercache_connectors)
    roots = [str(Path(package.__file__ or "").parents[1]) for package in packages] + [str(ROOT)]
    kept = {name: value for name, value in os.environ.items() if name not in PROXIES}
    kept = {name: value for name, value in kept.items() if not name.startswith("TIERCACHE_")}
    return kept | {
        "PYTHONPATH": ":".join(dict.fromkeys(roots)),
        "PYTHONWARNINGS": "ignore::UserWarning",  # that there are fewer cores than processes
        "AWS_EC2_METADATA_DISABLED": "true",
        "TIERCACHE_CONFIG": "",
    }


def wait_for_owner(directory: str) -> None:
    """Returns when the directory's owner has gone."""
    from tiercache.owner.life import LOCK_NAME

    pause = threading.Event()
    with open(os.path.join(directory, LOCK_NAME), "rb+") as lock:
        for _ in range(600):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pause.wait(0.05)
            else:
                return
    raise TimeoutError(f"the owner of {directory} does not go")


def asked_of(row: dict[str, Any]) -> tuple[str, str, int, int]:
    """A row of the server's log, its range as what was sent."""
    first, _, _ = row["range"].removeprefix("bytes=").partition("-")
    target = row["target"].partition("?")[0]
    if row["method"] != "GET" or not row["range"]:
        return row["operation"], target, 0, 0
    start = int(first) if first else -row["sent"]  # the last so many
    return row["operation"], target, start, start + row["sent"]


@contextmanager
def bench(scale: float) -> Iterator[Bench]:
    """A running origin with tables of this scale factor."""
    from tiercache.testing.demo.origins import fill, store
    from tiercache.testing.demo.tpch import make_tables

    tables = make_tables(scale, CACHE_DIR, say)
    with tempfile.TemporaryDirectory(prefix="tiercache-jobs-", ignore_cleanup_errors=True) as scratch:
        place = Path(scratch)
        with store("own", place / "origin", delay_ms=DELAY_MS, mbps=0) as found:
            fill(found, tables, PREFIX)
            yield Bench(found, tables, place)


def complaints(row: Row, truth: dict[str, Any], one: Row | None) -> list[str]:
    """What is wrong with a job; empty if its results are right, and its requests are those of one reader."""
    found = [f"{row.job.title}: {name} is not what the files say" for name in truth if truth[name] != row.results[name]]
    if one is None:
        return found
    if row.processes < PROCESSES:
        found.append(f"{row.job.title}: {row.processes} processes took part, not {PROCESSES}")
    if row.requests > one.requests or row.sent > one.sent:
        found.append(
            f"{row.job.title}: {row.requests} requests and {row.sent:,} bytes, "
            f"one reader: {one.requests} and {one.sent:,}"
        )
    if row.spans != one.spans:
        found.append(f"{row.job.title}: fetched other bytes than one reader")
    return found


def table(rows: Sequence[Row]) -> Iterator[str]:
    """For people."""
    ones = {row.job.title: row for row in rows if row.job.single}
    yield f"{'job':32}{'processes':>10}{'requests':>10}{'MB':>9}{'one reader':>12}{'MB':>9}{'seconds':>9}"
    for row in rows:
        one = ones[row.job.alone or row.job.title]
        yield (
            f"{row.job.title:32}{row.processes:10}{row.requests:10}{row.sent / 1e6:9.2f}"
            f"{one.requests:12}{one.sent / 1e6:9.2f}{row.seconds:9.1f}"
        )


def main() -> int:
    parser = arguments("Origin requests of jobs of several processes beside those of one reader.")
    parser.add_argument("--scale", type=float, default=1.0, help="scale factor of the tables")
    options = parser.parse_args()
    jobs = [job for job in JOBS if not job.torch or TORCH.exists()]
    rows: dict[str, Row] = {}
    wrong: list[str] = []
    with bench(0.1 if options.quick else options.scale) as running:
        for job in jobs:
            say(f"{job.title} ...")
            row = rows[job.title] = running.run(job)
            wrong += complaints(row, running.truth(job), rows.get(job.alone))
    results = sum(len(row.results) for row in rows.values())
    said = (
        [*wrong, f"{len(wrong)} complaints"] if wrong else [f"all {results} results equal, requests as of one reader"]
    )
    if options.json:
        facts = {"bench": "jobs", "commit": commit(), "machine": machine(), "versions": versions("dask", "distributed")}
        print(json.dumps(facts | {"rows": [row.facts() for row in rows.values()], "said": said}, indent=1))
    else:
        print(*table(list(rows.values())), *said, sep="\n")
    if len(jobs) < len(JOBS):
        say(f"PyTorch's DataLoader was left out: {NO_TORCH}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
