"""The doors of vLLM against its real base classes, with real memory, but no engine. Skipped where there is no vLLM:
`make test-engines` runs them in its environment."""

from __future__ import annotations

import inspect
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

pytestmark = pytest.mark.filterwarnings("ignore")

MIB = 1 << 20
SETTINGS = {
    "memory_bytes": 32 * MIB,
    "ssd_bytes": 0,
    "disk_free_floor_bytes": MIB,
    "share": False,
    "model": "m",
    "revision": "1",
}


def extra(directory: Path, **more: Any) -> dict[str, Any]:
    return {"directory": str(directory), **SETTINGS, **more}


def offloading_config(directory: Path, **more: Any) -> Any:
    from vllm.v1.kv_offload import config as c

    parallel = c.OffloadingParallelConfig(
        rank=0, world_size=1, tp_size=1, pp_size=1, pcp_size=1, dcp_size=1, data_parallel_index=0,
        data_parallel_size=1, data_parallel_rank_local=None, is_parallelism_agnostic=True,
    )  # fmt: skip
    return c.OffloadingConfig(
        groups=(c.OffloadingGroupConfig(16, ("l0", "l1"), 0),),
        worker_kv_bytes_per_block=8192,
        enable_kv_cache_events=False,
        extra_config=extra(directory, **more),
        engine_id="e",
        model=c.OffloadingModelConfig("m", "bfloat16"),
        cache=c.OffloadingCacheConfig(16, 1),
        parallel=parallel,
        kv_cache_layout="LBHNC",
    )


def engine(**model: Any) -> Any:
    """vLLM's configuration, as far as it is asked."""
    said = {"model": "m", "revision": "r", "dtype": "torch.bfloat16", "quantization": None, "hf_overrides": {}, **model}
    facts = SimpleNamespace(rope_theta=1e4, to_dict=lambda: {"rope_theta": 1e4})
    facts.get_text_config = lambda: facts
    return SimpleNamespace(model_config=SimpleNamespace(hf_config=facts, max_model_len=64, **said))


def offloading(directory: Path, vllm_config: Any, **more: Any) -> Any:
    """Made as vLLM's connector makes it, which has the engine's configuration at hand."""
    from tiercache_connectors.vllm_offload import TierCacheOffloadingSpec

    return TierCacheOffloadingSpec(offloading_config(directory, **more))


def tier_of(directory: Path, primary: Any, vllm_config: Any, **more: Any) -> Any:
    """As `offloading`."""
    from tiercache_connectors.vllm_tier import TierCacheTier

    spec = SimpleNamespace(config=offloading_config(directory))
    return TierCacheTier(spec, memoryview(primary), "TierCacheTier", **extra(directory, **more))


def name(number: int) -> bytes:
    from vllm.v1.kv_offload.base import make_offload_key

    return make_offload_key(bytes([number]) * 32, 0)


def until(ask: Any, wanted: Any, seconds: float = 10) -> None:
    """Asks again until the answer is `wanted`."""
    end = time.monotonic() + seconds
    while (found := ask()) != wanted:
        assert time.monotonic() < end, found


@pytest.mark.parametrize(
    ("module", "cls"),
    [
        ("vllm_v1", "TierCacheConnector"),
        ("vllm_offload", "TierCacheOffloadingSpec"),
        ("vllm_offload", "Books"),
        ("vllm_offload", "Mover"),
        ("vllm_tier", "TierCacheTier"),
        ("vllm_ec", "TierCacheEcConnector"),
    ],
)
def test_every_method_is_the_bases(module: str, cls: str) -> None:
    """Nothing abstract is left, and what overrides can be called as the base's method can."""
    import importlib

    one = getattr(importlib.import_module(f"tiercache_connectors.{module}"), cls)
    assert not inspect.isabstract(one)
    base = [each for each in one.__mro__[1:] if each.__module__.startswith("vllm")]
    for method, ours in inspect.getmembers(one, inspect.isfunction):
        theirs = next((vars(each)[method] for each in base if method in vars(each)), None)
        if method == "__init__" or theirs is None or not inspect.isfunction(theirs) or method not in vars(one):
            continue
        mine = inspect.signature(ours).parameters
        wanted = inspect.signature(theirs).parameters
        assert list(mine)[: len(wanted)] == list(wanted), method


