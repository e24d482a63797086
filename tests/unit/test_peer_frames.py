"""Frames: what is packed comes back, and nothing else is believed."""

from __future__ import annotations

import random
import tracemalloc
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiercache.errors import ProtocolError
from tiercache.model import Form, Kind, Name, Outcome, Payload, all_parts, part_count
from tiercache.peer import frames
from tiercache.peer.frames import LATER, NOT_THERE, Held, Item, Op, Place, Pushing

if TYPE_CHECKING:
    from collections.abc import Callable

KEYS = st.one_of(st.binary(min_size=16, max_size=16), st.binary(min_size=32, max_size=32))
NUMBERS = st.integers(0, (1 << 64) - 1)
NAMES = st.builds(Name, KEYS, st.integers(0, (1 << 31) - 1))


@st.composite
def payloads(draw: st.DrawFn) -> Payload:
    step = draw(st.integers(1, 1 << 26))
    size = draw(st.integers(1, min((1 << 32) - 1, 64 * step)))
    parts = draw(st.integers(1, all_parts(size, step)))
    return Payload(
        draw(NAMES), size, step, parts, draw(st.binary(min_size=1, max_size=1)) * 8 * parts.bit_length(),
        draw(st.sampled_from(Kind)), draw(st.one_of(st.just(b""), KEYS)), draw(st.integers(0, (1 << 16) - 1)),
        draw(st.floats(0, 1e9, width=32)), draw(st.integers(0, (1 << 32) - 1)), 0, draw(st.sampled_from(Form)),
    )  # fmt: skip


ITEMS = st.one_of(
    st.just(NOT_THERE),
    st.just(LATER),
    st.builds(Item, payloads(), st.builds(Place, st.integers(-1, 1 << 20), st.integers(0, frames.OFFSET_MAX))),
)
HELD = st.builds(Held, NUMBERS, st.lists(ITEMS, max_size=6), st.booleans())
PIECES = st.lists(
    st.builds(lambda item, start, size: Pushing(item, start, start + size), *[st.integers(1, 1 << 20)] * 3), max_size=20
)


@settings(max_examples=30)
@given(HELD)
def test_what_is_held(held: Held) -> None:
    assert frames.unpack_held(frames.pack_held(held)) == held


def test_a_cost_beyond_all_measure_is_told_as_a_large_one() -> None:
    for cost_s in (1e39, float("inf")):
        told = Payload(Name(bytes(16)), 9, 9, 1, bytes(8), cost_s=cost_s)
        found = frames.unpack_held(frames.pack_held(Held(1, [Item(told, Place(0))]))).items[0].payload
        assert found is not None
        assert found.cost_s == pytest.approx(frames.COST_S_MAX, rel=1e-6)


@given(st.lists(st.tuples(NAMES, NUMBERS), max_size=20), st.integers(0, 255))
def test_questions(wanted: list[tuple[Name, int]], priority: int) -> None:
    names, parts = [name for name, _ in wanted], [one for _, one in wanted]
    assert frames.unpack_want(frames.pack_want(names, parts, priority)) == (names, parts, priority)


@given(NUMBERS, st.integers(0, (1 << 32) - 1), st.integers(0, 1 << 62), PIECES)
def test_pushes(pin: int, region: int, offset: int, pieces: list[Pushing]) -> None:
    assert frames.unpack_push(frames.pack_push(pin, region, offset, pieces)) == (pin, region, offset, pieces)


@given(st.lists(NUMBERS, max_size=100), NUMBERS, st.integers(0, (1 << 32) - 1), st.binary(max_size=200))
def test_marks_numbers_and_memories(marks: list[int], number: int, region: int, descriptor: bytes) -> None:
    assert frames.unpack_marks(frames.pack_marks(marks)) == tuple(marks)
    assert frames.unpack_number(frames.pack_number(number)) == number
    assert frames.unpack_memory(frames.pack_memory(region, descriptor)) == (region, descriptor)


@given(st.sampled_from(Op), NUMBERS, st.binary(max_size=100))
def test_headers(op: Op, number: int, body: bytes) -> None:
    packed = frames.pack(op, number, body)
    assert frames.unpack_header(packed[: frames.HEADER.size]) == (len(body), op, number)
    assert packed[frames.HEADER.size :] == body


