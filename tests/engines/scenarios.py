"""What happens in one process with engines: `python -m tests.engines.scenarios NAME ARGUMENTS`, told as JSON lines.

Every scenario yields cases: what was done, how many tokens came from the cache, and whether the tokens that came out
are those of an engine without a connector. A scenario that yields None is where its process may be killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.engines.engine import MIB, SETTINGS, STEPS_MAX, Engine, prompt

LONG, OTHER = prompt(300), prompt(150) + prompt(100, 7)
"""OTHER shares half of LONG."""


MODES = ("sync", "layerwise", "async")
ALONE = {"share": False}


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    name: str
    ok: bool
    hits: int = 0
    equal: bool | None = None
    note: str = ""


def case(name: str, engine: Engine, equal: bool, *, least: int = 1, note: str = "") -> Case:
    """Tokens must be equal, with at least so many from the cache."""
    return Case(name, equal and engine.hits >= least, engine.hits, equal, note)


def corruptions(directory: str, **settings: Any) -> float:
    """What the cache of this process, or its owner, has counted."""
    import tiercache

    with tiercache.open(directory, **{**SETTINGS, **settings}) as cache:
        return sum(value for name, value in cache.stats().items() if name.startswith("tiercache_corruptions_total"))


def flush(directory: str, **settings: Any) -> None:
    import tiercache

    with tiercache.open(directory, **{**SETTINGS, **settings}) as cache:
        cache.flush()


# -- scenarios: (model, directory, expected tokens, ...) -> cases


def write(model: str, directory: str, told: dict[str, Any]) -> Iterator[Case | None]:
    """An engine without a connector says what is right; others store, rightly and poisoned. Then the process dies."""
    with Engine(model) as engine:
        tokens = {"long": engine.tokens([LONG])[0], "other": engine.tokens([OTHER])[0]}
    Path(f"{directory}.tokens").write_text(json.dumps(tokens))
    extra = {"directory": f"{directory}/good", **ALONE, **told}
    with Engine(model, extra) as engine:
        first = engine.tokens([LONG])[0]
        yield Case("store", first == tokens["long"] and engine.hits == 0, 0, first == tokens["long"])
        engine.settle()
        flush(extra["directory"], **ALONE)
    set_faults({"poison": 1})
    extra["directory"] = f"{directory}/poisoned"
    with Engine(model, extra, door="faulty") as engine:
        first = engine.tokens([LONG])[0]
        yield Case("store, poisoned before digests", first == tokens["long"], 0, first == tokens["long"])
        engine.settle()
        flush(extra["directory"], **ALONE)
        yield None


def read(model: str, directory: str, told: dict[str, Any]) -> Iterator[Case]:
    """Another process finds what was stored; in every mode of loading; poison is seen or healed."""
    tokens = expected(directory)
    good = {"directory": f"{directory}/good", **ALONE, **told}
    for mode in told.pop("modes", MODES):
        with Engine(model, {**good, "load": mode}) as engine:
            equal = engine.tokens([LONG])[0] == tokens["long"] and engine.tokens([OTHER])[0] == tokens["other"]
            yield case(f"load {mode}", engine, equal, least=288)
    with Engine(model, {**good, "directory": f"{directory}/poisoned"}) as engine:
        differs = engine.tokens([LONG])[0] != tokens["long"]
        yield Case("poison before digests", differs and engine.hits >= 288, engine.hits, not differs)
    before = corruptions(good["directory"], **ALONE)
    assert not before
    set_faults({"damage": 1})
    with Engine(model, good, door="faulty") as engine:
        equal = engine.tokens([LONG])[0] == tokens["long"]
        found = corruptions(good["directory"], **ALONE)
        one = case("poison after digests", engine, equal, least=288, note=f"{found:.0f} corrupt")
        yield Case(one.name, one.ok and found > 0, one.hits, one.equal, one.note)


def sizes(model: str, directory: str, told: dict[str, Any]) -> Iterator[Case]:
    """Engines with other pages, and without a prefix cache of their own, read the same blocks and each other's."""
    tokens = expected(directory)
    good = {"directory": f"{directory}/good", **ALONE, **told}
    with Engine(model, good, block_size=128) as engine:
        equal = engine.tokens([LONG])[0] == tokens["long"] and engine.tokens([OTHER])[0] == tokens["other"]
        yield case("block_size 128 reads 32", engine, equal, least=288)
    back = {**good, "directory": f"{directory}/pages"}
    with Engine(model, back, block_size=128) as engine:
        engine.tokens([LONG])
        engine.settle()
    with Engine(model, back, block_size=32, enable_prefix_caching=False) as engine:
        equal = engine.tokens([LONG])[0] == tokens["long"]
        yield case("block_size 32 reads 128, no local cache", engine, equal, least=288)


