"""SGLang's storage interface: that ours is what SGLang asks for, and that pages come back as they were.

The base class, its factory and its values are SGLang's own (installed without its dependencies). The host pools are
made here, in the shapes that SGLang gives its own: those cannot be imported without the GPU packages.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import inspect
import json
import logging
import sys
import types
from dataclasses import dataclass, field

import pytest

from tests.connectors.conftest import MIB
from tiercache.errors import ConfigError

torch = pytest.importorskip("torch", reason="PyTorch is not in this environment: make test runs these in .venv-torch")
if (found := importlib.util.find_spec("sglang")) is None:
    pytest.skip("SGLang is not in this environment: make test runs these in .venv-torch", allow_module_level=True)
if "sglang" not in sys.modules:
    # SGLang's top module imports everything that an engine needs; the interface itself needs none of it.
    bare = types.ModuleType("sglang")
    bare.__path__ = list(found.submodule_search_locations)
    bare.__spec__ = found
    sys.modules["sglang"] = bare

from sglang.srt.mem_cache import hicache_storage  # noqa: E402
from sglang.srt.mem_cache.hicache_storage import (  # noqa: E402
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
)
from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory  # noqa: E402

from tiercache_connectors.sglang_hicache import TierCacheHiCache  # noqa: E402

pytestmark = pytest.mark.slow

LAYERS, HEADS, DIM, PAGE, PAGES = 4, 8, 16, 16, 24
RANK, ROPE = 64, 16


def shaped(layout, heads, pages, page, dim, lead):
    """Shape of a host pool's buffer. `lead`: (2,) where K and V are apart, () for a latent."""
    return {
        "layer_first": (*lead, LAYERS, pages * page, heads, dim),
        "page_first": (*lead, pages * page, LAYERS, heads, dim),
        "page_first_direct": (*lead, pages, LAYERS, page, heads, dim),
        "page_head": (*lead, pages, heads, page, LAYERS, dim),
    }[layout]


