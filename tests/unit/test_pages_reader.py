"""The page reader over a cache of the test's own (pages in a dictionary behind the port) and origins that count."""

from __future__ import annotations

import asyncio
import random
import threading
from dataclasses import dataclass, field

import pytest

from tiercache.buffers import Buffer, copy_range_verified, new_bytes, part_digests
from tiercache.clock import SystemClock
from tiercache.errors import ChangedError, OriginError, UnavailableError
from tiercache.lease import Gap, Lease
from tiercache.metrics import Metrics
from tiercache.model import Name, Outcome, Payload
from tiercache.pages.plan import plan_around
from tiercache.pages.reader import PageReader
from tiercache.settings import Settings
from tiercache.testing.model import DictOrigin
from tiercache.testing.notes import NotesTable
from tiercache.testing.simloop import SimClock, simulate

PAGE, PART = 64 << 10, 4096
KIB = 1 << 10


@dataclass
class Page:
    buffer: Buffer
    name: Name
    parts: int = 0
    digests: bytes = b""


@dataclass
class DictCache:
    """Pages in a dictionary, behind the port that the reader knows."""

    pages: dict = field(default_factory=dict)
    full: set = field(default_factory=set)
    """Ordinals that find no room."""
    loads: list = field(default_factory=list)
    leases: int = 0
    pinned: int = 0
    pinned_most: int = 0

    def lease_resident(self, key, ordinals, parts):
        found = [self.pages.get((key, ordinal)) for ordinal in ordinals]
        if any(page is None or page.parts & want != want for page, want in zip(found, parts, strict=True)):
            return None
        return self._lease(found, [Outcome.HIT] * len(found))

    def lease_local(self, key, ordinals, parts):
        return None

    async def read_pages(self, run, ordinals, parts, load):
        gaps, filled = [], []
        for ordinal, want in zip(ordinals, parts, strict=True):
            if ordinal in self.full:
                continue
            page = self.pages.get((run.key, ordinal))
            if page is None:
                size = run.page_size(ordinal)
                page = Page(Buffer.of(bytearray(size), writable=True), Name(run.key, ordinal))
                self.pages[run.key, ordinal] = page
            if want & ~page.parts:
                gaps.append(Gap(ordinal, want & ~page.parts, page.buffer))
                filled.append(page)

        def landed(indexes):
            for i in indexes:
                filled[i].parts |= gaps[i].parts
                filled[i].digests = part_digests(filled[i].buffer, run.part_bytes)

        if gaps:
            self.loads.append([(gap.ordinal, gap.parts) for gap in gaps])
            await load(gaps, landed)
        found = [self.pages.get((run.key, ordinal)) for ordinal in ordinals]
        assert all(page is None or page.parts & want == want for page, want in zip(found, parts, strict=True))
        outcomes = [Outcome.FULL if page is None else Outcome.HIT for page in found]
        return self._lease(found, outcomes)

    async def delete(self, names):
        return [Outcome.HIT if self.pages.pop(tuple(name), None) else Outcome.GONE for name in names]

    def _lease(self, found, outcomes):
        self.leases += 1
        self.pinned += len(found)
        self.pinned_most = max(self.pinned_most, self.pinned)

        def end(safely):
            self.pinned -= len(found)

        return Lease(outcomes, range(len(found)), Extents(found), end)


class Extents:
    def __init__(self, pages):
        self.pages = pages

    def buffers(self, locations):
        return [self.pages[location].buffer for location in locations]

    def payloads(self, locations):
        pages = [self.pages[location] for location in locations]
        return [Payload(page.name, len(page.buffer), PART, page.parts, page.digests) for page in pages]

    def copy_out(self, locations, targets, spans=None, *, verify=True):
        outcomes = []
        for i, page in enumerate(self.pages[location] for location in locations):
            span = range(len(page.buffer)) if spans is None else spans[i]
            fine = copy_range_verified(page.buffer, targets[i], span, PART, page.digests)
            outcomes.append(Outcome.HIT if fine or not verify else Outcome.CORRUPT)
        return outcomes


