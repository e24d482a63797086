"""A deterministic asyncio loop: virtual time, seeded order of callbacks, executor calls run inline.

One seed gives one schedule, so a failure found by a sweep of seeds is replayed by its number. Time moves only when
nothing is ready, and then at once to the next timer: an hour of deadlines costs microseconds. A state in which nothing
is ready and no timer is set can never end, and is raised as a deadlock that names the tasks and where they wait.

What this loop never sees: real threads, sockets, CUDA, UCX. Functions given to `run_in_executor` run on the loop's own
thread, one at a time: they must not wait for the loop. Order over sets of strings depends on PYTHONHASHSEED: fix it
to replay a seed in another process.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import random
import selectors
import weakref
from asyncio import base_events
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Callable, Coroutine, Mapping


T = TypeVar("T")

EXECUTOR_DELAY_S_MAX = 0.01
"""Longest virtual time between an executor call and its effect, and between its effect and its answer."""

HOLD_BACK_CHANCE = 0.25
"""How often some of the ready callbacks must wait for the next turn of the loop."""

LIMIT_S = 24 * 3600.0
"""Virtual time after which a simulation counts as stuck. Kept small: large floats would stall short timers."""

STEPS_MAX = 2_000_000


class DeadlockError(RuntimeError):
    """Nothing can happen any more, or the simulation passed its limit of steps or of virtual time."""


class LeakError(RuntimeError):
    """The simulation ended with tasks still alive, or with exceptions that nobody took."""


class NoSocketError(RuntimeError):
    """A simulated program asked for a file descriptor."""

    def __init__(self) -> None:
        super().__init__("the simulated loop has no sockets or pipes: use an in-memory origin or tier")


class _NoSelector(selectors.BaseSelector):
    """Nothing to select from: simulated programs have no file descriptors."""

    def register(self, fileobj: object, events: int, data: object = None) -> selectors.SelectorKey:
        raise NoSocketError

    def unregister(self, fileobj: object) -> selectors.SelectorKey:
        raise NoSocketError

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return {}

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        return []


class SimLoop(base_events.BaseEventLoop):
    """Event loop of a simulation; make one by a seed, or let `simulate` make it.

    `rng` is the root of all randomness of this run: give it, or generators seeded from it, to whatever needs some.
    `trace`, if it is made a list, receives one line for each callback that runs.
    """

    _ready: deque[asyncio.Handle]
    _scheduled: list[asyncio.TimerHandle]
    _stopping: bool
    _timer_cancelled_count: int

    def __init__(self, seed: int | str, *, limit_s: float = LIMIT_S, steps_max: int = STEPS_MAX) -> None:
        super().__init__()
        self.now = 0.0
        self.seed = seed
        self.rng = random.Random(f"simloop/{seed}")
        self.limit_s = limit_s
        self.steps_max = steps_max
        self.steps = 0
        self.trace: list[str] | None = None
        self.errors: list[str] = []
        self._calls: set[asyncio.TimerHandle] = set()
        self._selector = _NoSelector()
        self._clock_resolution = 1e-9
        # Tasks are numbered in order of creation: sets of tasks iterate by address, and must not decide the order.
        self._numbers: weakref.WeakKeyDictionary[object, int] = weakref.WeakKeyDictionary()
        self._count = 0
        self.set_task_factory(self._make_task)  # type: ignore[arg-type]  # typed for one signature of three
        self.set_exception_handler(self._take_error)

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self.now

    def run_in_executor(self, executor: object, func: Callable[..., T], *args: object) -> asyncio.Future[T]:
        """Runs `func` on the loop's thread after a random virtual delay; the answer arrives after another one.

        As with a real pool, a call that was cancelled while queued never runs, and one that had begun runs to its
        end although nobody waits for it: which of the two a cancelled call meets is drawn from the seed.
        """
        if getattr(executor, "_shutdown", False):
            raise RuntimeError("cannot schedule new futures after shutdown")
        future: asyncio.Future[T] = self.create_future()
        begun_at_once = self.rng.random() < 0.5

        def run() -> None:
            self._calls.discard(handle)
            if future.cancelled() and not begun_at_once:
                return
            try:
                answer = func(*args)
            except BaseException as error:  # noqa: BLE001  # as a pool's worker: every fault belongs to the one who waits
                self.call_later(self._delay(), _settle, future, None, error)
            else:
                self.call_later(self._delay(), _settle, future, answer, None)

        handle = self.call_later(self._delay(), run)
        self._calls.add(handle)
        return future

    def lose_threads(self) -> None:
        """The machine died: executor calls that had no effect yet never will, and nobody hears of them."""
        for handle in self._calls:
            handle.cancel()
        self._calls.clear()

    def close(self) -> None:
        """Ends the loop; the shared default executor does not exist here."""
        super().close()
        self.trace = None

    def _delay(self) -> float:
        return self.rng.uniform(0, EXECUTOR_DELAY_S_MAX)

    def _write_to_self(self) -> None:
        """call_soon_threadsafe wakes a real loop by this; here the callback is already in the queue of ready ones."""

    def _process_events(self, event_list: object) -> None:
        """There are no events but timers."""

    def _make_task(self, loop: object, coro: Coroutine[object, object, T], **options: Any) -> asyncio.Task[T]:
        task: asyncio.Task[T] = asyncio.Task(coro, loop=self, **options)
        self._count += 1
        self._numbers[task] = self._count
        return task

    def _take_error(self, loop: object, context: Mapping[str, object]) -> None:
        error = context.get("exception")
        self.errors.append(f"{context.get('message')}: {error!r}")

    def _run_once(self) -> None:
        self.steps += 1
        if self.steps > self.steps_max:
            raise DeadlockError(f"no end after {self.steps_max} turns of the loop, t={self.now:.3f}\n{self._waiting()}")
        self._collect_due()
        ready = sorted(self._ready, key=self._number_of)
        self.rng.shuffle(ready)
        kept = len(ready)
        if kept > 1 and not self._stopping and self.rng.random() < HOLD_BACK_CHANCE:
            kept = self.rng.randrange(1, kept)
        self._ready.clear()
        self._ready.extend(ready[:kept])
        if self.trace is not None:
            self.trace.extend(f"{self.now:.6f} {self._describe(handle)}" for handle in self._ready)
        super()._run_once()  # type: ignore[misc]
        self._ready.extend(ready[kept:])

    def _collect_due(self) -> None:
        """Moves time to the next timer when nothing is ready, and every due timer among the ready callbacks."""
        for handle in [handle for handle in self._ready if handle.cancelled()]:
            self._ready.remove(handle)
        scheduled = self._scheduled
        while scheduled and scheduled[0].cancelled():
            self._timer_cancelled_count -= 1
            self._pop_timer()
        if not self._ready and not self._stopping:
            if not scheduled:
                raise DeadlockError(f"deadlock at t={self.now:.6f}: no timer and nothing ready\n{self._waiting()}")
            self.now = max(self.now, scheduled[0].when())
            if self.now > self.limit_s:
                raise DeadlockError(f"no end after {self.limit_s} virtual seconds\n{self._waiting()}")
        while scheduled and scheduled[0].when() <= self.now:
            handle = self._pop_timer()
            if handle.cancelled():
                self._timer_cancelled_count -= 1
            else:
                self._ready.append(handle)

    def _pop_timer(self) -> asyncio.TimerHandle:
        handle = heapq.heappop(self._scheduled)
        handle._scheduled = False  # type: ignore[attr-defined]  # asyncio's own mark; a late cancel must not count it
        return handle

    def _number_of(self, handle: asyncio.Handle) -> int:
        task = _task_of(handle)
        return 0 if task is None else self._numbers.get(task, 0)

    def _describe(self, handle: asyncio.Handle) -> str:
        task = _task_of(handle)
        if task is not None:
            return f"{_name_of(task)}#{self._numbers.get(task, 0)}"
        callback = getattr(handle, "_callback", None)
        return str(getattr(callback, "__qualname__", type(callback).__name__))

    def _waiting(self) -> str:
        """Where every live task waits, one line each."""
        lines = []
        for task in sorted(asyncio.all_tasks(self), key=lambda task: self._numbers.get(task, 0)):
            stack = task.get_stack(limit=8)
            place = " < ".join(f"{frame.f_code.co_filename}:{frame.f_lineno}" for frame in reversed(stack))
            lines.append(f"  {_name_of(task)}#{self._numbers.get(task, 0)} waits at {place or 'its start'}")
        return "\n".join(lines)


class SimClock:
    """A tiercache.clock.Clock that reads a simulated loop's time; `wall_step_s` moves the wall clock alone."""

    def __init__(self, loop: SimLoop, *, epoch_s: float = 1_700_000_000.0) -> None:
        self._loop = loop
        self._epoch_s = epoch_s
        self.wall_step_s = 0.0

    def monotonic(self) -> float:
        """The loop's virtual time."""
        return self._loop.time()

    def wall(self) -> float:
        """Seconds since the epoch: the simulated start, plus virtual time, plus the step."""
        return self._epoch_s + self._loop.time() + self.wall_step_s


