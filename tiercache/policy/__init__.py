"""The port of eviction policies: the order of victims in one tier, over slots, and nothing else.

A policy does no I/O, reads no clock, takes no lock (the index calls it under its own) and never sees a key; where it
wants to remember what left (ghosts), it sees 64-bit names. Slots are rows of the index; arrays are int64 unless said
otherwise, and may be empty. A new policy is one file here and one line in `POLICIES`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from tiercache.policy.lru import LRU

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Slots = npt.NDArray[np.int64]
    Names = npt.NDArray[np.uint64]
    Order = npt.NDArray[np.uint32]


class Columns(Protocol):
    """What a policy may read of the index: columns indexed by slot, current under the index's lock."""

    capacity: int
    depth: npt.NDArray[np.int32]
    """Page ordinal, or depth in a chain: within one batch the deeper block is the older one (leaf first)."""
    size: npt.NDArray[np.uint32]
    cost_s: npt.NDArray[np.float32]
    kind: npt.NDArray[np.uint8]


class Policy(Protocol):
    """The order of victims in one tier."""

    wants_names: bool
    """Whether `insert` and `remove` are given 64-bit names (ghosts need them); else they get None."""

    def attach(self, columns: Columns) -> None:
        """Called once, before anything else; arrays per slot are allocated here."""
        ...

    def insert(self, slots: Slots, names: Names | None, order: Order | None = None) -> None:
        """These slots are now in the tier, used just now; one call is one moment. With `order` (recovery) they were
        there before this life, and are older than all used in it: see `order`."""
        ...

    def touch(self, slots: Slots | int) -> None:
        """These were used, in one moment; one slot may come as an int. Slots that are not in this tier may be among
        them and must be ignored; slots that were named as victims come back."""
        ...

    def remove(self, slots: Slots, names: Names | None) -> None:
        """These left the tier; a policy with ghosts may remember their names."""
        ...

    def victims(self, count: int) -> Slots:
        """At most `count` slots in the order in which they should go; fewer only when it knows no more. Peeks: a slot
        leaves only by `remove`; refused ones come back by `keep`; until one of the two, it is not named again."""
        ...

    def keep(self, slots: Slots) -> None:
        """These were named as victims and could not go (pinned, or above something that stays): in use."""
        ...

    def order(self, slots: Slots) -> Order:
        """Something to persist: larger means later. Given back to `insert` it restores the order."""
        ...


POLICIES: dict[str, type[Policy]] = {"lru": LRU}
"""Policies by the name that settings use."""
