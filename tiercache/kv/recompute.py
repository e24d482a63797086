"""Load or recompute: how many blocks of a stored prefix are worth loading, so that a cache is never slower than none.

Only prefixes are of use, so a plan is a split: load the first blocks, compute the rest. Loading n blocks takes, tier by
tier, `latency + (queued + bytes) / bandwidth` (rates.py), and saves what computing their tokens would have taken
(Prefill). Both are expectations, known up to a stated error; single loads and prefills scatter around them. The plan is
the n of least expected time to first token among those that are expected to save time at the worst of both errors,
n = 0 being one of them. So:

1. While what is to be expected stays within the stated errors, no request is expected to take longer than without.
2. A load that lasts longer is given up at `Plan.deadline_s`: not before it has taken as long as computing would have,
   nor before a few times what was expected while that is no more than twice as long, for a load that would have landed
   soon is then lost, too. Several such loads in a row, and the tier is distrusted (rates.py).
3. Whether a distrusted tier is fast is found out by probes: a part of the prefix with a deadline of half of what the
   request takes. The first comes after two requests, and each that fails doubles the wait for the next; in the long run
   they cost no more than a fortieth of the time that requests take.

Pure: nothing here does I/O or reads a clock. Loading and computing are taken to follow one another; layer-wise loads
overlap them and are faster than planned.
"""

from __future__ import annotations

import statistics
import threading
from collections import deque
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from tiercache.kv.rates import FADE, MEMORY, PEER, REMOTE, SECONDS_MIN, SLOW_IN_A_ROW, SSD, Doubt, Rates

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

    from tiercache.kv.rates import Rate, Transfer

    F64 = npt.NDArray[np.float64]

TIERS = (MEMORY, SSD, REMOTE, PEER)
MARGIN = 1.05
"""A load must save so many times what may have to be expected of its duration."""
PATIENCE = 8
"""A load is given up after so many times what was expected, within the limits that are named above."""
LATE = 0.95
"""A load that brought less than all of it, after this share of its deadline, was given up for its time."""
PREFILLS = 64
"""Prefills that a curve is fitted to."""
FULL_STEP = 512
"""Tokens of a prefill that keep any machine busy. Of what shorter ones take, most may be a fixed cost: where only those
were seen, as after loads of all but the last tokens, long ones may take that much less a token."""
PREFILL_ERROR_MOST = 1.5
"""The largest stated error of the prefill's curve within what was seen, as a factor."""
PURSE_SHARE = 0.025
"""Of the time that requests take without a tier, what may be lost on probing it in the long run."""
PURSE_SHARE_FIRST = 0.25
"""The same for the first probe; each that fails halves it, down to the one above."""
PROBE_SHARE = 0.5
"""Of the time that one request takes, what a probe may cost it."""


