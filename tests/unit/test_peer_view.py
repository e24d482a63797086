"""View: what peers are believed to have."""

from __future__ import annotations

import random
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiercache.keys import chain, namespace, object_key, page_key
from tiercache.model import Name
from tiercache.peer import view
from tiercache.peer.view import View, mark

KEYS = [random.Random(number).randbytes(16) for number in range(30)]
steps = st.lists(
    st.tuples(st.sampled_from(["add", "drop", "forget"]), st.integers(0, 5), st.lists(st.integers(0, 29), max_size=8)),
    max_size=60,
)


def marks(numbers: list[int]) -> list[int]:
    return [mark(KEYS[number]) for number in numbers]


def test_names_of_one_namespace_have_marks_of_their_own() -> None:
    objects = [object_key("one", str(number)) for number in range(1000)]
    blocks = chain(namespace("one"), [b"%d" % number for number in range(1000)])
    files = [page_key("s3", f"bucket/{number}", "1", 1 << 20, 1 << 16) for number in range(100)]
    names = [Name(key) for key in [*objects, *blocks]] + [Name(key, page) for key in files for page in range(100)]
    assert len({mark(*name) for name in names}) == len(names)
    seen = View()
    seen.add(0, [mark(objects[0])])
    assert seen.who([Name(objects[0]), Name(objects[1])]) == [1, 0]


@given(steps)
def test_it_is_as_a_set_for_each_peer(taken) -> None:
    seen, model = View(), {peer: set() for peer in range(6)}
    for what, peer, numbers in taken:
        if what == "add":
            seen.add(peer, marks(numbers))
            model[peer] |= set(numbers)
        elif what == "drop":
            seen.drop(peer, [Name(KEYS[number]) for number in numbers])
            model[peer] -= set(numbers)
        else:
            list(seen.forget(peer))
            model[peer] = set()
        expected = [sum(1 << peer for peer in model if number in model[peer]) for number in range(30)]
        assert seen.who([Name(key) for key in KEYS]) == expected
        assert len(seen) == sum(map(bool, expected))
        prefix = next((at for at, one in enumerate(expected) if not one), 30)
        assert seen.prefix(KEYS) == prefix


@given(steps)
def test_the_oldest_are_forgotten_where_there_are_too_many(taken) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(view, "MARKS_MAX", 5)
        seen = View()
        for what, peer, numbers in taken:
            if what == "add":
                seen.add(peer, marks(numbers))
                # What was said last is always among what is remembered, as far as it goes.
                assert all(one >> peer & 1 for one in seen.who([Name(KEYS[number]) for number in numbers[-1:]]))
            elif what == "drop":
                seen.drop(peer, [Name(KEYS[number]) for number in numbers])
            else:
                list(seen.forget(peer))
            who = seen.who([Name(key) for key in KEYS])
            assert all(sum(one >> peer & 1 for one in who) <= 5 for peer in range(6))


def test_a_peer_that_stores_more_and_more_is_seen_with_what_is_new() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(view, "MARKS_MAX", 1000)
        seen = View()
        for at in range(0, 10_000, 100):
            seen.add(3, range(at, at + 100))
        assert len(seen) == 1000
        list(seen.forget(3))
        assert len(seen) == 0


def test_threads_look_while_the_loop_writes() -> None:
    seen, over, faults = View(), threading.Event(), []

    def look() -> None:
        names = [Name(key) for key in KEYS]
        try:
            while not over.is_set():
                assert all(0 <= one < 4 for one in seen.who(names))
                assert 0 <= seen.prefix(KEYS) <= len(KEYS)
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    rng = random.Random(1)
    for _ in range(300):
        some = rng.sample(range(30), 10)
        seen.add(rng.randrange(2), marks(some))
        seen.drop(rng.randrange(2), [Name(KEYS[number]) for number in some[:5]])
        if rng.random() < 0.2:
            list(seen.forget(rng.randrange(2)))
    over.set()
    for thread in threads:
        thread.join(10)
    assert not faults
