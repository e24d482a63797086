"""Real readers over one bucket: what each reads through the cache is what it reads without."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import duckdb
import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

from tests.connectors.conftest import MIB, SMALL
from tiercache_connectors.fsspec_file import CachedFile
from tiercache_connectors.fsspec_fs import TierCacheFileSystem

pytestmark = pytest.mark.slow

SUMS = "select sum(l_quantity), sum(l_extendedprice), max(l_comment), count(distinct l_shipdate), count(*) from {}"
JOIN = """
    select o_orderpriority, count(*), sum(l_extendedprice * (1 - l_discount))
    from {lineitem} join {orders} on l_orderkey = o_orderkey
    where l_shipdate > date '1995-01-01' group by 1 order by 1
"""


@pytest.fixture(scope="module")
def options(s3, tmp_path_factory):
    """storage_options of a filesystem that all tests of this module share."""
    directory = str(tmp_path_factory.mktemp("readers"))
    return {"target_protocol": "s3", "target_options": s3.options, "directory": directory} | SMALL


@pytest.fixture(scope="module")
def fs(options, lake):
    made = fsspec.filesystem("tiercache", **options)
    yield made
    made.close()
    TierCacheFileSystem.clear_instance_cache()


def table(lake, name, columns=None):
    """The rows of a table, read from disk."""
    return ds.dataset(lake / name, format="parquet").to_table(columns=columns)


# -- DuckDB ------------------------------------------------------------------------------------------------------------


def connected(filesystem, threads=8):
    connection = duckdb.connect(config={"threads": threads})
    connection.register_filesystem(filesystem)
    return connection


def test_duckdb(fs, lake):
    with connected(fs) as connection, duckdb.connect() as plain:
        for query in (SUMS.format("'{}/lineitem/*.parquet'"), JOIN):
            places = {name: "'{}/" + name + "/*.parquet'" for name in ("lineitem", "orders")}
            text = query.format(**places) if "{lineitem}" in query else query
            want = plain.sql(text.replace("{}", str(lake))).fetchall()
            for _ in range(3):
                assert connection.sql(text.replace("{}", "tiercache://lake")).fetchall() == want
        count = connection.sql("select count(*) from 'tiercache://lake/lineitem/lineitem.1.parquet'").fetchall()
        assert count == plain.sql(f"select count(*) from '{lake}/lineitem/lineitem.1.parquet'").fetchall()


def test_duckdb_writes_through(fs, lake):
    with connected(fs) as connection:
        connection.sql("copy (select range as a from range(1000)) to 'tiercache://lake/out/a.parquet' (format parquet)")
        assert connection.sql("select sum(a) from 'tiercache://lake/out/a.parquet'").fetchall() == [(499_500,)]
        connection.sql("copy (select 7 as a) to 'tiercache://lake/out/a.parquet' (format parquet)")
        assert connection.sql("select sum(a) from 'tiercache://lake/out/a.parquet'").fetchall() == [(7,)]
    fs.rm("lake/out", recursive=True)


def meddling(kind):
    """Files between whose seek and read another thread always seeks elsewhere on the same handle."""

    class Meddled(kind):
        def seek(self, offset, whence=0, /):
            place = super().seek(offset, whence)
            meddler = threading.Thread(target=super().seek, args=((offset * 31 + 4) % max(1, self.size),))
            meddler.start()
            meddler.join()
            return place

    return Meddled


def test_duckdb_threads_that_share_a_handle(fs, lake, monkeypatch):
    with duckdb.connect() as plain:
        want = plain.sql(SUMS.format(f"'{lake}/lineitem/*.parquet'")).fetchall()
    monkeypatch.setattr("tiercache_connectors.fsspec_fs.CachedFile", meddling(CachedFile))
    for threads in (2, 8):
        with connected(fs, threads) as connection:
            for _ in range(3):
                assert connection.sql(SUMS.format("'tiercache://lake/lineitem/*.parquet'")).fetchall() == want


def test_the_meddling_would_break_a_file_with_one_position(lake):
    """The proof that the test above tests something: the same against fsspec's own files."""

    class OnePosition(LocalFileSystem):
        protocol = "oneposition"
        cachable = False

        def _open(self, path, mode="rb", **kwargs):
            file = super()._open(path, mode, **kwargs)

            class Delegate:
                size = file.size

                def seek(self, offset, whence=0, /):
                    return file.seek(offset, whence)

                def read(self, size=-1):
                    return file.read(size)

                tell, close, closed = file.tell, file.close, False

            return meddling(Delegate)()

    with connected(OnePosition(), 2) as connection, pytest.raises((duckdb.Error, OSError)):
        connection.sql(SUMS.format(f"'oneposition://{lake}/lineitem/*.parquet'")).fetchall()


