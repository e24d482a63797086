"""The scheduler's half of the vLLM connector over a real cache, with requests that have vLLM's attributes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import tiercache
from tiercache.errors import ConfigError
from tiercache.kv.groups import Model
from tiercache.kv.layout import Layout
from tiercache.kv.planes import Planes, paged
from tiercache.kv.runs import Table
from tiercache.kv.shard import Shard
from tiercache.model import Outcome
from tiercache_connectors.vllm_layout import Group, Groups, Unusable, layer_number
from tiercache_connectors.vllm_options import LoadMode, Options
from tiercache_connectors.vllm_scheduler import Scheduler
from tiercache_connectors.vllm_table import Scheduled

MIB = 1 << 20
LAYOUT = Layout("m", heads=2, layers=2, k_dim=8, v_dim=8, dtype="float32")
GROUPS = Groups((Group(LAYOUT, 0, 32, ("0", "1")),), Model([LAYOUT]), 1)
MEMORY = np.random.default_rng(0).random((2, 20, 32, 2, 16), np.float32)
PLANES = Planes(LAYOUT, Shard.whole(LAYOUT), paged(MEMORY, "lpthC", layers=range(2), heads=range(2)))


@pytest.fixture
def cache(tmp_path: Path) -> Any:
    settings = {"memory_bytes": 8 * MIB, "ssd_bytes": 0, "share": False, "disk_free_floor_bytes": MIB}
    with tiercache.open(tmp_path / "cache", **settings) as one:
        yield one


def scheduler(cache: Any, **options: Any) -> Scheduler:
    return Scheduler(GROUPS, [cache.kv(LAYOUT)], Options.of({"plan": False, **options}), 32)


def request(name: str, tokens: int, **more: Any) -> Any:
    ids = list(range(7, 7 + tokens))
    facts = {"block_hashes": [bytes([i]) * 32 for i in range(tokens // 32)], "num_computed_tokens": 0, **more}
    return SimpleNamespace(request_id=name, all_token_ids=ids, num_tokens=tokens, **facts)


def keys(one: Scheduler, asked: Any) -> list[bytes]:
    """Keys of a request as they would be saved."""
    one.begin(asked)
    one.match(asked, 0)
    return list(one._table.get(asked.request_id).keys[0])


def store(cache: Any, names: list[bytes]) -> None:
    saving = cache.kv(LAYOUT).save(names, PLANES, Table(np.arange(20), 32))
    assert set(saving.wait(10)) == {Outcome.HIT}


def image(identifier: str, offset: int, length: int) -> Any:
    return SimpleNamespace(identifier=identifier, mm_position=SimpleNamespace(offset=offset, length=length))


def test_what_is_stored_is_offered_and_where_it_is(cache: Any) -> None:
    one = scheduler(cache)
    asked = request("a", 200)
    store(cache, keys(one, asked)[:9])
    assert one.match(asked, 0) == (144, False)
    assert one.match(asked, 32) == (112, False)
    one.allocated(asked, [list(range(1, 8))], 112)
    assert one.sources(asked, 112) == (112, 0)
    assert one.match(request("never seen", 200), 0) == (0, False)
    assert one.match(asked, 160) == (0, False)


def test_modes_and_least_lengths(cache: Any) -> None:
    store(cache, keys(scheduler(cache), request("a", 200))[:9])
    for mode, later in ((LoadMode.SYNC, False), (LoadMode.ASYNC, True), (LoadMode.AUTO, False)):
        one = scheduler(cache, load=str(mode))
        asked = request("b", 200)
        one.begin(asked)
        assert one.match(asked, 0) == (144, later)
    one = scheduler(cache, min_tokens=150)
    one.begin(asked)
    assert one.match(asked, 0) == (0, False)
    asked = request("c", 200, skip_reading_prefix_cache=True)
    one = scheduler(cache)
    one.begin(asked)
    assert one.match(asked, 0) == (0, False), "who wants logprobs of the prompt computes it"


def test_what_is_computed_faster_is_not_loaded(cache: Any) -> None:
    store(cache, keys(scheduler(cache), request("a", 200))[:9])
    one = scheduler(cache, plan=True)
    asked = request("b", 200)
    one.begin(asked)
    assert one.match(asked, 0)[0] == 144, "nothing is known of prefill yet"
    one.allocated(asked, [list(range(1, 8))], 144)
    (load,) = one.step(planned()).loads
    assert load.deadline_s == 0, "so there is nothing to give it up for"
    one.heard(set(), (), (), 1, {"b": 0.001})
    for number in range(2, 20):
        learn(one, number, 1e-6)
    assert one.match(asked, 0) == (0, False)
    for number in range(20, 60):
        learn(one, number, 30.0)
    assert one.match(asked, 0)[0] == 144
    one.allocated(asked, [list(range(1, 8))], 144)
    (load,) = one.step(planned()).loads
    assert 0 < load.deadline_s < 30
    one.finished(asked, [list(range(1, 8))])
    assert not one._known


def planned() -> Any:
    """A step of vLLM that runs nothing."""
    cached = SimpleNamespace(req_ids=[], resumed_req_ids=set(), num_computed_tokens=[], new_block_ids=[])
    return SimpleNamespace(scheduled_new_reqs=[], scheduled_cached_reqs=cached, num_scheduled_tokens={})


def learn(one: Scheduler, number: int, seconds: float) -> None:
    """A prefill of 192 tokens took so long."""
    one._advice.began(number, Scheduled("x", 0, 192, 192), 0.0)
    one._advice.ended(number, seconds)


def test_what_else_decides_the_bytes_is_in_the_keys(cache: Any, tmp_path: Path) -> None:
    one = scheduler(cache)
    for number, text in enumerate(("x", "x", "y")):
        (tmp_path / f"lora{number}").mkdir()
        (tmp_path / f"lora{number}" / "adapter_model.safetensors").write_text(text)

    def adapter(number: int) -> Any:
        return SimpleNamespace(lora_int_id=1 + number, lora_name="l", lora_path=str(tmp_path / f"lora{number}"))

    plain = keys(one, request("plain", 100))
    seen = {
        "salt": keys(one, request("s", 100, cache_salt="s")),
        "lora": keys(one, request("l0", 100, lora_request=adapter(0))),
        "other lora": keys(one, request("l2", 100, lora_request=adapter(2))),
        "image": keys(one, request("i", 100, mm_features=[image("i", 40, 20)])),
        "image elsewhere": keys(one, request("e", 100, mm_features=[image("i", 41, 20)])),
        "other image": keys(one, request("o", 100, mm_features=[image("j", 40, 20)])),
    }
    ends = {name: found[-1] for name, found in seen.items()} | {"plain": plain[-1]}
    assert len(set(ends.values())) == len(ends), ends
    assert keys(one, request("l1", 100, lora_request=adapter(1))) == seen["lora"], "equal weights, wherever they lie"
    assert seen["image"][:2] == plain[:2], "what is before the image is as without it"
    assert seen["image"][2] != plain[2]


def test_what_cannot_be_known_is_not_reused(cache: Any) -> None:
    one = scheduler(cache)
    for number, more in enumerate(({"prompt_embeds": object()}, {"resumable": True})):
        asked = request(f"r{number}", 100, **more)
        one.begin(asked)
        assert one.match(asked, 0) == (0, False)
        assert not one.finished(asked, [[]])
    unknown = SimpleNamespace(lora_int_id=1, lora_name="hub", lora_path="nobody/knows")
    asked = request("hub", 100, lora_request=unknown)
    one.begin(asked)
    assert one.match(asked, 0) == (0, False)


def test_a_reset_leaves_everything_behind(cache: Any) -> None:
    one = scheduler(cache)
    asked = request("a", 200)
    store(cache, keys(one, asked))
    one.reset()
    again = request("b", 200)
    one.begin(again)
    assert one.match(again, 0) == (0, False)
    assert one.match(asked, 0) == (0, False), "a request from before it"
    assert scheduler(cache)._table is not one._table
    other = scheduler(cache)
    other.begin(again)
    assert other.match(again, 0)[0] == 192


def test_routers_hear_when_every_rank_has_it_and_when_it_is_gone(cache: Any) -> None:
    one = scheduler(cache)
    asked = request("a", 200)
    found = keys(one, asked)
    store(cache, found[:8])
    one.stored("a", 0, 2, 8)
    assert not one.events(), "one rank of two"
    one.stored("a", 1, 2, 7)
    (event,) = one.events()
    assert (event.stored, event.hashes, event.parent) == (True, asked.block_hashes[:3], None)
    assert event.tokens == asked.all_token_ids[:96]
    one.stored("a", 1, 2, 12)
    (event,) = one.events()
    assert (event.hashes, event.parent) == (asked.block_hashes[3:4], asked.block_hashes[2])
    one.match(asked, 0)
    assert not one.events()
    cache.delete([found[2]])
    import asyncio

    call = cache.core.call("evict", {"down_to": 0})
    asyncio.run_coroutine_threadsafe(call, cache.loop).result(10)
    one.match(asked, 0)
    (event,) = one.events()
    assert (event.stored, event.hashes) == (False, asked.block_hashes[:4])


def test_a_closed_cache_is_a_miss(cache: Any) -> None:
    one = scheduler(cache)
    asked = request("a", 200)
    store(cache, keys(one, asked))
    cache.close()
    assert one.match(asked, 0) == (0, False)
    assert one.counts["unanswered_queries"] >= 1


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"dirctory": "x"}, "dirctory"),
        ({"load": "never"}, "load must be one of auto, sync, layerwise, async"),
        ({"block_tokens": "16"}, "block_tokens .* must be like 16"),
        ({"fence_s": -1.0}, "must not be negative"),
        ({"durable": 1}, "must be like False"),
    ],
)
def test_options_that_mean_nothing_are_refused(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Options.of(extra)


def test_options_and_settings_share_a_table() -> None:
    told = Options.of({"directory": "/d", "memory_bytes": "1 GiB", "load_deadline_s": 3, "spec_name": "vLLM's own"})
    assert told.load_deadline_s == 3
    assert dict(told.settings) == {"directory": "/d", "memory_bytes": "1 GiB"}


def test_names_of_layers_say_which_they_are() -> None:
    assert layer_number("model.layers.12.self_attn.attn") == 12
    assert layer_number(".layers.0.self_attn.attn") == 0
    for name in ("encoder.attn", "model.layers.1.blocks.2.attn"):
        with pytest.raises(Unusable):
            layer_number(name)
