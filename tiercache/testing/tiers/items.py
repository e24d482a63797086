"""Payloads for the contract suites, with their bytes, and batches of them."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, NamedTuple

from tiercache.buffers import Buffer, part_digests
from tiercache.model import PART_BYTES, Form, Kind, Name, Outcome, Payload, all_parts, part_bytes_for
from tiercache.tier import Want

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tiercache.tier import Tier

MIB = 1 << 20
SHAPES = (
    (0, PART_BYTES),
    (1, PART_BYTES),
    (4095, PART_BYTES),
    (4096, PART_BYTES),
    (4097, 4096),
    (65_536, PART_BYTES),
    (65_537, PART_BYTES),
    (499_712, PART_BYTES),
    (562_176, PART_BYTES),
    (MIB, PART_BYTES),
    (1_124_352, PART_BYTES),
    (1_124_352, 20_480),
    (5 * MIB + 7, part_bytes_for(5 * MIB + 7)),
)
"""Sizes and part sizes: empty, a byte, around pages and parts, real KV blocks, a lake page, many parts."""


class Item(NamedTuple):
    """One payload and its bytes."""

    payload: Payload
    data: bytes

    @property
    def source(self) -> Buffer:
        """The bytes, as a tier takes them."""
        return Buffer.of(self.data)

    def want(self, location: int, parts: int | None = None) -> Want:
        """A read of the given parts, or of all that are present."""
        payload = self.payload
        wanted = payload.parts if parts is None else parts
        return Want(location, payload.name, payload.size, payload.part_bytes, wanted)

    def expected(self, parts: int, background: int) -> bytes:
        """The entry with bytes of `background` in place of all parts that are not in the map."""
        step = self.payload.part_bytes
        pieces = [self.data[at : at + step] for at in range(0, len(self.data), step)]
        return b"".join([p if parts >> i & 1 else bytes([background]) * len(p) for i, p in enumerate(pieces)])


def item(seed: int, size: int = MIB, part_bytes: int = PART_BYTES, parts: int | None = None) -> Item:
    """A payload of random bytes drawn from the seed, with facts in every field, and the given parts present."""
    rng = random.Random(seed)
    data = rng.randbytes(size)
    present = all_parts(size, part_bytes) if parts is None else parts
    rows = part_digests(Buffer.of(data), part_bytes)
    digests = b"".join([rows[i * 8 : i * 8 + 8] if present >> i & 1 else bytes(8) for i in range(len(rows) // 8)])
    form = rng.choice(list(Form))
    name = Name(rng.randbytes(rng.choice((16, 32))), 0 if form == Form.LONE else rng.randrange(1 << 31))
    parent = rng.randbytes(16) if form == Form.BLOCK else b""
    return Item(
        Payload(name, size, part_bytes, present, digests, Kind.PAGE, parent, 3, 0.25, 2_000_000_000, seed, form), data
    )


async def store(tier: Tier, items: Sequence[Item]) -> list[int]:
    """Writes all items in one batch; answers what the tier answered."""
    return await tier.write([i.payload for i in items], [i.source for i in items])


async def fetch(tier: Tier, wants: Sequence[Want], background: int = 0xA5) -> list[tuple[Outcome, bytes]]:
    """Reads a batch into targets filled with the background; outcome and target of each."""
    memory = [bytearray([background]) * want.size for want in wants]
    outcomes = await tier.read(wants, [Buffer.of(m, writable=True) for m in memory])
    return list(zip(outcomes, map(bytes, memory), strict=True))


def flip(buffer: Buffer, offset: int) -> None:
    """Flips the lowest bit of one byte."""
    buffer.array()[offset] ^= 1
