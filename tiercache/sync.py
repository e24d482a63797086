"""The blocking face of the cache, for threads: what is in memory is answered here and now, the rest on the I/O loop.

There is one I/O loop a process, fsspec's own, on its daemon thread: an embedded cache and a filesystem over the same
directory then are one cache.
"""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, TypeVar

from tiercache.buffers import Buffer, new_bytes
from tiercache.errors import ConfigError, TierCacheError, UnavailableError
from tiercache.keys import check_key, object_key
from tiercache.lease import Pieces, look_again
from tiercache.model import Kind, Name, Outcome, Terms

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence
    from types import TracebackType
    from typing import Any

    from tiercache.core import Core
    from tiercache.kv.layout import Layout
    from tiercache.kv.shard import Shard
    from tiercache.kv.store import KvStore
    from tiercache.lease import Lease

    Called = Name | bytes | str

T = TypeVar("T")
WAIT_S_MAX = 600.0
"""No blocking call waits longer than this: everything under it has a deadline of its own, so this never decides."""


CANCEL_S_MAX = 5.0


def io_loop() -> asyncio.AbstractEventLoop:
    """The process's I/O loop, started at first use."""
    from fsspec.asyn import get_loop  # costs 40 ms, and `import tiercache` must not pay it

    loop: asyncio.AbstractEventLoop = get_loop()
    return loop


