"""The fault wrappers do what they say, and nothing that their ports forbid."""

from __future__ import annotations

import asyncio
import errno
import random

import pytest

from tiercache.buffers import Buffer, part_digests
from tiercache.errors import ChangedError, OriginError, UnavailableError
from tiercache.model import Name, Outcome, Payload, all_parts
from tiercache.origin import Span
from tiercache.testing.faults import Dice, Fault, FaultyOrigin, FaultyTier, Script, faulty
from tiercache.testing.model import DictOrigin, made_bytes
from tiercache.testing.simloop import DeadlockError, SimLoop, simulate
from tiercache.tier import Health, TierStatus, Want

PART = 64


class DictTier:
    """The smallest honest tier."""

    name = "dict"

    def __init__(self) -> None:
        self.kept: dict[int, tuple[Payload, bytes]] = {}
        self.count = 0
        self.closed = False

    async def write(self, payloads, sources):
        locations = []
        for payload, source in zip(payloads, sources):
            self.count += 1
            self.kept[self.count] = (payload, bytes(source))
            locations.append(self.count)
        return locations

    async def read(self, wants, targets, digests=None):
        outcomes = []
        for want, target in zip(wants, targets):
            found = self.kept.get(want.location)
            if found is not None:
                target.view()[:] = found[1]
            outcomes.append(Outcome.MISS if found is None else Outcome.HIT)
        return outcomes

    def free(self, locations):
        for location in locations:
            self.kept.pop(location, None)

    def scan(self):
        return iter(())

    async def flush(self): ...

    async def close(self):
        self.closed = True

    def status(self):
        used = sum(len(data) for _, data in self.kept.values())
        return TierStatus(self.name, Health.HEALTHY, 1 << 30, used, 0, 0)


def _payload(ordinal: int, data: bytes) -> Payload:
    return Payload(
        Name(b"k" * 16, ordinal), len(data), PART, all_parts(len(data), PART), part_digests(Buffer.of(data), PART)
    )


def _values(count: int) -> list[bytes]:
    return [made_bytes(i, 3 * PART) for i in range(count)]


async def _write(tier, values):
    return await tier.write([_payload(i, v) for i, v in enumerate(values)], [Buffer.of(v) for v in values])


async def _read(tier, locations, values, parts=0b111):
    wants = [Want(at, Name(b"k" * 16, i), len(v), PART, parts) for i, (at, v) in enumerate(zip(locations, values))]
    targets = [bytearray(len(v)) for v in values]
    outcomes = await tier.read(wants, [Buffer.of(t, writable=True) for t in targets])
    return outcomes, targets


def test_without_faults_a_wrapper_is_its_inner_tier() -> None:
    async def main(loop: SimLoop) -> None:
        tier = faulty(DictTier(), Script({}))
        values = _values(3)
        outcomes, targets = await _read(tier, await _write(tier, values), values)
        assert outcomes == [Outcome.HIT] * 3
        assert targets == values
        assert tier.status().used_bytes == 3 * 3 * PART
        await tier.flush()
        await tier.close()
        assert tier.inner.closed
        assert tier.calls == {"write": 1, "read": 1, "flush": 1}

    simulate(main, 0)


def test_errors_come_before_or_after_the_deed() -> None:
    async def main(loop: SimLoop) -> None:
        inner = DictTier()
        tier = FaultyTier(inner, Script({"write": [Fault.ERROR, Fault.NO_SPACE, Fault.LATE_ERROR]}))
        with pytest.raises(UnavailableError):
            await _write(tier, _values(1))
        with pytest.raises(OSError, match="no space") as caught:
            await _write(tier, _values(1))
        assert caught.value.errno == errno.ENOSPC
        assert not inner.kept
        with pytest.raises(UnavailableError):
            await _write(tier, _values(1))
        assert len(inner.kept) == 1

    simulate(main, 0)


def test_refused_items_are_not_written_and_others_are() -> None:
    async def main(loop: SimLoop) -> None:
        inner = DictTier()
        tier = FaultyTier(inner, Script({"write": [Fault.FULL, Fault.BUSY]}))
        values = _values(8)
        for outcome in (Outcome.FULL, Outcome.BUSY):
            inner.kept.clear()
            locations = await _write(tier, values)
            assert outcome in locations
            assert {at for at in locations if at >= 0} == set(inner.kept)
            for at, value in zip(locations, values):
                assert at == outcome or inner.kept[at][1] == value

    simulate(main, 0)


