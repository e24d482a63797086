"""Peers that know the secret and lie, and callers that do not know it."""

from __future__ import annotations

import asyncio
import json
import random
from typing import TYPE_CHECKING, Any

import pytest

from tests.unit.peer_hosts import DEADLINE_S, PORT, SIZE, World, value
from tests.unit.test_peer_frames import damaged
from tiercache.buffers import Buffer, part_digests
from tiercache.errors import TierCacheError
from tiercache.keys import chain, namespace, object_key
from tiercache.model import Form, Kind, Name, Outcome, Payload, all_parts, part_bytes_for
from tiercache.peer import frames
from tiercache.peer.channel import read_frame, shake
from tiercache.peer.frames import HEADER, Frame, Held, Item, Op, Place, Pushing, pack
from tiercache.peer.pool import STRANGERS_MAX
from tiercache.peer.view import mark
from tiercache.testing.simloop import derive, simulate
from tiercache.transport import Move

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from tiercache.testing.simloop import SimLoop
    from tiercache.transport import Link

HIT, MISS = Outcome.HIT, Outcome.MISS
KEYS = [object_key("hostile", str(number)) for number in range(12)]
BLOCKS = chain(namespace("hostile"), [bytes([number]) for number in range(12)])
SECRET = b"the secret of all"


def run(main: Callable[[World], Coroutine[Any, Any, None]], seed: int = 1) -> None:
    async def whole(loop: SimLoop) -> None:
        await main(World(loop))

    simulate(whole, seed=seed)


class Liar:
    """A peer that says what it is told to say. Use it with `async with`."""

    link: Link

    def __init__(self, world: World, victim: str, name: str = "liar") -> None:
        self.world, self.victim, self.name = world, victim, name
        self.rng = derive(world.loop.seed, name)
        self.heard: list[Frame] = []
        self.memory = bytearray(1 << 20)
        self.answers: dict[Op, Callable[[Frame], bytes | None]] = {}
        self.pulses = True

    async def __aenter__(self) -> Liar:
        with self.world.network.at(self.name):
            self.reader, self.writer = await asyncio.open_connection(self.victim, PORT)
            self.transport = self.world.network.open_transport(self.name, lambda note: None)
            channel = await shake(
                self.reader, self.writer, dialled=True, about={"id": self.name, "name": self.name, "machine": ""},
                secret=SECRET, random=self.rng, deadline_s=DEADLINE_S,
                tell=lambda: {"transports": {"loop": self.transport.address.hex()}},
            )  # fmt: skip
            address = bytes.fromhex(channel.hello["transports"]["loop"])
            self.link = await self.transport.connect(address, DEADLINE_S)
            self.exposed = self.transport.expose(Buffer.of(self.memory, writable=True), writable=True)
            ready = {"transport": "loop", "ok": True, "landing": self.exposed.hex()}
            self.writer.write(pack(Op.READY, 0, json.dumps(ready).encode()))
            self.landing = json.loads((await read_frame(self.reader, DEADLINE_S)).body)["landing"]
            self.say(Op.MEMORY, frames.pack_memory(0, self.exposed))
            self.tasks = [asyncio.ensure_future(self._listen()), asyncio.ensure_future(self._pulse())]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.wait(self.tasks)
        self.writer.transport.abort()
        await self.transport.close()

    def say(self, op: int, body: bytes = b"", number: int = 0) -> None:
        self.raw(HEADER.pack(len(body), op, 0, number) + body)

    def raw(self, data: bytes) -> None:
        self.writer.write(data)

    def stored(self, keys: list[bytes]) -> None:
        self.say(Op.STORED, frames.pack_marks([mark(key) for key in keys]))

    async def _listen(self) -> None:
        while True:
            try:
                frame = await read_frame(self.reader, 3600.0)
            except (TierCacheError, OSError, EOFError):
                return
            self.heard.append(frame)
            answer = self.answers.get(Op(frame.op))
            if answer is not None and (said := answer(frame)) is not None:
                self.raw(said)

    async def _pulse(self) -> None:
        while self.pulses:
            self.say(Op.PULSE, frames.pack_number(0))
            await asyncio.sleep(DEADLINE_S / 4)

    async def cut_off(self) -> None:
        """Returns when the victim has closed the channel."""
        async with asyncio.timeout(60):
            while not self.writer.transport.is_closing():
                await asyncio.sleep(0.05)