def test_what_is_too_long_is_refused_on_both_ends() -> None:
    with pytest.raises(ProtocolError):
        frames.pack(Op.HELD, 1, bytes(frames.BODY_BYTES_MAX + 1))
    with pytest.raises(ProtocolError):
        frames.unpack_header(frames.HEADER.pack(frames.BODY_BYTES_MAX + 1, Op.HELD, 0, 1))
    with pytest.raises(ProtocolError):
        frames.unpack_header(frames.HEADER.pack(1, Op.HELD, 1, 1))
    assert frames.outcome(0) is Outcome.HIT
    for wrong in (1, -6, -(1 << 63)):
        with pytest.raises(ProtocolError):
            frames.outcome(wrong)


def one_of_all(rng: random.Random) -> list[tuple[Callable[[bytes], object], bytes]]:
    """Good bodies, and who takes them apart."""
    items = []
    for _ in range(rng.randrange(4)):
        step, size = rng.choice([512, 4096, 1 << 20]), rng.randrange(1, 60_000)
        if part_count(size, step) > 64:
            continue
        parts = rng.randint(1, all_parts(size, step))
        payload = Payload(Name(rng.randbytes(rng.choice([16, 32]))), size, step, parts, bytes(8 * parts.bit_length()))
        items.append(rng.choice([NOT_THERE, LATER, Item(payload, Place(rng.randrange(4), rng.randrange(1 << 40)))]))
    names = [Name(rng.randbytes(16)) for _ in range(rng.randrange(4))]
    pieces = [Pushing(rng.randrange(9), 5, 9 + rng.randrange(99)) for _ in range(rng.randrange(4))]
    return [
        (frames.unpack_held, frames.pack_held(Held(rng.randrange(99), items, True))),
        (frames.unpack_want, frames.pack_want(names, [rng.getrandbits(64) for _ in names], 1)),
        (frames.unpack_push, frames.pack_push(1, 2, 3, pieces)),
        (frames.unpack_marks, frames.pack_marks([rng.getrandbits(64) for _ in range(rng.randrange(9))])),
        (frames.unpack_number, frames.pack_number(rng.getrandbits(64))),
        (frames.unpack_memory, frames.pack_memory(7, rng.randbytes(rng.randrange(40)))),
    ]


def damaged(body: bytes, rng: random.Random) -> bytes:
    """What could come in its place."""
    one = bytearray(body)
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        at = rng.randrange(len(one)) if one else 0
        choice = rng.random()
        if choice < 0.4 and one:
            one[at] ^= 1 << rng.randrange(8)
        elif choice < 0.6 and one:
            one[at : at + 8] = rng.choice([b"\xff" * 8, bytes(8), b"\x00" * 7 + b"\x80"])
        elif choice < 0.7:
            del one[at:]
        elif choice < 0.8:
            del one[at : at + rng.randrange(1, 9)]
        elif choice < 0.9:
            one[at:at] = rng.randbytes(rng.randrange(1, 40))
        else:
            one = bytearray(rng.randbytes(rng.randrange(200)))
    return bytes(one)


@pytest.mark.slow
def test_a_hundred_thousand_damaged_bodies() -> None:
    rng = random.Random(5)
    believed = refused = 0
    tracemalloc.start()
    try:
        while believed + refused < 100_000:
            for take, body in one_of_all(rng):
                for _ in range(30):
                    try:
                        found = take(damaged(body, rng))
                        believed += 1
                    except ProtocolError:
                        refused += 1
                        continue
                    if isinstance(found, Held):  # whoever believes it may rely on this
                        for one in found.items:
                            if one.payload is not None:
                                it = one.payload
                                assert 0 < it.parts <= all_parts(it.size, it.part_bytes)
                                assert len(it.digests) == 8 * it.parts.bit_length()
                                assert it.cost_s >= 0 and len(it.name.key) in (16, 32)
                                assert 0 <= one.place.offset and one.place.offset + it.size < 1 << 63
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert believed > 5000 < refused
