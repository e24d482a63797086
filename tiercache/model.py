"""Plain values that every layer speaks: outcomes, states, names, payloads, facts.

Ground floor: imports nothing of ours. Sizes are bytes, times are seconds unless a name says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

ALIGN_BYTES = 4096
"""Every extent, in memory and on SSD, starts and ends on this boundary, so that O_DIRECT can move it."""

PAGE_BYTES = 1 << 20
PART_BYTES = 64 << 10
PARTS_MAX = 64
"""Parts of one entry: they fit one 64-bit map."""

KEY_BYTES_MAX = 32
ORDINAL_MAX = (1 << 31) - 1


class Outcome(IntEnum):
    """How one item of a batch went. A value, not a fault; negative where a location could stand instead."""

    HIT = 0
    MISS = -1
    BUSY = -2
    """Out of pins, queue places or time; the same call may succeed later."""
    FULL = -3
    """No room under the cap, also after evicting what may be evicted."""
    CORRUPT = -4
    """Key or digest did not match: quarantined, counted, treated as a miss by everyone above."""
    GONE = -5
    """The origin says that the object, or this version of it, no longer exists."""


class State(IntEnum):
    """Life of an index slot. Readable states come last: `state >= RESIDENT` is the whole test."""

    ABSENT = 0
    PENDING = 1
    EVICTING = 2
    RESIDENT = 3
    MOVING = 4


class Kind(IntEnum):
    """What an entry is for; policies and placement may weigh kinds, tiers never do."""

    PAGE = 0
    KV = 1
    TENSOR = 2


class Form(IntEnum):
    """Which kind of run an entry belongs to."""

    LONE = 0
    PAGE = 1
    BLOCK = 2


class TierId(IntEnum):
    """Local tiers that share the one index; each is one column of locations and one of part maps."""

    MEMORY = 0
    SSD = 1


class Name(NamedTuple):
    """Address of one object: a lone object's key, or a file version's key and a page ordinal, or a block's digest.

    `key` is 16 or 32 bytes and already covers the namespace (keys.py builds it).
    """

    key: bytes
    ordinal: int = 0


@dataclass(frozen=True, slots=True)
class Payload:
    """Identity and shape of one payload, as a tier writes it beside the bytes and checks it at every read.

    `parts` is the map of parts whose bytes are present; `digests` holds one little-endian xxh3-64 for each part of
    the entry, zero where the part is absent. Part i covers bytes [i * part_bytes, min(size, (i + 1) * part_bytes)).
    """

    name: Name
    size: int
    part_bytes: int
    parts: int
    digests: bytes
    kind: Kind = Kind.PAGE
    parent: bytes = b""
    """Chains: digest of the block before this one, empty for the first."""
    scope: int = 0
    cost_s: float = 0.0
    expiry_s: int = 0
    """Wall clock, whole seconds since the epoch; 0 is never."""
    tick: int = 0
    """Order of last use, larger is later; only compared, never read as time."""
    form: Form = Form.LONE


@dataclass(frozen=True, slots=True)
class Terms:
    """What whoever puts an entry says of it, beside its name and bytes."""

    kind: Kind = Kind.TENSOR
    scope: int = 0
    cost_s: float = 0.0
    """What it would take to get it again."""
    expiry_s: int = 0
    """As Payload.expiry_s."""


@dataclass(frozen=True, slots=True)
class Facts:
    """Columns of what a tier found when it was opened: row i of every column is one payload (see Payload).

    `keys` and `parents` are (n, 32) uint8, right-padded with zeros; `widths` says how many bytes of a key count
    (16 or 32) and is 0 in no row; a row with `parent_widths` 0 has no parent. `locations` are the tier's own.
    `ordinals` is the page ordinal, or the depth of a block in its chain (first block: 0). `forms` says which: see Form.
    """

    forms: npt.NDArray[np.uint8]
    keys: npt.NDArray[np.uint8]
    widths: npt.NDArray[np.uint8]
    parents: npt.NDArray[np.uint8]
    parent_widths: npt.NDArray[np.uint8]
    ordinals: npt.NDArray[np.int32]
    kinds: npt.NDArray[np.uint8]
    scopes: npt.NDArray[np.uint16]
    sizes: npt.NDArray[np.uint32]
    part_bytes: npt.NDArray[np.uint32]
    parts: npt.NDArray[np.uint64]
    locations: npt.NDArray[np.int64]
    costs_s: npt.NDArray[np.float32]
    expiries_s: npt.NDArray[np.uint32]
    ticks: npt.NDArray[np.uint32]


def part_bytes_for(size: int) -> int:
    """Part size of an entry that brings no geometry of its own: 64 KiB, or 1/64 of a large entry, aligned."""
    if size <= PART_BYTES * PARTS_MAX:
        return PART_BYTES
    return -(-size // (PARTS_MAX * ALIGN_BYTES)) * ALIGN_BYTES


def part_count(size: int, part_bytes: int) -> int:
    """Number of parts of an entry of `size` bytes; an empty entry has one empty part, so that it can be present."""
    return max(1, -(-size // part_bytes))


def all_parts(size: int, part_bytes: int) -> int:
    """Map with every part of an entry set."""
    return (1 << part_count(size, part_bytes)) - 1
