"""Channels, lines and posts: questions meet their answers over real sockets, whatever either end does."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import struct
import threading
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.descriptors import Descriptors
from tiercache.errors import CapacityError, ProtocolError, UnavailableError
from tiercache.wire import frames, stream
from tiercache.wire import line as line_module
from tiercache.wire import post as post_module
from tiercache.wire.channel import Channel, Channels
from tiercache.wire.frames import HEADER, Frame, Op, Splitter, pack
from tiercache.wire.line import Line
from tiercache.wire.post import Post
from tiercache.wire.sockets import Lost

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

ECHO, SILENT, FAIL, NONSENSE, TWICE, WRONG, CUT, FDS, BROKEN, SIZE = (100 + i for i in range(10))


class Owner:
    """Posts on the running loop, which answer by the operation."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.posts: list[Post] = []
        self.told: list[Frame] = []
        self.kept: list[tuple[Post, int]] = []
        self.gone: list[str] = []
        self.changed = asyncio.Event()
        self.brought: list[int] = []

    def post(self) -> socket.socket:
        """The client's end of a fresh connection."""
        here, there = socket.socketpair()
        self.posts.append(Post(there, self.loop, self.take, self.ended))
        return here

    def ended(self, post: Post, why: str) -> None:
        self.gone.append(why)
        self.changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    def take(self, post: Post, frame: Frame) -> None:
        self.changed.set()
        op, number, body = frame
        if op in post_module.ONE_WAY:
            self.told.append(frame)
        elif op == ECHO:
            post.answer(number, bytes(body))
        elif op == SIZE:
            post.answer(number, bytes(struct.unpack("<Q", body)[0]))
        elif op == SILENT:
            self.kept.append((post, number))
        elif op == FAIL:
            post.fault(number, CapacityError("never fits"))
        elif op == NONSENSE:
            post.sock.send(b"\xff" * 64)
        elif op == TWICE:
            post.sock.send(pack(Op.ANSWER, number) * 2)
        elif op == WRONG:
            post.answer(number + 1, b"")
        elif op == CUT:
            post.sock.send(pack(Op.ANSWER, number, bytes(100))[:50])
            post.close()
        elif op == FDS:
            self.brought += post.take_fds()
            made = [os.memfd_create(f"m{i}") for i in range(body[0])]
            post.answer_fds(number, bytes(body), made)
            for each in made:
                os.close(each)
        elif op == BROKEN:
            raise RuntimeError("a bug")
        else:
            raise ProtocolError(f"no such operation: {op}")


@contextlib.asynccontextmanager
async def owner() -> AsyncIterator[Owner]:
    made = Owner()
    try:
        yield made
    finally:
        for post in made.posts:
            post.close()
        await asyncio.sleep(0)
        assert len(made.gone) == len(made.posts)


def play(scene: Callable[[], Awaitable[None]]) -> None:
    with Descriptors():
        asyncio.run(scene())  # type: ignore[arg-type]


async def elsewhere(function: Callable[..., Any], *args: Any, **more: Any) -> Any:
    return await asyncio.wait_for(asyncio.to_thread(function, *args, **more), 30)


# -- splitter


@given(
    st.lists(st.tuples(st.integers(0, 65535), st.integers(0, 2**64 - 1), st.binary(max_size=100)), max_size=12),
    st.lists(st.integers(0, 300), max_size=20),
    st.integers(0, 20),
)
def test_frames_come_out_as_they_went_in(messages: list[tuple[int, int, bytes]], cuts: list[int], missing: int) -> None:
    packed = b"".join(pack(*each) for each in messages)
    whole = packed[: max(len(packed) - missing, 0)]
    splitter, found, at = Splitter(), [], 0
    for cut in [*cuts, len(whole)]:
        found += splitter.feed(whole[at : at + cut])
        at = min(at + cut, len(whole))
    found = [(op, number, bytes(body)) for op, number, body in found]
    assert found == messages[: len(found)]
    if not missing or not messages:
        assert found == messages
    assert [(op, n, bytes(b)) for op, n, b in splitter.feed(packed[at:])] == messages[len(found) :]


