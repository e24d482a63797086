"""Versions, what is remembered of them, read-ahead."""

from __future__ import annotations

import asyncio
import itertools
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiercache.clock import SystemClock
from tiercache.metrics import Metrics
from tiercache.model import Outcome
from tiercache.origin import Stat
from tiercache.pages.facts import FileFacts, ancestors
from tiercache.pages.readahead import ReadAhead
from tiercache.pages.sharing import LISTING, NOTE_BYTES_MAX, Sharing, packed, unpacked
from tiercache.pages.versions import Pin, Remembered, version_of
from tiercache.testing.model import DictOrigin
from tiercache.testing.notes import NotesTable
from tiercache.testing.simloop import SimClock, derive, simulate


class HandClock:
    """Time that moves by hand."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    def wall(self):
        return self.now


class Patience:
    stat_ttl_s, negative_ttl_s, mtime_settle_s, origin_deadline_s, owner_deadline_s = 10.0, 2.0, 10.0, 60.0, 10.0


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


# -- facts that processes share ----------------------------------------------------------------------------------------


class SlowOrigin(AskedOrigin):
    """Answers after `takes_s`, with what was there when it was asked; fails the first `faults` times."""

    identity = "slow+one"

    def __init__(self, takes_s=1.0):
        super().__init__()
        self.takes_s, self.faults = takes_s, 0

    async def _slowly(self, answer):
        await asyncio.sleep(self.takes_s)
        if self.faults:
            self.faults -= 1
            raise OSError("no route")
        return answer

    async def stat(self, paths):
        return await self._slowly(await super().stat(paths))

    async def list(self, path):
        return await self._slowly(await super().list(path))


class Processes:
    """Facts of one origin as processes of one directory have them, on a simulated loop."""

    def __init__(self, loop, count=3, origin=SlowOrigin, patience=Patience):
        self.clock = SimClock(loop)
        self.origin = origin()
        self.table = NotesTable(self.clock)
        self.notes = [self.table.client() for _ in range(count)]
        self.facts = [self.process(notes, patience) for notes in self.notes]

    def process(self, notes, patience=Patience, origin=None):
        return FileFacts(origin or self.origin, patience=patience(), clock=self.clock, metrics=Metrics(), notes=notes)

    async def close(self):
        for facts in self.facts:
            await facts.close()
        await self.table.close()


def among_processes(scene, **how):
    async def main(loop):
        processes = Processes(loop, **how)
        try:
            await scene(processes)
        finally:
            await processes.close()

    for seed in range(5):
        simulate(main, seed)


def test_processes_ask_once_and_believe_no_longer_in_sum():
    async def scene(all_):
        all_.origin.set("a", b"12345")
        one, two, three = all_.facts
        found = await asyncio.gather(*[facts.stat(["a", "none", "a"]) for facts in (one, two)])
        assert [pin.stat.size for pin, _, _ in found] == [5, 5]
        assert [gone for _, gone, _ in found] == [Outcome.GONE] * 2
        assert sorted(all_.origin.asked) == [["a"], ["none"]]
        await asyncio.sleep(2.1)
        assert (two.known("a").version, two.known("none")) == ("v5:v1", None)
        await asyncio.sleep(6)
        assert (await three.stat(["a"]))[0].stat.size == 5
        assert len(all_.origin.asked) == 2
        assert three.known("a")
        await asyncio.sleep(1.95)  # 10.05 s after the answer, and 1.95 s after the third heard of it
        assert [facts.known("a") for facts in all_.facts] == [None] * 3
        await asyncio.gather(*[facts.stat(["a"]) for facts in (two, three)])
        assert len(all_.origin.asked) == 3

    among_processes(scene)


def test_a_listing_is_shared_with_the_facts_of_its_files():
    async def scene(all_):
        all_.origin.set("d/x", b"1")
        all_.origin.set("d/e/y", b"1")
        one, two, three = all_.facts
        found = await asyncio.gather(*[facts.children("d") for facts in (one, two)])
        for children in found:
            assert [(pin.stat.path, pin.stat.is_directory) for pin in children] == [("d/e", True), ("d/x", False)]
        assert (await two.stat(["d/x"]))[0] is found[1][1]
        assert await asyncio.gather(*[facts.children("none") for facts in (one, two)]) == [Outcome.GONE] * 2
        assert all_.origin.asked == ["d", "none"]
        await three.children("d", refresh=True)
        assert all_.origin.asked == ["d", "none", "d"]
        await three.forget_shared(["d/e/new"])
        assert one.known_listing("d") is None
        await asyncio.gather(*[facts.children("d") for facts in all_.facts])
        assert all_.origin.asked == ["d", "none", "d", "d"]

    among_processes(scene)


def test_a_listing_of_one_process_brings_the_facts_of_its_files_to_the_others():
    async def scene(all_):
        for name in ("d/x", "d/y", "e/x"):
            all_.origin.set(name, b"1")
        one, two, three = all_.facts
        listed = await one.children("d")
        await asyncio.sleep(5)
        pins = await two.stat(["d/x", "d/y"])
        assert [pin.stat for pin in pins] == [pin.stat for pin in listed]
        assert [pin.stat for pin in await two.children("d")] == [pin.stat for pin in listed]
        assert all_.origin.asked == ["d"]
        assert (await two.stat(["d/none"]))[0] is Outcome.GONE  # what a listing does not say is asked for
        assert all_.origin.asked == ["d", ["d/none"]]
        await asyncio.sleep(4)  # 10 s after the listing began, and 4 s after the second heard of it
        assert two.known("d/x") is None
        await three.stat(["d/x"])
        assert all_.origin.asked[2:] == [["d/x"]]
        await one.children("d")
        all_.origin.set("d/x", b"new")
        await one.forget_shared(["d/x"])
        assert (await two.stat(["d/x"]))[0].stat.size == 3

    among_processes(scene)


def test_a_fault_is_its_finders_own_and_a_dead_finder_is_followed():
    async def scene(all_):
        all_.origin.set("a", b"1")
        all_.origin.faults = 1
        first = asyncio.create_task(all_.facts[0].stat(["a"]))
        await asyncio.sleep(0.5)
        rest = [asyncio.create_task(facts.stat(["a"])) for facts in all_.facts[1:]]
        with pytest.raises(OSError, match="no route"):
            await first
        assert all(isinstance(pin, Pin) for (pin,) in await asyncio.gather(*rest))
        assert len(all_.origin.asked) == 2
        asked = [asyncio.create_task(all_.facts[0].stat(["b"]))]
        await asyncio.sleep(0.5)
        asked += [asyncio.create_task(facts.stat(["b"])) for facts in all_.facts[1:]]
        await asyncio.sleep(0.4)
        all_.table.die(all_.notes[0])
        assert (await asyncio.gather(*asked))[1:] == [[Outcome.GONE]] * 2
        assert len(all_.origin.asked) == 4

    among_processes(scene)


def test_a_write_is_known_to_every_process_when_it_ends():
    async def scene(all_):
        all_.origin.set("d/a", b"old")
        writer, *readers = all_.facts
        await asyncio.gather(*[facts.stat(["d/a", "d/b", "e"]) for facts in all_.facts])
        await asyncio.gather(*[facts.children("d") for facts in all_.facts])
        asked = [asyncio.create_task(facts.stat(["d/b"])) for facts in readers]
        all_.origin.set("d/a", b"newer")
        await writer.forget_shared(["d/a"], below=True)
        await asyncio.sleep(0.001)
        for facts in all_.facts:
            assert (facts.known("d/a"), facts.known_listing("d")) == (None, None)
            assert facts.known("e") is Outcome.GONE
        assert [pin.stat.size for (pin,) in await asyncio.gather(*[f.stat(["d/a"]) for f in all_.facts])] == [5] * 3
        await asyncio.gather(*asked)
        await writer.forget_shared([""], below=True)
        await asyncio.sleep(0.001)
        assert [facts.known("e") for facts in all_.facts] == [None] * 3

    among_processes(scene)


def test_what_one_process_forgets_at_once_does_not_come_back_from_the_owner():
    async def scene(all_):
        all_.origin.set("a", b"old")
        one, two, _ = all_.facts
        beside = all_.process(all_.notes[0])  # another target of the same process
        all_.facts.append(beside)
        await asyncio.gather(*[facts.stat(["a"]) for facts in (one, two, beside)])
        all_.origin.set("a", b"newer")
        one.forget(["a"])
        assert (one.known("a"), beside.known("a")) == (None, None)
        found = await asyncio.gather(*[facts.stat(["a"]) for facts in (one, beside)])
        assert [pin.stat.size for (pin,) in found] == [5, 5]
        assert len(all_.origin.asked) == 2

    among_processes(scene)


def test_readers_with_other_rights_are_told_nothing():
    async def scene(all_):
        all_.origin.set("a", b"1")
        stranger = SlowOrigin()
        stranger.identity = "slow+two"
        all_.facts[1] = all_.process(all_.notes[1], origin=stranger)
        assert isinstance((await all_.facts[0].stat(["a"]))[0], Pin)
        assert await all_.facts[1].stat(["a"]) == [Outcome.GONE]
        await all_.facts[1].forget_shared(["a"])
        assert isinstance(all_.facts[0].known("a"), Pin)

    among_processes(scene)


def test_a_modification_time_is_judged_by_when_it_was_looked_at():
    class Dated(SlowOrigin):
        async def stat(self, paths):
            await super().stat(paths)
            return [Stat(path, 1, "", 1_700_000_000.0) for path in paths]

    async def scene(all_):
        await asyncio.sleep(5)
        assert (await all_.facts[0].stat(["a"]))[0].version == ""
        await asyncio.sleep(8)
        assert (await all_.facts[1].stat(["a"]))[0].version == ""  # old by now, and it may have changed since
        await asyncio.sleep(2)
        assert (await all_.facts[1].stat(["a"]))[0].version == "m1:1700000000.0"
        assert len(all_.origin.asked) == 2

    among_processes(scene, origin=Dated)


def test_a_process_that_hangs_is_gone_around():
    async def scene(all_):
        all_.origin.set("a", b"1")
        assert await all_.notes[0].claim(b"".join([all_.facts[0]._sharing._space, b"s", b"a", b"\0"])) is None
        started_s = all_.clock.monotonic()
        for _ in range(2):
            found = await asyncio.gather(*[facts.stat(["a"]) for facts in all_.facts[1:]])
            assert all(isinstance(pin, Pin) for (pin,) in found)
            await asyncio.sleep(11)
        # The first time they wait, later they go on at once: the owner has not answered yet.
        assert all_.clock.monotonic() - started_s < 60 + 2 * 12 + 1

    among_processes(scene)


def test_nobody_shares_what_nobody_believes():
    class Doubting(Patience):
        stat_ttl_s = 0.0

    async def scene(all_):
        all_.origin.set("a", b"1")
        await asyncio.gather(*[facts.stat(["a"]) for facts in all_.facts])
        assert len(all_.origin.asked) == 3
        assert (len(all_.table.notes), all_.table.notes.claims) == (0, 0)

    among_processes(scene, patience=Doubting)


def test_an_answer_that_is_too_long_is_asked_for_by_each_at_the_same_time():
    async def scene(all_):
        for i in range(50):
            all_.origin.set(f"d/{i}{'x' * (NOTE_BYTES_MAX // 50)}", b"")
        started_s = all_.clock.monotonic()
        found = await asyncio.gather(*[facts.children("d") for facts in all_.facts])
        assert [len(children) for children in found] == [50] * 3
        assert all_.clock.monotonic() - started_s < 3.5

    async def main(loop):
        processes = Processes(loop)
        await scene(processes)
        await processes.close()

    simulate(main, 1)


@pytest.mark.parametrize(
    "answer",
    [
        Outcome.GONE,
        [],
        Stat("a/\udc80 \0ä", 1 << 60, '"v', 1700000000.1234567),
        [Stat("d", 0, is_directory=True), Stat("f", 3)],
    ],
)
def test_notes_say_what_was_found_exactly(answer):
    assert unpacked(packed(answer, 1.1, 2.2, 3.3)) == (answer, 1.1, 2.2, 3.3)


@given(st.integers(0, 1 << 32))
def test_no_schedule_shows_a_process_what_was_there_before_a_write(seed):
    async def main(loop):
        origin = SlowOrigin()
        all_ = Processes(loop, 4, lambda: origin)
        paths = ["d/a", "d/b", "d/sub/c"]
        written = dict.fromkeys(paths, 0)
        for path in paths:
            origin.set(path, b"")

        async def life(number):
            rng = derive(seed, number)
            facts = all_.facts[number]
            for _ in range(15):
                await asyncio.sleep(rng.random() * 2)
                origin.takes_s = rng.random()
                origin.faults = rng.random() < 0.1
                path, choice = rng.choice(paths), rng.random()
                before = dict(written)
                try:
                    if choice < 0.25:
                        size = len(origin.data(path)) + 1
                        origin.set(path, bytes(size))
                        await facts.forget_shared([path], below=rng.random() < 0.5)
                        await asyncio.sleep(0.0001)  # until the others have read what they were told
                        written[path] = max(written[path], size)
                    elif choice < 0.75:
                        (pin,) = await facts.stat([path])
                        assert pin.stat.size >= before[path]
                    else:
                        for pin in await facts.children("d"):
                            assert pin.stat.is_directory or pin.stat.size >= before[pin.stat.path]
                except OSError:
                    pass

        await asyncio.gather(*[life(number) for number in range(3)])
        await all_.close()
        assert all_.table.notes.claims == 0

    simulate(main, seed)


class Watched(list):
    """A listing that knows which threads have looked at its rows, and how many were taken."""

    def __init__(self, rows):
        super().__init__(rows)
        self.threads, self.taken = set(), 0

    def __getitem__(self, which):
        self.threads.add(threading.get_ident())
        found = super().__getitem__(which)
        self.taken += len(found)
        return found

    def __iter__(self):
        raise AssertionError("all of it at once")


def test_a_listing_that_is_too_long_is_found_so_before_it_is_text():
    one = Stat("lake/part", 1, "v", 1.0)
    many = Watched([one] * 300_000)
    assert packed(many, 1.0, 2.0, 3.0) == b"" and not many.taken
    long = Watched([Stat("x" * 1000, 1, "v", 1.0)] * 100_000)
    assert packed(long, 1.0, 2.0, 3.0) == b"" and long.taken < 5000


def test_a_long_listing_is_made_a_note_and_read_from_one_beside_the_loop():
    rows = [Stat(f"lake/d/{i:06d}", i, f"v{i}", float(i)) for i in range(2000)]

    async def main():
        table = NotesTable(SystemClock(), bytes_max=1 << 23)
        one, two = (Sharing(table.client(), "origin", SystemClock(), wait_s=10.0) for _ in range(2))
        listing = Watched(rows)

        async def ask():
            return listing

        found = await one.find(LISTING, "lake/d", ask, lambda _: 60.0, lambda: 0)
        assert found.answer is listing and listing.taken == len(rows)
        assert threading.get_ident() not in listing.threads
        assert (await two.find(LISTING, "lake/d", fail, lambda _: 60.0, lambda: 0)).answer == rows
        assert (await two.listed("lake/d", lambda _: 60.0, lambda: 0)).answer == rows
        await table.close()

    async def fail():
        raise AssertionError("it is known")

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
