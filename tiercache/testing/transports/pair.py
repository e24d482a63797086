"""Pair: two transports in one process, connected to each other; and memory with guard bytes around what may change."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import numpy as np

from tiercache.buffers import Buffer
from tiercache.testing.transports.pattern import Exposure

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tiercache.transport import Link, Transport

GUARD = 0xA5
DEADLINE_S = 20.0


class Ear:
    """Hears notes, and lets others wait for them."""

    def __init__(self) -> None:
        self.notes: list[bytes] = []
        self._changed = asyncio.Event()

    def __call__(self, note: bytes) -> None:
        self.notes.append(note)
        self._changed.set()

    async def wait(self, count: int) -> list[bytes]:
        """The first notes, once there are so many."""
        async with asyncio.timeout(DEADLINE_S):
            while len(self.notes) < count:
                self._changed.clear()
                await self._changed.wait()
        return self.notes


class Pair:
    """`here` asks through `link` for what `there` exposes, and `there` through `back`. Use it with `async with`."""

    link: Link
    back: Link

    def __init__(self, open_one: Callable[[Callable[[bytes], None]], Transport]) -> None:
        """`open_one`: makes a transport that tells its notes."""
        self.ear_here, self.ear_there = Ear(), Ear()
        self.here, self.there = open_one(self.ear_here), open_one(self.ear_there)
        self.exposures: list[Exposure] = []

    async def __aenter__(self) -> Pair:
        await self.connect()
        return self

    async def connect(self) -> None:
        """Connects both ends."""
        self.link, self.back = await asyncio.gather(
            self.here.connect(self.there.address, DEADLINE_S), self.there.connect(self.here.address, DEADLINE_S)
        )

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(self.here.close(), self.there.close())
        for each in self.exposures:
            each.close()

    def expose(self, size_bytes: int, seed: int = 0, *, writable: bool = False) -> tuple[Exposure, int, bytes]:
        """Memory that `there` exposes: itself, its number for moves of `link`, its descriptor."""
        memory = Exposure(seed, size_bytes)
        self.exposures.append(memory)
        descriptor = self.there.expose(memory.buffer, writable=writable, file=memory.file)
        return memory, self.link.attach(descriptor), descriptor


class Guarded:
    """Pieces of these lengths in one array, with guard bytes before, between and behind them."""

    def __init__(self, lengths: Sequence[int], gap: int = 64) -> None:
        self._array = np.full(sum(lengths) + gap * (len(lengths) + 1), GUARD, np.uint8)
        whole = Buffer.of(self._array.data, writable=True)
        self.pieces: list[Buffer] = []
        self._spans: list[slice] = []
        at = gap
        for length in lengths:
            self.pieces.append(whole.slice(at, length))
            self._spans.append(slice(at, at + length))
            at += length + gap

    def content(self) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        """What lies in the pieces, in order."""
        return np.concatenate([self._array[span] for span in self._spans]) if self._spans else self._array[:0]

    def whole(self) -> bool:
        """Whether every guard byte is what it was."""
        edges = [0, *[edge for span in self._spans for edge in (span.start, span.stop)], len(self._array)]
        return all((self._array[edges[i] : edges[i + 1]] == GUARD).all() for i in range(0, len(edges), 2))

    def wipe(self) -> None:
        """Makes everything guard bytes again."""
        self._array[:] = GUARD

    def untouched(self) -> bool:
        """Whether all of it is guard bytes."""
        return bool((self._array == GUARD).all())
