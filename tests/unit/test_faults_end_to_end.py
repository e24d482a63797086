"""Origins on a bad day, through everything: S3 server, fault proxy, origin, reader, cache, filesystem.

Whatever the proxy does, a reader gets the right bytes or a clear error within the deadline, and nothing is poisoned:
the next clean read is right. Only a byte changed in a body of the right length passes unseen, since nothing but a
digest could tell; that fault is left out.
"""

from __future__ import annotations

import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tiercache.testing.faultproxy import FAULTS, FaultProxy, Faults
from tiercache.testing.model import made_bytes
from tiercache.testing.s3server import S3Server
from tiercache_connectors.fsspec_fs import TierCacheFileSystem

MIB = 1 << 20
DEADLINE_S = 2.0
SLACK_S = 3.0
"""What a busy machine may add to a deadline."""
SIZE = 3 * MIB + 12_345
SEEN = [fault for fault in FAULTS if fault != "corrupt"]


class Store:
    """A bucket behind a proxy; objects are files, so that a test can replace one under a reader."""

    def __init__(self, root: Path, proxy: FaultProxy) -> None:
        self.root, self.proxy = root, proxy
        self._versions: dict[str, int] = {}

    def put(self, name: str) -> bytes:
        """The next version of an object; all have one size."""
        self._versions[name] = self._versions.get(name, 0) + 1
        data = made_bytes((name, self._versions[name]), SIZE)
        scratch = self.root / "scratch"
        scratch.write_bytes(data)
        os.replace(scratch, self.root / "bucket" / name)
        return data

    def calm(self) -> None:
        """No more faults."""
        self.proxy.faults = Faults()
        self.proxy.on_request = self.proxy.on_body = None
        self.proxy.clear()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("s3")
    (root / "bucket").mkdir()
    with (
        pytest.MonkeyPatch.context() as patch,
        S3Server(root) as server,
        FaultProxy(server.url, random=random.Random(7)) as proxy,
    ):
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "AWS_PROFILE", "AWS_CA_BUNDLE"):
            patch.delenv(name, raising=False)
        yield Store(root, proxy)


@pytest.fixture
def fs(store: Store, tmp_path: Path):
    store.calm()
    made = TierCacheFileSystem(
        target_protocol="s3",
        target_options={
            "key": "reader",
            "secret": "of-tests",
            "endpoint_url": store.proxy.url,
            "client_kwargs": {"region_name": "us-east-1"},
        },
        directory=str(tmp_path / "cache"),
        memory_bytes=64 * MIB,
        ssd_bytes=0,
        origin_deadline_s=DEADLINE_S,
        stat_ttl_s=0,
        skip_instance_cache=True,
    )
    yield made
    made.close()


def attempt(work):
    """The answer or the OSError of a call, which must come in time."""
    begun = time.monotonic()
    try:
        answer = work()
    except OSError as error:
        answer = error
    took = time.monotonic() - begun
    assert took < 2 * DEADLINE_S + SLACK_S, f"{took:.1f} s"
    return answer


@pytest.mark.slow
@pytest.mark.parametrize("fault", SEEN)
def test_one_fault_is_survived_or_told_and_poisons_nothing(store: Store, fs: TierCacheFileSystem, fault: str) -> None:
    data = store.put(f"once-{fault}")
    path = f"bucket/once-{fault}"
    fs.info(path)
    store.proxy.clear()
    store.proxy.faults = Faults(schedule={1: fault}, only="GET", only_path="once-", stall_s=1.0)
    answer = attempt(lambda: fs.cat_file(path))
    assert isinstance(answer, OSError) or answer == data
    assert store.proxy.stats.by_fault[fault] == 1
    if fault in ("throttle", "error", "reset", "truncate", "stall", "mute"):
        assert answer == data, f"{fault} once is worth a second try: {answer!r}"
    store.calm()
    assert fs.cat_file(path) == data


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault", ["throttle", "error", "reset", "truncate", "mute", "short_length", "long_length", "wrong_range"]
)
def test_a_fault_that_stays_ends_in_a_clear_error_and_passes(store: Store, fs: TierCacheFileSystem, fault: str) -> None:
    data = store.put(f"stays-{fault}")
    path = f"bucket/stays-{fault}"
    fs.info(path)
    store.proxy.faults = Faults(probability={fault: 1.0}, only="GET", only_path="stays-", stall_s=60.0)
    answer = attempt(lambda: fs.cat_file(path, start=MIB, end=2 * MIB))
    assert isinstance(answer, OSError)
    assert len(str(answer)) > 10
    store.calm()
    assert fs.cat_file(path) == data


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "during"])
def test_an_object_that_changes_under_a_reader_is_never_mixed(store: Store, fs: TierCacheFileSystem, when: str) -> None:
    name = f"changes-{when}"
    old = store.put(name)
    path = f"bucket/{name}"
    with fs.open(path) as handle:
        assert handle.read(1000) == old[:1000]
        newest: list[bytes] = []

        def change(number: int, target: str) -> None:
            if name in target and not newest:
                newest.append(store.put(name))

        if when == "before":
            store.proxy.on_request = change
        else:
            store.proxy.on_body = change
        handle.seek(MIB + MIB // 2)
        answer = attempt(lambda: handle.read(MIB))
        assert isinstance(answer, OSError) or answer == old[MIB + MIB // 2 :][:MIB]
        store.calm()
        later = attempt(lambda: (handle.seek(0), handle.read())[1])
        assert isinstance(later, OSError) or later == old
    assert newest, "the object was not changed"
    assert fs.cat_file(path) == newest[0]
    with fs.open(path) as handle:
        assert handle.read() == newest[0]


@pytest.mark.slow
def test_a_storm_of_all_faults_gives_right_bytes_or_errors_and_leaves_nothing(
    store: Store, fs: TierCacheFileSystem
) -> None:
    names = [f"storm{i}" for i in range(4)]
    data = {name: store.put(name) for name in names}
    store.proxy.faults = Faults(probability=dict.fromkeys(SEEN, 0.03), stall_s=0.5, jitter_s=0.002)
    outcomes: list[bool] = []

    def reader(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(12):
            name = rng.choice(names)
            start = rng.randrange(SIZE)
            stop = min(SIZE, start + rng.choice([10, 70_000, MIB, SIZE]))
            answer = attempt(lambda name=name, start=start, stop=stop: fs.cat_file(f"bucket/{name}", start, stop))
            assert isinstance(answer, OSError) or answer == data[name][start:stop]
            outcomes.append(not isinstance(answer, OSError))

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(reader, seed) for seed in range(4)]:
            future.result()
    assert sum(outcomes) > len(outcomes) // 2
    assert sum(store.proxy.stats.by_fault.values()) > 3
    store.calm()
    for name in names:
        assert fs.cat_file(f"bucket/{name}") == data[name]
