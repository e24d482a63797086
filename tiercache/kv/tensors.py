"""Encoder outputs (images, audio) as lone entries: made once, used by every request that has the same input.

The key covers everything that changes the bytes: the input's content hash, the encoder and its revision, and how the
input was preprocessed. Nothing of the requests is in it, so five consumers cost one encoding and four hits. The case
is that of "Efficiently Serving Large Multimodal Models Using EPD Disaggregation" (arXiv 2501.05460), and vLLM's
ECConnector asks for the same. The value is a small header (dtype and shape) and the array's bytes, row-major.
"""

from __future__ import annotations

import asyncio
import json
import struct
from concurrent.futures import TimeoutError as Late
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tiercache.buffers import Buffer, copy, new_bytes
from tiercache.errors import ConfigError, UnavailableError
from tiercache.keys import namespace, object_key
from tiercache.lease import Pieces, look_again
from tiercache.model import Kind, Name, Outcome, Terms

if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping, Sequence
    from typing import Any, TypeVar

    import numpy.typing as npt

    from tiercache.core import Core
    from tiercache.lease import Lease

    T = TypeVar("T")

DTYPES: dict[str, str] = {
    "float32": "<f4", "float16": "<f2", "float64": "<f8", "bfloat16": "<u2", "float8_e4m3fn": "|u1",
    "float8_e5m2": "|u1", "int8": "|i1", "uint8": "|u1", "int16": "<i2", "int32": "<i4", "int64": "<i8", "bool": "|b1",
}  # fmt: skip
"""Element types by the name that torch has for them, and the NumPy type that their bytes travel in: types that NumPy
lacks are raw unsigned integers."""

_HEADER = struct.Struct("<4sBBH56x")
_MAGIC = b"tct1"
DIMS_MAX = 6
_SHAPE = struct.Struct(f"<{DIMS_MAX}Q")
HEADER_BYTES = 64
"""The array begins on a boundary that every vector instruction likes."""


class Tensor(NamedTuple):
    """One array as it was put: `array` in the NumPy type of DTYPES, `dtype` the true one."""

    array: npt.NDArray[Any]
    dtype: str


def tensor_key(content_hash: bytes | str, encoder: str, revision: str, preprocessing: Mapping[str, object]) -> bytes:
    """Key (32 bytes) of an encoder's output for one input.

    Args:
        content_hash: of the input itself, as the engine hashes it (vLLM: `mm_hash`).
        encoder, revision: the model, and which weights of it: a commit, or a digest of them.
        preprocessing: everything else that changes the output (resizing, tiles, dtype, salt of a tenant): JSON values.

    Raises ConfigError where one of the first three is empty, or `preprocessing` is not JSON.
    """
    for name, value in (("content_hash", content_hash), ("encoder", encoder), ("revision", revision)):
        if not value:
            raise ConfigError(f"a tensor key needs a {name}: without it two different outputs could share a key")
    try:
        text = json.dumps(preprocessing, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"preprocessing must be JSON values under text keys, so that it has one form: {error}"
        ) from None
    return object_key(namespace("tensors", encoder, revision, text), content_hash)


class Tensors:
    """Arrays put into a cache and got from it, from any thread but that of the I/O loop."""

    def __init__(self, core: Core, loop: asyncio.AbstractEventLoop) -> None:
        """`loop`: the I/O loop that `core` lives on."""
        self._core, self._loop = core, loop

    def put(
        self,
        keys: Sequence[bytes],
        arrays: Sequence[npt.NDArray[Any]],
        dtypes: Sequence[str] | None = None,
        *,
        cost_s: float = 0.0,
        ttl_s: float | None = None,
    ) -> list[Outcome]:
        """Stores arrays: HIT, or why not. What is there already stays.

        Args:
            dtypes: torch's names of the element types; needed for those that NumPy lacks (bfloat16 comes as uint16).
            cost_s: seconds of encoding that one of them stands for.

        Raises ConfigError for a dtype or a shape that has no form here.
        """
        if len(keys) != len(arrays) or (dtypes is not None and len(dtypes) != len(arrays)):
            raise ConfigError(f"put got {len(keys)} keys and {len(arrays)} arrays: give one (and one dtype) for each")
        values = [encode(array, dtypes[i] if dtypes else None) for i, array in enumerate(arrays)]
        terms = Terms(Kind.TENSOR, cost_s=cost_s, expiry_s=self._core.expiry(ttl_s))
        return self._core.store([Name(key) for key in keys], [Buffer.of(value) for value in values], terms)

    def get(self, keys: Sequence[bytes], *, timeout_s: float = 60.0, verify: bool = True) -> list[Tensor | Outcome]:
        """Copies of arrays, from memory or SSD, or why there is none (BUSY: no time)."""
        names = [Name(key) for key in keys]
        found: list[Tensor | Outcome] = [Outcome.MISS] * len(names)
        damaged: set[int] = set()
        deadline_s = self._core.clock.monotonic() + timeout_s
        pieces = Pieces(range(len(names)))
        for piece in pieces:
            rest = piece
            while rest:
                left_s = deadline_s - self._core.clock.monotonic()
                lease = self._lease([names[i] for i in rest], left_s)
                if lease is None:
                    for i in rest:
                        found[i] = Outcome.BUSY
                    break
                with lease:
                    for at, i in enumerate(rest):
                        found[i] = _taken(lease, at, verify)
                if pieces.refused(rest, found):
                    break
                rest = look_again(names, found, rest, damaged, self._core.quarantine)
        return found

    def _lease(self, names: Sequence[Name], timeout_s: float) -> Lease | None:
        resident = self._core.lease_names_resident(names)
        return resident if resident is not None else on_loop(self._core.lease(names), self._loop, timeout_s)


