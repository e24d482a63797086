"""What a client does when its owner dies, at every step, or cannot be had; and what a forked child has of it."""

from __future__ import annotations

import asyncio
import gc
import os
import select
import signal
import socket
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tiercache import assemble, keys
from tiercache.buffers import Buffer
from tiercache.clock import SystemClock
from tiercache.cpu.view import ArenaView
from tiercache.errors import ClosedError, ConfigError, UnavailableError
from tiercache.lease import Gap, Landed, PageRun
from tiercache.metrics import Metrics
from tiercache.model import Name, Outcome, all_parts
from tiercache.owner import state
from tiercache.settings import Settings
from tiercache.sync import BlockingCache
from tiercache.wire import sockets, starting
from tiercache.wire.client import SharedCache
from tiercache.wire.revive import Ways

pytestmark = [pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="Linux only"), pytest.mark.slow]
MIB = 1 << 20
PAGE = MIB
WHOLE = all_parts(PAGE, 65536)
RUN = PageRun(keys.page_key("i", "p", "v", PAGE, 65536), 4 * PAGE, PAGE, 65536)


class House:
    """A shared directory whose owner can be killed, and be kept from coming back."""

    def __init__(self, directory: Path) -> None:
        self.directory = str(directory)
        self.locked = False
        self.settings = Settings(
            directory=self.directory, memory_bytes=16 * MIB, ssd_bytes=0, queue_bytes=MIB, slots_max=4096,
            linger_s=0.3, client_share=1.0, disk_free_floor_bytes=0, owner_deadline_s=5.0, ssd_deadline_s=0.2,
        )  # fmt: skip

    def connect(self, start: bool) -> socket.socket:
        if self.locked:
            raise sockets.NoOwner("nobody may come")
        if start:
            return starting.find_or_start(self.directory, assemble.plain(self.settings))
        return sockets.connect(self.directory)

    def open(self, deadline_s: float = 5.0) -> SharedCache:
        ways = Ways(self.connect, ArenaView, os.urandom(16).hex(), os.getpid(), deadline_s)
        return SharedCache.open(ways, settings=self.settings, clock=SystemClock(), metrics=Metrics())

    def kill(self) -> int:
        """Kills the owner as a crash would; answers who it was."""
        left = state.read(self.directory)
        assert left is not None
        pidfd = os.pidfd_open(left.owner.pid)
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            assert poll.poll(30_000)
        finally:
            os.close(pidfd)
        return left.owner.pid

    def play(self, scene: Callable[[SharedCache], Awaitable[None]], deadline_s: float = 5.0) -> None:
        async def act() -> None:
            starter = await asyncio.to_thread(self.open)  # an owner that is yet to start may take its time
            core = await asyncio.to_thread(self.open, deadline_s)
            core.begin()
            await starter.close()
            try:
                await scene(core)
            finally:
                await core.close()

        asyncio.run(act())


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    place = House(tmp_path / "cache")
    yield place
    left = state.read(place.directory)
    if left is not None and left.owner.alive:
        place.kill()


def name(label: str) -> Name:
    return Name(keys.object_key("test", label))


def content(seed: int, size: int) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def target(size: int) -> Buffer:
    return Buffer.of(bytearray(size), writable=True)


DATA = content(7, 4 * PAGE)


async def load(gaps: Sequence[Gap], landed: Landed) -> None:
    """Fills gaps at once."""
    for gap in gaps:
        gap.target.view()[:] = DATA[gap.ordinal * PAGE :][: gap.target.length]
    landed(range(len(gaps)))


def test_leased_bytes_stay_when_the_owner_dies_and_memory_fills_up_after_it(house: House) -> None:
    async def scene(core: SharedCache) -> None:
        await core.put([name("a"), name("b")], [content(1, MIB), content(2, MIB)])
        lease = await core.lease([name("a")])
        with await core.lease([name("b")]) as other:
            view = other.view(0)
        for turn in range(2):
            before = house.kill()
            for i in range(40):
                assert await core.put([name(f"{turn} fill {i}")], [content(i, MIB)]) == [Outcome.HIT]
            assert bytes(lease.view(0)) == content(1, MIB)
            assert bytes(view) == content(2, MIB)
            left = state.read(house.directory)
            assert left is not None
            assert left.owner.pid != before
        assert (await core.lease([name("a")])).outcomes == [Outcome.HIT]
        lease.release()
        del view
        gc.collect()

    house.play(scene)


