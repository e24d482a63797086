"""The index, one behaviour at a time. tests/model has the long random lives."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest

from tiercache.errors import ConfigError
from tiercache.index import TRANSITIONS, Index
from tiercache.index.pins import PINS_MAX
from tiercache.model import Form, Name, State, TierId
from tiercache.policy.lru import LRU

MEMORY, SSD = TierId.MEMORY, TierId.SSD
PART = 1 << 16


def digest(*path, width=16):
    return hashlib.sha256(repr(path).encode()).digest()[:width]


def chain(count, name="a", width=16):
    return [digest(name, i, width=width) for i in range(count)]


def ordinals(*numbers):
    return np.array(numbers, np.int32)


class Filled:
    """An index and a counter of locations."""

    def __init__(self, slots_max=100):
        self.index = Index(slots_max, [LRU(), LRU()])
        self.next = 0

    def place(self, slots, tier=MEMORY, parts=1):
        where = np.arange(self.next, self.next + len(slots))
        self.next += len(slots)
        assert self.index.place(slots, tier, where, parts) == []
        return where

    def put_chain(self, digests, parent=None, tier=MEMORY, validate=True):
        reservation = self.index.reserve_chain(digests, PART, PART, parent=parent, width=len(digests[0]))
        self.place(reservation.slots[reservation.fresh], tier)
        assert self.index.release(reservation) is None
        if validate:
            self.index.validate()
        return reservation.slots

    def put_pages(self, key, numbers, tier=MEMORY):
        reservation = self.index.reserve_pages(key, ordinals(*numbers), PART, PART)
        self.place(reservation.slots[reservation.fresh], tier)
        assert self.index.release(reservation) is None
        self.index.validate()
        return reservation.slots


@pytest.fixture
def filled():
    return Filled()


def test_transitions_are_what_the_design_says():
    forward = [State.ABSENT, State.PENDING, State.RESIDENT, State.MOVING, State.EVICTING, State.ABSENT]
    for old, new in itertools.pairwise(forward):
        assert new in TRANSITIONS[old]
    assert State.RESIDENT in TRANSITIONS[State.MOVING]
    assert State.RESIDENT not in TRANSITIONS[State.ABSENT]
    assert State.MOVING not in TRANSITIONS[State.PENDING]


@pytest.mark.skipif(not __debug__, reason="asserts are off")
def test_a_forbidden_transition_is_caught(filled):
    slots = filled.put_pages(b"k" * 16, [0])
    with pytest.raises(AssertionError, match="not allowed"):
        filled.index._slots.change(slots, State.PENDING)
    with pytest.raises(AssertionError, match="not allowed"):
        filled.index._slots.change_one(int(slots[0]), State.ABSENT)


@pytest.mark.parametrize("width", [16, 32])
def test_longest_prefix(filled, width):
    index, blocks = filled.index, chain(40, width=width)
    slots = filled.put_chain(blocks)
    match = index.match_chain([*blocks, digest("more", width=width)], width)
    assert match.slots.tolist() == slots.tolist()
    assert index.match_chain(b"".join(blocks[:7]), width).slots.tolist() == slots[:7].tolist()
    assert not len(index.match_chain(blocks[1:], width).slots), "a chain starts at its start"
    assert index.match_chain([blocks[0], blocks[2]], width).slots.tolist() == slots[:1].tolist()
    assert index.match_chain([digest("x", width=width)], width).pin is None
    assert not len(index.match_chain([], width).slots)


@pytest.mark.parametrize("scatter", [1, 3, 16, 200])
def test_scattered_chains_match_as_well(scatter):
    filled = Filled(5000)
    blocks = chain(700)
    for low in range(0, 700, scatter):
        filled.put_chain(blocks[low : low + scatter], blocks[low - 1] if low else None, validate=False)
        filled.put_chain([digest("other", low)], validate=False)
    filled.index.validate()
    assert len(filled.index.match_chain(blocks).slots) == 700
    assert len(filled.index.match_chain([*blocks[:501], digest("no"), *blocks[502:]]).slots) == 501


def test_width_is_part_of_the_key(filled):
    narrow = digest("k")
    filled.put_chain([narrow])
    assert filled.index.hit(narrow + bytes(16)) == -1
    filled.index.reserve([Name(narrow + bytes(16))], 1, PART)
    filled.index.validate()
    assert filled.index.used == 2


def test_branches_share_their_prefix(filled):
    index, blocks = filled.index, chain(10)
    slots = filled.put_chain(blocks)
    other = [*blocks[:4], *chain(3, "b")]
    branch = filled.put_chain(other)
    assert branch[:4].tolist() == slots[:4].tolist()
    assert index.used == 13
    assert index.parents(branch[4:5]) == [blocks[3]]
    assert index.names(branch[4:5]) == [Name(other[4], 4)]
    assert index.parents(slots[:1]) == [b""]
    assert index.forms(slots[:1]).tolist() == [Form.BLOCK]


def test_append_does_not_walk(filled, monkeypatch):
    index, blocks = filled.index, chain(50)
    filled.put_chain(blocks)
    seen = []
    find_key = type(index._names).find_key
    monkeypatch.setattr(type(index._names), "find_key", lambda self, key: seen.append(key) or find_key(self, key))
    made = index.reserve_chain([digest("next")], PART, PART, parent=blocks[-1])
    assert made.fresh.all()
    assert index.depth[made.slots[0]] == 50
    assert seen == [blocks[-1], digest("next")]


def test_append_below_nothing(filled):
    made = filled.index.reserve_chain(chain(3), PART, PART, parent=digest("nobody"))
    assert made.slots.tolist() == [-1] * 3
    assert made.pin is None
    assert filled.index.used == 0


def test_a_full_table_takes_what_fits():
    filled = Filled(5)
    made = filled.index.reserve_chain(chain(8), PART, PART)
    assert (made.slots > 0).tolist() == [True] * 5 + [False] * 3
    filled.place(made.slots[:5])
    filled.index.release(made)
    assert filled.index.reserve_pages(digest("f"), ordinals(0), 1, PART).slots.tolist() == [-1]
    assert filled.index.reserve([Name(digest("l"))], 1, PART).slots.tolist() == [-1]
    filled.index.validate()
    assert not filled.index._names.runs.rows.used


def test_digests_that_repeat_end_the_chain(filled):
    blocks = chain(3)
    made = filled.index.reserve_chain([*blocks, blocks[0], digest("x")], PART, PART)
    assert (made.slots > 0).tolist() == [True, True, True, False, False]
    again = filled.index.reserve_chain([*blocks, digest("y"), blocks[1]], PART, PART)
    assert (again.slots > 0).tolist() == [True] * 4 + [False]
    filled.index.validate()


def test_pages_sparse_and_many(filled):
    index, key = filled.index, digest("file", width=32)
    slots = filled.put_pages(key, [1_000_000, 3, 7])
    match, locations, parts = index.hit_pages(key, ordinals(7, 4, 1_000_000))
    assert match.slots.tolist() == [slots[2], -1, slots[0]]
    assert locations.tolist() == [2, -1, 0]
    assert parts.tolist() == [1, 0, 1]
    assert sorted(index.pages_of(key).tolist()) == sorted(slots.tolist())
    assert index.pages_of(digest("nobody")).tolist() == []
    assert index.match_pages(digest("nobody"), ordinals(1)).slots.tolist() == [-1]
    assert index.match_pages(key, ordinals()).pin is None
    assert index.names(slots[:1]) == [Name(key, 1_000_000)]


def test_facts_of_nothing_are_nothing(filled):
    slots = filled.put_pages(digest("f"), range(5))
    facts = filled.index.facts(np.array([-1, slots[1]]))
    assert facts.state.tolist() == [State.ABSENT, State.RESIDENT]
    assert facts.memory_location.tolist() == [-1, 1]
    assert facts.ssd_location.tolist() == [-1, -1]
    assert facts.size.tolist() == [0, PART]
    filled.index.remove(slots[:1])
    assert filled.index.facts(slots[:1]).memory_location.tolist() == [-1]


def test_names_of_all_forms_in_one_match(filled):
    index, blocks, key = filled.index, chain(3), digest("file", width=32)
    filled.put_chain(blocks)
    filled.put_pages(key, [4])
    lone = Name(digest("lone", width=32))
    made = index.reserve([lone, lone], [5, 6], PART)
    assert made.fresh.tolist() == [True, False]
    filled.place(made.slots[:1])
    names = [Name(key, 4), Name(key, 5), lone, Name(blocks[1], 1), lone, Name(digest("no"))]
    match = index.match(names)
    assert (match.slots > 0).tolist() == [True, False, True, True, True, False]
    assert index.contains(names).tolist() == [True, False, True, True, True, False]
    assert index.pin[match.slots[2]] == 2, "one for the match, one for the reservation"
    assert index.facts(match.slots).size[2] == 5
    index.release(match, made)
    assert index.pins == 0


@pytest.mark.parametrize("key", [b"", b"short", bytes(31)])
def test_keys_have_16_or_32_bytes(filled, key):
    filled.put_pages(digest("f"), [0])
    with pytest.raises(ConfigError, match="16 or 32"):
        filled.index.hit(key or b"x")
    with pytest.raises(ConfigError, match="16 or 32"):
        filled.index.reserve([Name(key or b"x")], 1, PART)
    with pytest.raises(ConfigError, match="must have 16"):
        filled.index.match_chain([bytes(16), bytes(15)])
    with pytest.raises(ConfigError, match="not 8"):
        filled.index.match_chain([bytes(8)], 8)


# -- pins --------------------------------------------------------------------------------------------------------------


def test_a_pinned_leaf_holds_its_chain(filled):
    index, blocks = filled.index, chain(6)
    slots = filled.put_chain(blocks)
    match = index.match_chain(blocks[:4])
    assert index.pin[slots].tolist() == [0, 0, 0, 1, 0, 0], "one count, on the last"
    gone = index.unplace(slots[::-1], MEMORY)
    assert gone.slots.tolist() == slots[:3:-1].tolist()
    assert index.unplace(slots[::-1], MEMORY).slots.tolist() == []
    index.release(match)
    assert index.unplace(slots[::-1], MEMORY).slots.tolist() == slots[3::-1].tolist()
    index.validate()
    assert index.used == 0


def test_a_prefix_that_is_partly_on_ssd_is_pinned_block_by_block(filled):
    index, blocks = filled.index, chain(5)
    slots = filled.put_chain(blocks)
    filled.place(slots, SSD)
    assert index.unplace(slots[2:3], MEMORY).slots.tolist() == [], "a child in memory needs its parent there"
    index.unplace(slots[4:1:-1], MEMORY)
    match = index.match_chain(blocks)
    assert index.pin[slots].tolist() == [1] * 5
    assert not len(index.unplace(slots[::-1], MEMORY).slots)
    index.release(match)
    index.validate()


def test_release_twice_is_harmless(filled):
    slots = filled.put_pages(digest("f"), [0, 1])
    first = filled.index.match_pages(digest("f"), ordinals(0, 1))
    second = filled.index.match_pages(digest("f"), ordinals(0, 1))
    filled.index.release(first, first)
    filled.index.release(first)
    assert filled.index.pin[slots].tolist() == [1, 1]
    filled.index.release(second)
    assert filled.index.pins == 0


def test_pins_are_bounded(filled):
    index, key, blocks = filled.index, digest("f"), chain(1)
    filled.put_pages(key, [0])
    filled.put_chain(blocks)
    slots = [index.hit(key, 0) for _ in range(PINS_MAX)]
    assert min(slots) > 0
    assert index.hit(key, 0) == -1
    assert index.match_chain(blocks).pin is None
    assert index.match_pages(key, ordinals(0)).slots.tolist() == [-1]
    assert index.match([Name(key, 0)]).slots.tolist() == [-1]
    assert index.hit_few(key, [0], [1]) is None
    assert index.reserve_chain(chain(2, "b"), 1, PART).slots.tolist() == [-1, -1]
    assert index.reserve_pages(key, ordinals(1), 1, PART).slots.tolist() == [-1]
    assert index.reserve([Name(digest("l"))], 1, PART).slots.tolist() == [-1]
    assert not index.begin_move(np.array([1])).any()
    for slot in slots:
        index.release_slot(slot)
    index.validate()
    assert index.pins == 0


def test_few_pages_all_or_nothing(filled):
    index, key = filled.index, digest("f")
    slots = filled.put_pages(key, [0, 1, 2])
    assert index.hit_few(key, [0, 2], [1, 1]) == ([slots[0], slots[2]], [0, 2])
    assert index.hit_few(key, [0, 3], [1, 1]) is None
    assert index.hit_few(key, [0, 1], [1, 3]) is None
    assert index.hit_few(digest("no"), [0], [1]) is None
    assert index.pin[slots].tolist() == [1, 0, 1]
    index.remove(slots)
    assert index.release_few([int(slots[0]), int(slots[2])])[:2] == ([0, 2], [])
    assert index.pins == 0
    index.validate()


# -- fillers -----------------------------------------------------------------------------------------------------------


def test_one_filler_many_waiters(filled):
    index, key = filled.index, digest("f")
    first = index.reserve_pages(key, ordinals(0, 1), PART, PART)
    second = index.reserve_pages(key, ordinals(1, 2), PART, PART)
    assert second.fresh.tolist() == [False, True]
    assert index.match_pages(key, ordinals(0, 1, 2)).pin is None, "PENDING is not readable"
    filled.place(first.slots)
    assert (index.match_pages(key, ordinals(0, 1, 2)).slots > 0).tolist() == [True, True, False]
    index.validate()


def test_a_filler_that_goes_without_a_word(filled):
    index, key = filled.index, digest("f")
    first = index.reserve_pages(key, ordinals(0), PART, PART)
    waiter = index.reserve_pages(key, ordinals(0), PART, PART)
    index.release(first)
    assert index.used == 1, "somebody still waits, and may fill it"
    index.release(waiter)
    index.validate()
    assert index.used == 0
    held = index.hold(index.reserve_pages(key, ordinals(0), PART, PART).slots)
    index.validate()
    index.release(held)


def test_abandoned_under_a_child_is_filled_anew(filled):
    index, blocks = filled.index, chain(3)
    slots = filled.put_chain(blocks[:1])
    middle = index.reserve_chain(blocks[1:2], PART, PART, parent=blocks[0])
    last = index.reserve_chain(blocks[2:], PART, PART, parent=blocks[1])
    filled.place(last.slots)
    index.abandon(middle.slots)
    index.release(middle, last)
    index.validate()
    assert index.match_chain(blocks).slots.tolist() == slots.tolist()
    again = index.reserve_chain(blocks, 7, PART)
    assert again.fresh.tolist() == [False, True, False]
    assert index.facts(again.slots).size.tolist() == [PART, 7, PART]
    filled.place(again.slots[1:2])
    assert len(index.match_chain(blocks).slots) == 3
    index.validate()


def test_what_is_removed_while_somebody_looks_is_named(filled):
    index, key = filled.index, digest("f")
    slots = filled.put_pages(key, [0, 1, 2])
    held = index.match_pages(key, ordinals(1))
    assert index.remove(slots) == ([2, 0], [], [1])
    assert index.release(held) == ([1], [], ())
    index.validate()


def test_slots_that_nobody_holds_are_pinned_as_far_as_they_are_readable(filled):
    index, key = filled.index, digest("f")
    slots = filled.put_pages(key, [0, 1])
    pending = index.reserve_pages(key, ordinals(2), PART, PART)
    held = index.hold([*slots.tolist(), *pending.slots.tolist(), 0, int(pending.slots[0]) + 1], readable=True)
    assert held.slots.tolist() == sorted(slots.tolist())
    index.remove(slots)
    again = index.reserve_pages(key, ordinals(0, 1), PART, PART)
    assert again.fresh.all() and not set(again.slots.tolist()) & set(slots.tolist()), "none is anybody else's meanwhile"
    index.release(pending, again, held)
    assert index.used == 0
    index.validate()


def test_deleted_while_it_is_filled(filled):
    index, key = filled.index, digest("f")
    made = index.reserve_pages(key, ordinals(0), PART, PART)
    assert index.remove(made.slots)[:2] == ([], [])
    assert index.place(made.slots, MEMORY, [77], 1) == []
    assert index.match_pages(key, ordinals(0)).pin is None
    again = index.reserve_pages(key, ordinals(0), PART, PART)
    assert again.fresh.all()
    assert again.slots[0] != made.slots[0]
    assert index.release(made)[:2] == ([77], [])
    index.validate()


def test_placing_what_is_gone_or_there(filled):
    index = filled.index
    slots = filled.put_pages(digest("f"), [0, 1])
    assert index.place(slots, MEMORY, [50, 51], 1) == [50, 51]
    index.remove(slots)
    assert index.place(slots, SSD, [60, 61], 1) == [60, 61]
    index.validate()


# -- leaving -----------------------------------------------------------------------------------------------------------


def test_removed_under_a_reader(filled):
    index, blocks = filled.index, chain(4)
    slots = filled.put_chain(blocks)
    match = index.match_chain(blocks)
    assert index.remove(slots[1:2])[:2] == ([], []), "the reader's leaf holds all above it"
    assert index.match_chain(blocks).slots.tolist() == slots[:1].tolist()
    index.validate()
    fresh = index.reserve_chain(blocks, PART, PART)
    assert fresh.fresh.tolist() == [False, True, True, True], "old descendants made way"
    index.validate()
    freed = index.release(match)
    assert sorted(freed.memory) == [1, 2, 3]
    index.validate()


def test_removing_a_chain_gives_everything_back(filled):
    slots = filled.put_chain(chain(5))
    filled.place(slots, SSD)
    freed = filled.index.remove(slots)
    assert sorted(freed.memory) == list(range(5))
    assert sorted(freed.ssd) == list(range(5, 10))
    assert filled.index.used == 0
    filled.index.validate()


def test_forced_loss_waits_for_the_reader(filled):
    index, key = filled.index, digest("f")
    slots = filled.put_pages(key, [0])
    filled.place(slots, SSD)
    match = index.match_pages(key, ordinals(0))
    gone = index.unplace(slots, MEMORY, forced=True)
    assert gone.slots.tolist() == slots.tolist()
    assert gone.locations.tolist() == [-1] and gone.held == [0], "nobody may find it there, and it is not free"
    assert index.hit_pages(key, ordinals(0))[1].tolist() == [-1], "nobody gets the bad copy any more"
    filled.place(slots, MEMORY)
    assert index.release(match) is None, "the second look still holds it"
    index.validate()


def test_forced_loss_of_the_last_copy_leaves_a_hole_under_children(filled):
    index, blocks = filled.index, chain(3)
    slots = filled.put_chain(blocks)
    gone = index.unplace(slots[:1], MEMORY, forced=True)
    assert gone.locations.tolist() == [-1], "a reader of the leaf may be looking"
    assert index.state[slots[0]] == State.EVICTING
    assert not len(index.match_chain(blocks).slots)
    index.validate()
    refill = index.reserve_chain(blocks, PART, PART)
    assert refill.fresh.tolist() == [True, False, False]
    filled.place(refill.slots[:1])
    index.release(refill)
    assert len(index.match_chain(blocks).slots) == 3
    index.validate()


def test_forced_loss_of_everything(filled):
    index = filled.index
    slots = filled.put_chain(chain(4))
    gone = index.unplace(slots, MEMORY, forced=True)
    assert gone.slots.tolist() == slots.tolist()
    index.validate()
    freed = index.release()
    assert index.used == 0
    assert sorted([*freed.memory, *(x for x in gone.locations.tolist() if x >= 0)]) == list(range(4))


def test_moving_is_readable_and_stays(filled):
    index, key = filled.index, digest("f")
    slots = filled.put_pages(key, [0, 1])
    assert index.begin_move(slots).all()
    assert not index.begin_move(slots).any()
    assert (index.match_pages(key, ordinals(0, 1)).slots > 0).all()
    assert not len(index.unplace(slots, MEMORY).slots)
    assert not len(index.victims(MEMORY, 5))
    assert index.remove(slots[:1])[:2] == ([], [])
    filled.place(slots, SSD)
    assert index.end_move(slots) is None, "the match still looks"
    index.validate()


def test_victims_leaf_before_parent(filled):
    index, blocks = filled.index, chain(6)
    slots = filled.put_chain(blocks)
    index.release(index.match_chain(blocks))
    assert index.victims(MEMORY, 3).tolist() == slots[:2:-1].tolist()
    assert index.unplace(slots[:2:-1], MEMORY).slots.tolist() == slots[:2:-1].tolist()
    assert index.victims(MEMORY, 9).tolist() == slots[2::-1].tolist()


def test_a_parent_older_than_its_child_follows_it(filled):
    """Appending below a block does not touch those above; they are due first, wait for the child, and go with it."""
    index, blocks = filled.index, chain(3)
    old = filled.put_chain(blocks)
    new = filled.put_chain([digest("next")], blocks[-1])
    young = filled.put_pages(digest("young"), [0])
    victims = index.victims(MEMORY, 4)
    assert victims.tolist() == [new[0], *old[::-1]]
    index.unplace(victims, MEMORY)
    index.validate()
    assert index.victims(MEMORY, 9).tolist() == young.tolist()


def test_held_parents_go_next_when_the_batch_was_small(filled):
    index, blocks = filled.index, chain(3)
    old = filled.put_chain(blocks)
    new = filled.put_chain([digest("next")], blocks[-1])
    order = []
    for _ in range(4):
        victims = index.victims(MEMORY, 1)
        order += victims.tolist()
        index.unplace(victims, MEMORY)
        index.validate()
    assert order == [new[0], *old[::-1]]


def test_a_held_parent_that_is_used_is_not_due(filled):
    index, blocks = filled.index, chain(1)
    old = filled.put_chain(blocks)
    child = filled.put_chain([digest("next")], blocks[-1])
    other = filled.put_pages(digest("f"), [0])
    assert index.victims(MEMORY, 1).tolist() == child.tolist()
    index.release_slot(index.hit(blocks[0]))
    index.unplace(child, MEMORY)
    assert index.victims(MEMORY, 1).tolist() == other.tolist()
    index.keep(other, MEMORY)
    assert index.victims(MEMORY, 1).tolist() == old.tolist()


def test_victims_are_found_behind_many_in_use():
    filled = Filled(12_000)
    slots = filled.put_pages(digest("f"), range(12_000))
    match = filled.index.match_pages(digest("f"), ordinals(*range(11_990)))
    for slot in slots[11_990:].tolist():
        filled.index.policies[MEMORY].touch(slot)
    assert filled.index.victims(MEMORY, 3).tolist() == slots[11_990:11_993].tolist()
    filled.index.release(match)
    found = []
    while len(more := filled.index.victims(MEMORY, 64)):
        found += more.tolist()
        filled.index.unplace(more, MEMORY)
    assert sorted(found) == sorted(set(slots.tolist()) - set(slots[11_990:11_993].tolist()))
    assert found[:7] == slots[11_993:].tolist(), "those named and not asked for come first"
    filled.index.validate()


def test_kept_victims_come_again(filled):
    slots = filled.put_pages(digest("f"), [0, 1, 2])
    first = filled.index.victims(MEMORY, 3)
    assert not len(filled.index.victims(MEMORY, 3))
    filled.index.keep(first, MEMORY)
    assert sorted(filled.index.victims(MEMORY, 3).tolist()) == sorted(slots.tolist())


def test_the_last_copy_and_the_others(filled):
    """A block may leave memory for SSD while its child stays on SSD; its last copy stays while there is a child."""
    index = filled.index
    slots = filled.put_chain(chain(2))
    filled.place(slots, SSD)
    assert index.unplace(slots[::-1], MEMORY).slots.tolist() == slots[::-1].tolist()
    assert not len(index.unplace(slots[:1], SSD).slots)
    assert index.unplace(slots[::-1], SSD).slots.tolist() == slots[::-1].tolist()
    assert index.used == 0
    index.validate()


def test_a_copy_in_limbo_comes_back_when_the_children_go(filled):
    index = filled.index
    slots = filled.put_chain(chain(2))
    filled.place(slots, SSD)
    assert index.unplace(slots[:1], MEMORY, forced=True).locations.tolist() == [-1]
    index.unplace(slots[1:], MEMORY)
    index.unplace(slots[1:], SSD)
    index.validate()
    assert index.release()[:2] == ([0], [])


def test_a_reader_keeps_its_chain_when_its_leaf_is_lost(filled):
    """One pin of the leaf holds the chain in memory, also after the leaf's own copy was given up as corrupt."""
    index, blocks = filled.index, chain(3)
    slots = filled.put_chain(blocks)
    filled.place(slots, SSD)
    match = index.match_chain(blocks)
    assert index.unplace(slots[2:], MEMORY, forced=True).locations.tolist() == [-1]
    assert not len(index.unplace(slots[::-1], MEMORY).slots)
    filled.place(slots[2:], MEMORY)
    assert not len(index.unplace(slots[1::-1], MEMORY).slots)
    index.validate()
    assert index.release(match)[:2] == ([2], [])
    index.validate()
    assert index.unplace(slots[::-1], MEMORY).slots.tolist() == slots[::-1].tolist()


