"""What a door does with clients that die, go silent, come again, or were never ours: nothing leaks, nobody hangs."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tiercache.errors import UnavailableError
from tiercache.keys import object_key
from tiercache.lease import PageRun
from tiercache.model import Name, Outcome
from tiercache.testing.visits import MIB, House, Visitor, page_bytes
from tiercache.wire import frames, joint, sockets
from tiercache.wire.frames import HEADER, Op, pack
from tiercache.wire.hello import CHANNEL, Hello, pack_hello
from tiercache.wire.served import Limits
from tiercache.wire.session import LAST

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

HIT, MISS, BUSY = Outcome.HIT, Outcome.MISS, Outcome.BUSY
PART = 16 << 10
RUN = PageRun(b"k" * 32, 8 * 64 * 1024, 64 << 10, PART)


def name(label: str) -> Name:
    return Name(object_key("test", label))


def play(directory: Path, scene: Callable[[House], Awaitable[None]], **options: object) -> None:
    """Plays a scene in a fresh house, which is looked over afterwards."""

    async def run() -> None:
        async with House(directory, **options) as house:  # type: ignore[arg-type]
            await scene(house)

    asyncio.run(run())


class Living:
    """A watch over processes that live until told otherwise."""

    def __init__(self) -> None:
        self.deaths: list[Callable[[], None]] = []

    def __call__(self, sock: socket.socket, loop: object, on_death: Callable[[], None]) -> Living:
        self.deaths.append(on_death)
        return self

    def close(self) -> None:
        """Nothing to give back."""


# -- death


async def hold_lease(house: House, one: Visitor) -> None:
    await one.put([name("a")], [os.urandom(MIB)])
    assert (await one.lease([name("a")])).outcomes == [HIT]


async def be_asked_to_load(house: House, one: Visitor) -> None:
    house.pending = asyncio.ensure_future(one.read(RUN, [0, 1], [0b1111] * 2))  # type: ignore[attr-defined]
    await one.gaps()


async def load_in_part(house: House, one: Visitor) -> None:
    house.pending = asyncio.ensure_future(one.read(RUN, [0, 1], [0b1111] * 2))  # type: ignore[attr-defined]
    number, fill, gaps = await one.gaps()
    one.fill(RUN, number, fill, gaps[:1])


async def load_all_but_say_so(house: House, one: Visitor) -> None:
    house.pending = asyncio.ensure_future(one.read(RUN, [0, 1], [0b1111] * 2))  # type: ignore[attr-defined]
    one.fill(RUN, *await one.gaps())


async def wait_for_another(house: House, one: Visitor) -> None:
    other = await house.visitor()
    house.kept = [asyncio.ensure_future(other.read(RUN, [0], [1]))]  # type: ignore[attr-defined]
    await other.gaps()
    house.pending = asyncio.ensure_future(one.read(RUN, [0], [1]))  # type: ignore[attr-defined]


async def reserve(house: House, one: Visitor) -> None:
    await one.reserve([name("a"), name("b")], [MIB] * 2)


async def commit_in_part(house: House, one: Visitor) -> None:
    ticket, grants = await one.reserve([name("a"), name("b")], [MIB] * 2)
    await one.commit(ticket, [one.write(0, grants.locations[0], os.urandom(MIB))], 0)


async def commit_much(house: House, one: Visitor) -> None:
    """The thread that hashes still looks at the memory when the client is gone."""
    names = [name(str(i)) for i in range(8)]
    ticket, grants = await one.reserve(names, [MIB] * 8)
    landed = [one.write(i, at, os.urandom(MIB)) for i, at in enumerate(grants.locations)]
    body = frames.pack_landed(ticket, LAST, landed)
    house.pending = asyncio.ensure_future(one.ask(Op.COMMIT, body))  # type: ignore[attr-defined]


async def claim(house: House, one: Visitor) -> None:
    await one.ask(Op.CLAIM, b"note")


STEPS = [
    hold_lease, be_asked_to_load, load_in_part, load_all_but_say_so, wait_for_another, reserve, commit_in_part,
    commit_much, claim,
]  # fmt: skip


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("turns", [0, 1, 3])
def test_a_client_that_goes_takes_nothing_along(
    tmp_path: Path, step: Callable[[House, Visitor], Awaitable[None]], turns: int
) -> None:
    async def scene(house: House) -> None:
        one = await house.visitor()
        channel = await house.visitor(one.token, role=CHANNEL)
        await step(house, one)
        for _ in range(turns):
            await asyncio.sleep(0)
        channel.line.close()
        one.line.close()
        pending = getattr(house, "pending", None)
        if pending is not None:
            with pytest.raises(UnavailableError):
                await pending
        two = await house.visitor()
        assert bytes(await two.ask(Op.CLAIM, b"note")) == b"\1"
        assert await two.put([name("b")], [b"value"]) == [HIT]
        await two.leave()
        for kept in getattr(house, "kept", []):
            kept.cancel()

    play(tmp_path, scene)


@pytest.mark.parametrize("step", STEPS)
def test_a_living_process_without_a_connection_keeps_its_memory(
    tmp_path: Path, step: Callable[[House, Visitor], Awaitable[None]]
) -> None:
    """It may look at it and write to it, until it is dead or comes again."""
    watch = Living()

    async def scene(house: House) -> None:
        one = await house.visitor()
        await step(house, one)
        await one.ping()
        await one.leave()
        pending = getattr(house, "pending", None)
        if pending is not None:
            with pytest.raises(UnavailableError):
                await pending
        extents = house.extents()
        if step is claim:
            assert house.door.clients == 0, "who holds nothing may go"
            return
        if step not in (commit_much, wait_for_another, load_all_but_say_so):
            assert house.door.facts()[0]["connections"] == 0
            assert extents >= 1
        two = await house.visitor()
        if step in (be_asked_to_load, load_in_part):
            # Others do not wait for it, and use other memory.
            read = asyncio.ensure_future(two.read(RUN, [1], [0b1111]))
            asked = await two.gaps()
            assert house.extents() > extents
            two.fill(RUN, *asked)
            two.unfill(*asked[:2])
            assert bytes(house.buffer((await read).locations[0])) == page_bytes(RUN, 1)
        if step in (reserve, commit_in_part):
            assert (await two.reserve([name("b")], [10]))[1].outcomes == [BUSY]
        for death in watch.deaths[:1]:
            death()
        assert await two.put([name("b")], [b"value"]) == [HIT]
        await two.leave()
        for kept in getattr(house, "kept", []):
            kept.cancel()

    play(tmp_path, scene, watch=watch)


def test_a_process_that_comes_again_has_its_leases_and_writes_nothing(tmp_path: Path) -> None:
    async def scene(house: House) -> None:
        one = await house.visitor()
        await one.put([name("a"), name("b")], [b"a" * 5000, b"b" * 5000])
        kept = await one.lease([name("a")])
        await one.lease([name("b")])
        await one.reserve([name("c")], [100])
        read = asyncio.ensure_future(one.read(RUN, [0], [1]))
        await one.gaps()
        new = await house.visitor(one.token, role=CHANNEL, again=True)
        with pytest.raises(UnavailableError):
            await read
        assert one.line.closed
        (facts,) = house.door.facts()
        assert (facts["leases"], facts["fills"], facts["tickets"], facts["connections"]) == (2, 0, 0, 1)
        line = await house.visitor(one.token)
        held = await new.ask(Op.REDECLARE, frames.pack_holds([(1, kept.locations), (9, kept.locations), (7, [12345])]))
        assert bytes(held) == b"\1\1\0"
        assert not house.redeclared, "more may come"
        await new.ask(Op.REDECLARE)
        assert house.redeclared == [os.getpid()]
        await line.ping()
        assert house.door.facts()[0]["leases"] == 2, "what it did not name was granted to nobody"
        assert (await line.lease([name("b"), name("c")], number=100)).outcomes == [HIT, MISS]
        line.release(1, 9, 100)
        await line.ping()
        assert not house.cache.tiers.index.pins

    play(tmp_path, scene, watch=Living())


CLIENT = """
import sys
sys.path[:0] = {path!r}
from tiercache.wire import frames, joint, sockets
from tiercache.wire.channel import Channel
from tiercache.wire.frames import Op, Patience
from tiercache.wire.hello import Hello, pack_hello
channel = Channel(sockets.connect({directory!r}))
channel.ask(Op.HELLO, pack_hello(Hello("ab" * 16, "channel")))
names = frames.unpack_names(memoryview(bytes.fromhex({names!r})))
grants = frames.unpack_grants(channel.ask(Op.LEASE, frames.pack_lease(1, Patience.MEMORY, names)))
assert not any(grants.outcomes), grants
if {closes}:
    channel.close()
