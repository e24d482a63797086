"""Any fsspec filesystem as an Origin, coroutines or not, and local files without the detour."""

from __future__ import annotations

import os
import stat as stat_bits
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import numpy as np

from tiercache.buffers import Buffer
from tiercache.errors import ChangedError, OriginError, TierCacheError, UnavailableError
from tiercache.metrics import Metrics
from tiercache.model import Outcome
from tiercache.origin import Span, Stat
from tiercache.remote.landing import Landing, Threads, differ
from tiercache.remote.retry import DoubtfulError, ThrottledError
from tiercache.remote.rights import local_reader

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")

VERSION_FIELDS = ("ETag", "etag", "e_tag", "VersionId", "version_id", "generation", "md5Hash")
MTIME_FIELDS = ("mtime", "LastModified", "last_modified", "Last-Modified", "modified", "updated", "created")
ABSENT = (FileNotFoundError, NotADirectoryError)
CAUSES_MAX = 5


class FsspecOrigin:
    """Origin over a filesystem of fsspec. One attempt a call (see RetryingOrigin).

    A filesystem made with `asynchronous=True` runs on the running loop, any other in threads of ours. A version is
    pinned by If-Match where the filesystem can send it (s3fs, http); elsewhere the facts are asked again after the
    bytes have come, and bytes of an object that is not what it was are refused.
    """

    def __init__(
        self, fs: Any, identity: str, *, owned: bool = False, threads: int = 16, metrics: Metrics | None = None
    ) -> None:
        self.identity = identity
        self._fs = fs
        self._owned = owned
        self._metrics = metrics if metrics is not None else Metrics()
        self._threads = Threads(threads)
        self._on_loop = bool(getattr(fs, "async_impl", False) and getattr(fs, "asynchronous", False))
        protocol = fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]
        self._matches = self._on_loop and (protocol in ("http", "https") or hasattr(fs, "_call_s3"))

    async def stat(self, paths: Sequence[str]) -> list[Stat | Outcome]:
        """See Origin."""
        return [await self._stat(path) for path in paths]

    async def read(self, stat: Stat, span: Span, targets: Sequence[Buffer]) -> None:
        """See Origin."""
        if not span.length:
            return
        landing = Landing(targets)
        try:
            if self._matches and stat.version and not stat.version.startswith("W/"):
                body = await self._read_matching(stat, span)
            else:
                stop = span.start + span.length
                body = await self._ask("read", stat.path, "cat_file", stat.path, start=span.start, end=stop)
                await self._check(stat, await self._stat(stat.path))
            if body is None:
                raise ChangedError(f"{stat.path} was deleted while a version of it was read")
            if len(body) != span.length:
                raise DoubtfulError(f"{stat.path}: asked for {span.length} bytes, got {len(body)}")
            self._metrics.add("tiercache_origin_bytes_total", len(body))
            landing.fill(body)
        finally:
            landing.end()

    async def read_tail(self, path: str, length: int) -> tuple[Stat, bytes] | Outcome:
        """See Origin. fsspec has no call for both: facts first, then the bytes of exactly that version; s3fs lends its
        client, which gets both at once."""
        if self._matches and hasattr(self._fs, "_call_s3"):
            answer = await self._read_tail_at_once(path, length)
            if answer is not None:
                return answer
        found = await self._stat(path)
        if not isinstance(found, Stat) or found.is_directory:
            return Outcome.GONE
        span = Span(max(0, found.size - length), min(length, found.size))
        data = bytearray(span.length)
        await self.read(found, span, [Buffer.of(data, writable=True)])
        return found, bytes(data)

    async def write(self, path: str, data: bytes | memoryview) -> Stat:
        """See Origin."""
        await self._ask("write", path, "pipe_file", path, bytes(data))
        found = await self._stat(path)
        return found if isinstance(found, Stat) else Stat(path, memoryview(data).nbytes)

    async def delete(self, paths: Sequence[str]) -> list[Outcome]:
        """See Origin."""
        outcomes = []
        for path, found in zip(paths, await self.stat(paths)):
            there = isinstance(found, Stat) and not found.is_directory
            if there:
                await self._ask("delete", path, "rm_file", path)
            outcomes.append(Outcome.HIT if there else Outcome.GONE)
        return outcomes

    async def close(self) -> None:
        """See Origin. Connections are ended when the filesystem was made for this origin alone (`owned`)."""
        if not self._threads.close() or not self._owned or not self._on_loop:
            return
        # fsspec has no call for this on the running loop; its filesystems keep their session under one of these names.
        if getattr(self._fs, "_s3creator", None) is not None and getattr(self._fs, "_s3", None) is not None:
            await self._fs._s3creator.__aexit__(None, None, None)
        elif hasattr(getattr(self._fs, "_session", None), "closed"):
            await self._fs._session.close()

    async def _stat(self, path: str) -> Stat | Outcome:
        self._forget(path)
        info = await self._ask("head", path, "info", path)
        return Outcome.GONE if info is None else self._fact(path, info)

    def _forget(self, path: str) -> None:
        """Drops what the filesystem may remember of a path: a listing of yesterday is no fact, and must not be what a
        pinned version is compared with. Many filesystems answer `info` from their listings, and not all of them have
        a switch for that."""
        for fs in (self._fs, getattr(self._fs, "sync_fs", None)):  # fsspec's wrapper for coroutines hides the other
            if fs is not None:
                fs.invalidate_cache(path)
                fs.invalidate_cache(path.rstrip("/").rpartition("/")[0])

    async def _check(self, stat: Stat, found: Stat | Outcome) -> None:
        """Raises unless the object is still what was pinned: a change before or while the bytes came stays visible."""
        if not isinstance(found, Stat):
            raise ChangedError(f"{stat.path} was deleted while a version of it was read")
        if differ(stat, found):
            raise ChangedError(f"{stat.path} changed while it was read")

    async def _read_matching(self, stat: Stat, span: Span) -> Any:
        stop = span.start + span.length
        if not hasattr(self._fs, "_call_s3"):
            headers = {"If-Match": f'"{stat.version}"'}
            return await self._ask(
                "read", stat.path, "cat_file", stat.path, start=span.start, end=stop, headers=headers
            )

        async def get() -> Any:
            bucket, key, _ = self._fs.split_path(stat.path)
            where = {"Bucket": bucket, "Key": key, "Range": f"bytes={span.start}-{stop - 1}"}
            answer = await self._fs._call_s3("get_object", IfMatch=f'"{stat.version}"', **where)
            async with answer["Body"] as stream:
                return await stream.read()

        return await self._guard("read", stat.path, get)

    async def _read_tail_at_once(self, path: str, length: int) -> tuple[Stat, bytes] | Outcome | None:
        """As `read_tail`; None where it cannot be done in one request: an empty object has no range."""
        bucket, key, version = self._fs.split_path(path)
        if not key or version:
            return None

        async def get() -> tuple[Any, bytes]:
            answer = await self._fs._call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes=-{max(1, length)}")
            async with answer["Body"] as stream:
                return answer, await stream.read()

        try:
            found = await self._guard("tail", path, get)
        except DoubtfulError:
            return None
        if found is None:
            return Outcome.GONE
        answer, data = found
        size = str(answer.get("ContentRange", "")).rpartition("/")[2]
        info = {"ETag": answer.get("ETag"), "LastModified": answer.get("LastModified")}
        # Without a range in its answer a store has sent the whole object.
        stat = self._fact(path, info | {"size": int(size) if size.isdigit() else len(data)})
        if len(data) < min(length, stat.size):
            raise DoubtfulError(f"{path}: asked for the last {length} bytes of {stat.size}, got {len(data)}")
        self._metrics.add("tiercache_origin_bytes_total", len(data))
        return stat, data[len(data) - min(length, len(data)) :]

    async def _ask(self, operation: str, path: str, name: str, *arguments: Any, **more: Any) -> Any:
        """One call of the filesystem, counted, its faults translated; None for what does not exist."""
        if self._on_loop:
            return await self._guard(operation, path, partial(getattr(self._fs, "_" + name), *arguments, **more))
        work = partial(getattr(self._fs, name), *arguments, **more)
        return await self._guard(operation, path, lambda: self._threads.run(work))

    async def _guard(self, operation: str, path: str, call: Callable[[], Any]) -> Any:
        self._threads.check()
        self._metrics.add("tiercache_origin_requests_total", operation=operation)
        try:
            return await call()
        except ABSENT as error:
            if doubtful_absence(error):
                translate(error.__cause__ or error, path)
            return None
        except Exception as error:  # noqa: BLE001  # a foreign filesystem may raise anything: all of it is translated
            translate(error, path)

    def _fact(self, path: str, info: dict[str, Any]) -> Stat:
        version = next((str(info[name]) for name in VERSION_FIELDS if info.get(name)), "").strip('"')
        if info.get("type") == "directory":
            return Stat(path, 0, is_directory=True)
        if info.get("size") is None:
            raise OriginError(f"{path}: the origin does not say its length")
        found = next((info[name] for name in MTIME_FIELDS if info.get(name)), None)
        return Stat(path, int(info["size"]), version, seconds(found))

    async def list(self, path: str) -> list[Stat] | Outcome:
        """See Origin."""
        self._forget(path)
        rows = await self._ask("list", path, "ls", path, detail=True)
        if rows is None:
            return Outcome.GONE
        own = path.strip("/")
        found = [
            self._fact(row["name"].rstrip("/") or "/", row) for row in rows if row["type"] in ("file", "directory")
        ]
        children = [each for each in found if each.path.strip("/") != own]
        # A file lists itself, and so does the marker "dir/" of some stores.
        if found and not children and not any(row["type"] == "directory" or row["name"].endswith("/") for row in rows):
            return Outcome.GONE
        return sorted(children, key=lambda each: each.path)


