"""TransportTests: the contract of the Transport port, between two transports of one process."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pytest

from tiercache.buffers import Buffer
from tiercache.errors import ProtocolError, UnavailableError
from tiercache.model import Outcome
from tiercache.net import TRANSPORTS, open_transport, usable
from tiercache.testing.transports.pair import DEADLINE_S, Guarded, Pair
from tiercache.testing.transports.pattern import MIB, Exposure, pattern
from tiercache.transport import NOTE_BYTES_MAX, Move

if TYPE_CHECKING:
    from collections.abc import Callable

    from tiercache.transport import Link, Transport

HIT, MISS = Outcome.HIT, Outcome.MISS
SIZES = (0, 1, 3, 63, 64, 4095, 4096, 65536, 100_003, MIB, 3 * MIB + 1, 16 * MIB)


class TransportTests:
    """What a Transport owes. `cannot`: cases that it cannot keep (see `need`), with the reason why."""

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

    def open_one(self, notified: Callable[[bytes], None]) -> Transport:
        """A transport of the kind under test."""
        return open_transport(self.name, self.host, notified)

    def pair(self) -> Pair:
        """Two of them."""
        return Pair(self.open_one)

    # -- moves ---------------------------------------------------------------------------------------------------------

    def test_reads_what_was_exposed(self) -> None:
        """Every size, from odd places, between guard bytes."""

        async def check() -> None:
            async with self.pair() as pair:
                _, region, _ = pair.expose(20 * MIB, 7)
                for size in SIZES:
                    for offset in (0, 4099, 20 * MIB - size):
                        target = Guarded([size])
                        assert await pair.link.read([Move(region, offset, target.pieces)], DEADLINE_S) == [HIT]
                        assert (target.content() == pattern(7, offset, size)).all(), (size, offset)
                        assert target.whole()

        asyncio.run(check())

    def test_scatters_and_gathers(self) -> None:
        """A thousand pieces of all lengths, in one move, both ways."""

        async def check() -> None:
            rng = random.Random(1)
            lengths = [rng.choice((0, 1, 7, 512, 4096, 9001)) for _ in range(1000)]
            size = sum(lengths)
            async with self.pair() as pair:
                memory, region, _ = pair.expose(16 * MIB, 7, writable=True)
                target = Guarded(lengths)
                assert await pair.link.read([Move(region, 11, target.pieces)], DEADLINE_S) == [HIT]
                assert (target.content() == pattern(7, 11, size)).all()
                assert target.whole()
                assert await pair.link.write([Move(region, 5 * MIB + 3, target.pieces)], DEADLINE_S) == [HIT]
                expected = pattern(7, 0, 16 * MIB)
                expected[5 * MIB + 3 : 5 * MIB + 3 + size] = pattern(7, 11, size)
                assert (memory.array == expected).all()

        asyncio.run(check())

    def test_writes_what_it_is_given(self) -> None:
        """Every size, and not a byte beside it."""

        async def check() -> None:
            async with self.pair() as pair:
                memory, region, _ = pair.expose(20 * MIB, 7, writable=True)
                expected = pattern(7, 0, 20 * MIB)
                for size in SIZES:
                    offset = 20 * MIB - size if size % 2 else 4099
                    source = pattern(8, size, size)
                    move = Move(region, offset, [Buffer.of(source.data, writable=True)])
                    assert await pair.link.write([move], DEADLINE_S) == [HIT]
                    expected[offset : offset + size] = source
                    assert (memory.array == expected).all(), size

        asyncio.run(check())

    def test_many_moves_in_one_batch(self) -> None:
        """5,000 of several regions, in order, next to others; and none at all."""

        async def check() -> None:
            async with self.pair() as pair:
                regions = [pair.expose(MIB, seed)[1] for seed in range(4)]
                rng = random.Random(2)
                wanted = [(rng.randrange(4), rng.randrange(MIB - 3000), rng.choice((1, 64, 2999))) for _ in range(5000)]
                target = Guarded([length for _, _, length in wanted], 16)
                moves = [
                    Move(regions[seed], offset, [piece])
                    for (seed, offset, _), piece in zip(wanted, target.pieces, strict=True)
                ]
                assert await pair.link.read(moves, DEADLINE_S) == [HIT] * 5000
                assert (target.content() == np.concatenate([pattern(*each) for each in wanted])).all()
                assert target.whole()
                assert await pair.link.read([], DEADLINE_S) == []
                assert await pair.link.write([], DEADLINE_S) == []

        asyncio.run(check())

    def test_batches_at_once_both_ways(self) -> None:
        """Forty batches of reads and writes under way on one link, and as many on the other end's."""

        async def check() -> None:
            async with self.pair() as pair:
                memory, region, _ = pair.expose(16 * MIB, 7, writable=True)
                mirror = Exposure(9, 16 * MIB)
                back = pair.back.attach(pair.here.expose(mirror.buffer, file=mirror.file))

                async def one(number: int) -> None:
                    size = (1, 4096, 70_001, 300_000)[number % 4]
                    target = Guarded([size, size])
                    moves = [Move(region, number * 997 + i * size, [piece]) for i, piece in enumerate(target.pieces)]
                    assert await pair.link.read(moves, DEADLINE_S) == [HIT, HIT]
                    assert (target.content() == pattern(7, number * 997, 2 * size)).all()
                    assert target.whole()
                    there = 8 * MIB + number * 150_000
                    source = pattern(number, 0, 150_000)
                    move = Move(region, there, [Buffer.of(source.data, writable=True)])
                    assert await pair.link.write([move], DEADLINE_S) == [HIT]
                    assert (memory.array[there : there + 150_000] == source).all()

                async def other(number: int) -> None:
                    target = Guarded([200_000])
                    assert await pair.back.read([Move(back, number * 1000, target.pieces)], DEADLINE_S) == [HIT]
                    assert (target.content() == pattern(9, number * 1000, 200_000)).all()

                await asyncio.gather(*[one(i) for i in range(40)], *[other(i) for i in range(40)])
                mirror.close()

        asyncio.run(check())

    # -- what is not there ---------------------------------------------------------------------------------------------

    def test_what_was_withdrawn_is_a_miss(self) -> None:
        """Beside what is still there, and in order."""
        self.need("withdrawn")

        async def check() -> None:
            async with self.pair() as pair:
                _, gone, descriptor = pair.expose(MIB, 1)
                _, kept, _ = pair.expose(MIB, 2)
                pair.there.withdraw(descriptor)
                pair.there.withdraw(descriptor)
                target = Guarded([1000] * 5)
                moves = [Move((gone, kept)[i % 2], 9, [piece]) for i, piece in enumerate(target.pieces)]
                assert await pair.link.read(moves, DEADLINE_S) == [MISS, HIT, MISS, HIT, MISS]
                assert (target.content()[1000:2000] == pattern(2, 9, 1000)).all()
                assert target.whole()

        asyncio.run(check())

    def test_what_ends_beyond_the_region_is_a_miss(self) -> None:
        """And touches nothing beside the pieces, nor the region."""
        self.need("bounds")

        async def check() -> None:
            async with self.pair() as pair:
                memory, region, _ = pair.expose(MIB, 1, writable=True)
                odd = (MIB - 99, MIB, MIB + 1, 1 << 40, (1 << 63) - 1, (1 << 64) - 50, -1)
                target = Guarded([100] * (len(odd) + 1))
                moves = [Move(region, offset, [piece]) for offset, piece in zip((*odd, 50), target.pieces, strict=True)]
                expected = [MISS] * len(odd) + [HIT]
                assert await pair.link.read(moves, DEADLINE_S) == expected
                assert (target.content()[-100:] == pattern(1, 50, 100)).all()
                assert target.whole()
                assert await pair.link.write(moves, DEADLINE_S) == expected
                assert (memory.array == pattern(1, 0, MIB)).all()

        asyncio.run(check())

    def test_a_region_for_reading_is_not_written(self) -> None:
        """It is a miss there, and the link lives on."""
        self.need("read_only")

        async def check() -> None:
            async with self.pair() as pair:
                memory, region, _ = pair.expose(MIB, 1)
                source = Buffer.of(bytearray(5000), writable=True)
                assert await pair.link.write([Move(region, 0, [source])], DEADLINE_S) == [MISS]
                assert (memory.array == pattern(1, 0, MIB)).all()
                assert await pair.link.read([Move(region, 0, [source])], DEADLINE_S) == [HIT]

        asyncio.run(check())

    # -- notes ---------------------------------------------------------------------------------------------------------

    def test_notes_come_after_what_was_written(self) -> None:
        """Each once, in order, and by then the bytes lie there."""

        async def check() -> None:
            async with self.pair() as pair:
                memory, region, _ = pair.expose(4 * MIB, 1, writable=True)
                for number in range(1, 9):
                    source = pattern(number, 0, 4 * MIB)
                    await pair.link.write([Move(region, 0, [Buffer.of(source.data, writable=True)])], DEADLINE_S)
                    await pair.link.notify(bytes([number]) * number, DEADLINE_S)
                    heard = await pair.ear_there.wait(number)
                    assert heard[-1] == bytes([number]) * number
                    assert (memory.array == source).all()
                large = random.Random(3).randbytes(NOTE_BYTES_MAX)
                await pair.back.notify(large, DEADLINE_S)
                assert await pair.ear_here.wait(1) == [large]
                for number in range(200):
                    await pair.back.notify(number.to_bytes(2, "little"), DEADLINE_S)
                heard = await pair.ear_here.wait(201)
                assert heard[1:] == [number.to_bytes(2, "little") for number in range(200)]

        asyncio.run(check())

    # -- garbage -------------------------------------------------------------------------------------------------------

    def test_garbage_is_no_address(self) -> None:
        """Random, cut off, flipped, longer, or another kind's."""

        async def check() -> None:
            async with self.pair() as pair:
                for wrong in (*garbage(pair.there.address), *self.foreign_addresses()):
                    with pytest.raises(ProtocolError):
                        await pair.here.connect(wrong, 1.0)
                _, region, _ = pair.expose(100, 1)
                target = Guarded([100])
                assert await pair.link.read([Move(region, 0, target.pieces)], DEADLINE_S) == [HIT]

        asyncio.run(check())

    def foreign_addresses(self) -> list[bytes]:
        """Addresses of the other transports, as far as they work here without anything installed."""
        found = []
        for name in {"tcp", "shm"} & set(TRANSPORTS) - {self.name}:
            if usable(name).usable:
                other = open_transport(name, self.host, lambda _: None)
                found.append(other.address)
                closing = asyncio.get_running_loop().create_task(other.close())
                _closing.add(closing)
                closing.add_done_callback(_closing.discard)
        return found

    def test_garbage_is_no_descriptor(self) -> None:
        """As for addresses; and one of another peer is none either."""

        async def check() -> None:
            async with self.pair() as pair, self.pair() as others:
                _, region, descriptor = pair.expose(MIB, 1)
                wrong = garbage(descriptor)
                if "foreign" not in self.cannot:
                    wrong.append(others.expose(MIB, 1)[2])
                for each in wrong:
                    with pytest.raises(ProtocolError):
                        pair.link.attach(each)
                target = Guarded([100])
                assert await pair.link.read([Move(region, 5, target.pieces)], DEADLINE_S) == [HIT]
                assert (target.content() == pattern(1, 5, 100)).all()

        asyncio.run(check())

    # -- ends ----------------------------------------------------------------------------------------------------------

    def test_a_cancelled_read_writes_no_more(self) -> None:
        """Whenever it is cancelled; the link goes on, or is dead."""

        async def check() -> None:
            async with self.pair() as pair:
                _, region, _ = pair.expose(32 * MIB, 1)
                target = Guarded([32 * MIB])
                for turns in (0, 1, 2, 3, 5, 8, 50, 400):
                    reading = asyncio.ensure_future(pair.link.read([Move(region, 0, target.pieces)], DEADLINE_S))
                    for _ in range(turns):
                        await asyncio.sleep(0)
                    reading.cancel()
                    await asyncio.wait([reading], timeout=DEADLINE_S)
                    assert reading.done()
                    target.wipe()
                    other = Guarded([1000])
                    try:
                        assert await pair.link.read([Move(region, 7, other.pieces)], DEADLINE_S) == [HIT]
                        assert (other.content() == pattern(1, 7, 1000)).all()
                    except UnavailableError:
                        await asyncio.gather(pair.link.close(), pair.back.close())
                        await pair.connect()
                        _, region, _ = pair.expose(32 * MIB, 1)
                    assert target.untouched()

        asyncio.run(check())

    def test_closing_ends_what_is_under_way(self) -> None:
        """It raises, nothing is written afterwards, and all that follows raises too."""

        async def check() -> None:
            async with self.pair() as pair:
                _, region, _ = pair.expose(32 * MIB, 1)
                targets = [Guarded([32 * MIB]) for _ in range(4)]
                moves = [[Move(region, 0, target.pieces)] for target in targets]
                reading = [asyncio.ensure_future(pair.link.read(each, DEADLINE_S)) for each in moves]
                for _ in range(20):
                    await asyncio.sleep(0)
                async with asyncio.timeout(5):
                    await pair.link.close()
                    await pair.link.close()
                for target in targets:
                    target.wipe()
                for ended in await asyncio.gather(*reading, return_exceptions=True):
                    assert ended == [HIT] or isinstance(ended, UnavailableError), ended
                with pytest.raises(UnavailableError):
                    await pair.link.read(moves[0], DEADLINE_S)
                with pytest.raises(UnavailableError):
                    await pair.link.notify(b"late", DEADLINE_S)
                assert all(target.untouched() for target in targets)

        asyncio.run(check())

    def test_a_peer_that_closed_is_unavailable(self) -> None:
        """For everything, and soon; nobody can be reached there any more."""

        async def check() -> None:
            async with self.pair() as pair:
                _, region, _ = pair.expose(MIB, 1, writable=True)
                address = pair.there.address
                await pair.there.close()
                await pair.there.close()
                await until_dead(pair.link, region)
                for again in (pair.link.read, pair.link.write):
                    with pytest.raises(UnavailableError):
                        await again([Move(region, 0, Guarded([10]).pieces)], DEADLINE_S)
                with pytest.raises(UnavailableError):
                    await pair.here.connect(address, 0.2)

        asyncio.run(check())

    def test_connects_again(self) -> None:
        """After both ends closed a link, another one works."""

        async def check() -> None:
            async with self.pair() as pair:
                for seed in range(3):
                    _, region, _ = pair.expose(MIB, seed)
                    target = Guarded([1000])
                    assert await pair.link.read([Move(region, 3, target.pieces)], DEADLINE_S) == [HIT]
                    assert (target.content() == pattern(seed, 3, 1000)).all()
                    await asyncio.gather(pair.link.close(), pair.back.close())
                    await pair.connect()

        asyncio.run(check())

    def test_twenty_links_to_one(self) -> None:
        """All at once, and each has its own regions."""

        async def check() -> None:
            async with self.pair() as pair:
                others = [self.open_one(lambda _: None) for _ in range(19)]
                made = await asyncio.gather(
                    *[other.connect(pair.there.address, DEADLINE_S) for other in others],
                    *[pair.there.connect(other.address, DEADLINE_S) for other in others],
                )
                links = [pair.link, *made[: len(others)]]
                descriptors = [pair.expose(MIB, seed)[2] for seed in range(20)]

                async def one(seed: int, link: Link) -> None:
                    target = Guarded([MIB - 1])
                    move = Move(link.attach(descriptors[seed]), 1, target.pieces)
                    for _ in range(5):
                        assert await link.read([move], DEADLINE_S) == [HIT]
                        assert (target.content() == pattern(seed, 1, MIB - 1)).all()
                        target.wipe()

                await asyncio.gather(*[one(seed, link) for seed, link in enumerate(links)])
                await asyncio.gather(*[other.close() for other in others])

        asyncio.run(check())


_closing: set[asyncio.Task[None]] = set()


def garbage(good: bytes) -> list[bytes]:
    """What could come in place of good bytes."""
    rng = random.Random(4)
    cut = [good[:length] for length in range(len(good))]
    flipped = []
    for bit in range(8 * len(good)) if len(good) <= 256 else rng.sample(range(8 * len(good)), 2048):
        one = bytearray(good)
        one[bit // 8] ^= 1 << bit % 8
        flipped.append(bytes(one))
    return [*cut, *flipped, *[rng.randbytes(n) for n in (1, 16, len(good), 4000, 20_000)], good + b"\0", good * 2]


async def until_dead(link: Link, region: int) -> None:
    """Reads until the link says that its peer is gone; fails where it does not say so in time."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                await link.read([Move(region, 0, Guarded([10]).pieces)], DEADLINE_S)
            except UnavailableError:
                return
            await asyncio.sleep(0)
