"""A link that is slow, and is the only one: everything comes, however much of it is under way at a time."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from tests.unit.peer_hosts import DEADLINE_S, SIZE, World
from tiercache.errors import UnavailableError
from tiercache.keys import object_key
from tiercache.model import Outcome
from tiercache.peer import gate
from tiercache.settings import MIB
from tiercache.testing.simloop import simulate
from tiercache.testing.transports.faulty import FaultyLink, FaultyTransport

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tiercache.testing.faults import Schedule
    from tiercache.testing.simloop import SimLoop
    from tiercache.transport import Link, Move, Transport

KEYS = [object_key("slow", str(number)) for number in range(100)]


class Slow(FaultyTransport):
    """All of its links share one wire."""

    def __init__(self, inner: Transport, schedule: Schedule, rate_bytes_s: float) -> None:
        super().__init__(inner, schedule)
        self.rate_bytes_s, self.wire = rate_bytes_s, asyncio.Lock()

    async def connect(self, address: bytes, deadline_s: float) -> Link:
        return SlowLink(await self.inner.connect(address, deadline_s), self)


class SlowLink(FaultyLink):
    def __init__(self, inner: Link, transport: Slow) -> None:
        super().__init__(inner, transport)
        self.slow = transport

    async def read(self, moves: Sequence[Move], deadline_s: float) -> list[Outcome]:
        await self._pass(moves, deadline_s)
        return await self.inner.read(moves, deadline_s)

    async def write(self, moves: Sequence[Move], deadline_s: float) -> list[Outcome]:
        await self._pass(moves, deadline_s)
        return await self.inner.write(moves, deadline_s)

    async def _pass(self, moves: Sequence[Move], deadline_s: float) -> None:
        try:
            async with asyncio.timeout(deadline_s), self.slow.wire:
                await asyncio.sleep(sum(move.length for move in moves) / self.slow.rate_bytes_s)
        except TimeoutError:
            raise UnavailableError("not in time") from None


@pytest.mark.parametrize("size", [SIZE, 300_000])
def test_what_shares_a_slow_link_all_comes(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = KEYS if size == SIZE else KEYS[:7]
    rate_bytes_s = len(keys) * size / (3 * DEADLINE_S)
    monkeypatch.setattr(gate, "SLOWEST_BYTES_S", 0.8 * rate_bytes_s)

    async def main(loop: SimLoop) -> None:
        world = World(loop)
        more = {"memory_bytes": 64 * MIB, "landing_bytes": 8 * MIB, "lend_bytes": 32 * MIB}
        hosts = [
            world.host(name, others, wrap=lambda one: Slow(one, lambda operation: None, rate_bytes_s), **more)
            for name, others in (("a", ""), ("b", "a"))
        ]
        async with hosts[0] as a, hosts[1] as b:
            await a.put(keys, size)
            await b.sees(keys)
            (peer,) = b.pool.peers.values()
            assert await b.get(keys, size) == [Outcome.HIT] * len(keys)
            assert list(b.pool.peers.values()) == [peer]

    simulate(main, seed=1)
