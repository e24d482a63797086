"""Buffer: a span of host memory that can be sliced, viewed, copied and hashed without Python touching its bytes."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from tiercache.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Buffer as SupportsBuffer


class Buffer:
    """A contiguous span of host memory: address, length, and the object that keeps it alive.

    Slicing and viewing copy nothing. `view()` exports a memoryview that keeps the owner alive for as long as it, or
    anything made from it, lives.
    """

    __slots__ = ("address", "length", "owner")

    def __init__(self, address: int, length: int, owner: object) -> None:
        self.address = address
        self.length = length
        self.owner = owner

    @classmethod
    def of(cls, memory: SupportsBuffer, *, writable: bool = False) -> Buffer:
        """The span of any contiguous object with the buffer protocol (bytes, bytearray, NumPy array, mmap, torch CPU array)."""
        view = memoryview(memory)
        if not view.c_contiguous:
            raise ConfigError("the buffer is not contiguous: pass a contiguous array or copy it first")
        if writable and view.readonly:
            raise ConfigError("the buffer is read-only: pass a bytearray or a writable array")
        array = np.frombuffer(view, np.uint8) if view.nbytes else np.empty(0, np.uint8)
        return cls(array.ctypes.data if view.nbytes else 0, view.nbytes, array)

    def __len__(self) -> int:
        return self.length

    def slice(self, start: int, length: int) -> Buffer:
        """Bytes [start, start + length) of this span."""
        assert 0 <= start and 0 <= length and start + length <= self.length, (start, length, self.length)
        return Buffer(self.address + start, length, self.owner)

    def array(self) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        """A writable uint8 array over the span; it and whatever is made from it keep the owner alive."""
        if not self.length:
            return np.empty(0, np.uint8)
        span = (ctypes.c_uint8 * self.length).from_address(self.address)
        span.owner = self.owner  # type: ignore[attr-defined]  # ctypes arrays take attributes; this one keeps the memory
        return np.frombuffer(span, np.uint8)

    def view(self) -> memoryview:
        """A writable memoryview over the span."""
        return memoryview(self.array())

    def __bytes__(self) -> bytes:
        return ctypes.string_at(self.address, self.length)


def copy(source: Buffer, target: Buffer) -> None:
    """Copies all of `source` to the start of `target`; the GIL is released while bytes move."""
    assert source.length <= target.length, (source.length, target.length)
    ctypes.memmove(target.address, source.address, source.length)


def part_digests(payload: Buffer, part_bytes: int) -> bytes:
    """xxh3-64 of every part of `payload`, 8 little-endian bytes each (the Payload.digests layout)."""
    view = payload.view()
    step = range(0, max(1, payload.length), part_bytes)
    return b"".join([xxhash.xxh3_64_intdigest(view[i : i + part_bytes]).to_bytes(8, "little") for i in step])


def entry_digest(digests: bytes) -> bytes:
    """Digest of a whole entry: the xxh3-128 of its part digests, 16 bytes."""
    return xxhash.xxh3_128_digest(digests)
