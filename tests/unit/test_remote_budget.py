"""The budget: pure decisions about shares, and writers that race, stall, die and doubt, one step after another."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiercache.errors import UnavailableError
from tiercache.metrics import Metrics
from tiercache.remote.asking import Asking
from tiercache.remote.budget import (
    FOLDER,
    GRACE_S,
    KEPT,
    LEASE_S,
    PUT_S,
    RESERVED_BYTES,
    Budget,
    Holding,
    Ledger,
    decode,
    encode,
    grow,
)
from tiercache.testing.buckets import MemoryBucket
from tiercache.testing.simloop import SimClock, derive, simulate

if TYPE_CHECKING:
    from collections.abc import Callable

    from tiercache.testing.simloop import SimLoop

LIMIT = 1000
WRITERS = "abcd"

holdings = st.lists(
    st.builds(
        Holding,
        st.sampled_from(WRITERS),
        st.integers(0, LIMIT // 4),
        serial=st.integers(1, 9),
        wants=st.booleans(),
        closed=st.booleans(),
        of=st.sampled_from([(), ("x",), ("y", "z")]),
    ),
    max_size=4,
    unique_by=lambda one: one.writer,
)


@given(holdings, st.integers(0, 2 * LIMIT), st.integers(0, LIMIT), st.sets(st.sampled_from(WRITERS[1:])))
def test_no_growth_goes_over_the_cap_or_takes_from_the_living(some, need: int, step: int, over: set[str]) -> None:
    ledger = Ledger(7, tuple(some))
    mine = ledger.of("a") or Holding("a", 0)
    mine = replace(mine, closed=False)
    ledger = ledger.with_(mine)
    after = grow(ledger, mine, need, limit_bytes=LIMIT, step_bytes=step, over=over)
    if after is None:
        return
    assert after.number == ledger.number + 1
    assert after.given_bytes <= max(LIMIT, ledger.given_bytes)
    now = after.of("a")
    assert now is not None and now.serial == mine.serial + 1 and now.bytes >= mine.bytes
    gone = {one.writer for one in ledger.holdings} - {one.writer for one in after.holdings}
    for writer in gone:
        left = ledger.of(writer)
        assert left is not None and (left.closed or writer in over)
        assert {writer, *left.of} <= set(now.of)
    for one in after.holdings:
        if one.writer != "a":
            assert one == ledger.of(one.writer)
    assert decode(after.number, encode(after)) == after


def test_a_ledger_that_is_none_stops_writers() -> None:
    for data in (b"", b"{}", b'[{"writer": 1}]', b'[{"x": 1}]', b"\xff"):
        with pytest.raises(UnavailableError, match="no ledger"):
            decode(3, data)


class Writer:
    """One budget over a bucket, with a step before each request at which others may act."""

    def __init__(self, loop: SimLoop, bucket: MemoryBucket, name: str, limit_bytes: int = LIMIT) -> None:
        self.clock = SimClock(loop)
        self.bucket = bucket
        self.hooks: dict[str, list[Callable[[], None]]] = {}
        metrics, random = Metrics(), derive(loop.seed, name)
        self.asking = Asking(self, clock=self.clock, metrics=metrics, deadline_s=5.0)
        limit = limit_bytes + RESERVED_BYTES
        self.budget = Budget(self.asking, limit, clock=self.clock, random=random, step_bytes=100)
        self.place = name

    def at(self, operation: str, hook: Callable[[], None]) -> None:
        """Runs a hook before the next request of a kind: what it raises, the request does."""
        self.hooks.setdefault(operation, []).append(hook)

    def _step(self, operation: str) -> None:
        if self.hooks.get(operation):
            self.hooks[operation].pop(0)()

    def put(self, key: str, data: bytes | bytearray, *, create: bool = False) -> bool:
        self._step("put")
        made = self.bucket.put(key, data, create=create)
        self._step("after put")
        return made

    def get(self, key: str, start: int = 0, length: int | None = None) -> memoryview | None:
        self._step("get")
        return self.bucket.get(key, start, length)

    def list(self, prefix: str):
        self._step("list")
        return self.bucket.list(prefix)

    def delete(self, keys) -> None:
        self.bucket.delete(keys)


def newest(bucket: MemoryBucket) -> Ledger:
    key = max(key for key in bucket.objects if key.startswith(FOLDER))
    return decode(int(key[len(FOLDER) :]), bucket.objects[key])


def run(main) -> None:
    simulate(main, seed=1)


def fail() -> None:
    raise UnavailableError("no answer")


def test_two_who_race_share_the_cap() -> None:
    async def main(loop: SimLoop) -> None:
        bucket = MemoryBucket()
        writers = [Writer(loop, bucket, name) for name in "abcdef"]
        for _ in range(10):
            await asyncio.gather(*[one.budget.grow(150) for one in writers])
            assert newest(bucket).given_bytes <= LIMIT
            assert sum(one.budget.share_bytes for one in writers) <= LIMIT
        assert {one.budget.share_bytes for one in writers} >= {150}
        assert len(bucket.objects) <= KEPT + 1

    run(main)


def test_a_number_that_is_created_anew_counts_for_nobody() -> None:
    """A writer sleeps between its look and its change, until the number that it wants is free again."""

    async def main(loop: SimLoop) -> None:
        bucket = MemoryBucket()
        one, two = Writer(loop, bucket, "one"), Writer(loop, bucket, "two")
        await one.budget.grow(100)

        def meanwhile() -> None:
            ledger = newest(bucket)
            for _ in range(KEPT + 3):  # others changed it many times, and cleaned up
                ledger = ledger.with_(Holding("other", LIMIT - 200, ledger.number))
                bucket.put(f"{FOLDER}{ledger.number:012d}", encode(ledger), create=True)
            bucket.delete([key for key in list(bucket.objects) if key < f"{FOLDER}{ledger.number - 1:012d}"])

        two.at("put", meanwhile)
        await two.budget.grow(500)
        assert two.budget.share_bytes == 0 and newest(bucket).given_bytes <= LIMIT
        assert newest(bucket).of("other")

    run(main)


def test_an_answer_that_was_lost_is_found_out() -> None:
    async def main(loop: SimLoop) -> None:
        bucket = MemoryBucket()
        one = Writer(loop, bucket, "one")
        one.at("after put", fail)
        with pytest.raises(UnavailableError):
            await one.budget.grow(100)
        assert one.budget.share_bytes == 0 and newest(bucket).given_bytes == 100
        await asyncio.sleep(10)
        await one.budget.grow(100)
        await one.budget.renew()
        assert one.budget.allotted_bytes == 100
        await one.budget.grow(300)
        assert one.budget.share_bytes == 300 == newest(bucket).given_bytes

    run(main)


def test_a_smaller_share_counts_from_before_it_is_written() -> None:
    """What would leave less may have happened, or happen yet: nothing is written beyond it."""

    async def main(loop: SimLoop) -> None:
        bucket = MemoryBucket()
        one, two = Writer(loop, bucket, "one"), Writer(loop, bucket, "two")
        await one.budget.grow(LIMIT)
        await two.budget.grow(400)
        assert newest(bucket).of(two.budget.writer) == Holding(two.budget.writer, 0, 1, wants=True)
        await asyncio.sleep(LEASE_S / 2)
        one.at("put", fail)
        with pytest.raises(UnavailableError):
            await one.budget.renew()
            await one.budget.renew()
        assert one.budget.excess_bytes == LIMIT // 2
        one.at("put", fail)
        await asyncio.sleep(10)
        with pytest.raises(UnavailableError):
            await one.budget.renew()
        assert one.budget.share_bytes == LIMIT // 2 and newest(bucket).given_bytes == LIMIT
        await asyncio.sleep(10)
        await one.budget.renew()
        await two.budget.grow(400)
        assert (one.budget.share_bytes, two.budget.share_bytes) == (500, 400)

    run(main)


def test_nothing_begins_that_could_end_after_the_lease() -> None:
    async def main(loop: SimLoop) -> None:
        one = Writer(loop, MemoryBucket(), "one")
        await one.budget.grow(100)
        await asyncio.sleep(LEASE_S - PUT_S - 1)
        assert one.budget.share_bytes == 100
        await asyncio.sleep(2)
        assert one.budget.share_bytes == 0 and not one.budget.take("packs/x/1", 1)
        await one.budget.renew()
        assert one.budget.share_bytes == 100 and one.budget.take("packs/x/1", 100)
        assert not one.budget.take("packs/x/2", 1)
        one.budget.give("packs/x/1")
        one.budget.give("packs/x/1")
        assert one.budget.used_bytes == 0
        one.clock.wall_step_s = LEASE_S  # it slept, and its monotonic clock with it
        assert one.budget.share_bytes == 0

    run(main)


def test_the_dead_are_taken_over_when_they_are_surely_dead() -> None:
    async def main(loop: SimLoop) -> None:
        bucket = MemoryBucket()
        dead, heir = Writer(loop, bucket, "dead"), Writer(loop, bucket, "heir")
        await dead.budget.grow(LIMIT)
        assert dead.budget.take(f"packs/{dead.budget.writer}/1", 600)
        await heir.budget.grow(300)
        for _ in range(3):
            await asyncio.sleep(LEASE_S / 2)
            await dead.budget.renew()
            await heir.budget.renew()
            assert newest(bucket).of(dead.budget.writer) is not None
        held = dead.budget.allotted_bytes
        assert held == 600  # it gave back what it did not use, for the other one wants its part
        over_s = loop.time() + LEASE_S + GRACE_S
        while loop.time() < over_s - 2:
            await asyncio.sleep(LEASE_S / 3 - 1)
            await heir.budget.renew()
            if loop.time() < over_s - 1:
                await heir.budget.grow(900)
                assert not heir.budget.adopted
        await asyncio.sleep(60)
        await heir.budget.renew()
        assert await heir.budget.grow(900)
        budget = heir.budget
        assert budget.unlisted == (dead.budget.writer,) == budget.adopted
        assert budget.allotted_bytes == newest(bucket).given_bytes
        await budget.grow(400)
        assert budget.used_bytes == held  # until it is known what the dead had
        budget.listed([(f"packs/{dead.budget.writer}/1", 600)])
        assert budget.allotted_bytes == LIMIT == newest(bucket).given_bytes
        assert budget.take("packs/h/1", 400) and not budget.take("packs/h/2", 1)
        # The dead one was only asleep: it writes nothing, and begins anew.
        assert dead.budget.share_bytes == 0
        before = dead.budget.writer
        await dead.budget.renew()
        assert dead.budget.writer != before and not dead.budget.held and newest(bucket).given_bytes == LIMIT

    run(main)


def test_who_goes_in_peace_leaves_all_to_the_next() -> None:
    async def main(loop: SimLoop) -> None:
        bucket = MemoryBucket()
        one, two = Writer(loop, bucket, "one"), Writer(loop, bucket, "two")
        await one.budget.grow(LIMIT)
        assert one.budget.take(f"packs/{one.budget.writer}/1", 600)
        await one.budget.close()
        assert newest(bucket).given_bytes == 600
        assert await two.budget.grow(400) and two.budget.share_bytes == 400 and not two.budget.adopted
        assert await two.budget.grow(401) and two.budget.adopted == (one.budget.writer,)
        two.budget.listed([(f"packs/{one.budget.writer}/1", 600)])
        assert two.budget.used_bytes == 600 and two.budget.share_bytes == LIMIT
        await two.budget.renew(done=(one.budget.writer,))
        assert two.budget.adopted == ()

    run(main)
