"""UCX moves CUDA memory where the machine has a GPU, and something other than TCP between the two ends."""

from __future__ import annotations

import asyncio
import ctypes

import numpy as np
import pytest

from tiercache.buffers import Buffer
from tiercache.model import Outcome
from tiercache.net import open_transport, usable
from tiercache.testing.transports import PeerProcess, pattern
from tiercache.testing.transports.deaths import meet
from tiercache.transport import Memory, Move

SIZE = 4 << 20


def cuda() -> ctypes.CDLL:
    """The CUDA runtime with a device, or a skip that says why not."""
    for name in ("libcudart.so.13", "libcudart.so.12"):
        try:
            runtime = ctypes.CDLL(name)
        except OSError:
            continue
        count = ctypes.c_int(0)
        if runtime.cudaGetDeviceCount(ctypes.byref(count)) or not count.value:
            pytest.skip("no CUDA device: not exercised")
        return runtime
    pytest.skip("no CUDA runtime: not exercised")


def test_cuda_memory_is_read_into_and_written_from() -> None:
    runtime = cuda()
    if not usable("ucx").usable:
        pytest.skip(usable("ucx").why)

    async def check() -> None:
        pointer = ctypes.c_void_p()
        assert runtime.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(SIZE)) == 0
        on_device = Buffer(pointer.value or 0, SIZE, runtime)
        here = open_transport("ucx", "127.0.0.1", lambda _: None)
        peer = await PeerProcess.start("ucx", "127.0.0.1")
        try:
            link = await meet(here, peer)
            if link.negotiated == "tcp":
                pytest.skip("UCX moves CUDA memory over anything but TCP: not exercised")
            here.expose(on_device, writable=True, kind=Memory.CUDA)
            theirs = bytes.fromhex(await peer.call("expose", size_bytes=SIZE, seed=4, writable=True))
            region = link.attach(theirs)
            assert await link.read([Move(region, 0, [on_device])], 10.0) == [Outcome.HIT]
            found = np.zeros(SIZE, np.uint8)
            assert runtime.cudaMemcpy(ctypes.c_void_p(found.ctypes.data), pointer, ctypes.c_size_t(SIZE), 2) == 0
            assert (found == pattern(4, 0, SIZE)).all()
            assert await link.write([Move(region, 0, [on_device])], 10.0) == [Outcome.HIT]
        finally:
            await peer.kill()
            await here.close()
            runtime.cudaFree(pointer)

    asyncio.run(check())
