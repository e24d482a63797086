"""Packed rows: the facts of many records in one value, column after column, so that a million load in one stride.

Keys of the store, all numbers big-endian so that they sort:
`g` segment                                          state and generation of a segment
`s` segment generation `r` number                    facts of records (columns, see Table)
`s` segment generation `t` number                    blocks of records that were deleted
`s` segment generation `o`                           blocks and ticks: order of last use
`f`                                                  a copy of the format file
Every value ends with the xxh3-64 of its key and the rest, so that a damaged or misplaced value is known as such.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from tiercache.model import KEY_BYTES_MAX, Facts
from tiercache.ssd.records import record_blocks

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from tiercache.model import Payload

FORMAT_KEY = b"f"
SEGMENT_PREFIX = b"g"
_HEAD = struct.Struct("<BBBBI")
_SEAL = struct.Struct("<Q")
_ROW_VERSION = 1

_COLUMNS: tuple[tuple[str, str], ...] = (
    ("blocks", "<u4"),
    ("lengths", "<u4"),
    ("forms", "u1"),
    ("widths", "u1"),
    ("parent_widths", "u1"),
    ("kinds", "u1"),
    ("scopes", "<u2"),
    ("ordinals", "<i4"),
    ("sizes", "<u4"),
    ("part_bytes", "<u4"),
    ("parts", "<u8"),
    ("costs_s", "<f4"),
    ("expiries_s", "<u4"),
    ("ticks", "<u4"),
)
NAMES = tuple(name for name, _ in _COLUMNS)
_OWN = ("blocks", "lengths")


@dataclass(slots=True)
class Table:
    """Facts of records, ascending by `blocks` (where each starts; `lengths` in blocks); the rest as in model.Facts."""

    columns: dict[str, npt.NDArray[Any]]
    keys: npt.NDArray[np.uint8]
    parents: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, chosen: npt.NDArray[Any]) -> Table:
        """The rows that an index array or a mask chooses."""
        columns = {name: column[chosen] for name, column in self.columns.items()}
        return Table(columns, self.keys[chosen], self.parents[chosen])

    def facts(self, locations: npt.NDArray[np.int64]) -> Facts:
        """The same rows as the tier's port speaks of them."""
        columns = {name: column for name, column in self.columns.items() if name not in _OWN}
        keys, parents = _padded(self.keys), _padded(self.parents)
        return Facts(keys=keys, parents=parents, locations=locations, **columns)