def test_a_long_frame_is_refused_before_it_comes() -> None:
    with pytest.raises(ProtocolError, match="not a message"):
        Splitter().feed(HEADER.pack(frames.BODY_BYTES_MAX + 1, 2, 0, 1))
    with pytest.raises(ProtocolError, match="not a message"):
        Splitter().feed(HEADER.pack(1, 2, 1, 1))


# -- channel


def test_a_channel_asks() -> None:
    async def scene() -> None:
        async with owner() as other:
            channel = Channel(other.post())
            for size in (0, 1, 64, 70_000, 3 << 20, frames.BODY_BYTES_MAX):
                body = os.urandom(size % 1_000_000) + bytes(size - size % 1_000_000)
                assert await elsewhere(channel.ask, ECHO, body) == body
            with pytest.raises(ProtocolError, match="smaller batches"):
                channel.ask(ECHO, bytes(frames.BODY_BYTES_MAX + 1))
            with pytest.raises(CapacityError, match="never fits"):
                await elsewhere(channel.ask, FAIL)
            channel.tell(Op.RELEASE, b"12345678")
            assert await elsewhere(channel.ask, ECHO, b"still good") == b"still good"
            assert [(each.op, bytes(each.body)) for each in other.told] == [(Op.RELEASE, b"12345678")]
            assert other.posts[0].questions == 0
            channel.close()
            with pytest.raises(Lost):
                channel.ask(ECHO)
            with pytest.raises(Lost):
                channel.tell(Op.RELEASE)

    play(scene)


def test_an_answer_belongs_to_its_asker() -> None:
    """Bytes of one answer are not those of the next."""

    async def scene() -> None:
        async with owner() as other:
            channel = Channel(other.post())
            first = await elsewhere(channel.ask, ECHO, b"first")
            assert await elsewhere(channel.ask, ECHO, b"other") == b"other"
            assert first == b"first"
            channel.close()

    play(scene)


@pytest.mark.parametrize("op", [NONSENSE, TWICE, WRONG, CUT, BROKEN, 999])
def test_a_channel_ends_with_whatever_is_no_answer(op: int) -> None:
    async def scene() -> None:
        async with owner() as other:
            other.loop.set_exception_handler(lambda loop, context: None)
            channel = Channel(other.post(), 10)
            with pytest.raises((Lost, ProtocolError)) as caught:
                await elsewhere(channel.ask, op)
            assert isinstance(caught.value, ProtocolError) == (op in (NONSENSE, TWICE, WRONG))
            assert channel.closed

    play(scene)


def test_a_deadline_ends_a_channel() -> None:
    async def scene() -> None:
        async with owner() as other:
            channel = Channel(other.post(), 20)
            with pytest.raises(Lost, match=r"within 0.01 s"):
                await elsewhere(channel.ask, SILENT, wait_s=0.01)
            assert channel.closed
            await other.until(lambda: bool(other.gone))
            post, number = other.kept[0]
            post.answer(number)  # nobody is there any more: no error
            patient = Channel(other.post(), 0.01)
            assert await elsewhere(patient.ask, ECHO, b"x", wait_s=20) == b"x"
            patient.close()

    play(scene)


def test_an_owner_that_reads_nothing_ends_a_channel() -> None:
    here, there = socket.socketpair()
    channel = Channel(here, 0.01)
    with pytest.raises(Lost, match="within"):
        channel.ask(ECHO, bytes(8 << 20))
    assert channel.closed
    there.close()


