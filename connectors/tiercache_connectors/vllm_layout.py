"""From what vLLM says of its KV cache to layouts, shards and planes. Shapes are never assumed: strides are the tensors'
own, every reading of their axes that is possible is tried, and the one that the engine's own kernel agrees with (see
kv.proof) is taken. Where none is, or the model is not understood, `Unusable` says why, and nothing is reused.

Element order: vLLM keeps the rotated part of MLA's latent interleaved, transformers does not; it is part of the layout,
so that the two never meet. Everything else is stored as transformers has it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from tiercache.errors import ConfigError
from tiercache.kv.groups import Model
from tiercache.kv.layout import Attention, Layout
from tiercache.kv.planes import Plane, Planes, paged
from tiercache.kv.proof import prove
from tiercache.kv.runs import Table
from tiercache.kv.shard import Shard
from tiercache_connectors.weights import Weights, identify

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import numpy.typing as npt

    from tiercache_connectors.vllm_options import Options

DENSE = ("FullAttentionSpec", "MLAAttentionSpec", "SlidingWindowSpec")
"""Kinds of vLLM's KV cache specs whose pages hold a row a token."""

READINGS = {
    3: ("ptd",),
    4: ("phtC", "halves", "turned", "phtd"),
    5: ("kpthd", "kphtd", "pkthd", "pkhtd"),
}
"""What the axes of a tensor may be, by their number: see planes.paged. vLLM's CPU kernels keep all K of a head's page
before all V of it: "halves"; most of them K as [dim][slot] ("turned"), whatever the tensor's shape says."""

PROOF_PAGES = 3


class Unusable(Exception):
    """Nothing can be reused; the text says why, in one line for the log."""


@dataclass(frozen=True, slots=True)
class Group:
    """Layers that share a layout and the engine's page table `pages_of` (number of its KV cache group)."""

    layout: Layout
    pages_of: int
    page_tokens: int
    names: tuple[str, ...]
    """The engine's names of these layers, in the layout's order, as far as this process knows them."""


@dataclass(frozen=True, slots=True)
class Groups:
    """All layers of a model whose KV the engine keeps."""

    groups: tuple[Group, ...]
    model: Model
    engine_groups: int

    @property
    def layouts(self) -> list[Layout]:
        """One a group."""
        return [each.layout for each in self.groups]


def read_groups(vllm_config: Any, kv_cache_config: Any, options: Options) -> Groups:
    """Groups of the engine's model. Raises Unusable."""
    if kv_cache_config is None:
        raise Unusable("this vLLM does not tell connectors its KV cache's configuration: use 0.28 or newer")
    parallel = vllm_config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise Unusable(f"{name} > 1 spreads one request's tokens over ranks, which is not supported")
    specs = [each.kv_cache_spec for each in kv_cache_config.kv_cache_groups]
    for spec in specs:
        if type(spec).__name__ not in DENSE:
            raise Unusable(f"KV of kind {type(spec).__name__} has no block of tokens that could be reused")
    layouts = _layouts(vllm_config, specs[0], options)
    found, seen = [], set[int]()
    for number, group in enumerate(kv_cache_config.kv_cache_groups):
        names = {layer_number(name): name for name in group.layer_names}
        left = set(names)
        if len(names) < len(group.layer_names) or not seen.isdisjoint(names):
            raise Unusable("two layers have the same number: the cache of a draft model beside the model's own?")
        seen |= left
        for layout in layouts:
            ours = [i for i in layout.layer_ids if i in left]
            left -= set(ours)
            if ours:
                found.append(_group(layout, ours, number, group, names, parallel))
        if left:
            raise Unusable(
                f"layer {names[min(left)]} has KV of its own that the model's configuration does not mention"
            )
    _check_split(found, len(specs), parallel)
    return Groups(tuple(found), Model([each.layout for each in found]), len(specs))


