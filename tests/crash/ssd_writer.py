"""A process that is killed while it writes to an SSD tier, again and again, and the one that kills it and checks.

`python ssd_writer.py DIRECTORY KILLS SEED` ends with one line of JSON: kills, lost (acknowledged as durable, and gone),
wrong (bytes that are not what was written), over (times that a cap did not hold), entries checked. The killing process
opens nothing itself, so that its forks are clean.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from tiercache.buffers import Buffer, part_digests
from tiercache.model import Name, Outcome, Payload, all_parts
from tiercache.ssd.tier import SsdTier
from tiercache.tier import Want

CAPACITY_BYTES = 40 << 20
FILES_MAX = 70
PART = 16_384


def payload_of(number: int) -> tuple[Payload, Buffer]:
    """An entry; everything about it follows from its number."""
    rng = random.Random(number)
    data = Buffer.of(rng.randbytes(rng.choice((0, 1000, 4096, 30_000, 100_000, 400_000))))
    parts = all_parts(len(data), PART)
    name = Name(number.to_bytes(16, "big"), number % 3)
    return Payload(name, len(data), PART, parts, part_digests(data, PART), tick=number & 0xFFFF), data


def open_tier(directory: str) -> SsdTier:
    """The same each time."""
    return SsdTier(directory, CAPACITY_BYTES, files_max=FILES_MAX, segment_bytes=2 << 20)


def scan(tier: SsdTier) -> dict[int, int]:
    """Entries found, newest record of each."""
    found: dict[int, int] = {}
    for facts in tier.scan():
        for row in range(len(facts.keys)):
            found.setdefault(int.from_bytes(facts.keys[row, :16].tobytes(), "big"), int(facts.locations[row]))
    return found


async def read(tier: SsdTier, number: int, location: int) -> str:
    """`hit`, `wrong`, or the outcome's name."""
    payload, data = payload_of(number)
    target = bytearray(payload.size)
    want = Want(location, payload.name, payload.size, PART, payload.parts)
    (outcome,) = await tier.read([want], [Buffer.of(target, writable=True)])
    if outcome is Outcome.HIT:
        return "hit" if target == bytes(data) else "wrong"
    return outcome.name


async def write(directory: str, seed: int, first: int, pipe: int) -> None:
    """Writes until it is killed; says what it is about to give up before it does, and what is durable after it is."""

    def say(word: str, numbers: list[int]) -> None:
        os.write(pipe, (" ".join([word, *map(str, numbers)]) + "\n").encode())

    rng = random.Random(seed)
    say("opening", [])
    tier = open_tier(directory)
    say("open", [])
    places = scan(tier)
    while True:
        numbers = list(range(first, first + rng.randrange(1, 6)))
        first = numbers[-1] + 1
        say("writing", numbers)
        batch = [payload_of(number) for number in numbers]
        answers = await tier.write([p for p, _ in batch], [b for _, b in batch])
        places.update((n, at) for n, at in zip(numbers, answers, strict=True) if at >= 0)
        if Outcome.FULL in answers:
            at = {location: number for number, location in places.items()}
            victim = tier.victim()
            drop = [location for location in victim if rng.random() < 0.6 or location not in at]
            say("free", [at[location] for location in drop if location in at])
            moved = dict(await tier.reclaim([location for location in victim if location not in drop], drop))
            lost = [location for location in victim if location not in drop and location not in moved]
            say("free", [at[location] for location in lost])
            for location in victim:
                places.pop(at.get(location, -1), None)
            places.update((at[old], new) for old, new in moved.items())
        elif rng.random() < 0.3:
            durable = sorted(places)
            await tier.flush()
            say("durable", durable)
        elif rng.random() < 0.2 and places:
            gone = rng.sample(sorted(places), min(3, len(places)))
            say("free", gone)
            tier.free([places.pop(number) for number in gone])


async def check(directory: str, durable: set[int], pipe: int) -> None:
    """Reads everything there is; tells the counts."""
    tier = open_tier(directory)
    found = scan(tier)
    counts = {"lost": len(durable - set(found)), "wrong": 0, "checked": len(found), "unreadable": 0}
    for number, location in found.items():
        verdict = await read(tier, number, location)
        counts["wrong"] += verdict == "wrong"
        counts["unreadable"] += verdict not in ("hit", "wrong")
    os.write(pipe, json.dumps(counts).encode() + b"\n")
    await tier.close()


@dataclass
class Killer:
    """What is known of a directory from outside."""

    directory: str
    rng: random.Random
    durable: set[int] = field(default_factory=set)
    first: int = 0
    totals: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("kills", "lost", "wrong", "over", "checked"), 0)
    )

    def fork(self, work: object) -> tuple[int, int]:
        """A child that does the work; its process id and the pipe it speaks to."""
        receiving, sending = os.pipe()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.close(receiving)
                asyncio.run(work(sending))  # type: ignore[operator]
                status = 0
            finally:
                os._exit(status)
        os.close(sending)
        return child, receiving

    def weigh(self) -> None:
        """Looks from outside whether the caps hold now."""
        files = size = 0
        for path in Path(self.directory).rglob("*"):
            try:
                files += path.is_file()
                size += path.stat().st_size if path.is_file() else 0
            except FileNotFoundError:
                continue
        self.totals["over"] += size > CAPACITY_BYTES or files > FILES_MAX

    def strike(self) -> None:
        """One life and its end, at a random message or while it opens."""
        seed = self.rng.getrandbits(32)
        child, pipe = self.fork(lambda sending: write(self.directory, seed, self.first, sending))
        patience = 1 if self.rng.random() < 0.25 else self.rng.randrange(2, 90)
        with open(pipe, "rb") as lines:
            for line in lines:
                self.hear(line)
                patience -= 1
                if patience == 0:
                    until = time.perf_counter() + self.rng.random() * 0.004
                    while time.perf_counter() < until:
                        pass
                    os.kill(child, signal.SIGKILL)
                if patience % 16 == 0:
                    self.weigh()
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"the writer ended by itself: {status}"
        self.totals["kills"] += 1
        self.weigh()

    def hear(self, line: bytes) -> None:
        """Keeps the books; a line that the kill cut short does not count."""
        if not line.endswith(b"\n"):
            return
        word, *numbers = line.decode().split()
        named = set(map(int, numbers))
        if word == "writing":
            self.first = max(named) + 1
        elif word == "durable":
            self.durable |= named
        elif word == "free":
            self.durable -= named

    def verify(self) -> None:
        """A whole life in which everything is read."""
        child, pipe = self.fork(lambda sending: check(self.directory, self.durable, sending))
        with open(pipe, "rb") as lines:
            counts = json.loads(lines.read() or b"{}")
        _, status = os.waitpid(child, 0)
        assert status == 0 and counts, f"reopening failed: {status}"
        assert counts["unreadable"] == 0, counts
        for name in ("lost", "wrong", "checked"):
            self.totals[name] += counts[name]


def main(directory: str, kills: int, seed: int) -> None:
    """Kills and checks by turns."""
    killer = Killer(directory, random.Random(seed))
    while killer.totals["kills"] < kills:
        killer.strike()
        if killer.rng.random() < 0.7:
            killer.verify()
    killer.verify()
    print(json.dumps(killer.totals))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