def test_an_answer_that_trickles_in_has_one_deadline() -> None:
    class Leaps:
        """A clock on which every look costs ten seconds."""

        now_s = 0.0

        def monotonic(self) -> float:
            self.now_s += 10
            return self.now_s

        def wall(self) -> float:
            return self.now_s

    here, there = socket.socketpair()
    there.send(pack(Op.ANSWER, 1, bytes(100))[:50])
    channel = Channel(here, 5, clock=Leaps())
    there.send(bytes(10))
    with pytest.raises(Lost, match="within 5 s"):
        channel.ask(ECHO)
    there.close()


def test_a_signal_that_raises_ends_a_channel() -> None:
    here, there = socket.socketpair()
    channel, caught = Channel(here), threading.Event()

    def interrupt() -> None:
        there.recv(100)  # the question has come: the main thread waits for its answer
        while not caught.wait(0.2):  # a signal that comes just before a system call does not interrupt it
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    with pytest.raises(KeyboardInterrupt):
        thread.start()
        channel.ask(ECHO)
    caught.set()
    thread.join()
    assert channel.closed
    there.close()


def test_a_signal_that_does_not_raise_ends_nothing() -> None:
    here, there = socket.socketpair()
    channel = Channel(here)
    seen = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))

    def interrupt() -> None:
        number = HEADER.unpack(there.recv(100))[3]
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
        there.send(pack(Op.ANSWER, number, b"x"))

    thread = threading.Thread(target=interrupt)
    try:
        thread.start()
        assert channel.ask(ECHO) == b"x"
        thread.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == [signal.SIGUSR1]
    channel.close()
    there.close()


def test_descriptors_come_with_answers_and_go_with_questions() -> None:
    async def scene() -> None:
        async with owner() as other:
            channel = Channel(other.post())
            mine = os.memfd_create("mine")
            body, fds = await elsewhere(channel.ask_fds, FDS, bytes([3]), bring=[mine])
            assert body == bytes([3])
            names = [os.readlink(f"/proc/self/fd/{each}").split()[0] for each in (*fds, *other.brought)]
            assert names == ["/memfd:m0", "/memfd:m1", "/memfd:m2", "/memfd:mine"]
            for each in (mine, *fds, *other.brought):
                os.close(each)
            assert await elsewhere(channel.ask_fds, ECHO, b"none") == (b"none", [])
            with pytest.raises(CapacityError):
                await elsewhere(channel.ask_fds, FAIL)
            with pytest.raises(UnavailableError, match="not all descriptors"):
                await elsewhere(channel.ask_fds, FDS, bytes([3]), fds_max=2)
            assert channel.closed

    play(scene)


def test_descriptors_nobody_takes_are_closed() -> None:
    async def scene() -> None:
        async with owner() as other:
            channel = Channel(other.post())
            await elsewhere(channel.ask_fds, ECHO, b"x", bring=[0, 1, 2])
            assert len(other.posts[0]._stream.fds) == 3
            channel.close()

    async def taken() -> None:
        async with owner() as other:
            channel = Channel(other.post())
            assert await elsewhere(channel.ask_fds, FDS, b"\0", bring=[0, 1, 2]) == (b"\0", [])
            assert len(other.brought) == 3
            await elsewhere(channel.ask_fds, ECHO, b"x", bring=[0, 1, 2])  # the kernel closes these
            channel.close()
            for each in other.brought:
                os.close(each)

    play(scene)
    play(taken)


# -- channels


def test_channels_are_few_and_used_again() -> None:
    async def scene() -> None:
        async with owner() as other:
            made = []

            def make() -> Channel:
                made.append(Channel(asyncio.run_coroutine_threadsafe(fresh(), other.loop).result()))
                return made[-1]

            async def fresh() -> socket.socket:
                return other.post()

            pool = Channels(make, 3)

            def many(seed: int) -> None:
                for i in range(200):
                    body = f"{seed} {i}".encode()
                    assert pool.ask(ECHO, body) == body
                    pool.tell(Op.RELEASE, body)

            await asyncio.gather(*[elsewhere(many, seed) for seed in range(8)])
            assert len(made) <= 3
            last = await elsewhere(pool.ask, SIZE, struct.pack("<Q", 5))
            assert last == bytes(5)
            pool.close()
            with pytest.raises(Lost):
                pool.ask(ECHO)
            await other.until(lambda: len(other.gone) == len(made))
            assert len(other.told) == 1600

    play(scene)


