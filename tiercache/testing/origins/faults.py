"""FaultyOriginTests: what an origin over HTTP owes when the server, or the way to it, misbehaves."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from tiercache.buffers import Buffer
from tiercache.errors import ChangedError, OriginError, UnavailableError
from tiercache.origin import Span
from tiercache.testing.faultproxy import FaultProxy, Faults
from tiercache.testing.origins.plain import DATA, Arrangement, OriginTests, pinned, read

if TYPE_CHECKING:
    from pathlib import Path

    from tiercache.origin import Origin

PASSING = (
    "throttle",
    "error",
    "reset",
    "truncate",
    "short_length",
    "long_length",
    "wrong_range",
    "ignore_range",
)
"""Faults that a second request gets over."""
CLEAR = (ChangedError, OriginError, UnavailableError)


def proxy_of(place: Arrangement) -> FaultProxy:
    """The proxy that stands before the server."""
    assert place.proxy is not None
    return place.proxy


class FaultyOriginTests(OriginTests):
    """OriginTests, and the same through a FaultProxy that misbehaves. The arrangement has a proxy."""

    checks_ranges = True
    """False where the client library hides Content-Range: a shifted answer of the right length passes."""
    signed = False
    """True where the server checks signatures, so that the proxy cannot take the range out of a request."""
    waits_as_told = False
    """True where Retry-After reaches us."""

    def _skip_if_impossible(self, fault: str) -> None:
        if fault in ("wrong_range", "wrong_etag") and not self.checks_ranges:
            pytest.skip("the client library does not show the answer's headers")
        if fault == "ignore_range" and self.signed:
            pytest.skip("the range is signed")

    @pytest.mark.parametrize("fault", PASSING)
    def test_gets_over(self, tmp_path: Path, fault: str) -> None:
        """One fault, or two in a row, and then the right bytes."""
        self._skip_if_impossible(fault)

        async def check(place: Arrangement, origin: Origin) -> None:
            path = place.put("x", DATA)
            stat = await pinned(origin, path)
            proxy = proxy_of(place)
            for count in (1, 2):
                proxy.clear()
                proxy.faults = Faults(schedule=dict.fromkeys(range(1, count + 1), fault), only_path="/x")
                assert await read(origin, stat, 1000, 5000) == [DATA[1000:6000]]
                assert proxy.stats.by_fault[fault] == count
                proxy.clear()
                found = await origin.read_tail(path, 100)
                assert isinstance(found, tuple)
                assert found[1] == DATA[-100:]

        self.check(tmp_path, check)

    @pytest.mark.parametrize("fault", ["throttle", "error", "reset"])
    def test_facts_get_over(self, tmp_path: Path, fault: str) -> None:
        """Stats, lists and writes are tried again too."""

        async def check(place: Arrangement, origin: Origin) -> None:
            path = place.put("d/x", DATA)
            proxy = proxy_of(place)
            proxy.faults = Faults(schedule={1: fault})
            assert (await pinned(origin, path)).size == len(DATA)
            if self.lists:
                proxy.clear()
                rows = await origin.list(place.path("d"))
                assert isinstance(rows, list)
                assert [row.path for row in rows] == [path]
            if self.writes:
                proxy.clear()
                await origin.write(path, b"new")
                proxy.faults = Faults()
                assert (await pinned(origin, path)).size == 3

        self.check(tmp_path, check)

    @pytest.mark.parametrize("fault", [*PASSING, "wrong_etag", "mute", "stall"])
    def test_what_stays_broken_is_a_clear_error_in_time(self, tmp_path: Path, fault: str) -> None:
        """Always broken: an error of ours within the deadline, and never bytes."""
        self._skip_if_impossible(fault)

        async def check(place: Arrangement, origin: Origin) -> None:
            stat = await pinned(origin, place.put("x", DATA))
            proxy_of(place).faults = Faults(probability={fault: 1.0}, stall_s=3.0, only="GET")
            loop = asyncio.get_running_loop()
            begin_s = loop.time()
            with pytest.raises(CLEAR):
                await read(origin, stat, 1000, 5000)
            assert loop.time() - begin_s < 2.0

        self.check(tmp_path, check, deadline_s=0.6, attempts=3)

    @pytest.mark.parametrize("fault", ["mute", "stall"])
    def test_silence_is_given_up_and_tried_again(self, tmp_path: Path, fault: str) -> None:
        """A silent answer does not use up the deadline: the next attempt succeeds."""

        async def check(place: Arrangement, origin: Origin) -> None:
            stat = await pinned(origin, place.put("x", DATA))
            proxy = proxy_of(place)
            proxy.clear()
            proxy.faults = Faults(schedule={1: fault}, stall_s=5.0)
            assert await read(origin, stat, 1000, 5000) == [DATA[1000:6000]]

        self.check(tmp_path, check, deadline_s=2.5)

    def test_a_storm(self, tmp_path: Path) -> None:
        """Every second answer is broken in some way: all reads succeed, all bytes are right."""
        some = set(PASSING) - {"wrong_range"} - ({"ignore_range"} if self.signed else set())

        async def check(place: Arrangement, origin: Origin) -> None:
            stat = await pinned(origin, place.put("x", DATA))
            proxy_of(place).faults = Faults(probability=dict.fromkeys(sorted(some), 0.08))
            reads = [read(origin, stat, i * 700, 3000) for i in range(100)]
            for i, got in enumerate(await asyncio.gather(*reads)):
                assert got == [DATA[i * 700 : i * 700 + 3000]]
            assert sum(proxy_of(place).stats.by_fault.values()) > 20

        self.check(tmp_path, check, attempts=20)

    def test_changed_between_and_inside_requests(self, tmp_path: Path) -> None:
        """An object that is replaced while its bytes are on their way gives its old bytes, or an error."""

        async def check(place: Arrangement, origin: Origin) -> None:
            proxy = proxy_of(place)
            for moment in ("on_request", "on_body"):
                stat = await pinned(origin, place.put("x", DATA))
                setattr(proxy, moment, lambda number, target: place.put("x", DATA[::-1]))
                try:
                    assert await read(origin, stat, 0, len(DATA)) == [DATA]
                except ChangedError:
                    pass
                finally:
                    setattr(proxy, moment, None)
                with pytest.raises(ChangedError):
                    await read(origin, stat, 0, 100)

        self.check(tmp_path, check)

    def test_nothing_is_written_after_the_end(self, tmp_path: Path) -> None:
        """A read that was cancelled, or ran into its deadline, leaves its targets alone from then on."""

        async def check(place: Arrangement, origin: Origin) -> None:
            stat = await pinned(origin, place.put("x", DATA))
            proxy = proxy_of(place)
            for how in ("cancel", "deadline"):
                proxy.clear()
                proxy.faults = Faults(delay_s=0.15) if how == "cancel" else Faults(delay_s=0.45)
                memory = bytearray(len(DATA))
                target = Buffer.of(memory, writable=True)
                task = asyncio.ensure_future(origin.read(stat, Span(0, len(DATA)), [target]))
                if how == "cancel":
                    await asyncio.sleep(0.05)
                    task.cancel()
                with pytest.raises((asyncio.CancelledError, UnavailableError)):
                    await task
                memory[:] = b"\x5a" * len(DATA)
                await asyncio.sleep(0.5)
                assert proxy.stats.requests
                assert memory == b"\x5a" * len(DATA), how
                proxy.faults = Faults()

        self.check(tmp_path, check, deadline_s=0.3, attempts=1)

    def test_waits_as_long_as_it_is_told(self, tmp_path: Path) -> None:
        """Retry-After is kept where it reaches us; a wait beyond the deadline is an error at once."""
        if not self.waits_as_told:
            pytest.skip("the client library does not show Retry-After")

        async def check(place: Arrangement, origin: Origin) -> None:
            stat = await pinned(origin, place.put("x", DATA))
            proxy = proxy_of(place)
            proxy.clear()
            proxy.faults = Faults(schedule={1: "throttle"}, retry_after_s=1)
            loop = asyncio.get_running_loop()
            begin_s = loop.time()
            assert await read(origin, stat, 0, 100) == [DATA[:100]]
            assert loop.time() - begin_s >= 1.0
            proxy.clear()
            proxy.faults = Faults(schedule={1: "throttle"}, retry_after_s=60)
            begin_s = loop.time()
            with pytest.raises(UnavailableError):
                await read(origin, stat, 0, 100)
            assert loop.time() - begin_s < 1.0

        self.check(tmp_path, check)

    def test_an_origin_that_is_not_there(self, tmp_path: Path) -> None:
        """Nobody listens: UnavailableError within the deadline."""

        async def check(place: Arrangement, origin: Origin) -> None:
            path = place.put("x", DATA)
            proxy_of(place).close()
            with pytest.raises(UnavailableError):
                await origin.stat([path])
            with pytest.raises(UnavailableError):
                await origin.read_tail(path, 10)

        self.check(tmp_path, check, deadline_s=1.0, attempts=2)
