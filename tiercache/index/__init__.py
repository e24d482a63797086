"""The one index of all local tiers: names, payload rows behind them, pins, states and their transitions.

Shape (measured by bench/memory_index.py). Facts of one cached object live in a *slot*, a row of packed NumPy columns;
where its bytes lie, in a *payload row* that the slot points to, with a reference count, so that equal payloads can
share one. Names are found through a packed hash table over slot numbers; there are no objects and no dictionaries of
entries. A run of pages is one row (its key); a run of blocks is implied: each block knows its parent and counts its
children, and those stored together lie in consecutive slots. So a chain branches without a split, and is appended to
without a walk.
One lock guards everything and is held for microseconds: never across I/O, a copy or an await.
"""

from __future__ import annotations

from tiercache.index.few import FEW, Look
from tiercache.index.index import Index
from tiercache.index.load import Loaded
from tiercache.index.pins import Freed, Match, Reservation, Unplaced
from tiercache.index.slots import TRANSITIONS, SlotFacts

__all__ = ["FEW", "TRANSITIONS", "Freed", "Index", "Loaded", "Look", "Match", "Reservation", "SlotFacts", "Unplaced"]