print("here", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("closes", [False, True])
def test_real_processes_are_watched(tmp_path: Path, closes: bool) -> None:
    async def scene(house: House) -> None:
        one = await house.visitor()
        await one.put([name("a")], [b"x" * 10_000])
        code = CLIENT.format(
            path=sys.path, directory=str(tmp_path), names=frames.pack_names([name("a")]).hex(), closes=closes
        )
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        assert await asyncio.wait_for(child.stdout.readline(), 20) == b"here\n"
        await one.ping()
        assert child.pid in house.door.pids
        assert house.cache.tiers.index.pins == 1
        child.kill()
        await child.wait()
        async with asyncio.timeout(10):
            while child.pid in house.door.pids:
                await asyncio.sleep(0)
        assert house.cache.tiers.index.pins == 0 and house.left == [child.pid]

    play(tmp_path, scene, watch=sockets.watch)


# -- nonsense


def nonsense_of_blocks(rng: random.Random, digests: list[bytes]) -> dict[Op, Callable[[], bytes]]:
    """Messages about joint blocks, more or less right."""
    claim, ticket = rng.choice([0, 1, 3, 1 << 63]), rng.randrange(1, 4)
    pieces = rng.choice([[], [(PART, PART + 9)], [(0, 5), (3, 8)]])
    size = rng.choice([2 * PART, 2 * PART, 0, 1 << 31])
    landed = [frames.Landed(rng.randrange(3), rng.choice([1, 1, 2, 1 << 60]), b"")]
    landed = [one._replace(digests=bytes(8 * one.parts.bit_length())) for one in landed]
    below = rng.choice([b"", b"", digests[0]])
    ask = joint.JoinAsk(ticket, rng.randrange(4), 0, 0.0, 0, size, PART, claim, pieces, below, digests)
    rows = [(rng.randrange(3), PART, PART + 9, 5)] if rng.random() < 0.5 else []
    return {
        Op.JOIN: lambda: joint.pack_join(ask),
        Op.LAND: lambda: joint.pack_land(joint.LandAsk(ticket, rng.choice([0, 0, 2, 8]), landed, rows)),
        Op.COMPARE: lambda: frames.pack_landed(ticket, 0, landed),
        Op.PROBE: lambda: joint.pack_chain(claim, digests),
        Op.TOUCH_CHAIN: lambda: joint.pack_chain(claim, digests),
        Op.LEASE_BLOCKS: lambda: joint.pack_lease_blocks(rng.randrange(4), rng.randrange(4), claim, digests),
    }


def nonsense(rng: random.Random, names: list[Name]) -> bytes:
    """One message, more or less right."""
    some = rng.sample(names, rng.randrange(1, 4))
    op = rng.choice(list(Op))
    locations = [rng.randrange(-2, 1 << 63) if rng.random() < 0.5 else (1 << 32) + 1 for _ in some]
    bodies = {
        Op.LEASE: lambda: frames.pack_lease(rng.randrange(4), rng.randrange(3), some),
        Op.MATCH: lambda: frames.pack_lease(rng.randrange(4), rng.randrange(3), some),
        Op.LEASE_PAGES: lambda: frames.pack_pages(
            rng.randrange(4), rng.randrange(4), RUN.key, [rng.randrange(9)], [rng.randrange(20)]
        ),
        Op.READ: lambda: frames.pack_read(
            frames.ReadAsk(
                rng.randrange(4),
                (RUN.key, RUN.size, RUN.page_bytes, PART, 0, 0.0, 0),
                [rng.randrange(9)],
                [rng.randrange(20)],
            )
        ),
        Op.RELEASE: lambda: frames.pack_u64([rng.randrange(4)]),
        Op.TOUCH: lambda: frames.pack_i64(locations),
        Op.FILLED: lambda: frames.pack_landed(rng.randrange(3), 0, [frames.Landed(rng.randrange(2), 1, bytes(8))]),
        Op.UNFILLED: lambda: frames.pack_u64([rng.randrange(3)]),
        Op.RESERVE: lambda: frames.pack_reserve(
            frames.ReserveAsk(
                rng.randrange(1, 4),
                rng.randrange(4),
                rng.randrange(3),
                0,
                rng.choice([0.0, -1.0]),
                0,
                b"",
                some,
                [rng.choice([0, 1, 100_000, 1 << 40]) for _ in some],
            )
        ),
        Op.COMMIT: lambda: frames.pack_landed(
            rng.randrange(3), rng.randrange(4), [frames.Landed(rng.randrange(3), 1, bytes(8))]
        ),
        Op.ABANDON: lambda: frames.pack_u64([rng.randrange(3)]),
        Op.DELETE: lambda: frames.pack_names(some),
        Op.QUARANTINE: lambda: frames.pack_names(some),
        Op.CLAIM: lambda: rng.randbytes(1),
        Op.KNOWN: lambda: rng.randbytes(1),
        Op.SETTLE: lambda: frames.pack_settle(rng.randbytes(1), rng.randbytes(3), rng.choice([0.0, 5.0, float("inf")])),
        Op.FORGET: lambda: frames.pack_json(rng.choice([[""], ["zz"], ["61"], 5, {"a": 1}])),
        Op.CALL: lambda: frames.pack_json(rng.choice([["status", {}], ["held", {"keys": [5]}], 7, ["y", 1]])),
        Op.REDECLARE: lambda: frames.pack_holds([(rng.randrange(9), locations)]),
        Op.SEGMENTS: lambda: rng.choice([bytes(4), b"\xff" * 4, b"x"]),
        **nonsense_of_blocks(rng, [one.key for one in some]),
    }
    body = bodies.get(op, bytes)()
    if rng.random() < 0.1:
        body = body[: rng.randrange(len(body) + 1)]
    if rng.random() < 0.05:
        body = rng.randbytes(rng.randrange(100))
    if rng.random() < 0.02:
        return HEADER.pack(rng.randrange(1 << 32), rng.randrange(1 << 16), 0, 5) + body
    return pack(op, rng.randrange(1, 1000), body)


@pytest.mark.slow
@pytest.mark.parametrize("ssd_bytes", [0, 64 * MIB], ids=["memory", "ssd"])
def test_nonsense_harms_nobody(tmp_path: Path, ssd_bytes: int) -> None:
    """A thousand clients that say anything, while one does its work."""

    async def stranger(house: House, seed: int, names: list[Name]) -> None:
        rng = random.Random(seed)
        loop = asyncio.get_running_loop()
        with sockets.connect(house.directory) as sock:
            sock.setblocking(False)
            hello = pack_hello(Hello(rng.randbytes(16).hex(), rng.choice(["line", "channel"]), 0, rng.random() < 0.1))
            said = [pack(Op.HELLO, 1, hello)] if rng.random() < 0.97 else [rng.randbytes(50)]
            said += [nonsense(rng, names) for _ in range(rng.randrange(1, 12))]
            data = b"".join(said)
            try:
                for start in range(0, len(data), 1000):
                    await loop.sock_sendall(sock, data[start : start + 1000])
                async with asyncio.timeout(rng.choice([0.0, 0.001, 0.02])):
                    while await loop.sock_recv(sock, 1 << 16):
                        pass
            except (OSError, TimeoutError):
                pass  # cut off, or enough seen

    async def work(house: House, one: Visitor, done: asyncio.Event) -> None:
        rng = random.Random(0)
        mine = [name(f"mine {i}") for i in range(4)]
        values = [rng.randbytes(50_000) for _ in mine]
        while not done.is_set():
            assert not set(await one.put(mine, values)) - {HIT}
            number = one.number()
            grants = await one.lease(mine, number=number)
            for at, value in zip(grants.locations, values, strict=True):
                assert at >= 0 and bytes(house.buffer(at)) == value
            one.release(number)

    async def scene(house: House) -> None:
        one = await house.visitor()
        names = [name(f"theirs {i}") for i in range(5)] + [Name(os.urandom(16)) for _ in range(3)] + [Name(RUN.key, 1)]
        done = asyncio.Event()
        working = asyncio.ensure_future(work(house, one, done))
        for start in range(0, 1000 if not ssd_bytes else 300, 20):
            await asyncio.gather(*[stranger(house, start + i, names) for i in range(20)])
            house.cache.tiers.index.validate()
        done.set()
        await working
        await one.ping()
        assert house.metrics.total("tiercache_internal_errors_total") == 0
        async with asyncio.timeout(10):
            while house.door.clients > 1:
                await asyncio.sleep(0)

    play(tmp_path, scene, ssd_bytes=ssd_bytes, limits=Limits(8 * MIB, fill_s=0.05))


@pytest.mark.slow
def test_who_does_not_read_is_held_up_and_harms_nobody(tmp_path: Path) -> None:
    async def scene(house: House) -> None:
        one = await house.visitor()
        await one.put([name("a")], [b"x"])
        loop = asyncio.get_running_loop()
        with sockets.connect(house.directory) as sock:
            sock.setblocking(False)
            await loop.sock_sendall(sock, pack(Op.HELLO, 1, pack_hello(Hello("cd" * 16, "line"))))
            questions = pack(Op.STATS, 2) * 1000
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.5):
                    for _ in range(1000):
                        await loop.sock_sendall(sock, questions)
            assert (await one.lease([name("a")])).outcomes == [HIT]

    play(tmp_path, scene)
