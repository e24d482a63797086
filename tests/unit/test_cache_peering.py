"""Caches of several hosts: what one has, another gets; what it may not get, and what it does when that is not well."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from tests.unit.peer_hosts import SIZE, World, value
from tiercache.keys import chain, namespace, object_key, page_key
from tiercache.lease import PageRun
from tiercache.model import Name, Outcome
from tiercache.settings import KIB, MIB
from tiercache.testing.simloop import simulate

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from tiercache.testing.simloop import SimLoop

HIT, MISS = Outcome.HIT, Outcome.MISS
EVERY = (1 << 64) - 1
KEYS = chain(namespace("peers"), [bytes([number]) for number in range(40)])
SEEDS = pytest.mark.parametrize("seed", range(4))


def run(main: Callable[[World], Coroutine[Any, Any, None]], seed: int = 1) -> None:
    async def whole(loop: SimLoop) -> None:
        await main(World(loop))

    simulate(whole, seed=seed)


@SEEDS
def test_a_chain_comes_from_a_peer(seed: int) -> None:
    async def main(world: World) -> None:
        async with world.host("a") as a, world.host("b", "a") as b:
            assert set(await a.cache.put_chain(KEYS, [value(key) for key in KEYS])) == {HIT}
            await b.met()
            await b.sees(KEYS)
            assert b.cache.probe_chain(KEYS, EVERY) == b"\4" * len(KEYS)
            assert await b.matched(KEYS) == len(KEYS)
            assert b.cache.probe_chain(KEYS, EVERY) == b"\1" * len(KEYS)
            await a.until(lambda: a.pinned_bytes == 0)
            # And it is announced by whoever has got it, too.
            await a.sees(KEYS)

    run(main, seed)


@SEEDS
def test_lone_entries_come_from_a_peer_also_where_a_name_stands_twice(seed: int) -> None:
    async def main(world: World) -> None:
        keys = [object_key("x", str(number)) for number in range(20)]
        async with world.host("a") as a, world.host("b", "a") as b:
            assert set(await a.put(keys)) == {HIT}
            await b.sees(keys)
            assert await b.get([*keys, *keys[:3], b"x" * 16]) == [HIT] * 23 + [MISS]
            await a.until(lambda: a.pinned_bytes == 0)

    run(main, seed)


def test_what_a_peer_deleted_is_a_miss_and_no_longer_believed() -> None:
    async def main(world: World) -> None:
        async with world.host("a") as a, world.host("b", "a") as b:
            await a.put(KEYS)
            await b.sees(KEYS)
            await a.cache.delete([Name(key) for key in KEYS[::2]])
            assert await b.get(KEYS) == [MISS, HIT] * 20
            assert b.peers.sees([Name(key) for key in KEYS]) == [False, True] * 20

    run(main)


def test_what_is_deleted_while_it_is_lent_comes_whole() -> None:
    async def main(world: World) -> None:
        async with world.host("a") as a, world.host("b", "a") as b:
            await a.put(KEYS)
            await b.sees(KEYS)
            asking = asyncio.ensure_future(b.get(KEYS))
            await a.until(lambda: a.pinned_bytes)
            await a.cache.delete([Name(key) for key in KEYS])
            assert await asking == [HIT] * len(KEYS)
            await a.until(lambda: a.pinned_bytes == 0)

    run(main)


def test_what_is_over_its_time_is_not_lent() -> None:
    async def main(world: World) -> None:
        async with world.host("a") as a, world.host("b", "a") as b:
            await a.put(KEYS[:10], ttl_s=30)
            await a.put(KEYS[10:])
            await b.sees(KEYS)
            await asyncio.sleep(60)
            assert await b.get(KEYS) == [MISS] * 10 + [HIT] * 30
            await a.until(lambda: a.pinned_bytes == 0)

    run(main)


def test_more_than_a_peer_lends_at_a_time_comes_in_rounds() -> None:
    async def main(world: World) -> None:
        async with world.host("a", lend_bytes=5 * SIZE) as a, world.host("b", "a") as b:
            await a.put(KEYS)
            await b.sees(KEYS)
            assert await b.get(KEYS) == [HIT] * len(KEYS)

    run(main)


PAGE, PART = 64 * KIB, 16 * KIB
RUN = PageRun(page_key("fake", "bucket/file", "1", PAGE, PART), 3 * PAGE + 1000, PAGE, PART)


def test_pages_come_from_a_peer_and_the_rest_from_the_origin() -> None:
    data = value(RUN.key, RUN.size)
    loaded: list[tuple[int, int]] = []

    async def load(gaps: Any, landed: Any) -> None:
        for i, gap in enumerate(gaps):
            loaded.append((gap.ordinal, gap.parts))
            start = gap.ordinal * PAGE
            target, page = gap.target.array(), data[start : start + RUN.page_size(gap.ordinal)]
            for part in range(4):
                if gap.parts >> part & 1:
                    span = slice(part * PART, min(len(page), (part + 1) * PART))
                    target[span] = memoryview(page)[span]
            landed([i])

    async def main(world: World) -> None:
        async with world.host("a") as a, world.host("b", "a") as b:
            (await a.cache.read_pages(RUN, [0, 1, 3], [0b1111, 0b0011, 0b1], load)).release()
            await b.until(lambda: all(b.peers.sees([Name(RUN.key, i) for i in (0, 1, 3)])))
            loaded.clear()
            with await b.cache.read_pages(RUN, [0, 1, 2, 3], [0b1111, 0b0111, 0b1111, 0b1], load) as lease:
                assert lease.outcomes == [HIT] * 4
                assert bytes(lease.view(0)) == data[:PAGE]
                assert bytes(lease.view(1)[: 3 * PART]) == data[PAGE : PAGE + 3 * PART]
                assert bytes(lease.view(2)) == data[2 * PAGE : 3 * PAGE]
                assert bytes(lease.view(3)) == data[3 * PAGE :]
            # The peer has half of page 1: it is not asked to bring the rest, and what it has is not worth two trips.
            assert sorted(loaded) == [(1, 0b0111), (2, 0b1111)]
            assert b.count("hits_total", tier="peer", kind="page") == 2
            assert b.count("misses_total", kind="page") == 2
            await a.until(lambda: a.pinned_bytes == 0)
            (await b.cache.read_pages(RUN, [0], [0b1111], load)).release()
            assert len(loaded) == 2

    run(main)


def test_blocks_that_a_peer_has_in_part_are_no_hit_and_what_is_there_can_be_completed() -> None:
    async def main(world: World) -> None:
        async with world.host("a") as a, world.host("b", "a") as b:
            ticket = a.cache.join_blocks(KEYS[:4], 4 * PART, PART, 0b0011)
            for i in range(4):
                memoryview(ticket.buffers(i).view())[:] = value(KEYS[i], 4 * PART)
            ticket.commit([(i, 0b0011, b"") for i in range(4)])
            ticket.end()
            await asyncio.sleep(5)
            assert await b.matched(KEYS[:4], 4 * PART) == 0
            assert b.cache.probe_chain(KEYS[:4], EVERY) == b""

    run(main)


def test_the_rest_of_a_chain_comes_where_its_beginning_is_here() -> None:
    async def main(world: World) -> None:
        async with world.host("a") as a, world.host("b", "a") as b:
            await a.cache.put_chain(KEYS, [value(key) for key in KEYS])
            await b.cache.put_chain(KEYS[:7], [value(key) for key in KEYS[:7]])
            await b.sees(KEYS)
            assert await b.matched(KEYS) == len(KEYS)

    run(main)


def test_the_middle_of_a_chain_whose_beginning_nobody_has() -> None:
    async def main(world: World) -> None:
        async with world.host("a") as a, world.host("b", "a") as b:
            await a.cache.put_chain(KEYS, [value(key) for key in KEYS])
            await b.sees(KEYS)
            await a.cache.delete([Name(key) for key in KEYS[:5]])
            found = await b.matched(KEYS)
            assert found == 0
            await a.until(lambda: a.pinned_bytes == 0)
            await a.cache.put_chain(KEYS[:5], [value(key) for key in KEYS[:5]])
            await b.sees(KEYS[:5])
            assert await b.matched(KEYS) >= 5

    run(main)


@pytest.mark.slow
def test_what_memory_has_no_room_for_is_spilled_to_a_peer_and_comes_back() -> None:
    async def main(world: World) -> None:
        async with (
            world.host("a", spill=True, memory_bytes=2 * MIB) as a,
            world.host("b", "a", spill=True, memory_bytes=16 * MIB) as b,
        ):
            await a.met()
            await a.until(lambda: max(peer.free_bytes for peer in a.pool.peers.values()) > 8 * MIB)
            keys = [object_key("x", str(number)) for number in range(200)]
            for key in keys:
                await a.put([key])
                await asyncio.sleep(0.1)
            assert a.count("spills_total") > 50
            outcomes = [(await a.get([key]))[0] for key in keys]
            assert outcomes.count(HIT) > 150
            await a.until(lambda: a.pinned_bytes == b.pinned_bytes == 0)

    run(main)


def test_nothing_is_spilled_where_nobody_has_room() -> None:
    async def main(world: World) -> None:
        async with (
            world.host("a", spill=True, memory_bytes=2 * MIB) as a,
            world.host("b", "a", spill=True, memory_bytes=2 * MIB) as b,
        ):
            await a.met()
            own = [object_key("own", str(number)) for number in range(84)]
            await b.put(own)
            await asyncio.sleep(5)
            for number in range(100):
                await a.put([object_key("x", str(number))])
                await asyncio.sleep(0.05)
            assert [outcome for outcome in await b.get(own) if outcome is HIT] == [HIT] * len(own)

    run(main)


def test_published_entries_are_there_before_anybody_asks() -> None:
    async def main(world: World) -> None:
        async with world.host("a") as a, world.host("b", "a") as b:
            await b.met()
            await a.met()
            await a.put(KEYS)
            assert await a.peers.publish([Name(key) for key in KEYS], b.pool.id) == len(KEYS)
            assert b.cache.probe_chain(KEYS[:1], EVERY) in (b"\1", b"")
            world.network.kill("a")
            assert await b.get(KEYS) == [HIT] * len(KEYS)
            await a.until(lambda: a.pinned_bytes == 0)

    run(main)
