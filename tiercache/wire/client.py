"""SharedCache: a cache whose owner is another process of this host; implements core.Core.

Bytes go straight between the caller's memory and the owner's, which is mapped here; messages carry names and places
only, one a batch. What this process has seen before it reads without asking (glance.py). While no owner can be had,
reads are misses (and what can be glanced at is still a hit), and puts raise UnavailableError.
"""

from __future__ import annotations

import asyncio
import logging
import os
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING

from tiercache.buffers import Buffer
from tiercache.errors import ClosedError, ConfigError, ProtocolError, TierCacheError, UnavailableError
from tiercache.lease import Pieces, look_again
from tiercache.model import Form, Kind, Name, Outcome, Terms
from tiercache.wire import frames
from tiercache.wire.chained import SharedChains
from tiercache.wire.frames import Op, Patience, ReadAsk
from tiercache.wire.glance import glance_into, glance_pages, sees_pages
from tiercache.wire.leasing import Leasing, misses
from tiercache.wire.link import TICK_S, Link
from tiercache.wire.loading import Reading
from tiercache.wire.memo import TOUCHES_MAX
from tiercache.wire.notes_client import SharedNotes
from tiercache.wire.puts import Put, Puts
from tiercache.wire.sockets import Lost

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from tiercache.clock import Clock
    from tiercache.lease import Lease, Load, PageRun
    from tiercache.metrics import Metrics
    from tiercache.settings import Settings
    from tiercache.wire.bond import Greeting
    from tiercache.wire.revive import Ways

log = logging.getLogger(__name__)

EXPIRY_S_MAX = (1 << 32) - 1
"""The last moment that an entry can expire at, in the year 2106."""
ON_LOOP_S = 1.0
"""What must be asked in the middle of a plain call on the loop waits no longer."""
OWNERS_SETTINGS = (
    "memory_bytes", "ssd_bytes", "ssd_files_max", "disk_free_floor_bytes", "ssd_threads", "ssd_deadline_s",
    "queue_bytes", "high_mark", "low_mark", "slots_max", "policy", "segment_bytes", "client_share", "linger_s",
    "remote_url", "remote_options", "remote_bytes", "remote_lifetime_s", "remote_rate_bytes_s", "remote_deadline_s",
    "peers", "peer_listen", "peer_token_file", "peer_transport", "peer_landing_bytes", "peer_rate_bytes_s",
    "peer_deadline_s", "peer_spill",
)  # fmt: skip
"""What belongs to the directory. How files are read and what is verified is each process's own affair."""
OPENED_BEFORE_FORK = (
    "this cache was opened before the fork, in the parent process: open it again with tiercache.open(...)"
)
_HIT = Outcome.HIT
CLOSED = "this cache was closed: open it again with tiercache.open(...)"


