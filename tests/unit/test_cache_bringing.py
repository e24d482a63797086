"""Bringing: extents that are still written to are nobody's; equal loads are merged; answers that do not fit."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from tests.unit.peer_hosts import SIZE, Host, World, value
from tests.unit.test_peer_hostile import payload
from tiercache.errors import AbandonedLoad, UnavailableError
from tiercache.keys import chain, namespace, object_key
from tiercache.model import Form, Name, Outcome
from tiercache.testing.simloop import simulate

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from tiercache.buffers import Buffer
    from tiercache.model import Payload
    from tiercache.testing.simloop import SimLoop

HIT, MISS = Outcome.HIT, Outcome.MISS
EVERY = (1 << 64) - 1
KEYS = [object_key("bringing", str(number)) for number in range(8)]
BLOCKS = chain(namespace("bringing"), [bytes([number]) for number in range(8)])


def run(main: Callable[[World], Coroutine[Any, Any, None]]) -> None:
    async def whole(loop: SimLoop) -> None:
        await main(World(loop))

    simulate(whole, seed=1)


class Place:
    """What another place has; it does with reads what it is told to."""

    def __init__(self, payloads: list[Payload]) -> None:
        self.payloads = payloads
        self.targets: list[Buffer] = []
        self.ended = 0
        self.asked: list[list[bytes]] = []
        self.raises: BaseException | None = None
        self.outcome: Callable[[int], Outcome] = lambda i: HIT

    async def ask(self, some: list[bytes]) -> Place:
        self.asked.append(some)
        await asyncio.sleep(0.01)
        return self

    async def read(self, wanted: Sequence[Payload], targets: Sequence[Buffer]) -> list[tuple[Outcome, bytes]]:
        self.targets = list(targets)
        await asyncio.sleep(0.01)
        if self.raises is not None:
            raise self.raises
        for one, target in zip(wanted, targets, strict=True):
            target.array()[:] = memoryview(value(one.name.key))
        return [(self.outcome(i), one.digests) for i, one in enumerate(wanted)]

    def end(self) -> None:
        self.ended += 1


def lone(keys: list[bytes] = KEYS) -> Place:
    return Place([payload(Name(key), value(key)) for key in keys])


def chained() -> Place:
    return Place(
        [
            payload(Name(key), value(key), form=Form.BLOCK, parent=BLOCKS[i - 1] if i else b"")
            for i, key in enumerate(BLOCKS)
        ]
    )


def used(host: Host) -> int:
    return host.cache.tiers.memory.status().used_bytes


@pytest.mark.parametrize("made", [lone, chained])
def test_extents_are_kept_until_nobody_writes_to_them(made: Callable[[], Place]) -> None:
    async def main(world: World) -> None:
        async with world.host("a") as a:
            bringing = a.cache.peering._bringing
            place, before = made(), used(a)
            writing = asyncio.get_running_loop().create_future()
            place.raises = AbandonedLoad("it hangs", writing)
            keys = [one.name.key for one in place.payloads]
            await bringing.bring(keys, EVERY, place.ask)
            assert place.ended == 1
            assert used(a) >= before + len(keys) * SIZE
            # Whatever is stored meanwhile lies elsewhere; late writes reach nobody.
            others = [object_key("bringing", f"other{number}") for number in range(20)]
            assert set(await a.put(others)) == {HIT}
            for target in place.targets:
                target.array()[:] = 0x5A
            assert await a.get(others) == [HIT] * len(others)
            await a.cache.delete([Name(key) for key in others])
            writing.set_result(None)
            await a.until(lambda: used(a) < before + SIZE)
            place.raises = None
            await bringing.bring(keys, EVERY, place.ask)
            assert await a.get(keys) == [HIT] * len(keys)

    run(main)


@pytest.mark.parametrize("fault", [UnavailableError("gone"), AbandonedLoad("gave up"), asyncio.CancelledError()])
def test_what_ends_in_a_fault_leaves_nothing(fault: BaseException) -> None:
    async def main(world: World) -> None:
        async with world.host("a") as a:
            bringing = a.cache.peering._bringing
            place, before = lone(), used(a)
            place.raises = fault
            try:
                await bringing.bring(KEYS, EVERY, place.ask)
            except asyncio.CancelledError:
                assert isinstance(fault, asyncio.CancelledError)
            assert place.ended == 1 and used(a) < before + SIZE and not bringing._coming
            assert await a.get(KEYS) == [MISS] * len(KEYS)

    run(main)


@pytest.mark.parametrize("outcome", [MISS, Outcome.CORRUPT])
def test_what_does_not_come_is_a_miss_and_the_rest_is_there(outcome: Outcome) -> None:
    async def main(world: World) -> None:
        async with world.host("a") as a:
            place = lone()
            place.outcome = lambda i: outcome if i in (2, 5) else HIT
            await a.cache.peering._bringing.bring(KEYS, EVERY, place.ask)
            assert await a.get(KEYS) == [HIT, HIT, MISS, HIT, HIT, MISS, HIT, HIT]
            half = chained()
            half.outcome = lambda i: outcome if i == 3 else HIT
            await a.cache.peering._bringing.bring(BLOCKS, EVERY, half.ask)
            assert await a.matched(BLOCKS) == 3

    run(main)


def test_bytes_that_are_not_what_their_digests_say_are_not_shown() -> None:
    """Also where the other place says that it compared them: the memory may be written to by others since."""

    async def main(world: World) -> None:
        async with world.host("a") as a:
            place = Place([payload(Name(key), b"another" * 100 + value(key)[700:]) for key in KEYS])
            await a.cache.peering._bringing.bring(KEYS, EVERY, place.ask)
            assert await a.get(KEYS) == [MISS] * len(KEYS)

    run(main)


def test_equal_loads_are_one_and_who_gives_up_takes_nobody_along() -> None:
    async def main(world: World) -> None:
        async with world.host("a") as a:
            bringing, place = a.cache.peering._bringing, lone()
            loads = [asyncio.ensure_future(bringing.bring(KEYS, EVERY, place.ask)) for _ in range(5)]
            await asyncio.gather(*loads)
            assert len(place.asked) == 1
            await a.cache.delete([Name(key) for key in KEYS])
            place.asked.clear()
            loads = [asyncio.ensure_future(bringing.bring([*KEYS, *KEYS], EVERY, place.ask)) for _ in range(3)]
            await asyncio.sleep(0.005)
            loads[0].cancel()
            await asyncio.wait(loads)
            assert not bringing._coming
            assert await a.get(KEYS) == [HIT] * len(KEYS)

    run(main)
