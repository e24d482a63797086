"""Survey: rare questions about everything that is held, for the command line. Answers are plain JSON values.

Whoever asks may be another process, so long answers come in pieces: `contents` says where the next piece begins.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np

from tiercache.errors import ConfigError
from tiercache.model import Form, Kind, Name, TierId

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping

    import numpy.typing as npt

    from tiercache.cache.elsewhere import Elsewhere
    from tiercache.cache.far import Met
    from tiercache.cache.recovery import Recovery
    from tiercache.cache.tiers import Tiers
    from tiercache.index import Match

    I64 = npt.NDArray[np.int64]

SLOTS_AT_ONCE = 32_768
"""Slots of one piece of the contents: some 3 MB of JSON at most."""
NAMES_AT_ONCE = 512
"""Names read, or entries pinned or removed, under one hold of the index's lock."""
KEYS_MAX = 100_000
"""Keys of one question."""


class Survey:
    """Answers questions over the whole index."""

    def __init__(self, tiers: Tiers, recovery: Recovery) -> None:
        self._tiers, self._recovery = tiers, recovery
        self._questions: dict[str, Callable[[Mapping[str, Any]], Awaitable[Any]]] = {
            "status": self._status,
            "contents": self._contents,
            "held": self._held,
            "evict": self._evict,
            "validate": self._validate,
            "exist": self._exist,
            "peers": self._peers,
            "publish": self._publish,
        }
        self.met: Met | None = None
        """Caches of other machines, if there are any."""
        self.elsewhere: Elsewhere | None = None

    async def answer(self, question: str, arguments: Mapping[str, Any]) -> Any:
        """See Core.call. Raises ConfigError for what is no question, or has other arguments."""
        known = self._questions.get(question)
        if known is None:
            raise ConfigError(f"{question!r} is no question: there are {', '.join(self._questions)}")
        await self._recovery.wait()  # until then the index knows less than the disk holds
        try:
            return await known(arguments)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{question}: these arguments do not fit ({error!r})") from None

    async def _status(self, _: Mapping[str, Any]) -> dict[str, Any]:
        """Usage and health of each tier, the lowest last."""
        tiers = [tier.status() for tier in (self._tiers.memory, self._tiers.ssd) if tier is not None]
        if self._tiers.far is not None:
            tiers.append(self._tiers.far())
        return {
            one.name: {
                "health": one.health.name.lower(),
                "reason": one.reason,
                "used_bytes": one.used_bytes,
                "capacity_bytes": one.capacity_bytes,
                "used_files": one.used_files,
                "capacity_files": one.capacity_files,
            }
            for one in tiers
        }

    async def _exist(self, arguments: Mapping[str, Any]) -> list[int]:
        """For each of the lone entries, or blocks, `keys` (hex): 0 where nobody is known to have it, 1 where a local
        tier has, 3 where object storage has, 4 where a peer is believed to have it. Loads nothing."""
        keys, tiers = _keys(arguments["keys"]), self._tiers
        match = tiers.index.match([Name(key) for key in keys])
        try:
            here = (match.slots >= 0) & ~tiers.expired(tiers.index.facts(match.slots).expiry_s)
        finally:
            tiers.release(match)
        beyond = self.elsewhere.sees(keys) if self.elsewhere is not None and not here.all() else [0] * len(keys)
        return [1 if local else other for local, other in zip(here.tolist(), beyond, strict=True)]

    async def _peers(self, _: Mapping[str, Any]) -> list[dict[str, str | int]]:
        """One row a peer that is connected: who it is, by which transport, what came from it and what it has pinned."""
        return self.met.facts() if self.met is not None else []

    async def _publish(self, arguments: Mapping[str, Any]) -> dict[str, int]:
        """Pins the blocks or lone entries `keys` (hex) until the peer `to` (its name or id) has them, as it finds room:
        how many it has now."""
        names, to = [Name(key) for key in _keys(arguments["keys"])], str(arguments["to"])
        if self.met is None:
            raise ConfigError("this cache has no peers: set peers or peer_listen")
        return {"taken": await self.met.publish(names, to)}

    async def _validate(self, _: Mapping[str, Any]) -> dict[str, Any]:
        """Checks every invariant of the index, which holds it up for as long: for tests and for whoever suspects
        something. `broken` names the first that does not hold, and is empty where all do."""
        index = self._tiers.index
        try:
            index.validate()
            broken = ""
        except AssertionError as fault:
            broken = str(fault) or "an invariant of the index"
        return {"broken": broken, "pins": index.pins, "entries": index.used}

    async def _contents(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Rows [key, form, kind, entries, bytes in memory, bytes on SSD] of the slots from `after` on, joined by key as
        far as this piece goes; `after` of the answer is that of the next piece, 0 at the end."""
        start = int(arguments.get("after", 0))
        residents = self._residents()
        at = int(np.searchsorted(residents, start))
        some = residents[at : at + SLOTS_AT_ONCE]
        rows: dict[bytes, list[Any]] = {}
        for low in range(0, len(some), NAMES_AT_ONCE):
            self._gather(some[low : low + NAMES_AT_ONCE], rows)
            await asyncio.sleep(0)  # readers come first
        after = int(some[-1]) + 1 if at + len(some) < len(residents) else 0
        return {"after": after, "rows": [[key.hex(), *row] for key, row in rows.items()]}

    def _gather(self, slots: I64, rows: dict[bytes, list[Any]]) -> None:
        index = self._tiers.index
        facts = index.facts(slots)
        in_memory, on_ssd = (
            held_bytes(facts.size, facts.part_bytes, parts) for parts in (facts.memory_parts, facts.ssd_parts)
        )
        forms, kinds = index.forms(slots).tolist(), facts.kind.tolist()
        for row, name in enumerate(index.names(slots)):
            form, kind = Form(forms[row]).name.lower(), Kind(kinds[row]).name.lower()
            one = rows.setdefault(name.key, [form, kind, 0, 0, 0])
            one[2] += 1
            one[3] += int(in_memory[row])
            one[4] += int(on_ssd[row])

    async def _held(self, arguments: Mapping[str, Any]) -> list[list[int]]:
        """[bytes in memory, bytes on SSD] of each of `keys` (hex): of all pages of a file version, say."""
        index = self._tiers.index
        answer: list[list[int]] = []
        for key in _keys(arguments["keys"]):
            facts = index.facts(index.pages_of(key))
            answer.append(
                [
                    int(held_bytes(facts.size, facts.part_bytes, parts).sum())
                    for parts in (facts.memory_parts, facts.ssd_parts)
                ]
            )
        return answer

    async def _evict(self, arguments: Mapping[str, Any]) -> dict[str, int]:
        """Forgets in every tier what has one of `keys` (hex), or the least recently used until at most `down_to` bytes
        are held on SSD (in memory, where there is no SSD; 0 is everything); durable. What somebody reads now goes when
        he has done."""
        tiers, index, ssd = self._tiers, self._tiers.index, self._tiers.ssd
        tier = TierId.SSD if ssd is not None else TierId.MEMORY
        keys = _keys(arguments["keys"]) if "keys" in arguments else None
        down_to = int(arguments["down_to"]) if keys is None else 0
        held: list[Match] = []
        try:
            if keys is not None:
                await self._hold_keys(keys, held)
            else:
                await self._hold_all(index.residents(tier) if down_to > 0 else self._residents(), held)
            # From here on no slot can become somebody else's, however long this takes.
            slots = np.concatenate([match.slots for match in held]) if held else np.empty(0, np.int64)
            going = self._oldest(slots, tier, down_to) if down_to > 0 else np.ones(len(slots), bool)
            sizes = self._sizes(slots, tier)
            if ssd is not None:
                sizes = np.maximum(sizes, self._sizes(slots, TierId.MEMORY))
            at = 0
            for match in held:
                some = going[at : at + len(match.slots)]
                at += len(match.slots)
                tiers.free(index.remove(match.slots[some]))
                tiers.release(match)
                await asyncio.sleep(0)
        finally:
            tiers.release(*held)
        if ssd is not None:
            await ssd.flush()
        left = int(self._sizes(index.residents(tier), tier).sum())
        return {"evicted_bytes": int(sizes[going].sum()), "evicted_entries": int(going.sum()), "held_bytes": left}

    async def _hold_all(self, slots: I64, held: list[Match]) -> None:
        """Pins what is readable in these slots by now, whatever that is."""
        for low in range(0, len(slots), NAMES_AT_ONCE):
            held.append(self._tiers.index.hold(slots[low : low + NAMES_AT_ONCE].tolist(), readable=True))
            await asyncio.sleep(0)

    async def _hold_keys(self, keys: Iterable[bytes], held: list[Match]) -> None:
        """Pins pages of file versions, or lone objects or blocks of these names."""
        index = self._tiers.index
        names: list[Name] = []
        for key in dict.fromkeys(keys):
            pages = index.names(index.pages_of(key))
            names += [name for name in pages if name.key == key] or [Name(key)]
        for low in range(0, len(names), NAMES_AT_ONCE):
            match = index.match(names[low : low + NAMES_AT_ONCE])
            held.append(match._replace(slots=match.slots[match.slots >= 0]))
            await asyncio.sleep(0)

    def _oldest(self, slots: I64, tier: TierId, down_to: int) -> npt.NDArray[np.bool_]:
        """Which of these slots, the least recently used first, must go until no more than `down_to` bytes are left in a
        tier."""
        order = np.argsort(self._tiers.index.policies[tier].order(slots), kind="stable")
        sizes = self._sizes(slots[order], tier)
        over = int(sizes.sum()) - down_to
        before = np.concatenate(([0], np.cumsum(sizes)[:-1])) if len(sizes) else sizes
        going = np.zeros(len(slots), bool)
        going[order[before < over]] = True
        return going

    def _residents(self) -> I64:
        index = self._tiers.index
        return np.union1d(index.residents(TierId.MEMORY), index.residents(TierId.SSD))

    def _sizes(self, slots: I64, tier: TierId) -> I64:
        facts = self._tiers.index.facts(slots)
        parts = facts.memory_parts if tier is TierId.MEMORY else facts.ssd_parts
        return held_bytes(facts.size, facts.part_bytes, parts)


def held_bytes(sizes: npt.NDArray[np.uint32], part_bytes: npt.NDArray[np.uint32], parts: npt.NDArray[np.uint64]) -> I64:
    """Bytes present of each entry: whole parts, and the last one as long as the entry is."""
    bits = np.unpackbits(np.ascontiguousarray(parts, "<u8").view(np.uint8).reshape(-1, 8), axis=1, bitorder="little")
    size, step = sizes.astype(np.int64), np.maximum(part_bytes, 1).astype(np.int64)
    last = np.maximum(-(-size // step), 1) - 1
    has_last = bits[np.arange(len(bits)), np.minimum(last, 63)] if len(bits) else bits.sum(axis=1)
    held: I64 = bits.sum(axis=1, dtype=np.int64) * step - has_last * ((last + 1) * step - size)
    return held


def _keys(keys: Any) -> list[bytes]:
    if not isinstance(keys, list) or len(keys) > KEYS_MAX:
        raise ValueError(f"keys must be a list of at most {KEYS_MAX}")
    return [bytes.fromhex(key) for key in keys]
