"""Seen: sizes of values that this process put or read, so that they are read again without asking their owner.

A copy into a place of exactly a value's size says nothing about where the value ended. So the place's last byte is made
other than the value's before: where it is right afterwards, the copy has reached it, and the size is what it was.
Whatever else became of a value meanwhile (removed, put again, shorter or longer) shows, and is asked about.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from tiercache.buffers import Buffer
from tiercache.errors import ConfigError
from tiercache.model import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tiercache.core import Core
    from tiercache.model import Name

NAMES_MAX = 1 << 17
"""Values that one process remembers; then it begins anew."""

# The address space; see tiercache/buffers.py for why not a view of each span.
_MEMORY = memoryview((ctypes.c_uint8 * (1 << 62)).from_address(0)).cast("B")


class Seen:
    """See the module. Any thread, without a lock: every step is one operation on a dictionary."""

    def __init__(self) -> None:
        self._facts: dict[Name, tuple[int, int]] = {}

    def learn(self, name: Name, value: Buffer) -> None:
        """That this is the name's value now."""
        if len(self._facts) >= NAMES_MAX:
            self._facts = {}
        if value.length:
            self._facts[name] = value.length, _MEMORY[value.address + value.length - 1]

    def copy(
        self, core: Core, names: Sequence[Name], addresses: Sequence[int], fits: Callable[[int, int], bool]
    ) -> list[int]:
        """Copies values whose size is known, verified, to these addresses, where `fits(item, size)`: sizes, or -1 for
        what must be asked about."""
        answers = [-1] * len(names)
        chosen: list[tuple[int, int, int, int]] = []
        facts = self._facts
        for i, name in enumerate(names):
            size, last = facts.get(name, (0, 0))
            if size and fits(i, size):
                at = addresses[i] + size - 1
                chosen.append((i, size, last, _MEMORY[at]))
                _MEMORY[at] = last ^ 255
        if not chosen:
            return answers
        outcomes = [Outcome.MISS] * len(chosen)
        try:
            targets = [Buffer(addresses[i], size, None) for i, size, _, _ in chosen]
            outcomes = core.get_into_resident(
                [names[i] for i, _, _, _ in chosen], targets, verify=core.settings.verify_copies
            )
        except ConfigError:  # one has become longer
            pass
        finally:
            for (i, size, last, before), outcome in zip(chosen, outcomes, strict=True):
                at = addresses[i] + size - 1
                if outcome is Outcome.HIT and _MEMORY[at] == last:
                    answers[i] = size
                else:
                    facts.pop(names[i], None)
                    if _MEMORY[at] == last ^ 255:
                        _MEMORY[at] = before
        return answers
