"""Catalog: which block lies in which pack of a bucket, in memory, and how that is found out."""

from __future__ import annotations

import asyncio
import itertools
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tiercache.errors import CorruptionError
from tiercache.remote import packs, snapshots
from tiercache.remote.bucket import PART_MARK
from tiercache.remote.packs import ROWS_MAX, TAIL_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from tiercache.clock import Clock
    from tiercache.metrics import Metrics
    from tiercache.model import Payload
    from tiercache.remote.asking import Asking
    from tiercache.remote.packs import Rows
    from tiercache.remote.snapshots import Listed

log = logging.getLogger(__name__)

PACKS, INDEX = "packs/", "index/"
LIST_S = 30.0
"""A listing, or a snapshot, may take this long: no reader waits for it."""
GUESS_BYTES = 32 << 10
"""So much of a pack's end is fetched at first: its table, in most cases."""
FEW = 8
"""Up to so many new packs are asked one by one; of more, snapshots tell first."""
AT_ONCE = 4
HIDDEN_MAX = 1 << 16
"""Entries that were deleted here which are remembered."""


@dataclass(slots=True)
class Pack:
    """One pack that can be read. `priority` and `tick` say when it is given up: the lowest goes first."""

    key: str
    size: int
    rows: Rows
    since: int
    """Listings that began before this one do not know of it."""
    worth: float = 0.0
    """Seconds that it takes to make a byte of it anew, on average."""
    priority: float = 0.0
    tick: int = 0
    expires: bool = field(default=False)
    until_s: int = 0
    """When the last of its entries is over; 0 is never."""

    @property
    def writer(self) -> str:
        """Who wrote it."""
        return writer_of(self.key)


def writer_of(key: str) -> str:
    """The writer of a pack or snapshot, by its key."""
    return key.split("/", 2)[1]


