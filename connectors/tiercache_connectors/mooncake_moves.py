"""Moves: values between an engine's memory and a cache, by keys that are strings; each batch is one call of the cache.

A key becomes a name of 32 bytes: 8 that all keys of a tenant have in common, by which they are found again when all
are removed, and 24 of BLAKE2b over tenant and key, so that nobody makes two keys with one name.
"""

from __future__ import annotations

import hashlib
import threading
from typing import TYPE_CHECKING

import numpy as np

from tiercache.buffers import Buffer, copy, copy_many_verified, verify_parts
from tiercache.keys import namespace
from tiercache.lease import Pieces, look_again
from tiercache.model import Kind, Name, Outcome, all_parts, part_bytes_for
from tiercache.sync import wait
from tiercache_connectors.mooncake_ranges import scatter
from tiercache_connectors.mooncake_seen import Seen

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tiercache.buffers import Source
    from tiercache.lease import Lease
    from tiercache.sync import BlockingCache
    from tiercache_connectors.mooncake_ranges import Range

    Key = str | bytes
    Extent = tuple[Buffer, bytes]
    Take = Callable[[list[int], list[Extent]], list[Outcome]]
    """Copies extents of these items of a batch, and says how each went."""

TAG_BYTES, DIGEST_BYTES = 8, 24
GATHER_BYTES = 16 << 20
"""Values that lie in pieces are gathered so much at a time, in a scratch that their thread keeps."""
NO_ROOM, BAD, NOT_FOUND = -200, -600, -704
"""Mooncake's NO_AVAILABLE_HANDLE, INVALID_PARAMS and OBJECT_NOT_FOUND."""


