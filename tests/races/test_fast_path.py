"""The blocking fast path against the loop, in real threads: order forced by events, then a short stress.

The simulated loop never sees this: readers in threads take leases and copies while the loop evicts, deletes and puts.
"""

from __future__ import annotations

import asyncio
import gc
import random
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest

from tiercache.buffers import Buffer
from tiercache.cache import Cache
from tiercache.clock import SystemClock
from tiercache.cpu.tier import MemoryTier
from tiercache.index import Index
from tiercache.keys import object_key, page_key
from tiercache.lease import PageRun
from tiercache.metrics import Metrics
from tiercache.model import Name, Outcome, State, part_count
from tiercache.policy import LRU
from tiercache.settings import Settings
from tiercache.testing.model import made_bytes

KIB = 1 << 10
PATIENCE_S = 20
SIZE = 64 * KIB
PAGE, PART = 64 * KIB, 16 * KIB


class Gates:
    """Named places where a thread stops until it may go on. Only threads that were told to stop there do."""

    def __init__(self) -> None:
        self.reached: dict[str, threading.Event] = {}
        self.opened: dict[str, threading.Event] = {}
        self.stops: dict[int, str] = {}

    def stop_at(self, place: str) -> None:
        """The calling thread will stop at this place, once."""
        self.reached.setdefault(place, threading.Event())
        self.opened.setdefault(place, threading.Event())
        self.stops[threading.get_ident()] = place

    def pass_by(self, place: str) -> None:
        if self.stops.get(threading.get_ident()) == place:
            del self.stops[threading.get_ident()]
            self.reached[place].set()
            assert self.opened[place].wait(PATIENCE_S), f"nobody opened {place}"

    def prepare(self, place: str) -> None:
        self.reached[place], self.opened[place] = threading.Event(), threading.Event()

    def wait_for(self, place: str) -> None:
        assert self.reached[place].wait(PATIENCE_S), f"nobody came to {place}"

    def open(self, place: str) -> None:
        self.opened[place].set()


class GatedMemory:
    """The memory tier with a gate before each thing that the cache does with extents."""

    def __init__(self, inner: MemoryTier, gates: Gates) -> None:
        self._inner, self._gates = inner, gates

    def __getattr__(self, name: str) -> object:
        found = getattr(self._inner, name)
        if name not in ("reserve", "buffers", "copy_out", "commit", "payloads", "free"):
            return found

        def passed(*arguments: object, **options: object) -> object:
            self._gates.pass_by(name)
            return found(*arguments, **options)

        return passed


