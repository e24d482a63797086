"""Worker: the one thread that moves bytes through NIXL. NIXL tells nobody that a transfer is over, so this thread asks,
and sleeps in between: shortly while something moves, longer while only notes may come, else until it is woken."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

from tiercache.errors import UnavailableError
from tiercache.transport import Memory

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Sequence

    from tiercache.buffers import Buffer
    from tiercache.net.nixl.agent import Agent, Row

SHORT_S, LONG_S, NOTES_S = 20e-6, 1e-3, 5e-3
"""Between two looks: at transfers that have just begun, that take long; at notes while nothing moves."""
FLYING_MAX = 4
"""Transfers that one batch has under way."""


class Exposed(NamedTuple):
    """Memory that this process exposes; it is registered for whoever moves from and to it here, too."""

    memory: Buffer
    kind: Memory


class Transfer(NamedTuple):
    """Rows that one call of NIXL moves."""

    ours: tuple[Memory, Sequence[Row]]
    theirs: tuple[Memory, Sequence[Row]]
    note: bytes = b""


class Key(NamedTuple):
    """What the other end described, under the number that its transfers name."""

    serial: int
    key: bytes


class Channel:
    """The agent of one link; only the thread touches it. Without one, the link has ended."""

    def __init__(self, agent: Agent, peer: str, loop: asyncio.AbstractEventLoop) -> None:
        self.agent: Agent | None = agent
        self.peer, self.dead = peer, ""
        self.over: asyncio.Future[None] = loop.create_future()
        """Done once nothing more is read or written for it."""
        self.batches: list[Batch] = []
        self.loaded: set[int] = set()
        """Descriptors that the agent has taken."""
        self.registered: dict[int, tuple[Any, Exposed]] = {}


class Batch:
    """Transfers that end together. `cut`: no more of them are begun."""

    def __init__(
        self,
        put: bool,
        transfers: Sequence[Transfer],
        keys: Sequence[Key],
        *,
        exposed: dict[int, Exposed],
        spans: Sequence[Row],
        future: asyncio.Future[None],
        keep: object,
    ) -> None:
        """`keys`: what they read or write there. `exposed`, `spans`: what they write or read here, as far as it is
        exposed, and else. `keep`: what holds that memory."""
        self.put, self.transfers, self.keys, self.exposed, self.spans = put, transfers, keys, exposed, spans
        self.future, self.keep = future, keep
        self.cut = self.begun = False
        self.at = 0
        self.flying: list[int] = []
        self.listed: Any = None

    def step(self, channel: Channel, agent: Agent) -> tuple[bool, bool]:
        """Begins and ends transfers: whether anything happened, whether the batch is over. Raises UnavailableError."""
        if not self.begun:
            self._begin(channel, agent)
        moved = False
        for number in list(self.flying):
            if agent.over(number):
                self.flying.remove(number)
                agent.release(number)
                moved = True
        while not self.cut and len(self.flying) < FLYING_MAX and self.at < len(self.transfers):
            each = self.transfers[self.at]
            self.flying.append(agent.begin(self.put, each.ours, each.theirs, channel.peer, each.note))
            self.at += 1
            moved = True
        over = not self.flying and (self.cut or self.at == len(self.transfers))
        if over and self.listed is not None:
            agent.deregister(self.listed)
        return moved, over

    def _begin(self, channel: Channel, agent: Agent) -> None:
        self.begun = True
        for serial, key in self.keys:
            if serial not in channel.loaded:
                agent.load(key)
                channel.loaded.add(serial)
        for serial, each in self.exposed.items():
            if serial not in channel.registered:
                row = (each.memory.address, each.memory.length, serial)
                channel.registered[serial] = agent.register([row], each.kind), each
        if self.spans:
            self.listed = agent.register(self.spans, Memory.HOST)


class Worker:
    """The thread, the agent that peers reach, and what the thread is to do."""

    def __init__(self, served: Agent, loop: asyncio.AbstractEventLoop, heard: Callable[[bytes], None]) -> None:
        """`heard`: hears the notes, on the loop."""
        self._served: Agent | None = served
        self._loop, self._heard = loop, heard
        self._calls: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._channels: list[Channel] = []
        self._settled: list[tuple[asyncio.Future[None], str]] = []
        self._notes: list[bytes] = []
        self._stopping = False
        self.exposed: dict[int, Exposed] = {}
        self._thread = threading.Thread(target=self._run, name="tiercache-nixl", daemon=True)
        self._thread.start()

    # On the loop.

    def submit(self, call: Callable[[], None]) -> None:
        """Has the thread do this soon."""
        self._calls.append(call)
        self._wake.set()

    def open(self, channel: Channel) -> None:
        """Takes a channel; notes are looked for from now on."""
        self.submit(lambda: self._channels.append(channel))

    def begin(self, channel: Channel, batch: Batch) -> None:
        """Begins a batch."""

        def begin() -> None:
            if channel.agent is None:
                self._settled.append((batch.future, channel.dead))
            else:
                channel.batches.append(batch)

        self.submit(begin)

    def end(self, channel: Channel, why: str) -> None:
        """Ends a channel, and what is under way there."""
        self.submit(lambda: self._end(channel, why))

    def stop(self) -> None:
        """Ends every channel, the agent that peers reach, and the thread, and waits for that."""

        def stopping() -> None:
            self._stopping = True

        self.submit(stopping)
        self._thread.join()

    # On the thread.

    def _run(self) -> None:
        pause = SHORT_S
        while not self._stopping:
            self._wake.clear()
            while self._calls:
                self._calls.popleft()()
            moved = self._round()
            self._tell()
            if moved or self._calls or self._stopping:
                pause = SHORT_S
            elif any(channel.batches for channel in self._channels):
                self._wake.wait(pause)
                pause = min(LONG_S, pause * 1.5)
            else:
                self._wake.wait(NOTES_S if self._channels else None)
                pause = SHORT_S
        for channel in list(self._channels):
            self._end(channel, "the transport was closed")
        self._served = None
        while self._calls:
            self._calls.popleft()()
        self._tell()

    def _round(self) -> bool:
        """Looks at everything once; whether anything happened."""
        happened = False
        for channel in list(self._channels):
            for batch in list(channel.batches):
                moved, fault = self._step(channel, batch)
                happened |= moved
                if fault:
                    self._end(channel, fault)
                    break
            self._drop(channel)
        if self._channels and self._served is not None:
            try:
                for notes in self._served.notes().values():
                    self._notes += notes
            except UnavailableError:  # then there are none
                pass
        return happened

    def _step(self, channel: Channel, batch: Batch) -> tuple[bool, str]:
        """Whether anything happened, and what failed. No exception leaves here: it would hold the agent."""
        assert channel.agent is not None
        try:
            moved, over = batch.step(channel, channel.agent)
        except UnavailableError as error:
            return True, str(error)
        if over:
            channel.batches.remove(batch)
            self._settled.append((batch.future, ""))
        return moved or over, ""

    def _drop(self, channel: Channel) -> None:
        """Lets memory go that is exposed no more, once nothing moves there."""
        stale = [] if channel.batches or channel.agent is None else channel.registered.keys() - self.exposed.keys()
        for serial in stale:
            listed, _ = channel.registered.pop(serial)
            try:
                channel.agent.deregister(listed)  # type: ignore[union-attr]  # there is none without an agent
            except UnavailableError:  # it goes with the agent
                continue

    def _end(self, channel: Channel, why: str) -> None:
        if channel.agent is None:
            return
        channel.dead = why
        for batch in channel.batches:
            for number in batch.flying:
                try:
                    channel.agent.release(number)
                except UnavailableError:  # it goes with the agent
                    continue
        channel.agent = None  # the last reference: it ends here
        self._settled += [(batch.future, why) for batch in channel.batches]
        self._settled.append((channel.over, ""))
        channel.batches.clear()
        channel.registered.clear()
        if channel in self._channels:
            self._channels.remove(channel)

    def _tell(self) -> None:
        if not self._settled and not self._notes:
            return
        settled, self._settled = self._settled, []
        notes, self._notes = self._notes, []
        try:
            self._loop.call_soon_threadsafe(self._told, settled, notes)
        except RuntimeError:  # the loop is closed: nobody waits any more
            return

    def _told(self, settled: list[tuple[asyncio.Future[None], str]], notes: list[bytes]) -> None:
        for note in notes:
            self._heard(note)
        for future, fault in settled:
            if future.done():
                continue
            if fault:
                future.set_exception(UnavailableError(fault))
                future.exception()  # nobody may wait for it
            else:
                future.set_result(None)
