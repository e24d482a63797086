"""Worker: the one thread that calls UCX. Others hand it calls; it sleeps in the kernel while nothing moves.

A call never waits there: what takes time is begun, and looked at after each round of progress. Futures of the loop are
settled once a round, all together, because waking a loop costs more than a small move.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import threading
from collections import deque
from concurrent.futures import Future
from ctypes import byref
from typing import TYPE_CHECKING, Any

from tiercache.errors import UnavailableError
from tiercache.net.ucx import binding, serving, words
from tiercache.net.ucx.binding import CANCELED, ERRORS, IN_PROGRESS
from tiercache.net.ucx.moving import Batch, Endpoint
from tiercache.net.ucx.pulling import Landing, Pull
from tiercache.transport import NOTE_BYTES_MAX

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from tiercache.net.ucx.moving import Op
    from tiercache.net.ucx.pulling import Question
    from tiercache.net.ucx.serving import Exposed

log = logging.getLogger(__name__)

GOODBYE_ROUNDS = 10_000
"""Rounds of progress that what was cut off has to end before the worker is destroyed over it."""
MESSAGES = 0x7C
"""The number of our messages among all that a worker may hear."""


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
        self._batches: list[Batch | Pull] = []
        self._loose: list[tuple[int, object]] = []
        self._settled: list[tuple[asyncio.Future[Any] | None, Any]] = []
        self._endpoints: dict[int, Endpoint] = {}
        self._failed: list[Endpoint] = []
        self._numbers = 0
        self._signalled = self._stopping = self._closed = False
        self._lock = threading.Lock()
        """Nobody signals a worker that is being destroyed."""
        self._asks: set[Future[Any]] = set()
        self._over: asyncio.Future[None] = loop.create_future()
        self._context = self._worker = 0
        self._maps: set[int] = set()
        self._leaving: list[tuple[int, list[Batch]]] = []
        """Registrations that nobody wants any more, and who still moves bytes with them."""
        self._retired: list[Landing] = []
        self.exposed: dict[int, Exposed] = {}
        """What peers may ask for, by serial number."""
        self._on_error = binding.ON_ERROR(self._failing)
        self._on_message = binding.ON_MESSAGE(self._heard)
        self.address = b""
        self._thread = threading.Thread(target=self._run, name="tiercache-ucx", daemon=True)
        opened = self._asking(self._open)
        try:
            self._thread.start()
        except RuntimeError as error:
            raise UnavailableError(f"UCX: {error}") from error
        opened.result()

    # On the loop.

    def submit(self, call: Callable[[], Any]) -> None:
        """Has the thread do this soon, where it still runs. From any thread."""
        with self._lock:
            if self._closed:
                return
            self._calls.append(call)
            if not self._signalled and self._worker:
                self._signalled = True
                self._library.quick.ucp_worker_signal(self._worker)

    def ask(self, call: Callable[[], Any]) -> Any:
        """Has the thread do this now, and waits for its answer. From any thread; raises UnavailableError where the
        worker is closed."""
        return self._asking(call).result()

    def _asking(self, call: Callable[[], Any]) -> Future[Any]:
        answer: Future[Any] = Future()

        def answering() -> None:
            self._asks.discard(answer)
            try:
                answer.set_result(call())
            except Exception as fault:  # noqa: BLE001 (it is raised where it was asked)
                answer.set_exception(fault)

        self._asks.add(answer)
        self.submit(answering)
        if self._closed:  # nobody is there to do it
            self._refuse()
        return answer

    def _refuse(self) -> None:
        """Answers whoever asked and is not heard any more."""
        with self._lock:
            asks, self._asks = self._asks, set()
        for answer in asks:
            answer.set_exception(UnavailableError("UCX: the transport is closed"))

    def connect(self, address: bytes, token: bytes) -> Endpoint:
        """Begins an endpoint; its future has the names of its transports once the other end has answered."""
        self._numbers += 1
        found = Endpoint(self._numbers, token, self._loop)
        hello = words.pack_message(words.HELLO, token, found.number, self._token)

        def begin() -> None:
            self._endpoints[found.number] = found
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

    def pull(self, endpoint: Endpoint, questions: Sequence[Question], keep: object) -> Pull:
        """Begins to ask for what is to be read. `keep` is held until that is over."""
        pull = Pull(endpoint, questions, self._loop.create_future(), self._question, keep)

        def begin() -> None:
            endpoint.batches += 1
            self._batches.append(pull)
            if endpoint.landing is None and not endpoint.status:
                try:
                    endpoint.landing = Landing(self._expose_landing)
                except (OSError, UnavailableError):
                    self._end(endpoint, binding.NO_MEMORY)

        self.submit(begin)
        return pull

    def note(self, endpoint: Endpoint, note: bytes) -> Batch:
        """Sends a note; over when it is on its way."""
        header = words.pack_message(words.NOTE, endpoint.token, endpoint.number, self._token)
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
        """Ends what `map_memory` began, and waits for it, unless bytes from or to there are under way here: then it
        ends behind them."""

        def unmapped() -> None:
            using = [batch for batch in self._batches if isinstance(batch, Batch) and batch.uses(handle)]
            self._leaving.append((handle, using))
            self._unmap_left()

        self.ask(unmapped)

    async def stop(self) -> None:
        """Ends every endpoint and the thread, and waits for it; nothing is read or written afterwards."""

        def stopping() -> None:
            self._stopping = True

        self.submit(stopping)
        await asyncio.wait([self._over])
        self._thread.join()

    # On the thread.

    def _open(self) -> None:
        self._context = binding.context(self._library, self._options)
        self._worker = binding.worker(self._library, self._context)
        binding.listen(self._library, self._worker, MESSAGES, self._on_message)
        self.address = binding.worker_address(self._library, self._worker)

    def _run(self) -> None:
        library = self._library.calls
        progress, wait = library.ucp_worker_progress, library.ucp_worker_wait
        self._do(self._calls.popleft())
        while self.address and not self._stopping:
            self._signalled = False
            while self._calls:
                self._do(self._calls.popleft())
            moved = progress(self._worker)
            self._round()
            if not moved and not self._calls and not self._stopping:
                wait(self._worker)
        self._goodbye()
        self._close()

    def _do(self, call: Callable[[], Any]) -> None:
        """One call; a fault of it is not the end of all others."""
        try:
            call()
        except Exception:
            log.exception("a call of the UCX thread failed")

    def _round(self) -> None:
        """Takes from UCX what has ended, and tells."""
        while self._failed:
            self._end(self._failed[0], self._failed[0].status)
            del self._failed[0]
        if self._batches:
            self._batches = [batch for batch in self._batches if not self._step(batch)]
            if self._leaving:
                self._unmap_left()
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
                self._loop.call_soon(self._notified, answer)  # should it raise, the others are told all the same
            elif future.done():
                continue
            elif isinstance(answer, Exception):
                future.set_exception(answer)
                future.exception()  # nobody may wait for it
            else:
                future.set_result(answer)

    def _step(self, batch: Batch | Pull) -> bool:
        try:
            answer = batch.step(self._library)
        except Exception:
            log.exception("a batch of the UCX thread failed")
            answer = binding.NO_MEMORY
        if answer is None:
            return False
        endpoint = batch.endpoint
        endpoint.batches -= 1
        if isinstance(answer, int) and not batch.cut:
            self._end(endpoint, answer)
        if batch.told is not None:
            batch.told(answer)
        elif isinstance(answer, int):
            self._settled.append((batch.future, UnavailableError(f"the peer is gone (status {answer})")))
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
            if endpoint.landing is not None:
                self._retire(endpoint.landing)
                endpoint.landing = None

    def _unmap_left(self) -> None:
        """Lets go of registrations that nobody uses any more."""
        leaving, self._leaving = self._leaving, []
        for handle, using in leaving:
            if any(batch in self._batches for batch in using):
                self._leaving.append((handle, using))
            else:
                self._maps.discard(handle)
                self._library.calls.ucp_mem_unmap(self._context, handle)

    def _retire(self, landing: Landing) -> None:
        """Lets a landing go, or keeps its address where the other end may still write there."""
        self._maps.discard(landing.handle)
        self._library.calls.ucp_mem_unmap(self._context, landing.handle)
        if not landing.leave():
            self._retired.append(landing)

    def _expose_landing(self, address: int, length: int) -> tuple[int, bytes]:
        handle, key = binding.map_memory(self._library, self._context, address, length, 0)
        self._maps.add(handle)
        facts = (self._library.version[:2], self._token, 0, address, length, True, key)
        return handle, words.pack_descriptor(words.Descriptor(*facts))

    def _question(self, endpoint: Endpoint, body: bytes) -> int | None:
        return self._say(endpoint, words.QUESTION, endpoint.number, body)

    def _say(self, endpoint: Endpoint, kind: int, number: int, body: bytes) -> int | None:
        """Sends a message; UCX's answer, or the status of an endpoint that is gone."""
        if not endpoint.pointer:
            return (1 << 64) + (endpoint.status or CANCELED)
        header = words.pack_message(kind, endpoint.token, number, self._token)
        request = self._message(endpoint.pointer, header, body, binding.EAGER)
        self._loosen(request, (header, body))
        return request

    def _asked(self, sender: bytes, number: int, body: bytes, again: bool = True) -> None:
        """The other end asks for bytes: they are put into its landing, and it is told."""
        links = reversed(self._endpoints.values())  # the last one first: it may have come in place of others
        endpoint = next((each for each in links if each.token == sender and not each.status), None)
        if endpoint is not None and not endpoint.pointer and again:  # it is in the queue
            self._calls.append(lambda: self._asked(sender, number, body, again=False))
            return
        if endpoint is None or not endpoint.pointer or endpoint.serving >= serving.QUESTIONS_MAX:
            return
        answer = serving.answer(endpoint, body, self.exposed)
        if answer is None:
            return

        def over(missed: set[int] | int) -> None:
            endpoint.serving -= 1
            if not isinstance(missed, int):
                self._say(endpoint, words.ANSWER, number, answer.outcomes(missed))

        endpoint.serving += 1
        endpoint.batches += 1
        batch = Batch(endpoint, answer.ops, self._loop.create_future(), True, answer)
        batch.told = over
        self._batches.append(batch)

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
        elif kind == words.QUESTION:
            self._asked(sender, number, ctypes.string_at(body, length))
        elif kind == words.ANSWER:
            self._answered(sender, number, ctypes.string_at(body, length))
        return 0

    def _answered(self, sender: bytes, number: int, body: bytes) -> None:
        endpoint = self._endpoints.get(number)
        if endpoint is None or endpoint.token != sender or not body:
            return
        pull = endpoint.pulls.pop(body[0], None)
        if pull is not None and not endpoint.status:
            pull.answered(body[0], body[1:])

    def _goodbye(self) -> None:
        for endpoint in list(self._endpoints.values()):
            self._end(endpoint, CANCELED)
        for _ in range(GOODBYE_ROUNDS):
            if not self._batches and not self._loose:
                break
            self._library.quick.ucp_worker_progress(self._worker)
            self._round()

    def _close(self) -> None:
        with self._lock:
            self._closed = True
        for handle in self._maps:
            self._library.calls.ucp_mem_unmap(self._context, handle)
        if self._worker:
            self._library.calls.ucp_worker_destroy(self._worker)
        if self._context:
            self._library.calls.ucp_cleanup(self._context)
        self._worker = self._context = 0
        for batch in self._batches:
            self._settled.append((batch.future, UnavailableError("the transport was closed")))
        self._batches, self._loose, self._retired, self._leaving = [], [], [], []
        self._settled.append((self._over, None))
        self._round()
        self._calls.clear()
        self._refuse()
