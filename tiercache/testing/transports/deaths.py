"""TransportProcessTests: what a transport owes when the process at the other end hangs, is killed, or comes back."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, ClassVar

import pytest
import xxhash

from tiercache.errors import UnavailableError
from tiercache.model import Outcome
from tiercache.net import open_transport, usable
from tiercache.testing.transports.pair import DEADLINE_S, Ear, Guarded
from tiercache.testing.transports.pattern import MIB, Exposure, pattern
from tiercache.testing.transports.plain import until_dead
from tiercache.testing.transports.process import PeerProcess
from tiercache.transport import Move

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tiercache.transport import Link, Transport

HIT = Outcome.HIT
BATCH = 256
"""Moves of 1 MiB under way when something happens."""
SHORT_S = 1.0


@pytest.mark.slow
class TransportProcessTests:
    """What a Transport owes towards another process. `cannot`: as in TransportTests."""

    name: ClassVar[str]
    host: ClassVar[str] = "127.0.0.1"
    cannot: ClassVar[dict[str, str]] = {}

    @pytest.fixture(autouse=True)
    def _usable(self) -> None:
        found = usable(self.name)
        if not found.usable:
            pytest.skip(found.why)

    def need(self, case: str) -> None:
        """Skips a test of what this transport says it cannot."""
        if case in self.cannot:
            pytest.skip(self.cannot[case])

    @asynccontextmanager
    async def met(self) -> AsyncIterator[tuple[Transport, Link, PeerProcess]]:
        """A transport here, linked to one in another process."""
        here = open_transport(self.name, self.host, Ear())
        peer = await PeerProcess.start(self.name, self.host)
        try:
            yield here, await meet(here, peer), peer
        finally:
            await peer.kill()
            await here.close()

    def test_between_processes(self) -> None:
        """Reads, writes and notes, both ways at once."""

        async def check() -> None:
            async with self.met() as (here, link, peer):
                theirs = await peer.call("expose", size_bytes=64 * MIB, seed=5, writable=True)
                region = link.attach(bytes.fromhex(theirs))
                ours = Exposure(6, 64 * MIB)
                descriptor = here.expose(ours.buffer, writable=True, file=ours.file).hex()
                target = Guarded([16 * MIB + 1] * 3)
                moves = [Move(region, i * 16 * MIB + i, [piece]) for i, piece in enumerate(target.pieces)]
                read, found, wrote = await asyncio.gather(
                    link.read(moves, DEADLINE_S),
                    peer.call("read", descriptor=descriptor, offset=3, length=8 * MIB, times=4),
                    peer.call("write", descriptor=descriptor, offset=32 * MIB, length=8 * MIB, seed=8),
                )
                assert (read, wrote) == ([HIT] * 3, ["HIT"])
                assert found == [xxhash.xxh3_64_hexdigest(pattern(6, 3, 8 * MIB).data)] * 4
                assert target.whole()
                assert (target.content()[: 16 * MIB + 1] == pattern(5, 0, 16 * MIB + 1)).all()
                assert (ours.array[32 * MIB : 40 * MIB] == pattern(8, 32 * MIB, 8 * MIB)).all()
                assert (ours.array[40 * MIB :] == pattern(6, 40 * MIB, 24 * MIB)).all()
                assert await link.write([Move(region, 1, [target.pieces[1]])], DEADLINE_S) == [HIT]
                await link.notify(b"done", DEADLINE_S)
                assert await peer.call("heard", count=1) == [b"done".hex()]
                said = await peer.call("digest", descriptor=theirs, offset=1, length=16 * MIB + 1)
                assert said == xxhash.xxh3_64_hexdigest(pattern(5, 16 * MIB + 1, 16 * MIB + 1).data)
                ours.close()

        asyncio.run(check())

    async def begun(self, link: Link, descriptor: bytes, deadline_s: float) -> tuple[asyncio.Task[object], Guarded]:
        """A batch of 256 MiB, of which the first bytes have come."""
        region = link.attach(descriptor)
        target = Guarded([MIB] * BATCH)
        moves = [Move(region, i * MIB, [piece]) for i, piece in enumerate(target.pieces)]

        async def read() -> object:
            return await link.read(moves, deadline_s)

        reading = asyncio.create_task(read())
        first, sign = target.pieces[0].slice(0, 8), pattern(3, 0, 8).tobytes()
        async with asyncio.timeout(DEADLINE_S):
            while bytes(first) != sign and not reading.done():  # noqa: ASYNC110 (memory that fills tells nobody)
                await asyncio.sleep(0)
        return reading, target

    def test_a_killed_peer_is_unavailable(self) -> None:
        """In the middle of 256 MiB: what was a hit is right, and soon everything raises."""

        async def check() -> None:
            async with self.met() as (_, link, peer):
                descriptor = bytes.fromhex(await peer.call("expose", size_bytes=BATCH * MIB, seed=3))
                reading, target = await self.begun(link, descriptor, DEADLINE_S)
                await peer.kill()
                async with asyncio.timeout(DEADLINE_S / 2):
                    await asyncio.wait([reading])
                if reading.exception() is None:
                    assert reading.result() == [HIT] * BATCH
                    assert (target.content() == pattern(3, 0, BATCH * MIB)).all()
                else:
                    assert isinstance(reading.exception(), UnavailableError)
                assert target.whole()
                async with asyncio.timeout(DEADLINE_S / 2):
                    await until_dead(link, 0)
                target.wipe()
                await link.close()
                assert target.untouched()

        asyncio.run(check())

    def test_a_hanging_peer_is_unavailable_at_the_deadline(self) -> None:
        """And nothing is written afterwards, also when it wakes up again; closing is quick meanwhile."""
        self.need("stopped")

        async def check() -> None:
            async with self.met() as (here, link, peer):
                descriptor = bytes.fromhex(await peer.call("expose", size_bytes=BATCH * MIB, seed=3))
                loop = asyncio.get_running_loop()
                peer.stop()
                began = loop.time()
                target = Guarded([MIB] * BATCH)
                region = link.attach(descriptor)
                moves = [Move(region, i * MIB, [piece]) for i, piece in enumerate(target.pieces)]
                with pytest.raises(UnavailableError):
                    await link.read(moves, SHORT_S)
                assert SHORT_S * 0.9 <= loop.time() - began <= SHORT_S + 5
                target.wipe()
                with pytest.raises(UnavailableError):
                    await link.read(moves[:1], DEADLINE_S)
                async with asyncio.timeout(5):
                    await link.close()
                peer.resume()
                other = open_transport(self.name, self.host, Ear())
                fresh = await meet(other, peer)
                await fresh.read([Move(fresh.attach(descriptor), 0, Guarded([16 * MIB]).pieces)], DEADLINE_S)
                assert target.untouched()
                await other.close()
                await here.close()

        asyncio.run(check())

    def test_a_peer_that_came_back_is_met_again(self) -> None:
        """The same transport here, another process there."""

        async def check() -> None:
            async with self.met() as (here, link, peer):
                descriptor = bytes.fromhex(await peer.call("expose", size_bytes=MIB, seed=3))
                region = link.attach(descriptor)
                await peer.kill()
                await until_dead(link, region)
                await link.close()
                again = await PeerProcess.start(self.name, self.host)
                link = await meet(here, again)
                region = link.attach(bytes.fromhex(await again.call("expose", size_bytes=MIB, seed=4)))
                target = Guarded([1000])
                assert await link.read([Move(region, 0, target.pieces)], DEADLINE_S) == [HIT]
                assert (target.content() == pattern(4, 0, 1000)).all()
                await link.close()
                assert await again.close() == 0

        asyncio.run(check())


async def meet(here: Transport, peer: PeerProcess) -> Link:
    """Connects both ends."""
    link, _ = await asyncio.gather(
        here.connect(peer.address, DEADLINE_S), peer.call("connect", address=here.address.hex())
    )
    return link
