"""SsdTier: the SSD as a place that keeps bytes; batches in, jobs for a few threads, answers out, within a deadline."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import numpy as np

from tiercache.clock import SystemClock
from tiercache.errors import ClosedError, UnavailableError
from tiercache.model import Outcome
from tiercache.ssd import recover
from tiercache.ssd import rows as codec
from tiercache.ssd.disk import Disk
from tiercache.ssd.fileio import FileIO, check_user
from tiercache.ssd.records import BLOCK_BYTES, GENERATION_MASK, fits, record_blocks, split_locations
from tiercache.ssd.scan import Recovery
from tiercache.ssd.segments import RECLAIMS, WRITES, Life, Segment
from tiercache.ssd.transfer import MoveItem, ReadItem, WriteItem, plan_moves, plan_reads, plan_writes
from tiercache.tier import Health, TierStatus

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    from tiercache.buffers import Buffer
    from tiercache.clock import Clock
    from tiercache.model import Facts, Name, Payload
    from tiercache.tier import Want

COMMIT_BYTES = 256 << 20
"""So much may be written before rows are saved without anybody asking: what a crash forgets at most."""
MOVE_BYTES = 8 << 20
"""Reclaim has about so much on its way at a time."""


class SsdTier:
    """Payloads in segment files of one directory, which this process owns while the tier is open.

    `capacity_bytes` and `files_max` are hard: they cover segments (in full, from before they are created), rows and
    small files. An entry larger than a segment does not fit (FULL). One batch of reads or writes takes at most
    `deadline_s`; what is not done by then is BUSY, and a late answer of the disk reaches no caller's memory (see
    transfer.py). Made in any thread, used on one event loop; `free`, `status`, `scan`, `room_bytes` are for any thread.

    Raises LockedError, ProtocolError or ConfigError as recover.open_directory says, and UnavailableError if the
    directory cannot be used, or is another user's and not of a `group`: then nothing is written.
    """

    name = "ssd"

    def __init__(
        self,
        directory: str,
        capacity_bytes: int,
        *,
        files_max: int = 10_000,
        segment_bytes: int = 0,
        threads: int = 8,
        deadline_s: float = 10.0,
        disk_free_floor_bytes: int = 0,
        group: bool = False,
        clock: Clock | None = None,
        io: FileIO | None = None,
    ) -> None:
        check_user(directory, group=group)
        io = io or FileIO()
        caps = recover.Caps(capacity_bytes, files_max, segment_bytes, disk_free_floor_bytes)
        try:
            opened = recover.open_directory(io, os.path.abspath(directory), caps)
            self._recovery = Recovery(opened)
        except UnavailableError:
            raise
        except OSError as fault:
            raise UnavailableError(f"the SSD tier cannot use {directory}: {fault}") from fault
        self._disk = Disk(io, opened, caps, threads=threads, deadline_s=deadline_s, clock=clock or SystemClock())
        self._space = opened.space
        self._reclaim_lock = asyncio.Lock()
        self._unsaved_bytes = 0
        self._saving: asyncio.Future[None] | None = None
        self._closed = False
        self._losses_told = 0
        self.counters = opened.counters
        """What happened so far: reads, hits, writes, corrupt, faults, deadlines, reclaims, damage found at opening."""

    # -- the Tier port

    async def write(self, payloads: Sequence[Payload], sources: Sequence[Buffer]) -> list[int]:
        """Stores payloads: their locations, or FULL (no room, or can never fit) or BUSY (the disk is not well)."""
        disk = self._enter()
        if disk.pulse.health is not Health.HEALTHY:
            return [int(Outcome.BUSY)] * len(payloads)
        fitting = [i for i, payload in enumerate(payloads) if fits(payload)]
        lengths = [record_blocks(p.parts, p.part_bytes, p.size) for p in map(payloads.__getitem__, fitting)]
        places = await disk.reserve(WRITES, lengths, [payloads[i].parts for i in fitting])
        answers = [self._refusal()] * len(payloads)
        items = [
            WriteItem(index, payloads[index], sources[index], place)
            for index, place in zip(fitting, places, strict=True)
            if place is not None
        ]
        jobs = plan_writes(items, disk.writer_ended)
        self._space.writers([job.segment for job in jobs], 1)
        completed = False
        try:
            await disk.write(jobs)
            completed = True
        finally:
            for job in jobs:
                good = disk.finish_write(job) and completed
                kept = [item.payload if good else None for item in job.items]
                locations = self._space.settle([item.place for item in job.items], kept)
                for item, location in zip(job.items, locations, strict=True):
                    answers[item.index] = location if good else int(Outcome.BUSY)
                self._unsaved_bytes += job.blocks * BLOCK_BYTES if good else 0
        self.counters["writes"] += len(items)
        if self._unsaved_bytes >= COMMIT_BYTES:
            await self._save()
            answers = [at if at < 0 or self._space.look(at) else int(Outcome.BUSY) for at in answers]
        return answers

    async def _save(self) -> None:
        """Has rows saved in the background; waits only if writes run away from it."""
        if self._saving is None or self._saving.done():
            self._saving = asyncio.ensure_future(self._commit_quietly())
        elif self._unsaved_bytes >= 2 * COMMIT_BYTES:
            await asyncio.wait([self._saving])

    def _refusal(self) -> int:
        return int(Outcome.FULL if self._disk.pulse.health is Health.HEALTHY else Outcome.BUSY)

    async def _commit_quietly(self) -> None:
        self._unsaved_bytes = 0
        try:
            await self._disk.flush()
        except UnavailableError:
            self.counters["commit_faults"] += 1

    async def read(
        self, wants: Sequence[Want], targets: Sequence[Buffer], digests: list[bytes] | None = None
    ) -> list[Outcome]:
        """Fills targets with verified parts: HIT, MISS, BUSY (deadline) or CORRUPT (and then gone for good)."""
        disk = self._enter()
        answers = [Outcome.MISS] * len(wants)
        rows = [b""] * len(wants) if digests is None else digests
        rows[:] = [b""] * len(wants)
        if disk.pulse.health is Health.OFF:
            return answers
        found = self._found(wants, targets)
        jobs = plan_reads(found)
        await disk.read(jobs)
        for job in jobs:
            if job.fault is not None:
                self.counters["read_faults"] += 1
                disk.pulse.read_failed(job.fault)
                for item in job.items():
                    item.outcome = Outcome.MISS if item.outcome is Outcome.BUSY else item.outcome
        for _, item in found:
            answers[item.index] = self._judge(item)
            if answers[item.index] is Outcome.HIT:
                rows[item.index] = item.rows
        self.counters["reads"] += len(wants)
        return answers

    def _found(self, wants: Sequence[Want], targets: Sequence[Buffer]) -> list[tuple[Segment, ReadItem]]:
        """Those of `wants` that live, with where they lie."""
        found: list[tuple[Segment, ReadItem]] = []
        with self._space.lock:
            for index, (want, target) in enumerate(zip(wants, targets, strict=True)):
                record = self._space.look(want.location)
                if record is not None and not want.parts & ~record.parts:
                    assert target.length >= want.size, (target.length, want.size)
                    found.append((record.segment, ReadItem(index, want, target, record.block, record.parts)))
        return found

    def read_here(self, wants: Sequence[Want], targets: Sequence[Buffer], digests: list[bytes]) -> list[Outcome]:
        """See Answering. The reads run in the tier's threads all the same, so that a hanging disk holds those alone."""
        disk = self._disk
        refused = [Outcome.MISS] * len(wants)
        if self._closed or disk.pulse.health is Health.OFF:
            return refused
        found = self._found(wants, targets)
        if len(found) < len(wants) or not disk.read_here(plan_reads(found)):
            return refused
        outcomes = [item.outcome for _, item in found]
        if all(outcome is Outcome.HIT for outcome in outcomes):
            disk.pulse.read_ok()
            self.counters["hits"] += len(found)
            self.counters["reads"] += len(found)
            digests[:] = [item.rows for _, item in found]
        return outcomes

    def _judge(self, item: ReadItem) -> Outcome:
        if item.outcome is Outcome.HIT:
            self.counters["hits"] += 1
            self._disk.pulse.read_ok()
        elif item.outcome is Outcome.CORRUPT:
            if not self._space.bury([item.want.location]):
                return Outcome.MISS  # freed, and perhaps overwritten, while it was being read
            self.counters["corrupt"] += 1
        return item.outcome

    def free(self, locations: Sequence[int]) -> None:
        """Gives records up; the tombstones become durable with the next commit, the space comes back by segment."""
        self._space.bury(locations)

    def scan(self) -> Iterator[Facts]:
        """What was found at opening and still lives; see Recovery."""
        return self._recovery.scan()

    async def find(self, names: Sequence[Name]) -> Facts:
        """Facts of those of `names` that were found at opening; for look-ups before a scan is through."""
        disk = self._enter()
        return await asyncio.get_running_loop().run_in_executor(disk.committer, self._recovery.find, list(names))

    async def flush(self) -> None:
        """Returns when every write and free before the call is durable. Raises UnavailableError if that cannot be:
        what could not be made durable is either tried again by the next flush, or given up, and then `lost` names it.
        What a commit in the background gave up is told so too, by every flush until one ended that told it."""
        disk, told = self._enter(), self._losses_told
        self._unsaved_bytes = 0
        try:
            await disk.flush()
        except UnavailableError:
            self._losses_told = disk.losses
            raise
        if disk.losses > told:
            self._losses_told = disk.losses
            raise UnavailableError("the disk lost what had been written: it is forgotten")

    def lost(self) -> list[int]:
        """Locations that `write` had answered and that the tier gave up by itself since the last call, because a sync
        failed; for any thread. They may name what was freed meanwhile. Call it after every flush, also after one that
        raised, when the answers of earlier writes are noted, and forget those copies."""
        return self._disk.take_lost()

    async def close(self) -> None:
        """Flushes if the disk lets it, and gives everything back but what a hanging disk still holds."""
        if self._closed:
            return
        self._unsaved_bytes = 0
        try:
            await self._enter().flush()
        except (UnavailableError, ClosedError):
            self.counters["commit_faults"] += 1
        if self._saving is not None:
            await asyncio.wait([self._saving])
        if self._close_once():
            self._disk.close()

    def _close_once(self) -> bool:
        was, self._closed = self._closed, True
        return not was

    def status(self) -> TierStatus:
        """Usage now. Used bytes are whole segments that hold something, the rows and the small files; used files are
        all that exist. Empty segment files are kept for reuse, and are within the caps like all others."""
        disk = self._disk
        rows_bytes, rows_files = disk.rows_usage
        return TierStatus(
            self.name,
            Health.OFF if self._closed else disk.pulse.health,
            disk.caps.capacity_bytes,
            self._space.used_count() * self._space.segment_bytes + rows_bytes + recover.OTHER_BYTES,
            disk.caps.files_max,
            self._space.file_count() + rows_files + recover.OTHER_FILES,
            "closed" if self._closed else disk.pulse.reason or disk.growth,
        )

    @property
    def segment_bytes(self) -> int:
        """Size of this directory's segments: what one reclaim can bring, and the largest record."""
        return self._space.segment_bytes

    # -- what a log adds: the Reclaiming port

    def victim(self) -> list[int]:
        """Locations of what lives in the segment best emptied next; empty if there is none, or until rows are read."""
        segment = self._space.victim()
        return [] if segment is None else segment.live_locations()

    def room_bytes(self) -> int:
        """What can be written before a segment must be reclaimed, about: the ends of segments stay empty."""
        space = self._space
        with space.lock:
            open_one = space.open[WRITES]
            rest = 0 if open_one is None else space.segment_blocks - open_one.tail
            return rest * BLOCK_BYTES + max(0, space.available() - 1) * space.segment_bytes

    def live_bytes(self) -> int:
        """Bytes of what lives, headers included."""
        return self._space.live_bytes()

    async def reclaim(self, keep: Sequence[int], drop: Sequence[int]) -> list[tuple[int, int]]:
        """Rewrites `keep`, gives up `drop`, and frees their segments as far as nothing else lives there. What could be
        read, and did not get to its new place because the disk is not well or too slow, stays where it was."""
        self._enter()
        async with self._reclaim_lock:
            space, pulse = self._space, self._disk.pulse
            sources: dict[Segment, None] = {}
            for location in (*keep, *drop):
                record = space.look(location)
                if record is not None:
                    sources[record.segment] = None
            moved: dict[int, int] = {}
            gone: set[int] = set()
            well = pulse.health is Health.HEALTHY
            if keep and well:
                try:
                    await self._move(keep, moved, gone)
                    await self._disk.flush()
                    well = pulse.health is Health.HEALTHY
                except UnavailableError:
                    well = False
            if not well:
                space.bury(moved.values())
                gone.clear()
            # A commit in the background may have lost the new copies whose commit this one waited for.
            moved = {old: new for old, new in moved.items() if space.look(new) is not None}
            space.bury([*drop, *gone, *moved])
            if well:
                for segment in sources:
                    await self._disk.empty(segment)
            self.counters["reclaims"] += 1
            stay = {at: at for at in keep if at not in moved and space.look(at) is not None}
            return [*moved.items(), *stay.items()]

    async def _move(self, keep: Sequence[int], moved: dict[int, int], gone: set[int]) -> None:
        """Rewrites records a few megabytes at a time; `gone` is what cannot be read, or has no room."""
        found = [(location, self._space.look(location)) for location in keep]
        records = [(location, record) for location, record in found if record is not None]
        while records:
            count = blocks = 0
            while count < len(records) and (not count or blocks * BLOCK_BYTES < MOVE_BYTES):
                blocks += records[count][1].length
                count += 1
            chunk, records = records[:count], records[count:]
            places = await self._disk.reserve(
                RECLAIMS, [record.length for _, record in chunk], [record.parts for _, record in chunk]
            )
            moves = [
                MoveItem(location, record.segment, record.segment.generation, record.block, place)
                for (location, record), place in zip(chunk, places, strict=True)
                if place is not None
            ]
            gone |= {location for (location, _), place in zip(chunk, places, strict=True) if place is None}
            await self._run_moves(moves, moved, gone)

    async def _run_moves(self, moves: list[MoveItem], moved: dict[int, int], gone: set[int]) -> None:
        disk = self._disk
        jobs = plan_moves(moves, disk.writer_ended)
        self._space.writers([job.segment for job in jobs], 1)
        completed = False
        try:
            await disk.write(jobs)
            completed = True
        finally:
            for job in jobs:
                good = disk.finish_write(job) and completed
                kept = [move.payload if good else None for move in job.moves]
                locations = self._space.settle([move.place for move in job.moves], kept)
                pairs = [(move.location, at) for move, at in zip(job.moves, locations, strict=True)]
                moved.update((old, new) for old, new in pairs if new >= 0)
                gone |= {old for old, new in pairs if new < 0 and good}
                for fault in job.read_faults if good else []:
                    self.counters["read_faults"] += 1
                    disk.pulse.read_failed(fault)

    # -- order of use

    def note_order(self, locations: npt.NDArray[np.int64], ticks: npt.NDArray[np.uint32]) -> None:
        """Keeps the order of last use for the next opening; saved by the next flush or by close. Cheap enough to call
        with everything that lives, at close and every few minutes."""
        numbers, generations, blocks = split_locations(locations)
        for number in np.unique(numbers).tolist():
            segment = self._space.segments.get(number)
            if segment is None or segment.life is Life.FREE:
                continue
            mine = np.flatnonzero((numbers == number) & (generations == segment.generation & GENERATION_MASK))
            mine = mine[np.argsort(blocks[mine])]
            key = codec.row_key(number, segment.generation, b"o")
            body = np.stack([blocks[mine], ticks[mine]]).astype("<u4").tobytes()
            self._disk.orders[key] = codec.seal(key, body)

    def _enter(self) -> Disk:
        if self._closed:
            raise ClosedError("the SSD tier was closed")
        self._disk.consider_probe()
        return self._disk
