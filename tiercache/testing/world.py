"""A whole cache in a simulation: memory, SSD on a simulated disk, an origin, faults on all three, and what is true.

A `World` is opened, used, cut from power and opened again; actors of a simulation work on it and compare every byte
that they get with the only right one. Values are functions of their names, so each actor knows the truth by itself.
"""

from __future__ import annotations

import asyncio
import errno
from typing import TYPE_CHECKING

import numpy as np

from tiercache.cache import Cache
from tiercache.cpu.tier import MemoryTier
from tiercache.index import Index
from tiercache.keys import chain, namespace, page_key
from tiercache.lease import PageRun
from tiercache.metrics import Metrics
from tiercache.model import Outcome, State, all_parts
from tiercache.origin import Span
from tiercache.policy import POLICIES
from tiercache.settings import Settings
from tiercache.testing.faults import Dice, Fault, FaultyMemory, FaultyOrigin, faulty
from tiercache.testing.model import DictOrigin, ForgetfulDict, ModelError, check_caps, made_bytes
from tiercache.testing.simloop import SimClock, SimLoop, derive

if TYPE_CHECKING:
    import random
    from collections.abc import Mapping, Sequence

    from tiercache.lease import Gap, Landed, Lease, Load
    from tiercache.origin import Stat
    from tiercache.testing.faults import FaultyTier
    from tiercache.testing.simdisk import SimDisk

PART_BYTES = 4096
PAGE_BYTES = 4 * PART_BYTES
KIB, MIB = 1 << 10, 1 << 20
DIRECTORY = "/cache"
PLACES = ("memory", "ssd", "disk", "origin")
"""Where faults can be: the two tiers' ports, the disk under the SSD tier, the origin."""
SSD_DEADLINE_S = 2.0
ORIGIN_DEADLINE_S = 30.0


