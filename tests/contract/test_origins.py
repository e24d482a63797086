"""Every origin keeps the contract: the fake, local and memory files, and S3 and HTTP over two clients with faults."""

from __future__ import annotations

import asyncio
import random
import urllib.request
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar
from urllib.parse import quote

import boto3
import fsspec
import pytest
from botocore.config import Config
from fsspec.implementations.memory import MemoryFileSystem
from moto.server import ThreadedMotoServer

from tiercache.errors import ChangedError
from tiercache.origin import Stat
from tiercache.remote.landing import differ
from tiercache.remote.opening import open_origin
from tiercache.remote.retry import Patience, RetryingOrigin
from tiercache.testing.faultproxy import FaultProxy, Faults
from tiercache.testing.origins import DATA, QUICK, Arrangement, FaultyOriginTests, MemoryOrigin, OriginTests, read
from tiercache.testing.origins.faults import PASSING
from tiercache.testing.s3server import S3Server
from tiercache.testing.simloop import simulate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tiercache.origin import Origin

pytestmark = pytest.mark.slow

KEYS = {"key": "k", "secret": "s"}


class TestMemoryOrigin(OriginTests):
    """The fake, behind patience, on the simulated loop."""

    def run(self, coroutine):
        return simulate(lambda loop: coroutine, seed=1)

    @contextmanager
    def arrange(self, home: Path) -> Iterator[Arrangement]:
        inner = MemoryOrigin(delay_s=0.01)

        def put(name: str, data: bytes) -> str:
            inner.put(name, data)
            return name

        def opened(patience: Patience) -> Origin:
            return RetryingOrigin(inner, patience, random.Random(1))

        yield Arrangement(opened, put, inner.remove, str)


class TestLocalOrigin(OriginTests):
    """Files of this machine."""

    @contextmanager
    def arrange(self, home: Path) -> Iterator[Arrangement]:
        def put(name: str, data: bytes) -> str:
            path = home / name
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = path.with_name(path.name + ".new")
            fresh.write_bytes(data)
            fresh.replace(path)
            return str(path)

        yield Arrangement(
            lambda patience: open_origin("file", patience=patience),
            put,
            lambda name: (home / name).unlink(),
            lambda name: f"{home}/{name}",
        )


class TestLocalFilesystem(TestLocalOrigin):
    """The same files through a filesystem that somebody made."""

    @contextmanager
    def arrange(self, home: Path) -> Iterator[Arrangement]:
        with super().arrange(home) as place:
            fs = fsspec.filesystem("file", auto_mkdir=True)
            yield Arrangement(
                lambda patience: open_origin("file", filesystem=fs, patience=patience),
                place.put,
                place.remove,
                place.path,
            )


class TestMemoryFilesystem(OriginTests):
    """fsspec's memory, which has no coroutines."""

    @contextmanager
    def arrange(self, home: Path) -> Iterator[Arrangement]:
        fs = fsspec.filesystem("memory")

        def path(name: str) -> str:
            return f"/{home.name}/{name}"

        def put(name: str, data: bytes) -> str:
            fs.pipe_file(path(name), data)
            return path(name)

        yield Arrangement(
            lambda patience: open_origin("memory", patience=patience), put, lambda name: fs.rm_file(path(name)), path
        )
        if fs.exists(f"/{home.name}"):
            fs.rm(f"/{home.name}", recursive=True)


def client_of(url: str):
    config = Config(retries={"total_max_attempts": 1}, s3={"addressing_style": "path"})
    keys = {"aws_access_key_id": "k", "aws_secret_access_key": "s", "region_name": "us-east-1"}
    return boto3.client("s3", endpoint_url=url, config=config, **keys)


@contextmanager
def s3_place(url: str, opened: Callable[[Patience, str], Origin], proxy: FaultProxy | None = None):
    """A bucket of its own at `url`, opened through the proxy where there is one."""
    client = client_of(url)
    client.create_bucket(Bucket="lake")

    def put(name: str, data: bytes) -> str:
        client.put_object(Bucket="lake", Key=name, Body=data)
        return f"lake/{name}"

    endpoint = proxy.url if proxy is not None else url
    yield Arrangement(
        lambda patience: opened(patience, endpoint),
        put,
        lambda name: client.delete_object(Bucket="lake", Key=name),
        lambda name: f"lake/{name}",
        proxy,
    )
    client.close()


