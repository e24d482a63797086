"""Other representations of blocks, for those who want them: float8 with scales (lossy), byte planes packed (lossless).

Each has a layout of its own and so keys of its own: it never meets exact blocks, nor another representation. A value is
a header, which tells how it was made and what it holds, and a payload; decoding checks both.

**Fp8** halves 16-bit K and V: float8 e4m3 with one power of two a (layer, head, K or V) of each block. What that costs
is measured at every put (Loss). **Packed** moves each element's sign to its low end, puts bytes of equal place into
planes, and compresses each plane that gives way (zstd from the extra `compress`, else zlib): exponents of K and V are
few, mantissas are noise. bench/represent.py measures what both free.

Sizes differ from block to block, so these are whole values (`put_chain`): no parts, no ranks that fill them together.
"""

from __future__ import annotations

import math
import struct
import threading
import zlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import xxhash

from tiercache.errors import ConfigError
from tiercache.kv import float8
from tiercache.kv.chain import engine_keys
from tiercache.kv.tensors import on_loop
from tiercache.model import PARTS_MAX, Kind, Name, Outcome

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Sequence

    import numpy.typing as npt

    from tiercache.core import Core
    from tiercache.kv.layout import Layout

    U8 = npt.NDArray[np.uint8]

_HEAD = struct.Struct("<4sBBBBQQQ")
"""Magic, version 0, planes, two reserved, bytes of the block, bytes of the payload, xxh3-64 of what decoding checks."""
_PLANE = struct.Struct("<BQ")
_FP8, _PACKED = b"tcf8", b"tcpk"
RAW, ZLIB, ZSTD = 0, 1, 2
METHODS = {"zlib": ZLIB, "zstd": ZSTD}
SAVES_LEAST = 1 / 32
"""A plane that compression shrinks by less is kept as it is: it would cost time at every load."""


class Form(Protocol):
    """One representation of the blocks of a layout. Pure; any thread."""

    exact: Layout
    layout: Layout
    """Its own: the namespace that its entries live in."""

    def encode(self, block: U8) -> bytes:
        """A block of `exact` (all of its bytes) in this representation."""
        ...

    def decode(self, value: U8, out: U8) -> bool:
        """Fills `out` with a block of `exact`; False where `value` is damaged or is none: `out` is undefined then."""
        ...


@dataclass(frozen=True, slots=True)
class Loss:
    """How far decoded elements are from the original ones."""

    elements: int = 0
    max_abs: float = 0.0
    error_squares: float = 0.0
    squares: float = 0.0

    @property
    def relative_rms(self) -> float:
        """Root of the mean square error over root of the mean square."""
        return math.sqrt(self.error_squares / self.squares) if self.squares else 0.0

    def __add__(self, other: Loss) -> Loss:
        return Loss(
            self.elements + other.elements,
            max(self.max_abs, other.max_abs),
            self.error_squares + other.error_squares,
            self.squares + other.squares,
        )