class Bench:
    """A cache without SSD on a loop in a thread of its own."""

    def __init__(self, memory_bytes: int) -> None:
        self.gates = Gates()
        self.index = Index(1 << 14, [LRU()])
        self.memory = MemoryTier(memory_bytes, shareable=False)
        settings = Settings(directory="/nowhere", memory_bytes=2 << 20, ssd_bytes=0, queue_bytes=0, page_bytes=PAGE)
        gated: object = GatedMemory(self.memory, self.gates)
        self.cache = Cache(self.index, gated, settings=settings, clock=SystemClock(), metrics=Metrics())  # type: ignore[arg-type]
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.run(self.cache.start())

    def run(self, work):
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(PATIENCE_S)

    def put(self, *labels: object, size: int = SIZE) -> list[Outcome]:
        return self.run(
            self.cache.put([name(label) for label in labels], [made_bytes(label, size) for label in labels])
        )

    def crowd(self, count: int, mark: str) -> None:
        """Puts so much that everything evictable goes."""
        for i in range(count):
            self.put(f"{mark}{i}")

    def settle(self) -> None:
        """Nothing may be pinned, half-done or out of order."""
        gc.collect()
        self.cache.tiers.drain()
        self.index.validate()
        states = np.asarray(self.index.state)
        assert not np.asarray(self.index.pin).any()
        assert not np.isin(states, [State.PENDING, State.MOVING, State.EVICTING]).any()
        status = self.memory.status()
        assert status.used_bytes <= status.capacity_bytes

    def close(self) -> None:
        self.run(self.cache.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(PATIENCE_S)
        self.loop.close()


@contextmanager
def bench(memory_bytes: int = 512 * KIB):
    made = Bench(memory_bytes)
    try:
        yield made
        made.settle()
    finally:
        made.close()


@contextmanager
def stopped(where: Bench, place: str, work):
    """Runs `work` in a thread that stops at a gate; the block runs meanwhile; yields the future of its answer."""
    where.gates.prepare(place)

    def gated():
        where.gates.stop_at(place)
        where.gates.reached[place].clear()
        return work()

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(gated)
        where.gates.wait_for(place)
        try:
            yield future
        finally:
            where.gates.open(place)


def name(label: object) -> Name:
    return Name(object_key("races", str(label)))


def copied(where: Bench, label: object, size: int = SIZE) -> tuple[Outcome, bytes]:
    target = bytearray(size)
    outcome = where.cache.get_into_resident([name(label)], [Buffer.of(target, writable=True)])[0]
    return outcome, bytes(target)


RUN = PageRun(page_key("races://", "file", "1", PAGE, PART), 8 * PAGE, PAGE, PART)


def page(ordinal: int) -> bytes:
    return made_bytes(("page", ordinal), PAGE)


async def load(gaps, landed) -> None:
    for i, gap in enumerate(gaps):
        truth = page(gap.ordinal)
        for part in range(part_count(PAGE, PART)):
            if gap.parts >> part & 1:
                gap.target.view()[part * PART : (part + 1) * PART] = truth[part * PART : (part + 1) * PART]
        landed([i])


# -- forced orders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("meanwhile", ["evict", "delete", "replace"])
def test_a_copy_that_was_overtaken_gives_the_bytes_that_it_found(meanwhile: str) -> None:
    with bench() as it:
        assert it.put("a") == [Outcome.HIT]
        with stopped(it, "copy_out", lambda: copied(it, "a")) as answer:
            if meanwhile != "evict":
                assert it.run(it.cache.delete([name("a")])) == [Outcome.HIT]
            it.crowd(12, meanwhile)
            if meanwhile == "replace":
                it.run(it.cache.put([name("a")], [made_bytes("other", SIZE)]))
        outcome, data = answer.result(PATIENCE_S)
        assert outcome is Outcome.HIT
        assert data == made_bytes("a", SIZE)
        later, data = copied(it, "a")
        if later is Outcome.HIT:
            assert data == made_bytes("other" if meanwhile == "replace" else "a", SIZE)
        assert later is not Outcome.HIT or meanwhile != "delete"


def test_a_lease_taken_just_before_eviction_keeps_its_bytes() -> None:
    with bench() as it:
        lease = it.run(it.cache.read_pages(RUN, [0, 1], [15, 15], load))
        lease.release()

        def take():
            lease = it.cache.lease_resident(RUN.key, [0, 1], [15, 15])
            return lease, lease.view(0), lease.view(1)

        with stopped(it, "buffers", take) as answer:
            it.crowd(12, "crowd")
            it.run(it.cache.delete([Name(RUN.key, 0)]))
            it.crowd(12, "more")
        lease, first, second = answer.result(PATIENCE_S)
        assert first == page(0)
        assert second == page(1)
        lease.release()
        it.crowd(12, "again")
        assert first == page(0)
        assert second == page(1)
        del first, second, answer


def test_of_two_threads_that_store_one_name_the_second_is_told_so() -> None:
    with bench() as it:
        value = made_bytes("x", SIZE)

        def store():
            return it.cache.store([name("x")], [Buffer.of(value)])

        with stopped(it, "commit", store) as first:
            assert store() == [Outcome.BUSY]
            assert copied(it, "x")[0] is Outcome.MISS
        assert first.result(PATIENCE_S) == [Outcome.HIT]
        assert store() == [Outcome.HIT]
        assert copied(it, "x") == (Outcome.HIT, value)


@pytest.mark.parametrize("place", ["reserve", "buffers", "commit"])
def test_a_delete_during_a_store_leaves_nothing_half_done(place: str) -> None:
    with bench() as it:
        value = made_bytes("x", SIZE)
        with stopped(it, place, lambda: it.cache.store([name("x")], [Buffer.of(value)])) as stored:
            it.run(it.cache.delete([name("x")]))
            it.crowd(10, "crowd")
        assert stored.result(PATIENCE_S)[0] in (Outcome.HIT, Outcome.FULL)
        outcome, data = copied(it, "x")
        assert outcome is Outcome.MISS or data == value


def test_parts_are_seen_only_when_they_have_landed() -> None:
    with bench() as it:
        go = threading.Event()
        begun = threading.Event()

        async def slow(gaps, landed) -> None:
            begun.set()
            await asyncio.get_running_loop().run_in_executor(None, go.wait, PATIENCE_S)
            await load(gaps, landed)

        it.run(it.cache.read_pages(RUN, [3], [0b0001], load)).release()
        reading = asyncio.run_coroutine_threadsafe(it.cache.read_pages(RUN, [3], [0b0011], slow), it.loop)
        assert begun.wait(PATIENCE_S)
        assert it.cache.lease_resident(RUN.key, [3], [0b0010]) is None
        with it.cache.lease_resident(RUN.key, [3], [0b0001]) as lease:
            assert lease.view(0)[:PART] == page(3)[:PART]
        go.set()
        reading.result(PATIENCE_S).release()
        with it.cache.lease_resident(RUN.key, [3], [0b0011]) as lease:
            assert lease.view(0)[: 2 * PART] == page(3)[: 2 * PART]


def test_a_release_in_one_thread_and_a_view_in_another_agree() -> None:
    with bench() as it:
        it.run(it.cache.read_pages(RUN, [0], [15], load)).release()
        lease = it.cache.lease_resident(RUN.key, [0], [15])

        def look():
            try:
                return lease.view(0)
            except Exception as error:
                return error

        with stopped(it, "buffers", look) as answer:
            lease.release()
            it.run(it.cache.delete([Name(RUN.key, 0)]))
            it.crowd(12, "crowd")
        seen = answer.result(PATIENCE_S)
        assert isinstance(seen, Exception) or seen == page(0)
        del seen, answer


def test_views_that_die_in_other_threads_give_their_room_back() -> None:
    with bench() as it:
        for turn in range(20):
            with it.run(it.cache.read_pages(RUN, [turn % 8], [15], load)) as lease:
                view = lease.view(0)
            thread = threading.Thread(target=lambda seen: bytes(seen[:10]), args=(view,))
            thread.start()
            del view
            thread.join()
            assert it.put(f"after{turn}") == [Outcome.HIT]


# -- many at once --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ten_thousand_cold_readers_of_one_page_cause_one_request() -> None:
    threads, tasks = 64, 10_000 - 64
    with bench(2 << 20) as it:
        requests = []
        waiting = threading.Semaphore(0)
        all_there = asyncio.Event()

        async def slow(gaps, landed) -> None:
            requests.append([(gap.ordinal, gap.parts) for gap in gaps])
            await all_there.wait()
            await load(gaps, landed)

        async def read() -> bool:
            waiting.release()
            with await it.cache.read_pages(RUN, [5], [15], slow) as lease:
                return lease.outcomes == [Outcome.HIT] and lease.view(0) == truth

        async def crowd() -> list[bool]:
            return await asyncio.gather(*[read() for _ in range(tasks)])

        truth = page(5)
        with ThreadPoolExecutor(threads) as pool:
            on_loop = asyncio.run_coroutine_threadsafe(crowd(), it.loop)
            in_threads = [pool.submit(it.run, read()) for _ in range(threads)]
            for _ in range(threads + tasks):
                assert waiting.acquire(timeout=60)
            it.loop.call_soon_threadsafe(all_there.set)
            right = on_loop.result(60) + [future.result(60) for future in in_threads]
        assert len(right) == 10_000
        assert all(right)
        assert requests == [[(5, 15)]]


@pytest.mark.slow
def test_readers_in_threads_against_a_busy_loop() -> None:
    """Every interleaving that switching threads all the time brings up, for a second."""
    interval = sys.getswitchinterval()
    wrong: list[str] = []
    stop = threading.Event()
    labels = [f"s{i}" for i in range(12)]
    with bench(1 << 20) as it:

        def reader(seed: int) -> int:
            rng = random.Random(seed)
            hits = 0
            while not stop.is_set():
                label = rng.choice(labels)
                outcome, data = copied(it, label)
                if outcome is Outcome.HIT:
                    hits += 1
                    if data != made_bytes(label, SIZE):
                        wrong.append(f"copy of {label}")
                ordinal = rng.randrange(8)
                lease = it.cache.lease_resident(RUN.key, [ordinal], [rng.randrange(1, 16)])
                if lease is not None:
                    whole = it.cache.lease_resident(RUN.key, [ordinal], [15])
                    view = whole.view(0) if whole is not None else None
                    lease.release()
                    if whole is not None:
                        whole.release()
                    if view is not None and view != page(ordinal):
                        wrong.append(f"page {ordinal}")
            return hits

        def writer(seed: int) -> None:
            rng = random.Random(seed)
            while not stop.is_set():
                label = rng.choice(labels)
                it.cache.store([name(label)], [Buffer.of(made_bytes(label, SIZE))])

        async def churn() -> None:
            rng = random.Random(0)
            while not stop.is_set():
                (await it.cache.read_pages(RUN, [rng.randrange(8)], [rng.randrange(1, 16)], load)).release()
                if rng.random() < 0.3:
                    await it.cache.delete([name(rng.choice(labels))])
                if rng.random() < 0.1:
                    await it.cache.delete([Name(RUN.key, rng.randrange(8))])
                await asyncio.sleep(0)

        sys.setswitchinterval(1e-6)
        try:
            with ThreadPoolExecutor(6) as pool:
                churning = asyncio.run_coroutine_threadsafe(churn(), it.loop)
                readers = [pool.submit(reader, i) for i in range(4)]
                writers = [pool.submit(writer, i) for i in range(2)]
                stop.wait(1.0)
                stop.set()
                hits = sum(future.result(PATIENCE_S) for future in readers)
                for future in writers:
                    future.result(PATIENCE_S)
                churning.result(PATIENCE_S)
        finally:
            stop.set()
            sys.setswitchinterval(interval)
        assert not wrong, wrong[:5]
        assert hits > 10
        deadline = time.monotonic() + PATIENCE_S
        while len(it.cache._filling.flights) and time.monotonic() < deadline:
            it.run(asyncio.sleep(0))