def on_loop(work: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop, timeout_s: float) -> T | None:
    """What a coroutine on the I/O loop answers, for another thread; None where time is over: it is cancelled then."""
    try:
        here = asyncio.get_running_loop() is loop
    except RuntimeError:
        here = False
    if here:
        work.close()
        raise ConfigError("a blocking call on the I/O loop would wait for itself: call it from another thread")
    future = asyncio.run_coroutine_threadsafe(work, loop)
    try:
        return future.result(max(0.0, timeout_s))
    except Late:
        future.cancel()
        return None
    except UnavailableError:
        return None


def encode(array: npt.NDArray[Any], dtype: str | None = None) -> bytes:
    """An array as it is stored: HEADER_BYTES of header, then its elements, row-major. ConfigError: see Tensors.put."""
    name = array.dtype.name if dtype is None else dtype
    if name not in DTYPES or np.dtype(DTYPES[name]).itemsize != array.dtype.itemsize:
        raise ConfigError(f"no tensor of dtype {name} in an array of {array.dtype}: one of {', '.join(DTYPES)}")
    if array.ndim > DIMS_MAX:
        raise ConfigError(f"a tensor has at most {DIMS_MAX} axes, not {array.ndim}: reshape it")
    if array.dtype.byteorder == ">":
        raise ConfigError("a tensor's elements are little-endian: array.astype(array.dtype.newbyteorder('<'))")
    source = np.ascontiguousarray(array)
    value, target = new_bytes(HEADER_BYTES + source.nbytes)
    head = bytearray(_HEADER.pack(_MAGIC, array.ndim, list(DTYPES).index(name), 0))
    _SHAPE.pack_into(head, _HEADER.size - _SHAPE.size, *array.shape, *[0] * (DIMS_MAX - array.ndim))
    copy(Buffer.of(bytes(head)), target)
    copy(Buffer.of(source.reshape(-1).view(np.uint8).data), target.slice(HEADER_BYTES, source.nbytes))
    return value


def decode_header(head: bytes, size: int) -> tuple[str, tuple[int, ...]] | None:
    """(dtype, shape) from the first HEADER_BYTES of a value of `size` bytes; None where that is no tensor."""
    if len(head) < HEADER_BYTES:
        return None
    magic, dims, index, _ = _HEADER.unpack_from(head)
    if magic != _MAGIC or dims > DIMS_MAX or index >= len(DTYPES):
        return None
    dtype = list(DTYPES)[index]
    shape = _SHAPE.unpack_from(head, _HEADER.size - _SHAPE.size)[:dims]
    count = 1
    for each in shape:
        count *= each
    return (dtype, shape) if HEADER_BYTES + count * np.dtype(DTYPES[dtype]).itemsize == size else None


def _taken(lease: Lease, at: int, verify: bool) -> Tensor | Outcome:
    """A copy of item `at`, whose every part is checked on the way."""
    if lease.outcomes[at] is not Outcome.HIT:
        return lease.outcomes[at]
    size = lease.buffer(at).length
    head = np.zeros(HEADER_BYTES, np.uint8)
    if size < HEADER_BYTES:
        return Outcome.CORRUPT
    outcome = lease.copy_into(at, 0, HEADER_BYTES, Buffer.of(head.data, writable=True), verify=verify)
    facts = decode_header(head.tobytes(), size)
    if outcome is not Outcome.HIT or facts is None:
        return Outcome.CORRUPT if outcome is Outcome.HIT else outcome
    dtype, shape = facts
    array = np.empty(shape, DTYPES[dtype])
    if array.nbytes:
        flat = Buffer.of(array.reshape(-1).data, writable=True)
        outcome = lease.copy_into(at, HEADER_BYTES, size, flat, verify=verify)
    return Tensor(array, dtype) if outcome is Outcome.HIT else outcome
