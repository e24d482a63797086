"""Meeting: one peer, from the first connection to its end: who it is, which transport both ends take, what it has
pinned here and this cache there.

Both ends try the transports that both have, in the order of net.TRANSPORTS (same host, RDMA, UCX, sockets), until one
connects both ways.
"""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

from tiercache.errors import ProtocolError, TierCacheError, UnavailableError
from tiercache.peer.borrowing import Borrowed
from tiercache.peer.channel import HELLO_BYTES_MAX, read_frame, said
from tiercache.peer.frames import (
    ITEMS_MAX,
    NOT_THERE,
    Frame,
    Op,
    pack,
    pack_held,
    pack_memory,
    pack_number,
    pack_want,
    unpack_held,
    unpack_marks,
    unpack_memory,
    unpack_number,
    unpack_push,
    unpack_want,
)  # fmt: skip
from tiercache.peer.gate import Priority
from tiercache.peer.lending import Lending

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Sequence

    from tiercache.model import Name, Outcome
    from tiercache.peer.channel import Channel
    from tiercache.peer.exposing import Exposed, Landing
    from tiercache.peer.frames import Held
    from tiercache.peer.gate import Gate
    from tiercache.peer.lending import Lender, Loan, Quota, Share
    from tiercache.transport import Link, Move

log = logging.getLogger(__name__)

REGIONS_MAX = 4096
FREE_UNKNOWN = 0


class House(Protocol):
    """What all peers of this cache have in common; peers.py has it."""

    quota: Quota
    gate: Gate
    landing: Landing
    deadline_s: float

    @property
    def lender(self) -> Lender:
        """This cache."""
        ...

    @property
    def room_bytes(self) -> int:
        """What this cache takes without evicting anything."""
        ...

    def exposed(self, name: str, peer: Peer) -> Exposed:
        """This end's transport of a name towards a peer. Raises UnavailableError where it has none, or none that may be
        taken again."""
        ...

    def candidates(self, hello: dict[str, Any]) -> list[str]:
        """Transports that both ends have, the most wanted first."""
        ...

    def failed(self, peer: Peer) -> None:
        """Its link failed while it lives: after some more of that another transport is taken."""
        ...

    def heard(self, peer: Peer, marks: Sequence[int]) -> None:
        """It says that it has these."""
        ...

    async def offered(self, found: Borrowed, priority: Priority) -> int:
        """It offers these: how many are here now."""
        ...

    def count(self, peer: Peer, size: int, damaged: Sequence[Name]) -> None:
        """So much came from it, and these entries were damaged."""
        ...