def test_what_was_put_is_there_again_and_a_thread_that_asks_meanwhile_gets_it(house: House) -> None:
    async def scene(core: SharedCache) -> None:
        names = [name(str(i)) for i in range(8)]
        values = [content(i, 500_000) for i in range(8)]
        await core.put(names, values)
        house.kill()
        core._link.home.memo.clear()  # type: ignore[union-attr]
        targets = [target(500_000) for _ in names]
        got = await asyncio.to_thread(core.get_into_resident, names, targets)
        for outcome, value, into in zip(got, values, targets, strict=True):
            assert outcome in (Outcome.HIT, Outcome.MISS)
            assert outcome is Outcome.MISS or bytes(into) == value

    house.play(scene)


def test_hits_by_glance_go_on_while_nobody_owns_the_directory(house: House) -> None:
    async def scene(core: SharedCache) -> None:
        await core.put([name("a")], [content(1, MIB)])
        (await core.read_pages(RUN, [0], [WHOLE], load)).release()
        house.locked = True
        house.kill()
        into = target(MIB)
        assert core.get_into_resident([name("a")], [into]) == [Outcome.HIT]
        assert bytes(into) == content(1, MIB)
        seen = core.lease_resident(RUN.key, [0], [WHOLE])
        assert seen is not None
        assert seen.copy_into(0, 0, PAGE, into) is Outcome.HIT
        assert bytes(into) == DATA[:PAGE]

    house.play(scene)


def test_without_an_owner_reads_are_misses_puts_say_so_and_all_goes_on_when_one_is_back(house: House) -> None:
    async def scene(core: SharedCache) -> None:
        await core.put([name("a")], [content(1, MIB)])
        lease = await core.lease([name("a")])
        house.locked = True
        house.kill()
        for _ in range(2):
            assert (await core.lease([name("b")])).outcomes == [Outcome.MISS]
            with await core.read_pages(RUN, [0, 1], [WHOLE, WHOLE], load) as pages:
                assert pages.outcomes == [Outcome.FULL] * 2
            assert len(await core.match([b"d" * 16])) == 0
            assert await asyncio.to_thread(core.lease_resident, RUN.key, [0], [1]) is None
            assert await asyncio.to_thread(core.lease_names_resident, [name("b")]) is None
            assert await asyncio.to_thread(core.get_into_resident, [name("b")], [target(1)]) == [Outcome.MISS]
            for put in (core.put([name("c")], [b"x"]), core.flush(), core.delete([name("a")])):
                with pytest.raises(UnavailableError):
                    await put
            with pytest.raises(UnavailableError):
                await asyncio.to_thread(core.store, [name("c")], [Buffer.of(b"x")])
            await asyncio.to_thread(core.stats)
        assert bytes(lease.view(0)) == content(1, MIB)
        house.locked = False
        back = False
        while not back:
            try:
                back = await core.put([name("c")], [b"x"]) == [Outcome.HIT]
            except UnavailableError:
                await asyncio.sleep(0.05)
        with await core.read_pages(RUN, [0, 1], [WHOLE, WHOLE], load) as pages:
            assert pages.outcomes == [Outcome.HIT] * 2
        assert bytes(lease.view(0)) == content(1, MIB)
        lease.release()

    house.play(scene, deadline_s=1.0)


