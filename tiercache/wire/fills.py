"""Fills, seen by the owner: gaps of a READ that its asker loads itself, straight into the owner's memory.

What a client says it has written is hashed before anybody else may have it. Extents that were handed out are not used
for anything else until the client has said that it writes no more, or is dead: a load that is given up earlier names a
future for that (see errors.AbandonedLoad).
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, NamedTuple

from tiercache.buffers import part_digests
from tiercache.errors import AbandonedLoad, ProtocolError
from tiercache.model import part_count
from tiercache.threads import in_thread
from tiercache.wire import frames
from tiercache.wire.frames import Landed, Op

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tiercache import lease
    from tiercache.lease import Gap, PageRun
    from tiercache.wire.post import Post

log = logging.getLogger(__name__)

INLINE_BYTES_MAX = 512 << 10
"""More than this is hashed in a thread, so that the loop is never held for longer than some 0.1 ms."""
_GAVE_UP = "the process that loaded this for others gave up: "


class OwnFault(AbandonedLoad):
    """The client says itself that its load failed, and so knows why."""


class _End(NamedTuple):
    """Nothing more comes of this fill. `written`: by the client's own word, so that it writes no more."""

    why: str
    written: bool
    own: bool = False


class Fill:
    """One batch of gaps that a client fills."""

    def __init__(self, number: int, run: PageRun, gaps: Sequence[Gap]) -> None:
        self.number, self.gaps = number, gaps
        self.quiet: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the client writes no more."""
        self.size = sum(gap.target.length for gap in gaps)
        self.forsaken = False
        """Whether nobody waits for it any more, though the client may still write."""
        self._step = run.part_bytes
        self._left = [gap.parts for gap in gaps]
        self._digests = [bytearray(8 * part_count(gap.target.length, self._step)) for gap in gaps]
        self._said: list[Landed | _End] = []
        self._room = sum(gap.parts.bit_count() for gap in gaps)
        self._news = asyncio.Event()

    @property
    def whole(self) -> bool:
        """Whether everything has landed."""
        return not any(self._left)

    def say(self, landed: Sequence[Landed]) -> None:
        """The client says that these parts are there. Raises ProtocolError where there are no such gaps."""
        for item, parts, _ in landed:
            if item >= len(self.gaps) or not parts or parts & ~self.gaps[item].parts:
                raise ProtocolError(f"parts {parts:#x} of item {item} were not asked for")
            self._room -= parts.bit_count()
        if self._room < 0:
            raise ProtocolError("the same parts were filled again and again")
        self._said += landed
        self._news.set()  # also where nothing has landed: the loader lives

    def end(self, why: str, *, written: bool, own: bool = False) -> None:
        """Nothing more will be said; `written` if the client writes no more, either, `own` if it says so itself."""
        self._said.append(_End(why, written, own and self._room > 0))
        self._news.set()
        if written:
            self.stop()

    def stop(self) -> None:
        """The client writes no more. Idempotent."""
        if not self.quiet.done():
            self.quiet.set_result(None)

    async def take(self, landed: lease.Landed, patience_s: float, silent_s: float) -> None:
        """Takes what the client says until it has ended. Raises AbandonedLoad if something is missing then, or when
        nothing landed for `patience_s`, or nothing at all was said for `silent_s`."""
        loop = asyncio.get_running_loop()
        while True:
            until = loop.time() + patience_s
            while not self._said:
                self._news.clear()
                try:
                    async with asyncio.timeout_at(min(until, loop.time() + silent_s)):
                        await self._news.wait()
                except TimeoutError:
                    self.forsaken = True
                    raise AbandonedLoad(f"{_GAVE_UP}nothing landed in time", self.quiet) from None
            said = self._said.pop(0)
            if isinstance(said, _End):
                if self.whole and said.written:
                    return
                self.forsaken = True
                raise (OwnFault if said.own else AbandonedLoad)(_GAVE_UP + said.why, self.quiet)
            await self._check(said, landed)

    async def _check(self, said: Landed, landed: lease.Landed) -> None:
        """Hashes what a client says it has written; what differs is not taken."""
        item, parts, meant = said
        target, rows = self.gaps[item].target, self._digests[item]
        if parts.bit_count() * self._step <= INLINE_BYTES_MAX:
            found = part_digests(target, self._step, parts)
        else:
            found = await in_thread(part_digests, target, self._step, parts)
        for part in range(parts.bit_length()):
            if parts >> part & 1:
                at = slice(8 * part, 8 * part + 8)
                if found[at] == meant[at]:
                    rows[at] = found[at]
                    self._left[item] &= ~(1 << part)
                else:
                    log.warning("part %d of a page is not what its loader means to have written", part)
        if not self._left[item]:
            landed([item], [bytes(rows)])


class Loads:
    """The fills of one client."""

    def __init__(self, patience_s: float, silent_s: float) -> None:
        self._fills: dict[int, Fill] = {}
        self._last = 0
        self._patience_s, self._silent_s = patience_s, silent_s

    def __len__(self) -> int:
        return len(self._fills)

    @property
    def forsaken_bytes(self) -> int:
        """Bytes of extents that this client may write to though nobody waits for it."""
        return sum(fill.size for fill in self._fills.values() if fill.forsaken)

    async def fill(self, post: Post, number: int, run: PageRun, gaps: Sequence[Gap], landed: lease.Landed) -> None:
        """Has the asker of READ `number` on `post` fill gaps: a lease.Load."""
        for gap in gaps:
            if gap.location < 0 or gap.target.length != run.page_size(gap.ordinal):
                raise AbandonedLoad(f"page {gap.ordinal} is not of the shape that was asked for")
        if post.closed:
            raise AbandonedLoad("the process that asked for this has gone")
        self._last += 1
        fill = Fill(self._last, run, gaps)
        self._fills[fill.number] = fill
        fill.quiet.add_done_callback(lambda _: self._fills.pop(fill.number, None))
        asked = [frames.Gap(gap.ordinal, gap.parts, gap.location) for gap in gaps]
        post.push(Op.FILL, number, frames.pack_gaps(fill.number, asked))
        await fill.take(landed, self._patience_s, self._silent_s)

    def say(self, number: int, landed: Sequence[Landed]) -> None:
        """FILLED."""
        fill = self._fills.get(number)
        if fill is not None:
            fill.say(landed)

    def written(self, number: int) -> None:
        """UNFILLED."""
        fill = self._fills.get(number)
        if fill is not None:
            fill.end("its load failed, or ended early", written=True, own=True)

    def lose(self, why: str) -> None:
        """Nothing more will be said of these, though the client may go on writing."""
        for fill in list(self._fills.values()):
            fill.end(why, written=False)

    def stop(self, why: str) -> None:
        """The client writes no more: it is dead, or says so."""
        for fill in list(self._fills.values()):
            fill.end(why, written=True)