class LocalOrigin:
    """Files of this machine or of a mount. A read opens the file, checks that it is what was pinned, reads, and checks
    again; the bytes come into memory of the thread first, because a hung mount may wake up long after the call's end.
    """

    def __init__(self, *, threads: int = 8, metrics: Metrics | None = None) -> None:
        self.identity = f"file+{local_reader()}"
        self._metrics = metrics if metrics is not None else Metrics()
        self._threads = Threads(threads)

    async def stat(self, paths: Sequence[str]) -> list[Stat | Outcome]:
        """See Origin."""
        return await self._run("head", paths[0] if paths else "", lambda: [_local_stat(path) for path in paths])

    async def read(self, stat: Stat, span: Span, targets: Sequence[Buffer]) -> None:
        """See Origin."""
        if not span.length:
            return
        landing = Landing(targets)
        try:
            await self._run("read", stat.path, partial(_local_read, stat, span, landing))
            self._metrics.add("tiercache_origin_bytes_total", span.length)
        finally:
            landing.end()

    async def read_tail(self, path: str, length: int) -> tuple[Stat, bytes] | Outcome:
        """See Origin."""
        return await self._run("tail", path, partial(_local_tail, path, length))

    async def write(self, path: str, data: bytes | memoryview) -> Stat:
        """See Origin. Appears at once, with its directories."""
        return await self._run("write", path, partial(_local_write, path, data))

    async def delete(self, paths: Sequence[str]) -> list[Outcome]:
        """See Origin."""
        return await self._run("delete", paths[0] if paths else "", lambda: [_local_delete(path) for path in paths])

    async def close(self) -> None:
        """See Origin."""
        self._threads.close()

    async def _run(self, operation: str, path: str, work: Callable[[], T]) -> T:
        self._threads.check()
        self._metrics.add("tiercache_origin_requests_total", operation=operation)
        try:
            return await self._threads.run(work)
        except ValueError as error:
            if "\0" not in path:
                raise
            raise OriginError(f"{path!r}: no file can be called so, it has a NUL in it") from error
        except OSError as error:
            translate(error, path)

    async def list(self, path: str) -> list[Stat] | Outcome:
        """See Origin."""
        return await self._run("list", path, partial(_local_list, path))


