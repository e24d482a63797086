"""What every eviction policy must do (PolicyContract), slow twins to compare with, and a policy with ghosts.

Subclass PolicyContract in a test module, give it `make` (and `twin`, if the policy's order has a plain definition).
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from tiercache.index.table import RowTable
from tiercache.policy.lru import LRU, NAMED

if TYPE_CHECKING:
    import numpy.typing as npt

    from tiercache.policy import Columns, Names, Order, Policy, Slots

    U64 = npt.NDArray[np.uint64]


@dataclass
class PlainColumns:
    """Columns without an index, for policies on their own."""

    capacity: int
    depth: npt.NDArray[np.int32] = field(init=False)
    size: npt.NDArray[np.uint32] = field(init=False)
    cost_s: npt.NDArray[np.float32] = field(init=False)
    kind: npt.NDArray[np.uint8] = field(init=False)

    def __post_init__(self) -> None:
        self.depth = np.zeros(self.capacity, np.int32)
        self.size = np.ones(self.capacity, np.uint32)
        self.cost_s = np.zeros(self.capacity, np.float32)
        self.kind = np.zeros(self.capacity, np.uint8)


class Ghosts:
    """The last `limit` names that left, packed: a ring of names and a hash table over its rows, 16 to 20 bytes each."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.name = np.zeros(limit + 1, np.uint64)
        self._table = RowTable(limit)
        self._names = self.name.data
        self._at = 1
        self.count = 0

    def _find(self, name: int) -> int:
        """The row of a name, 0 = none."""
        row = self._table.heads[self._table.bucket(name)]
        while row and self._names[row] != name:
            row = self._table.nexts[row]
        return row

    def pop(self, names: U64) -> npt.NDArray[np.bool_]:
        """Which of these are remembered; they are not, after this."""
        found = np.zeros(len(names), bool)
        for i, name in enumerate(names.tolist()):
            if row := self._find(name):
                found[i] = True
                self._drop(row)
        return found

    def push(self, names: U64) -> None:
        """Remembers names, and forgets the oldest beyond the limit."""
        for name in names.tolist():
            if not name or self._find(name):
                continue
            if self._names[self._at]:
                self._drop(self._at)
            self._names[self._at] = name
            self._table.add(self._at, self._table.bucket(name))
            self.count += 1
            self._at = self._at % self.limit + 1

    def _drop(self, row: int) -> None:
        """Forgets one."""
        self._table.discard(row, self._table.bucket(self._names[row]))
        self._names[row] = 0
        self.count -= 1

    def memory_bytes(self) -> int:
        """All of it."""
        return self.name.nbytes + self._table.memory_bytes(self.limit + 1)


