"""Models whose keys SGLang turns by the longest request of a batch: nothing of them is stored or found."""

from __future__ import annotations

import json
import logging
import sys
import types

import pytest

pytest.importorskip("torch", reason="PyTorch is not in this environment: make test runs these in .venv-torch")

from tests.connectors.test_sglang_hicache import (
    PAGE,
    MHATokenToKVPoolHost,
    backend,  # noqa: F401  # a fixture
    fill,
    hashes,
    slots,
)
from tiercache_connectors.sglang_rope import unsteady

LLAMA = {"model_type": "llama", "rope_theta": 1e4, "max_position_embeddings": 131072}
FACTORS = {"short_factor": [1.0], "long_factor": [2.0]}
MODELS = {
    "plain": (LLAMA, ""),
    "yarn": ({**LLAMA, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ""),
    "longrope": (
        {**LLAMA, "original_max_position_embeddings": 4096, "rope_scaling": {"type": "longrope", **FACTORS}},
        "--context-length 4096 or less",
    ),
    "its old name": ({**LLAMA, "rope_scaling": {"type": "su", **FACTORS}}, "other requests of a batch"),
    "transformers 5": (
        {
            **LLAMA,
            "rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 8192, **FACTORS},
        },
        "--context-length 8192 or less",
    ),
    "inside of another": (
        {"model_type": "vision", "text_config": {**LLAMA, "rope_scaling": {"rope_type": "longrope", **FACTORS}}},
        "other requests of a batch",
    ),
    "layers of two kinds": (
        {**LLAMA, "rope_parameters": {"full_attention": {"rope_type": "longrope"}, "sliding_attention": {}}},
        "other requests of a batch",
    ),
}


def told(**args):
    return types.SimpleNamespace(**{"json_model_override_args": "{}", "context_length": None} | args)


@pytest.mark.parametrize("name", MODELS)
def test_what_a_configuration_says_of_its_rotary_embedding(tmp_path, name):
    facts, reason = MODELS[name]
    (tmp_path / "config.json").write_text(json.dumps(facts))
    for args in (None, told()):
        said = unsteady(str(tmp_path), "", args)
        assert reason in said
        assert bool(said) is bool(reason)
    if "--context-length" in reason:
        limit = int(reason.split()[1])
        assert not unsteady(str(tmp_path), "", told(context_length=limit))
        assert unsteady(str(tmp_path), "", told(context_length=limit + 1))


def test_overrides_of_the_configuration_count(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    overrides = json.dumps({"rope_scaling": {"rope_type": "longrope", **FACTORS}})
    assert unsteady(str(tmp_path), "", told(json_model_override_args=overrides))


def test_a_configuration_that_is_not_here_says_nothing(tmp_path):
    for facts in (None, "no json", "[1]"):
        if facts:
            (tmp_path / "config.json").write_text(facts)
        assert not unsteady(str(tmp_path), "", told())
    assert not unsteady("a-model", "", None)
    assert not unsteady(str(tmp_path / "nothing/at all"), "", None)


@pytest.mark.slow
@pytest.mark.parametrize("interface", [0, 1])
@pytest.mark.parametrize("name", ["plain", "longrope"])
def test_nothing_is_stored_of_such_a_model(backend, tmp_path, caplog, name, interface):  # noqa: F811
    facts, reason = MODELS[name]
    (tmp_path / "config.json").write_text(json.dumps(facts))
    pool, keys = fill(MHATokenToKVPoolHost()), hashes(2)
    with caplog.at_level(logging.WARNING, "tiercache_connectors"):
        one = backend(pool, model_name=str(tmp_path), extra={"interface_v1": interface})
        good = not reason
        assert one.batch_set_v1(keys, slots([0, 1])) == [good] * 2
        assert one.batch_set(keys, [pool.get_data_page(0), pool.get_data_page(PAGE)]) is good
        assert one.batch_exists(keys) == (2 if good else 0)
        assert one.batch_get_v1(keys, slots([4, 5])) == [good] * 2
    assert sum("nothing is reused" in line and reason in line for line in caplog.messages) == (0 if good else 1)


@pytest.mark.slow
def test_a_context_that_is_short_enough_is_reused(backend, tmp_path, monkeypatch):  # noqa: F811
    (tmp_path / "config.json").write_text(json.dumps(MODELS["longrope"][0]))
    args = told(quantization=None, load_format="auto", revision=None, context_length=4096)
    runtime = types.SimpleNamespace(get_server_args=lambda: args)
    monkeypatch.setitem(sys.modules, "sglang.srt.runtime_context", runtime)
    one = backend(fill(MHATokenToKVPoolHost()), model_name=str(tmp_path))
    assert all(one.batch_set_v1(hashes(2), slots([0, 1])))
    assert one.batch_exists(hashes(2)) == 2
