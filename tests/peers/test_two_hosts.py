"""What `python -m tests.two_hosts` shows, in short and mostly over loopback: caches of two processes or more, and what
may happen to one of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.two_hosts import cases, crowd
from tests.two_hosts.ends import Host, Near, machines
from tiercache import net
from tiercache.testing import netns

pytestmark = pytest.mark.slow

CHAIN = (32, 512 << 10)
SLOW = {"chain": CHAIN, "peer_rate_bytes_s": 25_000_000}
"""What a reader reads, and takes in a second, so that its transfers take long enough to be cut off."""
FEW = 40
"""Requests, of which the consumer's memory holds half."""


@pytest.fixture(params=["tcp", "ucx"])
def transport(request: pytest.FixtureRequest) -> str:
    usable = net.usable(request.param)
    if not usable.usable:
        pytest.skip(usable.why)
    return str(request.param)


@pytest.fixture
def hosts() -> list[Host]:
    return [Near(), Near(), Near()]


def test_all_that_one_has_is_read_on_the_other(hosts: list[Host], tmp_path: Path, transport: str) -> None:
    cases.exchange(hosts, tmp_path, transport, writer=transport == "tcp", reader=False)


def test_pages_of_a_peer_cost_the_origin_nothing(hosts: list[Host], tmp_path: Path) -> None:
    pytest.importorskip("s3fs")
    cases.lake(hosts, tmp_path, "tcp", writer=False, reader=False)


def test_a_lender_is_killed(hosts: list[Host], tmp_path: Path, transport: str) -> None:
    cases.killed(hosts, tmp_path, transport, share=transport == "tcp", moments=1, step_s=0.3, **SLOW)


def test_a_reader_is_killed(hosts: list[Host], tmp_path: Path) -> None:
    cases.reader_killed(hosts, tmp_path, "tcp", share=False, moments=1, step_s=0.3, **SLOW)


@pytest.mark.parametrize("which", ["lender", "reader"])
def test_one_hangs(hosts: list[Host], tmp_path: Path, which: str) -> None:
    cases.hung(hosts, tmp_path, "tcp", share=False, which=which, after_s=0.1, **SLOW)


def test_the_network_is_cut_and_restored(tmp_path: Path) -> None:
    if why := netns.why_not(rate=True):
        pytest.skip(why)
    with machines(2, tmp_path, rate_bytes_s=125e6) as apart:
        cases.severed(apart, tmp_path, "tcp", share=False, after_s=0.05, chain=CHAIN)


def test_a_rate_is_kept(hosts: list[Host], tmp_path: Path) -> None:
    cases.paced(hosts, tmp_path, "tcp", rate_bytes_s=60e6, count=64)


@pytest.mark.parametrize("skew_s", [18_000.0, -18_000.0], ids=["ahead", "behind"])
def test_clocks_differ(hosts: list[Host], tmp_path: Path, skew_s: float) -> None:
    cases.skewed(hosts, tmp_path, "tcp", skew_s=skew_s)


def test_a_stranger_is_not_let_in(hosts: list[Host], tmp_path: Path) -> None:
    cases.stranger(hosts, tmp_path, "tcp")


@pytest.mark.parametrize("whole", [False, True], ids=["many calls", "one call"])
def test_more_is_published_than_there_is_memory_for(hosts: list[Host], tmp_path: Path, whole: bool) -> None:
    crowd.published(hosts, tmp_path, "tcp", requests=FEW, whole=whole)


def test_more_is_pulled_than_there_is_memory_for(hosts: list[Host], tmp_path: Path) -> None:
    crowd.pulled(hosts, tmp_path, "tcp", requests=FEW)


def test_what_was_published_stays_pinned_until_it_is_taken(hosts: list[Host], tmp_path: Path) -> None:
    crowd.pinned(hosts, tmp_path, "tcp", requests=FEW)


def test_a_consumer_is_killed_while_it_pulls(hosts: list[Host], tmp_path: Path) -> None:
    crowd.consumer_killed(hosts, tmp_path, "tcp", requests=FEW, after_s=0.05)


def test_what_was_evicted_is_read_back_from_the_peer(hosts: list[Host], tmp_path: Path) -> None:
    crowd.spilled(hosts, tmp_path, "tcp", memory_mib=32)


def test_both_are_full(hosts: list[Host], tmp_path: Path) -> None:
    crowd.both_full(hosts, tmp_path, "tcp", memory_mib=16)
