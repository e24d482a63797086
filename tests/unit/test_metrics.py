"""Metrics: the table, the numbers, and the text that a scraper reads."""

from __future__ import annotations

import re
import threading

import pytest

from tiercache.metrics import BY_NAME, LABELS, LATENCY_BUCKETS_S, METRICS, MetricKind, Metrics, difference


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_the_table_keeps_its_rules(metric) -> None:
    assert re.fullmatch(r"tiercache_[a-z_]+", metric.name)
    assert metric.name.endswith("_total") == (metric.kind is MetricKind.COUNTER)
    assert metric.name.endswith("_seconds") == (metric.kind is MetricKind.HISTOGRAM)
    assert ("bytes" in metric.name) == (metric.unit == "bytes")
    assert set(metric.labels) <= set(LABELS)
    assert metric.help.endswith(".")
    assert "\n" not in metric.help


def test_names_are_unique() -> None:
    assert len(BY_NAME) == len(METRICS)


def test_add_set_and_read_back() -> None:
    metrics = Metrics()
    metrics.add("tiercache_hits_total", 3, tier="memory", kind="page")
    metrics.add("tiercache_hits_total", tier="memory", kind="page")
    metrics.add("tiercache_hits_total", 5, tier="ssd", kind="page")
    metrics.set("tiercache_tier_health", 2, tier="ssd")
    metrics.set("tiercache_tier_health", 1, tier="ssd")
    metrics.add("tiercache_leases", 1)
    metrics.add("tiercache_leases", -1)
    assert metrics.value("tiercache_hits_total", tier="memory", kind="page") == 4
    assert metrics.value("tiercache_hits_total", tier="gpu", kind="page") == 0
    assert metrics.total("tiercache_hits_total") == 9
    assert metrics.value("tiercache_tier_health", tier="ssd") == 1
    assert metrics.value("tiercache_leases") == 0


def test_add_all_is_one_step() -> None:
    metrics = Metrics()
    metrics.add_all(
        [("tiercache_hits_total", 2, "memory", "page"), ("tiercache_evicted_bytes_total", 100, "memory", "")]
    )
    metrics.add_all([("tiercache_hits_total", 1, "memory", "page"), ("tiercache_misses_total", 7, "", "page")])
    snapshot = metrics.snapshot()
    assert snapshot['tiercache_hits_total{tier="memory",kind="page"}'] == 3
    assert snapshot['tiercache_misses_total{kind="page"}'] == 7


@pytest.mark.skipif(not __debug__, reason="asserts are off")
def test_unknown_names_and_labels_are_bugs() -> None:
    metrics = Metrics()
    with pytest.raises(KeyError):
        metrics.add("tiercache_hitz_total")
    with pytest.raises(AssertionError, match="no label tier"):
        metrics.add("tiercache_leases", tier="memory")
    with pytest.raises(AssertionError, match="too many series"):
        for i in range(100):
            metrics.add("tiercache_evictions_total", tier=f"t{i}")
    assert metrics.value("tiercache_hitz_total") == 0


def test_what_was_never_counted_is_absent_and_not_zero() -> None:
    metrics = Metrics()
    assert metrics.snapshot() == {}
    assert metrics.text() == "\n"
    metrics.add("tiercache_merged_loads_total", 0)
    assert metrics.snapshot() == {"tiercache_merged_loads_total": 0}


def test_histogram_counts_each_value_once() -> None:
    metrics = Metrics()
    for value in (0.0, 0.0001, 0.00011, 5.0, 1e9):
        metrics.observe("tiercache_read_seconds", value, tier="ssd")
    assert metrics.value("tiercache_read_seconds", tier="ssd") == 5
    assert metrics.snapshot()['tiercache_read_seconds_count{tier="ssd"}'] == 5
    text = metrics.text()
    assert 'tiercache_read_seconds_bucket{tier="ssd",le="0.0001"} 2\n' in text
    assert 'tiercache_read_seconds_bucket{tier="ssd",le="2.5"} 3\n' in text
    assert 'tiercache_read_seconds_bucket{tier="ssd",le="+Inf"} 5\n' in text
    assert 'tiercache_read_seconds_count{tier="ssd"} 5\n' in text


def test_text_is_what_prometheus_reads() -> None:
    metrics = Metrics()
    metrics.add("tiercache_origin_bytes_total", 1 << 53)
    metrics.add("tiercache_origin_requests_total", 2, operation="read")
    metrics.observe("tiercache_origin_seconds", 0.03, operation="read")
    name, labels = r"[a-z_]+", r'(\{[a-z]+="[^"]*"(,[a-z]+="[^"]*")*\})?'
    seen: set[str] = set()
    for line in metrics.text().splitlines():
        assert re.fullmatch(rf"# (HELP|TYPE) {name} .+|{name}{labels} [-+0-9.e]+", line), line
        if not line.startswith("#"):
            assert line.split(" ")[0] not in seen
            seen.add(line.split(" ")[0])
    assert "tiercache_origin_bytes_total 9007199254740992\n" in metrics.text()
    parser = pytest.importorskip("prometheus_client.parser")
    families = {family.name: family for family in parser.text_string_to_metric_families(metrics.text())}
    assert families["tiercache_origin_requests"].samples[0].labels == {"operation": "read"}
    assert len(families["tiercache_origin_seconds"].samples) == len(LATENCY_BUCKETS_S) + 3


def test_difference_leaves_out_what_stayed() -> None:
    metrics = Metrics()
    metrics.add("tiercache_merged_loads_total", 2)
    before = metrics.snapshot()
    metrics.add("tiercache_hits_total", 3, tier="ssd")
    metrics.add("tiercache_origin_bytes_total", 10)
    assert difference(metrics.snapshot(), before) == {
        'tiercache_hits_total{tier="ssd"}': 3,
        "tiercache_origin_bytes_total": 10,
    }


def test_threads_lose_nothing() -> None:
    metrics, start = Metrics(), threading.Barrier(4)

    def work() -> None:
        start.wait()
        for _ in range(2000):
            metrics.add("tiercache_hits_total", tier="memory")
            metrics.add_all([("tiercache_hits_total", 1, "memory", "")])
            metrics.observe("tiercache_read_seconds", 0.001, tier="memory")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert metrics.value("tiercache_hits_total", tier="memory") == 16000
    assert metrics.value("tiercache_read_seconds", tier="memory") == 8000
