"""The tcp transport: what its port leaves open."""

from __future__ import annotations

import asyncio
import resource
import socket
import threading

import numpy as np
import pytest

from tiercache.buffers import Buffer
from tiercache.errors import ConfigError, ProtocolError, UnavailableError
from tiercache.model import Outcome
from tiercache.net import open_transport, usable
from tiercache.net.tcp import frames, stream
from tiercache.net.tcp.transport import TcpTransport
from tiercache.testing.faults import Dice, Fault, Script
from tiercache.testing.transports import Ear, Guarded, Pair, pattern
from tiercache.testing.transports.faulty import FaultyTransport
from tiercache.transport import LINKS_MAX, Memory, Move

HIT, MISS = Outcome.HIT, Outcome.MISS
DEADLINE_S = 20.0


def transport(notified=lambda note: None) -> TcpTransport:
    return open_transport("tcp", "127.0.0.1", notified)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "203.0.113.7", "no.such.host.invalid", ""])
def test_a_host_has_to_be_an_address_of_this_machine(host: str) -> None:
    async def check() -> None:
        with pytest.raises(ConfigError):
            open_transport("tcp", host, lambda note: None)

    asyncio.run(check())


def test_it_works_over_ipv6() -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")

    async def check() -> None:
        try:
            made = Pair(lambda notified: open_transport("tcp", "::1", notified))
        except ConfigError as error:
            pytest.skip(str(error))
        async with made as pair:
            region = pair.expose(5000, 1)[1]
            target = Guarded([5000])
            assert await pair.link.read([Move(region, 0, target.pieces)], DEADLINE_S) == [HIT]

    asyncio.run(check())


def test_device_memory_is_refused() -> None:
    async def check() -> None:
        here = transport()
        with pytest.raises(ConfigError):
            here.expose(Buffer.of(bytearray(10), writable=True), kind=Memory.CUDA)
        await here.close()

    asyncio.run(check())
    assert usable("tcp").usable


def test_neither_end_has_to_wait_for_the_other_to_connect() -> None:
    """One end connects, and asks; it is answered when the other has connected too."""

    async def check() -> None:
        here, there = transport(), transport()
        memory = pattern(1, 0, 4096)
        descriptor = there.expose(Buffer.of(memory.data, writable=True))
        link = await here.connect(there.address, DEADLINE_S)
        target = Guarded([4096])
        reading = asyncio.ensure_future(link.read([Move(link.attach(descriptor), 0, target.pieces)], DEADLINE_S))
        await there.connect(here.address, DEADLINE_S)
        assert await reading == [HIT]
        assert (target.content() == memory).all()
        await asyncio.gather(here.close(), there.close())

    asyncio.run(check())


def test_a_stranger_that_is_not_connected_to_gets_nothing() -> None:
    """Who knows the address only is not served."""

    async def check() -> None:
        here, there = transport(), transport()
        there.expose(Buffer.of(bytearray(10), writable=True))
        link = await here.connect(there.address, DEADLINE_S)
        descriptor = frames.pack_region(frames.parse_address(there.address).ticket, frames.Exposed(1, 10, False))
        with pytest.raises(UnavailableError):
            await link.read([Move(link.attach(descriptor), 0, Guarded([10]).pieces)], 0.1)
        await asyncio.gather(here.close(), there.close())

    asyncio.run(check())


def test_links_have_a_limit() -> None:
    async def check() -> None:
        here, there = transport(), transport()
        links = [await here.connect(there.address, DEADLINE_S) for _ in range(3)]
        here._links[links[0].name] += [links[0]] * (LINKS_MAX - 3)
        with pytest.raises(UnavailableError, match="most"):
            await here.connect(there.address, DEADLINE_S)
        here._links[links[0].name] = links
        await asyncio.gather(here.close(), there.close())

    asyncio.run(check())


def test_addresses_and_descriptors_say_what_they_said() -> None:
    address = frames.Address("2001:db8::7", 65535, bytes(range(16)))
    assert frames.parse_address(frames.pack_address(address)) == address
    exposed = frames.Exposed(1 << 40, 1 << 50, True)
    assert frames.parse_region(address.ticket, frames.pack_region(address.ticket, exposed)) == exposed
    with pytest.raises(ProtocolError):
        frames.parse_region(bytes(16), frames.pack_region(address.ticket, exposed))
    for host in ("evil.example", "127.0.0.1\0", "localhost"):
        with pytest.raises(ProtocolError):
            frames.parse_address(frames.pack_address(frames.Address(host, 1, bytes(16))))


