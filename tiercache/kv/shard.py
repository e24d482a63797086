"""Shard: which layers and heads of a layout one worker of an engine holds, and which of them it writes.

Never in a key. Workers that hold the same heads (more tensor-parallel ranks than KV heads: MFA, MQA and MLA always) are
replicas: all of them digest what they hold, each copies only its share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tiercache.errors import ConfigError

if TYPE_CHECKING:
    from tiercache.kv.layout import Layout, Spans


@dataclass(frozen=True, slots=True)
class Shard:
    """`layers` and `heads` are indexes within the layout; this is number `replica` of `replicas` that hold them."""

    layers: range
    heads: range
    replica: int = 0
    replicas: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.replica < self.replicas:
            raise ConfigError(f"replica {self.replica} of {self.replicas}: count them from 0")

    @classmethod
    def whole(cls, layout: Layout) -> Shard:
        """Everything in one worker."""
        return cls(range(layout.layers), range(layout.heads))

    @classmethod
    def of(
        cls, layout: Layout, tp_rank: int, tp: int, pp_rank: int = 0, pp: int = 1, *, layers: range | None = None
    ) -> Shard:
        """What rank `tp_rank` of `tp` holds in stage `pp_rank` of `pp`; `layers` where the engine split them itself.

        Replication is max(1, tp / heads); heads and tp must divide each other. Layers are split as vLLM does: what is
        left over goes to the stages before the last. Raises ConfigError.
        """
        if not (0 <= tp_rank < tp and 0 <= pp_rank < pp):
            raise ConfigError(f"rank {tp_rank} of {tp} in stage {pp_rank} of {pp}: count both from 0")
        heads = layout.heads
        if heads % tp and tp % heads:
            raise ConfigError(f"{heads} KV heads over {tp} ranks: one number must divide the other")
        replicas = max(1, tp // heads)
        mine = max(1, heads // tp)
        first = tp_rank // replicas * mine
        stage = _stage(layout.layers, pp_rank, pp) if layers is None else layers
        return cls(stage, range(first, first + mine), tp_rank % replicas, replicas)

    def held(self, layout: Layout) -> Spans:
        """All that this worker has of a block."""
        return layout.parts_of(self.layers, self.heads)

    def needed(self, layout: Layout) -> int:
        """Map of the parts that this worker reads."""
        return layout.parts_touched(self.layers, self.heads)

    def share(self, layout: Layout) -> Spans:
        """What this worker writes: disjoint between replicas, together all that is held."""
        parts, pieces = self.held(layout)
        if self.replicas == 1:
            return parts, pieces
        whole = [part for part in range(layout.parts) if parts >> part & 1]
        mine = sum(1 << part for part in whole[self.replica :: self.replicas])
        # Pieces go on with whoever comes after the last part's writer.
        return mine, pieces[(self.replica - len(whole)) % self.replicas :: self.replicas]


def _stage(layers: int, rank: int, stages: int) -> range:
    """Layers of one stage: equal shares, and one more for as many stages before the last as layers are left over."""
    share, over = divmod(layers, stages)
    sizes = [share + (stages - 1 - over <= stage < stages - 1) for stage in range(stages)]
    first = sum(sizes[:rank])
    return range(first, first + sizes[rank])
