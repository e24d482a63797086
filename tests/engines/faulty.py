"""The connector with faults, told by the environment variable ENGINE_FAULTS (JSON), for engines in any process:

poison: KV in the engine's own memory is negated while a save copies it: before any digest is taken, so that nothing but
    other tokens can tell.
damage: this share of the blocks of every load has a byte flipped in the cache's memory right before it: after their
    digests were taken.
"""

from __future__ import annotations

import json
import os
import random
from typing import Any

import torch

from tiercache.kv.store import KvStore
from tiercache_connectors.vllm_offload import Books, Mover, TierCacheOffloadingSpec
from tiercache_connectors.vllm_pages import keys_of
from tiercache_connectors.vllm_table import Move
from tiercache_connectors.vllm_v1 import TierCacheConnector
from tiercache_connectors.vllm_worker import Lane, Worker

FAULTS: dict[str, float] = json.loads(os.environ.get("ENGINE_FAULTS", "{}"))
RANDOM = random.Random(FAULTS.get("seed", 1))


class FaultyWorker(Worker):
    """Does what FAULTS says; everything else is the real one."""

    tensors: list[torch.Tensor]

    def _begin_save(self, name: str, move: Move) -> None:
        if not FAULTS.get("poison"):
            super()._begin_save(name, move)
            return
        pages = list(set(move.pages))
        for tensor in self.tensors:
            tensor[pages] = -tensor[pages]
        before = len(self._saves)
        super()._begin_save(name, move)
        for each in self._saves[before:]:
            assert each.saving.pages_free(30)
        for tensor in self.tensors:
            tensor[pages] = -tensor[pages]

    def _start_load(self, lane: Lane, keys: list[bytes], move: Move, patience_s: float) -> Any:
        damage(lane.store, [key for key in keys[move.start : move.stop] if RANDOM.random() < FAULTS.get("damage", 0)])
        return super()._start_load(lane, keys, move, patience_s)


def damage(store: KvStore, keys: list[bytes]) -> None:
    """Brings blocks to the cache's memory, and flips a byte of each."""
    store.prefetch(keys, 10).wait(10)
    for key in keys:
        lease = store.core.lease_blocks_resident([key], store.layout.all_parts)
        if lease is not None:
            with lease:
                buffer = lease.buffer(0)
                torch.frombuffer(memoryview_of(buffer), dtype=torch.uint8)[RANDOM.randrange(buffer.length)] ^= 0x10


def memoryview_of(buffer: Any) -> memoryview:
    import ctypes

    return memoryview((ctypes.c_uint8 * buffer.length).from_address(buffer.address))


class FaultyConnector(TierCacheConnector):
    """The connector with a FaultyWorker."""

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        super().register_kv_caches(kv_caches)
        assert self._worker is not None, self._reason
        self._worker.__class__ = FaultyWorker
        self._worker.tensors = list(kv_caches.values())


class FaultyMover(Mover):
    """The worker of the offloading spec, with FAULTS."""

    tensors: list[torch.Tensor]

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        if not FAULTS.get("poison"):
            return super().submit_store(job_id, src_spec, dst_spec)
        pages = sorted(set(src_spec.block_ids.tolist()))
        for tensor in self.tensors:
            tensor[pages] = ~tensor[pages]
        done = super().submit_store(job_id, src_spec, dst_spec)
        self.wait({job_id})
        for tensor in self.tensors:
            tensor[pages] = ~tensor[pages]
        return done


class FaultyBooks(Books):
    """The manager of the offloading spec, with FAULTS."""

    def lookup(self, key: Any, req_context: Any) -> Any:
        if FAULTS.get("damage"):
            damage(self._store, keys_of(self._store, [key]))
        return super().lookup(key, req_context)


class FaultyOffloadingSpec(TierCacheOffloadingSpec):
    """The offloading spec with both."""

    def get_manager(self) -> Any:
        books = super().get_manager()
        books.__class__ = FaultyBooks
        return books

    def get_worker(self, kv_caches: Any) -> Any:
        mover = super().get_worker(kv_caches)
        mover.__class__ = FaultyMover
        mover.tensors = [each.tensor for each in kv_caches.tensors]
        return mover
