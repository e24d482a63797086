"""Glances over a real arena, seen from a view of it: what is read without asking is right, or is not read."""

from __future__ import annotations

import os
import threading
from dataclasses import replace

import numpy as np
import pytest

from tiercache import keys
from tiercache.buffers import Buffer, copy, part_digests
from tiercache.cpu.tier import MemoryTier
from tiercache.cpu.view import ArenaView
from tiercache.errors import ConfigError
from tiercache.model import Name, Outcome, Payload, all_parts, part_bytes_for
from tiercache.wire.glance import glance_into, glance_pages, sees_pages
from tiercache.wire.memo import TOUCHES_MAX, Home, Memo

MIB = 1 << 20
KEY = b"k" * 32


class Scene:
    """A memory tier and another process's view of it (here in the same process: the mapping is its own)."""

    def __init__(self, capacity: int = 16 * MIB) -> None:
        self.tier = MemoryTier(capacity, segment_bytes=capacity)
        arena_id = bytes(16)
        self.home = Home(arena_id.hex(), ArenaView(arena_id))

    def show(self) -> None:
        """The view gets the segments that there are."""
        for segment in self.tier.arena.segments[self.home.view.known :]:
            assert segment.fd is not None
            self.home.view.attach(segment.ordinal, os.dup(segment.fd))

    def put(self, name: Name, value: bytes, parts: int | None = None, expiry_s: int = 0) -> int:
        """An entry, remembered where it lies."""
        step = part_bytes_for(len(value))
        payload = replace(Payload(name, len(value), step, 0, b""), expiry_s=expiry_s)
        location = self.tier.arena.reserve([payload])[0]
        assert location >= 0
        target = self.tier.buffers([location])[0]
        copy(Buffer.of(value), target)
        parts = all_parts(len(value), step) if parts is None else parts
        self.tier.commit([location], [parts], [part_digests(target, step, parts)])
        self.show()
        self.home.memo.learn([(name, location)])
        return location

    def get(self, *names: Name, size: int = MIB, verify: bool = True, now_s: float = 0) -> list[object]:
        """What a glance gives: bytes, or the outcome."""
        targets = [Buffer.of(bytearray(size), writable=True) for _ in names]
        outcomes = glance_into(self.home, names, targets, verify, now_s)
        return [
            bytes(target)[: self.home.view.find(self.home.memo.get(name)).size]  # type: ignore[union-attr]
            if outcome is Outcome.HIT
            else outcome
            for name, outcome, target in zip(names, outcomes, targets, strict=True)
        ]


def name(label: str) -> Name:
    return Name(keys.object_key("test", label))


def content(seed: int, size: int) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def test_what_is_remembered_is_read_and_what_is_not_is_asked_for() -> None:
    scene = Scene()
    sizes = [0, 1, 65_537, MIB]
    values = [content(i, size) for i, size in enumerate(sizes)]
    names = [name(str(size)) for size in sizes]
    for one, value in zip(names, values, strict=True):
        scene.put(one, value)
    for verify in (True, False):
        assert scene.get(*names, name("unknown"), verify=verify) == [*values, Outcome.MISS]
    assert len(scene.home.touched) == 8


def test_an_extent_that_was_freed_or_serves_another_is_no_hit_and_is_forgotten() -> None:
    scene = Scene()
    location = scene.put(name("a"), content(1, MIB))
    scene.tier.free([location])
    other = scene.put(name("b"), content(2, MIB))
    assert other & 0xFFFFFFFF != location & 0xFFFFFFFF or other != location
    assert scene.get(name("a"), name("b")) == [Outcome.MISS, content(2, MIB)]
    assert scene.home.memo.get(name("a")) == -1
    scene.home.memo.learn([(name("a"), other)])  # a wrong memory of any kind
    assert scene.get(name("a")) == [Outcome.MISS]


def test_what_can_be_seen_is_said_without_counting_as_read() -> None:
    scene = Scene()
    pages = [Name(KEY, ordinal) for ordinal in range(2)]
    every = all_parts(MIB, part_bytes_for(MIB))
    places = [scene.put(pages[0], content(1, MIB)), scene.put(pages[1], content(2, MIB), parts=0b101)]
    for ordinals, parts, seen in [
        ([0], [every], True),
        ([0, 1], [1, 0b100], True),
        ([0, 1], [1, 0b10], False),
        ([2], [1], False),
    ]:
        assert sees_pages(scene.home, KEY, ordinals, parts, 0) is seen
    scene.tier.retire(places[:1])
    assert not sees_pages(scene.home, KEY, [0], [1], 0)
    assert not scene.home.touched


