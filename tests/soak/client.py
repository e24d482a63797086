"""One client of the soak: `python -m tests.soak.client DIR FILES NUMBER SEED [--visit stay|leave]`; see __main__.

Says on stdout, one line each: `wrong ...`, `fault ...`, and at last `sums {...}`. Ends when stdin ends, a visitor by
itself (`leave`) or never (`stay`: it is killed).
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import fsspec

import tiercache
from tests.crash import joint
from tests.crash.ledger import value_of
from tiercache.errors import UnavailableError
from tiercache.model import Name, Outcome

MIB = 1 << 20
NAMES = 400
SIZES = (3_000, 70_000, 400_000, 1_200_000)
OPTIONS = {
    "memory_bytes": 96 * MIB,
    "ssd_bytes": 512 * MIB,
    "segment_bytes": 16 * MIB,
    "page_bytes": 256 << 10,
    "disk_free_floor_bytes": MIB,
    "slots_max": 1 << 14,
    "linger_s": 2.0,
}
"""Small, so that everything is evicted again and again."""


class Client:
    """Threads that use the cache."""

    def __init__(self, directory: str, files: str, number: int, seed: str) -> None:
        self.directory, self.number, self.seed = directory, number, f"{seed}/{number}"
        self.files = sorted(Path(files).iterdir())
        self.stop, self.lock = threading.Event(), threading.Lock()
        self.counts: Counter[str] = Counter()
        self.open()

    def open(self) -> None:
        """Opens the cache and the filesystem."""
        self.cache = tiercache.open(self.directory, share=True, **OPTIONS)
        self.filesystem = fsspec.filesystem(
            "tiercache",
            target_protocol="file",
            directory=self.directory,
            share=True,
            skip_instance_cache=True,
            **OPTIONS,
        )

    def close(self) -> None:
        """Closes both."""
        self.filesystem.close()
        self.cache.close()

    def say(self, *words: object) -> None:
        """One line to the parent, whole."""
        line = " ".join(map(str, words)).replace("\n", " | ")[:1000] + "\n"
        with self.lock:
            os.write(1, line.encode())

    def mine(self, rng: random.Random) -> int:
        """A number of this client's own."""
        return self.number * NAMES + rng.randrange(NAMES)

    @staticmethod
    def anybody(rng: random.Random) -> int:
        """A number of any client."""
        return rng.randrange(6) * NAMES + rng.randrange(NAMES)

    def put(self, rng: random.Random) -> None:
        """Some values, sometimes durable."""
        numbers = list({self.mine(rng) for _ in range(rng.randint(1, 4))})
        durable = rng.random() < 0.2
        values = [value_of(n, SIZES[n % 4]) for n in numbers]
        try:
            outcomes = self.cache.put([f"value {n}" for n in numbers], values, durable=durable)
        except UnavailableError:
            self.counts["refused"] += 1
            return
        self.counts["durable" if durable else "put"] += outcomes.count(Outcome.HIT)

    def get(self, rng: random.Random) -> None:
        """Copies out and compares."""
        numbers = [self.anybody(rng) for _ in range(rng.randint(1, 6))]
        for n, found in zip(numbers, self.cache.get([f"value {n}" for n in numbers]), strict=True):
            if isinstance(found, bytes):
                self.check(n, found)
            self.counts["hit" if isinstance(found, bytes) else "miss"] += 1

    def check(self, n: int, found: object) -> None:
        """Compares one value."""
        if found != value_of(n, SIZES[n % 4]):
            self.say("wrong", f"value {n}")

    def lease(self, rng: random.Random) -> None:
        """Holds views for a moment; some leases are let go by nothing but the collector."""
        numbers = [self.anybody(rng) for _ in range(4)]
        lease = self.cache.lease([f"value {n}" for n in numbers])
        for i, n in enumerate(numbers):
            if lease.outcomes[i] is Outcome.HIT:
                view = lease.view(i)
                self.stop.wait(0.002)
                self.check(n, bytes(view))
                self.counts["view"] += 1
                del view
        if rng.random() < 0.5:
            lease.release()

    def delete(self, rng: random.Random) -> None:
        """Forgets one."""
        self.cache.delete([f"value {self.mine(rng)}"])
        self.counts["delete"] += 1

    def read(self, rng: random.Random) -> None:
        """A span of a file through the filesystem, beside the file itself."""
        path = rng.choice(self.files)
        size = path.stat().st_size
        start = rng.randrange(size)
        stop = min(size, start + rng.randrange(1, 600_000))
        with open(path, "rb") as file:
            file.seek(start)
            if self.filesystem.cat_file(str(path), start=start, end=stop) != file.read(stop - start):
                self.say("wrong", f"{path.name} [{start}, {stop})")
        self.counts["read"] += 1

    def blocks(self, rng: random.Random) -> None:
        """Blocks of chains that all clients fill together; some are deleted."""
        if rng.random() < 0.5:
            self.counts["parts"] += joint.write(self.cache, rng)
        else:
            self.counts["blocks"] += joint.read(self.cache, rng, lambda text: self.say("wrong", text))
        if rng.random() < 0.05:
            names = joint.names_of(rng.randrange(joint.CHAINS))
            self.cache.delete([Name(name) for name in rng.sample(names, 3)])

    def fork(self, rng: random.Random) -> None:
        """A child that opens anew, puts and gets, and goes: by closing, or just so."""
        pid = os.fork()
        if pid:
            _, status = os.waitpid(pid, 0)
            self.counts["fork"] += 1
            if status:
                self.say("fault", f"a forked child ended with status {status}")
            return
        status = 1
        try:
            self.lock = threading.Lock()
            with tiercache.open(self.directory, share=True, **OPTIONS) as cache:
                number = self.mine(rng)
                cache.put([f"value {number}"], [value_of(number, SIZES[number % 4])])
                found = cache.get([f"value {number}"])[0]
                if isinstance(found, bytes):
                    self.check(number, found)
                if rng.random() < 0.5:
                    os._exit(0)
            status = 0
        except BaseException:
            self.say("fault", "in a forked child", traceback.format_exc(limit=-4))
        finally:
            os._exit(status)

    def work(self, place: int, steps: list[Callable[[random.Random], None]]) -> None:
        """Does this and that."""
        rng = random.Random(f"{self.seed}/{place}")
        while not self.stop.wait(0.01):
            try:
                rng.choice(steps)(rng)
            except BaseException:
                self.say("fault", traceback.format_exc(limit=-4))

    def live(self) -> None:
        """Until stdin ends. The last client comes and goes all the while; each forks now and then."""
        several = [self.put, self.put, self.get, self.get, self.lease, self.delete, self.read, self.blocks, self.blocks]
        threads = [threading.Thread(target=self.work, args=(i, several)) for i in range(2)]
        ended = threading.Event()
        threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
        rng = random.Random(self.seed)
        if self.number == 5:
            while not ended.wait(0.2):
                for _ in range(20):
                    try:
                        rng.choice(several)(rng)
                    except BaseException:
                        self.say("fault", traceback.format_exc(limit=-4))
                self.close()
                self.open()
                self.counts["reopen"] += 1
        else:
            for thread in threads:
                thread.start()
            while not ended.wait(3.0):
                self.fork(rng)
            self.stop.set()
            for thread in threads:
                thread.join()
        self.close()
        self.say("sums", json.dumps(self.counts))

    def visit(self, how: str) -> None:
        """Comes, does a little, and goes, or works until it is killed."""
        rng = random.Random(os.getpid())
        steps = [self.put, self.get, self.lease, self.read, self.blocks]
        turn = 0
        while how == "stay" or turn < 30:
            rng.choice(steps)(rng)
            turn += 1
        self.close()


def main(directory: str, files: str, number: str, seed: str, *visit: str) -> None:
    """One life."""
    client = Client(directory, files, int(number), seed)
    try:
        if visit:
            client.visit(visit[1])
        else:
            client.live()
    except BaseException:
        client.say("fault", traceback.format_exc(limit=-4))


if __name__ == "__main__":
    main(*sys.argv[1:])
