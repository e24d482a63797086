"""Transport: moves bytes between the memories of two processes, mostly on two machines. The port of net/.

Each end makes a Transport, exposes the memory that the other may reach, and says over a control channel of its own
(peer/) where it can be found (`address`) and what it exposed (descriptors). Both ends connect to each other; a Link
then reads and writes the other end's exposed memory in batches, one-sided: nobody is asked there, only its transport
works.

What arrives is checked by whoever asked for it, against digests that came another way: a transport moves bytes, it does
not vouch for them. Whatever a peer says wrongly (addresses, descriptors, lengths) ends in ProtocolError or MISS, never
in bytes outside of the pieces that were named here.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tiercache.buffers import Buffer
    from tiercache.model import Outcome

MOVES_MAX = 1 << 16
"""Moves of one batch."""
MOVE_BYTES_MAX = 1 << 30
"""Bytes of one move."""
ADDRESS_BYTES_MAX = DESCRIPTOR_BYTES_MAX = 16 << 10
NOTE_BYTES_MAX = 64 << 10
LINKS_MAX = 256
"""Links that one transport serves at a time; more are refused."""


class Memory(IntEnum):
    """What kind of memory a buffer lies in."""

    HOST = 0
    CUDA = 1


class Move(NamedTuple):
    """Bytes [offset, offset + sum of the pieces) of a region at the other end, and where they lie here, in order."""

    region: int
    """What `Link.attach` answered."""
    offset: int
    pieces: Sequence[Buffer]

    @property
    def length(self) -> int:
        """Bytes that move."""
        return sum([piece.length for piece in self.pieces])


class Link(Protocol):
    """One peer as one transport reaches it. On the loop that it was connected on. Moves of several batches may be under
    way at once. Once a call raised UnavailableError the link is dead: every call raises then, and `close` is all that
    is left."""

    @property
    def negotiated(self) -> str:
        """What the bytes really take: "tcp", "cma", "rc_mlx5", "shm", ...; "" until that is known."""
        ...

    @property
    def pushes(self) -> bool:
        """Whether `write` is the faster way over this link: a reader then has the other end write."""
        ...

    def attach(self, descriptor: bytes) -> int:
        """Takes what the other end exposed; the number stands for it in moves, until `close`. Raises ProtocolError for
        what is no descriptor of this transport, damaged or cut off. Never waits."""
        ...

    async def read(self, moves: Sequence[Move], deadline_s: float) -> list[Outcome]:
        """Brings bytes of the other end into `pieces`: for each move HIT, or MISS where the other end no longer exposes
        all of it (its pieces are then undefined).

        Raises UnavailableError where the peer is gone, or after `deadline_s`. When this ends, in any way (also when it
        is cancelled), nothing more is written to a piece, or it raises AbandonedLoad with a future for when that is so.
        """
        ...

    async def write(self, moves: Sequence[Move], deadline_s: float) -> list[Outcome]:
        """Brings `pieces` into memory of the other end; otherwise as `read`. HIT: the bytes lie there, for the other
        end to see. MISS also where it was not exposed for writing. When this ends, nothing more is read from a piece,
        with the same exception."""
        ...

    async def notify(self, note: bytes, deadline_s: float) -> None:
        """Sends up to NOTE_BYTES_MAX bytes to whoever the other end's transport notifies. It arrives after what earlier
        calls of `write` brought, once, or not at all where the link dies."""
        ...

    async def close(self) -> None:
        """Ends the link; whatever is under way raises UnavailableError. Idempotent, and quick also where the peer
        hangs: nothing is read from or written to local memory afterwards."""
        ...


class Transport(Protocol):
    """One process's end of all links of one kind. Made on the loop that it works for."""

    name: str

    @property
    def address(self) -> bytes:
        """What a peer needs to connect here; it may let whoever knows it read what is exposed, so it is told to
        authenticated peers only."""
        ...

    def expose(self, memory: Buffer, *, writable: bool = False, kind: Memory = Memory.HOST, file: int = -1) -> bytes:
        """Lets connected peers read `memory`, and write it where `writable`; the descriptor is for `attach` at the
        other end. `file`: the memory file that it is the whole mapping of. The memory stays where it is until
        `withdraw` or `close` has returned. Raises ConfigError where this transport cannot expose such memory."""
        ...

    def withdraw(self, descriptor: bytes) -> None:
        """Ends what `expose` began; moves that come later are a MISS, or find what lies there by then."""
        ...

    async def connect(self, address: bytes, deadline_s: float) -> Link:
        """A link to the peer whose transport of this kind has this address. It does the same towards this one: neither
        end moves anything before the other has called this. Raises ProtocolError for what is no such address,
        UnavailableError where nobody is there in time."""
        ...

    async def close(self) -> None:
        """Closes every link, and withdraws everything. Idempotent."""
        ...
