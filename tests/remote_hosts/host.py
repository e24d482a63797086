"""One host of the show: a cache in a directory of its own, and nothing in common with others but a bucket.

`python host.py write|read SETTINGS CHAIN COUNT`; SETTINGS is JSON. Says what it does in lines of JSON.
"""

from __future__ import annotations

import json
import sys
import threading
import time

import numpy as np

import tiercache
from tiercache.keys import chain, namespace

BLOCK_BYTES = 256 << 10
BATCH = 16
PATIENCE_S = 20.0


def keys_of(which: int, count: int) -> list[bytes]:
    """The blocks of one chain."""
    return chain(namespace("remote hosts", str(which)), [number.to_bytes(4, "little") for number in range(count)])


def value_of(key: bytes) -> bytes:
    """The only right bytes of a block."""
    seed = int.from_bytes(key[:8], "little")
    return np.random.default_rng(seed).integers(0, 256, BLOCK_BYTES - seed % 1000, dtype=np.uint8).tobytes()


def say(**facts: object) -> None:
    """One line for the parent."""
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


def write(settings: dict[str, object], which: int, count: int) -> None:
    """Puts blocks, and tells how many have gone to the bucket, until it is killed."""
    cache = tiercache.open(**settings)
    every = keys_of(which, count)
    for start in range(0, count, BATCH):
        keys = every[start : start + BATCH]
        cache.put_chain(keys, [value_of(key) for key in keys], parent=every[start - 1] if start else b"")
        say(put=start + len(keys), uploaded=uploaded(cache))
        # As an engine would: blocks come with time between them, and uploads go on beside.
        threading.Event().wait(0.02)
    until = time.monotonic() + PATIENCE_S
    while uploaded(cache) + dropped(cache) < count and time.monotonic() < until:
        threading.Event().wait(0.05)
        say(put=count, uploaded=uploaded(cache))
    say(done=True, uploaded=uploaded(cache))
    threading.Event().wait(PATIENCE_S)


def uploaded(cache: tiercache.BlockingCache) -> int:
    """Blocks that have gone to the bucket."""
    return int(cache.stats().get("tiercache_uploads_total", 0))


def dropped(cache: tiercache.BlockingCache) -> int:
    """Blocks that did not."""
    return int(cache.stats().get("tiercache_uploads_dropped_total", 0))


def read(settings: dict[str, object], which: int, count: int) -> None:
    """Gets what there is of the blocks, one by one and as a chain, and compares every byte."""
    cache = tiercache.open(**settings)
    began = time.monotonic()
    keys = keys_of(which, count)
    right = wrong = 0
    for start in range(0, count, BATCH):
        some = keys[start : start + BATCH]
        with cache.lease(some) as lease:
            for i, key in enumerate(some):
                if lease.outcomes[i] == 0:
                    good = bytes(lease.view(i)) == value_of(key)
                    right, wrong = right + good, wrong + (not good)
    seconds = time.monotonic() - began
    stats = cache.stats()
    cache.close()
    say(
        right=right,
        wrong=wrong,
        seconds=round(seconds, 3),
        remote_hits=stats.get('tiercache_hits_total{tier="remote",kind="block"}', 0),
        corruptions=sum(value for name, value in stats.items() if name.startswith("tiercache_corruptions_total")),
    )


if __name__ == "__main__":
    role, given, which_, count_ = sys.argv[1:]
    {"write": write, "read": read}[role](json.loads(given), int(which_), int(count_))
