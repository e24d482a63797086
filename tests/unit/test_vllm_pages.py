"""Pages of vLLM's own offloading: no two engines whose pages could differ find each other's."""

from __future__ import annotations

import re
from itertools import combinations
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from tests.unit.test_vllm_layout import LLAMA, LONG, SCALED, Config
from tiercache_connectors.vllm_options import Options
from tiercache_connectors.vllm_pages import Identity, identify_engine, page_layout

if TYPE_CHECKING:
    from pathlib import Path

REVISION = "a" * 40
THETA = {**LLAMA, "rope_theta": 5e5}
EPSILON = {**LLAMA, "rms_norm_eps": 1e-3}


def engine(facts: dict[str, Any] = LLAMA, load: str = "auto", lora: Any = None, draft: Any = None, **model: Any) -> Any:
    """vLLM's configuration, as far as it is asked."""
    said = {
        "model": "org/model",
        "revision": REVISION,
        "dtype": "torch.bfloat16",
        "hf_config": Config(**facts),
        "quantization": None,
        "hf_overrides": {},
        "max_model_len": 2048,
        **model,
    }
    return SimpleNamespace(
        model_config=SimpleNamespace(**said),
        load_config=SimpleNamespace(load_format=load),
        lora_config=lora,
        speculative_config=draft,
    )


def drafted(revision: str) -> Any:
    return SimpleNamespace(draft_model_config=SimpleNamespace(model="org/draft", revision=revision))


def connector(vllm_config: Any, **extra: Any) -> Identity:
    """What vLLM's connector does in its constructor, far above ours."""

    def spec() -> Identity:
        return identify_engine(Options.of(extra))

    return spec()


def namespace(vllm_config: Any, **extra: Any) -> bytes:
    found = connector(vllm_config, **extra)
    assert not found.reason
    return page_layout(found.weights, 4096, str(sorted(found.facts.items()))).namespace


ENGINES = {
    "as it is": lambda: engine(),
    "another revision": lambda: engine(revision="b" * 40),
    "another model": lambda: engine(model="org/other"),
    "another rope": lambda: engine(THETA, hf_overrides={"rope_theta": 5e5}),
    "another epsilon": lambda: engine(EPSILON, hf_overrides={"rms_norm_eps": 1e-3}),
    "an override that is a function": lambda: engine({**LLAMA, "x": 1}, hf_overrides=print),
    "quantised while loading": lambda: engine(quantization="fp8"),
    "weights that were not read": lambda: engine(load="dummy"),
    "computed in other numbers": lambda: engine(dtype="torch.float16"),
    "short factors": lambda: engine(LONG, max_model_len=4096, revision="c" * 40),
    "long factors": lambda: engine(LONG, max_model_len=4097, revision="c" * 40),
    "a draft model": lambda: engine(draft=drafted("d" * 40)),
    "another draft model": lambda: engine(draft=drafted("e" * 40)),
}


def test_engines_that_differ_in_anything_never_meet() -> None:
    found = {what: namespace(make()) for what, make in ENGINES.items()}
    assert [pair for pair in combinations(found, 2) if found[pair[0]] == found[pair[1]]] == []
    assert found == {what: namespace(make()) for what, make in ENGINES.items()}, "the same engine meets itself"


def test_what_users_say_of_the_weights_does_not_hide_what_was_made_of_them() -> None:
    said = {"model": "mine", "revision": "1"}
    found = {what: namespace(make(), **said) for what, make in ENGINES.items()}
    same = {"as it is", "another revision", "another model"}  # the user says that these are one
    assert len({found[what] for what in same}) == 1
    assert len(set(found.values())) == len(found) - 2
    assert namespace(engine(), model="mine", revision="2") not in found.values()


def test_long_factors_whose_limit_nobody_says_go_by_the_longest_request() -> None:
    unsaid = {**LLAMA, "rope_scaling": SCALED}
    assert namespace(engine(unsaid, max_model_len=10)) != namespace(engine(unsaid, max_model_len=11))
    assert namespace(engine(max_model_len=10)) == namespace(engine(max_model_len=11))


def test_directories_go_by_what_lies_in_them(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = namespace(engine(model=str(tmp_path), revision=None))
    (tmp_path / "model.safetensors").write_bytes(b"Weights")
    assert namespace(engine(model=str(tmp_path), revision=None)) != before


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: engine(lora=SimpleNamespace(max_loras=1)), "adapters go by their paths alone: use vllm_v1"),
        (lambda: None, "does not show its configuration.*use vllm_v1"),
        (lambda: SimpleNamespace(), "does not show its configuration"),
        (lambda: engine(model="org/nobody-knows", revision=None), "say model= and revision="),
        (lambda: engine(draft=SimpleNamespace(draft_model_config=SimpleNamespace(model="x/y", revision=""))), "'x/y'"),
    ],
)
def test_nothing_is_reused_of_an_engine_that_is_not_known(make: Any, reason: str) -> None:
    assert re.search(reason, connector(make()).reason)
