"""What the owner of a shared directory says of it, for the commands that would otherwise open the directory."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, TypeVar

from tiercache import assemble
from tiercache.cli.contents import Held, by_form, with_tier
from tiercache.cli.files import finish
from tiercache.errors import LockedError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from tiercache.core import Core
    from tiercache.settings import Settings
    from tiercache.ssd.tier import SsdTier

T = TypeVar("T")

KEYS_AT_ONCE = 4096


def answered(
    settings: Settings,
    by_owner: Callable[[Core], Coroutine[Any, Any, T]],
    by_tier: Callable[[SsdTier], Awaitable[T]],
) -> T:
    """Asks the directory's owner where one lives, and the SSD tier itself where none does; starts nothing."""
    core = assemble.visit(settings)
    if core is None:
        found: T = with_tier(settings, by_tier)
        return found
    try:
        return finish(by_owner(core))
    finally:
        finish(core.close())


async def scan(core: Core) -> list[Held]:
    """Everything that is held, by key, the largest first."""
    found: dict[bytes, Held] = {}
    after = 0
    while True:
        piece = await core.call("contents", {"after": after})
        for text, form, kind, entries, in_memory, on_ssd in piece["rows"]:
            key = bytes.fromhex(text)
            before = found.get(key, Held(key, form, kind, 0, 0))
            found[key] = Held(
                key, form, kind, before.entries + entries, before.held_bytes + on_ssd, before.memory_bytes + in_memory
            )
        after = piece["after"]
        if not after:
            return sorted(found.values(), key=lambda row: (-max(row.held_bytes, row.memory_bytes), row.key))


async def stat(core: Core) -> dict[str, Any]:
    """Totals: usage against caps, health, entries by form, and who uses the directory now."""
    tiers = await core.call("status", {})
    held = await scan(core)
    return {
        **tiers.get("ssd", tiers["memory"]),
        "ssd": "ssd" in tiers,
        "held_bytes": sum(row.held_bytes for row in held),
        "memory_bytes": sum(row.memory_bytes for row in held),
        "entries": sum(row.entries for row in held),
        "forms": by_form(held),
        "memory": tiers["memory"],
        "remote": tiers.get("remote"),
        "peers": await core.call("peers", {}),
        "owner": await core.call("owner", {}),
    }


async def evict(core: Core, *, keys: frozenset[bytes] | None = None, down_to: int | None = None) -> dict[str, int]:
    """As contents.evict, by the owner: in memory and on SSD."""
    if keys is None:
        answer: dict[str, int] = await core.call("evict", {"down_to": down_to or 0})
        return answer
    total = {"evicted_bytes": 0, "evicted_entries": 0, "held_bytes": 0}
    rest = sorted(keys)
    for low in range(0, max(1, len(rest)), KEYS_AT_ONCE):
        answer = await core.call("evict", {"keys": [key.hex() for key in rest[low : low + KEYS_AT_ONCE]]})
        for name in ("evicted_bytes", "evicted_entries"):
            total[name] += answer[name]
        total["held_bytes"] = answer["held_bytes"]
    return total


def refuse_when_open(settings: Settings) -> None:
    """Raises LockedError, saying who, when processes share the directory now."""
    core = assemble.visit(settings)
    if core is None:
        return
    try:
        who = finish(core.call("owner", {}))
    finally:
        finish(core.close())
    others = [str(one["pid"]) for one in who["clients"] if one["pid"] != os.getpid()]
    users = f"for processes {', '.join(others)}" if others else "for nobody any more: it goes in some seconds"
    raise LockedError(f"{settings.directory} is open in its owner, process {who['pid']}, {users}")
