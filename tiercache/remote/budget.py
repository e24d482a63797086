"""Budget: how several writers keep one bucket under one cap, each sure of its own share, whoever dies and when.

The ledger says who may have how many bytes in the bucket. It is a chain of objects, budget/1, budget/2, ...: the newest
counts, and a change is the creation of the next one, which one of two writers who try succeeds in (a conditional PUT
with If-None-Match, or link(2) on a file system). Old ones are deleted, never the newest; whoever sleeps so long that it
creates a number anew that was deleted finds that its own is not in the newest, and has changed nothing.

The laws by which the cap holds at every instant:

1. The sum of all holdings is never over the cap: `grow` takes what is free and no more.
2. A writer has never more bytes in the bucket than its holding: it counts a pack from before its PUT until after its
   deletion; a PUT of which nobody knows whether it happened counts until the bucket has said.
3. A holding is a lease. Its writer renews it, and begins no PUT that could end after it is over by its own clock,
   counted from before the renewal. Others take it as over when they have seen it unchanged for a lease and GRACE_S
   longer by their own clocks; no two clocks are compared. Rates of clocks, and the time that a request lives after its
   client gave it up, are what GRACE_S allows for.
4. What the dead had is not freed but taken over, with all of its packs: whoever needs room does, and then evicts them,
   or keeps them, as its own. A writer that stops by itself leaves a holding that can be taken over at once. Objects of
   nobody whom the ledger knows (somebody deleted it, say) are deleted after a while.

Where somebody wants a share and all is given away, those that hold more than their fair part (the cap divided by the
writers that live) give back what is over it.
"""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from tiercache.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable
    from random import Random

    from tiercache.clock import Clock
    from tiercache.remote.asking import Asking
    from tiercache.remote.bucket import Bucket

log = logging.getLogger(__name__)

FOLDER = "budget/"
LEASE_S = 120.0
RENEW_SHARE = 1 / 3
"""A holding is renewed when this share of its lease is over."""
GRACE_S = 60.0
PUT_S = 30.0
"""No PUT is waited for any longer; none begins when less than this is left of the lease."""
RESERVED_BYTES = 256 << 10
"""What ledgers may take of the cap: LEDGER_BYTES_MAX times those that are kept, and one for each of some who try."""
LEDGER_BYTES_MAX = 16 << 10
KEPT = 4
ATTEMPTS_MAX = 12
PAUSE_S = 0.02


@dataclass(frozen=True, slots=True)
class Holding:
    """What one writer may have in the bucket."""

    writer: str
    bytes: int
    serial: int = 0
    """Changes with every change by its writer: so others see that it lives."""
    wants: bool = False
    """Whether it needs more, and all is given away."""
    closed: bool = False
    """Whether its writer is gone for good, so that anybody may take it over."""
    of: tuple[str, ...] = ()
    """Writers whose packs it has taken over."""


@dataclass(frozen=True, slots=True)
class Ledger:
    """All holdings; `number` is its place in the chain, 0 before the first."""

    number: int = 0
    holdings: tuple[Holding, ...] = ()

    @property
    def given_bytes(self) -> int:
        """The sum of all holdings."""
        return sum(one.bytes for one in self.holdings)

    def of(self, writer: str) -> Holding | None:
        """The holding of a writer."""
        return next((one for one in self.holdings if one.writer == writer), None)

    def with_(self, mine: Holding, without: str = "") -> Ledger:
        """The next ledger, in which one holding is new, and another is gone."""
        rest = [one for one in self.holdings if one.writer not in (mine.writer, without)]
        return Ledger(self.number + 1, (*rest, mine))


def encode(ledger: Ledger) -> bytes:
    """A ledger as it is stored."""
    return json.dumps([asdict(one) for one in ledger.holdings], separators=(",", ":")).encode()


def decode(number: int, data: bytes) -> Ledger:
    """The ledger that was stored. UnavailableError where it is none: nothing is written until somebody looks."""
    try:
        rows = json.loads(data)
        if not isinstance(rows, list):
            raise TypeError("no list")
        holdings = tuple(Holding(**_checked(row) | {"of": tuple(row["of"])}) for row in rows)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UnavailableError(f"{FOLDER}{number:012d} is no ledger ({error}): nothing more is written") from error
    return Ledger(number, holdings)


