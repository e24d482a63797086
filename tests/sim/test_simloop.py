"""The simulated loop itself: it replays a seed, reorders by the seed, moves time and finds deadlocks and leaks."""

from __future__ import annotations

import asyncio
import concurrent.futures

import pytest

from tiercache.testing.simloop import DeadlockError, LeakError, NoSocketError, SimClock, SimLoop, derive, simulate


async def _scene(loop: SimLoop) -> list[str]:
    """Workers that use most of what asyncio offers; the answer is the order in which things happened."""
    order: list[str] = []
    lock = asyncio.Lock()
    queue: asyncio.Queue[int] = asyncio.Queue(2)

    async def worker(name: str) -> None:
        for step in range(4):
            async with lock:
                order.append(f"{name}{step}")
            await asyncio.sleep(0.001 * loop.rng.randrange(3))
            order.append(await asyncio.to_thread(str.upper, f"{name}{step}"))

    async def produce() -> None:
        for item in range(5):
            await queue.put(item)

    async def consume() -> None:
        for _ in range(5):
            order.append(f"took {await queue.get()}")

    async with asyncio.TaskGroup() as group:
        for name in "abc":
            group.create_task(worker(name))
        group.create_task(produce())
        group.create_task(consume())
        await asyncio.wait({asyncio.ensure_future(asyncio.sleep(0.1 * i)) for i in range(3)})
    return order


def test_the_same_seed_gives_the_same_trace() -> None:
    first: list[str] = []
    second: list[str] = []
    assert simulate(_scene, 7, trace=first) == simulate(_scene, 7, trace=second)
    assert first == second
    assert len(first) > 50


def test_seeds_give_many_schedules() -> None:
    schedules = {tuple(simulate(_scene, seed)) for seed in range(200)}
    assert len(schedules) > 190


def test_an_hour_costs_nothing_and_ends_at_the_right_moment() -> None:
    async def main(loop: SimLoop) -> float:
        clock = SimClock(loop)
        wall = clock.wall()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3600):
                await asyncio.sleep(7200)
        clock.wall_step_s = -10
        assert clock.wall() == pytest.approx(wall + 3600 - 10)
        return clock.monotonic()

    assert simulate(main, 1) == pytest.approx(3600)


def test_a_deadlock_is_named_with_its_place() -> None:
    async def stuck() -> None:
        await asyncio.Event().wait()

    async def main(loop: SimLoop) -> None:
        await asyncio.gather(stuck(), stuck())

    with pytest.raises(DeadlockError, match="no timer and nothing ready") as caught:
        simulate(main, 3)
    assert "stuck#" in str(caught.value)
    assert __file__ in str(caught.value)
    assert "seed=3" in "".join(caught.value.__notes__)


def test_a_loop_without_end_is_stopped() -> None:
    async def spin(loop: SimLoop) -> None:
        while True:
            await asyncio.sleep(0)

    async def tick(loop: SimLoop) -> None:
        while True:
            await asyncio.sleep(1)

    with pytest.raises(DeadlockError, match="turns"):
        simulate(spin, 0, steps_max=1000)
    with pytest.raises(DeadlockError, match="virtual seconds"):
        simulate(tick, 0, limit_s=100)


def test_a_task_left_alive_is_a_leak() -> None:
    async def main(loop: SimLoop) -> None:
        loop.left = loop.create_task(asyncio.sleep(5))  # type: ignore[attr-defined]

    with pytest.raises(LeakError, match="sleep"):
        simulate(main, 0)


def test_an_exception_that_nobody_took_is_a_leak() -> None:
    async def main(loop: SimLoop) -> None:
        loop.call_soon(lambda: 1 // 0)
        await asyncio.sleep(1)

    with pytest.raises(LeakError, match="ZeroDivisionError"):
        simulate(main, 0)


def test_a_cancelled_executor_call_may_still_have_its_effect() -> None:
    """As in a real pool: queued calls are taken back, begun ones are not."""
    ran = []

    async def main(loop: SimLoop) -> None:
        future = loop.run_in_executor(None, ran.append, loop.seed)
        await asyncio.sleep(0)
        future.cancel()
        await asyncio.sleep(1)

    for seed in range(40):
        simulate(main, seed)
    assert 5 < len(ran) < 35


def test_executor_faults_arrive_and_a_shut_pool_refuses() -> None:
    def fail() -> None:
        raise OSError(28, "no space")

    async def main(loop: SimLoop) -> None:
        with pytest.raises(OSError, match="no space"):
            await loop.run_in_executor(None, fail)
        pool = concurrent.futures.ThreadPoolExecutor(1)
        pool.shutdown()
        with pytest.raises(RuntimeError, match="shutdown"):
            loop.run_in_executor(pool, fail)

    simulate(main, 0)


def test_call_soon_threadsafe_wakes_the_one_who_waits() -> None:
    async def main(loop: SimLoop) -> int:
        future: asyncio.Future[int] = loop.create_future()

        def answer() -> None:
            loop.call_soon_threadsafe(future.set_result, 5)

        loop.run_in_executor(None, answer)
        return await future

    assert simulate(main, 0) == 5


def test_sockets_are_refused_in_words() -> None:
    async def main(loop: SimLoop) -> None:
        with pytest.raises((NoSocketError, NotImplementedError)):
            await asyncio.open_connection("127.0.0.1", 9)

    simulate(main, 0)


def test_derived_generators_are_apart_and_repeatable() -> None:
    assert derive(1, "disk").random() == derive(1, "disk").random()
    assert derive(1, "disk").random() != derive(1, "origin").random()
    assert derive(1, "disk").random() != derive(2, "disk").random()
