"""KvStore: the KV cache of one engine rank, saved by blocks into a cache and loaded from it, at any parallelism.

A block of the layout is one entry; its parts are what ranks write and read. A rank's store knows which parts are its
own (its Shard); nothing of that is in a key. Engine memory is copied by the store's own threads with the GIL released,
never on the I/O loop, and everything that a caller waits for ends: at its deadline at the latest.

    store = cache.kv(layout, Shard.of(layout, rank, 8))
    keys = store.keys(tokens)
    found = store.match(keys)
    loading = store.load(keys[:found.length], planes, table)
    ...
    saving = store.save(keys, planes, table, start=found.length)
    saving.pages_free(5)    # only then may the engine use those pages for something else
"""

from __future__ import annotations

import asyncio
from concurrent import futures
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tiercache.errors import ConfigError, UnavailableError
from tiercache.kv.chain import engine_keys, tokens_keys
from tiercache.kv.loading import LEASE_BYTES, Loading, Prefetch
from tiercache.kv.reading import Slice, read_slice
from tiercache.kv.saving import Saving
from tiercache.kv.shard import Shard
from tiercache.kv.stretch import Stretch
from tiercache.kv.variants import Variants
from tiercache.kv.workers import Workers
from tiercache.model import Kind, Terms

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    import numpy as np
    import numpy.typing as npt

    from tiercache.core import Core
    from tiercache.kv.layout import Layout
    from tiercache.kv.planes import Planes
    from tiercache.kv.runs import Table
    from tiercache.model import Outcome

CLOSE_S_MAX = 10.0
"""`close` waits so long for copies under way; what has not ended then never touches engine memory again."""


@dataclass(frozen=True, slots=True)
class Matched:
    """How much of a sequence is stored: its first `length` blocks, and for each of them the slowest tier that one of
    its parts must come from (1 memory, 2 SSD, 3 remote, 4 a peer)."""

    length: int
    tiers: bytes

    @property
    def in_memory(self) -> int:
        """Leading blocks that are in memory."""
        return len(self.tiers) - len(self.tiers.lstrip(b"\x01"))