def test_a_held_copy_is_due_once_there_is_another(filled):
    index, blocks = filled.index, chain(2)
    parent = filled.put_chain(blocks[:1])
    child = filled.put_chain(blocks[1:], blocks[0], SSD)
    assert not len(index.victims(MEMORY, 1)), "its last copy, and it has a child"
    filled.place(parent, SSD)
    assert index.victims(MEMORY, 1).tolist() == parent.tolist()
    assert index.victims(SSD, 1).tolist() == child.tolist()


def test_holes_take_no_copy_without_a_reservation(filled):
    index = filled.index
    slots = filled.put_chain(chain(2))
    index.unplace(slots[:1], MEMORY, forced=True)
    assert index.place(slots[:1], SSD, [40], 1) == [40]
    index.validate()


def test_clearing_the_way_below_a_hole(filled):
    """The only child of a hole must make way for blocks below that hole, and the hole must not go with it."""
    index, blocks = filled.index, chain(2)
    slots = filled.put_chain(blocks)
    index.unplace(slots[:1], MEMORY, forced=True)
    made = index.reserve_chain([digest("y"), blocks[1]], PART, PART, parent=blocks[0])
    assert made.fresh.all()
    index.validate()
    assert index.parents(made.slots) == [blocks[0], digest("y")]


