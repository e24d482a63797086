"""Versions, what is remembered of them, read-ahead."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from tiercache.metrics import Metrics
from tiercache.model import Outcome
from tiercache.origin import Stat
from tiercache.pages.facts import FileFacts, ancestors
from tiercache.pages.readahead import ReadAhead
from tiercache.pages.versions import Pin, Remembered, version_of
from tiercache.testing.model import DictOrigin


class HandClock:
    """Time that moves by hand."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    def wall(self):
        return self.now


class Patience:
    stat_ttl_s, negative_ttl_s, mtime_settle_s = 10.0, 2.0, 10.0


class AskedOrigin(DictOrigin):
    """Counts questions, and holds them while `gate` is closed."""

    def __init__(self):
        super().__init__()
        self.asked = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def stat(self, paths):
        self.asked.append(list(paths))
        answer = await super().stat(paths)
        await self.gate.wait()
        return answer

    async def list(self, path):
        self.asked.append(path)
        answer = await super().list(path)
        await self.gate.wait()
        return answer


def facts_over(origin):
    clock = HandClock()
    return FileFacts(origin, patience=Patience(), clock=clock, metrics=Metrics()), clock


def test_versions():
    assert version_of(Stat("p", 5, "etag", 999.0), 1000.0, 10.0) == "v5:etag"
    assert version_of(Stat("p", 5, "", 990.0), 1000.0, 10.0) == "m5:990.0"
    assert version_of(Stat("p", 5, "", 990.5), 1000.0, 10.0) == ""  # it may change again within its resolution
    assert version_of(Stat("p", 5, "", 1990.0), 1000.0, 10.0) == ""  # a clock that is ahead proves nothing
    assert version_of(Stat("p", 5), 1000.0, 10.0) == ""
    # A weak ETag promises the same meaning, not the same bytes.
    assert version_of(Stat("p", 5, 'W/"etag', 990.0), 1000.0, 10.0) == "m5:990.0"
    assert version_of(Stat("p", 5, 'W/"etag'), 1000.0, 10.0) == ""


def test_remembered_values_expire_are_bounded_and_forgotten():
    clock = HandClock()
    remembered = Remembered(clock, 3)
    remembered.put_many([(str(i), i) for i in range(5)], 10.0, remembered.epoch)
    assert [remembered.get(str(i)) for i in range(5)] == [None, None, 2, 3, 4]
    clock.now += 10
    assert remembered.get("4") is None
    assert remembered.last("4") == 4
    remembered.put_many([("a", 1), ("a/b", 2), ("ab", 3)], 10.0, remembered.epoch)
    remembered.forget_below("a")
    assert [remembered.get(path) for path in ("a", "a/b", "ab")] == [None, None, 3]


def test_an_answer_that_was_asked_before_a_write_is_not_remembered():
    remembered = Remembered(HandClock(), 3)
    epoch = remembered.epoch
    remembered.forget(["other"])
    remembered.put("path", 1, 10.0, epoch)
    assert remembered.get("path") is None


def test_ancestors():
    assert ancestors("a/b/c") == ["a", "a/b", ""]
    assert ancestors("/a/b") == ["", "/a", ""]


def test_stats_are_asked_once_and_believed_for_a_while():
    async def main():
        origin = AskedOrigin()
        origin.set("a/x", b"12345")
        facts, clock = facts_over(origin)
        first = await facts.stat(["a/x", "none", "a/x"])
        assert first[0].stat.size == 5
        assert first[1] is Outcome.GONE
        assert first[2] is first[0]
        assert await facts.stat(["a/x", "none"]) == first[:2]
        assert origin.asked == [["a/x", "none"]]
        clock.now += 3
        await facts.stat(["a/x", "none"])
        assert origin.asked[1:] == [["none"]]
        clock.now += 10
        await facts.stat(["a/x"])
        assert origin.asked[2:] == [["a/x"]]

    asyncio.run(main())


def test_a_hundred_readers_ask_once():
    async def main():
        origin = AskedOrigin()
        origin.set("a", b"1")
        origin.gate.clear()
        facts, _ = facts_over(origin)
        readers = [asyncio.create_task(facts.stat(["a"])) for _ in range(100)]
        impatient = asyncio.create_task(facts.stat(["a"]))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        impatient.cancel()
        origin.gate.set()
        assert {pin.version for (pin,) in await asyncio.gather(*readers)} == {"v1:v1"}
        assert origin.asked == [["a"]]

    asyncio.run(main())


