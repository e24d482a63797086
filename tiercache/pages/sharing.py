"""Sharing: facts of one origin that the processes of a directory find out once for all of them, by way of notes.

A note says what was found, when somebody began to look and when they told it, and for how long that may be believed:
from then on, and not from when somebody else heard of it. Its name begins with a digest of the origin's identity
(endpoint and reader's rights), so that nobody is told what was shown to somebody else; then come the kind and the path.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from tiercache.errors import UnavailableError
from tiercache.keys import namespace
from tiercache.model import Outcome
from tiercache.origin import Stat
from tiercache.pages.versions import Pin

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence
    from concurrent.futures import Future

    from tiercache.clock import Clock
    from tiercache.core import Notes

T = TypeVar("T")

Answer = Stat | Outcome | list[Stat]
"""What an origin says of a path (STAT), or of what is in it (LISTING)."""

STAT, LISTING, TAIL = b"s", b"l", b"t"
KINDS = (STAT, LISTING, TAIL)
"""What notes are about: a path's facts, what is in a directory, and that a file's last bytes have been fetched."""
END = b"\0"
"""Ends every name, so that a path is forgotten without those that go on where it ends."""
SPACE_BYTES = 16
NOTE_BYTES_MAX = 4 << 20
"""A longer answer is not shared: each process asks for itself."""
ROW_BYTES_MIN = len('["",0,"",null,false],')
"""No row of a listing is shorter in a note."""
ROWS_AT_ONCE = 256
"""Rows made text in one go, which holds the interpreter's lock; more than these are not the loop's work."""
OPENED_HERE_BYTES = 64 << 10
"""Notes up to this length are read on the loop."""
PREFIXES_BYTES_MAX = 1 << 20
"""More paths than fit here are forgotten together with everything else of their origin."""
TAIL_TTL_S = 3600.0
_UNSHARED = b""
_FETCHED = b"1"


class Found(NamedTuple):
    """An answer, the wall time when looking for it began, for how long to believe it from now, and the epoch (of
    whoever remembers it) since which nothing may have been forgotten."""

    answer: Answer
    looked_s: float
    left_s: float
    epoch: int


class Sharing:
    """Asks the notes before the origin. `find` is for the cache's loop, `forget` for any thread."""

    def __init__(self, notes: Notes, identity: str, clock: Clock, *, wait_s: float) -> None:
        """After `wait_s` nobody waits any longer for what another process finds out, and asks for itself."""
        self._notes, self._clock, self._wait_s = notes, clock, wait_s
        self._space = namespace("notes", identity)

    async def find(
        self,
        kind: bytes,
        path: str,
        ask: Callable[[], Awaitable[Answer]],
        ttl_s: Callable[[Answer], float],
        epoch: Callable[[], int],
    ) -> Found:
        """What another process found out, or what `ask` answers, which the others are told. Faults of `ask` are its
        caller's alone: the next process that waits asks itself."""
        since, asked_s = epoch(), self._clock.wall()
        name = self._name(kind, path)
        mine, note = await self._claim(name)
        if note is not None:
            found = await self._opened(note, asked_s, ttl_s, since)
            if found is not None:
                return found
        since, looked_s = epoch(), self._clock.wall()
        value, believed_s = _UNSHARED, 0.0
        try:
            answer = await ask()
            left_s = ttl_s(answer)
            if mine and left_s > 0.0:
                facts = answer, looked_s, self._clock.wall(), left_s
                long = isinstance(answer, list) and len(answer) > ROWS_AT_ONCE
                value, believed_s = await asyncio.to_thread(packed, *facts) if long else packed(*facts), left_s
        finally:
            if mine:
                self._notes.settle(name, value, believed_s)
        return Found(answer, looked_s, left_s, since)

    async def listed(self, directory: str, ttl_s: Callable[[Answer], float], epoch: Callable[[], int]) -> Found | None:
        """What some process found in a directory, if that is believed now; nobody is asked or waited for."""
        since, asked_s = epoch(), self._clock.wall()
        try:
            async with asyncio.timeout(self._wait_s):
                note = await self._notes.known(self._name(LISTING, directory))
        except (TimeoutError, UnavailableError):
            return None
        return None if note is None else await self._opened(note, asked_s, ttl_s, since)

    async def tail(self, path: str, fetch: Callable[[], Awaitable[T]], otherwise: Callable[[], Awaitable[T]]) -> T:
        """What `fetch` answers, which brings a file's last bytes; of `otherwise` where a process of this directory did
        that before, and the file was not written since."""
        name = self._name(TAIL, path)
        mine, note = await self._claim(name)
        if note is not None:
            return await otherwise()
        believed_s = 0.0
        try:
            answer = await fetch()
            believed_s = TAIL_TTL_S if isinstance(answer, Pin) else 0.0
        finally:
            if mine:
                self._notes.settle(name, _FETCHED, believed_s)
        return answer

    def forget(self, paths: Iterable[str], directories: Iterable[str]) -> Future[None]:
        """Makes every process forget exactly these paths, and what lies below these directories (their own paths are
        not among it); this one at once. Done when all have been told."""
        prefixes = {self._name(kind, path) for path in paths for kind in KINDS}
        for path in directories:
            below = _utf8(path.rstrip("/") + "/") if path.rstrip("/") else b""
            prefixes |= {self._space + kind + below for kind in KINDS}
        if sum(map(len, prefixes)) > PREFIXES_BYTES_MAX:
            prefixes = {self._space}
        return self._notes.forget(sorted(prefixes))

    def forgotten(self, prefixes: Sequence[bytes]) -> tuple[list[str], list[str]]:
        """(paths, directories) of this origin that some process forgot, as for `forget`."""
        paths: list[str] = []
        directories: list[str] = []
        for prefix in prefixes:
            if not prefix.startswith(self._space):
                if self._space.startswith(prefix):
                    directories.append("")  # everything of everybody
                continue
            path = prefix[SPACE_BYTES + 1 :]
            known = path.removesuffix(END).decode("utf-8", "surrogatepass")
            (paths if path.endswith(END) else directories).append(known)
        return paths, directories

    async def _claim(self, name: bytes) -> tuple[bool, bytes | None]:
        """(whether it is for us to find out and to settle, what is known)."""
        try:
            async with asyncio.timeout(self._wait_s):
                note = await self._notes.claim(name)
        except (TimeoutError, UnavailableError):
            return False, None  # nobody there, or too busy: this process asks, and tells nobody
        return note is None, note

    async def _opened(self, note: bytes, asked_s: float, ttl_s: Callable[[Answer], float], since: int) -> Found | None:
        """A note as an answer, or None where it is too old for us, or says only that each must ask for itself."""
        if note == _UNSHARED:
            return None
        try:
            answer, looked_s, told_s, note_ttl_s = (
                await asyncio.to_thread(unpacked, note) if len(note) > OPENED_HERE_BYTES else unpacked(note)
            )
        except (ValueError, TypeError):
            return None
        age_s = self._clock.wall() - told_s
        # What was told in the future was told before the clock was set back: how old it is nobody knows.
        left_s = min(ttl_s(answer), note_ttl_s) - age_s if age_s >= 0.0 else 0.0
        if left_s <= 0.0 and told_s < asked_s:
            return None  # else it was found out while we waited, and answers this question, but no later one
        return Found(answer, looked_s, max(0.0, left_s), since)

    def _name(self, kind: bytes, path: str) -> bytes:
        return self._space + kind + _utf8(path) + END