def _checked(row: Any) -> dict[str, Any]:
    """One holding as it was stored; ValueError where a field is not of its type."""
    if not isinstance(row, dict) or not isinstance(row["of"], list):
        raise ValueError("a holding is no object")
    strings = [row["writer"], *row["of"]]
    numbers = [row["bytes"], row.get("serial", 0)]
    flags = [row.get("wants", False), row.get("closed", False)]
    if not all(isinstance(one, str) and one for one in strings) or not all(isinstance(one, bool) for one in flags):
        raise ValueError("a holding has fields of other types")
    if not all(type(one) is int and 0 <= one < 1 << 63 for one in numbers):
        raise ValueError("a holding has numbers that cannot be")
    return row


def take_over(ledger: Ledger, mine: Holding, left: Holding) -> Ledger:
    """The ledger in which `mine` has all that somebody left."""
    of = (*mine.of, left.writer, *left.of)
    heir = replace(mine, bytes=mine.bytes + left.bytes, serial=mine.serial + 1, of=of)
    return ledger.with_(heir, without=left.writer)


def grow(
    ledger: Ledger, mine: Holding, need_bytes: int, *, limit_bytes: int, step_bytes: int, over: Collection[str]
) -> Ledger | None:
    """The ledger in which `mine` has `need_bytes` or more, as far as the laws allow: out of what is free, else of what
    somebody left (writers in `over` are gone), which is taken over whole; else `mine` says that it wants more. None
    where it has enough, or nothing can change."""
    if mine.bytes >= need_bytes:
        return None
    live = {one.writer for one in ledger.holdings if not one.closed and one.writer not in over} | {mine.writer}
    others = [one for one in ledger.holdings if one.writer in live and one.writer != mine.writer]
    fair = limit_bytes // len(live)
    most = fair if any(one.wants for one in others) else limit_bytes
    free = limit_bytes - ledger.given_bytes
    if need_bytes <= min(most, mine.bytes + free):
        size = min(most, mine.bytes + free, max(need_bytes, mine.bytes + step_bytes))
        return ledger.with_(replace(mine, bytes=size, serial=mine.serial + 1, wants=False))
    left = next((one for one in ledger.holdings if one.writer not in live), None)
    if left is not None:
        return take_over(ledger, mine, left)
    if need_bytes <= fair and not mine.wants:
        return ledger.with_(replace(mine, wants=True, serial=mine.serial + 1))
    return None


