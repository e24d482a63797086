"""The process that is killed: opens the cache, looks at everything that should be there, then writes until it ends."""

from __future__ import annotations

import itertools
import os
import random
import threading
import traceback
from typing import TYPE_CHECKING

import fsspec.asyn
import numpy as np
import rocksdict

import tiercache
import tiercache.ssd.tier
from tests.crash import joint
from tests.crash.ledger import FILE_PAGES, FILE_SIZE, PAGE_BYTES, PART_BYTES, Ledger, page_of, value_of
from tiercache import keys
from tiercache.buffers import Buffer
from tiercache.errors import TierCacheError
from tiercache.lease import PageRun
from tiercache.model import Name, Outcome
from tiercache.sync import wait

if TYPE_CHECKING:
    from collections.abc import Callable

LOADED = (fsspec.asyn, rocksdict, tiercache.ssd.tier, tiercache.open)
"""Imported before the fork, so that a child lives at once."""

BATCH = 64
FILES = 6


class Child:
    """One life of the writing process."""

    def __init__(self, directory: str, ledger: Ledger, seed: str, pipe: int, options: dict[str, object]) -> None:
        self.directory, self.ledger, self.seed, self.pipe, self.options = directory, ledger, seed, pipe, options
        self.keeps = bool(options.pop("keeps"))
        self.numbers = itertools.count(ledger.count)
        self.flush_numbers = itertools.count()
        self.stop = threading.Event()

    def say(self, *words: object) -> None:
        """One line to the parent, at once and whole."""
        os.write(self.pipe, (" ".join(map(str, words))[:500] + "\n").encode())

    def live(self, *, ends: bool) -> None:
        """Opens, checks, writes; `ends`: flushes and closes after a while, otherwise goes on until it is killed."""
        self.say("o")
        self.cache = tiercache.open(self.directory, **self.options)
        checked, present = self.check_values()
        more_checked, more_present = self.check_pages()
        self.say("v", checked + more_checked, present + more_present)
        workers = [
            threading.Thread(target=self.work, args=(work, f"{self.seed}/{i}"), daemon=True)
            for i, work in enumerate([self.put_some, self.put_some, self.read_pages, self.blocks])
        ]
        for worker in workers:
            worker.start()
        self.stop.wait(0.2 if ends else None)
        self.stop.set()
        for worker in workers:
            worker.join()
        self.flush()
        self.cache.close()
        self.say("z")

    def work(self, step: Callable[[random.Random, list[int]], None], seed: str) -> None:
        """Repeats a step until the end; a fault of the cache is reported, since no fault is injected here."""
        rng = random.Random(seed)
        mine: list[int] = []
        try:
            while not self.stop.is_set():
                step(rng, mine)
        except BaseException:
            self.say("x", traceback.format_exc(limit=-3).replace("\n", " | "))

    # -- looking ---------------------------------------------------------------------------------------------------

    def check_values(self) -> tuple[int, int]:
        """Compares every value that may be there with the only right one."""
        items = list(self.ledger.items.items())
        present = 0
        for start in range(0, len(items), BATCH):
            batch = items[start : start + BATCH]
            targets = [bytearray(item.size) for _, item in batch]
            outcomes = self.cache.get_into(
                [value_name(n) for n, _ in batch], [Buffer.of(target, writable=True) for target in targets]
            )
            for (number, item), target, outcome in zip(batch, targets, outcomes):
                if outcome is Outcome.HIT:
                    present += 1
                    if target != value_of(number, item.size):
                        self.say("w", f"value {number} after reopening: {item}")
                    elif item.gone:
                        self.say("r", number)
                elif self.keeps and item.durable and not item.deleting:
                    self.say("l", number, int(outcome))
        return len(items), present

    def check_pages(self) -> tuple[int, int]:
        """Reads every part that was ever readable; what is not there is loaded again, and is lost if it was durable."""
        present = 0
        for (file, ordinal), parts in self.ledger.pages.items():
            loaded = self.page_read(file, [ordinal], [parts])
            missing = loaded.get(ordinal, 0)
            present += missing == 0
            lost = missing & self.ledger.durable_pages.get((file, ordinal), 0)
            if self.keeps and lost:
                self.say("q", file, ordinal, lost)
        return len(self.ledger.pages), present

    def page_read(self, file: int, ordinals: list[int], parts: list[int]) -> dict[int, int]:
        """Reads parts of pages through the cache, compares them, and answers what had to be loaded."""
        loaded: dict[int, int] = {}

        async def load(gaps, landed) -> None:
            for i, gap in enumerate(gaps):
                truth = np.frombuffer(page_of(file, gap.ordinal), np.uint8)
                target = gap.target.array()
                for start, stop in spans(gap.parts, len(truth)):
                    target[start:stop] = truth[start:stop]
                loaded[gap.ordinal] = gap.parts
                landed([i])

        run = PageRun(page_key(file), FILE_SIZE, PAGE_BYTES, PART_BYTES)
        with wait(self.cache.core.read_pages(run, ordinals, parts, load), self.cache.loop) as lease:
            for i, (ordinal, wanted) in enumerate(zip(ordinals, parts)):
                if lease.outcomes[i] is not Outcome.HIT:
                    continue
                truth = page_of(file, ordinal)
                view = lease.view(i)
                for start, stop in spans(wanted, len(truth)):
                    if view[start:stop] != truth[start:stop]:
                        self.say("w", f"file {file} page {ordinal} bytes {start} to {stop}")
                self.say("p", file, ordinal, wanted)
        return loaded

    # -- writing ---------------------------------------------------------------------------------------------------

    def put_some(self, rng: random.Random, mine: list[int]) -> None:
        """A batch of values, durable or not; now and then a delete, a flush or a look at something older."""
        durable = rng.random() < 0.4
        numbers = [next(self.numbers) for _ in range(rng.randrange(1, 5))]
        values = [value_of(n, random_size(rng)) for n in numbers]
        for number, value in zip(numbers, values):
            self.say("b", number, len(value))
        outcomes = self.cache.put([value_name(n) for n in numbers], values, durable=durable)
        for number, value, outcome in zip(numbers, values, outcomes):
            if outcome is Outcome.HIT:
                self.say("a", number, int(durable))
                mine.append(number)
                self.ledger.items.setdefault(number, len(value))
        chance = rng.random()
        if chance < 0.1:
            self.flush()
        elif chance < 0.25 and mine:
            number = mine.pop(rng.randrange(len(mine)))
            self.say("d", number)
            self.cache.delete([value_name(number)])
            self.say("D", number)
        elif mine:
            number = rng.choice(mine)
            size = self.ledger.items[number]
            target = bytearray(size)
            outcome = self.cache.get_into([value_name(number)], [Buffer.of(target, writable=True)])[0]
            if outcome is Outcome.HIT and target != value_of(number, size):
                self.say("w", f"value {number} while running")

    def read_pages(self, rng: random.Random, _mine: list[int]) -> None:
        """Some parts of some pages of one file."""
        ordinals = sorted(rng.sample(range(FILE_PAGES), rng.randrange(1, 3)))
        self.page_read(rng.randrange(FILES), ordinals, [rng.randrange(1, 4) << rng.randrange(2) for _ in ordinals])
        if rng.random() < 0.1:
            self.flush()

    def blocks(self, rng: random.Random, _mine: list[int]) -> None:
        """Blocks that are filled part by part."""
        if rng.random() < 0.5:
            joint.write(self.cache, rng)
        else:
            joint.read(self.cache, rng, lambda text: self.say("w", text))

    def flush(self) -> None:
        number = next(self.flush_numbers)
        self.say("f", number)
        self.cache.flush()
        self.say("F", number)


