"""The processes that `bench.ssd` starts, kills and times: as little imported as a real program would.

`python -m bench.ssd_child NAME DIRECTORY ENTRIES [NUMBER]`, where NAME is fill, hold, restart or first_hit. Times are
of the clock that all processes of a machine share, so that the parent can subtract its own.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time

from tiercache.buffers import Buffer, part_digests
from tiercache.model import PART_BYTES, Name, Outcome, Payload
from tiercache.ssd.tier import SsdTier
from tiercache.tier import Want

TINY_BYTES = 64
SEGMENT_BYTES = 256 << 20


def tiny(number: int) -> tuple[Payload, bytes]:
    """Entry of the million: a page of a file of 64 pages."""
    data = number.to_bytes(8, "big") * (TINY_BYTES // 8)
    name = Name(random.Random(number // 64).randbytes(16), number % 64)
    return Payload(name, TINY_BYTES, PART_BYTES, 1, part_digests(Buffer.of(data), PART_BYTES), tick=number), data


def open_tier(home: str, entries: int) -> SsdTier:
    """Room for so many records of two blocks, and some more."""
    return SsdTier(home, entries * 2 * 4096 * 5 // 4 + 4 * SEGMENT_BYTES, segment_bytes=SEGMENT_BYTES)


async def fill(home: str, entries: int) -> None:
    """Writes the entries, says so, and waits for its end."""
    tier = open_tier(home, entries)
    for start in range(0, entries, 4096):
        batch = [tiny(i) for i in range(start, min(start + 4096, entries))]
        answers = await tier.write([p for p, _ in batch], [Buffer.of(d) for _, d in batch])
        assert min(answers) >= 0, answers
    await tier.flush()
    print("ready", flush=True)
    await asyncio.sleep(3600)


async def hold(home: str, entries: int) -> None:
    """Opens, writes a little, says so, and waits for its end."""
    tier = open_tier(home, entries)
    payload, data = tiny(0)
    tier.free(await tier.write([payload], [Buffer.of(data)]))
    await tier.flush()
    print("ready", flush=True)
    await asyncio.sleep(3600)


async def restart(home: str, entries: int) -> None:
    """Opens and loads the index; tells when."""
    from tiercache.index import Index
    from tiercache.model import TierId
    from tiercache.policy import POLICIES

    imported = time.monotonic()
    tier = open_tier(home, entries)
    opened = time.monotonic()
    index = Index(entries * 2, [POLICIES["lru"](), POLICIES["lru"]()])
    count = 0
    scanning_s = 0.0
    scan = tier.scan()
    while True:
        start = time.monotonic()
        facts = next(scan, None)
        scanning_s += time.monotonic() - start
        if facts is None:
            break
        index.load(facts, TierId.SSD)
        count += len(facts.keys)
    told = {"imported": imported, "opened": opened, "end": time.monotonic(), "scan_s": scanning_s, "entries": count}
    print(json.dumps(told), flush=True)
    await tier.close()


async def first_hit(home: str, entries: int, number: int) -> None:
    """Opens, finds one name, reads it; tells when."""
    imported = time.monotonic()
    tier = open_tier(home, entries)
    opened = time.monotonic()
    payload, data = tiny(number)
    facts = await tier.find([payload.name])
    target = bytearray(TINY_BYTES)
    want = Want(int(facts.locations[0]), payload.name, payload.size, PART_BYTES, 1)
    outcomes = await tier.read([want], [Buffer.of(target, writable=True)])
    end = time.monotonic()
    assert outcomes == [Outcome.HIT] and target == data
    print(json.dumps({"imported": imported, "opened": opened, "end": end}), flush=True)
    await tier.close()


if __name__ == "__main__":
    PARTS = {"fill": fill, "hold": hold, "restart": restart, "first_hit": first_hit}
    asyncio.run(PARTS[sys.argv[1]](sys.argv[2], *map(int, sys.argv[3:])))  # type: ignore[operator]
