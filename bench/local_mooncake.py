"""Mooncake as a side of bench.local: a store's memory in another process, shared or over loopback TCP."""

from __future__ import annotations

import ctypes
import os
import random
import sys
import time
from abc import abstractmethod
from pathlib import Path

import numpy as np

from bench.local_sides import SIZES, names_of, value_of
from bench.local_ways import LONGEST, START_SECONDS, TARGET_BYTES, Peer, Servers, Way, free_port


class MooncakeWay(Way):
    """A master, a process that holds the memory, and a client here."""

    def __init__(self, directory: Path, name: str) -> None:
        os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
        os.environ.setdefault("GLOG_minloglevel", "3")
        import mooncake.store

        self.name = name
        self.rng = random.Random(7)
        self.package = Path(mooncake.store.__file__).parent
        self.store = mooncake.store.MooncakeDistributedStore()
        self.servers = Servers(directory / f"mooncake-{name.replace(' ', '-')}.log")
        try:
            self.port = self._master()
            self.targets = self._connect()
            self._fill()
            for size in SIZES:
                self._warm(size)
        except BaseException:
            self.close()
            raise

    def _master(self) -> int:
        port = free_port()
        self.servers.start(
            str(self.package / "mooncake_master"),
            f"--rpc_port={port}",
            f"--metrics_port={free_port()}",
            "--enable_metric_reporting=false",
            "--client_ttl=600",  # clients stand still while another way is on trial
            LD_LIBRARY_PATH=str(self.package),
        )
        self.servers.wait_port(port)
        return port

    @abstractmethod
    def _connect(self) -> np.ndarray:
        """Starts the process that holds the memory, connects this one, and gives its targets."""

    def _fill(self) -> None:
        self.targets[:] = 1
        place = self.targets[: max(SIZES)]
        for size in SIZES:
            for name in names_of(size):
                place[:size] = np.frombuffer(value_of(name), np.uint8)
                status = self.store.put_from(name, place.ctypes.data, size)
                if status:
                    raise RuntimeError(f"put_from: {status}: {self.servers.last_words()}")
        place[:] = 1

    def _warm(self, size: int) -> None:
        """Reads every entry into two places, so that every page is mapped everywhere, and compares."""
        names, start = names_of(size), self.targets.ctypes.data
        for at in range(0, 2 * len(names), LONGEST):
            chosen = [names[(at + i) % len(names)] for i in range(LONGEST)]
            places = [(at + i) * size for i in range(LONGEST)]
            got = self.store.batch_get_into(chosen, [start + place for place in places], [size] * LONGEST)
            if got != [size] * LONGEST:
                raise RuntimeError(f"mooncake: {got}")
            self._compare(size, chosen, places)

    def _compare(self, size: int, names: list[str], places: list[int]) -> None:
        for name, place in zip(names, places, strict=True):
            if self.targets[place : place + size].tobytes() != value_of(name):
                raise RuntimeError(f"mooncake gave wrong bytes for {name}")

    def order(self, size: int, batch: int, rounds: int) -> dict[str, float]:
        names, start = names_of(size), self.targets.ctypes.data
        offsets = range(0, len(self.targets), size)
        plans = []
        for _ in range(rounds):
            chosen = self.rng.sample(names, min(batch, len(names)))
            places = self.rng.sample(offsets, len(chosen))
            plans.append((chosen, [start + at for at in places], [size] * len(chosen)))
        one, many = self.store.get_into, self.store.batch_get_into
        clock = time.perf_counter()
        for chosen, places, sizes in plans:
            got = many(chosen, places, sizes) if len(chosen) > 1 else [one(chosen[0], places[0], size)]
            if got != sizes:
                raise RuntimeError(f"mooncake: {got}")
        seconds = time.perf_counter() - clock
        chosen, places, _ = plans[-1]
        self._compare(size, chosen, [place - start for place in places])
        return {"seconds": seconds, "bytes": float(sum(len(c) for c, _, _ in plans) * size)}


class MooncakeShared(MooncakeWay):
    """`mooncake_client` holds the memory and copies into memory that it shares with this process."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, "shared memory")

    def _connect(self) -> np.ndarray:
        port = free_port()
        self.servers.start(
            str(self.package / "mooncake_client"),
            "--host=127.0.0.1",
            f"--port={port}",
            "--metadata_server=P2PHANDSHAKE",
            f"--master_server_address=127.0.0.1:{self.port}",
            "--global_segment_size=1 GB",
            "--protocol=tcp",
            f"--threads={os.cpu_count()}",
            LD_LIBRARY_PATH=str(self.package),
        )
        self.servers.wait_port(port)
        status = self.store.setup_dummy(2 * TARGET_BYTES, 64 << 20, f"127.0.0.1:{port}")
        address = self.store.alloc_from_mem_pool(TARGET_BYTES) if status == 0 else 0
        if not address or self.store.register_buffer(address, TARGET_BYTES):
            raise RuntimeError(f"setup_dummy: {status}: {self.servers.last_words()}")
        return np.frombuffer((ctypes.c_char * TARGET_BYTES).from_address(address), np.uint8)


HOLDER = """
import sys
from mooncake.store import MooncakeDistributedStore
store = MooncakeDistributedStore()
if store.setup("127.0.0.1", "P2PHANDSHAKE", 1 << 30, 64 << 20, "tcp", "", sys.argv[1]):
    sys.exit("setup failed")
open(sys.argv[2], "w").close()
while True:
    __import__("time").sleep(1000)
"""


class MooncakeTcp(MooncakeWay):
    """Another process holds the memory, this one is a full client: loopback TCP."""

    def __init__(self, directory: Path) -> None:
        self.mark = directory / "mooncake-holder"
        super().__init__(directory, "tcp")

    def _connect(self) -> np.ndarray:
        master = f"127.0.0.1:{self.port}"
        self.servers.start(sys.executable, "-c", HOLDER, master, str(self.mark))
        end = time.monotonic() + START_SECONDS
        while not self.mark.exists():
            if time.monotonic() > end or self.servers.children[-1].poll() is not None:
                raise RuntimeError(f"the holder does not start: {self.servers.last_words()}")
            time.sleep(0.05)
        status = self.store.setup("127.0.0.1", "P2PHANDSHAKE", 0, 64 << 20, "tcp", "", master)
        targets = np.ones(TARGET_BYTES, np.uint8)
        if status or self.store.register_buffer(targets.ctypes.data, TARGET_BYTES):
            raise RuntimeError(f"setup: {status}")
        return targets


class Mooncake(Peer):
    """get_into of one entry, batch_get_into of several."""

    ways = (MooncakeShared, MooncakeTcp)
