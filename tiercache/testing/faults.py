"""Fault wrappers: the same port in and out, with faults drawn from a seed or from a script.

A wrapper never breaks the contract of its port: what it lets out is what a real tier or origin may do on a bad day
(fail, hang, forget, come up short, find its bytes damaged). Scribbled targets come with the answer that allows them.
"""

from __future__ import annotations

import asyncio
import errno
import random
from collections import Counter, defaultdict
from enum import Enum
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

from tiercache.errors import ChangedError, OriginError, UnavailableError
from tiercache.model import Outcome
from tiercache.tier import Addressable, Health, Reclaiming, TierStatus

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterator, Mapping, Sequence

    import numpy as np
    import numpy.typing as npt

    from tiercache.buffers import Buffer
    from tiercache.model import Facts, Name, Payload
    from tiercache.origin import Origin, Span, Stat
    from tiercache.tier import Tier, Want

T = TypeVar("T")


class Fault(Enum):
    """One thing that goes wrong in one call. Those that an operation cannot have are ignored there."""

    ERROR = "fails before anything was done"
    LATE_ERROR = "fails after everything was done, and nobody learns that it was"
    NO_SPACE = "fails for want of space before anything was done"
    DELAY = "takes longer"
    STALL = "hangs: a tier until it is cancelled, an origin until its deadline"
    FULL = "tier write: some items find no room"
    BUSY = "tier read or write: some items are refused for now"
    VANISH = "tier write: some items are acknowledged, and forgotten a moment later; read: some are not there"
    SHORT = "read: only the first bytes arrive"
    CORRUPT = "read: wrong bytes arrive, and are noticed"
    CHANGED = "origin: the pinned version is gone"
    GONE = "origin: the object does not exist"


class Schedule(Protocol):
    """Which fault, if any, the next call of an operation meets."""

    rng: random.Random

    def draw(self, operation: str) -> Fault | None:
        """Called once for each call; `operation` is the name of the port's method."""
        ...


class Dice:
    """Faults at random: each drawn with its own probability, only while `on`."""

    def __init__(self, rng: random.Random, rates: Mapping[Fault, float], operations: Sequence[str] = ()) -> None:
        self.rng = rng
        self.on = True
        self._faults = list(rates)
        self._weights = [rates[fault] for fault in self._faults]
        self._operations = frozenset(operations)
        assert sum(self._weights) <= 1.0

    def draw(self, operation: str) -> Fault | None:
        if not self.on or (self._operations and operation not in self._operations):
            return None
        chance = self.rng.random()
        for fault, weight in zip(self._faults, self._weights):
            chance -= weight
            if chance < 0:
                return fault
        return None


class Script:
    """Faults in a given order: the faults of each operation's next calls, None for a good one; then all is well."""

    def __init__(self, steps: Mapping[str, Sequence[Fault | None]]) -> None:
        self.rng = random.Random(0)
        self._steps = {operation: list(faults) for operation, faults in steps.items()}

    def add(self, operation: str, *faults: Fault | None) -> None:
        """Appends faults to what the operation will meet."""
        self._steps.setdefault(operation, []).extend(faults)

    def draw(self, operation: str) -> Fault | None:
        faults = self._steps.get(operation)
        return faults.pop(0) if faults else None


