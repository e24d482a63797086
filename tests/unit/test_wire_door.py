"""What an owner answers: every message, over a real socket, with a real cache behind the door."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tiercache.errors import CapacityError, ConfigError, ProtocolError, TierCacheError, UnavailableError
from tiercache.keys import object_key
from tiercache.lease import PageRun
from tiercache.model import Form, Kind, Name, Outcome
from tiercache.testing.visits import MIB, House, page_bytes
from tiercache.wire import frames
from tiercache.wire.frames import Landed, Op, Patience
from tiercache.wire.hello import CHANNEL, Hello, pack_hello
from tiercache.wire.served import Limits
from tiercache.wire.session import DURABLE, LAST

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

HIT, MISS, BUSY, FULL, CORRUPT, GONE = (
    Outcome.HIT, Outcome.MISS, Outcome.BUSY, Outcome.FULL, Outcome.CORRUPT, Outcome.GONE,
)  # fmt: skip
PART = 16 << 10
RUN = PageRun(b"k" * 32, 5 * 64 * 1024 - 1000, 64 << 10, PART)


def name(label: str) -> Name:
    return Name(object_key("test", label))


def play(directory: Path, scene: Callable[[House], Awaitable[None]], **options: object) -> None:
    """Plays a scene in a fresh house, which is looked over afterwards."""

    async def run() -> None:
        async with House(directory, **options) as house:  # type: ignore[arg-type]
            await scene(house)

    asyncio.run(run())


@pytest.mark.parametrize("ssd_bytes", [0, 64 * MIB], ids=["memory", "ssd"])
def test_what_is_put_is_leased(tmp_path: Path, ssd_bytes: int) -> None:
    async def scene(house: House) -> None:
        one, two = await house.visitor(), await house.visitor()
        values = [os.urandom(1000), os.urandom(MIB + 7), b""]
        names = [name("a"), name("b"), name("c")]
        assert await one.put(names, values) == [HIT] * 3
        for patience in Patience:
            grants = await two.lease(names, patience)
            assert grants.outcomes == [HIT] * 3
            assert [bytes(house.buffer(at)) for at in grants.locations] == values
        assert house.cache.tiers.index.pins
        two.release(1, 2, 3, 99)
        await two.ping()
        assert (await two.lease([*names, name("z")], Patience.LOCAL)).outcomes == [MISS] * 4
        assert (await two.lease([*names, name("z")], Patience.BEST)).outcomes == [HIT] * 3 + [MISS]
        assert (await two.lease([*names, name("z")], Patience.MEMORY)).outcomes == [HIT] * 3 + [MISS]
        assert frames.unpack_outcomes(await two.ask(Op.DELETE, frames.pack_names([*names, name("z")]))) == [
            HIT, HIT, HIT, GONE,
        ]  # fmt: skip
        assert (await one.lease(names)).outcomes == [MISS] * 3

    play(tmp_path, scene, ssd_bytes=ssd_bytes)


def test_what_only_the_ssd_has_is_read_where_patience_allows(tmp_path: Path) -> None:
    async def scene(house: House) -> None:
        one = await house.visitor()
        value = os.urandom(300_000)
        assert await one.put([name("a")], [value], LAST | DURABLE) == [HIT]
        index, memory = house.cache.tiers.index, house.cache.tiers
        memory.forget(index.residents(0))
        assert not house.extents()
        assert (await one.lease([name("a")], Patience.MEMORY)).outcomes == [MISS]
        assert (await one.lease([name("a"), name("b")], Patience.LOCAL)).outcomes == [MISS] * 2
        assert not house.extents(), "nothing is read for what is not all local"
        grants = await one.lease([name("a")], Patience.LOCAL)
        assert bytes(house.buffer(grants.locations[0])) == value
        read = asyncio.ensure_future(one.read(RUN, [1], [0b1111]))
        one.fill(RUN, *await one.gaps())
        one.unfill(1, 1)
        one.line.tell(Op.UNFILLED, frames.pack_u64([1]))
        assert (await read).outcomes == [HIT]
        await one.ask(Op.FLUSH)
        one.release(*range(1, one._leases + 1))
        await one.ping()
        memory.forget(index.residents(0))
        assert (await one.pages(RUN.key, [1], [1], Patience.MEMORY)).outcomes == [MISS]
        grants = await one.pages(RUN.key, [1, 2], [0b1111, 1], Patience.BEST)
        assert grants.outcomes == [HIT, MISS]
        assert bytes(house.buffer(grants.locations[0])) == page_bytes(RUN, 1)
        assert (await one.pages(RUN.key, [1], [0b1111], Patience.LOCAL)).outcomes == [HIT]

    play(tmp_path, scene, ssd_bytes=64 * MIB)


def test_chains_are_put_and_matched(tmp_path: Path) -> None:
    async def scene(house: House) -> None:
        one = await house.visitor()
        names = [Name(os.urandom(16)) for _ in range(6)]
        values = [os.urandom(5000) for _ in names]
        ticket, grants = await one.reserve(names[:4], [5000] * 4, form=Form.BLOCK)
        assert grants.outcomes == [HIT] * 4
        landed = [one.write(i, at, values[i]) for i, at in enumerate(grants.locations)]
        assert await one.commit(ticket, landed) == [HIT] * 4
        ticket, grants = await one.reserve(names[4:], [5000] * 2, form=Form.BLOCK, parent=names[3].key)
        assert await one.commit(ticket, [one.write(0, grants.locations[0], values[4])]) == [HIT, MISS]
        for patience in Patience:
            found = await one.match(names, patience)
            assert found.outcomes == [HIT] * 5
            assert [bytes(house.buffer(at)) for at in found.locations] == values[:5]
        ticket, grants = await one.reserve(names[:1], [10], form=Form.BLOCK, parent=os.urandom(16))
        assert grants.outcomes == [FULL], "a parent that nobody knows"
        with pytest.raises(ProtocolError):
            await one.match([names[0], Name(b"w" * 32)])
        await one.lost.wait()

    play(tmp_path, scene)


# -- puts


def test_an_entry_is_visible_when_it_is_whole(tmp_path: Path) -> None:
    async def scene(house: House) -> None:
        one, two = await house.visitor(), await house.visitor()
        value = os.urandom(200_000)  # four parts
        ticket, grants = await one.reserve([name("a")], [len(value)])
        assert (await two.reserve([name("a")], [len(value)]))[1] == ([BUSY], [-1])
        at = grants.locations[0]
        assert await one.commit(ticket, [one.write(0, at, value, 0b0101)], 0) == [MISS]
        assert (await two.lease([name("a")])).outcomes == [MISS]
        assert await one.commit(ticket, [one.write(0, at, value, 0b1111)], 0) == [HIT]
        assert (await two.lease([name("a")])).outcomes == [HIT]
        assert (await two.reserve([name("a")], [len(value)]))[1] == ([HIT], [-1])
        assert await one.commit(ticket, [], LAST) == [HIT]
        with pytest.raises(ConfigError, match="has ended"):
            await one.commit(ticket, [])
        with pytest.raises(CapacityError):
            await one.reserve([name("b")], [1 << 40])
        with pytest.raises(ConfigError, match="item"):
            await one.commit((await one.reserve([name("b")], [10]))[0], [Landed(3, 1, bytes(8))])
        with pytest.raises(ConfigError, match="SSD"):
            await one.commit((await one.reserve([name("c")], [10]))[0], [], LAST | DURABLE)

    play(tmp_path, scene)


@pytest.mark.parametrize("size", [1000, 3 * MIB], ids=["inline", "thread"])
def test_bytes_that_are_not_what_was_meant_are_not_shown(tmp_path: Path, size: int) -> None:
    async def scene(house: House) -> None:
        one = await house.visitor()
        value = os.urandom(size)
        ticket, grants = await one.reserve([name("a"), name("b")], [size] * 2)
        good = one.write(0, grants.locations[0], value)
        bad = one.write(1, grants.locations[1], value)
        house.buffer(grants.locations[1]).view()[size // 2] ^= 1
        assert await one.commit(ticket, [good, bad], 0) == [HIT, CORRUPT]
        assert await one.commit(ticket, [one.write(1, grants.locations[1], value)]) == [HIT, CORRUPT], "for good"
        assert (await one.lease([name("a"), name("b")])).outcomes == [HIT, MISS]
        assert await one.put([name("b")], [value]) == [HIT]
        assert house.metrics.total("tiercache_corruptions_total") == 1

    play(tmp_path, scene)


def test_abandoned_puts_leave_nothing(tmp_path: Path) -> None:
    async def scene(house: House) -> None:
        one = await house.visitor()
        value = os.urandom(200_000)
        ticket, grants = await one.reserve([name("a"), name("b")], [len(value)] * 2)
        assert await one.commit(ticket, [one.write(0, grants.locations[0], value, 1)], 0) == [MISS, MISS]
        one.line.tell(Op.ABANDON, frames.pack_u64([ticket, 7777]))
        await one.ping()
        assert not house.extents()
        assert await one.put([name("a")], [value]) == [HIT]

    play(tmp_path, scene)


# -- loads


def test_two_processes_want_a_page_and_one_loads_it(tmp_path: Path) -> None:
    async def scene(house: House) -> None:
        one, two = await house.visitor(), await house.visitor()
        first = asyncio.ensure_future(one.read(RUN, [0, 4], [0b1111, 0b1111]))
        number, fill, gaps = await one.gaps()
        second = asyncio.ensure_future(two.read(RUN, [4, 0], [0b1000, 0b0001]))
        await two.ping()
        assert two.fills.empty()
        one.fill(RUN, number, fill, gaps)
        assert (await second).outcomes == [HIT, HIT], "as soon as it has landed"
        one.unfill(number, fill)
        grants = await first
        assert [bytes(house.buffer(at)) for at in grants.locations] == [page_bytes(RUN, 0), page_bytes(RUN, 4)]
        assert house.metrics.total("tiercache_merged_loads_total") == 2
        assert (await two.pages(RUN.key, [0, 4], [0b1111, 1])).outcomes == [HIT, HIT]
        assert (await two.pages(RUN.key, [0, 1], [1, 1])).outcomes == [HIT, MISS]

    play(tmp_path, scene)


def test_only_the_missing_parts_are_asked_for(tmp_path: Path) -> None:
    async def scene(house: House) -> None:
        one = await house.visitor()
        for wanted, asked in [(0b0010, 0b0010), (0b0111, 0b0101), (0b0111, 0)]:
            read = asyncio.ensure_future(one.read(RUN, [2], [wanted]))
            if asked:
                number, fill, gaps = await one.gaps()
                assert [gap.parts for gap in gaps] == [asked]
                one.fill(RUN, number, fill, gaps)
                one.unfill(number, fill)
            (at,) = (await read).locations
            assert bytes(house.buffer(at))[PART : 2 * PART] == page_bytes(RUN, 2)[PART : 2 * PART]
        assert one.fills.empty()

    play(tmp_path, scene)


def test_a_load_may_say_that_nothing_has_landed_yet(tmp_path: Path) -> None:
    """Also when the owner waits for just that word."""

    async def scene(house: House) -> None:
        one = await house.visitor()
        read = asyncio.ensure_future(one.read(RUN, [2], [1]))
        number, fill, gaps = await one.gaps()
        for _ in range(3):
            one.line.tell(Op.FILLED, frames.pack_landed(fill, 0, []), number=number)
            await one.ping()
        one.fill(RUN, number, fill, gaps)
        one.unfill(number, fill)
        assert (await read).outcomes == [HIT]
        assert house.metrics.total("tiercache_internal_errors_total") == 0

    play(tmp_path, scene)


@pytest.mark.parametrize("how", ["fails", "lies", "leaves", "is cut", "sleeps"])
def test_a_load_that_is_given_up_goes_to_another_who_waits(tmp_path: Path, how: str) -> None:
    async def scene(house: House) -> None:
        one, two, three = [await house.visitor() for _ in range(3)]
        reads = [asyncio.ensure_future(one.read(RUN, [3], [0b1111]))]
        number, fill, gaps = await one.gaps()
        for other in (two, three):
            reads.append(asyncio.ensure_future(other.read(RUN, [3], [0b0110])))
            await other.ping()
        if how == "lies":
            one.fill(RUN, number, fill, gaps, lie=True)
        if how in ("fails", "lies"):
            one.unfill(number, fill)
        elif how == "leaves":
            one.line.close()
        elif how == "is cut":
            one.line.tell(77, b"nonsense")
        if how in ("lies", "sleeps"):
            assert (await reads[0]).outcomes == [BUSY], "it knows of no fault: it reads around the cache"
        else:
            with pytest.raises(UnavailableError):
                await reads[0]
        taken = asyncio.ensure_future(two.gaps()), asyncio.ensure_future(three.gaps())
        (done,), (waits,) = await asyncio.wait(taken, return_when=asyncio.FIRST_COMPLETED)
        waits.cancel()
        heir = two if done is taken[0] else three
        another = done.result()[2][0].location
        assert (another != gaps[0].location) or how != "sleeps", "one that may still be written to is not used"
        heir.fill(RUN, *done.result())
        heir.unfill(*done.result()[:2])
        for read in reads[1:]:
            (at,) = (await read).locations
            assert bytes(house.buffer(at))[PART : 3 * PART] == page_bytes(RUN, 3)[PART : 3 * PART]
        assert two.fills.empty() and three.fills.empty(), "one load for both"
        if how == "sleeps":
            assert house.extents() == 2, "what a living process may write to is kept"
            assert house.door.facts()[0]["pinned_bytes"] == RUN.page_bytes
            one.fill(RUN, number, fill, gaps)
            one.unfill(number, fill)
            await one.ping()
            await asyncio.sleep(0)
            await one.ping()
            assert house.extents() == 1

    limits = Limits(16 * MIB, fill_s=0.05 if how == "sleeps" else 60.0)
    play(tmp_path, scene, limits=limits)


def test_a_sleeper_in_a_page_of_which_parts_are_there(tmp_path: Path) -> None:
    """What was loaded before goes with it: nobody may see bytes that somebody still writes."""

    async def scene(house: House) -> None:
        one, two = await house.visitor(), await house.visitor()
        read = asyncio.ensure_future(two.read(RUN, [0], [1]))
        asked = await two.gaps()
        two.fill(RUN, *asked)
        two.unfill(*asked[:2])
        before = (await read).locations[0]
        read = asyncio.ensure_future(one.read(RUN, [0], [0b1100]))
        number, fill, gaps = await one.gaps()
        assert gaps[0].location == before
        assert (await read).outcomes == [BUSY]
        read = asyncio.ensure_future(two.read(RUN, [0], [0b1111]))
        asked = await two.gaps()
        assert asked[2][0].location != before and asked[2][0].parts == 0b1111
        two.fill(RUN, *asked)
        two.unfill(*asked[:2])
        assert bytes(house.buffer((await read).locations[0])) == page_bytes(RUN, 0)
        house.buffer(before).view()[3 * PART] ^= 255  # the sleeper writes on
        one.unfill(number, fill)
        two.release(1)
        await two.ping()

    play(tmp_path, scene, limits=Limits(16 * MIB, fill_s=0.05))


def test_a_sleeper_in_a_page_that_is_deleted(tmp_path: Path) -> None:
    """Who waits for it reads around the cache: the page has one extent, and somebody may write to it."""

    async def scene(house: House) -> None:
        one, two = await house.visitor(), await house.visitor()
        read = asyncio.ensure_future(two.read(RUN, [0], [1]))
        asked = await two.gaps()
        two.fill(RUN, *asked)
        two.unfill(*asked[:2])
        await read
        reads = [asyncio.ensure_future(one.read(RUN, [0], [0b1000]))]
        asked = await one.gaps()
        reads.append(asyncio.ensure_future(two.read(RUN, [0], [0b1000])))
        await two.ping()
        await two.ask(Op.DELETE, frames.pack_names([Name(RUN.key, 0)]))
        assert (await reads[0]).outcomes == [BUSY]
        assert (await reads[1]).outcomes == [FULL]
        read = asyncio.ensure_future(two.read(RUN, [0], [0b1000]))
        again = await two.gaps()
        assert again[2][0].location != asked[2][0].location
        two.unfill(*again[:2])
        with pytest.raises(UnavailableError):
            await read
        one.unfill(*asked[:2])
        two.release(1)
        await two.ping()

    play(tmp_path, scene, limits=Limits(16 * MIB, fill_s=0.05))


def test_nobody_waits_for_ever(tmp_path: Path) -> None:
    async def scene(house: House) -> None:
        one, two = await house.visitor(), await house.visitor()
        first = asyncio.ensure_future(one.read(RUN, [0], [1]))
        number, fill, gaps = await one.gaps()
        assert (await two.read(RUN, [0], [1])).outcomes == [BUSY]
        assert (await first).outcomes == [BUSY]
        with pytest.raises(UnavailableError):
            await one.ask(Op.CLAIM, b"a"), await two.ask(Op.CLAIM, b"a")
        one.fill(RUN, number, fill, gaps)  # the load goes on, for whoever comes next
        one.unfill(number, fill)
        await one.ping()
        assert (await two.read(RUN, [0], [1])).outcomes == [HIT]
        assert two.fills.empty()

    play(tmp_path, scene, limits=Limits(16 * MIB, question_s=0.05))


def test_reads_that_cannot_be(tmp_path: Path) -> None:
    async def scene(house: House) -> None:
        line = await house.visitor()
        channel = await house.visitor(line.token, role=CHANNEL)
        with pytest.raises(ConfigError, match="line"):
            await channel.read(RUN, [0], [1])
        for run, ordinals, parts in [(RUN, [0], [0]), (RUN, [0], [1 << 4]), (RUN, [4], [1 << 63]), (RUN, [5], [1])]:
            other = await house.visitor()
            with pytest.raises(TierCacheError):
                await other.read(run, ordinals, parts)
            await asyncio.wait_for(other.lost.wait(), 10)
        for ordinals, parts in [([0], [0]), ([0, 0], [1, 1])]:
            other = await house.visitor()
            with pytest.raises(ProtocolError):
                await other.pages(RUN.key, ordinals, parts)

    play(tmp_path, scene)


# -- the rest


def test_memory_that_is_said_to_be_damaged_is_looked_at(tmp_path: Path) -> None:
    async def scene(house: House) -> None:
        one = await house.visitor()
        await one.put([name("a"), name("b")], [b"a" * 9999, b"b" * 9999])
        grants = await one.lease([name("a"), name("b")])
        house.buffer(grants.locations[1]).view()[5] ^= 1
        await one.ask(Op.QUARANTINE, frames.pack_names([name("a"), name("b"), name("c")]))
        assert (await one.lease([name("a"), name("b")])).outcomes == [HIT, MISS]
        assert house.metrics.total("tiercache_corruptions_total") == 1

    play(tmp_path, scene)


def test_touches_count_and_keep(tmp_path: Path) -> None:
    async def scene(house: House) -> None:
        one = await house.visitor()
        names = [name(str(i)) for i in range(8)]
        await one.put(names, [os.urandom(3 * MIB) for _ in names])
        grants = await one.lease(names)
        one.release(1)
        one.line.tell(Op.TOUCH, frames.pack_i64([grants.locations[0], -1, 1 << 60, grants.locations[1] + 1]))
        await one.ping()
        assert house.metrics.value("tiercache_hits_total", tier="memory", kind="glance") == 4
        for i in range(7):
            await one.put([name(f"new {i}")], [os.urandom(3 * MIB)])
        left = (await one.lease(names)).outcomes
        assert left[0] is HIT and left.count(MISS) >= 5

    play(tmp_path, scene)


def test_notes_are_shared_and_forgotten(tmp_path: Path) -> None:
    async def scene(house: House) -> None:
        one, two, three = [await house.visitor() for _ in range(3)]
        assert bytes(await one.ask(Op.CLAIM, b"stat/a")) == b"\1"
        waits = asyncio.ensure_future(two.ask(Op.CLAIM, b"stat/a"))
        assert bytes(await three.ask(Op.KNOWN, b"stat/a")) == b"\1"
        with pytest.raises(ConfigError):
            await one.ask(Op.CLAIM, b"stat/a")
        one.line.tell(Op.SETTLE, frames.pack_settle(b"stat/a", b"value", 60.0))
        assert bytes(await waits) == b"\0value" == bytes(await three.ask(Op.CLAIM, b"stat/a"))
        assert bytes(await one.ask(Op.KNOWN, b"stat/a")) == b"\0value"
        assert bytes(await one.ask(Op.FORGET, frames.pack_json([b"stat/".hex()]))) == b""
        await two.ping()
        assert two.forgets == [[b"stat/".hex()]] and not one.forgets
        assert bytes(await two.ask(Op.CLAIM, b"stat/a")) == b"\1"
        heir = asyncio.ensure_future(three.ask(Op.CLAIM, b"stat/a"))
        await three.ping()
        two.line.close()
        assert bytes(await heir) == b"\1", "who finds out and dies is followed by who waits"

    play(tmp_path, scene)


def test_segments_stats_and_calls(tmp_path: Path) -> None:
    async def scene(house: House) -> None:
        one = await house.visitor()
        assert one.welcome["entry_bytes_max"] > 0 and one.welcome["owner_pid"] == os.getpid()
        await one.put([name("a")], [b"x"])
        body, fds = await one.line.ask_fds(Op.SEGMENTS, bytes(4))
        assert bytes(body) == bytes(4) and len(fds) == 1
        assert os.fstat(fds[0]).st_size == house.cache.tiers.memory.segments[0].size  # type: ignore[attr-defined]
        os.close(fds[0])
        body, fds = await one.line.ask_fds(Op.SEGMENTS, (1).to_bytes(4, "little"))
        assert not bytes(body) and not fds
        assert frames.unpack_json(await one.ask(Op.STATS))["tiercache_entries"] == 1
        assert frames.unpack_json(await one.ask(Op.CALL, frames.pack_json(["ping", {}]))) == {}
        (client,) = frames.unpack_json(await one.ask(Op.CALL, frames.pack_json(["clients", {}])))
        assert client["pid"] == os.getpid() and client["uid"] == os.getuid() and not client["tickets"]
        rows = frames.unpack_json(await one.ask(Op.CALL, frames.pack_json(["contents", {}])))["rows"]
        assert [row[0] for row in rows] == [name("a").key.hex()]
        with pytest.raises(ConfigError, match="no question"):
            await one.ask(Op.CALL, frames.pack_json(["nonsense", {}]))

    play(tmp_path, scene)


# -- quotas


def test_a_client_pins_no_more_than_its_share(tmp_path: Path) -> None:
    async def scene(house: House) -> None:
        one, two = await house.visitor(), await house.visitor()
        names = [name(str(i)) for i in range(6)]
        ticket, grants = await one.reserve(names, [MIB] * 6)
        assert grants.outcomes == [HIT] * 4 + [BUSY] * 2, "as much as fits"
        assert (await one.reserve(names[4:], [MIB] * 2))[1].outcomes == [BUSY] * 2
        ticket_of_none, none = await one.reserve(names[4:], [MIB] * 2)
        assert ticket_of_none == 0 and none.outcomes == [BUSY] * 2
        assert await one.commit(0, []) == []
        assert (await one.read(RUN, [0], [1])).outcomes == [BUSY]
        landed = [one.write(i, at, os.urandom(MIB)) for i, at in enumerate(grants.locations[:4])]
        assert await one.commit(ticket, landed) == [HIT] * 4
        assert await two.put(names[4:], [os.urandom(MIB)] * 2) == [HIT] * 2
        pins = house.cache.tiers.index.pins
        assert (await one.lease(names)).outcomes == [BUSY] * 6
        assert house.cache.tiers.index.pins == pins, "and nothing is held"
        assert (await one.lease(names[:3])).outcomes == [HIT] * 3
        assert (await one.lease(names[3:5])).outcomes == [BUSY] * 2
        assert (await one.lease(names[3:4])).outcomes == [HIT]
        assert (await two.lease(names[:4])).outcomes == [HIT] * 4, "everybody has a share"
        one.release(2)
        assert house.door.facts()[0]["pinned_bytes"] <= 4 * MIB

    play(tmp_path, scene, limits=Limits(4 * MIB))


def test_leases_and_tickets_are_counted(tmp_path: Path) -> None:
    async def scene(house: House) -> None:
        one = await house.visitor()
        await one.put([name("a")], [b"a"])
        assert (await one.lease([name("a")], number=5)).outcomes == [HIT]
        assert (await one.lease([name("a")], number=6)).outcomes == [HIT]
        assert (await one.lease([name("a")], number=7)).outcomes == [BUSY]
        one.release(5)
        assert (await one.lease([name("a")], number=8)).outcomes == [HIT]
        first, _ = await one.reserve([name("b")], [10])
        assert (await one.reserve([name("c")], [10]))[1].outcomes == [BUSY]
        one.line.tell(Op.ABANDON, frames.pack_u64([first]))
        assert (await one.reserve([name("c")], [10]))[1].outcomes == [HIT]
        with pytest.raises(ProtocolError, match="in use"):
            await one.lease([name("a")], number=8)

    play(tmp_path, scene, limits=Limits(4 * MIB, leases=2, tickets=1))


def test_a_lease_released_before_its_answer_is_not_held(tmp_path: Path) -> None:
    async def scene(house: House) -> None:
        one = await house.visitor()
        read = asyncio.ensure_future(one.read(RUN, [0], [1], number=9))
        number, fill, gaps = await one.gaps()
        one.release(9)
        one.fill(RUN, number, fill, gaps)
        one.unfill(number, fill)
        assert (await read).outcomes == [BUSY]
        one.release(10)
        assert (await one.pages(RUN.key, [0], [1])).outcomes == [HIT]
        body = frames.pack_pages(10, Patience.MEMORY, RUN.key, [0], [1])
        assert frames.unpack_grants(await one.ask(Op.LEASE_PAGES, body)).outcomes == [BUSY], "overtaken"
        assert house.door.facts()[0]["leases"] == 1

    play(tmp_path, scene)


def test_many_questions_wait_for_each_other(tmp_path: Path) -> None:
    async def scene(house: House) -> None:
        one = await house.visitor()
        run = PageRun(b"m" * 32, 100 * PART, PART, PART)
        reads = [asyncio.ensure_future(one.read(run, [i], [1])) for i in range(20)]
        for i in range(20):
            asked = await one.gaps()
            if i < 17:
                assert house.door.facts()[0]["questions"] == 20 - i
            assert bytes(await one.ask(Op.CLAIM, b"%d" % i)) == b"\1", "other questions have lanes of their own"
            one.fill(run, *asked)
            one.unfill(*asked[:2])
            await reads[asked[2][0].ordinal]
        rest = [asyncio.ensure_future(one.read(run, [i], [1])) for i in range(20, 60)]
        await asyncio.wait_for(one.lost.wait(), 10)
        assert not [one for one in await asyncio.gather(*rest, return_exceptions=True) if isinstance(one, tuple)]

    play(tmp_path, scene, limits=Limits(16 * MIB, tasks=4, waiting=30))


# -- who comes in


def test_greetings_that_are_none(tmp_path: Path) -> None:
    async def scene(house: House) -> None:
        good = {"magic": "TCLOCAL", "version": frames.VERSION, "token": "a" * 32, "role": "line"}
        for wrong, words in [
            ({"version": 99}, f"version {frames.VERSION}.*99"), ({"magic": "x"}, "no greeting"),
            ({"token": "short"}, "token"), ({"role": "guest"}, "role"),
        ]:  # fmt: skip
            with pytest.raises(ProtocolError, match=words):
                await strange(house, Op.HELLO, frames.pack_json({**good, **wrong}))
        with pytest.raises(ProtocolError, match="JSON"):
            await strange(house, Op.HELLO, b"\xff")
        with pytest.raises(ProtocolError, match="HELLO"):
            await strange(house, Op.STATS, b"")
        one = await house.visitor()
        with pytest.raises(ProtocolError, match="one line"):
            await house.visitor(one.token)
        with pytest.raises(ProtocolError, match="no operation"):
            await one.ask(Op.HELLO, pack_hello(Hello(one.token, "line")))
        assert house.door.clients in (0, 1)

    async def strange(house: House, op: int, body: bytes) -> None:
        from tiercache.testing.visits import Visitor

        visitor = Visitor(house, "")
        try:
            await visitor.ask(op, body)
        finally:
            await asyncio.wait_for(visitor.lost.wait(), 10)

    play(tmp_path, scene)


def test_a_loader_that_says_nothing_is_waited_for_less_than_one_that_still_loads(tmp_path: Path) -> None:
    async def scene(house: House) -> None:
        one, two = await house.visitor(), await house.visitor()
        reads = [asyncio.ensure_future(each.read(RUN, [i], [1])) for i, each in enumerate((one, two))]
        asked = [await one.gaps(), await two.gaps()]

        async def alive() -> None:
            number, fill, _ = asked[1]
            while True:
                two.line.tell(Op.FILLED, frames.pack_landed(fill, 0, []), number=number)
                await asyncio.sleep(0.02)

        saying = asyncio.ensure_future(alive())
        assert (await reads[0]).outcomes == [BUSY]
        assert not reads[1].done()
        two.fill(RUN, *asked[1])
        two.unfill(*asked[1][:2])
        assert (await reads[1]).outcomes == [HIT]
        saying.cancel()
        one.unfill(*asked[0][:2])
        await one.ping()

    play(tmp_path, scene, limits=Limits(16 * MIB, fill_s=60.0, silent_s=0.3))


def test_a_loader_that_lives_and_loads_nothing_is_not_waited_for_without_end(tmp_path: Path) -> None:
    async def scene(house: House) -> None:
        one = await house.visitor()
        read = asyncio.ensure_future(one.read(RUN, [0], [1]))
        number, fill, _ = await one.gaps()
        while not read.done():
            one.line.tell(Op.FILLED, frames.pack_landed(fill, 0, []), number=number)
            await asyncio.sleep(0.01)
        assert read.result().outcomes == [BUSY]
        one.unfill(number, fill)
        await one.ping()

    play(tmp_path, scene, limits=Limits(16 * MIB, fill_s=0.3, silent_s=60.0))


def test_small_entries_count_with_the_memory_that_they_take(tmp_path: Path) -> None:
    async def scene(house: House) -> None:
        one, two = await house.visitor(), await house.visitor()
        names = [name(str(i)) for i in range(100)]
        ticket, grants = await one.reserve(names, [10] * 100)
        assert grants.outcomes == [HIT] * 64 + [BUSY] * 36
        one.line.tell(Op.ABANDON, frames.pack_u64([ticket]))
        await one.ping()
        for some in (names[:50], names[50:]):
            assert await two.put(some, [b"x" * 10] * 50) == [HIT] * 50
        assert (await one.lease(names)).outcomes == [BUSY] * 100
        assert (await one.lease(names[:64])).outcomes == [HIT] * 64
        assert house.door.facts()[0]["pinned_bytes"] == 64 * 4096
        assert (await one.lease(names[64:65])).outcomes == [BUSY]

    play(tmp_path, scene, limits=Limits(64 * 4096))


def test_a_ticket_that_was_given_up_before_it_was_granted_holds_nothing(tmp_path: Path) -> None:
    """Whether that word overtakes the question, or its answer is yet to come."""

    async def scene(house: House) -> None:
        one = await house.visitor()
        one.line.tell(Op.ABANDON, frames.pack_u64([901]))
        ask = frames.ReserveAsk(901, Kind.TENSOR, Form.LONE, 0, 0.0, 0, b"", [name("a")], [MIB])
        answer = await one.ask(Op.RESERVE, frames.pack_reserve(ask))
        assert frames.unpack_u64(answer[:8]) == [901]
        assert house.door.facts()[0]["tickets"] == 0
        assert await one.put([name("a")], [b"a"]) == [HIT]
        body = frames.pack_landed(901, LAST, [])
        with pytest.raises(ConfigError, match="no put 901"):
            await one.ask(Op.COMMIT, body)
        held, _ = await one.reserve([name("b")], [MIB])
        with pytest.raises(ProtocolError, match="in use"):
            await one.ask(Op.RESERVE, frames.pack_reserve(ask._replace(ticket=held, names=[name("c")])))

    play(tmp_path, scene)


def test_only_who_comes_again_says_what_it_had(tmp_path: Path) -> None:
    async def scene(house: House) -> None:
        one = await house.visitor()
        await one.put([name("a")], [b"a"])
        (at,) = (await one.lease([name("a")])).locations
        assert bytes(await one.ask(Op.REDECLARE)) == b"", "to have nothing is no claim"
        with pytest.raises(ProtocolError, match="comes again"):
            await one.ask(Op.REDECLARE, frames.pack_holds([(77, [at])]))
        again = await house.visitor(again=True)
        held = await again.ask(Op.REDECLARE, frames.pack_holds([(number, [at]) for number in range(1, 5)]))
        assert bytes(held) == b"\1\1\0\0", "as many as anybody may have"
        await again.ping()
        with pytest.raises(ProtocolError, match="comes again"):
            await again.ask(Op.REDECLARE, frames.pack_holds([(9, [at])]))

    play(tmp_path, scene, limits=Limits(16 * MIB, leases=2))
