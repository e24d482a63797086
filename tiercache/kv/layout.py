"""Layout: what is stored of one group of a model's layers, and in which order inside a block. Pure functions of it say
which bytes are whose, so that writers and readers of any parallelism agree without talking.

A block holds `block_tokens` tokens of all layers and heads of the group in one extent, dense, in this order:
`[layer group][head group][layer in group][head in group][K then V][token][dim]`. A part is one layer group by one head
group: contiguous, so that what a tensor-parallel rank or a pipeline stage holds is whole parts where that is possible.
Parts are `part_bytes` long but for the last; there are at most 64 (model.PARTS_MAX).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from tiercache import keys
from tiercache.errors import ConfigError
from tiercache.model import PART_BYTES, PARTS_MAX

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ITEMSIZES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
}
"""Bytes of an element, by the names of torch. What packs elements closer than bytes is stored as uint8, with a tag."""


BLOCK_BYTES_MAX = 1 << 30
"""An entry's size is 32 bits in the index and on SSD; this is well below, and far above any real block."""


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

    def __post_init__(self) -> None:
        if (self.span is Span.SLIDING) != (self.window > 0):
            raise ConfigError(f"rule {self.span} with window {self.window}: a sliding window, and no other, has tokens")


FULL = Rule()
STATE = Rule(Span.STATE)

Spans = tuple[int, list[tuple[int, int]]]
"""Whole parts as a map, and pieces of others as byte ranges [start, stop) of the block, each inside one part."""


