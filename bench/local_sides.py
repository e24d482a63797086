"""Sides of bench.local, each a process of its own that takes orders by JSON lines: `python -m bench.local_sides NAME`.

An order is {"size", "batch", "rounds", "verify"}: read `batch` entries of `size` bytes into the side's own targets,
`rounds` times, other entries each time; the answer is {"seconds", "bytes"}. {"fill": ...} comes first, {"quit"} last.
Sides that run in another environment (bench.local_peers) speak the same.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import random
import socket
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np

SIZES = (64 << 10, 1 << 20, 4 << 20)
TOTAL_BYTES = 128 << 20
"""Of each size so much is kept: more than the processor's caches hold, so that no side reads out of those."""


def names_of(size: int) -> list[str]:
    """Names of the entries of one size."""
    return [f"{size}-{i}" for i in range(TOTAL_BYTES // size)]


def value_of(name: str) -> bytes:
    """The bytes of an entry: the same in every process."""
    size, number = map(int, name.split("-"))
    return random.Random(number % 8).randbytes(min(size, 1 << 16)) * max(1, size >> 16)


class Side(ABC):
    """Somebody who gives entries to this process."""

    def __init__(self) -> None:
        memory = mmap.mmap(-1, 2 * TOTAL_BYTES)
        self.targets = np.frombuffer(memory, np.uint8)
        self.targets[:] = 1
        self.rng = random.Random(7)

    def fill(self) -> None:
        """Puts the entries there; where the side is made with them, nothing."""
        del self

    @abstractmethod
    def read(self, names: list[str], targets: list[np.ndarray], *, verify: bool) -> None:
        """Reads entries into targets."""

    def order(self, size: int, batch: int, rounds: int, verify: bool) -> dict[str, float]:
        """Performs one order."""
        names = names_of(size)
        slots = [self.targets[at : at + size] for at in range(0, len(self.targets), size)]
        plans = []
        for _ in range(rounds):
            chosen = self.rng.sample(names, min(batch, len(names)))
            places = self.rng.sample(slots, len(chosen))
            plans.append((chosen, places))
        start = time.perf_counter()
        for chosen, places in plans:
            self.read(chosen, places, verify=verify)
        seconds = time.perf_counter() - start
        chosen, places = plans[-1]
        for name, place in zip(chosen, places, strict=True):
            if place.tobytes() != value_of(name):
                raise SystemExit(f"{type(self).__name__} gave wrong bytes for {name}")
        return {"seconds": seconds, "bytes": float(sum(len(c) for c, _ in plans) * size)}

    def extra(self, what: str, argument: int) -> dict[str, object]:
        """Orders of one side alone."""
        raise SystemExit(f"{type(self).__name__} knows nothing of {what} {argument}")


class TierCache(Side):
    """A client of a shared directory."""

    def __init__(self, directory: str, options: str) -> None:
        super().__init__()
        import tiercache.assemble
        import tiercache.cpu.view
        import tiercache.wire.client
        from tiercache.model import Outcome

        self._hit = Outcome.HIT
        tiercache.assemble.io_loop()
        start = time.perf_counter()
        self.cache = tiercache.open(directory, share=True, **json.loads(options))
        self.open_ms = (time.perf_counter() - start) * 1e3

    def fill(self) -> None:
        for size in SIZES:
            names = names_of(size)
            for at in range(0, len(names), 32):
                some = names[at : at + 32]
                outcomes = self.cache.put(some, [value_of(name) for name in some])
                if set(outcomes) != {self._hit}:
                    raise SystemExit(f"put: {outcomes}")

    def read(self, names: list[str], targets: list[np.ndarray], *, verify: bool) -> None:
        outcomes = self.cache.get_into(names, targets, verify=verify)
        if outcomes.count(self._hit) != len(names):
            raise SystemExit(f"get_into: {outcomes}")

    def extra(self, what: str, argument: int) -> dict[str, object]:
        if what == "open_ms":
            return {"value": self.open_ms}
        if what == "rtt":
            return {"values": self._round_trips(argument)}
        if what == "rtt_busy":
            return {"values": self._beside(argument, _busy_in_c)}
        if what == "rtt_python":
            return {"values": self._beside(argument, _busy_in_python)}
        if what == "lease_verify":
            return self._lease_verify(argument)
        return super().extra(what, argument)

    def _round_trips(self, count: int) -> list[float]:
        """Seconds of a real lease and its release, one key at a time."""
        names = names_of(SIZES[0])
        taken = []
        for i in range(count):
            start = time.perf_counter()
            lease = self.cache.lease([names[i % len(names)]])
            lease.release()
            taken.append(time.perf_counter() - start)
            if lease.outcomes != [self._hit]:
                raise SystemExit(f"lease: {lease.outcomes}")
        return taken

    def _beside(self, count: int, work) -> list[float]:
        stop = threading.Event()
        thread = threading.Thread(target=work, args=(stop,), daemon=True)
        thread.start()
        try:
            return self._round_trips(count)
        finally:
            stop.set()
            thread.join()

    def _lease_verify(self, size: int) -> dict[str, object]:
        """Lease in place plus a hash of every byte, beside xxh3 of the same bytes alone; turns, 32 entries each."""
        import xxhash

        names = names_of(size)
        ours, alone, hashed = [], [], 0
        for _ in range(9):
            some = self.rng.sample(names, min(32, len(names)))
            start = time.perf_counter()
            with self.cache.lease(some) as lease:
                sums = [xxhash.xxh3_64_intdigest(lease.view(i)) for i in range(len(some))]
            ours.append(time.perf_counter() - start)
            hashed += len(sums) * size
            some = self.rng.sample(names, min(32, len(names)))
            with self.cache.lease(some) as lease:
                views = [lease.view(i) for i in range(len(some))]
                start = time.perf_counter()
                sums = [xxhash.xxh3_64_intdigest(view) for view in views]
                alone.append(time.perf_counter() - start)
                del views
        return {"ours": ours, "alone": alone, "bytes": hashed}


def _busy_in_c(stop: threading.Event) -> None:
    """Holds a core and not the GIL."""
    import hashlib

    data = bytes(4 << 20)
    while not stop.is_set():
        hashlib.sha256(data).digest()


def _busy_in_python(stop: threading.Event) -> None:
    """Holds a core and the GIL."""
    while not stop.is_set():
        sum(range(1000))


class Memory(Side):
    """Plain memmove out of memory that is mapped already, and one byte over a socket and back: the limits."""

    def __init__(self) -> None:
        super().__init__()
        self.sources = {}
        for size in SIZES:
            memory = mmap.mmap(-1, TOTAL_BYTES)
            self.sources[size] = np.frombuffer(memory, np.uint8)
            for i, name in enumerate(names_of(size)):
                self.sources[size][i * size : (i + 1) * size] = np.frombuffer(value_of(name), np.uint8)

    def read(self, names: list[str], targets: list[np.ndarray], *, verify: bool) -> None:
        memmove = ctypes.memmove
        for name, target in zip(names, targets, strict=True):
            size, number = map(int, name.split("-"))
            memmove(target.ctypes.data, self.sources[size].ctypes.data + number * size, size)

    def extra(self, what: str, argument: int) -> dict[str, object]:
        return {"values": _to_and_fro(argument)} if what == "socket_rtt" else super().extra(what, argument)


def _to_and_fro(count: int) -> list[float]:
    """Seconds that one byte takes to another process and back, over a Unix socket that both sleep on."""
    here, there = socket.socketpair()
    echo = "import socket; s = socket.socket(fileno=0)\nwhile data := s.recv(1): s.send(data)"
    with subprocess.Popen([sys.executable, "-c", echo], stdin=there):
        there.close()
        taken = []
        for _ in range(count):
            start = time.perf_counter()
            here.send(b"x")
            here.recv(1)
            taken.append(time.perf_counter() - start)
        here.close()
    return taken


class Files(Side):
    """Plain files in shared memory, read with readinto: what somebody without a cache would do."""

    def __init__(self, directory: str) -> None:
        super().__init__()
        self.directory = Path(directory)

    def fill(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for size in SIZES:
            for name in names_of(size):
                (self.directory / name).write_bytes(value_of(name))

    def read(self, names: list[str], targets: list[np.ndarray], *, verify: bool) -> None:
        for name, target in zip(names, targets, strict=True):
            with open(self.directory / name, "rb", buffering=0) as file:
                file.readinto(target)


class Redis(Side):
    """GET, or MGET of a batch, over a Unix socket, and a copy into the target."""

    def __init__(self, path: str) -> None:
        super().__init__()
        import redis

        self.client = redis.Redis(unix_socket_path=path)

    def fill(self) -> None:
        for size in SIZES:
            for name in names_of(size):
                self.client.set(name, value_of(name))

    def read(self, names: list[str], targets: list[np.ndarray], *, verify: bool) -> None:
        values = self.client.mget(names) if len(names) > 1 else [self.client.get(names[0])]
        for value, target in zip(values, targets, strict=True):
            target[:] = np.frombuffer(value, np.uint8)


SIDES = {"tiercache": TierCache, "memory": Memory, "files": Files, "redis": Redis}


def serve(side: Side) -> None:
    """Takes orders from stdin until told to quit."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print goes elsewhere
    print(json.dumps({"ready": True}), file=out)
    for line in sys.stdin:
        order = json.loads(line)
        if "quit" in order:
            break
        if "fill" in order:
            side.fill()
            answer: dict[str, object] = {}
        elif "what" in order:
            answer = side.extra(order["what"], order["argument"])
        else:
            answer = dict(side.order(order["size"], order["batch"], order["rounds"], order["verify"]))
        print(json.dumps(answer), file=out)


if __name__ == "__main__":
    serve(SIDES[sys.argv[1]](*sys.argv[2:]))
