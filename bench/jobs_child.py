"""A job of bench.jobs: reads tables of a bucket through the cache, in one process or in several.

`python -m bench.jobs_child JOB` takes its terms as JSON on stdin and answers with results, and the processes that made
them, as JSON on stdout. It runs in two environments, so it imports what a job needs where the job begins.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

GROUPED = {
    "lineitem": (["l_returnflag", "l_linestatus"], ["l_partkey", "l_suppkey", "l_linenumber"]),
    "orders": (["o_orderpriority"], ["o_orderkey", "o_custkey"]),
}
"""Tables that dask groups: by which columns, and of which sums are made; whole numbers, so that any order is exact."""
BLOCK_BYTES = 1_000_000
"""How much of a file one item of a byte dataset is: pages of the cache begin and end elsewhere."""
PATIENCE_S = 240.0


class Digester:
    """A file to write to that keeps a digest alone."""

    closed = False

    def __init__(self) -> None:
        self._running = hashlib.sha256()

    def write(self, data: Any) -> int:
        self._running.update(data)
        return len(data)

    def flush(self) -> None:
        pass

    def digest(self) -> str:
        return self._running.hexdigest()


def row_group(file: Any, at: int) -> str:
    """Digest of one row group's rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = Digester()
    rows = pq.ParquetFile(file, pre_buffer=True).read_row_group(at)
    with pa.ipc.new_stream(sink, rows.schema) as stream:
        stream.write_table(rows)
    return sink.digest()


def block(file: Any, at: int) -> str:
    """Digest of one block of a file."""
    file.seek(at * BLOCK_BYTES)
    return hashlib.sha256(file.read(BLOCK_BYTES)).hexdigest()


READ = {"row groups": row_group, "bytes": block}


class Units:
    """A map-style dataset: item i is (i, digest, process) of one row group or block. Its filesystem and its handles
    have been used by the process that made it, before any other process gets them."""

    def __init__(self, fs: Any, paths: Sequence[str], kind: str) -> None:
        import pyarrow.parquet as pq

        self.fs, self.kind = fs, kind
        self.handles = {path: fs.open(path) for path in paths}
        self.units: list[tuple[str, int]] = []
        for path, handle in self.handles.items():
            count = pq.ParquetFile(handle).num_row_groups if kind == "row groups" else -(-handle.size // BLOCK_BYTES)
            self.units += [(path, at) for at in range(count)]

    def __len__(self) -> int:
        return len(self.units)

    def __getitem__(self, at: int) -> tuple[int, str, int]:
        path, inner = self.units[at]
        # In turn: a handle that was opened before this process began, and one that is opened in it.
        file = self.handles[path] if at % 2 else self.fs.open(path)
        return at, READ[self.kind](file, inner), os.getpid()


def gathered(units: Units, items: Sequence[tuple[int, str, int]]) -> tuple[Any, list[int]]:
    """Results by name, and who made them."""
    names = [f"{path.rpartition('/')[2]} {at}" for path, at in units.units]
    return {names[at]: digest for at, digest, _ in items}, sorted({pid for _, _, pid in items})


def dataset(terms: dict[str, Any]) -> Units:
    """What a loader's processes read."""
    import fsspec

    fs = fsspec.filesystem(terms["protocol"], **terms["options"])
    return Units(fs, [path for path in fs.find(terms["folder"]) if path.endswith(".parquet")], terms["kind"])


def alone(terms: dict[str, Any]) -> tuple[Any, list[int]]:
    """One process, item by item."""
    units = dataset(terms)
    return gathered(units, [units[at] for at in range(len(units))])


def loader(terms: dict[str, Any], start: str) -> tuple[Any, list[int]]:
    """A DataLoader of several processes, shuffled, over two epochs."""
    import torch
    from torch.utils.data import DataLoader

    units = dataset(terms)
    order = torch.Generator()
    order.manual_seed(7)
    batches = DataLoader(
        units,  # type: ignore[arg-type]  # map-style: anything with a length and items
        batch_size=2,
        shuffle=True,
        generator=order,
        num_workers=terms["processes"],
        collate_fn=list,
        multiprocessing_context=start,
        timeout=PATIENCE_S,
        persistent_workers=start != "fork",  # to import torch again takes seconds
    )
    items = [[item for batch in batches for item in batch] for _ in range(2)]
    first, second = ({at: digest for at, digest, _ in epoch} for epoch in items)
    assert first == second, "two epochs got different bytes"
    return gathered(units, [*items[0], *items[1]])


def grouped(terms: dict[str, Any]) -> Any:
    """Group-by sums over two tables as dask computes them, with whichever scheduler is the default one here."""
    import dask.dataframe as dd

    found = {}
    for table, (keys, values) in GROUPED.items():
        frame = dd.read_parquet(
            f"{terms['protocol']}://{terms['folder']}/{table}.parquet",
            columns=keys + values,
            storage_options=terms["options"] or None,
            split_row_groups=True,
        )
        sums = frame.groupby(keys)[values].sum().compute()
        rows = sums.reset_index().astype(str).to_numpy().tolist()
        found[table] = sorted(rows)
    return found


def first_rows(terms: dict[str, Any]) -> tuple[str, int]:
    """What every worker reads by itself, all of them at once: the first rows of a table; and which process it is."""
    import fsspec

    fs = fsspec.filesystem(terms["protocol"], **terms["options"])
    with fs.open(f"{terms['folder']}/lineitem.parquet") as file:
        return row_group(file, 0), os.getpid()


NO_FUSION = {"dataframe.parquet.minimum-partition-size": 1}
"""A task for each row group, however few columns are read of it."""


def dask_alone(terms: dict[str, Any]) -> tuple[Any, list[int]]:
    """dask in one process and one thread."""
    import dask

    digest, pid = first_rows(terms)
    with dask.config.set({"scheduler": "synchronous", **NO_FUSION}):
        return grouped(terms) | {"first rows": digest}, [pid]


def dask_cluster(terms: dict[str, Any]) -> tuple[Any, list[int]]:
    """dask's own processes: a scheduler here and workers beside it."""
    import dask
    from distributed import Client, LocalCluster

    cluster = LocalCluster(
        n_workers=terms["processes"],
        threads_per_worker=1,
        processes=True,
        dashboard_address=None,
        memory_limit=0,
        local_directory=terms["scratch"],
    )
    with cluster, Client(cluster, timeout=PATIENCE_S) as client, dask.config.set(NO_FUSION):
        client.wait_for_workers(terms["processes"], timeout=PATIENCE_S)
        answers = client.run(first_rows, terms).values()
        (digest,) = {digest for digest, _ in answers}
        return grouped(terms) | {"first rows": digest}, sorted(pid for _, pid in answers)


JOBS: dict[str, Callable[[dict[str, Any]], tuple[Any, list[int]]]] = {
    "alone": alone,
    "fork": lambda terms: loader(terms, "fork"),
    "spawn": lambda terms: loader(terms, "spawn"),
    "dask-alone": dask_alone,
    "dask": dask_cluster,
}


def main() -> None:
    terms = json.load(sys.stdin)
    results, processes = JOBS[sys.argv[1]](terms)
    print(json.dumps({"results": results, "processes": processes}))


if __name__ == "__main__":
    main()
