"""Model: the groups of layers of one model (full attention, sliding windows, states), matched as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tiercache.kv.layout import Layout
    from tiercache.kv.store import Matched


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
    """Groups of one model with the same `block_tokens`. Pure: it asks nobody; see `usable`."""

    def __init__(self, layouts: Sequence[Layout]) -> None:
        """Raises ConfigError where the layouts differ in block_tokens, or there is none."""
        self.layouts = tuple(layouts)

    def usable(self, present: Sequence[bytes], most: int | None = None) -> Usable:
        """The longest usable prefix, at most `most` blocks.

        `present[g][i]` says where block i of group g is: 0 nowhere, else as Matched.tiers. Usable are the largest n
        blocks such that groups of full attention have blocks [0, n), groups with a sliding window w the last
        ceil((w - 1) / block_tokens) blocks before n, and groups of states block n - 1, whose end is the state after n
        blocks.
        """
        ...

    def matched(self, found: Sequence[Matched], most: int | None = None) -> Usable:
        """As `usable`, from the match of every group."""
        ...
