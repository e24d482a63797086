"""Names: from keys, page ordinals and chains of digests to slots, and back.

Chains. A block's digest covers its whole prefix, so every block is found by its own digest alone, and appending below a
block needs only that block: there is no path to walk and no run to split. What makes long matches cheap is that blocks
stored together mostly lie in consecutive slots: such a stretch is compared by memcmp against the column of keys. Where
a chain is scattered, the rest is looked up vectorised, block by block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tiercache.errors import ConfigError
from tiercache.index.runs import NARROW, WIDE, PageRuns, fold, folds, same_rows
from tiercache.index.slots import DEAD_BIT, PAGE_BIT, WIDE_BIT
from tiercache.index.table import MIX, WORD, RowTable
from tiercache.model import Form, Name

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from tiercache.index.slots import Slots

    I64 = npt.NDArray[np.int64]
    U64 = npt.NDArray[np.uint64]
    Mask = npt.NDArray[np.bool_]

RUN_MIX = 0xD1B54A32D192ED03
"""Spreads runs apart; ordinals of one run are consecutive and fall evenly over the buckets by themselves."""
_RUN_MIX = np.uint64(RUN_MIX)
STRETCH_MIN = 48
"""Shorter stretches of consecutive slots than this, on average, are slower than looking every block up vectorised."""
_KEY_BITS = PAGE_BIT | WIDE_BIT


def _mixed(key: bytes) -> int:
    """A key's words mixed into 64 bits, whose upper ones are its bucket (see RowTable.bucket)."""
    width = len(key)
    if width == 16:
        return fold(NARROW.unpack(key)) * MIX & WORD
    if width == 32:
        return fold(WIDE.unpack(key)) * MIX & WORD
    raise ConfigError(f"a key has 16 or 32 bytes, not {width}")


