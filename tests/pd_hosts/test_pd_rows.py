"""What the rows of pd_hosts call right."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.pd_hosts.rows import DAMAGED, PEER, READ, Pulled, Row, all_came, gained, misled, peer_of, some_came, table

GOOD = Pulled(
    blocks=3,
    block_bytes=100,
    block_tokens=16,
    right=[5, 6],
    got=[5, 6],
    first_s=0.5,
    gain={"hits": 48, READ: 300, "loaded_blocks": 3, "failed_blocks": 0},
)
HERE = [PEER] * 3


def test_a_row_where_all_came_is_right() -> None:
    assert all_came(GOOD, HERE, [5, 6]) == []


@pytest.mark.parametrize(
    "bad",
    [
        replace(GOOD, got=[5, 7]),
        replace(GOOD, got=[]),
        replace(GOOD, gain={**GOOD.gain, "hits": 32}),
        replace(GOOD, gain={**GOOD.gain, READ: 200}),
        replace(GOOD, gain={**GOOD.gain, "failed_blocks": 1}),
        replace(GOOD, gain={**GOOD.gain, DAMAGED: 1}),
    ],
)
def test_each_lack_is_seen(bad: Pulled) -> None:
    assert len(all_came(bad, HERE, [5, 6])) == 1


def test_blocks_must_have_been_with_the_peer_and_engines_agree() -> None:
    assert len(all_came(GOOD, [1, PEER, PEER], [5, 6])) == 1
    assert len(all_came(GOOD, HERE, [6, 6])) == 1


def test_a_peer_that_went_away_did_so_in_the_middle() -> None:
    some = replace(GOOD, gain={"hits": 48, READ: 0, "loaded_blocks": 0, "failed_blocks": 3})
    assert some_came(some, 100) == []
    assert some_came(some, 10) and some_came(some, 300) and some_came(GOOD, 100)
    assert len(some_came(replace(some, got=[1, 2]), 100)) == 1


def test_wrong_values_must_have_been_used() -> None:
    bad = replace(GOOD, got=[1, 2])
    assert misled(bad, HERE) == []
    assert len(misled(GOOD, HERE)) == 1 and len(misled(bad, [1, 1, 1])) == 1


def test_the_transport_is_the_one_that_was_wanted() -> None:
    peer = {"transport": "ucx", "negotiated": "tcp"}
    assert peer_of([peer], "ucx") == ("ucx (tcp)", [])
    assert peer_of([peer], "auto") == ("auto: ucx (tcp)", [])
    assert peer_of([peer], "tcp")[1] and peer_of([], "tcp")[1] and peer_of([peer, peer], "ucx")[1]


def test_counters_grow() -> None:
    assert gained({"a": 1.0}, {"a": 3.0, "b": 2.0}) == {"a": 2.0, "b": 2.0}


def test_the_table_says_what_is_wrong() -> None:
    lines = table([Row("m", "tcp", "c", GOOD, 0.1), Row("m", "tcp", "c", wrong=["it did not begin"])]).splitlines()
    assert lines[1].split() == ["m", "tcp", "c", "equal", "48", "48", "0.0", "500", "ms", "100", "ms", "ok"]
    assert lines[2].endswith("WRONG: it did not begin")