class CountingOrigin(DictOrigin):
    """Writes down what it is asked, in order."""

    def __init__(self):
        super().__init__()
        self.asked = []
        self.under_way = self.under_way_most = 0
        self.fault = None

    async def stat(self, paths):
        self.asked.append(("stat", *paths))
        return await super().stat(paths)

    async def read_tail(self, path, length):
        self.asked.append(("tail", path, length))
        return await super().read_tail(path, length)

    async def read(self, stat, span, targets):
        self.asked.append((span.start, span.start + span.length))
        self.under_way += 1
        self.under_way_most = max(self.under_way, self.under_way_most)
        try:
            await asyncio.sleep(0)
            if self.fault is not None:
                raise self.fault
            await super().read(stat, span, targets)
        finally:
            self.under_way -= 1

    @property
    def bytes(self):
        return sum(each[1] - each[0] for each in self.asked if isinstance(each[0], int))


DATA = random.Random(7).randbytes(10 * PAGE + 12_345)


def world(data=DATA, cache=None, **settings):
    origin = CountingOrigin()
    origin.set("f", data)
    plain = {"tail_bytes": 0, "merge_gap_bytes": 0, "readahead_bytes": 256 * KIB, "queue_bytes": 0} | settings
    chosen = Settings("/nowhere", 4 << 20, 0, page_bytes=PAGE, **plain)
    cache = cache or DictCache()
    return (
        origin,
        cache,
        PageReader(cache, origin, settings=chosen, clock=SystemClock(), metrics=Metrics(), part_bytes=PART),
    )


def test_reads_are_right_and_only_missing_parts_are_asked_for():
    async def main():
        origin, _, reader = world()
        pin = await reader.open("f")
        assert await reader.read(pin, 5000, 6000) == DATA[5000:6000]
        assert origin.asked[1:] == [(4096, 8192)]
        assert await reader.read(pin, 4096, 3 * PAGE) == DATA[4096 : 3 * PAGE]
        assert origin.asked[2:] == [(8192, 3 * PAGE)]  # across pages, one request
        assert await reader.read(pin, 0, 1 << 30) == DATA
        assert origin.asked[3:] == [(0, 4096), (3 * PAGE, len(DATA))]
        assert origin.bytes == len(DATA)
        assert await reader.read(pin, len(DATA), 1 << 30) == b""
        assert reader.read_resident(pin, 17, 200_000) == DATA[17:200_000]
        assert len(origin.asked) == 5

    asyncio.run(main())


@pytest.mark.parametrize("size", [0, 1, PART, PAGE, 2 * PAGE, 2 * PAGE + 1])
def test_sizes_at_the_edges_of_pages_and_parts(size):
    async def main():
        data = DATA[:size]
        for tail_bytes in (0, PAGE):
            origin, _, reader = world(data, tail_bytes=tail_bytes)
            pin = await reader.open("f")
            assert await reader.read(pin, 0, size + 10) == data
            assert await reader.read(pin, max(0, size - 3), size) == data[-3:]
            assert origin.bytes + (tail_bytes and min(size, tail_bytes + PART)) <= size + PART

    asyncio.run(main())


def test_of_many_processes_one_brings_the_tail_for_all():
    async def main(loop):
        origin, cache, reader = world(tail_bytes=100_000)
        clock = SimClock(loop)
        table = NotesTable(clock)
        readers = [
            PageReader(
                cache,
                origin,
                settings=reader.settings,
                clock=clock,
                metrics=Metrics(),
                part_bytes=PART,
                notes=table.client(),
            )
            for _ in range(4)
        ]
        pins = await asyncio.gather(*[each.open("f") for each in readers])
        assert len({pin.version for pin in pins}) == 1
        for each, pin in zip(readers, pins, strict=True):
            assert each.read_resident(pin, len(DATA) - 100_000, len(DATA)) == DATA[-100_000:]
        assert [asked[0] for asked in origin.asked] == ["tail"]
        await asyncio.sleep(11)  # the facts have expired
        await asyncio.gather(*[each.open("f") for each in readers])
        assert [asked[0] for asked in origin.asked] == ["tail", "stat"]
        origin.set("f", b"new")
        await readers[2].facts.forget_shared(["f"])
        await asyncio.sleep(0.001)
        pins = await asyncio.gather(*[each.open("f") for each in readers])
        assert [each.read_resident(pin, 0, 3) for each, pin in zip(readers, pins, strict=True)] == [b"new"] * 4
        assert [asked[0] for asked in origin.asked] == ["tail", "stat", "tail"]
        for each in readers:
            await each.close()
        await table.close()

    for seed in range(5):
        simulate(main, seed)