class TestS3(FaultyOriginTests):
    """S3 over obstore, our server, the proxy between."""

    def opened(self, patience: Patience, url: str) -> Origin:
        return open_origin("s3", KEYS | {"endpoint_url": url}, patience=patience)

    @contextmanager
    def arrange(self, home: Path) -> Iterator[Arrangement]:
        with (
            S3Server(home) as server,
            FaultProxy(server.url, random=random.Random(1)) as proxy,
            s3_place(server.url, self.opened, proxy) as place,
        ):
            yield place


def opened_by_s3fs(patience: Patience, url: str) -> Origin:
    return open_origin("s3", KEYS | {"endpoint_url": url}, through="fsspec", patience=patience)


class TestS3OverS3fs(OriginTests):
    """The same over s3fs, as in a forked child or where options ask for it."""

    @contextmanager
    def arrange(self, home: Path) -> Iterator[Arrangement]:
        with S3Server(home) as server, s3_place(server.url, opened_by_s3fs) as place:
            yield place


def test_s3fs_brings_facts_and_tail_in_one_request(tmp_path):
    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket" / "a").write_bytes(bytes(range(200)))

    async def main():
        origin = opened_by_s3fs(Patience(), server.url)
        for length in (50, 1000):
            stat, data = await origin.read_tail("bucket/a", length)
            assert (stat, data) == ((await origin.stat(["bucket/a"]))[0], bytes(range(200))[-length:])
        await origin.close()

    with S3Server(tmp_path) as server:
        asyncio.run(main())
        assert server.stats.by_operation == {"GetObject": 2, "HeadObject": 2}


def test_s3fs_gets_over_faults(tmp_path):
    """One session for all of them: s3fs takes longer to start than these faults to pass."""

    async def check() -> None:
        origin = place.open(QUICK)
        path = place.put("x", DATA)
        (stat,) = await origin.stat([path])
        for fault in sorted(set(PASSING) - {"wrong_range"}):
            proxy.clear()
            proxy.faults = Faults(schedule={1: fault, 2: fault})
            assert await read(origin, stat, 1000, 5000) == [DATA[1000:6000]]
            assert proxy.stats.by_fault[fault] == 2
        proxy.clear()
        proxy.faults = Faults(schedule={1: "throttle"}, retry_after_s=1)
        begin_s = asyncio.get_running_loop().time()
        assert await read(origin, stat, 0, 100) == [DATA[:100]]
        assert asyncio.get_running_loop().time() - begin_s >= 1.0
        place.put("x", DATA[::-1])
        with pytest.raises(ChangedError):
            await read(origin, stat, 0, 100)
        await origin.close()

    with (
        S3Server(tmp_path) as server,
        FaultProxy(server.url) as proxy,
        s3_place(server.url, opened_by_s3fs, proxy) as place,
    ):
        asyncio.run(check())


class Remembering(MemoryFileSystem):
    """Blocking, with ETags, and facts from its own listings for as long as it lives."""

    protocol = "remembering"
    cachable = False
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]

    def __init__(self, **options):
        super().__init__(**options)
        self.listed = {}

    def _tagged(self, row):
        return row if row["type"] != "file" else row | {"ETag": str(hash(self.store[row["name"]].getvalue()))}

    def ls(self, path, detail=True, **kwargs):
        rows = [self._tagged(row) for row in super().ls(path, detail=True)]
        self.listed |= {row["name"]: row for row in rows}
        return rows if detail else [row["name"] for row in rows]

    def info(self, path, **kwargs):
        path = self._strip_protocol(path)
        return self.listed[path] if path in self.listed else self._tagged(super().info(path))

    def invalidate_cache(self, path=None):
        self.listed = {name: row for name, row in self.listed.items() if path and self._parent(name) != path}


