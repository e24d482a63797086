"""ReclaimingTests: the contract of the Reclaiming port, on top of that of a tier."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from tiercache.model import Name, Outcome
from tiercache.testing.tiers.items import MIB, Item, fetch, item, store
from tiercache.testing.tiers.plain import TierTests
from tiercache.tier import Reclaiming

if TYPE_CHECKING:
    from pathlib import Path

    from tiercache.tier import Tier


class ReclaimingTests(TierTests):
    """What a log-structured tier owes besides. Subclasses open a tier with several segments in `capacity_bytes`."""

    async def open_reclaiming(self, home: Path) -> tuple[Tier, Reclaiming]:
        """One tier, under both of its ports."""
        tier = await self.open_tier(home, self.capacity_bytes)
        assert isinstance(tier, Reclaiming)
        return tier, tier

    async def make_room(self, tier: Tier) -> None:
        """Reclaims until there is no victim with something to gain, or as many times as there could be segments."""
        assert isinstance(tier, Reclaiming)
        for _ in range(64):
            before = tier.status().used_bytes
            keep = tier.victim()
            await tier.reclaim(keep, [])
            self.check_caps(tier)
            if tier.status().used_bytes >= before:
                return

    async def fill(self, tier: Tier) -> dict[int, Item]:
        """Items by location, until the tier is full."""
        held: dict[int, Item] = {}
        for seed in range(8 * self.capacity_bytes // MIB):
            one = item(seed, MIB // 2)
            (location,) = await store(tier, [one])
            self.check_caps(tier)
            if location < 0:
                return held
            held[location] = one
        raise AssertionError("it never was full")

    def test_an_empty_tier_has_no_victim(self, tmp_path: Path) -> None:
        """And reclaiming nothing does nothing."""

        async def check() -> None:
            tier, log = await self.open_reclaiming(tmp_path)
            assert log.victim() == []
            assert await log.reclaim([], []) == []
            await tier.close()

        asyncio.run(check())

    def test_reclaiming_keeps_what_it_should(self, tmp_path: Path) -> None:
        """Of a victim segment some payloads are kept and move, the others go, and no payload elsewhere notices."""

        async def check() -> None:
            tier, log = await self.open_reclaiming(tmp_path)
            held = await self.fill(tier)
            tier.free(gone := list(held)[::3])
            for location in gone:
                del held[location]
            victim = log.victim()
            assert victim and set(victim) <= set(held), "a victim holds what was freed, or what nobody wrote"
            keep, drop = victim[::2], victim[1::2]
            moved = dict(await log.reclaim(keep, drop))
            self.check_caps(tier)
            assert set(moved) <= set(keep)
            dropped = [held.pop(location) for location in drop]
            for outcome, _ in await fetch(tier, [i.want(at) for i, at in zip(dropped, drop, strict=True)]):
                assert outcome == Outcome.MISS
            held = {moved.get(at, at): i for at, i in held.items() if at not in keep or at in moved}
            found = await fetch(tier, [i.want(at) for at, i in held.items()])
            assert found == [(Outcome.HIT, i.data) for i in held.values()]
            await tier.close()

        asyncio.run(check())

    def test_reclaiming_makes_room(self, tmp_path: Path) -> None:
        """A full tier of which everything in the victims may go takes new payloads again, turn after turn."""

        async def check() -> None:
            tier, log = await self.open_reclaiming(tmp_path)
            await self.fill(tier)
            for turn in range(12):
                await log.reclaim([], log.victim())
                self.check_caps(tier)
                one = item(10_000 + turn, MIB // 2)
                (location,) = await store(tier, [one])
                assert location >= 0, (turn, location)
                assert (await fetch(tier, [one.want(location)]))[0] == (Outcome.HIT, one.data)
            await tier.close()

        asyncio.run(check())

    def test_kept_payloads_survive_reclaiming(self, tmp_path: Path) -> None:
        """After reclaiming, flushing and opening again, the kept are found once and the dropped are not found."""

        async def check() -> None:
            tier, log = await self.open_reclaiming(tmp_path)
            held = await self.fill(tier)
            victim = log.victim()
            moved = dict(await log.reclaim(victim[:1], victim[1:]))
            names = {i.payload.name for at, i in held.items() if at not in victim or at in moved}
            await tier.flush()
            await tier.close()
            tier, _ = await self.open_reclaiming(tmp_path)
            found: list[Name] = []
            for facts in await asyncio.to_thread(lambda: list(tier.scan())):
                for key, width, ordinal in zip(facts.keys, facts.widths, facts.ordinals, strict=True):
                    found.append(Name(key.tobytes()[: int(width)], int(ordinal)))
            assert len(found) == len(set(found))
            assert set(found) == (names if self.survives else set())
            await tier.close()

        asyncio.run(check())
