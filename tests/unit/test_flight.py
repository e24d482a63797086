"""Single flight: parts of a slot are loaded once, whoever asks."""

from __future__ import annotations

import asyncio

import pytest

from tiercache.flight import Flights


def test_the_second_reader_waits_for_what_the_first_loads_and_loads_the_rest() -> None:
    async def scene() -> None:
        flights = Flights()
        assert flights.join(7, 0b0110) == (0b0110, [])
        first = flights.begin(7, 0b0110)
        mine, others = flights.join(7, 0b1100)
        assert (mine, others) == (0b1000, [first])
        assert flights.join(8, 0b1100).mine == 0b1100
        second = flights.begin(7, mine)
        assert len(flights) == 2
        flights.end(7, first)
        assert first.result() is None
        assert flights.under_way(7)
        flights.end(7, second, OSError("gone"))
        with pytest.raises(OSError, match="gone"):
            second.result()
        assert not flights.under_way(7)
        assert flights.merged == 1

    asyncio.run(scene())


def test_a_failed_load_nobody_waited_for_is_quiet() -> None:
    async def scene() -> None:
        flights = Flights()
        flights.end(1, flights.begin(1, 1), OSError("nobody looks"))

    asyncio.run(scene(), debug=True)


def test_a_claim_keeps_others_away_and_wakes_who_waits() -> None:
    async def scene() -> None:
        flights = Flights()
        load = flights.begin(1, 0b1)
        assert flights.claim([1, 2]) is None
        flights.end(1, load)
        claim = flights.claim([1, 2])
        assert claim is not None and flights.claim([2]) is None
        waiter = flights.claimed(2)
        assert waiter is not None and flights.claimed(1) is waiter and flights.claimed(3) is None
        await asyncio.get_running_loop().run_in_executor(None, flights.unclaim, claim)
        await waiter
        assert flights.claimed(1) is None
        quiet = flights.claim([2])
        assert quiet is not None
        flights.unclaim(quiet)

    asyncio.run(scene())