@dataclass(frozen=True)
class Layout:
    """What is stored: see the module. Immutable, hashable, compared by value.

    `layers` and `heads` are counts; a layer or head is named by its index in the layout, and `layer_ids` are the
    model's own numbers of the layers (0..layers-1 when left out). MLA: heads 1, `k_dim` = kv_lora_rank + rope dims,
    latent first, `v_dim` 0. Rule STATE and order "opaque": a block is one row a layer and head, `k_dim` elements long
    (a whole state, a whole engine page); else it has a row a token.
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

    def __post_init__(self) -> None:
        if not self.layer_ids:
            object.__setattr__(self, "layer_ids", tuple(range(self.layers)))
        _check(self)

    # -- what it is

    @cached_property
    def namespace(self) -> bytes:
        """Digest (16 bytes) of everything that changes bytes; equal for mha, gqa, mqa and mfa of one shape."""
        family = self.attention.value if self.attention in (Attention.MLA, Attention.MFA_KR) else "kv"
        numbers = (self.heads, self.layers, self.k_dim, self.v_dim, self.block_tokens, self.rule.window)
        words = (self.model, self.revision, self.dtype, family, self.rope, self.element_order, self.scales, self.lora)
        more = (self.salt, self.group, self.rule.span.value, self.order, self.tag)
        texts = [*words, *more, ",".join(map(str, numbers)), ",".join(map(str, self.layer_ids))]
        return keys.namespace("kv", *texts)

    @cached_property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return ITEMSIZES[self.dtype]

    @cached_property
    def one_row(self) -> bool:
        """Whether a block is a state or an engine's page as a whole, and not a row a token."""
        return self.rule.span is Span.STATE or self.order == "opaque"

    @cached_property
    def rows(self) -> int:
        """Rows of a block in one layer, head and K or V: `block_tokens`, or 1 (see the class)."""
        return 1 if self.one_row else self.block_tokens

    @cached_property
    def unit_bytes(self) -> int:
        """Bytes of one layer's head in a block, K and V: the smallest thing that ranks divide blocks by."""
        return self.rows * (self.k_dim + self.v_dim) * self.itemsize

    @cached_property
    def block_bytes(self) -> int:
        """Bytes of a stored block."""
        return self.layers * self.heads * self.unit_bytes

    @cached_property
    def token_bytes(self) -> int:
        """Bytes that one token takes, rounded up where a block is one row."""
        return -(-self.block_bytes // self.block_tokens)

    # -- parts

    @cached_property
    def heads_per_part(self) -> int:
        """Heads of a head group: one, unless there would be more than 64 groups."""
        return next(g for g in range(1, self.heads + 1) if self.heads % g == 0 and self.heads // g <= PARTS_MAX)

    @cached_property
    def layers_per_part(self) -> int:
        """Layers of a layer group: the fewest that make a part of 64 KiB or more and no more than 64 parts.

        With several head groups it divides `layers`, for only a block's last part may be shorter. A pipeline of two
        stages cuts between parts where that costs at most parts twice as large.
        """
        groups = self.heads // self.heads_per_part
        fine = [k for k in range(1, self.layers + 1) if (groups == 1 or self.layers % k == 0)]
        fine = [k for k in fine if -(-self.layers // k) * groups <= PARTS_MAX] or [self.layers]
        unit = self.heads_per_part * self.unit_bytes
        least = next((k for k in fine if k * unit >= PART_BYTES), self.layers)
        if least == self.layers:
            return least
        return next((k for k in fine if least <= k <= 2 * least and self.layers % (2 * k) == 0), least)

    @cached_property
    def part_bytes(self) -> int:
        """Bytes of every part but the last, which may be shorter."""
        return self.layers_per_part * self.heads_per_part * self.unit_bytes

    @cached_property
    def parts(self) -> int:
        """How many parts a block has, 1 to 64."""
        return -(-self.layers // self.layers_per_part) * (self.heads // self.heads_per_part)

    @cached_property
    def all_parts(self) -> int:
        """The map with every part."""
        return (1 << self.parts) - 1

    def layer_groups(self) -> Iterator[range]:
        """Layers of each layer group, in order."""
        for first in range(0, self.layers, self.layers_per_part):
            yield range(first, min(self.layers, first + self.layers_per_part))

    def part_of(self, layer: int, head: int) -> int:
        """The part that holds a layer's head."""
        groups = self.heads // self.heads_per_part
        return layer // self.layers_per_part * groups + head // self.heads_per_part

    def part_range(self, part: int) -> tuple[range, range]:
        """Layers and heads of a part."""
        group, heads = divmod(part, self.heads // self.heads_per_part)
        k, g = self.layers_per_part, self.heads_per_part
        return range(group * k, min(self.layers, (group + 1) * k)), range(heads * g, (heads + 1) * g)

    def part_span(self, part: int) -> tuple[int, int]:
        """Bytes [start, stop) of a part in the block."""
        start = part * self.part_bytes
        return start, min(self.block_bytes, start + self.part_bytes)

    def parts_touched(self, layers: range, heads: range) -> int:
        """Map of the parts that hold anything of these layers and heads: what a reader of them needs."""
        return sum(1 << part for part, _, _ in self._crossed(layers, heads))

    def parts_of(self, layers: range, heads: range) -> Spans:
        """What of a block belongs to these layers and heads: parts that do as a whole, and pieces of others."""
        whole, pieces = 0, []
        for part, some_layers, some_heads in self._crossed(layers, heads):
            all_layers, all_heads = self.part_range(part)
            if some_layers == all_layers and some_heads == all_heads:
                whole |= 1 << part
            elif some_heads == all_heads:  # neighbours in the part
                start = self.span(some_layers[0], some_heads[0], 0)[0]
                pieces.append((start, start + len(some_layers) * len(some_heads) * self.unit_bytes))
            else:
                for layer in some_layers:
                    start = self.span(layer, some_heads[0], 0)[0]
                    pieces.append((start, start + len(some_heads) * self.unit_bytes))
        return whole, pieces

    def _crossed(self, layers: range, heads: range) -> Iterator[tuple[int, range, range]]:
        """Parts that these layers and heads touch, in order, and which of their layers and heads are touched."""
        _check_range("layers", layers, self.layers)
        _check_range("heads", heads, self.heads)
        for part in range(self.parts) if layers and heads else ():
            some_layers, some_heads = map(_common, self.part_range(part), (layers, heads))
            if some_layers and some_heads:
                yield part, some_layers, some_heads

    def span(self, layer: int, head: int, kv: int) -> tuple[int, int]:
        """(offset in the block, bytes) of [row][dim] of one layer, head, and K (0) or V (1)."""
        part = self.part_of(layer, head)
        layers, heads = self.part_range(part)
        unit = (layer - layers.start) * len(heads) + head - heads.start
        k_bytes, v_bytes = (self.rows * dim * self.itemsize for dim in (self.k_dim, self.v_dim))
        start = part * self.part_bytes + unit * self.unit_bytes
        return (start + k_bytes, v_bytes) if kv else (start, k_bytes)

    # -- where it comes from

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
        element_order: str = "",
        collision_resistant: bool = False,
    ) -> list[Layout]:
        """One layout a group of layers, from a transformers config (a dict, or anything with `to_dict`).

        `element_order` is how the engine stores rotated dims: transformers "neox"; MLA needs it, for vLLM stores it
        "interleaved". Raises ConfigError that names the missing fields where the config's model is not understood.
        """
        from tiercache.kv.configs import groups_of

        groups = groups_of(config, dtype)
        if not element_order and any(group["attention"] is Attention.MLA for group in groups):
            raise ConfigError("engines order MLA's rotated dims differently: set element_order='neox' or 'interleaved'")
        common: dict[str, Any] = {"model": model, "revision": revision, "block_tokens": block_tokens}
        common |= {"lora": lora, "salt": salt, "element_order": element_order}
        common["collision_resistant"] = collision_resistant
        return [cls(**common, **group) for group in groups]


def canonical_json(values: object) -> str:
    """The one JSON text of these values: keys sorted, no spaces; whole floats as ints, so that 10000.0 is 10000."""
    return json.dumps(_plain(values), sort_keys=True, separators=(",", ":"), allow_nan=False)


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _common(one: range, other: range) -> range:
    return range(max(one.start, other.start), max(one.start, other.start, min(one.stop, other.stop)))


def _check_range(what: str, span: range, count: int) -> None:
    if span.step != 1 or (span and not (0 <= span.start and span.stop <= count)):
        raise ConfigError(f"{what} {span} of a layout with {count} of them: pass a range with step 1 inside 0..{count}")


def _check(layout: Layout) -> None:
    """Raises ConfigError for what no block can be made of."""
    if not layout.model:
        raise ConfigError("a layout needs the model's name: without it, blocks of other models would pass for its own")
    if layout.dtype not in ITEMSIZES:
        raise ConfigError(f"dtype {layout.dtype!r} is unknown: use one of {', '.join(ITEMSIZES)} (packed: uint8)")
    counts = ("heads", "layers", "k_dim", "block_tokens")
    if wrong := [f"{name} {getattr(layout, name)!r}" for name in counts if not _is_count(getattr(layout, name), 1)]:
        raise ConfigError(f"a layout of {', '.join(wrong)}: these are whole numbers from 1")
    if not _is_count(layout.v_dim, 0):
        raise ConfigError(f"v_dim {layout.v_dim!r}: a whole number, 0 where there is no V")
    if layout.attention in (Attention.MLA, Attention.MFA_KR) and layout.v_dim:
        raise ConfigError(f"{layout.attention} has no V: v_dim 0, and all that is stored in k_dim")
    if layout.attention is Attention.MLA and layout.heads != 1:
        raise ConfigError("MLA stores one latent for all heads: heads 1, k_dim = kv_lora_rank + qk_rope_head_dim")
    if layout.order not in ("dense", "opaque") or (layout.order == "opaque") > bool(layout.tag):
        raise ConfigError("order is 'dense', or 'opaque' with a tag of what wrote it: engine, version, page format")
    _check_layer_ids(layout.layer_ids, layout.layers)
    if layout.block_bytes > BLOCK_BYTES_MAX:
        raise ConfigError(
            f"a block of {layout.block_bytes} bytes: use fewer block_tokens, for {BLOCK_BYTES_MAX} at most"
        )


def _check_layer_ids(ids: Sequence[int], layers: int) -> None:
    if len(ids) != layers or any(a >= b for a, b in pairwise(ids)) or ids[0] < 0:
        raise ConfigError(f"layer_ids {ids}: the model's numbers of the {layers} layers, ascending")


def _is_count(value: object, least: int) -> bool:
    return type(value) is int and value >= least
