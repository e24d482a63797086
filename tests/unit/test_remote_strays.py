"""A bucket to which more happens than its writers do: doubled requests, rules that delete, machines that stand still,
and short jobs by the hundred. The cap holds, and room that was lost is found again."""

from __future__ import annotations

import asyncio
import struct
from typing import TYPE_CHECKING, Any

import pytest
import xxhash

from tiercache.errors import ConfigError, UnavailableError
from tiercache.metrics import Metrics
from tiercache.model import Outcome
from tiercache.remote import snapshots
from tiercache.remote.blocks import MISSED_S, REFRESH_S, RemoteBlocks
from tiercache.remote.bucket import StoreBucket, open_bucket, parse_options
from tiercache.remote.budget import FOLDER, LEASE_S, RESERVED_BYTES, decode
from tiercache.remote.packs import seed_of
from tiercache.remote.writing import SWEEP_S
from tiercache.testing.buckets import MemoryBucket, made_block, put_blocks, read_blocks
from tiercache.testing.simloop import SimClock, derive, simulate

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence
    from pathlib import Path

    from tiercache.testing.simloop import SimLoop

HIT, MISS = Outcome.HIT, Outcome.MISS
KIB = 1 << 10
CAP_BYTES = 256 * KIB


class Doubling(MemoryBucket):
    """A proxy, or a client, on the way sends a creation twice: the second answer is what the writer hears."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = ""
        self.lists = 0

    def put(self, key: str, data: bytes | bytearray, *, create: bool = False) -> bool:
        made = super().put(key, data, create=create)
        return super().put(key, data, create=create) if self.twice and key.startswith(self.twice) else made

    def list(self, prefix: str) -> Sequence[tuple[str, int]]:
        self.lists += prefix == "packs/"
        return super().list(prefix)


def opened(loop: SimLoop, bucket: MemoryBucket, name: str, cap_bytes: int = CAP_BYTES, **options: Any) -> RemoteBlocks:
    return RemoteBlocks(
        bucket, RESERVED_BYTES + cap_bytes, clock=SimClock(loop), metrics=Metrics(), random=derive(loop.seed, name),
        **{"pack_bytes": 32 * KIB} | options,
    )  # fmt: skip


def stored(bucket: MemoryBucket) -> int:
    return sum(len(data) for key, data in bucket.objects.items() if key.startswith(("packs/", "index/")))


def snapshot(key: str, names: bytes) -> bytes:
    """One without rows whose checksum is right."""
    head = struct.Struct("<4sHHIQ16s")
    facts = (snapshots.MAGIC, snapshots.VERSION, 0, len(names), 0)
    return head.pack(*facts, xxhash.xxh3_128_digest(head.pack(*facts, bytes(16)) + names, seed_of(key))) + names


def run(main: Callable[[SimLoop], Coroutine[Any, Any, None]]) -> None:
    simulate(main, seed=1)


def test_a_pack_that_was_created_though_the_answer_says_no_counts_until_it_is_gone() -> None:
    async def main(loop: SimLoop) -> None:
        bucket = Doubling()
        remote = opened(loop, bucket, "one")
        bucket.twice = "packs/"
        for number in range(40):
            await put_blocks(remote, range(4 * number, 4 * number + 4))
            assert stored(bucket) <= CAP_BYTES
        bucket.twice = ""
        await asyncio.sleep(120)
        for _ in range(3):
            await remote._writing.tend()
            await asyncio.sleep(REFRESH_S)
        assert stored(bucket) == 0 == remote._budget.used_bytes
        assert await put_blocks(remote, range(4)) == [HIT] * 4

    run(main)


def test_a_share_that_came_though_the_answer_says_no_costs_no_pack() -> None:
    async def main(loop: SimLoop) -> None:
        bucket = Doubling()
        remote = opened(loop, bucket, "one")
        assert await put_blocks(remote, range(20)) == [HIT] * 20
        bucket.twice = FOLDER
        for number in range(20, 40, 4):
            await put_blocks(remote, range(number, number + 4))
        assert await read_blocks(remote, range(20)) == [HIT] * 20

    run(main)


def test_what_others_delete_gives_its_room_back() -> None:
    """A rule of the bucket that deletes old objects, say."""

    async def main(loop: SimLoop) -> None:
        bucket = MemoryBucket()
        remote = opened(loop, bucket, "one")
        for number in range(0, 80, 4):
            await put_blocks(remote, range(number, number + 4))
        assert stored(bucket) > CAP_BYTES * 3 // 4
        bucket.delete([key for key in bucket.objects if key.startswith("packs/")])
        await remote._catalog.refresh()
        await asyncio.sleep(REFRESH_S)
        await remote._writing.tend()
        assert await put_blocks(remote, range(100, 104)) == [HIT] * 4

    run(main)


def test_what_comes_late_to_the_dead_is_deleted() -> None:
    """A machine stood still between the decision to write and the request, and was taken for dead meanwhile."""

    async def main(loop: SimLoop) -> None:
        bucket = MemoryBucket()
        one, two = opened(loop, bucket, "one"), opened(loop, bucket, "two")
        dead = one._budget.writer
        for number in range(0, 80, 4):
            await put_blocks(one, range(number, number + 4))
        await one.close()
        for number in range(100, 140, 4):
            await put_blocks(two, range(number, number + 4))
        assert dead in two._budget.adopted
        late = f"packs/{dead}/9999999999"
        bucket.put(late, bytes(40 * KIB))
        await asyncio.sleep(SWEEP_S)
        for _ in range(2):
            await two._writing.tend()
            await asyncio.sleep(SWEEP_S + 1)
        assert late not in bucket.objects and stored(bucket) == two._budget.used_bytes <= CAP_BYTES

    run(main)


@pytest.mark.parametrize("cap_bytes", [CAP_BYTES, 64 * CAP_BYTES])
def test_hundreds_of_short_jobs_do_not_fill_the_ledger(cap_bytes: int) -> None:
    async def main(loop: SimLoop) -> None:
        bucket = MemoryBucket()
        for number in range(200):
            job = opened(loop, bucket, str(number), cap_bytes)
            await job._catalog.refresh()
            assert await put_blocks(job, [2 * number]) == [HIT], number
            if number % 2:  # half of them are so short that nothing is tidied
                await job._writing.tend()
            await job.close()
            assert stored(bucket) <= cap_bytes

    run(main)


def test_what_is_over_goes_though_its_writer_is_gone() -> None:
    async def main(loop: SimLoop) -> None:
        bucket = MemoryBucket()
        one, two = (opened(loop, bucket, name, lifetime_s=3600.0) for name in ("one", "two"))
        await put_blocks(one, range(4))
        await one.close()
        await asyncio.sleep(3700)
        task = loop.create_task(two.run())
        await two.known()
        assert await put_blocks(two, range(100, 104)) == [HIT] * 4
        await asyncio.sleep(LEASE_S)
        assert not [key for key in bucket.objects if key.startswith("packs/") and two._budget.writer not in key]
        task.cancel()

    run(main)


def test_deleting_many_deletes_all_though_one_is_not_there(tmp_path: Path) -> None:
    from obstore.store import LocalStore

    bucket = StoreBucket(LocalStore(str(tmp_path)), "", "files")
    for number in range(40):
        bucket.put(f"packs/a/{number:02}", b"x")
    bucket.delete(["packs/a/gone", *[f"packs/a/{number:02}" for number in range(40)]])
    assert list(bucket.list("packs/")) == []


def test_a_large_bucket_is_listed_less_often() -> None:
    async def main(loop: SimLoop) -> None:
        bucket = Doubling()
        for number in range(20_000):
            bucket.objects[f"packs/{'0' * 16}/{number:010d}"] = b""
        remote = opened(loop, bucket, "one")
        task = loop.create_task(remote.run())
        await asyncio.sleep(1)
        before = bucket.lists
        for _ in range(3600):
            remote.missed()
            await asyncio.sleep(1)
        pages = (bucket.lists - before) * 21
        assert pages <= 3600 / MISSED_S * 1.2
        task.cancel()

    run(main)


def test_credentials_are_neither_taken_nor_repeated() -> None:
    for options in ('{"client_kwargs": {"aws_secret_access_key": "hush"}}', '{"config": [{"sas_token": "hush"}]}'):
        with pytest.raises(ConfigError, match="must not have") as caught:
            parse_options(options)
        assert "hush" not in str(caught.value)
    for url in ("s3://key:hush@bucket/p", "az://container/p?sig=hush", "gs://bucket/p#hush", "s3://b/hush hush?x"):
        with pytest.raises(ConfigError) as caught:
            open_bucket(url)
        assert "hush" not in str(caught.value) or ("?" not in url and "@" not in url and "#" not in url)
    with pytest.raises(ConfigError) as caught:
        open_bucket("s3://bucket/p", parse_options('{"endpoint_url": "http://user:hush@host"}'))
    assert "hush" not in str(caught.value)


def test_what_is_deleted_before_it_is_known_is_not_found_later() -> None:
    async def main(loop: SimLoop) -> None:
        bucket = MemoryBucket()
        one, two = opened(loop, bucket, "one"), opened(loop, bucket, "two")
        await put_blocks(one, range(4))
        two.hide([made_block(2)[0].name.key])
        await two._catalog.refresh()
        assert await read_blocks(two, range(4)) == [HIT, HIT, MISS, HIT]

    run(main)


def test_what_is_deleted_while_it_goes_up_stays_deleted() -> None:
    async def main(loop: SimLoop) -> None:
        bucket = MemoryBucket()
        one = opened(loop, bucket, "one")
        some = [made_block(number) for number in range(4)]
        await one.write(
            [payload for payload, _ in some], [source for _, source in some],
            lambda: one.hide([some[2][0].name.key]),
        )  # fmt: skip
        assert await read_blocks(one, range(4)) == [HIT, HIT, MISS, HIT]

    run(main)


def test_ledgers_that_make_no_sense_stop_writers() -> None:
    good = '{"writer": "a", "bytes": %s, "serial": %s, "wants": false, "closed": false, "of": []}'
    assert decode(1, f"[{good % (1, 1)}]".encode()).given_bytes == 1
    for data in (good % ('"x"', 1), good % (-1, 1), good % (1, "null"), good.replace("[]", "[3]") % (1, 1)):
        with pytest.raises(UnavailableError, match="no ledger"):
            decode(1, f"[{data}]".encode())


@pytest.mark.parametrize("text", ["{}", "[3]", '[["packs/a/1", "x", 0]]', '[["packs/a", 9, "0"]]', "[[1, 2, 3]]", "no"])
def test_snapshots_that_make_no_sense_are_left_out(text: str, caplog: pytest.LogCaptureFixture) -> None:
    async def main(loop: SimLoop) -> None:
        bucket = MemoryBucket()
        one, two = opened(loop, bucket, "one"), opened(loop, bucket, "two")
        for number in range(10):
            await put_blocks(one, [number])
        bucket.objects["index/a/1"] = snapshot("index/a/1", text.encode())
        task = loop.create_task(two.run())
        await two.known()
        assert await read_blocks(two, range(10)) == [HIT] * 10
        await asyncio.sleep(10 * REFRESH_S)
        assert not task.done()
        task.cancel()

    run(main)
    assert len([one for one in caplog.records if "index/a/1" in one.getMessage()]) == (text != "{}")