class Fp8:
    """float8 e4m3fn codes in the block's own order, after one power of two (int16) for each (layer, head) of K, then of
    V. Infinities become the largest value, NaN stays."""

    def __init__(self, exact: Layout) -> None:
        """Raises ConfigError where the layout's elements are no floating-point numbers of 16 or 32 bits, or it is not
        known which of them are whose."""
        if exact.order != "dense":
            raise ConfigError("fp8 needs to know what is K and what is V: an opaque page is stored as it is, or packed")
        if exact.dtype not in float8.SOURCES:
            raise ConfigError(f"fp8 is made of {', '.join(float8.SOURCES)}, not of {exact.dtype}: store that as it is")
        self.exact = exact
        self.layout = replace(exact, scales=f"{exact.scales}|fp8_e4m3fn, 2**k a (layer, head, kv) of a block")
        self._raw = float8.SOURCES[exact.dtype]
        self._units = exact.layers * exact.heads
        self._split = exact.rows * exact.k_dim
        self._sides = 2 if exact.v_dim else 1

    def encode(self, block: U8) -> bytes:
        """See Form."""
        _check_block(block, self.exact)
        units = block.view(self._raw).reshape(self._units, -1)
        codes = np.empty(units.shape, np.uint8)
        scales = np.empty((self._sides, self._units), np.int16)
        for side, span in enumerate(self._spans()):
            rows = units[:, span]
            scales[side] = float8.powers(rows, self.exact.dtype)
            float8.encode_rows(rows, self.exact.dtype, scales[side], codes[:, span])
        payload = scales.astype("<i2").tobytes() + codes.tobytes()
        head = _HEAD.pack(_FP8, 0, 0, 0, 0, block.nbytes, len(payload), xxhash.xxh3_64_intdigest(payload))
        return head + payload

    def decode(self, value: U8, out: U8) -> bool:
        """See Form."""
        _check_block(out, self.exact)
        head = _header(value, _FP8, self.exact)
        counts = self._sides * self._units, out.nbytes // self._raw.itemsize
        if head is None or head[6] != 2 * counts[0] + counts[1]:
            return False
        payload = value[_HEAD.size :]
        if xxhash.xxh3_64_intdigest(payload.data) != head[7]:
            return False
        scales = payload[: 2 * counts[0]].view("<i2").reshape(self._sides, self._units)
        codes = payload[2 * counts[0] :].reshape(self._units, -1)
        units = out.view(self._raw).reshape(self._units, -1)
        for side, span in enumerate(self._spans()):
            float8.decode_rows(codes[:, span], self.exact.dtype, scales[side], units[:, span])
        return True

    def loss(self, block: U8, value: bytes) -> Loss:
        """What a block and its encoded value differ by, over finite elements."""
        decoded = np.empty_like(block)
        if not self.decode(np.frombuffer(value, np.uint8), decoded):
            raise ConfigError("this is no value of this representation: pass what `encode` gave for the block")
        before = float8.as_float32(block.view(self._raw), self.exact.dtype)
        after = float8.as_float32(decoded.view(self._raw), self.exact.dtype)
        finite = np.isfinite(before)
        before, after = (before, after) if finite.all() else (before[finite], after[finite])
        error = (after - before).astype(np.float64)
        squares = float(np.square(before, dtype=np.float64).sum())
        return Loss(before.size, float(np.abs(error).max(initial=0.0)), float(error @ error), squares)

    def _spans(self) -> list[slice]:
        """Where K and V of a layer's head lie."""
        return [slice(0, self._split), slice(self._split, None)][: self._sides]


