"""KV of transformers models, stored by blocks and given back: tiny models with random weights, made on the spot."""

from __future__ import annotations

import ctypes
import logging
import subprocess
import sys
from pathlib import Path

import pytest

import tiercache
from tests.connectors.conftest import MIB
from tiercache.errors import ConfigError

torch = pytest.importorskip("torch", reason="PyTorch is not in this environment: make test runs these in .venv-torch")
transformers = pytest.importorskip("transformers", reason="transformers is not in this environment")

from tiercache_connectors import demo_kv  # noqa: E402
from tiercache_connectors.transformers_kv import TransformersKV  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]

ROOT = Path(__file__).resolve().parents[2]
BLOCK = 16
PROMPT = 300
NEW = 12
WHOLE = (PROMPT - 1) // BLOCK * BLOCK
COMMON = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "initializer_range": 0.2,
}
HEADS = COMMON | {"head_dim": 64}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 64,
    "q_lora_rank": 64,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 48,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 64,
    "n_group": 1,
    "topk_group": 1,
}
MODELS = {
    "llama": lambda: transformers.LlamaConfig(**HEADS, num_key_value_heads=2),
    "mha": lambda: transformers.LlamaConfig(**HEADS, num_key_value_heads=4),
    "mqa": lambda: transformers.LlamaConfig(**HEADS, num_key_value_heads=1),
    "qwen3": lambda: transformers.Qwen3Config(**HEADS, num_key_value_heads=2),
    "deepseek_mla": lambda: transformers.DeepseekV3Config(**COMMON, **LATENT),
    "mistral_sliding": lambda: transformers.MistralConfig(**HEADS, num_key_value_heads=2, sliding_window=64),
    "gemma3_hybrid": lambda: transformers.Gemma3TextConfig(
        **HEADS,
        num_key_value_heads=2,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
}
DTYPES = ("float32", "bfloat16")


def made(name="llama", *, seed=0, dtype="float32", **changes):
    torch.manual_seed(seed)
    config = MODELS[name]()
    for field, value in changes.items():
        setattr(config, field, value)
    return transformers.AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype)).eval()


def prompt(seed=0, tokens=PROMPT):
    return torch.randint(3, 512, (1, tokens), generator=torch.Generator().manual_seed(seed))


