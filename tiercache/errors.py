"""Faults, one class for each thing that a caller can do about it. Outcomes (miss, full) are values: see model.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio


class TierCacheError(Exception):
    """Any fault of tiercache."""


class ConfigError(TierCacheError, ValueError):
    """A setting, key or argument is wrong: fix it. The message names it and says what would be right."""


class ClosedError(TierCacheError, RuntimeError):
    """The cache was closed: stop using it, or open it again."""


class UnavailableError(TierCacheError, OSError):
    """Something outside did not answer in time or failed: try again, or go on without the cache."""


class AbandonedLoad(UnavailableError):
    """Whoever loaded this for others too went away, or gave up: ask again, and load it. No fault of those who wait.

    `writing`: it may still write to its targets until that is done.
    """

    def __init__(self, message: str = "", writing: asyncio.Future[None] | None = None) -> None:
        super().__init__(message)
        self.writing = writing


class LockedError(UnavailableError):
    """Another process owns this directory: use that one, another directory, or go on with memory alone."""


class CapacityError(TierCacheError):
    """This can never fit under the caps: store less, or raise the cap that the message names."""


class CorruptionError(TierCacheError, OSError):
    """Bytes did not match their digest and there was nowhere else to get them: they were dropped and reported."""


class ChangedError(TierCacheError, OSError):
    """The object changed at its origin while a pinned version of it was read: open it again."""


class OriginError(TierCacheError, OSError):
    """The origin refused or broke its contract: rights, a lying length, a malformed answer."""


class ProtocolError(TierCacheError):
    """A peer or a stored format speaks another language: the message says which versions met."""
