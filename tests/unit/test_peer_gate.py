"""Gate: never over the room, who comes first, what a rate allows, and who goes away meanwhile."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from tiercache.peer.gate import BURST_S, Gate, Priority
from tiercache.testing.simloop import SimClock, derive, simulate

if TYPE_CHECKING:
    from tiercache.testing.simloop import SimLoop

READ, PUBLISHED, SPILLED = Priority.READ, Priority.PUBLISHED, Priority.SPILLED


@pytest.mark.parametrize("seed", range(30))
def test_never_over_the_room_and_all_who_stay_get_in(seed: int) -> None:
    async def main(loop: SimLoop) -> None:
        rng = derive(seed, "gate")
        gate = Gate(100, rng.choice([0.0, 500.0]), SimClock(loop))
        inside: list[int] = []

        async def one() -> None:
            size = rng.choice([1, 10, 60, 100, 1000])
            async with gate.admit(size, rng.choice(list(Priority)), rng.choice([0, 0, 50])):
                inside.append(min(size, 100))
                try:
                    assert sum(inside) <= gate.used_bytes <= 100
                    await asyncio.sleep(rng.uniform(0, 1))
                finally:
                    inside.remove(min(size, 100))

        tasks = []
        for _ in range(60):
            tasks.append(asyncio.ensure_future(one()))
            await asyncio.sleep(rng.uniform(0, 0.3))
            if rng.random() < 0.4:
                rng.choice(tasks).cancel()  # in every state there is: unborn, waiting, admitted, paced, inside, over
        for found in await asyncio.gather(*tasks, return_exceptions=True):
            assert found is None or isinstance(found, asyncio.CancelledError)
        assert gate.used_bytes == 0

    simulate(main, seed=seed)


def order(sizes: list[tuple[str, int, Priority]], held: int = 100) -> list[str]:
    """Who gets in in which order, while somebody else holds `held` at first."""
    entered: list[str] = []

    async def main() -> None:
        gate = Gate(100, 0.0, _Still())

        async def one(name: str, size: int, priority: Priority) -> None:
            async with gate.admit(size, priority):
                entered.append(name)
                await asyncio.sleep(0)

        async with gate.admit(held, READ):
            tasks = [asyncio.ensure_future(one(*each)) for each in sizes]
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            entered.append("-")
        await asyncio.gather(*tasks)
        assert gate.used_bytes == 0

    asyncio.run(main())
    return entered


class _Still:
    def monotonic(self) -> float:
        return 0.0

    def wall(self) -> float:
        return 0.0


def test_the_order_is_that_of_priorities_and_then_of_coming() -> None:
    given = [("s1", 100, SPILLED), ("r1", 100, READ), ("p1", 100, PUBLISHED), ("r2", 100, READ), ("s2", 100, SPILLED)]
    assert order(given) == ["-", "r1", "r2", "p1", "s1", "s2"]


def test_who_comes_first_does_not_wait_for_room_that_another_needs() -> None:
    assert order([("s", 80, SPILLED), ("r", 30, READ)], held=50) == ["r", "-", "s"]


def test_the_large_are_not_starved_by_the_small() -> None:
    assert order([("large", 90, READ), ("small", 10, READ)], held=50) == ["-", "large", "small"]


def test_a_rate_holds_also_for_single_reads() -> None:
    async def main(loop: SimLoop) -> None:
        gate = Gate(1 << 30, 1000.0, SimClock(loop))
        for number in range(1, 21):
            async with gate.admit(500, READ):
                pass
            assert number * 500 <= 1000 * (loop.time() + BURST_S) + 1e-6
        began = loop.time()
        await asyncio.sleep(100)  # what was not used then is not saved
        async with gate.admit(500, READ):
            pass
        assert loop.time() - began - 100 >= 0.5 - BURST_S - 1e-6

    simulate(main, seed=1)
