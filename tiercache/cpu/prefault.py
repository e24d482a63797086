"""Prefault: makes the kernel give pages of the arena before anybody waits for them."""

from __future__ import annotations

import ctypes
import queue
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

MADV_POPULATE_WRITE = 23
"""Linux 5.14 and later; older kernels refuse it and the pages come at first touch, as they would without us."""

SLICE_BYTES = 8 << 20


def populate(address: int, length: int) -> None:
    """Has the kernel map and zero the pages of a span now; the GIL is released. Harmless where it is not supported."""
    ctypes.CDLL(None).madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), MADV_POPULATE_WRITE)


class Prefault:
    """A background thread that populates spans in slices, in the order asked for. It starts with the first request."""

    def __init__(self, populate: Callable[[int, int], None] = populate) -> None:
        self._populate = populate
        self._asked: queue.SimpleQueue[tuple[int, int, object] | None] = queue.SimpleQueue()
        self._stopped = False
        self._thread: threading.Thread | None = None

    def ask(self, address: int, length: int, owner: object) -> None:
        """Populates a span some time soon; `owner` keeps it mapped until then. Never blocks."""
        if self._stopped:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="tiercache-prefault", daemon=True)
            self._thread.start()
        self._asked.put((address, length, owner))

    def stop(self) -> None:
        """Ends after the slice in progress."""
        self._stopped = True
        if self._thread is not None:
            self._asked.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (asked := self._asked.get()) is not None:
            address, length, _owner = asked
            for at in range(0, length, SLICE_BYTES):
                if self._stopped:
                    break
                self._populate(address + at, min(SLICE_BYTES, length - at))
            del asked, _owner  # nothing may keep the memory while the thread waits
