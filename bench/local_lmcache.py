"""LMCache as a side of bench.local: `lmcache server` in its two modes of shared memory."""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.local_sides import SIZES, names_of, value_of
from bench.local_ways import LONGEST, START_SECONDS, TARGET_BYTES, Peer, Servers, Way, free_port


class LMCacheWay(Way):
    """`lmcache server` and a worker's transfer context here.

    An entry is one chunk of one block, in one piece of the registered tensor. LMCache names a chunk by all tokens
    before it, so several entries of one request are several chunks of one sequence, and the sequence is chosen at
    random; single entries are sequences of one chunk.
    """

    CHUNK = 16
    """Tokens of a chunk and of a block: the fewest a vLLM block has by default, so that little is hashed and sent."""

    def __init__(self, directory: Path, name: str, *options: str) -> None:
        os.environ["LMCACHE_TRACK_USAGE"] = "false"
        os.environ.setdefault("LMCACHE_LOG_LEVEL", "ERROR")
        os.environ.setdefault("LMCACHE_DISABLE_BANNER", "1")
        os.environ.setdefault(
            "OMP_WAIT_POLICY", "PASSIVE"
        )  # else torch's threads spin where cores are shared, far slower
        self.name = name
        self.rng = random.Random(7)
        self.requests = 0
        self.tensors: dict[int, Any] = {}
        self.contexts: dict[int, Any] = {}
        self.servers = Servers(directory / f"lmcache-{name}.log")
        try:
            self._serve(name, *options)
            for size in SIZES:
                self._register(size)
            for path in Path("/dev/shm").glob("lmcache_*"):
                if str(os.getpid()) in path.name.split("_"):
                    path.unlink()  # all have mapped it; so nothing stays behind, whoever is killed
            for size in SIZES:
                self._fill(size)
                self._warm(size)
        except BaseException:
            self.close()
            raise

    def _serve(self, mode: str, *options: str) -> None:
        from lmcache.v1.multiprocess.transport.factory import RequestClientFactory

        port = free_port()
        script = "import sys; from lmcache.cli.main import main; sys.exit(main())"
        self.servers.start(
            *(sys.executable, "-c", script, "server", "--l1-size-gb", "2", "--no-l1-use-lazy"),
            *("--eviction-policy", "LRU", "--chunk-size", str(self.CHUNK), "--null-block-id", "-1"),
            *("--supported-transfer-mode", mode, "--host", "127.0.0.1", "--port", str(port)),
            *("--http-host", "127.0.0.1", "--http-port", str(free_port()), "--disable-observability", *options),
        )
        self.servers.wait_port(port)
        self.client = RequestClientFactory.create(f"tcp://127.0.0.1:{port}")
        if self.client.get_chunk_size().result(timeout=START_SECONDS) != self.CHUNK:
            raise RuntimeError("the server has another chunk size")

    def _register(self, size: int) -> None:
        import torch
        from lmcache.v1.multiprocess.group_view import EngineGroupInfo
        from lmcache.v1.multiprocess.transfer_context import create_transfer_context

        blocks = TARGET_BYTES // size
        tensor = torch.ones((blocks, self.CHUNK, size // self.CHUNK // 2), dtype=torch.float16)
        caches = {"layer.0": tensor}
        context = create_transfer_context(caches, mode=self.name, instance_id=size, req_client=self.client)
        group = EngineGroupInfo(engine_group_id=0, layer_indices=(0,), tokens_per_block=self.CHUNK)
        context.register(
            caches, self._model(size), 1, 1, START_SECONDS, layout_hints={"kv_layout": "NHD"},
            engine_group_infos=[group],
        )  # fmt: skip
        self.tensors[size], self.contexts[size] = caches, context

    @staticmethod
    def _model(size: int) -> str:
        return f"bench-{size}"

    def _bytes(self, size: int) -> np.ndarray:
        """The registered tensor, a row a block."""
        import torch

        tensor = self.tensors[size]["layer.0"]
        return tensor.view(torch.uint8).view(len(tensor), size).numpy()

    def _keys(self, size: int, first: int, count: int) -> tuple[str, Any, Any]:
        """A request for `count` entries from `first` on: its id, what is looked up, what is moved."""
        from lmcache.v1.multiprocess.custom_types import IPCCacheServerKey

        self.requests += 1
        request = f"{self.name}-{self.requests}"
        base = 1 if count == 1 else 1 + len(names_of(size))
        tokens = tuple(base + number for number in range(first, first + count) for _ in range(self.CHUNK))
        keys = [
            IPCCacheServerKey(
                model_name=self._model(size), world_size=1, worker_id=worker, token_ids=tokens, start=0,
                end=len(tokens), request_id=request, num_kv_readers=1,
            )
            for worker in (None, 0)
        ]  # fmt: skip
        return request, keys[0], keys[1]

    def _fill(self, size: int) -> None:
        """Each entry twice: alone, and in a sequence."""
        rows, count = self._bytes(size), len(names_of(size))
        for number, name in enumerate(names_of(size)):
            rows[number] = np.frombuffer(value_of(name), np.uint8)
        lengths = [(first, 1) for first in range(count)]
        lengths += [(first, min(LONGEST, count)) for first in range(0, count, LONGEST)]
        context, caches = self.contexts[size], self.tensors[size]
        for first, length in lengths:
            request, _, key = self._keys(size, first, length)
            blocks = [list(range(first, first + length))]
            event = context.create_recorded_event()
            if not context.submit_store(request, key, caches, blocks, event, 1).result(timeout=START_SECONDS):
                raise RuntimeError(f"store of {length} x {size}: {self.servers.last_words()}")
            self.client.end_session(request).result(timeout=START_SECONDS)
        rows[:] = 1

    def _warm(self, size: int) -> None:
        """Reads every entry into two places, so that every page is mapped everywhere, and compares."""
        count = len(names_of(size))
        for first in range(0, count, LONGEST):
            for half in (0, count):
                places = list(range(half + first, half + first + LONGEST))
                self._once(size, first, places)
        for first in range(count):
            self._once(size, first, [first])

    def _once(self, size: int, first: int, places: list[int]) -> None:
        keys = self._keys(size, first, len(places))
        self._read(size, *keys, places)
        self.client.end_session(keys[0]).result(timeout=START_SECONDS)
        self._compare(size, first, places)

    def _compare(self, size: int, first: int, places: list[int]) -> None:
        rows = self._bytes(size)
        for name, place in zip(names_of(size)[first : first + len(places)], places, strict=True):
            if rows[place].tobytes() != value_of(name):
                raise RuntimeError(f"lmcache {self.name} gave wrong bytes for {name}")

    def order(self, size: int, batch: int, rounds: int) -> dict[str, float]:
        count = len(names_of(size))
        batch = min(batch, count)
        step = 1 if batch == 1 else LONGEST
        plans = []
        for _ in range(rounds):
            first = self.rng.randrange(count // step) * step
            places = self.rng.sample(range(TARGET_BYTES // size), batch)
            plans.append((first, places, self._keys(size, first, batch)))
        clock = time.perf_counter()
        for _, places, (request, lookup, key) in plans:
            self._read(size, request, lookup, key, places)
        seconds = time.perf_counter() - clock
        for _, _, (request, _, _) in plans:
            self.client.end_session(request).result(timeout=START_SECONDS)
        first, places, _ = plans[-1]
        self._compare(size, first, places)
        return {"seconds": seconds, "bytes": float(rounds * batch * size)}

    def _read(self, size: int, request: str, lookup: Any, key: Any, places: list[int]) -> None:
        """Lookup, wait at the server until the chunks are locked, retrieve."""
        context = self.contexts[size]
        self.client.lookup(lookup, 1).result(timeout=START_SECONDS)
        hits = self.client.wait_prefetch_status(request, START_SECONDS).result(timeout=START_SECONDS)
        if hits != len(places):
            raise RuntimeError(f"lmcache {self.name}: {hits} of {len(places)} chunks")
        event = context.create_recorded_event()
        moved = context.submit_retrieve(request, key, self.tensors[size], [places], event, 1)
        if not moved.result(timeout=START_SECONDS):
            raise RuntimeError(f"lmcache {self.name}: retrieve failed")


class LMCacheServerCopies(LMCacheWay):
    """The server maps the worker's tensors and copies into them."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, "lmcache_driven")


class LMCacheWorkerCopies(LMCacheWay):
    """The worker maps the server's pool and copies out of it."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, "engine_driven", "--shm-name", f"lmcache_pool_{os.getpid()}")


class LMCache(Peer):
    """A lookup and a retrieve into registered tensors."""

    ways = (LMCacheServerCopies, LMCacheWorkerCopies)
