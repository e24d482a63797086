"""Another process with a transport of its own, told by lines of JSON what to do: `python -m
tiercache.testing.transports.peer NAME HOST`. It dies with its parent.

It says first {"address": HEX, "usable": TEXT}. Every line that it is told is {"id": N, "call": METHOD of Told, ...
arguments}, and what it answers {"id": N, "answer": ...} or {"id": N, "fault": CLASS, "message": TEXT}, in whatever
order that is done. Bytes are hexadecimal. `PeerProcess` in process.py is the other end.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

import xxhash

from tiercache.buffers import Buffer
from tiercache.net import open_transport, usable
from tiercache.testing.transports.pattern import Exposure, pattern
from tiercache.transport import Move

if TYPE_CHECKING:
    from tiercache.transport import Link, Transport

_PR_SET_PDEATHSIG = 1


class Told:
    """What it may be told."""

    def __init__(self, name: str, host: str) -> None:
        self.notes: list[bytes] = []
        self._noted = asyncio.Event()
        self.transport: Transport = open_transport(name, host, self._hear)
        self.links: list[Link] = []
        self.regions: dict[str, Exposure] = {}
        self._attached: dict[tuple[int, str], int] = {}

    def _hear(self, note: bytes) -> None:
        self.notes.append(note)
        self._noted.set()

    async def connect(self, address: str, deadline_s: float = 10.0) -> int:
        """Connects, and answers the number of the link."""
        self.links.append(await self.transport.connect(bytes.fromhex(address), deadline_s))
        return len(self.links) - 1

    async def negotiated(self, link: int = 0) -> str:
        """What the link says of itself."""
        return self.links[link].negotiated

    async def expose(self, size_bytes: int, seed: int = 0, writable: bool = False) -> str:
        """Exposes so much memory with the pattern of this seed, and answers the descriptor."""
        memory = Exposure(seed, size_bytes)
        made = self.transport.expose(memory.buffer, writable=writable, file=memory.file)
        self.regions[made.hex()] = memory
        return made.hex()

    async def withdraw(self, descriptor: str) -> None:
        """Ends what `expose` began."""
        self.transport.withdraw(bytes.fromhex(descriptor))
        self.regions.pop(descriptor).close()

    async def digest(self, descriptor: str, offset: int = 0, length: int = -1) -> str:
        """The xxh3-64 of exposed bytes."""
        memory = self.regions[descriptor].array
        return xxhash.xxh3_64_hexdigest(memory[offset : len(memory) if length < 0 else offset + length].data)

    async def read(self, descriptor: str, offset: int, length: int, *, times: int = 1, deadline_s: float = 30.0,
                   link: int = 0) -> list[str]:  # fmt: skip
        """Reads from the other end, so often, and answers the digest of what came, or the name of the outcome."""
        target = bytearray(length)
        move = Move(self._attach(descriptor, link), offset, [Buffer.of(target, writable=True)])
        answers = []
        for _ in range(times):
            (outcome,) = await self.links[link].read([move], deadline_s)
            answers.append(xxhash.xxh3_64_hexdigest(target) if not outcome else outcome.name)
        return answers

    async def write(self, descriptor: str, offset: int, length: int, *, seed: int = 0, times: int = 1,
                    deadline_s: float = 30.0, link: int = 0) -> list[str]:  # fmt: skip
        """Writes bytes [offset, offset + length) of the pattern of this seed there, so often; names of outcomes."""
        source = pattern(seed, offset, length)
        move = Move(self._attach(descriptor, link), offset, [Buffer.of(source.data)])
        return [(await self.links[link].write([move], deadline_s))[0].name for _ in range(times)]

    def _attach(self, descriptor: str, link: int) -> int:
        key = link, descriptor
        if key not in self._attached:
            self._attached[key] = self.links[link].attach(bytes.fromhex(descriptor))
        return self._attached[key]

    async def notify(self, note: str, deadline_s: float = 10.0, link: int = 0) -> None:
        """Sends a note."""
        await self.links[link].notify(bytes.fromhex(note), deadline_s)

    async def heard(self, count: int = 0) -> list[str]:
        """The notes that came, once there are so many."""
        while len(self.notes) < count:
            self._noted.clear()
            await self._noted.wait()
        return [note.hex() for note in self.notes]

    async def close_link(self, link: int = 0) -> None:
        """Closes a link."""
        await self.links[link].close()

    async def exit(self) -> None:
        """Closes everything; the process ends when it is told nothing more."""
        await self.transport.close()


async def _obey(told: Told, line: bytes) -> None:
    question: dict[str, Any] = json.loads(line)
    number, call = question.pop("id"), question.pop("call")
    try:
        answer: dict[str, Any] = {"id": number, "answer": await getattr(told, call)(**question)}
    except Exception as fault:  # noqa: BLE001 (whoever told it hears it)
        answer = {"id": number, "fault": type(fault).__name__, "message": str(fault)}
    _say(answer)


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


async def _main(name: str, host: str) -> None:
    reader = asyncio.StreamReader(limit=1 << 24)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    told = Told(name, host)
    _say({"address": told.transport.address.hex(), "usable": usable(name).why})
    calls: set[asyncio.Task[None]] = set()
    while line := await reader.readline():
        call = asyncio.create_task(_obey(told, line))
        calls.add(call)
        call.add_done_callback(calls.discard)
    for call in calls:
        call.cancel()
    await told.transport.close()


def die_with_parent() -> None:
    """From here on this process is killed when its parent dies."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() == 1:
        sys.exit(1)  # it died before


if __name__ == "__main__":
    die_with_parent()
    asyncio.run(_main(*sys.argv[1:3]))
