"""Telling: every other client forgets before the one who wrote is answered."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from tiercache.wire.frames import Op

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tiercache.wire.post import Post


class _Round:
    """Who has not said yet that it forgot, in answer to one message."""

    def __init__(self, posts: set[Post], end: asyncio.TimerHandle) -> None:
        self.posts, self.end = posts, end
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Telling:
    """Sends FORGET and counts who answered with TOLD; on the owner's loop.

    How long a client believes what it knows is its own affair, so what counts is that it says that it forgot. One that
    is silent for `wait_s` (a stopped process) still hears of everything in order, but is waited for by nobody until it
    speaks.
    """

    def __init__(self, wait_s: float) -> None:
        self._wait_s = wait_s
        self._rounds: dict[int, _Round] = {}
        self._last = 0
        self._silent: set[Post] = set()

    def begin(self, posts: Iterable[Post], body: bytes) -> asyncio.Future[None] | None:
        """Tells these clients now; the answer is done when all have forgotten, or None where that is so already."""
        self._last += 1
        number = self._last
        waited = set()
        for post in posts:
            post.push(Op.FORGET, number, body)
            if post not in self._silent and not post.closed:
                waited.add(post)
        if not waited:
            return None
        end = asyncio.get_running_loop().call_later(self._wait_s, self._give_up, number)
        self._rounds[number] = found = _Round(waited, end)
        return found.done

    def told(self, post: Post, number: int) -> None:
        """A client has forgotten."""
        self._silent.discard(post)
        self._heard(post, number)

    def gone(self, post: Post) -> None:
        """A connection has ended: a client whose line it was forgets everything when it sees that."""
        self._silent.discard(post)
        for number in list(self._rounds):
            self._heard(post, number)

    def _heard(self, post: Post, number: int) -> None:
        found = self._rounds.get(number)
        if found is None:
            return
        found.posts.discard(post)
        if not found.posts:
            self._end(number)

    def _give_up(self, number: int) -> None:
        self._silent |= self._rounds[number].posts
        self._end(number)

    def _end(self, number: int) -> None:
        found = self._rounds.pop(number)
        found.end.cancel()
        if not found.done.done():
            found.done.set_result(None)
