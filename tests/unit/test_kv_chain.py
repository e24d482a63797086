"""Keys of blocks from tokens and from engines' hashes."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from tiercache.errors import ConfigError
from tiercache.kv.chain import engine_keys, tokens_keys
from tiercache.kv.layout import Layout

LAYOUT = Layout("m", heads=1, layers=1, k_dim=8, v_dim=8, dtype="bfloat16", block_tokens=4)
SAFE = replace(LAYOUT, collision_resistant=True)
TOKENS = [1, 2, 3, 4, 5, 6, 7, 1 << 31, 9]


def test_keys_are_the_chain_that_they_are_said_to_be() -> None:
    first = xxhash.xxh3_128_digest(LAYOUT.namespace + np.array(TOKENS[:4], "<u4").tobytes())
    second = xxhash.xxh3_128_digest(first + np.array(TOKENS[4:8], "<u4").tobytes())
    assert tokens_keys(LAYOUT, TOKENS) == [first, second]
    assert (
        tokens_keys(SAFE, TOKENS)[0] == hashlib.sha256(SAFE.namespace + np.array(TOKENS[:4], "<u4").tobytes()).digest()
    )


@given(st.lists(st.integers(0, 2**32 - 1), max_size=40), st.integers(0, 10))
def test_any_kind_of_tokens_and_any_cut_give_the_same_keys(tokens: list[int], cut: int) -> None:
    keys = tokens_keys(LAYOUT, tokens)
    assert len(keys) == len(tokens) // 4
    assert keys == tokens_keys(LAYOUT, np.array(tokens, np.int64)) == tokens_keys(LAYOUT, np.array(tokens, np.uint32))
    assert keys == tokens_keys(LAYOUT, tuple(tokens))
    cut = min(cut, len(keys))
    if cut:
        assert keys[cut:] == tokens_keys(LAYOUT, tokens[cut * 4 :], parent=keys[cut - 1])


def test_one_token_changes_its_block_and_all_after_it() -> None:
    tokens = list(range(40))
    changed = [*tokens[:21], 99, *tokens[22:]]
    same = [a == b for a, b in zip(tokens_keys(LAYOUT, tokens), tokens_keys(LAYOUT, changed))]
    assert same == [True] * 5 + [False] * 5


def test_other_layouts_have_other_keys() -> None:
    layouts = [LAYOUT, replace(LAYOUT, lora="a"), replace(LAYOUT, salt="a"), replace(LAYOUT, revision="a")]
    assert len({tokens_keys(layout, TOKENS)[0] for layout in layouts}) == len(layouts)


def test_extra_is_in_the_key_of_its_block_and_those_after() -> None:
    plain = tokens_keys(LAYOUT, range(12))
    assert tokens_keys(LAYOUT, range(12), extra=[b"", b"", b""]) == plain
    image = tokens_keys(LAYOUT, range(12), extra=[b"", b"image", b""])
    assert [a == b for a, b in zip(plain, image)] == [True, False, False]
    other = tokens_keys(LAYOUT, range(12), extra=[b"", b"", b"image"])
    assert [a == b for a, b in zip(plain, other)] == [True, True, False]
    with pytest.raises(ConfigError, match="one for each whole block"):
        tokens_keys(LAYOUT, range(12), extra=[b"a"])


def test_engine_hashes_are_keys_in_our_namespace() -> None:
    hashes = [bytes([i]) * 32 for i in range(5)]
    keys = engine_keys(LAYOUT, hashes)
    assert len(set(keys)) == 5
    assert {len(key) for key in keys} == {16}
    assert {len(key) for key in engine_keys(SAFE, hashes)} == {32}
    assert keys[2:] == engine_keys(LAYOUT, hashes[2:])
    assert not set(keys) & set(engine_keys(replace(LAYOUT, model="n"), hashes))
    tokens = np.array(TOKENS[:4], "<u4").tobytes()
    assert engine_keys(LAYOUT, [tokens]) != tokens_keys(LAYOUT, TOKENS[:4])
    assert engine_keys(LAYOUT, []) == []


@pytest.mark.parametrize(
    "tokens", [[-1, 0, 0, 0], [0, 0, 0, 1 << 32], [0.5] * 4, ["a"] * 4, np.zeros((2, 4), int), np.zeros(4), [None] * 4]
)
def test_what_is_no_token_is_refused(tokens: object) -> None:
    with pytest.raises(ConfigError, match="token"):
        tokens_keys(LAYOUT, tokens)


def test_a_parent_of_another_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="keys of this layout have 32"):
        tokens_keys(SAFE, TOKENS, parent=bytes(16))
