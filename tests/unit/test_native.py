"""The native kernel: digests as xxhash has them, bytes as they were, nothing beside them; and doing without it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.kv_engine import KERNELS, moved_by
from tiercache import native

ROOT = Path(native.__file__).parent.parent.parent
needs_kernel = pytest.mark.skipif(native.KERNEL is None, reason=f"no native kernel: {native.WHY}")


def spans(length: int, skew: int) -> tuple[np.ndarray, np.ndarray]:
    """A span of random bytes, and 64 guard bytes, the span and 64 more; at an address that is `skew` from aligned."""
    raw = np.random.default_rng(length).integers(0, 256, length, np.uint8)
    room = np.full(length + 256, 0xAA, np.uint8)
    start = (-room.ctypes.data - 64) % 64 + skew
    return raw, room[start : start + length + 128]


@needs_kernel
@settings(max_examples=300, deadline=None)
@given(
    length=st.one_of(st.integers(241, 3000), st.sampled_from([4096, 65536, 65537, 99_999])),
    part=st.sampled_from([256, 1000, 1024, 1 << 20]),
    skew=st.sampled_from([0, 1, 16, 32]),
    bits=st.sampled_from(KERNELS[1:] or (0,)),
)
def test_parts_are_copied_and_hashed(length: int, part: int, skew: int, bits: int) -> None:
    if length % part and length % part < native.DIGEST_BYTES_MIN:
        length -= length % part
    source, room = spans(length, skew)
    wanted = [xxhash.xxh3_64_intdigest(source[at : at + part].tobytes()) for at in range(0, length, part)]
    digests = np.zeros(2 * len(wanted) + 1, np.uint64)
    with moved_by(bits):
        assert native.KERNEL is not None
        target = room[64 : 64 + length]
        for goal in (0, target.ctypes.data):
            facts = np.array([[source.ctypes.data, goal, length, part]] * 2, np.int64)
            native.KERNEL.spans(facts.ctypes.data, 2, digests.ctypes.data)
            assert digests.tolist() == [*wanted, *wanted, 0]
            digests[:] = 0
        assert np.array_equal(target, source)
        assert set(room[:64]) | set(room[64 + length :]) == {0xAA}


@needs_kernel
def test_it_uses_the_widest_instructions_that_it_may() -> None:
    assert native.KERNEL is not None
    assert [native.KERNEL.choose(bits) for bits in (64, 65)] == [64, 64]
    assert native.KERNEL.choose(0) == native.KERNEL.bits >= 64


def test_a_library_that_is_not_there_or_not_ours_is_not_used(tmp_path: Path) -> None:
    assert native.load(tmp_path / "none.so") == (None, native.load(tmp_path / "none.so")[1])
    assert "no C compiler" in native.load(tmp_path / "none.so")[1]
    (tmp_path / "text.so").write_text("no library")
    kernel, why = native.load(tmp_path / "text.so")
    assert kernel is None and "reinstall" in why


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.parametrize(("flags", "why"), [([], "other sources"), (['-DSOURCE="0123456789abcdef"'], "other sources")])
def test_a_library_of_other_sources_is_not_used(tmp_path: Path, flags: list[str], why: str) -> None:
    source, library = Path(native.__file__).with_name("kernel.c"), tmp_path / "old.so"
    subprocess.run(["cc", "-shared", "-fPIC", *flags, "-o", str(library), str(source)], check=True)
    kernel, said = native.load(library)
    assert kernel is None and why in said


@pytest.mark.skipif(not (ROOT / "hatch_build.py").exists(), reason="not in a checkout")
def test_a_wheel_is_built_without_a_compiler_and_says_so(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("tiercache/native", "connectors"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copy(ROOT / "tiercache" / "__init__.py", tmp_path / "tiercache")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "out")]
    done = subprocess.run(
        build, cwd=tmp_path, env=os.environ | {"CC": "/no/compiler"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "without its native kernel" in done.stdout + done.stderr
    (wheel,) = (tmp_path / "out").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
