"""What peers cost a cache that has none, or many entries: steps on its loop are short, evictions need no peers."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from tests.unit.peer_hosts import SIZE, World, value
from tiercache.assemble import open_cache
from tiercache.cache import peering
from tiercache.keys import chain, namespace, object_key
from tiercache.model import Name, TierId
from tiercache.settings import MIB
from tiercache.testing.simloop import simulate

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path

    from tiercache.testing.simloop import SimLoop

KEYS = chain(namespace("costs"), [bytes([number]) for number in range(40)])
LONE = [object_key("costs", str(number)) for number in range(40)]


def run(main: Callable[[World], Coroutine[Any, Any, None]]) -> None:
    async def whole(loop: SimLoop) -> None:
        await main(World(loop))

    simulate(whole, seed=1)


@pytest.mark.parametrize("step", [1, 7, 40, 1000])
def test_everything_is_announced_to_who_comes_later_in_steps_of_any_size(
    step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peering, "NAMES_AT_ONCE", step)

    async def main(world: World) -> None:
        async with world.host("a") as a:
            await a.put(LONE)
            found, after, steps = [], 0, 0
            assert a.cache.peering is not None
            while True:
                names, after = a.cache.peering.contents(after)
                found += names
                steps += 1
                if not after:
                    break
            assert sorted(found) == sorted(Name(key) for key in LONE)
            assert steps == -(-len(LONE) // step)

    run(main)


def test_putting_where_nobody_listens_looks_up_no_names(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main(world: World) -> None:
        async with world.host("a") as a, world.host("b", "a") as b:
            monkeypatch.setattr(a.cache.peering, "_useful", lambda slots: pytest.fail("nobody listens"))
            await a.put(LONE[:20])
            monkeypatch.undo()
            await a.met()
            await a.put(LONE[20:])
            await b.sees(LONE)

    run(main)


def test_evicting_where_nobody_has_room_looks_at_no_ancestors(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main(world: World) -> None:
        async with world.host("a", spill=True) as a:
            await a.cache.put_chain(KEYS, [value(key) for key in KEYS])
            index = a.cache.tiers.index
            monkeypatch.setattr(index, "parents", lambda slots: pytest.fail("there is no peer"))
            assert a.cache.peering is not None
            await a.cache.peering.spill(index.victims(TierId.MEMORY, 1))

    run(main)


def test_no_memory_is_made_for_what_is_larger_than_it(tmp_path: Path) -> None:
    with open_cache(tmp_path, share=False, memory_bytes=16 * MIB, ssd_bytes=64 * MIB) as cache:
        names = [Name(key) for key in LONE]
        cache.put(names, [value(key) for key in LONE])
        core: Any = cache.core
        asked = asyncio.run_coroutine_threadsafe(core._pressure.make_room(1 << 40), cache.loop)
        assert asked.result(30) is False
        assert core.tiers.memory.status().used_bytes >= len(LONE) * SIZE