def payload(name: Name, data: bytes, *, form: Form = Form.LONE, parent: bytes = b"", **changes: Any) -> Payload:
    step = changes.pop("part_bytes", part_bytes_for(len(data)))
    given = {
        "name": name, "size": len(data), "part_bytes": step, "parts": all_parts(len(data), step), "kind": Kind.TENSOR,
        "digests": part_digests(Buffer.of(data), step), "parent": parent, "form": form,
    }  # fmt: skip
    return Payload(**(given | changes))


def honest(liar: Liar, keys: list[bytes]) -> list[Item]:
    """What an honest peer would say of these; its memory holds them."""
    items = []
    for i, key in enumerate(keys):
        data = value(key)
        liar.memory[i * SIZE : (i + 1) * SIZE] = data
        items.append(Item(payload(Name(key), data), Place(0, i * SIZE)))
    return items


def held(frame: Frame, items: list[Item], pin: int = 7) -> bytes:
    return pack(Op.HELD, frame.number, frames.pack_held(Held(pin, items)))


LIES: dict[str, Callable[[Liar, Frame, list[Item]], bytes | None]] = {
    "silence": lambda liar, frame, items: None,
    "a fault": lambda liar, frame, items: pack(Op.FAULT, frame.number, b"\xff\xfe no"),
    "another operation": lambda liar, frame, items: pack(Op.PUSHED, frame.number, frames.pack_number(0)),
    "a body that is none": lambda liar, frame, items: pack(Op.HELD, frame.number, b"no"),
    "another number": lambda liar, frame, items: pack(Op.HELD, frame.number + 1, frames.pack_held(Held(1, items))),
    "twice": lambda liar, frame, items: held(frame, [frames.NOT_THERE] * 12) + held(frame, items),
    "too few": lambda liar, frame, items: held(frame, items[:-1]),
    "too many": lambda liar, frame, items: held(frame, [*items, items[0]]),
    "in another order": lambda liar, frame, items: held(frame, items[::-1]),
    "other names": lambda liar, frame, items: held(
        frame, [Item(payload(Name(bytes(32)), b"x" * SIZE), Place(0))] * 12
    ),
    "a region never introduced": lambda liar, frame, items: held(
        frame, [one._replace(place=Place(99, 0)) for one in items]
    ),
    "outside of the region": lambda liar, frame, items: held(
        frame, [one._replace(place=Place(0, 1 << 60)) for one in items]
    ),
    "another place": lambda liar, frame, items: held(frame, [one._replace(place=Place(0, 5)) for one in items]),
    "wrong digests": lambda liar, frame, items: held(
        frame, [Item(payload(one.payload.name, value(one.payload.name.key), digests=b"x" * 8), one.place)
                for one in items]
    ),
    "pages": lambda liar, frame, items: held(
        frame, [Item(payload(one.payload.name, value(one.payload.name.key), form=Form.PAGE), one.place)
                for one in items]
    ),
    "parts of 64 bytes": lambda liar, frame, items: held(
        frame, [Item(payload(one.payload.name, b"y" * 4096, part_bytes=64), one.place) for one in items]
    ),
    "of 4 GiB": lambda liar, frame, items: held(
        frame,
        [Item(payload(one.payload.name, b"y", size=(1 << 32) - 1, part_bytes=1 << 26, parts=1), one.place)
         for one in items],
    ),
    "of 4 GiB as a whole": lambda liar, frame, items: held(
        frame,
        [Item(payload(one.payload.name, b"y", size=(1 << 32) - 1, part_bytes=1 << 26, parts=(1 << 64) - 1,
                      digests=bytes(512)), one.place) for one in items],
    ),
    "its own parent": lambda liar, frame, items: held(
        frame, [Item(payload(one.payload.name, value(one.payload.name.key), form=Form.BLOCK,
                             parent=one.payload.name.key), one.place) for one in items]
    ),
    "long over": lambda liar, frame, items: held(
        frame, [Item(payload(one.payload.name, value(one.payload.name.key), expiry_s=1), one.place) for one in items]
    ),
}  # fmt: skip
RIGHT = {"long over"}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("pushed", [False, True])
def test_a_lie_about_entries_is_a_miss_and_other_peers_go_on(lie: str, pushed: bool) -> None:
    async def main(world: World) -> None:
        async with world.host("a") as a, Liar(world, "a") as liar, world.host("b", "a") as b:
            items = honest(liar, KEYS)
            liar.answers[Op.WANT] = lambda frame: LIES[lie](liar, frame, items)
            if pushed:
                liar.answers[Op.PUSH] = lambda frame: pack(Op.PUSHED, frame.number, frames.pack_number(0))
            liar.stored(KEYS)
            await a.sees(KEYS)
            async with asyncio.timeout(10 * DEADLINE_S):
                outcomes = await a.get(KEYS)  # which compares every byte
            assert set(outcomes) <= {HIT, MISS}
            for at in range(3):  # whatever it was, nothing is left of it
                await b.put([object_key("b", f"{lie}{at}")])
                await a.sees([object_key("b", f"{lie}{at}")])
                assert await a.get([object_key("b", f"{lie}{at}")]) == [HIT]
            await a.until(lambda: a.pinned_bytes == b.pinned_bytes == 0)
            assert a.peers.gate.used_bytes == 0

    run(main)


