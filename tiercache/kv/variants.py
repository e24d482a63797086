"""Variants: what a rank holds where it differs from what another rank of the same heads stored first.

The version stored first stays, and is what everybody else reads. The rank that differs keeps its own parts in a lone
entry under a name of its own, and its later loads read that: both readings are right, and nothing is merged. A marker
entry says that a rank has variants at all, so that loads of the many that have none ask once.
"""

from __future__ import annotations

import asyncio
import logging
import struct
from collections import OrderedDict
from typing import TYPE_CHECKING

from tiercache import keys
from tiercache.buffers import Buffer, copy
from tiercache.kv import moving
from tiercache.model import Kind, Name, Outcome

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Future

    from tiercache.core import Core
    from tiercache.kv.layout import Layout, Spans
    from tiercache.kv.shard import Shard
    from tiercache.kv.stretch import Stretch
    from tiercache.kv.workers import Steps, Work
    from tiercache.lease import Lease

log = logging.getLogger(__name__)

REMEMBERED_MAX = 1 << 16
"""Blocks whose comparison is still due that a rank remembers, some 600 bytes each."""
PATIENCE_S = 2.0
"""How long saves wait at first for what other replicas write: see comparing.PEER_S."""
HEAD = struct.Struct("<4sI")
SPAN = struct.Struct("<QQ")
MAGIC = b"kvv1"


class Variants:
    """Those of one rank. Any thread."""

    def __init__(self, core: Core, loop: asyncio.AbstractEventLoop, layout: Layout, holder: Shard) -> None:
        self._core, self._loop, self._layout, self._holder = core, loop, layout, holder
        layers, heads = holder.layers, holder.heads
        self._label = (
            f"{layers.start}-{layers.stop} {heads.start}-{heads.stop} {holder.replica}/{holder.replicas}".encode()
        )
        self._known: bool | None = None if holder.replicas > 1 else False
        self._due: OrderedDict[bytes, tuple[int, bytes]] = OrderedDict()
        self._told = False
        self.patience_s = PATIENCE_S

    def name(self, key: bytes) -> Name:
        """Name of this rank's variant of a block; with an empty key that of the marker."""
        return Name(keys.object_key(self._layout.namespace, key + b" variant " + self._label))

    # -- writing -------------------------------------------------------------------------------------------------------

    def keep(self, stretch: Stretch, block: int, differs: Spans, work: Work) -> Steps:
        """Stores what this rank holds of a block, where it differs."""
        parts, pieces = differs
        self.report(parts.bit_count() + len(pieces))
        whole = bytearray(self._layout.block_bytes)
        target = Buffer.of(whole, writable=True)
        with work.fence:
            moving.gather(stretch.planes, stretch.table, [block], [target], parts=parts, pieces=pieces)
        spans = [self._layout.part_span(part) for part in range(self._layout.parts) if parts >> part & 1] + list(pieces)
        head = HEAD.pack(MAGIC, len(spans)) + b"".join(SPAN.pack(*one) for one in spans)
        value = head + b"".join(whole[start:stop] for start, stop in spans)
        names = [self.name(stretch.keys[block]), self.name(b"")]
        yield asyncio.run_coroutine_threadsafe(self._core.put(names, [value, MAGIC], kind=Kind.KV), self._loop)
        self._known = True

    def report(self, parts: int) -> None:
        """Counts parts that differ; the log has the first ones."""
        self._core.metrics.add("tiercache_kv_divergent_parts_total", parts)
        if not self._told:
            self._told = True
            log.warning(
                "replica %d of %d computed other KV for %d parts than a replica with the same heads stored: both are "
                "kept, each reads its own. More of it is counted in tiercache_kv_divergent_parts_total only",
                self._holder.replica,
                self._holder.replicas,
                parts,
            )

    def remember(self, key: bytes, parts: int, row: bytes) -> None:
        """What this rank holds of a block that the others have not written yet: compared when it is loaded."""
        self._due[key] = (parts, row)
        while len(self._due) > REMEMBERED_MAX:
            self._due.popitem(last=False)

    # -- reading -------------------------------------------------------------------------------------------------------

    @property
    def due(self) -> bool:
        """Whether there are blocks that this rank could not compare when it saved them."""
        return bool(self._due)

    def differs(self, key: bytes, parts: int, row: bytes) -> int:
        """Which of these parts, with these digests in the cache, are not what this rank had and could not compare."""
        if (due := self._due.get(key)) is None:
            return 0
        mine, digests = due
        both = parts & mine
        return sum(
            1 << part
            for part in range(self._layout.parts)
            if both >> part & 1 and digests[8 * part : 8 * part + 8] != row[8 * part : 8 * part + 8]
        )

    def look(self) -> Future[Lease] | None:
        """Asks for the marker, where nobody knows yet whether this rank has variants; hand the lease to `known`."""
        if self._known is not None:
            return None
        return asyncio.run_coroutine_threadsafe(self._core.lease([self.name(b"")]), self._loop)

    def known(self, marker: Lease | None = None) -> bool:
        """Whether this rank may have variants."""
        if marker is not None:
            with marker:
                self._known = self._known or marker.outcomes[0] is Outcome.HIT
        return bool(self._known)

    def lease(self, blocks: Sequence[bytes]) -> Future[Lease]:
        """A lease on this rank's variants of blocks; most are a MISS."""
        return asyncio.run_coroutine_threadsafe(self._core.lease([self.name(key) for key in blocks]), self._loop)

    def unpack(self, lease: Lease, index: int, target: Buffer) -> list[tuple[int, int]] | None:
        """Copies the spans of a variant to their places in a whole block, verified; None where it is damaged."""
        size = lease.buffer(index).length
        value = bytearray(size)
        source = Buffer.of(value, writable=True)
        if lease.copy_into(index, 0, size, source) is not Outcome.HIT:
            return None
        magic, count = HEAD.unpack_from(value)
        spans = [SPAN.unpack_from(value, HEAD.size + i * SPAN.size) for i in range(count)] if magic == MAGIC else []
        at = HEAD.size + count * SPAN.size
        if not spans or at + sum(stop - start for start, stop in spans) != size:
            return None
        for start, stop in spans:
            copy(source.slice(at, stop - start), target.slice(start, stop - start))
            at += stop - start
        return spans
