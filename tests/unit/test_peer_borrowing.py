"""Borrowing and lending: what is cut into streams, and what a network may do to them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.peer_hosts import DEADLINE_S, SIZE, World
from tiercache.keys import object_key
from tiercache.model import Name, Outcome, Payload, all_parts, part_count
from tiercache.peer import borrowing, peers
from tiercache.peer.borrowing import cut, runs_of
from tiercache.settings import KIB, MIB
from tiercache.testing.faults import Fault, Script
from tiercache.testing.simloop import derive, simulate
from tiercache.testing.transports.faulty import FaultyTransport

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from tiercache.testing.faults import Schedule
    from tiercache.testing.simloop import SimLoop
    from tiercache.transport import Transport

HIT, MISS = Outcome.HIT, Outcome.MISS
KEYS = [object_key("borrowing", str(number)) for number in range(30)]
LARGE = 300 * KIB
"""More than goes as a stream where reading is the faster way."""


def run(main: Callable[[World], Coroutine[Any, Any, None]], seed: int = 1) -> None:
    async def whole(loop: SimLoop) -> None:
        await main(World(loop))

    simulate(whole, seed=seed)


# -- cutting -------------------------------------------------------------------------------------------------------


@st.composite
def entries(draw: st.DrawFn) -> Payload:
    step = draw(st.sampled_from([1, 64, 100, 512, 4096]))
    size = draw(st.integers(1, 64 * step))
    assert part_count(size, step) <= 64
    return Payload(Name(bytes(16)), size, step, draw(st.integers(1, all_parts(size, step))), b"")


@given(st.lists(entries(), max_size=8), st.integers(1, 20_000))
def test_streams_cover_what_is_wanted_once_and_in_order(wanted: list[Payload], most: int) -> None:
    runs = runs_of(wanted, [10 * i for i in range(len(wanted))])
    covered = [(run.at, run.first, run.last) for run in runs]
    assert all(run.item == 10 * run.at for run in runs)
    streams = list(cut(runs, wanted, most))
    got: dict[int, list[int]] = {}
    last = (-1, -1)
    for stream in streams:
        assert stream
        assert sum(run.stop - run.start for run in stream) <= most
        for run in stream:
            one = wanted[run.at]
            assert run.item == 10 * run.at
            assert 0 <= run.start < run.stop <= one.size
            assert run.start == run.first * one.part_bytes
            assert run.stop == min(one.size, run.last * one.part_bytes)
            assert last <= (run.at, run.first)
            last = (run.at, run.last)
            got.setdefault(run.at, []).extend(range(run.first, run.last))
    for at, one in enumerate(wanted):
        here = [part for part in range(64) if one.parts >> part & 1]
        assert sorted(got.get(at, [])) == got.get(at, []), "a part twice, or out of order"
        if one.part_bytes <= most:
            assert got.get(at, []) == here
        else:
            assert set(got.get(at, [])) <= set(here)
    assert covered == [(run.at, run.first, run.last) for run in runs]


def test_a_stream_has_so_many_runs_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(borrowing, "RUNS_MAX", 3)
    wanted = [Payload(Name(bytes(16)), 64, 1, 0x5555_5555, b"")]
    streams = list(cut(runs_of(wanted, [0]), wanted, 1000))
    assert [len(stream) for stream in streams] == [3, 3, 3, 3, 3, 1]


# -- faults --------------------------------------------------------------------------------------------------------


def faulty(schedule: Schedule) -> Callable[[Transport], Transport]:
    return lambda inner: FaultyTransport(inner, schedule)


READ_FAULTS = [Fault.ERROR, Fault.LATE_ERROR, Fault.STALL, Fault.VANISH, Fault.CORRUPT, Fault.SHORT, Fault.DELAY]


@pytest.mark.parametrize("fault", READ_FAULTS)
def test_a_fault_of_reading_is_a_miss_or_the_right_bytes(fault: Fault) -> None:
    async def main(world: World) -> None:
        schedule = Script({})
        async with (
            world.host("a", memory_bytes=16 * MIB, lend_bytes=8 * MIB) as a,
            world.host("b", "a", wrap=faulty(schedule), memory_bytes=32 * MIB) as b,
        ):
            await a.put(KEYS, LARGE)
            await b.sees(KEYS[:20])
            schedule.add("read", fault)
            async with asyncio.timeout(20 * DEADLINE_S):
                outcomes = await b.get(KEYS[:10], LARGE)
            assert set(outcomes) <= {HIT, MISS}
            damaged = b.count("corruptions_total", tier="peer")
            assert (damaged > 0) == (fault in (Fault.CORRUPT, Fault.SHORT))
            await a.until(lambda: a.pinned_bytes == 0)
            assert b.peers.gate.used_bytes == 0
            await b.met()
            await b.sees(KEYS[10:20])
            assert await b.get(KEYS[10:20], LARGE) == [HIT] * 10

    run(main)


def test_what_came_before_a_link_failed_is_kept() -> None:
    async def main(world: World) -> None:
        schedule = Script({})
        async with (
            world.host("a", memory_bytes=16 * MIB, lend_bytes=8 * MIB) as a,
            world.host("b", "a", wrap=faulty(schedule), memory_bytes=32 * MIB) as b,
        ):
            await a.put(KEYS, LARGE)
            await b.sees(KEYS)
            schedule.add("read", None, None, Fault.STALL)  # two streams come, the third never ends
            outcomes = await b.get(KEYS[:20], LARGE)
            assert HIT in outcomes
            assert MISS in outcomes
            assert b.count("corruptions_total", tier="peer") == 0

    run(main)


@pytest.mark.parametrize("fault", [Fault.ERROR, Fault.LATE_ERROR, Fault.STALL, Fault.DELAY])
def test_a_fault_of_writing_is_a_miss_or_the_right_bytes(fault: Fault) -> None:
    async def main(world: World) -> None:
        schedule = Script({})
        async with world.host("a", wrap=faulty(schedule)) as a, world.host("b", "a") as b:
            await a.put(KEYS)
            await b.sees(KEYS)
            schedule.add("write", fault)
            async with asyncio.timeout(20 * DEADLINE_S):
                assert set(await b.get(KEYS)) <= {HIT, MISS}
            assert b.count("corruptions_total", tier="peer") == 0
            await a.until(lambda: a.pinned_bytes == 0)
            assert b.peers.gate.used_bytes == 0
            await b.met()
            await b.sees(KEYS)
            assert await b.get(KEYS) == [HIT] * len(KEYS)

    run(main)


@pytest.mark.parametrize("size", [1, 63, 4096, SIZE, LARGE, MIB - 1, 3 * MIB])
@pytest.mark.parametrize("pushed", [False, True])
def test_entries_of_all_sizes_by_both_ways(size: int, pushed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "SLOT_BYTES_MIN", 256 * KIB)  # so that some parts are larger than a slot
    if not pushed:
        monkeypatch.setattr(borrowing, "STREAM_BYTES_MAX", 0)

    async def main(world: World) -> None:
        async with (
            world.host("a", memory_bytes=32 * MIB, lend_bytes=16 * MIB) as a,
            world.host("b", "a", memory_bytes=32 * MIB) as b,
        ):
            keys = KEYS[: max(1, min(30, 8 * MIB // size))]
            assert set(await a.put(keys, size)) == {HIT}
            await b.sees(keys)
            if pushed:
                for peer in b.pool.peers.values():
                    monkeypatch.setattr(type(peer.link), "pushes", True)
            assert await b.get(keys, size) == [HIT] * len(keys)
            await a.until(lambda: a.pinned_bytes == 0)
            assert b.count("read_bytes_total", tier="peer") == size * len(keys)

    run(main)


# -- lending -------------------------------------------------------------------------------------------------------


def test_who_asks_waits_for_the_quota_and_gets_it() -> None:
    async def main(world: World) -> None:
        async with (
            world.host("a", lend_bytes=4 * (SIZE + 480)) as a,
            world.host("b", "a") as b,
            world.host("c", "a") as c,
        ):
            await a.put(KEYS)
            await b.sees(KEYS)
            await c.sees(KEYS)
            most = 0

            async def watch() -> None:
                nonlocal most
                while True:
                    most = max(most, a.pinned_bytes)
                    await asyncio.sleep(0)
                    await asyncio.sleep(0.0005)

            watching = asyncio.ensure_future(watch())
            found = await asyncio.gather(b.get(KEYS[:15]), c.get(KEYS[15:]))
            assert [one for outcomes in found for one in outcomes].count(HIT) >= 15
            assert 0 < most <= 4 * (SIZE + 480)
            watching.cancel()
            await asyncio.wait([watching])
            await a.until(lambda: a.pinned_bytes == 0)
            assert await b.get(KEYS[:15]) == [HIT] * 15
            assert await c.get(KEYS[15:]) == [HIT] * 15

    run(main)


@pytest.mark.parametrize("seed", range(10))
def test_whoever_gives_up_leaves_nothing_pinned(seed: int) -> None:
    async def main(world: World) -> None:
        rng = derive(seed, "giving up")
        async with world.host("a") as a, world.host("b", "a") as b, world.host("c", "a b") as c:
            await a.put(KEYS[:20])
            await b.put(KEYS[20:])
            for _ in range(30):
                await c.sees(KEYS)
                asking = asyncio.ensure_future(c.get(KEYS))
                await asyncio.sleep(rng.uniform(0, 0.02))
                asking.cancel()
                await asyncio.wait([asking])
                await c.cache.call("evict", {"keys": [key.hex() for key in KEYS]})
            await a.until(lambda: a.pinned_bytes == 0)
            await b.until(lambda: b.pinned_bytes == 0)
            assert c.peers.gate.used_bytes == 0
            assert await c.get(KEYS) == [HIT] * len(KEYS)

    run(main, seed)


def test_a_peer_that_is_gone_keeps_nothing() -> None:
    async def main(world: World) -> None:
        async with world.host("a") as a, world.host("b", "a") as b:
            await a.put(KEYS)
            await b.sees(KEYS)
            found = await b.peers.ask([Name(key) for key in KEYS], [(1 << 64) - 1] * len(KEYS))
            assert len(found.payloads) == len(KEYS)
            assert a.pinned_bytes >= len(KEYS) * SIZE
            await asyncio.sleep(60)
            assert a.pinned_bytes >= len(KEYS) * SIZE
            world.network.cut("a", "b")
            await asyncio.sleep(2 * DEADLINE_S)
            assert a.pinned_bytes == 0
            found.end()
            found.end()

    run(main)


@pytest.mark.parametrize("seed", range(4))
def test_a_cache_that_closes_while_it_lends(seed: int) -> None:
    async def main(world: World) -> None:
        rng = derive(seed, "closing")
        for _ in range(10):
            a, b = await world.host("a").start(), await world.host("b", "a").start()
            await a.put(KEYS)
            await b.sees(KEYS)
            asking = asyncio.ensure_future(b.get(KEYS))
            await asyncio.sleep(rng.uniform(0, 0.02))
            await (a, b)[rng.randrange(2)].cache.close()
            async with asyncio.timeout(10 * DEADLINE_S):
                await asyncio.wait([asking])
            asking.exception()
            assert a.pinned_bytes == 0 or not a.cache._closed
            await a.cache.close()
            await b.cache.close()
            assert a.pinned_bytes == b.pinned_bytes == 0

    run(main)


def test_what_was_deleted_here_does_not_come_back_from_a_peer() -> None:
    async def main(world: World) -> None:
        async with world.host("a") as a, world.host("b", "a") as b:
            await a.put(KEYS)
            await b.sees(KEYS)
            assert await b.get(KEYS) == [HIT] * len(KEYS)
            await a.sees(KEYS)
            names = [Name(key) for key in KEYS]
            assert await a.cache.delete(names[:5]) == [HIT] * 5
            assert await a.get(KEYS) == [MISS] * 5 + [HIT] * (len(KEYS) - 5)
            assert await b.get(KEYS) == [HIT] * len(KEYS)  # deleting is nobody else's affair
            await a.put(KEYS[:5])
            assert await a.get(KEYS) == [HIT] * len(KEYS)

    run(main)


def test_a_read_waits_for_a_slow_rate_only_so_long() -> None:
    async def main(world: World) -> None:
        async with (
            world.host("a", memory_bytes=16 * MIB, lend_bytes=8 * MIB) as a,
            world.host("b", "a", memory_bytes=32 * MIB, peer_rate_bytes_s=1024) as b,
        ):
            await a.put(KEYS, LARGE)
            await b.sees(KEYS)
            began_s = world.loop.time()
            assert MISS in await b.get(KEYS, LARGE)
            assert world.loop.time() - began_s < 20 * DEADLINE_S  # all of it would take more than two hours
            assert b.peers.gate.used_bytes == b.peers.gate.ahead_bytes == 0
            await a.until(lambda: a.pinned_bytes == 0)

    run(main)
