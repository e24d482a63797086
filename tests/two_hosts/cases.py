"""Cases: what two hosts owe each other, and what may happen to one of them. Each raises AssertionError where it is not
so, and else says what was seen."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.two_hosts.ends import DEADLINE_S, SLACK_S, End, Host, ends, origin
from tiercache.peer.gate import BURST_S
from tiercache.settings import MIB

IN_TIME_S = DEADLINE_S + SLACK_S
PORT_FILE_BYTES = 6 * MIB
SLOWEST_S = DEADLINE_S + 192 * MIB / 8 / 20e6 + SLACK_S
"""What a load may take at most: its deadline grows with its bytes."""
CHAIN = (96, 512 << 10)
"""Blocks and bytes of each of a chain that takes a while."""

Pause = threading.Event


def exchange(hosts: list[Host], home: Path, transport: str, *, writer: bool, reader: bool, takes: str = "") -> str:
    """Everything that one has is read on the other, byte for byte. `writer` and `reader`: whether they share."""
    one = End(hosts[0], home, share=writer, transport=transport)
    two = End(hosts[1], home, share=reader, transport=transport)
    with ends(one, two):
        one.open(two), two.open(one)
        (met,) = two.met(1)
        assert met["transport"] == takes or not takes, met
        total = 0
        for what, label, count, size in (
            ("match", "small blocks", 64, 100_000),
            ("match", "blocks", 48, 300_000),
            ("match", "large blocks", 24, MIB),
            ("get", "lone", 200, 20_000),
            ("get", "large lone", 6, 3 * MIB + 17),
        ):
            put = one.put_chain if what == "match" else one.put_lone
            assert put(label, count, size) == ["HIT"]
            found = two.until_all(what, label, count, size)
            assert (found["right"], found["wrong"]) == (count, 0), (label, found)
            total += count * size
        there = two.stats("tiercache_read_bytes_total")['tiercache_read_bytes_total{tier="peer"}']
        assert there >= total, (there, total)
        assert one.unpinned()["free"]
        return f"{total / 1e6:.0f} MB by {met['transport']} ({met['negotiated'] or '?'}), read back and equal"


def lake(hosts: list[Host], home: Path, transport: str, *, writer: bool, reader: bool) -> str:
    """Pages of files that one has read cost the other no request for bytes."""
    # Without tails: with them the request for a file's facts, which only the origin can answer, brings its last bytes.
    one = End(hosts[0], home, share=writer, transport=transport, tail_bytes=0)
    two = End(hosts[1], home, share=reader, transport=transport, tail_bytes=0)
    bucket = home / "s3" / "bucket"
    bucket.mkdir(parents=True, exist_ok=True)
    plain = np.random.default_rng(7).bytes(PORT_FILE_BYTES)
    (bucket / "plain.bin").write_bytes(plain)
    total = _parquet(bucket / "table.parquet")
    apart = hosts[0].address.startswith("10.")  # each host then has a loopback of its own
    with ends(one, two), origin(hosts[0], home / "s3") as url:
        if not apart:
            return _lake(one, two, url, plain, total)
        with origin(hosts[1], home / "s3") as same:
            assert same == url
            return _lake(one, two, url, plain, total)


def _lake(one: End, two: End, url: str, plain: bytes, total: int) -> str:
    one.open(two), two.open(one)
    two.met(1)
    for end in (one, two):
        end.mount(url, end.settings)
    whole = hashlib.sha256(plain).hexdigest()
    assert one.cat("bucket/plain.bin") == whole
    assert not total or one.column("bucket/table.parquet", "number") == total
    wanted = _origin_bytes(one)
    assert wanted >= len(plain), wanted
    assert one.put_lone("marker", 1, 1000) == ["HIT"]  # announcements come in order: then all pages were announced
    assert two.until_all("get", "marker", 1, 1000)["right"] == 1
    assert two.cat("bucket/plain.bin") == whole
    assert not total or two.column("bucket/table.parquet", "number") == total
    cost = _origin_bytes(two)
    assert not cost, f"{cost} bytes of the origin"
    pages = two.stats("tiercache_hits_total").get('tiercache_hits_total{tier="peer",kind="page"}', 0)
    two.unmount(), one.unmount()
    return f"origin: {wanted / 1e6:.1f} MB to the first host, {cost:.0f} B to the second; {pages:.0f} pages by peer"


def _origin_bytes(end: End) -> float:
    return float(end.origin_stats().get("tiercache_origin_bytes_total", 0))


def _parquet(path: Path) -> int:
    """A table; the sum of its one column; 0 where nothing can write it."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return 0
    numbers = np.random.default_rng(8).integers(0, 1 << 40, 400_000)
    pyarrow.parquet.write_table(pyarrow.table({"number": numbers}), path, compression="none", use_dictionary=False)
    return int(numbers.sum())


# -- what happens to one of them ---------------------------------------------------------------------------------------


