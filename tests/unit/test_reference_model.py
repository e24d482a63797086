"""The reference model accepts what a forgetful dictionary could say, and nothing else."""

from __future__ import annotations

import pytest

from tiercache.testing.model import ForgetfulDict, ModelError, check_caps, made_bytes
from tiercache.tier import Health, TierStatus


def test_a_miss_is_always_right_and_a_wrong_value_never() -> None:
    model = ForgetfulDict()
    model.check("a", None)
    with pytest.raises(ModelError):
        model.check("a", b"x")
    model.put("a", b"x")
    model.check("a", b"x")
    model.check("a", None)
    with pytest.raises(ModelError):
        model.check("a", b"y")


def test_an_answer_fixes_which_of_two_puts_it_was() -> None:
    model = ForgetfulDict()
    model.put("a", b"old")
    model.put("a", b"new")
    model.check("a", b"old")
    with pytest.raises(ModelError):
        model.check("a", b"new")


def test_after_delete_and_after_expiry_only_a_miss_is_right() -> None:
    model = ForgetfulDict()
    model.put("a", b"x")
    model.delete("a")
    with pytest.raises(ModelError):
        model.check("a", b"x")
    model.put("a", b"y", expiry_s=10)
    model.check("a", b"y", now_s=9.9)
    with pytest.raises(ModelError, match="expired"):
        model.check("a", b"y", now_s=10)


def test_leased_bytes_are_watched() -> None:
    model = ForgetfulDict()
    memory = bytearray(b"abc")
    model.put("a", b"abc")
    number = model.hold("a", memoryview(memory))
    model.check_held()
    memory[1] = 0
    with pytest.raises(ModelError, match="lease"):
        model.check_held()
    memory[1] = ord("b")
    model.let_go(number)
    assert not model.held


def test_caps_are_checked() -> None:
    check_caps([TierStatus("memory", Health.HEALTHY, 10, 10, 1, 1)])
    for bad in (TierStatus("m", Health.HEALTHY, 10, 11, 1, 1), TierStatus("m", Health.HEALTHY, 10, 1, 1, 2)):
        with pytest.raises(ModelError, match="used"):
            check_caps([bad])


def test_made_bytes_differ_by_label_and_repeat() -> None:
    assert made_bytes(("k", 1), 1000) == made_bytes(("k", 1), 1000)
    assert made_bytes(("k", 1), 1000) != made_bytes(("k", 2), 1000)
    assert made_bytes("x", 1 << 16)[:4096] != made_bytes("x", 1 << 16)[4096:8192]
    assert made_bytes("x", 0) == b""