def test_a_process_that_comes_late_does_not_bring_the_tail_again():
    async def main(loop):
        origin, cache, reader = world(tail_bytes=100_000)
        clock, how = SimClock(loop), {"settings": reader.settings, "metrics": Metrics(), "part_bytes": PART}
        table = NotesTable(clock)
        one, two, three = (PageReader(cache, origin, clock=clock, notes=table.client(), **how) for _ in range(3))
        await one.open("f")
        await asyncio.sleep(11)  # the facts have expired, the bytes are there
        pin = await two.open("f")
        assert [asked[0] for asked in origin.asked] == ["tail", "stat"]
        assert two.read_resident(pin, len(DATA) - 100_000, len(DATA)) == DATA[-100_000:]
        origin.set("f", b"new")
        await one.facts.forget_shared(["f"])
        await asyncio.sleep(0.001)
        pin = await three.open("f")
        assert [asked[0] for asked in origin.asked] == ["tail", "stat", "tail"]
        assert three.read_resident(pin, 0, 3) == b"new"
        for each in (one, two, three):
            await each.close()
        await table.close()

    for seed in range(5):
        simulate(main, seed)


def test_the_first_look_brings_the_tail_and_whole_small_files():
    async def main():
        origin, _, reader = world(tail_bytes=100_000)
        pin = await reader.open("f")
        assert reader.read_resident(pin, len(DATA) - 100_000, len(DATA)) == DATA[-100_000:]
        assert origin.asked == [("tail", "f", 100_000 + PART)]
        origin.set("small", DATA[:50_000])
        small = await reader.open("small")
        assert await reader.read(small, 0, 50_000) == DATA[:50_000]
        assert origin.asked[1:] == [("tail", "small", 100_000 + PART)]
        assert await reader.open("none") is Outcome.GONE

    asyncio.run(main())


def test_a_file_that_was_met_before_is_asked_for_facts_alone():
    async def main():
        origin, _, reader = world(tail_bytes=100_000, stat_ttl_s=0.0)
        await reader.open("f")
        await reader.open("f")
        assert [each[0] for each in origin.asked] == ["tail", "tail"]
        origin, _, reader = world(tail_bytes=100_000, stat_ttl_s=1e-9)
        await reader.open("f")
        await reader.open("f")
        assert [each[0] for each in origin.asked] == ["tail", "stat"]

    asyncio.run(main())


def test_many_spans_are_one_plan():
    async def main():
        origin, cache, reader = world(merge_gap_bytes=PART)
        pin = await reader.open("f")
        spans = [(0, 30_000), (32_768, 65_536), (3 * PAGE, 3 * PAGE + 10), (3 * PAGE + 5, 3 * PAGE + 20), (9, 9)]
        values = [new_bytes(stop - start) for start, stop in spans]
        await reader.read_into(pin, spans, [target for _, target in values])
        assert [value for value, _ in values] == [DATA[start:stop] for start, stop in spans]
        assert origin.asked[1:] == [(0, 65_536), (3 * PAGE, 3 * PAGE + PART)]
        assert len(cache.loads) == 1

    asyncio.run(main())


