"""What a transformers config says of a model's KV: groups of layers, heads, dims, windows, states, rotary embedding.

Read by fields, not by model names: llama, qwen, mistral, gemma and their kin share theirs. Sources: the configuration
classes of transformers 5 and of vLLM (step3_text). What a config does not say is asked for, never guessed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tiercache.errors import ConfigError
from tiercache.kv.layout import ITEMSIZES, STATE, Attention, Rule, Span, canonical_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    Config = Mapping[str, Any]

_FULL = {"full_attention", "attention", "global_attention", "full", "global"}
_SLIDING = {"sliding_attention", "chunked_attention", "local_attention", "sliding", "local"}
_STATE = {"mamba", "mamba2", "linear_attention", "ssm"}
_NOTHING = {"mlp", "moe", "conv_none"}
_NEMOTRON = {"M": "mamba", "*": "full_attention", "-": "mlp", "E": "moe"}


def groups_of(config: object, dtype: str) -> list[dict[str, Any]]:
    """Fields of the layouts of a config's language model that follow from it, one a group: see Layout."""
    facts = _facts(config)
    kinds = _layer_kinds(facts)
    stop = len(kinds) - int(facts.get("num_kv_shared_layers") or 0)  # the last ones read what earlier layers store
    groups: dict[str, list[int]] = {}
    for layer, kind in enumerate(kinds[:stop]):
        for each in ("full_attention", "mamba") if kind == "hybrid" else (kind,):
            family = _family(each)
            if family:
                groups.setdefault(family, []).append(layer)
    if not groups:
        raise ConfigError(f"no layer of {_name(facts)} stores anything: set layer_types, or build a Layout by hand")
    return [_group(facts, family, tuple(ids), dtype) for family, ids in groups.items()]


def _facts(config: object) -> Config:
    """The language model's part of a config, as a dict."""
    facts = config if isinstance(config, dict) else getattr(config, "to_dict", dict)()
    if not isinstance(facts, dict) or not facts:
        raise ConfigError(f"{type(config).__name__} is no config: pass a dict, or a transformers PretrainedConfig")
    inner = facts.get("text_config") or facts.get("llm_config")
    if isinstance(inner, dict):
        return {"model_type": facts.get("model_type", "")} | inner
    return facts


def _name(facts: Config) -> str:
    return f"model_type {facts.get('model_type', '?')!r}"


def _need(facts: Config, *names: str) -> int:
    """The first of these fields that is there, as a whole number; ConfigError that names them all otherwise."""
    for name in names:
        value = facts.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    raise ConfigError(f"{_name(facts)} has no {' or '.join(names)}: add it to the config, or build a Layout by hand")


# ------------------------------------------------------------------------------------------------ layers


def _layer_kinds(facts: Config) -> list[str]:
    """One kind a layer, as transformers calls them; "hybrid" is attention and state in one."""
    for name in ("layer_types", "layers_block_type"):
        if isinstance(facts.get(name), list | tuple) and facts[name]:
            return [str(kind) for kind in facts[name]]
    pattern = facts.get("hybrid_override_pattern")
    if isinstance(pattern, str) and pattern:
        return [_NEMOTRON.get(letter, letter) for letter in pattern]
    layers = _need(facts, "num_hidden_layers", "n_layer", "num_layers", "n_layers")
    model = str(facts.get("model_type", ""))
    if model in ("mamba", "mamba2", "falcon_mamba"):
        return ["mamba"] * layers
    if model == "falcon_h1":
        return ["hybrid"] * layers
    if facts.get("attn_layer_period"):
        period, offset = int(facts["attn_layer_period"]), int(facts.get("attn_layer_offset") or 0)
        return ["full_attention" if i % period == offset else "mamba" for i in range(layers)]
    if facts.get("full_attention_interval"):
        every = int(facts["full_attention_interval"])
        return ["linear_attention" if (i + 1) % every else "full_attention" for i in range(layers)]
    return _windows(facts, layers)


def _windows(facts: Config, layers: int) -> list[str]:
    """Layers of a model whose only difference is a sliding window."""
    pattern = facts.get("sliding_window_pattern") or facts.get("_sliding_window_pattern")
    if facts.get("model_type") == "gemma2" and facts.get("sliding_window"):
        pattern = pattern or 2
    if isinstance(pattern, int) and facts.get("sliding_window"):
        return ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers)]
    if not facts.get("sliding_window") or facts.get("use_sliding_window") is False:
        return ["full_attention"] * layers
    # Qwen 2 has windows from layer max_window_layers on, others everywhere.
    first = int(facts.get("max_window_layers") or 0) if "use_sliding_window" in facts else 0
    return ["full_attention"] * min(first, layers) + ["sliding_attention"] * max(0, layers - first)


def _family(kind: str) -> str:
    """ "full", "sliding" or "state"; "" for a layer that stores nothing. Raises ConfigError for what is unknown."""
    for family, names in (("full", _FULL), ("sliding", _SLIDING), ("state", _STATE), ("", _NOTHING)):
        if kind in names:
            return family
    known = sorted(_FULL | _SLIDING | _STATE | _NOTHING)
    raise ConfigError(f"layer type {kind!r} is unknown (known: {', '.join(known)}): build its Layout by hand")


# ------------------------------------------------------------------------------------------------ groups


