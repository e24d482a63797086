"""Session: what one client process has of an owner: its connections, leases, puts, loads and open questions.

A session ends when its process is dead, and then everything of it ends, once, in whatever order things come. A process
that lives without a connection keeps what it may still look at or write to: the owner cannot know what it does with the
memory that it has mapped. Where the system cannot tell whether a process lives, its last connection speaks for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from typing import TYPE_CHECKING, NamedTuple, cast

from tiercache.errors import AbandonedLoad, ConfigError, ProtocolError, TierCacheError, UnavailableError
from tiercache.model import Outcome
from tiercache.threads import in_thread
from tiercache.wire.fills import INLINE_BYTES_MAX, Loads, OwnFault
from tiercache.wire.frames import pack_grants

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence

    from tiercache.lease import Gap, Landed, Lease, Load, PageRun
    from tiercache.metrics import Metrics
    from tiercache.wire.frames import Landed as Said
    from tiercache.wire.post import Post
    from tiercache.wire.served import JointTicket, Limits, Ticket
    from tiercache.wire.sockets import Peer, Watch

log = logging.getLogger(__name__)

EARLY_MAX = 1024
ENDED_MAX = 16
"""A ticket of more blocks is ended bit by bit, so that others are answered in between."""
LAST, DURABLE = 1, 2
"""Flags of COMMIT."""


class _Held(NamedTuple):
    lease: Lease
    size: int


class _Put:
    """A ticket, of a RESERVE or of a JOIN, and who works on it."""

    __slots__ = ("end", "ended", "joint", "many", "over", "size", "turn", "whole")

    def __init__(self, ticket: Ticket | JointTicket, size: int, *, joint: bool) -> None:
        self.size, self.end = size, ticket.end
        self.whole = cast("Ticket", None if joint else ticket)
        self.joint = cast("JointTicket", ticket if joint else None)
        self.many = joint and len(ticket.outcomes) > ENDED_MAX
        self.turn = asyncio.Lock()
        self.over = self.ended = False


class _Question(NamedTuple):
    """One that waits for its lane."""

    post: Post
    number: int
    work: Callable[[], Awaitable[bytes]]
    size: int


class _Asked:
    """Numbers, chosen by the client, of what it asks for. One that was given up before its question was answered, or
    even before it was asked, is given up when it comes: connections overtake each other."""

    __slots__ = ("_early", "_open")

    def __init__(self) -> None:
        self._open: dict[int, bool] = {}  # numbers of open questions -> given up already
        self._early: dict[int, None] = {}

    def __contains__(self, number: int) -> bool:
        return number in self._open

    def begin(self, number: int) -> None:
        """A question is open."""
        self._open[number] = number in self._early

    def end(self, number: int) -> bool:
        """It is answered, or will not be: whether the client has given it up. Harmless when it has ended."""
        return self._open.pop(number, False)

    def give_up(self, number: int) -> None:
        """The client does not want what it asks for, or will ask for."""
        if number in self._open:
            self._open[number] = True
            return
        self._early[number] = None
        if len(self._early) > EARLY_MAX:
            del self._early[next(iter(self._early))]

    def clear(self) -> None:
        """No question is open any more."""
        self._open.clear()


class _Lane:
    """Questions of one kind: those that wait for another client must not hold up what that client asks."""

    __slots__ = ("busy", "waiting")

    def __init__(self) -> None:
        self.busy = 0
        self.waiting: deque[_Question] = deque()


class Session:
    """See the module. On the owner's loop."""

    def __init__(self, token: str, peer: Peer, limits: Limits, metrics: Metrics, since: float) -> None:
        self.token, self.peer, self.limits, self.since = token, peer, limits, since
        self.posts: set[Post] = set()
        self.line: Post | None = None
        self.watch: Watch | None = None
        self.ended = False
        self.loads = Loads(limits.fill_s, limits.silent_s)
        self.pinned_bytes = 0
        self.unnamed: set[int] | None = None
        """Leases of before this process came again that it has not named since."""
        self.naming = False
        """Whether it is just telling what it held before."""
        self.may_name = False
        """Whether it may tell that: it comes from an owner before this one, or begins anew."""
        self._metrics = metrics
        self._leases: dict[int, _Held] = {}
        self._asked, self._asked_puts = _Asked(), _Asked()
        self._puts: dict[int, _Put] = {}
        self._lanes: dict[str, _Lane] = {}
        self._waiting = self._waiting_bytes = 0
        self._tasks: dict[asyncio.Task[None], Post] = {}
        self.endings: set[asyncio.Task[None]] = set()
        """Tickets of many blocks on their way out."""

    # -- accounts ------------------------------------------------------------------------------------------------------

    @property
    def holding(self) -> bool:
        """Whether it may look at memory, or write to it."""
        return bool(self._leases or self._puts or len(self.loads))

    @property
    def room_bytes(self) -> int:
        """What it may pin beyond what it has."""
        return self.limits.pinned_bytes - self.pinned_bytes - self.loads.forsaken_bytes

    def facts(self) -> dict[str, int | float | str]:
        """One row of the list of clients."""
        return {
            "pid": self.peer.pid,
            "uid": self.peer.uid,
            "since": self.since,
            "connections": len(self.posts),
            "leases": len(self._leases),
            "pinned_bytes": self.pinned_bytes + self.loads.forsaken_bytes,
            "fills": len(self.loads),
            "tickets": len(self._puts),
            "questions": len(self._tasks) + self._waiting,
        }

    # -- leases --------------------------------------------------------------------------------------------------------

    def ask_lease(self, number: int) -> None:
        """A question for a lease is open. Raises ProtocolError where that number is in use."""
        if number in self._leases or number in self._asked:
            raise ProtocolError(f"lease {number} is in use")
        self._asked.begin(number)

    def unask_lease(self, number: int) -> None:
        """The question was answered otherwise. Harmless after `grant`."""
        self._asked.end(number)

    def grant(self, number: int, lease: Lease | None, count: int, otherwise: Outcome = Outcome.MISS) -> bytes:
        """The answer to a question for a lease on `count` items: held from now on, if anything in it is a HIT."""
        released = self._asked.end(number)
        if lease is None:
            return pack_grants([otherwise] * count, [-1] * count)
        locations = lease.locations
        if Outcome.HIT not in lease.outcomes:
            answer = pack_grants(lease.outcomes, locations)
            lease.release()
            return answer
        size = lease.held_bytes
        if self.ended or released or size > self.room_bytes or len(self._leases) >= self.limits.leases:
            count = len(lease.outcomes)
            lease.release()
            return pack_grants([Outcome.BUSY] * count, [-1] * count)
        self._leases[number] = _Held(lease, size)
        self.pinned_bytes += size
        return pack_grants(lease.outcomes, locations)

    def release(self, numbers: Iterable[int]) -> None:
        """RELEASE; unknown numbers are ignored, those that are being asked for are released when they come."""
        for number in numbers:
            held = self._leases.pop(number, None)
            if held is not None:
                self.pinned_bytes -= held.size
                held.lease.release()
            else:
                self._asked.give_up(number)

    def redeclare(self, number: int, locations: Sequence[int], hold: Callable[[Sequence[int]], Lease | None]) -> bool:
        """A lease that this process has from before; True if it is held. The quota of bytes does not matter here: it
        has it. Raises ProtocolError where there is nothing from before."""
        if not self.may_name:
            raise ProtocolError("only a process that comes again says what it has from before")
        known = self._leases.get(number)
        if known is not None:
            same = [at for at in known.lease.locations if at >= 0] == list(locations)
            if same and self.unnamed is not None:
                self.unnamed.discard(number)
            return same
        lease = hold(locations) if len(self._leases) < self.limits.leases else None
        if lease is None:
            return False
        self._leases[number] = _Held(lease, lease.held_bytes)
        self.pinned_bytes += self._leases[number].size
        return True

    def named(self) -> None:
        """It has told what it held: what it did not name was granted to nobody."""
        self.naming = self.may_name = False
        unnamed, self.unnamed = self.unnamed, None
        self.release(unnamed or ())

    # -- loads ---------------------------------------------------------------------------------------------------------

    async def read(
        self, post: Post, number: int, run: PageRun, read: Callable[[Load], Awaitable[Lease]]
    ) -> Lease | None:
        """A READ: what `read` must load is loaded by the asker. Raises OwnFault where the asker knows that it failed;
        None where it took too long, or did not write what it said."""
        task = asyncio.current_task()
        assert task is not None
        failed: BaseException | None = None
        over = False

        async def load(gaps: Sequence[Gap], landed: Landed) -> None:
            nonlocal failed
            if failed is not None or over:  # a client whose load failed, or that had its answer, is not asked again
                raise AbandonedLoad("the load has failed")
            try:
                await self.loads.fill(post, number, run, gaps, landed)
            except TierCacheError as fault:
                failed = fault
                task.cancel()  # or it would load again before those who wait, who may have more luck
                raise

        try:
            return await read(load)
        except asyncio.CancelledError:
            if failed is None:
                raise
            if isinstance(failed, OwnFault):
                raise UnavailableError(str(failed)) from None
            return None
        finally:
            over = True

    # -- puts ----------------------------------------------------------------------------------------------------------

    @property
    def may_put(self) -> bool:
        """Whether it may have one more ticket."""
        return len(self._puts) < self.limits.tickets

    def ask_put(self, number: int) -> None:
        """A question for a ticket is open. Raises ProtocolError where that number is in use, or 0."""
        if not number or number in self._puts or number in self._asked_puts:
            raise ProtocolError(f"ticket {number} is in use, or none")
        self._asked_puts.begin(number)

    def unask_put(self, number: int) -> None:
        """The question was answered otherwise. Harmless after `begin_put`."""
        self._asked_puts.end(number)

    def begin_put(self, number: int, ticket: Ticket | JointTicket, size: int, *, joint: bool = False) -> None:
        """A ticket is the client's; `size` bytes are its extents. One that it has given up by now ends at once.
        `joint`: others may fill the same entries."""
        self._puts[number] = _Put(ticket, size, joint=joint)
        self.pinned_bytes += size
        if self._asked_puts.end(number) or self.ended:
            self.end_put(number)

    def commit_small(self, number: int, landed: Sequence[Said], flags: int) -> list[Outcome] | None:
        """COMMIT of little, at once; None where it must wait or takes long."""
        put = self._put(number)
        if put.whole is None:
            raise ProtocolError(f"the ticket {number} is of a JOIN: LAND, do not COMMIT")
        if put.turn.locked() or flags & DURABLE or put.size > INLINE_BYTES_MAX:
            return None
        try:
            return put.whole.commit(landed)
        finally:
            if flags & LAST:
                self.end_put(number)

    async def commit(self, number: int, landed: Sequence[Said], flags: int) -> list[Outcome]:
        """COMMIT."""
        put = self._put(number)
        try:
            async with put.turn:
                if put.over:
                    raise ConfigError(f"the put {number} has ended")
                outcomes = await in_thread(put.whole.commit, landed)
                return await put.whole.save(outcomes) if flags & DURABLE else outcomes
        finally:
            if put.over:
                self._end(put)
            elif flags & LAST:
                self.end_put(number)

    def joint(self, number: int) -> JointTicket:
        """A living ticket of a JOIN. Raises ConfigError where there is none, ProtocolError where it is another's."""
        put = self._put(number)
        if put.joint is None:
            raise ProtocolError(f"the ticket {number} is of a RESERVE: COMMIT, do not LAND")
        return put.joint

    def is_free(self, number: int) -> bool:
        """Whether nobody works on this ticket."""
        return not self._put(number).turn.locked()

    @contextlib.asynccontextmanager
    async def turn(self, number: int) -> AsyncIterator[None]:
        """Works on a ticket alone; it does not end meanwhile. Raises ConfigError where it has ended."""
        put = self._put(number)
        try:
            async with put.turn:
                if put.over:
                    raise ConfigError(f"the put {number} has ended")
                yield
        finally:
            if put.over:
                self._end(put)

    def _put(self, number: int) -> _Put:
        put = self._puts.get(number)
        if put is None:
            raise ConfigError(f"there is no put {number}, or it has ended")
        return put

    def abandon(self, numbers: Iterable[int]) -> None:
        """ABANDON, of tickets that it has or is yet to get."""
        for number in numbers:
            if number in self._puts:
                self.end_put(number)
            else:
                self._asked_puts.give_up(number)

    def end_put(self, number: int) -> None:
        """Nobody writes to the extents of this ticket any more. Unknown numbers are ignored."""
        put = self._puts.pop(number, None)
        if put is None:
            return
        put.over = True
        if not put.turn.locked():  # else whoever works on it ends it
            self._end(put)

    def _end(self, put: _Put) -> None:
        """Nobody works on a ticket that is over. Idempotent."""
        if put.ended:
            return
        put.ended = True
        if not put.many:
            self.pinned_bytes -= put.size
            put.end()
            return
        task = asyncio.get_running_loop().create_task(self._ending(put))
        self.endings.add(task)
        task.add_done_callback(self.endings.discard)

    async def _ending(self, put: _Put) -> None:
        try:
            for _ in put.joint.ending():
                await asyncio.sleep(0)
        finally:
            put.end()  # what is left of it, where this was cancelled
            self.pinned_bytes -= put.size

    async def all_ended(self) -> None:
        """Returns when what it has given up so far is free."""
        if self.endings:
            await asyncio.wait(list(self.endings))

    # -- questions -----------------------------------------------------------------------------------------------------

    def work(self, lane: str, post: Post, number: int, work: Callable[[], Awaitable[bytes]], size: int) -> None:
        """Answers a question in a task, now or when there is a place. Raises ProtocolError where too many wait."""
        way = self._lanes.setdefault(lane, _Lane())
        question = _Question(post, number, work, size)
        if way.busy < self.limits.tasks:
            self._start(way, question)
            return
        if self._waiting >= self.limits.waiting or self._waiting_bytes + size > self.limits.waiting_bytes:
            raise ProtocolError(f"{self._waiting} questions wait already")
        self._waiting += 1
        self._waiting_bytes += size
        way.waiting.append(question)

    def _start(self, way: _Lane, question: _Question) -> None:
        way.busy += 1
        task = asyncio.get_running_loop().create_task(self._answer(question))
        self._tasks[task] = question.post
        task.add_done_callback(lambda done: self._done(way, done))

    def _done(self, way: _Lane, task: asyncio.Task[None]) -> None:
        self._tasks.pop(task, None)
        way.busy -= 1
        if not task.cancelled() and (fault := task.exception()) is not None:
            self.report(fault)
        while way.waiting and way.busy < self.limits.tasks:
            question = way.waiting.popleft()
            self._waiting -= 1
            self._waiting_bytes -= question.size
            if not question.post.closed:
                self._start(way, question)

    async def _answer(self, question: _Question) -> None:
        post, number = question.post, question.number
        try:
            post.answer(number, await question.work())
        except (TierCacheError, OSError, LookupError) as fault:  # a TimeoutError is an OSError
            post.fault(number, fault)
        except Exception as fault:  # noqa: BLE001  # the boundary to other processes: they get a fault, we a report
            self.report(fault)
            post.fault(number, UnavailableError(f"the owner could not answer: {fault!r}"))

    def report(self, fault: BaseException) -> None:
        """Something of ours went wrong."""
        self._metrics.add("tiercache_internal_errors_total")
        log.error("a question of process %d failed; the owner goes on", self.peer.pid, exc_info=fault)

    # -- connections and the end ---------------------------------------------------------------------------------------

    def leave(self, post: Post) -> None:
        """A connection has ended; what was asked over it is asked no longer."""
        self.posts.discard(post)
        for task, asker in list(self._tasks.items()):
            if asker is post:
                task.cancel()
        if post is self.line:
            self.line = None
            self.loads.lose("its connection ended")

    def again(self) -> list[Post]:
        """The process begins anew: it writes nothing any more that it began before, and has its leases still. Answers
        its former connections, to be closed."""
        former = list(self.posts)
        for post in former:
            self.leave(post)
        self._stop("it begins anew")
        self.unnamed, self.may_name = set(self._leases), True
        return former

    def _stop(self, why: str) -> None:
        """Loads and puts end: the process writes no more."""
        for way in self._lanes.values():
            way.waiting.clear()
        self._waiting = self._waiting_bytes = 0
        for task in list(self._tasks):
            task.cancel()
        self.loads.stop(why)
        for number in list(self._puts):
            self.end_put(number)

    def end(self) -> list[Post]:
        """The process is dead, or speaks no more. Idempotent. Answers its connections, to be closed."""
        if self.ended:
            return []
        self.ended = True
        if self.watch is not None:
            self.watch.close()
        former, self.posts, self.line = list(self.posts), set(), None
        self._stop("the process has gone")
        self._asked.clear()
        self._asked_puts.clear()
        self.release(list(self._leases))
        return former

    @property
    def busy(self) -> bool:
        """Whether a task of this session still runs."""
        return bool(self._tasks or self.endings)

    async def settled(self) -> None:
        """Returns when no task of this session runs any more."""
        while self._tasks or self.endings:
            await asyncio.wait([*self._tasks, *self.endings])
