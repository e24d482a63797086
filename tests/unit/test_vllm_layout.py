"""What vLLM's configuration says that changes KV is in the namespace of layouts: settings with vLLM's attributes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tiercache_connectors.vllm_layout import Groups, Unusable, read_groups, weights_of
from tiercache_connectors.vllm_options import Options

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "hidden_size": 512,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
}
SCALED = {"rope_type": "longrope", "short_factor": [1.0] * 32, "long_factor": [2.0] * 32}
LONG = {**LLAMA, "original_max_position_embeddings": 4096, "rope_scaling": SCALED}


class Config(SimpleNamespace):
    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def get_text_config(self) -> Config:
        return self


class FullAttentionSpec:
    num_kv_heads, head_size, block_size, dtype = 2, 64, 16, "torch.bfloat16"


NAMES = [f"model.layers.{i}.self_attn.attn" for i in range(4)]


def groups(facts: dict[str, Any], names: Any = (NAMES,), load: str = "auto", **model: Any) -> Groups:
    said = {"hf_config": Config(**facts), "quantization": None, "hf_overrides": {}, "max_model_len": 2048, **model}
    config = SimpleNamespace(
        model_config=SimpleNamespace(**said),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        load_config=SimpleNamespace(load_format=load),
    )
    found = [SimpleNamespace(kv_cache_spec=FullAttentionSpec(), layer_names=list(each)) for each in names]
    return read_groups(config, SimpleNamespace(kv_cache_groups=found), Options.of({"model": "m"}))


def namespace(facts: dict[str, Any], **more: Any) -> bytes:
    (layout,) = groups(facts, **more).layouts
    return layout.namespace


def test_the_same_settings_meet() -> None:
    assert namespace(LLAMA) == namespace(dict(LLAMA))
    assert namespace(LLAMA) == namespace(LLAMA, max_model_len=9000)
    assert namespace(LONG, max_model_len=1024) == namespace(LONG, max_model_len=4096)


def test_long_factors_of_a_rope_go_by_the_engines_longest_request() -> None:
    assert namespace(LONG, max_model_len=4096) != namespace(LONG, max_model_len=4097)
    unsaid = {**LLAMA, "rope_scaling": SCALED}
    assert namespace(unsaid, max_model_len=4096) != namespace(unsaid, max_model_len=4097)


def test_overrides_of_the_configuration_make_another_model() -> None:
    """Also of fields that no layout has."""
    other = {**LLAMA, "rms_norm_eps": 1e-3}
    told = namespace(other, hf_overrides={"rms_norm_eps": 1e-3})
    assert len({namespace(LLAMA), told, namespace({**other, "x": 1}, hf_overrides={"x": 1})}) == 3
    assert told == namespace(dict(other), hf_overrides={"rms_norm_eps": 1e-3})


def test_weights_that_were_not_read_are_others() -> None:
    assert len({namespace(LLAMA), namespace(LLAMA, load="dummy"), namespace(LLAMA, quantization="fp8")}) == 3


def test_layers_of_a_draft_model_do_not_pass_for_the_models_own() -> None:
    draft = "draft_model.layers.0.self_attn.attn"
    with pytest.raises(Unusable, match="same number"):
        groups(LLAMA, names=([*NAMES, draft],))
    with pytest.raises(Unusable, match="same number"):
        groups(LLAMA, names=(NAMES, [draft]))


def test_weights_are_those_of_the_revision_that_was_loaded() -> None:
    def named(revision: str, **more: Any) -> str:
        facts = {"model": "org/model", "revision": revision, "quantization": None, "hf_config": Config(**LLAMA)}
        return weights_of(SimpleNamespace(model_config=SimpleNamespace(**facts | more)), Options.of({})).revision

    assert named("a" * 40) == "a" * 40
    assert named("b" * 40) == "b" * 40
    assert named("a" * 40, quantization="fp8") == "a" * 40 + "+fp8"