def faults(model: str, directory: str, told: dict[str, Any]) -> Iterator[Case]:
    """Loads that fail at random, in memory alone so that nothing heals them, for many requests at once."""
    prompts = [prompt(120 + 40 * (i % 4), i % 5) + prompt(30, 100 + i) for i in range(12)]
    with Engine(model) as engine:
        right = engine.tokens(prompts, 12)
    for mode in MODES:
        for share in (0.3, 1.0):
            set_faults({"damage": share, "seed": 3})
            extra = {"directory": f"{directory}/faults-{mode}-{share}", **ALONE, "load": mode, "ssd_bytes": 0, **told}
            with Engine(model, extra, door="faulty", enable_prefix_caching=False) as engine:
                engine.tokens(prompts, 12)
                engine.settle()
                equal = engine.tokens(prompts, 12) == right and engine.tokens(prompts[::-1], 12) == right[::-1]
                bad = corruptions(extra["directory"], **ALONE, ssd_bytes=0)
                failed = engine.metric("vllm:tiercache_failed_blocks")
                one = case(f"{share:.0%} of loads fail, {mode}", engine, equal, note=f"{failed:.0f} blocks failed")
                yield Case(one.name, one.ok and bad > 0 and failed > 0, one.hits, one.equal, one.note)


def pressure(model: str, directory: str, told: dict[str, Any]) -> Iterator[Case]:
    """More requests than the engine has pages for: preemption; requests that are aborted on the way."""
    prompts = [prompt(200, i) for i in range(6)]
    options: dict[str, Any] = {"kv_cache_memory_bytes": 3 * MIB, "max_model_len": 512, "enable_prefix_caching": False}
    with Engine(model, **options) as engine:
        right = engine.tokens(prompts, 60)
        assert engine.metric("vllm:num_preemptions") > 0, "the engine has too many pages for this test"
    for mode in ("sync", "async"):
        extra = {"directory": f"{directory}/pressure-{mode}", **ALONE, "load": mode, **told}
        with Engine(model, extra, **options) as engine:
            equal = engine.tokens(prompts, 60) == right and engine.tokens(prompts[::-1], 60) == right[::-1]
            count = engine.metric("vllm:num_preemptions")
            yield case(f"preemption, {mode}", engine, equal, note=f"{count:.0f} preemptions")
            abort_some(engine, prompts)
            equal = engine.tokens(prompts, 60) == right
            yield case(f"requests aborted, {mode}", engine, equal)
            yield from leaks(engine, mode)


def abort_some(engine: Engine, prompts: list[list[int]]) -> None:
    """Requests that are given up after 0, 1, 2 ... steps, while others go on."""
    from vllm import SamplingParams

    inner = engine.llm.llm_engine
    asked = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    names = []
    for number, each in enumerate([*prompts, *prompts]):
        names.append(inner.add_request(f"aborted-{number}", {"prompt_token_ids": each}, asked) or f"aborted-{number}")
        inner.step()
        if number % 2:
            inner.abort_request([names[number - 1]])
    inner.abort_request(names)
    while inner.has_unfinished_requests():
        inner.step()


def leaks(engine: Engine, mode: str) -> Iterator[Case]:
    """Nothing is held when nothing is under way: pages of the engine, rows of the table, leases of the cache."""
    engine.settle()
    engine.settle()
    core = engine.llm.llm_engine.engine_core.engine_core
    scheduler = core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    held = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
    connector = scheduler.get_kv_connector()
    rows = len(connector._scheduler._table)
    leases = connector._cache.stats().get("tiercache_leases", 0)
    # What was asked last may wait for its word until the next step.
    yield Case(f"nothing leaks, {mode}", held <= 1 and rows <= 1 and not leases, note=f"{held} pages, {leases} leases")


