"""Snapshots: the rows of all packs of one writer in one object, so that opening need not look into every pack.

A snapshot lists packs by name and size, and their rows one after another. It is complete for the packs that it names
and says nothing of others: packs that are newer are asked themselves, packs that are gone are not in the listing of
the bucket any more.
"""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import xxhash

from tiercache.errors import CorruptionError
from tiercache.remote.packs import ROW, ROWS_MAX, check_rows, seed_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tiercache.remote.packs import Rows

VERSION = 1
MAGIC = b"TCI\xa7"
_HEAD = struct.Struct("<4sHHIQ16s")  # magic, version, -, bytes of the list of packs, rows, xxh3-128 of all the rest
SNAPSHOT_BYTES_MAX = _HEAD.size + ROWS_MAX * ROW.itemsize + (64 << 20)
"""Longer ones are not read."""


class Listed(NamedTuple):
    """One pack as a snapshot, or a look at its table, lists it."""

    key: str
    size: int
    rows: Rows


def encode(key: str, packs: Sequence[Listed]) -> bytes:
    """A snapshot with the name `key`; of more than ROWS_MAX rows the last packs are left out."""
    kept: list[Listed] = []
    count = 0
    for pack in packs:
        if count + len(pack.rows) > ROWS_MAX:
            break
        count += len(pack.rows)
        kept.append(pack)
    names = json.dumps([[pack.key, pack.size, len(pack.rows)] for pack in kept], separators=(",", ":")).encode()
    rows = b"".join(pack.rows.tobytes() for pack in kept)
    facts = (MAGIC, VERSION, 0, len(names), count)
    digest = xxhash.xxh3_128_digest(_HEAD.pack(*facts, bytes(16)) + names + rows, seed_of(key))
    return _HEAD.pack(*facts, digest) + names + rows


def size_of(packs: int, rows: int) -> int:
    """No snapshot of so many packs and rows is longer, in bytes."""
    return _HEAD.size + packs * 128 + rows * ROW.itemsize + 2


def decode(key: str, data: bytes | memoryview) -> list[Listed]:
    """The packs of a snapshot. CorruptionError where it is none, or damaged."""
    view = memoryview(data)
    if len(view) < _HEAD.size:
        raise CorruptionError(f"{key} is no snapshot")
    magic, version, zero, length, count, digest = _HEAD.unpack_from(view)
    if magic != MAGIC or version != VERSION or len(view) != _HEAD.size + length + count * ROW.itemsize:
        raise CorruptionError(f"{key} is no snapshot of version {VERSION}")
    hashed = xxhash.xxh3_128(_HEAD.pack(magic, version, zero, length, count, bytes(16)), seed_of(key))
    hashed.update(view[_HEAD.size :])
    if hashed.digest() != digest:
        raise CorruptionError(f"{key} is damaged")
    rows = np.frombuffer(bytes(view[_HEAD.size + length :]), ROW, count)
    found: list[Listed] = []
    start = 0
    for name, size, rows_here in _names(key, bytes(view[_HEAD.size : _HEAD.size + length])):
        if rows_here > count - start:
            raise CorruptionError(f"{key} lists packs that cannot be")
        found.append(Listed(name, size, check_rows(rows[start : start + rows_here], name, size)))
        start += rows_here
    return found


def _names(key: str, text: bytes) -> list[tuple[str, int, int]]:
    """The list of packs; other programs may have written anything there."""
    try:
        found = [(name, size, rows) for name, size, rows in json.loads(text)]
    except (ValueError, TypeError, RecursionError) as error:
        raise CorruptionError(f"{key} has no list of packs ({error})") from error
    for name, size, rows in found:
        if not isinstance(name, str) or any(type(one) is not int or not 0 <= one < 1 << 62 for one in (size, rows)):
            raise CorruptionError(f"{key} lists packs that cannot be")
    return found
