"""Caches of several hosts on one simulated loop and network."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from tiercache.cache import Cache
from tiercache.cpu.tier import MemoryTier
from tiercache.index import Index
from tiercache.metrics import Metrics
from tiercache.model import Name, Outcome
from tiercache.peer.members import Listed, Member
from tiercache.peer.peers import Limits, Peers
from tiercache.peer.pool import Pool
from tiercache.policy import POLICIES
from tiercache.settings import MIB, Settings
from tiercache.testing.model import made_bytes
from tiercache.testing.peers import Network
from tiercache.testing.simloop import SimClock, derive

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tiercache.testing.simloop import SimLoop
    from tiercache.transport import Transport

DEADLINE_S = 2.0
PORT = 7650
SIZE = 20_000
NEVER_S = 600.0


def value(key: bytes, size: int = SIZE) -> bytes:
    """What every test stores by this key."""
    return made_bytes(Name(key), size)


class World:
    """A network and the hosts on it."""

    def __init__(self, loop: SimLoop, delay_s: float = 0.002) -> None:
        self.loop, self.clock = loop, SimClock(loop)
        self.network = Network(derive(loop.seed, "network"), delay_s)
        self.network.install(loop)
        self.born = 0

    def host(self, name: str, others: str = "", **settings: Any) -> Host:
        """One host; `others`: the hosts that it lists."""
        self.born += 1
        return Host(self, name, others.split(), **settings)


class Host:
    """One cache, in memory alone, that listens."""

    def __init__(
        self,
        world: World,
        name: str,
        others: Sequence[str],
        *,
        wrap: Callable[[Transport], Transport] = lambda one: one,
        secret: bytes = b"the secret of all",
        lend_bytes: int = 2 * MIB,
        landing_bytes: int = MIB,
        spill: bool = False,
        **settings: Any,
    ) -> None:
        self.world, self.name, self.metrics = world, name, Metrics()
        given = {"directory": "/none", "memory_bytes": 4 * MIB, "ssd_bytes": 0, "queue_bytes": 2 * MIB} | settings
        self.settings = Settings(**given)
        self.pool = Pool(
            Listed([Member(one, PORT) for one in others]),
            Member(name, PORT),
            secret=secret,
            open_transport=lambda _, host: wrap(world.network.open_transport(host, lambda note: None)),
            names=["loop"],
            clock=world.clock,
            random=derive(world.loop.seed, name, world.born),
            deadline_s=DEADLINE_S,
        )
        self.peers = Peers(
            self.pool,
            Limits(landing_bytes, lend_bytes, self.settings.peer_rate_bytes_s, DEADLINE_S, spill),
            clock=world.clock,
            metrics=self.metrics,
        )
        memory = MemoryTier(self.settings.memory_bytes, shareable=True)
        index = Index(1024, [POLICIES["lru"]()])
        self.cache = Cache(index, memory, None, settings=self.settings, clock=world.clock, metrics=self.metrics)
        self.cache.meet(self.peers)

    async def start(self) -> Host:
        """Lives from now on."""
        with self.world.network.at(self.name):
            await self.cache.start()
        return self

    async def __aenter__(self) -> Host:
        return await self.start()

    async def __aexit__(self, *_: object) -> None:
        await self.cache.close()

    async def kill(self) -> None:
        """As SIGKILL, seen from the others."""
        self.world.network.kill(self.name)
        await self.cache.close()

    async def met(self, count: int = 1) -> None:
        """Returns when so many peers are connected."""
        await self.until(lambda: len(self.pool.peers) == count)

    async def sees(self, keys: Sequence[bytes]) -> None:
        """Returns when all of these are believed to be somewhere."""
        await self.until(lambda: all(self.peers.sees([Name(key) for key in keys])))

    async def until(self, true: Callable[[], object]) -> None:
        """Returns when that is so; fails where it never is."""
        async with asyncio.timeout(NEVER_S):
            while not true():
                await asyncio.sleep(0.01)

    async def put(self, keys: Sequence[bytes], size: int = SIZE, **terms: Any) -> list[Outcome]:
        """Stores the values of these keys."""
        return await self.cache.put([Name(key) for key in keys], [value(key, size) for key in keys], **terms)

    async def get(self, keys: Sequence[bytes], size: int = SIZE) -> list[Outcome]:
        """Looks for these; every byte of what is there is compared."""
        with await self.cache.lease([Name(key) for key in keys]) as lease:
            for i, (key, one) in enumerate(zip(keys, lease.outcomes, strict=True)):
                if one is Outcome.HIT:
                    assert bytes(lease.view(i)) == value(key, size), (self.name, key.hex())
            return list(lease.outcomes)

    async def matched(self, keys: Sequence[bytes], size: int = SIZE) -> int:
        """Length of the prefix of a chain that it has or gets; every byte is compared."""
        with await self.cache.match(keys) as lease:
            for i in range(len(lease)):
                assert bytes(lease.view(i)) == value(keys[i], size)
            return len(lease)

    @property
    def pinned_bytes(self) -> int:
        """Pinned here for peers."""
        return self.peers.quota.used_bytes

    def count(self, name: str, **labels: str) -> float:
        """A metric."""
        return self.metrics.value(f"tiercache_{name}", **labels)
