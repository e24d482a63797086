"""Mounts: what filesystem objects of one process share, one cache a directory and one reader a target.

Filesystem objects come and go, are pickled and survive forks; the cache, the origin's connections and what is
remembered of files must not follow them. They live here, are opened at first use, and a forked child leaves them.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from typing import TYPE_CHECKING, Any

import fsspec

from tiercache import assemble
from tiercache.errors import TierCacheError
from tiercache.remote import rights
from tiercache.settings import load
from tiercache.sync import io_loop, runs_here, wait

if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping, Sequence

    from fsspec.spec import AbstractFileSystem

    from tiercache.core import Core
    from tiercache.origin import Origin
    from tiercache.pages.reader import PageReader


class Target:
    """How to reach the filesystem that is cached: by protocol and options, or by an instance that was given."""

    def __init__(
        self, protocol: str | None, options: Mapping[str, Any] | None, instance: AbstractFileSystem | None
    ) -> None:
        if (protocol is None) == (instance is None):
            raise ValueError('pass either target_protocol (such as "s3") or fs, a filesystem instance')
        self.instance = instance
        names: str | tuple[str, ...] = instance.protocol if instance is not None else protocol or ""
        self.protocol = names if isinstance(names, str) else names[0]
        self.options = dict(options or {}) if instance is None else dict(instance.storage_options)

    @property
    def token(self) -> str:
        """The same for targets that are the same."""
        if self.instance is not None:
            return str(self.instance._fs_token)
        return str(fsspec.utils.tokenize(self.protocol, self.options))

    @property
    def reader(self) -> str:
        """Another one when the credentials of the environment or what a relative path means have changed."""
        return rights.reader(self.protocol, self.options, self.instance)

    def filesystem(self) -> AbstractFileSystem:
        """The target as a blocking fsspec filesystem that works in this process."""
        given = self.instance
        if given is None:
            return fsspec.filesystem(self.protocol, **self.options)
        if not given.async_impl or (not given.asynchronous and given._pid == os.getpid()):
            return given
        return type(given)(*given.storage_args, **{**given.storage_options, "asynchronous": False, "loop": None})


class Mount:
    """One target seen through one cache, in this process. `alive` becomes false when it was closed or forked away."""

    def __init__(self, target: Target, cache: Core) -> None:
        """`cache` is one from `assemble.acquire`; the mount gives it back when it is closed."""
        self.alive = True
        self.target = target
        self.loop: asyncio.AbstractEventLoop = io_loop()
        self.cache = cache
        self.origin: Origin = assemble.open_origin(
            target.protocol,
            target.options,
            filesystem=target.instance,
            settings=cache.settings,
            metrics=cache.metrics,
        )
        self.reader: PageReader = assemble.open_reader(cache, self.origin)
        self._filesystem: AbstractFileSystem | None = None

    @property
    def filesystem(self) -> AbstractFileSystem:
        """The target, for writes and for whatever only it can do; made at first use."""
        if self._filesystem is None:
            self._filesystem = self.target.filesystem()
        return self._filesystem

    def has_coroutine(self, name: str) -> bool:
        """Whether the target has a coroutine for this, and what it wraps has too: wrappers do not say."""
        fs = self.filesystem
        wrapped = getattr(fs, "fs", None)
        return bool(fs.async_impl and getattr(wrapped, "async_impl", True) and hasattr(fs, f"_{name}"))

    def wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Runs a coroutine on the cache's loop, from a thread."""
        return wait(work, self.loop)

    def forget(self, paths: Sequence[str]) -> None:
        """What was known of these paths and below them is no longer so: nor in any other process of the directory when
        this returns, or soon after where it is called on the loop."""
        facts = self.reader.facts
        if runs_here(self.loop):
            facts.forget(paths, below=True)
        else:
            facts.forget_blocking(paths, below=True)

    def close(self) -> None:
        """Ends background work and connections, and gives the cache back."""
        if self.alive:
            self.alive = False
            self.wait(self.end())
            assemble.release(self.cache)

    async def end(self) -> None:
        """Ends background work and connections; on the loop. The cache stays the caller's to give back."""
        self.alive = False
        try:
            await self.reader.close()
        finally:
            await self.origin.close()


Key = tuple[str, str, str]

_mounts: dict[Key, Mount] = {}
_opening: dict[Key, threading.Event] = {}
"""Mounts that a thread is making, without the lock: other threads wait for it to succeed or to fail."""
_lock = threading.Lock()
"""Held for moments only, never while anything is opened: the loop takes it too."""
_left_behind: list[Mount] = []
"""A parent's mounts in a forked child: kept, so that no destructor runs on what the parent still uses."""
OPEN_S_MAX = 30.0
"""A look at whether a mount has been made is taken at least so often."""


def mount(target: Target, settings: Mapping[str, Any]) -> Mount:
    """The mount of this target with these settings, opened if this process has none."""
    key = (target.token, target.reader, repr(sorted(settings.items())))
    with _lock:
        found = _mounts.get(key)
    if found is not None and found.alive:
        return found
    # The cache first: that may wait for another cache to be closed, which nobody who waits for a mount should do.
    cache = assemble.acquire(load(**settings))
    made: Mount | None = None
    mine = None
    try:
        while not runs_here(io_loop()):  # which never waits for a thread that may need it, and makes its own
            with _lock:
                found = _mounts.get(key)
                if found is not None and found.alive:
                    return found
                opening = _opening.get(key)
                if opening is None:
                    mine = _opening[key] = threading.Event()
                    break
            opening.wait(OPEN_S_MAX)
        fresh = Mount(target, cache)
        with _lock:
            found = _mounts.get(key)
            if found is None or not found.alive:
                made = _mounts[key] = fresh
                return made
        # In vain; the loop ends it, which may be where this runs, before the cache can be closed.
        asyncio.run_coroutine_threadsafe(fresh.end(), fresh.loop)
        return found
    finally:
        if mine is not None:
            with _lock:
                _opening.pop(key, None)
            mine.set()
        if made is None:
            assemble.release(cache)


def close_all() -> None:
    """Closes every mount of this process."""
    with _lock:
        mounts = list(_mounts.values())
        _mounts.clear()
    for each in mounts:
        try:
            each.close()
        except (TierCacheError, OSError, RuntimeError):
            pass  # at the end of the process there is nobody left to tell, and caches forget safely


def _after_fork() -> None:
    """The child has the parent's objects but none of its threads: it starts anew."""
    global _lock
    _lock = threading.Lock()
    for each in _mounts.values():
        each.alive = False
    _left_behind.extend(_mounts.values())
    _mounts.clear()
    _opening.clear()


os.register_at_fork(after_in_child=_after_fork)
# Thread pools stop taking work before ordinary exit functions run; the cache needs them to write what is queued.
getattr(threading, "_register_atexit", atexit.register)(close_all)
