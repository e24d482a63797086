"""LMCache as a side of bench.kv, in its own environment: `.venv-peers/bin/python -m bench.kv_lmcache WAY WORKDIR`.

`lmcache_driven` and `engine_driven` are `lmcache server` in its two modes of shared memory, with a worker's transfer
context in this process and engine tensors as vLLM registers them; `fs` and `fs_native` are its adapters for files,
under the second of those modes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import drop_page_cache
from bench.kv_shapes import SHAPES, array_shape
from bench.local_ways import FAULTS, START_SECONDS, Servers, free_port

CHUNK_TOKENS = 256
"""Its default: what it stores under one name."""
SERVER_GB = 1


class Server:
    """`lmcache server` and a worker's transfer context."""

    def __init__(self, mode: str, directory: str, *more: str, pool: str = "") -> None:
        os.environ["LMCACHE_TRACK_USAGE"] = "false"
        os.environ.setdefault("LMCACHE_LOG_LEVEL", "ERROR")
        os.environ.setdefault("LMCACHE_DISABLE_BANNER", "1")
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # else torch's threads spin where cores are shared
        from lmcache.v1.multiprocess.transport.factory import RequestClientFactory

        self.mode = mode
        self.rng = np.random.default_rng(os.getpid())
        self.requests = self.instances = 0
        self.context: Any = None
        self.servers = Servers(Path(directory) / f"lmcache-kv-{pool or mode}.log")
        port = free_port()
        options = ["--shm-name", pool or f"lmcache_pool_{os.getpid()}"] if mode == "engine_driven" else []
        script = "import sys; from lmcache.cli.main import main; sys.exit(main())"
        self.servers.start(
            *(sys.executable, "-c", script, "server", "--l1-size-gb", str(SERVER_GB), "--no-l1-use-lazy"),
            *("--eviction-policy", "LRU", "--chunk-size", str(CHUNK_TOKENS), "--null-block-id", "-1"),
            *("--supported-transfer-mode", mode, "--host", "127.0.0.1", "--port", str(port)),
            *("--http-host", "127.0.0.1", "--http-port", str(free_port()), "--disable-observability", *options, *more),
        )
        self.servers.wait_port(port)
        self.client = RequestClientFactory.create(f"tcp://127.0.0.1:{port}")
        self.client.get_chunk_size().result(timeout=START_SECONDS)

    def setup(self, shape: str, order: str, total_bytes: int) -> dict[str, Any]:
        """Engine tensors of this shape and order: one a layer, K and V of a token side by side."""
        import torch
        from lmcache.v1.multiprocess.group_view import EngineGroupInfo
        from lmcache.v1.multiprocess.transfer_context import create_transfer_context

        self._leave()
        self.shape, self.instances = SHAPES[shape], self.instances + 1
        self.blocks = self.shape.blocks(total_bytes)
        self.total = self.blocks * self.shape.block_bytes
        dtype = torch.uint8 if self.shape.itemsize == 1 else torch.bfloat16
        layers = range(self.shape.layers)
        if order.startswith("BL"):
            whole = torch.ones(array_shape(self.shape, order, 2 * self.blocks), dtype=torch.uint8)
            tensors = [whole[:, layer].view(dtype) for layer in layers]
        else:
            lengths = array_shape(self.shape, order, 2 * self.blocks)[1:]
            tensors = [torch.ones(lengths, dtype=torch.uint8).view(dtype) for _ in layers]
        self.tensors = {f"layer.{i}": tensor for i, tensor in enumerate(tensors)}
        self.model = f"{shape}-{order}-{self.instances}"
        context = create_transfer_context(
            self.tensors, mode=self.mode, instance_id=self.instances, req_client=self.client
        )
        group = EngineGroupInfo(
            engine_group_id=0, layer_indices=tuple(layers), tokens_per_block=self.shape.block_tokens
        )
        hint = "HND" if order.endswith("HNC") else "NHD"
        per_chunk = CHUNK_TOKENS // self.shape.block_tokens
        context.register(
            self.tensors, self.model, 1, per_chunk, START_SECONDS, layout_hints={"kv_layout": hint},
            engine_group_infos=[group],
        )  # fmt: skip
        self.context = context
        ids = np.random.default_rng(1).permutation(2 * self.blocks).tolist()
        self.source, self.target = ids[: self.blocks], ids[self.blocks :]
        for layer, tensor in enumerate(tensors):
            tensor.view(torch.uint8)[self.source] = 3 + layer
        self.tokens: tuple[int, ...] = ()
        return {"bytes": self.total}

    def _leave(self) -> None:
        if self.context is None:
            return
        self.client.clear(force=True).result(timeout=START_SECONDS)
        close = getattr(self.context, "unregister", None) or getattr(self.context, "close", None)
        if close is not None:
            close()
        self.context, self.tensors = None, {}

    def _keys(self) -> tuple[str, Any, Any]:
        from lmcache.v1.multiprocess.custom_types import IPCCacheServerKey

        self.requests += 1
        request = f"{self.mode}-{self.requests}"
        keys = [
            IPCCacheServerKey(
                model_name=self.model, world_size=1, worker_id=worker, token_ids=self.tokens, start=0,
                end=len(self.tokens), request_id=request, num_kv_readers=1,
            )
            for worker in (None, 0)
        ]  # fmt: skip
        return request, keys[0], keys[1]

    def store(self) -> dict[str, Any]:
        """Stores a new sequence, after the server (outside the time) has forgotten the old ones."""
        self.client.clear(force=True).result(timeout=START_SECONDS)
        self.tokens = tuple(self.rng.integers(0, 1 << 31, self.blocks * self.shape.block_tokens).tolist())
        request, _, key = self._keys()
        start = time.perf_counter()
        event = self.context.create_recorded_event()
        per_chunk = CHUNK_TOKENS // self.shape.block_tokens
        moved = self.context.submit_store(request, key, self.tensors, [self.source], event, per_chunk)
        if not moved.result(timeout=START_SECONDS):
            raise RuntimeError(f"store: {self.servers.last_words()}")
        seconds = time.perf_counter() - start
        self.client.end_session(request).result(timeout=START_SECONDS)
        return {"seconds": seconds}

    def load(self) -> dict[str, Any]:
        """Lookup, wait until the chunks are locked, retrieve into other pages."""
        per_chunk = CHUNK_TOKENS // self.shape.block_tokens
        end, hits = time.monotonic() + START_SECONDS, -1
        while hits != self.blocks // per_chunk:  # a store may go on at the server after its answer: not counted
            if time.monotonic() > end:
                raise RuntimeError(f"{hits} of {self.blocks // per_chunk} chunks")
            request, lookup, key = self._keys()
            start = time.perf_counter()
            self.client.lookup(lookup, 1).result(timeout=START_SECONDS)
            hits = self.client.wait_prefetch_status(request, START_SECONDS).result(timeout=START_SECONDS)
            if hits != self.blocks // per_chunk:
                self.client.end_session(request).result(timeout=START_SECONDS)
        event = self.context.create_recorded_event()
        moved = self.context.submit_retrieve(request, key, self.tensors, [self.target], event, per_chunk)
        if not moved.result(timeout=START_SECONDS):
            raise RuntimeError(f"retrieve: {self.servers.last_words()}")
        seconds = time.perf_counter() - start
        self.client.end_session(request).result(timeout=START_SECONDS)
        return {"seconds": seconds}

    def compare(self) -> dict[str, Any]:
        """Whether the target pages hold what was stored; wipes them then."""
        import torch

        for layer, tensor in enumerate(self.tensors.values()):
            pages = tensor.view(torch.uint8)
            if not bool((pages[self.target] == 3 + layer).all()):
                raise RuntimeError("wrong bytes")
            pages[self.target] = 0
        return {}

    def close(self) -> None:
        """Its end."""
        self.servers.close()


