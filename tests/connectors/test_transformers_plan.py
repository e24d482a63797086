"""Load or recompute in TransformersKV, and models whose KV is random."""

from __future__ import annotations

import logging

import pytest

import tiercache
from tests.connectors.conftest import MIB
from tests.unit.test_cache import HandClock, small_cache
from tests.unit.test_kv_store_faults import faulty_cache
from tiercache.errors import ConfigError
from tiercache.sync import BlockingCache, io_loop, wait
from tiercache.testing.faults import Fault, Script

torch = pytest.importorskip("torch", reason="PyTorch is not in this environment: make test runs these in .venv-torch")
transformers = pytest.importorskip("transformers", reason="transformers is not in this environment")

from tests.connectors.test_transformers_kv import BLOCK, PROMPT, WHOLE, greedy, made, poison, prompt  # noqa: E402
from tiercache_connectors.transformers_advice import WARM_UP, Advice  # noqa: E402
from tiercache_connectors.transformers_kv import TransformersKV  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]

CHEAP_S, DEAR_S = 1e-10, 1.0
"""What computing a token takes: less than any load of it, and more."""


class Timed:
    """Makes a model take so many seconds a token, by a clock that moves when told to."""

    def __init__(self, model, clock: HandClock) -> None:
        self.token_s, self._clock = DEAR_S, clock
        # Inside of the pass, as computing is.
        model.model.register_forward_pre_hook(self._take, with_kwargs=True)

    def _take(self, module, words, named) -> None:
        self._clock.now += self.token_s * named["input_ids"].shape[1]


@pytest.fixture(autouse=True)
def _two_threads():
    torch.set_num_threads(2)


@pytest.fixture
def by_hand():
    """A cache of memory alone, and its clock."""
    core, clock = small_cache(64 * MIB)
    wait(core.start(), io_loop())
    with BlockingCache(core, io_loop()) as cache:
        yield cache, clock


def learnt(reuse, seeds) -> None:
    """Prefills of prompts of their own."""
    for seed in seeds:
        ids = prompt(seed)
        reuse.generate(ids, **greedy(ids, 2))
        assert reuse.reused.tokens == 0
    assert reuse.flush()


def test_prefills_are_learnt_from_the_models_own_passes(by_hand):
    cache, clock = by_hand
    model = made()
    timed = Timed(model, clock)
    with TransformersKV(cache, model, name="the model") as reuse:
        (layout,) = reuse.layouts
    advice = Advice(layout, clock)
    for seed in range(WARM_UP + 1):
        assert advice.patience_s(PROMPT, 7.0) == 7.0  # nobody knows yet
        past = transformers.DynamicCache(config=model.config)
        with torch.no_grad(), advice.watching(model, past):
            model(input_ids=prompt(seed), past_key_values=past)
            model(input_ids=prompt(seed, 1), past_key_values=past)  # a decoding step says nothing
    assert advice.patience_s(PROMPT, 1e9) == pytest.approx(PROMPT * DEAR_S)
    assert advice.ask(b"\1" * 18, PROMPT).probe_stop == 18
    timed.token_s = CHEAP_S
    with torch.no_grad():
        model(input_ids=prompt(0))  # the hooks are gone: nothing is learnt here
    assert advice.patience_s(PROMPT, 1e9) == pytest.approx(PROMPT * DEAR_S)


class Queueing(torch.nn.Module):
    """A model on an accelerator: what it is given is queued, and takes its time only once somebody waits for it."""

    def __init__(self, device: str, clock: HandClock) -> None:
        super().__init__()
        self.device, self._clock = torch.device(device), clock
        self.queued_s, self.tokens = 0.0, 0

    def forward(self, tokens: int) -> None:
        self.tokens += tokens
        self.queued_s += tokens * DEAR_S

    def get_seq_length(self) -> int:
        return self.tokens

    def synchronize(self, device: object) -> None:
        assert device == self.device
        self._clock.now += self.queued_s
        self.queued_s = 0.0


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_a_pass_on_an_accelerator_lasts_from_its_own_beginning_to_its_end(by_hand, monkeypatch, kind):
    cache, clock = by_hand
    with TransformersKV(cache, made(), name="the model") as reuse:
        (layout,) = reuse.layouts
    model, advice = Queueing(f"{kind}:0", clock), Advice(layout, clock)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    monkeypatch.setattr(torch.accelerator, "synchronize", model.synchronize)
    for _ in range(WARM_UP + 2):
        model.tokens = 0
        model.queued_s = 100.0  # copies that load a prefix, say
        with advice.watching(model, model):
            model(PROMPT)
    assert advice.patience_s(PROMPT, 1e9) == pytest.approx(PROMPT * DEAR_S)


def test_a_model_beside_the_accelerator_is_not_waited_for(by_hand, monkeypatch):
    cache, clock = by_hand
    with TransformersKV(cache, made(), name="the model") as reuse:
        (layout,) = reuse.layouts
    model = Queueing("cpu", clock)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: pytest.fail("it computes on the CPU"))
    with Advice(layout, clock).watching(model, model):
        model(PROMPT)


def test_models_of_which_not_every_block_is_loaded_have_no_plan(by_hand):
    cache, clock = by_hand
    for name in ("mistral_sliding", "gemma3_hybrid"):
        with TransformersKV(cache, made(name)) as reuse:
            assert Advice.of(reuse.layouts, clock) is None


