"""Conversion to and from float8 e4m3fn in NumPy: round to nearest even, saturating, exact where the result is exact.

e4m3fn (FP8 formats for deep learning, arXiv 2209.05433): sign, 4 bits of exponent with bias 7, 3 of mantissa; largest
448, smallest normal 2**-6, smallest subnormal 2**-9; 0x7f and 0xff are NaN, there is no infinity.

Values are scaled by powers of two: exact, and a floating-point format loses nothing by it but range, of which blocks of
KV use little. So a 16-bit source has at most 65,536 results for a scale, and one table lookup is the whole conversion.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    U8 = npt.NDArray[np.uint8]
    F32 = npt.NDArray[np.float32]
    Raw = npt.NDArray[Any]

LARGEST = 448.0
NAN = 0x7F
SOURCES: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype("<u2"),
    "float16": np.dtype("<u2"),
    "float32": np.dtype("<u4"),
}
"""Types that can be converted, by torch's names, and the raw integers that they come as."""
_INFINITY = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000}


def as_float32(raw: Raw, dtype: str) -> F32:
    """The values of raw elements of one of SOURCES, exact."""
    if dtype == "bfloat16":
        return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    with np.errstate(invalid="ignore"):  # NaNs that signal
        return raw.view(np.float16).astype(np.float32) if dtype == "float16" else raw.view(np.float32)


def from_float32(values: F32, dtype: str) -> Raw:
    """Raw elements of one of SOURCES nearest to `values` (ties to even), which are finite or NaN."""
    if dtype == "float32":
        return values.view(np.uint32)
    if dtype == "float16":
        return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def to_e4m3(values: F32) -> U8:
    """Codes nearest to float32 values, ties to even; what is larger than 448 becomes that, NaN stays NaN."""
    bits = values.view(np.uint32)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    # Adding half of the last kept place, less one where that place is even already, carries exactly when rounding does.
    rounded = (magnitude + np.uint32(0x7FFFF) + ((magnitude >> np.uint32(20)) & np.uint32(1))) >> np.uint32(20)
    codes = np.minimum(np.maximum(rounded, np.uint32(120 << 3)) - np.uint32(120 << 3), np.uint32(NAN - 1))
    small = magnitude < np.uint32(121 << 23)  # below 2**-6: a whole number of 2**-9
    codes[small] = np.rint(np.abs(values[small]) * np.float32(512)).astype(np.uint32)
    codes[magnitude > np.uint32(0x7F800000)] = NAN
    found: U8 = (codes | ((bits >> np.uint32(24)) & np.uint32(0x80))).astype(np.uint8)
    return found


@lru_cache(maxsize=1)
def e4m3_values() -> F32:
    """The value of every code, in order."""
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    size = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    size[(codes & 0x7F) == NAN] = np.nan
    return np.where(codes & 0x80, -size, size).astype(np.float32)


@lru_cache(maxsize=256)
def encode_table(dtype: str, power: int) -> U8:
    """Codes of every 16-bit raw element, divided by 2**power."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        values = as_float32(np.arange(1 << 16, dtype=np.uint32).astype(np.uint16), dtype).astype(np.float64)
        return to_e4m3(np.ldexp(values, -power).astype(np.float32))


@lru_cache(maxsize=256)
def decode_table(dtype: str, power: int) -> Raw:
    """Raw elements of every code, times 2**power: exact, unless that is less than the type's smallest normal one, or
    beyond its largest (then that one)."""
    values = np.ldexp(e4m3_values().astype(np.float64), power)
    largest = float(as_float32(np.array([_INFINITY[dtype] - 1], SOURCES[dtype]), dtype)[0])
    with np.errstate(under="ignore"):
        return from_float32(np.clip(values, -largest, largest).astype(np.float32), dtype)


def powers(rows: Raw, dtype: str) -> npt.NDArray[np.int16]:
    """For each row (axis 0) the power of two by which it is divided, so that its largest finite element lies in
    (224, 448]; 0 for a row of zeros."""
    infinity = _INFINITY[dtype]
    size = rows & rows.dtype.type(np.iinfo(rows.dtype).max >> 1)  # all but the sign
    most = size.max(axis=1, initial=0)
    for row in np.flatnonzero(most >= infinity):
        finite = size[row][size[row] < infinity]
        most[row] = finite.max(initial=0)
    fraction, exponent = np.frexp(as_float32(most.astype(rows.dtype), dtype).astype(np.float64))
    found = exponent - np.where(fraction > LARGEST / 512, 8, 9)
    return np.where(most > 0, found, 0).astype(np.int16)


def encode_rows(rows: Raw, dtype: str, scales: npt.NDArray[np.int16], out: U8) -> None:
    """Codes of each row, divided by its own power of two, into `out` (same shape)."""
    for power in np.unique(scales).tolist():
        same = np.flatnonzero(scales == power)
        if dtype == "float32":
            with np.errstate(over="ignore", under="ignore", invalid="ignore"):
                part = np.ldexp(rows[same].view(np.float32).astype(np.float64), -power)
                out[same] = to_e4m3(part.astype(np.float32))
        else:
            out[same] = encode_table(dtype, power)[rows[same]]


def decode_rows(codes: U8, dtype: str, scales: npt.NDArray[np.int16], out: Raw) -> None:
    """The reverse of `encode_rows`, into raw elements (same shape)."""
    for power in np.unique(scales).tolist():
        same = np.flatnonzero(scales == power)
        out[same] = decode_table(dtype, power)[codes[same]]
