"""The index against a dictionary: same answers, no location freed twice, early or never."""

from __future__ import annotations

import hashlib

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tiercache.index import Index
from tiercache.model import Name, State, TierId
from tiercache.policy.lru import LRU
from tiercache.testing.policies import TwoQueues

SLOTS_MAX = 20
FILES = [hashlib.sha256(b"file%d" % i).digest()[: 16 + 16 * (i % 2)] for i in range(3)]
LONE = [hashlib.sha256(b"lone%d" % i).digest()[: 16 + 16 * (i % 2)] for i in range(4)]

paths = st.lists(st.integers(0, 1), min_size=1, max_size=5)
tiers = st.sampled_from([TierId.MEMORY, TierId.SSD])
fills = st.sampled_from([(), (0,), (0,), (0,), (1,), (0, 1)])


def digests(path):
    """A chain: each digest covers the whole prefix. Wide ones where the chain starts with 1."""
    width = 16 + 16 * path[0]
    return [hashlib.sha256(bytes(path[: i + 1])).digest()[:width] for i in range(len(path))]


class Record:
    """One slot, as the dictionary sees it."""

    def __init__(self, name, parent=None):
        self.name, self.parent = name, parent
        self.copies = {}
        self.state = "pending"


class IndexMachine(RuleBasedStateMachine):
    @initialize(ghosts=st.booleans())
    def start(self, ghosts):
        policy = (lambda: TwoQueues(8)) if ghosts else LRU
        self.index = Index(SLOTS_MAX, [policy(), policy()])
        self.named = {}
        """Name -> Record, of what a look-up can find."""
        self.slots = {}
        """Slot -> Record, of every slot seen and not known to be gone."""
        self.holds = []
        """(hold, memory locations it may look at)."""
        self.moving = []
        self.locations = 0
        self.live = {}
        """Location -> tier, not freed yet."""

    # -- accounts -----------------------------------------------------------------------------------------------------
    def location(self, tier):
        self.locations += 1
        self.live[self.locations] = tier
        return self.locations

    def free(self, tier, location):
        assert self.live.pop(location) == tier, "freed twice, or in another tier"
        for _, seen in self.holds:
            assert location not in seen, "freed under a reader's eyes"

    def take(self, freed):
        for tier, some in enumerate(freed[:2] if freed else ()):
            for location in some:
                self.free(tier, location)

    def hold(self, hold, slots):
        seen = {self.slots[s].copies.get(TierId.MEMORY) for s in slots if self.slots[s].state == "readable"}
        self.holds.append((hold, seen - {None}))

    def chain(self, path):
        """Records of the longest linked prefix."""
        out = []
        for digest in digests(path):
            record = self.named.get(Name(digest, len(out)))
            if record is None or record.parent is not (out[-1] if out else None):
                break
            out.append(record)
        return out

    def dead(self, record):
        if self.named.get(record.name) is record:
            del self.named[record.name]
        record.state = "dead"

    def sync(self):
        """Records of slots that went for good without a word (abandoned, or holes whose children went)."""
        for slot, record in list(self.slots.items()):
            if self.index.state[slot] == State.ABSENT:
                assert record.state != "readable", "a readable entry vanished"
                self.dead(record)
                del self.slots[slot]

    def reserved(self, names, reservation, parents=None):
        """Records for what was reserved."""
        before = None
        for i, (name, slot, fresh) in enumerate(zip(names, reservation.slots.tolist(), reservation.fresh.tolist())):
            if slot < 0:
                continue
            if fresh:
                old = self.named.get(name)
                if old is not None and self.slots.get(slot) is old:
                    assert old.state in ("hole", "pending")
                    old.state = "pending"
                else:
                    assert old is None, f"{name} was there"
                    record = Record(name, before if parents else None)
                    self.named[name] = self.slots[slot] = record
            else:
                assert self.slots[slot] is self.named[name], i
            before = self.slots[slot]
        if reservation.pin:
            self.hold(reservation, [s for s in reservation.slots.tolist() if s > 0])

    def then(self, reservation, fill, keep):
        """What a filler does next: places in these tiers, and gives the reservation back or keeps it."""
        slots = reservation.slots[reservation.fresh & (reservation.slots > 0)].tolist()
        for tier in fill:
            self.place_in(slots, TierId(tier))
        if reservation.pin and not keep:
            self.holds.pop()
            freed = self.index.release(reservation)
            self.sync()
            self.take(freed)

    # -- reservation --------------------------------------------------------------------------------------------------
    @rule(
        file=st.sampled_from(FILES),
        ordinals=st.lists(st.integers(0, 9), min_size=1, max_size=5, unique=True),
        fill=fills,
        keep=st.booleans(),
    )
    def reserve_pages(self, file, ordinals, fill, keep):
        reservation = self.index.reserve_pages(file, np.array(ordinals, np.int32), 100, 64)
        self.reserved([Name(file, o) for o in ordinals], reservation)
        self.then(reservation, fill, keep)

    @rule(keys=st.lists(st.sampled_from(LONE), min_size=1, max_size=4), fill=fills, keep=st.booleans())
    def reserve_lone(self, keys, fill, keep):
        reservation = self.index.reserve([Name(k) for k in keys], 100, 64)
        seen = set()
        for key, fresh in zip(keys, reservation.fresh):
            assert not fresh or key not in seen
            seen.add(key)
        self.reserved([Name(k) for k in keys], reservation)
        self.then(reservation, fill, keep)

    @rule(path=paths, append=st.booleans(), fill=fills, keep=st.booleans())
    def reserve_chain(self, path, append, fill, keep):
        known = self.chain(path)
        names = [Name(d, i) for i, d in enumerate(digests(path))]
        width = len(names[0].key)
        skip = min(len(known), len(path) - 1) if append else 0
        parent = names[skip - 1].key if skip else None
        reservation = self.index.reserve_chain([n.key for n in names[skip:]], 100, 64, width=width, parent=parent)
        for name in names[len(known) :]:
            if name in self.named:
                self.dead(self.named[name])
        self.sync()
        before = known[skip - 1] if skip else None
        for name, slot, fresh in zip(names[skip:], reservation.slots.tolist(), reservation.fresh.tolist()):
            if slot < 0:
                break
            record = self.named.get(name)
            if record is None:
                assert fresh
                record = self.named[name] = self.slots[slot] = Record(name, before)
            elif fresh:
                assert record.state in ("hole", "pending")
                record.state = "pending"
            assert self.slots[slot] is record
            before = record
        if reservation.pin:
            self.hold(reservation, [s for s in reservation.slots.tolist() if s > 0])
        self.then(reservation, fill, keep)

    # -- look-up ------------------------------------------------------------------------------------------------------
    @rule(path=paths)
    def match_chain(self, path):
        match = self.index.match_chain(digests(path), len(digests(path)[0]))
        wanted = []
        for record in self.chain(path):
            if record.state != "readable":
                break
            wanted.append(record)
        assert [self.slots[s] for s in match.slots.tolist()] == wanted
        if match.pin:
            self.hold(match, match.slots.tolist())

    @rule(file=st.sampled_from(FILES), ordinals=st.lists(st.integers(0, 9), min_size=1, unique=True))
    def match_pages(self, file, ordinals):
        match, locations, _ = self.index.hit_pages(file, np.array(ordinals, np.int32))
        for ordinal, slot, location in zip(ordinals, match.slots.tolist(), locations.tolist()):
            record = self.named.get(Name(file, ordinal))
            readable = record is not None and record.state == "readable"
            assert (slot > 0) == readable
            if readable:
                assert self.slots[slot] is record
                assert record.copies.get(TierId.MEMORY, -1) == location
        if match.pin:
            self.hold(match, [s for s in match.slots.tolist() if s > 0])

    @rule(path=paths, some=st.lists(st.sampled_from([*LONE, *FILES]), max_size=3), ordinal=st.integers(0, 9))
    def match_names(self, path, some, ordinal):
        names = [Name(digests(path)[-1], len(path) - 1)] + [Name(k, ordinal if k in FILES else 0) for k in some]
        match = self.index.match(names)
        contained = self.index.contains(names)
        for name, slot, inside in zip(names, match.slots.tolist(), contained):
            record = self.named.get(name)
            readable = record is not None and record.state == "readable"
            assert (slot > 0) == readable == inside
            assert not readable or self.slots[slot] is record
        if match.pin:
            self.hold(match, [s for s in match.slots.tolist() if s > 0])

    @rule(data=st.data())
    def release(self, data):
        for _ in range(data.draw(st.integers(1, 4))):
            self.release_one(data)

    def release_one(self, data):
        if self.holds:
            hold, _ = self.holds.pop(data.draw(st.integers(0, len(self.holds) - 1)))
            freed = self.index.release(hold)
            self.sync()
            self.take(freed)
            assert self.index.release(hold) is None

    @rule(key=st.sampled_from(LONE))
    def hit(self, key):
        slot = self.index.hit(key)
        record = self.named.get(Name(key))
        assert (slot > 0) == (record is not None and record.state == "readable")
        if slot > 0:
            self.take(self.index.release_slot(slot))

    # -- presence -----------------------------------------------------------------------------------------------------
    @rule(data=st.data(), tier=tiers)
    def place(self, data, tier):
        fit = [s for s, r in self.slots.items() if self.index.pin[s] or r.state == "readable"]
        if not fit:
            return
        slots = data.draw(st.lists(st.sampled_from(fit), unique=True, max_size=4))
        self.place_in(slots, tier)

    def place_in(self, slots, tier):
        locations = [self.location(tier) for _ in slots]
        unwanted = self.index.place(np.array(slots, np.int64), tier, locations, 1)
        for slot, location in zip(slots, locations):
            record = self.slots[slot]
            if location in unwanted:
                assert tier in record.copies or record.state == "hole"
                continue
            record.copies[tier] = location
            if record.state == "pending":
                record.state = "readable"
        for location in unwanted:
            self.free(tier, location)

    @rule(data=st.data())
    def abandon(self, data):
        fit = [s for s, r in self.slots.items() if r.state == "pending"]
        if fit:
            slots = data.draw(st.lists(st.sampled_from(fit), unique=True))
            self.index.abandon(np.array(slots, np.int64))
            self.after_loss(slots)

    def after_loss(self, slots):
        """These have no copy any more: gone, nameless, or a hole."""
        self.sync()
        for slot in slots:
            record = self.slots.get(slot)
            if record is not None and record.state in ("pending", "hole") and not record.copies:
                if self.index._slots.form[slot] & 128:
                    self.dead(record)
                else:
                    assert self.index.state[slot] == State.EVICTING
                    record.state = "hole"

    @rule(tier=tiers, count=st.integers(1, 6), keep=st.booleans())
    def evict(self, tier, count, keep):
        victims = self.index.victims(tier, count)
        assert len(set(victims.tolist())) == len(victims) <= count
        for slot in victims.tolist():
            assert self.slots[slot].state == "readable"
            assert tier in self.slots[slot].copies
            assert not self.index.pin[slot]
        if keep:
            self.index.keep(victims, tier)
            return
        gone, _ = self.unplace(victims, tier, forced=False)
        assert gone == victims.tolist(), "what was named may go, in that order"

    @rule(data=st.data(), tier=tiers, forced=st.booleans())
    def unplace_any(self, data, tier, forced):
        fit = list(self.slots)
        if fit:
            slots = data.draw(st.lists(st.sampled_from(fit), unique=True, max_size=4))
            _, refused = self.unplace(np.array(slots, np.int64), tier, forced=forced)
            if forced:
                assert all(tier not in r.copies or r.state == "dead" for r in refused)

    def unplace(self, slots, tier, *, forced):
        records = {s: self.slots[s] for s in slots.tolist()}
        gone, locations, held = self.index.unplace(slots, tier, forced=forced)
        waiting = gone[locations < 0].tolist()
        assert sorted(held) == sorted(records[slot].copies[tier] for slot in waiting)
        for slot, location in zip(gone.tolist(), locations.tolist()):
            was = records[slot].copies.pop(tier)
            if location >= 0:
                assert location == was
                self.free(tier, location)
            if not records[slot].copies and not forced:
                self.dead(records[slot])
                if self.slots.get(slot) is records[slot]:
                    del self.slots[slot]
            elif not records[slot].copies:
                records[slot].state = "hole"
        self.after_loss(gone.tolist())
        return gone.tolist(), [r for s, r in records.items() if s not in set(gone.tolist())]

    @rule(data=st.data())
    def remove(self, data):
        if self.named:
            names = data.draw(st.lists(st.sampled_from(sorted(self.named)), unique=True, max_size=3))
            slots = [s for s, r in self.slots.items() if r.name in names and r.state != "dead"]
            for slot in slots:
                self.dead(self.slots[slot])
            freed = self.index.remove(slots)
            self.sync()
            self.take(freed)

    @rule(data=st.data())
    def move(self, data):
        if self.moving:
            slots = self.moving.pop()
            freed = self.index.end_move(slots)
            self.sync()
            self.take(freed)
        elif self.slots:
            slots = np.array(data.draw(st.lists(st.sampled_from(list(self.slots)), unique=True)), np.int64)
            self.moving.append(slots[self.index.begin_move(slots)])

    @rule(data=st.data(), tier=tiers)
    def relocate(self, data, tier):
        fit = [s for s, r in self.slots.items() if r.state == "readable" and tier in r.copies]
        if tier == TierId.SSD and fit:
            slot = data.draw(st.sampled_from(fit))
            old, new = self.slots[slot].copies[tier], self.location(tier)
            at = self.index.slots_at(tier, np.array([old, 10**9]))
            assert at.tolist() == [slot, -1]
            assert self.index.relocate(at[:1], tier, np.array([old]), np.array([new])).all()
            self.slots[slot].copies[tier] = new
            self.free(tier, old)

    # -- always -------------------------------------------------------------------------------------------------------
    @invariant()
    def valid(self):
        if hasattr(self, "index"):
            self.index.validate()
            assert self.index.used == len(self.slots)

    def teardown(self):
        if not hasattr(self, "index"):
            return
        for slots in self.moving:
            self.take(self.index.end_move(slots))
        while self.holds:
            self.take(self.index.release(self.holds.pop()[0]))
            self.index.validate()
        assert self.index.pins == 0
        live = np.flatnonzero(self.index.state)
        self.take(self.index.remove(live))
        self.index.validate()
        assert self.index.used == 0
        assert not self.live, "locations that never came back"


TestIndexModel = IndexMachine.TestCase
TestIndexModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
