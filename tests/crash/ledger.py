"""What the parent of a crash test knows: which values and parts of pages were acknowledged, and how.

A child reports each step on a pipe, one short line a step (atomic, and not lost with the child):

    o              opening                          v CHECKED PRESENT     open, and everything looked at
    b N SIZE       a put of value N begins          a N DURABLE           the put was acknowledged (durable: 1)
    d N            a delete of value N begins       D N                   it was acknowledged
    f K            flush K begins                   F K                   it was acknowledged
    p FILE PAGE PARTS   these parts are readable    w TEXT                wrong bytes were read
    l N OUTCOME    value N was durable and is lost  q FILE PAGE PARTS     these parts were durable and are lost
    r N            value N is back after a flushed delete                 x TEXT a fault;  z  closed in order
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tiercache.model import Outcome
from tiercache.testing.model import made_bytes

PAGE_BYTES = 256 << 10
PART_BYTES = 64 << 10
FILE_PAGES = 5
FILE_SIZE = FILE_PAGES * PAGE_BYTES - 77_777


def value_of(number: int, size: int) -> bytes:
    """The one right value of item `number`."""
    return made_bytes(("value", number), size)


def page_of(file: int, ordinal: int) -> bytes:
    """The one right content of a page."""
    size = min(PAGE_BYTES, FILE_SIZE - ordinal * PAGE_BYTES)
    return made_bytes(("page", file, ordinal), size)


@dataclass
class Item:
    """One value: `durable` once it must survive, `deleting` once it need not, `gone` once it must not come back."""

    size: int
    visible: bool = False
    durable: bool = False
    deleting: bool = False
    deleted: bool = False
    gone: bool = False


@dataclass
class Tally:
    """Sums over all kills."""

    wrong: int = 0
    lost: int = 0
    revived: int = 0
    checked: int = 0
    present: int = 0
    faults: list[str] = field(default_factory=list)


@dataclass
class Ledger:
    """Everything known of one directory."""

    items: dict[int, Item] = field(default_factory=dict)
    pages: dict[tuple[int, int], int] = field(default_factory=dict)
    """Parts that were readable at some time."""
    readable: dict[tuple[int, int], int] = field(default_factory=dict)
    """Parts that were readable in this life."""
    durable_pages: dict[tuple[int, int], int] = field(default_factory=dict)
    count: int = 0
    written_bytes: int = 0
    flushes: dict[int, tuple[list[int], list[int], dict[tuple[int, int], int]]] = field(default_factory=dict)

    def read(self, line: str, tally: Tally) -> None:
        """Takes one line of the child's report into account."""
        verb, *words = line.split()
        if verb in "wx":
            if verb == "w":
                tally.wrong += 1
            tally.faults.append(line)
            return
        getattr(self, f"_{verb}")(tally, *map(int, words))

    def _o(self, tally: Tally) -> None:
        """A new life: what was only visible may be forgotten, deletes may be undone, and a flush now says nothing of
        either."""
        self.flushes.clear()
        self.readable.clear()
        for item in self.items.values():
            item.visible = item.deleted = False

    def _v(self, tally: Tally, checked: int, present: int) -> None:
        tally.checked += checked
        tally.present += present

    def _z(self, tally: Tally) -> None: ...

    def _b(self, tally: Tally, number: int, size: int) -> None:
        self.items[number] = Item(size)
        self.count = max(self.count, number + 1)
        self.written_bytes += size

    def _a(self, tally: Tally, number: int, durable: int) -> None:
        self.items[number].visible = True
        self.items[number].durable = bool(durable)

    def _d(self, tally: Tally, number: int) -> None:
        self.items[number].deleting = True

    def _D(self, tally: Tally, number: int) -> None:
        self.items[number].deleted = True

    def _p(self, tally: Tally, file: int, ordinal: int, parts: int) -> None:
        place = file, ordinal
        new = parts & ~self.pages.get(place, 0)
        self.written_bytes += PART_BYTES * new.bit_count() + PAGE_BYTES * bool(new)
        self.pages[place] = self.pages.get(place, 0) | parts
        self.readable[place] = self.readable.get(place, 0) | parts

    def _f(self, tally: Tally, number: int) -> None:
        visible = [n for n, item in self.items.items() if item.visible and not item.deleting]
        deleted = [n for n, item in self.items.items() if item.deleted]
        self.flushes[number] = visible, deleted, dict(self.readable)

    def _F(self, tally: Tally, number: int) -> None:
        visible, deleted, pages = self.flushes.pop(number)
        for n in visible:
            self.items[n].durable = True
        for n in deleted:
            self.items[n].gone = True
        for place, parts in pages.items():
            self.durable_pages[place] = self.durable_pages.get(place, 0) | parts

    def _l(self, tally: Tally, number: int, outcome: int) -> None:
        tally.lost += 1
        tally.faults.append(f"l {number} {Outcome(outcome).name} {self.items.pop(number)}")

    def _r(self, tally: Tally, number: int) -> None:
        tally.revived += 1
        tally.faults.append(f"r {number} {self.items.pop(number)}")

    def _q(self, tally: Tally, file: int, ordinal: int, parts: int) -> None:
        tally.lost += 1
        tally.faults.append(f"q {file} {ordinal} {parts:b}")
        self.durable_pages[file, ordinal] &= ~parts

    def trim(self, keep: int) -> None:
        """Forgets all but the latest items, where nothing is promised to stay."""
        for number in sorted(self.items)[:-keep]:
            del self.items[number]