def test_a_write_parts_those_who_asked_before_from_those_who_ask_after():
    async def main():
        origin = AskedOrigin()
        origin.set("a", b"old")
        origin.gate.clear()
        facts, _ = facts_over(origin)
        before = asyncio.create_task(facts.stat(["a"]))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        origin.set("a", b"newer")
        facts.forget(["a"])
        after = asyncio.create_task(facts.stat(["a"]))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        origin.gate.set()
        assert (await before)[0].stat.size == 3
        assert (await after)[0].stat.size == 5
        assert (await facts.stat(["a"]))[0].stat.size == 5

    asyncio.run(main())


def test_a_listing_brings_the_facts_of_its_files():
    async def main():
        origin = AskedOrigin()
        origin.set("d/x", b"1")
        origin.set("d/e/y", b"1")
        facts, _ = facts_over(origin)
        children = await facts.children("d")
        assert [(pin.stat.path, pin.stat.is_directory) for pin in children] == [("d/e", True), ("d/x", False)]
        assert (await facts.stat(["d/x"]))[0] is children[1]
        assert await facts.children("d") is children
        assert await facts.children("nowhere") is Outcome.GONE
        assert origin.asked == ["d", "nowhere"]
        await facts.children("d", refresh=True)
        assert origin.asked == ["d", "nowhere", "d"]
        facts.forget(["d/e/new"])
        await facts.children("d")
        assert origin.asked[3:] == ["d"]
        facts.forget([""], below=True)
        assert facts.known("d/x") is None

    asyncio.run(main())


def test_the_origins_fault_reaches_everybody_and_is_not_remembered():
    class Failing(DictOrigin):
        faults = 1

        async def stat(self, paths):
            if self.faults:
                self.faults -= 1
                raise OSError("no route")
            return await super().stat(paths)

    async def main():
        origin = Failing()
        origin.set("a", b"1")
        facts, _ = facts_over(origin)
        got = await asyncio.gather(*[facts.stat(["a"]) for _ in range(3)], return_exceptions=True)
        assert all(isinstance(each, OSError) for each in got)
        assert isinstance((await facts.stat(["a"]))[0], Pin)

    asyncio.run(main())


# -- read-ahead --------------------------------------------------------------------------------------------------------


def test_read_ahead_starts_late_doubles_and_is_bounded():
    ahead = ReadAhead(1000)
    size = 100_000
    assert ahead.observe(0, 100, size) is None
    assert ahead.observe(100, 200, size) is None
    assert ahead.observe(200, 300, size) == (300, 600)  # as much again as was read in a row
    assert ahead.observe(300, 400, size) is None  # more than half a window is still ahead
    assert ahead.observe(400, 500, size) == (600, 1000)
    asked = [ahead.observe(start, start + 100, size) for start in range(500, 9000, 100)]
    spans = [span for span in asked if span]
    assert all(one[1] == two[0] for one, two in itertools.pairwise(spans))
    assert max(stop - start for start, stop in spans) <= 1000


def test_read_ahead_ends_with_the_file_and_with_the_sequence():
    ahead = ReadAhead(1000)
    for start in range(0, 300, 100):
        span = ahead.observe(start, start + 100, 350)
    assert span == (300, 350)
    assert ahead.observe(300, 350, 350) is None
    ahead = ReadAhead(1000)
    for start in (0, 100, 500, 600, 50, 150):
        assert ahead.observe(start, start + 100, 100_000) is None


@pytest.mark.parametrize("step", [1 << 10, 1 << 18, 1 << 22])
def test_read_ahead_never_asks_twice_and_stays_near(step):
    window, size = 8 << 20, 64 << 20
    ahead = ReadAhead(window)
    goal = 0
    for start in range(0, size, step):
        span = ahead.observe(start, start + step, size)
        if span:
            assert span[0] >= goal
            assert span[1] <= min(size, start + step + window)
            goal = span[1]


def test_no_read_ahead_when_it_is_off():
    ahead = ReadAhead(0)
    assert not any(ahead.observe(start, start + 10, 1000) for start in range(0, 1000, 10))