class Moves:
    """See the module. Any thread; raises what the cache raises where that cannot be asked."""

    def __init__(self, cache: BlockingCache, tenant: str) -> None:
        self.cache = cache
        self.tag = namespace("mooncake", tenant)[:TAG_BYTES]
        self._salt = hashlib.blake2b(tenant.encode("utf-8", "surrogatepass")).digest()
        self._scratch = threading.local()
        self._seen = Seen()

    def name(self, key: Key) -> Name:
        """The name that a key's value is stored under."""
        data = key if isinstance(key, bytes) else key.encode("utf-8", "surrogatepass")
        return Name(self.tag + hashlib.blake2b(data, digest_size=DIGEST_BYTES, key=self._salt).digest())

    def names(self, keys: Sequence[Key]) -> list[Name]:
        """As `name`, of each."""
        name = self.name
        return [name(key) for key in keys]

    # -- what is there -------------------------------------------------------------------------------------------------

    def exist(self, names: Sequence[Name]) -> list[int]:
        """1 where there is a value, in any tier that this machine reaches, 0 where there is none. Loads nothing."""
        if len(names) == 1:
            return [int(self.tier(names[0]) > 0)]
        keys = [name.key.hex() for name in names]
        return [int(one > 0) for one in wait(self.cache.core.call("exist", {"keys": keys}), self.cache.loop)]

    def tier(self, name: Name) -> int:
        """The slowest tier that the value must come from: 1 memory, 2 SSD, 3 object storage, 4 a peer; 0 where there
        is none."""
        return next(iter(self.cache.core.probe_chain([name.key], 1)), 0)

    def sizes(self, names: Sequence[Name]) -> list[int]:
        """Bytes of values, which are brought to memory for that; NOT_FOUND where there is none."""
        found = [0] * len(names)

        def look(items: list[int], extents: list[Extent]) -> list[Outcome]:
            for item, (buffer, _) in zip(items, extents, strict=True):
                found[item] = buffer.length
            return [Outcome.HIT] * len(items)

        return self._codes(self._read(names, look), found)

    # -- reads ---------------------------------------------------------------------------------------------------------

    def get(self, names: Sequence[Name], room: Callable[[int, int], Buffer | None]) -> list[int]:
        """Copies whole values, verified, to where `room(item, size)` says, which may be nowhere: BAD. Answers sizes, or
        why not."""
        sizes = [0] * len(names)

        def take(items: list[int], extents: list[Extent]) -> list[Outcome]:
            sources: list[Source] = []
            targets: list[Buffer] = []
            for item, (buffer, digests) in zip(items, extents, strict=True):
                size = buffer.length
                target = room(item, size)
                sizes[item] = size if target is not None else BAD
                if target is not None:
                    self._seen.learn(names[item], buffer)
                    sources.append((buffer.address, size, part_bytes_for(size), digests, buffer.owner))
                    targets.append(target)
            good = iter(copy_many_verified(sources, targets))
            return [
                Outcome.HIT if sizes[item] == BAD or next(good) else Outcome.CORRUPT  # a comparison copies nothing
                for item in items
            ]

        return self._codes(self._read(names, take), sizes)

    def get_at(self, names: Sequence[Name], addresses: Sequence[int], fits: Callable[[int, int], bool]) -> list[int]:
        """As `get`, to these addresses where `fits(item, size)`; what was seen before costs no question."""
        answers = self._seen.copy(self.cache.core, names, addresses, fits)
        rest = [i for i, answer in enumerate(answers) if answer < 0]

        def room(item: int, size: int) -> Buffer | None:
            i = rest[item]
            return Buffer(addresses[i], size, None) if fits(i, size) else None

        if rest:
            for i, answer in zip(rest, self.get([names[i] for i in rest], room), strict=True):
                answers[i] = answer
        return answers

    def get_ranges(self, names: Sequence[Name], plans: Callable[[int, int], Sequence[Range] | None]) -> list[int]:
        """Copies ranges of values to where `plans(item, size)` says (None: BAD), each value verified as a whole right
        before. Answers bytes copied, or why not."""
        sizes = [0] * len(names)

        def take(items: list[int], extents: list[Extent]) -> list[Outcome]:
            outcomes = []
            for item, (buffer, digests) in zip(items, extents, strict=True):
                plan, step = plans(item, buffer.length), part_bytes_for(buffer.length)
                sizes[item] = BAD if plan is None else sum(one.length for one in plan)
                good = plan is None or verify_parts(buffer, step, all_parts(buffer.length, step), digests)
                if good and plan is not None:
                    scatter(buffer, plan)
                outcomes.append(Outcome.HIT if good else Outcome.CORRUPT)
            return outcomes

        return self._codes(self._read(names, take), sizes)

    def lease(self, names: Sequence[Name]) -> Lease | None:
        """A lease on values in memory, brought there where needed; None where the only one asked for is nowhere, which
        costs no turn of the loop."""
        core = self.cache.core
        resident = core.lease_names_resident(names)
        if resident is None and len(names) == 1 and not self.tier(names[0]):
            return None
        return resident if resident is not None else wait(core.lease(names), self.cache.loop)

    def _read(self, names: Sequence[Name], take: Take) -> list[Outcome]:
        """Leases values and lets `take` copy them, in pieces where they are more than this process may hold at once;
        what was damaged is looked for once more, in the tiers below."""
        outcomes = [Outcome.MISS] * len(names)
        damaged: set[int] = set()
        pieces = Pieces(range(len(names)))
        for piece in pieces:
            rest = piece
            while rest and (lease := self.lease([names[i] for i in rest])) is not None:
                with lease:
                    for i, outcome in zip(rest, lease.outcomes, strict=True):
                        outcomes[i] = outcome
                    hits = [at for at, outcome in enumerate(lease.outcomes) if outcome is Outcome.HIT]
                    items = [rest[at] for at in hits]
                    for i, outcome in zip(items, take(items, lease.extents(hits)), strict=True):
                        outcomes[i] = outcome
                if pieces.refused(rest, outcomes):
                    break
                rest = look_again(names, outcomes, rest, damaged, self.cache.core.quarantine)
        return outcomes

    @staticmethod
    def _codes(outcomes: Sequence[Outcome], sizes: Sequence[int]) -> list[int]:
        return [
            size if outcome is Outcome.HIT else NO_ROOM if outcome in (Outcome.BUSY, Outcome.FULL) else NOT_FOUND
            for outcome, size in zip(outcomes, sizes, strict=True)
        ]

    # -- writes --------------------------------------------------------------------------------------------------------

    def put(self, names: Sequence[Name], values: Sequence[Buffer], *, anew: bool = False) -> list[int]:
        """Stores values: 0, also where there is one, which stays; NO_ROOM where none could be made. `anew`: what is
        there is removed first."""
        if anew:
            self.remove(names)
        first = {name: i for i, name in reversed(list(enumerate(names)))}
        chosen = sorted(first.values())
        outcomes = self._store([names[i] for i in chosen], [values[i] for i in chosen])
        for i, outcome in zip(chosen, outcomes, strict=True):
            if outcome is Outcome.HIT:
                self._seen.learn(names[i], values[i])
        said = {names[i]: outcome for i, outcome in zip(chosen, outcomes, strict=True)}
        return [0 if said[name] is Outcome.HIT else NO_ROOM for name in names]

    def _store(self, names: list[Name], values: list[Buffer]) -> list[Outcome]:
        """Stores what stands there once; what somebody else stores now is as good as stored once it is seen."""
        outcomes = self.cache.put(names, values, kind=Kind.KV)
        busy = [i for i, outcome in enumerate(outcomes) if outcome is Outcome.BUSY]
        if busy:
            again = self.cache.put([names[i] for i in busy], [values[i] for i in busy], kind=Kind.KV)
            for i, outcome in zip(busy, again, strict=True):
                there = outcome is Outcome.BUSY and self.tier(names[i])
                outcomes[i] = Outcome.HIT if there else outcome
        return outcomes

    def put_gathered(
        self, names: Sequence[Name], pieces: Sequence[Sequence[Buffer]], *, anew: bool = False
    ) -> list[int]:
        """As `put`, of values that lie in pieces, one after the other."""
        sizes = [sum(piece.length for piece in some) for some in pieces]
        codes: list[int] = []
        start = 0
        while start < len(names):
            stop, held = start + 1, sizes[start]
            while stop < len(names) and held + sizes[stop] <= GATHER_BYTES:
                held += sizes[stop]
                stop += 1
            values = self._gathered(pieces[start:stop], sizes[start:stop])
            codes += self.put(names[start:stop], values, anew=anew)
            start = stop
        return codes

    def _gathered(self, pieces: Sequence[Sequence[Buffer]], sizes: Sequence[int]) -> list[Buffer]:
        scratch = self._room(sum(sizes))
        values, at = [], 0
        for some, size in zip(pieces, sizes, strict=True):
            values.append(scratch.slice(at, size))
            for piece in some:
                copy(piece, scratch.slice(at, piece.length))
                at += piece.length
        return values

    def _room(self, size: int) -> Buffer:
        """Scratch of this thread; what is larger than it may keep is made anew."""
        kept: Buffer | None = getattr(self._scratch, "memory", None)
        if kept is None or kept.length < size:
            kept = Buffer.of(np.empty(max(size, 1 << 20), np.uint8).data, writable=True)
            if size <= GATHER_BYTES:
                self._scratch.memory = kept
        return kept

    # -- removal -------------------------------------------------------------------------------------------------------

    def remove(self, names: Sequence[Name]) -> list[int]:
        """Forgets values in every tier: 0, or NOT_FOUND where there was none."""
        return [0 if outcome is Outcome.HIT else NOT_FOUND for outcome in self.cache.delete(names)]

    def remove_all(self) -> int:
        """Forgets every value of this tenant, of whichever process, also from before a restart; answers how many there
        were."""
        core, loop, mine = self.cache.core, self.cache.loop, self.tag.hex()
        count = after = 0
        while True:
            answer = wait(core.call("contents", {"after": after}), loop)
            keys = [bytes.fromhex(row[0]) for row in answer["rows"] if row[0].startswith(mine)]
            gone = (
                self.cache.delete([Name(key) for key in keys if len(key) == TAG_BYTES + DIGEST_BYTES]) if keys else []
            )
            count += gone.count(Outcome.HIT)
            after = answer["after"]
            if not after:
                return count
