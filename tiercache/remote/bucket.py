"""Bucket: the few things that blocks in object storage need of it, over object stores and over a shared file system.

Objects are written once, whole or not at all, and only one of two writers who create the same name succeeds: all that
is built on top (packs.py, snapshots.py, budget.py) needs nothing else, so that it is the same on S3, Google Cloud
Storage, Azure and a directory that many hosts mount.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import unquote, urlsplit

from tiercache.clock import system_random
from tiercache.errors import ConfigError, OriginError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from random import Random

DEADLINE_S = 30.0
SECRETS = ("secret", "token", "passw", "account_key", "private_key", "sas_key", "connection_string", "signature")
"""In the names of options that are credentials: settings are shown, and written down; these must not be among them."""
PART_MARK = ".part-"
"""In the name of a file that is not whole yet; what a dead writer left of it counts like any object."""
SAFE = re.compile(r"[A-Za-z0-9._/-]+")


class Bucket(Protocol):
    """A flat set of objects below one prefix. Every call blocks, ends within the bucket's deadline, and may be made in
    any thread. Faults: UnavailableError (it may have happened or not), OriginError (refused: it has not happened)."""

    place: str
    """What to call it in messages; no secrets."""

    def put(self, key: str, data: bytes | bytearray, *, create: bool = False) -> bool:
        """Writes an object, all of it or nothing. With `create` it is False, and nothing is written, where one has that
        name: of several who create one name at once, one succeeds."""
        ...

    def get(self, key: str, start: int = 0, length: int | None = None) -> memoryview | None:
        """Bytes [start, start + length) of an object, or all; None where there is none. Never fewer bytes."""
        ...

    def list(self, prefix: str) -> Sequence[tuple[str, int]]:
        """(key, size) of every object whose key starts with `prefix`, as of one moment after the call began."""
        ...

    def delete(self, keys: Sequence[str]) -> None:
        """Deletes objects; those that are not there are no fault."""
        ...


class StoreBucket:
    """A bucket over obstore: S3, Google Cloud Storage, Azure, or its memory for tests."""

    def __init__(self, store: Any, prefix: str, place: str) -> None:
        """Objects lie below `prefix`, which is empty or ends with a slash."""
        self.place = place
        self._store, self._prefix = store, prefix

    def put(self, key: str, data: bytes | bytearray, *, create: bool = False) -> bool:
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        mode = "create" if create else "overwrite"
        try:
            self._ask(key, lambda obstore, path: obstore.put(self._store, path, data, mode=mode, use_multipart=False))
        except FileNotFoundError as error:
            raise OriginError(f"{self.place}: there is no such bucket") from error
        except (AlreadyExistsError, PreconditionError):
            return False
        return True

    def get(self, key: str, start: int = 0, length: int | None = None) -> memoryview | None:
        def ask(obstore: Any, path: str) -> Any:
            if length is None:
                return obstore.get(self._store, path).bytes()
            return obstore.get_range(self._store, path, start=start, length=length)

        if length == 0:
            return memoryview(b"")
        try:
            found = memoryview(self._ask(key, ask))
        except FileNotFoundError:
            return None
        if length is not None and len(found) != length:
            raise UnavailableError(f"{self.place}/{key}: asked for {length} bytes, got {len(found)}")
        return found

    def list(self, prefix: str) -> Sequence[tuple[str, int]]:
        folder, _, start = prefix.rpartition("/")
        cut = len(self._prefix)

        def ask(obstore: Any, path: str) -> Sequence[tuple[str, int]]:
            pages = obstore.list(self._store, path or None)
            return [(meta["path"][cut:], int(meta["size"])) for page in pages for meta in page]

        found = self._ask(folder, ask)
        return [row for row in found if row[0].startswith(prefix)] if start else found

    def delete(self, keys: Sequence[str]) -> None:
        if not keys:
            return
        paths = [self._prefix + key for key in keys]
        try:
            self._ask(keys[0], lambda obstore, _: obstore.delete(self._store, paths))
        except FileNotFoundError:  # some stores stop at the first one that is not there
            for key in keys:
                with contextlib.suppress(FileNotFoundError):
                    self._ask(key, lambda obstore, path: obstore.delete(self._store, path))

    def _ask(self, key: str, call: Callable[[Any, str], Any]) -> Any:
        """One request; FileNotFoundError and what a condition says pass, all else is translated."""
        import obstore
        from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

        from tiercache.remote.objects import translate

        try:
            return call(obstore, self._prefix + key)
        except (FileNotFoundError, AlreadyExistsError, PreconditionError):
            raise
        except (BaseError, OSError, ValueError) as error:
            translate(error, f"{self.place}/{key}")


class FileBucket:
    """A bucket in a directory, which may be one that many hosts mount: it needs rename and link, and nothing else."""

    def __init__(self, root: str, random: Random) -> None:
        self.place = root
        self._root = root
        self._token = f"{random.getrandbits(64):016x}"
        self._serial = iter(range(1 << 62))

    def put(self, key: str, data: bytes | bytearray, *, create: bool = False) -> bool:
        path = os.path.join(self._root, key)
        part = f"{path}{PART_MARK}{self._token}-{next(self._serial)}"
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            try:
                with open(part, "xb", buffering=0) as file:
                    _write_all(file.fileno(), data)
                    os.fsync(file.fileno())
                if not create:
                    os.rename(part, path)
                    return True
                try:
                    os.link(part, path)  # unlike rename, it refuses a name that is there
                except FileExistsError:
                    return False
                return True
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(part)
        except OSError as error:
            raise _fault(error, path) from error

    def get(self, key: str, start: int = 0, length: int | None = None) -> memoryview | None:
        path = os.path.join(self._root, key)
        try:
            with open(path, "rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size - start if length is None else length
                data = os.pread(file.fileno(), max(0, size), start)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _fault(error, path) from error
        if len(data) != size:
            raise UnavailableError(f"{path}: asked for {size} bytes from {start}, got {len(data)}")
        return memoryview(data)

    def list(self, prefix: str) -> Sequence[tuple[str, int]]:
        folder = os.path.join(self._root, prefix.rpartition("/")[0])
        return [row for row in self._walk(folder) if row[0].startswith(prefix)]

    def _walk(self, folder: str) -> Iterator[tuple[str, int]]:
        for parent, _, names in os.walk(folder):
            for name in names:
                path = os.path.join(parent, name)
                try:
                    size = os.stat(path).st_size
                except FileNotFoundError:
                    continue
                except OSError as error:
                    raise _fault(error, path) from error
                yield os.path.relpath(path, self._root), size

    def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            try:
                os.unlink(os.path.join(self._root, key))
            except FileNotFoundError:
                continue
            except OSError as error:
                raise _fault(error, key) from error


def _write_all(fd: int, data: bytes | bytearray) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]


def _fault(error: OSError, path: str) -> OriginError | UnavailableError:
    """A full disk and missing rights have written nothing; whatever else went wrong, nobody knows."""
    kind = OriginError if isinstance(error, PermissionError) else UnavailableError
    return kind(f"{path}: {error.strerror or error}")


def parse_options(text: str) -> dict[str, Any]:
    """The setting `remote_options`, a JSON object with options in the style of the protocol's fsspec filesystem; empty
    text is none. ConfigError for what is none, and for credentials, which come from the environment or a profile."""
    if not text:
        return {}
    try:
        options = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"remote_options must be a JSON object: {error}") from error
    if not isinstance(options, dict):
        raise ConfigError('remote_options must be a JSON object, such as {"endpoint_url": "http://127.0.0.1:9000"}')
    if found := sorted(set(_credentials(options))):
        raise ConfigError(
            f"remote_options must not have {', '.join(found)}: settings are shown to others; give credentials in the"
            " environment of the process, or name a profile"
        )
    return options


def _credentials(value: Any, name: str = "") -> Iterator[str]:
    """Names of options, at any depth, that are credentials, or have some in a URL."""
    if isinstance(value, dict):
        for key, inside in value.items():
            if inside is not None and any(one in key.lower() for one in SECRETS):
                yield key
            else:
                yield from _credentials(inside, key)
    elif isinstance(value, list):
        for inside in value:
            yield from _credentials(inside, name)
    elif isinstance(value, str) and "://" in value and any(mark in value for mark in "@?"):
        yield name


def open_bucket(url: str, options: Mapping[str, Any] | None = None, *, deadline_s: float = DEADLINE_S) -> Bucket:
    """The bucket that a URL names, connected at its first use: s3://bucket/prefix, gs://..., az://container/prefix, or
    file:///directory (a plain path too). `options` are those of the protocol's fsspec filesystem; no request takes
    longer than `deadline_s`. Raises ConfigError for what cannot be opened."""
    from tiercache.remote.opening import OBJECT_PROTOCOLS

    marks = "?#" if url.startswith(("/", "file:///")) and not url.startswith("//") else "@?#"
    if any(mark in url for mark in marks):  # which may be credentials, so that it is not repeated
        raise ConfigError(
            "remote_url must not have a user, a query or a fragment (@ ? #): give credentials in the environment of the"
            " process, or name a profile in remote_options; in a path of file:// write %3F and %23"
        )
    parts = urlsplit(url)
    if parts.scheme in ("", "file"):
        path = unquote(parts.path)
        if not os.path.isabs(path) or parts.netloc not in ("", "localhost") or options:
            raise ConfigError(f"remote_url {url!r} must be file:///an/absolute/path, and takes no options")
        return FileBucket(path.rstrip("/") or "/", system_random())
    scheme = OBJECT_PROTOCOLS.get(parts.scheme, "http")
    prefix = unquote(parts.path).strip("/")
    if scheme == "http" or not SAFE.fullmatch(parts.netloc) or not SAFE.fullmatch(prefix or "x") or "//" in prefix:
        raise ConfigError(
            f"remote_url {url!r} must be s3://bucket/prefix, gs://bucket/prefix, az://container/prefix or"
            " file:///directory, the prefix made of letters, digits and . _ - /"
        )
    store = _store(scheme, parts.netloc, dict(options or {}), deadline_s)
    return StoreBucket(store, prefix + "/" if prefix else "", f"{parts.scheme}://{parts.netloc}/{prefix}".rstrip("/"))


def _store(scheme: str, name: str, options: dict[str, Any], deadline_s: float) -> Any:
    try:
        import obstore  # noqa: F401  # asked for here, so that its absence is known now
    except ImportError as error:
        raise ConfigError("blocks in object storage need obstore: pip install tiercache[s3]") from error
    from tiercache.remote.objects import connect, remember_use, used_before_fork
    from tiercache.remote.options import UNDERSTOOD, Unsupported

    if used_before_fork():
        raise ConfigError("this process was forked from one that used obstore: open the remote tier elsewhere")
    try:
        found = UNDERSTOOD[scheme](options)
    except Unsupported as error:
        raise ConfigError(f"remote_options that are not understood: {error}") from error
    except (OriginError, OSError) as error:
        raise ConfigError(f"{scheme}://{name} cannot be opened: {error}") from error
    remember_use()
    try:
        return connect(found, name, attempt_s=deadline_s, limit_s=deadline_s, idle_max=16)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{scheme}://{name} cannot be opened: {error}") from error
