"""Pattern: bytes that are told by a seed and their offset, in memory files, as both ends of a test know them."""

from __future__ import annotations

import fcntl
import mmap
import os

import numpy as np

from tiercache.buffers import Buffer

MIB = 1 << 20


def pattern(seed: int, offset: int, length: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """Bytes [offset, offset + length) of the pattern of this seed."""
    first = offset // 8
    words = np.arange(first, (offset + length + 7) // 8, dtype=np.uint64)
    words += np.uint64(seed * 0x9E3779B9 + 1)
    words *= np.uint64(0x9E3779B97F4A7C15)
    words ^= words >> np.uint64(29)
    words *= np.uint64(0xBF58476D1CE4E5B9)
    return words.view(np.uint8)[offset - 8 * first : offset - 8 * first + length]


class Exposure:
    """A sealed memory file, mapped whole, and filled with a pattern."""

    def __init__(self, seed: int, size_bytes: int) -> None:
        self.file = os.memfd_create("tiercache-test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.file, size_bytes)
        fcntl.fcntl(self.file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        self._memory = mmap.mmap(self.file, size_bytes)
        self.buffer = Buffer.of(self._memory, writable=True)
        self.array = self.buffer.array()
        for start in range(0, size_bytes, 16 * MIB):
            length = min(16 * MIB, size_bytes - start)
            self.array[start : start + length] = pattern(seed, start, length)

    def close(self) -> None:
        """Closes the file; the mapping goes with the last buffer."""
        os.close(self.file)