def test_pages_go_to_the_cache_and_come_back(tmp_path: Path) -> None:
    from vllm.v1.kv_offload import base as b

    memory = torch.randint(-128, 127, (2, 10, 4096), dtype=torch.int8)
    tensors = [b.CanonicalKVCacheTensor(each, 4096) for each in memory]
    caches = b.CanonicalKVCaches(tensors, [[b.CanonicalKVCacheRef(0, 4096), b.CanonicalKVCacheRef(1, 4096)]])
    spec = offloading(tmp_path, engine())
    books, mover = spec.get_manager(), spec.get_worker(caches)
    request = b.ReqContext("r")
    books.on_new_request(request)
    names = [name(i) for i in range(4)]
    assert {books.lookup(each, request) for each in names} == {b.LookupResult.MISS}
    plan = books.prepare_store(names, b.ReqContext("s"))
    assert plan.keys_to_store == names
    assert books.lookup(names[0], b.ReqContext("t")) is b.LookupResult.HIT_PENDING
    assert books.prepare_store(names, request).keys_to_store == []
    assert mover.submit_store(1, b.GPULoadStoreSpec([3, 4, 5, 6], [4], [0]), plan.store_spec)
    mover.wait({1})
    (result,) = mover.get_finished()
    assert (result.job_id, result.success, result.transfer_size) == (1, True, 4 * 8192)
    books.complete_store(names, request)

    other = b.ReqContext("u")
    assert [books.lookup(each, other) for each in names] == [b.LookupResult.HIT] * 4
    assert books.lookup(name(9), other) is b.LookupResult.MISS
    books.touch(names, other)
    source = books.prepare_load(names, other)
    kept = memory[:, 3:7].clone()
    memory[:, 7:10] = 0
    mover.submit_load(2, source, b.GPULoadStoreSpec([7, 8, 9, 0], [4], [0]))
    mover.wait({2})
    assert [each.success for each in mover.get_finished()] == [True]
    assert torch.equal(memory[:, [7, 8, 9, 0]], kept)
    books.complete_load(names, other)
    for each in ("r", "s", "t", "u"):
        books.on_request_finished(b.ReqContext(each))
    assert not len(books._promises), "every lease is given back"
    mover.shutdown()
    books.shutdown()


def test_a_damaged_page_is_not_promised(tmp_path: Path) -> None:
    import ctypes

    from vllm.v1.kv_offload import base as b

    from tiercache_connectors.vllm_pages import keys_of

    memory = torch.ones((1, 4, 8192), dtype=torch.int8)
    caches = b.CanonicalKVCaches([b.CanonicalKVCacheTensor(memory[0], 8192)], [[b.CanonicalKVCacheRef(0, 8192)]])
    spec = offloading(tmp_path, engine())
    books, mover = spec.get_manager(), spec.get_worker(caches)
    plan = books.prepare_store([name(1)], b.ReqContext("r"))
    mover.submit_store(1, b.GPULoadStoreSpec([2], [1], [0]), plan.store_spec)
    mover.wait({1})
    books.complete_store([name(1)], b.ReqContext("r"))
    with books._cache.core.lease_blocks_resident(keys_of(books._store, [name(1)]), 1) as lease:
        ctypes.c_uint8.from_address(lease.buffer(0).address + 100).value ^= 1
    assert books.lookup(name(1), b.ReqContext("r")) is b.LookupResult.MISS
    assert any(value for key, value in books._cache.stats().items() if "corruptions" in key)
    mover.shutdown()
    books.shutdown()


def test_a_tier_behind_vllms_own(tmp_path: Path) -> None:
    from vllm.v1.kv_offload import base as b
    from vllm.v1.kv_offload.tiering.base import SecondaryTierManager, TransferJob

    primary = np.random.default_rng(0).integers(0, 256, (8, 8192), np.uint8)
    tier = tier_of(tmp_path, primary, engine())
    assert isinstance(tier, SecondaryTierManager)
    assert tier.block_size_bytes == 8192
    request = b.ReqContext("r")
    tier.on_new_request(request)
    names = [name(i) for i in range(3)]
    assert tier.lookup(names[0], request) is b.LookupResult.MISS
    tier.submit_store(TransferJob(7, names, np.array([1, 2, 3]), False, request))
    tier.drain_jobs()
    (result,) = tier.get_finished_jobs()
    assert (result.job_id, result.success, result.transfer_bytes) == (7, True, 3 * 8192)
    assert [tier.lookup(each, request) for each in names] == [b.LookupResult.HIT] * 3
    tier.touch(names, request)
    tier.submit_load(TransferJob(8, [*names, name(9)], np.array([4, 5, 6, 7]), True, request))
    assert tier.has_pending_work()
    tier.drain_jobs()
    (result,) = tier.get_finished_jobs()
    assert not result.success
    assert list(result.successful_keys) == names, "the one that nobody stored is said to be missing"
    assert np.array_equal(primary[4:7], primary[1:4])
    tier.on_request_finished(request)
    tier.shutdown()


