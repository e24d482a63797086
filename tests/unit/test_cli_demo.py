"""The demo: its queries, its comparison of results, and the whole of it on a small scale."""

from __future__ import annotations

import json
import sys
from datetime import date
from decimal import Decimal
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

from tiercache.cli.app import run
from tiercache.errors import UnavailableError
from tiercache.testing.demo import tpch, workload
from tiercache.testing.demo.report import DIRECT, Pass, Report
from tiercache.testing.demo.worker import Phase, total


def test_there_are_22_queries_over_known_tables() -> None:
    found = tpch.queries(1)
    assert [query.name for query in found] == [f"Q{n}" for n in range(1, 23)]
    assert all(query.title and query.sql.startswith(("select", "with")) for query in found)
    assert "0.000100000000" in found[10].sql and "{fraction}" not in found[10].sql
    assert "0.010000000000" in tpch.queries(0.01)[10].sql


def test_tables_are_bound_by_name() -> None:
    by_name = {query.name: query for query in tpch.queries(1)}
    sql = workload.over(by_name["Q6"], "s3://b/t")
    assert sql.startswith("with lineitem as not materialized (from read_parquet('s3://b/t/lineitem.parquet')) select")
    sql = workload.over(by_name["Q15"], "x")  # has a common table expression of its own
    assert sql.count("with ") == 1 and "revenue (supplier_no" in sql
    assert (
        workload.over(tpch.Query("f", "", "from read_parquet('{prefix}/part.x')"), "p")
        == "from read_parquet('p/part.x')"
    )


def test_rows_are_compared_exactly_and_without_order() -> None:
    one = tpch.rows_text([(1, 0.1, Decimal("1.10"), date(1995, 1, 2), "x"), (None, 0.0, Decimal(0), date(1, 1, 1), "")])
    same = tpch.rows_text(
        [(None, 0.0, Decimal(0), date(1, 1, 1), ""), (1, 0.1, Decimal("1.10"), date(1995, 1, 2), "x")]
    )
    assert tpch.digest(one) == tpch.digest(same)
    assert tpch.rows_text([(0.1 + 0.2,)]) != tpch.rows_text([(0.3,)])
    assert tpch.rows_text([(1,)]) != tpch.rows_text([("1",)])


def make_report(folder: Path, digests: dict[str, str]) -> Report:
    made = Report("origin", "data", ["Q1", "Q2"], folder)
    for name in (DIRECT, "cold"):
        one = Pass(name, name)
        for query in ("Q1", "Q2"):
            digest = digests.get(f"{name} {query}", "d")
            one.add({"query": query, "seconds": 1.0, "cpu_s": 1.0, "digest": digest, "requests": 2, "bytes": 3})
        made.passes.append(one)
    return made


def test_the_verdict(tmp_path: Path) -> None:
    good = make_report(tmp_path, {})
    assert good.good and good.verdict() == "all 2 results equal"
    assert good.passes[0].total_s == 2.0 and good.passes[0].requests == 4

    for name, rows in ((DIRECT, ["a", "b"]), ("cold", ["a", "c"])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.txt").write_text("\n".join(rows))
    bad = make_report(tmp_path, {"cold Q2": "other"})
    assert not bad.good and bad.verdict() == "1 of 2 results differ"
    assert bad.differences() == ["cold Q2: row c instead of b"]

    nothing = Report("origin", "data", ["Q1"], tmp_path, [good.passes[0]])
    assert not nothing.good and not nothing.verdict().startswith("all")


def test_a_phase_survives_being_written(tmp_path: Path) -> None:
    lake = workload.Lake("p", "s3", {"key": "k"}, ["set x = 1"], primed=True)
    phase = Phase(lake, tpch.queries(1)[:2], ["cold"], "results", "http://counters")
    phase.write(tmp_path / "phase.json")
    assert Phase.read(tmp_path / "phase.json") == phase


def test_series_are_summed() -> None:
    stats = {
        'tiercache_hits_total{tier="ssd"}': 2,
        'tiercache_hits_total{tier="memory"}': 3,
        "tiercache_hits_total_x": 9,
    }
    assert total(stats, "hits_total") == 5
    assert total(stats, "hits_total", label='tier="ssd"') == 2


def demo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["tiercache", "demo", *map(str, words)])
    monkeypatch.setenv("TIERCACHE_CONFIG", "")
    monkeypatch.setenv("TIERCACHE_MEMORY_BYTES", "64MiB")
    monkeypatch.setenv("TIERCACHE_SSD_BYTES", "256MiB")
    code = run()
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.slow
def test_the_demo_on_a_small_scale(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for package in ("duckdb", "s3fs"):
        pytest.importorskip(package)
    try:
        tpch.generator()
    except UnavailableError as error:
        pytest.skip(str(error))
    words = ("--scale", "0.01", "--delay-ms", "0", "--mbps", "0", "--directory", tmp_path)
    code, out, err = demo(monkeypatch, capsys, *words, "--json", "--keep")
    assert code == 0, err
    facts = json.loads(out)
    passes = {one["name"]: one for one in facts["passes"]}
    assert list(passes) == [DIRECT, "cold", "ssd", "memory"]
    assert facts["verdict"] == "all 66 results equal"
    assert passes["cold"]["requests"] < passes[DIRECT]["requests"]
    assert passes["cold"]["tiers"]["misses"] > 0 and passes["memory"]["tiers"]["memory"] > 0
    assert passes["ssd"]["tiers"]["ssd"] > 0 and passes["ssd"]["tiers"]["misses"] == 0
    assert next(tmp_path.glob("demo-*/results/cold/0.txt")).read_text().count("\n") == 3  # Q1 has four rows

    # The same tables as somebody's own folder, by URL: known by their names; and one of them alone, read whole.
    (tmp_path / "own").mkdir()
    source = tmp_path / "tpch-sf0.01" / "nation.parquet"
    (tmp_path / "own" / "some nation.parquet").write_bytes(source.read_bytes())
    code, out, err = demo(monkeypatch, capsys, "--url", f"file://{tmp_path}/own", "--directory", tmp_path / "url")
    assert code == 0, err
    assert out.rstrip().endswith("\nall 3 results equal")
    assert not list((tmp_path / "url").iterdir())
