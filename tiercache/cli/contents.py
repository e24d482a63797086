"""What a cache directory holds, and giving space back, where no owner has it open: opens the SSD tier alone."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tiercache.errors import UnavailableError
from tiercache.model import Form, Kind, part_count

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from tiercache.model import Facts
    from tiercache.settings import Settings
    from tiercache.ssd.tier import SsdTier


@dataclass(frozen=True, slots=True)
class Held:
    """Everything of one key: a file version's pages, a chain's block, or a lone object."""

    key: bytes
    form: str
    kind: str
    entries: int
    held_bytes: int
    """On SSD."""
    memory_bytes: int = 0

    def facts(self) -> dict[str, Any]:
        """One row for people and for JSON."""
        return {
            "key": self.key.hex(),
            "form": self.form,
            "kind": self.kind,
            "entries": self.entries,
            "held_bytes": self.held_bytes,
            "memory_bytes": self.memory_bytes,
        }


def with_tier(settings: Settings, work: Callable[[SsdTier], Awaitable[Any]]) -> Any:
    """Opens the directory's SSD tier, does the work and closes it.

    UnavailableError when there is no cache, and LockedError when another process has it open.
    """
    from tiercache.ssd.tier import SsdTier

    if not settings.ssd_bytes:
        raise UnavailableError("ssd_bytes is 0: there is no SSD tier to look at")
    place = Path(settings.directory)
    if not (place / "FORMAT").is_file():
        raise UnavailableError(f"no cache in {place}: nothing was ever written there, or --directory is wrong")

    async def whole() -> Any:
        tier = SsdTier(
            settings.directory,
            settings.ssd_bytes,
            files_max=settings.ssd_files_max,
            segment_bytes=settings.segment_bytes,
            threads=settings.ssd_threads,
            deadline_s=settings.ssd_deadline_s,
            disk_free_floor_bytes=settings.disk_free_floor_bytes,
            group=settings.share_group,
        )
        try:
            return await work(tier)
        finally:
            await tier.close()

    return asyncio.run(whole())


def part_sizes(facts: Facts) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Bytes present of each row: whole parts, and the last one as long as the entry is."""
    counts = np.array([int(parts).bit_count() for parts in facts.parts], np.int64)
    held = counts * facts.part_bytes.astype(np.int64)
    for row, parts in enumerate(facts.parts):
        size, step = int(facts.sizes[row]), int(facts.part_bytes[row])
        last = part_count(size, step) - 1
        if int(parts) >> last & 1:
            held[row] -= (last + 1) * step - size
    return held


def gathered(batches: Sequence[Facts]) -> list[Held]:
    """Rows joined by key, the largest first."""
    found: dict[bytes, list[Any]] = {}
    for facts in batches:
        sizes = part_sizes(facts)
        for row, width in enumerate(facts.widths):
            key = facts.keys[row, : int(width)].tobytes()
            one = found.setdefault(key, [int(facts.forms[row]), int(facts.kinds[row]), 0, 0])
            one[2] += 1
            one[3] += int(sizes[row])
    rows = [
        Held(key, Form(form).name.lower(), Kind(kind).name.lower(), entries, held)
        for key, (form, kind, entries, held) in found.items()
    ]
    return sorted(rows, key=lambda row: (-row.held_bytes, row.key))


async def scan(tier: SsdTier) -> list[Held]:
    """Everything in the tier, by key."""
    return gathered(await _scanned(tier))


async def _scanned(tier: SsdTier) -> list[Facts]:
    return await asyncio.to_thread(lambda: list(tier.scan()))


async def stat(tier: SsdTier) -> dict[str, Any]:
    """Totals: usage against caps, health, and entries by form."""
    status = tier.status()
    held = await scan(tier)
    return {
        "health": status.health.name.lower(),
        "reason": status.reason,
        "ssd": True,
        "used_bytes": status.used_bytes,
        "capacity_bytes": status.capacity_bytes,
        "used_files": status.used_files,
        "capacity_files": status.capacity_files,
        "held_bytes": sum(row.held_bytes for row in held),
        "entries": sum(row.entries for row in held),
        "forms": by_form(held),
    }


def by_form(held: Sequence[Held]) -> dict[str, dict[str, int]]:
    """Rows summed by form."""
    forms: dict[str, dict[str, int]] = {}
    for row in held:
        one = forms.setdefault(row.form, {"keys": 0, "entries": 0, "held_bytes": 0, "memory_bytes": 0})
        one["keys"] += 1
        one["entries"] += row.entries
        one["held_bytes"] += row.held_bytes
        one["memory_bytes"] += row.memory_bytes
    return forms


async def evict(tier: SsdTier, *, keys: frozenset[bytes] | None = None, down_to: int | None = None) -> dict[str, int]:
    """Gives up what has one of `keys`, or the least recently used until at most `down_to` bytes are held; durable."""
    batches = await _scanned(tier)
    gone: list[int] = []
    gone_bytes, total = 0, sum(int(part_sizes(facts).sum()) for facts in batches)
    rows = [
        (int(tick), int(size), int(location), facts.keys[row, : int(facts.widths[row])].tobytes())
        for facts in batches
        for row, (tick, size, location) in enumerate(zip(facts.ticks, part_sizes(facts), facts.locations, strict=True))
    ]
    for _, size, location, key in sorted(rows):
        if key in keys if keys is not None else total > (down_to or 0):
            gone.append(location)
            gone_bytes += size
            total -= size
    if gone:
        await tier.reclaim([], gone)
    await tier.flush()
    return {
        "evicted_bytes": gone_bytes,
        "evicted_entries": len(gone),
        "held_bytes": total,
    }


def beside(held: Sequence[Held], files: Sequence[tuple[str, int, bytes | None]]) -> list[dict[str, Any]]:
    """One row for each file (path, size, key): how many bytes of this version are held."""
    by_key = {row.key: max(row.held_bytes, row.memory_bytes) for row in held}
    rows = []
    for path, size, key in files:
        have = by_key.get(key, 0) if key is not None else 0
        rows.append({"file": path, "size_bytes": size, "held_bytes": have, "share": have / size if size else 1.0})
    return rows
