"""What the demo and the lake benchmark run: queries in DuckDB over Parquet behind some filesystem, timed and hashed.

Every query gets a DuckDB instance of its own, as a job would, with DuckDB's own defaults: what DuckDB keeps in memory
between the queries of one session (its external file cache) therefore helps no side, and helps every side alike
within a query.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tiercache.errors import ConfigError
from tiercache.testing.demo import tpch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

BEST_S3FS = "s3fs at its best: exact ranges (one GET a read, no cache of its own), the folder listed once before"
"""Its default (50 MiB read-ahead) transfers 44 to 174 times what is read, read-ahead of 1 MiB three times. With the
folder listed once (`primed`), its listing cache answers every later question for sizes, and never asks again.
`cache_type="none"` sends the same requests, but DuckDB 2 gets wrong bytes from it now and then (see peer)."""


@dataclass(frozen=True, slots=True)
class Lake:
    """Where tables lie and how to reach them.

    `prefix` is what stands before `/NAME.parquet` in SQL. `protocol` names an fsspec filesystem made with `options`;
    None leaves `prefix` to DuckDB itself (local files, or httpfs with `setup` statements). `primed` lists the folder
    once before the first query. A prefix of peer:// puts peer.Peer around the filesystem, `stateless` or not.
    """

    prefix: str
    protocol: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    setup: Sequence[str] = ()
    primed: bool = False
    stateless: bool = False


def direct(protocol: str, path: str, options: Mapping[str, Any]) -> Lake:
    """What everything is compared with: the origin's own fsspec filesystem, at its best (for s3: BEST_S3FS)."""
    return Lake(f"peer://{path}", protocol, options, primed=True, stateless=True)


@dataclass(frozen=True, slots=True)
class Ran:
    """One query's run: its seconds, and its rows as canonical sorted lines (tpch.rows_text)."""

    name: str
    seconds: float
    lines: list[str]


def open_filesystem(lake: Lake) -> Any | None:
    """The lake's fsspec filesystem, primed when it says so; None when DuckDB reads by itself."""
    if lake.protocol is None:
        return None
    import fsspec

    from tiercache.testing.demo import peer

    fs = fsspec.filesystem(lake.protocol, skip_instance_cache=True, **lake.options)
    if hasattr(fs, "mount"):
        fs.mount  # noqa: B018  # opens the directory now, as s3fs below opens its session, and not on the first query's time
    if lake.primed:
        fs.ls(lake.prefix.removeprefix(peer.MARK), detail=True)
    return peer.Peer(fs, stateless=lake.stateless) if lake.prefix.startswith(peer.MARK) else fs


def over(query: tpch.Query, prefix: str) -> str:
    """The query's SQL with each table that it names bound to `prefix`/NAME.parquet."""
    if "{prefix}" in query.sql:
        return query.sql.replace("{prefix}", prefix)
    used = [name for name in tpch.TABLES if re.search(rf"\b{name}\b", query.sql)]
    bound = ", ".join(f"{name} as not materialized (from read_parquet('{prefix}/{name}.parquet'))" for name in used)
    rest = query.sql.removeprefix("with ")
    return f"with {bound}{' ' if rest is query.sql else ', '}{rest}"


def run(query: tpch.Query, lake: Lake, fs: Any | None) -> Ran:
    """Runs one query in a fresh DuckDB; the clock covers planning, reading and fetching all rows."""
    import duckdb

    with duckdb.connect() as connection:
        if fs is not None:
            connection.register_filesystem(fs)
        for statement in lake.setup:
            connection.execute(statement)
        sql = over(query, lake.prefix)
        start = time.perf_counter()
        rows = connection.execute(sql).fetchall()
        seconds = time.perf_counter() - start
    return Ran(query.name, seconds, tpch.rows_text(rows))


def file_queries(lake: Lake, fs: Any, files_max: int) -> list[tpch.Query]:
    """For Parquet that is not TPC-H: one query a file that reads all of it, named by its path under the prefix.

    Each counts the rows and folds a hash of every column with XOR, which is exact and needs no order. At most
    `files_max` files, the first by name; ConfigError when there is none.
    """
    import duckdb

    found = sorted(path for path in fs.find(lake.prefix) if path.endswith((".parquet", ".parq")))[:files_max]
    if not found:
        raise ConfigError(f"no Parquet file under {lake.prefix}: the demo reads *.parquet")
    protocol, _, root = lake.prefix.partition("://")
    made = []
    with duckdb.connect() as connection:
        connection.register_filesystem(fs)
        for path in found:
            inside = path.removeprefix(protocol + "://").removeprefix(root).strip("/")
            source = _quoted(f"{lake.prefix}/{inside}" if inside else lake.prefix)
            columns = connection.execute(f"describe from read_parquet({source})").fetchall()
            folds = ", ".join(f'bit_xor(hash("{str(row[0]).replace(chr(34), chr(34) * 2)}"))' for row in columns)
            text = source.replace(lake.prefix, "{prefix}")
            made.append(tpch.Query(inside or path, "count and hash of every column", _fold(folds, text)))
    return made


def _fold(folds: str, source: str) -> str:
    return f"select count(*), {folds} from read_parquet({source})"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
