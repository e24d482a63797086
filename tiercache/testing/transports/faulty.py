"""FaultyTransport: any transport, with faults drawn from a seed or from a script (see tiercache.testing.faults).

What it lets out is what a real network may do on a bad day. A link that raised is dead, as the port says.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING, TypeVar

from tiercache.errors import UnavailableError
from tiercache.model import Outcome
from tiercache.testing.faults import Fault
from tiercache.transport import Memory

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from tiercache.buffers import Buffer
    from tiercache.testing.faults import Schedule
    from tiercache.transport import Link, Move, Transport

T = TypeVar("T")


class FaultyTransport:
    """A transport with faults in `connect`, and in `read`, `write` and `notify` of its links.

    ERROR, LATE_ERROR and STALL (which hangs until the call's deadline) kill the link; DELAY takes up to `delay_s`.
    Reads only: VANISH makes some moves a MISS, with garbage in their pieces; CORRUPT and SHORT bring wrong bytes and
    say HIT, since a transport does not vouch for what it moves.
    """

    def __init__(self, inner: Transport, schedule: Schedule, *, delay_s: float = 0.05) -> None:
        self.inner, self.schedule, self.delay_s = inner, schedule, delay_s
        self.name = inner.name
        self.counts: Counter[tuple[str, Fault]] = Counter()
        """How often each operation met each fault."""

    @property
    def address(self) -> bytes:
        return self.inner.address

    def expose(self, memory: Buffer, *, writable: bool = False, kind: Memory = Memory.HOST, file: int = -1) -> bytes:
        return self.inner.expose(memory, writable=writable, kind=kind, file=file)

    def withdraw(self, descriptor: bytes) -> None:
        self.inner.withdraw(descriptor)

    async def connect(self, address: bytes, deadline_s: float) -> Link:
        fault = self.draw("connect")
        link = await self.around(fault, lambda: self.inner.connect(address, deadline_s), deadline_s)
        if fault is Fault.LATE_ERROR:
            await link.close()
            raise UnavailableError("injected: the answer was lost")
        return FaultyLink(link, self)

    async def close(self) -> None:
        await self.inner.close()

    def draw(self, operation: str) -> Fault | None:
        """What the next call of this operation meets, counted."""
        fault = self.schedule.draw(operation)
        if fault is not None:
            self.counts[operation, fault] += 1
        return fault

    async def around(self, fault: Fault | None, call: Callable[[], Awaitable[T]], deadline_s: float) -> T:
        """Calls, with the fault that comes before; raises it where nothing may be done."""
        if fault is Fault.ERROR:
            raise UnavailableError("injected: the call failed")
        if fault is Fault.DELAY:
            await asyncio.sleep(self.schedule.rng.uniform(0, self.delay_s))
        if fault is Fault.STALL:
            await asyncio.sleep(deadline_s)
            raise UnavailableError("injected: the call hung until its deadline")
        return await call()


class FaultyLink:
    """A link of a FaultyTransport."""

    def __init__(self, inner: Link, transport: FaultyTransport) -> None:
        self.inner = inner
        self._transport = transport
        self._dead = False

    @property
    def negotiated(self) -> str:
        return self.inner.negotiated

    @property
    def pushes(self) -> bool:
        return self.inner.pushes

    def attach(self, descriptor: bytes) -> int:
        return self.inner.attach(descriptor)

    async def read(self, moves: Sequence[Move], deadline_s: float) -> list[Outcome]:
        fault = self._transport.draw("read")
        outcomes = await self._call(fault, lambda: self.inner.read(moves, deadline_s), deadline_s)
        if fault in (Fault.VANISH, Fault.CORRUPT, Fault.SHORT) and moves:
            rng = self._transport.schedule.rng
            for at in {rng.randrange(len(moves)), *[i for i in range(len(moves)) if rng.random() < 0.3]}:
                for piece in moves[at].pieces[-1:] if fault is Fault.SHORT else moves[at].pieces:
                    _spoil(piece, rng.randrange(piece.length or 1), to_the_end=fault is not Fault.CORRUPT)
                if fault is Fault.VANISH:
                    outcomes[at] = Outcome.MISS
        return outcomes

    async def write(self, moves: Sequence[Move], deadline_s: float) -> list[Outcome]:
        fault = self._transport.draw("write")
        return await self._call(fault, lambda: self.inner.write(moves, deadline_s), deadline_s)

    async def notify(self, note: bytes, deadline_s: float) -> None:
        fault = self._transport.draw("notify")
        await self._call(fault, lambda: self.inner.notify(note, deadline_s), deadline_s)

    async def close(self) -> None:
        self._dead = True
        await self.inner.close()

    async def _call(self, fault: Fault | None, call: Callable[[], Awaitable[T]], deadline_s: float) -> T:
        if self._dead:
            raise UnavailableError("the link is dead")
        try:
            answer = await self._transport.around(fault, call, deadline_s)
            if fault is Fault.LATE_ERROR:
                raise UnavailableError("injected: the answer was lost")
        except UnavailableError:
            self._dead = True
            raise
        return answer


def _spoil(piece: Buffer, start: int, *, to_the_end: bool) -> None:
    """Makes the byte at `start` another one, or all from there on."""
    if piece.length:
        piece.array()[start : piece.length if to_the_end else start + 1] ^= 0x5A