def test_pages_of_engines_that_differ_never_meet(tmp_path: Path) -> None:
    """The doors ask who the engine is; tests/unit/test_vllm_pages.py has all the ways to differ."""
    primary = np.zeros((2, 8192), np.uint8)
    engines = [engine(), engine(hf_overrides={"x": 1}), engine(revision="b" * 40), engine(revision="c" * 40)]
    found = []
    for one in engines:
        said = {} if one is engines[0] or one is engines[1] else {"model": "", "revision": ""}
        spec, tier = offloading(tmp_path, one, **said), tier_of(tmp_path, primary, one, **said)
        found += [spec.layout().namespace, tier._store.layout.namespace]
        books = spec.get_manager()
        assert books._store is not None
        books.shutdown()
        tier.shutdown()
    assert len(set(found)) == len(found)


def test_an_engine_that_is_not_known_reuses_nothing(tmp_path: Path) -> None:
    from vllm.v1.kv_offload import base as b
    from vllm.v1.kv_offload.tiering.base import TransferJob

    lora = engine()
    lora.lora_config = SimpleNamespace(max_loras=1)
    memory = torch.ones((4, 8192), dtype=torch.int8)
    caches = b.CanonicalKVCaches([b.CanonicalKVCacheTensor(memory, 8192)], [[b.CanonicalKVCacheRef(0, 8192)]])
    for unknown in (None, lora):
        spec, request = offloading(tmp_path, unknown), b.ReqContext("r")
        books, mover = spec.get_manager(), spec.get_worker(caches)
        assert books.lookup(name(1), request) is b.LookupResult.MISS
        assert books.prepare_store([name(1)], request) is None
        books.on_request_finished(request)
        mover.shutdown()
        books.shutdown()
        tier = tier_of(tmp_path, np.zeros((2, 8192), np.uint8), unknown)
        tier.submit_store(TransferJob(7, [name(1)], np.array([1]), False, request))
        (result,) = tier.get_finished_jobs()
        assert (result.job_id, result.success) == (7, False)
        assert tier.lookup(name(1), request) is b.LookupResult.MISS
        tier.shutdown()


def test_encoder_outputs(tmp_path: Path) -> None:
    from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorRole

    from tiercache_connectors.vllm_ec import TierCacheEcConnector

    config = SimpleNamespace(
        ec_transfer_config=SimpleNamespace(
            is_ec_producer=True, is_ec_consumer=True, ec_connector_extra_config=extra(tmp_path)
        ),
        model_config=SimpleNamespace(model="m", dtype=torch.bfloat16),
    )
    scheduler = TierCacheEcConnector(config, ECConnectorRole.SCHEDULER)
    worker = TierCacheEcConnector(config, ECConnectorRole.WORKER)
    made = {
        "a": torch.randn(7, 32).to(torch.bfloat16),
        "b": torch.randn(3, 2, 16),
        "c": torch.zeros(0, 16, dtype=torch.float16),
    }
    assert not scheduler.has_cache_item("a")
    for each in made:
        worker.save_caches(made, each)
    request = SimpleNamespace(mm_features=[SimpleNamespace(identifier=each) for each in made])
    for index in range(3):
        scheduler.update_state_after_alloc(request, index)
    meta = scheduler.build_connector_meta(None)
    assert meta.hashes == list(made)
    assert not scheduler.build_connector_meta(None).hashes
    worker.bind_connector_metadata(meta)
    loaded: dict[str, Any] = {}
    worker.start_load_caches(loaded)
    for each, tensor in made.items():
        assert loaded[each].dtype is tensor.dtype
        assert torch.equal(loaded[each], tensor)
    assert scheduler.request_finished(request) == (False, None)
    assert not scheduler.has_cache_item("nobody made it")
    worker.clear_connector_metadata()
    worker.shutdown()
    scheduler.shutdown()


def test_a_policy_that_makes_errors_of_faults_is_warned_of() -> None:
    import logging

    from tiercache_connectors.vllm_v1 import TierCacheConnector

    said: list[str] = []

    class Heard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logger, heard = logging.getLogger("vllm.tiercache"), Heard()
    logger.addHandler(heard)
    try:
        for policy in ("recompute", "fail"):
            config = SimpleNamespace(kv_transfer_config=SimpleNamespace(kv_load_failure_policy=policy))
            TierCacheConnector._warn(SimpleNamespace(), config)
    finally:
        logger.removeHandler(heard)
    (line,) = said
    assert '"fail"' in line
    assert '"recompute"' in line


def test_it_is_no_producer_that_must_deliver() -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.base import SupportsHMA

    from tiercache_connectors.vllm_v1 import TierCacheConnector

    assert issubclass(TierCacheConnector, SupportsHMA)
    assert TierCacheConnector.requires_kv_delivery.fget(SimpleNamespace()) is False
    assert TierCacheConnector.requires_piecewise_for_cudagraph({})
    assert not TierCacheConnector.requires_piecewise_for_cudagraph({"load": "async"})