class _Trouble:
    """What all wrappers share: drawing, counting, and the faults that concern a call as a whole."""

    def __init__(self, schedule: Schedule, *, delay_s: float, stall_s: float | None) -> None:
        self.schedule = schedule
        self.counts: Counter[tuple[str, Fault]] = Counter()
        self.calls: Counter[str] = Counter()
        self._delay_s = delay_s
        self._stall_s = stall_s

    def draw(self, operation: str) -> Fault | None:
        self.calls[operation] += 1
        fault = self.schedule.draw(operation)
        if fault is not None:
            self.counts[operation, fault] += 1
        return fault

    async def around(self, operation: str, fault: Fault | None, call: Awaitable[T]) -> T:
        """Awaits `call` with the faults that come before or after it; the call never starts where it must not."""
        try:
            if fault is Fault.ERROR:
                raise UnavailableError(f"injected: {operation} failed")
            if fault is Fault.NO_SPACE:
                raise UnavailableError(errno.ENOSPC, f"injected: no space for {operation}")
            if fault is Fault.DELAY:
                await asyncio.sleep(self.schedule.rng.uniform(0, self._delay_s))
            if fault is Fault.STALL:
                await self._stall(operation)
        except BaseException:
            close = getattr(call, "close", None)
            if close is not None:
                close()
            raise
        answer = await call
        if fault is Fault.LATE_ERROR:
            raise UnavailableError(f"injected: the answer of {operation} was lost")
        return answer

    async def _stall(self, operation: str) -> None:
        if self._stall_s is None:
            await asyncio.get_running_loop().create_future()
        else:
            await asyncio.sleep(self._stall_s)
        raise UnavailableError(f"injected: {operation} hung until its deadline")

    def some(self, count: int) -> set[int]:
        """A random, not empty, choice among `count` items."""
        if not count:
            return set()
        rng = self.schedule.rng
        return {rng.randrange(count)} | {i for i in range(count) if rng.random() < 0.5}


class FaultyTier:
    """A tier with faults. Give it a schedule; `counts` says which faults were met, `calls` how often it was called.

    `stall_s` None hangs a stalled call until it is cancelled. `health`, when set, replaces the inner tier's.
    """

    def __init__(self, inner: Tier, schedule: Schedule, *, delay_s: float = 0.05, stall_s: float | None = None) -> None:
        self.inner = inner
        self.name = inner.name
        self.trouble = _Trouble(schedule, delay_s=delay_s, stall_s=stall_s)
        self.health: Health | None = None

    @property
    def counts(self) -> Counter[tuple[str, Fault]]:
        """How often each operation met each fault."""
        return self.trouble.counts

    @property
    def calls(self) -> Counter[str]:
        """How often each operation was called."""
        return self.trouble.calls

    async def write(self, payloads: Sequence[Payload], sources: Sequence[Buffer]) -> list[int]:
        fault = self.trouble.draw("write")
        refused = self.trouble.some(len(payloads)) if fault in (Fault.FULL, Fault.BUSY) else set()
        outcome = Outcome.BUSY if fault is Fault.BUSY else Outcome.FULL
        going = [i for i in range(len(payloads)) if i not in refused]
        try:
            locations = await self.trouble.around(
                "write", fault, self.inner.write([payloads[i] for i in going], [sources[i] for i in going])
            )
        except UnavailableError:
            # After a LATE_ERROR the bytes lie in the tier and nobody knows where: as after a lost answer, only a scan
            # would find them. The wrapper cannot free them either.
            raise
        if fault is Fault.VANISH:
            lost = self.trouble.some(len(locations))
            self.inner.free([locations[i] for i in lost if locations[i] >= 0])
        answers = dict(zip(going, locations))
        return [answers.get(i, outcome) for i in range(len(payloads))]

    async def read(
        self, wants: Sequence[Want], targets: Sequence[Buffer], digests: list[bytes] | None = None
    ) -> list[Outcome]:
        fault = self.trouble.draw("read")
        outcomes = await self.trouble.around("read", fault, self.inner.read(wants, targets, digests))
        bad = {
            Fault.BUSY: Outcome.BUSY,
            Fault.VANISH: Outcome.MISS,
            Fault.SHORT: Outcome.MISS,
            Fault.CORRUPT: Outcome.CORRUPT,
        }
        if fault in bad:
            outcomes = list(outcomes)
            for i in self.trouble.some(len(wants)):
                _scribble_parts(wants[i], targets[i], first=1 if fault is Fault.SHORT else 0)
                outcomes[i] = bad[fault]
                if digests is not None:
                    digests[i] = b""
        return outcomes

    def free(self, locations: Sequence[int]) -> None:
        self.inner.free(locations)

    def scan(self) -> Iterator[Facts]:
        fault = self.trouble.draw("scan")
        if fault in (Fault.ERROR, Fault.LATE_ERROR):
            raise UnavailableError("injected: scan failed")
        return self.inner.scan()

    async def flush(self) -> None:
        await self.trouble.around("flush", self.trouble.draw("flush"), self.inner.flush())

    async def close(self) -> None:
        await self.inner.close()

    def status(self) -> TierStatus:
        status = self.inner.status()
        if self.health is None:
            return status
        facts = {field: getattr(status, field) for field in status.__slots__}
        return TierStatus(**{**facts, "health": self.health, "reason": "injected"})


