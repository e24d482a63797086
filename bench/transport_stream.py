"""One stream with scatter at the receiver beside a message a block: `python -m bench.transport_stream [--json]`.

1024 blocks lie at random places here and go to random places there, over one link: with a write each, confirmed before
the next (`each`); with one write of 1024 moves (`batch`); gathered into a few long moves to a landing region, out of
which the receiver copies them to their places while the next is on its way (`stream`). The receiver says when all is
where it belongs, and that is compared. Messages are the moves and notes of both ends.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
from contextlib import ExitStack
from statistics import median
from typing import Any

import xxhash

from bench.common import Figure, arguments, emit, interleaved, median_ratio, report, say
from bench.common import versions as installed
from bench.transport import APART, LOOPBACK, Pair, left_aside
from bench.transport_sides import DEADLINE_S, Memory, Ours, serve

BLOCKS = 1024
SIZES = (8 << 10, 64 << 10, 1 << 20)
LANDING_BYTES = 32 << 20
"""One half of the landing region: the sender fills it while the receiver empties the other one."""
WAYS = ("each", "batch", "stream")
TRANSPORTS = ("tcp", "ucx")


def places(size: int, seed: int) -> list[int]:
    """Where the blocks lie, in their order."""
    return [size * place for place in random.Random(seed).sample(range(BLOCKS), BLOCKS)]


def chunks(size: int) -> list[range]:
    """Blocks that land together."""
    step = min(BLOCKS, LANDING_BYTES // size)
    return [range(at, min(BLOCKS, at + step)) for at in range(0, BLOCKS, step)]


class End(Ours):
    """Either end of the link: the near one sends, the far one receives."""

    def __init__(self, end: str, name: str, host: str, size: str) -> None:
        self.size, self.far = int(size), end == "far"
        super().__init__(name, host, 1, BLOCKS * self.size)
        from tiercache.buffers import Buffer, copy_many

        self.copy_many = copy_many
        self.landing = Memory(2 * LANDING_BYTES)
        self.landed = Buffer.of(self.landing.view, writable=True)

    async def hello(self) -> dict[str, object]:
        told = [self.transport.address.hex()]
        for buffer, memory in ((self.buffer, self.memory), (self.landed, self.landing)):
            told.append(self.transport.expose(buffer, writable=True, file=memory.file).hex())
        return {"hello": told}

    async def meet(self, peer: list) -> dict[str, object]:
        address, *descriptors = map(bytes.fromhex, peer)
        self.link = await self.transport.connect(address, DEADLINE_S)
        self.region, self.landing_region = map(self.link.attach, descriptors)
        if self.far:
            self.receiver = asyncio.create_task(self.receive())
        return {"negotiated": self.link.negotiated}

    async def receive(self) -> None:
        """Answers every note; before that, scatters what has landed."""
        there = places(self.size, 2)
        while True:
            note = await self.notes.get()
            if note != b"done":
                await asyncio.to_thread(self.scatter, int(note), there)
            await self.link.notify(note, DEADLINE_S)

    def scatter(self, which: int, there: list[int]) -> None:
        """Copies the blocks of a chunk to their places."""
        size, blocks = self.size, chunks(self.size)[which]
        start = self.landed.address + which % 2 * LANDING_BYTES
        sources = [(start + i * size, size, size, b"", self.landed) for i in range(len(blocks))]
        self.copy_many(sources, [self.buffer.slice(there[block], size) for block in blocks])

    async def check(self) -> dict[str, object]:
        """The far end forgets what it has."""
        if self.far:
            self.memory.array[:] = 0
        return {}

    async def compare(self) -> dict[str, object]:
        """Digest of all blocks, in their order."""
        places_here = places(self.size, 2 if self.far else 1)
        found = self.many_digests([(self.buffer.slice(at, self.size), self.size, 1) for at in places_here])
        return {"digest": xxhash.xxh3_128_hexdigest(b"".join(found))}

    async def send(self, way: str) -> dict[str, object]:
        """Sends every block once; seconds until the receiver has said so, moves, notes."""
        size, there = self.size, places(self.size, 2)
        pieces = [self.buffer.slice(at, size) for at in places(size, 1)]
        moves = [self.made(self.region, at, [piece]) for at, piece in zip(there, pieces, strict=True)]
        start = time.perf_counter()
        if way == "each":
            for move in moves:
                await self.write([move])
        elif way == "batch":
            await self.write(moves)
        if way == "stream":
            count = await self.stream(pieces)
        else:
            count = BLOCKS
            await self.link.notify(b"done", DEADLINE_S)
            await self.notes.get()
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "moves": count, "notes": 2 * count if way == "stream" else 2}

    async def stream(self, pieces: list) -> int:
        """Sends chunk by chunk, each once its half of the landing region is free again."""
        under_way = 0
        parts = chunks(self.size)
        for which, blocks in enumerate(parts):
            if under_way == 2:
                await self.notes.get()
                under_way -= 1
            offset = which % 2 * LANDING_BYTES
            await self.write([self.made(self.landing_region, offset, pieces[blocks.start : blocks.stop])])
            await self.link.notify(str(which).encode(), DEADLINE_S)
            under_way += 1
        for _ in range(under_way):
            await self.notes.get()
        return len(parts)

    async def write(self, moves: list) -> None:
        """Brings moves across."""
        outcomes = await self.link.write(moves, DEADLINE_S)
        if outcomes.count(self.hit) != len(moves):
            raise SystemExit(f"write: {outcomes}")

    async def close(self) -> None:
        """Ends it."""
        if self.far:
            self.receiver.cancel()
        await super().close()


def sent(pair: Pair, way: str, facts: dict[str, Any]) -> float:
    """Seconds of one way, checked."""
    pair.both(op="check")
    pair.near.send(op="send", way=way)
    answer = pair.near.answer()
    here, there = (each["digest"] for each in pair.both(op="compare"))
    if here != there:
        raise SystemExit(f"{way}: wrong bytes arrived")
    facts[way] = {"moves": answer["moves"], "notes": answer["notes"]}
    return answer["seconds"]


def measured(name: str, size: int, rounds: int) -> dict[str, Any]:
    """A row of the table."""
    with ExitStack() as stack:
        line = [sys.executable, "-m", "bench.transport_stream", "--end"]
        near, far = ([*line, end, name, LOOPBACK, str(size)] for end in ("near", "far"))
        pair = Pair(stack, near, [*APART, *far] if name == "ucx" else far)
        facts: dict[str, Any] = {}
        taken = interleaved({way: lambda way=way: sent(pair, way, facts) for way in WAYS}, rounds)
        row: dict[str, Any] = {"transport": name, "negotiated": pair.negotiated, "block_bytes": size, "blocks": BLOCKS}
    for way in WAYS:
        messages = facts[way]["moves"] + facts[way]["notes"]
        row[way] = {**facts[way], "messages": messages, "ms": median(taken[way]) * 1e3, "seconds": taken[way]}
    for way in ("each", "batch"):
        row[f"{way}_over_stream"] = median_ratio(taken[way], taken["stream"])
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """For people."""
    lines = [f"{'link':10} {'block':>8}" + "".join(f" {way + ' messages':>16} {'ms':>9}" for way in WAYS)]
    for row in rows:
        cells = "".join(f" {row[way]['messages']:>16} {row[way]['ms']:>9.2f}" for way in WAYS)
        lines.append(f"{row['transport']:10} {row['block_bytes'] >> 10:>4} KiB{cells}")
    return "\n".join(lines)


def main() -> None:
    parser = arguments(str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    for name in TRANSPORTS:
        for size in SIZES[:2] if options.quick else SIZES:
            with left_aside(left_out, name):
                rows.append(measured(name, size, 1 if options.quick else options.rounds))
                say(table(rows[-1:]))
    figures = []
    for row in rows:
        name = f"{row['transport']}_{row['block_bytes'] >> 10}k_each_over_stream"
        counts = f"{row['each']['messages']} messages and {row['stream']['messages']}"
        note = f"seconds of a message a block over one stream; {counts}"
        figures.append(Figure(name, row["each_over_stream"], at_most=False, unit="ratio", note=note))
        figures.append(Figure(name.replace("each", "batch"), row["batch_over_stream"], at_most=False, unit="ratio"))
    extra = {"rows": rows, "not_exercised": left_out, "versions": installed("libucx-cu13", "numpy")}
    emit(report("transport_stream", figures, extra=extra), as_json=options.json)
    if not options.json:
        print(table(rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--end"]:
        printed = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print goes elsewhere
        asyncio.run(serve(lambda: End(*sys.argv[2:6]), printed))
    else:
        main()
