"""Core: what a cache is to everything above it, whether it lives in this process or in the owner of a shared directory.

`tiercache.cache.Cache` is the one in this process, `tiercache.wire.client.SharedCache` the one that asks the owner. The
blocking face, page readers, the filesystem and the command line speak this protocol only. Calls named `*_resident` are
for any thread and never wait for an origin; a shared cache may wait for its owner there, and for the owner's SSD.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from concurrent.futures import Future
    from contextlib import AbstractContextManager
    from typing import Any

    from tiercache.buffers import Buffer
    from tiercache.clock import Clock
    from tiercache.lease import Lease, Load, PageRun
    from tiercache.metrics import Metrics
    from tiercache.model import Kind, Name, Outcome, Terms
    from tiercache.settings import Settings


class Notes(Protocol):
    """Facts that the processes of a directory share, found out once by one of them; see tiercache/wire/notes.py.

    A note is a name and a value, both bytes that mean something to their users alone. Names begin with a digest of all
    that decides who may see them.
    """

    async def claim(self, name: bytes) -> bytes | None:
        """The value that is believed, or None: the caller finds out, and must settle. Waits while somebody else finds
        out. What is answered was never forgotten since this was called. Raises UnavailableError where nobody can be
        asked; nothing is claimed then, nor when the call is cancelled. On the process's I/O loop."""
        ...

    async def known(self, name: bytes) -> bytes | None:
        """The value that is believed, or None; nothing is claimed, and nobody is waited for who finds out. Otherwise as
        `claim`."""
        ...

    def settle(self, name: bytes, value: bytes, ttl_s: float) -> None:
        """What was found out after a claim: believed for `ttl_s`, or with 0 s not at all: somebody else finds out then.
        Never raises, never waits. On the process's I/O loop."""
        ...

    def forget(self, prefixes: Sequence[bytes]) -> Future[None]:
        """Drops all notes whose names begin with one of these, and calls every watcher: those of this process before
        this returns, those of others before the answer is done (without a fault in any case). Any thread."""
        ...

    def watch(self, callback: Callable[[Sequence[bytes]], None]) -> None:
        """`callback(prefixes)` hears what is forgotten, by this process or by others, in any thread."""
        ...

    def unwatch(self, callback: Callable[[Sequence[bytes]], None]) -> None:
        """Undoes `watch`."""
        ...


@runtime_checkable
class Seeing(Protocol):
    """What a cache adds whose `lease_resident` may have to ask another process."""

    def sees(self, key: bytes, ordinals: Sequence[int], parts: Sequence[int]) -> bool:
        """Whether these parts of these pages are in memory, as far as that is known without asking; any thread."""
        ...


class BlockTicket(Protocol):
    """Blocks that several writers fill together, each its own parts; item i belongs to digest i of the join.

    One thread at a time, but `commit_soon` may be under way meanwhile. All calls may raise UnavailableError where the
    owner of a shared directory has gone: what was committed stays, the rest is lost with the ticket; join anew.
    """

    @property
    def outcomes(self) -> list[Outcome]:
        """HIT where something may be written (`claims`, `pieces`) or all that was asked for is there already (both
        empty); BUSY where the rest of it is being written by somebody else, or this process holds too much; FULL where
        there was no room, or the parent is not stored."""
        ...

    @property
    def claims(self) -> list[int]:
        """Parts (a map an item) that this ticket alone may write."""
        ...

    @property
    def pieces(self) -> list[list[tuple[int, int]]]:
        """Pieces, (start, stop) in bytes of the block, that this ticket alone may write: those of the join that are
        neither there nor somebody else's."""
        ...

    @property
    def present(self) -> list[int]:
        """Parts (a map an item) that memory or the SSD had at the time of the join."""
        ...

    def writing(self) -> AbstractContextManager[object]:
        """Whoever writes to `buffers` does it inside this, in short turns (some 100 ms): a new owner of the memory
        waits for it. Raises UnavailableError on entering where the owner has gone. Any thread, also several."""
        ...

    def buffers(self, item: int) -> Buffer:
        """The whole block in place, where it has claims or pieces; only those may be written, and only `writing`.
        Valid until `end`."""
        ...

    def commit(
        self, landed: Sequence[tuple[int, int, bytes]], pieces: Sequence[tuple[int, int, int, int]] = ()
    ) -> list[Outcome]:
        """Takes (item, parts, digests) of claimed parts that lie there, `digests` in the Payload layout as far as the
        highest of these parts; and (item, start, stop, xxh3-64) of claimed pieces. The owner hashes what lies there.
        One outcome for each of `landed`, then one for each of `pieces`: HIT: those parts can be read at once, those
        pieces as soon as their part is covered; CORRUPT: the bytes had other digests, nothing of the row is shown, and
        its claim is gone; MISS: the ticket has no claim to all of it (any more). Claims that have landed are gone from
        `claims` and `pieces`."""
        ...

    def commit_soon(
        self, landed: Sequence[tuple[int, int, bytes]], pieces: Sequence[tuple[int, int, int, int]] = ()
    ) -> Future[list[Outcome]]:
        """As `commit`, without waiting: the caller goes on gathering while the owner hashes. Any number may be under
        way; they are taken in order. `end` comes after all of them."""
        ...

    def compare(self, rows: Sequence[tuple[int, int, bytes]]) -> list[int]:
        """For each (item, parts, digests): the map of those parts that are stored in memory with other digests. Parts
        that memory lacks are not compared."""
        ...

    async def saved(self) -> list[Outcome]:
        """Waits until what this ticket committed is durable, before `end`: for each item HIT, also where nothing was
        committed, or FULL where the SSD has not got all of it. Raises ConfigError where there is no SSD."""
        ...

    def end(self) -> None:
        """Gives up what was not committed: nobody writes to `buffers` any more, and others may claim it. A block of
        which nothing landed vanishes. Idempotent. Also when the process dies."""
        ...


