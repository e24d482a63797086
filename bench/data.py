"""Real traces and tables: where they come from, how they are fetched and checked, and readers of each.

`make data` (python -m bench.data) fetches every file from its public repository at a fixed commit. Upstreams that are
many files, or in another shape, are put together here; a SHA-256 of the result, unpacked, says whether that worked.
A folder named by TIERCACHE_DATA is looked at first; there a file may also be packed (.gz, .xz, .zst). Nothing is ever
committed. A reader whose file is not there raises MissingData, whose text says which row cannot be measured.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import io
import json
import lzma
import os
import random
import shutil
import subprocess
import sys
import tarfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import pyarrow as pa

HERE = Path(__file__).resolve().parent
FOLDER = HERE.parent / ".cache" / "data"
"""Where fetched files are kept; git ignores it."""
BASE_URL = "https://raw.githubusercontent.com"
"""Files are at BASE_URL/owner/repository/commit/path. A mirror, or a file:// tree of the same shape, does as well."""
FILE_BYTES_MAX = 1 << 28
TIMEOUT_S = 60
ATTEMPTS = 3
CONNECTIONS = 8


class MissingData(Exception):
    """A trace or table set is not here. The text says which one, which rows it feeds, and how to get it."""


@dataclass(frozen=True)
class Source:
    """One file of ours: what feeds it, and the digest of its bytes when unpacked."""

    name: str
    rows: str
    """What is measured with it."""
    repository: str
    commit: str
    licence: str
    paths: tuple[str, ...]
    digest: str
    make: Callable[[Sequence[bytes]], bytes]
    """Our file from the files at `paths`, in that order."""


# ------------------------------------------------------------------------------------------- upstream to our file


def _joined(files: Sequence[bytes]) -> bytes:
    return b"".join(files)


def _unxz(files: Sequence[bytes]) -> bytes:
    return lzma.decompress(files[0])


def _unzstd(files: Sequence[bytes]) -> bytes:
    """zstd came to the standard library with Python 3.14; before, a package or the command does it."""
    try:
        import zstandard
    except ImportError:
        if shutil.which("zstd") is None:
            raise MissingData("zstd: `pip install zstandard`, or the Debian package zstd") from None
        return subprocess.run(["zstd", "-dc"], input=files[0], capture_output=True, check=True).stdout
    return zstandard.ZstdDecompressor().decompressobj().decompress(files[0])


def _agentic(files: Sequence[bytes]) -> bytes:
    """One line a request, sub-agents' requests in their place, block ids as [first, count] runs."""
    lines: list[str] = []
    for file in files:
        trace = json.loads(file)
        for request in trace["requests"]:
            if request["type"] == "subagent":
                inner, stream, start, facts = request["requests"], request["agent_id"], request["t"], request
            else:
                inner, stream, start, facts = [request], "main", 0, trace
            for each in inner:
                row = {"session": trace["id"], "stream": stream, "t": round(start + each["t"], 3)}
                row |= {name: each.get(name) for name in ("model", "in", "out", "api_time", "think_time")}
                row |= {name: facts[name] for name in ("tool_tokens", "system_tokens")}
                lines.append(json.dumps(row | {"runs": _runs(each["hash_ids"])}, separators=(",", ":")))
    return "\n".join(lines).encode() + b"\n"