def _local_stat(path: str) -> Stat | Outcome:
    try:
        return _stat_of(path, os.stat(path))
    except ABSENT:
        return Outcome.GONE


def _stat_of(path: str, found: os.stat_result) -> Stat:
    if stat_bits.S_ISDIR(found.st_mode):
        return Stat(path, 0, is_directory=True)
    return Stat(path, found.st_size, "", found.st_mtime_ns / 1e9)


def _local_read(stat: Stat, span: Span, landing: Landing) -> None:
    try:
        descriptor = os.open(stat.path, os.O_RDONLY | os.O_CLOEXEC)
    except ABSENT:
        raise ChangedError(f"{stat.path} was deleted while it was read") from None
    try:
        received = np.empty(span.length, np.uint8)
        got = _pread_all(descriptor, received.data, span.start)
        now = _stat_of(stat.path, os.fstat(descriptor))
    finally:
        os.close(descriptor)
    # After the bytes: whatever changed before or meanwhile shows here, and what comes later does not matter.
    if (now.size, now.mtime_s) != (stat.size, stat.mtime_s):
        raise ChangedError(f"{stat.path} changed while it was read")
    if got != span.length:
        raise DoubtfulError(f"{stat.path}: asked for {span.length} bytes, got {got}")
    landing.fill(received)


