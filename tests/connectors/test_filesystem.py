"""What fsspec's suite does not ask: facts, ranges, versions, pickling, forks, running loops, request counts."""

from __future__ import annotations

import asyncio
import io
import multiprocessing
import os
import pickle
import random
import threading
import time
from datetime import UTC, datetime

import fsspec
import pytest

from tests.connectors.conftest import MIB, SMALL
from tiercache.errors import ChangedError, ConfigError
from tiercache_connectors.fsspec_fs import TierCacheFileSystem

DATA = random.Random(3).randbytes(3 * MIB + 4321)


def old(path, data, age_s=3600.0):
    """A local file whose modification time has settled."""
    path.write_bytes(data)
    os.utime(path, (time.time() - age_s,) * 2)
    return str(path)


@pytest.fixture
def local(cached):
    return cached("file")


@pytest.fixture
def file(tmp_path):
    return old(tmp_path / "file.bin", DATA)


@pytest.fixture
def bucket(s3, s3_root):
    """The folder of the bucket, with one object; counters at zero."""
    (s3_root / "bucket" / "data.bin").write_bytes(DATA)
    s3.server.stats.clear()
    return s3_root / "bucket"


# -- facts -------------------------------------------------------------------------------------------------------------


def test_facts(local, file):
    info = local.info(file)
    assert (info["name"], info["size"], info["type"]) == (file, len(DATA), "file")
    assert local.size(file) == len(DATA)
    assert local.modified(file) == datetime.fromtimestamp(os.stat(file).st_mtime, UTC)
    assert isinstance(local.created(file), datetime)
    assert local.isfile(file)
    assert not local.isdir(file)
    assert local.isdir(os.path.dirname(file))
    assert not local.exists(file + "x")
    with pytest.raises(FileNotFoundError):
        local.info(file + "x")
    with pytest.raises(FileNotFoundError):
        local.open(file + "x")
    with pytest.raises(IsADirectoryError):
        local.open(os.path.dirname(file))


def test_keys_of_a_file_change_with_the_file_only(local, file, tmp_path):
    first = local.ukey(file), local.checksum(file)
    assert first == (local.ukey(file), local.checksum(file))
    assert local.ukey(old(tmp_path / "other.bin", DATA)) != first[0]
    old(tmp_path / "file.bin", DATA[::-1], age_s=1800)
    local.invalidate_cache()
    assert local.ukey(file) != first[0]
    assert local.checksum(file) != first[1]


def test_protocols_and_chains(s3, bucket, tmp_path):
    options = SMALL | {"directory": str(tmp_path)}
    with fsspec.open("tiercache::s3://bucket/data.bin", s3=s3.options, tiercache=options) as f:
        assert f.read(100) == DATA[:100]
        fs = f.fs
    with fsspec.open("tiercache://bucket/data.bin", target_protocol="s3", target_options=s3.options, **options) as f:
        assert f.read(100) == DATA[:100]
    same, path = fsspec.core.url_to_fs("tiercache::s3://bucket/data.bin", s3=s3.options, tiercache=options)
    assert same is fs
    assert path == "bucket/data.bin"
    assert fs.unstrip_protocol(path) == "tiercache://bucket/data.bin"
    assert fs.glob("tiercache://bucket/data.*") == ["bucket/data.bin"]
    assert fs.ls("s3://bucket", detail=False) == ["bucket/data.bin"]
    fs.close()


def test_wrong_settings_are_named(tmp_path):
    with pytest.raises(ConfigError, match="memroy_bytes"):
        TierCacheFileSystem("file", memroy_bytes=1, directory=str(tmp_path)).info("/")
    with pytest.raises(ValueError, match="target_protocol"):
        TierCacheFileSystem(directory=str(tmp_path))


def test_a_filesystem_instance_is_a_target_too(cached, file):
    fs = cached(fs=fsspec.filesystem("file"))
    assert fs.cat_file(file, 5, 10) == DATA[5:10]


