"""`mooncake.store` over tiercache: an engine with a Mooncake connector uses tiercache, and is not changed for that.

    PYTHONPATH=$(python -m tiercache_connectors.mooncake_store) TIERCACHE_DIRECTORY=/nvme/cache vllm serve ...

puts the folder `shims` first, where `from mooncake.store import MooncakeDistributedStore` finds this module. Other
parts of an installed Mooncake (its transfer engine) are found as before.

There is no master and no metadata server. All processes of a user that open one directory share its memory and SSD,
and `master_server_addr="tiercache://host:port,host:port"` (or TIERCACHE_PEERS) names caches of other machines.
`global_segment_size` is memory_bytes of the directory, where nothing else says those; the process that comes first
decides. What differs on purpose: values survive `close` and a restart, an object has no lease that holds a removal up,
and bytes are verified by their digests whenever they are copied. Beside caches of other machines a removal is of this
machine alone: a peer that has a value keeps it, and goes on giving the old one after an upsert here.

Claimed: setup (long and dictionary), setup_dummy, init_all, close, health_check, get_hostname; put, put_parts,
put_batch, put_from, put_from_with_metadata, batch_put_from, batch_put_from_multi_buffers; upsert, upsert_parts,
upsert_batch, upsert_from, batch_upsert_from; get, get_batch, get_buffer, batch_get_buffer, get_into, batch_get_into,
batch_get_into_multi_buffers, get_into_ranges, batch_get_session_start, batch_get_into_multi_buffer_ranges,
batch_get_session_end; get_size, is_exist, batch_is_exist, get_replica_desc, batch_get_replica_desc; remove,
batch_remove, remove_all; register_buffer, unregister_buffer, alloc_from_mem_pool, MooncakeHostMemAllocator;
put_tensor, get_tensor, upsert_tensor, batch_put_tensor, batch_get_tensor, batch_upsert_tensor, get_tensor_into,
put_tensor_from.

Not claimed (such methods are not there; remove_by_regex answers NOT_SUPPORTED):
- remove_by_regex: keys are kept as digests, so there is nothing that a pattern could be compared with.
- pub, tp, parallelism, cuda and safetensor variants of put_tensor and get_tensor: no engine's connector calls them.
- batch_put_session_*, batch_put_from_multi_buffer_ranges: values become visible as a whole, in one call.
- batch_replica_clear, create_copy_task, create_move_task, query_task, mount_segment and its relatives,
  get_offload_rpc_read_count: where copies lie is the affair of the cache; ReplicateConfig is checked and not obeyed.
- soft and hard pins, leases of a duration: what is used last is evicted last.
- BufferPool, EngramStore, MooncakeDistributedNoFRegister, bind_to_numa_node: they are no part of a store.
- addresses of GPU memory: refused with INVALID_PARAMS, until the cache has a tier there.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tiercache.assemble import open_cache
from tiercache.buffers import Buffer, new_bytes
from tiercache.errors import CapacityError, ClosedError, ConfigError, TierCacheError, UnavailableError
from tiercache.sync import as_sources
from tiercache_connectors.mooncake_config import (
    SEGMENT_BYTES,
    ObjectDataType,
    ReplicaDescriptor,
    ReplicaStatus,
    ReplicateConfig,
    Setup,
    SoftPinAction,
)
from tiercache_connectors.mooncake_memory import BufferHandle, HostAllocator, MooncakeHostMemAllocator, Regions
from tiercache_connectors.mooncake_moves import BAD, NO_ROOM, Moves
from tiercache_connectors.mooncake_ranges import Row, chosen, paired, whole
from tiercache_connectors.mooncake_tensors import Tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tiercache_connectors.mooncake_moves import Key
    from tiercache_connectors.mooncake_ranges import Range

    Grid = Sequence[Sequence[Sequence[int]]]

__all__ = [
    "BufferHandle", "MooncakeDistributedStore", "MooncakeHostMemAllocator", "ObjectDataType", "ReplicaDescriptor",
    "ReplicaStatus", "ReplicateConfig", "SoftPinAction",
]  # fmt: skip

T = TypeVar("T")
V = TypeVar("V")
log = logging.getLogger(__name__)

SHIMS = Path(__file__).with_name("shims")
"""Put this folder on PYTHONPATH, and `mooncake.store` is this module."""
INTERNAL, UNREACHABLE, NOT_SUPPORTED = -1, -900, -1012
"""Mooncake's INTERNAL_ERROR, RPC_FAIL and NOT_SUPPORTED; see also mooncake_moves."""
_CODES: dict[type[TierCacheError], int] = {
    UnavailableError: UNREACHABLE,
    CapacityError: NO_ROOM,
    ClosedError: BAD,
    ConfigError: BAD,
}