class SharedCache(SharedChains):
    """See the module. Made by `open`; `begin()` on the loop before anything else, `close()` at the end, there too."""

    def __init__(self, link: Link, greeting: Greeting, *, settings: Settings, clock: Clock, metrics: Metrics) -> None:
        """Use `open`."""
        self.metrics = metrics
        self._clock = clock
        self.settings = _owners(settings, greeting.settings)
        self._durable = greeting.durable
        self._link = link
        self._leasing = Leasing(link)
        self._puts = Puts(link, self._start, int(self.settings.client_share * self.settings.memory_bytes))
        self._notes: SharedNotes | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = ""
        self._work: set[asyncio.Task[Any]] = set()
        _clients.add(self)

    @classmethod
    def open(cls, ways: Ways, *, settings: Settings, clock: Clock, metrics: Metrics) -> SharedCache:
        """Finds the owner, or starts one; any thread. Raises ProtocolError where the owner speaks another version,
        UnavailableError where none can be had."""
        link = Link(ways)
        bond = link.revive.open()
        try:
            return cls(link, bond.greeting, settings=settings, clock=clock, metrics=metrics)
        except BaseException:
            link.forget(CLOSED)
            raise

    @property
    def clock(self) -> Clock:
        """The clock that expiries are measured by."""
        return self._clock

    @property
    def durable(self) -> bool:
        """Whether the owner has an SSD tier; the last one, while there is none."""
        bond = self._link.revive.now
        if bond is not None:
            self._durable = bond.greeting.durable
        return self._durable

    @property
    def recovered(self) -> bool:
        """True: the owner asks its SSD itself, as long as that is needed."""
        return True

    @property
    def notes(self) -> SharedNotes | None:
        """Facts about origins, shared by all processes of the directory."""
        return self._notes

    # -- any thread ----------------------------------------------------------------------------------------------------

    def lease_resident(self, key: bytes, ordinals: Sequence[int], parts: Sequence[int]) -> Lease | None:
        """Pages of one file version: a glance at them, else a lease from the owner, or None where it lacks some. On the
        loop nobody is asked: None."""
        link, home = self._open()
        if home is not None:
            seen = glance_pages(home, key, ordinals, parts, self._clock.wall())
            if seen is not None:
                link.say_touched()
                return seen
        if link.revive.here or _odd(ordinals, parts):
            return None
        lease = self._leasing.ask(
            Op.LEASE_PAGES,
            lambda number: frames.pack_pages(number, Patience.LOCAL, key, ordinals, parts),
            [Name(key, ordinal) for ordinal in ordinals],
        )
        return _all_or_none(lease)

    def sees(self, key: bytes, ordinals: Sequence[int], parts: Sequence[int]) -> bool:
        """Whether a glance finds all these parts of these pages in memory; nobody is asked, nothing counts as read."""
        _, home = self._open()
        return home is not None and sees_pages(home, key, ordinals, parts, self._clock.wall())

    def lease_local(self, key: bytes, ordinals: Sequence[int], parts: Sequence[int]) -> Lease | None:
        """None: `lease_resident` has waited for the owner's SSD already."""
        del key, ordinals, parts
        self._open()
        return None

    def lease_names_resident(self, names: Sequence[Name]) -> Lease | None:
        """A lease on whole entries, or None unless the owner has all of them. On the loop nobody is asked: None."""
        link, _ = self._open()
        if link.revive.here:
            return None
        lease = self._leasing.ask(Op.LEASE, lambda number: frames.pack_lease(number, Patience.LOCAL, names), names)
        return _all_or_none(lease)

    def match_resident(self, digests: Sequence[bytes]) -> Lease:
        """A lease on the longest prefix of a chain that is in memory as a whole; empty when nothing is."""
        _, home = self._open()
        if not len(digests):
            return misses(0, Outcome.MISS, home)
        names = [Name(digest) for digest in digests]
        lease = self._leasing.ask(Op.MATCH, lambda number: frames.pack_lease(number, Patience.MEMORY, names), names)
        if lease is None:
            return misses(0, Outcome.MISS, home)
        lease.cut()
        return lease

    def get_into_resident(
        self, names: Sequence[Name], targets: Sequence[Buffer], *, verify: bool = True
    ) -> list[Outcome]:
        """Copies whole entries to the start of each target: HIT, MISS where the owner has none (on the loop: where it
        would have to be asked), CORRUPT where a digest differed (that copy is then gone)."""
        link, home = self._open()
        if home is not None:
            outcomes = glance_into(home, names, targets, verify, self._clock.wall())
            if len(home.touched) >= TOUCHES_MAX:
                link.say_touched()
        else:
            outcomes = [Outcome.MISS] * len(names)
        if outcomes.count(_HIT) < len(outcomes):
            rest = [i for i, outcome in enumerate(outcomes) if outcome is Outcome.MISS]
            if not link.revive.here:
                pieces = Pieces(rest)
                for piece in pieces:
                    lease = self._lease([names[i] for i in piece])
                    if lease is None:
                        break  # no owner answers: the next piece would have to wait as long again
                    with lease:
                        _copy_leased(lease, outcomes, piece, targets, verify)
                    pieces.refused(piece, outcomes)
            bad = [names[i] for i, outcome in enumerate(outcomes) if outcome is Outcome.CORRUPT]
            if bad:
                self.quarantine(bad)
        return outcomes

    def _lease(self, names: Sequence[Name]) -> Lease | None:
        return self._leasing.ask(Op.LEASE, lambda number: frames.pack_lease(number, Patience.BEST, names), names)

    def quarantine(self, names: Sequence[Name]) -> None:
        """The memory copies of these were found damaged: the owner counts them and nobody looks at them again."""
        link, home = self._open()
        if home is not None:
            for name in names:
                home.memo.forget(name)
        try:
            link.ask(Op.QUARANTINE, frames.pack_names(names), wait_s=ON_LOOP_S if link.revive.here else None)
        except UnavailableError as fault:
            log.warning("damaged entries could not be reported to the cache's owner: %s", fault)

    def store(self, names: Sequence[Name], values: Sequence[Buffer], terms: Terms | None = None) -> list[Outcome]:
        """Puts whole lone entries into memory (visible, not durable): HIT where the entry is there now, BUSY where
        somebody else is storing it or this process holds too much, FULL where there was no room."""
        self._open()
        return self._puts.store(Put(names, values, terms or Terms()))

    def store_chain(
        self, digests: Sequence[bytes], values: Sequence[Buffer], terms: Terms | None = None, *, parent: bytes = b""
    ) -> list[Outcome]:
        """As `store`, for blocks of one chain in order."""
        self._open()
        names = [Name(digest) for digest in digests]
        return self._puts.store(Put(names, values, terms or Terms(Kind.KV), Form.BLOCK, parent))

    def expiry(self, ttl_s: float | None) -> int:
        """Expiry of an entry put now, in whole seconds since the epoch; 0 for never."""
        if ttl_s is None:
            return 0
        if ttl_s <= 0:
            raise ConfigError(f"ttl_s must be positive, not {ttl_s}: leave it out for an entry that does not expire")
        return min(int(self._clock.wall() + ttl_s) + 1, EXPIRY_S_MAX)

    def stats(self) -> dict[str, int | float]:
        """What the owner holds and did, and what this process counted beside it. Without an owner only the latter."""
        link, _ = self._open()
        own = self.metrics.snapshot()
        try:
            answer = frames.unpack_json(link.ask(Op.STATS).body)
        except UnavailableError:
            return own
        for name, value in own.items():
            answer[name] = answer.get(name, 0) + value
        return dict(sorted(answer.items()))

    def disown(self) -> None:
        """Makes this object refuse every call: it came into a forked child."""
        self._closed = OPENED_BEFORE_FORK
        self._link.forget(OPENED_BEFORE_FORK)

    # -- on the loop ---------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """From now on this loop is the client's: the asynchronous connection is laid."""
        self._loop = loop = asyncio.get_running_loop()
        self._notes = SharedNotes(self._asked, self._told, loop)
        self._link.begin(loop, self._notes.push, self._notes.lost)
        self._start(self._laid())
        self._tick()

    async def start(self) -> None:
        """As `begin`, for callers elsewhere; returns when the connection is laid."""
        self.begin()
        await self._laid()

    async def put(
        self,
        names: Sequence[Name],
        values: Sequence[object],
        *,
        kind: Kind = Kind.TENSOR,
        scope: int = 0,
        cost_s: float = 0.0,
        ttl_s: float | None = None,
        durable: bool = False,
    ) -> list[Outcome]:
        """Stores whole entries; see Cache.put."""
        self._open()
        self._check_durable(durable)
        terms = Terms(kind, scope, cost_s, self.expiry(ttl_s))
        return await self._puts.put(Put(names, _sources(values), terms, durable=durable))

    async def put_chain(
        self,
        digests: Sequence[bytes],
        values: Sequence[object],
        *,
        parent: bytes = b"",
        kind: Kind = Kind.KV,
        scope: int = 0,
        cost_s: float = 0.0,
        ttl_s: float | None = None,
        durable: bool = False,
    ) -> list[Outcome]:
        """Stores blocks of one chain in order; see Cache.put_chain."""
        self._open()
        self._check_durable(durable)
        terms = Terms(kind, scope, cost_s, self.expiry(ttl_s))
        names = [Name(digest) for digest in digests]
        return await self._puts.put(Put(names, _sources(values), terms, Form.BLOCK, parent, durable))

    async def lease(self, names: Sequence[Name]) -> Lease:
        """A lease on whole entries, brought to memory from the SSD where needed; look at its `outcomes`."""
        _, home = self._open()
        lease = await self._leasing.request(
            Op.LEASE, lambda number: frames.pack_lease(number, Patience.BEST, names), names
        )
        return lease if lease is not None else misses(len(names), Outcome.MISS, home)

    async def match(self, digests: Sequence[bytes]) -> Lease:
        """A lease on the longest prefix of a chain that the local tiers have, in memory."""
        _, home = self._open()
        if not len(digests):
            return misses(0, Outcome.MISS, home)
        names = [Name(digest) for digest in digests]
        lease = await self._leasing.request(
            Op.MATCH, lambda number: frames.pack_lease(number, Patience.BEST, names), names
        )
        lease = lease if lease is not None else misses(0, Outcome.MISS, home)
        lease.cut()
        return lease

    async def get_into(self, names: Sequence[Name], targets: Sequence[Buffer], *, verify: bool = True) -> list[Outcome]:
        """Copies whole entries to the start of each target, from memory or the SSD: HIT, or why not."""
        outcomes = self.get_into_resident(names, targets, verify=verify)
        damaged: set[int] = set()
        pieces = Pieces([i for i, outcome in enumerate(outcomes) if outcome is not Outcome.HIT])
        for piece in pieces:
            rest = piece
            while rest:
                with await self.lease([names[i] for i in rest]) as lease:
                    _copy_leased(lease, outcomes, rest, targets, verify)
                if pieces.refused(rest, outcomes):
                    break
                rest = look_again(names, outcomes, rest, damaged, self.quarantine)
        return outcomes

    async def read_pages(self, run: PageRun, ordinals: Sequence[int], parts: Sequence[int], load: Load) -> Lease:
        """A lease on pages of one file version with these parts in memory; `load` brings what no tier has, in this
        process, and what it raises is raised. Without an owner all items are FULL: read those around the cache."""
        _, home = self._open()
        if _odd(ordinals, parts):
            raise ConfigError("pages are asked for once in a batch, each with the parts that are wanted")
        shape = (run.key, run.size, run.page_bytes, run.part_bytes, run.scope, run.cost_s, run.expiry_s)
        reading = Reading(run, load)
        names = [Name(run.key, ordinal) for ordinal in ordinals]
        try:
            lease = await self._leasing.request(
                Op.READ,
                lambda number: frames.pack_read(ReadAsk(number, shape, list(ordinals), list(parts))),
                names,
                reading,
            )
        except TierCacheError as fault:
            if reading.fault is not None and not isinstance(fault, ClosedError):
                raise reading.fault from None
            raise
        return lease if lease is not None else misses(len(names), Outcome.FULL, home)

    async def delete(self, names: Sequence[Name]) -> list[Outcome]:
        """Forgets entries in every tier: HIT for each that was there, GONE where there was none."""
        link, home = self._open()
        if home is not None:
            for name in names:
                home.memo.forget(name)
        return frames.unpack_outcomes((await link.request(Op.DELETE, frames.pack_names(names))).body)

    async def call(self, question: str, arguments: Mapping[str, Any]) -> Any:
        """Rare questions about everything that is held; see core.Core."""
        link, _ = self._open()
        return frames.unpack_json((await link.request(Op.CALL, frames.pack_json([question, dict(arguments)]))).body)

    async def flush(self) -> bool:
        """See Core.flush; raises UnavailableError, once, also where an owner died with what this process had put."""
        link, _ = self._open()
        return await link.flush()

    async def close(self) -> None:
        """Ends this process's part in the cache: at once, or when the last lease and view of it has gone, whose bytes
        must stay until then. Idempotent."""
        if self._closed:
            return
        self._closed = CLOSED
        if self._work:
            await asyncio.wait(list(self._work), timeout=self.settings.owner_deadline_s)
        if self._notes is not None:
            await self._notes.close()
        self._link.say_noted()
        await self._link.leave()

    # -- inside --------------------------------------------------------------------------------------------------------

    def _check_durable(self, durable: bool) -> None:
        if durable and not self.durable:
            raise ConfigError("durable=True needs an SSD: set ssd_bytes, and open the directory anew")

    def _start(self, work: Any) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._work.add(task)
        task.add_done_callback(self._work.discard)
        return task

    async def _laid(self) -> None:
        try:
            await self._link.revive.bond_here()
        except (TierCacheError, OSError) as fault:
            log.warning("the cache's owner could not be reached: %s", fault)  # the next question tries again

    def _tick(self) -> None:
        """Says what is only noted, now and then; ends when all has ended."""
        end = self._link.tick()
        if end is not None:
            self._start(end)
        elif self._loop is not None and not self._link.left:
            self._loop.call_later(TICK_S, self._tick)

    async def _asked(self, op: int, body: bytes) -> memoryview:
        return (await self._link.request(op, body)).body

    def _told(self, op: int, body: bytes) -> None:
        bond = self._link.revive.now
        if bond is None or bond.line is None:
            raise Lost("no owner is there")
        bond.line.tell(op, body)