def groups(model: str, directory: str, told: dict[str, Any]) -> Iterator[Case]:
    """A model with sliding windows: several groups of layers, each with its own rule."""
    prompts = [LONG, OTHER]
    with Engine(model) as engine:
        right = engine.tokens(prompts)
    extra = {"directory": f"{directory}/groups", **ALONE, **told}
    with Engine(model, extra) as engine:
        equal = engine.tokens([LONG])[0] == right[0]
        engine.settle()
        yield Case("store", equal, 0, equal)
    with Engine(model, extra) as engine:
        equal = engine.tokens([LONG])[0] == right[0] and engine.tokens([OTHER])[0] == right[1]
        yield case("load, windows and full", engine, equal, least=288)
    set_faults({"damage": 0.5})
    with Engine(model, {**extra, "directory": f"{directory}/groups2", "ssd_bytes": 0}, door="faulty") as engine:
        engine.tokens([LONG])
        engine.settle()
        engine.llm.reset_prefix_cache()
        equal = engine.tokens([LONG])[0] == right[0]
        yield case("loads fail, windows and full", engine, equal)


def shared(model: str, directory: str, told: dict[str, Any]) -> Iterator[Case | None]:
    """An engine of several processes (scheduler and worker apart from this one), by way of the directory's owner."""
    least = 288 if told.pop("again", False) else 0
    extra = {"directory": f"{directory}/shared", **told}
    tokens = expected(directory)
    with Engine(model, extra) as engine:
        equal = engine.tokens([LONG])[0] == tokens["long"]
        yield Case("several processes", equal and engine.hits >= least, engine.hits, equal)
        engine.settle_saved(0 if least else 18)
        equal = engine.tokens([OTHER])[0] == tokens["other"]
        yield case("several processes, shared prefix", engine, equal, least=16)
        engine.settle()
        flush(extra["directory"])
        yield None


def owner_dies(model: str, directory: str, told: dict[str, Any]) -> Iterator[Case]:
    """The process that owns the cache is killed between requests and under one; the engine goes on."""
    import tiercache

    extra = {"directory": f"{directory}/shared", **told}
    tokens = expected(directory)
    with tiercache.open(extra["directory"], **SETTINGS) as cache, Engine(model, extra) as engine:
        for round_ in range(3):
            os.kill(owner_pid(cache), signal.SIGKILL)
            equal = engine.tokens([LONG])[0] == tokens["long"] and engine.tokens([OTHER])[0] == tokens["other"]
            yield Case(f"killed owner, round {round_ + 1}", equal, engine.hits, equal)
            engine.llm.reset_prefix_cache()
        before, equal = engine.hits, True
        for _ in range(STEPS_MAX):  # the next one takes its time to start
            equal = equal and engine.tokens([LONG])[0] == tokens["long"]
            if engine.hits > before:
                break
            engine.llm.reset_prefix_cache()
        yield case("after its death the next owner is used", engine, equal, least=before + 1)


def owner_pid(cache: Any) -> int:
    import asyncio

    told = asyncio.run_coroutine_threadsafe(cache.core.call("owner", {}), cache.loop).result(30)
    return int(told["pid"])


def tenants(model: str, directory: str, told: dict[str, Any]) -> Iterator[Case]:
    """Requests with different salts never meet; with the same one they do, across engines."""
    with Engine(model) as engine:
        (right,) = engine.tokens([LONG])
    extra = {"directory": f"{directory}/tenants", **ALONE, **told}
    seen = []
    for salts in (("", "a"), ("b", "a", "")):
        with Engine(model, extra, enable_prefix_caching=False) as engine:
            for salt in salts:
                before = engine.hits
                equal = engine.tokens([LONG], salt=salt)[0] == right
                engine.settle()
                seen.append((salt, engine.hits - before))
                yield Case(f"salt {salt!r}, engine {1 if len(seen) < 3 else 2}", equal, seen[-1][1], equal)
    wanted = [("", 0), ("a", 0), ("b", 0), ("a", 288), ("", 288)]
    with Engine(model, extra, enable_prefix_caching=False) as engine:
        engine.llm.reset_prefix_cache(reset_connector=True)
        equal = engine.tokens([LONG])[0] == right and engine.hits == 0
        engine.settle()
        equal = equal and engine.tokens([LONG])[0] == right
        yield Case("after a reset only what came after it", equal and engine.hits == 288, engine.hits, equal)
    yield Case("tenants never meet", seen == wanted, note=str(seen) if seen != wanted else "")