class Core(Protocol):
    """See the module. Batches everywhere: item i of an answer belongs to item i of the question."""

    settings: Settings
    metrics: Metrics

    @property
    def clock(self) -> Clock:
        """The clock that expiries and deadlines are measured by."""
        ...

    @property
    def durable(self) -> bool:
        """Whether there is an SSD tier, so that anything can be durable at all."""
        ...

    @property
    def notes(self) -> Notes | None:
        """What is shared with other processes of this directory about origins; None for a cache that is alone."""
        ...

    @property
    def recovered(self) -> bool:
        """Whether everything that the SSD remembers can be found; until then puts ask the SSD first, on the loop."""
        ...

    # -- any thread

    def lease_resident(self, key: bytes, ordinals: Sequence[int], parts: Sequence[int]) -> Lease | None:
        """A lease on pages of one file version, or None unless every wanted part (a map a page) can be had locally.

        A shared cache may answer with a glance: it pins nothing, gives no views, and its `copy_into` says MISS where
        the bytes went away while they were copied."""
        ...

    def lease_local(self, key: bytes, ordinals: Sequence[int], parts: Sequence[int]) -> Lease | None:
        """As `lease_resident`, for a thread that may wait for the SSD; None: `read_pages` knows what to do."""
        ...

    def lease_names_resident(self, names: Sequence[Name]) -> Lease | None:
        """A lease on whole entries, or None unless every one of them can be had locally."""
        ...

    def match_resident(self, digests: Sequence[bytes]) -> Lease:
        """A lease on the longest prefix of a chain that is in memory as a whole; empty when nothing is."""
        ...

    def get_into_resident(
        self, names: Sequence[Name], targets: Sequence[Buffer], *, verify: bool = True
    ) -> list[Outcome]:
        """Copies whole entries to the start of each target: HIT, MISS where it is not local, CORRUPT where a digest
        differed (that copy is then gone)."""
        ...

    def quarantine(self, names: Sequence[Name]) -> None:
        """The memory copies of these were found damaged: they are counted and never looked at again."""
        ...

    def store(self, names: Sequence[Name], values: Sequence[Buffer], terms: Terms | None = None) -> list[Outcome]:
        """Puts whole lone entries into memory (visible, not durable)."""
        ...

    def store_chain(
        self, digests: Sequence[bytes], values: Sequence[Buffer], terms: Terms | None = None, *, parent: bytes = b""
    ) -> list[Outcome]:
        """As `store`, for blocks of one chain in order."""
        ...

    def probe_chain(self, digests: Sequence[bytes], parts: int, *, touch: bool = False) -> bytes:
        """One byte a block for the longest prefix of a chain whose blocks have all these parts (a map; those beyond a
        block do not count): 1 where memory has them, 2 where some are on the SSD alone, 3 where some are in the remote
        tier alone, 4 where a peer is believed to have them. Pins and loads nothing; what it saw may be gone by the next
        call. `touch`: what is answered was used, as by `touch_chain`."""
        ...

    def touch_chain(self, digests: Sequence[bytes]) -> None:
        """The stored prefix of this chain was used: its first block last, so that it is evicted last. Never
        waits for an answer."""
        ...

    def lease_blocks_resident(self, digests: Sequence[bytes], parts: int) -> Lease | None:
        """A lease on blocks (from anywhere in their chain) that are all in memory with these parts, else
        None. Only these parts may be looked at: `copy_into`, `digests(i)`, `buffer(i)`."""
        ...

    def join_blocks(
        self,
        digests: Sequence[bytes],
        size: int,
        part_bytes: int,
        claim: int,
        pieces: Sequence[tuple[int, int]] = (),
        terms: Terms | None = None,
        *,
        parent: bytes = b"",
    ) -> BlockTicket:
        """Begins to fill blocks of one chain in order after the stored block `parent`, each of `size` bytes in parts of
        `part_bytes`: whichever of the parts `claim` and of the byte ranges `pieces` (each inside of one part) are
        neither there nor claimed by another living ticket are this ticket's to write. Pages and blocks of other shapes
        under such a name are refused (BUSY). The ticket must be ended. Raises CapacityError or ConfigError on shapes
        that can never fit, UnavailableError where a shared cache has no owner."""
        ...

    def expiry(self, ttl_s: float | None) -> int:
        """Expiry of an entry put now, in whole seconds since the epoch; 0 for never."""
        ...

    def stats(self) -> dict[str, int | float]:
        """A flat table of what the cache holds and did: every metric by its full name."""
        ...

    def disown(self) -> None:
        """Makes this object refuse every call: it came into a forked child."""
        ...

    # -- on the process's I/O loop

    def begin(self) -> None:
        """Starts background work; once, on the loop."""
        ...

    async def put(
        self,
        names: Sequence[Name],
        values: Sequence[object],
        *,
        kind: Kind = ...,
        scope: int = 0,
        cost_s: float = 0.0,
        ttl_s: float | None = None,
        durable: bool = False,
    ) -> list[Outcome]:
        """Stores whole entries; see Cache.put."""
        ...

    async def put_chain(
        self,
        digests: Sequence[bytes],
        values: Sequence[object],
        *,
        parent: bytes = b"",
        kind: Kind = ...,
        scope: int = 0,
        cost_s: float = 0.0,
        ttl_s: float | None = None,
        durable: bool = False,
    ) -> list[Outcome]:
        """Stores blocks of one chain in order; see Cache.put_chain."""
        ...

    async def lease(self, names: Sequence[Name]) -> Lease:
        """A lease on whole entries, brought to memory where needed; look at its `outcomes`."""
        ...

    async def match(self, digests: Sequence[bytes]) -> Lease:
        """A lease on the longest stored prefix of a chain."""
        ...

    async def lease_blocks(self, digests: Sequence[bytes], parts: int) -> Lease:
        """A lease on blocks with these parts, brought to memory from the SSD or the remote tier where needed; look at
        its `outcomes`, one a block. Only these parts may be looked at."""
        ...

    async def get_into(self, names: Sequence[Name], targets: Sequence[Buffer], *, verify: bool = True) -> list[Outcome]:
        """Copies whole entries to the start of each target: HIT, or why not."""
        ...

    async def read_pages(self, run: PageRun, ordinals: Sequence[int], parts: Sequence[int], load: Load) -> Lease:
        """A lease on pages with these parts in memory; `load` brings what no tier has, in this process."""
        ...

    async def delete(self, names: Sequence[Name]) -> list[Outcome]:
        """Forgets entries in every tier: HIT for each that was there, GONE where there was none. Durable after the next
        flush, or about a second later: a crash before that may bring them back. What a bucket or
        peers have of them is hidden in this process only: other hosts, and this one after a restart, can find it until
        it is evicted there or its lifetime is over."""
        ...

    async def call(self, question: str, arguments: Mapping[str, Any]) -> Any:
        """Rare questions about everything that is held: "status", "contents", "held", "exist", "evict", "validate",
        "peers" and "publish"; see cache/survey.py. Arguments and answers are plain JSON values. An owner knows "owner"
        too: who it is, and its clients."""
        ...

    async def flush(self) -> bool:
        """Returns when what was visible (or deleted) before the call is durable; raises UnavailableError if some could
        not be. False where there is no SSD tier, and nothing is durable."""
        ...

    async def close(self) -> None:
        """Ends this process's part in the cache. Idempotent."""
        ...