def test_what_is_deleted_or_over_is_not_served_by_a_glance() -> None:
    scene = Scene()
    scene.put(name("over"), b"x", expiry_s=100)
    assert scene.get(name("over"), now_s=99) == [b"x"]
    assert scene.get(name("over"), now_s=100) == [Outcome.MISS]
    location = scene.put(name("deleted"), b"y")
    scene.tier.retire([location])
    assert scene.get(name("deleted")) == [Outcome.MISS]


def test_damage_is_seen_and_a_part_that_is_missing_is_asked_for() -> None:
    scene = Scene()
    location = scene.put(name("a"), content(1, MIB))
    scene.tier.buffers([location])[0].array()[777] ^= 1
    assert scene.get(name("a")) == [Outcome.CORRUPT]
    scene.put(name("half"), content(1, MIB), parts=0xFF)
    assert scene.get(name("half")) == [Outcome.MISS]


def test_a_target_that_is_too_small_is_told() -> None:
    scene = Scene()
    scene.put(name("a"), b"xyz")
    with pytest.raises(ConfigError, match="larger buffer"):
        scene.get(name("a"), size=2)


def test_pages_are_seen_as_far_as_their_parts_go() -> None:
    scene = Scene()
    value = content(3, MIB)
    scene.put(Name(KEY, 0), value)
    scene.put(Name(KEY, 1), value, parts=0b11)
    assert glance_pages(scene.home, KEY, [0, 1], [1, 0b101], 0) is None
    assert glance_pages(scene.home, KEY, [0, 2], [1, 1], 0) is None
    seen = glance_pages(scene.home, KEY, [0, 1], [all_parts(MIB, 65536), 0b10], 0)
    assert seen is not None
    assert len(seen) == 2
    with seen as lease:
        target = Buffer.of(bytearray(100_000), writable=True)
        assert lease.copy_into(0, 5, 100_005, target) is Outcome.HIT
        assert bytes(target) == value[5:100_005]
        with pytest.raises(ConfigError, match="pins nothing"):
            lease.view(0)


def test_a_page_that_goes_between_the_look_and_the_copy_is_a_miss() -> None:
    scene = Scene()
    location = scene.put(Name(KEY, 0), content(3, MIB))
    seen = glance_pages(scene.home, KEY, [0], [1], 0)
    assert seen is not None
    scene.tier.free([location])
    scene.put(name("next"), content(4, MIB))
    assert seen.copy_into(0, 0, 100, Buffer.of(bytearray(100), writable=True)) is Outcome.MISS
    assert scene.home.memo.get(Name(KEY, 0)) == -1


def test_extents_that_are_reused_under_a_reader_never_give_wrong_bytes() -> None:
    scene = Scene(4 * MIB)
    names = [name(str(i)) for i in range(8)]
    values = {one: content(i, 700_000) for i, one in enumerate(names)}
    living: list[int] = []
    stop = threading.Event()
    outcomes: list[Outcome] = []

    def read() -> None:
        targets = [Buffer.of(bytearray(700_000), writable=True) for _ in names]
        while not stop.is_set():
            for verify in (True, False):
                got = glance_into(scene.home, names, targets, verify, 0)
                for one, outcome, target in zip(names, got, targets, strict=True):
                    assert outcome is not Outcome.CORRUPT
                    assert outcome is not Outcome.HIT or bytes(target) == values[one]
                outcomes.extend(got)

    failures: list[BaseException] = []

    def reader() -> None:
        try:
            read()
        except BaseException as fault:
            failures.append(fault)

    scene.put(names[0], values[names[0]])
    thread = threading.Thread(target=reader)
    thread.start()
    for turn in range(600):
        if len(living) == 3:
            scene.tier.free([living.pop(0)])
        one = names[turn % len(names)]
        living.append(scene.put(one, values[one]) if turn else scene.home.memo.get(one))
        if failures:
            break
    stop.set()
    thread.join()
    assert not failures
    assert Outcome.HIT in outcomes


def test_a_memo_is_bounded_and_keeps_what_is_used() -> None:
    memo = Memo(100)
    memo.learn([(Name(KEY, 0), 7)])
    for i in range(1, 1000):
        memo.learn([(Name(KEY, i), i)])
        assert memo.get(Name(KEY, 0)) == 7
        assert len(memo) <= 102
    assert memo.get(Name(KEY, 1)) == -1
    memo.learn([(Name(KEY, 5), -1)])
    assert memo.get(Name(KEY, 5)) == -1
    memo.forget(Name(KEY, 0))
    assert memo.get(Name(KEY, 0)) == -1


def test_touches_come_in_batches() -> None:
    scene = Scene()
    scene.home.touched.extend(range(TOUCHES_MAX + 10))
    assert scene.home.take_touched() == list(range(TOUCHES_MAX))
    assert len(scene.home.take_touched()) == 10
    assert scene.home.take_touched() == []