OTHER = Path(__file__).parents[2] / ".venv-duckdb15" / "bin" / "python"


@pytest.mark.skipif(not OTHER.exists(), reason="no second environment with DuckDB 1.5: make readers")
def test_duckdb_of_the_older_line(lake, tmp_path):
    program = f"""
import duckdb, fsspec
from tiercache_connectors.fsspec_fs import TierCacheFileSystem
assert duckdb.__version__.startswith("1.")
fs = TierCacheFileSystem(target_protocol="file", directory={str(tmp_path)!r}, memory_bytes={64 * MIB}, ssd_bytes=0)
connection = duckdb.connect(config={{"threads": 8}})
connection.register_filesystem(fs)
query = {SUMS!r}
for _ in range(2):
    got = connection.sql(query.format("'tiercache://{lake}/lineitem/*.parquet'")).fetchall()
    assert got == duckdb.sql(query.format("'{lake}/lineitem/*.parquet'")).fetchall(), got
fs.close()
print("agreed")
"""
    roots = [
        str(Path(path).parents[1])
        for path in (sys.modules["tiercache"].__file__, __import__("tiercache_connectors").__file__)
    ]
    done = subprocess.run(
        [str(OTHER), "-c", program],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={"PYTHONPATH": ":".join(roots), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )
    assert done.stdout.strip() == "agreed", done.stderr


# -- data frames -------------------------------------------------------------------------------------------------------


def test_pandas(options, fs, lake):
    got = pd.read_parquet(
        "tiercache://lake/lineitem/lineitem.1.parquet", columns=["l_quantity"], storage_options=options
    )
    assert got.equals(pd.read_parquet(lake / "lineitem" / "lineitem.1.parquet", columns=["l_quantity"]))
    frame = pd.DataFrame({"a": range(5000), "b": ["text"] * 5000})
    frame.to_csv("tiercache://lake/frames/a.csv", index=False, storage_options=options)
    assert pd.read_csv("tiercache://lake/frames/a.csv", storage_options=options).equals(frame)
    frame.to_parquet("tiercache://lake/frames/a.parquet", storage_options=options)
    assert pd.read_parquet("tiercache://lake/frames/a.parquet", storage_options=options).equals(frame)
    fs.rm("lake/frames", recursive=True)


def test_pyarrow(fs, lake):
    got = ds.dataset("lake/lineitem", filesystem=fs, format="parquet")
    assert got.to_table().equals(table(lake, "lineitem"))
    late = ds.field("l_linenumber") > 5
    assert got.to_table(["l_partkey"], filter=late).equals(
        ds.dataset(lake / "lineitem").to_table(["l_partkey"], filter=late)
    )
    one = pq.read_table("lake/orders/orders.1.parquet", filesystem=fs, columns=["o_comment"])
    assert one.equals(pq.read_table(lake / "orders" / "orders.1.parquet", columns=["o_comment"]))


def test_polars(fs, lake):
    import polars as pl

    lazy = pl.scan_pyarrow_dataset(ds.dataset("lake/lineitem", filesystem=fs, format="parquet"))
    got = lazy.filter(pl.col("l_quantity") > 25).select("l_orderkey", "l_extendedprice").collect()
    want = pl.from_arrow(table(lake, "lineitem")).filter(pl.col("l_quantity") > 25)
    assert got.equals(want.select("l_orderkey", "l_extendedprice"))


def test_fsspec_parquet(fs, lake):
    from fsspec.parquet import open_parquet_file

    with open_parquet_file("lake/orders/orders.1.parquet", fs=fs, columns=["o_orderkey"], engine="pyarrow") as f:
        got = pd.read_parquet(f, columns=["o_orderkey"])
    assert got.equals(pd.read_parquet(lake / "orders" / "orders.1.parquet", columns=["o_orderkey"]))


@pytest.mark.filterwarnings("ignore")  # of dask about pandas
def test_dask(options, fs, lake):
    import dask.dataframe as dd

    frame = dd.read_parquet("tiercache://lake/orders/*.parquet", columns=["o_totalprice"], storage_options=options)
    want = table(lake, "orders", ["o_totalprice"]).to_pandas()
    got = frame["o_totalprice"].compute(scheduler="threads")
    assert got.tolist() == want["o_totalprice"].tolist()


def test_zarr(options, fs):
    import zarr
    from zarr.storage import FsspecStore

    values = np.arange(256 * 256, dtype=np.float64).reshape(256, 256)
    store = FsspecStore.from_url("tiercache://lake/grid.zarr", storage_options=options)
    zarr.create_array(store, data=values, chunks=(64, 64), overwrite=True)
    again = FsspecStore.from_url("tiercache://lake/grid.zarr", storage_options=options, read_only=True)
    assert np.array_equal(zarr.open_array(again, mode="r")[:], values)
    assert np.array_equal(zarr.open_array(again, mode="r")[10:70, 100:130], values[10:70, 100:130])
    fs.rm("lake/grid.zarr", recursive=True)


def test_datasets(options, fs, lake, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    got = datasets.load_dataset(
        "parquet",
        data_files={"train": ["tiercache://lake/orders/orders.1.parquet"]},
        storage_options=options,
        streaming=True,
    )["train"]
    want = pq.read_table(lake / "orders" / "orders.1.parquet", columns=["o_orderkey"])["o_orderkey"].to_pylist()
    assert [row["o_orderkey"] for row in got] == want


def test_deltalake(fs, lake):
    import deltalake
    from fsspec.implementations.dirfs import DirFileSystem
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    rows = table(lake, "orders")
    deltalake.write_deltalake(str(lake / "delta"), rows)
    delta = deltalake.DeltaTable(str(lake / "delta"))
    through = PyFileSystem(FSSpecHandler(DirFileSystem("lake/delta", fs)))
    got = delta.to_pyarrow_dataset(filesystem=through).to_table()
    assert got.num_rows == rows.num_rows
    assert sorted(got["o_comment"].to_pylist()) == sorted(rows["o_comment"].to_pylist())


# -- counts ------------------------------------------------------------------------------------------------------------


def test_one_column_costs_no_more_than_exact_ranges(cached, s3, lake):
    """Against s3fs at its best setting (no read-ahead of its own, exact ranges): requests and bytes."""
    rows = pa.table({name: np.random.default_rng(ord(name)).random(6 * 25_000) for name in "abcdef"})
    pq.write_table(rows, lake / "wide.parquet", row_group_size=25_000, compression="none", use_dictionary=False)

    def cost(filesystem, columns, **kwargs):
        s3.server.stats.clear()
        with filesystem.open("lake/wide.parquet", **kwargs) as f:
            pq.ParquetFile(f, pre_buffer=True).read(columns)
        return s3.server.stats.requests, s3.server.stats.bytes_sent

    ours = cached("s3", s3.options, tail_bytes=64 << 10)
    for columns in (["a"], ["c", "d"]):
        direct = cost(s3.direct(), columns, cache_type="none")
        cold = cost(ours, columns)
        assert cold[0] <= direct[0], (cold, direct)
        assert cold[1] <= 1.25 * direct[1], (cold, direct)
        assert cost(ours, columns) == (0, 0)