def test_busy_channels_are_waited_for_and_not_for_ever() -> None:
    async def scene() -> None:
        async with owner() as other:
            pool = Channels(lambda: Channel(sockets.pop(), 30), 1, 0.01)
            sockets = [other.post()]
            waiting = asyncio.create_task(elsewhere(pool.ask, SILENT))
            await other.until(lambda: bool(other.kept))
            with pytest.raises(UnavailableError, match="all 1 connections"):
                await elsewhere(pool.ask, ECHO)
            post, number = other.kept[0]
            post.answer(number, b"now")
            assert await waiting == b"now"
            assert await elsewhere(pool.ask, ECHO, b"x") == b"x"
            pool.close()

    play(scene)


def test_a_lost_owner_ends_idle_and_busy_channels_and_new_ones_are_made() -> None:
    async def scene() -> None:
        async with owner() as other:
            sockets = [other.post() for _ in range(3)]
            pool = Channels(lambda: Channel(sockets.pop(0)), 2)
            busy = asyncio.create_task(elsewhere(pool.ask, SILENT))
            await other.until(lambda: bool(other.kept))
            assert await elsewhere(pool.ask, ECHO, b"x") == b"x"
            pool.lost()
            with pytest.raises(Lost):
                await busy
            assert await elsewhere(pool.ask, ECHO, b"y") == b"y"
            assert len(other.gone) >= 2
            pool.close()

    play(scene)


def test_what_cannot_connect_says_so_and_leaves_its_place() -> None:
    async def scene() -> None:
        async with owner() as other:
            sockets: list[socket.socket] = []

            def make() -> Channel:
                if not sockets:
                    raise UnavailableError("nobody there")
                return Channel(sockets.pop())

            pool = Channels(make, 1)
            for _ in range(3):
                with pytest.raises(UnavailableError, match="nobody there"):
                    pool.ask(ECHO)
            sockets.append(other.post())
            assert await elsewhere(pool.ask, ECHO, b"x") == b"x"
            pool.close()

    play(scene)


def test_a_forked_child_has_none_of_the_parents_connections() -> None:
    async def scene() -> None:
        async with owner() as other:
            channel, client = Channel(other.post()), Client(other.post())
            assert await elsewhere(channel.ask, ECHO, b"x") == b"x"
            child = os.fork()
            if not child:
                code = 1
                try:
                    client.line.tell(Op.RELEASE, b"from a child")
                    channel.ask(ECHO)
                except Lost:
                    code = 0
                finally:
                    os._exit(code)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            assert await elsewhere(channel.ask, ECHO, b"parent") == b"parent"
            assert await client.line.ask(ECHO, b"parent") == b"parent"
            assert not other.told
            channel.close()
            client.line.close()

    play(scene)


def test_a_channel_that_was_interrupted_as_it_was_answered_is_not_used_again() -> None:
    async def scene() -> None:
        async with owner() as other:
            sockets = [other.post() for _ in range(2)]
            pool = Channels(lambda: Channel(sockets.pop()), 1)
            assert await elsewhere(pool.ask, ECHO, b"x") == b"x"
            pool._idle[0].interrupt()
            assert await elsewhere(pool.ask, ECHO, b"y") == b"y"
            assert not sockets
            pool.close()

    play(scene)


def test_a_forked_child_gives_up_without_a_word() -> None:
    async def scene() -> None:
        async with owner() as other:
            sockets = [other.post()]
            pool = Channels(lambda: Channel(sockets.pop()), 1)
            assert await elsewhere(pool.ask, ECHO, b"x") == b"x"
            child = os.fork()
            if not child:
                code = 1
                try:
                    pool.forget()
                    pool.ask(ECHO)
                except Lost:
                    code = 0
                finally:
                    os._exit(code)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            assert await elsewhere(pool.ask, ECHO, b"parent") == b"parent"
            pool.close()

    play(scene)


