"""Patience on the simulated loop: attempts, pauses, deadlines, throttling, the limit of requests under way."""

from __future__ import annotations

import asyncio
import random

import pytest

from tiercache.buffers import Buffer
from tiercache.errors import ChangedError, OriginError, UnavailableError
from tiercache.metrics import Metrics
from tiercache.model import Outcome
from tiercache.origin import Span, Stat
from tiercache.remote.retry import DoubtfulError, Patience, RetryingOrigin, ThrottledError
from tiercache.testing.origins import MemoryOrigin
from tiercache.testing.simloop import simulate

FAST = Patience(deadline_s=30.0, attempts=4, concurrency=3, pause_s=0.1, throttle_pause_s=0.5, pause_s_max=5.0)


def script(*faults: Exception | None):
    """A hook that raises these in turn, then nothing."""
    left = list(faults)

    def hook(operation: str, path: str) -> None:
        fault = left.pop(0) if left else None
        if fault is not None:
            raise fault

    return hook


def run(test, hook=None, patience=FAST, *, delay_s=0.01, seed=1):
    """Runs `test(origin, inner, metrics)`; answers (what it returned or raised, virtual seconds, inner, metrics)."""
    inner, metrics = MemoryOrigin(delay_s=delay_s), Metrics()
    inner.put("x", b"0123456789" * 100)
    inner.on_call = hook

    async def main(loop):
        origin = RetryingOrigin(inner, patience, random.Random(seed), metrics)
        begin_s = loop.time()
        try:
            answer = await test(origin)
        except Exception as error:
            answer = error
        return answer, loop.time() - begin_s

    answer, seconds = simulate(main, seed)
    return answer, seconds, inner, metrics


async def read_x(origin):
    target = bytearray(100)
    stat = Stat("x", 1000, "v1", 1e9 + 1)
    await origin.read(stat, Span(50, 100), [Buffer.of(target, writable=True)])
    return bytes(target)


def test_faults_that_pass():
    faults = (UnavailableError("reset"), DoubtfulError("short"), ThrottledError("busy"))
    answer, seconds, inner, metrics = run(read_x, script(*faults))
    assert answer == b"0123456789" * 10
    assert inner.calls["read"] == 4
    assert metrics.value("tiercache_origin_retries_total", operation="read") == 3
    assert metrics.value("tiercache_origin_errors_total", operation="read") == 3
    assert seconds < 0.04 + 0.1 + 0.2 + 2.0 + 0.1


@pytest.mark.parametrize(
    ("fault", "kind"), [(UnavailableError("down"), UnavailableError), (DoubtfulError("lies"), OriginError)]
)
def test_faults_that_stay(fault, kind):
    answer, _, inner, _ = run(read_x, script(*[fault] * 9))
    assert isinstance(answer, kind)
    assert inner.calls["read"] == FAST.attempts


@pytest.mark.parametrize("fault", [ChangedError("other"), OriginError("refused")])
def test_answers_that_no_repeating_changes(fault):
    answer, _, inner, _ = run(read_x, script(fault))
    assert answer is fault
    assert inner.calls["read"] == 1


def test_pauses_are_jittered_and_bounded():
    total = []
    for seed in range(40):
        _, seconds, _, _ = run(read_x, script(*[UnavailableError("down")] * 3), seed=seed)
        total.append(seconds)
    assert max(total) <= 0.1 + 0.2 + 0.4 + 0.2
    assert len({round(each, 4) for each in total}) > 30


def test_every_call_ends_at_its_deadline():
    async def hang(operation, path):
        await asyncio.sleep(1e4)

    for attempts in (1, 2, 4):
        patience = Patience(deadline_s=10.0, attempts=attempts)
        answer, seconds, inner, _ = run(read_x, lambda o, p: hang(o, p), patience)
        assert isinstance(answer, UnavailableError)
        assert seconds == pytest.approx(10.0, abs=0.1)
        assert inner.calls["read"] == min(attempts, 3)


def test_a_silent_attempt_leaves_time_for_the_next():
    waits = [1e4, 0.0]

    async def hang(operation, path):
        await asyncio.sleep(waits.pop(0))

    answer, seconds, _, _ = run(read_x, hang, Patience(deadline_s=10.0))
    assert answer == b"0123456789" * 10
    assert seconds == pytest.approx(4.0, abs=0.2)


def test_retry_after_holds_every_call_back():
    """One throttled call: others that come meanwhile wait as long, and none comes early."""
    times = []

    async def both(origin):
        loop = asyncio.get_running_loop()

        async def later():
            await asyncio.sleep(1.0)
            await read_x(origin)
            times.append(loop.time())

        async with asyncio.TaskGroup() as group:
            group.create_task(read_x(origin))
            group.create_task(later())

    _, seconds, inner, _ = run(both, script(ThrottledError("busy", 7.0)))
    assert inner.calls["read"] == 3
    assert min(times) >= 7.0
    assert 7.0 <= seconds <= 8.0


def test_a_wait_beyond_the_deadline_is_not_waited():
    answer, seconds, _, _ = run(read_x, script(ThrottledError("busy", 1000.0)))
    assert isinstance(answer, ThrottledError)
    assert seconds < 1.0


def test_no_more_under_way_than_allowed():
    async def many(origin):
        await asyncio.gather(*(read_x(origin) for _ in range(20)))

    _, seconds, inner, _ = run(many)
    assert inner.under_way_max == FAST.concurrency
    assert seconds >= 0.01 * 20 / FAST.concurrency


def test_a_batch_of_stats_repeats_only_what_failed():
    def hook(operation, path):
        if path == "bad" and inner.calls["stat"] < 4:
            raise UnavailableError("down")

    inner = None

    async def stats(origin):
        nonlocal inner
        inner = origin._origin
        return await origin.stat(["x", "bad", "none"])

    answer, _, inner, _ = run(stats, hook)
    assert isinstance(answer[0], Stat)
    assert answer[1:] == [Outcome.GONE, Outcome.GONE]
    assert 4 <= inner.calls["stat"] <= 6


def test_cancelling_ends_at_once():
    async def cancelled(origin):
        task = asyncio.ensure_future(read_x(origin))
        await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    _, seconds, inner, _ = run(cancelled, delay_s=100.0)
    assert seconds < 1
    assert inner.under_way == 0
