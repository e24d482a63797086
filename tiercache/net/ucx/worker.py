"""Worker: the one thread that calls UCX. Others hand it calls; it sleeps in the kernel while nothing moves.

A call never waits there: what takes time is begun, and looked at after each round of progress. Futures of the loop are
settled once a round, all together, because waking a loop costs more than a small move.
"""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from ctypes import byref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from tiercache.errors import UnavailableError
from tiercache.net.ucx import binding, words
from tiercache.net.ucx.binding import CANCELED, ERRORS, IN_PROGRESS
from tiercache.transport import NOTE_BYTES_MAX

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Mapping, Sequence

WINDOW = 32
"""Operations of one batch that are under way at once."""
GOODBYE_ROUNDS = 10_000
"""Rounds of progress that what was cut off has to end before the worker is destroyed over it."""
MESSAGES = 0x7C
"""The number of our messages among all that a worker may hear."""


@dataclass(slots=True)
class Region:
    """Memory of the other end, as a link knows it."""

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

    def __init__(self, number: int, loop: asyncio.AbstractEventLoop) -> None:
        self.number = number
        self.opened: asyncio.Future[list[str]] = loop.create_future()
        """The names of its transports, once the other end has answered."""
        self.over: asyncio.Future[None] = loop.create_future()
        """Done when it has ended, and nothing is under way on it."""
        self.pointer = 0
        self.status = 0
        """What it died of; 0 while it lives."""
        self.batches = 0
        self.regions: list[Region] = []


class Batch:
    """Operations of one call, at most a window of them under way; then a flush where the other end is to see them."""

    def __init__(
        self, endpoint: Endpoint, ops: Sequence[Op], future: asyncio.Future[set[int]], put: bool, keep: object
    ) -> None:
        self.endpoint, self.future, self.keep = endpoint, future, keep
        self._ops, self._put, self._next = ops, put, 0
        self._flushes = put
        self._under_way: deque[int] = deque()
        self._missed: set[int] = set()
        self._fault = 0
        self.cut = False
        """Whether whoever asked has left: nothing more is begun."""

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
                self.take(quick.ucp_ep_flush_nbx(self.endpoint.pointer, byref(binding.RequestParams())))
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
        call = library.quick.ucp_put_nbx if self._put else library.quick.ucp_get_nbx
        self.take(call(self.endpoint.pointer, op.address, op.size, op.remote, region.remote_key, byref(op.params)))

    def take(self, request: int | None) -> None:
        """Counts what UCX answered when an operation was begun."""
        if request is None:
            return
        if request >= ERRORS:
            self._fault = self._fault or request - (1 << 64)
        else:
            self._under_way.append(request)


