"""Door: where the processes of a host come in to the owner of a directory; on the owner's loop."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import TYPE_CHECKING, Any

import tiercache
from tiercache.clock import system_random
from tiercache.errors import ProtocolError, UnavailableError
from tiercache.wire import sockets
from tiercache.wire.answers import Answers
from tiercache.wire.frames import Op
from tiercache.wire.hello import LINE, pack_welcome, unpack_hello
from tiercache.wire.notes import Notes
from tiercache.wire.post import Post
from tiercache.wire.served import Limits
from tiercache.wire.session import Session

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

    from tiercache.clock import Clock
    from tiercache.lease import Lease
    from tiercache.metrics import Metrics
    from tiercache.settings import Settings
    from tiercache.wire.frames import Frame
    from tiercache.wire.hello import Hello
    from tiercache.wire.served import Served
    from tiercache.wire.sockets import Peer, Watch

log = logging.getLogger(__name__)

ACCEPT_AT_ONCE = 64
STRANGERS_MAX = 1024
"""Connections that have not said HELLO; the oldest goes when there are more."""
SESSIONS_MAX = 4096
NOTES_MAX = 1 << 16
NOTE_BYTES_MAX = 64 << 20


def _nobody(pid: int, token: str, tokens: frozenset[str] | None = None) -> None:
    """Nobody wants to know."""


class Door:
    """Takes connections and makes sessions of them, one for each client: a process may be several, and its token tells
    them apart.

    `on_join(pid, token)` is called before a client is let in, `on_left(pid, token)` when everything of it has ended,
    `on_redeclared(pid, token, tokens)` when it has said what it holds from an owner before this one; `tokens` are those
    of all clients of its process, as it said, or None.
    """

    def __init__(
        self,
        cache: Served,
        *,
        settings: Settings,
        arena: bytes,
        metrics: Metrics,
        clock: Clock,
        limits: Limits | None = None,
        admit: Callable[[Peer], bool] | None = None,
        hold: Callable[[Sequence[int]], Lease | None] | None = None,
        watch: Callable[[socket.socket, asyncio.AbstractEventLoop, Callable[[], None]], Watch | None] = sockets.watch,
        on_join: Callable[[int, str], None] = _nobody,
        on_left: Callable[[int, str], None] = _nobody,
        on_redeclared: Callable[[int, str, frozenset[str] | None], None] = _nobody,
    ) -> None:
        """`hold` takes leases from before this owner's time (cache.serving.hold without); `admit` says who comes in."""
        self._metrics, self._clock = metrics, clock
        self._limits = limits or Limits.of(settings)
        self._admit = admit or (lambda peer: peer.uid in (os.geteuid(), 0))
        self._watch = watch
        self._on_join, self._on_left, self._on_redeclared = on_join, on_left, on_redeclared
        self._notes = Notes(clock, NOTES_MAX, NOTE_BYTES_MAX)
        self._answers = Answers(
            cache,
            self._notes,
            clients=self.facts,
            others=self._lines,
            hold=hold or cache.serving.hold,
            told_s=settings.owner_deadline_s,
        )
        self._welcome: dict[str, Any] = {
            "tiercache": tiercache.__version__,
            "owner": system_random().randbytes(16).hex(),
            "owner_pid": os.getpid(),
            "arena": arena.hex(),
            "settings": {row.name: row.value for row in settings.explain()},
            "durable": cache.durable,
            "entry_bytes_max": cache.serving.entry_bytes_max,
        }
        self._listener: socket.socket | None = None
        self._strangers: dict[Post, None] = {}
        self._guests: dict[Post, Session] = {}
        self._sessions: dict[str, Session] = {}
        self._beside: dict[Session, frozenset[str] | None] = {}  # as each said last of its process
        self._ending: list[Session] = []  # gone, and a thread of ours still looks at their memory
        self._closed = False

    # -- accounts ------------------------------------------------------------------------------------------------------

    @property
    def clients(self) -> int:
        """Processes that are connected, or live and hold something."""
        return len(self._sessions)

    @property
    def present(self) -> set[tuple[int, str]]:
        """Who is there: number of the process (0: of another PID namespace) and token."""
        return {(session.peer.pid, session.token) for session in self._sessions.values()}

    @property
    def pids(self) -> set[int]:
        """The numbers of their processes; 0 for those of other PID namespaces."""
        return {session.peer.pid for session in self._sessions.values()}

    def facts(self) -> list[dict[str, Any]]:
        """One row a client."""
        return [session.facts() for session in self._sessions.values()]

    def _lines(self, but: Session) -> list[Post]:
        return [one.line for one in self._sessions.values() if one is not but and one.line is not None]

    # -- coming in -----------------------------------------------------------------------------------------------------

    def serve(self, listener: socket.socket) -> None:
        """Takes connections from a listening socket, which is the door's from now on."""
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        listener.setblocking(False)
        self._loop.add_reader(listener, self._accept)

    def stop_listening(self) -> None:
        """Nobody new comes in. Idempotent."""
        listener, self._listener = self._listener, None
        if listener is not None:
            self._loop.remove_reader(listener)
            listener.close()

    def _accept(self) -> None:
        for _ in range(ACCEPT_AT_ONCE):
            if self._listener is None:
                return
            try:
                sock, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                log.warning("a connection could not be taken: %s", error)
                # The listener stays readable: without a pause the loop would do nothing else.
                self._loop.remove_reader(self._listener)
                self._loop.call_later(0.1, self._accept_again)
                return
            self._let_in(sock)

    def _accept_again(self) -> None:
        if self._listener is not None:
            self._loop.add_reader(self._listener, self._accept)

    def _let_in(self, sock: socket.socket) -> None:
        try:
            peer = sockets.peer(sock)
            if not self._admit(peer):
                log.warning("a process %d of user %d was not let in", peer.pid, peer.uid)
                sock.close()
                return
            post = Post(sock, self._loop, self._frame, self._gone)
        except OSError as error:
            log.warning("a connection broke before it stood: %s", error)
            sock.close()
            return
        self._strangers[post] = None
        if len(self._strangers) > STRANGERS_MAX:
            next(iter(self._strangers)).close("too many connections that say nothing")

    def _frame(self, post: Post, frame: Frame) -> None:
        """One message of anybody. Whatever it is, nothing is raised: at worst this connection ends."""
        session = self._guests.get(post)
        try:
            if session is None:
                self._greet(post, frame)
                return
            if session.naming and (frame.op != Op.REDECLARE or not len(frame.body)):
                session.named()
                self._on_redeclared(session.peer.pid, session.token, self._beside[session])
            self._answers.take(session, post, frame)
        except (ProtocolError, UnavailableError) as fault:
            post.fault(frame.number, fault)
            post.close(str(fault))
        except Exception as fault:  # the boundary to other processes
            self._metrics.add("tiercache_internal_errors_total")
            log.error("a message could not be dealt with; its connection ends", exc_info=fault)
            post.close("the owner could not deal with a message")

    def _greet(self, post: Post, frame: Frame) -> None:
        if frame.op != Op.HELLO or post.closed:
            raise ProtocolError("the first message on a connection is HELLO")
        hello = unpack_hello(frame.body)
        sockets.close_all(post.take_fds())
        session = self._session(post, hello)
        self._strangers.pop(post, None)
        self._guests[post] = session
        session.posts.add(post)
        if hello.role == LINE:
            if session.line is not None:
                raise ProtocolError("a process has one line")
            session.line = post
        self._beside[session] = hello.clients
        post.answer(frame.number, pack_welcome({**self._welcome, "now_s": self._clock.wall()}))

    def _session(self, post: Post, hello: Hello) -> Session:
        """The session of the process that connects, new or known."""
        session = self._sessions.get(hello.token)
        if session is not None:
            if (session.peer.pid, session.peer.uid) != (post.peer.pid, post.peer.uid):
                raise ProtocolError("this token is another process's")
            if hello.again:
                self._notes.leave(session)
                self._dismiss(session.again())
            return session
        if len(self._sessions) >= SESSIONS_MAX or self._closed:
            raise UnavailableError(f"the owner has {len(self._sessions)} clients already")
        session = Session(hello.token, post.peer, self._limits, self._metrics, self._clock.wall())
        session.may_name = hello.again
        session.watch = self._watch(post.sock, self._loop, lambda: self._end(session))
        self._on_join(post.peer.pid, hello.token)
        self._sessions[hello.token] = session
        return session

    # -- going ---------------------------------------------------------------------------------------------------------

    def _gone(self, post: Post, why: str) -> None:
        """A connection has ended."""
        self._answers.gone(post)
        self._strangers.pop(post, None)
        session = self._guests.pop(post, None)
        if session is None or session.ended:
            return
        session.leave(post)
        if session.posts:
            return
        self._notes.leave(session)
        if session.watch is None or not session.holding:
            self._end(session)
        else:
            log.info("process %d is connected no more (%s), but lives and holds memory", session.peer.pid, why)

    def _dismiss(self, posts: Sequence[Post]) -> None:
        for post in posts:
            self._guests.pop(post, None)
            post.close("the process begins anew")

    def _end(self, session: Session) -> None:
        """Everything of a process ends."""
        if session.ended:
            return
        self._dismiss(session.end())
        self._notes.leave(session)
        del self._sessions[session.token]
        self._beside.pop(session, None)
        if session.busy:
            self._ending = [one for one in self._ending if one.busy]
            self._ending.append(session)
        # Where it was just telling what it held, it has not told all: it comes again, or is dead.
        self._on_left(session.peer.pid, session.token)

    async def close(self) -> None:
        """Lets everybody go and takes nobody in. Idempotent."""
        self._closed = True
        self.stop_listening()
        for post in list(self._strangers):
            post.close()
        for session in list(self._sessions.values()):
            self._end(session)
        for session in self._ending:
            await session.settled()
