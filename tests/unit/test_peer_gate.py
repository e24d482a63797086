"""The gate of a cache towards its peers: room, order and rate, in virtual time."""

from __future__ import annotations

import asyncio

from tiercache.peer.gate import BURST_S, Gate, Priority
from tiercache.testing.simloop import SimClock, SimLoop, simulate

MIB = 1 << 20


async def _all(gate: Gate, moves: list[int], takes: int = 0) -> float:
    """Seconds that it takes until all of these were let in."""
    loop = asyncio.get_running_loop()
    began_s = loop.time()

    async def one(size: int) -> None:
        async with gate.admit(size, Priority.READ, takes):
            await asyncio.sleep(0)

    await asyncio.gather(*[one(size) for size in moves])
    return loop.time() - began_s


def test_a_rate_holds_for_a_single_read_and_for_many() -> None:
    async def main(loop: SimLoop) -> None:
        gate = Gate(64 * MIB, 10.0 * MIB, SimClock(loop))
        for moves in ([8 * MIB], [MIB] * 40):
            await asyncio.sleep(1)
            seconds = await _all(gate, moves)
            assert sum(moves) <= 10 * MIB * (seconds + BURST_S) + 1
            assert sum(moves) >= 10 * MIB * (seconds - 0.1)

    simulate(main, 1)


def test_a_small_stream_pays_for_its_bytes_not_for_its_slot() -> None:
    async def main(loop: SimLoop) -> None:
        gate = Gate(64 * MIB, 10.0 * MIB, SimClock(loop))
        assert await _all(gate, [100_000] * 10, takes=8 * MIB) < 0.2

    simulate(main, 1)


def test_room_is_never_exceeded_and_readers_come_first() -> None:
    async def main(loop: SimLoop) -> None:
        gate, order, most = Gate(16 * MIB, 0.0, SimClock(loop)), list[Priority](), 0

        async def one(priority: Priority) -> None:
            nonlocal most
            async with gate.admit(6 * MIB, priority):
                order.append(priority)
                most = max(most, gate.used_bytes)
                await asyncio.sleep(0.1)

        async with asyncio.TaskGroup() as group, gate.admit(16 * MIB, Priority.READ):
            for priority in (Priority.SPILLED, Priority.PUBLISHED, Priority.READ) * 10:
                group.create_task(one(priority))
            await asyncio.sleep(1)
            assert not order
        assert most == 12 * MIB
        assert order == sorted(order)

    simulate(main, 1)
