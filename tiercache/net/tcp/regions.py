"""Regions: the memory that a tcp transport exposes, and who is sending from it or receiving into it now."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tiercache.buffers import Buffer

PATIENCE_S = 1.0
"""How long `withdraw` waits for bytes under way before their connections are cut."""


class User(Protocol):
    """A thread that moves bytes of regions, one group at a time."""

    def cut(self, why: str) -> None:
        """Ends its connection, so that it leaves soon. From any thread."""
        ...


class Region(NamedTuple):
    """Exposed memory."""

    memory: Buffer
    writable: bool
    users: set[User]


class Regions:
    """All of one transport, by number; a number is never used twice. From any thread."""

    def __init__(self) -> None:
        self._regions: dict[int, Region] = {}
        self._last = 0
        self._changed = threading.Condition()

    def add(self, memory: Buffer, *, writable: bool) -> int:
        """The number of what is exposed from now on."""
        with self._changed:
            self._last += 1
            self._regions[self._last] = Region(memory, writable, set())
            return self._last

    def remove(self, number: int) -> None:
        """Ends it: once this returns nobody touches that memory. Waits for whoever does, and cuts off the slow."""
        with self._changed:
            region = self._regions.pop(number, None)
            if region is None or self._changed.wait_for(lambda: not region.users, PATIENCE_S):
                return
            for user in list(region.users):
                user.cut("memory was withdrawn under slow moves")
            self._changed.wait_for(lambda: not region.users)

    def enter(self, user: User, rows: Sequence[tuple[int, int, int]], *, writing: bool, bytes_max: int) -> Group:
        """The longest start of these moves, (region, offset, length), of which all may be done, or none. Where they may
        be, the user has to `leave` that group."""
        spans: list[tuple[int, int]] = []
        entered: list[Region] = []
        count = total = 0
        with self._changed:
            for number, offset, length in rows:
                region = self._regions.get(number)
                if region is None or offset + length > region.memory.length or (writing and not region.writable):
                    if spans:
                        break
                    count += 1
                    continue
                if count > len(spans) or (spans and total + length > bytes_max):
                    break
                if user not in region.users:
                    region.users.add(user)
                    entered.append(region)
                spans.append((region.memory.address + offset, length))
                total += length
                count += 1
        return Group(count, spans, total, entered)

    def leave(self, user: User, group: Group) -> None:
        """The user no longer touches the memory of this group."""
        with self._changed:
            for region in group.regions:
                region.users.discard(user)
            self._changed.notify_all()

    def __len__(self) -> int:
        return len(self._regions)

    def clear(self) -> None:
        """Removes all."""
        for number in list(self._regions):
            self.remove(number)


class Group(NamedTuple):
    """Moves that are answered together. No spans: none of them is possible."""

    moves: int
    spans: list[tuple[int, int]]
    total: int
    regions: list[Region]