def run(directory: str, ledger: Ledger, seed: str, pipe: int, options: dict[str, object], *, ends: bool) -> None:
    """Lives one life in this (forked) process; never returns."""
    child = Child(directory, ledger, seed, pipe, dict(options))
    code = 1
    try:
        child.live(ends=ends)
        code = 0
    except TierCacheError:
        child.say("x", traceback.format_exc(limit=-3).replace("\n", " | "))
    except BaseException:
        child.say("x", traceback.format_exc(limit=-5).replace("\n", " | "))
    finally:
        os._exit(code)


def value_name(number: int) -> Name:
    return Name(keys.object_key("crash", str(number)))


def page_key(file: int) -> bytes:
    return keys.page_key("crash://", str(file), "1", PAGE_BYTES, PART_BYTES)


def random_size(rng: random.Random) -> int:
    chance = rng.random()
    if chance < 0.4:
        return rng.randrange(0, 4096)
    if chance < 0.9:
        return rng.randrange(4096, 65536)
    return rng.randrange(65536, 1 << 20)


def spans(parts: int, size: int) -> list[tuple[int, int]]:
    """Byte ranges of the parts of a page of `size` bytes."""
    return [(i * PART_BYTES, min(size, (i + 1) * PART_BYTES)) for i in range(-(-size // PART_BYTES)) if parts >> i & 1]
