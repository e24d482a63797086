"""One phase of the demo in a process of its own: `python -m tiercache.testing.demo.worker PHASE.json`.

Says what it does as JSON lines on stdout, one for each query and one at the end of each pass. A new process for each
phase makes a restart real: nothing of the phase before is left but what the cache wrote to its directory.
"""

from __future__ import annotations

import json
import sys
import time
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tiercache.errors import TierCacheError
from tiercache.testing.demo import tpch, workload

COUNTS_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Phase:
    """What one process does: the queries over the lake, once for each pass, results kept under `results`/PASS.

    `counters` is the URL of the counting server's numbers; without one (a user's own bucket), requests are counted
    where they are sent: by the cache's own metrics, or in s3fs.
    """

    lake: workload.Lake
    queries: list[tpch.Query]
    passes: list[str]
    results: str
    counters: str | None = None

    def write(self, path: Path) -> None:
        """Writes the phase where `read` finds it."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Phase:
        """The phase that was written there."""
        raw = json.loads(path.read_text(encoding="utf-8"))
        raw["lake"] = workload.Lake(**raw["lake"])
        raw["queries"] = [tpch.Query(**query) for query in raw["queries"]]
        return cls(**raw)


class Counters:
    """Requests to the origin and bytes from it, wherever they can be seen best."""

    def __init__(self, url: str | None, fs: Any | None) -> None:
        self._url = url
        self._fs = fs
        self._sent = 0
        self._received = 0
        if url is None and fs is not None and not stats_of(fs):
            self._watch(fs)

    def read(self) -> tuple[int, int]:
        """(requests, bytes) since some moment."""
        if self._url is not None:
            with urllib.request.urlopen(self._url, timeout=COUNTS_TIMEOUT_S) as answer:
                facts = json.load(answer)
            facts = facts.get("stats", facts)  # the proxy's answer holds its settings too
            return int(facts["requests"]), int(facts["bytes_sent"])
        facts = stats_of(self._fs)
        if facts:
            return int(total(facts, "origin_requests_total")), int(total(facts, "origin_bytes_total"))
        return self._sent, self._received

    def _watch(self, fs: Any) -> None:
        """Counts what s3fs sends, through botocore's own events; other filesystems count as zero."""
        fs = getattr(fs, "inner", fs)
        if not hasattr(fs, "connect"):
            return
        fs.connect()
        events = fs.s3.meta.events

        def sent(**_: object) -> None:
            self._sent += 1

        def received(parsed: Any = None, **_: object) -> None:
            if isinstance(parsed, dict) and "Body" in parsed:
                self._received += int(parsed.get("ContentLength", 0))

        events.register("before-send.s3", sent)
        events.register("after-call.s3", received)


def stats_of(fs: Any | None) -> dict[str, Any]:
    """The numbers of the cache behind a filesystem; empty when there is none."""
    mount = getattr(fs, "mount", None)
    return dict(mount.cache.stats()) if mount is not None else {}


def total(stats: dict[str, Any], name: str, *, label: str = "") -> float:
    """Sum over the series of a metric in a table of stats; `label` ('tier="ssd"') keeps those series only."""
    start = f"tiercache_{name}"
    return sum(
        float(value)
        for key, value in stats.items()
        if (key == start or key.startswith(start + "{")) and (not label or label in key)
    )


def say(**event: object) -> None:
    """One line for the parent."""
    print(json.dumps(event), flush=True)


def perform(phase: Phase) -> None:
    """Runs all passes and says everything."""
    fs: Any = workload.open_filesystem(phase.lake)
    counters = Counters(phase.counters, fs)
    before = counters.read()
    for name in phase.passes:
        folder = Path(phase.results) / name
        folder.mkdir(parents=True, exist_ok=True)
        stats_before = stats_of(fs)
        for at, query in enumerate(phase.queries):
            used = time.process_time()
            ran = workload.run(query, phase.lake, fs)
            used = time.process_time() - used
            after = counters.read()
            (folder / f"{at}.txt").write_text("\n".join(ran.lines), encoding="utf-8")
            say(
                event="query", phase=name, query=query.name, seconds=ran.seconds, cpu_s=used, rows=len(ran.lines),
                requests=after[0] - before[0], bytes=after[1] - before[1], digest=tpch.digest(ran.lines),
            )  # fmt: skip
            before = after
        stats = stats_of(fs)
        say(event="pass", phase=name, tiers=_by_tier(stats_before, stats))
    if hasattr(fs, "close"):
        fs.close()


def _by_tier(before: dict[str, Any], after: dict[str, Any]) -> dict[str, int]:
    labels = {"memory": 'tier="memory"', "ssd": 'tier="ssd"'}
    hits = {
        tier: total(after, "hits_total", label=label) - total(before, "hits_total", label=label)
        for tier, label in labels.items()
    }
    misses = total(after, "misses_total") - total(before, "misses_total")
    return {**{tier: int(count) for tier, count in hits.items()}, "misses": int(misses)} if after else {}


def _engine_errors() -> tuple[type[Exception], ...]:
    """What DuckDB raises, also around a filesystem's own faults; nothing where it is not installed."""
    try:
        import duckdb
    except ImportError:
        return ()
    return (duckdb.Error,)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; 1 with one line on stderr when the phase could not be finished."""
    paths = sys.argv[1:] if arguments is None else arguments
    faults: tuple[type[Exception], ...] = (TierCacheError, ImportError, OSError, *_engine_errors())
    try:
        perform(Phase.read(Path(paths[0])))
    except faults as error:
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