def told_to_others(model: str, directory: str, told: dict[str, Any]) -> Iterator[Case]:
    """What routers hear (KV events) and what is on the page of metrics."""
    from vllm.config import KVEventsConfig
    from vllm.distributed.kv_events import BlockRemoved, BlockStored

    extra = {"directory": f"{directory}/told", **ALONE, "ssd_bytes": 0, **told}
    events = KVEventsConfig(enable_kv_cache_events=True, publisher="null")
    with Engine(model, extra, kv_events_config=events) as engine:
        scheduler = engine.llm.llm_engine.engine_core.engine_core.scheduler
        heard: list[Any] = []
        scheduler.kv_event_publisher.publish = lambda batch: heard.extend(batch.events)
        engine.tokens([LONG])
        engine.settle()
        ours = [each for each in heard if isinstance(each, BlockStored) and each.medium == "CPU"]
        theirs = [each for each in heard if isinstance(each, BlockStored) and each.medium == "GPU"]
        mine = [block for each in ours for block in each.block_hashes]
        known = [block for each in theirs for block in each.block_hashes]
        tokens = [token for each in ours for token in each.token_ids]
        good = mine == known[: len(mine)] and len(mine) == 9 and tokens == LONG[:288] and ours[0].block_size == 32
        yield Case("events of stored blocks", good, note=f"{len(mine)} blocks")
        cache = scheduler.get_kv_connector()._cache
        forget_all(cache)
        heard.clear()
        engine.llm.reset_prefix_cache()
        engine.tokens([LONG])
        gone = [
            block
            for each in heard
            if isinstance(each, BlockRemoved) and each.medium == "CPU"
            for block in each.block_hashes
        ]
        yield Case("events of blocks that went away", gone == mine, note=f"{len(gone)} blocks")
        saved = engine.metric("vllm:tiercache_saved_blocks")
        yield Case("metrics", saved >= 18, note=f"{saved:.0f} blocks saved")


def forget_all(cache: Any) -> None:
    """Evicts everything from the cache's memory."""
    import asyncio

    asyncio.run_coroutine_threadsafe(cache.core.call("evict", {"down_to": 0}), cache.loop).result(30)


def ranks(model: str, directory: str, told: dict[str, Any]) -> Iterator[Case]:
    """Two tensor-parallel ranks store what one reads, and the other way; each has one of two KV heads, or all there is:
    then they are replicas."""
    tokens = expected(directory)
    for name, first, then in (("1 rank reads 2", 2, 1), ("2 ranks read 1", 1, 2)):
        extra = {"directory": f"{directory}/ranks-{first}", **told}
        bind_ranks(first)
        with Engine(model, extra, tensor_parallel_size=first) as engine:
            engine.tokens([LONG])
            engine.settle_saved(first * 18)
            flush(extra["directory"])
        bind_ranks(then)
        with Engine(model, extra, tensor_parallel_size=then) as engine:
            equal = engine.tokens([LONG])[0] == tokens["long"]
            yield case(name, engine, equal, least=288)


def bind_ranks(count: int) -> None:
    """vLLM wants a NUMA node a rank, or to be told which cores are whose."""
    cores = sorted(os.sched_getaffinity(0))
    told = "|".join(str(cores[rank % len(cores)]) for rank in range(count)) if count > 1 else "auto"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = told


def plans(model: str, directory: str, told: dict[str, Any]) -> Iterator[Case]:
    """Loads are cut where computing is faster: whatever is decided, tokens are the same."""
    prompts = [prompt(200 + 20 * i, i) for i in range(10)]
    with Engine(model) as engine:
        right = [engine.tokens([each])[0] for each in prompts]
    for mode in ("auto", "async"):
        extra = {"directory": f"{directory}/plans-{mode}", **ALONE, "load": mode, "plan": True, **told}
        with Engine(model, extra, enable_prefix_caching=False) as engine:
            equal = all([engine.tokens([each])[0] for each in prompts] == right for _ in range(4))
            asked, taken = (
                engine.metric("vllm:tiercache_queried_tokens"),
                engine.metric("vllm:tiercache_matched_tokens"),
            )
            yield case(
                f"load or recompute, {mode}", engine, equal, note=f"loaded {taken / asked:.0%} of what was asked"
            )


