"""Model: the groups of layers of one model (full attention, sliding windows, states), matched as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tiercache.errors import ConfigError
from tiercache.kv.layout import Span

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tiercache.kv.layout import Layout
    from tiercache.kv.store import KvStore

STATES_LOOKED_AT = 256
"""Each is a question of its own."""


@dataclass(frozen=True, slots=True)
class Usable:
    """What of a sequence can be reused by a model with several groups.

    `length`: usable blocks. `ranges[g]`: the blocks of group g that must be loaded for that (all of them, those in the
    window, or the last one). `tiers[g]`: for each block of `ranges[g]`, where it comes from, as Matched.tiers.
    """

    length: int
    ranges: tuple[range, ...]
    tiers: tuple[bytes, ...]


class Model:
    """Groups of one model with the same `block_tokens`; see `usable`, which is pure."""

    def __init__(self, layouts: Sequence[Layout]) -> None:
        """Raises ConfigError where the layouts differ in block_tokens, or there is none."""
        self.layouts = tuple(layouts)
        sizes = {layout.block_tokens for layout in self.layouts}
        if len(sizes) != 1:
            raise ConfigError(
                f"groups with blocks of {sorted(sizes)} tokens: all groups of a model are matched together, "
                "so build their layouts with the same block_tokens"
            )
        (self.block_tokens,) = sizes

    def usable(self, present: Sequence[bytes], most: int | None = None) -> Usable:
        """The longest usable prefix, at most `most` blocks.

        `present[g][i]` says where block i of group g is: 0 nowhere, else as Matched.tiers. Usable are the largest n
        blocks such that groups of full attention have blocks [0, n), groups with a sliding window w the last
        ceil((w - 1) / block_tokens) blocks before n, and groups of states block n - 1, whose end is the state after n
        blocks.
        """
        if len(present) != len(self.layouts):
            raise ConfigError(f"{len(present)} answers for {len(self.layouts)} groups: give one for each, in order")
        blocks = max((len(one) for one in present), default=0)
        fits = np.ones(blocks + 1, bool)  # [n]: every group has what n blocks need
        for layout, one in zip(self.layouts, present, strict=True):
            there = np.zeros(blocks, bool)
            there[: len(one)] = np.frombuffer(one, np.uint8) > 0
            # Presence of the blocks [i, n) is a difference of sums.
            sums = np.concatenate([[0], np.cumsum(there)])
            ends = np.arange(blocks + 1)
            starts = np.maximum(0, ends - self.reach(layout, blocks))
            fits &= sums - sums[starts] == ends - starts
        length = int(np.flatnonzero(fits[: (blocks if most is None else max(0, min(most, blocks))) + 1])[-1])
        ranges = tuple(range(max(0, length - self.reach(layout, length)), length) for layout in self.layouts)
        return Usable(
            length,
            ranges,
            tuple(one[span.start : span.stop] for one, span in zip(present, ranges, strict=True)),
        )

    def reach(self, layout: Layout, blocks: int) -> int:
        """How many blocks before its end a group needs of a prefix of so many."""
        rule = layout.rule
        if rule.span is Span.STATE:
            return min(1, blocks)
        if rule.span is Span.SLIDING:
            # The next token looks back at w - 1 tokens and itself.
            return min(blocks, -(-(rule.window - 1) // self.block_tokens))
        return blocks

    def match(self, stores: Sequence[KvStore], keys: Sequence[Sequence[bytes]], most: int | None = None) -> Usable:
        """Asks the stores of all groups (each with its own keys of the same tokens) and answers as `usable`.

        States hang in no chain: the newest ones before the end of what the other groups have are looked for, at most
        STATES_LOOKED_AT of them.
        """
        limit = min([len(one) for one in keys] + ([most] if most is not None else []))
        present = [b""] * len(stores)
        states = [g for g, layout in enumerate(self.layouts) if layout.rule.span is Span.STATE]
        for g, store in enumerate(stores):
            if g not in states:
                present[g] = store.match(keys[g][:limit]).tiers
                if self.layouts[g].rule.span is Span.FULL:
                    limit = min(limit, len(present[g]))
        for g in states:
            present[g] = _newest(stores[g], keys[g][:limit])
        return self.usable(present, limit)


def _newest(store: KvStore, keys: Sequence[bytes]) -> bytes:
    """Where the newest states of a sequence are, among the last ones."""
    found = bytearray(len(keys))
    for block in range(len(keys) - 1, max(-1, len(keys) - 1 - STATES_LOOKED_AT), -1):
        found[block] = int.from_bytes(store.match(keys[block : block + 1]).tiers)
    return bytes(found)
