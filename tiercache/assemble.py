"""Assemble: from settings to a working cache. The only file that knows concrete tiers, policies and origins.

`acquire` gives a process its one cache of a directory: shared, by way of the directory's owner, where that can be, and
in this process alone otherwise. `build` makes the latter, for the owner itself too.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from tiercache.clock import SystemClock, system_random
from tiercache.errors import ConfigError, LockedError, TierCacheError
from tiercache.metrics import Metrics
from tiercache.notation import format_size
from tiercache.settings import RULES, Machine, Settings, load, read_machine
from tiercache.sync import BlockingCache, io_loop, runs_here, wait

if TYPE_CHECKING:
    import asyncio
    import socket
    from collections.abc import Callable, Mapping

    from tiercache.cache import Cache
    from tiercache.clock import Clock
    from tiercache.core import Core
    from tiercache.origin import Origin
    from tiercache.pages.reader import PageReader
    from tiercache.peer.members import Member
    from tiercache.peer.peers import Peers
    from tiercache.remote.blocks import RemoteBlocks
    from tiercache.tier import Tier
    from tiercache.wire.client import SharedCache
    from tiercache.wire.memo import View

log = logging.getLogger(__name__)

CLOSE_S_MAX = 30.0
"""A look at whether a directory has been closed is taken at least so often."""


def build(
    settings: Settings, clock: Clock, metrics: Metrics, arena_id: bytes = bytes(16), *, ssd_again: bool = False
) -> Cache:
    """A cache of this process that has not been started. Blocking: it opens files. Where another process holds the
    directory, or the disk refuses, it says so in one line and goes on with memory alone.

    With `ssd_again` it raises UnavailableError where the disk refuses an SSD tier that lies there: whoever had it would
    miss what is on it for as long as this cache lives, and what is deleted now would be there again afterwards."""
    from tiercache.cache import Cache  # a process that shares does without all of this
    from tiercache.cpu.tier import MemoryTier
    from tiercache.index import Index
    from tiercache.policy import POLICIES

    _check(settings)
    remote = _open_remote(settings, clock, metrics) if settings.remote_url else None  # before anything is held
    peers = _open_peers(settings, clock, metrics) if settings.peers or settings.peer_listen else None
    ssd = _open_ssd(settings, clock, ssd_again) if settings.ssd_bytes else None
    policies = [POLICIES[settings.policy]() for _ in range(2 if ssd is not None else 1)]
    memory = MemoryTier(settings.memory_bytes, arena_id=arena_id)
    cache = Cache(Index(settings.slots_max, policies), memory, ssd, settings=settings, clock=clock, metrics=metrics)
    if remote is not None:
        cache.reach(remote)
    if peers is not None:
        cache.meet(peers)
    return cache


def _check(settings: Settings) -> None:
    """Raises ConfigError for what no cache can be made of, before a process is started or a directory is held."""
    from tiercache.policy import POLICIES

    if settings.policy not in POLICIES:
        raise ConfigError(f"policy must be one of {', '.join(sorted(POLICIES))}, not {settings.policy!r}")
    if settings.remote_url:
        from tiercache.remote.bucket import open_bucket, parse_options

        open_bucket(settings.remote_url, parse_options(settings.remote_options))
    if settings.peers or settings.peer_listen:
        _peer_places(settings)


def _peer_places(settings: Settings) -> tuple[list[Member], Member | None, bytes]:
    """Peers, where to listen for them, and the secret. Raises ConfigError for what cannot be."""
    from tiercache.net import TRANSPORTS
    from tiercache.peer.channel import read_secret
    from tiercache.peer.members import parse_member, parse_members

    listen = parse_member(settings.peer_listen, "peer_listen") if settings.peer_listen else None
    members = parse_members(settings.peers)
    secret = read_secret(settings.peer_token_file)
    far = next((one for one in (*members, *((listen,) if listen else ())) if not one.loopback), None)
    if far is not None and not settings.peer_token_file:
        raise ConfigError(f"{far} is not on loopback: peers there need a secret, set peer_token_file on all of them")
    if settings.peer_transport not in ("auto", *TRANSPORTS):
        known = ", ".join(("auto", *TRANSPORTS))
        raise ConfigError(f"peer_transport must be one of {known}, not {settings.peer_transport!r}")
    return members, listen, secret


def _open_peers(settings: Settings, clock: Clock, metrics: Metrics) -> Peers:
    """The caches of other machines; nobody is called yet."""
    from tiercache import net
    from tiercache.peer.members import Listed
    from tiercache.peer.peers import Limits, Peers
    from tiercache.peer.pool import Pool

    members, listen, secret = _peer_places(settings)
    limits = Limits(
        settings.peer_landing_bytes,
        int(settings.memory_bytes * settings.client_share),
        settings.peer_rate_bytes_s,
        settings.peer_deadline_s,
        settings.peer_spill,
    )
    pool = Pool(
        Listed(members),
        listen,
        secret=secret,
        open_transport=lambda name, host: net.open_transport(name, host, lambda note: None),
        names=net.choose(settings.peer_transport),
        clock=clock,
        random=system_random(),
        deadline_s=settings.peer_deadline_s,
    )
    return Peers(pool, limits, clock=clock, metrics=metrics)


def _open_remote(settings: Settings, clock: Clock, metrics: Metrics) -> RemoteBlocks:
    """Blocks in object storage; nothing is asked of it yet. Raises ConfigError for a place that cannot be one."""
    from tiercache.remote.blocks import PACK_BYTES, PACKS_MIN, RemoteBlocks
    from tiercache.remote.bucket import open_bucket, parse_options

    return RemoteBlocks(
        open_bucket(settings.remote_url, parse_options(settings.remote_options)),
        settings.remote_bytes,
        clock=clock,
        metrics=metrics,
        random=system_random(),
        deadline_s=settings.remote_deadline_s,
        lifetime_s=settings.remote_lifetime_s,
        rate_bytes_s=settings.remote_rate_bytes_s,
        pack_bytes=min(PACK_BYTES, settings.remote_bytes // PACKS_MIN),
    )


def _open_ssd(settings: Settings, clock: Clock, again: bool) -> Tier | None:
    from tiercache.ssd.tier import SsdTier  # brings RocksDB, which a cache in memory alone does without

    try:
        return SsdTier(
            settings.directory,
            settings.ssd_bytes,
            files_max=settings.ssd_files_max,
            segment_bytes=settings.segment_bytes,
            threads=settings.ssd_threads,
            deadline_s=settings.ssd_deadline_s,
            disk_free_floor_bytes=settings.disk_free_floor_bytes,
            group=settings.share_group,
            clock=clock,
        )
    except LockedError as error:
        log.warning("%s; this process caches in memory alone", error)
    except OSError as error:
        if again and os.path.exists(os.path.join(settings.directory, "FORMAT")):
            raise
        log.warning("no SSD tier in %s (%s); this process caches in memory alone", settings.directory, error)
    return None


def _join(settings: Settings) -> Core | None:
    """The cache of the directory's owner, which is started where there is none; None, in one line, where that cannot
    be. Blocking: it waits for the owner, never for this process's loop."""
    if not settings.share:
        return None
    _check(settings)
    try:
        if not hasattr(os, "memfd_create"):
            raise ConfigError("this system has no memory files")
        cache = _shared_cache(settings, start=True)
    except (TierCacheError, OSError) as error:
        log.warning("%s cannot be shared (%s); this process caches alone", settings.directory, error)
        return None
    if cache.settings.ssd_bytes and not cache.durable:
        log.warning("the owner of %s has no SSD tier (owner.log there says why)", settings.directory)
    return cache