def test_no_version_is_read_around_the_cache():
    class Nameless(CountingOrigin):
        def set(self, path, data):
            stat = super().set(path, data)
            fresh = type(stat)(path, stat.size, "", SystemClock().wall())
            self._objects[path] = (fresh, bytes(data))
            return fresh

    async def main():
        origin, cache = Nameless(), DictCache()
        origin.set("f", DATA)
        few = {"request_bytes_max": PAGE, "queue_bytes": 0, "merge_gap_bytes": 0, "tail_bytes": 0}
        chosen = Settings("/nowhere", 4 << 20, 0, page_bytes=PAGE, **few)
        reader = PageReader(cache, origin, settings=chosen, clock=SystemClock(), metrics=Metrics(), part_bytes=PART)
        pin = await reader.open("f")
        assert pin.version == ""
        assert await reader.read(pin, 10, 3 * PAGE) == DATA[10 : 3 * PAGE]
        assert reader.read_resident(pin, 10, 20) is None
        assert cache.pages == {}
        assert origin.asked[1:] == plan_around(10, 3 * PAGE, PAGE)

    asyncio.run(main())


def test_what_finds_no_room_is_read_around_the_cache():
    async def main():
        cache = DictCache(full={1, 2, 4})
        origin, _, reader = world(cache=cache)
        pin = await reader.open("f")
        assert await reader.read(pin, 100, 6 * PAGE) == DATA[100 : 6 * PAGE]
        around = [
            span for span in origin.asked[1:] if span not in ((0, PAGE), (3 * PAGE, 4 * PAGE), (5 * PAGE, 6 * PAGE))
        ]
        assert around == [(PAGE, 3 * PAGE), (4 * PAGE, 5 * PAGE)]
        assert cache.pinned == 0

    asyncio.run(main())


def test_a_pin_that_outlives_its_reader_is_read_in_the_pages_of_the_next():
    async def main():
        origin, _, first = world()
        pin = await first.open("f")
        assert await first.read(pin, 0, 1000) == DATA[:1000]
        cache = DictCache()
        other = Settings("/nowhere", 4 << 20, 0, page_bytes=4 * PAGE, queue_bytes=0, tail_bytes=0, readahead_bytes=0)
        again = PageReader(cache, origin, settings=other, clock=SystemClock(), metrics=Metrics(), part_bytes=PART)
        target = bytearray(5000)
        for reader in (again, first, again):
            for start in (0, PAGE + 100, 5 * PAGE - 17):
                assert await reader.read(pin, start, start + 5000) == DATA[start : start + 5000]
                assert reader.read_resident(pin, start, start + 5000) == DATA[start : start + 5000]
                assert reader.read_resident_into(pin, start, start + 5000, Buffer.of(target, writable=True))
                assert target == DATA[start : start + 5000]
        assert first.run_of(pin).key != again.run_of(pin).key
        assert {key for key, _ in cache.pages} == {again.run_of(pin).key}
        origin.identity = "another reader's rights"
        stranger = PageReader(cache, origin, settings=other, clock=SystemClock(), metrics=Metrics(), part_bytes=PART)
        assert not stranger.is_resident(pin, 0, 1000)

    asyncio.run(main())


def test_damaged_pages_are_dropped_and_read_anew():
    async def main():
        origin, cache, reader = world()
        pin = await reader.open("f")
        await reader.read(pin, 0, 2 * PAGE)
        page = cache.pages[reader.run_of(pin).key, 1]
        page.buffer.view()[100] ^= 1
        assert reader.read_resident(pin, 0, 2 * PAGE) is None
        assert await reader.read(pin, 0, 2 * PAGE) == DATA[: 2 * PAGE]
        assert (reader.run_of(pin).key, 1) not in cache.pages
        assert (reader.run_of(pin).key, 0) in cache.pages
        assert await reader.read(pin, 0, 2 * PAGE) == DATA[: 2 * PAGE]
        assert origin.asked[1:] == [(0, 2 * PAGE), (PAGE, 2 * PAGE), (PAGE, 2 * PAGE)]
        assert cache.pinned == 0

    asyncio.run(main())


def test_long_reads_pin_little_at_a_time():
    async def main():
        data = random.Random(1).randbytes(64 * PAGE)
        origin, cache, reader = world(data, request_bytes_max=4 * PAGE)
        pin = await reader.open("f")
        assert await reader.read(pin, 0, len(data)) == data
        assert cache.pinned_most == (4 << 20) // 4 // PAGE
        assert origin.under_way_most == 4

    asyncio.run(main())