def test_an_owner_that_hangs_is_gone_around_and_found_again_with_every_lease(house: House) -> None:
    async def scene(core: SharedCache) -> None:
        await core.put([name("a")], [content(1, MIB)])
        lease = await core.lease([name("a")])
        left = state.read(house.directory)
        assert left is not None
        os.kill(left.owner.pid, signal.SIGSTOP)
        try:
            assert await asyncio.to_thread(core.get_into_resident, [name("b")], [target(1)]) == [Outcome.MISS]
            assert core.get_into_resident([name("a")], [target(MIB)]) == [Outcome.HIT]
            began = SystemClock().monotonic()
            for _ in range(5):
                with await core.read_pages(RUN, [0], [1], load) as pages:
                    assert pages.outcomes == [Outcome.FULL]
            assert SystemClock().monotonic() - began < 2.0
        finally:
            os.kill(left.owner.pid, signal.SIGCONT)
        back = False
        while not back:
            try:
                back = await core.put([name("c")], [b"x"]) == [Outcome.HIT]
            except UnavailableError:
                await asyncio.sleep(0.05)
        for i in range(30):
            assert await core.put([name(f"fill {i}")], [content(i, MIB)]) == [Outcome.HIT]
        assert bytes(lease.view(0)) == content(1, MIB)
        lease.release()

    house.play(scene, deadline_s=0.3)


def test_a_load_that_the_owners_death_cuts_off_ends_and_is_done_again(house: House) -> None:
    async def scene(core: SharedCache) -> None:
        began, ended, gate = asyncio.Event(), asyncio.Event(), asyncio.Event()
        loads = 0

        async def slow(gaps: Sequence[Gap], landed: Landed) -> None:
            nonlocal loads
            loads += 1
            began.set()
            try:
                await gate.wait()
            finally:
                if not gate.is_set():
                    ended.set()
            await load(gaps, landed)

        reading = asyncio.ensure_future(core.read_pages(RUN, [0, 1], [WHOLE, WHOLE], slow))
        await began.wait()
        house.kill()
        await ended.wait()
        gate.set()
        with await reading as lease:
            assert lease.outcomes == [Outcome.HIT] * 2
            assert bytes(lease.view(1)) == DATA[PAGE : 2 * PAGE]
        assert loads == 2

    house.play(scene)


def test_two_clients_load_once_and_a_load_that_fails_is_the_fault_of_its_own_client_only(house: House) -> None:
    async def scene(core: SharedCache) -> None:
        other = await asyncio.to_thread(house.open)
        other.begin()
        began, gate = asyncio.Event(), asyncio.Event()
        counted: list[int] = []

        async def failing(gaps: Sequence[Gap], landed: Landed) -> None:
            began.set()
            await gate.wait()
            raise FileNotFoundError(2, "no such file")

        async def counting(gaps: Sequence[Gap], landed: Landed) -> None:
            counted.append(len(gaps))
            await load(gaps, landed)

        first = asyncio.ensure_future(core.read_pages(RUN, [0, 1], [WHOLE, WHOLE], failing))
        await began.wait()
        second = asyncio.ensure_future(other.read_pages(RUN, [0, 1], [WHOLE, WHOLE], counting))
        await other.call("status", {})
        gate.set()
        with pytest.raises(FileNotFoundError):
            await first
        with await second as lease:
            assert lease.outcomes == [Outcome.HIT] * 2
            assert bytes(lease.view(1)) == DATA[PAGE : 2 * PAGE]
        both = await asyncio.gather(
            core.read_pages(RUN, [2, 3], [WHOLE, WHOLE], counting),
            other.read_pages(RUN, [2, 3], [WHOLE, WHOLE], counting),
        )
        assert sum(counted) == 4
        for lease in both:
            assert lease.outcomes == [Outcome.HIT] * 2
            assert bytes(lease.view(0)) == DATA[2 * PAGE : 3 * PAGE]
            lease.release()
        # What one client deletes is not served by the glance of another.
        assert core.lease_resident(RUN.key, [2], [1]) is not None
        assert await other.delete([Name(RUN.key, 2)]) == [Outcome.HIT]
        assert await asyncio.to_thread(core.lease_resident, RUN.key, [2], [1]) is None
        await other.close()

    house.play(scene)


