"""One client of a shared directory whose owner is killed again and again: `python -m tests.crash.owner_client ...`.

Writes durable and visible values, reads its own and others', holds leases with views across the owner's deaths, and
reads files through the filesystem. Says on stdout, one line each: `a N` a durable put was acknowledged, `w TEXT` wrong
bytes, `l N` a durable value is gone, `x TEXT` a fault, `b COUNTS...` beats (one a thread), `s ...` sums at last.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

import fsspec

import tiercache
from tests.crash import joint
from tests.crash.ledger import value_of
from tiercache.errors import UnavailableError
from tiercache.model import Outcome

VALUE_BYTES = (3_000, 20_000, 70_000, 200_000)
BATCH = 4
BEAT_S = 0.1
MINE = 1_000_000
"""Client c has the numbers from c * MINE on."""
OPTIONS = {
    "memory_bytes": 96 << 20,
    "ssd_bytes": 6 << 30,  # never full: an eviction would look like a loss
    "segment_bytes": 16 << 20,
    "page_bytes": 256 << 10,
    "disk_free_floor_bytes": 1 << 20,
    "slots_max": 1 << 14,
    "linger_s": 2.0,
}


def size_of(number: int) -> int:
    """Size of value `number`."""
    return VALUE_BYTES[number % len(VALUE_BYTES)]


def name_of(number: int) -> str:
    """Its name."""
    return f"value {number}"


class Client:
    """Threads that use the cache until stdin ends."""

    def __init__(self, directory: str, files: str, number: int, seed: str) -> None:
        self.first = number * MINE
        self.numbers = itertools.count(self.first)
        self.durable: list[int] = []
        self.seed, self.stop, self.lock = seed, threading.Event(), threading.Lock()
        self.counts = {"hits": 0, "misses": 0, "refused": 0, "views": 0, "pages": 0, "parts": 0, "blocks": 0}
        self.cache = tiercache.open(directory, share=True, **OPTIONS)
        self.files = sorted(Path(files).iterdir())
        self.filesystem = fsspec.filesystem(
            "tiercache", target_protocol="file", directory=directory, share=True, skip_instance_cache=True, **OPTIONS
        )

    def say(self, *words: object) -> None:
        """One line to the parent, whole."""
        line = " ".join(map(str, words)).replace("\n", " | ")[:1000] + "\n"
        with self.lock:
            os.write(1, line.encode())

    def live(self) -> None:
        """Until the parent closes stdin."""
        steps: list[Callable[[random.Random], None]] = [self.write, self.read, self.hold, self.read_file, self.blocks]
        beats = [0] * len(steps)
        threads = [
            threading.Thread(target=self.work, args=(i, steps[i], beats), daemon=True) for i in range(len(steps))
        ]
        for thread in threads:
            thread.start()
        ended = threading.Thread(target=lambda: (sys.stdin.read(), self.stop.set()), daemon=True)
        ended.start()
        while not self.stop.wait(BEAT_S):
            self.say("b", *beats)
        for thread in threads:
            thread.join()
        self.check_all()
        self.filesystem.close()
        self.cache.close()
        self.say("s", *(f"{name}={count}" for name, count in self.counts.items()))

    def work(self, place: int, step: Callable[[random.Random], None], beats: list[int]) -> None:
        """Repeats a step; a fault is told and ends nothing."""
        rng = random.Random(f"{self.seed}/{place}")
        while not self.stop.is_set():
            try:
                step(rng)
            except BaseException:
                self.say("x", traceback.format_exc(limit=-4))
            beats[place] += 1

    def write(self, rng: random.Random) -> None:
        """A few values, durable or not; while no owner can be had, puts may be refused."""
        self.stop.wait(rng.uniform(0, 0.2))
        numbers = [next(self.numbers) for _ in range(rng.randint(1, BATCH))]
        durable = rng.random() < 0.5
        try:
            outcomes = self.cache.put(
                [name_of(n) for n in numbers], [value_of(n, size_of(n)) for n in numbers], durable=durable
            )
        except UnavailableError:
            self.counts["refused"] += 1
            return
        if durable:
            for number, outcome in zip(numbers, outcomes, strict=True):
                if outcome is Outcome.HIT:
                    self.durable.append(number)
                    self.say("a", number)

    def some(self, rng: random.Random) -> list[int]:
        """Numbers worth asking for: own durable ones, own recent ones, other clients'."""
        own = rng.sample(self.durable, min(3, len(self.durable)))
        others = [rng.randrange(4) * MINE + rng.randrange(200) for _ in range(2)]
        return list(dict.fromkeys(own + others))

    def read(self, rng: random.Random) -> None:
        """Copies out; a durable value may be missed while the owner changes, never for good."""
        self.compare(self.some(rng))

    def compare(self, numbers: list[int]) -> list[int]:
        """Numbers that were missed."""
        targets = [bytearray(size_of(n)) for n in numbers]
        outcomes = self.cache.get_into([name_of(n) for n in numbers], targets)
        missed = []
        for number, target, outcome in zip(numbers, targets, outcomes, strict=True):
            if outcome is Outcome.HIT:
                self.counts["hits"] += 1
                if target != value_of(number, size_of(number)):
                    self.say("w", f"value {number} differs")
            else:
                self.counts["misses"] += 1
                missed.append(number)
        return missed

    def hold(self, rng: random.Random) -> None:
        """Views in place are looked at, kept for a while, and looked at again."""
        numbers = self.some(rng)
        with self.cache.lease([name_of(n) for n in numbers]) as lease:
            views = [(n, lease.view(i)) for i, n in enumerate(numbers) if lease.outcomes[i] is Outcome.HIT]
        for _ in range(2):
            for number, view in views:
                self.counts["views"] += 1
                if view != value_of(number, size_of(number)):
                    self.say("w", f"a view of value {number} differs")
            self.stop.wait(rng.uniform(0, 0.1))

    def read_file(self, rng: random.Random) -> None:
        """A span of a file through the filesystem, beside the file itself."""
        path = rng.choice(self.files)
        size = path.stat().st_size
        start = rng.randrange(size)
        stop = min(size, start + rng.randrange(1, 600_000))
        got = self.filesystem.cat_file(str(path), start=start, end=stop)
        with open(path, "rb") as file:
            file.seek(start)
            if got != file.read(stop - start):
                self.say("w", f"{path.name} [{start}, {stop}) differs")
        self.counts["pages"] += 1

    def blocks(self, rng: random.Random) -> None:
        """Blocks of chains that all clients fill together."""
        self.stop.wait(rng.uniform(0, 0.05))
        if rng.random() < 0.5:
            self.counts["parts"] += joint.write(self.cache, rng)
        else:
            self.counts["blocks"] += joint.read(self.cache, rng, lambda text: self.say("w", text))

    def check_all(self) -> None:
        """With the owner left alone at last, everything durable must be there."""
        with contextlib.suppress(UnavailableError):
            self.cache.flush()
        for at in range(0, len(self.durable), 8):
            for number in self.compare(self.durable[at : at + 8]):
                if self.compare([number]):
                    self.say("l", number)


if __name__ == "__main__":
    Client(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]).live()
