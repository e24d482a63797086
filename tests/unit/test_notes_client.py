"""A client's side of the notes, and how the owner waits until all have forgotten."""

from __future__ import annotations

import asyncio
import threading

import pytest

from tiercache.errors import ProtocolError, UnavailableError
from tiercache.testing.notes import NotesTable
from tiercache.testing.simloop import SimClock, simulate
from tiercache.wire.frames import Op, pack_json
from tiercache.wire.notes_client import SharedNotes, unpack_prefixes
from tiercache.wire.telling import Telling


def among(scene, seeds=5):
    async def main(loop):
        table = NotesTable(SimClock(loop))
        try:
            await scene(table)
        finally:
            await table.close()

    for seed in range(seeds):
        simulate(main, seed)


def test_those_of_one_process_take_turns():
    async def scene(table):
        one, two = table.client(), table.client()
        assert await one.claim(b"a") is None
        same = asyncio.create_task(one.claim(b"a"))
        other = asyncio.create_task(two.claim(b"a"))
        await asyncio.sleep(1)
        assert not same.done()
        assert await one.known(b"a") is None is await two.known(b"a")
        one.settle(b"a", b"found", 10.0)
        assert await asyncio.gather(same, other) == [b"found", b"found"]
        assert await one.known(b"a") == b"found" == await two.known(b"a")
        one.settle(b"a", b"never claimed", 10.0)
        assert await two.claim(b"a") == b"found"

    among(scene)


@pytest.mark.parametrize("delay_s", [0.0, 0.5])
def test_a_claim_that_was_given_up_goes_to_the_next_when_its_answer_comes(delay_s):
    async def scene(table):
        one, two, three = table.client(), table.client(), table.client()
        assert await one.claim(b"a") is None
        given_up = asyncio.create_task(two.claim(b"a"))
        await asyncio.sleep(delay_s)
        waits = asyncio.create_task(three.claim(b"a"))
        await asyncio.sleep(delay_s)
        given_up.cancel()
        await asyncio.wait([given_up])
        if delay_s:
            with pytest.raises(UnavailableError):  # the owner has not answered yet
                await two.claim(b"a")
        one.settle(b"a", b"", 0.0)
        assert await waits is None
        three.settle(b"a", b"found", 10.0)
        await asyncio.sleep(0.5)
        assert await two.claim(b"a") == b"found"

    among(scene)


def test_what_is_forgotten_is_heard_by_all_and_comes_back_from_nowhere():
    async def scene(table):
        one, two = table.client(), table.client()
        heard = {one: [], two: []}
        for client, prefixes in heard.items():
            client.watch(prefixes.append)
        assert await one.claim(b"a/b") is None
        one.settle(b"a/b", b"old", 10.0)
        told = one.forget([b"a/", b"c"])
        assert heard[one] == [[b"a/", b"c"]]
        assert not told.done()
        assert await one.claim(b"a/b") is None  # though it was asked before the owner knew
        assert told.done()
        one.settle(b"a/b", b"new", 10.0)
        await asyncio.sleep(1)
        assert heard[two] == [[b"a/", b"c"]]
        one.lost()
        one.unwatch(heard[one].append)
        two.push(memoryview(pack_json(["ff00"])))
        assert (heard[one][1:], heard[two][1:]) == ([[b""]], [[b"\xff\x00"]])
        two.unwatch(heard[two].append)
        two.lost()
        assert len(heard[two]) == 2

    among(scene)


def test_a_lost_owner_fails_claims_and_stops_no_forgetting():
    async def scene(table):
        one, two = table.client(), table.client()
        assert await one.claim(b"a") is None
        waits = asyncio.create_task(two.claim(b"a"))
        await asyncio.sleep(1)
        table.die(two)
        with pytest.raises(UnavailableError):
            await waits
        with pytest.raises(UnavailableError):
            await two.claim(b"b")
        two.settle(b"a", b"", 0.0)
        await asyncio.wrap_future(two.forget([b"a"]))

    among(scene)


