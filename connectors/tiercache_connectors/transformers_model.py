"""What a transformers model is to the cache: its identity, the shape of its KV, and why some models are not reused.

Keys must tell any two models apart whose KV could differ. A name says too little, also one from a hub: directories are
rewritten, and weights change in memory. So the identity is a digest of all weights and of the configuration, unless the
caller names the model himself (to share blocks with another engine, say).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

import xxhash

from tiercache.errors import ConfigError
from tiercache.kv.layout import FULL, Attention, Layout, Rule, Span

if TYPE_CHECKING:
    from collections.abc import Iterator

_VOLATILE = {
    "_attn_implementation",
    "_commit_hash",
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
"""Fields of a configuration that change no KV, or are said elsewhere (dtype)."""

_UNSTEADY_ROPE = ("dynamic", "longrope")
"""These rotate the keys of a prefix by the length of the whole sequence: a prefix has no KV of its own."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Which weights made the KV: fields of a Layout."""

    model: str
    revision: str = ""
    lora: str = ""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One layer of the cache as the model made it. `window`: tokens that a sliding layer looks at, 0 for all."""

    heads: int
    k_dim: int
    v_dim: int
    dtype: str
    window: int
    device: str = field(default="cpu", compare=False)


class Fingerprint:
    """Identity of a model, found again when its adapters, or weights by PyTorch's own count of changes, are others.

    A digest reads every weight once (xxh3-128; some GB a second), so it is kept. PyTorch does not count what is changed
    through `.data`: call `forget` after that.
    """

    def __init__(self, model: Any, name: str = "", revision: str = "") -> None:
        """`name` and `revision`: what the caller says the weights are; without a name they are digested."""
        self._model, self._name, self._revision = model, name, revision
        self._state: tuple[object, ...] | None = None
        self._identity = Identity(name, revision)

    def forget(self) -> None:
        """Weights were changed behind PyTorch's back: they are digested anew."""
        self._state = None

    def identity(self) -> Identity:
        """Who the model is now. Raises ConfigError for weights that are not in memory."""
        adapters = _adapters(self._model)
        state = (adapters, _changes(self._model))
        if state != self._state:
            name = self._name or f"{type(plain(self._model)).__name__}:{_digest(self._model, adapter=False)}"
            lora = f"{adapters}:{_digest(self._model, adapter=True)}" if adapters else ""
            self._identity = Identity(name, self._revision, lora)
            self._state = state
        return self._identity


def needs() -> None:
    """Raises ConfigError where what all of this is about is not installed."""
    try:
        import torch  # noqa: F401  # only whether it is there
        import transformers  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"{error.name or 'PyTorch or transformers'} is not installed ({error}): pip install "
            "'tiercache[transformers]'"
        ) from error


def randomness(model: Any) -> str:
    """Why one pass of this model over the same tokens may give other KV than the next, or nothing.

    PEFT's wrapper and layers are in train() mode when they are new, which means nothing where they drop nothing."""
    from torch.nn.modules.dropout import _DropoutNd

    drops = any(each.training and each.p > 0 for each in model.modules() if isinstance(each, _DropoutNd))
    if drops or plain(model).training:
        return "it is in train() mode, where KV may be random: call model.eval() first"
    return ""


def plain(model: Any) -> Any:
    """The model under PEFT's wrapper, or itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _adapters(model: Any) -> str:
    """What PEFT adapters do to the model now, as text: names, scalings, merged or not. Empty: nothing."""
    states = set()
    for module in model.modules():
        if not isinstance(getattr(type(module), "disable_adapters", None), property):  # PEFT's layers have that
            continue
        merged = sorted(module.merged_adapters)
        active = [] if module.disable_adapters else sorted(module.active_adapters)
        if active or merged:
            scaling = sorted((getattr(module, "scaling", None) or {}).items())
            states.add(json.dumps([active, merged, scaling], default=str))
    return "+".join(sorted(states))


def _weights(model: Any) -> Iterator[tuple[str, Any]]:
    """All weights by name; PEFT's own names are taken off those of the model."""
    saved = model.state_dict(keep_vars=True)
    for name in sorted(saved):
        yield name.removeprefix("base_model.model.").replace(".base_layer.", "."), saved[name]


def _is_adapter(name: str) -> bool:
    return any(part.startswith(("lora_", "ia3_", "vera_", "prompt_encoder", "adapter")) for part in name.split("."))


def _changes(model: Any) -> tuple[int, int, int]:
    """Changes as PyTorch counts them: versions, places and number of all weights."""
    tensors = list(chain(model.parameters(), model.buffers()))
    # `_version` moves with every change in place; a weight that was replaced lies elsewhere.
    return sum(each._version for each in tensors), sum(each.data_ptr() for each in tensors), len(tensors)


