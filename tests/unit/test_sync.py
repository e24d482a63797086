"""The blocking face: what threads see, what it says of misuse, and that opening again finds everything."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest

import tiercache
from tiercache import keys
from tiercache.errors import ClosedError, ConfigError
from tiercache.model import Outcome

if TYPE_CHECKING:
    from pathlib import Path

OPTIONS = {"memory_bytes": "16MiB", "ssd_bytes": "256MiB", "segment_bytes": "8MiB"}


def test_a_round_through_memory_ssd_and_a_new_opening(tmp_path: Path) -> None:
    values = [np.random.default_rng(i).bytes(1 << 20) for i in range(40)]
    names = [f"value/{i}" for i in range(40)]
    with tiercache.open(tmp_path, **OPTIONS) as cache:
        for start in range(0, 40, 8):
            stored = cache.put(names[start : start + 8], values[start : start + 8], durable=True)
            assert stored == [Outcome.HIT] * 8
        assert cache.get(names) == values  # more than memory holds
        assert cache.flush()
        targets = [np.empty(1 << 20, np.uint8) for _ in names]
        assert cache.get_into(names, targets) == [Outcome.HIT] * 40
        assert [target.tobytes() for target in targets] == values
    with tiercache.open(tmp_path, **OPTIONS) as cache:
        assert cache.get([*names, "other"]) == [*values, Outcome.MISS]
        assert cache.delete(["value/3", "other"]) == [Outcome.HIT, Outcome.GONE]
    with tiercache.open(tmp_path, **OPTIONS) as cache:
        assert cache.get(["value/3", "value/4"]) == [Outcome.MISS, values[4]]


def test_chains(tmp_path: Path) -> None:
    digests = keys.chain(keys.namespace("model"), [bytes([i]) for i in range(30)])
    with tiercache.open(tmp_path, **OPTIONS) as cache:
        assert cache.put_chain(digests[:20], [b"k" * 1000] * 20) == [Outcome.HIT] * 20
        cache.flush()
    with tiercache.open(tmp_path, **OPTIONS) as cache, cache.match(digests) as lease:
        assert len(lease) == 20
        assert bytes(lease.view(19)) == b"k" * 1000


def test_misuse_is_told_with_the_way_out(tmp_path: Path) -> None:
    with tiercache.open(tmp_path, **OPTIONS) as cache:
        with pytest.raises(ConfigError, match=r"pass \['ab'\]"):
            cache.get("ab")
        with pytest.raises(ConfigError, match="2 names and 1 values"):
            cache.put(["a", "b"], [b"x"])
        with pytest.raises(ConfigError, match="bytes-like"):
            cache.put(["a"], ["text"])
        with pytest.raises(ConfigError, match="1 names and 0 targets"):
            cache.get_into(["a"], [])
        with pytest.raises(ConfigError, match="read-only"):
            cache.get_into(["a"], [b"x"])
        with pytest.raises(ConfigError, match="16 or 32 bytes"):
            cache.get([b"short"])
    cache.close()
    with pytest.raises(ClosedError):
        cache.get(["a"])


def test_an_unknown_policy_is_refused_and_holds_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="policy must be one of lru"):
        tiercache.open(tmp_path, **OPTIONS, policy="lfu")
    with tiercache.open(tmp_path, **OPTIONS) as cache:
        assert cache.flush()


def test_a_smaller_cap_never_empties_a_directory(tmp_path: Path) -> None:
    with tiercache.open(tmp_path, memory_bytes="16MiB", ssd_bytes="256MiB", segment_bytes="32MiB") as cache:
        cache.put(["a"], [b"kept"], durable=True)
    with pytest.raises(ConfigError, match="raise the caps"):
        tiercache.open(tmp_path, memory_bytes="16MiB", ssd_bytes="32MiB")
    with tiercache.open(tmp_path, memory_bytes="16MiB", ssd_bytes="256MiB") as cache:
        assert cache.get(["a"]) == [b"kept"]


def test_memory_alone_says_that_nothing_is_durable(tmp_path: Path) -> None:
    with tiercache.open(tmp_path, memory_bytes="16MiB", ssd_bytes=0) as cache:
        assert not cache.flush()
        with pytest.raises(ConfigError, match="ssd_bytes"):
            cache.put(["a"], [b"x"], durable=True)


def test_terms_out_of_range_are_refused_and_leak_nothing(tmp_path: Path) -> None:
    with tiercache.open(tmp_path, **OPTIONS) as cache:
        for terms in ({"scope": 70_000}, {"scope": -1}, {"cost_s": float("nan")}, {"cost_s": -1.0}):
            with pytest.raises(ConfigError, match=next(iter(terms))):
                cache.put(["a", "b"], [b"x", b"y"], **terms)  # type: ignore[arg-type]
        assert cache.put(["far"], [b"x"], ttl_s=1e10) == [Outcome.HIT]
        assert cache.core.tiers.index.used == 1
        cache.core.tiers.index.validate()


def test_damage_in_memory_is_counted_once_and_the_ssd_answers(tmp_path: Path) -> None:
    with tiercache.open(tmp_path, **OPTIONS) as cache:
        cache.put(["a", "b"], [b"x" * 100_000, b"y" * 100_000])
        cache.flush()
        cache.put(["only here"], [b"z" * 1000])
        for name in ("a", "b", "only here"):
            with cache.lease([name]) as lease:
                lease.buffer(0).array()[5] ^= 1
        target = bytearray(100_000)
        assert cache.get(["a"]) == [b"x" * 100_000]
        assert cache.get_into(["b"], [target]) == [Outcome.HIT]
        assert target == b"y" * 100_000
        assert cache.get(["only here", "a"]) == [Outcome.MISS, b"x" * 100_000]
        assert cache.core.metrics.total("tiercache_corruptions_total") == 3


def test_leases_that_are_only_dropped_do_not_use_up_the_pins(tmp_path: Path) -> None:
    with tiercache.open(tmp_path, **OPTIONS) as cache:
        cache.put(["a"], [b"x"])
        for _ in range(70_000):
            lease = cache.lease(["a"])
            view = lease.array(0)
            lease.release()
            del view
        assert cache.delete(["a"]) == [Outcome.HIT]
        assert cache.get(["a"]) == [Outcome.MISS]


def test_what_a_batch_fills_the_disk_with_is_not_garbage(tmp_path: Path) -> None:
    """A batch larger than the room left reclaims segments while its own records are hardly written."""
    options = {"memory_bytes": "64MiB", "ssd_bytes": "24MiB", "segment_bytes": "4MiB"}
    names = [f"v{i}" for i in range(27)]
    values = [np.random.default_rng(i).bytes(600 << 10) for i in range(27)]
    with tiercache.open(tmp_path / "cache", **options) as cache:
        stored = cache.put(names, values, durable=True)
        kept = [name for name, outcome in zip(names, stored, strict=True) if outcome is Outcome.HIT]
        assert kept
        shutil.copytree(tmp_path / "cache", tmp_path / "crashed")  # as a crash now would leave it
    with tiercache.open(tmp_path / "crashed", **options) as cache:
        got = dict(zip(names, cache.get(names), strict=True))
        assert [name for name in kept if not isinstance(got[name], bytes)] == []
        assert all(got[name] == value for name, value in zip(names, values, strict=True) if name in kept)


def test_a_chain_is_matched_whole_while_the_cache_still_recovers(tmp_path: Path) -> None:
    digests = keys.chain(keys.namespace("model"), [bytes([i]) for i in range(20)])
    with tiercache.open(tmp_path, **OPTIONS) as cache:
        cache.put_chain(digests, [b"k" * 1000] * 20)
        cache.flush()
    for _ in range(10):  # which of the two comes first, the scan or the question, is not in our hands
        with tiercache.open(tmp_path, **OPTIONS) as cache, cache.match(digests) as lease:
            assert len(lease) == 20
