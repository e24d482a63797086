"""What an owner answers about blocks that several clients fill: right messages, wrong ones, and clients that go."""

from __future__ import annotations

import asyncio
import os
import random
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import xxhash

from tiercache.buffers import Buffer, copy_parts, part_digests
from tiercache.errors import ConfigError, ProtocolError, TierCacheError, UnavailableError
from tiercache.keys import chain, namespace
from tiercache.model import Kind, Name, Outcome
from tiercache.testing.visits import MIB, House, Visitor
from tiercache.wire import frames, joint
from tiercache.wire.frames import Landed, Op, Patience
from tiercache.wire.joint import JoinAsk, Joined, LandAsk
from tiercache.wire.served import Limits

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

HIT, MISS, BUSY, CORRUPT = Outcome.HIT, Outcome.MISS, Outcome.BUSY, Outcome.CORRUPT
PART = 4096
SIZE = 8 * PART
NAMES = chain(namespace("blocks", "wire"), [str(i).encode() for i in range(10)])
ASK = JoinAsk(1, Kind.KV, 0, 0.0, 0, SIZE, PART, 0x0F, [], b"", NAMES[:3])


def play(directory: Path, scene: Callable[[House], Awaitable[None]], **options: object) -> None:
    """Plays a scene in a fresh house, which is looked over afterwards."""

    async def run() -> None:
        async with House(directory, **options) as house:  # type: ignore[arg-type]
            await scene(house)

    asyncio.run(run())


async def join(one: Visitor, ask: JoinAsk) -> Joined:
    return joint.unpack_joined(await one.ask(Op.JOIN, joint.pack_join(ask)), len(ask.digests))


async def land(one: Visitor, ticket: int, landed: list[Landed], pieces: Any = (), flags: int = 0) -> list[Outcome]:
    body = joint.pack_land(LandAsk(ticket, flags, landed, list(pieces)))
    return frames.unpack_outcomes(await one.ask(Op.LAND, body))


