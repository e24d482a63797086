"""Live rates of tiers: what is fitted, what is stated about its error, and what a sudden change does to both."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiercache.kv.rates import PRIORS, REMOTE, SSD, Rate, Rates

MIB = 1 << 20


def test_without_transfers_the_prior_is_stated_with_a_wide_error() -> None:
    rate = Rates().look(0.0)[SSD]
    assert rate.bytes_per_s == PRIORS[SSD].bytes_per_s
    assert rate.spread >= 1
    assert rate.seconds_max(MIB) == pytest.approx(rate.seconds(MIB) * (1 + rate.spread))


def test_latency_and_bandwidth_are_told_apart_by_transfers_of_several_sizes() -> None:
    rates, draw = Rates(), random.Random(1)
    for i in range(40):
        size = draw.choice([1, 4, 16, 64]) * MIB
        rates.observe(REMOTE, size, 0.02 + size / 200e6, float(i))
    rate = rates.look(40.0)[REMOTE]
    assert rate.bytes_per_s == pytest.approx(200e6, rel=0.05)
    assert rate.latency_s == pytest.approx(0.02, rel=0.15)
    assert rate.spread < 0.3


def test_transfers_of_one_size_are_predicted_at_that_size_all_the_same() -> None:
    rates = Rates()
    for i in range(40):
        rates.observe(SSD, 8 * MIB, 0.01, float(i))
    assert rates.look(40.0)[SSD].seconds(8 * MIB) == pytest.approx(0.01, rel=0.02)


def test_the_queue_counts_what_is_asked_for_and_not_there_yet() -> None:
    rates = Rates()
    one = rates.begin(SSD, 10 * MIB, 0.0)
    two = rates.begin(SSD, 5 * MIB, 0.0)
    assert rates.look(0.0)[SSD].queued_bytes == 15 * MIB
    assert two.ahead_bytes == 10 * MIB
    rates.end(one, 0.1)
    rates.end(one, 0.1)  # twice is once
    assert rates.look(0.1)[SSD].queued_bytes == 5 * MIB
    rates.end(two, 0.15)
    assert rates.look(0.15)[SSD].queued_bytes == 0


def test_a_queue_is_no_slowness_of_the_tier() -> None:
    """Transfers that stand in line each take longer than the one before, at one and the same bandwidth."""
    rates, now = Rates(), 0.0
    for _ in range(20):
        line = [rates.begin(SSD, 10 * MIB, now) for _ in range(4)]
        for transfer in line:
            now += 10 * MIB / 1e9
            rates.end(transfer, now)
    rate = rates.look(now)[SSD]
    assert rate.bytes_per_s == pytest.approx(1e9, rel=0.1)
    assert rate.seconds(10 * MIB) == pytest.approx(10 * MIB / 1e9, rel=0.1)


def test_a_slow_transfer_is_an_accident_and_three_in_a_row_are_a_change() -> None:
    rates = Rates()
    for i in range(30):
        rates.observe(SSD, 8 * MIB, 0.008, float(i))
    trusted = rates.look(30.0)[SSD]
    rates.observe(SSD, 8 * MIB, 0.4, 31.0)
    rates.observe(SSD, 8 * MIB, 0.4, 32.0)
    assert rates.look(32.0)[SSD].seconds_max(8 * MIB) == pytest.approx(trusted.seconds_max(8 * MIB), rel=0.1)
    rates.observe(SSD, 8 * MIB, 0.4, 33.0)
    slow = rates.look(33.0)[SSD]
    assert slow.seconds(8 * MIB) == pytest.approx(0.4, rel=0.1)
    assert slow.spread > trusted.spread


def test_a_fast_transfer_is_believed_at_once() -> None:
    rates = Rates()
    for i in range(30):
        rates.observe(SSD, 8 * MIB, 0.4, float(i))
    rates.observe(SSD, 8 * MIB, 0.008, 30.0)
    assert rates.look(30.0)[SSD].seconds(8 * MIB) == pytest.approx(0.008, rel=0.1)


def test_scattered_transfers_are_expected_near_their_median_with_a_limited_error() -> None:
    rates, draw, near = Rates(), random.Random(4), 0
    for i in range(200):
        outlier = 5 if draw.random() < 0.05 else 1
        rates.observe(SSD, 8 * MIB, 0.01 * draw.lognormvariate(0, 0.5) * outlier, float(i))
        if i > 30:
            rate = rates.look(float(i))[SSD]
            near += 0.5 < rate.seconds(8 * MIB) / 0.01 < 2
            assert rate.spread <= 1
    assert near >= 0.9 * 169


def test_a_transfer_given_up_tells_that_it_took_so_long() -> None:
    rates = Rates()
    for i in range(30):
        rates.observe(SSD, 8 * MIB, 0.008, float(i))
    for _ in range(3):
        transfer = rates.begin(SSD, 64 * MIB, 30.0)
        rates.end(transfer, 30.5, moved_bytes=0)
    assert rates.look(30.5)[SSD].seconds_max(64 * MIB) >= 0.5


def test_what_was_seen_long_ago_is_stated_with_a_wider_error() -> None:
    rates = Rates()
    for i in range(30):
        rates.observe(SSD, 8 * MIB, 0.008, float(i))
    assert rates.look(30.0 + 1200)[SSD].spread > 3 * rates.look(30.0)[SSD].spread


def test_a_tier_without_a_prior_is_unknown_until_it_was_used() -> None:
    rates = Rates({})
    assert rates.look(0.0) == {}
    rates.observe(9, MIB, 0.01, 0.0)
    assert set(rates.look(0.0)) == {9}


@given(
    st.floats(1e-5, 0.2),
    st.floats(1e6, 2e10),
    st.floats(0, 0.1),
    st.lists(st.integers(1, 512), min_size=40, max_size=60),
    st.randoms(use_true_random=False),
)
def test_steady_tiers_stay_within_the_stated_error(
    latency_s: float, bytes_per_s: float, jitter: float, sizes: list[int], draw: random.Random
) -> None:
    """Whatever the tier, the prior and the order of sizes: once warm, nothing surprises. Jitter is drawn, not chosen,
    for an envelope over the last errors promises nothing against an adversary."""
    rates, true = Rates(), Rate(bytes_per_s, latency_s)
    for i, mib in enumerate(sizes):
        seconds = true.seconds(mib * MIB) * draw.uniform(1 - jitter, 1 + jitter)
        if i >= 30:
            rate = rates.look(float(i))[SSD]
            assert rate.bounds(mib * MIB)[0] / (1 + rate.spread) / 1.2 <= seconds <= 1.2 * rate.seconds_max(mib * MIB)
        rates.observe(SSD, mib * MIB, seconds, float(i))