# -- ranges ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "end"), [(None, None), (0, 10), (5, None), (None, 7), (-10, None), (-10, -3), (10, -10), (7, 7), (9, 3)]
)
def test_cat_file_counts_as_slices_do(local, file, start, end):
    assert local.cat_file(file, start, end) == DATA[start:end]
    assert local.cat_file(file, start, end) == DATA[start:end]
    assert local.cat_file(file, len(DATA) - 3, len(DATA) + 3) == DATA[-3:]


def test_cat_ranges(local, file, tmp_path):
    other = old(tmp_path / "other.bin", DATA[::-1])
    paths, starts, ends = [file, other, file, file], [0, -5, 2 * MIB, 10], [10, None, 2 * MIB + 7, 20]
    want = [DATA[0:10], DATA[::-1][-5:], DATA[2 * MIB : 2 * MIB + 7], DATA[10:20]]
    assert local.cat_ranges(paths, starts, ends) == want
    assert local.cat_ranges([file, file], 0, 5) == [DATA[:5]] * 2
    got = local.cat_ranges([file, file + "x"], 0, 5)
    assert got[0] == DATA[:5]
    assert isinstance(got[1], FileNotFoundError)
    with pytest.raises(FileNotFoundError):
        local.cat_ranges([file, file + "x"], 0, 5, on_error="raise")
    with pytest.raises(ValueError, match="length"):
        local.cat_ranges([file], [0, 1], [1, 2])


def test_cat_ranges_of_one_object_are_few_requests(cached, s3, bucket):
    fs = cached("s3", s3.options, tail_bytes=0)
    starts = list(range(0, 2 * MIB, 64 << 10))
    ends = [start + (60 << 10) for start in starts]
    assert fs.cat_ranges(["bucket/data.bin"] * len(starts), starts, ends) == [
        DATA[start:end] for start, end in zip(starts, ends, strict=True)
    ]
    assert s3.server.stats.by_method["GET"] == 1


# -- files -------------------------------------------------------------------------------------------------------------


def test_files_behave_as_files_do(local, file):
    with local.open(file, cache_type="none", block_size=1 << 16, anything=1) as ours, open(file, "rb") as plain:
        rng = random.Random(1)
        for _ in range(200):
            action = rng.choice(["read", "seek", "end", "current", "readinto", "tell", "readline"])
            n = rng.choice([0, 1, 100, 70_000, 2 * MIB])
            if action == "read":
                assert ours.read(n) == plain.read(n)
            elif action == "readinto":
                one, two = bytearray(n), bytearray(n)
                assert ours.readinto(one) == plain.readinto(two)
                assert one == two
            elif action == "readline":
                assert ours.readline(n or -1) == plain.readline(n or -1)
            elif action == "end":
                assert ours.seek(-min(n, len(DATA)), 2) == plain.seek(-min(n, len(DATA)), 2)
            elif action == "seek":
                assert ours.seek(n) == plain.seek(n)
            elif action == "current":
                assert ours.seek(n, 1) == plain.seek(n, 1)
            assert ours.tell() == plain.tell()
        assert ours.size == len(DATA)
        assert ours.readable()
        assert not ours.writable()
        assert ours.name == file
        with pytest.raises(ValueError, match="Seek before start"):
            ours.seek(-1)
    assert ours.closed
    with pytest.raises(ValueError, match="closed"):
        ours.read(1)


def test_lines_and_text(local, tmp_path):
    text = "".join(f"line {i} é\n" for i in range(50_000)) + "no end"
    path = old(tmp_path / "lines.txt", text.encode())
    with local.open(path, "rb") as f:
        lines = []
        for line in f:
            lines.append(line)
            if len(lines) in (1, 1000, 50_000):
                assert f.tell() == sum(map(len, lines))
        assert b"".join(lines) == text.encode()
        assert len(lines) == 50_001
        f.seek(5)
        assert f.readline() == text.encode()[5:].split(b"\n")[0] + b"\n"
        assert next(f) == b"line 1 \xc3\xa9\n"
        f.seek(0)
        assert f.readuntil(b"e 2") == b"line 0 \xc3\xa9\nline 1 \xc3\xa9\nline 2"
    with local.open(path, "r", encoding="utf-8") as f:
        assert f.read() == text
    with local.open(path, "rt", encoding="utf-8") as f:
        assert list(f)[-1] == "no end"
    assert local.read_text(path, encoding="utf-8") == text
    assert isinstance(local.open(path), io.RawIOBase)


