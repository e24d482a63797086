"""The whole cache refines a dictionary that may forget: a state machine drives it and compares every answer.

Values of a name change only after a delete, since entries are immutable. All of it runs in one simulated loop, one call
at a time; what the cache does in the background interleaves by seed while a rule waits.
"""

from __future__ import annotations

import asyncio
import logging

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tiercache.buffers import Buffer
from tiercache.errors import ChangedError, OriginError, TierCacheError, UnavailableError
from tiercache.keys import object_key
from tiercache.model import Name, Outcome
from tiercache.testing.lab import RATES
from tiercache.testing.model import made_bytes
from tiercache.testing.simloop import SimLoop, derive
from tiercache.testing.world import KIB, MIB, PAGE_BYTES, PART_BYTES, PLACES, Chains, World

LABELS = st.integers(0, 9)
BATCH = st.lists(LABELS, min_size=1, max_size=4)
SIZES = [0, 1, 5000, PART_BYTES, 20_000, 60_000]
FILE_BYTES = 4 * PAGE_BYTES - 4321
PAGES = st.lists(
    st.tuples(st.integers(0, 3), st.integers(1, 15)), min_size=1, max_size=3, unique_by=lambda page: page[0]
)


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Injected faults are warned of by the thousand."""
    caplog.set_level(logging.CRITICAL)


def name_of(label: object) -> Name:
    return Name(object_key("model", str(label)))


class CacheMachine(RuleBasedStateMachine):
    """`held` are (lease, items, views, copies)."""

    held = Bundle("held")

    @initialize(
        seed=st.integers(0, 1 << 20),
        memory=st.sampled_from([128, 512]),
        ssd=st.sampled_from([0, 9, 12]),
        slots=st.sampled_from([30, 1024]),
    )
    def begin(self, seed: int, memory: int, ssd: int, slots: int) -> None:
        self.loop = SimLoop(seed)
        self.world = World(self.loop, memory_bytes=memory * KIB, ssd_bytes=ssd * MIB, slots_max=slots, rates=RATES)
        self.model = self.world.model
        self.generations = dict.fromkeys(range(10), 0)
        self.versions = [0, 0]
        self.stats = [self.world.publish(f"file{i}", 0, FILE_BYTES) for i in range(2)]
        self.chains = [Chains(seed, chains=3, blocks=8, width=width) for width in (16, 32)]
        self.gone_blocks: set[bytes] = set()
        self.faulty = False
        self.fillers = 0
        self.run(self.world.open())

    def run(self, work):
        return self.loop.run_until_complete(work)

    @property
    def cache(self):
        return self.world.cache

    def value(self, label: int) -> bytes:
        return made_bytes((label, self.generations[label]), derive(label).choice(SIZES))

    def now_s(self) -> float:
        return self.world.clock.wall()

    # -- writing ---------------------------------------------------------------------------------------------------

    @rule(labels=BATCH, durable=st.booleans(), ttl_s=st.sampled_from([None, None, None, 3.0, 60.0]))
    def put(self, labels, durable, ttl_s):
        durable = durable and self.world.ssd is not None
        expiry_s = self.cache.expiry(ttl_s)
        for label in labels:
            self.model.put(label, self.value(label), expiry_s=expiry_s, now_s=self.now_s())
        work = self.cache.put(
            [name_of(label) for label in labels], [self.value(label) for label in labels], ttl_s=ttl_s, durable=durable
        )
        try:
            outcomes = self.run(work)
        except UnavailableError:
            assert self.faulty
            return
        assert set(outcomes) <= {Outcome.HIT, Outcome.FULL, Outcome.BUSY}

    @rule(labels=BATCH)
    def delete(self, labels):
        self.run(self.cache.delete([name_of(label) for label in labels]))
        for label in set(labels):
            self.model.delete(label)
            self.generations[label] += 1
        self.look(list(set(labels)))

    @rule(count=st.integers(1, 12))
    def pressure(self, count):
        names = [name_of(f"filler{self.fillers + i}") for i in range(count)]
        values = [made_bytes(name.key, 30_000) for name in names]
        self.fillers += count
        outcomes = self.run(self.cache.put(names, values))
        assert set(outcomes) <= {Outcome.HIT, Outcome.FULL}

    @rule()
    def flush(self):
        try:
            self.run(self.cache.flush())
        except TierCacheError:
            assert self.faulty
        else:
            if not self.faulty:
                self.model.flushed()

    # -- reading ---------------------------------------------------------------------------------------------------

    @rule(labels=BATCH)
    def get(self, labels):
        self.look(labels)

    def look(self, labels) -> None:
        now_s = self.now_s()
        targets = [bytearray(b"\xee" * 60_000) for _ in labels]
        buffers = [Buffer.of(target, writable=True) for target in targets]
        outcomes = self.run(self.cache.get_into([name_of(label) for label in labels], buffers))
        for label, outcome, target in zip(labels, outcomes, targets):
            size = len(self.value(label))
            self.model.check(label, bytes(target[:size]) if outcome is Outcome.HIT else None, now_s=now_s)

    @rule(labels=BATCH)
    def get_resident(self, labels):
        targets = [bytearray(60_000) for _ in labels]
        outcomes = self.cache.get_into_resident(
            [name_of(label) for label in labels], [Buffer.of(target, writable=True) for target in targets]
        )
        for label, outcome, target in zip(labels, outcomes, targets):
            size = len(self.value(label))
            self.model.check(label, bytes(target[:size]) if outcome is Outcome.HIT else None, now_s=self.now_s())

    @rule(target=held, labels=BATCH)
    def lease(self, labels):
        now_s = self.now_s()
        lease = self.run(self.cache.lease([name_of(label) for label in labels]))
        numbers = []
        for i, (label, outcome) in enumerate(zip(labels, lease.outcomes)):
            if outcome is Outcome.HIT:
                view = lease.view(i)
                self.model.check(label, bytes(view), now_s=now_s)
                numbers.append(self.model.hold(label, view))
        self.world.leases.append(lease)
        return [lease, numbers]

    @rule(item=held)
    def release_lease_and_keep_views(self, item):
        item[0].release()

    @rule(item=consumes(held))
    def release(self, item):
        lease, numbers = item
        for number in numbers:
            if number in self.model.held:
                self.model.let_go(number)
        lease.release()

    # -- pages -----------------------------------------------------------------------------------------------------

    @rule(file=st.integers(0, 1), pages=PAGES, hold=st.booleans())
    def read_pages(self, file, pages, hold):
        run = self.world.page_run(self.stats[file])
        ordinals = [ordinal for ordinal, _ in pages]
        maps = [parts & self.world.whole_page(run, ordinal) or 1 for ordinal, parts in pages]
        try:
            lease = self.run(self.cache.read_pages(run, ordinals, maps, self.world.loader(self.stats[file], run)))
        except (UnavailableError, OriginError, ChangedError):
            assert self.faulty
            return
        label = (f"file{file}", self.versions[file])
        for i, ordinal in enumerate(ordinals):
            if lease.outcomes[i] is Outcome.HIT:
                self.world.check_page(lease, i, label, run, ordinal, maps[i])
            else:
                assert self.faulty or lease.outcomes[i] is Outcome.FULL, lease.outcomes[i]
        if hold:
            self.world.leases.append(lease)
        else:
            lease.release()
        resident = self.cache.lease_resident(run.key, ordinals, maps)
        if resident is not None:
            with resident:
                for i, ordinal in enumerate(ordinals):
                    self.world.check_page(resident, i, label, run, ordinal, maps[i])

    @rule(file=st.integers(0, 1), delete=st.booleans())
    def new_version(self, file, delete):
        old = self.world.page_run(self.stats[file])
        self.versions[file] += 1
        self.stats[file] = self.world.publish(f"file{file}", self.versions[file], FILE_BYTES)
        if delete:
            self.run(self.cache.delete([Name(old.key, ordinal) for ordinal in range(4)]))

    # -- chains ----------------------------------------------------------------------------------------------------

    @rule(wide=st.integers(0, 1), number=st.integers(0, 2), start=st.integers(0, 7), count=st.integers(1, 8))
    def put_chain(self, wide, number, start, count):
        chains = self.chains[wide]
        digests = chains.digests[number][start : start + count]
        parent = chains.digests[number][start - 1] if start else b""
        values = [chains.value(digest) for digest in digests]
        self.gone_blocks.difference_update(digests)
        outcomes = self.run(self.cache.put_chain(digests, values, parent=parent))
        assert set(outcomes) <= {Outcome.HIT, Outcome.FULL, Outcome.BUSY}

    @rule(wide=st.integers(0, 1), number=st.integers(0, 2), count=st.integers(1, 8), resident=st.booleans())
    def match(self, wide, number, count, resident):
        chains = self.chains[wide]
        digests = chains.digests[number][:count]
        with self.cache.match_resident(digests) if resident else self.run(self.cache.match(digests)) as lease:
            chains.check(lease, digests)
            assert not self.gone_blocks & set(digests[: len(lease)])

    @rule(wide=st.integers(0, 1), number=st.integers(0, 2), block=st.integers(0, 7))
    def delete_block(self, wide, number, block):
        digest = self.chains[wide].digests[number][block]
        self.run(self.cache.delete([Name(digest)]))
        self.gone_blocks.add(digest)

    @precondition(lambda self: not self.faulty and not self.world.leases)
    @rule(wide=st.integers(0, 1))
    def a_chain_that_fits_is_matched(self, wide):
        self.fillers += 1
        chains = Chains(f"live{self.fillers}", chains=1, blocks=3, width=[16, 32][wide])
        digests = chains.digests[0]
        self.run(asyncio.sleep(1))
        outcomes = self.run(self.cache.put_chain(digests, [chains.value(digest) for digest in digests]))
        assert outcomes == [Outcome.HIT] * 3
        with self.run(self.cache.match(digests)) as lease:
            assert len(lease) == 3
            chains.check(lease, digests)

    # -- the world -------------------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.01, 1.0, 5.0, 100.0]))
    def advance(self, seconds):
        self.run(asyncio.sleep(seconds))

    @rule(where=st.sampled_from(PLACES))
    def faults_on(self, where):
        self.world.faults_on(where)
        self.faulty = True

    @precondition(lambda self: self.faulty)
    @rule()
    def faults_off(self):
        self.world.faults_off()
        # A tier that was degraded comes back by itself, after its probes.
        self.run(asyncio.sleep(120))
        self.faulty = False

    @precondition(lambda self: self.world.disk is not None)
    @rule()
    def power_cut(self):
        self.world.faults_off()
        self.faulty = False
        self.run(self.world.power_cut())
        self.gone_blocks.clear()
        self.run(self.world.open())

    @precondition(lambda self: self.world.ssd is not None and not self.faulty)
    @rule()
    def close_and_open(self):
        self.run(self.world.close())
        self.model.flushed()
        self.run(self.world.open())

    @precondition(lambda self: not self.faulty and not self.world.leases)
    @rule(size=st.sampled_from(SIZES))
    def a_put_that_fits_hits(self, size):
        self.fillers += 1
        name, value = name_of(f"live{self.fillers}"), made_bytes(self.fillers, size)
        # What is on its way to the SSD cannot be evicted: a put that meets only such entries is refused for that long.
        self.run(asyncio.sleep(1))
        assert self.run(self.cache.put([name], [value])) == [Outcome.HIT]
        target = bytearray(size)
        assert self.run(self.cache.get_into([name], [Buffer.of(target, writable=True)])) == [Outcome.HIT]
        assert target == value

    @invariant()
    def sound(self):
        if getattr(self, "world", None) is not None and self.world.cache is not None:
            self.world.check()

    def teardown(self):
        if not hasattr(self, "world"):
            return
        try:
            self.world.faults_off()
            self.world.drop_leases()
            self.run(asyncio.sleep(300))
            self.run(self.world.check_quiet())
            self.run(self.world.close())
            assert not self.loop.errors, self.loop.errors
        finally:
            self.loop.close()


def drive(examples: int, steps: int) -> None:
    run_state_machine_as_test(
        CacheMachine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )


@pytest.mark.slow
def test_the_cache_refines_a_dictionary_that_may_forget() -> None:
    drive(150, 40)


@pytest.mark.nightly
def test_the_cache_refines_it_for_long() -> None:
    drive(3000, 80)
