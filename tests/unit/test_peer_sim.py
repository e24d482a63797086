"""Three caches in a simulation, which are killed, cut off, and lied to by their network: a get gives the right bytes or
a miss, in time; and after all that they find each other again, and nothing stays pinned."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from tests.unit.peer_hosts import DEADLINE_S, Host, World, value
from tiercache.keys import chain, namespace, object_key
from tiercache.model import Name, Outcome
from tiercache.settings import MIB
from tiercache.testing.faults import Dice, Fault
from tiercache.testing.simloop import derive, simulate
from tiercache.testing.transports.faulty import FaultyTransport

if TYPE_CHECKING:
    import random

    from tiercache.testing.simloop import SimLoop
    from tiercache.transport import Transport

HOSTS = ("a", "b", "c")
LONE = [object_key("sim", str(number)) for number in range(40)]
CHAINS = [chain(namespace("sim"), [bytes([which, number]) for number in range(20)]) for which in range(4)]
PATIENCE_S = 60.0
"""No call takes longer, whatever happens: two rounds of a question and a read."""
RATES = {
    Fault.ERROR: 0.02, Fault.LATE_ERROR: 0.02, Fault.DELAY: 0.1, Fault.STALL: 0.01,
    Fault.VANISH: 0.03, Fault.CORRUPT: 0.05, Fault.SHORT: 0.03,
}  # fmt: skip


class Upheaval:
    """Three hosts, and what befalls them."""

    def __init__(self, loop: SimLoop, *, faulty: bool) -> None:
        self.world = World(loop)
        self.rng = derive(loop.seed, "upheaval")
        self.faulty, self.calm = faulty, False
        self.schedules: list[Dice] = []
        self.hosts: dict[str, Host] = {}
        self.users: dict[str, list[asyncio.Task[None]]] = {}

    def wrap(self, inner: Transport) -> Transport:
        schedule = Dice(derive(self.rng.random(), "faults"), RATES if self.faulty else {})
        schedule.on = not self.calm
        self.schedules.append(schedule)
        return FaultyTransport(inner, schedule)

    async def start(self, name: str) -> None:
        others = " ".join(one for one in HOSTS if one != name)
        host = self.world.host(
            name, others, wrap=self.wrap, spill=self.rng.random() < 0.5, memory_bytes=2 * MIB, lend_bytes=MIB
        )
        await host.start()
        self.hosts[name] = host
        rng = derive(self.rng.random(), name)
        self.users[name] = [asyncio.ensure_future(self.use(host, rng)) for _ in range(3)]

    async def use(self, host: Host, rng: random.Random) -> None:
        while True:
            await asyncio.sleep(rng.uniform(0, 1.5))
            digests = rng.choice(CHAINS)
            choice = rng.random()
            async with asyncio.timeout(PATIENCE_S):
                if choice < 0.2:
                    await host.put(rng.sample(LONE, 3))
                elif choice < 0.3:
                    length = rng.randint(1, len(digests))
                    await host.cache.put_chain(digests[:length], [value(key) for key in digests[:length]])
                elif choice < 0.35:
                    await host.cache.delete([Name(key) for key in rng.sample(LONE, 3)])
                elif choice < 0.6:
                    await host.get(rng.choices([*LONE, b"x" * 16], k=rng.randint(1, 10)))
                elif choice < 0.65:
                    asking = asyncio.ensure_future(host.matched(digests))
                    await asyncio.sleep(rng.uniform(0, 0.02))
                    asking.cancel()
                    await asyncio.wait([asking])
                    if not asking.cancelled():
                        asking.result()
                else:
                    await host.matched(digests[: rng.randint(1, len(digests))])

    async def stop(self, name: str) -> None:
        users = self.users.pop(name)
        for user in users:
            if user.done():
                user.result()
            user.cancel()
        await asyncio.wait(users)

    async def kill(self, name: str) -> None:
        await self.stop(name)
        host = self.hosts.pop(name)
        await (host.kill() if self.rng.random() < 0.5 else host.cache.close())

    async def befall(self) -> None:
        choice = self.rng.random()
        if choice < 0.25:
            name = self.rng.choice(HOSTS)
            await self.kill(name)
            await asyncio.sleep(self.rng.uniform(0, 4))
            await self.start(name)
        elif choice < 0.6:
            self.world.network.cut(*self.rng.sample(HOSTS, 2))
        else:
            self.world.network.heal()

    async def run(self) -> None:
        for name in HOSTS:
            await self.start(name)
        for _ in range(10):
            await asyncio.sleep(self.rng.uniform(0, 4 * DEADLINE_S))
            await self.befall()
        self.world.network.heal()
        self.calm = True
        for schedule in self.schedules:
            schedule.on = False
        for name in HOSTS:
            await self.stop(name)
        hosts = [self.hosts[name] for name in HOSTS]
        for host in hosts:
            await host.met(2)
            await host.until(lambda host=host: host.pinned_bytes == 0)
            await host.until(lambda host=host: host.peers.gate.used_bytes == 0)  # what others offered is over, too
            assert host.peers.landing.free * host.peers.landing.slot_bytes == MIB
        key = object_key("sim", "the last")
        await hosts[0].put([key])
        for host in hosts[1:]:
            await host.sees([key])
            assert await host.get([key]) == [Outcome.HIT]
        for host in hosts:
            await host.cache.close()


def upheaval(seed: int, *, faulty: bool) -> None:
    async def main(loop: SimLoop) -> None:
        await Upheaval(loop, faulty=faulty).run()

    simulate(main, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_the_right_bytes_or_a_miss(seed: int) -> None:
    upheaval(seed, faulty=False)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_the_right_bytes_or_a_miss_over_a_network_that_lies(seed: int) -> None:
    upheaval(seed, faulty=True)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(3, 200))
def test_the_right_bytes_or_a_miss_for_many_seeds(seed: int) -> None:
    upheaval(seed, faulty=seed % 2 == 0)
