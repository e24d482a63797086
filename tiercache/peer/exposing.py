"""Exposing: which of this cache's memory peers may reach, by transport, and where in it an entry lies."""

from __future__ import annotations

import asyncio
import fcntl
import mmap
import os
from bisect import bisect_right
from typing import TYPE_CHECKING, NamedTuple, Protocol

from tiercache.buffers import Buffer
from tiercache.peer.frames import Place
from tiercache.threads import in_thread

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tiercache.transport import Transport


_LANDING = -1
"""The landing memory among the numbers of memory files."""


class Memory(Protocol):
    """One memory file that entries lie in."""

    @property
    def ordinal(self) -> int:
        """Which one it is."""
        ...

    @property
    def fd(self) -> int | None:
        """Its descriptor."""
        ...

    @property
    def span(self) -> Buffer:
        """All of it, mapped."""
        ...


class Exposed:
    """The memory that one transport has been given. On the loop."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self._descriptors: dict[int, bytes] = {}
        self._one = asyncio.Lock()

    async def descriptor(self, memory: Memory) -> bytes:
        """What peers need to read this memory; the first time it is registered, which may take a while."""
        fd = -1 if memory.fd is None else memory.fd
        return await self._expose(memory.ordinal, memory.span, writable=False, file=fd)

    async def landing(self, landing: Landing) -> bytes:
        """What peers need to write to the landing memory."""
        return await self._expose(_LANDING, landing.span, writable=True, file=landing.file)

    async def _expose(self, ordinal: int, span: Buffer, *, writable: bool, file: int) -> bytes:
        async with self._one:  # registered once, however many peers ask for it at a time
            if ordinal not in self._descriptors:
                self._descriptors[ordinal] = await in_thread(
                    lambda: self.transport.expose(span, writable=writable, file=file)
                )
        return self._descriptors[ordinal]


class Map(NamedTuple):
    """Where the memory files lie in this process."""

    starts: list[int]
    memories: list[Memory]

    @classmethod
    def of(cls, memories: Sequence[Memory]) -> Map:
        """The map of these."""
        ordered = sorted(memories, key=lambda one: one.span.address)
        return cls([one.span.address for one in ordered], ordered)

    def place(self, buffer: Buffer) -> tuple[Memory, Place] | None:
        """Whose memory a buffer lies in, and where; None where it lies in none of these."""
        at = bisect_right(self.starts, buffer.address) - 1
        if at < 0:
            return None
        memory = self.memories[at]
        offset = buffer.address - memory.span.address
        if offset + buffer.length > memory.span.length:
            return None
        return memory, Place(memory.ordinal, offset)


class Landing:
    """Memory that peers write to when this cache asks them to: slots of one size. Nothing that lies there is believed:
    it is copied and hashed in one go. On the loop."""

    def __init__(self, room_bytes: int, slot_bytes: int) -> None:
        self.slot_bytes = min(slot_bytes, room_bytes)
        count = max(1, room_bytes // self.slot_bytes)
        self.file = _memory_file(count * self.slot_bytes)
        self._map = mmap.mmap(self.file, count * self.slot_bytes)
        self.span = Buffer.of(self._map, writable=True)
        self._free = list(range(count))

    def close(self) -> None:
        """Closes its file; the memory goes with the last who looks at it."""
        if self.file >= 0:
            os.close(self.file)
            self.file = -1

    @property
    def free(self) -> int:
        """Slots that nobody uses."""
        return len(self._free)

    def take(self) -> int:
        """A free slot."""
        return self._free.pop()

    def give(self, slot: int) -> None:
        """It is free again."""
        self._free.append(slot)

    def buffer(self, slot: int) -> Buffer:
        """The slot in place."""
        return self.span.slice(slot * self.slot_bytes, self.slot_bytes)


def _memory_file(size: int) -> int:
    """A memory file that cannot shrink, as transports of one machine share; -1 where there are none."""
    try:
        file = os.memfd_create("tiercache-landing", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except (AttributeError, OSError):
        return -1
    os.ftruncate(file, size)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return file
