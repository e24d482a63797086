"""Bit rot and truncation in every kind of file of an SSD directory: known, counted, never served."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tiercache.buffers import Buffer, part_digests
from tiercache.errors import ProtocolError, UnavailableError
from tiercache.model import Outcome
from tiercache.ssd import recover
from tiercache.ssd.fsck import fsck
from tiercache.ssd.records import BLOCK_BYTES, split_location
from tiercache.ssd.tier import SsdTier
from tiercache.testing.tiers import Item, fetch, item, store

if TYPE_CHECKING:
    from collections.abc import Iterator

CAPACITY_BYTES = 16 << 20
TRIES = 6
DAMAGE_COUNTERS = (
    "corrupt",
    "rows_damaged",
    "rows_lost",
    "format_damaged",
    "segments_truncated",
    "segments_missing",
    "witness_damaged",
)


def open_tier(path: Path) -> SsdTier:
    """The same each time."""
    return SsdTier(str(path), CAPACITY_BYTES, segment_bytes=1 << 20)


class Made(NamedTuple):
    """A closed directory with entries in it, and where they are."""

    path: Path
    items: dict[bytes, Item]
    places: dict[bytes, int]


@pytest.fixture(scope="module")
def ram(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in memory where the system has one: damage is the same there, and a sync costs nothing."""
    if Path("/dev/shm").is_dir():
        with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
            yield Path(name)
    else:
        yield tmp_path_factory.mktemp("ram")


@pytest.fixture(scope="module")
def made(ram: Path) -> Made:
    """Segments with merged rows and with many, made in two lives, so that rows are in tables and in logs."""
    path = ram / "made"
    items = {i.payload.name.key: i for i in (item(seed, 10_000 + 3000 * seed, 8192) for seed in range(60))}
    places: dict[bytes, int] = {}

    async def build(part: list[Item]) -> None:
        tier = open_tier(path)
        for start in range(0, len(part), 10):
            batch = part[start : start + 10]
            places.update(zip([i.payload.name.key for i in batch], await store(tier, batch), strict=True))
            await tier.flush()
        await tier.close()

    everything = list(items.values())
    asyncio.run(build(everything[:40]))
    asyncio.run(build(everything[40:]))
    assert min(places.values()) >= 0
    return Made(path, items, places)


async def survey(path: Path, made: Made) -> tuple[int, dict[str, int]]:
    """Opens, reads all that is found, writes one more, opens again: right bytes or none. Hits, and the counters."""
    tier = open_tier(path)
    hits = 0
    for facts in tier.scan():
        for row in range(len(facts.keys)):
            one = made.items[facts.keys[row, : int(facts.widths[row])].tobytes()]
            ((outcome, data),) = await fetch(tier, [one.want(int(facts.locations[row]))])
            assert outcome in (Outcome.HIT, Outcome.MISS, Outcome.CORRUPT)
            if outcome == Outcome.HIT:
                assert data == one.data
                hits += 1
    status = tier.status()
    assert status.used_bytes <= status.capacity_bytes
    new = item(1000, 50_000)
    (location,) = await store(tier, [new])
    assert location >= 0
    assert await fetch(tier, [new.want(location)]) == [(Outcome.HIT, new.data)]
    try:
        await tier.flush()
    except UnavailableError:
        assert tier.status().reason
    await tier.close()
    return hits, tier.counters


def kinds(path: Path) -> dict[str, list[Path]]:
    """Files by kind; numbers in names do not make a kind."""
    found: dict[str, list[Path]] = {}
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        kind = "".join(letter for letter in file.name if not letter.isdigit())
        found.setdefault(f"{file.parent.name}/{kind}", []).append(file)
    return found


def test_every_kind_of_file_is_there(made: Made) -> None:
    """What the other tests damage."""
    names = " ".join(kinds(made.path))
    for part in ("FORMAT", "LOCK", ".seg", ".sst", ".log", "MANIFEST", "CURRENT"):
        assert part in names, names


@pytest.mark.slow
@pytest.mark.parametrize("how", ["flip", "truncate"])
def test_damage_is_known_and_never_served(made: Made, ram: Path, how: str) -> None:
    """Any file but a segment: all entries are found, or the loss is counted; no wrong byte, and it works on."""
    rng = random.Random(how)
    for kind, files in kinds(made.path).items():
        if kind.startswith("segments/"):
            continue
        for turn in range(TRIES):
            path = ram / "copy"
            shutil.copytree(made.path, path)
            target = path / rng.choice(files).relative_to(made.path)
            damage(target, how, rng)
            hits, counters = asyncio.run(survey(path, made))
            known = sum(counters[name] for name in DAMAGE_COUNTERS)
            assert hits == len(made.items) or known, (kind, turn, hits)
            shutil.rmtree(path)


