"""Moving: puts and gets of one batch, a window of them at a time, and the endpoint that they take."""

from __future__ import annotations

from collections import deque
from ctypes import byref
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from tiercache.net.ucx import binding
from tiercache.net.ucx.binding import CANCELED, ERRORS, IN_PROGRESS

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Sequence

    from tiercache.net.ucx.pulling import Landing, Pull

WINDOW = 32
"""Operations of one batch that are under way at once."""


@dataclass(slots=True)
class Region:
    """Memory of the other end, as a link knows it."""

    serial: int
    base: int
    length: int
    writable: bool
    key: bytes
    remote_key: int = -1
    """Its ucp_rkey, once it was needed; 0 where UCX does not take the key."""


class Op(NamedTuple):
    """One put or get."""

    move: int
    """Which move of the batch it is of."""
    address: int
    """Of the bytes, or of a list of spans."""
    size: int
    """Bytes, or spans."""
    remote: int
    region: Region
    params: binding.RequestParams


class Endpoint:
    """A ucp_ep and what hangs on it. The thread's, but for `status`, which the loop reads."""

    def __init__(self, number: int, token: bytes, loop: asyncio.AbstractEventLoop) -> None:
        self.number, self.token = number, token
        self.opened: asyncio.Future[list[str]] = loop.create_future()
        """The names of its transports, once the other end has answered."""
        self.over: asyncio.Future[None] = loop.create_future()
        """Done when it has ended, and nothing is under way on it."""
        self.pointer = 0
        self.status = 0
        """What it died of; 0 while it lives."""
        self.batches = 0
        self.regions: list[Region] = []
        self.landing: Landing | None = None
        """Where the other end puts what is read from it, where that is how it is read."""
        self.landings: dict[bytes, Region] = {}
        """Those of the other end, by descriptor."""
        self.pulls: dict[int, Pull] = {}
        """What is asked for with each slot of the landing."""
        self.serving = 0
        """Questions of the other end that are being answered."""


class Batch:
    """Operations of one call, at most a window of them under way; then a flush where the other end is to see them."""

    def __init__(
        self, endpoint: Endpoint, ops: Sequence[Op], future: asyncio.Future[set[int]], put: bool, keep: object
    ) -> None:
        """`keep` is held until it is over."""
        self.endpoint, self.future, self.keep = endpoint, future, keep
        self.told: Callable[[set[int] | int], None] | None = None
        """Who is told of the end on the thread, if anybody."""
        self._ops, self._put, self._next = ops, put, 0
        self._flushes = put
        self._under_way: deque[int] = deque()
        self._missed: set[int] = set()
        self._fault = 0
        self.cut = False
        """Whether whoever asked has left: nothing more is begun."""

    def uses(self, handle: int) -> bool:
        """Whether an operation of it names this registration of local memory."""
        return any(op.params.memh == handle for op in self._ops)

    def step(self, library: binding.Library) -> set[int] | int | None:
        """Takes what has ended, begins what has room. The moves that missed once all is over, or the status of the
        fault; None before that."""
        quick, under_way = library.quick, self._under_way
        while True:
            while under_way:
                status = quick.ucp_request_check_status(under_way[0])
                if status == IN_PROGRESS:
                    break
                quick.ucp_request_free(under_way.popleft())
                self._fault = self._fault or min(status, 0)
            stopped = self._fault or self.endpoint.status or (CANCELED if self.cut else 0)
            if not stopped and self._next < len(self._ops):
                if len(under_way) >= WINDOW:
                    return None
                self._begin(library, self._ops[self._next])
                self._next += 1
            elif under_way:
                return None
            elif stopped:
                return stopped
            elif self._flushes:
                self._flushes = False
                self.take(library.calls.ucp_ep_flush_nbx(self.endpoint.pointer, byref(binding.RequestParams())))
            else:
                return self._missed

    def _begin(self, library: binding.Library, op: Op) -> None:
        region = op.region
        if region.remote_key < 0:
            region.remote_key = binding.unpack_key(library, self.endpoint.pointer, region.key)
            self.endpoint.regions.append(region)
        if not region.remote_key:
            self._missed.add(op.move)
            return
        call = library.calls.ucp_put_nbx if self._put else library.calls.ucp_get_nbx
        self.take(call(self.endpoint.pointer, op.address, op.size, op.remote, region.remote_key, byref(op.params)))

    def take(self, request: int | None) -> None:
        """Counts what UCX answered when an operation was begun."""
        if request is None:
            return
        if request >= ERRORS:
            self._fault = self._fault or request - (1 << 64)
        else:
            self._under_way.append(request)
