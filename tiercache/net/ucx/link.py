"""UcxLink: one peer over UCX."""

from __future__ import annotations

import asyncio
import ctypes
from typing import TYPE_CHECKING

from tiercache.errors import AbandonedLoad, ConfigError, ProtocolError, UnavailableError
from tiercache.model import Outcome
from tiercache.net.ucx import binding, words
from tiercache.net.ucx.moving import Op, Region
from tiercache.net.ucx.pulling import questions
from tiercache.net.ucx.serving import SPANS
from tiercache.transport import MOVE_BYTES_MAX, MOVES_MAX, NOTE_BYTES_MAX, Memory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tiercache.buffers import Buffer
    from tiercache.net.ucx.moving import Batch, Endpoint
    from tiercache.net.ucx.pulling import Pull
    from tiercache.net.ucx.transport import UcxTransport
    from tiercache.net.ucx.worker import Worker
    from tiercache.transport import Move

ENDING_S = 5.0
"""A call that passed its deadline waits so long for UCX to let go of its pieces."""
GRACE_S = 1.0
"""How long a call that was cancelled may hold its pieces before the link is cut off."""
OP_BYTES_MAX = 64 << 20
"""Longer moves are cut here, so that a batch can be stopped."""
SPANS_MAX = 256
"""Pieces of one operation."""

LISTED = ("cma", "tcp")
"""Transports that take pieces in lists. Others move registered memory, and a list has room for no registration."""
RANKS = ("rc_mlx5", "dc_mlx5", "rc_verbs", "srd", "ud_mlx5", "ud_verbs", *LISTED)
"""Transports that bytes of host memory may take, the one that UCX then prefers first."""