def test_forgetting_works_in_any_thread_and_after_the_loop():
    async def main():
        loop = asyncio.get_running_loop()
        asked = []

        async def ask(op, body):
            asked.append((op, unpack_prefixes(memoryview(body))))
            return memoryview(b"")

        notes = SharedNotes(ask, lambda op, body: None, loop)
        heard = []
        notes.watch(lambda prefixes: heard.append((threading.get_ident(), list(prefixes))))
        told = await asyncio.to_thread(notes.forget, [b"x"])
        await asyncio.wrap_future(told)
        assert asked == [(Op.FORGET, [b"x"])]
        assert heard[0][1] == [b"x"]
        assert heard[0][0] != threading.get_ident()
        assert not notes.forget([b"y"]).cancel()
        await notes.close()
        return notes

    assert asyncio.run(main()).forget([b"z"]).done()


def test_what_cannot_be_settled_is_not_held():
    async def main():
        answers = asyncio.Queue()

        async def ask(op, body):
            return await answers.get()

        def tell(op, body):
            raise UnavailableError("no owner is there")

        notes = SharedNotes(ask, tell, asyncio.get_running_loop())
        answers.put_nowait(memoryview(b"\1"))
        assert await notes.claim(b"a") is None
        notes.settle(b"a", b"", 0.0)
        given_up = asyncio.create_task(notes.claim(b"a"))
        await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.wait([given_up])
        answers.put_nowait(memoryview(b"\1"))
        while notes._turns:
            await asyncio.sleep(0)
        answers.put_nowait(memoryview(b"\0value"))
        assert await notes.claim(b"a") == b"value"

    asyncio.run(main())


def test_what_is_no_answer_is_refused():
    with pytest.raises(ProtocolError):
        unpack_prefixes(memoryview(pack_json(["zz"])))
    with pytest.raises(ProtocolError):
        unpack_prefixes(memoryview(pack_json(5)))

    async def main():
        async def ask(op, body):
            return memoryview(b"\x07")

        notes = SharedNotes(ask, lambda op, body: None, asyncio.get_running_loop())
        for _ in range(2):
            with pytest.raises(ProtocolError):
                await notes.claim(b"a")

    asyncio.run(main())


# -- the owner's side --------------------------------------------------------------------------------------------------


class Heard:
    """A post that keeps what it is told."""

    def __init__(self):
        self.closed = False
        self.numbers = []

    def push(self, op, number, body):
        assert (op, body) == (Op.FORGET, b"[]")
        self.numbers.append(number)


def test_a_write_ends_when_all_others_have_forgotten():
    async def main(loop):
        telling = Telling(10.0)
        assert telling.begin([], b"[]") is None
        one, two = Heard(), Heard()
        first, second = telling.begin([one, two], b"[]"), telling.begin([one, two], b"[]")
        telling.told(one, one.numbers[0])
        telling.told(one, one.numbers[0])
        telling.told(one, 4711)
        await asyncio.sleep(1)
        assert not first.done()
        telling.told(two, two.numbers[0])
        assert first.done() and not second.done()
        telling.told(two, two.numbers[1])
        telling.gone(one)
        assert second.done()
        assert loop.time() == 1.0

    simulate(main, 1)


def test_a_process_that_is_stopped_delays_one_write_once():
    async def main(loop):
        telling = Telling(10.0)
        stopped, other = Heard(), Heard()
        first = telling.begin([stopped, other], b"[]")
        telling.told(other, other.numbers[0])
        await first
        assert loop.time() == 10.0
        second = telling.begin([stopped, other], b"[]")
        assert len(stopped.numbers) == 2  # it hears of everything, and nobody waits for that
        telling.told(other, other.numbers[1])
        await second
        assert telling.begin([stopped], b"[]") is None
        for number in stopped.numbers:
            telling.told(stopped, number)
        third = telling.begin([stopped], b"[]")
        third.cancel()  # who asked has gone
        telling.told(stopped, stopped.numbers[-1])
        other.closed = True
        assert telling.begin([other], b"[]") is None
        assert loop.time() == 10.0

    simulate(main, 1)