@pytest.mark.parametrize("what", ["nothing", "garbage", "another"])
def test_what_is_not_pushed_is_never_shown(what: str) -> None:
    async def main(world: World) -> None:
        async with world.host("a") as a, Liar(world, "a") as liar:
            items = honest(liar, KEYS)
            liar.answers[Op.WANT] = lambda frame: held(frame, items)

            async def write(offset: int, number: int) -> None:
                landing = liar.link.attach(bytes.fromhex(liar.landing))
                data = random.Random(1).randbytes(SIZE * 12) if what == "garbage" else value(b"another key") * 12
                await liar.link.write([Move(landing, offset, [Buffer.of(bytearray(data), writable=True)])], 5.0)
                liar.say(Op.PUSHED, frames.pack_number(0), number)

            def pushed(frame: Frame) -> bytes | None:
                if what == "nothing":
                    return pack(Op.PUSHED, frame.number, frames.pack_number(0))
                liar.tasks.append(asyncio.ensure_future(write(frames.unpack_push(frame.body)[2], frame.number)))
                return None

            liar.answers[Op.PUSH] = pushed
            liar.stored(KEYS)
            await a.sees(KEYS)
            assert await a.get(KEYS) == [MISS] * len(KEYS)
            assert any(frame.op == Op.PUSH for frame in liar.heard)
            assert a.count("corruptions_total", tier="peer") == len(KEYS)
            await asyncio.sleep(1)
            assert sum(frame.op == Op.DONE for frame in liar.heard) == 1

    run(main)


def deadly(liar: Liar) -> dict[str, Callable[[], None]]:
    """What closes the channel."""
    huge = HEADER.pack(1 << 31, Op.STORED, 0, 0)
    want = frames.pack_want([Name(KEYS[0])], [1], 0)
    return {
        "a length": lambda: liar.raw(huge),
        "reserved bits": lambda: liar.raw(HEADER.pack(0, Op.PULSE, 9, 0)),
        "an operation": lambda: liar.say(99),
        "a hello": lambda: liar.say(Op.HELLO, b"{}"),
        "ready": lambda: liar.say(Op.READY, b"{}"),
        "marks": lambda: liar.say(Op.STORED, b"123"),
        "a pulse": lambda: liar.say(Op.PULSE, b""),
        "a pin": lambda: liar.say(Op.DONE, b""),
        "a question": lambda: liar.say(Op.WANT, want[:-1], 5),
        "an offer": lambda: liar.say(Op.OFFER, b"", 5),
        "a push": lambda: liar.say(Op.PUSH, bytes(5), 5),
        "no descriptor": lambda: liar.say(Op.MEMORY, frames.pack_memory(5, b"garbage")),
        "a memory twice": lambda: liar.say(Op.MEMORY, frames.pack_memory(0, liar.exposed)),
        "no pulses": lambda: setattr(liar, "pulses", False),
        "many questions": lambda: [liar.say(Op.WANT, want, 9) for _ in range(5000)] and None,
    }


