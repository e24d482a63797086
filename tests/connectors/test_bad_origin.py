"""The filesystem over an object store that misbehaves: right bytes or a clear error, and nothing wrong is kept."""

from __future__ import annotations

import random
import threading

import pytest

from tests.connectors.conftest import MIB, s3_options
from tiercache.errors import ChangedError, TierCacheError
from tiercache.testing.faultproxy import FaultProxy, Faults

pytestmark = pytest.mark.slow

DATA = random.Random(11).randbytes(2 * MIB + 777)
BAD = ("throttle", "error", "reset", "truncate", "short_length", "wrong_range", "wrong_etag")
HURRIED = {"tail_bytes": 0, "origin_deadline_s": 5.0, "readahead_bytes": 0}


@pytest.fixture
def proxy(s3, s3_root):
    (s3_root / "faulty").mkdir(exist_ok=True)
    (s3_root / "faulty" / "bad.bin").write_bytes(DATA)
    with FaultProxy(s3.server.url, random=random.Random(5)) as made:
        yield made


@pytest.mark.parametrize("fault", [*BAD, "mixed"])
def test_right_bytes_or_a_clear_error(cached, proxy, fault):
    names = BAD if fault == "mixed" else (fault,)
    proxy.faults = Faults(only="GET", probability=dict.fromkeys(names, 0.3 / len(names)))
    fs = cached("s3", s3_options(proxy.url), **HURRIED)
    rng = random.Random(1)
    right = failed = 0
    for _ in range(25):
        start = rng.randrange(len(DATA))
        stop = min(len(DATA), start + rng.choice([100, 50_000, 400_000]))
        try:
            assert fs.cat_file("faulty/bad.bin", start, stop) == DATA[start:stop]
            right += 1
        except (TierCacheError, OSError):
            failed += 1
    assert right > 15, (right, failed, proxy.stats.by_fault)
    proxy.faults = Faults()
    assert fs.cat_file("faulty/bad.bin") == DATA
    assert fs.cat_file("faulty/bad.bin") == DATA


def test_an_object_that_keeps_changing_is_never_mixed(cached, proxy, s3, s3_root):
    """Readers and a writer at once: whole reads are one version, pinned handles one version or a clear error."""
    versions = [bytes([i]) * len(DATA) for i in range(12)]
    path = s3_root / "faulty" / "changing.bin"
    s3.direct().pipe_file("faulty/changing.bin", versions[0])
    fs = cached("s3", s3_options(proxy.url), stat_ttl_s=0.0, **HURRIED)
    proxy.faults = Faults(delay_s=0.002)
    stop = threading.Event()
    seen, changed = set(), []

    def read():
        while not stop.is_set():
            with fs.open("faulty/changing.bin") as f:
                got = set()
                try:
                    while block := f.read(300_000):
                        got |= set(block)
                except ChangedError:
                    changed.append(1)
            assert len(got) <= 1
            seen.update(got)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    writer = s3.direct()
    for version in versions[1:]:
        writer.pipe_file("faulty/changing.bin", version)
        assert set(fs.cat_file("faulty/changing.bin")) == {version[0]}
    stop.set()
    for reader in readers:
        reader.join()
    assert seen
    path.unlink()
