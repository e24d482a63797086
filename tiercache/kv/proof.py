"""Layout self-proof: patterns written through the engine's own indexing are read back through our planes, and the other
way round. What is unproven is not reused."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from tiercache.buffers import Buffer
from tiercache.errors import ConfigError
from tiercache.kv.moving import gather, scatter

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from tiercache.kv.planes import Planes
    from tiercache.kv.runs import Table

    Stamp = npt.NDArray[np.uint8]


class Write(Protocol):
    """Writes through the engine's own tensors and its own way of indexing them."""

    def __call__(self, layer: int, kv: int, values: Stamp, /) -> None:
        """K (0) or V (1) of one layer of the layout, for the rows of the table: `values[token, head, byte]` are the
        bytes of [token][head of the shard][dim]."""
        ...


class Read(Protocol):
    """Reads through the engine's own tensors and its own way of indexing them."""

    def __call__(self, layer: int, kv: int, /) -> Stamp:
        """What `Write` has written, or we have: `[token, head, byte]`."""
        ...


class Proof(NamedTuple):
    """Whether the planes tell the truth, and if not one line that says what was wrong. True or false as such."""

    proven: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.proven


def prove(planes: Planes, table: Table, write: Write, read: Read | None = None, *, seed: int = 0) -> Proof:
    """Stamps the rows of `table` (whole blocks, in use by nobody) with bytes that differ by layer, K or V, head, token
    and dim, and looks for them where the planes say that they are; with `read`, the other way round too.

    Some blocks at pages that do not follow each other show most. What is proven is zero afterwards. Whatever the
    engine's functions raise makes it unproven, with that as the reason.
    """
    layout = planes.layout
    blocks = range(table.tokens.start // layout.rows, table.tokens.stop // layout.rows)
    if not blocks or (blocks.start * layout.rows, blocks.stop * layout.rows) != (table.tokens.start, table.tokens.stop):
        raise ConfigError(f"a proof needs whole blocks of {layout.rows} rows, not rows {table.tokens}")
    memory = [np.zeros(layout.block_bytes, np.uint8) for _ in blocks]
    buffers = [Buffer.of(each.data, writable=True) for each in memory]
    stamps = {(layer, kv): values for layer, kv, values in _stamps(planes, len(blocks), seed)}
    try:
        for (layer, kv), values in stamps.items():
            write(layer, kv, values)
        held, pieces = planes.shard.held(layout)
        gather(planes, table, blocks, buffers, parts=held, pieces=pieces)
        if wrong := _differences(planes, memory, stamps):
            return Proof(False, f"written by the engine, not found through the planes: {wrong}")
        if read is not None:
            stamps = {(layer, kv): values for layer, kv, values in _stamps(planes, len(blocks), seed + 1)}
            for (layer, kv), values in stamps.items():
                _place(planes, memory, layer, kv, values)
            scatter(planes, table, blocks, buffers)
            for (layer, kv), values in stamps.items():
                found = np.asarray(read(layer, kv))
                if found.shape != values.shape or not np.array_equal(found, values):
                    return Proof(False, f"written through the planes, not seen by the engine: {_place_name(layer, kv)}")
    except Exception as error:  # noqa: BLE001  # whatever a host's code does, it only means: not proven
        return Proof(False, f"{type(error).__name__}: {error}")
    return _cleared(write, stamps)


def _stamps(planes: Planes, blocks: int, seed: int) -> Iterator[tuple[int, int, Stamp]]:
    """Random bytes, so that any two places differ somewhere, whatever is exchanged."""
    layout = planes.layout
    rng = np.random.default_rng(seed)
    for layer in planes.shard.layers:
        for kv, dim in enumerate((layout.k_dim, layout.v_dim) if layout.v_dim else (layout.k_dim,)):
            shape = blocks * layout.rows, len(planes.shard.heads), dim * layout.itemsize
            yield layer, kv, rng.integers(0, 256, shape, np.uint8)


def _unit(planes: Planes, memory: Stamp, layer: int, head: int, kv: int) -> Stamp:
    """[row][byte] of a layer's head in a stored block, found by Layout.span alone."""
    start, size = planes.layout.span(layer, head, kv)
    return memory[start : start + size].reshape(planes.layout.rows, -1)


def _place(planes: Planes, memory: list[Stamp], layer: int, kv: int, values: Stamp) -> None:
    rows = planes.layout.rows
    for block, each in enumerate(memory):
        for i, head in enumerate(planes.shard.heads):
            _unit(planes, each, layer, head, kv)[:] = values[block * rows : (block + 1) * rows, i]


def _differences(planes: Planes, memory: list[Stamp], stamps: dict[tuple[int, int], Stamp]) -> str:
    """The first place whose bytes are not those that were stamped; "" where there is none."""
    rows = planes.layout.rows
    for (layer, kv), values in stamps.items():
        for block, each in enumerate(memory):
            for i, head in enumerate(planes.shard.heads):
                found = _unit(planes, each, layer, head, kv)
                differing = (found != values[block * rows : (block + 1) * rows, i]).any(axis=1)
                if differing.any():
                    token = block * rows + int(differing.argmax())
                    return f"{_place_name(layer, kv)}, head {head}, token {token}"
    return ""


def _place_name(layer: int, kv: int) -> str:
    return f"layer {layer}, {'KV'[kv]}"


def _cleared(write: Write, stamps: dict[tuple[int, int], Stamp]) -> Proof:
    """Zeros again, the engine's way."""
    try:
        for (layer, kv), values in stamps.items():
            write(layer, kv, np.zeros_like(values))
    except Exception as error:  # noqa: BLE001  # as above
        return Proof(False, f"{type(error).__name__}: {error}")
    return Proof(True)