def test_compressed_files(local, tmp_path):
    import gzip

    path = old(tmp_path / "a.gz", gzip.compress(b"hello " * 10_000))
    with local.open(path, compression="infer") as f:
        assert f.read() == b"hello " * 10_000
    with local.open(path, "rt", compression="gzip") as f:
        assert f.read(6) == "hello "


# -- versions ----------------------------------------------------------------------------------------------------------


def test_a_handle_reads_one_version_and_a_path_the_newest(cached, s3, bucket):
    fs = cached("s3", s3.options, tail_bytes=0)
    f = fs.open("bucket/data.bin")
    assert f.read(MIB) == DATA[:MIB]
    s3.direct().pipe_file("bucket/data.bin", DATA[::-1])
    f.seek(0)
    assert f.read(MIB) == DATA[:MIB]  # cached pages of the version that was opened
    with pytest.raises(ChangedError, match="open it again"):
        f.read(MIB)
    with fs.open("bucket/data.bin") as again:
        assert again.read() == DATA[::-1]
    s3.direct().pipe_file("bucket/data.bin", DATA)
    assert fs.cat_file("bucket/data.bin", 0, 10) in (DATA[:10], DATA[::-1][:10])  # within stat_ttl_s either is right
    fs.invalidate_cache("bucket/data.bin")
    assert fs.cat_file("bucket/data.bin") == DATA


def test_writes_and_deletes_through_us_show_at_once(cached, s3, bucket):
    fs = cached("s3", s3.options)
    assert fs.cat_file("bucket/data.bin", 0, 5) == DATA[:5]
    assert not fs.exists("bucket/new/a")
    fs.pipe_file("bucket/new/a", b"one")
    assert fs.cat_file("bucket/new/a") == b"one"
    assert fs.ls("bucket", detail=False) == ["bucket/data.bin", "bucket/new"]
    with fs.open("bucket/new/a", "wb") as f:
        f.write(b"second")
    assert fs.cat_file("bucket/new/a") == b"second"
    assert fs.size("bucket/new/a") == 6
    fs.cp_file("bucket/new/a", "bucket/new/b")
    fs.mv("bucket/new/b", "bucket/new/c")
    assert fs.ls("bucket/new", detail=False) == ["bucket/new/a", "bucket/new/c"]
    fs.rm("bucket/new", recursive=True)
    assert not fs.exists("bucket/new/a")
    assert not fs.exists("bucket/new")
    assert fs.ls("bucket", detail=False) == ["bucket/data.bin"]


def test_a_young_local_file_is_never_served_stale(local, tmp_path):
    path = tmp_path / "young"
    for value in (b"aaaa", b"bbbb", b"cccc"):
        path.write_bytes(value)
        os.utime(path, (1_000_000_000, time.time()))  # the same time to the resolution of a coarse clock
        local.invalidate_cache()
        assert local.cat_file(str(path)) == value


# -- loops and processes -----------------------------------------------------------------------------------------------


def test_inside_a_running_loop(local, file):
    async def main():
        assert local.cat_file(file, 0, 5) == DATA[:5]
        with local.open(file) as f:
            assert f.read(10) == DATA[:10]
        return await asyncio.gather(*[local._cat_file(file, i, i + 3) for i in range(50)])

    assert asyncio.run(main()) == [DATA[i : i + 3] for i in range(50)]


