"""Channels: blocking questions to an owner, from any thread, outside every event loop."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

ANSWER_S = 30.0
"""How long an answer may take unless the asker says otherwise."""
CHANNELS_MAX = 32


class Channel:
    """One connection, one question at a time, one thread at a time. Closed by everything but an answer and the owner's
    own fault: a deadline that passed, a signal that raised, nonsense from the other end; because the answer that may
    still come would be taken for that of the next question."""

    closed: bool

    def __init__(self, sock: socket.socket, wait_s: float = ANSWER_S) -> None: ...

    def ask(self, op: int, body: bytes = b"", *, wait_s: float | None = None) -> memoryview:
        """The body of the answer (its own memory). Raises the owner's fault, or Lost."""
        raise NotImplementedError

    def ask_fds(
        self, op: int, body: bytes = b"", *, fds_max: int = 253, bring: Sequence[int] = (), wait_s: float | None = None
    ) -> tuple[memoryview, list[int]]:
        """As `ask`, with the descriptors beside the answer (at most fds_max), which are the caller's to close; `bring`
        goes beside the question."""
        raise NotImplementedError

    def tell(self, op: int, body: bytes = b"") -> None:
        """Sends a one-way message. Raises Lost."""

    def interrupt(self) -> None:
        """Ends the connection under whoever waits on it in another thread: it raises Lost there."""

    def close(self) -> None:
        """Idempotent."""


class Channels:
    """At most `limit` channels made by `make` (which connects and says HELLO); the last one used is used first. A
    question waits up to `wait_s` for a free one, then raises UnavailableError; what `make` raises goes to the asker."""

    def __init__(self, make: Callable[[], Channel], limit: int = CHANNELS_MAX, wait_s: float = ANSWER_S) -> None: ...

    def ask(self, op: int, body: bytes = b"", *, wait_s: float | None = None) -> memoryview:
        """As Channel.ask, on any free channel, from any thread."""
        raise NotImplementedError

    def ask_fds(
        self, op: int, body: bytes = b"", *, fds_max: int = 253, bring: Sequence[int] = (), wait_s: float | None = None
    ) -> tuple[memoryview, list[int]]:
        """As Channel.ask_fds."""
        raise NotImplementedError

    def tell(self, op: int, body: bytes = b"") -> None:
        """As Channel.tell. Nothing is said about its order with anything told or asked on another channel."""

    def lost(self) -> None:
        """Ends all channels, idle and busy ones (their askers raise Lost); the next question makes a new one."""

    def close(self) -> None:
        """As `lost`, and every later question raises Lost."""

    def forget(self) -> None:
        """Gives all up in a forked child, without a word to the owner: the connections are the parent's."""