def _group(facts: Config, family: str, ids: tuple[int, ...], dtype: str) -> dict[str, Any]:
    if family == "state":
        conv, recurrent = _state_bytes(facts, dtype)
        shape = {"heads": 1, "k_dim": conv, "v_dim": recurrent, "dtype": "uint8", "attention": Attention.MQA}
        return shape | {"layers": len(ids), "layer_ids": ids, "rule": STATE}
    rule = Rule()
    if family == "sliding":
        chunk = facts.get("attention_chunk_size")
        rule = Rule(Span.SLIDING, chunk if isinstance(chunk, int) else _need(facts, "sliding_window"))
    shape = _attention(facts, family) | {"layers": len(ids), "layer_ids": ids, "rule": rule}
    return shape | {"dtype": dtype, "rope": _rope(facts, family)}


def _attention(facts: Config, family: str) -> dict[str, Any]:
    """Heads and dims of one token in one layer."""
    if facts.get("kv_lora_rank"):
        latent = _need(facts, "kv_lora_rank") + _need(facts, "qk_rope_head_dim")
        return {"heads": 1, "k_dim": latent, "v_dim": 0, "attention": Attention.MLA}
    if "num_attention_groups" in facts or "share_q_dim" in facts:  # Step-3: one key and one value for all queries
        shared = _need(facts, "head_dim")
        groups = int(facts.get("num_attention_groups") or 1)
        return {"heads": groups, "k_dim": shared, "v_dim": shared, "attention": Attention.MFA}
    queries = _need(facts, "num_attention_heads", "n_head", "n_heads")
    special = {"full": "global", "sliding": "swa"}[family]
    heads = facts.get(f"num_{special}_key_value_heads") or facts.get(f"{special}_num_key_value_heads")
    heads = heads or facts.get("num_key_value_heads") or (1 if facts.get("multi_query") else queries)
    dim = facts.get(f"{special}_head_dim") or facts.get("head_dim")
    if not dim:
        hidden = _need(facts, "hidden_size", "n_embd", "d_model")
        if hidden % queries:
            raise ConfigError(f"{_name(facts)} has no head_dim, nor do {queries} heads divide {hidden}: add head_dim")
        dim = hidden // queries
    value = facts.get(f"{special}_v_head_dim") or facts.get("v_head_dim") or dim
    kind = Attention.MQA if heads == 1 else Attention.MHA if heads == queries else Attention.GQA
    return {"heads": int(heads), "k_dim": int(dim), "v_dim": int(value), "attention": kind}


def _rope(facts: Config, family: str) -> str:
    """The rotary embedding of a group as canonical JSON; the spellings of transformers 4 and 5 give the same text."""
    given = facts.get("rope_parameters") or {}
    for name in (f"{family}_attention", family):
        if isinstance(given.get(name), dict):
            given = given[name]
    rope = {"rope_theta": facts.get("rope_theta"), **(facts.get("rope_scaling") or {}), **given}
    if family == "sliding" and facts.get("rope_local_base_freq"):
        rope = {"rope_theta": facts["rope_local_base_freq"]}  # Gemma 3 scales its full layers alone
    rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type") or "default"
    rope.setdefault("partial_rotary_factor", facts.get("partial_rotary_factor"))
    if rope["rope_type"] in ("dynamic", "longrope", "yarn"):
        rope.setdefault("max_position_embeddings", facts.get("max_position_embeddings"))
    return canonical_json({name: value for name, value in rope.items() if value is not None})


def _state_bytes(facts: Config, dtype: str) -> tuple[int, int]:
    """Bytes of one layer's convolution state and recurrent state, as the caches of transformers have them."""
    item = ITEMSIZES.get(str(facts.get("mamba_dtype") or facts.get("dtype") or facts.get("torch_dtype") or dtype), 0)
    exact = ITEMSIZES.get(str(facts.get("mamba_ssm_dtype") or "float32" if "mamba_ssm_dtype" in facts else dtype), item)
    item = item or exact
    if "linear_num_value_heads" in facts:  # gated delta rule (Qwen 3 Next)
        keys = _need(facts, "linear_num_key_heads") * _need(facts, "linear_key_head_dim")
        heads, value = _need(facts, "linear_num_value_heads"), _need(facts, "linear_value_head_dim")
        conv = (2 * keys + heads * value) * _need(facts, "linear_conv_kernel_dim")
        return conv * item, heads * _need(facts, "linear_key_head_dim") * value * exact
    state = _need(facts, "ssm_state_size", "mamba_d_state", "state_size")
    kernel = _need(facts, "conv_kernel", "mamba_d_conv", "d_conv")
    if facts.get("mamba_n_heads") or facts.get("mamba_num_heads") or facts.get("n_mamba_heads"):  # Mamba 2
        heads = _need(facts, "mamba_n_heads", "mamba_num_heads", "n_mamba_heads")
        dim = _need(facts, "mamba_d_head", "mamba_head_dim", "mamba_headdim")
        groups = _need(facts, "mamba_n_groups", "n_groups", "mamba_ngroups")
        return (heads * dim + 2 * groups * state) * kernel * item, heads * dim * state * exact
    expand = int(facts.get("mamba_expand") or facts.get("expand") or 2)
    inner = facts.get("intermediate_size") if "mamba_expand" not in facts else None
    width = int(inner or expand * _need(facts, "hidden_size"))
    return width * kernel * item, width * state * exact
