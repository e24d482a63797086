"""Load or recompute, in virtual time: no slower than no cache within the stated errors, bounded losses outside."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiercache
from tests.kv_matrix.engine import Rank, layout_of, truth_of
from tiercache.clock import SystemClock
from tiercache.kv import recompute
from tiercache.kv.rates import MEMORY, REMOTE, SSD, Rate, Rates
from tiercache.kv.recompute import PURSE_SHARE, Advisor, Plan, Prefill
from tiercache.kv.shard import Shard
from tiercache.model import Outcome

if TYPE_CHECKING:
    from pathlib import Path

BLOCK_TOKENS = 16
BLOCK_BYTES = 1 << 20
plan_load = partial(recompute.plan_load, block_bytes=BLOCK_BYTES, block_tokens=BLOCK_TOKENS)


def learnt(fixed_s: float, token_s: float, pair_s: float, *, noise: float = 0.0, seed: int = 0) -> Prefill:
    """A curve that has seen prefills of many shapes, up to 32,000 tokens."""
    prefill, draw = Prefill(), random.Random(seed)
    for _ in range(30):
        start, count = draw.choice([0, 0, 512, 4096, 16000]), draw.choice([16, 256, 1024, 4096, 16000])
        seconds = fixed_s + token_s * count + pair_s * count * (start + count / 2)
        prefill.learn(start, count, seconds * draw.uniform(1 - noise, 1 + noise))
    return prefill


# -- the curve ---------------------------------------------------------------------------------------------------------


def test_the_curve_is_found_from_prefills() -> None:
    fixed_s, token_s, pair_s = learnt(0.01, 1e-4, 2e-9).terms
    assert (fixed_s, token_s, pair_s) == pytest.approx((0.01, 1e-4, 2e-9), rel=1e-3)


def test_a_noisy_curve_predicts_within_what_it_states() -> None:
    prefill = learnt(0.02, 1e-4, 5e-9, noise=0.1)
    for start, count in ((0, 300), (0, 8000), (2000, 8000), (16000, 100)):
        true = 0.02 + 1e-4 * count + 5e-9 * count * (start + count / 2)
        low, high = 1 / (1 + prefill.spread(start + count)), 1 + prefill.spread(start + count)
        assert prefill.seconds(start, count) * low <= true <= prefill.seconds(start, count) * high


def test_one_prefill_is_taken_as_so_much_a_token() -> None:
    prefill = Prefill()
    before = prefill.known
    prefill.learn(0, 1000, 0.5)
    assert (before, prefill.known) == (False, True)
    assert prefill.seconds(0, 2000) == pytest.approx(1.0)
    assert prefill.spread() == pytest.approx(0.5)  # the limit


def test_no_term_is_ever_negative() -> None:
    draw = random.Random(3)
    prefill = Prefill()
    for _ in range(200):
        prefill.learn(draw.randrange(10000), draw.randrange(1, 10000), draw.random())
        assert min(prefill.terms) >= 0


def test_a_machine_that_changes_is_followed() -> None:
    prefill = learnt(0.01, 1e-4, 0)
    for _ in range(30):
        prefill.learn(0, 1000, 1.1)
        prefill.learn(0, 4000, 4.1)
    assert prefill.seconds(0, 2000) == pytest.approx(2.1, rel=0.15)


# -- single plans ------------------------------------------------------------------------------------------------------


def rate(bytes_per_s: float, latency_s: float = 0.0, spread: float = 0.2) -> Rate:
    return Rate(bytes_per_s, latency_s, 0, spread)


def test_what_is_fast_is_loaded_whole_and_what_is_slow_is_computed() -> None:
    prefill = learnt(0.01, 1e-4, 0)  # 1.6 ms a block
    fast, slow = {SSD: rate(2e9)}, {SSD: rate(100e6)}
    tiers = bytes([SSD]) * 100
    assert plan_load(tiers, fast, prefill, total_tokens=2000).blocks == 100
    plan = plan_load(tiers, slow, prefill, total_tokens=2000)
    assert (plan.blocks, plan.refused, plan.probes) == (0, SSD, False)


def test_a_request_is_split_where_a_slow_tier_begins() -> None:
    prefill = learnt(0.01, 1e-4, 0)
    rates = {MEMORY: rate(5e9), SSD: rate(2e9), REMOTE: rate(50e6, 0.05)}
    tiers = bytes([MEMORY]) * 30 + bytes([SSD]) * 20 + bytes([REMOTE]) * 50
    plan = plan_load(tiers, rates, prefill, total_tokens=1600)
    assert (plan.first, plan.stop, plan.refused) == (0, 50, REMOTE)


def test_attention_makes_late_blocks_worth_more() -> None:
    """The same tier is not worth it for a short prompt and is for a long one."""
    prefill = learnt(0.001, 1e-6, 1e-8)
    rates = {REMOTE: rate(1e9, 0.02)}
    short = plan_load(bytes([REMOTE]) * 20, rates, prefill, total_tokens=330)
    long = plan_load(bytes([REMOTE]) * 1500, rates, prefill, total_tokens=24001)
    assert (short.blocks, long.blocks) == (0, 1500)


def test_a_queue_before_it_makes_a_load_wait() -> None:
    prefill = learnt(0.01, 1e-4, 0)
    tiers = bytes([SSD]) * 100
    free = plan_load(tiers, {SSD: Rate(2e9, 0, 0, 0.2)}, prefill, total_tokens=2000)
    behind = plan_load(tiers, {SSD: Rate(2e9, 0, 1 << 30, 0.2)}, prefill, total_tokens=2000)
    assert (free.blocks, behind.blocks) == (100, 0)


def test_blocks_whose_tokens_are_computed_are_not_loaded() -> None:
    prefill = learnt(0.01, 1e-4, 0)
    plan = plan_load(
        bytes([SSD]) * 100, {SSD: rate(2e9)}, prefill, total_tokens=2000, computed_tokens=40 * BLOCK_TOKENS
    )
    assert (plan.first, plan.stop) == (40, 100)
    assert plan.load_s == pytest.approx(60 * BLOCK_BYTES / 2e9)
    beyond = plan_load(
        bytes([SSD]) * 10, {SSD: rate(2e9)}, prefill, total_tokens=2000, computed_tokens=40 * BLOCK_TOKENS
    )
    assert beyond.first == beyond.stop


def test_a_prompt_that_is_stored_to_its_end_still_computes_a_token() -> None:
    prefill = learnt(0.01, 1e-4, 0)
    plan = plan_load(bytes([SSD]) * 100, {SSD: rate(2e9)}, prefill, total_tokens=1600)
    assert plan.blocks == 100
    assert plan.saved_s == pytest.approx(prefill.added(0, np.array([1599]))[0])


def test_a_tier_that_nobody_knows_ends_the_prefix() -> None:
    prefill = learnt(0.01, 1e-4, 0)
    for strange in (0, 9):
        tiers = bytes([SSD]) * 5 + bytes([strange]) + bytes([SSD]) * 5
        assert plan_load(tiers, {SSD: rate(2e9)}, prefill, total_tokens=2000).blocks == 5
    assert plan_load(b"", {SSD: rate(2e9)}, prefill, total_tokens=2000).blocks == 0


def test_before_the_first_prefill_all_of_this_host_is_loaded() -> None:
    tiers = bytes([MEMORY]) * 3 + bytes([SSD]) * 3 + bytes([REMOTE]) * 3
    plan = plan_load(tiers, Rates().look(0.0), Prefill(), total_tokens=2000)
    assert (plan.blocks, plan.refused) == (6, REMOTE)
    assert plan.deadline_s > plan.load_s > 0


def test_a_plan_for_a_long_prompt_takes_no_time_to_speak_of() -> None:
    """Eight thousand blocks are one pass of a few arrays: no loop over blocks."""
    tiers = bytes([MEMORY]) * 4000 + bytes([SSD]) * 4192
    plan = plan_load(tiers, Rates().look(0.0), learnt(0.01, 1e-3, 1e-9), total_tokens=131072)
    assert plan.blocks == 8192


def test_what_came_of_a_load_is_shared_out_among_its_tiers() -> None:
    advisor = Advisor(BLOCK_BYTES, BLOCK_TOKENS, prefill=learnt(0.01, 1e-3, 0))
    tiers = bytes([MEMORY]) * 50 + bytes([SSD]) * 50
    for i in range(40):
        plan = advisor.advise(tiers, 2000, float(i))
        assert plan.probe_stop == 100
        load = advisor.begin(plan, tiers, float(i))
        advisor.end(load, 100, i + 50 * BLOCK_BYTES * (1 / 4e9 + 1 / 1e9))
    rates = advisor.rates.look(40.0)
    whole = sum(rates[tier].seconds(50 * BLOCK_BYTES) for tier in (MEMORY, SSD))
    assert whole == pytest.approx(50 * BLOCK_BYTES * (1 / 4e9 + 1 / 1e9), rel=0.05)
    assert rates[SSD].bytes_per_s < rates[MEMORY].bytes_per_s


def test_blocks_that_were_gone_say_nothing_of_how_fast_a_tier_is() -> None:
    advisor = Advisor(BLOCK_BYTES, BLOCK_TOKENS, prefill=learnt(0.01, 1e-3, 0))
    tiers = bytes([SSD]) * 100
    before = advisor.rates.look(0.0)
    plan = advisor.advise(tiers, 2000, 0.0)
    load = advisor.begin(plan, tiers, 0.0)
    assert advisor.rates.look(0.0)[SSD].queued_bytes == 100 * BLOCK_BYTES
    advisor.end(load, 3, 1e-4)
    assert advisor.rates.look(0.0) == before


def test_loads_that_stand_in_line_are_planned_behind_one_another() -> None:
    """Ten requests at once on one SSD: the first ones load, later ones compute rather than wait."""
    advisor = Advisor(BLOCK_BYTES, BLOCK_TOKENS, prefill=learnt(0.01, 1e-4, 0))
    tiers = bytes([SSD]) * 100
    for i in range(40):
        advisor.rates.observe(SSD, 100 * BLOCK_BYTES, 100 * BLOCK_BYTES / 4e9, float(i))
    plans = []
    for _ in range(10):
        plans.append(advisor.advise(tiers, 2000, 40.0))
        if plans[-1].stop:
            advisor.begin(plans[-1], tiers, 40.0)
    assert [plan.stop for plan in plans] == sorted((plan.stop for plan in plans), reverse=True)
    assert plans[0].stop == 100
    assert plans[-1].stop == 0


# -- never slower than no cache ----------------------------------------------------------------------------------------


@dataclass
class World:
    """What is true: seconds of every token's prefill, and of every tier's transfers."""

    token_s: np.ndarray
    fixed_s: float
    tiers: dict[int, Rate]

    def prefill(self, start: int, stop: int) -> float:
        return self.fixed_s + float(self.token_s[start:stop].sum())

    def load(self, tiers: bytes, first: int, stop: int, deadline_s: float) -> tuple[int, float]:
        """Blocks of the prefix that have landed by the deadline, and when that was known: one transfer a tier."""
        now, wanted = 0.0, list(tiers[first:stop])
        came: set[int] = set()
        for tier in dict.fromkeys(wanted):
            took = self.tiers[tier].seconds(wanted.count(tier) * BLOCK_BYTES)
            if now + took > deadline_s:
                now = deadline_s
                break
            now += took
            came.add(tier)
        landed = next((i for i, tier in enumerate(wanted) if tier not in came), len(wanted))
        return first + landed, now


where = st.sampled_from([-1.0, 0.0, 1.0]) | st.floats(-1, 1)
"""In what is stated: at its least, as expected, at its most, or between."""
pace = st.tuples(
    st.sampled_from([0.75, 0.9]) | st.floats(0.1, 2), st.floats(0, 1), st.floats(0, 1), st.floats(0.0, 1.0)
)
"""Of a tier: its worst duration over what it saves, the shares of latency and queue in that, and the stated error."""


@pytest.mark.slow
@settings(max_examples=150)
@given(
    st.data(),
    st.tuples(st.floats(0, 0.5), st.floats(1e-6, 1e-2), st.floats(0, 1e-7)),
    st.fixed_dictionaries({}, optional=dict.fromkeys((MEMORY, SSD, REMOTE), pace)),
    st.lists(st.tuples(st.sampled_from([MEMORY, SSD, REMOTE]), st.integers(1, 300)), max_size=6),
)
def test_within_the_stated_errors_no_request_is_slower_than_without_a_cache(
    data: st.DataObject,
    terms: tuple[float, float, float],
    stated: dict[int, tuple[float, float, float, float]],
    runs: list[tuple[int, int]],
) -> None:
    """Whatever the rates, the curve and the prefix, and wherever inside the stated errors the truth lies."""
    tiers = b"".join(bytes([tier]) * count for tier, count in runs)
    total = len(tiers) * BLOCK_TOKENS + data.draw(st.integers(-5, 4000))
    total = max(total, 1)
    computed = data.draw(st.integers(0, total - 1))
    prefill = learnt(*terms, noise=data.draw(st.floats(0, 0.3)), seed=data.draw(st.integers(0, 9)))
    rates = {}
    for tier, (slowness, latency, queue, error) in stated.items():
        count = max(1, tiers.count(tier))
        saves = count * BLOCK_TOKENS * prefill.added(0, np.array([total]))[0] / total
        whole = slowness * saves / (1 + error) + 1e-9
        rates[tier] = Rate(
            count * BLOCK_BYTES * (1 + queue) / (whole * (1.01 - latency)),
            whole * latency,
            int(queue * count * BLOCK_BYTES),
            error,
        )
    plan = plan_load(tiers, rates, prefill, total_tokens=total, computed_tokens=computed)
    # The truth: each token's cost and each tier anywhere in what is stated of them.
    most = 1 + prefill.spread(total)
    worst = data.draw(st.booleans())
    edges = np.array([-1.0] * 8 if worst else data.draw(st.lists(where, min_size=8, max_size=8)))
    factors = most ** np.interp(np.linspace(0, 7, total), np.arange(8), edges)
    marginal = np.diff(prefill.added(0, np.arange(total + 1)))
    true = {
        tier: Rate(each.bytes_per_s / slow, each.latency_s * slow, each.queued_bytes)
        for tier, each in rates.items()
        for slow in [(1 + each.spread) ** (1.0 if worst else data.draw(where))]
    }
    world = World(marginal * factors, prefill.terms[0], true)
    without = world.prefill(computed, total)
    landed, spent = world.load(tiers, plan.first, plan.stop, plan.deadline_s * (1 + 1e-9))
    assert landed == plan.stop, "the deadline is beyond the worst of what is stated"
    start = max(computed, min(landed * BLOCK_TOKENS, total - 1)) if landed > plan.first else computed
    assert spent + world.prefill(start, total) <= without * (1 + 1e-9) + 1e-12


@dataclass
class Engine:
    """Serves requests one after another in virtual time, as a connector would: asks, loads, computes, tells."""

    tokens_s: tuple[float, float, float]
    draw: random.Random
    now: float = 0.0

    def __post_init__(self) -> None:
        prefill = learnt(*self.tokens_s, noise=0.05)
        self.advisor = Advisor(BLOCK_BYTES, BLOCK_TOKENS, prefill=prefill)

    def serve(self, tiers: bytes, total: int, true: dict[int, Rate]) -> tuple[float, float, Plan]:
        """Seconds to the first token with the cache and without, and the plan."""
        fixed_s, token_s, pair_s = self.tokens_s
        ends = np.arange(total + 1, dtype=float)
        noise = self.draw.uniform(0.95, 1.05)
        world = World(np.diff(token_s * ends + pair_s * ends**2 / 2) * noise, fixed_s, true)
        plan = self.advisor.advise(tiers, total, self.now)
        load = self.advisor.begin(plan, tiers, self.now)
        landed, spent = world.load(tiers, plan.first, plan.probe_stop, plan.give_up_s)
        self.now += spent
        self.advisor.end(load, landed, self.now)
        start = min(landed * BLOCK_TOKENS, total - 1)
        compute = world.prefill(start, total)
        self.advisor.prefill.learn(start, total - start, compute)
        self.now += compute
        return spent + compute, world.prefill(0, total), plan


def steady(engine: Engine, tiers: bytes, total: int, true: dict[int, Rate], count: int) -> list[tuple[float, float]]:
    return [engine.serve(tiers, total, true)[:2] for _ in range(count)]


@pytest.mark.slow
def test_a_tier_that_slows_down_costs_three_loads_and_comes_back_by_probes() -> None:
    engine = Engine((0.01, 2e-4, 1e-9), random.Random(5))
    tiers, total = bytes([SSD]) * 100, 2000
    fast, slow = {SSD: Rate(2e9, 1e-3)}, {SSD: Rate(10e6, 0.3)}
    before = steady(engine, tiers, total, fast, 30)
    assert all(ours < 0.6 * without for ours, without in before[5:])
    during = steady(engine, tiers, total, slow, 300)
    lost = sum(max(0.0, ours - without) for ours, without in during)
    # Three loads, early probes of half a request each, and what later ones may cost.
    assert lost <= (3 + 4 * 0.5) * during[0][1] + PURSE_SHARE * sum(without for _, without in during)
    assert sum(ours > 1.001 * without for ours, without in during[3:]) <= 20  # probes, ever rarer
    assert all(ours <= 1.6 * without for ours, without in during[3:])
    after = steady(engine, tiers, total, fast, 300)
    assert all(ours < 0.6 * without for ours, without in after[-50:])
    assert sum(max(0.0, ours - without) for ours, without in after) <= 0.05 * after[0][1]


def test_a_tier_that_hangs_is_left_alone() -> None:
    engine = Engine((0.01, 2e-4, 1e-9), random.Random(6))
    tiers, total = bytes([MEMORY]) * 50 + bytes([REMOTE]) * 200, 4096
    true = {MEMORY: Rate(8e9, 1e-4), REMOTE: Rate(1e6, 1e6)}
    served = steady(engine, tiers, total, true, 400)
    lost = sum(max(0.0, ours - without) for ours, without in served)
    assert lost <= (3 + 4 * 0.5) * served[0][1] + PURSE_SHARE * sum(without for _, without in served)
    assert sum(ours >= 0.9 * without for ours, without in served[-20:]) <= 1  # memory goes on serving, beside a probe


phases = st.lists(
    st.tuples(
        st.floats(4, 10.3).map(lambda x: 10**x),
        st.floats(-5, 1).map(lambda x: 10**x),
        st.integers(1, 40),
        st.integers(10, 200),
    ),
    min_size=1,
    max_size=6,
)


@pytest.mark.slow
@settings(max_examples=60)
@given(phases, st.floats(1e-6, 1e-3), st.floats(0, 1e-8), st.randoms(use_true_random=False))
def test_whatever_tiers_do_losses_are_bounded(
    changes: list[tuple[float, float, int, int]], token_s: float, pair_s: float, draw: random.Random
) -> None:
    """Tiers jump between any rates. A change may cost three loads of up to twice what they would save, or more of them
    that are slower by less than a surprise, and some early probes; later ones cost their share."""
    engine = Engine((0.005, token_s, pair_s), draw)
    total_ours = total_without = dearest = 0.0
    for bytes_per_s, latency_s, requests, blocks in changes:
        true = {SSD: Rate(bytes_per_s, latency_s)}
        for _ in range(requests):
            tokens = blocks * BLOCK_TOKENS + draw.randrange(1, 500)
            ours, without, plan = engine.serve(bytes([SSD]) * blocks, tokens, true)
            assert ours <= without + plan.give_up_s + 1e-9
            assert plan.deadline_s <= 2 * plan.without_s
            total_ours, total_without = total_ours + ours, total_without + without
            dearest = max(dearest, without)
    assert total_ours <= (1.01 + PURSE_SHARE) * total_without + 8 * len(changes) * dearest


@pytest.mark.slow
def test_an_engine_asks_before_it_loads(tmp_path: Path) -> None:
    """The whole way with a real store: match, advise, load what was advised, tell."""
    layout = layout_of("GQA")
    rank = Rank(layout, Shard.of(layout, 0, 1), 16, 20)
    truth, table = truth_of(layout, 160), rank.table(160)
    rank.write(truth, table)
    clock = SystemClock()
    with (
        tiercache.open(tmp_path, memory_bytes="32MiB", ssd_bytes=0) as cache,
        cache.kv(layout, rank.shard) as store,
    ):
        keys = store.keys(np.arange(160))
        assert store.save(keys, rank.planes, table, stop=8).wait(60) == [Outcome.HIT] * 8
        advisor = Advisor(layout.block_bytes, layout.block_tokens)
        advisor.prefill.learn(0, 160, 1000.0)  # so slow that any load is worth it
        found = store.match(keys)
        plan = advisor.advise(found.tiers, 160, clock.monotonic())
        assert (plan.first, plan.stop, found.length) == (0, 8, 8)
        rank.memory[...] = 0
        under_way = advisor.begin(plan, found.tiers, clock.monotonic())
        outcomes = store.load(keys[: plan.probe_stop], rank.planes, table).wait(60)  # an engine: plan.give_up_s
        landed = next((i for i, outcome in enumerate(outcomes) if outcome is not Outcome.HIT), len(outcomes))
        advisor.end(under_way, landed, clock.monotonic())
        assert landed == 8
        assert rank.wrong(truth, table, range(128)) == 0
        assert advisor.rates.look(clock.monotonic())[MEMORY].queued_bytes == 0


# -- on a noisy machine ------------------------------------------------------------------------------------------------


@dataclass
class Noisy:
    """Serves requests on a machine whose times scatter widely, single ones by a factor of three or five.

    1,024 tokens are stored of each prompt; computing them takes 0.45 s and loading them `load_s`, a part of it latency.
    """

    load_s: float
    draw: random.Random
    tier: int = SSD
    blocks: int = 64
    now: float = 0.0

    def __post_init__(self) -> None:
        self.advisor = Advisor(BLOCK_BYTES, BLOCK_TOKENS)
        self.latency = self.draw.choice([0.0, 0.1, 0.3])

    def load(self, blocks: int, slow: float) -> float:
        share = self.latency + (1 - self.latency) * blocks / self.blocks if blocks else 0.0
        return self.load_s * share * slow

    def serve(self) -> tuple[float, float, float, int]:
        """Seconds to the first token as planned, when all is loaded, and when nothing is; blocks that were loaded."""
        draw, tail = self.draw, self.draw.randrange(16, 200)
        slow = draw.lognormvariate(0, 0.5) * (5 if draw.random() < 0.05 else 1)
        busy = draw.lognormvariate(0, 0.3) * (3 if draw.random() < 0.05 else 1)
        total, tiers = self.blocks * BLOCK_TOKENS + tail, bytes([self.tier]) * self.blocks
        plan = self.advisor.advise(tiers, total, self.now)
        load = self.advisor.begin(plan, tiers, self.now)
        takes, landed = self.load(plan.probe_stop, slow), plan.probe_stop
        if self.advisor.prefill.known and takes > plan.give_up_s:
            takes, landed = plan.give_up_s, 0
        self.advisor.end(load, landed, self.now + takes)
        computed = landed * BLOCK_TOKENS
        compute = (0.005 + 0.45 / 1024 * (total - computed)) * busy
        others = draw.choice([2, 3]) if draw.random() < 0.1 else 1  # a step that was shared all the same
        self.advisor.prefill.learn(computed, total - computed, compute * others)
        self.now += takes + compute + 1.0
        always = self.load(self.blocks, slow) + (0.005 + 0.45 / 1024 * tail) * busy
        return takes + compute, always, (0.005 + 0.45 / 1024 * total) * busy, landed

    def means(self, count: int) -> tuple[float, float, float, float]:
        """Means of what `serve` tells; of the blocks, their share."""
        ours, always, never, landed = np.array([self.serve() for _ in range(count)]).mean(axis=0)
        return float(ours), float(always), float(never), float(landed) / self.blocks


@pytest.mark.parametrize("faster", [4, 8, 20])
@pytest.mark.parametrize("seed", range(8))
def test_a_fast_tier_on_a_noisy_machine_is_loaded_from(faster: float, seed: int) -> None:
    ours, always, _, reuse = Noisy(0.45 / faster, random.Random(seed)).means(500)
    assert reuse >= 0.95
    assert ours <= 1.15 * always


@pytest.mark.parametrize("slower", [2, 5, 20])
@pytest.mark.parametrize("seed", range(8))
def test_a_slow_tier_on_a_noisy_machine_is_left_alone(slower: float, seed: int) -> None:
    engine = Noisy(0.45 * slower, random.Random(seed))
    engine.means(20)
    ours, _, never, _ = engine.means(500)
    assert ours <= 1.05 * never


@pytest.mark.parametrize("seed", range(8))
def test_a_wrong_refusal_heals_within_some_requests(seed: int) -> None:
    engine = Noisy(0.45 / 5, random.Random(seed))
    engine.means(50)
    for _ in range(3):
        engine.advisor.rates.observe(engine.tier, engine.blocks * BLOCK_BYTES, 2.0, engine.now)
    first = engine.advisor.advise(bytes([engine.tier]) * engine.blocks, 1100, engine.now)
    assert first.stop == 0
    engine.means(12)
    assert engine.means(50)[3] >= 0.9