def killed(
    hosts: list[Host],
    home: Path,
    transport: str,
    *,
    share: bool,
    chain: tuple[int, int] = CHAIN,
    moments: int,
    step_s: float,
    **reading: Any,
) -> str:
    """The lender is killed in the middle of transfers: what came is right, the rest is a miss, in time, and then
    everything is there again."""
    count, size = chain
    lender = End(hosts[0], home, share=share, transport=transport, ssd_bytes=512 * MIB)
    reader = End(hosts[1], home, share=False, transport=transport, **reading)
    cut = 0
    slowest_s = again_s = 0.0
    with ends(lender, reader):
        lender.open(reader), reader.open(lender)
        assert lender.put_chain("chain", count, size) == ["HIT"]
        lender.flush()
        for moment in range(moments):
            found = reader.until_all("match", "chain", count, size)
            assert (found["right"], found["wrong"]) == (count, 0), found
            again_s = max(again_s, found["waited_s"])
            reader.call("evict", down_to=0)
            pid = reader.pid
            reader.begin("match", "chain", count, size)
            Pause().wait(step_s * (moment + 1))
            lender.kill()
            found = reader.end()
            assert found["wrong"] == 0 and reader.pid == pid, found
            assert found["seconds"] < SLOWEST_S, found
            cut += found["right"] < count
            slowest_s = max(slowest_s, found["seconds"])
            assert reader.put_lone("goes on", 4, 1000) == ["HIT"]
            reader.call("evict", down_to=0)
            if not share:
                lender.open(reader)
            else:
                lender.call("status")  # its user starts another owner
        found = reader.until_all("match", "chain", count, size)
        assert (found["right"], found["wrong"]) == (count, 0), found
    assert cut >= moments // 3, f"only {cut} of {moments} kills came in the middle"
    return f"{cut} of {moments} cut off, slowest answer {slowest_s:.2f} s, back after {again_s:.1f} s at most"


def reader_killed(
    hosts: list[Host],
    home: Path,
    transport: str,
    *,
    share: bool,
    chain: tuple[int, int] = CHAIN,
    moments: int,
    step_s: float,
    **reading: Any,
) -> str:
    """The reader is killed in the middle of transfers: nothing stays pinned at the lender, and the next reader gets
    everything."""
    count, size = chain
    lender = End(hosts[0], home, share=False, transport=transport)
    reader = End(hosts[1], home, share=share, transport=transport, **reading)
    free_s, middle = 0.0, 0
    with ends(lender, reader):
        lender.open(reader), reader.open(lender)
        assert lender.put_chain("chain", count, size) == ["HIT"]
        for moment in range(moments):
            reader.met(1)
            assert reader.known("chain", count)
            reader.begin("match", "chain", count, size)
            Pause().wait(step_s * (moment + 1))
            pid = lender.pid
            middle += any(row["pinned_bytes"] for row in lender.call("peers"))
            reader.kill()
            free = lender.unpinned()
            assert free["free"] and free["seconds"] < IN_TIME_S, free
            assert lender.pid == pid
            free_s = max(free_s, free["seconds"])
            mine = lender.match("chain", count, size)
            assert (mine["right"], mine["wrong"]) == (count, 0), mine
            if share:
                reader.end()
                reader.call("evict", down_to=0)
            else:
                reader.open(lender)
        found = reader.until_all("match", "chain", count, size)
        assert (found["right"], found["wrong"]) == (count, 0), found
    assert middle >= moments // 3, f"only {middle} of {moments} kills came in the middle"
    return f"{middle} of {moments} in the middle, unpinned after {free_s:.2f} s at most, the lender's blocks all right"


def hung(
    hosts: list[Host],
    home: Path,
    transport: str,
    *,
    share: bool,
    chain: tuple[int, int] = CHAIN,
    which: str,
    after_s: float,
    **reading: Any,
) -> str:
    """One is stopped in the middle of a transfer: a miss within the deadline; then it goes on, and all is there."""
    count, size = chain
    lender = End(hosts[0], home, share=share, transport=transport)
    reader = End(hosts[1], home, share=share, transport=transport, **reading)
    with ends(lender, reader):
        lender.open(reader), reader.open(lender)
        assert lender.put_chain("chain", count, size) == ["HIT"]
        reader.met(1)
        assert reader.known("chain", count)
        reader.begin("match", "chain", count, size)
        assert lender.holds(1)
        Pause().wait(after_s)
        halted = lender if which == "lender" else reader
        halted.stop()
        if halted is lender:
            found = reader.end(SLOWEST_S + 10)
            assert found["seconds"] < SLOWEST_S, found
            said = f"{found['right']} of {count} blocks after {found['seconds']:.2f} s"
            lender.go_on()
        else:
            free = lender.unpinned()
            assert free["free"] and free["seconds"] < IN_TIME_S, free
            said = f"unpinned after {free['seconds']:.2f} s"
            reader.go_on()
            found = reader.end(SLOWEST_S + 10)
            said += f", then {found['right']} of {count} blocks"
        assert found["wrong"] == 0, found
        all_there = reader.until_all("match", "chain", count, size)
        assert (all_there["right"], all_there["wrong"]) == (count, 0), all_there
        return f"{said}; all again {all_there['waited_s']:.1f} s after it went on"