def test_neighbours_of_another_kind(filled):
    """Consecutive slots are a guess, never the answer."""
    index, blocks = filled.index, chain(2)
    filled.put_chain(blocks[:1])
    lone = index.reserve([Name(blocks[1])], 1, PART)
    filled.place(lone.slots)
    assert len(index.match_chain(blocks).slots) == 1
    a, b = digest("a"), digest("b")
    slots = filled.put_pages(a, range(20))
    index.remove(slots[:1])
    mine = filled.put_pages(b, [0])
    assert mine.tolist() == slots[:1].tolist()
    match = index.match_pages(b, ordinals(*range(15)))
    assert match.slots.tolist() == [mine[0], *[-1] * 14]


def test_relocation_and_reverse_look_up(filled):
    index = filled.index
    slots = filled.put_pages(digest("f"), [0, 1, 2], SSD)
    assert index.slots_at(SSD, np.array([2, 99, 0])).tolist() == [slots[2], -1, slots[0]]
    assert index.slots_at(MEMORY, np.array([0])).tolist() == [-1]
    assert index.slots_at(SSD, np.array([], np.int64)).tolist() == []
    moved = index.relocate(slots, SSD, np.array([0, 98, 2]), np.array([10, 11, 12]))
    assert moved.tolist() == [True, False, True]
    assert index.facts(slots).ssd_location.tolist() == [10, 1, 12]
    assert index.order(slots, SSD).tolist() == index.policies[SSD].order(slots).tolist()


