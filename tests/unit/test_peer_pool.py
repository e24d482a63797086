"""Pool: who is connected, however they come and go."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any, cast

import pytest

from tests.unit.peer_hosts import DEADLINE_S, PORT, World
from tiercache.clock import SystemClock
from tiercache.errors import ConfigError, UnavailableError
from tiercache.keys import object_key
from tiercache.model import Outcome
from tiercache.peer.channel import read_secret
from tiercache.peer.members import PEERS_MAX, Listed, Member, parse_member, parse_members
from tiercache.peer.pool import AGAIN_S_MAX, FAILURES_MAX, FAILURES_S, Pool
from tiercache.testing.simloop import simulate

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path

    from tiercache.peer.meeting import House
    from tiercache.testing.simloop import SimLoop

HIT = Outcome.HIT
SOON_S = 2 * (1.5 * AGAIN_S_MAX + DEADLINE_S)
"""Who can be reached is connected after so long."""


def run(main: Callable[[World], Coroutine[Any, Any, None]], seed: int = 1) -> None:
    async def whole(loop: SimLoop) -> None:
        await main(World(loop))

    simulate(whole, seed=seed)


@pytest.mark.parametrize("seed", range(20))
def test_two_that_list_each_other_have_one_channel(seed: int) -> None:
    async def main(world: World) -> None:
        async with world.host("a", "b") as a, world.host("b", "a") as b:
            await a.met()
            await b.met()
            await asyncio.sleep(3 * SOON_S)
            here, there = next(iter(a.pool.peers.values())), next(iter(b.pool.peers.values()))
            assert len(a.pool.peers) == len(b.pool.peers) == 1
            assert here.dialled != there.dialled
            key = object_key("pool", "one")
            await a.put([key])
            await b.sees([key])
            assert await b.get([key]) == [HIT]

    run(main, seed)


def test_a_cache_that_lists_itself_does_not_meet_itself() -> None:
    async def main(world: World) -> None:
        async with world.host("a", "a b") as a, world.host("b", "a b"):
            await a.met()
            await asyncio.sleep(SOON_S)
            assert len(a.pool.peers) == 1

    run(main)


@pytest.mark.parametrize("seed", range(4))
def test_a_peer_that_comes_back_is_met_again(seed: int) -> None:
    async def main(world: World) -> None:
        async with world.host("a", "b") as a:
            key = object_key("pool", "one")
            for _ in range(5):
                b = await world.host("b", "a").start()
                async with asyncio.timeout(SOON_S):
                    await a.met()
                await b.put([key])
                await a.sees([key])
                await b.kill()
                async with asyncio.timeout(SOON_S):
                    await a.met(0)
                assert not any(a.peers.sees([(key, 0)]))

    run(main, seed)


@pytest.mark.parametrize("seed", range(4))
def test_a_cut_that_heals_again_and_again_costs_no_transport(seed: int) -> None:
    """The last transport that there is is taken again, however often its links failed."""

    async def main(world: World) -> None:
        async with world.host("a", "b") as a, world.host("b", "a") as b:
            for number in range(3 * FAILURES_MAX):
                await a.met()
                await b.met()
                keys = [object_key("pool", f"{number}/{one}") for one in range(30)]
                await a.put(keys)
                await b.sees(keys)
                asking = asyncio.ensure_future(b.get(keys))
                await asyncio.sleep(0.001 * number)
                world.network.cut("a", "b")
                async with asyncio.timeout(20 * DEADLINE_S):
                    await asking
                await a.met(0)
                await b.met(0)
                assert a.pinned_bytes == b.pinned_bytes == 0
                world.network.heal()
                async with asyncio.timeout(SOON_S):
                    await a.met()
                    await b.met()

    run(main, seed)


@pytest.mark.slow
def test_many_caches_that_all_list_each_other() -> None:
    async def main(world: World) -> None:
        names = [f"h{number}" for number in range(12)]
        hosts = [await world.host(name, " ".join(names), memory_bytes=2 << 20).start() for name in names]
        async with asyncio.timeout(SOON_S):
            for host in hosts:
                await host.met(len(names) - 1)
        await asyncio.sleep(SOON_S)
        keys = [object_key("pool", name) for name in names]
        for host, key in zip(hosts, keys, strict=True):
            await host.put([key])
        for host, own in zip(hosts, keys, strict=True):
            await host.sees([key for key in keys if key != own])
            assert await host.get(keys) == [HIT] * len(keys)
            assert len(host.pool.peers) == len(names) - 1
        for host in hosts:
            await host.cache.close()

    run(main)


@pytest.mark.slow
def test_no_more_peers_than_there_are_places() -> None:
    async def main(world: World) -> None:
        async with world.host("a") as a:
            others = [await world.host(f"h{number}", "a", memory_bytes=2 << 20).start() for number in range(PEERS_MAX)]
            await a.met(PEERS_MAX)
            async with world.host("late", "a") as late:
                await asyncio.sleep(SOON_S)
                assert not late.pool.peers
                await others[7].kill()
                await late.met()
                assert len(a.pool.peers) == PEERS_MAX
            for other in others:
                await other.cache.close()

    run(main)


@pytest.mark.parametrize("when_s", [0.0, 0.001, 0.002, 0.004, 0.006, 0.01, 0.02, 1.0])
def test_closing_at_any_time_leaves_nothing(when_s: float) -> None:
    async def main(world: World) -> None:
        hosts = [await world.host(name, "a b c").start() for name in ("a", "b", "c")]
        world.network.cut("a", "c")  # one dials and hangs
        await asyncio.sleep(when_s)
        for host in hosts:
            await host.cache.close()
            await host.cache.close()
        await asyncio.sleep(SOON_S)
        assert not world.network._doors and not world.network._ends

    run(main)


@pytest.mark.parametrize("seed", range(20))
def test_closing_as_somebody_calls_leaves_no_connection(seed: int) -> None:
    async def main(world: World) -> None:
        host = await world.host("a").start()
        with world.network.at("b"):
            calling = asyncio.ensure_future(asyncio.open_connection("a", PORT))
        while not host.pool._strangers:
            await asyncio.sleep(0.00001)
        await host.cache.close()
        writer = (await calling)[1]
        await asyncio.sleep(1)
        assert writer.transport.is_closing()
        assert not world.network._ends

    run(main, seed)


def test_a_member_that_never_answers_keeps_nobody_waiting() -> None:
    async def main(world: World) -> None:
        async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await reader.read(1)
                await asyncio.sleep(DEADLINE_S * 100)
            finally:
                writer.transport.abort()

        silence = await asyncio.start_server(silent, "silent", PORT)
        async with world.host("a", "silent nobody b") as a, world.host("b") as b:
            async with asyncio.timeout(1):
                await a.met()
            key = object_key("pool", "one")
            await b.put([key])
            await a.sees([key])
            assert await a.get([key]) == [HIT]
        silence.close()
        await asyncio.sleep(DEADLINE_S * 101)

    run(main)


def test_announcements_while_peers_meet_do_not_disturb_them() -> None:
    async def main(world: World) -> None:
        async with world.host("a") as a:
            stop = asyncio.Event()

            async def storing() -> None:
                number = 0
                while not stop.is_set():
                    number += 1
                    await a.put([object_key("pool", str(number % 50))])
                    await a.cache.delete([(object_key("pool", str((number + 25) % 50)), 0)])
                    await asyncio.sleep(0.001)

            task = asyncio.ensure_future(storing())
            for name in ("b", "c", "d", "e"):
                async with world.host(name, "a") as b:
                    async with asyncio.timeout(1):
                        await b.met()
            stop.set()
            await task

    run(main)


def test_members_as_they_are_written() -> None:
    assert parse_members("") == []
    assert parse_members(" a:1, [::1]:2 ,") == [Member("a", 1), Member("::1", 2)]
    assert str(Member("::1", 2)) == "[::1]:2" and str(Member("a", 1)) == "a:1"
    assert Member("localhost", 1).loopback and Member("127.0.0.9", 1).loopback and not Member("10.0.0.1", 1).loopback
    assert Member("::1", 1).loopback and not Member("127.example.org", 1).loopback
    for wrong in (
        "a",
        "a:",
        ":5",
        "a:x",
        "a:99999",
        "a:-1",
        "[]:5",
        "a:\N{SUPERSCRIPT TWO}",
        "::1:5",
        "[a:5",
        "x//a:5",
    ):
        with pytest.raises(ConfigError):
            parse_member(wrong, "peers")
    assert parse_member("a:0", "peer_listen").port == 0
    with pytest.raises(ConfigError):
        parse_members("a:0")
    with pytest.raises(ConfigError):
        parse_members(",".join(f"h{number}:1" for number in range(PEERS_MAX + 1)))


def test_secrets_as_they_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_bytes(b"0123456789abcdef\n")
    assert read_secret(str(file)) == b"0123456789abcdef"
    file.write_bytes(b"short\n")
    for wrong in (file, tmp_path / "none", tmp_path):
        with pytest.raises(ConfigError):
            read_secret(str(wrong))


def test_a_secret_that_everybody_can_read_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "secret"
    file.write_text("0123456789abcdef")
    file.chmod(0o640)
    read_secret(str(file))
    assert not caplog.records
    file.chmod(0o644)
    assert read_secret(str(file)) == b"0123456789abcdef"
    assert "chmod 600" in caplog.text


def test_failures_of_long_ago_cost_a_peer_no_transport() -> None:
    async def main(world: World) -> None:
        async with world.host("a", "b") as a, world.host("b", "a"):
            await a.met()
            (peer,) = a.pool.peers.values()
            peer.channel.hello["transports"]["other"] = ""
            a.pool._names = ("loop", "other")
            for _ in range(FAILURES_MAX):
                a.pool.exposed("loop", peer)
                a.pool.failed(peer)
            with pytest.raises(UnavailableError):
                a.pool.exposed("loop", peer)
            await asyncio.sleep(FAILURES_S + 1)
            a.pool.exposed("loop", peer)
            assert not a.pool._failures

    run(main)


def test_a_place_to_listen_that_is_none_keeps_nobody_from_dialling(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        dialled = asyncio.Event()

        def called(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.transport.abort()
            dialled.set()

        server = await asyncio.start_server(called, "127.0.0.1", 0)
        here = Member(*server.sockets[0].getsockname()[:2])
        pool = Pool(
            Listed([here, Member("no..name", 1)]), Member("no..name", 1), secret=b"", clock=SystemClock(),
            open_transport=lambda name, host: pytest.fail("nobody was met"), names=["tcp"], deadline_s=5.0,
            random=random.Random(1),
        )  # fmt: skip
        await pool.serve(cast("House", None), lambda peer: pytest.fail("nobody was met"))
        async with asyncio.timeout(10):
            await dialled.wait()
        await pool.close()
        server.close()

    asyncio.run(main())
    told = [row.getMessage() for row in caplog.records]
    assert len([one for one in told if "no..name" in one and "find this cache" in one]) == 1
    assert len([one for one in told if "no..name" in one and "cannot be met" in one]) <= 1
