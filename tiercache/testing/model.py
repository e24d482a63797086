"""The reference model: a dictionary that may forget, a witness of what leases hold, and an origin made of a dictionary.

Every test of a whole cache compares with it. A miss is always right; a value only if it may be the current one.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tiercache.errors import ChangedError, OriginError
from tiercache.model import Outcome
from tiercache.origin import Span, Stat

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Sequence

    from tiercache.buffers import Buffer
    from tiercache.tier import TierStatus


def made_bytes(label: object, size: int) -> bytes:
    """`size` bytes that are a function of the label: the same everywhere, different for every label and offset."""
    seed = int.from_bytes(hashlib.blake2b(repr(label).encode(), digest_size=16).digest(), "little")
    return np.random.Generator(np.random.PCG64(seed)).bytes(size)


class ModelError(AssertionError):
    """The cache said something that no dictionary, however forgetful, could say."""


class _Held(NamedTuple):
    name: Hashable
    view: memoryview
    copy: bytes


class ForgetfulDict:
    """What a cache may answer, given what was done to it.

    Entries are immutable: a put of a name that is present changes nothing. A put therefore adds its value to those
    that the name may have, an answer fixes which one it is, and only deletion (or expiry) ends them all.
    """

    def __init__(self) -> None:
        self._values: dict[Hashable, set[bytes]] = {}
        self._expiries_s: dict[Hashable, float] = {}
        self._buried: dict[Hashable, set[bytes]] = {}
        self._held: dict[int, _Held] = {}
        self._count = 0

    def put(self, name: Hashable, value: bytes, *, expiry_s: float = 0.0, now_s: float = 0.0) -> None:
        """A put began: from now on `value` may be seen. `expiry_s` is a moment of the wall clock, 0 for never."""
        before_s = self._expiries_s.get(name, 0.0)
        if before_s and now_s >= before_s:
            self._values.pop(name, None)
        if self._values.get(name):
            # Which of the puts took effect is not known: the latest expiry is the one after which all must be gone.
            expiry_s = max(before_s, expiry_s) if before_s and expiry_s else 0.0
        self._values.setdefault(name, set()).add(bytes(value))
        self._expiries_s[name] = expiry_s

    def delete(self, name: Hashable) -> None:
        """A delete ended, with no put of the name running: nothing may be seen any more."""
        self._buried.setdefault(name, set()).update(self._values.pop(name, ()))
        self._expiries_s.pop(name, None)

    def flushed(self) -> None:
        """A flush ended, with no delete running: a loss of memory will not undo the deletes before it."""
        self._buried.clear()

    def forget(self) -> None:
        """The cache was lost and opened again: deletes that no flush made durable may be undone."""
        for name, values in self._buried.items():
            self._values.setdefault(name, set()).update(values)
            # What comes back brings its own expiry, which is not known here any more.
            self._expiries_s.pop(name, None)
        self._buried.clear()

    def check(self, name: Hashable, answer: bytes | None, *, now_s: float = 0.0) -> None:
        """Raises ModelError unless a get of `name` may give this answer (None: a miss)."""
        if answer is None:
            return
        expiry_s = self._expiries_s.get(name, 0.0)
        if expiry_s and now_s >= expiry_s:
            raise ModelError(f"{name!r} expired at {expiry_s} and was given at {now_s}")
        values = self._values.get(name, set())
        if answer not in values:
            raise ModelError(f"{name!r}: {_words(answer)} was given, {[_words(value) for value in values]} was put")
        self._values[name] = {answer}

    def may_have(self, name: Hashable) -> bool:
        """Whether a hit of this name could be right at all."""
        return bool(self._values.get(name))

    def names(self) -> list[Hashable]:
        """Names that may be present, in order of their first put."""
        return [name for name, values in self._values.items() if values]

    def hold(self, name: Hashable, view: memoryview) -> int:
        """A leased view is out: its bytes are checked by `check_held` until `let_go` with the number answered."""
        self.check(name, bytes(view))
        self._count += 1
        self._held[self._count] = _Held(name, view, bytes(view))
        return self._count

    def let_go(self, number: int) -> None:
        """The view is given back."""
        held = self._held.pop(number)
        self._check_one(held)
        held.view.release()

    def check_held(self) -> None:
        """Raises ModelError unless every leased view still has the bytes that it had."""
        for held in self._held.values():
            self._check_one(held)

    @property
    def held(self) -> list[int]:
        """Numbers of the views that are out."""
        return list(self._held)

    @staticmethod
    def _check_one(held: _Held) -> None:
        if bytes(held.view) != held.copy:
            raise ModelError(f"leased bytes of {held.name!r} changed under the lease")


def check_caps(statuses: Iterable[TierStatus]) -> None:
    """Raises ModelError unless every tier is within its caps."""
    for status in statuses:
        if not 0 <= status.used_bytes <= status.capacity_bytes:
            raise ModelError(f"{status.name}: {status.used_bytes} of {status.capacity_bytes} bytes used")
        if not 0 <= status.used_files <= max(status.capacity_files, 0):
            raise ModelError(f"{status.name}: {status.used_files} of {status.capacity_files} files used")


class DictOrigin:
    """An origin in a dictionary: every write makes a new version, an old version is gone at once."""

    identity = "dict://"

    def __init__(self) -> None:
        self._objects: dict[str, tuple[Stat, bytes]] = {}
        self._count = 0

    def set(self, path: str, data: bytes) -> Stat:
        """Creates or replaces an object, outside of the port."""
        self._count += 1
        stat = Stat(path, len(data), version=f"v{self._count}", mtime_s=float(self._count))
        self._objects[path] = (stat, bytes(data))
        return stat

    def data(self, path: str) -> bytes:
        """What the object is now, outside of the port."""
        return self._objects[path][1]

    async def stat(self, paths: Sequence[str]) -> list[Stat | Outcome]:
        return [self._objects[path][0] if path in self._objects else Outcome.GONE for path in paths]

    async def read(self, stat: Stat, span: Span, targets: Sequence[Buffer]) -> None:
        found = self._objects.get(stat.path)
        if found is None or found[0].version != stat.version:
            raise ChangedError(f"{stat.path}: version {stat.version} is gone")
        data = found[1][span.start : span.start + span.length]
        if len(data) != span.length or sum(map(len, targets)) != span.length:
            raise OriginError(f"{stat.path}: {span} is not inside the object, or not the length of the targets")
        start = 0
        for target in targets:
            target.view()[:] = data[start : start + len(target)]
            start += len(target)

    async def read_tail(self, path: str, length: int) -> tuple[Stat, bytes] | Outcome:
        if path not in self._objects:
            return Outcome.GONE
        stat, data = self._objects[path]
        return stat, data[max(0, len(data) - length) :]

    async def write(self, path: str, data: bytes | memoryview) -> Stat:
        return self.set(path, bytes(data))

    async def delete(self, paths: Sequence[str]) -> list[Outcome]:
        return [Outcome.HIT if self._objects.pop(path, None) else Outcome.GONE for path in paths]

    async def close(self) -> None:
        """Holds nothing."""

    async def list(self, path: str) -> list[Stat] | Outcome:
        prefix = path.rstrip("/") + "/" if path else ""
        children: dict[str, Stat] = {}
        for name, (stat, _) in sorted(self._objects.items()):
            if name.startswith(prefix):
                child, deeper, _rest = name[len(prefix) :].partition("/")
                children[child] = Stat(prefix + child, 0, is_directory=True) if deeper else stat
        return list(children.values()) if children else Outcome.GONE


def _words(value: bytes) -> str:
    return f"{len(value)} bytes {value[:6].hex()}…"
