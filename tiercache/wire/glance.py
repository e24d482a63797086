"""Glances: entries read from the owner's memory without asking it, where the memo says where they lie.

Nothing is pinned. An extent's generation grows when it is freed, before its space can serve anything else; so where the
generation still stands after a copy, what was copied is the entry. Anything odd is forgotten and asked about.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from tiercache.buffers import copy_many, copy_many_verified
from tiercache.errors import ConfigError
from tiercache.lease import Lease
from tiercache.model import Name, Outcome

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt

    from tiercache.buffers import Buffer, Source
    from tiercache.wire.memo import Home, Spot


class Glance(Lease):
    """Pages seen in the owner's memory: as a lease, but it pins nothing and gives no views.

    `copy_into` answers MISS where the page went away meanwhile; then the target is undefined.
    """

    __slots__ = ("_home", "_names", "_spots")

    def __init__(self, home: Home, names: list[Name], spots: list[Spot]) -> None:
        self.outcomes = [Outcome.HIT] * len(spots)
        self._locations = None  # nothing is held, so there is nothing to give back
        self._home, self._names, self._spots = home, names, spots

    def buffer(self, index: int) -> NoReturn:
        """Refused: nothing keeps the bytes in place."""
        raise ConfigError("a glance at shared memory pins nothing, so it has no views: copy, or take a lease by name")

    def array(self, index: int) -> npt.NDArray[np.uint8]:
        """Refused, as `buffer`."""
        self.buffer(index)

    def copy_into(self, index: int, start: int, stop: int, target: Buffer, *, verify: bool = True) -> Outcome:
        """As Lease.copy_into, or MISS where the page is gone."""
        outcome = self._home.view.copy_places([self._spots[index]], [target], [range(start, stop)], verify=verify)[0]
        if outcome is Outcome.MISS:
            self._home.memo.forget(self._names[index])
        return outcome

    def __enter__(self) -> Glance:
        return self

    def __del__(self) -> None:
        """Nothing is held."""


def glance_pages(home: Home, key: bytes, ordinals: Sequence[int], parts: Sequence[int], now_s: float) -> Glance | None:
    """Pages with these parts (a map a page), where all of them can be seen; else None."""
    memo, look = home.memo, home.view.glance
    names: list[Name] = []
    spots: list[Spot] = []
    locations: list[int] = []
    for ordinal, wanted in zip(ordinals, parts, strict=True):
        name = Name(key, ordinal)
        location = memo.get(name)
        if location < 0:
            return None
        spot = look(location, name, now_s)
        if spot is None:
            memo.forget(name)
            return None
        if wanted & ~spot.parts:
            return None  # the place is right, some parts are yet to come
        names.append(name)
        spots.append(spot)
        locations.append(location)
    home.touched.extend(locations)
    return Glance(home, names, spots)


def sees_pages(home: Home, key: bytes, ordinals: Sequence[int], parts: Sequence[int], now_s: float) -> bool:
    """Whether all of these can be seen."""
    for ordinal, wanted in zip(ordinals, parts, strict=True):
        name = Name(key, ordinal)
        location = home.memo.get(name)
        spot = home.view.glance(location, name, now_s) if location >= 0 else None
        if spot is None or wanted & ~spot.parts:
            return False
    return True


def glance_into(
    home: Home, names: Sequence[Name], targets: Sequence[Buffer], verify: bool, now_s: float
) -> list[Outcome]:
    """Copies whole entries that can be seen to the start of each target: HIT, CORRUPT where a digest differed, and
    MISS for what must be asked for."""
    # Everything is looked up before the first byte moves, and with few calls: see copy_many_verified.
    memo, look = home.memo, home.view.glance
    remembered = memo.get
    outcomes = [Outcome.MISS] * len(names)
    chosen: list[tuple[int, int, Spot]] = []
    sources: list[Source] = []
    into: list[Buffer] = []
    for i, name in enumerate(names):
        location = remembered(name)
        if location < 0:
            continue
        spot = look(location, name, now_s)
        if spot is None or spot.parts != (1 << (-(-spot.size // spot.part_bytes) or 1)) - 1:
            memo.forget(name)
            continue
        if targets[i].length < spot.size:
            raise ConfigError(f"target {i} has {targets[i].length} bytes, the entry {spot.size}: pass a larger buffer")
        chosen.append((i, location, spot))
        sources.append(spot.source(verify))
        into.append(targets[i])
    if not chosen:
        return outcomes
    if verify:
        good = copy_many_verified(sources, into)
    else:
        copy_many(sources, into)
        good = None
    hit, touch = Outcome.HIT, home.touched.append
    for at, (i, location, spot) in enumerate(chosen):
        if spot.stale:  # which also explains digests that differ
            memo.forget(names[i])
        elif good is None or good[at]:
            outcomes[i] = hit
            touch(location)
        else:
            outcomes[i] = Outcome.CORRUPT
            memo.forget(names[i])
    return outcomes
