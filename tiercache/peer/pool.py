"""Pool: which other caches are connected. Whoever is listed is dialled, and dialled again where it is gone; whoever
knows the secret may call. Two caches that list each other end up with one channel."""

from __future__ import annotations

import asyncio
import logging
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from tiercache.errors import TierCacheError, UnavailableError
from tiercache.peer.channel import shake
from tiercache.peer.exposing import Exposed
from tiercache.peer.meeting import Peer
from tiercache.peer.members import PEERS_MAX, Member

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence
    from random import Random

    from tiercache.clock import Clock
    from tiercache.peer.meeting import House
    from tiercache.peer.members import Membership
    from tiercache.transport import Transport

log = logging.getLogger(__name__)

AGAIN_S, AGAIN_S_MAX = 0.2, 5.0
"""A peer that is gone is dialled again after so long, and less and less often."""
FAILURES_MAX, FAILURES_S = 2, 600.0
"""After so many links to a peer that failed in so short a time, their transport is not taken towards it, unless it is
the last."""
STRANGERS_MAX = 64
"""Callers who have not proven yet that they are peers; for one more the oldest is cut off."""


class Pool:
    """See the module. On the cache's loop."""

    def __init__(
        self,
        membership: Membership,
        listen: Member | None,
        *,
        secret: bytes,
        open_transport: Callable[[str, str], Transport],
        names: Sequence[str],
        clock: Clock,
        random: Random,
        deadline_s: float,
    ) -> None:
        """`open_transport(name, host)` opens one of the transports `names` (the most wanted first) at an address of
        this host."""
        self._membership, self._listen, self._secret = membership, listen, secret
        self._open_transport, self._names = open_transport, tuple(names)
        self._clock, self._random, self.deadline_s = clock, random, deadline_s
        self.id = random.randbytes(16).hex()
        self.peers: dict[int, Peer] = {}
        """Who is connected, by number."""
        self._meeting: dict[int, Peer] = {}
        """And who is about to be: nothing may be said to them before both ends chose a transport."""
        self._exposed: dict[tuple[str, str], Exposed] = {}
        self._failures: dict[tuple[str, str], list[float]] = {}
        self._house: House
        self._know: Callable[[Peer], Coroutine[Any, Any, None]]
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._strangers: dict[asyncio.StreamWriter, None] = {}
        self._dialling: set[Member] = set()
        self._closing = False
        self.port = 0
        """Where it listens."""

    async def close(self) -> None:
        """Leaves all peers. Idempotent."""
        self._closing = True
        if self._server is not None:
            self._server.close()
        for writer in self._strangers:
            writer.transport.abort()  # a task that is cancelled before it began does not do that
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=self.deadline_s)
        for exposed in self._exposed.values():
            with suppress(TierCacheError, OSError):
                await exposed.transport.close()
        self._exposed.clear()

    def exposed(self, name: str, peer: Peer) -> Exposed:
        """See House."""
        last = name == self.candidates(peer.channel.hello)[-1]
        if self._recent(peer.id, name) >= FAILURES_MAX and not last:
            raise UnavailableError(f"{name} to {peer.name} failed {FAILURES_MAX} times")
        exposed = self._exposed.get((name, peer.host))
        if exposed is None:
            raise UnavailableError(f"{name} does not work here")
        return exposed

    def failed(self, peer: Peer) -> None:
        """See House."""
        self._failures.setdefault((peer.id, peer.transport), []).append(self._clock.monotonic())
        for who, name in list(self._failures):  # peers that are long gone, too
            self._recent(who, name)

    def _recent(self, who: str, name: str) -> int:
        """How many links by a transport failed lately; those before are forgotten."""
        since_s = self._clock.monotonic() - FAILURES_S
        recent = [at_s for at_s in self._failures.pop((who, name), ()) if at_s > since_s]
        if recent:
            self._failures[who, name] = recent
        return len(recent)

    def candidates(self, hello: dict[str, Any]) -> list[str]:
        """See House."""
        theirs = hello.get("transports")
        if not isinstance(theirs, dict):
            return []
        near = bool(machine()) and hello.get("machine") == machine()
        return [name for name in self._names if name in theirs and (name != "shm" or near)]

    async def serve(self, house: House, know: Callable[[Peer], Coroutine[Any, Any, None]]) -> None:
        """Listens, and looks for members; `know` is run for each peer as long as it is connected."""
        self._house, self._know = house, know
        self._membership.watch(self._look)
        if self._listen is not None:
            try:
                self._server = await asyncio.start_server(self._called, self._listen.host, self._listen.port)
                if self._closing:
                    self._server.close()
                    return
                self.port = self._server.sockets[0].getsockname()[1]
            except (OSError, UnicodeError) as fault:  # also for a host that cannot be one
                log.error("peers cannot find this cache at %s: %s", self._listen, fault)
        self._look()

    def _look(self) -> None:
        """Dials members that are new."""
        for member in self._membership.members():
            if member not in self._dialling:
                self._dialling.add(member)
                self._start(self._keep(member), f"peer {member}")

    def _start(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _keep(self, member: Member) -> None:
        """Dials one member, again and again."""
        pause_s, told = AGAIN_S, ""
        while member in self._membership.members() and not self._closing:
            began_s, met = self._clock.monotonic(), False
            try:
                if not self._met(member):
                    async with asyncio.timeout(self.deadline_s):
                        reader, writer = await asyncio.open_connection(member.host, member.port)
                    met = await self._meet(reader, writer, dialled=True)
                pause_s = pause_s if met else AGAIN_S_MAX
            except (TierCacheError, OSError, UnicodeError) as fault:  # also for a host that cannot be one
                if str(fault) != told:  # a wrong name or secret is to be seen, and not each time
                    log.warning("peer %s cannot be met, and is tried again: %s", member, fault)
                told = str(fault)
            told = "" if met else told
            lived = self._clock.monotonic() - began_s > 2 * AGAIN_S_MAX
            pause_s = AGAIN_S if lived else min(2 * pause_s, AGAIN_S_MAX)
            await asyncio.sleep(pause_s * (0.5 + self._random.random()))
        self._dialling.discard(member)

    def _met(self, member: Member) -> bool:
        """Whether who listens there is connected, or about to be: that one has called."""
        return any(one.name == str(member) and not one.channel.closed.is_set() for one in self._meeting.values())

    def _called(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Somebody called."""
        if self._closing:
            writer.transport.abort()
            return
        while len(self._strangers) >= STRANGERS_MAX:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            oldest.transport.abort()
        self._strangers[writer] = None
        self._start(self._let_in(reader, writer), "a caller")

    async def _let_in(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._meet(reader, writer, dialled=False)
        except (TierCacheError, OSError, EOFError) as fault:
            log.debug("a caller was not let in: %s", fault)

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, dialled: bool) -> bool:
        """One peer, from its connection to its end. False where there is no use in dialling it: it is this cache
        itself, or was there already."""
        try:
            name = writer.get_extra_info("sockname")
            if name is None:
                raise UnavailableError("it was gone at once")
            host = name[0]
            try:
                async with asyncio.timeout(self.deadline_s):
                    channel = await shake(
                        reader, writer, dialled=dialled, about=self._about(host), secret=self._secret,
                        random=self._random, deadline_s=self.deadline_s, tell=lambda: self._transports(host),
                    )  # fmt: skip
            except TimeoutError:
                raise UnavailableError(f"it did not say who it is in {self.deadline_s:g} s") from None
            finally:
                self._strangers.pop(writer, None)
            if channel.hello["id"] == self.id or not self._wanted(channel.hello["id"], dialled):
                return False
            number = next((one for one in range(PEERS_MAX) if one not in self._meeting), None)
            if number is None:
                raise UnavailableError(f"there are {PEERS_MAX} peers already")
            peer = Peer(self._house, channel, number, host, dialled=dialled)
            self._meeting[number] = peer
            try:
                await peer.settle(reader, writer)
                self.peers[number] = peer
                log.info("peer %s: connected by %s", peer.name, peer.transport)
                await self._know(peer)
                log.info("peer %s is gone", peer.name)
            finally:
                del self._meeting[number]
                self.peers.pop(number, None)
            return True
        except asyncio.IncompleteReadError:
            raise UnavailableError("it closed the connection") from None
        finally:
            writer.transport.abort()

    def _wanted(self, who: str, dialled: bool) -> bool:
        """Whether a new channel to this peer is the one to keep: not where one works; of two that are about to be made,
        the one that the smaller id dialled."""
        others = [peer for peer in self._meeting.values() if peer.id == who and not peer.channel.closed.is_set()]
        if any(peer.number in self.peers or dialled == peer.dialled for peer in others):
            return False
        if others and dialled != (self.id < who):
            return False
        for peer in others:
            peer.channel.close("there is a newer channel")
        return True

    def _about(self, host: str) -> dict[str, Any]:
        where = str(self._listen) if self._listen is not None else host
        return {"id": self.id, "name": where, "machine": machine()}

    def _transports(self, host: str) -> dict[str, Any]:
        """Addresses of this end's transports at an address of this host, which are opened once."""
        for name in self._names:
            if (name, host) not in self._exposed:
                try:
                    self._exposed[name, host] = Exposed(self._open_transport(name, host))
                except (TierCacheError, OSError) as fault:
                    log.info("transport %s cannot be used: %s", name, fault)
        found = {name: exposed.transport.address.hex() for (name, at), exposed in self._exposed.items() if at == host}
        if not found:
            raise UnavailableError("no transport works here")
        return {"transports": found}


def machine() -> str:
    """What tells this machine and user from others, as far as shared memory goes."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()}/{os.getuid()}"
    except OSError:
        return ""