# -- line


class Client:
    """A line and what it heard."""

    def __init__(self, sock: socket.socket) -> None:
        self.pushed: list[Frame] = []
        self.lost: list[str] = []
        self.line = Line(sock, asyncio.get_running_loop(), self.pushed.append, self.lost.append)


def test_many_questions_over_one_line() -> None:
    async def scene() -> None:
        async with owner() as other:
            client = Client(other.post())
            bodies = [os.urandom(i * 7 % 5000) for i in range(2000)]
            answers = await asyncio.gather(*[client.line.ask(ECHO, body) for body in bodies])
            assert answers == bodies
            big = bytes(frames.BODY_BYTES_MAX)
            assert [len(each) for each in await asyncio.gather(*[client.line.ask(ECHO, big) for _ in range(5)])]
            with pytest.raises(CapacityError):
                await client.line.ask(FAIL)
            with pytest.raises(ProtocolError):
                await client.line.ask(ECHO, big + b"x")
            number = client.line.number()
            asked = asyncio.create_task(client.line.ask(SILENT, number=number))
            await other.until(lambda: bool(other.kept))
            assert other.kept[0][1] == number
            other.posts[0].push(Op.FILL, number, b"gaps")
            other.posts[0].push(Op.FORGET, 0, b"")
            client.line.tell(Op.FILLED, b"", number=number)
            other.posts[0].answer(number, b"done")
            assert await asked == b"done"
            assert [(each.op, each.number) for each in client.pushed] == [(Op.FILL, number), (Op.FORGET, 0)]
            assert await client.line.ask(ECHO) == b""
            assert [(each.op, each.number) for each in other.told] == [(Op.FILLED, number)]
            client.line.close()
            with pytest.raises(Lost):
                await client.line.ask(ECHO)
            await other.until(lambda: bool(other.gone))
            assert len(client.lost) == 1

    play(scene)


def test_answers_that_nobody_waits_for_any_more() -> None:
    async def scene() -> None:
        async with owner() as other:
            client = Client(other.post())
            late: list[bytes] = []
            asked = [
                asyncio.create_task(client.line.ask(SILENT, late=lambda body: late.append(bytes(body))))
                for _ in range(3)
            ]
            await other.until(lambda: len(other.kept) == 3)
            for each in asked[:2]:
                each.cancel()
            await asyncio.wait(asked[:2])
            for (post, number), body in zip(other.kept[1:], (b"one", b"two")):
                post.answer(number, body)
            assert await asked[2] == b"two"
            post, number = other.kept[0]
            post.fault(number, CapacityError("too late as well"))
            assert await client.line.ask(ECHO, b"x") == b"x"
            assert late == [b"one"]
            client.line.close()

    play(scene)


def test_an_answer_and_a_cancellation_in_one_turn() -> None:
    async def scene() -> None:
        async with owner() as other:
            client = Client(other.post())
            late: list[bytes] = []
            asked = asyncio.create_task(client.line.ask(SILENT, late=lambda body: late.append(bytes(body))))
            await other.until(lambda: bool(other.kept))
            # What the loop would do on a readable socket, and a cancellation before the asker runs.
            client.line._take(Frame(Op.ANSWER, other.kept[0][1], memoryview(b"granted")))
            asked.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asked
            assert late == [b"granted"]
            client.line.close()

    play(scene)