def test_a_put_whose_owner_dies_while_it_copies_is_done_again(house: House) -> None:
    class Dying(Buffer):
        """A value whose first copy is the last thing that its owner lives to see."""

        __slots__ = ()
        killed = False

        @property
        def address(self) -> int:
            if not Dying.killed:
                Dying.killed = True
                house.kill()
            return ADDRESS.address

        @address.setter
        def address(self, value: int) -> None:
            pass

    value = content(3, 300_000)
    ADDRESS = Buffer.of(value)

    async def scene(core: SharedCache) -> None:
        dying = Dying(0, len(value), value)
        assert await asyncio.to_thread(core.store, [name("a")], [dying]) == [Outcome.HIT]
        assert Dying.killed
        into = target(300_000)
        assert await core.get_into([name("a")], [into]) == [Outcome.HIT]
        assert bytes(into) == value

    house.play(scene)


def test_when_the_next_owner_has_other_memory_old_views_stay_and_nothing_old_is_believed(house: House) -> None:
    async def scene(core: SharedCache) -> None:
        await core.put([name("a")], [content(1, MIB)])
        lease = await core.lease([name("a")])
        old = core._link.home
        state.remove(house.directory)
        left = None
        # The owner writes the state again only when a client comes or goes: so the next one finds nothing to adopt.
        pid = core._link.revive.bond().greeting.owner
        for process in Path("/proc").iterdir():
            if process.name.isdigit():
                try:
                    command = (process / "cmdline").read_bytes()
                except OSError:
                    continue
                if b"launch.py" in command and house.directory.encode() in command:
                    left = int(process.name)
        assert left is not None
        os.kill(left, signal.SIGKILL)
        into = target(MIB)
        assert await core.put([name("b")], [content(2, MIB)]) == [Outcome.HIT]
        assert core._link.revive.bond().greeting.owner != pid
        assert core._link.home is not old
        assert await core.get_into([name("a"), name("b")], [into, into]) == [Outcome.MISS, Outcome.HIT]
        for i in range(30):
            await core.put([name(f"fill {i}")], [content(i, MIB)])
        assert bytes(lease.view(0)) == content(1, MIB)
        view = lease.view(0)
        lease.release()
        assert bytes(view) == content(1, MIB)
        assert core._link._homes == [old]
        del view
        gc.collect()
        await core.put([name("c")], [b"x"])
        assert core._link._homes == []

    house.play(scene)


def test_views_outlive_the_client_and_the_owner_waits_for_them(house: House) -> None:
    async def scene() -> None:
        core = await asyncio.to_thread(house.open)
        other = await asyncio.to_thread(house.open)
        core.begin()
        other.begin()
        await core.put([name("a")], [content(1, MIB)])
        with await core.lease([name("a")]) as lease:
            view = lease.view(0)
        await core.close()
        for i in range(40):
            await other.put([name(f"fill {i}")], [content(i, MIB)])
        assert bytes(view) == content(1, MIB)
        assert not core._link.left
        del view, lease
        gc.collect()
        while not core._link.left:
            await asyncio.sleep(0.05)
        await other.close()

    asyncio.run(scene())


def test_a_dropped_lease_is_given_back_without_any_call(house: House) -> None:
    async def scene(core: SharedCache) -> None:
        await core.put([name("a")], [content(1, MIB)])
        lease = await core.lease([name("a")])
        loop = asyncio.get_running_loop()
        cycle: list[Any] = [lease]
        cycle.append(cycle)
        del lease, cycle
        gc.collect()
        watcher = await loop.run_in_executor(None, house.open)
        while (await loop.run_in_executor(None, watcher.stats))["tiercache_leases"]:
            await asyncio.sleep(0.05)
        watcher.begin()
        await watcher.close()

    house.play(scene)