def write(house: House, joined: Joined, item: int, parts: int) -> Landed:
    """Writes a block's parts; what to say of them."""
    source = Buffer.of(NAMES[item] * (SIZE // 16))
    copy_parts(source, house.buffer(joined.locations[item]), PART, parts)
    return Landed(item, parts, part_digests(source, PART, parts)[: 8 * parts.bit_length()])


def test_two_clients_fill_one_block(tmp_path: Path) -> None:
    async def scene(house: House) -> None:
        one, two = await house.visitor(), await house.visitor()
        mine = await join(one, ASK)
        assert mine.claims == [0x0F] * 3
        assert mine.known == 3
        theirs = await join(two, ASK._replace(claim=0xFF))
        assert theirs.claims == [0xF0] * 3
        assert theirs.locations == mine.locations
        assert await land(one, 1, [write(house, mine, i, 0x0F) for i in range(3)]) == [HIT] * 3
        assert bytes(await one.ask(Op.PROBE, joint.pack_chain(0x0F, NAMES))) == b"\1" * 3
        assert bytes(await one.ask(Op.PROBE, joint.pack_chain(0xFF, NAMES))) == b""
        assert (await one.match([Name(name) for name in NAMES[:3]])).outcomes == []
        row = write(house, theirs, 0, 0xF0)
        assert await land(two, 1, [row._replace(parts=0xFF)]) == [MISS]
        assert await land(two, 1, [row]) == [HIT]
        compared = row._replace(digests=bytes(8 * 8))
        answer = await two.ask(Op.COMPARE, frames.pack_landed(1, 0, [compared, row, compared._replace(item=1)]))
        assert joint.unpack_maps(answer, 3) == [0xF0, 0, 0]
        two.line.tell(Op.ABANDON, frames.pack_u64([1]))
        one.line.tell(Op.TOUCH_CHAIN, joint.pack_chain(0, NAMES))
        await two.ping()
        again = await join(two, ASK._replace(ticket=2, claim=0xFF, digests=NAMES[:4]))
        assert again.claims == [0, 0xF0, 0xF0, 0xFF]
        grants = await lease(two, 5, Patience.MEMORY, 0xFF, NAMES[:1])
        assert grants.outcomes == [HIT]
        assert bytes(house.buffer(grants.locations[0])) == NAMES[0] * (SIZE // 16)
        assert (await lease(two, 6, Patience.MEMORY, 0xFF, NAMES[:2])).outcomes == [MISS] * 2
        assert (await lease(two, 7, Patience.BEST, 0xFF, NAMES[:2])).outcomes == [HIT, MISS]

    play(tmp_path, scene)


async def lease(one: Visitor, number: int, patience: int, parts: int, names: list[bytes]) -> frames.Grants:
    return frames.unpack_grants(await one.ask(Op.LEASE_BLOCKS, joint.pack_lease_blocks(number, patience, parts, names)))


def test_pieces_land_and_lies_do_not(tmp_path: Path) -> None:
    async def scene(house: House) -> None:
        one, two = await house.visitor(), await house.visitor()
        left = await join(one, ASK._replace(claim=0, pieces=[(0, 100)]))
        right = await join(two, ASK._replace(claim=0, pieces=[(100, PART), (PART, PART + 5)]))
        assert right.pieces == [[(100, PART), (PART, PART + 5)]] * 3
        assert left.locations == right.locations
        whole = bytes(house.buffer(left.locations[0]))[:PART]
        digest = xxhash.xxh3_64_intdigest
        assert await land(one, 1, [], [(0, 0, 100, digest(whole[:100])), (1, 0, 100, 7)]) == [HIT, CORRUPT]
        assert await land(two, 1, [], [(0, 100, PART, digest(whole[100:]))]) == [HIT]
        assert await land(two, 1, [], [(0, 100, PART, digest(whole[100:]))]) == [MISS]
        assert bytes(await one.ask(Op.PROBE, joint.pack_chain(1, NAMES))) == b"\1"
        assert house.metrics.value("tiercache_corruptions_total", tier="memory") == 1

    play(tmp_path, scene)


def test_much_that_lands_is_hashed_beside_the_loop_and_in_order(tmp_path: Path) -> None:
    async def scene(house: House) -> None:
        one = await house.visitor()
        size, part = 2 * MIB, MIB
        mine = await join(one, ASK._replace(size=size, part_bytes=part, claim=3, digests=NAMES))
        rows = []
        for item, at in enumerate(mine.locations):
            rows.append(Landed(item, 3, part_digests(house.buffer(at), part)))
        commits = [asyncio.ensure_future(land(one, 1, [row])) for row in rows]
        saved = asyncio.ensure_future(land(one, 1, [], flags=2))
        assert [await each for each in commits] == [[HIT]] * 10
        assert await saved == [HIT] * 10
        assert bytes(await one.ask(Op.PROBE, joint.pack_chain(3, NAMES))) == b"\1" * 10

    play(tmp_path, scene, ssd_bytes=128 * MIB, limits=Limits(30 * MIB))


@pytest.mark.parametrize("landing", [False, True])
def test_a_client_that_goes_gives_up_its_claims(tmp_path: Path, landing: bool) -> None:
    async def scene(house: House) -> None:
        one, two = await house.visitor(), await house.visitor()
        size, part = 4 * MIB, MIB
        ask = ASK._replace(size=size, part_bytes=part, claim=0xF)
        mine = await join(one, ask)
        pending = None
        if landing:
            rows = [Landed(item, 1, part_digests(house.buffer(at), part)[:8]) for item, at in enumerate(mine.locations)]
            pending = asyncio.ensure_future(land(one, 1, rows))
            await asyncio.sleep(0)
        one.line.close()
        if pending is not None:
            with pytest.raises(UnavailableError):
                await pending
        claims: list[int] = []
        for number in range(1, 1000):
            theirs = await join(two, ask._replace(ticket=number))
            if (claims := theirs.claims) == [0xF & ~there for there in theirs.present]:
                break
            two.line.tell(Op.ABANDON, frames.pack_u64([number]))
        assert set(claims) <= {0xF, 0xE}
        await two.leave()

    play(tmp_path, scene)


def test_a_join_of_many_blocks_for_a_client_that_goes_meanwhile(tmp_path: Path) -> None:
    async def scene(house: House) -> None:
        names = chain(namespace("blocks", "many"), [str(i).encode() for i in range(500)])
        for turns in range(4):
            one = await house.visitor()
            asked = asyncio.ensure_future(join(one, ASK._replace(digests=names, claim=1)))
            for _ in range(turns):
                await asyncio.sleep(0)
            one.line.close()
            with pytest.raises(UnavailableError):
                await asked
        two = await house.visitor()
        one = await house.visitor()
        one.line.tell(Op.ABANDON, frames.pack_u64([1]))  # overtakes the JOIN that it is for
        assert (await join(one, ASK._replace(digests=names, claim=1))).known == 500
        await one.ping()
        assert (await join(two, ASK)).claims == [0x0F] * 3

    play(tmp_path, scene)


def test_what_is_over_the_share_is_busy(tmp_path: Path) -> None:
    async def scene(house: House) -> None:
        one = await house.visitor()
        mine = await join(one, ASK._replace(digests=NAMES))
        assert mine.outcomes == [HIT] * 4 + [BUSY] * 6
        assert mine.known == 4
        other = await join(one, ASK._replace(ticket=2, digests=NAMES[5:6]))
        assert other.outcomes == [BUSY]
        assert other.ticket == other.known == 0
        compare = await join(one, ASK._replace(ticket=3, claim=0, digests=NAMES))
        assert compare.outcomes == [HIT] * 10
        with pytest.raises(TierCacheError):
            await join(one, ASK._replace(ticket=4, size=1 << 31, part_bytes=1 << 30, claim=1))

    play(tmp_path, scene, limits=Limits(4 * SIZE + 100))


def test_joins_that_come_at_once_share_one_share(tmp_path: Path) -> None:
    """Each is dealt with bit by bit, and none of them may count room that another one has got meanwhile."""

    async def scene(house: House) -> None:
        one = await house.visitor()
        many = [chain(namespace("blocks", str(run)), [str(i).encode() for i in range(100)]) for run in range(4)]
        asks = [ASK._replace(ticket=run + 1, digests=names) for run, names in enumerate(many)]
        made = await asyncio.gather(*(join(one, ask) for ask in asks))
        assert sum(at >= 0 for joined in made for at in joined.locations) == 120
        one.line.tell(Op.ABANDON, frames.pack_u64([1, 2, 3, 4]))
        again = await join(one, ASK._replace(ticket=9, digests=many[0]))  # what was given up makes room at once
        assert again.known == 100

    play(tmp_path, scene, limits=Limits(120 * SIZE))


def test_a_join_of_nothing_holds_nothing(tmp_path: Path) -> None:
    async def scene(house: House) -> None:
        one = await house.visitor()
        for number in range(1, 6):
            assert (await join(one, ASK._replace(ticket=number, digests=[]))).ticket == 0
        assert (await join(one, ASK._replace(ticket=6))).claims == [0x0F] * 3

    play(tmp_path, scene, limits=Limits(1 << 30, tickets=2))


def test_others_are_answered_while_many_blocks_are_joined_compared_and_given_up(tmp_path: Path) -> None:
    async def scene(house: House) -> None:
        names = chain(namespace("blocks", "many"), [str(i).encode() for i in range(600)])
        one, two = await house.visitor(), await house.visitor()

        async def pings(until: asyncio.Future[Any]) -> int:
            count = 0
            while not until.done():
                await two.ping()
                count += 1
            return count

        asked = asyncio.ensure_future(join(one, ASK._replace(digests=names, claim=1, size=PART)))
        assert await pings(asked) > 3
        rows = [Landed(i, 1, bytes(8)) for i in range(600)]
        compared = asyncio.ensure_future(one.ask(Op.COMPARE, frames.pack_landed(1, 0, rows)))
        assert await pings(compared) > 3
        assert joint.unpack_maps(await compared, 600) == [0] * 600
        landed = asyncio.ensure_future(land(one, 1, rows))  # little in bytes, and many
        await pings(landed)
        assert await landed == [CORRUPT] * 600
        one.line.tell(Op.ABANDON, frames.pack_u64([1]))
        again = asyncio.ensure_future(join(one, ASK._replace(ticket=2, digests=names, claim=1, size=PART)))
        assert await pings(again) > 3
        assert (await again).claims == [1] * 600

    play(tmp_path, scene)


def raw_join(**fields: int) -> bytes:
    """A JOIN whose head says anything."""
    head = {"ticket": 9, "kind": 1, "width": 16, "scope": 0, "expiry": 0, "size": SIZE, "part": PART, "claim": 1}
    head |= {"pieces": 0, "above": 0} | fields
    return struct.pack(
        "<QBBHfIIIQIB3x32s", head["ticket"], head["kind"], head["width"], head["scope"], 0.0, head["expiry"],
        head["size"], head["part"], head["claim"], head["pieces"], head["above"], b"",
    ) + NAMES[0]  # fmt: skip


HOSTILE = {
    "no such kind": (Op.JOIN, raw_join(kind=99)),
    "no such width": (Op.JOIN, raw_join(width=17)),
    "half a digest": (Op.JOIN, raw_join() + b"x"),
    "no ticket": (Op.JOIN, raw_join(ticket=0)),
    "ticket in use": (Op.JOIN, raw_join(ticket=1)),
    "huge count of pieces": (Op.JOIN, raw_join(pieces=(1 << 32) - 1)),
    "pieces that are not there": (Op.JOIN, raw_join(pieces=100)),
    "odd parent": (Op.JOIN, raw_join(above=7)),
    "no size": (Op.JOIN, raw_join(size=0)),
    "no parts": (Op.JOIN, raw_join(part=0)),
    "too many parts": (Op.JOIN, raw_join(part=100)),
    "claim beyond the block": (Op.JOIN, raw_join(claim=1 << 8)),
    "claim of everything": (Op.JOIN, raw_join(claim=(1 << 64) - 1)),
    "one block twice": (Op.JOIN, raw_join() + NAMES[0]),
    "piece beyond the block": (Op.JOIN, joint.pack_join(ASK._replace(ticket=9, claim=0, pieces=[(SIZE, SIZE + 5)]))),
    "piece of two parts": (Op.JOIN, joint.pack_join(ASK._replace(ticket=9, claim=0, pieces=[(5, PART + 5)]))),
    "empty piece": (Op.JOIN, joint.pack_join(ASK._replace(ticket=9, claim=0, pieces=[(5, 5)]))),
    "pieces that overlap": (Op.JOIN, joint.pack_join(ASK._replace(ticket=9, claim=0, pieces=[(0, 9), (5, 12)]))),
    "cost that is no number": (Op.JOIN, joint.pack_join(ASK._replace(ticket=9, cost_s=float("nan")))),
    "too many blocks": (Op.JOIN, raw_join() + bytes(16 * joint.DIGESTS_MAX)),
    "head cut off": (Op.JOIN, raw_join()[:40]),
    "empty land": (Op.LAND, b""),
    "land of huge count": (Op.LAND, struct.pack("<I4x", (1 << 32) - 1)),
    "item out of range": (Op.LAND, joint.pack_land(LandAsk(1, 0, [Landed(3, 1, bytes(8))], []))),
    "row without parts": (Op.LAND, joint.pack_land(LandAsk(1, 0, [Landed(0, 0, b"")], []))),
    "digests that do not fit": (Op.LAND, joint.pack_land(LandAsk(1, 0, [Landed(0, 1, bytes(16))], []))),
    "piece of no item": (Op.LAND, joint.pack_land(LandAsk(1, 0, [], [(7, 0, 5, 0)]))),
    "piece that ends before it begins": (Op.LAND, joint.pack_land(LandAsk(1, 0, [], [(0, 9, 5, 0)]))),
    "piece out of the block": (Op.LAND, joint.pack_land(LandAsk(1, 0, [], [(0, 9, SIZE + 1, 0)]))),
    "flags of a land": (Op.LAND, joint.pack_land(LandAsk(1, 8, [], []))),
    "wait while landing": (Op.LAND, joint.pack_land(LandAsk(1, 2, [Landed(0, 1, bytes(8))], []))),
    "land of a put": (Op.LAND, joint.pack_land(LandAsk(2, 0, [Landed(0, 1, bytes(8))], []))),
    "commit of a join": (Op.COMMIT, frames.pack_landed(1, 0, [Landed(0, 1, bytes(8))])),
    "compare of no item": (Op.COMPARE, frames.pack_landed(1, 0, [Landed(3, 1, bytes(8))])),
    "compare with flags": (Op.COMPARE, frames.pack_landed(1, 1, [])),
    "probe of nothing": (Op.PROBE, b""),
    "probe of half a digest": (Op.PROBE, joint.pack_chain(1, NAMES) + b"x"),
    "touch of other widths": (Op.TOUCH_CHAIN, struct.pack("<QB7x", 1, 9) + bytes(18)),
    "lease with no patience": (Op.LEASE_BLOCKS, joint.pack_lease_blocks(1, 9, 1, NAMES)),
    "lease cut off": (Op.LEASE_BLOCKS, joint.pack_lease_blocks(1, 0, 1, NAMES)[:10]),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_messages_end_their_connection(tmp_path: Path, what: str) -> None:
    async def scene(house: House) -> None:
        one, two = await house.visitor(), await house.visitor()
        mine = await join(one, ASK)
        assert mine.claims == [0x0F] * 3
        await two.put([Name(b"p" * 32)], [b"x"])
        number, grants = await one.reserve([Name(b"q" * 32)], [100])
        op, body = HOSTILE[what]
        if what == "land of a put":
            body = joint.pack_land(LandAsk(number, 0, [Landed(0, 1, bytes(8))], []))
        assert grants.outcomes == [HIT]
        if op == Op.TOUCH_CHAIN:
            one.line.tell(op, body)
        else:
            with pytest.raises((ProtocolError, UnavailableError)):
                await one.ask(op, body)
        await one.lost.wait()
        theirs = await join(two, ASK)
        assert [one | two for one, two in zip(theirs.claims, theirs.present)] == [0x0F] * 3
        assert house.cache.stats().get("tiercache_internal_errors_total", 0) == 0

    play(tmp_path, scene)


def test_tickets_that_have_ended_are_faults_and_nothing_worse(tmp_path: Path) -> None:
    async def scene(house: House) -> None:
        one = await house.visitor()
        with pytest.raises(ConfigError):
            await land(one, 77, [])
        with pytest.raises(ConfigError):
            await one.ask(Op.COMPARE, frames.pack_landed(77, 0, []))
        await join(one, ASK)
        with pytest.raises(ConfigError, match="SSD"):
            await land(one, 1, [], flags=2)
        await one.ping()

    play(tmp_path, scene)


def test_bodies_are_taken_apart_as_they_were_packed() -> None:
    rng = random.Random(7)
    for _ in range(300):
        count = rng.randrange(1, 20)
        width = rng.choice([16, 32])
        digests = [rng.randbytes(width) for _ in range(count)]
        pieces = [(PART * i + 5, PART * i + 99) for i in range(rng.randrange(3))]
        parent = rng.choice([b"", rng.randbytes(width)])
        ask = JoinAsk(
            rng.randrange(1 << 64), 1, rng.randrange(1 << 16), 0.5, rng.randrange(1 << 32), SIZE, PART,
            rng.randrange(32) << 3, pieces, parent, digests,
        )  # fmt: skip
        assert joint.unpack_join(memoryview(joint.pack_join(ask))) == ask
        joined = Joined(
            5, [rng.choice(list(Outcome)) for _ in digests], [rng.randrange(-1, 1 << 62) for _ in digests],
            [rng.randrange(1 << 64) for _ in digests], [rng.randrange(1 << 64) for _ in digests],
            [rng.choice([[], pieces]) for _ in digests], rng.randrange(count + 1),
        )  # fmt: skip
        assert joint.unpack_joined(memoryview(joint.pack_joined(joined)), count) == joined
        asked = LandAsk(
            rng.randrange(1 << 64), 1, [Landed(i, 1 << i, os.urandom(8 * (i + 1))) for i in range(rng.randrange(5))],
            [(i, 5, 9, rng.randrange(1 << 64)) for i in range(rng.randrange(5))],
        )  # fmt: skip
        assert joint.unpack_land(memoryview(joint.pack_land(asked))) == asked
        assert joint.unpack_lease_blocks(memoryview(joint.pack_lease_blocks(1, 2, 3, digests))) == (1, 2, 3, digests)
        assert joint.unpack_maps(memoryview(joint.pack_maps([1, 1 << 63])), 2) == [1, 1 << 63]


def test_answers_of_an_owner_that_is_none() -> None:
    good = joint.pack_joined(Joined(5, [HIT], [-1], [0], [0], [[]], 1))
    for body, count in ((good, 2), (good[:-1], 1), (good + bytes(12), 1), (good + b"\5" * 12, 1), (b"", 0)):
        if body == good + bytes(12):
            assert joint.unpack_joined(memoryview(body), count).pieces == [[(0, 0)]]
            continue
        with pytest.raises(ProtocolError):
            joint.unpack_joined(memoryview(body), count)
    with pytest.raises(ProtocolError):
        joint.unpack_joined(memoryview(good[:-1] + b"\x63"), 1)
    with pytest.raises(ProtocolError):
        joint.unpack_maps(memoryview(bytes(9)), 1)