def test_a_lost_line_fails_every_question_once() -> None:
    async def scene() -> None:
        async with owner() as other:
            client = Client(other.post())
            asked = [asyncio.create_task(client.line.ask(SILENT)) for _ in range(5)]
            await other.until(lambda: len(other.kept) == 5)
            asked[0].cancel()
            other.posts[0].close()
            results = await asyncio.gather(*asked[1:], return_exceptions=True)
            assert [type(each) for each in results] == [Lost] * 4
            assert len(client.lost) == 1
            client.line.tell(Op.RELEASE)
            client.line.close()

    play(scene)


@pytest.mark.parametrize("op", [NONSENSE, TWICE, WRONG, CUT])
def test_a_line_ends_with_nonsense(op: int) -> None:
    async def scene() -> None:
        async with owner() as other:
            client = Client(other.post())
            asked = asyncio.create_task(client.line.ask(SILENT))
            await other.until(lambda: bool(other.kept))
            with contextlib.suppress(Lost):
                await client.line.ask(op)
            with pytest.raises(Lost):
                await asked
            assert client.line.closed

    play(scene)


def test_descriptors_over_a_line() -> None:
    async def scene() -> None:
        async with owner() as other:
            client = Client(other.post())
            first = asyncio.create_task(client.line.ask_fds(FDS, bytes([4])))
            gone = asyncio.create_task(client.line.ask_fds(FDS, bytes([2])))
            last = asyncio.create_task(client.line.ask_fds(FDS, bytes([1])))
            await asyncio.sleep(0)
            gone.cancel()
            for asked, count in ((first, 4), (last, 1)):
                body, fds = await asked
                assert (body[0], len(fds)) == (count, count)
                for each in fds:
                    os.close(each)
            client.line.close()

    play(scene)


def test_a_line_holds_its_askers_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_module, "OPEN_MAX", 3)

    async def scene() -> None:
        async with owner() as other:
            client = Client(other.post())
            asked = [asyncio.create_task(client.line.ask(SILENT)) for _ in range(5)]
            await other.until(lambda: len(other.kept) == 3)
            asked[3].cancel()
            for post, number in other.kept[:3]:
                post.answer(number)
            await other.until(lambda: len(other.kept) == 4)
            assert other.posts[0].questions == 1
            other.posts[0].answer(other.kept[3][1])
            assert len(await asyncio.gather(*asked, return_exceptions=True)) == 5
            client.line.close()

    play(scene)


def test_a_line_does_not_pile_up_what_the_owner_does_not_read() -> None:
    async def scene() -> None:
        async with owner() as other:
            client = Client(other.post())
            other.posts[0].pause(True)
            body = bytes(1 << 20)
            asked = [asyncio.create_task(client.line.ask(ECHO, body)) for _ in range(50)]
            for _ in range(100):
                await asyncio.sleep(0)
            assert client.line._stream.out_bytes < 4 << 20
            room = asyncio.create_task(client.line.room())
            await asyncio.sleep(0)
            assert not room.done()
            other.posts[0].pause(False)
            assert await asyncio.gather(*asked) == [body] * 50
            await room
            client.line.close()

    play(scene)


# -- post