def greedy(ids, new=NEW):
    mask = torch.ones_like(ids)
    return {"attention_mask": mask, "max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}


def reusing(cache, model, **options):
    """Whatever is stored is loaded: these models compute faster than anything can be loaded."""
    return TransformersKV(cache, model, **{"plan": False} | options)


@pytest.fixture
def cache(tmp_path):
    with tiercache.open(str(tmp_path / "cache"), memory_bytes=128 * MIB, ssd_bytes=0) as opened:
        yield opened


@pytest.fixture(autouse=True)
def _two_threads():
    torch.set_num_threads(2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_a_stored_prefix_gives_the_same_tokens(cache, name, dtype):
    model, ids = made(name, dtype=dtype), prompt()
    truth = model.generate(ids, **greedy(ids))
    with reusing(cache, model) as first:
        assert torch.equal(first.generate(ids, **greedy(ids)), truth)
        assert first.reused.tokens == 0
        assert first.flush()
    with reusing(cache, model) as second:
        assert torch.equal(second.generate(ids, **greedy(ids)), truth)
        assert second.reused.tokens == WHOLE
        assert second.reused.memory > 0 == second.reused.ssd == second.reused.remote


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_restored_is_what_was_stored_bit_for_bit(cache, name, dtype):
    model, ids = made(name, dtype=dtype), prompt()
    past = transformers.DynamicCache(config=model.config)
    past.activate_past_recording()
    with torch.no_grad():
        model(ids, past_key_values=past, use_cache=True)
    with reusing(cache, model) as reuse:
        assert reuse.store(past, ids[0].tolist()).wait()
        restored, reused = reuse.restore(ids[0].tolist())
    assert reused.tokens == WHOLE == restored.get_seq_length()
    assert len(restored.layers) == len(past.layers)
    for got, true in zip(restored.layers, past.layers):
        held = got.keys.shape[2]
        assert held >= min(WHOLE, got.sliding_window - 1 if got.is_sliding else WHOLE)
        assert torch.equal(got.keys, true.keys[:, :, WHOLE - held : WHOLE])
        assert torch.equal(got.values, true.values[:, :, WHOLE - held : WHOLE])


def test_a_conversation_goes_on_from_its_own_answer(cache):
    model, ids = made(), prompt()
    with reusing(cache, model) as reuse:
        answered = reuse.generate(ids, **greedy(ids, 40))
        turn = torch.cat([answered, prompt(1, 30)], dim=1)
        truth = model.generate(turn, **greedy(turn))
        assert torch.equal(reuse.generate(turn, **greedy(turn)), truth)
        # All but the last token of the answer had been computed.
        assert reuse.reused.tokens == (PROMPT + 39) // BLOCK * BLOCK


def test_another_question_about_the_same_prefix(cache):
    model = made()
    with reusing(cache, model) as reuse:
        for question in range(3):
            ids = torch.cat([prompt(0, 256), prompt(10 + question, 50)], dim=1)
            assert torch.equal(reuse.generate(ids, **greedy(ids)), model.generate(ids, **greedy(ids)))
            assert reuse.reused.tokens == (256 if question else 0)


def test_it_comes_back_from_the_ssd_after_a_restart(tmp_path):
    model, ids = made(), prompt()
    where = {"directory": str(tmp_path / "cache"), "memory_bytes": 64 * MIB, "ssd_bytes": 256 * MIB}
    with tiercache.open(**where) as cache, reusing(cache, model, durable=True) as reuse:
        truth = reuse.generate(ids, **greedy(ids))
        assert reuse.flush()
    with tiercache.open(**where) as cache, reusing(cache, model) as reuse:
        assert torch.equal(reuse.generate(ids, **greedy(ids)), truth)
        assert reuse.reused.tokens == WHOLE
        assert reuse.reused.ssd == WHOLE // BLOCK


def test_a_killed_process_leaves_its_prefix_to_another(tmp_path, capfd):
    """The demo in small: the first process and its cache's owner die by kill -9, the second reads from the SSD."""
    assert demo_kv.run(str(tmp_path / "cache"), "small"), capfd.readouterr().out
    assert "killed with -9, and the owner of its cache with it" in capfd.readouterr().out


THREE_LINES = """
import sys
import torch, tiercache
from tests.connectors.test_transformers_kv import greedy, made, prompt
from tiercache_connectors.transformers_kv import TransformersKV
model, input_ids = made(), prompt()
reuse = TransformersKV(tiercache.open(sys.argv[1], memory_bytes="64MiB", ssd_bytes=0, share=True), model)
output = reuse.generate(input_ids, **greedy(input_ids))
print(reuse.reused.tokens)
"""


def test_a_program_of_three_lines_that_closes_nothing(tmp_path):
    """What it has computed is stored all the same, and the next program finds it with the owner."""
    try:
        for reused in (0, WHOLE):
            words = [sys.executable, "-c", THREE_LINES, str(tmp_path / "cache")]
            done = subprocess.run(words, capture_output=True, text=True, timeout=100, check=False, cwd=ROOT)
            assert done.returncode == 0, done.stderr
            assert int(done.stdout.split()[-1]) == reused, done.stderr
    finally:
        demo_kv.kill_owner(str(tmp_path / "cache"))


def test_an_owner_killed_between_two_calls_costs_hits_alone(tmp_path):
    directory = str(tmp_path / "cache")
    model, ids = made(), prompt()
    truth = model.generate(ids, **greedy(ids))
    shared = tiercache.open(directory, memory_bytes=64 * MIB, ssd_bytes=0, share=True)
    with shared as cache, reusing(cache, model) as reuse:
        for _ in range(3):
            assert torch.equal(reuse.generate(ids, **greedy(ids)), truth)
            assert demo_kv.kill_owner(directory)
        assert torch.equal(reuse.generate(ids, **greedy(ids)), truth)
        reuse.flush()
        assert torch.equal(reuse.generate(ids, **greedy(ids)), truth)
        assert reuse.reused.tokens == WHOLE
    demo_kv.kill_owner(directory)


# -- nobody gets another's KV ------------------------------------------------------------------------------------------

OTHERS = {
    "weights": lambda: (made(seed=1), {}),
    "dtype": lambda: (made(dtype="bfloat16"), {}),
    "rope": lambda: (made(rope_parameters={"rope_type": "default", "rope_theta": 5e5}), {}),
    "a number that only the forward pass knows": lambda: (made(rms_norm_eps=1e-3), {}),
    "heads": lambda: (made("mha"), {}),
    "salt": lambda: (made(), {"salt": "tenant"}),
    "name": lambda: (made(), {"name": "a-model"}),
    "revision": lambda: (made(), {"name": "a-model", "revision": "2"}),
    "block_tokens": lambda: (made(), {"block_tokens": 32}),
    "SHA-256 keys": lambda: (made(), {"collision_resistant": True}),
}


def test_models_that_differ_in_anything_never_meet(cache):
    ids = prompt()
    namespaces = {}
    for what, make in {"itself": lambda: (made(), {}), **OTHERS}.items():
        model, options = make()
        with reusing(cache, model, **options) as reuse:
            reuse.generate(ids, **greedy(ids, 2))
            assert reuse.reused.tokens == 0, f"another {what} found blocks of {list(namespaces)}"
            assert reuse.flush()
            for layout in reuse.layouts:
                namespaces[what] = layout.namespace
            reuse.generate(ids, **greedy(ids, 2))
            assert reuse.reused.tokens > 0, f"a model with another {what} does not find its own blocks"
    assert len(set(namespaces.values())) >= len(namespaces) - 1  # SHA-256 keys are longer instead


def test_weights_that_were_changed_in_place_are_other_weights(cache):
    model, ids = made(), prompt()
    with reusing(cache, model) as reuse:
        reuse.generate(ids, **greedy(ids))
        with torch.no_grad():
            model.model.layers[0].self_attn.v_proj.weight.mul_(1.5)
        truth = model.generate(ids, **greedy(ids))
        assert torch.equal(reuse.generate(ids, **greedy(ids)), truth)
        assert reuse.reused.tokens == 0


def test_adapters_have_their_own_blocks(cache):
    peft = pytest.importorskip("peft", reason="PEFT is not in this environment")
    plain, ids = made(), prompt()
    truth = plain.generate(ids, **greedy(ids))
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with reusing(cache, plain) as reuse:
        reuse.generate(ids, **greedy(ids))
        assert reuse.flush()
    model = peft.get_peft_model(made(), config, adapter_name="one")
    model.add_adapter("two", config)
    with reusing(cache, model) as reuse:
        for adapter in ("one", "two", "one"):
            model.set_adapter(adapter)
            adapted = model.generate(input_ids=ids, **greedy(ids))
            reuse.generate(ids, **greedy(ids))
            before = reuse.reused.tokens
            assert torch.equal(reuse.generate(ids, **greedy(ids)), adapted)
            assert reuse.reused.tokens == WHOLE
            assert not torch.equal(adapted, truth)
        assert before == WHOLE  # the first adapter was found again
        with model.disable_adapter():
            assert torch.equal(reuse.generate(ids, **greedy(ids)), truth)
            assert reuse.reused.tokens == WHOLE  # the plain model's blocks


# -- poison ------------------------------------------------------------------------------------------------------------


def test_bytes_poisoned_before_their_digest_change_the_tokens(cache):
    """Proves that stored bytes are what decides: without this, equal tokens could come from computing everything."""
    model, ids = made(), prompt()
    truth = model.generate(ids, **greedy(ids))
    past = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=past, use_cache=True)
    for layer in past.layers:
        layer.values.neg_()
    with reusing(cache, model) as reuse:
        assert reuse.store(past, ids[0].tolist()).wait()
        assert not torch.equal(reuse.generate(ids, **greedy(ids)), truth)
        assert reuse.reused.tokens == WHOLE


def test_bytes_poisoned_after_their_digest_are_never_used(cache):
    model, ids = made(), prompt()
    with reusing(cache, model) as reuse:
        truth = reuse.generate(ids, **greedy(ids))
        assert reuse.flush()
        poison(cache, reuse, ids, 5)
        before = corrupt(cache)
        assert torch.equal(reuse.generate(ids, **greedy(ids)), truth)
        assert reuse.reused.tokens == 5 * BLOCK
        assert corrupt(cache) > before
        # What was computed anew is stored anew.
        assert torch.equal(reuse.generate(ids, **greedy(ids)), truth)
        assert reuse.reused.tokens == WHOLE


def poison(cache, reuse, ids, block):
    """Changes bytes of a stored block in memory, after its digest was taken."""
    (layout,) = reuse.layouts
    keys = reuse._stores[0].keys(ids[0].tolist())
    with cache.core.lease_blocks_resident(keys, layout.all_parts) as lease:
        ctypes.memset(lease.buffer(block).address + layout.block_bytes // 2, 0x5A, 64)


def corrupt(cache):
    return sum(value for name, value in cache.stats().items() if "corrupt" in name)


# -- what is not reused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_beams": 2}, "num_beams"),
        ({"do_sample": True, "num_return_sequences": 2}, "num_return_sequences"),
        ({"use_cache": False}, "use_cache"),
        ({"cache_implementation": "static"}, "cache_implementation"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_calls_that_are_left_to_the_model(cache, caplog, options, reason):
    model, ids = made(), prompt()
    with reusing(cache, model) as reuse, caplog.at_level(logging.WARNING, "tiercache_connectors"):
        for _ in range(2):
            torch.manual_seed(0)
            truth = model.generate(ids, **greedy(ids) | options)
            torch.manual_seed(0)
            assert torch.equal(reuse.generate(ids, **greedy(ids) | options), truth)
            assert reuse.reused.tokens == 0
    assert sum(reason in line for line in caplog.messages) == 1, "one line a reason"


def test_a_batch_is_left_to_the_model(cache):
    model, ids = made(), torch.cat([prompt(), prompt(1)])
    with reusing(cache, model) as reuse:
        assert torch.equal(reuse.generate(ids, **greedy(ids)), model.generate(ids, **greedy(ids)))


def test_masked_tokens_are_left_to_the_model(cache):
    model, ids = made(), prompt()
    options = greedy(ids)
    options["attention_mask"][:, :20] = 0
    with reusing(cache, model) as reuse:
        for _ in range(2):
            assert torch.equal(reuse.generate(ids, **options), model.generate(ids, **options))
            assert reuse.reused.tokens == 0


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (lambda: transformers.MambaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=512), "states"),
        (
            lambda: transformers.LlamaConfig(
                **HEADS, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
            ),
            "rotary",
        ),
    ],
    ids=["mamba", "dynamic rope"],
)
def test_models_whose_prefixes_cannot_be_kept(cache, caplog, config, reason):
    torch.manual_seed(0)
    model, ids = transformers.AutoModelForCausalLM.from_config(config()).eval(), prompt()
    with caplog.at_level(logging.WARNING, "tiercache_connectors"), reusing(cache, model) as reuse:
        assert torch.equal(reuse.generate(ids, **greedy(ids)), model.generate(ids, **greedy(ids)))
        assert reuse.layouts == []
    assert len([line for line in caplog.messages if reason in line]) == 1


