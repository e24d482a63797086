"""Objects in S3, Google Cloud Storage, Azure and behind plain HTTP, over obstore (the Rust object_store).

Only obstore's blocking calls are used, in threads of our own. Its coroutines finish in threads of their own that enter
Python whenever they are done: a process that ends soon after such a call aborts (24 of 40 did; 0 of 40 this way).
"""

from __future__ import annotations

import os
import re
import threading
from collections import OrderedDict
from datetime import timedelta
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar
from urllib.parse import unquote, urlsplit

from tiercache.buffers import Buffer
from tiercache.clock import SystemClock
from tiercache.errors import ChangedError, OriginError, UnavailableError
from tiercache.metrics import Metrics
from tiercache.model import Outcome
from tiercache.origin import Span, Stat
from tiercache.remote.landing import Landing, Threads, differ
from tiercache.remote.options import StoreOptions, bucket_region
from tiercache.remote.retry import DoubtfulError, ThrottledError
from tiercache.remote.split import InexpressibleError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tiercache.clock import Clock


T = TypeVar("T")

STORES_MAX = 64
"""Buckets or hosts whose connections are kept open at once."""
CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_SHARE = 0.5
"""Silence of this share of an attempt's time is a stall."""
WHOLE_S = 24 * 3600.0
"""No limit for an answer with a body: it may take as long as it takes, while bytes come."""
PIECE_BYTES, PIECE_BYTES_MIN, PIECE_BYTES_MAX = 64 << 10, 16 << 10, 1 << 20
"""A body lands in pieces of this size at first, and then of what comes in a moment; what is left of a piece when a
connection breaks is lost."""
PIECE_S = 0.1
STATUS = re.compile(r"status code: (\d{3})")
LIES = ("UnexpectedRange", "NoContentRange", "MissingContentLength", "InvalidContentLength", "ParseContentRange")
NO_RANGES = ("NotPartial", "RangeNotSupported")


