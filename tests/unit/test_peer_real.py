"""Caches with real sockets and threads, in one process: what one has, the others get, whatever else happens."""

from __future__ import annotations

import random
import socket
import threading
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

import tiercache
from tiercache.errors import ClosedError
from tiercache.keys import chain, namespace, object_key
from tiercache.model import Name, Outcome
from tiercache.net import usable
from tiercache.testing.model import made_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from tiercache import TierCache

OBJECTS = [Name(object_key("real", str(number))) for number in range(60)]
CHAIN = chain(namespace("real"), [bytes([number]) for number in range(30)])
SIZES = (1, 4096, 70_000, 400_000)


def value(name: Name) -> bytes:
    return made_bytes(name, SIZES[name.key[-1] % 4])


def block(key: bytes) -> bytes:
    return made_bytes(Name(key), 50_000)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Uses:
    """Threads that use caches, and compare every byte."""

    def __init__(self, caches: list[TierCache]) -> None:
        self.caches, self.faults, self.over = caches, [], threading.Event()
        self.hits = 0

    def use(self, seed: int) -> None:
        rng = random.Random(seed)
        try:
            while not self.over.is_set():
                cache, choice = rng.choice(self.caches), rng.random()
                if choice < 0.2:
                    some = rng.sample(OBJECTS, 5)
                    cache.put(some, [value(name) for name in some])
                elif choice < 0.3:
                    length = rng.randint(1, len(CHAIN))
                    cache.put_chain(CHAIN[:length], [block(key) for key in CHAIN[:length]])
                elif choice < 0.4:
                    cache.delete(rng.sample(OBJECTS, 5))
                elif choice < 0.7:
                    some = rng.choices(OBJECTS, k=6)
                    for name, found in zip(some, cache.get(some), strict=True):
                        assert isinstance(found, Outcome) or bytes(found) == value(name), name
                        self.hits += not isinstance(found, Outcome)
                else:
                    with cache.match(CHAIN) as lease:
                        for i in range(len(lease)):
                            assert bytes(lease.view(i)) == block(CHAIN[i])
                        self.hits += len(lease)
        except ClosedError:
            return
        except BaseException as fault:
            self.faults.append(fault)


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_threads_on_three_caches_one_of_which_comes_and_goes(tmp_path: Path, transport: str) -> None:
    if not usable(transport).usable:
        pytest.skip(usable(transport).why)
    ports = [free_port() for _ in range(3)]

    def opened(number: int) -> TierCache:
        return tiercache.open(
            str(tmp_path / f"{number}-{random.random()}"), memory_bytes="24MiB", ssd_bytes=0, share=False,
            peer_transport=transport, peer_listen=f"127.0.0.1:{ports[number]}", peer_deadline_s=2.0,
            peers=",".join(f"127.0.0.1:{port}" for port in ports), peer_landing_bytes="8MiB",
        )  # fmt: skip

    with ExitStack() as stack:
        kept = [stack.enter_context(opened(number)) for number in range(2)]
        uses = Uses(kept)
        threads = [threading.Thread(target=uses.use, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(3):
                with opened(2) as guest:
                    passing = Uses([guest])
                    thread = threading.Thread(target=passing.use, args=(9,))
                    thread.start()
                    began = time.monotonic()
                    while not passing.hits and time.monotonic() - began < 20 and thread.is_alive():
                        thread.join(0.05)
                    passing.over.set()
                    thread.join(30)
                    assert not thread.is_alive() and not passing.faults and passing.hits
        finally:
            uses.over.set()
            for thread in threads:
                thread.join(30)
        assert not uses.faults
        assert uses.hits
        assert sum(cache.stats().get('tiercache_hits_total{tier="peer",kind="block"}', 0) for cache in kept) > 0