def test_spans_are_joined() -> None:
    assert stream.joined([(0, 0), (8, 4), (12, 4), (0, 0), (20, 0), (24, 8), (32, 1), (8, 8)]) == [
        (8, 8), (24, 9), (8, 8)
    ]  # fmt: skip
    window = [memoryview(b"abc"), memoryview(b"de"), memoryview(b"f")]
    stream.skip(window, 4)
    assert [bytes(view) for view in window] == [b"e", b"f"]


def test_notes_of_a_fast_peer_wait_in_the_connection() -> None:
    """A thousand large ones, of which the loop here hears none before the sender has to wait; all come, in order."""

    async def check() -> None:
        async with Pair(transport) as pair:
            notes = [number.to_bytes(4, "little") * 10_000 for number in range(1000)]
            sending = [asyncio.ensure_future(pair.link.notify(note, DEADLINE_S)) for note in notes]
            await asyncio.gather(*sending)
            heard = await pair.ear_there.wait(1000)
            assert heard == notes

    asyncio.run(check())


@pytest.mark.slow
def test_batches_that_are_given_up_leave_the_link_and_their_pieces_alone() -> None:
    """Reads and writes of all sizes, cancelled at any moment, between others that are not."""

    async def check() -> None:
        async with Pair(transport) as pair:
            memory, region, _ = pair.expose(24 << 20, 1, writable=True)
            rng = np.random.default_rng(7)
            kept = pattern(1, 0, 24 << 20)

            async def one(number: int) -> None:
                size = int(rng.choice((100, 70_000, 900_000, 4 << 20)))
                target = Guarded([size])
                if number % 2:
                    work = pair.link.read([Move(region, number, target.pieces)], DEADLINE_S)
                else:
                    target.pieces[0].array()[:] = kept[number : number + size]
                    work = pair.link.write([Move(region, number, target.pieces)], DEADLINE_S)
                moving = asyncio.ensure_future(work)
                for _ in range(int(rng.integers(0, 40))):
                    await asyncio.sleep(0)
                if number % 3:
                    moving.cancel()
                await asyncio.wait([moving])
                if moving.cancelled():
                    target.wipe()
                    await pair.link.read([Move(region, 0, Guarded([10]).pieces)], DEADLINE_S)
                    assert target.untouched()
                else:
                    assert moving.result() == [HIT]
                    assert (target.content() == kept[number : number + size]).all()

            for start in range(0, 300, 10):
                await asyncio.gather(*[one(number) for number in range(start, start + 10)])
            assert (memory.array == kept).all()

    asyncio.run(check())


@pytest.mark.slow
def test_a_quiet_link_takes_no_time() -> None:
    """Nothing turns while nothing moves, after large moves and small ones."""

    async def check() -> None:
        async with Pair(transport) as pair:
            region = pair.expose(8 << 20, 1)[1]
            for size in (8 << 20, 100):
                await pair.link.read([Move(region, 0, Guarded([size]).pieces)], DEADLINE_S)
            before = resource.getrusage(resource.RUSAGE_SELF)
            await asyncio.sleep(0.5)
            after = resource.getrusage(resource.RUSAGE_SELF)
            assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.05

    asyncio.run(check())
    assert not [each for each in threading.enumerate() if each.name.startswith("tiercache-tcp")]


def test_faults_are_injected_by_a_script() -> None:
    """A fault that ends a call kills the link; wrong bytes say HIT, as a network's would."""

    async def check() -> None:
        script = Script({"read": [None, Fault.CORRUPT, Fault.SHORT, Fault.VANISH, Fault.DELAY, Fault.STALL]})
        async with Pair(lambda notified: FaultyTransport(transport(notified), script)) as pair:
            region = pair.expose(4096, 1)[1]
            good = pattern(1, 0, 1000)
            target = Guarded([1000])
            move = [Move(region, 0, target.pieces)]
            assert await pair.link.read(move, DEADLINE_S) == [HIT]
            assert (target.content() == good).all()
            for outcome in (HIT, HIT, MISS):
                assert await pair.link.read(move, DEADLINE_S) == [outcome]
                assert (target.content() != good).any()
                assert target.whole()
            assert await pair.link.read(move, DEADLINE_S) == [HIT]
            assert (target.content() == good).all()
            with pytest.raises(UnavailableError):
                await pair.link.read(move, 0.01)
            with pytest.raises(UnavailableError):
                await pair.link.notify(b"", DEADLINE_S)
            assert isinstance(pair.here, FaultyTransport)
            assert pair.here.counts["read", Fault.STALL] == 1

    asyncio.run(check())


