"""The one thread that calls UCX: what goes wrong there, or in its callers, harms nobody else, and holds nobody up."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref

import numpy as np
import pytest

from tiercache.buffers import Buffer
from tiercache.errors import ConfigError, UnavailableError
from tiercache.model import Outcome
from tiercache.net import ucx
from tiercache.net.ucx import finding, options, pulling
from tiercache.net.ucx.transport import UcxTransport
from tiercache.testing.transports import MIB, Ear, Exposure, Guarded, Pair, PeerProcess, meet, pattern
from tiercache.transport import Move

HIT = Outcome.HIT
DEADLINE_S = 20.0

pytestmark = pytest.mark.skipif(not ucx.usable().usable, reason=ucx.usable().why)


def over_tcp(notified=lambda note: None) -> UcxTransport:
    taken = finding.find().taken
    assert taken is not None
    library = ucx.load(taken.path)
    return UcxTransport(library, options.options(library.version, "lo") | {"TLS": "tcp"}, notified)


def test_no_memory_for_a_landing_ends_the_link_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread lives on, and what asks it is answered."""

    def refuses(*_: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    async def check() -> None:
        async with Pair(over_tcp) as pair:
            region = pair.expose(5000, 1)[1]
            with monkeypatch.context() as patch:
                patch.setattr(pulling.mmap, "mmap", refuses)
                with pytest.raises(UnavailableError):
                    await pair.link.read([Move(region, 0, Guarded([10]).pieces)], DEADLINE_S)
            pair.here.withdraw(pair.here.expose(Buffer.of(bytearray(100), writable=True)))
            await asyncio.gather(pair.link.close(), pair.back.close())
            await pair.connect()
            _, region, _ = pair.expose(5000, 1)
            assert await pair.link.read([Move(region, 0, Guarded([10]).pieces)], DEADLINE_S) == [HIT]

    asyncio.run(check())


def test_who_hears_notes_and_fails_keeps_no_answers_from_others() -> None:
    async def check() -> None:
        faults = list[object]()
        asyncio.get_running_loop().set_exception_handler(lambda _, facts: faults.append(facts["exception"]))

        def deaf(note: bytes) -> None:
            raise ValueError(note)

        here, there = over_tcp(deaf), over_tcp(deaf)
        link, back = await asyncio.gather(
            here.connect(there.address, DEADLINE_S), there.connect(here.address, DEADLINE_S)
        )
        memory = pattern(1, 0, MIB)
        region = link.attach(there.expose(Buffer.of(memory.data, writable=True)))

        async def reads() -> None:
            for _ in range(100):
                assert await link.read([Move(region, 0, Guarded([1000]).pieces)], DEADLINE_S) == [HIT]

        async def notes() -> None:
            for _ in range(100):
                await back.notify(b"note", DEADLINE_S)

        await asyncio.gather(reads(), notes())
        await asyncio.gather(here.close(), there.close())
        assert faults

    asyncio.run(check())


def test_exposing_in_a_thread_while_the_transport_closes_ends() -> None:
    """It is told that this is closed; nobody waits for a thread that is gone."""

    async def check() -> None:
        here = over_tcp()
        memory = Buffer.of(bytearray(4096), writable=True)
        exposed = 0

        def expose() -> None:
            nonlocal exposed
            try:
                while True:
                    here.expose(memory)
                    exposed += 1
            except (UnavailableError, ConfigError):
                return

        threads = [threading.Thread(target=expose, daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        await asyncio.sleep(0)
        await here.close()
        for thread in threads:
            thread.join(DEADLINE_S)
        assert not any(thread.is_alive() for thread in threads)
        with pytest.raises(UnavailableError):
            here._worker.map_memory(memory.address, memory.length, 0)

    asyncio.run(check())


def test_a_transport_closes_twice_at_once() -> None:
    """Both calls end when it is closed."""

    async def check() -> None:
        here = over_tcp()
        first = asyncio.ensure_future(here.close())
        await asyncio.sleep(0)
        await here.close()
        assert not here._worker._thread.is_alive()
        await first

    asyncio.run(check())


def test_reads_go_on_while_a_thread_exposes() -> None:
    async def check() -> None:
        async with Pair(over_tcp) as pair:
            region = pair.expose(MIB, 1)[1]
            over = threading.Event()
            memory = Buffer.of(bytearray(4096), writable=True)

            def exposes() -> None:
                while not over.is_set():
                    pair.here.expose(memory)

            thread = threading.Thread(target=exposes)
            thread.start()
            try:
                target = Guarded([100] * 1000)
                moves = [Move(region, i, [piece]) for i, piece in enumerate(target.pieces)]
                for _ in range(5):
                    assert await pair.link.read(moves, DEADLINE_S) == [HIT] * 1000
            finally:
                over.set()
                thread.join()

    asyncio.run(check())


def test_a_registration_ends_behind_what_is_moved_with_it() -> None:
    """Pieces in memory of this end that is withdrawn while they are filled."""

    async def check() -> None:
        async with Pair(lambda notified: ucx.open_transport("127.0.0.1", notified)) as pair:
            region = pair.expose(16 * MIB, 1)[1]
            mine = Exposure(2, 16 * MIB)
            descriptor = pair.here.expose(mine.buffer)
            (handle,) = pair.here._worker._maps
            moves = [Move(region, i << 14, [mine.buffer.slice(i << 14, 1 << 14)]) for i in range(1024)]
            asked: list[bool] = []
            unmap = pair.here._worker._unmap_left

            def watched() -> None:
                unmap()
                asked.append(handle in pair.here._worker._maps)

            pair.here._worker._unmap_left = watched  # type: ignore[method-assign]
            reading = asyncio.ensure_future(pair.link.read(moves, DEADLINE_S))
            await asyncio.sleep(0)
            pair.here.withdraw(descriptor)
            assert await reading == [HIT] * 1024
            assert asked[0] or not pair.link._reaches  # what is pulled needs no registration
            pair.here._worker.ask(lambda: None)
            assert handle not in pair.here._worker._maps
            assert (mine.array == pattern(1, 0, 16 * MIB)).all()
            mine.close()

    asyncio.run(check())


def test_what_was_withdrawn_is_held_while_a_peer_may_write_there() -> None:
    """UCX receives what is put over TCP without looking where, also after the link has ended at this end."""

    async def check() -> None:
        async with Pair(over_tcp) as pair:
            memory = np.zeros(4096, np.uint8)
            gone = weakref.ref(memory)
            descriptor = pair.there.expose(Buffer.of(memory, writable=True), writable=True)
            region = pair.link.attach(descriptor)
            source = Buffer.of(bytearray(b"x" * 4096), writable=True)
            assert await pair.link.write([Move(region, 0, [source])], DEADLINE_S) == [HIT]
            await pair.back.close()
            pair.there.withdraw(descriptor)
            del memory
            gc.collect()
            assert gone() is not None
            try:
                await pair.link.write([Move(region, 0, [source])], DEADLINE_S)
            except UnavailableError:
                pass
        gc.collect()
        assert gone() is None

    asyncio.run(check())


@pytest.mark.slow
def test_what_is_given_up_does_not_wait_for_a_peer_that_hangs() -> None:
    async def check() -> None:
        here = over_tcp(Ear())
        peer = await PeerProcess.start("ucx", "127.0.0.1")
        link = await meet(here, peer)
        region = link.attach(bytes.fromhex(await peer.call("expose", size_bytes=64 * MIB, writable=True)))
        target = Guarded([64 * MIB])
        peer.stop()
        loop = asyncio.get_running_loop()
        for call, most_s in ((link.read, 0.2), (link.write, 3.0)):
            moving = asyncio.ensure_future(call([Move(region, 0, target.pieces)], 60.0))
            await asyncio.wait([moving], timeout=0.05)
            began = loop.time()
            moving.cancel()
            await asyncio.wait([moving], timeout=DEADLINE_S)
            assert moving.cancelled()
            assert loop.time() - began < most_s
        await peer.kill()
        await here.close()

    asyncio.run(check())