class Prefill:
    """The model's prefill cost curve, learnt from prefills: a + b * tokens + c * (tokens before each, summed) seconds.

    The three terms are a fixed cost, work a token (projections, experts) and attention; none is negative. `spread` is
    the stated relative error of the time that some tokens add: a factor that may be another for each of them. Short
    prefills are many where much is loaded; half of what is remembered is for others.
    """

    def __init__(self, fixed_s: float = 0.0, token_s: float = 0.0, pair_s: float = 0.0) -> None:
        """What is believed before the first prefill; nothing, as it stands."""
        self._lock = threading.Lock()
        self._terms = (fixed_s, token_s, pair_s)
        self._samples: list[tuple[int, int, float]] = []
        self._heard: deque[tuple[int, int, float]] = deque(maxlen=SLOW_IN_A_ROW)
        self._doubt = Doubt(PREFILL_ERROR_MOST, fast_in_a_row=SLOW_IN_A_ROW)
        self._reach = self._longest = 0

    @property
    def known(self) -> bool:
        """Whether there is anything to go by."""
        return any(self._terms)

    @property
    def terms(self) -> tuple[float, float, float]:
        """(a, b, c) in seconds; see the class."""
        return self._terms

    def learn(self, start: int, count: int, seconds: float) -> None:
        """Takes one prefill of tokens [start, start + count). Any thread."""
        if count <= 0:
            return
        seconds = max(seconds, SECONDS_MIN)
        with self._lock:
            self._heard.append((start, count, seconds))
            row = 0
            if self._samples:
                guess = self.seconds(start, count)
                seconds, row = self._doubt.hear(guess, guess, seconds)
            if row:
                # The machine or its load has changed: what was seen before tells no more than the curve's shape.
                change = statistics.median(s / max(self.seconds(a, b), SECONDS_MIN) for a, b, s in self._heard)
                kept = [(a, b, s * change) for a, b, s in self._samples[-8:]]
                self._samples = kept + list(self._heard)
            else:
                self._samples.append((start, count, seconds))
                self._forget()
            self._reach = max(start + count for start, count, _ in self._samples)
            self._longest = max(count for _, count, _ in self._samples)
            self._terms = _fit(self._samples)

    def _forget(self) -> None:
        """The oldest sample where there are too many, of those that are more than half."""
        if len(self._samples) > PREFILLS:
            full = [count >= FULL_STEP for _, count, _ in self._samples]
            del self._samples[full.index(sum(full) > PREFILLS // 2)]

    def seconds(self, start: int, count: int) -> float:
        """Expected time of a prefill of tokens [start, start + count)."""
        return self._terms[0] + float(self.added(start, np.array([start + count]))[0])

    def added(self, start: int, stops: npt.NDArray[np.integer]) -> F64:
        """Expected time that tokens [start, stops[i]) add to the prefill that they are part of."""
        ends = stops.astype(np.float64)
        _, token_s, pair_s = self._terms
        return token_s * (ends - start) + pair_s * (ends * ends - float(start) * start) / 2

    def spread(self, stop: int = 0) -> float:
        """The stated relative error of `added` up to token `stop`; larger beyond all that was seen."""
        factor = 1 + self._doubt.spread(len(self._samples))
        if self._reach:
            factor *= max(1.0, stop / (2 * self._reach), min(stop, FULL_STEP) / self._longest)
        return factor - 1


def _fit(samples: list[tuple[int, int, float]]) -> tuple[float, float, float]:
    """Non-negative least squares of relative errors: the best of the fits by each subset of terms whose coefficients
    all come out positive. With few samples only the plainer ones are tried."""
    rows = np.array(samples)
    start, count, seconds = rows.T
    terms = np.stack([np.ones_like(count), count, count * (start + count / 2)], axis=1) / seconds[:, None]
    after, full = np.arange(len(rows))[::-1], count >= FULL_STEP
    # However many short ones came since, a long one is only replaced by long ones.
    weights = FADE ** (np.where(full, full.sum() - np.cumsum(full), after) / 4)
    norms = np.sqrt(weights @ terms**2)
    terms /= norms
    gram, right, whole = terms.T @ (terms * weights[:, None]), terms.T @ weights, float(weights.sum())
    best, found = np.inf, np.array([0.0, float(seconds[-1] / count[-1]), 0.0])
    for size in range(1, min(3, len({(a, b) for a, b, _ in samples})) + 1):
        for chosen in combinations((1, 2, 0), size):
            at = list(chosen)
            try:
                solved = np.linalg.solve(gram[np.ix_(at, at)], right[at])
            except np.linalg.LinAlgError:
                continue  # terms that these samples cannot tell apart
            error = max(0.0, whole - float(solved @ right[at]))
            # A term more must earn its place, or noise would decide between costs a token and costs a prefill.
            if (solved > 0).all() and error < 0.9 * best - 1e-9:
                best, found = error, np.zeros(3)
                found[at] = solved / norms[at]
    # As for tiers: half of the samples took longer.
    found *= float(np.median(1 / (terms * norms @ found)))
    return float(found[0]), float(found[1]), float(found[2])


class Purse:
    """What may be lost on probing tiers. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._without_s: dict[int, float] = {}
        """By tier, the time of requests that did not use it since its last probe."""
        self._share: dict[int, float] = {}

    def earn(self, tier: int, without_s: float) -> None:
        """A request that takes `without_s` without a cache did not use this tier (Plan.refused)."""
        with self._lock:
            self._without_s[tier] = self._without_s.get(tier, 0.0) + without_s

    def allowance(self, tier: int) -> float:
        """Seconds that a probe of this tier may cost now."""
        with self._lock:
            return self._share.get(tier, PURSE_SHARE_FIRST) * self._without_s.get(tier, 0.0)

    def spend(self, tier: int, *, failed: bool) -> None:
        """A probe is over, and failed if it was given up."""
        with self._lock:
            self._without_s[tier] = 0.0
            share = self._share.get(tier, PURSE_SHARE_FIRST)
            self._share[tier] = max(PURSE_SHARE, share / 2) if failed else PURSE_SHARE_FIRST


@dataclass(frozen=True, slots=True)
class Plan:
    """Load blocks [first, stop), then as a probe [stop, probe_stop), and compute what follows the last that came."""

    first: int
    """Blocks whose tokens the engine has already."""
    stop: int
    load_s: float
    """Expected time of the load."""
    saved_s: float
    """Expected prefill time that it saves."""
    deadline_s: float
    """Give the load up after this; what has landed by then, as far as it is a prefix, is of use."""
    without_s: float
    """Expected prefill time without a cache."""
    refused: int = 0
    """Tier of the first block that is stored but not worth loading; 0 where there is none. Purse.earn wants it."""
    probe_stop: int = 0
    probe_s: float = 0.0
    """Deadline of the probe alone: what its blocks take to compute."""

    @property
    def blocks(self) -> int:
        """Leading blocks that the engine should have after the load, a probe not counted."""
        return self.stop

    @property
    def probes(self) -> bool:
        """Whether there is a probe."""
        return self.probe_stop > self.stop

    @property
    def give_up_s(self) -> float:
        """Deadline of load and probe together."""
        return self.deadline_s + (self.probe_s if self.probes else 0.0)


def plan_load(
    tiers: bytes,
    rates: Mapping[int, Rate],
    prefill: Prefill,
    *,
    block_bytes: int,
    block_tokens: int,
    total_tokens: int,
    computed_tokens: int = 0,
    allowance_s: Mapping[int, float] | None = None,
) -> Plan:
    """How much of a stored prefix to load for one request.

    Args:
        tiers: the matched prefix, one byte a block: its tier (KvStore.match). A tier that `rates` lacks, and 0, end it.
        block_bytes: what this reader loads of a block. block_tokens: tokens of a block.
        total_tokens: of the prompt. computed_tokens: leading ones whose KV the engine has; those blocks are not loaded.
        allowance_s: what may be lost on a probe of a tier (Purse.allowance); none without it.

    A load is taken to be one transfer a tier, one after the other. While nothing is known of the prefill, all of it is
    loaded that is on this host or with a peer: there is nothing to compare with.
    """
    first = computed_tokens // block_tokens
    tier_of = np.frombuffer(tiers, np.uint8)[first:]
    known = np.zeros(256, np.bool_)
    known[[tier for tier in rates if tier > 0]] = True
    tier_of = tier_of[: _leading(known[tier_of])]
    load, load_max = _load_seconds(tier_of, rates, block_bytes)
    without_s = prefill.seconds(computed_tokens, max(1, total_tokens - computed_tokens))
    if not prefill.known:
        count = _leading((tier_of < REMOTE) | (tier_of == PEER))
        refused = int(tier_of[count]) if count < len(tier_of) else 0
        return Plan(
            first,
            first + count,
            float(load[count]),
            0.0,
            PATIENCE * float(load_max[count]),
            0.0,
            refused,
            probe_stop=first + count,
        )
    # The engine computes at least the last token, also of a prompt that is stored to its end.
    stops = np.minimum((first + np.arange(len(tier_of) + 1)) * block_tokens, max(computed_tokens, total_tokens - 1))
    saved = np.maximum(0.0, prefill.added(computed_tokens, stops))
    sure = saved / (1 + prefill.spread(total_tokens))
    safe = load_max * MARGIN <= sure
    safe[0] = True
    count = int(np.argmin(np.where(safe, load - saved, np.inf)))
    refused = int(tier_of[count]) if count < len(tier_of) else 0
    probe, probe_s = 0, 0.0
    if refused and allowance_s and allowance_s.get(refused, 0.0) >= PROBE_SHARE * without_s:
        probe, probe_s = _probe(tier_of, count, sure, PROBE_SHARE * without_s)
    deadline_s = min(2 * float(saved[count]), max(float(saved[count]), PATIENCE * float(load[count])))
    return Plan(
        first, first + count, float(load[count]), float(saved[count]), deadline_s, without_s, refused,
        first + count + probe, probe_s,
    )  # fmt: skip


def _leading(true: npt.NDArray[np.bool_]) -> int:
    """How many leading items are true."""
    return len(true) if true.all() else int(np.argmin(true))


def _load_seconds(tier_of: npt.NDArray[np.uint8], rates: Mapping[int, Rate], block_bytes: int) -> tuple[F64, F64]:
    """Expected and longest time to load the first 0, 1, 2... blocks: tiers one after the other."""
    expected, longest = np.zeros(len(tier_of) + 1), np.zeros(len(tier_of) + 1)
    for tier in np.flatnonzero(np.bincount(tier_of)).tolist():
        rate = rates[tier]
        counts = np.cumsum(tier_of == tier)
        some = counts > 0
        sizes = rate.queued_bytes + counts * float(block_bytes)
        expected[1:] += some * (rate.latency_s + sizes / rate.bytes_per_s)
        # Rate.bounds, for all sizes at once.
        known = np.clip(sizes, *rate.seen_bytes)
        longest[1:] += (
            some
            * (rate.latency_s + known / rate.bytes_per_s)
            * (1 + rate.spread)
            * np.maximum(1.0, sizes / np.maximum(known, 1.0))
        )
    return expected, longest


def _probe(tier_of: npt.NDArray[np.uint8], count: int, sure: F64, allowed_s: float) -> tuple[int, float]:
    """Blocks after the first `count`, of the tier that the next one is in, whose computing takes no longer than what a
    probe may cost, and that time. A load of them that takes longer is not worth it, so that is its deadline."""
    run = _leading(tier_of[count:] == tier_of[count])
    gains = sure[count + 1 : count + 1 + run] - sure[count]
    blocks = int(np.searchsorted(gains, allowed_s, side="right"))
    return (blocks, float(gains[blocks - 1])) if blocks and gains[blocks - 1] > 0 else (0, 0.0)


@dataclass(frozen=True, slots=True)
class Load:
    """One load under way; see Advisor.begin."""

    plan: Plan
    tiers: bytes
    transfers: list[Transfer]
    began_s: float


class Advisor:
    """What one engine knows of its tiers and its prefill, in one place: asked before a load, told what came of it.

    Any thread. Where loads run in other processes than the one that asks, that one begins and ends them by what it
    hears of those.
    """

    def __init__(
        self, block_bytes: int, block_tokens: int, *, rates: Rates | None = None, prefill: Prefill | None = None
    ) -> None:
        """`block_bytes`: what a reader loads of a block, `block_tokens` of each: see plan_load."""
        self.block_bytes, self.block_tokens = block_bytes, block_tokens
        self.rates = rates if rates is not None else Rates()
        self.prefill = prefill if prefill is not None else Prefill()
        self.purse = Purse()

    def advise(self, tiers: bytes, total_tokens: int, now_s: float, *, computed_tokens: int = 0) -> Plan:
        """How much of a stored prefix (KvStore.match) to load for one request; then `begin`, where that is anything."""
        plan = plan_load(
            tiers,
            self.rates.look(now_s),
            self.prefill,
            block_bytes=self.block_bytes,
            block_tokens=self.block_tokens,
            total_tokens=total_tokens,
            computed_tokens=computed_tokens,
            allowance_s={tier: self.purse.allowance(tier) for tier in TIERS},
        )
        if plan.refused:
            self.purse.earn(plan.refused, plan.without_s)
        return plan

    def begin(self, plan: Plan, tiers: bytes, now_s: float) -> Load:
        """The load of blocks [first, probe_stop) of a plan begins, or queues. Give it up when `give_up_s` has passed,
        and say in any case how it went: `end`."""
        wanted = tiers[plan.first : plan.probe_stop]
        transfers = [
            self.rates.begin(tier, wanted.count(tier) * self.block_bytes, now_s) for tier in dict.fromkeys(wanted)
        ]
        return Load(plan, tiers, transfers, now_s)

    def end(self, load: Load, landed: int, now_s: float) -> None:
        """The load is over: the first `landed` blocks of the prefix are there."""
        plan, seconds = load.plan, max(now_s - load.began_s, SECONDS_MIN)
        whole = landed >= plan.probe_stop
        late = not whole and seconds >= LATE * plan.give_up_s
        stuck = load.tiers[landed] if late else 0
        rates = self.rates.look(now_s)
        # One duration for several tiers: shared out as expected, or what is left of it for the one that was too slow.
        usual = {
            each.tier: rates[each.tier].latency_s + (each.ahead_bytes + each.count_bytes) / rates[each.tier].bytes_per_s
            for each in load.transfers
            if each.tier != stuck
        }
        scale = seconds / max(sum(usual.values()), SECONDS_MIN)
        for each in load.transfers:
            if whole:
                self.rates.end(each, load.began_s + scale * usual[each.tier])
            elif each.tier == stuck:
                moved = load.tiers[plan.first : landed].count(stuck) * self.block_bytes
                left_s = max(seconds - sum(usual.values()), seconds / 2)
                self.rates.end(each, load.began_s + left_s, moved)
            else:
                # Another tier's fault, or blocks that were gone: nothing is learnt of this one.
                self.rates.drop(each)
        if plan.probes and (late or whole):
            self.purse.spend(plan.refused, failed=late)