@pytest.mark.parametrize("what", deadly(None))  # type: ignore[arg-type]
def test_what_is_no_message_ends_the_channel(what: str) -> None:
    async def main(world: World) -> None:
        async with world.host("a") as a, Liar(world, "a") as liar, world.host("b", "a") as b:
            await a.put(KEYS)
            await a.met(2)
            deadly(liar)[what]()
            await liar.cut_off()
            await a.met(1)
            await b.sees(KEYS)
            assert await b.get(KEYS) == [HIT] * len(KEYS)
            await a.until(lambda: a.pinned_bytes == 0)

    run(main)


def test_what_a_peer_may_ask_for_and_what_not() -> None:
    async def main(world: World) -> None:
        async with world.host("a", lend_bytes=5 * (SIZE + 4096)) as a, Liar(world, "a") as liar:
            await a.put(KEYS)
            await a.met(1)

            async def answer(op: Op, number: int) -> Frame:
                async with asyncio.timeout(60):
                    while True:
                        for frame in liar.heard:
                            if frame.number == number and frame.op in (op, Op.FAULT):
                                return frame
                        await asyncio.sleep(0.01)

            names = [Name(key) for key in KEYS]
            liar.say(Op.WANT, frames.pack_want([*names, *names, Name(bytes(16))], [(1 << 64) - 1] * 25, 200), 1)
            found = frames.unpack_held((await answer(Op.HELD, 1)).body)
            assert len(found.items) == 25
            assert found.items[-1] == frames.NOT_THERE
            assert 0 < a.pinned_bytes <= 5 * (SIZE + 4096)
            liar.say(Op.WANT, frames.pack_want(names, [0] * 12, 0), 2)  # no parts of them
            assert all(one.payload is None for one in frames.unpack_held((await answer(Op.HELD, 2)).body).items)

            def push(number: int, pin: int, pieces: list[Pushing], offset: int = 0) -> None:
                liar.say(Op.PUSH, frames.pack_push(pin, 0, offset, pieces), number)

            push(3, 999, [Pushing(0, 0, 10)])
            assert frames.unpack_number((await answer(Op.PUSHED, 3)).body) == -Outcome.GONE
            push(4, found.pin, [Pushing(0, 0, 10)], 1 << 40)
            assert frames.unpack_number((await answer(Op.PUSHED, 4)).body) == -Outcome.MISS
            push(5, found.pin, [Pushing(0, 5, 15)], 100)
            assert frames.unpack_number((await answer(Op.PUSHED, 5)).body) == 0
            assert liar.memory[100:110] == value(KEYS[0])[5:15]
            for pin in (5, 6, found.pin, found.pin, 1 << 63):
                liar.say(Op.DONE, frames.pack_number(pin))
            await a.until(lambda: a.pinned_bytes == 0)
            push(6, found.pin, [Pushing(0, 0, 10)])
            assert frames.unpack_number((await answer(Op.PUSHED, 6)).body) == -Outcome.GONE
            liar.say(Op.WANT, frames.pack_want(names, [1] * 12, 0), 7)
            again = frames.unpack_held((await answer(Op.HELD, 7)).body)
            push(8, again.pin, [Pushing(0, 0, SIZE + 1)])  # beyond the entry
            await liar.cut_off()
            await a.until(lambda: a.pinned_bytes == 0)

    run(main)