class TwoQueues:
    """2Q (Johnson and Shasha, VLDB 1994), which is here to prove that the port carries ghosts.

    What comes for the first time queues in a FIFO, and is remembered by name when it leaves; what comes again while
    remembered goes to an LRU.
    """

    wants_names = True

    def __init__(self, ghosts_max: int, *, first_share: float = 0.25) -> None:
        self.first, self.main = LRU(), LRU()
        self.ghosts = Ghosts(ghosts_max)
        self._share = first_share

    def attach(self, columns: Columns) -> None:
        """See Policy."""
        self.first.attach(columns)
        self.main.attach(columns)

    def insert(self, slots: Slots, names: Names | None, order: Order | None = None) -> None:
        """See Policy."""
        assert names is not None, "ghosts need names"
        known = self.ghosts.pop(names)
        self.main.insert(slots[known], None, None if order is None else order[known])
        self.first.insert(slots[~known], None, None if order is None else order[~known])

    def touch(self, slots: Slots | int) -> None:
        """See Policy."""
        self.main.touch(slots)
        some = np.atleast_1d(np.asarray(slots, np.int64))
        self.first.keep(some[self.first.tick[some] == NAMED])

    def keep(self, slots: Slots) -> None:
        """See Policy."""
        self.main.keep(slots)
        self.first.keep(slots)

    def remove(self, slots: Slots, names: Names | None) -> None:
        """See Policy."""
        assert names is not None, "ghosts need names"
        first = self.first.tick[slots] > 0
        self.ghosts.push(names[first])
        self.first.remove(slots[first])
        self.main.remove(slots[~first])

    def victims(self, count: int) -> Slots:
        """See Policy."""
        total = self.first.count + self.main.count
        queues = [self.first, self.main] if self.first.count > self._share * total else [self.main, self.first]
        named = queues[0].victims(count)
        return named if len(named) else queues[1].victims(count)

    def order(self, slots: Slots) -> Order:
        """See Policy. One order over both queues: what was seen again is later than what was not."""
        first, main = self.first.order(slots), self.main.order(slots)
        return np.where(self.main.tick[slots] > 0, main // 2 + np.uint32(1 << 30), first // 4).astype(np.uint32)

    def memory_bytes(self) -> int:
        """Bytes in use, ghosts included."""
        return self.first.memory_bytes() + self.main.memory_bytes() + self.ghosts.memory_bytes()


class PlainLRU:
    """Least recently used by a dictionary: the definition of policy.lru.LRU."""

    wants_names = False

    def attach(self, columns: Columns) -> None:
        """See Policy."""
        self._depth = columns.depth
        self._used: dict[int, int] = {}
        self._named: set[int] = set()
        self._now = 0

    def insert(self, slots: Slots, names: Names | None, order: Order | None = None) -> None:
        """See Policy."""
        self._now += 1
        for i, slot in enumerate(slots.tolist()):
            self._used[slot] = self._now if order is None else int(order[i]) - (1 << 32)

    def touch(self, slots: Slots | int) -> None:
        """See Policy."""
        self._now += 1
        for slot in np.atleast_1d(np.asarray(slots, np.int64)).tolist():
            if slot in self._used:
                self._used[slot] = self._now
                self._named.discard(slot)

    keep = touch

    def remove(self, slots: Slots, names: Names | None) -> None:
        """See Policy."""
        for slot in slots.tolist():
            del self._used[slot]
            self._named.discard(slot)

    def victims(self, count: int) -> Slots:
        """See Policy."""
        fit = sorted(set(self._used) - self._named, key=lambda slot: (self._used[slot], -self._depth[slot], slot))
        self._named |= set(fit[:count])
        return np.array(fit[:count], np.int64)

    def order(self, slots: Slots) -> Order:
        """See Policy."""
        ranks = {tick: rank for rank, tick in enumerate(sorted(set(self._used.values())))}
        return np.array([ranks[self._used[slot]] for slot in slots.tolist()], np.uint32)


class PolicyContract:
    """The suite. Each test builds its own policy."""

    capacity = 200

    def make(self) -> Policy:
        """A new policy, not attached."""
        return LRU()

    def twin(self) -> Policy | None:
        """A slow policy that must name the same victims in the same order, or None."""
        return None

    def _attached(self) -> tuple[Policy, PlainColumns]:
        columns = PlainColumns(self.capacity)
        columns.depth[:] = np.arange(self.capacity)[::-1] // 3
        policy = self.make()
        policy.attach(columns)
        return policy, columns

    @staticmethod
    def _names(slots: Slots) -> Names:
        return (slots.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)

    def _insert(self, policy: Policy, slots: Slots) -> None:
        policy.insert(slots, self._names(slots) if policy.wants_names else None)

    def _remove(self, policy: Policy, slots: Slots) -> None:
        policy.remove(slots, self._names(slots) if policy.wants_names else None)

    def _drain(self, policy: Policy) -> list[int]:
        """All victims, each removed when named."""
        out: list[int] = []
        while len(named := policy.victims(7)):
            assert len(named) <= 7
            self._remove(policy, named)
            out += named.tolist()
        return out

    def test_names_everything_once(self) -> None:
        """Each slot is named, none twice, none that left."""
        policy, _ = self._attached()
        for low in range(0, 100, 10):
            self._insert(policy, np.arange(low, low + 10))
        self._remove(policy, np.arange(30, 40))
        assert sorted(self._drain(policy)) == [*range(30), *range(40, 100)]
        assert not len(policy.victims(3))

    def test_empty_calls(self) -> None:
        """Empty arrays change nothing."""
        policy, _ = self._attached()
        none = np.empty(0, np.int64)
        self._insert(policy, none)
        policy.touch(none)
        policy.keep(none)
        self._remove(policy, none)
        assert not len(policy.victims(5))
        assert not len(policy.order(none))

    def test_touching_strangers(self) -> None:
        """Slots that are not in the tier are ignored, also among others, also as an int."""
        policy, _ = self._attached()
        self._insert(policy, np.array([3]))
        policy.touch(np.array([1, 2, 3]))
        policy.touch(5)
        policy.keep(np.array([6]))
        assert self._drain(policy) == [3]

    def test_named_is_not_named_again(self) -> None:
        """Until it is kept, touched, or back after removal."""
        policy, _ = self._attached()
        self._insert(policy, np.arange(20))
        first = policy.victims(5)
        rest = [slot for _ in range(30) for slot in policy.victims(2).tolist()]
        assert sorted([*first.tolist(), *rest]) == list(range(20))
        policy.keep(first[:2])
        policy.touch(first[2:3])
        policy.touch(int(first[3]))
        assert sorted(self._drain(policy)) == sorted(first[:4].tolist())
        self._remove(policy, first[4:])
        self._insert(policy, first[4:])
        assert self._drain(policy) == first[4:].tolist()

    def test_slots_are_used_again(self) -> None:
        """A slot that left and came back is a new entry."""
        policy, _ = self._attached()
        for _ in range(50):
            self._insert(policy, np.arange(10))
            assert sorted(self._drain(policy)) == list(range(10))

    def test_order_restores(self) -> None:
        """What `order` said, given to `insert` of a new policy, gives the same victims."""
        policy, _ = self._attached()
        for low in range(0, 60, 4):
            self._insert(policy, np.arange(low, low + 4))
        for low in range(0, 60, 7):
            policy.touch(np.arange(low, min(60, low + 3)))
        slots = np.arange(60)
        after, _ = self._attached()
        order = policy.order(slots)
        for some in (slots[40:], slots[:40]):
            after.insert(some, self._names(some) if after.wants_names else None, order[some])
        later = np.arange(60, 70)
        self._insert(policy, later)
        self._insert(after, later)
        assert len(self._drain(after)) == 70
        if self.twin() is not None:
            again, _ = self._attached()
            again.insert(slots, None, order)
            self._insert(again, later)
            assert self._drain(again) == self._drain(policy)

    def test_against_the_twin(self) -> None:
        """A long random life, victims compared one batch after another."""
        rng = random.Random(7)
        for _ in range(10):
            policy, columns = self._attached()
            twin = self.twin()
            if twin is None:
                return
            twin.attach(columns)
            inside: set[int] = set()
            for _ in range(300):
                self._step(rng, policy, twin, inside)

    def _step(self, rng: random.Random, policy: Policy, twin: Policy, inside: set[int]) -> None:
        """One random call of both."""
        kind = rng.randrange(4)
        if kind == 0:
            fit = sorted(set(range(self.capacity)) - inside)
            slots = np.array(rng.sample(fit, min(len(fit), rng.randrange(12))), np.int64)
            inside |= set(slots.tolist())
            self._insert(policy, slots)
            self._insert(twin, slots)
        elif kind == 1:
            slots = np.array(rng.sample(range(self.capacity), rng.randrange(9)), np.int64)
            policy.touch(slots)
            twin.touch(slots)
        elif kind == 2 and inside:
            slot = rng.choice(sorted(inside))
            policy.touch(slot)
            twin.touch(slot)
        else:
            count = rng.randrange(1, 9)
            named, wanted = policy.victims(count), twin.victims(count)
            while len(named) < len(wanted) and len(more := policy.victims(count - len(named))):
                named = np.concatenate([named, more])
            assert named.tolist() == wanted.tolist()
            cut = rng.randrange(len(named) + 1)
            for each in (policy, twin):
                each.keep(named[cut:])
                self._remove(each, named[:cut])
            inside -= set(named[:cut].tolist())