class Query:
    """Digests of one chain, as bytes and as words; made outside the lock."""

    __slots__ = ("count", "raw", "width", "words")

    def __init__(self, digests: Sequence[bytes] | bytes, width: int) -> None:
        if width not in (16, 32):
            raise ConfigError(f"a digest has 16 or 32 bytes, not {width}")
        self.raw = digests if isinstance(digests, bytes) else b"".join(digests)
        self.width = width
        self.count = len(self.raw) // width
        expected = self.count if isinstance(digests, bytes) else len(digests)
        if len(self.raw) != expected * width:
            raise ConfigError(f"every digest of this chain must have {width} bytes")
        self.words: U64 = np.frombuffer(self.raw, np.uint64).reshape(-1, width // 8)


class NameTable:
    """Which slot has which name. Lone objects and blocks share one name space: their keys are digests."""

    def __init__(self, slots: Slots) -> None:
        self.slots = slots
        self.table = RowTable(slots.slots_max)
        self.runs = PageRuns(slots.slots_max)

    # -- one name -----------------------------------------------------------------------------------------------------
    def find(self, key: bytes, ordinal: int) -> int:
        """The slot of a page (if the key is a file version's) or else of a lone object or block; 0 = none."""
        mixed = _mixed(key)
        runs, table = self.runs, self.table
        if runs.table.heads[mixed >> runs.table.shift]:
            run = runs.find(key)
            if run:
                return self.find_page(run, ordinal)
        row = table.heads[mixed >> table.shift]
        return self._key_in_bucket(key, row) if row else 0

    def find_page(self, run: int, ordinal: int) -> int:
        """The slot of one page of a run; 0 = none."""
        table, depths, runs = self.table, self.slots.depths, self.slots.runs
        row = table.heads[((run * RUN_MIX + ordinal) * MIX & WORD) >> table.shift]
        while row:
            if depths[row] == ordinal and runs[row] == run and self.slots.forms[row] & PAGE_BIT:
                return row
            row = table.nexts[row]
        return 0

    def find_key(self, key: bytes) -> int:
        """The slot of a lone object or block; 0 = none."""
        row = self.table.heads[_mixed(key) >> self.table.shift]
        return self._key_in_bucket(key, row) if row else 0

    def _key_in_bucket(self, key: bytes, row: int) -> int:
        """The slot of a key among those linked from `row` on; 0 = none."""
        slots, nexts = self.slots, self.table.nexts
        forms, heads = slots.forms, slots.ident_bytes
        bits, tails = (WIDE_BIT, slots.tail_bytes) if len(key) == 32 else (0, None)
        while row:
            at = row * 16
            if (
                heads[at : at + 16] == key[:16]
                and forms[row] & _KEY_BITS == bits
                and (tails is None or tails[at : at + 16] == key[16:])
            ):
                return row
            row = nexts[row]
        return 0

    # -- many names ---------------------------------------------------------------------------------------------------
    def page_buckets(self, runs: int | I64, ordinals: I64) -> I64:
        """Buckets of pages."""
        if isinstance(runs, int):
            spread = np.uint64(runs * RUN_MIX & WORD)
            return self.table.buckets(ordinals.astype(np.uint64) + spread)
        return self.table.buckets(runs.astype(np.uint64) * _RUN_MIX + ordinals.view(np.uint64))

    def find_pages(self, runs: int | I64, ordinals: I64) -> I64:
        """The slots of pages of one run, or of one run each; 0 = none."""
        slots = self.slots

        def equal(rows: I64, at: I64 | slice) -> Mask:
            same: Mask = slots.depth.take(rows) == ordinals[at]
            same &= slots.run.take(rows) == (runs if isinstance(runs, int) else runs[at])
            same &= (slots.form.take(rows) & (PAGE_BIT | DEAD_BIT)) == PAGE_BIT
            return same

        return self.table.find(self.page_buckets(runs, ordinals), equal)

    def pages_of(self, key: bytes) -> I64:
        """All slots of a file version, in whatever state."""
        slots, run = self.slots, self.runs.find(key)
        if not run:
            return np.empty(0, np.int64)
        top = self.runs.tops[run]
        if top <= slots.rows.top:
            rows = self.find_pages(run, np.arange(top))
            return rows[rows > 0]
        mine = (slots.run[: slots.rows.top] == run) & (slots.form[: slots.rows.top] & 129 == 1)
        return np.flatnonzero(mine & (slots.state[: slots.rows.top] > 0))

    def guess_pages(self, run: int, ordinals: I64) -> I64:
        """As find_pages, for one run: pages stored in order have consecutive slots, so the first tells the others."""
        first = self.find_page(run, int(ordinals[0]))
        if not first or len(ordinals) < 8:
            return self.find_pages(run, ordinals)
        slots = self.slots
        rows = ordinals + (first - int(ordinals[0]))
        np.clip(rows, 0, slots.slots_max, out=rows)
        same = slots.depth.take(rows) == ordinals
        same &= slots.run.take(rows) == run
        same &= (slots.form.take(rows) & (PAGE_BIT | DEAD_BIT)) == PAGE_BIT
        if not same.all():
            rest = np.flatnonzero(~same)
            rows[rest] = self.find_pages(run, ordinals[rest])
        return rows

    def find_keys(self, words: U64) -> I64:
        """The slots of lone objects or blocks with (n, 2) or (n, 4) words of key; 0 = none."""
        slots, wide = self.slots, words.shape[1] == 4
        head = np.ascontiguousarray(words[:, :2])
        tail = np.ascontiguousarray(words[:, 2:])
        bits = WIDE_BIT if wide else 0

        def equal(rows: I64, at: I64 | slice) -> Mask:
            same = same_rows(slots.ident.take(rows, axis=0), head[at])
            same &= (slots.form.take(rows) & _KEY_BITS) == bits
            if wide:
                same &= same_rows(slots.tail.take(rows, axis=0), tail[at])
            return same

        return self.table.find(self.table.buckets(folds(words)), equal)

    # -- chains -------------------------------------------------------------------------------------------------------
    def walk(self, query: Query, above: int = 0) -> I64:
        """Slots of the longest prefix of a chain (below slot `above`, 0: from its start) that is in the index, in
        whatever state, each the parent of the next."""
        pieces: list[I64] = []
        at = 0
        width, raw, count = query.width, query.raw, query.count
        while at < count:
            first = self.find_key(raw[at * width : (at + 1) * width])
            if not first or self.slots.parents[first] != above:
                break
            length = self._stretch(query, at, first)
            pieces.append(np.arange(first, first + length))
            at += length
            above = first + length - 1
            if at < count and at < STRETCH_MIN * len(pieces):
                pieces.append(self._walk_scattered(query, at, above))
                break
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)

    def find_blocks(self, query: Query) -> I64:
        """The slots of blocks, from anywhere in their chains; 0 = none. Those that lie in consecutive slots as a chain
        are found by the first of them."""
        first = self.find_key(query.raw[: query.width]) if query.count else 0
        length = self._stretch(query, 0, first) if first else 0
        stretch = np.arange(first, first + length)
        return np.concatenate((stretch, self.find_keys(query.words[length:]))) if length < query.count else stretch

    def _stretch(self, query: Query, at: int, first: int) -> int:
        """How many blocks from `at` on lie in consecutive slots from `first` on, each the parent of the next."""
        slots, size = self.slots, 32
        most = min(query.count - at, slots.rows.top - first)
        done = 1
        while done < most:
            size = min(size * 4, most - done)
            low, q = first + done, at + done
            if not self._same_bytes(query, q, low, size):
                differ = ~same_rows(slots.ident[low : low + size], np.ascontiguousarray(query.words[q : q + size, :2]))
                if query.width == 32:
                    tail = np.ascontiguousarray(query.words[q : q + size, 2:])
                    differ |= ~same_rows(slots.tail[low : low + size], tail)
                same = int(differ.argmax())
            else:
                same = size
            fine = slots.parent[low : low + same] == np.arange(low - 1, low - 1 + same)
            fine &= (slots.form[low : low + same] & (_KEY_BITS | DEAD_BIT)) == (WIDE_BIT if query.width == 32 else 0)
            if not fine.all():
                return done + int(fine.argmin())
            done += same
            if same < size:
                break
        return done

    def _same_bytes(self, query: Query, q: int, low: int, size: int) -> bool:
        """Whether a stretch of keys is equal, by one memcmp; wide keys lie in two columns and always answer False
        unless both are equal."""
        if query.width == 16:
            return self.slots.ident_bytes[low * 16 : (low + size) * 16] == query.raw[q * 16 : (q + size) * 16]
        words = query.words[q : q + size]
        return bool(
            np.array_equal(self.slots.ident[low : low + size], words[:, :2])
            and np.array_equal(self.slots.tail[low : low + size], words[:, 2:])
        )

    def _walk_scattered(self, query: Query, at: int, above: int) -> I64:
        """The rest of a walk from block `at` on below slot `above`, in growing batches."""
        pieces: list[I64] = []
        size = 256
        while at < query.count:
            size = min(size * 4, query.count - at)
            rows = self.find_keys(query.words[at : at + size])
            over = np.empty_like(rows)
            over[0] = above
            over[1:] = rows[:-1]
            fine = self.slots.parent.take(rows) == over
            fine &= rows != 0
            length = size if fine.all() else int(fine.argmin())
            pieces.append(rows[:length])
            if length < size:
                break
            at += size
            above = int(rows[-1])
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)

    # -- linking ------------------------------------------------------------------------------------------------------
    def link_keys(self, new: I64, words: U64) -> None:
        """Names slots (lone objects or blocks) by the words of their keys."""
        slots = self.slots
        top = int(new.max(initial=0)) + 1
        slots.ident[new] = words[:, :2]
        slots.key_top = max(slots.key_top, top)
        if words.shape[1] == 4:
            slots.tail[new] = words[:, 2:]
            slots.wide_top = max(slots.wide_top, top)
        self.table.add_many(new, self.table.buckets(folds(words)))

    def link_blocks(self, new: I64, words: U64, above: int) -> None:
        """Names blocks that hang below slot `above` (0: none), one below the other."""
        slots = self.slots
        over = np.empty_like(new)
        over[0] = above
        over[1:] = new[:-1]
        start = slots.depths[above] + 1 if above else 0
        slots.depth[new] = np.arange(start, start + len(new))
        slots.parent[new] = over
        slots.kids[new] = 1
        slots.kid_counts[int(new[-1])] = 0
        slots.memory_kids[new] = 0
        slots.block_top = max(slots.block_top, int(new.max()) + 1)
        if above:
            slots.kid_counts[above] += 1
        self.link_keys(new, words)

    def link_pages(self, new: I64, runs: int | I64, ordinals: I64) -> None:
        """Names pages of one run, or of one run each."""
        slots = self.slots
        slots.run[new] = runs
        slots.page_top = max(slots.page_top, int(new.max()) + 1)
        slots.depth[new] = ordinals
        if isinstance(runs, int):
            self.runs.counts[runs] += len(new)
            self.runs.tops[runs] = max(self.runs.tops[runs], int(ordinals.max()) + 1)
        else:
            np.add.at(self.runs.count, runs, 1)
            np.maximum.at(self.runs.top, runs, (ordinals + 1).astype(np.int32))
        self.table.add_many(new, self.page_buckets(runs, ordinals))

    def link_page(self, new: int, run: int, ordinal: int) -> None:
        """Names one page."""
        slots, runs = self.slots, self.runs
        slots.runs[new], slots.depths[new] = run, ordinal
        slots.page_top = max(slots.page_top, new + 1)
        runs.counts[run] += 1
        runs.tops[run] = max(runs.tops[run], ordinal + 1)
        self.table.add(new, self.table.bucket(run * RUN_MIX + ordinal))

    def bucket_of(self, slot: int) -> int:
        """Where a slot is linked."""
        slots = self.slots
        form = slots.forms[slot]
        if form & PAGE_BIT:
            return self.table.bucket(slots.runs[slot] * RUN_MIX + slots.depths[slot])
        words: tuple[int, ...] = (slots.words[slot * 2], slots.words[slot * 2 + 1])
        if form & WIDE_BIT:
            words += (slots.tails[slot * 2], slots.tails[slot * 2 + 1])
        return self.table.bucket(fold(words))

    def unlink(self, slot: int) -> None:
        """Takes a slot's name out of the index. The slot keeps it in its columns."""
        slots = self.slots
        assert not slots.forms[slot] & DEAD_BIT, "unlinked twice"
        self.table.discard(slot, self.bucket_of(slot))
        slots.forms[slot] |= DEAD_BIT

    def forget(self, slot: int) -> None:
        """A page's slot goes: its run counts it no more, and goes with its last."""
        run = self.slots.runs[slot]
        self.runs.counts[run] -= 1
        if not self.runs.counts[run]:
            self.runs.drop(run)

    # -- and back -----------------------------------------------------------------------------------------------------
    def name(self, slot: int) -> Name:
        """The name of a slot, also of one that is unlinked."""
        slots = self.slots
        form = slots.forms[slot]
        if form & PAGE_BIT:
            return Name(self.runs.key_of(slots.runs[slot]), slots.depths[slot])
        key = bytes(slots.ident_bytes[slot * 16 : slot * 16 + 16])
        if form & WIDE_BIT:
            key += bytes(slots.tail_bytes[slot * 16 : slot * 16 + 16])
        return Name(key, slots.depths[slot] if form & 3 == Form.BLOCK else 0)

    def short_names(self, rows: I64) -> U64:
        """64 bits of each name, for ghosts: equal for equal names, and as good as unique."""
        slots = self.slots
        forms = slots.form.take(rows)
        out = folds(slots.ident.take(rows, axis=0))
        wide = np.flatnonzero((forms & _KEY_BITS) == WIDE_BIT)
        if len(wide):
            out[wide] += folds(slots.tail.take(rows[wide], axis=0)) * _RUN_MIX
        pages = np.flatnonzero(forms & PAGE_BIT)
        if len(pages):
            ordinals = slots.depth.take(rows[pages]).astype(np.uint64)
            out[pages] = folds(self.runs.key[slots.run.take(rows[pages])]) + ordinals * _RUN_MIX
        out ^= out >> np.uint64(29)
        return out
