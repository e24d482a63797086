"""What the remote tier of a directory holds, where no owner can say it: one listing of its bucket, with a deadline."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from tiercache.errors import TierCacheError
from tiercache.notation import format_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tiercache.settings import Settings

LOOK_S = 5.0
"""A bucket that has not been listed by then is said not to answer: whoever asks for totals does not wait for it."""


def look(settings: Settings, within_s: float = LOOK_S) -> dict[str, Any] | None:
    """Usage of the bucket against its cap, in the form of core.call("status"); None where the settings name none. What
    is in the way of a look is the `reason`, and then nobody knows the usage: None."""
    if not settings.remote_url:
        return None
    try:
        sizes = asyncio.run(_sizes(settings, within_s))
    except TimeoutError:
        return _facts(settings, None, f"no answer within {within_s:g} s")
    except (TierCacheError, OSError) as error:
        return _facts(settings, None, " ".join(str(error).split()))
    return _facts(settings, sizes)


async def _sizes(settings: Settings, within_s: float) -> list[int]:
    """Of everything that counts: packs, and what belongs to them."""
    from tiercache.remote.bucket import open_bucket, parse_options
    from tiercache.remote.catalog import PACKS
    from tiercache.remote.landing import Threads

    def listed() -> Sequence[tuple[str, int]]:
        options = parse_options(settings.remote_options)
        # Opening may ask others already: for credentials, or a metadata service for its region.
        return open_bucket(settings.remote_url, options, deadline_s=within_s).list(PACKS)

    threads = Threads(1)
    try:
        async with asyncio.timeout(within_s):
            found = await threads.run(listed)
    finally:
        threads.close()
    return [size for _, size in found]


def _facts(settings: Settings, sizes: list[int] | None, reason: str = "") -> dict[str, Any]:
    return {
        "health": "off" if sizes is None else "healthy",
        "reason": reason,
        "used_bytes": None if sizes is None else sum(sizes),
        "capacity_bytes": settings.remote_bytes,
        "used_files": None if sizes is None else len(sizes),
    }


def line(facts: dict[str, Any], place: str) -> str:
    """One line of it. `place`: what to call the bucket."""
    cap = format_size(facts["capacity_bytes"])
    reason = f" ({facts['reason']})" if facts["reason"] else ""
    where = f"{place}: " if place else ""
    if facts["used_bytes"] is None:
        return f"{where}cannot be reached{reason}; its cap is {cap}"
    health = {"healthy": "", "off": ", and does not answer now", "read_only": ", and takes nothing now"}[
        facts["health"]
    ]
    return f"{where}{format_size(facts['used_bytes'])} of {cap} in {facts['used_files']:,} packs{health}{reason}"
