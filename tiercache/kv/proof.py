"""Layout self-proof: patterns written through the engine's own indexing are read back through our planes, and the other
way round. What is unproven is not reused."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from tiercache.kv.moving import Table
    from tiercache.kv.planes import Planes


class Write(Protocol):
    """Writes through the engine's own tensors and its own way of indexing them."""

    def __call__(self, layer: int, kv: int, values: npt.NDArray[np.uint8]) -> None:
        """K (0) or V (1) of one layer of the layout, for the rows of the table: `values[token, head, byte]` are the bytes
        of [token][head of the shard][dim]."""
        ...


class Read(Protocol):
    """Reads through the engine's own tensors and its own way of indexing them."""

    def __call__(self, layer: int, kv: int) -> npt.NDArray[np.uint8]:
        """What `Write` has written, or we have: `[token, head, byte]`."""
        ...


class Proof(NamedTuple):
    """Whether the planes tell the truth, and if not one line that says what was wrong."""

    proven: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.proven


def prove(planes: Planes, table: Table, write: Write, read: Read | None = None, *, seed: int = 0) -> Proof:
    """Stamps the blocks of `table` (whole blocks from its first row on, each in use by nobody) with bytes that differ by
    layer, kv, head, token and dim, and gathers them; with `read`, scatters others and reads them back. The memory is
    then zero where it was stamped. Never raises for what the engine's functions raise: that is unproven too."""
    raise NotImplementedError("soon")
