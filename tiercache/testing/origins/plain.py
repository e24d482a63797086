"""OriginTests: the contract of the Origin port."""

from __future__ import annotations

import asyncio
import random
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import pytest

from tiercache.buffers import Buffer
from tiercache.errors import ChangedError, ClosedError, OriginError, UnavailableError
from tiercache.model import Outcome
from tiercache.origin import Span, Stat
from tiercache.remote.retry import Patience

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from tiercache.origin import Origin
    from tiercache.testing.faultproxy import FaultProxy

T = TypeVar("T")

PAGE_BYTES = 64 << 10
DATA = random.Random(1).randbytes(3 * PAGE_BYTES + 77)
"""What most tests read: three pages and a piece."""
QUICK = Patience(deadline_s=10.0, attempts=8, concurrency=8, pause_s=0.002, throttle_pause_s=0.004, pause_s_max=0.05)
NAMES = (
    "plain",
    "with space",
    "plus+plus",
    "per%cent",
    "per%20cent",
    "üñí/ţö",
    "日本.parquet",
    "a=b&c;d,e",
    "(round) [square] {curly}",
    "quote'quote",
    "tilde~at@",
    "#hash",
    "what?",
    "_date=2026-11-20/part-0.parquet",
)


@dataclass(frozen=True, slots=True)
class Arrangement:
    """An origin to test, and what happens behind its back. `put` answers the path that the origin knows it by."""

    open: Callable[[Patience], Origin]
    put: Callable[[str, bytes], str]
    remove: Callable[[str], None]
    path: Callable[[str], str]
    """The path of a name that was not put."""
    proxy: FaultProxy | None = None


async def read(origin: Origin, stat: Stat, start: int, *lengths: int) -> list[bytes]:
    """The bytes that one read puts into targets of these lengths; what lies around them must stay untouched."""
    memory = [bytearray(b"\xa5" * (length + 16)) for length in lengths]
    targets = [Buffer.of(each, writable=True).slice(8, length) for each, length in zip(memory, lengths)]
    await origin.read(stat, Span(start, sum(lengths)), targets)
    for each in memory:
        assert each[:8] == each[-8:] == b"\xa5" * 8, "bytes beside a target were written"
    return [bytes(each[8:-8]) for each in memory]


async def pinned(origin: Origin, path: str) -> Stat:
    """The facts of an object that is there."""
    (stat,) = await origin.stat([path])
    assert isinstance(stat, Stat), (path, stat)
    return stat


