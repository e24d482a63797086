"""Which weights a directory holds: what changes their identity, and what does not."""

from __future__ import annotations

import shutil

import pytest

from tiercache.errors import ConfigError
from tiercache_connectors.weights import Weights, configuration, identify


@pytest.fixture
def model(tmp_path):
    """A directory with a model in two files, as far as identities are concerned."""
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text('{"rope_theta": 10000.0}')
    (made / "model-00001-of-00002.safetensors").write_bytes(bytes(range(256)) * 4000)
    (made / "model-00002-of-00002.safetensors").write_bytes(bytes(range(255, -1, -1)) * 4000)
    (made / "tokenizer.json").write_text("{}")
    return made


def test_the_same_files_elsewhere_are_the_same_weights(model, tmp_path):
    shutil.copytree(model, tmp_path / "copy")
    assert identify(str(model)) == identify(str(tmp_path / "copy"))
    assert identify(str(model)).model.startswith("weights:")


def test_other_files_beside_the_weights_do_not_matter(model):
    before = identify(str(model))
    (model / "tokenizer.json").write_text("{ }")
    (model / "pytorch_model.bin").write_bytes(b"the same weights in another format")
    assert identify(str(model)) == before


@pytest.mark.parametrize("offset", [0, 123_456, 1_023_999])
@pytest.mark.parametrize("number", [1, 2])
def test_one_flipped_byte_makes_other_weights(model, number, offset):
    before = identify(str(model))
    file = model / f"model-0000{number}-of-00002.safetensors"
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)
    assert identify(str(model)) != before


def test_another_configuration_makes_other_weights(model):
    before = identify(str(model))
    (model / "config.json").write_text('{"rope_theta": 500000.0}')
    assert identify(str(model)) != before


def test_swapped_files_make_other_weights(model, tmp_path):
    before = identify(str(model))
    one, two = (model / f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    one.rename(tmp_path / "one")
    two.rename(one)
    (tmp_path / "one").rename(two)
    assert identify(str(model)) != before


def test_a_snapshot_of_a_hub_is_its_name_and_commit(model, tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--org--name" / "snapshots" / commit
    snapshot.parent.mkdir(parents=True)
    model.rename(snapshot)
    assert identify(str(snapshot)) == Weights("org/name", commit)


def test_a_name_is_looked_up_in_the_hubs_cache(tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub", reason="no client of a hub is in this environment")
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--org--name"
    for name in ("refs", f"snapshots/{commit}"):
        (repository / name).mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit / "config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert identify("org/name") == Weights("org/name", commit)
    assert identify("org/name", "f" * 40) == Weights("org/name", "f" * 40)
    with pytest.raises(ConfigError, match="model="):
        identify("org/other")


def test_a_directory_without_weights_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="no weights"):
        identify(str(tmp_path))


def test_no_name_is_not_the_working_directory(model, monkeypatch):
    monkeypatch.chdir(model)
    with pytest.raises(ConfigError, match="nobody says which model"):
        identify("")
    assert configuration("") is None


def test_an_adapter_with_another_scaling_is_another_one(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(bytes(1000))
    (tmp_path / "adapter_config.json").write_text('{"r": 8, "lora_alpha": 16}')
    before = identify(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text('{"r": 8, "lora_alpha": 32}')
    assert identify(str(tmp_path)) != before
