"""At least 200 seeded schedules of the whole cache in every run: see tiercache.testing.scenarios.

A failure's note has its seed and the command that runs it again; `make nightly` runs thousands.
"""

from __future__ import annotations

import logging

import pytest

from tiercache.testing.scenarios import SCENARIOS, sweep
from tiercache.testing.simloop import simulate

SEEDS = {
    "mixed": 100,
    "cold_readers": 40,
    "rotten": 20,
    "files": 20,
    "durable": 12,
    "crowded": 8,
    "recycled": 16,
    "deadlines": 24,
}
BLOCK = 20


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Injected faults are warned of by the thousand."""
    caplog.set_level(logging.CRITICAL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "first"), [(name, first) for name, count in SEEDS.items() for first in range(0, count, BLOCK)]
)
def test_schedules(name: str, first: int) -> None:
    sweep(name, range(first, min(first + BLOCK, SEEDS[name])))


@pytest.mark.nightly
@pytest.mark.parametrize("name", SEEDS)
def test_many_more_schedules(name: str) -> None:
    sweep(name, range(10_000, 10_000 + 10 * SEEDS[name]))


def test_there_are_enough_of_them() -> None:
    assert set(SEEDS) == set(SCENARIOS)
    assert sum(SEEDS.values()) >= 200


def test_a_seed_is_the_same_schedule_of_the_whole_cache_again() -> None:
    traces: list[list[str]] = [[], []]
    for trace in traces:
        simulate(SCENARIOS["mixed"], 11, trace=trace)
    assert traces[0] == traces[1]
    assert len(traces[0]) > 300