def _padded(keys: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    if keys.shape[1] == KEY_BYTES_MAX:
        return keys
    wide = np.zeros((len(keys), KEY_BYTES_MAX), np.uint8)
    wide[:, : keys.shape[1]] = keys
    return wide


def empty_table() -> Table:
    """A table with no row."""
    none = np.zeros((0, KEY_BYTES_MAX), np.uint8)
    return Table({name: np.zeros(0, dtype) for name, dtype in _COLUMNS}, none, none)


def table_of(payloads: Sequence[Payload], blocks: Sequence[int]) -> Table:
    """Facts of payloads whose records start at `blocks`."""
    raw: dict[str, list[float]] = {
        "blocks": list(blocks),
        "lengths": [record_blocks(p.parts, p.part_bytes, p.size) for p in payloads],
        "forms": [p.form for p in payloads],
        "widths": [len(p.name.key) for p in payloads],
        "parent_widths": [len(p.parent) for p in payloads],
        "kinds": [p.kind for p in payloads],
        "scopes": [p.scope for p in payloads],
        "ordinals": [p.name.ordinal for p in payloads],
        "sizes": [p.size for p in payloads],
        "part_bytes": [p.part_bytes for p in payloads],
        "parts": [p.parts for p in payloads],
        "costs_s": [p.cost_s for p in payloads],
        "expiries_s": [min(p.expiry_s, 0xFFFFFFFF) for p in payloads],
        "ticks": [p.tick & 0xFFFFFFFF for p in payloads],
    }
    columns = {name: np.array(raw[name], dtype) for name, dtype in _COLUMNS}
    return Table(columns, _matrix([p.name.key for p in payloads]), _matrix([p.parent for p in payloads]))


def _matrix(keys: Sequence[bytes]) -> npt.NDArray[np.uint8]:
    joined = b"".join([key.ljust(KEY_BYTES_MAX, b"\0") for key in keys])
    return np.frombuffer(joined, np.uint8).reshape(len(keys), KEY_BYTES_MAX)


def concatenate(tables: Sequence[Table]) -> Table:
    """Rows of several tables, one after the other."""
    tables = [table for table in tables if len(table)]
    if len(tables) < 2:
        return tables[0] if tables else empty_table()
    return Table(
        {name: np.concatenate([table.columns[name] for table in tables]) for name in NAMES},
        np.concatenate([_padded(table.keys) for table in tables]),
        np.concatenate([_padded(table.parents) for table in tables]),
    )


def join(tables: Sequence[Table]) -> Table:
    """Rows of one segment, ascending by block; of two rows for one block the later table's stays."""
    whole = concatenate(tables)
    blocks = whole.columns["blocks"]
    if bool((blocks[1:] > blocks[:-1]).all()):
        return whole
    order = np.argsort(blocks, kind="stable")
    last = np.append(blocks[order][1:] != blocks[order][:-1], True)
    return whole.take(order[last])


def pack_table(key: bytes, table: Table) -> bytes:
    """A table as the value of `key`. Keys and parents take only the width that their longest needs."""
    count = len(table)
    width = _width(table.columns["widths"])
    parent_width = _width(table.columns["parent_widths"])
    pieces = [_HEAD.pack(_ROW_VERSION, width, parent_width, 0, count)]
    pieces += [np.ascontiguousarray(table.columns[name], dtype).tobytes() for name, dtype in _COLUMNS]
    pieces += [table.keys[:, :width].tobytes(), table.parents[:, :parent_width].tobytes()]
    return seal(key, b"".join(pieces))


def _width(widths: npt.NDArray[Any]) -> int:
    longest = int(widths.max()) if len(widths) else 0
    return next(width for width in (0, 16, KEY_BYTES_MAX) if width >= longest)


def unpack_table(key: bytes, value: bytes) -> Table | None:
    """The table in a value, its arrays views of it; None if the value is damaged."""
    body = unseal(key, value)
    if body is None or len(body) < _HEAD.size:
        return None
    version, width, parent_width, _, count = _HEAD.unpack_from(body)
    row_bytes = sum(np.dtype(dtype).itemsize for _, dtype in _COLUMNS) + width + parent_width
    if version != _ROW_VERSION or len(body) != _HEAD.size + count * row_bytes:
        return None
    columns: dict[str, npt.NDArray[Any]] = {}
    at = _HEAD.size
    for name, dtype in _COLUMNS:
        columns[name] = np.frombuffer(body, dtype, count, at)
        at += columns[name].nbytes
    keys = np.frombuffer(body, np.uint8, count * width, at).reshape(count, width)
    parents = np.frombuffer(body, np.uint8, count * parent_width, at + keys.nbytes).reshape(count, parent_width)
    return Table(columns, keys, parents)


def seal(key: bytes, body: bytes) -> bytes:
    """A value with its checksum, which covers the key as well."""
    return body + _SEAL.pack(xxhash.xxh3_64_intdigest(body, xxhash.xxh3_64_intdigest(key)))


def unseal(key: bytes, value: bytes) -> memoryview | None:
    """The body of a sealed value, or None if it is damaged or belongs to another key."""
    if len(value) < _SEAL.size:
        return None
    body = memoryview(value)[: -_SEAL.size]
    if xxhash.xxh3_64_intdigest(body, xxhash.xxh3_64_intdigest(key)) != _SEAL.unpack_from(value, len(body))[0]:
        return None
    return body


def segment_key(segment: int) -> bytes:
    """Key of a segment's state row."""
    return SEGMENT_PREFIX + segment.to_bytes(4, "big")


def rows_prefix(segment: int, generation: int | None = None) -> bytes:
    """What the keys of all rows of a segment, or of one life of it, start with."""
    prefix = b"s" + segment.to_bytes(4, "big")
    return prefix if generation is None else prefix + generation.to_bytes(4, "big")


def row_key(segment: int, generation: int, letter: bytes, number: int = 0) -> bytes:
    """Key of a row of facts (`r`), of deletions (`t`) or of order (`o`)."""
    return rows_prefix(segment, generation) + letter + number.to_bytes(4, "big")


def split_row_key(key: bytes) -> tuple[bytes, int]:
    """(letter, number) of such a key."""
    return key[9:10], int.from_bytes(key[10:14], "big")