def visit(settings: Settings) -> Core | None:
    """The cache of the directory's owner if one lives now, to ask it something; None where none does. Close it.
    Raises UnavailableError or ProtocolError where the owner cannot be asked."""
    from tiercache.wire import sockets

    settings = replace(settings, directory=os.path.realpath(settings.directory))
    try:
        sockets.connect(settings.directory, group=settings.share_group).close()
    except (sockets.NoOwner, sockets.CannotShare):
        return None
    return _shared_cache(settings, start=False)


def _shared_cache(settings: Settings, *, start: bool) -> SharedCache:
    """The cache of the owner; `start` allows to start one, now and after each one's death."""
    from tiercache.cpu.view import ArenaView
    from tiercache.wire import sockets, starting
    from tiercache.wire.client import SharedCache
    from tiercache.wire.revive import Ways

    directory, group, deadline_s = settings.directory, settings.share_group, settings.owner_deadline_s
    facts = plain(settings)

    def connect(begin: bool) -> socket.socket:
        if begin and start:
            return starting.find_or_start(directory, facts, group=group, deadline_s=deadline_s)
        return sockets.connect(directory, group=group, wait_s=deadline_s)

    view_of = cast("Callable[[bytes], View]", ArenaView)  # whose copies take its own places only
    ways = Ways(connect, view_of, system_random().randbytes(16).hex(), os.getpid(), deadline_s)
    return SharedCache.open(ways, settings=settings, clock=SystemClock(), metrics=Metrics())


