"""TPC-H: tables made by tpchgen-cli, the 22 queries, and rows in a form that two runs can be compared in.

Source of data and queries: TPC Benchmark H, Standard Specification revision 3.0.1 (clauses 1.4, 2.4 and 4.2).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import resources, util
from pathlib import Path
from typing import TYPE_CHECKING

from tiercache.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

TABLES = ("customer", "lineitem", "nation", "orders", "part", "partsupp", "region", "supplier")
"""The eight tables of clause 1.4."""

_START = re.compile(r"^-- (Q\d+) (.*)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Query:
    """One query: a short name, what it asks in a few words, and its SQL over tables known by their names."""

    name: str
    title: str
    sql: str


def queries(scale: float) -> list[Query]:
    """The 22 queries with the parameters of the specification's validation, for a database of this scale factor."""
    text = resources.files(__package__).joinpath("tpch.sql").read_text(encoding="utf-8")
    text = text.replace("{fraction}", f"{0.0001 / scale:.12f}")
    pieces = _START.split(text)[1:]
    return [
        Query(name, title.strip(), sql.strip().rstrip(";"))
        for name, title, sql in zip(pieces[::3], pieces[1::3], pieces[2::3], strict=True)
    ]


def generator() -> str:
    """Path of tpchgen-cli; UnavailableError with the install command when it is not there."""
    beside = Path(sys.executable).with_name("tpchgen-cli")
    found = str(beside) if beside.exists() else shutil.which("tpchgen-cli")
    if found is None:
        raise UnavailableError("tpchgen-cli makes the demo's tables and is not installed: pip install tpchgen-cli")
    return found


def make_tables(scale: float, cache: Path, said: Callable[[str], None] = lambda _: None) -> Path:
    """Folder with the eight tables as Parquet, made once under `cache` and kept; tables are `NAME.parquet`.

    A folder appears under its final name only when it is complete, so that an interrupted run is made again.
    """
    folder = cache / f"tpch-sf{scale:g}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        said(f"making TPC-H tables, scale factor {scale:g}, in {folder} (once)")
        half = cache / f".tpch-sf{scale:g}.{os.getpid()}"
        shutil.rmtree(half, ignore_errors=True)
        done = subprocess.run(
            [generator(), "parquet", "-s", f"{scale:g}", "--output-dir", str(half)],
            check=False,
            capture_output=True,
            text=True,
        )
        missing = [name for name in TABLES if not (half / f"{name}.parquet").exists()]
        if done.returncode or missing:
            shutil.rmtree(half, ignore_errors=True)
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UnavailableError(f"tpchgen-cli failed with status {done.returncode}: {last}")
        half.rename(folder)
    return folder


def have_duckdb() -> bool:
    """Whether DuckDB, which runs the queries, is installed."""
    return util.find_spec("duckdb") is not None


def rows_text(rows: Iterable[tuple[object, ...]]) -> list[str]:
    """One canonical line for each row, sorted: integers, decimals, dates and strings as written, doubles in hex.

    Equality of the lists is exact equality of the results as multisets; nothing is rounded, because every side runs
    the same engine over the same bytes. (TPC-H sums decimals, which are exact, and DuckDB divides them last.)
    """
    return sorted(json.dumps([_value_text(value) for value in row], ensure_ascii=False) for row in rows)


def _value_text(value: object) -> str:
    return value.hex() if isinstance(value, float) else f"{type(value).__name__}:{value}"


def digest(lines: Iterable[str]) -> str:
    """SHA-256 of a result's canonical lines, in hex."""
    running = hashlib.sha256()
    for line in lines:
        running.update(line.encode())
        running.update(b"\n")
    return running.hexdigest()
