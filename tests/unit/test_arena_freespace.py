"""Free space: best fit against a brute-force model, nothing lost, little wasted at real block sizes."""

from __future__ import annotations

import random
import re

import pytest

from tiercache.cpu.freespace import FreeSpace

PAGE = 4096


@pytest.mark.slow
def test_equals_brute_force_over_many_random_calls() -> None:
    """10^5 takes and adds over a map of pages: the same extent every time, the same free extents at the end."""
    pages, rng = 700, random.Random(1)
    space, used = FreeSpace(), bytearray(pages)
    space.add(0, pages)
    held: list[tuple[int, int]] = []
    for step in range(100_000):
        if held and (rng.random() < 0.5 or len(held) > 60):
            start, length = held.pop(rng.randrange(len(held)))
            used[start : start + length] = bytes(length)
            space.add(start, length)
        else:
            length = rng.choice((1, 1, 2, 5, 17, rng.randrange(1, 60)))
            free = [(m.end() - m.start(), m.start()) for m in re.finditer(rb"\0+", used)]
            best = min(((n, at) for n, at in free if n >= length), default=(0, -1))[1]
            start = space.take(length)
            assert start == best, step
            if start >= 0:
                used[start : start + length] = b"\1" * length
                held.append((start, length))
        if step % 500 == 0:
            assert space.extents() == [(m.start(), m.end() - m.start()) for m in re.finditer(rb"\0+", used)]
            assert space.free_pages == used.count(0)
            assert space.longest == max((n for _, n in space.extents()), default=0)
    for start, length in held:
        space.add(start, length)
    assert space.extents() == [(0, pages)] and space.free_pages == pages


def test_take_top_leaves_the_bottom_whole() -> None:
    space = FreeSpace()
    space.add(0, 100)
    space.add(200, 50)
    assert space.take_top(0, 150, 10) == 90
    assert space.take_top(0, 150, 95) == -1
    assert space.take_top(150, 300, 50) == 200
    assert space.take_top(150, 300, 1) == -1
    assert space.extents() == [(0, 90)] and space.free_pages == 90


KV_BLOCKS = (499_712, 562_176, 1_124_352)
MIXES = [[size] for size in (*KV_BLOCKS, 1 << 20)] + [
    [*KV_BLOCKS, 1 << 20],
    [499_712, 1 << 20],
    [1 << 20] * 8 + [4096 * n for n in range(1, 256, 5)],
]


@pytest.mark.slow
@pytest.mark.parametrize("order", ["oldest", "random"])
@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: f"{len(mix)}-{mix[0]}")
def test_little_is_wasted_after_churn(mix: list[int], order: str) -> None:
    """Twenty times the space has gone through 1 GiB; then, with the space full, at most 5 % holds no payload.

    Waste is what is free when the next entry of the mix does not fit, and what extents are longer than payloads,
    averaged over the second half of the churn. Victims go in the order of their age (as LRU takes them) or at random
    (the worst for any allocator that never moves what it holds).
    """
    total = (1 << 30) // PAGE
    rng = random.Random(2)
    space = FreeSpace()
    space.add(0, total)
    held: list[tuple[int, int, int]] = []
    oldest = payload_bytes = wasted = samples = 0
    steps = 20 * total * PAGE // (sum(mix) // len(mix))
    for step in range(steps):
        size = rng.choice(mix)
        pages = -(-size // PAGE)
        start = space.take(pages)
        while start < 0:
            if step > steps // 2:
                wasted += total * PAGE - payload_bytes
                samples += 1
            if order == "random":
                pick = rng.randrange(oldest, len(held))
                held[pick], held[oldest] = held[oldest], held[pick]
            at, length, gone = held[oldest]
            oldest += 1
            space.add(at, length)
            payload_bytes -= gone
            start = space.take(pages)
        held.append((start, pages, size))
        payload_bytes += size
    waste = wasted / samples / (total * PAGE)
    assert waste <= (0.05 if order == "random" else 0.01), waste
