"""Sides of bench.transport, each a pair of processes with memory of their own: `python -m bench.transport_sides NAME`.

Each process takes orders by JSON lines; `op` names a method. `hello` is answered with what the other process of the
pair needs to know, which `meet` tells it; both are asked at the same time. Then the near one is asked to `order`.
A batch is `window` moves of `size` bytes that are all under way before any of them is waited for.
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import json
import mmap
import os
import socket
import struct
import sys
import threading
import time

import numpy as np

MEMORY_BYTES = 128 << 20
"""Of each process: eight moves of 16 MiB at a time, and more than the processor's caches hold."""
PART_BYTES = 64 << 10
DEADLINE_S = 60.0
RAW_REQUEST = struct.Struct("<cxxxIQQ")  # put or get, blocks, their size, offset of the first


class LeftOut(Exception):
    """This side cannot run here; the message says why."""


class Memory:
    """A memory file and its mapping, as an arena has them."""

    def __init__(self, size: int = MEMORY_BYTES, seed: int = 0) -> None:
        self.file = os.memfd_create("bench", os.MFD_ALLOW_SEALING)
        os.ftruncate(self.file, size)
        fcntl.fcntl(self.file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        self.view = memoryview(mmap.mmap(self.file, size))
        self.array = np.frombuffer(self.view, np.uint8)
        self.fill(seed)

    def fill(self, seed: int) -> None:
        """The bytes of a seed: the same in every process, another piece wherever one looks."""
        words = self.array.view(np.uint64)
        words[:] = np.arange(len(words), dtype=np.uint64)
        words *= np.uint64(0x9E3779B97F4A7C15 + 2 * seed)


class DeviceMemory:
    """Memory of the first NVIDIA GPU."""

    file = -1

    def __init__(self, size: int = MEMORY_BYTES) -> None:
        try:
            self.cuda = ctypes.CDLL("libcuda.so.1")
        except OSError as fault:
            raise LeftOut(f"no NVIDIA GPU on this machine ({fault})") from fault
        context, address, count = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_int()
        self._call("cuInit", 0)
        self._call("cuDeviceGetCount", ctypes.byref(count))
        if not count.value:
            raise LeftOut("no NVIDIA GPU on this machine")
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
        self._call("cuCtxSetCurrent", context)
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        self.address, self.host = address, Memory(size)

    def _call(self, name: str, *arguments: object) -> None:
        if status := getattr(self.cuda, name)(*arguments):
            raise LeftOut(f"{name}: {status}")

    def fill(self, seed: int) -> None:
        """As of Memory."""
        self.host.fill(seed)
        size = ctypes.c_size_t(len(self.host.array))
        self._call("cuMemcpyHtoD_v2", self.address, ctypes.c_void_p(self.host.array.ctypes.data), size)

    @property
    def array(self) -> np.ndarray:
        """What lies there now."""
        size = ctypes.c_size_t(len(self.host.array))
        self._call("cuMemcpyDtoH_v2", ctypes.c_void_p(self.host.array.ctypes.data), self.address, size)
        return self.host.array


def offsets_of(size: int, window: int, batches: int) -> list[list[int]]:
    """Where the moves of each batch begin, through all of the memory again and again."""
    count = MEMORY_BYTES // size
    return [[(batch * window + i) % count * size for i in range(window)] for batch in range(batches)]


class RawFar:
    """Blocking sockets: the process that is asked."""

    def __init__(self, host: str) -> None:
        self.memory = Memory(seed=1)
        self.server = socket.create_server((host, 0))

    async def hello(self) -> dict[str, object]:
        return {"hello": self.server.getsockname()}

    async def meet(self, peer: object) -> dict[str, object]:
        threading.Thread(target=self._serve, daemon=True).start()
        return {"negotiated": "sockets"}

    def _serve(self) -> None:
        peer, _ = self.server.accept()
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while request := peer.recv(RAW_REQUEST.size, socket.MSG_WAITALL):
            way, count, size, at = RAW_REQUEST.unpack(request)
            for _ in range(count):
                block = self.memory.view[at : at + size]
                if way == b"g":
                    peer.sendall(block)
                else:
                    receive(peer, block)
                at = (at + size) % MEMORY_BYTES
            if way == b"p":
                peer.sendall(b"a")


def receive(peer: socket.socket, block: memoryview) -> None:
    """Fills a block."""
    got = 0
    while got < len(block):
        some = peer.recv_into(block[got:], 0, socket.MSG_WAITALL)
        if not some:
            raise SystemExit("the other side ended")
        got += some


class Near:
    """The process that asks; it measures."""

    def __init__(self, size: int = MEMORY_BYTES) -> None:
        self.memory = Memory(size, seed=2)

    async def order(self, way: str, size: int, window: int, batches: int, verify: bool) -> dict[str, object]:
        """Moves batches, one after another."""
        raise SystemExit(f"{type(self).__name__} cannot {way} {size} {window} {batches} {verify}")

    async def check(self) -> dict[str, object]:
        """Whether all of the other memory arrives here, and all of this one there and back."""
        for way, seed in (("get", 1), ("put", 3), ("get", 3)):
            self.memory.fill(seed if way == "put" else 4)
            await self.order(way, 1 << 20, 8, MEMORY_BYTES >> 23, verify=False)
            arrived = self.memory.array.copy()
            self.memory.fill(seed)
            if not np.array_equal(arrived, self.memory.array):
                raise SystemExit(f"{type(self).__name__}: wrong bytes after {way}")
        return {"checked": True}


class RawNear(Near):
    """Blocking sockets: the process that asks."""

    def __init__(self, host: str) -> None:
        super().__init__()
        self.peer = socket.socket()

    async def hello(self) -> dict[str, object]:
        return {"hello": None}

    async def meet(self, peer: list) -> dict[str, object]:
        self.peer.connect(tuple(peer))
        self.peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return {"negotiated": "sockets"}

    async def order(self, way: str, size: int, window: int, batches: int, verify: bool) -> dict[str, object]:
        plan = []
        for offsets in offsets_of(size, window, batches):
            request = RAW_REQUEST.pack(way[:1].encode(), window, size, offsets[0])
            plan.append((request, [self.memory.view[at : at + size] for at in offsets]))
        peer, answer = self.peer, memoryview(bytearray(1))
        start = time.perf_counter()
        if way == "get":
            for request, blocks in plan:
                peer.sendall(request)
                for block in blocks:
                    receive(peer, block)
        else:
            for request, blocks in plan:
                peer.send(request, socket.MSG_MORE)
                for block in blocks:
                    peer.sendall(block)
                receive(peer, answer)
        return {"seconds": time.perf_counter() - start, "bytes": size * window * batches}


class MemoryNear(Near):
    """memmove between two memories of one process: the limit of whatever copies once."""

    def __init__(self, host: str) -> None:
        super().__init__()
        self.other = Memory(seed=1)

    async def hello(self) -> dict[str, object]:
        return {"hello": None}

    async def meet(self, peer: object) -> dict[str, object]:
        return {"negotiated": "memmove"}

    async def order(self, way: str, size: int, window: int, batches: int, verify: bool) -> dict[str, object]:
        here, there = self.memory.array.ctypes.data, self.other.array.ctypes.data
        source, target = (there, here) if way == "get" else (here, there)
        offsets = [at for batch in offsets_of(size, window, batches) for at in batch]
        move = ctypes.memmove
        start = time.perf_counter()
        for at in offsets:
            move(target + at, source + at, size)
        return {"seconds": time.perf_counter() - start, "bytes": size * window * batches}


class CmaFar(Near):
    """Memory that another process copies from and to, without this one's help."""

    async def hello(self) -> dict[str, object]:
        self.memory.fill(1)
        ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1))  # PR_SET_PTRACER: whoever may otherwise
        return {"hello": [os.getpid(), self.memory.array.ctypes.data]}

    async def meet(self, peer: object) -> dict[str, object]:
        return {"negotiated": "cma"}


