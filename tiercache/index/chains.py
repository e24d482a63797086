"""Chains of blocks as a whole: what of a chain is where, its use, and pins on any of its blocks.

All of it is vectorised over the columns of slots, for a sequence of 128k tokens has 8,192 blocks, and is asked about
whenever a request is scheduled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tiercache.index.names import Query
from tiercache.index.pins import Match
from tiercache.model import State, all_parts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from threading import Lock

    import numpy.typing as npt

    from tiercache.index.entries import Entries
    from tiercache.index.pins import Pin

    I64 = npt.NDArray[np.int64]
    U64 = npt.NDArray[np.uint64]
    Mask = npt.NDArray[np.bool_]

RESIDENT = int(State.RESIDENT)
ALL = (1 << 64) - 1
IN_MEMORY, ON_SSD = 1, 2


class Chains:
    """See the module. Part of Index, behind its lock."""

    def __init__(self, entries: Entries, lock: Lock, hold: Callable[[I64], Pin], may_hold: Callable[[], bool]) -> None:
        """`hold` pins distinct slots under the lock, where `may_hold`."""
        self._entries, self._lock, self._hold, self._may_hold = entries, lock, hold, may_hold
        self._slots, self._names = entries.slots, entries.names

    def probe(
        self,
        digests: Sequence[bytes] | bytes,
        parts: int,
        *,
        ssd: bool,
        now_s: float = 0,
        width: int = 0,
        touch: bool = False,
    ) -> bytes:
        """One byte a block, IN_MEMORY or ON_SSD, for the longest prefix of a chain that has these parts (a map) in
        memory and, with `ssd`, on the SSD; with `now_s` what expires by then does not count. No pin, and a use only
        with `touch`. Digests as a list, or joined, of this `width`."""
        if not len(digests):
            return b""
        query, slots = Query(digests, len(digests[0]) if not isinstance(digests, bytes) else width), self._slots
        with self._lock:
            rows = self._names.walk(query)
            if not len(rows):
                return b""
            payloads = slots.payload.take(rows)
            memory, disk = slots.parts[0].take(payloads), slots.parts[1].take(payloads)
            wanted = self._wanted(rows, payloads, parts)
            here = (memory & wanted) == wanted
            fine: Mask = ((memory | disk) & wanted) == wanted if ssd else here
            fine &= slots.state.take(rows) >= RESIDENT
            if now_s:
                expiry = slots.expiry_s.take(rows)
                fine &= (expiry == 0) | (expiry > now_s)
            length = len(fine) if fine.all() else int(fine.argmin())
            if touch and length:
                self._entries.touch(rows[:length])
        return np.where(here[:length], np.uint8(IN_MEMORY), np.uint8(ON_SSD)).tobytes()

    def touch(self, digests: Sequence[bytes]) -> None:
        """The readable prefix of a chain was used just now: in one moment, in which policies hold the deeper block for
        the older one."""
        if not len(digests):
            return
        query = Query(digests, len(digests[0]))
        with self._lock:
            rows = self._names.walk(query)
            rows = rows[self._slots.state.take(rows) >= RESIDENT]
            if len(rows):
                self._entries.touch(rows)

    def match(self, digests: Sequence[bytes]) -> Match:
        """Single blocks of one width, from anywhere in their chains; -1 for what is not readable."""
        if not len(digests):
            return Match(np.empty(0, np.int64), None)
        query = Query(digests, len(digests[0]))
        with self._lock:
            return self._matched(self._names.find_blocks(query))

    def match_resident(self, digests: Sequence[bytes], parts: int, now_s: float = 0) -> tuple[Match, I64] | None:
        """As `match`, with their places, where memory has these parts of all of them; else None."""
        if not len(digests):
            return None
        query, slots = Query(digests, len(digests[0])), self._slots
        with self._lock:
            rows = self._names.find_blocks(query)
            payloads = slots.payload.take(rows)
            wanted = self._wanted(rows, payloads, parts)
            fine: Mask = (slots.parts[0].take(payloads) & wanted) == wanted
            fine &= slots.state.take(rows) >= RESIDENT
            if now_s:
                expiry = slots.expiry_s.take(rows)
                fine &= (expiry == 0) | (expiry > now_s)
            if not fine.all():
                return None
            match = self._matched(rows)
            return (match, slots.location[0].take(payloads)) if match.pin is not None else None

    def _matched(self, rows: I64) -> Match:
        """Pins what is readable, under the lock."""
        readable = self._slots.state.take(rows) >= RESIDENT
        found = rows[readable]
        if not len(found) or not self._may_hold():
            return Match(np.full(len(rows), -1, np.int64), None)
        if (np.diff(found) <= 0).any():
            found = np.unique(found)
        return Match(np.where(readable, rows, -1), self._hold(found))

    def _wanted(self, rows: I64, payloads: npt.NDArray[np.int32], parts: int) -> U64 | np.uint64:
        """What of a map each block can have at all."""
        sizes, steps = self._slots.size.take(rows), self._slots.part_bytes.take(payloads)
        size, step = int(sizes[0]), max(1, int(steps[0]))
        if (sizes == size).all() and (steps == step).all():
            return np.uint64(parts & all_parts(size, step) & ALL)
        counts = np.clip(-(-sizes.astype(np.int64) // np.maximum(steps, 1)), 1, 64)
        most: U64 = np.uint64(ALL) >> (64 - counts).astype(np.uint64)
        return most & np.uint64(parts & ALL)