def runs_here(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether the caller is itself on this loop, and so must not wait for it."""
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False


def wait(work: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop) -> T:
    """Runs a coroutine on the I/O loop and waits for it in this thread."""
    if runs_here(loop):
        work.close()
        raise ConfigError("a blocking call on the I/O loop would wait for itself: use the async face (`.core`) there")
    ended = threading.Event()

    async def watched() -> T:
        try:
            return await work
        finally:
            ended.set()

    future = asyncio.run_coroutine_threadsafe(watched(), loop)
    try:
        return future.result(WAIT_S_MAX)
    except BaseException as fault:
        if future.done() and not future.cancelled():
            if isinstance(fault, TierCacheError):
                _leave()
            raise
        # The caller goes away, by Ctrl-C perhaps: its buffers must not be written to any more when this returns.
        future.cancel()
        ended.wait(CANCEL_S_MAX)
        if isinstance(fault, TimeoutError):
            message = f"the cache did not answer within {WAIT_S_MAX:.0f} s: go on without it"
            raise UnavailableError(message) from None
        raise


def _leave() -> None:
    """Holds up a daemon thread while the process ends: what it waited for was closed under it, and nobody is left to
    deal with that fault but a traceback."""
    if getattr(threading, "_SHUTTING_DOWN", False) and threading.current_thread().daemon:
        threading.Event().wait(CANCEL_S_MAX)


def as_name(called: Called) -> Name:
    """The name of a lone object, from a Name, a key (16 or 32 bytes) or any string."""
    if isinstance(called, Name):
        if len(called.key) not in (16, 32):
            check_key(called.key)
        return called
    if isinstance(called, str):
        return Name(object_key("", called))
    return Name(check_key(called))


def as_names(called: Sequence[Called]) -> list[Name]:
    """Names of a batch; a single name is refused, for its letters would pass for names."""
    if isinstance(called, str | bytes | Name):
        raise ConfigError(f"every call takes lists: pass [{called!r}] instead of {called!r}")
    return [as_name(each) for each in called]


def as_sources(values: Sequence[object]) -> list[Buffer]:
    """Spans of a batch of values with the buffer protocol."""
    sources = []
    for value in values:
        try:
            sources.append(value if isinstance(value, Buffer) else Buffer.of(value))  # type: ignore[arg-type]
        except TypeError:
            kind = type(value).__name__
            raise ConfigError(f"a value is bytes-like (bytes, a NumPy array, ...), not {kind}: encode it") from None
    return sources


class BlockingCache:
    """A cache for threads. `core` is the asynchronous one on `loop`; close it, or use it as a context manager."""

    def __init__(self, core: Core, loop: asyncio.AbstractEventLoop, on_close: Callable[[], None] | None = None) -> None:
        self.core, self.loop = core, loop
        self._on_close = on_close

    def put(
        self,
        names: Sequence[Called],
        values: Sequence[object],
        *,
        kind: Kind = Kind.TENSOR,
        scope: int = 0,
        cost_s: float = 0.0,
        ttl_s: float | None = None,
        durable: bool = False,
    ) -> list[Outcome]:
        """Stores bytes-like values: HIT is visible to readers, with `durable=True` also safe from power loss.

        BUSY: another thread is storing that name. FULL: no room. A name that is there keeps its value (entries are
        immutable: delete it first, or give a changed object another name).
        """
        where = as_names(names)
        if len(where) != len(values):
            raise ConfigError(f"put got {len(where)} names and {len(values)} values: give one value for each name")
        if durable:
            work = self.core.put(
                where, as_sources(values), kind=kind, scope=scope, cost_s=cost_s, ttl_s=ttl_s, durable=True
            )
            return wait(work, self.loop)
        sources = as_sources(values)
        return self.core.store(where, sources, Terms(kind, scope, cost_s, self.core.expiry(ttl_s)))

    def put_chain(
        self,
        digests: Sequence[bytes],
        values: Sequence[object],
        *,
        parent: bytes = b"",
        kind: Kind = Kind.KV,
        scope: int = 0,
        cost_s: float = 0.0,
    ) -> list[Outcome]:
        """Stores blocks of one chain, in order (keys.chain makes digests) after the stored block `parent`."""
        if len(digests) != len(values):
            raise ConfigError(f"put_chain got {len(digests)} digests and {len(values)} values: give one for each")
        if not digests:
            return []
        sources = as_sources(values)
        if not self.core.recovered:
            work = self.core.put_chain(digests, sources, parent=parent, kind=kind, scope=scope, cost_s=cost_s)
            return wait(work, self.loop)
        return self.core.store_chain(digests, sources, Terms(kind, scope, cost_s), parent=parent)

    def get(self, names: Sequence[Called], *, verify: bool | None = None) -> list[bytes | Outcome]:
        """The values as bytes, or why there is none."""
        where = as_names(names)
        found: list[bytes | Outcome] = [Outcome.FULL] * len(where)
        damaged: set[int] = set()
        pieces = Pieces(range(len(where)))
        for piece in pieces:
            rest = piece
            while rest:
                with self.lease([where[i] for i in rest]) as lease:
                    for at, i in enumerate(rest):
                        found[i] = self._copied(lease, at, self._verify(verify))
                if pieces.refused(rest, found):
                    break
                rest = look_again(where, found, rest, damaged, self.core.quarantine)
        return found

    @staticmethod
    def _copied(lease: Lease, at: int, verify: bool) -> bytes | Outcome:
        outcome = lease.outcomes[at]
        if outcome is not Outcome.HIT:
            return outcome
        size = lease.buffer(at).length
        data, target = new_bytes(size)
        outcome = lease.copy_into(at, 0, size, target, verify=verify)
        return data if outcome is Outcome.HIT else outcome

    def get_into(
        self, names: Sequence[Called], targets: Sequence[object], *, verify: bool | None = None
    ) -> list[Outcome]:
        """Copies each value to the start of its target (a writable buffer at least as large)."""
        where = as_names(names)
        if len(where) != len(targets):
            raise ConfigError(f"get_into got {len(where)} names and {len(targets)} targets: give one target for each")
        into = [t if isinstance(t, Buffer) else Buffer.of(t, writable=True) for t in targets]  # type: ignore[arg-type]
        outcomes = self.core.get_into_resident(where, into, verify=self._verify(verify))
        rest = [i for i, outcome in enumerate(outcomes) if outcome is not Outcome.HIT]
        if rest:
            work = self.core.get_into([where[i] for i in rest], [into[i] for i in rest], verify=self._verify(verify))
            for i, outcome in zip(rest, wait(work, self.loop), strict=True):
                outcomes[i] = outcome
        return outcomes

    def lease(self, names: Sequence[Called]) -> Lease:
        """A lease on values in place, brought to memory from the SSD where needed; look at its `outcomes`."""
        where = as_names(names)
        resident = self.core.lease_names_resident(where)
        return resident if resident is not None else wait(self.core.lease(where), self.loop)

    def match(self, digests: Sequence[bytes]) -> Lease:
        """A lease on the longest prefix of a chain that is stored; its length is the number of blocks."""
        return wait(self.core.match(digests), self.loop)

    def kv(
        self, layout: Layout, shard: Shard | None = None, *, threads: int = 1, verify: bool | None = None
    ) -> KvStore:
        """The KV cache of one rank of an engine (see kv/store.py): `layout` says what is stored, `shard` what this rank
        holds of it; None for whoever holds everything, or only asks. Close it before the cache."""
        from tiercache.kv.store import KvStore  # nobody else needs it

        return KvStore(self.core, self.loop, layout, shard, threads=threads, verify=self._verify(verify))

    def delete(self, names: Sequence[Called]) -> list[Outcome]:
        """Forgets values in every tier: HIT for each that was there, GONE where there was none.

        Nobody reads them from now on. Durable after the next `flush`, or about a second later: if the machine or the
        process that owns the cache dies before that, what was on the SSD may come back. With a remote tier, what the
        bucket has of them is hidden in the process that owns the cache only: other hosts, and this one after a restart,
        can find it until it is evicted or its lifetime is over.
        """
        return wait(self.core.delete(as_names(names)), self.loop)

    def publish(self, names: Sequence[Called], to: str) -> int:
        """Keeps these values, or blocks, in place until the cache of another host has them, which takes them as it
        finds room: how many of them it has then. `to` is where it listens, host:port. Raises UnavailableError where it
        is not connected, or takes too long, ConfigError where this cache has no peers."""
        keys = [name.key.hex() for name in as_names(names)]
        answer: dict[str, int] = wait(self.core.call("publish", {"keys": keys, "to": to}), self.loop)
        return answer["taken"]

    def flush(self) -> bool:
        """Returns when everything visible or deleted before the call is durable; False where there is no SSD tier, and
        nothing is. Raises UnavailableError where the SSD did not take some of it, and once where the process that owned
        a shared cache died with something that this one had put: put that again."""
        return wait(self.core.flush(), self.loop)

    def stats(self) -> dict[str, int | float]:
        """What the cache holds and did."""
        return self.core.stats()

    def close(self) -> None:
        """Writes what is queued and gives everything back. Idempotent."""
        if self._on_close is None:
            wait(self.core.close(), self.loop)
        else:
            self._on_close()

    def __enter__(self) -> BlockingCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _verify(self, verify: bool | None) -> bool:
        return self.core.settings.verify_copies if verify is None else verify
