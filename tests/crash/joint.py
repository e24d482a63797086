"""Blocks that several processes fill together, as a part of the load of crash and soak tests.

Everybody knows the one right content of every block. A writer joins some of a chain, whole parts or pieces of them,
writes some of what it was granted, commits some of that, and now and then goes away without a word; a reader leases
some parts of some blocks, and compares.
"""

from __future__ import annotations

import functools
import hashlib
from typing import TYPE_CHECKING, Any

import xxhash

from tiercache.buffers import Buffer, copy_parts, part_digests
from tiercache.errors import UnavailableError
from tiercache.keys import chain, namespace
from tiercache.model import Outcome
from tiercache.sync import wait

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

CHAINS, BLOCKS = 12, 24
PART = 4096
PARTS = 6
SIZE = PART * PARTS - 1_000
ALL = (1 << PARTS) - 1


@functools.cache
def names_of(number: int) -> list[bytes]:
    """Digests of chain `number`."""
    return chain(namespace("crash", str(number)), [str(i).encode() for i in range(BLOCKS)])


@functools.lru_cache(CHAINS * BLOCKS)
def block_of(name: bytes) -> bytes:
    """The one right content of a block."""
    return hashlib.shake_128(name).digest(SIZE)


def write(cache: Any, rng: random.Random) -> int:
    """One writer's life; answers how many rows it was told are visible."""
    names = names_of(rng.randrange(CHAINS))
    start = rng.randrange(BLOCKS) if rng.random() < 0.3 else 0
    names, parent = names[start : start + rng.randint(1, BLOCKS)], names[start - 1] if start else b""
    claim = rng.choice([ALL, 0b000111, 0b111000, rng.randrange(1, ALL + 1)])
    pieces = [(PART + 100, 2 * PART), (PART, PART + 100)][: rng.randint(0, 2)]
    if pieces:
        claim &= ~0b10
    try:
        ticket = cache.core.join_blocks(names, SIZE, PART, claim, pieces, parent=parent)
    except UnavailableError:
        return 0
    try:
        return _fill(ticket, names, rng)
    except UnavailableError:
        return 0
    finally:
        ticket.end()


def _fill(ticket: Any, names: list[bytes], rng: random.Random) -> int:
    rows, some, soon = [], [], []
    for item, name in enumerate(names):
        parts, pieces = ticket.claims[item], list(ticket.pieces[item])
        if not (parts or pieces) or rng.random() < 0.1:
            continue
        truth = Buffer.of(block_of(name))
        with ticket.writing():
            target = ticket.buffers(item)
            copy_parts(truth, target, PART, parts)
            for a, b in pieces:
                copy_parts(truth.slice(a, b - a), target.slice(a, b - a), b - a, 1)
        if parts and rng.random() < 0.9:
            rows.append((item, parts, part_digests(truth, PART, parts)))
        some += [(item, a, b, xxhash.xxh3_64_intdigest(block_of(name)[a:b])) for a, b in pieces]
        if rng.random() < 0.3:
            soon.append(ticket.commit_soon(rows, some))
            rows, some = [], []
    outcomes = ticket.commit(rows, some)
    for future in soon:
        outcomes += future.result(60)
    return outcomes.count(Outcome.HIT)


def read(cache: Any, rng: random.Random, wrong: Callable[[str], None]) -> int:
    """Leases parts of a chain and compares them; answers how many blocks it saw."""
    names = names_of(rng.randrange(CHAINS))
    parts = rng.choice([ALL, 0b000111, 0b111000, 0b10])
    length = len(cache.core.probe_chain(names, parts, touch=rng.random() < 0.5))
    names, seen = names[: length or rng.randint(1, 3)], 0
    if rng.random() < 0.5:
        lease = cache.core.lease_blocks_resident(names, parts)
    else:
        lease = wait(cache.core.lease_blocks(names, parts), cache.loop)
    if lease is None:
        return 0
    with lease:
        for item, name in enumerate(names):
            if lease.outcomes[item] is not Outcome.HIT:
                continue
            seen += 1
            view, truth = lease.view(item), block_of(name)
            for part in range(PARTS):
                a, b = part * PART, min(SIZE, (part + 1) * PART)
                out = bytearray(b - a)
                if not parts >> part & 1:
                    continue
                same = lease.copy_into(item, a, b, Buffer.of(out, writable=True))
                if (same is Outcome.HIT and out != truth[a:b]) or view[a:b] != truth[a:b]:
                    wrong(f"part {part} of block {name.hex()} differs: {same.name}")
            view.release()
    return seen