def test_bad_reads_scribble_only_wanted_parts() -> None:
    async def main(loop: SimLoop) -> None:
        tier = FaultyTier(DictTier(), Script({"read": [Fault.SHORT, Fault.CORRUPT, Fault.VANISH, Fault.BUSY]}))
        values = _values(1)
        locations = await _write(tier, values)
        for outcome in (Outcome.MISS, Outcome.CORRUPT, Outcome.MISS, Outcome.BUSY):
            outcomes, targets = await _read(tier, locations, values, parts=0b110)
            assert outcomes == [outcome]
            assert targets[0] != values[0]
            assert targets[0][:PART] == values[0][:PART]
        outcomes, targets = await _read(tier, locations, values)
        assert outcomes == [Outcome.HIT]
        assert targets == values

    simulate(main, 0)


def test_what_vanished_is_a_miss() -> None:
    async def main(loop: SimLoop) -> None:
        tier = FaultyTier(DictTier(), Script({"write": [Fault.VANISH]}))
        values = _values(1)
        locations = await _write(tier, values)
        assert locations[0] >= 0
        assert (await _read(tier, locations, values))[0] == [Outcome.MISS]

    simulate(main, 0)


def test_a_stalled_tier_hangs_until_it_is_cancelled() -> None:
    async def main(loop: SimLoop) -> float:
        tier = FaultyTier(DictTier(), Script({"flush": [Fault.STALL]}))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await tier.flush()
        return loop.time()

    assert simulate(main, 0) == pytest.approx(5)

    async def hang(loop: SimLoop) -> None:
        await FaultyTier(DictTier(), Script({"flush": [Fault.STALL]})).flush()

    with pytest.raises(DeadlockError):
        simulate(hang, 0)


def test_dice_are_repeatable_and_can_be_switched_off() -> None:
    rates = {Fault.ERROR: 0.2, Fault.DELAY: 0.3}
    first, second = (Dice(random.Random(4), rates, ["read"]) for _ in range(2))
    drawn = [first.draw("read") for _ in range(500)]
    assert drawn == [second.draw("read") for _ in range(500)]
    assert drawn.count(Fault.ERROR) == pytest.approx(100, abs=40)
    assert drawn.count(None) == pytest.approx(250, abs=60)
    assert first.draw("write") is None
    first.on = False
    assert {first.draw("read") for _ in range(100)} == {None}


def test_an_unhealthy_status_can_be_injected() -> None:
    tier = FaultyTier(DictTier(), Script({}))
    tier.health = Health.OFF
    assert tier.status() == TierStatus("dict", Health.OFF, 1 << 30, 0, 0, 0, "injected")


def test_origin_faults_leave_targets_undefined_and_say_what_to_do() -> None:
    faults = [Fault.ERROR, Fault.SHORT, Fault.CORRUPT, Fault.CHANGED, Fault.STALL, Fault.LATE_ERROR]
    expected = [UnavailableError, UnavailableError, OriginError, ChangedError, UnavailableError, UnavailableError]

    async def main(loop: SimLoop) -> None:
        origin = FaultyOrigin(DictOrigin(), Script({"read": faults, "stat": [Fault.GONE]}), deadline_s=30)
        data = made_bytes("object", 1000)
        stat = origin.inner.set("a/b", data)
        assert await origin.stat(["a/b"]) == [Outcome.GONE]
        assert await origin.stat(["a/b"]) == [stat]
        for error in expected:
            before = loop.time()
            with pytest.raises(error):
                await origin.read(stat, Span(0, 100), [Buffer.of(bytearray(100), writable=True)])
            assert loop.time() - before <= 30
        head, tail = bytearray(60), bytearray(40)
        await origin.read(stat, Span(5, 100), [Buffer.of(head, writable=True), Buffer.of(tail, writable=True)])
        assert head + tail == data[5:105]
        assert origin.requests["a/b"] == len(faults) + 1

    simulate(main, 0)


def test_a_rewritten_object_is_another_version() -> None:
    async def main(loop: SimLoop) -> None:
        origin = DictOrigin()
        old = origin.set("d/x", b"old")
        origin.set("d/e/y", b"other")
        new = await origin.write("d/x", b"newer")
        assert old.version != new.version
        with pytest.raises(ChangedError):
            await origin.read(old, Span(0, 3), [Buffer.of(bytearray(3), writable=True)])
        assert await origin.read_tail("d/x", 2) == (new, b"er")
        assert [(stat.path, stat.is_directory) for stat in await origin.list("d")] == [("d/e", True), ("d/x", False)]
        assert await origin.delete(["d/x", "d/x"]) == [Outcome.HIT, Outcome.GONE]
        assert await origin.list("q") == Outcome.GONE

    simulate(main, 0)