def test_a_peer_that_never_reads_is_held_back_and_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "OUT_BYTES_MAX", 8 << 20)

    async def scene() -> None:
        async with owner() as other:
            here = other.post()
            post = other.posts[0]
            here.setblocking(False)
            # Its questions are answered only as long as little enough is unsent.
            sent = 0
            for _ in range(200):
                with contextlib.suppress(BlockingIOError):
                    here.send(pack(SIZE, 1, struct.pack("<Q", 1 << 18)))
                    sent += 1
                await asyncio.sleep(0)
            assert not post.closed
            assert post._stream.out_bytes <= (1 << 20) + (1 << 18) * (stream.RECV_BYTES // 24)
            assert not post._stream._reading
            while not post.closed:
                post.push(Op.FORGET, 0, bytes(1 << 20))
            assert post._stream.out_bytes < 10 << 20
            await other.until(lambda: bool(other.gone))
            assert "does not read" in other.gone[0]
            post.answer(1)
            here.close()

    play(scene)


def test_more_questions_than_any_client_of_ours_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(post_module, "QUESTIONS_MAX", 10)

    async def scene() -> None:
        async with owner() as other:
            here = other.post()
            here.send(pack(SILENT, 1) * 10 + pack(Op.RELEASE, 0))
            await other.until(lambda: len(other.kept) == 10)
            assert not other.gone
            here.send(pack(SILENT, 1))
            await other.until(lambda: bool(other.gone))
            assert "10 questions" in other.gone[0]
            here.close()

    play(scene)


def test_a_fault_of_ours_ends_only_that_connection() -> None:
    async def scene() -> None:
        async with owner() as other:
            seen: list[Any] = []
            other.loop.set_exception_handler(lambda loop, context: seen.append(context["exception"]))
            channel, bystander = Channel(other.post(), 20), Channel(other.post(), 20)
            with pytest.raises(Lost):
                await elsewhere(channel.ask, BROKEN)
            assert [str(each) for each in seen] == ["a bug"]
            assert await elsewhere(bystander.ask, ECHO, b"fine") == b"fine"
            bystander.close()

    play(scene)


def test_frames_after_the_end_are_not_dealt_with() -> None:
    async def scene() -> None:
        async with owner() as other:
            here = other.post()
            here.send(pack(CUT, 1) + pack(SILENT, 2))
            await other.until(lambda: bool(other.gone))
            assert not other.kept
            here.close()

    play(scene)


def mutated(chance: random.Random) -> bytes:
    """A valid message, hurt."""
    op = chance.choice([*Op, ECHO, FAIL, SIZE])
    body = struct.pack("<Q", chance.randrange(1 << 12)) if op == SIZE else chance.randbytes(chance.randrange(80))
    message = bytearray(pack(op, chance.getrandbits(64), body))
    kind = chance.randrange(6)
    if kind == 0:
        message[chance.randrange(len(message))] ^= 1 << chance.randrange(8)
    elif kind == 1:
        del message[chance.randrange(len(message)) :]
    elif kind == 2:
        message[chance.randrange(len(message)) :] = chance.randbytes(chance.randrange(200))
    return bytes(message)


def feed(sock: socket.socket, chance: random.Random, data: bytes) -> bool:
    """Sends it in pieces; whether the other end still takes it."""
    at = 0
    while at < len(data):
        size = chance.choice([1, 7, 16, 100, 1000, 100_000])
        try:
            at += sock.send(data[at : at + size], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return True
        except OSError:
            return False
    return True


def fuzzed(seed: int) -> Iterator[bytes]:
    chance = random.Random(seed)
    while True:
        batch = b"".join(mutated(chance) if chance.random() < 0.03 else pack(ECHO, 7, b"x" * 30) for _ in range(50))
        yield batch if chance.random() < 0.95 else chance.randbytes(chance.randrange(2000))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_no_bytes_harm_anybody_else(seed: int) -> None:
    """100,000 messages, many of them hurt, cut anywhere: a connection is answered or ends, a bystander never waits."""
    messages = 0

    async def scene() -> None:
        nonlocal messages
        chance = random.Random(seed)
        async with owner() as other:
            bystander = Client(other.post())
            batches = fuzzed(seed)
            while messages < 25_000:
                here = other.post()
                for _ in range(chance.randrange(1, 20)):
                    if not feed(here, chance, next(batches)):
                        break
                    messages += 50
                    await asyncio.sleep(0)
                    with contextlib.suppress(BlockingIOError, ConnectionError):
                        here.recv(1 << 20, socket.MSG_DONTWAIT)
                assert await bystander.line.ask(ECHO, b"fine") == b"fine"
                assert other.posts[-1]._stream.out_bytes <= stream.OUT_BYTES_MAX
                here.close()
            await other.until(lambda: len(other.gone) == len(other.posts) - 1)
            bystander.line.close()

    play(scene)
    assert messages >= 25_000