def _group(layout: Layout, ours: list[int], number: int, group: Any, names: dict[int, str], parallel: Any) -> Group:
    spec, ranks = group.kv_cache_spec, parallel.tensor_parallel_size
    if len(ours) < layout.layers and parallel.pipeline_parallel_size == 1:
        # vLLM has cut one kind of layers into groups with a page table each: a stored block must not span them.
        layout = replace(layout, layers=len(ours), layer_ids=tuple(ours))
    v_dim = 0 if layout.attention is Attention.MLA else getattr(spec, "head_size_v", spec.head_size)
    found = (spec.num_kv_heads, spec.head_size, v_dim)
    expected = (max(1, layout.heads // ranks), layout.k_dim, layout.v_dim)
    if found != expected:
        raise Unusable(
            f"layer {group.layer_names[0]} has (heads, K, V) {found} in the engine, and {expected} by the model's "
            "configuration"
        )
    return Group(layout, number, spec.block_size, tuple(names[i] for i in ours))


def _check_split(found: Sequence[Group], engine_groups: int, parallel: Any) -> None:
    if engine_groups > 1 and parallel.pipeline_parallel_size > 1:
        raise Unusable("a model with several KV cache groups over pipeline stages is not supported")
    if engine_groups > 1 and not _tells_failed_requests():
        raise Unusable("this vLLM cannot be told of failed loads of models with several KV cache groups")
    if not found:
        raise Unusable("the engine keeps no KV")


def _tells_failed_requests() -> bool:
    from vllm.v1.outputs import KVConnectorOutput

    return hasattr(KVConnectorOutput(), "failed_recving")


def layer_number(name: str) -> int:
    """The model's own number of a layer, from vLLM's name of it. Raises Unusable."""
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", name)
    if len(numbers) != 1:
        raise Unusable(f"the name of layer {name} does not say which layer of the model it is")
    return int(numbers[0])


def _layouts(vllm_config: Any, spec: Any, options: Options) -> list[Layout]:
    """Layouts of the whole model, the same in every process of every engine that runs it."""
    config, dtype = vllm_config.model_config, _dtype(vllm_config, spec)
    try:
        weights = weights_of(vllm_config, options)
    except ConfigError as error:
        raise Unusable(str(error)) from error
    latent = type(spec).__name__ == "MLAAttentionSpec"
    common: dict[str, Any] = {
        "model": weights.model,
        "revision": weights.revision,
        "dtype": dtype,
        "block_tokens": options.block_tokens,
        "element_order": "interleaved" if latent else "neox",
        "collision_resistant": options.collision_resistant,
    }
    try:
        layouts = Layout.from_hf_config(config.hf_config, **common)
    except ConfigError as error:
        if type(spec).__name__ != "FullAttentionSpec":
            raise Unusable(str(error)) from error
        layouts = [_by_hand(config, spec, common)]
    layouts = [replace(each, rope=each.rope + long_rope(config, each.rope)) for each in layouts]
    return [replace(each, scales="1") for each in layouts] if dtype.startswith("float8") else layouts


def long_rope(config: Any, rope: str) -> str:
    """Which factors of a "longrope" vLLM takes for all requests, short ones too: that goes by its longest request."""
    if '"longrope"' not in rope:
        return ""
    facts = config.hf_config.get_text_config()
    given = getattr(facts, "rope_parameters", None) or getattr(facts, "rope_scaling", None) or {}
    first = given.get("original_max_position_embeddings") or getattr(facts, "original_max_position_embeddings", None)
    if not first:
        return f" up to {config.max_model_len}"
    return " long" if config.max_model_len > first else " short"


def _told(config: Any) -> str:
    """All that a model's configuration says and that may change KV, as text."""
    fields = {name: value for name, value in config.hf_config.to_dict().items() if not name.startswith("_")}
    for name in ("transformers_version", "dtype", "torch_dtype"):
        fields.pop(name, None)
    return json.dumps(fields, sort_keys=True, default=str)


def _by_hand(config: Any, spec: Any, common: dict[str, Any]) -> Layout:
    """A model that is not known by name, but whose layers are all alike: vLLM has the numbers, and all else that its
    configuration says goes into the keys."""
    layers = config.get_total_num_hidden_layers()
    return Layout(
        heads=config.get_total_num_kv_heads(),
        layers=layers,
        k_dim=spec.head_size,
        v_dim=getattr(spec, "head_size_v", spec.head_size),
        rope=_told(config),
        layer_ids=tuple(range(layers)),
        **common,
    )


def weights_of(vllm_config: Any, options: Options) -> Weights:
    """What was loaded, and what the engine was told to make of it. Raises ConfigError, see identify."""
    config = vllm_config.model_config
    weights = (
        Weights(options.model, options.revision) if options.model else identify(config.model, config.revision or "")
    )
    marks = []
    if getattr(config, "quantization", None) and getattr(config.hf_config, "quantization_config", None) is None:
        marks.append(str(config.quantization))
    if getattr(config, "hf_overrides", None):  # of anything: numbers of experts, windows, epsilons
        marks.append(xxhash.xxh3_128_hexdigest(_told(config).encode()))
    if getattr(getattr(vllm_config, "load_config", None), "load_format", "") == "dummy":
        marks.append("dummy")
    return weights._replace(revision="+".join([weights.revision, *marks])) if marks else weights


def _dtype(vllm_config: Any, spec: Any) -> str:
    stored = str(vllm_config.cache_config.cache_dtype)
    plain = str(spec.dtype).removeprefix("torch.")
    if stored == "auto" or stored == plain:
        return plain
    if stored in ("fp8", "fp8_e4m3"):
        return "float8_e4m3fn"
    if stored == "fp8_e5m2":
        return "float8_e5m2"
    raise Unusable(f"a KV cache of {stored} is packed in a way that is not understood")


# -- a worker's memory


def shard_of(group: Group, vllm_config: Any, tp_rank: int, names: Sequence[str]) -> Shard:
    """What this worker holds of a group: the layers with these names. Raises Unusable."""
    numbers = [group.layout.layer_ids.index(layer_number(name)) for name in names]
    layers = range(numbers[0], numbers[0] + len(numbers))
    if list(layers) != numbers:
        raise Unusable(f"the layers of this worker ({numbers}) are not one after the other in the model")
    try:
        return Shard.of(group.layout, tp_rank, vllm_config.parallel_config.tensor_parallel_size, layers=layers)
    except ConfigError as error:
        raise Unusable(str(error)) from error


def proven_planes(group: Group, shard: Shard, tensors: Mapping[str, Any], modules: Mapping[str, Any]) -> Planes:
    """Planes over a group's tensors (layer name -> tensor, in the layout's order) that the engine's own kernel agrees
    with. Raises Unusable. The memory must not be in use yet: some pages of it are stamped, and zero in the end."""
    first = next(iter(tensors.values()))
    if first.device.type != "cpu":
        raise Unusable(f"KV in memory of a {first.device.type} device cannot be reached by this process")
    reasons = []
    for axes in READINGS.get(first.dim(), ()):
        try:
            planes = Planes(group.layout, shard, list(_read_as(axes, group.layout, shard, tensors)))
        except (ConfigError, RuntimeError) as error:
            reasons.append(f"{axes}: {error}")
            continue
        stamp = Stamp(group.layout, shard, tensors, modules, planes.page_tokens)
        proof = prove(planes, stamp.table, stamp.write)
        if proof:
            return planes
        reasons.append(f"{axes}: {proof.reason}")
    shape = f"{tuple(first.shape)} with strides {tuple(first.stride())}"
    raise Unusable(f"the layout of KV tensors of shape {shape} is not proven ({'; '.join(reasons) or 'no reading'})")


def _read_as(axes: str, layout: Layout, shard: Shard, tensors: Mapping[str, Any]) -> Iterator[Plane]:
    """Planes of one reading. Raises ConfigError, and what torch raises for views that there are not."""
    if (axes in ("phtd", "ptd")) != (layout.v_dim == 0):
        raise ConfigError("K and V are one where there is no V, and only there")
    for number, tensor in zip(shard.layers, tensors.values()):
        where: dict[str, Any] = {"layers": range(number, number + 1), "heads": shard.heads}
        if axes in ("halves", "turned"):
            pages, heads, slots, dims = tensor.shape
            k, v = tensor.view(pages, heads, 2, slots * (dims // 2)).unbind(2)
            turned = axes == "turned"
            shape = (dims // 2, slots) if turned else (slots, dims // 2)
            yield from paged(k.unflatten(-1, shape), "phdt" if turned else "phtd", kv=0, **where)
            yield from paged(v.unflatten(-1, (slots, dims // 2)), "phtd", kv=1, **where)
        elif axes == "phtC":
            yield from paged(tensor, axes, k_dim=layout.k_dim, **where)
        else:
            yield from paged(tensor, axes, **where)


class Stamp:
    """Writes K and V through the engine's own kernel, as a forward pass would; see proof.Write."""

    def __init__(
        self, layout: Layout, shard: Shard, tensors: Mapping[str, Any], modules: Mapping[str, Any], page_tokens: int
    ) -> None:
        self._layout, self._shard, self._tensors, self._modules = layout, shard, list(tensors.items()), modules
        self._values: dict[tuple[int, int], Any] = {}
        self.table = _proof_table(layout.block_tokens, page_tokens)
        self._slots = _slots(self.table)

    def write(self, layer: int, kv: int, values: npt.NDArray[np.uint8]) -> None:
        """See proof.Write. K and V are written together: what is not known of the other half yet is zero."""
        import torch

        name, tensor = self._tensors[layer - self._shard.layers.start]
        module, dtype = self._modules[name], getattr(torch, self._layout.dtype)
        stored = torch.from_numpy(np.ascontiguousarray(values)).view(dtype)
        slots = torch.from_numpy(self._slots[: len(stored)])
        if self._layout.v_dim == 0:
            rank = module.impl.kv_lora_rank
            latent, rotated = stored[:, 0, :rank].contiguous(), stored[:, :, rank:].contiguous()
            module.impl.do_kv_cache_update(latent, rotated, tensor, slots, "auto", torch.tensor(1.0))
            return
        # Kernels are given what the model computes and may store it in fewer bits: these values survive that.
        computed = torch.bfloat16 if self._layout.scales else dtype
        self._values[layer, kv] = stored.to(computed)
        dims = (self._layout.k_dim, self._layout.v_dim)
        empty = [torch.zeros(*stored.shape[:2], dim, dtype=computed) for dim in dims]
        k, v = (self._values.get((layer, i), empty[i]) for i in (0, 1))
        if self._layout.scales and {module._k_scale_float, module._v_scale_float} != {1.0}:
            raise ConfigError(f"{name} stores its KV with scales of its own")
        module.impl.do_kv_cache_update(module, k, v, tensor, slots)


def _proof_table(block_tokens: int, page_tokens: int) -> Table:
    """Some pages, out of order, that hold whole blocks. Page 0 is the engine's page for nothing."""
    pages = max(PROOF_PAGES, -(-2 * block_tokens // page_tokens))
    order = [*range(2, pages + 1), 1]
    rows = len(order) * page_tokens // block_tokens * block_tokens
    return Table(np.array(order[: -(-rows // page_tokens)], dtype=np.int64), page_tokens)


def _slots(table: Table) -> npt.NDArray[np.int64]:
    """The engine's slot numbers of a table's rows."""
    within = np.arange(table.page_tokens, dtype=np.int64)
    return (table.page_ids[:, None] * table.page_tokens + within).reshape(-1)


def pages_as_planes(planes: Planes, group: Group) -> Callable[[Sequence[int]], npt.NDArray[np.int64]]:
    """The pages of the engine's page table as the planes have them: kernels may split a page into several."""
    split = group.page_tokens // planes.page_tokens
    if split * planes.page_tokens != group.page_tokens:
        raise Unusable(f"pages of {group.page_tokens} tokens do not consist of {planes.page_tokens} tokens each")
    within = np.arange(split, dtype=np.int64)

    def expanded(pages: Sequence[int]) -> npt.NDArray[np.int64]:
        ids = np.asarray(pages, dtype=np.int64)
        return ids if split == 1 else (ids[:, None] * split + within).reshape(-1)

    return expanded