class FilesToo(Server):
    """The server with one of its adapters for files under its memory: `fs` or `fs_native`."""

    def __init__(self, kind: str, directory: str) -> None:
        self.home = Path(directory) / f"lmcache-{kind}"
        self.home.mkdir(parents=True, exist_ok=True)
        spec = json.dumps({"type": kind, "base_path": str(self.home)})
        super().__init__("engine_driven", directory, "--l2-adapter", spec, pool=f"lmcache_{kind}_{os.getpid()}")

    def _files(self) -> list[Path]:
        return [path for path in self.home.rglob("*.data") if path.is_file()]

    def store(self) -> dict[str, Any]:
        """As before, and until all files are written: `written`; `durable`: and synced."""
        for path in self._files():
            path.unlink()
        answer = super().store()
        start = time.perf_counter() - answer["seconds"]
        while sum(path.stat().st_size for path in self._files()) < self.total:
            if time.perf_counter() - start > START_SECONDS:
                raise RuntimeError("files are never complete")
            time.sleep(0.001)
        answer["written"] = time.perf_counter() - start
        for path in self._files():
            descriptor = os.open(path, os.O_RDONLY)
            os.fdatasync(descriptor)
            os.close(descriptor)
        answer["durable"] = time.perf_counter() - start
        return answer

    def load(self, cold: bool = False) -> dict[str, Any]:
        """As before, after the server has forgotten its memory (outside the time); `cold`: and the page cache too."""
        self.client.clear(force=True).result(timeout=START_SECONDS)
        if cold:
            drop_page_cache(self._files())
        return super().load()


def main(way: str, directory: str) -> None:
    """Makes the side and serves; a fault is an answer, and says why."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print goes elsewhere
    try:
        side: Server = FilesToo(way, directory) if way.startswith("fs") else Server(way, directory)
    except FAULTS as fault:
        print(json.dumps({"left_out": f"{type(fault).__name__}: {fault}"[:400]}), file=answers)
        os._exit(1)
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        order = json.loads(line)
        if "quit" in order:
            break
        try:
            answer = getattr(side, order.pop("do"))(**order)
        except FAULTS as fault:
            answer = {"fault": f"{type(fault).__name__}: {fault}"[:400]}
        print(json.dumps(answer), file=answers)
    side.close()
    os._exit(0)  # without the libraries' own ends, which wait for servers that are gone


if __name__ == "__main__":
    main(*sys.argv[1:])
