"""Comparing: ranks that hold the same heads digest all that they hold, and find out whether what another one of them
stored is what they would have stored.

They are expected to be equal, and sometimes are not: other kernels, other orders of summation, a flipped bit. What
differs is told, and kept as that rank's own variant; nothing is ever merged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import xxhash

from tiercache.kv import moving
from tiercache.kv.stretch import grouped

if TYPE_CHECKING:
    from tiercache.kv.saving import Batch
    from tiercache.kv.store import KvStore
    from tiercache.kv.stretch import Stretch
    from tiercache.kv.workers import Steps, Work

DIGEST_BYTES = 32 << 20
PEER_S = 2.0
"""How long a save waits for what the other replicas write, with its pages held. Ranks of one engine save at the same
time, so this is for one that died."""
PEER_LATE_S = 0.02
"""The same, after it was in vain: until all of them are heard of again."""
LOOK_S, LOOK_S_MAX = 0.001, 0.02


class Comparing:
    """Of one save. `differs` (block -> map of parts) is its caller's."""

    def __init__(self, store: KvStore, stretch: Stretch, differs: dict[int, int]) -> None:
        self._store, self._stretch, self._differs = store, stretch, differs
        layout, holder = stretch.layout, store.holder
        self._parts, pieces = holder.held(layout)
        self._pieces = [one for one in pieces if one not in holder.share(layout)[1]]
        self._rows: dict[int, tuple[int, moving.Digests]] = {}
        self._late = False

    def digest(self, batch: Batch, work: Work) -> Steps:
        """Digests what this rank holds of a batch and does not write."""
        wanted = [(block, self._parts & ~batch.claims[block - batch.span.start]) for block in batch.taken]
        layout = self._stretch.layout
        for parts, blocks in grouped(wanted, max(1, DIGEST_BYTES // layout.block_bytes)):
            if not parts and not self._pieces:
                continue
            with work.fence:
                rows = moving.digests_of(
                    self._stretch.planes, self._stretch.table, blocks, parts=parts, pieces=self._pieces
                )
            self._rows.update({block: (parts, row) for block, row in zip(blocks, rows, strict=True)})
            size = parts.bit_count() * layout.part_bytes + sum(stop - start for start, stop in self._pieces)
            self._store.core.metrics.add("tiercache_kv_compared_bytes_total", size * len(blocks))
            yield None

    def compare(self, batch: Batch, work: Work) -> Steps:
        """Waits for what the others write of a batch, a moment, and compares. What differs is stored as a variant; what
        has not come by then is remembered, and compared when it is loaded."""
        rows = [(block, *self._rows.pop(block)) for block in batch.taken if block in self._rows]
        if not rows:
            return
        yield from self._awaited([block for block, _, _ in rows])
        found = self._compared(batch, rows)
        variants = self._store.variants
        for (block, parts, row), differs in zip(rows, found, strict=True):
            bad = self._bad_pieces(block, row) if self._pieces else []
            if differs or bad:
                self._differs[block] = differs
                yield from variants.keep(self._stretch, block, (differs, bad), work)
            elif self._late:
                variants.remember(self._stretch.keys[block], parts, row.row)

    def _compared(self, batch: Batch, rows: list[tuple[int, int, moving.Digests]]) -> list[int]:
        if any(self._store.holder.share(self._stretch.layout)):
            first = batch.span.start
            return batch.ticket.compare([(block - first, parts, row.row) for block, parts, row in rows])
        # Who writes nothing joins what is there at the moment: what came after that is not of its ticket.
        layout, keys = self._stretch.layout, self._stretch.of_blocks(block for block, _, _ in rows)
        ticket = self._store.core.join_blocks(keys, layout.block_bytes, layout.part_bytes, 0)
        try:
            return ticket.compare([(item, parts, row.row) for item, (_, parts, row) in enumerate(rows)])
        finally:
            ticket.end()

    def _awaited(self, blocks: list[int]) -> Steps:
        """Waits until these blocks have all that this rank holds, or sets `_late` after a moment's patience."""
        core, variants, look_s = self._store.core, self._store.variants, LOOK_S
        until = core.clock.monotonic() + variants.patience_s
        self._late = False
        while not self._there(blocks):
            if core.clock.monotonic() >= until:
                self._late, variants.patience_s = True, PEER_LATE_S
                return
            yield look_s
            look_s = min(2 * look_s, LOOK_S_MAX)
        variants.patience_s = PEER_S

    def _there(self, blocks: list[int]) -> bool:
        """Whether all that this rank holds of these blocks is stored: in memory, or where it is too late to compare."""
        core, stretch = self._store.core, self._stretch
        wanted = self._store.holder.needed(stretch.layout)
        lease = core.lease_blocks_resident(stretch.of_blocks(blocks), wanted)
        if lease is not None:
            lease.release()
            return True
        stop = blocks[-1] + 1
        return len(core.probe_chain(stretch.keys[:stop], wanted)) == stop

    def _bad_pieces(self, block: int, row: moving.Digests) -> list[tuple[int, int]]:
        """Pieces of parts that lie in memory with other bytes than this rank's."""
        layout = self._stretch.layout
        bad = []
        for (start, stop), digest in zip(self._pieces, row.pieces, strict=True):
            part = 1 << start // layout.part_bytes
            lease = self._store.core.lease_blocks_resident([self._stretch.keys[block]], part)
            if lease is not None:
                with lease:
                    if xxhash.xxh3_64_intdigest(lease.buffer(0).slice(start, stop - start).view()) != digest:
                        bad.append((start, stop))
        return bad