def test_what_is_offered_is_believed_as_little() -> None:
    async def main(world: World) -> None:
        async with world.host("a", spill=True) as a, Liar(world, "a") as liar:
            await a.met(1)
            items = honest(liar, KEYS)
            absurd = [
                Item(payload(Name(KEYS[3]), b"y", size=(1 << 32) - 1, part_bytes=1 << 26, parts=1), Place(0, 0))
            ] * 4000
            other = [Item(payload(Name(key), value(b"z"), digests=bytes(8)), Place(0, 3)) for key in KEYS]
            pages = [Item(payload(Name(KEYS[0], 5), value(b"z"), form=Form.PAGE), Place(0, 3))]
            for number, some in enumerate((absurd, other, pages, [], [frames.LATER], items * 3), 1):
                for urgent in (False, True):
                    body = frames.pack_held(Held(number, some, urgent))
                    liar.say(Op.OFFER, body, 2 * number + urgent)
            async with asyncio.timeout(60):
                while sum(frame.op in (Op.TAKEN, Op.FAULT) for frame in liar.heard) < 12:
                    await asyncio.sleep(0.05)
            assert sum(frame.op == Op.DONE for frame in liar.heard) == 12
            outcomes = await a.get(KEYS)
            assert set(outcomes) <= {HIT, MISS}
            assert a.peers.gate.used_bytes == 0

    run(main)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_a_flood_of_damaged_messages(seed: int) -> None:
    async def main(world: World) -> None:
        rng = derive(seed, "flood")
        async with world.host("a", spill=True) as a, world.host("b", "a") as b:
            await a.put(KEYS[:6])
            await b.put(KEYS[6:])
            for round_ in range(20):
                async with Liar(world, "a", f"liar{round_}") as liar:
                    items = honest(liar, KEYS)
                    liar.answers[Op.WANT] = lambda frame, items=items: pack(
                        Op.HELD, frame.number, damaged(frames.pack_held(Held(3, items)), rng)
                    )
                    liar.answers[Op.PUSH] = lambda frame: pack(
                        Op.PUSHED, frame.number, damaged(frames.pack_number(0), rng)
                    )
                    liar.stored([*KEYS, *BLOCKS])
                    bodies = [
                        (Op.WANT, frames.pack_want([Name(key) for key in KEYS], [1] * 12, 0)),
                        (Op.PUSH, frames.pack_push(1, 0, 0, [Pushing(0, 0, 10)])),
                        (Op.OFFER, frames.pack_held(Held(9, items))),
                        (Op.STORED, frames.pack_marks([1, 2, 3])),
                        (Op.DONE, frames.pack_number(1)),
                        (Op.MEMORY, frames.pack_memory(3, liar.exposed)),
                    ]
                    asking = [asyncio.ensure_future(a.get(KEYS)), asyncio.ensure_future(a.matched(BLOCKS))]
                    for number in range(30):
                        op, body = rng.choice(bodies)
                        body = damaged(body, rng) if rng.random() < 0.5 else body
                        packed = HEADER.pack(len(body), op, 0, number) + body
                        liar.raw(damaged(packed, rng) if rng.random() < 0.05 else packed)
                        await asyncio.sleep(rng.uniform(0, 0.05))
                    async with asyncio.timeout(20 * DEADLINE_S):
                        await asyncio.gather(*asking)
                await a.cache.call("evict", {"keys": [key.hex() for key in KEYS[6:]]})
            await a.until(lambda: a.pinned_bytes == b.pinned_bytes == 0)
            await a.met(1)
            assert a.peers.gate.used_bytes == 0
            await a.sees(KEYS[6:])
            assert await b.get(KEYS) == [HIT] * 12

    run(main, seed)


# -- strangers -----------------------------------------------------------------------------------------------------


async def ended(reader: asyncio.StreamReader) -> bytes:
    """What comes until the other end closes, in time."""
    found = b""
    async with asyncio.timeout(2 * DEADLINE_S):
        while True:
            try:
                more = await reader.read(1 << 16)
            except OSError:
                return found
            if not more:
                return found
            found += more


