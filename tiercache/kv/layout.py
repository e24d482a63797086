"""Layout: what is stored of one group of a model's layers, and in which order inside a block. Pure functions of it say
which bytes are whose, so that writers and readers of any parallelism agree without talking.

A block holds `block_tokens` tokens of all layers and heads of the group in one extent, dense, in this order:
`[layer group][head group][layer in group][head in group][K then V][token][dim]`. A part is one layer group by one head
group: contiguous, so that what a tensor-parallel rank or a pipeline stage holds is whole parts where that is possible.
Parts are `part_bytes` long but for the last; there are at most 64 (model.PARTS_MAX).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class Attention(StrEnum):
    """How a layer's keys and values come about. Tells nothing of who holds them: see shard."""

    MHA = "mha"
    GQA = "gqa"
    MQA = "mqa"
    MFA = "mfa"
    MLA = "mla"
    """One latent with the rotated part behind it, no V."""
    MFA_KR = "mfa_kr"
    """Keys that serve as values too, no V."""


class Span(StrEnum):
    """What of a sequence a layer looks back at."""

    FULL = "full"
    SLIDING = "sliding"
    STATE = "state"
    """A state that has taken in everything so far (Mamba, linear attention): only the newest is needed."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What a reader needs of a group: all blocks, those of the last `window` tokens, or the last block alone."""

    span: Span = Span.FULL
    window: int = 0


FULL = Rule()
STATE = Rule(Span.STATE)

Spans = tuple[int, list[tuple[int, int]]]
"""Whole parts as a map, and pieces of others as byte ranges [start, stop) of the block, each inside one part."""


@dataclass(frozen=True)
class Layout:
    """What is stored: see the module. Immutable, hashable, compared by value.

    `layers` and `heads` are counts; a layer or head is named by its index in the layout, and `layer_ids` are the model's
    own numbers of the layers (0..layers-1 when left out). MLA: heads 1, `k_dim` = kv_lora_rank + rope dims, latent first,
    `v_dim` 0. Rule STATE and order "opaque": a block is one row a layer and head, `k_dim` elements long (a whole state,
    a whole engine page); else it has a row a token.
    """

    model: str
    heads: int
    layers: int
    k_dim: int
    v_dim: int
    """0: there is no V."""
    dtype: str
    """As torch calls it, without "torch.": "bfloat16", "float8_e4m3fn", "uint8"."""
    attention: Attention = Attention.GQA
    block_tokens: int = 16
    revision: str = ""
    rope: str = ""
    """Canonical JSON of the rotary embedding's parameters."""
    element_order: str = ""
    """Of rotated elements: "neox" (halves), "interleaved" (pairs), or "" where nobody does it differently."""
    scales: str = ""
    lora: str = ""
    salt: str = ""
    """Tenants that may not share have different ones."""
    group: str = ""
    """Tells groups apart that have the same layers; "" otherwise."""
    rule: Rule = FULL
    order: str = "dense"
    """"dense", or "opaque": an engine's page as it is, for readers with the same `tag` only."""
    tag: str = ""
    collision_resistant: bool = False
    """Keys are SHA-256: for tenants that do not trust each other. Not in the namespace: such keys are longer."""
    layer_ids: tuple[int, ...] = ()

    @property
    def namespace(self) -> bytes:
        """Digest (16 bytes) of everything that changes bytes; equal for mha, gqa, mqa and mfa of one shape."""
        raise NotImplementedError("soon")

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        raise NotImplementedError("soon")

    @property
    def rows(self) -> int:
        """Rows of a block in one layer, head and K or V: `block_tokens`, or 1 (see the class)."""
        raise NotImplementedError("soon")

    @property
    def block_bytes(self) -> int:
        """Bytes of a stored block."""
        raise NotImplementedError("soon")

    @property
    def token_bytes(self) -> int:
        """Bytes that one token takes."""
        raise NotImplementedError("soon")

    @property
    def part_bytes(self) -> int:
        """Bytes of every part but the last, which may be shorter."""
        raise NotImplementedError("soon")

    @property
    def parts(self) -> int:
        """How many parts a block has, 1 to 64."""
        raise NotImplementedError("soon")

    @property
    def layers_per_part(self) -> int:
        """Layers of a layer group."""
        raise NotImplementedError("soon")

    @property
    def heads_per_part(self) -> int:
        """Heads of a head group."""
        raise NotImplementedError("soon")

    @property
    def all_parts(self) -> int:
        """The map with every part."""
        raise NotImplementedError("soon")

    def part_of(self, layer: int, head: int) -> int:
        """The part that holds a layer's head."""
        raise NotImplementedError("soon")

    def part_range(self, part: int) -> tuple[range, range]:
        """Layers and heads of a part."""
        raise NotImplementedError("soon")

    def part_span(self, part: int) -> tuple[int, int]:
        """Bytes [start, stop) of a part in the block."""
        raise NotImplementedError("soon")

    def parts_of(self, layers: range, heads: range) -> Spans:
        """What of a block belongs to these layers and heads: parts that do as a whole, and pieces of others."""
        raise NotImplementedError("soon")

    def parts_touched(self, layers: range, heads: range) -> int:
        """Map of the parts that hold anything of these layers and heads: what a reader of them needs."""
        raise NotImplementedError("soon")

    def span(self, layer: int, head: int, kv: int) -> tuple[int, int]:
        """(offset in the block, bytes) of [row][dim] of one layer, head, and K (0) or V (1)."""
        raise NotImplementedError("soon")

    def layer_groups(self) -> Iterator[range]:
        """Layers of each layer group, in order."""
        raise NotImplementedError("soon")

    @classmethod
    def from_hf_config(
        cls,
        config: object,
        *,
        dtype: str,
        model: str,
        revision: str = "",
        block_tokens: int = 16,
        lora: str = "",
        salt: str = "",
        collision_resistant: bool = False,
    ) -> list[Layout]:
        """One layout a group of layers, from a transformers config (a dict, or anything with `to_dict`).

        Raises ConfigError that names the missing fields where the config's model is not understood.
        """
        raise NotImplementedError("soon")
