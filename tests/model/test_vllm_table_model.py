"""The table of vLLM's protocol under a made-up engine: pages, a local prefix cache, chunks, preemption, aborts, loads
that fail, steps that are planned before the last one's outcome is known. Whatever happens, nothing that is wrong is
stored, nothing is read after it was overwritten, every request ends, and nothing is left over."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from tiercache_connectors.vllm_table import Order, Requests, Scheduled, Step

BLOCK, PAGE, PAGES, CHUNK = 16, 32, 40, 100
STEPS_MAX = 3000
SEEDS = 20


@dataclass
class Sequence:
    name: str
    tokens: list[int]
    end: int
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    state: str = "new"
    fresh: bool = True

    def key(self, block: int) -> bytes:
        return hash(tuple(self.tokens[: (block + 1) * BLOCK])).to_bytes(16, "little", signed=True)


class Engine:
    """A few lines of vLLM's scheduler and of a worker. `memory[page]` holds, for each of its blocks, the key of what
    was computed there, or None for what is wrong."""

    def __init__(self, seed: int, ahead: int) -> None:
        self.random = random.Random(seed)
        self.ahead = ahead
        self.table = Requests(BLOCK, [PAGE])
        self.free = list(range(1, PAGES))
        self.owners = dict.fromkeys(range(PAGES), 0)
        self.local: dict[bytes, int] = {}
        self.memory: dict[int, list[bytes | None]] = {page: [None, None] for page in range(PAGES)}
        self.cache: dict[bytes, bytes | None] = {}
        self.sequences: dict[str, Sequence] = {}
        self.saving: list[tuple[str, bytes, int, int]] = []
        self.keys: dict[str, list[bytes]] = {}
        self.held: dict[str, list[int]] = {}
        self.waiting_for: set[str] = set()
        self.heard: list[tuple[int, set[int], set[str], set[str]]] = []
        self.loading: list[tuple[Order, list[bytes]]] = []
        self.keep: set[str] = set()

    # -- pages

    def take(self, count: int) -> list[int] | None:
        if len(self.free) < count:
            return None
        taken = [self.free.pop(self.random.randrange(len(self.free))) for _ in range(count)]
        for page in taken:
            self.owners[page] = 1
            self.local = {key: at for key, at in self.local.items() if at != page}
        return taken

    def give(self, pages: list[int]) -> None:
        for page in pages:
            self.owners[page] -= 1
            if not self.owners[page]:
                self.free.append(page)

    # -- one step

    def step(self) -> None:
        scheduled: list[Scheduled] = []
        work: list[tuple[Sequence, int, int]] = []
        for one in list(self.sequences.values()):
            if one.state == "running" and self.random.random() < 0.05 and len(self.sequences) > 1:
                self.preempt(one)
            elif self.random.random() < 0.02:
                self.finish(one)
        for one in list(self.sequences.values()):
            if one.state == "new" and not self.admit(one):
                continue
            if one.state != "running":
                continue
            count = min(CHUNK, len(one.tokens) - one.computed)
            need = -(-(one.computed + count) // PAGE) - len(one.pages)
            new = self.take(max(0, need))
            if new is None:
                self.preempt(one)
                continue
            one.pages += new
            row = self.table.get(one.name)
            have = len(row.keys[0])
            row.keys[0] += [one.key(i) for i in range(have, (one.computed + count) // BLOCK)]
            pages = (list(one.pages),) if one.fresh else (new,) if new else None
            scheduled.append(Scheduled(one.name, one.computed, count, len(one.tokens), pages, one.fresh))
            one.fresh = False
            work.append((one, one.computed, count))
            one.computed += count
        self.work(self.table.step(scheduled), work)
        while len(self.heard) > self.ahead:
            self.hear(*self.heard.pop(0))
        for one, start, count in work:
            if one.state == "running" and start + count == len(one.tokens) == one.computed:
                if len(one.tokens) >= one.end:
                    self.finish(one)
                else:
                    one.tokens.append(self.random.randrange(1000))

    def admit(self, one: Sequence) -> bool:
        shared = []
        while (len(shared) + 1) * PAGE < len(one.tokens):
            page = self.local.get(one.key((len(shared) + 1) * PAGE // BLOCK - 1))
            if page is None:
                break
            shared.append(page)
        row = self.table.add(one.name)
        wanted = self.table.wanted(row, len(one.tokens))
        row.keys[0] += [one.key(i) for i in range(len(row.keys[0]), wanted)]
        stored = 0
        while stored < wanted and one.key(stored) in self.cache:
            stored += 1
        tokens = self.table.matched(row, len(shared) * PAGE, stored, stored)
        later = tokens > 0 and self.random.random() < 0.5
        total = len(shared) * PAGE + tokens
        for page in shared:
            self.owners[page] += 1
            if page in self.free:
                self.free.remove(page)
        new = self.take(-(-total // PAGE) - len(shared))
        if new is None:
            self.give(shared)
            return False
        one.pages, one.computed, one.fresh = shared + new, total, True
        self.table.allocated(row, [one.pages], tokens, [range(stored)], later=later)
        if later:
            one.state = "loading"
            self.waiting_for.add(one.name)
        else:
            one.state = "running"
            self.enter(one, total)
        return True

    def enter(self, one: Sequence, tokens: int) -> None:
        """Full pages enter the local prefix cache, before anything is in them, as vLLM has it."""
        for i in range(tokens // PAGE):
            self.local.setdefault(one.key((i + 1) * PAGE // BLOCK - 1), one.pages[i])

    def preempt(self, one: Sequence) -> None:
        self.give(one.pages)
        one.pages, one.computed, one.state = [], 0, "new"

    def finish(self, one: Sequence) -> None:
        row = self.table.get(one.name)
        if row is not None:
            have = len(row.keys[0])
            row.keys[0] += [one.key(i) for i in range(have, (len(one.tokens) - 1) // BLOCK)]
        held = self.table.finished(one.name, len(one.tokens), one.computed, [one.pages])
        if one.name in self.waiting_for:
            assert not held
            self.held[one.name] = one.pages
        elif held:
            self.held[one.name] = one.pages
        else:
            self.give(one.pages)
        del self.sequences[one.name]

    # -- the worker

    def work(self, step: Step, work: list[tuple[Sequence, int, int]]) -> None:
        for name, _, first, keys in step.keys:
            known = self.keys.setdefault(name, [])
            assert len(known) >= first, "keys are told without gaps"
            known[first:] = keys
        for each in list(self.saving):
            if each[2] in step.written:
                self.copy(each)
        for name in step.dropped:
            self.keys.pop(name, None)
        bad: set[int] = set()
        for order in step.loads:
            if order.later:
                self.loading.append((order, list(self.keys[order.request])))
            else:
                bad |= self.load(order, self.keys[order.request])
        for one, start, count in work:
            for block in range(start // BLOCK, (start + count) // BLOCK):
                page, slot = divmod(block, PAGE // BLOCK)
                before = [divmod(i, PAGE // BLOCK) for i in range(block)]
                right = all(self.memory[one.pages[p]][s] == one.key(i) for i, (p, s) in enumerate(before))
                self.memory[one.pages[page]][slot] = one.key(block) if right else None
            self.enter(one, start + count)
        for order in step.saves:
            (move,) = order.moves
            for block in range(move.start, move.stop):
                page, slot = divmod(block, PAGE // BLOCK)
                key = self.keys[order.request][block]
                self.saving.append((order.request, key, move.pages[page - move.first_page], slot))
        for each in list(self.saving):
            if self.random.random() < 0.3:
                self.copy(each)
        received = set()
        for each in list(self.loading):
            if self.random.random() < 0.4:
                self.loading.remove(each)
                bad |= self.load(*each)
                received.add(each[0].request)
        self.keep |= set(step.held)
        sent = {name for name in self.keep if not any(each[0] == name for each in self.saving)}
        self.keep -= sent
        self.heard.append((step.number, bad, received, sent))

    def copy(self, each: tuple[str, bytes, int, int]) -> None:
        self.saving.remove(each)
        _, key, page, slot = each
        found = self.memory[page][slot]
        assert found == key, "what was stored is not what its key says"
        self.cache[key] = found

    def load(self, order: Order, keys: list[bytes]) -> set[int]:
        bad = set()
        (move,) = order.moves
        for block in range(move.start, move.stop):
            page, slot = divmod(block, PAGE // BLOCK)
            at = move.pages[page - move.first_page]
            key = keys[block]
            good = key in self.cache and self.random.random() < 0.9
            self.memory[at][slot] = self.cache[key] if good else None
            if not good:
                self.cache.pop(key, None)
                bad.add(at)
        return bad

    # -- what the scheduler hears

    def hear(self, number: int, bad: set[int], received: set[str], sent: set[str]) -> None:
        if bad:
            marked: set[int] = set()
            for one in self.sequences.values():
                for i, page in enumerate(one.pages):
                    if page in bad and page not in marked:
                        # The engine itself is no better than its book-keeping: whoever has the page computes it again.
                        one.computed = min(one.computed, i * PAGE)
                        break
            self.local = {key: page for key, page in self.local.items() if page not in bad}
            self.table.failed(bad)
        for name in received:
            self.waiting_for.discard(name)
            self.table.received(name)
            if name in self.held:
                self.give(self.held.pop(name))
                continue
            one = self.sequences[name]
            if one.computed:
                one.state, one.fresh = "running", True
                self.enter(one, one.computed)
            else:
                self.preempt(one)
        self.table.proven(number)
        for name in sent:
            self.keys.pop(name, None)
            self.give(self.held.pop(name))


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("seed", range(SEEDS))
def test_nothing_wrong_is_stored(seed: int, ahead: int) -> None:
    engine = Engine(seed, ahead)
    families = [[engine.random.randrange(1000) for _ in range(260)] for _ in range(3)]
    asked = 0
    for _ in range(STEPS_MAX):
        if asked < 30 and len(engine.sequences) < 5 and engine.random.random() < 0.4:
            family = engine.random.choice(families)
            length = engine.random.randrange(1, 250)
            tokens = family[: engine.random.randrange(0, length + 1)]
            tokens += [engine.random.randrange(1000) for _ in range(length - len(tokens))]
            engine.sequences[f"r{asked}"] = Sequence(f"r{asked}", tokens, length + engine.random.randrange(1, 40))
            asked += 1
        engine.step()
        assert all(found == key for key, found in engine.cache.items())
        if asked == 30 and not engine.sequences and not engine.held and not engine.saving:
            break
    else:
        pytest.fail("some request never ends")
    for _ in range(3):
        engine.step()
    assert len(engine.table) == 0
    assert not engine.keys, "workers forget what is over"
    assert sorted(engine.free) == list(range(1, PAGES))
    assert engine.cache
