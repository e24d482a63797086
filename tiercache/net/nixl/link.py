"""NixlLink: one peer over NIXL."""

from __future__ import annotations

import asyncio
from itertools import count
from typing import TYPE_CHECKING

from tiercache.buffers import Buffer
from tiercache.errors import AbandonedLoad, ConfigError, ProtocolError, UnavailableError
from tiercache.model import Outcome
from tiercache.net.nixl import words
from tiercache.net.nixl.worker import Batch, Key, Transfer
from tiercache.transport import MOVE_BYTES_MAX, MOVES_MAX, NOTE_BYTES_MAX, Memory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tiercache.net.nixl.agent import Row
    from tiercache.net.nixl.transport import NixlTransport
    from tiercache.net.nixl.worker import Channel, Exposed, Worker
    from tiercache.transport import Move

ENDING_S = 5.0
"""A call that passed its deadline waits so long for its agent to end."""
TRANSFER_BYTES_MAX, TRANSFER_ROWS_MAX = 8 << 20, 1024
"""Of one call of NIXL: it may copy all of it before it returns, and a batch is stopped between two."""
NEAR_BYTES = 4096
"""Pieces that lie so close together are registered as one."""
_FIRST_OWN = 1 << 32
"""Numbers from here on are of memory that is registered for one batch; those below are of what is exposed."""


