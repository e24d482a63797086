"""Notation: how settings are written, as sizes, shares, times and flags, and how sizes are shown."""

from __future__ import annotations

import math
import os
import re
from enum import Enum

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": KIB, "mib": MIB, "gib": GIB, "tib": 1 << 40}
_SECONDS = {"": 1.0, "ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_FLAGS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_NUMBER = re.compile(r"([0-9][0-9_]*(?:\.[0-9]+)?)\s*([a-z%]*)", re.IGNORECASE)


class Kind(Enum):
    """How a setting is written; the value is what the message of a refusal asks for."""

    SIZE = 'a size such as 4096, "512 MiB" or "4GB"'
    SHARE_OR_SIZE = 'a size such as 4096, "512 MiB" or "4GB", or a share such as "10%"'
    COUNT = "a whole number"
    TIME = 'seconds, or a time such as "500ms" or "2min"'
    FRACTION = 'a share from 0 to 1, or "95%"'
    FLAG = "true or false"
    PATH = "a path"
    TEXT = "a name"
    OPTION = "a text, or nothing"


def parsed(kind: Kind, value: object) -> str | int | float | bool | None:
    """The plain value that was written, or None when it is not of this kind. Shares must be made sizes before."""
    if kind is Kind.OPTION:
        return value if isinstance(value, str) else None
    if kind in (Kind.PATH, Kind.TEXT):
        return os.fspath(value) if isinstance(value, str | os.PathLike) and os.fspath(value) else None
    if kind is Kind.FLAG:
        return value if isinstance(value, bool) else _FLAGS.get(str(value).strip().lower())
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        return parsed_text(kind, value.strip().lower())
    if isinstance(value, int):
        return value if kind is not Kind.TIME and kind is not Kind.FRACTION else float(value)
    if not isinstance(value, float) or not math.isfinite(value):
        return None
    if kind in (Kind.TIME, Kind.FRACTION):
        return value
    return int(value) if value == int(value) else None


def parsed_text(kind: Kind, text: str) -> int | float | None:
    """The number that was written, or None when it is none of this kind."""
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    digits, unit = match.group(1).replace("_", ""), match.group(2)
    if kind is Kind.FRACTION:
        return float(digits) / 100 if unit == "%" else float(digits) if unit == "" else None
    if kind is Kind.TIME:
        return float(digits) * _SECONDS[unit] if unit in _SECONDS else None
    if kind is Kind.COUNT:
        return int(digits) if unit == "" and "." not in digits else None
    return round(float(digits) * _UNITS[unit]) if "." in digits and unit in _UNITS else _whole_size(digits, unit)


def _whole_size(digits: str, unit: str) -> int | None:
    return int(digits) * _UNITS[unit] if unit in _UNITS and "." not in digits else None


def parse_size(text: str) -> int | None:
    """Bytes of a size as people write it ("10 GiB", "4096"), or None when it is none."""
    size = parsed_text(Kind.SIZE, text.strip().lower())
    return int(size) if size is not None else None


def format_size(size: float) -> str:
    """A size for people: "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
