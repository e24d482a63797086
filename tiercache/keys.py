"""Pure builders of keys: a namespace digest and an object digest, 32 bytes in all, from the things that change bytes.

What goes in: endpoint and reader's rights, path, version and page geometry of a file; the namespace and name of a lone
object; the namespace and tokens of a block. What must not: anything that does not change the bytes (host names, ranks).
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import TYPE_CHECKING

import xxhash

from tiercache.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

FORMAT_VERSION = 1
"""Enters every namespace: a change of what keys mean makes old entries unreachable, never wrong."""


def _digest(fields: Sequence[str | bytes]) -> bytes:
    """xxh3-128 of length-prefixed fields, so that ("ab", "c") and ("a", "bc") differ."""
    return xxhash.xxh3_128_digest(b"".join([_field(field) for field in fields]))


def _field(field: str | bytes) -> bytes:
    data = field.encode("utf-8", "surrogateescape") if isinstance(field, str) else field
    return len(data).to_bytes(8, "little") + data


def namespace(*fields: str | bytes) -> bytes:
    """Digest (16 bytes) of what all objects of one world share: an origin's identity, a layout, a tenant's salt."""
    return _digest((f"tiercache/{FORMAT_VERSION}", *fields))


def page_key(identity: str, path: str, version: str, page_bytes: int, part_bytes: int) -> bytes:
    """Key (32 bytes) of one version of one file as one reader may see it; pages of it are Name(key, ordinal).

    `version` must not be empty: a file without a version has no key that could be shared (pages/versions.py decides).
    """
    if not version:
        raise ConfigError("a page key needs a version: read the file around the cache, or give it a version of its own")
    world = namespace("pages", identity, page_bytes.to_bytes(8, "little"), part_bytes.to_bytes(8, "little"))
    return world + _digest((path, version))


def object_key(space: bytes | str, name: bytes | str) -> bytes:
    """Key (32 bytes) of a lone object called `name` in a namespace (a digest of 16 bytes, or any string)."""
    world = space if isinstance(space, bytes) and len(space) == 16 else _objects(space)
    return world + xxhash.xxh3_128_digest(_field(name))


@lru_cache(maxsize=256)
def _objects(space: bytes | str) -> bytes:
    """A program has few namespaces, and asks for one name after the other."""
    return namespace("objects", space)


def chain(
    space: bytes, chunks: Sequence[bytes], parent: bytes = b"", *, collision_resistant: bool = False
) -> list[bytes]:
    """Digests of the blocks of one chain: digest i = H(digest i-1 or namespace, chunk i).

    xxh3-128 (16 bytes each), or SHA-256 (32 bytes each) where those who write do not trust each other.
    """
    hashed = _sha256 if collision_resistant else xxhash.xxh3_128_digest
    previous, digests = parent or space, []
    for chunk in chunks:
        previous = hashed(previous + chunk)
        digests.append(previous)
    return digests


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def check_key(key: object) -> bytes:
    """The key itself if it can be one (16 or 32 bytes); ConfigError with the way out otherwise."""
    if not isinstance(key, bytes):
        raise ConfigError(f"a key is bytes, not {type(key).__name__}: build it with tiercache.keys.object_key(...)")
    if len(key) not in (16, 32):
        raise ConfigError(f"a key has 16 or 32 bytes, not {len(key)}: build it with tiercache.keys.object_key(...)")
    return key