class World:
    """One cache with everything around it. `memory_bytes` and `ssd_bytes` are caps of the tiers; no SSD when it is 0.

    Faults are off until `faults_on`; `rates` are chances a call, by place (see PLACES).
    """

    def __init__(
        self,
        loop: SimLoop,
        *,
        memory_bytes: int = 256 * KIB,
        ssd_bytes: int = 9 * MIB,
        segment_bytes: int = MIB,
        slots_max: int = 1024,
        rates: Mapping[str, Mapping[Fault, float]] | None = None,
    ) -> None:
        self.loop, self.clock = loop, SimClock(loop)
        self.memory_bytes, self.slots_max = memory_bytes, slots_max
        self.model = ForgetfulDict()
        self.leases: list[Lease] = []
        self.settings = Settings(
            directory=DIRECTORY,
            memory_bytes=2 * MIB,
            ssd_bytes=ssd_bytes,
            page_bytes=64 * KIB,
            segment_bytes=segment_bytes,
            queue_bytes=min(memory_bytes, MIB),
            ssd_deadline_s=SSD_DEADLINE_S,
            disk_free_floor_bytes=0,
        )
        rates = rates or {}
        self.dice = {name: Dice(derive(loop.seed, "faults", name), rates.get(name, {})) for name in PLACES}
        self.origin = FaultyOrigin(DictOrigin(), self.dice["origin"], deadline_s=ORIGIN_DEADLINE_S)
        self.disk: SimDisk | None = None
        self.cache: Cache | None = None
        self.faults_off()

    # -- life ----------------------------------------------------------------------------------------------------------

    async def open(self) -> Cache:
        """Opens the cache on what the disk has; the disk is well while it opens."""
        assert self.cache is None
        self.faults_off("disk")
        ssd = self._open_ssd() if self.settings.ssd_bytes else None
        memory = FaultyMemory(MemoryTier(self.memory_bytes, shareable=False), self.dice["memory"])
        policies = [POLICIES[self.settings.policy]() for _ in range(1 if ssd is None else 2)]
        self.index = Index(self.slots_max, policies)
        self.memory, self.ssd = memory, ssd
        self.cache = Cache(
            self.index,
            memory,
            ssd,
            settings=self.settings,
            clock=self.clock,
            metrics=Metrics(),
        )
        await self.cache.start()
        return self.cache

    def _open_ssd(self) -> FaultyTier:
        from tiercache.ssd.tier import SsdTier
        from tiercache.testing.simdisk import SimDisk

        if self.disk is None:
            self.disk = SimDisk(derive(self.loop.seed, "disk"))
            self.disk.on_note = self._disk_fault
        tier = SsdTier(
            DIRECTORY,
            self.settings.ssd_bytes,
            segment_bytes=self.settings.segment_bytes,
            files_max=self.settings.ssd_files_max,
            threads=2,
            deadline_s=self.settings.ssd_deadline_s,
            clock=self.clock,
            io=self.disk,
        )
        return faulty(tier, self.dice["ssd"], stall_s=SSD_DEADLINE_S)

    def _disk_fault(self, operation: str) -> None:
        """Lets an operation of the disk fail as drawn."""
        fault = self.dice["disk"].draw(operation)
        if fault is not None:
            code = errno.ENOSPC if fault is Fault.NO_SPACE else errno.EIO
            raise OSError(code, f"injected: {operation}")

    def rot(self, rng: random.Random) -> None:
        """Flips one bit somewhere in a segment file."""
        assert self.disk is not None
        paths = [path for path, file in sorted(self.disk.files.items()) if path.endswith(".seg") and file.seen]
        if paths:
            path = rng.choice(paths)
            self.disk.flip(path, rng.randrange(len(self.disk.files[path].seen)), rng.randrange(8))

    async def close(self) -> None:
        """Closes in order."""
        assert self.cache is not None
        self.drop_leases()
        await self.cache.close()
        self.cache = None

    async def power_cut(self) -> None:
        """The machine loses power: every task of the cache ends where it is, the disk keeps what it must and a random
        part of the rest."""
        assert self.cache is not None and self.disk is not None
        self.drop_leases()
        self.loop.lose_threads()
        self.disk.power_cut()
        here = asyncio.current_task()
        others = [task for task in asyncio.all_tasks(self.loop) if task is not here]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        self.loop.lose_threads()
        await self.memory.close()
        self.cache = None
        self.model.forget()

    def faults_on(self, *names: str) -> None:
        """Lets faults happen, in these places or everywhere."""
        for name in names or self.dice:
            self.dice[name].on = True

    def faults_off(self, *names: str) -> None:
        """No more faults."""
        for name in names or self.dice:
            self.dice[name].on = False

    # -- what is true --------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """What must hold at every step: caps, the index's invariants, bytes under leases."""
        statuses = [self.memory.status()] + ([self.ssd.status()] if self.ssd is not None else [])
        check_caps(statuses)
        self.index.validate()
        self.model.check_held()

    async def check_quiet(self) -> None:
        """What must hold when nobody uses the cache: nothing pinned, nothing half-done, nothing under way."""
        self.drop_leases()
        assert self.cache is not None
        self.cache.tiers.drain()
        self.check()
        # An injected fault of the scan is the one that a background task may end with.
        injected = sum(n for (call, _), n in self.ssd.counts.items() if call == "scan") if self.ssd is not None else 0
        if self.cache.metrics.value("tiercache_internal_errors_total") > injected:
            raise ModelError("a background task of the cache failed: its log says why")
        if len(self.cache._filling.flights):
            raise ModelError("loads are under way and nobody waits for them")
        states = np.asarray(self.index.state)
        childless = np.asarray(self.index._slots.kids) == 0  # a block that was lost stays as a hole above its children
        for state in (State.PENDING, State.MOVING, State.EVICTING):
            left = np.flatnonzero((states == state) & (childless | (states != State.EVICTING)))
            if len(left):
                raise ModelError(f"slots {left[:5].tolist()} are {state.name} though nobody uses the cache")
        pinned = np.flatnonzero(np.asarray(self.index.pin))
        if len(pinned):
            raise ModelError(f"slots {pinned[:5].tolist()} are pinned though nobody holds a lease")

    def drop_leases(self) -> None:
        """Gives every lease and view of `self.leases` and the model back."""
        for lease in self.leases:
            lease.release()
        self.leases.clear()
        for number in self.model.held:
            self.model.let_go(number)

    # -- pages ---------------------------------------------------------------------------------------------------------

    def publish(self, path: str, version: int, size: int) -> Stat:
        """Makes `path` this version of itself at the origin."""
        inner = self.origin.inner
        assert isinstance(inner, DictOrigin)
        return inner.set(path, made_bytes((path, version), size))

    def page_run(self, stat: Stat, *, expiry_s: int = 0) -> PageRun:
        """The cache's view of one version of a file."""
        key = page_key(self.origin.identity, stat.path, stat.version, PAGE_BYTES, PART_BYTES)
        return PageRun(key, stat.size, PAGE_BYTES, PART_BYTES, expiry_s=expiry_s)

    def loader(self, stat: Stat, run: PageRun) -> Load:
        """A Load that reads each gap from the origin, at the same time, one request for each run of parts."""

        async def fetch(gap: Gap, index: int, landed: Landed) -> None:
            size = run.page_size(gap.ordinal)
            for start, stop in part_spans(gap.parts, size):
                span = Span(gap.ordinal * run.page_bytes + start, stop - start)
                await self.origin.read(stat, span, [gap.target.slice(start, stop - start)])
            landed([index])

        async def load(gaps: Sequence[Gap], landed: Landed) -> None:
            tasks = [self.loop.create_task(fetch(gap, index, landed)) for index, gap in enumerate(gaps)]
            try:
                await asyncio.gather(*tasks)
            finally:
                # Nobody may write to a target after this has ended.
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

        return load

    def check_page(self, lease: Lease, item: int, label: object, run: PageRun, ordinal: int, parts: int) -> None:
        """Raises ModelError unless the wanted parts of a leased page are those of the file called `label`."""
        truth = made_bytes(label, run.size)[ordinal * run.page_bytes :][: run.page_size(ordinal)]
        view = lease.view(item)
        for start, stop in part_spans(parts, len(truth)):
            if bytes(view[start:stop]) != truth[start:stop]:
                raise ModelError(f"{label!r} page {ordinal}: wrong bytes from {start} to {stop}")

    def whole_page(self, run: PageRun, ordinal: int) -> int:
        """Map of all parts of a page."""
        return all_parts(run.page_size(ordinal), run.part_bytes)

    def on_ssd(self) -> int:
        """How many slots have a copy on the SSD."""
        slots = np.arange(len(np.asarray(self.index.state)), dtype=np.int64)
        return int((self.index.facts(slots).ssd_location >= 0).sum()) if self.ssd is not None else 0


