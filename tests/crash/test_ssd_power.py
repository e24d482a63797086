"""Power cuts on the simulated disk: what was acknowledged as durable is there, nothing is ever wrong, caps hold."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from tiercache.buffers import Buffer, part_digests
from tiercache.errors import UnavailableError
from tiercache.model import Name, Outcome, Payload, all_parts
from tiercache.ssd.tier import SsdTier
from tiercache.testing.simdisk import SimDisk
from tiercache.testing.simloop import SimClock, SimLoop, derive, simulate
from tiercache.tier import Want

if TYPE_CHECKING:
    from collections.abc import Sequence

CAPACITY_BYTES = 9 << 20
HOME = "/home/cache"
PART = 8192
CUTS = 3
SEEDS, SEEDS_NIGHTLY = 40, 2000
"""Every seed is six lives with three to six crashes."""
STEP = 10


def data_of(number: int) -> bytes:
    """The bytes of entry `number`: they follow from the number, so that a wrong byte is known without a record."""
    rng = random.Random(number)
    return rng.randbytes(rng.choice((0, 100, 4096, 20_000, 70_000, 150_000)))


def name_of(number: int) -> Name:
    """Sixteen bytes and a page."""
    return Name(number.to_bytes(16, "big"), number % 5)


def payload_of(number: int) -> tuple[Payload, Buffer]:
    """A payload, some with holes."""
    data = Buffer.of(data_of(number))
    rng = random.Random(-number - 1)
    parts = all_parts(len(data), PART)
    parts = (rng.getrandbits(64) & parts) or parts if rng.random() < 0.3 else parts
    return Payload(name_of(number), len(data), PART, parts, part_digests(data, PART), tick=number), data


@dataclass
class Ledger:
    """What was written, where; what was acknowledged as durable; what may be gone."""

    places: dict[int, int] = field(default_factory=dict)
    durable: set[int] = field(default_factory=set)
    count: int = 0


async def verify(tier: SsdTier, numbers: Sequence[int], places: dict[int, int]) -> set[int]:
    """Reads entries; answers those that hit, and fails on a wrong byte."""
    hits: set[int] = set()
    for number in numbers:
        payload, data = payload_of(number)
        target = bytearray(b"\xa5" * len(data))
        want = Want(places[number], payload.name, payload.size, PART, payload.parts)
        (outcome,) = await tier.read([want], [Buffer.of(target, writable=True)])
        assert outcome != Outcome.CORRUPT, f"a crash alone made {number} corrupt"
        if outcome == Outcome.HIT:
            for part in range(payload.parts.bit_length()):
                if payload.parts >> part & 1:
                    piece = slice(part * PART, (part + 1) * PART)
                    assert target[piece] == bytes(data)[piece], f"wrong byte in {number}"
            hits.add(number)
    return hits


async def work(tier: SsdTier, ledger: Ledger, rng: random.Random) -> None:
    """A life of the tier, until the disk stops answering or enough was done."""
    for _ in range(rng.randrange(40)):
        action = rng.random()
        if action < 0.55:
            numbers = [ledger.count + i for i in range(rng.randrange(1, 8))]
            ledger.count += len(numbers)
            batch = [payload_of(number) for number in numbers]
            locations = await tier.write([p for p, _ in batch], [b for _, b in batch])
            ledger.places.update((n, at) for n, at in zip(numbers, locations, strict=True) if at >= 0)
            if Outcome.FULL in locations:
                await reclaim(tier, ledger, rng)
        elif action < 0.75:
            before = set(ledger.places)
            try:
                await tier.flush()
            except UnavailableError:
                return
            ledger.durable |= before
        elif action < 0.9 and ledger.places:
            gone = rng.sample(sorted(ledger.places), min(len(ledger.places), rng.randrange(1, 4)))
            tier.free([ledger.places.pop(number) for number in gone])
            ledger.durable -= set(gone)
        else:
            await verify(tier, rng.sample(sorted(ledger.places), min(4, len(ledger.places))), ledger.places)


async def reclaim(tier: SsdTier, ledger: Ledger, rng: random.Random) -> None:
    """Half of a segment goes, the rest moves."""
    numbers = {at: number for number, at in ledger.places.items()}
    victim = tier.victim()
    drop = [at for at in victim if rng.random() < 0.5 or at not in numbers]
    ledger.durable -= {numbers[at] for at in drop if at in numbers}
    kept = [at for at in victim if at not in drop]
    # A crash inside leaves each at one of its two places; only an answer without it lets it go.
    moved = dict(await tier.reclaim(kept, drop))
    for at in victim:
        number = numbers.get(at)
        if number is None:
            continue
        if at in moved:
            ledger.places[number] = moved[at]
        else:
            del ledger.places[number]
            if tier.status().health.name == "HEALTHY":
                ledger.durable.discard(number)


async def recover(tier: SsdTier, ledger: Ledger) -> None:
    """What is found is right, and everything durable is found."""
    found: dict[int, int] = {}
    for facts in tier.scan():
        for row in range(len(facts.keys)):
            number = int.from_bytes(facts.keys[row, :16].tobytes(), "big")
            assert number < ledger.count and int(facts.ordinals[row]) == number % 5
            assert int(facts.ticks[row]) == number
            if number not in found:
                found[number] = int(facts.locations[row])
    lost = ledger.durable - set(found)
    assert not lost, f"durable entries are gone: {sorted(lost)}"
    hits = await verify(tier, sorted(found), found)
    assert hits == set(found), "a row whose record cannot be read"
    ledger.places = found
    ledger.durable = set(found)


async def life(loop: SimLoop, disk: SimDisk, ledger: Ledger, rng: random.Random, cut: bool) -> None:
    """Opens, checks, works; the power goes somewhere in between, perhaps while it opens."""
    disk.stop_after(rng.randrange(5 if rng.random() < 0.3 else 250) if cut else 1 << 59)
    try:
        tier = SsdTier(HOME, CAPACITY_BYTES, segment_bytes=1 << 20, io=disk, clock=SimClock(loop))
    except UnavailableError:
        assert cut, "a whole disk refuses to open"
        return
    try:
        if not cut:
            await recover(tier, ledger)
        else:
            await survive(tier, ledger)
        await work(tier, ledger, rng)
        status = tier.status()
        assert status.used_bytes <= CAPACITY_BYTES
    finally:
        disk.stop_after(0)
        await tier.close()
    assert disk.peak_bytes <= CAPACITY_BYTES - tier._disk.caps.rows_bytes


async def survive(tier: SsdTier, ledger: Ledger) -> None:
    """As recover, on a disk that may stop: what is not found may come back later."""
    found: dict[int, int] = {}
    for facts in tier.scan():
        for row in range(len(facts.keys)):
            found.setdefault(int.from_bytes(facts.keys[row, :16].tobytes(), "big"), int(facts.locations[row]))
    await verify(tier, sorted(found), found)
    ledger.places = found


FIRSTS = [
    *range(0, SEEDS, STEP),
    *(pytest.param(first, marks=pytest.mark.nightly) for first in range(SEEDS, SEEDS_NIGHTLY, STEP)),
]


@pytest.mark.slow
@pytest.mark.parametrize("first", FIRSTS)
def test_power_cuts(first: int) -> None:
    """Cut after cut on one disk, then a whole life in which everything that was promised must be there."""
    for seed in range(first, first + STEP):
        rng = derive(seed, "power")
        disk = SimDisk(derive(seed, "disk"))
        ledger = Ledger()
        for turn in range(2 * CUTS):
            cut = turn % 2 == 0
            simulate(lambda loop, cut=cut: life(loop, disk, ledger, rng, cut), f"{seed}.{turn}")  # noqa: B023
            disk.heal()
            if rng.random() < 0.7:
                disk.power_cut()
            else:
                disk.kill()
