"""Two caches find each other while both are busy."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import tiercache
from tests.two_hosts.ends import free_port
from tiercache.settings import MIB
from tiercache.sync import BlockingCache, wait

PATIENCE_S = 10.0


def opened(directory: Path, **settings: object) -> BlockingCache:
    sizes = {"memory_bytes": 16 * MIB, "page_bytes": MIB, "ssd_bytes": 0, "share": False}
    return tiercache.open(str(directory), peer_transport="tcp", peer_deadline_s=1.0, **sizes, **settings)


def peers(cache: BlockingCache) -> int:
    return len(wait(cache.core.call("peers", {}), cache.loop))


@pytest.mark.slow
def test_what_is_stored_while_two_meet_does_not_disturb_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "tiercache.peer")
    place = f"127.0.0.1:{free_port('127.0.0.1')}"
    over = threading.Event()
    with opened(tmp_path / "one", peer_listen=place) as one:

        def store() -> None:
            number = 0
            while not over.is_set():
                number += 1
                one.put([f"{number}"], [b"x" * 100])

        storing = threading.Thread(target=store)
        storing.start()
        try:
            for turn in range(12):
                with opened(tmp_path / f"other {turn}", peers=place) as other:
                    until_s = time.monotonic() + PATIENCE_S
                    while not peers(other):
                        assert time.monotonic() < until_s
        finally:
            over.set()
            storing.join()
    assert not [line for line in caplog.messages if "tries other transports" in line]


@pytest.mark.slow
def test_a_channel_that_works_is_kept_when_the_other_end_dials_too(tmp_path: Path) -> None:
    ports = [free_port("127.0.0.1") for _ in range(2)]
    places = [f"127.0.0.1:{port}" for port in ports]
    for turn in range(4):  # ids are random, and decide between two that are made at the same time
        with (
            opened(tmp_path / f"one {turn}", peer_listen=places[0], peers=places[1]) as one,
            opened(tmp_path / f"two {turn}", peer_listen=places[1], peers=places[0]) as two,
        ):
            until_s = time.monotonic() + PATIENCE_S
            while not (peers(one) and peers(two)):
                assert time.monotonic() < until_s
            core: Any = one.core
            pool = core.peering._near._pool
            (peer,) = pool.peers.values()
            there = peer.id
            for dialled in (True, False):
                assert not pool._wanted(there, dialled)
            assert not peer.channel.closed.is_set()
