"""Files that change while they are read by path or copied, and copies that do not meet."""

from __future__ import annotations

import asyncio
import io
import os
import random
import time

import pytest

from tests.connectors.conftest import MIB
from tiercache.errors import ChangedError
from tiercache_connectors import fsspec_trees

DATA = random.Random(3).randbytes(3 * MIB + 4321)


class Sink(io.BytesIO):
    """A file in memory whose methods can be replaced, written to behind what it has."""

    def __init__(self, data=b""):
        super().__init__(data)
        self.seek(0, 2)


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


def test_who_asks_for_a_path_gets_what_is_there_now(cached, s3, bucket, tmp_path):
    """Facts are remembered and the object has changed: every way to read a whole path begins once more."""
    fs = cached("s3", s3.options, tail_bytes=0, stat_ttl_s=3600.0)
    copy, sink = tmp_path / "copy", io.BytesIO()
    ways = [
        fs.cat_file,
        lambda path: b"".join(fs.cat_ranges([path] * 2, [0, MIB], [MIB, None], on_error="raise")),
        lambda path: (fs.get_file(path, str(copy)), copy.read_bytes())[1],
        lambda path: (fs.get_file(path, sink), sink.getvalue())[1],
    ]
    for i, way in enumerate(ways):
        s3.direct().pipe_file(f"bucket/changing{i}", b"old" * MIB)
        assert fs.size(f"bucket/changing{i}") == 3 * MIB
        s3.direct().pipe_file(f"bucket/changing{i}", b"new" * MIB + b"er")
        assert way(f"bucket/changing{i}") == b"new" * MIB + b"er"
        (bucket / f"changing{i}").unlink()


def test_a_copy_that_was_begun_is_begun_again(cached, s3, bucket, monkeypatch):
    monkeypatch.setattr(fsspec_trees, "GET_BYTES", MIB)
    fs = cached("s3", s3.options, tail_bytes=0, stat_ttl_s=3600.0, readahead_bytes=0)

    def copied(file):
        s3.direct().pipe_file("bucket/changing", DATA)
        fs.invalidate_cache("bucket/changing")
        first = file.write

        def write(data):
            if data == DATA[:MIB]:
                s3.direct().pipe_file("bucket/changing", b"newer" * 1000)
            return first(data)

        file.write = write
        fs.get_file("bucket/changing", file)
        return file

    assert copied(Sink(b"head")).getvalue() == b"head" + b"newer" * 1000
    pipe = Sink()
    pipe.seekable = lambda: False
    with pytest.raises(ChangedError, match="cannot be begun again"):
        copied(pipe)
    (bucket / "changing").unlink()


def test_gets_to_one_path_at_once_leave_one_whole_file(tmp_path):
    goal = tmp_path / "folder" / "goal"
    halves = [asyncio.Event(), asyncio.Event()]

    async def copy(i, file):
        file.write(bytes([i]) * 1000)
        halves[i].set()
        await halves[1 - i].wait()
        file.write(bytes([i]) * 1000)

    async def fail(file):
        file.write(b"half")
        raise OSError("the origin went away")

    async def main():
        await asyncio.gather(*[fsspec_trees.write_whole(goal, lambda file, i=i: copy(i, file)) for i in range(2)])
        assert goal.read_bytes() in (b"\0" * 2000, b"\1" * 2000)
        with pytest.raises(OSError, match="went away"):
            await fsspec_trees.write_whole(goal, fail)

    asyncio.run(main())
    assert len(goal.read_bytes()) == 2000
    assert os.listdir(goal.parent) == ["goal"]
    assert goal.stat().st_mode & 0o777 == 0o666 & ~umask()


def umask():
    """What this process does not give to new files."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