def plain(settings: Settings) -> dict[str, str | int | float | bool]:
    """Every setting by name, ready for JSON; `Settings(**plain(s)) == s`."""
    return {name: getattr(settings, name) for name in RULES}


class _Open:
    """One cache of this process and how many hold it."""

    def __init__(self, cache: Core, settings: Settings, loop: asyncio.AbstractEventLoop) -> None:
        self.cache, self.settings, self.loop, self.holders = cache, settings, loop, 0
        self.begun = False

    async def begin(self) -> None:
        """Starts the cache's background work once; on the loop."""
        self.begin_here()

    def begin_here(self) -> None:
        """As `begin`, for callers on the loop that must not wait."""
        if not self.begun:
            self.begun = True
            self.cache.begin()


_open: dict[str, _Open] = {}
_opening: dict[str, threading.Event] = {}
"""Directories that a thread is opening, without the lock: others wait for it to succeed or to fail."""
_closing: dict[str, threading.Event] = {}
"""Directories whose cache is being closed: whoever opens one again waits for that."""
_lock = threading.Lock()
"""Held for moments only, never while files are opened or anybody is waited for: the loop takes it too."""


def _forget_after_fork() -> None:
    """A forked child has none of the parent's threads, and must not write into the memory it shares with the parent.

    What the parent opened is never destroyed in the child: RocksDB would write to the parent's files on its way out.
    """
    global _lock  # it may be held by a thread that does not exist in the child
    _lock = threading.Lock()
    for opened in _open.values():
        opened.cache.disown()
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(opened.cache))
    _open.clear()
    _opening.clear()
    _closing.clear()


os.register_at_fork(after_in_child=_forget_after_fork)


def acquire(settings: Settings) -> Core:
    """The process's one running cache for settings.directory, on the I/O loop; give it back with `release`.

    Callers on the loop wait for files at most, never for another thread that needs the loop.
    """
    settings = replace(settings, directory=os.path.realpath(settings.directory))
    loop = io_loop()
    on_loop = runs_here(loop)
    opened = None
    while opened is None:
        opened, busy = _hold(settings, on_loop=on_loop)
        if busy is not None:
            busy.wait(CLOSE_S_MAX)
        elif opened is None:
            opened = _open_one(settings, loop)
    if on_loop:
        opened.begin_here()
    elif not opened.begun:
        try:
            wait(opened.begin(), loop)
        except BaseException:
            release(opened.cache)
            raise
    return opened.cache


def _hold(settings: Settings, *, on_loop: bool) -> tuple[_Open | None, threading.Event | None]:
    """(the open cache, held once more; None), (None; what to wait for), or (None; None): this caller is to open it."""
    directory = settings.directory
    with _lock:
        busy = _opening.get(directory)
        if busy is None and not on_loop:  # the loop cannot wait for itself: the directory is locked, as for others
            busy = _closing.get(directory)
        if busy is not None:
            return None, busy
        opened = _open.get(directory)
        if opened is None:
            _opening[directory] = threading.Event()
            return None, None
        opened.holders += 1
    if opened.settings != settings:
        log.warning("%s is already open in this process with other settings; those stay", directory)
    return opened, None