def severed(
    hosts: list[Any], home: Path, transport: str, *, share: bool, chain: tuple[int, int] = CHAIN, after_s: float
) -> str:
    """The network is cut in the middle of a transfer, and restored."""
    count, size = chain
    lender = End(hosts[0], home, share=share, transport=transport)
    reader = End(hosts[1], home, share=share, transport=transport)
    with ends(lender, reader):
        lender.open(reader), reader.open(lender)
        assert lender.put_chain("chain", count, size) == ["HIT"]
        reader.met(1)
        assert reader.known("chain", count)
        reader.begin("match", "chain", count, size)
        assert lender.holds(1)
        Pause().wait(after_s)
        hosts[1].cut()
        try:
            found = reader.end(SLOWEST_S + 10)
            assert found["wrong"] == 0 and found["seconds"] < SLOWEST_S, found
            assert lender.unpinned()["free"]
            missed = reader.match("chain", count, size)  # nobody is there any more, and that is known
            assert missed["wrong"] == 0 and missed["seconds"] < IN_TIME_S, missed
        finally:
            hosts[1].restore()
        back = reader.until_all("match", "chain", count, size)
        assert (back["right"], back["wrong"]) == (count, 0), back
        return (
            f"{found['right']} of {count} blocks after {found['seconds']:.2f} s;"
            f" all again {back['waited_s']:.1f} s after it was restored"
        )


# -- limits ------------------------------------------------------------------------------------------------------------


def paced(hosts: list[Host], home: Path, transport: str, *, rate_bytes_s: float, count: int) -> str:
    """What is taken from peers stays under the rate that was set."""
    size = CHAIN[1]
    lender = End(hosts[0], home, share=False, transport=transport)
    reader = End(hosts[1], home, share=False, transport=transport, peer_rate_bytes_s=int(rate_bytes_s))
    with ends(lender, reader):
        lender.open(reader), reader.open(lender)
        assert lender.put_chain("chain", count, size) == ["HIT"]
        assert reader.known("chain", count)
        found = reader.match("chain", count, size)
        assert (found["right"], found["wrong"]) == (count, 0), found
        rate = count * size / found["seconds"]
        assert count * size <= rate_bytes_s * (found["seconds"] + BURST_S), (
            f"{rate / 1e6:.1f} MB/s, cap {rate_bytes_s / 1e6:.1f}"
        )
        return f"{rate / 1e6:.1f} MB/s, cap {rate_bytes_s / 1e6:.1f} MB/s"


def skewed(hosts: list[Host], home: Path, transport: str, *, skew_s: float) -> str:
    """Clocks that differ by hours cost nothing but entries that have a time to live."""
    one = End(hosts[0], home, share=False, transport=transport)
    two = End(hosts[1], home, share=False, transport=transport)
    with ends(one, two):
        one.open(two), two.open(one, skew_s=skew_s)
        assert one.put_chain("chain", 32, 200_000) == ["HIT"]
        assert two.put_chain("back", 32, 200_000) == ["HIT"]
        for end, label in ((two, "chain"), (one, "back")):
            found = end.until_all("match", label, 32, 200_000)
            assert (found["right"], found["wrong"]) == (32, 0), found
        assert one.put_lone("short-lived", 10, 1000, ttl_s=60.0) == ["HIT"]
        assert one.put_lone("marker", 10, 1000) == ["HIT"]
        marker = two.until_all("get", "marker", 10, 1000)
        assert marker["right"] == 10, marker
        short = two.get("short-lived", 10, 1000)
        assert short["wrong"] == 0, short
        assert short["right"] == (0 if skew_s > 0 else 10), short
        return f"chains both ways; {short['right']} of 10 with 60 s to live"


def stranger(hosts: list[Host], home: Path, transport: str) -> str:
    """A cache with another secret is not let in."""
    other = home / "other token"
    other.write_text("another secret, of nobody here")
    one = End(hosts[0], home, share=False, transport=transport)
    two = End(hosts[1], home, share=False, transport=transport)
    third = End(hosts[2], home, share=False, transport=transport, peer_token_file=str(other))
    with ends(one, two, third):
        one.open(two), two.open(one), third.open(one, two)
        assert one.put_chain("chain", 8, 100_000) == ["HIT"]
        found = two.until_all("match", "chain", 8, 100_000)
        assert found["right"] == 8
        Pause().wait(2 * DEADLINE_S)  # it calls again and again
        assert third.call("peers") == []
        assert len(one.call("peers")) == len(two.call("peers")) == 1
        assert third.match("chain", 8, 100_000)["right"] == 0
        return "it saw no peer and got nothing; the two others went on"


Case = Callable[..., str]