class UcxLink:
    """Reads and writes by remote key. What is exposed at the other end is known here: over TCP nobody checks there."""

    def __init__(
        self, transport: UcxTransport, worker: Worker, endpoint: Endpoint, peer: words.Address, names: list[str]
    ) -> None:
        self._transport, self._worker, self._endpoint, self._peer = transport, worker, endpoint, peer
        self._regions: list[Region] = []
        self._negotiated = next((name for name in RANKS if name in names), names[0] if names else "")
        self._reaches = self._negotiated in RANKS and self._negotiated != "tcp"
        """Whether UCX itself reads there, by remote key; else the other end is asked to write here."""
        self._dead = ""
        self._described: dict[tuple[int, Memory], binding.RequestParams] = {}

    @property
    def negotiated(self) -> str:
        """See the port."""
        return self._negotiated

    @property
    def pushes(self) -> bool:
        """See the port. Over TCP a get is a question to the other end, and its answer is copied more often."""
        return self._negotiated == "tcp"

    def attach(self, descriptor: bytes) -> int:
        """See the port."""
        found = words.unpack_descriptor(descriptor)
        if found.token != self._peer.token:
            raise ProtocolError("a UCX descriptor of another transport than the one at the other end")
        self._regions.append(Region(found.serial, found.base, found.length, found.writable, found.key))
        return len(self._regions) - 1

    async def read(self, moves: Sequence[Move], deadline_s: float) -> list[Outcome]:
        """See the port."""
        return await self._move(moves, deadline_s, put=False)

    async def write(self, moves: Sequence[Move], deadline_s: float) -> list[Outcome]:
        """See the port."""
        return await self._move(moves, deadline_s, put=True)

    async def notify(self, note: bytes, deadline_s: float) -> None:
        """See the port. Calls of `write` end with a flush, so what they brought is there before this begins."""
        if len(note) > NOTE_BYTES_MAX:
            raise ConfigError(f"a note of {len(note)} bytes; at most {NOTE_BYTES_MAX}")
        self._check()
        await self._finished(self._worker.note(self._endpoint, note), deadline_s)

    async def close(self) -> None:
        """See the port."""
        self._dead = self._dead or "it was closed"
        self._worker.end(self._endpoint)
        self._transport.left(self)
        await asyncio.wait([self._endpoint.over], timeout=ENDING_S)

    def _check(self) -> None:
        if self._endpoint.status and not self._dead:
            self._dead = f"the peer is gone (status {self._endpoint.status})"
        if self._dead:
            raise UnavailableError(f"UCX link: {self._dead}")

    async def _move(self, moves: Sequence[Move], deadline_s: float, *, put: bool) -> list[Outcome]:
        self._check()
        if len(moves) > MOVES_MAX:
            raise ConfigError(f"{len(moves)} moves in one batch; at most {MOVES_MAX}")
        outcomes, inside = [Outcome.HIT] * len(moves), list[int]()
        for at, move in enumerate(moves):
            if not 0 <= move.region < len(self._regions):
                raise ConfigError(f"no region {move.region} was attached")
            region, length = self._regions[move.region], move.length
            if length > MOVE_BYTES_MAX:
                raise ConfigError(f"a move of {length} bytes; at most {MOVE_BYTES_MAX}")
            if not 0 <= move.offset <= region.length - length or (put and not region.writable):
                outcomes[at] = Outcome.MISS
            elif length:
                inside.append(at)
        if inside:
            begun = self._put_or_get(moves, inside, put) if put or self._reaches else self._pull(moves, inside)
            for at in await self._finished(begun, deadline_s):
                outcomes[at] = Outcome.MISS
        return outcomes

    def _pull(self, moves: Sequence[Move], inside: list[int]) -> Pull:
        """Begins to read what the other end is to put."""
        wanted = []
        for at in inside:
            move = moves[at]
            self._refuse_cuda(move.pieces)
            wanted.append((at, self._regions[move.region].serial, move.offset, move.pieces))
        return self._worker.pull(self._endpoint, questions(wanted), moves)

    def _put_or_get(self, moves: Sequence[Move], inside: list[int], put: bool) -> Batch:
        """Begins to move what can be reached from here."""
        ops, keep = list[Op](), list[object]()
        for at in inside:
            move = moves[at]
            if not self._reaches:
                self._refuse_cuda(move.pieces)
            region = self._regions[move.region]
            self._add(ops, keep, at, region, region.base + move.offset, move.pieces)
        return self._worker.move(self._endpoint, ops, put, (keep, moves))

    def _refuse_cuda(self, pieces: Sequence[Buffer]) -> None:
        for piece in pieces:
            if self._transport.registered(piece.address, piece.length)[1] != Memory.HOST:
                raise ConfigError("UCX moves no CUDA memory over TCP: bring it to the host first")

    def _add(
        self, ops: list[Op], keep: list[object], at: int, region: Region, remote: int, pieces: Sequence[Buffer]
    ) -> None:
        """Adds what one move is made of: a list of spans for host memory in several pieces, else one piece after the
        other."""
        run: list[Buffer] = []
        for piece in pieces:
            if not piece.length:
                continue
            handle, kind = self._transport.registered(piece.address, piece.length)
            if kind == Memory.HOST and len(pieces) > 1 and self._negotiated in LISTED:
                run.append(piece)
                if len(run) == SPANS_MAX:
                    remote = self._add_spans(ops, keep, at, region, remote, run)
                continue
            remote = self._add_spans(ops, keep, at, region, remote, run)
            params = self._params(handle, kind)
            for start in range(0, piece.length, OP_BYTES_MAX):
                size = min(OP_BYTES_MAX, piece.length - start)
                ops.append(Op(at, piece.address + start, size, remote + start, region, params))
            remote += piece.length
        self._add_spans(ops, keep, at, region, remote, run)

    def _add_spans(
        self, ops: list[Op], keep: list[object], at: int, region: Region, remote: int, run: list[Buffer]
    ) -> int:
        """Adds the pieces in `run` as one operation, and empties it; where the next one goes at the other end."""
        if not run:
            return remote
        spans = (binding.Span * len(run))(*[(piece.address, piece.length) for piece in run])  # type: ignore[misc]  # tuples will do
        keep.append(spans)
        ops.append(Op(at, ctypes.addressof(spans), len(run), remote, region, SPANS))
        end = remote + sum([piece.length for piece in run])
        run.clear()
        return end

    def _params(self, handle: int, kind: Memory) -> binding.RequestParams:
        """How one piece is described to UCX."""
        found = self._described.get((handle, kind))
        if found is None:
            mask = binding.MEMORY_SET | (binding.MEMH_SET if handle else 0)
            found = binding.RequestParams(op_attr_mask=mask, memory_type=int(kind), memh=handle or None)
            self._described[handle, kind] = found
        return found

    async def _finished(self, batch: Batch | Pull, deadline_s: float) -> set[int]:
        """Waits for a batch. It is over, or cut off, when this ends: also when it is cancelled."""
        loop = asyncio.get_running_loop()
        until, late, cancelled = loop.time() + deadline_s, False, False
        while not batch.future.done():
            left = until - loop.time()
            if left <= 0 and late:
                raise AbandonedLoad("UCX link: what was cut off has not ended", self._written(batch))
            if left <= 0:
                late, until = True, until + ENDING_S
                why = "a call was given up in the middle" if cancelled else f"no answer within {deadline_s} s"
                self._dead = self._dead or why
                self._worker.end(self._endpoint)
                continue
            try:
                await asyncio.wait([batch.future], timeout=left)
            except asyncio.CancelledError:
                if not cancelled and not late:
                    until = min(until, loop.time() + GRACE_S)
                cancelled = batch.cut = True
                self._worker.submit(lambda: None)  # it sleeps, and has to see that
        if cancelled:
            raise asyncio.CancelledError
        fault = batch.future.exception()
        if fault is not None:
            self._dead = self._dead or str(fault)
            raise UnavailableError(f"UCX link: {self._dead}") from fault
        return batch.future.result()

    def _written(self, batch: Batch | Pull) -> asyncio.Future[None]:
        """Done when nothing more is written for this batch."""
        writing: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        batch.future.add_done_callback(lambda _: None if writing.done() else writing.set_result(None))
        return writing