def _runs(ids: Iterable[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for each in ids:
        if runs and each == sum(runs[-1]):
            runs[-1][1] += 1
        else:
            runs.append([each, 1])
    return runs


def _listed(name: str) -> list[str]:
    lines = (HERE / "sources" / name).read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


_MINISWE = """063925220f0d2954505eb37612b11ab3 07c6a78a27294b41a7c09a1907af143d 0d858f596973e20b4e8a66cc6d7efb8d
    189f0222310bd8eee310f204e91b9c84 2e9e99a583d052783791ec77ebb905a2 39f322b016f240b738243a425ddd8049
    5518cbf6b5c90e74800c7cdaf91da2f7 5a8530b10dedc4c0ab526343f4ddc7ff 5e964bd93f8c35ab4430fd68b91abf13
    6f1a88fc2fa796cf515b263d8f5f55c4 8f7920a28c54ae83dadb6d0a8e6cbd74 abe6103153a804525aa167d60cc30912
    ae5bc34ffaf6e553cc320e6499db0d47 af281d036d49269c17d2638bed5e5158 ba443702286bd3610b74b264aaf2b6a3
    c7d0fc25aec9ae6e509fb167782bbe54 c9a69aa29bb95747980705c2ac0012cc ce5308d303aa2043af2fdc79cf92ff71
    d80534b26b1c83c2c3bcf6be4ca2eb0e dc4b66869afd786bc4b341ef1119ca53"""
_CAFFEINE = "simulator/src/main/resources/com/github/benmanes/caffeine/cache/simulator/parser"

SOURCES: tuple[Source, ...] = (
    Source(
        "mooncake_conversation.jsonl", "hit ratios and bytes_per_entry on conversation", "kvcache-ai/Mooncake",
        "3b5a594133958449a1feaf1c9e0fc1b553e34a28", "Apache-2.0", ("FAST25-release/traces/conversation_trace.jsonl",),
        "b8cbb061a85206d729d91cdc2981f43c9e0d99209dce588d3af5f7934408b9df", _joined,
    ),
    Source(
        "agentic_coding_dev.jsonl", "hit ratios and bytes_per_entry on agentic coding", "callanjfox/kv-cache-tester",
        "94f6046dfd9c0c8bc0cdb24a5aa6579bac8669bf", "Apache-2.0",
        tuple(f"traces/trace_{number}.json" for line in _listed("agentic_sessions.txt") for number in line.split()),
        "8b324c0ee25dbc7a2123444f9d2e1253c353e595a2f21f293fec65c6be58f403", _agentic,
    ),
    Source(
        "lmcache_miniswe_text.jsonl", "hit ratios on miniswe", "LMCache/lmcache-agent-trace",
        "16a14adaad43e1a7213f17277726e0abb66ece11", "Apache-2.0",
        tuple(f"miniswe/{session}.jsonl" for session in _MINISWE.split()),
        "c0d564226852c3cfebd83ef5621eceba16b8a0fda059e106695f7f43ccf0f305", _joined,
    ),
    Source(
        "azure_llm_code_2023.csv", "arrival times", "Azure/AzurePublicDataset",
        "b469a113cedca53ddc3bdea71a143dc4b7d8700c", "CC-BY-4.0", ("data/AzureLLMInferenceTrace_code.csv",),
        "54e9a6d2a4bd06ba1e060304b900abbc74cbea53de96506e60fe5bb4f2277fb6", _joined,
    ),
    Source(
        "swim_fb2010_input_paths.tsv", "hit ratios on Hadoop input paths", "SWIMProjectUCB/SWIM",
        "1277c5168034c9e4a690a07cbb1d498619000da6", "BSD-3-Clause",
        ("workloadSuite/FB-2010_samples_24_times_1hr_withInputPaths_0.tsv",),
        "e228581ab7bf183404c5b724eeb77ceba2d5f34fefb6dbf56cbbf9cc751715e9", _joined,
    ),
    Source(
        "cloudphysics_w106.i32le", "hit ratios on a virtual disk", "ben-manes/caffeine",
        "ccef95542a9181182a60f5c6c33d2a0642c73574", "Apache-2.0", (f"{_CAFFEINE}/cloud_physics/w106.trace.xz",),
        "de302113703eb11098a4be9ab41ce9d9ab743e804a159660448c1c60d76e5c19", _unxz,
    ),
    Source(
        "arc_OLTP.lis", "hit ratios on ARC OLTP", "moka-rs/cache-trace", "ef0a9de8cf0202a1f2fee186a0af497774b0f0a9",
        "cite Megiddo and Modha, FAST 2003", ("arc/OLTP.lis.zst",),
        "01fc36ce7c40a4741e30bd1f999402295fbea829f00f3591ad6732feb078808f", _unzstd,
    ),
    Source(
        "arc_P3.lis", "hit ratios on ARC P3", "moka-rs/cache-trace", "ef0a9de8cf0202a1f2fee186a0af497774b0f0a9",
        "cite Megiddo and Modha, FAST 2003", ("arc/P3.lis.zst",),
        "bad2e26607cb7c070075a8d17d89081e6c82a3301fc9f6568464e0969898897f", _unzstd,
    ),
)  # fmt: skip
BY_NAME = {source.name: source for source in SOURCES}


# --------------------------------------------------------------------------------------------------- finding files


def folders() -> list[Path]:
    """Where files are looked for: TIERCACHE_DATA, then what `make data` fetched."""
    named = os.environ.get("TIERCACHE_DATA")
    return [*([Path(named)] if named else []), FOLDER]


_PACKED: dict[str, Callable[[Sequence[bytes]], bytes]] = {
    "": _joined, ".gz": lambda files: gzip.decompress(files[0]), ".xz": _unxz, ".zst": _unzstd,
}  # fmt: skip


def content(name: str) -> bytes:
    """Bytes of one of SOURCES, unpacked and checked; MissingData when it is nowhere or not what it should be."""
    source = BY_NAME[name]
    for folder in folders():
        for suffix, unpack in _PACKED.items():
            path = folder / (name + suffix)
            if path.is_file():
                data = unpack([path.read_bytes()])
                if hashlib.sha256(data).hexdigest() == source.digest:
                    return data
                print(f"{path}: not the expected content, left aside", file=sys.stderr)
    raise MissingData(
        f"{name} is missing ({source.rows}): run `make data`, or set TIERCACHE_DATA to a folder that holds it"
    )


def missing() -> list[str]:
    """One sentence for each source that is not here, for reports that leave those rows out."""
    found: list[str] = []
    for source in SOURCES:
        try:
            content(source.name)
        except MissingData as error:
            found.append(str(error))
    return found


# --------------------------------------------------------------------------------------------------- fetching files


def fetch_all(folder: Path = FOLDER, base_url: str = BASE_URL, sources: Sequence[Source] = SOURCES) -> list[str]:
    """Fetches what is not there yet; answers a sentence for each source that could not be had."""
    failures: list[str] = []
    for source in sources:
        try:
            content(source.name)
            print(f"{source.name}: here")
            continue
        except MissingData:
            pass
        print(f"{source.name}: fetching {len(source.paths)} file(s) of {source.repository}", flush=True)
        try:
            fetch(source, folder, base_url)
        except (OSError, ValueError, MissingData) as error:
            failures.append(f"{source.name} could not be had ({error}); missing then: {source.rows}")
    return failures


def fetch(source: Source, folder: Path, base_url: str = BASE_URL) -> Path:
    """One source, made, checked and written; ValueError when the digest differs."""
    urls = [f"{base_url}/{source.repository}/{source.commit}/{urllib.parse.quote(path)}" for path in source.paths]
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        data = source.make(list(pool.map(download, urls)))
    return _write(folder / source.name, data, source.digest)


def download(url: str) -> bytes:
    """The body behind a URL, bounded in size and time; OSError after the last attempt."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
                data: bytes = answer.read(FILE_BYTES_MAX + 1)
            break
        except urllib.error.HTTPError:
            raise  # the server's answer will not change
        except OSError:
            if attempt == ATTEMPTS:
                raise
    if len(data) > FILE_BYTES_MAX:
        raise ValueError(f"{url} is longer than {FILE_BYTES_MAX} bytes")
    return data


def _write(path: Path, data: bytes, digest: str) -> Path:
    found = hashlib.sha256(data).hexdigest()
    if found != digest:
        raise ValueError(f"SHA-256 is {found}, not {digest}")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    part.replace(path)
    return path


# --------------------------------------------------------------------------------------------------- tables

TABLES_TAR_DIGEST = "4dacedbeba30bb38ae631d9ad5a76f36d8e829bd4d0dd81fa42662bf81c4cf24"
"""Of tables_dev.tar, in which TIERCACHE_DATA may bring the same tables ready-made, with their ground truth."""


class Table(NamedTuple):
    """One line of sources/tables.tsv."""

    name: str
    repository: str
    commit: str
    path: str
    digest: str
    licence: str
    types: str


TABLES: tuple[Table, ...] = tuple(Table(*line.split("\t")) for line in _listed("tables.tsv"))


def tables() -> Path:
    """Folder with one Parquet file for each of TABLES (NAME.parquet); MissingData when some are not there."""
    target = FOLDER / "tables"
    packed = [folder / "tables_dev.tar" for folder in folders() if (folder / "tables_dev.tar").is_file()]
    if not all((target / f"{table.name}.parquet").is_file() for table in TABLES) and packed:
        if hashlib.sha256(packed[0].read_bytes()).hexdigest() != TABLES_TAR_DIGEST:
            raise MissingData(f"{packed[0]}: not the expected content")
        with tarfile.open(packed[0]) as archive:
            for member in archive.getmembers():
                name = Path(member.name)
                if member.isfile() and name.suffix in (".parquet", ".json"):
                    target.mkdir(parents=True, exist_ok=True)
                    (target / name.name).write_bytes(archive.extractfile(member).read())  # type: ignore[union-attr]
    if not all((target / f"{table.name}.parquet").is_file() for table in TABLES):
        raise MissingData("tables are missing (containment of tables): run `make data`, or set TIERCACHE_DATA")
    return target


def fetch_tables(folder: Path = FOLDER, base_url: str = BASE_URL, wanted: Sequence[Table] = TABLES) -> list[str]:
    """Fetches the tables that are not there and writes them as Parquet; answers a sentence for each failure."""
    import pyarrow.parquet as pq

    failures: list[str] = []

    def one(table: Table) -> None:
        path = folder / "tables" / f"{table.name}.parquet"
        if path.is_file():
            return
        try:
            url = f"{base_url}/{table.repository}/{table.commit}/{urllib.parse.quote(table.path)}"
            data = download(url)
            if hashlib.sha256(data).hexdigest() != table.digest:
                raise ValueError("another SHA-256 than expected")
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table_from_csv(data, table.types), path.with_suffix(".part"), compression="zstd")
            path.with_suffix(".part").replace(path)
        except (OSError, ValueError) as error:
            failures.append(f"table {table.name} of {table.repository} could not be had ({error})")

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        list(pool.map(one, wanted))
    return failures


def table_from_csv(data: bytes, types: str) -> pa.Table:
    """An Arrow table: cells stripped, empty ones null, a second column of one name gets `.1`."""
    import pyarrow as pa

    rows = [row for row in csv.reader(io.StringIO(data.decode("utf-8-sig"), newline="")) if row]
    names: list[str] = []
    for name in rows[0]:
        count = sum(each == name.strip() or each.startswith(name.strip() + ".") for each in names)
        names.append(f"{name.strip()}.{count}" if name.strip() in names else name.strip())
    kinds = {"s": pa.string(), "i": pa.int64(), "d": pa.float64()}
    columns = []
    for i, kind in enumerate(types):
        cells = [(row[i].strip() if i < len(row) else "") or None for row in rows[1:]]
        columns.append(pa.array(cells, pa.string()).cast(kinds[kind]))
    return pa.table(columns, names=names)


# --------------------------------------------------------------------------------------------------- readers


class Request(NamedTuple):
    """One request to a language model: when, whose, and the ids of its blocks, each standing for all before it too."""

    time_s: float
    session: int
    blocks: list[int]


def mooncake_conversation() -> list[Request]:
    """12,031 chat requests in blocks of 512 tokens; the trace names no sessions, so each request is its own."""
    rows = map(json.loads, content("mooncake_conversation.jsonl").splitlines())
    return [Request(row["timestamp"] / 1000, i, row["hash_ids"]) for i, row in enumerate(rows)]


def agentic_coding_dev(coarse: int = 8, *, horizon_s: float = 86400, seed: int = 1) -> list[Request]:
    """26,091 requests of 405 coding-agent sessions, merged by time.

    `coarse` native blocks of 64 tokens make one block (8: blocks of 512). Gaps inside a session are real; when
    sessions start is not in the data: uniform in [0, horizon_s) from `seed`. Ids are made global.
    """
    sessions: dict[str, list[tuple[float, list[int]]]] = {}
    for row in map(json.loads, content("agentic_coding_dev.jsonl").splitlines()):
        ids = [i for first, count in row["runs"] for i in range(first, first + count)]
        sessions.setdefault(row["session"], []).append((row["t"], ids[coarse - 1 :: coarse]))
    draw = random.Random(seed)
    events: list[tuple[float, int, int, list[int]]] = []
    for number, name in enumerate(sorted(sessions)):
        start = draw.random() * horizon_s
        events += [(start + t, number, k, ids) for k, (t, ids) in enumerate(sessions[name])]
    events.sort(key=lambda event: event[:3])
    known: dict[tuple[int, int], int] = {}
    return [
        Request(t, number, [known.setdefault((number, i), len(known)) for i in ids]) for t, number, _, ids in events
    ]


def miniswe(block_bytes: int = 256) -> list[Request]:
    """402 calls of software agents, the text cut in blocks; an id is a digest of the block and of all before it."""
    rows = [json.loads(line) for line in content("lmcache_miniswe_text.jsonl").splitlines()]
    numbers: dict[str, int] = {}
    requests: list[Request] = []
    for row in sorted(rows, key=lambda row: row["timestamp"]):
        prompt = row["input"] if isinstance(row["input"], str) else json.dumps(row["input"], ensure_ascii=False)
        text, before, ids = prompt.encode(), b"", []
        for i in range(0, len(text) - block_bytes + 1, block_bytes):
            before = hashlib.blake2b(before + text[i : i + block_bytes], digest_size=8).digest()
            ids.append(int.from_bytes(before, "little") >> 1)
        requests.append(Request(row["timestamp"] / 1e6, numbers.setdefault(row["session_id"], len(numbers)), ids))
    return requests


def cloudphysics() -> npt.NDArray[np.int64]:
    """5.3 million block numbers read from a virtual disk, in order."""
    return np.frombuffer(content("cloudphysics_w106.i32le"), "<i4").astype(np.int64)


def arc(name: str = "OLTP") -> npt.NDArray[np.int64]:
    """Block numbers of an ARC trace (OLTP or P3) in order; a line of the file is a first block and a count."""
    pairs = np.array([line.split()[:2] for line in content(f"arc_{name}.lis").splitlines() if line], dtype=np.int64)
    ends = np.cumsum(pairs[:, 1])
    blocks: npt.NDArray[np.int64] = np.arange(ends[-1]) + np.repeat(pairs[:, 0] - (ends - pairs[:, 1]), pairs[:, 1])
    return blocks


class Job(NamedTuple):
    """One Hadoop job: when it came, a number for the path it reads, and how many bytes."""

    time_s: int
    path: int
    input_bytes: int


def swim() -> list[Job]:
    """25,428 jobs of a day at Facebook in 2010."""
    numbers: dict[bytes, int] = {}
    fields = [line.split(b"\t") for line in content("swim_fb2010_input_paths.tsv").splitlines()]
    return [Job(int(row[1]), numbers.setdefault(row[6], len(numbers)), int(row[3])) for row in fields]


class Arrival(NamedTuple):
    """One request of which only time and lengths are known."""

    time_s: float
    input_tokens: int
    output_tokens: int


def azure_code() -> list[Arrival]:
    """Requests to a code model, seconds since the first."""
    rows = [line.split(",") for line in content("azure_llm_code_2023.csv").decode().splitlines()[1:] if line]
    times = np.array([row[0] for row in rows], dtype="datetime64[us]")
    since = (times - times[0]) / np.timedelta64(1, "s")
    return [Arrival(float(t), int(row[1]), int(row[2])) for t, row in zip(since, rows)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetches everything; the exit status is 1 when something is missing afterwards."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "--base-url", default=BASE_URL, help="where repositories are served from (default: %(default)s)"
    )
    parser.add_argument("--no-tables", action="store_true", help="leave the tables out")
    options = parser.parse_args(arguments)
    failures = fetch_all(base_url=options.base_url)
    if not options.no_tables:
        try:
            tables()
            print("tables: here")
        except MissingData:
            print(f"tables: fetching {len(TABLES)} files", flush=True)
            failures += fetch_tables(base_url=options.base_url)
    for failure in failures:
        print(failure, file=sys.stderr)
    print(f"{len(SOURCES)} traces and {len(TABLES)} tables wanted, {len(failures)} missing, in {FOLDER}")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
