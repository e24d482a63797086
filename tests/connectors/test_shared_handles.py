"""Handles that threads share: positions of their own, or one that all of them move."""

from __future__ import annotations

import os
import random
import threading
import time

import pytest

from tests.connectors.conftest import MIB

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


def test_threads_that_seek_and_read_apart_get_what_they_sought(local, file):
    """The order that breaks LocalFileSystem: every thread seeks before any of them reads."""
    with local.open(file) as f:
        for warm in (False, True):
            got = {}
            ready = threading.Barrier(8)

            def one(i, got=got, ready=ready):
                f.seek(i * 300_000)
                ready.wait(10)
                got[i] = f.read(1000 + i)
                ready.wait(10)
                f.seek(i * 7)
                ready.wait(10)
                assert f.tell() == i * 7

            threads = [threading.Thread(target=one, args=(i,)) for i in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert got == {i: DATA[i * 300_000 :][: 1000 + i] for i in range(8)}, warm


def test_threads_that_hand_a_file_on_read_it_in_order(local, file):
    """Thread pools (FastAPI, asyncio.to_thread) read one file from many threads, one after the other."""

    def call(work, *args):
        out = []
        thread = threading.Thread(target=lambda: out.append(work(*args)))
        thread.start()
        thread.join()
        return out[0]

    with local.open(file) as f:
        assert call(f.read, 10) + call(f.read, 10) + f.read(5) + call(f.read, 5) == DATA[:30]
        call(f.seek, 1000)
        assert call(f.read, 10) + f.read(10) == DATA[1000:1020]
        f.seek(50)
        assert call(f.read, 10) == DATA[50:60]
        assert f.read(10) == DATA[50:60]  # this thread sought: its position is its own
        assert call(f.readline) == DATA[60 : DATA.index(b"\n", 60) + 1]


def test_a_thread_that_sought_keeps_its_position_whatever_others_do(local, file):
    def apart(work):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    with local.open(file) as f:
        f.seek(100)
        apart(lambda: f.read(10))
        assert f.read(1) == DATA[100:101]
        f.seek(0)
        assert f.read(10) == DATA[:10]
        apart(lambda: (f.seek(5000), f.read(5), f.readline(), next(iter(f))))
        assert f.tell() == 10
        assert f.read(1) == DATA[10:11]
        assert f.readline() == DATA[11 : DATA.index(b"\n", 11) + 1]


def test_text_is_read_in_order_by_whichever_thread(local, tmp_path):
    """The buffer under it believes that the file has one position."""
    text = "".join(f"line {i}\n" for i in range(200_000))
    path = old(tmp_path / "lines.txt", text.encode())
    got = []

    def one(count):
        got.append(f.read(count))

    with local.open(path, "r", encoding="utf-8") as f:
        f.seek(0)
        for count in (10, 700_000, -1):
            thread = threading.Thread(target=one, args=(count,))
            thread.start()
            thread.join()
            one(300_000)
    assert "".join(got) == text


def test_threads_share_lines_out(local, tmp_path):
    lines = [b"line %d\n" % i for i in range(3000)]
    path = old(tmp_path / "lines.txt", b"".join(lines))
    with local.open(path) as f:
        got = []

        def one(i):
            if i % 2:
                got.extend(f)
            else:
                while line := f.readline():
                    got.append(line)

        threads = [threading.Thread(target=one, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(got) == sorted(lines)


def test_concurrent_readers_of_one_position_share_it_out(local, file):
    with local.open(file) as f:
        got = []

        def one():
            while block := f.read(10_000):
                got.append(block)

        threads = [threading.Thread(target=one) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(got) == sorted(DATA[start : start + 10_000] for start in range(0, len(DATA), 10_000))
