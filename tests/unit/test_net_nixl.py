"""NIXL: what the ends tell each other, what is registered, what is said where it does not work; deadlines, and why
there is no TCP."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from tiercache.buffers import Buffer
from tiercache.errors import ProtocolError, UnavailableError
from tiercache.net import choose, nixl
from tiercache.net.nixl import agent, words
from tiercache.net.nixl.link import NEAR_BYTES, joined
from tiercache.net.nixl.transport import NixlTransport
from tiercache.net.ucx.finding import rdma_devices
from tiercache.net.ucx.words import whole_key
from tiercache.testing.transports import MIB, Ear, Guarded, Pair, PeerProcess
from tiercache.transport import Memory, Move

KEY = (1).to_bytes(8, "little") + b"\0" + b"\2ab"
ADDRESS = words.Address(7, b"t" * 16, 9, 1 << 40, b"worker", KEY)
DESCRIPTOR = words.Descriptor(b"t" * 16, 3, 1 << 40, 4096, True, Memory.HOST, KEY)
EMULATED = "TLS=tcp"
"""As NIXL does it by itself where there is nothing but TCP."""


def test_addresses_and_descriptors_come_back() -> None:
    assert words.unpack_address(words.pack_address(ADDRESS)) == ADDRESS
    assert words.unpack_descriptor(words.pack_descriptor(DESCRIPTOR)) == DESCRIPTOR
    empty = DESCRIPTOR._replace(length=0, key=b"")
    assert words.unpack_descriptor(words.pack_descriptor(empty)) == empty


def test_lies_are_seen() -> None:
    for wrong in (
        ADDRESS._replace(worker=b""),
        ADDRESS._replace(key=KEY[:-1]),
        ADDRESS._replace(beacon=1 << 63),
    ):
        with pytest.raises(ProtocolError):
            words.unpack_address(words.pack_address(wrong))
    for lie in (
        DESCRIPTOR._replace(base=(1 << 63) - 1),
        DESCRIPTOR._replace(key=b""),
        DESCRIPTOR._replace(key=KEY[:-1]),
        DESCRIPTOR._replace(kind=7),  # type: ignore[arg-type]  # no kind of memory
    ):
        with pytest.raises(ProtocolError):
            words.unpack_descriptor(words.pack_descriptor(lie))
    with pytest.raises(ProtocolError):
        words.unpack_address(words.pack_descriptor(DESCRIPTOR))
    rng = random.Random(1)
    for _ in range(2000):
        with pytest.raises(ProtocolError):
            words.unpack_descriptor(rng.randbytes(rng.randrange(200)))


def test_what_nixl_says_is_known_or_refused() -> None:
    said = words.described(DESCRIPTOR)
    assert words.key_of(said, DESCRIPTOR._replace(key=b"")) == KEY
    agent_said = words.reached(ADDRESS)
    assert words.worker_of(agent_said, ADDRESS).rstrip(b"\0") == b"worker"
    for at in range(len(said) - len(KEY) - 1):
        changed = said[:at] + bytes([said[at] ^ 1]) + said[at + 1 :]
        with pytest.raises(UnavailableError):
            words.key_of(changed, DESCRIPTOR._replace(key=b""))
    with pytest.raises(UnavailableError):
        words.worker_of(agent_said[:-1], ADDRESS)


def test_pieces_are_registered_together_where_they_lie_together() -> None:
    assert joined([(9000, 10), (100, 50), (150, 5), (120, 3)], 7) == [(100, 55, 7), (9000, 10, 7)]
    assert joined([(0, 10), (10 + NEAR_BYTES, 1), (12 + 2 * NEAR_BYTES, 1)], 7) == [
        (0, NEAR_BYTES + 11, 7),
        (12 + 2 * NEAR_BYTES, 1, 7),
    ]
    assert joined([(5, 0)], 7) == []


@pytest.mark.slow
def test_what_does_not_work_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken_nixl"
    broken.mkdir()
    (broken / "__init__.py").write_text("")
    (broken / "_bindings.py").write_text("raise ImportError('libcuda.so.1 is not there')")
    monkeypatch.syspath_prepend(tmp_path)
    for package, why in (("broken_nixl", "libcuda"), ("absent_nixl", "absent_nixl")):
        with pytest.raises(UnavailableError, match=why):
            agent.load(package)
    found = nixl.usable()
    assert found.why.startswith("NIXL" if found.usable else ("neither", "nixl"))
    assert ("nixl" in choose("auto")) == (found.usable and bool(rdma_devices()))


@pytest.fixture
def _there() -> None:
    if not nixl.usable().usable:
        pytest.skip(nixl.usable().why)


def over_tcp(options: str) -> NixlTransport:
    """A transport that has no other way than TCP."""
    bindings = agent.load(next(filter(agent.there, nixl.PACKAGES)))
    return NixlTransport(bindings, nixl.usable().why.split()[1], {"engine_config": options}, Ear())


@pytest.mark.usefixtures("_there")
def test_tcp_is_refused() -> None:
    options = agent.options([], "lo")["engine_config"] + ",TLS=tcp"

    async def check() -> None:
        pair = Pair(lambda _: over_tcp(options))
        with pytest.raises(UnavailableError, match="over RDMA, or on one machine"):
            await pair.here.connect(pair.there.address, 5.0)
        await asyncio.gather(pair.here.close(), pair.there.close())

    asyncio.run(check())


@pytest.mark.slow
@pytest.mark.usefixtures("_there")
def test_why_there_is_no_tcp() -> None:
    """Here the deadline is kept, and nothing is written afterwards. But the process that was asked goes on after a
    stop, answers whom it cannot reach any more, and is ended by that."""

    async def check() -> None:
        here = over_tcp(EMULATED)
        peer = await PeerProcess.start("nixl", "127.0.0.1")
        link = await here.connect(peer.address, 5.0)
        region = link.attach(bytes.fromhex(await peer.call("expose", size_bytes=64 * MIB, seed=3)))
        target = Guarded([MIB] * 64)
        moves = [Move(region, i * MIB, [piece]) for i, piece in enumerate(target.pieces)]
        loop = asyncio.get_running_loop()
        peer.stop()
        began = loop.time()
        with pytest.raises(UnavailableError):
            await link.read(moves, 0.5)
        assert 0.45 <= loop.time() - began <= 3
        target.wipe()
        began = loop.time()
        await link.close()
        assert loop.time() - began <= 1
        await here.close()
        peer.resume()
        async with asyncio.timeout(20):
            status = await peer.process.wait()
        assert status == -6
        assert target.untouched()
        await peer.kill()

    asyncio.run(check())


@pytest.mark.slow
@pytest.mark.usefixtures("_there")
def test_a_lying_peer_is_no_danger() -> None:
    """Keys that are whole and wrong, memory that is not there, another's token, an address where nobody is."""

    async def check() -> None:
        rng = random.Random(2)
        pair = Pair(lambda notified: nixl.open_transport("127.0.0.1", notified))
        memory = bytearray(MIB)
        true = words.unpack_descriptor(pair.there.expose(Buffer.of(memory, writable=True)))
        whole = [true.key[:at] + bytes([true.key[at] ^ 1]) + true.key[at + 1 :] for at in range(len(true.key))]
        lies = [true._replace(key=key) for key in whole if whole_key(key)]
        lies += [true._replace(base=rng.randrange(1 << 62), serial=rng.randrange(1 << 32)) for _ in range(4)]
        assert len(lies) > 4
        for lie in lies:
            link = await pair.here.connect(pair.there.address, 5.0)
            target = Guarded([4096])
            try:
                await link.read([Move(link.attach(words.pack_descriptor(lie)), 0, target.pieces)], 5.0)
            except UnavailableError:
                pass
            assert target.whole()
            await link.close()
        address = words.unpack_address(pair.there.address)
        for wrong in (address._replace(token=rng.randbytes(16)), address._replace(beacon=1 << 40)):
            with pytest.raises(UnavailableError):
                await pair.here.connect(words.pack_address(wrong), 5.0)
        async with pair:
            assert pair.link.negotiated == "cma"

    asyncio.run(check())
