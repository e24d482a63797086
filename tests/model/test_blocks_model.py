"""Joint blocks under everything at once: claims, commits, lies, ends, evictions, the SSD, power cuts.

A part may be forgotten (unless it was acknowledged as durable), but what is served was committed, and is what was
committed. Extents are full of rubbish until then, so a part that is shown too early has the wrong bytes.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tiercache.buffers import Buffer, copy_parts, part_digests
from tiercache.keys import chain, namespace, object_key
from tiercache.model import Kind, Name, Outcome, Terms
from tiercache.testing.model import made_bytes
from tiercache.testing.simloop import SimLoop
from tiercache.testing.world import KIB, MIB, World

PART, PARTS, BLOCKS = 4096, 6, 6
SIZE = PART * PARTS - 1000
ALL = (1 << PARTS) - 1
MAPS = st.sampled_from([ALL, 1, 2, 4, 0b11, 0b111000]) | st.integers(1, ALL)
SPANS = st.tuples(st.sampled_from([0, 0, 0, 1, 2, 3]), st.integers(1, BLOCKS))
PIECE = PART // 4
PICKS = st.lists(st.tuples(st.integers(0, PARTS - 1), st.integers(0, 3)), max_size=3, unique=True)


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)


class BlocksMachine(RuleBasedStateMachine):
    """`tickets` are (ticket, first block, still living)."""

    @initialize(seed=st.integers(0, 1 << 20), memory=st.sampled_from([160, 1024]), ssd=st.sampled_from([0, 48]))
    def begin(self, seed: int, memory: int, ssd: int) -> None:
        self.loop = SimLoop(seed)
        self.world = World(self.loop, memory_bytes=memory * KIB, ssd_bytes=ssd * MIB)
        self.names = chain(namespace("blocks"), [f"{seed}/{i}".encode() for i in range(BLOCKS)])
        self.values = [made_bytes(name, SIZE) for name in self.names]
        self.committed = [0] * BLOCKS
        self.deleted = [0] * BLOCKS
        self.durable = [0] * BLOCKS
        self.tickets: list[tuple[Any, int]] = []
        self.landed: dict[int, list[int]] = {}
        self.fillers = 0
        self.run(self.world.open())

    def run(self, work: Any) -> Any:
        return self.loop.run_until_complete(work)

    def call(self, what: Any, *given: Any, **more: Any) -> Any:
        async def act() -> Any:
            return what(*given, **more)

        return self.run(act())

    # -- writers ---------------------------------------------------------------------------------------------------

    @rule(span=SPANS, claim=MAPS, picks=PICKS)
    def join(self, span, claim, picks):
        first, count = span
        claim &= ~sum({1 << part for part, _ in picks})
        pieces = [(part * PART + at * PIECE, part * PART + (at + 1) * PIECE) for part, at in picks]
        pieces = [(start, min(stop, SIZE)) for start, stop in pieces if start < SIZE]
        if not claim and not pieces:
            return
        names = self.names[first : first + count]
        ticket = self.call(
            self.world.cache.join_blocks, names, SIZE, PART, claim, pieces, Terms(Kind.KV),
            parent=self.names[first - 1] if first else b"",
        )  # fmt: skip
        self.tickets.append((ticket, first))
        for i, outcome in enumerate(ticket.outcomes):
            assert outcome in (Outcome.HIT, Outcome.BUSY, Outcome.FULL)
            assert ticket.present[i] & ~self.committed[first + i] == 0
            assert ticket.claims[i] & ~claim == 0
            assert not ticket.claims[i] & ticket.present[i]
            for start, stop in ticket.pieces[i]:
                self.scribble(ticket, i, start, stop)
            for part in range(PARTS):
                if ticket.claims[i] >> part & 1:
                    self.scribble(ticket, i, part * PART, min(SIZE, (part + 1) * PART))
        self.check_claims()

    @rule(count=st.integers(1, BLOCKS), claim=MAPS, end=st.booleans())
    def fill(self, count, claim, end):
        before = len(self.tickets)
        self.join((0, count), claim, [])
        assert len(self.tickets) == before + 1
        self.land(before, ALL, 1, False)
        if end:
            self.end(before)

    def scribble(self, ticket: Any, item: int, start: int, stop: int) -> None:
        self.write(ticket, item, start, b"\xee" * (stop - start))

    @staticmethod
    def write(ticket: Any, item: int, start: int, data: bytes) -> None:
        copy_parts(Buffer.of(data), ticket.buffers(item).slice(start, len(data)), len(data), 1)

    def check_claims(self) -> None:
        """No two living tickets may write the same byte."""
        for block in range(BLOCKS):
            taken: dict[int, set[int]] = {}
            for ticket, first in self.tickets:
                item = block - first
                if not 0 <= item < len(ticket.outcomes) or not (ticket.claims[item] or ticket.pieces[item]):
                    continue
                mine = taken.setdefault(ticket.locations[item], set())
                spans = [(part * PART, (part + 1) * PART) for part in range(PARTS) if ticket.claims[item] >> part & 1]
                for start, stop in (*spans, *ticket.pieces[item]):
                    quarters = set(range(start // PIECE, -(-stop // PIECE)))
                    assert not quarters & mine
                    mine |= quarters

    @precondition(lambda self: self.tickets)
    @rule(which=st.integers(0, 9), parts=MAPS, lie=st.sampled_from([1, 1, 1, 0]), halves=st.booleans())
    def land(self, which, parts, lie, halves):
        ticket, first = self.tickets[which % len(self.tickets)]
        rows, truths = [], []
        for item in range(len(ticket.outcomes)):
            mine = ticket.claims[item] & parts
            if not mine:
                continue
            source = Buffer.of(self.values[first + item])
            copy_parts(source, ticket.buffers(item), PART, mine)
            rows.append((item, mine, part_digests(source, PART, mine)))
            if lie == 0:
                at = (mine.bit_length() - 1) * PART
                self.write(ticket, item, at, bytes([self.values[first + item][at] ^ 1]))
            truths.append((first + item, mine))
        outcomes = self.run(_done(ticket, rows)) if halves else self.call(ticket.commit, rows)
        for (block, mine), outcome in zip(truths, outcomes, strict=True):
            assert outcome in ((Outcome.CORRUPT,) if lie == 0 else (Outcome.HIT, Outcome.MISS))
            if outcome is Outcome.HIT:
                self.committed[block] |= mine
                self.landed.setdefault(id(ticket), [0] * BLOCKS)[block] |= mine

    @precondition(lambda self: self.tickets)
    @rule(which=st.integers(0, 9), lie=st.sampled_from([1, 1, 1, 0]))
    def land_pieces(self, which, lie):
        import xxhash

        ticket, first = self.tickets[which % len(self.tickets)]
        for item in range(len(ticket.outcomes)):
            for start, stop in list(ticket.pieces[item]):
                data = self.values[first + item][start:stop]
                self.write(ticket, item, start, data if lie else b"\xdd" * len(data))
                outcome = self.call(ticket.commit, [], [(item, start, stop, xxhash.xxh3_64_intdigest(data))])[0]
                assert outcome in ((Outcome.HIT, Outcome.MISS) if lie else (Outcome.CORRUPT,))
                if outcome is Outcome.HIT:  # shown when its part is covered, which the reader finds out
                    self.committed[first + item] |= 1 << start // PART

    @precondition(lambda self: self.tickets)
    @rule(which=st.integers(0, 9))
    def end(self, which):
        ticket, _ = self.tickets.pop(which % len(self.tickets))
        self.landed.pop(id(ticket), None)
        self.call(ticket.end)

    @precondition(lambda self: self.tickets and self.world.ssd is not None)
    @rule(which=st.integers(0, 9))
    def save(self, which):
        ticket, first = self.tickets[which % len(self.tickets)]
        mine = self.landed.get(id(ticket), [0] * BLOCKS)
        for item, outcome in enumerate(self.run(ticket.saved())):
            if outcome is Outcome.HIT:
                self.durable[first + item] |= mine[first + item]

    # -- readers ---------------------------------------------------------------------------------------------------

    @rule(span=SPANS, parts=MAPS)
    def lease(self, span, parts):
        first, count = span
        names = self.names[first : first + count]
        seen = self.call(self.world.cache.probe_chain, self.names, parts)
        with self.run(self.world.cache.lease_blocks(names, parts)) as lease:
            for i, outcome in enumerate(lease.outcomes):
                assert outcome in (Outcome.HIT, Outcome.MISS, Outcome.FULL, Outcome.BUSY)
                if outcome is Outcome.HIT:
                    self.check_parts(lease, i, first + i, parts)
        for block, tier in enumerate(seen):
            assert tier in (1, 2)
            assert parts & ~self.committed[block] == 0

    @rule(span=SPANS, parts=MAPS)
    def lease_resident(self, span, parts):
        first, count = span
        lease = self.call(self.world.cache.lease_blocks_resident, self.names[first : first + count], parts)
        if lease is not None:
            for i in range(len(lease)):
                self.check_parts(lease, i, first + i, parts)
            lease.release()

    def check_parts(self, lease: Any, item: int, block: int, parts: int) -> None:
        assert parts & ~self.committed[block] == 0, "a part is served that nobody committed"
        for part in range(PARTS):
            if parts >> part & 1:
                start, stop = part * PART, min(SIZE, (part + 1) * PART)
                target = bytearray(stop - start)
                outcome = lease.copy_into(item, start, stop, Buffer.of(target, writable=True))
                assert outcome is Outcome.HIT
                assert bytes(target) == self.values[block][start:stop]

    @rule()
    def match_whole(self):
        with self.run(self.world.cache.match(self.names)) as lease:
            for i in range(len(lease)):
                assert bytes(lease.view(i)) == self.values[i]

    @rule(block=st.integers(0, BLOCKS - 1), parts=MAPS)
    def compare(self, block, parts):
        ticket = self.call(self.world.cache.join_blocks, self.names[block : block + 1], SIZE, PART, 0)
        right = part_digests(Buffer.of(self.values[block]), PART)
        assert self.call(ticket.compare, [(0, parts, right)]) == [0]
        wrong = self.call(ticket.compare, [(0, parts, bytes(8 * PARTS))])[0]
        assert wrong & ~(parts & self.committed[block]) == 0
        self.call(ticket.end)

    # -- the rest --------------------------------------------------------------------------------------------------

    @rule(count=st.integers(1, 8))
    def pressure(self, count):
        names = [Name(object_key("model", f"filler{self.fillers + i}")) for i in range(count)]
        self.fillers += count
        outcomes = self.run(self.world.cache.put(names, [made_bytes(name.key, 30_000) for name in names]))
        assert set(outcomes) <= {Outcome.HIT, Outcome.FULL}

    @rule()
    def flush(self):
        self.run(self.world.cache.flush())

    @rule(count=st.integers(1, BLOCKS))
    def touch(self, count):
        self.call(self.world.cache.touch_chain, self.names[:count])

    @rule(block=st.integers(0, BLOCKS - 1))
    def delete(self, block):
        """With whoever still fills it: what they bring goes with the name that they knew."""
        for which in reversed(range(len(self.tickets))):
            self.end(which)
        self.run(self.world.cache.delete([Name(self.names[block])]))
        self.run(self.world.cache.flush())
        for at in range(block, BLOCKS):  # what hung below may be removed when the block comes back
            self.durable[at] = 0
        self.deleted[block] |= self.committed[block]
        self.committed[block] = 0

    @precondition(lambda self: self.world.ssd is not None)
    @rule(cut=st.booleans())
    def restart(self, cut):
        if cut:
            self.tickets.clear()
            self.landed.clear()
            self.run(self.world.power_cut())
        else:
            for _ in range(len(self.tickets)):
                self.end(0)
            self.run(self.world.close())
        self.run(self.world.open())
        # The record of a block goes when the last block that hangs below it has gone: until then it may come back.
        self.committed = [now | before for now, before in zip(self.committed, self.deleted, strict=True)]
        self.run(self.world.cache.call("status", {}))  # while rows are still read, a miss is no loss
        for block, parts in enumerate(self.durable):
            if parts:
                with self.run(self.world.cache.lease_blocks(self.names[block : block + 1], parts)) as lease:
                    assert lease.outcomes == [Outcome.HIT], "acknowledged, and lost"
                    self.check_parts(lease, 0, block, parts)

    @invariant()
    def holds(self):
        if hasattr(self, "world") and self.world.cache is not None:
            self.world.check()

    def teardown(self):
        if not hasattr(self, "world"):
            return
        while self.tickets:
            self.end(0)
        self.run(asyncio.sleep(300))
        self.run(self.world.check_quiet())
        self.run(self.world.close())
        self.loop.close()


async def _done(ticket: Any, rows: Any) -> list[Outcome]:
    """Twice at once what commit does, in halves: the second goes on where the first has ended."""
    half = len(rows) // 2
    return [*ticket.commit(rows[:half]), *ticket.commit(rows[half:])]


@pytest.mark.slow
def test_blocks_refine_a_dictionary_of_parts() -> None:
    run_state_machine_as_test(
        BlocksMachine,
        settings=settings(
            max_examples=80, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
