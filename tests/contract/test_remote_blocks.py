"""Blocks in object storage keep their contract: over memory, files, and S3 by three servers, with faults on the way."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import boto3
import pytest
from botocore.config import Config
from moto.server import ThreadedMotoServer

from tiercache.buffers import Buffer
from tiercache.clock import SystemClock
from tiercache.errors import ConfigError, OriginError, UnavailableError
from tiercache.metrics import Metrics
from tiercache.model import Outcome
from tiercache.remote.blocks import RemoteBlocks
from tiercache.remote.bucket import FileBucket, StoreBucket, open_bucket, parse_options
from tiercache.remote.budget import RESERVED_BYTES
from tiercache.remote.writing import SWEEP_S
from tiercache.testing.buckets import PART_BYTES, MemoryBucket, made_block, put_blocks, read_blocks
from tiercache.testing.faultproxy import FaultProxy, Faults
from tiercache.testing.s3server import S3Server
from tiercache.testing.simloop import SimClock, derive, simulate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tiercache.model import Payload
    from tiercache.remote.bucket import Bucket
    from tiercache.testing.simloop import SimLoop

pytestmark = pytest.mark.slow

HIT, MISS = Outcome.HIT, Outcome.MISS
CAP_BYTES = 4 << 20
Open = "Callable[[], Bucket]"


def opened(bucket: Bucket, metrics: Metrics | None = None, **options) -> RemoteBlocks:
    given = {"pack_bytes": 64 << 10, "deadline_s": 5.0} | options
    return RemoteBlocks(
        bucket,
        given.pop("limit_bytes", CAP_BYTES),
        clock=SystemClock(),
        metrics=metrics or Metrics(),
        random=random.Random(os.urandom(8)),
        **given,
    )


class BucketTests:
    """What every bucket and all blocks over it must do."""

    @contextmanager
    def place(self, home: Path) -> Iterator[Callable[[], Bucket]]:
        """Opens one and the same bucket as often as it is called."""
        raise NotImplementedError

    def test_objects_are_whole_and_created_once(self, tmp_path: Path) -> None:
        with self.place(tmp_path) as at:
            one, two = at(), at()
            data = random.Random(1).randbytes(3 << 20)
            assert one.get("packs/a/1") is None and one.get("packs/a/1", 3, 4) is None
            assert one.put("packs/a/1", bytearray(data), create=True)
            assert not two.put("packs/a/1", b"other", create=True)
            assert bytes(two.get("packs/a/1") or b"") == data
            assert bytes(two.get("packs/a/1", 1000, 70_000) or b"") == data[1000:71_000]
            assert two.put("packs/a/1", b"third") and bytes(one.get("packs/a/1") or b"") == b"third"
            one.put("packs/ab/2", b"22")
            one.put("index/a/1", b"")
            assert sorted(two.list("packs/")) == [("packs/a/1", 5), ("packs/ab/2", 2)]
            assert sorted(two.list("packs/a/")) == [("packs/a/1", 5)]
            assert list(two.list("nothing/")) == []
            with pytest.raises((UnavailableError, OriginError)):
                one.get("packs/a/1", 2, 100)
            one.delete(["packs/a/1", "packs/never"])
            one.delete([])
            assert one.get("packs/a/1") is None and sorted(one.list("")) == [("index/a/1", 0), ("packs/ab/2", 2)]

    def test_of_many_who_create_one_name_one_does(self, tmp_path: Path) -> None:
        with self.place(tmp_path) as at, ThreadPoolExecutor(8) as threads:
            buckets = [at() for _ in range(8)]
            for number in range(10):
                start = threading.Barrier(8)

                def create(bucket: Bucket, start=start, number=number) -> bool:
                    start.wait()
                    return bucket.put(f"budget/{number}", os.urandom(8), create=True)

                assert sum(threads.map(create, buckets)) == 1

    def test_what_one_writes_another_reads(self, tmp_path: Path) -> None:
        async def work(at: Callable[[], Bucket]) -> None:
            one, two = opened(at()), opened(at())
            running = asyncio.ensure_future(two.run())
            await two.known()
            assert await read_blocks(two, range(3)) == [MISS] * 3
            assert await put_blocks(one, range(10)) == [HIT] * 10
            assert await put_blocks(one, range(5, 15)) == [HIT] * 10
            assert await read_blocks(one, range(16)) == [HIT] * 15 + [MISS]
            await two._catalog.refresh()
            assert await read_blocks(two, range(16)) == [HIT] * 15 + [MISS]
            assert two.prefix([number.to_bytes(16, "little") for number in range(20)]) == 15
            running.cancel()
            await one.close()
            await two.close()
            three = opened(at())
            await three._catalog.refresh()
            assert await read_blocks(three, range(15)) == [HIT] * 15
            await three.close()

        with self.place(tmp_path) as at:
            asyncio.run(work(at))

    def test_parts_are_read_alone(self, tmp_path: Path) -> None:
        async def work(bucket: Bucket) -> None:
            remote = opened(bucket)
            await put_blocks(remote, range(20))
            payload, source = made_block(13)
            (found,) = remote.find([payload.name.key])
            assert found is not None and found.size == payload.size and found.parent == payload.parent
            assert found.size > 3 * PART_BYTES
            for parts in (0b1, 0b101, 0b1010, found.parts):
                target = bytearray(b"\xaa" * payload.size)
                wanted = replace(found, parts=parts)
                answers = await remote.read([wanted], [Buffer.of(target, writable=True)])
                assert answers == [(HIT, payload.digests)]
                for part in range(payload.size // PART_BYTES + 1):
                    span = slice(part * PART_BYTES, min(payload.size, (part + 1) * PART_BYTES))
                    there = bytes(source)[span] if parts >> part & 1 else b"\xaa" * (span.stop - span.start)
                    assert target[span] == there
            await remote.close()

        with self.place(tmp_path) as at:
            asyncio.run(work(at()))

    def test_the_cap_holds_and_the_newest_chains_stay(self, tmp_path: Path) -> None:
        def made(number: int) -> tuple[Payload, Buffer]:
            payload, source = made_block(number)
            return replace(payload, cost_s=1.0, parent=payload.parent if number % 4 else b""), source

        async def work(bucket: Bucket) -> None:
            limit = RESERVED_BYTES + (400 << 10)
            remote = opened(bucket, limit_bytes=limit, pack_bytes=32 << 10)
            for number in range(60):
                assert await put_blocks(remote, [4 * number + i for i in range(4)], made) == [HIT] * 4
                assert sum(size for _, size in bucket.list("")) <= limit
            assert await read_blocks(remote, range(236, 240), made) == [HIT] * 4
            assert await read_blocks(remote, range(4), made) == [MISS] * 4
            await remote.close()

        with self.place(tmp_path) as at:
            asyncio.run(work(at()))

    def test_a_chain_longer_than_the_cap_keeps_its_beginning(self, tmp_path: Path) -> None:
        async def work(bucket: Bucket) -> None:
            remote = opened(bucket, limit_bytes=RESERVED_BYTES + (400 << 10), pack_bytes=32 << 10)
            for number in range(30):
                await put_blocks(remote, [4 * number + i for i in range(4)])
            there = remote.prefix([number.to_bytes(16, "little") for number in range(120)])
            assert 24 <= there < 120
            assert await read_blocks(remote, range(there)) == [HIT] * there
            await remote.close()

        with self.place(tmp_path) as at:
            asyncio.run(work(at()))

    def test_small_packs_become_one(self, tmp_path: Path) -> None:
        async def work(at: Callable[[], Bucket]) -> None:
            bucket = at()
            one, two = opened(bucket, pack_bytes=256 << 10), opened(at(), pack_bytes=256 << 10)
            for number in range(20):
                assert await put_blocks(one, [number]) == [HIT]
            one.hide([made_block(3)[0].name.key])
            await two._catalog.refresh()
            before = sum(size for _, size in bucket.list("packs/"))
            await one._writing.tend()
            ((_, size),) = bucket.list("packs/")
            assert made_block(3)[0].size < before - size
            assert one._budget.used_bytes == sum(size for key, size in bucket.list("") if key.startswith(("p", "i")))
            wanted = [HIT] * 3 + [MISS] + [HIT] * 16
            assert await read_blocks(one, range(20)) == wanted
            assert set(await read_blocks(two, range(20))) == {MISS}
            await two._catalog.refresh()
            assert await read_blocks(two, range(20)) == wanted
            await one.close()
            await two.close()

        with self.place(tmp_path) as at:
            asyncio.run(work(at))

    def test_a_pack_that_is_gone_is_a_miss(self, tmp_path: Path) -> None:
        async def work(bucket: Bucket) -> None:
            remote = opened(bucket)
            await put_blocks(remote, range(4))
            await put_blocks(remote, range(4, 8))
            bucket.delete([key for key, _ in bucket.list("packs/")][:1])
            assert sorted(await read_blocks(remote, range(8))) == [MISS] * 4 + [HIT] * 4
            assert remote.find([made_block(0)[0].name.key, made_block(4)[0].name.key]).count(None) == 1
            await remote.close()

        with self.place(tmp_path) as at:
            asyncio.run(work(at()))

    def test_damage_is_found_counted_and_forgotten(self, tmp_path: Path) -> None:
        async def work(bucket: Bucket) -> None:
            metrics = Metrics()
            remote = opened(bucket, metrics)
            await put_blocks(remote, [21, 22, 23])
            ((key, size),) = bucket.list("packs/")
            data = bytearray(bucket.get(key) or b"")
            place = data.find(bytes(made_block(22)[1])[:64])
            data[place + 17] ^= 1
            bucket.put(key, data)
            assert len(data) == size
            assert await read_blocks(remote, [21, 22, 23]) == [HIT, Outcome.CORRUPT, HIT]
            assert metrics.value("tiercache_corruptions_total", tier="remote") == 1
            assert await read_blocks(remote, [21, 22, 23]) == [HIT, MISS, HIT]
            data[-3] ^= 1  # in the tail: nobody who comes later believes the table
            bucket.put(key, data)
            other = opened(bucket)
            await other._catalog.refresh()
            assert await read_blocks(other, [21, 22, 23]) == [MISS] * 3
            await remote.close()
            await other.close()

        with self.place(tmp_path) as at:
            asyncio.run(work(at()))


class TestMemory(BucketTests):
    """The fake."""

    @contextmanager
    def place(self, home: Path) -> Iterator[Callable[[], Bucket]]:
        bucket = MemoryBucket()
        yield lambda: bucket


class TestStoreInMemory(BucketTests):
    """The memory of obstore."""

    @contextmanager
    def place(self, home: Path) -> Iterator[Callable[[], Bucket]]:
        from obstore.store import MemoryStore

        store = MemoryStore()
        yield lambda: StoreBucket(store, "some/prefix/", "memory")


class TestFiles(BucketTests):
    """A directory."""

    @contextmanager
    def place(self, home: Path) -> Iterator[Callable[[], Bucket]]:
        yield lambda: open_bucket(f"file://{home}/shared")

    def test_what_is_left_of_a_write_is_no_object(self, tmp_path: Path) -> None:
        bucket = FileBucket(str(tmp_path), random.Random(1))
        bucket.put("packs/a/1", b"x")
        (tmp_path / "packs/a/2.part-0-1").write_bytes(b"half")
        assert sorted(bucket.list("packs/")) == [("packs/a/1", 1), ("packs/a/2.part-0-1", 4)]


class TestS3(BucketTests):
    """Our own server."""

    PREFIX: ClassVar[str] = "/deep/prefix"

    @contextmanager
    def place(self, home: Path) -> Iterator[Callable[[], Bucket]]:
        (home / "bucket").mkdir()
        with S3Server(home) as server:
            yield lambda: s3_bucket(server.url, self.PREFIX)


class TestS3WithoutPrefix(TestS3):
    """The same, in the top of the bucket."""

    PREFIX = ""


class TestMoto(BucketTests):
    """Another server."""

    @contextmanager
    def place(self, home: Path) -> Iterator[Callable[[], Bucket]]:
        server = ThreadedMotoServer(port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        url = f"http://{host}:{port}"
        try:
            client = boto3.client(
                "s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id="k", aws_secret_access_key="s",
                config=Config(s3={"addressing_style": "path"}),
            )  # fmt: skip
            client.create_bucket(Bucket="bucket")
            yield lambda: s3_bucket(url, "/p", anon=False)
            for page in client.get_paginator("list_objects_v2").paginate(Bucket="bucket"):
                for each in page.get("Contents", []):
                    client.delete_object(Bucket="bucket", Key=each["Key"])
            client.delete_bucket(Bucket="bucket")
        finally:
            server.stop()

    @pytest.fixture(autouse=True)
    def credentials(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")


def s3_bucket(url: str, prefix: str = "/p", *, anon: bool = True) -> Bucket:
    return open_bucket(f"s3://bucket{prefix}", {"endpoint_url": url, "anon": anon}, deadline_s=5.0)


@pytest.mark.parametrize(
    "fault", ["throttle", "error", "reset", "truncate", "stall", "mute", "short_length", "wrong_range", "corrupt"]
)
def test_no_fault_on_the_way_gives_a_wrong_byte_or_takes_for_ever(tmp_path: Path, fault: str) -> None:
    async def work(server: S3Server, proxy: FaultProxy) -> None:
        one, two = opened(s3_bucket(server.url)), opened(s3_bucket(proxy.url), deadline_s=0.5)
        assert await put_blocks(one, range(40)) == [HIT] * 40
        await two._catalog.refresh()
        proxy.faults = Faults(stall_s=3.0, only="GET", only_path="packs", probability={fault: 0.7})
        for _ in range(4):
            async with asyncio.timeout(20):
                outcomes = await read_blocks(two, range(40))
            assert set(outcomes) <= {HIT, MISS, Outcome.CORRUPT}
            try:
                await two._catalog.refresh()  # as its own background work would find out
            except (OriginError, UnavailableError):
                pass
        proxy.faults = Faults(stall_s=0.0)
        two._asking._failures = 0
        three = await fresh(server)
        assert await read_blocks(three, range(40)) == [HIT] * 40
        await three.close()
        await one.close()
        await two.close()

    (tmp_path / "bucket").mkdir()
    with S3Server(tmp_path) as server, FaultProxy(server.url, random=random.Random(1)) as proxy:
        asyncio.run(work(server, proxy))


async def fresh(server: S3Server) -> RemoteBlocks:
    remote = opened(s3_bucket(server.url))
    await remote._catalog.refresh()
    return remote


def test_opening_reads_snapshots_and_not_every_pack(tmp_path: Path) -> None:
    async def work(server: S3Server) -> None:
        one = opened(s3_bucket(server.url))
        for number in range(50):
            await put_blocks(one, [2 * number, 2 * number + 1])
        await one._writing.tend()
        for number in range(50, 53):
            await put_blocks(one, [2 * number, 2 * number + 1])
        # It is killed: nothing is written down of the last packs.
        server.stats.clear()
        two = await fresh(server)
        gets = [row for row in server.stats.log if row.method == "GET" and row.operation == "GetObject"]
        assert len([row for row in gets if "/index/" in row.target]) == 1
        assert len([row for row in gets if "/packs/" in row.target]) == 3
        assert await read_blocks(two, range(106)) == [HIT] * 106
        await two.close()

    (tmp_path / "bucket").mkdir()
    with S3Server(tmp_path) as server:
        asyncio.run(work(server))


def test_what_belongs_to_nobody_is_deleted_after_a_while() -> None:
    async def main(loop: SimLoop) -> None:
        bucket, clock = MemoryBucket(), SimClock(loop)
        lost, kept = (
            RemoteBlocks(bucket, CAP_BYTES, clock=clock, metrics=Metrics(), random=derive(1, name), pack_bytes=32 << 10)
            for name in ("lost", "kept")
        )
        await put_blocks(lost, range(4))
        bucket.delete([key for key, _ in bucket.list("budget/")])  # by hand
        running = loop.create_task(kept.run())
        await put_blocks(kept, range(4, 8))
        await kept._catalog.refresh()
        assert await read_blocks(kept, range(8)) == [HIT] * 8
        await asyncio.sleep(SWEEP_S * 3)
        assert await read_blocks(kept, range(8)) == [MISS] * 4 + [HIT] * 4
        assert len(bucket.list("packs/")) == 1
        running.cancel()

    simulate(main, seed=1)


def test_near_blocks_come_in_one_request(tmp_path: Path) -> None:
    async def work(server: S3Server) -> None:
        one = opened(s3_bucket(server.url))
        await put_blocks(one, range(30))
        server.stats.clear()
        assert await read_blocks(one, range(30)) == [HIT] * 30
        assert server.stats.by_method["GET"] == 1
        await one.close()

    (tmp_path / "bucket").mkdir()
    with S3Server(tmp_path) as server:
        asyncio.run(work(server))


def test_a_bucket_without_conditions_is_read_only(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        bucket = MemoryBucket()
        one = opened(bucket)
        await put_blocks(one, range(3))
        bucket.conditional = False
        two = opened(bucket)
        await two._catalog.refresh()
        assert await read_blocks(two, range(3)) == [HIT] * 3
        assert await put_blocks(two, range(3, 6)) == [Outcome.FULL] * 3
        assert await put_blocks(two, range(3, 6)) == [Outcome.FULL] * 3
        assert len(bucket.list("packs/")) == 1

    with caplog.at_level(logging.WARNING):
        asyncio.run(work())
    assert [r.message for r in caplog.records] == ["nothing is written to memory: it lets two writers create one name"]


def test_who_may_only_read_reads_and_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class ReadOnly(MemoryBucket):
        def put(self, key: str, data: bytes | bytearray, *, create: bool = False) -> bool:
            raise OriginError(f"{key}: access denied")

    async def work() -> None:
        bucket = MemoryBucket()
        await put_blocks(opened(bucket), range(3))
        locked = ReadOnly()
        locked.objects = bucket.objects
        two = opened(locked)
        await two._catalog.refresh()
        for _ in range(3):
            assert await put_blocks(two, range(3, 6)) != [HIT] * 3
            assert await read_blocks(two, range(3)) == [HIT] * 3
        await two.close()

    with caplog.at_level(logging.WARNING):
        asyncio.run(work())
    assert [r.message for r in caplog.records] == ["nothing is written for now: FORMAT: access denied"]


def test_a_bucket_that_hangs_costs_one_deadline(tmp_path: Path) -> None:
    """Whoever reads is answered at once from then on, until the bucket has been found well again."""
    hold = threading.Event()
    asked: list[str] = []

    class Hung(MemoryBucket):
        def get(self, key: str, start: int = 0, length: int | None = None) -> memoryview | None:
            asked.append(key)
            hold.wait(20)
            return super().get(key, start, length)

    async def work() -> None:
        bucket = MemoryBucket()
        await put_blocks(opened(bucket), range(3))
        hung = Hung()
        hung.objects = bucket.objects
        hold.set()
        remote = opened(hung, deadline_s=0.2)
        await remote._catalog.refresh()
        hold.clear()
        asked.clear()
        for _ in range(20):
            assert await read_blocks(remote, range(3)) == [MISS] * 3
        assert len(asked) == 1
        hold.set()
        remote._asking._calm_at_s = 0.0  # the pause is over
        await remote._catalog.refresh()
        assert await read_blocks(remote, range(3)) == [HIT] * 3
        await remote.close()

    asyncio.run(work())


@pytest.mark.parametrize(
    "url", ["s3://", "s3:///prefix", "http://host/x", "s3://bucket/a//b", "ftp://host/x", "relative", "s3://k:s@b/x"]
)
def test_urls_that_are_no_bucket(url: str) -> None:
    with pytest.raises(ConfigError, match="remote_url"):
        open_bucket(url)


@pytest.mark.parametrize(
    ("text", "says"),
    [("{", "JSON"), ("[1]", "JSON object"), ('{"secret": "x"}', "credentials"), ('{"token": "x"}', "credentials")],
)
def test_options_that_are_none(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_options(text)
    with pytest.raises(ConfigError, match="remote_options"):
        open_bucket("s3://bucket/x", {"no_such_option": 1, "anon": True})
