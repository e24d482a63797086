"""Other ways to read the same Parquet from the same origin, for bench.lake: what each asks for and how long it takes.

In DuckDB, through fsspec: s3fs as it is, and behind fsspec's three caches. In DuckDB 1.5.5: its own httpfs. Without
DuckDB, and only for Q6 (one table, one filter, one sum, so that the same work can be said in each): pyarrow's and
Polars' own S3 readers.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from bench.common import ROOT, Figure, Json, say
from tiercache.errors import UnavailableError
from tiercache.testing.demo import workload
from tiercache.testing.demo.worker import Counters

if TYPE_CHECKING:
    from bench.lake import Setting

SAMPLE = ("Q1", "Q6", "Q14")
"""Peers run these: s3fs as it is transfers gigabytes for one query."""
OLD_DUCKDB = ROOT / ".venv-duckdb15" / "bin" / "python"


def peers(setting: Setting) -> list[Figure]:
    """Columns beside tiercache's own: no ratios, since not all peers do the same work; raw holds every run."""
    setting = replace(setting, queries=[query for query in setting.queries if query.name in SAMPLE])
    lakes = _lakes(setting)
    rows: dict[str, Json] = {}
    for name, lake in lakes.items():
        try:
            rows[name] = _twice(setting, name, lake)
        except UnavailableError as error:
            say(f"peer {name}: {error}")
            rows[name] = {"failed": str(error)}
    rows["DuckDB 1.5.5 httpfs"] = _httpfs(setting)
    single = {name: _program(setting, name) for name in ("pyarrow", "polars")}
    note = f"DuckDB runs {', '.join(SAMPLE)}; first and second run of one process as [seconds, requests, bytes]; "
    return [
        Figure("peers", None, raw=rows, note=note + f"origin: {setting.store.said}"),
        Figure("peers_q6", None, raw=single, note="Q6 alone, without DuckDB: first and second run in one process"),
    ]


def _lakes(setting: Setting) -> dict[str, workload.Lake]:
    s3 = setting.store.s3_options()
    prefix = setting.prefix
    caches = {}
    for name in ("blockcache", "filecache", "simplecache"):
        folder = setting.empty(name)
        options = {"target_protocol": "s3", "target_options": s3, "cache_storage": str(folder)}
        caches[name] = workload.Lake(f"peer://{prefix}", name, options)
    return {
        "tiercache": setting.cached(setting.empty("peer")),
        "s3fs best": setting.direct,
        "s3fs default": workload.Lake(f"s3://{prefix}", "s3", s3),
        **caches,
    }


def _twice(setting: Setting, name: str, lake: workload.Lake, python: str = sys.executable) -> dict[str, Json]:
    first, second = setting.perform(lake, [f"{name} 1", f"{name} 2"], python)
    say(f"peer {name}: {first.total_s:.2f} s ({first.received_bytes / 1e6:.0f} MB), then {second.total_s:.2f} s")
    return {
        "first": [first.total_s, first.requests, first.received_bytes],
        "second": [second.total_s, second.requests, second.received_bytes],
    }


def _httpfs(setting: Setting) -> dict[str, Json]:
    """DuckDB's own S3 client (each query has a fresh DuckDB here too); 2.0 has none that pip could install."""
    site = Path(ROOT / ".venv-duckdb15")
    found = sorted(site.glob("lib/python*/site-packages/duckdb_extension_httpfs/extensions/*/*.duckdb_extension"))
    if not OLD_DUCKDB.exists() or not found:
        return {"skipped": "no .venv-duckdb15 with duckdb 1.5.5 and duckdb-extension-httpfs: make readers"}
    parts = urlsplit(setting.store.url)
    setup = [
        f"load '{found[0]}'",
        f"set s3_endpoint = '{parts.netloc}'",
        "set s3_use_ssl = false",
        "set s3_url_style = 'path'",
        "set s3_region = 'us-east-1'",
        f"set s3_access_key_id = '{setting.store.key}'",
        f"set s3_secret_access_key = '{setting.store.secret}'",
    ]
    try:
        return _twice(setting, "httpfs", workload.Lake(f"s3://{setting.prefix}", setup=setup), str(OLD_DUCKDB))
    except UnavailableError as error:
        say(f"peer httpfs: {error}")
        return {"skipped": str(error)}


