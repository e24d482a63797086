"""Packs, snapshots, plans of requests and victims: pure parts of the remote tier."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiercache.buffers import Buffer, part_digests
from tiercache.errors import CorruptionError
from tiercache.model import Form, Kind, Name, Outcome, Payload, all_parts, part_count
from tiercache.remote import packs, snapshots
from tiercache.remote.packs import Span, Want
from tiercache.remote.snapshots import Listed
from tiercache.remote.victims import Candidate, choose
from tiercache.testing.buckets import made_block

KEY = "packs/0123456789abcdef/0000000001"


def entry(number: int, size: int, part_bytes: int, *, width: int = 16, parent: bytes = b"") -> tuple[Payload, Buffer]:
    rng = random.Random(number)
    source = Buffer.of(rng.randbytes(size))
    digests = part_digests(source, part_bytes)
    name = Name(rng.randbytes(width))
    return Payload(
        name, size, part_bytes, all_parts(size, part_bytes), digests, rng.choice(list(Kind)), parent,
        rng.randrange(1 << 16), rng.random(), rng.randrange(1 << 32), 0, rng.choice([Form.LONE, Form.BLOCK]),
    ), source  # fmt: skip


def packed(made: list[tuple[Payload, Buffer]], key: str = KEY) -> tuple[bytes, packs.Rows]:
    pack, rows = packs.encode(key, [one for one, _ in made], [source for _, source in made])
    return bytes(pack), rows


def read(pack: bytes, payload: Payload, offset: int, key: str = KEY) -> tuple[Outcome, bytes, bytes]:
    want = Want(payload, offset)
    pieces = [(span.start, memoryview(pack)[span.start : span.stop]) for span in packs.plan([want])]
    target = bytearray(payload.size)
    outcome, digests = packs.land(key, want, pieces, Buffer.of(target, writable=True))
    return outcome, digests, bytes(target)


entries = st.lists(
    st.tuples(st.integers(0, 1 << 30), st.integers(0, 9000), st.sampled_from([512, 4096]), st.sampled_from([16, 32])),
    min_size=1,
    max_size=6,
)


@given(entries)
def test_what_is_packed_comes_back(given_entries) -> None:
    made = [entry(*one[:3], width=one[3], parent=b"p" * one[3]) for one in given_entries]
    pack, rows = packed(made)
    assert len(pack) == packs.pack_bytes([one for one, _ in made])
    span = packs.table_span(KEY, pack[-packs.TAIL_BYTES :], len(pack))
    again = packs.decode_table(KEY, pack[span.start : span.stop])
    assert again.tobytes() == rows.tobytes()
    assert packs.keys_of(again) == [one.name.key for one, _ in made]
    for row, (payload, source) in zip(again, made, strict=True):
        told = packs.payload_of(row)
        assert replace(told, digests=payload.digests, cost_s=payload.cost_s) == payload
        outcome, digests, got = read(pack, told, int(row["offset"]))
        assert (outcome, digests, got) == (Outcome.HIT, payload.digests, bytes(source))


@given(entries, st.integers(0), st.integers(1, 255))
def test_no_changed_byte_passes(given_entries, place: int, flip: int) -> None:
    """Whichever byte of a pack changes: a table is whole or refused, a record is right or CORRUPT."""
    made = [entry(*one[:3], width=one[3]) for one in given_entries]
    good, rows = packed(made)
    bad = bytearray(good)
    bad[place % len(bad)] ^= flip
    try:
        span = packs.table_span(KEY, bad[-packs.TAIL_BYTES :], len(bad))
        assert packs.decode_table(KEY, bad[span.start : span.stop]).tobytes() == rows.tobytes()
    except CorruptionError:
        pass
    for row, (_, source) in zip(rows, made, strict=True):
        outcome, _, got = read(bytes(bad), packs.payload_of(row), int(row["offset"]))
        assert outcome is Outcome.CORRUPT or got == bytes(source)


def test_a_record_of_another_pack_does_not_pass() -> None:
    """As where an object was copied to another name, or a row leads to another record of the same shape."""
    one, two = entry(1, 5000, 4096), entry(2, 5000, 4096)
    pack, rows = packed([one, two])
    other = KEY[:-1] + "2"
    assert read(pack, packs.payload_of(rows[0]), int(rows[0]["offset"]), other)[0] is Outcome.CORRUPT
    assert read(pack, packs.payload_of(rows[0]), int(rows[1]["offset"]))[0] is Outcome.CORRUPT
    with pytest.raises(CorruptionError):
        packs.decode_table(other, pack[packs.table_span(KEY, pack[-packs.TAIL_BYTES :], len(pack)).start :])


def test_what_has_not_its_digests_is_left_out() -> None:
    good, bad = entry(1, 5000, 4096), entry(2, 9000, 4096)
    pack, rows = packs.encode(KEY, [bad[0], good[0], bad[0]], [Buffer.of(bytes(9000)), good[1], Buffer.of(bytes(9000))])
    assert packs.keys_of(rows) == [good[0].name.key]
    assert bytes(pack) == packed([good])[0]


def test_parts_are_fetched_with_their_header_and_near_ones_together() -> None:
    part = 100 << 10
    payload, _ = entry(1, 8 * part, part)
    header = packs.header_bytes(payload.size, part)
    whole = Want(payload, 1000)
    assert packs.spans_of(whole) == [Span(1000, 1000 + header + 8 * part)]
    first = Want(replace(payload, parts=0b1), 1000)
    assert packs.plan([first]) == [Span(1000, 1000 + header + part)]
    far = Want(replace(payload, parts=0b10000), 1000)
    assert packs.plan([far]) == [Span(1000, 1000 + header), Span(1000 + header + 4 * part, 1000 + header + 5 * part)]
    assert len(packs.plan([far], gap_bytes=1 << 20)) == 1
    two = Want(payload, 1000 + header + 8 * part)
    assert len(packs.plan([whole, two])) == 1
    assert len(packs.plan([whole, two], request_bytes=10 * part)) == 2


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 255)), max_size=8), st.integers(0, 5000))
def test_every_stretch_lies_in_one_request(wants, gap: int) -> None:
    payload, _ = entry(1, 8 * 512, 512)
    asked = [Want(replace(payload, parts=parts), 6000 * at) for at, parts in wants]
    plan = packs.plan(asked, gap_bytes=gap, request_bytes=9000)
    assert plan == sorted(plan)
    for want in asked:
        for span in packs.spans_of(want):
            assert any(one.start <= span.start and span.stop <= one.stop for one in plan)


def test_snapshots_list_packs_and_are_refused_when_damaged() -> None:
    listed = []
    for number in range(3):
        key = f"packs/aa/{number:010d}"
        pack, rows = packed([entry(10 * number + i, 700, 512) for i in range(number + 1)], key)
        listed.append(Listed(key, len(pack), rows))
    data = snapshots.encode("index/aa/1", listed)
    assert len(data) <= snapshots.size_of(3, 6)
    again = snapshots.decode("index/aa/1", data)
    assert [(one.key, one.size, one.rows.tobytes()) for one in again] == [
        (one.key, one.size, one.rows.tobytes()) for one in listed
    ]
    for at in range(0, len(data), 7):
        bad = bytearray(data)
        bad[at] ^= 1
        with pytest.raises(CorruptionError):
            snapshots.decode("index/aa/1", bad)
    for wrong in (data[:-1], data + b"x", b"", data[:20]):
        with pytest.raises(CorruptionError):
            snapshots.decode("index/aa/1", wrong)
    with pytest.raises(CorruptionError):
        snapshots.decode("index/aa/2", data)


def test_rows_that_cannot_be_are_refused() -> None:
    pack, rows = packed([entry(1, 700, 512)])
    for name, value in (("part_bytes", 0), ("width", 5), ("offset", 3), ("size", 512 * 65), ("kind", 9), ("form", 7)):
        bad = rows.copy()
        bad[name] = value
        with pytest.raises(CorruptionError):
            packs.check_rows(bad, KEY, len(pack))


# -- victims -----------------------------------------------------------------------------------------------------------


def rows_of(*numbers: int, roots: tuple[int, ...] = ()) -> packs.Rows:
    """Blocks of one chain by number; `roots` begin chains of their own."""
    made = [made_block(number) for number in numbers]
    return packed([(replace(one, parent=b"") if n in roots else one, s) for n, (one, s) in zip(numbers, made)])[1]


def test_of_one_chain_the_leaf_goes() -> None:
    chain = [Candidate(rows_of(*range(4 * i, 4 * i + 4)), (0.0, i + 1), True) for i in range(5)]
    assert choose(chain) == 4
    assert choose([one._replace(own=i < 3) for i, one in enumerate(chain)]) == 2
    assert choose([one._replace(own=False) for one in chain]) == -1
    assert choose([]) == -1


def test_of_two_chains_the_one_used_longer_ago_goes_from_its_end() -> None:
    old = [Candidate(rows_of(0, 1), (0.0, 1), True), Candidate(rows_of(2, 3), (0.0, 2), True)]
    new = [
        Candidate(rows_of(100, 101, roots=(100,)), (0.0, 3), True),
        Candidate(rows_of(102, 103), (0.0, 4), True),
    ]
    assert choose(old + new) == 1
    read_again = [one._replace(rank=(0.0, 10 + i)) for i, one in enumerate(old)]
    assert choose(read_again + new) == 3


def test_what_cost_more_stays() -> None:
    cheap = Candidate(rows_of(0, 1), (0.1, 9), True)
    dear = Candidate(rows_of(100, 101, roots=(100,)), (0.9, 1), True)
    assert choose([dear, cheap]) == 1


def test_what_lost_its_beginning_goes_first() -> None:
    orphan = Candidate(rows_of(50, 51, 52), (0.0, 99), True)
    whole = Candidate(rows_of(0, 1, 2), (0.0, 1), True)
    assert choose([whole, orphan]) == 1


def test_a_pack_is_not_kept_for_one_row() -> None:
    """Of a pack of many dead chains, one goes on in a new pack: that does not make all of it new."""
    mixed = Candidate(rows_of(0, 10, 20, 30, 40, 50, roots=(0, 10, 20, 30, 40, 50)), (0.0, 1), True)
    middle = Candidate(rows_of(100, 101, 102, 103, roots=(100,)), (0.0, 2), True)
    new = Candidate(rows_of(1, 2, 3, 4), (0.0, 3), True)
    assert choose([mixed, middle, new]) == 0


@given(st.lists(st.lists(st.integers(0, 60), max_size=6, unique=True), min_size=1, max_size=8), st.randoms())
def test_any_rows_give_a_victim(some, rng: random.Random) -> None:
    """Blocks may lie twice, in any order, and chains may be broken anywhere."""
    candidates = [
        Candidate(rows_of(*numbers) if numbers else np.zeros(0, packs.ROW), (rng.random(), i), rng.random() < 0.7)
        for i, numbers in enumerate(some)
    ]
    chosen = choose(candidates)
    assert (chosen >= 0 and candidates[chosen].own) or not any(one.own for one in candidates)


def test_counts_of_parts_fit() -> None:
    payload, _ = entry(1, 64 * 512, 512)
    assert part_count(payload.size, payload.part_bytes) == 64
    pack, rows = packed([entry(1, 64 * 512, 512)])
    assert read(pack, packs.payload_of(rows[0]), int(rows[0]["offset"]))[0] is Outcome.HIT