def test_faults_are_injected_by_a_seed() -> None:
    """The same seed, the same faults."""

    async def check() -> list[int]:
        import random

        dice = Dice(random.Random(4), {Fault.CORRUPT: 0.3, Fault.VANISH: 0.3}, ("read",))
        here, there = FaultyTransport(transport(), dice), transport(Ear())
        link, _ = await asyncio.gather(here.connect(there.address, DEADLINE_S), there.connect(here.address, DEADLINE_S))
        region = link.attach(there.expose(Buffer.of(bytearray(100), writable=True)))
        found = []
        for _ in range(50):
            target = Guarded([100])
            (outcome,) = await link.read([Move(region, 0, target.pieces)], DEADLINE_S)
            found.append(int(outcome) * 2 + int(target.content().any()))
        await asyncio.gather(here.close(), there.close())
        return found

    first = asyncio.run(check())
    assert len(set(first)) == 3
    assert first == asyncio.run(check())


def test_where_there_are_no_threads_left_things_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A link that needs one is dead, the door rests, and both can be closed."""

    def refuses(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def check() -> None:
        async with Pair(transport) as pair:
            _, region, _ = pair.expose(8 << 20, 1, writable=True)
            target = Guarded([4 << 20])
            with monkeypatch.context() as patch:
                patch.setattr(threading.Thread, "start", refuses)
                with pytest.raises(UnavailableError, match="thread"):
                    await pair.link.read([Move(region, 0, target.pieces)], DEADLINE_S)
                stranger = transport()
                with pytest.raises(UnavailableError):
                    await stranger.connect(pair.there.address, DEADLINE_S)
                await stranger.close()
            async with asyncio.timeout(DEADLINE_S):
                await pair.link.close()
            assert target.untouched()

    asyncio.run(check())


def test_a_connection_is_not_taken_for_that_of_an_older_link() -> None:
    """One end makes its next link before the other has closed the one before."""

    async def check() -> None:
        async with Pair(transport) as pair:
            back = await pair.there.connect(pair.here.address, DEADLINE_S)
            mine = pattern(2, 0, 4096)
            region = back.attach(pair.here.expose(Buffer.of(mine.data, writable=True)))
            target = Guarded([4096])
            reading = asyncio.ensure_future(back.read([Move(region, 0, target.pieces)], DEADLINE_S))
            await asyncio.wait([reading], timeout=0.05)
            await asyncio.gather(pair.link.close(), pair.back.close())
            link = await pair.here.connect(pair.there.address, DEADLINE_S)
            assert await reading == [HIT]
            theirs = pattern(3, 0, 4096)
            there = link.attach(pair.there.expose(Buffer.of(theirs.data, writable=True)))
            assert await link.read([Move(there, 0, target.pieces)], DEADLINE_S) == [HIT]
            assert (target.content() == theirs).all()

    asyncio.run(check())


def test_no_link_comes_out_of_a_transport_that_closes() -> None:
    """Whenever that is; or it is one that is dead, without a connection."""

    async def check() -> None:
        for turns in range(12):
            here, there = transport(), transport()
            connecting = asyncio.ensure_future(here.connect(there.address, DEADLINE_S))
            for _ in range(turns):
                await asyncio.sleep(0)
            await here.close()
            (made,) = await asyncio.gather(connecting, return_exceptions=True)
            if not isinstance(made, UnavailableError):
                assert made._lane.fault is not None
                assert made._lane._sock.fileno() < 0
            await there.close()

    asyncio.run(check())


@pytest.mark.slow
def test_a_crowd_that_comes_first_is_let_in() -> None:
    """Peers that connect before this end has connected to them wait, none in the place of another."""

    async def check() -> None:
        here = transport()
        crowd = [transport() for _ in range(100)]
        links = await asyncio.gather(*[each.connect(here.address, DEADLINE_S) for each in crowd])
        await asyncio.gather(*[here.connect(each.address, DEADLINE_S) for each in crowd])
        memory = pattern(1, 0, 4096)
        descriptor = here.expose(Buffer.of(memory.data, writable=True))
        moves = [[Move(link.attach(descriptor), 0, Guarded([4096]).pieces)] for link in links]
        reading = [link.read(each, DEADLINE_S) for link, each in zip(links, moves, strict=True)]
        assert await asyncio.gather(*reading) == [[HIT]] * len(crowd)
        await asyncio.gather(here.close(), *[each.close() for each in crowd])

    asyncio.run(check())