def _program(setting: Setting, name: str) -> dict[str, Json]:
    """Runs Q6 twice with a library's own S3 reader, in a process of its own (this module as a program)."""
    request = {
        "library": name,
        "endpoint": setting.store.url,
        "key": setting.store.key,
        "secret": setting.store.secret,
        "counters": setting.store.counters,
        "path": f"{setting.prefix}/lineitem.parquet",
    }
    done = subprocess.run(
        [sys.executable, "-m", "bench.lake_peers", json.dumps(request)],
        check=False, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        say(f"peer {name}: {last}")
        return {"skipped": last}
    made: dict[str, Json] = json.loads(done.stdout)
    say(f"peer {name}: {made}")
    return made


def _pyarrow_q6(request: dict[str, str]) -> Decimal:
    import datetime

    import pyarrow.compute as pc
    import pyarrow.dataset as ds
    import pyarrow.fs

    parts = urlsplit(request["endpoint"])
    s3 = pyarrow.fs.S3FileSystem(
        access_key=request["key"], secret_key=request["secret"], region="us-east-1",
        endpoint_override=parts.netloc, scheme=parts.scheme,
    )  # fmt: skip
    table = ds.dataset(request["path"], filesystem=s3, format="parquet")
    date, discount, quantity = pc.field("l_shipdate"), pc.field("l_discount"), pc.field("l_quantity")
    wanted = (
        (date >= datetime.date(1994, 1, 1))
        & (date < datetime.date(1995, 1, 1))
        & (discount >= Decimal("0.05"))
        & (discount <= Decimal("0.07"))
        & (quantity < Decimal(24))
    )
    found = table.to_table(columns=["l_extendedprice", "l_discount"], filter=wanted)
    total: Decimal = pc.sum(pc.multiply(found["l_extendedprice"], found["l_discount"])).as_py()
    return total


def _polars_q6(request: dict[str, str]) -> Decimal:
    import datetime

    import polars as pl

    options = {
        "aws_endpoint_url": request["endpoint"], "aws_access_key_id": request["key"], "aws_region": "us-east-1",
        "aws_secret_access_key": request["secret"], "aws_allow_http": "true",
    }  # fmt: skip
    rows = pl.scan_parquet(f"s3://{request['path']}", storage_options=options)
    found = rows.filter(
        pl.col("l_shipdate") >= datetime.date(1994, 1, 1),
        pl.col("l_shipdate") < datetime.date(1995, 1, 1),
        pl.col("l_discount").is_between(Decimal("0.05"), Decimal("0.07")),
        pl.col("l_quantity") < Decimal(24),
    )
    cents = (pl.col("l_extendedprice") * 100).cast(pl.Int64) * (pl.col("l_discount") * 100).cast(pl.Int64)
    total = found.select(cents.sum()).collect().item()
    return Decimal(total) / 10_000


def main() -> None:
    """Q6 twice with one library: [seconds, requests, bytes] of both runs, and the sum, as JSON."""
    request: dict[str, Any] = json.loads(sys.argv[1])
    program = {"pyarrow": _pyarrow_q6, "polars": _polars_q6}[request["library"]]
    counters = Counters(request["counters"], None)
    made: dict[str, Json] = {}
    for name in ("first", "second"):
        before = counters.read()
        start = time.perf_counter()
        total = program(request)
        seconds = time.perf_counter() - start
        after = counters.read()
        made[name] = [seconds, after[0] - before[0], after[1] - before[1]]
        made["revenue"] = str(total)
    print(json.dumps(made))


if __name__ == "__main__":
    main()