def damage(target: Path, how: str, rng: random.Random) -> None:
    """Flips a bit, or cuts the end off; an empty file gets rubbish instead."""
    content = bytearray(target.read_bytes())
    if not content:
        target.write_bytes(rng.randbytes(100))
    elif how == "flip":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        target.write_bytes(content)
    else:
        os.truncate(target, rng.randrange(len(content)))


@pytest.mark.slow
def test_flips_in_records_are_corrupt(made: Made, ram: Path) -> None:
    """A flip anywhere in a header or a payload: that entry, and only that, is corrupt, counted, and gone for good."""
    rng = random.Random(5)
    path = ram / "copy"
    shutil.copytree(made.path, path)
    victims = rng.sample(sorted(made.items), 25)
    for turn, key in enumerate(victims):
        number, _, block = split_location(made.places[key])
        offset = rng.randrange(100) if turn % 3 == 0 else BLOCK_BYTES + rng.randrange(made.items[key].payload.size)
        with open(recover.segment_path(str(path), number), "r+b") as file:
            file.seek(block * BLOCK_BYTES + offset)
            (byte,) = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1 << rng.randrange(8)]))
    report = fsck(str(path))
    assert (report.corrupt, report.records, report.clean) == (len(victims), 60 - len(victims), False)
    hits, counters = asyncio.run(survey(path, made))
    assert (hits, counters["corrupt"]) == (60 - len(victims), len(victims))
    made_more = {**made.items, item(1000, 50_000).payload.name.key: item(1000, 50_000)}
    hits, counters = asyncio.run(survey(path, made._replace(items=made_more)))
    assert (hits, counters["corrupt"]) == (61 - len(victims), 0), "what was corrupt came back"
    shutil.rmtree(path)


@pytest.mark.slow
def test_truncated_and_missing_segments(made: Made, ram: Path) -> None:
    """What was in the part that is gone is corrupt or a miss; the rest is served."""
    rng = random.Random(6)
    for turn, file in enumerate(kinds(made.path)["segments/.seg"] * 2):
        path = ram / "copy"
        shutil.copytree(made.path, path)
        target = path / file.relative_to(made.path)
        length = rng.randrange(200 << 10)
        target.unlink() if turn % 2 else os.truncate(target, length)
        hits, counters = asyncio.run(survey(path, made))
        assert hits < len(made.items)
        assert counters["segments_missing"] + counters["segments_truncated"] == 1
        shutil.rmtree(path)


def test_another_format_version_says_so(made: Made, ram: Path) -> None:
    """Older or newer: refused with a text that names both versions; nothing is touched."""
    for version in ("0", "2", "1000"):
        path = ram / version
        shutil.copytree(made.path, path)
        text = (
            (path / "FORMAT")
            .read_bytes()
            .rpartition(b"check ")[0]
            .replace(b"version 1\n", f"version {version}\n".encode())
        )
        content = text + f"check {recover.xxhash.xxh3_64_hexdigest(text)}\n".encode()
        (path / "FORMAT").write_bytes(content)
        before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
        with pytest.raises(
            ProtocolError, match=f"format version {version}, and this tiercache reads and writes version 1"
        ):
            open_tier(path)
        with pytest.raises(ProtocolError):
            fsck(str(path), repair=True)
        assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == before


def test_user_bytes_that_look_like_a_record_are_never_revived(tmp_path: Path) -> None:
    """A payload that holds a whole segment of the same directory: fsck takes nothing in it for a record."""

    async def build() -> bytes:
        tier = open_tier(tmp_path)
        await store(tier, [item(seed, 30_000) for seed in range(8)])
        await tier.flush()
        content = Path(recover.segment_path(str(tmp_path), 0)).read_bytes()[: 300 << 10]
        step = item(99, len(content)).payload.part_bytes
        digests = part_digests(Buffer.of(content), step)
        forged = replace(item(99, len(content)).payload, digests=digests)
        (location,) = await tier.write([forged], [Buffer.of(content)])
        await tier.flush()
        await tier.close()
        assert location >= 0
        return content

    asyncio.run(build())
    shutil.rmtree(tmp_path / "rows")
    report = fsck(str(tmp_path), repair=True)
    assert (report.orphans, report.revived) == (9, 9)
