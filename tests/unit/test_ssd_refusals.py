"""Directories that an SSD tier refuses are left as they were: nothing of ours stays behind in them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

import tiercache
from tiercache.errors import ConfigError, ProtocolError, UnavailableError
from tiercache.ssd.fsck import fsck
from tiercache.ssd.recover import format_text
from tiercache.ssd.tier import SsdTier

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20
SSD_BYTES = 64 * MIB
NOBODY = 65534
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs the rights to give a directory away")


def tree(path: Path) -> dict[str, bytes]:
    """Everything below a directory."""
    return {str(each.relative_to(path)): each.read_bytes() if each.is_file() else b"" for each in path.rglob("*")}


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """Another user's directory, into which we may write."""
    made = tmp_path / "theirs"
    made.mkdir()
    os.chown(made, NOBODY, NOBODY)
    return made


@root_only
def test_another_users_directory_is_refused_before_anything_is_written(theirs: Path) -> None:
    with pytest.raises(UnavailableError, match=rf"belongs to user {NOBODY}, this process runs as 0: use a directory"):
        SsdTier(str(theirs), SSD_BYTES)
    assert tree(theirs) == {}


@root_only
@pytest.mark.parametrize("share", [True, False])
def test_a_cache_there_lives_in_memory_and_says_why(
    theirs: Path, caplog: pytest.LogCaptureFixture, share: bool
) -> None:
    with tiercache.open(theirs, memory_bytes=16 * MIB, ssd_bytes=SSD_BYTES, share=share) as cache:
        cache.put(["a"], [b"x" * 1000])
        (data,) = cache.get(["a"])
        assert bytes(data) == b"x" * 1000
        assert not cache.core.durable
    assert tree(theirs) == {}
    assert len([line for line in caplog.messages if "no SSD tier in" in line and "belongs to user" in line]) == 1


@root_only
def test_a_directory_of_a_group_is_let_in(theirs: Path) -> None:
    with tiercache.open(
        theirs, memory_bytes=16 * MIB, ssd_bytes=SSD_BYTES, share=False, share_group=True, disk_free_floor_bytes=0
    ) as cache:
        assert cache.core.durable


@root_only
def test_a_volume_that_a_group_of_ours_may_write_to_says_what_to_do(theirs: Path) -> None:
    """As Kubernetes mounts one with fsGroup: it is somebody else's, and its group's processes write into it."""
    os.chown(theirs, NOBODY, os.getegid())
    theirs.chmod(0o2775)
    place = theirs / "cache"
    with pytest.raises(UnavailableError) as refused:
        SsdTier(str(theirs), SSD_BYTES)
    group = os.getegid()
    assert f"(group {group} lets it make one here: directory={place}), or share it with a group" in str(refused.value)
    assert "(share_group)" in str(refused.value)
    assert tree(theirs) == {}
    limits: dict[str, Any] = {"memory_bytes": 16 * MIB, "ssd_bytes": SSD_BYTES, "disk_free_floor_bytes": 0}
    with tiercache.open(place, share=False, **limits) as cache:
        assert cache.core.durable
    with tiercache.open(theirs, share=False, share_group=True, **limits) as cache:
        assert cache.core.durable


@root_only
@pytest.mark.parametrize(("mode", "gid"), [(0o755, 0), (0o775, NOBODY)])
def test_nothing_is_said_of_a_group_that_does_not_let_us_in(theirs: Path, mode: int, gid: int) -> None:
    os.chown(theirs, NOBODY, gid)
    theirs.chmod(mode)
    with pytest.raises(UnavailableError, match="use a directory of its own, or share it with a group"):
        SsdTier(str(theirs), SSD_BYTES)


def test_a_directory_of_ours_into_which_others_may_write_is_used(tmp_path: Path) -> None:
    """What an empty volume of a container is: root's, 0777."""
    tmp_path.chmod(0o777)
    with tiercache.open(
        tmp_path, memory_bytes=16 * MIB, ssd_bytes=SSD_BYTES, share=False, disk_free_floor_bytes=0
    ) as cache:
        assert cache.core.durable


@root_only
def test_a_cache_of_another_user_is_neither_looked_into_nor_repaired(tmp_path: Path) -> None:
    made = tmp_path / "cache"
    with tiercache.open(
        made, memory_bytes=16 * MIB, ssd_bytes=SSD_BYTES, share=False, disk_free_floor_bytes=0
    ) as cache:
        cache.put(["a"], [b"x" * 1000])
        cache.flush()
    os.chown(made, NOBODY, NOBODY)
    before = tree(made)
    with pytest.raises(UnavailableError, match="belongs to user"):
        SsdTier(str(made), SSD_BYTES)
    for repair in (False, True):
        with pytest.raises(UnavailableError, match="belongs to user"):
            fsck(str(made), repair=repair)
    assert tree(made) == before


def test_another_format_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    import xxhash

    text = format_text(MIB, 1).rpartition(b"check ")[0].replace(b"version 1", b"version 99")
    (tmp_path / "FORMAT").write_bytes(text + f"check {xxhash.xxh3_64_hexdigest(text)}\n".encode())
    before = tree(tmp_path)
    with pytest.raises(ProtocolError, match="format version 99"):
        SsdTier(str(tmp_path), SSD_BYTES)
    assert tree(tmp_path) == before


def test_caps_that_are_too_small_make_no_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least"):
        SsdTier(str(tmp_path / "new"), MIB)
    assert tree(tmp_path) == {}
