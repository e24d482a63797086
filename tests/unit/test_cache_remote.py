"""A cache with object storage behind it: what it uploads, what it loads, and what it does when that is not well."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from tiercache.buffers import Buffer, copy, part_digests
from tiercache.cache import Cache
from tiercache.cpu.tier import MemoryTier
from tiercache.index import Index
from tiercache.keys import chain, namespace, object_key, page_key
from tiercache.lease import PageRun
from tiercache.metrics import Metrics
from tiercache.model import Kind, Name, Outcome, Terms, all_parts
from tiercache.policy import POLICIES
from tiercache.remote.blocks import RemoteBlocks
from tiercache.settings import KIB, MIB, Settings
from tiercache.testing.buckets import FaultyBucket, MemoryBucket
from tiercache.testing.model import made_bytes
from tiercache.testing.simloop import SimClock, derive, simulate

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from tiercache.testing.simloop import SimLoop

HIT, MISS = Outcome.HIT, Outcome.MISS
EVERY = (1 << 64) - 1
KEYS = chain(namespace("remote"), [bytes([number]) for number in range(40)])
SIZE = 20_000
PART_BYTES = 4 * KIB
DEADLINE_S = 2.0


def value(key: bytes, size: int = SIZE) -> bytes:
    return made_bytes(Name(key), size)


class Host:
    """One cache, in memory alone but for the bucket."""

    def __init__(self, loop: SimLoop, bucket: MemoryBucket, name: str, **settings: Any) -> None:
        self.clock, self.metrics = SimClock(loop), Metrics()
        rng = derive(loop.seed, name)
        self.door = FaultyBucket(bucket, rng, self.clock)
        given = {"directory": "/none", "memory_bytes": 4 * MIB, "ssd_bytes": 0, "queue_bytes": 2 * MIB} | settings
        self.settings = Settings(**given)
        self.remote = RemoteBlocks(
            self.door, 16 * MIB, clock=self.clock, metrics=self.metrics, random=rng,
            pack_bytes=128 * KIB, deadline_s=DEADLINE_S,
        )  # fmt: skip
        memory = MemoryTier(self.settings.memory_bytes, shareable=False)
        index = Index(1024, [POLICIES["lru"]()])
        self.cache = Cache(index, memory, None, settings=self.settings, clock=self.clock, metrics=self.metrics)
        self.cache.reach(self.remote)

    async def __aenter__(self) -> Host:
        await self.cache.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.cache.close()

    def count(self, name: str, **labels: str) -> float:
        return self.metrics.value(f"tiercache_{name}", **labels)

    async def uploaded(self, count: int) -> None:
        """Returns when so many entries have gone up."""
        async with asyncio.timeout(600):
            while self.count("uploads_total") < count:
                await asyncio.sleep(0.1)


def run(main: Callable[[SimLoop], Coroutine[Any, Any, None]], seed: int = 1) -> None:
    simulate(main, seed=seed)


async def matched(host: Host, keys: Sequence[bytes] = KEYS) -> int:
    """Length of the prefix that a host has or gets; every byte is compared."""
    with await host.cache.match(keys) as lease:
        for i in range(len(lease)):
            assert bytes(lease.view(i)) == value(keys[i])
        return len(lease)


async def filled(loop: SimLoop, bucket: MemoryBucket) -> None:
    """A host writes the chain, and goes."""
    async with Host(loop, bucket, "first") as host:
        outcomes = await host.cache.put_chain(KEYS, [value(key) for key in KEYS])
        assert outcomes == [HIT] * len(KEYS)
        await host.uploaded(len(KEYS))


def test_another_host_finds_what_one_wrote() -> None:
    async def main(loop: SimLoop) -> None:
        bucket = MemoryBucket()
        await filled(loop, bucket)
        async with Host(loop, bucket, "second") as host:
            await host.remote.known()
            assert host.cache.probe_chain(KEYS, EVERY) == b"\3" * len(KEYS)
            assert host.cache.probe_chain([*KEYS[:5], b"x" * 16], EVERY) == b"\3" * 5
            assert await matched(host) == len(KEYS)
            assert (await host.cache.call("status", {}))["remote"]["health"] == "healthy"
            assert host.cache.stats()['tiercache_tier_used_bytes{tier="remote"}'] > len(KEYS) * SIZE
            assert host.cache.probe_chain(KEYS, EVERY) == b"\1" * len(KEYS)
            assert host.count("hits_total", tier="remote", kind="block") == len(KEYS)
            read = host.count("read_bytes_total", tier="remote")
            assert await matched(host) == len(KEYS)
            assert host.count("read_bytes_total", tier="remote") == read
            # What came from there does not go there again.
            await asyncio.sleep(30)
            assert host.count("uploads_total") == 0

    run(main)


def test_a_prefix_that_is_local_is_not_loaded() -> None:
    async def main(loop: SimLoop) -> None:
        bucket = MemoryBucket()
        await filled(loop, bucket)
        async with Host(loop, bucket, "second") as host:
            await host.remote.known()
            await host.cache.put_chain(KEYS[:10], [value(key) for key in KEYS[:10]])
            assert host.cache.probe_chain(KEYS[:12], EVERY) == b"\1" * 10 + b"\3" * 2
            with await host.cache.lease_blocks(KEYS[:12], EVERY) as lease:
                assert lease.outcomes == [HIT] * 12
            assert host.count("hits_total", tier="remote", kind="block") == 2

    run(main)


def join(host: Host, keys: Sequence[bytes], claim: int, parent: bytes = b"") -> None:
    """Fills these parts of blocks as a rank of an engine does."""
    ticket = host.cache.join_blocks(keys, SIZE, PART_BYTES, claim, (), Terms(Kind.KV, cost_s=0.5), parent=parent)
    landed = []
    for item, key in enumerate(keys):
        source, target = Buffer.of(value(key)), ticket.buffers(item)
        for part in range(5):
            if claim >> part & 1:
                start, stop = part * PART_BYTES, min(SIZE, (part + 1) * PART_BYTES)
                copy(source.slice(start, stop - start), target.slice(start, stop - start))
        landed.append((item, claim, part_digests(source, PART_BYTES)))
    assert ticket.commit(landed) == [HIT] * len(keys)
    ticket.end()


def test_blocks_go_up_when_they_are_whole_and_come_back_in_parts() -> None:
    async def main(loop: SimLoop) -> None:
        bucket = MemoryBucket()
        async with Host(loop, bucket, "first") as host:
            join(host, KEYS[:8], 0b00111)
            await asyncio.sleep(30)
            assert not bucket.list("packs/")
            join(host, KEYS[4:8], 0b11000, KEYS[3])  # the children first: they wait for their parents
            join(host, KEYS[:4], 0b11000)
            await host.uploaded(8)
        async with Host(loop, bucket, "second") as host:
            await host.remote.known()
            with await host.cache.lease_blocks(KEYS[:8], 0b00010) as lease:
                assert lease.outcomes == [HIT] * 8
                for i in range(8):
                    got = bytearray(PART_BYTES)
                    span = range(PART_BYTES, 2 * PART_BYTES)
                    assert lease.copy_into(i, span.start, span.stop, Buffer.of(got, writable=True)) is HIT
                    assert bytes(got) == value(KEYS[i])[span.start : span.stop]
            assert host.count("read_bytes_total", tier="remote") == 8 * PART_BYTES
            assert host.cache.probe_chain(KEYS[:8], 0b00010) == b"\1" * 8
            assert host.cache.probe_chain(KEYS[:8], 0b00110) == b"\3" * 8
            assert await matched(host, KEYS[:8]) == 8
            # All parts are there once, and nothing goes up again.
            assert host.count("read_bytes_total", tier="remote") == 8 * 5 * PART_BYTES
            await asyncio.sleep(30)
            assert host.count("uploads_total") == 0

    run(main)


def test_tensors_go_up_and_pages_do_not() -> None:
    async def main(loop: SimLoop) -> None:
        bucket = MemoryBucket()
        name = Name(object_key("tensors", "one"))
        async with Host(loop, bucket, "first") as host:
            key = page_key("origin", "path", "version", 64 * KIB, PART_BYTES)

            async def load(gaps, landed) -> None:
                landed(list(range(len(gaps))))

            page = PageRun(key, 64 * KIB, 64 * KIB, PART_BYTES)
            with await host.cache.read_pages(page, [0], [all_parts(64 * KIB, PART_BYTES)], load) as lease:
                assert lease.outcomes == [HIT]
            assert await host.cache.put([name], [value(name.key, 100_000)], kind=Kind.TENSOR) == [HIT]
            await host.uploaded(1)
            await asyncio.sleep(30)
            assert host.count("uploads_total") == 1
        async with Host(loop, bucket, "second") as host:
            target = bytearray(100_000)
            assert await host.cache.get_into([name], [Buffer.of(target, writable=True)]) == [HIT]
            assert bytes(target) == value(name.key, 100_000)
            with await host.cache.lease([Name(KEYS[0]), name, Name(b"k" * 32)]) as lease:
                assert lease.outcomes == [MISS, HIT, MISS]
            assert await host.cache.delete([name]) == [HIT]
            assert await host.cache.get_into([name], [Buffer.of(target, writable=True)]) == [MISS]
            assert await host.cache.put([name], [value(name.key, 100_000)], kind=Kind.TENSOR) == [HIT]
            await host.uploaded(1)

    run(main)


def test_what_waits_goes_up_at_the_end() -> None:
    async def main(loop: SimLoop) -> None:
        bucket = MemoryBucket()
        async with Host(loop, bucket, "first") as host:
            await host.cache.put_chain(KEYS[:3], [value(key) for key in KEYS[:3]])
        async with Host(loop, bucket, "second") as host:
            assert await matched(host) == 3

    run(main)


@pytest.mark.parametrize("seed", range(20))
def test_closing_while_something_goes_up_loses_nothing(seed: int) -> None:
    async def main(loop: SimLoop) -> None:
        bucket = MemoryBucket()
        async with Host(loop, bucket, "first", memory_bytes=4 * MIB) as host:
            await host.cache.put_chain(KEYS, [value(key) for key in KEYS])
            await asyncio.sleep(derive(seed, "moment").uniform(0, 0.1) + 2.0 * (seed % 2))
        async with Host(loop, bucket, "second") as host:
            assert await matched(host) == len(KEYS)

    run(main, seed)


def test_children_go_up_though_their_parents_were_dropped() -> None:
    async def main(loop: SimLoop) -> None:
        bucket = MemoryBucket()
        async with Host(loop, bucket, "first", memory_bytes=16 * MIB) as host:
            host.door.down = True
            await host.cache.put_chain(KEYS[:10], [value(key) for key in KEYS[:10]])
            await asyncio.sleep(30)
            assert host.count("uploads_dropped_total") == 10
            host.door.down = False
            await asyncio.sleep(120)
            await host.cache.put_chain(KEYS[:12], [value(key) for key in KEYS[:12]])
            await host.uploaded(12)
        async with Host(loop, bucket, "second") as host:
            assert await matched(host, KEYS[:12]) == 12

    run(main)


def test_uploads_are_dropped_first() -> None:
    async def main(loop: SimLoop) -> None:
        bucket = MemoryBucket()
        async with Host(loop, bucket, "first", queue_bytes=5 * SIZE) as host:
            assert await host.cache.put_chain(KEYS, [value(key) for key in KEYS]) == [HIT] * len(KEYS)
            assert host.count("uploads_dropped_total") == len(KEYS) - 5
            host.door.down = True
            await asyncio.sleep(300)
            assert await host.cache.put_chain(KEYS, [value(key) for key in KEYS]) == [HIT] * len(KEYS)
            assert await matched(host) == len(KEYS)
            assert not bucket.list("packs/")

    run(main)


def test_two_who_want_the_same_load_it_once() -> None:
    async def main(loop: SimLoop) -> None:
        bucket = MemoryBucket()
        await filled(loop, bucket)
        async with Host(loop, bucket, "second") as host:
            assert await asyncio.gather(*[matched(host) for _ in range(5)]) == [len(KEYS)] * 5
            assert host.count("hits_total", tier="remote", kind="block") == len(KEYS)

    run(main)


@pytest.mark.parametrize("seed", range(10))
def test_a_reader_that_gives_up_leaves_nothing_behind(seed: int) -> None:
    async def main(loop: SimLoop) -> None:
        bucket = MemoryBucket()
        await filled(loop, bucket)
        async with Host(loop, bucket, "second") as host:
            await host.remote.known()
            one, two = (loop.create_task(matched(host)) for _ in range(2))
            await asyncio.sleep(derive(seed, "moment").uniform(0, 0.03))
            one.cancel()
            await asyncio.wait([one])
            assert await two == len(KEYS)
            host.cache.tiers.drain()
            assert host.cache.tiers.index.pins == 0
            host.cache.tiers.index.validate()

    run(main, seed)


def test_a_bucket_that_is_gone_costs_one_deadline_and_no_byte() -> None:
    async def main(loop: SimLoop) -> None:
        bucket = MemoryBucket()
        await filled(loop, bucket)
        async with Host(loop, bucket, "second") as host:
            await host.remote.known()
            host.door.down = True
            began_s = loop.time()
            for _ in range(10):
                assert await matched(host) == 0
            assert loop.time() - began_s <= DEADLINE_S
            assert await host.cache.put_chain(KEYS[:4], [value(key) for key in KEYS[:4]]) == [HIT] * 4
            assert await matched(host) == 4
            host.door.down = False
            await asyncio.sleep(120)
            assert await matched(host) == len(KEYS)

    run(main)


def test_damage_in_the_bucket_is_a_miss() -> None:
    async def main(loop: SimLoop) -> None:
        bucket = MemoryBucket()
        await filled(loop, bucket)
        for key, data in list(bucket.objects.items()):
            if key.startswith("packs/") and (at := data.find(value(KEYS[7])[:100])) >= 0:
                bucket.objects[key] = data[: at + 5000] + bytes([data[at + 5000] ^ 1]) + data[at + 5001 :]
        async with Host(loop, bucket, "second") as host:
            assert await matched(host) == 7
            assert host.count("corruptions_total", tier="remote") == 1
            assert await matched(host) == 7

    run(main)


def test_a_host_that_is_full_takes_what_it_can() -> None:
    async def main(loop: SimLoop) -> None:
        bucket = MemoryBucket()
        await filled(loop, bucket)
        async with Host(loop, bucket, "small", memory_bytes=2 * MIB, queue_bytes=MIB) as host:
            keys = [object_key("filler", str(number)) for number in range(90)]
            names = [Name(key) for key in keys]
            assert await host.cache.put(names, [value(key) for key in keys]) == [HIT] * 90
            lease = await host.cache.lease(names[-80:])  # held: there is no room for all of the chain
            assert 0 < await matched(host) < len(KEYS)
            lease.release()
            assert await matched(host) == len(KEYS)

    run(main)
