"""Mooncake's transfer engine over TCP as a side of bench.transport: `python -m bench.transport_mooncake END HOST`, by
the Python of an environment that has it."""

from __future__ import annotations

import asyncio
import os
import sys
import time

from bench.transport_sides import LeftOut, Near, offsets_of, serve


class Mooncake(Near):
    """Either end: memory that is registered with an engine."""

    def __init__(self, end: str, host: str) -> None:
        super().__init__()
        try:
            from mooncake.engine import TransferEngine
        except ImportError as fault:
            raise LeftOut(f"mooncake.engine: {fault}") from fault
        self.memory.fill(1 if end == "far" else 2)
        self.address = self.memory.array.ctypes.data
        self.engine = TransferEngine()
        status = self.engine.initialize(host, "P2PHANDSHAKE", "tcp", "")
        status = status or self.engine.register_memory(self.address, len(self.memory.array))
        if status:
            raise LeftOut(f"the transfer engine does not start: {status}")
        self.name = f"{host}:{self.engine.get_rpc_port()}"

    async def hello(self) -> dict[str, object]:
        return {"hello": [self.name, self.address]}

    async def meet(self, peer: list) -> dict[str, object]:
        self.peer, self.far = peer
        return {"negotiated": "tcp"}

    async def order(self, way: str, size: int, window: int, batches: int, verify: bool) -> dict[str, object]:
        engine, one = self.engine, window == 1
        if way == "get":
            call = engine.transfer_sync_read if one else engine.batch_transfer_sync_read
        else:
            call = engine.transfer_sync_write if one else engine.batch_transfer_sync_write
        plan = []
        for offsets in offsets_of(size, window, batches):
            row = ([self.address + at for at in offsets], [self.far + at for at in offsets], [size] * window)
            plan.append([column[0] for column in row] if one else row)
        start = time.perf_counter()
        for here, there, sizes in plan:
            status = call(self.peer, here, there, sizes)
            if status:
                raise SystemExit(f"mooncake {way}: {status}")
        return {"seconds": time.perf_counter() - start, "bytes": size * window * batches}


if __name__ == "__main__":
    os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
    os.environ.setdefault("GLOG_minloglevel", "3")
    printed = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes elsewhere
    asyncio.run(serve(lambda: Mooncake(*sys.argv[1:3]), printed))