def _digest(model: Any, *, adapter: bool) -> str:
    """xxh3-128, in hex, of the configuration and of name, shape, dtype and bytes of every weight of the model or of its
    adapters."""
    import torch

    config = {name: value for name, value in plain(model).config.to_dict().items() if name not in _VOLATILE}
    hashed = xxhash.xxh3_128(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in _weights(model):
        if _is_adapter(name) is not adapter or not isinstance(weight, torch.Tensor):
            continue
        if weight.device.type == "meta":
            raise ConfigError(f"the weight {name} is not in memory, so it cannot be digested: pass name= and revision=")
        hashed.update(f"\n{name} {tuple(weight.shape)} {weight.dtype}\n".encode())
        data = weight.detach().reshape(-1).to("cpu").contiguous().view(torch.uint8).numpy()
        if data.size:
            hashed.update(memoryview(data))
    digest: str = hashed.hexdigest()
    return digest


def shapes(model: Any) -> list[LayerShape] | str:
    """Shape of each layer of the cache, found out by running one token; or why this model's KV cannot be reused."""
    import torch
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    config = model.config.get_text_config(decoder=True)
    if getattr(model.config, "is_encoder_decoder", False):
        return "it has an encoder"
    if any(getattr(each, "is_prompt_learning", False) for each in (getattr(model, "peft_config", None) or {}).values()):
        return "an adapter adds tokens of its own"
    rope = json.dumps([getattr(config, "rope_parameters", None), getattr(config, "rope_scaling", None)], default=str)
    if any(f'"{kind}"' in rope for kind in _UNSTEADY_ROPE):
        return "its rotary embedding depends on the length of the whole sequence"
    past = DynamicCache(config=config)
    with torch.no_grad():
        ids = torch.zeros((1, 1), dtype=torch.long, device=model.device)
        past = getattr(model(input_ids=ids, past_key_values=past, use_cache=True), "past_key_values", None)
    if past is None:
        return "it keeps states instead of keys and values"
    found = []
    for layer in past.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            return f"{type(layer).__name__} keeps more than keys and values"
        if layer.get_seq_length() != 1:
            return "some of its layers have no KV of their own"
        keys, values = layer.keys, layer.values
        if keys.shape[:3] != values.shape[:3]:
            return "its keys and values differ in heads"
        dtype = str(keys.dtype).removeprefix("torch.")
        window = layer.sliding_window if layer.is_sliding else 0
        found.append(LayerShape(keys.shape[1], keys.shape[3], values.shape[3], dtype, window, str(keys.device)))
    return found


def layouts(
    model: Any, found: list[LayerShape], identity: Identity, *, block_tokens: int, salt: str, collision_resistant: bool
) -> list[Layout]:
    """Layouts of a model's groups, such that every other engine that holds the same KV in the same order has the same.

    The configuration says what is stored, the shapes whether that is so; where it says nothing that we understand the
    shapes alone do, and blocks are shared among transformers only.
    """
    config = plain(model).config.get_text_config(decoder=True)
    try:
        said = Layout.from_hf_config(
            config,
            dtype=found[0].dtype,
            model=identity.model,
            revision=identity.revision,
            block_tokens=block_tokens,
            lora=identity.lora,
            salt=salt,
            # Also of MLA, whose rotated pairs other engines keep together: those blocks do not meet, by design.
            element_order="neox",
            collision_resistant=collision_resistant,
        )
        if _agree(said, found):
            return said
    except ConfigError:
        pass
    return _by_shape(config, found, identity, block_tokens, salt, collision_resistant)


def _agree(said: list[Layout], found: list[LayerShape]) -> bool:
    """Whether layouts describe exactly the layers that the model has made."""
    by_layer = {layer: layout for layout in said for layer in (layout.layer_ids or range(layout.layers))}
    if sorted(by_layer) != list(range(len(found))):
        return False
    for layer, shape in enumerate(found):
        layout = by_layer[layer]
        mla = layout.attention is Attention.MLA
        dims = (shape.k_dim + shape.v_dim, 0) if mla else (shape.k_dim, shape.v_dim)
        rule = Rule(Span.SLIDING, shape.window) if shape.window else FULL
        if (layout.heads, layout.k_dim, layout.v_dim, layout.rule) != (shape.heads, *dims, rule):
            return False
    return True


def _by_shape(
    config: Any, found: list[LayerShape], identity: Identity, block_tokens: int, salt: str, collision_resistant: bool
) -> list[Layout]:
    """Layouts from what the model has made alone: one group for each shape of layers."""
    fields = {name: value for name, value in config.to_dict().items() if name not in _VOLATILE}
    groups: dict[LayerShape, list[int]] = {}
    for layer, shape in enumerate(found):
        groups.setdefault(shape, []).append(layer)
    return [
        Layout(
            model=identity.model,
            heads=shape.heads,
            layers=len(layers),
            k_dim=shape.k_dim,
            v_dim=shape.v_dim,
            dtype=shape.dtype,
            attention=Attention.MHA,
            block_tokens=block_tokens,
            revision=identity.revision,
            rope=json.dumps(fields, sort_keys=True, default=str),
            element_order="transformers",
            lora=identity.lora,
            salt=salt,
            rule=Rule(Span.SLIDING, shape.window) if shape.window else FULL,
            collision_resistant=collision_resistant,
            layer_ids=tuple(layers),
        )
        for shape, layers in groups.items()
    ]
