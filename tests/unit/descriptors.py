"""Descriptors that a test opens and closes, apart from those that other tests have left to the garbage collector."""

from __future__ import annotations

import contextlib
import gc
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType


def _open() -> set[tuple[int, str, int]]:
    found = set()
    for each in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing
            path = f"/proc/self/fd/{each}"
            found.add((int(each), os.readlink(path), os.stat(path).st_ino))
    return found


class Descriptors:
    """Within it, `changed` are those that were opened and are not closed, or the other way round; in the end none.

    The collector rests meanwhile: a mapping has a descriptor of its own, which goes with its last buffer, and where a
    traceback or a task of an earlier test holds that one in a cycle, it would go in the middle of this test.
    """

    def __enter__(self) -> Descriptors:
        self._collects = gc.isenabled()
        gc.disable()
        self._before = _open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        changed = self.changed
        if self._collects:
            gc.enable()
        if kind is None:
            assert not changed, f"opened, or closed, and neither undone: {sorted(changed)}"

    @property
    def changed(self) -> set[tuple[int, str, int]]:
        """Number, name and inode of each."""
        return _open() ^ self._before