def test_a_forked_child_is_refused_and_the_parent_does_not_notice(house: House) -> None:
    async def scene(core: SharedCache) -> None:
        await core.put([name("a")], [content(1, MIB)])
        lease = await core.lease([name("a")])

        def child() -> int:
            wrong = 0
            for call in (
                lambda: core.lease_names_resident([name("a")]),
                lambda: core.get_into_resident([name("a")], [target(MIB)]),
                lambda: core.store([name("b")], [Buffer.of(b"x")]),
                lambda: lease.buffer(0),
            ):
                try:
                    call()
                    wrong += 1
                except ClosedError:
                    pass
            lease.release()
            return wrong

        pid = os.fork()
        if pid == 0:
            try:
                os._exit(child())
            finally:
                os._exit(99)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        for i in range(30):
            await core.put([name(f"fill {i}")], [content(i, MIB)])
        assert bytes(lease.view(0)) == content(1, MIB)
        lease.release()

    house.play(scene)


def test_threads_go_on_reading_right_bytes_while_owners_die(house: House) -> None:
    async def scene(core: SharedCache) -> None:
        names = [name(str(i)) for i in range(20)]
        values = [content(i, 400_000 + i) for i in range(20)]
        stop = threading.Event()
        faults: list[BaseException] = []
        hits = [0]

        def work(seed: int) -> None:
            rng = np.random.default_rng(seed)
            try:
                while not stop.is_set():
                    some = [int(i) for i in rng.integers(0, 20, 4)]
                    targets = [target(500_000) for _ in some]
                    got = core.get_into_resident([names[i] for i in some], targets)
                    for i, outcome, into in zip(some, got, targets, strict=True):
                        assert outcome is not Outcome.CORRUPT
                        if outcome is Outcome.HIT:
                            hits[0] += 1
                            assert bytes(into)[: len(values[i])] == values[i]
                    lease = core.lease_names_resident([names[some[0]]])
                    if lease is not None:
                        view = lease.view(0)
                        lease.release()
                        assert bytes(view) == values[some[0]]
                        del view
                    try:
                        core.store([names[i] for i in some], [Buffer.of(values[i]) for i in some])
                    except UnavailableError:
                        pass
            except BaseException as fault:
                faults.append(fault)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(5):
                await asyncio.to_thread(house.kill)
                for i in range(3):
                    try:
                        await core.put([names[i]], [values[i]])
                    except UnavailableError:
                        pass
        finally:
            stop.set()
            for thread in threads:
                await asyncio.to_thread(thread.join)
        assert not faults
        assert hits[0]

    house.play(scene)


@pytest.mark.parametrize("adopted", [True, False])
def test_a_flush_says_once_that_an_owner_died_with_what_was_put(house: House, adopted: bool) -> None:
    """Unless the next one has taken over that memory, and with it what was put."""
    house.settings = replace(house.settings, ssd_bytes=64 * MIB, segment_bytes=4 * MIB)

    async def scene(core: SharedCache) -> None:
        assert await core.put([name("saved")], [b"s"], durable=True) == [Outcome.HIT]
        assert await core.flush()
        for put in (core.put([name("a")], [b"a"]), asyncio.to_thread(core.store, [name("b")], [Buffer.of(b"b")])):
            assert await put == [Outcome.HIT]
            house.kill()
            if not adopted:
                os.unlink(os.path.join(house.directory, "owner.state"))
            assert await core.put([name("saved")], [b"s"], durable=True) == [Outcome.HIT]
            if not adopted:
                with pytest.raises(UnavailableError, match="put it again"):
                    await core.flush()
            assert await core.flush()

    house.play(scene)


def test_whether_anything_is_durable_is_for_the_present_owner_to_say(house: House) -> None:
    house.settings = replace(house.settings, ssd_bytes=64 * MIB, segment_bytes=4 * MIB)

    async def scene(core: SharedCache) -> None:
        assert core.durable
        assert await core.flush()
        house.settings = replace(house.settings, ssd_bytes=0)
        house.kill()
        assert await core.put([name("a")], [b"a"]) == [Outcome.HIT]
        assert not core.durable
        assert not await core.flush()
        with pytest.raises(ConfigError, match="SSD"):
            await core.put([name("b")], [b"b"], durable=True)

    house.play(scene)


