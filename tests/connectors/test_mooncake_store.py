"""mooncake.store over tiercache: what an engine with a Mooncake connector calls, and what it is answered."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tiercache_connectors.mooncake_memory import Regions
from tiercache_connectors.mooncake_store import SHIMS, MooncakeDistributedStore, ReplicateConfig, SoftPinAction

MIB = 1 << 20
BAD, NO_ROOM, NOT_FOUND = -600, -200, -704
LONG = ("node1:1234", "P2PHANDSHAKE", 64 * MIB, 16 * MIB, "tcp", "", "127.0.0.1:50051")


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    monkeypatch.setenv("TIERCACHE_DIRECTORY", str(tmp_path / "cache"))
    monkeypatch.setenv("TIERCACHE_SSD_BYTES", "0")
    monkeypatch.setenv("TIERCACHE_LINGER_S", "0")
    return tmp_path / "cache"


@pytest.fixture
def store():
    with opened() as store:
        yield store


class opened:
    """A store that is set up, and closed at the end."""

    def __init__(self, *given, **named):
        self.given, self.named = given or (() if "config" in named else LONG), named

    def __enter__(self):
        self.store = MooncakeDistributedStore()
        assert self.store.setup(*self.given, **self.named) == 0
        return self.store

    def __exit__(self, *_):
        assert self.store.close() == 0


@pytest.fixture
def memory(store):
    """Registered memory of an engine, 4 MiB of random bytes."""
    memory = np.random.default_rng(5).integers(0, 256, 4 * MIB, np.uint8)
    assert store.register_buffer(memory.ctypes.data, memory.nbytes) == 0
    yield memory
    assert store.unregister_buffer(memory.ctypes.data) == 0


# ------------------------------------------------------------------------------------------------------------- setup


def test_before_setup_and_after_close_nothing_is_there():
    store = MooncakeDistributedStore()
    for _ in range(2):
        assert store.put("k", b"x") == BAD
        assert store.get("k") == b""
        assert store.is_exist("k") == BAD
        assert store.batch_get_into(["k"], [1], [1]) == [BAD]
        assert store.health_check() == 1
        assert store.close() == 0
        assert store.setup(*LONG) == 0
        assert store.health_check() == 0
        assert store.close() == 0


def test_setup_takes_every_form():
    with opened(
        {"local_hostname": "node1", "metadata_server": "P2PHANDSHAKE", "global_segment_size": "32 MB"}
    ) as store:
        host, _, port = store.get_hostname().partition(":")
        assert host == "node1" and 12300 <= int(port) <= 14300
        assert store.put("k", b"v") == 0
    with opened(config={"local_hostname": "node1:7", "metadata_server": "x"}) as store:
        assert store.get_hostname() == "node1:7"
    with opened(*LONG, None, enable_ssd_offload=True, ssd_offload_path="/nowhere", tenant_id="t"):
        pass
    store = MooncakeDistributedStore()
    assert store.init_all("tcp", "", 16 * MIB) == 0
    assert store.init_all("tcp", "", 16 * MIB) == BAD
    assert store.setup_dummy(16 * MIB, 16 * MIB, "127.0.0.1:50052") == 0
    assert store.close() == 0


@pytest.mark.parametrize("config", [{"local_hostname": "n"}, {"metadata_server": "m"}])
def test_setup_refuses_what_mooncake_refuses(config):
    assert MooncakeDistributedStore().setup(config) == BAD
    whole = {"local_hostname": "n", "metadata_server": "m", "global_segment_size": "50%"}
    assert MooncakeDistributedStore().setup(whole) == BAD
    with pytest.raises(TypeError):
        MooncakeDistributedStore().setup("n", "m")
    with pytest.raises(TypeError):
        MooncakeDistributedStore().setup(*LONG, no_such_thing=1)


def test_settings_win_over_the_segment_size(monkeypatch):
    with opened() as store:
        assert store._moves.cache.core.settings.memory_bytes == 64 * MIB
    monkeypatch.setenv("TIERCACHE_MEMORY_BYTES", str(32 * MIB))
    with opened() as store:
        assert store._moves.cache.core.settings.memory_bytes == 32 * MIB


def test_an_address_of_ours_names_peers():
    from tiercache_connectors.mooncake_config import Setup

    asked = Setup.of((*LONG[:4], "rdma", "mlx5_0", "tiercache://10.0.0.1:7000,10.0.0.2:7000"), {}).settings()
    assert (asked["peers"], asked["peer_transport"]) == ("10.0.0.1:7000,10.0.0.2:7000", "auto")
    assert "peers" not in Setup.of(LONG, {}).settings()


def test_tenants_do_not_see_each_other(store):
    assert store.put("k", b"mine") == 0
    with opened(*LONG, tenant_id="other") as other:
        assert other.is_exist("k") == 0
        assert other.put("k", b"its own") == 0
        assert other.remove_all() == 1
    assert store.get("k") == b"mine"


# ------------------------------------------------------------------------------------------------------- puts and gets


def test_a_value_is_put_once(store):
    assert store.put("k", b"first") == 0
    assert store.put("k", b"second") == 0
    assert store.get("k") == b"first"
    assert store.get_size("k") == 5
    assert store.remove("k") == 0
    assert store.remove("k") == NOT_FOUND
    assert store.put(key="k", value=memoryview(b"second"), config=ReplicateConfig()) == 0
    assert store.get("k") == b"second"
    assert store.upsert("k", b"third, longer") == 0
    assert store.get_buffer("k") == b"third, longer"


def test_what_is_not_there(store, memory):
    at = memory.ctypes.data
    assert store.get("none") == b""
    assert store.get_buffer("none") is None
    assert store.get_size("none") == NOT_FOUND
    assert store.is_exist("none") == 0
    assert store.get_into("none", at, 10) == NOT_FOUND
    assert store.get_replica_desc("none") == []
    assert store.batch_get_session_start(["none"]) == [NOT_FOUND]
    assert store.batch_remove(["none"]) == [NOT_FOUND]


def test_what_mooncake_refuses(store, memory):
    at = memory.ctypes.data
    assert store.put("", b"x") == BAD
    assert store.put("k", b"") == BAD
    assert store.put_batch(["a", "b"], [b"1"]) == BAD
    assert store.put_from("k", at, 0) == 0
    assert store.batch_put_from(["a", "b"], [at], [10]) == [BAD, BAD]
    assert store.batch_put_from_multi_buffers(["a"], [[at, at]], [[1]]) == [BAD]
    assert store.is_exist("a") == 0
    assert store.put_from("k", at, 100) == 0
    assert store.get_into("k", at, 99) == BAD
    assert store.batch_get_into_multi_buffers(["k"], [[at, at + 50]], [[50, 49]]) == [BAD]
    with pytest.raises(TypeError):
        store.put("k", "text")
    pinned = ReplicateConfig()
    pinned.soft_pin_ttl_ms = 5
    assert store.put("p", b"x", pinned) == BAD
    pinned.soft_pin_action = SoftPinAction.ENABLE
    assert store.put("p", b"x", pinned) == 0
    assert store.remove_by_regex(".*") == -1012


def test_without_a_local_buffer_only_addresses_serve():
    with opened(*LONG[:3], 0, *LONG[4:]) as store:
        memory = np.ones(100, np.uint8)
        assert store.put("k", b"x") == BAD
        assert store.put_from("k", memory.ctypes.data, 100) == 0


def test_batches(store):
    keys = [f"k{i}" for i in range(40)]
    values = [bytes([i]) * (i * 1000 + 1) for i in range(40)]
    assert store.put_batch(keys, values) == 0
    assert store.get_batch([*keys, "none"]) == [*values, b""]
    handles = store.batch_get_buffer(["none", *keys])
    assert handles[0] is None
    assert [bytes(one) for one in handles[1:]] == values
    assert handles[7].size() == len(handles[7]) == 6001
    assert ctypes.string_at(handles[7].ptr(), 6001) == values[6]
    assert store.batch_is_exist([keys[0], "none", *keys[1:]]) == [1, 0, *[1] * 39]
    assert store.batch_is_exist(["none", "never"]) == [0, 0]
    assert store.batch_remove([*keys[:20], "none"]) == [*[0] * 20, NOT_FOUND]
    assert store.batch_is_exist(keys) == [*[0] * 20, *[1] * 20]
    assert store.put_parts("parts", b"ab", b"", b"cd") == 0
    assert store.get("parts") == b"abcd"
    assert store.batch_put_from([], [], []) == []


@pytest.mark.parametrize("size", [1, 100, 64 << 10, (64 << 10) + 1, MIB, 2 * MIB - 4096])
def test_from_address_to_address(store, memory, size):
    at = memory.ctypes.data
    value = memory[:size].tobytes()
    assert store.put_from("k", at, size) == 0
    assert store.get_into("k", at + 2 * MIB, 2 * MIB) == size
    assert memory[2 * MIB : 2 * MIB + size].tobytes() == value
    cut = size // 3
    pieces = [[at, at + 3 * MIB]], [[size - cut, cut]]
    memory[3 * MIB : 3 * MIB + cut] = 9
    whole = memory[: size - cut].tobytes() + memory[3 * MIB : 3 * MIB + cut].tobytes()
    assert store.batch_put_from_multi_buffers(["m"], *pieces) == [0]
    memory[:] = 0
    assert store.batch_get_into_multi_buffers(["m", "none"], pieces[0] * 2, pieces[1] * 2) == [size, NOT_FOUND]
    assert memory[: size - cut].tobytes() + memory[3 * MIB : 3 * MIB + cut].tobytes() == whole
    assert store.put_from_with_metadata("meta", at, at + 3 * MIB, size, 5) == 0
    assert store.get_size("meta") == size + 5


@pytest.mark.parametrize("again", [b"B" * 999, b"A" * 999, b"A" * 1001, b"A" * 1000, b"B" * 1000, b""])
@pytest.mark.parametrize("shared", [False, True])
def test_what_somebody_else_put_anew_is_read_anew(monkeypatch, shared, again):
    monkeypatch.setenv("TIERCACHE_SHARE", str(shared))
    memory = np.frombuffer(b"A" * 1000 + b"_" * 100, np.uint8).copy()
    with opened() as store, opened() as other:
        assert store.put_from("k", memory.ctypes.data, 1000) == 0
        assert store.get_into("k", memory.ctypes.data, 1100) == 1000
        assert other.remove("k") == 0
        assert not again or other.put("k", again) == 0
        assert store.get_into("k", memory.ctypes.data, 1100) == (len(again) or NOT_FOUND)
        assert memory.tobytes()[: len(again)] == again
        assert memory.tobytes()[max(1000, len(again)) :] == b"_" * (1100 - max(1000, len(again)))
        assert again or memory.tobytes()[:1000] == b"A" * 1000
        assert store.batch_get_into(["k", "k"], [memory.ctypes.data] * 2, [1100, 10]) == (
            [len(again), BAD] if again else [NOT_FOUND] * 2
        )


def test_a_batch_of_addresses(store, memory):
    at, size = memory.ctypes.data, 100_000
    keys = [f"k{i}" for i in range(16)]
    wanted = memory[: 16 * size].copy()
    assert store.batch_put_from(keys, [at + i * size for i in range(16)], [size] * 16) == [0] * 16
    memory[:] = 0
    places = [at + (15 - i) * size for i in range(16)]
    assert store.batch_get_into([*keys, "none"], [*places, at], [size] * 17) == [*[size] * 16, NOT_FOUND]
    assert (memory[: 16 * size].reshape(16, size)[::-1] == wanted.reshape(16, size)).all()


def test_ranges(store, memory):
    at = memory.ctypes.data
    assert store.put("a", b"0123456789") == 0
    assert store.put("b", b"abcdefghij") == 0
    memory[:] = ord("_")
    answer = store.get_into_ranges(
        [at], [["a", "b", "none"]], [[[0, 20], [8], [1]]], [[[1, 7], [2], [0]]], [[[4, 4], [5], [1]]]
    )
    assert answer == [[[4, BAD], [5], [NOT_FOUND]]]
    assert memory[:14].tobytes() == b"1234____cdefg_"
    other = np.zeros(10, np.uint8)
    assert store.get_into_ranges([other.ctypes.data], [["a"]], [[[0]]], [[[0]]], [[[1]]]) == [[[BAD]]]
    assert store.batch_get_into_multi_buffer_ranges(["a"], [[at]], [[2]], [[1]]) == [BAD]
    memory[:] = ord("_")
    assert store.batch_get_session_start(["a", "b"]) == [0, 0]
    assert store.batch_get_into_multi_buffer_ranges(
        ["a", "b"], [[at, at + 4], [at + 9]], [[2, 3], [1]], [[1, 4], [9]]
    ) == [
        5,
        1,
    ]
    assert memory[:10].tobytes() == b"12__456__j"
    assert store.batch_get_into_multi_buffer_ranges(["a"], [[at]], [[2]], [[9]]) == [BAD]
    assert store.batch_get_session_end(["a", "b"]) == 0
    assert store.batch_get_into_multi_buffer_ranges(["a"], [[at]], [[2]], [[1]]) == [BAD]


def test_more_than_memory_holds(store):
    value = bytes(8 * MIB)
    assert [store.put(f"k{i}", value) for i in range(20)] == [0] * 20
    assert 0 < sum(store.batch_is_exist([f"k{i}" for i in range(20)])) < 20
    assert store.put("large", bytes(65 * MIB)) == NO_ROOM


def test_a_batch_beyond_what_one_process_may_hold(store):
    values = {f"k{i}": os.urandom(4 * MIB) for i in range(12)}
    assert store.put_batch(list(values), list(values.values())) == 0
    assert store.batch_is_exist(list(values)) == [1] * 12
    assert store.get_batch(list(values)) == list(values.values())


def test_damage_is_a_miss(store):
    assert store.put("k", b"right" * 10_000) == 0
    moves = store._moves
    with moves.cache.lease([moves.name("k")]) as lease:
        lease.buffer(0).view()[3] ^= 1
    assert store.get("k") == b""
    assert store.is_exist("k") == 0


# ---------------------------------------------------------------------------------------------------------- addresses


def test_registration(store):
    memory = mmap.mmap(-1, 4 * mmap.PAGESIZE)
    at = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert store.register_buffer(at, 4096) == 0
    assert store.register_buffer(at, 4096) == BAD
    assert store.register_buffer(at + 1, 10) == BAD
    assert store.register_buffer(at + 4096, 4096) == 0
    assert store.register_buffer(at + 8192, 0) == BAD
    assert store.unregister_buffer(at + 1) == BAD
    assert store.unregister_buffer(at) == 0
    assert store.unregister_buffer(at) == BAD


def test_what_is_no_memory_of_this_host_is_refused(store):
    """As memory of a device is: an address that this process cannot read."""
    libc = ctypes.CDLL(None)
    libc.mmap.restype, libc.munmap.argtypes = ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_size_t)
    at = libc.mmap(None, 1 << 20, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, ctypes.c_long(0))
    assert store.register_buffer(at, 1 << 20) == BAD
    assert store.register_buffer(0, 10) == BAD
    assert store.put_from("k", at, 100) == BAD
    assert store.put("k", b"x" * 100) == 0
    assert store.get_into("k", at, 100) == BAD
    assert store.batch_get_into_multi_buffers(["k"], [[at]], [[100]]) == [BAD]
    assert libc.munmap(at, 1 << 20) == 0


def test_over_rdma_only_registered_memory_serves():
    memory = np.ones(1000, np.uint8)
    at = memory.ctypes.data
    with opened(*LONG[:4], "rdma", *LONG[5:]) as store:
        assert store.put_from("k", at, 1000) == BAD
        assert store.register_buffer(at, 500) == 0
        assert store.put_from("k", at, 1000) == BAD
        assert store.put_from("k", at, 500) == 0
    regions = Regions(strict=True)
    assert regions.add(at, 500) and not regions.usable(at + 499, 2) and regions.usable(at + 499, 1)


def test_memory_for_an_engines_pool(store):
    from tiercache_connectors.mooncake_store import MooncakeHostMemAllocator

    allocator = MooncakeHostMemAllocator()
    at = allocator.alloc(1 << 20)
    ctypes.memset(at, 7, 1 << 20)
    assert store.put_from("k", at, 1 << 20) == 0
    assert allocator.free(at) == 0
    assert allocator.free(at) == -1
    assert store.get("k") == bytes([7]) * (1 << 20)
    pool = store.alloc_from_mem_pool(4096)
    assert store.get_into("k", pool, 4096) == BAD


# ----------------------------------------------------------------------------------------- threads, processes, restarts


def test_threads(store):
    barrier = threading.Barrier(8)

    def work(which):
        barrier.wait(30)
        for i in range(20):
            key, value = f"{which}.{i}", bytes([which, i]) * 20_000
            assert store.put(key, value) == 0
            assert store.put(f"common {i}", value[:1] * 10) in (0, NO_ROOM)
            assert store.get(key) == value
            assert store.remove(key) == 0
            assert store.is_exist(key) == 0

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert store.batch_is_exist([f"common {i}" for i in range(20)]) == [1] * 20


def test_removing_all_finds_what_others_put_and_a_restart_left(monkeypatch, directory):
    monkeypatch.setenv("TIERCACHE_SSD_BYTES", str(256 * MIB))
    monkeypatch.setenv("TIERCACHE_DISK_FREE_FLOOR_BYTES", "0")
    keys = [f"k{i}" for i in range(50)]
    with opened() as store:
        assert store.put_batch(keys, [key.encode() * 1000 for key in keys]) == 0
        assert store._moves.cache.flush()
    with opened() as store:
        assert store.batch_is_exist(keys) == [1] * 50
        assert store.get_replica_desc("k7")[0].is_local_disk_replica()
        assert store.get("k7") == b"k7" * 1000
        assert store.batch_get_replica_desc(["k7", "none"])["k7"][0].is_memory_replica()
        assert store.remove_all(force=True) == 50
        assert store.remove_all() == 0
        assert store.batch_is_exist(keys) == [0] * 50


def test_a_forked_child_sets_up_anew(store):
    assert store.put("k", b"x") == 0
    child = os.fork()
    if not child:
        signal.alarm(30)
        good = store.put("k2", b"x") == BAD and store.get("k") == b""
        os._exit(0 if good else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert store.get("k") == b"x"


PEER = """
import json, sys
from mooncake.store import MooncakeDistributedStore, ReplicateConfig
store = MooncakeDistributedStore()
assert store.setup("localhost", "P2PHANDSHAKE", 64 << 20, 16 << 20, "tcp", "", "127.0.0.1:50051") == 0
got = store.get("from parent")
code = store.put("from child", b"child", ReplicateConfig())
print(json.dumps([got.decode(), code, type(store).__module__]))
store.close()
"""


@pytest.mark.slow
def test_an_engine_that_imports_mooncake_in_another_process(monkeypatch, directory):
    monkeypatch.setenv("TIERCACHE_SHARE", "true")
    with opened() as store:
        assert store.put("from parent", b"parent") == 0
        asked = subprocess.run(
            [sys.executable, "-c", PEER],
            env={**os.environ, "PYTHONPATH": str(SHIMS)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert asked.returncode == 0, asked.stderr
        assert json.loads(asked.stdout) == ["parent", 0, "tiercache_connectors.mooncake_store"]
        assert store.get("from child") == b"child"
        assert store.batch_is_exist(["from child", "from parent", "neither"]) == [1, 1, 0]
        assert store.remove("from child") == 0
        assert store.remove_all() == 1


def test_the_folder_of_the_shim_is_printed():
    asked = subprocess.run(
        [sys.executable, "-m", "tiercache_connectors.mooncake_store"], capture_output=True, text=True, timeout=60
    )
    assert asked.stdout.strip() == str(SHIMS)
    assert (SHIMS / "mooncake" / "store.py").is_file()


def test_tensors(store, memory):
    torch = pytest.importorskip("torch", reason="PyTorch is not in this environment: .venv-torch has it")
    tensors = {
        "bf16": torch.randn(3, 5, 7).to(torch.bfloat16),
        "strided": torch.arange(24).reshape(4, 6).T,
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(5.0),
        "empty": torch.empty((2, 0, 3), dtype=torch.float16),
    }
    assert store.batch_put_tensor(list(tensors), list(tensors.values())) == [0] * 5
    for (key, tensor), found in zip(tensors.items(), store.batch_get_tensor(list(tensors)), strict=True):
        assert found.dtype == tensor.dtype and torch.equal(found, tensor)
        moved = store.get_tensor_into(key, memory.ctypes.data, memory.nbytes)
        assert moved.shape == tensor.shape and torch.equal(moved, tensor)
        assert store.put_tensor_from(f"{key} again", memory.ctypes.data, store.get_size(key)) == 0
        assert torch.equal(store.get_tensor(f"{key} again"), tensor)
    assert store.upsert_tensor("bool", torch.zeros(9)) == 0
    assert torch.equal(store.get_tensor("bool"), torch.zeros(9))
    assert store.put("words", b"no tensor at all") == 0
    assert store.get_tensor("words") is None
    assert store.get_tensor("none") is None
    assert store.get_tensor_into("bf16", memory.ctypes.data, 10) is None


# -------------------------------------------------------------------------------------------------------- a real user


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what vLLM imports
def test_vllms_client_of_mooncake(monkeypatch):
    """vLLM's own code for embeddings of its encoders in a Mooncake store, which takes any odd answer for a fault."""
    pytest.importorskip("vllm", reason="vLLM is not in this environment: .venv-engines has it")
    import torch

    monkeypatch.syspath_prepend(str(SHIMS))
    from mooncake.store import MooncakeDistributedStore as Shim
    from vllm.distributed.ec_transfer.ec_connector.mooncake_store_embedding import store_client
    from vllm.distributed.mooncake_store import MooncakeStoreConfig, setup_mooncake_store

    store = Shim()
    config = MooncakeStoreConfig(
        "P2PHANDSHAKE", "127.0.0.1:50051", "tcp", "", global_segment_size=64 * MIB, local_buffer_size=MIB, tenant_id="t"
    )
    setup_mooncake_store(store, config, "localhost")
    client = store_client.MooncakeEmbeddingStoreClient(
        store, replicate_config=ReplicateConfig(), read_buffer_bytes=4 * MIB
    )
    tensors = {f"k{i}": torch.randn(64 + i, 256, dtype=torch.bfloat16) for i in range(12)}
    for key, tensor in tensors.items():
        client.put_tensor(key, tensor)
    assert client.batch_exists([*tensors, "none"]) == [True] * 12 + [False]
    wanted = {
        key: store_client.TensorSpec(tuple(tensor.shape), str(tensor.dtype), tensor.nbytes)
        for key, tensor in tensors.items()
    }
    found = client.load_tensors({**wanted, "none": wanted["k0"]}, "cpu")
    assert list(found) == list(tensors)
    assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())
    client.close()


def test_answers_are_plain_numbers(store, memory):
    """vLLM looks at their types."""
    at = memory.ctypes.data
    answers = [
        *store.batch_put_from(["a", "b"], [at, at], [10, 10]),
        *store.batch_get_into(["a", "none"], [at, at], [10, 10]),
        *store.batch_get_into_multi_buffers(["b", "none"], [[at], [at]], [[10], [10]]),
        *store.batch_put_from_multi_buffers(["c"], [[at, at]], [[5, 5]]),
        *store.batch_is_exist(["a", "none"]),
        store.get_size("a"),
        store.get_size("c"),
        store.is_exist("a"),
        *store.batch_remove(["a", "none"]),
        store.remove_all(),
        store.health_check(),
    ]
    assert {type(answer) for answer in answers} == {int}
