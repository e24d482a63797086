"""TierCacheFileSystem: any fsspec filesystem, read through tiercache.

    fsspec.filesystem("tiercache", target_protocol="s3", target_options={...}, directory="/var/cache/tiercache")
    fsspec.open("tiercache::s3://bucket/key", s3={...}, tiercache={...})

Reads and facts go through one PageReader of the process; writes and deletes go to the target, and what was known of the
paths is forgotten at once. Works in blocking and in asynchronous code, also inside a running loop: whatever needs the
cache's own loop is sent there.
"""

from __future__ import annotations

import asyncio
import io
import os
from datetime import UTC, datetime
from glob import has_magic
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from fsspec.asyn import AsyncFileSystem
from fsspec.callbacks import DEFAULT_CALLBACK
from fsspec.implementations.chained import ChainedFileSystem
from fsspec.registry import get_filesystem_class
from fsspec.utils import stringify_path, tokenize

from tiercache.buffers import new_bytes
from tiercache.model import Outcome
from tiercache.sync import io_loop
from tiercache_connectors.fsspec_facts import (
    FOOTED,
    IGNORED,
    PLAIN,
    absent,
    bounds,
    described,
    directory,
    newest,
    no_file,
    present,
    there,
)
from tiercache_connectors.fsspec_file import AsyncCachedFile, CachedFile, WrittenFile
from tiercache_connectors.fsspec_mounts import Mount, Target
from tiercache_connectors.fsspec_opening import Opening
from tiercache_connectors.fsspec_trees import Copied, find, write_whole

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tiercache.pages.versions import Pin


