"""Which of Mooncake's wheel tests are run, and why the others are not: one line for each of its files."""

from __future__ import annotations

COMMIT = "3b5a594133958449a1feaf1c9e0fc1b553e34a28"
"""Of github.com/kvcache-ai/Mooncake, 22 August 2026, after release 0.3.12.post1."""
FOLDER = "mooncake-wheel/tests"

RUN = {
    "test_distributed_object_store.py": "5d3b3ec43915a402889def77d71ff863479ee7ec5889a257af9de8884b1f8e3a",
    "test_replicated_distributed_object_store.py": "da47ceedfeaccd89816da81330ce11712a734d54cf76725f5c1fb34e9c72e236",
    "test_dummy_client.py": "f728d16f1085241cee0e9c99565441f4331c961c6ee296015c25d02f1e0ce008",
    "test_multi_dummy_clients.py": "bc33aa89534ad4b3a9c62d6101bad7ac4f5bd7c495c27fcb054682740a162baa",
}
"""Files about put, get, batches, buffers, existence and removal, with the SHA-256 of what was read at COMMIT."""

TOGETHER = {"test_multi_dummy_clients.py": (["--client-id", "client1"], ["--client-id", "client2"])}
"""Files that are run by several processes at once, over one cache, each with its own words."""

_GPU = "memory of GPUs is refused until there is a tier for it"
NOT_CLAIMED = {
    "test_tensor_operations": "variants of tensors for tensor parallelism, which no engine's connector calls",
    "test_dummy_cuda_ipc_put_tensor_waits_for_current_stream": _GPU,
    "test_dummy_cuda_ipc_batch_put_tensor_waits_for_current_stream": _GPU,
}
"""Tests of those files that are not counted, by name."""

OTHER_FILES = {
    "test_put_get_tensor.py": "it imports Mooncake's structured objects; tests/connectors tests our tensors",
    "test_safetensor_functions.py": "files of tensors are not claimed",
    "test_batch_replica_clear.py": "where copies lie, and leases that hold removals up, are not claimed",
    "test_offload_on_eviction.py, test_ssd_offload_in_evict.py, test_promotion_on_hit.py":
        "how a master moves objects between memory and SSD; the cache has its own order of eviction",
    "test_buffer_pool_native.py": "BufferPool is not claimed",
    "test_structured_object_store.py, test_dataproto_catalog.py": "a layer above the store, tested with fakes of it",
    "test_mooncake_store_service_api.py": "Mooncake's HTTP service, tested with a fake of the store",
    "test_distributed_object_store_cxl.py": "the same tests for CXL memory",
    "test_import_structure.py, test_transfer_on_cuda.py, test_transfer_on_hip.py, transfer_engine_*.py":
        "the transfer engine, which stays Mooncake's",
    "test_cli.py, test_http_metadata_server.py, test_meta_server.py, test_mooncake_config.py, test_mooncake_ep.py, "
    "test_spdk_tgt_create.py, test_fast_copy.py, test_regmr_overhead.py, test_release_wheel_tags.py":
        "servers and tools around the store",
}  # fmt: skip
"""Files that are not run."""