class Worker:
    """A ucp_worker with its thread."""

    def __init__(
        self,
        library: binding.Library,
        options: Mapping[str, str],
        loop: asyncio.AbstractEventLoop,
        notified: Callable[[bytes], None],
        token: bytes,
    ) -> None:
        self._library, self._options, self._loop, self._notified = library, options, loop, notified
        self._token = token
        self._calls: deque[Callable[[], None]] = deque()
        self._batches: list[Batch] = []
        self._loose: list[tuple[int, object]] = []
        self._settled: list[tuple[asyncio.Future[Any] | None, Any]] = []
        self._endpoints: dict[int, Endpoint] = {}
        self._failed: list[Endpoint] = []
        self._numbers = 0
        self._signalled = self._stopping = False
        self._context = self._worker = 0
        self._maps: set[int] = set()
        self._on_error = binding.ON_ERROR(self._failing)
        self._on_message = binding.ON_MESSAGE(self._heard)
        self.address = b""
        self._thread = threading.Thread(target=self._run, name="tiercache-ucx", daemon=True)
        self._ask(self._thread.start, self._open)

    # On the loop.

    def submit(self, call: Callable[[], None]) -> None:
        """Has the thread do this soon."""
        self._calls.append(call)
        if not self._signalled and self._worker:
            self._signalled = True
            self._library.quick.ucp_worker_signal(self._worker)

    def ask(self, call: Callable[[], Any]) -> Any:
        """Has the thread do this now, and waits for its answer."""
        return self._ask(lambda: None, call)

    def _ask(self, first: Callable[[], None], call: Callable[[], Any]) -> Any:
        answer: list[Any] = []
        done = threading.Event()

        def answering() -> None:
            try:
                answer.append(call())
            except Exception as fault:  # noqa: BLE001 (it is raised where it was asked)
                answer.append(fault)
            done.set()

        self.submit(answering)
        first()
        done.wait()
        if isinstance(answer[0], Exception):
            raise answer[0]
        return answer[0]

    def connect(self, address: bytes, token: bytes) -> Endpoint:
        """Begins an endpoint; its future has the names of its transports once the other end has answered."""
        self._numbers += 1
        found = self._endpoints[self._numbers] = Endpoint(self._numbers, self._loop)
        hello = words.pack_message(words.HELLO, token, found.number, self._token)

        def begin() -> None:
            if found.status:  # given up meanwhile
                return
            try:
                found.pointer = binding.endpoint(self._library, self._worker, address, self._on_error, found.number)
            except UnavailableError:
                self._end(found, CANCELED)
                return
            request = self._message(found.pointer, hello, b"", binding.REPLY | binding.EAGER)
            self._loosen(request, hello)
            if request is not None and request >= ERRORS:
                self._end(found, request - (1 << 64))

        self.submit(begin)
        return found

    def move(self, endpoint: Endpoint, ops: Sequence[Op], put: bool, keep: object) -> Batch:
        """Begins a batch. `keep` is held until it is over."""
        batch = Batch(endpoint, ops, self._loop.create_future(), put, keep)

        def begin() -> None:
            endpoint.batches += 1
            self._batches.append(batch)

        self.submit(begin)
        return batch

    def note(self, endpoint: Endpoint, token: bytes, note: bytes) -> Batch:
        """Sends a note; over when it is on its way."""
        header = words.pack_message(words.NOTE, token, endpoint.number, self._token)
        batch = Batch(endpoint, (), self._loop.create_future(), False, None)

        def begin() -> None:
            endpoint.batches += 1
            self._batches.append(batch)
            if not endpoint.status:
                batch.keep = (header, note)
                batch.take(self._message(endpoint.pointer, header, note, binding.EAGER))

        self.submit(begin)
        return batch

    def end(self, endpoint: Endpoint) -> None:
        """Ends an endpoint by force; what is under way on it fails soon."""
        self.submit(lambda: self._end(endpoint, CANCELED))

    def map_memory(self, address: int, length: int, memory_type: int) -> tuple[int, bytes]:
        """Registers memory: its handle, for `unmap`, and its remote key."""

        def mapped() -> tuple[int, bytes]:
            found = binding.map_memory(self._library, self._context, address, length, memory_type)
            self._maps.add(found[0])
            return found

        answer: tuple[int, bytes] = self.ask(mapped)
        return answer

    def unmap(self, handle: int) -> None:
        """Ends what `map_memory` began, and waits for it."""

        def unmapped() -> None:
            self._maps.discard(handle)
            self._library.calls.ucp_mem_unmap(self._context, handle)

        self.ask(unmapped)

    def stop(self) -> None:
        """Ends every endpoint and the thread, and waits for it; nothing is read or written afterwards."""

        def stopping() -> None:
            self._stopping = True

        if self._thread.is_alive():
            self.submit(stopping)
            self._thread.join()

    # On the thread.

    def _open(self) -> None:
        self._context = binding.context(self._library, self._options)
        self._worker = binding.worker(self._library, self._context)
        binding.listen(self._library, self._worker, MESSAGES, self._on_message)
        self.address = binding.worker_address(self._library, self._worker)

    def _run(self) -> None:
        calls, library = self._calls, self._library.calls
        progress, wait = library.ucp_worker_progress, library.ucp_worker_wait
        calls.popleft()()
        if not self._worker:
            self._close()
            return
        while not self._stopping:
            self._signalled = False
            while calls:
                calls.popleft()()
            moved = progress(self._worker)
            self._round()
            if not moved and not calls and not self._stopping:
                wait(self._worker)
        self._goodbye()
        self._close()

    def _round(self) -> None:
        """Takes from UCX what has ended, and tells."""
        while self._failed:
            self._end(self._failed[0], self._failed[0].status)
            del self._failed[0]
        if self._batches:
            self._batches = [batch for batch in self._batches if not self._step(batch)]
        if self._loose:
            self._loose = [each for each in self._loose if not self._freed(each[0])]
        if self._settled:
            settled, self._settled = self._settled, []
            try:
                self._loop.call_soon_threadsafe(self._tell, settled)
            except RuntimeError:  # the loop is closed: nobody waits any more
                return

    def _tell(self, settled: list[tuple[asyncio.Future[Any] | None, Any]]) -> None:
        for future, answer in settled:
            if future is None:
                self._notified(answer)
            elif future.done():
                continue
            elif isinstance(answer, Exception):
                future.set_exception(answer)
                future.exception()  # nobody may wait for it
            else:
                future.set_result(answer)

    def _step(self, batch: Batch) -> bool:
        answer = batch.step(self._library)
        if answer is None:
            return False
        endpoint = batch.endpoint
        endpoint.batches -= 1
        if isinstance(answer, int):
            if not batch.cut:
                self._end(endpoint, answer)
            self._settled.append((batch.future, UnavailableError(f"UCX: the peer is gone (status {answer})")))
        else:
            self._settled.append((batch.future, answer))
        self._forget(endpoint)
        return True

    def _end(self, endpoint: Endpoint, status: int) -> None:
        endpoint.status = endpoint.status or status or CANCELED
        if endpoint.pointer:
            params = binding.RequestParams(op_attr_mask=binding.FLAGS_SET, flags=binding.FORCE)
            self._loosen(self._library.quick.ucp_ep_close_nbx(endpoint.pointer, byref(params)), None)
            endpoint.pointer = 0
        if not endpoint.opened.done():
            self._settled.append((endpoint.opened, UnavailableError(f"UCX: no peer (status {endpoint.status})")))
        self._forget(endpoint)

    def _forget(self, endpoint: Endpoint) -> None:
        """Gives back what hangs on an endpoint that has ended, once nothing is under way on it."""
        if endpoint.status and not endpoint.batches:
            self._endpoints.pop(endpoint.number, None)
            self._settled.append((endpoint.over, None))
            for region in endpoint.regions:
                if region.remote_key:
                    self._library.quick.ucp_rkey_destroy(region.remote_key)
            endpoint.regions.clear()

    def _send(self, pointer: int, header: bytes, body: bytes, flags: int) -> None:
        self._loosen(self._message(pointer, header, body, flags), (header, body))

    def _message(self, pointer: int, header: bytes, body: bytes, flags: int) -> int | None:
        params = binding.RequestParams(op_attr_mask=binding.FLAGS_SET, flags=flags)
        send = self._library.quick.ucp_am_send_nbx
        request: int | None = send(pointer, MESSAGES, header, len(header), body, len(body), byref(params))
        return request

    def _loosen(self, request: int | None, keep: object) -> None:
        """Has a request that nobody waits for freed when it has ended; `keep` is held until then."""
        if request is not None and request < ERRORS:
            self._loose.append((request, keep))

    def _freed(self, request: int) -> bool:
        if self._library.quick.ucp_request_check_status(request) == IN_PROGRESS:
            return False
        self._library.quick.ucp_request_free(request)
        return True

    def _failing(self, argument: int | None, pointer: int, status: int) -> None:
        """UCX tells that a peer is gone."""
        endpoint = self._endpoints.get(argument or 0)
        if endpoint is not None:
            endpoint.status = endpoint.status or status
            self._failed.append(endpoint)

    def _heard(self, argument: Any, header: int, size: int, body: int, length: int, arrival: Any) -> int:
        """UCX brings a message. Whatever it says, nothing is raised through UCX."""
        attributes, reply = arrival.contents.attributes, arrival.contents.reply
        if size != words.MESSAGE_BYTES or length > NOTE_BYTES_MAX or attributes & binding.RENDEZVOUS:
            return 0
        kind, token, number, sender = words.unpack_message(ctypes.string_at(header, size))
        if token != self._token:
            return 0
        if kind == words.HELLO and attributes & binding.GIVES_REPLY and reply:
            self._send(reply, words.pack_message(words.WELCOME, sender, number, self._token), b"", binding.EAGER)
        elif kind == words.WELCOME:
            endpoint = self._endpoints.get(number)
            if endpoint is not None and endpoint.pointer:
                self._settled.append((endpoint.opened, binding.transports(self._library, endpoint.pointer)))
        elif kind == words.NOTE:
            self._settled.append((None, ctypes.string_at(body, length)))
        return 0

    def _goodbye(self) -> None:
        for endpoint in list(self._endpoints.values()):
            self._end(endpoint, CANCELED)
        for _ in range(GOODBYE_ROUNDS):
            if not self._batches and not self._loose:
                break
            self._library.quick.ucp_worker_progress(self._worker)
            self._round()

    def _close(self) -> None:
        for handle in self._maps:
            self._library.calls.ucp_mem_unmap(self._context, handle)
        if self._worker:
            self._library.calls.ucp_worker_destroy(self._worker)
        if self._context:
            self._library.calls.ucp_cleanup(self._context)
        self._worker = self._context = 0
        for batch in self._batches:
            self._settled.append((batch.future, UnavailableError("UCX: closed")))
        self._batches = []
        self._round()