def _open_one(settings: Settings, loop: asyncio.AbstractEventLoop) -> _Open:
    """Opens the cache that `_hold` left to this caller, held once; its background work has not begun."""
    opening = _opening[settings.directory]
    try:
        for line in too_large(settings, read_machine()):
            log.warning("%s", line)
        cache = _join(settings) or build(settings, SystemClock(), Metrics())
        opened = _Open(cache, settings, loop)
        opened.holders = 1
        with _lock:
            _open[settings.directory] = opened
        return opened
    finally:
        with _lock:
            _opening.pop(settings.directory, None)
        opening.set()


def too_large(settings: Settings, machine: Machine) -> list[str]:
    """What was set beyond what this machine has, a line each."""
    path = Path(settings.directory).absolute()
    place = next(one for one in (path, *path.parents) if one.is_dir())
    lines = []
    if 0 < machine.memory_total < settings.memory_bytes:
        has = format_size(machine.memory_total)
        lines.append(
            f"memory_bytes is {format_size(settings.memory_bytes)}, and this machine, or the cgroup of this process,"
            f" has {has} in all: set less, or something will be killed when the cache has filled"
        )
    disk = shutil.disk_usage(place).total
    if 0 < disk < settings.ssd_bytes:
        lines.append(
            f"ssd_bytes is {format_size(settings.ssd_bytes)}, and the disk of {settings.directory} has"
            f" {format_size(disk)} in all: set less; the cache will stop where disk_free_floor_bytes are left"
        )
    return lines


def release(cache: Core) -> None:
    """Gives back a cache from `acquire`; the last holder closes it. Unknown caches are ignored: a fork forgot them."""
    with _lock:
        directory = next((name for name, opened in _open.items() if opened.cache is cache), None)
        if directory is None:
            return
        opened = _open[directory]
        opened.holders -= 1
        if opened.holders > 0:
            return
        del _open[directory]
        closing = _closing[directory] = threading.Event()
    if runs_here(opened.loop):  # which cannot wait for itself
        task = opened.loop.create_task(cache.close())
        _last_tasks.add(task)
        task.add_done_callback(_last_tasks.discard)
        task.add_done_callback(lambda _: _closed(directory, closing))
        return
    try:
        wait(cache.close(), opened.loop)
    finally:
        _closed(directory, closing)


_last_tasks: set[asyncio.Task[None]] = set()


def _closed(directory: str, closing: threading.Event) -> None:
    with _lock:
        if _closing.get(directory) is closing:
            del _closing[directory]
    closing.set()


def open_origin(
    protocol: str,
    options: Mapping[str, object] | None = None,
    *,
    filesystem: object = None,
    settings: Settings | None = None,
    metrics: Metrics | None = None,
) -> Origin:
    """Where the files of a protocol ("s3", "https", "file", ...) are read from; `options` are those of its fsspec
    filesystem, `filesystem` is one that exists already. Raises ConfigError for what cannot be opened."""
    from tiercache.remote.opening import open_origin  # brings HTTP and object store clients
    from tiercache.remote.retry import Patience

    patience = Patience()
    if settings is not None:
        patience = Patience(settings.origin_deadline_s, settings.origin_attempts, settings.origin_concurrency)
    return open_origin(protocol, options, filesystem=filesystem, patience=patience, metrics=metrics)


def open_reader(cache: Core, origin: Origin) -> PageReader:
    """Files of an origin as pages of a cache, with the cache's settings."""
    from tiercache.pages.reader import PageReader  # a cache of lone objects alone does without

    return PageReader(
        cache, origin, settings=cache.settings, clock=cache.clock, metrics=cache.metrics, notes=cache.notes
    )


def open_cache(directory: str | os.PathLike[str] | None = None, **settings: object) -> BlockingCache:
    """Opens the cache in `directory` (created if needed), memory and SSD, nothing to start or to stop. All processes of
    a user that open a directory share it: see `share` among the settings.

    Keyword arguments are settings (see tiercache.settings.Settings); the settings file and TIERCACHE_* variables fill
    in the rest. Opening a directory twice in one process gives the same cache. Use it as a context manager or close it.
    """
    cache = acquire(load(directory=os.fspath(directory) if directory is not None else None, **settings))
    done = threading.Event()

    def close() -> None:
        if not done.is_set():
            done.set()
            release(cache)

    return BlockingCache(cache, io_loop(), close)
