"""Metrics: one table of everything that is counted, and the numbers themselves, cheap enough for every batch.

Names follow Prometheus: the unit is in the name, counters end in `_total`, a histogram of seconds ends in `_seconds`.
A new metric is one line in METRICS. Text for a scraper is rendered here, without a client library.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

LABELS = ("tier", "kind", "operation")
"""Every label there is, in the order of the key of a series; an empty value is a label that is not there."""
SERIES_MAX = 64
"""Series of one metric. Labels are names out of our own code, never paths or keys, so this is never reached."""
LATENCY_BUCKETS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class MetricKind(Enum):
    """How the numbers of a metric behave; the values are Prometheus' words."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the table: name, kind, unit of the numbers, meaning, and which of LABELS its series may have."""

    name: str
    kind: MetricKind
    unit: str
    help: str
    labels: tuple[str, ...] = ()


def _rows(kind: MetricKind, *rows: tuple[str, str, str] | tuple[str, str, str, str]) -> Iterator[Metric]:
    for name, unit, help_text, *labels in rows:
        yield Metric(f"tiercache_{name}", kind, unit, help_text, tuple(labels[0].split()) if labels else ())


METRICS: tuple[Metric, ...] = (
    *_rows(
        MetricKind.COUNTER,
        ("hits_total", "entries", "Entries, or wanted parts' pages, that a tier had.", "tier kind"),
        ("misses_total", "entries", "Entries that no tier had; with a tier: that this tier did not have.", "tier kind"),
        ("puts_total", "entries", "Entries that were put.", "kind"),
        ("read_bytes_total", "bytes", "Payload bytes read from a tier.", "tier"),
        ("written_bytes_total", "bytes", "Payload bytes written to a tier.", "tier"),
        ("evictions_total", "entries", "Entries that a tier gave up for room.", "tier"),
        ("evicted_bytes_total", "bytes", "Bytes that a tier gave up for room.", "tier"),
        ("expirations_total", "entries", "Entries dropped because their time was over."),
        ("demotions_total", "entries", "Entries copied to the next tier in the background."),
        (
            "demotions_dropped_total",
            "entries",
            "Entries not copied down, for pressure or faults; they are misses later.",
        ),
        ("uploads_total", "entries", "Entries copied to object storage in the background."),
        ("spills_total", "entries", "Entries that peers took before they were evicted here."),
        ("uploads_dropped_total", "entries", "Entries not copied there, for pressure, room or faults."),
        ("corruptions_total", "entries", "Key or digest mismatches found before a reader got the bytes.", "tier"),
        (
            "tier_errors_total",
            "errors",
            "Faults of a tier: I/O errors, no space, a vanished directory.",
            "tier operation",
        ),
        ("deadline_misses_total", "entries", "Reads answered as a miss because a tier was too slow.", "tier"),
        ("full_total", "entries", "Entries refused because nothing could be evicted.", "tier"),
        ("reclaimed_bytes_total", "bytes", "Space that segment reclaim gave back.", "tier"),
        ("reinserted_bytes_total", "bytes", "Bytes that segment reclaim had to write again.", "tier"),
        ("merged_loads_total", "loads", "Readers that waited for another reader's load instead of starting one."),
        ("origin_requests_total", "requests", "Requests sent to the origin, retries included.", "operation"),
        ("origin_bytes_total", "bytes", "Body bytes received from the origin."),
        ("origin_errors_total", "errors", "Origin requests that failed.", "operation"),
        ("origin_retries_total", "requests", "Origin requests that were tried again.", "operation"),
        ("readahead_bytes_total", "bytes", "Bytes asked of the origin before a reader wanted them."),
        ("stat_hits_total", "calls", "Facts or listings answered without asking the origin."),
        ("stat_misses_total", "calls", "Facts or listings that the origin was asked for."),
        ("changed_objects_total", "objects", "Objects found changed at the origin while a version was pinned."),
        ("kv_matched_blocks_total", "blocks", "KV blocks found by a match, by the tier they must come from.", "tier"),
        ("kv_missed_blocks_total", "blocks", "KV blocks asked for by a match and not found."),
        ("kv_saved_blocks_total", "blocks", "KV blocks of which a rank's share was stored, or was there."),
        ("kv_saved_bytes_total", "bytes", "Bytes copied out of engine memory."),
        ("kv_loaded_blocks_total", "blocks", "KV blocks copied into engine memory as a whole."),
        ("kv_loaded_bytes_total", "bytes", "Bytes copied into engine memory."),
        ("kv_failed_blocks_total", "blocks", "KV blocks that a save or a load gave up.", "operation"),
        ("kv_compared_bytes_total", "bytes", "Bytes that replicas digested to compare them with what is stored."),
        ("kv_divergent_parts_total", "parts", "Parts in which a rank's bytes differ from those of its replicas."),
        ("internal_errors_total", "errors", "Unexpected exceptions that were caught, logged and answered as a miss."),
    ),
    *_rows(
        MetricKind.GAUGE,
        ("tier_health", "state", "2 healthy, 1 read-only, 0 off.", "tier"),
        ("tier_used_bytes", "bytes", "Bytes reserved or written in a tier.", "tier"),
        ("tier_capacity_bytes", "bytes", "Cap of a tier.", "tier"),
        ("tier_used_files", "files", "Files of a tier.", "tier"),
        ("tier_capacity_files", "files", "Cap on files of a tier.", "tier"),
        ("leases", "leases", "Pins on entries that were not given back yet."),
        ("queue_bytes", "bytes", "Bytes waiting to be written to the next tier."),
        ("loads_in_flight", "loads", "Loads under way."),
        ("entries", "entries", "Entries in the index."),
        ("index_bytes", "bytes", "Memory that index and policies use."),
    ),
    *_rows(
        MetricKind.HISTOGRAM,
        ("read_seconds", "seconds", "Time of one batch of reads from a tier.", "tier"),
        ("kv_seconds", "seconds", "Time from the call of a save or load to its end.", "operation"),
        ("origin_seconds", "seconds", "Time of one origin request, its retries included.", "operation"),
    ),
)