class TierCacheFileSystem(AsyncFileSystem, ChainedFileSystem):  # type: ignore[misc]  # fsspec has no types
    """A target filesystem seen through the cache; paths are the target's own."""

    protocol: ClassVar[str] = "tiercache"
    _strip_tokenize_options = ("fo",)

    def __init__(
        self,
        target_protocol: str | None = None,
        target_options: dict[str, Any] | None = None,
        fs: Any = None,
        fo: str | None = None,
        *,
        asynchronous: bool = False,
        loop: Any = None,
        batch_size: int | None = None,
        **settings: Any,
    ) -> None:
        """`target_protocol` with `target_options`, or `fs`, is what is cached; `settings` are tiercache's own
        (directory, memory_bytes, ...; see tiercache.settings)."""
        del fo, loop  # fsspec's chain hands the path over too; there is one loop a process
        super().__init__(asynchronous=asynchronous, batch_size=batch_size, use_listings_cache=False)
        self._target = Target(target_protocol, target_options, fs)
        settings = {name: value for name, value in settings.items() if name not in IGNORED}
        self.opening = Opening(self._target, settings)
        plain = fs is None and self._target.protocol in PLAIN
        kind = None if plain else type(fs) if fs is not None else get_filesystem_class(self._target.protocol)
        self._target_class = kind
        if kind is not None:
            self.root_marker = kind.root_marker
            self._parent = kind._parent
        self._strip_protocol = self._stripped

    # -- what is shared ------------------------------------------------------------------------------------------------

    @property
    def mount(self) -> Mount:
        """The process's cache, origin and reader for this target; opened at first use, anew after a fork."""
        return self.opening.now()

    @property
    def target(self) -> Any:
        """The target filesystem itself."""
        return self.mount.filesystem

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The process's I/O loop (fsspec's own), also after a fork and for asynchronous instances."""
        return io_loop()

    @property
    def fsid(self) -> str:
        """Differs for targets that differ."""
        return f"tiercache_{self._target.token}"

    def close(self) -> None:
        """Gives the cache back; the next use opens it again."""
        self.opening.close()

    # -- paths ---------------------------------------------------------------------------------------------------------

    def _stripped(self, path: Any) -> Any:
        """A target's path, from one with or without `tiercache://`, `tiercache::` or the target's protocol."""
        if isinstance(path, list):
            return [self._stripped(each) for each in path]
        text: str = stringify_path(path)
        for prefix in ("tiercache://", "tiercache::"):
            text = text.removeprefix(prefix)
        if self._target_class is not None:
            return self._target_class._strip_protocol(text)
        for name in PLAIN:
            text = text.removeprefix(f"{name}://")
        return text.rstrip("/")

    # -- facts ---------------------------------------------------------------------------------------------------------

    def _remembered(self, path: str) -> Pin | None:
        """A file's facts, if they are remembered; any thread."""
        known = self.mount.reader.facts.known(path)
        return known if known is not None and not isinstance(known, Outcome) else None

    @there
    async def _info(self, path: str, *, refresh: bool = False, **kwargs: Any) -> dict[str, Any]:
        path = self._stripped(path)
        reader = self.mount.reader
        if refresh:
            reader.facts.forget([path])
        if path == self.root_marker or not path:
            return directory(path)
        if path.lower().endswith(FOOTED):
            pin = await reader.open(path)
        else:
            pin = (await reader.facts.stat([path]))[0]
        if not isinstance(pin, Outcome):
            return described(pin)
        if await self._children(path) is None:
            raise absent(path)
        return directory(path)

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        """Facts of a file or directory: name, size, type, and mtime, ETag where the target knows them."""
        pin = self._remembered(self._stripped(path)) if not kwargs else None
        return described(pin) if pin is not None else self.mount.wait(self._info(path, **kwargs))

    async def _children(self, path: str, *, refresh: bool = False) -> list[Pin] | None:
        """What a directory holds; None when there is no such directory."""
        found = await self.mount.reader.facts.children(path, refresh=refresh)
        return None if isinstance(found, Outcome) else found

    @there
    async def _ls(self, path: str, detail: bool = True, *, refresh: bool = False, **kwargs: Any) -> list[Any]:
        path = self._stripped(path)
        children = await self._children(path, refresh=refresh)
        if children is None:
            info = await self._info(path)
            found = [] if info["type"] == "directory" else [info]
        else:
            found = [described(pin) for pin in children]
        return found if detail else [info["name"] for info in found]

    async def _find(
        self,
        path: str,
        maxdepth: int | None = None,
        withdirs: bool = False,
        detail: bool = False,
        prefix: str = "",
        **kwargs: Any,
    ) -> Any:
        path = self._stripped(path)
        if maxdepth is not None and maxdepth < 1:
            raise ValueError("maxdepth must be at least 1")
        found, directories = await find(self, path, maxdepth, prefix)
        if withdirs:
            found |= directories
            if path and await self._isdir(path):
                found[path] = await self._info(path)
        if not found and await self._isfile(path):
            found = {path: await self._info(path)}
        return dict(sorted(found.items())) if detail else sorted(found)

    async def _type(self, path: str) -> str | None:
        try:
            return str((await self._info(path))["type"])
        except FileNotFoundError:
            return None

    async def _exists(self, path: str, **kwargs: Any) -> bool:
        return await self._type(path) is not None

    async def _isfile(self, path: str) -> bool:
        return await self._type(path) == "file"

    async def _isdir(self, path: str) -> bool:
        return await self._type(path) == "directory"

    def size(self, path: str) -> int:
        """Size of a file in bytes."""
        return int(self.info(path)["size"])

    def isfile(self, path: str) -> bool:
        """Whether there is a file at this path."""
        pin = self._remembered(self._stripped(path))
        return not pin.stat.is_directory if pin is not None else bool(self.mount.wait(self._isfile(path)))

    def modified(self, path: str) -> datetime:
        """When a file was last changed, UTC. Where the target does not say, the epoch if the file has a version."""
        info = self.info(path)
        if "LastModified" not in info and "ETag" not in info:
            raise NotImplementedError(f"the target does not say when {path} was changed")
        return info.get("LastModified", datetime.fromtimestamp(0, UTC))  # type: ignore[no-any-return]

    def created(self, path: str) -> datetime:
        """When a file was made, as the target says; object stores say when it was last written."""
        try:
            return self.target.created(self._stripped(path))  # type: ignore[no-any-return]
        except NotImplementedError:
            return self.modified(path)

    def ukey(self, path: str) -> str:
        """The same as long as the file is: made of its path and version."""
        info = self.info(path)
        version = info.get("ETag") or info.get("mtime")
        return str(tokenize(self.fsid, info["name"], info["size"], version))

    def checksum(self, path: str) -> int:
        """As `ukey`, a number."""
        return int(self.ukey(path), 16)

    def invalidate_cache(self, path: str | None = None) -> None:
        """Forgets what is known of a path and everything below it, or of all paths, in every process of the directory.
        Cached bytes stay: they belong to their version. In a coroutine this returns at once, and what is asked from
        then on is answered anew."""
        super().invalidate_cache(path)
        self.opening.forget("" if path is None else self._stripped(path))

    # -- reads ---------------------------------------------------------------------------------------------------------

    @there
    async def _pin(self, path: str, *, tail: bool) -> Pin:
        """The version to read now; `tail` when its last bytes are worth having."""
        reader = self.mount.reader
        pin = await reader.open(path) if tail else (await reader.facts.stat([path]))[0]
        if isinstance(pin, Outcome):
            if await self._children(path) is None:
                raise absent(path)
            raise no_file(path)
        if pin.stat.is_directory:
            raise no_file(path)
        return pin

    @there
    async def _read_pin(self, pin: Pin, start: int, stop: int) -> bytes:
        return await self.mount.reader.read(pin, start, stop)

    @there
    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        path = self._stripped(path)
        tail = (start is None and end is None) or (start or 0) < 0 or path.lower().endswith(FOOTED)

        async def read(pin: Pin) -> bytes:
            return await self.mount.reader.read(pin, *bounds(start, end, pin.stat.size))

        return await newest(lambda: self._pin(path, tail=tail), read)

    @there
    async def _cat_ranges(
        self,
        paths: list[str],
        starts: Any,
        ends: Any,
        max_gap: int | None = None,
        batch_size: int | None = None,
        on_error: str = "return",
        **kwargs: Any,
    ) -> list[Any]:
        if not isinstance(paths, list):
            raise TypeError("paths must be a list")
        starts = list(starts) if isinstance(starts, (list, tuple)) else [starts] * len(paths)
        ends = list(ends) if isinstance(ends, (list, tuple)) else [ends] * len(paths)
        if len(starts) != len(paths) or len(ends) != len(paths):
            raise ValueError("paths, starts and ends must have the same length")
        wanted: dict[str, list[int]] = {}
        for i, path in enumerate(paths):
            wanted.setdefault(self._stripped(path), []).append(i)
        found: list[Any] = [b""] * len(paths)

        async def one(path: str, items: list[int]) -> None:
            try:
                values = await self._many(path, [(starts[i], ends[i]) for i in items])
            except (OSError, ValueError) as error:
                values = [error] * len(items)
            for i, value in zip(items, values, strict=True):
                found[i] = value

        await asyncio.gather(*[one(path, items) for path, items in wanted.items()])
        faults = [value for value in found if isinstance(value, BaseException)]
        if faults and on_error == "raise":
            raise faults[0]
        return found if on_error != "omit" else [value for value in found if not isinstance(value, BaseException)]

    async def _many(self, path: str, ranges: Sequence[tuple[int | None, int | None]]) -> list[Any]:
        """Ranges of one file, all in as few requests as possible."""
        tail = path.lower().endswith(FOOTED) or any((start or 0) < 0 for start, _ in ranges)

        async def read(pin: Pin) -> list[Any]:
            spans = [bounds(start, end, pin.stat.size) for start, end in ranges]
            values = [new_bytes(stop - start) for start, stop in spans]
            await self.mount.reader.read_into(pin, spans, [target for _, target in values])
            return [value for value, _ in values]

        return await newest(lambda: self._pin(path, tail=tail), read)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        """Bytes [start, end) of a file; negative numbers count from its end."""
        pin = self._remembered(self._stripped(path))
        if pin is not None and not pin.stat.is_directory:
            low, high = bounds(start, end, pin.stat.size)
            value = self.mount.reader.read_resident(pin, low, high) if low < high else b""
            if value is not None:
                return value
        return self.mount.wait(self._cat_file(path, start, end))  # type: ignore[no-any-return]

    async def _get_file(self, rpath: str, lpath: Any, callback: Any = DEFAULT_CALLBACK, **kwargs: Any) -> None:
        if hasattr(lpath, "write"):
            await self._copy_to(rpath, lpath, callback)
        elif await self._isdir(rpath):
            await asyncio.to_thread(os.makedirs, lpath, exist_ok=True)
        else:
            await write_whole(Path(lpath), lambda file: self._copy_to(rpath, file, callback))

    @there
    async def _copy_to(self, path: str, file: Any, callback: Any) -> None:
        """Writes a whole file, one version of it, to a local one."""
        copied = Copied(self.mount.reader, file, callback)
        await newest(lambda: self._pin(self._stripped(path), tail=True), copied.anew)

    def open(
        self,
        path: str,
        mode: str = "rb",
        block_size: int | None = None,
        cache_options: dict[str, Any] | None = None,
        compression: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """A file object; see CachedFile. Text is buffered (by io.BufferedReader), bytes are not."""
        if compression is not None and "r" in mode:
            kwargs["one_position"] = True  # the decompressor's, which may itself be handed from thread to thread
        if "b" in mode or compression is not None or "r" not in mode or "+" in mode:
            return super().open(path, mode, block_size, cache_options, compression, **kwargs)
        text = {name: kwargs.pop(name) for name in ("encoding", "errors", "newline") if name in kwargs}
        return io.TextIOWrapper(
            io.BufferedReader(self._open(path, block_size=block_size, one_position=True), 1 << 18), **text
        )

    def _open(
        self, path: str, mode: str = "rb", block_size: int | None = None, one_position: bool = False, **kwargs: Any
    ) -> Any:
        path = self._stripped(path)
        if mode != "rb":
            return self._open_to_write(path, mode, block_size, **kwargs)
        pin = self._remembered(path)
        if pin is None or pin.stat.is_directory:
            pin = self.mount.wait(self._pin(path, tail=True))
        return CachedFile(self, path, pin, block_size, one_position=one_position)

    async def _open_to_await(self, path: str, mode: str = "rb", **kwargs: Any) -> AsyncCachedFile:
        """A file to be read with `await`; to write, use `_pipe_file` or `_put_file`."""
        if mode != "rb":
            raise ValueError(f"open_async reads (mode 'rb'), it does not do {mode!r}: use _pipe_file or _put_file")
        return AsyncCachedFile(self, await self._pin(self._stripped(path), tail=True))

    open_async = _open_to_await  # fsspec's name for it

    # -- writes: the target's, and forgotten at once -------------------------------------------------------------------

    def _open_to_write(
        self, path: str, mode: str, block_size: int | None, autocommit: bool = True, **kwargs: Any
    ) -> WrittenFile:
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        if block_size is not None:
            kwargs["block_size"] = block_size
        self._forget([path])
        if "x" in mode and self.exists(path):
            raise present(path)
        if not autocommit:
            kwargs["autocommit"] = False
        return WrittenFile(self.target.open(path, mode, **kwargs), path, mode, lambda: self._forget([path]))

    async def _reached(self) -> Any:
        """The target; making it may import much and ask its server."""
        return await asyncio.to_thread(lambda: self.target)

    def _forget(self, paths: Sequence[str]) -> None:
        """See Mount.forget."""
        self.mount.forget(paths)

    async def _write(self, name: str, paths: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        """Runs a method of the target, in a thread or on its loop; before and after, `paths` are forgotten."""
        touched = [self._stripped(path) for path in paths]
        target = await self._reached()
        self._forget(touched)
        try:
            if self.mount.has_coroutine(name):
                return await getattr(target, f"_{name}")(*args, **kwargs)
            return await asyncio.to_thread(getattr(target, name), *args, **kwargs)
        finally:
            await self.mount.reader.facts.forget_shared(touched, below=True)
            target.invalidate_cache()

    @there
    async def _pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        path = self._stripped(path)
        if mode == "create" and await self._exists(path):
            raise present(path)
        extra = {"mode": mode} if mode != "overwrite" else {}
        await self._write("pipe_file", [path], path, value, **extra, **kwargs)

    @there
    async def _put_file(
        self, lpath: str, rpath: str, mode: str = "overwrite", callback: Any = DEFAULT_CALLBACK, **kwargs: Any
    ) -> None:
        extra = {"mode": mode} if mode != "overwrite" else {}
        rpath = self._stripped(rpath)
        await self._write("put_file", [rpath], lpath, rpath, callback=callback, **extra, **kwargs)

    @there
    async def _cp_file(self, path1: str, path2: str, **kwargs: Any) -> None:
        path1, path2 = self._stripped(path1), self._stripped(path2)
        await self._write("cp_file", [path2], path1, path2, **kwargs)

    @there
    async def _rm_file(self, path: str, **kwargs: Any) -> None:
        path = self._stripped(path)
        await self._write("rm_file", [path], path)

    @there
    async def _rm(self, path: Any, recursive: bool = False, maxdepth: int | None = None, **kwargs: Any) -> None:
        (await self._reached()).invalidate_cache()
        names = self._stripped(path if isinstance(path, list) else [path])
        if maxdepth is not None or not recursive or any(has_magic(name) for name in names):
            names = await self._expand_path(path, recursive=recursive, maxdepth=maxdepth)
        await self._write("rm", names, names, recursive=recursive)

    @there
    async def _mkdir(self, path: str, create_parents: bool = True, **kwargs: Any) -> None:
        path = self._stripped(path)
        await self._write("mkdir", [path], path, create_parents=create_parents, **kwargs)

    @there
    async def _makedirs(self, path: str, exist_ok: bool = False) -> None:
        path = self._stripped(path)
        await self._write("makedirs", [path], path, exist_ok=exist_ok)

    @there
    async def _rmdir(self, path: str) -> None:
        path = self._stripped(path)
        await self._write("rmdir", [path], path)

    def rmdir(self, path: str) -> None:
        """Removes an empty directory."""
        self.mount.wait(self._rmdir(path))

    def mv(self, path1: str, path2: str, recursive: bool = False, maxdepth: int | None = None, **kwargs: Any) -> None:
        """Moves as the target does: a rename where it can."""
        path1, path2 = self._stripped(path1), self._stripped(path2)
        self._here("mv", [path1, path2], path1, path2, recursive=recursive, maxdepth=maxdepth, **kwargs)

    def touch(self, path: str, truncate: bool = True, **kwargs: Any) -> None:
        """Creates an empty file, or empties one."""
        path = self._stripped(path)
        self._here("touch", [path], path, truncate=truncate, **kwargs)

    def _here(self, name: str, paths: Sequence[str], *args: Any, **kwargs: Any) -> None:
        """As `_write`, for methods that targets have only for threads."""
        self._forget(paths)
        try:
            getattr(self.target, name)(*args, **kwargs)
        finally:
            self._forget(paths)
            self.target.invalidate_cache()

    def sign(self, path: str, expiration: int = 100, **kwargs: Any) -> str:
        """A signed URL of the target's."""
        return self.target.sign(self._stripped(path), expiration=expiration, **kwargs)  # type: ignore[no-any-return]