def test_parts_add_up(filled):
    index, key = filled.index, digest("f")
    slots = filled.put_pages(key, [0, 1])
    index.add_parts(slots, MEMORY, np.array([6, 8], np.uint64))
    assert index.facts(slots).memory_parts.tolist() == [7, 9]
    assert index.unsaved().tolist() == slots.tolist()
    index.place(slots[:1], SSD, [5], 7)
    assert index.unsaved().tolist() == slots[1:].tolist()


def test_memory_is_counted(filled):
    empty = filled.index.memory_bytes()
    filled.put_pages(digest("f"), range(50))
    pages = filled.index.memory_bytes()
    filled.put_chain(chain(40))
    assert empty < pages < filled.index.memory_bytes()


@pytest.mark.parametrize("backwards", [False, True])
def test_a_chain_of_thousands_of_blocks_goes_at_once(backwards):
    """Whoever frees the last of them goes up the chain without a frame of the interpreter for each block."""
    made = Filled(5000)
    digests = chain(4000)
    slots = made.put_chain(digests, validate=False)
    lease = made.index.match([Name(digests[-1])])
    made.index.remove(slots[::-1] if backwards else slots)
    assert made.index.used == 4000  # the lease on the last one keeps them
    assert made.index.release(lease) is not None
    made.index.validate()
    assert made.index.used == 0
