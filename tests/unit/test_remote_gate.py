"""Reads of object storage that are given up: nothing is written to their targets after that."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from tiercache.buffers import Buffer
from tiercache.model import Form, Kind, Name, Outcome, Payload
from tiercache.remote.packs import Want
from tiercache.remote.reading import Gate, Item


class Slow(list[tuple[int, memoryview]]):
    """Pieces that a landing begins to look at, and gets when it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.looked = 0

    def __iter__(self) -> Iterator[tuple[int, memoryview]]:
        self.begun.set()
        assert self.go_on.wait(30)
        self.looked += 1
        return super().__iter__()


def test_the_end_waits_for_a_copy_under_way_and_lets_none_begin() -> None:
    payload = Payload(Name(bytes(32)), 4096, 65536, 1, b"", Kind.KV, form=Form.BLOCK)
    item, pieces = Item(0, Want(payload, 64), Buffer.of(bytearray(4096), writable=True)), Slow()

    async def main() -> None:
        gate, loop = Gate(), asyncio.get_running_loop()
        landing = loop.run_in_executor(None, gate.land, "pack", item, pieces)
        assert await loop.run_in_executor(None, pieces.begun.wait, 30)
        ending = loop.create_task(gate.end())
        await asyncio.sleep(0)
        ending.cancel()  # whoever gives up twice waits all the same
        await asyncio.sleep(0)
        assert not ending.done() and gate.land("pack", item, pieces) == (Outcome.MISS, b"")
        pieces.go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await ending
        looked = pieces.looked
        assert (await landing)[0] is Outcome.MISS and looked > 0
        assert gate.land("pack", item, pieces)[0] is Outcome.MISS and pieces.looked == looked
        await gate.end()

    asyncio.run(main())