class MooncakeDistributedStore(Tensors):
    """See the module. Any thread; a forked child sets up anew. Faults of the cache are codes, and a line in the log."""

    def __init__(self) -> None:
        self._moves: Moves | None = None
        self._regions = Regions(strict=False)
        self._pool = HostAllocator()
        self._hostname = ""
        self._stages = False
        self._sessions: set[Key] = set()

    # -- life ----------------------------------------------------------------------------------------------------------

    def setup(self, *given: object, **named: object) -> int:
        """Opens the cache; Mooncake's arguments, one by one or as a dictionary (see Setup). 0, or INVALID_PARAMS."""
        try:
            asked = Setup.of(given, named)
            cache = open_cache(**asked.settings())
        except (TierCacheError, ValueError) as fault:
            log.error("setup: %s", fault)
            return BAD
        if asked.engine is not None:
            log.info(
                "the transfer engine that setup was given is not used: bytes between machines take TIERCACHE_PEERS"
            )
        previous, self._moves = self._moves, Moves(cache, asked.tenant_id)
        self._hostname, self._stages = asked.hostname, asked.local_buffer_size > 0
        self._regions = Regions(strict=asked.protocol != "tcp")
        if previous is not None:
            previous.cache.close()
        return 0

    def setup_dummy(self, mem_pool_size: int, local_buffer_size: int, server_address: str) -> int:
        """As `setup`, for engines that expect a separate process to hold the memory: the directory's owner does."""
        return self.setup("localhost", server_address, 0, max(1, local_buffer_size), "tcp", "", "")

    def init_all(self, protocol: str, device_name: str, mount_segment_size: int = SEGMENT_BYTES) -> int:
        """As `setup`, with Mooncake's defaults; INVALID_PARAMS where that was done before."""
        if self._moves is not None:
            return BAD
        return self.setup("localhost:12345", "", mount_segment_size, 1 << 30, protocol, device_name, "")

    def close(self) -> int:
        """Gives the cache back. What was put stays; `setup` may come again."""
        moves, self._moves = self._moves, None
        self._sessions.clear()
        if moves is None:
            return 0
        try:
            moves.cache.close()
        except TierCacheError as fault:
            log.error("close: %s", fault)
            return INTERNAL
        return 0

    def health_check(self) -> int:
        """0 where all is well, 1 before setup and after close, 2 where the directory's owner does not answer."""
        return self._with(lambda moves: min(0, moves.tier(moves.name(""))), lambda code: 1 if code == BAD else 2)

    def get_hostname(self) -> str:
        """What this client is called: a host and a port, on which nothing need listen."""
        return self._hostname

    # -- memory --------------------------------------------------------------------------------------------------------

    def register_buffer(self, buffer_ptr: int, size: int) -> int:
        """Says that memory will be used; INVALID_PARAMS where it overlaps what is registered, or is not the host's."""
        if self._regions.add(buffer_ptr, size):
            return 0
        log.error("register_buffer: %d bytes at %#x overlap others, or are no memory of this host", size, buffer_ptr)
        return BAD

    def unregister_buffer(self, buffer_ptr: int) -> int:
        """Undoes `register_buffer`."""
        return 0 if self._regions.drop(buffer_ptr) else BAD

    def alloc_from_mem_pool(self, size: int) -> int:
        """Address of so many bytes, which live as long as this store; 0 where there are none."""
        return self._pool.alloc(size)

    # -- puts ----------------------------------------------------------------------------------------------------------

    def put(self, key: Key, value: object, config: ReplicateConfig | None = None) -> int:
        """Stores bytes: 0, also where the key is there already, whose value stays."""
        return self._put_values([key], [[value]], config)[0]

    def upsert(self, key: Key, value: object, config: ReplicateConfig | None = None) -> int:
        """As `put`, but an old value is replaced. Readers may find none for a moment."""
        return self._put_values([key], [[value]], config, anew=True)[0]

    def put_parts(self, key: Key, *parts: object, config: ReplicateConfig | None = None) -> int:
        """Stores one value that lies in several pieces; 0 and nothing where there are none."""
        return self._put_values([key], [parts], config)[0] if parts else 0

    def upsert_parts(self, key: Key, *parts: object, config: ReplicateConfig | None = None) -> int:
        """As `put_parts`, but an old value is replaced."""
        return self._put_values([key], [parts], config, anew=True)[0] if parts else 0

    def put_batch(self, keys: Sequence[Key], values: Sequence[object], config: ReplicateConfig | None = None) -> int:
        """Stores several: 0, or why the first that failed did."""
        return _first_fault(self._put_values(keys, [[value] for value in values], config))

    def upsert_batch(self, keys: Sequence[Key], values: Sequence[object], config: ReplicateConfig | None = None) -> int:
        """As `put_batch`, but old values are replaced."""
        return _first_fault(self._put_values(keys, [[value] for value in values], config, anew=True))

    def put_from(self, key: Key, buffer_ptr: int, size: int, config: ReplicateConfig | None = None) -> int:
        """Copies a value straight from memory into the cache: 0; nothing is stored of no bytes."""
        return self._put_spans([key], [[(buffer_ptr, size)]], config)[0]

    def upsert_from(self, key: Key, buffer_ptr: int, size: int, config: ReplicateConfig | None = None) -> int:
        """As `put_from`, but an old value is replaced."""
        return self._put_spans([key], [[(buffer_ptr, size)]], config, anew=True)[0]

    def put_from_with_metadata(
        self,
        key: Key,
        buffer_ptr: int,
        metadata_buffer_ptr: int,
        size: int,
        metadata_size: int,
        config: ReplicateConfig | None = None,
    ) -> int:
        """As `put_from`, of metadata and the value after it."""
        return self._put_spans([key], [[(metadata_buffer_ptr, metadata_size), (buffer_ptr, size)]], config)[0]

    def batch_put_from(
        self,
        keys: Sequence[Key],
        buffer_ptrs: Sequence[int],
        sizes: Sequence[int],
        config: ReplicateConfig | None = None,
    ) -> list[int]:
        """As `put_from`, of several in one call."""
        if len(buffer_ptrs) != len(sizes):
            return [BAD] * len(keys)
        return self._put_spans(keys, [[span] for span in zip(buffer_ptrs, sizes, strict=True)], config)

    def batch_upsert_from(
        self,
        keys: Sequence[Key],
        buffer_ptrs: Sequence[int],
        sizes: Sequence[int],
        config: ReplicateConfig | None = None,
    ) -> list[int]:
        """As `batch_put_from`, but old values are replaced."""
        if len(buffer_ptrs) != len(sizes):
            return [BAD] * len(keys)
        return self._put_spans(keys, [[span] for span in zip(buffer_ptrs, sizes, strict=True)], config, anew=True)

    def batch_put_from_multi_buffers(
        self,
        keys: Sequence[Key],
        all_buffer_ptrs: Sequence[Sequence[int]],
        all_sizes: Sequence[Sequence[int]],
        config: ReplicateConfig | None = None,
    ) -> list[int]:
        """As `batch_put_from`, of values that lie in several places each."""
        spans = paired(all_buffer_ptrs, all_sizes, len(keys))
        return [BAD] * len(keys) if spans is None else self._put_spans(keys, spans, config)

    # -- gets ----------------------------------------------------------------------------------------------------------

    def get(self, key: Key) -> bytes:
        """A value, or b"" where there is none."""
        return self._values([key], new_bytes)[0] or b""

    def get_batch(self, keys: Sequence[Key]) -> list[bytes]:
        """Values, b"" where there is none."""
        return [one or b"" for one in self._values(keys, new_bytes)] or [b""]

    def get_buffer(self, key: Key) -> BufferHandle | None:
        """A value in memory of its own, or None."""
        return self._values([key], BufferHandle.sized)[0]

    def batch_get_buffer(self, keys: Sequence[Key]) -> list[BufferHandle | None]:
        """Values in memory of their own, None where there is none."""
        return self._values(keys, BufferHandle.sized)

    def get_into(self, key: Key, buffer_ptr: int, size: int) -> int:
        """Copies a value to an address where it has room for `size` bytes; how many it has, or why not."""
        return self.batch_get_into([key], [buffer_ptr], [size])[0]

    def batch_get_into(self, keys: Sequence[Key], buffer_ptrs: Sequence[int], sizes: Sequence[int]) -> list[int]:
        """As `get_into`, of several in one call."""
        count, usable = len(keys), self._regions.usable
        if len(buffer_ptrs) != count or len(sizes) != count:
            return [BAD] * count

        def fits(item: int, size: int) -> bool:
            return size <= sizes[item] and usable(buffer_ptrs[item], size)

        return self._with_all(count, lambda moves: moves.get_at(moves.names(keys), buffer_ptrs, fits))

    def batch_get_into_multi_buffers(
        self,
        keys: Sequence[Key],
        all_buffer_ptrs: Sequence[Sequence[int]],
        all_sizes: Sequence[Sequence[int]],
        prefer_alloc_in_same_node: bool = False,
    ) -> list[int]:
        """Copies values to several places each, one after the other; they must be as long as these together."""
        count, spans = len(keys), paired(all_buffer_ptrs, all_sizes, len(keys))
        if spans is None:
            return [BAD] * count

        def plan(item: int, size: int) -> list[Range] | None:
            return whole(spans[item], size) if self._regions.all_usable(spans[item]) else None

        return self._with_all(count, lambda moves: moves.get_ranges(moves.names(keys), plan))

    def get_into_ranges(
        self,
        buffer_ptrs: Sequence[int],
        all_keys: Sequence[Sequence[Key]],
        all_dst_offsets: Grid,
        all_src_offsets: Grid,
        all_sizes: Grid,
    ) -> list[list[list[int]]]:
        """Copies bytes of several values into several registered buffers: `all_sizes[b][k][r]` bytes from
        `all_src_offsets` of the value to `all_dst_offsets` of the buffer. Bytes copied, or why not, of each."""
        grids = (all_keys, all_dst_offsets, all_src_offsets, all_sizes)
        if any(len(grid) != len(buffer_ptrs) for grid in grids):
            return [[[BAD] * len(some) for some in rows] for rows in all_dst_offsets]
        answers = []
        for address, keys, places, starts, sizes in zip(buffer_ptrs, *grids, strict=True):
            row = Row(address, self._regions.room(address), places, starts, sizes, refused=BAD)
            answers.append(self._into(keys, row) if row.fits(len(keys)) else row.answers)
        return answers

    def _into(self, keys: Sequence[Key], row: Row) -> list[list[int]]:
        codes = self._with_all(len(keys), lambda moves: moves.get_ranges(moves.names(keys), row.plan))
        return [
            answer if code >= 0 or code == BAD else [code] * len(answer)
            for answer, code in zip(row.answers, codes, strict=True)
        ]

    # -- sessions: what a layer-wise load calls ------------------------------------------------------------------------

    def batch_get_session_start(self, keys: Sequence[Key]) -> list[int]:
        """Begins to read these values in ranges: 0, or OBJECT_NOT_FOUND. They are in memory then, and may be evicted
        like any other."""
        sizes = self._with_all(len(keys), lambda moves: moves.sizes(moves.names(keys)))
        self._sessions.update(key for key, size in zip(keys, sizes, strict=True) if size >= 0)
        return [min(0, size) for size in sizes]

    def batch_get_into_multi_buffer_ranges(
        self,
        keys: Sequence[Key],
        all_buffer_ptrs: Sequence[Sequence[int]],
        all_sizes: Sequence[Sequence[int]],
        all_src_offsets: Sequence[Sequence[int]],
    ) -> list[int]:
        """Copies ranges of values whose session has begun to several places each: bytes, or why not."""
        count, spans, begun = len(keys), paired(all_buffer_ptrs, all_sizes, len(keys)), self._sessions
        if spans is None or len(all_src_offsets) != count:
            return [BAD] * count

        def plan(item: int, size: int) -> list[Range] | None:
            usable = keys[item] in begun and self._regions.all_usable(spans[item])
            return chosen(spans[item], all_src_offsets[item], size) if usable else None

        codes = self._with_all(count, lambda moves: moves.get_ranges(moves.names(keys), plan))
        return [code if key in begun else BAD for key, code in zip(keys, codes, strict=True)]

    def batch_get_session_end(self, keys: Sequence[Key]) -> int:
        """Ends what `batch_get_session_start` began."""
        self._sessions.difference_update(keys)
        return 0

    # -- what is there -------------------------------------------------------------------------------------------------

    def is_exist(self, key: Key) -> int:
        """1 where there is a value, 0 where there is none, negative where that cannot be said."""
        return self.batch_is_exist([key])[0]

    def batch_is_exist(self, keys: Sequence[Key]) -> list[int]:
        """As `is_exist`, of several in one call."""
        return self._with_all(len(keys), lambda moves: moves.exist(moves.names(keys)))

    def get_size(self, key: Key) -> int:
        """Bytes of a value, or OBJECT_NOT_FOUND."""
        return self._with_all(1, lambda moves: moves.sizes(moves.names([key])))[0]

    def get_replica_desc(self, key: Key) -> list[ReplicaDescriptor]:
        """Where a value is; empty where there is none."""
        tier = self._with(lambda moves: moves.tier(moves.name(key)), lambda _: 0)
        return [ReplicaDescriptor(tier)] if tier else []

    def batch_get_replica_desc(self, keys: Sequence[Key]) -> dict[Key, list[ReplicaDescriptor]]:
        """As `get_replica_desc`, of those that are there."""
        found = {key: self.get_replica_desc(key) for key in keys}
        return {key: some for key, some in found.items() if some}

    # -- removal -------------------------------------------------------------------------------------------------------

    def remove(self, key: Key, force: bool = False) -> int:
        """Forgets a value in every tier: 0, or OBJECT_NOT_FOUND. `force` or not: nothing holds it up."""
        return self.batch_remove([key], force)[0]

    def batch_remove(self, keys: Sequence[Key], force: bool = False) -> list[int]:
        """As `remove`, of several in one call."""
        return self._with_all(len(keys), lambda moves: moves.remove(moves.names(keys)))

    def remove_all(self, force: bool = False) -> int:
        """Forgets all values of this tenant, whichever process put them: how many there were."""
        return self._with(lambda moves: moves.remove_all(), _same)

    def remove_by_regex(self, regex_pattern: str, force: bool = False) -> int:
        """NOT_SUPPORTED: keys are kept as digests."""
        log.error("remove_by_regex(%r): keys are kept as digests, which no pattern fits: remove keys", regex_pattern)
        return NOT_SUPPORTED

    # -- inside --------------------------------------------------------------------------------------------------------

    def _values(self, keys: Sequence[Key], make: Callable[[int], tuple[V, Buffer]]) -> list[V | None]:
        """Values in what `make` makes for so many bytes; None where there is none."""
        made: dict[int, V] = {}

        def room(item: int, size: int) -> Buffer:
            made[item], target = make(size)
            return target

        codes = self._with_all(len(keys), lambda moves: moves.get(moves.names(keys), room))
        return [made[i] if code >= 0 else None for i, code in enumerate(codes)]

    def _put_values(
        self,
        keys: Sequence[Key],
        values: Sequence[Sequence[Any]],
        config: ReplicateConfig | None,
        *,
        anew: bool = False,
    ) -> list[int]:
        """Puts of bytes-like values in pieces. As with Mooncake, there are none with local_buffer_size 0."""
        if not self._stages or len(keys) != len(values):
            return [BAD] * len(keys)
        pieces = [as_sources([memoryview(part) for part in some]) for some in values]
        if not all(any(piece.length for piece in some) for some in pieces):
            return [BAD] * len(keys)
        return self._put_pieces(keys, pieces, config, anew=anew)

    def _put_spans(
        self,
        keys: Sequence[Key],
        spans: Sequence[Sequence[tuple[int, int]]],
        config: ReplicateConfig | None,
        *,
        anew: bool = False,
    ) -> list[int]:
        """Puts of values that lie at addresses; those that this process cannot read are refused, one by one."""
        if len(keys) != len(spans):
            return [BAD] * len(keys)
        codes = [0 if self._regions.all_usable(some) else BAD for some in spans]
        todo = [i for i, some in enumerate(spans) if not codes[i] and any(size for _, size in some)]
        if BAD in codes:
            log.error("put: an address is not registered, or is no memory of this host (a GPU's is not taken yet)")
        pieces = [[Buffer(address, size, None) for address, size in spans[i] if size] for i in todo]
        done = self._put_pieces([keys[i] for i in todo], pieces, config, anew=anew)
        for i, code in zip(todo, done, strict=True):
            codes[i] = code
        return codes

    def _put_pieces(
        self, keys: Sequence[Key], pieces: Sequence[Sequence[Buffer]], config: ReplicateConfig | None, *, anew: bool
    ) -> list[int]:
        if not all(keys) or (config is not None and config.contradicts_itself):
            return [BAD] * len(keys)
        if all(len(some) == 1 for some in pieces):
            values = [some[0] for some in pieces]
            return self._with_all(len(keys), lambda moves: moves.put(moves.names(keys), values, anew=anew))
        return self._with_all(len(keys), lambda moves: moves.put_gathered(moves.names(keys), pieces, anew=anew))

    def _with(self, work: Callable[[Moves], T], refused: Callable[[int], T]) -> T:
        """What `work` answers, or `refused(code)` before setup and where the cache raises."""
        moves = self._moves
        return refused(BAD) if moves is None else self._answer(lambda: work(moves), refused)

    def _with_all(self, count: int, work: Callable[[Moves], list[int]]) -> list[int]:
        """As `_with`, of a batch."""
        return self._with(work, lambda code: [code] * count) if count else []

    @staticmethod
    def _answer(work: Callable[[], T], refused: Callable[[int], T]) -> T:
        try:
            return work()
        except TierCacheError as fault:
            log.error("%s", fault)
            return refused(next((code for kind, code in _CODES.items() if isinstance(fault, kind)), INTERNAL))


def _same(code: int) -> int:
    return code


def _first_fault(codes: Sequence[int]) -> int:
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    print(SHIMS)  # noqa: T201  # this is what it is called for