def offload(model: str, directory: str, told: dict[str, Any]) -> Iterator[Case]:
    """vLLM's own OffloadingConnector with our spec: opaque pages."""
    tokens = expected(directory)
    extra = {"directory": f"{directory}/offload", **ALONE}
    for step in ("store", "load"):
        with Engine(model, extra, door="offload") as engine:
            equal = engine.tokens([LONG])[0] == tokens["long"]
            engine.settle()
            equal = equal and engine.tokens([OTHER])[0] == tokens["other"]
            yield Case(f"offload spec, {step}", equal and (step == "store" or engine.hits >= 288), engine.hits, equal)
    bad = {**extra, "directory": f"{directory}/offload-poisoned"}
    set_faults({"poison": 1})
    with Engine(model, bad, door="faulty offload") as engine:
        engine.tokens([LONG])
        engine.settle()
        flush(bad["directory"], **ALONE)
    set_faults({})
    with Engine(model, bad, door="offload") as engine:
        differs = engine.tokens([LONG])[0] != tokens["long"]
        yield Case("offload spec, poison before digests", differs and engine.hits >= 288, engine.hits, not differs)
    set_faults({"damage": 1})
    healed = {**extra, "directory": f"{directory}/offload"}
    with Engine(model, healed, door="faulty offload") as engine:
        equal = engine.tokens([LONG])[0] == tokens["long"]
        found = corruptions(healed["directory"], **ALONE)
        name = "offload spec, poison after digests"
        yield Case(name, equal and found > 0, engine.hits, equal, f"{found:.0f} corrupt: not promised")


def refused(model: str, directory: str, told: dict[str, Any]) -> Iterator[Case]:
    """A cache that cannot be had, or is too small: the engine computes, and says so once."""
    tokens = expected(directory)
    blocked = Path(directory) / "file"
    blocked.parent.mkdir(parents=True, exist_ok=True)
    blocked.write_text("no directory")
    with Engine(model, {"directory": f"{blocked}/x", **ALONE}) as engine:
        equal = engine.tokens([LONG])[0] == tokens["long"]
        yield Case("a directory that cannot be", equal, engine.hits, equal)
    tiny = {"directory": f"{directory}/tiny", **ALONE, "memory_bytes": 2 * MIB, "ssd_bytes": 0}
    with Engine(model, tiny, enable_prefix_caching=False) as engine:
        equal = [engine.tokens([each])[0] for each in (LONG, OTHER, LONG, OTHER)] == [
            tokens["long"],
            tokens["other"],
        ] * 2
        yield Case("a cache much too small", equal, engine.hits, equal)


def expected(directory: str) -> dict[str, list[int]]:
    """Tokens of an engine without a connector, as `write` has left them."""
    found: dict[str, list[int]] = json.loads(Path(f"{directory}.tokens").read_text())
    return found


def set_faults(faults: dict[str, float]) -> None:
    """For faulty.py in this process, and in those that it starts."""
    os.environ["ENGINE_FAULTS"] = json.dumps(faults)
    module = sys.modules.get("tests.engines.faulty")
    if module is not None:
        module.FAULTS = faults


SCENARIOS: dict[str, Callable[[str, str, dict[str, Any]], Iterator[Case | None]]] = {
    each.__name__: each
    for each in (
        write,
        read,
        sizes,
        faults,
        pressure,
        groups,
        tenants,
        told_to_others,
        ranks,
        plans,
        shared,
        owner_dies,
        offload,
        refused,
    )
}


def main() -> None:
    name, model, directory = sys.argv[1:4]
    told = json.loads(sys.argv[4]) if len(sys.argv) > 4 else {}
    killed = told.pop("killed", False)
    for one in SCENARIOS[name](model, directory, told):
        if one is not None:
            print("CASE " + json.dumps(asdict(one)), flush=True)
        elif killed:
            print("CASE end", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    print("CASE end", flush=True)
    os._exit(0)  # engines leave threads behind that take seconds to end


if __name__ == "__main__":
    main()