def _pread_all(descriptor: int, target: memoryview, start: int) -> int:
    """Fills `target` from `start` on; how many bytes there were."""
    done = 0
    while done < len(target):
        got = os.preadv(descriptor, [target[done:]], start + done)
        if not got:
            break
        done += got
    return done


def _local_tail(path: str, length: int) -> tuple[Stat, bytes] | Outcome:
    found = _local_stat(path)
    if not isinstance(found, Stat) or found.is_directory:
        return Outcome.GONE
    span = Span(max(0, found.size - length), min(length, found.size))
    data = bytearray(span.length)
    if span.length:
        _local_read(found, span, Landing([Buffer.of(data, writable=True)]))
    return found, bytes(data)


def _local_write(path: str, data: bytes | memoryview) -> Stat:
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    draft = os.path.join(folder, f".{os.path.basename(path)[:100]}.{os.getpid()}.{id(data)}.part")
    try:
        with open(draft, "wb", buffering=0) as stream:
            left = memoryview(data).cast("B")
            while left:
                left = left[stream.write(left) :]
        os.replace(draft, path)
    except BaseException:
        if os.path.exists(draft):
            os.unlink(draft)
        raise
    return _stat_of(path, os.stat(path))


def _local_delete(path: str) -> Outcome:
    try:
        os.unlink(path)
    except (*ABSENT, IsADirectoryError):
        return Outcome.GONE
    return Outcome.HIT


def _local_list(path: str) -> list[Stat] | Outcome:
    try:
        with os.scandir(path) as entries:
            rows = [_local_stat(entry.path) for entry in entries]
    except ABSENT:
        return Outcome.GONE
    return sorted((row for row in rows if isinstance(row, Stat)), key=lambda row: row.path)


def path_of(protocol: str, url: str) -> str:
    """A URL's path as the filesystem of its protocol has it: memory://a is /a there."""
    import fsspec

    try:
        return str(fsspec.get_filesystem_class(protocol)._strip_protocol(url))
    except (ValueError, ImportError):  # nobody can open it, which is said when it is opened
        return url.partition("://")[2]


def seconds(value: object) -> float | None:
    """A time as filesystems tell it (number, datetime, ISO or HTTP date) in seconds since the epoch, UTC."""
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    if isinstance(value, str):
        for parse in (datetime.fromisoformat, parsedate_to_datetime):
            try:
                return seconds(parse(value))
            except ValueError:
                continue
    return None


def doubtful_absence(error: BaseException) -> bool:
    """True when a filesystem says "not found" for another reason: fsspec's http does for every failure of a HEAD."""
    cause = error.__cause__
    if cause is None or isinstance(cause, (*ABSENT, KeyError)):
        return False
    return _status(cause)[0] not in (404, 410)


def translate(error: BaseException, path: str) -> NoReturn:
    """Raises what a caller can do something about, for an exception of a filesystem's."""
    if isinstance(error, TierCacheError):
        raise error
    code, headers = _status(error)
    text = f"{path}: {type(error).__name__}: {error}"
    if code == 412:
        raise ChangedError(f"{path} changed while it was read") from error
    if code in (429, 503):
        after = headers.get("retry-after", "")
        raise ThrottledError(text, float(after) if after.isdigit() else 0.0) from error
    if code == 416:
        raise DoubtfulError(text) from error
    if isinstance(error, (PermissionError, IsADirectoryError, ValueError, TypeError)) or 400 <= code < 500:
        raise OriginError(text) from error
    raise UnavailableError(text) from error


def _status(error: BaseException | None) -> tuple[int, dict[str, str]]:
    """HTTP status and headers behind an exception of aiohttp or botocore, or (0, {})."""
    for _ in range(CAUSES_MAX):
        if error is None:
            break
        if isinstance(getattr(error, "status", None), int):
            headers = getattr(error, "headers", None) or {}
            return error.status, {str(k).lower(): str(v) for k, v in headers.items()}  # type: ignore[attr-defined]
        response = getattr(error, "response", None)
        if isinstance(response, dict) and "ResponseMetadata" in response:
            facts = response["ResponseMetadata"]
            return int(facts.get("HTTPStatusCode") or 0), dict(facts.get("HTTPHeaders") or {})
        error = error.__cause__
    return 0, {}
