"""Placement: pure functions from what tiers hold to what should move. No I/O, no clock, no state."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt


class PressurePlan(NamedTuple):
    """What to do with victims of a full tier, as slots."""

    drop: npt.NDArray[np.int64]
    demote: npt.NDArray[np.int64]


def plan_pressure(
    slots: npt.NDArray[np.int64],
    memory_parts: npt.NDArray[np.uint64],
    ssd_parts: npt.NDArray[np.uint64],
    *,
    can_demote: bool,
) -> PressurePlan:
    """Victims of memory: drop what the SSD has in full or cannot take, demote the rest."""
    if not can_demote:
        return PressurePlan(slots, slots[:0])
    covered = (memory_parts & ~ssd_parts) == 0
    return PressurePlan(slots[covered], slots[~covered])


def plan_reclaim(
    order: npt.NDArray[np.uint32], sizes: npt.NDArray[np.uint32], threshold: int, keep_bytes_max: int
) -> npt.NDArray[np.bool_]:
    """Which payloads of a segment that is given up are written again: the latest used first, only those used after
    `threshold` (an order of use), and at most `keep_bytes_max` of them, so that giving up a segment always gains room.
    """
    latest_first = np.argsort(-order.astype(np.int64), kind="stable")
    fits = np.cumsum(sizes[latest_first], dtype=np.int64) <= keep_bytes_max
    keep = np.zeros(len(order), bool)
    keep[latest_first] = fits & (order[latest_first] > threshold)
    return keep


def bytes_over(used_bytes: int, capacity_bytes: int, high_mark: float, low_mark: float) -> int:
    """How many bytes should leave a tier now: none below the high mark, else down to the low mark."""
    return max(0, used_bytes - int(capacity_bytes * low_mark)) if used_bytes > capacity_bytes * high_mark else 0
