"""Lone entries and chains that use the same names: neither is lost, and no chain goes through a lone entry."""

from __future__ import annotations

from pathlib import Path

import pytest

import tiercache
from tiercache.model import Outcome

HIT, MISS, FULL = Outcome.HIT, Outcome.MISS, Outcome.FULL
FIRST, SECOND, THIRD = (bytes([letter]) * 16 for letter in b"abc")


@pytest.mark.parametrize(
    ("lone", "chain", "parent", "stored"),
    [
        (FIRST, [FIRST, SECOND], b"", [FULL, FULL]),
        (SECOND, [FIRST, SECOND, THIRD], b"", [HIT, FULL, FULL]),
        (FIRST, [SECOND], FIRST, [FULL]),
        (THIRD, [FIRST, SECOND], b"", [HIT, HIT]),
    ],
)
def test_a_chain_ends_before_a_lone_entry(
    tmp_path: Path, lone: bytes, chain: list[bytes], parent: bytes, stored: list[Outcome]
) -> None:
    with tiercache.open(tmp_path, share=False, memory_bytes=8 << 20, ssd_bytes=0) as cache:
        assert cache.put([lone], [lone * 10]) == [HIT]
        assert cache.put_chain(chain, [name * 10 for name in chain], parent=parent) == stored
        cache.core.tiers.index.validate()
        assert cache.get([lone]) == [lone * 10]
        expected = [name * 10 if outcome is HIT or name == lone else MISS for name, outcome in zip(chain, stored)]
        assert cache.get(chain) == expected