def packed(answer: Answer, looked_s: float, told_s: float, ttl_s: float) -> bytes:
    """A note's value; empty for what is too long to be shared."""
    if isinstance(answer, Outcome):
        found = _text(int(answer))
    elif isinstance(answer, Stat):
        found = _text(_row(answer))
    else:
        found = _listing(answer)
    note = f"[{looked_s!r},{told_s!r},{ttl_s!r},{found}]".encode()
    return note if found and len(note) <= NOTE_BYTES_MAX else _UNSHARED


def _listing(rows: list[Stat]) -> str:
    """Text of a listing; empty for one that is found to be too long, as soon as that is found."""
    if len(rows) * ROW_BYTES_MIN > NOTE_BYTES_MAX:
        return ""
    pieces: list[str] = []
    length = 0
    for first in range(0, len(rows), ROWS_AT_ONCE):
        piece = _text([_row(each) for each in rows[first : first + ROWS_AT_ONCE]])[1:-1]
        pieces.append(piece)
        length += len(piece)
        if length > NOTE_BYTES_MAX:
            return ""
    return f"[{','.join(pieces)}]"


def _text(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def unpacked(note: bytes) -> tuple[Answer, float, float, float]:
    """(answer, when the look began, when it was told, how long to believe it from then on)."""
    looked_s, told_s, ttl_s, found = json.loads(note)
    answer: Answer
    if isinstance(found, int):
        answer = Outcome(found)
    elif found and not isinstance(found[0], list):
        answer = Stat(*found)
    else:
        answer = [Stat(*each) for each in found]
    return answer, looked_s, told_s, ttl_s


def _row(stat: Stat) -> list[Any]:
    return [stat.path, stat.size, stat.version, stat.mtime_s, stat.is_directory]


def _utf8(path: str) -> bytes:
    return path.encode("utf-8", "surrogatepass")  # local names may be any bytes
