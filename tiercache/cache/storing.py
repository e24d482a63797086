"""Storing: puts whole entries into memory, from any thread and without the loop."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from tiercache.buffers import copy, part_digests
from tiercache.errors import CapacityError, ConfigError
from tiercache.model import Name, Outcome, State, TierId, all_parts, part_bytes_for

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from tiercache.buffers import Buffer
    from tiercache.cache.recovery import Recovery
    from tiercache.cache.tiers import Tiers
    from tiercache.index import Reservation
    from tiercache.model import Terms


SCOPE_MAX = 65_535


class Storing:
    """Reserve, copy, digest, commit; what is there already, or on its way, is left alone."""

    def __init__(self, tiers: Tiers, recovery: Recovery, stored: Callable[[npt.NDArray[np.int64]], None]) -> None:
        """`stored` hears of slots that are visible now and that the SSD may lack."""
        self._tiers, self._recovery, self._stored = tiers, recovery, stored

    def put(self, names: Sequence[Name], values: Sequence[Buffer], terms: Terms) -> list[Outcome]:
        """Lone entries; see Cache.store."""
        sizes, steps = self._prepare(names, values, terms)
        reservation = self._tiers.index.reserve(
            names,
            sizes,
            steps,
            kind=terms.kind,
            scope=terms.scope,
            cost_s=terms.cost_s,
            expiry_s=terms.expiry_s,
        )
        return self._fill(reservation, names, values)

    def put_chain(
        self, digests: Sequence[bytes], values: Sequence[Buffer], terms: Terms, parent: bytes
    ) -> list[Outcome]:
        """Blocks of one chain; see Cache.store_chain."""
        if not digests:
            return []
        names = [Name(digest) for digest in digests]
        sizes, steps = self._prepare(names, values, terms)
        reservation = self._tiers.index.reserve_chain(
            digests,
            sizes,
            steps,
            width=len(digests[0]),
            parent=parent or None,
            kind=terms.kind,
            scope=terms.scope,
            cost_s=terms.cost_s,
            expiry_s=terms.expiry_s,
        )
        return self._fill(reservation, names, values)

    def _prepare(
        self, names: Sequence[Name], values: Sequence[Buffer], terms: Terms
    ) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
        """Sizes and part sizes; expired entries of these names make way."""
        sizes = np.array([value.length for value in values], np.int64)
        most = self._tiers.memory.entry_bytes_max
        if len(sizes) and int(sizes.max()) > most:
            raise CapacityError(
                f"an entry of {int(sizes.max())} bytes can never fit: memory takes at most {most} in one piece; "
                "split the value, or raise memory_bytes"
            )
        if not 0 <= terms.scope <= SCOPE_MAX:
            raise ConfigError(f"scope must be a whole number from 0 to {SCOPE_MAX}, not {terms.scope!r}")
        if not (math.isfinite(terms.cost_s) and terms.cost_s >= 0):
            raise ConfigError(f"cost_s must be a number of seconds, not {terms.cost_s!r}")
        self._tiers.expiries |= bool(terms.expiry_s)
        self._tiers.purge(names)
        self._tiers.make_slots(len(names))
        self._recovery.revive(names)
        return sizes.astype(np.uint32), np.array([part_bytes_for(int(size)) for size in sizes], np.uint32)

    def _fill(self, reservation: Reservation, names: Sequence[Name], values: Sequence[Buffer]) -> list[Outcome]:
        """Fills what a reservation made PENDING; whatever happens, nothing stays PENDING."""
        tiers, slots = self._tiers, reservation.slots
        outcomes = [Outcome.HIT] * len(slots)
        fresh = np.flatnonzero(reservation.fresh).tolist()
        unplaced = set(slots[reservation.fresh].tolist())
        unused: set[int] = set()
        try:
            state = tiers.index.facts(slots).state
            for i in range(len(slots)):
                if slots[i] < 0:
                    outcomes[i] = Outcome.FULL
                elif not reservation.fresh[i] and state[i] < State.RESIDENT:
                    outcomes[i] = Outcome.BUSY
            sizes = [values[i].length for i in fresh]
            steps = [part_bytes_for(size) for size in sizes]
            locations = tiers.reserve([names[i] for i in fresh], sizes, steps)
            unused.update(location for location in locations if location >= 0)
            for i, location, size, step in zip(fresh, locations, sizes, steps, strict=True):
                if location < 0:
                    outcomes[i] = Outcome.FULL
                    continue
                target = tiers.memory.buffers([location])[0]
                copy(values[i], target)
                parts = all_parts(size, step)
                tiers.memory.commit([location], [parts], [part_digests(target, step, parts)])
                unused.discard(location)
                tiers.place(slots[i : i + 1], TierId.MEMORY, [location], [parts])
                unplaced.discard(int(slots[i]))
            visible = np.unique(slots[[i for i, outcome in enumerate(outcomes) if outcome is Outcome.HIT]])
        finally:
            tiers.memory.free(sorted(unused))
            if unplaced:
                tiers.index.abandon(np.array(sorted(unplaced), np.int64))
            tiers.release(reservation)
        tiers.metrics.add_all(
            [
                ("tiercache_puts_total", outcomes.count(Outcome.HIT), "", "object"),
                ("tiercache_full_total", outcomes.count(Outcome.FULL), "memory", ""),
            ]
        )
        self._stored(visible)
        return outcomes