@dataclass
class Pool:
    """A host pool: pages of `page_size` slots in `kv_buffer`, and what SGLang's say of themselves."""

    layout: str = "layer_first"
    head_num: int = HEADS
    page_size: int = PAGE
    page_num: int = PAGES
    dtype: object = torch.float32
    layer_num: int = LAYERS
    target_layer_num: int = LAYERS
    start_layer: int = 0
    storage_format_tag: str | None = None
    kv_buffer: object = field(init=False)
    lead = (2,)

    def __post_init__(self):
        shape = shaped(self.layout, self.head_num, self.page_num, self.page_size, self.width, self.lead)
        self.kv_buffer = torch.zeros(shape, dtype=self.dtype)

    @property
    def width(self):
        return DIM

    @property
    def head_dim(self):
        return DIM

    def page(self, number):
        """Everything of one page, in one order for all layouts: [kv][layer][slot][head][dim]."""
        slots = slice(number * self.page_size, (number + 1) * self.page_size)
        buffer, at = self.kv_buffer, len(self.lead)
        if self.layout == "layer_first":
            return buffer[(slice(None),) * (at + 1) + (slots,)]
        if self.layout == "page_first":
            return buffer[(slice(None),) * at + (slots,)].transpose(at, at + 1)
        here = buffer.select(at, number)
        return here if self.layout == "page_first_direct" else here.permute(*range(at), at + 2, at + 1, at, at + 3)

    def get_data_page(self, index, flat=True):
        page = self.page(index // self.page_size)
        return page.flatten() if flat else page

    def get_dummy_flat_data_page(self):
        return torch.zeros_like(self.page(0)).flatten()

    def set_from_flat_data_page(self, index, data_page):
        page = self.page(index // self.page_size)
        page.copy_(data_page.reshape(page.shape))


class MHATokenToKVPoolHost(Pool):
    """Keys and values; the connector knows pools by the names of their classes."""


class MLATokenToKVPoolHost(Pool):
    """A latent with its rotated part behind it."""

    lead = ()
    kv_lora_rank = RANK
    qk_rope_head_dim = ROPE
    kv_cache_dim = RANK + ROPE

    def __init__(self, **changes):
        super().__init__(head_num=1, **changes)

    @property
    def width(self):
        return RANK + ROPE


class MambaPoolHost(Pool):
    """States, which nobody but the same kind of engine can read."""


def config(tmp_path, **changes):
    extra = {
        "backend_name": "tiercache",
        "module_path": "tiercache_connectors.sglang_hicache",
        "class_name": "TierCacheHiCache",
        "interface_v1": 1,
        "directory": str(tmp_path / "cache"),
        "model": "weights-of-the-test",
        "settings": {"memory_bytes": 64 * MIB, "ssd_bytes": 0},
    }
    extra |= changes.pop("extra", {})
    told = {
        "tp_rank": 0,
        "tp_size": 1,
        "pp_rank": 0,
        "pp_size": 1,
        "attn_cp_rank": 0,
        "attn_cp_size": 1,
        "is_mla_model": False,
        "enable_storage_metrics": False,
        "is_page_first_layout": False,
        "model_name": "a-model",
        "extra_config": {name: value for name, value in extra.items() if value is not None},
    }
    return HiCacheStorageConfig(**told | changes)


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Says to SGLang's own processes what it was started with, as its runtime does: by default a model with an empty
    configuration. Answers the directory of that model."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    plain = {"json_model_override_args": "{}", "quantization": None, "load_format": "auto", "revision": None}

    def start(path=None, **changes):
        args = types.SimpleNamespace(
            **plain | {"context_length": None, "model_path": str(model) if path is None else str(path)} | changes
        )
        runtime = types.SimpleNamespace(get_server_args=lambda: args)
        monkeypatch.setitem(sys.modules, "sglang.srt.runtime_context", runtime)
        return model

    start()
    return start


@pytest.fixture
def backend(tmp_path, started):
    """Makes backends as SGLang's factory does, over one cache."""
    made = []

    def make(pool=None, **changes):
        one = StorageBackendFactory.create_backend("dynamic", config(tmp_path, **changes), pool)
        if pool is not None:
            one.register_mem_pool_host(pool)
        one.on_host_pools_registered()
        made.append(one)
        return one

    yield make
    for one in made:
        one.close()


def hashes(count, seed=0):
    """Page hashes as SGLang makes them: 64 hex digits, each over its predecessor."""
    digest, made = str(seed).encode(), []
    for i in range(count):
        digest = hashlib.sha256(digest + bytes([i])).digest()
        made.append(digest.hex())
    return made


def slots(pages):
    return torch.cat([torch.arange(page * PAGE, (page + 1) * PAGE) for page in pages])


def fill(pool, seed=1):
    torch.manual_seed(seed)
    pool.kv_buffer.copy_(torch.randn(pool.kv_buffer.shape))
    return pool


# -- the interface -----------------------------------------------------------------------------------------------------


def test_it_is_a_backend_of_sglangs_own_factory(backend):
    one = backend()
    assert isinstance(one, HiCacheStorage)
    assert isinstance(one, TierCacheHiCache)
    assert not inspect.isabstract(type(one))


def test_every_method_takes_what_sglang_gives():
    """Names and order of arguments are those of the base class in this version of SGLang."""
    for name, theirs in inspect.getmembers(HiCacheStorage, inspect.isfunction):
        if name.startswith("__"):
            continue
        ours = getattr(TierCacheHiCache, name)
        mine, wanted = inspect.signature(ours).parameters, inspect.signature(theirs).parameters
        assert list(mine)[: len(wanted)] == list(wanted), name
        for parameter in wanted.values():
            if parameter.default is not inspect.Parameter.empty:
                assert mine[parameter.name].default is not inspect.Parameter.empty, (name, parameter.name)
        for extra in list(mine)[len(wanted) :]:
            assert mine[extra].default is not inspect.Parameter.empty, (name, extra)


def test_nothing_of_the_interface_is_left_to_the_base_class():
    own = {name for name, _ in inspect.getmembers(HiCacheStorage, inspect.isfunction) if not name.startswith("_")}
    left = {name for name in own if getattr(TierCacheHiCache, name) is getattr(HiCacheStorage, name)}
    assert left <= {"on_host_pools_registered", "get_stats"}


def test_sglangs_failure_injector_can_wrap_it(backend):
    wrapped = hicache_storage.HiCacheStorageFailureInjector(backend(fill(MHATokenToKVPoolHost())), 0.0, 0.0)
    keys = hashes(2)
    assert wrapped.batch_set_v1(keys, slots([0, 1])) == [True, True]
    assert wrapped.batch_exists(keys) == 2


# -- pages -------------------------------------------------------------------------------------------------------------

MHA = ("layer_first", "page_first", "page_first_direct", "page_head")
MLA = ("layer_first", "page_first", "page_first_direct")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kind", "written", "read"),
    [(MHATokenToKVPoolHost, a, b) for a in MHA for b in MHA] + [(MLATokenToKVPoolHost, a, b) for a in MLA for b in MLA],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_page_written_in_one_layout_is_read_in_any_other(backend, kind, written, read, dtype):
    source, target = fill(kind(layout=written, dtype=dtype)), kind(layout=read, dtype=dtype)
    mla = kind is MLATokenToKVPoolHost
    keys, whence, whither = hashes(5), [3, 1, 20, 7, 0], [2, 9, 4, 11, 23]
    writer, reader = backend(source, is_mla_model=mla), backend(target, is_mla_model=mla)
    assert reader.batch_exists(keys) == 0
    assert writer.batch_set_v1(keys, slots(whence)) == [True] * 5
    assert reader.batch_exists(keys) == 5
    assert reader.batch_get_v1(keys, slots(whither)) == [True] * 5
    for a, b in zip(whence, whither):
        assert torch.equal(target.page(b), source.page(a))
    untouched = set(range(PAGES)) - set(whither)
    assert all(not target.page(page).any() for page in untouched)


@pytest.mark.parametrize("ranks_in", [1, 2, 4, 8])
@pytest.mark.parametrize("ranks_out", [1, 2, 8])
def test_ranks_of_one_parallelism_read_what_those_of_another_wrote(backend, ranks_in, ranks_out):
    whole, keys = fill(MHATokenToKVPoolHost()), hashes(3)
    for rank in range(ranks_in):
        part = MHATokenToKVPoolHost(head_num=HEADS // ranks_in, layout=MHA[rank % 4])
        own = slice(rank * part.head_num, (rank + 1) * part.head_num)
        for page in range(3):
            part.page(page).copy_(whole.page(page)[..., own, :])
        writer = backend(part, tp_rank=rank, tp_size=ranks_in)
        assert writer.batch_set_v1(keys, slots([0, 1, 2])) == [True] * 3
    for rank in range(ranks_out):
        part = MHATokenToKVPoolHost(head_num=HEADS // ranks_out)
        own = slice(rank * part.head_num, (rank + 1) * part.head_num)
        reader = backend(part, tp_rank=rank, tp_size=ranks_out)
        assert reader.batch_exists(keys) == 3
        assert reader.batch_get_v1(keys, slots([5, 6, 7])) == [True] * 3
        for page in range(3):
            assert torch.equal(part.page(5 + page), whole.page(page)[..., own, :])


def test_pages_that_follow_a_stored_prefix(backend):
    pool = fill(MHATokenToKVPoolHost())
    one, keys = backend(pool), hashes(6)
    start, later = HiCacheStorageExtraInfo(prefix_keys=[]), HiCacheStorageExtraInfo(prefix_keys=keys[:4])
    assert one.batch_set_v1(keys[:4], slots(range(4)), start) == [True] * 4
    assert one.batch_set_v1(keys[4:], slots([4, 5]), later) == [True] * 2
    assert one.batch_exists(keys, start) == 6
    assert one.batch_exists(keys, HiCacheStorageExtraInfo()) == 6  # as SGLang asks at the start of a sequence
    assert one.batch_get_v1(keys[:2], slots([12, 13]), HiCacheStorageExtraInfo()) == [True] * 2
    assert one.batch_exists(keys[4:], later) == 2
    assert one.batch_get_v1(keys[4:], slots([10, 11]), later) == [True] * 2
    assert torch.equal(pool.page(11), pool.page(5))
    # Without a stored predecessor a page is no part of a chain.
    assert one.batch_set_v1(hashes(2, 7)[1:], slots([0]), HiCacheStorageExtraInfo(prefix_keys=hashes(1, 7))) == [False]


def test_pages_whose_predecessors_sglang_does_not_say(backend):
    pool = fill(MHATokenToKVPoolHost())
    one, keys = backend(pool), hashes(6)
    assert one.batch_set_v1(keys, slots(range(6))) == [True] * 6
    assert one.batch_exists(keys) == 6
    assert one.batch_exists(keys[4:]) == 2
    assert one.batch_get_v1(keys[3:], slots([10, 11, 12])) == [True] * 3
    assert torch.equal(pool.page(12), pool.page(5))


def test_pages_that_are_not_stored_are_said_to_be(backend):
    one = backend(fill(MHATokenToKVPoolHost()))
    keys = hashes(4)
    one.batch_set_v1(keys[:2], slots([0, 1]))
    assert one.batch_exists(keys) == 2
    assert one.batch_get_v1(keys, slots([8, 9, 10, 11])) == [True, True, False, False]
    assert one.batch_get_v1(hashes(2, seed=9), slots([8, 9])) == [False, False]


@pytest.mark.parametrize("interface", [0, 1])
def test_flat_pages(backend, interface):
    pool = fill(MHATokenToKVPoolHost(storage_format_tag="packed" if interface else None))
    one, keys = backend(pool, extra={"interface_v1": interface}), hashes(3)
    pages = [pool.get_data_page(i * PAGE) for i in range(3)]
    assert one.batch_set(keys, pages)
    assert one.exists(keys[0])
    assert one.batch_exists(keys) == 3
    targets = [pool.get_dummy_flat_data_page() for _ in keys]
    got = one.batch_get(keys, targets)
    assert all(a is b for a, b in zip(got, targets))
    assert all(torch.equal(a, b) for a, b in zip(got, pages))
    assert one.set("one more", pages[1])
    assert torch.equal(one.get("one more", pool.get_dummy_flat_data_page()), pages[1])
    assert one.get("not there", pool.get_dummy_flat_data_page()) is None


def test_pools_of_a_hybrid_model(backend):
    kv, states = fill(MHATokenToKVPoolHost()), fill(MambaPoolHost(), seed=2)
    one, keys = backend(kv), hashes(6)
    one.register_mem_host_pool_v2(kv, PoolName.KV)
    one.register_mem_host_pool_v2(states, PoolName.MAMBA)
    stored = one.batch_set_v2(
        [
            PoolTransfer(PoolName.KV, host_indices=slots(range(6)), keys=keys),
            PoolTransfer(PoolName.MAMBA, host_indices=slots([3]), keys=[keys[3]]),
        ]
    )
    assert stored == {PoolName.KV: [True] * 6, PoolName.MAMBA: [True]}
    asked = PoolTransfer(PoolName.MAMBA, keys=keys[-1:], hit_policy=PoolHitPolicy.TRAILING_PAGES)
    result = one.batch_exists_v2(keys, [asked])
    assert (result.kv_hit_pages, result.restorable_prefix_pages) == (4, [4])
    assert result.extra_pool_hit_pages == {PoolName.KV: 6, PoolName.MAMBA: 4}
    everything = PoolTransfer(PoolName.MAMBA, keys=keys, hit_policy=PoolHitPolicy.ALL_PAGES)
    assert one.batch_exists_v2(keys, [everything]).kv_hit_pages == 0
    assert one.batch_exists_v2(keys).kv_hit_pages == 6
    got = one.batch_get_v2([PoolTransfer(PoolName.MAMBA, host_indices=slots([9]), keys=[keys[3]])])
    assert got == {PoolName.MAMBA: [True]}
    assert torch.equal(states.page(9), states.page(3))


# -- nobody gets another's pages ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"extra": {"model": "other-weights"}},
        {"extra": {"revision": "2"}},
        {"extra": {"salt": "tenant"}},
    ],
    ids=json.dumps,
)
@pytest.mark.parametrize("interface", [0, 1])
def test_other_weights_never_meet(backend, change, interface):
    change = {"extra": change["extra"] | {"interface_v1": interface}}
    pool, keys = fill(MHATokenToKVPoolHost()), hashes(2)
    writer, reader = backend(pool, extra={"interface_v1": interface}), backend(fill(MHATokenToKVPoolHost()), **change)
    if interface:
        writer.batch_set_v1(keys, slots([0, 1]))
    else:
        writer.batch_set(keys, [pool.get_data_page(0), pool.get_data_page(PAGE)])
    assert writer.batch_exists(keys) == 2
    assert reader.batch_exists(keys) == 0


@pytest.mark.parametrize(
    "told",
    [
        {"json_model_override_args": '{"rope_theta": 500000.0}'},
        {"quantization": "fp8"},
        {"load_format": "dummy"},
    ],
    ids=json.dumps,
)
def test_what_sglang_makes_of_the_weights_makes_others(backend, started, told):
    """What it was told is known to its own processes alone: its storage's configuration does not say."""
    pool, keys = fill(MHATokenToKVPoolHost()), hashes(2)
    assert all(backend(pool).batch_set_v1(keys, slots([0, 1])))
    assert backend(pool).batch_exists(keys) == 2
    started(**told)
    assert backend(pool).batch_exists(keys) == 0


def test_the_weights_are_those_that_were_loaded_whatever_they_are_served_as(backend, started, tmp_path):
    """Another model lies where the name leads that this one is served by: they must not meet."""
    other, keys = tmp_path / "other", hashes(2)
    for model, byte in ((started(), b"1"), (other, b"2")):
        model.mkdir(exist_ok=True)
        (model / "config.json").write_text("{}")
        (model / "model.safetensors").write_bytes(byte)
    told = {"model_name": str(other), "extra": {"model": None}}
    assert all(backend(fill(MHATokenToKVPoolHost()), **told).batch_set_v1(keys, slots([0, 1])))
    assert backend(fill(MHATokenToKVPoolHost()), **told).batch_exists(keys) == 2
    started(other)
    assert backend(fill(MHATokenToKVPoolHost()), **told).batch_exists(keys) == 0


def test_the_layout_is_that_of_the_model_that_was_loaded(backend, started, tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "other").mkdir()
    facts = {"model_type": "llama", "hidden_size": HEADS * DIM, "num_attention_heads": HEADS, "rope_theta": 5e5}
    for model, layers in ((started(), LAYERS), (tmp_path / "other", 4 * LAYERS)):
        (model / "config.json").write_text(json.dumps(facts | {"num_hidden_layers": layers}))
    one = backend(fill(MHATokenToKVPoolHost()), model_name=str(tmp_path / "other"))
    layout = one._canonical["kv"][0]._alone.layout
    assert layout.layers == LAYERS
    assert "sglang" not in layout.rope  # it came from the configuration, not from the pool


def test_other_dtypes_and_page_sizes_never_meet(backend):
    keys = hashes(2)
    assert all(backend(fill(MHATokenToKVPoolHost())).batch_set_v1(keys, slots([0, 1])))
    assert backend(MHATokenToKVPoolHost(dtype=torch.float16)).batch_exists(keys) == 0
    assert backend(MHATokenToKVPoolHost(page_size=2 * PAGE)).batch_exists(keys) == 0


def test_nothing_is_found_after_clear(backend):
    pool, keys = fill(MHATokenToKVPoolHost()), hashes(2)
    one = backend(pool)
    one.batch_set_v1(keys, slots([0, 1]))
    one.clear()
    assert one.batch_exists(keys) == 0
    assert all(one.batch_set_v1(keys, slots([0, 1])))
    assert one.batch_exists(keys) == 2


# -- damage and odd pools ----------------------------------------------------------------------------------------------


def test_damaged_bytes_are_a_miss(backend, tmp_path):
    pool, keys = fill(MHATokenToKVPoolHost()), hashes(3)
    one = backend(pool)
    assert all(one.batch_set_v1(keys, slots([0, 1, 2])))
    store = one._canonical["kv"][0]._alone
    chain = store.engine_keys([bytes.fromhex(key) for key in keys])
    with one._cache.core.lease_blocks_resident(chain, store.layout.all_parts) as lease:
        ctypes.memset(lease.buffer(1).address + 100, 0x5A, 8)
    assert one.batch_get_v1(keys, slots([8, 9, 10])) == [True, False, True]
    assert torch.equal(pool.page(10), pool.page(2))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"storage_format_tag": "fp8"}, "packed"),
        ({"target_layer_num": LAYERS - 1}, "draft"),
        ({"dtype": torch.uint8}, "scales"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_pools_that_are_not_understood_are_kept_as_they_are(backend, caplog, change, reason):
    with caplog.at_level(logging.WARNING, "tiercache_connectors"):
        pool, keys = fill(MHATokenToKVPoolHost(**change)), hashes(2)
        one = backend(pool)
        assert all(one.batch_set_v1(keys, slots([0, 1])))
        assert one.batch_exists(keys) == 2
        assert all(one.batch_get_v1(keys, slots([4, 5])))
    assert torch.equal(pool.page(5), pool.page(1))
    assert sum(reason in line for line in caplog.messages) == 1


def test_slots_that_do_not_fit_are_refused(backend):
    one = backend(fill(MHATokenToKVPoolHost()))
    assert one.batch_set_v1(hashes(2), slots([0])) == [False, False]
    assert one.batch_get_v1(hashes(2), slots([0])) == [False, False]
    assert one.batch_set_v1([], slots([0])[:0]) == []


def test_weights_that_cannot_be_identified_stop_the_start(tmp_path, started):
    started()  # a model without files of weights
    with pytest.raises(ConfigError, match="model="):
        TierCacheHiCache(config(tmp_path, extra={"model": None}))


def test_a_closed_backend_misses(backend):
    one = backend(fill(MHATokenToKVPoolHost()))
    one.close()
    assert one.batch_exists(hashes(1)) == 0