class FaultyMemory(FaultyTier):
    """A faulty tier with the extent allocator port: reservations may find no room."""

    inner: Tier

    @property
    def entry_bytes_max(self) -> int:
        return self._extents.entry_bytes_max

    def reserve(
        self, names: Sequence[Name], sizes: Sequence[int], part_bytes: Sequence[int], *, sparse: bool = False
    ) -> list[int]:
        refused = self.trouble.some(len(names)) if self.trouble.draw("reserve") is Fault.FULL else set()
        going = [i for i in range(len(names)) if i not in refused]
        locations = self._extents.reserve(
            [names[i] for i in going], [sizes[i] for i in going], [part_bytes[i] for i in going], sparse=sparse
        )
        answers = dict(zip(going, locations))
        return [answers.get(i, Outcome.FULL) for i in range(len(names))]

    def buffers(self, locations: Sequence[int]) -> list[Buffer]:
        return self._extents.buffers(locations)

    def digests(self, locations: Sequence[int]) -> list[bytes]:
        return self._extents.digests(locations)

    def commit(self, locations: Sequence[int], parts: Sequence[int], digests: Sequence[bytes]) -> None:
        self._extents.commit(locations, parts, digests)

    def payloads(self, locations: Sequence[int]) -> list[Payload]:
        return self._extents.payloads(locations)

    def copy_out(
        self,
        locations: Sequence[int],
        targets: Sequence[Buffer],
        spans: Sequence[range] | None = None,
        *,
        verify: bool = True,
    ) -> list[Outcome]:
        return self._extents.copy_out(locations, targets, spans, verify=verify)

    @property
    def _extents(self) -> Addressable:
        return cast("Addressable", self.inner)


class _Finding(Protocol):
    """What a tier that outlives its process adds."""

    async def find(self, names: Sequence[Name]) -> Facts: ...

    def note_order(self, locations: npt.NDArray[np.int64], ticks: npt.NDArray[np.uint32]) -> None: ...


class FaultyLog(FaultyTier):
    """A faulty tier that reclaims its space: a reclaim may fail, hang or lose what it should keep."""

    @property
    def segment_bytes(self) -> int:
        """As the inner tier's."""
        return self._log.segment_bytes

    def victim(self) -> list[int]:
        return self._log.victim()

    async def reclaim(self, keep: Sequence[int], drop: Sequence[int]) -> list[tuple[int, int]]:
        fault = self.trouble.draw("reclaim")
        pairs = await self.trouble.around("reclaim", fault, self._log.reclaim(keep, drop))
        if fault in (Fault.VANISH, Fault.FULL):
            lost = self.trouble.some(len(pairs))
            self.inner.free([pairs[i][1] for i in lost])
            pairs = [pair for i, pair in enumerate(pairs) if i not in lost]
        return pairs

    async def find(self, names: Sequence[Name]) -> Facts:
        """Facts of names before the scan has ended, where the inner tier can tell."""
        return await self.trouble.around("find", self.trouble.draw("find"), self._finding.find(names))

    def note_order(self, locations: npt.NDArray[np.int64], ticks: npt.NDArray[np.uint32]) -> None:
        """The order of last use, where the inner tier remembers it."""
        self._finding.note_order(locations, ticks)

    @property
    def _log(self) -> Reclaiming:
        return cast("Reclaiming", self.inner)

    @property
    def _finding(self) -> _Finding:
        return cast("_Finding", self.inner)


def faulty(tier: Tier, schedule: Schedule, *, delay_s: float = 0.05, stall_s: float | None = None) -> FaultyTier:
    """Wraps a tier in the faulty one with the same capabilities."""
    kind = FaultyLog if isinstance(tier, Reclaiming) else FaultyMemory if isinstance(tier, Addressable) else FaultyTier
    return kind(tier, schedule, delay_s=delay_s, stall_s=stall_s)


