"""Serving: what is done for a peer that reads where it cannot reach by itself. Its questions are not believed."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, NamedTuple

from tiercache.errors import ProtocolError
from tiercache.net.ucx import binding, pulling, words
from tiercache.net.ucx.moving import Op, Region
from tiercache.transport import Memory

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tiercache.buffers import Buffer
    from tiercache.net.ucx.moving import Endpoint

QUESTIONS_MAX = 8 * pulling.SLOTS
"""Questions of one peer that are answered at a time; more are not heard."""
LANDINGS_MAX = 8
"""Landings of one peer that are known on one link."""

SPANS = binding.RequestParams(
    op_attr_mask=binding.DATATYPE_SET | binding.MEMORY_SET, datatype=binding.IOV, memory_type=int(Memory.HOST)
)


class Exposed(NamedTuple):
    """Memory that peers may reach."""

    memory: Buffer
    kind: Memory
    handle: int


class Answer(NamedTuple):
    """What is put into a landing, and what is not."""

    slot: int
    spans: int
    ops: list[Op]
    missing: set[int]
    keep: list[object]

    def outcomes(self, missed: set[int]) -> bytes:
        """The body of the message that says how it went."""
        missing = self.missing if not missed else set(range(self.spans))
        return bytes([self.slot, *[int(number in missing) for number in range(self.spans)]])


def answer(endpoint: Endpoint, body: bytes, exposed: Mapping[int, Exposed]) -> Answer | None:
    """What to do about a question; None where it is none."""
    question = pulling.unpacked(body)
    landing = _landing(endpoint, question[0]) if question else None
    if question is None or landing is None:
        return None
    _, slot, spans = question
    found = Answer(slot, len(spans), [], set(), [])
    remote = landing.base + slot * pulling.SLOT_BYTES
    run, start = list[tuple[int, int]](), remote
    for number, (serial, offset, length) in enumerate(spans):
        there = exposed.get(serial)
        if there is None or there.kind != Memory.HOST or offset + length > there.memory.length:
            found.missing.add(number)
            _add(found, run, start, landing)
            start = remote + length
        else:
            run.append((there.memory.address + offset, length))
            found.keep.append(there.memory)
        remote += length
    _add(found, run, start, landing)
    return found


def _add(found: Answer, run: list[tuple[int, int]], remote: int, landing: Region) -> None:
    """Adds spans that lie one behind the other in the landing, and empties the list of them."""
    if run:
        spans = (binding.Span * len(run))(*run)  # type: ignore[misc]  # tuples will do
        found.keep.append(spans)
        found.ops.append(Op(0, ctypes.addressof(spans), len(run), remote, landing, SPANS))
        run.clear()


def _landing(endpoint: Endpoint, descriptor: bytes) -> Region | None:
    """The landing with this descriptor, where that peer may have it."""
    known = endpoint.landings.get(descriptor)
    if known is None and len(endpoint.landings) < LANDINGS_MAX:
        try:
            said = words.unpack_descriptor(descriptor)
        except ProtocolError:
            return None
        if said.token != endpoint.token or said.length != pulling.SLOTS * pulling.SLOT_BYTES or not said.writable:
            return None
        known = endpoint.landings[descriptor] = Region(0, said.base, said.length, True, said.key)
    return known
