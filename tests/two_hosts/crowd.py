"""Cases with many requests at once (DistServe: a prefill host and a decode host with little room), and of what one host
has no room for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.two_hosts.cases import IN_TIME_S, Pause
from tests.two_hosts.ends import End, Host, ends
from tiercache.settings import MIB

BLOCKS, SIZE = 8, 256 << 10
"""Of one request."""
ROOM = 20
"""Requests that the consumer's memory holds."""


def _pair(hosts: list[Host], home: Path, transport: str, requests: int, **more: Any) -> tuple[End, End]:
    """A producer that holds all requests, and a consumer that holds ROOM, and the rest on its SSD."""
    whole = requests * BLOCKS * SIZE
    producer = End(hosts[0], home, share=False, transport=transport, memory_bytes=int(whole * 1.3) + 8 * MIB, **more)
    room = int(ROOM * BLOCKS * SIZE / 0.95) + MIB
    consumer = End(
        hosts[1], home, share=False, transport=transport, memory_bytes=room, queue_bytes=room // 2,
        ssd_bytes=int(whole * 1.5) + 160 * MIB, **more,
    )  # fmt: skip
    return producer, consumer


def _within(most: dict[str, int]) -> str:
    """Nothing was ever over its cap."""
    for what in ("memory", "gate", "quota"):
        assert most[what] <= most[f"{what}_cap"], (what, most)
    return f"memory {most['memory'] / MIB:.0f} of {most['memory_cap'] / MIB:.0f} MiB"


def published(hosts: list[Host], home: Path, transport: str, *, requests: int, whole: bool = False) -> str:
    """All requests are published at once: the consumer has every one, and nothing is ever over its cap."""
    producer, consumer = _pair(hosts, home, transport, requests)
    with ends(producer, consumer):
        producer.open(consumer), consumer.open(producer)
        producer.met(1)
        assert producer.put_requests("request", requests, BLOCKS, SIZE) == requests
        producer.sample(), consumer.sample()
        said = producer.publish("request", requests, BLOCKS, consumer.name, whole)
        most, sent = consumer.sampled(), producer.sampled()
        assert said["taken"] == requests * BLOCKS, (said, most, sent)
        room, _ = _within(most), _within(sent)
        free = producer.unpinned()
        assert free["free"], free
        producer.kill()  # from now on there is what the consumer has
        consumer.met(0)
        found = consumer.count("match", "request", requests, BLOCKS, SIZE)
        assert found == {"right": requests, "wrong": 0}, found
        size = requests * BLOCKS * SIZE
        return f"{requests} of {requests}, {size / 1e6 / said['seconds']:.0f} MB/s, {room}, {most['looks']} looks"


def pulled(hosts: list[Host], home: Path, transport: str, *, requests: int) -> str:
    """All requests are announced, and as many readers pull them at once."""
    producer, consumer = _pair(hosts, home, transport, requests)
    with ends(producer, consumer):
        producer.open(consumer), consumer.open(producer)
        consumer.met(1)
        assert producer.put_requests("request", requests, BLOCKS, SIZE) == requests
        assert consumer.known(f"request {requests - 1}", BLOCKS)
        producer.sample(), consumer.sample()
        found = consumer.pull("request", requests, BLOCKS, SIZE)
        most, sent = consumer.sampled(), producer.sampled()
        assert (found["right"], found["wrong"]) == (requests, 0), (found, most, sent)
        room, _ = _within(most), _within(sent)
        assert producer.unpinned()["free"]
        size = requests * BLOCKS * SIZE
        return (
            f"{requests} of {requests}, {size / 1e6 / found['seconds']:.0f} MB/s, {room}, {found['again']} looks again"
        )


