"""Notes: facts that the clients of one owner share for a while, each found out by one client while the others wait.

A note is a name and a value, both bytes that mean nothing here. Whoever claims a name gets the value that is believed,
or the task of finding it out; others who claim it meanwhile wait. Nothing is ever handed out that was claimed before
it was last forgotten: whoever waits on such a claim begins anew, the first of them as the one who finds out.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left, insort
from typing import TYPE_CHECKING, NamedTuple

from tiercache.errors import ProtocolError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable

    from tiercache.clock import Clock


NAME_BYTES_MAX = 4096
"""A longer name (a URL may be longer) is nobody's: each finds that out for itself."""


class _Value(NamedTuple):
    """What is believed of a name, and until when (monotonic)."""

    value: bytes
    until_s: float


class _Claim:
    """A name that `holder` finds out, and who waits for that, in the order they came."""

    __slots__ = ("holder", "waiting")

    def __init__(self, holder: Hashable) -> None:
        self.holder = holder
        self.waiting: dict[Hashable, asyncio.Future[bytes | None]] = {}


class Notes:
    """The owner's notes, on its loop. `claimant` is whatever tells clients apart; it claims a name once at a time."""

    def __init__(self, clock: Clock, entries_max: int, bytes_max: int) -> None:
        """At most `entries_max` values of `bytes_max` with their names are kept, and as many claims are open, whose
        names are of as many bytes."""
        self._clock, self._entries_max, self._bytes_max = clock, entries_max, bytes_max
        self._values: dict[bytes, _Value] = {}
        self._sorted: list[bytes] = []  # the names of values: what begins with a prefix is found without a walk
        self._claims: dict[bytes, _Claim] = {}
        self._open: dict[Hashable, set[bytes]] = {}  # by claimant: holds, or held before it was forgotten, or waits
        self.bytes = self.claimed_bytes = 0

    def __len__(self) -> int:
        return len(self._values)

    @property
    def claims(self) -> int:
        """How many names somebody finds out now."""
        return len(self._claims)

    async def claim(self, name: bytes, claimant: Hashable) -> bytes | None:
        """The value that is believed, or None: this claimant finds out and settles. Waits while another one does.

        Raises ProtocolError where this claimant has not settled its last claim of that name, and UnavailableError when
        it leaves meanwhile.
        """
        if name in self._open.get(claimant, ()):
            raise ProtocolError("a note was claimed by one client twice at a time")
        found = self._believed(name)
        if found is not None:
            return found
        claim = self._claims.get(name)
        if claim is None:
            if self._may_open(name):  # else each finds out for itself
                self._claims[name] = _Claim(claimant)
                self.claimed_bytes += len(name)
                self._begin(name, claimant)
            return None
        future: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()
        claim.waiting[claimant] = future
        self._begin(name, claimant)
        try:
            return await future
        except asyncio.CancelledError:
            if future.cancelled():
                self._unwait(name, claimant, future)
            elif future.exception() is None and future.result() is None:  # it became the one who finds out
                self.settle(name, claimant, b"", 0.0)
            raise

    def known(self, name: bytes) -> bytes | None:
        """The value that is believed, if any; waits for nobody."""
        return self._believed(name)

    def settle(self, name: bytes, claimant: Hashable, value: bytes, ttl_s: float) -> None:
        """What a claimant found out: believed for `ttl_s`, and told to all who wait. With 0 s it is nothing to be
        believed: the next one who waits finds out. A claim that was forgotten meanwhile, or never was, settles nothing.
        """
        claim = self._claims.get(name)
        if claim is not None and claimant in claim.waiting:
            return  # it waits: there is nothing that it could have found out
        self._end(name, claimant)
        if claim is None or claim.holder != claimant:
            return
        if not ttl_s > 0.0:
            self._pass_on(name, claim)
            return
        self._close(name)
        for waiter, future in claim.waiting.items():
            self._end(name, waiter)
            if not future.done():
                future.set_result(value)
        self._keep(name, value, ttl_s)

    def leave(self, claimant: Hashable) -> None:
        """A client has gone: what it was to find out passes to those who wait."""
        for name in self._open.pop(claimant, ()):
            claim = self._claims.get(name)
            if claim is None:
                continue
            if claim.holder == claimant:
                self._pass_on(name, claim)
                continue
            future = claim.waiting.pop(claimant, None)
            if future is not None and not future.done():
                future.set_exception(UnavailableError("the client that asked has gone"))

    def forget(self, prefixes: Iterable[bytes]) -> None:
        """Drops every note whose name begins with one of these. What was claimed before settles nothing."""
        ways = tuple(prefixes)
        for prefix in ways:
            start = stop = bisect_left(self._sorted, prefix)
            while stop < len(self._sorted) and self._sorted[stop].startswith(prefix):
                self._forget_value(self._sorted[stop])
                stop += 1
            del self._sorted[start:stop]
        for name in [name for name in self._claims if name.startswith(ways)]:
            self._pass_on(name, self._claims[name])

    def _believed(self, name: bytes) -> bytes | None:
        found = self._values.get(name)
        if found is None:
            return None
        if found.until_s <= self._clock.monotonic():
            self._drop(name)
            return None
        return found.value

    def _keep(self, name: bytes, value: bytes, ttl_s: float) -> None:
        if name in self._values:
            self._drop(name)  # to the end: the oldest go first
        if len(name) + len(value) > self._bytes_max:
            return
        self._values[name] = _Value(value, self._clock.monotonic() + ttl_s)
        insort(self._sorted, name)
        self.bytes += len(name) + len(value)
        while len(self._values) > self._entries_max or self.bytes > self._bytes_max:
            self._drop(next(iter(self._values)))

    def _drop(self, name: bytes) -> None:
        self._forget_value(name)
        del self._sorted[bisect_left(self._sorted, name)]

    def _forget_value(self, name: bytes) -> None:
        """Takes a value away, and leaves its name among the sorted ones."""
        self.bytes -= len(name) + len(self._values.pop(name).value)

    def _pass_on(self, name: bytes, claim: _Claim) -> None:
        """The first who still waits finds out; without anybody the claim ends."""
        while claim.waiting:
            claimant, future = next(iter(claim.waiting.items()))
            del claim.waiting[claimant]
            if not future.done():
                claim.holder = claimant
                future.set_result(None)
                return
            self._end(name, claimant)  # it was cancelled
        self._close(name)

    def _may_open(self, name: bytes) -> bool:
        """Whether there is room for one more claim, of this name."""
        if len(name) > NAME_BYTES_MAX or len(self._claims) >= self._entries_max:
            return False
        return self.claimed_bytes + len(name) <= self._bytes_max

    def _close(self, name: bytes) -> None:
        del self._claims[name]
        self.claimed_bytes -= len(name)

    def _unwait(self, name: bytes, claimant: Hashable, future: asyncio.Future[bytes | None]) -> None:
        claim = self._claims.get(name)
        if claim is not None and claim.waiting.get(claimant) is future:
            del claim.waiting[claimant]
            self._end(name, claimant)

    def _begin(self, name: bytes, claimant: Hashable) -> None:
        self._open.setdefault(claimant, set()).add(name)

    def _end(self, name: bytes, claimant: Hashable) -> None:
        names = self._open.get(claimant)
        if names is not None:
            names.discard(name)
            if not names:
                del self._open[claimant]
