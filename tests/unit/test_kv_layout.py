"""Layouts: bytes, parts, namespaces and what configs of real models say."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.kv_engine import layouts
from tiercache.errors import ConfigError
from tiercache.kv.layout import STATE, Attention, Layout, Rule, Span, canonical_json
from tiercache.model import PART_BYTES, PARTS_MAX

LLAMA_8B = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "rope_theta": 500000.0,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192},
}
LLAMA_70B = LLAMA_8B | {"num_hidden_layers": 80, "num_attention_heads": 64, "hidden_size": 8192}
QWEN3_32B = {
    "model_type": "qwen3",
    "num_hidden_layers": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_size": 5120,
    "sliding_window": None,
    "use_sliding_window": False,
    "max_window_layers": 64,
    "rope_theta": 1000000,
}
QWEN3_235B = QWEN3_32B | {"model_type": "qwen3_moe", "num_hidden_layers": 94, "num_key_value_heads": 4}
STEP3 = {
    "model_type": "step3_vl",
    "text_config": {
        "model_type": "step3_text",
        "num_hidden_layers": 61,
        "num_attention_heads": 64,
        "num_attention_groups": 1,
        "head_dim": 256,
        "share_q_dim": 2048,
        "hidden_size": 7168,
        "rope_theta": 500000,
    },
}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "hidden_size": 7168,
    "rope_theta": 10000,
}
GEMMA3_4B = {
    "model_type": "gemma3",
    "text_config": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_size": 2560,
        "sliding_window": 1024,
        "sliding_window_pattern": 6,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
}
JAMBA = {
    "model_type": "jamba",
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "attn_layer_period": 8,
    "attn_layer_offset": 4,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
}


def from_config(config: object, dtype: str = "bfloat16", **kwargs) -> list[Layout]:
    return Layout.from_hf_config(config, dtype=dtype, model="m", **kwargs)


@pytest.mark.parametrize(
    ("config", "dtype", "token_bytes", "block_bytes", "parts"),
    [
        (STEP3, "float8_e4m3fn", 31_232, 499_712, 8),
        (STEP3, "bfloat16", 62_464, 999_424, 16),
        (DEEPSEEK_V3, "float8_e4m3fn", 35_136, 562_176, 8),
        (DEEPSEEK_V3, "bfloat16", 70_272, 1_124_352, 16),
        (QWEN3_235B, "bfloat16", 192_512, 3_080_192, 8),
        (QWEN3_32B, "bfloat16", 262_144, 4_194_304, 64),
        (QWEN3_32B, "float8_e4m3fn", 131_072, 2_097_152, 32),
        (LLAMA_70B, "bfloat16", 327_680, 5_242_880, 64),
        (LLAMA_8B, "bfloat16", 131_072, 2_097_152, 32),
    ],
)
def test_published_sizes(config, dtype, token_bytes, block_bytes, parts) -> None:
    (layout,) = from_config(config, dtype, element_order="neox")
    assert (layout.token_bytes, layout.block_bytes, layout.parts) == (token_bytes, block_bytes, parts)
    assert layout.part_bytes >= PART_BYTES


@given(layouts(), st.sampled_from([1, 64, 128]))
def test_parts_divide_a_block(layout: Layout, more: int) -> None:
    layout = replace(layout, k_dim=layout.k_dim * more)
    assert 1 <= layout.parts <= PARTS_MAX
    assert -(-layout.block_bytes // layout.part_bytes) == layout.parts  # the rule of model.Payload
    seen = np.zeros(layout.block_bytes, np.uint8)
    for layer in range(layout.layers):
        for head in range(layout.heads):
            for kv in range(2 if layout.v_dim else 1):
                start, size = layout.span(layer, head, kv)
                low, high = layout.part_span(layout.part_of(layer, head))
                assert low <= start
                assert start + size <= high
                assert size == layout.rows * (layout.v_dim if kv else layout.k_dim) * layout.itemsize
                seen[start : start + size] += 1
    assert (seen == 1).all()
    assert layout.all_parts == layout.parts_touched(range(layout.layers), range(layout.heads))
    assert layout.parts_of(range(layout.layers), range(layout.heads)) == (layout.all_parts, [])
    for part in range(layout.parts):
        layers, heads = layout.part_range(part)
        assert {layout.part_of(layer, head) for layer in layers for head in heads} == {part}
        assert layout.parts_of(layers, heads) == (1 << part, [])
    assert [layer for group in layout.layer_groups() for layer in group] == list(range(layout.layers))


@given(layouts(), st.data())
def test_any_box_is_parts_and_pieces(layout: Layout, data: st.DataObject) -> None:
    def some(count: int) -> range:
        ends = data.draw(st.tuples(st.integers(0, count), st.integers(0, count)))
        return range(min(ends), max(ends))

    layers, heads = some(layout.layers), some(layout.heads)
    parts, pieces = layout.parts_of(layers, heads)
    found = np.zeros(layout.block_bytes, np.uint8)
    for part in range(layout.parts):
        if parts >> part & 1:
            found[slice(*layout.part_span(part))] += 1
    for start, stop in pieces:
        assert start // layout.part_bytes == (stop - 1) // layout.part_bytes
        found[start:stop] += 1
    expected = np.zeros(layout.block_bytes, np.uint8)
    for layer in layers:
        for head in heads:
            start = layout.span(layer, head, 0)[0]
            expected[start : start + layout.unit_bytes] = 1
    assert np.array_equal(found, expected)
    touched = layout.parts_touched(layers, heads)
    for part in range(layout.parts):
        assert bool(touched >> part & 1) == bool(expected[slice(*layout.part_span(part))].any())


def test_two_pipeline_stages_cut_between_parts_where_they_can() -> None:
    even = Layout("m", heads=1, layers=30, k_dim=256, v_dim=256, dtype="float8_e4m3fn")
    assert even.layers_per_part == 15
    assert Layout("m", heads=8, layers=36, k_dim=128, v_dim=128, dtype="bfloat16").layers_per_part == 9
    odd = Layout("m", heads=1, layers=61, k_dim=256, v_dim=256, dtype="float8_e4m3fn")
    assert odd.parts_of(range(31), range(1)) == (0b111, [(3 * 65536, 3 * 65536 + 7 * 8192)])


BASE = Layout("m", heads=2, layers=3, k_dim=8, v_dim=8, dtype="bfloat16")
CHANGES = [
    {},
    {"model": "n"},
    {"revision": "a"},
    {"heads": 4},
    {"layers": 4, "layer_ids": (0, 1, 2, 3)},
    {"layer_ids": (0, 1, 3)},
    {"k_dim": 16},
    {"v_dim": 16},
    {"dtype": "float16"},
    {"block_tokens": 32},
    {"rope": '{"rope_theta":10000}'},
    {"rope": '{"rope_theta":500000}'},
    {"element_order": "neox"},
    {"element_order": "interleaved"},
    {"scales": "per head"},
    {"lora": "a"},
    {"salt": "a"},
    {"group": "a"},
    {"rule": Rule(Span.SLIDING, 64)},
    {"rule": Rule(Span.SLIDING, 128)},
    {"rule": STATE},
    {"order": "opaque", "tag": "vllm"},
    {"order": "opaque", "tag": "sglang"},
    {"tag": "fp8 by us"},
    {"attention": Attention.MLA, "heads": 1, "v_dim": 0},
    {"attention": Attention.MFA_KR, "heads": 1, "v_dim": 0},
    {"heads": 1, "v_dim": 0},
]


def test_what_changes_bytes_changes_the_namespace() -> None:
    layouts = [replace(BASE, **change) for change in CHANGES]
    for (i, one), (j, other) in combinations(enumerate(layouts), 2):
        assert one.namespace != other.namespace, (CHANGES[i], CHANGES[j])
    assert len({layout.namespace for layout in layouts}) == len(CHANGES)


@pytest.mark.parametrize("attention", [Attention.MHA, Attention.MQA, Attention.MFA])
def test_what_changes_no_bytes_changes_no_namespace(attention: Attention) -> None:
    assert replace(BASE, attention=attention).namespace == BASE.namespace
    assert replace(BASE, collision_resistant=True).namespace == BASE.namespace
    assert Layout("m", 2, 3, 8, 8, "bfloat16", layer_ids=(0, 1, 2)).namespace == BASE.namespace


def test_neighbouring_fields_do_not_run_into_each_other() -> None:
    assert replace(BASE, lora="ab", salt="c").namespace != replace(BASE, lora="a", salt="bc").namespace
    assert replace(BASE, k_dim=1, v_dim=18).namespace != replace(BASE, k_dim=11, v_dim=8).namespace


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": ""}, "needs the model's name"),
        ({"dtype": "torch.bfloat16"}, "dtype 'torch.bfloat16' is unknown"),
        ({"heads": 0}, "heads 0"),
        ({"k_dim": 0}, "k_dim 0"),
        ({"layers": True}, "layers True"),
        ({"block_tokens": -1}, "block_tokens -1"),
        ({"v_dim": -1}, "v_dim -1"),
        ({"attention": Attention.MLA, "heads": 1}, "has no V"),
        ({"attention": Attention.MLA, "v_dim": 0}, "one latent for all heads"),
        ({"order": "opaque"}, "with a tag"),
        ({"order": "dim first"}, "order is 'dense'"),
        ({"layer_ids": (0, 1)}, "layer_ids"),
        ({"layer_ids": (0, 1, 1)}, "ascending"),
        ({"block_tokens": 1 << 28}, "use fewer block_tokens"),
    ],
)
def test_what_is_no_layout(change, message) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(BASE, **change)


def test_ranges_outside_are_refused() -> None:
    for layers in (range(4), range(-1, 2), range(0, 3, 2)):
        with pytest.raises(ConfigError, match="layers range"):
            BASE.parts_of(layers, range(2))
    with pytest.raises(ConfigError, match="a sliding window"):
        Rule(Span.SLIDING)
    with pytest.raises(ConfigError, match="a sliding window"):
        Rule(Span.FULL, 5)


# ------------------------------------------------------------------------------------------------ configs


def test_gemma_is_two_groups() -> None:
    sliding, full = from_config(GEMMA3_4B)
    assert full.layer_ids == (5, 11, 17, 23, 29)
    assert full.rope == '{"factor":8,"rope_theta":1000000,"rope_type":"linear"}'
    assert sliding.rule == Rule(Span.SLIDING, 1024)
    assert sliding.rope == '{"rope_theta":10000,"rope_type":"default"}'
    assert sliding.layers == 29
    assert (sliding.heads, sliding.k_dim, sliding.v_dim) == (4, 256, 256)
    new = GEMMA3_4B["text_config"] | {"sliding_window_pattern": None}
    new["layer_types"] = ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(34)]
    assert [layout.layer_ids for layout in from_config(new)] == [sliding.layer_ids, full.layer_ids]


def test_both_spellings_of_rope_are_one() -> None:
    old = from_config(LLAMA_8B)[0]
    new = {name: value for name, value in LLAMA_8B.items() if not name.startswith("rope")}
    new["rope_parameters"] = {"rope_theta": 500000, **LLAMA_8B["rope_scaling"]}
    assert from_config(new)[0].namespace == old.namespace
    other = LLAMA_8B | {"rope_theta": 10000.0}
    assert from_config(other)[0].namespace != old.namespace


def test_hybrids_have_states() -> None:
    states, full = from_config(JAMBA)
    assert full.layer_ids == (4, 12, 20, 28)
    assert (full.heads, full.k_dim) == (8, 128)
    assert states.rule is STATE
    assert states.rows == 1
    assert states.layers == 28
    assert (states.k_dim, states.v_dim) == (8192 * 4 * 2, 8192 * 16 * 2)
    next_one = QWEN3_32B | {
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        "num_hidden_layers": 4,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
    }
    states, full = from_config(next_one)
    assert (states.k_dim, states.v_dim) == (8192 * 4 * 2, 32 * 128 * 128 * 2)
    assert full.layer_ids == (3,)
    nemotron = {"hybrid_override_pattern": "M-*M", "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    nemotron |= {"ssm_state_size": 128, "conv_kernel": 4, "mamba_num_heads": 128, "mamba_head_dim": 64, "n_groups": 8}
    states, full = from_config(nemotron)
    assert (states.layer_ids, full.layer_ids) == ((0, 3), (2,))
    assert states.v_dim == 128 * 64 * 128 * 2


def test_windows_by_model() -> None:
    mistral = LLAMA_8B | {"model_type": "mistral", "sliding_window": 4096}
    assert [layout.rule for layout in from_config(mistral)] == [Rule(Span.SLIDING, 4096)]
    qwen2 = LLAMA_8B | {"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 28}
    full, sliding = from_config(qwen2)
    assert (full.layers, sliding.layer_ids) == (28, (28, 29, 30, 31))
    assert len(from_config(qwen2 | {"use_sliding_window": False})) == 1
    shared = LLAMA_8B | {"num_kv_shared_layers": 12}
    assert from_config(shared)[0].layers == 20
    chunked = LLAMA_8B | {"layer_types": ["chunked_attention"] * 32, "attention_chunk_size": 8192}
    assert from_config(chunked)[0].rule.window == 8192


def test_heads_by_model() -> None:
    gpt2 = {"model_type": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768}
    assert (from_config(gpt2)[0].heads, from_config(gpt2)[0].k_dim) == (12, 64)
    assert from_config(gpt2)[0].attention is Attention.MHA
    assert from_config(gpt2 | {"multi_query": True})[0].attention is Attention.MQA
    assert from_config(STEP3)[0].attention is Attention.MFA
    wide = QWEN3_32B | {"v_head_dim": 64}
    assert from_config(wide)[0].v_dim == 64


def test_objects_with_to_dict_are_configs_too() -> None:
    assert from_config(SimpleNamespace(to_dict=lambda: LLAMA_8B)) == from_config(LLAMA_8B)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "is no config"),
        (7, "is no config"),
        ({"model_type": "new"}, "'new' has no num_hidden_layers"),
        ({"num_hidden_layers": 2}, "num_attention_heads or n_head"),
        ({"num_hidden_layers": 2, "num_attention_heads": 3, "hidden_size": 64}, "add head_dim"),
        ({"num_hidden_layers": 2, "num_attention_heads": 4}, "hidden_size or n_embd"),
        ({"layer_types": ["moving_average"]}, "'moving_average' is unknown"),
        ({"layer_types": ["mlp"]}, "stores anything"),
        ({"layer_types": ["sliding_attention"], "num_attention_heads": 4}, "sliding_window"),
        ({"layer_types": ["mamba"], "hidden_size": 8}, "ssm_state_size or mamba_d_state"),
        (DEEPSEEK_V3, "element_order"),
    ],
)
def test_what_a_config_does_not_say_is_asked_for(config, message) -> None:
    with pytest.raises(ConfigError, match=message):
        from_config(config)


def test_canonical_json() -> None:
    assert canonical_json({"b": (1.0, 2.5), "a": None}) == '{"a":null,"b":[1,2.5]}'