def test_one_call_waits_for_a_silent_owner_no_longer_than_its_deadline_and_the_next_not_at_all(house: House) -> None:
    async def scene(core: SharedCache) -> None:
        await core.put([name("a")], [b"a"])
        left = state.read(house.directory)
        assert left is not None
        blocking = BlockingCache(core, asyncio.get_running_loop())
        clock = SystemClock()
        os.kill(left.owner.pid, signal.SIGSTOP)
        try:
            took = []
            for _ in range(3):
                began = clock.monotonic()
                assert await asyncio.to_thread(blocking.get, [name("b")]) == [Outcome.MISS]
                with pytest.raises(UnavailableError):
                    await asyncio.to_thread(core.store, [name("c")], [Buffer.of(b"c")])
                took.append(clock.monotonic() - began)
            assert took[0] < 3.0
            assert max(took[1:]) < 1.0
        finally:
            os.kill(left.owner.pid, signal.SIGCONT)
        await back(core, "c")
        rows = (await core.call("clients", {}))[0]
        assert (rows["leases"], rows["tickets"]) == (0, 0)

    house.play(scene, deadline_s=2.0)


def test_a_put_whose_answer_does_not_come_in_time_leaves_its_name_to_others(house: House) -> None:
    async def scene(core: SharedCache) -> None:
        await core.put([name("a")], [b"a"])
        left = state.read(house.directory)
        assert left is not None
        for i in range(2):
            os.kill(left.owner.pid, signal.SIGSTOP)
            try:
                with pytest.raises(UnavailableError):
                    if i:
                        await asyncio.to_thread(core.store, [name("late")], [Buffer.of(b"x")])
                    else:
                        await core.put([name("late")], [b"x"])
            finally:
                os.kill(left.owner.pid, signal.SIGCONT)
            await back(core, "late")
            await core.delete([name("late")])
        pause = 0.0
        while (await core.call("clients", {}))[0]["tickets"]:
            await asyncio.sleep(pause := pause + 0.01)

    house.play(scene, deadline_s=0.4)


async def back(core: SharedCache, label: str) -> None:
    """Returns when the owner takes this."""
    taken = False
    while not taken:
        try:
            taken = await core.put([name(label)], [b"x"]) == [Outcome.HIT]
        except UnavailableError:
            pass
        if not taken:
            await asyncio.sleep(0.05)


def test_a_search_that_could_not_begin_is_begun_again(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start
    refused: list[str] = []

    def no_thread(thread: threading.Thread) -> None:
        if thread.name == "tiercache revive" and len(refused) < 2:
            refused.append(thread.name)
            raise RuntimeError("can't start new thread")
        start(thread)

    async def scene(core: SharedCache) -> None:
        await core.put([name("a")], [b"a"])
        monkeypatch.setattr(threading.Thread, "start", no_thread)
        house.kill()
        await back(core, "b")
        assert len(refused) == 2

    house.play(scene)


def test_who_asks_nothing_looks_for_the_next_owner_too_and_says_once_that_there_is_none(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene(core: SharedCache) -> None:
        await core.put([name("a")], [b"a"])
        lease = await core.lease([name("a")])
        house.locked = True
        house.kill()
        revive = core._link.revive
        while revive._missed < 2:
            await asyncio.sleep(0.05)
        house.locked = False
        while revive.now is None:
            await asyncio.sleep(0.05)
        said = [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]
        assert [("no owner" in one, "again" in one) for one in said] == [(True, False), (False, True)], said
        assert bytes(lease.view(0)) == b"a"
        lease.release()

    house.play(scene, deadline_s=0.3)


def test_what_was_read_is_told_to_the_end_though_others_read_on(house: House) -> None:
    class Growing(deque[int]):
        """Somebody reads faster than anybody tells."""

        def popleft(self) -> int:
            self.append(0)
            return super().popleft()

    async def scene(core: SharedCache) -> None:
        await core.put([name("a")], [b"a"])
        home = core._link.home
        assert home is not None
        home.touched = Growing([0] * 1000, maxlen=1 << 16)
        core._link.say_noted()
        await asyncio.to_thread(core._link.say_noted)
        assert len(home.touched) >= 1000
        home.touched = deque(maxlen=1 << 16)

    house.play(scene)