class Span(ctypes.Structure):
    """An iovec."""

    _fields_ = (("address", ctypes.c_void_p), ("length", ctypes.c_size_t))


class CmaNear(Near):
    """process_vm_readv and process_vm_writev: the limit of a copy that the kernel makes between two processes."""

    async def hello(self) -> dict[str, object]:
        return {"hello": None}

    async def meet(self, peer: list) -> dict[str, object]:
        self.pid, self.there = peer
        return {"negotiated": "cma"}

    async def order(self, way: str, size: int, window: int, batches: int, verify: bool) -> dict[str, object]:
        library = ctypes.CDLL(None, use_errno=True)
        call = library.process_vm_readv if way == "get" else library.process_vm_writev
        here, plan = self.memory.array.ctypes.data, []
        for offsets in offsets_of(size, window, batches):
            spans = [[(base + at, size) for at in offsets] for base in (here, self.there)]
            plan.append([(Span * window)(*each) for each in spans])
        start = time.perf_counter()
        for local, remote in plan:
            if call(self.pid, local, window, remote, window, 0) != size * window:
                raise SystemExit(f"process_vm: {os.strerror(ctypes.get_errno())}")
        return {"seconds": time.perf_counter() - start, "bytes": size * window * batches}


class Ours(Near):
    """A transport of tiercache, at either end."""

    def __init__(self, name: str, host: str, seed: int, size: int = MEMORY_BYTES) -> None:
        super().__init__(size)
        from tiercache import transport
        from tiercache.buffers import Buffer, many_digests
        from tiercache.model import Outcome
        from tiercache.net import open_transport, usable

        name, _, device = name.partition("+")
        able = usable(name)
        if not able.usable:
            raise LeftOut(able.why)
        self.made, self.hit, self.many_digests = transport.Move, Outcome.HIT, many_digests
        if device:
            self.memory, self.kind = DeviceMemory(size), transport.Memory.CUDA
            self.buffer = Buffer(self.memory.address.value, size, self.memory)
        else:
            self.kind = transport.Memory.HOST
            self.buffer = Buffer.of(self.memory.view, writable=True)
        self.memory.fill(seed)
        self.transport = open_transport(name, host, self.notified)
        self.notes: asyncio.Queue[bytes] = asyncio.Queue()

    def notified(self, note: bytes) -> None:
        self.notes.put_nowait(note)

    async def hello(self) -> dict[str, object]:
        descriptor = self.transport.expose(self.buffer, writable=True, kind=self.kind, file=self.memory.file)
        return {"hello": [self.transport.address.hex(), descriptor.hex()]}

    async def meet(self, peer: list) -> dict[str, object]:
        address, descriptor = map(bytes.fromhex, peer)
        self.link = await self.transport.connect(address, DEADLINE_S)
        self.region = self.link.attach(descriptor)
        return {"negotiated": self.link.negotiated}

    async def order(self, way: str, size: int, window: int, batches: int, verify: bool) -> dict[str, object]:
        plan = [
            [self.made(self.region, at, [self.buffer.slice(at, size)]) for at in offsets]
            for offsets in offsets_of(size, window, batches)
        ]
        call = self.link.read if way == "get" else self.link.write
        meant = self._meant(size) if verify else {}
        start = time.perf_counter()
        for moves in plan:
            outcomes = await call(moves, DEADLINE_S)
            if outcomes.count(self.hit) != window:
                raise SystemExit(f"{way}: {outcomes}")
            if verify:
                found = self.many_digests([(move.pieces[0], PART_BYTES, self.every_part) for move in moves])
                if found != [meant[move.offset] for move in moves]:
                    raise SystemExit("wrong bytes arrived")
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "bytes": size * window * batches, "negotiated": self.link.negotiated}

    def _meant(self, size: int) -> dict[int, bytes]:
        """Digests of the far memory's blocks, which both ends hold since `check`."""
        self.every_part = (1 << size // PART_BYTES) - 1
        places = range(0, MEMORY_BYTES, size)
        blocks = [(self.buffer.slice(at, size), PART_BYTES, self.every_part) for at in places]
        return dict(zip(places, self.many_digests(blocks), strict=True))

    async def close(self) -> None:
        """Ends it."""
        await self.link.close()
        await self.transport.close()


def side(name: str, end: str, host: str):
    """The process of a pair."""
    if name == "raw":
        return RawFar(host) if end == "far" else RawNear(host)
    if name == "cma":
        return CmaFar() if end == "far" else CmaNear()
    if name == "memory":
        return MemoryNear(host)
    return Ours(name, host, 1 if end == "far" else 2)


async def serve(made, out) -> None:
    """Takes orders from stdin until it ends; the loop sleeps, or works for the transport, meanwhile."""

    def answer(value: object) -> None:
        print(json.dumps(value), file=out, flush=True)

    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    try:
        here = made()
    except (LeftOut, ImportError) as why:
        answer({"left_out": str(why)})
        return
    answer({"ready": True})
    while line := await lines.readline():
        order = json.loads(line)
        op = order.pop("op")
        if op == "quit":
            break
        if op == "cpu":
            answer({"seconds": time.process_time()})
        else:
            answer(await getattr(here, op)(**order))
    if isinstance(here, Ours):
        await here.close()


if __name__ == "__main__":
    printed = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes elsewhere
    asyncio.run(serve(lambda: side(*sys.argv[1:4]), printed))
