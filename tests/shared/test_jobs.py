"""Jobs of several processes ask the origin as one reader does: dask, and PyTorch with fork and with spawn.

What runs, and what is compared, is bench.jobs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from bench import jobs
from tests.shared.conftest import PATIENCE_S

pytest.importorskip("distributed")
pytest.importorskip("duckdb")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(20 * PATIENCE_S),
    pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="processes share by memory files"),
]


@pytest.fixture(scope="module")
def running() -> Iterator[jobs.Bench]:
    with jobs.bench(0.1) as made:
        yield made


@pytest.fixture(scope="module")
def ones(running: jobs.Bench) -> dict[str, jobs.Row]:
    """What one reader asks, by title."""
    return {job.title: running.run(job) for job in jobs.JOBS if job.single}


@pytest.mark.parametrize("job", jobs.JOBS, ids=lambda job: job.title)
def test_a_job_asks_as_one_reader(running: jobs.Bench, ones: dict[str, jobs.Row], job: jobs.Job) -> None:
    if job.torch and not jobs.TORCH.exists():
        pytest.skip(jobs.NO_TORCH)
    row = ones[job.title] if job.single else running.run(job)
    assert jobs.complaints(row, running.truth(job), ones.get(job.alone)) == []