HELLO = {"magic": "tiercache peer", "version": frames.VERSION, "nonce": "00", "id": "stranger"}
STRANGERS: dict[str, bytes] = {
    "silence": b"",
    "http": b"GET / HTTP/1.1\r\n\r\n",
    "garbage": bytes(range(256)),
    "a long hello": pack(Op.HELLO, 0, bytes(100_000)),
    "no json": pack(Op.HELLO, 0, b"{"),
    "deep json": pack(Op.HELLO, 0, b"[" * 60_000),
    "another version": pack(Op.HELLO, 0, json.dumps(HELLO | {"version": 2}).encode()),
    "no nonce": pack(Op.HELLO, 0, json.dumps(HELLO | {"nonce": 5}).encode()),
    "no proof": pack(Op.HELLO, 0, json.dumps(HELLO).encode()),
    "a wrong proof": pack(Op.HELLO, 0, json.dumps(HELLO).encode()) + pack(Op.PROVE, 0, bytes(32)),
    "an empty proof": pack(Op.HELLO, 0, json.dumps(HELLO).encode()) + pack(Op.PROVE, 0, b""),
    "frames at once": pack(Op.HELLO, 0, json.dumps(HELLO).encode()) + pack(Op.STORED, 0, bytes(80)),
}


@pytest.mark.parametrize("what", STRANGERS)
def test_a_stranger_is_shown_the_door_and_learns_nothing(what: str) -> None:
    async def main(world: World) -> None:
        async with world.host("a") as a:
            with world.network.at("stranger"):
                reader, writer = await asyncio.open_connection("a", PORT)
            writer.write(STRANGERS[what])
            found = await ended(reader)
            assert b"transports" not in found
            assert not world.network._transports, "a stranger made it open transports"
            assert not a.pool.peers and not a.pool._strangers
            writer.transport.abort()

    run(main)


@pytest.mark.parametrize("replayed", [False, True])
def test_what_it_said_itself_proves_nothing(replayed: bool) -> None:
    """Neither on the same connection nor later."""

    async def main(world: World) -> None:
        async with world.host("a") as a, world.host("b", "a"):
            await a.met()
            with world.network.at("stranger"):
                reader, writer = await asyncio.open_connection("a", PORT)
                hello = await read_frame(reader, DEADLINE_S)
                if replayed:
                    writer.transport.abort()
                    reader, writer = await asyncio.open_connection("a", PORT)
                    await read_frame(reader, DEADLINE_S)
                writer.write(pack(Op.HELLO, 0, hello.body))
                proof = await read_frame(reader, DEADLINE_S)
                writer.write(pack(Op.PROVE, 0, proof.body))
                assert b"transports" not in await ended(reader)
            assert len(a.pool.peers) == 1
            writer.transport.abort()

    run(main)


def test_another_secret() -> None:
    async def main(world: World) -> None:
        async with world.host("a") as a, world.host("b", "a", secret=b"quite another one") as b:
            await asyncio.sleep(30)
            assert not a.pool.peers and not b.pool.peers

    run(main)


def test_one_who_says_a_byte_at_a_time_is_cut_off() -> None:
    async def main(world: World) -> None:
        async with world.host("a"):
            with world.network.at("stranger"):
                reader, writer = await asyncio.open_connection("a", PORT)
            began = world.loop.time()
            for one in STRANGERS["no proof"]:
                writer.write(bytes([one]))
                await asyncio.sleep(0.1)
                if writer.transport.is_closing():
                    break
            assert world.loop.time() - began < 2 * DEADLINE_S
            await ended(reader)

    run(main)


def test_many_strangers_keep_no_peer_out() -> None:
    async def main(world: World) -> None:
        async with world.host("a") as a:
            writers = []

            async def crowd() -> None:
                with world.network.at("stranger"):
                    for _ in range(20 * STRANGERS_MAX):
                        writers.append((await asyncio.open_connection("a", PORT))[1])

            crowding = asyncio.ensure_future(crowd())
            async with world.host("b", "a") as b:
                await b.met()
                assert len(a.pool._strangers) <= STRANGERS_MAX
                await crowding
                await asyncio.sleep(2 * DEADLINE_S)
                assert not a.pool._strangers
                assert all(writer.transport.is_closing() for writer in writers)
                await b.met()

    run(main)
