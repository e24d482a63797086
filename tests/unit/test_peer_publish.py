"""Publishing while there is no room to pin what is published: what waits, what does not, and what waiting costs."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from tests.unit.peer_hosts import SIZE, Host, World
from tiercache.keys import object_key
from tiercache.model import Name
from tiercache.settings import KIB
from tiercache.testing.simloop import simulate

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from tiercache.testing.simloop import SimLoop

KEYS = [object_key("publish", str(number)) for number in range(20)]
EVERY = (1 << 64) - 1
ROOM = 24 * KIB
"""What one entry takes, with some to spare."""


def run(main: Callable[[Host, Host], Coroutine[Any, Any, None]], lend_bytes: int) -> None:
    async def whole(loop: SimLoop) -> None:
        world = World(loop)
        async with world.host("a", lend_bytes=lend_bytes) as a, world.host("b", "a") as b:
            await a.met()
            await b.met()
            await main(a, b)

    simulate(whole, seed=1)


def names(some: list[bytes]) -> list[Name]:
    return [Name(key) for key in some]


def test_what_is_not_there_is_not_waited_for() -> None:
    async def main(a: Host, b: Host) -> None:
        a.peers.quota.used_bytes += 100  # somebody has something pinned
        async with asyncio.timeout(1):
            assert await a.peers.publish(names(KEYS), b.pool.id) == 0
        a.peers.quota.free(100)

    run(main, 10 * ROOM)


def test_what_is_larger_than_all_of_the_room_is_left_out() -> None:
    async def main(a: Host, b: Host) -> None:
        await a.put(KEYS[:2], 3 * ROOM)
        await a.put(KEYS[2:5])
        async with asyncio.timeout(10):
            assert await a.peers.publish(names(KEYS[:5]), b.pool.id) == 3

    run(main, 2 * ROOM)


def test_those_who_wait_for_room_leave_each_other_alone_and_all_get_some() -> None:
    async def main(a: Host, b: Host) -> None:
        await a.put(KEYS)
        lent = 0
        real = a.peers.lender.lend

        async def lend(*asked: Any) -> Any:
            nonlocal lent
            lent += 1
            return await real(*asked)

        a.peers.lender.lend = lend  # type: ignore[method-assign]
        a.peers.quota.used_bytes += ROOM  # somebody has it pinned
        waiting = [asyncio.ensure_future(a.peers.publish([name], b.pool.id)) for name in names(KEYS)]
        for _ in range(500):
            await asyncio.sleep(0)
        assert lent <= 2
        a.peers.quota.free(ROOM)
        async with asyncio.timeout(60):
            assert await asyncio.gather(*waiting) == [1] * len(KEYS)
        assert lent <= 3 * len(KEYS)
        assert not a.pinned_bytes

    run(main, ROOM + SIZE // 2)
