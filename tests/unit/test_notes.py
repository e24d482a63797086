"""The owner's notes: one finds out, the others wait; nothing from before a forget is handed out after it."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiercache.errors import ProtocolError, UnavailableError
from tiercache.testing.simloop import SimClock, SimLoop, derive, simulate
from tiercache.wire.notes import NAME_BYTES_MAX, Notes


def in_loop(scene):
    """Runs a scene with notes on a simulated loop."""

    async def main(loop: SimLoop):
        await scene(Notes(SimClock(loop), 100, 10_000))

    simulate(main, 1)


async def turns():
    """Everything that can happen without time passing has happened."""
    for _ in range(50):
        await asyncio.sleep(0)


def test_one_finds_out_and_the_others_get_it_until_it_expires():
    async def scene(notes):
        assert await notes.claim(b"a", 1) is None
        others = [asyncio.create_task(notes.claim(b"a", who)) for who in (2, 3, 4)]
        await turns()
        assert notes.claims == 1
        assert notes.known(b"a") is None  # and nobody waited
        notes.settle(b"a", 1, b"found", 10.0)
        assert await asyncio.gather(*others) == [b"found"] * 3
        assert await notes.claim(b"a", 5) == b"found" == notes.known(b"a")
        await asyncio.sleep(10.0)
        assert notes.known(b"a") is None
        assert await notes.claim(b"a", 5) is None
        notes.leave(5)
        assert (notes.claims, len(notes), notes.bytes) == (0, 0, 0)

    in_loop(scene)


@pytest.mark.parametrize("end", ["settle", "leave"])
def test_who_finds_nothing_out_leaves_it_to_the_next(end):
    async def scene(notes):
        assert await notes.claim(b"a", 1) is None
        second = asyncio.create_task(notes.claim(b"a", 2))
        await turns()
        third = asyncio.create_task(notes.claim(b"a", 3))
        await turns()
        if end == "leave":
            notes.leave(1)
        else:
            notes.settle(b"a", 1, b"ignored", 0.0)
        assert await second is None
        assert not third.done()
        notes.settle(b"a", 1, b"too late", 10.0)
        await turns()
        assert not third.done()
        notes.settle(b"a", 2, b"found", 10.0)
        assert await third == b"found"

    in_loop(scene)


def test_a_waiter_that_is_cancelled_leaves_no_trace_also_when_it_was_just_chosen():
    async def scene(notes):
        assert await notes.claim(b"a", 1) is None
        second = asyncio.create_task(notes.claim(b"a", 2))
        await turns()
        third = asyncio.create_task(notes.claim(b"a", 3))
        await turns()
        notes.settle(b"a", 1, b"", 0.0)
        second.cancel()  # it has been chosen, and does not know yet
        assert await third is None
        fourth = asyncio.create_task(notes.claim(b"a", 4))
        await turns()
        fourth.cancel()
        await turns()
        again = asyncio.create_task(notes.claim(b"a", 4))
        await turns()
        notes.settle(b"a", 3, b"found", 10.0)
        assert await again == b"found"
        assert await notes.claim(b"a", 2) == b"found"

    in_loop(scene)


def test_what_was_claimed_before_a_forget_settles_nothing():
    async def scene(notes):
        assert await notes.claim(b"dir/a", 1) is None
        waiter = asyncio.create_task(notes.claim(b"dir/a", 2))
        await turns()
        notes.forget([b"dir/", b"other"])
        assert await waiter is None  # it asks anew: what it gets is from after the forget
        after = asyncio.create_task(notes.claim(b"dir/a", 3))
        await turns()
        notes.settle(b"dir/a", 1, b"old", 10.0)
        await turns()
        assert not after.done()
        assert len(notes) == 0
        notes.settle(b"dir/a", 2, b"new", 10.0)
        assert await after == b"new"
        assert await notes.claim(b"dir/a", 1) == b"new"

    in_loop(scene)


def test_forgetting_takes_what_begins_with_a_prefix_and_nothing_else():
    async def scene(notes):
        names = [b"", b"a", b"a/", b"a/b", b"a/b/c", b"a0", b"b", b"\xff\xff"]
        for name in names:
            assert await notes.claim(name, 1) is None
            notes.settle(name, 1, name + b"!", 10.0)
        notes.forget([b"a/"])
        notes.forget([])
        kept = [name for name in names if not name.startswith(b"a/")]
        assert len(notes) == len(kept)
        assert notes.bytes == sum(2 * len(name) + 1 for name in kept)
        for name in kept:
            assert await notes.claim(name, 1) == name + b"!"
        notes.forget([b"\xff", b""])
        assert (len(notes), notes.bytes) == (0, 0)

    in_loop(scene)


def test_a_client_claims_a_name_once_at_a_time_and_hears_when_it_has_left():
    async def scene(notes):
        assert await notes.claim(b"a", 1) is None
        with pytest.raises(ProtocolError, match="twice"):
            await notes.claim(b"a", 1)
        notes.forget([b"a"])
        with pytest.raises(ProtocolError, match="twice"):  # else its old answer could pass for the new one
            await notes.claim(b"a", 1)
        notes.settle(b"a", 1, b"old", 10.0)
        assert await notes.claim(b"a", 1) is None
        waiter = asyncio.create_task(notes.claim(b"a", 2))
        await turns()
        with pytest.raises(ProtocolError, match="twice"):
            await notes.claim(b"a", 2)
        notes.settle(b"a", 2, b"from one who waits", 10.0)
        notes.leave(2)
        with pytest.raises(UnavailableError):
            await waiter
        notes.settle(b"a", 1, b"found", 10.0)
        notes.leave(1)
        assert await notes.claim(b"a", 3) == b"found"

    in_loop(scene)


def test_the_oldest_go_first_and_what_is_too_large_is_told_but_not_kept():
    async def scene(_):
        notes = Notes(SimClock(asyncio.get_running_loop()), 3, 100)
        for i in range(5):
            assert await notes.claim(b"%d" % i, 1) is None
            notes.settle(b"%d" % i, 1, b"v", 10.0)
        assert [await notes.claim(b"%d" % i, 1) for i in (2, 3, 4)] == [b"v"] * 3
        assert await notes.claim(b"0", 1) is None
        notes.settle(b"0", 1, b"x" * 97, 10.0)
        assert (len(notes), notes.bytes) == (2, 100)
        assert await notes.claim(b"large", 1) is None
        waiter = asyncio.create_task(notes.claim(b"large", 2))
        await turns()
        notes.settle(b"large", 1, b"y" * 96, 10.0)
        assert await waiter == b"y" * 96
        assert await notes.claim(b"large", 2) is None
        # Of open claims there is a limit too: beyond it each finds out for itself.
        assert [await notes.claim(b"n%d" % i, 2) for i in range(4)] == [None] * 4
        assert notes.claims == 3
        assert await notes.claim(b"n3", 3) is None

    in_loop(scene)


def test_names_of_open_claims_are_bounded_in_length_and_together():
    async def scene(_):
        notes = Notes(SimClock(asyncio.get_running_loop()), 100, 2 * NAME_BYTES_MAX)
        long = b"x" * (NAME_BYTES_MAX + 1)
        assert [await notes.claim(long, who) for who in (1, 1, 2)] == [None] * 3  # each finds out for itself
        notes.settle(long, 1, b"found", 10.0)
        assert notes.known(long) is None and notes.claims == 0
        names = [b"%d" % i * NAME_BYTES_MAX for i in range(4)]
        assert [await notes.claim(name, 1) for name in names] == [None] * 4
        assert (notes.claims, notes.claimed_bytes) == (2, 2 * NAME_BYTES_MAX)
        notes.settle(names[0], 1, b"", 10.0)
        assert await notes.claim(names[3], 1) is None
        assert (notes.claims, notes.claimed_bytes) == (2, 2 * NAME_BYTES_MAX)
        notes.leave(1)
        assert (notes.claims, notes.claimed_bytes) == (0, 0)

    in_loop(scene)


NAMES = [b"a", b"a/b", b"a/c", b"d"]


@given(st.integers(0, 1 << 32))
def test_no_schedule_hands_out_what_was_forgotten_or_leaves_anybody_waiting(seed):
    simulate(lambda loop: _world(loop, seed), seed)


async def _world(loop, seed):
    """Clients that claim, settle, fail, leave and are cancelled, beside one who changes the world and forgets."""
    notes = Notes(SimClock(loop), 3, 60)
    truth = dict.fromkeys(NAMES, 0)  # what an origin would say now

    async def ask(who, rng):
        name = rng.choice(NAMES)
        before = truth[name]
        try:
            found = await notes.claim(name, who)
        except UnavailableError:
            return
        if found is not None:
            assert int(found) >= before
            return
        answer, ttl_s = b"", 0.0
        try:
            await asyncio.sleep(rng.random())
            answer = b"%d" % truth[name]
            await asyncio.sleep(rng.random())
            ttl_s = rng.choice([0.0, 0.5, 5.0, 5.0])
        finally:
            notes.settle(name, who, answer, ttl_s)

    async def client(number):
        rng = derive(seed, "client", number)
        for life in range(12):
            who = (number, life) if rng.random() < 0.5 else number
            tasks = [loop.create_task(ask(who, rng))]
            if rng.random() < 0.5:
                await asyncio.wait(tasks, timeout=rng.random() * 2)
                if who != number:
                    notes.leave(who)
                tasks[0].cancel()
            await asyncio.wait(tasks)
            assert tasks[0].cancelled() or tasks[0].exception() is None, tasks[0].exception()
            await asyncio.sleep(rng.random())

    async def writer():
        rng = derive(seed, "writer")
        for _ in range(15):
            await asyncio.sleep(rng.random())
            prefix = rng.choice([*NAMES, b"a/"])
            for name in NAMES:
                truth[name] += name.startswith(prefix)
            notes.forget([prefix])
            assert len(notes) <= 3
            assert notes.bytes == sum(len(name) + len(kept.value) for name, kept in notes._values.items()) <= 60
            assert notes._sorted == sorted(notes._values)

    await asyncio.gather(*[client(number) for number in range(5)], writer())
    assert notes.claims == notes.claimed_bytes == 0
    assert not notes._open


@given(st.integers(0, 1 << 32))
def test_as_long_as_it_is_believed_a_name_is_found_out_once_however_many_fail_at_it(seed):
    async def main(loop):
        notes = Notes(SimClock(loop), 100, 10_000)
        asked = dict.fromkeys(NAMES, 0)
        told = dict.fromkeys(NAMES, 0)

        async def ask(who):
            rng = derive(seed, who)
            for name in rng.sample(NAMES, len(NAMES)):
                await asyncio.sleep(rng.random())
                if await notes.claim(name, who) is None:
                    asked[name] += 1
                    assert asked[name] - told[name] == 1
                    await asyncio.sleep(rng.random())
                    told[name] += (fails := rng.random() < 0.5)
                    notes.settle(name, who, b"", 0.0 if fails else 100.0)

        await asyncio.gather(*[ask(who) for who in range(8)])
        assert all(asked[name] - told[name] in (0, 1) for name in NAMES)

    simulate(main, seed)