class Catalog:
    """See the module. `find`, `prefix` and `places` may be called in any thread."""

    def __init__(self, asking: Asking, *, clock: Clock, metrics: Metrics) -> None:
        self._asking, self._clock, self._metrics = asking, clock, metrics
        self.packs: dict[str, Pack] = {}
        self._where: dict[bytes, tuple[Pack, int]] = {}
        self.bad: dict[str, int] = {}
        """Objects that are no packs, or damaged, by size: they are not asked again while they are there."""
        self._told: set[str] = set()
        """Snapshots that were read."""
        self._hidden: dict[bytes, int] = {}  # and which deletion it was
        self.deletions = 0
        """How many there were so far; see `show`."""
        self.gone: set[str] = set()
        """Packs that others have deleted, until somebody clears it."""
        self._ticks = itertools.count(1)
        self._round = 0
        self._listing = asyncio.Lock()
        self.inflation = 0.0
        """Priority of what was given up last: what is new, or used, counts from there (GreedyDual-Size, Cao and Irani,
        USITS 1997)."""
        self.listed = False
        """Whether the bucket has been listed once."""
        self.count = 0
        """Objects that the last listing found: asking again costs a request for every thousand of them."""
        self.used_bytes = 0
        """All packs in the bucket, as of the last listing and what was written and deleted here since."""

    def find(self, keys: Sequence[bytes]) -> list[Payload | None]:
        """See RemoteBlocks.find."""
        now_s, found = self._clock.wall(), list["Payload | None"]()
        for key in keys:
            place = self._where.get(key)
            if place is None or _over(place, now_s):
                found.append(None)
            else:
                found.append(packs.payload_of(place[0].rows[place[1]]))
        return found

    def prefix(self, keys: Sequence[bytes]) -> int:
        """How many of these, from the first on, are there."""
        now_s, where = self._clock.wall(), self._where
        for count, key in enumerate(keys):
            place = where.get(key)
            if place is None or _over(place, now_s):
                return count
        return len(keys)

    def place(self, key: bytes) -> tuple[Pack, int] | None:
        """The pack that has an entry, and where its record starts there."""
        place = self._where.get(key)
        return (place[0], int(place[0].rows[place[1]]["offset"])) if place is not None else None

    def living(self, pack: Pack) -> Rows:
        """The rows of a pack that are found there, and whose time is not over."""
        now_s = self._clock.wall()
        places = [self._where.get(key) for key in packs.keys_of(pack.rows)]
        good = [
            i for i, at in enumerate(places) if at is not None and at[0] is pack and at[1] == i and not _over(at, now_s)
        ]
        return pack.rows[good]

    def touch(self, pack: Pack) -> None:
        """Somebody reads from it."""
        pack.priority, pack.tick = self.inflation + pack.worth, next(self._ticks)

    def add(self, listed: Listed) -> None:
        """A pack that is there."""
        if listed.key in self.packs or len(self._where) + len(listed.rows) > ROWS_MAX:
            return
        rows = listed.rows
        size, ends = max(1, int(rows["size"].sum(dtype="i8"))), rows["expiry_s"]
        pack = Pack(
            listed.key,
            listed.size,
            rows,
            since=self._round,
            worth=float(rows["cost_s"].sum(dtype="f8")) / size,
            expires=bool(ends.any()),
            until_s=int(ends.max()) if len(ends) and ends.all() else 0,
        )
        self.touch(pack)
        self.packs[pack.key] = pack
        for i, key in enumerate(packs.keys_of(rows)):
            if key not in self._hidden:
                self._where[key] = (pack, i)

    def drop(self, key: str) -> None:
        """A pack is gone, or is about to be."""
        pack = self.packs.pop(key, None)
        if pack is None:
            return
        for name in packs.keys_of(pack.rows):
            place = self._where.get(name)
            if place is not None and place[0] is pack:
                del self._where[name]

    def hide(self, keys: Sequence[bytes]) -> None:
        """These are not to be found, in any pack, until they are shown again."""
        self.deletions += 1
        for key in keys:  # also those of which nothing is known yet: they may be in the bucket, or on their way there
            self._where.pop(key, None)
            self._hidden.pop(key, None)
            self._hidden[key] = self.deletions
        while len(self._hidden) > HIDDEN_MAX:
            del self._hidden[next(iter(self._hidden))]

    def show(self, keys: Sequence[bytes], deletions: int) -> None:
        """These may be found again, unless they were deleted since there were so many deletions."""
        for key in keys if self._hidden else ():
            if self._hidden.get(key, 0) <= deletions:
                self._hidden.pop(key, None)

    def forget(self, key: bytes, pack: Pack) -> None:
        """What lies there as this entry is damaged."""
        place = self._where.get(key)
        if place is not None and place[0] is pack:
            del self._where[key]
        self._metrics.add("tiercache_corruptions_total", 1, tier="remote")

    # -- finding out ---------------------------------------------------------------------------------------------------

    async def refresh(self) -> None:
        """Lists the bucket and reads what is new there. UnavailableError or OriginError where it cannot be asked."""
        async with self._listing:
            self._round += 1
            found = await self._asking.ask("list", lambda bucket: bucket.list(PACKS), within_s=LIST_S)
            listing = {key: size for key, size in found if PART_MARK not in key and key.count("/") == 2}
            for key in [one.key for one in self.packs.values() if one.key not in listing and one.since < self._round]:
                self.drop(key)
                self.gone.add(key)
            self.count, self.used_bytes = len(found), sum(listing.values())
            self.bad = {key: size for key, size in self.bad.items() if key in listing}
            await self._learn(listing)
            self.listed = True

    def _unknown(self, listing: Mapping[str, int]) -> list[str]:
        return [key for key in listing if key not in self.packs and key not in self.bad]

    async def _learn(self, listing: Mapping[str, int]) -> None:
        if len(self._unknown(listing)) > FEW:
            await self._read_snapshots(listing)
        fresh = sorted(self._unknown(listing), reverse=True)
        for start in range(0, len(fresh), AT_ONCE):
            some = fresh[start : start + AT_ONCE]
            tables = await asyncio.gather(*[self._table(key, listing[key]) for key in some])
            for key, rows in zip(some, tables, strict=True):
                if rows is not None:
                    self.add(snapshots.Listed(key, listing[key], rows))

    async def _read_snapshots(self, listing: Mapping[str, int]) -> None:
        """Reads the newest snapshot of every writer, unless it was read before."""
        found = await self._asking.ask("list", lambda bucket: bucket.list(INDEX), within_s=LIST_S)
        newest = newest_of(found)
        self._told &= {key for key, _ in found}
        for key, size in newest.items():
            if key in self._told or size > snapshots.SNAPSHOT_BYTES_MAX:
                continue
            self._told.add(key)
            data = await self._asking.ask("snapshot", lambda bucket, key=key: bucket.get(key), within_s=LIST_S)  # type: ignore[misc]
            if data is None:
                continue
            try:
                told = await self._asking.work(lambda key=key, data=data: snapshots.decode(key, data))  # type: ignore[misc]
            except CorruptionError as error:
                self._damaged(error)
                continue
            for one in told:
                if listing.get(one.key) == one.size:
                    self.add(one)

    async def _table(self, key: str, size: int) -> Rows | None:
        """The rows of a pack, out of its own table; None where there is none."""
        guess = min(size, GUESS_BYTES)
        if guess < TAIL_BYTES:
            self.bad[key] = size
            return None
        end = await self._asking.ask("table", lambda bucket: bucket.get(key, size - guess, guess))
        if end is None:
            return None
        try:
            span = packs.table_span(key, end[-TAIL_BYTES:], size)
            if span.start >= size - guess:
                return packs.decode_table(key, end[span.start - size + guess :])
            table = await self._asking.ask("table", lambda bucket: bucket.get(key, span.start, size - span.start))
            return packs.decode_table(key, table) if table is not None else None
        except CorruptionError as error:
            self.bad[key] = size
            self._damaged(error)
            return None

    def _damaged(self, error: CorruptionError) -> None:
        self._metrics.add("tiercache_corruptions_total", 1, tier="remote")
        log.warning("in %s: %s; it is left out", self._asking.bucket.place, error)


def newest_of(found: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Of a listing of snapshots, the newest of each writer, with its size."""
    newest: dict[str, tuple[str, int]] = {}
    for key, size in found:
        if PART_MARK not in key and key.count("/") == 2:
            writer = writer_of(key)
            newest[writer] = max(newest.get(writer, ("", 0)), (key, size))
    return dict(newest.values())


def _over(place: tuple[Pack, int], now_s: float) -> bool:
    """Whether the time of an entry is over."""
    pack, row = place
    if not pack.expires:
        return False
    expiry_s = int(pack.rows[row]["expiry_s"])
    return 0 < expiry_s <= now_s