class OriginTests(ABC):
    """What an Origin owes. Switches say what a protocol cannot do."""

    lists = True
    writes = True
    names: Sequence[str] = NAMES

    @abstractmethod
    def arrange(self, home: Path) -> AbstractContextManager[Arrangement]:
        """A fresh place for objects."""

    def run(self, coroutine: Coroutine[object, object, T]) -> T:
        """Runs a test's coroutine; the simulated loop may stand here."""
        return asyncio.run(coroutine)

    def check(self, home: Path, test: Callable[[Arrangement, Origin], Awaitable[None]], **patience: float) -> None:
        """Runs `test` with an arrangement and an origin opened in its loop."""

        async def inside() -> None:
            origin = place.open(replace(QUICK, **patience))  # type: ignore[arg-type]
            try:
                await test(place, origin)
            finally:
                await origin.close()

        with self.arrange(home) as place:
            self.run(inside())

    def test_absence_is_a_value(self, tmp_path: Path) -> None:
        """Nothing that asks for an absent object raises."""

        async def check(place: Arrangement, origin: Origin) -> None:
            there, none = place.put("there", b"x"), place.path("none")
            deep = place.path("none/of/these")
            found = await origin.stat([none, there, deep])
            assert [isinstance(each, Stat) for each in found] == [False, True, False]
            assert found[0] == found[2] == Outcome.GONE
            assert await origin.read_tail(none, 10) == Outcome.GONE
            if self.lists:
                assert await origin.list(none) == Outcome.GONE
                assert await origin.list(there) == Outcome.GONE
            if self.writes:
                assert await origin.delete([none, there, deep]) == [Outcome.GONE, Outcome.HIT, Outcome.GONE]
                assert await origin.stat([there]) == [Outcome.GONE]

        self.check(tmp_path, check)

    def test_facts(self, tmp_path: Path) -> None:
        """Size, and a version or a time; the same as long as the object is the same, and other ones for another."""

        async def check(place: Arrangement, origin: Origin) -> None:
            path = place.put("x", DATA)
            first = await pinned(origin, path)
            assert (first.path, first.size, first.is_directory) == (path, len(DATA), False)
            assert first.version or first.mtime_s is not None
            assert not first.version.startswith('"')
            assert await pinned(origin, path) == first
            tail = await origin.read_tail(path, 10)
            assert isinstance(tail, tuple)
            assert (tail[0].size, tail[0].version, tail[0].path) == (first.size, first.version, path)
            place.put("x", DATA[1:])
            second = await pinned(origin, path)
            assert second.size == len(DATA) - 1
            assert not first.version or second.version != first.version

        self.check(tmp_path, check)

    def test_ranges(self, tmp_path: Path) -> None:
        """Any span into any cut of targets, at every edge."""
        end = len(DATA)
        cuts = [
            (0, [1]),
            (0, [end]),
            (end - 1, [1]),
            (1, [PAGE_BYTES]),
            (PAGE_BYTES, [PAGE_BYTES]),
            (0, [PAGE_BYTES] * 3 + [77]),
            (PAGE_BYTES - 1, [1, 1, 5000]),
            (end - 77, [70, 7]),
            (5, []),
            (5, [0]),
            (end, [0]),
        ]

        async def check(place: Arrangement, origin: Origin) -> None:
            stat = await pinned(origin, place.put("x", DATA))
            for start, lengths in cuts:
                got = await read(origin, stat, start, *lengths)
                assert b"".join(got) == DATA[start : start + sum(lengths)], (start, lengths)
            together = [read(origin, stat, i * 1000, 999) for i in range(40)]
            for i, got in enumerate(await asyncio.gather(*together)):
                assert got == [DATA[i * 1000 : i * 1000 + 999]]

        self.check(tmp_path, check)

    def test_tails(self, tmp_path: Path) -> None:
        """The last bytes, or all of them."""

        async def check(place: Arrangement, origin: Origin) -> None:
            path = place.put("x", DATA)
            for length in (1, 77, PAGE_BYTES, len(DATA) - 1, len(DATA), len(DATA) + 1, 10 * len(DATA)):
                found = await origin.read_tail(path, length)
                assert isinstance(found, tuple)
                assert found[1] == DATA[-length:], length

        self.check(tmp_path, check)

    def test_exact_pages_and_single_bytes(self, tmp_path: Path) -> None:
        """Sizes where caches of others ask past the end."""

        async def check(place: Arrangement, origin: Origin) -> None:
            for size in (1, PAGE_BYTES, 2 * PAGE_BYTES):
                data = DATA[:size]
                path = place.put(f"s{size}", data)
                stat = await pinned(origin, path)
                assert await read(origin, stat, 0, size) == [data]
                assert await read(origin, stat, size - 1, 1) == [data[-1:]]
                assert await origin.read_tail(path, PAGE_BYTES) == (stat, data[-PAGE_BYTES:])

        self.check(tmp_path, check)

    def test_empty_object(self, tmp_path: Path) -> None:
        """There, and nothing in it."""

        async def check(place: Arrangement, origin: Origin) -> None:
            path = place.put("empty", b"")
            stat = await pinned(origin, path)
            assert stat.size == 0
            assert await origin.read_tail(path, 1000) == (stat, b"")
            assert await read(origin, stat, 0) == []

        self.check(tmp_path, check)

    def test_names(self, tmp_path: Path) -> None:
        """Unicode, spaces, plus, percent and everything that URLs stumble over."""

        async def check(place: Arrangement, origin: Origin) -> None:
            paths = [place.put(name, name.encode()) for name in self.names]
            found = await origin.stat(paths)
            for name, path, stat in zip(self.names, paths, found):
                assert isinstance(stat, Stat), name
                assert await read(origin, stat, 0, stat.size) == [name.encode()], name
                tail = await origin.read_tail(path, 100)
                assert isinstance(tail, tuple), name
                assert tail[1] == name.encode(), name
            if self.lists:
                tops = {place.path(name.partition("/")[0]) for name in self.names}
                listed = await origin.list(place.path("").rstrip("/"))
                assert isinstance(listed, list)
                assert {each.path for each in listed} == tops

        self.check(tmp_path, check)

    def test_lists(self, tmp_path: Path) -> None:
        """Direct children with their facts; directories have none, and are found by stat."""
        if not self.lists:
            pytest.skip("this protocol has no listings")

        async def check(place: Arrangement, origin: Origin) -> None:
            for name in ("d/b", "d/a", "d/c/x", "d/c/y", "dd", "e"):
                place.put(name, name.encode())
            folder = place.path("d")
            rows = await origin.list(folder)
            assert isinstance(rows, list)
            told = [(row.path, row.size, row.is_directory) for row in rows]
            assert told == [
                (place.path(n), s, d) for n, s, d in (("d/a", 3, False), ("d/b", 3, False), ("d/c", 0, True))
            ]
            assert rows[0].version == (await pinned(origin, place.path("d/a"))).version
            assert (await pinned(origin, folder)).is_directory
            assert await origin.read_tail(folder, 10) == Outcome.GONE
            deeper = await origin.list(place.path("d/c"))
            assert isinstance(deeper, list)
            assert [row.path for row in deeper] == [place.path("d/c/x"), place.path("d/c/y")]

        self.check(tmp_path, check)

    def test_writes_and_deletes(self, tmp_path: Path) -> None:
        """What was written is read, and its answer pins what was written."""
        if not self.writes:
            pytest.skip("this protocol is read-only")

        async def check(place: Arrangement, origin: Origin) -> None:
            path = place.path("new/deep/ü +%")
            for data in (b"one", DATA, b"", bytes(6 << 20)):
                told = await origin.write(path, memoryview(data))
                stat = await pinned(origin, path)
                assert (told.size, told.path) == (len(data), path)
                assert told.version in ("", stat.version)
                assert await origin.read_tail(path, len(data) + 1) == (stat, data)
            assert await origin.delete([path]) == [Outcome.HIT]
            assert await origin.delete([path]) == [Outcome.GONE]
            assert await origin.stat([path]) == [Outcome.GONE]

        self.check(tmp_path, check)

    def test_another_version_is_told_and_not_read(self, tmp_path: Path) -> None:
        """Overwritten, shrunk, grown or deleted after it was pinned: ChangedError, whatever bytes there are now."""

        async def check(place: Arrangement, origin: Origin) -> None:
            for i, data in enumerate((DATA[::-1], DATA[:100], DATA + DATA, b"", None)):
                name = f"x{i}"
                stat = await pinned(origin, place.put(name, DATA))
                if data is None:
                    place.remove(name)
                else:
                    place.put(name, data)
                with pytest.raises(ChangedError):
                    await read(origin, stat, 10, 50)

        self.check(tmp_path, check)

    def test_a_wrong_size_is_told(self, tmp_path: Path) -> None:
        """Facts that lie about the size, as listings of some stores do, never make bytes."""

        async def check(place: Arrangement, origin: Origin) -> None:
            stat = await pinned(origin, place.put("x", DATA))
            with pytest.raises((ChangedError, OriginError, UnavailableError)):
                await read(origin, replace(stat, size=len(DATA) + 1000), len(DATA) + 500, 500)
            with pytest.raises((ChangedError, OriginError, UnavailableError)):
                await read(origin, stat, len(DATA) - 10, 20)
            start = len(DATA) - 1500
            try:
                got = await read(origin, replace(stat, size=len(DATA) - 1000), start, 500)
            except ChangedError:
                return
            # A client that does not see Content-Range: the version held, so the bytes must be right.
            assert got == [DATA[start : start + 500]]

        self.check(tmp_path, check, deadline_s=2.0, attempts=2)

    def test_close(self, tmp_path: Path) -> None:
        """Closing twice is one closing; afterwards nothing is answered."""

        async def check(place: Arrangement, origin: Origin) -> None:
            path = place.put("x", DATA)
            await origin.close()
            await origin.close()
            with pytest.raises(ClosedError):
                await origin.stat([path])

        self.check(tmp_path, check)
