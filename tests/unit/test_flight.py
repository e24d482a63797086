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