def test_what_is_computed_sooner_is_not_loaded(by_hand):
    cache, clock = by_hand
    model, ids = made(), prompt()
    timed = Timed(model, clock)
    truth = model.generate(ids, **greedy(ids))
    timed.token_s = CHEAP_S
    with TransformersKV(cache, model) as reuse:
        learnt(reuse, (0, 1, 2))
        for _ in range(3):
            assert torch.equal(reuse.generate(ids, **greedy(ids)), truth)
            assert reuse.reused.tokens == 0
            assert reuse.flush()
    with TransformersKV(cache, model, plan=False) as reuse:
        assert torch.equal(reuse.generate(ids, **greedy(ids)), truth)
        assert reuse.reused.tokens == WHOLE
    with TransformersKV(cache, model) as reuse:  # who has computed nothing yet cannot tell
        assert torch.equal(reuse.generate(ids, **greedy(ids)), truth)
        assert reuse.reused.tokens == WHOLE


def test_what_takes_long_to_compute_is_loaded(by_hand):
    cache, clock = by_hand
    model, ids = made(), prompt()
    truth = model.generate(ids, **greedy(ids))
    Timed(model, clock)
    with TransformersKV(cache, model) as reuse:
        learnt(reuse, (0, 1, 2))
        for _ in range(3):
            assert torch.equal(reuse.generate(ids, **greedy(ids)), truth)
            assert reuse.reused.tokens == WHOLE


def test_a_load_that_hangs_is_given_up_when_computing_would_be_over(tmp_path):
    """Whoever waits for all that is stored waits here until the SSD's own deadline, again and again."""
    model, ids, script = made(), prompt(0, 900), Script({})
    directory = tmp_path / "cache"
    truth = model.generate(ids, **greedy(ids, 2))
    with (
        tiercache.open(directory, memory_bytes=64 * MIB, ssd_bytes=256 * MIB, segment_bytes=8 * MIB) as cache,
        TransformersKV(cache, model, name="a model", durable=True) as reuse,
    ):
        reuse.generate(ids, **greedy(ids, 2))
        assert reuse.flush()
    with (
        faulty_cache(directory, script, stall_s=8.0, deadline_s=8.0) as cache,
        TransformersKV(cache, model, name="a model") as reuse,
    ):
        for seed in range(1, 6):
            others = prompt(seed, 900)
            reuse.generate(others, **greedy(others, 2))
        assert reuse.flush()
        script.add("read", *[Fault.STALL] * 4)
        clock = cache.core.clock
        began_s = clock.monotonic()
        assert torch.equal(reuse.generate(ids, **greedy(ids, 2)), truth)
        assert clock.monotonic() - began_s < 7  # a prefill takes a tenth of a second, or one on a busy machine
        assert reuse.reused.tokens < 900 // BLOCK * BLOCK


def test_what_lies_before_a_damaged_block_is_used(tmp_path):
    model, ids = made(), prompt()
    with tiercache.open(tmp_path, memory_bytes=64 * MIB, ssd_bytes=0) as cache:
        with TransformersKV(cache, model) as reuse:
            truth = reuse.generate(ids, **greedy(ids))
            assert reuse.flush()
            poison(cache, reuse, ids, 5)
        with TransformersKV(cache, model) as reuse:
            assert torch.equal(reuse.generate(ids, **greedy(ids)), truth)
            assert reuse.reused.tokens == 5 * BLOCK


# -- train() -----------------------------------------------------------------------------------------------------------


def test_a_model_in_train_mode_is_left_alone(tmp_path, caplog):
    model, ids = made(attention_dropout=0.5), prompt()
    with (
        tiercache.open(tmp_path, memory_bytes=64 * MIB, ssd_bytes=0) as cache,
        TransformersKV(cache, model, plan=False) as reuse,
    ):
        model.train()
        with caplog.at_level(logging.WARNING, "tiercache_connectors"):
            for _ in range(2):
                reuse.generate(ids, **greedy(ids, 2))
                past, reused = reuse.restore(ids[0].tolist())
                assert (past.get_seq_length(), reused.tokens, reuse.reused.tokens) == (0, 0, 0)
        assert len([line for line in caplog.messages if "model.eval()" in line]) == 1
        with pytest.raises(ConfigError, match=r"train\(\) mode.*call model.eval\(\) first"):
            reuse.store(past, [])
        model.eval()
        for reused in (0, WHOLE):  # nothing random was stored
            reuse.generate(ids, **greedy(ids, 2))
            assert reuse.reused.tokens == reused
            assert reuse.flush()


def test_an_adapter_that_drops_is_in_train_mode_too(tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is not in this environment")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, lora_dropout=0.2)
    model, ids = peft.get_peft_model(made(), config), prompt()
    with (
        tiercache.open(tmp_path, memory_bytes=64 * MIB, ssd_bytes=0) as cache,
        TransformersKV(cache, model, plan=False) as reuse,
    ):
        for mode, reused in ((True, 0), (True, 0), (False, 0), (False, WHOLE)):
            model.train(mode)
            reuse.generate(ids, **greedy(ids, 2))
            assert reuse.reused.tokens == reused
            assert reuse.flush()