def test_sliding_layers_that_dropped_tokens_are_stored_as_far_as_they_go(cache):
    """A cache that forgot what left the window holds nothing to be reused as a prefix; nothing wrong comes of it."""
    model, ids = made("mistral_sliding"), prompt()
    with torch.no_grad():
        past = model(ids, use_cache=True).past_key_values
    with reusing(cache, model) as reuse:
        reuse.store(past, ids[0].tolist()).wait()
        assert torch.equal(reuse.generate(ids, **greedy(ids)), model.generate(ids, **greedy(ids)))


def test_more_tokens_than_were_computed_are_refused(cache):
    model, ids = made(), prompt()
    with torch.no_grad():
        past = model(ids[:, :100], use_cache=True).past_key_values
    with reusing(cache, model) as reuse, pytest.raises(ConfigError, match="100"):
        reuse.store(past, ids[0].tolist())


def test_a_cache_without_room_costs_nothing_but_hits(tmp_path):
    model = made()
    small = tiercache.open(str(tmp_path / "small"), memory_bytes=4 * MIB, ssd_bytes=0)
    with small as cache, reusing(cache, model) as reuse:
        for seed in range(3):
            ids = prompt(seed, 900)
            assert torch.equal(reuse.generate(ids, **greedy(ids, 2)), model.generate(ids, **greedy(ids, 2)))


def test_a_closed_cache_is_gone_around(tmp_path):
    model, ids = made(), prompt()
    cache = tiercache.open(str(tmp_path / "closed"), memory_bytes=16 * MIB, ssd_bytes=0)
    reuse = reusing(cache, model)
    truth = reuse.generate(ids, **greedy(ids))
    reuse.flush()
    cache.close()
    assert torch.equal(reuse.generate(ids, **greedy(ids)), truth)
    assert reuse.reused.tokens == 0
