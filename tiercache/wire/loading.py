"""Loading: gaps that the owner hands to this process are filled by the reader's own load, in place.

Every load runs in a task of the client, not of the reader: a reader who gives up neither stops nor endangers others who
wait for the same bytes. A load that ends, however it ends, is told to the owner; only then may its extents serve
anything else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Protocol

from tiercache.buffers import part_digests
from tiercache.errors import TierCacheError, UnavailableError
from tiercache.lease import Gap
from tiercache.wire import frames
from tiercache.wire.frames import Landed, Op

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from tiercache.lease import Load, PageRun
    from tiercache.wire.memo import Home

log = logging.getLogger(__name__)

ALIVE_S = 2.5
"""A load that takes long says so often that it still runs; who is silent is taken for hung (see served.Limits)."""


class Speaker(Protocol):
    """What a load needs of the connection that its gaps came by."""

    def tell(self, op: int, body: bytes, *, number: int = 0) -> None:
        """Sends a message that has no answer."""
        ...


class Reading:
    """One READ under way: what to load with, and what went wrong in this process."""

    __slots__ = ("fault", "load", "run")

    def __init__(self, run: PageRun, load: Load) -> None:
        self.run, self.load = run, load
        self.fault: BaseException | None = None


class Loads:
    """The loads of one connection; on its loop."""

    def __init__(self, home: Home, attach: Callable[[Sequence[int]], Awaitable[None]]) -> None:
        """`attach` maps the segments of locations that the view does not know yet."""
        self._home, self._attach = home, attach
        self._readings: dict[int, Reading] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def expect(self, number: int, reading: Reading) -> None:
        """Gaps for this question may come from now on, also when nobody waits for its answer any longer."""
        reading.fault = None
        self._readings[number] = reading

    def done(self, number: int) -> None:
        """The question was answered: no more gaps will come for it."""
        self._readings.pop(number, None)

    def begin(self, speaker: Speaker, number: int, body: memoryview) -> None:
        """A FILL has come; one that nobody can deal with is given back at once."""
        fill, gaps = frames.unpack_gaps(body)
        reading = self._readings.get(number)
        if reading is None:
            speaker.tell(Op.UNFILLED, frames.pack_u64([fill]), number=number)
            return
        task = asyncio.get_running_loop().create_task(self._fill(speaker, number, fill, gaps, reading))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def stop(self) -> None:
        """Ends all loads and waits for them: after this nothing is written into the owner's memory by them."""
        self._readings.clear()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _fill(
        self, speaker: Speaker, number: int, fill: int, gaps: Sequence[frames.Gap], reading: Reading
    ) -> None:
        run, view = reading.run, self._home.view

        def landed(indexes: Sequence[int], digests: Sequence[bytes] | None = None, /) -> None:
            done = []
            for at, i in enumerate(indexes):
                rows = digests[at] if digests is not None else b""
                rows = rows or part_digests(targets[i].target, run.part_bytes, gaps[i].parts)
                done.append(Landed(i, gaps[i].parts, rows[: 8 * gaps[i].parts.bit_length()]))
            speaker.tell(Op.FILLED, frames.pack_landed(fill, 0, done), number=number)

        alive = asyncio.get_running_loop().create_task(_say_alive(speaker, number, fill))
        try:
            locations = [gap.location for gap in gaps]
            if self._home.lacks(locations):
                await self._attach(locations)
            buffers = view.buffers(locations)
            targets = [
                Gap(gap.ordinal, gap.parts, buffer.slice(0, run.page_size(gap.ordinal)))
                for gap, buffer in zip(gaps, buffers, strict=True)
            ]
            await reading.load(targets, landed)
        except asyncio.CancelledError:
            reading.fault = UnavailableError("the cache was closed while this was being loaded: open it again")
            raise
        except (TierCacheError, OSError, LookupError) as fault:
            reading.fault = fault
        except Exception as fault:
            reading.fault = fault
            log.exception("a load failed in a way that no origin fails")
        finally:
            alive.cancel()
            try:
                speaker.tell(Op.UNFILLED, frames.pack_u64([fill]), number=number)
            except (TierCacheError, OSError):
                pass  # the owner is gone: whoever follows it asks for what is missing


async def _say_alive(speaker: Speaker, number: int, fill: int) -> None:
    """Says that a load still runs, until cancelled, or until nobody can be told."""
    with contextlib.suppress(TierCacheError, OSError):
        while True:
            await asyncio.sleep(ALIVE_S)
            speaker.tell(Op.FILLED, frames.pack_landed(fill, 0, []), number=number)
