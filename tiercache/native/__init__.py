"""The native kernel: copies that hash what they move, 64 bytes at a time, past the processor's caches (kernel.c).

`KERNEL` is None where it was not built (no C compiler when tiercache was installed) or does not fit this machine: NumPy
and xxhash then do the same, slower. `WHY` says in a line what is the case.

Calls release the GIL, check nothing and keep nothing alive: callers have checked every address, and hold its owner.
"""

from __future__ import annotations

import ctypes
import hashlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

if TYPE_CHECKING:
    from collections.abc import Callable

DIGEST_BYTES_MIN = 241
"""The kernel hashes nothing shorter: XXH3 has other forms for that."""
ROW_BYTES, ROW_BYTES_MAX = 64, 16384
"""Rows of KV are multiples of this, and no longer than that, or NumPy copies them."""
GATHER, SCATTER, DIGEST = 0, 1, 2
"""Modes of a program of `Kernel.blocks`: engine memory to stored blocks, the way back, or neither."""

SOURCES = ("kernel.c", "body.h")
_PATH = Path(__file__).with_name("_kernel.so")
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64


class Kernel:
    """The functions of kernel.c; their arguments are described there. Arrays are passed as addresses."""

    def __init__(self, path: Path) -> None:
        """Raises OSError or AttributeError where there is no such library."""
        library = ctypes.CDLL(str(path))
        self.choose = _function(library.tiercache_choose, _INT, [_INT])
        spans: list[type] = [_POINTER, _INT, _POINTER]
        self.spans = _function(library.tiercache_spans, None, spans)
        self.spans_small = _function(ctypes.PyDLL(str(path)).tiercache_spans, None, spans)
        """The same without releasing the GIL: for what is over before another thread could use it."""
        self.blocks = _function(library.tiercache_blocks, None, [_POINTER, _INT, *[_POINTER] * 5])
        self.source = ctypes.string_at(ctypes.addressof(ctypes.c_char.in_dll(library, "tiercache_source"))).decode()
        """Digest of what it was built from; see `source_digest`."""
        self.bits = int(self.choose(0))
        """Width of the instructions that it uses here."""


def _function(found: Callable[..., int], answer: type | None, arguments: list[type]) -> Callable[..., int]:
    found.restype = answer  # type: ignore[attr-defined]
    found.argtypes = arguments  # type: ignore[attr-defined]
    return found


def load(path: Path = _PATH) -> tuple[Kernel | None, str]:
    """The kernel, if it can be used, and in a line what it is or why it is not used."""
    if sys.byteorder != "little":
        return None, "not for this machine's byte order"
    if not path.exists():
        return None, "not built: there was no C compiler when tiercache was installed (install gcc, then reinstall)"
    try:
        kernel = Kernel(path)
        if kernel.source != source_digest():
            return None, "built from other sources than these (reinstall tiercache)"
    except (OSError, AttributeError, ValueError) as fault:
        return None, f"built for another machine or version (reinstall tiercache): {fault}"
    if not agrees(kernel):
        return None, "its digests are wrong on this processor: please report this"
    return kernel, f"{kernel.bits}-bit instructions"


def source_digest() -> str:
    """Of the sources that lie here, as hatch_build.py compiles it in: a library of others may have other structures."""
    folder = Path(__file__).parent
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in SOURCES)).hexdigest()[:16]


def agrees(kernel: Kernel) -> bool:
    """Whether its digests are those of xxhash."""
    text, found = (ctypes.c_uint8 * 4352)(*range(256)), ctypes.c_uint64()
    for length in (DIGEST_BYTES_MIN, 1024, 1025, len(text)):
        span = (ctypes.c_int64 * 4)(ctypes.addressof(text), 0, length, length)
        kernel.spans(span, 1, ctypes.addressof(found))
        if found.value != xxhash.xxh3_64_intdigest(bytes(text)[:length]):
            return False
    return True


KERNEL, WHY = load()