BY_NAME: dict[str, Metric] = {metric.name: metric for metric in METRICS}

_Key = tuple[str, str, str, str]


class _Histogram:
    """Counts of one series by bucket, the last for everything above, and their sum."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * (len(LATENCY_BUCKETS_S) + 1)
        self.total = 0.0


class Metrics:
    """The numbers of one cache. Every method is safe in any thread and holds one short lock.

    A series is a metric and its label values. It starts to exist at first use: what this process never counted is
    absent, not zero.
    """

    __slots__ = ("_histograms", "_lock", "_values")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._histograms: dict[_Key, _Histogram] = {}
        self._values: dict[_Key, int | float] = {}

    def add(self, name: str, amount: float = 1, *, tier: str = "", kind: str = "", operation: str = "") -> None:
        """Adds to a counter (or to a gauge, where a negative amount is right too)."""
        key = (name, tier, kind, operation)
        with self._lock:
            try:
                self._values[key] += amount
            except KeyError:
                self._open(key)
                self._values[key] = amount

    def add_all(self, amounts: Iterable[tuple[str, float, str, str]]) -> None:
        """Adds many (name, amount, tier, kind) under one lock: what a batch has to report at its end."""
        with self._lock:
            for name, amount, tier, kind in amounts:
                key = (name, tier, kind, "")
                if key not in self._values:
                    self._open(key)
                    self._values[key] = 0
                self._values[key] += amount

    def set(self, name: str, value: float, *, tier: str = "", kind: str = "", operation: str = "") -> None:
        """Sets a gauge."""
        key = (name, tier, kind, operation)
        with self._lock:
            if key not in self._values:
                self._open(key)
            self._values[key] = value

    def observe(self, name: str, value: float, *, tier: str = "", kind: str = "", operation: str = "") -> None:
        """Counts a value in its bucket of a histogram."""
        key = (name, tier, kind, operation)
        bucket = bisect_left(LATENCY_BUCKETS_S, value)
        with self._lock:
            histogram = self._histograms.get(key)
            if histogram is None:
                self._open(key)
                histogram = self._histograms[key] = _Histogram()
            histogram.counts[bucket] += 1
            histogram.total += value

    def value(self, name: str, *, tier: str = "", kind: str = "", operation: str = "") -> int | float:
        """One number; 0 for a series that was never used. A histogram answers the count of its values."""
        key = (name, tier, kind, operation)
        with self._lock:
            histogram = self._histograms.get(key)
            return sum(histogram.counts) if histogram is not None else self._values.get(key, 0)

    def total(self, name: str) -> int | float:
        """Sum of a counter or gauge over all its series."""
        with self._lock:
            return sum(value for key, value in self._values.items() if key[0] == name)

    def snapshot(self) -> dict[str, int | float]:
        """Every number by its full name, such as `tiercache_hits_total{tier="ssd"}`, as of one moment.

        A histogram gives `NAME_count` and `NAME_sum`.
        """
        values, histograms = self._copied()
        found = {_full(key): value for key, value in values.items()}
        for key, (counts, total) in histograms.items():
            found[_full(key, "_count")] = sum(counts)
            found[_full(key, "_sum")] = total
        return dict(sorted(found.items()))

    def text(self) -> str:
        """All series in the Prometheus text format, version 0.0.4."""
        values, histograms = self._copied()
        lines: list[str] = []
        for metric in METRICS:
            rows = [f"{_full(key)} {_number(values[key])}" for key in sorted(values) if key[0] == metric.name]
            for key in sorted(histograms):
                if key[0] == metric.name:
                    rows += _histogram_rows(key, *histograms[key])
            if rows:
                lines += [f"# HELP {metric.name} {metric.help}", f"# TYPE {metric.name} {metric.kind.value}", *rows]
        return "\n".join(lines) + "\n"

    def _open(self, key: _Key) -> None:
        """Checks a series against the table before it exists."""
        metric = BY_NAME[key[0]]
        for label, value in zip(LABELS, key[1:]):
            assert not value or label in metric.labels, f"{metric.name} has no label {label}"
        series = sum(1 for other in (*self._values, *self._histograms) if other[0] == metric.name)
        assert series < SERIES_MAX, f"{metric.name} has too many series"

    def _copied(self) -> tuple[dict[_Key, int | float], dict[_Key, tuple[list[int], float]]]:
        with self._lock:
            histograms = {key: (list(each.counts), each.total) for key, each in self._histograms.items()}
            return dict(self._values), histograms


def difference(after: Mapping[str, int | float], before: Mapping[str, int | float]) -> dict[str, int | float]:
    """What changed between two snapshots; series that stayed the same are left out."""
    changes = {name: value - before.get(name, 0) for name, value in after.items()}
    return {name: change for name, change in changes.items() if change}


def _full(key: _Key, suffix: str = "", extra: str = "") -> str:
    """Name with labels, as Prometheus writes it."""
    labels = [f'{label}="{_escaped(value)}"' for label, value in zip(LABELS, key[1:]) if value]
    labels += [extra] if extra else []
    return f"{key[0]}{suffix}{{{','.join(labels)}}}" if labels else f"{key[0]}{suffix}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    return repr(value)


def _histogram_rows(key: _Key, counts: list[int], total: float) -> list[str]:
    rows, running = [], 0
    for bound, count in zip((*map(str, LATENCY_BUCKETS_S), "+Inf"), counts):
        running += count
        label = f'le="{bound}"'
        rows.append(f"{_full(key, '_bucket', label)} {running}")
    return [*rows, f"{_full(key, '_sum')} {_number(total)}", f"{_full(key, '_count')} {running}"]