def test_an_overwritten_file_is_the_pinned_version_or_a_clear_error():
    async def main():
        origin, _, reader = world()
        pin = await reader.open("f")
        assert await reader.read(pin, 0, PAGE) == DATA[:PAGE]
        origin.set("f", DATA[::-1])
        assert await reader.read(pin, 0, PAGE) == DATA[:PAGE]  # the pages that are here
        with pytest.raises(ChangedError, match=r"f changed at its origin while version .* open it again"):
            await reader.read(pin, 0, 2 * PAGE)
        again = await reader.open("f")
        assert again.version != pin.version
        assert await reader.read(again, 0, 2 * PAGE) == DATA[::-1][: 2 * PAGE]
        assert await reader.read(pin, 5, 10) == DATA[5:10]

    asyncio.run(main())


@pytest.mark.parametrize("fault", [UnavailableError("gone fishing"), OriginError("forbidden")])
def test_faults_come_through_and_nothing_is_kept(fault):
    async def main():
        origin, cache, reader = world(request_bytes_max=PAGE)
        pin = await reader.open("f")
        origin.fault = fault
        with pytest.raises(type(fault)):
            await reader.read(pin, 0, 5 * PAGE)
        assert all(page.parts == 0 for page in cache.pages.values())
        origin.fault = None
        assert await reader.read(pin, 0, 5 * PAGE) == DATA[: 5 * PAGE]
        assert origin.under_way == 0

    asyncio.run(main())


def test_a_tail_that_the_cache_refuses_leaves_the_facts():
    class Refusing(DictCache):
        async def read_pages(self, run, ordinals, parts, load):
            raise UnavailableError("no")

    async def main():
        _, _, reader = world(tail_bytes=PAGE, cache=Refusing())
        assert (await reader.open("f")).stat.size == len(DATA)

    asyncio.run(main())


def test_whether_to_fetch_ahead_is_asked_of_nobody_else():
    """A cache whose leases may have to wait for another process says what it sees by itself."""

    class Asking(DictCache):
        seen = False

        def sees(self, key, ordinals, parts):
            return self.seen

        def lease_resident(self, key, ordinals, parts):
            raise AssertionError("a reader would wait for this")

    async def main():
        cache = Asking()
        _, _, reader = world(cache=cache)
        pin = await reader.open("f")
        assert not reader.is_resident(pin, 0, PAGE)
        cache.seen = True
        assert reader.is_resident(pin, 0, PAGE)

    asyncio.run(main())


def test_prefetch_is_in_the_background_bounded_and_silent():
    async def main():
        origin, _, reader = world()
        pin = await reader.open("f")
        reader.prefetch(pin, 0, 3 * PAGE)
        assert not reader.is_resident(pin, 0, 3 * PAGE)
        for _ in range(6):
            await asyncio.sleep(0)
        assert reader.is_resident(pin, 0, 3 * PAGE)
        origin.fault = UnavailableError("no")
        for _ in range(100):
            reader.prefetch(pin, 3 * PAGE, 4 * PAGE)
        assert len(reader._prefetches) <= 16
        await reader.close()
        assert not reader._prefetches

    asyncio.run(main())


def test_blocking_reads_copy_in_the_callers_thread():
    origin, _, reader = world()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    hops = []

    def wait(work):
        hops.append(work.__qualname__)
        return asyncio.run_coroutine_threadsafe(work, loop).result(10)

    try:
        pin = wait(reader.open("f"))
        assert reader.read_blocking(pin, 10, 2 * PAGE, wait) == DATA[10 : 2 * PAGE]
        assert reader.read_blocking(pin, 10, 2 * PAGE, wait) == DATA[10 : 2 * PAGE]
        assert reader.read_blocking(pin, 10, 10, wait) == b""
        value, target = new_bytes(100)
        assert reader.read_resident_into(pin, 50, 150, target)
        assert value == DATA[50:150]
        assert len(hops) == 2
        assert len(origin.asked) == 2
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
