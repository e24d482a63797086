"""Planes: where the elements of a shard lie in an engine's own memory, by address and strides, never by assumption."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tiercache.kv.layout import Layout
    from tiercache.kv.shard import Shard


@dataclass(frozen=True, slots=True)
class Plane:
    """K or V of one layer, some heads, some dims: element (page p, slot t, head h, dim d) lies at
    `address + p * page_stride + t * token_stride + (h - heads.start) * head_stride + (d - dims.start) * itemsize`."""

    layer: int
    kv: int
    """0: K, 1: V."""
    dims: range
    heads: range
    address: int
    page_stride: int
    token_stride: int
    head_stride: int
    pages: int
    page_tokens: int
    itemsize: int
    memory: tuple[int, int]
    """Addresses [start, stop) that belong to the owner."""
    owner: object
    """Keeps the memory alive."""


class Planes:
    """Planes that cover a shard of a layout exactly once, within their memory. Raises ConfigError where they do not."""

    def __init__(self, layout: Layout, shard: Shard, planes: Sequence[Plane]) -> None:
        self.layout = layout
        self.shard = shard
        self.planes = tuple(planes)
        self.pages = 0
        self.page_tokens = 0
        raise NotImplementedError("soon")


def paged(
    tensor: object,
    axes: str,
    *,
    layers: range,
    heads: range,
    kv: int | None = None,
    dims: range | None = None,
    k_dim: int | None = None,
) -> list[Plane]:
    """Planes of one tensor (torch on the CPU, NumPy, or anything with `__array_interface__`), named by its axes.

    One letter an axis, in the tensor's own order (strides are the tensor's, so any permutation or view will do):
    `p` page, `t` slot of a page, `h` head, `d` dim of K or V, `l` layer, `k` K then V (length 2), `C` in place of `d`:
    K's dims and then V's (`k_dim` of K, half of them when left out). Axes left out have length one; the dims must lie
    next to each other. vLLM on CUDA "phtC", its CPU_ATTN viewed as (B, H, 2, N, D) "phktd", older ones "kpthd" and
    "pkthd", MLA "ptd", one layer of a transformers cache (one batch row is one page) "phtd".

    `layers` and `heads` are those of the layout that lie in the tensor; `kv` and `dims` say what it holds where no axis
    does (K; all dims from 0). Rule STATE and opaque pages: one slot a page, "pd". Raises ConfigError.
    """
    raise NotImplementedError("soon")