def _odd(ordinals: Sequence[int], parts: Sequence[int]) -> bool:
    """Whether a batch of pages is none that an owner would take."""
    return 0 in parts or len(ordinals) != len(parts) or len(set(ordinals)) < len(ordinals) or not len(ordinals)


def _all_or_none(lease: Lease | None) -> Lease | None:
    """The lease, if every item is a HIT."""
    if lease is None or all(outcome is Outcome.HIT for outcome in lease.outcomes):
        return lease
    lease.release()
    return None


def _copy_leased(
    lease: Lease, outcomes: list[Outcome], rest: Sequence[int], targets: Sequence[Buffer], verify: bool
) -> None:
    """Copies leased entries, item k of the lease being item rest[k] of the batch."""
    for at, i in enumerate(rest):
        outcomes[i] = lease.outcomes[at]
        if outcomes[i] is Outcome.HIT:
            size = lease.buffer(at).length
            if targets[i].length < size:
                raise ConfigError(f"target {i} has {targets[i].length} bytes, the entry {size}: pass a larger buffer")
            outcomes[i] = lease.copy_into(at, 0, size, targets[i].slice(0, size), verify=verify)


def _sources(values: Sequence[object]) -> list[Buffer]:
    return [value if isinstance(value, Buffer) else Buffer.of(value) for value in values]  # type: ignore[arg-type]


def _owners(mine: Settings, said: Mapping[str, Any]) -> Settings:
    """My settings, with the owner's where they are its business; says so where this process asked for others."""
    try:
        both = replace(mine, **{name: said[name] for name in OWNERS_SETTINGS})
    except (KeyError, TypeError, ConfigError) as fault:
        raise ProtocolError(f"the owner's settings do not fit this version or these settings: {fault}") from None
    asked = {row.name for row in mine.explain() if not row.source.startswith("default")}
    other = [name for name in OWNERS_SETTINGS if name in asked and getattr(both, name) != getattr(mine, name)]
    if other:
        log.warning("%s is already open with other settings (%s); those stay", mine.directory, ", ".join(sorted(other)))
    return both


_clients: weakref.WeakSet[SharedCache] = weakref.WeakSet()


def _disown_in_child() -> None:
    for client in list(_clients):
        client.disown()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disown_in_child)
