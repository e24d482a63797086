"""Eager waiting: what is looked for, when, and when no more; time is what the test says."""

from __future__ import annotations

import selectors
import socket
from typing import TYPE_CHECKING

import pytest

from tiercache.wire import eager
from tiercache.wire.channel import Channel, Channels
from tiercache.wire.eager import HELD_UP, LOOK_S, RESTS_MAX, SOON_S, VAIN, Eager, EagerSelector
from tiercache.wire.frames import Op, pack
from tiercache.wire.sockets import Lost

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ECHO = 100


class Steps:
    """A clock that goes on by a step at each reading, and does then what it was told for that reading."""

    def __init__(self) -> None:
        self.now_s, self.step_s = 0.0, 0.0
        self.readings = 0
        self.then: dict[int, Callable[[], object]] = {}

    def monotonic(self) -> float:
        self.readings += 1
        self.now_s += self.step_s
        if self.readings in self.then:
            self.then.pop(self.readings)()
        return self.now_s

    def wall(self) -> float:
        return self.now_s


class Glances:
    """What glances find, one after another; nothing when all is told."""

    def __init__(self, *found: int | None) -> None:
        self.found = list(found)
        self.count = 0

    def __call__(self) -> int | None:
        self.count += 1
        return self.found.pop(0) if self.found else None


@pytest.fixture
def clock() -> Steps:
    return Steps()


def rests(waits: Eager) -> int:
    """After how many that came soon it looks again."""
    for count in range(2 * RESTS_MAX):
        if waits.look(Glances(1)) is not None:
            return count
        waits.slept(0.0)
    raise AssertionError("it never looks again")


def test_it_looks_once_something_came_soon(clock: Steps) -> None:
    waits = Eager(clock)
    seen = Glances(1)
    assert waits.look(seen) is None
    waits.slept(SOON_S * 2)
    assert waits.look(seen) is None
    assert not seen.count
    waits.slept(SOON_S)
    assert waits.look(Glances(None, None, 7)) == 7
    assert waits.look(Glances(None, 8)) == 8


def test_it_looks_for_a_bounded_time(clock: Steps) -> None:
    waits = Eager(clock)
    waits.slept(0.0)
    clock.step_s = LOOK_S / 9.5
    seen = Glances()
    assert waits.look(seen) is None
    assert seen.count == 10


def test_it_rests_longer_each_time_that_it_looked_in_vain(clock: Steps) -> None:
    waits = Eager(clock)
    waits.slept(0.0)
    for count in (4, 16, 64, 256, 1024, 1024):
        clock.step_s = LOOK_S * 1.01
        assert waits.look(Glances()) is None
        for _ in range(count):
            assert waits.look(Glances(1)) is None
            waits.slept(0.0)


def test_it_rests_long_where_it_was_held_up(clock: Steps) -> None:
    waits = Eager(clock)
    waits.slept(0.0)
    clock.step_s = SOON_S * 1.01
    assert waits.look(Glances(5)) == 5  # it came, but only after somebody else had the processor
    clock.step_s = 0.0
    assert rests(waits) == HELD_UP


def test_finds_make_up_for_what_was_looked_for_in_vain(clock: Steps) -> None:
    waits = Eager(clock)
    waits.slept(0.0)
    for _ in range(8):
        clock.step_s = LOOK_S * 1.01
        assert waits.look(Glances()) is None
        clock.step_s = 0.0
        assert rests(waits) == VAIN
        assert waits.look(Glances(1)) == 1


def test_what_comes_late_ends_no_rest(clock: Steps) -> None:
    waits = Eager(clock)
    for _ in range(5):
        waits.slept(SOON_S * 1.01)
        assert waits.look(Glances(1)) is None


# -- channels


@pytest.fixture
def ends(clock: Steps) -> Iterator[tuple[Channel, socket.socket]]:
    """A channel whose first question was answered soon, and its other end."""
    here, there = socket.socketpair()
    channel = Channel(here, 20, clock=clock)
    there.send(pack(Op.ANSWER, 1, b"first"))
    assert channel.ask(ECHO, alone=True) == b"first"
    clock.readings = 0
    clock.step_s = LOOK_S / 9.5
    yield channel, there
    channel.close()
    there.close()


