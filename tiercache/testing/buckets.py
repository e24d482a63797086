"""A bucket in memory with every fault that a bucket can have, which counts its bytes at every instant; and blocks to
put into buckets, whose bytes follow from their numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tiercache.buffers import Buffer, part_digests
from tiercache.errors import OriginError, UnavailableError
from tiercache.model import Form, Kind, Name, Outcome, Payload, all_parts
from tiercache.testing.model import made_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from random import Random

    from tiercache.clock import Clock
    from tiercache.remote.blocks import RemoteBlocks

PART_BYTES = 4096


class MemoryBucket:
    """See remote.bucket.Bucket. Several writers may share one: `door` gives each a view with faults of its own."""

    place = "memory"

    def __init__(self, limit_bytes: int = 1 << 62) -> None:
        """Refuses, with AssertionError, to hold more than `limit_bytes`."""
        self.objects: dict[str, bytes] = {}
        self.limit_bytes = limit_bytes
        self.used_bytes = self.used_bytes_max = 0
        self.conditional = True
        """Whether `create` means anything."""

    def put(self, key: str, data: bytes | bytearray, *, create: bool = False) -> bool:
        """See Bucket."""
        if create and self.conditional and key in self.objects:
            return False
        self.used_bytes += len(data) - len(self.objects.get(key, b""))
        self.used_bytes_max = max(self.used_bytes_max, self.used_bytes)
        assert self.used_bytes <= self.limit_bytes, f"{self.used_bytes} bytes, at most {self.limit_bytes}"
        self.objects[key] = bytes(data)
        return True

    def get(self, key: str, start: int = 0, length: int | None = None) -> memoryview | None:
        """See Bucket."""
        data = self.objects.get(key)
        if data is None:
            return None
        found = memoryview(data)[start : None if length is None else start + length]
        if length is not None and len(found) != length:
            raise UnavailableError(f"{key}: asked for {length} bytes, got {len(found)}")
        return found

    def list(self, prefix: str) -> Sequence[tuple[str, int]]:
        """See Bucket."""
        return [(key, len(data)) for key, data in sorted(self.objects.items()) if key.startswith(prefix)]

    def delete(self, keys: Sequence[str]) -> None:
        """See Bucket."""
        for key in keys:
            self.used_bytes -= len(self.objects.pop(key, b""))


class FaultyBucket:
    """A client's way to a bucket that others use too. Rates are chances of one call: `fail` before it happened,
    `fail_after` it did, `late` of a PUT that happens after all, later; `refuse`: it is denied."""

    place = "memory"

    def __init__(self, bucket: MemoryBucket, random: Random, clock: Clock, *, late_s: float = 20.0) -> None:
        """`late_s`: a PUT that seemed to fail may happen so long afterwards."""
        self._bucket, self._random, self._clock, self._late_s = bucket, random, clock, late_s
        self.fail = self.fail_after = self.refuse = self.late = 0.0
        self.down = False
        self._pending: list[tuple[float, str, bytes, bool]] = []

    def settle(self) -> None:
        """What was late and has become due happens."""
        due = [one for one in self._pending if one[0] <= self._clock.monotonic()]
        self._pending = [one for one in self._pending if one not in due]
        for _, key, data, create in due:
            self._bucket.put(key, data, create=create)

    def put(self, key: str, data: bytes | bytearray, *, create: bool = False) -> bool:
        """See Bucket."""
        self._before()
        if self._random.random() < self.late:
            when_s = self._clock.monotonic() + self._random.uniform(0, self._late_s)
            self._pending.append((when_s, key, bytes(data), create))
            raise UnavailableError(f"{key}: no answer")
        made = self._bucket.put(key, data, create=create)
        self._after()
        return made

    def get(self, key: str, start: int = 0, length: int | None = None) -> memoryview | None:
        """See Bucket."""
        self._before()
        return self._bucket.get(key, start, length)

    def list(self, prefix: str) -> Sequence[tuple[str, int]]:
        """See Bucket."""
        self._before()
        return self._bucket.list(prefix)

    def delete(self, keys: Sequence[str]) -> None:
        """See Bucket."""
        self._before()
        self._bucket.delete(keys)
        self._after()

    def _before(self) -> None:
        self.settle()
        if self.down or self._random.random() < self.fail:
            raise UnavailableError("no answer")
        if self._random.random() < self.refuse:
            raise OriginError("access denied")

    def _after(self) -> None:
        if self._random.random() < self.fail_after:
            raise UnavailableError("no answer")


def made_block(number: int, parts: int = 5) -> tuple[Payload, Buffer]:
    """Block `number` of a chain, up to so many parts long, and its bytes."""
    key = number.to_bytes(16, "little")
    source = Buffer.of(made_bytes(Name(key), 1 + 1237 * number % (parts * PART_BYTES)))
    size, digests = source.length, part_digests(source, PART_BYTES)
    parent = (number - 1).to_bytes(16, "little") if number else b""
    payload = Payload(
        Name(key), size, PART_BYTES, all_parts(size, PART_BYTES), digests, Kind.KV, parent,
        cost_s=number % 7, form=Form.BLOCK,
    )  # fmt: skip
    return payload, source


async def put_blocks(
    remote: RemoteBlocks, numbers: Sequence[int], made: Callable[[int], tuple[Payload, Buffer]] = made_block
) -> list[Outcome]:
    """Uploads these blocks as one pack."""
    some = [made(number) for number in numbers]
    return await remote.write([payload for payload, _ in some], [source for _, source in some])


async def read_blocks(
    remote: RemoteBlocks, numbers: Sequence[int], made: Callable[[int], tuple[Payload, Buffer]] = made_block
) -> list[Outcome]:
    """Reads those of these blocks that are found, and compares every byte: HIT where it was right, CORRUPT where that
    was said. Raises AssertionError on a wrong byte."""
    some = [made(number) for number in numbers]
    found = remote.find([payload.name.key for payload, _ in some])
    outcomes = [Outcome.MISS] * len(some)
    there = [i for i, one in enumerate(found) if one is not None]
    targets = [bytearray(some[i][0].size) for i in there]
    answers = await remote.read(
        [one for one in found if one is not None], [Buffer.of(target, writable=True) for target in targets]
    )
    for i, target, (outcome, digests) in zip(there, targets, answers, strict=True):
        outcomes[i] = outcome
        payload, source = some[i]
        right = bytes(target) == bytes(source) and digests == payload.digests
        assert right or outcome is not Outcome.HIT, f"block {numbers[i]} has wrong bytes"
    return outcomes