class Budget:
    """The holding of one writer, and what of it is used; on the loop."""

    def __init__(
        self,
        asking: Asking,
        limit_bytes: int,
        *,
        clock: Clock,
        random: Random,
        step_bytes: int,
        lease_s: float = LEASE_S,
        grace_s: float = GRACE_S,
        put_s: float = PUT_S,
    ) -> None:
        """`limit_bytes` is the cap of all objects together; shares grow by `step_bytes` or more."""
        self._asking, self._clock, self._random = asking, clock, random
        self.limit_bytes = limit_bytes - RESERVED_BYTES
        self._step_bytes, self._lease_s, self.grace_s, self.put_s = step_bytes, lease_s, grace_s, put_s
        self._lock = asyncio.Lock()
        self._seen: dict[str, tuple[int, float]] = {}  # writer -> serial, and since when it is unchanged
        self._others_want = False
        self._live = 1
        self._crowded = False  # whether the ledger was over half full when it was seen last
        self._begin()

    def _begin(self) -> None:
        """As a writer that nobody knows yet."""
        self.writer = f"{self._random.getrandbits(64):016x}"
        self._mine = Holding(self.writer, 0)
        self._over_s = self._over_wall_s = 0.0
        self._unlisted_bytes, self._unlisted = 0, set[str]()
        self._objects: dict[str, int] = {}  # what is counted of this writer, and of those it has taken over
        self._used_bytes = 0
        self._ceiling: int | None = None  # a change that may have happened, or not: what it would leave of the share

    @property
    def share_bytes(self) -> int:
        """What this writer may have in the bucket now; 0 when its lease is over, or nearly."""
        if self._left_s() < self.put_s:
            return 0
        return self._mine.bytes if self._ceiling is None else min(self._mine.bytes, self._ceiling)

    def _left_s(self) -> float:
        """How long the lease lasts. By both clocks: one stands still while a machine sleeps, the other can be set."""
        return min(self._over_s - self._clock.monotonic(), self._over_wall_s - self._clock.wall())

    @property
    def allotted_bytes(self) -> int:
        """What the ledger gives it, whether or not its lease is nearly over."""
        return self._mine.bytes

    @property
    def held(self) -> bool:
        """Whether it has a holding at all."""
        return bool(self._mine.serial)

    @property
    def excess_bytes(self) -> int:
        """What it should give back, because others want their part."""
        return max(0, self._mine.bytes - self.limit_bytes // self._live) if self._others_want else 0

    @property
    def adopted(self) -> tuple[str, ...]:
        """Writers whose packs are this one's to keep or to delete."""
        return self._mine.of

    @property
    def used_bytes(self) -> int:
        """Bytes that this writer has, or may have, in the bucket."""
        return self._used_bytes + self._unlisted_bytes

    def take(self, key: str, size: int) -> bool:
        """Counts an object that is to be created, if the share has room for it."""
        if self.used_bytes + size > self.share_bytes:
            return False
        self._count(key, size)
        return True

    def give(self, key: str) -> None:
        """An object is not in the bucket, and cannot come there any more. Those that are not counted are ignored."""
        self._used_bytes -= self._objects.pop(key, 0)

    @property
    def counted(self) -> set[str]:
        """All objects that are counted."""
        return set(self._objects)

    def _count(self, key: str, size: int) -> None:
        self.give(key)
        self._objects[key] = size
        self._used_bytes += size

    async def grow(self, size: int) -> bool:
        """Tries to get room for `size` bytes more. True where something has changed for the better: look again."""

        def decide(ledger: Ledger) -> Ledger | None:
            return grow(
                ledger,
                ledger.of(self.writer) or self._mine,
                self.used_bytes + size,
                limit_bytes=self.limit_bytes,
                step_bytes=self._step_bytes,
                over=self._over(ledger),
            )

        before = self._mine.bytes
        await self._change(decide)
        return self._mine.bytes > before

    async def adopt(self, writers: Collection[str]) -> bool:
        """Takes over one holding that was left, of one who counts objects of any of `writers`, or of anybody where the
        ledger is over half full; it need not be needed. True where it has: `unlisted` says whose."""

        def decide(ledger: Ledger) -> Ledger | None:
            mine, over = ledger.of(self.writer), self._over(ledger)
            if mine is None:
                return None
            crowded = len(encode(ledger)) > LEDGER_BYTES_MAX // 2
            for one in ledger.holdings:
                left = one.writer != self.writer and (one.closed or one.writer in over)
                if left and (crowded or not {one.writer, *one.of}.isdisjoint(writers)):
                    return take_over(ledger, mine, one)
            return None

        before = self.adopted
        if self.held and (writers or self._crowded):
            await self._change(decide)
        return self.adopted != before

    @property
    def unlisted(self) -> tuple[str, ...]:
        """Writers that were taken over, of whom it is not known yet what they had: list it, and call `listed`."""
        return tuple(sorted(self._unlisted))

    def listed(self, objects: Iterable[tuple[str, int]]) -> None:
        """These lie in the bucket of all who are `unlisted`, as of a listing since they were."""
        for key, size in objects:
            self._count(key, size)
        self._unlisted_bytes, self._unlisted = 0, set()

    async def renew(self, *, done: Collection[str] = ()) -> None:
        """Renews the lease when it is time, gives back what others want and this one does not use, and forgets those of
        `adopted` that have nothing in the bucket any more (`done`)."""
        if not self.held or (self._left_s() > self._lease_s * (1 - RENEW_SHARE) and not self.excess_bytes and not done):
            return

        def decide(ledger: Ledger) -> Ledger | None:
            mine = ledger.of(self.writer)
            if mine is None:
                return None
            size = max(self.used_bytes, mine.bytes - self.excess_bytes)
            of = tuple(one for one in mine.of if one not in done)
            return ledger.with_(replace(mine, bytes=min(size, mine.bytes), serial=mine.serial + 1, of=of))

        await self._change(decide)

    async def writers(self) -> set[str]:
        """Everybody whose objects are counted in some holding."""
        ledger = await self._newest()
        return {name for one in ledger.holdings for name in (one.writer, *one.of)}

    async def close(self) -> None:
        """Leaves the holding, as small as it can be, to whoever wants it."""

        def decide(ledger: Ledger) -> Ledger | None:
            mine = ledger.of(self.writer)
            if mine is None:
                return None
            size = min(mine.bytes, max(0, self.used_bytes))
            return ledger.with_(replace(mine, bytes=size, serial=mine.serial + 1, wants=False, closed=True))

        if self.held:
            await self._change(decide)

    def _over(self, ledger: Ledger) -> set[str]:
        """Writers whose lease is over, as far as this one has watched them."""
        now_s = self._clock.monotonic()
        alive = {one.writer: one.serial for one in ledger.holdings}
        self._seen = {
            writer: self._seen[writer] if self._seen.get(writer, (-1, 0.0))[0] == serial else (serial, now_s)
            for writer, serial in alive.items()
        }
        over_s = self._lease_s + self.grace_s
        return {writer for writer, (_, since_s) in self._seen.items() if now_s - since_s > over_s} - {self.writer}

    def _note(self, ledger: Ledger) -> None:
        over = self._over(ledger)
        live = [one for one in ledger.holdings if not one.closed and one.writer not in over]
        self._live = max(1, len(live))
        self._crowded = len(encode(ledger)) > LEDGER_BYTES_MAX // 2
        self._others_want = any(one.wants for one in live if one.writer != self.writer)

    # -- the chain -----------------------------------------------------------------------------------------------------

    async def _newest(self) -> Ledger:
        for _ in range(ATTEMPTS_MAX):
            number = await self._number()
            if not number:
                return Ledger()
            data = await self._asking.ask("ledger", partial(_read, number=number))
            if data is not None:  # else it was deleted since: there are newer ones
                return decode(number, bytes(data))
        raise UnavailableError("the ledger of the bucket changes faster than it can be read")

    async def _number(self) -> int:
        found = await self._asking.ask("ledger", lambda bucket: bucket.list(FOLDER))
        numbers = [int(key[len(FOLDER) :]) for key, _ in found if key[len(FOLDER) :].isdigit()]
        return max(numbers, default=0)

    async def _change(self, decide: Callable[[Ledger], Ledger | None]) -> None:
        """Makes `decide`'s ledger the newest one, deciding anew where somebody else was faster. UnavailableError where
        nobody knows whether it happened."""
        async with self._lock:
            for attempt in range(ATTEMPTS_MAX):
                before = await self._newest()
                self._note(before)
                now = before.of(self.writer)
                if self.held and now is None:
                    self._lost()
                    return
                if now is not None and now.serial != self._mine.serial:
                    self._accept(now)  # a change of which nobody knew has happened
                after = decide(before)
                if after is None:
                    return
                if await self._create(after):
                    return
                await asyncio.sleep(self._random.uniform(0.0, PAUSE_S * 2.0 ** min(attempt, 6)))
            raise UnavailableError("too many writers change the ledger of the bucket at once")

    async def _create(self, ledger: Ledger) -> bool:
        """Whether this ledger is the newest, or one that the newest came from."""
        mine, data = ledger.of(self.writer), encode(ledger)
        assert mine is not None
        if len(data) > LEDGER_BYTES_MAX:
            raise UnavailableError("there are too many writers to one bucket")
        began_s, began_wall_s = self._clock.monotonic(), self._clock.wall()
        if mine.bytes < self._mine.bytes:
            self._ceiling = mine.bytes if self._ceiling is None else min(self._ceiling, mine.bytes)
        made = await self._asking.ask(
            "ledger", lambda bucket: bucket.put(_key(ledger.number), data, create=True), within_s=self.put_s
        )
        if not made:
            return False
        newest = await self._newest()
        now = newest.of(self.writer)
        if now is None or now.serial != mine.serial:
            return False  # a number that had been deleted was created anew: it counts for nobody
        self._accept(now)
        self._ceiling = None
        self._over_s, self._over_wall_s = began_s + self._lease_s, began_wall_s + self._lease_s
        self._note(newest)
        try:
            await self._clean(newest.number)
        except OSError as error:
            log.debug("old ledgers stay in %s for now (%s)", self._asking.bucket.place, error)
        return True

    def _accept(self, now: Holding) -> None:
        """The ledger says so of this writer. All that the dead could have counts as used until it is listed."""
        if heirs := set(now.of) - set(self._mine.of):
            gained = max(0, now.bytes - self._mine.bytes)
            self._unlisted_bytes += gained
            self._unlisted |= heirs
        self._mine = now

    def _lost(self) -> None:
        """Somebody has taken this writer for dead, and its packs with its holding: it begins as a new one."""
        log.warning("%s: this writer's share was over, and taken over by another", self._asking.bucket.place)
        self._begin()

    async def _clean(self, newest: int) -> None:
        """Deletes ledgers that nobody needs any more."""

        def clean(bucket: Bucket) -> None:
            numbers = [(int(key[len(FOLDER) :]), key) for key, _ in bucket.list(FOLDER) if key[len(FOLDER) :].isdigit()]
            bucket.delete([key for number, key in numbers if number <= newest - KEPT])

        await self._asking.ask("ledger", clean)


def _read(bucket: Bucket, number: int) -> memoryview | None:
    return bucket.get(_key(number))


def _key(number: int) -> str:
    return f"{FOLDER}{number:012d}"
