"""Shard: which layers and heads of a layout one worker of an engine holds, and which of them it writes.

Never in a key. Workers that hold the same heads (more tensor-parallel ranks than KV heads: MFA, MQA and MLA always) are
replicas: all of them digest what they hold, each copies only its share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tiercache.kv.layout import Layout, Spans


@dataclass(frozen=True, slots=True)
class Shard:
    """`layers` and `heads` are indexes within the layout; this is number `replica` of `replicas` that hold them."""

    layers: range
    heads: range
    replica: int = 0
    replicas: int = 1

    @classmethod
    def whole(cls, layout: Layout) -> Shard:
        """Everything in one worker."""
        raise NotImplementedError("soon")

    @classmethod
    def of(
        cls, layout: Layout, tp_rank: int, tp: int, pp_rank: int = 0, pp: int = 1, *, layers: range | None = None
    ) -> Shard:
        """What rank `tp_rank` of `tp` holds in stage `pp_rank` of `pp`; `layers` where the engine split them its own way.

        Replication is max(1, tp / heads); heads and tp must divide each other. Layers are split as vLLM does: what is
        left over goes to the stages before the last. Raises ConfigError.
        """
        raise NotImplementedError("soon")

    def held(self, layout: Layout) -> Spans:
        """All that this worker has of a block."""
        raise NotImplementedError("soon")

    def needed(self, layout: Layout) -> int:
        """Map of the parts that this worker reads."""
        raise NotImplementedError("soon")

    def share(self, layout: Layout) -> Spans:
        """What this worker writes: disjoint between replicas, together all that is held."""
        raise NotImplementedError("soon")