class KvStore:
    """See the module. Any thread may call it; calls never wait for copies unless they say so."""

    def __init__(
        self,
        core: Core,
        loop: asyncio.AbstractEventLoop,
        layout: Layout,
        shard: Shard | None = None,
        *,
        threads: int = 1,
        verify: bool = True,
    ) -> None:
        """`loop`: the I/O loop that `core` lives on. `shard`: what this rank holds; None for whoever holds everything
        (an engine of one rank), or only asks (a scheduler). `threads` copy, loads before saves. `verify`: loads hash
        what they copy; without it a byte that changed in memory after its digest was taken is not seen."""
        self.core, self.loop, self.layout, self.verify = core, loop, layout, verify
        self.holder = shard if shard is not None else Shard.whole(layout)
        self.workers = Workers(threads, core.clock, core.metrics)
        self.variants = Variants(core, loop, layout, self.holder)

    # -- keys and matching: any thread, no copies ----------------------------------------------------------------------

    def keys(
        self,
        tokens: Sequence[int] | npt.NDArray[np.integer],
        *,
        parent: bytes = b"",
        extra: Sequence[bytes] | None = None,
    ) -> list[bytes]:
        """Keys of the whole blocks of a sequence of token ids, in order; see chain.tokens_keys. `parent` is the key of
        the block before `tokens[0]`; `extra[i]` is what else decides the bytes of block i (images, say)."""
        return tokens_keys(self.layout, tokens, parent=parent, extra=extra)

    def engine_keys(self, hashes: Sequence[bytes]) -> list[bytes]:
        """Keys of blocks that the engine has hashed itself, one for each `block_tokens`; see chain.engine_keys."""
        return engine_keys(self.layout, hashes)

    def match(self, keys: Sequence[bytes], shard: Shard | None = None) -> Matched:
        """The longest prefix of `keys` that is stored, in any tier that this host can reach. Pins nothing: what was
        matched may be gone when it is loaded. What was matched counts as used, children before their parents. Where the
        cache cannot be asked, nothing is stored.

        A block counts when every part that `shard` needs is there; without one every part, so that all ranks of an
        engine, and engines of any shape, find the same.
        """
        parts = self.layout.all_parts if shard is None else shard.needed(self.layout)
        if not self.core.recovered:
            self._recall(keys)
        try:
            tiers = self.core.probe_chain(keys, parts, touch=True)
        except UnavailableError:  # the engine goes on without
            tiers = b""
        metrics = self.core.metrics
        counts = [("tiercache_kv_missed_blocks_total", len(keys) - len(tiers), "", "")]
        for code, name in enumerate(("memory", "ssd", "remote", "peer"), start=1):
            if count := tiers.count(code):
                counts.append(("tiercache_kv_matched_blocks_total", count, name, ""))
        metrics.add_all(counts)
        return Matched(len(tiers), tiers)

    def _recall(self, keys: Sequence[bytes]) -> None:
        """While the SSD's rows are still read: has these looked for first. A lease on none of their parts loads
        nothing, and this waits no longer for it than for any answer of the SSD."""
        if self._on_loop():
            return
        asked = asyncio.run_coroutine_threadsafe(self.core.lease_blocks(keys, 0), self.loop)
        futures.wait([asked], self.core.settings.ssd_deadline_s)
        asked.cancel()

    def _on_loop(self) -> bool:
        try:
            return asyncio.get_running_loop() is self.loop
        except RuntimeError:
            return False

    def _check_thread(self) -> None:
        if self._on_loop():
            raise ConfigError(
                "a copy on the I/O loop would wait for itself: call it from a thread, or without `inline`"
            )

    def prefetch(self, keys: Sequence[bytes], deadline_s: float, shard: Shard | None = None) -> Prefetch:
        """Starts to bring the blocks (the parts that `shard` needs; this store's without one) to memory, first blocks
        first, and gives up after `deadline_s`. Wait for it, cancel it, or forget about it."""
        parts = (shard if shard is not None else self.holder).needed(self.layout)
        batch = max(1, LEASE_BYTES // self.layout.block_bytes)
        return Prefetch(self.core, self.loop, keys, parts, batch).begin(deadline_s)

    # -- engine memory -------------------------------------------------------------------------------------------------

    def save(
        self,
        keys: Sequence[bytes],
        planes: Planes,
        table: Table,
        *,
        start: int = 0,
        stop: int | None = None,
        cost_s: float = 0.0,
        durable: bool = False,
        inline: bool = False,
    ) -> Saving:
        """Copies blocks [start, stop) of a sequence out of engine memory into the cache.

        Args:
            keys: of the sequence from its first block on, at least up to `stop` (the end of `keys` without one).
            planes: where this rank's KV lies. table: which page holds which of the sequence's tokens.
            cost_s: seconds of prefill that a block stands for. durable: `wait` answers HIT only for what survives power
                loss.
            inline: everything is copied before this returns, in the calling thread.

        A rank writes its own share; ranks that hold the same bytes (`shard.replicas` > 1) digest all that they hold and
        compare: what differs is kept as a variant of that rank (see variants.py) and counted. Blocks that are there
        already are not copied. A block whose predecessor is not stored cannot be: MISS.
        The engine must neither write to nor reuse the pages of these blocks before `Saving.pages_free` has said so.
        Raises ConfigError for keys, planes and tables that do not fit each other, as `load` does.
        """
        stretch = Stretch.of(self.layout, keys, planes, table, start=start, stop=stop)
        if planes.shard != self.holder:
            raise ConfigError(f"these planes hold {planes.shard}, and the store was made for {self.holder}")
        terms = Terms(Kind.KV, cost_s=cost_s)
        if inline:
            self._check_thread()
        return Saving(self, stretch, terms, durable=durable).begin(inline=inline)

    def load(
        self,
        keys: Sequence[bytes],
        planes: Planes,
        table: Table,
        *,
        start: int = 0,
        stop: int | None = None,
        layerwise: bool = True,
        deadline_s: float | None = None,
        inline: bool = False,
    ) -> Loading:
        """Copies blocks [start, stop) of a sequence into engine memory, what this rank holds of them.

        Layer groups come in order (`layerwise`): layer 0 of all blocks is usable before the last one has landed; else
        block after block. A block that is not complete in the end is reported, and its engine memory is undefined then:
        recompute it. `deadline_s` (default 60 s): what has not landed by then is a MISS. The engine must leave the
        pages alone until `Loading.wait`, or `cancel`, has returned.
        """
        stretch = Stretch.of(self.layout, keys, planes, table, start=start, stop=stop)
        if not planes.writable:
            raise ConfigError("these planes are read-only: pass the engine's own tensors")
        if inline:
            self._check_thread()
        return Loading(self, stretch, layerwise=layerwise, deadline_s=deadline_s).begin(inline=inline)

    def read(
        self,
        keys: Sequence[bytes],
        layers: range,
        heads: range,
        tokens: range,
        out: npt.NDArray[np.generic] | Sequence[npt.NDArray[np.generic] | None],
        *,
        timeout_s: float = 60.0,
    ) -> Outcome:
        """Copies any slice of a stored sequence, from whatever tiers its blocks are in, into `out`.

        `keys` are those of the sequence from its first block on; `layers` and `heads` count within the layout, `tokens`
        within the sequence. `out[layer, kv, head, token, dim]` (an array of five axes, strided as it likes but for
        contiguous dims, with items as wide as the layout's), or a list [K, V] of arrays of four axes where their dims
        differ; None, or a list of one, where there is no V. HIT, or why not: `out` is undefined then.
        """
        self._check_thread()
        return read_slice(self, keys, Slice(layers, heads, tokens), out, timeout_s)

    # -- its end -------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Ends copies under way (their outcomes say so) and the threads. When it returns nothing touches engine memory
        any more. Idempotent; the cache stays open."""
        self.workers.close(CLOSE_S_MAX)

    def __enter__(self) -> KvStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
