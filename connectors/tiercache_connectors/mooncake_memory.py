"""Memory that an engine passes by address: what was registered, whether this process can reach it, and what it gets."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from bisect import bisect_right, insort
from typing import TYPE_CHECKING

from tiercache.buffers import Buffer

if TYPE_CHECKING:
    from collections.abc import Iterable


class _Span(ctypes.Structure):
    _fields_ = (("address", ctypes.c_void_p), ("length", ctypes.c_size_t))


_libc = ctypes.CDLL(None, use_errno=True)
_read = getattr(_libc, "process_vm_readv", None)
_EFAULT = 14


def reaches(address: int, length: int) -> bool:
    """Whether this process can read the first and the last byte there: memory of a device it cannot, nor what is not
    mapped. Asks the kernel, so that a wrong address is an answer, and no crash."""
    if address <= 0 or length <= 0 or address + length >= 1 << 63:
        return False
    return all(_readable(at) for at in (address, address + length - 1))


def _readable(address: int) -> bool:
    if _read is None:
        return True
    byte = ctypes.c_uint8()
    into = _Span(ctypes.addressof(byte), 1)
    source = _Span(address, 1)
    done = _read(os.getpid(), ctypes.byref(into), 1, ctypes.byref(source), 1, 0)
    return bool(done == 1) or ctypes.get_errno() != _EFAULT  # where the call is forbidden, nothing is known


class Regions:
    """Registered spans of memory, none of which overlaps another; any thread."""

    def __init__(self, *, strict: bool) -> None:
        """`strict`: what was not registered is refused, as Mooncake does over RDMA; over TCP it takes any address."""
        self.strict = strict
        self._lock = threading.Lock()
        self._starts: list[int] = []
        self._sizes: dict[int, int] = {}

    def add(self, address: int, size: int) -> bool:
        """Registers a span; False where it overlaps another, or is no memory that this process can reach."""
        if not reaches(address, size):
            return False
        with self._lock:
            at = bisect_right(self._starts, address)
            if at and self._starts[at - 1] + self._sizes[self._starts[at - 1]] > address:
                return False
            if at < len(self._starts) and address + size > self._starts[at]:
                return False
            insort(self._starts, address)
            self._sizes[address] = size
        return True

    def drop(self, address: int) -> bool:
        """Undoes `add`; False where no span begins there."""
        with self._lock:
            known = self._sizes.pop(address, None) is not None
            if known:
                del self._starts[bisect_right(self._starts, address) - 1]
        return known

    def room(self, address: int) -> int:
        """Bytes from an address to the end of the registered span that it is in; 0 in none."""
        with self._lock:
            at = bisect_right(self._starts, address)
            start = self._starts[at - 1] if at else 0
            return max(0, start + self._sizes[start] - address) if at else 0

    def usable(self, address: int, length: int) -> bool:
        """Whether bytes may be moved there, or from there."""
        if length < 0:
            return False
        if self.room(address) >= length > 0:
            return True
        return not self.strict and (not length or reaches(address, length))

    def all_usable(self, spans: Iterable[tuple[int, int]]) -> bool:
        """Whether all of these (address, length) are."""
        return all(self.usable(address, length) for address, length in spans)


class BufferHandle(bytearray):
    """A value, in memory of its own: has the buffer protocol, an address and a size."""

    @classmethod
    def sized(cls, size: int) -> tuple[BufferHandle, Buffer]:
        """A handle of so many bytes, and the span to fill it through."""
        handle = cls(size)
        return handle, Buffer.of(handle, writable=True)

    def ptr(self) -> int:
        """Address of the first byte; valid as long as this object lives, and is not resized."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self)) if len(self) else 0

    def size(self) -> int:
        """Bytes."""
        return len(self)


class HostAllocator:
    """Page-aligned memory by address, until it is given back."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[mmap.mmap, object]] = {}

    def alloc(self, size: int) -> int:
        """Address of `size` bytes of zeros; 0 where there are none."""
        try:
            memory = mmap.mmap(-1, size)
        except (OSError, ValueError, OverflowError):
            return 0
        first = ctypes.c_char.from_buffer(memory)
        address = ctypes.addressof(first)
        self._held[address] = memory, first
        return address

    def free(self, ptr: int) -> int:
        """Gives back what `alloc` gave: 0, or -1 where it was not given by this."""
        return 0 if self._held.pop(ptr, None) is not None else -1


class MooncakeHostMemAllocator(HostAllocator):
    """Memory for an engine's host pool, as SGLang takes it. Plain memory: any can be copied from and to."""