def simulate(
    main: Callable[[SimLoop], Coroutine[object, object, T]],
    seed: int | str,
    *,
    limit_s: float = LIMIT_S,
    steps_max: int = STEPS_MAX,
    trace: list[str] | None = None,
) -> T:
    """Runs `main(loop)` in a loop of its own and answers what it returns.

    Raises DeadlockError when it can never end, and LeakError when it ends while a task that it started lives on or
    an exception was left for nobody. Every exception carries the seed as a note.
    """
    loop = SimLoop(seed, limit_s=limit_s, steps_max=steps_max)
    loop.trace = trace
    try:
        answer = loop.run_until_complete(main(loop))
        # One more turn: tasks whose last step is already due are not leaks.
        loop.run_until_complete(asyncio.sleep(0))
        left = loop._waiting()
        if left:
            raise LeakError(f"tasks left at the end:\n{left}")
        if loop.errors:
            raise LeakError("exceptions that nobody took:\n  " + "\n  ".join(loop.errors))
        return answer
    except BaseException as error:
        error.add_note(f"simulation seed={seed!r}")
        raise
    finally:
        _cancel_left(loop)
        loop.close()


def derive(seed: int | str, *names: object) -> random.Random:
    """A generator of its own for each name under one root seed."""
    return random.Random("/".join(str(part) for part in (seed, *names)))


def _cancel_left(loop: SimLoop) -> None:
    """Ends what a failed run left, so that its coroutines do not complain when they are collected."""
    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()

    async def wait() -> None:
        await asyncio.gather(*left, return_exceptions=True)

    loop.steps_max = loop.steps + 10_000
    loop.limit_s = loop.now + LIMIT_S
    with contextlib.suppress(DeadlockError, asyncio.CancelledError):
        loop.run_until_complete(wait())


def _settle(future: asyncio.Future[T], answer: T | None, error: BaseException | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(answer)  # type: ignore[arg-type]  # None only beside an error


def _task_of(handle: asyncio.Handle) -> asyncio.Task[object] | None:
    owner = getattr(getattr(handle, "_callback", None), "__self__", None)
    return owner if isinstance(owner, asyncio.Task) else None


def _name_of(task: asyncio.Task[object]) -> str:
    return str(getattr(task.get_coro(), "__qualname__", "task"))