def test_asynchronous_instances(cached, s3, bucket):
    async def main():
        fs = cached("s3", s3.options, asynchronous=True)
        assert await fs._cat_file("bucket/data.bin", 0, 7) == DATA[:7]
        assert (await fs._info("bucket/data.bin"))["size"] == len(DATA)
        assert await fs._ls("bucket", detail=False) == ["bucket/data.bin"]
        await fs._pipe_file("bucket/x", b"y")
        assert await fs._exists("bucket/x")
        await fs._rm("bucket/x")
        assert not await fs._exists("bucket/x")
        assert [path async for path, _, _ in fs._walk("bucket")] == ["bucket"]
        async with await fs.open_async("bucket/data.bin") as f:
            assert await f.read(10) == DATA[:10]
            assert f.seek(-10, 2) == f.tell() == len(DATA) - 10
            assert await f.read() == DATA[-10:]
            assert await f.read(5) == b""
        with pytest.raises(ValueError, match="open_async reads"):
            await fs.open_async("bucket/x", "wb")

    asyncio.run(main())


def test_pickles(local, file):
    fs = pickle.loads(pickle.dumps(local))
    assert fs is local  # one process, one filesystem
    f = local.open(file)
    f.seek(17)
    again = pickle.loads(pickle.dumps(f))
    assert again.read(10) == DATA[17:27]
    assert pickle.loads(pickle.dumps(local.get_mapper("/tmp"))).fs is local
    assert TierCacheFileSystem.from_json(local.to_json()) == local