class FaultyOrigin:
    """An origin with faults. A stalled call ends at `deadline_s` with UnavailableError, as the port demands.

    `requests` counts the ranged reads of each path; `reads` has them in order, with their spans.
    """

    def __init__(
        self, inner: Origin, schedule: Schedule, *, delay_s: float = 0.05, deadline_s: float | None = 30.0
    ) -> None:
        self.inner = inner
        self.identity = inner.identity
        self.trouble = _Trouble(schedule, delay_s=delay_s, stall_s=deadline_s)
        self.reads: list[tuple[Stat, Span]] = []
        self.requests: defaultdict[str, int] = defaultdict(int)

    @property
    def counts(self) -> Counter[tuple[str, Fault]]:
        """How often each operation met each fault."""
        return self.trouble.counts

    @property
    def calls(self) -> Counter[str]:
        """How often each operation was called."""
        return self.trouble.calls

    async def stat(self, paths: Sequence[str]) -> list[Stat | Outcome]:
        fault = self.trouble.draw("stat")
        answers = await self.trouble.around("stat", fault, self.inner.stat(paths))
        if fault is Fault.GONE:
            answers = list(answers)
            for i in self.trouble.some(len(answers)):
                answers[i] = Outcome.GONE
        return answers

    async def delete(self, paths: Sequence[str]) -> list[Outcome]:
        return await self.trouble.around("delete", self.trouble.draw("delete"), self.inner.delete(paths))

    async def list(self, path: str) -> list[Stat] | Outcome:
        fault = self.trouble.draw("list")
        answer = await self.trouble.around("list", fault, self.inner.list(path))
        return Outcome.GONE if fault is Fault.GONE else answer

    async def read(self, stat: Stat, span: Span, targets: Sequence[Buffer]) -> None:
        self.reads.append((stat, span))
        self.requests[stat.path] += 1
        fault = self.trouble.draw("read")
        try:
            await self.trouble.around("read", fault, self.inner.read(stat, span, targets))
        except UnavailableError:
            _scribble(targets, 0)
            raise
        if fault is Fault.SHORT:
            _scribble(targets, span.length // 2)
            raise UnavailableError(f"injected: {stat.path}: the answer ended after {span.length // 2} bytes")
        if fault in (Fault.CORRUPT, Fault.GONE):
            _scribble(targets, 0)
            raise OriginError(f"injected: {stat.path}: malformed answer")
        if fault is Fault.CHANGED:
            _scribble(targets, 0)
            raise ChangedError(f"injected: {stat.path} changed")

    async def read_tail(self, path: str, length: int) -> tuple[Stat, bytes] | Outcome:
        fault = self.trouble.draw("read_tail")
        answer = await self.trouble.around("read_tail", fault, self.inner.read_tail(path, length))
        if fault in (Fault.SHORT, Fault.CORRUPT):
            raise OriginError(f"injected: {path}: malformed answer")
        return Outcome.GONE if fault is Fault.GONE else answer

    async def write(self, path: str, data: bytes | memoryview) -> Stat:
        return await self.trouble.around("write", self.trouble.draw("write"), self.inner.write(path, data))

    async def close(self) -> None:
        await self.inner.close()


def _scribble_parts(want: Want, target: Buffer, *, first: int) -> None:
    """Damages the wanted parts of a target from the `first`-th on; parts that were not wanted are left alone."""
    wanted = [i for i in range(want.parts.bit_length()) if want.parts >> i & 1]
    for part in wanted[first:]:
        start = part * want.part_bytes
        stop = min(want.size, start + want.part_bytes)
        if stop > start:
            target.slice(start, stop - start).array()[:] ^= 0x5A


def _scribble(targets: Sequence[Buffer], start: int) -> None:
    """Damages the bytes of `targets`, taken as one, from `start` on."""
    for target in targets:
        length = len(target)
        if start < length:
            target.slice(start, length - start).array()[:] ^= 0xA5
        start = max(0, start - length)
