"""How an owner ends."""

from __future__ import annotations

import json
import os
import select
import shutil
from pathlib import Path

import pytest

import tiercache

pytestmark = [pytest.mark.slow]
OPTIONS = {
    "memory_bytes": 64 << 20,
    "ssd_bytes": 64 << 20,
    "segment_bytes": 8 << 20,
    "disk_free_floor_bytes": 1 << 20,
    "linger_s": 0.2,
}


def test_an_owner_whose_directory_was_removed_goes_too(tmp_path: Path) -> None:
    place = tmp_path / "cache"
    cache = tiercache.open(place, share=True, **OPTIONS)
    cache.put(["name"], [b"value"])
    owner = os.pidfd_open(json.loads((place / "owner.state").read_text())["owner"][0])
    shutil.rmtree(place)
    assert cache.get(["name"]) == [b"value"]
    cache.close()
    assert select.select([owner], [], [], 30)[0], "the owner is still there"
    os.close(owner)
