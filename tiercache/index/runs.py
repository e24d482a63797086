"""Page runs: one row a file version, found by its key. The pages themselves are slots, found by (run, ordinal).

A run lists nothing, so that the footer of a file of a million pages costs one slot and one row of 40 bytes.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import numpy as np

from tiercache.errors import ConfigError
from tiercache.index.table import MIX, RowStack, RowTable

if TYPE_CHECKING:
    import numpy.typing as npt

    I64 = npt.NDArray[np.int64]
    U64 = npt.NDArray[np.uint64]

NARROW, WIDE = struct.Struct("<2Q"), struct.Struct("<4Q")
_MIX = np.uint64(MIX)


def fold(words: tuple[int, ...]) -> int:
    """A key's words as one int, for RowTable.bucket."""
    if len(words) == 2:
        return words[0] * MIX + words[1]
    return ((words[0] * MIX + words[1]) * MIX + words[2]) * MIX + words[3]


def folds(words: U64) -> U64:
    """The same for an (n, 2) or (n, 4) array."""
    out = words[:, 0] * _MIX
    out += words[:, 1]
    for column in range(2, words.shape[1]):
        out *= _MIX
        out += words[:, column]
    return out


def same_rows(a: U64, b: U64) -> npt.NDArray[np.bool_]:
    """Which rows of two (n, 2) arrays are equal."""
    same: npt.NDArray[np.bool_] = (a == b).view(np.uint16).reshape(-1) == 0x0101
    return same


class PageRuns:
    """Rows of page runs."""

    def __init__(self, runs_max: int) -> None:
        self.rows = RowStack(runs_max)
        self.table = RowTable(runs_max)
        self.key = np.zeros((runs_max + 1, 4), np.uint64)
        self.width = np.zeros(runs_max + 1, np.uint8)
        """Bytes of the key, 0 for a row not in use."""
        self.count = np.zeros(runs_max + 1, np.int32)
        """Slots of the run."""
        self.top = np.zeros(runs_max + 1, np.int32)
        """One more than the highest ordinal there ever was."""
        self.counts, self.tops, self.widths = self.count.data, self.top.data, self.width.data
        self._last_key, self._last = b"", 0
        """The run found last: readers stay with a file for a while."""
        self._bytes = self.key.reshape(-1).data.cast("B")

    def find(self, key: bytes) -> int:
        """The run of a file version, 0 = none."""
        if key == self._last_key:
            return self._last
        width = len(key)
        if width not in (16, 32):
            raise ConfigError(f"a key has 16 or 32 bytes, not {width}")
        table = self.table
        row = table.heads[table.bucket(fold(NARROW.unpack(key) if width == 16 else WIDE.unpack(key)))]
        while row:
            at = row * 32
            if self._bytes[at : at + width] == key and self.widths[row] == width:
                self._last_key, self._last = key, row
                return row
            row = table.nexts[row]
        return 0

    def find_many(self, words: U64, width: int) -> I64:
        """The runs of (n, width // 8) keys."""
        columns = width // 8

        def equal(rows: I64, at: I64 | slice) -> npt.NDArray[np.bool_]:
            same = same_rows(np.ascontiguousarray(self.key[rows, :2]), np.ascontiguousarray(words[at, :2]))
            if columns == 4:
                same &= same_rows(np.ascontiguousarray(self.key[rows, 2:]), np.ascontiguousarray(words[at, 2:]))
            same &= self.width.take(rows) == width
            return same

        return self.table.find(self.table.buckets(folds(words)), equal)

    def add(self, key: bytes) -> int:
        """A new run; the caller knows that there is none, and that there are as many rows as slots."""
        row = int(self.rows.take(1)[0])
        self._bytes[row * 32 : row * 32 + 32] = key.ljust(32, b"\0")
        self.widths[row] = len(key)
        self.counts[row] = self.tops[row] = 0
        self.table.add(row, self.table.bucket(fold(NARROW.unpack(key) if len(key) == 16 else WIDE.unpack(key))))
        return row

    def add_many(self, words: U64, width: int) -> I64:
        """New runs for (n, width // 8) keys, distinct and absent."""
        rows = self.rows.take(len(words))
        self.key[rows, : width // 8] = words
        self.key[rows, width // 8 :] = 0
        self.width[rows] = width
        self.count[rows] = 0
        self.top[rows] = 0
        self.table.add_many(rows, self.table.buckets(folds(words)))
        return rows

    def bucket_of(self, row: int) -> int:
        """Where a run is linked."""
        return self.table.bucket(fold(tuple(self.key[row, : self.widths[row] // 8].tolist())))

    def drop(self, row: int) -> None:
        """Forgets a run without slots."""
        self._last_key, self._last = b"", 0
        self.table.discard(row, self.bucket_of(row))
        self.widths[row] = 0
        self.rows.give(np.array([row]))

    def key_of(self, row: int) -> bytes:
        """The key."""
        return bytes(self._bytes[row * 32 : row * 32 + self.widths[row]])

    def memory_bytes(self) -> int:
        """Bytes in use."""
        if self.rows.top == 1:
            return 0
        return 41 * self.rows.top + self.table.memory_bytes(self.rows.top) + self.rows.memory_bytes()
