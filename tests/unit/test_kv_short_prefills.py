"""What an engine that loads nearly all of its prompts learns of prefill: only what short ones take."""

from __future__ import annotations

import random

import pytest

from tiercache.kv.rates import SSD, Rate
from tiercache.kv.recompute import Prefill, plan_load

TOTAL = 8224
TIERS = bytes([SSD]) * 512


def truth(fixed_s: float, start: int, count: int) -> float:
    """Seconds of a prefill as accelerators take them: a step's fixed cost hides the work of its first tokens."""
    return max(fixed_s, 5e-5 * count + 2e-9 * count * (start + count / 2))


def after_loads(fixed_s: float, count: int, prefill: Prefill | None = None, noise: float = 0.0) -> Prefill:
    """A curve that has seen what was computed after so many loads."""
    prefill, draw = prefill or Prefill(), random.Random(count)
    for _ in range(count):
        start, tokens = draw.choice([1024, 2048, 4096, 8192]), draw.randrange(20, 60)
        prefill.learn(start, tokens, truth(fixed_s, start, tokens) * draw.uniform(1 - noise, 1 + noise))
    return prefill


@pytest.mark.parametrize("fixed_s", [0.0, 0.004, 0.02])
@pytest.mark.parametrize("count", [1, 3, 10, 100])
def test_short_prefills_do_not_promise_more_than_they_tell(fixed_s: float, count: int) -> None:
    """A load that takes longer than computing does is not begun, whatever a token of short ones took."""
    prefill = after_loads(fixed_s, count)
    without_s = truth(fixed_s, 0, TOTAL)
    assert prefill.seconds(0, TOTAL) / (1 + prefill.spread(TOTAL)) <= without_s
    slow = {SSD: Rate(512 * (1 << 20) / (1.2 * without_s), 0.0, 0, 0.15)}
    plan = plan_load(TIERS, slow, prefill, block_bytes=1 << 20, block_tokens=16, total_tokens=TOTAL)
    assert plan.stop * (1 << 20) / slow[SSD].bytes_per_s <= 1.05 * truth(fixed_s, 0, plan.stop * 16)


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_one_long_prefill_tells_more_than_the_short_ones_after_it(noise: float) -> None:
    prefill = after_loads(0.008, 6, noise=noise)
    for start in range(0, 8192, 2048):
        prefill.learn(start, 2048, truth(0.008, start, 2048))
    after_loads(0.008, 300, prefill, noise=noise)
    assert 0.65 <= prefill.seconds(0, TOTAL) / truth(0.008, 0, TOTAL) <= 1.15  # rather too little than too much
    assert prefill.spread(TOTAL) < 0.3
    fast = {SSD: Rate(512 * (1 << 20) / (0.4 * truth(0.008, 0, TOTAL)), 0.0, 0, 0.15)}
    assert plan_load(TIERS, fast, prefill, block_bytes=1 << 20, block_tokens=16, total_tokens=TOTAL).stop == 512