class Peer:
    """See the module. On the cache's loop."""

    def __init__(self, house: House, channel: Channel, number: int, host: str, *, dialled: bool) -> None:
        """`number` is its place among all peers, from 0 on; `host` the address of this end towards it."""
        self.house, self.channel, self.number, self.host, self.dialled = house, channel, number, host, dialled
        self.landing = house.landing
        self.id = str(channel.hello["id"])
        self.free_bytes = FREE_UNKNOWN
        self.transport = ""
        self.received_bytes = 0
        self._regions: dict[int, int] = {}
        self._their_landing = -1
        self.link: Link
        self.lending: Lending

    @property
    def name(self) -> str:
        """Who it is, for messages."""
        return self.channel.name

    # -- choosing a transport ------------------------------------------------------------------------------------------

    async def settle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Both ends choose a transport and connect; before the channel runs. Raises UnavailableError where none
        connects."""
        for name in self.house.candidates(self.channel.hello):
            link, exposed, landing = await self._try(name)
            try:
                body = {"transport": name, "ok": link is not None, "landing": landing.hex()}
                writer.write(pack(Op.READY, 0, json.dumps(body).encode()))
                theirs = _ready(await read_frame(reader, 2 * self.house.deadline_s, HELLO_BYTES_MAX), name)
                if link is not None and exposed is not None and theirs is not None:
                    self._their_landing = link.attach(theirs)
                    self.link, self.transport, link = link, name, None
                    self.lending = Lending(self.house.lender, self.house.quota, exposed, self._introduce)
                    return
            finally:
                if link is not None:
                    await link.close()
        raise UnavailableError(f"no transport connects to {self.name}")

    async def _try(self, name: str) -> tuple[Link | None, Exposed | None, bytes]:
        """One transport: a link to the other end, and what that needs to write to the landing memory."""
        try:
            exposed = self.house.exposed(name, self)
            landing = await exposed.landing(self.landing)
            address = bytes.fromhex(self.channel.hello["transports"][name])
            return await exposed.transport.connect(address, self.house.deadline_s), exposed, landing
        except (TierCacheError, OSError, ValueError, TypeError) as fault:  # an address may be of any type
            log.debug("%s does not connect to %s: %s", name, self.name, fault)
            return None, None, b""

    # -- living --------------------------------------------------------------------------------------------------------

    async def live(self) -> None:
        """Serves the peer until it is gone, and then takes back what it had."""
        try:
            await self.channel.run(self._heard, self._late, self._answered, self._pulse)
        finally:
            try:
                await self.link.close()
            finally:
                self.lending.end()

    def _pulse(self) -> bytes:
        return pack_number(self.house.room_bytes)

    def _introduce(self, region: int, descriptor: bytes) -> None:
        self.channel.tell(Op.MEMORY, pack_memory(region, descriptor))

    def _heard(self, frame: Frame) -> None:
        if frame.op == Op.PULSE:
            self.free_bytes = unpack_number(frame.body)
        elif frame.op == Op.STORED:
            self.house.heard(self, unpack_marks(frame.body))
        elif frame.op == Op.DONE:
            self.lending.done(unpack_number(frame.body))
        elif frame.op == Op.MEMORY:
            self._learn(*unpack_memory(frame.body))
        else:
            raise ProtocolError(f"operation {frame.op} is not one of this version")

    def _late(self, frame: Frame) -> None:
        """Whoever asked is gone: nothing is to stay pinned for that."""
        if frame.op == Op.HELD:
            with suppress(ProtocolError):
                self.forgive(unpack_held(frame.body).pin)

    async def _answered(self, frame: Frame) -> tuple[Op, bytes]:
        if frame.op == Op.WANT:
            names, parts, _ = unpack_want(frame.body)
            return Op.HELD, pack_held(await self.lending.lend(names, parts, self.house.deadline_s / 2))
        if frame.op == Op.PUSH:
            pin, _, offset, pieces = unpack_push(frame.body)
            deadline_s = self.house.deadline_s
            try:
                done = await self.lending.push(pin, self.link, self._their_landing, offset, pieces, deadline_s)
            except UnavailableError as fault:
                self._fail(fault)
                raise
            return Op.PUSHED, pack_number(-done)
        held = unpack_held(frame.body)
        priority = Priority.PUBLISHED if held.urgent else Priority.SPILLED
        found = self.borrowed(held, priority)
        return Op.TAKEN, pack_number(await self.house.offered(found, priority))

    # -- asking --------------------------------------------------------------------------------------------------------

    def borrowed(self, held: Held, priority: Priority) -> Borrowed:
        """What it has pinned for this cache."""
        return Borrowed(self, held, self.house.gate, priority, self.house.deadline_s)

    def _learn(self, region: int, descriptor: bytes) -> None:
        if region in self._regions or len(self._regions) >= REGIONS_MAX:
            raise ProtocolError(f"memory {region} is told twice, or there are more than {REGIONS_MAX}")
        self._regions[region] = self.link.attach(descriptor)

    def region(self, number: int) -> int:
        """The link's number of a memory that it introduced."""
        if number not in self._regions:
            raise ProtocolError(f"{self.name} did not say what its memory {number} is")
        return self._regions[number]

    async def read(self, moves: Sequence[Move], deadline_s: float) -> list[Outcome]:
        """As Link.read; a link that fails ends all with this peer, which is then met anew."""
        try:
            return await self.link.read(moves, deadline_s)
        except UnavailableError as fault:
            self._fail(fault)
            raise

    def _fail(self, fault: UnavailableError) -> None:
        if not self.channel.closed.is_set():
            self.house.failed(self)
            self.channel.close(f"its link failed: {fault}")

    async def want(self, names: Sequence[Name], parts: Sequence[int], priority: Priority) -> Borrowed:
        """Has it pin what it has of these."""
        assert len(names) <= ITEMS_MAX
        frame = await self.channel.ask(Op.WANT, pack_want(names, parts, priority))
        if frame.op != Op.HELD:
            raise ProtocolError(f"operation {frame.op} is no answer to a question for entries")
        held = unpack_held(frame.body)
        if [one.payload.name for one in held.items if one.payload is not None] != [
            name for name, one in zip(names, held.items, strict=False) if one.payload is not None
        ] or len(held.items) != len(names):
            raise ProtocolError("it answers what nobody asked")
        found = self.borrowed(held, priority)
        found.lacking = [name for name, one in zip(names, held.items, strict=True) if one == NOT_THERE]
        return found

    async def offer(self, loan: Loan, share: Share, deadline_s: float, *, urgent: bool) -> int:
        """Offers what was pinned for it: how many of these it has now. The loan is given back in any case."""
        held = (await self.lending.pin(loan, share))._replace(urgent=urgent)
        try:
            frame = await self.channel.ask(Op.OFFER, pack_held(held), deadline_s)
            return min(unpack_number(frame.body), len(held.items))
        finally:
            self.lending.done(held.pin)

    def forgive(self, pin: int) -> None:
        """It need not hold this any longer."""
        with suppress(UnavailableError):
            self.channel.tell(Op.DONE, pack_number(pin))

    def count(self, size: int, damaged: Sequence[Name]) -> None:
        """So much came from it, and these entries were damaged."""
        self.received_bytes += size
        self.house.count(self, size, damaged)


def _ready(frame: Frame, name: str) -> bytes | None:
    """Where the other end lands, if it connected by the same transport."""
    found = said(frame, Op.READY)
    if found.get("transport") != name or not isinstance(found.get("landing"), str):
        raise ProtocolError("it tries other transports than this end: use one release, and one peer_transport, for all")
    if found.get("ok") is not True:
        return None
    try:
        return bytes.fromhex(found["landing"])
    except ValueError as error:
        raise ProtocolError(f"no descriptor: {error}") from None