def test_a_weak_etag_alone_does_not_say_that_bytes_are_the_same():
    weak = Stat("p", 5, 'W/"etag', 1.0)
    assert not differ(weak, weak)
    assert differ(weak, replace(weak, mtime_s=2.0))
    assert differ(weak, replace(weak, version='W/"other'))
    assert not differ(replace(weak, version="strong"), Stat("p", 5, "strong", 2.0))
    assert differ(Stat("p", 5, "strong"), Stat("p", 6, "strong"))


async def never_mixes(origin: Origin, folder: str, overwrite: Callable[[bytes], object]) -> None:
    """A file that is listed, pinned and overwritten: the pin gets a clear error, a new look the new version."""
    (stat,) = await origin.list(folder)
    assert await read(origin, stat, 0, 5) == [DATA[:5]]
    overwrite(DATA[::-1])
    with pytest.raises(ChangedError):
        await read(origin, stat, 0, 5)
    (now,) = await origin.stat([stat.path])
    assert now.version != stat.version
    assert await read(origin, now, 0, 5) == [DATA[::-1][:5]]
    await origin.close()


def test_the_listings_a_given_filesystem_remembers_are_no_facts():
    fs = Remembering()
    fs.pipe_file("/d/f", DATA)
    fs.ls("/d")
    asyncio.run(never_mixes(open_origin("remembering", filesystem=fs), "/d", partial(Remembering().pipe_file, "/d/f")))


def test_a_given_s3fs_is_asked_anew(tmp_path):
    with S3Server(tmp_path) as server:
        options = KEYS | {"endpoint_url": server.url, "client_kwargs": {"region_name": "us-east-1"}}
        fs = fsspec.filesystem("s3", skip_instance_cache=True, **options)
        other = fsspec.filesystem("s3", skip_instance_cache=True, asynchronous=False, **options)
        other.mkdir("lake")
        other.pipe_file("lake/d/f", DATA)
        assert fs.ls("lake/d", detail=False) == ["lake/d/f"]
        origin = open_origin("s3", filesystem=fs)
        asyncio.run(never_mixes(origin, "lake/d", partial(other.pipe_file, "lake/d/f")))
        assert fs.dircache  # the caller's own listings are the caller's


class TestHttp(FaultyOriginTests):
    """Plain HTTP over obstore: the S3 server answers anybody."""

    lists = False
    writes = False

    def opened(self, patience: Patience) -> Origin:
        return open_origin("http", {}, patience=patience)

    @contextmanager
    def arrange(self, home: Path) -> Iterator[Arrangement]:
        (home / "lake").mkdir()
        with S3Server(home) as server, FaultProxy(server.url, random=random.Random(1)) as proxy:
            client = client_of(server.url)

            def path(name: str) -> str:
                return f"{proxy.url}/lake/{quote(name)}"

            def put(name: str, data: bytes) -> str:
                client.put_object(Bucket="lake", Key=name, Body=data)
                return path(name)

            def remove(name: str) -> None:
                client.delete_object(Bucket="lake", Key=name)

            yield Arrangement(self.opened, put, remove, path, proxy)
            client.close()


class TestHttpOverFsspec(TestHttp):
    """Plain HTTP over fsspec's own client."""

    checks_ranges = False
    waits_as_told = True

    def opened(self, patience: Patience) -> Origin:
        return open_origin("http", {"encoded": True}, through="fsspec", patience=patience)


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


class TestMoto(OriginTests):
    """S3 as moto sees it (semantics only, never timed)."""

    @pytest.fixture(autouse=True)
    def server(self, moto):
        self.url = moto
        reset = urllib.request.Request(f"{moto}/moto-api/reset", method="POST")
        urllib.request.urlopen(reset, timeout=10).close()

    def opened(self, patience: Patience, url: str) -> Origin:
        return open_origin("s3", KEYS | {"endpoint_url": url}, patience=patience)

    @contextmanager
    def arrange(self, home: Path) -> Iterator[Arrangement]:
        with s3_place(self.url, self.opened) as place:
            yield place
