"""AddressableTests: the contract of the Addressable port, on top of that of a tier."""

from __future__ import annotations

import asyncio
import random
import sys
import threading
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

from tiercache.buffers import Buffer
from tiercache.errors import ConfigError
from tiercache.model import ALIGN_BYTES, PART_BYTES, Name, Outcome
from tiercache.testing.tiers.items import MIB, SHAPES, fetch, flip, item, store
from tiercache.testing.tiers.plain import TierTests
from tiercache.tier import Addressable

if TYPE_CHECKING:
    from pathlib import Path

    from tiercache.tier import Tier


class AddressableTests(TierTests):
    """What a tier whose bytes are filled and read in place owes besides. Subclasses open a tier that is both."""

    async def damage(self, tier: Tier, location: int, offset: int) -> None:
        """In place."""
        assert isinstance(tier, Addressable)
        flip(tier.buffers([location])[0], offset)

    async def open_addressable(self, home: Path) -> tuple[Tier, Addressable]:
        """One tier, under both of its ports."""
        tier = await self.open_tier(home, self.capacity_bytes)
        assert isinstance(tier, Addressable)
        return tier, tier

    def test_extents_are_aligned_and_apart(self, tmp_path: Path) -> None:
        """Every extent starts on a boundary and nobody else's memory lies before the next one."""

        async def check() -> None:
            tier, memory = await self.open_addressable(tmp_path)
            items = [item(seed, size, part_bytes) for seed, (size, part_bytes) in enumerate(SHAPES)]
            locations = memory.reserve(
                [i.payload.name for i in items], [len(i.data) for i in items], [i.payload.part_bytes for i in items]
            )
            assert all(location >= 0 for location in locations)
            buffers = memory.buffers(locations)
            assert [len(b) for b in buffers] == [len(i.data) for i in items]
            spans = sorted((b.address, -(-len(b) // ALIGN_BYTES) * ALIGN_BYTES) for b in buffers if len(b))
            assert all(address % ALIGN_BYTES == 0 for address, _ in spans)
            assert all(a + n <= b for (a, n), (b, _) in pairwise(spans))
            for buffer in buffers:
                buffer.array()[:] = 0x5A
            self.check_caps(tier)
            await tier.close()

        asyncio.run(check())

    def test_parts_appear_with_their_commit(self, tmp_path: Path) -> None:
        """Reserved is unreadable; each commit shows its own parts, and takes no other digests than theirs."""

        async def check() -> None:
            tier, memory = await self.open_addressable(tmp_path)
            for seed, (size, part_bytes) in enumerate(SHAPES):
                one = item(seed, size, part_bytes)
                everything = one.payload.parts
                (location,) = memory.reserve([one.payload.name], [size], [part_bytes])
                (buffer,) = memory.buffers([location])
                assert (await fetch(tier, [one.want(location)]))[0][0] == Outcome.MISS
                buffer.array()[:] = list(one.data) if size < 10 else memoryview(one.data)
                rng, present = random.Random(seed), 0
                while present != everything:
                    more = rng.getrandbits(64) & everything or everything
                    rows = bytearray(rng.randbytes(len(one.payload.digests)))  # noise where nothing is declared
                    for part in range(more.bit_length()):
                        if more >> part & 1:
                            rows[part * 8 : part * 8 + 8] = one.payload.digests[part * 8 : part * 8 + 8]
                    memory.commit([location], [more], [bytes(rows)])
                    present |= more
                    ((outcome, data),) = await fetch(tier, [one.want(location, present)])
                    assert outcome == Outcome.HIT and data == one.expected(present, 0xA5)
                    if present != everything:
                        assert (await fetch(tier, [one.want(location)]))[0][0] == Outcome.MISS
                (payload,) = memory.payloads([location])
                assert (payload.name, payload.size, payload.part_bytes) == (one.payload.name, size, part_bytes)
                assert (payload.parts, payload.digests) == (everything, one.payload.digests)
                tier.free([location])
            await tier.close()

        asyncio.run(check())

    def test_written_payloads_read_back_in_the_table(self, tmp_path: Path) -> None:
        """What `write` was told is what `payloads` says, zeros for the digests of absent parts."""

        async def check() -> None:
            tier, memory = await self.open_addressable(tmp_path)
            items = [item(1), item(2, MIB, parts=0b1010), item(3, 1_124_352, 20_480, parts=1 << 40 | 1)]
            assert memory.payloads(await store(tier, items)) == [i.payload for i in items]
            await tier.close()

        asyncio.run(check())

    def test_copies_out_whole_entries_and_spans(self, tmp_path: Path) -> None:
        """Every shape, whole and in spans that begin and end anywhere; damage shows only in the parts it touched."""

        async def check() -> None:
            tier, memory = await self.open_addressable(tmp_path)
            items = [item(seed, size, part_bytes) for seed, (size, part_bytes) in enumerate(SHAPES)]
            locations = await store(tier, items)
            for verify in (True, False):
                found = [bytearray(b"\xee" * (len(i.data) + 3)) for i in items]
                targets = [Buffer.of(f, writable=True).slice(1, len(f) - 1) for f in found]
                assert memory.copy_out(locations, targets, verify=verify) == [Outcome.HIT] * len(items)
                assert found == [b"\xee" + i.data + b"\xee\xee" for i in items]
                rng = random.Random(1)
                for one, location in zip(items, locations, strict=True):
                    size, step = len(one.data), one.payload.part_bytes
                    edges = sorted({0, size, *(min(size, e) for e in (1, step - 1, step, step + 1, 3 * step))})
                    spans = [range(a, b) for a in edges for b in edges if a <= b]
                    spans = rng.sample(spans, min(6, len(spans)))
                    got = [bytearray(len(span)) for span in spans]
                    places = [Buffer.of(g, writable=True) for g in got]
                    outcomes = memory.copy_out([location] * len(spans), places, spans, verify=verify)
                    assert outcomes == [Outcome.HIT] * len(spans)
                    assert got == [one.data[span.start : span.stop] for span in spans]
            await tier.close()

        asyncio.run(check())

    def test_copying_out_refuses_and_notices(self, tmp_path: Path) -> None:
        """A target too small is an error before anything is written beyond it; a damaged part is CORRUPT."""

        async def check() -> None:
            tier, memory = await self.open_addressable(tmp_path)
            one = item(1)
            locations = await store(tier, [one])
            small = Buffer.of(bytearray(MIB - 1), writable=True)
            for spans in (None, [range(MIB)]):
                with pytest.raises(ConfigError, match="larger buffer"):
                    memory.copy_out(locations, [small], spans)
            await self.damage(tier, locations[0], 3 * PART_BYTES)
            room = Buffer.of(bytearray(MIB), writable=True)
            assert memory.copy_out(locations, [room]) == [Outcome.CORRUPT]
            assert memory.copy_out(locations, [room], verify=False) == [Outcome.HIT]
            assert memory.copy_out(locations, [room], [range(3 * PART_BYTES)]) == [Outcome.HIT]
            assert memory.copy_out(locations, [room], [range(3 * PART_BYTES + 1)]) == [Outcome.CORRUPT]
            tier.free(locations)
            with pytest.raises(LookupError):
                memory.copy_out(locations, [room])
            await tier.close()

        asyncio.run(check())

    def test_buffers_outlive_the_tier(self, tmp_path: Path) -> None:
        """Memory that somebody still looks at is not unmapped by closing."""

        async def check() -> None:
            tier, memory = await self.open_addressable(tmp_path)
            one = item(1)
            view = memory.buffers(await store(tier, [one]))[0].view()
            await tier.close()
            assert bytes(view) == one.data

        asyncio.run(check())

    def test_threads_never_share_an_extent(self, tmp_path: Path) -> None:
        """Threads reserve, fill, check and free under forced switches: nobody ever sees another's bytes."""

        async def check() -> None:
            tier, memory = await self.open_addressable(tmp_path)
            wrong: list[object] = []

            def work(worker: int) -> None:
                rng, held = random.Random(worker), list[tuple[int, int]]()
                for turn in range(150):
                    mark = worker * 16 + turn % 16
                    sizes = [rng.choice((1, 5_000, 70_000)) for _ in range(3)]
                    names = [Name(bytes([worker]) * 16, turn * 3 + i) for i in range(3)]
                    got = memory.reserve(names, sizes, [PART_BYTES] * 3)
                    held += [(at, mark) for at in got if at >= 0]
                    for buffer in memory.buffers([at for at in got if at >= 0]):
                        buffer.array()[:] = mark
                    rng.shuffle(held)
                    while len(held) > 20:
                        location, fill = held.pop()
                        view = memory.buffers([location])[0].array()
                        if not (view == fill).all():
                            wrong.append((worker, turn, location))
                        tier.free([location])
                    if tier.status().used_bytes > self.capacity_bytes:
                        wrong.append(tier.status())

            interval = sys.getswitchinterval()
            sys.setswitchinterval(1e-6)
            try:
                threads = [threading.Thread(target=work, args=(worker,)) for worker in range(6)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
            finally:
                sys.setswitchinterval(interval)
            assert wrong == []
            await tier.close()

        asyncio.run(check())