def child(fs, path, f, results):
    """What a worker does with a filesystem and an open file of its parent's."""
    results.put((fs.cat_file(path, 100, 110), fs.info(path)["size"], f.read(10)))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("kind", ["local", "s3"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_processes(cached, s3, bucket, file, method, kind):
    fs, path = (cached("file"), file) if kind == "local" else (cached("s3", s3.options), "bucket/data.bin")
    f = fs.open(path)
    assert f.read(MIB) == DATA[:MIB]
    f.seek(200)
    context = multiprocessing.get_context(method)
    results = context.Queue()
    worker = context.Process(target=child, args=(fs, path, f, results))
    worker.start()
    assert results.get(timeout=30) == (DATA[100:110], len(DATA), DATA[200:210])
    worker.join(60)
    assert worker.exitcode == 0
    assert fs.cat_file(path, 5, 10) == DATA[5:10]


def test_filesystems_of_one_target_share_what_they_know(cached, s3, bucket, tmp_path):
    one = cached("s3", s3.options, directory=str(tmp_path / "shared"))
    two = cached("s3", s3.options, directory=str(tmp_path / "shared"), skip_instance_cache=True, asynchronous=True)
    assert one is not two
    assert one.mount is two.mount
    assert one.cat_file("bucket/data.bin") == two.cat_file("bucket/data.bin") == DATA
    two.pipe_file("bucket/fresh", b"1")
    assert one.cat_file("bucket/fresh") == b"1"
    one.rm("bucket/fresh")
    assert not two.exists("bucket/fresh")


@pytest.mark.slow
def test_a_restart_reads_from_the_ssd(cached, s3, bucket, tmp_path):
    settings = {"directory": str(tmp_path / "kept"), "ssd_bytes": 64 * MIB, "segment_bytes": 8 * MIB, "tail_bytes": 0}
    settings |= {"disk_free_floor_bytes": 0}
    fs = cached("s3", s3.options, **settings)
    assert fs.cat_file("bucket/data.bin", 0, 2 * MIB) == DATA[: 2 * MIB]
    fs.close()
    TierCacheFileSystem.clear_instance_cache()
    s3.server.stats.clear()
    again = cached("s3", s3.options, **settings)
    assert again.cat_file("bucket/data.bin", 0, 2 * MIB) == DATA[: 2 * MIB]
    assert s3.server.stats.by_method == {"HEAD": 1}
    assert again.cat_file("bucket/data.bin") == DATA
    assert s3.server.stats.by_method == {"HEAD": 1, "GET": 1}
    assert s3.server.stats.bytes_sent <= len(DATA) - 2 * MIB + 1000


# -- counts ------------------------------------------------------------------------------------------------------------


def test_many_cold_readers_are_one_get(cached, s3, bucket):
    fs = cached("s3", s3.options, tail_bytes=0)
    ready = threading.Barrier(32)
    got = []

    def one():
        ready.wait(30)
        with fs.open("bucket/data.bin") as f:
            f.seek(MIB)
            got.append(f.read(1000))

    threads = [threading.Thread(target=one) for _ in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [DATA[MIB : MIB + 1000]] * 32
    assert s3.server.stats.by_method == {"HEAD": 1, "GET": 1}


@pytest.mark.slow
def test_thousands_of_cold_tasks_are_one_get(cached, s3, bucket):
    fs = cached("s3", s3.options, tail_bytes=0)

    async def main():
        return await asyncio.gather(*[fs._cat_file("bucket/data.bin", MIB + i % 7, MIB + 900) for i in range(2_000)])

    assert set(fs.mount.wait(main())) == {DATA[MIB + i : MIB + 900] for i in range(7)}
    assert s3.server.stats.by_method == {"HEAD": 1, "GET": 1}


def test_deep_trees_are_found_level_by_level(cached, s3, bucket):
    fs = cached("s3", s3.options)
    names = [f"bucket/tree/a={a}/b={b}/part.bin" for a in range(4) for b in range(3)]
    for name in names:
        (bucket.parent / name).parent.mkdir(parents=True)
        (bucket.parent / name).write_bytes(b"x")
    s3.server.stats.clear()
    assert fs.find("bucket/tree") == sorted(names)
    assert s3.server.stats.requests == 1 + 4 + 12
    assert fs.glob("bucket/tree/a=*/b=1/*.bin") == sorted(names)[1::3]
    assert fs.glob("bucket/tree/**/part.bin") == sorted(names)
    assert fs.find("bucket/tree", maxdepth=1, withdirs=True)[:2] == ["bucket/tree", "bucket/tree/a=0"]
    assert fs.find(names[0]) == names[:1]
    assert fs.size(names[0]) == 1
    assert s3.server.stats.by_method["HEAD"] <= 1  # listings bring the facts
    fs.rm("bucket/tree", recursive=True)
    assert fs.find("bucket/tree") == []


def test_a_small_file_is_one_request_and_then_none(cached, s3, bucket):
    fs = cached("s3", s3.options)
    s3.server.stats.clear()
    (bucket / "small.parquet").write_bytes(DATA[:100_000])
    assert fs.isfile("bucket/small.parquet")
    assert fs.info("bucket/small.parquet")["size"] == 100_000
    with fs.open("bucket/small.parquet") as f:
        assert f.read() == DATA[:100_000]
        f.seek(-10, 2)
        assert f.read() == DATA[99_990:100_000]
    assert fs.cat_file("bucket/small.parquet") == DATA[:100_000]
    assert s3.server.stats.by_method == {"GET": 1}
    (bucket / "small.parquet").unlink()


def test_a_sequential_reader_is_read_ahead_of(cached, s3, bucket):
    fs = cached("s3", s3.options, tail_bytes=0, readahead_bytes=MIB)
    with fs.open("bucket/data.bin") as f:
        blocks = []
        while block := f.read(16 << 10):
            blocks.append(block)
    assert b"".join(blocks) == DATA
    assert s3.server.stats.by_method["GET"] < len(blocks) / 4


def test_get_is_whole_or_not_at_all(cached, s3, bucket, tmp_path):
    fs = cached("s3", s3.options)
    fs.get("bucket/data.bin", str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_bytes() == DATA
    with pytest.raises(FileNotFoundError):
        fs.get_file("bucket/nothing", str(tmp_path / "none"))
    assert max(os.listdir(tmp_path)) == "copy"
    sink = io.BytesIO()
    fs.get_file("bucket/data.bin", sink)
    assert sink.getvalue() == DATA