class Chains:
    """Chains of blocks with common beginnings: chain c is its digests and the values that they stand for."""

    def __init__(self, seed: object, *, chains: int = 4, blocks: int = 10, width: int = 16) -> None:
        self.digests: list[list[bytes]] = []
        space = namespace("chains", str(width))
        for number in range(chains):
            shared = min(number, 3) * 2
            chunks = [f"{seed}/{0 if block < shared else number}/{block}".encode() for block in range(blocks)]
            self.digests.append(chain(space, chunks, collision_resistant=width == 32))

    def value(self, digest: bytes) -> bytes:
        """The one right value of a block; sizes differ."""
        return made_bytes(digest, 500 + digest[0] * 40)

    def check(self, lease: Lease, digests: Sequence[bytes]) -> None:
        """Raises ModelError unless the lease is a prefix of the chain with the right bytes."""
        if len(lease) > len(digests):
            raise ModelError(f"{len(lease)} of {len(digests)} blocks were matched")
        for i, digest in enumerate(digests[: len(lease)]):
            if lease.outcomes[i] is not Outcome.HIT or bytes(lease.view(i)) != self.value(digest):
                raise ModelError(f"block {i} of a chain is {lease.outcomes[i].name} or has wrong bytes")


def part_spans(parts: int, size: int) -> list[tuple[int, int]]:
    """Byte ranges [start, stop) of the runs of adjacent parts in a map, of an entry of `size` bytes."""
    spans: list[tuple[int, int]] = []
    for part in range(parts.bit_length()):
        if parts >> part & 1:
            start, stop = part * PART_BYTES, min(size, (part + 1) * PART_BYTES)
            if spans and spans[-1][1] == start:
                spans[-1] = (spans[-1][0], stop)
            else:
                spans.append((start, stop))
    return spans
