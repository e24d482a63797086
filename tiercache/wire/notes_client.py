"""SharedNotes: a client's side of its owner's notes (see notes.py), as tiercache.core.Notes.

The owner lets one client claim a name once at a time; within this process those who want the same name take turns.
"""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING

from tiercache.errors import ProtocolError, TierCacheError, UnavailableError
from tiercache.wire.frames import Op, pack_json, pack_settle, unpack_json

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    Ask = Callable[[int, bytes], Awaitable[memoryview]]
    Tell = Callable[[int, bytes], None]
    Watcher = Callable[[Sequence[bytes]], None]

VALUE, YOURS = 0, 1
"""First byte of an answer to CLAIM: the value follows, or this client finds out."""


class _Turn:
    """A name that this process asks for or finds out. `lost`: nobody waits for the owner's answer any more."""

    __slots__ = ("ended", "lost")

    def __init__(self, ended: asyncio.Future[None]) -> None:
        self.ended = ended
        self.lost = False


class SharedNotes:
    """See the module and tiercache.core.Notes. Made with what asks the owner and tells it something, on `loop`.

    Whoever made it calls `forgotten` for every FORGET that the owner sends, in the order of its messages and before
    answers that came later, and `lost` whenever the owner is lost: a new one knows nothing, and cannot tell what was
    forgotten in between.
    """

    def __init__(self, ask: Ask, tell: Tell, loop: asyncio.AbstractEventLoop) -> None:
        self._ask, self._tell, self._loop = ask, tell, loop
        self._turns: dict[bytes, _Turn] = {}
        self._asking: set[asyncio.Task[memoryview]] = set()
        self._lock = threading.Lock()
        self._untold: set[Future[None]] = set()
        self._watchers: list[Watcher] = []

    async def claim(self, name: bytes) -> bytes | None:
        """See Notes."""
        await self._all_told()
        while (turn := self._turns.get(name)) is not None:
            if turn.lost:
                raise UnavailableError("an earlier question for the same note is not answered yet")
            await asyncio.shield(turn.ended)
        turn = self._turns[name] = _Turn(self._loop.create_future())
        task = self._loop.create_task(self._answer(name))
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)
        try:
            answer = await asyncio.shield(task)
        except asyncio.CancelledError:
            turn.lost = True
            self._end_waiting(turn)
            task.add_done_callback(lambda done: self._unwanted(name, done))
            raise
        except BaseException:
            self._end(name)
            raise
        if answer[0] == VALUE:
            self._end(name)
            return bytes(answer[1:])
        return None

    async def known(self, name: bytes) -> bytes | None:
        """See Notes."""
        await self._all_told()
        answer = await self._answer(name, Op.KNOWN)
        return bytes(answer[1:]) if answer[0] == VALUE else None

    def settle(self, name: bytes, value: bytes, ttl_s: float) -> None:
        """See Notes."""
        if name in self._turns:
            self._settle(name, value, ttl_s)
            self._end(name)

    def forget(self, prefixes: Sequence[bytes]) -> Future[None]:
        """See Notes."""
        told: Future[None] = Future()
        told.set_running_or_notify_cancel()  # who waits for it may give up, and it still ends
        with self._lock:
            self._untold.add(told)
        told.add_done_callback(self._was_told)
        try:
            self._loop.call_soon_threadsafe(self._begin_forgetting, list(prefixes), told)
        except RuntimeError:  # the loop is closed: the process ends, and its connections with it
            told.set_result(None)
        self.forgotten(prefixes)  # after it is known as untold: whoever looks from now on waits for that
        return told

    def watch(self, callback: Watcher) -> None:
        """See Notes."""
        with self._lock:
            self._watchers = [*self._watchers, callback]

    def unwatch(self, callback: Watcher) -> None:
        """See Notes."""
        with self._lock:
            self._watchers = [each for each in self._watchers if each != callback]

    def forgotten(self, prefixes: Sequence[bytes]) -> None:
        """Some process forgot these."""
        for watcher in self._watchers:
            watcher(prefixes)

    def push(self, body: memoryview) -> None:
        """A FORGET from the owner."""
        self.forgotten(unpack_prefixes(body))

    def lost(self) -> None:
        """The owner has gone, and its notes with it."""
        self.forgotten([b""])

    async def close(self) -> None:
        """Ends questions under way."""
        tasks = list(self._asking)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _all_told(self) -> None:
        """What was forgotten here must not come back from where that is not known yet."""
        with self._lock:
            untold = list(self._untold)
        for told in untold:
            await asyncio.shield(asyncio.wrap_future(told))

    async def _answer(self, name: bytes, op: int = Op.CLAIM) -> memoryview:
        answer = await self._ask(op, name)
        if not len(answer) or answer[0] not in (VALUE, YOURS):
            raise ProtocolError("an answer about a note that says neither what is known nor who finds out")
        return answer

    def _unwanted(self, name: bytes, done: asyncio.Task[memoryview]) -> None:
        """The answer has come when nobody wanted it any more."""
        if not done.cancelled() and done.exception() is None and done.result()[0] == YOURS:
            self._settle(name, b"", 0.0)
        self._end(name)

    def _settle(self, name: bytes, value: bytes, ttl_s: float) -> None:
        try:
            self._tell(Op.SETTLE, pack_settle(name, value, ttl_s))
        except TierCacheError:
            pass  # an owner that is lost has no claims either

    def _end(self, name: bytes) -> None:
        self._end_waiting(self._turns.pop(name))

    @staticmethod
    def _end_waiting(turn: _Turn) -> None:
        if not turn.ended.done():
            turn.ended.set_result(None)

    def _begin_forgetting(self, prefixes: list[bytes], told: Future[None]) -> None:
        task = self._loop.create_task(self._forget(prefixes))
        self._asking.add(task)

        def end(done: asyncio.Task[memoryview]) -> None:
            self._asking.discard(done)
            told.set_result(None)

        task.add_done_callback(end)

    async def _forget(self, prefixes: list[bytes]) -> memoryview:
        try:
            return await self._ask(Op.FORGET, pack_prefixes(prefixes))
        except TierCacheError:
            # An owner that has died has no notes any more, and who loses it forgets by itself what it knew.
            return memoryview(b"")

    def _was_told(self, told: Future[None]) -> None:
        with self._lock:
            self._untold.discard(told)


def pack_prefixes(prefixes: Sequence[bytes]) -> bytes:
    """Body of FORGET."""
    return pack_json([prefix.hex() for prefix in prefixes])


def unpack_prefixes(body: memoryview) -> list[bytes]:
    """Undoes pack_prefixes."""
    value = unpack_json(body)
    try:
        return [bytes.fromhex(prefix) for prefix in value]
    except (TypeError, ValueError):
        raise ProtocolError("not a list of prefixes of notes") from None
