"""An owner's notes without sockets: messages of any number of clients, in order, over queues of the running loop."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from tiercache.errors import TierCacheError, UnavailableError
from tiercache.wire.frames import Op, unpack_settle
from tiercache.wire.notes import Notes
from tiercache.wire.notes_client import VALUE, YOURS, SharedNotes, unpack_prefixes

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any

    from tiercache.clock import Clock


class NotesTable:
    """Notes of one directory; `client()` makes what one process of it has. Close it on its loop."""

    def __init__(self, clock: Clock, entries_max: int = 1000, bytes_max: int = 1 << 20) -> None:
        self.notes = Notes(clock, entries_max, bytes_max)
        self._links: list[_Link] = []

    def client(self) -> SharedNotes:
        """The notes as another process has them."""
        link = _Link(self)
        self._links.append(link)
        return link.client

    def die(self, client: SharedNotes) -> None:
        """The process of that client ends at once."""
        link = next(link for link in self._links if link.client is client)
        self._links.remove(link)
        link.end()
        self.notes.leave(link)

    async def close(self) -> None:
        """Ends everything that is under way."""
        for link in list(self._links):
            await link.client.close()
            self.die(link.client)
        await asyncio.sleep(0)

    def forget(self, prefixes: list[bytes], by: _Link) -> None:
        """What a door does with FORGET."""
        self.notes.forget(prefixes)
        for link in self._links:
            if link is not by:
                link.say(lambda link=link: link.client.forgotten(prefixes))  # type: ignore[misc]


class _Link:
    """One client's connection: what is said in a direction arrives in that order, later."""

    def __init__(self, table: NotesTable) -> None:
        self._table, self._ended = table, False
        self._open: set[asyncio.Future[memoryview]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._there: asyncio.Queue[Callable[[], None]] = asyncio.Queue()
        self._back: asyncio.Queue[Callable[[], None]] = asyncio.Queue()
        self.client = SharedNotes(self._ask, self._tell, asyncio.get_running_loop())
        for queue in (self._there, self._back):
            self._start(self._carry(queue))

    def say(self, what: Callable[[], None]) -> None:
        """Does something at the client's end, after everything that was said before."""
        self._back.put_nowait(what)

    def end(self) -> None:
        """Nothing comes or goes any more."""
        self._ended = True
        for task in self._tasks:
            task.cancel()
        for future in self._open:
            if not future.done():
                future.set_exception(UnavailableError("the connection has ended"))

    async def _carry(self, queue: asyncio.Queue[Callable[[], None]]) -> None:
        while True:
            (await queue.get())()

    async def _ask(self, op: int, body: bytes) -> memoryview:
        if self._ended:
            raise UnavailableError("the connection has ended")
        future: asyncio.Future[memoryview] = asyncio.get_running_loop().create_future()
        self._open.add(future)
        self._there.put_nowait(lambda: self._start(self._answer(op, body, future)))
        try:
            return await future
        finally:
            self._open.discard(future)

    def _tell(self, op: int, body: bytes) -> None:
        name, value, ttl_s = unpack_settle(memoryview(body))
        self._there.put_nowait(lambda: self._table.notes.settle(name, self, value, ttl_s))

    async def _answer(self, op: int, body: bytes, future: asyncio.Future[memoryview]) -> None:
        try:
            if op == Op.FORGET:
                self._table.forget(unpack_prefixes(memoryview(body)), self)
                answer = b""
            else:
                notes = self._table.notes
                found = notes.known(body) if op == Op.KNOWN else await notes.claim(body, self)
                answer = bytes([YOURS]) if found is None else bytes([VALUE]) + found
        except TierCacheError as fault:
            failed = fault
            self.say(lambda: None if future.done() else future.set_exception(failed))
        else:
            self.say(lambda: None if future.done() else future.set_result(memoryview(answer)))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