class NixlLink:
    """Reads and writes what the other end described. Nobody looks there: bounds are checked here."""

    def __init__(
        self, transport: NixlTransport, worker: Worker, channel: Channel, peer: words.Address, negotiated: str
    ) -> None:
        self._transport, self._worker, self._channel, self._peer = transport, worker, channel, peer
        self._regions = [words.Descriptor(peer.token, 0, peer.beacon, words.TOKEN_BYTES, False, Memory.HOST, b"")]
        self._numbers = count(_FIRST_OWN)
        self._negotiated, self._dead = negotiated, ""

    @property
    def negotiated(self) -> str:
        """See the port. NIXL does not say it; but there are only two ways, and it took the one that works."""
        return self._negotiated

    @property
    def pushes(self) -> bool:
        """See the port."""
        return False

    def attach(self, descriptor: bytes) -> int:
        """See the port."""
        found = words.unpack_descriptor(descriptor)
        if found.token != self._peer.token:
            raise ProtocolError("a NIXL descriptor of another transport than the one at the other end")
        self._regions.append(found._replace(key=words.described(found) if found.length else b""))
        return len(self._regions) - 1

    async def meet(self, deadline_s: float) -> None:
        """Reads the other end's token, so that somebody is there and it is the right one."""
        token = bytearray(words.TOKEN_BYTES)
        try:
            await self._move([(0, 0, [Buffer.of(token, writable=True)])], deadline_s, put=False)
        except UnavailableError as error:
            raise UnavailableError(f"{error} (NIXL reaches over RDMA, or on one machine)") from error
        if token != self._peer.token:
            raise UnavailableError("NIXL: somebody else than the peer is there")

    async def read(self, moves: Sequence[Move], deadline_s: float) -> list[Outcome]:
        """See the port."""
        return await self._moves(moves, deadline_s, put=False)

    async def write(self, moves: Sequence[Move], deadline_s: float) -> list[Outcome]:
        """See the port."""
        return await self._moves(moves, deadline_s, put=True)

    async def notify(self, note: bytes, deadline_s: float) -> None:
        """See the port. It follows a read of the other end's token: so it is known when it is on its way."""
        if len(note) > NOTE_BYTES_MAX:
            raise ConfigError(f"a note of {len(note)} bytes; at most {NOTE_BYTES_MAX}")
        piece = Buffer.of(bytearray(words.TOKEN_BYTES), writable=True)
        await self._move([(0, 0, [piece])], deadline_s, put=False, note=self._transport.token + note)

    async def close(self) -> None:
        """See the port."""
        self._dead = self._dead or "it was closed"
        self._transport.left(self, self._peer.token)
        self._worker.end(self._channel, self._dead)
        await asyncio.wait([self._channel.over], timeout=ENDING_S)

    async def _moves(self, moves: Sequence[Move], deadline_s: float, *, put: bool) -> list[Outcome]:
        self._check()
        if len(moves) > MOVES_MAX:
            raise ConfigError(f"{len(moves)} moves in one batch; at most {MOVES_MAX}")
        outcomes = [Outcome.HIT] * len(moves)
        inside: list[tuple[int, int, Sequence[Buffer]]] = []
        for at, move in enumerate(moves):
            if not 0 <= move.region < len(self._regions):
                raise ConfigError(f"no region {move.region} was attached")
            region, length = self._regions[move.region], move.length
            if length > MOVE_BYTES_MAX:
                raise ConfigError(f"a move of {length} bytes; at most {MOVE_BYTES_MAX}")
            if not 0 <= move.offset <= region.length - length or (put and not region.writable):
                outcomes[at] = Outcome.MISS
            elif length:
                inside.append((move.region, move.offset, move.pieces))
        if inside:
            await self._move(inside, deadline_s, put=put)
        return outcomes

    def _check(self) -> None:
        if self._channel.dead and not self._dead:
            self._dead = self._channel.dead
        if self._dead:
            raise UnavailableError(f"NIXL link: {self._dead}")

    async def _move(
        self, wanted: Sequence[tuple[int, int, Sequence[Buffer]]], deadline_s: float, *, put: bool, note: bytes = b""
    ) -> None:
        """Moves (region, offset, pieces), all of it within what was described."""
        self._check()
        own = next(self._numbers)
        keys: dict[int, bytes] = {}
        exposed: dict[int, Exposed] = {}
        spans: list[tuple[int, int]] = []
        rows: dict[tuple[Memory, Memory], list[tuple[Row, Row]]] = {}
        for number, offset, pieces in wanted:
            region = self._regions[number]
            if region.key:
                keys[region.serial] = region.key
            remote = region.base + offset
            for piece in pieces:
                serial, kind = own, Memory.HOST
                found = self._transport.registered(piece.address, piece.length)
                if found:
                    serial, (_, kind) = found
                    exposed[serial] = found[1]
                else:
                    spans.append((piece.address, piece.length))
                listed = rows.setdefault((kind, region.kind), [])
                for start in range(0, piece.length, TRANSFER_BYTES_MAX):
                    size = min(TRANSFER_BYTES_MAX, piece.length - start)
                    listed.append(((piece.address + start, size, serial), (remote + start, size, region.serial)))
                remote += piece.length
        transfers = [each for kinds, listed in rows.items() for each in _cut(kinds, listed, note)]
        batch = Batch(
            put, transfers, [Key(*each) for each in keys.items()], exposed=exposed,
            spans=joined(spans, own), future=asyncio.get_running_loop().create_future(), keep=wanted,
        )  # fmt: skip
        self._worker.begin(self._channel, batch)
        await self._finished(batch, deadline_s)

    async def _finished(self, batch: Batch, deadline_s: float) -> None:
        """Waits for a batch. It is over when this ends: also when it is cancelled."""
        loop = asyncio.get_running_loop()
        until, late, cancelled = loop.time() + deadline_s, False, False
        while not batch.future.done():
            left = until - loop.time()
            if left <= 0 and late:
                raise AbandonedLoad("NIXL link: its agent has not ended", self._written())
            if left <= 0:
                late, until = True, until + ENDING_S
                self._dead = self._dead or f"no answer within {deadline_s} s"
                batch.cut = True
                self._worker.end(self._channel, self._dead)
                continue
            try:
                await asyncio.wait([batch.future], timeout=left)
            except asyncio.CancelledError:
                cancelled = batch.cut = True
        if cancelled:
            raise asyncio.CancelledError
        fault = batch.future.exception()
        if fault is not None or late:
            self._dead = self._dead or str(fault)
            raise UnavailableError(f"NIXL link: {self._dead}") from fault

    def _written(self) -> asyncio.Future[None]:
        """Done when nothing more is written for this link."""
        writing: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._channel.over.add_done_callback(lambda _: None if writing.done() else writing.set_result(None))
        return writing


def joined(spans: Sequence[tuple[int, int]], number: int) -> list[Row]:
    """What is registered under this number so that these spans (address, length) are within: sorted, and joined where
    they overlap or lie close together."""
    found: list[Row] = []
    for address, length in sorted(spans):
        if not length:
            continue
        if found and address <= found[-1][0] + found[-1][1] + NEAR_BYTES:
            start, size, _ = found[-1]
            found[-1] = (start, max(size, address + length - start), number)
        else:
            found.append((address, length, number))
    return found


def _cut(kinds: tuple[Memory, Memory], rows: Sequence[tuple[Row, Row]], note: bytes) -> list[Transfer]:
    """Transfers that are short enough to be stopped in between."""
    found: list[Transfer] = []
    first = size = 0
    for at, (row, _) in enumerate([*rows, ((0, 0, 0), (0, 0, 0))]):
        full = size + row[1] > TRANSFER_BYTES_MAX or at - first == TRANSFER_ROWS_MAX or at == len(rows)
        if full and at > first:
            ours, theirs = zip(*rows[first:at], strict=True)
            found.append(Transfer((kinds[0], ours), (kinds[1], theirs), note))
            first, size = at, 0
        size += row[1]
    return found
