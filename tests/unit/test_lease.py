"""Leases: pins end exactly once, after the release and after the last view, whichever comes last."""

from __future__ import annotations

import gc

import pytest

from tiercache.buffers import Buffer, new_bytes, part_digests
from tiercache.cpu.tier import MemoryTier
from tiercache.errors import ClosedError
from tiercache.lease import Lease, Pieces, extent_bytes
from tiercache.model import Name, Outcome, all_parts

SIZE = 200_000
STEP = 65536


class Scene:
    """One entry in a memory tier, and a lease on it and on a miss beside it."""

    def __init__(self) -> None:
        self.tier = MemoryTier(8 << 20, segment_bytes=4 << 20)
        self.value = bytes(i % 251 for i in range(SIZE))
        self.location = self.tier.reserve([Name(b"k" * 32)], [SIZE], [STEP])[0]
        self.extent = self.tier.buffers([self.location])[0]
        self.extent.array()[:] = memoryview(self.value)
        self.tier.commit([self.location], [all_parts(SIZE, STEP)], [part_digests(self.extent, STEP)])
        self.ends: list[bool] = []

    def lease(self) -> Lease:
        """A lease whose end is written down."""
        return Lease([Outcome.HIT, Outcome.MISS], [self.location, -1], self.tier, self.ends.append)


def test_release_ends_it_once() -> None:
    scene = Scene()
    with scene.lease() as lease:
        assert not scene.ends
    lease.release()
    assert scene.ends == [True]
    with pytest.raises(ClosedError, match="released"):
        lease.view(0)


def test_views_outlive_the_release_and_end_it() -> None:
    scene = Scene()
    lease = scene.lease()
    array, view = lease.array(0), lease.view(0)
    part = array[100:200][::2]
    lease.release()
    del array
    assert bytes(view) == scene.value
    assert not view.contiguous or view.readonly
    del view
    assert not scene.ends
    assert part[0] == scene.value[100]
    del part
    gc.collect()
    assert scene.ends == [False]


def test_a_forgotten_lease_ends_when_collected() -> None:
    scene = Scene()
    lease = scene.lease()
    del lease
    gc.collect()
    assert scene.ends == [False]


def test_a_miss_cannot_be_looked_at() -> None:
    scene = Scene()
    with scene.lease() as lease, pytest.raises(KeyError, match="MISS"):
        lease.array(1)
    assert scene.ends == [True]


@pytest.mark.parametrize("span", [(0, SIZE), (0, 1), (65_535, 65_537), (65_536, 131_072), (SIZE - 1, SIZE), (7, 7)])
def test_copies_are_exact_and_verified(span: tuple[int, int]) -> None:
    scene = Scene()
    start, stop = span
    with scene.lease() as lease:
        for verify in (True, False):
            data, target = new_bytes(stop - start)
            assert lease.copy_into(0, start, stop, target, verify=verify) is Outcome.HIT
            assert data == scene.value[start:stop]


def test_damage_is_found_in_every_part_that_is_touched() -> None:
    scene = Scene()
    scene.extent.array()[70_000] ^= 1
    with scene.lease() as lease:
        for span, outcome in [((0, 65_536), Outcome.HIT), ((0, 65_537), Outcome.CORRUPT), ((0, SIZE), Outcome.CORRUPT)]:
            target = Buffer.of(bytearray(SIZE), writable=True)
            assert lease.copy_into(0, *span, target) is outcome


def test_what_is_held_counts_in_whole_blocks() -> None:
    assert [extent_bytes(size) for size in (0, 1, 4096, 4097, SIZE)] == [4096, 4096, 4096, 8192, 200_704]
    scene = Scene()
    with scene.lease() as lease:
        assert lease.held_bytes == 200_704
    assert lease.held_bytes == 0


@pytest.mark.parametrize("most", [0, 1, 3, 4, 100])
def test_a_batch_comes_in_pieces_that_can_be_held(most: int) -> None:
    """Each item once, in order, in pieces as large as they may be; where even one is too much, few questions more."""
    busy, hit = Outcome.BUSY, Outcome.HIT
    outcomes: list[Outcome] = [Outcome.FULL] * 40
    asked = 0
    order: list[int] = []
    pieces = Pieces(range(40))
    for piece in pieces:
        asked += 1
        for i in piece:
            outcomes[i] = hit if len(piece) <= most else busy
        if not pieces.refused(piece, outcomes):
            order += piece
    assert order == list(range(40))
    assert outcomes == [hit if most else busy] * 40
    assert asked <= (14 if not most else 80)
    assert list(Pieces([])) == []