class Packed:
    """Byte planes, each compressed or as it is. The header has a digest of the block, so decoding proves itself."""

    def __init__(self, exact: Layout, method: str = "", level: int | None = None) -> None:
        """`method`: "zstd", "zlib", or "" for the best that is installed. It is in the namespace: whoever cannot read
        zstd never finds it. Raises ConfigError for a method that is not there."""
        if method not in ("", *METHODS):
            raise ConfigError(f"no compression called {method!r}: {' or '.join(METHODS)}")
        if method == "zstd" and not has_zstd():
            raise ConfigError('zstd is not installed: pip install "tiercache[compress]", or use method="zlib"')
        self.method = method or ("zstd" if has_zstd() else "zlib")
        self.level = level if level is not None else 1
        self.exact = exact
        self.layout = replace(exact, tag=f"{exact.tag}|byte planes, {self.method}")
        self._item = exact.itemsize

    def encode(self, block: U8) -> bytes:
        """See Form."""
        _check_block(block, self.exact)
        stored = []
        for plane in _planes(block, self._item):
            packed = _compress(plane, self.method, self.level)
            keep = len(packed) > plane.nbytes * (1 - SAVES_LEAST)
            stored.append((RAW, plane.tobytes()) if keep else (METHODS[self.method], packed))
        directory = b"".join(_PLANE.pack(method, len(data)) for method, data in stored)
        payload = directory + b"".join(data for _, data in stored)
        digest = xxhash.xxh3_64_intdigest(block.data)
        return _HEAD.pack(_PACKED, 0, self._item, 0, 0, block.nbytes, len(payload), digest) + payload

    def decode(self, value: U8, out: U8) -> bool:
        """See Form."""
        _check_block(out, self.exact)
        head = _header(value, _PACKED, self.exact)
        if head is None or head[2] != self._item:
            return False
        at, planes = _HEAD.size + self._item * _PLANE.size, []
        for i in range(self._item):
            if len(value) < _HEAD.size + self._item * _PLANE.size:
                return False
            method, size = _PLANE.unpack_from(value.data, _HEAD.size + i * _PLANE.size)
            if size > len(value) - at:
                return False
            plane = _expand(value[at : at + size], method, out.nbytes // self._item)
            if plane is None:
                return False
            planes.append(plane)
            at += size
        _join(planes, out)
        digest: int = head[7]
        return xxhash.xxh3_64_intdigest(out.data) == digest


def has_zstd() -> bool:
    """Whether the package `zstandard` is installed (extra `compress`)."""
    try:
        import zstandard  # noqa: F401
    except ImportError:
        return False
    return True


def sizes(value: bytes | memoryview) -> tuple[int, int]:
    """(bytes of the block, bytes of the stored value) of an encoded value. ConfigError where it is none."""
    if len(value) < _HEAD.size or bytes(value[:4]) not in (_FP8, _PACKED):
        raise ConfigError("this is no encoded block: pass what Fp8.encode or Packed.encode gave")
    return _HEAD.unpack_from(value)[5], len(value)


class Represented:
    """Blocks of a layout in another representation, in a cache. From any thread but that of the I/O loop.

    Called with the same keys as exact blocks have; its own are made from those, in its own namespace.
    """

    def __init__(self, core: Core, loop: asyncio.AbstractEventLoop, form: Form) -> None:
        """`loop`: the I/O loop that `core` lives on."""
        self._core, self._loop, self.form = core, loop, form
        self._lock = threading.Lock()
        self.original_bytes = self.stored_bytes = 0
        """Of all blocks put so far, before and after."""
        self.loss = Loss()
        """Of all blocks put so far; nothing for a lossless form."""

    def keys(self, keys: Sequence[bytes]) -> list[bytes]:
        """Its own keys for blocks with these."""
        return engine_keys(self.form.layout, keys)

    def put(
        self,
        keys: Sequence[bytes],
        blocks: Sequence[U8],
        *,
        parent: bytes = b"",
        cost_s: float = 0.0,
        durable: bool = False,
        timeout_s: float = 60.0,
    ) -> list[Outcome]:
        """Encodes and stores blocks (uint8 arrays of whole blocks) of one chain in order, after the block `parent`."""
        if len(keys) != len(blocks):
            raise ConfigError(f"put got {len(keys)} keys and {len(blocks)} blocks: give one for each")
        values = [self.form.encode(block) for block in blocks]
        above = self.keys([parent])[0] if parent else b""
        work = self._core.put_chain(self.keys(keys), values, parent=above, kind=Kind.KV, cost_s=cost_s, durable=durable)
        outcomes = on_loop(work, self._loop, timeout_s) or [Outcome.BUSY] * len(keys)
        with self._lock:
            for block, value, outcome in zip(blocks, values, outcomes):
                if outcome is Outcome.HIT:
                    self.original_bytes += block.nbytes
                    self.stored_bytes += len(value)
                    if isinstance(self.form, Fp8):
                        self.loss += self.form.loss(block, value)
        return outcomes

    def match(self, keys: Sequence[bytes]) -> int:
        """How many leading blocks are stored in this representation, in any tier; nothing is loaded."""
        return len(self._core.probe_chain(self.keys(keys), (1 << PARTS_MAX) - 1))

    def get_into(self, keys: Sequence[bytes], targets: Sequence[U8], *, timeout_s: float = 60.0) -> list[Outcome]:
        """Decodes blocks of one chain, from its first on, into `targets` (uint8 arrays of a whole block each).

        HIT, or why not: its target is undefined then. CORRUPT: the copy in memory was damaged and is gone; what the SSD
        has can be asked for again.
        """
        own = self.keys(keys)
        if not own:
            return []
        outcomes = [Outcome.MISS] * len(own)
        lease = on_loop(self._core.match(own), self._loop, timeout_s)
        if lease is None:
            return [Outcome.BUSY] * len(own)
        with lease:
            for i in range(len(lease)):
                good = self.form.decode(lease.array(i), targets[i])
                outcomes[i] = Outcome.HIT if good else Outcome.CORRUPT
        bad = [Name(key) for key, outcome in zip(own, outcomes) if outcome is Outcome.CORRUPT]
        if bad:
            self._core.quarantine(bad)
        return outcomes


def _check_block(block: U8, layout: Layout) -> None:
    if block.dtype != np.uint8 or block.shape != (layout.block_bytes,) or not block.flags.c_contiguous:
        raise ConfigError(f"a block is {layout.block_bytes} contiguous uint8, not {block.dtype} {block.shape}")


def _header(value: U8, magic: bytes, exact: Layout) -> tuple[bytes, int, int, int, int, int, int, int] | None:
    """The header's fields, where they fit the value and the layout."""
    if len(value) < _HEAD.size:
        return None
    head: tuple[bytes, int, int, int, int, int, int, int] = _HEAD.unpack_from(value.data)
    fits = head[0] == magic and head[1] == 0 and head[5] == exact.block_bytes and head[6] == len(value) - _HEAD.size
    return head if fits else None


_WORDS: dict[int, np.dtype[Any]] = {2: np.dtype("<u2"), 4: np.dtype("<u4"), 8: np.dtype("<u8")}


def _planes(block: U8, item: int) -> list[U8]:
    """Byte planes of elements whose sign went from the highest bit to the lowest, so that the last holds exponents."""
    if item == 1:
        return [block]
    words = block.view(_WORDS[item])
    one, rest = words.dtype.type(1), words.dtype.type(8 * item - 1)
    turned = ((words << one) | (words >> rest)).view(np.uint8).reshape(-1, item)
    return [np.ascontiguousarray(turned[:, i]) for i in range(item)]


def _join(planes: Sequence[U8], out: U8) -> None:
    """The reverse of `_planes`."""
    item = len(planes)
    if item == 1:
        out[:] = planes[0]
        return
    rows = out.reshape(-1, item)
    for i, plane in enumerate(planes):
        rows[:, i] = plane
    words = out.view(_WORDS[item])
    one, rest = words.dtype.type(1), words.dtype.type(8 * item - 1)
    words[:] = (words >> one) | (words << rest)


def _compress(plane: U8, method: str, level: int) -> bytes:
    if method == "zlib":
        # Exponents of neighbours do not repeat in runs: looking for matches takes twice as long, and spoils the codes.
        engine = zlib.compressobj(level, strategy=zlib.Z_HUFFMAN_ONLY)
        return engine.compress(plane.data) + engine.flush()
    import zstandard

    packed: bytes = zstandard.ZstdCompressor(level=level).compress(plane.data)
    return packed


def _expand(data: U8, method: int, size: int) -> U8 | None:
    """A plane of exactly `size` bytes, or None: never more memory than that, whatever the data say."""
    if method == RAW:
        return data if len(data) == size else None
    if method == ZLIB:
        engine = zlib.decompressobj()
        try:
            plain = engine.decompress(data.data, size)
            whole = len(plain) == size and not engine.decompress(engine.unconsumed_tail, 1) and engine.eof
        except zlib.error:
            return None
        return np.frombuffer(plain, np.uint8) if whole else None
    if method != ZSTD or not has_zstd():
        return None
    import zstandard

    try:
        if zstandard.frame_content_size(data.data) != size:
            return None
        plain = zstandard.ZstdDecompressor().decompress(data.data, max_output_size=size)
    except zstandard.ZstdError:
        return None
    return np.frombuffer(plain, np.uint8) if len(plain) == size else None
