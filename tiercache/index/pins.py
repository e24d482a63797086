"""What look-ups and reservations hand out, and what giving it back sets free."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt

    I64 = npt.NDArray[np.int64]

PINS_MAX = 65_000
"""Pins outstanding at a time, over all slots: so a 16-bit count cannot overflow, without a check at each slot."""


class Freed(NamedTuple):
    """Locations that nobody looks at any more: the caller gives them to the tiers' `free`. Indexed by TierId.

    `held`: of what was removed, the places in memory that somebody still uses. They come with a later `release`; until
    then nobody new may find them.
    """

    memory: list[int]
    ssd: list[int]
    held: Sequence[int] = ()


class Unplaced(NamedTuple):
    """What really left a tier, and where it was; a location of -1: somebody still uses the bytes, free nothing yet.
    Those are in `held`."""

    slots: npt.NDArray[np.int64]
    locations: npt.NDArray[np.int64]
    held: Sequence[int] = ()


class Pin:
    """What a look-up or reservation holds: one slot, distinct slots as a list (a few) or array, None when released."""

    __slots__ = ("held", "reserved")

    def __init__(self, held: int | list[int] | I64 | None, reserved: bool = False) -> None:
        self.held = held
        self.reserved = reserved


class Match(NamedTuple):
    """Result of a look-up; what it found is pinned until `Index.release`.

    `slots`: one per name asked, -1 = not there or not readable; chains: only the matched prefix. `pin` is None when
    nothing was pinned.
    """

    slots: npt.NDArray[np.int64]
    pin: Pin | None


class Reservation(NamedTuple):
    """Slots for names, pinned (also PENDING ones) until `Index.release`.

    `slots`: -1 where the slot table is full (or, chains, the parent is not in the index). `fresh`: this call made the
    slot PENDING and owns its filling; else somebody else fills it, or it is readable.
    """

    slots: npt.NDArray[np.int64]
    fresh: npt.NDArray[np.bool_]
    pin: Pin | None
