"""Backends that do wrong on purpose, in SGLang's own processes.

Poisoning: pages are negated in SGLang's host pool while they are stored, before any digest is taken. Damaging: a byte
of every page is flipped in the cache's memory, after its digest was taken and before it is loaded.
"""

from __future__ import annotations

import ctypes

from tiercache_connectors.sglang_hicache import TierCacheHiCache


class Poisoning(TierCacheHiCache):
    def batch_set_v1(self, keys, host_indices, extra_info=None):
        pages = self.mem_pool_host.kv_buffer[:, :, host_indices]
        self.mem_pool_host.kv_buffer[:, :, host_indices] = -pages
        try:
            return super().batch_set_v1(keys, host_indices, extra_info)
        finally:
            self.mem_pool_host.kv_buffer[:, :, host_indices] = pages


class Damaging(TierCacheHiCache):
    def batch_get_v1(self, keys, host_indices, extra_info=None):
        store = self._canonical["kv"][0]._chained
        chain = store.engine_keys([bytes.fromhex(key) for key in keys])
        assert store.prefetch(chain, 10).wait(10) == len(chain)
        with store.core.lease_blocks_resident(chain, store.layout.all_parts) as lease:
            for i in range(len(chain)):
                buffer = lease.buffer(i)
                byte = ctypes.c_uint8.from_address(buffer.address + (i * 997) % buffer.length)
                byte.value ^= 0x10
        return super().batch_get_v1(keys, host_indices, extra_info)
