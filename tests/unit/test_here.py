"""Reads of the SSD in the reader's own thread: the same bytes and the same care as through the loop."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

import tiercache
from tiercache.buffers import Buffer
from tiercache.keys import page_key
from tiercache.lease import PageRun
from tiercache.model import Outcome
from tiercache.sync import wait
from tiercache.testing.model import made_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MIB, PATIENCE_S = 1 << 20, 60
RUN = PageRun(page_key("here://", "file", "1", MIB, 16 << 10), 3 * MIB - 77, MIB, 16 << 10)
ALL = (1 << 64) - 1


def page(ordinal: int) -> bytes:
    return made_bytes(("page", ordinal), RUN.page_size(ordinal))


async def load(gaps, landed) -> None:
    for i, gap in enumerate(gaps):
        gap.target.view()[:] = page(gap.ordinal)
        landed([i])


def opened(path: Path) -> tiercache.BlockingCache:
    return tiercache.open(directory=str(path), memory_bytes=8 * MIB, ssd_bytes=128 * MIB, disk_free_floor_bytes=0)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[tiercache.BlockingCache]:
    """A cache that has the file's pages on its SSD, and nothing in memory."""
    with opened(tmp_path) as first:
        wait(first.core.read_pages(RUN, [0, 1, 2], [ALL, ALL, ALL], load), first.loop).release()
        assert first.flush()
    with opened(tmp_path) as again:
        deadline_s = time.monotonic() + PATIENCE_S
        while not again.core.recovered:
            assert time.monotonic() < deadline_s
        yield again
        again.core.tiers.drain()
        assert again.core.tiers.index.pins == 0
        again.core.tiers.index.validate()


def test_pages_of_the_ssd_come_without_the_loop(cache: tiercache.BlockingCache) -> None:
    core = cache.core
    assert core.lease_resident(RUN.key, [0], [1]) is None
    for parts in (0b110, 0b111, ALL):
        with core.lease_local(RUN.key, [0, 2], [parts, parts]) as lease:
            for i, ordinal in enumerate((0, 2)):
                target = bytearray(3 << 14)
                low, high = (1 << 14, 3 << 14) if parts == 0b110 else (0, 3 << 14)
                outcome = lease.copy_into(i, low, high, Buffer.of(target, writable=True))
                assert outcome is Outcome.HIT and target[: high - low] == page(ordinal)[low:high]
    resident = core.lease_resident(RUN.key, [0, 2], [ALL >> 1, 0b111])
    assert resident is not None
    resident.release()
    assert core.stats()['tiercache_hits_total{tier="ssd",kind="page"}'] == 6
    assert core.lease_local(RUN.key, [0, 3], [1, 1]) is None, "what no tier has is for the loop"


def test_a_loop_is_not_held(cache: tiercache.BlockingCache) -> None:
    async def ask() -> object:
        return cache.core.lease_local(RUN.key, [0], [1])

    assert wait(ask(), cache.loop) is None


def test_who_comes_while_a_thread_reads_waits_for_it(cache: tiercache.BlockingCache) -> None:
    core = cache.core
    ssd, asked, go = core.tiers.ssd, threading.Event(), threading.Event()
    real, calls = ssd.read_here, []

    def slow(wants, targets, digests):
        calls.append(len(wants))
        asked.set()
        assert go.wait(PATIENCE_S)
        return real(wants, targets, digests)

    ssd.read_here = slow
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(core.lease_local, RUN.key, [1], [0b1])
        assert asked.wait(PATIENCE_S)
        assert core.lease_local(RUN.key, [1], [0b1]) is None, "one claim at a time"
        second = pool.submit(wait, core.read_pages(RUN, [1], [0b11], load), cache.loop)
        deadline_s = time.monotonic() + PATIENCE_S
        while not core.metrics.value("tiercache_hits_total", tier="ssd", kind="page"):
            assert time.monotonic() < deadline_s, "the second has not looked at the page"
        go.set()
        for lease in (first.result(PATIENCE_S), second.result(PATIENCE_S)):
            assert bytes(lease.view(0)[: 1 << 14]) == page(1)[: 1 << 14]
            lease.release()
    assert calls == [1]
    assert core.metrics.value("tiercache_hits_total", tier="ssd", kind="page") == 2


def test_damage_between_the_check_and_the_landing_is_seen(cache: tiercache.BlockingCache) -> None:
    ssd = cache.core.tiers.ssd
    real = ssd.read_here

    def damaging(wants, targets, digests):
        outcomes = real(wants, targets, digests)
        targets[0].array()[5] ^= 1
        return outcomes

    ssd.read_here = damaging
    with cache.core.lease_local(RUN.key, [1], [0b11]) as lease:
        target = Buffer.of(bytearray(1 << 14), writable=True)
        assert lease.copy_into(0, 0, 1 << 14, target) is Outcome.CORRUPT
        assert lease.copy_into(0, 1 << 14, 2 << 14, target) is Outcome.HIT


@pytest.mark.parametrize("answer", [Outcome.MISS, Outcome.BUSY, Outcome.CORRUPT])
def test_a_read_that_fails_changes_nothing_and_the_loop_goes_on(
    cache: tiercache.BlockingCache, answer: Outcome
) -> None:
    core = cache.core
    used = core.tiers.memory.status().used_bytes
    core.tiers.ssd.read_here = lambda wants, targets, digests: [answer] * len(wants)
    assert core.lease_local(RUN.key, [1], [0b11]) is None
    assert core.tiers.memory.status().used_bytes <= max(used, 1 << 16)
    with wait(core.read_pages(RUN, [1], [0b11], load), cache.loop) as lease:
        assert bytes(lease.view(0)[: 2 << 14]) == page(1)[: 2 << 14]
