"""TierTests: the contract of the Tier port."""

from __future__ import annotations

import asyncio
import random
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from tiercache.buffers import Buffer
from tiercache.errors import ClosedError
from tiercache.model import PART_BYTES, Name, Outcome, all_parts, part_bytes_for
from tiercache.testing.tiers.items import MIB, SHAPES, Item, fetch, item, store
from tiercache.tier import Health, Reclaiming, Want

if TYPE_CHECKING:
    from pathlib import Path

    from tiercache.tier import Tier


class TierTests(ABC):
    """What a Tier owes. `capacity_bytes` may be raised where a tier's own structures need more room beside 8 MiB."""

    capacity_bytes = 16 * MIB
    survives = False
    """Whether what was flushed is found when the folder is opened again."""

    @abstractmethod
    async def open_tier(self, home: Path, capacity_bytes: int) -> Tier:
        """A tier in the folder `home`, which keeps what a tier opened there before left, if the tier survives."""

    @abstractmethod
    async def damage(self, tier: Tier, location: int, offset: int) -> None:
        """Flips a bit of the stored byte at `offset` of the payload at `location`, behind the tier's back."""

    async def make_room(self, tier: Tier) -> None:  # noqa: B027  # most have nothing to do
        """Has a tier that collects freed space later do so now. Immediate tiers need nothing."""

    def check_caps(self, tier: Tier) -> None:
        """The tier is within its caps now."""
        status = tier.status()
        assert 0 <= status.used_bytes <= status.capacity_bytes <= self.capacity_bytes, status
        assert 0 <= status.used_files <= status.capacity_files or status.capacity_files == 0, status

    def test_gives_back_what_was_written(self, tmp_path: Path) -> None:
        """Every shape comes back, whole and alone, from one batch."""

        async def check() -> None:
            tier = await self.open_tier(tmp_path, self.capacity_bytes)
            items = [item(seed, size, part_bytes) for seed, (size, part_bytes) in enumerate(SHAPES)]
            locations = await store(tier, items)
            assert all(location >= 0 for location in locations), locations
            assert len(set(locations)) == len(items)
            self.check_caps(tier)
            found = await fetch(tier, [i.want(at) for i, at in zip(items, locations, strict=True)])
            for one, (outcome, data) in zip(items, found, strict=True):
                assert outcome == Outcome.HIT and data == one.data, (one.payload.size, outcome)
            back = await fetch(tier, [i.want(at) for i, at in zip(items[::-1], locations[::-1], strict=True)])
            assert back == found[::-1]
            await tier.close()

        asyncio.run(check())

    def test_absent_parts_stay_absent(self, tmp_path: Path) -> None:
        """A payload with holes: present parts are read, one by one and together, the holes are a miss."""

        async def check() -> None:
            tier = await self.open_tier(tmp_path, self.capacity_bytes)
            parts = 0b1001_0110_0000_0001
            one = item(1, MIB - 5, parts=parts)
            (location,) = await store(tier, [one])
            for wanted in (parts, 1, 0b0110 << 8, 1 << 15):
                ((outcome, data),) = await fetch(tier, [one.want(location, wanted)])
                assert outcome == Outcome.HIT
                assert data == one.expected(wanted, 0xA5), bin(wanted)
            for wanted in (all_parts(one.payload.size, PART_BYTES), 0b10, parts | 0b100):
                ((outcome, _),) = await fetch(tier, [one.want(location, wanted)])
                assert outcome == Outcome.MISS, bin(wanted)
            await tier.close()

        asyncio.run(check())

    def test_digests_come_with_the_bytes(self, tmp_path: Path) -> None:
        """Who asks for them gets what each payload was verified against, and nothing for what is no hit."""

        async def check() -> None:
            tier = await self.open_tier(tmp_path, self.capacity_bytes)
            parts = 0b1001_0110_0000_0001
            one, other = item(1, MIB - 5, parts=parts), item(2, MIB)
            here, there = await store(tier, [one, other])
            tier.free([there])
            wants = [other.want(there), one.want(here, 1 << 15 | 1)]
            digests: list[bytes] = []
            targets = [Buffer.of(bytearray(want.size), writable=True) for want in wants]
            assert await tier.read(wants, targets, digests) == [Outcome.MISS, Outcome.HIT]
            assert digests[0] == b""
            for part in (0, 15):
                rows = slice(8 * part, 8 * part + 8)
                assert digests[1][rows] == one.payload.digests[rows]
            await tier.close()

        asyncio.run(check())

    def test_another_name_or_shape_is_no_hit(self, tmp_path: Path) -> None:
        """A location alone proves nothing: key, its width, ordinal, size and part size must be those stored."""

        async def check() -> None:
            tier = await self.open_tier(tmp_path, self.capacity_bytes)
            one, other = item(1, MIB), item(2, MIB)
            here, there = await store(tier, [one, other])
            right = one.want(here)
            key, ordinal = right.name
            wrong = [
                other.want(here),
                one.want(there),
                Want(here, Name(bytes([key[0] ^ 1]) + key[1:], ordinal), MIB, PART_BYTES, 1),
                Want(here, Name(key[:16] if len(key) == 32 else key + bytes(16), ordinal), MIB, PART_BYTES, 1),
                Want(here, Name(key, ordinal ^ 1), MIB, PART_BYTES, 1),
                Want(here, right.name, MIB - 1, PART_BYTES, 1),
                Want(here, right.name, MIB, 2 * PART_BYTES, 1),
            ]
            for outcome, _ in await fetch(tier, wrong):
                assert outcome in (Outcome.MISS, Outcome.CORRUPT), outcome
            assert (await fetch(tier, [right]))[0] == (Outcome.HIT, one.data)
            await tier.close()

        asyncio.run(check())

    def test_what_was_freed_is_gone(self, tmp_path: Path) -> None:
        """A freed location is a miss, stays one when its place is used again, and harms nobody when freed again."""

        async def check() -> None:
            tier = await self.open_tier(tmp_path, self.capacity_bytes)
            first = [item(seed) for seed in range(4)]
            locations = await store(tier, first)
            tier.free(locations[:2])
            found = await fetch(tier, [i.want(at) for i, at in zip(first, locations, strict=True)])
            assert [outcome for outcome, _ in found] == [Outcome.MISS] * 2 + [Outcome.HIT] * 2
            second = [item(seed) for seed in range(10, 14)]
            later = await store(tier, second)
            tier.free(locations[:2])
            found = await fetch(tier, [first[0].want(locations[0]), first[1].want(locations[1])])
            assert [outcome for outcome, _ in found] == [Outcome.MISS] * 2
            found = await fetch(tier, [i.want(at) for i, at in zip(second, later, strict=True)])
            assert found == [(Outcome.HIT, i.data) for i in second]
            await tier.close()

        asyncio.run(check())

    def test_unknown_locations_are_ignored(self, tmp_path: Path) -> None:
        """Numbers that never were locations: a miss to read, nothing to free."""

        async def check() -> None:
            tier = await self.open_tier(tmp_path, self.capacity_bytes)
            rng = random.Random(7)
            odd = [0, 1, -1, -5, (1 << 62) + 12_345, (1 << 63) - 1, *(rng.getrandbits(62) for _ in range(200))]
            one = item(1, 5000)
            tier.free(odd)
            assert {outcome for outcome, _ in await fetch(tier, [one.want(at) for at in odd])} == {Outcome.MISS}
            (location,) = await store(tier, [one])
            tier.free([at for at in odd if at != location])
            found = await fetch(tier, [one.want(at) for at in odd if at != location] + [one.want(location)])
            assert {outcome for outcome, _ in found[:-1]} == {Outcome.MISS}
            assert found[-1] == (Outcome.HIT, one.data)
            await tier.close()

        asyncio.run(check())

    def test_is_full_before_it_is_over_its_cap(self, tmp_path: Path) -> None:
        """Writes until it is full, within the cap at every step; room comes back, and what was kept is unharmed."""

        async def check() -> None:
            tier = await self.open_tier(tmp_path, self.capacity_bytes)
            kept: list[tuple[Item, int]] = []
            for seed in range(4 * self.capacity_bytes // MIB):
                one = item(seed, MIB - seed)
                (location,) = await store(tier, [one])
                self.check_caps(tier)
                if location == Outcome.FULL:
                    break
                assert location >= 0, location
                kept.append((one, location))
            else:
                raise AssertionError("it never was full")
            assert len(kept) >= self.capacity_bytes // MIB // 2, len(kept)
            tier.free([location for _, location in kept[::2]])
            await self.make_room(tier)
            again = [item(seed, MIB) for seed in range(1000, 1000 + len(kept) // 4)]
            locations = await store(tier, again)
            assert all(location >= 0 for location in locations), locations
            self.check_caps(tier)
            found = await fetch(tier, [i.want(at) for i, at in zip(again, locations, strict=True)])
            assert found == [(Outcome.HIT, i.data) for i in again]
            if not isinstance(tier, Reclaiming):  # where space is collected by rewriting, locations have changed
                assert await fetch(tier, [i.want(at) for i, at in kept[1::2]]) == [
                    (Outcome.HIT, i.data) for i, _ in kept[1::2]
                ]
            await tier.close()

        asyncio.run(check())

    def test_what_can_never_fit_is_full(self, tmp_path: Path) -> None:
        """One entry larger than the whole cap is refused, its neighbours in the batch are not."""

        async def check() -> None:
            tier = await self.open_tier(tmp_path, self.capacity_bytes)
            size = self.capacity_bytes + 1
            items = [item(1, 100), item(2, size, part_bytes_for(size)), item(3, 100)]
            first, huge, last = await store(tier, items)
            assert huge == Outcome.FULL and first >= 0 and last >= 0, (first, huge, last)
            self.check_caps(tier)
            assert (await fetch(tier, [items[2].want(last)]))[0] == (Outcome.HIT, items[2].data)
            await tier.close()

        asyncio.run(check())

    def test_damage_is_never_a_hit(self, tmp_path: Path) -> None:
        """One flipped bit in a stored part: that part is CORRUPT or a MISS, the entry's other parts are fine."""

        async def check() -> None:
            tier = await self.open_tier(tmp_path, self.capacity_bytes)
            one, other = item(1, MIB - 3), item(2)
            here, there = await store(tier, [one, other])
            await tier.flush()
            for offset in (0, 5 * PART_BYTES + 17, MIB - 4):
                await self.damage(tier, here, offset)
                part = 1 << offset // PART_BYTES
                found = await fetch(tier, [one.want(here, part), other.want(there), one.want(here)])
                assert found[0][0] in (Outcome.CORRUPT, Outcome.MISS), (offset, found[0][0])
                assert found[1] == (Outcome.HIT, other.data)
                assert found[2][0] in (Outcome.CORRUPT, Outcome.MISS), (offset, found[2][0])
            await tier.close()

        asyncio.run(check())

    def test_memory_need_not_be_aligned(self, tmp_path: Path) -> None:
        """Sources and targets begin and end anywhere; nothing around a target is touched."""

        async def check() -> None:
            tier = await self.open_tier(tmp_path, self.capacity_bytes)
            one = item(1, 200_003)
            room = Buffer.of(bytearray(b"\x11" * 3 + one.data + b"\x11" * 5), writable=True)
            (location,) = await tier.write([one.payload], [room.slice(3, 200_003)])
            memory = bytearray(b"\xee" * 300_000)
            target = Buffer.of(memory, writable=True).slice(1_001, 200_003)
            assert await tier.read([one.want(location)], [target]) == [Outcome.HIT]
            assert memory[1_001:201_004] == one.data
            assert set(memory[:1_001]) == {0xEE} == set(memory[201_004:])
            assert bytes(room) == b"\x11" * 3 + one.data + b"\x11" * 5
            await tier.close()

        asyncio.run(check())

    def test_the_same_name_twice_is_two_payloads(self, tmp_path: Path) -> None:
        """A tier does not know which copy counts: both are there until freed."""

        async def check() -> None:
            tier = await self.open_tier(tmp_path, self.capacity_bytes)
            one = item(1)
            first, second = await store(tier, [one, one])
            assert first != second
            tier.free([first])
            found = await fetch(tier, [one.want(first), one.want(second)])
            assert found[0][0] == Outcome.MISS and found[1] == (Outcome.HIT, one.data)
            await tier.close()

        asyncio.run(check())

    def test_empty_batches_and_closing_twice(self, tmp_path: Path) -> None:
        """Nothing asked is nothing done; a closed tier gives no bytes and takes none, and never fails otherwise."""

        async def check() -> None:
            tier = await self.open_tier(tmp_path, self.capacity_bytes)
            assert await tier.write([], []) == []
            assert await tier.read([], []) == []
            tier.free([])
            await tier.flush()
            assert tier.status().health == Health.HEALTHY
            one = item(1)
            (location,) = await store(tier, [one])
            await tier.close()
            await tier.close()
            assert tier.status().health == Health.OFF
            tier.free([location])
            try:
                assert (await fetch(tier, [one.want(location)]))[0][0] != Outcome.HIT
            except ClosedError:
                pass
            try:
                assert (await store(tier, [one]))[0] < 0
            except ClosedError:
                pass

        asyncio.run(check())

    def test_many_tasks_at_once(self, tmp_path: Path) -> None:
        """Tasks write, read and free beside each other: every hit has the right bytes, and the cap holds."""

        async def check() -> None:
            tier = await self.open_tier(tmp_path, self.capacity_bytes)

            async def work(worker: int) -> int:
                rng, hits = random.Random(worker), 0
                for turn in range(6):
                    batch = [item(worker * 1000 + turn * 10 + i, rng.randrange(300_000)) for i in range(3)]
                    placed = [(i, at) for i, at in zip(batch, await store(tier, batch), strict=True) if at >= 0]
                    self.check_caps(tier)
                    found = await fetch(tier, [i.want(at) for i, at in placed])
                    assert found == [(Outcome.HIT, i.data) for i, _ in placed]
                    hits += len(found)
                    tier.free([at for _, at in placed])
                return hits

            assert sum(await asyncio.gather(*(work(worker) for worker in range(8)))) >= 8
            await tier.close()

        asyncio.run(check())

    def test_a_tier_opened_again_finds_what_was_flushed(self, tmp_path: Path) -> None:
        """If it survives: all that was flushed, with all facts, most recent first; freed payloads do not come back."""

        async def check() -> None:
            tier = await self.open_tier(tmp_path, self.capacity_bytes)
            assert list(tier.scan()) == [], "a new folder has payloads"
            items = [item(seed, 70_000 + seed, parts=None if seed % 2 else 1) for seed in range(40)]
            locations = await store(tier, items)
            tier.free(locations[:10])
            await tier.flush()
            await tier.close()
            tier = await self.open_tier(tmp_path, self.capacity_bytes)
            found = await asyncio.to_thread(lambda: list(tier.scan()))
            at: dict[Name, int] = {}
            for facts in found:
                for row, location in enumerate(facts.locations.tolist()):
                    key = facts.keys[row].tobytes()[: int(facts.widths[row])]
                    name = Name(key, int(facts.ordinals[row]))
                    at[name] = location
                    payload = next(i.payload for i in items if i.payload.name == name)
                    assert int(facts.sizes[row]) == payload.size and int(facts.parts[row]) == payload.parts
                    assert int(facts.part_bytes[row]) == payload.part_bytes and facts.forms[row] == payload.form
                    assert int(facts.scopes[row]) == payload.scope and facts.costs_s[row] == payload.cost_s
                    assert int(facts.expiries_s[row]) == payload.expiry_s and int(facts.ticks[row]) == payload.tick
                    parent = facts.parents[row].tobytes()[: int(facts.parent_widths[row])]
                    assert parent == payload.parent and facts.kinds[row] == payload.kind
            assert set(at) == ({i.payload.name for i in items[10:]} if self.survives else set())
            self.check_caps(tier)
            kept = [i for i in items if i.payload.name in at]
            read = await fetch(tier, [i.want(at[i.payload.name]) for i in kept])
            for one, (outcome, data) in zip(kept, read, strict=True):
                assert outcome == Outcome.HIT and data == one.expected(one.payload.parts, 0xA5)
            await tier.close()

        asyncio.run(check())
