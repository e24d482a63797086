"""The life of an owner: it takes the directory, serves it, and goes when nobody has come for a while.

One owner a directory, ever: DIR/owner.lock is held from before anything else is touched until the process is gone. One
that was handed a listening socket waits for it, because the owner before it may still be writing its last entries;
clients wait meanwhile, and go around the cache when that takes too long.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import logging
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING

from tiercache import assemble
from tiercache.clock import SystemClock, system_random
from tiercache.errors import ConfigError, TierCacheError, UnavailableError
from tiercache.metrics import Metrics
from tiercache.owner import state
from tiercache.owner.adoption import Adoption
from tiercache.owner.process import Log, stand_alone
from tiercache.owner.state import Client, State
from tiercache.settings import Settings, load
from tiercache.wire import sockets, starting
from tiercache.wire.door import Door
from tiercache.wire.eager import eager_loop

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

    from tiercache.cache import Cache
    from tiercache.lease import Lease

log = logging.getLogger("tiercache.owner")

LOCK_NAME = "owner.lock"
LEFT_S = 0.5
"""Clients that left are struck from the state so much later: many leave together."""
LAST_WRITES_S = 60.0
"""An owner that ends may take so long to write its last entries, before the next one gives up."""
REFUSED_S, REFUSED_AGAIN_S = 60.0, 1.0
"""How long an owner that takes over tries to open the SSD, and how often: then it is for its clients to start one."""
AGAIN_S = 0.2
"""When a client may just be connecting, the end is thought over so much later."""
SWITCH_S = 0.2e-3
"""A thread that hashes or shows a batch gives the interpreter to the loop after so long (CPython's own 5 ms would be
what every other client waits)."""
GOOD, TAKEN, FAILED = 0, 3, 1
"""Exit codes: served and went; somebody else has the directory; it could not be served at all."""


def main(arguments: Sequence[str]) -> int:
    """Runs an owner to its end; the exit code."""
    parser = argparse.ArgumentParser(prog="tiercache.owner", description="The owner of a shared cache directory.")
    parser.add_argument("directory")
    parser.add_argument("--listen", type=int, metavar="FD", help="a listening socket that is the directory's already")
    parser.add_argument("--settings", type=int, metavar="FD", help="where the settings are read from")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, handlers=[said := Log()])
    stand_alone()
    directory = os.path.realpath(given.directory)
    try:
        settings = _settings(directory, given.settings)
        listener = sockets.inherited(given.listen) if given.listen is not None else None
        os.makedirs(directory, mode=0o700, exist_ok=True)
        lock = _lock(directory, LAST_WRITES_S if listener is not None else 0.0)
        if lock is None:
            log.error("%s has an owner already", directory)
            return TAKEN
        said.directory = directory
        starting.trim_log(directory)
        if listener is None:
            listener = _listen(directory, group=settings.share_group)
        sys.setswitchinterval(SWITCH_S)
        with asyncio.Runner(loop_factory=eager_loop) as runner:
            return runner.run(Owner(settings, listener).run())
    except (TierCacheError, OSError) as fault:
        log.error("cannot serve %s: %s", directory, fault)
        return FAILED


def _settings(directory: str, descriptor: int | None) -> Settings:
    """The settings that the first client has, or those of this machine."""
    if descriptor is None:
        return load(directory=directory)
    given = starting.read_settings(descriptor)
    try:
        return Settings(**{**given, "directory": directory})  # type: ignore[arg-type]  # each is checked by its rule
    except TypeError as error:
        raise ConfigError(f"these are not the settings of this version: {error}") from None


def _lock(directory: str, wait_s: float) -> int | None:
    """The directory's lock, held until this process is gone; None when somebody else still has it after `wait_s`."""
    fd = os.open(os.path.join(directory, LOCK_NAME), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return fd
    except BlockingIOError:
        if not wait_s:
            os.close(fd)
            return None
    log.info("the owner before still has %s: waiting for it to go", directory)
    got = threading.Event()

    def wait() -> None:
        fcntl.flock(fd, fcntl.LOCK_EX)
        got.set()

    # A daemon: when the time is over this process goes, and the thread with it.
    threading.Thread(target=wait, name="owner.lock", daemon=True).start()
    return fd if got.wait(wait_s) else None


def _listen(directory: str, *, group: bool) -> socket.socket:
    """A socket of its own, for an owner that was started by hand. Raises UnavailableError while somebody starts one."""
    with starting.spawn_lock(directory, group=group) as held:
        if not held:
            raise UnavailableError("another owner is just being started")
        return sockets.listen(directory, group=group)


class Owner:
    """One owner, on its loop, from when it has the directory until it has given it back."""

    def __init__(self, settings: Settings, listener: socket.socket) -> None:
        self._settings, self._listener = settings, listener
        self._directory = settings.directory
        self._clock = SystemClock()
        self._metrics = Metrics()
        self._over = asyncio.Event()
        self._told_to_go = False
        self._idle: asyncio.TimerHandle | None = None
        self._leaving: asyncio.TimerHandle | None = None
        self._going: set[asyncio.Task[None]] = set()
        self._arena = b""
        self._written: State | None = None
        self._adoption: Adoption | None = None
        """What a dead owner left, until all its clients are back or gone."""
        self._taken: Adoption | None = None
        """The same for good: leases on it may be older than this owner."""
        self._cache: Cache
        self._door: Door

    async def run(self) -> int:
        """Serves until told to go, or until nobody has come for `linger_s`; the exit code."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._told)
        self._mark = self._mark_of(sockets.SOCKET_NAME)
        # Open, so that its inode is nobody else's for as long as this process lives.
        self._folder = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            await self._open()
        except (TierCacheError, OSError) as fault:
            log.error("cannot serve %s: %s", self._directory, fault)
            logging.shutdown()
            os._exit(FAILED)  # a thread may be waiting for the disk, for ever
        log.info("serving %s with %d bytes of memory", self._directory, self._settings.memory_bytes)
        self._count()
        await self._over.wait()
        if self._told_to_go:
            await self._save()
            if self._door.clients:
                self._leave_to_the_next()
        await self._close()
        return GOOD

    async def _open(self) -> None:
        """Takes over what a dead owner left, or begins with empty memory; then the door opens."""
        left = state.read(self._directory)
        adoption = Adoption.of(left, self._settings) if left is not None else None
        if adoption is not None:
            # The caps go with the memory: it was cut for them.
            self._settings = adoption.settings
            cache = await self._begin_again(adoption.arena)
            if not await adoption.take(cache):
                await cache.close()
                adoption = None
        if adoption is None:
            cache = self._begin(system_random().randbytes(16))
        self._cache, self._adoption, self._taken = cache, adoption, adoption
        facts = os.stat(self._directory)
        group = self._settings.share_group
        self._door = Door(
            cache,
            settings=self._settings,
            arena=self._arena,
            metrics=self._metrics,
            clock=self._clock,
            admit=lambda peer: sockets.admits(peer, facts, group=group),
            hold=self._hold,
            on_join=self._joined,
            on_left=self._left,
            on_redeclared=self._redeclared,
        )
        self._note_clients()
        if adoption is not None:
            adoption.begin(self._settled)
        self._door.serve(self._listener)

    async def _begin_again(self, arena: bytes) -> Cache:
        """As `_begin`, with the SSD tier that the dead owner had. Clients go around the cache while the disk refuses
        it, because it is full, say."""
        loop = asyncio.get_running_loop()
        until_s = loop.time() + REFUSED_S
        said = False
        while True:
            try:
                return self._begin(arena, ssd_again=True)
            except UnavailableError as fault:
                if loop.time() > until_s or self._over.is_set():
                    raise
                if not said:
                    log.warning("%s: trying again for %g s", fault, REFUSED_S)
                said = True
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._over.wait(), REFUSED_AGAIN_S)

    def _begin(self, arena: bytes, *, ssd_again: bool = False) -> Cache:
        self._arena = arena
        cache = assemble.build(self._settings, self._clock, self._metrics, arena, ssd_again=ssd_again)
        cache.tiers.shared = True
        cache.begin()
        return cache

    # -- clients -------------------------------------------------------------------------------------------------------

    def _joined(self, pid: int, token: str) -> None:
        """A client is about to be let in: should this process die, the next one must know of it, so it is written down
        before the client can hold anything."""
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        self._note_clients((pid, token))
        log.info("client %s came: %d", pid or "of another PID namespace", self._door.clients)
        if not pid:
            log.info("its death will be seen by the end of its connection only")

    def _left(self, pid: int, _: str) -> None:
        log.info("client %s left: %d", pid, self._door.clients)
        if self._leaving is None:
            self._leaving = asyncio.get_running_loop().call_later(LEFT_S, self._strike)
        self._count()

    def _strike(self) -> None:
        self._leaving = None
        self._note_clients()
        starting.trim_log(self._directory)

    def _redeclared(self, pid: int, token: str, tokens: frozenset[str] | None) -> None:
        if self._adoption is not None:
            self._adoption.heard(pid, token, tokens)

    def _settled(self) -> None:
        """Every former client has come back or died."""
        self._adoption = None
        self._note_clients()
        self._count()

    def _hold(self, locations: Sequence[int]) -> Lease | None:
        """A lease on what a client held before this owner was there."""
        return self._taken.hold(locations) if self._taken is not None else self._cache.serving.hold(locations)

    def _note_clients(self, *coming: tuple[int, str]) -> None:
        """Writes down who may hold a piece of the memory, if that has changed."""
        there = self._door.present.union(coming)
        known = {pid: state.process(pid) for pid in {pid for pid, _ in there}}
        holders = {Client(found, token) for pid, token in there if (found := known[pid]) is not None}
        # Whoever was killed a moment ago may still be counted in: it holds nothing, and is nobody's stranger.
        strangers = sum(known[pid] is None and not state.ended(pid) for pid, _ in there)
        if self._adoption is not None:
            holders |= self._adoption.awaited
        now = State(self._arena, state.me(), tuple(sorted(holders)), strangers, assemble.plain(self._settings))
        if now == self._written or not self._in_place:
            return
        try:
            now.write(self._directory)
            self._written = now
        except OSError as error:
            log.warning("owner.state could not be written (%s): should this owner die, its memory is lost", error)
            self._written = None

    # -- the end -------------------------------------------------------------------------------------------------------

    def _count(self) -> None:
        """Begins to count down when nobody is there."""
        if not self._door.clients and self._idle is None:
            loop = asyncio.get_running_loop()
            self._idle = loop.call_later(self._settings.linger_s, self._begin_to_go)

    def _begin_to_go(self) -> None:
        """Nobody has come for a while."""
        self._idle = None
        if not self._going:
            self._going.add(task := asyncio.get_running_loop().create_task(self._save()))
            task.add_done_callback(self._saved)

    def _saved(self, task: asyncio.Task[None]) -> None:
        self._going.discard(task)
        if not task.cancelled() and (fault := task.exception()) is not None:
            log.error("the last entries could not be written", exc_info=fault)
        if self._idle is None:  # else somebody came meanwhile, and went
            self._consider()

    async def _save(self) -> None:
        """Makes durable what is in memory, while whoever comes is still let in: after that the end is quick."""
        try:
            await self._cache.flush()
        except (TierCacheError, OSError) as error:
            log.warning("not everything is on the SSD: %s", error)

    def _consider(self) -> None:
        """Goes, unless somebody is there or just coming."""
        self._idle = None
        if self._door.clients or self._over.is_set():
            return
        try:
            again = self._adoption is not None or not self._stop_listening()
        except UnavailableError as gone:  # nobody can find this owner any more, and nothing of it would outlive it
            log.warning("%s: going", gone)
            self._door.stop_listening()
            again = False
        if again:
            self._idle = asyncio.get_running_loop().call_later(AGAIN_S, self._consider)
            return
        log.info("nobody came for %g s: going", self._settings.linger_s)
        self._over.set()

    def _stop_listening(self, *, whoever_waits: bool = False) -> bool:
        """Takes the socket away, so that whoever comes from now on starts the next owner. False, and nothing has
        happened, where somebody is just starting one or waits to be let in."""
        with starting.spawn_lock(self._directory, group=self._settings.share_group) as held:
            if not whoever_waits and (not held or sockets.readable(self._listener)):
                return False
            if self._mark is not None and self._mark_of(sockets.SOCKET_NAME) == self._mark:
                os.unlink(os.path.join(self._directory, sockets.SOCKET_NAME))
            # One that connected in this very moment sees its connection end, and starts the next owner.
            self._door.stop_listening()
            return True

    def _mark_of(self, name: str) -> tuple[int, int] | None:
        """Which file of this name, or directory without one, is there now."""
        try:
            facts = os.stat(os.path.join(self._directory, name))
        except OSError:
            return None
        return facts.st_dev, facts.st_ino

    @property
    def _in_place(self) -> bool:
        """Whether the directory is the one that was opened: another one at its path is another owner's."""
        facts = os.fstat(self._folder)
        return self._mark_of("") == (facts.st_dev, facts.st_ino)

    def _told(self) -> None:
        log.info("told to go (SIGTERM)")
        self._told_to_go = True
        self._over.set()

    def _leave_to_the_next(self) -> None:
        """Goes while clients are there: all is left as it lies, state and memory, for the owner that they start next.
        Nothing of theirs is ended here, for they still look at it."""
        self._stop_listening(whoever_waits=True)
        log.info("left %d clients to the next owner", self._door.clients)
        logging.shutdown()
        os._exit(GOOD)

    async def _close(self) -> None:
        """Leaves nothing behind but what is on the SSD."""
        if self._told_to_go:
            with contextlib.suppress(UnavailableError):  # the directory is gone, and the socket with it
                self._stop_listening(whoever_waits=True)
        for timer in (self._idle, self._leaving):
            if timer is not None:
                timer.cancel()
        for task in self._going:
            task.cancel()
        await self._door.close()
        if self._taken is not None:
            self._taken.close()
            await self._taken.saved()
        await self._cache.close()
        if self._in_place:
            state.remove(self._directory)
        log.info("closed")
