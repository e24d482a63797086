"""Disk: the directory at work: runs jobs within a deadline, opens new segments, commits, probes, minds its health."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import mmap
import os
import threading
from collections import deque
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from functools import partial
from typing import TYPE_CHECKING

from tiercache.errors import UnavailableError
from tiercache.ssd import commit, recover
from tiercache.ssd.health import Pulse, words
from tiercache.ssd.meta import RowsError
from tiercache.ssd.records import BLOCK_BYTES
from tiercache.ssd.segments import WRITES, Life, Place, Segment
from tiercache.ssd.transfer import Job, ReadJob, Scratch
from tiercache.tier import Health

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tiercache.clock import Clock
    from tiercache.ssd.fileio import FileIO

ROLLS_MAX = 64
"""A batch opens at most so many segments."""
SYNC_DEADLINES = 15
"""A sync may take so many deadlines: it waits for all that was written before, and no reader waits for it."""
WITNESS_SEGMENTS = 64
"""The witness of the rows is written anew after so many segments, and at closing."""
CLOSE_GRACE_S = 0.5
"""Closing waits so long for calls that only just end; it blocks the loop, and does so on an ailing disk only."""
GROWTH_PAUSE_S = 10.0
"""After the disk had no room for another segment, this long passes before the next try."""


class Disk:
    """One open directory with its threads. Used on one event loop, like the tier that owns it."""

    def __init__(
        self,
        io: FileIO,
        directory: recover.Directory,
        caps: recover.Caps,
        *,
        threads: int,
        deadline_s: float,
        clock: Clock,
    ) -> None:
        self.io = io
        self.directory = directory
        self.space = directory.space
        self.caps = caps
        self.pulse = Pulse(clock)
        self.counters = directory.counters
        self.orders: dict[bytes, bytes] = {}
        self.rows_usage = io.usage(directory.rows_path)
        self.growth = ""
        self.losses = 0
        """How many acknowledged records were given up so far, because they may not have reached the medium."""
        self.closing: threading.Thread | None = None
        """After close, where late calls went on: waits for them and then unlocks the directory."""
        self.committer = ThreadPoolExecutor(1, "tiercache-rows")
        self._clock = clock
        self._deadline_s = deadline_s
        self._count = threads
        # Readers wait for reads alone: what is written in the background never stands in a queue before them.
        self._readers = ThreadPoolExecutor(threads, "tiercache-read")
        self._writers = ThreadPoolExecutor(threads, "tiercache-write")
        self._scratch = Scratch()
        self._rolls: dict[int, asyncio.Future[bool]] = {}
        self._probes: list[asyncio.Future[None]] = []
        self._commit_lock = asyncio.Lock()
        self._late: set[Job] = set()
        self._here: set[Job] = set()
        self._lost: list[int] = []
        self._ended = 0
        self._committed = 0
        self._merged = 0
        self._rows_broken = False
        self._grow_at_s = 0.0

    # -- jobs

    async def read(self, jobs: Sequence[Job]) -> None:
        """Runs jobs that somebody waits for."""
        await self._run(jobs, self._readers)

    def read_here(self, jobs: Sequence[Job]) -> bool:
        """Runs jobs of a thread that waits for them; False unless all ended in time. After it returns, in whatever
        way, no job touches anything of the caller's."""
        self._here.update(jobs)
        calls: list[Future[None]] = []
        try:
            for job in jobs:
                call = partial(job.run, self.io, self._scratch, self.directory.seed)
                with contextlib.suppress(RuntimeError):  # the directory is being closed
                    calls.append(self._readers.submit(call))
            done, late = wait_for(calls, self._deadline_s)
            for one in done:
                with contextlib.suppress(CancelledError):  # likewise
                    one.result()
        finally:
            ended = [job for job in jobs if job.abandon()]
            # What still runs is left in: closing must not take the file from under it.
            self._here.difference_update([job for job in jobs if not job.started])
            self._here.difference_update([job for job in tuple(self._here) if job.ended])
        if late:
            self.counters["deadlines"] += 1
            if not ended:
                self.pulse.hung(self._deadline_s)
        return len(ended) == len(jobs)

    async def write(self, jobs: Sequence[Job]) -> None:
        """Runs jobs that write."""
        await self._run(jobs, self._writers)

    async def _run(self, jobs: Sequence[Job], threads: ThreadPoolExecutor) -> None:
        """Runs jobs in the threads; after it returns, in whatever way, no job touches anything of the caller's, except
        that a write which is `abandoned` and not `ended` may still read its sources."""
        if not jobs:
            return
        loop = asyncio.get_running_loop()
        before = self._ended
        queue = deque(jobs)

        def drain() -> None:
            while queue:
                try:
                    job = queue.popleft()
                except IndexError:
                    return
                job.run(self.io, self._scratch, self.directory.seed)
                self._ended += 1

        calls = [loop.run_in_executor(threads, drain) for _ in range(min(self._count, len(jobs)))]
        late: set[asyncio.Future[None]] = set(calls)
        try:
            done, late = await asyncio.wait(calls, timeout=self._deadline_s)
            for call in done:
                call.result()
        finally:
            if late:
                queue.clear()
                for job in jobs:
                    if not job.abandon():
                        self._late.add(job)
                for call in late:
                    call.cancel()
        self._late = {job for job in self._late if job.started and not job.ended}
        if late:
            self.counters["deadlines"] += 1
            if self._ended == before:
                self.pulse.hung(self._deadline_s)

    def finish_write(self, job: Job) -> bool:
        """Whether a write job did its work in time; its segment may be reused once it can write no more."""
        if job.abandoned:
            return False
        self.writer_ended(job.segment)
        if job.fault is not None:
            self.counters["write_faults"] += 1
            self.pulse.write_failed(job.fault)
        return job.fault is None

    def writer_ended(self, segment: Segment) -> None:
        """A job can write to a segment no more."""
        self.space.writers([segment], -1)

    # -- room

    async def reserve(self, stream: int, lengths: Sequence[int], parts: Sequence[int]) -> list[Place | None]:
        """Room for records, in new segments if need be; None where there is none within the caps, or not in time."""
        places: list[Place | None] = []
        rolls = ROLLS_MAX
        try:
            while True:
                places += self.space.reserve(stream, lengths[len(places) :], parts[len(places) :])
                if len(places) == len(lengths):
                    return places
                if lengths[len(places)] > self.space.segment_blocks or not rolls:
                    places.append(None)
                else:
                    rolls = rolls - 1 if await self._rolled(stream) else 0
        except asyncio.CancelledError:
            taken = [place for place in places if place is not None]
            self.space.settle(taken, [None] * len(taken))
            raise

    async def _rolled(self, stream: int) -> bool:
        """Waits until the stream has another segment. The roll goes on when its waiter gives up: no file is left half
        made and forgotten."""
        roll = self._rolls.get(stream)
        if roll is None or roll.done():
            roll = self._rolls[stream] = asyncio.ensure_future(self._roll(stream))
        done, _ = await asyncio.wait([roll], timeout=self._deadline_s)
        if not done:
            self.pulse.hung(self._deadline_s)
        return bool(done) and roll.result()

    async def _roll(self, stream: int) -> bool:
        """Opens the next segment of a stream."""
        if stream == WRITES and self._rows_are_many():
            self.growth = "the rows take their whole share of the capacity"
            return False
        self.space.growing = self._clock.monotonic() >= self._grow_at_s
        try:
            if not self.space.has_free():
                await self._empty_dead()
            segment = self.space.next_segment(stream)
            return segment is not None and await self._begin(stream, segment)
        except RowsError as fault:
            self._rows_failed(fault)
            return False

    async def _empty_dead(self) -> None:
        async with self._commit_lock:
            await self._in_committer(commit.empty_dead, self.space, self.directory.rows)

    async def _begin(self, stream: int, segment: Segment) -> bool:
        exists = segment.descriptor >= 0
        try:
            if not exists:
                await asyncio.get_running_loop().run_in_executor(self._writers, self._create, segment)
            elif segment.life is not Life.FREE:
                async with self._commit_lock:
                    await self._in_committer(commit.empty, self.space, self.directory.rows, segment)
        except OSError as fault:
            self.space.unclaim(segment, exists=exists)
            if isinstance(fault, RowsError):
                raise
            self._note_growth(fault)
            return False
        self.space.begin(stream, segment)
        self.growth = ""
        return True

    def _in_committer(self, work: Callable[..., None], *arguments: object) -> asyncio.Future[None]:
        return asyncio.get_running_loop().run_in_executor(self.committer, work, *arguments)

    def _rows_are_many(self) -> bool:
        return self.rows_usage[0] > self.caps.rows_bytes * 4 // 10

    def _create(self, segment: Segment) -> None:
        path = recover.segment_path(self.directory.path, segment.number)
        size, floor = self.space.segment_bytes, self.caps.disk_free_floor_bytes
        if floor and self.io.free_bytes(self.directory.path) < size + floor:
            raise OSError(errno.ENOSPC, f"less than {floor} bytes would stay free on the disk")
        descriptor = self.io.open(path, create=True)
        try:
            self.io.allocate(descriptor, size)
            self.io.sync_directory(os.path.dirname(path))
        except BaseException:
            self.io.close(descriptor)
            self.io.unlink(path)
            raise
        segment.descriptor = descriptor

    def _note_growth(self, fault: OSError) -> None:
        self.counters["growth_faults"] += 1
        self.growth = f"no further segment: {words(fault)}"
        self._grow_at_s = self._clock.monotonic() + GROWTH_PAUSE_S
        if fault.errno not in (errno.ENOSPC, errno.EDQUOT):
            self.pulse.write_failed(fault)
        if self.io.identity(self.directory.path) != self.directory.identity:
            self.pulse.vanished()

    async def empty(self, segment: Segment) -> None:
        """Gives a segment back in which nothing lives; leaves it where something does, where the rows refuse, or where
        they take longer than a deadline."""
        started: list[Segment] = []
        task = asyncio.ensure_future(self._empty(segment, started))
        try:
            await asyncio.wait([task], timeout=self._deadline_s)
        finally:
            if not task.done():
                task.add_done_callback(_forget)
                if not started:  # a commit is at work: the next one empties the segment by the way
                    task.cancel()
        if not task.done() and started:
            self.pulse.hung(self._deadline_s)

    async def _empty(self, segment: Segment, started: list[Segment]) -> None:
        async with self._commit_lock:
            with self.space.lock:
                busy = segment.live_count or segment.pending or segment.writers
                if busy or segment.life is not Life.SEALED:
                    return
            started.append(segment)
            try:
                await self._in_committer(commit.empty, self.space, self.directory.rows, segment)
            except RowsError as fault:
                self._rows_failed(fault)

    # -- durability

    async def flush(self) -> None:
        """Returns when everything before the call is durable; raises UnavailableError if that cannot be."""
        if self.pulse.health is Health.OFF:
            raise UnavailableError(f"the SSD tier is off: {self.pulse.reason}")
        task = asyncio.ensure_future(self._commit_up_to(self.space.changes))
        deadline_s = SYNC_DEADLINES * self._deadline_s
        try:
            done, _ = await asyncio.wait([task], timeout=deadline_s)
        except asyncio.CancelledError:
            task.add_done_callback(_forget)
            raise
        if not done:
            task.add_done_callback(_forget)
            self.pulse.hung(deadline_s)
            raise UnavailableError(f"the disk did not sync within {deadline_s:g} s")
        task.result()

    async def _commit_up_to(self, wanted: int) -> None:
        async with self._commit_lock:
            if self._committed >= wanted and not self.orders:
                return
            batch = commit.take(self.space, self.orders)
            refusal: OSError | None = None
            try:
                await self._sync_segments(batch)
                await self._in_committer(self._commit, batch)
            except OSError as fault:
                refusal = fault
            self._note_lost(commit.give_up(self.space, batch))
            if refusal is not None:
                commit.put_back(self.space, batch, self.orders)
                self._rows_failed(refusal)
                raise UnavailableError(str(refusal)) from refusal
            if batch.failed:
                self.pulse.write_failed(OSError(errno.EIO, "a segment could not be synced"))
                raise UnavailableError("a segment could not be synced: what was written there last is forgotten")
            self._committed = max(self._committed, batch.changes)

    def _note_lost(self, locations: list[int]) -> None:
        with self.space.lock:
            self.losses += len(locations)
            self._lost += locations

    def take_lost(self) -> list[int]:
        """Locations that were acknowledged and given up since the last call; for any thread."""
        with self.space.lock:
            lost, self._lost = self._lost, []
            return lost

    async def _sync_segments(self, batch: commit.Batch) -> None:
        loop = asyncio.get_running_loop()
        due = [due for due in batch.due if due.facts]
        await asyncio.gather(
            *(loop.run_in_executor(self._writers, commit.sync_segment, self.io, batch, one) for one in due)
        )

    def _commit(self, batch: commit.Batch) -> None:
        rows = self.directory.rows
        commit.save(self.space, batch, rows)
        self._merged += commit.merge_sealed(self.space, rows)
        if self._merged >= WITNESS_SEGMENTS:
            rows.sync()
            self._write_witness()
            self._merged = 0
        self.rows_usage = self.io.usage(self.directory.rows_path)
        if self.io.identity(self.directory.path) != self.directory.identity:
            self.pulse.vanished()
            raise RowsError(f"{self.directory.path} is not the directory that was opened")

    def _write_witness(self) -> None:
        try:
            recover.write_witness(self.io, self.directory.path, self.directory.rows)
        except OSError:
            self.counters["witness_faults"] += 1  # the older one is as true, and says less

    def _rows_failed(self, fault: OSError) -> None:
        self.counters["rows_faults"] += 1
        self._rows_broken = True
        self.pulse.write_failed(fault)

    # -- health

    def consider_probe(self) -> None:
        """Tries in the background whether an ailing disk is well again, if that is due."""
        if self.pulse.health is not Health.HEALTHY and self.pulse.probe_due():
            call = asyncio.get_running_loop().run_in_executor(self.committer, self._probe)
            call.add_done_callback(_forget)
            self._probes = [*(probe for probe in self._probes if not probe.done()), call]

    def _probe(self) -> None:
        """Writes, syncs and reads a block in the directory, and opens the rows anew if they had failed."""
        path = os.path.join(self.directory.path, "probe")
        if self.io.identity(self.directory.path) != self.directory.identity:
            return
        block = mmap.mmap(-1, BLOCK_BYTES)
        try:
            descriptor = self.io.open(path, create=True)
            try:
                wrote = self.io.pwritev(descriptor, [block], 0)
                self.io.fdatasync(descriptor)
                read = self.io.preadv(descriptor, [block], 0)
            finally:
                self.io.close(descriptor)
                self.io.unlink(path)
            if wrote != len(block) or read != len(block):
                return
            if self._rows_broken:
                self._reopen_rows()
        except OSError:
            return
        self.pulse.recovered()

    def _reopen_rows(self) -> None:
        try:
            self.directory.rows.close()
        except RowsError:
            self.counters["rows_faults"] += 1
        self.io.repair_rows(self.directory.rows_path, self.caps.rows_bytes)
        self.directory.rows = self.io.open_rows(self.directory.rows_path, self.caps.rows_bytes)
        self._rows_broken = False

    def close(self) -> None:
        """Gives everything back but what a hanging call still holds. While one may still change files, the directory
        stays locked and nobody else can open it; the last of them unlocks it."""
        calls: list[asyncio.Future[bool] | asyncio.Future[None]] = [*self._rolls.values(), *self._probes]
        busy = self._commit_lock.locked() or not all(call.done() for call in calls)
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._writers.shutdown(wait=False, cancel_futures=True)
        self.committer.shutdown(wait=False, cancel_futures=True)
        late = [job for job in (*self._late, *tuple(self._here)) if not job.ended]
        reading = {job.segment for job in late if isinstance(job, ReadJob)}
        if busy or any(not isinstance(job, ReadJob) for job in late):
            self.closing = threading.Thread(
                target=self._close_late, args=(reading,), name="tiercache-late", daemon=True
            )
            self.closing.start()
            self.closing.join(CLOSE_GRACE_S)
        else:
            if self._committed and self.pulse.health is Health.HEALTHY:
                self._write_witness()
            self._close_files(reading)

    def _close_late(self, reading: set[Segment]) -> None:
        self._writers.shutdown(wait=True)
        self.committer.shutdown(wait=True)
        self._close_files(reading)

    def _close_files(self, reading: set[Segment]) -> None:
        try:
            self.directory.rows.close()
        except RowsError:
            self.counters["close_faults"] += 1
        for segment in self.space.segments.values():
            if segment.descriptor >= 0 and segment not in reading:
                self.io.close(segment.descriptor)
                segment.descriptor = -1
        self.io.close(self.directory.lock)


def _forget(call: asyncio.Future[None]) -> None:
    """Takes the exception of a call that nobody waits for."""
    if not call.cancelled():
        call.exception()
