"""Files that a user names by URL: which there are at their origin, and which keys their pages have in a cache."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tiercache import assemble
from tiercache.clock import SystemClock
from tiercache.errors import ConfigError, OriginError, UnavailableError
from tiercache.keys import page_key
from tiercache.metrics import Metrics
from tiercache.model import Outcome
from tiercache.pages.facts import FileFacts
from tiercache.pages.geometry import part_bytes_of
from tiercache.remote.fsspec_origin import path_of
from tiercache.settings import read_machine
from tiercache.sync import io_loop

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator, Mapping, Sequence

    from tiercache.pages.versions import Pin
    from tiercache.settings import Settings

T = TypeVar("T")

WHOLE_URLS = ("http", "https")
LOCAL = ("file", "local")
AZURE = ("abfs", "abfss", "az")
BUCKETS = ("s3", "s3a", "gs", "gcs")
CREDENTIALS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_PROFILE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_CONFIG_FILE",
)
"""Whoever has set one of these knows how to give credentials."""


@dataclass(frozen=True, slots=True)
class Named:
    """One file: its path at the origin, its size, and the key of its pages (None: no version that can be trusted)."""

    path: str
    size_bytes: int
    key: bytes | None


def finish(work: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine on the process's I/O loop for as long as it takes: each of its steps has a deadline."""
    future = asyncio.run_coroutine_threadsafe(work, io_loop())
    try:
        return future.result()
    except KeyboardInterrupt:
        future.cancel()
        raise


def split_url(url: str) -> tuple[str, str]:
    """(protocol, path) of PROTOCOL://PATH; a plain path is a local file."""
    protocol, mark, path = url.partition("://")
    if not mark:
        return "file", str(Path(url).absolute())
    if not protocol or not path:
        raise ConfigError(f"{url}: give PROTOCOL://PATH, such as s3://bucket/tables")
    if protocol in WHOLE_URLS:  # a path of HTTP is the URL itself
        return protocol, url
    if protocol in LOCAL:
        return protocol, str(Path(path).absolute())
    if protocol in AZURE:  # container@account.dfs.core.windows.net/path
        host, slash, rest = path.partition("/")
        return protocol, f"{host.partition('@')[0]}{slash}{rest}".rstrip("/")
    return protocol, (path if protocol in BUCKETS else path_of(protocol, url)).rstrip("/")


@contextmanager
def told_how(protocol: str, options: Mapping[str, Any]) -> Iterator[None]:
    """Adds to a fault of S3 how credentials are given, where none were."""
    try:
        yield
    except (OriginError, UnavailableError) as fault:
        environ = read_machine().environ
        given = {"key", "secret", "token", "anon", "profile", "session"} & options.keys()
        if protocol not in ("s3", "s3a") or given or any(name in environ for name in CREDENTIALS):
            raise
        how = "-o key=... -o secret=..., or -o anon=true, or AWS_ACCESS_KEY_ID and so on in the environment"
        raise type(fault)(f"{fault}; credentials on the command line: {how}") from fault


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """Options of the origin's filesystem from NAME=VALUE words, as in `-o endpoint_url=http://host:9000`."""
    options: dict[str, Any] = {}
    for pair in pairs:
        name, mark, value = pair.partition("=")
        if not mark or not name:
            raise ConfigError(f"-o {pair}: give NAME=VALUE, such as -o endpoint_url=http://localhost:9000")
        options[name] = {"true": True, "false": False}.get(value.lower(), value)
    return options


async def below(facts: FileFacts, path: str) -> list[Pin]:
    """The file at a path, or every file below it, in order; UnavailableError when there is neither."""
    if path.partition("://")[0] in WHOLE_URLS:
        # Not a listing first: that of a filesystem for HTTP is the whole answer, searched for links.
        pin = (await facts.stat([path]))[0]
        if isinstance(pin, Outcome) or pin.stat.is_directory:
            raise UnavailableError(f"{path}: there is no such file, and HTTP has no folders: name files")
        return [pin]
    found = await facts.children(path)
    if isinstance(found, Outcome) or not found or [pin.stat.path.rstrip("/") for pin in found] == [path]:
        pin = (await facts.stat([path]))[0]
        if isinstance(pin, Outcome):
            raise UnavailableError(f"{path}: there is no such file or folder")
        return [] if pin.stat.is_directory else [pin]
    files: list[Pin] = []
    for child in sorted(found, key=lambda pin: pin.stat.path):
        if not child.stat.is_directory:
            files.append(child)
        elif child.stat.path.rstrip("/") != path:
            files += await below(facts, child.stat.path.rstrip("/"))
    return files


def named(settings: Settings, urls: Sequence[str], options: Mapping[str, Any]) -> list[Named]:
    """Every file under the URLs as its origin has it now, keyed as a cache with these settings keys it."""

    async def look(protocol: str, path: str) -> list[Named]:
        origin = assemble.open_origin(protocol, options, settings=settings)
        facts = FileFacts(origin, patience=settings, clock=SystemClock(), metrics=Metrics())
        shape = settings.page_bytes, part_bytes_of(settings.page_bytes)
        try:
            return [
                Named(
                    pin.stat.path,
                    pin.stat.size,
                    page_key(origin.identity, pin.stat.path, pin.version, *shape) if pin.version else None,
                )
                for pin in await below(facts, path)
            ]
        finally:
            await facts.close()
            await origin.close()

    found: list[Named] = []
    for url in urls:
        protocol, path = split_url(url)
        with told_how(protocol, options):
            found += finish(look(protocol, path))
    return found