def test_a_channel_finds_an_answer_while_it_looks(clock: Steps, ends: tuple[Channel, socket.socket]) -> None:
    channel, there = ends
    clock.then[4] = lambda: there.send(pack(Op.ANSWER, 2, b"x")[:9])
    clock.then[5] = lambda: there.send(pack(Op.ANSWER, 2, b"x")[9:])
    assert channel.ask(ECHO, alone=True) == b"x"
    assert clock.readings >= 5


def test_a_channel_that_looks_in_vain_sleeps(clock: Steps, ends: tuple[Channel, socket.socket]) -> None:
    channel, there = ends
    clock.then[12] = lambda: there.send(pack(Op.ANSWER, 2, b"x"))  # just before it sleeps
    assert channel.ask(ECHO, alone=True) == b"x"
    assert clock.readings == 13


def test_a_channel_whose_thread_is_not_alone_sleeps_at_once(clock: Steps, ends: tuple[Channel, socket.socket]) -> None:
    channel, there = ends
    clock.then[1] = lambda: there.send(pack(Op.ANSWER, 2, b"x"))
    assert channel.ask(ECHO) == b"x"
    assert clock.readings == 2


def test_a_deadline_stands_after_a_look(clock: Steps, ends: tuple[Channel, socket.socket]) -> None:
    channel, _ = ends
    with pytest.raises(Lost, match=r"within 0.01 s"):
        channel.ask(ECHO, wait_s=0.01, alone=True)
    assert channel.closed


def test_a_connection_that_ends_during_a_look_is_lost(clock: Steps, ends: tuple[Channel, socket.socket]) -> None:
    channel, there = ends
    clock.then[4] = there.close
    with pytest.raises(Lost, match="ended"):
        channel.ask(ECHO, alone=True)
    assert channel.closed


def test_a_channel_that_is_interrupted_during_a_look_is_lost(clock: Steps, ends: tuple[Channel, socket.socket]) -> None:
    channel, _ = ends
    clock.then[4] = channel.interrupt
    with pytest.raises(Lost, match="ended"):
        channel.ask(ECHO, alone=True)


def test_threads_look_only_while_no_other_one_asks() -> None:
    said: list[bool] = []

    class Asked(Channel):
        """Says whether it may look; while it is asked 1, another one is asked 0."""

        def ask(self, op: int, body: bytes = b"", *, wait_s: float | None = None, alone: bool = False) -> memoryview:
            said.append(alone)
            return pool.ask(op - 1) if op else memoryview(b"")

    pairs = [socket.socketpair() for _ in range(2)]
    left = list(pairs)
    pool = Channels(lambda: Asked(left.pop()[0]), 2)
    pool.ask(0)
    pool.ask(1)
    pool.ask(0)
    assert said == [True, True, False, True]
    pool.close()
    for _, there in pairs:
        there.close()


# -- loops


def test_a_selector_looks_before_it_sleeps(clock: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float | None] = []
    select = selectors.DefaultSelector.select

    def noted(self: selectors.DefaultSelector, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        slept.append(timeout)
        return select(self, timeout)

    monkeypatch.setattr(selectors.DefaultSelector, "select", noted)
    here, there = socket.socketpair()
    with here, there, EagerSelector(clock) as selector:
        selector.register(here, selectors.EVENT_READ)
        there.send(b"x")
        assert [key.fileobj for key, _ in selector.select(None)] == [here]
        assert [key.fileobj for key, _ in selector.select(30)] == [here]
        assert slept == [None, 0]
        slept.clear()
        here.recv(9)
        clock.step_s = LOOK_S / 1.5
        assert selector.select(SOON_S) == []  # a timer that is so near is not to be late
        assert slept == [SOON_S]
        slept.clear()
        assert selector.select(SOON_S * 1.1) == []
        assert slept == [0, 0, SOON_S * 1.1]
        slept.clear()
        there.send(b"x")
        assert len(selector.select(30)) == 1  # it has looked in vain: it rests
        assert slept == [30]


def test_an_owners_loop_is_eager() -> None:
    loop = eager.eager_loop()
    try:
        assert loop.run_until_complete(_answer()) == "answered"
    finally:
        loop.close()


async def _answer() -> str:
    return "answered"
