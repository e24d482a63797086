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
    started,  # noqa: F401  # another
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


def test_tables_of_other_things_may_have_anything_as_their_type(tmp_path):
    odd = {**LLAMA, "quantization_config": {"type": ["int", {"longrope": 1}]}, "aux": {"rope_type": {}}}
    (tmp_path / "config.json").write_text(json.dumps(odd))
    assert not unsteady(str(tmp_path), "", told())
    (tmp_path / "config.json").write_text(json.dumps({**odd, "rope_scaling": {"type": "longrope"}}))
    assert unsteady(str(tmp_path), "", told())


def test_nothing_is_reused_of_a_model_whose_configuration_cannot_be_read(tmp_path, monkeypatch):
    for facts in (None, "no json", "[1]"):
        if facts:
            (tmp_path / "config.json").write_text(facts)
        assert "no config.json of" in unsteady(str(tmp_path), "", told())
    assert "no config.json of a-model" in unsteady("a-model", "", None)
    assert "no config.json of" in unsteady(str(tmp_path / "nothing/at all"), "", None)
    # Nobody said which model: it is not the one in the working directory.
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    monkeypatch.chdir(tmp_path)
    assert "does not say which model" in unsteady("", "", told())


@pytest.mark.slow
@pytest.mark.parametrize("interface", [0, 1])
@pytest.mark.parametrize("name", ["plain", "longrope"])
@pytest.mark.parametrize("served", ["gpt", "", None, "a-model-fp8"])
def test_nothing_is_stored_of_such_a_model(backend, started, caplog, name, interface, served):  # noqa: F811
    """SGLang's storage hears the name that the model is served by, or that with a tag of the pool."""
    facts, reason = MODELS[name]
    (started() / "config.json").write_text(json.dumps(facts))
    stored_or_not(backend, caplog, reason, interface, served)


def stored_or_not(backend, caplog, reason, interface=1, served="a-model"):  # noqa: F811
    pool, keys = fill(MHATokenToKVPoolHost()), hashes(2)
    with caplog.at_level(logging.WARNING, "tiercache_connectors"):
        one = backend(pool, model_name=served, extra={"interface_v1": interface})
        good = not reason
        assert one.batch_set_v1(keys, slots([0, 1])) == [good] * 2
        assert one.batch_set(keys, [pool.get_data_page(0), pool.get_data_page(PAGE)]) is good
        assert one.batch_exists(keys) == (2 if good else 0)
        assert one.batch_get_v1(keys, slots([4, 5])) == [good] * 2
    said = [line for line in caplog.messages if "nothing is reused" in line]
    assert [reason in line for line in said] == ([] if good else [True])


@pytest.mark.slow
def test_a_name_that_leads_to_another_model_is_not_followed(backend, started, caplog, tmp_path):  # noqa: F811
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (started() / "config.json").write_text(json.dumps(MODELS["longrope"][0]))
    stored_or_not(backend, caplog, "--context-length 4096", served=str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("path", ["", "org/not-in-the-hubs-cache"])
def test_nothing_is_stored_where_the_model_is_not_known(backend, started, caplog, tmp_path, monkeypatch, path):  # noqa: F811
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    monkeypatch.chdir(tmp_path)
    started(path)
    stored_or_not(backend, caplog, "no config.json of" if path else "does not say which model", served=str(tmp_path))


@pytest.mark.slow
def test_nothing_is_stored_where_sglang_says_nothing_of_itself(backend, caplog, tmp_path, monkeypatch):  # noqa: F811
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    monkeypatch.delitem(sys.modules, "sglang.srt.runtime_context")
    stored_or_not(backend, caplog, "does not say which model", served=str(tmp_path))


@pytest.mark.slow
def test_what_sglang_made_of_the_path_counts_before_what_it_was_told(backend, started, caplog, tmp_path):  # noqa: F811
    (tmp_path / "config.json").write_text(json.dumps(MODELS["longrope"][0]))
    started()
    resolved = types.SimpleNamespace(model_path=str(tmp_path))
    sys.modules["sglang.srt.runtime_context"].get_model = lambda: resolved
    stored_or_not(backend, caplog, "--context-length 4096")


@pytest.mark.slow
def test_a_context_that_is_short_enough_is_reused(backend, started):  # noqa: F811
    (started() / "config.json").write_text(json.dumps(MODELS["longrope"][0]))
    started(context_length=4096)
    one = backend(fill(MHATokenToKVPoolHost()))
    assert all(one.batch_set_v1(hashes(2), slots([0, 1])))
    assert one.batch_exists(hashes(2)) == 2
