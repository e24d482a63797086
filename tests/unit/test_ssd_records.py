"""Records and rows: geometry, headers, packed columns; every flipped bit of them is known."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tiercache.model import PARTS_MAX, all_parts, part_count
from tiercache.ssd import rows as codec
from tiercache.ssd.records import (
    BLOCK_BYTES,
    fits,
    location_of,
    pack_header,
    pieces_of,
    read_header,
    record_blocks,
    runs_of,
    split_location,
)
from tiercache.ssd.transfer import spans_of
from tiercache.testing.tiers import item

SHAPES = st.tuples(st.integers(1, 200_000), st.integers(0, 3_000_000), st.integers(1, (1 << 64) - 1)).filter(
    lambda shape: part_count(shape[1], shape[0]) <= PARTS_MAX
)


@given(st.integers(0, (1 << 20) - 1), st.integers(0, 1 << 32), st.integers(0, (1 << 20) - 1))
def test_locations_split_as_they_were_made(segment: int, generation: int, block: int) -> None:
    """And are never negative, and fit 63 bits."""
    location = location_of(segment, generation, block)
    assert 0 <= location < 1 << 63
    assert split_location(location) == (segment, generation % (1 << 23), block)


@given(SHAPES)
def test_runs_hold_the_present_parts_packed(shape: tuple[int, int, int]) -> None:
    """Every present byte lies in one run, runs start on blocks, follow each other, and end with the record."""
    part_bytes, size, bits = shape
    parts = bits & all_parts(size, part_bytes) or 1
    covered: list[int] = []
    end = 0
    for start, stop, at in runs_of(parts, part_bytes, size):
        assert at == end and at % BLOCK_BYTES == 0
        end = at + -(-(stop - start) // BLOCK_BYTES) * BLOCK_BYTES
        covered += range(start // part_bytes, max(start // part_bytes + 1, -(-stop // part_bytes)))
    assert covered == [part for part in range(PARTS_MAX) if parts >> part & 1]
    assert record_blocks(parts, part_bytes, size) == 1 + end // BLOCK_BYTES


@given(SHAPES, st.integers(1, (1 << 64) - 1))
def test_spans_bring_the_header_and_what_is_wanted(shape: tuple[int, int, int], wish: int) -> None:
    """First the header, then each wanted part whole, in aligned reads within the record."""
    part_bytes, size, bits = shape
    parts = bits & all_parts(size, part_bytes) or 1
    wanted = wish & parts
    pieces = [piece for _, _, inner in spans_of(wanted, parts, part_bytes, size) for piece in inner]
    assert tuple(pieces) == pieces_of(wanted, parts, part_bytes, size)
    assert [part for part, *_ in pieces] == [part for part in range(PARTS_MAX) if wanted >> part & 1]
    for number, (start, stop, inner) in enumerate(spans_of(wanted, parts, part_bytes, size)):
        assert start % BLOCK_BYTES == stop % BLOCK_BYTES == 0
        assert stop <= record_blocks(parts, part_bytes, size) * BLOCK_BYTES
        assert (start == 0) == (number == 0)
        for _, low, length, at in inner:
            assert start <= BLOCK_BYTES + at and BLOCK_BYTES + at + length <= stop
            assert low + length <= size


def test_a_header_says_what_it_was_told() -> None:
    """For every form, width and shape; under another seed, place or generation it is not accepted as it stands."""
    for seed in range(200):
        payload = replace(item(seed, seed * 37, 4096).payload, cost_s=0.5, expiry_s=2**31 + seed, scope=seed * 300)
        assert fits(payload)
        block = memoryview(pack_header(payload, (7, 1 << 30, 99), 5).ljust(BLOCK_BYTES, b"\0"))
        header = read_header(block, 5)
        assert header is not None
        assert (header.segment, header.generation, header.block, header.payload) == (7, 1 << 30, 99, payload)
        assert read_header(block, 6) is None


def test_every_flipped_bit_of_a_header_is_known() -> None:
    """All bits that mean anything; the rest of the block is padding."""
    payload = item(3, 300_000, 16_384).payload
    packed = pack_header(payload, (1, 2, 3), 4)
    for bit in range(len(packed) * 8):
        block = bytearray(packed.ljust(BLOCK_BYTES, b"\0"))
        block[bit // 8] ^= 1 << bit % 8
        assert read_header(memoryview(block), 4) is None, bit


def test_payloads_that_no_record_can_describe() -> None:
    """Too many parts, too long a key, digests or a map that do not match."""
    payload = item(1, 100_000, 8192).payload
    assert fits(payload)
    for wrong in (
        replace(payload, part_bytes=1000),
        replace(payload, part_bytes=0),
        replace(payload, parts=0),
        replace(payload, parts=payload.parts << 1),
        replace(payload, digests=payload.digests[:-8]),
        replace(payload, name=payload.name._replace(key=b"x" * 33)),
        replace(payload, name=payload.name._replace(key=b"")),
        replace(payload, parent=b"x" * 33),
    ):
        assert not fits(wrong), wrong


def test_packed_rows_come_back_and_every_flip_is_known() -> None:
    """Tables of all forms and widths, an empty one among them."""
    for seeds in (range(0), range(1), range(30)):
        payloads = [item(seed, seed * 1000, 4096).payload for seed in seeds]
        table = codec.table_of(payloads, [seed * 300 for seed in seeds])
        key = codec.row_key(1, 2, b"r", 3)
        value = codec.pack_table(key, table)
        back = codec.unpack_table(key, value)
        assert back is not None and len(back) == len(payloads)
        facts = back.facts(np.zeros(len(back), np.int64))
        for row, payload in enumerate(payloads):
            assert facts.keys[row].tobytes()[: facts.widths[row]] == payload.name.key
            assert facts.parents[row].tobytes()[: facts.parent_widths[row]] == payload.parent
            assert (facts.ordinals[row], facts.sizes[row], facts.parts[row]) == (
                payload.name.ordinal,
                payload.size,
                payload.parts,
            )
            assert back.columns["lengths"][row] == record_blocks(payload.parts, payload.part_bytes, payload.size)
        rng = random.Random(1)
        for _ in range(200):
            damaged = bytearray(value)
            damaged[rng.randrange(len(value))] ^= 1 << rng.randrange(8)
            assert codec.unpack_table(key, bytes(damaged)) is None
        assert codec.unpack_table(codec.row_key(1, 3, b"r", 3), value) is None, "a value under another key"
        assert codec.unpack_table(key, value[: rng.randrange(len(value))]) is None


def test_joining_keeps_the_later_row_of_a_block() -> None:
    """As a merge of a segment's rows wants it."""
    first = codec.table_of([item(seed).payload for seed in (1, 2, 3)], [0, 300, 600])
    second = codec.table_of([item(seed).payload for seed in (4, 5)], [300, 900])
    joined = codec.join([first, second])
    assert joined.columns["blocks"].tolist() == [0, 300, 600, 900]
    keys = [item(seed).payload.name.key for seed in (1, 4, 3, 5)]
    assert [joined.keys[i].tobytes()[: joined.columns["widths"][i]] for i in range(4)] == keys
