"""Opening: which origin serves a protocol, from options in the style of its fsspec filesystem."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from tiercache.clock import system_random
from tiercache.errors import ConfigError
from tiercache.remote.retry import Patience, RetryingOrigin
from tiercache.remote.split import SplitOrigin

if TYPE_CHECKING:
    from collections.abc import Mapping
    from random import Random

    from tiercache.metrics import Metrics
    from tiercache.origin import Origin

OBJECT_PROTOCOLS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "az": "az", "abfs": "az", "http": "http"}
OBJECT_PROTOCOLS |= {"https": "http"}
LOCAL_PROTOCOLS = ("file", "local")
LOCAL_OPTIONS = frozenset({"auto_mkdir", "skip_instance_cache", "use_listings_cache"})


def open_origin(
    protocol: str,
    options: Mapping[str, Any] | None = None,
    *,
    filesystem: Any = None,
    through: str = "",
    patience: Patience | None = None,
    metrics: Metrics | None = None,
    random: Random | None = None,
) -> Origin:
    """An origin that retries within its deadline. Everything heavy is imported here, at the first use.

    `options` are what `fsspec.filesystem(protocol, **options)` takes. `filesystem` is one that exists already: one like
    it, without a memory of listings, is made where it has coroutines, else it is used itself. `through="fsspec"` asks
    for the filesystem where we have something faster. Object stores and HTTP go through obstore when it is installed
    and can do what the options ask; else, and in a child forked after obstore was used, through fsspec. Raises
    ConfigError for what cannot be opened.
    """
    from tiercache.remote.fsspec_origin import FsspecOrigin, LocalOrigin

    patience = patience or Patience()
    options = dict(options or {})
    inner: Origin | None = None
    if filesystem is not None:
        identity = _identity(protocol, options or getattr(filesystem, "storage_options", {}) or {}, filesystem)
        own = _private(filesystem)
        inner = FsspecOrigin(
            own or filesystem, identity, owned=own is not None, threads=patience.concurrency, metrics=metrics
        )
    elif through == "fsspec":
        pass
    elif protocol in OBJECT_PROTOCOLS:
        inner = _objects(OBJECT_PROTOCOLS[protocol], options, patience, metrics)
        if inner is not None:
            inner = SplitOrigin(inner, partial(_over_fsspec, protocol, options, patience, metrics))
    elif protocol in LOCAL_PROTOCOLS and not options.keys() - LOCAL_OPTIONS:
        inner = LocalOrigin(threads=patience.concurrency, metrics=metrics)
    if inner is None:
        inner = _over_fsspec(protocol, options, patience, metrics)
    return RetryingOrigin(inner, patience, random or system_random(), metrics)


def _objects(scheme: str, options: dict[str, Any], patience: Patience, metrics: Metrics | None) -> Origin | None:
    """An origin over obstore, or None where the fsspec filesystem must do it."""
    try:
        import obstore  # noqa: F401  # asked for here, so that its absence is known now and not at the first read
    except ImportError:
        return None
    from tiercache.remote.objects import ObjectOrigin, used_before_fork
    from tiercache.remote.options import UNDERSTOOD, Unsupported

    if used_before_fork():
        return None
    try:
        found = UNDERSTOOD[scheme](options)
    except Unsupported:
        return None
    return ObjectOrigin(found, attempt_s=patience.attempt_s, threads=patience.concurrency, metrics=metrics)


def _over_fsspec(protocol: str, options: dict[str, Any], patience: Patience, metrics: Metrics | None) -> Origin:
    """An origin over a filesystem that is made for it."""
    from tiercache.remote.fsspec_origin import FsspecOrigin

    identity, fs = _identity(protocol, options), _filesystem(protocol, options)
    return FsspecOrigin(fs, identity, owned=True, threads=patience.concurrency, metrics=metrics)


def _filesystem(protocol: str, options: dict[str, Any]) -> Any:
    import fsspec
    from fsspec.asyn import AsyncFileSystem

    try:
        kind = fsspec.get_filesystem_class(protocol)
    except (ValueError, ImportError) as error:
        extra = {"s3": "s3", "s3a": "s3", "http": "http", "https": "http"}.get(protocol)
        hint = f"; pip install tiercache[{extra}]" if extra else ""
        raise ConfigError(f"no origin for {protocol}://: {error}{hint}") from error
    own: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if OBJECT_PROTOCOLS.get(protocol) == "s3":
        own["config_kwargs"] = {"retries": {"total_max_attempts": 1}} | dict(options.get("config_kwargs") or {})
    try:
        fs = _on_loop(kind, options | own) if issubclass(kind, AsyncFileSystem) else None
        if fs is None:
            fs = kind(**(options | own))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"options of {protocol}://: {error}") from error
    if hasattr(fs, "retries"):
        # Patience retries, within a deadline and counted; a second loop inside would multiply with it.
        fs.retries = 1
    return fs


def _on_loop(kind: Any, options: dict[str, Any]) -> Any:
    """A filesystem that works on the cache's loop, or None where that cannot be: a wrapper does as what it wraps."""
    try:
        return kind(**(options | {"asynchronous": True}))
    except (ValueError, RuntimeError):
        return None


def _private(given: Any) -> Any:
    """A filesystem like a given one that works on the cache's loop and remembers no listings, or None.

    Only for those with coroutines: they are made of their options. Others (archives, for one) may do anything when
    they are made.
    """
    if not getattr(given, "async_impl", False):
        return None
    own = {"use_listings_cache": False, "skip_instance_cache": True, "asynchronous": True, "loop": None}
    try:
        fs = type(given)(*given.storage_args, **(given.storage_options | own))
    except (TypeError, ValueError, RuntimeError):
        return None  # such as a wrapper of another filesystem, which stays blocking: FsspecOrigin forgets for it
    if hasattr(fs, "retries"):
        fs.retries = 1
    return fs


def _identity(protocol: str, options: Mapping[str, Any], given: Any = None) -> str:
    """The same as over obstore where that understands the options, so that both share what is cached. `given` is a
    filesystem that was made already: nobody knows any more what a relative path among its options meant."""
    from tiercache.remote.options import S3_IGNORED, UNDERSTOOD, Unsupported
    from tiercache.remote.places import starts_here
    from tiercache.remote.rights import reader

    kind, arguments = OBJECT_PROTOCOLS.get(protocol, ""), getattr(given, "storage_args", ())
    if kind and not arguments and (given is None or not starts_here(protocol, (), options)):
        try:
            return UNDERSTOOD[kind](options).reader
        except Unsupported:
            pass
        options = {name: value for name, value in options.items() if name not in S3_IGNORED}
    return f"{protocol}+{reader(protocol, options, given)}"
