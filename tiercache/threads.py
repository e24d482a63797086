"""Work in threads: that a coroutine must not leave behind, that is given out while the interpreter ends."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Executor

T = TypeVar("T")


async def in_thread(call: Callable[..., T], *arguments: object) -> T:
    """Runs a call in a thread, and never ends before it: it looks at extents that others give back then."""
    running = asyncio.get_running_loop().run_in_executor(None, call, *arguments)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        while not running.done():
            try:
                await asyncio.wait([running])
            except asyncio.CancelledError:
                continue
        raise


def submit(pool: Executor, call: Callable[..., T], *arguments: object) -> Future[T]:
    """Gives work to a thread, or does it here and now where the interpreter is ending and starts none any more."""
    try:
        return pool.submit(call, *arguments)
    except RuntimeError:
        answer: Future[T] = Future()
        try:
            answer.set_result(call(*arguments))
        except Exception as fault:  # noqa: BLE001 (it is the caller's to raise)
            answer.set_exception(fault)
        return answer
