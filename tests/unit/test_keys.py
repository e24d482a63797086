"""Keys: everything that changes bytes changes the key, and nothing else does."""

from __future__ import annotations

import pytest

from tiercache import keys
from tiercache.errors import ConfigError


def test_page_key_covers_each_of_its_fields() -> None:
    base = ("s3://host|reader", "bucket/a", "etag", 1 << 20, 1 << 16)
    others = [("s3://host|other", *base[1:]), (*base[:1], "bucket/b", *base[2:]), (*base[:2], "etag2", *base[3:])]
    others += [(*base[:3], 1 << 21, base[4]), (*base[:4], 1 << 15)]
    made = {keys.page_key(*fields) for fields in [base, *others]}
    assert len(made) == 6
    assert {len(key) for key in made} == {32}
    assert keys.page_key(*base) in made


def test_fields_do_not_run_into_each_other() -> None:
    assert keys.namespace("ab", "c") != keys.namespace("a", "bc")
    assert keys.object_key("ab", "c") != keys.object_key("a", "bc")


def test_a_file_without_version_has_no_key() -> None:
    with pytest.raises(ConfigError, match="version"):
        keys.page_key("i", "p", "", 1, 1)


@pytest.mark.parametrize("width", [16, 32])
def test_a_chain_continues_where_its_parent_ended(width: int) -> None:
    space, chunks = keys.namespace("model"), [bytes([i]) * 8 for i in range(9)]
    whole = keys.chain(space, chunks, collision_resistant=width == 32)
    tail = keys.chain(space, chunks[4:], whole[3], collision_resistant=width == 32)
    assert tail == whole[4:]
    assert {len(digest) for digest in whole} == {width}
    assert len(set(whole)) == 9
    assert keys.chain(keys.namespace("other"), chunks, collision_resistant=width == 32)[-1] != whole[-1]


@pytest.mark.parametrize("key", [b"", b"x" * 15, b"x" * 33, "x" * 16, None])
def test_what_cannot_be_a_key_is_refused_with_the_way_out(key: object) -> None:
    with pytest.raises(ConfigError, match="object_key"):
        keys.check_key(key)
