"""Filling a cache ahead of its readers: files are read through it, window by window, and made durable as they go.

What is there already is not fetched again, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from tiercache import assemble
from tiercache.cli.files import below, finish, split_url, told_how
from tiercache.errors import ConfigError, UnavailableError
from tiercache.notation import format_size
from tiercache.pages.reader import together

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from tiercache.core import Core
    from tiercache.origin import Origin
    from tiercache.pages.reader import PageReader
    from tiercache.pages.versions import Pin
    from tiercache.settings import Settings

WINDOW_BYTES = 16 << 20
"""So much of one file is asked for at once."""
WINDOWS = 2
"""Windows under way at once, over all files: memory stays at this many times the window."""
KEYS_AT_ONCE = 4096


class Progress(Protocol):
    """Whoever shows how far it is."""

    def planned(self, files: int, size_bytes: int) -> None:
        """All files are known."""
        ...

    def advanced(self, size_bytes: int) -> None:
        """So many more bytes are in the cache."""
        ...

    def note(self, text: str) -> None:
        """Something worth a line."""
        ...


@dataclass(slots=True)
class Warmed:
    """What a run did. `fetched_bytes` came from the origin; the rest was there already."""

    files: int = 0
    size_bytes: int = 0
    fetched_bytes: int = 0
    kept_bytes: int = 0
    """Of `size_bytes`, what is on the SSD now (or in memory, where there is no SSD)."""
    origin_requests: int = 0
    skipped: int = 0
    """Files without a version that can be trusted: they are always read at their origin."""

    def facts(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


@contextmanager
def _heard() -> Iterator[list[str]]:
    """What assembly warns of, instead of printing it: here it is the reason of a refusal."""
    said: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    ear, speaker = Ear(), logging.getLogger("tiercache.assemble")
    before, speaker.propagate = speaker.propagate, False
    speaker.addHandler(ear)
    try:
        yield said
    finally:
        speaker.removeHandler(ear)
        speaker.propagate = before


def warm(settings: Settings, urls: Sequence[str], options: Mapping[str, Any], progress: Progress) -> Warmed:
    """Brings every file under the URLs into the cache. Faults: UnavailableError (origin, or another owner), ..."""
    with _heard() as said:
        cache = assemble.acquire(settings)
    try:
        if not settings.ssd_bytes:
            raise ConfigError("ssd_bytes is 0: nothing would be kept beyond this command; give the cache an SSD tier")
        if not cache.durable:
            why = said[-1].partition(";")[0] if said else f"{settings.directory} cannot be used"
            raise UnavailableError(f"{why}: nothing would be kept")
        return finish(_warm_all(cache, urls, options, progress))
    finally:
        assemble.release(cache)


async def _warm_all(cache: Core, urls: Sequence[str], options: Mapping[str, Any], progress: Progress) -> Warmed:
    done = Warmed()
    opened: list[tuple[Origin, PageReader]] = []
    try:
        work: list[tuple[PageReader, Pin]] = []
        for url in urls:
            protocol, path = split_url(url)
            with told_how(protocol, options):
                origin = assemble.open_origin(protocol, options, settings=cache.settings, metrics=cache.metrics)
                reader = assemble.open_reader(cache, origin)
                opened.append((origin, reader))
                work += [(reader, pin) for pin in await below(reader.facts, path)]
        kept = [(reader, pin) for reader, pin in work if reader.run_of(pin) is not None]
        done.skipped = len(work) - len(kept)
        if done.skipped:
            settle_s = cache.settings.mtime_settle_s
            why = f"they have no ETag and were modified less than {settle_s:g} s ago (mtime_settle_s): try again later"
            progress.note(f"{done.skipped} of {len(work)} files stay at their origin; {why}")
        done.files, done.size_bytes = len(kept), sum(pin.stat.size for _, pin in kept)
        room = cache.settings.ssd_bytes or cache.settings.memory_bytes
        if done.size_bytes > room:
            progress.note(f"{format_size(done.size_bytes)} are more than the cache holds ({format_size(room)})")
        progress.planned(done.files, done.size_bytes)
        before = _origin_counts(cache)
        await _read_windows(cache, kept, progress)
        after = _origin_counts(cache)
        done.kept_bytes = await _kept_bytes(cache, kept)
        if done.kept_bytes < done.size_bytes:
            lost = format_size(done.size_bytes - done.kept_bytes)
            progress.note(f"{lost} could not be kept: raise ssd_bytes, or memory_bytes and run it again")
        done.origin_requests, done.fetched_bytes = after[0] - before[0], after[1] - before[1]
        return done
    finally:
        for origin, reader in opened:
            await reader.close()
            await origin.close()


async def _read_windows(cache: Core, kept: Sequence[tuple[PageReader, Pin]], progress: Progress) -> None:
    """Reads all windows, a few at a time, and makes what is there durable before more than a queue of it waits."""
    windows = [
        (reader, pin, start, min(start + WINDOW_BYTES, pin.stat.size))
        for reader, pin in kept
        for start in range(0, pin.stat.size, WINDOW_BYTES)
    ]
    limit = max(WINDOW_BYTES, min(cache.settings.queue_bytes, cache.settings.memory_bytes // 4))
    unsaved = 0
    for at in range(0, len(windows), WINDOWS):
        batch = windows[at : at + WINDOWS]
        await together([_read(reader, pin, start, stop) for reader, pin, start, stop in batch])
        size = sum(stop - start for _, _, start, stop in batch)
        unsaved += size
        if unsaved >= limit and cache.durable:
            await cache.flush()
            unsaved = 0
        progress.advanced(size)
    if cache.durable:
        await cache.flush()


async def _read(reader: PageReader, pin: Pin, start: int, stop: int) -> None:
    await reader.read(pin, start, stop)


async def _kept_bytes(cache: Core, kept: Sequence[tuple[PageReader, Pin]]) -> int:
    """Bytes of these file versions that the SSD has (or memory, where there is no SSD)."""
    runs = [reader.run_of(pin) for reader, pin in kept]
    keys = [run.key.hex() for run in runs if run is not None and run.size]
    tier = 1 if cache.durable else 0
    total = 0
    for low in range(0, len(keys), KEYS_AT_ONCE):
        total += sum(row[tier] for row in await cache.call("held", {"keys": keys[low : low + KEYS_AT_ONCE]}))
    return total


def _origin_counts(cache: Core) -> tuple[int, int]:
    total = cache.metrics.total
    return int(total("tiercache_origin_requests_total")), int(total("tiercache_origin_bytes_total"))
