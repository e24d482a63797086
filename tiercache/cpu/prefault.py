"""Prefault: makes the kernel give pages of the arena before anybody waits for them."""

from __future__ import annotations

import ctypes
import queue
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from tiercache.buffers import Buffer

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
        self._asked: queue.SimpleQueue[Buffer | None] = queue.SimpleQueue()
        self._stopped = False
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def ask(self, span: Buffer) -> None:
        """Populates a span some time soon, and keeps it mapped until then."""
        with self._lock:
            if self._stopped:
                return
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="tiercache-prefault", daemon=True)
                self._thread.start()
        self._asked.put(span)

    def stop(self) -> None:
        """Ends after the slice in progress."""
        with self._lock:
            self._stopped = True
            thread = self._thread
        if thread is not None:
            self._asked.put(None)
            thread.join()

    def _run(self) -> None:
        while (span := self._asked.get()) is not None:
            for at in range(0, span.length, SLICE_BYTES):
                if self._stopped:
                    break
                self._populate(span.address + at, min(SLICE_BYTES, span.length - at))
            del span  # nothing may keep the memory while the thread waits