class ObjectOrigin:
    """Origin over obstore. Paths are bucket/key (S3, gs, az), or whole URLs (http).

    One request a call, no retries (see RetryingOrigin). `threads` bounds those under way, and a share of `attempt_s`
    the silence in one; a read may take long while bytes come. A thread that was given up ends at the next bytes, or
    when that silence is over; writes end within `attempt_s`, for a late one could undo another. Not usable in a forked
    child: `used_before_fork`.
    """

    def __init__(
        self,
        options: StoreOptions,
        *,
        attempt_s: float = 30.0,
        threads: int = 16,
        metrics: Metrics | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.identity = options.reader
        self._options = options
        self._attempt_s = attempt_s
        self._metrics = metrics if metrics is not None else Metrics()
        self._threads = Threads(threads)
        self._idle_max = threads
        self._clock = clock if clock is not None else SystemClock()
        self._piece_bytes = PIECE_BYTES
        self._stores: OrderedDict[tuple[str, bool], Any] = OrderedDict()
        self._lock = threading.Lock()
        remember_use()

    async def stat(self, paths: Sequence[str]) -> list[Stat | Outcome]:
        """See Origin. A path that is no object but has some below it is a directory."""
        return [await self._threads.run(partial(self._stat, path)) for path in paths]

    async def read(self, stat: Stat, span: Span, targets: Sequence[Buffer]) -> None:
        """See Origin."""
        if span.length:
            await self.read_growing(stat, span, targets, lambda _: None)

    async def read_growing(
        self, stat: Stat, span: Span, targets: Sequence[Buffer], came: Callable[[int], None]
    ) -> None:
        """See GrowingOrigin."""
        landing = Landing(targets, came)
        try:
            await self._threads.run(partial(self._read, stat, span, landing))
        finally:
            landing.end()

    async def read_tail(self, path: str, length: int) -> tuple[Stat, bytes] | Outcome:
        """See Origin. A store that knows no suffix ranges costs a HEAD more."""
        return await self._threads.run(partial(self._read_tail, path, max(1, length)))

    async def write(self, path: str, data: bytes | memoryview) -> Stat:
        """See Origin."""
        return await self._threads.run(partial(self._write, path, data))

    async def delete(self, paths: Sequence[str]) -> list[Outcome]:
        """See Origin. Each path costs a HEAD, because stores do not say whether there was something to delete."""
        found = await self.stat(paths)
        there = [path for path, each in zip(paths, found) if isinstance(each, Stat) and not each.is_directory]
        if there:
            await self._threads.run(partial(self._delete, there))
        return [Outcome.HIT if path in there else Outcome.GONE for path in paths]

    async def close(self) -> None:
        """See Origin. Threads that still wait for an answer end by themselves."""
        if self._threads.close():
            self._stores.clear()

    def _stat(self, path: str) -> Stat | Outcome:
        store, key = self._place(path)
        if key:
            meta = self._ask("head", path, lambda obstore: obstore.head(store, key))
            if meta is not None:
                return self._fact(path, meta)
        if self._options.scheme == "http":
            return Outcome.GONE
        below = self._ask("list", path, lambda obstore: list(islice(obstore.list(store, key or None, chunk_size=1), 1)))
        if below is None or (key and not below):
            return Outcome.GONE
        return Stat(path.strip("/"), 0, is_directory=True)

    def _read(self, stat: Stat, span: Span, landing: Landing) -> None:
        store, key = self._place(stat.path)
        options: dict[str, Any] = {"range": (span.start, span.start + span.length)}
        if stat.version and not stat.version.startswith("W/"):
            options["if_match"] = f'"{stat.version}"'
        result = self._ask("read", stat.path, lambda obstore: obstore.get(store, key, options=options))
        if result is None:
            raise ChangedError(f"{stat.path} was deleted while a version of it was read")
        self._check(stat, span, result)
        got, last, piece_bytes = 0, None, self._piece_bytes
        began_s = self._clock.monotonic()
        try:
            for piece in self._pieces(result, stat.path, piece_bytes):
                got += len(piece)
                # The last piece lands when the body has ended as announced: until then it may be part of a lie.
                if last is not None or got > span.length:
                    break
                if got == span.length or len(piece) < piece_bytes:
                    last = piece
                elif not landing.fill(piece):
                    return
        finally:
            rate = got / max(1e-6, self._clock.monotonic() - began_s)
            self._piece_bytes = min(PIECE_BYTES_MAX, max(PIECE_BYTES_MIN, int(rate * PIECE_S)))
        if got == span.length and last is not None:
            landing.fill(last)
        else:
            raise DoubtfulError(f"{stat.path}: asked for {span.length} bytes, got {got}")

    def _pieces(self, result: Any, path: str, piece_bytes: int) -> Iterator[Any]:
        """A body as it comes, in pieces of at least that many bytes each but the last."""
        from obstore.exceptions import BaseError

        stream = iter(result.stream(min_chunk_size=piece_bytes))
        while True:
            try:
                piece = next(stream, None)
            except (BaseError, OSError) as error:
                translate(error, path)
            if piece is None:
                return
            self._metrics.add("tiercache_origin_bytes_total", len(piece))
            yield piece

    def _check(self, stat: Stat, span: Span, result: Any) -> None:
        """Compares an answer's own facts with what was asked for, before a byte of it counts."""
        found = self._fact(stat.path, result.meta)
        if tuple(result.range) != (span.start, span.start + span.length):
            raise DoubtfulError(f"{stat.path}: asked for {span}, got bytes {result.range}")
        if differ(stat, found):
            raise ChangedError(
                f"{stat.path} changed: {stat.version or stat.mtime_s} is now {found.version or found.mtime_s}"
            )

    def _read_tail(self, path: str, length: int) -> tuple[Stat, bytes] | Outcome:
        store, key = self._place(path)
        if not key:
            return Outcome.GONE
        options = {"range": {"suffix": length}}
        try:
            result = self._ask("tail", path, lambda obstore: obstore.get(store, key, options=options))
        except DoubtfulError:
            return self._read_tail_by_size(path, length)
        if result is None:
            return Outcome.GONE
        stat = self._fact(path, result.meta)
        start, stop = result.range
        body = b"".join(self._pieces(result, path, PIECE_BYTES_MAX))
        if stop != stat.size or stop - start != min(length, stat.size) or len(body) != stop - start:
            raise DoubtfulError(f"{path}: asked for the last {length} of {stat.size} bytes, got {start} to {stop}")
        return stat, body

    def _read_tail_by_size(self, path: str, length: int) -> tuple[Stat, bytes] | Outcome:
        """For empty objects (no range of them exists) and stores that do not know suffix ranges."""
        stat = self._stat(path)
        if not isinstance(stat, Stat) or stat.is_directory:
            return Outcome.GONE
        if not stat.size:
            return stat, b""
        span = Span(max(0, stat.size - length), min(length, stat.size))
        data = bytearray(span.length)
        self._read(stat, span, Landing([Buffer.of(data, writable=True)]))
        return stat, bytes(data)

    def _write(self, path: str, data: bytes | memoryview) -> Stat:
        store, key = self._place(path, writes=True)
        size = memoryview(data).nbytes
        result = self._ask("write", path, lambda obstore: obstore.put(store, key, data))
        if result is None:
            raise OriginError(f"{path}: there is no such bucket")
        return Stat(path, size, str(result.get("e_tag") or "").strip('"'))

    def _delete(self, paths: Sequence[str]) -> None:
        by_store: dict[int, tuple[Any, list[str]]] = {}
        for path in paths:
            store, key = self._place(path, writes=True)
            by_store.setdefault(id(store), (store, []))[1].append(key)
        for store, keys in by_store.values():
            self._ask("delete", paths[0], partial(_delete_keys, store, keys))

    def _ask(self, operation: str, path: str, call: Callable[[Any], T]) -> T | None:
        """One request by obstore, counted, its faults translated; None for what does not exist."""
        import obstore
        from obstore.exceptions import BaseError

        self._metrics.add("tiercache_origin_requests_total", operation=operation)
        try:
            return call(obstore)
        except FileNotFoundError as error:
            # 405 says that the method is not allowed; obstore takes it for absence.
            if _status(error) == 405:
                translate(error, path)
            return None
        except (BaseError, OSError, ValueError) as error:
            if operation == "list" and _status(error) == 404:
                return None
            translate(error, path)

    def _fact(self, path: str, meta: Any) -> Stat:
        mtime = meta.get("last_modified")
        mtime_s = mtime.timestamp() if mtime is not None and mtime.timestamp() > 0 else None
        return Stat(path, meta["size"], str(meta.get("e_tag") or "").strip('"'), mtime_s)

    def _place(self, path: str, *, writes: bool = False) -> tuple[Any, str]:
        """(store, key) of a path."""
        # obstore drops slashes at the ends of a key and splits at encoded ones: another object would answer.
        if self._options.scheme == "http":
            parts = urlsplit(path)
            odd = not parts.path.strip("/") or parts.path.startswith("//") or parts.path.endswith("/")
            if parts.query or parts.fragment or odd or "%2f" in parts.path.lower():
                raise InexpressibleError(f"{path}: not a plain path of one object")
            return self._store(f"{parts.scheme}://{parts.netloc}", writes=writes), unquote(parts.path)[1:]
        bucket, _, key = path.lstrip("/").partition("/")
        if not bucket:
            raise InexpressibleError("buckets cannot be listed here: name one")
        if key.startswith("/") or "//" in key:
            raise InexpressibleError(f"{path}: a key with an empty part")
        return self._store(bucket, writes=writes), key

    def _store(self, name: str, *, writes: bool) -> Any:
        which = name, writes
        with self._lock:
            if which in self._stores:
                self._stores.move_to_end(which)
                return self._stores[which]
        store = self._connect(name, self._attempt_s if writes else WHOLE_S)
        with self._lock:
            self._stores[which] = store
            while len(self._stores) > STORES_MAX:
                self._stores.popitem(last=False)
        return store

    def _connect(self, name: str, limit_s: float) -> Any:
        return connect(self._options, name, attempt_s=self._attempt_s, limit_s=limit_s, idle_max=self._idle_max)

    def _list(self, path: str) -> list[Stat] | Outcome:
        if self._options.scheme == "http":
            raise InexpressibleError(f"{path}: plain HTTP has no listings")
        store, key = self._place(path)
        found: Any = self._ask("list", path, lambda obstore: obstore.list_with_delimiter(store, key or None))
        if found is None:
            return Outcome.GONE
        bucket = path.partition("/")[0]
        rows = [Stat(f"{bucket}/{prefix}".rstrip("/"), 0, is_directory=True) for prefix in found["common_prefixes"]]
        # The object "dir/" that some writers leave is the directory itself, not a child.
        rows += [self._fact(f"{bucket}/{meta['path']}", meta) for meta in found["objects"] if meta["path"] != key]
        if not rows and key:
            return Outcome.GONE
        return sorted(rows, key=lambda row: row.path)

    async def list(self, path: str) -> list[Stat] | Outcome:
        """See Origin."""
        return await self._threads.run(partial(self._list, path.strip("/")))


def connect(options: StoreOptions, name: str, *, attempt_s: float, limit_s: float, idle_max: int) -> Any:
    """A store of obstore's for a bucket, container or host: `attempt_s` bounds silence, `limit_s` a whole request."""
    from obstore.store import AzureStore, GCSStore, HTTPStore, S3Store

    client = {
        "connect_timeout": timedelta(seconds=min(CONNECT_TIMEOUT_S, attempt_s)),
        "timeout": timedelta(seconds=limit_s),
        "read_timeout": timedelta(seconds=attempt_s * READ_TIMEOUT_SHARE),
        "pool_max_idle_per_host": str(idle_max),
    } | options.client
    # Its own retries know neither our deadline nor our counters.
    common: dict[str, Any] = {"client_options": client}
    common["retry_config"] = {"max_retries": 0, "retry_timeout": timedelta(seconds=attempt_s)}
    if options.credentials is not None:
        common["credential_provider"] = options.credentials
    if options.scheme == "http":
        return HTTPStore.from_url(name, **common)
    if options.scheme == "gs":
        return GCSStore(name, **options.config, **common)
    if options.scheme == "az":
        return AzureStore(name, **options.config, **common)
    config = options.config | ({"region": bucket_region(name)} if options.needs_region else {})
    return S3Store(name, **config, **common)


class _Fork:
    """Whether this process is a child forked after obstore was used: its threads are not here, and calls would hang."""

    user = 0

    @classmethod
    def remember(cls) -> None:
        cls.user = cls.user or os.getpid()


def remember_use() -> None:
    """Obstore is about to be used in this process."""
    _Fork.remember()


def used_before_fork() -> bool:
    """True in a child that was forked from a process where obstore was in use: use an fsspec filesystem there."""
    return _Fork.user not in (0, os.getpid())


def _delete_keys(store: Any, keys: Sequence[str], obstore: Any) -> None:
    obstore.delete(store, list(keys))


def _status(error: BaseException) -> int:
    """HTTP status in an exception of obstore's, 0 without one."""
    found = STATUS.search(str(error).split("\n", 1)[0])
    return int(found[1]) if found else 0


def translate(error: BaseException, path: str) -> NoReturn:
    """Raises what a caller can do something about, for an exception of obstore's."""
    from obstore import exceptions

    text = str(error)
    first = text.split("\n", 1)[0]
    if isinstance(error, exceptions.PreconditionError):
        raise ChangedError(f"{path} changed while it was read") from error
    if isinstance(error, (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError, PermissionError)):
        raise OriginError(f"{path}: the origin refused access ({first})") from error
    if isinstance(error, exceptions.InvalidPathError) or "invalid path" in first or "Could not parse path" in first:
        raise InexpressibleError(f"{path}: a name that cannot be asked for ({first})") from error
    if any(word in text for word in NO_RANGES):
        raise DoubtfulError(f"{path}: the origin ignored the range that was asked for") from error
    if any(word in text for word in LIES):
        raise DoubtfulError(f"{path}: {first}") from error
    code = _status(error)
    if code in (405, 501):
        raise InexpressibleError(f"{path}: {first}") from error
    if code in (429, 503):
        raise ThrottledError(f"{path}: the origin is busy ({first})") from error
    if code == 416:
        raise DoubtfulError(f"{path}: there is no such range") from error
    if 400 <= code < 500 and code != 408:
        raise OriginError(f"{path}: {first}") from error
    raise UnavailableError(f"{path}: {first}") from error