def pinned(hosts: list[Host], home: Path, transport: str, *, requests: int) -> str:
    """What was published stays pinned while the consumer is halted, whatever the producer does; then it is taken."""
    producer, consumer = _pair(hosts, home, transport, requests, peer_deadline_s=15.0)
    with ends(producer, consumer):
        producer.open(consumer), consumer.open(producer)
        producer.met(1)
        assert producer.put_requests("request", requests, BLOCKS, SIZE) == requests
        consumer.stop()
        producer.publish_soon("request", requests, BLOCKS, consumer.name)
        least = min(requests // 4, 20) * BLOCKS * SIZE
        assert producer.holds(least) >= least
        producer.call("evict", down_to=0)
        producer.put_requests("other", min(requests, 20), BLOCKS, SIZE)  # takes what is free now
        held = producer.holds(1)
        consumer.go_on()
        said = producer.published()
        assert said["taken"] * SIZE >= held >= least, (said, held)
        assert producer.unpinned()["free"]
        producer.kill()
        consumer.met(0)
        found = consumer.count("match", "request", requests, BLOCKS, SIZE)
        assert found["wrong"] == 0 and found["right"] * BLOCKS <= said["taken"], (found, said)
        assert found["right"] * BLOCKS * SIZE >= least, (found, said)
        return f"{held / MIB:.0f} MiB stayed pinned while all else was evicted, and all of it came"


def consumer_killed(hosts: list[Host], home: Path, transport: str, *, requests: int, after_s: float) -> str:
    """The consumer is killed while it pulls: the producer's copies are readable, and soon not pinned."""
    producer, consumer = _pair(hosts, home, transport, requests)
    with ends(producer, consumer):
        producer.open(consumer), consumer.open(producer)
        consumer.met(1)
        assert producer.put_requests("request", requests, BLOCKS, SIZE) == requests
        assert consumer.known(f"request {requests - 1}", BLOCKS)
        consumer.begin("pull", "request", requests, BLOCKS, SIZE)
        producer.holds(1)
        Pause().wait(after_s)
        held = producer.holds(0)
        consumer.kill()
        free = producer.unpinned()
        assert free["free"] and free["seconds"] < IN_TIME_S, free
        found = producer.count("match", "request", requests, BLOCKS, SIZE)
        assert found == {"right": requests, "wrong": 0}, found
        consumer.open(producer)
        again = consumer.pull("request", requests, BLOCKS, SIZE)
        assert (again["right"], again["wrong"]) == (requests, 0), again
        return f"{held / MIB:.0f} MiB pinned when it died, free after {free['seconds']:.2f} s; a new consumer has all"


# -- what there is no room for -----------------------------------------------------------------------------------------


def spilled(hosts: list[Host], home: Path, transport: str, *, memory_mib: int) -> str:
    """Three times its memory, put on a host without SSD, is read back: what had to go went to its peer."""
    # With room between the marks and its end, so that no reader has to evict: nobody then waits to spill.
    marks = {"high_mark": 0.8, "low_mark": 0.7}
    small = End(hosts[0], home, share=False, transport=transport, memory_bytes=memory_mib * MIB, **marks)
    large = End(hosts[1], home, share=False, transport=transport, memory_bytes=4 * memory_mib * MIB)
    count = 3 * memory_mib * MIB // SIZE
    with ends(small, large):
        small.open(large), large.open(small)
        small.met(1)
        small.sample(), large.sample()
        assert small.put_lone("lone", count // 2, SIZE, calm=True) == ["HIT"]
        chains = count // 2 // BLOCKS
        assert small.put_requests("request", chains, BLOCKS, SIZE, calm=True) == chains
        spills = small.stats("tiercache_spills_total").get("tiercache_spills_total", 0)
        lone = small.count_lone("lone", count // 2, SIZE)
        chain = small.count("match", "request", chains, BLOCKS, SIZE)
        room, _ = _within(large.sampled()), _within(small.sampled())
        assert lone["wrong"] == chain["wrong"] == 0, (lone, chain)
        right = lone["right"] + chain["right"] * BLOCKS
        assert spills >= count // 2 and right >= 0.98 * count, (spills, lone, chain, count)
        return f"{right} of {count} entries read back, {spills:.0f} spilled, peer: {room}"


def both_full(hosts: list[Host], home: Path, transport: str, *, memory_mib: int) -> str:
    """Both put three times their memory at once: what is lost is a miss, and no more."""
    pair = [End(host, home, share=False, transport=transport, memory_bytes=memory_mib * MIB) for host in hosts[:2]]
    count = 3 * memory_mib * MIB // SIZE
    with ends(*pair):
        pair[0].open(pair[1]), pair[1].open(pair[0])
        pair[0].met(1)
        for number, end in enumerate(pair):
            end.sample()
            end.begin("put_lone", f"lone {number}", count, SIZE, calm=True)
        for end in pair:
            assert end.end() == ["HIT"]
        right = []
        for number, end in enumerate(pair):
            found = end.count_lone(f"lone {number}", count, SIZE)
            assert found["wrong"] == 0, found
            right.append(found["right"])
            assert end.put_lone("another", 1, SIZE) == ["HIT"]
        for end in pair:
            _within(end.sampled())
            assert end.unpinned()["free"]
        assert min(right) > count // 6, right
        return f"{right[0]} and {right[1]} of {count} entries each are left, the rest are misses"
